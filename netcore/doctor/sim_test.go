package doctor

import (
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"clonecluster/netcore/membership"
)

var cloneMAC = [6]byte{0x02, 0xcc, 0x0a, 0x4d, 0, 0x0a}

func id(n int) membership.NodeID { return membership.NodeID{0x52, 0x54, 0, 0x77, 0, byte(n)} }

// segment is nodes at a switch, in a time of its own. Frames take a millisecond.
type segment struct {
	t     *testing.T
	now   int64
	nodes []*Machine
	due   []int64 // when each has to be stepped
	rng   *rand.Rand
	// cloneAt is the port where the switch has the clone MAC, from 1; 0: it floods.
	cloneAt int
	// snoops: an announcement moves that.
	snoops bool
	// deliver tells how often a frame arrives.
	deliver func(from, to int, f Frame) int
	sent    int
	bytes   int
}

func newSegment(t *testing.T, n int) *segment {
	s := &segment{t: t, now: 1e9, rng: rand.New(rand.NewPCG(1, 2)), deliver: func(int, int, Frame) int { return 1 }}
	for i := range n {
		s.start(i, uint64(i)+100)
	}
	return s
}

func (s *segment) start(i int, incarnation uint64) {
	m := New(Config{CloneMAC: cloneMAC, MTU: 1500, Interval: Interval, Quick: Quick}, membership.Peer{ID: id(i + 1), Incarnation: incarnation}, s.now)
	if i < len(s.nodes) {
		s.nodes[i], s.due[i] = m, 0
	} else {
		s.nodes, s.due = append(s.nodes, m), append(s.due, 0)
	}
}

// pass lets time pass.
func (s *segment) pass(d time.Duration) {
	for end := s.now + int64(d); s.now < end; s.now = min(end, max(s.now+int64(5*time.Millisecond), slices.Min(s.due))) {
		for i, m := range s.nodes {
			if m == nil {
				s.due[i] = end
				continue
			}
			if s.now < s.due[i] {
				continue
			}
			a := m.Tick(s.now)
			s.due[i] = a.Next
			if a.Announce && s.snoops {
				s.cloneAt = i + 1
			}
			for _, f := range a.Frames {
				s.sent++
				size := 78 + 14*len(f.Probe.Rows)
				s.bytes += max(size, f.Probe.Size)
				s.send(i, f)
			}
			for _, st := range a.Burst {
				for range st.frames() {
					s.send(i, Frame{st.To, st.Probe})
				}
			}
			if len(a.Burst) > 0 {
				m.BurstSent(s.now)
			}
		}
	}
}

func (s *segment) send(from int, f Frame) {
	for to, m := range s.nodes {
		if to == from || m == nil {
			continue
		}
		switch {
		case f.To == cloneMAC:
			if s.cloneAt != 0 && (s.cloneAt != to+1 || s.cloneAt == from+1) {
				continue
			}
		case f.To[0]&1 == 0 && f.To != [6]byte(m.self.ID):
			continue
		}
		for range s.deliver(from, to, f) {
			p := f.Probe
			m.Hear(&p, s.now+int64(time.Millisecond))
			s.due[to] = min(s.due[to], max(m.next, s.now+int64(5*time.Millisecond)))
		}
	}
}

// announce has every node speak for the VIP, as it does when clients ask; all hear it.
// In directed mode they name the lowest. Who runs is a member.
func (s *segment) announce(directed bool) {
	live := map[membership.NodeID]bool{}
	at := membership.NodeID(cloneMAC)
	for i, m := range slices.Backward(s.nodes) {
		if m != nil {
			live[id(i+1)] = true
			if directed {
				at = id(i + 1)
			}
		}
	}
	for i, m := range s.nodes {
		if m == nil {
			continue
		}
		for from := range live {
			m.Claim(from, at, mustAddr("10.77.0.10"), s.now)
		}
		others := maps.Clone(live)
		delete(others, id(i+1))
		m.Members(others, s.now)
	}
}

// examine has a node examine the segment, and waits for it.
func (s *segment) examine(i, rate int) {
	if err := s.nodes[i].Examine(rate, s.now); err != nil {
		s.t.Fatal(err)
	}
	s.due[i] = 0
	s.pass(10 * time.Second)
}

