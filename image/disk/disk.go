// Package disk makes and reads the disk image of a cluster: what a USB stick or
// a virtual machine's disk holds, and what a machine boots from by UEFI and by
// BIOS.
//
// The image has a GUID partition table and
//
//  1. a FAT32 partition that every computer shows, with cluster.yaml and
//     README.TXT: what its owner may edit;
//  2. an EFI system partition (FAT32), which most computers hide, with the
//     unified kernel image under the name that firmware looks for on a
//     removable disk, and kernel and initramfs for GRUB;
//  3. for BIOS, GRUB's core in a BIOS boot partition, which its first stage in
//     the first sector loads.
//
// The same options give the same bytes. Identifiers of the disk, of its
// partitions and of its file systems are hashes of what is on it. Readers of
// what others wrote are in package stick, which a node has too.
//
// Sources: UEFI Specification 2.10, chapters 5 and 13.3; Microsoft FAT32 File
// System Specification 1.03; GRUB's util/setup.c for what it installs.
package disk

import (
	"context"
	"crypto/sha256"
	_ "embed"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"clonecluster/uinit/stick"
)

// Options are what goes onto a disk.
type Options struct {
	UKI    []byte // unified kernel image; nil: only BIOS
	Arch   string // its architecture as Go calls it: amd64, arm64
	Config []byte // cluster.yaml, plain; it holds the cluster's key
	// Files go onto the EFI system partition, by their paths with slashes.
	Files map[string][]byte
	BIOS  *BIOS // nil: only UEFI
}

// BIOS is what booting by BIOS needs.
type BIOS struct {
	Kernel, Initrd   []byte
	Cmdline          string // for the kernel
	BootImg, CoreImg []byte // as GRUB gives them
}

// StickParameter belongs on the kernel's command line of an image that boots
// from a disk of this package: it has the node wait for the disk, as a USB stick
// can appear seconds after init.
const StickParameter = "clonecluster.stick=1"

//go:embed readme.txt
var readme []byte

// BootFile is the path that firmware looks for on a removable disk (UEFI
// Specification 3.5.1.1), "" for an architecture that is not known.
func BootFile(arch string) string {
	switch arch {
	case "amd64":
		return "EFI/BOOT/BOOTX64.EFI"
	case "arm64":
		return "EFI/BOOT/BOOTAA64.EFI"
	}
	return ""
}

// What GRUB reads, on the EFI system partition.
const (
	grubConfig = "grub/grub.cfg"
	grubKernel = "clonecluster/linux"
	grubInitrd = "clonecluster/initrd"
)

// MaxSize bounds an image.
const MaxSize = 4 << 30

// Write makes the image at path, with mode 0600 as it holds the cluster's key.
// What was there is replaced in one step, and stays if there is an error.
func Write(path string, o Options) (err error) {
	img, err := lay(o)
	if err != nil {
		return fmt.Errorf("making the disk image: %w", err)
	}
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+"-*")
	if err != nil {
		return fmt.Errorf("making the disk image: %w", err)
	}
	defer func() {
		if err != nil {
			os.Remove(f.Name())
			err = fmt.Errorf("making the disk image %s: %w", path, err)
		}
	}()
	err = img.write(f)
	if err == nil {
		err = f.Chmod(0o600)
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	return os.Rename(f.Name(), path)
}

// Open reads the file systems of a disk or of an image of size bytes, whoever
// made it. See package stick for the bounds.
func Open(r io.ReaderAt, size int64) (*FS, error) { return stick.Open(r, size) }

// FS is the files of a disk.
type FS = stick.FS

// layout is a disk before it is written: pieces at their offsets, and zeros
// between them.
type layout struct {
	size   int64
	pieces []piece
}

type piece struct {
	at   int64
	data []byte
}

func (l *layout) add(at int64, data []byte) {
	l.pieces = append(l.pieces, piece{at, data})
}

// write leaves the zeros out, so that an image takes the room of its contents
// where files can have holes.
func (l *layout) write(f *os.File) error {
	if err := f.Truncate(l.size); err != nil {
		return err
	}
	for _, p := range l.pieces {
		if _, err := f.WriteAt(p.data, p.at); err != nil {
			return err
		}
	}
	return nil
}

