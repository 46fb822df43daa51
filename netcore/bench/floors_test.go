package bench

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"net/netip"
	"os"
	"os/signal"
	"runtime"
	"runtime/debug"
	"strings"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"clonecluster/netcore/bpf"
	"clonecluster/netcore/clone"
	"clonecluster/netcore/filter"
	"clonecluster/netcore/macvlan"
	"clonecluster/netcore/netnstest"
)

// floors are ways that do nothing of what a cluster has to do, or only a part: nobody who
// goes the same way can have less than they cost. Some break I1: they are for beds that nobody
// watches.
func (m *measurer) floors() []plan {
	return []plan{
		{TwoPlain, m.twoPlain},
		{CopyFloor, m.copied("read")},
		{RingFloor, m.copied("ring")},
		{MacvlanFloor, m.bareMacvlan},
		{HashedMacvlan, m.hashedMacvlan},
		{NoEngine, m.noEngine},
		{OneDevice, m.oneDevice(false)},
		{OneJudged, m.oneDevice(true)},
	}
}

// knows gives the client the VIP's MAC, so that nobody has to answer for it.
func (w *way) knows() {
	w.client.Run("ip", "neigh", "replace", vip, "lladdr", net.HardwareAddr(cloneMAC[:]).String(), "dev", "eth0", "nud", "permanent")
}

// twoPlain are two servers with the VIP on lo, and a client that has routes to both of them,
// and for each connection takes one by its ports. So nothing lies between, and the machine
// has as much to run as with a cluster of two.
func (m *measurer) twoPlain(w *way, f files) error {
	for i := range 2 {
		m.server(w.bed, i+1, f).Run("ip", "addr", "add", vip+"/32", "dev", "lo")
	}
	if out, err := w.client.Try("ip", "route", "add", vip+"/32", "nexthop", "via", "10.77.0.101", "nexthop", "via", "10.77.0.102"); err != nil {
		return fmt.Errorf("a route with two ways: %s", strings.TrimSpace(out))
	}
	w.client.Sysctl("net.ipv4.fib_multipath_hash_policy", "1") // ports, too
	return nil
}

// copied is a server with the VIP on a TAP, and a process between that and the NIC.
func (m *measurer) copied(how string) func(*way, files) error {
	return func(w *way, f files) error {
		h := m.server(w.bed, 1, f)
		h.Start("copy", how).Await(0, "copy ready")
		h.Run("ip", "addr", "flush", "dev", "eth0")
		h.Run("ip", "link", "set", copyDevice, "address", net.HardwareAddr(cloneMAC[:]).String(), "up")
		h.Run("ip", "addr", "add", vip+"/24", "dev", copyDevice)
		w.knows()
		return nil
	}
}

const (
	copyDevice = "copy0"
	vnetHdrLen = 10                               // struct virtio_net_hdr
	copyFrame  = vnetHdrLen + 14 + math.MaxUint16 // what segmentation offload leaves in one piece
)

// copyProgram copies frames between the NIC and a TAP and looks at none. Each way has a
// thread, which waits in the system call that reads, and does not come by Go's scheduler. A
// virtio_net_hdr before each frame carries what the NICs' offloads leave undone. With "ring"
// the kernel writes what the NIC receives where this process can read it, and this one only
// asks for more when there is none.
func copyProgram(args []string) int {
	err := func() error {
		tap, err := openCopyDevice()
		if err != nil {
			return fmt.Errorf("the TAP: %w", err)
		}
		wire, ring, err := openWire(args[0] == "ring")
		if err != nil {
			return fmt.Errorf("the packet socket: %w", err)
		}
		runtime.GOMAXPROCS(4)
		debug.SetGCPercent(-1) // it would wait for the two forever
		failed := make(chan error)
		go func() { failed <- carry(tap, wire) }()
		go func() {
			if ring == nil {
				failed <- carry(wire, tap)
			} else {
				failed <- carryRing(ring, wire, tap)
			}
		}()
		fmt.Println("copy ready")
		return <-failed
	}()
	fmt.Println(err)
	return 1
}

func openCopyDevice() (int, error) {
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	req, err := unix.NewIfreq(copyDevice)
	if err != nil {
		return -1, err
	}
	req.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
	return fd, errors.Join(unix.IoctlIfreq(fd, unix.TUNSETIFF, req),
		unix.IoctlSetInt(fd, unix.TUNSETOFFLOAD, unix.TUN_F_CSUM|unix.TUN_F_TSO4|unix.TUN_F_TSO6|unix.TUN_F_TSO_ECN))
}

// A slot of the ring has room for the longest frame and what stands before it.
const (
	slots    = 128
	slotSize = 128 << 10
)

