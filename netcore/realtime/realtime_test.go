package realtime

import (
	"os"
	"runtime"
	"testing"

	"golang.org/x/sys/unix"
)

// attributes runs f on a thread of its own and gives how that is scheduled then.
func attributes(t *testing.T, f func()) *unix.SchedAttr {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root, to make a thread urgent")
	}
	type result struct {
		attr *unix.SchedAttr
		err  error
	}
	got := make(chan result)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends with the goroutine
		f()
		attr, err := unix.SchedGetAttr(0, 0)
		got <- result{attr, err}
	}()
	r := <-got
	if r.err != nil {
		t.Fatal(r.err)
	}
	return r.attr
}

func TestThread(t *testing.T) {
	var deadline bool
	var err error
	attr := attributes(t, func() { deadline, err = Thread() })
	if err != nil {
		t.Fatal(err)
	}
	if !deadline {
		t.Skip("this process is bound to some of the processors, or too many threads here have a deadline")
	}
	if attr.Policy != unix.SCHED_DEADLINE || attr.Runtime != uint64(budget) || attr.Period != uint64(period) ||
		attr.Flags&unix.SCHED_FLAG_RESET_ON_FORK == 0 {
		t.Errorf("got %+v", attr)
	}
}

// A thread that may not have a deadline is preferred to ordinary ones, and never
// gets a policy that lets it starve them.
func TestThreadBound(t *testing.T) {
	if runtime.NumCPU() < 2 {
		t.Skip("needs two processors, to bind a thread to one")
	}
	var deadline bool
	var err error
	attr := attributes(t, func() {
		var all, one unix.CPUSet
		if err = unix.SchedGetaffinity(0, &all); err != nil {
			return
		}
		for cpu := 0; one.Count() == 0; cpu++ {
			if all.IsSet(cpu) {
				one.Set(cpu)
			}
		}
		if err = unix.SchedSetaffinity(0, &one); err == nil {
			deadline, err = Thread()
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	if deadline || attr.Policy != unix.SCHED_NORMAL || attr.Nice != urgent {
		t.Errorf("deadline %t, %+v", deadline, attr)
	}
}
