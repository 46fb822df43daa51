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
// many come in a second. What strangers share among them takes nothing from those who
// have shown a certificate lately, nor from the cluster's nodes.
type door struct {
	limits  Limits
	peers   func() []Peer
	refused atomic.Uint64

	mu        sync.Mutex
	strangers []*guest // the oldest first
	clients   int
	sources   map[netip.Prefix]*source
	all       bucket // of the sources that are not trusted
	nodes     map[netip.Addr]bool
	nodesAt   time.Time
}

// source is an address, or an IPv6 /64, within which a stranger may choose. A node of
// the cluster is one by itself.
type source struct {
	guests int
	comes  bucket
	rarely bucket    // has tokens for a source that seldom comes
	shown  time.Time // when a certificate was shown last
}

const (
	// trustFor is how long a source is trusted that has shown a certificate, and
	// mostTrusted of how many that is known.
	trustFor    = time.Hour
	mostTrusted = 256
	// Who comes so seldom is let in before the others who are not trusted: an operator
	// comes for the first time, too, and a flood does so only for a moment.
	rareRate, rareBurst = 0.1, 3
	// nodesFor is how long the nodes' addresses hold before they are looked up again.
	nodesFor = time.Second
)

// guest is a connection.
type guest struct {
	net.Conn
	door    *door
	from    netip.Prefix
	isKnown bool
	gone    bool
	trusted bool
	late    *time.Timer // ends it, as long as it is a stranger's
	asked   bucket      // of one goroutine
}

func newDoor(l Limits, peers func() []Peer) *door {
	return &door{limits: l, peers: peers, sources: map[netip.Prefix]*source{}}
}

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
	d.mu.Lock()
	defer d.mu.Unlock()
	from, isNode := d.sourceOf(c.RemoteAddr(), now)
	s := d.sources[from]
	if s == nil {
		if len(d.sources) >= 4096 {
			d.forget(now)
		}
		s = &source{}
		d.sources[from] = s
	}
	trusted := isNode || s.trusted(now)
	if !d.mayCome(s, trusted, now) {
		return nil
	}
	here := 0
	for _, g := range d.strangers {
		if g.from == from {
			here++
		}
	}
	switch {
	case here > 0 && (here >= d.limits.PerSource/2 || s.guests >= d.limits.PerSource):
		d.end(d.strangers[slices.IndexFunc(d.strangers, func(g *guest) bool { return g.from == from })])
	case s.guests >= d.limits.PerSource:
		return nil
	}
	if len(d.strangers) >= d.limits.Strangers {
		d.end(d.strangers[max(0, slices.IndexFunc(d.strangers, func(g *guest) bool { return !g.trusted }))])
	}
	g := &guest{Conn: c, door: d, from: from, trusted: trusted}
	g.late = time.AfterFunc(d.limits.Show, func() {
		d.mu.Lock()
		defer d.mu.Unlock()
		if !g.gone && !g.isKnown {
			d.end(g)
		}
	})
	s.guests++
	d.strangers = append(d.strangers, g)
	return g
}

// mayCome says whether one more connection of a source fits into the rates.
func (d *door) mayCome(s *source, trusted bool, now time.Time) bool {
	rate := d.limits.NewPerSecond
	if !s.comes.take(now, rate/5, rate/2) {
		return false
	}
	if trusted {
		return true
	}
	burst := rate / 2 // the rest of it is for those who seldom come
	if s.rarely.take(now, rareRate, rareBurst) {
		burst = rate
	}
	return d.all.take(now, rate, burst)
}

func (s *source) trusted(now time.Time) bool {
	return !s.shown.IsZero() && now.Sub(s.shown) < trustFor
}

// trust notes that a certificate was shown; if there are too many, the source of which
// that is the longest ago is a stranger again. d.mu is held.
func (d *door) trust(s *source, now time.Time) {
	if !s.trusted(now) {
		n, oldest := 0, s
		for _, o := range d.sources {
			if o.trusted(now) {
				n++
				if oldest == s || o.shown.Before(oldest.shown) {
					oldest = o
				}
			}
		}
		if n >= mostTrusted {
			oldest.shown = time.Time{}
		}
	}
	s.shown = now
}

// forget drops what is known of strangers' sources that have no connection.
func (d *door) forget(now time.Time) {
	for from, s := range d.sources {
		if s.guests == 0 && !s.trusted(now) {
			delete(d.sources, from)
		}
	}
}

// end ends a stranger's connection, which has to make place; d.mu is held.
func (d *door) end(g *guest) {
	d.leave(g)
	d.refused.Add(1)
	_ = g.Conn.Close()
}

// leave takes a connection off the books; d.mu is held.
func (d *door) leave(g *guest) {
	if g.gone {
		return
	}
	g.gone = true
	g.late.Stop()
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
	g.late.Stop()
	d.clients++
	if s := d.sources[g.from]; s != nil {
		d.trust(s, time.Now())
	}
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

// sourceOf gives the source of an address, and whether it is a node's; d.mu is held.
func (d *door) sourceOf(a net.Addr, now time.Time) (from netip.Prefix, isNode bool) {
	ap, err := netip.ParseAddrPort(a.String())
	if err != nil {
		return netip.Prefix{}, false
	}
	if d.nodes == nil || now.Sub(d.nodesAt) >= nodesFor {
		d.nodes, d.nodesAt = map[netip.Addr]bool{}, now
		for _, p := range d.peers() {
			for _, at := range p.Addresses {
				d.nodes[plain(at.Addr())] = true
			}
		}
	}
	addr := plain(ap.Addr())
	isNode = d.nodes[addr]
	bits := addr.BitLen()
	if addr.Is6() && !isNode && !addr.IsLinkLocalUnicast() { // those are of one segment, and of one node each
		bits = 64
	}
	from, _ = addr.Prefix(bits)
	return from, isNode
}

func plain(a netip.Addr) netip.Addr { return a.Unmap().WithZone("") }

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
