// Package doctor says whether a network will do what the cluster needs of it, and
// names the cause when it will not. The nodes send each other a few probes, each in
// another way, and tell what arrived; from what did not, and from what is heard
// besides, follow the findings.
//
// [Machine] decides and has no clock, socket or goroutine in it; [Doctor] runs it.
// The frames are those of membership.Probe, described in docs/protocol.md.
//
// What switches do is that of IEEE 802.1Q, 8.8 (learning, flooding, ageing); what
// hypervisors send after a migration is a RARP of RFC 903, or a gratuitous ARP.
package doctor

import (
	"slices"
	"time"

	"clonecluster/netcore/membership"
)

// Config is what a Machine goes by.
type Config struct {
	CloneMAC [6]byte
	MTU      int           // of the NIC, in bytes, as long as nobody says otherwise
	Interval time.Duration // between two rounds of probes
	// Quick is the time between two rounds when something is to be found out now.
	Quick time.Duration
}

// The defaults of Config.
const (
	Interval = 30 * time.Second
	Quick    = 400 * time.Millisecond
)

const (
	copies  = 2 // of what goes to more than one
	targets = 8 // to how many nodes a round sends frames of their own
	// confirmed is how many rounds in a row have to tell of a fault before it counts.
	confirmed = 2
	atStart   = 4 // quick rounds
	// remember is how long something that was heard once is told of.
	remember = 10 * time.Minute
	// patience is how long a node may be heard without hearing this one.
	patience = 5 * time.Second
	// grace is how long a stranger who speaks for the VIP may take to prove that it
	// is a node.
	grace = 10 * time.Second
	// holdBack is how long a conflict that was only counted waits for word that the
	// cluster is in directed mode, in which the director's own packets count as such.
	holdBack = 5 * time.Second
	mostKept = 64 // of what anybody on the segment can make this node remember
)

// A Frame is a probe and where it goes.
type Frame struct {
	To    [6]byte
	Probe membership.Probe
}

// A Stage is a part of a burst: so many frames in so long.
type Stage struct {
	Frame
	Rate int // frames a second
	For  time.Duration
}

// Actions are what a step asks for, in this order.
type Actions struct {
	// Announce: say on the segment that the VIP is here, as after a failover.
	Announce bool
	Frames   []Frame
	// Ask: have everybody who has the VIP say so.
	Ask bool
	// Burst, if any, is sent beside the steps; its end is told by BurstSent.
	Burst []Stage
	Next  int64 // when to step again, if nothing happens before
}

// link is a pair of nodes: what one sent and the other got.
type link struct {
	round  uint32
	at     int64
	missed [len(membership.Trials)]int // rounds in a row
	got    [len(membership.Trials)]bool
	again  int // rounds in a row that had duplicates
	// healed: what was lost has come, which nobody has looked into yet.
	healed bool
}

// note takes what came of a round, and reports whether something came that was lost.
func (l *link) note(r membership.Row, tried func(membership.Way) bool, now int64) (heals bool) {
	if l.at != 0 && r.Round == l.round {
		return false
	}
	l.round, l.at = r.Round, now
	for i, w := range membership.Trials {
		switch {
		case r.Got[i] > 0:
			heals = heals || l.missed[i] >= confirmed
			l.got[i], l.missed[i] = true, 0
		case tried(w):
			l.missed[i]++
			l.got[i] = l.got[i] && l.missed[i] < confirmed
		}
	}
	l.again = min(l.again+1, confirmed)
	if r.Again == 0 {
		l.again = 0
	}
	l.healed = l.healed || heals
	return heals
}

// passage is what is known of a way between two nodes.
type passage int

const (
	unknown passage = iota
	passes
	lost
)

func (l *link) passage(w membership.Way) passage {
	i := slices.Index(membership.Trials[:], w)
	switch {
	case l == nil || i < 0:
		return unknown
	case l.missed[i] >= confirmed:
		return lost
	case l.got[i] && l.missed[i] == 0:
		return passes
	}
	return unknown
}

