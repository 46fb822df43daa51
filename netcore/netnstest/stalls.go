package netnstest

import (
	"runtime"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"clonecluster/netcore/realtime"
)

// Stalls watches how long this machine keeps a thread from running. For an urgent
// one that is what no load explains: a figure measured meanwhile is one of the
// machine, not of the cluster. For a normal one it tells how busy the machine is.
type Stalls struct {
	urgent bool
	stop   chan struct{}
	done   sync.WaitGroup

	mu    sync.Mutex
	spans []stall
}

type stall struct {
	from, to time.Time
}

// stallTick is how often the watching thread wakes, and below stallNoted a
// delay is not worth a note.
const (
	stallTick  = 5 * time.Millisecond
	stallNoted = 10 * time.Millisecond
)

// WatchStalls watches until the test ends, with an urgent thread
// ([realtime.Thread]) or a normal one. If the test has failed, it then logs the
// longest stall.
func WatchStalls(tb testing.TB, urgent bool) *Stalls {
	s := &Stalls{urgent: urgent, stop: make(chan struct{})}
	s.done.Go(s.run)
	tb.Cleanup(func() {
		close(s.stop)
		s.done.Wait()
		if tb.Failed() {
			tb.Logf("the longest time this machine kept a thread (urgent: %t) waiting: %v", urgent, s.Longest(time.Time{}))
		}
	})
	return s
}

func (s *Stalls) run() {
	// Never unlocked: the priority goes with the thread.
	runtime.LockOSThread()
	if s.urgent {
		// A thread without a deadline is delayed by load, too, which would excuse all.
		if deadline, err := realtime.Thread(); err != nil || !deadline {
			return
		}
	}
	for last := time.Now(); ; {
		select {
		case <-s.stop:
			return
		default:
		}
		tick := unix.NsecToTimespec(int64(stallTick))
		_ = unix.Nanosleep(&tick, nil)
		now := time.Now()
		if late := now.Sub(last) - stallTick; late > stallNoted {
			s.mu.Lock()
			s.spans = append(s.spans, stall{last, now})
			s.mu.Unlock()
		}
		last = now
	}
}

// Longest is the longest stall that ended after a time.
func (s *Stalls) Longest(after time.Time) time.Duration {
	return s.Between(after, time.Now())
}

// Between is the longest stall that was in a span of time.
func (s *Stalls) Between(from, to time.Time) (longest time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, x := range s.spans {
		if x.to.After(from) && x.from.Before(to) {
			longest = max(longest, x.to.Sub(x.from)-stallTick)
		}
	}
	return longest
}
