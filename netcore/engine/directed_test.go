package engine

import (
	"errors"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/cilium/ebpf"

	"clonecluster/config"
	"clonecluster/netcore/membership"
	"clonecluster/netcore/raw"
)

// TestDirectedWanted: the leader says, and while the network does not flood one that cannot
// direct, or has only just started, does not end it.
func TestDirectedWanted(t *testing.T) {
	id := func(n byte) membership.NodeID { return membership.NodeID{2, 0, 0, 0, 0, n} }
	is := func(n byte, able, directed bool) mate { return mate{id(n), true, able, directed} }
	const yes, no = true, false
	for _, tt := range []struct {
		name      string
		mode      string
		leader    byte
		self      mate
		others    []mate
		bad, good time.Duration
		want      bool
		director  byte
	}{
		{"floods", "auto", 1, is(1, yes, no), []mate{is(2, yes, no)}, 0, time.Hour, no, 1},
		{"not for long enough", "auto", 1, is(1, yes, no), []mate{is(2, yes, no)}, 4 * time.Second, 0, no, 1},
		{"does not flood", "auto", 1, is(1, yes, no), []mate{is(2, yes, no)}, 5 * time.Second, 0, yes, 1},
		{"floods again, not for long enough", "auto", 1, is(1, yes, yes), []mate{is(2, yes, yes)}, 0, time.Minute, yes, 1},
		{"floods again", "auto", 1, is(1, yes, yes), []mate{is(2, yes, yes)}, 0, 2 * time.Minute, no, 1},
		{"one came that cannot", "auto", 1, is(1, yes, yes), []mate{is(2, yes, yes), is(3, no, no)}, 0, 0, yes, 1},
		{"one cannot from the start", "auto", 1, is(1, yes, no), []mate{is(2, no, no)}, 5 * time.Second, 0, yes, 1},
		{"the leader came, and cannot", "auto", 1, is(1, no, no), []mate{is(2, yes, yes), is(3, yes, yes)}, 0, 0, yes, 2},
		{"the leader came, and can", "auto", 1, is(1, yes, no), []mate{is(2, yes, yes)}, 0, 0, yes, 1},
		{"the leader that cannot, as another sees it", "auto", 1, is(3, yes, yes), []mate{is(1, no, yes), is(2, yes, yes)}, 0, 0, yes, 2},
		{"nobody can any more", "auto", 1, is(1, no, yes), []mate{is(2, no, yes)}, time.Hour, 0, no, 1},
		{"one that takes no part yet does not direct", "auto", 2, mate{id(1), no, yes, yes}, []mate{is(2, yes, yes)}, 0, 0, yes, 2},
		{"a follower that cannot", "auto", 1, is(2, no, no), []mate{is(1, yes, yes)}, 0, 0, yes, 1},
		{"the leader says no", "auto", 1, is(2, yes, yes), []mate{is(1, yes, no)}, time.Hour, 0, no, 2},
		{"the leader is not heard", "auto", 1, is(2, yes, yes), nil, 0, 0, yes, 2},
		{"asked for", "directed", 1, is(1, yes, no), []mate{is(2, yes, no)}, 0, time.Hour, yes, 1},
		{"asked for, and the leader is not heard", "directed", 1, is(2, yes, no), nil, 0, 0, yes, 2},
		{"asked for at one node, and the leader floods", "directed", 1, is(2, yes, no), []mate{is(1, yes, no)}, 0, time.Hour, no, 2},
		{"asked for, and cannot", "directed", 1, is(1, no, no), []mate{is(2, yes, yes)}, 0, 0, yes, 2},
		{"asked for, and none can", "directed", 1, is(1, no, yes), []mate{is(2, no, yes)}, 0, 0, no, 1},
		{"not at the leader, others can", "flooded", 1, is(1, no, no), []mate{is(2, yes, no)}, time.Hour, 0, yes, 1},
		{"not at the leader, others do", "flooded", 1, is(1, no, no), []mate{is(2, yes, yes)}, 0, 0, yes, 2},
		{"not anywhere", "flooded", 1, is(1, no, no), []mate{is(2, no, no)}, time.Hour, 0, no, 1},
	} {
		o := outlook{mode: tt.mode, leader: id(tt.leader), self: tt.self, others: tt.others, bad: tt.bad, good: tt.good}
		if got := o.wanted(floodedAfter); got != tt.want {
			t.Errorf("%s: directed is %v; want %v", tt.name, got, tt.want)
		}
		if got := o.director(); got != id(tt.director) {
			t.Errorf("%s: the director is %v; want %v", tt.name, got, id(tt.director))
		}
	}
}

