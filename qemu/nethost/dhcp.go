package nethost

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
)

// DHCP is a DHCP server for the host's first IPv4 subnet (RFC 2131, RFC 2132).
// The host itself is the router it announces.
type DHCP struct {
	// First to Last is the pool, inside the subnet.
	First, Last netip.Addr
	Lease       time.Duration // 0 means 1 hour; at least 10 s
}

func (d *DHCP) validate(on netip.Prefix) error {
	switch {
	case !on.IsValid():
		return errors.New("DHCP server: the host has no IPv4 address")
	case !on.Contains(d.First) || !on.Contains(d.Last) || d.Last.Less(d.First):
		return fmt.Errorf("DHCP server: pool %v to %v is not in %v", d.First, d.Last, on.Masked())
	case d.Lease != 0 && (d.Lease < 10*time.Second || d.Lease > 365*24*time.Hour):
		return fmt.Errorf("DHCP server: a lease of %v", d.Lease)
	}
	return nil
}

// Lease is an address given to a client.
type Lease struct {
	MAC     net.HardwareAddr
	Addr    netip.Addr
	Expires time.Time
	Bound   bool // asked for and acknowledged, not just offered
}

// leases is the server's decision: no clock or socket in it. A client keeps its
// address even after its lease has expired, as long as the pool lasts.
type leases struct {
	DHCP
	server netip.Prefix
	byMAC  map[[6]byte]*Lease
	taken  map[netip.Addr]bool // leased, declined, or the server's own
}

func newLeases(d DHCP, server netip.Prefix) *leases {
	if d.Lease == 0 {
		d.Lease = time.Hour
	}
	return &leases{d, server, make(map[[6]byte]*Lease), map[netip.Addr]bool{server.Addr(): true}}
}

// find gives a client its address, or nil if the pool is empty.
func (l *leases) find(mac [6]byte, now time.Time) *Lease {
	if le, ok := l.byMAC[mac]; ok {
		return le
	}
	for a := l.First; a.Compare(l.Last) <= 0; a = a.Next() {
		if !l.taken[a] {
			return l.give(mac, a)
		}
	}
	var oldest *Lease
	for _, le := range l.byMAC {
		if le.Expires.Before(now) && (oldest == nil || cmp.Or(le.Expires.Compare(oldest.Expires), le.Addr.Compare(oldest.Addr)) < 0) {
			oldest = le
		}
	}
	if oldest == nil {
		return nil
	}
	delete(l.byMAC, [6]byte(oldest.MAC))
	return l.give(mac, oldest.Addr)
}

func (l *leases) give(mac [6]byte, a netip.Addr) *Lease {
	l.taken[a] = true
	le := &Lease{MAC: mac[:], Addr: a}
	l.byMAC[mac] = le
	return le
}

// answer decides on a message: the reply, or nil for none.
func (l *leases) answer(m *dhcpv4.DHCPv4, now time.Time) *dhcpv4.DHCPv4 {
	if m.OpCode != dhcpv4.OpcodeBootRequest || len(m.ClientHWAddr) != 6 || m.ClientHWAddr[0]&1 != 0 {
		return nil
	}
	mac := [6]byte(m.ClientHWAddr)
	if id := m.ServerIdentifier(); id != nil && !id.Equal(l.server.Addr().AsSlice()) {
		if le := l.byMAC[mac]; le != nil && !le.Bound {
			le.Expires = now // it took another server's offer
		}
		return nil
	}
	switch m.MessageType() {
	case dhcpv4.MessageTypeDiscover:
		le := l.find(mac, now)
		if le == nil {
			return nil
		}
		if !le.Bound {
			le.Expires = now.Add(time.Minute)
		}
		return l.reply(m, dhcpv4.MessageTypeOffer, le)
	case dhcpv4.MessageTypeRequest:
		want, _ := netip.AddrFromSlice(m.RequestedIPAddress().To4())
		if !want.IsValid() {
			want, _ = netip.AddrFromSlice(m.ClientIPAddr.To4())
		}
		le := l.byMAC[mac]
		if le == nil && want.IsValid() && l.First.Compare(want) <= 0 && want.Compare(l.Last) <= 0 && !l.taken[want] {
			le = l.give(mac, want) // from before this server started
		}
		if le == nil || le.Addr != want {
			return l.reply(m, dhcpv4.MessageTypeNak, nil)
		}
		le.Bound, le.Expires = true, now.Add(l.Lease)
		return l.reply(m, dhcpv4.MessageTypeAck, le)
	case dhcpv4.MessageTypeInform:
		return l.reply(m, dhcpv4.MessageTypeAck, nil)
	case dhcpv4.MessageTypeDecline:
		delete(l.byMAC, mac) // the address stays taken: somebody else has it
	case dhcpv4.MessageTypeRelease:
		if le := l.byMAC[mac]; le != nil {
			le.Bound, le.Expires = false, now
		}
	}
	return nil
}

