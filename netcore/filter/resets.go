package filter

import "sync/atomic"

// resets remembers, for the flows that have lately had a pure RST delayed, when
// the first was: the low half of the flow's hash and a time in milliseconds. Where
// two flows share an entry, another RST of theirs is delayed.
type resets [ResetSlots]atomic.Uint64

// ResetSlots is how many flows with a delayed RST are remembered.
const ResetSlots = 4096

// ResetsForget is how long a first RST counts, in milliseconds: longer than TCP
// waits between two retransmissions (RFC 6298: 60 s, RFC 1122: R2 100 s in all).
const ResetsForget = 120_000

// judge delays the first RST of a flow, drops those that come until that may leave,
// patience milliseconds later, and sends those after it; now is in nanoseconds.
func (r *resets) judge(flow uint64, now int64, patience uint32) Verdict {
	e := &r[flow>>52]
	tag, ms := uint32(flow), uint32(now/1e6)
	if was := e.Load(); uint32(was>>32) == tag {
		switch since := ms - uint32(was); {
		case since < patience:
			return DropRST
		case since < ResetsForget:
			return Send
		}
	}
	e.Store(uint64(tag)<<32 | uint64(ms))
	return DelayRST
}
