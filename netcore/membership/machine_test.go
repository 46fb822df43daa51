package membership

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"clonecluster/netcore/filter"
)

const ms = int64(time.Millisecond)

// The times of all scenarios but where it says so: 100, 300 and 200 ms.
var (
	normal   = Detect(300 * time.Millisecond)
	interval = int64(normal.Interval)
	dead     = int64(normal.Dead)
	lease    = int64(normal.Lease)
)

// segment is a switch with a few nodes on it: one clock, one order of events, and
// the same delay for every frame. Whatever the scenario, at every step no two
// nodes accept new flows of one bucket, and no flow of a live holder is reset.
type segment struct {
	tb     testing.TB
	now    int64
	delay  int64 // of every frame
	look   int64 // how long looking up the flows takes
	nodes  []*station
	flight []arrival // in the order of sending
	cut    map[[2]int]bool
	// filtered is the node that does not get what is sent to the group; 0: none.
	filtered int
	// torn: nodes that do not hear each other cannot keep out of each other's way.
	torn bool
	// each, if set, is called after every step.
	each func()
}

// station is a node: a machine, its filter and its kernel's flows.
type station struct {
	*Machine
	seg    *segment
	n      int
	up     bool
	asleep bool
	table  filter.Table
	until  int64 // the end of the lease
	next   int64
	flows  []int // buckets of the flows in its kernel

	notes     []Note
	ended     []int // of quarantines
	announced int
	said      []*Beacon
	alone     []NodeID // to whom beacons went besides the group
	made      []*Map
}

type arrival struct {
	at int64
	to *station
	ev Event
}

func newSegment(tb testing.TB, delay int64) *segment {
	return &segment{tb: tb, now: int64(time.Hour), delay: delay, cut: map[[2]int]bool{}}
}

// mac is the address of node n; the lowest number has the lowest address.
func mac(n int) NodeID { return NodeID{0x52, 0x54, 0, 0, byte(n >> 8), byte(n)} }

// start starts node n, as the configuration says after with.
func (s *segment) start(n int, with ...func(*Config)) *station {
	return s.startWith(n, nil, with...)
}

// startWith starts node n on a kernel that has flows already.
func (s *segment) startWith(n int, flows []int, with ...func(*Config)) *station {
	cfg := Config{Self: Peer{mac(n), uint64(s.now) + uint64(n)}, Params: normal, Policy: Policy{Moves: 32}, Weight: 100, Rules: 1}
	for _, f := range with {
		f(&cfg)
	}
	for _, f := range flows {
		cfg.Flows.Set(f)
	}
	st := &station{Machine: New(cfg, s.now), seg: s, n: n, up: true, flows: flows}
	st.table = st.Table()
	s.nodes = append(s.nodes, st)
	st.step(Tick{})
	return st
}

// cluster gives nodes 1 to n that have started together and share the buckets.
func cluster(tb testing.TB, n int, with ...func(*Config)) (*segment, []*station) {
	tb.Helper()
	s := newSegment(tb, ms)
	for i := range n {
		s.start(i+1, with...)
	}
	s.run(3 * time.Second)
	return s, s.nodes
}

// step does what a Node does.
func (st *station) step(ev Event) {
	st.seg.tb.Helper()
	for ev != nil {
		a := st.Step(ev, st.seg.now)
		ev = nil
		if a.Table != nil {
			st.table = *a.Table
		}
		st.until, st.next = a.Lease, max(a.Next, st.seg.now+1)
		st.ended = append(st.ended, a.EndQuarantine...)
		st.notes = append(st.notes, a.Notes...)
		if a.Announce {
			st.announced++
		}
		if a.Map != nil {
			st.made = append(st.made, a.Map)
			st.send(ReceivedMap{a.Map, st.Self(), a.MapSequence}, a.MapUnicast)
		}
		if a.Beacon != nil {
			st.said, st.alone = append(st.said, a.Beacon), append(st.alone, a.Unicast...)
			st.send(Received{a.Beacon}, a.Unicast)
			ev = Sent{st.seg.now}
		}
		if a.PollFlows {
			st.seg.flight = append(st.seg.flight, arrival{st.seg.now + st.seg.look, st, FlowsSeen{st.kernel(), st.seg.now}})
		}
	}
	st.seg.check()
}

func (st *station) send(ev Event, besides []NodeID) {
	for _, to := range st.seg.nodes {
		reached := to.n != st.seg.filtered || slices.Contains(besides, to.Self().ID)
		if to != st && reached && !st.seg.cut[[2]int{st.n, to.n}] {
			st.seg.flight = append(st.seg.flight, arrival{st.seg.now + st.seg.delay, to, ev})
		}
	}
}

// kernel gives the buckets of the flows.
func (st *station) kernel() (b Bits) {
	for _, f := range st.flows {
		b.Set(f)
	}
	return b
}

// die ends the machine and its flows.
func (st *station) die() { st.up, st.flows = false, nil }

// run lets time pass.
func (s *segment) run(d time.Duration) {
	s.tb.Helper()
	end := s.now + int64(d)
	for s.advance(end) {
	}
	s.now = end
}

// runTo lets time pass until then.
func (s *segment) runTo(t int64) {
	s.tb.Helper()
	s.run(time.Duration(t - s.now))
}

// await lets time pass until cond holds, event by event, and gives how long that
// took.
func (s *segment) await(what string, cond func() bool) int64 {
	s.tb.Helper()
	from := s.now
	for !cond() {
		if !s.advance(from + int64(30*time.Second)) {
			s.tb.Fatalf("30 s pass, and never %s:%s", what, s)
		}
	}
	return s.now - from
}

// advance does what is next, if it is due by then: frames before timers, and
// otherwise first come, first served.
func (s *segment) advance(by int64) bool {
	s.tb.Helper()
	first := -1
	for i, a := range s.flight {
		if !a.to.asleep && (first < 0 || a.at < s.flight[first].at) {
			first = i
		}
	}
	var timer *station
	for _, st := range s.nodes {
		if st.up && !st.asleep && (timer == nil || st.next < timer.next) {
			timer = st
		}
	}
	switch {
	case first >= 0 && (timer == nil || s.flight[first].at <= timer.next):
		a := s.flight[first]
		if a.at > by {
			return false
		}
		s.now = max(s.now, a.at)
		s.flight = slices.Delete(s.flight, first, first+1)
		if a.to.up {
			a.to.step(a.ev)
		}
	case timer != nil && timer.next <= by:
		s.now = max(s.now, timer.next)
		timer.step(Tick{})
	default:
		return false
	}
	return true
}

// accepts reports whether the node takes new flows of the bucket. One that is
// asleep does: its kernel goes on until the lease ends.
func (st *station) accepts(b int) bool {
	return st.up && st.table[b].Owned() && st.seg.now < st.until
}

// accepting counts the buckets of which the node takes new flows.
func (st *station) accepting() (n int) {
	for b := range st.table {
		if st.accepts(b) {
			n++
		}
	}
	return n
}

// count counts the buckets in a state.
func (st *station) count(state filter.State) (n int) {
	for _, s := range st.table {
		if s == state {
			n++
		}
	}
	return n
}

// buckets lists those that the node owns.
func (st *station) buckets() (owned []int) {
	for b, s := range st.table {
		if s.Owned() {
			owned = append(owned, b)
		}
	}
	return owned
}

// noted counts the notes of a kind.
func (st *station) noted(what NoteKind) (n int) {
	for _, note := range st.notes {
		if note.What == what {
			n++
		}
	}
	return n
}

func (s *segment) owners(b int) (ns []*station) {
	for _, st := range s.nodes {
		if st.accepts(b) {
			ns = append(ns, st)
		}
	}
	return ns
}

// check asserts I3 and I5.
func (s *segment) check() {
	s.tb.Helper()
	if s.each != nil {
		s.each()
	}
	if s.torn {
		return
	}
	var taken [filter.Buckets]*station
	for _, st := range s.nodes {
		if !st.up || s.now >= st.until {
			continue
		}
		for b, state := range st.table {
			switch {
			case !state.Owned():
			case taken[b] != nil:
				s.tb.Fatalf("I3: nodes %d and %d accept new flows of bucket %d:%s", taken[b].n, st.n, b, s)
			default:
				taken[b] = st
			}
		}
	}
	for _, st := range s.nodes {
		for _, f := range st.flows {
			if st.table[f] == filter.Foreign {
				s.tb.Fatalf("I5: node %d drops its flow in bucket %d:%s", st.n, f, s)
			}
			for _, o := range s.owners(f) {
				if o != st && o.table[f] == filter.Settled {
					s.tb.Fatalf("I5: node %d would reset the flow of node %d in bucket %d:%s", o.n, st.n, f, s)
				}
			}
		}
	}
}

