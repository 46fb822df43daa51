package simulator

import (
	"slices"
	"strconv"
	"strings"
	"time"

	"clonecluster/netcore/membership"
)

// schedule draws what will happen. Times are in multiples of the detection time,
// so that one set of numbers serves every profile.
func (s *sim) schedule() {
	dead := []time.Duration{300 * time.Millisecond, 150 * time.Millisecond, time.Second}[s.rand.IntN(3)]
	s.params = membership.Detect(dead)
	D := int64(dead)
	s.minDelay = 10_000 // ns
	s.delay = []int64{D / 1000, D / 200, D / 50}[s.rand.IntN(3)]
	s.loss = []float64{0, 0, 0.01, 0.05, 0.2}[s.rand.IntN(5)]
	s.messy = s.loss > 0
	s.duplicate = []float64{0, 0, 0.1}[s.rand.IntN(3)]
	// Long enough for a frame each way, and for the beacon before the first to be
	// heard.
	s.grace = int64(s.params.Interval) + 2*s.crossing()
	// Of two machines with one address the others hear now one, now the other,
	// when frames are lost. The switch would not bring them the right ones either.
	s.twins = s.rand.IntN(40) == 0 && len(s.nodes) > 2
	if s.twins {
		s.nodes[len(s.nodes)-1].id = s.nodes[0].id
		s.loss = 0
	}
	s.configure()
	s.prepareFrames()
	if s.forger {
		s.at(s.now, s.forge)
	}
	start := s.now
	together := s.rand.IntN(3) == 0
	for _, n := range s.nodes {
		n.offset = s.rand.Int64N(int64(time.Hour))
		at := start
		if !together {
			at += s.rand.Int64N(2 * D)
		}
		if s.rand.IntN(8) > 0 || n.n == 0 {
			s.at(at, func() { s.boot(n) })
		}
	}
	events, apart := 2+s.rand.IntN(7), D
	sparse := s.rand.IntN(4) == 0
	if sparse { // mostly one after the other, with quiet in between
		events, apart = 2+s.rand.IntN(2), 5*D
	}
	first := start + 2*D
	quiet := first + int64(events)*apart
	s.quietFrom = quiet
	for i := range events {
		at := first + s.rand.Int64N(quiet-first)
		if sparse {
			at = first + int64(i)*apart + s.rand.Int64N(D)
		}
		do := s.disturb()
		if s.orders && s.rand.IntN(2) == 0 {
			do = s.order()
		}
		if s.twins {
			do = s.ask()
		}
		s.at(at, do)
	}
	if s.policy.Balance == membership.Load {
		for t := start; t < quiet+s.recovery(); t += D / 2 {
			s.at(t, s.load)
		}
	}
	s.at(quiet, s.calm)
	if s.loss > 0 && s.rand.IntN(3) == 0 {
		s.at(start+s.rand.Int64N(quiet-start), func() { s.setLoss(0) })
	}
	s.end = quiet + s.recovery() + 2*D
	if s.twins {
		s.end += 2 * D
	}
	for t := start + D; t < s.end; t += D / 10 {
		s.queue.push(event{at: t + s.rand.Int64N(D/10), kind: evArrive})
	}
	s.queue.push(event{at: s.end, kind: evEnd})
}

// configure draws what the nodes are configured with.
func (s *sim) configure() {
	s.copies = s.rand.IntN(10) == 0
	s.policy.Moves = 32
	if s.rand.IntN(10) == 0 && !s.twins { // the lower twin may lag behind
		s.policy.Balance = membership.Load
	}
	s.policy.StopWhenSick = s.rand.IntN(8) == 0
	if s.rand.IntN(4) == 0 {
		for _, n := range s.nodes {
			n.weight = s.someWeight()
		}
	}
	// Who does not get the group's frames gets maps late, too late for those that
	// follow each other.
	s.orders = s.rand.IntN(6) == 0 && !s.twins
	if s.rand.IntN(20) == 0 && !s.twins && s.policy.Balance != membership.Load && !s.orders {
		s.any().filtered = true
	}
}

