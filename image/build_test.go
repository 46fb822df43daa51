package image

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func source(t *testing.T) string {
	t.Helper()
	dir, err := FindSource(".")
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

func build(t *testing.T, opt BaseOptions) *Base {
	t.Helper()
	if testing.Short() {
		t.Skip("compiles the image's programs: not with -short")
	}
	if opt.OutDir == "" {
		opt.OutDir = t.TempDir()
	}
	opt.Progress = t.Output()
	b, err := BuildBase(t.Context(), opt)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// The default image has this and nothing else: one program and no shell.
func TestDefaultImage(t *testing.T) {
	b := build(t, BaseOptions{})
	packed, err := os.ReadFile(b.Path)
	if err != nil {
		t.Fatal(err)
	}
	want := []string{
		"040755 bin",
		"120777 bin/cloned → /init",
		"120777 bin/webd → /init",
		"040755 dev",
		"020600 dev/console 5:1",
		"020666 dev/null 1:3",
		"040755 etc",
		"040755 etc/clonecluster",
		"100644 etc/hosts",
		"100644 etc/os-release",
		"100755 init",
		"040555 proc",
		"040700 root",
		"040755 run",
		"040755 srv",
		"040755 srv/www",
		"040555 sys",
		"041777 tmp",
	}
	records := unpack(t, packed)
	if d := cmp.Diff(want, listing(t, records)); d != "" {
		t.Error(d)
	}
	for _, r := range records {
		if r.MTime != 0 {
			t.Errorf("%s: modification time %d", r.Name, r.MTime)
		}
	}
	init := content(t, records, "init")
	if sum([]byte(init)) != b.Programs[0].SHA256 {
		t.Error("init is not the program that was recorded")
	}
	if b.SHA256 != sum(packed) || b.Bytes != int64(len(packed)) || b.Unpacked != Unpacked(packed) || b.Go == "" {
		t.Errorf("result = %+v", b)
	}
	for _, text := range []string{source(t), os.Getenv("HOME") + "/"} {
		if len(text) > 2 && strings.Contains(init, text) {
			t.Errorf("the program contains %q, a path of this machine", text)
		}
	}
}

func TestDebugImage(t *testing.T) {
	b := build(t, BaseOptions{Debug: true})
	if filepath.Base(b.Path) != "base-debug.cpio.zst" {
		t.Errorf("path %s could be taken for the default image", b.Path)
	}
	packed, err := os.ReadFile(b.Path)
	if err != nil {
		t.Fatal(err)
	}
	records := unpack(t, packed)
	all := strings.Join(listing(t, records), "\n")
	for _, want := range []string{"120777 bin/sh → /bin/gosh", "120777 bin/ls → /bin/node-debug", "100755 bin/ip", "120777 init → /bin/node-debug", "100755 bin/node"} {
		if !strings.Contains(all, want) {
			t.Errorf("no %q in:\n%s", want, all)
		}
	}
	// Each link to the multi-call binary is a command that it knows.
	if runtime.GOARCH != "amd64" {
		return
	}
	tool := filepath.Join(t.TempDir(), "node-debug")
	if err := os.WriteFile(tool, []byte(content(t, records, "bin/node-debug")), 0o755); err != nil {
		t.Fatal(err)
	}
	usage, _ := exec.Command(tool).CombinedOutput()
	var links []string
	for _, l := range debugPrograms[1].links {
		if name, ok := strings.CutPrefix(l, "bin/"); ok {
			links = append(links, name)
		}
	}
	if want := fmt.Sprint("commands: ", links); !strings.Contains(string(usage), want) {
		t.Errorf("node-debug says %q; the image links to %v", usage, links)
	}
}

func TestCrossBuild(t *testing.T) {
	b := build(t, BaseOptions{Arch: "arm64"})
	packed, err := os.ReadFile(b.Path)
	if err != nil {
		t.Fatal(err)
	}
	if init := content(t, unpack(t, packed), "init"); init[18] != 0xb7 { // e_machine: EM_AARCH64
		t.Errorf("ELF machine %#x; want 0xb7", init[18])
	}
}

func TestBuildErrors(t *testing.T) {
	broken := t.TempDir()
	for name, text := range map[string]string{"go.mod": "module clonecluster\n\ngo 1.26\n", "cmd/node/main.go": "package main\n\nfunc main() { nonsense() }\n"} {
		if err := os.MkdirAll(filepath.Dir(filepath.Join(broken, name)), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(broken, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	ended, cancel := context.WithCancel(context.Background())
	cancel()
	for _, tc := range []struct {
		name string
		ctx  context.Context
		opt  BaseOptions
		want string
	}{
		{"architecture", t.Context(), BaseOptions{Arch: "riscv"}, "want amd64 or arm64"},
		{"compiler", t.Context(), BaseOptions{Source: broken}, "cmd/node/main.go:3:15: undefined: nonsense"},
		{"cancelled", ended, BaseOptions{Source: broken}, "context canceled"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			tc.opt.OutDir = t.TempDir()
			_, err := BuildBase(tc.ctx, tc.opt)
			if err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("BuildBase = %v; want an error with %q", err, tc.want)
			}
			if left, _ := os.ReadDir(tc.opt.OutDir); len(left) > 0 {
				t.Errorf("a failed build left %v", left)
			}
		})
	}
	t.Run("no checkout", func(t *testing.T) {
		t.Chdir(t.TempDir())
		_, err := BuildBase(t.Context(), BaseOptions{})
		if err == nil || !strings.Contains(err.Error(), "no checkout of clonecluster") {
			t.Errorf("BuildBase = %v", err)
		}
	})
	t.Run("no toolchain", func(t *testing.T) {
		src := source(t)
		t.Setenv("PATH", t.TempDir())
		_, err := BuildBase(t.Context(), BaseOptions{Source: src})
		if !errors.Is(err, exec.ErrNotFound) {
			t.Errorf("BuildBase = %v", err)
		}
	})
}

// Who has no home has to say where Go keeps what it has compiled.
func TestGoCache(t *testing.T) {
	t.Setenv("GOCACHE", "/proc/none")
	if _, err := runGo(t.Context(), ".", "amd64", t.TempDir(), "list", "-deps", "."); err == nil || !strings.Contains(err.Error(), "set GOCACHE and GOMODCACHE to folders that you can write to") {
		t.Errorf("without a build cache: %v; want to be told of GOCACHE", err)
	}
}

// What runs on a node stays free of what only building and testing need.
func TestNodeImports(t *testing.T) {
	cmd := exec.Command("go", "list", "-deps", "./cmd/node")
	cmd.Dir = source(t)
	cmd.Env = append(cmd.Environ(), "CGO_ENABLED=0", "GOOS=linux")
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	for dep := range strings.FieldsSeq(string(out)) {
		for _, banned := range []string{"testing", "os/user", "github.com/spf13/cobra", "github.com/klauspost/", "github.com/gopacket/",
			"github.com/invopop/", "gvisor.dev/", "mvdan.cc/sh", "golang.org/x/tools", "clonecluster/image", "clonecluster/qemu", "runtime/cgo"} {
			if dep == banned || strings.HasPrefix(dep, strings.TrimSuffix(banned, "/")+"/") {
				t.Errorf("the node binary imports %s", dep)
			}
		}
	}
}