func (s *segment) String() (d string) {
	for _, st := range s.nodes {
		d += fmt.Sprintf("\n\tnode %d: lease in %.3f ms, %v", st.n, float64(st.until-s.now)/1e6, st.Machine)
	}
	return d
}

// want asserts how many buckets each node owns and accepts new flows of, all of
// them settled, and that all that are up go by one map.
func (s *segment) want(shares ...int) {
	s.tb.Helper()
	for i, st := range s.nodes {
		if !st.up {
			continue
		}
		if got := st.accepting(); got != shares[i] || st.count(filter.Settled) != got || st.count(filter.Shared) > 0 {
			s.tb.Fatalf("node %d accepts new flows of %d buckets, %d are settled and %d shared; want %d, all settled:%s",
				st.n, got, st.count(filter.Settled), st.count(filter.Shared), shares[i], s)
		}
		if v := st.View(); st.state.takesPart() && (!v.Agreed || v.Fenced || s.nodes[0].up && v.Map != s.nodes[0].View().Map) {
			s.tb.Fatalf("node %d is fenced or goes by another map:%s", st.n, s)
		}
	}
}

// never asserts at every step from now on that something does not happen.
func (s *segment) never(what string, cond func() bool) {
	s.each = func() {
		s.tb.Helper()
		if cond() {
			s.tb.Fatalf("%s:%s", what, s)
		}
	}
}

// unowned reports whether one of the buckets is not accepted by any node.
func (s *segment) unowned(buckets []int) bool {
	return slices.ContainsFunc(buckets, func(b int) bool { return len(s.owners(b)) == 0 })
}

// minus gives what is in a and not in b.
func minus(a, b []int) (rest []int) {
	for _, x := range a {
		if !slices.Contains(b, x) {
			rest = append(rest, x)
		}
	}
	return rest
}

func sorted(s []int) []int { return slices.Sorted(slices.Values(s)) }

func TestLoneStart(t *testing.T) {
	times := map[int64]bool{}
	for incarnation := range uint64(16) {
		s := newSegment(t, 0)
		st := s.start(1, func(c *Config) { c.Self.Incarnation = incarnation + 1 })
		s.never("claims while it listens", func() bool { return st.State() == Listening && (st.owned > 0 || st.until != 0) })
		took := s.await("it owns all", func() bool { return st.accepting() == filter.Buckets })
		if took < dead || took >= dead+interval {
			t.Errorf("incarnation %d owns all after %d ns; want Dead and less than Interval more", incarnation, took)
		}
		times[took] = true
		if st.until != st.lastSent+lease || st.lastSent != s.now {
			t.Errorf("the lease ends %d ns after the last beacon, sent %d ns ago; want %d, 0", st.until-st.lastSent, s.now-st.lastSent, lease)
		}
		if got := st.View().Map; got != (MapID{1, mac(1)}) {
			t.Errorf("its first map is %v", got)
		}
		s.run(10 * time.Second)
		s.want(filter.Buckets)
		if st.announced != 1 || st.noted(NewMap) != 1 {
			t.Errorf("announced %d times, %d maps made; want 1, 1", st.announced, st.noted(NewMap))
		}
		if n := len(st.said); n < 103 || n > 106 {
			t.Errorf("%d beacons in ten seconds and the start", n)
		}
	}
	if len(times) < 2 {
		t.Errorf("all incarnations claim at the same time: no jitter")
	}
}

// TestStartTogether: the second of two takes part as soon as its own time is
// over, but for the least time between two maps.
func TestStartTogether(t *testing.T) {
	for seed := range uint64(16) {
		s := newSegment(t, ms)
		for n := range 2 {
			s.start(n+1, func(c *Config) { c.Self.Incarnation = seed<<8 | uint64(n) })
		}
		first, last := s.nodes[0], s.nodes[1]
		if first.listenUntil > last.listenUntil {
			first, last = last, first
		}
		s.runTo(first.listenUntil)
		if first.accepting() > 0 {
			t.Fatal("the first claims without the consent of one that may begin to serve as well")
		}
		s.run(time.Duration(2 * s.delay))
		if got := first.accepting(); got != filter.Buckets && last.listenUntil > s.now {
			t.Fatalf("seed %d: the first owns %d buckets a round trip after its time:%s", seed, got, s)
		}
		by := last.listenUntil + 2*s.delay
		if by-first.listenUntil < interval/4+2*s.delay {
			by += interval / 4
		}
		s.runTo(by)
		if s.nodes[0].accepting() != 512 || s.nodes[1].accepting() != 512 {
			t.Fatalf("seed %d: when the second's time is over not both own a half:%s", seed, s)
		}
		s.run(time.Second)
		s.want(512, 512)
	}
}

// State is for the scenarios.
func (st *station) State() State { return st.state }

func TestThirdJoins(t *testing.T) {
	s, n := cluster(t, 2)
	s.want(512, 512)
	n[0].flows, n[1].flows = []int{n[0].buckets()[0]}, []int{n[1].buckets()[0], n[1].buckets()[511]}
	before := [][]int{n[0].buckets(), n[1].buckets()}
	third := s.start(3)
	s.await("the third owns something", func() bool { return third.accepting() > 0 })
	if s.now != third.listenUntil+3*s.delay { // its word, the map, the other's consent
		t.Errorf("the third owns its share %d ns after its time; want three crossings", s.now-third.listenUntil)
	}
	third.flows = []int{third.buckets()[0]}
	s.run(time.Second)
	var moved []int
	for i, want := range []int{342, 341, 341} { // 341.33 each; the remainder is the first's
		st := s.nodes[i]
		if got := st.accepting(); got != want {
			t.Errorf("node %d owns %d buckets; want %d", st.n, got, want)
		}
		if st == third {
			continue
		}
		if extra := minus(st.buckets(), before[i]); len(extra) > 0 {
			t.Errorf("node %d gained %v by a join", st.n, extra)
		}
		moved = append(moved, minus(before[i], st.buckets())...)
	}
	if !slices.Equal(sorted(moved), third.buckets()) || len(moved) != 341 {
		t.Errorf("%d buckets moved; want the 341 of the third", len(moved))
	}
}

// TestHandOver: while a third joins, what does not move is owned at every
// instant, and what does is without an owner from when the leader has made the map
// until all that go by it have said so, two crossings.
func TestHandOver(t *testing.T) {
	// Where it goes can be learnt from a rehearsal.
	s, n := cluster(t, 2)
	s.start(3)
	s.run(time.Second)
	stays := slices.Concat(n[0].buckets(), n[1].buckets())
	moves := s.nodes[2].buckets()

	s, _ = cluster(t, 2)
	lost := int64(0)
	s.never("a bucket that does not move is without an owner", func() bool {
		if lost == 0 && s.unowned(moves) {
			lost = s.now
		}
		return s.unowned(stays)
	})
	third := s.start(3)
	s.await("the third owns something", func() bool { return third.accepting() > 0 })
	if gap := s.now - lost; gap != 2*s.delay {
		t.Errorf("a bucket was without an owner for %d ns; want %d", gap, 2*s.delay)
	}
	if s.unowned(moves) {
		t.Error("the third has not taken all at once")
	}
	s.run(time.Second)
	s.want(342, 341, 341)
	if !slices.Equal(third.buckets(), moves) {
		t.Error("the rehearsal moved other buckets")
	}
}

func TestDeath(t *testing.T) {
	s, n := cluster(t, 3)
	s.want(342, 341, 341)
	orphans := n[2].buckets()
	stays := slices.Concat(n[0].buckets(), n[1].buckets())
	s.never("a bucket of a live node is without an owner", func() bool { return s.unowned(stays) })
	n[2].die()
	s.run(time.Duration(s.delay)) // what it has said arrives
	heard := n[0].peers[mac(3)].heard
	s.runTo(heard + dead)
	if n[0].noted(Lost)+n[1].noted(Lost) > 0 || len(n[0].live) != 2 {
		t.Fatal("a node is lost before Dead is over")
	}
	s.run(1)
	if n[0].noted(Lost) != 1 || n[1].noted(Lost) != 1 || n[0].noted(NewMap) == 0 {
		t.Fatalf("a nanosecond after Dead: notes %v and %v", n[0].notes, n[1].notes)
	}
	// The leader's map and its consent reach the other, and the other's consent
	// the leader.
	s.run(time.Duration(s.delay))
	if got := n[1].count(filter.Settled); got != 512 {
		t.Errorf("one crossing later node 2 has %d settled buckets; want 512", got)
	}
	s.run(time.Duration(s.delay))
	s.want(512, 512, 0)
	if ended := slices.Concat(n[0].ended, n[1].ended); !slices.Equal(sorted(ended), orphans) {
		t.Errorf("%d quarantines end; want those of the %d buckets of the dead node", len(ended), len(orphans))
	}
}

