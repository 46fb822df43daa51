package lab

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"strings"

	"clonecluster/qemu"
	"clonecluster/qemu/nethost"
	"clonecluster/qemu/vswitch"
)

// Config is a laboratory.
type Config struct {
	// Nodes are the machines, in order.
	Nodes []Node
	// ManualStart leaves the nodes off; start them one by one.
	ManualStart bool

	Machine qemu.Machine // empty means q35
	// Accel is the accelerator; empty means that a trial finds it, whose outcome
	// is kept in CacheDir.
	Accel    qemu.Accel
	CacheDir string

	// Kernel is the bzImage of every node that has no Boot of its own, and Initrd
	// the files that make up its initramfs, joined in order.
	Kernel   string
	Initrd   []string
	Cmdline  string // of every node with a kernel; under TCG on q35, tsc=unstable is added
	MemoryMB int    // of every node; 0 means 256
	CPUs     int    // of every node; 0 means 1
	Extra    []string

	// Switch is what all are connected to. Its Guard should have the clone MAC.
	Switch vswitch.Config
	// PCAP is a file for a capture (pcapng) of every frame that crosses the
	// switch; empty means none. Not together with Switch.Mirror.
	PCAP string
	// Client is the client host, on port "client"; nil means none.
	Client   *nethost.Config
	Forwards []Forward

	// Dir is where console logs (NAME.console.log) are written. Empty means a
	// temporary folder that Close removes.
	Dir string
	// OnEvent is called for everything that happens, one call at a time. It must
	// be quick and must not call the lab.
	OnEvent func(Event)
	// Log may be nil.
	Log *slog.Logger
}

// Node is one machine.
type Node struct {
	Name    string // of letters, digits, '-', '_' and '.'; also its port's name
	MAC     net.HardwareAddr
	Cmdline string   // added to the kernel command line, if it is QEMU that gives the kernel
	Extra   []string // added to QEMU's arguments
	// Boot is how this node boots; nil means by the lab's Kernel and Initrd.
	Boot *Boot
}

// Boot is how one node boots, as [qemu.Config] explains it field by field. So
// nodes of one laboratory can come up by a stick, from the network and by a kernel
// given directly, and even on another architecture.
type Boot struct {
	Machine  qemu.Machine // empty means the lab's
	Firmware qemu.Firmware
	Vars     string
	Kernel   string // empty means that the firmware finds one
	Initrd   []string
	Disks    []qemu.Disk
	NetBoot  qemu.NetBoot
	MemoryMB int // 0 means the lab's
}

// Forward carries TCP from an address of this computer into the segment, through
// the client host.
type Forward struct {
	Listen string // "127.0.0.1:8080"; port 0 takes a free one
	To     netip.AddrPort
}

// Validate reports what is wrong with a configuration. It does not look at the
// file system.
func (c Config) Validate() error {
	switch {
	case len(c.Nodes) == 0:
		return errors.New("lab: no nodes")
	case len(c.Nodes) > 64:
		return fmt.Errorf("lab: %d nodes; at most 64", len(c.Nodes))
	case c.Kernel == "" && slices.ContainsFunc(c.Nodes, func(n Node) bool { return n.Boot == nil }) && (c.Cmdline != "" || len(c.Initrd) > 0):
		return errors.New("lab: no kernel")
	case c.Accel != "" && c.Accel != qemu.KVM && c.Accel != qemu.TCG:
		return fmt.Errorf("lab: accelerator %q: want %s or %s, or nothing", c.Accel, qemu.KVM, qemu.TCG)
	case c.PCAP != "" && c.Switch.Mirror != nil:
		return errors.New("lab: a capture file and a mirror of the switch at once")
	case len(c.Forwards) > 0 && c.Client == nil:
		return errors.New("lab: forwards need a client host")
	}
	names, macs := map[string]bool{clientPort: true}, map[string]bool{}
	if c.Client != nil {
		if err := c.Client.Validate(); err != nil {
			return err
		}
		macs[c.Client.MAC.String()] = true
	}
	for i, n := range c.Nodes {
		if names[n.Name] {
			return fmt.Errorf("lab: the name %q is taken twice", n.Name)
		}
		if macs[n.MAC.String()] {
			return fmt.Errorf("lab: the address %v is taken twice", n.MAC)
		}
		names[n.Name], macs[n.MAC.String()] = true, true
		if b := c.boot(i); b.Kernel == "" && len(b.Initrd) > 0 {
			return fmt.Errorf("lab: node %d: an initramfs needs a kernel", i)
		}
		if err := c.machine(i, "/", "/").Validate(); err != nil {
			return fmt.Errorf("lab: node %d: %w", i, err)
		}
	}
	for _, f := range c.Forwards {
		if !f.To.IsValid() || f.To.Port() == 0 {
			return fmt.Errorf("lab: forward from %s has no target", f.Listen)
		}
	}
	return c.Switch.Validate()
}

