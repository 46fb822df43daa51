package filter

import (
	"bytes"
	"encoding/binary"
	"testing"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
)

// strip steps over tags in the plainest way, for checks that do not use the
// parser under test.
func strip(frame []byte) (etherType uint16, payload []byte) {
	for i := 12; i+2 <= len(frame); i += 4 {
		if t := binary.BigEndian.Uint16(frame[i:]); t != etherVLAN && t != etherService {
			return t, frame[i+2:]
		}
	}
	return 0, nil
}

func FuzzIngress(f *testing.F) {
	for _, c := range ingressCases() {
		f.Add(c.frame, uint8(c.state))
	}
	vip4, vip6 := vip4.AsSlice(), vip6.AsSlice()
	var filters [states]*Filter
	for s := range filters {
		filters[s] = newFilter(f, testConfig(), State(s))
	}
	f.Fuzz(func(t *testing.T, frame []byte, state uint8) {
		filter := filters[state%uint8(states)]
		before := bytes.Clone(frame)
		v := filter.Ingress(frame, testNow, nil)
		if v == 0 || v > DropDisabled {
			t.Fatalf("verdict %d", v)
		}
		if again := filter.Ingress(frame, testNow, nil); again != v || !bytes.Equal(before, frame) {
			t.Fatalf("first %v, then %v; frame changed: %v", v, again, !bytes.Equal(before, frame))
		}
		if !v.Accept() && v != AnswerNeighbor {
			return
		}
		if bytes.Equal(frame[6:12], cloneMAC[:]) {
			t.Fatalf("%v from the clone MAC", v)
		}
		toClone := bytes.Equal(frame[:6], cloneMAC[:])
		etherType, b := strip(frame)
		switch {
		case etherType == etherARP:
			if v != AcceptNeighbor && v != AnswerNeighbor || bytes.Equal(b[14:18], vip4) || bytes.Equal(b[8:14], cloneMAC[:]) {
				t.Fatalf("%v of an ARP packet that claims the VIP, or wrongly", v)
			}
		case v == AcceptNeighbor || v == AnswerNeighbor || v == AcceptControl:
			if etherType != etherIPv6 || bytes.Equal(b[8:24], vip6) {
				t.Fatalf("%v of EtherType %#x", v, etherType)
			}
			if !(toClone && bytes.Equal(b[24:40], vip6)) && b[24] != 0xff {
				t.Fatalf("%v to % x", v, b[24:40])
			}
			if v == AcceptNeighbor && (b[40] != icmp6NeighborAdvert || bytes.Equal(b[48:64], vip6)) {
				t.Fatalf("%v of % x", v, b[40:])
			}
			if v == AnswerNeighbor && (b[40] != icmp6NeighborAsk || !bytes.Equal(b[48:64], vip6)) {
				t.Fatalf("%v of % x", v, b[40:])
			}
		case !toClone:
			t.Fatalf("%v of a frame to % x", v, frame[:6])
		case etherType == etherIPv4 && bytes.Equal(b[16:20], vip4) && !bytes.Equal(b[12:16], vip4):
			notDisabled(t, v, b[9], b[int(b[0]&15)*4:])
		case etherType == etherIPv6 && bytes.Equal(b[24:40], vip6) && !bytes.Equal(b[8:24], vip6):
			notDisabled(t, v, b[6], b[40:])
		default:
			t.Fatalf("%v of a packet not to the VIP", v)
		}
	})
}

// notDisabled fails when a segment or datagram that was taken is for a disabled
// port.
func notDisabled(t *testing.T, v Verdict, proto uint8, transport []byte) {
	t.Helper()
	if v == AcceptFragment || proto != ProtoTCP && proto != ProtoUDP {
		return
	}
	if port := binary.BigEndian.Uint16(transport[2:]); port == offPort || port == offLocalPort {
		t.Fatalf("%v of a packet to port %d, which is disabled", v, port)
	}
}

func FuzzEgress(f *testing.F) {
	for _, c := range egressCases() {
		f.Add(c.frame, uint8(c.state))
	}
	vip4, vip6 := vip4.AsSlice(), vip6.AsSlice()
	var filters [states]*Filter
	for s := range filters {
		filters[s] = newFilter(f, testConfig(), State(s))
	}
	f.Fuzz(func(t *testing.T, frame []byte, state uint8) {
		v := filters[state%uint8(states)].Egress(frame, testNow)
		if v < Send || v >= verdictEnd {
			t.Fatalf("verdict %v", v)
		}
		if !v.Send() {
			return
		}
		b := frame[etherHeader:]
		switch binary.BigEndian.Uint16(frame[12:]) {
		case etherARP:
			if !bytes.Equal(b[8:14], cloneMAC[:]) || !bytes.Equal(b[14:18], vip4) {
				t.Fatalf("%v of an ARP packet from % x at % x", v, b[14:18], b[8:14])
			}
		case etherIPv4:
			if !bytes.Equal(b[12:16], vip4) {
				t.Fatalf("%v of a packet from % x", v, b[12:16])
			}
		case etherIPv6:
			if !bytes.Equal(b[8:24], vip6) && !bytes.Equal(b[8:24], make([]byte, 16)) {
				t.Fatalf("%v of a packet from % x", v, b[8:24])
			}
		default:
			t.Fatalf("%v of EtherType % x", v, frame[12:14])
		}
	})
}