const (
	sectorSize = 512
	mebibyte   = 1 << 20
)

func lay(o Options) (*layout, error) {
	esp, err := o.systemFiles()
	if err != nil {
		return nil, err
	}
	data := map[string][]byte{stick.ConfigFile: o.Config, "README.TXT": readme}
	id := identity(o, data, esp)

	l := &layout{}
	var parts []partition
	at := int64(mebibyte)
	for _, p := range []struct {
		name, label string
		kind        stick.GUID
		files       map[string][]byte
	}{
		{stick.PartitionName, "CLUSTER", stick.TypeData, data},
		{"clonecluster boot", "CLONEBOOT", stick.TypeESP, esp},
	} {
		fat, err := newFAT(p.files, p.label, uint32(at/sectorSize), id.volume(p.name))
		if err != nil {
			return nil, err
		}
		fat.addTo(l, at)
		parts = append(parts, partition{kind: p.kind, id: id.guid(p.name), name: p.name, start: at, size: fat.size})
		at = align(at+fat.size, mebibyte)
	}
	mbr := make([]byte, sectorSize)
	if b := o.BIOS; b != nil {
		core, err := installGRUB(mbr, *b, at/sectorSize)
		if err != nil {
			return nil, err
		}
		l.add(at, core)
		size := align(int64(len(core)), mebibyte)
		parts = append(parts, partition{kind: stick.TypeBIOS, id: id.guid("bios"), name: "clonecluster bios", start: at, size: size})
		at += size
	}
	l.size = at + mebibyte // the backup table's, at its end
	if l.size > MaxSize {
		return nil, fmt.Errorf("%d MiB; at most %d MiB can be", l.size>>20, int64(MaxSize)>>20)
	}
	protect(mbr, l.size, o.BIOS != nil)
	l.add(0, mbr)
	addGPT(l, id.guid("disk"), parts)
	return l, nil
}

// systemFiles are those of the EFI system partition.
func (o Options) systemFiles() (map[string][]byte, error) {
	files := maps.Clone(o.Files)
	if files == nil {
		files = map[string][]byte{}
	}
	add := func(name string, data []byte) error {
		for have := range files {
			if strings.EqualFold(have, name) {
				return fmt.Errorf("%s is the name of a file that the image has anyway", have)
			}
		}
		files[name] = data
		return nil
	}
	if o.UKI == nil && o.BIOS == nil {
		return nil, errors.New("neither a unified kernel image nor anything for BIOS: nothing could boot from it")
	}
	if o.UKI != nil {
		name := BootFile(o.Arch)
		if name == "" {
			return nil, fmt.Errorf("architecture %q: amd64 and arm64 are known", o.Arch)
		}
		if err := add(name, o.UKI); err != nil {
			return nil, err
		}
	}
	if b := o.BIOS; b != nil {
		if strings.ContainsFunc(b.Cmdline, func(r rune) bool { return r < ' ' || r > '~' || r == '\'' }) {
			return nil, fmt.Errorf("command line %q: want printable ASCII without '", b.Cmdline)
		}
		// Quoted: to GRUB's shell ; and others are not text.
		config := fmt.Sprintf("echo 'clonecluster'\nlinux /%s '%s'\ninitrd /%s\nboot\n", grubKernel, strings.Join(strings.Fields(b.Cmdline), "' '"), grubInitrd)
		if strings.TrimSpace(b.Cmdline) == "" {
			config = strings.Replace(config, " ''\n", "\n", 1)
		}
		if err := errors.Join(add(grubConfig, []byte(config)), add(grubKernel, b.Kernel), add(grubInitrd, b.Initrd)); err != nil {
			return nil, err
		}
	}
	return files, nil
}

// identifiers are derived from what is on the disk.
type identifiers [sha256.Size]byte

func identity(o Options, trees ...map[string][]byte) identifiers {
	h := sha256.New()
	part := func(name string, data []byte) {
		fmt.Fprintf(h, "%q %d\n", name, len(data))
		h.Write(data)
	}
	for _, files := range trees {
		for _, name := range slices.Sorted(maps.Keys(files)) {
			part(name, files[name])
		}
	}
	if o.BIOS != nil {
		part("boot.img", o.BIOS.BootImg)
		part("core.img", o.BIOS.CoreImg)
	}
	return identifiers(h.Sum(nil))
}

