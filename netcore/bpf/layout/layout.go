// Package layout is what Go and the BPF programs share: numbers and the fields of
// the map that both write.
package layout

import "clonecluster/netcore/filter"

// A Constant is one number with its name in C.
type Constant struct {
	Name  string
	Value uint64
}

// Constants are the numbers of constants.h.
func Constants() []Constant {
	return []Constant{
		{"BUCKETS", filter.Buckets},
		{"AFFINITY_NONE", uint64(filter.AffinityNone)}, {"AFFINITY_CLIENT", uint64(filter.AffinityClient)},
		{"AFFINITY_NETWORK", uint64(filter.AffinityNetwork)}, {"AFFINITY_SINGLE", uint64(filter.AffinitySingle)},
		{"KEY_LENGTH4", filter.KeyLength4}, {"KEY_LENGTH6", filter.KeyLength6},
		{"PORT_AFFINITY", filter.PortAffinity}, {"PORT_DISABLED", filter.PortDisabled}, {"PORT_LOCAL", filter.PortLocal}, {"PORT_RULED", filter.PortRuled},
		{"QUARANTINE", uint64(filter.Quarantine)}, {"HOLD_TCP", uint64(filter.HoldTCP)},
		{"HOLD_DATAGRAM", uint64(filter.HoldDatagram)}, {"HOLD_SLACK", uint64(filter.HoldSlack)},
		{"RESETS", filter.ResetSlots}, {"RESETS_FORGET", filter.ResetsForget},
		{"SYN_BITS", filter.SYNBits}, {"ASKER_BITS", filter.AskerBits}, {"AGAIN_LEAST", filter.AgainLeast}, {"AGAIN_MOST", filter.AgainMost},
		{"LATE_FRAME", LateFrame}, {"LATE_BYTES", LateBytes},
		{"MAX_TAGS", filter.MaxTags}, {"MAX_EXTENSIONS", filter.MaxExtensions}, {"MAX_OPTIONS", filter.MaxOptions},
	}
}

// Shared is the value of the map "shared", which the engine writes and the
// programs read; times are in nanoseconds of CLOCK_MONOTONIC. The programs
// themselves write only what is held and the resets.
type Shared struct {
	Tables                            [2][filter.Buckets]filter.State
	Current                           uint64 // which of them is in force
	Lease                             int64
	WireMAC                           uint64 // the Ethernet source of what leaves
	Quarantine, HeldTCP, HeldDatagram [filter.Buckets]int64
	Resets                            [filter.ResetSlots]uint64
}

// Counted is the value of the map "counted", one for each processor.
type Counted struct {
	Verdicts [filter.Verdicts]uint64
	Offered  filter.Offered
}

// SYNs is the value of the map "syns", which the programs write.
type SYNs struct {
	Seen   [filter.SYNSlots]uint64
	Askers [filter.AskerSlots]uint64
}

// LateFrame is the longest RST that can wait, a power of two: Ethernet, IPv6 and TCP
// with all its options are 114 octets.
const LateFrame = 128

// LateBytes is the size of the ring of those, a power of two and of pages.
const LateBytes = 128 << 10

// Late is a RST that waits.
type Late struct {
	Len   uint32
	Frame [LateFrame]byte
}

// Ports is the value of the map "ports": what is known of a TCP port, and of a
// UDP port.
type Ports [2][65536]uint8
