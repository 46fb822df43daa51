package qemu

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"slices"
	"strconv"
	"strings"
)

// Machine is a machine type of QEMU. The zero value is invalid.
type Machine string

// The machine types.
const (
	// Q35 is a PC with PCI Express: the nearest to a real board, and the one to
	// use unless half a second of boot time counts.
	Q35 Machine = "q35"
	// MicroVM has virtio over MMIO, no PCI, and a firmware that only loads the
	// kernel. Under TCG it has no power button and cannot power itself off.
	MicroVM Machine = "microvm"
	// Virt is QEMU's 64-bit Arm machine, which resembles no board but has PCI
	// Express, a PL011 console, and UEFI with ACPI.
	Virt Machine = "virt"
)

// Accel is how the guest's instructions are executed. The zero value is invalid;
// [ChooseAccel] finds the right one.
type Accel string

// The accelerators.
const (
	KVM Accel = "kvm"
	TCG Accel = "tcg"
)

// NIC is a virtio network card on a switch port.
type NIC struct {
	MAC    net.HardwareAddr
	Socket string // path of a listening unix stream socket
}

// Config is a virtual machine.
type Config struct {
	// Name is used in logs and file names: letters, digits, '-', '_' and '.'.
	Name    string
	Machine Machine
	Accel   Accel
	// Binary is the program; empty means qemu-system-x86_64 from the path, for
	// Virt qemu-system-aarch64.
	Binary string

	// Firmware is what runs first; empty means QEMU's own choice.
	Firmware Firmware
	// Vars is a file with the UEFI variables of a new machine (boot entries,
	// Secure Boot keys); empty means Debian's, without any. The machine gets a
	// copy of its own in Dir and keeps it for later starts.
	Vars string
	// Kernel is a bzImage, for Virt an Image, that is loaded without a boot
	// medium. Without it the firmware boots Disks, in order, and then the
	// network if NetBoot is set.
	Kernel  string
	Initrd  string
	Cmdline string
	Disks   []Disk
	NetBoot NetBoot

	MemoryMB int // 0 means 256
	CPUs     int // 0 means 1
	NICs     []NIC
	// Extra arguments go last.
	Extra []string
	// NoReboot makes a guest's reboot end the machine instead.
	NoReboot bool

	// Dir is an existing private directory for the control socket.
	Dir string
	// ConsoleLog is a file to which the console's bytes are appended; empty
	// means none.
	ConsoleLog string
	// OnLine is called for every line of the console, in order, on a goroutine
	// of the machine. While it runs the guest's console waits: it must be quick.
	OnLine func(Line)
	// OnEvent is called for every event of QEMU's monitor (RESET, SHUTDOWN,
	// WATCHDOG, …). It must be quick and must not use the monitor.
	OnEvent func(Event)
	// Log may be nil.
	Log *slog.Logger
}

