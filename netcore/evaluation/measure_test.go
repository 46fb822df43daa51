package evaluation

import (
	"cmp"
	"context"
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"clonecluster/netcore/engine"
	"clonecluster/netcore/netnstest"
	"clonecluster/netcore/webstone"
)

// TestEvaluation is "make evaluation".
func TestEvaluation(t *testing.T) {
	results := os.Getenv("CLONECLUSTER_EVALUATION")
	if results == "" {
		t.Skip("takes almost two hours, and a machine with nothing else to do: make evaluation")
	}
	plan := planOf(t, os.Getenv("EVALUATION_PLAN"))
	only, err := regexp.Compile(os.Getenv("EVALUATION_ONLY"))
	if err != nil {
		t.Fatalf("EVALUATION_ONLY: %v", err)
	}
	r, err := former(results, plan, only)
	if err != nil {
		t.Fatal(err)
	}
	measure(t, plan, r, only, func() {
		data, err := json.MarshalIndent(r, "", " ")
		if err == nil {
			err = os.WriteFile(results+".new", data, 0o644)
		}
		if err == nil {
			err = os.Rename(results+".new", results)
		}
		if err != nil {
			t.Fatal(err)
		}
	})
}

// former gives the results that there are, to go on from: those of a run that was interrupted,
// or, if only some set-ups are to be measured, all but theirs. Of one that is complete nothing
// is taken: it is kept in a file beside, and everything is measured anew.
func former(results string, plan Plan, only *regexp.Regexp) (*Report, error) {
	data, err := os.ReadFile(results)
	if errors.Is(err, os.ErrNotExist) {
		return &Report{}, nil
	}
	r := &Report{}
	if err == nil {
		err = json.Unmarshal(data, r)
	}
	if err != nil {
		return nil, fmt.Errorf("the former results: %w; move %s away", err, results)
	}
	if only.String() == "" && r.Complete {
		return &Report{}, os.Rename(results, results+".last")
	}
	if !reflect.DeepEqual(r.Plan, plan) {
		return nil, fmt.Errorf("%s is of another plan, so what is added would not be comparable: move it away", results)
	}
	if only.String() != "" {
		r.Runs = slices.DeleteFunc(r.Runs, func(m *Measured) bool { return only.MatchString(m.Setup.String()) })
		r.Failovers = slices.DeleteFunc(r.Failovers, func(Failover) bool { return only.MatchString("failover") })
	}
	r.Missing = nil // it may be there now
	return r, nil
}