// codes are the findings of a node in one line.
func (s *segment) codes(i int) string {
	var all []string
	for _, f := range s.nodes[i].Findings(s.now) {
		all = append(all, f.Code)
		if f.What == "" || f.Fix == "" || strings.Contains(f.What, "%!") {
			s.t.Errorf("finding %+v: a sentence and a fix are wanted", f)
		}
	}
	slices.Sort(all)
	return strings.Join(all, " ")
}

func way(w ...membership.Way) func(int, int, Frame) int {
	return func(_, _ int, f Frame) int {
		if slices.Contains(w, f.Probe.Way) {
			return 0
		}
		return 1
	}
}

// TestFaults: what each fault of a network is called, by every node that can know of
// it, when it comes at boot, when it comes later without being asked for, and that it
// is forgotten when it has gone.
func TestFaults(t *testing.T) {
	type fault = func(s *segment)
	deliver := func(f func(from, to int, f Frame) int) fault { return func(s *segment) { s.deliver = f } }
	all := func(code string, n int) []string { return slices.Repeat([]string{code}, n) }
	for _, tt := range []struct {
		name  string
		nodes int
		fault fault
		want  []string // by node
	}{
		{"none", 3, func(*segment) {}, all("", 3)},
		{"none, two nodes", 2, func(*segment) {}, all("", 2)},
		{"none, many nodes", 20, func(*segment) {}, all("", 20)},
		{"a node alone", 1, func(*segment) {}, all("", 1)},
		{"no flooding", 3, deliver(way(membership.ToClone, membership.BurstClone)), all(noFlooding.Code, 3)},
		{"no flooding, two nodes", 2, deliver(way(membership.ToClone, membership.BurstClone)), all(noFlooding.Code, 2)},
		{"no flooding to one port", 3, deliver(func(_, to int, f Frame) int {
			if to == 1 && f.To == cloneMAC {
				return 0
			}
			return 1
		}), all(noFlooding.Code, 3)},
		{"no flooding to one port of two", 2, deliver(func(_, to int, f Frame) int {
			if to == 1 && f.To == cloneMAC {
				return 0
			}
			return 1
		}), all(noFlooding.Code, 2)},
		{"learned at a node", 3, func(s *segment) { s.cloneAt = 2 }, all(cloneMACLearned.Code, 3)},
		{"learned elsewhere, with a leak heard", 3, func(s *segment) {
			s.cloneAt = 9
			for _, m := range s.nodes {
				m.Leak("a RARP", 1, s.now)
			}
		}, all(cloneMACLeak.Code+" "+cloneMACLearned.Code, 3)},
		{"a leak that did no harm", 3, func(s *segment) { s.nodes[0].Leak("a RARP", 1, s.now) }, []string{cloneMACLeak.Code, "", ""}},
		{"ARP snooping", 3, func(s *segment) { s.cloneAt, s.snoops = 3, true }, all(arpSnooping.Code, 3)},
		{"ARP snooping, two nodes", 2, func(s *segment) { s.cloneAt, s.snoops = 2, true }, all(arpSnooping.Code, 2)},
		{"ARP snooping, at the lowest node", 3, func(s *segment) { s.cloneAt, s.snoops = 1, true }, all(arpSnooping.Code, 3)},
		{"multicast filtered", 3, deliver(way(membership.ToGroup)), all(multicastFiltered.Code, 3)},
		{"broadcast filtered", 3, deliver(way(membership.ToAll)), all(broadcastFiltered.Code, 3)},
		{"one-way cable", 3, deliver(func(_, to int, f Frame) int {
			if to == 2 {
				return 0
			}
			return 1
		}), []string{oneWay.Code, oneWay.Code, ""}},
		{"short MTU between", 3, deliver(way(membership.ToNodeBig)), all(mtuMismatch.Code, 3)},
		{"another MTU", 2, func(s *segment) { s.nodes[1].cfg.MTU = 9000 }, all(mtuMismatch.Code, 2)},
		{"frames to a node's address lost", 3, deliver(func(_, to int, f Frame) int {
			if to == 1 && f.To == [6]byte(id(2)) {
				return 0
			}
			return 1
		}), []string{wireMACUnreachable.Code, "", wireMACUnreachable.Code}},
		{"duplicates", 3, deliver(func(from, _ int, f Frame) int {
			if from == 0 {
				return 2
			}
			return 1
		}), []string{"", duplicateFrames.Code, duplicateFrames.Code}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			check := func(s *segment, when string) {
				t.Helper()
				for i, want := range tt.want {
					if got := s.codes(i); got != want {
						t.Errorf("%s: node %d finds %q; want %q", when, i+1, got, want)
					}
				}
			}
			s := newSegment(t, tt.nodes)
			tt.fault(s)
			s.pass(5 * time.Second)
			if strings.Contains(tt.name, "one-way") {
				s.pass(3 * Interval) // who is not heard hurries nobody
			}
			check(s, "at boot")
			s.pass(3 * Interval)
			check(s, "later")

			s = newSegment(t, tt.nodes)
			s.pass(4 * Interval)
			for i := range s.nodes {
				if got := s.codes(i); got != "" {
					t.Errorf("before the fault node %d finds %q", i+1, got)
				}
			}
			tt.fault(s)
			s.pass(5 * Interval)
			check(s, "when it comes later")

			s.cloneAt, s.snoops, s.deliver = 0, false, func(int, int, Frame) int { return 1 }
			for _, m := range s.nodes {
				m.cfg.MTU = 1500
			}
			s.pass(remember + 5*Interval)
			for i := range s.nodes {
				if got := s.codes(i); got != "" {
					t.Errorf("after the fault node %d finds %q", i+1, got)
				}
			}
		})
	}
}

