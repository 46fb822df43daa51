package image_test

import (
	"bytes"
	"context"
	"encoding/json"
	"path/filepath"
	"testing"
	"time"

	"clonecluster/config"
	"clonecluster/image"
	"clonecluster/image/disk"
	"clonecluster/image/pxe"
	"clonecluster/qemu"
	"clonecluster/qemu/lab"
	"clonecluster/qemu/qemutest"
)

// Three nodes that boot in three ways (a kernel given directly, a USB stick by UEFI,
// the network by UEFI) are one server: all three answer at the VIP, and when the
// one from the stick loses its power the other two go on.
func TestThreeWaysOneCluster(t *testing.T) {
	kernel, initrd := cluster(t, false)
	qemutest.Firmware(t, qemu.Q35, qemu.UEFI)
	dir := t.TempDir()
	cfg := lab.Demo(3)
	cmdline := cfg.Cmdline
	if qemutest.Accel(t) == qemu.TCG {
		cmdline += " tsc=unstable"
	}
	efi, linux, joined := unified(t, "amd64", filepath.Join(dir, "clonecluster.efi"), kernel, initrd, cmdline)
	for name, data := range map[string][]byte{"bzImage": linux, "initrd.img": joined} {
		if err := image.WriteFile(filepath.Join(dir, name), data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	stick := filepath.Join(dir, "usb.img")
	if err := disk.Write(stick, disk.Options{UKI: efi, Arch: "amd64", Config: bytes.TrimSpace(config.DemoYAML)}); err != nil {
		t.Fatal(err)
	}

	cfg.Kernel, cfg.Initrd, cfg.ManualStart = kernel, initrd, true
	cfg.Nodes[1].Boot = &lab.Boot{Firmware: qemu.UEFI, Disks: []qemu.Disk{{Path: stick, Bus: qemu.USB, Snapshot: true}}, MemoryMB: 512}
	cfg.Nodes[2].Boot = &lab.Boot{Firmware: qemu.UEFI, NetBoot: qemu.PXE, MemoryMB: 512}
	l := qemutest.Lab(t, cfg)
	qemutest.ServePXE(t, l, pxe.Image{Arch: "amd64", Folder: dir, Cmdline: cmdline})
	ctx, cancel := context.WithTimeout(t.Context(), 2*bootLimit)
	defer cancel()
	for _, n := range l.Nodes() {
		if err := n.Start(); err != nil {
			t.Fatal(err)
		}
	}
	if err := l.WaitAll(ctx, "ready"); err != nil {
		t.Fatal(err)
	}
	answering(ctx, t, l, l.Nodes())

	l.Node(1).Kill()
	time.Sleep(5 * time.Second) // the others need a fraction of that to notice
	answering(ctx, t, l, []*lab.Machine{l.Node(0), l.Node(2)})
}

// answering asks at the VIP, a connection each, until every one of the nodes has
// answered, and fails at a request that is not answered or by another node.
func answering(ctx context.Context, t *testing.T, l *lab.Lab, nodes []*lab.Machine) {
	t.Helper()
	want, seen := map[string]string{}, map[string]int{}
	for _, n := range nodes {
		want[n.MAC().String()] = n.Name()
	}
	for i := 0; i < 30 || len(seen) < len(want); i++ {
		if i == 300 {
			t.Fatalf("of 300 answers: %v; want some of each of %v", seen, want)
		}
		text, _ := qemutest.Get(ctx, t, l, "/whoami")
		var who struct{ Node string }
		if err := json.Unmarshal([]byte(text), &who); err != nil || want[who.Node] == "" {
			t.Fatalf("/whoami = %s, %v; want one of %v", text, err, want)
		}
		seen[want[who.Node]]++
	}
	t.Logf("answers: %v", seen)
}
