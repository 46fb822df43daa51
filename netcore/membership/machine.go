// Package membership decides which buckets a node owns. Nodes find each other
// by authenticated layer-2 frames, one of them makes a map of who owns which
// bucket, and the map changes hands without two nodes ever owning a bucket.
//
// # Alive is two-way
//
// A node sends a beacon every Interval, which lists whom it hears. A peer is
// live if it was heard within Dead and has listed this node's present
// incarnation within Dead. So a one-way cable or a frame recorded before this
// node started makes no member.
//
// # Fences
//
// A node accepts new flows until Lease after its last beacon left. A peer that
// has not heard it for three quarters of Dead no longer lists it, and takes its
// buckets only after Dead; a node that sees itself no longer listed by a peer that it hears accepts
// nothing new. So it stops before the others begin, unless both directions fail
// at once, which is a partition. One that did not send for Lease, since it slept,
// begins anew with another incarnation.
//
// # The map
//
// Among those that take part the one with the lowest id, be it heard directly or
// by a peer, is the leader. It makes the map, numbered above every one it has
// heard of, whenever the set of members, their weights or (Balance Load) their
// load demand it. The others adopt the map with the highest id. Shares are exact
// to one bucket; which buckets move is by rendezvous hashing (Thaler, Ravishankar
// 1998), and no more of them than must.
//
// # Hand-over without overlap
//
// On adopting a map a node gives up what it lost at once and sends a beacon at
// once. It takes what it gained when every live peer says the same map. Whoever
// gave a bucket up keeps serving the flows it holds there (Draining), and reports
// them until they end; the new owner treats the bucket as Shared until then.
// Peers that go by maps that do not follow from each other, as after a
// partition, accept nothing new until they go by one.
//
// The state machine has no clock, socket or goroutine; Node runs it.
package membership

import (
	"fmt"
	"math"
	"slices"
	"time"

	"clonecluster/netcore/filter"
)

// Params are the times of the protocol.
type Params struct {
	Interval time.Duration // between two beacons
	Dead     time.Duration // without a beacon: the peer is dead
	Lease    time.Duration // after a beacon was sent: new flows are accepted
}

// Detect gives the times that notice a dead node after dead: a beacon three
// times as often, a lease of two thirds.
func Detect(dead time.Duration) Params {
	return Params{Interval: dead / 3, Dead: dead, Lease: dead * 2 / 3}
}

// Balance says who gets how many buckets.
type Balance uint8

// The balances. The zero value is the default.
const (
	Even Balance = iota // by static weight
	Load                // the weight follows the load
)

// Policy is what a leader goes by.
type Policy struct {
	Balance Balance
	// Moves is how many buckets a second may change hands because of load.
	Moves int
	// StopWhenSick leaves all buckets unowned when the services of all nodes
	// fail their checks. Otherwise they serve on.
	StopWhenSick bool
}

// Config is what a Machine starts with.
type Config struct {
	Self   Peer
	Params Params
	Policy Policy
	Weight int    // static, 1 to 1000
	Rules  uint64 // filter.Config.Fingerprint: nodes with other rules share nothing with this one
	// Flows are the buckets in which this node's kernel already has flows, left
	// by an engine that crashed.
	Flows Bits
	// Weakness is left zero but by the tests of the tests.
	Weakness Weakness
}

// Weakness leaves out one of the precautions, so that the simulator can show
// that it notices.
type Weakness uint8

// What can be left out.
const (
	None             Weakness = iota
	TakeAtOnce                // gains are taken without the others' consent
	NoLease                   // the lease never ends
	TrustOneWay               // who is heard is live
	NoListening               // a node claims as soon as it starts
	KeepLost                  // lost buckets are given up only at the next beacon
	ForgetFlows               // flows in lost buckets are not looked for
	NeverShared               // a gained bucket is settled at once
	OldMaps                   // any map is adopted, even an older one
	NoFence                   // not being listed has no effect
	IgnoreDivergent           // maps that do not follow from each other are no reason to stop
	SendOnce                  // a map is sent when it is made, and not again
	KeepQuarantine            // the quarantine of a dead node's buckets goes on
	NoAuthentication          // frames with a wrong key are taken; not the machine but the simulator leaves it out
	AnySettings               // any settings are taken, even older ones
	SettingsOnce              // settings are said when they are new, and not again
	weaknesses
)

// Weaknesses are all but None, with their names.
var weaknessNames = [weaknesses]string{
	"none", "take-at-once", "no-lease", "trust-one-way", "no-listening", "keep-lost", "forget-flows", "never-shared",
	"old-maps", "no-fence", "ignore-divergent", "send-once", "keep-quarantine", "no-authentication", "any-settings", "settings-once",
}

func (w Weakness) String() string {
	if w >= weaknesses {
		return "unknown"
	}
	return weaknessNames[w]
}

// AllWeaknesses lists what can be left out.
func AllWeaknesses() (all []Weakness) {
	for w := None + 1; w < weaknesses; w++ {
		all = append(all, w)
	}
	return all
}

// An Event is something that happened: one of Tick, Received, ReceivedMap,
// ReceivedSettings, Sent, FlowsSeen, Carrier, Rename, Health, LoadSeen, Order, Drain,
// StandAside, Stop, Leave and Restart.
type Event any

type (
	// Tick is the passing of time; Actions.Next says when it is due.
	Tick struct{}
	// Received is an authentic beacon from the wire.
	Received struct{ Beacon *Beacon }
	// ReceivedMap is an authentic map from the wire, and whose frame it was.
	ReceivedMap struct {
		Map      *Map
		From     Peer
		Sequence uint64
	}
	// ReceivedSettings are authentic settings from the wire, and whose frame it was.
	ReceivedSettings struct {
		Settings *Settings
		From     Peer
		Sequence uint64
	}
	// Sent says that the beacon of the step at At is on the wire.
	Sent struct{ At int64 }
	// FlowsSeen are the buckets in which this node's kernel has flows of the VIP,
	// looked up after the PollFlows of the step at Asked.
	FlowsSeen struct {
		Buckets Bits
		Asked   int64
	}
	// Carrier says that the NIC has its link, or has lost it.
	Carrier struct{ Up bool }
	// Rename gives the node another identity, because its wire MAC changed.
	Rename struct{ Self Peer }
	// Health says whether the node's services pass their checks.
	Health struct{ OK bool }
	// LoadSeen is how busy the node is.
	LoadSeen struct {
		Busy  uint16 // thousandths
		Flows uint32
	}
	// Drain gives the node's buckets to the others, or (not On) takes part again.
	Drain struct{ On bool }
	// StandAside is Drain for a reason of the node's own, which holds whatever it is told.
	StandAside struct{ On bool }
	// Stop makes the node own nothing any more, whether others take over or not.
	Stop struct{}
	// Leave is the node's last word.
	Leave struct{}
	// Restart is that of a node whose engine is to be started again at once.
	Restart struct{}
)