// boot is how node i boots.
func (c Config) boot(i int) Boot {
	b := Boot{Kernel: c.Kernel, Initrd: c.Initrd}
	if c.Nodes[i].Boot != nil {
		b = *c.Nodes[i].Boot
	}
	if b.Machine == "" {
		b.Machine = c.Machine
	}
	if b.Machine == "" {
		b.Machine = qemu.Q35
	}
	if b.MemoryMB == 0 {
		b.MemoryMB = c.MemoryMB
	}
	return b
}

// allForeign says whether every node can only be emulated.
func (c Config) allForeign() bool {
	for i := range c.Nodes {
		if !c.boot(i).Machine.Foreign() {
			return false
		}
	}
	return true
}

// machine is the configuration of one node's virtual machine. Of its initramfs it
// only knows whether there is one.
func (c Config) machine(i int, dir, socket string) qemu.Config {
	n, b := c.Nodes[i], c.boot(i)
	m := qemu.Config{
		Name:     n.Name,
		Machine:  b.Machine,
		Accel:    c.Accel,
		Firmware: b.Firmware,
		Vars:     b.Vars,
		Kernel:   b.Kernel,
		Disks:    b.Disks,
		NetBoot:  b.NetBoot,
		MemoryMB: b.MemoryMB,
		CPUs:     c.CPUs,
		NICs:     []qemu.NIC{{MAC: n.MAC, Socket: socket}},
		Extra:    slices.Concat(c.Extra, n.Extra),
		Dir:      dir,
		Log:      c.Log,
	}
	if m.Accel == "" || m.Machine.Foreign() {
		m.Accel = qemu.TCG
	}
	if b.Kernel == "" {
		return m
	}
	words := []string{c.Cmdline, n.Cmdline}
	if m.Accel == qemu.TCG && m.Machine == qemu.Q35 {
		// On a busy computer the kernel may measure the TSC against an emulated
		// timer that is late, and then its clock runs at a wrong speed (up to 2.4
		// times was seen). The HPET, which it then uses, is always right, and costs
		// up to half as much CPU time again for small requests.
		words = append(words, "tsc=unstable")
	}
	m.Cmdline = strings.Join(slices.DeleteFunc(words, func(w string) bool { return w == "" }), " ")
	return m
}

// Demo is a laboratory of n nodes in the demonstration network: 10.77.0.0/24 and
// fd77::/64, the client host with .1 and ::1 (and eight more addresses to spread
// its flows), which also serves DHCP, and the VIP's addresses VIP4 and VIP6. It
// lacks a kernel and an initramfs.
func Demo(n int) Config {
	c := Config{
		Cmdline: "console=ttyS0 quiet panic=10",
		Switch:  vswitch.Config{Guard: []net.HardwareAddr{{0x02, 0xcc, 10, 77, 0, 10}}},
		Client: &nethost.Config{
			MAC:   net.HardwareAddr{0x52, 0x54, 0, 0x77, 0xff, 1},
			Addrs: []netip.Prefix{netip.MustParsePrefix("10.77.0.1/24"), netip.MustParsePrefix("fd77::1/64")},
			DHCP:  &nethost.DHCP{First: netip.MustParseAddr("10.77.0.100"), Last: netip.MustParseAddr("10.77.0.199")},
		},
	}
	for i := range 8 {
		c.Client.Addrs = append(c.Client.Addrs, netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 77, 0, byte(21 + i)}), 24))
	}
	for i := range n {
		c.Nodes = append(c.Nodes, Node{
			Name: fmt.Sprintf("node%d", i+1),
			MAC:  net.HardwareAddr{0x52, 0x54, 0, 0x77, byte((i + 1) >> 8), byte(i + 1)},
		})
	}
	return c
}

// The VIP of the demonstration network.
var (
	VIP4 = netip.MustParseAddr("10.77.0.10")
	VIP6 = netip.MustParseAddr("fd77::10")
)
