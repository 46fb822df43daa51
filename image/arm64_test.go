package image_test

import (
	"context"
	"encoding/json"
	"strings"
	"testing"

	"clonecluster/boards"
	"clonecluster/qemu"
	"clonecluster/qemu/lab"
	"clonecluster/qemu/qemutest"
)

// The arm64 image answers at the VIP, by the datapath of the patched kernel: its
// BPF programs are the same little-endian objects. The kernel is put into memory
// by QEMU, and by Debian's UEFI.
func TestBootARM64(t *testing.T) {
	board, err := boards.Get("generic-arm64")
	if err != nil {
		t.Fatal(err)
	}
	kernel := qemutest.KernelARM64(t)
	qemutest.Emulator(t, qemu.Virt)
	initrd := members(t, "arm64", false)
	for _, boot := range []lab.Boot{{}, {Firmware: qemu.UEFI}} {
		name := "kernel"
		if boot.Firmware != "" {
			name = string(boot.Firmware)
		}
		t.Run(name, func(t *testing.T) {
			qemutest.Firmware(t, qemu.Virt, boot.Firmware)
			boot.Machine, boot.Kernel, boot.Initrd, boot.MemoryMB = qemu.Virt, kernel, initrd, board.QEMU.MemoryMiB
			cfg := lab.Demo(1)
			cfg.Accel, cfg.Cmdline = qemu.TCG, "console="+board.Serial()+" quiet panic=10"
			cfg.Nodes[0].Boot = &boot
			l := qemutest.Lab(t, cfg)
			answersARM64(t, l, "native")
			ctx, cancel := context.WithTimeout(t.Context(), bootLimit)
			defer cancel()
			if err := l.Shutdown(ctx); err != nil { // by GPIO, and by ACPI
				t.Error(err)
			}
		})
	}
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
	text, _ := fetch(ctx, t, l, "/whoami")
	var who struct{ Node string }
	if err := json.Unmarshal([]byte(text), &who); err != nil || who.Node != l.Node(0).MAC().String() {
		t.Errorf("/whoami = %s, %v", text, err)
	}
	if _, err := l.Node(0).VM().WaitLine(ctx, func(s string) bool { return strings.Contains(s, "datapath="+datapath) }); err != nil {
		t.Error(err)
	}
}
