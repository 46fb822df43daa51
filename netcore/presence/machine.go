// Package presence tells a node which others are there, and from that which
// buckets are its own. It is the cluster's first and simplest rule of
// ownership: each node draws the same map from the same set of live nodes, so
// nobody has to distribute one.
//
// Nodes send an authenticated layer-2 frame to all several times a second. A
// peer counts only if its frame lists the receiver's present incarnation
// (two-way); so a one-way cable or a frame replayed from before a restart makes
// no member. The serving nodes share the buckets by rendezvous hashing (Thaler,
// Ravishankar 1998), by which a node that comes or goes moves only its own
// share.
//
// A hand-over has no overlap: on a new view a node gives up what it lost at
// once and says so, and takes what it gained when every live peer has said the
// same view. Whoever gave a bucket up keeps serving the flows it holds
// there (Draining) and reports them, until they end; the new owner treats the
// bucket as Shared until then. A node that has not been heard for Params.Dead
// is dead; one that could not send for Params.Lease accepts no new flows, and one
// that hears others but is heard by none gives everything up.
//
// Not in this rule: weights, a common numbered map, a bound on how fast buckets
// move, and authentication of who within the cluster sent a frame.
package presence

import (
	"bytes"
	"cmp"
	"crypto/sha256"
	"encoding/binary"
	"math"
	"slices"
	"time"

	"clonecluster/netcore/filter"
)

// Params are the times of the protocol.
type Params struct {
	Interval time.Duration // between two frames
	Dead     time.Duration // without a frame: the peer is dead
	Lease    time.Duration // after a frame was sent: new flows are accepted
}

// DefaultParams notices a dead node within a second, which a machine with a
// busy or emulated CPU does not fake by being slow.
func DefaultParams() Params {
	return Params{Interval: 100 * time.Millisecond, Dead: time.Second, Lease: 700 * time.Millisecond}
}

// An Event is something that happened: one of Tick, Received, Sent, Flows,
// Carrier, Rename and Leave.
type Event any

type (
	// Tick is the passing of time; Actions.Next says when it is due.
	Tick struct{}
	// Received is an authentic beacon from the wire.
	Received struct{ Beacon Beacon }
	// Sent says that a beacon of Actions.Send is on the wire.
	Sent struct{}
	// Flows are the buckets in which this node's kernel has flows of the VIP,
	// looked up after the PollFlows of the step at Asked.
	Flows struct {
		Buckets Bits
		Asked   int64
	}
	// Carrier says that the NIC has its link, or has lost it.
	Carrier struct{ Up bool }
	// Rename gives the node another identity, because its wire MAC changed.
	Rename struct{ Peer Peer }
	// Leave begins a graceful stop.
	Leave struct{}
)

// Actions are what has to be done after a step, in this order.
type Actions struct {
	Table *filter.Table // install it; nil: as it was
	Lease int64         // accept new flows until then; 0: no more
	// EndQuarantine lists buckets whose former holder is dead, so that the
	// orphans of its flows get their RST.
	EndQuarantine []int
	Send          *Beacon
	PollFlows     bool  // look up the flows and answer with Flows
	Announce      bool  // the node owns buckets after it owned none
	Next          int64 // Tick is due then
	Notes         []Note
}

// A Note is something for the log: Heard, Lost, Silent or Unheard, or else what
// is wrong with a beacon that had no effect.
type Note struct {
	What string
	Peer Peer
}

// The notes of what is normal.
const (
	Heard = "heard" // and hears us
	Lost  = "lost"
	// Silent: this node sent nothing for so long that it may count as dead.
	Silent = "was silent"
	// Unheard: this node hears others and none hears it.
	Unheard = "is heard by nobody"
)

