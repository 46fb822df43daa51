package engine

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"clonecluster/netcore/api"
	"clonecluster/netcore/finding"
	"clonecluster/netcore/health"
	"clonecluster/netcore/health/probe"
	"clonecluster/netcore/membership"
)

// telling is what an engine remembers for those who ask.
type telling struct {
	events    *api.Record[api.Event]
	findings  *finding.Board
	metrics   *metrics
	offering  offering
	askHealth probe.Bell // rung when clients get no answer
	server    atomic.Pointer[api.Server]
	occurred  chan occurrence
	missed    atomic.Uint64
	host      string
	build     atomic.Pointer[string]
	addresses atomic.Pointer[[]netip.Addr] // of the NIC
	met       chan struct{}                // somebody new is there, who has no card yet
	recorded  time.Time                    // of the last event; of record alone

	// Of the beacon thread alone.
	lastView *membership.View
	mapWhy   string

	goneMu sync.Mutex
	gone   map[membership.NodeID]departure
}

// departure is when and why a node went.
type departure struct {
	at  time.Time
	why string
}

// goneFor is how long a node that went is still told of.
const goneFor = 10 * time.Minute

// occurrence is an event of which the words are found later: the thread that speaks
// with the other nodes has no time for them, and may not wait for anybody.
type occurrence struct {
	at   time.Time
	tell func() api.Event
}

func (t *telling) init() {
	t.events, t.occurred, t.met = api.NewEvents(), make(chan occurrence, 256), make(chan struct{}, 1)
	t.host, t.gone = hostname(), map[membership.NodeID]departure{}
}

// happened notes an event; it never waits.
func (e *engine) happened(tell func() api.Event) {
	select {
	case e.occurred <- occurrence{time.Now(), tell}:
	default:
		e.missed.Add(1)
	}
}

// record writes the events down until ctx ends.
func (e *engine) record(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case o := <-e.occurred:
			ev := o.tell()
			ev.Node = e.self()
			e.write(o.at, ev)
			e.metrics.events.WithLabelValues(ev.Kind).Inc()
			if n := e.missed.Swap(0); n > 0 {
				e.write(o.at, api.Event{Node: ev.Node, Kind: "state", Text: fmt.Sprintf("%d events were lost: there were too many at once", n)})
			}
		}
	}
}

// write puts an event into the record, of which the times do not go back unless somebody
// sets the clock: a thread that notes something looks at the clock before it gets its place
// in the queue, and another may look later and be there first. The event then has the time
// of the one before it.
func (t *telling) write(at time.Time, ev api.Event) {
	if at.Before(t.recorded) {
		at = t.recorded
	}
	t.recorded, ev.Time = at, at
	t.events.Add(ev)
}

// kinds are the kinds of events for what the protocol notes. What is not here
// shows in the view.
var kinds = map[membership.NoteKind]string{
	membership.Heard: "joined", membership.Lost: "lost", membership.Left: "left", membership.Restarts: "restarts",
	membership.Silent: "silent", membership.Unheard: "one-way", membership.FailOpen: "fail-open", membership.AllFailed: "all-failed",
	membership.Recovered: "recovered", membership.Yielded: "yielded", membership.NewSettings: "policy",
}

// noted is called by the beacon thread.
func (e *engine) noted(n membership.Note) {
	switch {
	case n.What == membership.NewMap:
		e.mapWhy = n.Why
		return
	case n.What == membership.Heard:
		select {
		case e.met <- struct{}{}:
		default:
		}
	}
	kind := kinds[n.What]
	if n.What.Refused() {
		kind = "refused"
	}
	if kind == "" {
		return
	}
	e.happened(func() api.Event {
		e.keepGone(n)
		about := n.Peer.ID
		text := n.What.String()
		switch n.What {
		case membership.Heard:
			text = fmt.Sprintf("%s is here: it and this node hear each other", e.called(about))
		case membership.Lost:
			text = fmt.Sprintf("%s counts as dead", e.called(about))
		case membership.Left:
			text = fmt.Sprintf("%s has left, as it said", e.called(about))
		case membership.Restarts:
			text = fmt.Sprintf("%s restarts its engine, as it said", e.called(about))
		case membership.Silent:
			text = "this node sent nothing for so long that the others may count it as dead"
		case membership.Unheard:
			text = fmt.Sprintf("this node hears %s, which does not hear it any more", e.called(about))
		}
		why := n.Why
		if n.What == membership.NewSettings {
			about, text, why = n.Settings.Author, e.settingsText(n.Settings), "by "+n.Settings.By
		}
		return api.Event{Kind: kind, About: about.String(), Text: text, Why: why}
	})
}

