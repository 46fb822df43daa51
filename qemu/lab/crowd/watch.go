package crowd

import (
	"encoding/binary"
	"net/netip"
	"slices"
	"sync"
	"time"

	"clonecluster/qemu/vswitch"
)

// Attempt is the beginning of a connection as it crossed the switch.
type Attempt struct {
	SYNs int // that the client sent until one was answered, the answered one included
	// Lost is when the last SYN went that nobody answered, zero if the first one
	// was answered.
	Lost time.Time
	// Holders are the ports of the switch where an answer came in, in order. One
	// is right, and it is the node that holds the connection.
	Holders []string
}

// Holder is the port of the node that answered first, empty if none did.
func (a Attempt) Holder() string {
	if len(a.Holders) == 0 {
		return ""
	}
	return a.Holders[0]
}

// Double is a connection that two nodes have answered.
type Double struct {
	Client netip.AddrPort
	First  string // port of the switch
	Second string
	After  time.Duration // between the two answers
}

// maxDoubles bounds what a cluster that is quite broken can cost.
const maxDoubles = 1000

// watch follows the handshakes between clients and the target.
type watch struct {
	target netip.AddrPort

	mu      sync.Mutex
	begun   map[netip.AddrPort]*begun // by the client's address: at most as many as there are ports
	doubles []Double
}

type begun struct {
	Attempt
	isn      uint32
	last     time.Time // the last SYN
	answered time.Time
}

func newWatch(target netip.AddrPort) *watch {
	return &watch{target: target, begun: map[netip.AddrPort]*begun{}}
}

// frame takes a frame that crosses the switch.
func (w *watch) frame(f vswitch.Frame) {
	s, ok := parseSYN(f.Data)
	if !ok {
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	switch {
	case !s.ack && s.dst == w.target:
		b := w.begun[s.src]
		if b == nil || b.isn != s.seq {
			b = &begun{isn: s.seq}
			w.begun[s.src] = b
		}
		if len(b.Holders) == 0 {
			b.SYNs++
			b.Lost = b.last
		}
		b.last = f.Time
	case s.ack && s.src == w.target:
		b := w.begun[s.dst]
		if b == nil || b.isn+1 != s.ackSeq || slices.Contains(b.Holders, f.Port) {
			return
		}
		if len(b.Holders) == 0 {
			b.answered = f.Time
		} else if len(w.doubles) < maxDoubles {
			w.doubles = append(w.doubles, Double{s.dst, b.Holders[0], f.Port, f.Time.Sub(b.answered)})
		}
		b.Holders = append(b.Holders, f.Port)
	}
}

func (w *watch) attempt(client netip.AddrPort) Attempt {
	w.mu.Lock()
	defer w.mu.Unlock()
	b := w.begun[client]
	if b == nil {
		return Attempt{}
	}
	a := b.Attempt
	a.Holders = slices.Clone(a.Holders)
	return a
}

// answerTime is what a SYN may take to be answered, when nodes are emulated: one sent
// before that and not answered is lost. It is less than a client waits before it
// sends another.
const answerTime = 500 * time.Millisecond

// lost is when the last SYN went that was sent in [since, until) and that nobody has
// answered; zero if there is none. It counts those, too, whose client still waits or
// has given up.
func (w *watch) lost(since, until, now time.Time) (last time.Time) {
	w.mu.Lock()
	defer w.mu.Unlock()
	consider := func(t time.Time) {
		if !t.Before(since) && t.Before(until) && t.After(last) {
			last = t
		}
	}
	for _, b := range w.begun {
		consider(b.Lost)
		if len(b.Holders) == 0 && now.Sub(b.last) > answerTime {
			consider(b.last)
		}
	}
	return last
}

func (w *watch) doubled() []Double {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Clone(w.doubles)
}

// syn is a segment with SYN set (RFC 9293, section 3.1).
type syn struct {
	src, dst    netip.AddrPort
	seq, ackSeq uint32
	ack         bool
}

// parseSYN reads an untagged Ethernet frame without IPv6 extension headers, which
// is all that the hosts here send with a SYN.
func parseSYN(f []byte) (s syn, ok bool) {
	const eth, tcp = 14, 20
	if len(f) < eth {
		return s, false
	}
	var src, dst netip.Addr
	ip := f[eth:]
	switch binary.BigEndian.Uint16(f[12:]) {
	case 0x0800:
		if len(ip) < 20 || ip[0]>>4 != 4 || ip[9] != 6 || binary.BigEndian.Uint16(ip[6:])&0x1fff != 0 {
			return s, false
		}
		header := int(ip[0]&15) * 4
		if header < 20 || len(ip) < header {
			return s, false
		}
		src, dst, ip = netip.AddrFrom4([4]byte(ip[12:])), netip.AddrFrom4([4]byte(ip[16:])), ip[header:]
	case 0x86dd:
		if len(ip) < 40 || ip[0]>>4 != 6 || ip[6] != 6 {
			return s, false
		}
		src, dst, ip = netip.AddrFrom16([16]byte(ip[8:])), netip.AddrFrom16([16]byte(ip[24:])), ip[40:]
	default:
		return s, false
	}
	const flagSYN, flagRST, flagACK = 0x02, 0x04, 0x10
	if len(ip) < tcp || ip[13]&flagSYN == 0 || ip[13]&flagRST != 0 {
		return s, false
	}
	return syn{
		src:    netip.AddrPortFrom(src, binary.BigEndian.Uint16(ip)),
		dst:    netip.AddrPortFrom(dst, binary.BigEndian.Uint16(ip[2:])),
		seq:    binary.BigEndian.Uint32(ip[4:]),
		ackSeq: binary.BigEndian.Uint32(ip[8:]),
		ack:    ip[13]&flagACK != 0,
	}, true
}
