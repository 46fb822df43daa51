package membership

import (
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"clonecluster/netcore/filter"
	"clonecluster/netcore/load"
)

// farm is a segment whose nodes do work that clients give them, and balance the
// load of it: machines, meters and beacons are the real ones, processors and
// clients are modelled. A node is one processor that serves all its requests at
// the same time; each request costs about the same.
type farm struct {
	*segment
	random  *rand.Rand
	servers []*server
	began   int64
	trace   [][]int // shares at the end of each second

	// rate is how many requests a second come whatever happens, t seconds from
	// the beginning.
	rate func(t float64) float64
	// clients wait for their answers, and then think for that many seconds in the
	// mean before they ask again.
	clients int
	think   float64
	// life, if not zero, makes the requests connections that live for so many
	// seconds in the mean, and keep a part of the processor busy as long.
	life float64
}

// server is the work of one node.
type server struct {
	*station
	speed float64 // requests a second, or connections at a time, that keep the processor busy
	open  int     // requests or connections
	idle  int     // connections in which nothing happens
	noise float64 // standard deviation of the busy share of half a second
	busy  float64 // seconds since the last report
	stat  load.Stat
	meter *load.Meter
}

const (
	farmTick   = 5 * time.Millisecond
	loadPeriod = 500 * time.Millisecond
)

// newFarm starts nodes with processors of these speeds.
func newFarm(t *testing.T, speeds ...float64) *farm {
	t.Helper()
	s, _ := cluster(t, len(speeds), balancing)
	s.torn = true // not checked here: it takes time
	f := &farm{segment: s, random: rand.New(rand.NewPCG(1, 2)), began: s.now}
	for i, speed := range speeds {
		f.add(s.nodes[i], speed)
	}
	return f
}

func balancing(c *Config) { c.Policy.Balance = Load }

func (f *farm) add(st *station, speed float64) {
	f.servers = append(f.servers, &server{station: st, speed: speed, meter: load.NewMeter(load.Tau)})
}

func constant(rate float64) func(float64) float64 { return func(float64) float64 { return rate } }

// pass lets time pass.
func (f *farm) pass(d time.Duration) {
	f.tb.Helper()
	for end := f.now + int64(d); f.now < end; {
		f.arrive()
		for _, s := range f.servers {
			f.serve(s)
		}
		f.run(farmTick)
		t := f.now - f.began
		if t%int64(loadPeriod) == 0 {
			for _, s := range f.servers {
				f.report(s)
			}
		}
		if t%int64(time.Second) == 0 {
			var shares []int
			for _, s := range f.servers {
				shares = append(shares, s.owned)
			}
			f.trace = append(f.trace, shares)
		}
	}
}

func (f *farm) arrive() {
	n, dt := 0, farmTick.Seconds()
	if f.rate != nil {
		n = f.poisson(f.rate(float64(f.now-f.began)/1e9) * dt)
	}
	thinking := f.clients
	for _, s := range f.servers {
		thinking -= s.open
	}
	switch {
	case f.clients == 0:
	case f.think == 0:
		n += thinking
	default:
		n += min(thinking, f.poisson(float64(thinking)*dt/f.think))
	}
	for range n {
		bucket := f.random.IntN(filter.Buckets)
		for _, s := range f.servers {
			if s.table[bucket].Owned() {
				s.open++
				break
			}
		}
	}
}

// serve lets a node work for a tick.
func (f *farm) serve(s *server) {
	dt := farmTick.Seconds()
	if f.life > 0 {
		s.busy += dt * min(1, float64(s.open)/s.speed)
		s.open -= min(s.open, f.poisson(float64(s.open)*dt/f.life))
		return
	}
	can := f.poisson(s.speed * dt)
	done := min(can, s.open)
	switch {
	case can > 0:
		s.busy += dt * float64(done) / float64(can)
	case s.open > 0:
		s.busy += dt
	}
	s.open = min(s.open-done, int(10*s.speed)) // who waits for ten seconds gives up
}

// report is what the engine does with its node's meter.
func (f *farm) report(s *server) {
	share := s.busy/loadPeriod.Seconds() + s.noise*f.random.NormFloat64()
	ticks := min(max(share, 0), 1) * float64(loadPeriod.Microseconds())
	s.stat.Busy += uint64(ticks)
	s.stat.Idle += uint64(loadPeriod.Microseconds()) - uint64(ticks)
	s.busy = 0
	m := s.meter.Add(s.stat, s.open+s.idle, time.Duration(f.now))
	s.step(LoadSeen{m.Busy, m.Flows})
}

