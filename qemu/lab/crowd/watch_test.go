package crowd

import (
	"net"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"

	"clonecluster/qemu/vswitch"
)

var (
	vip    = netip.MustParseAddrPort("10.77.0.10:80")
	vip6   = netip.MustParseAddrPort("[fd77::10]:80")
	client = netip.MustParseAddrPort("10.77.0.1:40000")
)

// segment is a frame with a TCP header whose flags are the letters S, A, R and F.
func segment(t testing.TB, src, dst netip.AddrPort, flags string, seq, ack uint32) []byte {
	t.Helper()
	eth := &layers.Ethernet{SrcMAC: net.HardwareAddr{2, 0, 0, 0, 0, 1}, DstMAC: net.HardwareAddr{2, 0, 0, 0, 0, 2}}
	tcp := &layers.TCP{SrcPort: layers.TCPPort(src.Port()), DstPort: layers.TCPPort(dst.Port()), Seq: seq, Ack: ack}
	for _, f := range flags {
		*map[rune]*bool{'S': &tcp.SYN, 'A': &tcp.ACK, 'R': &tcp.RST, 'F': &tcp.FIN}[f] = true
	}
	var ip gopacket.SerializableLayer
	if src.Addr().Is4() {
		eth.EthernetType = layers.EthernetTypeIPv4
		h := &layers.IPv4{Version: 4, TTL: 64, Protocol: layers.IPProtocolTCP, SrcIP: src.Addr().AsSlice(), DstIP: dst.Addr().AsSlice()}
		tcp.SetNetworkLayerForChecksum(h)
		ip = h
	} else {
		eth.EthernetType = layers.EthernetTypeIPv6
		h := &layers.IPv6{Version: 6, HopLimit: 64, NextHeader: layers.IPProtocolTCP, SrcIP: src.Addr().AsSlice(), DstIP: dst.Addr().AsSlice()}
		tcp.SetNetworkLayerForChecksum(h)
		ip = h
	}
	b := gopacket.NewSerializeBuffer()
	if err := gopacket.SerializeLayers(b, gopacket.SerializeOptions{FixLengths: true, ComputeChecksums: true}, eth, ip, tcp); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func TestParseSYN(t *testing.T) {
	client6 := netip.MustParseAddrPort("[fd77::1]:40000")
	good := segment(t, client, vip, "S", 7, 0)
	fragment := slices.Clone(good)
	fragment[21] = 1
	udp := slices.Clone(good)
	udp[23] = 17
	for _, tt := range []struct {
		name  string
		frame []byte
		want  syn
		ok    bool
	}{
		{"SYN", good, syn{src: client, dst: vip, seq: 7}, true},
		{"SYN over IPv6", segment(t, client6, vip6, "S", 7, 0), syn{src: client6, dst: vip6, seq: 7}, true},
		{"answer", segment(t, vip, client, "SA", 9, 8), syn{src: vip, dst: client, seq: 9, ackSeq: 8, ack: true}, true},
		{"ACK", segment(t, client, vip, "A", 8, 10), syn{}, false},
		{"FIN", segment(t, client, vip, "FA", 8, 10), syn{}, false},
		{"RST", segment(t, vip, client, "RA", 0, 8), syn{}, false},
		{"later fragment", fragment, syn{}, false},
		{"UDP", udp, syn{}, false},
		{"cut in the TCP header", good[:14+20+19], syn{}, false},
		{"cut in the IP header", good[:30], syn{}, false},
		{"nothing", nil, syn{}, false},
	} {
		if got, ok := parseSYN(tt.frame); got != tt.want || ok != tt.ok {
			t.Errorf("%s: parseSYN = %+v, %v; want %+v, %v", tt.name, got, ok, tt.want, tt.ok)
		}
	}
}

func FuzzParseSYN(f *testing.F) {
	f.Add(segment(f, client, vip, "S", 7, 0))
	f.Add(segment(f, vip6, netip.MustParseAddrPort("[fd77::1]:40000"), "SA", 7, 0))
	long := segment(f, client, vip, "S", 7, 0)
	long[14] = 0x4f // options that are not there
	f.Add(long)
	f.Fuzz(func(t *testing.T, frame []byte) {
		if s, ok := parseSYN(frame); ok && (!s.src.IsValid() || !s.dst.IsValid()) {
			t.Errorf("parseSYN(% x) = %+v", frame, s)
		}
	})
}

func TestWatch(t *testing.T) {
	start := time.Now()
	w := newWatch(vip)
	frame := func(ms int, port string, f []byte) {
		w.frame(vswitch.Frame{Time: start.Add(time.Duration(ms) * time.Millisecond), Port: port, Data: f})
	}
	answer := func(isn uint32) []byte { return segment(t, vip, client, "SA", 1000, isn+1) }
	want := func(what string, syns, lost int, holders ...string) {
		t.Helper()
		a := w.attempt(client)
		at := -1
		if !a.Lost.IsZero() {
			at = int(a.Lost.Sub(start).Milliseconds())
		}
		if a.SYNs != syns || at != lost || !slices.Equal(a.Holders, holders) {
			t.Errorf("%s: %d SYNs, lost at %d ms, held by %q; want %d, %d, %q", what, a.SYNs, at, a.Holders, syns, lost, holders)
		}
	}
	want("before anything", 0, -1)
	frame(0, "node1", answer(7)) // of nobody's SYN
	frame(0, "client", segment(t, client, netip.MustParseAddrPort("10.77.0.9:80"), "S", 7, 0))
	want("of another server", 0, -1)

	frame(10, "client", segment(t, client, vip, "S", 7, 0))
	frame(12, "node1", answer(7))
	want("answered at once", 1, -1, "node1")

	frame(100, "client", segment(t, client, vip, "S", 50, 0)) // the port again
	frame(1100, "client", segment(t, client, vip, "S", 50, 0))
	frame(3100, "client", segment(t, client, vip, "S", 50, 0))
	want("not answered yet", 3, 1100)
	frame(3101, "node2", answer(7)) // late, of the connection before
	want("answer of another connection", 3, 1100)
	frame(3102, "node2", answer(50))
	frame(4102, "node2", answer(50)) // sent again
	frame(4103, "client", segment(t, client, vip, "S", 50, 0))
	want("answered at the third try", 3, 1100, "node2")
	if d := w.doubled(); len(d) != 0 {
		t.Errorf("doubled = %+v; want none", d)
	}
	frame(4202, "node3", answer(50))
	want("answered twice", 3, 1100, "node2", "node3")
	if d := w.doubled(); len(d) != 1 || d[0] != (Double{client, "node2", "node3", 1100 * time.Millisecond}) {
		t.Errorf("doubled = %+v; want node2 and node3 after 1.1 s", d)
	}
}
