package netnstest

import (
	"fmt"
	"path/filepath"
	"runtime"
	"strconv"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestKeepAwake: no processor sleeps, whoever wants one has it, and what has ended is known.
func TestKeepAwake(t *testing.T) {
	if testing.Short() {
		t.Skip("takes seconds: not with -short")
	}
	var a *Awake
	started := make(chan bool)
	go func() { // on a thread that ends
		defer close(started)
		runtime.LockOSThread()
		a = KeepAwake(t)
	}()
	if <-started; a == nil {
		t.FailNow() // it has said why
	}
	const while = 500 * time.Millisecond
	idle := Processors(t).Idle
	time.Sleep(while)
	if idle = Processors(t).Idle - idle; idle > while/4 {
		t.Errorf("in %v the processors slept for %v", while, idle)
	}
	tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*", a.cmd.Process.Pid))
	giveWay := 0
	for _, task := range tasks {
		tid, _ := strconv.Atoi(filepath.Base(task))
		if attr, err := unix.SchedGetAttr(tid, 0); err == nil && attr.Policy == unix.SCHED_IDLE {
			giveWay++
		}
	}
	if err != nil || giveWay != runtime.NumCPU() {
		t.Errorf("%d of %d threads give way to all others (%v); want one for each processor", giveWay, len(tasks), err)
	}
	_ = a.cmd.Process.Kill()
	<-a.ended
	if d, err := a.taken(); err == nil {
		t.Errorf("after its end it has taken %v", d)
	}
}
