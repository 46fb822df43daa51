// Package engine is a node's data plane put together: the NIC, the filter, the
// raw datapath, the membership protocol, the services' health and the machine's
// load, from one configuration. It runs as
// cloned on any Linux host and as a child of the appliance's init.
//
// An engine that ends by itself or crashes leaves clone0 and the kernel's
// sockets in place, for the one that is started after it to take up; one that
// is asked to stop gives its buckets away, removes everything it set up, and
// ends. One that is asked to end for a restart (SIGHUP) gives its buckets away
// and leaves the rest in place, so that no connection is lost.
package engine

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"clonecluster/config"
	"clonecluster/netcore/api"
	"clonecluster/netcore/doctor"
	"clonecluster/netcore/filter"
	"clonecluster/netcore/finding"
	"clonecluster/netcore/health"
	"clonecluster/netcore/load"
	"clonecluster/netcore/membership"
	"clonecluster/netcore/nic"
	"clonecluster/netcore/sockdiag"
)

// Options are what an engine runs with.
type Options struct {
	Config *config.Config
	// Interface, if set, is the NIC's name in full, whatever Config says.
	Interface string
	Logger    *slog.Logger
	// Notify is told the engine's state in the words of sd_notify(3): READY=1,
	// STATUS=…, STOPPING=1 when a stop has given all buckets away, and WATCHDOG=1 while both directions of the
	// datapath and the membership protocol prove alive. May be nil.
	Notify func(state string)
	// StatusSocket is the path of the unix socket that serves GET /v1/status.
	// Empty: none.
	StatusSocket string
	// Drain bounds how long a stop waits for the flows of this node to end.
	// Negative: as the configuration says.
	Drain time.Duration
	// Check, if set, is asked before anything on the machine is changed, but for the
	// NIC, which is up. Its error ends Run.
	Check func(context.Context, nic.NIC) error
	// Heartbeat is the time between two WATCHDOG=1. Zero: 1 s.
	Heartbeat time.Duration
	// Datapath is native, bpf, raw or auto. Empty: as the configuration says.
	Datapath string
	// Ingress is xdp, tc or auto. Empty: as the configuration says.
	Ingress string
	// BPFFS is the BPF file system for what outlives the engine. Empty: DefaultBPFFS.
	BPFFS string
	// InitSocket is where the appliance's init tells how the machine booted and
	// keeps all logs. Empty, or nobody there: an ordinary host.
	InitSocket string
	// FloodedAfter is how long frames to the clone MAC must have reached all nodes before
	// directed mode ends. Zero: 2 min.
	FloodedAfter time.Duration
	// AgainAfter is after what time directed mode is tried again where it has failed. Zero:
	// 30 s.
	AgainAfter time.Duration
	// Log is what the engine has logged, for the API. May be nil.
	Log *api.Record[api.LogLine]
	// Intercept, if set, may change each table before it is installed: for tests
	// of what must hold even if the protocol is wrong. It is also called every 10 ms
	// with the last table.
	Intercept func(*filter.Table)
}

// Engine is one running engine.
type engine struct {
	opt    Options
	log    *slog.Logger
	filter table
	path   datapath
	// datapath is its name, ingress where the frames are judged now.
	datapath     string
	ingress      func() string
	pathCounters func() map[string]uint64
	node         *membership.Node
	link         *membership.Link
	socket       net.Listener // of the status; nil: none
	nic          nic.NIC
	vips         []netip.Addr
	start        time.Time

	doctor  *doctor.Doctor
	sockets *doctor.Sockets

	unwell atomic.Pointer[[]string] // why services fail their checks
	full   atomic.Bool              // the machine's processors are
	aside  atomic.Bool              // the cluster is in directed mode, and this node is not
	// verdicts are those of the last status.
	verdicts atomic.Pointer[filter.Counters]
	viewNews chan struct{} // there is another view
	// unanswered: clients of this node send their SYNs again.
	unanswered atomic.Bool

	telling // for the API
	fc      filter.Config
	rules   uint64 // its fingerprint

	mu     sync.Mutex   // of what follows
	table  filter.Table // in force
	tables uint64       // how many there were
}

