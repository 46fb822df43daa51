// Package qemutest gives tests of guests what they need: a kernel, and an initrd
// with a small PID 1. A test that lacks something is skipped and says what.
package qemutest

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/u-root/u-root/pkg/cpio"

	"clonecluster/qemu"
)

// Kernel returns the path of a bzImage for QEMU guests: the file that
// CLONECLUSTER_TEST_KERNEL names, else the newest for QEMU in the cache folder
// (CLONECLUSTER_CACHE, else clonecluster in the user's cache folder).
func Kernel(t testing.TB) string {
	t.Helper()
	return findKernel(t, "CLONECLUSTER_TEST_KERNEL", "qemu-*", "make kernel")
}

// KernelARM64 returns the path of the generic-arm64 board's kernel: the file that
// CLONECLUSTER_TEST_KERNEL_ARM64 names, else the newest in the cache folder. It
// takes half an hour to build, so tests boot it only where somebody has built it.
func KernelARM64(t testing.TB) string {
	t.Helper()
	return findKernel(t, "CLONECLUSTER_TEST_KERNEL_ARM64", "generic-arm64-*", "make kernel BOARD=generic-arm64")
}

// KernelPC returns the path of the pc-x86_64 board's kernel, which has USB, ATA and
// screens: the file that CLONECLUSTER_TEST_KERNEL_PC names, else the newest in the
// cache folder.
func KernelPC(t testing.TB) string {
	t.Helper()
	return findKernel(t, "CLONECLUSTER_TEST_KERNEL_PC", "pc-x86_64-*", "make kernel BOARD=pc-x86_64")
}

func findKernel(t testing.TB, variable, boards, build string) string {
	t.Helper()
	if k := os.Getenv(variable); k != "" {
		if _, err := os.Stat(k); err != nil {
			t.Fatalf("%s: %v", variable, err)
		}
		return k
	}
	var newest string
	var found time.Time
	names, _ := filepath.Glob(filepath.Join(CacheDir(), "kernel", boards, "bzImage"))
	for _, n := range names {
		if fi, err := os.Stat(n); err == nil && fi.ModTime().After(found) {
			newest, found = n, fi.ModTime()
		}
	}
	if newest == "" {
		t.Skipf("no kernel for guests: run %s, or set %s to one", build, variable)
	}
	return newest
}

// Emulator skips the test if QEMU lacks the machine type, whose accelerator is TCG,
// or if tests are to be short.
func Emulator(t testing.TB, m qemu.Machine) {
	t.Helper()
	program, pkg := m.Emulator()
	if _, err := exec.LookPath(program); err != nil {
		t.Skipf("%s is not installed (apt-get install %s)", program, pkg)
	}
	if testing.Short() {
		t.Skip("boots a guest: not with -short")
	}
}

// Firmware skips the test if a firmware is not installed, with its package's name.
func Firmware(t testing.TB, m qemu.Machine, f qemu.Firmware) {
	t.Helper()
	if err := qemu.FirmwareInstalled(m, f); err != nil {
		t.Skip(err)
	}
}

// CacheDir is where builds are cached.
func CacheDir() string {
	if d := os.Getenv("CLONECLUSTER_CACHE"); d != "" {
		return d
	}
	d, err := os.UserCacheDir()
	if err != nil {
		return filepath.Join(os.TempDir(), "clonecluster")
	}
	return filepath.Join(d, "clonecluster")
}

// Accel chooses an accelerator, or skips the test if there is no QEMU.
func Accel(t testing.TB) qemu.Accel {
	t.Helper()
	if _, err := exec.LookPath("qemu-system-x86_64"); err != nil {
		t.Skip("QEMU is not installed (apt-get install qemu-system-x86)")
	}
	if testing.Short() {
		t.Skip("boots a guest: not with -short")
	}
	c, err := qemu.ChooseAccel(t.Context(), qemu.AccelOptions{CacheDir: CacheDir()})
	if err != nil {
		t.Fatal(err)
	}
	return c.Accel
}

var guests = map[string]func() ([]byte, error){
	"amd64": sync.OnceValues(func() ([]byte, error) { return buildGuest("amd64") }),
	"arm64": sync.OnceValues(func() ([]byte, error) { return buildGuest("arm64") }),
}

// Initrd writes an initramfs with the test guest's init to a file of its own. See
// the guest command for what it does.
func Initrd(t testing.TB) string {
	t.Helper()
	return InitrdFor(t, qemu.Q35)
}

// InitrdFor is Initrd for a machine type.
func InitrdFor(t testing.TB, m qemu.Machine) string {
	t.Helper()
	archive, err := guests[m.Arch()]()
	if err != nil {
		t.Fatalf("building the test guest: %v", err)
	}
	file := filepath.Join(t.TempDir(), "guest.cpio")
	if err := os.WriteFile(file, archive, 0o644); err != nil {
		t.Fatal(err)
	}
	return file
}

func buildGuest(arch string) ([]byte, error) {
	dir, err := os.MkdirTemp("", "clonecluster-guest-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	init := filepath.Join(dir, "init")
	if err := buildProgram("clonecluster/qemu/qemutest/guest", arch, init); err != nil {
		return nil, err
	}
	b, err := os.ReadFile(init)
	if err != nil {
		return nil, err
	}
	records := []cpio.Record{
		cpio.Directory("dev", 0o755),
		cpio.CharDev("dev/console", 0o600, 5, 1),
		cpio.StaticFile("init", string(b), 0o755),
	}
	return pack(records)
}

func pack(records []cpio.Record) ([]byte, error) {
	var out bytes.Buffer
	w := cpio.Newc.Writer(&out)
	for _, r := range records {
		if err := w.WriteRecord(cpio.MakeReproducible(r)); err != nil {
			return nil, err
		}
	}
	if err := cpio.WriteTrailer(w); err != nil {
		return nil, err
	}
	return out.Bytes(), nil
}

func buildProgram(pkg, arch, file string) error {
	cmd := exec.Command("go", "build", "-trimpath", "-buildvcs=false", "-ldflags=-s -w", "-o", file, pkg)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH="+arch)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%w: %s", err, out)
	}
	return nil
}

// Modules writes an initramfs that loads kernel modules, from files as Debian's
// packages have them, and goes on with /init of another. The kernel must be given
// rdinit=/preinit.
func Modules(t testing.TB, arch string, files ...string) string {
	t.Helper()
	dir := t.TempDir()
	if err := buildProgram("clonecluster/qemu/qemutest/modules", arch, filepath.Join(dir, "preinit")); err != nil {
		t.Fatal(err)
	}
	records := []cpio.Record{cpio.Directory("modules", 0o755)}
	add := func(name, file string, mode uint64) {
		b, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		records = append(records, cpio.StaticFile(name, string(b), mode))
	}
	add("preinit", filepath.Join(dir, "preinit"), 0o755)
	for _, file := range files {
		name := filepath.Base(file)
		if plain, ok := strings.CutSuffix(name, ".xz"); ok {
			out, err := exec.Command("xz", "-dc", file).Output()
			if err != nil {
				t.Fatalf("unpacking %s: %v (apt-get install xz-utils)", file, err)
			}
			name, file = plain, filepath.Join(dir, plain)
			if err := os.WriteFile(file, out, 0o644); err != nil {
				t.Fatal(err)
			}
		}
		add("modules/"+name, file, 0o644)
	}
	archive, err := pack(records)
	if err != nil {
		t.Fatal(err)
	}
	out := filepath.Join(dir, "modules.cpio")
	if err := os.WriteFile(out, archive, 0o644); err != nil {
		t.Fatal(err)
	}
	return out
}
