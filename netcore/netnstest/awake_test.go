package netnstest

import (
	"os"
	"runtime"
	"testing"
	"time"
)

// TestKeepAwake: no processor sleeps, and whoever wants one has it.
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
	<-started
	const while = 500 * time.Millisecond
	idle, taken := Processors(t).Idle, a.CPU(t)
	time.Sleep(while)
	idle, taken = Processors(t).Idle-idle, a.CPU(t)-taken
	if idle > while/4 || taken == 0 {
		t.Errorf("in %v the processors slept for %v, and it had %v", while, idle, taken)
	}
	before, err := CPUOf(os.Getpid())
	for start := time.Now(); time.Since(start) < while; {
	}
	own, again := CPUOf(os.Getpid())
	if own -= before; err != nil || again != nil || own < while/2 {
		t.Errorf("who wants a processor for %v has one for %v (%v, %v)", while, own, err, again)
	}
	_ = a.cmd.Process.Kill()
	<-a.ended
	if d, err := a.taken(); err == nil {
		t.Errorf("after its end it has taken %v", d)
	}
}