// FuzzParser compares the parser with gopacket's on all that both understand.
func FuzzParser(f *testing.F) {
	for _, c := range append(ingressCases(), egressCases()...) {
		f.Add(c.frame)
	}
	f.Fuzz(func(t *testing.T, frame []byte) {
		if len(frame) < etherHeader {
			return
		}
		etherType, b, v := untag(frame)
		var p packet
		var ok bool
		switch {
		case v != 0:
			return
		case etherType == etherIPv4:
			ok = parseIPv4(b, false, &p)
		case etherType == etherIPv6:
			ok = parseIPv6(b, false, &p)
		default:
			return
		}
		theirs := gopacket.NewPacket(frame, layers.LayerTypeEthernet, gopacket.NoCopy)
		if theirs.ErrorLayer() != nil || theirs.Metadata().Truncated {
			return
		}
		if ok {
			compareNetwork(t, &p, theirs)
		}
		compareTransport(t, ok, &p, theirs)
	})
}

func compareNetwork(t *testing.T, p *packet, theirs gopacket.Packet) {
	n := theirs.NetworkLayer()
	if n == nil {
		t.Fatalf("gopacket sees no network layer: %v", theirs)
	}
	src, dst := n.NetworkFlow().Endpoints()
	ours := func(a addr) []byte { return a.addr().AsSlice() }
	if p.v6 {
		ours = func(a addr) []byte {
			return binary.BigEndian.AppendUint64(binary.BigEndian.AppendUint64(nil, a.hi), a.lo)
		}
	}
	if !bytes.Equal(src.Raw(), ours(p.src)) || !bytes.Equal(dst.Raw(), ours(p.dst)) {
		t.Fatalf("%v to %v; gopacket: %v to %v", p.src.addr(), p.dst.addr(), src, dst)
	}
}

// compareTransport looks at packets that are a plain chain of Ethernet, tags,
// IP, extension headers and transport: gopacket also looks into tunnels.
func compareTransport(t *testing.T, ok bool, p *packet, theirs gopacket.Packet) {
	extensions, networks := 0, 0
	for _, l := range theirs.Layers() {
		switch l := l.(type) {
		case *layers.Ethernet, *layers.Dot1Q:
		case *layers.IPv4:
			if networks++; networks > 1 || l.Version != 4 || binary.BigEndian.Uint16(l.Contents[2:]) == 0 {
				return // a tunnel, a version gopacket overlooks, or TSO as some drivers show it
			}
		case *layers.IPv6:
			if networks++; networks > 1 || l.Version != 6 || binary.BigEndian.Uint16(l.Contents[4:]) == 0 {
				return // a tunnel, another version, or a jumbogram
			}
		case *layers.IPv6HopByHop, *layers.IPv6Routing, *layers.IPv6Destination, *layers.IPv6Fragment:
			if extensions++; extensions > MaxExtensions {
				return
			}
		case *layers.TCP:
			flags := l.Contents[13]
			want := kindTCP
			if l.SYN && !l.ACK && !l.RST && !l.FIN {
				want = kindSYN
			}
			if !ok || p.kind != want || p.flags != flags || p.srcPort != uint16(l.SrcPort) || p.dstPort != uint16(l.DstPort) {
				t.Fatalf("valid %v: %+v; gopacket: %+v", ok, p, l)
			}
			return
		case *layers.UDP:
			if !ok || p.kind != kindUDP || p.srcPort != uint16(l.SrcPort) || p.dstPort != uint16(l.DstPort) {
				t.Fatalf("valid %v: %+v; gopacket: %+v", ok, p, l)
			}
			return
		case *layers.ICMPv4:
			if ok && !p.v6 && (p.proto != protoICMP || p.icmpType != l.TypeCode.Type()) {
				t.Fatalf("%+v; gopacket: %+v", p, l)
			}
			return
		case *layers.ICMPv6:
			if ok && p.v6 && (p.proto != protoICMPv6 || p.icmpType != l.TypeCode.Type()) {
				t.Fatalf("%+v; gopacket: %+v", p, l)
			}
			return
		default:
			return
		}
	}
}
