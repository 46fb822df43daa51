package realtime

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"time"
)

// Slack lets the timers of all threads that this process has, and of those that these start,
// be late by up to d (proc_pid_timerslack_ns(5)), but not those of a thread with a
// deadline, which has no slack. Go's monitor looks after 20 µs, and after 20 µs more, each
// time that something has woken the process; with a slack of a millisecond what woke it is
// over when it looks for the second time, and it goes back to sleep.
func Slack(d time.Duration) error {
	threads, err := os.ReadDir("/proc/self/task")
	if err != nil {
		return fmt.Errorf("timer slack: %w", err)
	}
	for _, t := range threads {
		// Not below /proc/self/task, where the file is not.
		file := filepath.Join("/proc", t.Name(), "timerslack_ns")
		if err := os.WriteFile(file, strconv.AppendInt(nil, d.Nanoseconds(), 10), 0); err != nil && !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("timer slack: %w", err)
		}
	}
	return nil
}