// TestLiveHandOverKeepsQuarantine: what a node takes over from a live one is
// quarantined, even if it once belonged to a dead one.
func TestLiveHandOverKeepsQuarantine(t *testing.T) {
	s, n := cluster(t, 3)
	n[2].die()
	s.run(time.Second)
	s.want(512, 512, 0)
	n[0].ended = nil
	n[1].step(Drain{On: true})
	s.run(time.Second)
	s.want(1024, 0, 0)
	if len(n[0].ended) > 0 {
		t.Errorf("node 1 ends the quarantine of %d buckets that it has from a live node", len(n[0].ended))
	}
}

func TestLeaving(t *testing.T) {
	s, n := cluster(t, 3)
	orphans := n[2].buckets()
	n[2].step(Leave{})
	if n[2].accepting() > 0 || n[2].until != 0 || n[2].State() != Leaving {
		t.Errorf("after its last word it is %v, accepts new flows of %d buckets and has the lease %d", n[2].State(), n[2].accepting(), n[2].until)
	}
	s.run(time.Duration(2 * s.delay)) // its word; the map
	if n[0].noted(Left) != 1 || n[1].noted(Left) != 1 || n[0].noted(Lost)+n[1].noted(Lost) > 0 {
		t.Errorf("notes %v and %v; want that it has left, once each", n[0].notes, n[1].notes)
	}
	s.run(time.Duration(s.delay))
	s.want(512, 512, 0)
	if ended := slices.Concat(n[0].ended, n[1].ended); !slices.Equal(sorted(ended), orphans) {
		t.Errorf("%d quarantines end; want those of the %d buckets of the node that left", len(ended), len(orphans))
	}
	s.run(5 * time.Second) // it says on that it leaves
	s.want(512, 512, 0)
}

// restart has a node do what an engine does that is stopped for a restart, and
// leaves its kernel's flows with a station that is down. fork starts the next
// engine on them.
func (s *segment) restart(st *station) {
	s.tb.Helper()
	st.step(Drain{On: true})
	s.await("the others have taken over", st.Drained)
	for range 3 {
		st.step(Restart{})
	}
	if st.State() != Restarting || st.accepting() > 0 || st.until != 0 {
		s.tb.Fatalf("after its last word it is %v and accepts %d buckets", st.State(), st.accepting())
	}
	st.up = false
}

func (s *segment) fork(st *station) *station {
	s.tb.Helper()
	flows := st.flows
	st.flows = nil
	return s.startWith(st.n, flows)
}

// TestRestart: new flows go to the others without a gap, and those of the node
// that restarts wait for it, for many times the detection time; nobody takes it
// for dead. check looks for I5 all the while.
func TestRestart(t *testing.T) {
	for _, gone := range []time.Duration{10 * time.Millisecond, 250 * time.Millisecond, 5 * time.Second, restartTime - time.Second} {
		s, n := cluster(t, 3)
		n[1].flows = n[1].buckets()[:5]
		held := n[1].flows
		s.restart(n[1])
		s.run(time.Duration(2 * s.delay))
		if n[0].accepting()+n[2].accepting() != 1024 {
			t.Fatalf("the others accept %d and %d buckets; want all", n[0].accepting(), n[2].accepting())
		}
		s.run(gone)
		again := s.fork(n[1])
		s.run(2 * time.Second)
		if again.accepting() < 341 || n[0].accepting()+n[2].accepting()+again.accepting() != 1024 {
			t.Errorf("away for %v: it owns %d buckets again; want a third", gone, again.accepting())
		}
		if lost := n[0].noted(Lost) + n[2].noted(Lost); lost > 0 || n[0].noted(Restarts) != 1 {
			t.Errorf("away for %v: notes %v", gone, n[0].notes)
		}
		again.flows = nil
		s.run(2 * time.Second)
		for _, b := range held {
			for _, o := range s.owners(b) {
				if o.table[b] != filter.Settled {
					t.Errorf("away for %v: bucket %d, whose flows have ended, is %v", gone, b, o.table[b])
				}
			}
		}
	}
}

// TestRestartNeverBack: an engine that does not come back does not leave its
// clients without an answer for ever.
func TestRestartNeverBack(t *testing.T) {
	s, n := cluster(t, 2)
	n[1].flows = n[1].buckets()[:5]
	held := n[1].flows
	s.restart(n[1])
	s.run(restartTime - time.Second)
	for _, b := range held {
		if n[0].table[b] != filter.Shared || slices.Contains(n[0].ended, b) {
			t.Fatalf("bucket %d is %v while its holder may come back; want shared", b, n[0].table[b])
		}
	}
	n[1].flows = nil // or check would miss them
	s.run(2 * time.Second)
	s.want(1024, 0)
	if !slices.Equal(sorted(n[0].ended), held) {
		t.Errorf("the quarantines of %v end; want those of %v", n[0].ended, held)
	}
}

// TestRestartOwning: nobody takes the buckets of a node over before its engine ends. It
// cannot have looked for its flows in them, so all of them are spared.
func TestRestartOwning(t *testing.T) {
	s, n := cluster(t, 2)
	for _, st := range n {
		st.step(Drain{On: true})
	}
	s.run(2 * time.Second)
	s.want(512, 512)
	n[1].flows = n[1].buckets()[:5]
	held := n[1].flows
	n[1].step(Restart{})
	n[1].up = false
	s.run(time.Second)
	for _, b := range held {
		if n[0].table[b] != filter.Shared {
			t.Errorf("bucket %d is %v while its holder restarts; want shared", b, n[0].table[b])
		}
	}
}

// TestOlderMapMadeWithout: who comes back by an older map that this node never had may hold flows in
// any bucket.
func TestOlderMapMadeWithout(t *testing.T) {
	s, n := cluster(t, 2)
	s.run(2 * time.Second)
	if n[0].count(filter.Settled) != 512 {
		t.Fatalf("%d buckets are settled: this shows nothing", n[0].count(filter.Settled))
	}
	own := *n[1].said[len(n[1].said)-1]
	own.Sequence++
	own.Map, own.Parent = MapID{Version: 1, Leader: mac(9)}, MapID{} // of one who is gone
	s.each, s.torn = nil, true
	n[0].step(Received{&own})
	if got := n[0].count(filter.Settled); got > 0 {
		t.Errorf("%d buckets are settled after a beacon with a map that was made without this node", got)
	}
}

// TestRestartTwice: the engine that comes back dies before it has spoken, or a
// recording takes its place; the flows still wait for the next.
func TestRestartTwice(t *testing.T) {
	s, n := cluster(t, 2)
	n[1].flows = n[1].buckets()[:5]
	s.restart(n[1])
	s.run(time.Second)
	again := s.fork(n[1])
	s.run(time.Duration(10 * ms))
	again.up = false
	s.run(5 * time.Second)
	third := s.fork(again)
	s.run(2 * time.Second)
	if third.accepting() != 512 {
		t.Errorf("it owns %d buckets; want half", third.accepting())
	}
}

// TestDrain: the node that drains is the leader, and has flows.
func TestDrain(t *testing.T) {
	s, n := cluster(t, 2)
	own := n[0].buckets()
	n[0].flows = own[:3]
	began := s.now
	n[0].step(Drain{On: true})
	if n[0].State() != Draining || n[0].count(filter.Draining) != 512 || n[0].accepting() > 0 {
		t.Fatalf("it is %v, and %d buckets are draining; want all 512 at once", n[0].State(), n[0].count(filter.Draining))
	}
	if n[0].Drained() {
		t.Error("it counts as drained before it has looked for its flows")
	}
	s.run(time.Duration(s.delay))
	if n[1].count(filter.Settled) != 512 || n[1].count(filter.Shared) != 512 || n[1].accepting() != 1024 {
		t.Fatalf("one crossing later the other has %d settled and %d shared buckets; want 512 of each", n[1].count(filter.Settled), n[1].count(filter.Shared))
	}

	// It looks half an interval later, when nothing new can have come in.
	s.runTo(began + interval/2)
	if got := n[0].count(filter.Draining); got != 3 || !n[0].Drained() {
		t.Errorf("when it has looked %d buckets are draining, drained is %v; want the 3 with flows, true", got, n[0].Drained())
	}
	s.run(time.Duration(s.delay))
	if n[1].count(filter.Shared) != 3 || n[1].count(filter.Settled) != 1021 {
		t.Errorf("when the other knows, %d buckets are shared; want 3", n[1].count(filter.Shared))
	}

	// The flows stay as long as they live, and end one by one.
	s.run(10 * time.Second)
	if n[0].count(filter.Draining) != 3 || n[1].count(filter.Shared) != 3 || n[1].accepting() != 1024 {
		t.Errorf("later %d buckets are draining and %d shared; want 3, 3", n[0].count(filter.Draining), n[1].count(filter.Shared))
	}
	n[0].flows = own[1:3]
	if took := s.await("it notices the end", func() bool { return n[0].count(filter.Draining) == 2 }); took > 2*interval {
		t.Errorf("the end of a flow is noticed after %d ns; want two intervals at most", took)
	}
	if n[0].table[own[0]] != filter.Foreign {
		t.Errorf("the bucket of the ended flow is %v", n[0].table[own[0]])
	}
	s.run(time.Duration(s.delay))
	if n[1].table[own[0]] != filter.Settled || n[1].count(filter.Shared) != 2 {
		t.Errorf("at the other it is %v, and %d are shared; want settled, 2", n[1].table[own[0]], n[1].count(filter.Shared))
	}
	n[0].flows = nil
	s.run(time.Second)
	s.want(0, 1024)

	n[0].step(Drain{On: false})
	s.run(time.Duration(2 * s.delay)) // the map; the other's consent
	if n[0].State() != Serving || n[0].accepting() != 512 || n[1].accepting() != 512 {
		t.Errorf("a round trip after it resumed the shares are %d and %d; want 512, 512", n[0].accepting(), n[1].accepting())
	}
	s.run(time.Second)
	s.want(512, 512)
}

