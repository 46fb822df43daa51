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

	"clonecluster/image"
	"clonecluster/image/bundle"
	"clonecluster/image/flash"
)

type flashFlags struct {
	image, public      string
	yes, force, asJSON bool
}

func newFlashCmd() *cobra.Command {
	var flags flashFlags
	cmd := &cobra.Command{
		Use:   "flash [DEVICE]",
		Short: "Write the disk image to a USB stick, and check that it is there",
		Long: `Flash writes a disk image to a removable device, reads it back past the kernel's
cache, and compares. Without DEVICE it lists the removable devices.

First it compares the image with the manifest.json beside it, if there is one, and
writes nothing that the build has not made. A cluster.yaml that was edited in the
image is none of that if it is valid. With --public-key there has to be a manifest
that is signed by that key.

What is mounted or part of anything, what this machine runs from and what is
write-protected is refused. DEVICE can also be a file that is there already and
large enough. After an interrupt the message says what state it is in.

The image holds the cluster's key: whoever has the stick can join the cluster.`,
		Example: `  clonectl flash                                         # which devices are there?
  clonectl flash /dev/sdb                                # asks before it writes
  clonectl flash /dev/sdb --yes --image build/pc-x86_64/usb.img
  clonectl flash /dev/sdb --public-key cluster.key.pub   # only what that key has signed`,
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
	addPublicKey(f, &flags.public)
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
		return explainRights(err)
	}
	what, err := flashTarget(path, flags)
	if err != nil {
		return err
	}
	p := newProgress(errw)
	img, err = compareImage(ctx, img, flags.public, p)
	p.Clear()
	if err != nil {
		return err
	}
	if !flags.yes {
		if err := ask(ctx, in, errw, fmt.Sprintf("All that is on %s will be lost. Write %s (%s) to it?", what, img.Path, gigabytes(img.Size)), filepath.Base(path)); err != nil {
			return err
		}
	}
	var phase string
	var begin time.Time
	state, err := flash.Write(ctx, img, path, func(what string, done int64) {
		if what != phase {
			if phase != "" {
				p.Done("written    %s: %s in %.1f s", path, gigabytes(img.Size), time.Since(begin).Seconds())
			}
			phase, begin = what, time.Now()
		}
		p.Status("%s %s: %d %%, %.0f of %.0f MB, %s", what, path, done*100/img.Size, megabytes(done), megabytes(img.Size), time.Since(begin).Round(time.Second))
	})
	p.Clear()
	if err != nil {
		if state != flash.Untouched {
			fmt.Fprintf(errw, "%s: %v\n", path, state)
		}
		return err
	}
	p.Done("read back  %s: the same bytes, in %.1f s", path, time.Since(begin).Seconds())
	if flags.asJSON {
		return printJSON(out, flashed{path, img.Path, img.Size})
	}
	return nil
}

// compareImage compares an image with the manifest of its build, if that is beside
// it, and gives it with the hash that was found.
func compareImage(ctx context.Context, img flash.Image, public string, p *progress) (flash.Image, error) {
	o, err := verifyOptions(public, p)
	if err != nil {
		return img, err
	}
	file, err := filepath.EvalSymlinks(img.Path)
	if err != nil {
		return img, err
	}
	manifest := manifestOf(file)
	m, err := image.ReadManifest(manifest)
	switch {
	case errors.Is(err, fs.ErrPermission):
		return img, explainRights(err)
	case err != nil && !errors.Is(err, fs.ErrNotExist):
		return img, fmt.Errorf("%w; build or fetch it again, or take it away to write the image without comparing it", err)
	}
	var want image.File
	listed := false
	if err == nil {
		want, listed = m.Find(bundle.StickName)
	}
	if !listed || filepath.Base(file) != want.Name {
		missing := fmt.Sprintf("there is no %s that lists it beside %s", bundle.ManifestName, img.Path)
		if public != "" {
			return img, fmt.Errorf("%s, so nothing says that the key has signed it: copy %s and %s of its build there, and keep the name %s", missing, bundle.ManifestName, bundle.SignatureName, bundle.StickName)
		}
		p.Done("compared   with nothing: %s", missing)
		return img, nil
	}
	r, _, err := bundle.VerifyDisk(ctx, file, manifest, o)
	if err != nil {
		return img, explainRights(err)
	}
	problems := r.Problems
	if img.Size > want.Bytes {
		problems = append(problems, bundle.Problem{File: want.Name, Message: fmt.Sprintf("has %d bytes; the manifest says %d", img.Size, want.Bytes)})
	}
	if r.Unsigned(o) {
		return img, fmt.Errorf("%s is not signed by the public key of --public-key, and nothing was written: %w", img.Path, problemsError(problems))
	}
	if len(problems) > 0 {
		return img, fmt.Errorf("%s is not what %s says, and nothing was written: build it with clonectl build, or fetch it, again\n%w", img.Path, manifest, problemsError(problems))
	}
	p.Done("compared   %s with %s: cluster %q, board %s; signature: %s", img.Path, bundle.ManifestName, r.Cluster, r.Board, r.Signature)
	for _, n := range r.Notes {
		p.Done("           %s", n)
	}
	img.SHA256 = r.SHA256
	return img, nil
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
		return fmt.Sprintf("the file %s (%s)", path, gigabytes(fi.Size())), flash.CheckFile(path)
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
