package bpf

import (
	"encoding/binary"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/cilium/ebpf"

	"clonecluster/netcore/filter"
)

const etherHeader = 14

// TestPlain is about what nearly all traffic is: segments and datagrams between clients
// and the VIP, for which the programs have a short way. Each bucket has a state, holds
// and a quarantine of its own, so that another bucket is another verdict; one header
// field in some is wrong, so that the short way must leave the frame to the long one.
func TestPlain(t *testing.T) {
	rounds := 4_000
	if testing.Short() {
		rounds = 1_000
	}
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 0))
	seen := map[filter.Verdict]int{}
	for _, c := range []struct {
		says   asked
		change func(*filter.Config)
	}{
		{askNobody, func(*filter.Config) {}},
		{sayNone, func(c *filter.Config) { c.VIP4 = netip.Addr{} }},
		{sayListener, func(c *filter.Config) { c.VIP6 = netip.Addr{} }},
		{sayEstablished, func(c *filter.Config) { c.Default, c.ResetPatience = filter.AffinityNetwork, time.Second }},
		{sayListener, func(c *filter.Config) { c.MaxFrame = 100 }},
	} {
		cfg := testConfig(false)
		for _, proto := range []uint8{filter.ProtoTCP, filter.ProtoUDP} {
			for port, a := range map[uint16]filter.Affinity{81: filter.AffinityClient, 82: filter.AffinityNetwork, 83: filter.AffinitySingle} {
				cfg.Rules = append(cfg.Rules, filter.Rule{Proto: proto, PortLo: port, PortHi: port, Affinity: a})
			}
		}
		c.change(&cfg)
		w := newTwins(t, cfg, c.says)
		for i := range rounds {
			if i%100 == 0 {
				if err := w.scatter(r); err != nil {
					t.Fatal(err)
				}
			}
			out := r.IntN(4) == 0
			frame := plainFrame(r, cfg.CloneMAC, out)
			v, err := w.compare(frame, out)
			if err != nil {
				t.Fatalf("round %d, seed %d, %+v, sockets %d: %v: % x", i, seed, cfg, c.says, err, frame[:min(len(frame), 100)])
			}
			seen[v]++
		}
	}
	for _, v := range []filter.Verdict{
		filter.AcceptNew, filter.AcceptFlow, filter.AcceptTransit, filter.AcceptOwn, filter.DropForeign, filter.DropDraining,
		filter.DropLease, filter.DropNoSocket, filter.DropNotOurs, filter.DropOversized, filter.DropMalformed, filter.DropSpoofed,
		filter.DropDisabled, filter.Send, filter.SendOpen, filter.DropRST, filter.DelayRST,
	} {
		if seen[v] == 0 {
			t.Errorf("no frame was %v", v)
		}
	}
	t.Log(seen)
}

// TestPlainIsShort: a plain frame takes the short way. Nothing but its time would tell if
// it did not: a tagged one goes the long way, and takes twice as long.
func TestPlainIsShort(t *testing.T) {
	w := newTwins(t, testConfig(false), askNobody)
	if err := w.set(filter.Settled, false, false); err != nil {
		t.Fatal(err)
	}
	for _, v := range vectors(t) {
		if v.out || v.name != "ACK" || v.state != filter.Settled {
			continue
		}
		tagged := slices.Insert(slices.Clone(v.frame), 12, 0x81, 0x00, 0xe0, 0x00)
		for name, program := range map[string]*ebpf.Program{"XDP": w.kernel.objects.IngressXdp, "tc": w.kernel.objects.IngressTc} {
			short, long := time.Hour, time.Hour
			for range 20 {
				short, long = min(short, run(t, program, v.frame)), min(long, run(t, program, tagged))
			}
			if short > long*3/4 {
				t.Errorf("%s takes %v for % x; want much less than the %v with a tag", name, short, v.frame, long)
			}
		}
	}
}

// scatter gives each bucket a state, holds and a quarantine, and the node a lease, by chance.
func (t *twins) scatter(r *rand.Rand) error {
	if err := t.set(filter.Foreign, false, false); err != nil {
		return err
	}
	// Quarantines that began with the first table are over, those of the second not.
	for _, since := range []int64{testNow - filter.Quarantine, testNow - filter.Quarantine + 1} {
		var table filter.Table
		for b := range table {
			table[b] = filter.State(r.IntN(4))
		}
		t.user.SetTable(&table, since)
		t.kernel.SetTable(&table, since)
	}
	lease := []int64{0, testNow, testNow + 1, testNow + 1}[r.IntN(4)]
	t.user.SetLease(lease)
	t.kernel.SetLease(lease)
	for b := range filter.Buckets {
		since := testNow - []int64{0, filter.HoldDatagram - 1, filter.HoldDatagram, filter.HoldTCP - 1, filter.HoldTCP}[r.IntN(5)]
		if r.IntN(2) == 0 {
			continue
		}
		t.user.HoldAll(b, since)
		t.kernel.shared.HeldTCP[b] = since + filter.HoldTCP
		t.kernel.shared.HeldDatagram[b] = since + filter.HoldDatagram
	}
	return nil
}

