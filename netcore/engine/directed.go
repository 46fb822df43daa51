package engine

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"clonecluster/config"
	"clonecluster/netcore/finding"
	"clonecluster/netcore/membership"
	"clonecluster/netcore/raw"
)

const (
	// directedTick is the time between two looks at who directs, and at who may want what;
	// floodedTick that between two while nothing is directed or waits to be announced.
	directedTick = 50 * time.Millisecond
	floodedTick  = 500 * time.Millisecond
	// directedAfter is how long frames to the clone MAC must not have reached all nodes
	// before they are directed, and floodedAfter how long they must have before they are
	// no longer, if Options say nothing else.
	directedAfter = 5 * time.Second
	floodedAfter  = 2 * time.Minute
	// lingerFor is how long after that a client is served that has missed the announcement.
	lingerFor = time.Minute
	// unsettledFor is how long after a map has changed all nodes get all frames: who
	// holds which flows is not yet told.
	unsettledFor = time.Second
)

// announceAt is when an announcement is made and repeated: a client that misses it would
// wait until its cache ages.
var announceAt = [...]time.Duration{0, 200 * time.Millisecond, time.Second}

// directing is what watchDirected remembers.
type directing struct {
	on       bool
	director membership.NodeID
	version  membership.MapID
	mapAt    time.Time
	set      *raw.Directed
	lingers  time.Time   // until when it stays set when nothing is directed
	announce []time.Time // to come
	said     string      // why it cannot be
}

