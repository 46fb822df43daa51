// Package boards holds the machines an image can be built for, one folder
// each: board.yaml says what the board is, the kernel fragments beside it what
// its kernel can do. Fragments in shared/ are for all boards, so that what the
// appliance needs everywhere is written once. A new board is a new folder and
// no code.
package boards

import (
	"embed"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"slices"
	"strings"

	"github.com/goccy/go-yaml"

	"clonecluster/image/kernel/kconfig"
)

//go:embed */board.yaml */*.config
var tree embed.FS

// ErrUnknown is what Get's error wraps if there is no such board.
var ErrUnknown = errors.New("unknown board")

// Board is a kind of machine that an image can be built for.
type Board struct {
	Name        string   `yaml:"name"` // as its folder
	Description string   `yaml:"description"`
	Arch        string   `yaml:"arch"`     // as Go says it: amd64, arm64
	Consoles    []string `yaml:"consoles"` // devices for console=; the last becomes /dev/console
	Boot        Boot     `yaml:"boot"`
	Kernel      Kernel   `yaml:"kernel"`
	QEMU        QEMU     `yaml:"qemu"`

	fsys fs.FS
}

// Firmware is what a board runs before the kernel, as qemu.Firmware says it.
type Firmware string

// The firmware kinds.
const (
	BIOS Firmware = "bios"
	UEFI Firmware = "uefi"
)

// Boot says what the board's boot media have to look like.
type Boot struct {
	// Firmware are the kinds that machines of this board have; one image is laid
	// out for all of them. With uefi, a stick has an EFI system partition with the
	// unified kernel image; with bios, also a boot loader and a partition for it.
	Firmware []Firmware `yaml:"firmware"`
	// EFIName is the unified kernel image's file in \EFI\BOOT, where UEFI looks on
	// removable media (UEFI specification 2.10, section 3.5.1.1).
	EFIName string `yaml:"efi-name"`
}

// Has says whether machines of this board can have a firmware.
func (b Boot) Has(f Firmware) bool { return slices.Contains(b.Firmware, f) }

// efiNames are the names that UEFI gives the file, by architecture.
var efiNames = map[string]string{"amd64": "BOOTX64.EFI", "arm64": "BOOTAA64.EFI"}

// Kernel says how the board's kernel is built.
type Kernel struct {
	Arch string `yaml:"arch"` // for make's ARCH=
	// CrossCompile is the tool prefix for hosts of another architecture.
	CrossCompile string `yaml:"cross-compile"`
	Image        string `yaml:"image"` // where the build leaves the kernel
	// Fragments are paths below boards/; later ones override earlier ones.
	Fragments []string `yaml:"fragments"`
	// Files is about how many files a build compiles, for a first progress
	// display.
	Files int `yaml:"files"`
}

// QEMU says which virtual machine stands in for the board in tests.
type QEMU struct {
	Binary    string   `yaml:"binary"`
	Machine   string   `yaml:"machine"`    // for -machine
	Accel     []string `yaml:"accel"`      // to be tried in this order
	MemoryMiB int      `yaml:"memory-mib"` // enough to boot and serve
}

// Get returns the named board. The error wraps ErrUnknown, and names those
// there are, if it does not exist.
func Get(name string) (Board, error) {
	return get(tree, name)
}

// All returns all boards, sorted by name.
func All() ([]Board, error) {
	return all(tree)
}

func all(fsys fs.FS) ([]Board, error) {
	var boards []Board
	for _, name := range names(fsys) {
		b, err := get(fsys, name)
		if err != nil {
			return nil, err
		}
		boards = append(boards, b)
	}
	return boards, nil
}

func names(fsys fs.FS) []string {
	files, err := fs.Glob(fsys, "*/board.yaml")
	if err != nil {
		panic(err) // the pattern is a constant
	}
	for i, f := range files {
		files[i] = path.Dir(f)
	}
	return files
}

func get(fsys fs.FS, name string) (Board, error) {
	known := names(fsys)
	if !slices.Contains(known, name) {
		return Board{}, fmt.Errorf("board %q: %w; there are %s", name, ErrUnknown, strings.Join(known, ", "))
	}
	file := path.Join(name, "board.yaml")
	data, err := fs.ReadFile(fsys, file)
	if err != nil {
		return Board{}, fmt.Errorf("reading board: %w", err)
	}
	b := Board{fsys: fsys}
	if err := yaml.UnmarshalWithOptions(data, &b, yaml.Strict()); err != nil {
		return Board{}, fmt.Errorf("%s: %w", file, err)
	}
	if b.Name != name {
		return Board{}, fmt.Errorf("%s: name is %q, its folder %q", file, b.Name, name)
	}
	if err := b.Validate(); err != nil {
		return Board{}, fmt.Errorf("%s: %w", file, err)
	}
	return b, nil
}

