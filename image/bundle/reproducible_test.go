package bundle

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"clonecluster/image"
	"clonecluster/qemu/qemutest"
)

// helperOut in the environment makes the test program build into that folder, for
// the board helperBoard around the kernel that helperKernel names, from the working
// directory.
const (
	helperOut    = "CLONECLUSTER_BUNDLE_OUT"
	helperBoard  = "CLONECLUSTER_BUNDLE_BOARD"
	helperKernel = "CLONECLUSTER_BUNDLE_KERNEL"
	helperUmask  = "CLONECLUSTER_BUNDLE_UMASK"
)

func helper() int {
	var umask int
	fmt.Sscanf(os.Getenv(helperUmask), "%o", &umask)
	syscall.Umask(umask)
	o := plainOptions(os.Getenv(helperBoard), os.Getenv(helperKernel), os.Getenv(helperOut))
	o.Kernel.CacheDir = filepath.Dir(os.Getenv(helperKernel)) // for the stub
	if _, err := Build(context.Background(), o); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

// All outputs are the same from another directory, at another time, with another
// umask and time zone, by another user with other habits and an empty build cache.
func TestReproducible(t *testing.T) {
	t.Run("qemu-x86_64", func(t *testing.T) {
		dir, m := buildOnce(t)
		reproduce(t, dir, m, options(t, "").Built.Image)
	})
	t.Run("generic-arm64", func(t *testing.T) {
		kernel := qemutest.KernelARM64(t)
		dir, m := buildFor(t, "generic-arm64", kernel)
		reproduce(t, dir, m, kernel)
	})
}

// reproduce compares what is in the folder first with what another user builds.
func reproduce(t *testing.T, first string, m *image.Manifest, kernel string) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("builds as another user: needs root")
	}
	top, err := os.MkdirTemp("", "clonecluster-another-") // t.TempDir is nobody's to enter
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(top) })
	tree := filepath.Join(top, "a longer path", "of the sources")
	copySources(t, tree)
	for _, dir := range []string{"home", "gocache", "tmp", "modules", "bin"} {
		if err := os.MkdirAll(filepath.Join(top, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	self := filepath.Join(top, "bin", "build")
	copyFile(t, os.Args[0], self, 0o755)
	copyFile(t, kernel, filepath.Join(top, "bin", "bzImage"), 0o644)
	stubs := filepath.Join(qemutest.CacheDir(), "stub")
	if _, err := os.Stat(stubs); err == nil {
		if err := os.CopyFS(filepath.Join(top, "bin", "stub"), os.DirFS(stubs)); err != nil {
			t.Fatal(err)
		}
	}
	const nobody = 65534
	if out, err := exec.Command("chown", "-R", fmt.Sprintf("%d:%d", nobody, nobody), top).CombinedOutput(); err != nil {
		t.Fatal(err, string(out))
	}
	if err := os.Chmod(top, 0o755); err != nil {
		t.Fatal(err)
	}
	// Root's module cache, which nobody can reach, and nobody can write.
	cache, err := exec.Command("go", "env", "GOMODCACHE").Output()
	if err != nil {
		t.Fatal(err)
	}
	modules := filepath.Join(top, "modules")
	if err := unix.Mount(strings.TrimSpace(string(cache)), modules, "", unix.MS_BIND, ""); err != nil {
		t.Skipf("sharing the module cache: %v (needs CAP_SYS_ADMIN)", err)
	}
	t.Cleanup(func() { unix.Unmount(modules, unix.MNT_DETACH) })
	if err := unix.Mount("", modules, "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil {
		t.Fatal(err)
	}

	args := []string{self}
	if fake, err := exec.LookPath("faketime"); err == nil { // for the programs that are called; our own asks the kernel itself
		args = []string{fake, "2031-05-06 07:08:09", self}
	}
	second := filepath.Join(top, "out of another user")
	if err := os.Mkdir(second, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Chown(second, nobody, nobody); err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), args[0], args[1:]...)
	cmd.Dir = filepath.Join(tree, "image", "bundle")
	cmd.Env = []string{
		"PATH=" + os.Getenv("PATH"), "HOME=" + filepath.Join(top, "home"), "GOCACHE=" + filepath.Join(top, "gocache"), "GOMODCACHE=" + modules,
		"GOPROXY=off", "GOFLAGS=-mod=mod -tags=other", "GOAMD64=v3", "TMPDIR=" + filepath.Join(top, "tmp"), "TZ=Asia/Kathmandu", "LC_ALL=C.UTF-8", "SOURCE_DATE_EPOCH=1234567890",
		helperOut + "=" + second, helperBoard + "=" + m.Board, helperKernel + "=" + filepath.Join(top, "bin", "bzImage"), helperUmask + "=077",
	}
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("building as nobody: %v\n%s", err, out)
	}
	for _, name := range append(order(m), SumsName) {
		a, b := read(t, first, name), read(t, second, name)
		if !bytes.Equal(a, b) {
			t.Errorf("%s differs%s", name, inside(a, b))
		}
	}
	for _, dir := range []string{"home", "tmp"} { // Go's telemetry and settings, at most
		left, _ := os.ReadDir(filepath.Join(top, dir))
		for _, e := range left {
			if e.Name() != ".config" {
				t.Errorf("the build left %s in %s", e.Name(), dir)
			}
		}
	}
}

func copyFile(t *testing.T, from, to string, perm os.FileMode) {
	t.Helper()
	if err := image.WriteFile(to, read(t, from), perm); err != nil {
		t.Fatal(err)
	}
}

// copySources copies the checkout with other times.
func copySources(t *testing.T, to string) {
	t.Helper()
	root, err := image.FindSource(".")
	if err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command("git", "-C", root, "ls-files", "-co", "--exclude-standard").Output()
	if err != nil {
		t.Skipf("listing the sources: %v (needs git and a checkout)", err)
	}
	when := time.Date(2011, 1, 2, 3, 4, 5, 0, time.UTC)
	for name := range strings.Lines(string(out)) {
		name = strings.TrimSpace(name)
		data, err := os.ReadFile(filepath.Join(root, name))
		if err != nil {
			continue // deleted, or a name in quotes
		}
		path := filepath.Join(to, name)
		if err := image.WriteFile(path, data, 0o644); err != nil {
			t.Fatal(err)
		}
		if err := os.Chtimes(path, when, when); err != nil {
			t.Fatal(err)
		}
	}
}
