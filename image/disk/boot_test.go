package disk_test

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"clonecluster/config"
	"clonecluster/image"
	"clonecluster/image/disk"
	"clonecluster/image/uki"
	"clonecluster/qemu"
	"clonecluster/qemu/lab"
	"clonecluster/qemu/qemutest"
)

// A boot takes up to half a minute; the rest is for a machine with other things
// to do.
const bootLimit = 4 * time.Minute

// stickOptions is what goes onto the stick of a node of the demo.
func stickOptions(t *testing.T, kernel string) disk.Options {
	t.Helper()
	stub, _, err := uki.Stub("amd64")
	if errors.Is(err, os.ErrNotExist) {
		t.Skip(err)
	} else if err != nil {
		t.Fatal(err)
	}
	boot, core, err := disk.GRUB(t.Context())
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, exec.ErrNotFound) {
		t.Skip(err)
	} else if err != nil {
		t.Fatal(err)
	}
	linux, err := os.ReadFile(kernel)
	if err != nil {
		t.Fatal(err)
	}
	base, err := image.BuildBase(t.Context(), image.BaseOptions{OutDir: t.TempDir(), Progress: t.Output()})
	if err != nil {
		t.Fatal(err)
	}
	packed, err := os.ReadFile(base.Path)
	if err != nil {
		t.Fatal(err)
	}
	member, err := image.ConfigCPIO(config.DemoYAML, "", time.Time{})
	if err != nil {
		t.Fatal(err)
	}
	initrd := image.Initrd(packed, member)
	// TCG's time stamp counter is none to rely on.
	cmdline := "console=ttyS0 quiet panic=10 tsc=unstable " + disk.StickParameter
	efi, err := uki.Build(uki.Options{Stub: stub, Linux: linux, Initrd: initrd, Cmdline: cmdline, OSRelease: "ID=clonecluster\n"})
	if err != nil {
		t.Fatal(err)
	}
	return disk.Options{
		UKI: efi, Arch: "amd64", Config: config.DemoYAML,
		BIOS: &disk.BIOS{Kernel: linux, Initrd: initrd, Cmdline: cmdline, BootImg: boot, CoreImg: core},
	}
}

// TestBoot boots sticks to an answer over HTTP, by firmware that is not ours,
// with a configuration that was edited and one that was broken on the way.
func TestBoot(t *testing.T) {
	qemutest.Emulator(t, qemu.Q35)
	o := stickOptions(t, qemutest.Kernel(t))
	edited := []byte(strings.Replace(string(config.DemoYAML), "name: demo", "name: edited", 1))
	broken := append(slices.Clone(config.DemoYAML), "sytem: {}\n"...)
	for _, tt := range []struct {
		name     string
		firmware qemu.Firmware
		config   []byte
		host     string // the cluster whose configuration it took
		lines    []string
	}{
		{"OVMF edited", qemu.UEFI, edited, "edited", []string{"the configuration is the stick's"}},
		{"SeaBIOS broken", qemu.BIOS, broken, "demo", []string{"the stick's configuration cannot be used", `unknown key "sytem"`}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			qemutest.Firmware(t, qemu.Q35, tt.firmware)
			o.Config = tt.config
			path := filepath.Join(t.TempDir(), "usb.img")
			if err := disk.Write(path, o); err != nil {
				t.Fatal(err)
			}
			cfg := lab.Demo(1)
			cfg.Cmdline = ""
			cfg.Nodes[0].Boot = &lab.Boot{Firmware: tt.firmware, Disks: []qemu.Disk{{Path: path, Bus: qemu.Virtio, Snapshot: true}}, MemoryMB: 384}
			l := qemutest.Lab(t, cfg)
			ctx, cancel := context.WithTimeout(t.Context(), bootLimit)
			defer cancel()
			for _, want := range tt.lines {
				if _, err := l.Node(0).VM().WaitLine(ctx, func(text string) bool { return strings.Contains(text, want) }); err != nil {
					t.Fatal(err)
				}
			}
			if _, err := l.Node(0).WaitStage(ctx, "ready"); err != nil {
				t.Fatal(err)
			}
			text, _ := qemutest.Get(ctx, t, l, "/whoami")
			var who struct{ Hostname string }
			if err := json.Unmarshal([]byte(text), &who); err != nil || !strings.HasPrefix(who.Hostname, tt.host+"-") {
				t.Errorf("/whoami = %s, %v; want one of %s", text, err, tt.host)
			}
			for _, s := range l.Node(0).Stages() {
				t.Logf("%8.3f s  %s", s.At.Seconds(), s.Name)
			}
		})
	}
}
