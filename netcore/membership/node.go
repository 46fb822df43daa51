package membership

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"clonecluster/netcore/realtime"
)

// NodeConfig is what a Node needs from its surroundings.
type NodeConfig struct {
	Machine Config // its Self is ID and a new incarnation
	ID      NodeID
	Codec   *Codec
	Link    *Link
	Logger  *slog.Logger
	Now     func() int64 // the clock of the filter's lease

	// Apply puts the table, the lease and the ends of quarantine into effect;
	// it returns at once.
	Apply func(Actions)
	// Announce tells the segment that the VIP is here.
	Announce func()
	// Flows looks up the buckets in which the kernel has flows of the VIP, and
	// how many of them are more than a TIME-WAIT remainder.
	Flows func() (Bits, int, error)
	// Changed, if set, is told every change of the view.
	Changed func(View)
	// Noted, if set, is told what happened, but nothing of what Refused says more
	// than once in a while. It returns at once.
	Noted func(Note)
	// Urgent is for the thread that speaks with the others ([realtime.Thread]);
	// without it the thread is as the process is.
	Urgent bool
}

// Counters count frames: first those that had no effect.
type Counters struct {
	Malformed, OtherVersion, OtherCluster, Unauthentic uint64
	Ignored                                            uint64 // authentic, but replayed, of this node's own MAC, or one node too many
	Sent                                               uint64 // beacons
	Heard                                              uint64 // authentic frames of others
	Missed                                             uint64 // by the gaps in their numbers
}

// Node runs the machine.
type Node struct {
	cfg     NodeConfig
	events  chan Event
	poll    chan int64 // when the flows were asked for last
	machine *Machine

	status    atomic.Pointer[View]
	published int64
	alive     atomic.Int64
	active    atomic.Int64 // flows at the last look
	drained   atomic.Bool
	draining  atomic.Bool // as it was told last
	load      atomic.Pointer[LoadSeen]
	changed   chan struct{} // closed and replaced when drained or active may have changed
	changeMu  sync.Mutex

	cards        cards
	cardSequence uint64

	assemblers map[NodeID]*Assembler
	numbers    map[Peer]uint64 // the highest of each node
	frame      [MaxFrame + 1]byte

	malformed, otherVersion, otherCluster, unauthentic, ignored, sent, heard, missed atomic.Uint64

	// What anyone can make the node say, and what takes the key. The first may
	// not silence the second.
	strangers, members           onceLog
	strangersFound, membersFound refusals
}

// NewNode prepares a node; Run starts it.
func NewNode(cfg NodeConfig) (*Node, error) {
	flows, active, err := cfg.Flows()
	if err != nil {
		return nil, err
	}
	if cfg.Machine.Self, err = newPeer(cfg.ID); err != nil {
		return nil, err
	}
	cfg.Machine.Flows = flows
	n := &Node{
		cfg: cfg, events: make(chan Event, 64), poll: make(chan int64, 1), changed: make(chan struct{}),
		machine: New(cfg.Machine, cfg.Now()), assemblers: map[NodeID]*Assembler{}, numbers: map[Peer]uint64{},
	}
	n.active.Store(int64(active))
	v := n.machine.View()
	n.status.Store(&v)
	t := n.machine.Table()
	cfg.Apply(Actions{Table: &t})
	return n, nil
}

func newPeer(id NodeID) (Peer, error) {
	var b [8]byte
	if _, err := rand.Read(b[:]); err != nil {
		return Peer{}, fmt.Errorf("choosing an incarnation: %w", err)
	}
	return Peer{ID: id, Incarnation: binary.BigEndian.Uint64(b[:])}, nil
}

// View is what the node goes by now; up to an interval old.
func (n *Node) View() View { return *n.status.Load() }

// Alive is when the node last did a step, on the clock of NodeConfig.Now.
func (n *Node) Alive() int64 { return n.alive.Load() }

// Counters gives the numbers of frames since the start.
func (n *Node) Counters() Counters {
	return Counters{
		Malformed: n.malformed.Load(), OtherVersion: n.otherVersion.Load(), OtherCluster: n.otherCluster.Load(), Unauthentic: n.unauthentic.Load(),
		Ignored: n.ignored.Load(), Sent: n.sent.Load(), Heard: n.heard.Load(), Missed: n.missed.Load(),
	}
}

// SetCarrier tells the node about its NIC's link.
func (n *Node) SetCarrier(ctx context.Context, up bool) { n.tell(ctx, Carrier{up}) }