// TestStandAside: a node that cannot serve owns nothing while another can, whatever an
// operator says.
func TestStandAside(t *testing.T) {
	s, n := cluster(t, 2)
	n[0].step(StandAside{On: true})
	s.run(time.Second)
	s.want(0, 1024)
	n[0].step(Drain{On: false})
	s.run(time.Second)
	s.want(0, 1024)
	if n[0].State() != Draining {
		t.Errorf("it is %v; want draining", n[0].State())
	}
	n[1].step(Drain{On: true}) // nobody is left who serves
	s.run(time.Second)
	s.want(0, 1024)
	n[1].step(Drain{On: false})
	s.run(time.Second)
	s.want(0, 1024)
	n[0].step(Drain{On: true})
	n[0].step(StandAside{On: false})
	s.run(time.Second)
	s.want(0, 1024)
	n[0].step(Drain{On: false})
	s.run(time.Second)
	s.want(512, 512)
}

// TestDrainSeveral at once: nothing is reset, and the one that is left has all.
func TestDrainSeveral(t *testing.T) {
	s, n := cluster(t, 4)
	s.want(256, 256, 256, 256)
	for _, st := range n {
		st.flows = st.buckets()[:5]
	}
	for _, st := range n[:3] {
		st.step(Drain{On: true})
	}
	s.run(time.Duration(interval/4 + 3*s.delay)) // the least time between two maps
	if got := n[3].accepting(); got != 1024 {
		t.Fatalf("after the second map the last has %d buckets:%s", got, s)
	}
	s.run(time.Second)
	if got := n[3].count(filter.Shared); got != 15 {
		t.Errorf("%d buckets are shared; want the 15 in which the others have flows", got)
	}
}

// TestAllDrain: somebody still owns, until the nodes stop.
func TestAllDrain(t *testing.T) {
	s, n := cluster(t, 3)
	for _, st := range n {
		st.step(Drain{On: true})
	}
	s.run(time.Second)
	s.want(342, 341, 341)
	for _, st := range n {
		if st.State() != Draining || st.Drained() {
			t.Errorf("node %d is %v, drained is %v", st.n, st.State(), st.Drained())
		}
	}
	n[1].step(Drain{On: false})
	s.run(time.Second)
	s.want(0, 1024, 0)
	n[1].step(Drain{On: true})
	s.run(time.Second)
	s.want(342, 341, 341)

	n[0].step(Stop{})
	n[1].step(Stop{})
	s.run(time.Second)
	s.want(0, 0, 1024)
	n[2].step(Stop{})
	if n[2].State() != Stopping || n[2].accepting() > 0 || n[2].until != 0 {
		t.Errorf("the last one is %v, accepts new flows of %d buckets and has the lease %d", n[2].State(), n[2].accepting(), n[2].until)
	}
	s.run(time.Second)
	s.want(0, 0, 0)
	for _, st := range n {
		if !st.Drained() {
			t.Errorf("node %d is not drained", st.n)
		}
		st.step(Drain{On: false})
		st.step(Carrier{true})
		if st.State() != Stopping {
			t.Errorf("node %d is %v after it was stopped", st.n, st.State())
		}
	}
	s.run(time.Second)
	s.want(0, 0, 0)
}

// TestStopsWithFlows: they go on until they end, and then the other knows.
func TestStopsWithFlows(t *testing.T) {
	s, n := cluster(t, 2)
	n[1].flows = n[1].buckets()[:2]
	n[1].step(Drain{On: true})
	n[1].step(Stop{})
	s.run(time.Second)
	if n[1].count(filter.Draining) != 2 || n[0].count(filter.Shared) != 2 || n[0].accepting() != 1024 {
		t.Errorf("%d buckets are draining, %d shared and %d accepted; want 2, 2, 1024", n[1].count(filter.Draining), n[0].count(filter.Shared), n[0].accepting())
	}
	n[1].flows = nil
	s.run(time.Duration(2*interval + s.delay))
	s.want(1024, 0)
	n[1].step(Leave{})
	s.run(time.Second)
	s.want(1024, 0)
}

func TestHealth(t *testing.T) {
	s, n := cluster(t, 3)
	n[1].flows = n[1].buckets()[:1]
	n[1].step(Health{OK: false})
	s.run(time.Duration(2 * s.delay)) // its word; the map
	if n[1].accepting() > 0 || n[1].table[n[1].flows[0]] != filter.Draining {
		t.Fatalf("a round trip after its services failed node 2 has %d buckets:%s", n[1].accepting(), s)
	}
	s.run(time.Duration(s.delay))
	if n[0].accepting() != 512 || n[2].accepting() != 512 {
		t.Fatalf("and one crossing later the others have %d and %d; want 512, 512", n[0].accepting(), n[2].accepting())
	}
	s.run(time.Second)
	if v := n[0].View(); !v.Members[1].Sick || v.Members[1].State != Serving || v.AllSick {
		t.Errorf("the leader's view is %+v", v)
	}
	n[1].flows = nil
	n[1].step(Health{OK: true})
	s.run(2 * time.Second)
	s.want(342, 341, 341)
	for _, st := range n {
		if st.noted(FailOpen)+st.noted(AllFailed)+st.noted(Recovered) > 0 {
			t.Errorf("node %d notes %v; nothing was wrong with all", st.n, st.notes)
		}
	}
}

func TestAllSick(t *testing.T) {
	for _, stop := range []bool{false, true} {
		s, n := cluster(t, 3, func(c *Config) { c.Policy.StopWhenSick = stop })
		said, want := FailOpen, []int{342, 341, 341}
		if stop {
			said, want = AllFailed, []int{0, 0, 0}
		}
		for _, st := range n {
			st.step(Health{OK: false})
			s.run(time.Second)
		}
		s.want(want...)
		for _, st := range n {
			if st.noted(said) != 1 || st.noted(FailOpen)+st.noted(AllFailed) != 1 || !st.View().AllSick {
				t.Errorf("node %d: all sick %v, notes %v; want %q once", st.n, st.View().AllSick, st.notes, said)
			}
		}
		n[2].step(Health{OK: true})
		s.run(time.Second)
		s.want(0, 0, 1024)
		n[0].step(Health{OK: true})
		n[1].step(Health{OK: true})
		s.run(time.Second)
		s.want(342, 341, 341)
		for _, st := range n {
			if st.noted(Recovered) != 1 || st.View().AllSick {
				t.Errorf("node %d: all sick %v, recovered noted %d times; want once", st.n, st.View().AllSick, st.noted(Recovered))
			}
		}
	}
}

// TestSickDrains: between a node that is sick and one that drains the sick one
// serves; it was not asked to go.
func TestSickDrains(t *testing.T) {
	s, n := cluster(t, 2)
	n[0].step(Drain{On: true})
	n[1].step(Health{OK: false})
	s.run(time.Second)
	s.want(0, 1024)
	if n[0].noted(FailOpen) != 1 {
		t.Errorf("notes %v; want that the cluster serves on", n[0].notes)
	}
}

