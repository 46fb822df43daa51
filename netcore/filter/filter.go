// Package filter decides what one node of a cluster does with one frame, so
// that of all the nodes that hear a flooded frame exactly the right ones take
// it. It is the reference to which the BPF datapath is compared bit by bit:
// hence bounded loops, fixed layouts, and no clock, socket or goroutine inside.
//
// # The table
//
// Every flow falls into one of 1024 buckets, and the node is in one State
// towards each. New flows also need a lease; flows that exist do not.
//
//	state     TCP SYN        TCP other       UDP, ICMP echo  ICMP error
//	Foreign   drop-foreign   drop-foreign    drop-foreign    drop-foreign
//	Settled   accept-new     accept-flow     accept-new      accept-error
//	Shared    accept-new     by the socket   accept-new      by the socket
//	Draining  drop-draining  by the socket   drop-draining   by the socket
//
// A SYN has neither ACK, RST nor FIN. UDP and echo have no flow to be part of,
// so each of their packets counts as new. "By the socket" asks Sockets: a
// socket of that tuple takes the segment; a listener alone takes one with ACK,
// which may end a SYN-cookie handshake; otherwise it is dropped. Without
// Sockets all are let through: the kernel knows no socket, and Egress swallows
// its RST, so that costs time and breaks nothing.
//
// # Ports
//
// A Rule gives a port its affinity; ports without one have Config.Default. What
// comes to a port whose Rule has Disabled, and any ICMP error about what the VIP
// sent from there, is drop-disabled on every node, whatever the table says and
// whoever holds the bucket: only what leaves from there goes as from any other
// port. Later fragments show no ports and still come in, but their first one
// does not.
//
// # What has no ports
//
// Echo requests, ARP requests and neighbour solicitations fall into the bucket
// of the client's address, whatever Default says: one node answers all of a
// client's pings, whatever identifier they carry, so a ping shows neither loss
// nor DUP when traffic is healthy. ICMP errors fall into the bucket of the
// packet they quote, which the VIP sent, so source and destination swap; the
// router that sent the error does not matter. Fragments after the first have no
// ports and are accepted by every node; the first one goes where its ports say,
// so only that node can put the packet together. What the others keep until it
// times out is bounded by the kernel (ipfrag_high_thresh, ip6frag_high_thresh).
//
// # Flows that nodes open from the VIP
//
// Their answers come to a bucket whose owner knows nothing of them, and whose
// kernel would reset them. So what comes to a local port (LocalPorts, and no
// Rule) is taken by the nodes that hold the bucket, and by no owner: a TCP
// segment that is no SYN, and an echo reply; a datagram is taken by both. On
// other ports, a bucket held by TCP is Draining where it is Foreign. A service
// should therefore have a Rule if it listens within LocalPorts.
//
// Nothing that a stranger can make the kernel say opens a hold, or 1024 frames
// to closed ports would make a node hold every bucket. For TCP a SYN does
// (SendOpen), or a flow that the kernel is known to have (Hold); the segments
// that follow from a local port keep up a hold that has not run out, and no RST
// does even that. It ends HoldTCP after the last. A datagram from a local port
// opens one only where the table would not let the answer in, which is where no
// unsolicited datagram came in either; an echo request always does. It ends
// HoldDatagram after the last, and lets no TCP in.
//
// # Speaking for the VIP
//
// A request for the VIP is answered by the owner of the asker's bucket
// (AnswerNeighbor) and never reaches the kernel; nor does anything that says
// "I have the VIP", whether a node of the cluster says it or a stranger (I8).
// Duplicate-address probes are answered, which defends the address. What other
// hosts say of their own addresses goes to every node's kernel. Router
// advertisements and redirects never do: the VIP's routes are configured, and
// one forged redirect would poison every node at once. Listener queries do, so
// that a snooping switch keeps sending solicited-node multicast; IPv4
// multicast and broadcast do not, the VIP being in no group.
//
// Frames with a VLAN identifier are not ours, but Linux takes the outer tag
// off before a packet socket sees the frame. A caller must test for it there.
package filter

import (
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"
)

// Buckets is the number of equal slices of the flow space.
const Buckets = 1024

// State is what a node is to one bucket. The zero value is Foreign, so that a
// table nobody has filled in accepts nothing.
type State uint8

// The states of a bucket.
const (
	Foreign  State = iota // not mine
	Settled               // mine, nobody else holds flows
	Shared                // mine, but a live former owner still holds flows
	Draining              // no longer mine, but I hold flows
	states   = iota
)