// openWire opens a packet socket on the NIC, with a ring (PACKET_RX_RING) or without.
// TPACKET_V3, of which a slot is as long as its frame, hands frames over in blocks, and the
// last of them after a millisecond: so it is V2.
func openWire(ringed bool) (fd int, ring []byte, err error) {
	ifi, err := net.InterfaceByName("eth0")
	if err != nil {
		return -1, nil, err
	}
	if fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0); err != nil {
		return -1, nil, err
	}
	for _, o := range []struct{ level, option, value int }{
		{unix.SOL_PACKET, unix.PACKET_VNET_HDR, 1},
		{unix.SOL_PACKET, unix.PACKET_IGNORE_OUTGOING, 1},
		{unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 8 << 20}, // as the engine's
		{unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, 4 << 20},
		{unix.SOL_PACKET, unix.PACKET_VERSION, unix.TPACKET_V2},
	} {
		if err := unix.SetsockoptInt(fd, o.level, o.option, o.value); err != nil {
			return -1, nil, err
		}
	}
	if ringed {
		err := unix.SetsockoptTpacketReq(fd, unix.SOL_PACKET, unix.PACKET_RX_RING, &unix.TpacketReq{Block_size: slotSize, Block_nr: slots, Frame_size: slotSize, Frame_nr: slots})
		if err != nil {
			return -1, nil, err
		}
		if ring, err = unix.Mmap(fd, 0, slots*slotSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED); err != nil {
			return -1, nil, err
		}
	}
	return fd, ring, unix.Bind(fd, &unix.SockaddrLinklayer{Ifindex: ifi.Index, Protocol: networkOrder(unix.ETH_P_ALL)})
}

func networkOrder(v uint16) uint16 { return v<<8 | v>>8 }

// ownThread gives a loop of system calls a thread to which Go's scheduler sends no signals.
func ownThread() error {
	runtime.LockOSThread()
	var preempt unix.Sigset_t
	preempt.Val[0] = 1 << (uint(unix.SIGURG) - 1)
	return unix.PthreadSigmask(unix.SIG_BLOCK, &preempt, nil)
}

// carry copies what it reads until that fails. What cannot be written is lost.
func carry(from, to int) error {
	if err := ownThread(); err != nil {
		return err
	}
	buf := make([]byte, copyFrame)
	for {
		n, _, errno := unix.RawSyscall(unix.SYS_READ, uintptr(from), uintptr(unsafe.Pointer(&buf[0])), uintptr(len(buf)))
		switch errno {
		case 0:
			_, _, _ = unix.RawSyscall(unix.SYS_WRITE, uintptr(to), uintptr(unsafe.Pointer(&buf[0])), n)
		case unix.EINTR, unix.ENETDOWN, unix.EINVAL:
		default:
			return fmt.Errorf("reading a frame: %w", errno)
		}
	}
}

// carryRing is carry from a socket with a ring (the kernel's packet_mmap.rst).
func carryRing(ring []byte, from, to int) error {
	if err := ownThread(); err != nil {
		return err
	}
	more := unix.PollFd{Fd: int32(from), Events: unix.POLLIN}
	for i := 0; ; i = (i + 1) % slots {
		slot := ring[i*slotSize:][:slotSize]
		h := (*unix.Tpacket2Hdr)(unsafe.Pointer(&slot[0]))
		for atomic.LoadUint32(&h.Status)&unix.TP_STATUS_USER == 0 {
			if _, _, errno := unix.RawSyscall6(unix.SYS_PPOLL, uintptr(unsafe.Pointer(&more)), 1, 0, 0, 0, 0); errno != 0 && errno != unix.EINTR {
				return fmt.Errorf("waiting for a frame: %w", errno)
			}
		}
		frame := slot[int(h.Mac)-vnetHdrLen : int(h.Mac)+int(h.Snaplen)]
		_, _, _ = unix.RawSyscall(unix.SYS_WRITE, uintptr(to), uintptr(unsafe.Pointer(&frame[0])), uintptr(len(frame)))
		atomic.StoreUint32(&h.Status, unix.TP_STATUS_KERNEL)
	}
}

// bareMacvlan is a server with the VIP on a clone0 as the engine makes it, with its routes
// and settings, but without a program: nothing is judged.
func (m *measurer) bareMacvlan(w *way, f files) error {
	m.server(w.bed, 1, f).Start("macvlan").Await(0, "macvlan ready")
	w.knows()
	return nil
}

// macvlanProgram makes that clone0. On a kernel without wire addresses it sends with the
// clone MAC as its source, which a switch learns.
func macvlanProgram([]string) int {
	ended := make(chan os.Signal, 1)
	signal.Notify(ended, syscall.SIGTERM)
	if err := func() error {
		cfg, err := cloneConfig()
		if err != nil {
			return err
		}
		cfg.Kind = clone.Macvlan
		h, _, err := clone.Claim(cfg)
		if err != nil {
			return err
		}
		attrs := netlink.NewLinkAttrs()
		attrs.Name, attrs.ParentIndex, attrs.HardwareAddr = clone.Device, cfg.NIC.Index, cloneMAC[:]
		if err := netlink.LinkAdd(&netlink.Macvlan{LinkAttrs: attrs, Mode: netlink.MACVLAN_MODE_PRIVATE}); err != nil {
			return err
		}
		return h.SetUp(func(netlink.Link) error {
			if macvlan.ProbeWireAddress() != nil {
				return nil
			}
			return os.WriteFile("/sys/class/net/"+clone.Device+"/wire_address", []byte(cfg.NIC.MAC.String()), 0)
		})
	}(); err != nil {
		fmt.Println(err)
		return 1
	}
	fmt.Println("macvlan ready")
	<-ended
	return 0
}

