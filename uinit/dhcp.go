package uinit

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
	"github.com/insomniacslk/dhcp/dhcpv4/nclient4"
	"github.com/mdlayher/packet"
	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

// The DHCP client (RFC 2131) is ours but for the messages and their framing:
// the library's own client parses what the network sends in a goroutine of its
// own, where a panic would be the end of PID 1, and it has no renewal.

// lease is what a DHCP server gave.
type lease struct {
	Address netip.Prefix
	Router  netip.Addr // may be missing
	DNS     []netip.Addr
	Server  netip.Addr
	Length  time.Duration
	T1, T2  time.Duration // until renewing and rebinding, from the start of the lease
	ack     *dhcpv4.DHCPv4
}

const (
	shortestLease = time.Minute // a server that gives less is asked as if it gave this
	infiniteLease = 0xffffffff * time.Second
	maxDNS        = 3
)

// shared are the cluster's addresses on the segment, invalid where there is
// none. No node may have either.
type shared struct{ VIP, Gateway netip.Addr }

// newLease reads an ACK or an OFFER.
func newLease(m *dhcpv4.DHCPv4, taken shared) (lease, error) {
	l := lease{ack: m}
	addr, ok := netip.AddrFromSlice(m.YourIPAddr.To4())
	if !ok {
		return l, errors.New("the offer has no address")
	}
	bits := 24
	if mask := m.SubnetMask(); mask != nil {
		ones, size := mask.Size()
		if size != 32 || ones < 1 {
			return l, fmt.Errorf("the subnet mask %v is not one", mask)
		}
		bits = ones
	}
	l.Address = netip.PrefixFrom(addr, bits)
	if !addr.IsGlobalUnicast() {
		return l, fmt.Errorf("the server offers %v, which is no address for a host", addr)
	}
	if addr == taken.VIP || addr == taken.Gateway {
		return l, fmt.Errorf("the server offers %v, which is the address of the VIP or of a gateway; exclude it from the server's range", addr)
	}
	l.Server, _ = netip.AddrFromSlice(m.ServerIdentifier().To4())
	if !l.Server.IsValid() {
		return l, errors.New("the server does not name itself")
	}
	// The VIP is the address of this machine, too, and so no way out of it. Some
	// server's file says so when the cluster serves the segment.
	for _, r := range m.Router() {
		if a, ok := netip.AddrFromSlice(r.To4()); ok && l.Address.Contains(a) && a != addr && a != taken.VIP {
			l.Router = a
			break
		}
	}
	for _, d := range m.DNS() {
		if a, ok := netip.AddrFromSlice(d.To4()); ok && len(l.DNS) < maxDNS {
			l.DNS = append(l.DNS, a)
		}
	}
	l.Length = max(m.IPAddressLeaseTime(shortestLease), shortestLease)
	l.T1 = m.IPAddressRenewalTime(l.Length / 2)
	l.T2 = m.IPAddressRebindingTime(l.Length / 8 * 7)
	if l.T1 <= 0 || l.T2 <= l.T1 || l.Length <= l.T2 { // RFC 2131 section 4.4.5
		l.T1, l.T2 = l.Length/2, l.Length/8*7
	}
	return l, nil
}

// retryDelay is the wait before the n-th message of an exchange, counted from
// 0: 1, 2, 4, 8, 16, 32, 60, 60 … seconds, less up to a quarter by the random
// byte. RFC 2131 begins at 4 seconds, for the networks of its day.
func retryDelay(n int, random byte) time.Duration {
	d := time.Minute
	if n < 6 {
		d = time.Second << n
	}
	return d - d*time.Duration(random)/1024
}

// dhcpClient keeps the lease of one NIC.
type dhcpClient struct {
	ifi      *net.Interface
	hostname string
	taken    shared
	log      *slog.Logger
	apply    func(lease) error // sets or refreshes the address
	remove   func(lease)       // takes it away when the lease is lost
	listen   func(source netip.Addr) (net.PacketConn, error)
}

// keep asks for a lease, renews it, and asks again when it is lost, until ctx
// ends.
func (d *dhcpClient) keep(ctx context.Context) {
	for ctx.Err() == nil {
		l, err := d.acquire(ctx)
		if err != nil {
			continue // ctx has ended
		}
		if err := d.apply(l); err != nil {
			d.log.Error("setting the address that DHCP gave", "error", err)
			wait(ctx, time.Minute)
			continue
		}
		d.log.Info("DHCP lease", "address", l.Address, "router", l.Router, "server", l.Server, "for", l.Length)
		d.hold(ctx, l)
	}
}

// acquire runs DISCOVER, OFFER, REQUEST, ACK until it has a lease.
func (d *dhcpClient) acquire(ctx context.Context) (lease, error) {
	warned := ""
	for n := 0; ; n++ {
		l, err := d.exchange(ctx, n)
		if err == nil {
			return l, nil
		}
		if ctx.Err() != nil {
			return lease{}, ctx.Err()
		}
		if n >= 2 && err.Error() != warned { // the first losses are those of a switch port coming up
			warned = err.Error()
			d.log.Warn("no address by DHCP yet; this node is reached by its IPv6 link-local address, and goes on asking", "error", err)
		}
		if !errors.Is(err, errNoAnswer) {
			wait(ctx, retryDelay(n, randomByte()))
		}
	}
}

