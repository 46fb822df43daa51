package doctor

import (
	"fmt"
	"net"
	"net/netip"

	"clonecluster/netcore/membership"
)

// stranger is a node of another cluster.
type stranger struct {
	id       membership.NodeID
	sameName bool // and another key
	sameMAC  bool // the clone MAC
}

// Stranger is told of a probe that this cluster's key did not sign.
func (m *Machine) Stranger(id membership.NodeID, sameName bool, cloneMAC [6]byte, now int64) {
	s := stranger{id, sameName, cloneMAC == m.cfg.CloneMAC}
	if _, there := m.strangers[s]; there || len(m.strangers) < mostKept {
		m.strangers[s] = now
	}
}

// claim is somebody who says who has the VIP.
type claim struct {
	from membership.NodeID // the Ethernet source
	mac  membership.NodeID // who has it, as is said
	vip  netip.Addr
}

type claimed struct{ first, last int64 }

// Claim is told of an ARP packet or neighbour advertisement that says at which MAC
// the VIP is. What this cluster's nodes say of it is none: they speak for it, in directed
// mode with the director's MAC.
func (m *Machine) Claim(from, mac membership.NodeID, vip netip.Addr, now int64) {
	if from == m.self.ID || m.ours(from) {
		return
	}
	c := claim{from, mac, vip}
	if d := m.claims[c]; d != nil {
		d.last = now
	} else if len(m.claims) < mostKept {
		m.claims[c] = &claimed{now, now}
	}
}

// ours tells whether somebody is a node of this cluster, or was one until lately.
func (m *Machine) ours(id membership.NodeID) bool {
	_, member := m.known[id]
	return member || m.nodes[id] != nil
}

// acquit drops what nodes of this cluster had said before they were known as such.
func (m *Machine) acquit() {
	for c := range m.claims {
		if m.ours(c.from) {
			delete(m.claims, c)
		}
	}
}

// conflicts are packets that a datapath counted as those of somebody else who has the
// VIP, and dropped.
type conflicts struct {
	count    int // that are held to be so
	at       int64
	waiting  int // that may yet be the director's
	since    int64
	directed int64 // when the cluster was last known to be in directed mode
	fresh    bool  // nobody has asked yet who it is
}

// Conflict is told that count packets came in that give the VIP another MAC than the
// clone MAC, or another address the clone MAC. In directed mode the director's do.
func (m *Machine) Conflict(count int, now int64) {
	c := &m.conflicts
	if c.waiting == 0 {
		c.since, c.fresh = now, c.count == 0
	}
	c.waiting += count
}

// settle decides on those that wait.
func (c *conflicts) settle(directed bool, now int64) {
	if directed {
		c.directed = now
	}
	if c.waiting == 0 || now-c.since < int64(holdBack) {
		return
	}
	if c.directed == 0 || c.since-c.directed > int64(holdBack) {
		c.count, c.at = c.count+c.waiting, now
	}
	c.waiting = 0
}

// directing tells whether some node takes the cluster to be in directed mode.
func (m *Machine) directing() bool {
	for _, n := range m.nodes {
		if n.direct {
			return true
		}
	}
	return m.directed
}

// mayAsk tells whether the answers to a question for the VIP would mislead nobody: they
// may move the clone MAC in a switch that believes what ARP says, which an experiment is
// about to find out.
func (m *Machine) mayAsk(now int64) bool {
	for _, n := range m.nodes {
		if n.moved {
			return false
		}
	}
	return m.moving == 0 && !m.mayTry(now)
}

// aRARP is what hypervisors send.
const aRARP = "a RARP, as hypervisors send it after a migration"

// Leak is told that count frames with the clone MAC as their source came in, and what
// they are: every switch on their way has learned it.
func (m *Machine) Leak(what string, count int, now int64) {
	m.leakWhat = what
	m.leaks, m.leakAt = m.leaks+count, now
}

// Server is told of a DHCP server that offers or acknowledges something.
func (m *Machine) Server(id string, now int64) {
	if _, there := m.servers[id]; there || len(m.servers) < mostKept {
		m.servers[id] = now
	}
}

func macText(id membership.NodeID) string { return net.HardwareAddr(id[:]).String() }

func plural(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}
