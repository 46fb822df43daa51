package simulator

import (
	"slices"

	"clonecluster/netcore/filter"
	"clonecluster/netcore/membership"
)

// frame is what is on the wire in schedules with frames. In the others it is the
// event that a frame gives: writing and reading them takes half as long again.
type frame struct {
	bytes  []byte
	forged bool // by somebody without the key
}

// The cluster's keys, the second of which is about to replace the first, and those of
// others. An outsider may sign in any way; that he has no key is what counts.
var (
	clusterKeys = [2][]byte{slices.Repeat([]byte{1}, 32), slices.Repeat([]byte{2}, 32)}
	foreignKey  = slices.Repeat([]byte{3}, 32)
)

const (
	clusterName = "simulated"
	// twoParts is from how many members on a map takes two frames.
	twoParts = 59
)

// prepareFrames decides whether this schedule has frames, and strangers who send some.
func (s *sim) prepareFrames() {
	// Of the large clusters there are too few to leave any out.
	if s.frames = s.rand.IntN(10) == 0 || len(s.nodes) >= twoParts; !s.frames {
		return
	}
	changing := s.rand.IntN(4) == 0
	for _, n := range s.nodes {
		sign, accept := 0, 1
		if changing && s.rand.IntN(2) == 0 {
			sign, accept = 1, 0
		}
		keys := [][]byte{clusterKeys[accept]}
		if s.o.Weakness == membership.NoAuthentication {
			keys = append(keys, foreignKey)
		}
		n.codec = membership.NewCodec(clusterName, clusterKeys[sign], keys...)
	}
	if s.rand.IntN(2) == 0 {
		s.addStranger()
	}
	s.forger = s.rand.IntN(2) == 0
}

// addStranger puts a machine of another cluster on the segment. Were it listened to,
// it would lead, or be the twin of a node, or just be one more.
func (s *sim) addStranger() {
	n := s.newNode(len(s.nodes))
	n.stranger = 1 + strangeness(s.rand.IntN(int(strangenesses)-1))
	n.id[3] += byte(s.rand.IntN(3)) - 1
	if s.rand.IntN(3) == 0 {
		n.id = s.any().id
	}
	n.codec = membership.NewCodec(clusterName, foreignKey)
	if n.stranger == otherCluster {
		n.codec = membership.NewCodec("another", clusterKeys[0])
	}
	s.strangers = append(s.strangers, n)
	s.at(s.now+s.rand.Int64N(4*int64(s.params.Dead)), func() { s.boot(n) })
}

// strangeness is why a node does not belong to the cluster.
type strangeness uint8

const (
	_ strangeness = iota
	otherKey
	otherCluster
	otherVersion
	strangenesses
)

var strangenessNames = [strangenesses]string{"", "another key", "another cluster", "another version of the protocol"}

// offVersion is where a frame says the version of the protocol.
const offVersion = 16

func (s *sim) sendBeacon(from *node, a *membership.Actions) {
	ev := membership.Received{Beacon: a.Beacon}
	if !s.frames {
		s.broadcast(from, a.Unicast, ev, ev)
		return
	}
	s.broadcast(from, a.Unicast, ev, s.framed(from, from.codec.Beacon(a.Beacon)))
}

func (s *sim) sendMap(from *node, a *membership.Actions) {
	ev := membership.ReceivedMap{Map: a.Map, From: from.self(), Sequence: a.MapSequence}
	if !s.frames {
		s.broadcast(from, a.MapUnicast, ev, ev)
		return
	}
	for _, f := range from.codec.Map(a.Map, from.self(), a.MapSequence) {
		s.broadcast(from, a.MapUnicast, ev, s.framed(from, f))
	}
}

func (s *sim) sendSettings(from *node, a *membership.Actions) {
	ev := membership.ReceivedSettings{Settings: a.Settings, From: from.self(), Sequence: a.SettingsSequence}
	if !s.frames {
		s.broadcast(from, a.SettingsUnicast, ev, ev)
		return
	}
	f, err := from.codec.Settings(a.Settings, from.self(), a.SettingsSequence)
	if err != nil {
		s.fail("settings", "node %d cannot say its settings: %v", from.n, err)
		return
	}
	s.broadcast(from, a.SettingsUnicast, ev, s.framed(from, f))
}

func (s *sim) framed(from *node, bytes []byte) frame {
	if from.stranger == otherVersion {
		bytes[offVersion]++
	}
	return frame{bytes, from.stranger != 0}
}

