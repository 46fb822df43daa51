package membership

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"clonecluster/netcore/filter"
)

func TestApportion(t *testing.T) {
	for _, tt := range []struct {
		shares []float64
		want   []int
	}{
		{nil, nil},
		{[]float64{100}, []int{1024}},
		{[]float64{100, 100}, []int{512, 512}},
		{[]float64{1, 1, 1}, []int{342, 341, 341}}, // equal remainders: the first
		{[]float64{1, 1, 1, 1, 1}, []int{205, 205, 205, 205, 204}},
		{[]float64{100, 50}, []int{683, 341}},      // 682.67, 341.33
		{[]float64{50, 100}, []int{341, 683}},      // the largest remainder, not the first
		{[]float64{1, 2, 4}, []int{146, 293, 585}}, // 146.29, 292.57, 585.14
		{[]float64{0, 100}, []int{0, 1024}},
		{[]float64{0, 0}, []int{0, 0}}, // nobody takes any
		{[]float64{1, 1e12}, []int{0, 1024}},
		{[]float64{1e300, 1e300}, []int{512, 512}},
		{[]float64{1e-300, 1e-300, 2e-300}, []int{256, 256, 512}},
	} {
		if got := apportion(tt.shares); !slices.Equal(got, tt.want) {
			t.Errorf("apportion(%v) = %v; want %v", tt.shares, got, tt.want)
		}
	}
}

// TestApportionFair: all buckets are given away, and nobody has one more or less
// than its share.
func TestApportionFair(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 1))
	for range 2000 {
		shares := make([]float64, 1+random.IntN(MaxNodes))
		total := 0.0
		for i := range shares {
			shares[i] = float64(1 + random.IntN(1000))
			total += shares[i]
		}
		got := apportion(shares)
		if s := sum64(got); s != filter.Buckets {
			t.Fatalf("apportion(%v) gives away %d buckets", shares, s)
		}
		for i, q := range got {
			if exact := shares[i] / total * filter.Buckets; float64(q) <= exact-1 || float64(q) >= exact+1 {
				t.Fatalf("apportion(%v) gives %d instead of %.2f buckets to %d", shares, q, exact, i)
			}
		}
	}
}

func sum64(all []int) (s int) {
	for _, x := range all {
		s += x
	}
	return s
}

// ids gives the addresses of nodes from first to last.
func ids(first, last int) (all []NodeID) {
	for n := first; n <= last; n++ {
		all = append(all, mac(n))
	}
	return all
}

// checkAssign asserts that the buckets are divided by the quotas and that no more
// of them move than must: those that a node has above its quota, or whose owner is
// no member.
func checkAssign(t *testing.T, last *Map, members []NodeID, quotas []int) *Map {
	t.Helper()
	next := &Map{Members: members, Owner: assign(last, members, quotas)}
	got := make([]int, len(members))
	for b, o := range next.Owner {
		if o == Nobody {
			t.Fatalf("bucket %d has no owner", b)
		}
		got[o]++
	}
	if !slices.Equal(got, quotas) {
		t.Fatalf("the quotas are %v; want %v", got, quotas)
	}
	if last == nil {
		return next
	}
	moved, must := 0, 0
	have := map[NodeID]int{}
	for b := range last.Owner {
		have[last.owner(b)]++
		if last.owner(b) != next.owner(b) {
			moved++
		}
	}
	for id, n := range have {
		quota := 0
		if i := slices.Index(members, id); i >= 0 {
			quota = quotas[i]
		}
		must += max(0, n-quota)
	}
	if moved != must {
		t.Fatalf("from %d to %d members %d buckets move; want %d", len(last.Members), len(members), moved, must)
	}
	return next
}

func TestAssign(t *testing.T) {
	even := func(n int) []int { return apportion(slices.Repeat([]float64{1}, n)) }
	for _, n := range []int{1, 2, 3, 7, 64, MaxNodes - 1} {
		t.Run(fmt.Sprint(n), func(t *testing.T) {
			first := checkAssign(t, nil, ids(1, n), even(n))
			checkAssign(t, first, ids(1, n), even(n)) // and none moves
			joined := checkAssign(t, first, ids(1, n+1), even(n+1))
			checkAssign(t, joined, ids(1, n), even(n))     // the last goes again
			checkAssign(t, joined, ids(2, n+1), even(n))   // the first goes
			checkAssign(t, joined, ids(n+2, n+2), even(1)) // all are replaced
			weights := slices.Repeat([]float64{100}, n+1)
			weights[0] = 10
			checkAssign(t, joined, ids(1, n+1), apportion(weights))
			weights[0], weights[n] = 1000, 0
			checkAssign(t, joined, ids(1, n+1), apportion(weights))
		})
	}
}

