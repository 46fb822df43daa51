package uinit

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

// world runs a supervisor against pretended processes and a pretended clock.
type world struct {
	t    *testing.T
	s    *supervisor
	now  time.Duration
	pids int

	running map[int]*child
	signals []string // "engine SIGTERM"
	stages  []string
	logs    []string
	fed     []time.Duration
	ended   []ending
	failing map[string]error // starts that fail
}

func newWorld(t *testing.T, p policy, specs ...spec) *world {
	if len(specs) == 0 {
		specs = []spec{{Name: "engine", Engine: true}, {Name: "web", Checked: true}, {Name: "mail"}}
	}
	return &world{t: t, s: newSupervisor(p, specs, 0), pids: 100, running: map[int]*child{}, failing: map[string]error{}}
}

func (w *world) child(name string) *child {
	for _, c := range w.s.children {
		if c.Name == name {
			return c
		}
	}
	w.t.Fatalf("no child %q", name)
	return nil
}

// act carries out what the supervisor decided, as the loop does.
func (w *world) act() {
	for pending := w.s.take(); len(pending) > 0; pending = w.s.take() {
		for _, d := range pending {
			switch d := d.(type) {
			case doStart:
				if d.Child.pid != 0 {
					w.t.Fatalf("%s is started while it runs", d.Child.Name)
				}
				if err := w.failing[d.Child.Name]; err != nil {
					w.s.startedAs(d.Child, 0, err, w.now)
					continue
				}
				w.pids++
				w.running[w.pids] = d.Child
				w.s.startedAs(d.Child, w.pids, nil, w.now)
			case doSignal:
				if w.running[d.Child.pid] != d.Child {
					w.t.Fatalf("%v is sent to %s, which has no process", d.Signal, d.Child.Name)
				}
				w.signals = append(w.signals, d.Child.Name+" "+signalName(d.Signal))
			case doLog:
				w.logs = append(w.logs, d.Level.String()+" "+d.Text)
			case doStage:
				w.stages = append(w.stages, d.Stage)
			case doFeed:
				w.fed = append(w.fed, w.now)
			case doEnd:
				w.ended = append(w.ended, d.How)
			}
		}
	}
}

func signalName(s syscall.Signal) string {
	return map[syscall.Signal]string{syscall.SIGTERM: "TERM", syscall.SIGKILL: "KILL", syscall.SIGABRT: "ABRT"}[s]
}

// pass lets time go by, from one due moment to the next.
func (w *world) pass(d time.Duration) {
	end := w.now + d
	for range 100_000 {
		next := w.s.due(w.now)
		if next > end {
			w.now = end
			return
		}
		w.now = max(w.now, next)
		w.s.tick(w.now)
		w.act()
		if w.s.due(w.now) <= w.now {
			w.t.Fatalf("at %v: tick left something due", w.now)
		}
	}
	w.t.Fatal("the clock stands still")
}

func (w *world) exit(name, how string) {
	c := w.child(name)
	pid := c.pid
	delete(w.running, pid)
	if !w.s.exited(pid, how, w.now) {
		w.t.Fatalf("exit of %s (pid %d) is nobody's", name, pid)
	}
	w.act()
}

func (w *world) notify(name string, m message) {
	w.s.notified(w.child(name).pid, m, w.now)
	w.act()
}

func (w *world) check(name string, err error) {
	w.s.checked(name, w.child(name).pid, err, w.now)
	w.act()
}

func (w *world) link() { w.s.link(w.now); w.act() }

// boot brings everything up.
func (w *world) boot() {
	w.link()
	w.notify("engine", message{Ready: true})
	w.check("web", nil)
	w.pass(2 * time.Second)
}

func (w *world) want(what string, got, want any) {
	w.t.Helper()
	if fmt.Sprint(got) != fmt.Sprint(want) {
		w.t.Errorf("at %v: %s = %v; want %v", w.now, what, got, want)
	}
}

