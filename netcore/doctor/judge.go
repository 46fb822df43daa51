package doctor

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"clonecluster/netcore/finding"
	"clonecluster/netcore/membership"
)

// The codes of the findings; docs/findings has a page on each.
const (
	NoFlooding        = "no-flooding"
	CloneMACLearned   = "clone-mac-learned"
	ARPSnooping       = "arp-snooping"
	CloneMACLeak      = "clone-mac-leak"
	StormControl      = "storm-control"
	MulticastFiltered = "multicast-filtered"
	BroadcastFiltered = "broadcast-filtered"
	OneWay            = "one-way"
	WireMACUnstable   = "wire-mac-unstable"
	MTUMismatch       = "mtu-mismatch"
	Duplicates        = "duplicate-frames"
	SecondCluster     = "second-cluster"
	NeighborCluster   = "neighbor-cluster"
	VIPConflict       = "vip-conflict"
	DHCPServers       = "dhcp-servers"
)

// Codes are all of them.
var Codes = []string{
	NoFlooding, CloneMACLearned, ARPSnooping, CloneMACLeak, StormControl, MulticastFiltered, BroadcastFiltered, OneWay,
	WireMACUnstable, MTUMismatch, Duplicates, SecondCluster, NeighborCluster, VIPConflict, DHCPServers,
}

// Verdict is what a check has come to.
type Verdict string

// The verdicts.
const (
	Good    Verdict = "good"
	Unknown Verdict = "unknown" // too little is known to tell
	Bad     Verdict = "bad"
)

// A Check is one question about the network, and what is known of the answer.
type Check struct {
	Name    string  `json:"name"`
	Verdict Verdict `json:"verdict"`
	What    string  `json:"what"` // a sentence
	// Findings are what is bad, without the node and the time.
	Findings []finding.Finding `json:"findings,omitempty"`
}

func (c *Check) bad(code string, level finding.Level, fix, what string, args ...any) {
	c.Verdict = Bad
	c.Findings = append(c.Findings, finding.Finding{Code: code, Level: level, What: fmt.Sprintf(what, args...), Fix: fix})
	if len(c.Findings) == 1 {
		c.What = c.Findings[0].What
	}
}

// Checks are what is known now.
func (m *Machine) Checks(now int64) []Check {
	all := []Check{
		m.checkFlooding(now), m.checkStorm(), m.checkLeak(now), m.checkWire(now), m.checkGroup(), m.checkBothWays(now), m.checkMTU(),
		m.checkDuplicates(now), m.checkClusters(), m.checkVIP(now), m.checkDHCP(),
	}
	for i := range all {
		if all[i].Verdict == "" {
			all[i].Verdict = Good
		}
	}
	return all
}

// Findings are what is wrong, one for each code.
func (m *Machine) Findings(now int64) []finding.Finding {
	var all []finding.Finding
	for _, c := range m.Checks(now) {
		for _, f := range c.Findings {
			if i := slices.IndexFunc(all, func(x finding.Finding) bool { return x.Code == f.Code }); i >= 0 {
				all[i].What += "; " + f.What
				all[i].Level = max(all[i].Level, f.Level)
				continue
			}
			all = append(all, f)
		}
	}
	return all
}

// unknown is the answer as long as nobody has told anything.
func (m *Machine) unknown(c *Check, tried bool) bool {
	switch {
	case len(m.nodes) == 0:
		c.Verdict, c.What = Unknown, "this node hears no other, and needs one to find out"
	case !tried:
		c.Verdict, c.What = Unknown, "the other nodes have not told yet what they got"
	default:
		return false
	}
	return true
}

func names(ids []membership.NodeID) string {
	var s []string
	for _, id := range ids {
		s = append(s, macText(id))
	}
	if len(s) < 2 {
		return strings.Join(s, "")
	}
	return strings.Join(s[:len(s)-1], ", ") + " and " + s[len(s)-1]
}