// TestAssignRandom: a long chain of maps, each made from the last.
func TestAssignRandom(t *testing.T) {
	random := rand.New(rand.NewPCG(2, 2))
	var last *Map
	for range 300 {
		var members []NodeID
		for n := range 1 + random.IntN(40) {
			if random.IntN(3) > 0 || n == 0 {
				members = append(members, mac(n+1))
			}
		}
		shares := make([]float64, len(members))
		for i := range shares {
			shares[i] = float64(1 + random.IntN(1000))
		}
		last = checkAssign(t, last, members, apportion(shares))
	}
}

// TestAssignOrder: how the members are listed makes no difference, in this map or
// the last.
func TestAssignOrder(t *testing.T) {
	random := rand.New(rand.NewPCG(3, 3))
	last := &Map{Members: ids(1, 8), Owner: assign(nil, ids(1, 8), apportion(slices.Repeat([]float64{1}, 8)))}
	members := ids(3, 12)
	quotas := apportion([]float64{5, 1, 7, 30, 30, 30, 2, 2, 9, 100})
	want := &Map{Members: members, Owner: assign(last, members, quotas)}
	for range 20 {
		order := random.Perm(len(members))
		shuffled, q := make([]NodeID, len(members)), make([]int, len(members))
		for i, j := range order {
			shuffled[i], q[i] = members[j], quotas[j]
		}
		lastShuffled := &Map{Members: make([]NodeID, 8), Owner: last.Owner}
		for i, j := range random.Perm(8) {
			lastShuffled.Members[j] = last.Members[i]
			for b, o := range last.Owner {
				if int(o) == i {
					lastShuffled.Owner[b] = uint8(j)
				}
			}
		}
		got := &Map{Members: shuffled, Owner: assign(lastShuffled, shuffled, q)}
		for b := range filter.Buckets {
			if got.owner(b) != want.owner(b) {
				t.Fatalf("bucket %d goes to %v or %v, as the members are listed", b, got.owner(b), want.owner(b))
			}
		}
	}
}

// TestAssignNobody: buckets that nobody had, and a map without members.
func TestAssignNobody(t *testing.T) {
	none := &Map{Owner: assign(nil, nil, nil)}
	for b := range none.Owner {
		if none.Owner[b] != Nobody {
			t.Fatalf("without members bucket %d has the owner %d", b, none.Owner[b])
		}
	}
	next := &Map{Members: ids(1, 2), Owner: assign(none, ids(1, 2), []int{512, 512})}
	if n := next.share(mac(1)); n != 512 || next.share(mac(2)) != 512 {
		t.Errorf("from nobody's the shares are %d and %d", n, next.share(mac(2)))
	}
}

// share counts the buckets of a node.
func (m *Map) share(id NodeID) (n int) {
	for b := range m.Owner {
		if m.owner(b) == id {
			n++
		}
	}
	return n
}

// TestScatter: the buckets of one that dies go to all the others, in proportion.
func TestScatter(t *testing.T) {
	const n = 8
	first := &Map{Members: ids(1, n), Owner: assign(nil, ids(1, n), apportion(slices.Repeat([]float64{1}, n)))}
	rest := ids(2, n)
	next := &Map{Members: rest, Owner: assign(first, rest, apportion(slices.Repeat([]float64{1}, n-1)))}
	for _, id := range rest {
		if got := next.share(id) - first.share(id); got < 18 || got > 19 { // 128 by 7
			t.Errorf("%v gains %d of 128 buckets; want 18 or 19", id, got)
		}
	}
	// And by chance, not in a row: a run of 128 would hit one network of clients.
	runs := 0
	for b := 1; b < filter.Buckets; b++ {
		if first.Owner[b] != first.Owner[b-1] {
			runs++
		}
	}
	if want := 1023 * (n - 1) / n; runs < want-60 || runs > want+60 { // ±4 standard deviations
		t.Errorf("the owner changes %d times from bucket to bucket; want about %d", runs, want)
	}
}

