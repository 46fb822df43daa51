// Package filter decides what one node does with one frame.
package filter

import (
	"net/netip"
	"sync/atomic"
)

// State is what a node is to one bucket. The zero value is Foreign, so that a
// table nobody has filled in accepts nothing.
type State uint8

// The states of a bucket.
const (
	Foreign  State = iota // not mine
	Settled               // mine, nobody else holds flows
	Shared                // mine, but a live former owner still holds flows
	Draining              // no longer mine, but I hold flows
)

// Buckets is the number of equal slices of the flow space.
const Buckets = 1024

// Table is a node's state in every bucket.
type Table [Buckets]State

// Affinity says which fields of a flow choose its bucket.
type Affinity uint8

// The affinities.
const (
	AffinityNone    Affinity = iota // addresses and ports
	AffinityClient                  // the client's address
	AffinityNetwork                 // the client's /24 or /64
	AffinitySingle                  // a constant: one node takes all
)

// Rule gives the ports PortLo to PortHi of one protocol an affinity.
type Rule struct {
	Proto          uint8 // ProtoTCP or ProtoUDP
	PortLo, PortHi uint16
	Affinity       Affinity
}

// The IP protocol numbers of Rule.Proto and Tuple.Proto.
const (
	ProtoTCP = 6
	ProtoUDP = 17
)

// Config is what a Filter is built from; it is the same on every node.
type Config struct {
	CloneMAC   [6]byte
	VIP4, VIP6 netip.Addr // at least one is valid
	HashKey    [16]byte
	Rules      []Rule
	// LocalPorts is the kernel's ip_local_port_range: ports without a rule
	// from which nodes open flows of their own. Zero: 32768 to 60999.
	LocalPorts [2]uint16
	// MaxFrame is the longest frame, Ethernet header included. Zero: 65550.
	MaxFrame int
}

// Tuple names one TCP flow as the kernel of this node knows it.
type Tuple struct {
	Proto  uint8
	VIP    netip.AddrPort // the local end
	Client netip.AddrPort // the remote end
}

// SocketState is what the kernel knows of a Tuple.
type SocketState uint8

// The socket states.
const (
	SocketNone        SocketState = iota // nothing
	SocketListener                       // a listener alone
	SocketEstablished                    // a socket of that very tuple, in any TCP state
)

// Sockets looks a flow up in the kernel's socket table. It is asked only in
// buckets that change hands.
type Sockets interface {
	Lookup(Tuple) SocketState
}

// Filter holds the table and gives the verdicts.
type Filter struct {
	table atomic.Pointer[Table]
	lease atomic.Int64
}

// New checks the configuration and gives a Filter whose buckets are all Foreign.
func New(Config) (*Filter, error) { return &Filter{}, nil }

// SetTable installs a table; nowMono is CLOCK_MONOTONIC in nanoseconds.
func (f *Filter) SetTable(t *Table, nowMono int64) { f.table.Store(t) }

// SetLease lets new flows in before monoNs (CLOCK_MONOTONIC, nanoseconds).
func (f *Filter) SetLease(monoNs int64) { f.lease.Store(monoNs) }

// Ingress gives the verdict on a frame from the wire (no virtio header).
func (f *Filter) Ingress(frame []byte, nowMono int64, s Sockets) Verdict { return DropNotOurs }

// Egress gives the verdict on a frame from clone0 (no virtio header).
func (f *Filter) Egress(frame []byte, nowMono int64) Verdict { return Send }

// Counters counts frames by verdict.
type Counters [Verdicts]uint64

// Counters gives a snapshot.
func (f *Filter) Counters() Counters { return Counters{} }
