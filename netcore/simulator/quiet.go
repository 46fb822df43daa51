package simulator

import (
	"slices"
	"time"

	"clonecluster/netcore/filter"
	"clonecluster/netcore/membership"
)

// recovery is how long after the last disturbance everything has to be as it should: a
// node that steps back since the last word of one that died was not to hear it does so
// after Dead, and then listens for up to 4/3 of that. What it then gets it asks for. Who
// does not get the group's frames is sent each of them with the next beacon, when it has
// said that it lacks it: to be heard anew takes one more, and so does the map after that.
func (s *sim) recovery() int64 {
	dead := int64(s.params.Dead)
	t := 7*dead/3 + 4*s.crossing()
	if slices.ContainsFunc(s.nodes, func(n *node) bool { return n.filtered }) {
		t += 2 * dead / 3
	}
	return t
}

// crossing is the longest that a frame takes.
func (s *sim) crossing() int64 { return s.minDelay + 4*s.delay }

// disturbed is called when something happens after which buckets may be without an
// owner for a while. If all has been quiet until then, the nodes must have agreed.
func (s *sim) disturbed() {
	if !s.twins && s.undisturbed() {
		s.converged()
	}
	s.disturbedAt, s.recount = s.now, true
}

// undisturbed reports whether nothing has disturbed the segment for so long that every
// bucket must have an owner.
func (s *sim) undisturbed() bool {
	if s.loss > 0 || s.cuts > 0 || s.replays > 0 || s.sleeping() {
		s.disturbedAt, s.recount = s.now, true
	}
	return s.now-s.disturbedAt > s.recovery()
}

func (s *sim) sleeping() bool {
	for _, n := range s.nodes {
		if n.paused && n.running {
			return true
		}
	}
	return false
}

// verifyOwners checks in quiet times that every bucket has one owner, which accepts new
// flows (I4).
func (s *sim) verifyOwners() {
	if s.over || s.twins || s.now <= s.handedOver || !s.undisturbed() {
		return
	}
	s.result.Quiet++
	for _, n := range s.nodes {
		if n.owned > 0 && !s.accepts(n) {
			s.fail("I4", "node %d owns %d buckets and accepts nothing", n.n, n.owned)
			return
		}
	}
	if s.recount {
		s.recount = false
		s.countOwners()
	}
}

// able reports whether a node can serve.
func (n *node) able() bool { return n.running && !n.stopping && !n.linkDown }

// wanted is how many owners each bucket must have.
func (s *sim) wanted() int {
	any, serving, well := false, false, false
	for _, n := range s.nodes {
		if n.able() {
			any = true
			serving = serving || !n.drain
			well = well || !n.drain && !n.sick
		}
	}
	if !any || s.policy.StopWhenSick && serving && !well {
		return 0
	}
	return 1
}

func (s *sim) countOwners() {
	var owners [filter.Buckets]int
	for _, n := range s.nodes {
		if !s.accepts(n) {
			continue
		}
		for b, state := range n.table {
			if state.Owned() {
				owners[b]++
			}
		}
	}
	want := s.wanted()
	for b, count := range owners {
		if count != want {
			s.fail("I4", "bucket %d has %d owners %.2f detection times after the last disturbance", b, count,
				float64(s.now-s.disturbedAt)/float64(s.params.Dead))
			return
		}
	}
}

// converged checks after a quiet time that all go by one map, that everybody has its
// share, and that nothing is left of flows that are over.
func (s *sim) converged() {
	if s.over || s.now <= s.handedOver {
		return
	}
	var first *node
	for _, n := range s.nodes {
		if !n.able() {
			continue
		}
		v := n.machine.View()
		switch {
		case v.State == membership.Listening && s.twinOf(n) != nil:
			continue
		case !v.Agreed:
			s.fail("I4", "node %d does not agree with the others: %v", n.n, n.machine)
			return
		case first != nil && v.Map != first.machine.View().Map && s.twinOf(first) == nil:
			s.fail("I4", "nodes %d and %d go by different maps", first.n, n.n)
			return
		case n.owned > 0 && !s.accepts(n):
			s.fail("I4", "node %d owns %d buckets and accepts nothing: %v", n.n, n.owned, n.machine)
			return
		case first != nil && n.settings != first.settings && s.twinOf(n) == nil && s.twinOf(first) == nil:
			s.fail("settings", "nodes %d and %d go by different settings: %v and %v", first.n, n.n, first.settings, n.settings)
			return
		case first == nil:
			first = n
		}
	}
	s.countOwners()
	s.verifyShares()
	s.verifyEnded()
}

