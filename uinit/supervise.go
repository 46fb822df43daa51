package uinit

import (
	"fmt"
	"log/slog"
	"syscall"
	"time"
)

// The supervisor is a state machine: it is told what happened and when, and
// answers with what to do. It has no clock, no process and no goroutine in it,
// so that every order of events can be tried.
//
// The rules: the engine starts when the machine has its NIC, the services when
// the engine was ready for the first time (before that nobody can reach them).
// Whatever ends is started again. When the engine dies the services go on: the
// connections they hold outlive it.
//
// The watchdog is fed by the heartbeats of the engine, so an engine that is gone
// or hangs for the watchdog's time means a reset. Within it init tries what it
// can: an engine that is silent for half the time is ended and started again,
// be it ready or starting again, and a crash loop of the engine tries again
// every third of the time. Nobody is reached through a cable that is out, and no
// reset puts it in: an engine that starts without carrier may take its time.
//
// In an orderly end the engine is told first, because it is the one that makes
// the other nodes take the new connections; then the services, which finish
// what they have; and the engine ends last, when that has left the machine.

// policy is how the supervisor waits.
type policy struct {
	BackoffFirst   time.Duration // after the first fast failure; doubles with each
	BackoffMost    time.Duration
	Healthy        time.Duration // a child that ran for so long has not failed fast
	CrashLoop      int           // so many fast failures in a row are a crash loop
	AliveIsReady   time.Duration // for a child that neither notifies nor has a check
	LeaveMost      time.Duration // for the engine to say that it leaves
	LeaveLead      time.Duration // from then until the services are stopped
	ServiceGrace   time.Duration // from SIGTERM to SIGKILL
	EngineGrace    time.Duration // from the end of the services to SIGKILL
	KillGrace      time.Duration // from SIGKILL to giving up on a process
	EngineHang     time.Duration // without a heartbeat; 0: do not look
	EngineBackoff  time.Duration // BackoffMost for the engine; 0: that
	ReadyPatience  time.Duration // until a warning that the engine is not ready
	BootDogAllowed time.Duration // how long the watchdog is fed before the engine was ever ready
}

// hangWithoutWatchdog is EngineHang where the configuration has no watchdog to
// take it from.
const hangWithoutWatchdog = 15 * time.Second

// withWatchdog is the policy for a watchdog that the configuration wants to wait
// for so long (0: none), and that is armed with that time (0: is not).
func (p policy) withWatchdog(wanted, armed time.Duration) policy {
	p.EngineHang = hangWithoutWatchdog
	if armed > 0 {
		wanted = min(wanted, armed)
		p.EngineBackoff = wanted / 3
	}
	if wanted > 0 {
		p.EngineHang = wanted / 2
	}
	return p
}

// backoffMost is the longest wait before a child is started again.
func (p policy) backoffMost(c *child) time.Duration {
	if c.Engine && p.EngineBackoff > 0 {
		return min(p.BackoffMost, p.EngineBackoff)
	}
	return p.BackoffMost
}

var defaultPolicy = policy{
	BackoffFirst:   100 * time.Millisecond,
	BackoffMost:    30 * time.Second,
	Healthy:        10 * time.Second,
	CrashLoop:      5,
	AliveIsReady:   time.Second,
	LeaveMost:      time.Second,
	LeaveLead:      100 * time.Millisecond,
	ServiceGrace:   15 * time.Second,
	EngineGrace:    10 * time.Second,
	KillGrace:      2 * time.Second,
	ReadyPatience:  30 * time.Second,
	BootDogAllowed: 10 * time.Minute,
}

// childState is where a child is in its life.
type childState uint8

const (
	_              childState = iota
	stateWaiting              // for the NIC, or for the engine
	stateStarting             // runs, and is not ready yet
	stateReady                // runs
	stateBackoff              // ended; will be started again
	stateCrashLoop            // ended too often; will be started again, slowly
	stateStopping             // was told to end
	stateStopped              // ended, and stays so
)

var stateNames = [...]string{"invalid", "waiting", "starting", "ready", "backoff", "crash-loop", "stopping", "stopped"}

