// Package pxe boots machines from the network: it tells their firmware what to
// load (DHCP with the options of PXE 2.1, RFC 4578 and UEFI 2.10's HTTP boot), hands
// it out by TFTP and HTTP, and follows each machine until its node answers.
//
// It stands beside the network's own DHCP server and adds to its offers (a proxy:
// no address comes from here), or it is the DHCP server of a segment that has none.
// Decision 19 has what each kind of client is sent, and why.
package pxe

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
	"golang.org/x/sync/errgroup"

	"clonecluster/image/pxe/datagram"
	"clonecluster/image/pxe/tftp"
	"clonecluster/netcore/dhcpd"
)

// Network is where a server listens: an [Interface] of this computer, or a host
// with a network stack of its own, as nethost.Host.
type Network interface {
	// ListenPacket opens a UDP socket. One at 0.0.0.0 takes broadcasts, too; one at
	// 255.255.255.255 only those.
	ListenPacket(netip.AddrPort) (net.PacketConn, error)
	Listen(netip.AddrPort) (net.Listener, error)
	DialContext(ctx context.Context, network, addr string) (net.Conn, error)
}

// DefaultHTTPPort is where files are handed out by HTTP. Port 80 is often taken,
// and every firmware that loads by HTTP takes a port in its URL.
const DefaultHTTPPort = 8067

// Options is a server.
type Options struct {
	Network Network
	// Addr is the address on the segment that machines are sent to, with the
	// length of the subnet's prefix.
	Addr   netip.Prefix
	Images []Image // one for each architecture
	// Allow is the machines that are served; empty means all.
	Allow []net.HardwareAddr
	// Pool makes it the segment's DHCP server; nil means a proxy.
	Pool *Pool
	// VIPs are the clusters' own addresses: no machine is given one.
	VIPs []netip.Addr
	// HTTPPort is 0 for DefaultHTTPPort.
	HTTPPort uint16
	// Undionly is the file of iPXE for BIOSes that have no iPXE themselves; empty
	// means that those get nothing.
	Undionly string
	// Health is what a node is asked for when it runs, on its own address: the
	// port and path of a URL (":80/healthz"). Empty means that nobody asks.
	Health string
	// Static gives the address of a node that does not ask DHCP for one, or an
	// invalid one; nil means that nodes ask.
	Static func(net.HardwareAddr) netip.Addr
	// Silent says that nodes neither ask DHCP nor have an address that Static
	// knows: nothing is heard of them once they are loaded.
	Silent bool
	// OnEvent is called for everything that happens, one call at a time. It must
	// be quick and must not call the server.
	OnEvent func(Event)
}

// Pool is what a DHCP server gives out.
type Pool struct {
	First, Last netip.Addr
	Router      netip.Addr    // invalid means none
	Lease       time.Duration // 0 means 1 hour
}

// maxPool bounds what is remembered and searched.
const maxPool = 4096

// Server is a server for machines that boot from the network.
type Server struct {
	opts     Options
	images   map[string]*openImage
	tokens   tokens
	httpPort uint16
	tftp     *tftp.Server

	mu       sync.Mutex
	timeline *timeline
	dhcp     *dhcpd.Server // nil: proxy
	arch     map[[6]byte]string
	news     bucket // new machines
	replies  bucket
	rivals   rivals
}

// New makes a server. Close it.
func New(o Options) (*Server, error) {
	if err := o.validate(); err != nil {
		return nil, err
	}
	s := &Server{
		opts: o, images: map[string]*openImage{}, httpPort: o.HTTPPort, arch: map[[6]byte]string{},
		news: bucket{rate: 20, size: 512}, replies: bucket{rate: 200, size: 400},
		tokens: tokens{make([]byte, 32)},
	}
	if s.httpPort == 0 {
		s.httpPort = DefaultHTTPPort
	}
	if _, err := rand.Read(s.tokens.secret); err != nil {
		return nil, err
	}
	final := Up
	switch {
	case o.Silent:
		final = File
	case o.Health == "":
		final = Address
	}
	s.timeline = newTimeline(final, s.report)
	for _, img := range o.Images {
		open, err := img.open()
		if err != nil {
			s.Close()
			return nil, err
		}
		s.images[img.Arch] = open
	}
	if o.Pool != nil {
		s.dhcp = dhcpd.New(o.pool())
	}
	s.tftp = &tftp.Server{
		Open: s.openTFTP,
		Socket: func() (net.PacketConn, error) {
			return o.Network.ListenPacket(netip.AddrPortFrom(o.Addr.Addr(), 0))
		},
		Progress: func(name string, client netip.AddrPort, n int64) {
			if mac, file, ok := s.tokens.machine(name); ok {
				s.with(func(t *timeline, now time.Time) { t.loading(mac, file, n, client.Addr(), now) })
			}
		},
		Done: s.doneTFTP,
	}
	return s, nil
}

