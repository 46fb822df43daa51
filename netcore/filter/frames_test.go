package filter

import (
	"encoding/binary"
	"net"
	"net/netip"
	"slices"
	"testing"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
)

// The demo network.
var (
	cloneMAC  = [6]byte{0x02, 0xcc, 0x0a, 0x4d, 0x00, 0x0a}
	clientMAC = net.HardwareAddr{0x52, 0x54, 0x00, 0x11, 0x22, 0x33}
	nodeMAC   = net.HardwareAddr{0x52, 0x54, 0x00, 0x77, 0x00, 0x02} // another node's wire MAC
	broadcast = net.HardwareAddr{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}
	noMAC     = net.HardwareAddr{0, 0, 0, 0, 0, 0}

	vip4, vip6       = netip.MustParseAddr("10.77.0.10"), netip.MustParseAddr("fd77::10")
	client4, client6 = netip.MustParseAddr("10.77.0.1"), netip.MustParseAddr("fd77::1")
	other4, other6   = netip.MustParseAddr("10.77.0.99"), netip.MustParseAddr("fd77::99")
	router6          = netip.MustParseAddr("fe80::1")
	all6             = netip.MustParseAddr("ff02::1")
	none4, none6     = netip.IPv4Unspecified(), netip.IPv6Unspecified()

	testKey = [16]byte{1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16}
)

// localPort is one from which nodes open flows, offPort one that is disabled,
// and offLocalPort both.
const clientPort, localPort, offPort, offLocalPort = 50001, 40000, 7, 45000

func testConfig() Config {
	var off []Rule
	for _, proto := range []uint8{ProtoTCP, ProtoUDP} {
		for _, port := range []uint16{offPort, offLocalPort} {
			off = append(off, Rule{Proto: proto, PortLo: port, PortHi: port, Disabled: true})
		}
	}
	return Config{CloneMAC: cloneMAC, VIP4: vip4, VIP6: vip6, HashKey: testKey, Rules: off}
}

func clone() net.HardwareAddr { return net.HardwareAddr(cloneMAC[:]) }

// build serialises layers, with lengths and checksums filled in.
func build(ls ...gopacket.SerializableLayer) []byte {
	b := gopacket.NewSerializeBuffer()
	if err := gopacket.SerializeLayers(b, gopacket.SerializeOptions{FixLengths: true, ComputeChecksums: true}, ls...); err != nil {
		panic(err)
	}
	return slices.Clone(b.Bytes())
}

func ether(dst, src net.HardwareAddr, t layers.EthernetType) *layers.Ethernet {
	return &layers.Ethernet{DstMAC: dst, SrcMAC: src, EthernetType: t}
}

// ip gives the network layer from src to dst for a protocol.
func ip(src, dst netip.Addr, proto layers.IPProtocol) (layers.EthernetType, gopacket.SerializableLayer) {
	if src.Is4() {
		return layers.EthernetTypeIPv4, &layers.IPv4{Version: 4, TTL: 64, Protocol: proto, SrcIP: src.AsSlice(), DstIP: dst.AsSlice()}
	}
	return layers.EthernetTypeIPv6, &layers.IPv6{Version: 6, HopLimit: 64, NextHeader: proto, SrcIP: src.AsSlice(), DstIP: dst.AsSlice()}
}

// packetFrame puts a transport layer into a frame. What comes from the VIP has
// the clone MAC as source, as the kernel writes it.
func packetFrame(src, dst netip.Addr, proto layers.IPProtocol, ls ...gopacket.SerializableLayer) []byte {
	t, l3 := ip(src, dst, proto)
	if c, ok := ls[0].(interface {
		SetNetworkLayerForChecksum(gopacket.NetworkLayer) error
	}); ok {
		if err := c.SetNetworkLayerForChecksum(l3.(gopacket.NetworkLayer)); err != nil {
			panic(err)
		}
	}
	e := ether(clone(), clientMAC, t)
	if src == vip4 || src == vip6 {
		e = ether(clientMAC, clone(), t)
	}
	return build(append([]gopacket.SerializableLayer{e, l3}, ls...)...)
}

