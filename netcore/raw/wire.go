package raw

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"net"
	"net/netip"
	"os"
	"syscall"
	"unsafe"

	"github.com/mdlayher/packet"
	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

// vnetHdrLen is the size of struct virtio_net_hdr (linux/virtio_net.h), which
// stands before every frame of the packet sockets and of the TAP. It carries
// checksum and segmentation offloads from one to the other untouched.
const vnetHdrLen = 10

// maxFrame is the longest frame a NIC's receive or segmentation offload makes:
// an Ethernet header with one VLAN tag and the largest IP packet.
const maxFrame = 14 + 4 + math.MaxUint16

const (
	etherTypeIPv4 = unix.ETH_P_IP
	etherTypeIPv6 = unix.ETH_P_IPV6
	etherTypeARP  = unix.ETH_P_ARP
)

var broadcastMAC = [6]byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}

// allNodesMAC is the Ethernet group of ff02::1 (RFC 2464, section 7).
var allNodesMAC = [6]byte{0x33, 0x33, 0, 0, 0, 1}

// solicitedNodeMAC is the Ethernet group to which neighbour solicitations for
// addr are sent (RFC 4291, section 2.7.1; RFC 2464, section 7).
func solicitedNodeMAC(addr netip.Addr) [6]byte {
	a := addr.As16()
	return [6]byte{0x33, 0x33, 0xff, a[13], a[14], a[15]}
}

// openReceiver opens the packet socket that takes the cluster's frames off the
// NIC. The kernel applies the filter from before the socket is bound.
func openReceiver(ifi *net.Interface, cloneMAC [6]byte, vip4, vip6 netip.Addr) (*packet.Conn, error) {
	conn, err := listen(ifi, socketFilter(addressFilter(cloneMAC, vip4, vip6), vip4, vip6))
	if err != nil {
		return nil, err
	}
	if err := joinCluster(conn, ifi.Index, cloneMAC, vip6); err != nil {
		conn.Close()
		return nil, fmt.Errorf("preparing the packet socket on %s: %w", ifi.Name, err)
	}
	return conn, nil
}

// listen opens a packet socket that gives virtio_net_hdr + frame.
func listen(ifi *net.Interface, filter []bpf.Instruction) (*packet.Conn, error) {
	program, err := bpf.Assemble(filter)
	if err != nil {
		return nil, fmt.Errorf("assembling the socket filter: %w", err)
	}
	conn, err := packet.Listen(ifi, packet.Raw, unix.ETH_P_ALL, &packet.Config{Filter: program})
	if err != nil {
		return nil, fmt.Errorf("opening a packet socket on %s: %w", ifi.Name, err)
	}
	if err := prepareReceiver(conn); err != nil {
		conn.Close()
		return nil, fmt.Errorf("preparing the packet socket on %s: %w", ifi.Name, err)
	}
	return conn, nil
}

func prepareReceiver(conn *packet.Conn) error {
	rc, err := conn.SyscallConn()
	if err != nil {
		return err
	}
	var inner error
	err = rc.Control(func(p uintptr) {
		fd := int(p)
		// Frames that came before this option are converted when they are read.
		if inner = os.NewSyscallError("PACKET_VNET_HDR", unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_VNET_HDR, 1)); inner != nil {
			return
		}
		// The filter drops outgoing frames as well; this saves running it. Linux 4.20.
		_ = unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_IGNORE_OUTGOING, 1)
		// Room for bursts while the scheduler is elsewhere. Needs CAP_NET_ADMIN.
		_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 8<<20)
	})
	return errors.Join(err, inner)
}

// joinCluster has the NIC take what is for the cluster.
func joinCluster(conn *packet.Conn, ifindex int, cloneMAC [6]byte, vip6 netip.Addr) error {
	rc, err := conn.SyscallConn()
	if err != nil {
		return err
	}
	var inner error
	err = rc.Control(func(fd uintptr) {
		// A unicast membership is an entry in the NIC's address filter; only a
		// NIC that cannot filter becomes promiscuous.
		mreq := unix.PacketMreq{Ifindex: int32(ifindex), Type: unix.PACKET_MR_UNICAST, Alen: 6}
		copy(mreq.Address[:], cloneMAC[:])
		inner = os.NewSyscallError("PACKET_MR_UNICAST", unix.SetsockoptPacketMreq(int(fd), unix.SOL_PACKET, unix.PACKET_ADD_MEMBERSHIP, &mreq))
	})
	if err != nil {
		return err
	}
	if inner != nil || !vip6.IsValid() {
		return inner
	}
	for _, group := range [][6]byte{solicitedNodeMAC(vip6), allNodesMAC} {
		if err := conn.JoinGroup(group[:]); err != nil {
			return err
		}
	}
	return nil
}