func TestOrderOfStart(t *testing.T) {
	w := newWorld(t, defaultPolicy)
	w.pass(5 * time.Second)
	w.want("processes before the NIC", len(w.running), 0)
	w.link()
	w.want("processes after the NIC", len(w.running), 1)
	w.want("engine", w.child("engine").state, stateStarting)
	w.pass(time.Second)
	w.want("web", w.child("web").state, stateWaiting)
	w.notify("engine", message{Ready: true})
	w.want("engine", w.child("engine").state, stateReady)
	w.want("web", w.child("web").state, stateStarting)
	w.check("web", errors.New("connection refused"))
	w.want("web", w.child("web").state, stateStarting)
	w.check("web", nil)
	w.want("stages", w.stages, "[engine service:web]")
	w.pass(defaultPolicy.AliveIsReady) // mail has neither check nor word
	w.want("stages", w.stages, "[engine service:web service:mail ready]")
	w.link()
	w.notify("engine", message{Ready: true})
	w.want("stages once more", w.stages, "[engine service:web service:mail ready]")
}

func TestReadyByNotification(t *testing.T) {
	w := newWorld(t, defaultPolicy)
	w.link()
	w.notify("engine", message{Ready: true})
	w.notify("web", message{Ready: true, HasStatus: true, Status: "listening"})
	w.notify("mail", message{Ready: true})
	w.want("stages", w.stages, "[engine service:web service:mail ready]")
	w.want("status", w.child("web").status, "listening")
	if w.s.notified(1, message{Ready: true}, w.now) || w.s.notified(0, message{Ready: true}, w.now) {
		t.Error("a message of a stranger was taken")
	}
}

func TestBackoff(t *testing.T) {
	w := newWorld(t, defaultPolicy)
	w.boot()
	var starts []time.Duration
	begin := w.now
	for range 9 {
		w.exit("mail", "exit code 1")
		for w.child("mail").pid == 0 {
			w.pass(10 * time.Millisecond)
		}
		starts = append(starts, (w.now - begin).Round(100*time.Millisecond))
	}
	want := []time.Duration{}
	sum := time.Duration(0)
	for _, ms := range []int{100, 200, 400, 800, 30000, 30000, 30000, 30000, 30000} {
		sum += time.Duration(ms) * time.Millisecond
		want = append(want, sum)
	}
	w.want("starts", starts, want)
	w.want("restarts", w.child("mail").restarts, 9)
	if !slices.ContainsFunc(w.logs, func(l string) bool { return strings.Contains(l, "ERROR mail is in a crash loop") }) {
		t.Errorf("no word of the crash loop: %q", w.logs)
	}
	w.exit("mail", "x")
	w.want("state", w.child("mail").state, stateCrashLoop)
	// A run of the healthy time makes the next failure the first.
	w.pass(30 * time.Second)
	w.pass(defaultPolicy.Healthy)
	w.exit("mail", "x")
	w.want("state", w.child("mail").state, stateBackoff)
	before := w.now
	w.pass(100 * time.Millisecond)
	w.want("started again after", w.now-before, 100*time.Millisecond)
	w.want("state", w.child("mail").state, stateStarting)
}

func TestStartThatFails(t *testing.T) {
	w := newWorld(t, defaultPolicy)
	w.failing["engine"] = errors.New("no such file")
	w.link()
	w.pass(5 * time.Minute)
	w.want("state", w.child("engine").state, stateCrashLoop)
	w.want("last exit", w.child("engine").lastExit, "did not start: no such file")
	delete(w.failing, "engine")
	w.pass(31 * time.Second)
	w.want("state", w.child("engine").state, stateStarting)
	w.failing["engine"] = errors.New("again")
	w.s.stop(endRestart, w.now)
	w.act()
	w.exit("engine", "SIGTERM")
	w.want("ended", w.ended, "[restart]")
}

