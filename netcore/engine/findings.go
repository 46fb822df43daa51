package engine

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"clonecluster/netcore/api"
	"clonecluster/netcore/filter"
	"clonecluster/netcore/finding"
	"clonecluster/netcore/membership"
)

const (
	// lookInterval is the time between two looks at what an operator should know.
	lookInterval = time.Second
	// findingFor is how long what happened at one moment is told of.
	findingFor = 10 * time.Minute
	// startTime is how long a service may take until it works for the first time.
	startTime = 15 * time.Second
)

// foundEvent is the event of a finding that comes or goes.
func (e *engine) foundEvent(f finding.Finding, raised bool) {
	at := time.Now()
	e.happened(func() api.Event {
		ev := api.Event{Kind: "finding", About: f.Node, Text: fmt.Sprintf("%s, %v", f.Code, f.Level), Why: f.What}
		if !raised {
			ev.Kind, ev.Text = "cleared", fmt.Sprintf("%s, after %v", f.Code, at.Sub(f.Since).Round(time.Second))
		}
		return ev
	})
}

// watchFindings looks again and again at what the engine knows anyway, until ctx
// ends.
func (e *engine) watchFindings(ctx context.Context) {
	source := e.findings.Source()
	var l look
	tick := time.NewTimer(toBeat(lookInterval))
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-e.viewNews:
			e.offering.count(e.filter.Offered(), e.node.View())
			continue
		case <-tick.C:
			tick.Reset(toBeat(lookInterval))
		}
		view := e.node.View()
		silent := e.offering.look(time.Now(), e.filter.Offered(), e.filter.Counters()[filter.DropLease], view, e.filter.Askers(monotonic()))
		e.unanswered.Store(silent)
		if silent {
			e.askHealth.Ring() // a service that hangs should not wait for the next check
		}
		s := e.status()
		source.Set(l.at(&s, time.Now(), e.offering.finding(e.called)...)...)
	}
}

// look turns one status after the other into findings.
type look struct {
	before  map[string]bool // codes that were found at the last look
	guarded uint64
	at0     time.Time // when that rose last
}

// at gives what is found in a status. What is there for a moment only, as when
// nodes meet, does not count: it takes two looks. More are what was found elsewhere.
func (l *look) at(s *Status, now time.Time, more ...finding.Finding) (found []finding.Finding) {
	if n := s.Counters[guardedCounter]; n > l.guarded {
		l.guarded, l.at0 = n, now
	}
	all := conditions(s)
	if !l.at0.IsZero() && now.Sub(l.at0) < findingFor {
		all = append(all, finding.Finding{
			Code: "clone-mac-source", Level: finding.Warning,
			What: fmt.Sprintf("%d frames were about to leave with the clone MAC as their source; the guard mended them", l.guarded),
			Fix:  "find the program on this node that sends them, and stop it: without the guard the switch would learn the address, and send all to this node",
		})
	}
	for _, f := range more {
		f.Node = s.WireMAC
		found = append(found, f)
	}
	codes := map[string]bool{}
	for _, f := range all {
		codes[f.Code] = true
		if l.before[f.Code] {
			f.Node = s.WireMAC
			found = append(found, f)
		}
	}
	l.before = codes
	return found
}

