package health

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"clonecluster/netcore/health/probe"
)

// fake is a service that works or not as the test says.
type fake struct {
	mu      sync.Mutex
	answer  error
	takes   time.Duration
	lingers time.Duration // after the end of ctx
	asking  atomic.Int32
	asked   int
	most    int32 // at once
}

func (f *fake) set(answer error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.answer = answer
}

func (f *fake) ask(ctx context.Context) error {
	now := f.asking.Add(1)
	defer f.asking.Add(-1)
	f.mu.Lock()
	f.asked++
	f.most = max(f.most, now)
	answer, takes := f.answer, f.takes
	f.mu.Unlock()
	select {
	case <-time.After(takes):
		return answer
	case <-ctx.Done():
		time.Sleep(f.lingers)
		return probe.ErrLate
	}
}

func (f *fake) counts() (asked int, most int32) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.asked, f.most
}

// watch is a running check of fakes in a bubble of time.
type watch struct {
	t       *testing.T
	mu      sync.Mutex
	log     bytes.Buffer
	reports []string
	full    atomic.Bool // the machine is
	end     func()
}

// Write takes the log.
func (w *watch) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.log.Write(p)
}

func (w *watch) tell(r Report) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.reports = append(w.reports, fmt.Sprint(r.Healthy, r.Reasons))
}

func startWatch(t *testing.T, services ...*service) *watch {
	w := &watch{t: t}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		run(ctx, services, Options{
			Logger: slog.New(slog.NewTextHandler(w, &slog.HandlerOptions{ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
				if a.Key == slog.TimeKey {
					return slog.Attr{}
				}
				return a
			}})),
			Tell: w.tell, Full: w.full.Load,
		})
	}()
	w.end = func() {
		cancel()
		<-done
	}
	return w
}

// after lets time pass and compares what was told and logged meanwhile.
func (w *watch) after(d time.Duration, reports, log []string) {
	w.t.Helper()
	time.Sleep(d)
	synctest.Wait()
	w.mu.Lock()
	defer w.mu.Unlock()
	if !slices.Equal(w.reports, reports) {
		w.t.Errorf("told\n%s\nwant\n%s", strings.Join(w.reports, "\n"), strings.Join(reports, "\n"))
	}
	if got := slices.Collect(strings.Lines(w.log.String())); strings.Join(got, "") != strings.Join(log, "\n")+strings.Repeat("\n", min(1, len(log))) {
		w.t.Errorf("logged\n%swant\n%s", strings.Join(got, ""), strings.Join(log, "\n"))
	}
	w.reports = nil
	w.log.Reset()
}

func second(name string, f *fake, rise, fall int) *service {
	return &service{ask: f.ask, check: Check{Name: name, Interval: time.Second, Timeout: 500 * time.Millisecond, Rise: rise, Fall: fall}}
}

func TestRun(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		refused := errors.New("refused")
		web, db := &fake{answer: refused}, &fake{takes: time.Millisecond}
		const odd = 10 * time.Millisecond // to look between the questions, whose times are round
		w := startWatch(t, second("web", web, 2, 3), second("db", db, 1, 2), &service{check: Check{Name: "job"}})
		defer w.end()

		// db at once; web fails for a while, which is no failure.
		w.after(odd, lines(
			"false [web: starting db: starting]", "false [web: starting, refused db: starting]", "false [web: starting, refused]",
		), lines(`level=INFO msg="service healthy" service=db`))
		w.after(950*time.Millisecond, nil, nil)
		if asked, _ := web.counts(); asked != 10 {
			t.Errorf("web was asked %d times in a second of its start; want 10", asked)
		}
		web.set(nil)
		w.after(100*time.Millisecond, lines("true []"), lines(`level=INFO msg="service healthy" service=web`))

		// Two failures are none; the third is, and then another reason is told.
		web.set(refused)
		w.after(2*time.Second, nil, nil)
		w.after(time.Second, lines("false [web: refused]"), lines(`level=WARN msg="service failed" service=web reason=refused`))
		w.after(5*time.Second, nil, nil)
		web.set(errors.New("the answer is 503"))
		w.after(time.Second, lines("false [web: the answer is 503]"), nil)
		db.set(refused)
		w.after(2*time.Second, lines("false [web: the answer is 503 db: refused]"), lines(`level=WARN msg="service failed" service=db reason=refused`))

		// It takes two successes to come back.
		web.set(nil)
		w.after(time.Second, nil, nil)
		w.after(time.Second, lines("false [db: refused]"), lines(`level=INFO msg="service healthy again" service=web`))
		db.set(nil)
		w.after(time.Second, lines("true []"), lines(`level=INFO msg="service healthy again" service=db`))

		// One that hangs is asked one question at a time.
		web.mu.Lock()
		web.takes = time.Hour
		web.mu.Unlock()
		w.after(4*time.Second, lines("false [web: no answer in time]"), lines(`level=WARN msg="service failed" service=web reason="no answer in time"`))
		if _, most := web.counts(); most != 1 {
			t.Errorf("web was asked %d questions at once", most)
		}
	})
}