// pool is the configuration of the DHCP server.
func (o Options) pool() dhcpd.Config {
	return dhcpd.Config{Server: o.Addr, First: o.Pool.First, Last: o.Pool.Last, Router: o.Pool.Router, Except: o.VIPs, Lease: o.Pool.Lease, Polite: true}
}

func (o Options) validate() error {
	switch {
	case o.Network == nil:
		return errors.New("pxe: no network")
	case !o.Addr.IsValid() || !o.Addr.Addr().Is4():
		return errors.New("pxe: no IPv4 address on the segment, and PXE needs one")
	case len(o.Images) == 0:
		return errors.New("pxe: no image")
	}
	for i, img := range o.Images {
		if img.Arch != "amd64" && img.Arch != "arm64" {
			return fmt.Errorf("pxe: an image for %q; want amd64 or arm64", img.Arch)
		}
		if slices.ContainsFunc(o.Images[:i], func(other Image) bool { return other.Arch == img.Arch }) {
			return fmt.Errorf("two images for %s; machines would not know which: serve one of them", img.Arch)
		}
	}
	for _, mac := range o.Allow {
		if len(mac) != 6 || mac[0]&1 != 0 {
			return fmt.Errorf("%v is not the MAC address of a machine", mac)
		}
	}
	if slices.Contains(o.VIPs, o.Addr.Addr()) {
		return fmt.Errorf("this computer has %v, which is the address of the cluster: give it another one", o.Addr.Addr())
	}
	if o.Pool != nil {
		c := o.pool()
		if slices.Contains(o.VIPs, c.Router) {
			return fmt.Errorf("the router %v is the address of the cluster, which is no gateway", c.Router)
		}
		if err := c.Validate(); err != nil {
			return err
		}
		first, last := c.First.As4(), c.Last.As4()
		if n := int(last[2])<<8 + int(last[3]) - int(first[2])<<8 - int(first[3]) + 1; first[0] != last[0] || first[1] != last[1] || n > maxPool {
			return fmt.Errorf("the range %v-%v is too large; at most %d addresses", c.First, c.Last, maxPool)
		}
		if r := c.Router; r.IsValid() && !o.Addr.Contains(r) {
			return fmt.Errorf("the router %v is not in %v", r, o.Addr.Masked())
		}
	}
	return nil
}

// Close closes the images' folders. Run has to have ended.
func (s *Server) Close() {
	for _, img := range s.images {
		img.root.Close()
	}
}

// report hands an event to whoever listens. s.mu is held.
func (s *Server) report(e Event) {
	if s.opts.OnEvent != nil {
		s.opts.OnEvent(e)
	}
}

// with runs a step of the timeline.
func (s *Server) with(step func(*timeline, time.Time)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	step(s.timeline, time.Now())
}

func (s *Server) note(format string, args ...any) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.report(Event{Time: time.Now(), Event: Note, Text: fmt.Sprintf(format, args...)})
}

// Machines is where each machine is, by the time of its boot.
func (s *Server) Machines() []Machine {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.timeline.list()
}

// sockets are what a server listens on.
type sockets struct {
	dhcp, boot, tftp net.PacketConn
	watch            net.PacketConn // of what other servers say; may be nil
	http             net.Listener
}