// tcp builds a segment; flags is any of the letters S A R F P.
func tcp(src, dst netip.Addr, sport, dport uint16, flags string) []byte {
	l := &layers.TCP{SrcPort: layers.TCPPort(sport), DstPort: layers.TCPPort(dport), Seq: 1000, Window: 65535}
	for _, c := range flags {
		switch c {
		case 'S':
			l.SYN = true
		case 'A':
			l.ACK = true
		case 'R':
			l.RST = true
		case 'F':
			l.FIN = true
		case 'P':
			l.PSH = true
		}
	}
	return packetFrame(src, dst, layers.IPProtocolTCP, l, gopacket.Payload("data"))
}

func udp(src, dst netip.Addr, sport, dport uint16) []byte {
	l := &layers.UDP{SrcPort: layers.UDPPort(sport), DstPort: layers.UDPPort(dport)}
	return packetFrame(src, dst, layers.IPProtocolUDP, l, gopacket.Payload("data"))
}

// icmp builds a message of either version with rest after the first 4 bytes.
func icmp(src, dst netip.Addr, typ, code uint8, rest []byte) []byte {
	if src.Is4() {
		l := &layers.ICMPv4{TypeCode: layers.CreateICMPv4TypeCode(typ, code)}
		if len(rest) >= 4 {
			l.Id, l.Seq = binary.BigEndian.Uint16(rest), binary.BigEndian.Uint16(rest[2:])
			rest = rest[4:]
		}
		return packetFrame(src, dst, layers.IPProtocolICMPv4, l, gopacket.Payload(rest))
	}
	l := &layers.ICMPv6{TypeCode: layers.CreateICMPv6TypeCode(typ, code)}
	return packetFrame(src, dst, layers.IPProtocolICMPv6, l, gopacket.Payload(rest))
}

var echoRest = []byte{0x12, 0x34, 0, 1, 'p', 'i', 'n', 'g'}

func echo(src, dst netip.Addr) []byte {
	if src.Is4() {
		return icmp(src, dst, icmpEcho, 0, echoRest)
	}
	return icmp(src, dst, icmp6Echo, 0, echoRest)
}

func echoReply(src, dst netip.Addr) []byte {
	if src.Is4() {
		return icmp(src, dst, icmpEchoReply, 0, echoRest)
	}
	return icmp(src, dst, icmp6EchoReply, 0, echoRest)
}

// quote builds an ICMP error from a router that quotes the first n bytes of
// the IP packet in a frame: fragmentation needed, or packet too big.
func quote(frame []byte, n int) []byte {
	inner := frame[etherHeader:]
	inner = inner[:min(n, len(inner))]
	rest := append([]byte{0, 0, 5, 0}, inner...)
	if inner[0]>>4 == 4 {
		return icmp(other4, vip4, icmpUnreachable, 4, rest)
	}
	return icmp(other6, vip6, 2, 0, rest)
}

func arpFrame(dst, src net.HardwareAddr, op uint16, sha net.HardwareAddr, spa netip.Addr, tha net.HardwareAddr, tpa netip.Addr) []byte {
	return build(ether(dst, src, layers.EthernetTypeARP), &layers.ARP{
		AddrType: layers.LinkTypeEthernet, Protocol: layers.EthernetTypeIPv4,
		HwAddressSize: 6, ProtAddressSize: 4, Operation: op,
		SourceHwAddress: sha, SourceProtAddress: spa.AsSlice(),
		DstHwAddress: tha, DstProtAddress: tpa.AsSlice(),
	})
}

// ndp builds a neighbour message; link is its link-layer address option.
func ndp(dstMAC, srcMAC net.HardwareAddr, src, dst netip.Addr, hops uint8, msg gopacket.SerializableLayer) []byte {
	typ := uint8(icmp6NeighborAsk)
	if _, ok := msg.(*layers.ICMPv6NeighborAdvertisement); ok {
		typ = icmp6NeighborAdvert
	}
	l3 := &layers.IPv6{Version: 6, HopLimit: hops, NextHeader: layers.IPProtocolICMPv6, SrcIP: src.AsSlice(), DstIP: dst.AsSlice()}
	l4 := &layers.ICMPv6{TypeCode: layers.CreateICMPv6TypeCode(typ, 0)}
	if err := l4.SetNetworkLayerForChecksum(l3); err != nil {
		panic(err)
	}
	return build(ether(dstMAC, srcMAC, layers.EthernetTypeIPv6), l3, l4, msg)
}