func (m *Machine) checkFlooding(int64) Check {
	c := Check{Name: "flooding", What: "frames to the clone MAC reach every node"}
	if m.unknown(&c, m.place.kind != placeUnknown) {
		return c
	}
	const allowFix = "allow unknown unicast flooding at the ports of all nodes and of their uplinks (unknown-unicast blocking off); in a hypervisor allow promiscuous mode or MAC address changes for the nodes; or let the cluster use directed mode"
	switch {
	case m.place.kind == placeAll:
	case m.snooping:
		c.bad(ARPSnooping, finding.Critical, "turn off ARP inspection, ARP suppression or proxy ARP for the VIP in this VLAN, or let the cluster use directed mode",
			"frames to the clone MAC go to the node that announced the VIP last, now %s: the switch takes the clone MAC from the payload of ARP packets", macText(m.place.at))
	case m.place.kind == placeOne && (m.leaks > 0 || len(m.nodes) > 1):
		c.bad(CloneMACLearned, finding.Critical, "clear the clone MAC from the switch's address table and remove static entries for it; it ages out by itself after some minutes, if nobody sends with it again",
			"frames to the clone MAC reach %s alone: the switch has the clone MAC in its table at that port", macText(m.place.at))
	case m.place.kind == placeNone && m.leaks > 0:
		c.bad(CloneMACLearned, finding.Critical, "find who sends with the clone MAC (see clone-mac-leak), and clear the clone MAC from the switch's address table",
			"frames to the clone MAC reach no node: the switch has learned it elsewhere, from %s", m.leakWhat)
	case m.place.kind == placeNone:
		c.bad(NoFlooding, finding.Critical, allowFix, "frames to the clone MAC reach no node, while frames to their own addresses do: the switch does not flood unknown unicast")
	case len(m.place.dark) > 0:
		c.bad(NoFlooding, finding.Critical, allowFix, "frames to the clone MAC do not reach %s: unknown unicast is not flooded to every port", names(m.place.dark))
	default:
		c.bad(NoFlooding, finding.Critical, allowFix, "frames to the clone MAC reach some nodes from some others only: unknown unicast is not flooded everywhere")
	}
	return c
}

func (m *Machine) checkStorm() Check {
	c := Check{Name: "storm control", What: "not tried: it takes a burst, which is sent when it is asked for"}
	if m.storm == nil {
		return c
	}
	limit, tried, known := m.storm.limit()
	switch {
	case !known:
		c.Verdict, c.What = Unknown, "too little came of the burst to tell: the machines are too busy for it"
	case limit == 0:
		c.What = fmt.Sprintf("frames to the clone MAC arrive at %d a second of %d bytes", tried, burstFrame)
	default:
		c.bad(StormControl, finding.Warning, "turn off storm control for unknown unicast at the ports of all clients' uplinks and nodes, or raise its limit above the clients' traffic to the VIP",
			"of %d frames a second to the clone MAC only %d arrive, while those to a node's own address do: storm control limits unknown unicast", tried, limit)
	}
	return c
}

func (m *Machine) checkLeak(now int64) Check {
	c := Check{Name: "clone MAC", What: "nobody sends with the clone MAC as a source"}
	if m.leaks > 0 {
		c.bad(CloneMACLeak, finding.Critical, "find who sends it: a hypervisor that notifies its switches after a migration (give the nodes' virtual NICs other addresses than the clone MAC), or a machine that was given the clone MAC",
			"%s with the clone MAC as the source came in, the last %v ago (%s): every switch on its way sends the clients' frames there now", plural(m.leaks, "frame"), ago(now-m.leakAt), m.leakWhat)
	}
	return c
}

func ago(ns int64) time.Duration { return time.Duration(ns).Round(time.Second) }

func (m *Machine) checkWire(now int64) Check {
	c := Check{Name: "wire MAC", What: "every node's own address leads to it"}
	if m.twin != 0 && now-m.twin < int64(remember) {
		c.bad(WireMACUnstable, finding.Critical, "give every machine a MAC address of its own: copies of a virtual machine have that of the original",
			"another machine has this node's wire MAC %s", macText(m.self.ID))
	}
	if m.renames > 0 {
		c.bad(WireMACUnstable, finding.Warning, "give the NIC a fixed address: a bond or bridge takes one of its members', and some drivers make one up at each start",
			"the address of this node's NIC changed, to %s", macText(m.self.ID))
	}
	var away []membership.NodeID
	tried := false
	m.each(func(n *node, l *link) {
		p := l.passage(membership.ToNode)
		tried = tried || p != unknown
		if p == lost && l.passage(membership.ToAll) == passes {
			away = append(away, n.ID)
		}
	})
	if len(away) > 0 {
		c.bad(WireMACUnstable, finding.Critical, "see at which port the switch has that address, and who else sends with it; port security or a MAC limit may block it",
			"frames to the wire MAC of %s do not reach it, while broadcasts do: the switch has its address at another port, or blocks it", names(away))
	}
	if c.Verdict == "" {
		m.unknown(&c, tried)
	}
	return c
}

