package flash

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"clonecluster/image/disk"
)

func testImage(t *testing.T) Image {
	t.Helper()
	path := filepath.Join(t.TempDir(), "usb.img")
	if err := disk.Write(path, disk.Options{UKI: bytes.Repeat([]byte("kernel "), 1<<18), Arch: "amd64", Config: []byte("hello")}); err != nil {
		t.Fatal(err)
	}
	img, err := CheckImage(path)
	if err != nil {
		t.Fatal(err)
	}
	return img
}

// file is a target of that size, full of old data.
func file(t *testing.T, dir string, size int64) string {
	t.Helper()
	path := filepath.Join(dir, "target")
	if err := os.WriteFile(path, bytes.Repeat([]byte{0xaa}, int(size)), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func same(t *testing.T, img Image, path string) {
	t.Helper()
	want, err := os.ReadFile(img.Path)
	if err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got[:len(want)], want) {
		t.Error("the image is not what is there")
	}
	if rest := got[len(want):]; len(rest) >= head && slices.Max(rest[len(rest)-head:]) != 0 {
		t.Error("an old partition table could be left at the end")
	}
}

func TestWriteFile(t *testing.T) {
	img := testImage(t)
	for name, more := range map[string]int64{"as large": 0, "a little larger": 512, "larger": 3 * mebibyte} {
		t.Run(name, func(t *testing.T) {
			path := file(t, t.TempDir(), img.Size+more)
			seen := map[string]int64{}
			state, err := Write(t.Context(), img, path, func(what string, done int64) {
				if done <= seen[what] || what == "writing" && seen["comparing"] > 0 {
					t.Errorf("%s goes from %d to %d", what, seen[what], done)
				}
				seen[what] = done
			})
			if state != Verified || err != nil {
				t.Fatalf("Write = %v, %v", state, err)
			}
			if seen["writing"] != img.Size || seen["comparing"] != img.Size {
				t.Errorf("progress ended at %v; want %d", seen, img.Size)
			}
			same(t, img, path)
		})
	}
}

func TestWriteErrors(t *testing.T) {
	img := testImage(t)
	if state, err := Write(t.Context(), img, file(t, t.TempDir(), img.Size-1), nil); state != Untouched || err == nil || !strings.Contains(err.Error(), "too small") {
		t.Errorf("too small: %v, %v", state, err)
	}
	if state, err := Write(t.Context(), img, "/dev/full", nil); err == nil {
		t.Errorf("a device that is no disk: %v, %v", state, err)
	}
	if state, err := Write(t.Context(), img, filepath.Join(t.TempDir(), "none"), nil); state != Untouched || !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no device: %v, %v", state, err)
	}
	itself := filepath.Join(t.TempDir(), "link")
	if err := os.Link(img.Path, itself); err != nil {
		t.Fatal(err)
	}
	before, _ := os.ReadFile(img.Path)
	if state, err := Write(t.Context(), img, itself, nil); state != Untouched || err == nil || !strings.Contains(err.Error(), "the image itself") {
		t.Errorf("the image itself: %v, %v", state, err)
	}
	if after, _ := os.ReadFile(img.Path); !slices.Equal(before, after) {
		t.Error("writing the image over itself changed it")
	}
	ctx, cancel := context.WithCancel(t.Context())
	path := file(t, t.TempDir(), img.Size)
	state, err := Write(ctx, img, path, func(_ string, done int64) {
		if done > 10*mebibyte {
			cancel()
		}
	})
	if state != Erased || !errors.Is(err, context.Canceled) {
		t.Errorf("interrupted: %v, %v; want Erased", state, err)
	}
	if b, _ := os.ReadFile(path); slices.Max(b[:head]) != 0 {
		t.Error("interrupted: the device looks as if it was whole")
	}
	ctx, cancel = context.WithCancel(t.Context())
	state, err = Write(ctx, img, path, func(what string, done int64) {
		if what == "comparing" {
			cancel()
		}
	})
	if state != Written || !errors.Is(err, context.Canceled) {
		t.Errorf("interrupted at the end: %v, %v; want Written", state, err)
	}
}