// order draws something that an operator sets while the cluster runs.
func (s *sim) order() func() {
	n, of, weight, by := s.any(), s.any(), s.someWeight(), s.rand.Uint64()
	if s.rand.IntN(3) == 0 {
		weight = 0
	}
	o := membership.Order{Weights: map[membership.NodeID]uint16{of.id: uint16(weight)}, By: strconv.FormatUint(by, 36)}
	if s.rand.IntN(3) == 0 {
		b := membership.SetBalance(s.rand.IntN(3))
		o.Balance = &b
	}
	return func() {
		if n.running && !n.paused {
			s.disturbed()
			s.trace("node %d is told: weight %d for node %d, balance %v", n.n, weight, of.n, o.Balance != nil)
			s.step(n, o)
		}
	}
}

func (s *sim) someWeight() int { return []int{1, 50, 100, 100, 300, 1000}[s.rand.IntN(6)] }

// load lets some nodes measure how busy they are.
func (s *sim) load() {
	for _, n := range s.nodes {
		if n.running && !n.paused && s.rand.IntN(2) == 0 {
			s.step(n, membership.LoadSeen{Busy: uint16(s.rand.IntN(1001)), Flows: uint32(s.rand.IntN(1000))})
		}
	}
}

func (s *sim) at(t int64, do func()) { s.queue.push(event{at: t, kind: evDo, do: do}) }

// later does something after d, but not when all shall be quiet.
func (s *sim) later(d int64, do func()) { s.at(min(s.now+d, max(s.now, s.quietFrom)), do) }

func (s *sim) any() *node { return s.nodes[s.rand.IntN(len(s.nodes))] }

// ask draws one thing that is asked for.
func (s *sim) ask() func() {
	n, d := s.any(), s.rand.Int64N(4*int64(s.params.Dead))
	if s.rand.IntN(2) == 0 {
		return func() {
			s.setSick(n, true)
			s.later(d, func() { s.setSick(n, false) })
		}
	}
	return func() {
		s.setDrain(n, true)
		s.later(d, func() { s.setDrain(n, false) })
	}
}

// disturb draws one thing that goes wrong or is asked for.
func (s *sim) disturb() func() {
	D := int64(s.params.Dead)
	n, o := s.any(), s.any()
	for_ := s.rand.Int64N(4 * D)
	switch s.rand.IntN(22) {
	case 21: // an engine is restarted, as for an upgrade
		return func() { s.restart(n, for_) }
	case 0: // starts, or restarts after a crash of the engine
		return func() {
			s.crash(n)
			s.later(for_/8, func() { s.boot(n) })
		}
	case 1, 2:
		return func() {
			s.die(n)
			s.later(for_, func() { s.boot(n) })
		}
	case 3: // for good
		return func() { s.die(n) }
	case 4: // graceful end
		return func() { s.retire(n) }
	case 5, 6: // of several at once
		several := []*node{n, o, s.any()}
		return func() {
			for _, n := range several {
				s.setDrain(n, true)
			}
			s.later(for_, func() {
				for _, n := range several {
					s.setDrain(n, false)
				}
			})
		}
	case 7:
		return func() { s.pause(n, s.rand.Int64N(3*D)) }
	case 8:
		return func() { s.setCut(n, o, false, for_) }
	case 9:
		return func() { s.setCut(n, o, true, for_) }
	case 10: // nothing that it sends is heard, or nothing is heard by it
		in := s.rand.IntN(2) == 0
		return func() {
			for _, p := range s.nodes {
				if in {
					s.setCut(p, n, false, for_)
				} else {
					s.setCut(n, p, false, for_)
				}
			}
		}
	case 11:
		side := make([]bool, len(s.nodes))
		for i := range side {
			side[i] = s.rand.IntN(2) == 0
		}
		return func() { s.partition(side, for_) }
	case 12: // its clock jumps, as after the machine was suspended
		return func() {
			if n.running {
				s.trace("node %d: its clock jumps by %.0f ms", n.n, float64(for_)/1e6)
				s.messy = true
				s.disturbed()
				n.lease -= for_
				n.offset += for_
				n.next -= for_
				for j := range n.received { // to itself it has not heard them for longer
					n.received[j] -= for_
				}
				n.timer = s.now + 1
				s.queue.push(event{at: n.timer, kind: evTick, node: n, boot: n.boots})
			}
		}
	case 13: // somebody plays back what he has recorded
		return func() { s.replay(n, for_) }
	case 14: // its cable is pulled out, and put back
		return func() {
			s.setLink(n, false)
			s.later(for_, func() { s.setLink(n, true) })
		}
	case 15: // another NIC, or the administrator has given it another address
		return func() { s.rename(n) }
	case 16:
		weight := s.someWeight()
		return func() {
			s.crash(n)
			s.trace("node %d will have weight %d", n.n, weight)
			n.weight = weight
			s.later(for_/8, func() { s.boot(n) })
		}
	case 17: // for nodes with different rules only one policy is simple
		if s.policy.StopWhenSick {
			return s.ask()
		}
		return func() {
			s.crash(n)
			s.trace("node %d will have other rules", n.n)
			n.rules = 3 - n.rules
			s.later(for_/8, func() { s.boot(n) })
		}
	case 18: // the switch believes that it does not want the group's frames
		return func() {
			s.setFiltered(n, true)
			s.later(for_, func() { s.setFiltered(n, false) })
		}
	case 19: // the services of all fail
		return func() {
			for _, n := range s.nodes {
				s.setSick(n, true)
			}
			s.later(for_, func() {
				for _, n := range s.nodes {
					s.setSick(n, false)
				}
			})
		}
	default:
		return func() {
			s.setSick(n, true)
			s.later(for_, func() { s.setSick(n, false) })
		}
	}
}

