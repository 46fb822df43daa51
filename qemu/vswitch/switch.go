package vswitch

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"slices"
	"sync"
	"time"
)

// Config is what a switch is made of. The zero value is a plain switch.
type Config struct {
	// Ageing is how long an address stays in the table after the last frame
	// from it. 0 means 5 minutes, the default of 802.1D table 7-5.
	Ageing time.Duration
	// MaxEntries bounds the table; addresses beyond it are not learnt, as in a
	// real switch that is full. 0 means 4096.
	MaxEntries int
	// MaxFrame is the longest frame that is switched, in bytes without FCS.
	// 0 means 1522: 1500 of payload, the header and two VLAN tags.
	MaxFrame int
	// SnoopARP makes the switch learn the sender's hardware address of ARP packets,
	// too, as switches do that answer or filter ARP by a table of their own.
	SnoopARP bool
	// Queue is how many frames wait for a slow port before more are dropped.
	// 0 means 1024.
	Queue int
	// Guard lists the addresses that must never be a source (I1).
	Guard []net.HardwareAddr
	// Mirror receives every frame that crosses the switch, as pcapng with one
	// interface per port. It is written with the switch locked, so it should be
	// a file: a reader that stalls stalls the switch.
	Mirror io.Writer
	// Seed makes the randomness of rules repeatable.
	Seed uint64
	// Now is the clock for ageing and timestamps; nil means time.Now. Delays of
	// rules always use real time.
	Now func() time.Time
	// Log may be nil.
	Log *slog.Logger
}

// Validate reports what is wrong with a configuration.
func (c Config) Validate() error {
	switch {
	case c.Ageing < 0 || c.MaxEntries < 0 || c.Queue < 0:
		return errors.New("switch: negative value")
	case c.MaxFrame != 0 && (c.MaxFrame < headerLen || c.MaxFrame > maxStream):
		return fmt.Errorf("switch: MaxFrame %d is not in %d to %d", c.MaxFrame, headerLen, maxStream)
	}
	for _, g := range c.Guard {
		if len(g) != 6 || g[0]&1 != 0 {
			return fmt.Errorf("switch: guarded address %q is not a unicast MAC address", g)
		}
	}
	return nil
}

// Switch is a running switch. All its methods may be called concurrently.
type Switch struct {
	cfg   Config
	log   *slog.Logger
	guard []mac

	wg   sync.WaitGroup // every goroutine of the switch and its ports
	done chan struct{}  // closed by Close
	wake chan struct{}  // a held frame became the first

	mu         sync.Mutex
	closed     bool
	fdb        *fdb
	ports      []*Port
	rules      []*rule
	held       heldQueue
	heldSeq    uint64
	holding    bool // releaseHeld runs
	mirror     *mirror
	watchers   []*watcher
	stats      Stats
	violations []Violation
}

// New makes a switch without ports. Close it to end its goroutines.
func New(cfg Config) (*Switch, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	if cfg.Ageing == 0 {
		cfg.Ageing = 5 * time.Minute
	}
	if cfg.MaxEntries == 0 {
		cfg.MaxEntries = 4096
	}
	if cfg.MaxFrame == 0 {
		cfg.MaxFrame = 1522
	}
	if cfg.Queue == 0 {
		cfg.Queue = 1024
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	s := &Switch{
		cfg:  cfg,
		log:  cfg.Log,
		done: make(chan struct{}),
		wake: make(chan struct{}, 1),
		fdb:  newFDB(cfg.Ageing, cfg.MaxEntries),
	}
	for _, g := range cfg.Guard {
		s.guard = append(s.guard, mac(g))
	}
	if cfg.Mirror != nil {
		s.mirror = newMirror(cfg.Mirror)
	}
	return s, nil
}

// Close disconnects every port, ends every goroutine and flushes the mirror. It
// returns the first error of the mirror: a capture with a hole is an error.
func (s *Switch) Close() error {
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return nil
	}
	s.closed = true
	close(s.done)
	ports := slices.Clone(s.ports)
	s.mu.Unlock()
	for _, p := range ports {
		p.shut()
	}
	s.wg.Wait()
	return s.FlushMirror()
}

// FlushMirror writes out what the mirror still buffers.
func (s *Switch) FlushMirror() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.mirror == nil {
		return nil
	}
	s.mirror.flush()
	return s.mirror.err
}

// Stats counts what a switch did. Every frame it received is in exactly one of
// the fields from Forwarded to LinkDown.
type Stats struct {
	Received  uint64 // frames from all ports
	Forwarded uint64 // sent to the one port where the destination was learnt
	Filtered  uint64 // the destination is on the port the frame came from
	Unknown   uint64 // flooded: unicast to an address not in the table
	Broadcast uint64 // flooded
	Multicast uint64 // flooded
	Reserved  uint64 // dropped: 01:80:c2:00:00:00 to 0f
	Malformed uint64 // dropped: runt, too long, group or zero source address
	RuleDrop  uint64 // dropped by a rule at Ingress
	LinkDown  uint64 // dropped: the port is cut

	GuardFloods uint64 // the part of Unknown that went to a guarded address
	Violations  uint64 // frames with a guarded address as source
	Moves       uint64 // an address appeared on another port
	TableFull   uint64 // an address could not be learnt
}