// Actions are what has to be done after a step: table, lease and quarantines
// first, then the map, then the beacon, which says that it is in use.
type Actions struct {
	Table *filter.Table // install it; nil: as it was
	Lease int64         // accept new flows until then; 0: no more
	// EndQuarantine lists buckets whose former holder is dead, so that the
	// orphans of its flows get their RST.
	EndQuarantine []int
	Beacon        *Beacon  // send it to the group
	Unicast       []NodeID // and to these, which do not seem to hear the group
	// Map is to be sent to the group; its first frame has number MapSequence.
	Map         *Map
	MapSequence uint64
	MapUnicast  []NodeID // and to these, which do not seem to hear the group and lack it
	// Settings are to be sent to the group, as number SettingsSequence.
	Settings         *Settings
	SettingsSequence uint64
	SettingsUnicast  []NodeID // and to these, which do not seem to hear the group
	PollFlows        bool     // look up the flows and answer with FlowsSeen
	Announce         bool     // the node owns buckets after it owned none
	Next             int64    // Tick is due then
	Notes            []Note
}

// Note is something for the log: what happened, to whom.
type Note struct {
	What NoteKind
	Peer Peer
	Map  MapID
	Why  string // of NewMap and Lost
	// Settings are those of NewSettings.
	Settings *Settings
}

// NoteKind says what happened. The zero value is invalid.
type NoteKind uint8

// The notes: first what is normal, then, from Replayed on, what is wrong with a
// frame that had no effect.
const (
	_           NoteKind = iota
	Heard                // the peer hears us
	Lost                 // the peer is dead
	Left                 // the peer has said that it leaves
	Restarts             // the peer's engine has said that another will take its place
	Silent               // this node sent nothing for so long that it may count as dead
	Unheard              // this node hears the peer, which takes part and no longer hears it
	NewMap               // this node leads, and has made a map
	Adopted              // the map in use is another
	NewSettings          // other settings hold
	FailOpen             // the services of all nodes fail; the cluster serves on
	AllFailed            // the services of all nodes fail; the cluster stops
	Recovered            // some node's services work again
	Yielded              // this node is silent for a twin that was there before
	Replayed
	TwinNode   // another node has this node's wire MAC
	Twins      // two nodes have one wire MAC, or it has restarted
	Echo       // this node's own frame came back
	OtherRules // the peer has other rules and shares no buckets with this node
	Ghost      // serves, and hears nobody: recorded frames, or a one-way cable
	TooMany
	noteKinds
)

var noteTexts = [noteKinds]string{
	Heard: "heard", Lost: "lost", Left: "left", Restarts: "restarts", Silent: "was silent", Unheard: "does not hear this node, which hears it",
	NewMap: "made a map", Adopted: "adopted a map", NewSettings: "goes by other settings",
	FailOpen: "the services of all nodes fail their checks; serving on", AllFailed: "the services of all nodes fail their checks; nobody serves",
	Recovered: "services pass their checks again", Yielded: "yields to another node with the same wire MAC",
	Replayed: "replayed or reordered frame", TwinNode: "another node has this node's wire MAC",
	Twins: "two incarnations of one node: it has restarted, or two have one wire MAC",
	Echo:  "this node's own frame came back: a loop in the network", OtherRules: "a node with another configuration of ports, key or address; it shares no buckets with this one",
	Ghost: "a node that serves and does not hear this one: a cable that works one way, filtered multicast, or recorded frames", TooMany: "more nodes than the protocol allows",
}

func (k NoteKind) String() string {
	if int(k) >= len(noteTexts) || noteTexts[k] == "" {
		return "invalid"
	}
	return noteTexts[k]
}

// Refused reports whether the note tells of a frame that had no effect.
func (k NoteKind) Refused() bool { return k >= Replayed }

// Machine is the state of the protocol in one node: pure, without clock, socket
// or goroutine. Times are nanoseconds of any clock that never goes back.
type Machine struct {
	cfg   Config
	self  Peer
	tag   Tag
	state State
	up    bool
	drain bool // it was asked to
	aside bool // it has to
	sick  bool
	busy  uint16
	flows uint32

	started     int64 // of the present listening
	listenUntil int64
	lastStep    int64
	lastSent    int64
	lastTried   int64
	soon        bool // there is something to say that need not wait for the next interval
	lastPoll    int64
	lostAt      int64 // when buckets were last given up
	sequence    uint64
	retired     []uint64 // own former incarnations

	peers    map[NodeID]*peer
	all      []*peer // the same, by id
	live     []*peer // the two-way ones, by id
	heard    int     // incarnations of peers that were heard within Dead
	twin     *twin
	twins    []lastWord // of those with this node's id
	fence    bool       // somebody that is heard does not hear this node
	fencedAt int64      // when fence last changed
	lowest   NodeID
	leader   NodeID // zero: nobody, or not known

	mapMaker // what a leader remembers
	spreader

	cur      *Map
	history  []MapID // adopted before
	myIndex  uint8   // in cur
	mapSent  int64
	adopted  int64 // when cur was
	agreed   bool  // all live peers go by cur
	allSick  bool
	strange  bool // somebody goes by a map that does not follow from cur
	nextLook int64

	table     filter.Table
	owned     int  // buckets that are Settled or Shared
	held      Bits // flows in buckets not owned, as far as known
	heldKnown bool
	orphaned  Bits // buckets whose owner or holder died
	unsettled bool // something that settle reads has changed
	changed   bool // the table
}