// String gives the name of the state, "settled".
func (s State) String() string {
	if s >= states {
		return "invalid"
	}
	return [states]string{"foreign", "settled", "shared", "draining"}[s]
}

// Owned reports whether new flows of the bucket belong to this node.
func (s State) Owned() bool { return s == Settled || s == Shared }

// Table is a node's state in every bucket.
type Table [Buckets]State

// Affinity says which fields of a flow choose its bucket.
type Affinity uint8

// The affinities. The zero value is the default.
const (
	AffinityNone    Affinity = iota // addresses and ports
	AffinityClient                  // the client's address
	AffinityNetwork                 // the client's /24 or /64
	AffinitySingle                  // a constant: one node takes all
	affinities      = iota
)

// The IP protocol numbers of Rule.Proto and Tuple.Proto.
const (
	ProtoTCP = 6
	ProtoUDP = 17
)

// Times, in nanoseconds of CLOCK_MONOTONIC.
const (
	// Quarantine is the life of a half-open connection (tcp_synack_retries 5:
	// 1+2+4+8+16+32 s). So long after a live hand-over no pure RST leaves.
	Quarantine = int64(63 * time.Second)
	// HoldTCP is how long a bucket stays held after a segment of a flow the
	// node opened: what RFC 5382 demands of a NAT for established connections.
	HoldTCP = int64(2*time.Hour + 4*time.Minute)
	// HoldDatagram is the same for UDP (RFC 4787) and echo requests.
	HoldDatagram = int64(2 * time.Minute)

	// HoldSlack keeps a busy flow from writing its deadline at every segment.
	HoldSlack = int64(time.Second)
)

// Rule gives the ports PortLo to PortHi of one protocol an affinity, or
// disables them.
type Rule struct {
	Proto          uint8  // ProtoTCP or ProtoUDP
	PortLo, PortHi uint16 // 1 to 65535, both included
	Affinity       Affinity
	Disabled       bool // nothing to these ports is taken; AffinityNone
}

// Config is what a Filter is built from. But for LocalPorts and MaxFrame it must
// be the same on every node; Fingerprint is what nodes compare.
type Config struct {
	CloneMAC   [6]byte    // unicast
	VIP4, VIP6 netip.Addr // at least one is valid
	HashKey    [16]byte   // secret: nobody can craft flows that fall on one node
	Default    Affinity   // of ports without a rule
	Rules      []Rule     // must not overlap
	// LocalPorts is the kernel's ip_local_port_range: where the flows that
	// nodes open from the VIP have their port. Zero: 32768 to 60999.
	LocalPorts [2]uint16
	// ResetPatience is how long a flow's first pure RST has to wait, and whether it
	// may leave is then judged again; 0: it leaves at once. A node that was cut off takes
	// the others for dead and their buckets for its own, and when the cable is back
	// their clients' segments reach it before the others' word does. Rounded up to
	// milliseconds.
	ResetPatience time.Duration
	// MaxFrame is the longest frame in bytes, Ethernet header included; with
	// segmentation offload frames are longer than any MTU. Zero: 65550.
	MaxFrame int
}

// Tuple names one flow as the kernel of this node knows it.
type Tuple struct {
	Proto  uint8
	VIP    netip.AddrPort // the local end
	Client netip.AddrPort // the remote end
}

// SocketState is what the kernel knows of a Tuple.
type SocketState uint8

// The socket states.
const (
	SocketNone SocketState = iota // nothing
	// SocketListener is a listener alone. Where SYN cookies can be checked, it
	// means a valid cookie, and SocketNone an invalid one.
	SocketListener
	// SocketEstablished is a socket of that very tuple, in any TCP state, from
	// the half-open request to TIME-WAIT.
	SocketEstablished
)

// Sockets looks a TCP flow up in the kernel's socket table. It is asked only
// in buckets that change hands.
type Sockets interface {
	Lookup(Tuple) SocketState
}

// What portTable knows of a port.
const (
	PortAffinity = 0x03
	PortDisabled = 0x20
	PortRuled    = 0x40 // it is a service's, or named by a Rule
	PortLocal    = 0x80 // nodes open flows from it
)

type portTable [65536]uint8

// deadlines are instants by bucket, in nanoseconds of CLOCK_MONOTONIC.
type deadlines [Buckets]atomic.Int64