// TestDirectedDoubt: a leader's word for the end holds when it has been said for a while.
func TestDirectedDoubt(t *testing.T) {
	self, other := membership.NodeID{2, 0, 0, 0, 0, 2}, membership.NodeID{2, 0, 0, 0, 0, 1}
	d := directing{able: true, on: true, director: self}
	now := time.Now()
	for _, step := range []struct {
		after      time.Duration
		says, want bool
	}{{0, false, true}, {2 * time.Second, false, true}, {time.Second, true, true}, {0, false, true}, {2 * time.Second, false, true}, {time.Second, false, false}} {
		now = now.Add(step.after)
		o := outlook{mode: config.ModeAuto, leader: other, self: mate{self, true, true, d.on}, others: []mate{{other, true, true, step.says}}}
		on, director := d.goes(&o, floodedAfter, now)
		if on != step.want {
			t.Errorf("%+v: directed is %v", step, on)
		}
		if on && !step.says && director != self {
			t.Errorf("%+v: the director changes to %v", step, director)
		}
	}
}

// TestDirectedFailure: what the kernel lacks is not tried again; all else is.
func TestDirectedFailure(t *testing.T) {
	var d directing
	d.fail(errors.New("no room"), time.Now())
	if d.again.IsZero() {
		t.Error("a failure of a moment is for ever")
	}
	if d.fail(fmt.Errorf("attaching: %w", ebpf.ErrNotSupported), time.Now()); !d.again.IsZero() {
		t.Error("what the kernel lacks is tried again")
	}
}

// TestDirectedTo: a node that does not, or does not yet, keep its kernel from frames gets none,
// also of what it holds; it counts as a node, from which nothing is sent on.
func TestDirectedTo(t *testing.T) {
	id := func(n byte) membership.NodeID { return membership.NodeID{2, 0, 0, 0, 0, n} }
	var held membership.Bits
	held.Set(7)
	v := membership.View{Self: membership.Peer{ID: id(1)}}
	for n := byte(1); n <= 4; n++ {
		v.Members = append(v.Members, membership.Member{Peer: membership.Peer{ID: id(n)}, Self: n == 1, Live: true, May: held})
	}
	o := outlook{self: mate{id(1), true, true, true}, others: []mate{{id(2), true, true, true}, {id(3), true, false, true}, {id(4), true, true, false}}}
	for _, everybody := range []bool{false, true} {
		to := directedTo(v, &o, takers(v, &o), id(1), everybody)
		if want := []raw.MAC{id(2), id(3), id(4)}; !slices.Equal(to.Nodes, want) {
			t.Errorf("the nodes are %v; want %v", to.Nodes, want)
		}
		if want := []raw.MAC{id(2)}; !slices.Equal(to.All, want) || !slices.Equal(to.To[7], want) {
			t.Errorf("everybody %v: frames go to %v and %v; want %v", everybody, to.All, to.To[7], want)
		}
		if !to.Answer {
			t.Error("the director does not answer")
		}
	}
	// When frames are flooded again, those who took some do so for a while, and nobody who
	// has come since, even with an old name.
	take := takers(v, &o)
	o.others[0].directed, o.others[2].directed = false, true
	if to, want := directedTo(v, &o, take, id(1), true), []raw.MAC{id(2)}; !slices.Equal(to.All, want) {
		t.Errorf("at the end frames go to %v; want %v", to.All, want)
	}
	v.Members[1].Incarnation++
	if to := directedTo(v, &o, take, id(1), true); len(to.All) > 0 {
		t.Errorf("frames go to %v, which came since", to.All)
	}
}