// Machine is the state of the protocol in one node: pure, without clock, socket
// or goroutine. Times are nanoseconds of any clock that never goes back.
type Machine struct {
	self   Peer
	params Params
	state  State
	up     bool

	listenUntil         int64
	lastStep            int64
	lastSent, lastTried int64
	lastPoll            int64
	lostAt              int64 // when buckets were last given up
	sequence            uint64

	peers map[NodeID]*peer
	live  []Peer // two-way, by id; what the last evaluation saw

	view      uint64
	serving   []Peer // the nodes of view
	owner     [filter.Buckets]NodeID
	prevOwner [filter.Buckets]NodeID
	adopted   bool // every live peer goes by view

	table     filter.Table
	held      Bits // flows in buckets not owned, as far as known
	heldKnown bool
	orphaned  Bits // buckets whose owner or holder died

	// unsettled: something that settle reads has changed. Most beacons say
	// what the one before said.
	unsettled bool
	heard     int // peers heard within Params.Dead
}

type peer struct {
	Peer
	heard, firstHeard int64
	lastTwoWay        int64
	sequence          uint64
	hearsMe           bool
	heardMe           bool // in this incarnation it has listed this node's present one
	state             State
	view              uint64
	retired           []uint64 // former incarnations

	// The last report of held flows, and the view it was made under. While a
	// node owns nothing its report holds under any view.
	knows    bool
	knowsAny bool
	knowView uint64
	held     Bits
	// goodPrev: the report held under the view before the present one.
	goodPrev bool
}

// New gives the machine of a node that starts now. flows are the buckets in
// which its kernel already has flows, left by an engine that crashed.
func New(self Peer, params Params, flows Bits, now int64) *Machine {
	m := &Machine{self: self, params: params, up: true, peers: map[NodeID]*peer{}, lastStep: now}
	for b := range m.table {
		if flows.Has(b) {
			m.table[b] = filter.Draining
		}
	}
	m.held, m.heldKnown = flows, true
	m.listen(now)
	m.view, m.unsettled = viewOf(nil), true
	return m
}

// listen (re)starts the time in which a node only hears the others.
func (m *Machine) listen(now int64) {
	m.state = Listening
	// So nodes that start together do not all claim at once.
	jitter := int64(mix(idNumber(m.self.ID), m.self.Incarnation) % uint64(2*m.params.Interval))
	m.listenUntil = now + int64(m.params.Dead) + jitter
}

// Step takes one event and says what to do.
func (m *Machine) Step(ev Event, now int64) Actions {
	var a Actions
	before := m.table
	ownedBefore := owns(&before)
	switch {
	case m.state == Serving && m.silent(now):
		a.note(Silent, m.self)
		m.listen(now)
	case m.state == Listening && now-m.lastStep > int64(m.params.Dead-m.params.Interval):
		m.listen(now) // asleep is not listening
	}
	m.lastStep = now

	urgent := false
	switch ev := ev.(type) {
	case Received:
		m.receive(ev.Beacon, now, &a)
	case Sent:
		m.lastSent = m.lastTried
	case Flows:
		if ev.Asked >= m.lostAt { // older ones lack what came in until then
			urgent = m.takeFlows(ev.Buckets)
		}
	case Carrier:
		if m.up = ev.Up; m.state != Leaving {
			m.listen(now)
		}
	case Rename:
		m.self = ev.Peer
		for _, p := range m.peers {
			p.heardMe = false
		}
		m.sequence, m.lastSent = 0, 0
		if m.state != Leaving {
			m.listen(now)
		}
	case Leave:
		m.state = Leaving
		urgent = true
	}
	switch unheard := m.unheard(now); {
	case m.state == Listening && m.up && now >= m.listenUntil && !unheard && !m.silent(now):
		m.state = Serving
		urgent = true
	case m.state == Serving && unheard:
		a.note(Unheard, m.self)
		m.listen(now)
	}
	if m.evaluate(now, &a) {
		urgent = true
	}
	m.settle(&a)

	if m.table != before {
		t := m.table
		a.Table = &t
		a.Announce = !ownedBefore && owns(&t)
	}
	a.Lease = m.lease()
	if now >= m.nextPoll() {
		a.PollFlows, m.lastPoll = true, now
	}
	if due := m.lastTried + int64(m.params.Interval); urgent || now >= due {
		m.lastTried = now
		a.Send = m.beacon()
	}
	a.Next = min(m.lastTried+int64(m.params.Interval), m.nextPoll())
	return a
}