func (l *leases) reply(m *dhcpv4.DHCPv4, kind dhcpv4.MessageType, le *Lease) *dhcpv4.DHCPv4 {
	server := net.IP(l.server.Addr().AsSlice())
	mods := []dhcpv4.Modifier{
		dhcpv4.WithMessageType(kind),
		dhcpv4.WithOption(dhcpv4.OptServerIdentifier(server)),
	}
	if kind != dhcpv4.MessageTypeNak {
		mods = append(mods,
			dhcpv4.WithServerIP(server),
			dhcpv4.WithNetmask(net.CIDRMask(l.server.Bits(), 32)),
			dhcpv4.WithRouter(server))
	}
	if le != nil {
		mods = append(mods,
			dhcpv4.WithYourIP(le.Addr.AsSlice()),
			dhcpv4.WithLeaseTime(uint32(l.Lease/time.Second)))
	}
	r, err := dhcpv4.NewReplyFromRequest(m, mods...)
	if err != nil {
		return nil
	}
	return r
}

// destination is where a reply goes (RFC 2131, section 4.1). A client that has no
// address yet gets a broadcast: nothing could resolve its address.
func destination(request, reply *dhcpv4.DHCPv4) *net.UDPAddr {
	to := &net.UDPAddr{IP: net.IPv4bcast.To4(), Port: dhcpv4.ClientPort}
	if ip := request.ClientIPAddr.To4(); ip != nil && !ip.IsUnspecified() && reply.MessageType() != dhcpv4.MessageTypeNak {
		to.IP = ip
	}
	return to
}

func (h *Host) serveDHCP() error {
	h.leases = newLeases(*h.cfg.DHCP, h.cfg.first(true))
	conn, err := h.ListenPacket(netip.AddrPortFrom(netip.IPv4Unspecified(), dhcpv4.ServerPort))
	if err != nil {
		return fmt.Errorf("DHCP server: %w", err)
	}
	stop := context.AfterFunc(h.ctx, func() { conn.Close() })
	h.wg.Go(func() {
		defer stop()
		buf := make([]byte, mtu)
		for {
			n, _, err := conn.ReadFrom(buf)
			if err != nil {
				if h.ctx.Err() == nil {
					h.log.Error("DHCP server", "err", err)
				}
				return
			}
			if err := h.handleDHCP(conn, buf[:n]); err != nil && h.ctx.Err() == nil {
				h.log.Warn("DHCP server", "err", err)
			}
		}
	})
	return nil
}

func (h *Host) handleDHCP(conn net.PacketConn, b []byte) error {
	m, err := dhcpv4.FromBytes(b)
	if err != nil {
		return err
	}
	h.dhcpMu.Lock()
	r := h.leases.answer(m, time.Now())
	h.dhcpMu.Unlock()
	if r == nil {
		return nil
	}
	h.log.Debug("DHCP", "client", m.ClientHWAddr, "asked", m.MessageType(), "answer", r.MessageType(), "address", r.YourIPAddr)
	_, err = conn.WriteTo(r.ToBytes(), destination(m, r))
	return err
}

// Leases is what the host's DHCP server has given out, in no order.
func (h *Host) Leases() []Lease {
	h.dhcpMu.Lock()
	defer h.dhcpMu.Unlock()
	if h.leases == nil {
		return nil
	}
	var all []Lease
	for _, le := range h.leases.byMAC {
		all = append(all, *le)
	}
	return all
}
