package filter

import (
	"encoding/binary"
	"net/netip"
)

// Numbers of IEEE 802, RFC 826, RFC 791, RFC 8200, RFC 792, RFC 4443, RFC 4861
// and RFC 3810 that the parser knows.
const (
	etherHeader = 14
	MaxTags     = 2

	etherIPv4    = 0x0800
	etherARP     = 0x0806
	etherRARP    = 0x8035
	etherVLAN    = 0x8100
	etherService = 0x88a8
	etherIPv6    = 0x86dd

	protoICMP   = 1
	protoICMPv6 = 58

	// MaxExtensions bounds the IPv6 header chain, for the verifier of the BPF
	// twin as much as for us. Real packets have at most two or three.
	MaxExtensions = 6
	extHopByHop   = 0
	extRouting    = 43
	extFragment   = 44
	extDest       = 60

	tcpFIN = 0x01
	tcpSYN = 0x02
	tcpRST = 0x04
	tcpACK = 0x10

	arpLength  = 28
	arpRequest = 1
	arpReply   = 2

	// MaxOptions bounds the options of one neighbour message.
	MaxOptions     = 8
	optionSourceLL = 1
	optionTargetLL = 2
	ndpLength      = 24
	ndpHopLimit    = 255
	mldHopLimit    = 1

	icmpEchoReply       = 0
	icmpUnreachable     = 3
	icmpRedirect        = 5
	icmpEcho            = 8
	icmpRouterAdvert    = 9
	icmpRouterSolicit   = 10
	icmpTimeExceeded    = 11
	icmpParameter       = 12
	icmp6Unreachable    = 1
	icmp6Parameter      = 4
	icmp6Echo           = 128
	icmp6EchoReply      = 129
	icmp6Query          = 130
	icmp6Report         = 131
	icmp6Done           = 132
	icmp6RouterSolicit  = 133
	icmp6RouterAdvert   = 134
	icmp6NeighborAsk    = 135
	icmp6NeighborAdvert = 136
	icmp6Redirect       = 137
	icmp6ReportV2       = 143
)

// kind is what a packet is to the table of states. The kinds up to kindError
// are the table's columns.
type kind uint8

const (
	kindSYN kind = iota // SYN without ACK, RST or FIN
	kindTCP             // any other segment
	kindUDP
	kindEcho  // ICMP echo request
	kindError // ICMP error
	kindEchoReply
	kindFragment // a fragment that is not the first
	kindNeighbor // NDP
	kindQuery    // multicast listener query
	kindReport   // multicast listener report or done
	kindRouter   // redirect, router solicitation or advertisement
	kindOther    // an ICMP type or a protocol not served
	kinds        = int(kindError) + 1
)

// addr is an address as two numbers, most significant first; IPv4 is
// ::ffff:a.b.c.d.
type addr struct{ hi, lo uint64 }

const (
	mappedPrefix = 0x0000_ffff << 32
	groupPrefix  = 0xff02 << 48 // link-local multicast
)

var allNodes = addr{groupPrefix, 1}

func addrOf(a netip.Addr) addr {
	b := a.As16()
	return addr6(b[:])
}

func (a addr) addr() netip.Addr {
	var b [16]byte
	binary.BigEndian.PutUint64(b[:], a.hi)
	binary.BigEndian.PutUint64(b[8:], a.lo)
	return netip.AddrFrom16(b).Unmap()
}

func addr4(b []byte) addr { return addr{0, mappedPrefix | uint64(binary.BigEndian.Uint32(b))} }

func addr6(b []byte) addr {
	return addr{binary.BigEndian.Uint64(b), binary.BigEndian.Uint64(b[8:])}
}

// packet is what the parser finds in an IP packet. Addresses and ports are
// those of the packet, whichever way it goes.
type packet struct {
	src, dst         addr
	srcPort, dstPort uint16
	kind             kind
	proto            uint8
	flags            uint8 // TCP
	hopLimit         uint8
	icmpType         uint8
	v6               bool
	extended         bool   // an IPv6 packet with extension headers
	payload          []byte // from the transport header to the end of the packet
}

// mac reads six bytes of b as a number.
func mac(b []byte) uint64 {
	_ = b[5]
	return uint64(binary.BigEndian.Uint32(b))<<16 | uint64(binary.BigEndian.Uint16(b[4:]))
}

