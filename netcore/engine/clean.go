package engine

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"

	"clonecluster/netcore/clone"
	"clonecluster/netcore/macvlan"
)

// clean is the verb "clean": it takes back what an engine has left that was killed and
// is not started again. The result is the exit code.
func clean(args []string, stdout, stderr io.Writer) int {
	flags := flag.NewFlagSet("cloned clean", flag.ContinueOnError)
	flags.SetOutput(stderr)
	socket := flags.String("status-socket", DefaultStatusSocket, "`path` of the former engine's socket")
	bpffs := flags.String("bpffs", DefaultBPFFS, "`folder` of the BPF file system that it used")
	flags.Usage = func() {
		fmt.Fprint(stderr, "Usage: cloned clean [flags]\n\nRemoves clone0 and the VIP, and what belongs to them, when the engine that made\nthem was killed and is not to be started again. Its connections end.\n\nFlags:\n")
		flags.PrintDefaults()
	}
	if err := flags.Parse(args); errors.Is(err, flag.ErrHelp) {
		return 0
	} else if err != nil {
		return 2
	}
	if flags.NArg() > 0 {
		fmt.Fprintf(stderr, "cloned clean: unexpected argument %q\n", flags.Arg(0))
		return 2
	}
	removed, err := clone.Remove(slog.New(slog.NewTextHandler(stderr, nil)), func() error {
		err := macvlan.Forget(*bpffs)
		for _, file := range []string{*socket, *socket + ".drained"} {
			if e := os.Remove(file); e != nil && !errors.Is(e, os.ErrNotExist) {
				err = errors.Join(err, e)
			}
		}
		return err
	})
	switch {
	case err != nil:
		fmt.Fprintf(stderr, "cloned clean: %v\n", err)
		return 1
	case removed:
		fmt.Fprintln(stdout, "removed clone0 and what belongs to it")
	default:
		fmt.Fprintln(stdout, "there was no clone0 of ours")
	}
	return 0
}