// Run runs an engine until ctx ends, which is a graceful stop (nil), or, if the
// cause is [ErrRestart], an end that another engine goes on from; or until it
// cannot go on.
func Run(ctx context.Context, opt Options) error {
	if opt.Notify == nil {
		opt.Notify = func(string) {}
	}
	if opt.Drain < 0 {
		opt.Drain = opt.Config.Cluster.Drain
	}
	if opt.BPFFS == "" {
		opt.BPFFS = DefaultBPFFS
	}
	if opt.Heartbeat == 0 {
		opt.Heartbeat = time.Second
	}
	if opt.FloodedAfter == 0 {
		opt.FloodedAfter = floodedAfter
	}
	if opt.AgainAfter == 0 {
		opt.AgainAfter = againAfter
	}
	e := &engine{opt: opt, log: opt.Logger, start: time.Now(), viewNews: make(chan struct{}, 1)}
	e.telling.init()
	e.findings = finding.NewBoard(e.foundEvent)
	e.openMetrics()
	// The parts outlive ctx by the time it takes to leave.
	parts, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer stop()
	g, parts := errgroup.WithContext(parts)
	if err := e.open(ctx, parts); err != nil {
		return err
	}
	err := e.run(ctx, g, parts, stop)
	if err != nil {
		e.log.Error("the data plane stopped; established connections wait for the next engine", "error", err)
		e.path.Abandon()
	} else {
		err = e.close(ctx)
	}
	return errors.Join(err, e.closeSockets())
}

func (e *engine) closeSockets() (err error) {
	if e.link != nil {
		err = e.link.Close()
	}
	if e.sockets != nil {
		e.sockets.Close()
	}
	if e.socket != nil {
		_ = e.socket.Close() // serving it has closed it already
	}
	return err
}

// open finds the NIC and sets everything up; on an error nothing is left but
// what a crashed engine had left.
func (e *engine) open(ctx, parts context.Context) (err error) {
	defer func() {
		if err != nil {
			err = errors.Join(err, e.closeSockets())
		}
	}()
	cfg := e.opt.Config
	want := cfg.Interface
	if e.opt.Interface != "" {
		want = config.Interface{Name: e.opt.Interface, WaitCarrier: want.WaitCarrier}
	}
	if e.nic, err = e.selectNIC(ctx, want); err != nil {
		return fmt.Errorf("choosing the cluster's network interface: %w", err)
	}
	if e.opt.Check != nil {
		if err := e.opt.Check(ctx, e.nic); err != nil {
			return err
		}
	}
	fc := filterConfig(cfg)
	e.fc, e.rules = fc, fc.Fingerprint()
	for _, p := range []netip.Prefix{cfg.VIP.IPv4, cfg.VIP.IPv6} {
		if p.IsValid() {
			e.vips = append(e.vips, p.Addr())
		}
	}
	if e.opt.StatusSocket != "" {
		if e.socket, err = listenStatus(ctx, e.opt.StatusSocket); err != nil {
			return err
		}
	}
	if e.link, err = membership.OpenLink(e.nic.Index, e.nic.Name); err != nil {
		return err
	}
	err = e.openDatapath(fc,
		func(mac net.HardwareAddr) { e.node.SetID(parts, membership.NodeID(mac)) },
		func(up bool) {
			e.node.SetCarrier(parts, up)
			e.carrierEvent(up)
		})
	if err != nil {
		return fmt.Errorf("setting up the datapath on %s: %w", e.nic.Name, err)
	}
	e.node, err = membership.NewNode(membership.NodeConfig{
		Machine: membership.Config{
			Params: membership.Params{Interval: cfg.Cluster.Detect.Beacon(), Dead: cfg.Cluster.Detect.Dead(), Lease: cfg.Cluster.Detect.Lease()},
			Policy: policy(cfg), Weight: cfg.Weight(e.nic.PermanentMAC), Rules: e.rules,
		},
		ID: membership.NodeID(e.nic.MAC), Link: e.link, Logger: e.log, Now: monotonic, Codec: newCodec(cfg),
		Apply: e.apply, Announce: e.announce, Flows: e.flows, Changed: e.viewChanged, Noted: e.noted, Urgent: true,
	})
	if err == nil {
		err = e.openDoctor()
	}
	if err != nil {
		return errors.Join(err, e.path.Undo())
	}
	return nil
}