// Filter holds a node's table and gives the verdicts. All methods may be
// called at any time from any goroutine.
type Filter struct {
	clone      uint64 // as mac gives it
	vip4, vip6 addr   // unspecified if there is none, which no packet is sent to
	maxFrame   int
	hash       hasher
	tcp, udp   *portTable

	change                            sync.Mutex // of table and quarantine together
	table                             atomic.Pointer[Table]
	lease                             atomic.Int64
	quarantine, heldTCP, heldDatagram deadlines

	patience uint32 // with resets, ms
	resets   *resets

	ingress, egress counters
	offered         offered
}

// New checks the configuration and gives a Filter whose buckets are all
// Foreign and whose lease has run out.
func New(cfg Config) (*Filter, error) {
	f := &Filter{
		clone:    mac(cfg.CloneMAC[:]),
		maxFrame: cfg.MaxFrame,
		hash:     newHasher(cfg.HashKey),
		tcp:      new(portTable),
		udp:      new(portTable),
	}
	if !isStation(f.clone) {
		return nil, fmt.Errorf("clone MAC %x is not a unicast address", cfg.CloneMAC)
	}
	if !cfg.VIP4.IsValid() && !cfg.VIP6.IsValid() {
		return nil, errors.New("there is no VIP")
	}
	if cfg.VIP4.IsValid() {
		f.vip4 = addrOf(cfg.VIP4)
		if !cfg.VIP4.Is4() || !isUnicast(f.vip4) {
			return nil, fmt.Errorf("VIP %v is not an IPv4 unicast address", cfg.VIP4)
		}
	}
	if cfg.VIP6.IsValid() {
		f.vip6 = addrOf(cfg.VIP6)
		if !cfg.VIP6.Is6() || cfg.VIP6.Is4In6() || cfg.VIP6.Zone() != "" || !isUnicast(f.vip6) {
			return nil, fmt.Errorf("VIP %v is not an IPv6 unicast address", cfg.VIP6)
		}
	}
	switch {
	case f.maxFrame == 0:
		f.maxFrame = 65550
	case f.maxFrame < etherHeader:
		return nil, fmt.Errorf("longest frame of %d bytes is less than an Ethernet header", f.maxFrame)
	}
	if err := f.setPorts(cfg); err != nil {
		return nil, err
	}
	if cfg.ResetPatience > 0 {
		f.patience, f.resets = uint32((cfg.ResetPatience+time.Millisecond-1)/time.Millisecond), new(resets)
	}
	f.table.Store(new(Table))
	return f, nil
}

func (f *Filter) setPorts(cfg Config) error {
	if cfg.Default >= affinities {
		return fmt.Errorf("default affinity %d is not valid", cfg.Default)
	}
	local := cfg.LocalPorts
	if local == [2]uint16{} {
		local = [2]uint16{32768, 60999}
	}
	if local[0] > local[1] {
		return fmt.Errorf("local ports %d to %d: first is above last", local[0], local[1])
	}
	for p := range f.tcp {
		f.tcp[p] = uint8(cfg.Default)
		if p >= int(local[0]) && p <= int(local[1]) {
			f.tcp[p] |= PortLocal
		}
	}
	*f.udp = *f.tcp
	for _, r := range cfg.Rules {
		if r.Proto != ProtoTCP && r.Proto != ProtoUDP || r.PortLo == 0 || r.PortLo > r.PortHi ||
			r.Affinity >= affinities || r.Disabled && r.Affinity != AffinityNone {
			return fmt.Errorf("rule %+v is not valid", r)
		}
		is := PortRuled | uint8(r.Affinity)
		if r.Disabled {
			is |= PortDisabled
		}
		for p := int(r.PortLo); p <= int(r.PortHi); p++ {
			t := f.ports(r.Proto)
			if t[p]&PortRuled != 0 {
				return fmt.Errorf("rule %+v: port %d has a rule already", r, p)
			}
			t[p] = is
		}
	}
	return nil
}

func (f *Filter) ports(proto uint8) *portTable {
	if proto == ProtoTCP {
		return f.tcp
	}
	return f.udp
}

func (f *Filter) port(proto uint8, port uint16) uint8 { return f.ports(proto)[port] }

// SetTable installs a copy of t at nowMono (CLOCK_MONOTONIC, nanoseconds). A
// value that is no State becomes Foreign. A bucket that changes hands between
// live nodes is quarantined: one that becomes Shared or Draining, or Foreign
// straight from an owned state. One that goes from Foreign to Settled is not:
// its former owner is dead, and the orphans shall have their RST (I6).
func (f *Filter) SetTable(t *Table, nowMono int64) {
	f.change.Lock()
	defer f.change.Unlock()
	next, quarantine := Changes(t, f.table.Load())
	for b, is := range quarantine {
		if is {
			f.quarantine[b].Store(nowMono + Quarantine)
		}
	}
	f.table.Store(&next)
}

