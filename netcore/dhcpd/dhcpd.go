// Package dhcpd decides what a DHCP server answers (RFC 2131, RFC 2132): messages
// in, messages out. It has no clock and no socket; the laboratory's client host
// and the PXE server lend it theirs.
package dhcpd

import (
	"cmp"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
)

// Config is a server.
type Config struct {
	// Server is its own address, with the length of the subnet's prefix.
	Server netip.Prefix
	// First to Last is the pool, inside the subnet: what a client can be given.
	First, Last netip.Addr
	// Router is the gateway that clients are told of; invalid means none.
	Router netip.Addr
	// Except is given to nobody, as is the server's own address and the router's.
	Except []netip.Addr
	Lease  time.Duration // 0 means 1 hour; at least 10 s
	// Polite servers are silent to clients that they have no record of, and that
	// do not ask them (RFC 2131, section 4.3.2): another server may know them.
	Polite bool
}

// Validate reports what is wrong with a configuration.
func (c Config) Validate() error {
	on := c.Server
	switch {
	case !on.IsValid() || !on.Addr().Is4():
		return errors.New("DHCP server: the host has no IPv4 address")
	case c.Last.Less(c.First):
		return fmt.Errorf("DHCP server: the pool ends before it begins: want %v to %v", c.Last, c.First)
	case !on.Contains(c.First) || !on.Contains(c.Last):
		return fmt.Errorf("DHCP server: pool %v to %v is not in %v", c.First, c.Last, on.Masked())
	case c.Lease != 0 && (c.Lease < 10*time.Second || c.Lease > 365*24*time.Hour):
		return fmt.Errorf("DHCP server: a lease of %v", c.Lease)
	}
	taken := c.taken()
	for a := c.First; a.Compare(c.Last) <= 0; a = a.Next() {
		if !taken[a] {
			return nil
		}
	}
	return fmt.Errorf("DHCP server: in the pool %v to %v is nothing to give out: all of it is in use", c.First, c.Last)
}

// taken is what nobody is given.
func (c Config) taken() map[netip.Addr]bool {
	taken := map[netip.Addr]bool{c.Server.Addr(): true}
	for _, a := range append([]netip.Addr{c.Router}, c.Except...) {
		taken[a] = true
	}
	return taken
}

// Lease is an address given to a client.
type Lease struct {
	MAC     net.HardwareAddr
	Addr    netip.Addr
	Expires time.Time
	Bound   bool // asked for and acknowledged, not just offered
}

// Server is the state of a server. It remembers at most as many clients as its
// pool has addresses. A client keeps its address even after its lease has
// expired, as long as the pool lasts. It is not for concurrent use.
type Server struct {
	Config
	byMAC map[[6]byte]*Lease
	taken map[netip.Addr]bool // leased, declined, or never given
}

// New makes a server of a valid configuration.
func New(c Config) *Server {
	if c.Lease == 0 {
		c.Lease = time.Hour
	}
	return &Server{c, make(map[[6]byte]*Lease), c.taken()}
}

// find gives a client its address, or nil if the pool is empty.
func (s *Server) find(mac [6]byte, now time.Time) *Lease {
	if le, ok := s.byMAC[mac]; ok {
		return le
	}
	for a := s.First; a.Compare(s.Last) <= 0; a = a.Next() {
		if !s.taken[a] {
			return s.give(mac, a)
		}
	}
	var oldest *Lease
	for _, le := range s.byMAC {
		if le.Expires.Before(now) && (oldest == nil || cmp.Or(le.Expires.Compare(oldest.Expires), le.Addr.Compare(oldest.Addr)) < 0) {
			oldest = le
		}
	}
	if oldest == nil {
		return nil
	}
	delete(s.byMAC, [6]byte(oldest.MAC))
	return s.give(mac, oldest.Addr)
}

func (s *Server) give(mac [6]byte, a netip.Addr) *Lease {
	s.taken[a] = true
	le := &Lease{MAC: mac[:], Addr: a}
	s.byMAC[mac] = le
	return le
}

