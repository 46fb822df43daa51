package api

import (
	"clonecluster/netcore/finding"
	"clonecluster/netcore/membership"
)

// Status is what a node says of itself and of what it knows of the others.
type Status struct {
	Cluster   string   `json:"cluster"`
	Name      string   `json:"name,omitempty"`      // of the host
	Build     string   `json:"build,omitempty"`     // which program: equal programs have equal ones
	Rules     string   `json:"rules"`               // fingerprint of what decides who takes a flow; the same on all nodes
	Addresses []string `json:"addresses,omitempty"` // where this API is reached, with the port
	NIC       string   `json:"nic"`
	Driver    string   `json:"driver,omitempty"`
	WireMAC   string   `json:"wire_mac"` // which is the node's id
	CloneMAC  string   `json:"clone_mac"`
	VIP       []string `json:"vip"`
	Datapath  string   `json:"datapath"` // "native", "bpf" or "raw"
	Ingress   string   `json:"ingress"`  // where frames are judged: "XDP", "tcx", "clsact" or "packet socket"
	UptimeSec float64  `json:"uptime_seconds"`
	// Goroutines is how many the engine has: one that grows is a leak.
	Goroutines int `json:"goroutines"`

	State   string   `json:"state"`   // listening, serving, draining, stopping, leaving or restarting
	Slot    int      `json:"slot"`    // place among Nodes, from 1; 0: none
	Nodes   []string `json:"nodes"`   // those that own buckets, by wire MAC
	Heard   []string `json:"heard"`   // the other live nodes
	Agreed  bool     `json:"agreed"`  // all live nodes go by the same map
	Fenced  bool     `json:"fenced"`  // takes no new connections, as somebody may not know of this node
	Leader  string   `json:"leader"`  // wire MAC; empty: none known
	Map     uint64   `json:"map"`     // its version
	Buckets Buckets  `json:"buckets"` // how many are in which state
	Policy  string   `json:"policy"`  // of the configuration: its name, or balance and affinity
	Balance string   `json:"balance"` // in force: even or load
	// PolicyVersion is that of GET /v1/policy; 0: all is as configured.
	PolicyVersion uint64 `json:"policy_version"`
	// PolicyAuthor is the node that took the last change: two that did not know of each
	// other's have the same version, until one of them holds on all nodes.
	PolicyAuthor string `json:"policy_author,omitempty"`

	// Unwell are the services that fail their checks, with the reason.
	Unwell []string `json:"unwell"`
	// FailOpen: the services of all nodes fail, and the cluster serves on.
	FailOpen bool     `json:"fail_open"`
	Members  []Member `json:"members"` // all that are heard, this node too
	Drain    Drain    `json:"drain"`
	// Offered is what all clients send to the cluster, as this node sees it: each node
	// sees all of it.
	Offered Offered `json:"offered"`
	// Findings are what this node has noticed and an operator should look at, what
	// matters most first.
	Findings []finding.Finding `json:"findings"`
	// Refused are the protocol's frames of the last ten minutes that had no effect.
	Refused []membership.Refusal `json:"refused"`

	Verdicts map[string]uint64   `json:"verdicts"`          // frames by verdict, without zeros
	Counters map[string]uint64   `json:"datapath_counters"` // the fields of raw.Counters or macvlan.Counters
	Beacons  membership.Counters `json:"beacon_counters"`   // frames of the protocol
}

// Offered is what clients send to the VIP's ports, but for those that a rule disables:
// whoever takes it, or nobody. Totals begin with the engine, rates are of some seconds.
type Offered struct {
	Frames    uint64 `json:"frames"`     // segments of TCP, datagrams of UDP
	SYNs      uint64 `json:"syns"`       // to ports of services or with a rule
	SYNsAgain uint64 `json:"syns_again"` // of these, sent again since nobody answered
	Unowned   uint64 `json:"unowned"`    // frames to buckets that no live node has
	// Leaseless are new ones, pings too, to this node's own buckets that it drops, as it
	// is fenced or has no lease. Each node knows its own: of the cluster it is the sum.
	Leaseless uint64 `json:"leaseless"`

	FramesPerSecond    float64 `json:"frames_per_second"`
	SYNsPerSecond      float64 `json:"syns_per_second"`
	SYNsAgainPerSecond float64 `json:"syns_again_per_second"`
	UnownedPerSecond   float64 `json:"unowned_per_second"`
	LeaselessPerSecond float64 `json:"leaseless_per_second"`
}

// Member is one node as another knows it.
type Member struct {
	Node    string  `json:"node"`           // wire MAC
	Name    string  `json:"name,omitempty"` // of its host, where it is known
	Self    bool    `json:"self,omitempty"`
	State   string  `json:"state"`
	Live    bool    `json:"live"` // it hears this node as well
	Unwell  bool    `json:"unwell,omitempty"`
	Weight  int     `json:"weight"`
	Busy    float64 `json:"busy"` // share of the processors, 0 to 1
	Flows   int     `json:"flows"`
	Buckets int     `json:"buckets"` // of 1024, by the map
	Map     uint64  `json:"map"`     // the version it goes by
	Build   string  `json:"build,omitempty"`
}

// Drain is how far a drain or a stop has come.
type Drain struct {
	Draining bool `json:"draining"`
	// Aside: it drains by itself, as it cannot do its part in directed mode, and no order to
	// resume ends that.
	Aside bool `json:"aside,omitempty"`
	// Owned: some buckets still wait for another node to take them.
	Owned bool `json:"owned"`
	// Flows are the connections of the VIP that this node still has, without
	// those of this API.
	Flows int `json:"flows"`
}

// Buckets counts the buckets by state.
type Buckets struct {
	Foreign  int `json:"foreign"`
	Settled  int `json:"settled"`
	Shared   int `json:"shared"`
	Draining int `json:"draining"`
}
