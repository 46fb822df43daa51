package engine_test

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// quiet is how long the machine may keep a thread waiting in a measurement that
// counts: one of real-time priority, and at the published size a normal one too.
const quiet = 15 * time.Millisecond

// disturbed is for how long the machine has kept a thread waiting since a time;
// 0: not long enough to matter.
func (f *failover) disturbed(since time.Time) time.Duration {
	stall := f.stalls.Longest(since)
	if full {
		stall = max(stall, f.delays.Longest(since))
	}
	if stall < quiet {
		return 0
	}
	return stall
}

// TestFigureCrash switches a machine off, again and again, and finds for each of
// its buckets the time until a client's SYN is answered there: a SYN each 5 ms
// in 64 of its buckets, which are others every time, so none waits for TCP's
// retransmission of a second. What is measured while the machine stands still is
// thrown away.
func TestFigureCrash(t *testing.T) {
	for _, p := range []profile{normal, fast} {
		t.Run(p.detect, func(t *testing.T) {
			f := newFailover(t, 3, p)
			f.boot(f.nodes...)
			runs, disturbed := size(3, 60), 0
			var all, really []time.Duration // without those that the machine disturbed, and with them
			for run := 0; run < runs; {
				o := f.own(f.nodes...)
				victim := f.nodes[run%len(f.nodes)]
				buckets := o.of(victim)
				rand.Shuffle(len(buckets), func(i, j int) { buckets[i], buckets[j] = buckets[j], buckets[i] })
				buckets = buckets[:min(64, len(buckets))]
				// At any time between two beacons.
				time.Sleep(rand.N(100 * time.Millisecond))

				killed := f.powerOff(victim)
				first := f.probe.firstAnswers(buckets, 5*time.Millisecond, 10*time.Second)
				if len(first) < len(buckets) {
					t.Errorf("in %d of %d buckets nobody answered within 10 s", len(buckets)-len(first), len(buckets))
				}
				stall := f.disturbed(killed)
				f.own(f.others(victim)...)
				f.powerOn(victim)
				var these []time.Duration
				for _, at := range first {
					these = append(these, at.Sub(killed))
				}
				really = append(really, these...)
				if stall > 0 {
					if disturbed++; disturbed > 2*runs {
						tooBusy(t, "it kept a thread waiting in %d of %d runs, for %v in the last", disturbed, run+disturbed, stall)
					}
					continue
				}
				run++
				if worst := slices.Max(these); worst > p.taken {
					f.tell(victim, killed, worst)
				}
				all = append(all, these...)
			}
			d := distribution(all)
			t.Logf("detect %s: from the death of a machine to the first answered SYN, by bucket: %v; %d runs, and %d that the machine disturbed, with which it is %v",
				p.detect, d, runs, disturbed, distribution(really))
			if limit := size(3*p.taken, p.taken); d.p(99) > limit {
				t.Errorf("detect %s: p99 is %v; want %v or less", p.detect, d.p(99), limit)
			}
		})
	}
}

// tell tells what the others made of a death that took them long to notice.
func (f *failover) tell(victim *node, killed time.Time, worst time.Duration) {
	f.t.Helper()
	f.t.Logf("%s died, and %v later some bucket had its first answer; a normal thread waited for %v", victim.Name, worst, f.delays.Between(killed, killed.Add(worst)))
	for _, n := range f.others(victim) {
		for _, line := range n.cloned.Lines(killed) {
			if at := line.At.Sub(killed); at < 2*worst {
				f.t.Logf("%s, %v after it: %s", n.Name, at.Round(time.Millisecond), line.Text)
			}
		}
	}
}

