package probe

import (
	"context"
	"time"
)

// fast is how often a service is asked until it answers well for the first time:
// its start should not be seen an interval late.
const fast = 100 * time.Millisecond

// Repeat asks every interval, in the goroutine of the caller, and tells each
// answer, nil if all is well, until ctx ends. Until the first such answer it
// asks every 100 ms, or every interval if that is less. A question has that
// timeout, after which ask must return soon; one that takes longer than the
// interval delays the next, so there is never more than one.
func Repeat(ctx context.Context, interval, timeout time.Duration, ask func(context.Context) error, tell func(error)) {
	well := false
	for {
		start := time.Now()
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
		case <-t.C:
		}
	}
}

func within(ctx context.Context, timeout time.Duration, ask func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	return ask(ctx)
}
