package main

import (
	"context"
	"fmt"
	"os"

	"github.com/spf13/cobra"

	"clonecluster/config"
	"clonecluster/image"
	"clonecluster/image/bundle"
)

// The files of an output folder that the laboratory takes.
const (
	kernelName   = bundle.KernelName // on x86-64, where there is a BIOS to load it
	configName   = bundle.ConfigName
	initrdName   = bundle.InitrdName
	manifestName = bundle.ManifestName
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
		Short: "Build kernel and initramfs, for QEMU and boot loaders",
		Long: `Image is the short form of "clonectl build": it leaves the unified kernel image,
the USB image and the PXE tree out, and needs no package but those that compile
the kernel. It builds, into the output folder:

  bzImage         the patched kernel (from the cache if nothing changed); for
                  arm64 it is called Image
  base.cpio.zst   init, engine and web service; the same for every cluster
  services.cpio.zst  programs that the configuration has built, if any
  config.cpio     the cluster's configuration and content
  initrd.img      both, as a boot loader wants them
  manifest.json   all inputs and outputs with their SHA-256

The same inputs give the same bytes, wherever and whenever they are built. A
folder that holds a signed build is left alone: give another with --out. Run it
inside a checkout: the programs are compiled from source.`,
		Example: `  clonectl image                                      # the demo's
  clonectl image --config cluster.yaml --content www/
  clonectl image --debug                              # with a shell on the console`,
		Args: usageArgs(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			p := newProgress(os.Stderr)
			o, err := flags.bundleOptions(p)
			if err != nil {
				return err
			}
			o.Minimal = true
			m, err := buildBundle(cmd.Context(), o, p)
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

// demoBoard is that of the demo, for which its key is right, and what is meant where no other is named.
const demoBoard = "qemu-x86_64"

const publishedKey = "the cluster's key is the demo's, which is published: whoever reaches the segment can join the cluster; make one for cluster.key with: head -c 32 /dev/urandom | base64"

// bundleOptions says what is to be built, and from what.
func (f *imageFlags) bundleOptions(p *progress) (o bundle.Options, err error) {
	if o.Kernel, o.OutDir, err = f.options(p); err != nil {
		return o, err
	}
	o.Board, o.Debug = o.Kernel.Board, f.debug
	o.Config, o.ConfigName, o.ConfigDir = config.DemoYAML, "cluster.yaml", "."
	if f.config != "" {
		if o.Config, o.ConfigName, err = readConfigFile(os.Stdin, f.config); err != nil {
			return o, err
		}
		o.ConfigDir = configDir(f.config)
	}
	cfg, err := config.Load(o.Config, o.ConfigName)
	if err != nil {
		return o, fmt.Errorf("the configuration is not right:\n%w", err)
	}
	if _, err := os.Stat("cluster.yaml"); err == nil && f.config == "" {
		p.Done("note: this builds the demo's configuration; --config cluster.yaml builds the one that is here")
	}
	if cfg.PublishedKey() && o.Board.Name != demoBoard {
		p.Done("warning: %s", publishedKey)
	}
	if o.Content, err = bundle.Content(cfg, o.ConfigDir, f.content); err != nil {
		return o, explainRights(err)
	}
	o.Progress = bundle.Progress{
		Status: func(s string) { p.Status("%s", s) },
		Step: func(s bundle.Step) {
			p.Done("[%d/%d] %-10s %s (%.1f s)", s.N, s.Of, s.Name, s.Text, s.Took.Seconds())
		},
	}
	return o, nil
}

func buildBundle(ctx context.Context, o bundle.Options, p *progress) (*image.Manifest, error) {
	m, err := bundle.Build(ctx, o)
	if err != nil {
		p.Clear()
	}
	return m, err
}
