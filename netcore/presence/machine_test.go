package presence

import (
	"container/heap"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"clonecluster/netcore/filter"
)

const ms = int64(time.Millisecond)

func id(n int) NodeID { return NodeID{0x52, 0x54, 0, 0x77, 0, byte(n)} }

// sim runs machines over a simulated segment: one clock, one queue of events,
// everything drawn from one seed.
type sim struct {
	tb    testing.TB
	seed  uint64
	rand  *rand.Rand
	now   int64
	queue eventQueue
	order int
	nodes []*simNode

	loss     float64
	maxDelay int64
	cut      map[[2]int]bool // from, to

	flows []*simFlow
	// ended are flows that a node may still report as held.
	ended []*simFlow
	// strict: nothing happened that the protocol cannot hide, so I3 and I5 hold
	// at every moment.
	strict            bool
	changed           bool // since the last check
	accepted, refused int
}

type simNode struct {
	n       int
	machine *Machine
	table   filter.Table
	lease   int64
	next    int64
	running bool
	paused  bool
	boots   uint64
}

// simFlow is a connection in a node's kernel; it outlives the engine.
type simFlow struct {
	holder int
	bucket int
}

type event struct {
	at    int64
	order int
	do    func()
}

type eventQueue []event

func (q eventQueue) Len() int { return len(q) }
func (q eventQueue) Less(i, j int) bool {
	return q[i].at < q[j].at || q[i].at == q[j].at && q[i].order < q[j].order
}
func (q eventQueue) Swap(i, j int) { q[i], q[j] = q[j], q[i] }
func (q *eventQueue) Push(x any)   { *q = append(*q, x.(event)) }
func (q *eventQueue) Pop() any     { old := *q; e := old[len(old)-1]; *q = old[:len(old)-1]; return e }

func newSim(tb testing.TB, seed uint64, nodes int) *sim {
	s := &sim{tb: tb, seed: seed, rand: rand.New(rand.NewPCG(seed, 1)), now: 1e9, maxDelay: 2 * ms, cut: map[[2]int]bool{}, strict: true}
	for n := range nodes {
		s.nodes = append(s.nodes, &simNode{n: n})
	}
	return s
}

func (s *sim) fatalf(format string, args ...any) {
	s.tb.Helper()
	s.tb.Fatalf("seed %d at %.3f s: %s", s.seed, float64(s.now-1e9)/1e9, fmt.Sprintf(format, args...))
}

func (s *sim) at(t int64, do func()) {
	s.order++
	heap.Push(&s.queue, event{t, s.order, do})
}

func (s *sim) boot(n int) {
	node := s.nodes[n]
	if node.running {
		return
	}
	node.boots++
	node.running, node.paused = true, false
	self := Peer{ID: id(n + 1), Incarnation: uint64(n+1)<<32 | node.boots}
	node.machine = New(self, DefaultParams(), s.held(n), s.now)
	node.table, node.lease = node.machine.table, 0
	s.step(node, Tick{})
}

func (s *sim) held(n int) (b Bits) {
	for _, f := range s.flows {
		if f.holder == n {
			b.Set(f.bucket)
		}
	}
	return b
}

// crash ends the engine; the kernel and its flows stay.
func (s *sim) crash(n int) { s.nodes[n].running = false }

// die ends the machine.
func (s *sim) die(n int) {
	s.crash(n)
	s.flows = slices.DeleteFunc(s.flows, func(f *simFlow) bool { return f.holder == n })
}

func (s *sim) step(n *simNode, ev Event) {
	for follow := []Event{ev}; len(follow) > 0; follow = follow[1:] {
		a := n.machine.Step(follow[0], s.now)
		if a.Table != nil {
			n.table = *a.Table
			s.changed = true
		}
		if n.lease <= s.now && a.Lease > s.now {
			s.changed = true
		}
		n.lease = a.Lease
		if a.Send != nil {
			s.broadcast(n.n, *a.Send)
			follow = append(follow, Sent{})
		}
		if a.PollFlows {
			// The look-up takes its time.
			s.answer(n, n.boots, Flows{s.held(n.n), s.now}, s.now+s.rand.Int64N(80*ms))
		}
		n.next = a.Next
	}
	boot := n.boots
	s.at(max(n.next, s.now+1), func() {
		if n.running && !n.paused && n.boots == boot && n.next <= s.now {
			s.step(n, Tick{})
		}
	})
}

