package engine_test

import (
	"fmt"
	"os"
	"syscall"
	"testing"
	"time"
)

// TestRestartSignal restarts engines twenty times, as a package's upgrade does,
// while downloads are in flight and new connections come all the time: none breaks
// and none fails. Every other time the next engine is started only after more than
// the detection time, as on a machine that is busy unpacking.
func TestRestartSignal(t *testing.T) {
	for _, nodes := range []int{1, 2} {
		t.Run(fmt.Sprintf("%d nodes", nodes), func(t *testing.T) {
			// Alone there is nobody to take the new connections, and a restart costs them
			// the time until a SYN is sent again: the node listens for less than that.
			p := patient
			if nodes == 1 {
				p = normal
			}
			f := newFailover(t, nodes, p)
			f.boot(f.nodes...)
			f.own(f.nodes...)
			d := f.startDownloads(f.client, 20*nodes, f.nodes...)
			c := f.startCrowd(f.client, 20*time.Millisecond, 200, 0)
			var longest time.Duration
			for i := range 20 {
				n := f.nodes[i%nodes]
				began := time.Now()
				n.cloned.Signal(syscall.SIGHUP)
				if err := n.cloned.Wait(); err != nil {
					t.Fatalf("restart %d: the engine ended with %v:\n%s", i, err, n.cloned.Output())
				}
				longest = max(longest, time.Since(began))
				if out, err := n.Try("ip", "addr", "show", "dev", "clone0"); err != nil {
					t.Fatalf("restart %d: clone0 is gone: %v: %s", i, err, out)
				}
				if nodes > 1 && i%2 == 1 {
					time.Sleep(f.dead * 3 / 2)
				}
				n.resume()
				n.cloned.Await(0, "engine running")
				f.agreed(f.nodes...)
				if nodes == 1 {
					time.Sleep(time.Second)
				}
			}
			d.mustGoOn("after 20 restarts")
			r := c.end()
			t.Logf("%v; %v; an engine needs %v at most to end", r, d, longest.Round(time.Millisecond))
			explained := 0
			for _, x := range r.failed() {
				t.Logf("a request of %s failed: %v", x.started.Format("15:04:05.000"), x.err)
				if f.stood(x.started.Add(x.ended)) {
					explained++
				}
			}
			f.judge(len(r.failed()), explained)
			if n := len(r.failed()); n > 0 {
				t.Errorf("%d of %d requests failed", n, len(r))
			}
			f.checkSwitch()
		})
	}
}

// TestRestartKeepsDrain: an upgrade does not undo what an operator has asked for,
// and a graceful stop does.
func TestRestartKeepsDrain(t *testing.T) {
	c := newCluster(t, 2)
	c.start()
	n := c.nodes[0]
	n.drain()
	c.agree(c.nodes[1])
	for _, again := range []func(){
		func() {
			n.cloned.Signal(syscall.SIGHUP)
			if err := n.cloned.Wait(); err != nil {
				t.Fatal(err)
			}
		},
		func() { n.cloned.Kill() },
	} {
		again()
		n.start()
		n.cloned.Await(0, "state=draining")
		if s := n.Status(); !s.Drain.Draining {
			t.Errorf("after the restart the drain is %+v", s.Drain)
		}
	}
	n.takePart()
	c.agree(c.nodes...)
	n.drain()
	if err := n.cloned.Stop(); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(n.status + ".drained"); !os.IsNotExist(err) {
		t.Errorf("a graceful stop leaves the note of the drain: %v", err)
	}
	n.start()
	c.agree(c.nodes...)
}
