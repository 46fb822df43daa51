package bundle

import (
	"bytes"
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"clonecluster/image/disk"
	"clonecluster/image/keys"
	"clonecluster/qemu"
	"clonecluster/qemu/lab"
	"clonecluster/qemu/qemutest"
)

// A boot takes half a minute at most, with SMM; the rest is for a machine with
// other things to do.
const bootLimit = 5 * time.Minute

// starts starts a machine of the demo's network that boots in this way.
func starts(t *testing.T, boot lab.Boot) (context.Context, *lab.Lab) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), bootLimit)
	t.Cleanup(cancel)
	cfg := lab.Demo(1)
	boot.MemoryMB = 512
	cfg.Cmdline, cfg.Nodes[0].Boot = "", &boot
	return ctx, qemutest.Lab(t, cfg)
}

// answers has it boot until it answers at the VIP.
func answers(t *testing.T, boot lab.Boot) {
	t.Helper()
	ctx, l := starts(t, boot)
	if err := l.WaitAll(ctx, "ready"); err != nil {
		t.Fatal(err)
	}
	text, _ := qemutest.Get(ctx, t, l, "/whoami")
	var who struct{ Node string }
	if err := json.Unmarshal([]byte(text), &who); err != nil || who.Node != l.Node(0).MAC().String() {
		t.Errorf("/whoami = %s, %v", text, err)
	}
	for _, s := range l.Node(0).Stages() {
		t.Logf("%8.3f s  %s", s.At.Seconds(), s.Name)
	}
}

// stick is a disk in a USB port, or on virtio for a kernel without USB.
func stick(path string, bus qemu.Bus) []qemu.Disk {
	return []qemu.Disk{{Path: path, Bus: bus, Snapshot: true}}
}

// Secure Boot, in a machine whose firmware (OVMF with SMM) has been given the keys
// of "clonectl key secure-boot" as their owner would give them: by systemd-boot,
// from the signed updates. The signed stick boots; with one byte changed, or
// without a signature, firmware refuses it.
func TestSecureBootEnforced(t *testing.T) {
	qemutest.Emulator(t, qemu.Q35)
	qemutest.Firmware(t, qemu.Q35, qemu.SecureUEFI)
	dir, _ := buildOnce(t)
	unsigned := filepath.Join(t.TempDir(), StickName)
	if err := os.Link(filepath.Join(dir, StickName), unsigned); err != nil {
		t.Fatal(err)
	}
	sb := t.TempDir()
	if _, err := keys.NewSecureBoot(sb, "test"); err != nil {
		t.Fatal(err)
	}
	vars := enrolled(t, sb)
	o := options(t, dir)
	o.SecureBoot = secureBoot(t, sb)
	if _, err := Build(t.Context(), o); err != nil {
		t.Fatal(err)
	}
	signed := filepath.Join(dir, StickName)
	t.Run("signed", func(t *testing.T) {
		answers(t, lab.Boot{Firmware: qemu.SecureUEFI, Vars: vars, Disks: stick(signed, qemu.Virtio)})
	})

	// One bit, in the middle of the file system: in the initramfs.
	flipped := filepath.Join(t.TempDir(), StickName)
	data := bytes.Clone(read(t, signed))
	efi := read(t, dir, EFIName)
	at := bytes.Index(data, efi[len(efi)/2:len(efi)/2+64])
	if at < 0 {
		t.Fatal("the stick has no unified image in one piece")
	}
	data[at] ^= 1
	if err := os.WriteFile(flipped, data, 0o600); err != nil {
		t.Fatal(err)
	}
	for name, path := range map[string]string{"flipped": flipped, "unsigned": unsigned} {
		t.Run(name, func(t *testing.T) {
			ctx, l := starts(t, lab.Boot{Firmware: qemu.SecureUEFI, Vars: vars, Disks: stick(path, qemu.Virtio)})
			line, err := l.Node(0).VM().WaitLine(ctx, func(text string) bool {
				return strings.Contains(text, "failed to load Boot") || strings.Contains(text, "init:")
			})
			if err != nil || !strings.Contains(line.Text, "Access Denied") {
				t.Errorf("the machine says %q, %v; want a refusal", line.Text, err)
			}
			t.Log(line.Text)
		})
	}
}

// enrolled has a new machine enrol the keys of a folder, and gives its variables.
func enrolled(t *testing.T, sb string) (vars string) {
	t.Helper()
	const loader = "/usr/lib/systemd/boot/efi/systemd-bootx64.efi"
	boot, err := os.ReadFile(loader)
	if err != nil {
		t.Skipf("%v (apt-get install systemd-boot-efi)", err)
	}
	files := map[string][]byte{"loader/loader.conf": []byte("timeout 0\nsecure-boot-enroll force\n")}
	for _, name := range []string{"db.auth", "KEK.auth", "PK.auth"} {
		files["loader/keys/auto/"+name] = read(t, sb, name)
	}
	dir := t.TempDir()
	disks := stick(filepath.Join(dir, "keys.img"), qemu.Virtio)
	if err := disk.Write(disks[0].Path, disk.Options{UKI: boot, Arch: "amd64", Config: []byte("#\n"), Files: files}); err != nil {
		t.Fatal(err)
	}
	cfg := qemu.Config{
		Name: "enrol", Machine: qemu.Q35, Accel: qemutest.Accel(t), Firmware: qemu.SecureUEFI,
		Disks: disks, MemoryMB: 512, Dir: dir, NoReboot: true,
	}
	ctx, cancel := context.WithTimeout(t.Context(), bootLimit)
	defer cancel()
	vm, err := qemu.Start(ctx, cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer vm.Close()
	if err := vm.Wait(ctx); err != nil { // it resets when it is done
		t.Fatalf("enrolling the keys: %v\n%s", err, vm.Report())
	}
	return cfg.VarsFile()
}
