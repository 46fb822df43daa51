package api

import (
	"time"

	"clonecluster/netcore/doctor"
	"clonecluster/netcore/finding"
)

// Health is the answer to GET /v1/health, which is all that a stranger is told.
type Health struct {
	State string `json:"state"` // of the node
	OK    bool   `json:"ok"`    // it takes new connections; the answer has the code 200, else 503
}

// Cluster is the answer to GET /v1/cluster.
type Cluster struct {
	Cluster string       `json:"cluster"`
	Time    time.Time    `json:"time"`
	Asked   string       `json:"asked"` // the node that answers for all, by wire MAC
	Nodes   []NodeReport `json:"nodes"` // in the order of their ids
}

// NodeReport is one node in the answer to GET /v1/cluster.
type NodeReport struct {
	Node      string   `json:"node"` // wire MAC
	Name      string   `json:"name,omitempty"`
	Addresses []string `json:"addresses,omitempty"` // of its API, as it announced them
	Status    *Status  `json:"status,omitempty"`
	Error     string   `json:"error,omitempty"` // why there is no status
	Gone      bool     `json:"gone,omitempty"`  // it was there in the last ten minutes
}

// Findings is the answer to GET /v1/findings.
type Findings struct {
	Cluster string    `json:"cluster"`
	Time    time.Time `json:"time"`
	Asked   string    `json:"asked"` // the node that answers for all, by wire MAC
	// Findings are those of all nodes, what matters most first, then by code and node.
	Findings []finding.Finding `json:"findings"`
	// Silent are the nodes that did not say what they have noticed.
	Silent []NodeReport `json:"silent"`
}

// OfferedBuckets is the answer to GET /v1/offered: what each of the 1024 buckets was
// offered since the engine of the node that is asked began. A look is taken once a second,
// and whenever the map or who is alive changes.
type OfferedBuckets struct {
	Node   string    `json:"node"`
	Time   time.Time `json:"time"`
	Total  Offered   `json:"total"`
	Frames []uint64  `json:"frames"`
	// Unowned are those of Frames that came while no live node had the bucket; a node that
	// has died counts as live until the others have noticed.
	Unowned   []uint64 `json:"unowned"`
	SYNs      []uint64 `json:"syns"`
	SYNsAgain []uint64 `json:"syns_again"`
}

// Examination is the answer to GET /v1/doctor and POST /v1/doctor.
type Examination = doctor.Examination

// Which is the answer to GET /v1/which: who takes a client's connection.
type Which struct {
	Client   string `json:"client"`
	VIP      string `json:"vip"`
	Port     uint16 `json:"port"`
	Protocol string `json:"protocol"`
	Affinity string `json:"affinity"` // of the port: none, client, network, single or disabled
	// Bucket is left out if it depends on the client's port, and that was not given.
	Bucket *int `json:"bucket,omitempty"`
	// Owner takes a new connection, and Holder has an old one that has this very
	// tuple; by wire MAC, and empty for nobody.
	Owner  string      `json:"owner"`
	Holder string      `json:"holder,omitempty"`
	Why    string      `json:"why"`   // in a sentence
	Nodes  []WhichNode `json:"nodes"` // what each says of the bucket
}

// WhichNode is what one node says of a bucket.
type WhichNode struct {
	Node   string `json:"node"`
	Name   string `json:"name,omitempty"`
	State  string `json:"state,omitempty"` // foreign, settled, shared or draining
	Socket bool   `json:"socket"`          // it has a connection with this very tuple
	Fenced bool   `json:"fenced,omitempty"`
	Error  string `json:"error,omitempty"` // why nothing is known of it
}

// Policy is the answer to GET and POST /v1/policy: who gets how many buckets, and by
// whose word.
type Policy struct {
	// Version rises with each change at run time; 0: all is as configured.
	Version    uint64 `json:"version"`
	Balance    string `json:"balance"`               // in force: even or load
	Set        string `json:"set_balance,omitempty"` // at run time; empty: the configured one is in force
	Configured string `json:"configured_balance"`    // of the node that is asked
	Affinity   string `json:"affinity"`              // as configured; it cannot be changed at run time
	Author     string `json:"author,omitempty"`      // the node that took the last change, by wire MAC
	By         string `json:"by,omitempty"`          // who wanted it, and why
	// Nodes are those that are heard, and others with a weight that was set.
	Nodes []PolicyNode `json:"nodes"`
}

// PolicyNode is one node's weight.
type PolicyNode struct {
	Node   string `json:"node"` // wire MAC
	Name   string `json:"name,omitempty"`
	Weight int    `json:"weight"`        // in force
	Set    bool   `json:"set,omitempty"` // at run time
}

// LogLine is one line of a log.
type LogLine struct {
	ID     uint64    `json:"id"`
	Time   time.Time `json:"time"`
	Source string    `json:"source"` // engine, on an appliance also init and the services
	Text   string    `json:"text"`
}

// Logs is the answer to GET /v1/logs.
type Logs struct {
	Node  string    `json:"node"`
	Run   string    `json:"run"`
	Lines []LogLine `json:"lines"` // the oldest first
	Lost  uint64    `json:"lost"`  // of those asked for, the node no longer has so many
}

// Boot is the answer to GET /v1/boot: how an appliance came up, and what it runs.
// Times are seconds since its kernel started.
type Boot struct {
	Hostname string      `json:"hostname"`
	Node     string      `json:"node"`
	Address  string      `json:"management_address"`
	Uptime   float64     `json:"uptime_seconds"`
	Ready    bool        `json:"ready"`
	Ending   string      `json:"ending,omitempty"`
	Timeline []BootStage `json:"timeline"`
	Children []BootChild `json:"children"`
	Watchdog struct {
		Device  string  `json:"device,omitempty"`
		Timeout float64 `json:"timeout_seconds,omitempty"`
		Off     string  `json:"off,omitempty"`
	} `json:"watchdog"`
	Memory struct {
		Init   int64 `json:"init_rss_bytes"`
		Engine int64 `json:"engine_rss_bytes"`
		Free   int64 `json:"available_bytes"`
	} `json:"memory"`
}

// BootStage is one stage of a boot.
type BootStage struct {
	Stage string  `json:"stage"`
	At    float64 `json:"at_seconds"`
}

// BootChild is one process that the appliance's init runs.
type BootChild struct {
	Name     string  `json:"name"`
	State    string  `json:"state"`
	Since    float64 `json:"since_seconds"`
	PID      int     `json:"pid,omitempty"`
	Restarts int     `json:"restarts"`
	LastExit string  `json:"last_exit,omitempty"`
	Status   string  `json:"status,omitempty"`
	Healthy  *bool   `json:"healthy"`
	Health   string  `json:"health,omitempty"`
	RSS      int64   `json:"rss_bytes,omitempty"`
}

// Problem is the body of every answer that is an error.
type Problem struct {
	Error string `json:"error"`
}
