package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"clonecluster/image"
	"clonecluster/image/bundle"
	"clonecluster/image/keys"
)

// errDiffers ends verify with its own exit code.
var errDiffers = errors.New("not as the manifest says")

func newVerifyCmd() *cobra.Command {
	var flags kernelFlags
	var public, manifest, configFile string
	var rebuild, asJSON bool
	cmd := &cobra.Command{
		Use:   "verify FOLDER|DEVICE|URL",
		Short: "Check the signature and the hashes of a build, or build it again",
		Long: `Verify compares what "clonectl build" has made with its manifest: a folder, a
folder on a web server, or a stick (or usb.img) file by file. It names each file
that is missing, truncated, changed or too many. With --public-key the manifest
must be signed by that key; without, hashes show damage, but not an attack.

With --rebuild the folder is built again in a temporary one, from its own
configuration and content and from this checkout, and the first file that
differs is named, with the member of it.

Exit codes: 0 all is right, 3 a difference was found, 1 it could not be checked,
2 wrong usage.`,
		Example: `  clonectl verify build/pc-x86_64 --public-key cluster.key.pub
  clonectl verify https://boot.example.com/pc-x86_64/ --public-key cluster.key.pub
  clonectl verify /dev/sdX --manifest build/pc-x86_64/manifest.json
  clonectl verify build/pc-x86_64 --rebuild`,
		Args: usageArgs(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			p := newProgress(os.Stderr)
			defer p.Clear()
			o := bundle.VerifyOptions{Status: func(s string) { p.Status("checking %s", s) }}
			if cmd.Flags().Changed("board") {
				o.Board = flags.board
			}
			if public != "" {
				key, err := keys.LoadPublic(public)
				if err != nil {
					return err
				}
				o.PublicKey = &key
			}
			r, m, err := verifyAny(cmd.Context(), args[0], manifest, o)
			if err != nil {
				return err
			}
			if rebuild && m != nil && len(r.Problems) == 0 {
				if err := verifyRebuild(cmd.Context(), flags, args[0], configFile, m, r, p); err != nil {
					return err
				}
			}
			p.Clear()
			if asJSON {
				if err := printJSON(cmd.OutOrStdout(), r); err != nil {
					return err
				}
			} else {
				printReport(cmd, r)
			}
			if len(r.Problems) > 0 {
				return fmt.Errorf("%s: %w (%d problems)", args[0], errDiffers, len(r.Problems))
			}
			return nil
		},
	}
	flags.add(cmd)
	f := cmd.Flags()
	f.Lookup("out").Hidden = true
	f.Lookup("board").Usage = "fail if the build is not for this `BOARD`"
	f.Lookup("board").DefValue = ""
	f.StringVar(&public, "public-key", "", "minisign public key that must have signed the manifest: a `FILE`, or the key itself")
	f.StringVar(&manifest, "manifest", "", "`FILE` that a device or disk image is compared with (default manifest.json beside the image)")
	f.BoolVar(&rebuild, "rebuild", false, "build again from this checkout, and compare")
	f.StringVar(&configFile, "config", "", "with --rebuild: the `FILE` whose folder relative paths of services begin at")
	f.BoolVar(&asJSON, "json", false, "print what was found as JSON")
	return cmd
}

// verifyAny checks what the argument names.
func verifyAny(ctx context.Context, what, manifest string, o bundle.VerifyOptions) (*bundle.Report, *image.Manifest, error) {
	if strings.Contains(what, "://") {
		return bundle.VerifyURL(ctx, what, o)
	}
	fi, err := os.Stat(what)
	if err != nil {
		return nil, nil, err
	}
	if fi.IsDir() {
		return bundle.Verify(ctx, what, o)
	}
	if manifest == "" {
		if !fi.Mode().IsRegular() {
			return nil, nil, usageError{errString("a device is compared with a build: give --manifest FOLDER/manifest.json")}
		}
		manifest = filepath.Join(filepath.Dir(what), bundle.ManifestName)
	}
	return bundle.VerifyDisk(ctx, what, manifest, o)
}

func verifyRebuild(ctx context.Context, flags kernelFlags, dir, configFile string, m *image.Manifest, r *bundle.Report, p *progress) error {
	if fi, err := os.Stat(dir); err != nil || !fi.IsDir() {
		return usageError{errString("--rebuild needs the folder of a build: its configuration is in there")}
	}
	flags.board = m.Board
	build := imageFlags{kernelFlags: flags}
	o, err := build.bundleOptions(p)
	if err != nil {
		return err
	}
	o.ConfigDir = filepath.Dir(configFile)
	if err := os.MkdirAll(o.Kernel.CacheDir, 0o755); err != nil {
		return err
	}
	problem, err := bundle.Rebuild(ctx, dir, m, o, o.Kernel.CacheDir)
	if err != nil {
		return err
	}
	if problem != nil {
		r.Problems = append(r.Problems, *problem)
		return nil
	}
	r.Notes = append(r.Notes, "built again from this checkout: the same bytes")
	return nil
}

func printReport(cmd *cobra.Command, r *bundle.Report) {
	out := cmd.OutOrStdout()
	for _, p := range r.Problems {
		fmt.Fprintln(out, p)
	}
	fmt.Fprintf(out, "%s: %d files, %.1f MB as the manifest says; cluster %q, board %s; signature: %s\n",
		r.Source, r.Files, megabytes(r.Bytes), r.Cluster, r.Board, r.Signature)
	for _, n := range r.Notes {
		fmt.Fprintln(out, n)
	}
}
