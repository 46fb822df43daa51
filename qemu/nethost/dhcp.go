package nethost

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"

	"clonecluster/netcore/dhcpd"
)

// DHCP is a DHCP server for the host's first IPv4 subnet (RFC 2131, RFC 2132).
// The host itself is the router it announces.
type DHCP struct {
	// First to Last is the pool, inside the subnet.
	First, Last netip.Addr
	Lease       time.Duration // 0 means 1 hour; at least 10 s
}

// on is that server on a host with that address.
func (d DHCP) on(server netip.Prefix) dhcpd.Config {
	return dhcpd.Config{Server: server, First: d.First, Last: d.Last, Router: server.Addr(), Lease: d.Lease}
}

// Lease is an address given to a client.
type Lease = dhcpd.Lease

func (h *Host) serveDHCP() error {
	h.dhcp = dhcpd.New(h.cfg.DHCP.on(h.cfg.first(true)))
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
	r := h.dhcp.Answer(m, time.Now())
	h.dhcpMu.Unlock()
	if r == nil {
		return nil
	}
	h.log.Debug("DHCP", "client", m.ClientHWAddr, "asked", m.MessageType(), "answer", r.MessageType(), "address", r.YourIPAddr)
	_, err = conn.WriteTo(r.ToBytes(), dhcpd.Destination(m, r))
	return err
}

// Leases is what the host's DHCP server has given out, in no order.
func (h *Host) Leases() []Lease {
	h.dhcpMu.Lock()
	defer h.dhcpMu.Unlock()
	if h.dhcp == nil {
		return nil
	}
	return h.dhcp.Leases()
}