func (s *sim) answer(n *simNode, boot uint64, flows Flows, at int64) {
	s.at(at, func() {
		switch {
		case !n.running || n.boots != boot:
		case n.paused:
			s.answer(n, boot, flows, s.now+50*ms)
		default:
			s.step(n, flows)
		}
	})
}

func (s *sim) broadcast(from int, b Beacon) {
	for to := range s.nodes {
		if to == from || s.cut[[2]int{from, to}] || s.rand.Float64() < s.loss {
			continue
		}
		s.at(s.now+1+s.rand.Int64N(s.maxDelay), func() { s.deliver(to, b) })
	}
}

func (s *sim) deliver(to int, b Beacon) {
	n := s.nodes[to]
	if !n.running {
		return
	}
	if n.paused { // what came in while it slept waits in its socket
		s.at(s.now+50*ms, func() { s.deliver(to, b) })
		return
	}
	s.step(n, Received{b})
}

func (s *sim) run(until int64) {
	for len(s.queue) > 0 && s.queue[0].at <= until {
		e := heap.Pop(&s.queue).(event)
		s.now = e.at
		e.do()
		if s.strict && s.changed {
			s.check()
			s.changed = false
		}
	}
	s.now = until
}

// owners are the nodes that would accept a new flow in bucket b now.
func (s *sim) owners(b int) (ns []int) {
	for _, n := range s.nodes {
		if n.running && n.table[b].Owned() && s.now < n.lease {
			ns = append(ns, n.n)
		}
	}
	return ns
}

// check asserts I3 and I5 in every bucket.
func (s *sim) check() {
	s.tb.Helper()
	for b := range filter.Buckets {
		if o := s.owners(b); len(o) > 1 {
			s.fatalf("I3: bucket %d has the owners %v", b, o)
		}
	}
	for _, f := range s.flows {
		h := s.nodes[f.holder]
		if !h.running {
			continue
		}
		if h.table[f.bucket] == filter.Foreign {
			s.fatalf("I5: node %d drops the flow it holds in bucket %d", f.holder, f.bucket)
		}
		for _, o := range s.nodes {
			if o != h && o.running && o.table[f.bucket] == filter.Settled {
				s.fatalf("I5: node %d would reset the flow of node %d in bucket %d", o.n, f.holder, f.bucket)
			}
		}
	}
}

// arrive lets a client open a connection in a random bucket.
func (s *sim) arrive() {
	b := s.rand.IntN(filter.Buckets)
	o := s.owners(b)
	if len(o) == 0 {
		s.refused++
		return
	}
	s.accepted++
	s.changed = true
	f := &simFlow{holder: o[0], bucket: b}
	s.flows = append(s.flows, f)
	s.at(s.now+int64(s.rand.ExpFloat64()*3e9), func() {
		s.flows = slices.DeleteFunc(s.flows, func(g *simFlow) bool { return g == f })
		s.ended = append(s.ended, f)
		s.at(s.now+1500*ms, func() { s.ended = s.ended[1:] })
	})
}

func (s *sim) clients(until int64, every int64) {
	for t := s.now; t < until; t += every {
		s.at(t+s.rand.Int64N(every), s.arrive)
	}
}

// settled asserts I4: every bucket has one owner, who shares it with nobody, or
// only with a live node that does hold flows there.
func (s *sim) settled() {
	s.tb.Helper()
	for b := range filter.Buckets {
		o := s.owners(b)
		if len(o) != 1 {
			s.fatalf("I4: bucket %d has the owners %v: %s", b, o, s.describe())
		}
		if s.nodes[o[0]].table[b] == filter.Shared && !slices.ContainsFunc(slices.Concat(s.flows, s.ended), func(f *simFlow) bool { return f.bucket == b && f.holder != o[0] }) {
			s.fatalf("bucket %d stays shared, though nobody else holds flows in it", b)
		}
	}
}

func (s *sim) describe() (d string) {
	for _, n := range s.nodes {
		if n.running {
			v := n.machine.View()
			d += fmt.Sprintf("\nnode %d %v serving=%d live=%d adopted=%v lease in %d ms", n.n, v.State, len(v.Serving), len(v.Live), v.Adopted, (n.lease-s.now)/ms)
		}
	}
	return d
}

