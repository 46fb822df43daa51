// Package nethost is a host on a virtual switch with a TCP/IP stack in user
// space: the client of a cluster under test, without root, network namespaces or
// a TAP. It resolves addresses by ARP and neighbour discovery like any client,
// can use several source addresses so that its flows spread, can be a DHCP server
// for the segment, and forwards TCP ports of the real machine into it.
//
// The stack is gVisor's netstack: IPv4, IPv6, ARP and NDP (RFC 826, RFC 4861),
// TCP with SACK and window scaling, UDP and ICMP, with frames of at most 1514
// bytes. It verifies every checksum.
package nethost

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/link/channel"
	"gvisor.dev/gvisor/pkg/tcpip/link/ethernet"
	"gvisor.dev/gvisor/pkg/tcpip/network/arp"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv6"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/icmp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"
	"gvisor.dev/gvisor/pkg/waiter"

	"clonecluster/netcore/dhcpd"
	"clonecluster/qemu/vswitch"
)

const (
	mtu = 1500
	nic = tcpip.NICID(1)
)

// Config is a host.
type Config struct {
	MAC net.HardwareAddr
	// Addrs are the host's addresses with the length of their subnet. The first
	// of each family is the source of what asks for no other.
	Addrs []netip.Prefix
	// DHCP makes the host the DHCP server of its segment; nil means it is not.
	DHCP *DHCP
	// Log may be nil.
	Log *slog.Logger
}

// Validate reports what is wrong with a configuration.
func (c Config) Validate() error {
	if len(c.MAC) != 6 || c.MAC[0]&1 != 0 {
		return fmt.Errorf("host: %q is not a unicast MAC address", c.MAC)
	}
	for _, a := range c.Addrs {
		if !a.IsValid() || a.Addr().Is4In6() || a.Addr().IsUnspecified() || a.Addr().IsMulticast() {
			return fmt.Errorf("host: %v is not the address of a host", a)
		}
	}
	if c.DHCP != nil {
		return c.DHCP.on(c.first(true)).Validate()
	}
	return nil
}

// first is the first address of a family.
func (c Config) first(is4 bool) netip.Prefix {
	for _, a := range c.Addrs {
		if a.Addr().Is4() == is4 {
			return a
		}
	}
	return netip.Prefix{}
}

// Host is a running host. Its methods may be called concurrently.
type Host struct {
	cfg   Config
	log   *slog.Logger
	stack *stack.Stack
	link  *link

	wg     sync.WaitGroup
	ctx    context.Context
	cancel context.CancelFunc

	dhcpMu sync.Mutex
	dhcp   *dhcpd.Server
}

// link is the lower end of the stack: a port of the switch.
type link struct {
	*channel.Endpoint // for everything but writing
	mac               [6]byte
	port              *vswitch.Port
}

// WritePackets implements stack.LinkEndpoint. Nothing is queued here: the switch
// copies the frame and never blocks.
func (l *link) WritePackets(pkts stack.PacketBufferList) (int, tcpip.Error) {
	for _, pkt := range pkts.AsSlice() {
		v := pkt.ToView()
		l.port.Send(v.AsSlice())
		v.Release()
	}
	return pkts.Len(), nil
}

// Receive implements vswitch.Receiver with the address filter of a network card.
func (l *link) Receive(frame []byte) {
	if len(frame) < header.EthernetMinimumSize || (frame[0]&1 == 0 && [6]byte(frame[:6]) != l.mac) {
		return
	}
	pkt := stack.NewPacketBuffer(stack.PacketBufferOptions{Payload: buffer.MakeWithData(frame)})
	defer pkt.DecRef()
	l.InjectInbound(0, pkt)
}

// Attach connects a host to a switch, by a port of the given name. Close the host
// before the switch.
func Attach(sw *vswitch.Switch, port string, cfg Config) (*Host, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	h := &Host{cfg: cfg, log: cfg.Log}
	h.ctx, h.cancel = context.WithCancel(context.Background())
	h.link = &link{
		// The wrapper takes the header off the MTU of the lower end.
		Endpoint: channel.New(1, mtu+header.EthernetMinimumSize, tcpip.LinkAddress(cfg.MAC)),
		mac:      [6]byte(cfg.MAC),
	}
	h.stack = stack.New(stack.Options{
		NetworkProtocols: []stack.NetworkProtocolFactory{
			arp.NewProtocol, ipv4.NewProtocol,
			ipv6.NewProtocolWithOptions(ipv6.Options{AutoGenLinkLocal: true}),
		},
		TransportProtocols: []stack.TransportProtocolFactory{
			tcp.NewProtocol, udp.NewProtocol, icmp.NewProtocol4, icmp.NewProtocol6,
		},
	})
	p, err := sw.Attach(port, h.link)
	if err != nil {
		h.stack.Destroy()
		return nil, fmt.Errorf("attaching host %s: %w", port, err)
	}
	h.link.port = p
	if err := h.configure(); err != nil {
		h.Close()
		return nil, fmt.Errorf("setting up host %s: %w", port, err)
	}
	return h, nil
}