// TestFormer: an interrupted run goes on, a complete one does not, and one of another plan is refused.
func TestFormer(t *testing.T) {
	file := filepath.Join(t.TempDir(), "results.json")
	all := regexp.MustCompile("")
	if r, err := former(file, Short(), all); err != nil || len(r.Runs) > 0 {
		t.Fatalf("without results: %+v, %v", r, err)
	}
	plan := Short()
	write := func(complete bool) {
		r := &Report{Plan: plan, Complete: complete}
		for _, run := range plan.Runs[:10] {
			r.Enter(&Measured{Run: run, Result: &webstone.Result{}})
		}
		data, err := json.Marshal(r)
		if err == nil {
			err = os.WriteFile(file, data, 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	write(false)
	r, err := former(file, plan, all)
	if err != nil || len(r.Runs) != 10 {
		t.Fatalf("interrupted: %d runs, %v; want 10", len(r.Runs), err)
	}
	if whole, rest := plan.Takes(&Report{}), plan.Takes(r); rest >= whole || rest == 0 {
		t.Errorf("the whole takes %v, the rest %v", whole, rest)
	}
	one := plan.Runs[0].Setup.String()
	if r, err := former(file, plan, regexp.MustCompile(regexp.QuoteMeta(one))); err != nil || len(r.Runs) == 0 || len(r.Runs) == 10 {
		t.Errorf("only %s: %d runs are kept, %v", one, len(r.Runs), err)
	}
	if _, err := former(file, Full(), all); err == nil {
		t.Error("results of another plan are taken")
	}
	write(true)
	if r, err := former(file, plan, all); err != nil || len(r.Runs) > 0 {
		t.Errorf("complete: %d runs are taken, %v", len(r.Runs), err)
	}
	if _, err := os.Stat(file + ".last"); err != nil {
		t.Error(err)
	}
}

// planOf is one of the two, or a file with another.
func planOf(t *testing.T, name string) (p Plan) {
	t.Helper()
	switch name {
	case "", "full":
		return Full()
	case "short":
		return Short()
	}
	data, err := os.ReadFile(name)
	if err == nil {
		err = json.Unmarshal(data, &p)
	}
	if err != nil {
		t.Fatalf("EVALUATION_PLAN is full, short or a file: %v", err)
	}
	return p
}

// measure does all runs whose set-ups have a name that matches, and tells save after each.
func measure(t *testing.T, p Plan, r *Report, only *regexp.Regexp, save func()) {
	ctx, stop := netnstest.Interruptible()
	defer stop()
	r.Plan, r.Date, r.Machine, r.Kernel, r.Processors = p, time.Now().UTC().Format(time.DateOnly), netnstest.Processor(t), netnstest.Kernel(t), runtime.NumCPU()
	r.Versions = programs()
	if r.Missing == nil {
		r.Missing = map[string]string{}
	}
	if r.Configs == nil {
		r.Configs = map[string]string{}
	}
	content := newContent(t)
	say := p.progress(r, only)
	content.gauge.best = max(content.gauge.best, r.Best)
	again, mend := 10, 0 // runs that others disturb, and those that are made again in the end
	if p.Rounds > 1 {    // "make bench" has no time for it
		again, mend, content.gauge.patience = 60, 60, 25*time.Minute
	}
	// In a round all set-ups take turns, in the next one the other way round, but for the first, with which all others are
	// compared. After the rounds come those once more of which others have disturbed something.
	setups := (&Report{Runs: runsOf(p)}).setups()
	rounds := p.Rounds
	if p.Rounds > 1 {
		rounds *= 2
	}
	for turn := range rounds {
		round, once := turn%p.Rounds, turn < p.Rounds
		if turn > 0 {
			slices.Reverse(setups[min(1, len(setups)):])
		}
		lacks := func(s Setup) []Run {
			return slices.DeleteFunc(slices.Clone(p.Runs), func(run Run) bool {
				had := r.at(run, round)
				return run.Setup != s || had != nil && (once || !had.robbed())
			})
		}
		left := slices.DeleteFunc(slices.Clone(setups), func(s Setup) bool {
			return !only.MatchString(s.String()) || r.Missing[s.String()] != "" || len(lacks(s)) == 0
		})
		for first := true; len(left) > 0 && ctx.Err() == nil && (once || mend > 0); first = false {
			i := 0
			if !first || left[0] != setups[0] {
				i = p.next(left, content.gauge.fast(), len(content.gauge.usable))
			}
			s := left[i]
			left = slices.Delete(left, i, i+1)
			lacking := lacks(s)
			t.Run(fmt.Sprintf("%s/%d", s, round+1), func(t *testing.T) {
				b, err := newBed(t, p, s, content, "relaxed")
				if errors.As(err, new(missing)) {
					r.Missing[s.String()] = err.Error()
					save()
					return
				} else if err != nil {
					t.Fatal(err)
				}
				r.Accounting = b.accounting()
				for name, text := range b.configs {
					r.Configs[name] = text
				}
				if d := p.settle(s); d > 0 {
					say("%s: until the shares follow the load", s)
					settling := Run{Setup: s, Workload: smallTLS, Clients: 1000}
					rate := settleShare * r.best(settling.Workload)
					if rate == 0 {
						settling.Clients = 20
					}
					b.measure(ctx, settling, rate, d, 0)
				}
				for _, run := range lacking {
					if ctx.Err() != nil {
						return
					}
					if !once && mend == 0 {
						return
					}
					needs := func(s Setup) int { return p.needs(s, len(content.gauge.usable)) }
					if slices.ContainsFunc(left, func(other Setup) bool { return needs(other) < needs(s) }) && !content.gauge.soon(ctx, needs(s)) {
						left = append(left, s) // those that need fewer processors come first
						return
					}
					say("%s, %s, %d clients", s, run.Workload, run.Clients)
					rate := run.Share * r.best(run.Workload)
					if run.Share > 0 && rate == 0 {
						t.Logf("at %.1f times the rate of a plain server: that was not measured, so it is left out", run.Share)
						continue
					}
					warmUp, window := p.Times(run)
					m := b.measure(ctx, run, rate, warmUp, window)
					for tries := 0; tries < 2 && again > 0 && m != nil && m.robbed(); tries++ { // it may be over
						again--
						if other := b.measure(ctx, run, rate, warmUp, window); other != nil && other.sounder(m) {
							m = other
						}
					}
					if ctx.Err() == nil {
						if !once {
							mend--
						}
						m.Round, r.Best = round, content.gauge.best
						if had := r.at(run, round); had == nil || m.sounder(had) {
							r.Enter(m)
						}
						save()
					}
				}
				if r.Rest == nil {
					r.Rest = map[string]float64{}
				}
				if turn == 0 && p.Rounds > 1 && !s.Bystander {
					r.Rest[s.String()] = b.rest(ctx)
					save()
				}
			})
		}
	}
	if only.MatchString("failover") {
		for _, way := range failoverWays {
			at := slices.IndexFunc(r.Failovers, func(f Failover) bool { return f.Way == way })
			if at < 0 {
				at, r.Failovers = len(r.Failovers), append(r.Failovers, Failover{Way: way})
			}
			f := &r.Failovers[at]
			f.Why = ""
			for tries := 0; len(f.Seconds) < p.Failovers && tries < 2*p.Failovers && f.Why == "" && ctx.Err() == nil; tries++ {
				t.Run(fmt.Sprintf("failover/%s/%d", way, len(f.Seconds)+1), func(t *testing.T) {
					say("fail-over %d of %d: %s", len(f.Seconds)+1, p.Failovers, way)
					seconds, err := failover(t, p, way, content, r.Configs)
					if errors.As(err, new(missing)) {
						f.Why = err.Error()
					} else if err != nil {
						t.Logf("once more: %v", err)
					} else {
						f.Seconds = append(f.Seconds, seconds)
						save()
					}
				})
			}
		}
	}
	if ctx.Err() == nil && !t.Failed() && only.String() == "" {
		r.Complete = true
	}
	save()
	netnstest.Progress("")
	if ctx.Err() != nil {
		t.Fatal("interrupted: the runs that were complete are in the results, and all that was set up is taken back; the same command goes on from there")
	}
}

// progress says what is done, how much of it is over, and when the rest will be.
func (p *Plan) progress(r *Report, only *regexp.Regexp) (say func(format string, args ...any)) {
	these := *p
	these.Runs = slices.DeleteFunc(slices.Clone(p.Runs), func(run Run) bool { return !only.MatchString(run.Setup.String()) })
	if !only.MatchString("failover") {
		these.Failovers = 0
	}
	begin, all := time.Now(), these.Takes(r)
	return func(format string, args ...any) {
		left := these.Takes(r)
		// By how much it takes longer than planned, once that can be told.
		if over := all - left; over > time.Minute {
			left = time.Duration(float64(left) * float64(time.Since(begin)) / float64(over))
		}
		netnstest.Progress("%3.0f %%, %s left: %s", 100*(1-float64(these.Takes(r))/float64(max(all, 1))), left.Round(time.Minute/2), fmt.Sprintf(format, args...))
	}
}

// settleShare is at what rate shares come to follow the load, in what one plain server can do: one
// at which of four nodes a slow one is full, and the others are not.
const settleShare = 1.1

func runsOf(p Plan) (all []*Measured) {
	for _, run := range p.Runs {
		all = append(all, &Measured{Run: run})
	}
	return all
}

// measure does one run; at a rate, if it is not 0. Without a window nothing comes of it.
func (b *bed) measure(ctx context.Context, run Run, rate float64, warmUp, window time.Duration) *Measured {
	b.t.Helper()
	b.serve(run.Workload)
	p := b.plan
	w, tls, err := workload(run.Workload)
	if err != nil {
		b.t.Fatal(err)
	}
	port := uint16(80)
	if tls {
		port = 443
	}
	cfg := webstone.Config{Target: netip.AddrPortFrom(netip.MustParseAddr(b.target), port), Prefix: "/", Workload: w, Clients: run.Clients, KeepAlive: run.KeepAlive, TLS: tls,
		Rate: rate, Timeout: time.Duration(p.Timeout * float64(time.Second)), WarmUp: warmUp, Window: max(window, time.Millisecond), Windows: 1, Seed: uint64(run.Clients)}
	for i := range sources {
		cfg.Sources = append(cfg.Sources, netip.MustParseAddr(source(i)))
	}
	in, out := filepath.Join(b.net.Dir, "clients.in"), filepath.Join(b.net.Dir, "clients.out")
	data, err := json.Marshal(cfg)
	if err == nil {
		err = os.WriteFile(in, data, 0o600)
	}
	if err != nil {
		b.t.Fatal(err)
	}
	on, pace := b.gauge.await(ctx, p.processors(run))
	b.keep(on)
	process := b.client.Start("clients", in, out)
	if err := b.clients.take(process.PID()); err != nil {
		b.t.Fatal(err)
	}
	stopped := context.AfterFunc(ctx, process.Kill)
	defer stopped()

	sleep(ctx, cfg.WarmUp)
	before, at := b.sample(), time.Now()
	if run.Kill {
		b.kill(ctx, cfg.Window)
	}
	sleep(ctx, time.Until(at.Add(cfg.Window)))
	after, wall := b.sample(), time.Since(at)
	err = process.Wait()
	b.calm(ctx)
	if ctx.Err() != nil {
		return nil
	} else if err != nil {
		b.t.Fatalf("the clients: %v\n%s", err, process.Output())
	}
	if window == 0 {
		return nil
	}
	m := &Measured{Run: run, Pace: min(pace, b.gauge.pace(on))}
	if data, err = os.ReadFile(out); err == nil {
		err = json.Unmarshal(data, &m.Result)
	}
	if err != nil {
		b.t.Fatal(err)
	}
	own := 0.
	for i, g := range b.all() {
		n := g.group.use(g.name, before.groups[i], after.groups[i], wall)
		own += n.CPU
		if g.group.quota > 0 {
			m.Nodes = append(m.Nodes, n)
		}
	}
	b.shares(m)
	m.Idle = (after.idle - before.idle).Seconds() / wall.Seconds()
	m.Others = max(0, (after.busy-before.busy).Seconds()/wall.Seconds()-own)
	return m
}

// shares says how many buckets each node of a cluster has.
func (b *bed) shares(m *Measured) {
	if m.Way != Clone {
		return
	}
	socket := b.servers[0].socket
	client := &http.Client{Timeout: 2 * time.Second, Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", socket)
	}}}
	var s engine.Status
	res, err := client.Get("http://cloned/v1/status")
	if err == nil {
		defer res.Body.Close()
		err = json.NewDecoder(res.Body).Decode(&s)
	}
	if err != nil {
		b.t.Logf("the shares: %v", err) // a full node may be late
		return
	}
	for i, server := range b.servers {
		for _, member := range s.Members {
			if member.Node == server.MAC {
				m.Nodes[i].Buckets = member.Buckets
			}
		}
	}
}

// calm waits until no machine is busy: servers go on with what clients who have gone had asked for.
func (b *bed) calm(ctx context.Context) {
	b.t.Helper()
	const look = 100 * time.Millisecond
	for deadline := time.Now().Add(15 * time.Second); ctx.Err() == nil && time.Now().Before(deadline); {
		before, at := b.sample(), time.Now()
		sleep(ctx, look)
		after, wall := b.sample(), time.Since(at)
		busy := false
		for i, g := range b.all() {
			n := g.group.use(g.name, before.groups[i], after.groups[i], wall)
			busy = busy || n.Quota > 0 && n.CPU > 0.6*n.Quota
		}
		if !busy {
			return
		}
	}
}

// rest gives what the busiest machine takes of a processor when nobody asks.
func (b *bed) rest(ctx context.Context) (most float64) {
	b.t.Helper()
	sleep(ctx, max(time.Until(b.built.Add(begun)), time.Second))
	before, at := b.sample(), time.Now()
	sleep(ctx, 2*time.Second)
	after, wall := b.sample(), time.Since(at)
	for i, g := range b.all() {
		if g.group.quota > 0 {
			most = max(most, g.group.use(g.name, before.groups[i], after.groups[i], wall).CPU)
		}
	}
	return most
}

// begun is when all is over that an engine does once: ten seconds after its start it hashes
// its program.
const begun = 12 * time.Second

// kill cuts the power of the last server for the second third of a while.
func (b *bed) kill(ctx context.Context, while time.Duration) {
	b.t.Helper()
	m := b.servers[len(b.servers)-1]
	sleep(ctx, while/3)
	m.PowerOff()
	sleep(ctx, while/3)
	m.PowerOn()
	b.built = time.Now()
	b.wire(m)
	m.start()
	b.keep(b.on)
}

// keep keeps the machines on some of the processors, each on one.
func (b *bed) keep(on []int) {
	b.t.Helper()
	b.on = on
	for i, m := range b.machines {
		if err := m.group.keep(on[i%len(on)]); err != nil {
			b.t.Fatalf("keeping %s on a processor: %v", m.Name, err)
		}
	}
}

func sleep(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}

// A named group is one whose time is a part of the bed's.
type named struct {
	name  string
	group *cgroup
}

func (b *bed) all() []named {
	all := []named{{"clients", b.clients}}
	for _, m := range b.machines {
		all = append(all, named{m.Name, m.group})
	}
	return all
}

// sample is what was taken of the processors so far.
type sample struct {
	groups     []used
	busy, idle time.Duration // of the real machine
}

func (b *bed) sample() (s sample) {
	b.t.Helper()
	for _, n := range b.all() {
		s.groups = append(s.groups, n.group.used(b.t))
	}
	t, unwanted := netnstest.Processors(b.t), b.awake.CPU(b.t)
	s.idle, s.busy = t.Idle+unwanted, t.Busy+t.Stolen-unwanted
	return s
}

// failover gives how long connections failed after the power of a machine was cut.
func failover(t *testing.T, p Plan, way string, content content, configs map[string]string) (seconds float64, err error) {
	t.Helper()
	s := Setup{Way: Clone, Machines: 2, Policy: "byRandom"}
	detect := "normal"
	switch way {
	case CloneFailover:
	case CloneFast:
		detect = "fast"
	default:
		if err := netnstest.Lacks("keepalived"); err != nil {
			return 0, missing{fmt.Errorf("%w (Debian package keepalived)", err)}
		}
		s = Setup{Way: Plain, Machines: 2}
	}
	p.Quota = 0.25 // no load: the time is that of the protocols
	b, err := newBed(t, p, s, content, detect)
	if err != nil {
		return 0, err
	}
	victim := b.servers[0]
	if s.Way != Clone {
		b.keepalived(way, configs)
	}
	b.client.Run("curl", "-sSf", "--max-time", "20", "--retry", "20", "--retry-all-errors", "--retry-delay", "1", "-o", "/dev/null", "http://"+vip+"/2000")
	probes := b.client.Start("probe", vip+":80")
	probes.Await(0, "probing")
	time.Sleep(700 * time.Millisecond)
	// The cable first: a part of keepalived that outlives another says goodbye.
	cut := time.Now()
	b.net.Unplug(victim.Host)
	victim.PowerOff()
	time.Sleep(6 * time.Second)
	probes.Signal(syscall.SIGINT)
	probes.Await(0, "(?m)^end$")
	var tries []try
	for line := range strings.Lines(probes.Output()) {
		var ns int64
		var ok bool
		if n, _ := fmt.Sscanf(line, "try %d %t", &ns, &ok); n == 2 {
			tries = append(tries, try{time.Unix(0, ns).Sub(cut), ok})
		}
	}
	away, back := outage(tries)
	if !back || away == 0 {
		return 0, fmt.Errorf("of %d connections the last that failed was %v after the cut", len(tries), away)
	}
	return away.Seconds(), nil
}

// A try is a connection that began at a time after the cut.
type try struct {
	at time.Duration
	ok bool
}

// enoughTries without a failure are the end of an outage: of a cluster of two, where half of
// them are another node's anyway, so many do not succeed by chance.
const enoughTries = 50

// outage gives the beginning of the last try that failed before it was over, and whether it
// was over. What fails before the cut, or later, is not of it.
func outage(tries []try) (last time.Duration, over bool) {
	slices.SortFunc(tries, func(a, b try) int { return cmp.Compare(a.at, b.at) })
	good := 0
	for _, t := range tries {
		switch {
		case t.at < 0:
		case !t.ok:
			last, good = t.at, 0
		default:
			if good++; good == enoughTries {
				return last, true
			}
		}
	}
	return last, false
}

func TestOutage(t *testing.T) {
	var tries []try
	add := func(from, to int, ok func(i int) bool) {
		for i := from; i < to; i++ {
			tries = append(tries, try{time.Duration(i) * 5 * time.Millisecond, ok(i)})
		}
	}
	add(-10, 0, func(int) bool { return false })
	add(0, 60, func(i int) bool { return i%3 == 0 })
	if _, over := outage(tries); over {
		t.Error("an outage without an end is over")
	}
	add(60, 200, func(i int) bool { return i != 150 })
	if last, over := outage(tries); !over || last != 295*time.Millisecond {
		t.Errorf("the outage is %v, over %v; want 295ms", last, over)
	}
}

// keepalived gives the servers one address by VRRP, of which the first is the master.
func (b *bed) keepalived(way string, configs map[string]string) {
	b.t.Helper()
	for i, m := range b.servers {
		advert := "advert_int 1"
		if way == KeepalivedTuned {
			advert = "advert_int 0.1"
		}
		text := fmt.Sprintf("global_defs {\n  vrrp_version 3\n  router_id server%d\n}\nvrrp_instance web {\n  state %s\n  interface eth0\n  virtual_router_id 51\n  priority %d\n  %s\n  virtual_ipaddress {\n    %s/24\n  }\n}\n",
			i+1, []string{"MASTER", "BACKUP"}[i], 150-50*i, advert, vip)
		configs[way] = text
		conf := filepath.Join(b.net.Dir, m.Name+".keepalived")
		if err := os.WriteFile(conf, []byte(text), 0o600); err != nil {
			b.t.Fatal(err)
		}
		m.command(b.t, "keepalived", "--dont-fork", "--log-console", "--vrrp", "--use-file", conf,
			"--pid", conf+".pid", "--vrrp_pid", conf+".vrrp.pid")
	}
	// Until the first has the address, and the second knows that.
	for range 100 {
		if out, err := b.servers[0].Try("ip", "-br", "addr", "show", "eth0"); err == nil && strings.Contains(out, vip+"/") {
			break
		}
		time.Sleep(100 * time.Millisecond)
	}
	time.Sleep(1500 * time.Millisecond)
}

// A gauge tells which processors are as fast as they can be: where others share the hardware
// below this machine, one may be slower by a third for minutes.
type gauge struct {
	key      *rsa.PrivateKey
	usable   []int         // numbers of the processors
	best     float64       // signatures a second that a processor has made at most
	patience time.Duration // with those who make them slow, in all
}

func newGauge(t *testing.T, key *rsa.PrivateKey) *gauge {
	usable, err := netnstest.UsableProcessors()
	if err != nil {
		t.Fatal(err)
	}
	g := &gauge{key: key, usable: usable, patience: 20 * time.Second}
	for range 10 {
		g.look()
	}
	return g
}

// look gives the pace of each usable processor, in what one was at best.
func (g *gauge) look() []float64 {
	most := make([]float64, len(g.usable))
	for range 3 { // what lasts for a moment does not matter
		for i, pace := range g.paces() {
			most[i] = max(most[i], pace)
		}
		if g.best = max(g.best, slices.Max(most)); slices.Min(most) >= leastPace*g.best {
			break
		}
	}
	for i := range most {
		most[i] /= g.best
	}
	return most
}

// pace is that of the slowest of some processors.
func (g *gauge) pace(of []int) float64 {
	least := 1.
	for i, pace := range g.look() {
		if slices.Contains(of, g.usable[i]) {
			least = min(least, pace)
		}
	}
	return least
}

// fast is how many processors are as fast as they can be.
func (g *gauge) fast() (n int) {
	for _, pace := range g.look() {
		if pace >= leastPace {
			n++
		}
	}
	return n
}

// soon reports whether so many are within some seconds.
func (g *gauge) soon(ctx context.Context, n int) bool {
	for range 8 {
		if g.fast() >= n {
			return true
		}
		sleep(ctx, 2*time.Second)
	}
	return false
}

// paces are how many signatures as for a workload over TLS each processor makes in a second of its time.
func (g *gauge) paces() []float64 {
	const signatures = 6
	all := make([]float64, len(g.usable))
	var group sync.WaitGroup
	for i, processor := range g.usable {
		group.Go(func() {
			// The thread has to outlive this, as with it would go the programs that it has started.
			runtime.LockOSThread()
			defer runtime.UnlockOSThread()
			if err := netnstest.Pin(processor); err != nil {
				panic(err)
			}
			defer netnstest.Pin(g.usable...)
			now := func() time.Duration {
				var ts unix.Timespec
				_ = unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &ts)
				return time.Duration(ts.Nano())
			}
			digest, start := make([]byte, crypto.SHA256.Size()), now()
			for range signatures {
				if _, err := rsa.SignPKCS1v15(nil, g.key, crypto.SHA256, digest); err != nil {
					panic(err)
				}
			}
			all[i] = signatures / (now() - start).Seconds()
		})
	}
	group.Wait()
	return all
}

