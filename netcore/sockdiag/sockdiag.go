// Package sockdiag asks the kernel for its TCP sockets, by netlink (sock_diag(7),
// linux/inet_diag.h): for the one of a flow, for those of some addresses, and for the
// listeners. What reads /proc/net/tcp instead has the kernel look through the whole table of
// connections, however few there are, which takes milliseconds on a large machine.
package sockdiag

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"unsafe"

	"golang.org/x/sys/unix"

	"clonecluster/netcore/filter"
)

// Sockets asks for the socket of one flow. One query takes some microseconds and
// allocates nothing. Not for concurrent use.
type Sockets struct {
	fd      int
	ifindex int
	seq     uint32
	req     [diagRequestLen]byte
	reply   [1024]byte
}

var _ filter.Sockets = (*Sockets)(nil)

// Sizes and offsets of struct nlmsghdr + struct inet_diag_req_v2, and of struct
// inet_diag_msg, in the kernel's uapi headers.
const (
	nlmsgHdrLen    = 16
	diagRequestLen = nlmsgHdrLen + 56
	diagReplyLen   = 72
	sockDiagFamily = 20 // SOCK_DIAG_BY_FAMILY
	tcpStateListen = 10 // include/net/tcp_states.h
)

// Open opens the query socket. ifindex is the interface the flows arrive
// by: sockets bound to another are not found.
func Open(ifindex int) (*Sockets, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_SOCK_DIAG)
	if err != nil {
		return nil, fmt.Errorf("opening a sock_diag socket: %w", err)
	}
	s := &Sockets{fd: fd, ifindex: ifindex}
	// The kernel answers within the send; a bound against surprises.
	timeout := unix.NsecToTimeval(100e6)
	err = errors.Join(
		os.NewSyscallError("SO_RCVTIMEO", unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &timeout)),
		os.NewSyscallError("connect", unix.Connect(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK})),
	)
	if err != nil {
		_ = unix.Close(fd)
		return nil, fmt.Errorf("preparing the sock_diag socket: %w", err)
	}
	return s, nil
}

// Close closes the query socket.
func (s *Sockets) Close() error { return os.NewSyscallError("close", unix.Close(s.fd)) }

// Lookup implements filter.Sockets. A query that fails finds nothing: a segment
// that is dropped comes again.
func (s *Sockets) Lookup(t filter.Tuple) filter.SocketState {
	s.seq++
	putDiagRequest(&s.req, t, s.ifindex, s.seq)
	if _, _, errno := unix.Syscall6(unix.SYS_SENDTO, uintptr(s.fd), uintptr(unsafe.Pointer(&s.req[0])), uintptr(len(s.req)), 0, 0, 0); errno != 0 {
		return filter.SocketNone
	}
	// An answer to an earlier query may stand before ours.
	for range 8 {
		n, _, errno := unix.Syscall6(unix.SYS_RECVFROM, uintptr(s.fd), uintptr(unsafe.Pointer(&s.reply[0])), uintptr(len(s.reply)), 0, 0, 0)
		if errno != 0 {
			return filter.SocketNone
		}
		if state, mine := parseDiagReply(s.reply[:min(int(n), len(s.reply))], s.seq, t); mine {
			return state
		}
	}
	return filter.SocketNone
}

// putDiagRequest fills struct nlmsghdr and struct inet_diag_req_v2.
func putDiagRequest(b *[diagRequestLen]byte, t filter.Tuple, ifindex int, seq uint32) {
	ne := binary.NativeEndian
	*b = [diagRequestLen]byte{}
	ne.PutUint32(b[0:], diagRequestLen)
	ne.PutUint16(b[4:], sockDiagFamily)
	ne.PutUint16(b[6:], unix.NLM_F_REQUEST)
	ne.PutUint32(b[8:], seq)
	r := b[nlmsgHdrLen:]
	r[0] = family4or6(t.VIP.Addr())
	r[1] = t.Proto
	// struct inet_diag_sockid
	binary.BigEndian.PutUint16(r[8:], t.VIP.Port())
	binary.BigEndian.PutUint16(r[10:], t.Client.Port())
	putAddr(r[12:28], t.VIP.Addr())
	putAddr(r[28:44], t.Client.Addr())
	ne.PutUint32(r[44:], uint32(ifindex))
	ne.PutUint64(r[48:], ^uint64(0)) // INET_DIAG_NOCOOKIE, twice
}

func family4or6(a netip.Addr) byte {
	if a.Is4() {
		return unix.AF_INET
	}
	return unix.AF_INET6
}

func putAddr(b []byte, a netip.Addr) {
	if a.Is4() {
		v := a.As4()
		copy(b, v[:])
	} else if a.IsValid() {
		v := a.As16()
		copy(b, v[:])
	}
}

// parseDiagReply reads one netlink message. It is ours if it has the sequence
// number of the query.
func parseDiagReply(b []byte, seq uint32, t filter.Tuple) (state filter.SocketState, mine bool) {
	ne := binary.NativeEndian
	if len(b) < nlmsgHdrLen || ne.Uint32(b[8:]) != seq {
		return filter.SocketNone, false
	}
	if ne.Uint16(b[4:]) != sockDiagFamily || len(b) < nlmsgHdrLen+diagReplyLen {
		return filter.SocketNone, true // NLMSG_ERROR: ENOENT, no such socket
	}
	m := b[nlmsgHdrLen:]
	if m[1] == tcpStateListen {
		return filter.SocketListener, true
	}
	if binary.BigEndian.Uint16(m[4:]) != t.VIP.Port() || binary.BigEndian.Uint16(m[6:]) != t.Client.Port() {
		return filter.SocketNone, true
	}
	return filter.SocketEstablished, true
}