var errNoAnswer = errors.New("no DHCP server answers")

// exchange tries once; n is how often it failed before.
func (d *dhcpClient) exchange(ctx context.Context, n int) (lease, error) {
	conn, err := d.listen(netip.IPv4Unspecified())
	if err != nil {
		return lease{}, fmt.Errorf("opening a socket for DHCP: %w", err)
	}
	defer conn.Close()
	// The answer comes as a broadcast: not every server can send to a host that
	// does not answer ARP yet.
	options := append(d.options(), dhcpv4.WithBroadcast(true))
	discover, err := dhcpv4.NewDiscovery(d.ifi.HardwareAddr, options...)
	if err != nil {
		return lease{}, err
	}
	var refused error
	offer, err := ask(ctx, conn, discover, broadcast, time.Now().Add(retryDelay(n, randomByte())), func(m *dhcpv4.DHCPv4) bool {
		if m.MessageType() != dhcpv4.MessageTypeOffer {
			return false
		}
		_, bad := newLease(m, d.taken)
		if bad != nil {
			refused = bad
		}
		return bad == nil
	})
	if err != nil {
		if refused != nil {
			return lease{}, refused
		}
		return lease{}, err
	}
	request, err := dhcpv4.NewRequestFromOffer(offer, options...)
	if err != nil {
		return lease{}, err
	}
	return d.confirm(ctx, conn, request, broadcast, time.Now().Add(retryDelay(n+1, randomByte())), offer.ServerIdentifier())
}

// confirm sends a REQUEST and waits for its ACK; server is nil if any may answer.
func (d *dhcpClient) confirm(ctx context.Context, conn net.PacketConn, request *dhcpv4.DHCPv4, to net.Addr, until time.Time, server net.IP) (lease, error) {
	answer, err := ask(ctx, conn, request, to, until, func(m *dhcpv4.DHCPv4) bool {
		t := m.MessageType()
		return (t == dhcpv4.MessageTypeAck || t == dhcpv4.MessageTypeNak) && (server == nil || m.ServerIdentifier().Equal(server))
	})
	if err != nil {
		return lease{}, err
	}
	if answer.MessageType() == dhcpv4.MessageTypeNak {
		return lease{}, errRefused
	}
	return newLease(answer, d.taken)
}

var errRefused = errors.New("the DHCP server refuses the address")

// hold renews the lease until it is lost or ctx ends.
func (d *dhcpClient) hold(ctx context.Context, l lease) {
	start := time.Now()
	for l.Length < infiniteLease {
		at := start.Add(l.T1)
		if !wait(ctx, time.Until(at)) {
			return
		}
		next, err := d.renew(ctx, l, start)
		if ctx.Err() != nil {
			return
		}
		if err != nil {
			d.log.Warn("the DHCP lease is lost", "address", l.Address, "error", err)
			d.remove(l)
			return
		}
		if next.Address != l.Address {
			d.remove(l)
		}
		start = time.Now()
		if err := d.apply(next); err != nil {
			d.log.Error("setting the address that DHCP gave", "error", err)
			return
		}
		l = next
		d.log.Debug("DHCP lease renewed", "address", l.Address, "for", l.Length)
	}
	<-ctx.Done()
}

// renew asks the server until T2, then any server until the lease ends.
func (d *dhcpClient) renew(ctx context.Context, l lease, start time.Time) (lease, error) {
	rebind, end := start.Add(l.T2), start.Add(l.Length)
	for time.Now().Before(end) && ctx.Err() == nil {
		until := rebind
		rebinding := !time.Now().Before(rebind)
		if rebinding {
			until = end
		}
		// Half of what remains, at least a minute (RFC 2131 section 4.4.5).
		try := min(time.Until(until), max(time.Until(until)/2, time.Minute))
		next, err := d.renewOnce(ctx, l, rebinding, time.Now().Add(min(try, 10*time.Second)))
		if err == nil || errors.Is(err, errRefused) {
			return next, err
		}
		// A request that cannot be sent fails at once: never ask in a row.
		wait(ctx, max(try-10*time.Second, time.Second))
	}
	return lease{}, errNoAnswer
}

// renewOnce sends one request, by broadcast frame in either case: it needs no
// neighbour entry, and the packet inside goes to the server alone.
func (d *dhcpClient) renewOnce(ctx context.Context, l lease, rebinding bool, until time.Time) (lease, error) {
	conn, err := d.listen(l.Address.Addr())
	if err != nil {
		return lease{}, err
	}
	defer conn.Close()
	// The kernel has the address now, and would answer "port unreachable" if no
	// socket of its own took the answer as well.
	if quiet, err := net.ListenPacket("udp4", netip.AddrPortFrom(l.Address.Addr(), dhcpv4.ClientPort).String()); err == nil {
		defer quiet.Close()
	}
	request, err := dhcpv4.NewRenewFromAck(l.ack, d.options()...)
	if err != nil {
		return lease{}, err
	}
	to, server := net.Addr(&net.UDPAddr{IP: l.Server.AsSlice(), Port: dhcpv4.ServerPort}), net.IP(l.Server.AsSlice())
	if rebinding {
		to, server = broadcast, nil
	}
	return d.confirm(ctx, conn, request, to, until, server)
}