// noEngine is a server with a node's clone0 and programs, all buckets its own, and nothing
// that would change that: what is left of native, or of bpf where the kernel has no wire
// addresses, is the engine.
func (m *measurer) noEngine(w *way, f files) error {
	kind := "tc"
	if macvlan.ProbeWireAddress() == nil {
		kind = "native"
	}
	m.server(w.bed, 1, f).Start("node", kind, "settled", w.bed.BPFFS()).Await(0, "node ready")
	w.knows()
	return nil
}

// oneDevice is a server with the VIP on lo and a program at the NIC that makes frames to the
// clone MAC the host's own: no device has that MAC, so what leaves has the NIC's, and there
// are no routes of the VIP's. Judged, what comes and what leaves passes the programs of a
// node as well.
func (m *measurer) oneDevice(judged bool) func(*way, files) error {
	return func(w *way, f files) error {
		h := m.server(w.bed, 1, f)
		h.Run("ip", "addr", "add", vip+"/32", "dev", "lo")
		h.Run("bridge", "fdb", "add", net.HardwareAddr(cloneMAC[:]).String(), "dev", "eth0", "self")
		p, err := takeClone()
		if err == nil {
			err = m.attach(h, "eth0", p, func(ifindex int) (io.Closer, error) {
				return link.AttachTCX(link.TCXOptions{Interface: ifindex, Program: p, Attach: ebpf.AttachTCXIngress})
			})
		}
		if err != nil {
			return fmt.Errorf("a program at tcx: %w", err)
		}
		if judged {
			if err := m.judge(h); err != nil {
				return err
			}
			// The programs let no ARP pass that the NIC sends.
			h.Run("ip", "neigh", "replace", "10.77.0.1", "lladdr", w.client.MAC, "dev", "eth0", "nud", "permanent")
		}
		w.knows()
		return nil
	}
}

// takeClone is that program.
func takeClone() (*ebpf.Program, error) {
	const ( // linux/bpf.h, linux/if_packet.h, linux/pkt_cls.h
		data, dataEnd = 76, 80 // of struct __sk_buff
		packetHost    = 0
	)
	return ebpf.NewProgram(&ebpf.ProgramSpec{Type: ebpf.SchedCLS, License: "GPL", Instructions: asm.Instructions{
		asm.LoadMem(asm.R2, asm.R1, data, asm.Word),
		asm.LoadMem(asm.R3, asm.R1, dataEnd, asm.Word),
		asm.Mov.Reg(asm.R4, asm.R2),
		asm.Add.Imm(asm.R4, 14),
		asm.JGT.Reg(asm.R4, asm.R3, "pass"),
		asm.LoadMem(asm.R5, asm.R2, 0, asm.Word),
		asm.JNE.Imm32(asm.R5, int32(binary.NativeEndian.Uint32(cloneMAC[:])), "pass"),
		asm.LoadMem(asm.R5, asm.R2, 4, asm.Half),
		asm.JNE.Imm(asm.R5, int32(binary.NativeEndian.Uint16(cloneMAC[4:])), "pass"),
		asm.Mov.Imm(asm.R2, packetHost),
		asm.FnSkbChangeType.Call(),
		asm.Mov.Imm(asm.R0, noVerdict).WithSymbol("pass"),
		asm.Return(),
	}})
}

// judge puts a node's programs on a host's NIC, before what is there. All buckets are its own.
func (m *measurer) judge(h *netnstest.Host) error {
	return h.Do(func() error {
		ifi, err := net.InterfaceByName("eth0")
		if err != nil {
			return err
		}
		d, err := bpf.Load(bpf.Options{WireMAC: [6]byte(ifi.HardwareAddr), Filter: filter.Config{
			CloneMAC: cloneMAC, VIP4: netip.MustParseAddr(vip), Rules: []filter.Rule{{Proto: filter.ProtoTCP, PortLo: 80, PortHi: 81}},
		}})
		if err != nil {
			return err
		}
		m.t.Cleanup(func() { d.Close() })
		now := int64(clock(unix.CLOCK_MONOTONIC))
		d.SetTable(settled(), now)
		d.SetLease(now + int64(24*time.Hour))
		_, in := d.AttachNIC(ifi.Index, false)
		_, out := d.AttachClone(ifi.Index)
		return errors.Join(in, out)
	})
}
