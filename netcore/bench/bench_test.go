package bench

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"clonecluster/netcore/engine"
	"clonecluster/netcore/netnstest"
	"clonecluster/qemu/qemutest"
)

func TestMain(m *testing.M) {
	qemutest.Guest()
	os.Exit(netnstest.Main(m, map[string]func([]string) int{
		"cloned": engine.Main, "sink": sink, "node": node, "deaf": deaf, "flood": flood, "idle": idleProgram,
		"copy": copyProgram, "macvlan": macvlanProgram,
	}))
}

// scale is how much is done in a round.
type scale struct {
	rounds   int
	requests time.Duration // of each kind
	octets   int64         // of the big file
	files    int           // how often it goes down, and up
	frames   int
	testRuns int
	tries    int           // if others disturb the measurement
	patience time.Duration // with them, in all
	rest     time.Duration // to see what the machine does anyway
	ways     []string      // only these, and no frames
	beside   bool          // measure the reference before and after each of the others
}

// What is written below the checkout.
const (
	benchJSON  = "build/bench.json"
	nativeJSON = "build/bench-native.json"
	virtioJSON = "build/bench-virtio.json"
	document   = "docs/benchmarks.md"
)

// TestBench is "make bench-costs".
func TestBench(t *testing.T) {
	folder := os.Getenv("CLONECLUSTER_BENCH")
	if folder == "" {
		t.Skip("takes forty minutes, and a machine with nothing else to do: make bench-costs")
	}
	s := scale{rounds: 7, requests: 1500 * time.Millisecond, octets: 64 << 20, files: 12, frames: 512_000, testRuns: 100_000, tries: 2, rest: time.Second, beside: true}
	if text := os.Getenv("BENCH_ROUNDS"); text != "" {
		n, err := strconv.Atoi(text)
		if err != nil || n < 1 {
			t.Fatalf("BENCH_ROUNDS=%s: want a number of rounds, 1 or more", text)
		}
		s.rounds = n
	}
	s.patience = time.Duration(s.rounds) * 20 * time.Second
	if text := os.Getenv("BENCH_WAYS"); text != "" {
		measureSome(t, s, text)
		return
	}
	if qemutest.InGuest() { // on emulated processors, for which a second is 1e9 instructions
		s.ways, s.octets, s.files, s.requests, s.tries, s.beside = guestWays, 8<<20, 48, time.Second, 1, false
	}
	// After each round, so that a run which is cut short was not for nothing.
	measure(t, s, func(r *Report) {
		data, err := r.JSON()
		if err == nil {
			err = os.WriteFile(filepath.Join(folder, benchJSON), data, 0o644)
		}
		if err != nil {
			t.Fatal(err)
		}
	})
	if s.ways == nil {
		writeDocument(t, folder)
	}
}

// measureSome prints what the plain host and the ways whose names match a regular expression
// take for requests. It writes nothing.
func measureSome(t *testing.T, s scale, match string) {
	some, err := regexp.Compile(match)
	if err != nil {
		t.Fatalf("BENCH_WAYS: %v", err)
	}
	var names []string
	for _, p := range (&measurer{}).plans() {
		names = append(names, p.name)
		if p.name == Plain || some.MatchString(p.name) {
			s.ways = append(s.ways, p.name)
		}
	}
	if len(s.ways) < 2 && match != Plain {
		t.Fatalf("BENCH_WAYS=%s matches none of: %s", match, strings.Join(names, "; "))
	}
	r := measure(t, s, func(*Report) {})
	for _, way := range s.ways {
		fmt.Printf("%-24s", way)
		for _, work := range []string{KeepAlive, Connection, Download, Upload} {
			fmt.Printf("  %-24s", spread(r.Ratio(way, Plain, work, cpu), way == Plain))
		}
		fmt.Println()
	}
}