// broadcast sends what is said, as an event or as a frame, to the group, and to some
// nodes besides.
func (s *sim) broadcast(from *node, besides []membership.NodeID, said membership.Event, payload any) {
	if from.linkDown {
		return
	}
	if from.stranger == 0 && len(s.records) < 64 && s.rand.IntN(8) == 0 {
		s.records = append(s.records, recorded{said, payload})
	}
	for _, to := range s.nodes {
		if to == from || to.linkDown || from.stranger == 0 && s.cut[from.n][to.n] > 0 {
			continue
		}
		if !to.filtered {
			s.deliver(from.n, to, payload)
		}
		if (to.filtered || s.copies) && slices.Contains(besides, to.id) {
			s.deliver(from.n, to, payload)
		}
	}
	for _, to := range s.strangers {
		if to != from {
			s.deliver(from.n, to, payload)
		}
	}
}

// deliver lets one node receive something, unless it is lost; or twice.
func (s *sim) deliver(from int, to *node, payload any) {
	if !to.running || s.loss > 0 && s.rand.Float64() < s.loss {
		return
	}
	s.queue.push(event{at: s.now + s.minDelay + s.rand.Int64N(s.delay), kind: evDeliver, node: to, from: from, boot: to.boots, payload: payload})
	if s.duplicate > 0 && s.rand.Float64() < s.duplicate {
		s.queue.push(event{at: s.now + s.minDelay + s.rand.Int64N(4*s.delay), kind: evDeliver, node: to, from: from, boot: to.boots, payload: payload})
	}
}

// read gives what a frame says, nil if it has no effect. One that is not authentic
// must have none (I7), and one that is must have one.
func (s *sim) read(n *node, payload any) membership.Event {
	f, ok := payload.(frame)
	if !ok {
		return payload
	}
	s.result.Frames++
	beacon, part, err := n.codec.Decode(f.bytes)
	set, serr := n.codec.DecodeSettings(f.bytes)
	if serr == nil {
		err = nil
	}
	switch {
	case n.stranger != 0:
	case f.forged && err == nil:
		s.fail("I7", "node %d takes a frame of somebody who has no key", n.n)
		return nil
	case f.forged:
		s.result.Forged++
		return nil
	case err != nil:
		s.fail("I7", "node %d refuses a frame of a node of its cluster: %v", n.n, err)
	}
	switch {
	case err != nil:
		return nil
	case beacon != nil:
		return membership.Received{Beacon: beacon}
	case set != nil:
		return *set
	}
	a := n.assemblers[part.From.ID]
	if a == nil {
		a = new(membership.Assembler)
		n.assemblers[part.From.ID] = a
	}
	m, err := a.Add(part)
	switch {
	case err != nil:
		s.fail("I7", "node %d cannot put a map together: %v", n.n, err)
		return nil
	case m == nil:
		return nil
	}
	return membership.ReceivedMap{Map: m, From: part.From, Sequence: part.Sequence}
}

// forge sends, all the time, what somebody can make of frames that he has heard, and
// who has a key of his own.
func (s *sim) forge() {
	if len(s.records) > 0 {
		r := s.records[s.rand.IntN(len(s.records))]
		var frames [][]byte
		switch s.rand.IntN(4) {
		case 0: // the destination is not authentic
			f := slices.Clone(r.payload.(frame).bytes)
			bit := 8*6 + s.rand.IntN(8*(len(f)-6))
			f[bit/8] ^= 1 << (bit % 8)
			frames = [][]byte{f}
		case 1:
			f := slices.Clone(r.payload.(frame).bytes)
			if most := s.rand.IntN(2 * len(f)); most < len(f) {
				f = f[:most]
			} else {
				f = append(f, make([]byte, most-len(f)+1)...)
			}
			frames = [][]byte{f}
		default:
			frames = s.forgery(r.said)
		}
		for _, f := range frames {
			for _, to := range s.nodes {
				s.deliver(-1, to, frame{f, true})
			}
		}
	}
	s.at(s.now+int64(s.params.Interval)/2, s.forge)
}

// forgery makes of what a node has said what would do harm.
func (s *sim) forgery(said membership.Event) [][]byte {
	codec := membership.NewCodec(clusterName, foreignKey)
	switch said := said.(type) {
	case membership.Received:
		b := *said.Beacon
		b.Sequence += 1 << 32
		switch s.rand.IntN(3) {
		case 0:
			b.State = membership.Leaving
		case 1:
			b.Map.Version += 1 << 32
		default:
			b.Heard = nil
		}
		return [][]byte{codec.Beacon(&b)}
	case membership.ReceivedMap:
		m := *said.Map
		m.Version += 1 << 32
		m.Owner = [filter.Buckets]uint8{} // all to the first
		return codec.Map(&m, said.From, said.Sequence+1<<32)
	case membership.ReceivedSettings:
		set := *said.Settings
		set.Version += 1 << 32
		if f, err := codec.Settings(&set, said.From, said.Sequence+1<<32); err == nil {
			return [][]byte{f}
		}
	}
	return nil
}