// await gives the fastest so many processors, and the pace of the slowest of those. It waits until that is
// what it can be, as long as there is patience left.
func (g *gauge) await(ctx context.Context, n int) (on []int, pace float64) {
	n = min(n, len(g.usable))
	for waited := time.Duration(0); ; {
		start := time.Now()
		paces := g.look()
		on = nil
		for _, i := range fastest(paces, n) {
			on, pace = append(on, g.usable[i]), paces[i]
		}
		if pace >= leastPace || g.patience <= 0 || ctx.Err() != nil {
			return on, pace
		}
		if waited > 10*time.Second {
			netnstest.Progress("others make a processor slow, at %.0f %% of its pace: waiting, for %s at most", 100*pace, g.patience.Round(time.Second))
		}
		sleep(ctx, 2*time.Second)
		waited += time.Since(start)
		g.patience -= time.Since(start)
	}
}

// fastest are the indexes of the n greatest, the greatest first.
func fastest(paces []float64, n int) []int {
	order := make([]int, len(paces))
	for i := range order {
		order[i] = i
	}
	slices.SortStableFunc(order, func(a, b int) int { return cmp.Compare(paces[b], paces[a]) })
	return order[:n]
}

// TestGauge: it knows of each processor, takes the fastest, and who has no patience does not wait.
func TestGauge(t *testing.T) {
	key, err := rsa.GenerateKey(rand.Reader, CertificateBits)
	if err != nil {
		t.Fatal(err)
	}
	g := newGauge(t, key)
	if all := g.paces(); len(all) != runtime.NumCPU() || slices.Min(all) <= 0 {
		t.Errorf("the paces of %d processors are %v", runtime.NumCPU(), all)
	}
	for n := 1; n <= len(g.usable)+1; n++ {
		if on, pace := g.await(t.Context(), n); len(on) != min(n, len(g.usable)) || len(slices.Compact(slices.Sorted(slices.Values(on)))) != len(on) || pace <= 0 {
			t.Errorf("the fastest %d processors of %v are %v, with a pace of %v", n, g.usable, on, pace)
		}
	}
	if got := fastest([]float64{0.6, 1, 0.8, 1}, 3); !slices.Equal(got, []int{1, 3, 2}) {
		t.Errorf("the fastest three are %v", got)
	}
	g.best, g.patience = 1e9, 0
	if n := g.fast(); n > 0 {
		t.Errorf("%d processors that were a thousand times as fast are fast", n)
	}
	start := time.Now()
	if _, pace := g.await(t.Context(), 1); pace <= 0 || pace >= leastPace || time.Since(start) > 5*time.Second {
		t.Errorf("of a processor that was a thousand times as fast the pace is %v", pace)
	}
}