// selectNIC waits for a carrier, perhaps for minutes. It beats meanwhile, as a
// cable that is out is no reason for a supervisor to reset the machine.
func (e *engine) selectNIC(ctx context.Context, want config.Interface) (nic.NIC, error) {
	waiting, found := context.WithCancel(ctx)
	var beats sync.WaitGroup
	defer beats.Wait()
	defer found()
	beats.Go(func() {
		tick := time.NewTicker(e.opt.Heartbeat)
		defer tick.Stop()
		for {
			e.opt.Notify("WATCHDOG=1")
			select {
			case <-waiting.Done():
				return
			case <-tick.C:
			}
		}
	})
	return nic.Select(ctx, want)
}

func newCodec(cfg *config.Config) *membership.Codec {
	var accept [][]byte
	for _, k := range cfg.Cluster.AcceptKeys {
		accept = append(accept, k.Derive("membership", 32))
	}
	return membership.NewCodec(cfg.Cluster.Name, cfg.Cluster.Key.Derive("membership", 32), accept...)
}

func policy(cfg *config.Config) membership.Policy {
	p := membership.Policy{Moves: cfg.Policy.Moves, StopWhenSick: cfg.Policy.WhenAllFail == config.StopWhenAllFail}
	if cfg.Policy.Balance == config.BalanceLoad {
		p.Balance = membership.Load
	}
	return p
}

// filterConfig gives the filter's part of a configuration.
func filterConfig(cfg *config.Config) filter.Config {
	affinities := map[config.Affinity]filter.Affinity{
		config.AffinityNone: filter.AffinityNone, config.AffinityClient: filter.AffinityClient,
		config.AffinityNetwork: filter.AffinityNetwork, config.AffinitySingle: filter.AffinitySingle,
	}
	fc := filter.Config{
		CloneMAC: [6]byte(cfg.VIP.CloneMAC), VIP4: cfg.VIP.IPv4.Addr(), VIP6: cfg.VIP.IPv6.Addr(),
		HashKey:    [16]byte(cfg.Cluster.FlowKey.Derive("flow hash", 16)),
		Default:    affinities[cfg.Policy.Affinity],
		LocalPorts: localPorts(),
		// A beacon of whoever holds the flow after all comes first.
		ResetPatience: cfg.Cluster.Detect.Beacon() * 3 / 2,
	}
	rule := func(ports []config.PortRange, a config.Affinity) {
		for _, p := range ports {
			proto := uint8(filter.ProtoTCP)
			if p.Protocol == "udp" {
				proto = filter.ProtoUDP
			}
			fc.Rules = append(fc.Rules, filter.Rule{
				Proto: proto, PortLo: p.First, PortHi: p.Last,
				Affinity: affinities[a], Disabled: a == config.AffinityDisabled,
			})
		}
	}
	for _, s := range cfg.Services {
		rule(s.Ports, s.Affinity)
	}
	for _, r := range cfg.Rules {
		rule(r.Ports, r.Affinity)
	}
	return fc
}

// localPorts reads the range of the ports that the kernel gives to flows the
// machine opens; zero, which is the kernel's default, if there is none.
func localPorts() (r [2]uint16) {
	b, err := os.ReadFile("/proc/sys/net/ipv4/ip_local_port_range")
	if err != nil {
		return r
	}
	if _, err := fmt.Sscan(string(b), &r[0], &r[1]); err != nil {
		return [2]uint16{}
	}
	return r
}

// monotonic is CLOCK_MONOTONIC in nanoseconds. Go's own reading of that clock
// needs no system call, so one offset is taken at the start.
func monotonic() int64 { return clockOffset + int64(time.Since(clockBase)) }

var clockBase, clockOffset = func() (time.Time, int64) {
	var ts unix.Timespec
	base := time.Now()
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts); err != nil {
		return base, 0
	}
	return base, ts.Nano()
}()

func (e *engine) apply(a membership.Actions) {
	e.filter.SetLease(a.Lease)
	if a.Table != nil {
		e.setTable(a.Table)
	}
	for _, b := range a.EndQuarantine {
		e.filter.EndQuarantine(b)
	}
}

// setTable puts what is lost into effect at once, and what is gained when the
// frames that have come in until now have been judged.
func (e *engine) setTable(t *filter.Table) {
	e.mu.Lock()
	gains, now := false, *t
	for b := range now {
		if now[b].Owned() && !e.table[b].Owned() {
			now[b], gains = e.table[b], true
		}
	}
	e.table = now
	e.tables++
	this, wanted := e.tables, *t
	e.install()
	e.mu.Unlock()
	if gains {
		e.path.AfterQueued(func() {
			e.mu.Lock()
			defer e.mu.Unlock()
			if e.tables != this { // a later one has frames of its own to wait for
				return
			}
			e.table = wanted
			e.install()
		})
	}
}