// TestNoFalseAlarm: a good network with loss, nodes that speak for the VIP, start again, die
// or leave for minutes and come, for hours.
func TestNoFalseAlarm(t *testing.T) {
	for seed := range uint64(20) {
		s := newSegment(t, 5)
		s.rng = rand.New(rand.NewPCG(seed, 7))
		s.deliver = func(int, int, Frame) int {
			if s.rng.Float64() < 0.01 {
				return 0
			}
			return 1
		}
		for hour := range 10 {
			s.pass(time.Duration(s.rng.IntN(200)) * time.Second)
			i := s.rng.IntN(5)
			if s.nodes[i] == nil || s.rng.IntN(2) == 0 {
				s.start(i, s.rng.Uint64())
			} else {
				s.nodes[i] = nil
			}
			for range 20 {
				s.pass(time.Duration(s.rng.IntN(5000)) * time.Millisecond)
				s.announce(seed%2 == 1)
				for i, m := range s.nodes {
					if m == nil {
						continue
					}
					if got := s.codes(i); got != "" {
						t.Fatalf("seed %d, part %d: node %d finds %s", seed, hour, i+1, got)
					}
				}
			}
		}
	}
}

// TestRates: what it costs when nothing is wrong, as docs/protocol.md says.
func TestRates(t *testing.T) {
	for _, tt := range []struct {
		nodes         int
		frames, bytes float64 // a second and node, at most
	}{{2, 0.34, 140}, {3, 0.47, 250}, {16, 1.3, 900}} {
		s := newSegment(t, tt.nodes)
		s.pass(3 * Interval)
		s.sent, s.bytes = 0, 0
		s.pass(10 * Interval)
		seconds := (10 * Interval).Seconds() * float64(tt.nodes)
		frames, bytes := float64(s.sent)/seconds, float64(s.bytes)/seconds
		t.Logf("%d nodes: each sends %.2f frames and %.0f bytes a second", tt.nodes, frames, bytes)
		if frames > tt.frames || bytes > tt.bytes {
			t.Errorf("%d nodes: each sends %.2f frames and %.0f bytes a second; want %v and %v at most", tt.nodes, frames, bytes, tt.frames, tt.bytes)
		}
	}
}

