// Package engine is a node's data plane put together: the NIC, the filter, the
// raw datapath and the presence protocol, from one configuration. It runs as
// cloned on any Linux host and as a child of the appliance's init.
//
// An engine that ends by itself or crashes leaves clone0 and the kernel's
// sockets in place, for the one that is started after it to take up; one that
// is asked to stop gives its buckets away, removes everything it set up, and
// ends.
package engine

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"clonecluster/config"
	"clonecluster/netcore/filter"
	"clonecluster/netcore/nic"
	"clonecluster/netcore/presence"
	"clonecluster/netcore/raw"
)

// Options are what an engine runs with.
type Options struct {
	Config *config.Config
	// Interface, if set, is the NIC's name in full, whatever Config says.
	Interface string
	Logger    *slog.Logger
	// Notify is told the engine's state in the words of sd_notify(3): READY=1,
	// STATUS=…, STOPPING=1, and WATCHDOG=1 while both directions of the
	// datapath and the presence protocol prove alive. May be nil.
	Notify func(state string)
	// StatusSocket is the path of the unix socket that serves GET /v1/status.
	// Empty: none.
	StatusSocket string
	// Presence are the protocol's times. Zero: presence.DefaultParams.
	Presence presence.Params
	// Drain bounds how long a stop waits for the flows of this node to end.
	Drain time.Duration
	// Heartbeat is the time between two WATCHDOG=1. Zero: 1 s.
	Heartbeat time.Duration
}

// Engine is one running engine.
type engine struct {
	opt    Options
	log    *slog.Logger
	filter *filter.Filter
	path   *raw.Datapath
	node   *presence.Node
	link   *presence.Link
	socket net.Listener // of the status; nil: none
	nic    nic.NIC
	vips   []netip.Addr
	start  time.Time
}

// Run runs an engine until ctx ends, which is a graceful stop (nil), or until
// it cannot go on.
func Run(ctx context.Context, opt Options) error {
	if opt.Notify == nil {
		opt.Notify = func(string) {}
	}
	if opt.Presence == (presence.Params{}) {
		opt.Presence = presence.DefaultParams()
	}
	if opt.Heartbeat == 0 {
		opt.Heartbeat = time.Second
	}
	e := &engine{opt: opt, log: opt.Logger, start: time.Now()}
	if err := e.open(ctx); err != nil {
		return err
	}
	err := e.run(ctx)
	if err != nil {
		e.log.Error("the data plane stopped; established connections wait for the next engine", "error", err)
		e.path.Abandon()
	} else {
		err = e.path.Close()
	}
	return errors.Join(err, e.closeSockets())
}

func (e *engine) closeSockets() (err error) {
	if e.link != nil {
		err = e.link.Close()
	}
	if e.socket != nil {
		_ = e.socket.Close() // serving it has closed it already
	}
	return err
}