// Answer decides on a message: the reply, or nil for none.
func (s *Server) Answer(m *dhcpv4.DHCPv4, now time.Time) *dhcpv4.DHCPv4 {
	if m.OpCode != dhcpv4.OpcodeBootRequest || len(m.ClientHWAddr) != 6 || m.ClientHWAddr[0]&1 != 0 {
		return nil
	}
	mac := [6]byte(m.ClientHWAddr)
	id := m.ServerIdentifier()
	if id != nil && !id.Equal(s.Server.Addr().AsSlice()) {
		if le := s.byMAC[mac]; le != nil && !le.Bound {
			le.Expires = now // it took another server's offer
		}
		return nil
	}
	switch m.MessageType() {
	case dhcpv4.MessageTypeDiscover:
		le := s.find(mac, now)
		if le == nil {
			return nil
		}
		if !le.Bound {
			le.Expires = now.Add(time.Minute)
		}
		return s.reply(m, dhcpv4.MessageTypeOffer, le)
	case dhcpv4.MessageTypeRequest:
		want, _ := netip.AddrFromSlice(m.RequestedIPAddress().To4())
		if !want.IsValid() {
			want, _ = netip.AddrFromSlice(m.ClientIPAddr.To4())
		}
		le := s.byMAC[mac]
		if le == nil && want.IsValid() && s.First.Compare(want) <= 0 && want.Compare(s.Last) <= 0 && !s.taken[want] {
			le = s.give(mac, want) // from before this server started
		}
		if le == nil && s.Polite && id == nil {
			return nil
		}
		if le == nil || le.Addr != want {
			return s.reply(m, dhcpv4.MessageTypeNak, nil)
		}
		le.Bound, le.Expires = true, now.Add(s.Lease)
		return s.reply(m, dhcpv4.MessageTypeAck, le)
	case dhcpv4.MessageTypeInform:
		return s.reply(m, dhcpv4.MessageTypeAck, nil)
	case dhcpv4.MessageTypeDecline:
		delete(s.byMAC, mac) // the address stays taken: somebody else has it
	case dhcpv4.MessageTypeRelease:
		if le := s.byMAC[mac]; le != nil {
			le.Bound, le.Expires = false, now
		}
	}
	return nil
}

func (s *Server) reply(m *dhcpv4.DHCPv4, kind dhcpv4.MessageType, le *Lease) *dhcpv4.DHCPv4 {
	server := net.IP(s.Server.Addr().AsSlice())
	mods := []dhcpv4.Modifier{
		dhcpv4.WithMessageType(kind),
		dhcpv4.WithOption(dhcpv4.OptServerIdentifier(server)),
	}
	if kind != dhcpv4.MessageTypeNak {
		mods = append(mods,
			dhcpv4.WithServerIP(server),
			dhcpv4.WithNetmask(net.CIDRMask(s.Server.Bits(), 32)))
		if s.Router.IsValid() {
			mods = append(mods, dhcpv4.WithOption(dhcpv4.OptRouter(s.Router.AsSlice())))
		}
	}
	if le != nil {
		mods = append(mods,
			dhcpv4.WithYourIP(le.Addr.AsSlice()),
			dhcpv4.WithLeaseTime(uint32(s.Lease/time.Second)))
	}
	r, err := dhcpv4.NewReplyFromRequest(m, mods...)
	if err != nil {
		return nil
	}
	return r
}

// Leases is what the server has given out, in no order.
func (s *Server) Leases() []Lease {
	var all []Lease
	for _, le := range s.byMAC {
		all = append(all, *le)
	}
	return all
}

// Destination is where a reply goes (RFC 2131, section 4.1). A client that has no
// address yet gets a broadcast: nothing could resolve its address.
func Destination(request, reply *dhcpv4.DHCPv4) *net.UDPAddr {
	to := &net.UDPAddr{IP: net.IPv4bcast.To4(), Port: dhcpv4.ClientPort}
	if ip := request.ClientIPAddr.To4(); ip != nil && !ip.IsUnspecified() && reply.MessageType() != dhcpv4.MessageTypeNak {
		to.IP = ip
	}
	return to
}
