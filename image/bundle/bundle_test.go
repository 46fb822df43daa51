package bundle

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	cdx "github.com/CycloneDX/cyclonedx-go"
	"github.com/klauspost/compress/zstd"
	"golang.org/x/sys/unix"

	"clonecluster/boards"
	"clonecluster/config"
	"clonecluster/image"
	"clonecluster/image/disk"
	"clonecluster/image/kernel"
	"clonecluster/image/keys"
	"clonecluster/image/uki"
	"clonecluster/qemu/qemutest"
)

// demoKey is what must not be where everybody can read.
const demoKey = "Y2xvbmVjbHVzdGVyIGRlbW8sIG5vdCBhIHNlY3JldCE="

// withService is the demo with a service and content of somebody else's.
var withService = strings.Replace(string(config.DemoYAML), "\nservices:\n",
	"\nservices:\n  - name: hello\n    run: [/bin/hello]\n    build: ../testdata/hello\n    content: testdata/www\n    ports: [8082/tcp]\n", 1)

func TestMain(m *testing.M) {
	if os.Getenv(helperOut) != "" {
		os.Exit(helper())
	}
	code := m.Run()
	if shared.dir != "" {
		os.RemoveAll(shared.dir)
	}
	os.Exit(code)
}

// options are those of a build around a kernel that is there.
func options(t *testing.T, out string) Options {
	t.Helper()
	if testing.Short() {
		t.Skip("compiles the image's programs: not with -short")
	}
	if _, _, err := uki.Stub("amd64"); err != nil {
		t.Skip(err)
	}
	if _, _, err := disk.GRUB(t.Context()); err != nil {
		t.Skip(err)
	}
	return plainOptions("qemu-x86_64", qemutest.Kernel(t), out)
}

func plainOptions(name, bzImage, out string) Options {
	board, err := boards.Get(name)
	if err != nil {
		panic(err)
	}
	return Options{
		Board: board, Config: []byte(withService), ConfigDir: ".", OutDir: out, Content: map[string]string{"srv/hello": "testdata/www"},
		Built: &kernel.Result{Image: bzImage, Release: "6.12.0-clone"},
	}
}

var shared struct {
	once sync.Once
	dir  string
	m    *image.Manifest
	err  error
}

// folder gives a copy of one build, made of links: who changes a file replaces it.
func buildOnce(t *testing.T) (dir string, m *image.Manifest) {
	t.Helper()
	o := options(t, "")
	shared.once.Do(func() {
		if shared.dir, shared.err = os.MkdirTemp("", "clonecluster-bundle-"); shared.err != nil {
			return
		}
		o.OutDir = filepath.Join(shared.dir, "out")
		shared.m, shared.err = Build(t.Context(), o)
	})
	if shared.err != nil {
		t.Fatal(shared.err)
	}
	dir = filepath.Join(t.TempDir(), "out")
	if out, err := exec.Command("cp", "-al", filepath.Join(shared.dir, "out"), dir).CombinedOutput(); err != nil {
		t.Fatal(err, string(out))
	}
	return dir, shared.m
}

