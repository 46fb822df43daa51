// Package qemutest gives tests of guests what they need: a kernel, and an initrd
// with a small PID 1. A test that lacks something is skipped and says what.
package qemutest

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
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

var guest struct {
	sync.Once
	cpio []byte
	err  error
}

// Initrd writes an initramfs with the test guest's init to a file of its own. See
// the guest command for what it does.
func Initrd(t testing.TB) string {
	t.Helper()
	guest.Do(func() { guest.cpio, guest.err = buildGuest() })
	if guest.err != nil {
		t.Fatalf("building the test guest: %v", guest.err)
	}
	file := filepath.Join(t.TempDir(), "guest.cpio")
	if err := os.WriteFile(file, guest.cpio, 0o644); err != nil {
		t.Fatal(err)
	}
	return file
}

func buildGuest() ([]byte, error) {
	dir, err := os.MkdirTemp("", "clonecluster-guest-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	init := filepath.Join(dir, "init")
	cmd := exec.Command("go", "build", "-trimpath", "-buildvcs=false", "-ldflags=-s -w", "-o", init, "clonecluster/qemu/qemutest/guest")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH=amd64")
	if out, err := cmd.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("%w: %s", err, out)
	}
	b, err := os.ReadFile(init)
	if err != nil {
		return nil, err
	}
	var out bytes.Buffer
	w := cpio.Newc.Writer(&out)
	records := []cpio.Record{
		cpio.Directory("dev", 0o755),
		cpio.CharDev("dev/console", 0o600, 5, 1),
		cpio.StaticFile("init", string(b), 0o755),
	}
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
