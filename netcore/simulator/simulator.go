// Package simulator runs many nodes' membership machines over a simulated
// segment, under schedules drawn from a seed: loss, duplication, reordering,
// delay, one-way cables, partitions, pauses, crashes, restarts, clocks that jump,
// frames recorded and played back, frames with wrong keys, other rules, weights
// and wire MACs, cables pulled out, a switch that filters multicast, and two
// machines with one address. It checks the invariants at every step. One seed is
// one schedule, always the same.
//
// What it checks:
//
//   - I3: of two nodes that hear each other no two accept new flows of a bucket, nor
//     do two of which one has been told that the other does not hear it, or sleeps.
//   - I5: while a flow's holder lives, the holder takes its segments, and no
//     other node that hears it would reset them.
//   - I6: in quiet times a bucket is Shared only if somebody else holds flows in it,
//     and the quarantine of buckets whose flows' holder has died is over.
//   - I7: a frame is taken if and only if somebody has sent it who has the key. In a
//     part of the schedules all frames are written and read, and there is a node of
//     another cluster, with another key or version, or somebody who forges frames.
//   - What is set at run time: while a node runs, its settings never go back, and when
//     nothing has disturbed the segment for a while, all have the same.
//   - I4 and convergence: when nothing has disturbed the segment for a while,
//     every bucket has one owner, at every step until the next disturbance, and all go
//     by one map. Where two machines have one address that is checked only at the end.
//
// Two nodes hear each other when each has received a beacon of the other that
// lists it within a lease, and has done so for as long as it takes to tell each
// other: what two halves of a partition did before they could know of each other
// is no fault.
package simulator

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"time"

	"clonecluster/netcore/filter"
	"clonecluster/netcore/membership"
)

// Options say what to simulate.
type Options struct {
	Seed uint64
	// Nodes is the number of machines, 2 to membership.MaxNodes. Zero: drawn from
	// the seed, 2 to 64, mostly few.
	Nodes    int
	Weakness membership.Weakness
	// Trace keeps a timeline.
	Trace bool
}

// Result is what came of a schedule.
type Result struct {
	Seed      uint64   `json:"seed"`
	Nodes     int      `json:"nodes"`
	Violation string   `json:"violation,omitempty"` // empty: all held
	Invariant string   `json:"invariant,omitempty"` // "I3" to "I7", or "settings"
	At        float64  `json:"at_seconds,omitempty"`
	Accepted  int      `json:"accepted"` // connections
	Refused   int      `json:"refused"`  // attempts that nobody took
	Steps     int      `json:"steps"`    // of machines
	Quiet     int      `json:"quiet"`    // steps at which every bucket had to have an owner
	Maps      uint64   `json:"maps"`     // made
	Frames    int      `json:"frames"`   // that were read; most schedules do without
	Forged    int      `json:"forged"`   // of those, without the key: all had to be refused
	Legend    []string `json:"legend,omitempty"`
	Timeline  []string `json:"timeline,omitempty"`
}

// Run simulates one schedule, until its end or the first violation.
func Run(o Options) Result {
	s := newSim(o)
	s.schedule()
	s.explain()
	most := 20_000 * s.result.Nodes * s.result.Nodes
	for !s.over && s.queue.len() > 0 {
		e := s.queue.pop()
		if s.now = e.at; s.result.Steps > most {
			s.fail("liveness", "the machines do not come to rest: more than %d steps", most)
		}
		s.verifyOwners() // a lease may have ended
		s.handle(e)
		s.verify()
		s.verifyOwners()
	}
	return s.result
}

type sim struct {
	o      Options
	rand   *rand.Rand
	now    int64
	end    int64
	over   bool
	queue  queue
	nodes  []*node
	params membership.Params
	// frames: what is said goes over the wire as frames.
	frames    bool
	strangers []*node
	forger    bool

	loss, duplicate float64
	minDelay, delay int64
	cut             [][]int // from, to: by how many faults
	cuts            int     // all of them
	replays         int     // under way
	disturbedAt     int64
	recount         bool // who owns what has changed
	twins           bool // two machines have one address
	policy          membership.Policy
	orders          bool // somebody sets weights and balance
	// copies: what is sent to nodes alone reaches all of them, not only those that it is
	// for. Many are sent.
	copies     bool
	renamed    int                   // how often a node got another wire MAC
	handedOver int64                 // until then a map that was made for load may be on its way
	ended      [filter.Buckets]int64 // when last a flow ended whose holder lived
	orphans    []orphan
	flows      []*flow
	records    []recorded // what an eavesdropper has kept
	grace      int64
	quietFrom  int64
	result     Result
	names      *strings.Replacer // of the timeline
	said       map[string]bool   // in it, and not to be repeated
	dirty      []*node           // whose acceptance has grown since the last check
	recheckAt  int64
	checkFlows bool
	// messy: frames are lost or clocks jump, so that what a node has not heard in
	// time may have been said.
	messy bool
	torn  bool // a cable was cut
}