type peer struct {
	Peer
	tag Tag
	// first is when it, or one with its id that never proved to be there, was heard.
	heard, first     int64
	otherHeard       int64    // another incarnation was; 0: never
	otherSince       int64    // the first time under this incarnation
	other            lastWord // of that
	lastListed       int64
	sequence         uint64
	mapSequence      uint64
	settingsSequence uint64
	listsMe          bool // in its last beacon
	proven           bool // it has listed this node's present incarnation
	live             bool
	listed           bool  // in this node's beacons
	gone             bool  // it has said so
	lapsed           bool  // it took part when it was lost or found, and does not yet go by the present map
	alone            int64 // until then it is sent beacons by unicast as well
	laggedSince      int64
	state            State
	sick             bool
	weight           uint16
	busy             uint16
	flows            uint32
	rules            uint64
	mapID            MapID
	parent           MapID
	lowest           NodeID
	tags             []Tag
	retired          []lastWord // of former incarnations
	// former has proved to be there, before this one that has not yet.
	former       lastWord
	liveSince    int64
	reported     MapID // the map of its last report of held flows
	ownsNothing  bool  // at that report
	reportedHeld Bits
	// may are the buckets in which it may hold flows.
	may Bits
	// away is until when its engine may take to restart, and awayHeld are the
	// buckets of the flows that wait for it; 0: it does not restart.
	away     int64
	awayHeld Bits
	// notedGhost and notedRules: it was said once.
	notedGhost, notedRules bool
}

// lastWord is the last that was heard of an incarnation.
type lastWord struct{ incarnation, sequence uint64 }

// twin is another node with this node's id.
type twin struct {
	Peer
	heard  int64
	proven bool
	state  State
}

// New gives the machine of a node that starts now.
func New(cfg Config, now int64) *Machine {
	m := &Machine{
		cfg: cfg, self: cfg.Self, tag: cfg.Self.Tag(), up: true, peers: map[NodeID]*peer{},
		lastStep: now, held: cfg.Flows, heldKnown: true, myIndex: Nobody, unsettled: true,
	}
	for b := range m.table {
		if cfg.Flows.Has(b) {
			m.table[b] = filter.Draining
		}
	}
	m.listen(now)
	return m
}

// Table gives the table that is in force before the first step.
func (m *Machine) Table() filter.Table { return m.table }

// listen (re)starts the time in which a node only hears the others.
func (m *Machine) listen(now int64) {
	if m.state < Stopping {
		m.state = Listening
	}
	m.giveUp(func(int) bool { return true }, now)
	// So nodes that start together do not all claim at once.
	jitter := int64(mix(idNumber(m.self.ID), m.self.Incarnation) % uint64(m.cfg.Params.Interval))
	m.started = now
	m.listenUntil = now + int64(m.cfg.Params.Dead) + jitter
	if m.cfg.Weakness == NoListening {
		m.listenUntil = now
	}
}

// renew begins a new incarnation, so that nothing that was said to the former
// one counts, and listens.
func (m *Machine) renew(now int64) {
	m.retired = append(m.retired[max(0, len(m.retired)-7):], m.self.Incarnation)
	m.self.Incarnation = mix(m.self.Incarnation, uint64(now)|1)
	m.tag = m.self.Tag()
	m.sequence = 0
	for _, p := range m.all {
		p.proven, p.listsMe = false, false
	}
	m.listen(now)
}

// Step takes one event and says what to do.
func (m *Machine) Step(ev Event, now int64) Actions {
	now = max(now, m.lastStep) // a clock that goes back stands still
	var a Actions
	ownedBefore := m.owned > 0
	slept := now-m.lastStep > int64(m.cfg.Params.Lease)
	m.lastStep = now
	switch {
	case m.state.takesPart() && m.silent(now):
		a.note(Silent, m.self)
		m.renew(now)
	case m.state == Listening && slept: // asleep is not listening
		m.renew(now)
	}

	urgent := m.take(ev, now, &a)
	m.evaluate(now, &a)
	if m.enter(now, &a) {
		urgent = true
	}
	if m.lead(now, &a) {
		urgent = true
	}
	m.settle(&a)

	if m.changed {
		m.changed = false
		t := m.table
		a.Table = &t
		a.Announce = !ownedBefore && m.owned > 0
	}
	m.publish(now, urgent, &a)
	return a
}

// take takes what the event says.
func (m *Machine) take(ev Event, now int64, a *Actions) (urgent bool) {
	switch ev := ev.(type) {
	case Received:
		return m.receive(ev.Beacon, now, a)
	case ReceivedMap:
		return m.receiveMap(ev, now, a)
	case ReceivedSettings:
		m.receiveSettings(ev, now, a)
	case Order:
		if next := m.settings.apply(ev, m.self.ID); next != nil {
			m.goBy(next, now, a)
		}
	case Sent:
		m.lastSent = max(m.lastSent, ev.At)
	case FlowsSeen:
		if ev.Asked >= m.lostAt { // older ones lack what came in until then
			return m.takeFlows(ev.Buckets)
		}
	case Carrier:
		if m.up = ev.Up; m.state < Stopping {
			m.renew(now)
		}
	case Rename:
		m.self = ev.Self
		m.myIndex = oldIndex(m.cur, m.self.ID) // what the map gives to the former id is lost
		m.renew(now)
	case Health:
		urgent = m.sick == ev.OK
		m.sick, m.unsettled = !ev.OK, true
	case LoadSeen:
		m.busy, m.flows = min(ev.Busy, 1000), ev.Flows
	case Drain:
		urgent = m.ownNothing(&m.drain, ev.On)
	case StandAside:
		urgent = m.ownNothing(&m.aside, ev.On)
	case Stop:
		if m.state != Leaving {
			m.state = Stopping
		}
		m.giveUp(func(int) bool { return true }, now)
		return true
	case Leave:
		m.state = Leaving
		m.giveUp(func(int) bool { return true }, now)
		return true
	case Restart:
		m.state = Restarting
		m.giveUp(func(int) bool { return true }, now)
		return true
	}
	return urgent
}

// ownNothing sets, or takes back, a reason for which this node wants to own nothing.
func (m *Machine) ownNothing(reason *bool, on bool) (news bool) {
	news = *reason != on
	*reason, m.unsettled = on, true
	if m.state.takesPart() {
		m.state = m.partState()
	}
	return news
}

// unwell reports whether this node is to own nothing while another one is well, also
// where that drains.
func (m *Machine) unwell() bool { return m.sick || m.aside }

// partState is the state of a node that takes part.
func (m *Machine) partState() State {
	if m.drain || m.aside {
		return Draining
	}
	return Serving
}

