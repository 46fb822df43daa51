package doctor

import (
	"errors"
	"slices"
	"time"

	"clonecluster/netcore/membership"
)

// placeKind says where frames to the clone MAC go, as far as can be told.
type placeKind int

const (
	placeUnknown placeKind = iota
	placeAll               // to every node: it is flooded, as it must be
	placeNone              // to no node
	placeOne               // to one node alone, as if it had been learned there
	placeSome              // to some, or from some
)

// place is where frames to the clone MAC go.
type place struct {
	kind placeKind
	at   membership.NodeID   // of placeOne
	dark []membership.NodeID // whom they do not reach, whoever sends them
}

// judgePlace looks at all pairs of nodes anew.
func (m *Machine) judgePlace() {
	nodes := m.ordered()
	type sender struct {
		id  membership.NodeID
		tag membership.Tag
	}
	senders := []sender{{m.self.ID, m.tag}}
	for _, n := range nodes {
		senders = append(senders, sender{n.ID, n.tag})
	}
	reached, missed := map[membership.NodeID]int{}, map[membership.NodeID]int{}
	good, bad, doubtful := 0, 0, 0
	count := func(receiver membership.NodeID, links map[membership.Tag]*link) {
		for _, s := range senders {
			if s.id == receiver {
				continue
			}
			l := links[s.tag]
			switch l.passage(membership.ToClone) {
			case unknown:
				if l != nil {
					doubtful++
				}
			case passes:
				reached[receiver]++
				good++
			case lost:
				if l.at < m.healed { // what is told anew counts
					doubtful++
					continue
				}
				missed[receiver]++
				bad++
			}
		}
	}
	count(m.self.ID, m.mine)
	for _, n := range nodes {
		count(n.ID, n.links)
	}
	var p place
	for id := range missed {
		if reached[id] == 0 {
			p.dark = append(p.dark, id)
		}
	}
	slices.SortFunc(p.dark, membership.NodeID.Compare)
	switch {
	case bad == 0 && (good == 0 || doubtful > 0):
		return // nothing new is certain
	case bad == 0:
		p.kind = placeAll
		m.snooping = false
	case good == 0:
		p.kind = placeNone
	case len(reached) == 1:
		p.kind = placeSome
		for id := range reached {
			if missed[id] == 0 {
				p.kind, p.at = placeOne, id
			}
		}
	default:
		p.kind = placeSome
	}
	// It has followed the announcement.
	if p.kind == placeOne && p.at == m.movedBy && m.before.kind != placeUnknown && m.before.kind != placeAll &&
		(m.before.kind != placeOne || m.before.at != p.at) {
		m.snooping = true
	}
	m.place = p
}

// strange tells whether frames to the clone MAC go where an ARP reply may have led
// them.
func (m *Machine) strange() bool {
	return (m.place.kind == placeNone || m.place.kind == placeOne || m.place.kind == placeSome) && m.leaks == 0 && !m.snooping
}

// mayTry tells whether an announcement could say more.
func (m *Machine) mayTry(now int64) bool {
	return m.strange() && !m.directed && (m.movedAt == 0 || now-m.movedAt >= int64(remember))
}

// experiment announces the VIP from a node where the clone MAC is not reached: a
// switch that believes what ARP says in its payload then sends its frames there. One
// node does it, the lowest that it could move to, once in a while.
func (m *Machine) experiment(now int64, a *Actions) {
	if !m.mayTry(now) || m.hurry > 0 {
		return
	}
	lowest := m.self.ID
	for id := range m.nodes {
		if id.Compare(lowest) < 0 && id != m.place.at || lowest == m.place.at {
			lowest = id
		}
	}
	if lowest != m.self.ID {
		return
	}
	m.movedAt, m.movedBy, m.before, m.moving = now, m.self.ID, m.place, confirmed+2
	a.Announce = true
	m.rush(confirmed+2, now)
}

// watchPlace keeps since when frames to the clone MAC go where they should, or not.
func (m *Machine) watchPlace(now int64) {
	switch {
	case m.place.kind == placeUnknown:
		m.badAt, m.goodAt = 0, 0
	case m.place.kind == placeAll:
		m.badAt = 0
		if m.goodAt == 0 {
			m.goodAt = now
		}
	default:
		m.goodAt = 0
		if m.badAt == 0 {
			m.badAt = now
		}
	}
}

// Direct says whom this node takes to direct, the zero value if the cluster is not in
// directed mode, and whether the node is able to be in it. The others are told at once.
func (m *Machine) Direct(by membership.NodeID, able bool, now int64) {
	directed := by != membership.NodeID{}
	m.director = by
	if directed != m.directed || able != m.able {
		m.directed, m.able = directed, able
		m.rush(1, now)
	}
}

// An exam is one that was asked for.
type exam struct {
	phase phase
	begun int64
	until int64
	rate  int // the highest of the burst; 0: none
	// unsent is why a burst that was asked for was not sent.
	unsent string
}

type phase int

const (
	idle phase = iota
	looking
	trying // whether the clone MAC moves
	bursting
	counting
	done
)

func (e *exam) running() bool { return e.phase != idle && e.phase != done }

var phaseNames = [...]string{"", "probing", "seeing whether an announcement moves the clone MAC", "sending a burst", "counting what came of the burst", ""}