func (s childState) String() string {
	if int(s) < len(stateNames) {
		return stateNames[s]
	}
	return stateNames[0]
}

// MarshalText is the name, for the status.
func (s childState) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// spec is what a child is.
type spec struct {
	Name    string
	Engine  bool
	Checked bool // has a health check
}

// child is the state of one supervised process.
type child struct {
	spec
	state    childState
	since    time.Duration // in this state
	pid      int           // 0: no process
	started  time.Duration
	restarts int
	failures int // fast ones in a row
	due      time.Duration
	lastExit string
	status   string // of its last STATUS= message
	everUp   bool   // was ready once since boot

	beat   time.Duration // last heartbeat
	killed bool          // SIGKILL was sent
	hung   bool          // SIGABRT was sent

	probed  bool // there is an answer of the health check of this process
	healthy bool
	health  string // why not
	unwell  bool   // and that was told
}

func (c *child) set(s childState, now time.Duration) { c.state, c.since = s, now }

// do is one thing for the loop to do.
type do interface{ isDo() }

type (
	doStart  struct{ Child *child }
	doSignal struct { // to the process group of the child
		Child  *child
		Signal syscall.Signal
	}
	doLog struct {
		Level slog.Level
		Text  string
	}
	doStage struct{ Stage string } // a stage of the boot is reached
	doFeed  struct{}               // the watchdog
	doEnd   struct{ How ending }   // everything has stopped
)

func (doStart) isDo()  {}
func (doSignal) isDo() {}
func (doLog) isDo()    {}
func (doStage) isDo()  {}
func (doFeed) isDo()   {}
func (doEnd) isDo()    {}

// ending is what becomes of the machine.
type ending uint8

const (
	_ ending = iota
	endPowerOff
	endRestart
	endHalt
)

func (e ending) String() string {
	switch e {
	case endPowerOff:
		return "power off"
	case endRestart:
		return "restart"
	case endHalt:
		return "halt"
	}
	return "invalid"
}

type phase uint8

const (
	phaseRun   phase = iota
	phaseLeave       // the engine was told
	phaseStopServices
	phaseStopEngine
	phaseDown
)

// supervisor holds the children; the engine is the first of them.
type supervisor struct {
	policy   policy
	children []*child
	linked   bool // the NIC is there
	dark     bool // and has no carrier
	phase    phase
	how      ending
	leaveDue time.Duration // in phaseLeave: when to go on
	ready    bool          // the node was ready
	fed      time.Duration // when the watchdog was fed last
	warned   bool
	pending  []do
}

func newSupervisor(p policy, specs []spec, now time.Duration) *supervisor {
	s := &supervisor{policy: p}
	for _, sp := range specs {
		s.children = append(s.children, &child{spec: sp, state: stateWaiting, since: now})
	}
	return s
}

func (s *supervisor) engine() *child {
	for _, c := range s.children {
		if c.Engine {
			return c
		}
	}
	return nil
}

// take returns what has been decided since the last call.
func (s *supervisor) take() []do {
	d := s.pending
	s.pending = nil
	return d
}

func (s *supervisor) act(d do) { s.pending = append(s.pending, d) }

func (s *supervisor) log(level slog.Level, format string, args ...any) {
	s.act(doLog{level, fmt.Sprintf(format, args...)})
}

// link tells that the machine has its NIC.
func (s *supervisor) link(now time.Duration) {
	if !s.linked {
		s.linked = true
		s.advance(now)
	}
}

// hasCarrier tells whether the NIC has a carrier.
func (s *supervisor) hasCarrier(on bool, now time.Duration) {
	if e := s.engine(); on && s.patient(e) {
		e.beat = now // its time to start begins
	}
	s.dark = !on
}

// patient is whether the engine may take its time, since it starts again and
// there is no carrier.
func (s *supervisor) patient(e *child) bool {
	return s.dark && e != nil && e.everUp && e.pid != 0 && e.state == stateStarting
}