// watchDirected has the datapath do without flooding where it has to, until ctx ends.
func (e *engine) watchDirected(ctx context.Context) {
	able, mode := true, e.opt.Config.Network.Mode
	found := e.findings.Source()
	var d directing
	tick := time.NewTimer(0)
	defer tick.Stop()
	for {
		v, now := e.node.View(), time.Now()
		on, lacking := e.wantDirected(mode, able, v, d.on)
		if able {
			if err := e.direct(&d, on, v, now); err != nil {
				err = errors.Join(err, e.path.SetDirected(nil))
				able, d = false, directing{said: err.Error()}
				e.log.Warn("there is no directed mode", "error", err)
			}
		}
		e.doctor.Direct(d.by(v.Self.ID), able && mode != config.ModeFlooded)
		found.Set(e.directedFindings(&d, v, mode, lacking, able)...)
		next := floodedTick
		if d.set != nil || len(d.announce) > 0 {
			next = directedTick
		}
		tick.Reset(toBeat(next))
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// wantDirected decides whether frames are to be directed, and tells which nodes stand
// against it. The leader decides for all; a node whose leader is not known goes on.
func (e *engine) wantDirected(mode string, able bool, v membership.View, now bool) (on bool, lacking []string) {
	switch {
	case mode == config.ModeDirected:
		return able, nil
	case mode == config.ModeFlooded:
		return false, nil
	case v.Leader != v.Self.ID:
		if directed, _, known := e.doctor.Directed(v.Leader); known {
			return directed && able, nil
		}
		return now, nil
	}
	bad, good := e.doctor.Flooding()
	if good >= e.opt.FloodedAfter || !now && bad < directedAfter {
		return false, nil
	}
	if !able {
		lacking = append(lacking, e.called(v.Self.ID))
	}
	for _, m := range v.Members {
		if m.Self || !m.Live {
			continue
		}
		if _, able, known := e.doctor.Directed(m.ID); known && !able {
			lacking = append(lacking, e.called(m.ID))
		}
	}
	return len(lacking) == 0, lacking
}

// direct brings the datapath to what is wanted.
func (e *engine) direct(d *directing, on bool, v membership.View, now time.Time) error {
	if v.Map != d.version || !v.Agreed {
		d.version, d.mapAt = v.Map, now
	}
	if !on && d.on {
		e.log.Info("frames for the VIP are flooded again")
		d.on, d.lingers = false, now.Add(lingerFor)
		d.repeat(v, now)
	}
	switch {
	case !on && d.set != nil && !now.Before(d.lingers):
		d.set = nil
		if err := e.path.SetDirected(nil); err != nil {
			e.log.Warn("taking directed mode back", "error", err)
		}
	case on || d.set != nil:
		set := e.directedTo(v, now.Sub(d.mapAt) < unsettledFor)
		if !on {
			set.Director = raw.MAC(e.opt.Config.VIP.CloneMAC)
		}
		if d.set == nil || !sameDirected(d.set, set) {
			if err := e.path.SetDirected(set); err != nil {
				return err
			}
			d.set = set
		}
		if on && (!d.on || v.Leader != d.director) {
			d.on, d.director = true, v.Leader
			e.log.Info("frames for the VIP are directed", "by", v.Leader)
			d.repeat(v, now)
		}
	}
	for len(d.announce) > 0 && !now.Before(d.announce[0]) {
		d.announce = d.announce[1:]
		e.announce()
	}
	return nil
}

// by is who directs, self if nobody else is known; the zero value if nobody does.
func (d *directing) by(self membership.NodeID) (id membership.NodeID) {
	if d.on {
		id = cmp.Or(d.director, self)
	}
	return id
}

// repeat has the leader tell the clients where the VIP is now.
func (d *directing) repeat(v membership.View, now time.Time) {
	d.announce = d.announce[:0]
	if v.Leader != v.Self.ID {
		return
	}
	for _, after := range announceAt {
		d.announce = append(d.announce, now.Add(after))
	}
}

// directedTo says who gets what: the owner of a bucket, and whoever may have flows in
// it; or everybody.
func (e *engine) directedTo(v membership.View, everybody bool) *raw.Directed {
	to := &raw.Directed{Director: v.Leader, Answer: v.Leader == v.Self.ID}
	if v.Leader == (membership.NodeID{}) {
		to.Director = v.Self.ID // nobody else is known
	}
	for _, m := range v.Members {
		if !m.Self {
			to.Nodes = append(to.Nodes, m.ID)
		}
	}
	if everybody {
		for b := range to.To {
			to.To[b] = to.Nodes
		}
		return to
	}
	for b := range to.To {
		owner, owned := v.Owner(b)
		for _, m := range v.Members {
			if !m.Self && (owned && m.ID == owner || m.May.Has(b)) {
				to.To[b] = append(to.To[b], m.ID)
			}
		}
	}
	return to
}

func sameDirected(a, b *raw.Directed) bool {
	if a.Director != b.Director || a.Answer != b.Answer || !slices.Equal(a.Nodes, b.Nodes) {
		return false
	}
	for i := range a.To {
		if !slices.Equal(a.To[i], b.To[i]) {
			return false
		}
	}
	return true
}

// directedFindings tell that frames are directed, or should be and cannot.
func (e *engine) directedFindings(d *directing, v membership.View, mode string, lacking []string, able bool) []finding.Finding {
	f := finding.Finding{Code: "directed-mode", Level: finding.Info, Node: v.Self.ID.String(), Fix: "nothing if it is fast enough; else mend the network as the doctor's other findings say"}
	switch {
	case d.on:
		f.What = fmt.Sprintf("the cluster is in directed mode: %s takes all frames for the VIP and sends them on to their owners", e.called(d.director))
	case mode == config.ModeDirected && !able:
		f.Level, f.Fix = finding.Warning, "run the nodes on a kernel with tcx (Linux 6.6 or later)"
		f.What = "directed mode is asked for, and is not to be had here: " + d.said
	case len(lacking) > 0:
		f.Level, f.Fix = finding.Warning, "run these nodes on a kernel with tcx (Linux 6.6 or later), or mend the network as the doctor's other findings say"
		f.What = fmt.Sprintf("the network does not flood, and directed mode is not to be had, as these nodes cannot: %v", lacking)
	default:
		return nil
	}
	return []finding.Finding{f}
}