func (h *Host) configure() error {
	sack, reuse := tcpip.TCPSACKEnabled(true), tcpip.TCPTimeWaitReuseGlobal
	h.stack.SetTransportProtocolOption(tcp.ProtocolNumber, &sack)
	h.stack.SetTransportProtocolOption(tcp.ProtocolNumber, &reuse)
	// With RACK (RFC 8985) this stack sends a tail loss probe and then, if there is no
	// answer, nothing for a minute: the client of a dead server would not learn of it.
	// Without it a lost segment is sent again after RFC 6298's timeouts.
	recovery := tcpip.TCPRecovery(0)
	h.stack.SetTransportProtocolOption(tcp.ProtocolNumber, &recovery)
	if err := h.stack.CreateNIC(nic, ethernet.New(h.link)); err != nil {
		return errors.New(err.String())
	}
	routes := []tcpip.Route{
		{Destination: header.IPv6LinkLocalPrefix.Subnet(), NIC: nic},
		{Destination: subnet(netip.MustParsePrefix("ff00::/8")), NIC: nic},
	}
	for _, a := range h.cfg.Addrs {
		if err := h.stack.AddProtocolAddress(nic, tcpip.ProtocolAddress{
			Protocol: protocol(a.Addr()),
			AddressWithPrefix: tcpip.AddressWithPrefix{
				Address: address(a.Addr()), PrefixLen: a.Bits(),
			},
		}, stack.AddressProperties{}); err != nil {
			return fmt.Errorf("adding %v: %s", a, err)
		}
		routes = append(routes, tcpip.Route{Destination: subnet(a.Masked()), NIC: nic})
	}
	h.stack.SetRouteTable(routes)
	if h.cfg.DHCP != nil {
		return h.serveDHCP()
	}
	return nil
}

// Close ends the host's connections, forwards and goroutines.
func (h *Host) Close() {
	h.cancel()
	h.wg.Wait()
	h.stack.RemoveNIC(nic)
	h.stack.Destroy()
}

func address(a netip.Addr) tcpip.Address { return tcpip.AddrFromSlice(a.AsSlice()) }

func protocol(a netip.Addr) tcpip.NetworkProtocolNumber {
	if a.Is4() {
		return ipv4.ProtocolNumber
	}
	return ipv6.ProtocolNumber
}

func subnet(p netip.Prefix) tcpip.Subnet {
	return tcpip.AddressWithPrefix{Address: address(p.Addr()), PrefixLen: p.Bits()}.Subnet()
}

func full(a netip.AddrPort) tcpip.FullAddress {
	f := tcpip.FullAddress{NIC: nic, Port: a.Port()}
	if a.Addr().IsValid() {
		f.Addr = address(a.Addr().Unmap())
	}
	return f
}

// DialContext connects to an IP address and port; there is no name resolution.
// network is tcp, udp, or one of these with a 4 or 6 behind it. Its signature is
// that of net.Dialer and http.Transport.
func (h *Host) DialContext(ctx context.Context, network, addr string) (net.Conn, error) {
	return h.DialFrom(ctx, netip.Addr{}, network, addr)
}

// DialFrom is DialContext from one of the host's addresses.
func (h *Host) DialFrom(ctx context.Context, src netip.Addr, network, addr string) (net.Conn, error) {
	dst, err := netip.ParseAddrPort(addr)
	if err != nil {
		return nil, fmt.Errorf("dialing: %w", err)
	}
	var local tcpip.FullAddress
	if src.IsValid() {
		local = full(netip.AddrPortFrom(src, 0))
	}
	remote := full(dst)
	switch strings.TrimRight(network, "46") {
	case "tcp":
		c, err := gonet.DialTCPWithBind(ctx, h.stack, local, remote, protocol(dst.Addr().Unmap()))
		if err != nil {
			return nil, fmt.Errorf("dialing %s: %w", addr, err)
		}
		return c, nil
	case "udp":
		c, err := gonet.DialUDP(h.stack, &local, &remote, protocol(dst.Addr().Unmap()))
		if err != nil {
			return nil, fmt.Errorf("dialing %s: %w", addr, err)
		}
		return c, nil
	}
	return nil, fmt.Errorf("dialing: network %q: want tcp or udp", network)
}

