package config

import (
	"net"
	"path"
	"strings"
)

// Policy says who takes which flows: affinity which ones stay together, balance
// and weights how much each node takes.
type Policy struct {
	// Name is short for a pair of balance and affinity: byRandom is even and
	// none, byLoad is load and none, bySource is even and client. What is
	// given besides must agree with it.
	Name PolicyName `yaml:"name" enum:"byRandom,byLoad,bySource"`
	// Balance is how much each node gets: even goes by the weights alone, load
	// also, and slowly, by how busy each node is.
	Balance Balance `yaml:"balance" default:"even" enum:"even,load"`
	// Affinity is what keeps a client on one node, as described for services,
	// for all services that do not say it themselves and for all ports without
	// a service or a rule.
	Affinity Affinity `yaml:"affinity" default:"none" enum:"none,client,network,single"`
	// Moves is how many of the 1024 slices of the flows balance load moves
	// from one node to another in a second, at most.
	Moves int `yaml:"moves" default:"32" min:"1" max:"1024"`
	// Weights are for machines that shall take more or less than others.
	Weights []Weight `yaml:"weights" max:"256"`
	// WhenAllFail is what the cluster does when the services of all nodes fail
	// their health checks: serve goes on as if none had failed, as it may be
	// the checks that are wrong; stop takes no new flows.
	WhenAllFail WhenAllFail `yaml:"when-all-fail" default:"serve" enum:"serve,stop"`
}

// PolicyName is one of the policies of the paper, a pair of Balance and
// Affinity. The zero value is none of them.
type PolicyName string

// The policies of the paper.
const (
	ByRandom PolicyName = "byRandom"
	ByLoad   PolicyName = "byLoad"
	BySource PolicyName = "bySource"
)

// pair is what a PolicyName is short for.
type pair struct {
	balance  Balance
	affinity Affinity
}

var pairs = map[PolicyName]pair{
	ByRandom: {BalanceEven, AffinityNone},
	ByLoad:   {BalanceLoad, AffinityNone},
	BySource: {BalanceEven, AffinityClient},
}

// Balance says who gets how many buckets.
type Balance string

// The balances. The zero value is not valid; the default is BalanceEven.
const (
	BalanceEven Balance = "even" // by static weight
	BalanceLoad Balance = "load" // by static weight and load
)

// Affinity says which fields of a flow choose its bucket.
type Affinity string

// The affinities. The zero value is not valid; the default is AffinityNone.
const (
	AffinityNone    Affinity = "none"    // addresses and ports
	AffinityClient  Affinity = "client"  // the client's address
	AffinityNetwork Affinity = "network" // the client's /24 or /64
	AffinitySingle  Affinity = "single"  // a constant: one node takes all

	// AffinityDisabled is for rules only: no node takes anything.
	AffinityDisabled Affinity = "disabled"
)

// WhenAllFail says what follows when the services of all nodes fail.
type WhenAllFail string

// What follows. The zero value is not valid; the default is ServeWhenAllFail.
const (
	ServeWhenAllFail WhenAllFail = "serve"
	StopWhenAllFail  WhenAllFail = "stop"
)

// DefaultWeight is the weight of a machine that no pattern matches.
const DefaultWeight = 100

// Weight is the share of the machines that a pattern matches, in relation to
// the others. As one file serves all nodes, a machine is known by its permanent
// MAC address; the first pattern that matches counts, and a machine that none
// matches has weight 100. There is no other place for the weight of a machine
// but this list, or its kernel command line: policy.weights[0].mac=* and
// policy.weights[0].weight=50 there replace the first entry, or make one.
type Weight struct {
	// MAC is a pattern on the permanent address of the NIC that carries the
	// cluster, such as 52:54:00:*, in which * stands for any text and ? for
	// one character.
	MAC string `yaml:"mac" required:"true" format:"glob"`
	// Weight is the share.
	Weight int `yaml:"weight" required:"true" min:"1" max:"1000"`
}

// Weight is the static weight of the machine whose NIC has this permanent MAC:
// 1 to 1000, DefaultWeight if no pattern of the list matches it. It cannot be
// set for a single machine but by that list, in the file or on the machine's
// kernel command line.
func (c *Config) Weight(mac net.HardwareAddr) int {
	for _, w := range c.Policy.Weights {
		if ok, err := path.Match(strings.ToLower(w.MAC), mac.String()); ok && err == nil {
			return w.Weight
		}
	}
	return DefaultWeight
}