// TestEngineThatEndsFirst has no flows to wait for, and ends before the
// services are told.
func TestEngineThatEndsFirst(t *testing.T) {
	w := newWorld(t, defaultPolicy)
	w.boot()
	w.s.stop(endPowerOff, w.now)
	w.act()
	w.exit("engine", "exit code 0")
	w.want("signals", w.signals, "[engine TERM web TERM mail TERM]")
	w.pass(time.Second)
	w.exit("mail", "x")
	w.exit("web", "x")
	w.want("ended", w.ended, "[power off]")
}

func TestServicesOutliveTheEngine(t *testing.T) {
	w := newWorld(t, defaultPolicy)
	w.boot()
	web := w.child("web").pid
	w.exit("engine", "killed by SIGSEGV")
	w.pass(time.Second)
	w.want("web's process", w.child("web").pid, web)
	w.want("engine", w.child("engine").state, stateStarting)
	w.notify("engine", message{Ready: true})
	w.want("signals", w.signals, "[]")
}

func TestHealth(t *testing.T) {
	w := newWorld(t, defaultPolicy)
	w.boot()
	pid := w.child("web").pid
	w.check("web", errors.New("the answer is 503"))
	w.want("state", w.child("web").state, stateReady)
	w.want("healthy", w.child("web").healthy, false)
	w.want("why", w.child("web").health, "the answer is 503")
	n := len(w.logs)
	w.check("web", errors.New("the answer is 503"))
	w.want("lines for the same answer again", len(w.logs)-n, 0)
	w.check("web", nil)
	w.want("healthy", w.child("web").healthy, true)
	w.exit("web", "x")
	w.want("healthy", w.child("web").healthy, false)
	w.pass(time.Second)
	w.s.checked("web", pid, nil, w.now) // a late answer of the former process
	w.act()
	w.want("state", w.child("web").state, stateStarting)
}

func TestHangingEngine(t *testing.T) {
	p := defaultPolicy
	p.EngineHang = 15 * time.Second
	w := newWorld(t, p)
	w.boot()
	for range 20 {
		w.pass(time.Second)
		w.notify("engine", message{Watchdog: true})
	}
	w.want("signals", w.signals, "[]")
	w.fed = nil
	w.pass(14 * time.Second)
	w.want("signals", w.signals, "[]")
	w.want("feedings without heartbeat", len(w.fed), 0)
	w.pass(time.Second)
	w.want("signals", w.signals, "[engine ABRT]")
	w.pass(p.KillGrace)
	w.want("signals", w.signals, "[engine ABRT engine KILL]")
	w.pass(time.Minute)
	w.want("signals", w.signals, "[engine ABRT engine KILL]")
	w.exit("engine", "killed by SIGKILL")
	w.want("last exit", w.child("engine").lastExit, "killed by SIGKILL (it gave no heartbeat)")
	w.pass(time.Second)
	w.notify("engine", message{Ready: true})
	w.want("feedings after it came back", len(w.fed), 1)
}

func TestWatchdogIsFed(t *testing.T) {
	w := newWorld(t, defaultPolicy)
	w.pass(20 * time.Second) // no NIC, no engine: fed by the clock
	for i, at := range w.fed {
		if i > 0 && at-w.fed[i-1] > 2*feedPeriod {
			t.Errorf("fed at %v and then at %v", w.fed[i-1], at)
		}
	}
	if len(w.fed) < 15 {
		t.Errorf("fed %d times in 20 s of boot", len(w.fed))
	}
	w.pass(defaultPolicy.BootDogAllowed)
	w.fed = nil
	w.pass(time.Minute)
	w.want("feedings when the boot has not ended in time", len(w.fed), 0)
	w.boot()
	w.fed = nil
	w.pass(time.Minute)
	w.want("feedings when the engine is silent", len(w.fed), 0)
	for range 100 {
		w.pass(100 * time.Millisecond)
		w.notify("engine", message{Watchdog: true})
		w.notify("web", message{Watchdog: true})
	}
	if n := len(w.fed); n < 9 || n > 11 {
		t.Errorf("fed %d times in 10 s of ten heartbeats a second; want 10", n)
	}
	w.fed = nil
	w.s.stop(endPowerOff, w.now)
	w.act()
	w.pass(5 * time.Second)
	if len(w.fed) < 4 {
		t.Errorf("fed %d times in 5 s of an orderly end", len(w.fed))
	}
}

