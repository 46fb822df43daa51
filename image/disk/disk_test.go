package disk

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"clonecluster/uinit/stick"
)

func noise(seed byte, size int) []byte {
	data := make([]byte, size)
	rand.NewChaCha8([32]byte{seed}).Read(data)
	return data
}

// grub is GRUB's two pieces, or something of their shape where it is not
// installed.
func grub(t *testing.T) (boot, core []byte) {
	t.Helper()
	boot, core, err := GRUB(t.Context())
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, exec.ErrNotFound) {
		t.Log(err)
		boot, core = make([]byte, 512), noise(9, 40_001)
		boot[0x66], boot[510], boot[511] = 0xeb, 0x55, 0xaa
	} else if err != nil {
		t.Fatal(err)
	}
	return boot, core
}

func options(t *testing.T) Options {
	boot, core := grub(t)
	return Options{
		UKI: noise(1, 3_000_001), Arch: "amd64", Config: []byte("cluster:\n  name: demo\n"),
		Files: map[string][]byte{
			"manifest.json": []byte("{}\n"),
			"a folder/with a long name.and.dots/and another one that is longer than that.txt": noise(3, 5000),
			"clonecluster/empty":     nil,
			"clonecluster/LINUX.OLD": noise(4, 512),
			"ünï©ode.txt":            []byte("ü"),
		},
		BIOS: &BIOS{Kernel: noise(5, 2_000_000), Initrd: noise(6, 4_000_003), Cmdline: "console=ttyS0 clonecluster.stick=1", BootImg: boot, CoreImg: core},
	}
}

func write(t *testing.T, o Options) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "usb.img")
	if err := Write(path, o); err != nil {
		t.Fatal(err)
	}
	return path
}

func tool(t *testing.T, pkg, name string, args ...string) string {
	t.Helper()
	if _, err := exec.LookPath(name); err != nil {
		t.Skipf("%s is not installed (apt-get install %s)", name, pkg)
	}
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

func open(t *testing.T, path string) *FS {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	fi, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	disk, err := Open(f, fi.Size())
	if err != nil {
		t.Fatal(err)
	}
	return disk
}

func TestWriteThenOpen(t *testing.T) {
	o := options(t)
	path := write(t, o)
	fi, err := os.Stat(path)
	if err != nil || fi.Mode() != 0o600 {
		t.Errorf("mode %v, %v; want 0600", fi.Mode(), err)
	}
	disk := open(t, path)
	want := map[string][]byte{
		"cluster.yaml": o.Config, "readme.txt": readme, "/EFI/BOOT/BOOTX64.EFI": o.UKI,
		"clonecluster/linux": o.BIOS.Kernel, "clonecluster/initrd": o.BIOS.Initrd,
		"grub/grub.cfg": []byte("echo 'clonecluster'\nlinux /clonecluster/linux 'console=ttyS0' 'clonecluster.stick=1'\ninitrd /clonecluster/initrd\nboot\n"),
	}
	for name, data := range o.Files {
		want[name] = data
	}
	for name, data := range want {
		if got, err := disk.ReadFile(name, 1<<30); err != nil || !bytes.Equal(got, data) {
			t.Errorf("ReadFile(%q) = %d bytes, %v; want %d", name, len(got), err, len(data))
		}
	}
	var names []string
	for _, p := range disk.Partitions {
		names = append(names, p.Name)
	}
	if want := []string{"clonecluster", "clonecluster boot", "clonecluster bios"}; !slices.Equal(names, want) {
		t.Errorf("partitions %q; want %q", names, want)
	}
	if _, err := disk.ReadFile("cluster.yaml", 3); err == nil || !strings.Contains(err.Error(), "at most 3") {
		t.Errorf("ReadFile of a file that is too large = %v", err)
	}
	if _, err := disk.ReadFile("EFI/BOOT/none", 3); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("ReadFile of no file = %v", err)
	}
	data, err := disk.In(stick.PartitionName)
	if err != nil {
		t.Fatal(err)
	}
	if entries, err := data.ReadDir(""); err != nil || len(entries) != 2 {
		t.Errorf("what is shown to the owner: %v, %v; want two files", entries, err)
	}
}