func read(t *testing.T, path ...string) []byte {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(path...))
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func files(t *testing.T, dir string) map[string]fs.FileInfo {
	t.Helper()
	all := map[string]fs.FileInfo{}
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		rel, _ := filepath.Rel(dir, path)
		all[rel], err = d.Info()
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

func TestBuild(t *testing.T) {
	dir, m := buildOnce(t)
	secret := map[string]bool{ConfigName: true, InitrdName: true, EFIName: true, StickName: true}
	for name, fi := range files(t, dir) {
		want := fs.FileMode(0o644)
		if secret[filepath.Base(name)] {
			want = 0o600
		}
		if fi.Mode() != want {
			t.Errorf("%s has mode %v; want %v", name, fi.Mode(), want)
		}
		if has := bytes.Contains(read(t, dir, name), []byte(demoKey)); has && !secret[filepath.Base(name)] {
			t.Errorf("%s holds the cluster's key", name)
		}
	}
	for _, name := range []string{image.BaseName(false), image.ServicesName} {
		members, err := unpack(read(t, dir, name))
		if err != nil {
			t.Fatal(err)
		}
		for _, r := range members {
			if bytes.Contains(r.Data, []byte(demoKey)) && r.Name != "init" { // the demo's is published, and init warns of it
				t.Errorf("%s: %s holds the cluster's key", name, r.Name)
			}
		}
	}
	if !bytes.Contains(read(t, dir, ConfigName), []byte(demoKey)) {
		t.Error("the key is not where it should be, so the search above finds nothing")
	}

	cmd := exec.Command("sha256sum", "-c", "--strict", SumsName)
	cmd.Dir = dir
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("sha256sum -c: %v\n%s", err, out)
	}
	for _, name := range []string{KernelName, InitrdName, EFIName} {
		a, errA := os.Stat(filepath.Join(dir, name))
		b, errB := os.Stat(filepath.Join(dir, PXEDir, name))
		if errA != nil || errB != nil || !os.SameFile(a, b) {
			t.Errorf("%s is not linked into %s (%v, %v)", name, PXEDir, errA, errB)
		}
	}
	if got := string(read(t, dir, PXEDir, ScriptName)); got != "#!ipxe\nkernel bzImage initrd=initrd.img console=ttyS0 quiet panic=10\ninitrd initrd.img\nboot\n" {
		t.Errorf("%s = %q", ScriptName, got)
	}

	// What the unified image carries is what lies beside it.
	u, err := uki.Read(read(t, dir, EFIName))
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(u.Section(uki.Initrd).Data, read(t, dir, InitrdName)) || !bytes.Equal(u.Section(uki.Linux).Data, read(t, dir, KernelName)) {
		t.Error("the unified image has another kernel or initramfs")
	}
	members, err := unpack(read(t, dir, image.ServicesName))
	if err != nil || !slices.ContainsFunc(members, func(r image.Member) bool { return r.Name == "bin/hello" && r.Mode == 0o100755 }) {
		t.Errorf("the services' member: %v", err)
	}
	members, err = unpack(read(t, dir, ConfigName))
	if err != nil || !slices.ContainsFunc(members, func(r image.Member) bool { return r.Name == "srv/hello/index.html" && r.Mode == 0o100644 }) {
		t.Errorf("the content: %v", err)
	}

	names := map[string]bool{}
	for _, f := range m.Inputs {
		names[f.Name] = true
	}
	for _, want := range []string{"cluster.yaml", "go.mod", "go.sum", "source/cmd/node/main.go", "source/netcore/bpf/objects_bpfel.o", "content/hello/index.html", "service/hello/main.go", "systemd-boot-efi/linuxx64.efi.stub"} {
		if !names[want] {
			t.Errorf("the manifest has no input %s", want)
		}
	}

	var bom cdx.BOM
	if err := json.Unmarshal(read(t, dir, SBOMName), &bom); err != nil {
		t.Fatal(err)
	}
	parts := map[string]bool{}
	for _, c := range *bom.Components {
		parts[c.Name] = true
	}
	for _, want := range []string{"linux", "systemd-boot-efi", "std", "github.com/cilium/ebpf", "/init", "/bin/hello", EFIName} {
		if !parts[want] {
			t.Errorf("the SBOM has no %s", want)
		}
	}
	if bom.SerialNumber != "" || bom.Metadata.Timestamp != "" {
		t.Error("the SBOM has a serial number or a time")
	}
}

