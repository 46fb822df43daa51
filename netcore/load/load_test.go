package load

import (
	"math"
	"math/rand/v2"
	"testing"
	"time"
)

// machine is a made-up machine whose ticks are microseconds, so that they do not
// round. It has as many connections as its CPUs are busy per mille.
type machine struct {
	meter *Meter
	stat  Stat
	at    time.Duration
}

func newMachine(tau time.Duration) *machine {
	c := &machine{meter: NewMeter(tau)}
	c.read(0)
	return c
}

// pass lets time pass in which this share was busy, per mille.
func (c *machine) pass(d time.Duration, busy uint64) {
	c.at += d
	ticks := uint64(d.Microseconds())
	c.stat.Busy += ticks * busy / 1000
	c.stat.Idle += ticks - ticks*busy/1000
}

func (c *machine) read(busy uint64) Sample { return c.meter.Add(c.stat, int(busy), c.at) }

// run is pass with readings at an interval that divides the time.
func (c *machine) run(d, interval time.Duration, busy uint64) (s Sample) {
	for range d / interval {
		c.pass(interval, busy)
		s = c.read(busy)
	}
	return s
}

var intervals = []time.Duration{10 * time.Millisecond, 100 * time.Millisecond, 500 * time.Millisecond, Tau}

func TestStepResponse(t *testing.T) {
	for _, interval := range intervals {
		for _, tt := range []struct {
			after time.Duration
			up    uint16 // 1000 (1 - exp(-after/Tau))
		}{{Tau, 632}, {2 * Tau, 865}, {3 * Tau, 950}, {10 * Tau, 1000}} {
			c := newMachine(Tau)
			c.run(time.Minute, interval, 0)
			if got := c.run(tt.after, interval, 1000); got != (Sample{tt.up, uint32(tt.up)}) {
				t.Errorf("read every %v, %v after the step up: %+v; want %d of both", interval, tt.after, got, tt.up)
			}
			c.run(time.Minute, interval, 1000)
			down := 1000 - tt.up
			if got := c.run(tt.after, interval, 0); got != (Sample{down, uint32(down)}) {
				t.Errorf("read every %v, %v after the step down: %+v; want %d of both", interval, tt.after, got, down)
			}
		}
	}
}

// TestIntervalDoesNotMatter reads the same load at different times.
func TestIntervalDoesNotMatter(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	shares := make([]uint64, 50)
	for i := range shares {
		shares[i] = random.Uint64N(1001)
	}
	// Each share lasts for two seconds, at whose end all are compared.
	var want []Sample
	c := newMachine(Tau)
	for _, s := range shares {
		want = append(want, c.run(2*time.Second, time.Millisecond, s))
	}
	for _, interval := range intervals {
		c := newMachine(Tau)
		for i, s := range shares {
			if got := c.run(2*time.Second, interval, s); !near(got, want[i]) {
				t.Errorf("read every %v, %ds: %+v; want %+v", interval, 2*(i+1), got, want[i])
			}
		}
	}
	c = newMachine(Tau)
	for i, s := range shares {
		end := c.at + 2*time.Second
		for c.at < end {
			c.pass(min(time.Duration(1+random.IntN(1000))*time.Millisecond, end-c.at), s)
			c.read(s)
		}
		if got := c.read(s); !near(got, want[i]) {
			t.Errorf("read at any time, %ds: %+v; want %+v", 2*(i+1), got, want[i])
		}
	}
}

// near allows for rounding.
func near(a, b Sample) bool {
	return math.Abs(float64(a.Busy)-float64(b.Busy)) <= 1 && math.Abs(float64(a.Flows)-float64(b.Flows)) <= 1
}

// TestBegin: the first value counts as what it is, and as long as it was.
func TestBegin(t *testing.T) {
	c := newMachine(Tau)
	if got := c.read(7); got != (Sample{0, 7}) {
		t.Errorf("one reading: %+v; want no share and 7 flows", got)
	}
	c.pass(10*time.Millisecond, 1000)
	if got := c.read(7); got != (Sample{1000, 7}) {
		t.Errorf("10 ms of work: %+v; want all busy", got)
	}
	if got := c.run(990*time.Millisecond, 10*time.Millisecond, 0); got.Busy > 15 {
		t.Errorf("10 ms of work in a second: %+v; want about 10 per mille", got)
	}
}

