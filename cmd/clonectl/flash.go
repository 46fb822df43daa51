package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"clonecluster/image/flash"
)

type flashFlags struct {
	image              string
	yes, force, asJSON bool
}

func newFlashCmd() *cobra.Command {
	var flags flashFlags
	cmd := &cobra.Command{
		Use:   "flash [DEVICE]",
		Short: "Write the disk image to a USB stick, and check that it is there",
		Long: `Flash writes a disk image to a removable device, reads it back past the kernel's
cache, and compares. Without DEVICE it lists the removable devices.

What is mounted or part of anything, what this machine runs from and what is
write-protected is refused. DEVICE can also be a file that is there already and
large enough. After an interrupt the message says what state it is in.

The image holds the cluster's key: whoever has the stick can join the cluster.`,
		Example: `  clonectl flash                                         # which devices are there?
  clonectl flash /dev/sdb                                # asks before it writes
  clonectl flash /dev/sdb --yes --image build/pc-x86_64/usb.img`,
		Args: usageArgs(cobra.MaximumNArgs(1)),
		ValidArgsFunction: func(_ *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
			var names []string
			if devices, err := flash.Devices(); err == nil && len(args) == 0 {
				for _, d := range devices {
					if d.Check(false) == nil {
						names = append(names, d.Path+"\t"+describe(d))
					}
				}
			}
			return names, cobra.ShellCompDirectiveNoFileComp
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				return listDevices(cmd.OutOrStdout(), flags)
			}
			return flashDevice(cmd.Context(), args[0], flags, os.Stdin, os.Stderr, cmd.OutOrStdout())
		},
	}
	f := cmd.Flags()
	f.StringVar(&flags.image, "image", "build/pc-x86_64/usb.img", "the disk image: `FILE`")
	f.BoolVar(&flags.yes, "yes", false, "do not ask")
	f.BoolVar(&flags.force, "force", false, "take a disk that is not removable; never one that is in use")
	f.BoolVar(&flags.asJSON, "json", false, "print the devices, or what was done, as JSON")
	cmd.MarkFlagFilename("image", "img")
	return cmd
}

func listDevices(w io.Writer, flags flashFlags) error {
	all, err := flash.Devices()
	if err != nil {
		return err
	}
	list := []flash.Device{}
	for _, d := range all {
		if d.Removable || flags.force {
			list = append(list, d)
		}
	}
	if flags.asJSON {
		return printJSON(w, list)
	}
	if len(list) == 0 {
		fmt.Fprintln(w, "There is no removable device. Plug one in, and ask again.")
		return nil
	}
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(tw, "DEVICE\tSIZE\tMODEL\t")
	for _, d := range list {
		note := ""
		if err := d.Check(flags.force); err != nil {
			note = err.Error()
		}
		fmt.Fprintf(tw, "%s\t%s\t%s\t%s\n", d.Path, gigabytes(d.Size), d.Model, note)
	}
	return tw.Flush()
}

func describe(d flash.Device) string {
	return strings.TrimSpace(fmt.Sprintf("%s %s", gigabytes(d.Size), d.Model))
}

func gigabytes(n int64) string {
	if n < 1e9 {
		return fmt.Sprintf("%.1f MB", float64(n)/1e6)
	}
	return fmt.Sprintf("%.1f GB", float64(n)/1e9)
}

// flashed is what --json tells.
type flashed struct {
	Device string `json:"device"`
	Image  string `json:"image"`
	Bytes  int64  `json:"bytes"`
}

func flashDevice(ctx context.Context, path string, flags flashFlags, in *os.File, errw *os.File, out io.Writer) error {
	img, err := flash.CheckImage(flags.image)
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("there is no image %s: make one with clonectl build, or say --image", flags.image)
	} else if err != nil {
		return err
	}
	what, err := flashTarget(path, flags)
	if err != nil {
		return err
	}
	if !flags.yes {
		if err := ask(ctx, in, errw, fmt.Sprintf("All that is on %s will be lost. Write %s (%s) to it?", what, img.Path, gigabytes(img.Size)), filepath.Base(path)); err != nil {
			return err
		}
	}
	p := newProgress(errw)
	begin := time.Now()
	state, err := flash.Write(ctx, img, path, func(what string, done int64) {
		p.Status("%s %s: %d %%, %.0f of %.0f MB, %s", what, path, done*100/img.Size, megabytes(done), megabytes(img.Size), time.Since(begin).Round(time.Second))
	})
	p.Clear()
	if err != nil {
		if state != flash.Untouched {
			fmt.Fprintf(errw, "%s: %v\n", path, state)
		}
		return err
	}
	p.Done("flashed    %s: %s written and compared in %.1f s", path, gigabytes(img.Size), time.Since(begin).Seconds())
	if flags.asJSON {
		return printJSON(out, flashed{path, img.Path, img.Size})
	}
	return nil
}

// flashTarget says in words what will be overwritten, if it may be.
func flashTarget(path string, flags flashFlags) (string, error) {
	fi, err := os.Stat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return "", fmt.Errorf("there is no %s; clonectl flash lists what there is", path)
	} else if err != nil {
		return "", err
	}
	if fi.Mode().IsRegular() {
		return fmt.Sprintf("the file %s (%s)", path, gigabytes(fi.Size())), nil
	}
	d, err := flash.Lookup(path)
	if err != nil {
		return "", err
	}
	return fmt.Sprintf("%s (%s)", path, describe(d)), d.Check(flags.force)
}

// ask wants the answer to be the name of what is lost: a hand that says y to
// everything has not read it.
func ask(ctx context.Context, in *os.File, w io.Writer, question, name string) error {
	if !term.IsTerminal(int(in.Fd())) {
		return usageError{errors.New("nobody is there to be asked: say --yes")}
	}
	fmt.Fprintf(w, "%s\nType %s to go on: ", question, name)
	answer := make(chan string, 1)
	go func() {
		line, _ := bufio.NewReader(in).ReadString('\n')
		answer <- strings.TrimSpace(line)
	}()
	select {
	case <-ctx.Done():
		fmt.Fprintln(w)
		return ctx.Err()
	case a := <-answer:
		if a != name {
			return fmt.Errorf("the answer was not %q: nothing was written", name)
		}
		return nil
	}
}
