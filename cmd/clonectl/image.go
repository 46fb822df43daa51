package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"clonecluster/config"
	"clonecluster/image"
	"clonecluster/image/kernel"
)

// The files of an output folder, beside the base image.
const (
	configName   = "config.cpio"
	initrdName   = "initrd.img"
	manifestName = "manifest.json"
)

// imageFlags says what goes into an image besides the kernel.
type imageFlags struct {
	kernelFlags
	config, content string
	debug           bool
}

func (f *imageFlags) add(cmd *cobra.Command) {
	f.kernelFlags.add(cmd)
	cmd.Flags().StringVar(&f.config, "config", "", "the cluster's configuration: `FILE` (default the demo's)")
	cmd.Flags().StringVar(&f.content, "content", "", "`FOLDER` that the web service serves")
	cmd.Flags().BoolVar(&f.debug, "debug", false, "add a shell and tools; never for a machine in service")
	cmd.RegisterFlagCompletionFunc("config", completeYAML)
	cmd.MarkFlagDirname("content")
}

func newImageCmd() *cobra.Command {
	var flags imageFlags
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "image",
		Short: "Build everything a node boots",
		Long: `Image builds, into the output folder:

  bzImage         the patched kernel (from the cache if nothing changed)
  base.cpio.zst   init, engine and web service; the same for every cluster
  config.cpio     the cluster's configuration and content
  initrd.img      both, as a boot loader wants them
  manifest.json   all inputs and outputs with their SHA-256

The same inputs give the same bytes, wherever and whenever they are built.
Run it inside a checkout: the programs are compiled from source.`,
		Example: `  clonectl image                                      # the demo's
  clonectl image --config cluster.yaml --content www/
  clonectl image --debug                              # with a shell on the console`,
		Args: usageArgs(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			m, err := buildImage(cmd.Context(), flags, newProgress(os.Stderr))
			if err != nil {
				return err
			}
			if asJSON {
				return printJSON(cmd.OutOrStdout(), m)
			}
			return nil
		},
	}
	flags.add(cmd)
	cmd.Flags().BoolVar(&asJSON, "json", false, "print the manifest")
	return cmd
}

func buildImage(ctx context.Context, flags imageFlags, p *progress) (*image.Manifest, error) {
	opts, out, err := flags.options(p)
	if err != nil {
		return nil, err
	}
	// First what can be wrong in a second, then what takes minutes.
	yaml, name := config.DemoYAML, "cluster.yaml"
	if flags.config != "" {
		if yaml, name, err = readConfigFile(os.Stdin, flags.config); err != nil {
			return nil, err
		}
	}
	cfg, err := config.Load(yaml, name)
	if err != nil {
		return nil, fmt.Errorf("the configuration is not right:\n%w", err)
	}
	if err := checkPrograms(cfg, flags.debug); err != nil {
		return nil, err
	}
	configCPIO, err := image.ConfigCPIO(yaml, flags.content, time.Time{})
	if err != nil {
		return nil, err
	}
	begin := time.Now()
	base, err := image.BuildBase(ctx, image.BaseOptions{
		Arch: opts.Board.Arch, Debug: flags.debug, OutDir: out, Progress: statusWriter{p},
	})
	if err != nil {
		p.Clear()
		return nil, err
	}
	p.Done("cluster    %q at %s", cfg.Cluster.Name, strings.Join(vips(cfg), " and "))
	p.Done("base       %.1f MB, %.1f MB unpacked (%.1f s)", megabytes(base.Bytes), megabytes(base.Unpacked), time.Since(begin).Seconds())
	k, err := buildKernel(ctx, opts, out, p)
	if err != nil {
		return nil, err
	}
	return writeImage(out, base, configCPIO, k, opts.Board.Name, p)
}

// checkPrograms finds services whose program the image will not have.
func checkPrograms(c *config.Config, debug bool) error {
	have := image.Programs(debug)
	for _, s := range c.Services {
		if !slices.Contains(have, s.Run[0]) {
			return fmt.Errorf("services.%s.run: the image has no program %s; it has %s", s.Name, s.Run[0], strings.Join(have, ", "))
		}
	}
	return nil
}

func writeImage(out string, base *image.Base, configCPIO []byte, k *kernel.Result, board string, p *progress) (*image.Manifest, error) {
	packed, err := os.ReadFile(base.Path)
	if err != nil {
		return nil, fmt.Errorf("reading the base image: %w", err)
	}
	initrd := image.Initrd(packed, configCPIO)
	// Both hold the cluster's key: nobody else's to read.
	if err := image.WriteFile(filepath.Join(out, configName), configCPIO, 0o600); err != nil {
		return nil, err
	}
	if err := image.WriteFile(filepath.Join(out, initrdName), initrd, 0o600); err != nil {
		return nil, err
	}
	m, err := image.NewManifest(board, base, image.KernelOf(k))
	if err != nil {
		return nil, err
	}
	err = m.Output(filepath.Join(out, kernelName), filepath.Join(out, configName), filepath.Join(out, initrdName))
	if err != nil {
		return nil, err
	}
	if err := m.Write(filepath.Join(out, manifestName)); err != nil {
		return nil, err
	}
	p.Done("image      %s: %.1f MB in all", out, megabytes(k.Size+int64(len(initrd))))
	return m, nil
}

// statusWriter shows what is written line by line as status.
type statusWriter struct{ p *progress }

func (w statusWriter) Write(b []byte) (int, error) {
	for line := range strings.Lines(string(b)) {
		w.p.Status("%s", strings.TrimRight(line, "\n"))
	}
	return len(b), nil
}