// each calls f with every other node and what it got of this one.
func (m *Machine) each(f func(*node, *link)) {
	for _, n := range m.ordered() {
		if l := n.links[m.tag]; l != nil {
			f(n, l)
		}
	}
}

func (m *Machine) checkGroup() Check {
	c := Check{Name: "beacons", What: "multicast and broadcast reach every node"}
	tried := false
	var group, all []membership.NodeID
	look := func(id membership.NodeID, l *link) {
		g, b := l.passage(membership.ToGroup), l.passage(membership.ToAll)
		tried = tried || g != unknown
		if g == lost && b == passes {
			group = append(group, id)
		}
		if b == lost && g == passes {
			all = append(all, id)
		}
	}
	m.each(func(n *node, l *link) { look(n.ID, l) })
	for _, n := range m.ordered() {
		if l := m.mine[n.tag]; l != nil {
			g, b := l.passage(membership.ToGroup), l.passage(membership.ToAll)
			if g == lost && b == passes && !slices.Contains(group, m.self.ID) {
				group = append(group, m.self.ID)
			}
			if b == lost && g == passes && !slices.Contains(all, m.self.ID) {
				all = append(all, m.self.ID)
			}
			tried = tried || g != unknown
		}
	}
	if len(group) > 0 {
		c.bad(MulticastFiltered, finding.Critical, "have the switch flood the group 03:cc:00:00:88:b5 (unknown multicast): multicast filtering or storm control off at the nodes' ports; IGMP snooping as such does not concern it",
			"multicast frames do not reach %s, while broadcasts do: beacons are filtered, and nodes that start do not find each other", names(group))
	}
	if len(all) > 0 {
		c.bad(BroadcastFiltered, finding.Critical, "turn off broadcast filtering or its storm control at the nodes' ports: ARP requests do not pass either",
			"broadcasts do not reach %s, while multicast does", names(all))
	}
	if c.Verdict == "" {
		m.unknown(&c, tried)
	}
	return c
}

func (m *Machine) checkBothWays(now int64) Check {
	c := Check{Name: "both ways", What: "who is heard hears this node as well"}
	deaf := map[membership.NodeID]bool{}
	for id, since := range m.oneWay {
		if now-since >= int64(patience) {
			deaf[id] = true
		}
	}
	for id, n := range m.nodes {
		if n.lags >= confirmed {
			deaf[id] = true
		}
	}
	if len(deaf) > 0 {
		c.bad(OneWay, finding.Critical, "look at the cable, the optics and the filters between the two: one direction is lost (on fibre, UDLD finds it too)",
			"this node hears %s, which does not hear this node", names(slices.SortedFunc(maps.Keys(deaf), membership.NodeID.Compare)))
		return c
	}
	tried := false
	m.each(func(*node, *link) { tried = true })
	m.unknown(&c, tried)
	return c
}

func (m *Machine) checkMTU() Check {
	c := Check{Name: "MTU", What: fmt.Sprintf("frames of %d bytes arrive, and all nodes have that MTU", m.cfg.MTU)}
	const fix = "give the NICs of all nodes, and the switches between, the same MTU"
	var other, short []membership.NodeID
	sizes, tried := []string{}, false
	for _, n := range m.ordered() {
		if n.mtu != m.cfg.MTU {
			other = append(other, n.ID)
			sizes = append(sizes, fmt.Sprint(n.mtu))
			continue
		}
		if l := n.links[m.tag]; l != nil {
			p := l.passage(membership.ToNodeBig)
			tried = tried || p != unknown
			if p == lost && l.passage(membership.ToNode) == passes {
				short = append(short, n.ID)
			}
		}
	}
	if len(other) > 0 {
		c.bad(MTUMismatch, finding.Warning, fix, "this node's NIC has an MTU of %d; that of %s has %s", m.cfg.MTU, names(other), strings.Join(sizes, ", "))
	}
	if len(short) > 0 {
		c.bad(MTUMismatch, finding.Warning, fix, "frames with %d bytes of payload do not reach %s, while short ones do", m.cfg.MTU, names(short))
	}
	if c.Verdict == "" {
		m.unknown(&c, tried)
	}
	return c
}