// newContent has the files of all workloads, in memory, and a certificate.
func newContent(t *testing.T) content {
	t.Helper()
	dir := t.TempDir()
	if shm, err := os.MkdirTemp("/dev/shm", "clonecluster-evaluation"); err == nil {
		t.Cleanup(func() { _ = os.RemoveAll(shm) })
		dir = shm
	}
	key, err := rsa.GenerateKey(rand.Reader, CertificateBits)
	if err == nil {
		err = errors.Join(os.Chmod(dir, 0o755), webstone.WriteContent(filepath.Join(dir, "www")), certify(dir, key))
	}
	if err != nil {
		t.Fatal(err)
	}
	return content{dir, newGauge(t, key)}
}

// content is what is served, and what tells how fast that can be done.
type content struct {
	folder string
	gauge  *gauge
}

// certify writes a certificate that signs itself, and its key.
func certify(dir string, key *rsa.PrivateKey) error {
	of := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: vip}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour)}
	cert, err := x509.CreateCertificate(rand.Reader, of, of, key.Public(), key)
	if err != nil {
		return err
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return err
	}
	return errors.Join(os.WriteFile(filepath.Join(dir, "cert.pem"), pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert}), 0o644),
		os.WriteFile(filepath.Join(dir, "key.pem"), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), 0o600))
}

