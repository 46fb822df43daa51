package engine

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/cilium/ebpf"

	"clonecluster/config"
	"clonecluster/netcore/finding"
	"clonecluster/netcore/membership"
	"clonecluster/netcore/raw"
)

const (
	// directedTick is the time between two looks at who directs, and at who may want what;
	// floodedTick that between two while nothing is directed or waits to be announced, and
	// the engine has not just started.
	directedTick = 50 * time.Millisecond
	floodedTick  = 500 * time.Millisecond
	// directedAfter is how long frames to the clone MAC must not have reached all nodes
	// before they are directed, and floodedAfter how long they must have before they are
	// no longer; the latter if Options say nothing else.
	directedAfter = 5 * time.Second
	floodedAfter  = 2 * time.Minute
	// againAfter is after what time it is tried again where it has failed, if Options say
	// nothing else.
	againAfter = 30 * time.Second
	// doubtFor is how long a leader has to say that nothing is directed any more.
	doubtFor = 3 * time.Second
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
	able     bool      // this node can, as far as is known
	said     string    // why not
	again    time.Time // when that is tried again; zero: never
	on       bool      // the cluster does
	doubted  time.Time // since when the leader has said otherwise; zero: it has not
	director membership.NodeID
	version  membership.MapID
	mapAt    time.Time
	met      map[membership.Peer]bool // who was there at the last look
	set      *raw.Directed
	take     map[membership.Peer]bool // who was sent frames while they were directed
	lingers  time.Time                // until when it stays set when nothing is directed
	announce []time.Time              // to come
}

// outlook is what a node goes by when it says whether frames are to be directed, and by whom.
type outlook struct {
	mode      string
	leader    membership.NodeID // zero: not known
	self      mate
	others    []mate        // the live ones whose doctors are heard
	bad, good time.Duration // of Doctor.Flooding
}

// mate is what a node is to directed mode.
type mate struct {
	id        membership.NodeID
	takesPart bool // as those who may lead
	able      bool
	directed  bool // it takes the cluster to be in that mode
}

