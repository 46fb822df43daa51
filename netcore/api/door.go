package api

import (
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// door is before TLS: it bounds how many connections there are, of whom, and how
// many come in a second. What strangers share among them takes nothing from those who
// have shown a certificate lately, and what those share who may only look takes nothing
// from those who control, nor from the cluster's nodes.
type door struct {
	limits  Limits
	peers   func() []Peer
	refused atomic.Uint64

	mu        sync.Mutex
	strangers []*guest // the oldest first
	clients   share    // all that have shown a certificate
	readers   share    // of these, with a read-only one
	holders   map[holder]*share
	sources   map[netip.Prefix]*source
	all       bucket // of the sources that are strange
	looking   bucket // of those that have shown a read-only certificate
	nodes     map[netip.Addr]bool
	nodesAt   time.Time
}

// share is what some clients have of the limits together.
type share struct {
	connections, streams int
	asked                bucket
}

// holder is a read-only certificate: its hash.
type holder [sha256.Size]byte

// standing is what a source has shown: the order is that of trust.
type standing int

const (
	strange standing = iota
	looks            // a read-only certificate
	trusted          // one for control; or it is a node's
)

// source is an address, or an IPv6 /64, within which a stranger may choose. A node of
// the cluster is one by itself.
type source struct {
	guests  int
	readers int // of these, with a read-only certificate
	comes   bucket
	rarely  bucket                 // has tokens for a source that seldom comes
	shown   [trusted + 1]time.Time // when a certificate was shown last
}

const (
	// trustFor is how long it counts that a source has shown a certificate, and
	// mostTrusted of how many that is known, for each kind of certificate.
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
	came    standing    // of its source, when it came
	late    *time.Timer // ends it, as long as it is a stranger's
	// By the certificate that it has shown:
	role   Role
	shares []*share
	asked  bucket
}

func newDoor(l Limits, peers func() []Peer) *door {
	return &door{limits: l, peers: peers, sources: map[netip.Prefix]*source{}, holders: map[holder]*share{}}
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
	as := s.standing(now)
	if isNode {
		as = trusted
	}
	if !d.mayCome(s, as, now) {
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
		d.end(d.strangers[d.leastWelcome()])
	}
	g := &guest{Conn: c, door: d, from: from, came: as}
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

// leastWelcome is the stranger's connection that makes place for another one: the oldest
// of those that are not trusted, and of these one that looks if those have more than
// half of the places.
func (d *door) leastWelcome() int {
	looking := 0
	for _, g := range d.strangers {
		if g.came == looks {
			looking++
		}
	}
	goes := strange
	if looking > d.limits.Strangers/2 {
		goes = looks
	}
	i := slices.IndexFunc(d.strangers, func(g *guest) bool { return g.came == goes })
	if i < 0 {
		i = slices.IndexFunc(d.strangers, func(g *guest) bool { return g.came != trusted })
	}
	return max(0, i)
}

// mayCome says whether one more connection of a source fits into the rates.
func (d *door) mayCome(s *source, as standing, now time.Time) bool {
	rate := d.limits.NewPerSecond
	if !s.comes.take(now, rate/5, rate/2) {
		return false
	}
	switch as {
	case trusted:
		return true
	case looks:
		return d.looking.take(now, rate/2, rate/2)
	}
	burst := rate / 2 // the rest of it is for those who seldom come
	if s.rarely.take(now, rareRate, rareBurst) {
		burst = rate
	}
	return d.all.take(now, rate, burst)
}

func (s *source) standing(now time.Time) standing {
	for as := trusted; as > strange; as-- {
		if s.showed(as, now) {
			return as
		}
	}
	return strange
}

func (s *source) showed(as standing, now time.Time) bool {
	return !s.shown[as].IsZero() && now.Sub(s.shown[as]) < trustFor
}

// trust notes that a certificate was shown; if there are too many, the source of which
// that is the longest ago loses it. d.mu is held.
func (d *door) trust(s *source, as standing, now time.Time) {
	if !s.showed(as, now) {
		n, oldest := 0, s
		for _, o := range d.sources {
			if o.showed(as, now) {
				n++
				if oldest == s || o.shown[as].Before(oldest.shown[as]) {
					oldest = o
				}
			}
		}
		if n >= mostTrusted {
			oldest.shown[as] = time.Time{}
		}
	}
	s.shown[as] = now
}

// forget drops what is known of strangers' sources that have no connection.
func (d *door) forget(now time.Time) {
	for from, s := range d.sources {
		if s.guests == 0 && s.standing(now) == strange {
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
	s := d.sources[g.from]
	if s != nil {
		s.guests--
	}
	if !g.isKnown {
		if i := slices.Index(d.strangers, g); i >= 0 {
			d.strangers = slices.Delete(d.strangers, i, i+1)
		}
		return
	}
	for _, of := range g.shares {
		of.connections--
	}
	if g.role == RoleReadOnly && s != nil {
		s.readers--
	}
}

// known says which certificate the connection has shown; false: too many have.
func (g *guest) known(role Role, cert *x509.Certificate) bool {
	d, now := g.door, time.Now()
	d.mu.Lock()
	defer d.mu.Unlock()
	if g.isKnown || g.gone {
		return g.isKnown
	}
	s, as, shares := d.sources[g.from], trusted, d.sharesOf(role, cert, now)
	if role == RoleReadOnly {
		as = looks
	}
	if s != nil {
		d.trust(s, as, now)
	}
	if !fits(shares, d.limits.Connections, func(of *share) int { return of.connections }) || as == looks && s != nil && s.readers >= max(1, d.limits.PerSource*3/4) {
		d.refused.Add(1)
		return false
	}
	if i := slices.Index(d.strangers, g); i >= 0 {
		d.strangers = slices.Delete(d.strangers, i, i+1)
	}
	g.isKnown, g.role, g.shares = true, role, shares
	g.late.Stop()
	for _, of := range shares {
		of.connections++
	}
	if as == looks && s != nil {
		s.readers++
	}
	return true
}

// sharesOf are those that a certificate has a part in: a limit is for the first, half of
// it for the second, and a quarter for the third. Those of certificates that nobody shows
// any more are forgotten. d.mu is held.
func (d *door) sharesOf(role Role, cert *x509.Certificate, now time.Time) []*share {
	if role != RoleReadOnly {
		return []*share{&d.clients}
	}
	for h, of := range d.holders {
		if of.connections == 0 && of.streams == 0 && now.Sub(of.asked.last) > time.Minute {
			delete(d.holders, h)
		}
	}
	h := holder(sha256.Sum256(cert.Raw))
	if d.holders[h] == nil {
		d.holders[h] = &share{}
	}
	return []*share{&d.clients, &d.readers, d.holders[h]}
}

// fits says whether there is place for one more.
func fits(shares []*share, most int, has func(*share) int) bool {
	for i, of := range shares {
		if has(of) >= max(1, most>>i) {
			return false
		}
	}
	return true
}

// stream takes one of the places for what goes on; who has not come by the door is a
// client among others.
func (d *door) stream(g *guest) (leave func(), err error) {
	shares := []*share{&d.clients}
	if g != nil {
		shares = g.shares
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if !fits(shares, d.limits.Streams, func(of *share) int { return of.streams }) {
		return nil, problem{http.StatusServiceUnavailable, errors.New("too many clients follow this node already")}
	}
	for _, of := range shares {
		of.streams++
	}
	return func() {
		d.mu.Lock()
		defer d.mu.Unlock()
		for _, of := range shares {
			of.streams--
		}
	}, nil
}

// asks says that a request has come; false: too many have. A node is not bounded, as
// each bounds those whom it asks for.
func (g *guest) asks() bool {
	if g.role == RoleNode {
		return true
	}
	now, rate := time.Now(), g.door.limits.Requests
	g.door.mu.Lock()
	defer g.door.mu.Unlock()
	if !g.asked.take(now, rate, 2*rate) {
		return false
	}
	if g.role != RoleReadOnly {
		return true
	}
	all, one := g.shares[1], g.shares[2]
	return one.asked.take(now, 2*rate, 4*rate) && all.asked.take(now, 4*rate, 8*rate)
}

// owes counts n more requests, which the last one makes of other nodes.
func (g *guest) owes(n int) {
	if g == nil || g.role != RoleReadOnly {
		return
	}
	g.door.mu.Lock()
	defer g.door.mu.Unlock()
	for _, of := range g.shares[1:] {
		of.asked.spent += float64(n)
	}
}

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