func TestOrderOfStop(t *testing.T) {
	w := newWorld(t, defaultPolicy)
	w.boot()
	w.s.stop(endPowerOff, w.now)
	w.act()
	w.want("signals", w.signals, "[engine TERM]")
	w.notify("engine", message{Stopping: true})
	w.want("signals", w.signals, "[engine TERM]")
	w.pass(defaultPolicy.LeaveLead)
	w.want("signals", w.signals, "[engine TERM web TERM mail TERM]")
	w.exit("mail", "exit code 0")
	w.exit("web", "exit code 0")
	w.want("signals", w.signals, "[engine TERM web TERM mail TERM]")
	w.want("ended", w.ended, "[]")
	w.exit("engine", "exit code 0")
	w.want("ended", w.ended, "[power off]")
	w.pass(time.Hour)
	w.want("processes", len(w.running), 0)
	w.want("ended once", w.ended, "[power off]")
}

func TestStopOfTheDeaf(t *testing.T) {
	w := newWorld(t, defaultPolicy)
	w.boot()
	w.s.stop(endRestart, w.now)
	w.act()
	w.pass(defaultPolicy.LeaveMost) // the engine does not say that it leaves
	w.want("signals", w.signals, "[engine TERM web TERM mail TERM]")
	w.pass(defaultPolicy.ServiceGrace)
	w.want("signals", w.signals, "[engine TERM web TERM mail TERM web KILL mail KILL]")
	w.exit("web", "killed by SIGKILL")
	w.pass(defaultPolicy.KillGrace) // mail hangs in the kernel: given up
	w.want("phase", w.s.phase, phaseStopEngine)
	w.pass(defaultPolicy.EngineGrace)
	w.want("signals", w.signals, "[engine TERM web TERM mail TERM web KILL mail KILL engine KILL]")
	w.want("ended", w.ended, "[]")
	w.pass(defaultPolicy.KillGrace)
	w.want("ended", w.ended, "[restart]")
}

func TestSecondStopDoesNotWait(t *testing.T) {
	w := newWorld(t, defaultPolicy)
	w.boot()
	w.s.stop(endPowerOff, w.now)
	w.s.stop(endPowerOff, w.now)
	w.act()
	w.want("signals", w.signals, "[engine TERM engine KILL web KILL mail KILL]")
	w.exit("web", "x")
	w.exit("mail", "x")
	w.want("ended", w.ended, "[]")
	w.exit("engine", "x")
	w.want("ended", w.ended, "[power off]")
}

func TestStopBeforeAnythingRuns(t *testing.T) {
	w := newWorld(t, defaultPolicy)
	w.s.stop(endHalt, w.now)
	w.act()
	w.want("ended", w.ended, "[halt]")
	none := newWorld(t, defaultPolicy)
	none.s = newSupervisor(defaultPolicy, nil, 0)
	none.s.stop(endPowerOff, 0)
	none.act()
	none.want("ended", none.ended, "[power off]")
}