// SetHealth says whether the node's services pass their checks.
func (n *Node) SetHealth(ctx context.Context, ok bool) { n.tell(ctx, Health{ok}) }

// SetLoad says how busy the node is. That has time until the next beacon.
func (n *Node) SetLoad(load LoadSeen) { n.load.Store(&load) }

// SetID gives the node the NIC's new address.
func (n *Node) SetID(ctx context.Context, id NodeID) {
	if p, err := newPeer(id); err == nil {
		n.tell(ctx, Rename{p})
	}
}

func (n *Node) tell(ctx context.Context, ev Event) {
	select {
	case n.events <- ev:
		n.cfg.Link.Wake()
	case <-ctx.Done():
	}
}

// Progress is how far a drain has come.
type Progress struct {
	Draining bool // the node was told to drain
	Owned    bool // it still owns buckets
	Flows    int  // connections of the VIP that it has
}

// Progress gives it.
func (n *Node) Progress() Progress {
	return Progress{Draining: n.draining.Load(), Owned: !n.drained.Load(), Flows: int(n.active.Load())}
}

// Drain gives the node's buckets to the others and returns; see Progress.
func (n *Node) Drain(ctx context.Context) {
	n.draining.Store(true)
	n.tell(ctx, Drain{On: true})
}

// Resume takes part again after Drain.
func (n *Node) Resume(ctx context.Context) {
	n.draining.Store(false)
	n.tell(ctx, Drain{On: false})
}

// StandAside has this node own nothing that another could take, until it no longer has to.
func (n *Node) StandAside(ctx context.Context, on bool) { n.tell(ctx, StandAside{On: on}) }

// Order changes what holds at run time, and gives the settings that follow. The error
// is that of ctx, or that the order cannot be followed.
func (n *Node) Order(ctx context.Context, o Order) (*Settings, error) {
	before := n.View().Settings
	if before.apply(o, n.cfg.ID) == nil {
		return nil, errSettings
	}
	n.tell(ctx, o)
	n.await(ctx, func() bool { return n.View().Settings != before })
	return n.View().Settings, ctx.Err()
}

// Leave gives this node's buckets to the others, calls given (if not nil) when it
// owns none any more, waits until its flows have ended or ctx has, and says that
// the node is gone.
func (n *Node) Leave(ctx context.Context, given func()) {
	last := context.WithoutCancel(ctx)
	n.tell(last, Drain{On: true})
	// If nobody takes over, the node cannot wait for it.
	handover, cancel := context.WithTimeout(ctx, 2*n.cfg.Machine.Params.Dead)
	n.await(handover, func() bool { return n.drained.Load() })
	cancel()
	n.tell(last, Stop{})
	if given != nil {
		given()
	}
	n.await(ctx, func() bool { return n.drained.Load() && n.active.Load() == 0 })
	n.sayLast(last, Leave{})
}

// Restart gives this node's buckets to the others, if there are any that take
// part, and says that another engine will be there in a moment for its flows.
func (n *Node) Restart(ctx context.Context) {
	last := context.WithoutCancel(ctx)
	if slices.ContainsFunc(n.View().Members, func(m Member) bool { return !m.Self && m.Live && m.State.takesPart() }) {
		n.tell(last, Drain{On: true})
		handover, cancel := context.WithTimeout(ctx, 2*n.cfg.Machine.Params.Dead)
		n.await(handover, func() bool { return n.drained.Load() })
		cancel()
	}
	n.sayLast(last, Restart{})
}

// sayLast says the node's last word, also when nobody waits for it any more:
// without it the node would be missed.
func (n *Node) sayLast(ctx context.Context, word Event) {
	for range 3 { // one may be lost
		n.tell(ctx, word)
	}
	said, cancel := context.WithTimeout(ctx, n.cfg.Machine.Params.Interval)
	defer cancel()
	n.await(said, func() bool { return len(n.events) == 0 })
}

// await returns when cond holds or ctx has ended.
func (n *Node) await(ctx context.Context, cond func() bool) {
	for {
		n.changeMu.Lock()
		changed := n.changed
		n.changeMu.Unlock()
		if cond() {
			return
		}
		select {
		case <-ctx.Done():
			return
		case <-changed:
		}
	}
}

func (n *Node) signal() {
	n.changeMu.Lock()
	defer n.changeMu.Unlock()
	close(n.changed)
	n.changed = make(chan struct{})
}

