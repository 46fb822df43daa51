package bpf

import (
	"bytes"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"net/netip"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"

	"clonecluster/netcore/filter"
	"clonecluster/netcore/neigh"
)

// director is who directs in these tests.
var director = [6]byte{0x52, 0x54, 0, 0xff, 0xfe, 0xfd}

// loadDirection gives the programs of directed mode, attached to nothing.
func loadDirection(t *testing.T, cfg filter.Config) directedObjects {
	t.Helper()
	d := &direction{director: director}
	if err := load(t, Options{Filter: cfg}).loadDirected(d); err != nil {
		t.Fatalf("%+v", err)
	}
	t.Cleanup(func() {
		if err := d.objects.Close(); err != nil {
			t.Error(err)
		}
	})
	return d.objects
}

const actUnspec, actShot = 1<<32 - 1, 2

func runTC(t *testing.T, program *ebpf.Program, frame []byte) (verdict uint32, out []byte) {
	t.Helper()
	out = make([]byte, len(frame)+256)
	opt := &ebpf.RunOptions{Data: frame, DataOut: out}
	verdict, err := program.Run(opt)
	if err != nil {
		t.Fatalf("running %v on\n%x: %v", program, frame, err)
	}
	return verdict, opt.DataOut
}

// TestDirectedIn: of what comes to the wire MAC, all that filter.Route would hand on is
// judged as if it had come to the clone MAC, and who asks for the VIP is not heard by the kernel.
func TestDirectedIn(t *testing.T) {
	cfg := testConfig(false)
	route, err := filter.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	in := loadDirection(t, cfg).DirectedIn
	r := rand.New(rand.NewPCG(4, 2))
	all, seen := vectors(t), map[string]int{}
	for n := range 40 * len(all) {
		v := all[n%len(all)]
		frame := bytes.Clone(v.frame)
		if n >= len(all) {
			frame = mutate(r, frame, all[r.IntN(len(all))].frame)
		}
		if len(frame) < shortest(frame) || len(frame) < 14 || frame[12] == 0x81 || frame[12] == 0x88 { // the kernel takes tags off before
			continue
		}
		group := frame[0]&1 != 0
		if !group {
			clear(frame[:6]) // the address of lo, on which programs are run
		}
		_, asked := route.Route(frame)
		verdict, out := runTC(t, in, frame)
		toClone := bytes.Equal(out[:6], cfg.CloneMAC[:])
		if !bytes.Equal(out[6:], frame[6:]) || !toClone && !bytes.Equal(out[:6], frame[:6]) {
			t.Fatalf("%s: became\n%x, from\n%x", v.name, out, frame)
		}
		ok, what := true, "nothing"
		switch asked {
		case filter.AskBucket, filter.AskEveryone:
			what = "handed on"
			ok = verdict == actUnspec && toClone == !group
		case filter.AskNeighbor:
			what = "asks"
			// Behind extension headers it is the kernel that answers, and directed_out names the director.
			ok = verdict == actShot || frame[20] != 58 && frame[12] == 0x86
		default:
			ok = verdict == actUnspec || verdict == actShot && group
		}
		seen[what]++
		if !ok && asked == filter.AskNothing && verdict == actShot {
			ok = true // a request that is not valid, which nobody answers
		}
		if !ok {
			t.Fatalf("%s, %s: verdict %d, to the clone MAC %v:\n%x", v.name, what, int32(verdict), toClone, frame)
		}
	}
	t.Log(seen)
	for _, what := range []string{"handed on", "asks", "nothing"} {
		if seen[what] < 20 {
			t.Errorf("of %q there were %d", what, seen[what])
		}
	}
}