// TestChangedMeanwhile: the image is not the one that was looked at.
func TestChangedMeanwhile(t *testing.T) {
	img := testImage(t)
	data, err := os.ReadFile(img.Path)
	if err != nil {
		t.Fatal(err)
	}
	img.SHA256 = fmt.Sprintf("%x", sha256.Sum256(data))
	path := file(t, t.TempDir(), img.Size)
	if state, err := Write(t.Context(), img, path, nil); state != Verified || err != nil {
		t.Fatalf("Write = %v, %v", state, err)
	}
	data[9_000_000] ^= 1
	if err := os.WriteFile(img.Path, data, 0o600); err != nil {
		t.Fatal(err)
	}
	if state, err := Write(t.Context(), img, path, nil); state != Written || err == nil || !strings.Contains(err.Error(), "was changed meanwhile") {
		t.Errorf("Write = %v, %v", state, err)
	}
}

// TestReadOnlyMount: no switch is to be looked for.
func TestReadOnlyMount(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("mounting needs root")
	}
	img := testImage(t)
	dir := t.TempDir()
	path := file(t, dir, img.Size)
	if err := unix.Mount(dir, dir, "", unix.MS_BIND, ""); err != nil {
		t.Skip("mounting: ", err)
	}
	defer unix.Unmount(dir, 0)
	if err := unix.Mount("", dir, "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_RDONLY, ""); err != nil {
		t.Skip("mounting: ", err)
	}
	if state, err := Write(t.Context(), img, path, nil); state != Untouched || err == nil || !strings.Contains(err.Error(), "is mounted read-only") || strings.Contains(err.Error(), "switch") {
		t.Errorf("Write = %v, %v", state, err)
	}
}

// TestBrokenDevice: what comes back is not what was written.
func TestBrokenDevice(t *testing.T) {
	img := testImage(t)
	path := file(t, t.TempDir(), img.Size)
	state, err := Write(t.Context(), img, path, func(what string, done int64) {
		if what == "comparing" && done == chunk {
			f, _ := os.OpenFile(path, os.O_WRONLY, 0)
			f.WriteAt([]byte{1, 2, 3}, 9_000_000)
			f.Sync()
			f.Close()
		}
	})
	if state != Written || err == nil || !strings.Contains(err.Error(), "byte 9000000 is not what was written") {
		t.Errorf("Write = %v, %v", state, err)
	}
}

func TestCheckImage(t *testing.T) {
	img := testImage(t)
	data, err := os.ReadFile(img.Path)
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name string
		data []byte
		want string
	}{
		{"truncated", data[:len(data)/2], "not all there"},
		{"a sector short", data[:len(data)-512], "not all there"},
		{"something else", []byte("hello"), "no disk image"},
		{"empty", nil, "no disk image"},
		{"longer", append(slices.Clone(data), make([]byte, mebibyte)...), fmt.Sprintf("cut it with truncate -s %d ", len(data))},
	} {
		path := filepath.Join(t.TempDir(), "usb.img")
		if err := os.WriteFile(path, tt.data, 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := CheckImage(path); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v; want an error with %q", tt.name, err, tt.want)
		}
	}
}

// loop gives a loop device over a file.
func loop(t *testing.T, path string, args ...string) string {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("loop devices need root")
	}
	out, err := exec.Command("losetup", append(args, "--find", "--show", path)...).Output()
	if err != nil {
		t.Skipf("losetup: %v", err)
	}
	dev := strings.TrimSpace(string(out))
	t.Cleanup(func() { exec.Command("losetup", "-d", dev).Run() })
	return dev
}