// open finds the NIC and sets everything up; on an error nothing is left but
// what a crashed engine had left.
func (e *engine) open(ctx context.Context) (err error) {
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
	if e.filter, err = newFilter(cfg); err != nil {
		return fmt.Errorf("building the filter: %w", err)
	}
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
	if e.link, err = presence.OpenLink(e.nic.Index, e.nic.Name); err != nil {
		return err
	}
	e.path, err = raw.Open(ctx, raw.Config{
		NIC: e.nic, CloneMAC: [6]byte(cfg.VIP.CloneMAC),
		VIP4: cfg.VIP.IPv4, VIP6: cfg.VIP.IPv6, Gateway4: cfg.VIP.IPv4Gateway, Gateway6: cfg.VIP.IPv6Gateway,
		Filter: e.filter, Logger: e.log, Now: monotonic,
		WireMACChanged: func(mac net.HardwareAddr) { e.node.SetID(ctx, presence.NodeID(mac)) },
		CarrierChanged: func(up bool) { e.node.SetCarrier(ctx, up) },
	})
	if err != nil {
		return fmt.Errorf("setting up the datapath on %s: %w", e.nic.Name, err)
	}
	e.node, err = presence.NewNode(presence.Config{
		ID: presence.NodeID(e.nic.MAC), Params: e.opt.Presence, Link: e.link, Logger: e.log, Now: monotonic,
		Codec: presence.NewCodec(cfg.Cluster.Name, cfg.Cluster.Key.Derive("presence", 32)),
		Apply: e.apply, Announce: e.announce, Flows: e.flows, Changed: e.viewChanged,
	})
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

// newFilter gives the filter of a configuration.
func newFilter(cfg *config.Config) (*filter.Filter, error) {
	fc := filter.Config{
		CloneMAC: [6]byte(cfg.VIP.CloneMAC), VIP4: cfg.VIP.IPv4.Addr(), VIP6: cfg.VIP.IPv6.Addr(),
		HashKey:    [16]byte(cfg.Cluster.Key.Derive("flow hash", 16)),
		LocalPorts: localPorts(),
	}
	affinities := map[config.Affinity]filter.Affinity{
		config.AffinityNone: filter.AffinityNone, config.AffinityClient: filter.AffinityClient,
		config.AffinityNetwork: filter.AffinityNetwork, config.AffinitySingle: filter.AffinitySingle,
	}
	for _, s := range cfg.Services {
		for _, p := range s.Ports {
			proto := uint8(filter.ProtoTCP)
			if p.Protocol == "udp" {
				proto = filter.ProtoUDP
			}
			fc.Rules = append(fc.Rules, filter.Rule{Proto: proto, PortLo: p.Number, PortHi: p.Number, Affinity: affinities[s.Affinity]})
		}
	}
	return filter.New(fc)
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

func (e *engine) apply(a presence.Actions) {
	now := monotonic()
	if a.Table != nil {
		e.filter.SetTable(a.Table, now)
	}
	e.filter.SetLease(a.Lease)
	for _, b := range a.EndQuarantine {
		e.filter.EndQuarantine(b)
	}
}

func (e *engine) announce() {
	if err := e.path.Announce(); err != nil {
		e.log.Warn("announcing the VIP", "error", err)
	}
}

// flows finds the buckets of the flows that the kernel has, those that it
// opened itself included, and has the filter hold the latter.
func (e *engine) flows() (bits presence.Bits, active int, err error) {
	now := monotonic()
	err = raw.EachFlow(e.vips, func(f raw.Flow) {
		bits.Set(e.filter.Bucket(f.Tuple))
		if !f.TimeWait && !f.HalfOpen {
			e.filter.Hold(f.Tuple, now)
		}
		if !f.TimeWait {
			active++
		}
	})
	return bits, active, err
}

func (e *engine) viewChanged(v presence.View) {
	slot, of := slot(v)
	nodes := make([]string, len(v.Serving))
	for i, p := range v.Serving {
		nodes[i] = p.ID.String()
	}
	e.log.Info("view", "state", v.State, "slot", slot, "of", of, "agreed", v.Adopted, "nodes", strings.Join(nodes, " "))
	e.opt.Notify(fmt.Sprintf("STATUS=%v, node %d of %d", v.State, slot, of))
}

// slot is this node's place among the serving ones, from 1; 0 if it is none.
func slot(v presence.View) (slot, of int) {
	for i, p := range v.Serving {
		if p.ID == v.Self.ID {
			slot = i + 1
		}
	}
	return slot, len(v.Serving)
}

// run moves frames until ctx ends, then leaves gracefully.
func (e *engine) run(ctx context.Context) error {
	// The parts outlive ctx by the time it takes to leave.
	parts, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer stop()
	g, parts := errgroup.WithContext(parts)
	// Before the datapath, which may already see that the carrier is back.
	if !e.nic.Carrier {
		e.node.SetCarrier(parts, false)
	}
	g.Go(func() error { return e.path.Run(parts) })
	g.Go(func() error { return e.node.Run(parts) })
	g.Go(func() error { e.heartbeat(parts); return nil })
	if e.socket != nil {
		g.Go(func() error { return serveStatus(parts, e.socket, e.status) })
	}
	e.log.Info("engine running", "nic", e.nic.Name, "driver", e.nic.Driver, "wire-mac", e.path.WireMAC().String(),
		"clone-mac", e.opt.Config.VIP.CloneMAC.String(), "vip", e.vips, "carrier", e.nic.Carrier)
	e.opt.Notify("READY=1")
	g.Go(func() error {
		select {
		case <-ctx.Done():
		case <-parts.Done():
			return nil
		}
		e.opt.Notify("STOPPING=1")
		e.log.Info("leaving", "drain", e.opt.Drain)
		drain, cancel := context.WithTimeout(parts, max(e.opt.Drain, e.opt.Presence.Interval))
		defer cancel()
		e.node.Leave(drain)
		stop()
		return nil
	})
	return g.Wait()
}

// heartbeat says WATCHDOG=1 as long as every loop has run within the last
// beats: each is woken for that, so an idle engine beats as well.
func (e *engine) heartbeat(ctx context.Context) {
	tick := time.NewTicker(e.opt.Heartbeat)
	defer tick.Stop()
	for {
		e.path.Poke()
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		if last := min(e.path.Alive(), e.node.Alive()); monotonic()-last < 3*int64(e.opt.Heartbeat) {
			e.opt.Notify("WATCHDOG=1")
		} else {
			e.log.Error("the data plane stands still", "receive-transmit", e.path.Alive(), "presence", e.node.Alive(), "now", monotonic())
		}
	}
}
