package realtime

import (
	"runtime"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestPoll: it returns for a file, and for the time, and while it waits others run.
func TestPoll(t *testing.T) {
	event, err := unix.Eventfd(0, unix.EFD_NONBLOCK|unix.EFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(event)
	wait := func(d time.Duration) (took time.Duration, ready bool) {
		fds := []unix.PollFd{{Fd: int32(event), Events: unix.POLLIN}}
		begin := time.Now()
		Poll(fds, d)
		return time.Since(begin), fds[0].Revents != 0
	}
	if took, ready := wait(20 * time.Millisecond); took < 20*time.Millisecond || ready {
		t.Errorf("nothing: %v, ready %v; want 20ms, and not ready", took, ready)
	}
	if took, ready := wait(-1); took > time.Second || ready {
		t.Errorf("no time: %v, ready %v; want it to return at once", took, ready)
	}
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(1)) // so that whoever runs needs the place
	go func() {
		runtime.GC() // stops all
		_, _ = unix.Write(event, []byte{1, 0, 0, 0, 0, 0, 0, 0})
	}()
	if took, ready := wait(20 * time.Second); took > 10*time.Second || !ready {
		t.Errorf("a file that becomes ready: %v, ready %v", took, ready)
	}
}

// TestSlack: threads that are there have it, and those that they start; an urgent one has none.
func TestSlack(t *testing.T) {
	const want = 3 * time.Millisecond
	slack := func(f func()) time.Duration {
		got := make(chan int)
		go func() {
			runtime.LockOSThread() // and never unlocked: the thread ends with the goroutine
			f()
			n, err := unix.PrctlRetInt(unix.PR_GET_TIMERSLACK, 0, 0, 0, 0)
			if err != nil {
				t.Error(err)
			}
			got <- n
		}()
		return time.Duration(<-got)
	}
	if err := Slack(want); err != nil {
		t.Skipf("this process may not set it: %v", err)
	}
	defer Slack(50 * time.Microsecond)
	if got := slack(func() {}); got != want {
		t.Errorf("a thread has a slack of %v; want %v", got, want)
	}
	if got := slack(func() { _, _ = Thread() }); got > time.Microsecond {
		t.Errorf("an urgent thread has a slack of %v", got)
	}
}
