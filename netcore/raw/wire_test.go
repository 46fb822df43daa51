package raw

import (
	"encoding/binary"
	"net/netip"
	"slices"
	"testing"

	"golang.org/x/net/bpf"
)

var (
	testClone = [6]byte{0x02, 0xcc, 0x0a, 0x4d, 0x00, 0x0a}
	testVIP4  = netip.MustParseAddr("10.77.0.10")
	testVIP6  = netip.MustParseAddr("fd77::10")
)

// frame builds an Ethernet frame of the given type to dst, with words set at
// offsets of the frame.
func frame(dst [6]byte, etherType uint16, at map[int][]byte) []byte {
	f := make([]byte, 60)
	copy(f, dst[:])
	copy(f[6:], []byte{0x52, 0x54, 0, 0x77, 0, 1})
	binary.BigEndian.PutUint16(f[12:], etherType)
	for off, b := range at {
		copy(f[off:], b)
	}
	return f
}

// TestAddressFilter runs the socket's filter on frames in the reference
// interpreter of x/net/bpf. The first part of the filter, which asks the kernel
// about direction and VLAN, is only tested live.
func TestAddressFilter(t *testing.T) {
	var (
		broadcast = [6]byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}
		wire      = [6]byte{0x52, 0x54, 0, 0x77, 0, 9}
		vip       = []byte{10, 77, 0, 10}
		other     = []byte{10, 77, 0, 11}
		request   = []byte{0, 1}
		reply     = []byte{0, 2}
		solicited = [6]byte{0x33, 0x33, 0xff, 0, 0, 0x10}
		elsewhere = [6]byte{0x33, 0x33, 0xff, 0, 0, 0x11}
	)
	const only4, only6, ask4, ask6 = 1, 2, 4, 8
	for _, tt := range []struct {
		name  string
		frame []byte
		takes int // by which filters; one for both VIPs takes either
	}{
		{"IPv4 to the clone MAC", frame(testClone, 0x0800, nil), only4},
		{"IPv6 to the clone MAC", frame(testClone, 0x86dd, nil), only6},
		{"ARP to the clone MAC", frame(testClone, 0x0806, nil), only4},
		{"something else to the clone MAC", frame(testClone, 0x88cc, nil), 0},
		{"tagged inside the frame", frame(testClone, 0x8100, nil), 0},
		{"IPv4 to another", frame(wire, 0x0800, nil), 0},
		{"IPv4 broadcast", frame(broadcast, 0x0800, nil), 0},
		{"ARP request for the VIP", frame(broadcast, 0x0806, map[int][]byte{20: request, 38: vip}), only4 | ask4},
		{"ARP request for another", frame(broadcast, 0x0806, map[int][]byte{20: request, 28: vip, 38: other}), 0},
		{"gratuitous ARP request", frame(broadcast, 0x0806, map[int][]byte{20: request, 28: other, 38: other}), only4},
		{"broadcast ARP reply", frame(broadcast, 0x0806, map[int][]byte{20: reply, 28: other, 38: vip[:1]}), only4},
		{"neighbour solicitation for the VIP", frame(solicited, 0x86dd, nil), only6 | ask6},
		{"neighbour solicitation for another", frame(elsewhere, 0x86dd, nil), 0},
		{"neighbour advertisement to all", frame(allNodesMAC, 0x86dd, map[int][]byte{20: {58}, 54: {136}}), only6},
		{"router advertisement to all", frame(allNodesMAC, 0x86dd, map[int][]byte{20: {58}, 54: {134}}), 0},
		{"listener query to all", frame(allNodesMAC, 0x86dd, map[int][]byte{20: {0}}), only6},
		{"UDP to all nodes", frame(allNodesMAC, 0x86dd, map[int][]byte{20: {17}}), 0},
		{"runt", frame(testClone, 0x0800, nil)[:13], 0},
		{"ARP cut off", frame(broadcast, 0x0806, map[int][]byte{20: request})[:40], 0},
		{"presence", frame([6]byte{0x03, 0xcc, 0, 0, 0x88, 0xb5}, 0x88b5, nil), 0},
		{"empty", nil, 0},
	} {
		for _, f := range []struct {
			name string
			bits int
			prog []bpf.Instruction
		}{
			{"both", only4 | only6, addressFilter(testClone, testVIP4, testVIP6)},
			{"IPv4", only4, addressFilter(testClone, testVIP4, netip.Addr{})},
			{"IPv6", only6, addressFilter(testClone, netip.Addr{}, testVIP6)},
			{"who asks for both", ask4 | ask6, askFilter(testVIP4, testVIP6)},
			{"who asks by IPv4", ask4, askFilter(testVIP4, netip.Addr{})},
			{"who asks by IPv6", ask6, askFilter(netip.Addr{}, testVIP6)},
		} {
			vm, err := bpf.NewVM(f.prog)
			if err != nil {
				t.Fatalf("%s: %v", f.name, err)
			}
			n, err := vm.Run(tt.frame)
			if err != nil {
				n = 0 // a load past the end, on which the kernel drops
			}
			if got, want := n > 0, tt.takes&f.bits != 0; got != want {
				t.Errorf("filter for %s: %s: takes it = %v; want %v", f.name, tt.name, got, want)
			}
		}
	}
	if _, err := bpf.Assemble(socketFilter(addressFilter(testClone, testVIP4, testVIP6), testVIP4, testVIP6)); err != nil {
		t.Error(err)
	}
}

func TestSolicitedNodeMAC(t *testing.T) {
	got := solicitedNodeMAC(netip.MustParseAddr("fe80::1234:5678:9abc:def0"))
	if want := [6]byte{0x33, 0x33, 0xff, 0xbc, 0xde, 0xf0}; got != want {
		t.Errorf("solicitedNodeMAC = %x; want %x", got, want)
	}
	if !slices.Equal(allNodesMAC[:], []byte{0x33, 0x33, 0, 0, 0, 1}) {
		t.Errorf("allNodesMAC = %x", allNodesMAC)
	}
}