func option(t layers.ICMPv6Opt, mac net.HardwareAddr) layers.ICMPv6Options {
	if mac == nil {
		return nil
	}
	return layers.ICMPv6Options{{Type: t, Data: mac}}
}

func ns(target netip.Addr, link net.HardwareAddr) *layers.ICMPv6NeighborSolicitation {
	return &layers.ICMPv6NeighborSolicitation{TargetAddress: target.AsSlice(), Options: option(layers.ICMPv6OptSourceAddress, link)}
}

func na(target netip.Addr, link net.HardwareAddr, flags uint8) *layers.ICMPv6NeighborAdvertisement {
	return &layers.ICMPv6NeighborAdvertisement{TargetAddress: target.AsSlice(), Flags: flags, Options: option(layers.ICMPv6OptTargetAddress, link)}
}

// groupOf gives the solicited-node group of a, and its Ethernet address.
func groupOf(a netip.Addr) (netip.Addr, net.HardwareAddr) {
	b := a.As16()
	return netip.AddrFrom16([16]byte{0xff, 0x02, 11: 1, 12: 0xff, 13: b[13], 14: b[14], 15: b[15]}), net.HardwareAddr{0x33, 0x33, 0xff, b[13], b[14], b[15]}
}

var allMAC = net.HardwareAddr{0x33, 0x33, 0, 0, 0, 1}

// insert puts b into a frame at offset i.
func insert(frame []byte, i int, b ...byte) []byte {
	return slices.Insert(slices.Clone(frame), i, b...)
}

// patch overwrites bytes of a frame from offset i on.
func patch(frame []byte, i int, b ...byte) []byte {
	frame = slices.Clone(frame)
	copy(frame[i:], b)
	return frame
}

func priorityTag(frame []byte, n int) []byte {
	for range n {
		frame = insert(frame, 12, 0x81, 0x00, 0xe0, 0x00)
	}
	return frame
}

// fragment4 makes an IPv4 packet a fragment: offset in units of 8 bytes.
func fragment4(frame []byte, offset uint16, more bool) []byte {
	if more {
		offset |= 0x2000
	}
	return patch(frame, etherHeader+6, byte(offset>>8), byte(offset))
}

// extend6 puts extension headers of 8 bytes behind the IPv6 header.
func extend6(frame []byte, headers ...[8]byte) []byte {
	const start = etherHeader + 40
	next := frame[etherHeader+6]
	for i := len(headers) - 1; i >= 0; i-- {
		h := headers[i]
		t := h[0]
		h[0] = next
		next = t
		frame = insert(frame, start, h[:]...)
	}
	n := len(frame) - start
	return patch(patch(frame, etherHeader+6, next), etherHeader+4, byte(n>>8), byte(n))
}

// fragment6 is a fragment header for extend6.
func fragment6(offset uint16, more bool) [8]byte {
	h := [8]byte{extFragment, 0, byte(offset >> 5), byte(offset << 3)}
	if more {
		h[3] |= 1
	}
	return h
}

func uniform(s State) *Table {
	var t Table
	for b := range t {
		t[b] = s
	}
	return &t
}

// newFilter gives a Filter in which all buckets are in one state and new flows
// are let in until leaseEnd.
func newFilter(t testing.TB, cfg Config, s State) *Filter {
	t.Helper()
	f, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	f.SetTable(uniform(s), 0)
	f.SetLease(leaseEnd)
	return f
}

const leaseEnd = int64(1e18)

// sockets is a kernel that knows every flow in one way, and what it was asked.
type sockets struct {
	state SocketState
	asked []Tuple
}

func (s *sockets) Lookup(t Tuple) SocketState {
	s.asked = append(s.asked, t)
	return s.state
}
