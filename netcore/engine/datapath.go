package engine

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"reflect"
	"time"

	"clonecluster/netcore/bpf"
	"clonecluster/netcore/clone"
	"clonecluster/netcore/filter"
	"clonecluster/netcore/macvlan"
	"clonecluster/netcore/raw"
	"clonecluster/netcore/realtime"
)

// The names of the datapaths, as in the configuration.
const (
	datapathAuto   = "auto"
	datapathNative = "native"
	datapathBPF    = "bpf"
	datapathRaw    = "raw"
)

// The places where what comes in may be judged, as in the configuration.
const (
	ingressAuto = "auto"
	ingressXDP  = "xdp"
	ingressTC   = "tc"
)

// slack is how late what is not urgent in this process may be.
const slack = time.Millisecond

// DefaultBPFFS is where Linux has its BPF file system.
const DefaultBPFFS = "/sys/fs/bpf"

// A datapath moves frames between the wire and clone0; raw.Datapath and
// macvlan.Datapath describe the methods.
type datapath interface {
	Run(ctx context.Context) error
	Close() error
	Undo() error
	Abandon()
	WireMAC() net.HardwareAddr
	Announce() error
	Poke()
	Alive() int64
	AfterQueued(do func())
	SetDirected(*raw.Directed) error
}

// A table is a filter as the engine sees it; filter.Filter describes the methods.
type table interface {
	SetTable(t *filter.Table, nowMono int64)
	SetLease(untilMono int64)
	EndQuarantine(bucket int)
	Table() filter.Table
	Bucket(t filter.Tuple) int
	Hold(t filter.Tuple, nowMono int64) bool
	Counters() filter.Counters
	Offered() *filter.Offered
	Askers(nowMono int64) []filter.Asker
	Look(frame []byte, left bool, nowMono int64, s filter.Sockets) filter.Seen
}

// ErrDatapath is matched by the error of Run when the datapath that was asked for
// cannot be had on this machine.
var ErrDatapath = errors.New("this datapath is not to be had here")

// chooseDatapath gives the name of the datapath to use, and why it is that one.
func chooseDatapath(want, bpffs string) (name, why string, err error) {
	if want == datapathRaw {
		return want, "asked for", nil
	}
	lacks := map[string]error{}
	pins, err := macvlan.PinsOf(bpffs)
	if err == nil {
		err = bpf.CheckPins(pins)
	}
	inKernel := errors.Join(bpf.Probe(), err)
	lacks[datapathBPF] = inKernel
	lacks[datapathNative] = errors.Join(macvlan.ProbeWireAddress(), inKernel)
	switch want {
	case datapathNative, datapathBPF:
		if err := lacks[want]; err != nil {
			return "", "", fmt.Errorf("%w: %s: %w", ErrDatapath, want, err)
		}
		return want, "asked for", nil
	}
	switch {
	case lacks[datapathNative] == nil:
		return datapathNative, "the kernel has wire addresses", nil
	case lacks[datapathBPF] == nil:
		return datapathBPF, lacks[datapathNative].Error(), nil
	}
	return datapathRaw, inKernel.Error(), nil
}

// openDatapath opens the datapath and the filter of it.
func (e *engine) openDatapath(fc filter.Config, macChanged func(net.HardwareAddr), carrierChanged func(bool)) error {
	cfg := e.opt.Config
	host := clone.Config{
		NIC: e.nic, CloneMAC: [6]byte(cfg.VIP.CloneMAC), Logger: e.log,
		VIP4: cfg.VIP.IPv4, VIP6: cfg.VIP.IPv6, Gateway4: cfg.VIP.IPv4Gateway, Gateway6: cfg.VIP.IPv6Gateway,
	}
	want := e.opt.Datapath
	if want == "" {
		want = cfg.System.Datapath
	}
	name, why, err := chooseDatapath(want, e.opt.BPFFS)
	if err != nil {
		return err
	}
	if name != datapathRaw {
		var pins string
		if pins, err = macvlan.PinsOf(e.opt.BPFFS); err != nil {
			return err
		}
		ingress := cmp.Or(e.opt.Ingress, cfg.System.Ingress, ingressAuto)
		xdp, whyIngress := useXDP(ingress, e.nic.Driver)
		c := macvlan.Config{
			Config: host, Filter: fc, Now: monotonic, WireMACChanged: macChanged, CarrierChanged: carrierChanged,
			WireAddress: name == datapathNative, Pins: pins, XDP: xdp,
		}
		err = e.openMacvlan(c)
		if err != nil && xdp && ingress == ingressAuto && errors.Is(err, bpf.ErrUnsupported) {
			c.XDP, whyIngress = false, err.Error()
			err = e.openMacvlan(c)
		}
		why += "; " + whyIngress
		if err != nil && want == datapathAuto && errors.Is(err, bpf.ErrLoad) {
			e.log.Warn("falling back", "datapath", name, "error", err)
			name, why, err = datapathRaw, "the kernel does not take the BPF programs", nil
		}
	}
	if name == datapathRaw {
		err = e.openRaw(raw.Config{Config: host, Now: monotonic, WireMACChanged: macChanged, CarrierChanged: carrierChanged}, fc)
		// Of an engine with another datapath. Its clone0 is gone by now, not before.
		if err == nil {
			if err := macvlan.Forget(e.opt.BPFFS); err != nil {
				e.log.Warn("removing what another datapath has left", "error", err)
			}
		}
	}
	if err != nil {
		return err
	}
	if name != datapathRaw { // whose threads move frames, and wait for each other
		if err := realtime.Slack(slack); err != nil {
			e.log.Debug("this process takes somewhat more of a processor than it need", "error", err)
		}
	}
	e.datapath = name
	e.log.Info("datapath", "name", name, "ingress", e.ingress(), "why", why)
	return nil
}

func (e *engine) openMacvlan(cfg macvlan.Config) error {
	path, err := macvlan.Open(cfg)
	if err != nil {
		return err
	}
	e.path, e.filter, e.pathCounters = path, path.Filter(), func() map[string]uint64 { return named(path.Counters()) }
	e.ingress = func() string { return string(path.Ingress()) }
	return nil
}

func (e *engine) openRaw(cfg raw.Config, fc filter.Config) (err error) {
	if cfg.Filter, err = filter.New(fc); err != nil {
		return fmt.Errorf("building the filter: %w", err)
	}
	path, err := raw.Open(cfg)
	if err != nil {
		return err
	}
	e.path, e.filter, e.pathCounters = path, cfg.Filter, func() map[string]uint64 { return named(path.Counters()) }
	e.ingress = func() string { return "packet socket" }
	return nil
}

// named gives the counters of a struct by the names of its fields.
func named(counters any) map[string]uint64 {
	v, m := reflect.ValueOf(counters), map[string]uint64{}
	for i := range v.NumField() {
		m[v.Type().Field(i).Name] = v.Field(i).Uint()
	}
	return m
}

// useXDP reports whether frames are to be judged in a NIC's driver, and why. Auto tries
// it: a driver that has no XDP refuses it. On veth it takes the other end its segmentation
// offload, on virtio_net the guest's own; docs/benchmarks.md has what that costs.
func useXDP(ingress, driver string) (use bool, why string) {
	switch {
	case ingress == ingressXDP:
		return true, "asked for"
	case ingress == ingressTC:
		return false, "asked for"
	case driver == "veth" || driver == "virtio_net":
		return false, "XDP costs offloads on " + driver
	}
	return true, "the driver may have XDP"
}