// Built again without a change, not a file is touched; with one, only what
// depends on it; what is no more in a build goes.
func TestRebuilt(t *testing.T) {
	dir, _ := buildOnce(t)
	before := files(t, dir)
	touched := func() (names []string) {
		t.Helper()
		now := files(t, dir)
		for name, fi := range now {
			if old := before[name]; old == nil || !os.SameFile(old, fi) {
				names = append(names, name)
			}
		}
		before = now
		slices.Sort(names)
		return names
	}
	begin, used := time.Now(), cpuTime(t)
	o := options(t, dir)
	if _, err := Build(t.Context(), o); err != nil {
		t.Fatal(err)
	}
	used = cpuTime(t) - used
	t.Logf("a build without a change took %v, and %v of CPU time", time.Since(begin), used)
	if used > 3*time.Second { // not the time that others' work makes it wait
		t.Errorf("a build without a change takes %v of CPU time; want less than 3s", used)
	}
	if got := touched(); len(got) > 0 {
		t.Errorf("a build without a change wrote %v", got)
	}
	// What a killed build leaves goes; a damaged file is made again.
	if err := os.MkdirAll(filepath.Join(dir, stageName, "half"), 0o755); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{".initrd.img-123", stageName + "/half/file"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte("half"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	damage(t, filepath.Join(dir, InitrdName), func(b []byte) []byte { return b[:len(b)/2] })
	touched()
	if _, err := Build(t.Context(), o); err != nil {
		t.Fatal(err)
	}
	if got := touched(); !slices.Equal(got, []string{InitrdName, PXEDir + "/" + InitrdName}) {
		t.Errorf("after a damaged initrd: wrote %v", got)
	}
	if left, _ := filepath.Glob(filepath.Join(dir, ".*")); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
	// A build that is cancelled changes nothing.
	ctx, cancel := context.WithCancel(t.Context())
	o.Config = []byte(strings.Replace(withService, "name: demo", "name: other", 1))
	o.Progress.Step = func(s Step) {
		if s.Name == "efi" {
			cancel()
		}
	}
	if _, err := Build(ctx, o); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	if got := touched(); len(got) > 0 {
		t.Errorf("a cancelled build wrote %v", got)
	}
	// The short form does not take what is signed.
	o.Progress.Step, o.Minimal = nil, true
	signature := filepath.Join(dir, SignatureName)
	if err := os.WriteFile(signature, []byte("x"), 0o644); err != nil {
		t.Fatal(err)
	}
	touched()
	if _, err := Build(t.Context(), o); err == nil || !strings.Contains(err.Error(), dir+" holds a signed build") || !strings.Contains(err.Error(), "another folder with --out") {
		t.Errorf("a minimal build over a signed one: %v", err)
	}
	if got := touched(); len(got) > 0 {
		t.Errorf("a refused build wrote %v", got)
	}
	os.Remove(signature)
	// What is no more in a build goes.
	damage(t, filepath.Join(dir, ManifestName), func(b []byte) []byte {
		return bytes.Replace(b, []byte(`"outputs": [`), []byte(`"outputs": [{"name": "old", "bytes": 1, "sha256": "`+strings.Repeat("0", 64)+`"},`), 1)
	})
	if err := os.WriteFile(filepath.Join(dir, "old"), []byte("x"), 0o644); err != nil {
		t.Fatal(err)
	}
	o.Minimal = false
	if _, err := Build(t.Context(), o); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(dir, "old")); err == nil {
		t.Error("an old file stays beside a new kernel")
	}
	if r, _, err := Verify(t.Context(), dir, VerifyOptions{}); err != nil || len(r.Problems) > 0 || r.Cluster != "other" {
		t.Errorf("Verify = %+v, %v", r, err)
	}
	// Somebody else builds.
	d, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	if err := unix.Flock(int(d.Fd()), unix.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	if _, err := Build(t.Context(), o); err == nil || !strings.Contains(err.Error(), "another build writes to") {
		t.Errorf("two builds at once: %v", err)
	}
}

// cpuTime is what this process and the programs that it has called have used.
func cpuTime(t *testing.T) (used time.Duration) {
	t.Helper()
	for _, who := range []int{unix.RUSAGE_SELF, unix.RUSAGE_CHILDREN} {
		var r unix.Rusage
		if err := unix.Getrusage(who, &r); err != nil {
			t.Fatal(err)
		}
		used += time.Duration(r.Utime.Nano() + r.Stime.Nano())
	}
	return used
}

// damage replaces a file, which may be a link, by what f makes of it.
func damage(t *testing.T, path string, f func([]byte) []byte) {
	t.Helper()
	fi, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := image.WriteFile(path, f(slices.Clone(read(t, path))), fi.Mode()); err != nil {
		t.Fatal(err)
	}
}

func TestBuildErrors(t *testing.T) {
	ok := options(t, "")
	for _, tc := range []struct {
		name   string
		change func(*Options)
		want   string
	}{
		{"unknown key", func(o *Options) { o.Config = []byte(strings.Replace(withService, "drain:", "drian:", 1)) }, `unknown key "drian"; did you mean "drain"?`},
		{"no stub", func(o *Options) { o.Board.Arch = "riscv64" }, "the unified kernel image needs it"},
		{"no such program", func(o *Options) {
			o.Config = []byte(strings.Replace(withService, "    build: ../testdata/hello\n", "", 1))
		}, "services.hello.run: the image has no program /bin/hello"},
		{"no such folder of a service", func(o *Options) { o.ConfigDir = t.TempDir() }, "testdata/hello does not exist; paths that begin with a dot"},
		{"keys that do not belong together", func(o *Options) {
			sb, other := t.TempDir(), t.TempDir()
			for _, dir := range []string{sb, other} {
				if _, err := keys.NewSecureBoot(dir, "test"); err != nil {
					t.Fatal(err)
				}
			}
			o.SecureBoot = secureBoot(t, sb)
			o.SecureBoot.Cert = secureBoot(t, other).Cert
		}, "signing for Secure Boot: the certificate is of another key; clonectl key secure-boot makes both files"},
		{"no kernel source", func(o *Options) {
			o.Built, o.Kernel = nil, kernel.Options{Source: "/none", CacheDir: t.TempDir()}
		}, "--kernel-source is a tree or a tarball of Linux 6.12"},
		{"kernel without an option", func(o *Options) {
			o.Built = &kernel.Result{Image: ok.Built.Image, Config: kernelConfig(t, "CONFIG_EFI_STUB")}
		}, "the kernel of qemu-x86_64 lacks CONFIG_EFI_STUB, so UEFI could not start it: put CONFIG_EFI_STUB=y into boards/qemu-x86_64/kernel.config"},
		{"kernel of another board", func(o *Options) {
			o.Built = &kernel.Result{Image: ok.Built.Image, Config: kernelConfig(t, "CONFIG_VIRTIO_NET")}
		}, "CONFIG_VIRTIO_NET"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			o := ok
			o.OutDir = filepath.Join(t.TempDir(), "out")
			tc.change(&o)
			var done []string
			o.Progress.Step = func(s Step) { done = append(done, s.Name) }
			_, err := Build(t.Context(), o)
			if err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("Build = %v; want an error with %q", err, tc.want)
			}
			if len(done) > 0 && o.Built == ok.Built { // what is wrong with a kernel is seen when it is there
				t.Errorf("found after %q; want it before the first step's end", done)
			}
			if _, err := os.Stat(o.OutDir); err == nil {
				t.Error("a failed build left its folder")
			}
		})
	}
	if _, err := Content(&config.Config{Services: []config.Service{{Name: "a", Content: "none"}}}, t.TempDir(), ""); err == nil || !strings.Contains(err.Error(), "services.a.content: ") {
		t.Errorf("Content of a folder that is not there: %v", err)
	}
}

