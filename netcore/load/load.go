// Package load measures how busy this machine is, as its beacons say it: the
// share of CPU time that is not idle, and the number of connections. Both are
// damped, so that a short burst moves no buckets.
//
// The damping is a mean of all the past in which what is tau older counts 1/e as
// much: after a step the measure is 63 % of the way there after tau, however
// often readings are taken.
package load

import (
	"math"
	"time"
)

// Tau is the time constant of the beacons' load.
const Tau = 2 * time.Second

// Sample is the load of a machine.
type Sample struct {
	Busy  uint16 // share of the CPU time of all CPUs that is not idle, per mille, 0 to 1000
	Flows uint32 // connections
}

// Meter makes the load of readings. It has no clock.
type Meter struct {
	tau         time.Duration
	busy, flows mean

	begun bool
	last  time.Duration // the last reading
	stat  Stat          // what the next share is measured from
	since time.Duration // when that was
}

// NewMeter gives a meter with that time constant; 0 or less does not damp.
func NewMeter(tau time.Duration) *Meter { return &Meter{tau: max(tau, 0)} }

// Add takes the CPU times and the number of connections at a time, of any clock
// that does not go back, and gives the load. Busy is 0 until two readings tell a
// share, and stays as it was while they do not.
func (m *Meter) Add(stat Stat, flows int, at time.Duration) Sample {
	if !m.begun {
		m.begun = true
		m.last, m.stat, m.since = at, stat, at
	}
	if at >= m.last {
		m.flows.add(float64(max(flows, 0)), at-m.last, m.tau)
		m.last = at
		m.addShare(stat, at)
	}
	return Sample{
		Busy:  uint16(bounded(1000*m.busy.value, 1000)),
		Flows: uint32(bounded(m.flows.value, math.MaxUint32)),
	}
}

func (m *Meter) addShare(stat Stat, at time.Duration) {
	if stat == m.stat {
		return // too soon: the next share is of the whole time
	}
	if s, ok := share(m.stat, stat); ok {
		m.busy.add(s, at-m.since, m.tau)
	}
	m.stat, m.since = stat, at
}

func bounded(x, most float64) float64 { return math.Round(min(max(x, 0), most)) }

// mean is the exponential mean of values that held for some time each. The
// weights are normalised, so that the first values, which have no past, count as
// their durations say: a first value of a few milliseconds does not linger.
type mean struct {
	value  float64
	weight float64 // of all the past, 0 to 1
}

// add takes a value that held for so long until now.
func (m *mean) add(x float64, held, tau time.Duration) {
	if m.weight == 0 {
		m.value = x
	}
	if held <= 0 {
		return
	}
	fresh := -math.Expm1(-held.Seconds() / tau.Seconds()) // 0 < fresh <= 1, for a tau of 0 too
	m.weight = m.weight*(1-fresh) + fresh
	m.value += (x - m.value) * fresh / m.weight
}