// TestCalm: nodes join, leave, die and restart in every order, with some loss
// and delay. I3 and I5 hold at every moment and I4 after every change.
func TestCalm(t *testing.T) {
	seeds := uint64(30)
	if testing.Short() {
		seeds = 8
	}
	for seed := range seeds {
		s := newSim(t, seed, 2+int(seed%6))
		s.loss, s.maxDelay = 0.01*float64(seed%3), (1+int64(seed%20))*ms
		for n := range s.nodes {
			s.at(s.now+s.rand.Int64N(500*ms), func() { s.boot(n) })
		}
		s.run(s.now + 4e9)
		s.settled()
		for range 6 {
			s.clients(s.now+6e9, 10*ms)
			s.disturb()
			s.run(s.now + 6e9)
			s.settled()
		}
		if s.accepted < 1000 {
			t.Errorf("seed %d: %d flows accepted, %d refused", seed, s.accepted, s.refused)
		}
	}
}

// disturb does one thing, or two at the same time.
func (s *sim) disturb() {
	up := 0
	for _, n := range s.nodes {
		if n.running {
			up++
		}
	}
	for range 1 + s.rand.IntN(2) {
		n := s.rand.IntN(len(s.nodes))
		node := s.nodes[n]
		switch {
		case !node.running:
			s.boot(n)
			up++
		case up > 1 && s.rand.IntN(3) == 0:
			s.die(n)
			up--
		case up > 1 && s.rand.IntN(2) == 0:
			s.step(node, Leave{})
			// Its flows end, and then it does.
			s.at(s.now+200*ms, func() { s.die(n) })
			up--
		default:
			// An engine that crashes and is back at once.
			s.crash(n)
			s.at(s.now+1+s.rand.Int64N(300*ms), func() { s.boot(n) })
		}
	}
}

// TestStorm: partitions, one-way cables and sleeping nodes, as they come. When
// the network is whole again the cluster is, too.
func TestStorm(t *testing.T) {
	seeds := uint64(30)
	if testing.Short() {
		seeds = 8
	}
	for seed := range seeds {
		s := newSim(t, seed, 2+int(seed%7))
		s.strict, s.loss, s.maxDelay = false, 0.02, 30*ms
		for n := range s.nodes {
			s.boot(n)
		}
		for range 20 {
			s.clients(s.now+1e9, 20*ms)
			a, b := s.rand.IntN(len(s.nodes)), s.rand.IntN(len(s.nodes))
			switch s.rand.IntN(5) {
			case 0:
				s.cut[[2]int{a, b}] = true
			case 1:
				s.cut[[2]int{a, b}], s.cut[[2]int{b, a}] = true, true
			case 2:
				clear(s.cut)
			case 3:
				s.nodes[a].paused = true
				s.at(s.now+s.rand.Int64N(3e9), func() { s.wake(a) })
			case 4:
				s.crash(a)
				s.at(s.now+s.rand.Int64N(3e9), func() { s.boot(a) })
			}
			s.run(s.now + s.rand.Int64N(1500*ms))
		}
		clear(s.cut)
		s.loss = 0
		s.run(s.now + 10e9)
		s.strict = true
		s.run(s.now + 1e9)
		s.settled()
	}
}

func (s *sim) wake(n int) {
	if node := s.nodes[n]; node.paused {
		node.paused = false
		if node.running {
			s.step(node, Tick{})
		}
	}
}

// TestDeathIsNoticed: within the detection time and two frames the buckets of a
// dead node have owners, settled ones, whose kernels reset its orphans (I6).
func TestDeathIsNoticed(t *testing.T) {
	s := newSim(t, 1, 3)
	for n := range s.nodes {
		s.boot(n)
	}
	s.run(s.now + 4e9)
	s.settled()
	p := DefaultParams()
	s.die(0)
	s.run(s.now + int64(p.Dead+2*p.Interval))
	for b := range filter.Buckets {
		o := s.owners(b)
		if len(o) != 1 || s.nodes[o[0]].table[b] != filter.Settled {
			t.Fatalf("bucket %d has the owners %v", b, o)
		}
	}
}