// maker gives a machine in some state with live peers, numbered from 2.
func maker(self peer, peers ...peer) *Machine {
	m := New(Config{Self: Peer{mac(1), 1}, Params: normal, Weight: 100, Rules: 1}, int64(time.Hour))
	m.state, m.sick, m.drain = self.state, self.sick, self.state == Draining
	if self.rules != 0 {
		m.cfg.Rules = self.rules
	}
	for i := range peers {
		p := m.newPeer(Peer{mac(i + 2), 1})
		p.state, p.sick, p.rules, p.weight = peers[i].state, peers[i].sick, max(peers[i].rules, 1), peers[i].weight
		p.live, p.proven = true, true
		m.live = append(m.live, p)
	}
	return m
}

func TestCandidates(t *testing.T) {
	well, sick, drain := peer{state: Serving}, peer{state: Serving, sick: true}, peer{state: Draining}
	sickDrain, listening, stopping := peer{state: Draining, sick: true}, peer{state: Listening}, peer{state: Stopping}
	foreign := peer{state: Serving, rules: 2}
	for _, tt := range []struct {
		name    string
		nodes   []peer // the first is oneself
		want    []int
		orStop  []int // with StopWhenSick
		allSick bool
	}{
		{"all well", []peer{well, well, well}, []int{1, 2, 3}, []int{1, 2, 3}, false},
		{"some sick", []peer{sick, well, sick}, []int{2}, []int{2}, false},
		{"some drain", []peer{well, drain, well}, []int{1, 3}, []int{1, 3}, false},
		{"all sick", []peer{sick, sick}, []int{1, 2}, nil, true},
		{"all drain", []peer{drain, drain, drain}, []int{1, 2, 3}, []int{1, 2, 3}, false},
		{"all drain and are sick", []peer{sickDrain, sickDrain}, []int{1, 2}, []int{1, 2}, false},
		{"sick or drain", []peer{drain, sick, drain}, []int{2}, nil, true},
		{"who listens does not count", []peer{listening, well}, []int{2}, []int{2}, false},
		{"nor who stops", []peer{stopping, drain, stopping}, []int{2}, []int{2}, false},
		{"nobody", []peer{listening, stopping}, nil, nil, false},
		{"other rules", []peer{well, foreign, well}, []int{1, 3}, []int{1, 3}, false},
		{"own rules are the others'", []peer{{state: Listening, rules: 2}, well, foreign}, []int{2}, []int{2}, false},
	} {
		for _, stop := range []bool{false, true} {
			m, want := maker(tt.nodes[0], tt.nodes[1:]...), tt.want
			if m.cfg.Policy.StopWhenSick = stop; stop {
				want = tt.orStop
			}
			var got []int
			for _, c := range m.candidates() {
				got = append(got, int(c.id[5]))
			}
			if !slices.Equal(got, want) || m.everybodySick() != tt.allSick {
				t.Errorf("%s, stop when sick %v: candidates %v, all sick %v; want %v, %v", tt.name, stop, got, m.everybodySick(), want, tt.allSick)
			}
		}
	}
}

// TestWeights: exact shares, whatever the order in which the nodes come.
func TestWeights(t *testing.T) {
	weights := map[NodeID]int{mac(1): 100, mac(2): 50, mac(3): 1000, mac(4): 1}
	weighted := func(c *Config) { c.Weight = weights[c.Self.ID] }
	s, _ := cluster(t, 2, weighted)
	s.want(683, 341)
	s.start(3, weighted)
	s.run(2 * time.Second)
	s.want(89, 45, 890) // 89.04, 44.52, 890.43
	s.start(4, weighted)
	s.run(2 * time.Second)
	s.want(89, 44, 890, 1) // 88.97, 44.48, 889.66, 0.89
}

// TestSameMap: whoever leads makes the same of the same.
func TestSameMap(t *testing.T) {
	s, n := cluster(t, 4, func(c *Config) { c.Weight = 100 * int(c.Self.ID[5]) })
	n[1].step(Health{OK: false})
	s.run(time.Second)
	n[1].step(Health{OK: true}) // so that the buckets lie as nobody would lay them
	s.run(time.Second)
	n[3].step(Drain{On: true})
	s.run(time.Second)
	s.want(171, 341, 512, 0)
	var want *Map
	for _, st := range n {
		chosen := st.candidates()
		var members []NodeID
		var shares []float64
		for _, c := range chosen {
			members, shares = append(members, c.id), append(shares, 1) // other quotas than those in use
		}
		got := &Map{Members: members, Owner: assign(st.cur, members, apportion(shares))}
		if want == nil {
			want = got
		}
		if !slices.Equal(got.Members, want.Members) || got.Owner != want.Owner {
			t.Errorf("node %d would make another map than node 1", st.n)
		}
	}
}