// TestStaleFlows: what was looked up before a bucket was lost lacks the flows
// that were accepted until then.
func TestStaleFlows(t *testing.T) {
	s, n := cluster(t, 1)
	s.look = dead // longer than all takes here
	n[0].flows = []int{7}
	asked := s.now
	s.start(2)
	s.await("a bucket is lost", func() bool { return n[0].accepting() < 1024 })
	lost := n[0].count(filter.Draining)
	if lost != 512 {
		t.Fatalf("%d buckets are draining", lost)
	}
	n[0].step(FlowsSeen{Asked: asked})
	n[0].step(FlowsSeen{Asked: s.now - 1})
	if got := n[0].count(filter.Draining); got != lost || n[0].Machine.heldKnown {
		t.Errorf("after an answer to an earlier question %d buckets are draining, known is %v; want %d, false", got, n[0].heldKnown, lost)
	}
	n[0].step(FlowsSeen{Asked: s.now})
	if got := n[0].count(filter.Draining); got != 0 || !n[0].heldKnown {
		t.Errorf("after an answer %d buckets are draining, known is %v; want 0, true", got, n[0].heldKnown)
	}
}

// TestFlowsFromBefore: an engine that starts again finds flows in its kernel.
func TestFlowsFromBefore(t *testing.T) {
	s := newSegment(t, ms)
	var flows Bits
	flows.Set(3)
	flows.Set(900)
	st := s.start(1, func(c *Config) { c.Flows = flows })
	if st.count(filter.Draining) != 2 || st.table[3] != filter.Draining || st.table[900] != filter.Draining {
		t.Errorf("%d buckets are draining; want 3 and 900", st.count(filter.Draining))
	}
	s.run(time.Second)
	s.want(1024) // they are its own again
}

// TestSleep: a node that could not send for longer than its lease may count as
// dead, and begins anew.
func TestSleep(t *testing.T) {
	for _, tt := range []struct {
		sleep int64
		anew  bool
	}{{lease, false}, {lease + 1, true}, {int64(time.Hour), true}} {
		s, n := cluster(t, 1)
		s.run(time.Duration(n[0].next - s.now))
		self, table, slept := n[0].Self(), n[0].table, n[0].lastSent+tt.sleep
		n[0].asleep = true
		s.runTo(slept)
		n[0].asleep = false
		n[0].step(Tick{})
		if !tt.anew {
			if n[0].Self() != self || n[0].table != table || n[0].until != s.now+lease {
				t.Errorf("after %d ns it is %v with the lease %d", tt.sleep, n[0].State(), n[0].until)
			}
			continue
		}
		if n[0].Self().Incarnation == self.Incarnation || n[0].Self().ID != self.ID || n[0].State() != Listening {
			t.Errorf("after %d ns it is %v, %v", tt.sleep, n[0].Self(), n[0].State())
		}
		if n[0].until != 0 || n[0].count(filter.Draining) != 1024 || n[0].noted(Silent) != 1 {
			t.Errorf("after %d ns it has the lease %d, %d buckets are draining; want 0, 1024", tt.sleep, n[0].until, n[0].count(filter.Draining))
		}
		took := s.await("it owns all again", func() bool { return n[0].accepting() == 1024 })
		if took < dead || took >= dead+interval {
			t.Errorf("it owns all again after %d ns", took)
		}
	}
}

// TestSleeper: one of three sleeps until the others have taken its buckets.
func TestSleeper(t *testing.T) {
	s, n := cluster(t, 3)
	n[1].asleep = true
	took := s.await("others have its buckets", func() bool { return n[0].accepting() == 512 && n[2].accepting() == 512 })
	if took <= lease || took > dead+interval {
		t.Errorf("after %d ns; want more than Lease", took)
	}
	s.run(time.Second)
	n[1].asleep = false
	n[1].step(Tick{})
	if n[1].accepting() > 0 || n[1].noted(Silent) != 1 {
		t.Errorf("awake again it accepts new flows of %d buckets", n[1].accepting())
	}
	s.run(3 * time.Second)
	s.want(342, 341, 341)
}

// TestFormerIncarnation: what was said to a node before it slept does not count.
func TestFormerIncarnation(t *testing.T) {
	s, n := cluster(t, 2)
	old, last := n[1].Self(), *n[0].said[len(n[0].said)-1]
	n[1].asleep = true
	s.runTo(n[1].lastSent + lease + 1)
	n[1].asleep = false
	n[1].step(Tick{})
	for i, tt := range []struct {
		heard Peer
		live  int
	}{{old, 0}, {n[1].Self(), 1}} {
		if len(n[1].live) > 0 {
			t.Fatalf("node 1 is live before it has listed the present incarnation:%s", s)
		}
		b := last
		b.Sequence, b.Heard = b.Sequence+1000+uint64(i), []Tag{tt.heard.Tag()}
		if n[1].step(Received{&b}); len(n[1].live) != tt.live {
			t.Errorf("a beacon that lists %v makes %d live peers; want %d", tt.heard, len(n[1].live), tt.live)
		}
	}
}

// TestDivergent: a node accepts nothing new while one that hears it goes by a map
// that neither follows from its own nor went before.
func TestDivergent(t *testing.T) {
	other := mac(2)
	for _, tt := range []struct {
		name       string
		id, parent MapID
		state      State
		fenced     bool
	}{
		{"a map of its own", MapID{9, other}, MapID{8, other}, Serving, true},
		{"an older one of its own", MapID{1, other}, MapID{}, Serving, true},
		{"a map of its own, and drains", MapID{9, other}, MapID{8, other}, Draining, true},
		{"a map of its own, and owns nothing", MapID{9, other}, MapID{8, other}, Listening, false},
		{"none yet", MapID{}, MapID{}, Serving, false},
		{"what this node went by before", MapID{1, mac(1)}, MapID{}, Serving, false},
	} {
		_, n := cluster(t, 1)
		b := ghost(other, 7, 1)
		b.Heard, b.State, b.Map, b.Parent = []Tag{n[0].Self().Tag()}, tt.state, tt.id, tt.parent
		n[0].step(Received{b})
		if got := n[0].View().Fenced; got != tt.fenced || got && n[0].until != 0 {
			t.Errorf("%s: fenced is %v, the lease %d; want %v: %v", tt.name, got, n[0].until, tt.fenced, n[0].Machine)
		}
	}
}

// TestNothingSent: a node whose frames do not leave accepts nothing new before
// the others take over.
func TestNothingSent(t *testing.T) {
	s, n := cluster(t, 1)
	end := n[0].lastSent + lease
	if n[0].until != end {
		t.Fatalf("the lease ends %d ns after the last beacon; want %d", n[0].until-n[0].lastSent, lease)
	}
	for now := s.now; now < s.now+int64(time.Second); now += 10 * ms {
		if a := n[0].Step(Tick{}, now); a.Lease > end || now > end && a.Lease > 0 {
			t.Fatalf("at %d the lease is %d without a frame sent; it was %d", now, a.Lease, end)
		}
	}
	if lease >= dead {
		t.Error("the lease is not shorter than the detection time")
	}
}

// TestOneWay: one of two nodes is no longer heard by the other, which takes its
// buckets. However their beacons lie to each other, it has stopped by then.
func TestOneWay(t *testing.T) {
	for _, unheard := range []int{1, 2} {
		for phase := int64(0); phase < interval; phase += 5 * ms {
			oneWay(t, unheard, phase)
		}
	}
}

func oneWay(t *testing.T, unheard int, phase int64) {
	t.Helper()
	s, n := cluster(t, 2)
	a, b := n[unheard-1], n[2-unheard]
	s.await("they send at different times", func() bool { return a.lastSent == s.now })
	b.lastTried = a.lastSent + phase - interval
	s.run(time.Duration(interval / 2))
	s.cut[[2]int{a.n, b.n}] = true
	s.run(time.Duration(s.delay)) // what is on its way arrives
	heard := b.peers[a.Self().ID].heard
	s.never("the unheard node gains a bucket", func() bool { return a.owned > 512 })

	s.await("it is fenced", func() bool { return a.until == 0 })
	if took := s.now - heard; took >= dead {
		t.Errorf("node %d, unheard, is fenced after %d ns; want less than Dead", a.n, took)
	}
	if a.noted(Unheard) != 1 || !a.View().Fenced {
		t.Errorf("node %d: fenced %v, notes %v", a.n, a.View().Fenced, a.notes)
	}
	if b.accepting() != 512 {
		t.Errorf("at that time node %d has %d buckets already", b.n, b.accepting())
	}
	s.await("the other has all", func() bool { return b.accepting() == 1024 })
	if s.now != heard+dead+1 || a.until != 0 {
		t.Errorf("the other has all %d ns after it heard it last, when the lease is %d; want Dead and one, 0", s.now-heard, a.until)
	}
	if !slices.Contains(a.alone, b.Self().ID) {
		t.Errorf("node %d has not sent to node %d alone, which may not hear the group", a.n, b.n)
	}
	s.run(5 * time.Second)
	if b.accepting() != 1024 || a.accepting() != 0 {
		t.Errorf("later they have %d and %d buckets; want 1024, 0", b.accepting(), a.accepting())
	}
	delete(s.cut, [2]int{a.n, b.n})
	s.run(2 * time.Second)
	s.want(512, 512)
}