// Listen listens for TCP connections on a port of one address, or of all
// addresses of a family if addr is unspecified (0.0.0.0 or ::).
func (h *Host) Listen(addr netip.AddrPort) (net.Listener, error) {
	wq, ep, err := h.bind(tcp.ProtocolNumber, addr)
	if err != nil {
		return nil, err
	}
	if terr := ep.Listen(128); terr != nil {
		ep.Close()
		return nil, fmt.Errorf("listening on %v: %s", addr, terr)
	}
	return gonet.NewTCPListener(h.stack, wq, ep), nil
}

// ListenPacket is Listen for UDP. It takes broadcasts if addr is unspecified.
func (h *Host) ListenPacket(addr netip.AddrPort) (net.PacketConn, error) {
	wq, ep, err := h.bind(udp.ProtocolNumber, addr)
	if err != nil {
		return nil, err
	}
	return gonet.NewUDPConn(wq, ep), nil
}

func (h *Host) bind(transport tcpip.TransportProtocolNumber, addr netip.AddrPort) (*waiter.Queue, tcpip.Endpoint, error) {
	wq := new(waiter.Queue)
	ep, err := h.stack.NewEndpoint(transport, protocol(addr.Addr()), wq)
	if err != nil {
		return nil, nil, fmt.Errorf("listening on %v: %s", addr, err)
	}
	ep.SocketOptions().SetV6Only(true) // or :: would take the port of both families
	ep.SocketOptions().SetBroadcast(true)
	f := tcpip.FullAddress{NIC: nic, Port: addr.Port()}
	if !addr.Addr().IsUnspecified() {
		f.Addr = address(addr.Addr())
	}
	if err := ep.Bind(f); err != nil {
		ep.Close()
		return nil, nil, fmt.Errorf("listening on %v: %s", addr, err)
	}
	return wq, ep, nil
}

// HTTPClient is an HTTP client on this host. Its connections come from the given
// addresses in turn, or from the default one. Close idle connections of its
// transport before closing the host.
func (h *Host) HTTPClient(src ...netip.Addr) *http.Client {
	var (
		mu sync.Mutex
		n  int
	)
	return &http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
			var from netip.Addr
			if len(src) > 0 {
				mu.Lock()
				from = src[n%len(src)]
				n++
				mu.Unlock()
			}
			return h.DialFrom(ctx, from, network, addr)
		},
		MaxIdleConnsPerHost: 16,
		IdleConnTimeout:     30 * time.Second,
	}}
}

// Forward accepts TCP connections on a real address ("127.0.0.1:8080") and
// carries them to target on the segment, until the host is closed. It returns the
// address that it listens on, which matters if the port was 0.
func (h *Host) Forward(listen string, target netip.AddrPort) (net.Addr, error) {
	ln, err := net.Listen("tcp", listen)
	if err != nil {
		return nil, fmt.Errorf("forwarding to %v: %w", target, err)
	}
	stop := context.AfterFunc(h.ctx, func() { ln.Close() })
	h.wg.Go(func() {
		defer stop()
		var conns sync.WaitGroup
		defer conns.Wait()
		slots := make(chan struct{}, 256) // bounds what a busy client can cost
		for {
			conn, err := ln.Accept()
			if err != nil {
				if h.ctx.Err() == nil {
					h.log.Error("forwarding", "listen", listen, "err", err)
				}
				return
			}
			slots <- struct{}{}
			conns.Go(func() {
				defer func() { <-slots }()
				h.carry(conn, target)
			})
		}
	})
	return ln.Addr(), nil
}

// carry joins a real connection to a new one on the segment. Each direction ends
// by itself, as TCP's do.
func (h *Host) carry(outer net.Conn, target netip.AddrPort) {
	defer outer.Close()
	ctx, cancel := context.WithTimeout(h.ctx, 10*time.Second)
	inner, err := h.DialContext(ctx, "tcp", target.String())
	cancel()
	if err != nil {
		h.log.Debug("forwarding", "err", err)
		if t, ok := outer.(*net.TCPConn); ok {
			t.SetLinger(0) // a reset says that nobody answered; a close would look like an empty answer
		}
		return
	}
	defer inner.Close()
	defer context.AfterFunc(h.ctx, func() { outer.Close(); inner.Close() })()
	var both sync.WaitGroup
	for _, d := range []struct{ dst, src net.Conn }{{outer, inner}, {inner, outer}} {
		both.Go(func() {
			if _, err := io.Copy(d.dst, d.src); err != nil {
				outer.Close()
				inner.Close()
				return
			}
			if w, ok := d.dst.(interface{ CloseWrite() error }); ok {
				w.CloseWrite()
			}
		})
	}
	both.Wait()
}