// watchDirected has the datapath do without flooding where it has to, until ctx ends.
func (e *engine) watchDirected(ctx context.Context) {
	found := e.findings.Source()
	d := directing{able: true}
	if e.opt.Config.Network.Mode == config.ModeFlooded {
		d.able, d.said = false, "its network.mode is flooded"
	}
	tick := time.NewTimer(0)
	defer tick.Stop()
	for {
		v, now := e.node.View(), time.Now()
		o := e.outlook(v, &d)
		if err := e.direct(&d, &o, v, now); err != nil {
			if err = errors.Join(err, e.path.SetDirected(nil)); err.Error() != d.said {
				e.log.Warn("there is no directed mode", "error", err)
			}
			d.fail(err, now.Add(e.opt.AgainAfter))
			continue
		}
		if aside := d.on && !d.able; aside != e.aside.Swap(aside) {
			e.node.StandAside(ctx, aside)
		}
		for len(d.announce) > 0 && !now.Before(d.announce[0]) {
			d.announce = d.announce[1:]
			e.announce()
		}
		e.doctor.Direct(d.by(v.Self.ID), d.able)
		found.Set(e.directedFindings(&d, &o)...)
		next := floodedTick
		if d.set != nil || len(d.announce) > 0 || now.Sub(e.start) < directedAfter {
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

// fail is that this node cannot, until then or, where the kernel lacks something, ever.
func (d *directing) fail(err error, again time.Time) {
	d.able, d.said, d.set, d.again = false, err.Error(), nil, again
	if errors.Is(err, ebpf.ErrNotSupported) {
		d.again = time.Time{}
	}
}

func (e *engine) outlook(v membership.View, d *directing) outlook {
	takesPart := func(s membership.State) bool { return s == membership.Serving || s == membership.Draining }
	o := outlook{mode: e.opt.Config.Network.Mode, leader: v.Leader, self: mate{v.Self.ID, takesPart(v.State), d.able, d.on}}
	o.bad, o.good = e.doctor.Flooding()
	for _, m := range v.Members {
		if m.Self || !m.Live {
			continue
		}
		if directed, able, known := e.doctor.Directed(m.ID); known {
			o.others = append(o.others, mate{m.ID, takesPart(m.State), able, directed})
		}
	}
	return o
}

// wanted decides whether frames are to be directed. The leader decides for all; a node
// whose leader is not known goes on. What is directed stays so until the network floods,
// or nobody can direct: a node that cannot stands aside.
func (o *outlook) wanted(floodedAfter time.Duration) bool {
	can, already := o.self.able, false
	for _, n := range o.others {
		can, already = can || n.able, already || n.able && n.directed
	}
	if o.leader != o.self.id {
		for _, n := range o.others {
			if n.id == o.leader {
				return n.directed
			}
		}
		return o.self.directed || o.mode == config.ModeDirected && can
	}
	switch {
	case o.mode == config.ModeDirected:
		return can
	case o.good >= floodedAfter:
		return false
	}
	return can && (o.self.directed || already || o.bad >= directedAfter)
}

// director is whom clients are to be told: the lowest node that does its part, or the
// leader while there is none.
func (o *outlook) director() membership.NodeID {
	var able []membership.NodeID
	if o.self.able && o.self.takesPart {
		able = append(able, o.self.id)
	}
	for _, n := range o.others {
		if n.able && n.directed && n.takesPart {
			able = append(able, n.id)
		}
	}
	if len(able) == 0 {
		return o.leader
	}
	return slices.MinFunc(able, membership.NodeID.Compare)
}

// goes says whether this node takes the cluster to be in directed mode, and who directs. It
// does not take another leader's word for the end at once: one that has just started does
// not know yet.
func (d *directing) goes(o *outlook, floodedAfter time.Duration, now time.Time) (on bool, director membership.NodeID) {
	if on = o.wanted(floodedAfter); on || !d.on || o.leader == o.self.id {
		d.doubted = time.Time{}
		return on, o.director()
	}
	if d.doubted.IsZero() {
		d.doubted = now
	}
	return now.Sub(d.doubted) < doubtFor, d.director
}

// direct brings the datapath to what is wanted.
func (e *engine) direct(d *directing, o *outlook, v membership.View, now time.Time) error {
	if v.Map != d.version || !v.Agreed {
		d.version, d.mapAt = v.Map, now
	}
	on, director := d.goes(o, e.opt.FloodedAfter, now)
	if !on && d.on {
		e.log.Info("frames for the VIP are flooded again")
		d.on, d.lingers = false, now.Add(lingerFor)
		d.repeat(o.leader == o.self.id, now)
	}
	again := !d.able && !d.again.IsZero() && !now.Before(d.again)
	switch {
	case !d.able && !again:
	case !on && d.set != nil && !now.Before(d.lingers):
		d.set = nil
		if err := e.path.SetDirected(nil); err != nil {
			e.log.Warn("taking directed mode back", "error", err)
		}
	case on || d.set != nil || again:
		if on {
			d.take = takers(v, o)
		}
		set := directedTo(v, o, d.take, director, now.Sub(d.mapAt) < unsettledFor)
		if !on {
			set.Director = raw.MAC(e.opt.Config.VIP.CloneMAC)
		}
		if d.set == nil || !sameDirected(d.set, set) {
			if err := e.path.SetDirected(set); err != nil {
				return err
			}
			d.set = set
		}
		d.able, d.said = true, ""
	}
	// Who comes may have announced the clone MAC before it knew.
	if came := d.meet(v); on && (!d.on || director != d.director || came) {
		if !d.on || director != d.director {
			e.log.Info("frames for the VIP are directed", "by", director)
		}
		d.on, d.director = true, director
		d.repeat(director == o.self.id && d.able, now)
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

// meet reports whether there is a node that was not there before.
func (d *directing) meet(v membership.View) (came bool) {
	met := map[membership.Peer]bool{}
	for _, m := range v.Members {
		if m.Live && !m.Self {
			met[m.Peer] = true
			came = came || !d.met[m.Peer]
		}
	}
	d.met = met
	return came
}

// repeat has this node, if it is the one to do so, tell the clients where the VIP is now.
func (d *directing) repeat(this bool, now time.Time) {
	d.announce = d.announce[:0]
	if !this {
		return
	}
	for _, after := range announceAt {
		d.announce = append(d.announce, now.Add(after))
	}
}

// takers are those who may be sent frames: a node that does not keep its kernel from them, or
// not yet, would answer for all buckets, and ask for clients by ARP in the name of the
// clone MAC.
func takers(v membership.View, o *outlook) map[membership.Peer]bool {
	take := map[membership.Peer]bool{}
	for _, m := range v.Members {
		take[m.Peer] = slices.ContainsFunc(o.others, func(n mate) bool { return n.id == m.ID && n.able && n.directed })
	}
	return take
}

// directedTo says who of those that take any gets what: the owner of a bucket, and whoever
// may have flows in it; or everybody.
func directedTo(v membership.View, o *outlook, take map[membership.Peer]bool, director membership.NodeID, everybody bool) *raw.Directed {
	if director == (membership.NodeID{}) {
		director = o.self.id // nobody else is known
	}
	to := &raw.Directed{Director: director, Answer: director == o.self.id}
	for _, m := range v.Members {
		if !m.Self {
			to.Nodes = append(to.Nodes, m.ID)
		}
		if take[m.Peer] {
			to.All = append(to.All, m.ID)
		}
	}
	if everybody {
		for b := range to.To {
			to.To[b] = to.All
		}
		return to
	}
	for b := range to.To {
		owner, owned := v.Owner(b)
		for _, m := range v.Members {
			if (owned && m.ID == owner || m.May.Has(b)) && slices.Contains(to.All, raw.MAC(m.ID)) {
				to.To[b] = append(to.To[b], m.ID)
			}
		}
	}
	return to
}

func sameDirected(a, b *raw.Directed) bool {
	if a.Director != b.Director || a.Answer != b.Answer || !slices.Equal(a.Nodes, b.Nodes) || !slices.Equal(a.All, b.All) {
		return false
	}
	for i := range a.To {
		if !slices.Equal(a.To[i], b.To[i]) {
			return false
		}
	}
	return true
}

// directedFindings tell that frames are directed, who cannot take part in that, or that
// they should be and cannot.
func (e *engine) directedFindings(d *directing, o *outlook) []finding.Finding {
	const newer = "run these nodes on a kernel with tcx (Linux 6.6 or later) and without network.mode: flooded, or mend the network as the doctor's other findings say"
	f := finding.Finding{Code: "directed-mode", Level: finding.Info, Node: o.self.id.String(), Fix: "nothing if it is fast enough; else mend the network as the doctor's other findings say"}
	var lacking []string
	for _, n := range o.others {
		if !n.able {
			lacking = append(lacking, e.called(n.id))
		}
	}
	switch {
	case d.on:
		f.What = fmt.Sprintf("the cluster is in directed mode: %s takes all frames for the VIP and sends them on to their owners", e.called(d.director))
		switch {
		case !d.able:
			f.Level, f.Fix = finding.Critical, newer
			f.What += "; this node cannot get any and takes no connections: " + d.said
		case len(lacking) > 0 && o.leader == o.self.id:
			f.Level, f.Fix = finding.Critical, newer
			f.What += "; these nodes cannot get any and take no connections: " + strings.Join(lacking, ", ")
		}
	case o.mode == config.ModeDirected && !d.able:
		f.Level, f.Fix = finding.Warning, newer
		f.What = "directed mode is asked for, and is not to be had here: " + d.said
	case o.mode == config.ModeDirected && o.leader != o.self.id:
		f.Level, f.Fix = finding.Warning, "give all nodes the same network.mode: the leader's holds"
		f.What = fmt.Sprintf("directed mode is asked for here, and %s, who leads, does not direct", e.called(o.leader))
	case o.mode == config.ModeAuto && o.leader == o.self.id && !d.able && o.bad >= directedAfter:
		f.Level, f.Fix = finding.Critical, newer
		f.What = "the network does not flood, and directed mode is not to be had, as no node can: " + d.said
	default:
		return nil
	}
	return []finding.Finding{f}
}
