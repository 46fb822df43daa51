package image_test

import (
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"clonecluster/boards"
	"clonecluster/config"
	"clonecluster/image"
	"clonecluster/image/disk"
	"clonecluster/image/uki"
	"clonecluster/qemu"
	"clonecluster/qemu/lab"
	"clonecluster/qemu/qemutest"
)

// The arm64 image answers at the VIP, by the datapath of the patched kernel: its
// BPF programs are the same little-endian objects. QEMU puts kernel and initramfs
// into memory, or Debian's UEFI runs the unified image from a USB stick.
func TestBootARM64(t *testing.T) {
	board, err := boards.Get("generic-arm64")
	if err != nil {
		t.Fatal(err)
	}
	kernel := qemutest.KernelARM64(t)
	qemutest.Emulator(t, qemu.Virt)
	waysARM64(t, board, kernel, members(t, "arm64", false), "", "native", true)
}

// waysARM64 boots a node in both ways and expects its answer and its datapath. The
// power button must work: ACPI's with UEFI, and without firmware the GPIO key, if
// the kernel has a driver for that.
func waysARM64(t *testing.T, board boards.Board, kernel string, initrd []string, more, datapath string, gpio bool) {
	t.Helper()
	cmdline := "console=" + board.Serial() + " quiet panic=10" + more
	boots := func(t *testing.T, boot lab.Boot, cmdline string, button bool) {
		boot.Machine, boot.MemoryMB = qemu.Virt, 2*board.QEMU.MemoryMiB
		cfg := lab.Demo(1)
		cfg.Accel, cfg.Cmdline = qemu.TCG, cmdline
		cfg.Nodes[0].Boot = &boot
		l := qemutest.Lab(t, cfg)
		answersARM64(t, l, datapath)
		ctx, cancel := context.WithTimeout(t.Context(), bootLimit)
		defer cancel()
		if button {
			if err := l.Shutdown(ctx); err != nil {
				t.Error(err)
			}
		}
	}
	t.Run("kernel", func(t *testing.T) {
		boots(t, lab.Boot{Kernel: kernel, Initrd: initrd}, cmdline, gpio)
	})
	t.Run("uefi", func(t *testing.T) {
		qemutest.Firmware(t, qemu.Virt, qemu.UEFI)
		dir := t.TempDir()
		efi, _, _ := unified(t, board.Arch, filepath.Join(dir, "clonecluster.efi"), kernel, initrd, cmdline)
		stick := filepath.Join(dir, "usb.img")
		if err := disk.Write(stick, disk.Options{UKI: efi, Arch: board.Arch, Config: config.DemoYAML}); err != nil {
			t.Fatal(err)
		}
		boots(t, lab.Boot{Firmware: qemu.UEFI, Disks: []qemu.Disk{{Path: stick, Bus: qemu.USB, Snapshot: true}}}, "", true)
	})
}

// The same image on the kernel of a distribution, as Debian's package has it
// (CLONECLUSTER_TEST_STOCK_ARM64 is the folder where linux-image-cloud-arm64 has
// been unpacked): without the wire address, so by the datapath bpf.
func TestBootARM64Stock(t *testing.T) {
	kernel, modules := stock(t, "CLONECLUSTER_TEST_STOCK_ARM64", "arm64")
	board, err := boards.Get("generic-arm64")
	if err != nil {
		t.Fatal(err)
	}
	qemutest.Emulator(t, qemu.Virt)
	waysARM64(t, board, kernel, append(members(t, "arm64", false), modules), " rdinit=/preinit", "bpf", false)
}

// Sticks have the unified image where the board says that its UEFI looks.
func TestEFINames(t *testing.T) {
	all, err := boards.All()
	if err != nil {
		t.Fatal(err)
	}
	for _, b := range all {
		if got := disk.BootFile(b.Arch); b.Boot.Has(boards.UEFI) && got != "EFI/BOOT/"+b.Boot.EFIName {
			t.Errorf("%s: a stick has %s; the board says %s", b.Name, got, b.Boot.EFIName)
		}
	}
}

// unified makes a unified kernel image.
func unified(t *testing.T, arch, file, kernel string, initrd []string, cmdline string) (efi, linux, joined []byte) {
	t.Helper()
	stub, _, err := uki.Stub(arch, filepath.Join(qemutest.CacheDir(), "stub"))
	if err != nil {
		t.Skip(err)
	}
	read := func(name string) []byte {
		b, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	linux = read(kernel)
	for _, part := range initrd {
		joined = append(joined, read(part)...)
		joined = append(joined, make([]byte, -len(joined)&3)...)
	}
	if efi, err = uki.Build(uki.Options{Stub: stub, Linux: linux, Initrd: joined, Cmdline: cmdline}); err != nil {
		t.Fatal(err)
	}
	if err := image.WriteFile(file, efi, 0o600); err != nil {
		t.Fatal(err)
	}
	return efi, linux, joined
}

// answersARM64 waits until the only node is up, asks at the VIP who answers, and
// looks for the datapath on its console.
func answersARM64(t *testing.T, l *lab.Lab, datapath string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), bootLimit)
	defer cancel()
	if err := l.WaitAll(ctx, "ready"); err != nil {
		t.Fatal(err)
	}
	for _, s := range l.Node(0).Stages() {
		t.Logf("%8.3f s  %s", s.At.Seconds(), s.Name)
	}
	text, _ := qemutest.Get(ctx, t, l, "/whoami")
	var who struct{ Node string }
	if err := json.Unmarshal([]byte(text), &who); err != nil || who.Node != l.Node(0).MAC().String() {
		t.Errorf("/whoami = %s, %v", text, err)
	}
	if _, err := l.Node(0).VM().WaitLine(ctx, func(s string) bool { return strings.Contains(s, "datapath="+datapath) }); err != nil {
		t.Error(err)
	}
}
