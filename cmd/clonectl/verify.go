package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"clonecluster/config"
	"clonecluster/image"
	"clonecluster/image/bundle"
	"clonecluster/image/flash"
	"clonecluster/image/keys"
	"clonecluster/uinit/stick"
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
			var cfg *config.Config
			if configFile != "" {
				if !rebuild {
					return usageError{errString("--config is for --rebuild: without, the manifest says all that is compared")}
				}
				var err error
				if cfg, err = loadConfigFile(cmd.InOrStdin(), configFile); err != nil {
					return err
				}
			}
			o, err := verifyOptions(public, p)
			if err != nil {
				return err
			}
			if cmd.Flags().Changed("board") {
				if _, err := getBoard(flags.board); err != nil {
					return err
				}
				o.Board = flags.board
			}
			r, m, err := verifyAny(cmd.Context(), args[0], manifest, o)
			if err != nil {
				return explainRights(err)
			}
			if rebuild && m != nil && len(r.Problems)+len(r.Unread) == 0 {
				if cfg != nil && cfg.Cluster.Name != m.Cluster {
					return fmt.Errorf("%s is of the cluster %q, and %s of %q: give with --config what it was built with", configFile, cfg.Cluster.Name, args[0], m.Cluster)
				}
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
				printReport(cmd.OutOrStdout(), r)
			}
			return reportError(args[0], r)
		},
	}
	flags.add(cmd)
	f := cmd.Flags()
	f.Lookup("out").Hidden = true
	f.Lookup("board").Usage = "fail if the build is not for this `BOARD`"
	f.Lookup("board").DefValue = ""
	addPublicKey(f, &public)
	f.StringVar(&manifest, "manifest", "", "`FILE` that a device or disk image is compared with (default manifest.json beside the image)")
	f.BoolVar(&rebuild, "rebuild", false, "build again from this checkout, and compare")
	f.StringVar(&configFile, "config", "", "with --rebuild: the `FILE` of the build, as services with build: ./FOLDER have their sources beside it")
	f.BoolVar(&asJSON, "json", false, "print what was found as JSON")
	return cmd
}

// addPublicKey adds the flag of every command that compares files with a manifest.
func addPublicKey(f *pflag.FlagSet, public *string) {
	f.StringVar(public, "public-key", "", "minisign public key that must have signed the manifest: a `FILE`, or the key itself")
}

// verifyOptions are those of a comparison that p shows.
func verifyOptions(public string, p *progress) (bundle.VerifyOptions, error) {
	begin := time.Now()
	o := bundle.VerifyOptions{Progress: func(name string, done, size int64) {
		if time.Since(begin) > 2*time.Second { // before, nobody has begun to wonder
			p.Status("comparing %s with the manifest: %d %%", name, done*100/max(size, 1))
		}
	}}
	if public != "" {
		key, err := keys.LoadPublic(public)
		if err != nil {
			return o, err
		}
		o.PublicKey = &key
	}
	return o, nil
}

// rightsFix is for who may not read what a build is made of or has made, or a device.
const rightsFix = "what holds the cluster's key has mode 0600, and devices are root's: run this as the user whose it is, or as root"

func explainRights(err error) error {
	if errors.Is(err, fs.ErrPermission) {
		return fmt.Errorf("%w; %s", err, rightsFix)
	}
	return err
}

// reportError is nil if all is as the manifest says. What differs is an answer, and
// ends with a code of its own; what could not be read is none.
func reportError(what string, r *bundle.Report) error {
	switch {
	case len(r.Problems) > 0 && r.Denied:
		return fmt.Errorf("%s is %w: %s; %s could not be compared: %s", what, errDiffers, plural(len(r.Problems), "problem"), plural(len(r.Unread), "file"), rightsFix)
	case len(r.Problems) > 0:
		return fmt.Errorf("%s is %w: %s", what, errDiffers, plural(len(r.Problems), "problem"))
	case r.Denied:
		return fmt.Errorf("%s: %s could not be compared; %s", what, plural(len(r.Unread), "file"), rightsFix)
	case len(r.Unread) > 0:
		return fmt.Errorf("%s: %s could not be compared, as is said above", what, plural(len(r.Unread), "file"))
	}
	return nil
}