func (m *Machine) receive(b *Beacon, now int64, a *Actions) (urgent bool) {
	if b.ID == m.self.ID {
		return m.meetTwin(b, now, a)
	}
	p := m.peers[b.ID]
	if p != nil && p.Incarnation != b.Incarnation {
		if p = m.succeed(p, b, now, a); p == nil {
			return false
		}
	}
	switch {
	case p == nil:
		if len(m.peers) >= MaxNodes-1 && !m.forget(now, a) {
			a.note(TooMany, b.Peer)
			return false
		}
		p = m.newPeer(b.Peer)
	case b.Sequence == p.sequence: // the copy that was sent to this node alone
		return false
	case b.Sequence < p.sequence:
		a.note(Replayed, b.Peer)
		return false
	}
	if p.first == 0 {
		p.first = now
	}
	wasFresh, listedMe := now-p.heard <= int64(m.cfg.Params.Dead), p.listsMe
	p.listsMe = slices.Contains(b.Heard, m.tag)
	if m.cfg.Weakness == TrustOneWay {
		p.listsMe = true
	}
	if p.listsMe {
		p.lastListed = now
		if !p.proven {
			p.proven, p.otherSince = true, 0
			p.retire(p.former)
			p.former = lastWord{}
		}
	} else if listedMe {
		p.mayHoldAll() // from now on it may take buckets without asking
	}
	p.heard, p.sequence, p.tags = now, b.Sequence, b.Heard
	if !wasFresh || p.state != b.State || p.mapID != b.Map || p.parent != b.Parent || p.lowest != b.Lowest || p.sick != b.Sick ||
		p.weight != b.Weight || p.rules != b.Rules || p.listsMe != listedMe {
		m.unsettled = true
	}
	if p.mapID != b.Map {
		p.laggedSince = now
		if m.cur != nil && b.Map.Version != 0 && b.Map != m.cur.MapID && !slices.Contains(m.history, b.Map) &&
			(b.Map.Leader == b.ID || b.Parent != m.cur.MapID) {
			p.mayHoldAll() // it goes, or went, by a map that was made without this node
		}
	}
	p.state, p.sick, p.weight, p.busy, p.flows, p.rules = b.State, b.Sick, b.Weight, b.Busy, b.Flows, b.Rules
	p.mapID, p.parent, p.lowest = b.Map, b.Parent, b.Lowest
	if m.cur != nil && p.mapID == m.cur.MapID {
		p.lapsed = false
	}
	if other := p.rules != m.cfg.Rules; other != p.notedRules {
		if p.notedRules = other; other {
			a.note(OtherRules, p.Peer)
		}
	}
	if p.state >= Leaving {
		p.gone = true
	}
	if b.HeldKnown {
		p.reported, p.reportedHeld, p.ownsNothing = b.Map, b.Held, !b.State.takesPart()
		m.trust(p, now)
	}
	switch {
	case p.state == Restarting && p.proven:
		if !b.HeldKnown {
			p.mayHoldAll() // nobody took its buckets over, and it has not looked
		}
		p.away, p.awayHeld, m.unsettled = now+int64(restartTime), p.may, true
	case p.state == Leaving && p.proven:
		p.away = 0
	}
	return false
}

// restartTime is how long the flows of a node that said it restarts are left
// alone without a word from it. An engine is back within a second; TCP is patient
// for longer than this; and if it does not come back, its clients wait this long
// for the RST that tells them (I6).
const restartTime = 30 * time.Second

// trust takes what a peer says of the flows it holds. It is the whole truth only
// under the map that this node goes by too, or if the peer owns nothing, and as
// long as the peer asks this node before it takes a bucket: while it lists it,
// and has had the time to learn that it is listed itself.
func (m *Machine) trust(p *peer, now int64) {
	if !p.live || !p.listsMe || now-p.liveSince < 2*int64(m.cfg.Params.Interval) {
		return
	}
	if !p.ownsNothing && (m.cur == nil || p.reported != m.cur.MapID) {
		return
	}
	if p.may != p.reportedHeld {
		p.may = p.reportedHeld
		m.unsettled = true
	}
	if p.away != 0 && p.state < Leaving {
		p.away, m.unsettled = 0, true // it is back, and says itself what it holds
	}
}

// succeed decides about a beacon of another incarnation of a known peer, and
// gives the record for it; nil: it has no effect. The incarnation that is there
// comes first, and one that has restarted is taken up when the former is dead.
// What has not listed this node may be a recording, and gives way to what does.
func (m *Machine) succeed(p *peer, b *Beacon, now int64, a *Actions) *peer {
	former := p.former
	if p.proven {
		former = lastWord{p.Incarnation, p.sequence}
	}
	lists := slices.Contains(b.Heard, m.tag)
	for _, w := range append(p.retired, p.former) {
		if w.incarnation == b.Incarnation && b.Sequence <= w.sequence {
			a.note(Replayed, b.Peer)
			return nil
		}
	}
	// If it has restarted, its kernel may still have flows. A recording says that
	// once, and several of them only for a while.
	if p.other.incarnation != b.Incarnation || b.Sequence > p.other.sequence {
		p.other, p.otherHeard = lastWord{b.Incarnation, b.Sequence}, now
		if p.otherSince == 0 {
			p.otherSince = now
		}
	}
	// A recording that is played on and on may not keep the place for ever.
	fresh := now-p.heard <= int64(m.cfg.Params.Dead) && !p.gone && (p.proven || now-p.first <= 2*int64(m.cfg.Params.Dead))
	switch {
	case !p.proven && lists:
	case fresh && (p.state != Listening || !b.State.takesPart() || !lists):
		a.note(Twins, b.Peer)
		return nil
	}
	m.part(p, a)
	next := m.newPeer(b.Peer)
	next.retired, next.otherHeard = p.retired, p.heard
	next.away, next.awayHeld = p.away, p.awayHeld
	if !p.proven {
		next.first, next.otherSince = p.first, p.first
		next.retire(lastWord{p.Incarnation, p.sequence})
	}
	if former.incarnation != b.Incarnation {
		next.former = former
	}
	return next
}

// retire makes an incarnation one of the past, of which older frames have no effect.
func (p *peer) retire(w lastWord) {
	if w != (lastWord{}) {
		p.retired = append(p.retired[max(0, len(p.retired)-7):], w)
	}
}

func (m *Machine) newPeer(id Peer) *peer {
	p := &peer{Peer: id, tag: id.Tag()}
	p.mayHoldAll()
	m.soon = true // it shall know that it is heard
	if old := m.peers[id.ID]; old != nil {
		m.all[slices.Index(m.all, old)] = p
	} else {
		m.all = append(m.all, p)
		slices.SortFunc(m.all, func(x, y *peer) int { return x.ID.Compare(y.ID) })
	}
	m.peers[id.ID] = p
	m.unsettled = true
	return p
}

func (p *peer) mayHoldAll() {
	for i := range p.may {
		p.may[i] = 0xff
	}
	p.reported, p.ownsNothing = MapID{}, false
}