// TestFigureOrphans switches a machine off that holds connections. A client
// that speaks on one is told by a reset as soon as it can be: for the first
// segment that it sends after the detection, which is one of TCP's
// retransmissions (RFC 6298) for those that spoke before it, a reset comes
// without another. It waits only for as long as the holder, if it should live
// after all, would take to be heard again.
func TestFigureOrphans(t *testing.T) {
	const firstRetransmission = 200 * time.Millisecond // Linux's lower limit
	const slack = 50 * time.Millisecond
	for _, p := range []profile{normal, fast} {
		t.Run(p.detect, func(t *testing.T) {
			f := newFailover(t, 3, p)
			f.boot(f.nodes...)
			f.own(f.nodes...)
			streams := f.openStreams(size(60, 180))
			victim := f.nodes[1]
			killed := f.powerOff(victim)
			var asking sync.WaitGroup
			var mu sync.Mutex
			var told []time.Duration
			for i, s := range streams {
				if s.holder != victim.Name {
					continue
				}
				asking.Go(func() {
					// From at once to well after the detection.
					time.Sleep(time.Duration(i) * 2 * p.taken / time.Duration(len(streams)))
					asked := time.Now()
					_, err := s.ask("anybody there?", 30*time.Second)
					mu.Lock()
					defer mu.Unlock()
					if !isReset(err) {
						t.Errorf("an orphan whose client spoke %v after the death: %v; want a reset", asked.Sub(killed), err)
						return
					}
					told = append(told, time.Since(killed)-limitOf(asked.Sub(killed), p.taken, firstRetransmission))
				})
			}
			asking.Wait()
			f.own(f.others(victim)...)
			f.askAll(slices.DeleteFunc(streams, func(s *stream) bool { return s.holder == victim.Name }), "after the death")
			d := distribution(told)
			t.Logf("detect %s: %d orphans were reset; against the first segment after %v: %v", p.detect, len(told), p.taken, d)
			late := d.p(100)
			if late > size(2*time.Second, p.dead/2+slack) {
				if stall := f.disturbed(killed); stall > 0 {
					tooBusy(t, "it kept a thread waiting for %v while a reset came %v late", stall, late)
				}
				t.Errorf("detect %s: a reset came %v after the first segment that could cause it", p.detect, late)
			}
		})
	}
}

// limitOf is when, after a death, the first segment leaves that finds the death
// detected, if the client spoke at that time after it: its retransmissions come
// after one, three, seven … times the first timeout.
func limitOf(spoke, detected, timeout time.Duration) time.Duration {
	for at, wait := spoke, timeout; ; at, wait = at+wait, 2*wait {
		if at >= detected {
			return at
		}
	}
}

// A distribution is some figures in order.
type ordered []time.Duration

func distribution(d []time.Duration) ordered {
	return slices.Sorted(slices.Values(d))
}

// p is the least figure that so many of a hundred do not exceed.
func (d ordered) p(percent int) time.Duration {
	if len(d) == 0 {
		return 0
	}
	return d[max(0, (len(d)*percent+99)/100-1)]
}

func (d ordered) String() string {
	var b strings.Builder
	for _, q := range []struct {
		name    string
		percent int
	}{{"min", 0}, {"p50", 50}, {"p90", 90}, {"p99", 99}, {"max", 100}} {
		fmt.Fprintf(&b, "%s %v, ", q.name, d.p(q.percent).Round(100*time.Microsecond))
	}
	return fmt.Sprintf("%s%d samples", b.String(), len(d))
}

func TestDistribution(t *testing.T) {
	var hundred []time.Duration
	for i := range 100 {
		hundred = append(hundred, time.Duration(100-i))
	}
	d := distribution(hundred)
	for percent, want := range map[int]time.Duration{0: 1, 50: 50, 99: 99, 100: 100} {
		if got := d.p(percent); got != want {
			t.Errorf("p%d of 1 to 100 = %d; want %d", percent, got, want)
		}
	}
	if got := distribution(nil).p(99); got != 0 {
		t.Errorf("p99 of nothing = %v; want 0", got)
	}
	for _, tt := range []struct{ spoke, detected, want time.Duration }{
		{0, 350, 600}, {10, 350, 610}, {0, 150, 200}, {400, 350, 400}, {0, 0, 0}, {0, 601, 1400},
	} {
		if got := limitOf(tt.spoke, tt.detected, 200); got != tt.want {
			t.Errorf("limitOf(%d, %d) = %d; want %d", tt.spoke, tt.detected, got, tt.want)
		}
	}
}