// TestRunFull: on a machine that is full a service may be late for long, but it may not refuse,
// and when the machine is full no more it may not be late.
func TestRunFull(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		web := &fake{}
		w := startWatch(t, second("web", web, 1, 3))
		defer w.end()
		w.after(10*time.Millisecond, lines("false [web: starting]", "true []"), lines(`level=INFO msg="service healthy" service=web`))
		w.full.Store(true)
		late := func(takes time.Duration, answer error) {
			web.mu.Lock()
			defer web.mu.Unlock()
			web.takes, web.answer = takes, answer
		}
		const (
			excused = `level=WARN msg="service is late on a machine that is full, which is no failure yet" service=web checks=30`
			failed  = `level=WARN msg="service failed" service=web reason=`
			again   = `level=INFO msg="service healthy again" service=web`
		)
		late(time.Hour, nil)
		w.after(29*time.Second+900*time.Millisecond, nil, lines(excused))
		w.after(time.Second, lines("false [web: no answer in time]"), lines(failed+`"no answer in time"`))
		late(0, nil)
		w.after(time.Second, lines("true []"), lines(again))

		late(0, errors.New("refused"))
		w.after(3*time.Second, lines("false [web: refused]"), lines(failed+"refused"))
		late(0, nil)
		w.after(time.Second, lines("true []"), lines(again))

		w.full.Store(false)
		late(time.Hour, nil)
		w.after(3*time.Second, lines("false [web: no answer in time]"), lines(failed+`"no answer in time"`))
	})
}

func lines(l ...string) []string { return l }

func TestRunSlowStart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := startWatch(t, second("web", &fake{answer: errors.New("refused")}, 1, 1))
		defer w.end()
		w.after(slowStart-time.Millisecond, lines("false [web: starting]", "false [web: starting, refused]"), nil)
		w.after(time.Second, nil, lines(`level=WARN msg="service does not work yet" service=web reason=refused`))
		w.after(time.Hour, nil, nil)
	})
}

func TestRunWithoutChecks(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := startWatch(t)
		w.after(time.Hour, lines("true []"), nil)
		w.end()
	})
}

// TestRunEnds: Run waits for its questions, and nothing goes on afterwards.
func TestRunEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		idle, hangs := &fake{}, &fake{takes: time.Hour, lingers: 50 * time.Millisecond}
		w := startWatch(t, second("idle", idle, 1, 1), second("hangs", hangs, 1, 1))
		time.Sleep(1700 * time.Millisecond)
		synctest.Wait()
		w.end()
		if hangs.asking.Load() != 0 {
			t.Error("Run ended before its questions")
		}
		count := func() int {
			n, _ := idle.counts()
			m, _ := hangs.counts()
			return n + m
		}
		asked := count()
		w.mu.Lock()
		w.reports = nil
		w.log.Reset()
		w.mu.Unlock()
		w.after(time.Minute, nil, nil)
		if more := count() - asked; more != 0 {
			t.Errorf("%d questions after the end", more)
		}
	})
}

// TestRunReal has a check of each kind, of a service that works, fails and works
// again.
func TestRunReal(t *testing.T) {
	var broken atomic.Bool
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		if broken.Load() {
			w.WriteHeader(http.StatusServiceUnavailable)
		}
	}))
	defer srv.Close()
	address := srv.Listener.Addr().(*net.TCPAddr)
	port := uint16(address.Port)
	checks := []Check{
		{Name: "http", HTTP: srv.URL},
		{Name: "tcp", TCP: address.String()},
		{Name: "exec", Exec: []string{"/bin/sh", "-c", "echo $WHO; exit 0"}, Env: []string{"WHO=me"}},
		{Name: "listen", Listen: []PortRange{{Lo: port, Hi: port}}},
		{Name: "none"},
	}
	for i := range checks {
		checks[i].Interval, checks[i].Timeout = 20*time.Millisecond, 10*time.Second
	}
	reports := make(chan Report, 100)
	ctx, cancel := context.WithCancel(t.Context())
	var running sync.WaitGroup
	running.Go(func() {
		Run(ctx, checks, Options{VIPs: []netip.Addr{netip.MustParseAddr("127.0.0.1")}, Logger: slog.New(slog.DiscardHandler), Tell: func(r Report) { reports <- r }})
	})
	until := func(want string) {
		t.Helper()
		for {
			select {
			case r := <-reports:
				if fmt.Sprint(r.Healthy, r.Reasons) == want {
					return
				}
			case <-time.After(10 * time.Second):
				t.Fatalf("not told %s", want)
			}
		}
	}
	until("true []")
	broken.Store(true)
	until("false [http: the answer is 503 Service Unavailable]")
	broken.Store(false)
	until("true []")
	cancel()
	running.Wait()
}