// TestNoShare: readings that tell no share leave it as it was, and the
// connections are counted.
func TestNoShare(t *testing.T) {
	for _, tt := range []struct {
		name string
		stat Stat
		at   time.Duration
		want Sample
	}{
		{"no tick", Stat{500, 500}, 100 * Tau, Sample{500, 9}},
		{"idle goes back", Stat{900, 400}, 100 * Tau, Sample{500, 9}},
		{"busy goes back", Stat{0, 900}, 100 * Tau, Sample{500, 9}},
		{"everything starts anew", Stat{}, 100 * Tau, Sample{500, 9}},
		{"the time goes back", Stat{900, 500}, 0, Sample{500, 1}},
		{"no time", Stat{900, 500}, time.Second, Sample{500, 1}},
		{"a share", Stat{900, 500}, 100 * Tau, Sample{1000, 9}},
	} {
		m := NewMeter(Tau)
		m.Add(Stat{}, 1, 0)
		m.Add(Stat{500, 500}, 1, time.Second)
		if got := m.Add(tt.stat, 9, tt.at); got != tt.want {
			t.Errorf("%s: %+v; want %+v", tt.name, got, tt.want)
		}
	}
	// The share after one that was not told begins there.
	m := NewMeter(0)
	m.Add(Stat{1000, 1000}, 0, 0)
	m.Add(Stat{10, 10}, 0, time.Second)
	if got := m.Add(Stat{40, 20}, 0, 2*time.Second); got.Busy != 750 {
		t.Errorf("after counters that went back: %+v; want 750", got)
	}
	// A share counts for all the time since the last, whatever was read between.
	m = NewMeter(Tau)
	m.Add(Stat{}, 0, 0)
	m.Add(Stat{0, 1}, 0, time.Minute)
	m.Add(Stat{0, 1}, 0, time.Minute+Tau-1)
	if got := m.Add(Stat{1, 1}, 0, time.Minute+Tau); got.Busy != 632 {
		t.Errorf("a reading without a tick before a step's: %+v; want 632", got)
	}
}

func TestSaturation(t *testing.T) {
	const huge = math.MaxUint64
	for _, tau := range []time.Duration{-1, 0, 1, Tau, math.MaxInt64} {
		m := NewMeter(tau)
		m.Add(Stat{}, -5, 0)
		if got := m.Add(Stat{huge, 0}, math.MinInt64, 1); got != (Sample{1000, 0}) {
			t.Errorf("tau %v: %+v; want 1000 and 0", tau, got)
		}
		m = NewMeter(tau)
		m.Add(Stat{}, math.MaxInt64, 0)
		if got := m.Add(Stat{huge, huge}, math.MaxInt64, math.MaxInt64); got != (Sample{500, math.MaxUint32}) {
			t.Errorf("tau %v: %+v; want 500 and %d", tau, got, uint32(math.MaxUint32))
		}
	}
}

// FuzzMeter looks for a measure that is outside of what was measured.
func FuzzMeter(f *testing.F) {
	f.Add(int64(Tau), uint64(1), uint64(0), int64(1), uint64(1), uint64(1), int64(2), 3)
	f.Add(int64(1), uint64(math.MaxUint64), uint64(math.MaxUint64), int64(0), uint64(0), uint64(0), int64(math.MaxInt64), -1)
	f.Add(int64(math.MaxInt64), uint64(1), uint64(1), int64(1), uint64(2), uint64(1), int64(2), math.MaxInt64)
	f.Fuzz(func(t *testing.T, tau int64, busy1, idle1 uint64, at1 int64, busy2, idle2 uint64, at2 int64, flows int) {
		m := NewMeter(time.Duration(tau))
		for i, s := range []Sample{
			m.Add(Stat{}, flows, 0),
			m.Add(Stat{busy1, idle1}, flows, time.Duration(at1)),
			m.Add(Stat{busy2, idle2}, flows, time.Duration(at2)),
		} {
			want := uint32(min(max(flows, 0), math.MaxUint32))
			if s.Busy > 1000 || s.Flows != want {
				t.Errorf("reading %d: %+v; want at most 1000, and %d flows", i, s, want)
			}
			if math.IsNaN(m.busy.value) || math.IsNaN(m.flows.value) {
				t.Errorf("reading %d: %+v", i, m)
			}
		}
	})
}
