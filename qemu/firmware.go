package qemu

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
)

// Firmware is what a machine runs before anything else. All of it is Debian's:
// what boots here has been booted by programs that nobody here wrote.
type Firmware string

// The firmware kinds.
const (
	// DefaultFirmware is what QEMU takes by itself: SeaBIOS on a PC, and nothing
	// on virt, where QEMU puts the kernel into memory and jumps to it.
	DefaultFirmware Firmware = ""
	// BIOS is SeaBIOS, by name: boots disks by their boot sector and NICs by the
	// iPXE in their option ROM.
	BIOS Firmware = "bios"
	// UEFI is OVMF on q35 and its sister for Arm on virt. It boots disks, NICs,
	// and a kernel that is given directly.
	UEFI Firmware = "uefi"
	// SecureUEFI is an OVMF that can do Secure Boot and guards its variables by
	// SMM. It enforces what the variables in Config.Vars enrol.
	SecureUEFI Firmware = "uefi-secure"
)

// NetBoot is how a machine boots from the network.
type NetBoot string

// The ways to boot from the network. Which of IPv4 and IPv6 a firmware tries, and
// in what order, is its own choice.
const (
	NoNetBoot NetBoot = ""
	PXE       NetBoot = "pxe"  // DHCP and TFTP; under BIOS by the iPXE of QEMU's option ROM
	HTTPBoot  NetBoot = "http" // DHCP and HTTP; UEFI only
)

// Bus is how a disk is connected. The zero value is invalid.
type Bus string

// The buses.
const (
	USB    Bus = "usb"    // a removable USB stick on an xHCI controller
	Virtio Bus = "virtio" // virtio-blk
	SATA   Bus = "sata"   // a disk on AHCI; q35 only
)

// Disk is a disk of a machine. Disks come before the network in the boot order.
type Disk struct {
	Path string // of a raw image; several machines may share one that none writes to
	Bus  Bus
	// ReadOnly refuses the guest's writes, Snapshot takes them and forgets them
	// when QEMU ends. One of the two at most.
	ReadOnly, Snapshot bool
}

func (d Disk) validate(m Machine) error {
	switch {
	case d.Path == "":
		return errors.New("no path")
	case m == MicroVM:
		return errors.New("a microvm boots no disks: use q35")
	case d.Bus == SATA && m != Q35:
		return fmt.Errorf("machine %s has no SATA", m)
	case d.Bus != USB && d.Bus != Virtio && d.Bus != SATA:
		return fmt.Errorf("bus %q: want %s, %s or %s", d.Bus, USB, Virtio, SATA)
	case d.ReadOnly && d.Snapshot:
		return errors.New("both read-only and a snapshot")
	case d.Bus == SATA && d.ReadOnly:
		return errors.New("a SATA disk cannot be read-only: take a snapshot")
	}
	return nil
}

// firmwareFiles are the files of a firmware and the Debian package that has them.
type firmwareFiles struct{ code, vars, pkg string }

var firmwares = map[Machine]map[Firmware]firmwareFiles{
	Q35: {
		UEFI:       {"/usr/share/OVMF/OVMF_CODE_4M.fd", "/usr/share/OVMF/OVMF_VARS_4M.fd", "ovmf"},
		SecureUEFI: {"/usr/share/OVMF/OVMF_CODE_4M.secboot.fd", "/usr/share/OVMF/OVMF_VARS_4M.fd", "ovmf"},
	},
	Virt: {
		UEFI: {"/usr/share/AAVMF/AAVMF_CODE.fd", "/usr/share/AAVMF/AAVMF_VARS.fd", "qemu-efi-aarch64"},
	},
}

// biosPXE is the option ROM by which SeaBIOS boots from the network: QEMU's default.
// It is not given as romfile: only in its default ROM does QEMU write the device's
// identity, without which SeaBIOS does not run it.
const biosPXE = "/usr/lib/ipxe/qemu/efi-virtio.rom"

func (c Config) validateFirmware() error {
	_, uefi := firmwares[c.Machine][c.Firmware]
	switch {
	case c.Firmware != DefaultFirmware && c.Firmware != BIOS && c.Firmware != UEFI && c.Firmware != SecureUEFI:
		return fmt.Errorf("firmware %q: want %s, %s, %s or nothing", c.Firmware, BIOS, UEFI, SecureUEFI)
	case c.Firmware == BIOS && c.Machine != Q35:
		return fmt.Errorf("firmware %s: machine %s has none", c.Firmware, c.Machine)
	case c.Firmware != DefaultFirmware && c.Firmware != BIOS && !uefi:
		return fmt.Errorf("firmware %s: there is none for machine %s", c.Firmware, c.Machine)
	case c.Vars != "" && !uefi:
		return errors.New("firmware variables are for UEFI only")
	case c.NetBoot != NoNetBoot && c.NetBoot != PXE && c.NetBoot != HTTPBoot:
		return fmt.Errorf("network boot %q: want %s, %s or nothing", c.NetBoot, PXE, HTTPBoot)
	case c.NetBoot != NoNetBoot && c.Kernel != "":
		return errors.New("network boot and a kernel at once: the kernel would always win")
	case c.NetBoot != NoNetBoot && len(c.NICs) == 0:
		return errors.New("network boot needs a NIC")
	case c.NetBoot != NoNetBoot && !uefi && c.Machine != Q35:
		return fmt.Errorf("network boot: machine %s without UEFI cannot", c.Machine)
	case c.NetBoot == HTTPBoot && !uefi:
		return errors.New("HTTP boot needs UEFI")
	}
	return nil
}

