package vswitch

import (
	"bytes"
	"net"
	"slices"
	"time"
)

// headerLen is the length of an untagged Ethernet header: the shortest thing
// that can be switched at all. Virtual NICs do not pad to 60 bytes.
const headerLen = 14

type mac [6]byte

func (m mac) String() string { return net.HardwareAddr(m[:]).String() }

// action is what the bridge does with one frame.
type action uint8

const (
	actForward   action = iota + 1 // to the port where the destination was learnt
	actFilter                      // that port is the one it came from
	actUnknown                     // flooded: unicast to an address not in the table
	actBroadcast                   // flooded: ff:ff:ff:ff:ff:ff
	actMulticast                   // flooded: another group address
	actReserved                    // dropped: 01:80:c2:00:00:00 to 0f (802.1D table 7-10)
	actRunt                        // dropped: no complete Ethernet header
	actBadSource                   // dropped: group or zero source address
)

// learning is what a frame did to the table.
type learning uint8

const (
	learntNothing learning = iota
	learntNew
	learntAgain
	learntMove
	learntFull // the table had no room
)

type fdbEntry struct {
	port    int
	learned time.Time // since when on this port
	seen    time.Time
	moves   uint64
}

// fdb is the filtering database: the whole decision of the switch, without a
// clock, a socket or a goroutine in it.
type fdb struct {
	ageing  time.Duration
	max     int
	entries map[mac]*fdbEntry
}

func newFDB(ageing time.Duration, max int) *fdb {
	return &fdb{ageing: ageing, max: max, entries: make(map[mac]*fdbEntry)}
}

// decide learns from a frame received on port in and says where it goes. out is
// meaningful for actForward only.
func (t *fdb) decide(in int, frame []byte, now time.Time) (act action, out int, l learning) {
	if len(frame) < headerLen {
		return actRunt, 0, learntNothing
	}
	dst, src := mac(frame[0:6]), mac(frame[6:12])
	if src[0]&1 != 0 || src == (mac{}) {
		return actBadSource, 0, learntNothing
	}
	l = t.learn(src, in, now)
	switch {
	case dst == mac{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}:
		return actBroadcast, 0, l
	case dst[0] == 0x01 && dst[1] == 0x80 && dst[2] == 0xc2 && dst[3] == 0 && dst[4] == 0 && dst[5] < 0x10:
		return actReserved, 0, l
	case dst[0]&1 != 0:
		return actMulticast, 0, l
	}
	e, ok := t.entries[dst]
	switch {
	case !ok || t.expired(e, now):
		return actUnknown, 0, l
	case e.port == in:
		return actFilter, 0, l
	}
	return actForward, e.port, l
}

func (t *fdb) learn(src mac, port int, now time.Time) learning {
	e, ok := t.entries[src]
	if ok && !t.expired(e, now) {
		e.seen = now
		if e.port == port {
			return learntAgain
		}
		e.port, e.learned = port, now
		e.moves++
		return learntMove
	}
	if !ok && len(t.entries) >= t.max {
		t.sweep(now)
		if len(t.entries) >= t.max {
			return learntFull
		}
	}
	t.entries[src] = &fdbEntry{port: port, learned: now, seen: now}
	return learntNew
}

func (t *fdb) expired(e *fdbEntry, now time.Time) bool { return now.Sub(e.seen) >= t.ageing }

func (t *fdb) sweep(now time.Time) {
	for m, e := range t.entries {
		if t.expired(e, now) {
			delete(t.entries, m)
		}
	}
}

// flush forgets what was learnt on a port, or everything if port is negative.
func (t *fdb) flush(port int) {
	for m, e := range t.entries {
		if port < 0 || e.port == port {
			delete(t.entries, m)
		}
	}
}

type fdbRow struct {
	mac mac
	fdbEntry
}

// rows are the entries that have not expired, by port and address.
func (t *fdb) rows(now time.Time) []fdbRow {
	rows := make([]fdbRow, 0, len(t.entries))
	for m, e := range t.entries {
		if !t.expired(e, now) {
			rows = append(rows, fdbRow{m, *e})
		}
	}
	slices.SortFunc(rows, func(a, b fdbRow) int {
		if a.port != b.port {
			return a.port - b.port
		}
		return bytes.Compare(a.mac[:], b.mac[:])
	})
	return rows
}

// arpSender gives the sender's hardware address of an ARP packet (RFC 826).
func arpSender(frame []byte) (sender mac, ok bool) {
	if len(frame) < 42 || frame[12] != 8 || frame[13] != 6 {
		return sender, false
	}
	sender = mac(frame[22:28])
	return sender, sender[0]&1 == 0 && sender != mac{}
}