// TestBurst: the rate at which a switch stops to flood, from what arrives of a burst.
func TestBurst(t *testing.T) {
	for _, tt := range []struct {
		limit int // frames a second; 0: none
		rate  int
		want  string
	}{
		{0, 8000, ""}, {500, 8000, stormControl.Code}, {3000, 8000, stormControl.Code}, {0, 100, ""},
	} {
		t.Run(fmt.Sprint(tt.limit, " of ", tt.rate), func(t *testing.T) {
			s := newSegment(t, 3)
			s.pass(3 * time.Second)
			budget := map[[2]int]int{}
			s.deliver = func(_, to int, f Frame) int {
				if tt.limit > 0 && f.Probe.Way == membership.BurstClone {
					k := [2]int{to, int(f.Probe.Copy)}
					if budget[k]++; budget[k] > tt.limit/2 { // a stage is half a second
						return 0
					}
				}
				return 1
			}
			s.examine(0, tt.rate)
			if s.nodes[0].exam.phase != done {
				t.Fatalf("the examination is at %v", s.nodes[0].exam.phase)
			}
			if got := s.codes(0); got != tt.want {
				t.Fatalf("found %q; want %q", got, tt.want)
			}
			if c := s.nodes[0].checkStorm(); tt.limit > 0 && !strings.Contains(c.What, fmt.Sprintf("only %d arrive", tt.limit)) ||
				tt.limit == 0 && !strings.Contains(c.What, "arrive at") {
				t.Errorf("it says %q", c.What)
			}
		})
	}
}

// TestLastOne: a node whose others have gone knows nothing of flooding any more, and has
// nobody to send a burst to.
func TestLastOne(t *testing.T) {
	for _, alone := range []time.Duration{time.Second, 5 * Interval} {
		s := newSegment(t, 3)
		s.pass(3 * time.Second)
		s.nodes[1], s.nodes[2] = nil, nil
		s.pass(alone)
		m := s.nodes[0]
		if c := m.checkFlooding(); len(m.nodes) == 0 && (c.Verdict != Unknown || m.place.kind != placeUnknown) {
			t.Errorf("alone for %v it says of flooding: %+v", alone, c)
		}
		s.examine(0, 8000)
		if m.exam.running() {
			t.Errorf("alone for %v: the examination is at %v", alone, m.exam.phase)
		}
	}
}

// TestNoBurst: a burst that was asked for and not sent is said not to have been, and why,
// until the next examination.
func TestNoBurst(t *testing.T) {
	for _, tt := range []struct {
		name  string
		nodes int
		lost  []membership.Way
		want  string
	}{
		{"alone", 1, nil, "hears no other"},
		{"no flooding", 3, []membership.Way{membership.ToClone}, "do not reach every node"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := newSegment(t, tt.nodes)
			s.deliver = way(tt.lost...)
			s.pass(5 * time.Second)
			m := s.nodes[0]
			s.examine(0, 8000)
			if c := m.checkStorm(); m.exam.running() || c.Verdict != Unknown || !strings.Contains(c.What, tt.want) {
				t.Errorf("%+v; want that %s", c, tt.want)
			}
			s.examine(0, 0)
			if c := m.checkStorm(); c.Verdict == Unknown {
				t.Errorf("after an examination without a burst: %+v", c)
			}
		})
	}
	s := newSegment(t, 3)
	s.pass(5 * time.Second)
	for _, tt := range []struct {
		rate int
		want error
	}{{0, nil}, {0, nil}, {8000, ErrExamining}} {
		if err := s.nodes[0].Examine(tt.rate, s.now); !errors.Is(err, tt.want) {
			t.Errorf("a rate of %d: %v; want %v", tt.rate, err, tt.want)
		}
	}
}