// Run takes part until ctx ends (nil) or the socket fails.
func (n *Node) Run(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return n.loop(ctx) })
	g.Go(func() error { n.pollFlows(ctx); return nil })
	g.Go(func() error {
		<-ctx.Done()
		n.cfg.Link.Wake()
		return nil
	})
	return g.Wait()
}

// loop is the one thread that speaks with the others, so that a busy machine
// does not fake its death: it runs before others, waits in the kernel and
// not in Go's scheduler, and nothing in it blocks.
func (n *Node) loop(ctx context.Context) error {
	runtime.LockOSThread() // and never unlocked: the thread ends with the loop
	if n.cfg.Urgent {
		switch deadline, err := realtime.Thread(); {
		case err != nil:
			n.cfg.Logger.Warn("no urgent thread: on a busy machine this node may be taken for dead", "error", err)
		case !deadline:
			n.cfg.Logger.Info("the thread for beacons has no deadline but nice -20: this process is bound to some of the processors, or too many threads have one")
		}
	}
	next := n.step(Tick{})
	for ctx.Err() == nil {
		n.cfg.Link.wait(time.Duration(next - n.cfg.Now()))
		busy := true
		for range 256 {
			size, err := n.cfg.Link.receive(n.frame[:])
			if err != nil {
				return fmt.Errorf("receiving beacons: %w", err)
			}
			if size == 0 {
				busy = false
				break
			}
			if ev := n.read(n.frame[:size]); ev != nil {
				next = n.step(ev)
			}
		}
		told := false
		for pending := true; pending; {
			select {
			case ev := <-n.events:
				next, told = n.step(ev), true
			default:
				pending = false
			}
		}
		if told { // not all that Leave waits for is news of the view
			n.signal()
		}
		// Even under a flood of frames beacons go out in time.
		if busy || next <= n.cfg.Now() {
			if load := n.load.Swap(nil); load != nil {
				n.step(*load)
			}
			next = n.step(Tick{})
		}
	}
	return nil
}

// read gives the event of a frame; nil if it has none.
func (n *Node) read(frame []byte) Event {
	if isCard(frame) {
		if card, err := n.cfg.Codec.DecodeCard(frame); err != nil {
			n.refuse(err, frame)
		} else {
			n.cards.add(card)
		}
		return nil
	}
	if isSettings(frame) {
		set, err := n.cfg.Codec.DecodeSettings(frame)
		if err != nil {
			n.refuse(err, frame)
			return nil
		}
		return *set
	}
	beacon, part, err := n.cfg.Codec.Decode(frame)
	switch {
	case err != nil:
		n.refuse(err, frame)
		return nil
	case beacon != nil:
		n.number(beacon.Peer, beacon.Sequence)
		return Received{beacon}
	}
	n.number(part.From, part.Sequence)
	a := n.assemblers[part.From.ID]
	if a == nil {
		if len(n.assemblers) >= MaxNodes {
			clear(n.assemblers)
		}
		a = new(Assembler)
		n.assemblers[part.From.ID] = a
	}
	m, err := a.Add(part)
	if err != nil {
		n.refuse(err, frame)
	}
	if m == nil {
		return nil
	}
	return ReceivedMap{Map: m, From: part.From, Sequence: part.Sequence}
}

// number counts a frame of another node, and those before it that did not come. The
// parts of a map have one number.
func (n *Node) number(from Peer, sequence uint64) {
	if from.ID == n.machine.Self().ID {
		return
	}
	n.heard.Add(1)
	last, known := n.numbers[from]
	if !known && len(n.numbers) >= 2*MaxNodes { // of many starts over the years
		clear(n.numbers)
	}
	if known && sequence > last+1 {
		n.missed.Add(sequence - last - 1)
	}
	n.numbers[from] = max(last, sequence)
}

// refuse counts a frame without effect; each kind is logged once in a while for
// a source.
func (n *Node) refuse(err error, frame []byte) {
	var kind RefusalKind
	switch {
	case errors.Is(err, ErrOtherVersion):
		kind = RefusedVersion
		n.otherVersion.Add(1)
	case errors.Is(err, ErrOtherCluster):
		kind = RefusedCluster
		n.otherCluster.Add(1)
	case errors.Is(err, ErrUnauthentic):
		kind = RefusedKey
		n.unauthentic.Add(1)
	default:
		kind = RefusedMalformed
		n.malformed.Add(1)
	}
	source := "?"
	if len(frame) >= 12 {
		source = net.HardwareAddr(frame[6:12]).String()
	}
	now := n.cfg.Now()
	n.strangersFound.add(kind, err.Error(), source, now)
	if n.strangers.first(err.Error()+source, now) {
		n.cfg.Logger.Warn(err.Error(), "from", source)
	}
}

