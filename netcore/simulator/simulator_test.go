package simulator

import (
	"flag"
	"fmt"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"testing"

	"clonecluster/netcore/membership"
)

// -schedules 1000000 -seed 20000 is a longer soak.
var (
	schedules = flag.Int("schedules", 20_000, "how many `schedules` to simulate")
	firstSeed = flag.Uint64("seed", 0, "the first `seed`")
)

// TestSchedules checks the invariants over very many schedules.
func TestSchedules(t *testing.T) {
	n := *schedules
	if testing.Short() {
		n = min(n, 500)
	}
	var next, accepted, refused, maps, steps, failed atomic.Int64
	var workers sync.WaitGroup
	for range runtime.GOMAXPROCS(0) {
		workers.Go(func() {
			for failed.Load() < 10 {
				i := next.Add(1) - 1
				if i >= int64(n) {
					return
				}
				r := Run(Options{Seed: *firstSeed + uint64(i)})
				accepted.Add(int64(r.Accepted))
				refused.Add(int64(r.Refused))
				maps.Add(int64(r.Maps))
				steps.Add(int64(r.Steps))
				if r.Violation != "" {
					failed.Add(1)
					t.Errorf("seed %d, %d nodes, at %.4f s: %s: %s\nreplay: clonectl sim --replay %d", r.Seed, r.Nodes, r.At, r.Invariant, r.Violation, r.Seed)
				}
			}
		})
	}
	workers.Wait()
	t.Logf("%d schedules: %d connections accepted, %d attempts refused, %d maps, %d steps", n, accepted.Load(), refused.Load(), maps.Load(), steps.Load())
	if accepted.Load() < 5*refused.Load() {
		t.Errorf("%d connections accepted and %d refused: a simulation in which nobody is served shows nothing", accepted.Load(), refused.Load())
	}
}

// TestNotices shows that the checks can fail: with each precaution left out some
// schedule breaks an invariant.
func TestNotices(t *testing.T) {
	for _, w := range membership.AllWeaknesses() {
		t.Run(w.String(), func(t *testing.T) {
			t.Parallel()
			const most = 3000
			for seed := range uint64(most) {
				if r := Run(Options{Seed: seed, Weakness: w}); r.Violation != "" {
					t.Logf("seed %d, at %.3f s: %s: %s", r.Seed, r.At, r.Invariant, r.Violation)
					return
				}
			}
			t.Errorf("%d schedules with %v break nothing", most, w)
		})
	}
}

// TestReplay: one seed is one schedule.
func TestReplay(t *testing.T) {
	for seed := range uint64(20) {
		a, b := Run(Options{Seed: seed, Trace: true}), Run(Options{Seed: seed, Trace: true})
		if !slices.Equal(a.Timeline, b.Timeline) || fmt.Sprint(a.Steps, a.Maps) != fmt.Sprint(b.Steps, b.Maps) {
			t.Errorf("seed %d gives two runs", seed)
		}
	}
}