// forget drops the peer that has been dead the longest.
func (m *Machine) forget(now int64, a *Actions) bool {
	var oldest *peer
	for _, p := range m.all {
		if now-p.heard > int64(m.cfg.Params.Dead) && (oldest == nil || p.heard < oldest.heard) {
			oldest = p
		}
	}
	if oldest == nil {
		return false
	}
	m.part(oldest, a)
	delete(m.peers, oldest.ID)
	m.all = slices.DeleteFunc(m.all, func(p *peer) bool { return p == oldest })
	return true
}

// meetTwin handles a beacon with this node's own id: of two machines with one
// wire MAC the one that serves goes on, and of two that do the one with the
// lower incarnation.
func (m *Machine) meetTwin(b *Beacon, now int64, a *Actions) bool {
	switch {
	case b.Incarnation == m.self.Incarnation:
		a.note(Echo, b.Peer)
		return false
	case slices.Contains(m.retired, b.Incarnation):
		a.note(Replayed, b.Peer)
		return false
	}
	w := slices.IndexFunc(m.twins, func(w lastWord) bool { return w.incarnation == b.Incarnation })
	switch {
	case w < 0:
		m.twins = append(m.twins[max(0, len(m.twins)-7):], lastWord{b.Incarnation, b.Sequence})
	case b.Sequence > m.twins[w].sequence:
		m.twins[w].sequence = b.Sequence
	case b.Sequence < m.twins[w].sequence:
		a.note(Replayed, b.Peer)
		return false
	default: // the copy that was sent to this node alone
		return false
	}
	a.note(TwinNode, b.Peer)
	if m.twin == nil || m.twin.Peer != b.Peer {
		m.twin, m.soon = &twin{Peer: b.Peer}, true
	}
	m.twin.heard, m.twin.state = now, b.State
	// One that lists this node is no recording.
	m.twin.proven = m.twin.proven || slices.Contains(b.Heard, m.tag)
	if m.yields(now) && m.state.takesPart() {
		a.note(Yielded, b.Peer)
		m.listen(now)
		return true
	}
	return false
}

// yields reports whether a twin comes before this node.
func (m *Machine) yields(now int64) bool {
	t := m.twin
	if t == nil || !t.proven || now-t.heard > 3*int64(m.cfg.Params.Dead) {
		return false
	}
	if t.state.takesPart() != m.state.takesPart() {
		return t.state.takesPart()
	}
	return t.Incarnation < m.self.Incarnation
}

func (m *Machine) receiveMap(ev ReceivedMap, now int64, a *Actions) bool {
	p := m.peers[ev.From.ID]
	// Only of a peer that has proved to be there: a recorded map has no effect.
	if p == nil || p.Peer != ev.From || !p.proven || ev.Sequence <= p.mapSequence {
		return false
	}
	p.mapSequence = ev.Sequence
	if ev.Map.Leader == p.ID && p.state == Listening {
		p.state, m.unsettled = Serving, true // its beacon is still on the way
	}
	if m.cur != nil && ev.Map.Compare(m.cur.MapID) <= 0 && m.cfg.Weakness != OldMaps {
		return false
	}
	m.adopt(ev.Map, now, a)
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
			m.set(b, filter.Draining)
		default:
			m.set(b, filter.Foreign)
		}
	}
	return m.held != last || !lastKnown
}

func (m *Machine) set(b int, s filter.State) {
	was := m.table[b]
	if was == s {
		return
	}
	switch {
	case s.Owned() && !was.Owned():
		m.owned++
	case !s.Owned() && was.Owned():
		m.owned--
	}
	m.table[b] = s
	m.changed = true
}

// giveUp gives up the owned buckets for which lost holds.
func (m *Machine) giveUp(lost func(b int) bool, now int64) {
	if m.owned == 0 {
		return
	}
	any := false
	for b := range m.table {
		if !m.table[b].Owned() || !lost(b) {
			continue
		}
		any = true
		if m.cfg.Weakness == ForgetFlows {
			m.set(b, filter.Foreign)
			continue
		}
		m.set(b, filter.Draining)
	}
	if any && m.cfg.Weakness != ForgetFlows {
		// Look only after the filter is sure to have stopped accepting.
		m.heldKnown, m.lastPoll, m.lostAt = false, now, now
	}
}

// adopt goes by another map: what is lost is given up here, what is gained waits
// for settle.
func (m *Machine) adopt(next *Map, now int64, a *Actions) {
	old := m.cur
	if old != nil {
		m.history = append(m.history[max(0, len(m.history)-7):], old.MapID)
	}
	m.cur, m.myIndex, m.adopted = next, next.index(m.self.ID), now
	m.unsettled, m.reweighted = true, false
	for _, p := range m.all {
		if i := oldIndex(old, p.ID); i != Nobody {
			for b := range old.Owner {
				if old.Owner[b] == i {
					p.may.Set(b)
				}
			}
		}
		p.ownsNothing = false // by now it may
		m.trust(p, now)
		if p.mapID == next.MapID {
			p.lapsed = false
		}
	}
	if m.cfg.Weakness != KeepLost {
		m.giveUp(func(b int) bool { return !m.mine(b) }, now)
	}
	a.Notes = append(a.Notes, Note{What: Adopted, Peer: m.self, Map: next.MapID})
}

func oldIndex(m *Map, id NodeID) uint8 {
	if m == nil {
		return Nobody
	}
	return m.index(id)
}

// mine reports whether the present map gives bucket b to this node.
func (m *Machine) mine(b int) bool { return m.myIndex != Nobody && m.cur.Owner[b] == m.myIndex }