// untag steps over priority tags (802.1Q with identifier 0), of which there
// may be two. It returns the EtherType and what follows it.
func untag(frame []byte) (etherType uint16, payload []byte, v Verdict) {
	etherType, payload = binary.BigEndian.Uint16(frame[12:]), frame[etherHeader:]
	for range MaxTags {
		if etherType != etherVLAN && etherType != etherService {
			break
		}
		if len(payload) < 4 {
			return 0, nil, DropMalformed
		}
		if binary.BigEndian.Uint16(payload)&0x0fff != 0 {
			return 0, nil, DropVLAN
		}
		etherType, payload = binary.BigEndian.Uint16(payload[2:]), payload[4:]
	}
	if etherType == etherVLAN || etherType == etherService {
		return 0, nil, DropVLAN
	}
	return etherType, payload, 0
}

// parseIPv4 reads a packet of RFC 791. The checksum is left to the kernel. A
// quoted packet (in an ICMP error) is allowed to be shorter than it says.
func parseIPv4(b []byte, quoted bool, p *packet) bool {
	if len(b) < 20 || b[0]>>4 != 4 {
		return false
	}
	header, total := int(b[0]&0xf)*4, int(binary.BigEndian.Uint16(b[2:]))
	if header < 20 || total < header || header > len(b) {
		return false
	}
	if total < len(b) {
		b = b[:total]
	} else if total > len(b) && !quoted {
		return false
	}
	p.v6, p.src, p.dst = false, addr4(b[12:]), addr4(b[16:])
	p.hopLimit, p.proto = b[8], b[9]
	fragment := binary.BigEndian.Uint16(b[6:])
	p.payload = b[header:]
	return parseTransport(p, fragment&0x1fff != 0, quoted)
}

// parseIPv6 reads a packet of RFC 8200 and walks its extension headers.
func parseIPv6(b []byte, quoted bool, p *packet) bool {
	if len(b) < 40 || b[0]>>4 != 6 {
		return false
	}
	p.v6, p.src, p.dst = true, addr6(b[8:]), addr6(b[24:])
	p.proto, p.hopLimit = b[6], b[7]
	length := int(binary.BigEndian.Uint16(b[4:]))
	b = b[40:]
	if length < len(b) {
		b = b[:length]
	} else if length > len(b) && !quoted {
		return false
	}
	for range MaxExtensions + 1 {
		size := 8
		switch p.proto {
		case extHopByHop, extRouting, extDest:
			if len(b) < 2 {
				return false
			}
			size = (int(b[1]) + 1) * 8
		case extFragment:
		default:
			p.payload = b
			return parseTransport(p, false, quoted)
		}
		if len(b) < size {
			return false
		}
		later := p.proto == extFragment && binary.BigEndian.Uint16(b[2:])&^7 != 0
		p.proto, p.extended, b = b[0], true, b[size:]
		if later {
			p.payload = b
			return parseTransport(p, true, quoted)
		}
	}
	return false
}

// parseTransport reads ports, flags and ICMP types. Of a quoted packet eight
// bytes are enough (RFC 792), so its TCP flags are not to be had.
func parseTransport(p *packet, later, quoted bool) bool {
	b := p.payload
	switch {
	case p.proto != ProtoTCP && p.proto != ProtoUDP && p.proto != protoICMP && p.proto != protoICMPv6:
		p.kind = kindOther
		return true
	case later:
		p.kind = kindFragment
		return true
	case len(b) < 8:
		return false
	}
	switch p.proto {
	case ProtoTCP:
		p.srcPort, p.dstPort = binary.BigEndian.Uint16(b), binary.BigEndian.Uint16(b[2:])
		p.kind = kindTCP
		if quoted {
			return true
		}
		// The whole header must be there: flags that hide in a second fragment
		// are an old trick (RFC 1858).
		if len(b) < 20 || b[12]>>4 < 5 || int(b[12]>>4)*4 > len(b) {
			return false
		}
		p.flags = b[13]
		if p.flags&(tcpSYN|tcpACK|tcpRST|tcpFIN) == tcpSYN {
			p.kind = kindSYN
		}
	case ProtoUDP:
		p.srcPort, p.dstPort = binary.BigEndian.Uint16(b), binary.BigEndian.Uint16(b[2:])
		p.kind = kindUDP
	case protoICMP:
		p.icmpType = b[0]
		p.kind = kindOther
		if !p.v6 {
			p.kind = icmpKind(b[0])
		}
	case protoICMPv6:
		p.icmpType = b[0]
		p.kind = kindOther
		if p.v6 {
			p.kind = icmp6Kind(b[0])
		}
	}
	return true
}

func icmpKind(t uint8) kind {
	switch t {
	case icmpEcho:
		return kindEcho
	case icmpEchoReply:
		return kindEchoReply
	case icmpUnreachable, icmpTimeExceeded, icmpParameter:
		return kindError
	case icmpRedirect, icmpRouterAdvert, icmpRouterSolicit:
		return kindRouter
	}
	return kindOther
}