type node struct {
	// away is until when others spare its flows, which restarts; 0: it does not. AwayAs
	// is its id when it said so.
	away        int64
	awayAs      membership.NodeID
	spared      []spare
	n           int
	id          membership.NodeID
	boots       uint64
	machine     *membership.Machine
	running     bool
	paused      bool
	pausedAt    int64
	offset      int64 // of its clock
	table       filter.Table
	lease       int64 // on the clock of the simulation
	owned       int
	timer       int64 // when the pending tick fires; 0: none
	next        int64
	drain, sick bool
	stopping    bool // it has been told to own nothing any more
	weight      int
	set         *membership.Settings
	settings    membership.SettingsID // of them
	rules       uint64
	former      []membership.NodeID // its wire MACs before
	// linkDown: its cable is out; saidDown: its engine knows.
	linkDown, saidDown bool
	filtered           bool // the switch keeps the group's frames from it
	quarantine         [filter.Buckets]quarantine
	ownedSince         [filter.Buckets]int64
	// received[j] is when a beacon of node j was last taken, since when they have
	// come without a gap.
	received, since []int64
	// unlisted[j] is since when beacons of node j no longer list this node, 0 if they
	// do or never did; lastAt[j] is when the last of them came.
	unlisted, lastAt []int64
	incarnation      []uint64         // of j, as last received
	listedAs         []membership.Tag // by j
	backlog          []membership.Event
	stranger         strangeness // 0: it belongs to the cluster
	codec            *membership.Codec
	assemblers       map[membership.NodeID]*membership.Assembler
}

// quarantine is when a bucket's began, and ends.
type quarantine struct{ from, until int64 }

// spare is who was told to leave the flows of an engine alone that restarts.
type spare struct {
	node  *node
	boots uint64
}

type flow struct {
	holder *node
	bucket int
}

// orphan is a flow whose holder has died.
type orphan struct {
	bucket int
	died   int64
	by     []*node // that heard the holder, and it them
}

// recorded is what somebody has said, and how that was on the wire.
type recorded struct {
	said    membership.Event
	payload any
}

func nodeID(n int) membership.NodeID {
	return membership.NodeID{0x52, 0x54, 0, 0x77, byte(n >> 8), byte(n + 1)}
}

func newSim(o Options) *sim {
	s := &sim{o: o, rand: rand.New(rand.NewPCG(o.Seed, 0x636c6f6e65)), now: int64(time.Second), said: map[string]bool{}}
	n := o.Nodes
	if n == 0 {
		switch p := s.rand.IntN(1000); {
		case p < 780:
			n = 2 + s.rand.IntN(4)
		case p < 970:
			n = 6 + s.rand.IntN(5)
		case p < 996:
			n = 11 + s.rand.IntN(14)
		default:
			n = 25 + s.rand.IntN(40)
		}
	}
	s.result = Result{Seed: o.Seed, Nodes: n}
	s.cut = make([][]int, n)
	for i := range n {
		s.cut[i] = make([]int, n)
		s.nodes = append(s.nodes, s.newNode(i))
	}
	return s
}

func (s *sim) newNode(i int) *node {
	n := s.result.Nodes
	return &node{n: i, id: nodeID(i), weight: 100, rules: 1, received: make([]int64, n), since: make([]int64, n), incarnation: make([]uint64, n),
		listedAs: make([]membership.Tag, n), unlisted: make([]int64, n), lastAt: make([]int64, n)}
}

func (s *sim) fail(invariant, format string, args ...any) {
	if s.over {
		return
	}
	s.over = true
	s.result.Invariant, s.result.Violation = invariant, fmt.Sprintf(format, args...)
	s.result.At = float64(s.now-int64(time.Second)) / 1e9
	s.trace("VIOLATION %s: %s", invariant, s.result.Violation)
	for _, n := range s.nodes {
		if n.machine != nil {
			s.trace("  node %d: running=%v paused=%v, lease ends in %.1f ms, %v", n.n, n.running, n.paused, float64(n.lease-s.now)/1e6, n.machine)
		}
	}
}