// TestOneWayOfThree: of three nodes one does not hear one of the others, for long. The
// buckets of whoever stops for that are not left to it, whether it leads or not.
func TestOneWayOfThree(t *testing.T) {
	for from := 1; from <= 3; from++ {
		for to := 1; to <= 3; to++ {
			if from == to {
				continue
			}
			s, n := cluster(t, 3)
			all := func() (sum int) {
				for _, m := range n {
					sum += m.accepting()
				}
				return sum
			}
			s.cut[[2]int{from, to}] = true
			s.run(time.Duration(3 * dead))
			if got := all(); got != 1024 {
				t.Errorf("%d to %d cut: %d buckets are served; want 1024: %v %v %v", from, to, got, n[0].Machine, n[1].Machine, n[2].Machine)
			}
			s.run(10 * time.Second)
			if got := all(); got != 1024 {
				t.Errorf("%d to %d cut for long: %d buckets are served; want 1024", from, to, got)
			}
			clear(s.cut)
			s.run(3 * time.Second)
			s.want(342, 341, 341)
		}
	}
}

// TestFoundLate: node 3 takes buckets without asking node 2, which it cannot hear, and
// whose map is older. When it hears it, it stops until node 2 goes by the same map.
func TestFoundLate(t *testing.T) {
	s, n := cluster(t, 2)
	s.torn = true
	s.cut[[2]int{2, 3}], s.cut[[2]int{3, 2}] = true, true
	late := s.start(3)
	s.await("node 1 hears node 3", func() bool { return n[0].noted(Heard) == 2 })
	s.run(time.Duration(dead))
	s.cut[[2]int{1, 2}] = true
	s.await("node 3 has buckets", func() bool { return late.accepting() > 0 })
	delete(s.cut, [2]int{2, 3})
	delete(s.cut, [2]int{3, 2})
	s.await("node 3 hears node 2", func() bool { return late.noted(Heard) == 2 })
	if late.accepting() != 0 || n[1].accepting() == 0 {
		t.Errorf("node 3 accepts new flows of %d buckets, node 2 of %d: %v, %v", late.accepting(), n[1].accepting(), late, n[1])
	}
	s.await("it goes on", func() bool { return late.accepting() > 0 })
	if a, b := late.View().Map, n[1].View().Map; a != b {
		t.Errorf("node 3 goes on by map %v, while node 2 goes by %v", a, b)
	}
	clear(s.cut)
	s.run(3 * time.Second)
	s.want(342, 341, 341)
}

// TestFiltered: the switch keeps what is sent to the group from a node that starts. What
// is sent to it alone is enough for it to take part.
func TestFiltered(t *testing.T) {
	s, _ := cluster(t, 2)
	s.filtered = 3
	s.start(3)
	s.run(time.Duration(4 * dead))
	s.want(342, 341, 341)
}

// TestDeaf: node 3 hears nobody, and is heard. It cannot know that it is not
// alone; the others go on without it.
func TestDeaf(t *testing.T) {
	s, n := cluster(t, 3)
	s.cut[[2]int{1, 3}], s.cut[[2]int{2, 3}] = true, true
	s.torn = true
	// Between the beacon in which it lists only one of them and the one in which it
	// lists neither, the other cannot tell that from a cable that works one way.
	fenced := [2]int64{s.now, s.now}
	s.never("a node that hears is fenced for more than an interval", func() bool {
		for i := range fenced {
			if n[i].until > s.now {
				fenced[i] = s.now
			}
		}
		return s.now-min(fenced[0], fenced[1]) > interval
	})
	s.run(time.Second)
	if n[0].accepting() != 512 || n[1].accepting() != 512 {
		t.Errorf("the others have %d and %d buckets; want 512, 512", n[0].accepting(), n[1].accepting())
	}
	s.run(10 * time.Second)
	if n[0].accepting() != 512 || n[1].accepting() != 512 {
		t.Errorf("later the others have %d and %d buckets; want 512, 512", n[0].accepting(), n[1].accepting())
	}
	s.each = nil
	clear(s.cut)
	s.run(2 * time.Second)
	s.torn = false
	s.run(time.Second)
	s.want(342, 341, 341)
}

// TestPartition: each side serves what it can hear. When the sides hear each other
// again they stop, go by one map, and no flow that either has taken is lost.
func TestPartition(t *testing.T) {
	for _, left := range []int{1, 2} {
		t.Run(fmt.Sprintf("%d from %d", left, 4-left), func(t *testing.T) { partition(t, left) })
	}
}

func partition(t *testing.T, left int) {
	s, n := cluster(t, 4)
	s.want(256, 256, 256, 256)
	before := map[*station][]int{}
	for _, st := range n {
		before[st] = st.buckets()
		st.flows = st.buckets()[:2]
	}
	sides := [][]*station{n[:left], n[left:]}
	other := func(st *station) []*station {
		if slices.Contains(sides[0], st) {
			return sides[1]
		}
		return sides[0]
	}
	for _, st := range n {
		for _, o := range other(st) {
			s.cut[[2]int{st.n, o.n}] = true
		}
	}
	s.torn = true
	s.run(time.Second)
	for _, side := range sides {
		total := 0
		for _, st := range side {
			total += st.accepting()
			st.flows = append(st.flows, minus(st.buckets(), before[st])[0], st.buckets()[200])
		}
		if total != 1024 {
			t.Fatalf("one side serves %d buckets:%s", total, s)
		}
	}

	clear(s.cut)
	met := map[*station]bool{}
	s.each = func() {
		for _, st := range n {
			for _, o := range other(st) {
				p := st.peers[o.Self().ID]
				if met[st] || p.heard != s.now {
					continue
				}
				met[st] = true
				// Unless the other side has learnt of this one's map before; and one
				// that says it hears nobody may be deaf, but stops when it is not.
				if st.until != 0 && p.mapID != st.cur.MapID && len(other(st)) > 1 {
					t.Errorf("node %d has heard the other side, and has the lease %d", st.n, st.until)
				}
			}
		}
	}
	s.await("all have heard the other side", func() bool { return len(met) == 4 })
	// From here on no bucket has two owners, and no flow is dropped or reset.
	s.torn, s.each = false, nil
	took := s.await("all serve by one map", func() bool {
		return !slices.ContainsFunc(n, func(st *station) bool { return st.accepting() != 256 || st.View().Map != n[0].View().Map })
	})
	if took > 2*interval {
		t.Errorf("from there to one map it takes %d ns; want two intervals at most", took)
	}
	s.run(time.Second)
	for _, st := range n {
		if st.accepting() != 256 {
			t.Fatalf("the shares are not even:%s", s)
		}
		for _, f := range st.flows {
			if !st.table[f].Owned() && st.table[f] != filter.Draining {
				t.Errorf("node %d has a flow in bucket %d, which is %v", st.n, f, st.table[f])
			}
		}
	}
	for _, st := range n {
		st.flows = nil
	}
	s.run(2 * time.Second)
	s.want(256, 256, 256, 256)
}

// TestReplayed frames of a peer have no effect, whichever of its incarnations
// they are of, and do not keep a dead one alive.
func TestReplayed(t *testing.T) {
	s, n := cluster(t, 2)
	old := slices.Clone(n[1].said)
	replay := func() {
		t.Helper()
		table, until, was := n[0].table, n[0].until, n[0].noted(Replayed)
		for _, b := range old {
			if n[0].step(Received{b}); n[0].table != table || n[0].until != until {
				t.Fatalf("a replayed frame has an effect:%s", s)
			}
		}
		// The last one, said once more, may be the copy that was sent to it alone.
		if got := n[0].noted(Replayed) - was; got < len(old)-1 {
			t.Errorf("%d of %d replayed frames are noted", got, len(old))
		}
	}
	replay()
	n[1].die()
	s.run(time.Duration(s.delay))
	heard := n[0].peers[mac(2)].heard
	for s.now < heard+dead {
		replay()
		s.runTo(min(s.now+10*ms, heard+dead))
	}
	s.run(1)
	s.want(1024, 0)
	replay()
	s.want(1024, 0)

	again := s.start(2)
	s.run(2 * time.Second)
	s.want(512, 0, 512)
	replay()
	if p := n[0].peers[mac(2)]; p.Peer != again.Self() || !p.live {
		t.Errorf("the peer is now %v", p.Peer)
	}
	s.run(time.Second)
	s.want(512, 0, 512)
}

// ghost is a beacon, from before, of a node that serves and lists nobody who is
// there.
func ghost(id NodeID, incarnation, sequence uint64) *Beacon {
	return &Beacon{
		Peer: Peer{id, incarnation}, Sequence: sequence, State: Serving, HeldKnown: true, Weight: 100, Rules: 1,
		Map: MapID{77, id}, Lowest: id, Heard: []Tag{1, 2, 3},
	}
}

