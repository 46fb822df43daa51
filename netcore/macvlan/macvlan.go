// Package macvlan is the datapath in which the kernel does all the work: clone0 is a
// macvlan on the NIC with the clone MAC and the VIP, a BPF program on the NIC lets this
// node's share of the frames in, and what the kernel sends by clone0 leaves with the
// NIC's own address as its Ethernet source. There are two ways to that last:
//
//   - native: a kernel with wire addresses (image/kernel/patches) builds the headers
//     right;
//   - bpf: a program at clone0's egress rewrites them.
//
// In both a guard on the NIC catches what should still leave with the clone MAC, and
// counts it. The programs and the table are pinned: a dying engine leaks nothing, its
// established connections go on, the lease ends and with it what is new, and the next
// engine takes all of it up between two frames.
//
// There is no queue of frames between the wire and the filter, so what a node gains
// counts at once: the word of the other nodes comes by the same queue of the NIC as the
// frames from before it.
//
// Sources: the kernel's macvlan.c and tcx.c, ip-sysctl.rst.
package macvlan

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"

	"github.com/vishvananda/netlink"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"clonecluster/netcore/bpf"
	"clonecluster/netcore/clone"
	"clonecluster/netcore/delayed"
	"clonecluster/netcore/filter"
	"clonecluster/netcore/neigh"
	"clonecluster/netcore/raw"
)

// Config is what a Datapath connects.
type Config struct {
	clone.Config // but for Kind
	Filter       filter.Config
	// WireAddress: the kernel gives the frames their source (native).
	WireAddress bool
	// XDP: frames are judged in the NIC's driver.
	XDP bool
	// Pins is a folder on a BPF file system for what outlives the engine.
	Pins string
	// Now is the filter's clock: CLOCK_MONOTONIC in nanoseconds.
	Now func() int64
	// WireMACChanged, if set, is told when the NIC's address changes.
	WireMACChanged func(net.HardwareAddr)
	// CarrierChanged, if set, is told when the NIC gets or loses its carrier.
	CarrierChanged func(bool)
}

// Counters are what the datapath counts beyond the filter's verdicts.
type Counters struct {
	Guarded       uint64 // frames that were about to leave with the clone MAC as their source
	SendErrors    uint64 // announcements, delayed RSTs and, in directed mode, frames of others that could not be sent
	RxKernelDrops uint64 // frames of others, in directed mode, that the kernel had no room for in the socket
}

// Datapath is one open datapath. Open makes it, Run keeps it, and one of Close and
// Abandon ends it.
type Datapath struct {
	cfg    Config
	host   *clone.Host
	filter *bpf.Filter
	left   bool // by a former engine
	tx     int  // packet socket
	in     atomic.Pointer[bpf.Hook]

	responder atomic.Pointer[neigh.Responder]
	relay     atomic.Pointer[raw.Relay] // nil: the network floods
	drops     struct {
		sync.Mutex
		before uint64 // of the relays before this one
	}
	late       *delayed.Resets
	sendErrors atomic.Uint64
}

// wireAddress is where a kernel that has them keeps the wire address of an interface.
const wireAddress = "/sys/class/net/" + clone.Device + "/wire_address"

// Open sets the machine up and returns with clone0 up, the VIP on it, and the programs
// in place with all buckets Foreign, or as a former engine has left them. On an error
// everything is as it was before, which is the clone0 of a crashed engine if there was
// one.
func Open(cfg Config) (_ *Datapath, err error) {
	cfg.Kind = clone.Macvlan
	d := &Datapath{cfg: cfg, tx: -1}
	if err := bpf.CheckPins(cfg.Pins); err != nil {
		return nil, err
	}
	if d.host, d.left, err = clone.Claim(cfg.Config); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, d.Undo())
		}
	}()
	d.filter, err = bpf.Load(bpf.Options{Filter: cfg.Filter, WireMAC: [6]byte(cfg.NIC.MAC), Rewrite: !cfg.WireAddress, Pins: cfg.Pins, Anew: !d.left})
	if err != nil {
		return nil, err
	}
	d.late = delayed.New(d.filter, cfg.Now)
	if err := d.setResponder(cfg.NIC.MAC); err != nil {
		return nil, err
	}
	// First what catches a clone0 that somebody sets up before it is ready.
	if err := d.filter.AttachGuard(cfg.NIC.Index); err != nil {
		return nil, err
	}
	if !d.left {
		if err := bpf.DetachClsact(cfg.NIC.Index); err != nil { // of a former NIC
			return nil, err
		}
		if err := d.addClone(); err != nil {
			return nil, err
		}
	}
	if err := d.host.SetUp(d.attach); err != nil {
		return nil, err
	}
	if err := d.filter.Undirect(); err != nil { // of a former engine, which had others around it
		return nil, err
	}
	return d, d.openSender()
}

