package filter

import (
	"encoding/binary"
	"math/bits"
	"sync/atomic"
	"time"
)

// Offered counts what clients send, by bucket, whoever it belongs to: each node sees
// all of it. It is about the ports of the VIP that are not disabled.
type Offered struct {
	Frames [Buckets]uint64 // segments and datagrams
	SYNs   [Buckets]uint64 // to ports that have a Rule, which are those of services
	Again  [Buckets]uint64 // of these, SYNs that were sent before: nobody has answered
}

// An Asker is a client that has sent a SYN again.
type Asker struct {
	Bucket int
	Ago    time.Duration
}

// The sketch of SYNs that came lately: for each of SYNSlots the low half of a number
// made of addresses, ports and sequence number, and a time in milliseconds. Where two
// share an entry, the former is forgotten. And for each of AskerSlots what client sent a
// SYN again last: 22 bits of its hash, the bucket, and the time.
const (
	SYNSlots   = 1 << SYNBits
	AskerSlots = 1 << AskerBits
	SYNBits    = 14
	AskerBits  = 8

	// AgainLeast is how many milliseconds after the former a SYN comes that its client
	// sends again; sooner it is a copy that the network made. RFC 6298 says a second,
	// and some wait less.
	AgainLeast = 150
	// AgainMost is the longest time between two of them: Linux waits 1, 2, 4, … 32 s.
	AgainMost = 40_000
)

// offered is the counters and the sketch, apart from those of verdicts.
type offered struct {
	frames, syns, again [Buckets]atomic.Uint64
	seen                [SYNSlots]atomic.Uint64
	askers              [AskerSlots]atomic.Uint64
}

// synNumber tells SYNs apart that are not the same. What it gives may be guessed: who
// wants to be counted can send a SYN again as well.
func synNumber(p *packet) uint64 {
	const odd1, odd2 = 0x9e3779b97f4a7c15, 0xff51afd7ed558ccd
	// The words are what the BPF filter finds where they lie.
	x := bits.ReverseBytes64(p.src.lo<<32 | p.dst.lo&0xffffffff)
	if p.v6 {
		x = bits.ReverseBytes64(p.src.hi) ^ bits.ReverseBytes64(p.src.lo)*odd2
	}
	ports := uint64(bits.ReverseBytes16(p.srcPort)) | uint64(bits.ReverseBytes16(p.dstPort))<<16
	sequence := uint64(binary.LittleEndian.Uint32(p.payload[4:]))
	x = x*odd1 ^ (sequence<<32 | ports)
	x = (x ^ x>>29) * odd2
	return x ^ x>>32
}

// offer counts a segment or datagram to a port of which is is known.
func (f *Filter) offer(o *offered, p *packet, is uint8, bucket int, now int64) {
	o.frames[bucket].Add(1)
	if p.kind != kindSYN || is&PortRuled == 0 {
		return
	}
	o.syns[bucket].Add(1)
	x, ms := synNumber(p), uint32(now/1e6)
	e, tag := &o.seen[x>>(64-SYNBits)], uint32(x)
	if was := e.Load(); uint32(was>>32) == tag && ms-uint32(was) < AgainMost {
		if ms-uint32(was) < AgainLeast {
			return
		}
		o.again[bucket].Add(1)
		client := f.clientHash(p.src, p.dst)
		o.askers[client>>(64-AskerBits)].Store((client&(1<<22-1)<<10|uint64(bucket))<<32 | uint64(ms))
	}
	e.Store(uint64(tag)<<32 | uint64(ms))
}

// Offered gives what was offered until now.
func (f *Filter) Offered() *Offered {
	o := new(Offered)
	for b := range Buckets {
		o.Frames[b], o.SYNs[b], o.Again[b] = f.offered.frames[b].Load(), f.offered.syns[b].Load(), f.offered.again[b].Load()
	}
	return o
}

// Askers gives the clients that have sent a SYN again in the last minute, the latest of
// those that share an entry.
func (f *Filter) Askers(nowMono int64) []Asker {
	var entries [AskerSlots]uint64
	for i := range entries {
		entries[i] = f.offered.askers[i].Load()
	}
	return ReadAskers(&entries, nowMono)
}

// ReadAskers reads the entries of a sketch.
func ReadAskers(entries *[AskerSlots]uint64, nowMono int64) (all []Asker) {
	for _, e := range entries {
		ago := time.Duration(uint32(nowMono/1e6)-uint32(e)) * time.Millisecond
		if e != 0 && ago < time.Minute {
			all = append(all, Asker{Bucket: int(e >> 32 % Buckets), Ago: ago})
		}
	}
	return all
}
