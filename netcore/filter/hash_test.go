package filter

import (
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"math/bits"
	"net/netip"
	"os"
	"strconv"
	"testing"
)

// sipHash is SipHash-c-d over any bytes, word by word as the paper has it.
func sipHash(c, d int, key [16]byte, data []byte) uint64 {
	k0, k1 := binary.LittleEndian.Uint64(key[:]), binary.LittleEndian.Uint64(key[8:])
	v0, v1, v2, v3 := k0^0x736f6d6570736575, k1^0x646f72616e646f6d, k0^0x6c7967656e657261, k1^0x7465646279746573
	last := [8]byte{7: byte(len(data))}
	whole := len(data) / 8 * 8
	copy(last[:7], data[whole:])
	for i := 0; i <= whole; i += 8 {
		word := last[:]
		if i < whole {
			word = data[i : i+8]
		}
		m := binary.LittleEndian.Uint64(word)
		v3 ^= m
		for range c {
			v0, v1, v2, v3 = sipRound(v0, v1, v2, v3)
		}
		v0 ^= m
	}
	v2 ^= 0xff
	for range d {
		v0, v1, v2, v3 = sipRound(v0, v1, v2, v3)
	}
	return v0 ^ v1 ^ v2 ^ v3
}

func readJSON(t *testing.T, name string, v any) {
	t.Helper()
	b, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(b, v); err != nil {
		t.Fatalf("%s: %v", name, err)
	}
}

func parseKey(t *testing.T, s string) (key [16]byte) {
	t.Helper()
	b, err := hex.DecodeString(s)
	if err != nil || len(b) != len(key) {
		t.Fatalf("key %q: %v", s, err)
	}
	return [16]byte(b)
}

// TestSipRound checks the round function with the 64 published test vectors of
// SipHash-2-4: hashes of 0, 1, … 63 bytes 00 01 02 ….
func TestSipRound(t *testing.T) {
	var vectors struct {
		Key  string
		Sums []string
	}
	readJSON(t, "testdata/siphash24.json", &vectors)
	key := parseKey(t, vectors.Key)
	var data []byte
	for i, want := range vectors.Sums {
		if got := fmt.Sprintf("%016x", sipHash(2, 4, key, data)); got != want {
			t.Errorf("SipHash-2-4 of %d bytes = %s; want %s", i, got, want)
		}
		data = append(data, byte(i))
	}
	if len(data) != 64 {
		t.Errorf("%d vectors; want 64", len(data))
	}
	// Appendix A of the paper.
	if got := sipHash(2, 4, key, data[:15]); got != 0xa129ca6149be45e5 {
		t.Errorf("SipHash-2-4 of the paper's example = %#x", got)
	}
}

func (k *flowKey) bytes() []byte {
	var b []byte
	for _, w := range append(k.words[:k.n:k.n], k.last) {
		b = binary.LittleEndian.AppendUint64(b, w)
	}
	return b[:k.last>>56]
}

// TestBuckets checks flow keys, hashes and buckets with the vectors that every
// datapath shares. They were written by another program, whose SipHash-1-3
// agrees with CPython's.
func TestBuckets(t *testing.T) {
	var vectors struct {
		Key   string
		Cases []struct {
			Affinity   string
			Proto      uint8
			Client     netip.Addr
			ClientPort uint16 `json:"client_port"`
			VIP        netip.Addr
			VIPPort    uint16 `json:"vip_port"`
			FlowKey    string `json:"flow_key"`
			Hash       string
			Bucket     int
		}
	}
	readJSON(t, "testdata/buckets.json", &vectors)
	if len(vectors.Cases) < 100 {
		t.Fatalf("%d vectors", len(vectors.Cases))
	}
	key := parseKey(t, vectors.Key)
	affinity := map[string]Affinity{"none": AffinityNone, "client": AffinityClient, "network": AffinityNetwork, "single": AffinitySingle}
	for _, c := range vectors.Cases {
		name := fmt.Sprintf("%s %d %v:%d %v:%d", c.Affinity, c.Proto, c.Client, c.ClientPort, c.VIP, c.VIPPort)
		a := affinity[c.Affinity]
		k := makeFlowKey(a, addrOf(c.Client), addrOf(c.VIP), c.ClientPort, c.VIPPort, c.Proto)
		if got := hex.EncodeToString(k.bytes()); got != c.FlowKey {
			t.Errorf("%s: flow key %s; want %s", name, got, c.FlowKey)
		}
		want, err := strconv.ParseUint(c.Hash, 16, 64)
		if err != nil {
			t.Fatal(err)
		}
		if got := newHasher(key).sum(&k); got != want || got != sipHash(1, 3, key, k.bytes()) {
			t.Errorf("%s: hash %016x, byte by byte %016x; want %s", name, got, sipHash(1, 3, key, k.bytes()), c.Hash)
		}

		cfg := testConfig()
		cfg.HashKey = key
		cfg.Rules = []Rule{{Proto: c.Proto, PortLo: c.VIPPort, PortHi: c.VIPPort, Affinity: a}}
		f := newFilter(t, cfg, Foreign)
		if got := f.Bucket(Tuple{c.Proto, netip.AddrPortFrom(c.VIP, c.VIPPort), netip.AddrPortFrom(c.Client, c.ClientPort)}); got != c.Bucket {
			t.Errorf("%s: bucket %d; want %d", name, got, c.Bucket)
		}
		if got := f.ClientBucket(c.Client); a == AffinityClient && got != c.Bucket {
			t.Errorf("%s: client's bucket %d; want %d", name, got, c.Bucket)
		}
	}
}

