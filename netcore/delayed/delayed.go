// Package delayed keeps pure RSTs until it is known whether they may leave: a node that
// was cut off takes the others for dead, and would reset their connections before their
// word reaches it.
package delayed

import (
	"bytes"
	"context"
	"time"

	"clonecluster/netcore/filter"
)

// Most is how many RSTs may wait. The client of one that finds no room sends again, and
// has its RST then.
const Most = 1024

// A Judge says after a while what becomes of a frame; filter.Filter is one.
type Judge interface {
	ResetPatience() time.Duration
	Release(frame []byte, nowMono int64) filter.Verdict
}

// Resets are those that wait, all for the same time.
type Resets struct {
	judge Judge
	now   func() int64
	queue chan reset
}

type reset struct {
	due   int64 // by now
	head  int   // octets before the frame
	frame []byte
}

// New gives a queue; now is the judge's clock.
func New(judge Judge, now func() int64) *Resets {
	return &Resets{judge, now, make(chan reset, Most)}
}

// Add keeps a copy of a frame, which begins head octets into b, and reports whether there
// was room for it.
func (r *Resets) Add(b []byte, head int) bool {
	select {
	case r.queue <- reset{r.now() + int64(r.judge.ResetPatience()), head, bytes.Clone(b)}:
		return true
	default:
		return false
	}
}

// Run sends what may leave, until ctx ends.
func (r *Resets) Run(ctx context.Context, send func(b []byte)) {
	for {
		select {
		case <-ctx.Done():
			return
		case one := <-r.queue:
			select {
			case <-ctx.Done():
				return
			case <-time.After(time.Duration(one.due - r.now())):
			}
			if r.judge.Release(one.frame[one.head:], r.now()).Send() {
				send(one.frame)
			}
		}
	}
}
