package filter

import "sync/atomic"

// resets remembers, for the flows that have lately had a pure RST swallowed, when
// the first was: the low half of the flow's hash and a time in milliseconds. Where
// two flows share an entry, one waits for another retransmission.
type resets [4096]atomic.Uint64

// resetsForget is how long a first RST counts, in milliseconds: longer than TCP
// waits between two retransmissions (RFC 6298: 60 s, RFC 1122: R2 100 s in all).
const resetsForget = 120_000

// again reports whether a RST of that flow was swallowed before, at least patience
// milliseconds ago; now is in nanoseconds.
func (r *resets) again(flow uint64, now int64, patience uint32) bool {
	e := &r[flow>>52]
	tag, ms := uint32(flow), uint32(now/1e6)
	if was := e.Load(); uint32(was>>32) == tag {
		switch since := ms - uint32(was); {
		case since < patience:
			return false
		case since < resetsForget:
			return true
		}
	}
	e.Store(uint64(tag)<<32 | uint64(ms))
	return false
}
