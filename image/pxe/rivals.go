package pxe

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
	"github.com/insomniacslk/dhcp/iana"
)

const (
	lookTime   = 5 * time.Second // servers may ping an address for seconds before they offer it
	lookAgain  = 2 * time.Minute
	tellAgain  = 10 * time.Minute
	maxRivals  = 64
	probeEvery = time.Second + 500*time.Millisecond
)

// rivals is what is known of other DHCP servers. They are looked for as a machine
// would: by a question of a client that boots from the network, of which nothing
// comes but offers. What they say to others by broadcast is heard, too.
type rivals struct {
	probe    [6]byte // the address that asks
	question []byte
	servers  map[netip.Addr]time.Time // that are in the way: when it was said
	others   map[netip.Addr]bool      // all that have been heard
}

// mine says whether a message is our own question.
func (r *rivals) mine(m *dhcpv4.DHCPv4) bool {
	return r.probe != [6]byte{} && key(m.ClientHWAddr) == r.probe
}

// report tells of a server that is in the way. s.mu is held.
func (r *rivals) report(s *Server, server netip.Addr, why string, now time.Time) {
	if r.servers == nil {
		r.servers = map[netip.Addr]time.Time{}
	}
	if last, ok := r.servers[server]; ok && now.Sub(last) < tellAgain || len(r.servers) >= maxRivals {
		return
	}
	r.servers[server] = now
	s.report(Event{Time: now, Event: Rival, Address: server.String(), Text: why})
}

// overhear judges what another server says.
func (s *Server) overhear(m *dhcpv4.DHCPv4, _ net.Addr) {
	server := ipv4Of(m.ServerIdentifier())
	kind := m.MessageType()
	if m.OpCode != dhcpv4.OpcodeBootReply || !server.IsValid() || server == s.opts.Addr.Addr() ||
		kind != dhcpv4.MessageTypeOffer && kind != dhcpv4.MessageTypeAck {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	now := time.Now()
	if s.rivals.others == nil {
		s.rivals.others = map[netip.Addr]bool{}
	}
	if len(s.rivals.others) < maxRivals && ipv4Of(m.YourIPAddr).IsValid() {
		s.rivals.others[server] = true
	}
	if s.dhcp != nil {
		s.rivals.report(s, server, rivalDHCP(server), now)
	} else if file, ok := offersBoot(m); ok {
		s.rivals.report(s, server, fmt.Sprintf("the DHCP server %v tells machines what to boot, too (%.100q): each takes what it hears first. "+
			"Take it out there: dhcp-boot and pxe-service of dnsmasq, filename and next-server of ISC and Kea, \"network boot\" or options 66 and 67 of a router", server, file), now)
	}
}

func rivalDHCP(server netip.Addr) string {
	return fmt.Sprintf("%v is a DHCP server on this segment, too: two give out addresses that collide. "+
		"Leave out --dhcp to boot machines beside it, or switch it off", server)
}

// lookFirst looks for other servers before a DHCP server begins: it does not do so
// beside another one.
func (s *Server) lookFirst(ctx context.Context, k *sockets) error {
	if k.watch == nil {
		return nil
	}
	mac, question := probe()
	s.mu.Lock()
	s.rivals.probe, s.rivals.question = mac, question
	s.mu.Unlock()
	if s.dhcp == nil {
		return nil
	}
	s.look(ctx, k)
	s.mu.Lock()
	defer s.mu.Unlock()
	for server := range s.rivals.servers {
		return errors.New(rivalDHCP(server))
	}
	return nil
}

// lookOn looks for other servers until ctx ends. A proxy needs one: a segment
// without it is reported, once.
func (s *Server) lookOn(ctx context.Context, k *sockets) {
	if k.watch == nil {
		return
	}
	for first := s.dhcp == nil; ; first = false {
		if s.dhcp == nil || !first {
			s.look(ctx, k)
		}
		if ctx.Err() != nil {
			return
		}
		s.mu.Lock()
		none := len(s.rivals.others) == 0
		s.mu.Unlock()
		if first && none {
			s.note("no DHCP server answers on this segment, and machines need one for their addresses: " +
				"start it, or let this be it, with --dhcp RANGE")
		}
		if !sleep(ctx, lookAgain) {
			return
		}
	}
}

// look asks, and waits for what is heard.
func (s *Server) look(ctx context.Context, k *sockets) {
	for range lookTime / probeEvery {
		// Lost or not, it is asked again.
		k.watch.WriteTo(s.rivals.question, &net.UDPAddr{IP: net.IPv4bcast.To4(), Port: dhcpPort})
		if !sleep(ctx, probeEvery) {
			return
		}
	}
}

// probe is the question of a machine that boots by UEFI, from an address that no
// machine has. It never takes an offer.
func probe() (mac [6]byte, message []byte) {
	rand.Read(mac[:])
	mac[0] = mac[0]&^1 | 2 // unicast, locally administered
	m, err := dhcpv4.NewDiscovery(mac[:], dhcpv4.WithBroadcast(true),
		dhcpv4.WithOption(dhcpv4.OptClassIdentifier("PXEClient:Arch:00007:UNDI:003016")),
		dhcpv4.WithOption(dhcpv4.OptClientArch(iana.EFI_X86_64)),
		dhcpv4.WithOption(dhcpv4.OptGeneric(dhcpv4.OptionClientNetworkInterfaceIdentifier, []byte{1, 3, 16})),
		dhcpv4.WithRequestedOptions(dhcpv4.OptionTFTPServerName, dhcpv4.OptionBootfileName, dhcpv4.OptionVendorSpecificInformation))
	if err != nil {
		panic(err) // only randomness can fail, and does not
	}
	return mac, m.ToBytes()
}

func sleep(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}