// node is another node of the cluster.
type node struct {
	membership.Peer
	tag     membership.Tag
	heard   int64
	since   uint32 // the round of this node when it was heard first
	mtu     int
	round   uint32 // that is coming in
	begun   int64
	seen    [len(membership.Trials) + 1]uint64 // copies by way
	again   int
	row     *membership.Row // what came of its last whole round
	told    uint32          // the last of its rounds that told of others' rounds
	lags    int             // how often it did so without this node
	mine    uint32          // of this node's rounds, the last that it told of
	moved   bool
	direct  bool // it takes the cluster to be in directed mode
	able    bool
	links   map[membership.Tag]*link // what it got of others
	bursts  map[membership.Burst]int // Got is 0 in the keys
	burstOf uint32
}

// A Machine is the doctor of one node.
type Machine struct {
	cfg      Config
	self     membership.Peer
	tag      membership.Tag
	started  int64
	round    uint32
	sequence uint64
	next     int64 // the next round
	last     int64 // the last one
	hurry    int   // quick rounds to come
	asking   bool  // have the others send theirs, too
	doubted  int64 // when a suspicion was last looked into
	turn     int   // whose turn it is to get frames of its own
	tried    map[uint32][]membership.NodeID

	nodes map[membership.NodeID]*node
	mine  map[membership.Tag]*link // what this node got of others
	known map[membership.NodeID]bool

	oneWay    map[membership.NodeID]int64 // heard, and does not hear this node, since
	leaks     int
	leakAt    int64
	leakWhat  string
	strangers map[stranger]int64
	claims    map[claim]*claimed
	conflicts conflicts
	servers   map[string]int64
	returned  int64 // a frame of this node's came back
	twin      int64
	renamed   int64
	renames   int

	place    place
	moving   int // rounds that are still to say that the VIP was announced
	movedAt  int64
	movedBy  membership.NodeID
	before   place
	snooping bool

	exam  exam
	storm *storm

	directed, able bool              // of this node
	director       membership.NodeID // if it is directed
	healed         int64             // when something last came again that had been lost
	badAt, goodAt  int64             // since when the clone MAC does not, or does, reach all
}

// New makes the doctor of a node.
func New(cfg Config, self membership.Peer, now int64) *Machine {
	m := &Machine{
		cfg: cfg, started: now, nodes: map[membership.NodeID]*node{}, known: map[membership.NodeID]bool{}, oneWay: map[membership.NodeID]int64{},
		strangers: map[stranger]int64{}, claims: map[claim]*claimed{}, servers: map[string]int64{},
	}
	m.begin(self, now)
	return m
}

// begin starts from nothing, as another start of a node.
func (m *Machine) begin(self membership.Peer, now int64) {
	m.self, m.tag = self, self.Tag()
	m.round, m.tried = 0, map[uint32][]membership.NodeID{}
	m.mine = map[membership.Tag]*link{}
	clear(m.nodes)
	m.place, m.before = place{}, place{}
	m.rush(atStart, now)
}

// rush asks for quick rounds of all nodes.
func (m *Machine) rush(rounds int, now int64) {
	m.hurry, m.asking = max(m.hurry, rounds), true
	m.next = min(m.next, max(now, m.last+int64(m.cfg.Quick)))
	if m.round == 0 {
		m.next = now
	}
}

// Self says who this node is now. A new start or address forgets what was known.
func (m *Machine) Self(p membership.Peer, now int64) {
	if p == m.self {
		return
	}
	if p.ID != m.self.ID {
		m.renamed, m.renames = now, m.renames+1
	}
	m.begin(p, now)
}

// MTU says what the NIC has from the next round on, in bytes; 0: nothing is known.
func (m *Machine) MTU(mtu int) {
	if mtu > 0 {
		m.cfg.MTU = mtu
	}
}