// VarsFile is the machine's own copy of the firmware's variables. It stays as long
// as Dir, as the flash of a real machine does, over resets and power failures; it
// may become Vars of other machines.
func (c Config) VarsFile() string { return filepath.Join(c.Dir, c.Name+".vars") }

// prepareFirmware checks that all files are there and makes the machine's copy of
// the variables, unless it has one.
func (c Config) prepareFirmware() error {
	if c.NetBoot == PXE && c.rom() != "" {
		if err := installed(c.rom(), "ipxe-qemu"); err != nil {
			return err
		}
	}
	f, ok := firmwares[c.Machine][c.Firmware]
	if !ok {
		return nil
	}
	if err := installed(f.code, f.pkg); err != nil {
		return err
	}
	from := c.Vars
	if from == "" {
		from = f.vars
		if err := installed(from, f.pkg); err != nil {
			return err
		}
	}
	if _, err := os.Stat(c.VarsFile()); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	b, err := os.ReadFile(from)
	if err != nil {
		return fmt.Errorf("reading firmware variables: %w", err)
	}
	// By rename: half a copy would be taken for the machine's own next time.
	tmp := c.VarsFile() + ".new"
	if err := os.WriteFile(tmp, b, 0o600); err != nil {
		return err
	}
	return os.Rename(tmp, c.VarsFile())
}

func installed(file, pkg string) error {
	if _, err := os.Stat(file); err != nil {
		return fmt.Errorf("firmware: %w (Debian: apt-get install %s)", err, pkg)
	}
	return nil
}

// FirmwareInstalled says what is missing to run a firmware on a machine type: an
// error that names the Debian package, nil if nothing is.
func FirmwareInstalled(m Machine, f Firmware) error {
	files, ok := firmwares[m][f]
	if !ok {
		return nil
	}
	return errors.Join(installed(files.code, files.pkg), installed(files.vars, files.pkg))
}

// rom is the option ROM that the NICs need, QEMU's default; empty means that they
// get none: UEFI has a driver and a network stack of its own, and a ROM only costs
// time where nobody boots by it.
func (c Config) rom() string {
	if _, uefi := firmwares[c.Machine][c.Firmware]; c.NetBoot == PXE && !uefi {
		return biosPXE
	}
	return ""
}

// bootArgs are the arguments for firmware, disks and network boot, but not those
// of the NICs.
func (c Config) bootArgs() []string {
	var a []string
	if f, ok := firmwares[c.Machine][c.Firmware]; ok {
		a = append(a,
			"-drive", "if=pflash,unit=0,format=raw,readonly=on,file="+f.code,
			"-drive", "if=pflash,unit=1,format=raw,file="+c.VarsFile())
		if c.Firmware == SecureUEFI {
			// The variables can be written from SMM only; S3 would be a way
			// around that (OVMF's README).
			a = append(a, "-global", "driver=cfi.pflash01,property=secure,value=on", "-global", "ICH9-LPC.disable_s3=1")
		}
		if c.NetBoot == HTTPBoot {
			// OVMF tries PXE before HTTP, and waits long for who does not answer.
			a = append(a,
				"-fw_cfg", "name=opt/org.tianocore/IPv4PXESupport,string=no",
				"-fw_cfg", "name=opt/org.tianocore/IPv6PXESupport,string=no")
		}
	}
	usb := false
	for i, d := range c.Disks {
		drive := fmt.Sprintf("if=none,id=disk%d,format=raw,file=%s", i, d.Path)
		if d.ReadOnly {
			drive += ",readonly=on"
		}
		if d.Snapshot {
			drive += ",snapshot=on"
		}
		device := map[Bus]string{USB: "usb-storage,removable=on", Virtio: "virtio-blk-pci", SATA: "ide-hd"}[d.Bus]
		if d.Bus == USB && !usb {
			usb = true
			a = append(a, "-device", "qemu-xhci")
		}
		a = append(a, "-drive", drive, "-device", fmt.Sprintf("%s,drive=disk%d,bootindex=%d", device, i, i))
	}
	return a
}

// Arch is the architecture of a machine type, as Go says it.
func (m Machine) Arch() string {
	if m == Virt {
		return "arm64"
	}
	return "amd64"
}

// Foreign says whether this computer can only emulate the machine type, because
// its processor is of another architecture.
func (m Machine) Foreign() bool { return m.Arch() != runtime.GOARCH }

// Emulator is the program that runs the machine type, and the Debian package that
// has it.
func (m Machine) Emulator() (program, pkg string) {
	if m == Virt {
		return "qemu-system-aarch64", "qemu-system-arm"
	}
	return "qemu-system-x86_64", "qemu-system-x86"
}
