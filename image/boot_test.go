package image_test

import (
	"context"
	"encoding/json"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"clonecluster/config"
	"clonecluster/image"
	"clonecluster/qemu/lab"
	"clonecluster/qemu/qemutest"
)

// A boot takes a few seconds; the rest is for a machine with other things to do.
const bootLimit = 4 * time.Minute

// cluster builds what a node of the demo boots, and gives the files.
func cluster(t testing.TB, debug bool) (kernel string, initrd []string) {
	t.Helper()
	kernel = qemutest.Kernel(t)
	qemutest.Accel(t) // skips where no guest can run
	return kernel, members(t, "amd64", debug)
}

// members builds the initramfs of a node of the demo.
func members(t testing.TB, arch string, debug bool) []string {
	t.Helper()
	dir := t.TempDir()
	base, err := image.BuildBase(t.Context(), image.BaseOptions{OutDir: dir, Arch: arch, Debug: debug, Progress: t.Output()})
	if err != nil {
		t.Fatal(err)
	}
	www := filepath.Join(dir, "www")
	if err := image.WriteFile(filepath.Join(www, "index.html"), []byte("<h1>the content of the image</h1>"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := image.WriteFile(filepath.Join(www, "large.bin"), []byte(strings.Repeat("0123456789abcdef", 1<<16)), 0o644); err != nil {
		t.Fatal(err)
	}
	// A service of somebody else's besides, with content of its own.
	yaml := []byte(strings.Replace(string(config.DemoYAML), "\nservices:\n",
		"\nservices:\n  - {name: hello, run: [/bin/hello], build: ./testdata/hello, content: www, ports: [8082/tcp], health: {tcp: 127.0.0.1:8082}}\n", 1))
	cfg, err := config.Load(yaml, "cluster.yaml")
	if err != nil {
		t.Fatal(err)
	}
	services, err := image.BuildServices(t.Context(), image.ServiceOptions{Config: cfg, Dir: ".", Arch: "amd64", Debug: debug, OutDir: dir})
	if err != nil {
		t.Fatal(err)
	}
	member, _, err := image.ConfigMember(yaml, map[string]string{image.ContentDir: www, "srv/hello": www}, time.Time{})
	if err != nil {
		t.Fatal(err)
	}
	if member, err = image.Compress(member); err != nil { // plain is what everything else uses
		t.Fatal(err)
	}
	file := filepath.Join(dir, "config.cpio.zst")
	if err := image.WriteFile(file, member, 0o600); err != nil {
		t.Fatal(err)
	}
	return []string{base.Path, services.Path, file}
}

// The kernel unpacks both members, init finds the configuration, and the
// service answers at the VIP with the content that was packed.
func TestBoot(t *testing.T) {
	cfg := lab.Demo(1)
	cfg.Kernel, cfg.Initrd = cluster(t, false)
	l := qemutest.Lab(t, cfg)
	ctx, cancel := context.WithTimeout(t.Context(), bootLimit)
	defer cancel()
	ready, err := l.Node(0).WaitStage(ctx, "ready")
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range l.Node(0).Stages() {
		t.Logf("%8.3f s  %s", s.At.Seconds(), s.Name)
	}
	if ready.Attrs["node"] != l.Node(0).MAC().String() {
		t.Errorf("ready = %v", ready)
	}
	get := func(path string) (string, http.Header) { return qemutest.Get(ctx, t, l, path) }
	var who struct{ Node, Hostname string }
	text, _ := get("/whoami")
	if err := json.Unmarshal([]byte(text), &who); err != nil || who.Node != l.Node(0).MAC().String() || who.Hostname != "demo-770001" {
		t.Errorf("/whoami = %s, %v", text, err)
	}
	if page, header := get("/"); page != "<h1>the content of the image</h1>" || header.Get("ETag") == "" {
		t.Errorf("/ = %q with %v", page, header)
	}
	if hello, _ := get(":8082/hello"); hello != "hello from "+l.Node(0).MAC().String()+"\n" {
		t.Errorf("the service that was built says %q", hello)
	}
	if page, _ := get(":8082/"); page != "<h1>the content of the image</h1>" {
		t.Errorf("its content: %q", page)
	}
	if large, _ := get("/large.bin"); large != strings.Repeat("0123456789abcdef", 1<<16) {
		t.Errorf("/large.bin: %d bytes, not what was packed", len(large))
	}
}

// The debug image is a node like any other, with a shell that finds its tools
// and waits for no terminal, offered on the console or instead of init.
func TestBootDebug(t *testing.T) {
	kernel, initrd := cluster(t, true)
	for _, tc := range []struct {
		name, cmdline string
		want          []string
	}{
		{"node", lab.Demo(1).Cmdline, []string{"debug: press Enter for a shell", "timeline stage=ready"}},
		{"shell", `console=ttyS0 quiet panic=10 PATH=/bin rdinit=/bin/sh -- -c "ls -l /etc/clonecluster; cat /etc/hosts; echo the shell is done"`,
			[]string{"cluster.yaml", "127.0.0.1 localhost", "the shell is done"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			cfg := lab.Demo(1)
			cfg.Kernel, cfg.Initrd, cfg.Cmdline = kernel, initrd, tc.cmdline
			cfg.MemoryMB = 320
			l := qemutest.Lab(t, cfg)
			ctx, cancel := context.WithTimeout(t.Context(), bootLimit)
			defer cancel()
			for _, want := range tc.want {
				if _, err := l.Node(0).VM().WaitLine(ctx, func(text string) bool { return strings.Contains(text, want) }); err != nil {
					t.Fatal(err)
				}
			}
		})
	}
}

// What is built stays within the budgets.
func TestBudgets(t *testing.T) {
	kernel := qemutest.Kernel(t)
	if testing.Short() {
		t.Skip("compiles the image's programs: not with -short")
	}
	dir := t.TempDir()
	base, err := image.BuildBase(t.Context(), image.BaseOptions{OutDir: dir})
	if err != nil {
		t.Fatal(err)
	}
	member, err := image.ConfigCPIO(config.DemoYAML, "", time.Time{})
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(dir, "config.cpio")
	if err := os.WriteFile(file, member, 0o600); err != nil {
		t.Fatal(err)
	}
	r, err := image.NewReport("qemu-x86_64")
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Files(kernel, base.Path, file); err != nil {
		t.Fatal(err)
	}
	var table strings.Builder
	if err := r.Print(&table, "plain"); err != nil {
		t.Fatal(err)
	}
	t.Logf("\n%s", &table)
	if err := r.Check(); err != nil {
		t.Error(err)
	}
}