func TestAffinityJoinsFlows(t *testing.T) {
	at := func(a Affinity, client string, cport, vport uint16, proto uint8, vip netip.Addr) flowKey {
		return makeFlowKey(a, addrOf(netip.MustParseAddr(client)), addrOf(vip), cport, vport, proto)
	}
	for _, c := range []struct {
		name     string
		affinity Affinity
		a, b     string
		same     bool
	}{
		{"none, one client", AffinityNone, "192.0.2.1", "192.0.2.1", false},
		{"client, one client", AffinityClient, "192.0.2.1", "192.0.2.1", true},
		{"client, two clients", AffinityClient, "192.0.2.1", "192.0.2.2", false},
		{"network, one /24", AffinityNetwork, "192.0.2.1", "192.0.2.254", true},
		{"network, two /24", AffinityNetwork, "192.0.2.1", "192.0.3.1", false},
		{"network, one /64", AffinityNetwork, "2001:db8::1", "2001:db8::ffff:1:2:3", true},
		{"network, two /64", AffinityNetwork, "2001:db8::1", "2001:db8:0:1::1", false},
		{"single", AffinitySingle, "192.0.2.1", "198.51.100.7", true},
	} {
		vip := vip4
		if c.affinity == AffinityNetwork && netip.MustParseAddr(c.a).Is6() {
			vip = vip6
		}
		if got := at(c.affinity, c.a, 1, 80, ProtoTCP, vip) == at(c.affinity, c.b, 2, 443, ProtoUDP, vip); got != c.same {
			t.Errorf("%s: same bucket for certain: %v; want %v", c.name, got, c.same)
		}
	}
	if at(AffinitySingle, "192.0.2.1", 1, 2, 6, vip4) != at(AffinitySingle, "2001:db8::1", 3, 4, 17, vip6) {
		t.Error("single: IPv4 and IPv6 differ")
	}
}

// TestBucketsAreEven is a chi-square test over flows as they come: few
// clients, ports in a row. The statistic has 1023 degrees of freedom, mean
// 1023, deviation 45; five deviations off, on fixed input, is a broken hash.
func TestBucketsAreEven(t *testing.T) {
	const perBucket = 200
	f := newFilter(t, testConfig(), Foreign)
	for name, tuple := range map[string]func(i int) Tuple{
		"ports of four IPv4 clients": func(i int) Tuple {
			return Tuple{ProtoTCP, netip.AddrPortFrom(vip4, 80), netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 77, 0, byte(i & 3)}), uint16(i>>2))}
		},
		"ports of four IPv6 clients": func(i int) Tuple {
			return Tuple{ProtoTCP, netip.AddrPortFrom(vip6, 80), netip.AddrPortFrom(netip.AddrFrom16([16]byte{0: 0xfd, 15: byte(i & 3)}), uint16(i>>2))}
		},
		"IPv4 clients in a row, one port": func(i int) Tuple {
			return Tuple{ProtoUDP, netip.AddrPortFrom(vip4, 53), netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)}), 53)}
		},
	} {
		var n [Buckets]int
		for i := range perBucket * Buckets {
			n[f.Bucket(tuple(i))]++
		}
		var chi float64
		for _, k := range n {
			d := float64(k - perBucket)
			chi += d * d / perBucket
		}
		if chi < 1023-5*45 || chi > 1023+5*45 {
			t.Errorf("%s: chi-square %.0f; want 1023 ± 225", name, chi)
		}
	}
}

// TestKeyMatters: with another key, flows fall elsewhere; that is, about one
// in 1024 stays.
func TestKeyMatters(t *testing.T) {
	cfg := testConfig()
	a := newFilter(t, cfg, Foreign)
	for bit := range 128 {
		cfg.HashKey = testKey
		cfg.HashKey[bit/8] ^= 1 << (bit % 8)
		b := newFilter(t, cfg, Foreign)
		stay, flipped := 0, 0
		for p := range uint16(512) {
			tuple := Tuple{ProtoTCP, netip.AddrPortFrom(vip4, 80), netip.AddrPortFrom(client4, p)}
			x, y := a.Bucket(tuple), b.Bucket(tuple)
			if x == y {
				stay++
			}
			flipped += bits.OnesCount(uint(x ^ y))
		}
		// 2560 of 5120 bits flip, deviation 36.
		if stay > 8 || flipped < 2560-6*36 || flipped > 2560+6*36 {
			t.Errorf("key bit %d: %d of 512 flows stay, %d of 5120 bits flip; want about 0.5 and 2560", bit, stay, flipped)
		}
	}
}

func BenchmarkBucket(b *testing.B) {
	f := newFilter(b, testConfig(), Foreign)
	client, vip := addrOf(client4), addrOf(vip4)
	n, port := 0, uint16(0)
	for b.Loop() {
		n += f.flowBucket(client, vip, port, 80, ProtoTCP)
		port++
	}
	sink = Verdict(n)
}
