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

	"clonecluster/image"
	"clonecluster/image/disk"
	"clonecluster/image/keys"
	"clonecluster/image/pxe"
	"clonecluster/image/uki"
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

// answers has it boot until it answers at the VIP, as a node of that cluster. Its
// image comes by TFTP from the folder pxe, if that is not empty.
func answers(t *testing.T, boot lab.Boot, cluster, folder string) {
	t.Helper()
	ctx, l := starts(t, boot)
	if folder != "" {
		qemutest.ServePXE(t, l, pxe.Image{Arch: boot.Machine.Arch(), Folder: folder})
	}
	begin := time.Now()
	text, _ := qemutest.Await(ctx, t, l, "/whoami") // a PC's console is its screen, so nobody hears that it is ready
	var who struct{ Node, Hostname string }
	if err := json.Unmarshal([]byte(text), &who); err != nil || who.Node != l.Node(0).MAC().String() || !strings.HasPrefix(who.Hostname, cluster+"-") {
		t.Errorf("/whoami = %s, %v; want %v of %s", text, err, l.Node(0).MAC(), cluster)
	}
	t.Logf("answers after %.1f s", time.Since(begin).Seconds())
}

// stick is a disk in a USB port, or on virtio for a kernel without USB.
func stick(path string, bus qemu.Bus) []qemu.Disk {
	return []qemu.Disk{{Path: path, Bus: bus, Snapshot: true}}
}

// What a build has written boots, as it is: the sticks of all boards by the firmware
// that they are for, and the folder for network boot. Of a stick in a USB port the
// configuration has been edited.
func TestBuiltBoots(t *testing.T) {
	qemutest.Emulator(t, qemu.Q35)
	t.Run("qemu-x86_64", func(t *testing.T) {
		dir, _ := buildOnce(t)
		usb := filepath.Join(dir, StickName)
		t.Run("stick by SeaBIOS", func(t *testing.T) {
			answers(t, lab.Boot{Firmware: qemu.BIOS, Disks: stick(usb, qemu.Virtio)}, "demo", "")
		})
		t.Run("stick by OVMF", func(t *testing.T) {
			qemutest.Firmware(t, qemu.Q35, qemu.UEFI)
			answers(t, lab.Boot{Firmware: qemu.UEFI, Disks: stick(usb, qemu.Virtio)}, "demo", "")
		})
		t.Run("pxe by OVMF", func(t *testing.T) {
			qemutest.Firmware(t, qemu.Q35, qemu.UEFI)
			answers(t, lab.Boot{Firmware: qemu.UEFI, NetBoot: qemu.PXE}, "demo", filepath.Join(dir, PXEDir))
		})
	})
	t.Run("pc-x86_64", func(t *testing.T) {
		dir, _ := buildFor(t, "pc-x86_64", qemutest.KernelPC(t))
		usb := edited(t, dir)
		t.Run("stick by SeaBIOS", func(t *testing.T) {
			answers(t, lab.Boot{Firmware: qemu.BIOS, Disks: stick(usb, qemu.USB)}, "shop", "")
		})
		t.Run("stick by OVMF", func(t *testing.T) {
			qemutest.Firmware(t, qemu.Q35, qemu.UEFI)
			answers(t, lab.Boot{Firmware: qemu.UEFI, Disks: stick(usb, qemu.USB)}, "shop", "")
		})
	})
	t.Run("generic-arm64", func(t *testing.T) {
		kernel := qemutest.KernelARM64(t)
		qemutest.Emulator(t, qemu.Virt)
		qemutest.Firmware(t, qemu.Virt, qemu.UEFI)
		dir, _ := buildFor(t, "generic-arm64", kernel)
		usb := edited(t, dir)
		answers(t, lab.Boot{Machine: qemu.Virt, Firmware: qemu.UEFI, Disks: stick(usb, qemu.USB)}, "shop", "")
	})
}

// buildFor builds for a board around its kernel.
func buildFor(t *testing.T, board, kernel string) (dir string, m *image.Manifest) {
	t.Helper()
	o := plainOptions(board, kernel, filepath.Join(t.TempDir(), "out"))
	o.Kernel.CacheDir = qemutest.CacheDir()
	if _, _, err := uki.Stub(o.Board.Arch, filepath.Join(o.Kernel.CacheDir, "stub")); err != nil {
		t.Skip(err)
	}
	m, err := Build(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	return o.OutDir, m
}

// edited gives the stick of a folder with another name of the cluster in its
// cluster.yaml.
func edited(t *testing.T, dir string) (path string) {
	t.Helper()
	whole := read(t, dir, StickName)
	at := bytes.Index(whole, []byte("name: demo")) // on the first partition: the images are behind it
	if at < 0 {
		t.Fatal("the stick has no cluster.yaml in one piece")
	}
	copy(whole[at:], "name: shop")
	path = filepath.Join(dir, "edited.img")
	if err := os.WriteFile(path, whole, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
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
		answers(t, lab.Boot{Firmware: qemu.SecureUEFI, Vars: vars, Disks: stick(signed, qemu.Virtio)}, "demo", "")
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