// TestDirectedOut: what clone0 says of the VIP's address becomes what neigh.Redirect
// makes of it, and nothing else changes.
func TestDirectedOut(t *testing.T) {
	cfg := testConfig(false)
	out := loadDirection(t, cfg).DirectedOut
	r, err := neigh.New(neigh.Config{CloneMAC: cfg.CloneMAC, WireMAC: [6]byte{2, 0, 0, 0, 0, 9}, VIP4: cfg.VIP4, VIP6: cfg.VIP6})
	if err != nil {
		t.Fatal(err)
	}
	changing, err := r.Announcements()
	if err != nil {
		t.Fatal(err)
	}
	changing = append(changing, solicitation(t, cfg, false), solicitation(t, cfg, true))
	for i, frame := range changing {
		want := bytes.Clone(frame)
		neigh.Redirect(want, cfg.CloneMAC, director)
		verdict, got := runTC(t, out, frame)
		if verdict != actUnspec || !bytes.Equal(got, want) || bytes.Equal(got, frame) {
			t.Errorf("frame %d: verdict %d,\n%x; want\n%x", i, int32(verdict), got, want)
		}
	}
	for _, v := range vectors(t) {
		if len(v.frame) < shortest(v.frame) || len(v.frame) < 14 {
			continue
		}
		want := bytes.Clone(v.frame)
		neigh.Redirect(want, cfg.CloneMAC, director)
		if verdict, got := runTC(t, out, v.frame); verdict != actUnspec || v.out && !bytes.Equal(got, want) || !bytes.Equal(got[:14], want[:14]) {
			t.Errorf("%s: verdict %d,\n%x; want\n%x", v.name, int32(verdict), got, want)
		}
	}
}

// solicitation asks for a neighbour, as the kernel does, with a nonce before or not.
func solicitation(t *testing.T, cfg filter.Config, nonce bool) []byte {
	t.Helper()
	ip := &layers.IPv6{Version: 6, NextHeader: layers.IPProtocolICMPv6, HopLimit: 255, SrcIP: cfg.VIP6.AsSlice(), DstIP: netip.MustParseAddr("ff02::1:ff00:1").AsSlice()}
	icmp := &layers.ICMPv6{TypeCode: layers.CreateICMPv6TypeCode(135, 0)}
	if err := icmp.SetNetworkLayerForChecksum(ip); err != nil {
		t.Fatal(err)
	}
	ask := &layers.ICMPv6NeighborSolicitation{TargetAddress: netip.MustParseAddr("fd77::1").AsSlice()}
	if nonce {
		ask.Options = append(ask.Options, layers.ICMPv6Option{Type: 14, Data: []byte{1, 2, 3, 4, 5, 6}})
	}
	ask.Options = append(ask.Options, layers.ICMPv6Option{Type: layers.ICMPv6OptSourceAddress, Data: cfg.CloneMAC[:]})
	b := gopacket.NewSerializeBuffer()
	err := gopacket.SerializeLayers(b, gopacket.SerializeOptions{FixLengths: true, ComputeChecksums: true},
		&layers.Ethernet{SrcMAC: cfg.CloneMAC[:], DstMAC: []byte{0x33, 0x33, 0xff, 0, 0, 1}, EthernetType: layers.EthernetTypeIPv6}, ip, icmp, ask)
	if err != nil {
		t.Fatal(err)
	}
	if frame := b.Bytes(); binary.BigEndian.Uint16(frame[56:]) == 0 {
		t.Fatalf("no checksum in %x", frame)
	}
	return b.Bytes()
}

// TestDirectedNeedsTCX, and says so.
func TestDirectedNeedsTCX(t *testing.T) {
	h, nic, clone := inNamespace(t)
	f := load(t, Options{Filter: testConfig(false), noTCX: true})
	if err := h.Do(func() error { return f.Direct(nic, clone, director) }); !errors.Is(err, ErrUnsupported) {
		t.Errorf("Direct without tcx: %v; want %v", err, ErrUnsupported)
	}
	if f.direction != nil || len(f.links) > 0 {
		t.Errorf("%v and %d links are left", f.direction, len(f.links))
	}
}
