package simulator

import (
	"clonecluster/netcore/filter"
	"clonecluster/netcore/membership"
)

// recovery is how long after the last disturbance everything has to be as it should: a
// node that steps back since the last word of one that died was not to hear it does so
// after Dead, and then listens for up to 4/3 of that. What it then gets it asks for.
func (s *sim) recovery() int64 {
	return 7*int64(s.params.Dead)/3 + 4*s.crossing()
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
	if s.over || s.twins || !s.undisturbed() {
		return
	}
	anybody := false
	for _, n := range s.nodes {
		if n.owned > 0 && !s.accepts(n) {
			s.fail("I4", "node %d owns %d buckets and accepts nothing", n.n, n.owned)
			return
		}
		anybody = anybody || n.running
	}
	if !s.recount || !anybody {
		return
	}
	s.recount = false
	s.countOwners()
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
	for b, count := range owners {
		if count != 1 {
			s.fail("I4", "bucket %d has %d owners %.2f detection times after the last disturbance", b, count,
				float64(s.now-s.disturbedAt)/float64(s.params.Dead))
			return
		}
	}
}

// converged checks after a quiet time that all go by one map, and that who shall own
// nothing does not.
func (s *sim) converged() {
	if s.over {
		return
	}
	var running []*node
	willing := 0
	for _, n := range s.nodes {
		if n.running {
			running = append(running, n)
			if !n.drain {
				willing++
			}
		}
	}
	if len(running) == 0 {
		return
	}
	for _, n := range running {
		v := n.machine.View()
		switch {
		case v.State == membership.Listening && s.twinOf(n) != nil:
			continue
		case !v.Agreed:
			s.fail("I4", "node %d does not agree with the others: %v", n.n, n.machine)
			return
		case v.Map != running[0].machine.View().Map && s.twinOf(running[0]) == nil:
			s.fail("I4", "nodes %d and %d go by different maps", running[0].n, n.n)
			return
		case n.owned > 0 && !s.accepts(n):
			s.fail("I4", "node %d owns %d buckets and accepts nothing: %v", n.n, n.owned, n.machine)
			return
		case n.owned > 0 && n.drain && willing > 0:
			s.fail("I4", "node %d drains and still owns %d buckets", n.n, n.owned)
			return
		}
	}
	s.countOwners()
}