// verifyShares checks that nobody has buckets who should not, and that the others have
// as many as their weights say.
func (s *sim) verifyShares() {
	owner := slices.IndexFunc(s.nodes, func(n *node) bool { return n.owned > 0 })
	if owner < 0 || s.twins {
		return
	}
	var groups [3][]*node // of those only the first that is not empty
	for _, n := range s.nodes {
		switch {
		case n.rules != s.nodes[owner].rules || !n.able():
		case n.drain:
			groups[2] = append(groups[2], n)
		case n.sick:
			groups[1] = append(groups[1], n)
		default:
			groups[0] = append(groups[0], n)
		}
	}
	var chosen []*node
	for i := 0; len(chosen) == 0; i++ {
		chosen = groups[i]
	}
	total := 0
	for _, n := range chosen {
		total += n.effective()
	}
	for _, n := range s.nodes {
		share := 0.0
		switch {
		case !slices.Contains(chosen, n):
		case s.nodes[owner].machine.View().Balance == membership.Load:
			continue
		default:
			share = filter.Buckets * float64(n.effective()) / float64(total)
		}
		if off := float64(n.owned) - share; off <= -1 || off >= 1 {
			s.fail("I4", "node %d has %d buckets, and should have %.1f", n.n, n.owned, share)
		}
	}
}

// verifyEnded checks what is left of flows that are over: where nobody else holds any,
// no bucket is Shared, and none is quarantined because of somebody who has died (I6).
func (s *sim) verifyEnded() {
	// Nodes look which flows they have and say so, and are believed, only then.
	if s.now-s.disturbedAt <= s.recovery()+int64(s.params.Dead) {
		return
	}
	// Nor where flows are spared of an engine that has not come back, for all to see.
	if slices.ContainsFunc(s.nodes, func(n *node) bool { return n.away > s.now && !(n.running && n.id == n.awayAs) }) {
		return
	}
	// Holders look once a second.
	long := int64(time.Second) + int64(s.params.Interval) + s.crossing()
	over := func(n *node, b int) bool {
		return s.now-s.ended[b] > long && !slices.ContainsFunc(s.flows, func(f *flow) bool { return f.bucket == b && f.holder != n && f.holder.running })
	}
	for _, n := range s.nodes {
		if !s.accepts(n) || s.twins {
			continue
		}
		for b, state := range n.table {
			if state == filter.Shared && s.now > s.handedOver+long && over(n, b) {
				s.fail("I6", "bucket %d of node %d is shared, though nobody else holds flows in it", b, n.n)
				return
			}
		}
		for _, o := range s.orphans {
			q := n.quarantine[o.bucket]
			if n.table[o.bucket].Owned() && slices.Contains(o.by, n) && over(n, o.bucket) &&
				n.ownedSince[o.bucket] <= o.died && q.from <= o.died && q.until > s.now {
				s.fail("I6", "node %d swallows the RST for flows in bucket %d, whose holder died %.1f ms ago", n.n, o.bucket, float64(s.now-o.died)/1e6)
				return
			}
		}
	}
	s.orphans = s.orphans[:0]
}

// effective is a node's weight, as set or configured; all have the same settings.
func (n *node) effective() int {
	if set := n.machine.Settings(); set != nil && set.Weights[n.id] != 0 {
		return int(set.Weights[n.id])
	}
	return n.weight
}

// verifySettings checks that a node's settings never go back.
func (s *sim) verifySettings(n *node) {
	if n.stranger != 0 || n.machine.Settings() == n.set {
		return
	}
	n.set = n.machine.Settings()
	now := n.set.ID()
	if now.Compare(n.settings) < 0 {
		s.fail("settings", "node %d goes back from settings %v to %v", n.n, n.settings, now)
	}
	n.settings = now
}
