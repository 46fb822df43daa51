package engine

import (
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"clonecluster/netcore/api"
	"clonecluster/netcore/filter"
	"clonecluster/netcore/finding"
	"clonecluster/netcore/membership"
)

const (
	// rateWindow is how many looks a rate is of.
	rateWindow = 5
	// askWindow is how many looks it is judged by whether a node answers.
	askWindow = 3
	// A node that does not answer: so many clients have sent their SYN again, and to
	// its buckets came at least half as many of those as of new ones. When a node dies,
	// the others inherit a second of its clients' SYNs, which is less.
	leastAskers = 3
	// suspectFor is how long a node stays suspect after it was so last.
	suspectFor = 10 * time.Second
)

// offering is what all clients of the cluster send, as this node sees it.
type offering struct {
	mu    sync.Mutex // of what follows
	total filter.Offered
	known bool // the first look is a beginning, and tells nothing
	// view is who owned what since total.
	view membership.View
	// sums are the totals at the last looks.
	sums []offeredSum
	// unowned are frames to buckets that had no live owner, nobody their sum, and leaseless
	// new ones that this node did not take though they were to its own; from the first look on.
	unowned           [filter.Buckets]uint64
	nobody, leaseless uint64
	leaselessAt       uint64 // the count of the datapath at the last look

	asking   map[membership.NodeID]askedFor   // by owner, since the last look
	asked    []map[membership.NodeID]askedFor // at the last looks
	suspects map[membership.NodeID]suspect
}

type offeredSum struct {
	at                                     time.Time
	frames, syns, again, nobody, leaseless uint64
}

// askedFor counts SYNs to the buckets of one node.
type askedFor struct{ syns, again uint64 }

// suspect is a node of which clients get no answer.
type suspect struct {
	until          time.Time
	clients        int
	again, anew    uint64
	self, reported bool
}

// count takes what was offered until now, when another view begins to hold: whose it was
// the former one says.
func (o *offering) count(seen *filter.Offered, next membership.View) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.add(seen, next)
}

// add is count with o.mu held.
func (o *offering) add(seen *filter.Offered, next membership.View) {
	if o.asking == nil {
		o.asking = map[membership.NodeID]askedFor{}
	}
	live := alive(o.view)
	for b := range filter.Buckets {
		if !o.known { // of a time before this engine
			break
		}
		owner, owned := o.view.Owner(b)
		if !owned || !live[owner] {
			n := seen.Frames[b] - o.total.Frames[b]
			o.unowned[b], o.nobody = o.unowned[b]+n, o.nobody+n
			continue
		}
		a := o.asking[owner]
		a.syns += seen.SYNs[b] - o.total.SYNs[b]
		a.again += seen.Again[b] - o.total.Again[b]
		o.asking[owner] = a
	}
	o.total, o.view, o.known = *seen, next, true
}

func alive(v membership.View) map[membership.NodeID]bool {
	live := map[membership.NodeID]bool{}
	for _, m := range v.Members {
		live[m.ID] = m.Live
	}
	return live
}

// look takes what was offered until now, and how many of these frames this node has
// dropped for want of a lease, and reports whether this node itself does not answer.
func (o *offering) look(now time.Time, seen *filter.Offered, leaseless uint64, view membership.View, askers []filter.Asker) (silent bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if len(o.sums) > 0 { // before that it is a former engine's
		o.leaseless += leaseless - o.leaselessAt
	}
	o.leaselessAt = leaseless
	o.add(seen, view)
	sum := offeredSum{at: now, nobody: o.nobody, leaseless: o.leaseless}
	for b := range filter.Buckets {
		sum.frames, sum.syns, sum.again = sum.frames+seen.Frames[b], sum.syns+seen.SYNs[b], sum.again+seen.Again[b]
	}
	o.sums = last(append(o.sums, sum), rateWindow+1)
	o.asked, o.asking = last(append(o.asked, o.asking), askWindow), nil
	return o.suspect(now, view, alive(view), askers)
}

// last gives the last n.
func last[T any](all []T, n int) []T { return all[max(0, len(all)-n):] }

func (o *offering) suspect(now time.Time, view membership.View, live map[membership.NodeID]bool, askers []filter.Asker) (silent bool) {
	clients := map[membership.NodeID]int{}
	for _, a := range askers {
		if owner, ok := view.Owner(a.Bucket); ok && a.Ago < askWindow*lookInterval {
			clients[owner]++
		}
	}
	if o.suspects == nil {
		o.suspects = map[membership.NodeID]suspect{}
	}
	for id, s := range o.suspects {
		if now.After(s.until) {
			delete(o.suspects, id)
		}
	}
	for id, n := range clients {
		var sum askedFor
		for _, a := range o.asked {
			sum.syns, sum.again = sum.syns+a[id].syns, sum.again+a[id].again
		}
		anew := sum.syns - sum.again
		if n < leastAskers || 2*sum.again < anew || !live[id] {
			continue
		}
		self := id == view.Self.ID
		silent = silent || self
		o.suspects[id] = suspect{now.Add(suspectFor), n, sum.again, anew, self, self || reports(view, id)}
	}
	return silent
}

// reports tells whether this node is the one to tell of another: of those that are
// there, the one with the lowest id.
func reports(view membership.View, of membership.NodeID) bool {
	for _, m := range view.Members { // in the order of their ids
		if m.Live && m.ID != of {
			return m.Self
		}
	}
	return false
}

// finding tells of the nodes whose clients get no answer.
func (o *offering) finding(called func(membership.NodeID) string) (found []finding.Finding) {
	o.mu.Lock()
	defer o.mu.Unlock()
	var say []string
	for id, s := range o.suspects {
		if !s.reported {
			continue
		}
		who := called(id)
		if s.self {
			who = "this node"
		}
		say = append(say, fmt.Sprintf("%s does not answer: %d clients sent their SYNs again, %d times in %v, and %d new ones; its beacons are fine",
			who, s.clients, s.again, askWindow*lookInterval, s.anew))
	}
	if len(say) == 0 {
		return nil
	}
	slices.Sort(say)
	return []finding.Finding{{
		Code: "service-not-answering", Level: finding.Critical, What: strings.Join(say, "; "),
		Fix: "look whether the service takes connections: its accept queue (ss -lt), the machine's firewall, and whether frames for the clone MAC reach that node at all",
	}}
}

// rates is what was offered, by the second, over the last looks.
func (o *offering) rates() (r api.Offered) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if len(o.sums) == 0 {
		return r
	}
	first, now := o.sums[0], o.sums[len(o.sums)-1]
	r.Frames, r.SYNs, r.SYNsAgain, r.Unowned, r.Leaseless = now.frames, now.syns, now.again, now.nobody, now.leaseless
	if span := now.at.Sub(first.at).Seconds(); span > 0 {
		rate := func(from, to uint64) float64 { return float64(to-from) / span }
		r.FramesPerSecond, r.SYNsPerSecond = rate(first.frames, now.frames), rate(first.syns, now.syns)
		r.SYNsAgainPerSecond, r.UnownedPerSecond = rate(first.again, now.again), rate(first.nobody, now.nobody)
		r.LeaselessPerSecond = rate(first.leaseless, now.leaseless)
	}
	return r
}

// buckets is what each bucket was offered until the last count, and what of that was for
// nobody.
func (o *offering) buckets() (all filter.Offered, unowned [filter.Buckets]uint64) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.total, o.unowned
}
