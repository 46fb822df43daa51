package membership

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"

	"clonecluster/netcore/netnstest"
	"clonecluster/netcore/realtime"
)

// socketPair gives two links that are connected with each other, without a NIC
// and without root.
func socketPair(t *testing.T) (a, b *Link) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	var links [2]*Link
	for i, fd := range fds {
		w, err := realtime.NewWaiter(fd)
		if err != nil {
			t.Fatal(err)
		}
		links[i] = &Link{fd: fd, waiter: w}
		t.Cleanup(func() { links[i].Close() })
	}
	return links[0], links[1]
}

// nodeLog is the log of a node, which other goroutines write.
type nodeLog struct {
	mu   sync.Mutex
	text strings.Builder
}

func (l *nodeLog) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(b)
}

func (l *nodeLog) count(what string) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.Count(l.text.String(), what)
}

// stillNode is a node whose clock the test moves and that does not run.
func stillNode(t *testing.T) (n *Node, out *nodeLog, now *int64) {
	t.Helper()
	out, now = new(nodeLog), new(int64)
	link, _ := socketPair(t)
	n, err := NewNode(NodeConfig{
		Machine: Config{Params: Detect(300 * time.Millisecond), Weight: 100}, ID: vectorNode(1), Codec: vectorCodec(), Link: link,
		Logger: slog.New(slog.NewTextHandler(out, nil)), Now: func() int64 { return *now },
		Apply: func(Actions) {}, Announce: func() {}, Flows: func() (Bits, int, error) { return Bits{}, 0, nil },
	})
	if err != nil {
		t.Fatal(err)
	}
	return n, out, now
}

// forge gives the frame of a stranger that has not got the key.
func forge(i int) []byte {
	p := Peer{ID: NodeID{2, 0, 0, 0, byte(i >> 8), byte(i)}}
	return NewCodec("demo", []byte("guessed")).Beacon(&Beacon{Peer: p, State: Serving})
}

// TestFloodSilencesNobody: any number of forged sources leaves room for what a
// holder of the key has to say, and for the next strangers after a while.
func TestFloodSilencesNobody(t *testing.T) {
	n, out, now := stillNode(t)
	flood := func(from, to int) {
		for i := from; i < to; i++ {
			if ev := n.read(forge(i)); ev != nil {
				t.Fatalf("a forged frame is an event: %v", ev)
			}
		}
	}
	flood(0, 5000)
	if got := out.count(ErrUnauthentic.Error()); got != onceMax {
		t.Errorf("5000 forged sources are logged %d times; want %d", got, onceMax)
	}
	twin := []Note{{What: TwinNode, Peer: vectorPeer}}
	for range 3 {
		n.note(twin)
	}
	if got := out.count(TwinNode.String()); got != 1 {
		t.Errorf("%q is logged %d times after the flood; want once", TwinNode, got)
	}
	before := out.count(ErrUnauthentic.Error())
	*now += int64(10 * time.Minute)
	flood(5000, 5001)
	n.note(twin)
	if out.count(ErrUnauthentic.Error()) != before+1 || out.count(TwinNode.String()) != 2 {
		t.Error("ten minutes later nothing is said again; want both")
	}
	if n.unauthentic.Load() != 5001 || n.ignored.Load() != 4 {
		t.Errorf("counters %+v", n.Counters())
	}
}