// Neighbor is a row of the host's ARP or NDP cache.
type Neighbor struct {
	Addr  netip.Addr
	MAC   net.HardwareAddr
	State string // the states of RFC 4861, section 7.3.2: Reachable, Stale, …
}

// Neighbors is the ARP and NDP cache, by address.
func (h *Host) Neighbors() []Neighbor {
	var all []Neighbor
	for _, proto := range []tcpip.NetworkProtocolNumber{ipv4.ProtocolNumber, ipv6.ProtocolNumber} {
		entries, err := h.stack.Neighbors(nic, proto)
		if err != nil {
			continue // being closed
		}
		for _, e := range entries {
			a, ok := netip.AddrFromSlice(e.Addr.AsSlice())
			if !ok {
				continue
			}
			all = append(all, Neighbor{a, net.HardwareAddr(e.LinkAddr), e.State.String()})
		}
	}
	slices.SortFunc(all, func(a, b Neighbor) int { return a.Addr.Compare(b.Addr) })
	return all
}

// MACOf is what the host's cache holds for an address, nil if nothing.
func (h *Host) MACOf(a netip.Addr) net.HardwareAddr {
	for _, n := range h.Neighbors() {
		if n.Addr == a && len(n.MAC) == 6 {
			return n.MAC
		}
	}
	return nil
}

// FlushNeighbors empties the ARP and NDP cache.
func (h *Host) FlushNeighbors() {
	h.stack.ClearNeighbors(nic, ipv4.ProtocolNumber)
	h.stack.ClearNeighbors(nic, ipv6.ProtocolNumber)
}

// Ping sends an echo request (RFC 792, RFC 4443) every second until one is
// answered, and returns the round-trip time of that one.
func (h *Host) Ping(ctx context.Context, dst netip.Addr) (time.Duration, error) {
	return h.PingFrom(ctx, netip.Addr{}, dst)
}

// PingFrom is Ping from one of the host's addresses.
func (h *Host) PingFrom(ctx context.Context, src, dst netip.Addr) (time.Duration, error) {
	rtt, err := h.ping(ctx, src, dst)
	if err != nil {
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		return 0, fmt.Errorf("pinging %v: %w", dst, err)
	}
	return rtt, nil
}

func (h *Host) ping(ctx context.Context, src, dst netip.Addr) (time.Duration, error) {
	proto := icmp.ProtocolNumber4
	if dst.Is6() {
		proto = icmp.ProtocolNumber6
	}
	var wq waiter.Queue
	ep, terr := h.stack.NewEndpoint(proto, protocol(dst), &wq)
	if terr != nil {
		return 0, errors.New(terr.String())
	}
	c := gonet.NewUDPConn(&wq, ep) // carries any datagram endpoint
	defer c.Close()
	if src.IsValid() {
		if terr := ep.Bind(full(netip.AddrPortFrom(src, 0))); terr != nil {
			return 0, errors.New(terr.String())
		}
	}
	if terr := ep.Connect(full(netip.AddrPortFrom(dst, 0))); terr != nil {
		return 0, errors.New(terr.String())
	}

	begin := time.Now()
	reply := make([]byte, mtu)
	var sent []time.Duration // by sequence number
	for seq := range 1 << 16 {
		sent = append(sent, time.Since(begin))
		// An error is not the end: it may be that of an address that did not
		// resolve the last time.
		c.Write(echo(dst, uint16(seq)))
		c.SetReadDeadline(time.Now().Add(time.Second))
		stop := context.AfterFunc(ctx, func() { c.SetReadDeadline(time.Unix(1, 0)) })
		for {
			n, err := c.Read(reply)
			if err != nil {
				break // the second is over, or an ICMP error came: try again
			}
			if n < 8 {
				continue
			}
			if s := int(binary.BigEndian.Uint16(reply[6:])); s <= seq && bytes.Equal(reply[8:n], echoData) {
				stop()
				return time.Since(begin) - sent[s], nil
			}
		}
		stop()
		if wait := time.Until(begin.Add(time.Duration(seq+1) * time.Second)); wait > 0 {
			select {
			case <-time.After(wait):
			case <-ctx.Done():
			}
		}
		if ctx.Err() != nil {
			return 0, ctx.Err()
		}
	}
	return 0, errors.New("no answer in 18 hours")
}

var echoData = []byte("clonecluster client host")

// echo is an echo request; the stack fills in checksum and identifier.
func echo(dst netip.Addr, seq uint16) []byte {
	b := []byte{8, 0, 0, 0, 0, 0, byte(seq >> 8), byte(seq)}
	if dst.Is6() {
		b[0] = 128
	}
	return append(b, echoData...)
}