func (s *sim) setDrain(n *node, on bool) {
	if n.running && !n.paused && n.drain != on {
		s.disturbed()
		s.trace("node %d: drain %v", n.n, on)
		n.drain = on
		s.step(n, membership.Drain{On: on})
	}
}

func (s *sim) setSick(n *node, on bool) {
	if n.running && !n.paused && n.sick != on {
		s.disturbed()
		s.trace("node %d: sick %v", n.n, on)
		n.sick = on
		s.step(n, membership.Health{OK: !on})
	}
}

// retire ends a node as membership.Node.Leave does.
func (s *sim) retire(n *node) {
	D := int64(s.params.Dead)
	s.setDrain(n, true)
	boots := n.boots
	still := func() bool { return n.running && !n.paused && n.boots == boots }
	s.later(s.rand.Int64N(2*D), func() {
		if !still() {
			return
		}
		s.disturbed()
		s.trace("node %d stops", n.n)
		n.stopping = true
		s.step(n, membership.Stop{})
	})
	s.later(2*D+s.rand.Int64N(3*D), func() {
		if !still() {
			return
		}
		s.disturbed()
		s.trace("node %d leaves", n.n)
		n.stopping = true
		for range 3 {
			s.step(n, membership.Leave{})
		}
		s.die(n)
	})
}

// restart ends an engine as membership.Node.Restart does, and starts the next after d.
func (s *sim) restart(n *node, d int64) {
	s.setDrain(n, true)
	boots := n.boots
	s.later(s.rand.Int64N(2*int64(s.params.Dead)), func() {
		if !n.running || n.paused || n.boots != boots {
			return
		}
		s.disturbed()
		s.trace("node %d restarts", n.n)
		// Who hears it knows from now on whose flows to spare.
		n.away, n.awayAs, n.spared = s.now+int64(30*time.Second), n.id, nil
		for _, o := range s.nodes {
			if !s.messy && !s.torn && !n.linkDown && !o.linkDown && s.connected(o, n) {
				n.spared = append(n.spared, spare{o, o.boots})
			}
		}
		n.stopping = true
		for range 3 {
			s.step(n, membership.Restart{})
		}
		n.running, n.owned = false, 0
		s.later(d, func() { s.boot(n) })
	})
}

func (s *sim) setLink(n *node, up bool) {
	if n.linkDown == !up {
		return
	}
	s.disturbed()
	s.torn = true
	s.trace("node %d: link %v", n.n, up)
	n.linkDown = !up
	s.tellLink(n)
}

func (s *sim) tellLink(n *node) {
	if n.running && !n.paused && n.saidDown != n.linkDown {
		n.saidDown = n.linkDown
		s.step(n, membership.Carrier{Up: !n.linkDown})
	}
}

// setFiltered begins or ends filtering for one node. Two of those could not find each
// other.
func (s *sim) setFiltered(n *node, on bool) {
	if s.policy.Balance == membership.Load || s.orders || n.filtered == on || on && slices.ContainsFunc(s.nodes, func(o *node) bool { return o.filtered }) {
		return
	}
	s.disturbed()
	s.trace("node %d: multicast filtered %v", n.n, on)
	n.filtered = on
}