// Content that no service would serve is not packed.
func TestContentOfNobody(t *testing.T) {
	www := t.TempDir()
	for _, tt := range []struct {
		services string
		serves   bool
	}{
		{"{name: web, run: [/bin/webd]}", true},
		{"{name: web, run: [/bin/webd], content: .}", false},
		{"{name: shop, run: [/bin/shop], build: ./shop}", false},
		{"{name: shop, run: [/bin/shop, --root=/srv/www], build: ./shop}", true},
		{"{name: shop, run: [/bin/shop], build: ./shop}, {name: web, run: [/bin/webd]}", true},
		{"", false},
	} {
		head, _, _ := strings.Cut(string(config.DemoYAML), "\nservices:\n")
		c, err := config.Load([]byte(head+"\nservices: ["+tt.services+"]\n"), "cluster.yaml")
		if err != nil {
			t.Fatal(err)
		}
		all, err := Content(c, t.TempDir(), www)
		if tt.serves && (err != nil || all[image.ContentDir] != www) {
			t.Errorf("%s: Content = %v, %v; want the folder", tt.services, all, err)
		}
		if !tt.serves && (err == nil || !strings.Contains(err.Error(), "no service would serve "+www+": it is for one that runs /bin/webd")) {
			t.Errorf("%s: Content = %v, %v; want to be told", tt.services, all, err)
		}
	}
}

// A folder has the kernel by the name that its own build, and boot loaders, know.
func TestKernelFile(t *testing.T) {
	for board, want := range map[string]string{"qemu-x86_64": "bzImage", "pc-x86_64": "bzImage", "generic-arm64": "Image"} {
		o := plainOptions(board, "", "")
		if got := KernelFile(o.Board); got != want {
			t.Errorf("the kernel of %s is %s; want %s", board, got, want)
		}
		m := &image.Manifest{Board: board, Outputs: []image.File{{Name: want}, {Name: "other"}}}
		if got := order(m); got[0] != want {
			t.Errorf("of a build for %s is compared first: %s; want %s", board, got[0], want)
		}
		b := &builder{Options: o, outputs: []image.File{{Name: want}, {Name: InitrdName}, {Name: EFIName}}}
		b.OutDir, b.stage = t.TempDir(), t.TempDir()
		if _, err := b.pxe(t.Context()); err != nil || b.links[0] != want || !strings.Contains(string(read(t, b.stage, PXEDir, ScriptName)), "kernel "+want+" initrd=") {
			t.Errorf("the PXE tree for %s links to %v (%v)", board, b.links, err)
		}
	}
}

// Without GRUB there is no stick for a PC, and nothing is begun.
func TestNoGRUB(t *testing.T) {
	o := options(t, filepath.Join(t.TempDir(), "out"))
	t.Setenv("PATH", t.TempDir())
	_, err := Build(t.Context(), o)
	if want := "the USB image needs it: grub-mkimage is not installed (apt-get install grub-pc-bin)"; err == nil || !strings.Contains(err.Error(), want) {
		t.Errorf("Build = %v; want an error with %q", err, want)
	}
	if _, err := os.Stat(o.OutDir); err == nil {
		t.Error("a failed build left its folder")
	}
}

// kernelConfig is a complete configuration but for one option.
func kernelConfig(t *testing.T, without string) string {
	t.Helper()
	board, err := boards.Get("qemu-x86_64")
	if err != nil {
		t.Fatal(err)
	}
	f, err := board.KernelConfig()
	if err != nil {
		t.Fatal(err)
	}
	text := strings.Replace(string(f.Bytes()), without+"=y\n", "# "+without+" is not set\n", 1)
	path := filepath.Join(t.TempDir(), "config")
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	return path
}

// mount gives a folder that is a file system of its own.
func mount(t *testing.T, options string) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("mounts a file system: needs root")
	}
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, options); err != nil {
		t.Skipf("mounting a tmpfs: %v (needs root and CAP_SYS_ADMIN)", err)
	}
	t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
	return dir
}

