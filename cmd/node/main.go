// Node is the only program of the appliance. What it is depends on the name it
// is called by: one file instead of three shares the Go runtime and net/http,
// which is most of their size, in the image and in the page cache.
package main

import (
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"

	"clonecluster/cmd/internal/webd"
	"clonecluster/netcore/engine"
	"clonecluster/uinit"
)

// programs maps the names to what they run: arguments in, exit code out.
var programs = map[string]func(args []string) int{
	"init":   func([]string) int { uinit.Main(); return 1 }, // it never returns
	"cloned": engine.Main,
	"webd":   webd.Main,
}

func main() { os.Exit(run(os.Args, programs, os.Stderr)) }

// run starts the program that the base name of args[0] names, or else the one
// that args[1] names, for trying them out: "node webd --help".
func run(args []string, programs map[string]func([]string) int, stderr io.Writer) int {
	for i := range min(2, len(args)) {
		if p := programs[filepath.Base(args[i])]; p != nil {
			return p(args[i+1:])
		}
	}
	fmt.Fprintf(stderr, "usage: node PROGRAM ARGS…, or a link to node with the name of the program\nprograms: %v\n",
		slices.Sorted(maps.Keys(programs)))
	return 2
}
