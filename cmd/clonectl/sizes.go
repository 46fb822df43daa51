package main

import (
	"context"
	"fmt"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"clonecluster/image"
	"clonecluster/qemu/lab"
)

func newSizesCmd() *cobra.Command {
	var dir, format string
	var boot, check bool
	cmd := &cobra.Command{
		Use:   "sizes",
		Short: "Print what an image takes: bytes, boot time, memory",
		Long: `Sizes prints the size of kernel and initramfs and, with --boot, boots one node in
QEMU and adds the time to its first HTTP answer and the memory of its programs.
Each value is shown against its budget.`,
		Example: `  clonectl sizes
  clonectl sizes --boot --format markdown
  clonectl sizes --check        # exit code 1 if a value is above its budget`,
		Args: usageArgs(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			switch format {
			case "plain", "markdown", "json":
			default:
				return usageError{fmt.Errorf("--format %q: want plain, markdown or json", format)}
			}
			img, err := openImage(dir, "")
			if err != nil {
				return err
			}
			r, err := measure(cmd.Context(), img, boot)
			if err != nil {
				return err
			}
			if err := r.Print(cmd.OutOrStdout(), format); err != nil {
				return err
			}
			if check {
				return r.Check()
			}
			return nil
		},
	}
	f := cmd.Flags()
	f.StringVar(&dir, "image", filepath.Join("build", demoBoard), "`FOLDER` with an image, from \"clonectl image\"")
	f.StringVar(&format, "format", "plain", "plain, markdown or json")
	f.BoolVar(&boot, "boot", false, "boot a node and measure time and memory, too")
	f.BoolVar(&check, "check", false, "fail if a value is above its budget")
	cmd.MarkFlagDirname("image")
	cmd.RegisterFlagCompletionFunc("format", cobra.FixedCompletions([]string{"plain", "markdown", "json"}, cobra.ShellCompDirectiveNoFileComp))
	return cmd
}

// measure gives the report of an image.
func measure(ctx context.Context, img bootable, boot bool) (*image.Report, error) {
	r, err := image.NewReport(img.board.Name)
	if err != nil {
		return nil, err
	}
	if err := r.Files(img.kernel(), img.path(image.BaseName(img.manifest.Debug)), img.path(configName)); err != nil {
		return nil, err
	}
	if !boot {
		return r, nil
	}
	cache, err := cacheDir()
	if err != nil {
		return nil, err
	}
	cfg, err := labConfig(img, upOptions{nodes: 1, accel: "auto"}, cache)
	if err != nil {
		return nil, err
	}
	memory := make(chan string, 1)
	cfg.OnEvent = func(e lab.Event) {
		if _, line, ok := strings.Cut(e.Text, "init: memory "); ok && e.Kind == lab.Line {
			select {
			case memory <- line:
			default:
			}
		}
	}
	l, err := lab.Start(ctx, cfg)
	if err != nil {
		return nil, err
	}
	defer l.Close()
	took, err := bootToHTTP(ctx, l, img)
	if err != nil {
		return nil, fmt.Errorf("measuring the boot: %w\n%s", err, l.Report())
	}
	r.Set(image.BootToHTTPReady, int64(took), string(l.Accel().Accel)+", one node")
	select {
	case line := <-memory:
		enterMemory(r, line, img.config.Services[0].Name)
	case <-time.After(memoryTimeout):
		return nil, fmt.Errorf("the node did not say how much memory it takes\n%s", l.Report())
	}
	return r, nil
}

// memoryTimeout is for a line that comes right after the last stage of a boot.
const memoryTimeout = 30 * time.Second

// bootToHTTP is the time from a machine's start to its first HTTP answer.
func bootToHTTP(ctx context.Context, l *lab.Lab, img bootable) (time.Duration, error) {
	ctx, cancel := context.WithTimeout(ctx, bootTimeout)
	defer cancel()
	begin := time.Now()
	to, err := webAddress(img.config)
	if err != nil {
		return 0, err
	}
	if err := l.WaitAll(ctx, "ready"); err != nil {
		return 0, err
	}
	err = newAsker(l.Client(), to.Port(), nil).first(ctx, to.Addr())
	return time.Since(begin), err
}

// enterMemory enters what a node said of its programs, "init=123 engine=456".
func enterMemory(r *image.Report, line, service string) {
	quantities := map[string]image.Quantity{"init": image.InitRSS, "engine": image.EngineRSS, service: image.ServiceRSS}
	for _, f := range strings.Fields(line) {
		name, value, _ := strings.Cut(f, "=")
		n, err := strconv.ParseInt(value, 10, 64)
		if q, known := quantities[name]; known && err == nil {
			r.Set(q, n, "resident")
		}
	}
}
