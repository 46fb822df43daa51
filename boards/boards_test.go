package boards

import (
	"errors"
	"io/fs"
	"strings"
	"testing"
	"testing/fstest"
)

func TestAllBoardsAreValid(t *testing.T) {
	boards, err := All()
	if err != nil {
		t.Fatal(err)
	}
	if len(boards) < 2 {
		t.Errorf("%d boards; want at least 2", len(boards))
	}
	for _, b := range boards {
		config, err := b.KernelConfig()
		if err != nil {
			t.Errorf("%s: %v", b.Name, err)
		}
		// What no image works without, whatever a board's own fragment says.
		for _, want := range []string{"CONFIG_PACKET=y", "CONFIG_TUN=y", "CONFIG_MACVLAN=y", "CONFIG_DEVTMPFS=y", "CONFIG_RD_ZSTD=y", "CONFIG_INPUT_EVDEV=y"} {
			if !strings.Contains(string(config.Bytes()), want+"\n") {
				t.Errorf("%s: kernel configuration lacks %s", b.Name, want)
			}
		}
	}
}

func TestUnknownBoardNamesThoseThereAre(t *testing.T) {
	_, err := Get("toaster")
	if !errors.Is(err, ErrUnknown) || !strings.Contains(err.Error(), "qemu-x86_64") {
		t.Errorf("Get = %v; want ErrUnknown and the boards there are", err)
	}
}

const goodBoard = `name: b
description: A board
arch: amd64
consoles: [ttyS0]
boot: {firmware: [bios, uefi], efi-name: BOOTX64.EFI}
kernel:
  arch: x86_64
  image: arch/x86/boot/bzImage
  fragments: [shared/a.config, b/k.config]
  files: 10
qemu: {binary: qemu-system-x86_64, machine: q35, accel: [tcg], memory-mib: 64}
`

// withBoard is a boards folder with one board, whose file has old replaced by
// new.
func withBoard(old, new string) fs.FS {
	return fstest.MapFS{
		"shared/a.config": {Data: []byte("CONFIG_A=y\nCONFIG_B=y\n")},
		"b/k.config":      {Data: []byte("# CONFIG_B is not set\n")},
		"b/board.yaml":    {Data: []byte(strings.Replace(goodBoard, old, new, 1))},
	}
}

func TestBoardsOwnFragmentOverrides(t *testing.T) {
	b, err := get(withBoard("", ""), "b")
	if err != nil {
		t.Fatal(err)
	}
	f, err := b.KernelConfig()
	if err != nil {
		t.Fatal(err)
	}
	if got, want := string(f.Bytes()), "CONFIG_A=y\n# CONFIG_B is not set\n"; got != want {
		t.Errorf("configuration = %q; want %q", got, want)
	}
}

func TestSerial(t *testing.T) {
	for want, consoles := range map[string][]string{
		"ttyS0": {"ttyS0", "tty0"}, "ttyAMA0": {"tty0", "ttyAMA0"}, "hvc0": {"tty", "hvc0", "ttyS1"}, "": {"tty0", "tty12"},
	} {
		if got := (Board{Consoles: consoles}).Serial(); got != want {
			t.Errorf("Serial of %q = %q; want %q", consoles, got, want)
		}
	}
}

func TestBadBoards(t *testing.T) {
	for _, c := range []struct{ old, new, want string }{
		{"arch: amd64", "arch: vax", `"vax" is neither`},
		{"name: b", "name: c", "its folder"},
		{"files: 10", "files: 0", "kernel.files"},
		{"files: 10", "fils: 10", "fils"}, // unknown key, with its place
		{"b/k.config", "b/missing.config", "missing.config"},
		{"arch/x86/boot/bzImage", "/etc/passwd", "kernel.image"},
		{"[tcg]", "[xen]", "qemu.accel"},
		{"[ttyS0]", "[]", "consoles"},
		{"[ttyS0]", "['ttyS0 init=/x']", "consoles"},
		{"[ttyS0]", "[tty0, tty1]", "serial"},
		{"[bios, uefi]", "[]", "boot.firmware"},
		{"[bios, uefi]", "[openfirmware]", "openfirmware"},
		{"[bios, uefi]", "[uefi, uefi]", "twice"},
		{"[bios, uefi]", "[bios]", "boot.efi-name"}, // that nothing reads
		{"BOOTX64.EFI", "BOOTIA32.EFI", "BOOTX64.EFI"},
		{"arch: amd64", "arch: arm64", "bios"},
		{"memory-mib: 64", "memory-mib: 1", "qemu.memory-mib"},
	} {
		_, err := get(withBoard(c.old, c.new), "b")
		if err == nil || !strings.Contains(err.Error(), c.want) || !strings.Contains(err.Error(), "b/board.yaml") {
			t.Errorf("with %q: %v; want an error that names the file and %q", c.new, err, c.want)
		}
	}
}
