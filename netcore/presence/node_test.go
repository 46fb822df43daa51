package presence

import (
	"context"
	"log/slog"
	"strings"
	"testing"
	"time"
)

// TestFloodSilencesNobody: any number of forged sources leaves room for what a
// holder of the key has to say, and for the next strangers after a while.
func TestFloodSilencesNobody(t *testing.T) {
	var out strings.Builder
	now := int64(0)
	n := &Node{cfg: Config{Logger: slog.New(slog.NewTextHandler(&out, nil)), Now: func() int64 { return now }}}
	forge := func(from, to int) {
		for i := from; i < to; i++ {
			n.refuse(ErrUnauthentic, []byte{11: byte(i), 10: byte(i >> 8)})
		}
	}
	said := func(what string) int { return strings.Count(out.String(), what) }
	forge(0, 5000)
	if got := said(ErrUnauthentic.Error()); got != onceMax {
		t.Errorf("5000 forged sources are logged %d times; want %d", got, onceMax)
	}
	const twin = "another node has this node's wire MAC"
	for range 3 {
		n.note([]Note{{twin, Peer{ID: NodeID{2}}}})
	}
	if got := said(twin); got != 1 {
		t.Errorf("%q is logged %d times after the flood; want once", twin, got)
	}
	out.Reset()
	now = int64(10 * time.Minute)
	forge(5000, 5001)
	n.note([]Note{{twin, Peer{ID: NodeID{2}}}})
	if said(ErrUnauthentic.Error()) != 1 || said(twin) != 1 {
		t.Errorf("ten minutes later: %q; want both again", out.String())
	}
	if n.unauthentic.Load() != 5001 || n.ignored.Load() != 4 {
		t.Errorf("counters %+v", n.Counters())
	}
}

// TestSlowFlows: a look-up that takes its time holds up nothing.
func TestSlowFlows(t *testing.T) {
	release, asked := make(chan struct{}), make(chan struct{}, 1)
	n := &Node{
		cfg: Config{Flows: func() (Bits, int, error) {
			asked <- struct{}{}
			<-release
			return Bits{}, 3, nil
		}},
		events: make(chan Event, 1), poll: make(chan int64, 1),
	}
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); n.pollFlows(ctx) }()
	n.poll <- 7
	<-asked
	n.poll <- 8 // the loop never waits for more than this
	close(release)
	if ev := (<-n.events).(Flows); ev.Asked != 7 || n.active.Load() != 3 {
		t.Errorf("got %d, %d active; want the answer to 7, 3 active", ev.Asked, n.active.Load())
	}
	if ev := (<-n.events).(Flows); ev.Asked != 8 {
		t.Errorf("got the answer to %d; want 8", ev.Asked)
	}
	stop()
	<-done
}