func TestFullDisk(t *testing.T) {
	o := options(t, "")
	dir := mount(t, "size=6m")
	o.OutDir = filepath.Join(dir, "out")
	_, err := Build(t.Context(), o)
	if err == nil || !strings.Contains(err.Error(), "no space left for the build: free some 300 MB in "+o.OutDir+", or give another folder with --out") {
		t.Errorf("Build = %v", err)
	}
	if left, _ := os.ReadDir(dir); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}

// A full cache is not mended by another output folder.
func TestFullCache(t *testing.T) {
	full := fmt.Errorf("%w in the cache: %w", kernel.ErrNoSpace, unix.ENOSPC)
	if err := (&builder{}).explain(full); strings.Contains(err.Error(), "--out") {
		t.Errorf("%v becomes %v", full, err)
	}
}

func TestReadOnly(t *testing.T) {
	o := options(t, "")
	dir := mount(t, "")
	if err := unix.Mount("", dir, "", unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil {
		t.Fatal(err)
	}
	o.OutDir = filepath.Join(dir, "out")
	if _, err := Build(t.Context(), o); err == nil || !strings.Contains(err.Error(), o.OutDir+" cannot be written to; give another folder with --out") {
		t.Errorf("Build = %v", err)
	}
}

func TestSigned(t *testing.T) {
	dir, _ := buildOnce(t)
	for _, word := range []string{""} { // encrypted ones are package keys' to test: they take seconds
		t.Run(fmt.Sprintf("password %q", word), func(t *testing.T) {
			file := filepath.Join(t.TempDir(), "key")
			if _, err := keys.New(file, word); err != nil {
				t.Fatal(err)
			}
			key, err := keys.Load(file, func() (string, error) { return word, nil })
			if err != nil {
				t.Fatal(err)
			}
			o := options(t, dir)
			o.Key = &key
			if _, err := Build(t.Context(), o); err != nil {
				t.Fatal(err)
			}
			sig := read(t, dir, SignatureName)
			if _, err := Build(t.Context(), o); err != nil || !bytes.Equal(sig, read(t, dir, SignatureName)) {
				t.Errorf("signed again, it is another signature (%v)", err)
			}
			public, err := keys.LoadPublic(file + ".pub")
			if err != nil {
				t.Fatal(err)
			}
			r, _, err := Verify(t.Context(), dir, VerifyOptions{PublicKey: &public})
			if err != nil || len(r.Problems) > 0 || r.Signature != "good" {
				t.Errorf("Verify = %+v, %v", r, err)
			}
			if _, err := exec.LookPath("minisign"); err != nil {
				t.Skip("minisign is not installed (make deps-test)")
			}
			if out, err := exec.Command("minisign", "-V", "-p", file+".pub", "-m", filepath.Join(dir, ManifestName)).CombinedOutput(); err != nil || !strings.Contains(string(out), "clonecluster demo for qemu-x86_64") {
				t.Errorf("minisign -V: %v\n%s", err, out)
			}
		})
	}
	// The short form has no key, and does not take the signature away.
	o := options(t, dir)
	o.Minimal = true
	if _, err := Build(t.Context(), o); err == nil || !strings.Contains(err.Error(), SignatureName) || !strings.Contains(err.Error(), "with --out (make: OUT=FOLDER)") {
		t.Errorf("a minimal build over a signed one: %v", err)
	}
	// Without a key, no signature of before stays.
	o = options(t, dir)
	said := ""
	o.Progress.Step = func(s Step) { said = s.Text }
	if _, err := Build(t.Context(), o); err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(said, "removed "+SignatureName+" of an earlier build") {
		t.Errorf("that the signature is gone is not said: %q", said)
	}
	if _, err := os.Stat(filepath.Join(dir, SignatureName)); err == nil {
		t.Error("an old signature stays")
	}
}

func TestSecureBoot(t *testing.T) {
	dir, _ := buildOnce(t)
	sb := t.TempDir()
	if _, err := keys.NewSecureBoot(sb, "test"); err != nil {
		t.Fatal(err)
	}
	o := options(t, dir)
	o.SecureBoot = secureBoot(t, sb)
	m, err := Build(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	signed := read(t, dir, EFIName)
	if err := uki.Verify(signed, o.SecureBoot.Cert); err != nil || len(m.SecureBoot) != 64 {
		t.Errorf("the signature: %v; manifest: %q", err, m.SecureBoot)
	}
	time.Sleep(time.Second + 100*time.Millisecond) // the signature holds the second
	if _, err := Build(t.Context(), o); err != nil || !bytes.Equal(signed, read(t, dir, EFIName)) {
		t.Errorf("without a change it was signed anew (%v)", err)
	}
	// Who has not the key can build the same, too.
	if p, err := Rebuild(t.Context(), dir, m, options(t, ""), t.TempDir()); p != nil || err != nil {
		t.Errorf("Rebuild = %v, %v", p, err)
	}
	// What was signed is compared, whatever the signature says.
	damage(t, filepath.Join(dir, EFIName), func(b []byte) []byte { b[len(b)/2] ^= 1; return b })
	if p, err := Rebuild(t.Context(), dir, m, options(t, ""), t.TempDir()); err != nil || p == nil || p.File != EFIName || !strings.Contains(p.Message, "first in its section .initrd") {
		t.Errorf("Rebuild of a changed .efi = %v, %v", p, err)
	}
}

// secureBoot gives what the keys of a folder sign with.
func secureBoot(t *testing.T, dir string) *SecureBoot {
	t.Helper()
	key, cert, err := keys.LoadSecureBoot(filepath.Join(dir, keys.SecureBootKey), filepath.Join(dir, keys.SecureBootCert))
	if err != nil {
		t.Fatal(err)
	}
	return &SecureBoot{Key: key, Cert: cert}
}

func TestVerify(t *testing.T) {
	dir, m := buildOnce(t)
	r, _, err := Verify(t.Context(), dir, VerifyOptions{Board: "qemu-x86_64"})
	if err != nil || len(r.Problems) > 0 || r.Files != len(m.Files()) || r.Signature != "none" {
		t.Fatalf("Verify = %+v, %v", r, err)
	}
	flip := func(b []byte) []byte { b[len(b)/2] ^= 1; return b }
	for _, tc := range []struct {
		name, file string
		change     func([]byte) []byte // nil: remove
		board      string
		want       string
	}{
		{"flipped", InitrdName, flip, "", "initrd.img: has been changed: its SHA-256 is "},
		{"flipped link", PXEDir + "/" + EFIName, flip, "", "pxe/clonecluster.efi: has been changed"},
		{"truncated", KernelName, func(b []byte) []byte { return b[:1000] }, "", "bzImage: is truncated: 1000 of "},
		{"longer", KernelName, func(b []byte) []byte { return append(b, 0) }, "", "bzImage: has "},
		{"missing", SBOMName, nil, "", "sbom.cdx.json: is missing; copy or download it again"},
		{"no sums", SumsName, nil, "", "SHA256SUMS: is missing; copy or download it again"},
		{"sums", SumsName, flip, "", "SHA256SUMS: does not say what the manifest says"},
		{"manifest", ManifestName, func(b []byte) []byte { return b[:len(b)/2] }, "", "manifest.json: it is no manifest"},
		{"leads out", ManifestName, func(b []byte) []byte {
			return bytes.Replace(b, []byte(`"initrd.img"`), []byte(`"../initrd.img"`), 1)
		}, "", "no build writes that"},
		{"extra", "other.img", func([]byte) []byte { return []byte("x") }, "", "other.img: is not in the manifest"},
		{"board", SumsName, func(b []byte) []byte { return b }, "pc-x86_64", "manifest.json: is of a build for the board qemu-x86_64, not pc-x86_64"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			dir, _ := buildOnce(t)
			path := filepath.Join(dir, tc.file)
			switch {
			case tc.change == nil:
				if err := os.Remove(path); err != nil {
					t.Fatal(err)
				}
			case tc.name == "extra":
				if err := os.WriteFile(path, tc.change(nil), 0o644); err != nil {
					t.Fatal(err)
				}
			default:
				damage(t, path, tc.change)
			}
			r, _, err := Verify(t.Context(), dir, VerifyOptions{Board: tc.board})
			if err != nil || len(r.Problems) != 1 || !strings.Contains(r.Problems[0].String(), tc.want) {
				t.Errorf("Verify = %+v, %v; want only %q", r, err, tc.want)
			} else if strings.HasPrefix(tc.name, "flipped") && !strings.HasSuffix(r.Problems[0].Message, "; copy or download it again, or build it again") {
				t.Errorf("Verify names no fix: %v", r.Problems[0])
			}
		})
	}
	if _, _, err := Verify(t.Context(), t.TempDir(), VerifyOptions{}); err == nil || !strings.Contains(err.Error(), "it is no output folder of clonectl build") {
		t.Errorf("of an empty folder: %v", err)
	}
}

// Only those files are compared, also where the manifest does not have them.
func TestVerifyFiles(t *testing.T) {
	dir, _ := buildOnce(t)
	damage(t, filepath.Join(dir, StickName), func(b []byte) []byte { return b[1:] })
	if err := os.WriteFile(filepath.Join(dir, "other"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	var seen []string
	o := VerifyOptions{Files: []string{KernelName, InitrdName, "none"}, Progress: func(name string, done, size int64) {
		if done == size {
			seen = append(seen, name)
		}
	}}
	if r, _, err := Verify(t.Context(), dir, o); err != nil || len(r.Problems) > 0 || r.Files != 2 || r.Of != 2 {
		t.Errorf("Verify = %+v, %v", r, err)
	}
	if seen = slices.Compact(seen); !slices.Equal(seen, []string{KernelName, InitrdName}) {
		t.Errorf("the progress is of %v", seen)
	}
	o.Files = append(o.Files, "other")
	if r, _, err := Verify(t.Context(), dir, o); err != nil || len(r.Problems) != 1 || r.Problems[0].File != "other" {
		t.Errorf("Verify of what is not in the manifest = %+v, %v", r, err)
	}
}

func TestVerifyURL(t *testing.T) {
	dir, m := buildOnce(t)
	var cut, short, gone, endless, denied, failing string
	web := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		name := strings.TrimPrefix(r.URL.Path, "/boot/")
		switch name {
		case cut: // as a connection that breaks
			data := read(t, dir, name)
			w.Header().Set("Content-Length", fmt.Sprint(len(data)))
			w.Write(data[:len(data)/2])
			panic(http.ErrAbortHandler)
		case short:
			w.Write(read(t, dir, name)[1000:])
		case gone:
			http.NotFound(w, r)
		case failing:
			http.Error(w, "no", http.StatusInternalServerError)
		case denied:
			http.Error(w, "no", http.StatusForbidden)
		case endless:
			for r.Context().Err() == nil {
				if _, err := w.Write(make([]byte, 1<<16)); err != nil {
					return
				}
			}
		default:
			http.ServeFile(w, r, filepath.Join(dir, name))
		}
	}))
	defer web.Close()
	for _, tc := range []struct {
		short, gone, endless string
		want                 string
	}{
		{},
		{short: InitrdName, want: "initrd.img: is truncated: "},
		{gone: EFIName, want: "clonecluster.efi: is missing"},
		{endless: KernelName, want: "bzImage: has more than the "},
	} {
		short, gone, endless = tc.short, tc.gone, tc.endless
		r, _, err := VerifyURL(t.Context(), web.URL+"/boot", VerifyOptions{})
		switch {
		case err != nil:
			t.Error(err)
		case tc.want == "" && (len(r.Problems) > 0 || r.Files != len(m.Files())):
			t.Errorf("VerifyURL = %+v", r)
		case tc.want != "" && (len(r.Problems) != 1 || !strings.Contains(r.Problems[0].String(), tc.want)):
			t.Errorf("VerifyURL = %+v; want only %q", r, tc.want)
		}
	}
	// What could not be read is no difference.
	short, gone, endless = "", "", ""
	for _, tc := range []struct{ cut, denied, want string }{
		{cut: InitrdName, want: "initrd.img: cannot be read: the connection has broken; try again: unexpected EOF"},
		{denied: InitrdName, want: "initrd.img: cannot be read: GET "},
	} {
		cut, denied = tc.cut, tc.denied
		if r, _, err := VerifyURL(t.Context(), web.URL+"/boot", VerifyOptions{}); err != nil || len(r.Problems) > 0 || len(r.Unread) != 1 || r.Files != r.Of-1 || !strings.Contains(r.Unread[0].String(), tc.want) {
			t.Errorf("VerifyURL = %+v, %v; want only %q unread", r, err, tc.want)
		}
	}
	cut, denied, endless = "", "", ManifestName
	if _, _, err := VerifyURL(t.Context(), web.URL+"/boot/", VerifyOptions{}); err == nil || !strings.Contains(err.Error(), "larger than 16 MiB") {
		t.Errorf("an endless manifest: %v", err)
	}
	endless, failing = "", ManifestName
	if _, _, err := VerifyURL(t.Context(), web.URL+"/boot/", VerifyOptions{}); err == nil || !strings.HasSuffix(err.Error(), "500 Internal Server Error; the server's log says why, if the URL is that of the build's folder") {
		t.Errorf("a server that fails: %v", err)
	}
}

