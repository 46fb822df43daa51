// Package realtime lets a thread of a Go program run soon on a busy machine.
package realtime

import (
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"
)

// A thread of SCHED_DEADLINE runs before all others, for at most budget in each
// period. SCHED_FIFO, which knows no budget, must not be given to a thread of Go's:
// returning from a system call it spins (sched_yield) while the collector looks at
// its stack, and a collector's thread that waits for the same processor then waits
// until the kernel's throttling ends it, after 950 ms, for which nothing else runs.
const (
	budget = time.Millisecond
	period = 10 * time.Millisecond
	// urgent is the weight of a thread that may not have a deadline (setpriority(2)).
	urgent = -20
)

// Thread makes the calling thread urgent; call it with the thread locked and never
// unlock that. What it starts does not inherit it. The kernel gives no deadline to a
// thread that is bound to some of the processors, nor when too many have one: such a
// thread gets the largest weight of an ordinary one, which Thread says by deadline
// being false. An error means that the thread is as it was.
func Thread() (deadline bool, err error) {
	// What Slack gives to the others is not for this one.
	_ = unix.Prctl(unix.PR_SET_TIMERSLACK, 1, 0, 0, 0)
	attr := unix.SchedAttr{
		Size:     unix.SizeofSchedAttr,
		Policy:   unix.SCHED_DEADLINE,
		Runtime:  uint64(budget),
		Deadline: uint64(period),
		Period:   uint64(period),
		// It may have what no other deadline needs, so that the budget bounds a spin
		// but not honest work.
		Flags: unix.SCHED_FLAG_RESET_ON_FORK | unix.SCHED_FLAG_RECLAIM,
	}
	refused := unix.SchedSetAttr(0, &attr, 0)
	if refused == nil {
		return true, nil
	}
	attr = unix.SchedAttr{Size: unix.SizeofSchedAttr, Policy: unix.SCHED_NORMAL, Nice: urgent, Flags: unix.SCHED_FLAG_RESET_ON_FORK}
	if err := unix.SchedSetAttr(0, &attr, 0); err != nil {
		return false, fmt.Errorf("sched_setattr: %w", errors.Join(fmt.Errorf("SCHED_DEADLINE: %w", refused), err))
	}
	return false, nil
}