// TestSameBytes: no clock, no random number, no order of a map gets in.
func TestSameBytes(t *testing.T) {
	o := options(t)
	a, err := os.ReadFile(write(t, o))
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(write(t, o))
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(a, b) {
		t.Error("two images of the same differ")
	}
	o.Config = append(o.Config, '\n')
	c, err := os.ReadFile(write(t, o))
	if err != nil {
		t.Fatal(err)
	}
	if bytes.Equal(a[512+56:512+72], c[512+56:512+72]) {
		t.Error("disks with other contents have the same identifier")
	}
}

func TestPartitionTable(t *testing.T) {
	for name, o := range map[string]Options{"BIOS and UEFI": options(t), "UEFI": {UKI: noise(1, 1000), Arch: "arm64"}} {
		t.Run(name, func(t *testing.T) {
			path := write(t, o)
			out := tool(t, "gdisk", "sgdisk", "-v", path)
			for _, bad := range []string{"Caution", "Warning", "Problem:", "mismatch"} {
				if strings.Contains(out, bad) {
					t.Errorf("sgdisk -v complains:\n%s", out)
					break
				}
			}
			if !strings.Contains(out, "No problems found") {
				t.Errorf("sgdisk -v finds problems:\n%s", out)
			}
			out = tool(t, "gdisk", "sgdisk", "-p", path)
			for i, p := range open(t, path).Partitions {
				code := map[stick.GUID]string{stick.TypeData: "0700", stick.TypeESP: "EF00", stick.TypeBIOS: "EF02"}[p.Type]
				line := ""
				for l := range strings.Lines(out) {
					if f := strings.Fields(l); len(f) > 6 && f[0] == fmt.Sprint(i+1) {
						line = l
						if f[1] != fmt.Sprint(p.Start/512) || f[2] != fmt.Sprint((p.Start+p.Size)/512-1) || f[5] != code || strings.Join(f[6:], " ") != p.Name {
							t.Errorf("sgdisk sees %q; we wrote %+v", l, p)
						}
					}
				}
				if line == "" {
					t.Errorf("sgdisk does not see partition %d:\n%s", i+1, out)
				}
			}
		})
	}
}

func TestFileSystems(t *testing.T) {
	many := map[string][]byte{}
	for i := range 300 {
		many[fmt.Sprintf("many/A rather long name of file number %d", i)] = []byte{byte(i)}
	}
	for name, o := range map[string]Options{
		"usual": options(t), "many files": {UKI: []byte("x"), Arch: "amd64", Files: many},
		"large": {UKI: noise(1, 70<<20), Arch: "amd64"},
	} {
		t.Run(name, func(t *testing.T) {
			path := write(t, o)
			for _, p := range open(t, path).Partitions {
				if p.Type == stick.TypeBIOS {
					continue
				}
				part := filepath.Join(t.TempDir(), "part")
				cut(t, path, part, p.Start, p.Size)
				out := tool(t, "dosfstools", "fsck.fat", "-n", "-v", part)
				// Fsck.fat says in its first and last lines what it is and what it counted.
				for _, bad := range []string{"differences", "Dirty", "wrong", "Bad", "bad", "orphan", "Start ", "Would", "not set", "Free cluster", "not removing", "Contains a free"} {
					if strings.Contains(out, bad) {
						t.Errorf("fsck.fat complains of partition %q:\n%s", p.Name, out)
						break
					}
				}
				if !strings.Contains(out, "32 bits per FAT entry") && !strings.Contains(out, "FAT32") {
					t.Logf("fsck.fat:\n%s", out)
				}
			}
		})
	}
}

func cut(t *testing.T, from, to string, at, size int64) {
	t.Helper()
	f, err := os.Open(from)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	data := make([]byte, size)
	if _, err := f.ReadAt(data, at); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(to, data, 0o600); err != nil {
		t.Fatal(err)
	}
}