// Flow is one TCP socket of the VIP.
type Flow struct {
	Tuple    filter.Tuple
	TimeWait bool // nothing but the memory of an ended connection
	HalfOpen bool // a stranger's SYN has been answered, and he may not exist
}

// The states are of include/net/tcp_states.h: flows are in any but CLOSE and
// LISTEN. Requests (NEW_SYN_RECV) are listed as SYN_RECV.
const (
	tcpStateSynRecv  = 3
	tcpStateTimeWait = 6
	statesOfFlows    = 0xfff &^ (1<<7 | 1<<tcpStateListen | 1)
	statesOfListener = 1 << tcpStateListen
)

// EachFlow calls do for every TCP flow of this machine whose local address is
// one of vips, from the half-open request to TIME-WAIT.
func EachFlow(vips []netip.Addr, do func(Flow)) error {
	err := dump(statesOfFlows, func(f Flow) {
		if slices.Contains(vips, f.Tuple.VIP.Addr()) {
			do(f)
		}
	})
	if err != nil {
		return fmt.Errorf("looking for flows: %w", err)
	}
	return nil
}

// EachListener calls do for the address of every TCP listener of this machine, and does not
// say whether one at [::] takes IPv4 as well.
func EachListener(do func(netip.AddrPort)) error {
	err := dump(statesOfListener, func(f Flow) { do(f.Tuple.VIP) })
	if err != nil {
		return fmt.Errorf("looking for listeners: %w", err)
	}
	return nil
}

// struct nlmsghdr + struct inet_diag_req, the request of before Linux 3.3.
const (
	dumpRequestLen = nlmsgHdrLen + 60
	tcpDiagGetSock = 18 // TCPDIAG_GETSOCK
)

// dump calls do for every TCP socket in one of the states. The present request lists one
// family, and a service that listens on [::] has IPv4 flows in IPv6 sockets: it would take two
// looks through the table of connections, each of which takes a millisecond on a large machine
// even if there are none. The old request lists both in one.
func dump(states uint32, do func(Flow)) error {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_SOCK_DIAG)
	if err != nil {
		return fmt.Errorf("opening a sock_diag socket: %w", err)
	}
	defer unix.Close(fd)
	timeout := unix.NsecToTimeval(2e9)
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &timeout); err != nil {
		return os.NewSyscallError("SO_RCVTIMEO", err)
	}
	const seq = 1
	var req [dumpRequestLen]byte
	ne := binary.NativeEndian
	ne.PutUint32(req[0:], dumpRequestLen)
	ne.PutUint16(req[4:], tcpDiagGetSock)
	ne.PutUint16(req[6:], unix.NLM_F_REQUEST|unix.NLM_F_DUMP)
	ne.PutUint32(req[8:], seq)
	ne.PutUint32(req[nlmsgHdrLen+52:], states)
	if err := unix.Sendto(fd, req[:], 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return fmt.Errorf("asking the kernel: %w", err)
	}
	buf := make([]byte, dumpPart)
	for done := false; !done; {
		n, _, err := unix.Recvfrom(fd, buf, 0)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return fmt.Errorf("reading the kernel's answer: %w", err)
		}
		if done, err = parseDiagDump(buf[:n], seq, do); err != nil {
			return fmt.Errorf("reading the kernel's answer: %w", err)
		}
	}
	return nil
}

// dumpPart is the most that the kernel answers in one piece: it fills 32 KiB where it finds
// that, and never has more than the last reader had room for (netlink_dump in its
// net/netlink/af_netlink.c).
const dumpPart = 32 << 10

var errDiagMalformed = errors.New("malformed sock_diag message")

// parseDiagDump reads the messages of one datagram of a dump; done tells that
// it was the last.
func parseDiagDump(b []byte, seq uint32, do func(Flow)) (done bool, err error) {
	ne := binary.NativeEndian
	for len(b) >= nlmsgHdrLen {
		size := int(ne.Uint32(b))
		if size < nlmsgHdrLen || size > len(b) {
			return false, errDiagMalformed
		}
		m := b[nlmsgHdrLen:size]
		mine := ne.Uint32(b[8:]) == seq
		switch kind := ne.Uint16(b[4:]); {
		case !mine:
		case kind == unix.NLMSG_DONE: // with the error of what was to list them (netlink_dump, ibid.)
			if len(m) >= 4 && int32(ne.Uint32(m)) < 0 {
				return true, unix.Errno(-int32(ne.Uint32(m)))
			}
			return true, nil
		case kind == unix.NLMSG_ERROR:
			if len(m) < 4 {
				return false, errDiagMalformed
			}
			return true, unix.Errno(-int32(ne.Uint32(m)))
		case kind == tcpDiagGetSock:
			if len(m) < diagReplyLen {
				return false, errDiagMalformed
			}
			do(Flow{
				Tuple: filter.Tuple{
					Proto:  filter.ProtoTCP,
					VIP:    diagAddrPort(m[0], m[8:24], m[4:]),
					Client: diagAddrPort(m[0], m[24:40], m[6:]),
				},
				TimeWait: m[1] == tcpStateTimeWait,
				HalfOpen: m[1] == tcpStateSynRecv,
			})
		}
		b = b[min(len(b), (size+3)&^3):]
	}
	return false, nil
}

func diagAddrPort(family byte, addr, port []byte) netip.AddrPort {
	var a netip.Addr
	if family == unix.AF_INET {
		a = netip.AddrFrom4([4]byte(addr))
	} else {
		a = netip.AddrFrom16([16]byte(addr)).Unmap()
	}
	return netip.AddrPortFrom(a, binary.BigEndian.Uint16(port))
}