func (s *Server) listen() (*sockets, error) {
	var k sockets
	var err error
	packet := func(to *net.PacketConn, port uint16, what string) {
		if err != nil {
			return
		}
		if *to, err = s.opts.Network.ListenPacket(netip.AddrPortFrom(netip.IPv4Unspecified(), port)); err != nil {
			err = &ListenError{"UDP", port, what, err}
		}
	}
	packet(&k.dhcp, dhcpPort, "DHCP")
	packet(&k.boot, bootPort, "PXE")
	packet(&k.tftp, tftpPort, "TFTP")
	if err == nil {
		if k.http, err = s.opts.Network.Listen(netip.AddrPortFrom(s.opts.Addr.Addr(), s.httpPort)); err != nil {
			err = &ListenError{"TCP", s.httpPort, "HTTP", err}
		}
	}
	if err != nil {
		k.close()
		return nil, err
	}
	bcast := netip.AddrFrom4([4]byte{255, 255, 255, 255})
	if k.watch, err = s.opts.Network.ListenPacket(netip.AddrPortFrom(bcast, replyPort)); err != nil {
		k.watch = nil
		s.note("other DHCP servers cannot be looked for: UDP port %d: %v", replyPort, err)
	}
	return &k, nil
}

func (k *sockets) close() {
	for _, c := range []net.PacketConn{k.dhcp, k.boot, k.tftp, k.watch} {
		if c != nil {
			c.Close()
		}
	}
	if k.http != nil {
		k.http.Close()
	}
}

// ListenError is a port that cannot be had.
type ListenError struct {
	Network string // UDP or TCP
	Port    uint16
	What    string // DHCP, TFTP, …
	Err     error
}

func (e *ListenError) Error() string {
	return fmt.Sprintf("listening for %s on %s port %d: %v", e.What, e.Network, e.Port, e.Err)
}

func (e *ListenError) Unwrap() error { return e.Err }

// Run serves until ctx ends, and returns nil then. A DHCP server looks first
// whether the segment has one already, and ends with an error if so.
func (s *Server) Run(ctx context.Context) error {
	k, err := s.listen()
	if err != nil {
		return err
	}
	defer k.close()
	g, ctx := errgroup.WithContext(ctx)
	// One deadline in the past ends each socket's reader.
	stop := context.AfterFunc(ctx, func() {
		for _, c := range []net.PacketConn{k.dhcp, k.boot, k.watch} {
			if c != nil {
				c.SetReadDeadline(time.Unix(1, 0))
			}
		}
	})
	defer stop()
	if k.watch != nil {
		g.Go(func() error { return s.read(ctx, k.watch, s.overhear) })
	}
	g.Go(func() error {
		if err := s.lookFirst(ctx, k); err != nil {
			return err
		}
		g.Go(func() error { s.lookOn(ctx, k); return nil })
		g.Go(func() error {
			return s.read(ctx, k.dhcp, func(m *dhcpv4.DHCPv4, _ net.Addr) { s.onDHCP(k, m) })
		})
		g.Go(func() error {
			return s.read(ctx, k.boot, func(m *dhcpv4.DHCPv4, from net.Addr) { s.onBoot(k, m, from) })
		})
		g.Go(func() error { return s.tftp.Serve(ctx, k.tftp) })
		g.Go(func() error { return s.serveHTTP(ctx, k.http) })
		g.Go(func() error { s.watch(ctx); return nil })
		return nil
	})
	if err := g.Wait(); err != nil && !errors.Is(err, context.Canceled) {
		return err
	}
	return nil
}

// read hands the DHCP messages of a socket on until ctx ends.
func (s *Server) read(ctx context.Context, c net.PacketConn, handle func(*dhcpv4.DHCPv4, net.Addr)) error {
	err := datagram.Read(ctx, c, func(data []byte, from net.Addr) {
		if m := parse(data); m != nil {
			handle(m, from)
		}
	})
	if err != nil {
		return fmt.Errorf("reading DHCP messages: %w", err)
	}
	return nil
}

func (s *Server) allowed(mac [6]byte) bool {
	return len(s.opts.Allow) == 0 ||
		slices.ContainsFunc(s.opts.Allow, func(a net.HardwareAddr) bool { return key(a) == mac })
}

