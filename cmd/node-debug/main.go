// Node-debug is what the debug image has besides node: u-root's commands that
// can be imported, in one binary that does what its name says, and the /init
// that puts a shell on the console before it becomes the real one. The default
// image has nothing of it, and init knows nothing of it.
package main

import (
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"syscall"

	"github.com/u-root/u-root/pkg/core"
	"github.com/u-root/u-root/pkg/core/base64"
	"github.com/u-root/u-root/pkg/core/cat"
	"github.com/u-root/u-root/pkg/core/chmod"
	"github.com/u-root/u-root/pkg/core/cp"
	"github.com/u-root/u-root/pkg/core/find"
	"github.com/u-root/u-root/pkg/core/ls"
	"github.com/u-root/u-root/pkg/core/mkdir"
	"github.com/u-root/u-root/pkg/core/mktemp"
	"github.com/u-root/u-root/pkg/core/mv"
	"github.com/u-root/u-root/pkg/core/rm"
	"github.com/u-root/u-root/pkg/core/shasum"
	"github.com/u-root/u-root/pkg/core/tar"
	"github.com/u-root/u-root/pkg/core/touch"
	"github.com/u-root/u-root/pkg/core/xargs"
)

var commands = map[string]func() core.Command{
	"base64": base64.New,
	"cat":    cat.New,
	"chmod":  chmod.New,
	"cp":     cp.New,
	"find":   find.New,
	"ls":     ls.New,
	"mkdir":  mkdir.New,
	"mktemp": mktemp.New,
	"mv":     mv.New,
	"rm":     rm.New,
	"shasum": shasum.New,
	"tar":    tar.New,
	"touch":  touch.New,
	"xargs":  xargs.New,
}

func main() {
	switch {
	case os.Getpid() == 1:
		os.Exit(becomeInit())
	case len(os.Args) == 2 && os.Args[1] == "console":
		os.Exit(console(os.Stdin, os.Stdout, "/bin/sh"))
	}
	os.Exit(run(os.Args, os.Stderr))
}

// becomeInit starts the console's shell in a session of its own, so that
// Ctrl-C reaches what runs in it, and executes the real init as PID 1.
func becomeInit() int {
	cmd := exec.Command("/bin/node-debug", "console")
	cmd.Env = []string{"PATH=/bin", "HOME=/root", "TERM=linux"}
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	if err := cmd.Start(); err != nil {
		fmt.Fprintf(os.Stderr, "debug: no shell on the console: %v\n", err)
	}
	err := syscall.Exec("/bin/node", []string{"/init"}, os.Environ())
	fmt.Fprintf(os.Stderr, "debug: starting init: %v\n", err)
	return 1
}

// console offers a shell to whoever presses Enter, again and again. Until then
// nothing reads the console or asks the terminal at its other end anything.
// It returns when the console is gone.
func console(in, out *os.File, shell string) int {
	line := make([]byte, 256)
	for {
		fmt.Fprintln(out, "debug: press Enter for a shell")
		if n, err := in.Read(line); err != nil || n == 0 {
			return 1
		}
		cmd := exec.Command(shell)
		cmd.Dir = "/"
		cmd.Stdin, cmd.Stdout, cmd.Stderr = in, out, out
		if err := cmd.Run(); err != nil {
			fmt.Fprintf(out, "debug: %v\n", err)
		}
	}
}

// run does what the base name of args[0] says, or else args[1].
func run(args []string, stderr io.Writer) int {
	name, rest := filepath.Base(args[0]), args[1:]
	if commands[name] == nil && len(rest) > 0 {
		name, rest = rest[0], rest[1:]
	}
	if commands[name] == nil {
		var names []string
		for n := range commands {
			names = append(names, n)
		}
		slices.Sort(names)
		fmt.Fprintf(stderr, "usage: node-debug COMMAND ARGS…\ncommands: %v\n", names)
		return 2
	}
	if err := commands[name]().Run(rest...); err != nil {
		fmt.Fprintf(stderr, "%s: %v\n", name, err)
		return 1
	}
	return 0
}