// addClone makes clone0, which is down. Private: another macvlan on the NIC has no way to
// it past the filter.
func (d *Datapath) addClone() error {
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.ParentIndex, attrs.HardwareAddr, attrs.Group = clone.Device, d.cfg.NIC.Index, d.cfg.CloneMAC[:], clone.Group
	if err := netlink.LinkAdd(&netlink.Macvlan{LinkAttrs: attrs, Mode: netlink.MACVLAN_MODE_PRIVATE}); err != nil {
		return fmt.Errorf("adding %s as a macvlan on %s: %w", clone.Device, d.cfg.NIC.Name, err)
	}
	return nil
}

// attach is the last step before clone0 comes up: from then on whatever it sends has the
// right source, and whatever comes in is judged.
func (d *Datapath) attach(link netlink.Link) error {
	if d.cfg.WireAddress {
		if err := setWireAddress(d.cfg.NIC.MAC); err != nil {
			return err
		}
	}
	if _, err := d.filter.AttachClone(link.Attrs().Index); err != nil {
		return err
	}
	return d.judgeAt(d.cfg.XDP)
}

func setWireAddress(mac net.HardwareAddr) error {
	if err := os.WriteFile(wireAddress, []byte(mac.String()), 0); err != nil {
		return fmt.Errorf("setting the wire address of %s: %w", clone.Device, err)
	}
	return nil
}

func (d *Datapath) openSender() (err error) {
	if d.tx, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0); err != nil {
		return fmt.Errorf("opening a packet socket: %w", os.NewSyscallError("socket", err))
	}
	if err := unix.Bind(d.tx, &unix.SockaddrLinklayer{Ifindex: d.cfg.NIC.Index}); err != nil {
		return fmt.Errorf("opening a packet socket: %w", os.NewSyscallError("bind", err))
	}
	return nil
}

// Filter is the filter in the kernel.
func (d *Datapath) Filter() *bpf.Filter { return d.filter }

// Ingress is where the NIC's frames are judged now.
func (d *Datapath) Ingress() bpf.Hook { return *d.in.Load() }

// Close takes the node out: clone0 and the VIP are removed and the machine is left as it
// was before Open. Connections on the VIP end.
func (d *Datapath) Close() error {
	link, err := netlink.LinkByName(clone.Device)
	if err == nil {
		err = netlink.LinkDel(link)
	}
	if err != nil && !errors.As(err, &netlink.LinkNotFoundError{}) {
		d.Abandon() // as long as it is there, so are the programs that keep it harmless (I1)
		return fmt.Errorf("removing %s, which stays as it is until \"cloned clean\": %w", clone.Device, err)
	}
	return errors.Join(bpf.Forget(d.cfg.Pins), d.closeFiles(), d.host.Close())
}

// Undo takes back what Open did, when the engine cannot start. What a crashed engine
// left stays for the one that can: the connections go on.
func (d *Datapath) Undo() error {
	if d.left {
		d.Abandon()
		return nil
	}
	return d.Close()
}

// Abandon leaves everything in place, as a crash would.
func (d *Datapath) Abandon() {
	_ = d.closeFiles()
	d.host.Abandon()
}

func (d *Datapath) closeFiles() error {
	d.closeRelay()
	if d.tx >= 0 {
		_ = unix.Close(d.tx)
		d.tx = -1
	}
	if d.filter == nil {
		return nil
	}
	return d.filter.Close()
}

// WireMAC is the NIC's present address, the source of every frame.
func (d *Datapath) WireMAC() net.HardwareAddr { return d.responder.Load().WireMAC() }

func (d *Datapath) setResponder(mac net.HardwareAddr) error {
	r, err := neigh.New(neigh.Config{CloneMAC: d.cfg.CloneMAC, WireMAC: [6]byte(mac), VIP4: d.cfg.VIP4.Addr(), VIP6: d.cfg.VIP6.Addr()})
	if err != nil {
		return fmt.Errorf("preparing announcements: %w", err)
	}
	d.responder.Store(r)
	return nil
}

// wireMACChanged follows the NIC. Until it has, frames leave with the address that the
// NIC had, which is the clone MAC in no case (I1).
func (d *Datapath) wireMACChanged(mac net.HardwareAddr) error {
	if err := d.setResponder(mac); err != nil {
		return err
	}
	d.filter.SetWireMAC([6]byte(mac))
	if d.cfg.WireAddress {
		if err := setWireAddress(mac); err != nil {
			return err
		}
	}
	if d.cfg.WireMACChanged != nil {
		d.cfg.WireMACChanged(mac)
	}
	return nil
}

// Announce sends one gratuitous ARP and one unsolicited neighbour advertisement for the
// VIP. Every node announces the same binding, so clients cannot flap.
func (d *Datapath) Announce() error {
	announcements := d.responder.Load().Announcements
	if r := d.relay.Load(); r != nil {
		announcements = r.Announcements
	}
	frames, err := announcements()
	if err != nil {
		return fmt.Errorf("building announcements: %w", err)
	}
	for _, f := range frames {
		if err := d.send(f); err != nil {
			return fmt.Errorf("sending an announcement: %w", err)
		}
	}
	return nil
}

// send does not wait for room in the NIC's queue.
func (d *Datapath) send(frame []byte) error {
	err := unix.Send(d.tx, frame, unix.MSG_DONTWAIT)
	if err != nil {
		d.sendErrors.Add(1)
	}
	return err
}