// programs are the versions of those that take part, as they say them.
func programs() map[string]string {
	v := map[string]string{"Go": strings.TrimPrefix(runtime.Version(), "go")}
	number := regexp.MustCompile(`\d+(\.\d+)+`)
	for name, flag := range map[string]string{"nginx": "-v", "haproxy": "-v", "keepalived": "--version", "iptables": "--version"} {
		if out, err := exec.Command(name, flag).CombinedOutput(); err == nil {
			if n := number.Find(out); n != nil {
				v[name] = string(n)
			}
		}
	}
	if out, err := exec.Command("git", "describe", "--always", "--dirty").Output(); err == nil {
		v["clonecluster"] = strings.TrimSpace(string(out))
	}
	return v
}

// TestSmoke: every way serves all that its clients ask for, and a report comes out.
func TestSmoke(t *testing.T) {
	if testing.Short() {
		t.Skip("takes seconds: not with -short")
	}
	if err := netnstest.Lacks("nginx", "curl", "ethtool"); err != nil {
		t.Skipf("%v: make deps-test", err)
	}
	p := Plan{Quota: 0.2, PeriodMS: 20, ModerationMS: 1, WarmUp: 0.3, Window: 0.7, Timeout: 10, Rounds: 1, Failovers: 0}
	for _, s := range []Setup{{Way: Plain, Machines: 1}, {Way: Clone, Machines: 2, Policy: "byLoad"}, {Way: Clone, Machines: 1, Policy: "byRandom", Bystander: true}, {Way: XtCluster, Machines: 2}, {Way: HAProxy, Machines: 2}, {Way: NGINX, Machines: 2}} {
		p.Runs = append(p.Runs, Run{Setup: s, Workload: "2k", Clients: 10})
	}
	r := &Report{}
	measure(t, p, r, regexp.MustCompile(""), func() {})
	for _, m := range r.Runs {
		w := m.Result.Total()
		t.Logf("%s: %.0f requests/s, p99 %v, %s errors, %+v, idle %.2f", m.Setup, w.Rate(), w.Latency.Quantile(.99), Errors(w), m.Nodes, m.Idle)
		if w.Requests == 0 || w.Failed() > 0 {
			t.Errorf("%s: %d answers, %s errors: %v", m.Setup, w.Requests, Errors(w), w.Examples)
		}
		threads := strings.Contains(r.Accounting, "threaded NAPI) on its quota") // otherwise it is in the sender's time
		if p := r.point(m.Run); (m.Bystander && threads) != (p.Aside > 0) || p.Aside > p.Request {
			t.Errorf("%s: a bystander takes %.1f µs for a request, and the others %.1f", m.Setup, 1e6*p.Aside, 1e6*p.Request)
		}
	}
	if len(r.Runs)+len(r.Missing) != len(p.Runs) {
		t.Errorf("%d runs and %v; want %d", len(r.Runs), r.Missing, len(p.Runs))
	}
	if files, err := r.Files(); err != nil || !strings.Contains(string(files[Document]), "clone, 2 nodes, byLoad") {
		t.Errorf("%v:\n%s", err, files[Document])
	}
}
