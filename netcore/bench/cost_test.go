package bench

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"clonecluster/netcore/netnstest"
)

// A cost is what some work took of the machine.
type cost struct {
	own   time.Duration // of the processors: what the parties took
	all   time.Duration // what was taken by whomever
	wall  time.Duration
	extra time.Duration // what the machine would have taken meanwhile anyway
	aside time.Duration // what the parties took besides, which is not measured
}

// others is how many processors did something else meanwhile.
func (c cost) others() float64 { return max(0, float64(c.all-c.own-c.aside)/float64(c.wall)) }

// ksoftirqd gives the kernel's threads that finish the network work which was too much to be
// done at once. All else of it is done by whichever process caused it, and is in that one's
// time: this machine's network is veth, and has no interrupts.
func ksoftirqd(t *testing.T) (pids []int) {
	names, err := filepath.Glob("/proc/[0-9]*/comm")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range names {
		comm, err := os.ReadFile(name)
		if err != nil || !strings.HasPrefix(string(comm), "ksoftirqd/") {
			continue
		}
		if pid, err := strconv.Atoi(filepath.Base(filepath.Dir(name))); err == nil {
			pids = append(pids, pid)
		}
	}
	return pids
}

// spent measures do, which gives the time of the processes that it started and that have
// ended. Those that run in the bed all the time, and ksoftirqd, are added.
func (m *measurer) spent(b *netnstest.Bed, do func() (ended time.Duration)) cost {
	m.t.Helper()
	running := func() (sum time.Duration) {
		for _, pid := range m.ksoftirqd {
			if cpu, err := netnstest.CPUOf(pid); err == nil {
				sum += cpu
			}
		}
		return sum + b.CPU()
	}
	own, all, start := running(), m.busy(), time.Now()
	ended := do()
	c := cost{own: running() - own + ended, all: m.busy() - all, wall: time.Since(start)}
	c.extra = time.Duration(m.idle * float64(c.wall))
	return c
}

// busy is what the processors have done so far that anybody wanted.
func (m *measurer) busy() time.Duration {
	m.t.Helper()
	busy := netnstest.Processors(m.t).Busy
	if m.awake != nil {
		busy -= m.awake.CPU(m.t)
	}
	return busy
}

// bearable is how many processors others may take of a measurement.
const bearable = 0.2

// quietly measures when others leave the machine alone, and again if they did not. If they
// never do, it takes what they disturbed least.
func (m *measurer) quietly(measure func() (cost, Run)) Run {
	m.t.Helper()
	var best cost
	var run Run
	for i := range m.scale.tries {
		m.awaitQuiet()
		c, r := measure()
		m.mustGoOn()
		if i == 0 || c.others() < best.others() {
			best, run = c, r
		}
		if best.others() < bearable {
			break
		}
	}
	run.Others = best.others()
	return run
}

// awaitQuiet waits until others leave the machine alone, as long as there is patience left.
func (m *measurer) awaitQuiet() {
	const look = 100 * time.Millisecond
	for m.patience > 0 {
		all, start := m.busy(), time.Now()
		time.Sleep(look)
		m.mustGoOn()
		waited := time.Since(start)
		if float64(m.busy()-all)/float64(waited) < bearable {
			return
		}
		m.patience -= waited
	}
}

// rest measures what the machine does when nothing is measured.
func (m *measurer) rest(d time.Duration) {
	all, start := m.busy(), time.Now()
	select {
	case <-m.ctx.Done():
	case <-time.After(d):
	}
	m.mustGoOn()
	m.idle = float64(m.busy()-all) / float64(time.Since(start))
}

// TestSpent: what this process does is not counted, what the bed's processes do is.
func TestSpent(t *testing.T) {
	if testing.Short() {
		t.Skip("takes seconds: not with -short")
	}
	b := netnstest.NewUnwatched(t)
	h := b.Host("host", "")
	m := &measurer{t: t, ctx: t.Context()}
	idle := m.spent(b, func() time.Duration {
		for start := time.Now(); time.Since(start) < 300*time.Millisecond; {
		}
		return 0
	})
	if idle.own > 20*time.Millisecond || idle.all < 100*time.Millisecond {
		t.Errorf("while this process spins the bed takes %v and the machine %v; want 0 and 300ms", idle.own, idle.all)
	}
	p := h.StartCommand("sh", "-c", "echo spinning; while :; do :; done")
	p.Await(0, "spinning")
	spun := m.spent(b, func() time.Duration {
		sleep := h.StartCommand("sleep", "0.5")
		_ = sleep.Wait()
		return sleep.Used()
	})
	if spun.own < 50*time.Millisecond || spun.own > 2*spun.wall {
		t.Errorf("a spinning process takes %v in %v", spun.own, spun.wall)
	}
}