// TestMtools reads everything back by a program that is not ours, changes a
// file with it, and reads that.
func TestMtools(t *testing.T) {
	o := options(t)
	path := write(t, o)
	parts := open(t, path).Partitions
	at := func(i int) string { return fmt.Sprintf("%s@@%d", path, parts[i].Start) }
	for name, want := range map[string][]byte{
		"::/EFI/BOOT/BOOTX64.EFI": o.UKI, "::/clonecluster/initrd": o.BIOS.Initrd, "::/clonecluster/empty": nil,
		"::/a folder/with a long name.and.dots/and another one that is longer than that.txt": o.Files["a folder/with a long name.and.dots/and another one that is longer than that.txt"],
	} {
		if got := tool(t, "mtools", "mtype", "-i", at(1), name); got != string(want) {
			t.Errorf("mtype %s: %d bytes; want %d", name, len(got), len(want))
		}
	}
	out := tool(t, "mtools", "mdir", "-i", at(0), "::")
	for _, want := range []string{"cluster.yaml", "README", "1980-01-01"} {
		if !strings.Contains(out, want) {
			t.Errorf("mdir does not show %q:\n%s", want, out)
		}
	}
	edited := filepath.Join(t.TempDir(), "edited")
	text := bytes.Repeat([]byte("# edited\r\n"), 1000)
	if err := os.WriteFile(edited, text, 0o600); err != nil {
		t.Fatal(err)
	}
	tool(t, "mtools", "mcopy", "-o", "-i", at(0), edited, "::/cluster.yaml")
	tool(t, "mtools", "mmd", "-i", at(0), "::/Made by another")
	tool(t, "mtools", "mcopy", "-i", at(0), edited, "::/Made by another/$NAME with dollar")
	disk := open(t, path)
	for _, name := range []string{"cluster.yaml", "made by another/$name with dollar"} {
		if got, err := disk.ReadFile(name, 1<<20); err != nil || !bytes.Equal(got, text) {
			t.Errorf("what mcopy wrote as %s: %d bytes, %v; want %d", name, len(got), err, len(text))
		}
	}
}

// TestForeign reads a disk that sgdisk, mkfs.fat and mcopy made.
func TestForeign(t *testing.T) {
	for _, args := range [][]string{{"-s", "1"}, {"-s", "2", "-R", "100", "-f", "1"}} {
		t.Run(strings.Join(args, " "), func(t *testing.T) {
			dir := t.TempDir()
			img, part, file := filepath.Join(dir, "disk"), filepath.Join(dir, "part"), filepath.Join(dir, "file")
			const size = 80 << 20
			for path, n := range map[string]int64{img: size + 2<<20, part: size} {
				if err := os.WriteFile(path, nil, 0o600); err != nil {
					t.Fatal(err)
				}
				if err := os.Truncate(path, n); err != nil {
					t.Fatal(err)
				}
			}
			data := noise(7, 3_000_001)
			if err := os.WriteFile(file, data, 0o600); err != nil {
				t.Fatal(err)
			}
			tool(t, "dosfstools", "mkfs.fat", append(append([]string{"-F", "32"}, args...), part)...)
			tool(t, "mtools", "mmd", "-i", part, "::/EFI")
			tool(t, "mtools", "mcopy", "-i", part, file, "::/EFI/first")
			tool(t, "mtools", "mcopy", "-i", part, file, "::/EFI/A second file with a name")
			tool(t, "mtools", "mdel", "-i", part, "::/EFI/first")
			tool(t, "mtools", "mcopy", "-i", part, file, "::/EFI/again")
			tool(t, "gdisk", "sgdisk", "-n", "1:2048:+80M", "-t", "1:0700", "-c", "1:"+stick.PartitionName, img)
			whole, err := os.ReadFile(part)
			if err != nil {
				t.Fatal(err)
			}
			f, err := os.OpenFile(img, os.O_WRONLY, 0)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := f.WriteAt(whole, 1<<20); err != nil {
				t.Fatal(err)
			}
			f.Close()
			disk := open(t, img)
			if disk.Partitions[0].Name != stick.PartitionName {
				t.Errorf("partitions %+v", disk.Partitions)
			}
			for _, name := range []string{"efi/again", "EFI/a second file with a name"} {
				if got, err := disk.ReadFile(name, 1<<30); err != nil || !bytes.Equal(got, data) {
					t.Errorf("ReadFile(%q) = %d bytes, %v; want %d", name, len(got), err, len(data))
				}
			}
			// Without the primary table the backup serves.
			f, err = os.OpenFile(img, os.O_WRONLY, 0)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := f.WriteAt(make([]byte, 2048), 512); err != nil {
				t.Fatal(err)
			}
			f.Close()
			if got, err := open(t, img).ReadFile("efi/again", 1<<30); err != nil || !bytes.Equal(got, data) {
				t.Errorf("by the backup: %d bytes, %v", len(got), err)
			}
		})
	}
}

