package api

import (
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// door is before TLS: it bounds how many connections there are, of whom, and how
// many come in a second.
type door struct {
	limits  Limits
	refused atomic.Uint64

	mu        sync.Mutex
	strangers []*guest // the oldest first
	clients   int
	sources   map[netip.Prefix]*source
	all       bucket
}

// source is an address, or an IPv6 /64, within which a stranger may choose.
type source struct {
	guests int
	comes  bucket
}

// guest is a connection.
type guest struct {
	net.Conn
	door    *door
	from    netip.Prefix
	isKnown bool
	gone    bool
	asked   bucket // of one goroutine
}

func newDoor(l Limits) *door { return &door{limits: l, sources: map[netip.Prefix]*source{}} }

// at gives a listener behind the door.
func (d *door) at(l net.Listener) net.Listener { return &guarded{l, d} }

type guarded struct {
	net.Listener
	door *door
}

func (l *guarded) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		if g := l.door.enter(c, time.Now()); g != nil {
			return g, nil
		}
		l.door.refused.Add(1)
		_ = c.Close()
	}
}

// enter lets a connection in, or not (nil). If there is no place for a stranger, the
// one that has been there the longest goes: a client shows its certificate within
// milliseconds, and who is slow on purpose does not.
func (d *door) enter(c net.Conn, now time.Time) *guest {
	from := sourceOf(c.RemoteAddr())
	d.mu.Lock()
	defer d.mu.Unlock()
	s := d.sources[from]
	if s == nil {
		if len(d.sources) >= 4096 {
			d.forget()
		}
		s = &source{}
		d.sources[from] = s
	}
	rate := d.limits.NewPerSecond
	if s.guests >= d.limits.PerSource || !s.comes.take(now, rate/5, rate/2) || !d.all.take(now, rate, rate) {
		return nil
	}
	if len(d.strangers) >= d.limits.Strangers {
		oldest := d.strangers[0]
		d.leave(oldest)
		d.refused.Add(1)
		_ = oldest.Conn.Close()
	}
	g := &guest{Conn: c, door: d, from: from}
	s.guests++
	d.strangers = append(d.strangers, g)
	return g
}

// forget drops what is known of sources that have no connection.
func (d *door) forget() {
	for from, s := range d.sources {
		if s.guests == 0 {
			delete(d.sources, from)
		}
	}
}

// leave takes a connection off the books; d.mu is held.
func (d *door) leave(g *guest) {
	if g.gone {
		return
	}
	g.gone = true
	if s := d.sources[g.from]; s != nil {
		s.guests--
	}
	if g.isKnown {
		d.clients--
	} else if i := slices.Index(d.strangers, g); i >= 0 {
		d.strangers = slices.Delete(d.strangers, i, i+1)
	}
}

// known says that the connection has shown a certificate; false: too many have.
func (g *guest) known() bool {
	d := g.door
	d.mu.Lock()
	defer d.mu.Unlock()
	switch {
	case g.isKnown:
		return true
	case g.gone || d.clients >= d.limits.Connections:
		return false
	}
	if i := slices.Index(d.strangers, g); i >= 0 {
		d.strangers = slices.Delete(d.strangers, i, i+1)
	}
	g.isKnown = true
	d.clients++
	return true
}

// asks says that a request has come; false: too many have.
func (g *guest) asks(rate float64) bool { return g.asked.take(time.Now(), rate, 2*rate) }

func (g *guest) Close() error {
	g.door.mu.Lock()
	g.door.leave(g)
	g.door.mu.Unlock()
	return g.Conn.Close()
}

func sourceOf(a net.Addr) netip.Prefix {
	ap, err := netip.ParseAddrPort(a.String())
	if err != nil {
		return netip.Prefix{}
	}
	addr, bits := ap.Addr().Unmap().WithZone(""), 32
	if addr.Is6() {
		bits = 64
		if addr.IsLinkLocalUnicast() { // of one segment, and of one node each
			bits = 128
		}
	}
	p, _ := addr.Prefix(bits)
	return p
}

// bucket is a token bucket; the zero value is full.
type bucket struct {
	spent float64
	last  time.Time
}

// take takes a token, of which rate come in a second, and burst at most are there.
func (b *bucket) take(now time.Time, rate, burst float64) bool {
	if d := now.Sub(b.last); d > 0 {
		b.spent, b.last = max(0, b.spent-rate*d.Seconds()), now
	}
	if b.spent+1 > max(burst, 1) {
		return false
	}
	b.spent++
	return true
}