// TestVersion: a map is numbered above every one that a peer that is there has
// spoken of.
func TestVersion(t *testing.T) {
	for _, tt := range []struct {
		name    string
		leader  int // of the map that the peer speaks of
		version uint64
		proven  bool
		want    MapID
	}{
		{"a far higher one", 2, 5000, true, MapID{5001, mac(1)}},
		{"the same version by a higher leader", 2, 1, true, MapID{2, mac(1)}},
		{"the same map", 1, 1, true, MapID{2, mac(1)}}, // it takes part
		{"in a recording", 2, 5000, false, MapID{1, mac(1)}},
	} {
		s, n := cluster(t, 1)
		b := ghost(mac(2), 7, 1)
		b.Map = MapID{tt.version, mac(tt.leader)}
		if tt.proven {
			b.Heard = []Tag{n[0].Self().Tag()}
		}
		n[0].step(Received{b})
		s.run(time.Duration(interval / 4))
		if got := n[0].View().Map; got != tt.want {
			t.Errorf("a peer speaks of %s: the map is now %v; want %v", tt.name, got, tt.want)
		}
	}
}

// TestMapsAreFew: not every change has a map of its own, but the last one is not
// forgotten.
func TestMapsAreFew(t *testing.T) {
	s, n := cluster(t, 2)
	was := n[0].noted(NewMap)
	for range 100 {
		n[1].step(Health{OK: n[1].sick})
		s.run(time.Millisecond)
	}
	if made := n[0].noted(NewMap) - was; made > 5 {
		t.Errorf("%d maps within an interval; want one each quarter", made)
	}
	s.run(time.Second)
	s.want(512, 512)
	n[1].step(Health{OK: false})
	s.run(time.Millisecond)
	n[1].step(Health{OK: true})
	s.run(time.Millisecond)
	n[1].step(Health{OK: false})
	s.run(time.Second)
	s.want(1024, 0)
}

// TestMapIsSentOnce: whoever has just adopted a map does not send it to those of
// which it has not yet heard that they have it too.
func TestMapIsSentOnce(t *testing.T) {
	s, n := cluster(t, 8)
	s.run(5 * time.Second)
	sent := func() (maps int) {
		for _, st := range n {
			maps += len(st.made)
		}
		return maps
	}
	was := sent()
	n[1].step(Drain{On: true})
	s.run(time.Second)
	if got := sent() - was; got != 1 {
		t.Errorf("one map is sent %d times; want once", got)
	}
}

// TestRelay: nodes 1 and 3 do not hear each other, and node 2 hears both. The
// lowest leads those that it hears, and the third, which has its map from the
// second, owns nothing.
func TestRelay(t *testing.T) {
	s := newSegment(t, ms)
	s.cut[[2]int{1, 3}], s.cut[[2]int{3, 1}] = true, true
	s.torn = true // until 2 has told 3 of 1
	for n := range 3 {
		s.start(n + 1)
	}
	s.run(2 * time.Second)
	s.torn = false
	s.run(time.Second)
	s.want(512, 512, 0)
	for _, st := range s.nodes {
		if v := st.View(); v.Leader != mac(1) || v.Map.Leader != mac(1) {
			t.Errorf("node %d has the leader %v, and a map of %v", st.n, v.Leader, v.Map.Leader)
		}
	}
	if len(s.nodes[1].made) == 0 {
		t.Error("node 2 has not passed the map on")
	}
	clear(s.cut)
	s.run(2 * time.Second)
	s.want(342, 341, 341)
}

// TestMapLost: a map that did not arrive is sent again.
func TestMapLost(t *testing.T) {
	s, n := cluster(t, 2)
	version := n[0].cur.Version
	n[0].step(Drain{On: true})
	s.flight = slices.DeleteFunc(s.flight, func(a arrival) bool { _, isMap := a.ev.(ReceivedMap); return isMap })
	s.run(time.Duration(s.delay))
	if n[1].cur.Version != version {
		t.Fatal("the map is not lost")
	}
	took := s.await("it arrives", func() bool { return n[1].cur.Version > version })
	if took > interval {
		t.Errorf("it is sent again after %d ns", took)
	}
	s.run(time.Second)
	s.want(0, 1024)
}