// poisson draws how many of independent events happen of which mean are expected.
func (f *farm) poisson(mean float64) int {
	if mean > 30 {
		return max(0, int(math.Round(mean+math.Sqrt(mean)*f.random.NormFloat64())))
	}
	n := 0
	for p := f.random.Float64(); p > math.Exp(-mean); n++ {
		p *= f.random.Float64()
	}
	return n
}

// ideal are the shares in proportion to the speeds, in buckets.
func (f *farm) ideal() (shares []float64) {
	total := 0.0
	for _, s := range f.servers {
		total += s.speed
	}
	for _, s := range f.servers {
		shares = append(shares, s.speed/total*filter.Buckets)
	}
	return shares
}

// wantWithin asserts that from a second on no share is off by more than a part of
// the ideal one.
func (f *farm) wantWithin(from int, part float64, ideal []float64) {
	f.tb.Helper()
	for second, shares := range f.trace[from:] {
		for i, n := range shares {
			if math.Abs(float64(n)-ideal[i]) > part*ideal[i] {
				f.tb.Errorf("after %d s the shares are %v; want %.0f, give or take %.0f %%\n%s", from+second, shares, ideal, 100*part, f)
				return
			}
		}
	}
}

// wantCalm asserts that in the last minute no share moves by more than 3 % of the
// buckets, and that they do not swing.
func (f *farm) wantCalm() {
	f.tb.Helper()
	last := f.trace[len(f.trace)-60:]
	for i := range f.servers {
		low, high, turns, direction := filter.Buckets, 0, 0, 0
		for second, shares := range last {
			low, high = min(low, shares[i]), max(high, shares[i])
			if second == 0 || shares[i] == last[second-1][i] {
				continue
			}
			next := 1
			if shares[i] < last[second-1][i] {
				next = -1
			}
			if next == -direction {
				turns++
			}
			direction = next
		}
		if high-low > filter.Buckets*3/100 || turns > 10 {
			f.tb.Errorf("in the last minute node %d has %d to %d buckets, and turns %d times; want 30 from end to end, 10 times\n%s", i+1, low, high, turns, f)
		}
	}
}

func (f *farm) String() (d string) {
	for second := 9; second < len(f.trace); second += max(10, len(f.trace)/24) {
		d += fmt.Sprint(second+1, "s:", f.trace[second], " ")
	}
	return d
}

// TestLoadConverges: one of two nodes has half the speed. Within a minute the
// shares are as the speeds are, however much there is to do, and stay so.
func TestLoadConverges(t *testing.T) {
	for _, tt := range []struct {
		name    string
		offered float64 // part of what both can do
		clients int
		think   float64
	}{
		{name: "a third", offered: 0.33},
		{name: "two thirds", offered: 0.66},
		{name: "nearly all", offered: 0.85},
		{name: "few clients", clients: 4},
		{name: "some clients", clients: 16},
		{name: "many clients", clients: 64},
		{name: "more clients", clients: 256},
		{name: "a crowd of clients", clients: 2000},
		{name: "clients that think", clients: 1500, think: 1},
		{name: "too many clients that think", clients: 3000, think: 1},
	} {
		t.Run(tt.name, func(t *testing.T) {
			f := newFarm(t, 1000, 500)
			f.rate, f.clients, f.think = constant(tt.offered*1500), tt.clients, tt.think
			f.pass(3 * time.Minute)
			f.wantWithin(60, 0.1, f.ideal())
			f.wantCalm()
		})
	}
}

// TestLoadConvergesAmongMany: also if some are far slower than others, though
// that takes longer.
func TestLoadConvergesAmongMany(t *testing.T) {
	for _, clients := range []int{0, 200} {
		f := newFarm(t, 1000, 1000, 500, 250)
		if f.clients = clients; clients == 0 {
			f.rate = constant(0.7 * 2750)
		}
		f.pass(5 * time.Minute)
		f.wantWithin(120, 0.1, f.ideal())
		f.wantCalm()
	}
}

// TestLoadSteps: what there is to do, or what a node can do, changes at once.
func TestLoadSteps(t *testing.T) {
	t.Run("offered", func(t *testing.T) {
		f := newFarm(t, 1000, 500)
		f.rate = func(t float64) float64 { return []float64{300, 1300, 800, 1200}[min(3, int(t/60))] }
		f.pass(5 * time.Minute)
		f.wantWithin(60, 0.1, f.ideal())
		f.wantCalm()
	})
	for _, clients := range []int{0, 100} {
		t.Run(fmt.Sprintf("speed, %d clients", clients), func(t *testing.T) {
			f := newFarm(t, 1000, 1000)
			if f.clients = clients; clients == 0 {
				f.rate = constant(1200)
			}
			f.pass(time.Minute)
			f.wantWithin(0, 0.05, f.ideal())
			f.servers[1].speed = 500
			f.pass(3 * time.Minute)
			f.wantWithin(120, 0.1, f.ideal())
			f.wantCalm()
			f.servers[1].speed = 1000
			f.pass(3 * time.Minute)
			f.wantWithin(300, 0.1, f.ideal())
			f.wantCalm()
		})
	}
}

