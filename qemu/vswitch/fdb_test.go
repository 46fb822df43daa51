package vswitch

import (
	"testing"
	"time"
)

var (
	macA      = mac{0x52, 0x54, 0, 0x77, 0, 1}
	macB      = mac{0x52, 0x54, 0, 0x77, 0, 2}
	macC      = mac{0x52, 0x54, 0, 0x77, 0, 3}
	macClone  = mac{0x02, 0xcc, 0x0a, 0x4d, 0, 0x0a}
	broadcast = mac{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}
)

// eth is a frame of the local experimental EtherType.
func eth(dst, src mac, payload string) []byte {
	f := append(append([]byte{}, dst[:]...), src[:]...)
	return append(append(f, 0x88, 0xb5), payload...)
}

func TestDecide(t *testing.T) {
	type step struct {
		after  time.Duration // since the step before
		in     int
		frame  []byte
		act    action
		out    int
		learnt learning
	}
	const age = 300 * time.Second
	for _, tt := range []struct {
		name  string
		steps []step
	}{
		{"unknown is flooded, an answer is forwarded", []step{
			{0, 0, eth(macB, macA, ""), actUnknown, 0, learntNew},
			{0, 1, eth(macA, macB, ""), actForward, 0, learntNew},
			{0, 0, eth(macB, macA, ""), actForward, 1, learntAgain},
		}},
		{"a destination is never learnt", []step{
			{0, 0, eth(macClone, macA, ""), actUnknown, 0, learntNew},
			{0, 1, eth(macClone, macB, ""), actUnknown, 0, learntNew},
			{0, 0, eth(macClone, macA, ""), actUnknown, 0, learntAgain},
		}},
		{"one frame from the clone address ends the flooding", []step{
			{0, 0, eth(macClone, macA, ""), actUnknown, 0, learntNew},
			{0, 2, eth(broadcast, macClone, ""), actBroadcast, 0, learntNew},
			{0, 0, eth(macClone, macA, ""), actForward, 2, learntAgain},
			{age - 1, 0, eth(macClone, macA, ""), actForward, 2, learntAgain},
			{1, 0, eth(macClone, macA, ""), actUnknown, 0, learntAgain},
		}},
		{"the same port is filtered", []step{
			{0, 0, eth(broadcast, macA, ""), actBroadcast, 0, learntNew},
			{0, 0, eth(macA, macB, ""), actFilter, 0, learntNew},
			{0, 0, eth(macA, macA, ""), actFilter, 0, learntAgain},
		}},
		{"a station moves", []step{
			{0, 0, eth(broadcast, macA, ""), actBroadcast, 0, learntNew},
			{0, 1, eth(broadcast, macA, ""), actBroadcast, 0, learntMove},
			{0, 2, eth(macA, macB, ""), actForward, 1, learntNew},
		}},
		{"a source refreshes its age, a destination does not", []step{
			{0, 0, eth(broadcast, macA, ""), actBroadcast, 0, learntNew},
			{age - 1, 0, eth(broadcast, macA, ""), actBroadcast, 0, learntAgain},
			{age - 1, 1, eth(macA, macB, ""), actForward, 0, learntNew},
			{1, 1, eth(macA, macB, ""), actUnknown, 0, learntAgain},
		}},
		{"an expired station is new, not moved", []step{
			{0, 0, eth(broadcast, macA, ""), actBroadcast, 0, learntNew},
			{age, 1, eth(broadcast, macA, ""), actBroadcast, 0, learntNew},
		}},
		{"reserved addresses are learnt from but not forwarded", []step{
			{0, 0, eth(mac{1, 0x80, 0xc2, 0, 0, 0}, macA, ""), actReserved, 0, learntNew},
			{0, 0, eth(mac{1, 0x80, 0xc2, 0, 0, 0x0e}, macA, ""), actReserved, 0, learntAgain},
			{0, 0, eth(mac{1, 0x80, 0xc2, 0, 0, 0x10}, macA, ""), actMulticast, 0, learntAgain},
			{0, 1, eth(macA, macB, ""), actForward, 0, learntNew},
		}},
		{"bad sources", []step{
			{0, 0, eth(macB, broadcast, ""), actBadSource, 0, learntNothing},
			{0, 0, eth(macB, mac{0x33, 0x33}, ""), actBadSource, 0, learntNothing},
			{0, 0, eth(macB, mac{}, ""), actBadSource, 0, learntNothing},
		}},
		{"runts", []step{
			{0, 0, nil, actRunt, 0, learntNothing},
			{0, 0, eth(macB, macA, "")[:13], actRunt, 0, learntNothing},
		}},
		{"a full table", []step{
			{0, 0, eth(macB, mac{0, 0, 0, 0, 0, 1}, ""), actUnknown, 0, learntNew},
			{0, 0, eth(macB, mac{0, 0, 0, 0, 0, 2}, ""), actUnknown, 0, learntNew},
			{0, 0, eth(macB, mac{0, 0, 0, 0, 0, 3}, ""), actUnknown, 0, learntNew},
			{0, 0, eth(macB, mac{0, 0, 0, 0, 0, 4}, ""), actUnknown, 0, learntFull},
			{age, 0, eth(macB, mac{0, 0, 0, 0, 0, 4}, ""), actUnknown, 0, learntNew},
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			db, now := newFDB(age, 3), time.Unix(1e9, 0)
			for i, s := range tt.steps {
				now = now.Add(s.after)
				act, out, l := db.decide(s.in, s.frame, now)
				if act != s.act || l != s.learnt || (act == actForward && out != s.out) {
					t.Fatalf("step %d: decide = action %d, port %d, learning %d; want %d, %d, %d", i, act, out, l, s.act, s.out, s.learnt)
				}
			}
		})
	}
}

func TestFlush(t *testing.T) {
	db, now := newFDB(time.Minute, 10), time.Unix(1e9, 0)
	db.decide(0, eth(broadcast, macA, ""), now)
	db.decide(1, eth(broadcast, macB, ""), now)
	db.flush(0)
	if rows := db.rows(now); len(rows) != 1 || rows[0].mac != macB {
		t.Errorf("rows after flush of port 0 = %v; want only %v", rows, macB)
	}
	db.flush(-1)
	if rows := db.rows(now); len(rows) != 0 {
		t.Errorf("rows after flush of all = %v; want none", rows)
	}
}
