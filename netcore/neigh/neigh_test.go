package neigh

import (
	"bytes"
	"encoding/hex"
	"errors"
	"flag"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"clonecluster/netcore/filter"

	"github.com/google/go-cmp/cmp"
	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
	"github.com/gopacket/gopacket/pcapgo"
)

var update = flag.Bool("update", false, "write testdata/frames.txt anew")

var (
	cloneMAC  = [6]byte{0x02, 0xcc, 0x0a, 0x4d, 0x00, 0x0a}
	wireMAC   = [6]byte{0x52, 0x54, 0x00, 0x77, 0x00, 0x01}
	clientMAC = net.HardwareAddr{0x52, 0x54, 0x00, 0x11, 0x22, 0x33}
	broadcast = net.HardwareAddr{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}
	groupMAC  = net.HardwareAddr{0x33, 0x33, 0xff, 0, 0, 0x10}
	vip4      = netip.MustParseAddr("10.77.0.10")
	vip6      = netip.MustParseAddr("fd77::10")
	config    = Config{CloneMAC: cloneMAC, WireMAC: wireMAC, VIP4: vip4, VIP6: vip6}
)

func newResponder(t testing.TB, cfg Config) *Responder {
	t.Helper()
	r, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func build(ls ...gopacket.SerializableLayer) []byte {
	b := gopacket.NewSerializeBuffer()
	if err := gopacket.SerializeLayers(b, gopacket.SerializeOptions{FixLengths: true, ComputeChecksums: true}, ls...); err != nil {
		panic(err)
	}
	return bytes.Clone(b.Bytes())
}

func arpRequest(dst, sha net.HardwareAddr, spa, tpa string) []byte {
	return build(&layers.Ethernet{DstMAC: dst, SrcMAC: clientMAC, EthernetType: layers.EthernetTypeARP}, &layers.ARP{
		AddrType: layers.LinkTypeEthernet, Protocol: layers.EthernetTypeIPv4, HwAddressSize: 6, ProtAddressSize: 4, Operation: layers.ARPRequest,
		SourceHwAddress: sha, SourceProtAddress: netip.MustParseAddr(spa).AsSlice(),
		DstHwAddress: make([]byte, 6), DstProtAddress: netip.MustParseAddr(tpa).AsSlice(),
	})
}

func solicitationOf(dstMAC net.HardwareAddr, src, dst, target string, hops uint8, link net.HardwareAddr) []byte {
	ip := &layers.IPv6{Version: 6, HopLimit: hops, NextHeader: layers.IPProtocolICMPv6, SrcIP: net.ParseIP(src), DstIP: net.ParseIP(dst)}
	icmp := &layers.ICMPv6{TypeCode: layers.CreateICMPv6TypeCode(layers.ICMPv6TypeNeighborSolicitation, 0)}
	if err := icmp.SetNetworkLayerForChecksum(ip); err != nil {
		panic(err)
	}
	ns := &layers.ICMPv6NeighborSolicitation{TargetAddress: net.ParseIP(target)}
	if link != nil {
		ns.Options = layers.ICMPv6Options{{Type: layers.ICMPv6OptSourceAddress, Data: link}}
	}
	return build(&layers.Ethernet{DstMAC: dstMAC, SrcMAC: clientMAC, EthernetType: layers.EthernetTypeIPv6}, ip, icmp, ns)
}

func patch(frame []byte, i int, b ...byte) []byte {
	frame = bytes.Clone(frame)
	copy(frame[i:], b)
	return frame
}

const group = "ff02::1:ff00:10"

// answered is what must be answered, and what tshark must see in the answer.
var answered = []struct {
	name    string
	request []byte
	fields  []string // of arpFields or ndpFields
}{
	{"ARP request", arpRequest(broadcast, clientMAC, "10.77.0.1", "10.77.0.10"),
		[]string{"52:54:00:11:22:33", "52:54:00:77:00:01", "2", "02:cc:0a:4d:00:0a", "10.77.0.10", "52:54:00:11:22:33", "10.77.0.1"}},
	{"unicast ARP request", arpRequest(cloneMAC[:], clientMAC, "10.77.0.1", "10.77.0.10"),
		[]string{"52:54:00:11:22:33", "52:54:00:77:00:01", "2", "02:cc:0a:4d:00:0a", "10.77.0.10", "52:54:00:11:22:33", "10.77.0.1"}},
	{"ARP probe", arpRequest(broadcast, clientMAC, "0.0.0.0", "10.77.0.10"),
		[]string{"52:54:00:11:22:33", "52:54:00:77:00:01", "2", "02:cc:0a:4d:00:0a", "10.77.0.10", "52:54:00:11:22:33", "0.0.0.0"}},
	{"ARP request, priority tag", tagged(arpRequest(broadcast, clientMAC, "10.77.0.1", "10.77.0.10")),
		[]string{"52:54:00:11:22:33", "52:54:00:77:00:01", "2", "02:cc:0a:4d:00:0a", "10.77.0.10", "52:54:00:11:22:33", "10.77.0.1"}},
	{"solicitation", solicitationOf(groupMAC, "fd77::1", group, "fd77::10", 255, clientMAC),
		[]string{"52:54:00:11:22:33", "52:54:00:77:00:01", "fd77::10", "fd77::1", "255", "136", "1", "fd77::10", "0", "1", "1", "02:cc:0a:4d:00:0a"}},
	{"unicast solicitation without address", solicitationOf(cloneMAC[:], "fe80::1", "fd77::10", "fd77::10", 255, nil),
		[]string{"52:54:00:11:22:33", "52:54:00:77:00:01", "fd77::10", "fe80::1", "255", "136", "1", "fd77::10", "0", "1", "1", "02:cc:0a:4d:00:0a"}},
	{"duplicate-address probe", solicitationOf(groupMAC, "::", group, "fd77::10", 255, nil),
		[]string{"33:33:00:00:00:01", "52:54:00:77:00:01", "fd77::10", "ff02::1", "255", "136", "1", "fd77::10", "0", "0", "1", "02:cc:0a:4d:00:0a"}},
}

var announced = [][]string{
	{"ff:ff:ff:ff:ff:ff", "52:54:00:77:00:01", "1", "02:cc:0a:4d:00:0a", "10.77.0.10", "00:00:00:00:00:00", "10.77.0.10"},
	{"33:33:00:00:00:01", "52:54:00:77:00:01", "fd77::10", "ff02::1", "255", "136", "1", "fd77::10", "0", "0", "1", "02:cc:0a:4d:00:0a"},
}

var (
	arpFields = []string{"eth.dst", "eth.src", "arp.opcode", "arp.src.hw_mac", "arp.src.proto_ipv4", "arp.dst.hw_mac", "arp.dst.proto_ipv4"}
	ndpFields = []string{"eth.dst", "eth.src", "ipv6.src", "ipv6.dst", "ipv6.hlim", "icmpv6.type", "icmpv6.checksum.status", "icmpv6.nd.na.target_address",
		"icmpv6.nd.na.flag.r", "icmpv6.nd.na.flag.s", "icmpv6.nd.na.flag.o", "icmpv6.opt.linkaddr"}
)

func tagged(frame []byte) []byte {
	return append(append(bytes.Clone(frame[:12]), 0x81, 0x00, 0xe0, 0x00), frame[12:]...)
}

// frames gives all answers, then all announcements.
func frames(t *testing.T) (frames [][]byte, names []string, fields [][]string) {
	t.Helper()
	r := newResponder(t, config)
	for _, c := range answered {
		b, err := r.Reply(c.request, nil)
		if err != nil {
			t.Fatalf("%s: %v", c.name, err)
		}
		frames, names, fields = append(frames, b), append(names, c.name), append(fields, c.fields)
	}
	a, err := r.Announcements()
	if err != nil {
		t.Fatal(err)
	}
	return append(frames, a...), append(names, "gratuitous ARP", "unsolicited advertisement"), append(fields, announced...)
}

// TestFramesAsGolden pins the bytes.
func TestFramesAsGolden(t *testing.T) {
	fs, names, _ := frames(t)
	var got strings.Builder
	for i, b := range fs {
		got.WriteString(names[i] + "\n" + hex.Dump(b) + "\n")
	}
	const name = "testdata/frames.txt"
	if *update {
		if err := os.WriteFile(name, []byte(got.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(string(want), got.String()); d != "" {
		t.Errorf("frames differ from %s (-want +got):\n%s", name, d)
	}
}

// TestFramesAsTsharkReadsThem has another program say what the frames are.
func TestFramesAsTsharkReadsThem(t *testing.T) {
	tshark, err := exec.LookPath("tshark")
	if err != nil {
		t.Skip("tshark is not installed")
	}
	fs, names, fields := frames(t)
	capture := filepath.Join(t.TempDir(), "frames.pcap")
	writePcap(t, capture, fs)
	dissect := func(fields []string) []string {
		args := []string{"-n", "-r", capture, "-T", "fields", "-E", "separator=|"}
		for _, f := range append(fields, "_ws.expert.message", "_ws.malformed") {
			args = append(args, "-e", f)
		}
		out, err := exec.Command(tshark, args...).Output()
		if err != nil {
			t.Fatalf("tshark: %v", err)
		}
		return strings.Split(strings.TrimSuffix(string(out), "\n"), "\n")
	}
	asARP, asNDP := dissect(arpFields), dissect(ndpFields)
	if len(asARP) != len(fs) || len(asNDP) != len(fs) {
		t.Fatalf("tshark shows %d and %d of %d frames", len(asARP), len(asNDP), len(fs))
	}
	for i, name := range names {
		got, kinds := asARP[i], arpFields
		if len(fields[i]) == len(ndpFields) {
			got, kinds = asNDP[i], ndpFields
		}
		want := strings.Join(fields[i], "|") + "||"
		if got != want {
			t.Errorf("%s: tshark reads %v as\n%s; want\n%s", name, kinds, got, want)
		}
	}
}

func writePcap(t *testing.T, name string, frames [][]byte) {
	t.Helper()
	f, err := os.Create(name)
	if err != nil {
		t.Fatal(err)
	}
	w := pcapgo.NewWriter(f)
	if err := w.WriteFileHeader(65535, layers.LinkTypeEthernet); err != nil {
		t.Fatal(err)
	}
	for _, b := range frames {
		if err := w.WritePacket(gopacket.CaptureInfo{CaptureLength: len(b), Length: len(b)}, b); err != nil {
			t.Fatal(err)
		}
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
}

// unanswered is what must not be answered.
var unanswered = []struct {
	name    string
	request []byte
	want    error
}{
	{"nothing", nil, ErrMalformed},
	{"runt", make([]byte, 13), ErrMalformed},
	{"IPv4", patch(arpRequest(broadcast, clientMAC, "10.77.0.1", "10.77.0.10"), 12, 8, 0), ErrNotRequest},
	{"longer than a request", make([]byte, 1519), ErrMalformed},
	{"ARP for another", arpRequest(broadcast, clientMAC, "10.77.0.1", "10.77.0.11"), ErrNotRequest},
	{"ARP reply", patch(arpRequest(broadcast, clientMAC, "10.77.0.1", "10.77.0.10"), 20, 0, 2), ErrNotRequest},
	{"gratuitous ARP of the VIP", arpRequest(broadcast, clientMAC, "10.77.0.10", "10.77.0.10"), ErrNotRequest},
	{"ARP probe of a node", arpRequest(broadcast, cloneMAC[:], "0.0.0.0", "10.77.0.10"), ErrNotRequest},
	{"ARP from a group", arpRequest(broadcast, broadcast, "10.77.0.1", "10.77.0.10"), ErrMalformed},
	{"ARP from no MAC", arpRequest(broadcast, make([]byte, 6), "10.77.0.1", "10.77.0.10"), ErrMalformed},
	{"ARP from a multicast address", arpRequest(broadcast, clientMAC, "224.0.0.1", "10.77.0.10"), ErrMalformed},
	{"ARP cut", arpRequest(broadcast, clientMAC, "10.77.0.1", "10.77.0.10")[:41], ErrMalformed},
	{"ARP with hardware length 128", append(patch(arpRequest(broadcast, clientMAC, "10.77.0.1", "10.77.0.10"), 18, 128), make([]byte, 300)...), ErrMalformed},
	{"ARP with hardware length 0", patch(arpRequest(broadcast, clientMAC, "10.77.0.1", "10.77.0.10"), 18, 0), ErrMalformed},
	{"ARP with protocol length 16", append(patch(arpRequest(broadcast, clientMAC, "10.77.0.1", "10.77.0.10"), 19, 16), make([]byte, 30)...), ErrMalformed},
	{"ARP with hardware type 6", patch(arpRequest(broadcast, clientMAC, "10.77.0.1", "10.77.0.10"), 14, 0, 6), ErrMalformed},
	{"solicitation of another", solicitationOf(groupMAC, "fd77::1", group, "fd77::11", 255, clientMAC), ErrNotRequest},
	{"solicitation by a node", solicitationOf(groupMAC, "fd77::10", group, "fd77::10", 255, cloneMAC[:]), ErrNotRequest},
	{"solicitation with the clone MAC", solicitationOf(groupMAC, "fd77::1", group, "fd77::10", 255, cloneMAC[:]), ErrNotRequest},
	{"solicitation from afar", solicitationOf(groupMAC, "fd77::1", group, "fd77::10", 254, clientMAC), ErrMalformed},
	{"solicitation with a group's MAC", solicitationOf(groupMAC, "fd77::1", group, "fd77::10", 255, groupMAC), ErrMalformed},
	{"solicitation from a group", solicitationOf(groupMAC, "ff02::1", group, "fd77::10", 255, clientMAC), ErrMalformed},
	{"probe with an address", solicitationOf(groupMAC, "::", group, "fd77::10", 255, clientMAC), ErrMalformed},
	{"probe by unicast", solicitationOf(cloneMAC[:], "::", "fd77::10", "fd77::10", 255, nil), ErrMalformed},
	{"bad checksum", patch(solicitationOf(groupMAC, "fd77::1", group, "fd77::10", 255, clientMAC), 85, 0), ErrMalformed},
	{"code 1", patch(solicitationOf(groupMAC, "fd77::1", group, "fd77::10", 255, clientMAC), 55, 1), ErrMalformed},
	{"empty ICMPv6", patch(solicitationOf(groupMAC, "fd77::1", group, "fd77::10", 255, clientMAC), 18, 0, 0), ErrNotRequest},
	{"cut IPv6", solicitationOf(groupMAC, "fd77::1", group, "fd77::10", 255, clientMAC)[:60], ErrMalformed},
	{"UDP", patch(solicitationOf(groupMAC, "fd77::1", group, "fd77::10", 255, clientMAC), 20, 17), ErrNotRequest},
	{"option of length 0", resum(patch(solicitationOf(groupMAC, "fd77::1", group, "fd77::10", 255, clientMAC), 79, 0)), ErrMalformed},
	{"option too long", resum(patch(solicitationOf(groupMAC, "fd77::1", group, "fd77::10", 255, clientMAC), 79, 2)), ErrMalformed},
}

// resum corrects the checksum of an NDP frame.
func resum(frame []byte) []byte {
	frame = patch(frame, 56, 0, 0)
	sum := checksum(frame[22:38], frame[38:54], frame[54:])
	return patch(frame, 56, byte(sum>>8), byte(sum))
}

func TestReplyRefuses(t *testing.T) {
	r := newResponder(t, config)
	for _, c := range unanswered {
		got, err := r.Reply(c.request, []byte("dst"))
		if !errors.Is(err, c.want) || string(got) != "dst" {
			t.Errorf("%s: Reply = %q, %v; want dst alone, %v", c.name, got, err, c.want)
		}
	}
}

func TestReplyAppends(t *testing.T) {
	r := newResponder(t, config)
	b, err := r.Reply(answered[0].request, []byte("virtio"))
	if err != nil || !bytes.HasPrefix(b, []byte("virtio")) || len(b) != 6+60 {
		t.Errorf("Reply = %x, %v; want 60 bytes behind what was there", b, err)
	}
}

func TestOneIPVersion(t *testing.T) {
	four, six := config, config
	four.VIP6, six.VIP4 = netip.Addr{}, netip.Addr{}
	for name, c := range map[string]struct {
		cfg     Config
		request []byte
	}{"IPv4 alone": {four, answered[4].request}, "IPv6 alone": {six, answered[0].request}} {
		r := newResponder(t, c.cfg)
		if _, err := r.Reply(c.request, nil); !errors.Is(err, ErrNotRequest) {
			t.Errorf("%s: %v; want %v", name, err, ErrNotRequest)
		}
		if a, err := r.Announcements(); err != nil || len(a) != 1 {
			t.Errorf("%s: %d announcements, %v; want 1", name, len(a), err)
		}
	}
}

func TestNewRefuses(t *testing.T) {
	for name, change := range map[string]func(*Config){
		"no clone MAC":    func(c *Config) { c.CloneMAC = [6]byte{} },
		"group clone MAC": func(c *Config) { c.CloneMAC[0] = 1 },
		"no wire MAC":     func(c *Config) { c.WireMAC = [6]byte{} },
		"same MAC":        func(c *Config) { c.WireMAC = c.CloneMAC },
		"no VIP":          func(c *Config) { c.VIP4, c.VIP6 = netip.Addr{}, netip.Addr{} },
		"IPv6 as IPv4":    func(c *Config) { c.VIP4 = vip6 },
		"IPv4 as IPv6":    func(c *Config) { c.VIP6 = vip4 },
	} {
		cfg := config
		change(&cfg)
		if _, err := New(cfg); err == nil {
			t.Errorf("%s: New succeeded", name)
		}
	}
}

// FuzzReply: no input panics, makes a frame that breaks I2, or is answered
// against the filter's verdict or left unanswered against it.
func FuzzReply(f *testing.F) {
	for _, c := range answered {
		f.Add(c.request)
	}
	for _, c := range unanswered {
		f.Add(c.request)
	}
	r := newResponder(f, config)
	mine, err := filter.New(filter.Config{CloneMAC: cloneMAC, VIP4: vip4, VIP6: vip6})
	if err != nil {
		f.Fatal(err)
	}
	var table filter.Table
	for b := range table {
		table[b] = filter.Settled
	}
	mine.SetTable(&table, 0)
	f.Fuzz(func(t *testing.T, request []byte) {
		verdict := mine.Ingress(request, 0, nil)
		b, err := r.Reply(request, nil)
		if err != nil {
			if !errors.Is(err, ErrMalformed) && !errors.Is(err, ErrNotRequest) {
				t.Fatalf("%v wraps neither sentinel", err)
			}
			plain := len(request) > 13 && len(request) <= 1518 && request[12] != 0x81 && request[12] != 0x88
			if verdict == filter.AnswerNeighbor && plain && !strings.Contains(err.Error(), "checksum") {
				t.Fatalf("filter: %v; but %v", verdict, err)
			}
			return
		}
		if len(b) != 60 && len(b) != 86 || !bytes.Equal(b[6:12], wireMAC[:]) {
			t.Fatalf("answer % x", b)
		}
		payload := b[14+8 : 14+14]
		if len(b) == 86 {
			payload = b[80:]
		} else if b[0]&1 != 0 {
			t.Fatalf("ARP answer to a group: % x", b)
		}
		if !bytes.Equal(payload, cloneMAC[:]) || bytes.Equal(b[:6], cloneMAC[:]) {
			t.Fatalf("answer % x", b)
		}
		if v := mine.Ingress(b, 0, nil); v.Accept() || v == filter.AnswerNeighbor {
			t.Fatalf("another node's filter says %v of the answer % x", v, b)
		}
	})
}

func BenchmarkReply(b *testing.B) {
	r := newResponder(b, config)
	buf := make([]byte, 0, 128)
	for _, c := range []int{0, 4} {
		b.Run(strings.ReplaceAll(answered[c].name, " ", "-"), func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if _, err := r.Reply(answered[c].request, buf); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