// boot starts a node's engine; its kernel may have flows from before.
func (s *sim) boot(n *node) {
	if n.running {
		return
	}
	if n.stranger == 0 {
		s.disturbed()
	}
	n.boots++
	n.running, n.paused = true, false
	n.drain, n.sick, n.stopping, n.saidDown = false, false, false, false
	n.quarantine = [filter.Buckets]quarantine{}
	n.backlog, n.timer = nil, 0
	n.spared = nil
	n.assemblers = map[membership.NodeID]*membership.Assembler{}
	incarnation := s.rand.Uint64()
	n.machine = membership.New(membership.Config{
		Self: membership.Peer{ID: n.id, Incarnation: incarnation}, Params: s.params,
		Policy: s.policy, Weight: n.weight, Rules: n.rules, Flows: s.held(n), Weakness: s.o.Weakness,
	}, s.now+n.offset)
	n.table, n.lease, n.owned = n.machine.Table(), 0, 0
	n.set, n.settings = nil, membership.SettingsID{}
	for j := range n.received {
		n.received[j], n.since[j], n.unlisted[j] = 0, 0, 0
	}
	s.trace("node %d starts", n.n)
	s.step(n, membership.Tick{})
	s.tellLink(n)
}

func (s *sim) held(n *node) (b membership.Bits) {
	for _, f := range s.flows {
		if f.holder == n {
			b.Set(f.bucket)
		}
	}
	return b
}

// crash ends the engine; the kernel and its flows stay.
func (s *sim) crash(n *node) {
	if n.running {
		s.disturbed()
		n.running, n.owned = false, 0
		s.trace("node %d: engine crashes", n.n)
	}
}

// die ends the machine and its flows.
func (s *sim) die(n *node) {
	var by []*node
	if n.running {
		s.disturbed()
		s.trace("node %d dies", n.n)
		for _, o := range s.nodes {
			if o != n && s.connected(o, n) {
				by = append(by, o)
			}
		}
	}
	n.running, n.owned = false, 0
	for _, f := range s.flows {
		if f.holder == n {
			s.orphans = append(s.orphans, orphan{f.bucket, s.now, by})
		}
	}
	s.flows = slices.DeleteFunc(s.flows, func(f *flow) bool { return f.holder == n })
}

func (s *sim) step(n *node, ev membership.Event) {
	for follow := ev; follow != nil; {
		s.result.Steps++
		local := s.now + n.offset
		a := n.machine.Step(follow, local)
		follow = nil
		s.apply(n, &a)
		for _, note := range a.Notes {
			if s.o.Trace {
				s.traceNote(n, note)
			}
			if note.What == membership.NewMap && n.stranger == 0 {
				s.result.Maps++
				if note.Why == "load" || note.Why == "weights" {
					s.handedOver, s.recount = s.now+2*s.crossing(), true
				}
			}
		}
		if a.Map != nil {
			s.sendMap(n, &a)
		}
		if a.Settings != nil {
			s.sendSettings(n, &a)
		}
		s.verifySettings(n)
		if a.Beacon != nil {
			s.sendBeacon(n, &a)
			if !n.linkDown {
				follow = membership.Sent{At: local}
			}
		}
		if a.PollFlows {
			// The look-up takes its time.
			s.queue.push(event{at: s.now + s.rand.Int64N(int64(s.params.Interval)/2), kind: evFlows, node: n, boot: n.boots,
				payload: membership.FlowsSeen{Buckets: s.held(n), Asked: local}})
		}
		n.next = a.Next - n.offset
	}
	if n.timer == 0 || n.next < n.timer {
		n.timer = max(n.next, s.now+1)
		s.queue.push(event{at: n.timer, kind: evTick, node: n, boot: n.boots})
	}
}

func (n *node) self() membership.Peer { return n.machine.Self() }

func (s *sim) apply(n *node, a *membership.Actions) {
	was := s.accepts(n)
	if a.Table != nil {
		s.install(n, a.Table)
		s.checkFlows, s.recount = true, true
		s.mark(n)
		s.traceTable(n)
	}
	for _, b := range a.EndQuarantine {
		n.quarantine[b].until = 0
	}
	n.lease = 0
	if a.Lease > 0 {
		if n.lease = a.Lease - n.offset; a.Lease > 1<<62 {
			n.lease = a.Lease
		}
	}
	if !was && s.accepts(n) {
		s.mark(n)
	}
}