// rename gives a node another wire MAC.
func (s *sim) rename(n *node) {
	if n.paused || s.twinOf(n) != nil {
		return
	}
	s.disturbed()
	s.renamed++
	n.former = append(n.former, n.id)
	n.id = nodeID(n.n)
	n.id[3], n.id[4] = byte(0x70+s.rand.IntN(16)), byte(s.renamed)
	s.names = nil
	s.trace("node %d gets another wire MAC", n.n)
	if n.running {
		s.step(n, membership.Rename{Self: membership.Peer{ID: n.id, Incarnation: s.rand.Uint64()}})
	}
}

func (s *sim) pause(n *node, d int64) {
	if !n.running || n.paused {
		return
	}
	s.disturbed()
	s.trace("node %d sleeps for %.0f ms", n.n, float64(d)/1e6)
	n.paused, n.pausedAt = true, s.now
	s.later(d, func() { s.wake(n) })
}

func (s *sim) wake(n *node) {
	if !n.paused {
		return
	}
	n.paused = false
	if !n.running {
		return
	}
	s.disturbed()
	s.trace("node %d wakes", n.n)
	backlog := n.backlog
	n.backlog = nil
	n.timer = 0
	for _, ev := range backlog {
		s.step(n, ev)
	}
	s.step(n, membership.Tick{})
	s.tellLink(n)
}

func (s *sim) setCut(a, b *node, back bool, d int64) {
	if a == b {
		return
	}
	way := "to"
	if back {
		way = "to and from"
	}
	s.trace("node %d: nothing gets through %s node %d for %.0f ms", a.n, way, b.n, float64(d)/1e6)
	s.torn = true
	s.fault(a, b, 1)
	if back {
		s.fault(b, a, 1)
	}
	s.later(d, func() {
		s.fault(a, b, -1)
		if back {
			s.fault(b, a, -1)
		}
	})
}

// fault adds a reason why nothing gets from a to b, or (-1) takes it away.
func (s *sim) fault(a, b *node, more int) {
	s.disturbed()
	s.cut[a.n][b.n] += more
	s.cuts += more
}

func (s *sim) partition(side []bool, d int64) {
	s.trace("partition for %.0f ms: nodes %v", float64(d)/1e6, sides(side))
	s.torn = true
	both := func(more int) {
		for i, a := range s.nodes {
			for j, b := range s.nodes {
				if side[i] != side[j] {
					s.fault(a, b, more)
				}
			}
		}
	}
	both(1)
	s.later(d, func() { both(-1) })
}

// sides lists who is on which.
func sides(side []bool) string {
	var in [2][]string
	for i, other := range side {
		k := 0
		if other {
			k = 1
		}
		in[k] = append(in[k], strconv.Itoa(i))
	}
	return strings.Join(in[0], " ") + " | " + strings.Join(in[1], " ")
}

// setLoss says which share of the frames is lost from now on.
func (s *sim) setLoss(loss float64) {
	if s.loss == loss {
		return
	}
	s.disturbed()
	s.trace("%.3g %% of the frames are lost", 100*loss)
	s.loss = loss
}

// replay delivers recorded frames, old and new, to everybody for a while.
func (s *sim) replay(n *node, d int64) {
	s.trace("recorded frames are played back for %.0f ms", float64(d)/1e6)
	s.disturbed()
	s.replays++
	until := min(s.now+d, s.quietFrom)
	var again func()
	again = func() {
		if s.now > until || len(s.records) == 0 {
			s.disturbed()
			s.replays--
			return
		}
		r := s.records[s.rand.IntN(len(s.records))]
		for _, to := range s.nodes {
			if to.running {
				s.queue.push(event{at: s.now + 1, kind: evDeliver, node: to, from: -1, boot: to.boots, payload: r.payload})
			}
		}
		s.at(s.now+int64(s.params.Interval)/2, again)
	}
	again()
}

// calm ends every disturbance: what is left must come to agree.
func (s *sim) calm() {
	s.trace("calm")
	s.setLoss(0)
	for _, n := range s.nodes {
		s.wake(n)
	}
}