func (d *dhcpClient) options() []dhcpv4.Modifier {
	return []dhcpv4.Modifier{
		dhcpv4.WithOption(dhcpv4.OptHostName(d.hostname)),
		dhcpv4.WithOption(dhcpv4.OptClassIdentifier("clonecluster")),
		dhcpv4.WithOption(dhcpv4.OptMaxMessageSize(maxDHCP)),
		dhcpv4.WithRequestedOptions(dhcpv4.OptionSubnetMask, dhcpv4.OptionRouter, dhcpv4.OptionDomainNameServer,
			dhcpv4.OptionIPAddressLeaseTime, dhcpv4.OptionRenewTimeValue, dhcpv4.OptionRebindingTimeValue),
	}
}

const maxDHCP = 1500

var broadcast net.Addr = &net.UDPAddr{IP: net.IPv4bcast, Port: dhcpv4.ServerPort}

// ask sends a message and waits for the answer that is wanted.
func ask(ctx context.Context, conn net.PacketConn, m *dhcpv4.DHCPv4, to net.Addr, until time.Time, wanted func(*dhcpv4.DHCPv4) bool) (*dhcpv4.DHCPv4, error) {
	if err := conn.SetDeadline(until); err != nil {
		return nil, err
	}
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	if _, err := conn.WriteTo(m.ToBytes(), to); err != nil {
		return nil, fmt.Errorf("asking for an address: %w", err)
	}
	buf := make([]byte, maxDHCP)
	for {
		n, _, err := conn.ReadFrom(buf)
		if err != nil {
			var t interface{ Timeout() bool }
			if errors.As(err, &t) && t.Timeout() {
				return nil, errNoAnswer
			}
			return nil, fmt.Errorf("waiting for an address: %w", err)
		}
		if answer := parseAnswer(buf[:n], m); answer != nil && wanted(answer) {
			return answer, nil
		}
	}
}

// parseAnswer reads a datagram, nil unless it answers this question. A panic of
// the parser is a datagram that is no answer.
func parseAnswer(b []byte, question *dhcpv4.DHCPv4) (answer *dhcpv4.DHCPv4) {
	defer func() {
		if recover() != nil {
			answer = nil
		}
	}()
	m, err := dhcpv4.FromBytes(b)
	if err != nil || m.OpCode != dhcpv4.OpcodeBootReply || m.TransactionID != question.TransactionID ||
		m.ClientHWAddr.String() != question.ClientHWAddr.String() {
		return nil
	}
	return m
}

// listenDHCP is a packet socket that sees only what is for the DHCP client: the
// NIC may have no address to receive with, and every frame for the cluster comes
// by. It sends from the source address, and receives whatever the destination:
// refusals are broadcast even to a client that has an address.
func listenDHCP(ifi *net.Interface, source netip.Addr) (net.PacketConn, error) {
	conn, err := packet.Listen(ifi, packet.Datagram, unix.ETH_P_IP, &packet.Config{Filter: dhcpFilter})
	if err != nil {
		return nil, err
	}
	return dhcpConn{
		PacketConn: nclient4.NewBroadcastUDPConn(conn, &net.UDPAddr{Port: dhcpv4.ClientPort}),
		sender:     nclient4.NewBroadcastUDPConn(conn, &net.UDPAddr{IP: source.AsSlice(), Port: dhcpv4.ClientPort}),
	}, nil
}

type dhcpConn struct {
	net.PacketConn
	sender net.PacketConn
}

func (c dhcpConn) WriteTo(b []byte, to net.Addr) (int, error) { return c.sender.WriteTo(b, to) }

var dhcpFilter = func() []bpf.RawInstruction {
	raw, err := bpf.Assemble([]bpf.Instruction{
		bpf.LoadAbsolute{Off: 9, Size: 1}, // protocol
		bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: unix.IPPROTO_UDP, SkipTrue: 5},
		bpf.LoadAbsolute{Off: 6, Size: 2}, // flags and fragment
		bpf.JumpIf{Cond: bpf.JumpBitsSet, Val: 0x1fff, SkipTrue: 3},
		bpf.LoadMemShift{Off: 0},          // X = header length
		bpf.LoadIndirect{Off: 2, Size: 2}, // UDP destination
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: dhcpv4.ClientPort, SkipTrue: 1, SkipFalse: 0},
		bpf.RetConstant{Val: 0},
		bpf.RetConstant{Val: 0x40000},
	})
	if err != nil {
		panic(err) // the program is constant, and a test assembles it
	}
	return raw
}()

// wait is false when ctx ended first.
func wait(ctx context.Context, d time.Duration) bool {
	if d <= 0 {
		return ctx.Err() == nil
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}

func randomByte() byte {
	var b [2]byte
	_, _ = rand.Read(b[:])
	return byte(binary.NativeEndian.Uint16(b[:]))
}