// TestAnyOrder tries many random courses of events and checks what must hold
// in all: no process twice, none started after the end began, the end comes,
// and comes once, services before the engine.
func TestAnyOrder(t *testing.T) {
	for seed := range uint64(500) {
		r := rand.New(rand.NewPCG(seed, 1))
		p := defaultPolicy
		p.EngineHang = 15 * time.Second
		w := newWorld(t, p)
		stopAt := 20 + r.IntN(60)
		for i := range 80 {
			if i == stopAt {
				w.s.stop(endRestart, w.now)
				w.act()
			}
			name := []string{"engine", "web", "mail"}[r.IntN(3)]
			c := w.child(name)
			switch r.IntN(8) {
			case 0:
				w.link()
			case 1, 2:
				if c.pid != 0 {
					w.exit(name, "exit code 3")
				}
			case 3:
				w.notify(name, message{Ready: r.IntN(2) == 0, Watchdog: true})
			case 4:
				w.check(name, []error{nil, errors.New("no")}[r.IntN(2)])
			case 5:
				w.failing[name] = []error{nil, errors.New("fails")}[r.IntN(2)]
			default:
				w.pass(time.Duration(r.IntN(20_000)) * time.Millisecond)
			}
			if len(w.ended) > 0 && len(w.running) > len(w.s.children) {
				t.Fatalf("seed %d: ended while %v run", seed, w.running)
			}
		}
		if w.s.phase == phaseRun {
			w.s.stop(endRestart, w.now)
			w.act()
		}
		w.pass(5 * time.Minute) // every process is deaf: killed, then given up
		if len(w.ended) != 1 {
			t.Fatalf("seed %d: ended %v times", seed, len(w.ended))
		}
		n := w.pids
		w.link()
		w.pass(2 * time.Minute)
		if w.pids != n {
			t.Fatalf("seed %d: a start after the end", seed)
		}
	}
}

func TestStateNames(t *testing.T) {
	for s := childState(1); s <= stateStopped; s++ {
		if s.String() == "invalid" {
			t.Errorf("state %d has no name", s)
		}
	}
	if childState(0).String() != "invalid" || childState(99).String() != "invalid" || ending(0).String() != "invalid" {
		t.Error("an invalid state has a name")
	}
}

// resetWithin is when from now a machine with this watchdog is reset, and -1 if
// it is not within the time.
func (w *world) resetWithin(dog, most time.Duration) time.Duration {
	for begin := w.now; w.now < begin+most; {
		w.pass(100 * time.Millisecond)
		if last := w.fed[len(w.fed)-1]; w.now-last >= dog {
			return w.now - begin
		}
	}
	return -1
}

// TestRestartWithoutCarrier: the cable is out when the engine dies, and the new
// one waits for the carrier without a word.
func TestRestartWithoutCarrier(t *testing.T) {
	for _, dog := range []time.Duration{5 * time.Second, 30 * time.Second} {
		w := newWorld(t, defaultPolicy.withWatchdog(dog, dog))
		w.s.hasCarrier(true, 0)
		w.boot()
		w.notify("engine", message{Watchdog: true})
		w.s.hasCarrier(false, w.now)
		w.exit("engine", "exit code 1")
		if at := w.resetWithin(dog, 6*time.Minute); at >= 0 {
			t.Errorf("watchdog %v: reset %v after the engine ended without carrier", dog, at)
		}
		w.want("signals", w.signals, "[]")
		// The carrier comes back, and the engine stays silent: now it counts.
		w.s.hasCarrier(true, w.now)
		w.act()
		w.pass(dog/2 - time.Millisecond)
		w.want("signals", w.signals, "[]")
		w.pass(time.Millisecond)
		w.want("signals", w.signals, "[engine ABRT]")
	}
}

// TestReadyWithoutCarrier: an engine that was ready owes heartbeats, carrier or
// not.
func TestReadyWithoutCarrier(t *testing.T) {
	w := newWorld(t, defaultPolicy.withWatchdog(30*time.Second, 30*time.Second))
	w.boot()
	w.s.hasCarrier(false, w.now)
	w.fed = nil
	w.pass(14 * time.Second)
	w.want("signals", w.signals, "[engine ABRT]")
	w.want("feedings", len(w.fed), 0)
}