// keepGone remembers who went.
func (e *engine) keepGone(n membership.Note) {
	e.goneMu.Lock()
	defer e.goneMu.Unlock()
	switch n.What {
	case membership.Heard:
		delete(e.gone, n.Peer.ID)
	case membership.Lost, membership.Left, membership.Restarts:
		d := departure{time.Now(), n.What.String()}
		if n.Why != "" {
			d.why += ": " + n.Why
		}
		if len(e.gone) < membership.MaxNodes {
			e.gone[n.Peer.ID] = d
		}
	}
}

// viewEvents tells what is new in a view. It is called by the beacon thread.
func (e *engine) viewEvents(v membership.View) {
	last := e.lastView
	e.lastView = &v
	if last == nil {
		last = &membership.View{}
	}
	if v.State != last.State {
		was := last.State
		e.happened(func() api.Event {
			why := ""
			switch {
			case v.State == membership.Draining && v.Sick:
				why = "a service fails its check"
			case was >= membership.Listening:
				why = "it was " + was.String()
			}
			return api.Event{Kind: "state", About: v.Self.ID.String(), Text: "this node is " + v.State.String(), Why: why}
		})
	}
	if v.Map != last.Map && v.Map.Version != 0 {
		why := ""
		if v.Map.Leader == v.Self.ID {
			why, e.mapWhy = e.mapWhy, ""
		}
		e.happened(func() api.Event { return e.mapEvent(v, why) })
	}
	if v.Fenced != last.Fenced {
		e.happened(func() api.Event {
			if v.Fenced {
				return api.Event{Kind: "fenced", About: v.Self.ID.String(), Text: "this node takes no new connections", Why: "another node may not know of it, and may answer in its place"}
			}
			return api.Event{Kind: "unfenced", About: v.Self.ID.String(), Text: "this node takes new connections again"}
		})
	}
}

func (e *engine) mapEvent(v membership.View, why string) api.Event {
	var shares []string
	counted := 0
	for _, m := range v.Members {
		if m.Buckets > 0 {
			counted += m.Buckets
			shares = append(shares, fmt.Sprintf("%s %d", e.called(m.ID), m.Buckets))
		}
	}
	if v.Owners != nil && counted < len(v.Owners.Owner) {
		shares = append(shares, fmt.Sprintf("nobody or not heard %d", len(v.Owners.Owner)-counted))
	}
	if why == "" {
		why = "made by " + e.called(v.Map.Leader)
	}
	return api.Event{Kind: "map", About: v.Map.Leader.String(), Text: fmt.Sprintf("map %d: %s", v.Map.Version, strings.Join(shares, ", ")), Why: why}
}

func (e *engine) healthEvent(r health.Report) {
	before := e.unwell.Load()
	// That a service starts is no news.
	reasons := slices.DeleteFunc(slices.Clone(r.Reasons), func(s string) bool { return strings.Contains(s, ": starting") })
	switch {
	case !r.Healthy && len(reasons) == 0:
	case !r.Healthy:
		e.happened(func() api.Event {
			return api.Event{Kind: "unwell", About: e.self(), Text: "a service does not pass its check", Why: strings.Join(reasons, "; ")}
		})
	case before != nil && len(*before) > 0:
		e.happened(func() api.Event {
			return api.Event{Kind: "well", About: e.self(), Text: "all services pass their checks"}
		})
	}
}

func (e *engine) carrierEvent(up bool) {
	e.happened(func() api.Event {
		text := "has lost its link"
		if up {
			text = "has its link"
		}
		return api.Event{Kind: "carrier", About: e.self(), Text: e.nic.Name + " " + text}
	})
}

func (e *engine) self() string { return e.node.View().Self.ID.String() }

// cardOf gives the host name of a node and its program; empty if they are not known.
func (e *engine) cardOf(id membership.NodeID) (name, build string) {
	if id == e.node.View().Self.ID {
		return e.host, e.buildID()
	}
	if c := e.node.Card(id); c != nil {
		return c.Name, c.Build
	}
	return "", ""
}

// called is what a person calls a node.
func (e *engine) called(id membership.NodeID) string {
	if name, _ := e.cardOf(id); name != "" {
		return name + " (" + id.String() + ")"
	}
	return id.String()
}
