package simulator

import (
	"flag"
	"fmt"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
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
	// There is little to keep, and much to throw away.
	defer debug.SetGCPercent(debug.SetGCPercent(400))
	n := *schedules
	if testing.Short() {
		n = min(n, 500)
	}
	var next, accepted, refused, maps, steps, quiet, frames, forged, failed atomic.Int64
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
				quiet.Add(int64(r.Quiet))
				frames.Add(int64(r.Frames))
				forged.Add(int64(r.Forged))
				if r.Violation != "" {
					failed.Add(1)
					t.Error(report(Options{Seed: r.Seed}))
				}
			}
		})
	}
	workers.Wait()
	t.Logf("%d schedules: %d connections accepted, %d attempts refused, %d maps, %d steps, %d checks in quiet times, %d frames of which %d were forged",
		n, accepted.Load(), refused.Load(), maps.Load(), steps.Load(), quiet.Load(), frames.Load(), forged.Load())
	if accepted.Load() < 5*refused.Load() {
		t.Errorf("%d connections accepted and %d refused: a simulation in which nobody is served shows nothing", accepted.Load(), refused.Load())
	}
	if n >= 500 && quiet.Load() < steps.Load()/10 {
		t.Errorf("of %d steps %d are in quiet times: too few to show that all recover", steps.Load(), quiet.Load())
	}
	if n >= 500 && (forged.Load() < int64(n) || frames.Load() < 2*forged.Load()) {
		t.Errorf("%d frames, %d of them forged, in %d schedules: too few to show anything", frames.Load(), forged.Load(), n)
	}
}

// report runs a schedule again, and tells of its violation and what led to it.
func report(o Options) string {
	o.Trace = true
	r := Run(o)
	var b strings.Builder
	fmt.Fprintf(&b, "seed %d, %d nodes, at %.4f s: %s: %s\n", r.Seed, r.Nodes, r.At, r.Invariant, r.Violation)
	r.Print(&b, 60)
	fmt.Fprintf(&b, "replay with: %s", o.Command("build/bin/clonectl"))
	return b.String()
}

// TestReport: who reads that a seed fails sees why, and how to look at all of it.
func TestReport(t *testing.T) {
	o := Options{Weakness: membership.KeepLost}
	got := ""
	for ; !strings.Contains(got, "VIOLATION I") || !strings.Contains(got, " lines left out\n"); o.Seed++ {
		if o.Seed > 1000 {
			t.Fatalf("no long report; the last one is\n%s", got)
		}
		got = report(o)
	}
	for _, want := range []string{
		"seed ", "\nnode 1 is 52:54:00:77:00:02",
		fmt.Sprintf("\nreplay with: build/bin/clonectl sim --replay %d --weakness keep-lost", o.Seed-1),
	} {
		if !strings.Contains(got, want) {
			t.Errorf("the report lacks %q", want)
		}
	}
	_, timeline, _ := strings.Cut(got, "left out\n")
	if strings.Contains(timeline, "52:54:") || !strings.Contains(timeline, " of node ") {
		t.Error("the timeline has ids instead of the numbers of nodes")
	}
	if t.Failed() {
		t.Log(got)
	}
}

// TestNotices shows that the checks can fail: with each precaution left out some
// schedule breaks an invariant.
func TestNotices(t *testing.T) {
	for _, w := range membership.AllWeaknesses() {
		t.Run(w.String(), func(t *testing.T) {
			t.Parallel()
			const most = 10_000
			for seed := range uint64(most) {
				// Small clusters are enough, and fast.
				r := Run(Options{Seed: seed, Nodes: 2 + int(seed%5), Weakness: w})
				if r.Violation != "" {
					t.Logf("seed %d, %d nodes, at %.3f s: %s: %s", r.Seed, r.Nodes, r.At, r.Invariant, r.Violation)
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
