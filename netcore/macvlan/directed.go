package macvlan

import (
	"errors"
	"fmt"

	"clonecluster/netcore/bpf"
	"clonecluster/netcore/raw"
)

// SetDirected has frames pass as in directed mode, or as usual (nil). The kernel judges
// what clients send to this node's wire MAC as if it had come to the clone MAC, and a
// raw.Relay does the rest. Both need to see frames before anything drops them, so that
// XDP gives way to tcx meanwhile. The error is a *bpf.UnsupportedError where there is no tcx.
func (d *Datapath) SetDirected(to *raw.Directed) error {
	if to == nil {
		d.closeRelay()
		return errors.Join(d.filter.Undirect(), d.judgeIn(d.cfg.XDP))
	}
	if err := d.judgeIn(false); err != nil {
		return err
	}
	if err := d.filter.Direct(d.cfg.NIC.Index, d.host.Index(), to.Director); err != nil {
		return errors.Join(fmt.Errorf("having the kernel take what comes to the wire MAC: %w", err), d.SetDirected(nil))
	}
	if r := d.relay.Load(); r != nil {
		return r.Set(to)
	}
	r, err := raw.OpenRelay(raw.RelayConfig{
		NIC: d.cfg.NIC, VIP4: d.cfg.VIP4.Addr(), VIP6: d.cfg.VIP6.Addr(),
		Router: d.filter, WireMAC: d.WireMAC, Failed: &d.sendErrors, Logger: d.cfg.Logger,
	}, to)
	if err != nil {
		return errors.Join(err, d.SetDirected(nil))
	}
	d.relay.Store(r)
	return nil
}

func (d *Datapath) closeRelay() {
	d.drops.Lock()
	defer d.drops.Unlock()
	if r := d.relay.Swap(nil); r != nil {
		r.Close()
		d.drops.before += r.Dropped()
	}
}

// judgeIn has the NIC's frames judged by XDP or by tcx, if they are not.
func (d *Datapath) judgeIn(xdp bool) error {
	if xdp == (d.Ingress() == bpf.XDP) {
		return nil
	}
	return d.judgeAt(xdp)
}

func (d *Datapath) judgeAt(xdp bool) error {
	in, err := d.filter.AttachNIC(d.cfg.NIC.Index, xdp)
	if in != "" { // else they are judged where they were
		d.in.Store(&in)
	}
	return err
}
