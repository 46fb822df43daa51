// Package neigh builds the frames by which a cluster speaks for its VIP: ARP
// (RFC 826, RFC 5227) and NDP (RFC 4861, RFC 4862); and reads what others say of it. The kernel cannot, since
// in these frames the payload carries the clone MAC and the Ethernet header the
// wire MAC (I2), so that hosts learn the one and switches the other.
package neigh

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"

	"github.com/mdlayher/arp"
	"github.com/mdlayher/ethernet"
)

var (
	// ErrNotRequest says that a frame does not ask for the VIP, or that a
	// node of this cluster asks.
	ErrNotRequest = errors.New("not a request for the VIP")
	// ErrMalformed says that a request is not valid under its RFC.
	ErrMalformed = errors.New("malformed request")
)

// Config is what a Responder speaks for.
type Config struct {
	CloneMAC   [6]byte    // in every payload; in directed mode the director's wire MAC
	WireMAC    [6]byte    // in every Ethernet header
	VIP4, VIP6 netip.Addr // at least one is valid
	// Directed: CloneMAC may be WireMAC.
	Directed bool
}

// Responder builds frames; it sends nothing. It is immutable.
type Responder struct {
	clone, wire net.HardwareAddr
	vip4, vip6  netip.Addr
}

// New checks the configuration: two different unicast MACs, at least one VIP.
func New(cfg Config) (*Responder, error) {
	r := &Responder{
		clone: bytes.Clone(cfg.CloneMAC[:]),
		wire:  bytes.Clone(cfg.WireMAC[:]),
		vip4:  cfg.VIP4,
		vip6:  cfg.VIP6,
	}
	switch {
	case !isUnicast(r.clone):
		return nil, fmt.Errorf("clone MAC %v is not a unicast address", r.clone)
	case !isUnicast(r.wire):
		return nil, fmt.Errorf("wire MAC %v is not a unicast address", r.wire)
	case bytes.Equal(r.clone, r.wire) && !cfg.Directed:
		return nil, fmt.Errorf("wire MAC and clone MAC are both %v", r.clone)
	case !r.vip4.IsValid() && !r.vip6.IsValid():
		return nil, errors.New("there is no VIP")
	case r.vip4.IsValid() && !r.vip4.Is4():
		return nil, fmt.Errorf("VIP %v is not an IPv4 address", r.vip4)
	case r.vip6.IsValid() && (!r.vip6.Is6() || r.vip6.Is4In6() || r.vip6.Zone() != ""):
		return nil, fmt.Errorf("VIP %v is not an IPv6 address", r.vip6)
	}
	return r, nil
}

// WireMAC is the address in every Ethernet header.
func (r *Responder) WireMAC() net.HardwareAddr { return r.wire }

// Reply appends to dst the frame that answers req, an Ethernet frame (no
// virtio header) with an ARP request or neighbour solicitation for the VIP.
// A duplicate-address probe is answered too, which is how an address is
// defended. Errors wrap ErrNotRequest or ErrMalformed; dst is then unchanged.
func (r *Responder) Reply(req, dst []byte) ([]byte, error) {
	// A request fits the smallest MTU there is; longer ones are not copied.
	const longest = 1518
	if len(req) > longest {
		return dst, fmt.Errorf("frame of %d bytes: %w", len(req), ErrMalformed)
	}
	var f ethernet.Frame
	if err := f.UnmarshalBinary(req); err != nil {
		return dst, fmt.Errorf("frame: %w: %w", err, ErrMalformed)
	}
	var reply []byte
	var err error
	switch f.EtherType {
	case ethernet.EtherTypeARP:
		reply, err = r.replyARP(f.Payload)
	case ethernet.EtherTypeIPv6:
		reply, err = r.replyNDP(f.Source, f.Payload)
	default:
		err = fmt.Errorf("EtherType %#04x: %w", uint16(f.EtherType), ErrNotRequest)
	}
	if err != nil {
		return dst, err
	}
	return append(dst, reply...), nil
}