// ErrExamining says that no burst was added to the examination that is running.
var ErrExamining = errors.New("the network is being examined already, without this burst: ask again when that has ended, in some seconds")

// Examine begins an examination, unless one is running. With a rate it ends with a
// burst to the clone MAC of up to so many frames a second; one that is running does not,
// and then the error is ErrExamining.
func (m *Machine) Examine(rate int, now int64) error {
	if m.exam.running() {
		if rate > 0 {
			return ErrExamining
		}
		return nil
	}
	m.exam = exam{phase: looking, begun: now, rate: min(rate, MaxRate)}
	m.rush(confirmed+3, now)
	m.exam.until = now + int64(m.cfg.Quick)*(confirmed+4)
	return nil
}

// examine goes on with an examination.
func (m *Machine) examine(now int64, a *Actions) {
	e := &m.exam
	if !e.running() || now < e.until {
		return
	}
	wait := func(p phase, quick int) { e.phase, e.until = p, now+int64(m.cfg.Quick)*int64(quick) }
	switch {
	case e.phase == looking && m.strange() && len(m.nodes) > 0:
		// Whoever has to announces now by itself; all look again.
		m.rush(confirmed+2, now)
		wait(trying, confirmed+4)
	case e.phase <= trying && e.rate > 0 && m.place.kind == placeAll && len(m.nodes) > 0:
		a.Burst = m.burst()
		wait(bursting, 1000) // BurstSent ends it
	case e.phase == bursting:
		m.BurstSent(now)
	default:
		if e.phase <= trying && e.rate > 0 {
			e.unsent = m.whyNoBurst()
		}
		e.phase = done
	}
}

// whyNoBurst tells what stands against a burst.
func (m *Machine) whyNoBurst() string {
	switch {
	case len(m.nodes) == 0:
		return "this node hears no other, which could count what arrives"
	case m.place.kind == placeUnknown:
		return "it is not known yet whether frames to the clone MAC reach every node"
	}
	return "frames to the clone MAC do not reach every node even one by one"
}

// BurstSent says that the burst has been sent, or cannot be.
func (m *Machine) BurstSent(now int64) {
	if m.exam.phase == bursting {
		m.exam.phase, m.exam.until = counting, now+int64(m.cfg.Quick)*5
		m.rush(confirmed+2, now)
	}
}

// The burst goes up from a rate by doubling, in stages.
const (
	// MinRate and MaxRate bound the highest rate of a burst, in frames a second.
	MinRate    = 250
	MaxRate    = 16000
	stageTime  = 500 * time.Millisecond
	burstFrame = 1000 // bytes
)

// storm is what came of this node's last burst.
type storm struct {
	stages  []Stage
	control membership.NodeID // who got the last stage as unicast, too
	got     map[stormKey]int
}

type stormKey struct {
	node  membership.NodeID
	way   membership.Way
	stage uint8
}

func (s *storm) note(n membership.NodeID, b membership.Burst) {
	s.got[stormKey{n, b.Way, b.Stage}] = int(b.Got)
}

// burst gives the stages: to the clone MAC at rising rates, and the last of them once
// more to a node's wire MAC, which shows what nodes can send and receive at all.
func (m *Machine) burst() []Stage {
	m.storm = &storm{got: map[stormKey]int{}}
	stage := func(to [6]byte, w membership.Way, rate int) {
		m.storm.stages = append(m.storm.stages, Stage{Rate: rate, For: stageTime, Frame: Frame{to, membership.Probe{
			Peer: m.self, Round: m.round, Way: w, Copy: uint8(len(m.storm.stages)), MTU: uint16(min(m.cfg.MTU, 1<<16-1)),
			CloneMAC: m.cfg.CloneMAC, Size: min(burstFrame, m.cfg.MTU+14),
		}}})
	}
	for rate := min(MinRate, m.exam.rate); rate <= m.exam.rate; rate *= 2 {
		stage(m.cfg.CloneMAC, membership.BurstClone, rate)
	}
	m.storm.control = m.ordered()[0].ID
	stage(m.storm.control, membership.BurstNode, m.storm.stages[len(m.storm.stages)-1].Rate)
	return m.storm.stages
}

// frames is how many a stage has.
func (s Stage) frames() int { return int(float64(s.Rate) * s.For.Seconds()) }

// limit gives what the burst has shown: the rate at which frames to the clone MAC stop
// to arrive, in frames a second; 0 if they did not; and the highest rate that was
// tried. It does not know if a node did not get the unicast ones either, or nobody told.
func (s *storm) limit() (limit, tried int, known bool) {
	last := len(s.stages) - 1
	control := float64(s.got[stormKey{s.control, membership.BurstNode, uint8(last)}]) / float64(s.stages[last].frames())
	through := 0 // the highest rate of which that much arrived somewhere
	for i, st := range s.stages[:last] {
		most := 0
		for k, n := range s.got {
			if k.way == membership.BurstClone && int(k.stage) == i {
				most = max(most, n)
			}
		}
		// A limit for a second may let more through in the next stage.
		through = max(through, int(float64(most)/st.For.Seconds()))
		if float64(most) >= 0.8*float64(st.frames()) {
			tried = st.Rate
		}
	}
	if highest := s.stages[last-1].Rate; tried < highest && through > 0 {
		return through, highest, control >= 0.9
	}
	return 0, tried, tried > 0
}