func TestRebuild(t *testing.T) {
	dir, m := buildOnce(t)
	if p, err := Rebuild(t.Context(), dir, m, options(t, ""), t.TempDir()); p != nil || err != nil {
		t.Fatalf("Rebuild = %v, %v", p, err)
	}
	o := options(t, "")
	o.ConfigDir = t.TempDir() // where nobody has ../testdata/hello
	if p, err := Rebuild(t.Context(), dir, m, o, t.TempDir()); err == nil || !strings.Contains(err.Error(), "services.hello (build: ../testdata/hello)") || !strings.Contains(err.Error(), "with --config") {
		t.Errorf("Rebuild without a service's sources = %v, %v", p, err)
	}
	if _, err := Rebuild(t.Context(), dir, m, options(t, ""), "/proc/none"); err == nil || !strings.Contains(err.Error(), "give one with --cache") {
		t.Errorf("Rebuild where nothing can be written = %v", err)
	}
	for build, want := range map[string]string{
		"/nonexistent/hello":   "there is no /nonexistent/hello; put them there",
		"..":                   "", // it is there
		"example.org/x@v1.0.0": "",
	} {
		yaml := strings.Replace(withService, "build: ../testdata/hello", "build: "+build, 1)
		if err := needSources([]byte(yaml), "."); want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
			t.Errorf("needSources of %s = %v; want %q", build, err, want)
		}
	}
	changed := *m
	changed.Inputs = slices.Clone(m.Inputs)
	i := slices.IndexFunc(changed.Inputs, func(f image.File) bool { return f.Name == "source/cmd/node/main.go" })
	changed.Inputs[i].SHA256 = strings.Repeat("0", 64)
	if p, err := Rebuild(t.Context(), dir, &changed, options(t, ""), t.TempDir()); err != nil || p == nil || p.String() != "source/cmd/node/main.go: is an input, and has changed since" {
		t.Errorf("Rebuild from other sources = %v, %v", p, err)
	}
}