// TestLease: a node that does not get its frames out accepts nothing new before
// the others take it for dead.
func TestLease(t *testing.T) {
	p := DefaultParams()
	m := New(Peer{ID: id(1), Incarnation: 1}, p, Bits{}, 0)
	now := int64(0)
	var a Actions
	for ; m.View().State != Serving; now += 10 * ms {
		if a = m.Step(Tick{}, now); a.Send != nil {
			a = m.Step(Sent{}, now)
		}
		if now > 5e9 {
			t.Fatal("a node alone does not serve within 5 s")
		}
	}
	lease := a.Lease
	if lease <= now {
		t.Fatalf("at %d the lease of a serving node is %d", now, lease)
	}
	// From here on no frame leaves.
	for end := now + 2e9; now < end; now += 10 * ms {
		if a = m.Step(Tick{}, now); a.Lease > lease {
			t.Fatalf("the lease went from %d to %d without a frame sent", lease, a.Lease)
		}
	}
	if p.Lease >= p.Dead {
		t.Errorf("lease %v is not shorter than the detection time %v", p.Lease, p.Dead)
	}
}

// TestSleep: a node that slept may count as dead, and has to listen again.
func TestSleep(t *testing.T) {
	for _, before := range []State{Listening, Serving} {
		m, now := New(Peer{ID: id(1), Incarnation: 1}, DefaultParams(), Bits{}, 0), int64(0)
		m.Step(Tick{}, now)
		m.Step(Sent{}, now)
		for ; m.View().State != before; now += 10 * ms {
			m.Step(Tick{}, now)
			m.Step(Sent{}, now)
		}
		now += int64(DefaultParams().Dead)
		a := m.Step(Tick{}, now)
		if a.Send != nil {
			a = m.Step(Sent{}, now)
		}
		if v := m.View(); v.State != Listening || a.Lease != 0 || owns(&m.table) {
			t.Errorf("asleep while %v: then %v, lease %d; want listening without any", before, v.State, a.Lease)
		}
	}
}

// TestNoEffect: what must not move a node does not.
func TestNoEffect(t *testing.T) {
	serve := func() (*Machine, int64) {
		m, now := New(Peer{ID: id(1), Incarnation: 1}, DefaultParams(), Bits{}, 0), int64(0)
		for ; m.View().State != Serving; now += 10 * ms {
			m.Step(Tick{}, now)
			m.Step(Sent{}, now)
		}
		return m, now
	}
	peer := Peer{ID: id(2), Incarnation: 7}
	good := Beacon{Peer: peer, Sequence: 10, State: Serving, Peers: []Peer{{ID: id(1), Incarnation: 1}}}

	t.Run("own MAC", func(t *testing.T) {
		m, now := serve()
		twin := good
		twin.ID = id(1)
		a := m.Step(Received{twin}, now)
		if len(a.Notes) != 1 || len(m.View().Live) != 0 || a.Table != nil {
			t.Errorf("notes %v, view %+v", a.Notes, m.View())
		}
	})
	t.Run("one way", func(t *testing.T) {
		m, now := serve()
		deaf := good
		deaf.Peers = []Peer{{ID: id(1), Incarnation: 99}} // my former incarnation
		if m.Step(Received{deaf}, now); len(m.View().Live) != 0 {
			t.Errorf("a peer that does not hear this node is live: %+v", m.View())
		}
	})
	t.Run("replay", func(t *testing.T) {
		m, now := serve()
		m.Step(Received{good}, now)
		if len(m.View().Serving) != 2 {
			t.Fatalf("a good peer does not count: %+v", m.View())
		}
		for now += 100 * ms; now < 60e9; now += 100 * ms {
			m.Step(Received{good}, now)
			m.Step(Sent{}, now)
		}
		if v := m.View(); len(v.Serving) != 1 || v.State != Serving {
			t.Errorf("a replayed frame keeps a dead peer alive: %+v", v)
		}
		// A new start, and then the old frames again.
		next := good
		next.Incarnation, next.Sequence = 8, 1
		m.Step(Received{next}, now)
		old := good
		old.Sequence = 1000
		a := m.Step(Received{old}, now)
		if len(a.Notes) == 0 || len(m.View().Serving) != 2 || m.View().Live[0].Incarnation != 8 {
			t.Errorf("a frame of a former incarnation: notes %v, view %+v", a.Notes, m.View())
		}
	})
	t.Run("too many", func(t *testing.T) {
		m, now := serve()
		for n := range 200 {
			b := good
			b.ID = NodeID{2, byte(n), byte(n >> 8)}
			m.Step(Received{b}, now)
		}
		if len(m.peers) > MaxPeers {
			t.Errorf("%d peers are remembered; want at most %d", len(m.peers), MaxPeers)
		}
	})
}