// View describes what the machine goes by, for status reports.
type View struct {
	Self    Peer
	State   State
	Serving []Peer // by id; this node is one of them when it serves
	Live    []Peer // two-way peers, serving or not
	Adopted bool   // all live peers go by the same view
}

// View gives the present view.
func (m *Machine) View() View {
	return View{Self: m.self, State: m.state, Serving: slices.Clone(m.serving), Live: slices.Clone(m.live), Adopted: m.adopted}
}

func (m *Machine) receive(b Beacon, now int64, a *Actions) {
	if b.ID == m.self.ID {
		a.note("another node has this node's wire MAC", b.Peer)
		return
	}
	p := m.peers[b.ID]
	if p == nil {
		if len(m.peers) >= MaxPeers && !m.forget(now) {
			a.note("more nodes than the protocol allows", b.Peer)
			return
		}
		p = &peer{Peer: b.Peer, firstHeard: now, lastTwoWay: now}
		m.peers[b.ID] = p
	}
	switch {
	case slices.Contains(p.retired, b.Incarnation):
		a.note("replayed frame of a former incarnation", b.Peer)
		return
	case b.Incarnation != p.Incarnation && now-p.heard <= int64(m.params.Dead)/2:
		// Whichever it is, the one that is there comes first. One that has
		// restarted will be silent, and is replaced before it is taken for dead.
		a.note("two incarnations of one node: it has restarted, or two have one wire MAC", b.Peer)
		return
	case b.Incarnation != p.Incarnation:
		retired := append(p.retired, p.Incarnation)
		*p = peer{Peer: b.Peer, firstHeard: now, lastTwoWay: now, retired: retired[max(0, len(retired)-8):]}
	case b.Sequence <= p.sequence:
		if p.sequence > 0 {
			a.note("replayed or reordered frame", b.Peer)
			return
		}
	}
	if now-p.heard > int64(m.params.Dead) {
		p.firstHeard, p.lastTwoWay = now, now
	}
	if p.view != b.View || p.state != b.State || b.HeldKnown && (!p.knows || p.knowsAny != (b.State != Serving) || p.knowView != b.View || p.held != b.Held) {
		m.unsettled = true
	}
	p.heard, p.sequence, p.state, p.view = now, b.Sequence, b.State, b.View
	if p.hearsMe = slices.Contains(b.Peers, m.self); p.hearsMe {
		p.lastTwoWay, p.heardMe = now, true
	}
	if b.HeldKnown {
		p.knows, p.knowsAny, p.knowView, p.held = true, b.State != Serving, b.View, b.Held
	}
}

// forget drops the peer that has been dead the longest.
func (m *Machine) forget(now int64) bool {
	var oldest *peer
	for _, p := range m.peers {
		if now-p.heard > int64(m.params.Dead) && (oldest == nil || p.heard < oldest.heard) {
			oldest = p
		}
	}
	if oldest == nil {
		return false
	}
	delete(m.peers, oldest.ID)
	return true
}

func (m *Machine) takeFlows(flows Bits) (changed bool) {
	m.unsettled = true
	last, lastKnown := m.held, m.heldKnown
	m.held, m.heldKnown = Bits{}, true
	for b := range m.table {
		switch {
		case m.table[b].Owned():
		case flows.Has(b):
			m.held.Set(b)
			m.table[b] = filter.Draining
		default:
			m.table[b] = filter.Foreign
		}
	}
	return m.held != last || !lastKnown
}

// nextPoll is when to look at the kernel's flows: shortly after a loss, and then
// now and again while some are held.
func (m *Machine) nextPoll() int64 {
	switch {
	case !m.heldKnown:
		return m.lastPoll + int64(m.params.Interval)/2
	case m.held != Bits{}:
		return m.lastPoll + int64(time.Second)
	}
	return math.MaxInt64
}

func (m *Machine) isLive(p *peer, now int64) bool {
	return p.hearsMe && now-p.heard <= int64(m.params.Dead)
}