// onceLog tells what has not been said lately. A flood of forged sources makes
// it remember and say a bounded number of things in a bounded time.
type onceLog struct {
	mu    sync.Mutex
	said  map[string]bool
	since int64
}

const (
	onceMax    = 256
	onceForget = int64(10 * time.Minute)
)

// first reports whether what is said for the first time, at now (nanoseconds).
func (l *onceLog) first(what string, now int64) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.said == nil || now-l.since >= onceForget {
		l.said, l.since = map[string]bool{}, now
	}
	if l.said[what] || len(l.said) >= onceMax {
		return false
	}
	l.said[what] = true
	return true
}

// A RefusalKind says why a frame had no effect.
type RefusalKind string

// The kinds: of frames that anybody can send, and of those that take the key.
const (
	RefusedMalformed RefusalKind = "malformed"
	RefusedVersion   RefusalKind = "other-version"
	RefusedCluster   RefusalKind = "other-cluster"
	RefusedKey       RefusalKind = "wrong-key"

	RefusedTwin   RefusalKind = "same-mac"    // see TwinNode
	RefusedTwins  RefusalKind = "restarted"   // see Twins
	RefusedEcho   RefusalKind = "loop"        // see Echo
	RefusedRules  RefusalKind = "other-rules" // see OtherRules
	RefusedGhost  RefusalKind = "one-way"     // see Ghost
	RefusedTooFar RefusalKind = "too-many"    // see TooMany
)

var refusalKinds = [noteKinds]RefusalKind{
	TwinNode: RefusedTwin, Twins: RefusedTwins, Echo: RefusedEcho, OtherRules: RefusedRules, Ghost: RefusedGhost, TooMany: RefusedTooFar,
}

// Refusal is frames of one source that had no effect, for the same reason.
type Refusal struct {
	Kind  RefusalKind `json:"kind"`
	What  string      `json:"what"`
	From  string      `json:"from"` // wire MAC
	Count uint64      `json:"count"`
	last  int64
}

// refusals keeps the latest of each kind and source, a bounded number.
type refusals struct {
	mu  sync.Mutex
	all []Refusal
}

const mostRefusals = 32

func (f *refusals) add(kind RefusalKind, what, from string, now int64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for i := range f.all {
		if f.all[i].What == what && f.all[i].From == from {
			f.all[i].Count++
			f.all[i].last = now
			return
		}
	}
	next := Refusal{kind, what, from, 1, now}
	if len(f.all) < mostRefusals {
		f.all = append(f.all, next)
		return
	}
	oldest := 0
	for i := range f.all {
		if f.all[i].last < f.all[oldest].last {
			oldest = i
		}
	}
	f.all[oldest] = next
}

// Refused are the frames of the last ten minutes that had no effect, by source.
func (n *Node) Refused() []Refusal {
	since := n.cfg.Now() - onceForget
	return append(n.membersFound.after(since), n.strangersFound.after(since)...)
}

func (f *refusals) after(since int64) []Refusal {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.all = slices.DeleteFunc(f.all, func(f Refusal) bool { return f.last < since })
	return slices.Clone(f.all)
}

// flowsRetry is the time after a look-up that failed, flowsRest that after one that did not, in
// its own durations: a million connections take a second, and would take a processor for as
// long as some are held.
const (
	flowsRetry = time.Second
	flowsRest  = 4
)

// pollFlows looks the flows up beside the loop: with very many of them that
// takes longer than a lease.
func (n *Node) pollFlows(ctx context.Context) {
	var said string
	var rest time.Duration
	for {
		var asked int64
		select {
		case <-ctx.Done():
			return
		case <-time.After(rest):
		}
		select {
		case <-ctx.Done():
			return
		case asked = <-n.poll:
		}
		began := time.Now()
		flows, active, err := n.cfg.Flows()
		rest = flowsRest * time.Since(began)
		if err == nil {
			said = ""
			n.active.Store(int64(active))
			n.tell(ctx, FlowsSeen{flows, asked})
			continue
		}
		if said != err.Error() {
			said = err.Error()
			n.cfg.Logger.Error("looking up flows", "error", err)
		}
		rest = max(rest, flowsRetry)
	}
}