// Run follows the NIC and sends the RSTs that had to wait, until ctx ends (nil) or the
// datapath is broken: the NIC was removed (nic.ErrRemoved), it was given the clone MAC
// (clone.ErrMACInUse), or clone0 was taken away. A link that goes down and comes back is
// not an error.
func (d *Datapath) Run(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		return d.host.Follow(ctx, clone.Events{Carrier: d.cfg.CarrierChanged, WireMAC: d.wireMACChanged})
	})
	g.Go(func() error {
		return d.filter.ReadLate(ctx, func(frame []byte) {
			if !d.late.Add(frame, 0) {
				d.filter.Discard()
			}
		})
	})
	g.Go(func() error { d.late.Run(ctx, d.sendLate); return nil })
	return g.Wait()
}

// Poke does nothing: no loop of this process moves frames.
func (d *Datapath) Poke() {}

// Alive is now: the kernel moves the frames.
func (d *Datapath) Alive() int64 { return d.cfg.Now() }

// AfterQueued calls do at once: no frame waits between the wire and the filter.
func (d *Datapath) AfterQueued(do func()) { do() }

// Counters gives the datapath's own counters.
func (d *Datapath) Counters() Counters {
	d.drops.Lock()
	defer d.drops.Unlock()
	c := Counters{Guarded: d.filter.Guarded(), SendErrors: d.sendErrors.Load(), RxKernelDrops: d.drops.before}
	if r := d.relay.Load(); r != nil {
		c.RxKernelDrops += r.Dropped()
	}
	return c
}

// sendLate sends a RST that has waited, from the wire MAC (I1).
func (d *Datapath) sendLate(frame []byte) {
	if complete(frame) {
		copy(frame[6:12], d.WireMAC())
		_ = d.send(frame)
	}
}

// complete computes the TCP checksum of a frame without VLAN tag, IPv4 options beyond
// its header, or IPv6 extension headers, of which the kernel leaves the last step to the
// NIC (RFC 9293, section 3.1).
func complete(frame []byte) bool {
	const ether = 14
	if len(frame) < ether+20 {
		return false
	}
	ip := frame[ether:]
	var addresses, tcp []byte
	switch binary.BigEndian.Uint16(frame[12:]) {
	case unix.ETH_P_IP:
		header, total := int(ip[0]&15)*4, int(binary.BigEndian.Uint16(ip[2:]))
		if header < 20 || total > len(ip) || header > total || ip[9] != unix.IPPROTO_TCP {
			return false
		}
		addresses, tcp = ip[12:20], ip[header:total]
	case unix.ETH_P_IPV6:
		if len(ip) < 40 || ip[6] != unix.IPPROTO_TCP {
			return false
		}
		total := 40 + int(binary.BigEndian.Uint16(ip[4:]))
		if total > len(ip) {
			return false
		}
		addresses, tcp = ip[8:40], ip[40:total]
	default:
		return false
	}
	if len(tcp) < 20 {
		return false
	}
	tcp[16], tcp[17] = 0, 0
	sum := uint32(unix.IPPROTO_TCP) + uint32(len(tcp))
	for _, part := range [][]byte{addresses, tcp} {
		for i, b := range part {
			if i%2 == 0 {
				sum += uint32(b) << 8
			} else {
				sum += uint32(b)
			}
		}
	}
	for sum>>16 != 0 {
		sum = sum&0xffff + sum>>16
	}
	binary.BigEndian.PutUint16(tcp[16:], ^uint16(sum))
	return true
}

// PinsOf is the folder for the pins of this network namespace below a BPF file system. It
// is named by the namespace's cookie, which until the next boot no other gets. The error
// is a *bpf.UnsupportedError on a kernel without cookies.
func PinsOf(bpffs string) (string, error) {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return "", fmt.Errorf("finding the network namespace: %w", os.NewSyscallError("socket", err))
	}
	defer unix.Close(fd)
	cookie, err := unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_NETNS_COOKIE)
	if err != nil {
		return "", &bpf.UnsupportedError{What: "cookies of network namespaces (SO_NETNS_COOKIE)", Since: "5.14", Err: os.NewSyscallError("getsockopt", err)}
	}
	return filepath.Join(bpffs, "clonecluster", fmt.Sprintf("net%d", cookie)), nil
}

// Forget takes back what an engine with this datapath has left in this network namespace
// that is no more. Clone0 has to be gone.
func Forget(bpffs string) error {
	pins, err := PinsOf(bpffs)
	if errors.Is(err, bpf.ErrUnsupported) {
		return nil // where it cannot have been
	}
	if err != nil {
		return err
	}
	return bpf.Forget(pins)
}

// ProbeWireAddress reports whether the kernel has wire addresses.
func ProbeWireAddress() error {
	const of = "/sys/class/net/lo/wire_address"
	if _, err := os.Stat(of); err != nil {
		return &bpf.UnsupportedError{What: "wire addresses (the patch of this project)", Err: err}
	}
	return nil
}
