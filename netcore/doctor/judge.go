package doctor

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"clonecluster/netcore/finding"
	"clonecluster/netcore/membership"
)

// What is found; docs/findings has a page on each.
var (
	noFlooding = finding.Finding{
		Code: "no-flooding", Level: finding.Critical,
		Fix: "allow unknown unicast flooding at the ports of all nodes and of their uplinks; in a hypervisor allow promiscuous mode for the nodes; or let the cluster use directed mode (network.mode)",
	}
	cloneMACLearned = finding.Finding{
		Code: "clone-mac-learned", Level: finding.Critical,
		Fix: "clear the clone MAC from the switch's address table, and remove static entries of it; it ages out by itself after some minutes, if nobody sends with it again",
	}
	arpSnooping = finding.Finding{
		Code: "arp-snooping", Level: finding.Critical,
		Fix: "turn off ARP suppression, ARP inspection or proxy ARP for the VIP in this VLAN, or let the cluster use directed mode (network.mode)",
	}
	cloneMACLeak = finding.Finding{
		Code: "clone-mac-leak", Level: finding.Critical,
		Fix: "find who sends it: a hypervisor that notifies its switches after a migration, or a machine whose NIC was given the clone MAC",
	}
	stormControl = finding.Finding{
		Code: "storm-control", Level: finding.Warning,
		Fix: "turn off storm control for unknown unicast where clients' frames and nodes' probes enter the switches, or raise its limit above the clients' traffic to the VIP",
	}
	multicastFiltered = finding.Finding{
		Code: "multicast-filtered", Level: finding.Critical,
		Fix: "have the switch flood the group 03:cc:00:00:88:b5: no blocking of unknown multicast, nor storm control for it, at the nodes' ports",
	}
	broadcastFiltered = finding.Finding{
		Code: "broadcast-filtered", Level: finding.Critical,
		Fix: "turn off broadcast filtering and its storm control at the nodes' ports: ARP requests do not pass either",
	}
	oneWay = finding.Finding{
		Code: "one-way", Level: finding.Critical,
		Fix: "look at the cable, the optics and the filters between the two: one direction is lost",
	}
	sameMAC = finding.Finding{
		Code: "same-mac", Level: finding.Critical,
		Fix: "give every machine a MAC address of its own: copies of a virtual machine have that of the original",
	}
	wireMACChanged = finding.Finding{
		Code: "wire-mac-changed", Level: finding.Warning,
		Fix: "give the NIC a fixed address: a bond or bridge takes one of its members', and some drivers make one up at each start",
	}
	wireMACUnreachable = finding.Finding{
		Code: "wire-mac-unreachable", Level: finding.Critical,
		Fix: "see at which port the switch has that address, and who else sends with it; port security or a limit of addresses may block it",
	}
	mtuMismatch = finding.Finding{
		Code: "mtu-mismatch", Level: finding.Warning,
		Fix: "give the NICs of all nodes, and the switches between, the same MTU",
	}
	loop = finding.Finding{
		Code: "loop", Level: finding.Critical,
		Fix: "look for two cables between the same switches without spanning tree, or a bridge that reflects",
	}
	duplicateFrames = finding.Finding{
		Code: "duplicate-frames", Level: finding.Warning,
		Fix: "look for a bond that sends by all its links, or has no LACP at the switch; in a hypervisor, for two uplinks of one virtual switch without a policy that filters what comes back",
	}
	secondCluster = finding.Finding{
		Code: "second-cluster", Level: finding.Critical,
		Fix: "give the other cluster another VIP, or its nodes this cluster's name and key",
	}
	wrongKey = finding.Finding{
		Code: "wrong-key", Level: finding.Warning,
		Fix: "give those nodes this cluster's key, or that cluster another name",
	}
	otherCluster = finding.Finding{
		Code: "other-cluster", Level: finding.Info,
		Fix: "nothing, as long as it has another VIP and another clone MAC; a VLAN for each spares both the other's frames",
	}
	vipConflict = finding.Finding{
		Code: "vip-conflict", Level: finding.Critical,
		Fix: "take the address from the other host, or give the cluster another VIP",
	}
	dhcpServers = finding.Finding{
		Code: "dhcp-servers", Level: finding.Warning,
		Fix: "turn off all DHCP servers of the segment but one, or have them share their leases; DHCP snooping at the switch keeps strangers out",
	}
)

