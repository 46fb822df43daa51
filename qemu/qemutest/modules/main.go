// Command modules is the first program of a guest with a kernel that has its
// drivers as modules, as distributions build them: it loads what lies in /modules
// and becomes /init. The appliance's own kernel needs no such thing.
package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

func main() {
	files, err := filepath.Glob("/modules/*.ko")
	// One that needs another fails until that is there.
	for progress := true; progress && len(files) > 0; {
		var left []string
		err = nil
		for _, f := range files {
			if e := load(f); e != nil {
				left, err = append(left, f), errors.Join(err, e)
			}
		}
		progress = len(left) < len(files)
		files = left
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "modules:", err)
	}
	fmt.Fprintln(os.Stderr, "modules:", unix.Exec("/init", []string{"/init"}, os.Environ()))
}

func load(file string) error {
	f, err := os.Open(file)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := unix.FinitModule(int(f.Fd()), "", 0); err != nil && err != unix.EEXIST {
		return fmt.Errorf("%s: %w", file, err)
	}
	return nil
}