// Validate reports everything that is missing or out of range, joined.
func (b Board) Validate() error {
	var errs []error
	need := func(ok bool, format string, args ...any) {
		if !ok {
			errs = append(errs, fmt.Errorf(format, args...))
		}
	}
	need(b.Name != "", "name: is empty")
	need(b.Description != "", "description: is empty")
	need(slices.Contains([]string{"amd64", "arm64"}, b.Arch), "arch: %q is neither amd64 nor arm64", b.Arch)
	need(len(b.Consoles) > 0, "consoles: names none")
	need(len(b.Consoles) == 0 || b.Serial() != "", "consoles: %s: none is a serial line, so nobody could watch a test", b.Consoles)
	for _, c := range b.Consoles {
		need(c != "" && !strings.ContainsAny(c, " \t/\""), "consoles: %q is no console device", c)
	}
	need(len(b.Boot.Firmware) > 0, "boot.firmware: names none")
	for i, f := range b.Boot.Firmware {
		need(f == BIOS || f == UEFI, "boot.firmware: %q is neither bios nor uefi", f)
		need(f != BIOS || b.Arch == "amd64", "boot.firmware: only amd64 has a bios")
		need(!slices.Contains(b.Boot.Firmware[:i], f), "boot.firmware: %s is there twice", f)
	}
	if b.Boot.Has(UEFI) {
		need(b.Boot.EFIName == efiNames[b.Arch], "boot.efi-name: %q is not what UEFI looks for on %s, %s", b.Boot.EFIName, b.Arch, efiNames[b.Arch])
	} else {
		need(b.Boot.EFIName == "", "boot.efi-name: without uefi nothing reads %s", b.Boot.EFIName)
	}
	need(b.Kernel.Arch != "", "kernel.arch: is empty")
	need(fs.ValidPath(b.Kernel.Image) && b.Kernel.Image != ".", "kernel.image: %q is no path below the build folder", b.Kernel.Image)
	need(b.Kernel.Files > 0, "kernel.files: %d is not positive", b.Kernel.Files)
	need(len(b.Kernel.Fragments) > 0, "kernel.fragments: names none")
	need(strings.HasPrefix(b.QEMU.Binary, "qemu-system-"), "qemu.binary: %q is no qemu-system-*", b.QEMU.Binary)
	need(b.QEMU.Machine != "", "qemu.machine: is empty")
	need(b.QEMU.MemoryMiB >= 32, "qemu.memory-mib: %d is less than 32", b.QEMU.MemoryMiB)
	need(len(b.QEMU.Accel) > 0, "qemu.accel: names none")
	for _, a := range b.QEMU.Accel {
		need(a == "kvm" || a == "tcg", "qemu.accel: %q is neither kvm nor tcg", a)
	}
	if _, err := b.KernelConfig(); err != nil {
		errs = append(errs, fmt.Errorf("kernel.fragments: %w", err))
	}
	return errors.Join(errs...)
}

// Serial is the board's first serial console, which is what a virtual machine
// shows; empty if all its consoles are screens.
func (b Board) Serial() string {
	for _, c := range b.Consoles {
		if n := strings.TrimPrefix(c, "tty"); n == c || strings.Trim(n, "0123456789") != "" {
			return c
		}
	}
	return ""
}

// KernelConfig returns the board's kernel configuration: its fragments laid
// over one another.
func (b Board) KernelConfig() (kconfig.Fragment, error) {
	if b.fsys == nil {
		return nil, errors.New("board was not read by this package")
	}
	var fragments []kconfig.Fragment
	for _, file := range b.Kernel.Fragments {
		data, err := fs.ReadFile(b.fsys, file)
		if err != nil {
			return nil, err
		}
		f, err := kconfig.Parse("boards/"+file, data)
		if err != nil {
			return nil, err
		}
		fragments = append(fragments, f)
	}
	return kconfig.Merge(fragments...), nil
}