// evaluate finds out who is live, who leads, and whether somebody does not hear
// this node.
func (m *Machine) evaluate(now int64, a *Actions) {
	changed := false
	dead := int64(m.cfg.Params.Dead)
	heard := 0
	for _, p := range m.all {
		fresh := now-p.heard <= dead
		if fresh && !m.past(p, now) {
			heard++
		}
		if m.otherNews(p, now) {
			heard++
		}
		if now < p.away {
			heard++
		}
		if listed := now-p.heard <= m.listing() && !p.gone; listed != p.listed {
			p.listed, m.soon = listed, true
		}
		live := fresh && p.proven && !p.gone && now-p.lastListed <= dead
		if live == p.live {
			continue
		}
		changed, p.live = true, live
		if live {
			p.liveSince = now
			if m.cfg.Weakness != SettingsOnce {
				m.saySoon(now) // it may lack the settings, or have newer ones
			}
			// Until now this node has taken buckets without asking it.
			p.lapsed = p.lapsed || p.state.takesPart() && m.cur != nil && p.mapID != m.cur.MapID
			a.note(Heard, p.Peer)
			m.live = append(m.live, p)
			slices.SortFunc(m.live, func(x, y *peer) int { return x.ID.Compare(y.ID) })
			continue
		}
		m.part(p, a)
	}
	if heard != m.heard {
		m.heard, m.unsettled = heard, true
	}
	if m.twin != nil && now-m.twin.heard > 3*dead {
		m.twin = nil
	}
	if deaf := m.fenced(now); (deaf != nil) != m.fence {
		m.fence, m.unsettled = deaf != nil, true
		m.fencedAt = now
		if m.fence && m.state.takesPart() {
			a.note(Unheard, deaf.Peer)
		}
	}
	if m.fence && m.state.takesPart() && now-m.fencedAt > dead && m.served() {
		m.listen(now)
		m.unsettled, m.soon = true, true
	}
	lowest, leader := m.leaders()
	if lowest != m.lowest {
		m.lowest, changed = lowest, true
	}
	m.leader = leader
	if changed {
		m.unsettled, m.soon = true, true
	}
}

// part takes a peer out of the live ones. It may have taken new flows since it was last
// heard.
func (m *Machine) part(p *peer, a *Actions) {
	i := slices.Index(m.live, p)
	if i < 0 {
		return
	}
	p.live = false
	m.live = slices.Delete(m.live, i, i+1)
	if p.gone && p.state == Restarting {
		a.note(Restarts, p.Peer)
	} else if p.gone {
		a.note(Left, p.Peer)
	} else {
		a.Notes = append(a.Notes, Note{What: Lost, Peer: p.Peer, Why: m.evidence(p)})
		p.lapsed = p.state.takesPart()
	}
	index := oldIndex(m.cur, p.ID)
	for b := range m.table {
		if p.may.Has(b) || index != Nobody && m.cur.Owner[b] == index {
			m.orphaned.Set(b)
		}
	}
	if !p.gone {
		p.mayHoldAll()
	}
}

// evidence says why a peer counts as dead.
func (m *Machine) evidence(p *peer) string {
	silent := time.Duration(m.lastStep - p.heard)
	if silent <= m.cfg.Params.Dead {
		return fmt.Sprintf("its beacons come, but for %v none has said that it hears this node", time.Duration(m.lastStep-p.lastListed).Round(time.Millisecond))
	}
	return fmt.Sprintf("no beacon for %v, the limit is %v", silent.Round(time.Millisecond), m.cfg.Params.Dead)
}

// fenced gives a peer that is heard and no longer hears this node, and so has taken
// its buckets or is about to. One that hears none of the
// live peers either is deaf, and cannot.
func (m *Machine) fenced(now int64) *peer {
	if m.cfg.Weakness == NoFence {
		return nil
	}
	for _, p := range m.all {
		if p.proven && !p.gone && !p.listsMe && p.state < Stopping && now-p.heard <= int64(m.cfg.Params.Dead) && !m.deaf(p) {
			return p
		}
	}
	return nil
}

// served reports whether a live peer takes part. Then a node that is fenced for long
// steps back: whoever made the map would leave its share to it, or wait for it to make
// one.
func (m *Machine) served() bool {
	return slices.ContainsFunc(m.live, func(p *peer) bool { return p.state.takesPart() })
}

func (m *Machine) deaf(p *peer) bool {
	others := false
	for _, l := range m.live {
		if l == p {
			continue
		}
		if others = true; slices.Contains(p.tags, l.tag) {
			return false
		}
	}
	return others // if there are none, it may be this node that is not heard
}

// leaders gives the lowest node that takes part and that this node hears, and the
// leader: the lowest of those and of those that live peers hear.
func (m *Machine) leaders() (lowest, leader NodeID) {
	rules := m.commonRules()
	least := func(into *NodeID, id NodeID) {
		if id != (NodeID{}) && (*into == (NodeID{}) || id.Compare(*into) < 0) {
			*into = id
		}
	}
	if m.state.takesPart() && m.cfg.Rules == rules {
		lowest = m.self.ID
	}
	for _, p := range m.live {
		if p.state.takesPart() && p.rules == rules {
			least(&lowest, p.ID)
		}
	}
	leader = lowest
	for _, p := range m.live {
		if p.state.takesPart() && p.rules == rules {
			least(&leader, p.lowest)
		}
	}
	return lowest, leader
}

// commonRules are the rules of those that may own buckets: those of the present
// map as long as one of its kind takes part, else those of the lowest node.
func (m *Machine) commonRules() uint64 {
	var lowest NodeID
	rules := m.cfg.Rules
	if m.state.takesPart() {
		lowest = m.self.ID
		if m.cur != nil && m.cfg.Rules == m.cur.Rules {
			return m.cur.Rules
		}
	}
	for _, p := range m.live {
		if !p.state.takesPart() {
			continue
		}
		if m.cur != nil && p.rules == m.cur.Rules {
			return m.cur.Rules
		}
		if lowest == (NodeID{}) || p.ID.Compare(lowest) < 0 {
			lowest, rules = p.ID, p.rules
		}
	}
	return rules
}

// ghostLimit bounds, in multiples of Dead, how long a node that starts waits for
// peers that serve and never list it: they may be recorded frames.
const ghostLimit = 30

// unicastFor is how long, in multiples of Dead, a peer that did not list this node
// is sent beacons by unicast as well, since multicast may be filtered.
const unicastFor = 30

// enter begins to take part when it is time.
func (m *Machine) enter(now int64, a *Actions) (urgent bool) {
	if m.state != Listening || !m.up || now < m.listenUntil || m.fence || m.silent(now) || m.yields(now) {
		return false
	}
	if g := m.ghost(now); g != nil {
		if !g.notedGhost {
			g.notedGhost = true
			a.note(Ghost, g.Peer)
		}
		if now-m.started < ghostLimit*int64(m.cfg.Params.Dead) {
			return false
		}
	}
	m.state = m.partState()
	m.unsettled = true
	m.evaluate(now, a)
	return true
}

// ghost gives a peer that takes part and has never listed this node.
func (m *Machine) ghost(now int64) *peer {
	for _, p := range m.all {
		if !p.proven && !p.gone && p.state.takesPart() && now-p.heard <= int64(m.cfg.Params.Dead) && !m.deaf(p) {
			return p
		}
	}
	return nil
}