// haunt plays a recording with rising numbers to a node from now on: a ghost
// every interval, as long as another has not come over.
func (s *segment) haunt(st *station, id NodeID, d time.Duration) {
	for i := range int64(d) / interval {
		s.flight = append(s.flight, arrival{s.now + i*interval, st, Received{ghost(id, 77, uint64(i+1))}})
	}
}

// TestGhostDelaysStart: a node that starts and hears another serve that does not
// hear it may be the deaf side of a cable. It waits, but not for ever.
func TestGhostDelaysStart(t *testing.T) {
	for _, tt := range []struct {
		plays       time.Duration
		least, most int64
	}{
		{time.Minute, ghostLimit * dead, ghostLimit*dead + interval},
		{time.Second, int64(time.Second) + dead - interval, int64(time.Second) + dead + interval},
	} {
		s := newSegment(t, ms)
		st := s.start(1)
		s.haunt(st, mac(2), tt.plays)
		took := s.await("it owns all", func() bool { return st.accepting() == 1024 })
		if took < tt.least || took > tt.most {
			t.Errorf("played for %v, a ghost delays the start by %d ns; want %d to %d", tt.plays, took, tt.least, tt.most)
		}
		if st.noted(Ghost) != 1 {
			t.Errorf("the ghost is noted %d times", st.noted(Ghost))
		}
		s.run(time.Second)
		s.want(1024)
	}
}

// TestGhostRecordedOnce: a recording that is played over and over is one only the
// first time.
func TestGhostRecordedOnce(t *testing.T) {
	s := newSegment(t, ms)
	st := s.start(1)
	for range 20 {
		s.haunt(st, mac(2), time.Second)
		s.run(time.Second)
	}
	s.want(1024)
	if st.announced != 1 || st.noted(Replayed) != 171 {
		t.Errorf("announced %d times, %d frames noted as replayed; want 1, 171", st.announced, st.noted(Replayed))
	}
}

// TestGhostMeetsServing: a node that serves goes on. What it cannot exclude is
// that a flow is still held, and that not for ever either.
func TestGhostMeetsServing(t *testing.T) {
	s, n := cluster(t, 1)
	s.never("it stops", func() bool { return n[0].accepting() != 1024 })
	s.haunt(n[0], mac(2), 20*time.Second)
	s.run(time.Duration(ghostLimit*dead + interval + 1))
	s.want(1024)
	s.run(20 * time.Second)
	s.want(1024)
	if len(n[0].live) > 0 || n[0].noted(NewMap) != 1 {
		t.Errorf("%d peers are live, %d maps were made; want 0, 1", len(n[0].live), n[0].noted(NewMap))
	}
}

// TestGhostOfPeer: frames of a former incarnation of a peer, from before this node
// began, while the peer is there.
func TestGhostOfPeer(t *testing.T) {
	s, n := cluster(t, 2)
	s.never("one stops", func() bool { return n[0].accepting() != 512 || n[1].accepting() != 512 })
	s.haunt(n[0], mac(2), 2*time.Second)
	s.run(3 * time.Second)
	s.want(512, 512)
	if n[0].noted(Twins) != 20 || n[0].noted(Lost) > 0 {
		t.Errorf("noted as twins %d times, as lost %d; want 20, 0", n[0].noted(Twins), n[0].noted(Lost))
	}
}

// TestGhostsTakeTurns: recordings of several incarnations, played in turn and for ever
// new, do not keep buckets Shared for ever, be their id that of a live peer or not.
func TestGhostsTakeTurns(t *testing.T) {
	for _, tt := range []struct {
		name string
		id   NodeID
		own  int // buckets of the first node
	}{{"of nobody", mac(3), 512}, {"of a peer", mac(2), 512}} {
		t.Run(tt.name, func(t *testing.T) {
			s, n := cluster(t, 2)
			s.never("one stops", func() bool { return n[0].accepting() != tt.own || n[1].accepting() != 512 })
			const plays = 20 * int64(time.Second)
			began := s.now
			for i := range plays / interval {
				s.flight = append(s.flight, arrival{s.now + i*interval, n[0], Received{ghost(tt.id, 77+uint64(i%12), uint64(i+1))}})
			}
			s.run(time.Second)
			if n[0].count(filter.Shared) == 0 {
				t.Error("no bucket is Shared: this shows nothing")
			}
			s.run(time.Duration(ghostLimit * dead))
			settled := n[0].count(filter.Settled)
			if settled != tt.own || s.now-began > plays {
				t.Errorf("%d buckets are Settled while the recordings go on; want %d", settled, tt.own)
			}
			s.run(20 * time.Second)
			s.want(512, 512)
			if was := n[0].noted(Lost); was > 0 {
				t.Errorf("the peer is lost %d times", was)
			}
			if tt.id != mac(3) {
				return
			}
			// Who is really there is taken up all the same.
			s.each = nil
			s.start(3)
			s.await("the third has its share", func() bool { return n[0].accepting() < 400 && n[1].accepting() < 400 })
		})
	}
}

// TestTwinReplayed: frames of a twin that was really there, recorded and played
// back when it has gone, do not stop this node again.
func TestTwinReplayed(t *testing.T) {
	s := newSegment(t, ms)
	s.torn = true
	s.cut[[2]int{1, 2}], s.cut[[2]int{2, 1}] = true, true
	low := s.start(1, func(c *Config) { c.Self = Peer{mac(1), 10} })
	high := s.start(2, func(c *Config) { c.Self = Peer{mac(1), 20} })
	s.run(time.Second)
	clear(s.cut)
	s.await("the higher yields", func() bool { return high.accepting() == 0 })
	s.torn = false
	s.run(time.Second)
	recorded := slices.Clone(low.said)
	low.die()
	s.await("the twin serves", func() bool { return high.accepting() == 1024 })
	s.never("it stops for a recording", func() bool { return high.accepting() != 1024 })
	was := high.noted(Replayed)
	for _, b := range recorded {
		high.step(Received{b})
	}
	if got := high.noted(Replayed) - was; got < len(recorded)/2 {
		t.Errorf("%d of %d replayed frames are noted", got, len(recorded))
	}
	s.run(time.Second)
}

// TestTwinStarts: a machine with the address of one that serves stays silent until
// that one is gone.
func TestTwinStarts(t *testing.T) {
	for _, other := range []uint64{1, 1 << 63} { // the lower does not come first
		s, n := cluster(t, 1)
		s.never("the one that serves stops", func() bool { return n[0].up && n[0].accepting() != 1024 })
		twin := s.start(2, func(c *Config) { c.Self = Peer{mac(1), other} })
		s.run(10 * time.Second)
		if twin.State() != Listening || twin.noted(TwinNode) == 0 || n[0].noted(TwinNode) == 0 {
			t.Errorf("incarnation %d is %v; notes %v", other, twin.State(), twin.notes)
		}
		n[0].die()
		took := s.await("the twin serves", func() bool { return twin.accepting() == 1024 })
		if took < 3*dead-interval || took > 4*dead {
			t.Errorf("the twin serves %d ns after the other died; want about three times Dead", took)
		}
	}
}

// TestTwinsServe: of two that serve when they meet, the higher incarnation yields.
func TestTwinsServe(t *testing.T) {
	s := newSegment(t, ms)
	s.torn = true
	s.cut[[2]int{1, 2}], s.cut[[2]int{2, 1}] = true, true
	low := s.start(1, func(c *Config) { c.Self = Peer{mac(1), 10} })
	high := s.start(2, func(c *Config) { c.Self = Peer{mac(1), 20} })
	s.run(time.Second)
	if low.accepting() != 1024 || high.accepting() != 1024 {
		t.Fatalf("apart they serve %d and %d buckets", low.accepting(), high.accepting())
	}
	s.never("the lower stops", func() bool { return low.accepting() != 1024 })
	clear(s.cut)
	// The first beacon of the one is answered by the other's, which proves it.
	took := s.await("the higher yields", func() bool { return high.accepting() == 0 })
	if took > 2*interval+2*s.delay || high.noted(Yielded) != 1 || low.noted(Yielded) > 0 {
		t.Errorf("it yields after %d ns, and says so %d times, the other %d", took, high.noted(Yielded), low.noted(Yielded))
	}
	s.torn = false
	s.run(10 * time.Second)
	if high.State() != Listening || low.noted(NewMap) != 1 {
		t.Errorf("later it is %v; the other has made %d maps", high.State(), low.noted(NewMap))
	}
}

