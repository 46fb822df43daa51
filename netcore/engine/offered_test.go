package engine

import (
	"strings"
	"testing"
	"time"

	"clonecluster/netcore/filter"
	"clonecluster/netcore/membership"
)

// TestOffering: clients of three nodes, of which the first has buckets 0 to 9, the
// second 10 to 19, and the third, which is dead, the rest.
func TestOffering(t *testing.T) {
	ids := []membership.NodeID{{2, 0, 0, 0, 0, 1}, {2, 0, 0, 0, 0, 2}, {2, 0, 0, 0, 0, 3}}
	m := &membership.Map{Members: ids}
	for b := range m.Owner {
		m.Owner[b] = uint8(min(b/10, 2))
	}
	viewOf := func(self int) membership.View {
		v := membership.View{Owners: m}
		for i, id := range ids {
			v.Members = append(v.Members, membership.Member{Peer: membership.Peer{ID: id}, Self: i == self, Live: i != 2})
		}
		v.Self = v.Members[self].Peer
		return v
	}
	type second struct {
		anew, again uint64 // SYNs to node 2
		clients     int    // that sent some again
	}
	steady := func(s second, n int) (all []second) {
		for range n {
			all = append(all, s)
		}
		return all
	}
	for _, tt := range []struct {
		name    string
		seconds []second
		silent  bool
	}{
		{"nothing", steady(second{}, 8), false},
		{"busy", steady(second{1000, 10, 8}, 8), false},
		{"it hangs", steady(second{10, 15, 8}, 4), true},
		{"it hangs since a while", append(steady(second{100, 0, 0}, 8), steady(second{10, 20, 5}, 4)...), true},
		{"two clients behind a bad link", steady(second{4, 8, 2}, 8), false},
		{"what a dead node leaves behind", append(steady(second{100, 0, 0}, 8), second{100, 100, 9}), false},
		{"nobody asks any more", append(steady(second{10, 20, 5}, 4), steady(second{}, 12)...), false},
	} {
		for self := range 2 {
			var o offering
			var seen filter.Offered
			now, silent := time.Unix(1000, 0), false
			dropped := uint64(1000) // by the datapath, before this engine
			o.look(now, &seen, dropped, viewOf(self), nil)
			for _, s := range tt.seconds {
				now = now.Add(time.Second)
				seen.SYNs[12] += s.anew + s.again
				seen.Again[12] += s.again
				seen.Frames[12] += s.anew + s.again
				seen.Frames[500] += 3
				dropped += 2
				var askers []filter.Asker
				for i := range s.clients {
					askers = append(askers, filter.Asker{Bucket: 10 + i})
				}
				askers = append(askers, filter.Asker{Bucket: 12, Ago: 20 * time.Second}, filter.Asker{Bucket: 3})
				silent = o.look(now, &seen, dropped, viewOf(self), askers)
			}
			found := o.finding(membership.NodeID.String)
			if len(found) > 0 != tt.silent || silent != (tt.silent && self == 1) {
				t.Errorf("%s, as node %d sees it: silent %v, %+v; want %v", tt.name, self+1, silent, found, tt.silent)
			}
			if len(found) > 0 {
				if who := map[int]string{0: ids[1].String(), 1: "this node"}[self]; !strings.Contains(found[0].What, who+" does not answer") {
					t.Errorf("%s, as node %d sees it: %s; want that it is %s", tt.name, self+1, found[0].What, who)
				}
			}
			if r := o.rates(); r.Unowned != uint64(3*len(tt.seconds)) || r.UnownedPerSecond != 3 {
				t.Errorf("%s: for nobody %d, %v a second; want 3 a second", tt.name, r.Unowned, r.UnownedPerSecond)
			}
			if r := o.rates(); r.Leaseless != uint64(2*len(tt.seconds)) || r.LeaselessPerSecond != 2 {
				t.Errorf("%s: dropped without a lease %d, %v a second; want 2 a second", tt.name, r.Leaseless, r.LeaselessPerSecond)
			}
		}
		// The third of three does not say what the first does.
		if !reports(viewOf(0), ids[1]) || reports(viewOf(1), ids[2]) || !reports(viewOf(1), ids[0]) {
			t.Error("it is not the lowest of the others that reports")
		}
	}
}

// TestOfferedWhileOwnersChange: a frame is for nobody if its bucket had no live owner when
// it came, also when one was there at the next look, and the other way round.
func TestOfferedWhileOwnersChange(t *testing.T) {
	id := membership.NodeID{2, 0, 0, 0, 0, 1}
	view := func(live bool) membership.View {
		return membership.View{Owners: &membership.Map{Members: []membership.NodeID{id}}, Members: []membership.Member{{Peer: membership.Peer{ID: id}, Live: live}}}
	}
	var o offering
	var seen filter.Offered
	seen.Frames[7], seen.SYNs[7] = 100, 100
	now := time.Unix(1000, 0)
	o.look(now, &seen, 0, view(true), nil)
	for _, step := range []struct {
		frames uint64 // before
		live   bool   // then
		look   bool
		want   uint64
	}{
		{10, false, false, 0}, // it dies
		{20, true, false, 20}, // it is back
		{40, true, true, 20},
		{80, false, true, 20}, // it was there until the look
		{160, true, true, 180},
	} {
		seen.Frames[7] += step.frames
		seen.SYNs[7] += step.frames
		if now = now.Add(time.Second); step.look {
			o.look(now, &seen, 0, view(step.live), nil)
		} else {
			o.count(&seen, view(step.live))
		}
		all, unowned := o.buckets()
		if unowned[7] != step.want || unowned[8] != 0 || all.Frames[7] != seen.Frames[7] {
			t.Errorf("%+v: of %d frames %d and %d were for nobody", step, all.Frames[7], unowned[7], unowned[8])
		}
		if r := o.rates(); step.look && r.Unowned != step.want {
			t.Errorf("%+v: the sum is %d", step, r.Unowned)
		}
	}
	if got := o.asked[0][id].syns; got != 50 {
		t.Errorf("in the second with a gap the node was asked %d times; want 50", got)
	}
}

// TestOfferedBefore: what a former engine saw and dropped is not this one's, whichever looks first.
func TestOfferedBefore(t *testing.T) {
	var o offering
	var seen filter.Offered
	seen.Frames[7] = 100
	o.count(&seen, membership.View{}) // another view, before the first look
	o.look(time.Now(), &seen, 500, membership.View{}, nil)
	seen.Frames[7] += 3
	o.look(time.Now(), &seen, 504, membership.View{}, nil)
	if r := o.rates(); r.Leaseless != 4 || r.Unowned != 3 {
		t.Errorf("%d frames without a lease, %d for nobody; want 4 and 3", r.Leaseless, r.Unowned)
	}
}