// conditions are what is wrong in a status, or worth knowing, without Node.
func conditions(s *Status) (found []finding.Finding) {
	add := func(f finding.Finding, format string, args ...any) {
		f.What = fmt.Sprintf(format, args...)
		found = append(found, f)
	}
	if s.Fenced {
		add(finding.Finding{
			Code: "fenced", Level: finding.Critical,
			Fix: "look for a cable, a VLAN or a multicast filter that lets this node's beacons through in one direction only",
		}, "this node takes no new connections, as another may not know of it and answer in its place")
	}
	unwell := slices.DeleteFunc(slices.Clone(s.Unwell), func(why string) bool {
		return strings.Contains(why, ": starting") && s.UptimeSec < startTime.Seconds()
	})
	if len(unwell) > 0 {
		add(finding.Finding{
			Code: "service-unwell", Level: finding.Critical,
			Fix: "look at the service's log (clonectl logs NODE --source NAME); the node takes its share again when the check has passed for a while",
		}, "a service does not pass its check: %s", strings.Join(unwell, "; "))
	}
	if s.FailOpen {
		add(finding.Finding{
			Code: "all-services-unwell", Level: finding.Critical,
			Fix: "mend what all services need, or the check, if they answer clients after all",
		}, "the services of all nodes fail their checks; the cluster serves on")
	}
	var deaf []string
	builds, live := map[string]bool{s.Build: true}, map[string]bool{}
	for _, m := range s.Members {
		switch {
		case m.Live:
			builds[m.Build], live[m.Node] = true, true
		default:
			deaf = append(deaf, strings.TrimSpace(m.Node+" "+m.Name))
		}
	}
	for _, r := range s.Refused { // of the last ten minutes: who hears this node by now is not meant
		if r.Kind == membership.RefusedGhost && !live[r.From] && !slices.ContainsFunc(deaf, func(d string) bool { return strings.Contains(d, r.From) }) {
			deaf = append(deaf, r.From)
		}
	}
	if len(deaf) > 0 {
		add(finding.Finding{
			Code: "one-way", Level: finding.Critical,
			Fix: "look for a cable, a VLAN or a multicast filter that works in one direction only, between this node and those",
		}, "this node hears nodes that do not hear it: %s", strings.Join(deaf, ", "))
	}
	delete(builds, "")
	if len(builds) > 1 {
		add(finding.Finding{
			Code: "mixed-programs", Level: finding.Info,
			Fix: "nothing while an upgrade goes on; else give all nodes the same image or package",
		}, "the nodes run %d different programs", len(builds))
	}
	for _, about := range ofRefusals {
		var from []string
		for _, r := range s.Refused {
			if r.Kind == about.kind {
				from = append(from, r.From)
			}
		}
		if len(from) > 0 {
			slices.Sort(from)
			add(about.Finding, "%s: from %s", about.What, strings.Join(slices.Compact(from), ", "))
		}
	}
	return found
}

// ofRefusals are the findings for frames of the protocol that have no effect.
var ofRefusals = []struct {
	kind membership.RefusalKind
	finding.Finding
}{
	{membership.RefusedKey, finding.Finding{
		Code: "wrong-key", Level: finding.Warning, What: "beacons of this cluster's name are signed with another key",
		Fix: "give those nodes this cluster's key, or that cluster another name",
	}},
	{membership.RefusedCluster, finding.Finding{
		Code: "other-cluster", Level: finding.Info, What: "another cluster is on this segment",
		Fix: "nothing, as long as it has another VIP and another clone MAC",
	}},
	{membership.RefusedVersion, finding.Finding{
		Code: "other-protocol", Level: finding.Warning, What: "nodes speak another version of the protocol, and share nothing with this one",
		Fix: "give all nodes the same program",
	}},
	{membership.RefusedMalformed, finding.Finding{
		Code: "malformed-beacons", Level: finding.Info, What: "frames look like beacons and are none",
		Fix: "find out what sends EtherType 0x88b5 there; they have no effect",
	}},
	{membership.RefusedRules, finding.Finding{
		Code: "other-rules", Level: finding.Warning, What: "nodes have other ports, affinities, addresses or another flow key, and share nothing with this one",
		Fix: "give all nodes the same cluster.yaml",
	}},
	{membership.RefusedTwin, finding.Finding{
		Code: "same-mac", Level: finding.Critical, What: "another node has this node's wire MAC",
		Fix: "give one of them another MAC address, as after cloning a virtual machine",
	}},
	{membership.RefusedEcho, finding.Finding{
		Code: "loop", Level: finding.Critical, What: "this node's own frames come back to it",
		Fix: "look for a loop in the network: two cables between the same switches without spanning tree, or a bridge that reflects",
	}},
	{membership.RefusedTooFar, finding.Finding{
		Code: "too-many-nodes", Level: finding.Warning, What: "there are more nodes than one cluster can have",
		Fix: "take some out, or make two clusters of them",
	}},
}