// install puts e.table into effect; e.mu is held.
func (e *engine) install() {
	t := e.table
	if e.opt.Intercept != nil {
		e.opt.Intercept(&t)
	}
	e.filter.SetTable(&t, monotonic())
}

// intercept gives Options.Intercept its say even if the protocol has none.
func (e *engine) intercept(ctx context.Context) {
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			e.mu.Lock()
			e.install()
			e.mu.Unlock()
		}
	}
}

func (e *engine) announce() {
	if e.aside.Load() {
		return
	}
	if err := e.path.Announce(); err != nil {
		e.log.Warn("announcing the VIP", "error", err)
	}
}

// flows finds the buckets of the flows that the kernel has, those that it
// opened itself included, and has the filter hold the latter.
func (e *engine) flows() (bits membership.Bits, active int, err error) {
	now := monotonic()
	err = sockdiag.EachFlow(e.vips, func(f sockdiag.Flow) {
		bits.Set(e.filter.Bucket(f.Tuple))
		if !f.TimeWait && !f.HalfOpen {
			e.filter.Hold(f.Tuple, now)
		}
		// Who waits for the connections to end may do so by the API.
		if !f.TimeWait && int(f.Tuple.VIP.Port()) != e.opt.Config.Management.Port {
			active++
		}
	})
	return bits, active, err
}

func (e *engine) viewChanged(v membership.View) {
	select {
	case e.viewNews <- struct{}{}:
	default:
	}
	e.viewEvents(v)
	slot, owners := slot(v)
	e.log.Info("view", "map", v.Map.Version, "state", v.State, "slot", slot, "of", len(owners), "agreed", v.Agreed, "nodes", strings.Join(owners, " "))
	e.opt.Notify(fmt.Sprintf("STATUS=%v, node %d of %d", v.State, slot, len(owners)))
}

// slot gives the nodes that the present map gives buckets to, by wire MAC, and
// this node's place among them, from 1; 0 if it is none of them.
func slot(v membership.View) (slot int, owners []string) {
	owners = []string{}
	for _, m := range v.Members {
		if m.Buckets == 0 {
			continue
		}
		owners = append(owners, m.ID.String())
		if m.Self {
			slot = len(owners)
		}
	}
	return slot, owners
}

// watchHealth tells the protocol whether the services pass their checks.
func (e *engine) watchHealth(ctx context.Context) {
	// Late for its clients, too, it is better served elsewhere, if there is a better place.
	full := func() bool { return e.full.Load() && !(e.unanswered.Load() && e.room()) }
	health.Run(ctx, checks(e.opt.Config), health.Options{VIPs: e.vips, Logger: e.log, Full: full, Room: e.room, Bell: &e.askHealth, Tell: func(r health.Report) {
		e.healthEvent(r)
		e.unwell.Store(&r.Reasons)
		e.node.SetHealth(ctx, r.Healthy)
	}})
}

// room reports whether some other node could take more.
func (e *engine) room() bool {
	return slices.ContainsFunc(e.node.View().Members, func(m membership.Member) bool {
		return !m.Self && m.Live && !m.Sick && m.State == membership.Serving && m.Busy < roomBusy
	})
}

func checks(cfg *config.Config) (all []health.Check) {
	for _, s := range cfg.Services {
		c := health.Check{
			Name: s.Name, Exec: s.Health.Exec, HTTP: s.Health.HTTP, TCP: s.Health.TCP,
			Interval: s.Health.Interval, Timeout: s.Health.Timeout, Rise: s.Health.Rise, Fall: s.Health.Fall,
		}
		for k, v := range s.Env {
			c.Env = append(c.Env, k+"="+v)
		}
		for _, p := range s.Ports {
			if p.Protocol == "tcp" {
				c.Listen = append(c.Listen, health.PortRange{Lo: p.First, Hi: p.Last})
			}
		}
		all = append(all, c)
	}
	return all
}

// loadInterval is the time between two looks at how busy the machine is. What
// they give is damped by load.Tau.
const loadInterval = 500 * time.Millisecond

// fullBusy is from where on, in thousandths, a machine's processors have no time left. That
// has to show within the time of the few checks after which a service counts as failed.
const fullBusy = 900

// roomBusy is up to where a node has room.
const roomBusy = 700