// onDHCP answers a message at port 67.
func (s *Server) onDHCP(k *sockets, m *dhcpv4.DHCPv4) {
	s.mu.Lock()
	defer s.mu.Unlock()
	r := s.answer(m, time.Now())
	if r == nil {
		return
	}
	if _, err := k.dhcp.WriteTo(r.ToBytes(), s.destination(m, r)); err != nil {
		s.report(Event{Time: time.Now(), Event: Note, Machine: m.ClientHWAddr.String(), Text: fmt.Sprintf("cannot be answered: %v", err)})
	}
}

// destination is dhcpd's, but for addresses that cannot be this segment's.
func (s *Server) destination(m, r *dhcpv4.DHCPv4) *net.UDPAddr {
	to := dhcpd.Destination(m, r)
	if a := ipv4Of(to.IP); !s.opts.Addr.Contains(a) {
		to.IP = net.IPv4bcast.To4()
	}
	return to
}

// answer decides on a message at port 67: the reply, or nil for none. s.mu is held.
func (s *Server) answer(m *dhcpv4.DHCPv4, now time.Time) *dhcpv4.DHCPv4 {
	if !acceptable(m) || s.rivals.mine(m) {
		return nil
	}
	mac := key(m.ClientHWAddr)
	kind := m.MessageType()
	c := Classify(m)
	boots := c.Kind != NoBoot && c.Kind != Node
	if s.timeline.get(mac, now, false) == nil && boots && !s.news.take(now) {
		return nil
	}
	if c.Kind == Node || kind == dhcpv4.MessageTypeRequest {
		s.heard(mac, c, m, now)
	}
	if !s.allowed(mac) {
		if boots && kind == dhcpv4.MessageTypeDiscover {
			s.timeline.refuse(s.timeline.discover(mac, c, now), "it is not one of the machines that are allowed; --machine "+m.ClientHWAddr.String()+" adds it", now)
		}
		return nil
	}
	var file bootFile
	var err error
	if boots {
		file, err = s.boot(mac, c)
	}
	if boots && kind == dhcpv4.MessageTypeDiscover {
		r := s.timeline.discover(mac, c, now)
		if err != nil {
			s.timeline.refuse(r, err.Error(), now)
		} else {
			r.Refused = ""
		}
	}
	if boots && err != nil || !s.replies.take(now) {
		return nil
	}
	if s.dhcp != nil {
		return s.lease(m, c, file, now)
	}
	if !boots || kind != dhcpv4.MessageTypeDiscover {
		return nil // a proxy has nothing to confirm
	}
	r, err := proxyReply(m, dhcpv4.MessageTypeOffer, c, s.opts.Addr.Addr(), file)
	if err != nil {
		return nil
	}
	s.offered(mac, c, file, now)
	return r
}

// offered notes that a machine is told of a file. s.mu is held.
func (s *Server) offered(mac [6]byte, c Client, file bootFile, now time.Time) {
	if len(s.arch) >= 2*maxMachines {
		clear(s.arch) // at worst a file of the other architecture is asked for
	}
	s.arch[mac] = c.Arch
	s.timeline.offer(s.timeline.get(mac, now, true), file.name, now)
}

// lease is the answer of the segment's DHCP server. s.mu is held.
func (s *Server) lease(m *dhcpv4.DHCPv4, c Client, file bootFile, now time.Time) *dhcpv4.DHCPv4 {
	if other := ipv4Of(m.ServerIdentifier()); other.IsValid() && other != s.opts.Addr.Addr() {
		s.rivals.report(s, other, "a machine takes its address from there", now)
	}
	r := s.dhcp.Answer(m, now)
	if r == nil || file == (bootFile{}) {
		return r
	}
	switch r.MessageType() {
	case dhcpv4.MessageTypeOffer:
		s.offered(key(m.ClientHWAddr), c, file, now)
		fallthrough
	case dhcpv4.MessageTypeAck:
		withBoot(r, m, c, s.opts.Addr.Addr(), file)
	}
	return r
}