// TestTwinRecorded: this node's own address in a recording moves nothing.
func TestTwinRecorded(t *testing.T) {
	s, n := cluster(t, 1)
	s.never("it stops", func() bool { return n[0].accepting() != 1024 })
	s.haunt(n[0], mac(1), 5*time.Second)
	s.run(6 * time.Second)
	own := n[0].said[len(n[0].said)-1]
	if n[0].step(Received{own}); n[0].noted(Echo) != 1 {
		t.Errorf("its own frame: notes %v", n[0].notes)
	}
	s.want(1024)

	// Of a former incarnation of its own it knows itself.
	s.each = nil
	n[0].step(Carrier{false})
	n[0].step(Carrier{true})
	was := n[0].noted(Replayed)
	if n[0].step(Received{own}); n[0].noted(Replayed) != was+1 {
		t.Errorf("a frame of its former incarnation: notes %v", n[0].notes)
	}
	s.run(time.Second)
	s.want(1024)
}

// TestOtherRules: nodes that would sort flows into other buckets share nothing.
func TestOtherRules(t *testing.T) {
	s, _ := cluster(t, 1)
	s.start(2, func(c *Config) { c.Rules = 2 })
	s.run(2 * time.Second)
	s.want(1024, 0)
	n := s.nodes
	for i, st := range n {
		if st.noted(OtherRules) != 1 {
			t.Errorf("node %d notes %v; want once that the other has other rules", i+1, st.notes)
		}
	}
	third := s.start(3, func(c *Config) { c.Rules = 2 })
	s.run(2 * time.Second)
	s.want(1024, 0, 0)
	if third.noted(OtherRules) != 1 {
		t.Errorf("node 3 notes %v; want once that node 1 has other rules", third.notes)
	}
	// Those with other rules take over when the last of the first kind is gone,
	// and then it is their rules that count.
	n[0].die()
	s.run(time.Second)
	s.want(0, 512, 512)
	first := s.start(1)
	s.run(2 * time.Second)
	s.want(0, 512, 512, 0)
	if first.noted(OtherRules) != 2 {
		t.Errorf("node 1, back again, notes %v; want that two nodes have other rules", first.notes)
	}
}

// TestMapsRefused: a map counts only if it comes from a peer that has proved to be
// there, in order, and is above the present one.
func TestMapsRefused(t *testing.T) {
	s, n := cluster(t, 2)
	n[0].asleep = true // what it says now is said by the test
	s.run(time.Duration(s.delay))
	m, peer := n[1], n[0].Self()
	cur, sequence := m.cur, m.peers[mac(1)].mapSequence
	next := func(version uint64) *Map {
		return &Map{MapID: MapID{version, mac(1)}, Parent: cur.MapID, Rules: 1, Members: []NodeID{mac(1)}}
	}
	m.step(Received{ghost(mac(9), 77, 1)}) // heard, and never proven
	for _, tt := range []struct {
		name    string
		version uint64
		from    Peer
		seq     uint64
	}{
		{"of an unknown node", 1000, Peer{mac(5), 1}, 1e9},
		{"of a node that never listed this one", 1000, Peer{mac(9), 77}, 1e9},
		{"of a former incarnation", 1000, Peer{peer.ID, peer.Incarnation - 1}, 1e9},
		{"of this node", 1000, m.Self(), 1e9},
		{"older", cur.Version - 1, peer, sequence + 1},
		{"out of order", 1000, peer, sequence + 1},
		{"the same again", cur.Version, peer, sequence + 2},
	} {
		if m.step(ReceivedMap{next(tt.version), tt.from, tt.seq}); m.cur != cur {
			t.Fatalf("a map %s is adopted", tt.name)
		}
	}
	good := next(cur.Version + 1)
	m.step(ReceivedMap{good, peer, sequence + 3})
	if m.cur != good || m.accepting() > 0 || m.noted(Adopted) == 0 {
		t.Errorf("a good map is not adopted, or does not take its buckets away:%s", s)
	}
	if got := m.said[len(m.said)-1]; got.Map != good.MapID || got.Parent != cur.MapID {
		t.Errorf("its last beacon says map %v, made from %v", got.Map, got.Parent)
	}
}

func TestCarrier(t *testing.T) {
	s, n := cluster(t, 2)
	was := n[1].Self()
	n[1].step(Carrier{false})
	if n[1].accepting() > 0 || n[1].until != 0 || n[1].State() != Listening || n[1].count(filter.Draining) != 512 {
		t.Errorf("without a carrier it is %v, accepts new flows of %d buckets, %d are draining", n[1].State(), n[1].accepting(), n[1].count(filter.Draining))
	}
	if n[1].Self().ID != was.ID || n[1].Self().Incarnation == was.Incarnation {
		t.Errorf("it is now %v, and was %v", n[1].Self(), was)
	}
	s.cut[[2]int{1, 2}], s.cut[[2]int{2, 1}] = true, true
	s.run(5 * time.Second)
	s.want(1024, 0)
	clear(s.cut)
	n[1].step(Carrier{true})
	up := s.now
	took := s.await("it owns something again", func() bool { return n[1].accepting() > 0 })
	if s.now != n[1].listenUntil+2*s.delay || took < dead {
		t.Errorf("%d ns after the carrier is back it owns something again; its time was over after %d", took, n[1].listenUntil-up)
	}
	s.run(time.Second)
	s.want(512, 512)
}

// TestRename: with another wire MAC it is another node.
func TestRename(t *testing.T) {
	s, n := cluster(t, 2)
	n[0].flows = n[0].buckets()[:1]
	n[0].step(Rename{Peer{mac(3), 5}})
	if n[0].Self().ID != mac(3) || n[0].accepting() > 0 || n[0].State() != Listening {
		t.Errorf("it is %v, %v, and accepts new flows of %d buckets", n[0].Self(), n[0].State(), n[0].accepting())
	}
	if n[0].myIndex != Nobody {
		t.Error("it takes what the map gives to its former address for its own")
	}
	s.run(5 * time.Second)
	if n[0].accepting() != 512 || n[1].accepting() != 512 || n[1].noted(Lost) != 1 {
		t.Errorf("later they have %d and %d buckets", n[0].accepting(), n[1].accepting())
	}
	for _, st := range n {
		if v := st.View(); v.Leader != mac(2) || len(v.Members) != 2 {
			t.Errorf("the view is %+v; want node 2 to lead two", v)
		}
	}
}

// TestOneIDTwoMaps: the leader restarts, and what it makes gets the id of a map that it
// does not remember and the others go by.
func TestOneIDTwoMaps(t *testing.T) {
	s, n := cluster(t, 2)
	a, b := n[0], n[1]
	other := *a.cur
	other.Parent = MapID{a.cur.Version - 1, mac(9)}
	for i := range other.Owner {
		other.Owner[i] = 1 - other.Owner[i]
	}
	s.torn = true
	a.cur, a.unsettled = &other, true
	a.step(Drain{})
	s.run(time.Duration(interval + s.delay))
	if a.cur.Version != other.Version+1 {
		t.Errorf("after an interval node 1 goes by map %v, node 2 by %v", a.cur.MapID, b.cur.MapID)
	}
	s.torn = false
	s.run(time.Second)
	s.want(512, 512)
}

// TestMadeWithout: node 2 has made a map while it did not hear node 1, which has noticed
// nothing. It may have taken flows of any bucket.
func TestMadeWithout(t *testing.T) {
	s, n := cluster(t, 2)
	b := *n[1].said[len(n[1].said)-1]
	b.Sequence++
	b.Map, b.Parent = MapID{b.Map.Version + 1, b.ID}, b.Map
	n[0].step(Received{&b})
	if got := n[0].count(filter.Settled); got > 0 {
		t.Errorf("node 1 has %d buckets settled", got)
	}
	s.run(2 * time.Second)
	s.want(512, 512)
}

func TestTooManyPeers(t *testing.T) {
	s, n := cluster(t, 1)
	s.never("it stops", func() bool { return n[0].accepting() != 1024 })
	for i := range 300 {
		n[0].step(Received{ghost(mac(2+i), 1, 1)})
	}
	if got := n[0].noted(TooMany); len(n[0].peers) != MaxNodes-1 || len(n[0].all) != MaxNodes-1 || got != 300-(MaxNodes-1) {
		t.Errorf("%d peers are remembered, %d noted as too many; want %d, %d", len(n[0].peers), got, MaxNodes-1, 300-(MaxNodes-1))
	}
	s.run(time.Duration(interval))
	if got := len(n[0].said[len(n[0].said)-1].Heard); got != MaxNodes-1 {
		t.Errorf("its beacon lists %d peers", got)
	}
	// The dead give way.
	s.run(time.Duration(dead))
	s.start(400)
	s.run(time.Duration(s.delay))
	if n[0].peers[mac(400)] == nil || len(n[0].peers) != MaxNodes-1 {
		t.Error("a new node finds no place, though the others are dead")
	}
}