// Announcements gives, for each VIP there is, a gratuitous ARP request (RFC
// 5227, 3) and an unsolicited neighbour advertisement to all nodes. Hosts that
// know the VIP by another MAC learn the clone MAC from them.
func (r *Responder) Announcements() ([][]byte, error) {
	var frames [][]byte
	if r.vip4.IsValid() {
		nobody := make(net.HardwareAddr, 6)
		b, err := r.arp(arp.OperationRequest, ethernet.Broadcast, nobody, r.vip4)
		if err != nil {
			return nil, err
		}
		frames = append(frames, b)
	}
	if r.vip6.IsValid() {
		b, err := r.advertisement(AllNodesMAC, allNodes, 0)
		if err != nil {
			return nil, err
		}
		frames = append(frames, b)
	}
	return frames, nil
}

func (r *Responder) replyARP(b []byte) ([]byte, error) {
	var p arp.Packet
	if err := p.UnmarshalBinary(b); err != nil {
		return nil, fmt.Errorf("ARP: %w: %w", err, ErrMalformed)
	}
	// The lengths are the sender's word: a reply built from others than these
	// would take its sizes from them.
	if p.HardwareType != 1 || p.ProtocolType != uint16(ethernet.EtherTypeIPv4) || p.HardwareAddrLength != 6 || p.IPLength != 4 {
		return nil, fmt.Errorf("ARP for hardware type %d with %d-byte addresses, protocol %#04x with %d-byte addresses: %w",
			p.HardwareType, p.HardwareAddrLength, p.ProtocolType, p.IPLength, ErrMalformed)
	}
	switch {
	case p.Operation != arp.OperationRequest || p.TargetIP != r.vip4:
		return nil, fmt.Errorf("ARP operation %d for %v: %w", p.Operation, p.TargetIP, ErrNotRequest)
	case p.SenderIP == r.vip4 || bytes.Equal(p.SenderHardwareAddr, r.clone):
		return nil, fmt.Errorf("ARP announcement of the VIP: %w", ErrNotRequest)
	case !isUnicast(p.SenderHardwareAddr) || p.SenderIP.IsMulticast():
		return nil, fmt.Errorf("ARP from %v, %v: %w", p.SenderHardwareAddr, p.SenderIP, ErrMalformed)
	}
	return r.arp(arp.OperationReply, p.SenderHardwareAddr, p.SenderHardwareAddr, p.SenderIP)
}

// arp builds a frame whose sender is the VIP at the clone MAC.
func (r *Responder) arp(op arp.Operation, to, targetMAC net.HardwareAddr, target netip.Addr) ([]byte, error) {
	p, err := arp.NewPacket(op, r.clone, r.vip4, targetMAC, target)
	if err != nil {
		return nil, fmt.Errorf("building ARP: %w", err)
	}
	b, err := p.MarshalBinary()
	if err != nil {
		return nil, fmt.Errorf("building ARP: %w", err)
	}
	return r.frame(to, ethernet.EtherTypeARP, b)
}

func (r *Responder) frame(to net.HardwareAddr, t ethernet.EtherType, payload []byte) ([]byte, error) {
	f := ethernet.Frame{Destination: to, Source: r.wire, EtherType: t, Payload: payload}
	b, err := f.MarshalBinary()
	if err != nil {
		return nil, fmt.Errorf("building a frame: %w", err)
	}
	return b, nil
}

// Numbers of RFC 8200, RFC 4443 and RFC 4861.
const (
	ipv6Header     = 40
	icmpv6         = 58
	hopLimit       = 255
	solicitation   = 135
	advertisement  = 136
	message        = 24 // without options
	option         = 8  // a link-layer address
	sourceLinkAddr = 1
	targetLinkAddr = 2
	flagSolicited  = 0x40
	flagOverride   = 0x20
)

var (
	allNodes = netip.MustParseAddr("ff02::1")
	// AllNodesMAC is the group of all IPv6 nodes (RFC 2464, 7).
	AllNodesMAC = net.HardwareAddr{0x33, 0x33, 0, 0, 0, 1}
)

func (r *Responder) replyNDP(from net.HardwareAddr, b []byte) ([]byte, error) {
	s, err := parseSolicitation(b)
	if err != nil {
		return nil, err
	}
	switch {
	case s.target != r.vip6:
		return nil, fmt.Errorf("solicitation of %v: %w", s.target, ErrNotRequest)
	case s.source == r.vip6 || bytes.Equal(s.linkAddr, r.clone):
		return nil, fmt.Errorf("solicitation by the VIP: %w", ErrNotRequest)
	case s.source.IsUnspecified():
		// RFC 4862: who asks has no address yet; all nodes are told.
		return r.advertisement(AllNodesMAC, allNodes, 0)
	case s.linkAddr == nil:
		s.linkAddr = from
	}
	if !isUnicast(s.linkAddr) {
		return nil, fmt.Errorf("solicitation from %v: %w", s.linkAddr, ErrMalformed)
	}
	return r.advertisement(s.linkAddr, s.source, flagSolicited)
}