// TestRefusals: each kind of frame without effect is counted under its name, and
// found by its source.
func TestRefusals(t *testing.T) {
	n, _, _ := stillNode(t)
	good := vectorCodec().Beacon(vectorBeacon())
	frames := [][]byte{
		good[:20], // not even a source could be trusted
		resign(with(good, 42, 0)),
		with(good, 16, 1), with(good, 16, 3), with(good, 16, 3),
		NewCodec("other", vectorKey).Beacon(vectorBeacon()),
		forge(1), forge(2),
		resign(with(vectorCodec().Map(vectorMap(3), vectorPeer, 1)[0], offPiece+mapHead+18, 9)), // owner 9 of 3 members
	}
	for i, f := range frames {
		if ev := n.read(f); ev != nil {
			t.Errorf("frame %d is an event: %v", i, ev)
		}
	}
	if got, want := n.Counters(), (Counters{Malformed: 3, OtherVersion: 3, OtherCluster: 1, Unauthentic: 2}); got != want {
		t.Errorf("counters %+v; want %+v", got, want)
	}
	type refusal struct {
		kind       RefusalKind
		what, from string
		count      uint64
	}
	var got []refusal
	for _, f := range n.Refused() {
		got = append(got, refusal{f.Kind, f.What, f.From, f.Count})
	}
	here := vectorPeer.ID.String()
	want := []refusal{
		{RefusedMalformed, ErrMalformed.Error(), here, 3},
		{RefusedVersion, fmt.Sprintf("%v: 1, this program has 2", ErrOtherVersion), here, 1},
		{RefusedVersion, fmt.Sprintf("%v: 3, this program has 2", ErrOtherVersion), here, 2},
		{RefusedCluster, ErrOtherCluster.Error(), here, 1},
		{RefusedKey, ErrUnauthentic.Error(), "02:00:00:00:00:01", 1},
		{RefusedKey, ErrUnauthentic.Error(), "02:00:00:00:00:02", 1},
	}
	if !slices.Equal(got, want) {
		t.Errorf("refused\n%v\nwant\n%v", got, want)
	}
}

// TestMissedFrames: gaps in the numbers of a node's frames count, each start of it
// for itself; what comes late does not count twice.
func TestMissedFrames(t *testing.T) {
	n, _, _ := stillNode(t)
	for _, f := range []struct{ start, sequence uint64 }{{1, 7}, {1, 8}, {1, 11}, {1, 9}, {1, 12}, {2, 1}, {2, 2}} {
		b := vectorBeacon()
		b.Peer, b.Sequence = Peer{ID: vectorNode(5), Incarnation: f.start}, f.sequence
		n.read(vectorCodec().Beacon(b))
	}
	own := vectorBeacon()
	own.Peer, own.Sequence = n.machine.Self(), 99
	n.read(vectorCodec().Beacon(own))
	if got, want := n.Counters(), (Counters{Heard: 7, Missed: 2}); got != want {
		t.Errorf("counters %+v; want %+v", got, want)
	}
}

// TestRefusalsAreBounded: the latest are kept, and those of long ago are not.
func TestRefusalsAreBounded(t *testing.T) {
	n, _, now := stillNode(t)
	const minute = int64(time.Minute)
	for i := range 1000 {
		*now += minute / 100
		n.read(forge(i))
		n.read(forge(0)) // goes on and on, and so is never the oldest
	}
	has := func(i int) uint64 {
		for _, f := range n.Refused() {
			if f.From == net.HardwareAddr(forge(i)[6:12]).String() {
				return f.Count
			}
		}
		return 0
	}
	if got := len(n.Refused()); got != mostRefusals {
		t.Errorf("%d refusals; want %d", got, mostRefusals)
	}
	if has(0) != 1001 || has(999) != 1 || has(999-mostRefusals+2) != 1 || has(999-mostRefusals+1) != 0 {
		t.Errorf("the latest %d are not those that are kept: %v", mostRefusals, n.Refused())
	}
	n.note([]Note{{What: OtherRules, Peer: vectorPeer}})
	for i := range 100 {
		*now++
		n.read(forge(i))
	}
	if !slices.ContainsFunc(n.Refused(), func(f Refusal) bool { return f.What == OtherRules.String() }) {
		t.Error("a flood of forged sources hides what a holder of the key has said once")
	}
	*now += 5 * minute
	n.note([]Note{{What: TwinNode, Peer: vectorPeer}, {What: Replayed, Peer: vectorPeer}, {What: Heard, Peer: vectorPeer}})
	*now += 5*minute + 1
	if got := n.Refused(); len(got) != 1 || got[0].What != TwinNode.String() {
		t.Errorf("refused %v; want the one of the last ten minutes, neither reordered frames nor good news", got)
	}
	*now += 10 * minute
	if got := n.Refused(); len(got) != 0 {
		t.Errorf("refused %v; want none that is older than ten minutes", got)
	}
}

