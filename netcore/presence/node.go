package presence

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/mdlayher/packet"
	"golang.org/x/net/bpf"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

// Link sends and receives presence frames on one NIC.
type Link struct{ conn *packet.Conn }

// OpenLink opens a packet socket that hears nothing but presence frames.
func OpenLink(ifindex int, name string) (*Link, error) {
	drop, accept := bpf.RetConstant{Val: 0}, bpf.RetConstant{Val: MaxFrame + 1}
	program, err := bpf.Assemble([]bpf.Instruction{
		bpf.LoadExtension{Num: bpf.ExtType},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: unix.PACKET_OUTGOING, SkipTrue: 5},
		bpf.LoadExtension{Num: bpf.ExtVLANTagPresent},
		bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: 0, SkipTrue: 3},
		bpf.LoadAbsolute{Off: 2, Size: 4},
		bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: binary.BigEndian.Uint32(Group[2:]), SkipTrue: 1},
		accept,
		drop,
	})
	if err != nil {
		return nil, fmt.Errorf("assembling the presence filter: %w", err)
	}
	conn, err := packet.Listen(&net.Interface{Index: ifindex, Name: name}, packet.Raw, EtherType, &packet.Config{Filter: program})
	if err != nil {
		return nil, fmt.Errorf("opening the presence socket on %s: %w", name, err)
	}
	if err := conn.JoinGroup(Group[:]); err != nil {
		conn.Close()
		return nil, fmt.Errorf("joining the presence group on %s: %w", name, err)
	}
	return &Link{conn}, nil
}

// Close closes the socket.
func (l *Link) Close() error { return l.conn.Close() }

// Config is what a Node needs from its surroundings.
type Config struct {
	ID     NodeID
	Params Params
	Codec  *Codec
	Link   *Link
	Logger *slog.Logger
	Now    func() int64 // the clock of the filter's lease

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
}

// Counters count frames that had no effect.
type Counters struct {
	Malformed, OtherCluster, Unauthentic uint64
	Ignored                              uint64 // authentic, but replayed, of this node's own MAC, or one node too many
}

// Node runs the machine.
type Node struct {
	cfg     Config
	events  chan Event
	poll    chan int64 // when the flows were asked for
	machine *Machine

	status atomic.Pointer[View]
	alive  atomic.Int64
	active atomic.Int64 // flows at the last look

	drained   chan struct{}
	drainOnce sync.Once

	malformed, otherCluster, unauthentic, ignored atomic.Uint64

	// What anyone can make the node say, and what takes the key. The first may
	// not silence the second.
	strangers, members onceLog
}

// NewNode prepares a node; Run starts it.
func NewNode(cfg Config) (*Node, error) {
	flows, _, err := cfg.Flows()
	if err != nil {
		return nil, err
	}
	self, err := newPeer(cfg.ID)
	if err != nil {
		return nil, err
	}
	n := &Node{
		cfg: cfg, events: make(chan Event, 64), poll: make(chan int64, 1), drained: make(chan struct{}),
		machine: New(self, cfg.Params, flows, cfg.Now()),
	}
	v := n.machine.View()
	n.status.Store(&v)
	t := n.machine.table
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

// View is what the node goes by now.
func (n *Node) View() View { return *n.status.Load() }

// Alive is when the node last did a step, on the clock of Config.Now.
func (n *Node) Alive() int64 { return n.alive.Load() }

// Counters gives the numbers of frames without effect.
func (n *Node) Counters() Counters {
	return Counters{n.malformed.Load(), n.otherCluster.Load(), n.unauthentic.Load(), n.ignored.Load()}
}

// SetCarrier tells the node about its NIC's link.
func (n *Node) SetCarrier(ctx context.Context, up bool) { n.tell(ctx, Carrier{up}) }

// SetID gives the node the NIC's new address.
func (n *Node) SetID(ctx context.Context, id NodeID) {
	if p, err := newPeer(id); err == nil {
		n.tell(ctx, Rename{p})
	}
}

func (n *Node) tell(ctx context.Context, ev Event) {
	select {
	case n.events <- ev:
	case <-ctx.Done():
	}
}

// Leave gives this node's buckets to the others and returns when its flows have
// ended, or ctx has.
func (n *Node) Leave(ctx context.Context) {
	n.tell(ctx, Leave{})
	select {
	case <-n.drained:
	case <-ctx.Done():
	}
}

// Run takes part until ctx ends (nil) or the socket fails.
func (n *Node) Run(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return n.read(ctx) })
	g.Go(func() error { n.loop(ctx); return nil })
	g.Go(func() error { n.pollFlows(ctx); return nil })
	g.Go(func() error {
		<-ctx.Done()
		return n.cfg.Link.conn.SetReadDeadline(time.Now())
	})
	return g.Wait()
}