// Stats returns the counters of the whole switch.
func (s *Switch) Stats() Stats {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.stats
}

// Entry is one row of the MAC table.
type Entry struct {
	MAC     net.HardwareAddr
	Port    string
	Learned time.Time     // since when on this port
	Age     time.Duration // since the last frame
	Moves   uint64        // how often it changed ports
}

// Table returns the MAC table by port and address, without expired entries.
func (s *Switch) Table() []Entry {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := s.cfg.Now()
	var table []Entry
	for _, r := range s.fdb.rows(now) {
		table = append(table, Entry{
			MAC:     net.HardwareAddr(slices.Clone(r.mac[:])),
			Port:    s.ports[r.port].name,
			Learned: r.learned,
			Age:     now.Sub(r.seen),
			Moves:   r.moves,
		})
	}
	return table
}

// Lookup returns the name of the port where an address was learnt.
func (s *Switch) Lookup(addr net.HardwareAddr) (port string, ok bool) {
	for _, e := range s.Table() {
		if slices.Equal(e.MAC, addr) {
			return e.Port, true
		}
	}
	return "", false
}

// FlushTable forgets every learnt address.
func (s *Switch) FlushTable() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.fdb.flush(-1)
}

// Violation is a frame that had a guarded address as its Ethernet source.
type Violation struct {
	Time  time.Time
	Port  string // where it came in
	Frame []byte
}

// String is one line: when, where and what.
func (v Violation) String() string {
	return fmt.Sprintf("%s port %s: %s", v.Time.Format("15:04:05.000000"), v.Port, Describe(v.Frame))
}

// maxViolations is how many are kept; Stats.Violations counts on.
const maxViolations = 1000

// Violations returns the breaches of I1 so far, the first 1000 of them.
func (s *Switch) Violations() []Violation {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.violations)
}

// TB is what FailOnViolation needs of a *testing.T.
type TB interface {
	Helper()
	Cleanup(func())
	Errorf(format string, args ...any)
}

// FailOnViolation makes a test fail at its end if any frame broke I1. Call it
// right after New and before cleanups that may still send are registered: they
// then run earlier.
func (s *Switch) FailOnViolation(t TB) {
	t.Helper()
	t.Cleanup(func() {
		t.Helper()
		vs := s.Violations()
		for i, v := range vs {
			if i == 10 {
				t.Errorf("I1 violated: … %d more", s.Stats().Violations-10)
				return
			}
			t.Errorf("I1 violated: %s", v)
		}
	})
}

// AddRule installs a rule behind the others and returns what removes it.
func (s *Switch) AddRule(r Rule) (remove func(), err error) {
	if err := r.Validate(); err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil, net.ErrClosed
	}
	if !s.holding {
		s.holding = true
		s.wg.Add(1)
		go s.releaseHeld()
	}
	in := newRule(r, s.cfg.Seed)
	s.rules = append(s.rules, in)
	return func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.rules = slices.DeleteFunc(slices.Clone(s.rules), func(x *rule) bool { return x == in })
	}, nil
}

type watcher struct{ f func(Frame) }

// Frame is a frame as it crosses the switch.
type Frame struct {
	Time time.Time
	Port string // where it came in
	Data []byte
}

// Watch calls f for every frame that crosses the switch, in order, until stop is
// called. f runs with the switch locked: it must be quick, must not call the
// switch and must copy Data if it keeps it.
func (s *Switch) Watch(f func(Frame)) (stop func()) {
	w := &watcher{f}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.watchers = append(s.watchers, w)
	return func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.watchers = slices.DeleteFunc(slices.Clone(s.watchers), func(x *watcher) bool { return x == w })
	}
}

// WaitFrame returns the next frame that crosses the switch and matches.
func (s *Switch) WaitFrame(ctx context.Context, match func(Frame) bool) (Frame, error) {
	got := make(chan Frame, 1)
	stop := s.Watch(func(f Frame) {
		if len(got) == 0 && match(f) {
			f.Data = slices.Clone(f.Data)
			got <- f
		}
	})
	defer stop()
	select {
	case f := <-got:
		return f, nil
	case <-ctx.Done():
		return Frame{}, fmt.Errorf("waiting for a frame: %w", context.Cause(ctx))
	case <-s.done:
		return Frame{}, net.ErrClosed
	}
}