// Changes gives t as it is to be installed after the table last, and the buckets that
// SetTable quarantines.
func Changes(t, last *Table) (next Table, quarantine [Buckets]bool) {
	next = *t
	for b := range next {
		if next[b] >= states {
			next[b] = Foreign
		}
		is, was := next[b], last[b]
		quarantine[b] = is != was && (is == Shared || is == Draining || is == Foreign && was.Owned())
	}
	return next, quarantine
}

// EndQuarantine says that the former owner of a bucket has died within
// Quarantine of handing it over, so that its orphans get their RST now.
func (f *Filter) EndQuarantine(bucket int) { f.SetQuarantine(bucket, 0) }

// SetQuarantine quarantines a bucket until untilMono (CLOCK_MONOTONIC, nanoseconds), as
// a filter did whose table this one goes on with.
func (f *Filter) SetQuarantine(bucket int, untilMono int64) {
	f.change.Lock()
	defer f.change.Unlock()
	f.quarantine[bucket].Store(untilMono)
}

// Table gives a copy of the table in force.
func (f *Filter) Table() Table { return *f.table.Load() }

// Ports gives what is known of each TCP port, and of each UDP port: an affinity, and
// PortDisabled or PortLocal.
func (f *Filter) Ports() [2][65536]uint8 { return [2][65536]uint8{*f.tcp, *f.udp} }

// MaxFrame is the longest frame in bytes.
func (f *Filter) MaxFrame() int { return f.maxFrame }

// ResetPatience is how long after DelayRST the frame is to be judged again.
func (f *Filter) ResetPatience() time.Duration { return time.Duration(f.patience) * time.Millisecond }

// SetLease lets new flows in before untilMono (CLOCK_MONOTONIC, nanoseconds).
func (f *Filter) SetLease(untilMono int64) { f.lease.Store(untilMono) }

// Hold tells at nowMono (CLOCK_MONOTONIC, nanoseconds) of a TCP flow that the
// kernel has, and that is no half-open one of a stranger's: if this node opened
// it, its bucket is held, which an engine that starts anew could not know. It
// reports whether the bucket was free until now.
func (f *Filter) Hold(t Tuple, nowMono int64) bool {
	return f.Holds(t) && hold(&f.heldTCP, f.Bucket(t), nowMono, HoldTCP)
}

// Holds reports whether Hold holds the bucket of such a flow.
func (f *Filter) Holds(t Tuple) bool {
	return t.Proto == ProtoTCP && f.port(ProtoTCP, t.VIP.Port())&PortLocal != 0
}

// HoldAll holds a bucket for TCP and for datagrams, as flows that this node opens do.
func (f *Filter) HoldAll(bucket int, nowMono int64) {
	hold(&f.heldTCP, bucket, nowMono, HoldTCP)
	hold(&f.heldDatagram, bucket, nowMono, HoldDatagram)
}

// held is what packets of that protocol are held by.
func (f *Filter) held(proto uint8) *deadlines {
	if proto == ProtoTCP {
		return &f.heldTCP
	}
	return &f.heldDatagram
}

func isHeld(held *deadlines, bucket int, nowMono int64) bool { return nowMono < held[bucket].Load() }

// hold holds a bucket, for longer if it is held already, and tells whether it
// was free until now.
func hold(held *deadlines, bucket int, nowMono, length int64) bool {
	d := &held[bucket]
	until := d.Load()
	for until < nowMono+length-HoldSlack && !d.CompareAndSwap(until, nowMono+length) {
		until = d.Load()
	}
	return until <= nowMono
}

// Counters counts frames by verdict.
type Counters [Verdicts]uint64

// Counters gives a snapshot. Verdicts on frames in flight may be missing.
func (f *Filter) Counters() (c Counters) {
	for v := range c {
		c[v] = f.ingress.n[v].Load() + f.egress.n[v].Load()
	}
	return c
}

// counters has cache lines of its own: one goroutine receives while another
// sends.
type counters struct {
	_ [64]byte
	n [Verdicts]atomic.Uint64
	_ [64]byte
}

func (c *counters) count(v Verdict) Verdict {
	c.n[v].Add(1)
	return v
}