// TestAssemblersAreBounded: nodes that come and go leave no parts behind for
// ever, and maps are still put together.
func TestAssemblersAreBounded(t *testing.T) {
	n, _, _ := stillNode(t)
	m := vectorMap(200)
	for i := range 2 * MaxNodes {
		from := Peer{ID: vectorNode(1000 + i), Incarnation: 1}
		frames := vectorCodec().Map(m, from, 1)
		n.read(frames[0])
		if len(n.assemblers) > MaxNodes {
			t.Fatalf("%d assemblers; want at most %d", len(n.assemblers), MaxNodes)
		}
		if i%100 != 99 {
			continue
		}
		ev, ok := n.read(frames[1]).(ReceivedMap)
		if !ok || ev.From != from || ev.Sequence != 2 || ev.Map.MapID != m.MapID {
			t.Errorf("the last part of the map of %v: %+v; want the map", from.ID, ev)
		}
	}
}

// TestSlowFlows: a look-up that takes its time holds up nothing.
func TestSlowFlows(t *testing.T) {
	release, asked := make(chan struct{}), make(chan struct{}, 1)
	n, _, _ := stillNode(t)
	n.cfg.Flows = func() (Bits, int, error) {
		asked <- struct{}{}
		<-release
		return Bits{}, 3, nil
	}
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); n.pollFlows(ctx) }()
	n.askFlows(5)
	<-asked
	n.askFlows(6) // the loop never waits, and only the last one counts
	n.askFlows(8)
	close(release)
	if ev := (<-n.events).(FlowsSeen); ev.Asked != 5 || n.active.Load() != 3 {
		t.Errorf("got %d, %d active; want the answer to 5, 3 active", ev.Asked, n.active.Load())
	}
	<-asked
	if ev := (<-n.events).(FlowsSeen); ev.Asked != 8 {
		t.Errorf("got the answer to %d; want 8", ev.Asked)
	}
	stop()
	<-done
}

// TestManyFlows: after a look-up that took long there is time for other things, whoever asks,
// and after one that failed there is some.
func TestManyFlows(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n, _, _ := stillNode(t)
		ctx, stop := context.WithCancel(t.Context())
		var began []time.Duration
		start := time.Now()
		n.cfg.Flows = func() (Bits, int, error) {
			began = append(began, time.Since(start))
			n.poll <- int64(len(began)) // asked again before it has ended
			time.Sleep(300 * time.Millisecond)
			switch len(began) {
			case 2:
				return Bits{}, 0, errors.New("not now")
			case 3:
				stop()
			}
			return Bits{}, 0, nil
		}
		n.poll <- 0
		n.pollFlows(ctx)
		if want := []time.Duration{0, 1500 * time.Millisecond, 3000 * time.Millisecond}; !slices.Equal(began, want) {
			t.Errorf("look-ups of 300 ms, of which the second fails, begin at %v; want %v", began, want)
		}
	})
}

// liveNode is a node that runs.
type liveNode struct {
	*Node
	log  nodeLog
	quit func() // ends Run and waits for it

	mu    sync.Mutex
	flows int  // connections, in bucket 5
	held  bool // there is a TIME-WAIT remainder in bucket 5
	given bool // it has given its buckets away
}

func (l *liveNode) look() (held Bits, n int, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.flows > 0 || l.held {
		held.Set(5)
	}
	return held, l.flows, nil
}

func (l *liveNode) set(flows int, held bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.flows, l.held = flows, held
}

// liveDead is longer than a loaded machine lets a thread without real-time
// priority wait.
const liveDead = 1500 * time.Millisecond

