package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"clonecluster/boards"
	"clonecluster/image"
	"clonecluster/image/bundle"
	"clonecluster/image/kernel"
)

// kernelFlags are the flags of every command that may have to build a kernel.
type kernelFlags struct {
	board, out, source, cache string
	jobs                      int
	locked                    bool
}

func (k *kernelFlags) add(cmd *cobra.Command) {
	f := cmd.Flags()
	f.StringVar(&k.board, "board", demoBoard, "`BOARD` to build for")
	f.StringVar(&k.out, "out", "", "output `FOLDER` (default build/BOARD)")
	f.StringVar(&k.source, "kernel-source", "", "kernel source, a tree or a tarball (`PATH`), in place of Debian's package")
	f.StringVar(&k.cache, "cache", "", "`FOLDER` for what is expensive to build (default $CLONECLUSTER_CACHE, else the user's cache)")
	f.IntVar(&k.jobs, "jobs", 0, "compilers at once (default one per processor)")
	f.BoolVar(&k.locked, "locked", false, "fail if the kernel source is not the version of the lock file")
	cmd.RegisterFlagCompletionFunc("board", func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
		all, _ := boards.All()
		var names []string
		for _, b := range all {
			names = append(names, b.Name+"\t"+b.Description)
		}
		return names, cobra.ShellCompDirectiveNoFileComp
	})
	cmd.MarkFlagDirname("out")
	cmd.MarkFlagDirname("cache")
}

// maxJobs is more compilers than any machine has processors.
const maxJobs = 1024

// options gives the board, the output folder and what the kernel is built with.
func (k *kernelFlags) options(p *progress) (opts kernel.Options, out string, err error) {
	board, err := getBoard(k.board)
	if err != nil {
		return opts, "", err
	}
	if k.jobs < 0 || k.jobs > maxJobs {
		return opts, "", usageError{fmt.Errorf("--jobs %d: want 1 to %d, or 0 for one per processor", k.jobs, maxJobs)}
	}
	cache := k.cache
	if cache == "" {
		if cache, err = cacheDir(); err != nil {
			return opts, "", err
		}
	}
	out = k.out
	if out == "" {
		out = filepath.Join("build", board.Name)
	}
	if err := checkOut(out); err != nil {
		return opts, "", err
	}
	return kernel.Options{
		Board: board, Source: k.source, Locked: k.locked, CacheDir: cache, Jobs: k.jobs,
		Status: func(s string) { p.Status("%s", s) },
		Notice: func(s string) { p.Done("%s", s) },
	}, out, nil
}

// getBoard is the board of a flag.
func getBoard(name string) (boards.Board, error) {
	b, err := boards.Get(name)
	if err != nil {
		err = usageError{fmt.Errorf("%w (a new one is in clonectl once that is built again: make build/bin/clonectl)", err)}
	}
	return b, err
}

// checkOut refuses the folders in which what a build writes, and removes, would lie among
// other files.
func checkOut(out string) error {
	at, err := os.Stat(out)
	if err != nil {
		return nil // not there yet, or what writes to it says so
	}
	refused := map[string]string{}
	if home, err := os.UserHomeDir(); err == nil {
		refused[home] = "your home folder"
	}
	if checkout, err := image.FindSource(out); err == nil {
		refused[checkout] = "the checkout itself"
	}
	refused["/"] = "the root of the file system"
	for dir, what := range refused {
		if fi, err := os.Stat(dir); err == nil && os.SameFile(at, fi) {
			return usageError{fmt.Errorf("--out %s is %s, which a build would fill with its files: give a folder of its own, such as %s", out, what, filepath.Join(out, "boot"))}
		}
	}
	return nil
}

// cacheDir is where results live that are expensive and belong to no checkout.
func cacheDir() (string, error) {
	if dir := os.Getenv("CLONECLUSTER_CACHE"); dir != "" {
		return dir, nil
	}
	dir, err := os.UserCacheDir()
	if err != nil {
		return "", fmt.Errorf("finding a folder for the cache: %w; set CLONECLUSTER_CACHE", err)
	}
	return filepath.Join(dir, "clonecluster"), nil
}

// buildKernel builds or finds the kernel and puts it into the folder out.
func buildKernel(ctx context.Context, opts kernel.Options, out string, p *progress) (*kernel.Result, error) {
	abandon, err := image.Folder(out)
	if err != nil {
		return nil, err
	}
	defer abandon()
	r, err := kernel.Build(ctx, opts)
	if err != nil {
		p.Clear()
		return nil, err
	}
	data, err := os.ReadFile(r.Image)
	if err != nil {
		return nil, fmt.Errorf("reading the built kernel: %w", err)
	}
	if err := image.WriteFile(filepath.Join(out, bundle.KernelFile(opts.Board)), data, 0o644); err != nil {
		return nil, err
	}
	how := fmt.Sprintf("built in %s, %s of CPU time", r.Wall.Round(time.Second), r.CPU.Round(time.Second))
	if r.Cached {
		how = "from the cache"
	}
	p.Done("kernel     %s, %.1f MB (%s)", r.Release, megabytes(r.Size), how)
	return r, nil
}

func megabytes(n int64) float64 { return float64(n) / 1e6 }

func newKernelCmd() *cobra.Command {
	var flags kernelFlags
	var asJSON, check bool
	cmd := &cobra.Command{
		Use:   "kernel",
		Short: "Build the patched kernel of a board",
		Long: `Kernel builds Debian's kernel source with the wire-address patch and the board's
configuration, and puts it into the output folder. The result is kept under a
hash of source, patch, configuration and toolchain: a second call is instant.
The first takes ten to twenty minutes on two cores.`,
		Example: `  clonectl kernel
  clonectl kernel --board pc-x86_64 --jobs 8
  clonectl kernel --kernel-source ~/linux-6.12.tar.xz    # on a host that is not Debian
  clonectl kernel --check-reproducible                   # build twice and compare`,
		Args: usageArgs(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			p := newProgress(os.Stderr)
			opts, out, err := flags.options(p)
			if err != nil {
				return err
			}
			r, err := buildKernel(cmd.Context(), opts, out, p)
			if err != nil {
				return err
			}
			if check {
				if r, err = kernel.Reproduce(cmd.Context(), opts); err != nil {
					p.Clear()
					return err
				}
				p.Done("reproduced the same bytes from another folder: sha256 %s", r.SHA256)
			}
			if asJSON {
				return printJSON(cmd.OutOrStdout(), r)
			}
			return nil
		},
	}
	flags.add(cmd)
	cmd.Flags().BoolVar(&asJSON, "json", false, "print what was built, and from what, as JSON")
	cmd.Flags().BoolVar(&check, "check-reproducible", false, "build once more in another folder and compare the bytes")
	return cmd
}
