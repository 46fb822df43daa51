package engine

import (
	"io"
	"sync/atomic"
	"time"
)

// outlet writes what it is given from a goroutine of its own, one piece at a time:
// the thread that speaks with the other nodes may not wait for a journal or a
// supervisor that does not read. What there is no room for is lost and counted.
type outlet struct {
	w      io.Writer
	queue  chan []byte
	lost   atomic.Uint64
	ended  chan struct{}
	report func(lost uint64) []byte // nil: nothing is said of what was lost
}

// newOutlet has room for size pieces.
func newOutlet(w io.Writer, size int, report func(lost uint64) []byte) *outlet {
	o := &outlet{w: w, queue: make(chan []byte, size), ended: make(chan struct{}), report: report}
	go o.run()
	return o
}

// Write never waits, and always says that it has written.
func (o *outlet) Write(p []byte) (int, error) {
	select {
	case o.queue <- append([]byte{}, p...):
	default:
		o.lost.Add(1)
	}
	return len(p), nil
}

func (o *outlet) run() {
	defer close(o.ended)
	for p := range o.queue {
		if p == nil {
			return
		}
		_, _ = o.w.Write(p)
		if lost := o.lost.Swap(0); lost > 0 && o.report != nil {
			_, _ = o.w.Write(o.report(lost))
		}
	}
}

// close waits for what is still in the queue, for at most a while. What is written
// afterwards is lost.
func (o *outlet) close(patience time.Duration) {
	late := time.After(patience)
	select {
	case o.queue <- nil:
	case <-late:
		return
	}
	select {
	case <-o.ended:
	case <-late:
	}
}