// run runs a node until the test ends.
func run(t *testing.T, id NodeID, link *Link) *liveNode {
	t.Helper()
	l := new(liveNode)
	begin := time.Now()
	var err error
	l.Node, err = NewNode(NodeConfig{
		Machine: Config{Params: Detect(liveDead), Weight: 100}, ID: id, Codec: vectorCodec(), Link: link,
		Logger: slog.New(slog.NewTextHandler(io.MultiWriter(&l.log, t.Output()), nil)), Now: func() int64 { return int64(time.Since(begin)) },
		Apply: func(Actions) {}, Announce: func() {}, Flows: l.look,
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- l.Run(ctx) }()
	l.quit = sync.OnceFunc(func() {
		stop()
		if err := <-done; err != nil {
			t.Errorf("Run: %v; want nil when the context ends", err)
		}
	})
	t.Cleanup(l.quit)
	return l
}

// owns gives the buckets that the node of that id has by l's map, and whether
// all live nodes go by it.
func (l *liveNode) owns(id NodeID) (buckets int, agreed bool) {
	v := l.View()
	for _, m := range v.Members {
		if m.ID == id {
			buckets = m.Buckets
		}
	}
	return buckets, v.Agreed
}

func await(t *testing.T, what string, cond func() bool) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); !cond(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("waited in vain for this: %s", what)
		}
	}
}

// TestLeave: a node that leaves gives its buckets away, says so, serves what it
// has to the end, and is not missed.
func TestLeave(t *testing.T) {
	t.Run("socket pair", func(t *testing.T) {
		a, b := socketPair(t)
		testLeave(t, a, b)
	})
	t.Run("bridge", func(t *testing.T) {
		bed := netnstest.New(t, net.HardwareAddr{2, 0xcc, 0, 0, 0, 1})
		testLeave(t, openLink(t, bed.Host("one", vectorNode(1).String())), openLink(t, bed.Host("two", vectorNode(2).String())))
	})
}

func openLink(t *testing.T, h *netnstest.Host) (l *Link) {
	t.Helper()
	err := h.Do(func() error {
		ifi, err := net.InterfaceByName("eth0")
		if err != nil {
			return err
		}
		l, err = OpenLink(ifi.Index, ifi.Name)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Errorf("closing the link: %v", err)
		}
	})
	return l
}

func testLeave(t *testing.T, linkA, linkB *Link) {
	a, b := run(t, vectorNode(1), linkA), run(t, vectorNode(2), linkB)
	a.set(1, true)
	await(t, "both share the buckets", func() bool {
		onA, agreedA := a.owns(vectorNode(2))
		onB, agreedB := b.owns(vectorNode(1))
		return onA == 512 && onB == 512 && agreedA && agreedB
	})
	limit, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	left := make(chan struct{})
	go func() {
		defer close(left)
		a.Leave(limit, func() {
			a.mu.Lock()
			defer a.mu.Unlock()
			a.given = true
		})
	}()
	await(t, "the node says that it has given its buckets away", func() bool {
		a.mu.Lock()
		defer a.mu.Unlock()
		return a.given
	})
	if p := a.Progress(); p.Owned || p.Flows != 1 {
		t.Errorf("progress %+v; want a connection and no buckets", p)
	}
	await(t, "the other takes them", func() bool { n, agreed := b.owns(vectorNode(2)); return n == 1024 && agreed })
	await(t, "the leaving one waits for its flow", func() bool { return a.View().State == Stopping })
	select {
	case <-left:
		t.Error("it did not wait for its flow")
	default:
	}
	if b.log.count("node left") != 0 {
		t.Error("it said that it is gone while it has a flow")
	}
	a.set(0, true) // what a kernel has for a minute after a connection is no reason to wait
	<-left
	if limit.Err() != nil {
		t.Error("it took until the limit to leave; want until the end of its flow")
	}
	await(t, "its last word is heard", func() bool { return b.log.count("node left") > 0 })
	if got := b.log.count("node lost"); got != 0 {
		t.Errorf("it was missed %d times; want never", got)
	}
}

// TestLeaveAlone: nobody takes over, and nobody's news wake the one that leaves.
func TestLeaveAlone(t *testing.T) {
	link, _ := socketPair(t)
	a := run(t, vectorNode(1), link)
	await(t, "it owns all", func() bool { n, _ := a.owns(vectorNode(1)); return n == 1024 })
	limit, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	a.Leave(limit, nil)
	if limit.Err() != nil {
		t.Error("it took until the limit to leave; want twice the detection time")
	}
}