// Whatever output is not as it was built, it is named, and the first of those that
// are made of each other.
func TestCompare(t *testing.T) {
	again, m := buildOnce(t)
	for _, name := range order(m) {
		dir, _ := buildOnce(t)
		damage(t, filepath.Join(dir, name), func(b []byte) []byte { b[len(b)/2] ^= 1; return b })
		p, err := compare(dir, again, m, m)
		if err != nil || p == nil || p.File != name || !strings.HasPrefix(p.Message, "differs from what was built again") {
			t.Errorf("of a changed %s: %v, %v", name, p, err)
		}
		if err := os.Remove(filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
		if p, err := compare(dir, again, m, m); err != nil || p == nil || p.String() != name+": is missing" {
			t.Errorf("without %s: %v, %v", name, p, err)
		}
	}
	dir, _ := buildOnce(t)
	for _, name := range []string{ConfigName, InitrdName, StickName, ManifestName} {
		damage(t, filepath.Join(dir, name), func(b []byte) []byte { b[len(b)/2] ^= 1; return b })
	}
	if p, err := compare(dir, again, m, m); err != nil || p == nil || p.File != ConfigName {
		t.Errorf("of several: %v, %v; want %s", p, err, ConfigName)
	}
}

// An archive from anywhere gives members that are no more than it holds, or an error.
func FuzzUnpack(f *testing.F) {
	plain, _, err := image.ConfigMember([]byte(withService), map[string]string{"srv/hello": "testdata/www"}, time.Time{})
	if err != nil {
		f.Fatal(err)
	}
	packed, err := image.Compress(plain)
	if err != nil {
		f.Fatal(err)
	}
	longName := bytes.Clone(plain)
	copy(longName[94:], "15000000")
	for _, seed := range [][]byte{plain, packed, plain[:len(plain)/2], longName, []byte("070701")} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		records, err := unpack(data)
		if err != nil {
			return
		}
		n := 0
		for _, r := range records {
			n += len(r.Data)
		}
		if bytes.HasPrefix(data, []byte("0707")) && n > len(data) {
			t.Errorf("%d bytes have %d bytes in them", len(data), n)
		}
		if _, _, err := unpackConfig(data, t.TempDir()); err != nil {
			return
		}
	})
}