// evaluate finds out who is live and who serves, and adopts a new view.
func (m *Machine) evaluate(now int64, a *Actions) (changed bool) {
	var live, serving []Peer
	heard := 0
	for _, p := range m.peers {
		if now-p.heard <= int64(m.params.Dead) {
			heard++
		}
		if !m.isLive(p, now) {
			continue
		}
		live = append(live, p.Peer)
		if p.state == Serving {
			serving = append(serving, p.Peer)
		}
	}
	if m.state == Serving {
		serving = append(serving, m.self)
	}
	slices.SortFunc(live, comparePeers)
	slices.SortFunc(serving, comparePeers)
	for _, p := range live {
		if !slices.Contains(m.live, p) {
			a.note(Heard, p)
		}
	}
	for _, p := range m.live {
		if !slices.Contains(live, p) {
			a.note(Lost, p)
			m.orphan(p.ID)
		}
	}
	// Peers learn from a beacon that they are heard: the sooner the better.
	changed = !slices.Equal(live, m.live)
	m.live = live
	if v := viewOf(serving); v != m.view {
		m.adopt(v, serving)
		changed = true
	}
	if changed || heard != m.heard {
		m.heard, m.unsettled = heard, true
	}
	return changed
}

// orphan marks the buckets that a dead peer owned or held flows in.
func (m *Machine) orphan(id NodeID) {
	p := m.peers[id]
	for b := range m.table {
		if m.owner[b] == id || m.prevOwner[b] == id || p != nil && p.held.Has(b) {
			m.orphaned.Set(b)
		}
	}
}

// adopt takes up a view: what is lost is given up here, what is gained waits
// for settle.
func (m *Machine) adopt(view uint64, serving []Peer) {
	for _, p := range m.peers {
		p.goodPrev = p.knows && (p.knowsAny || p.knowView == m.view)
	}
	m.view = view
	m.prevOwner = m.owner
	m.serving = serving
	ids := make([]NodeID, len(serving))
	for i, p := range serving {
		ids[i] = p.ID
	}
	for b := range m.owner {
		m.owner[b] = Owner(b, ids)
		if m.owner[b] != m.self.ID && m.table[b].Owned() {
			m.table[b] = filter.Draining
			// Look only after the filter is sure to have stopped accepting.
			m.heldKnown, m.lastPoll, m.lostAt = false, m.lastStep, m.lastStep
		}
	}
}

// settle takes gained buckets once all go by the view, and tells for each owned
// bucket whether a live peer may hold flows in it.
func (m *Machine) settle(a *Actions) {
	if !m.unsettled {
		return
	}
	m.unsettled = false
	// Those that listen have to agree as well: one that begins to serve at this
	// very moment does not, and so two cannot both think they are alone.
	m.adopted = !m.contested(false)
	for _, l := range m.live {
		if m.peers[l.ID].view != m.view {
			m.adopted = false
		}
	}
	if m.state != Serving {
		return
	}
	for b := range m.table {
		if m.owner[b] != m.self.ID || !m.adopted && !m.table[b].Owned() {
			continue
		}
		if m.mayBeHeld(b) {
			m.table[b] = filter.Shared
			continue
		}
		m.table[b] = filter.Settled
		if m.orphaned.Has(b) {
			a.EndQuarantine = append(a.EndQuarantine, b)
		}
	}
	m.orphaned.clearOwned(&m.table)
}

// mayBeHeld reports whether a peer holds flows in bucket b, or has not yet said
// that it does not. A peer that is heard counts even if it is not (yet) two-way:
// the flows of an engine that has just started again are still there.
func (m *Machine) mayBeHeld(b int) bool {
	for _, p := range m.peers {
		if m.lastStep-p.heard > int64(m.params.Dead) {
			continue
		}
		fresh := p.knows && (p.knowsAny || p.knowView == m.view)
		clear := (fresh || p.goodPrev && m.prevOwner[b] != p.ID) && !p.held.Has(b)
		if !clear {
			return true
		}
	}
	return false
}