// heard is what a machine says to whatever DHCP server there is: a node that asks,
// and which address is taken. s.mu is held.
func (s *Server) heard(mac [6]byte, c Client, m *dhcpv4.DHCPv4, now time.Time) {
	addr := ipv4Of(m.RequestedIPAddress())
	if !addr.IsValid() {
		addr = ipv4Of(m.ClientIPAddr)
	}
	if c.Kind == Node {
		if m.MessageType() != dhcpv4.MessageTypeRequest {
			addr = netip.Addr{}
		}
		s.timeline.node(mac, addr, now)
		return
	}
	if r := s.timeline.get(mac, now, false); r != nil && addr.IsValid() {
		r.Address = addr
	}
}

// onBoot answers a message at port 4011: a client that has an address, and wants
// to know its file.
func (s *Server) onBoot(k *sockets, m *dhcpv4.DHCPv4, from net.Addr) {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := time.Now()
	to, ok := from.(*net.UDPAddr)
	if !ok || !s.opts.Addr.Contains(ipv4Of(to.IP)) {
		return
	}
	r := s.answerBoot(m, now)
	if r == nil {
		return
	}
	if _, err := k.boot.WriteTo(r.ToBytes(), from); err != nil {
		s.report(Event{Time: now, Event: Note, Machine: m.ClientHWAddr.String(), Text: fmt.Sprintf("cannot be answered: %v", err)})
	}
}

// answerBoot decides on a message at port 4011. s.mu is held.
func (s *Server) answerBoot(m *dhcpv4.DHCPv4, now time.Time) *dhcpv4.DHCPv4 {
	kind := m.MessageType()
	if !acceptable(m) || kind != dhcpv4.MessageTypeRequest && kind != dhcpv4.MessageTypeInform && kind != dhcpv4.MessageTypeDiscover {
		return nil
	}
	mac, c := key(m.ClientHWAddr), Classify(m)
	if c.Kind == NoBoot || c.Kind == Node || !s.allowed(mac) {
		return nil
	}
	rec := s.timeline.get(mac, now, false)
	if rec == nil && !s.news.take(now) || !s.replies.take(now) {
		return nil
	}
	if rec == nil {
		rec = s.timeline.discover(mac, c, now)
	}
	file, err := s.boot(mac, c)
	if err != nil {
		s.timeline.refuse(rec, err.Error(), now)
		return nil
	}
	r, err := proxyReply(m, dhcpv4.MessageTypeAck, c, s.opts.Addr.Addr(), file)
	if err != nil {
		return nil
	}
	s.arch[mac] = c.Arch
	s.timeline.ask(rec, file.name, now)
	return r
}

// watch asks the nodes that should be up, and looks for machines that are stuck.
func (s *Server) watch(ctx context.Context) {
	client := &http.Client{
		Transport: &http.Transport{DialContext: s.opts.Network.DialContext, DisableKeepAlives: true, MaxResponseHeaderBytes: 16 << 10},
		Timeout:   2 * time.Second,
		CheckRedirect: func(*http.Request, []*http.Request) error {
			return http.ErrUseLastResponse
		},
	}
	tick := time.NewTicker(300 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		var ask map[[6]byte]netip.Addr
		s.with(func(t *timeline, now time.Time) {
			t.check(now)
			if s.opts.Health != "" {
				ask = t.awaited(s.opts.Static, now)
			}
		})
		var g errgroup.Group
		g.SetLimit(16)
		for mac, addr := range ask {
			g.Go(func() error {
				if url := "http://" + addr.String() + s.opts.Health; answers(ctx, client, url) {
					s.with(func(t *timeline, now time.Time) { t.up(mac, url, now) })
				}
				return nil
			})
		}
		g.Wait()
	}
}

func answers(ctx context.Context, client *http.Client, url string) bool {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return false
	}
	resp, err := client.Do(req)
	if err != nil {
		return false
	}
	resp.Body.Close()
	return resp.StatusCode == http.StatusOK
}

// bucket bounds a rate: size at once, rate per second.
type bucket struct {
	rate, size float64
	left       float64
	last       time.Time
}

func (b *bucket) take(now time.Time) bool {
	if b.last.IsZero() {
		b.left = b.size
	} else {
		b.left = min(b.size, b.left+max(0, now.Sub(b.last).Seconds())*b.rate)
	}
	b.last = now
	if b.left < 1 {
		return false
	}
	b.left--
	return true
}