// What a frame may ask for is enough for what we make, and not more.
func TestUnpackWindow(t *testing.T) {
	plain, _, err := image.ConfigMember([]byte(withService), nil, time.Time{})
	if err != nil {
		t.Fatal(err)
	}
	packed, err := image.Compress(append(plain, make([]byte, 40<<20)...))
	if err != nil {
		t.Fatal(err)
	}
	if members, err := unpack(packed); err != nil || len(members) == 0 {
		t.Errorf("unpack = %d members, %v", len(members), err)
	}
	// RFC 8878, 3.1.1.1: a frame with a window of 64 MiB.
	if _, err := unpack([]byte{0x28, 0xb5, 0x2f, 0xfd, 0, 16 << 3, 0, 0, 0, 0, 0}); !errors.Is(err, zstd.ErrWindowSizeExceeded) {
		t.Errorf("a frame with a large window: %v", err)
	}
}

func TestInside(t *testing.T) {
	pack := func(text string) []byte {
		t.Helper()
		yaml := strings.Replace(withService, "name: demo", "name: "+text, 1)
		b, _, err := image.ConfigMember([]byte(yaml), map[string]string{"srv/hello": "testdata/www"}, time.Time{})
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	if got := inside(pack("a"), pack("b")); got != ", first in its member "+image.ConfigFile {
		t.Errorf("inside = %q", got)
	}
	cut := pack("a")
	cut = cut[:bytes.Index(cut, []byte("\nservices:"))] // within the first file
	if _, err := unpack(cut); err == nil || !strings.Contains(err.Error(), " is truncated: ") {
		t.Errorf("unpack of half an archive: %v", err)
	}
	if got := inside([]byte("abc"), []byte("abd")); got != ", first at byte 2" {
		t.Errorf("inside = %q", got)
	}
}