// watched is whether the engine owes heartbeats.
func (s *supervisor) watched(e *child) bool {
	return s.policy.EngineHang != 0 && e.pid != 0 && !e.killed && e.everUp && !s.patient(e) &&
		(e.state == stateReady || e.state == stateStarting)
}

// advance starts what may start.
func (s *supervisor) advance(now time.Duration) {
	if s.phase != phaseRun || !s.linked {
		return
	}
	engine := s.engine()
	for _, c := range s.children {
		if c.state == stateWaiting && (c.Engine || engine == nil || engine.everUp) {
			s.start(c, now)
		}
	}
}

func (s *supervisor) start(c *child, now time.Duration) {
	c.set(stateStarting, now)
	c.started, c.beat = now, now
	c.killed, c.hung, c.probed, c.healthy, c.unwell = false, false, false, false, false
	c.health, c.status = "", ""
	s.act(doStart{c})
}

// startedAs tells what became of a doStart.
func (s *supervisor) startedAs(c *child, pid int, err error, now time.Duration) {
	if err != nil {
		s.ended(c, "did not start: "+err.Error(), now)
		return
	}
	c.pid = pid
	c.due = 0
	if !c.Engine && !c.Checked {
		c.due = now + s.policy.AliveIsReady
	}
	if s.phase != phaseRun { // stopped between the decision and the deed
		s.terminate(c, now)
	}
}

// exited tells that a process of ours has ended. It is false for the process of
// somebody else: an orphan that init inherited.
func (s *supervisor) exited(pid int, how string, now time.Duration) bool {
	for _, c := range s.children {
		if c.pid == pid && pid != 0 {
			c.pid = 0
			s.ended(c, how, now)
			return true
		}
	}
	return false
}

func (s *supervisor) ended(c *child, how string, now time.Duration) {
	if c.hung {
		how += " (it gave no heartbeat)"
	}
	c.lastExit = how
	c.healthy, c.probed = false, false
	if s.phase != phaseRun || c.state == stateStopping {
		c.set(stateStopped, now)
		s.log(slog.LevelInfo, "%s has stopped: %s", c.Name, how)
		s.stopNext(now)
		return
	}
	ran := now - c.started
	if ran >= s.policy.Healthy {
		c.failures = 0
	}
	c.failures++
	c.restarts++
	most := s.policy.backoffMost(c)
	delay := backoff(s.policy.BackoffFirst, most, c.failures)
	c.set(stateBackoff, now)
	if c.failures >= s.policy.CrashLoop {
		c.set(stateCrashLoop, now)
		delay = most
	}
	c.due = now + delay
	if c.failures == s.policy.CrashLoop {
		s.log(slog.LevelError, "%s is in a crash loop: it ended %d times within %v of its start; trying again every %v", c.Name, c.failures, s.policy.Healthy, most)
		if c.Engine && c.everUp && s.policy.EngineBackoff > 0 {
			s.log(slog.LevelError, "the watchdog resets this machine unless %s is ready soon", c.Name)
		}
	}
	s.log(slog.LevelWarn, "%s ended after %ss: %s; starting again in %v", c.Name, seconds(ran), how, delay)
}

func backoff(first, most time.Duration, failures int) time.Duration {
	d := first
	for range failures - 1 {
		if d *= 2; d >= most {
			break
		}
	}
	return min(d, most)
}

// message is one datagram of sd_notify(3).
type message struct {
	Ready, Stopping, Watchdog bool
	Status                    string
	HasStatus                 bool
}

// notified takes a message of a process; false if it is none of ours.
func (s *supervisor) notified(pid int, m message, now time.Duration) bool {
	var c *child
	for _, x := range s.children {
		if x.pid == pid && pid != 0 {
			c = x
		}
	}
	if c == nil {
		return false
	}
	if m.HasStatus {
		c.status = m.Status
	} else if m.Stopping {
		c.status = "stopping"
	}
	if m.Stopping && c.Engine && s.phase == phaseLeave {
		s.leaveDue = min(s.leaveDue, now+s.policy.LeaveLead)
	}
	if m.Ready || m.Watchdog {
		c.beat = now
		if c.Engine && c.state != stateStopping {
			s.feed(now)
		}
	}
	if m.Ready {
		s.up(c, now)
	}
	return true
}