func icmp6Kind(t uint8) kind {
	switch t {
	case icmp6Echo:
		return kindEcho
	case icmp6EchoReply:
		return kindEchoReply
	case icmp6NeighborAsk, icmp6NeighborAdvert:
		return kindNeighbor
	case icmp6Query:
		return kindQuery
	case icmp6Report, icmp6Done, icmp6ReportV2:
		return kindReport
	case icmp6RouterSolicit, icmp6RouterAdvert, icmp6Redirect:
		return kindRouter
	}
	if t >= icmp6Unreachable && t <= icmp6Parameter {
		return kindError
	}
	return kindOther
}

// parseQuote reads the packet that an ICMP error quotes: one that the VIP sent.
func parseQuote(p *packet, q *packet) bool {
	if p.v6 {
		return parseIPv6(p.payload[8:], true, q)
	}
	return parseIPv4(p.payload[8:], true, q)
}

// arp is an ARP packet for IPv4 over Ethernet (RFC 826).
type arp struct {
	request              bool
	senderMAC, targetMAC uint64
	sender, target       addr
}

func parseARP(b []byte, a *arp) bool {
	// Hardware type 1, protocol 0x0800, lengths 6 and 4: nothing else is for us,
	// and no length that the packet claims is ever used.
	if len(b) < arpLength || binary.BigEndian.Uint64(b)>>16 != 0x0001_0800_0604 {
		return false
	}
	op := binary.BigEndian.Uint16(b[6:])
	if op != arpRequest && op != arpReply {
		return false
	}
	a.request = op == arpRequest
	a.senderMAC, a.sender = mac(b[8:]), addr4(b[14:])
	a.targetMAC, a.target = mac(b[18:]), addr4(b[24:])
	return isStation(a.senderMAC) && (isUnicast(a.sender) || a.sender == zero4)
}

// neighbor is a neighbour solicitation or advertisement (RFC 4861).
type neighbor struct {
	target    addr
	solicited bool   // the S flag of an advertisement
	linkAddr  uint64 // of the option that the message is about
	hasLink   bool
}

// parseNeighbor checks what RFC 4861, 7.1.1 and 7.1.2, demand of a valid
// message, but for the checksum, and takes the link-layer address option.
func parseNeighbor(p *packet, n *neighbor) bool {
	b := p.payload
	if p.extended || p.hopLimit != ndpHopLimit || len(b) < ndpLength || b[1] != 0 {
		return false
	}
	want := uint8(optionSourceLL)
	if p.icmpType == icmp6NeighborAdvert {
		want = optionTargetLL
		n.solicited = b[4]&0x40 != 0
	}
	n.target = addr6(b[8:])
	b = b[ndpLength:]
	for range MaxOptions {
		if len(b) == 0 {
			break
		}
		if len(b) < 8 || b[1] == 0 || int(b[1])*8 > len(b) {
			return false
		}
		if b[0] == want {
			if b[1] != 1 {
				return false
			}
			n.linkAddr, n.hasLink = mac(b[2:]), true
		}
		b = b[int(b[1])*8:]
	}
	group := isMulticast(p.dst)
	switch {
	case len(b) != 0 || !isUnicast(n.target) || n.hasLink && !isStation(n.linkAddr):
		return false
	case p.icmpType == icmp6NeighborAdvert:
		return isUnicast(p.src) && !(group && n.solicited)
	case p.src == (addr{}): // a duplicate-address probe
		return isSolicitedNode(p.dst) && !n.hasLink
	}
	return isUnicast(p.src)
}

func isGroup(mac uint64) bool { return mac>>40&1 != 0 }

func isStation(mac uint64) bool { return mac != 0 && !isGroup(mac) }

// zero4 is 0.0.0.0.
var zero4 = addr{0, mappedPrefix}

func isMapped(a addr) bool { return a.hi == 0 && a.lo>>32 == mappedPrefix>>32 }

func isMulticast(a addr) bool { return a.hi>>56 == 0xff }

func isLinkLocal(a addr) bool { return a.hi>>54 == 0xfe80>>6 }

// isUnicast tells whether a host other than this one may have the address:
// neither unspecified, loopback, multicast, reserved nor broadcast.
func isUnicast(a addr) bool {
	if isMapped(a) {
		first := uint8(a.lo >> 24)
		return first != 0 && first != 127 && first < 224
	}
	return !isMulticast(a) && (a.hi != 0 || a.lo > 1)
}

// solicitedNode gives the multicast address of RFC 4291, 2.7.1.
func solicitedNode(a addr) addr { return addr{groupPrefix, 0x1_ff00_0000 | a.lo&0xff_ffff} }

func isSolicitedNode(a addr) bool { return a == solicitedNode(a) }