// watchLoad tells the protocol how busy the machine is.
func (e *engine) watchLoad(ctx context.Context) {
	reader, err := load.Open(load.ProcStat, load.ProcSockets, load.ProcSockets6)
	if err != nil {
		e.log.Warn("how busy the machine is cannot be told", "error", err)
		return
	}
	defer reader.Close()
	meter, quick := load.NewMeter(load.Tau), load.NewMeter(loadInterval)
	tick := time.NewTimer(toBeat(loadInterval))
	defer tick.Stop()
	said := false
	for {
		stat, sockets, err := reader.Read()
		if err == nil {
			now := time.Duration(monotonic())
			s := meter.Add(stat, sockets, now)
			e.full.Store(quick.Add(stat, sockets, now).Busy >= fullBusy)
			e.node.SetLoad(membership.LoadSeen{Busy: s.Busy, Flows: s.Flows})
		} else if !said {
			said = true
			e.log.Warn("how busy the machine is cannot be told", "error", err)
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			tick.Reset(toBeat(loadInterval))
		}
	}
}

// run moves frames until ctx ends, then leaves gracefully.
func (e *engine) run(ctx context.Context, g *errgroup.Group, parts context.Context, stop func()) error {
	// Before the datapath, which may already see that the carrier is back.
	if !e.nic.Carrier {
		e.node.SetCarrier(parts, false)
	}
	e.happened(func() api.Event {
		return api.Event{Kind: "started", Text: fmt.Sprintf("the engine starts on %s, datapath %s", e.nic.Name, e.datapath)}
	})
	e.drainAgain(parts)
	g.Go(func() error { return e.path.Run(parts) })
	g.Go(func() error { return e.node.Run(parts) })
	g.Go(func() error { e.heartbeat(parts); return nil })
	g.Go(func() error { e.watchHealth(parts); return nil })
	g.Go(func() error { e.watchLoad(parts); return nil })
	if e.opt.Intercept != nil {
		g.Go(func() error { e.intercept(parts); return nil })
	}
	if e.socket != nil {
		g.Go(func() error { return e.serveStatus(parts) })
	}
	g.Go(func() error { e.record(parts); return nil })
	g.Go(func() error { e.doctor.Run(parts); return nil })
	g.Go(func() error { e.hearForDoctor(parts); return nil })
	g.Go(func() error { e.watchDirected(parts); return nil })
	if to := e.opt.Config.Management.Syslog; to != "" {
		g.Go(func() error { return e.sendLogs(parts, to) })
	}
	g.Go(func() error { e.watchFindings(parts); return nil })
	if e.opt.Config.Management.Port != 0 {
		g.Go(func() error { e.serveAPI(parts); return nil })
		g.Go(func() error { e.sendCards(parts); return nil })
	}
	e.log.Info("engine running", "nic", e.nic.Name, "driver", e.nic.Driver, "wire-mac", e.path.WireMAC().String(),
		"datapath", e.datapath, "clone-mac", e.opt.Config.VIP.CloneMAC.String(), "vip", e.vips, "carrier", e.nic.Carrier)
	e.opt.Notify("READY=1")
	g.Go(func() error {
		select {
		case <-ctx.Done():
		case <-parts.Done():
			return nil
		}
		e.leave(ctx, parts)
		stop()
		return nil
	})
	return g.Wait()
}

// heartbeat says WATCHDOG=1 as long as every loop has run within the last
// beats: each is woken for that, so an idle engine beats as well.
func (e *engine) heartbeat(ctx context.Context) {
	tick := time.NewTimer(toBeat(e.opt.Heartbeat))
	defer tick.Stop()
	started := monotonic()
	for {
		e.path.Poke()
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			tick.Reset(toBeat(e.opt.Heartbeat))
		}
		if path, node := e.path.Alive(), e.node.Alive(); standsStill(monotonic(), started, e.opt.Heartbeat, path, node) {
			e.log.Error("the data plane stands still", "receive-transmit", path, "membership", node, "now", monotonic())
		} else {
			e.opt.Notify("WATCHDOG=1")
		}
	}
}

// standsStill tells whether one of the loops, by when each last ran (0: not yet), has missed
// three beats. A loop that has not run yet has the same time from the start.
func standsStill(now, started int64, beat time.Duration, ran ...int64) bool {
	return now-max(slices.Min(ran), started) >= 3*int64(beat)
}