// elsewhere are those that the engine raises from what the membership protocol knows.
// An examination names them, too.
var elsewhere = []finding.Finding{oneWay, sameMAC, loop, wrongKey, otherCluster}

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

func (c *Check) bad(f finding.Finding, what string, args ...any) {
	c.Verdict, f.What = Bad, fmt.Sprintf(what, args...)
	c.Findings = append(c.Findings, f)
	if len(c.Findings) == 1 {
		c.What = c.Findings[0].What
	}
}

// Checks are what is known now.
func (m *Machine) Checks(now int64) []Check {
	all := []Check{
		m.checkFlooding(), m.checkStorm(), m.checkLeak(), m.checkWire(now), m.checkGroup(), m.checkBothWays(now), m.checkMTU(),
		m.checkDuplicates(now), m.checkClusters(), m.checkVIP(now), m.checkDHCP(), m.checkMode(),
	}
	for i := range all {
		if all[i].Verdict == "" {
			all[i].Verdict = Good
		}
		for j := range all[i].Findings {
			if f := &all[i].Findings[j]; m.directed && ServedAround(f.Code) {
				f.Level = min(f.Level, finding.Warning)
			}
		}
	}
	return all
}

// ServedAround tells of the code of a finding whether directed mode makes up for it: where
// frames to the clone MAC go is then of no consequence, as clients send none.
func ServedAround(code string) bool {
	return slices.ContainsFunc([]finding.Finding{noFlooding, cloneMACLearned, arpSnooping, cloneMACLeak}, func(f finding.Finding) bool { return f.Code == code })
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

func (m *Machine) checkFlooding() Check {
	c := Check{Name: "flooding", What: "frames to the clone MAC reach every node"}
	if m.unknown(&c, m.place.kind != placeUnknown) {
		return c
	}
	switch {
	case m.place.kind == placeAll:
	case m.snooping:
		c.bad(arpSnooping, "frames to the clone MAC go to the node that announced the VIP last, now %s: the switch takes the clone MAC from the payload of ARP packets", macText(m.place.at))
	case m.place.kind == placeOne && (m.leaks > 0 || len(m.nodes) > 1):
		c.bad(cloneMACLearned, "frames to the clone MAC reach %s alone: the switch has the clone MAC in its table at that port", macText(m.place.at))
	case m.place.kind == placeNone && m.leaks > 0:
		c.bad(cloneMACLearned, "frames to the clone MAC reach no node: the switch has learned it elsewhere, from %s", m.leakWhat)
	case m.place.kind == placeNone:
		c.bad(noFlooding, "frames to the clone MAC reach no node, while frames to their own addresses do: the switch does not flood unknown unicast")
	case len(m.place.dark) > 0:
		c.bad(noFlooding, "frames to the clone MAC do not reach %s: unknown unicast is not flooded to every port", names(m.place.dark))
	default:
		c.bad(noFlooding, "frames to the clone MAC reach some nodes from some others only: unknown unicast is not flooded everywhere")
	}
	return c
}

func (m *Machine) checkStorm() Check {
	c := Check{Name: "storm control", What: "not tried: it takes a burst, which is sent when it is asked for"}
	if m.exam.unsent != "" {
		c.Verdict, c.What = Unknown, "the burst that was asked for was not sent: "+m.exam.unsent
		return c
	}
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
		c.bad(stormControl, "of %d frames a second to the clone MAC only %d arrive, while those to a node's own address do: storm control limits unknown unicast", tried, limit)
	}
	return c
}

func (m *Machine) checkLeak() Check {
	c := Check{Name: "clone MAC", What: "nobody sends with the clone MAC as a source"}
	if m.leaks > 0 {
		c.bad(cloneMACLeak, "%s with the clone MAC as the source came in, the last within ten minutes (%s): every switch on the way has learned it", plural(m.leaks, "frame"), m.leakWhat)
	}
	return c
}