// TestLeaveLate: when there is no time left to wait for flows there is still time
// for the last word.
func TestLeaveLate(t *testing.T) {
	link, other := socketPair(t)
	a := run(t, vectorNode(1), link)
	await(t, "it owns all", func() bool { n, _ := a.owns(vectorNode(1)); return n == 1024 })
	late, cancel := context.WithCancel(t.Context())
	cancel()
	a.Leave(late, nil)
	a.quit()
	var frame [MaxFrame]byte
	for {
		size, err := other.receive(frame[:])
		if size == 0 || err != nil {
			t.Fatalf("no frame says that it leaves: %v", err)
		}
		if b, _, _ := vectorCodec().Decode(frame[:size]); b != nil && b.State == Leaving {
			return
		}
	}
}

// TestBeaconsDuringFlood: frames that come without end do not keep a node's own
// from leaving.
func TestBeaconsDuringFlood(t *testing.T) {
	link, outside := socketPair(t)
	n := run(t, vectorNode(1), link)
	stop := make(chan struct{})
	var flood sync.WaitGroup
	defer flood.Wait()
	defer close(stop)
	for i := range 2 {
		frame := forge(i)
		flood.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
					_ = outside.send(frame) // fails when the queue is full
				}
			}
		})
	}
	await(t, "the flood begins", func() bool { return n.Counters().Unauthentic > 1000 })
	var frame [MaxFrame]byte
	beacons := 0
	await(t, "beacons of a node that serves", func() bool {
		size, err := outside.receive(frame[:])
		if err != nil {
			t.Fatal(err)
		}
		if size == 0 {
			return false
		}
		if b, _, err := vectorCodec().Decode(frame[:size]); err != nil {
			t.Fatalf("a frame of the node: %v", err)
		} else if b != nil && b.State == Serving {
			beacons++
		}
		return beacons == 5
	})
}

// TestLink: of all that is on the segment the socket hears the cluster's frames
// of others, to the group or to this node, and nothing else.
func TestLink(t *testing.T) {
	bed := netnstest.New(t, net.HardwareAddr{2, 0xcc, 0, 0, 0, 1})
	macA := vectorNode(8) // not the source of the frames, which the switch learns at b's port
	a, b := openLink(t, bed.Host("one", macA.String())), openLink(t, bed.Host("two", ""))
	send := func(frame []byte) {
		t.Helper()
		if err := b.send(frame); err != nil {
			t.Fatal(err)
		}
	}
	good := vectorCodec().Beacon(vectorBeacon())
	tagged := slices.Insert(slices.Clone(good), 12, 0x81, 0, 0, 5)
	longest := append(slices.Clone(good), make([]byte, 1514-len(good))...)
	send(with(good, 12, 0x88, 0xb6)) // another EtherType
	send(tagged)
	send(with(good, 14, 'X')) // somebody else's experiment
	if err := a.send(good); err != nil {
		t.Fatal(err)
	}
	send(with(good, 0, macA[:]...))
	send(longest)
	send(good)
	var got [][]byte
	var buf [MaxFrame + 1]byte
	await(t, "three frames", func() bool {
		a.wait(time.Second)
		size, err := a.receive(buf[:])
		if err != nil {
			t.Fatal(err)
		}
		if size > 0 {
			got = append(got, slices.Clone(buf[:size]))
		}
		return len(got) == 3
	})
	want := [][]byte{with(good, 0, macA[:]...), longest[:MaxFrame+1], good}
	for i := range want {
		if !slices.Equal(got[i], want[i]) {
			t.Errorf("frame %d: %x; want %x", i, got[i], want[i])
		}
	}
	a.Wake()
	a.wait(time.Minute) // returns at once
	if size, err := a.receive(buf[:]); size != 0 || err != nil {
		t.Errorf("then %d bytes, %v; want nothing", size, err)
	}
}