func (c Config) withDefaults() Config {
	if c.Binary == "" {
		c.Binary, _ = c.Machine.Emulator()
	}
	if c.MemoryMB == 0 {
		c.MemoryMB = 256
	}
	if c.CPUs == 0 {
		c.CPUs = 1
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	return c
}

// Validate reports what is wrong with a configuration. It does not look at the
// file system.
func (c Config) Validate() error {
	name := strings.Trim(c.Name, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_.")
	switch {
	case c.Name == "" || name != "" || c.Name[0] == '.':
		return fmt.Errorf("machine name %q: want letters, digits, '-', '_' and '.'", c.Name)
	case c.Machine != MicroVM && c.Machine != Q35 && c.Machine != Virt:
		return fmt.Errorf("machine type %q: want %s, %s or %s", c.Machine, Q35, MicroVM, Virt)
	case c.Accel != KVM && c.Accel != TCG:
		return fmt.Errorf("accelerator %q: want %s or %s", c.Accel, KVM, TCG)
	case c.Accel == KVM && c.Machine.Foreign():
		return fmt.Errorf("accelerator %s: machine %s has another architecture than this computer", c.Accel, c.Machine)
	case c.Kernel == "" && (c.Initrd != "" || c.Cmdline != ""):
		return errors.New("an initrd or a command line needs a kernel")
	case c.MemoryMB < 0 || c.CPUs < 0:
		return errors.New("negative memory or number of CPUs")
	case c.Dir == "":
		return errors.New("no directory for the control socket")
	}
	if err := c.validateFirmware(); err != nil {
		return err
	}
	for i, d := range c.Disks {
		if err := d.validate(c.Machine); err != nil {
			return fmt.Errorf("disk %d: %w", i, err)
		}
	}
	for i, n := range c.NICs {
		if len(n.MAC) != 6 || n.MAC[0]&1 != 0 {
			return fmt.Errorf("NIC %d: %q is not a unicast MAC address", i, n.MAC)
		}
		if n.Socket == "" {
			return fmt.Errorf("NIC %d: no socket", i)
		}
	}
	// A comma in an option's value starts the next option; QEMU wants it twice.
	// That would be easy for us and hard to read back, so no path has one.
	for _, p := range c.optionPaths() {
		if strings.Contains(p, ",") {
			return fmt.Errorf("path %q: QEMU does not take a comma", p)
		}
	}
	return nil
}

// optionPaths are the paths that become part of an option's value.
func (c Config) optionPaths() []string {
	s := []string{c.Dir}
	for _, n := range c.NICs {
		s = append(s, n.Socket)
	}
	for _, d := range c.Disks {
		s = append(s, d.Path)
	}
	return s
}

// Args are the arguments for the QEMU binary. The console is QEMU's standard
// output; the control connection is made to a listening socket in Dir.
func (c Config) Args() []string {
	c = c.withDefaults()
	a := []string{
		"-name", c.Name,
		"-nodefaults", "-no-user-config", "-display", "none",
		"-machine", c.machine(),
		"-accel", string(c.Accel),
		"-cpu", c.cpu(),
		"-smp", strconv.Itoa(c.CPUs),
		"-m", strconv.Itoa(c.MemoryMB) + "M",
		"-chardev", "stdio,id=console,signal=off",
		"-serial", "chardev:console",
		"-chardev", "socket,id=qmp,server=off,path=" + c.qmpSocket(),
		"-mon", "chardev=qmp,mode=control",
	}
	bus := "pci"
	if c.Machine == MicroVM {
		bus = "device"
	}
	a = append(a, "-device", "virtio-rng-"+bus)
	a = append(a, c.bootArgs()...)
	for i, n := range c.NICs {
		device := fmt.Sprintf("virtio-net-%s,id=nic%d,netdev=net%d,mac=%s", bus, i, i, n.MAC)
		if c.Machine != MicroVM {
			device += ",romfile=" + c.rom()
		}
		if c.NetBoot != NoNetBoot {
			device += fmt.Sprintf(",bootindex=%d", len(c.Disks)+i)
		}
		a = append(a,
			"-netdev", fmt.Sprintf("stream,id=net%d,server=off,addr.type=unix,addr.path=%s", i, n.Socket),
			"-device", device)
	}
	if c.Kernel != "" {
		a = append(a, "-kernel", c.Kernel)
	}
	if c.Initrd != "" {
		a = append(a, "-initrd", c.Initrd)
	}
	if c.Cmdline != "" {
		a = append(a, "-append", c.Cmdline)
	}
	if c.NoReboot {
		a = append(a, "-no-reboot")
	}
	return append(a, c.Extra...)
}

func (c Config) machine() string {
	// With ACPI a microvm is "hardware-reduced": the kernel then looks for no
	// 8254 timer, and under TCG there is no other, so it hangs while it
	// calibrates. Without ACPI it uses the 8254 and boots.
	if c.Machine == MicroVM && c.Accel == TCG {
		return "microvm,acpi=off"
	}
	if c.Machine == Virt {
		return "virt,gic-version=3" // as servers have; 2 ends at 8 processors
	}
	if c.Firmware == SecureUEFI {
		return string(c.Machine) + ",smm=on"
	}
	return string(c.Machine)
}

func (c Config) cpu() string {
	if c.Accel == KVM {
		return "host"
	}
	if c.Machine == Virt {
		return "cortex-a72" // "max" spends much of its time on pointer authentication
	}
	return "max"
}

func (c Config) qmpSocket() string { return c.Dir + "/" + c.Name + ".qmp" }

// Command is the exact command line, quoted for a POSIX shell. To run it by hand
// somebody must listen on its sockets.
func (c Config) Command() string {
	words := append([]string{c.withDefaults().Binary}, c.Args()...)
	for i, w := range words {
		words[i] = quote(w)
	}
	return strings.Join(words, " ")
}

func quote(w string) string {
	safe := func(r rune) bool {
		return r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || strings.ContainsRune("-_./,:=+@%", r)
	}
	if w != "" && !slices.ContainsFunc([]rune(w), func(r rune) bool { return !safe(r) }) {
		return w
	}
	return "'" + strings.ReplaceAll(w, "'", `'\''`) + "'"
}