// Members says whom the membership protocol knows: true who hears this node as well.
func (m *Machine) Members(live map[membership.NodeID]bool, now int64) {
	m.known = live
	m.acquit()
	for id, both := range live {
		switch _, since := m.oneWay[id]; {
		case both:
			delete(m.oneWay, id)
		case !since:
			m.oneWay[id] = now
		}
	}
	for id := range m.oneWay {
		if _, heard := live[id]; !heard {
			delete(m.oneWay, id)
		}
	}
}

// Hear takes an authentic probe that came in.
func (m *Machine) Hear(p *membership.Probe, now int64) {
	if p.ID == m.self.ID {
		if p.Incarnation == m.self.Incarnation {
			m.returned = now
		} else {
			m.twin = now
		}
		return
	}
	n := m.node(p, now)
	if n == nil || p.Round < n.round {
		return // late, or a recording
	}
	n.heard, n.mtu, n.direct, n.able = now, int(p.MTU), p.Directed, p.Able
	if p.Way == membership.BurstClone || p.Way == membership.BurstNode {
		if n.burstOf != p.Round {
			n.burstOf, n.bursts = p.Round, map[membership.Burst]int{}
		}
		key := membership.Burst{Of: n.tag, Way: p.Way, Stage: p.Copy}
		if len(n.bursts) < membership.MaxBursts || n.bursts[key] > 0 {
			n.bursts[key]++
		}
		return
	}
	if p.Round != n.round {
		m.finish(n, now)
		n.round, n.begun = p.Round, now
		n.seen, n.again = [len(n.seen)]uint64{}, 0
		if p.Moved && !n.moved {
			m.movedAt, m.movedBy, m.before = now, n.ID, m.place
		}
		n.moved = p.Moved
		if p.Hurry && now-m.last >= int64(m.cfg.Quick)/2 {
			m.next = now
		}
	}
	if bit := uint64(1) << (p.Copy % 64); n.seen[p.Way]&bit == 0 {
		n.seen[p.Way] |= bit
	} else {
		n.again++
	}
	m.read(n, p, now)
}

// node gives the node that sent a probe. Of two starts of one node the one that was
// heard lately stays: the other may be a recording.
func (m *Machine) node(p *membership.Probe, now int64) *node {
	n := m.nodes[p.ID]
	if n != nil && n.Incarnation == p.Incarnation {
		return n
	}
	if n != nil && m.heardBy(n) && now-n.heard < int64(m.cfg.Quick)/2 || n == nil && len(m.nodes) >= membership.MaxNodes {
		return nil
	}
	if n != nil {
		delete(m.mine, n.tag)
	}
	n = &node{Peer: p.Peer, tag: p.Tag(), since: m.round, links: map[membership.Tag]*link{}}
	m.nodes[p.ID] = n
	m.acquit()
	return n
}

// heardBy tells whether a node has told of a round of this one: no recording can.
func (m *Machine) heardBy(n *node) bool { return n.mine != 0 }

// read takes what a probe tells of others' rounds.
func (m *Machine) read(n *node, p *membership.Probe, now int64) {
	for _, b := range p.Bursts {
		if b.Of == m.tag && m.storm != nil {
			m.storm.note(n.ID, b)
		}
	}
	if p.Way != membership.ToAll && p.Way != membership.ToGroup || n.told == p.Round {
		return
	}
	n.told = p.Round
	for _, r := range p.Rows {
		if r.Of == m.tag {
			n.mine = r.Round
		}
		l := n.links[r.Of]
		if l == nil {
			l = &link{}
			if len(n.links) >= membership.MaxNodes {
				continue
			}
			n.links[r.Of] = l
		}
		if l.note(r, func(w membership.Way) bool {
			alone := w == membership.ToNode || w == membership.ToNodeBig
			return !alone || r.Of == m.tag && slices.Contains(m.tried[r.Round], n.ID)
		}, now) {
			m.healed = now
		}
	}
	// It tells of three rounds ago, or of none: then it did not hear those since.
	if len(p.Rows) < membership.MaxRows && m.round >= max(n.mine, n.since)+4 {
		n.lags++
	} else {
		n.lags = 0
	}
	m.judgePlace()
}

