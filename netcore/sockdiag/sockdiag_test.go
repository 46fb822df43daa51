package sockdiag

import (
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"

	"clonecluster/netcore/filter"
)

// connection opens a TCP connection over the loopback and gives the server's
// view of it.
func connection(t *testing.T, listen string) (l net.Listener, server, client net.Conn) {
	t.Helper()
	l, err := net.Listen("tcp", listen)
	if err != nil {
		t.Skipf("needs a loopback with %s: %v", listen, err)
	}
	t.Cleanup(func() { l.Close() })
	to := l.Addr().(*net.TCPAddr)
	target := to.String()
	if to.IP.IsUnspecified() {
		target = netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), to.AddrPort().Port()).String()
	}
	client, err = net.Dial("tcp", target)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close() })
	if server, err = l.Accept(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { server.Close() })
	return l, server, client
}

func tupleOf(c net.Conn) filter.Tuple {
	local, remote := c.LocalAddr().(*net.TCPAddr).AddrPort(), c.RemoteAddr().(*net.TCPAddr).AddrPort()
	return filter.Tuple{
		Proto:  filter.ProtoTCP,
		VIP:    netip.AddrPortFrom(local.Addr().Unmap(), local.Port()),
		Client: netip.AddrPortFrom(remote.Addr().Unmap(), remote.Port()),
	}
}

func openSockets(t testing.TB) *Sockets {
	t.Helper()
	s, err := Open(1)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

// TestLookup asks the kernel about real connections. A listener on the
// unspecified address is an IPv6 socket, and so are its IPv4 connections.
func TestLookup(t *testing.T) {
	for _, listen := range []string{"127.0.0.1:0", "[::1]:0", ":0"} {
		t.Run(listen, func(t *testing.T) {
			s := openSockets(t)
			l, server, client := connection(t, listen)
			there := tupleOf(server)
			if got := s.Lookup(there); got != filter.SocketEstablished {
				t.Errorf("Lookup(%v) = %v; want established", there, got)
			}
			elsewhere := there
			elsewhere.Client = netip.AddrPortFrom(there.Client.Addr(), there.Client.Port()^1)
			if got := s.Lookup(elsewhere); got != filter.SocketListener {
				t.Errorf("Lookup(%v) = %v; want listener", elsewhere, got)
			}
			l.Close()
			if got := s.Lookup(elsewhere); got != filter.SocketNone {
				t.Errorf("Lookup(%v) without the listener = %v; want none", elsewhere, got)
			}
			// The server ends first and remembers: TIME-WAIT is a socket, too.
			server.Close()
			client.Close()
			if got := s.Lookup(there); got != filter.SocketEstablished {
				t.Errorf("Lookup(%v) in TIME-WAIT = %v; want established", there, got)
			}
			timeWait := false
			if err := EachFlow([]netip.Addr{there.VIP.Addr()}, func(f Flow) {
				if f.Tuple == there {
					timeWait = f.TimeWait
				}
			}); err != nil || !timeWait {
				t.Errorf("EachFlow says of %v that TimeWait = %v, %v", there, timeWait, err)
			}
		})
	}
}

func TestEachFlow(t *testing.T) {
	want := map[filter.Tuple]bool{}
	for _, listen := range []string{"127.0.0.1:0", "[::1]:0", ":0"} {
		_, server, client := connection(t, listen)
		want[tupleOf(server)], want[tupleOf(client)] = true, true
	}
	vips := []netip.Addr{netip.MustParseAddr("127.0.0.1"), netip.MustParseAddr("::1")}
	if err := EachFlow(vips, func(f Flow) {
		if f.TimeWait && want[f.Tuple] {
			t.Errorf("%v is in TIME-WAIT", f.Tuple)
		}
		delete(want, f.Tuple)
	}); err != nil {
		t.Fatal(err)
	}
	for missing := range want {
		t.Errorf("EachFlow does not list %v", missing)
	}
	if err := EachFlow([]netip.Addr{netip.MustParseAddr("192.0.2.1")}, func(f Flow) { t.Errorf("%v is not of 192.0.2.1", f.Tuple) }); err != nil {
		t.Fatal(err)
	}
}

// TestEachListener: it gives the listeners, at the address that they have, and nothing else.
func TestEachListener(t *testing.T) {
	all := func() map[netip.AddrPort]bool {
		found := map[netip.AddrPort]bool{}
		if err := EachListener(func(at netip.AddrPort) { found[at] = true }); err != nil {
			t.Fatal(err)
		}
		return found
	}
	for _, tt := range []struct{ network, listen, dial string }{
		{"tcp4", "127.0.0.1:0", "127.0.0.1"}, {"tcp4", "0.0.0.0:0", "127.0.0.1"},
		{"tcp6", "[::1]:0", "::1"}, {"tcp6", "[::]:0", "::1"}, {"tcp", "[::]:0", "127.0.0.1"},
	} {
		t.Run(tt.network+" "+tt.listen, func(t *testing.T) {
			l, err := net.Listen(tt.network, tt.listen)
			if err != nil {
				t.Skipf("needs a loopback with %s: %v", tt.listen, err)
			}
			defer l.Close()
			at := l.Addr().(*net.TCPAddr).AddrPort()
			client, err := net.Dial("tcp", netip.AddrPortFrom(netip.MustParseAddr(tt.dial), at.Port()).String())
			if err != nil {
				t.Fatal(err)
			}
			defer client.Close()
			server, err := l.Accept()
			if err != nil {
				t.Fatal(err)
			}
			defer server.Close()
			found := all()
			if !found[at] {
				t.Errorf("EachListener does not give %v: %v", at, found)
			}
			if there := client.LocalAddr().(*net.TCPAddr).AddrPort(); found[there] {
				t.Errorf("EachListener gives %v, the client's end of a connection", there)
			}
			l.Close()
			if all()[at] { // its connection has the same port
				t.Errorf("EachListener gives %v, which is closed, but for %v", at, tupleOf(server))
			}
		})
	}
	// An IPv6 socket that is bound to an IPv4 address is a listener at that.
	fd, err := unix.Socket(unix.AF_INET6, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Skip(err)
	}
	defer unix.Close(fd)
	err = errors.Join(
		unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, 0),
		unix.Bind(fd, &unix.SockaddrInet6{Addr: netip.MustParseAddr("::ffff:127.0.0.1").As16()}),
		unix.Listen(fd, 1),
	)
	if err != nil {
		t.Fatal(err)
	}
	name, err := unix.Getsockname(fd)
	if err != nil {
		t.Fatal(err)
	}
	if at := netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), uint16(name.(*unix.SockaddrInet6).Port)); !all()[at] {
		t.Errorf("EachListener does not give %v, an IPv6 socket: %v", at, all())
	}
}