func TestWriteErrors(t *testing.T) {
	good := options(t)
	for _, tt := range []struct {
		name   string
		change func(*Options)
		want   string
	}{
		{"nothing to boot", func(o *Options) { o.UKI, o.BIOS = nil, nil }, "nothing could boot"},
		{"architecture", func(o *Options) { o.Arch = "riscv64" }, `"riscv64": amd64 and arm64`},
		{"a second boot file", func(o *Options) { o.Files = map[string][]byte{"efi/boot/bootx64.efi": nil} }, "that the image has anyway"},
		{"twice", func(o *Options) { o.Files = map[string][]byte{"a/B": nil, "A/b": nil} }, "upper and lower case"},
		{"a file as a folder", func(o *Options) { o.Files = map[string][]byte{"a": nil, "a/b": nil} }, "there is a file"},
		{"no name", func(o *Options) { o.Files = map[string][]byte{"a//b": nil} }, "no name"},
		{"a bad name", func(o *Options) { o.Files = map[string][]byte{"a:b": nil} }, "no name on FAT"},
		{"no first stage", func(o *Options) { b := *o.BIOS; b.BootImg = nil; o.BIOS = &b }, "BootImg"},
		{"no core", func(o *Options) { b := *o.BIOS; b.CoreImg = nil; o.BIOS = &b }, "CoreImg"},
		{"a command line for a shell", func(o *Options) { b := *o.BIOS; b.Cmdline = "a'b"; o.BIOS = &b }, "command line"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			o, dir := good, t.TempDir()
			tt.change(&o)
			err := Write(filepath.Join(dir, "usb.img"), o)
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("Write = %v; want an error with %q", err, tt.want)
			}
			if left, _ := os.ReadDir(dir); len(left) > 0 {
				t.Errorf("left behind: %v", left)
			}
		})
	}
	if err := Write(filepath.Join(t.TempDir(), "none", "usb.img"), good); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("Write into no folder = %v", err)
	}
}

// TestFullDisk: a file system that is full gives an error, and keeps no half.
func TestFullDisk(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("mounting a small file system needs root")
	}
	dir := t.TempDir()
	if out, err := exec.Command("mount", "-t", "tmpfs", "-o", "size=2m", "none", dir).CombinedOutput(); err != nil {
		t.Skipf("mount: %v: %s", err, out)
	}
	defer exec.Command("umount", dir).Run()
	err := Write(filepath.Join(dir, "usb.img"), options(t))
	if err == nil || !strings.Contains(err.Error(), "no space left") {
		t.Errorf("Write = %v; want no space left", err)
	}
	if left, _ := os.ReadDir(dir); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}

func TestGRUBErrors(t *testing.T) {
	defer func(dir, mk string) { grubDir, grubMkimage = dir, mk }(grubDir, grubMkimage)
	grubDir = t.TempDir()
	if _, _, err := GRUB(t.Context()); !errors.Is(err, os.ErrNotExist) || !strings.Contains(err.Error(), "apt-get install grub-pc-bin") {
		t.Errorf("GRUB = %v; want the package", err)
	}
	if err := os.WriteFile(filepath.Join(grubDir, "boot.img"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	grubMkimage = "no-such-grub-mkimage"
	if _, _, err := GRUB(t.Context()); !errors.Is(err, exec.ErrNotFound) || !strings.Contains(err.Error(), "apt-get install") {
		t.Errorf("GRUB = %v; want the package", err)
	}
}

func TestShortNames(t *testing.T) {
	taken := map[string]bool{}
	for _, tt := range []struct {
		name, want string
		exact      bool
	}{
		{"README.TXT", "README  TXT", true},
		{"EFI", "EFI        ", true},
		{"BOOTX64.EFI", "BOOTX64 EFI", true},
		{"cluster.yaml", "CLUSTE~1YAM", false},
		{"cluster.yam", "CLUSTE~2YAM", false},
		{"a.b.c", "AB~1    C  ", false},
		{".hidden", "HIDDEN~1   ", false},
		{"ü", "_~1        ", false},
		{"...x", "~1      X  ", false},
	} {
		got, exact := shortName(tt.name, taken)
		taken[got] = true
		if got != tt.want || exact != tt.exact {
			t.Errorf("shortName(%q) = %q, %v; want %q, %v", tt.name, got, exact, tt.want, tt.exact)
		}
	}
}