// finish ends the round of a node that was coming in.
func (m *Machine) finish(n *node, now int64) {
	if n.begun == 0 {
		return
	}
	r := membership.Row{Of: n.tag, Round: n.round, Again: uint8(min(n.again, 255))}
	for i, w := range membership.Trials {
		for bits := n.seen[w]; bits != 0; bits &= bits - 1 {
			r.Got[i]++
		}
	}
	n.row, n.begun = &r, 0
	l := m.mine[n.tag]
	if l == nil {
		l = &link{}
		m.mine[n.tag] = l
	}
	if l.note(r, func(w membership.Way) bool { return w != membership.ToNode && w != membership.ToNodeBig }, now) {
		m.healed = now
	}
	m.judgePlace()
}

// settle is how long the frames of a round may take to come in.
func (m *Machine) settle() int64 { return int64(m.cfg.Quick) / 3 }

// Tick does what is due.
func (m *Machine) Tick(now int64) (a Actions) {
	m.forget(now)
	for _, n := range m.nodes {
		if n.begun != 0 && now-n.begun >= m.settle() {
			m.finish(n, now)
		}
	}
	m.doubt(now)
	m.watchPlace(now)
	m.conflicts.settle(m.directing(), now)
	m.experiment(now, &a)
	m.examine(now, &a)
	if now >= m.next {
		a.Frames = append(a.Frames, m.probes()...)
		a.Ask = m.mayAsk(now) && (m.asking || m.lowest() || len(m.claims) > 0 || m.conflicts.count > 0)
		m.last, m.next = now, now+int64(m.cfg.Interval)
		if m.hurry > 0 {
			m.hurry--
		}
		if m.hurry > 0 {
			m.next = now + int64(m.cfg.Quick)
		} else {
			m.asking = false
		}
	}
	if m.conflicts.fresh {
		m.conflicts.fresh, a.Ask = false, a.Ask || m.mayAsk(now)
	}
	a.Next = min(m.next, now+int64(m.cfg.Quick)/2)
	if m.quiet(now) {
		a.Next = min(m.next, now+int64(m.cfg.Interval)/10)
	}
	return a
}

// quiet tells whether nothing is coming in or under way.
func (m *Machine) quiet(now int64) bool {
	for _, n := range m.nodes {
		if n.begun != 0 {
			return false
		}
	}
	return m.hurry == 0 && !m.exam.running() && !m.mayTry(now)
}

// forget drops what is over.
func (m *Machine) forget(now int64) {
	gone := 4 * int64(m.cfg.Interval)
	for id, n := range m.nodes {
		if now-n.heard > gone {
			delete(m.nodes, id)
			delete(m.mine, n.tag)
			continue
		}
		for tag, l := range n.links {
			if now-l.at > gone {
				delete(n.links, tag)
			}
		}
	}
	if len(m.nodes) == 0 { // and nobody is left to tell where frames go
		m.place, m.before, m.snooping = place{}, place{}, false
	}
	old := now - int64(remember)
	for s, at := range m.strangers {
		if at < old {
			delete(m.strangers, s)
		}
	}
	for c, d := range m.claims {
		if d.last < old {
			delete(m.claims, c)
		}
	}
	for s, at := range m.servers {
		if at < now-int64(time.Hour) {
			delete(m.servers, s)
		}
	}
	if m.leakAt < old {
		m.leaks = 0
	}
	if m.conflicts.at < old {
		m.conflicts.count = 0
	}
	if m.renamed < old {
		m.renames = 0
	}
	for r := range m.tried {
		if r+16 < m.round {
			delete(m.tried, r)
		}
	}
}