func TestLoopDevice(t *testing.T) {
	img := testImage(t)
	path := file(t, t.TempDir(), img.Size+8*mebibyte)
	dev := loop(t, path)
	d, err := Lookup(dev)
	if err != nil || d.Size != img.Size+8*mebibyte || d.Check(false) != nil {
		t.Fatalf("Lookup = %+v, %v, %v", d, err, d.Check(false))
	}
	if state, err := Write(t.Context(), img, dev, nil); state != Verified || err != nil {
		t.Fatalf("Write = %v, %v", state, err)
	}
	same(t, img, path)

	// Mounted, it is refused, by us and by the kernel.
	if out, err := exec.Command("mkfs.ext2", "-q", dev).CombinedOutput(); err != nil {
		t.Skipf("mkfs.ext2: %v: %s", err, out)
	}
	at := t.TempDir()
	if err := unix.Mount(dev, at, "ext2", 0, ""); err != nil {
		t.Skip("mounting: ", err)
	}
	defer unix.Unmount(at, 0)
	if d, err = Lookup(dev); err != nil || !slices.Contains(d.InUse, at) {
		t.Errorf("Lookup = %+v, %v; want it mounted at %s", d, err, at)
	}
	if err := d.Check(true); err == nil || !strings.Contains(err.Error(), "unmount it first") {
		t.Errorf("Check = %v; want it refused even by force", err)
	}
	if state, err := Write(t.Context(), img, dev, nil); state != Untouched || !errors.Is(err, unix.EBUSY) {
		t.Errorf("Write = %v, %v; want EBUSY", state, err)
	}
	// So is the file under it, of which the kernel says nothing.
	if err := CheckFile(path); err == nil || !strings.Contains(err.Error(), filepath.Base(dev)+" on it: "+at) {
		t.Errorf("CheckFile of what is mounted: %v", err)
	}
	// And a loop device under another one.
	outer := loop(t, file(t, t.TempDir(), 16*mebibyte))
	inner := loop(t, outer, "--offset", "1048576")
	if out, err := exec.Command("mkfs.ext2", "-q", inner).CombinedOutput(); err != nil {
		t.Fatalf("mkfs.ext2: %v: %s", err, out)
	}
	within := t.TempDir()
	if err := unix.Mount(inner, within, "ext2", 0, ""); err != nil {
		t.Fatal(err)
	}
	defer unix.Unmount(within, 0)
	if d, err = Lookup(outer); err != nil || d.Check(true) == nil {
		t.Errorf("Lookup = %+v, %v; want it in use, as %s on it is", d, err, inner)
	}
}

// TestImageUnderLoop: a device that is the image itself is not written to.
func TestImageUnderLoop(t *testing.T) {
	img := testImage(t)
	before, err := os.ReadFile(img.Path)
	if err != nil {
		t.Fatal(err)
	}
	dev := loop(t, img.Path)
	for _, path := range []string{dev, loop(t, dev)} {
		if state, err := Write(t.Context(), img, path, nil); state != Untouched || err == nil || !strings.Contains(err.Error(), "is the image itself") {
			t.Errorf("Write = %v, %v", state, err)
		}
	}
	if after, err := os.ReadFile(img.Path); err != nil || !bytes.Equal(before, after) {
		t.Errorf("the image has changed: %v", err)
	}
}

func TestWriteProtected(t *testing.T) {
	img := testImage(t)
	dev := loop(t, file(t, t.TempDir(), img.Size), "--read-only")
	d, err := Lookup(dev)
	if err != nil || !d.ReadOnly {
		t.Fatalf("Lookup = %+v, %v; want it read-only", d, err)
	}
	if err := d.Check(true); err == nil || !strings.Contains(err.Error(), "write-protected") {
		t.Errorf("Check = %v", err)
	}
	if state, err := Write(t.Context(), img, dev, nil); state != Untouched || err == nil {
		t.Errorf("Write = %v, %v", state, err)
	}
}

// TestFull: a device that takes less than it says.
func TestFull(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("mounting a small file system needs root")
	}
	img := testImage(t)
	dir := t.TempDir()
	if err := unix.Mount("none", dir, "tmpfs", 0, "size=20m"); err != nil {
		t.Skip("mounting: ", err)
	}
	defer unix.Unmount(dir, 0)
	path := filepath.Join(dir, "target")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(path, img.Size); err != nil { // a hole: room that is not there
		t.Fatal(err)
	}
	if state, err := Write(t.Context(), img, path, nil); state != Erased || err == nil || !strings.Contains(err.Error(), "smaller than it says") {
		t.Errorf("Write = %v, %v; want no space", state, err)
	}
}