// A match is one comparison of a frame: the word at off equals want.
type match struct {
	off, size int
	want      uint32
}

// acceptIf gives the instructions that accept a frame on which all the matches
// hold, and go on with the next instruction otherwise.
func acceptIf(ms ...match) []bpf.Instruction {
	var prog []bpf.Instruction
	for i, m := range ms {
		rest := 2*(len(ms)-i-1) + 1
		prog = append(prog,
			bpf.LoadAbsolute{Off: uint32(m.off), Size: m.size},
			bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: m.want, SkipTrue: uint8(rest)})
	}
	return append(prog, bpf.RetConstant{Val: math.MaxUint32})
}

func destination(mac [6]byte) []match {
	return []match{
		{2, 4, binary.BigEndian.Uint32(mac[2:])},
		{0, 2, uint32(binary.BigEndian.Uint16(mac[:2]))},
	}
}

// socketFilter is the classic BPF program of the receiver: what cannot be for
// the VIP never reaches user space. What it lets through, netcore/filter judges. Of other
// frames than those to the NIC's own address the rest of it decides.
func socketFilter(rest []bpf.Instruction, vip4, vip6 netip.Addr) []bpf.Instruction {
	drop := bpf.RetConstant{Val: 0}
	prog := []bpf.Instruction{
		bpf.LoadExtension{Num: bpf.ExtType},
		bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: unix.PACKET_OUTGOING, SkipTrue: 1},
		drop,
		// The kernel has taken the tag out of the frame. Identifier 0 is a
		// priority tag (802.1Q): the frame belongs to no VLAN.
		bpf.LoadExtension{Num: bpf.ExtVLANTagPresent},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: 0, SkipTrue: 4},
		bpf.LoadExtension{Num: bpf.ExtVLANTag},
		bpf.ALUOpConstant{Op: bpf.ALUOpAnd, Val: 0x0fff},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: 0, SkipTrue: 1},
		drop,
	}
	prog = append(prog, ownFilter(vip4, vip6)...)
	return append(prog, rest...)
}

// ownFilter accepts what is sent to the VIP at the NIC's own address: clients do so in
// directed mode.
func ownFilter(vip4, vip6 netip.Addr) []bpf.Instruction {
	var own []bpf.Instruction
	if vip4.IsValid() {
		v4 := vip4.As4()
		word := binary.BigEndian.Uint32(v4[:])
		own = append(own, acceptIf(match{12, 2, etherTypeIPv4}, match{30, 4, word})...)
		own = append(own, acceptIf(match{12, 2, etherTypeARP}, match{38, 4, word})...)
	}
	if vip6.IsValid() {
		v6 := vip6.As16()
		ms := []match{{12, 2, etherTypeIPv6}}
		for i := 0; i < len(v6); i += 4 {
			ms = append(ms, match{38 + i, 4, binary.BigEndian.Uint32(v6[i:])})
		}
		own = append(own, acceptIf(ms...)...)
	}
	return append([]bpf.Instruction{
		bpf.LoadExtension{Num: bpf.ExtType},
		bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: unix.PACKET_HOST, SkipTrue: uint8(len(own))},
	}, own...)
}

// addressFilter is the part of socketFilter that looks at the frame alone.
func addressFilter(cloneMAC [6]byte, vip4, vip6 netip.Addr) []bpf.Instruction {
	etherType := func(t uint32) match { return match{12, 2, t} }
	var prog []bpf.Instruction
	accept := func(dst [6]byte, ms ...match) {
		prog = append(prog, acceptIf(append(destination(dst), ms...)...)...)
	}
	if vip4.IsValid() {
		v4 := vip4.As4()
		accept(cloneMAC, etherType(etherTypeIPv4))
		accept(cloneMAC, etherType(etherTypeARP))
		accept(broadcastMAC, etherType(etherTypeARP), match{38, 4, binary.BigEndian.Uint32(v4[:])})
		accept(broadcastMAC, etherType(etherTypeARP), match{20, 2, 2}) // a reply
		// A gratuitous request: another host's sender and target are the same.
		prog = append(prog,
			bpf.LoadAbsolute{Off: 12, Size: 2},
			bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: etherTypeARP, SkipTrue: 7},
			bpf.LoadAbsolute{Off: 2, Size: 4},
			bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: math.MaxUint32, SkipTrue: 5},
			bpf.LoadAbsolute{Off: 28, Size: 4},
			bpf.TAX{},
			bpf.LoadAbsolute{Off: 38, Size: 4},
			bpf.JumpIfX{Cond: bpf.JumpNotEqual, SkipTrue: 1},
			bpf.RetConstant{Val: math.MaxUint32})
	}
	if vip6.IsValid() {
		accept(cloneMAC, etherType(etherTypeIPv6))
		accept(solicitedNodeMAC(vip6), etherType(etherTypeIPv6))
		// To all nodes: neighbour advertisements, and what begins with
		// hop-by-hop options as multicast listener queries do.
		accept(allNodesMAC, etherType(etherTypeIPv6), match{20, 1, unix.IPPROTO_ICMPV6}, match{54, 1, 136})
		accept(allNodesMAC, etherType(etherTypeIPv6), match{20, 1, unix.IPPROTO_HOPOPTS})
	}
	return append(prog, bpf.RetConstant{Val: 0})
}