// writeDocument writes benchmarks.md of what was measured last.
func writeDocument(t *testing.T, folder string) {
	t.Helper()
	var here, native, virtio *Report
	for name, to := range map[string]**Report{benchJSON: &here, nativeJSON: &native, virtioJSON: &virtio} {
		data, err := os.ReadFile(filepath.Join(folder, name))
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err == nil {
			err = json.Unmarshal(data, to)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if here == nil {
		t.Logf("the results are in build/; %s is written when \"make bench-costs\" has been run, too", document)
		return
	}
	text := here.Markdown(native, virtio)
	if err := os.WriteFile(filepath.Join(folder, document), text, 0o644); err != nil {
		t.Fatal(err)
	}
	fmt.Printf("%s", text)
}

// TestSmoke: everything that is compared serves, and every figure comes out.
func TestSmoke(t *testing.T) {
	if testing.Short() {
		t.Skip("takes seconds: not with -short")
	}
	r := measure(t, scale{rounds: 1, requests: 300 * time.Millisecond, octets: 1 << 20, files: 2, frames: 5120, testRuns: 1000, tries: 1, beside: true}, func(*Report) {})
	for _, s := range r.Series {
		t.Logf("%s, %s: %+v %s", s.Way, s.Work, s.Runs, s.Why)
		if s.Why != "" {
			continue
		}
		if ref := reference(s.Work); r.find(ref, s.Work) != nil && (s.Way == ref) == (s.Runs[0].Beside != nil) {
			t.Errorf("%s, %s: %+v; want the reference beside all but itself", s.Way, s.Work, s.Runs)
		}
		// So few frames on a busy machine may seem to cost less than none.
		if len(s.Runs) != 1 || s.Runs[0].CPU <= 0 && s.Work != Discard {
			t.Errorf("%s, %s: the runs are %+v; want one, with its cost", s.Way, s.Work, s.Runs)
		}
	}
	if text := string(r.Markdown(nil, nil)); !strings.Contains(text, "| plain host | 1.00 | 1.00 | 1.00 | 1.00 |") || strings.Contains(text, "NaN") {
		t.Errorf("the report is\n%s", text)
	}
}

// A measurer is one run of the benchmarks.
type measurer struct {
	t     *testing.T
	ctx   context.Context // ends at Ctrl-C
	scale scale
	files files

	awake     *netnstest.Awake // nil: the processors may sleep
	ksoftirqd []int
	idle      float64       // processors that the machine needs when nothing is measured
	patience  time.Duration // that is left
}

// measure gives what it has to done after each round.
func measure(t *testing.T, s scale, done func(*Report)) *Report {
	ctx, stop := netnstest.Interruptible()
	t.Cleanup(stop) // after all else is cleaned up: another Ctrl-C must not leave it half done
	m := &measurer{t: t, ctx: ctx, scale: s, ksoftirqd: ksoftirqd(t), patience: s.patience}
	if !qemutest.InGuest() { // where an instruction takes a nanosecond, whatever else happens
		m.awake = netnstest.KeepAwake(t)
	}
	m.files = prepareFiles(t, s.octets)
	t.Cleanup(m.sayInterrupted)
	r := &Report{Machine: netnstest.Processor(t), Kernel: netnstest.Kernel(t), Processors: runtime.NumCPU()}

	var ways []*way
	for _, p := range m.plans() {
		if s.ways != nil && !slices.Contains(s.ways, p.name) {
			continue
		}
		m.progress("preparing: %s", p.name)
		w, why := m.build(p, m.files)
		m.mustGoOn()
		if why != nil {
			r.miss(p.name, "requests", why)
			continue
		}
		ways = append(ways, w)
	}
	var receivers []*receiver
	for _, p := range m.receiverPlans() {
		if s.ways != nil {
			break
		}
		m.progress("preparing: %s, %s", p.work, p.name)
		rc, why := m.receiver(p)
		m.mustGoOn()
		if why != nil {
			r.miss(p.name, p.work, why)
			continue
		}
		receivers = append(receivers, rc)
	}
	var runs []testRun
	if s.ways == nil {
		runs = m.testRuns(receivers)
	}

	if s.rest > 0 {
		m.awaitHashed(ways)
	}
	for round := range s.rounds {
		m.rest(m.scale.rest)
		for _, work := range works() {
			var turns []turn
			for _, w := range ways {
				turns = append(turns, turn{w.name, func() (cost, Run) { return work.do(m, w) }})
			}
			m.takeTurns(r, round, work.name, turns)
		}
		for _, work := range []string{Discard, Accept} {
			var turns []turn
			for _, rc := range receivers {
				if rc.work == work {
					turns = append(turns, turn{rc.name, func() (cost, Run) { return m.flood(rc) }})
				}
			}
			m.takeTurns(r, round, work, turns)
		}
		for _, run := range runs {
			r.add(run.way, run.work, m.testRun(run))
		}
		r.Rounds++
		r.sort(m.order())
		done(r)
	}
	m.progress("")
	for _, w := range ways {
		if port, is := w.bed.Learned()["02:cc:0a:4d:00:0a"]; is && w.cluster {
			t.Errorf("%s: the switch has learned the clone MAC at port %s", w.name, port)
		}
	}
	for _, rc := range receivers {
		m.check(rc)
	}
	return r
}

// A turn measures one of those that do the same work.
type turn struct {
	name string
	do   func() (cost, Run)
}

// takeTurns measures all of them once. The order is another in each round, so that nobody
// always comes after the same one.
func (m *measurer) takeTurns(r *Report, round int, work string, turns []turn) {
	m.t.Helper()
	ref := slices.IndexFunc(turns, func(t turn) bool { return t.name == reference(work) })
	var before Run
	if m.scale.beside && ref >= 0 {
		before = m.quietly(turns[ref].do)
	}
	for i := range turns {
		at := (i + round) % len(turns)
		m.progress("round %d of %d: %s, %s", round+1, m.scale.rounds, work, turns[at].name)
		run := m.quietly(turns[at].do)
		switch {
		case !m.scale.beside || ref < 0:
		case at == ref:
			before = run
		default:
			after := m.quietly(turns[ref].do)
			run.Beside, before = between(before, after), after
		}
		r.add(turns[at].name, work, run)
	}
}

// order is that of the report.
func (m *measurer) order() (names []string) {
	for _, p := range m.plans() {
		names = append(names, p.name)
	}
	for _, p := range m.receiverPlans() {
		names = append(names, p.name)
	}
	return names
}

// mustGoOn ends the test when it is interrupted; all that was built goes.
func (m *measurer) mustGoOn() {
	if m.ctx.Err() != nil {
		m.t.FailNow()
	}
}

// fatal is that of the test, but what fails after Ctrl-C is no news.
func (m *measurer) fatal(format string, args ...any) {
	m.t.Helper()
	m.mustGoOn()
	m.t.Fatalf(format, args...)
}

func (m *measurer) sayInterrupted() {
	if m.ctx.Err() != nil && m.t.Failed() {
		fmt.Fprintln(os.Stderr, "\ninterrupted: the rounds that were complete are in build/bench.json, and all that was set up is taken back")
	}
}

// progress tells who watches a terminal where it is, and a log which round it is.
func (m *measurer) progress(format string, args ...any) {
	netnstest.Progress(format, args...)
}