// problemsError is the problems, a line for each.
type problemsError []bundle.Problem

func (p problemsError) Error() string {
	lines := make([]string, len(p))
	for i, problem := range p {
		lines[i] = problem.String()
	}
	return strings.Join(lines, "\n")
}

// verifyAny checks what the argument names.
func verifyAny(ctx context.Context, what, manifest string, o bundle.VerifyOptions) (*bundle.Report, *image.Manifest, error) {
	fi, err := os.Stat(what)
	isURL := strings.Contains(what, "://")
	switch {
	case manifest != "" && (isURL || err == nil && fi.IsDir()):
		return nil, nil, usageError{errString("--manifest is for a device or a disk image: a folder is compared with the manifest in it")}
	case isURL:
		r, m, err := bundle.VerifyURL(ctx, what, o)
		if errors.Is(err, bundle.ErrURL) {
			err = usageError{err}
		}
		return r, m, err
	case errors.Is(err, fs.ErrNotExist):
		return nil, nil, fmt.Errorf("there is no %s: give the folder of a build, a device, a disk image or a URL", what)
	case err != nil:
		return nil, nil, err
	case fi.IsDir():
		return bundle.Verify(ctx, what, o)
	case manifest == "" && !fi.Mode().IsRegular():
		return nil, nil, usageError{errString("a device is compared with a build: give --manifest FOLDER/manifest.json")}
	}
	beside := manifest == ""
	if beside {
		manifest = manifestOf(what)
	} else if fi, err := os.Stat(manifest); err == nil && fi.IsDir() {
		manifest = filepath.Join(manifest, bundle.ManifestName)
	}
	if _, err := os.Stat(manifest); errors.Is(err, fs.ErrNotExist) {
		if beside {
			return nil, nil, usageError{fmt.Errorf("beside %s is no %s: give that of its build with --manifest FOLDER/manifest.json", what, bundle.ManifestName)}
		}
		return nil, nil, fmt.Errorf("there is no %s: clonectl build leaves one in the folder that it makes", manifest)
	}
	// A usb.img that is no disk image is a damaged one, what is called otherwise another file.
	if _, err := flash.CheckImage(what); beside && filepath.Base(what) != bundle.StickName && errors.Is(err, stick.ErrNoGPT) {
		return nil, nil, usageError{fmt.Errorf("%w; give the folder, %s, or its %s", err, filepath.Dir(what), bundle.StickName)}
	}
	return bundle.VerifyDisk(ctx, what, manifest, o)
}

// manifestOf is where the manifest of a disk image's build is, if it is beside it.
func manifestOf(img string) string { return filepath.Join(filepath.Dir(img), bundle.ManifestName) }

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
	o.ConfigDir = configDir(configFile)
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

func printReport(out io.Writer, r *bundle.Report) {
	for _, p := range slices.Concat(r.Problems, r.Unread) {
		fmt.Fprintln(out, p)
	}
	about := fmt.Sprintf("cluster %q, board %s; signature: %s", r.Cluster, r.Board, r.Signature)
	switch {
	case r.Of == 0: // the manifest itself is no good, or says nothing
	case r.Files == r.Of && len(r.Problems)+len(r.Unread) == 0:
		fmt.Fprintf(out, "%s: %s, %.1f MB, as the manifest says; %s\n", r.Source, plural(r.Files, "file"), megabytes(r.Bytes), about)
	default:
		fmt.Fprintf(out, "%s: %d of %s as the manifest says; %s\n", r.Source, r.Files, plural(r.Of, "file"), about)
	}
	for _, n := range r.Notes {
		fmt.Fprintln(out, n)
	}
}