func (id identifiers) of(name string) [sha256.Size]byte {
	return sha256.Sum256(append(id[:], name...))
}

// guid is one of version 8 (RFC 9562): bits that only we know the meaning of.
func (id identifiers) guid(name string) stick.GUID {
	h := id.of(name)
	g := stick.GUID(h[:16])
	g[7] = g[7]&0x0f | 0x80 // the third part is little-endian
	g[8] = g[8]&0x3f | 0x80
	return g
}

func (id identifiers) volume(name string) uint32 {
	h := id.of(name)
	return binary.LittleEndian.Uint32(h[16:])
}

func align(n, to int64) int64 { return (n + to - 1) / to * to }

// Where Debian's GRUB for BIOS is, and what its core is made of. It finds its
// configuration on the second partition of the disk it was loaded from.
var (
	grubDir     = "/usr/lib/grub/i386-pc"
	grubMkimage = "grub-mkimage"
	grubModules = []string{"biosdisk", "part_gpt", "fat", "normal", "echo", "linux"}
)

const grubPrefix = "(,gpt2)/grub"

// GRUB makes what boots by BIOS: the first stage for the first sector, and the
// core. It runs grub-mkimage, whose output depends on its version only.
func GRUB(ctx context.Context) (boot, core []byte, err error) {
	const how = "apt-get install grub-pc-bin"
	boot, err = os.ReadFile(filepath.Join(grubDir, "boot.img"))
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil, fmt.Errorf("GRUB for BIOS is not installed (%s): %w", how, err)
	} else if err != nil {
		return nil, nil, fmt.Errorf("reading GRUB's first stage: %w", err)
	}
	dir, err := os.MkdirTemp("", "clonecluster-grub-")
	if err != nil {
		return nil, nil, err
	}
	defer os.RemoveAll(dir)
	out := filepath.Join(dir, "core.img")
	args := append([]string{"-O", "i386-pc", "-d", grubDir, "-p", grubPrefix, "-o", out}, grubModules...)
	cmd := exec.CommandContext(ctx, grubMkimage, args...)
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	msg, err := cmd.CombinedOutput()
	switch {
	case errors.Is(err, exec.ErrNotFound):
		return nil, nil, fmt.Errorf("grub-mkimage is not installed (%s): %w", how, err)
	case ctx.Err() != nil:
		return nil, nil, ctx.Err()
	case err != nil:
		return nil, nil, fmt.Errorf("grub-mkimage: %w\n%s", err, strings.TrimSpace(string(msg)))
	}
	if core, err = os.ReadFile(out); err != nil {
		return nil, nil, fmt.Errorf("reading GRUB's core: %w", err)
	}
	return boot, core, nil
}

// installGRUB puts the first stage into the first sector and gives the core as
// it is for the sector it will begin at, as grub-bios-setup does.
func installGRUB(mbr []byte, b BIOS, sector int64) ([]byte, error) {
	const (
		kernelSector = 0x5c // in boot.img: where the core begins
		bootDrive    = 0x64
		driveCheck   = 0x66
		blocks       = 0x1f4 // in the core's first sector: where its rest is
	)
	le := binary.LittleEndian
	if len(b.BootImg) != sectorSize || b.BootImg[driveCheck] != 0xeb || le.Uint16(b.BootImg[510:]) != 0xaa55 {
		return nil, errors.New("BootImg is not GRUB's boot.img for BIOS")
	}
	if n := len(b.CoreImg); n < 2*sectorSize || n > mebibyte {
		return nil, fmt.Errorf("CoreImg is not GRUB's core for BIOS: it has %d bytes", n)
	}
	copy(mbr, b.BootImg[:440])
	le.PutUint64(mbr[kernelSector:], uint64(sector))
	mbr[bootDrive] = 0xff                           // the one that the BIOS names
	mbr[driveCheck], mbr[driveCheck+1] = 0x90, 0x90 // and believe the BIOS
	core := make([]byte, align(int64(len(b.CoreImg)), sectorSize))
	copy(core, b.CoreImg)
	le.PutUint64(core[blocks:], uint64(sector+1))
	le.PutUint16(core[blocks+8:], uint16(len(core)/sectorSize-1))
	return core, nil
}