// TestHangInRestart: an engine that hangs before it is ready again is ended in
// time for another try; the first start of all is waited for.
func TestHangInRestart(t *testing.T) {
	const dog = 30 * time.Second
	w := newWorld(t, defaultPolicy.withWatchdog(dog, dog))
	w.s.hasCarrier(true, 0)
	w.link()
	w.pass(2 * time.Minute)
	w.want("signals at the first start", w.signals, "[]")
	w.notify("engine", message{Ready: true})
	begin := w.now
	w.exit("engine", "exit code 1")
	w.pass(16 * time.Second)
	w.want("signals", w.signals, "[engine ABRT]")
	w.exit("engine", "killed by SIGABRT")
	w.pass(time.Second)
	w.want("engine", w.child("engine").state, stateStarting)
	if took := w.now - begin; took >= dog {
		t.Errorf("tried again after %v, with a watchdog of %v", took, dog)
	}
	// A heartbeat while it starts is a sign of life as any.
	for range 60 {
		w.pass(time.Second)
		w.notify("engine", message{Watchdog: true})
	}
	w.want("signals", w.signals, "[engine ABRT]")
	w.want("engine", w.child("engine").state, stateStarting)
}

// TestCrashLoopAndWatchdog: an engine that cannot run is tried at least twice
// more before the machine is reset, and the machine is reset; a service's crash
// loop has nothing to do with the watchdog.
func TestCrashLoopAndWatchdog(t *testing.T) {
	for _, dog := range []time.Duration{5 * time.Second, 30 * time.Second, 5 * time.Minute} {
		w := newWorld(t, defaultPolicy.withWatchdog(dog, dog))
		w.s.hasCarrier(true, 0)
		w.boot()
		w.notify("engine", message{Watchdog: true})
		tries := 0
		for begin := w.now; w.now < begin+dog; w.pass(100 * time.Millisecond) {
			if c := w.child("engine"); c.pid != 0 {
				if c.failures >= w.s.policy.CrashLoop {
					tries++
				}
				w.exit("engine", "exit code 1")
			}
		}
		if tries < 2 {
			t.Errorf("watchdog %v: %d tries in the crash loop before the reset; want two", dog, tries)
		}
		if last := w.fed[len(w.fed)-1]; w.now-last < dog {
			t.Errorf("watchdog %v: fed at %v by an engine that cannot run", dog, last)
		}
		for range 20 {
			if w.child("mail").pid != 0 {
				w.exit("mail", "exit code 1")
			}
			before := w.now
			w.pass(w.child("mail").due - w.now)
			if d := w.now - before; d > defaultPolicy.BackoffMost {
				t.Errorf("mail waits for %v", d)
			}
		}
		before := w.now
		w.exit("mail", "exit code 1")
		w.want("a service's wait", w.child("mail").due-before, defaultPolicy.BackoffMost)
	}
}

func TestPolicyOfWatchdog(t *testing.T) {
	const s = time.Second
	for _, tt := range []struct{ wanted, armed, hang, most time.Duration }{
		{30 * s, 30 * s, 15 * s, 10 * s},
		{5 * s, 5 * s, 5 * s / 2, 5 * s / 3},
		{30 * s, 10 * s, 5 * s, 10 * s / 3}, // a device with a time of its own
		{30 * s, 60 * s, 15 * s, 10 * s},    // and one that waits for longer
		{300 * s, 300 * s, 150 * s, 30 * s}, // never more than for any other child
		{30 * s, 0, 15 * s, 30 * s},         // no device
		{300 * s, 0, 150 * s, 30 * s},       //
		{0, 0, hangWithoutWatchdog, 30 * s}, // off: a hanging engine is still ended
	} {
		p := defaultPolicy.withWatchdog(tt.wanted, tt.armed)
		if got := p.backoffMost(&child{spec: spec{Engine: true}}); p.EngineHang != tt.hang || got != tt.most {
			t.Errorf("watchdog %v, armed %v: hang %v, crash loop %v; want %v, %v", tt.wanted, tt.armed, p.EngineHang, got, tt.hang, tt.most)
		}
	}
}