// plainFrame gives a segment or datagram to the VIP, or from it.
func plainFrame(r *rand.Rand, clone [6]byte, out bool) []byte {
	pick := func(of ...uint16) uint16 { return of[r.IntN(len(of))] }
	v6, tcp := r.IntN(2) == 0, r.IntN(3) > 0
	client, vip := []byte{10, 77, byte(r.Uint32()), byte(r.Uint32())}, []byte{10, 77, 0, 10}
	if v6 {
		client, vip = binary.BigEndian.AppendUint64([]byte{0x20, 0x01, 0x0d, 0xb8, 0, 0, 0, byte(r.Uint32())}, r.Uint64()), []byte{0: 0xfd, 1: 0x77, 15: 0x10}
	}
	if r.IntN(20) == 0 { // no client's address, or hardly
		client[0] = []byte{0, 1, 126, 127, 128, 223, 224, 255}[r.IntN(8)]
		if r.IntN(2) == 0 {
			clear(client[:len(client)-r.IntN(5)])
		}
		if v6 && r.IntN(4) == 0 {
			copy(client, []byte{10: 0xff, 11: 0xff, 12: 10}) // mapped
		}
	}
	switch r.IntN(60) {
	case 0:
		client = vip
	case 1:
		clear(vip)
	case 2:
		vip = append([]byte(nil), vip...)
		vip[r.IntN(len(vip))] ^= 1
	}
	clientPort, vipPort := uint16(r.Uint32()), pick(80, 80, 81, 82, 83, 7, 40000, 45000, uint16(r.Uint32()))
	transport := binary.BigEndian.AppendUint16(binary.BigEndian.AppendUint16(nil, clientPort), vipPort)
	if out {
		transport = binary.BigEndian.AppendUint16(binary.BigEndian.AppendUint16(nil, vipPort), clientPort)
		client, vip = vip, client
	}
	proto, payload := byte(filter.ProtoUDP), r.IntN(40)
	if tcp {
		const fin, syn, rst, ack = 1, 2, 4, 16
		proto = filter.ProtoTCP
		flags := []byte{syn, syn, ack, ack, syn | ack, rst, rst, rst | ack, fin | ack, syn | rst, syn | fin, 0, byte(r.Uint32())}[r.IntN(13)]
		words := 5 + r.IntN(2)*r.IntN(11) // with or without options
		transport = append(transport, make([]byte, 4*words-4)...)
		transport[12], transport[13] = byte(words)<<4, flags
		if r.IntN(20) == 0 {
			transport[12] = byte(r.Uint32())
		}
	} else {
		transport = append(transport, make([]byte, 4)...)
	}
	transport = append(transport, make([]byte, payload)...)
	if r.IntN(20) == 0 {
		transport = transport[:r.IntN(len(transport))]
	}

	frame := append([]byte{0x52, 0x54, 0, 0x11, 0x22, 0x33}, clone[:]...)
	if !out {
		frame = append(append([]byte(nil), clone[:]...), 0x52, 0x54, 0, 0x11, 0x22, 0x33)
	}
	switch r.IntN(60) {
	case 0:
		frame[r.IntN(12)] ^= 1 << r.IntN(8)
	case 1:
		clear(frame[6:12])
	case 2:
		copy(frame[6:12], clone[:])
	}
	length := len(transport)
	if r.IntN(20) == 0 {
		length = max(0, length+r.IntN(5)-2)
	}
	if v6 {
		ip := make([]byte, 40)
		ip[0], ip[6], ip[7] = 0x60|byte(r.IntN(16)), proto, 64
		binary.BigEndian.PutUint16(ip[4:], uint16(length))
		copy(ip[8:], client)
		copy(ip[24:], vip)
		frame = append(append(frame, 0x86, 0xdd), ip...)
	} else {
		ip := make([]byte, 20)
		ip[0], ip[8], ip[9] = 0x45, 64, proto
		binary.BigEndian.PutUint16(ip[2:], uint16(length+20))
		copy(ip[12:], client)
		copy(ip[16:], vip)
		binary.BigEndian.PutUint16(ip[6:], pick(0, 0x4000, 0x4000, 0x4000, 0x4000, 0x4000, 0x4000, 0x2000, 1<<r.IntN(16)))
		frame = append(append(frame, 0x08, 0x00), ip...)
	}
	if r.IntN(30) == 0 {
		frame[etherHeader] ^= 1 << r.IntN(8)
	}
	if r.IntN(60) == 0 {
		frame[12+r.IntN(2)] ^= 1 << r.IntN(8)
	}
	frame = append(frame, transport...)
	if r.IntN(2) == 0 { // padded, as short frames are on the wire
		frame = append(frame, make([]byte, max(0, 60-len(frame)))...)
	}
	if r.IntN(100) == 0 { // in more than one buffer
		frame = append(frame, make([]byte, 6000)...)
	}
	return frame
}