// install does with a table what the filter does.
func (s *sim) install(n *node, t *filter.Table) {
	next, begin := filter.Changes(t, &n.table)
	n.owned = 0
	for b := range next {
		if next[b].Owned() {
			n.owned++
			if !n.table[b].Owned() {
				n.ownedSince[b] = s.now
			}
		}
		if begin[b] {
			n.quarantine[b] = quarantine{s.now, s.now + filter.Quarantine}
		}
	}
	n.table = next
}

func (s *sim) mark(n *node) {
	if n.stranger == 0 && !slices.Contains(s.dirty, n) {
		s.dirty = append(s.dirty, n)
	}
}

// accepts reports whether a node takes new flows in the buckets that it owns. A
// paused one does: its kernel goes on until the lease ends.
func (s *sim) accepts(n *node) bool { return n.running && n.owned > 0 && s.now < n.lease }

func (s *sim) handle(e event) {
	switch e.kind {
	case evDo:
		e.do()
		return
	case evArrive:
		s.arrive()
		return
	case evEnd:
		s.converged()
		s.over = true
		return
	case evTick:
		if e.node.timer == e.at {
			e.node.timer = 0
		}
	}
	n := e.node
	if !n.running || n.boots != e.boot {
		return
	}
	if e.kind == evDeliver {
		if e.payload = s.read(n, e.payload); e.payload == nil {
			return
		}
	}
	if n.paused { // what comes in while it sleeps waits in its socket
		if e.kind != evTick && len(n.backlog) < 256 {
			n.backlog = append(n.backlog, e.payload)
		}
		return
	}
	switch e.kind {
	case evTick:
		if n.next <= s.now {
			s.step(n, membership.Tick{})
		} else if n.timer == 0 {
			n.timer = n.next
			s.queue.push(event{at: n.timer, kind: evTick, node: n, boot: n.boots})
		}
	case evDeliver:
		if b, ok := e.payload.(membership.Received); ok && n.stranger == 0 && e.from >= 0 && e.from < len(s.nodes) {
			s.heard(n, e.from, b.Beacon)
		}
		s.step(n, e.payload)
	case evFlows:
		s.step(n, e.payload)
	}
}

// heard keeps when beacons that list the node come from whom.
func (s *sim) heard(n *node, from int, b *membership.Beacon) {
	if s.now-n.lastAt[from] > int64(s.params.Interval)*3/2 { // what it knew is long ago
		n.unlisted[from] = 0
	}
	n.lastAt[from] = s.now
	if !slices.Contains(b.Heard, n.self().Tag()) {
		if n.unlisted[from] == 0 && n.received[from]-n.since[from] > int64(s.params.Dead) && n.incarnation[from] == b.Incarnation && n.listedAs[from] == n.self().Tag() {
			n.unlisted[from] = s.now
		}
		return
	}
	n.unlisted[from] = 0
	if s.now-n.received[from] > int64(s.params.Lease) || n.incarnation[from] != b.Incarnation {
		n.since[from] = s.now
	}
	n.received[from], n.incarnation[from], n.listedAs[from] = s.now, b.Incarnation, n.self().Tag()
}

// connected reports whether two nodes hear each other, and have for long enough.
func (s *sim) connected(a, b *node) bool {
	lease := int64(s.params.Lease)
	return !a.paused && !b.paused && a.running && b.running && a.id != b.id &&
		s.now-a.received[b.n] <= lease && s.now-b.received[a.n] <= lease &&
		a.incarnation[b.n] == b.self().Incarnation && b.incarnation[a.n] == a.self().Incarnation &&
		s.now-max(a.since[b.n], b.since[a.n]) > s.grace
}

// asleep reports whether a sleeps, and b and it heard each other until then: its
// lease must have ended before b took over.
func (s *sim) asleep(a, b *node) bool {
	lease := int64(s.params.Lease)
	return !s.messy && !s.torn && a.paused && a.running && b.running && !b.paused && a.id != b.id &&
		a.pausedAt-a.received[b.n] <= lease && a.pausedAt-b.received[a.n] <= lease &&
		a.incarnation[b.n] == b.self().Incarnation && b.incarnation[a.n] == a.self().Incarnation &&
		a.pausedAt-max(a.since[b.n], b.since[a.n]) > s.grace
}