// settle takes gained buckets once all go by the map, and tells for each owned
// bucket whether a live peer may hold flows in it.
func (m *Machine) settle(a *Actions) {
	if !m.unsettled {
		return
	}
	m.unsettled = false
	if m.cfg.Weakness == KeepLost && m.cur != nil && m.agreedOn() {
		m.giveUp(func(b int) bool { return !m.mine(b) }, m.lastStep)
	}
	m.strange = m.diverges()
	if m.agreed = m.cur != nil && !m.fence && !m.strange && m.agreedOn(); m.agreed {
		m.forgetOrphans()
	}
	if m.cur == nil || !m.state.takesPart() || m.myIndex == Nobody {
		return
	}
	may := m.mayBeHeld()
	takes := m.agreed || m.cfg.Weakness == TakeAtOnce
	for b, o := range m.cur.Owner {
		if o != m.myIndex || !takes && !m.table[b].Owned() {
			continue
		}
		if may.Has(b) && m.cfg.Weakness != NeverShared {
			m.set(b, filter.Shared)
			continue
		}
		m.set(b, filter.Settled)
		if m.orphaned.Has(b) && m.cfg.Weakness != KeepQuarantine {
			a.EndQuarantine = append(a.EndQuarantine, b)
			m.orphaned.Clear(b)
		}
	}
}

// forgetOrphans leaves the orphans of buckets that live peers own to those.
func (m *Machine) forgetOrphans() {
	if m.orphaned == (Bits{}) {
		return
	}
	var theirs [256]bool
	for _, p := range m.live {
		if i := m.cur.index(p.ID); i != Nobody {
			theirs[i] = true
		}
	}
	for b, o := range m.cur.Owner {
		if theirs[o] {
			m.orphaned.Clear(b)
		}
	}
}

// agreedOn reports whether all live peers go by the present map. Those that
// listen have to agree as well: one that begins to serve at this very moment
// does not, and so two cannot both think they are alone.
func (m *Machine) agreedOn() bool {
	for _, p := range m.live {
		if !m.goesBy(p) {
			return false
		}
	}
	return true
}

// goesBy reports whether a peer goes by the present map. A leader that has restarted
// and does not know what it had made may give another map the same id; then the maps
// that they were made from differ.
func (m *Machine) goesBy(p *peer) bool {
	return p.mapID == m.cur.MapID && p.parent == m.cur.Parent
}

// diverges reports whether a live peer goes by a map that neither precedes nor
// follows the present one: both may own the same buckets.
func (m *Machine) diverges() bool {
	if m.cfg.Weakness == IgnoreDivergent {
		return false
	}
	for _, p := range m.all {
		if !p.proven || p.gone || !p.state.takesPart() || m.lastStep-p.heard > int64(m.cfg.Params.Dead) || p.mapID.Version == 0 {
			continue
		}
		if m.cur == nil {
			return true
		}
		if len(p.tags) == 0 && m.deaf(p) {
			continue // deaf: it cannot know that it is not alone
		}
		if m.goesBy(p) || p.parent == m.cur.MapID || slices.Contains(m.history, p.mapID) && !p.lapsed {
			continue
		}
		return true
	}
	return false
}

// past reports whether a peer that has never listed this node has had the time to:
// it is a recording, or one that cannot hear.
func (m *Machine) past(p *peer, now int64) bool {
	return !p.proven && now-p.first > ghostLimit*int64(m.cfg.Params.Dead)
}

// otherNews reports whether another incarnation of a peer was heard, which may have
// flows. That ends in time even if recordings of several are played for ever.
func (m *Machine) otherNews(p *peer, now int64) bool {
	dead := int64(m.cfg.Params.Dead)
	return p.otherHeard != 0 && now-p.otherHeard <= dead && (p.otherSince == 0 || now-p.otherSince <= ghostLimit*dead)
}

// listing is how long after it was heard a peer is listed, in nanoseconds. It ends
// before Dead: a beacon without it, sent at that time, is how the peer learns that
// it is not heard before its buckets are taken. One lost beacon does not do that.
func (m *Machine) listing() int64 {
	return int64(m.cfg.Params.Lease) + int64(m.cfg.Params.Interval)/4
}

// mayBeHeld are the buckets in which a peer holds flows, or has not yet said
// that it does not. A peer that is heard counts even if it is not (yet) two-way:
// the flows of an engine that has just started again are still there.
func (m *Machine) mayBeHeld() (may Bits) {
	dead := int64(m.cfg.Params.Dead)
	for _, p := range m.all {
		if m.lastStep < p.away {
			for i := range may {
				may[i] |= p.awayHeld[i]
			}
		}
		switch {
		case m.otherNews(p, m.lastStep):
			for i := range may {
				may[i] = 0xff
			}
			return may
		case m.past(p, m.lastStep):
		case !p.gone && m.lastStep-p.heard <= dead:
			for i := range may {
				may[i] |= p.may[i]
			}
		}
	}
	return may
}

func (m *Machine) lease() int64 {
	if !m.state.takesPart() || m.lastSent == 0 || m.fence || m.strange || m.owned == 0 {
		return 0
	}
	if m.cfg.Weakness == NoLease {
		return math.MaxInt64
	}
	return m.lastSent + int64(m.cfg.Params.Lease)
}

// silent reports whether this node, asleep or unable to send, has not been heard
// for so long that the others may take it for dead before its next beacon.
func (m *Machine) silent(now int64) bool {
	return now-m.lastSent > int64(m.cfg.Params.Lease) && m.cfg.Weakness != NoLease
}

// publish says what has to be sent, and when to come back.
func (m *Machine) publish(now int64, urgent bool, a *Actions) {
	a.Lease = m.lease()
	if now >= m.nextPoll() {
		a.PollFlows, m.lastPoll = true, now
	}
	if now >= m.nextBeacon() || urgent {
		m.lastTried, m.soon = now, false
		a.Beacon = m.beacon(now)
		a.Unicast = m.apart(now, func(*peer) bool { return true })
	}
	nextMap := m.nextMap(now)
	if now >= nextMap {
		m.mapSent = now
		a.Map, a.MapSequence = m.cur, m.sequence+1
		m.sequence += uint64(MapFrames(len(m.cur.Members)))
		// Not at once: in large clusters that would be much for nothing.
		if now-m.adopted >= int64(m.cfg.Params.Interval) {
			a.MapUnicast = m.apart(now, func(p *peer) bool { return p.mapID.Compare(m.cur.MapID) < 0 })
		}
		nextMap = m.nextMap(now)
	}
	m.maySay(now, a)
	a.Next = min(m.nextBeacon(), m.nextPoll(), m.nextExpiry(now), nextMap, m.nextLook)
	if m.settings != nil {
		a.Next = min(a.Next, m.sayAt)
	}
	if m.state == Listening && now < m.listenUntil {
		a.Next = min(a.Next, m.listenUntil)
	}
}