// doubt looks into the first sign of a fault, or of its end, at once, but once in an interval.
func (m *Machine) doubt(now int64) {
	if m.doubted != 0 && now-m.doubted < int64(m.cfg.Interval) {
		return
	}
	sign := func(l *link) bool {
		for _, n := range l.missed {
			if n > 0 && n < confirmed {
				return true
			}
		}
		return l.again > 0 && l.again < confirmed || l.healed
	}
	found := false
	for _, n := range m.nodes {
		for _, l := range []*link{m.mine[n.tag], n.links[m.tag]} {
			if l != nil && sign(l) {
				found, l.healed = true, false
			}
		}
	}
	if found {
		m.doubted = now
		m.rush(confirmed+1, now)
	}
}

// probes are the frames of the next round.
func (m *Machine) probes() (all []Frame) {
	m.round++
	p := membership.Probe{
		Peer: m.self, Round: m.round, Hurry: m.asking, Moved: m.moving > 0, Directed: m.directed, Able: m.able, MTU: uint16(min(m.cfg.MTU, 1<<16-1)), CloneMAC: m.cfg.CloneMAC,
	}
	m.moving = max(0, m.moving-1)
	add := func(to [6]byte, w membership.Way, i int, told bool) {
		p := p
		m.sequence++
		p.Way, p.Copy, p.Sequence = w, uint8(i), m.sequence
		if told {
			p.Rows, p.Bursts = m.rows(), m.counted()
		}
		if w == membership.ToNodeBig {
			p.Size = m.cfg.MTU + 14
		}
		all = append(all, Frame{to, p})
	}
	for i := range copies {
		add(m.cfg.CloneMAC, membership.ToClone, i, false)
		add(membership.Group, membership.ToGroup, i, true)
		add(broadcast, membership.ToAll, i, true)
	}
	for _, n := range m.someNodes() {
		for i := range copies {
			add(n.ID, membership.ToNode, i, false)
			add(n.ID, membership.ToNodeBig, i, false)
		}
		m.tried[m.round] = append(m.tried[m.round], n.ID)
	}
	return all
}

var broadcast = [6]byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}

// ordered gives the nodes by id.
func (m *Machine) ordered() []*node {
	all := make([]*node, 0, len(m.nodes))
	for _, n := range m.nodes {
		all = append(all, n)
	}
	slices.SortFunc(all, func(a, b *node) int { return a.ID.Compare(b.ID) })
	return all
}

// lowest tells whether this node has the lowest id of those that are heard.
func (m *Machine) lowest() bool {
	for id := range m.nodes {
		if id.Compare(m.self.ID) < 0 {
			return false
		}
	}
	return true
}

// someNodes are those whose turn it is.
func (m *Machine) someNodes() []*node {
	all := m.ordered()
	if len(all) <= targets {
		return all
	}
	var some []*node
	for range targets {
		some = append(some, all[m.turn%len(all)])
		m.turn++
	}
	return some
}

// rows are what came of the others' last rounds; of more than fit, in turns.
func (m *Machine) rows() (rows []membership.Row) {
	all := m.ordered()
	for i := range all {
		if n := all[(i+int(m.round)*membership.MaxRows)%len(all)]; n.row != nil && len(rows) < membership.MaxRows {
			rows = append(rows, *n.row)
		}
	}
	return rows
}

// counted are what came of the others' last bursts.
func (m *Machine) counted() (all []membership.Burst) {
	for _, n := range m.ordered() {
		for b, got := range n.bursts {
			b.Got = uint16(min(got, 1<<16-1))
			all = append(all, b)
		}
	}
	slices.SortFunc(all, func(a, b membership.Burst) int {
		if a.Of != b.Of {
			return int(int64(a.Of) - int64(b.Of))
		}
		return int(a.Way)*256 + int(a.Stage) - int(b.Way)*256 - int(b.Stage)
	})
	return all[:min(len(all), membership.MaxBursts)]
}