// TestUnheard: a node that hears others but is heard by none must own nothing:
// its kernel would reset what the others hold.
func TestUnheard(t *testing.T) {
	s := newSim(t, 3, 3)
	for n := range s.nodes {
		s.boot(n)
	}
	s.run(s.now + 4e9)
	s.strict = false
	s.cut[[2]int{0, 1}], s.cut[[2]int{0, 2}] = true, true
	s.run(s.now + 3e9)
	for b, state := range s.nodes[0].table {
		if state.Owned() {
			t.Fatalf("the unheard node is %v in bucket %d", state, b)
		}
	}
	for b := range filter.Buckets {
		if o := s.owners(b); len(o) != 1 {
			t.Fatalf("bucket %d has the owners %v", b, o)
		}
	}
}

// TestStaleFlows: what was looked up before a bucket was lost lacks the flows
// that were accepted until then.
func TestStaleFlows(t *testing.T) {
	s := newSim(t, 1, 2)
	s.boot(0)
	s.run(s.now + 4e9)
	m := s.nodes[0].machine
	asked := s.now
	s.boot(1)
	for !m.heldKnown || m.lostAt <= asked {
		s.run(s.now + ms)
		if s.now > asked+10e9 {
			t.Fatal("the first node loses no bucket to the second")
		}
		if m.lostAt > asked && !m.heldKnown {
			if m.Step(Flows{Asked: asked}, s.now); m.heldKnown {
				t.Fatal("flows looked up before the loss count as known")
			}
		}
	}
}

// TestOneWay: one of two nodes is no longer heard by the other, which takes its
// buckets. It must take none in turn, and stop accepting once it is told.
func TestOneWay(t *testing.T) {
	for seed := range uint64(8) {
		s := newSim(t, seed, 2)
		s.boot(0)
		s.boot(1)
		s.run(s.now + 4e9)
		s.settled()
		s.strict = false
		before := s.nodes[0].table
		s.cut[[2]int{0, 1}] = true
		overlap := 0
		for end := s.now + 4e9; s.now < end; {
			s.run(s.now + ms)
			for b, state := range s.nodes[0].table {
				if state.Owned() && !before[b].Owned() {
					s.fatalf("the unheard node takes bucket %d", b)
				}
			}
			if slices.ContainsFunc(allBuckets(), func(b int) bool { return len(s.owners(b)) > 1 }) {
				overlap++
			}
		}
		if limit := int(s.maxDelay/ms) + 1; overlap > limit {
			t.Errorf("seed %d: two owners for %d ms; want one crossing, %d ms", seed, overlap, limit)
		}
		delete(s.cut, [2]int{0, 1})
		s.run(s.now + 4e9)
		s.settled()
	}
}

func allBuckets() []int {
	all := make([]int, filter.Buckets)
	for b := range all {
		all[b] = b
	}
	return all
}

func TestOwner(t *testing.T) {
	three := []NodeID{id(1), id(2), id(3)}
	count := map[NodeID]int{}
	for b := range filter.Buckets {
		o := Owner(b, three)
		count[o]++
		if again := Owner(b, []NodeID{id(3), id(1), id(2)}); again != o {
			t.Errorf("bucket %d belongs to %v or %v, as the nodes are listed", b, o, again)
		}
		// Who goes moves only its own.
		if rest := Owner(b, three[:2]); o != id(3) && rest != o {
			t.Errorf("bucket %d moved from %v to %v when %v left", b, o, rest, id(3))
		}
	}
	for n, c := range count {
		if c < 280 || c > 405 { // a third, ±4 standard deviations
			t.Errorf("%v has %d buckets of 1024", n, c)
		}
	}
	if o := Owner(1, nil); o != (NodeID{}) {
		t.Errorf("without nodes bucket 1 belongs to %v", o)
	}
}