// feedPeriod is how often the watchdog is fed: well below the shortest time
// that may be configured.
const feedPeriod = time.Second

func (s *supervisor) feed(now time.Duration) {
	if now >= s.fed+feedPeriod {
		s.fed = now
		s.act(doFeed{})
	}
}

// up makes a starting child a ready one.
func (s *supervisor) up(c *child, now time.Duration) {
	if c.state != stateStarting {
		return
	}
	c.set(stateReady, now)
	if c.Engine {
		c.due = 0
	}
	first := !c.everUp
	c.everUp = true
	switch {
	case !first:
		s.log(slog.LevelInfo, "%s is ready again after %ss", c.Name, seconds(now-c.started))
	case c.Engine:
		s.act(doStage{"engine"})
	default:
		s.act(doStage{"service:" + c.Name})
	}
	s.advance(now)
	if s.ready {
		return
	}
	for _, c := range s.children {
		if !c.everUp {
			return
		}
	}
	s.ready = true
	s.act(doStage{"ready"})
}

// checked takes an answer of a health check of the process with this pid.
func (s *supervisor) checked(name string, pid int, err error, now time.Duration) {
	for _, c := range s.children {
		if c.Name != name || c.pid != pid || pid == 0 {
			continue
		}
		c.probed, c.healthy, c.health = true, err == nil, ""
		if err != nil {
			c.health = err.Error()
		}
		switch {
		case err == nil && c.state == stateStarting:
			s.up(c, now)
		case err == nil && c.unwell:
			c.unwell = false
			s.log(slog.LevelInfo, "%s is healthy again", c.Name)
		case err != nil && !c.unwell && c.state == stateReady:
			c.unwell = true
			s.log(slog.LevelWarn, "%s is not healthy: %v", c.Name, err)
		}
	}
}

// stop begins the end; a second call cuts the waiting short.
func (s *supervisor) stop(how ending, now time.Duration) {
	if s.phase != phaseRun {
		s.log(slog.LevelWarn, "asked again to %v: not waiting any longer", how)
		if s.phase == phaseLeave {
			s.leaveDue = now
		}
		for _, c := range s.children {
			if c.pid != 0 {
				s.kill(c, now)
			}
		}
		return
	}
	s.how = how
	if e := s.engine(); e != nil && e.pid != 0 {
		s.log(slog.LevelInfo, "going to %v: the engine leaves the cluster", how)
		s.phase, s.leaveDue = phaseLeave, now+s.policy.LeaveMost
		s.terminate(e, now)
		return
	}
	s.stopServices(now)
}

func (s *supervisor) stopServices(now time.Duration) {
	s.phase = phaseStopServices
	s.log(slog.LevelInfo, "stopping the services")
	for _, c := range s.children {
		if !c.Engine || c.pid == 0 { // an engine that does not run is not started for the end
			s.terminate(c, now)
		}
	}
	s.stopNext(now)
}

// terminate asks a child to end; one that has no process has ended.
func (s *supervisor) terminate(c *child, now time.Duration) {
	if c.pid == 0 {
		// A start that is decided and not done yet ends by startedAs.
		if c.state != stateStarting {
			c.due = 0
			c.set(stateStopped, now)
		}
		return
	}
	c.set(stateStopping, now)
	c.due = now + s.policy.ServiceGrace
	if c.Engine { // it waits for the flows that the services finish
		c.due = now + s.policy.LeaveMost + s.policy.ServiceGrace + s.policy.KillGrace + s.policy.EngineGrace
	}
	s.act(doSignal{c, syscall.SIGTERM})
}

func (s *supervisor) kill(c *child, now time.Duration) {
	c.killed = true
	c.set(stateStopping, now)
	c.due = now + s.policy.KillGrace
	s.act(doSignal{c, syscall.SIGKILL})
}

