package probe

import (
	"context"
	"sync"
	"time"
)

// fast is how often a service is asked until it answers well for the first time:
// its start should not be seen an interval late.
const fast = 100 * time.Millisecond

// A Bell has all that Repeat with it ask at once. The zero value is one.
type Bell struct {
	mu   sync.Mutex
	rung chan struct{} // closed by Ring; nil: nobody listens
}

// Ring rings it. Who is asking when it rings asks again.
func (b *Bell) Ring() {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.rung != nil {
		close(b.rung)
		b.rung = nil
	}
}

// rings gives a channel that is closed when it rings next.
func (b *Bell) rings() <-chan struct{} {
	if b == nil {
		return nil
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.rung == nil {
		b.rung = make(chan struct{})
	}
	return b.rung
}

// Repeat asks every interval, in the goroutine of the caller, and tells each
// answer, nil if all is well, until ctx ends. Until the first such answer it
// asks every 100 ms, or every interval if that is less. A question has that
// timeout, after which ask must return soon; one that takes longer than the
// interval delays the next, so there is never more than one. When the bell rings, which
// may be nil, the next question is due.
func Repeat(ctx context.Context, interval, timeout time.Duration, bell *Bell, ask func(context.Context) error, tell func(error)) {
	well := false
	for {
		start, rings := time.Now(), bell.rings()
		err := within(ctx, timeout, ask)
		if ctx.Err() != nil {
			return
		}
		well = well || err == nil
		tell(err)
		wait := interval
		if !well {
			wait = min(wait, fast)
		}
		t := time.NewTimer(max(0, wait-time.Since(start)))
		select {
		case <-ctx.Done():
			t.Stop()
			return
		case <-rings:
			t.Stop()
		case <-t.C:
		}
	}
}

func within(ctx context.Context, timeout time.Duration, ask func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	return ask(ctx)
}