// TestLoadConnections: a node that is given less is not less busy before the
// connections that it has are over. The longer they live, the farther the shares
// go, but it dies down.
func TestLoadConnections(t *testing.T) {
	for _, speed := range []float64{10000, 5000} { // so many that few are not many more by chance
		for _, life := range []float64{5, 20, 60} {
			t.Run(fmt.Sprintf("second has %g, lives of %g s", speed, life), func(t *testing.T) {
				f := newFarm(t, 10000, speed)
				f.life, f.rate = life, constant(0.7*(10000+speed)/life)
				f.pass(10 * time.Minute)
				f.wantWithin(480, 0.1, f.ideal())
				f.wantCalm()
			})
		}
	}
}

// TestLoadIdleConnections: connections in which nothing happens are no load.
func TestLoadIdleConnections(t *testing.T) {
	for _, speed := range []float64{1000, 500} {
		f := newFarm(t, 1000, speed)
		f.rate = constant(0.6 * (1000 + speed))
		f.servers[0].idle = 1000
		f.pass(3 * time.Minute)
		f.wantWithin(60, 0.1, f.ideal())
		f.wantCalm()
	}
}

// TestLoadEqual: nodes that are alike have the same, whatever the meters' noise.
func TestLoadEqual(t *testing.T) {
	for _, noise := range []float64{0, 0.05, 0.1} {
		for _, clients := range []int{0, 200} {
			f := newFarm(t, 1000, 1000, 1000)
			if f.clients = clients; clients == 0 {
				f.rate = constant(1500)
			}
			for _, s := range f.servers {
				s.noise = noise
			}
			f.pass(4 * time.Minute)
			f.wantWithin(0, 0.07, f.ideal())
		}
	}
}

// TestLoadMoves: however far off the shares are, no more than Moves buckets a
// second change hands.
func TestLoadMoves(t *testing.T) {
	for _, moves := range []int{1, 4, 32} {
		s, _ := cluster(t, 3, balancing, func(c *Config) { c.Policy.Moves = moves })
		f := &farm{segment: s, random: rand.New(rand.NewPCG(1, 2)), began: s.now, clients: 300}
		for i, speed := range []float64{1000, 500, 100} {
			f.add(s.nodes[i], speed)
		}
		leader := s.nodes[0]
		first, total := leader.cur, 0
		for range 90 {
			last := leader.cur
			f.pass(time.Second)
			moved := movedBetween(last, leader.cur)
			if total += moved; moved > moves {
				t.Fatalf("%d buckets move in a second; want %d at most", moved, moves)
			}
		}
		if total == 0 || moves == 1 && movedBetween(first, leader.cur) < 60 {
			t.Errorf("with %d moves a second %d buckets have moved in the end\n%s", moves, movedBetween(first, leader.cur), f)
		}
		// One that is hopelessly slow, or busy with something else, keeps a part.
		if got := f.servers[2].owned; got < 1024/3/8 {
			t.Errorf("the slowest has %d buckets left; want an eighth of its static share at least", got)
		}
	}
}

func movedBetween(a, b *Map) (n int) {
	for bucket := range filter.Buckets {
		if a.owner(bucket) != b.owner(bucket) {
			n++
		}
	}
	return n
}

// TestLoadIdle: with nothing to do the shares go back to the static weights.
func TestLoadIdle(t *testing.T) {
	for _, weights := range [][]int{{100, 100}, {100, 300}} {
		s, _ := cluster(t, 2, balancing, func(c *Config) { c.Weight = weights[c.Self.ID[5]-1] })
		f := &farm{segment: s, random: rand.New(rand.NewPCG(1, 2)), began: s.now}
		f.add(s.nodes[0], 1000)
		f.add(s.nodes[1], 500)
		f.rate = func(t float64) float64 {
			if t < 60 {
				return 1000
			}
			return 10
		}
		f.pass(time.Minute)
		static := apportion([]float64{float64(weights[0]), float64(weights[1])})
		if off := f.servers[0].owned - static[0]; off < 100 {
			t.Fatalf("the load moves %d buckets; want 100 at least\n%s", off, f)
		}
		f.pass(time.Minute)
		for i, s := range f.servers {
			if off := s.owned - static[i]; off < -1 || off > 1 {
				t.Errorf("idle, node %d has %d buckets; want %d, or one off\n%s", i+1, s.owned, static[i], f)
			}
		}
		if !slices.Equal(f.trace[len(f.trace)-1], f.trace[len(f.trace)-10]) {
			t.Errorf("and they move on\n%s", f)
		}
	}
}