// askFilter accepts who asks all for the VIP.
func askFilter(vip4, vip6 netip.Addr) (prog []bpf.Instruction) {
	if vip4.IsValid() {
		v4 := vip4.As4()
		prog = append(prog, acceptIf(append(destination(broadcastMAC), match{12, 2, etherTypeARP}, match{38, 4, binary.BigEndian.Uint32(v4[:])})...)...)
	}
	if vip6.IsValid() {
		prog = append(prog, acceptIf(append(destination(solicitedNodeMAC(vip6)), match{12, 2, etherTypeIPv6})...)...)
	}
	return append(prog, bpf.RetConstant{Val: 0})
}

// sender is the packet socket by which frames leave. It is bound to the NIC
// without a protocol, so nothing is ever queued to it, and it blocks, so a full
// transmit queue holds the TAP back instead of losing frames.
type sender struct{ fd int }

// sendTimeoutMillis bounds how long a stuck NIC may hold the sending loop.
const sendTimeoutMillis = 200

func openSender(ifindex int) (*sender, error) {
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("opening the sending packet socket: %w", err)
	}
	s := &sender{fd}
	if err := s.prepare(ifindex); err != nil {
		s.close()
		return nil, fmt.Errorf("preparing the sending packet socket: %w", err)
	}
	return s, nil
}

func (s *sender) prepare(ifindex int) error {
	if err := unix.SetsockoptInt(s.fd, unix.SOL_PACKET, unix.PACKET_VNET_HDR, 1); err != nil {
		return os.NewSyscallError("PACKET_VNET_HDR", err)
	}
	// The default holds three segmentation-offload frames.
	_ = unix.SetsockoptInt(s.fd, unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, 4<<20)
	timeout := unix.NsecToTimeval(sendTimeoutMillis * 1e6)
	if err := unix.SetsockoptTimeval(s.fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &timeout); err != nil {
		return os.NewSyscallError("SO_SNDTIMEO", err)
	}
	return os.NewSyscallError("bind", unix.Bind(s.fd, &unix.SockaddrLinklayer{Ifindex: ifindex}))
}

// Of system calls that do not wait the runtime is not told: else it would have its monitor
// look whether they do, and perhaps take the place away from a thread that still handles a
// frame. A request then took a sixth more.

// send sends one virtio_net_hdr + frame; flags are those of send(2). Without MSG_DONTWAIT it
// waits for room.
func (s *sender) send(b []byte, flags int) syscall.Errno {
	_, _, errno := unix.RawSyscall6(unix.SYS_SENDTO, uintptr(s.fd), uintptr(unsafe.Pointer(&b[0])), uintptr(len(b)), uintptr(flags|unix.MSG_DONTWAIT), 0, 0)
	if errno == unix.EAGAIN && flags&unix.MSG_DONTWAIT == 0 {
		_, _, errno = unix.Syscall6(unix.SYS_SENDTO, uintptr(s.fd), uintptr(unsafe.Pointer(&b[0])), uintptr(len(b)), uintptr(flags), 0, 0)
	}
	return errno
}

func (s *sender) close() { _ = unix.Close(s.fd) }

// recv reads one virtio_net_hdr + frame of a socket. The length is that of the whole
// frame, even if it did not fit.
func recv(fd uintptr, b []byte) (int, syscall.Errno) {
	n, _, errno := unix.RawSyscall6(unix.SYS_RECVFROM, fd, uintptr(unsafe.Pointer(&b[0])), uintptr(len(b)),
		unix.MSG_DONTWAIT|unix.MSG_TRUNC, 0, 0)
	return int(n), errno
}

// read and write are for the TAP, which is opened so that they do not wait.

func read(fd uintptr, b []byte) (int, syscall.Errno) {
	n, _, errno := unix.RawSyscall(unix.SYS_READ, fd, uintptr(unsafe.Pointer(&b[0])), uintptr(len(b)))
	return int(n), errno
}

func write(fd uintptr, b []byte) (int, syscall.Errno) {
	n, _, errno := unix.RawSyscall(unix.SYS_WRITE, fd, uintptr(unsafe.Pointer(&b[0])), uintptr(len(b)))
	return int(n), errno
}