// told reports whether of two nodes that are all there are a knows that b does not
// hear it. Among more, a may know that b hears nobody, and may ignore it.
func (s *sim) told(a, b *node) bool {
	if s.messy || len(s.nodes) > 2 || a.paused || a.id == b.id || a.unlisted[b.n] == 0 || s.now-a.unlisted[b.n] <= s.grace/4 || s.now-a.lastAt[b.n] > int64(s.params.Interval)*3/2 ||
		a.incarnation[b.n] != b.self().Incarnation || !b.running || s.twinOf(a) != nil || s.twinOf(b) != nil {
		return false
	}
	return true
}

// verify checks I3 and I5 after what has just happened.
func (s *sim) verify() {
	if s.over {
		s.dirty = s.dirty[:0]
		return
	}
	if s.recheckAt != 0 && s.now >= s.recheckAt {
		s.recheckAt = 0
		s.checkFlows = true
		for _, n := range s.nodes {
			if s.accepts(n) {
				s.mark(n)
			}
		}
	}
	for _, n := range s.dirty {
		if !s.accepts(n) {
			continue
		}
		for _, o := range s.nodes {
			if o == n || !s.accepts(o) {
				continue
			}
			for b := range n.table {
				if !n.table[b].Owned() || !o.table[b].Owned() {
					continue
				}
				if s.connected(n, o) {
					s.fail("I3", "nodes %d and %d both accept new flows of bucket %d", n.n, o.n, b)
					return
				}
				if s.asleep(n, o) || s.asleep(o, n) {
					s.fail("I3", "nodes %d and %d both accept new flows of bucket %d, of which one sleeps", n.n, o.n, b)
					return
				}
				if s.told(n, o) || s.told(o, n) {
					s.fail("I3", "nodes %d and %d both accept new flows of bucket %d, though one knows that the other does not hear it", n.n, o.n, b)
					return
				}
				s.recheck()
				break
			}
		}
	}
	s.dirty = s.dirty[:0]
	if s.checkFlows {
		s.checkFlows = false
		s.verifyFlows()
	}
}

func (s *sim) recheck() {
	if s.recheckAt == 0 {
		s.recheckAt = s.now + s.grace/4 + 1
		s.queue.push(event{at: s.recheckAt, kind: evDo, do: func() {}})
	}
}

func (s *sim) verifyFlows() {
	for _, f := range s.flows {
		h := f.holder
		if s.twinOf(h) != nil {
			continue // of two machines with one address one gives up its flows
		}
		if !h.running {
			for _, by := range h.spared {
				o := by.node
				if s.now < h.away && o.boots == by.boots && s.accepts(o) && o.table[f.bucket] == filter.Settled {
					s.fail("I5", "node %d would reset the flow in bucket %d that node %d holds, which restarts", o.n, f.bucket, h.n)
					return
				}
			}
			continue
		}
		if h.table[f.bucket] == filter.Foreign && !h.paused {
			s.fail("I5", "node %d drops the flow it holds in bucket %d", h.n, f.bucket)
			return
		}
		for _, o := range s.nodes {
			if o == h || !s.accepts(o) || o.table[f.bucket] != filter.Settled {
				continue
			}
			if s.connected(o, h) {
				s.fail("I5", "node %d would reset the flow that node %d holds in bucket %d", o.n, h.n, f.bucket)
				return
			}
			s.recheck()
		}
	}
}

// arrive lets a client open a connection in a random bucket.
func (s *sim) arrive() {
	b := s.rand.IntN(filter.Buckets)
	var holder *node
	first := s.rand.IntN(len(s.nodes))
	for i := range s.nodes {
		n := s.nodes[(first+i)%len(s.nodes)]
		if s.accepts(n) && n.table[b].Owned() && !n.paused {
			holder = n
			break
		}
	}
	if holder == nil {
		s.result.Refused++
		return
	}
	s.result.Accepted++
	s.checkFlows = true
	f := &flow{holder: holder, bucket: b}
	s.flows = append(s.flows, f)
	life := int64(s.rand.ExpFloat64() * 8 * float64(s.params.Dead))
	s.queue.push(event{at: s.now + life, kind: evDo, do: func() {
		if i := slices.Index(s.flows, f); i >= 0 {
			s.flows = slices.Delete(s.flows, i, i+1)
			if f.holder.running {
				s.ended[b] = s.now
			}
		}
	}})
}

// twinOf gives another running node with the same address.
func (s *sim) twinOf(n *node) *node {
	for _, o := range s.nodes {
		if o != n && o.running && o.id == n.id {
			return o
		}
	}
	return nil
}