// TestHeard: what is known without probes.
func TestHeard(t *testing.T) {
	vip := mustAddr("10.77.0.10")
	other := membership.NodeID{2, 0, 0, 0, 0, 9}
	for _, tt := range []struct {
		name string
		do   func(*segment, *Machine)
		want string
	}{
		{"second cluster", func(s *segment, m *Machine) { m.Stranger(other, false, cloneMAC, s.now) }, secondCluster.Code},
		{"another key", func(s *segment, m *Machine) { m.Stranger(other, true, [6]byte{2}, s.now) }, wrongKey.Code},
		{"neighbour", func(s *segment, m *Machine) { m.Stranger(other, false, [6]byte{2}, s.now) }, otherCluster.Code},
		{"the VIP elsewhere", func(s *segment, m *Machine) { m.Claim(other, other, vip, s.now) }, vipConflict.Code},
		{"the VIP by a stranger", func(s *segment, m *Machine) {
			m.Claim(other, cloneMAC, vip, s.now)
			s.pass(grace)
			m.Claim(other, cloneMAC, vip, s.now)
		}, secondCluster.Code},
		{"the VIP by a member", func(s *segment, m *Machine) {
			m.Claim(id(2), cloneMAC, vip, s.now)
			s.pass(grace)
			m.Claim(id(2), cloneMAC, vip, s.now)
		}, ""},
		{"the VIP elsewhere, as was counted", func(s *segment, m *Machine) { m.Conflict(1, s.now); s.pass(holdBack) }, vipConflict.Code},
		{"the director's own, as was counted", func(s *segment, m *Machine) {
			m.Conflict(3, s.now)
			s.nodes[1].Direct(id(1), true, s.now)
			s.due[1] = 0
			s.pass(holdBack)
		}, ""},
		{"the director's last, as was counted", func(s *segment, m *Machine) {
			m.Direct(id(1), true, s.now)
			s.due[0] = 0
			s.pass(time.Second)
			m.Direct(membership.NodeID{}, true, s.now)
			m.Conflict(3, s.now)
			s.pass(holdBack)
		}, ""},
		{"one DHCP server", func(s *segment, m *Machine) { m.Server("10.77.0.1", s.now) }, ""},
		{"two DHCP servers", func(s *segment, m *Machine) { m.Server("10.77.0.1", s.now); m.Server("10.77.0.2", s.now) }, dhcpServers.Code},
		{"a twin", func(s *segment, m *Machine) {
			m.Hear(&membership.Probe{Peer: membership.Peer{ID: id(1), Incarnation: 7}, Way: membership.ToAll}, s.now)
		}, sameMAC.Code},
		{"its own frames", func(s *segment, m *Machine) {
			m.Hear(&membership.Probe{Peer: m.self, Way: membership.ToAll}, s.now)
		}, loop.Code},
		{"another address", func(s *segment, m *Machine) { m.Self(membership.Peer{ID: id(8), Incarnation: 7}, s.now) }, wireMACChanged.Code},
		{"another start", func(s *segment, m *Machine) { m.Self(membership.Peer{ID: id(1), Incarnation: 7}, s.now) }, ""},
		{"a member that does not hear it", func(s *segment, m *Machine) {
			m.Members(map[membership.NodeID]bool{id(2): false}, s.now)
			s.pass(patience)
		}, oneWay.Code},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := newSegment(t, 2)
			s.pass(3 * time.Second)
			tt.do(s, s.nodes[0])
			s.pass(3 * time.Second)
			if got := s.codes(0); got != tt.want {
				t.Errorf("found %q; want %q", got, tt.want)
			}
		})
	}
}

// TestHealing: that frames are flooded again is known at the next round, and nothing else
// is said of the network while word of it goes round.
func TestHealing(t *testing.T) {
	for _, nodes := range []int{2, 3, 8} {
		s := newSegment(t, nodes)
		lossless := s.deliver
		s.deliver = way(membership.ToClone, membership.BurstClone)
		for _, m := range s.nodes {
			m.Direct(id(1), true, s.now)
		}
		s.pass(4*Interval + 7*time.Second)
		s.deliver = lossless
		begun := s.now
		for s.now-begun < int64(Interval+3*time.Second) {
			s.pass(50 * time.Millisecond)
			for i := range s.nodes {
				if got := s.codes(i); got != "" && got != noFlooding.Code {
					t.Fatalf("%d nodes, after %v: node %d finds %q", nodes, time.Duration(s.now-begun), i+1, got)
				}
			}
		}
		for i := range s.nodes {
			if got := s.codes(i); got != "" {
				t.Errorf("%d nodes: node %d finds %q", nodes, i+1, got)
			}
		}
	}
}
