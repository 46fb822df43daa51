package engine_test

import (
	"fmt"
	"regexp"
	"runtime"
	"testing"
	"time"

	"clonecluster/netcore/netnstest"
)

func init() { netnstest.Register("spin", spin) }

// spin is another process that has work for a processor without end.
func spin([]string) int {
	println("spinning")
	for n := uint64(1); n != 0; n++ {
	}
	return 0
}

// TestFigureDownloads has three nodes join two at once, two of the five leave at
// once, and then one, again and again, while downloads are in flight on all of
// them. None may break: those on the two that stay have seen all of it, and
// those on a node that leaves are what it waits for.
func TestFigureDownloads(t *testing.T) {
	f := newFailover(t, 5, patient)
	stay, come := f.nodes[:2], f.nodes[2:]
	f.boot(stay...)
	f.own(stay...)
	long := f.startDownloads(f.client, 200, stay...)
	c := f.startCrowd(f.client, 10*time.Millisecond, 400, 0)
	repetitions, changes, others := size(2, 20), 0, 0
	for range repetitions {
		f.boot(come...)
		f.own(f.nodes...)
		changes += len(come)
		more := f.startDownloads(f.client, 40, f.nodes...)
		others += len(more.all)
		more.mustGoOn("after three nodes joined")
		for _, leaving := range [][]*node{come[:2], come[2:]} {
			f.leave(leaving...)
			changes += len(leaving)
			more.mustGoOn("while nodes drain")
			more.of(leaving...).close()
			f.gone(leaving...)
		}
		more.mustGoOn("after three nodes left")
		more.close()
		long.mustGoOn("after three nodes joined and left")
	}
	all := c.end()
	t.Logf("%d repetitions, %d joins and drains: %d of %d downloads in flight throughout broke, and of %d in flight for a part; besides, %v",
		repetitions, changes, long.countBroken(), len(long.all), others, all)
	f.mustSucceed(all)
}

// TestFigureDrain stops one node after the other gracefully and starts it again,
// while connections arrive all the time: none may fail.
func TestFigureDrain(t *testing.T) {
	f := newFailover(t, 3, patient)
	f.boot(f.nodes...)
	f.own(f.nodes...)
	total, drains := size(10_000, 100_000), 0
	c := f.startCrowd(f.client, 2*time.Millisecond, 500, total)
	for i := 0; !c.opened(); i++ {
		n := f.nodes[i%len(f.nodes)]
		f.leave(n)
		f.gone(n)
		drains++
		n.resume()
		f.own(f.nodes...)
	}
	all := c.wait()
	t.Logf("%d drains, %d failed: %v", drains, len(all.failed()), all)
	f.mustSucceed(all)
	if len(all) != total || drains < 2 {
		t.Errorf("%d requests and %d drains; want %d, and several", len(all), drains, total)
	}
}

// TestFigureFalseFailovers saturates every core twice with other processes. No
// node may be taken for dead meanwhile.
func TestFigureFalseFailovers(t *testing.T) {
	f := newFailover(t, 3, normal)
	f.boot(f.nodes...)
	f.own(f.nodes...)
	spinners := 2 * runtime.NumCPU()
	for range spinners {
		p := f.client.Start("spin")
		p.Await(0, "spinning")
		defer p.Kill()
	}
	start := time.Now()
	c := f.startCrowd(f.client, 50*time.Millisecond, 400, 0)
	length := size(20*time.Second, 10*time.Minute)
	time.Sleep(length)
	all := c.end()

	lost, explained := f.views(start)
	t.Logf("%v with %d busy processes on %d cores: %d false failovers; a real-time thread was held up for %v at most; %v",
		length, spinners, runtime.NumCPU(), lost, f.stalls.Longest(start).Round(time.Millisecond), all)
	f.judge(lost, explained)
	if lost > 0 {
		t.Errorf("%d times a view lacked a node, of that %d while the machine stood still; want 0", lost, explained)
	}
	f.mustSucceed(all)
}

// views counts how often since a time an engine had a view of fewer nodes than
// there are, and how often of that the machine had stood still.
func (f *failover) views(since time.Time) (fewer, explained int) {
	for _, n := range f.nodes {
		for _, line := range n.cloned.Lines(since) {
			m := viewLine.FindStringSubmatch(line.Text)
			if m == nil || m[1] == "serving" && m[2] == fmt.Sprint(len(f.nodes)) {
				continue
			}
			fewer++
			if f.stood(line.At) {
				explained++
			}
			f.t.Logf("%s, after %v: %s", n.Name, line.At.Sub(since).Round(time.Millisecond), line.Text)
		}
	}
	return fewer, explained
}

// viewLine is what an engine logs when its view changes.
var viewLine = regexp.MustCompile(`msg=view .*state=(\S+) slot=\d+ of=(\d+) `)
