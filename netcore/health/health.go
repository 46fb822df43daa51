// Package health tells whether the services of this machine work, for the
// engine: a live engine is not a live service, and a node whose service fails
// has to give its buckets away.
package health

import (
	"context"
	"errors"
	"log/slog"
	"net/netip"
	"slices"
	"sync"
	"time"

	"clonecluster/netcore/health/probe"
)

// PortRange are the TCP ports from Lo to Hi, both included.
type PortRange = probe.PortRange

// Check is how to find out that one service works: by the first of Exec, HTTP,
// TCP and Listen that is set. A service with none of them counts as healthy.
type Check struct {
	Name string // of the service

	// Exec is a program, by its path, and its arguments. Exit code 0 within
	// the timeout is healthy. It runs as the engine's user, in /, with nothing
	// in its environment but PATH, HOME and Env.
	Exec []string
	Env  []string // as NAME=value
	// HTTP is an http:// URL that answers 2xx.
	HTTP string
	// TCP is an address and port that accepts a connection.
	TCP string
	// Listen are ports with a listener at the VIP or at a wildcard address;
	// see probe.Listen for ranges.
	Listen []PortRange

	Interval time.Duration // between the beginnings of two questions
	Timeout  time.Duration // for an answer
	Rise     int           // successes in a row that end a failure; 0 is 1
	Fall     int           // failures in a row that are one; 0 is 1
}

// question is what a check asks; nil if nothing.
func (c Check) question(vips []netip.Addr) func(context.Context) error {
	switch {
	case len(c.Exec) > 0:
		return (&command{argv: c.Exec, env: c.Env}).run
	case c.HTTP != "":
		return func(ctx context.Context) error { return probe.HTTP(ctx, c.HTTP) }
	case c.TCP != "":
		return func(ctx context.Context) error { return probe.TCP(ctx, c.TCP) }
	case len(c.Listen) > 0:
		return func(context.Context) error { return probe.Listen(c.Listen, vips) }
	}
	return nil
}

// Report is the health of all services together.
type Report struct {
	Healthy bool // every service is
	// Reasons has a line for each service that is not, in the order of the
	// checks, such as "web: no answer in time". A service that has not worked
	// yet is "web: starting", or "web: starting, connection refused".
	Reasons []string
}

// Options are what checks run with.
type Options struct {
	VIPs   []netip.Addr // for Check.Listen
	Logger *slog.Logger
	// Bell has all services asked at once when it rings; nil: nobody rings.
	Bell *probe.Bell
	// Tell is given the report at the start, and then whenever it is another.
	// It is called once at a time, in order, and must return soon.
	Tell func(Report)
	// Full, if set, reports whether this machine's processors have no time left. A service
	// that answers late then is not held to have failed, for ten times as many checks:
	// to take its share away would fill the other nodes, and then theirs.
	Full func() bool
}

// slowStart is the time after which a service that has not worked yet is worth
// a line in the log.
const slowStart = 10 * time.Second

// Run asks each service at its interval, and every 100 ms until it works for the
// first time, until ctx ends and everything it started has ended.
func Run(ctx context.Context, checks []Check, opt Options) {
	var services []*service
	for _, c := range checks {
		services = append(services, &service{check: c, ask: c.question(opt.VIPs)})
	}
	run(ctx, services, opt)
}

type service struct {
	check   Check
	ask     func(context.Context) error // nil: healthy
	machine machine
	slow    bool // that it starts slowly was told
}

func run(ctx context.Context, services []*service, opt Options) {
	r := &runner{opt: opt, services: services, start: time.Now()}
	for _, s := range services {
		s.machine = newMachine(s.check.Rise, s.check.Fall)
		if s.ask == nil {
			s.machine.step(nil, false)
		}
	}
	r.told = r.report()
	opt.Tell(r.told)
	var asking sync.WaitGroup
	for _, s := range services {
		if s.ask == nil {
			continue
		}
		asking.Go(func() {
			probe.Repeat(ctx, s.check.Interval, s.check.Timeout, opt.Bell, s.ask, func(answer error) { r.answered(s, answer) })
		})
	}
	asking.Wait()
	<-ctx.Done()
}

// runner brings the answers of all services together.
type runner struct {
	opt   Options
	start time.Time

	mu       sync.Mutex
	services []*service
	told     Report
}

func (r *runner) answered(s *service, answer error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	before, excusedBefore := s.machine.state, s.machine.excused
	s.machine.step(answer, errors.Is(answer, probe.ErrLate) && r.opt.Full != nil && r.opt.Full())
	if excusedBefore == 0 && s.machine.excused > 0 {
		r.opt.Logger.Warn("service is late on a machine that is full, which is no failure yet", "service", s.check.Name, "checks", excuses*s.machine.fall)
	}
	r.log(s, before)
	if now := r.report(); now.Healthy != r.told.Healthy || !slices.Equal(now.Reasons, r.told.Reasons) {
		r.told = now
		r.opt.Tell(now)
	}
}

func (r *runner) log(s *service, before state) {
	log := r.opt.Logger.With("service", s.check.Name)
	switch now := s.machine.state; {
	case now == starting && !s.slow && time.Since(r.start) >= slowStart:
		s.slow = true
		log.Warn("service does not work yet", "reason", s.machine.reason)
	case now == before:
	case now == failed:
		log.Warn("service failed", "reason", s.machine.reason)
	case before == starting:
		log.Info("service healthy")
	default:
		log.Info("service healthy again")
	}
}

func (r *runner) report() Report {
	rep := Report{Healthy: true}
	for _, s := range r.services {
		if why := s.machine.why(); why != "" {
			rep.Healthy = false
			rep.Reasons = append(rep.Reasons, s.check.Name+": "+why)
		}
	}
	return rep
}