func (m *Machine) lease() int64 {
	if m.state != Serving || m.lastSent == 0 || m.contested(true) {
		return 0
	}
	return m.lastSent + int64(m.params.Lease)
}

// silent reports whether this node, asleep or unable to send, has not been heard
// for so long that the others may have taken it for dead.
func (m *Machine) silent(now int64) bool {
	return now-m.lastSent > int64(m.params.Dead-m.params.Interval)
}

// unheard reports whether this node hears others and none hears it. Then they
// go on without it, and it must not own anything. Who has a two-way peer knows
// that its own sending works, and that it is the other that is deaf.
func (m *Machine) unheard(now int64) bool {
	unheard := false
	for _, p := range m.peers {
		if m.isLive(p, now) {
			return false
		}
		if now-p.heard <= int64(m.params.Dead) && (m.state == Listening || now-p.lastTwoWay > int64(m.params.Dead)) {
			unheard = true
		}
	}
	return unheard
}

// contested reports whether this node has nobody to agree with, but hears one
// that serves without listing it: that one takes this node for dead and has
// taken its buckets, or is about to. With former set, only one counts that did
// list this node before, and not one that has yet to hear it.
func (m *Machine) contested(former bool) bool {
	if len(m.live) > 0 {
		return false
	}
	for _, p := range m.peers {
		if m.lastStep-p.heard <= int64(m.params.Dead) && p.state == Serving && !p.hearsMe && (p.heardMe || !former) {
			return true
		}
	}
	return false
}

func (m *Machine) beacon() *Beacon {
	m.sequence++
	b := &Beacon{Peer: m.self, Sequence: m.sequence, State: m.state, View: m.view, HeldKnown: m.heldKnown, Held: m.held}
	for _, p := range m.peers {
		if m.lastStep-p.heard <= int64(m.params.Dead) {
			b.Peers = append(b.Peers, p.Peer)
		}
	}
	slices.SortFunc(b.Peers, comparePeers)
	return b
}

func (a *Actions) note(what string, p Peer) { a.Notes = append(a.Notes, Note{what, p}) }

func (h *Bits) clearOwned(t *filter.Table) {
	for b := range t {
		if t[b] == filter.Settled {
			h[b/8] &^= 1 << (b % 8)
		}
	}
}

func owns(t *filter.Table) bool {
	return slices.ContainsFunc(t[:], filter.State.Owned)
}

func comparePeers(a, b Peer) int {
	return cmp.Or(bytes.Compare(a.ID[:], b.ID[:]), cmp.Compare(a.Incarnation, b.Incarnation))
}

// viewOf names a set of nodes, which must be sorted.
func viewOf(serving []Peer) uint64 {
	h := sha256.New()
	for _, p := range serving {
		h.Write(p.ID[:])
		h.Write(binary.BigEndian.AppendUint64(nil, p.Incarnation))
	}
	return binary.BigEndian.Uint64(h.Sum(nil))
}

// Owner gives the node that owns bucket b among the serving ones: the one with
// the highest hash of bucket and node id. No node: the zero NodeID.
func Owner(b int, serving []NodeID) NodeID {
	var best NodeID
	var bestWeight uint64
	for _, id := range serving {
		w := mix(idNumber(id), uint64(b)+1)
		if best == (NodeID{}) || w > bestWeight || w == bestWeight && bytes.Compare(id[:], best[:]) < 0 {
			best, bestWeight = id, w
		}
	}
	return best
}

func idNumber(id NodeID) uint64 {
	return uint64(id[0])<<40 | uint64(id[1])<<32 | uint64(id[2])<<24 | uint64(id[3])<<16 | uint64(id[4])<<8 | uint64(id[5])
}

// mix is the finaliser of SplitMix64 (Steele, Lea, Flood 2014) over both words.
func mix(a, b uint64) uint64 {
	x := a*0x9e3779b97f4a7c15 ^ b*0xd1342543de82ef95
	x ^= x >> 30
	x *= 0xbf58476d1ce4e5b9
	x ^= x >> 27
	x *= 0x94d049bb133111eb
	return x ^ x>>31
}