// askFlows has the flows looked up that are there from now on, instead of those of a time
// that still waits for its turn, which may be before a loss. Only the loop calls it.
func (n *Node) askFlows(now int64) {
	select {
	case <-n.poll:
	default:
	}
	n.poll <- now
}

// step does a step of the machine, what it asks for, and the step that follows
// from that.
func (n *Node) step(ev Event) (next int64) {
	news := false
	for ev != nil {
		now := n.cfg.Now()
		n.alive.Store(now)
		a := n.machine.Step(ev, now)
		ev = nil
		n.cfg.Apply(a)
		if a.Map != nil {
			for _, f := range n.cfg.Codec.Map(a.Map, n.machine.Self(), a.MapSequence) {
				_ = n.send(f, a.MapUnicast) // whoever lacks it shows, and it is sent again
			}
		}
		if a.Beacon != nil && n.send(n.cfg.Codec.Beacon(a.Beacon), a.Unicast) == nil {
			n.sent.Add(1)
			ev = Sent{At: now}
		}
		if a.Settings != nil {
			if f, err := n.cfg.Codec.Settings(a.Settings, n.machine.Self(), a.SettingsSequence); err == nil {
				_ = n.send(f, a.SettingsUnicast) // they are said again
			}
		}
		if a.PollFlows {
			n.askFlows(now)
		}
		if a.Announce {
			n.cfg.Announce()
		}
		news = news || a.Table != nil || len(a.Notes) > 0
		n.note(a.Notes)
		next = a.Next
	}
	n.publish(news)
	return next
}

// send sends a frame to the group and to some nodes besides. The error is that of the
// former.
func (n *Node) send(frame []byte, besides []NodeID) error {
	err := n.cfg.Link.send(frame)
	for _, id := range besides {
		copy(frame, id[:])
		_ = n.cfg.Link.send(frame)
	}
	return err
}

func (n *Node) note(notes []Note) {
	for _, note := range notes {
		if note.What.Refused() {
			n.ignored.Add(1)
			now := n.cfg.Now()
			if note.What != Replayed {
				n.membersFound.add(refusalKinds[note.What], note.What.String(), note.Peer.ID.String(), now)
			}
			if n.members.first(note.What.String()+note.Peer.ID.String(), now) {
				n.cfg.Logger.Warn(note.What.String(), "from", note.Peer.ID)
				n.noted(note)
			}
			continue
		}
		n.noted(note)
		switch note.What {
		case NewMap:
			n.cfg.Logger.Info("node made a map", "version", note.Map.Version, "why", note.Why)
		case Adopted:
			n.cfg.Logger.Debug("node adopted a map", "version", note.Map.Version, "leader", note.Map.Leader)
		case NewSettings:
			n.cfg.Logger.Info("node "+note.What.String(), "version", note.Settings.Version, "by", note.Settings.By)
		case FailOpen, AllFailed:
			n.cfg.Logger.Warn(note.What.String())
		case Lost:
			n.cfg.Logger.Info("node "+note.What.String(), "node", note.Peer.ID, "why", note.Why)
		default:
			n.cfg.Logger.Info("node "+note.What.String(), "node", note.Peer.ID)
		}
	}
}

func (n *Node) noted(note Note) {
	if n.cfg.Noted != nil {
		n.cfg.Noted(note)
	}
}

// publish makes the view known when there is news, and now and again.
func (n *Node) publish(news bool) {
	drained := n.machine.Drained()
	if was := n.drained.Swap(drained); was != drained || news {
		n.signal()
	}
	now := n.cfg.Now()
	if !news && now < n.published+int64(n.cfg.Machine.Params.Interval) {
		return
	}
	n.published = now
	v := n.machine.View()
	last := n.status.Swap(&v)
	if n.cfg.Changed != nil && viewsDiffer(last, &v) {
		n.cfg.Changed(v)
	}
}

func viewsDiffer(a, b *View) bool {
	return a.State != b.State || a.Agreed != b.Agreed || a.Map != b.Map || a.Leader != b.Leader || a.Sick != b.Sick || a.Fenced != b.Fenced ||
		!slices.EqualFunc(a.Members, b.Members, func(x, y Member) bool {
			return x.Peer == y.Peer && x.State == y.State && x.Live == y.Live && x.Sick == y.Sick
		})
}