func (n *Node) read(ctx context.Context) error {
	buf := make([]byte, MaxFrame+1)
	for {
		size, _, err := n.cfg.Link.conn.ReadFrom(buf)
		if ctx.Err() != nil {
			return nil
		}
		if errors.Is(err, unix.ENETDOWN) {
			continue // the NIC went down; the socket works again when it is up
		}
		if err != nil {
			return fmt.Errorf("receiving presence frames: %w", err)
		}
		b, err := n.cfg.Codec.Decode(buf[:size])
		if err != nil {
			n.refuse(err, buf[:size])
			continue
		}
		n.tell(ctx, Received{b})
	}
}

// refuse counts a frame without effect; each kind is logged once in a while for
// a source.
func (n *Node) refuse(err error, frame []byte) {
	switch {
	case errors.Is(err, ErrOtherCluster):
		n.otherCluster.Add(1)
	case errors.Is(err, ErrUnauthentic):
		n.unauthentic.Add(1)
	default:
		n.malformed.Add(1)
	}
	source := "?"
	if len(frame) >= 12 {
		source = net.HardwareAddr(frame[6:12]).String()
	}
	if n.strangers.first(err.Error()+source, n.cfg.Now()) {
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

// flowsRetry is the time after a look-up that failed.
const flowsRetry = time.Second

// pollFlows looks the flows up beside the loop: with very many of them that
// takes longer than a lease.
func (n *Node) pollFlows(ctx context.Context) {
	var said string
	for {
		var asked int64
		select {
		case <-ctx.Done():
			return
		case asked = <-n.poll:
		}
		flows, active, err := n.cfg.Flows()
		if err == nil {
			said = ""
			n.active.Store(int64(active))
			n.tell(ctx, Flows{flows, asked})
			continue
		}
		if said != err.Error() {
			said = err.Error()
			n.cfg.Logger.Error("looking up flows", "error", err)
		}
		select {
		case <-ctx.Done():
		case <-time.After(flowsRetry):
		}
	}
}

func (n *Node) loop(ctx context.Context) {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		var ev Event
		select {
		case <-ctx.Done():
			return
		case ev = <-n.events:
		case <-timer.C:
			ev = Tick{}
		}
		timer.Reset(max(0, time.Duration(n.step(ev)-n.cfg.Now())))
	}
}

// step does a step of the machine, what it asks for, and the steps that follow
// from that.
func (n *Node) step(ev Event) (next int64) {
	for follow := []Event{ev}; len(follow) > 0; follow = follow[1:] {
		now := n.cfg.Now()
		n.alive.Store(now)
		a := n.machine.Step(follow[0], now)
		n.cfg.Apply(a)
		if a.Send != nil && n.send(a.Send) {
			follow = append(follow, Sent{})
		}
		if a.PollFlows {
			select {
			case n.poll <- now:
			default: // still at it; the machine asks again
			}
		}
		if a.Announce {
			n.cfg.Announce()
		}
		n.note(a.Notes)
		next = a.Next
	}
	n.publish()
	return next
}

// send gives up after an interval: the next beacon says more than a late one.
func (n *Node) send(b *Beacon) bool {
	if err := n.cfg.Link.conn.SetWriteDeadline(time.Now().Add(n.cfg.Params.Interval)); err != nil {
		return false
	}
	_, err := n.cfg.Link.conn.WriteTo(n.cfg.Codec.Encode(*b), &packet.Addr{HardwareAddr: Group[:]})
	return err == nil
}

func (n *Node) note(notes []Note) {
	for _, note := range notes {
		switch note.What {
		case Heard, Lost, Silent, Unheard:
			n.cfg.Logger.Info("node "+note.What, "node", note.Peer.ID)
		default:
			n.ignored.Add(1)
			if n.members.first(note.What+note.Peer.ID.String(), n.cfg.Now()) {
				n.cfg.Logger.Warn(note.What, "from", note.Peer.ID)
			}
		}
	}
}

func (n *Node) publish() {
	v := n.machine.View()
	last := n.status.Swap(&v)
	if n.cfg.Changed != nil && (last.State != v.State || last.Adopted != v.Adopted || !slices.Equal(last.Serving, v.Serving)) {
		n.cfg.Changed(v)
	}
	if v.State == Leaving && n.machine.heldKnown && n.active.Load() == 0 {
		n.drainOnce.Do(func() { close(n.drained) })
	}
}