// stopNext goes to the next phase of the end when the present one is over.
func (s *supervisor) stopNext(now time.Duration) {
	e := s.engine()
	if s.phase == phaseLeave && e.state == stateStopped {
		s.stopServices(now)
		return
	}
	if s.phase == phaseStopServices {
		for _, c := range s.children {
			if !c.Engine && c.state != stateStopped {
				return
			}
		}
		s.phase = phaseStopEngine
		if e != nil && e.state == stateStopping && !e.killed {
			s.log(slog.LevelInfo, "the services have stopped: waiting for the engine")
			e.due = now + s.policy.EngineGrace
		}
	}
	if s.phase == phaseStopEngine && (e == nil || e.state == stateStopped) {
		s.phase = phaseDown
		s.act(doEnd{s.how})
	}
}

// tick does what is due by the clock.
func (s *supervisor) tick(now time.Duration) {
	for _, c := range s.children {
		if c.due != 0 && now >= c.due {
			c.due = 0
			s.childDue(c, now)
		}
	}
	if s.phase == phaseLeave && now >= s.leaveDue {
		s.stopServices(now)
	}
	if e := s.engine(); e != nil {
		s.watch(e, now)
	}
	if s.fedByClock(now) {
		s.feed(now)
	}
}

func (s *supervisor) childDue(c *child, now time.Duration) {
	switch c.state {
	case stateBackoff, stateCrashLoop:
		s.start(c, now)
	case stateStarting: // only set for a child that has no other way to say so
		s.up(c, now)
	case stateStopping:
		if !c.killed {
			s.log(slog.LevelWarn, "%s did not stop in time: killing it", c.Name)
			s.kill(c, now)
			return
		}
		s.log(slog.LevelError, "%s cannot be killed: going on without it", c.Name)
		c.pid = 0
		s.ended(c, "given up", now)
	}
}

// watch ends an engine that runs and gives no sign of life, so that it is
// started anew before the watchdog resets the machine.
func (s *supervisor) watch(e *child, now time.Duration) {
	if e.state == stateStarting && !e.everUp && !s.warned && now-e.started >= s.policy.ReadyPatience {
		s.warned = true
		s.log(slog.LevelWarn, "%s is not ready after %v; the services wait for it", e.Name, s.policy.ReadyPatience)
	}
	if !s.watched(e) {
		return
	}
	hang := s.policy.EngineHang
	switch quiet := now - e.beat; {
	case quiet >= hang+s.abortGrace():
		e.killed = true
		s.act(doSignal{e, syscall.SIGKILL})
	case quiet >= hang && !e.hung:
		e.hung = true
		s.log(slog.LevelError, "%s gave no heartbeat for %v: ending it", e.Name, hang)
		s.act(doSignal{e, syscall.SIGABRT}) // a Go program tells what its goroutines do
	}
}

// abortGrace is from SIGABRT to SIGKILL: short, so that a new engine runs before
// the watchdog, which waits for twice the time of a hang, resets the machine.
func (s *supervisor) abortGrace() time.Duration {
	return min(s.policy.KillGrace, s.policy.EngineHang/4)
}

// fedByClock is whether the watchdog is fed without heartbeats: before the data
// plane has ever run, for a while, when it starts again without carrier, and
// during an orderly end.
func (s *supervisor) fedByClock(now time.Duration) bool {
	if s.phase != phaseRun {
		return true
	}
	e := s.engine()
	return e == nil || !e.everUp && now < s.policy.BootDogAllowed || s.patient(e)
}

// due is when tick has something to do next.
func (s *supervisor) due(now time.Duration) time.Duration {
	next := now + time.Hour
	at := func(t time.Duration) {
		if t != 0 {
			next = min(next, t)
		}
	}
	for _, c := range s.children {
		at(c.due)
	}
	if s.phase == phaseLeave {
		at(s.leaveDue)
	}
	if s.fedByClock(now) {
		at(s.fed + feedPeriod)
	}
	if e := s.engine(); e != nil {
		if e.state == stateStarting && !e.everUp && !s.warned {
			at(e.started + s.policy.ReadyPatience)
		}
		if s.watched(e) {
			limit := e.beat + s.policy.EngineHang
			if e.hung {
				limit += s.abortGrace()
			}
			at(limit)
		}
	}
	return next
}