// nextBeacon is when the next beacon is due that is not urgent. News of peers
// come in crowds, so they wait a little for each other.
func (m *Machine) nextBeacon() int64 {
	if m.soon {
		return m.lastTried + int64(m.cfg.Params.Interval)/10
	}
	return m.lastTried + int64(m.cfg.Params.Interval)
}

// nextPoll is when to look at the kernel's flows: shortly after a loss, and then
// now and again while some are held.
func (m *Machine) nextPoll() int64 {
	switch {
	case !m.heldKnown:
		return m.lastPoll + int64(m.cfg.Params.Interval)/2
	case m.held == Bits{}:
	case m.state == Draining || m.state == Stopping: // somebody waits for their end
		return m.lastPoll + 2*int64(m.cfg.Params.Interval)
	default:
		return m.lastPoll + int64(time.Second)
	}
	return math.MaxInt64
}

// nextExpiry is when the first live peer is no longer listed, or dead, if nothing
// more is heard of it.
func (m *Machine) nextExpiry(now int64) int64 {
	next := int64(math.MaxInt64)
	for _, p := range m.live {
		next = min(next, min(p.heard, p.lastListed)+int64(m.cfg.Params.Dead)+1)
		if p.listed {
			next = min(next, p.heard+m.listing()+1)
		}
	}
	return max(next, now+1)
}

func (m *Machine) beacon(now int64) *Beacon {
	m.sequence++
	b := &Beacon{
		Peer: m.self, Sequence: m.sequence, State: m.state, Sick: m.unwell(), HeldKnown: m.heldKnown, Held: m.held,
		Weight: uint16(m.cfg.Weight), Busy: m.busy, Flows: m.flows, Rules: m.cfg.Rules, Lowest: m.lowest,
		Heard: make([]Tag, 0, len(m.peers)+1),
	}
	if m.cur != nil {
		b.Map, b.Parent = m.cur.MapID, m.cur.Parent
	}
	for _, p := range m.all {
		if p.listed {
			b.Heard = append(b.Heard, p.tag)
			// Once that has helped, it is what keeps the two together.
			if !p.listsMe {
				p.alone = now + unicastFor*int64(m.cfg.Params.Dead)
			}
		}
	}
	if m.twin != nil {
		b.Heard = append(b.Heard, m.twin.Tag())
	}
	slices.Sort(b.Heard)
	return b
}

// apart gives the peers, by id, that may be behind a switch that filters multicast and
// for which that holds.
func (m *Machine) apart(now int64, that func(*peer) bool) (ids []NodeID) {
	for _, p := range m.all {
		if p.listed && now < p.alone && that(p) {
			ids = append(ids, p.ID)
		}
	}
	return ids
}

func (a *Actions) note(what NoteKind, p Peer) { a.Notes = append(a.Notes, Note{What: what, Peer: p}) }

// View describes what the machine goes by, for status reports.
type View struct {
	Self    Peer
	State   State
	Sick    bool
	Leader  NodeID // zero: none known
	Map     MapID  // version 0: none
	Agreed  bool   // all live peers go by the same map
	Fenced  bool   // accepts nothing new, since somebody does not hear it or goes by a map of its own
	AllSick bool   // the services of all nodes fail
	Members []Member
	// Owners is the present map, not to be changed; nil: none.
	Owners *Map
	// Settings are what was set at run time, not to be changed; nil: nothing.
	Settings *Settings
	Balance  Balance // that a leader goes by
}

// Owner gives the node that the present map gives bucket b to; false: none.
func (v View) Owner(b int) (NodeID, bool) {
	if v.Owners == nil || int(v.Owners.Owner[b]) >= len(v.Owners.Members) {
		return NodeID{}, false
	}
	return v.Owners.Members[v.Owners.Owner[b]], true
}

// Member is one node as another knows it.
type Member struct {
	Peer
	State   State
	Self    bool
	Live    bool // two-way; of oneself true
	Sick    bool
	Weight  int
	Busy    int // thousandths
	Flows   int
	Map     MapID
	Buckets int // by the present map
	// May are the buckets in which another node may have flows without owning them.
	May Bits
}

// View gives the present view: this node and all that are heard, by id.
func (m *Machine) View() View {
	v := View{
		Self: m.self, State: m.state, Sick: m.sick, Leader: m.leader, Agreed: m.agreed, Fenced: m.fence || m.strange, AllSick: m.allSick,
		Settings: m.settings, Balance: m.balance(),
	}
	var count [256]int
	if m.cur != nil {
		v.Map, v.Owners = m.cur.MapID, m.cur
		for _, o := range m.cur.Owner {
			count[o]++
		}
	}
	share := func(id NodeID) int {
		if i := oldIndex(m.cur, id); i != Nobody {
			return count[i]
		}
		return 0
	}
	v.Members = append(v.Members, Member{
		Peer: m.self, State: m.state, Self: true, Live: true, Sick: m.unwell(), Weight: m.weight(m.self.ID, m.cfg.Weight), Busy: int(m.busy), Flows: int(m.flows),
		Map: v.Map, Buckets: share(m.self.ID),
	})
	for _, p := range m.all {
		if m.lastStep-p.heard > int64(m.cfg.Params.Dead) || p.gone {
			continue
		}
		v.Members = append(v.Members, Member{
			Peer: p.Peer, State: p.state, Live: p.live, Sick: p.sick, Weight: m.weight(p.ID, int(p.weight)), Busy: int(p.busy), Flows: int(p.flows),
			Map: p.mapID, Buckets: share(p.ID), May: p.may,
		})
	}
	slices.SortFunc(v.Members, func(a, b Member) int { return a.ID.Compare(b.ID) })
	return v
}

// Self gives the node's present identity.
func (m *Machine) Self() Peer { return m.self }

// Drained reports whether this node owns nothing, and has looked which flows it
// has since.
func (m *Machine) Drained() bool { return m.owned == 0 && m.heldKnown }

// String is for the timelines of the simulator.
func (m *Machine) String() string {
	id := "none"
	if m.cur != nil {
		id = m.cur.MapID.String()
	}
	return fmt.Sprintf("%v, map=%s, owned=%d live=%d agreed=%v fence=%v strange=%v", m.state, id, m.owned, len(m.live), m.agreed, m.fence, m.strange)
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