// TestLoadNewcomer: it begins with its fair share, and the others keep theirs in
// proportion to each other.
func TestLoadNewcomer(t *testing.T) {
	f := newFarm(t, 1000, 500)
	f.rate = constant(1000)
	f.pass(2 * time.Minute)
	before := slices.Clone(f.trace[len(f.trace)-1])
	third := f.start(3, balancing)
	for third.owned == 0 {
		f.pass(farmTick)
	}
	f.add(third, 500)
	for i, n := range before {
		want := float64(n) / filter.Buckets * 200 / 300 * filter.Buckets
		if got := f.servers[i].owned; math.Abs(float64(got)-want) > 1 {
			t.Errorf("node %d, which had %d buckets, now has %d; want %.1f", i+1, n, got, want)
		}
	}
	if third.owned != 341 && third.owned != 342 {
		t.Errorf("the newcomer has %d buckets; want a third", third.owned)
	}
	f.trace = nil
	f.pass(3 * time.Minute)
	f.wantWithin(90, 0.1, f.ideal())
	f.wantCalm()
}

// TestLoadEven: with the other balance the load moves nothing.
func TestLoadEven(t *testing.T) {
	s, n := cluster(t, 2)
	for range 60 {
		n[0].step(LoadSeen{Busy: 1000, Flows: 5000})
		n[1].step(LoadSeen{Busy: 10, Flows: 1})
		s.run(time.Second)
	}
	s.want(512, 512)
	if n[0].cur.Version > 2 {
		t.Errorf("%d maps were made", n[0].cur.Version)
	}
}

// TestLoadEvenClients: equal nodes of which some have less to do than others now and then, by
// chance, as clients wait for their answers, do not have a map for each of these times.
func TestLoadEvenClients(t *testing.T) {
	f := newFarm(t, 38, 38, 38, 38)
	f.clients = 30
	f.pass(20 * time.Second)
	before := f.servers[0].cur.Version
	f.pass(5 * time.Minute)
	if maps := f.servers[0].cur.Version - before; maps > 50 {
		t.Errorf("%d maps in 5 minutes; want 50 at most\n%v", maps, f.trace)
	}
}

// TestLoadSettles: nodes that are about as busy as each other have no new map each second.
func TestLoadSettles(t *testing.T) {
	f := newFarm(t, 100, 95)
	for _, s := range f.servers {
		s.noise = 0.03
	}
	f.clients, f.think = 150, 1
	f.pass(60 * time.Second)
	before := f.servers[0].cur.Version
	f.pass(120 * time.Second)
	if maps := f.servers[0].cur.Version - before; maps > 15 {
		t.Errorf("%d maps in 120 s; want 15 at most\n%v", maps, f.trace)
	}
}

// TestLoadBursts: clients come and go at once. Nodes that are alike stay so, though who has fewer of them when they
// go is idle before the others are; one that is slower has less nevertheless.
func TestLoadBursts(t *testing.T) {
	for _, pause := range []time.Duration{2 * time.Second, 5 * time.Second, 9 * time.Second} {
		for _, clients := range []int{20, 60, 200} {
			for _, last := range []float64{38, 19} {
				t.Run(fmt.Sprintf("%d clients, pauses of %v, last has %g", clients, pause, last), func(t *testing.T) {
					f := newFarm(t, 38, 38, 38, last)
					for range 30 {
						f.clients = clients
						f.pass(5 * time.Second)
						f.clients = 0
						f.pass(pause)
					}
					if last == 38 {
						f.wantWithin(0, 0.15, f.ideal())
						return
					}
					sum := 0
					for _, shares := range f.trace[60:] {
						sum += shares[3]
					}
					most := 165 // after a while without clients the shares go back
					if pause > 5*time.Second {
						most = 220
					}
					if mean := sum / len(f.trace[60:]); mean > most || float64(mean) < 0.85*f.ideal()[3] {
						t.Errorf("a node of half the speed has %d buckets in the mean; want more than %.0f, and at most %d\n%s", mean, 0.85*f.ideal()[3], most, f)
					}
				})
			}
		}
	}
}