func (m *Machine) checkDuplicates(now int64) Check {
	c := Check{Name: "duplicates", What: "every frame arrives once"}
	const fix = "look for a loop or a bond that sends by all its links (broadcast mode, or without LACP at the switch); in a hypervisor, for two uplinks of one virtual switch without a policy that filters what comes back"
	if m.returned != 0 && now-m.returned < int64(remember) {
		c.bad(Duplicates, finding.Warning, fix, "frames that this node sent come back to it")
	}
	var twice []membership.NodeID
	for _, n := range m.ordered() {
		if l := m.mine[n.tag]; l != nil && l.again >= confirmed {
			twice = append(twice, n.ID)
		}
	}
	if len(twice) > 0 {
		c.bad(Duplicates, finding.Warning, fix, "frames of %s arrive more than once", names(twice))
	}
	if c.Verdict == "" {
		m.unknown(&c, len(m.mine) > 0)
	}
	return c
}

func (m *Machine) checkClusters() Check {
	c := Check{Name: "clusters", What: "no other cluster is heard"}
	var same, key, other []membership.NodeID
	for s := range m.strangers {
		switch {
		case s.sameMAC:
			same = append(same, s.id)
		case s.sameName:
			key = append(key, s.id)
		default:
			other = append(other, s.id)
		}
	}
	for _, l := range [][]membership.NodeID{same, key, other} {
		slices.SortFunc(l, membership.NodeID.Compare)
	}
	if len(same) > 0 {
		c.bad(SecondCluster, finding.Critical, "give the other cluster another VIP and clone MAC, or its nodes this cluster's key",
			"%s, of a cluster with another key, use this cluster's clone MAC: both answer its clients", names(same))
	}
	if len(key) > 0 {
		c.bad(SecondCluster, finding.Warning, "give those nodes this cluster's key, or their cluster another name",
			"%s say that they are of this cluster, and have another key", names(key))
	}
	if len(other) > 0 {
		c.bad(NeighborCluster, finding.Info, "nothing has to be done; every node of the segment gets the frames of both clusters, and a VLAN for each spares that",
			"another cluster is on this segment, with a clone MAC of its own: %s", names(other))
	}
	return c
}

func (m *Machine) checkVIP(now int64) Check {
	c := Check{Name: "VIP", What: "nobody else has the VIP"}
	clone := membership.NodeID(m.cfg.CloneMAC)
	var who, strangers []string
	for k, d := range m.claims {
		_, member := m.known[k.from]
		_, probing := m.nodes[k.from]
		switch {
		case k.mac != clone && !(member || probing):
			who = append(who, fmt.Sprintf("%s says that %v is at %s", macText(k.from), k.vip, macText(k.mac)))
		case k.mac == clone && !member && !probing && now-d.first >= int64(grace) && d.last > d.first:
			strangers = append(strangers, macText(k.from))
		}
	}
	slices.Sort(who)
	slices.Sort(strangers)
	if len(who) > 0 {
		c.bad(VIPConflict, finding.Critical, "take the address from the other host, or give the cluster another VIP", "another host has the VIP: %s", strings.Join(who, ", "))
	}
	if len(strangers) > 0 {
		c.bad(SecondCluster, finding.Critical, "give the other cluster another VIP, or its nodes this cluster's key",
			"%s, which is no node of this cluster, announces the VIP with this cluster's clone MAC", strings.Join(strangers, ", "))
	}
	return c
}

func (m *Machine) checkDHCP() Check {
	c := Check{Name: "DHCP", What: "no DHCP server was heard"}
	servers := slices.Sorted(maps.Keys(m.servers))
	switch len(servers) {
	case 0:
	case 1:
		c.What = "one DHCP server is heard: " + servers[0]
	default:
		c.bad(DHCPServers, finding.Warning, "turn off all DHCP servers of the segment but one, or have them share their leases; DHCP snooping at the switch keeps strangers out",
			"%d DHCP servers answer on this segment: %s; nodes may get other addresses at their next start", len(servers), strings.Join(servers, ", "))
	}
	return c
}
