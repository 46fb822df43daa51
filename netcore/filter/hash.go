package filter

import (
	"encoding/binary"
	"math/bits"
	"net/netip"
)

// KeyLength4 and KeyLength6 are the lengths of a flow key, which is what the bucket hash
// reads of an IPv4 and of an IPv6 flow, the same bytes on every datapath:
//
//	 0   4  client address    0  16  client address
//	 4   4  VIP              16  16  VIP
//	 8   2  client port      32   2  client port
//	10   2  VIP port         34   2  VIP port
//	12   1  IP protocol      36   1  IP protocol
//	13   1  affinity         37   1  affinity
//
// All of it is in the order of the wire, so that a filter in the kernel takes the words
// that SipHash wants from the packet as they lie there. The last word has room for its
// length, so IPv4 takes two words and five rounds.
//
// What an affinity leaves out is zero. AffinityNone has every field.
// AffinityClient has neither ports nor protocol, so that a client finds all
// ports with that affinity, its pings and its neighbour requests at one node.
// AffinityNetwork also clears the last byte of an IPv4 client and the last
// eight of an IPv6 one. AffinitySingle has the affinity byte alone, behind 13 zeros: one
// node for both IP versions.
//
// The key is not symmetric: it is written as a frame from the client shows it,
// and egress swaps source and destination.
const KeyLength4, KeyLength6 = 14, 38

// flowKey is a flow key as SipHash takes it: little-endian words, and the length in the
// last byte of the last one.
type flowKey struct {
	words [4]uint64
	n     int // of them, 1 or 4
	last  uint64
}

// makeFlowKey gives the key of a flow to a VIP, whose IP version is the flow's.
func makeFlowKey(a Affinity, client, vip addr, clientPort, vipPort uint16, proto uint8) flowKey {
	last := uint64(a) << 40
	switch a {
	case AffinitySingle:
		return flowKey{n: 1, last: last | KeyLength4<<56}
	case AffinityNone:
		last |= uint64(bits.ReverseBytes16(clientPort)) | uint64(bits.ReverseBytes16(vipPort))<<16 | uint64(proto)<<32
	case AffinityNetwork:
		if isMapped(vip) {
			client.lo &^= 0xff
		} else {
			client.lo = 0
		}
	}
	if isMapped(vip) {
		return flowKey{
			words: [4]uint64{bits.ReverseBytes64(client.lo<<32 | vip.lo&0xffff_ffff)}, n: 1,
			last: last | KeyLength4<<56,
		}
	}
	return flowKey{
		words: [4]uint64{
			bits.ReverseBytes64(client.hi), bits.ReverseBytes64(client.lo),
			bits.ReverseBytes64(vip.hi), bits.ReverseBytes64(vip.lo),
		}, n: 4,
		last: last | KeyLength6<<56,
	}
}

// hasher is SipHash-1-3 (Aumasson, Bernstein: "SipHash: a fast short-input
// PRF", 2012) over a flow key. One compression and three finalisation rounds
// are what hash tables open to the network use (Rust, CPython): nobody sees
// more of the output than which node answered, and SipHash-2-4 costs nearly
// twice the rounds for a margin that only a MAC needs.
type hasher struct{ k0, k1 uint64 }

func newHasher(key [16]byte) hasher {
	return hasher{binary.LittleEndian.Uint64(key[0:]), binary.LittleEndian.Uint64(key[8:])}
}

func (h hasher) bucket(k *flowKey) int { return int(h.sum(k) % Buckets) }

func (h hasher) sum(k *flowKey) uint64 {
	v0, v1, v2, v3 := h.k0^0x736f6d6570736575, h.k1^0x646f72616e646f6d, h.k0^0x6c7967656e657261, h.k1^0x7465646279746573
	for _, m := range k.words[:k.n] {
		v3 ^= m
		v0, v1, v2, v3 = sipRound(v0, v1, v2, v3)
		v0 ^= m
	}
	v3 ^= k.last
	v0, v1, v2, v3 = sipRound(v0, v1, v2, v3)
	v0 ^= k.last
	v2 ^= 0xff
	v0, v1, v2, v3 = sipRound(v0, v1, v2, v3)
	v0, v1, v2, v3 = sipRound(v0, v1, v2, v3)
	v0, v1, v2, v3 = sipRound(v0, v1, v2, v3)
	return v0 ^ v1 ^ v2 ^ v3
}

func sipRound(v0, v1, v2, v3 uint64) (uint64, uint64, uint64, uint64) {
	v0 += v1
	v1 = bits.RotateLeft64(v1, 13) ^ v0
	v0 = bits.RotateLeft64(v0, 32)
	v2 += v3
	v3 = bits.RotateLeft64(v3, 16) ^ v2
	v0 += v3
	v3 = bits.RotateLeft64(v3, 21) ^ v0
	v2 += v1
	v1 = bits.RotateLeft64(v1, 17) ^ v2
	v2 = bits.RotateLeft64(v2, 32)
	return v0, v1, v2, v3
}

// Bucket gives the bucket of a flow, 0 to Buckets-1, under the rules of the
// configuration.
func (f *Filter) Bucket(t Tuple) int {
	return f.flowBucket(addrOf(t.Client.Addr()), addrOf(t.VIP.Addr()), t.Client.Port(), t.VIP.Port(), t.Proto)
}

// ClientBucket gives the bucket of all that has no port: a client's pings and
// its ARP requests or neighbour solicitations. An unspecified address is that
// of every duplicate-address probe.
func (f *Filter) ClientBucket(client netip.Addr) int {
	a := addrOf(client)
	if isMapped(a) {
		return f.clientBucket(a, f.vip4)
	}
	return f.clientBucket(a, f.vip6)
}

func (f *Filter) flowBucket(client, vip addr, clientPort, vipPort uint16, proto uint8) int {
	a := Affinity(f.port(proto, vipPort) & PortAffinity)
	k := makeFlowKey(a, client, vip, clientPort, vipPort, proto)
	return f.hash.bucket(&k)
}

// flowHash tells flows apart, whatever the affinity of their port.
func (f *Filter) flowHash(client, vip addr, clientPort, vipPort uint16, proto uint8) uint64 {
	k := makeFlowKey(AffinityNone, client, vip, clientPort, vipPort, proto)
	return f.hash.sum(&k)
}

func (f *Filter) clientBucket(client, vip addr) int { return int(f.clientHash(client, vip) % Buckets) }

func (f *Filter) clientHash(client, vip addr) uint64 {
	k := makeFlowKey(AffinityClient, client, vip, 0, 0, 0)
	return f.hash.sum(&k)
}
