package engine_test

import (
	"testing"
	"time"

	"clonecluster/netcore/bpf"
)

const (
	idleNodes = 4
	// idleMost is how often in a second the threads of an idle engine may wait for something:
	// 55 to 65 times were seen on a quiet machine (ten beats of its own, thirty of the others),
	// 72 to 85 with four busy loops on two processors, and 150 with one more timer of 50 ms, as
	// each of Go's wakes more than one thread.
	idleMost = 100
)

// TestIdleCost: an engine of an idle cluster takes little of a processor. What a thread takes to
// wake is another time on each machine, and far more on a busy one, so it is counted how often
// one wakes.
func TestIdleCost(t *testing.T) {
	if err := bpf.Probe(); err != nil {
		t.Skip(err)
	}
	c := newCluster(t, idleNodes)
	for _, n := range c.nodes {
		n.datapath = "bpf"
	}
	c.start()
	waits := func() (sum int) {
		for _, n := range c.nodes {
			sum += n.cloned.Waits()
		}
		return sum
	}
	// The first seconds are those of the start, and ten seconds after it an engine hashes its program.
	var rate float64
	for range 10 {
		before, begin := waits(), time.Now()
		time.Sleep(2 * time.Second)
		rate = float64(waits()-before) / idleNodes / time.Since(begin).Seconds()
		t.Logf("an engine waits %.0f times a second", rate)
		if rate <= idleMost {
			return
		}
	}
	t.Errorf("an idle engine's threads wait %.0f times a second; want %d at most", rate, idleMost)
}