// receive takes a frame from a port and owns b.
func (s *Switch) receive(p *Port, b *buf) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		b.release()
		return
	}
	frame := b.frame()
	s.stats.Received++
	p.stats.RxFrames++
	p.stats.RxBytes += uint64(len(frame))
	// First of all: what a node sends counts, whatever becomes of it.
	s.checkGuardLocked(p, frame)
	switch {
	case p.cut:
		s.stats.LinkDown++
		p.stats.RxDropped++
		b.release()
		return
	case len(frame) > s.cfg.MaxFrame:
		s.stats.Malformed++
		p.stats.RxDropped++
		b.release()
		return
	}
	for _, r := range s.rules {
		match, act := r.treats(Ingress, p.name, "", frame, s.cfg.Now())
		if !match {
			continue
		}
		if !act {
			break
		}
		if r.Drop {
			s.stats.RuleDrop++
			p.stats.RxDropped++
			b.release()
			return
		}
		for range r.Duplicate {
			s.stats.Received++ // each copy has a fate of its own
			b.refs.Add(1)
			if d := r.delay(); d > 0 {
				s.holdLocked(b, p, Ingress, d)
			} else {
				s.bridgeLocked(p, b)
			}
		}
		if d := r.delay(); d > 0 {
			s.holdLocked(b, p, Ingress, d)
			return
		}
		break
	}
	s.bridgeLocked(p, b)
}

func (s *Switch) guarded(addr []byte) bool {
	for _, g := range s.guard {
		if mac(addr) == g {
			return true
		}
	}
	return false
}

func (s *Switch) checkGuardLocked(p *Port, frame []byte) {
	if len(frame) < 12 || !s.guarded(frame[6:12]) {
		return
	}
	s.stats.Violations++
	v := Violation{Time: s.cfg.Now(), Port: p.name, Frame: slices.Clone(frame)}
	if len(s.violations) < maxViolations {
		s.violations = append(s.violations, v)
		s.log.Error("guarded address as source", "violation", v.String())
	}
}

// bridgeLocked learns from a frame and sends it on. It owns b.
func (s *Switch) bridgeLocked(p *Port, b *buf) {
	defer b.release()
	frame, now := b.frame(), s.cfg.Now()
	if s.mirror != nil {
		comment := ""
		if len(frame) >= 12 && s.guarded(frame[6:12]) {
			comment = "I1 violation: guarded address as source"
		}
		s.mirror.write(p.id, now, frame, comment)
	}
	for _, w := range s.watchers {
		w.f(Frame{Time: now, Port: p.name, Data: frame})
	}
	act, out, l := s.fdb.decide(p.id, frame, now)
	if s.cfg.SnoopARP {
		if sender, ok := arpSender(frame); ok {
			s.fdb.learn(sender, p.id, now)
		}
	}
	switch l {
	case learntMove:
		s.stats.Moves++
		p.stats.Moves++
		s.log.Debug("address moved", "mac", mac(frame[6:12]), "to", p.name)
	case learntFull:
		s.stats.TableFull++
	}
	switch act {
	case actForward:
		s.stats.Forwarded++
		s.sendLocked(p, s.ports[out], b)
		return
	case actFilter:
		s.stats.Filtered++
		return
	case actReserved:
		s.stats.Reserved++
		p.stats.RxDropped++
		return
	case actRunt, actBadSource:
		s.stats.Malformed++
		p.stats.RxDropped++
		return
	case actUnknown:
		s.stats.Unknown++
		if s.guarded(frame[0:6]) {
			s.stats.GuardFloods++
		}
	case actBroadcast:
		s.stats.Broadcast++
	case actMulticast:
		s.stats.Multicast++
	}
	p.stats.RxFlooded++
	for _, to := range s.ports {
		if to != p {
			s.sendLocked(p, to, b)
		}
	}
}

// sendLocked passes one copy out of a port, through the rules.
func (s *Switch) sendLocked(from, to *Port, b *buf) {
	for _, r := range s.rules {
		match, act := r.treats(Egress, from.name, to.name, b.frame(), s.cfg.Now())
		if !match {
			continue
		}
		if !act {
			break
		}
		if r.Drop {
			to.stats.TxRuleDrop++
			return
		}
		for range 1 + r.Duplicate {
			b.refs.Add(1)
			if d := r.delay(); d > 0 {
				s.holdLocked(b, to, Egress, d)
			} else {
				s.enqueueLocked(to, b)
			}
		}
		return
	}
	b.refs.Add(1)
	s.enqueueLocked(to, b)
}

// enqueueLocked puts a frame into a port's queue and owns b.
func (s *Switch) enqueueLocked(p *Port, b *buf) {
	if s.closed || !p.up() {
		p.stats.TxLinkDown++
		b.release()
		return
	}
	select {
	case p.out <- b:
		p.stats.TxFrames++
		p.stats.TxBytes += uint64(len(b.frame()))
	default:
		p.stats.TxDropped++
		b.release()
	}
}