func (m *Machine) checkWire(now int64) Check {
	c := Check{Name: "wire MAC", What: "every node's own address leads to it"}
	if m.twin != 0 && now-m.twin < int64(remember) {
		c.bad(sameMAC, "another machine has this node's wire MAC %s", macText(m.self.ID))
	}
	if m.renames > 0 {
		c.bad(wireMACChanged, "the address of this node's NIC changed, to %s", macText(m.self.ID))
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
		c.bad(wireMACUnreachable, "frames to the wire MAC of %s do not reach it, while broadcasts do: the switch has its address at another port, or blocks it", names(away))
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
		c.bad(multicastFiltered, "multicast frames do not reach %s, while broadcasts do: beacons are filtered, and nodes that start do not find each other", names(group))
	}
	if len(all) > 0 {
		c.bad(broadcastFiltered, "broadcasts do not reach %s, while multicast does", names(all))
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
		c.bad(oneWay, "this node hears %s, which does not hear this node", names(slices.SortedFunc(maps.Keys(deaf), membership.NodeID.Compare)))
		return c
	}
	tried := false
	m.each(func(*node, *link) { tried = true })
	m.unknown(&c, tried)
	return c
}

func (m *Machine) checkMTU() Check {
	c := Check{Name: "MTU", What: fmt.Sprintf("frames of %d bytes arrive, and all nodes have that MTU", m.cfg.MTU)}
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
		c.bad(mtuMismatch, "this node's NIC has an MTU of %d; that of %s has %s", m.cfg.MTU, names(other), strings.Join(sizes, ", "))
	}
	if len(short) > 0 {
		c.bad(mtuMismatch, "frames with %d bytes of payload do not reach %s, while short ones do", m.cfg.MTU, names(short))
	}
	if c.Verdict == "" {
		m.unknown(&c, tried)
	}
	return c
}

func (m *Machine) checkDuplicates(now int64) Check {
	c := Check{Name: "duplicates", What: "every frame arrives once"}
	if m.returned != 0 && now-m.returned < int64(remember) {
		c.bad(loop, "frames that this node sent come back to it")
	}
	var twice []membership.NodeID
	for _, n := range m.ordered() {
		if l := m.mine[n.tag]; l != nil && l.again >= confirmed {
			twice = append(twice, n.ID)
		}
	}
	if len(twice) > 0 {
		c.bad(duplicateFrames, "frames of %s arrive more than once", names(twice))
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
		c.bad(secondCluster, "%s, of a cluster with another key, use this cluster's clone MAC: both answer its clients", names(same))
	}
	if len(key) > 0 {
		c.bad(wrongKey, "%s say that they are of this cluster, and have another key", names(key))
	}
	if len(other) > 0 {
		c.bad(otherCluster, "another cluster is on this segment, with a clone MAC of its own: %s", names(other))
	}
	return c
}

func (m *Machine) checkVIP(now int64) Check {
	c := Check{Name: "VIP", What: "nobody else has the VIP"}
	clone := membership.NodeID(m.cfg.CloneMAC)
	var who, strangers []string
	for k, d := range m.claims {
		switch {
		case k.mac != clone:
			who = append(who, fmt.Sprintf("%s says that %v is at %s", macText(k.from), k.vip, macText(k.mac)))
		case now-d.first >= int64(grace) && d.last > d.first:
			strangers = append(strangers, macText(k.from))
		}
	}
	slices.Sort(who)
	slices.Sort(strangers)
	if len(who) > 0 {
		c.bad(vipConflict, "another host has the VIP: %s", strings.Join(who, ", "))
	} else if n := m.conflicts.count; n > 0 {
		c.bad(vipConflict, "another machine announces the VIP, or has the clone MAC (%s, the last within ten minutes), and does not answer who asks for the VIP", plural(n, "packet"))
	}
	if len(strangers) > 0 {
		c.bad(secondCluster, "%s, which is no node of this cluster, announces the VIP with this cluster's clone MAC", strings.Join(strangers, ", "))
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
		c.bad(dhcpServers, "%d DHCP servers answer on this segment: %s; nodes may get other addresses at their next start", len(servers), strings.Join(servers, ", "))
	}
	return c
}

func (m *Machine) checkMode() Check {
	c := Check{Name: "mode", What: "flooded: every node is to get all frames for the VIP"}
	if m.directed {
		c.What = fmt.Sprintf("directed: %s takes all frames for the VIP and sends them on to their owners", macText(m.director))
	}
	return c
}