// solicit is what matters of a neighbour solicitation.
type solicit struct {
	source, target netip.Addr
	linkAddr       net.HardwareAddr // nil without the option
}

// parseSolicitation checks all that RFC 4861, 7.1.1, demands.
func parseSolicitation(b []byte) (s solicit, err error) {
	bad := func(what string) (solicit, error) {
		return solicit{}, fmt.Errorf("solicitation with %s: %w", what, ErrMalformed)
	}
	if len(b) < ipv6Header || b[0]>>4 != 6 || ipv6Header+int(binary.BigEndian.Uint16(b[4:])) > len(b) {
		return bad("a cut-off IPv6 header")
	}
	ip, icmp := b[:ipv6Header], b[ipv6Header:ipv6Header+int(binary.BigEndian.Uint16(b[4:]))]
	if ip[6] != icmpv6 || len(icmp) < 1 || icmp[0] != solicitation {
		return s, fmt.Errorf("IPv6 with next header %d: %w", ip[6], ErrNotRequest)
	}
	s.source, _ = netip.AddrFromSlice(ip[8:24])
	to, _ := netip.AddrFromSlice(ip[24:40])
	switch {
	case ip[7] != hopLimit:
		return bad("a hop limit other than 255")
	case len(icmp) < message || icmp[1] != 0:
		return bad("a bad length or code")
	case checksum(ip[8:24], ip[24:40], icmp) != 0:
		return bad("a bad checksum")
	}
	s.target, _ = netip.AddrFromSlice(icmp[8:24])
	for o := icmp[message:]; len(o) > 0; o = o[int(o[1])*option:] {
		if len(o) < option || o[1] == 0 || int(o[1])*option > len(o) {
			return bad("a bad option")
		}
		if o[0] == sourceLinkAddr {
			if o[1] != 1 {
				return bad("a link-layer address longer than Ethernet's")
			}
			s.linkAddr = net.HardwareAddr(o[2:option])
		}
	}
	switch {
	case s.source.IsMulticast() || s.target.IsMulticast():
		return bad("a multicast source or target")
	case s.source.IsUnspecified() && (!to.IsMulticast() || s.linkAddr != nil):
		return bad("an unspecified source, but a unicast destination or a link-layer address")
	}
	return s, nil
}

// advertisement builds a neighbour advertisement of the VIP at the clone MAC.
// It overrides what caches hold, and the VIP is no router.
func (r *Responder) advertisement(mac net.HardwareAddr, to netip.Addr, flags byte) ([]byte, error) {
	src, dst := r.vip6.As16(), to.As16()
	b := make([]byte, ipv6Header, ipv6Header+message+option)
	b[0] = 6 << 4
	binary.BigEndian.PutUint16(b[4:], message+option)
	b[6], b[7] = icmpv6, hopLimit
	copy(b[8:], src[:])
	copy(b[24:], dst[:])
	b = append(b, advertisement, 0, 0, 0, flags|flagOverride, 0, 0, 0)
	b = append(b, src[:]...)
	b = append(b, targetLinkAddr, 1)
	b = append(b, r.clone...)
	binary.BigEndian.PutUint16(b[ipv6Header+2:], checksum(src[:], dst[:], b[ipv6Header:]))
	return r.frame(mac, ethernet.EtherTypeIPv6, b)
}

// checksum is that of RFC 4443, 2.3: over a valid message it is 0.
func checksum(src, dst, icmp []byte) uint16 {
	sum := uint32(len(icmp)) + icmpv6
	for _, b := range [3][]byte{src, dst, icmp} {
		for ; len(b) > 1; b = b[2:] {
			sum += uint32(binary.BigEndian.Uint16(b))
		}
		if len(b) == 1 {
			sum += uint32(b[0]) << 8
		}
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return ^uint16(sum)
}

func isUnicast(a net.HardwareAddr) bool {
	return len(a) == 6 && a[0]&1 == 0 && !bytes.Equal(a, make(net.HardwareAddr, 6))
}