func TestLookupAllocatesNothing(t *testing.T) {
	s := openSockets(t)
	_, server, _ := connection(t, "127.0.0.1:0")
	there := tupleOf(server)
	if n := testing.AllocsPerRun(200, func() { s.Lookup(there) }); n != 0 {
		t.Errorf("Lookup allocates %v times; want 0", n)
	}
}

func BenchmarkEachListener(b *testing.B) {
	for b.Loop() {
		if err := EachListener(func(netip.AddrPort) {}); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkLookup(b *testing.B) {
	s := openSockets(b)
	nobody := filter.Tuple{Proto: filter.ProtoTCP, VIP: netip.MustParseAddrPort("127.0.0.1:1"), Client: netip.MustParseAddrPort("127.0.0.1:2")}
	b.ReportAllocs()
	for b.Loop() {
		s.Lookup(nobody)
	}
}

// diagMessage is a netlink message with a struct inet_diag_msg.
func diagMessage(seq uint32, kind uint16, family, state byte, sport, dport uint16) []byte {
	b := make([]byte, nlmsgHdrLen+diagReplyLen)
	binary.NativeEndian.PutUint32(b, uint32(len(b)))
	binary.NativeEndian.PutUint16(b[4:], kind)
	binary.NativeEndian.PutUint32(b[8:], seq)
	m := b[nlmsgHdrLen:]
	m[0], m[1] = family, state
	binary.BigEndian.PutUint16(m[4:], sport)
	binary.BigEndian.PutUint16(m[6:], dport)
	copy(m[8:], []byte{10, 77, 0, 10})
	copy(m[24:], []byte{10, 77, 0, 1})
	return b
}

func TestParseDiag(t *testing.T) {
	tuple := filter.Tuple{Proto: 6, VIP: netip.MustParseAddrPort("10.77.0.10:80"), Client: netip.MustParseAddrPort("10.77.0.1:1234")}
	failed := binary.NativeEndian.AppendUint32(diagMessage(7, unix.NLMSG_ERROR, 0, 0, 0, 0)[:nlmsgHdrLen], uint32(0xffffffff-uint32(unix.ENOENT)+1))
	binary.NativeEndian.PutUint32(failed, uint32(len(failed)))
	for _, tt := range []struct {
		name  string
		b     []byte
		state filter.SocketState
		mine  bool
	}{
		{"established", diagMessage(7, sockDiagFamily, unix.AF_INET, 1, 80, 1234), filter.SocketEstablished, true},
		{"half open", diagMessage(7, sockDiagFamily, unix.AF_INET, 12, 80, 1234), filter.SocketEstablished, true},
		{"listener", diagMessage(7, sockDiagFamily, unix.AF_INET6, 10, 80, 0), filter.SocketListener, true},
		{"of other ports", diagMessage(7, sockDiagFamily, unix.AF_INET, 1, 80, 1235), filter.SocketNone, true},
		{"no such socket", failed, filter.SocketNone, true},
		{"answer to an earlier query", diagMessage(6, sockDiagFamily, unix.AF_INET, 1, 80, 1234), filter.SocketNone, false},
		{"cut off", diagMessage(7, sockDiagFamily, unix.AF_INET, 1, 80, 1234)[:50], filter.SocketNone, true},
		{"empty", nil, filter.SocketNone, false},
	} {
		if state, mine := parseDiagReply(tt.b, 7, tuple); state != tt.state || mine != tt.mine {
			t.Errorf("parseDiagReply(%s) = %v, %v; want %v, %v", tt.name, state, mine, tt.state, tt.mine)
		}
	}
	if _, err := parseDiagDump(failed, 7, nil); !errors.Is(err, unix.ENOENT) {
		t.Errorf("parseDiagDump(error) = %v; want ENOENT", err)
	}
	binary.NativeEndian.PutUint16(failed[4:], unix.NLMSG_DONE)
	if done, err := parseDiagDump(failed, 7, nil); !done || !errors.Is(err, unix.ENOENT) {
		t.Errorf("parseDiagDump(end with an error) = %v, %v; want ENOENT", done, err)
	}
	binary.NativeEndian.PutUint32(failed[nlmsgHdrLen:], 0)
	if done, err := parseDiagDump(failed, 7, nil); !done || err != nil {
		t.Errorf("parseDiagDump(end) = %v, %v; want an end without an error", done, err)
	}
}

func TestHalfOpen(t *testing.T) {
	for state, want := range map[byte]bool{1: false, tcpStateSynRecv: true, tcpStateTimeWait: false} {
		n := 0
		if _, err := parseDiagDump(diagMessage(7, tcpDiagGetSock, unix.AF_INET, state, 80, 1234), 7, func(f Flow) {
			if n++; f.HalfOpen != want {
				t.Errorf("state %d: HalfOpen = %v; want %v", state, f.HalfOpen, want)
			}
		}); err != nil || n != 1 {
			t.Errorf("state %d: %d flows, %v; want one", state, n, err)
		}
	}
}

func FuzzParseDiag(f *testing.F) {
	two := append(diagMessage(7, tcpDiagGetSock, unix.AF_INET, 1, 80, 1234), diagMessage(7, tcpDiagGetSock, unix.AF_INET6, 6, 80, 1234)...)
	f.Add(two)
	f.Add(append(two, diagMessage(7, unix.NLMSG_DONE, 0, 0, 0, 0)...))
	f.Add(two[:len(two)-3])
	f.Add([]byte{0xff, 0xff, 0xff, 0xff})
	f.Add(diagMessage(7, sockDiagFamily, unix.AF_INET, 1, 80, 1234))
	f.Fuzz(func(t *testing.T, b []byte) {
		parseDiagReply(b, 7, filter.Tuple{})
		n := 0
		_, _ = parseDiagDump(b, 7, func(Flow) { n++ })
		if n*(nlmsgHdrLen+diagReplyLen) > len(b) {
			t.Errorf("%d flows in %d bytes", n, len(b))
		}
	})
}