// TestDevices reads the tables of a machine that is made up.
func TestDevices(t *testing.T) {
	root := t.TempDir()
	h := host{class: filepath.Join(root, "class"), mounts: filepath.Join(root, "mountinfo"), swaps: filepath.Join(root, "swaps"), dev: "/dev"}
	put := func(path, text string) {
		t.Helper()
		path = filepath.Join(root, path)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	link := func(name, to string) {
		t.Helper()
		if err := os.MkdirAll(h.class, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink(filepath.Join(root, to), filepath.Join(h.class, name)); err != nil {
			t.Fatal(err)
		}
	}
	for name, d := range map[string]struct{ at, number, removable, ro string }{
		"sda":     {"devices/pci0/ata1", "8:0", "0", "0"},
		"sdb":     {"devices/pci0/usb1/1-1", "8:16", "1", "0"},
		"sdc":     {"devices/pci0/usb1/1-2", "8:32", "0", "0"},
		"sdd":     {"devices/pci0/usb1/1-3", "8:48", "1", "1"},
		"sde":     {"devices/pci0/usb1/1-4", "8:64", "1", "0"},
		"sdf":     {"devices/pci0/ata2", "8:80", "0", "0"},
		"nvme0n1": {"devices/pci0/nvme", "259:0", "0", "0"},
		"dm-0":    {"devices/virtual", "253:0", "0", "0"},
	} {
		dir := filepath.Join(d.at, name)
		put(dir+"/size", "2048000\n")
		put(dir+"/dev", d.number+"\n")
		put(dir+"/removable", d.removable+"\n")
		put(dir+"/ro", d.ro+"\n")
		put(dir+"/device/model", "Stick  of "+name+"\n")
		link(name, dir)
	}
	for _, p := range []struct{ dir, name, number string }{
		{"devices/pci0/ata1/sda", "sda1", "8:1"}, {"devices/pci0/usb1/1-1/sdb", "sdb1", "8:17"}, {"devices/pci0/nvme/nvme0n1", "nvme0n1p3", "259:3"},
	} {
		put(p.dir+"/"+p.name+"/partition", "1\n")
		put(p.dir+"/"+p.name+"/dev", p.number+"\n")
		link(p.name, p.dir+"/"+p.name)
	}
	put("devices/pci0/nvme/nvme0n1/nvme0n1p3/holders/dm-0", "")
	put("mountinfo", `21 1 253:0 / / rw,relatime shared:1 - ext4 /dev/mapper/root rw
30 21 8:17 / /media/my\040stick rw - vfat /dev/sdb1 rw
31 21 0:40 / /data rw - btrfs /dev/sde rw
`)
	put("swaps", "Filename Type Size Used Priority\n/dev/sda1 partition 100 0 -2\n")

	devices, err := h.devices()
	if err != nil {
		t.Fatal(err)
	}
	want := map[string]string{
		"nvme0n1": "this machine runs from (part of dm-0, /)", "sda": "this machine runs from ([SWAP])",
		"sdb": "in use (/media/my stick)", "sdc": "", "sdd": "write-protected", "sde": "in use (/data)", "sdf": "--force",
	}
	if len(devices) != len(want) {
		t.Errorf("%d devices; want %d", len(devices), len(want))
	}
	for _, d := range devices {
		w := want[d.Name()]
		err := d.Check(false)
		if w == "" && err != nil || w != "" && (err == nil || !strings.Contains(err.Error(), w)) {
			t.Errorf("%s: %v; want %q", d.Name(), err, w)
		}
		forced := d.Check(true)
		if free := d.Name() == "sdc" || d.Name() == "sdf"; free != (forced == nil) {
			t.Errorf("%s by force: %v", d.Name(), forced)
		}
		if d.Size != 2048000*512 || d.Model != "Stick of "+d.Name() {
			t.Errorf("%+v", d)
		}
	}
}
