package engine_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"clonecluster/netcore/load"
	"clonecluster/netcore/netnstest"
)

// cloned-busy is cloned on a machine whose processors are as busy as the file of its first
// argument says: the nodes of a test share one machine and are all equally busy.
func init() { netnstest.Register("cloned-busy", netnstest.Over(load.ProcStat, "cloned")) }

// A meter is the /proc/stat of a node that takes so much of its processor for
// each connection that it answers.
type meter struct {
	file *os.File
	cost time.Duration
	busy time.Duration
}

// tick writes the times after answering requests in a while.
func (m *meter) tick(requests int, total, while time.Duration) error {
	m.busy += min(time.Duration(requests)*m.cost, while)
	const jiffy = 10 * time.Millisecond
	_, err := m.file.WriteAt(fmt.Appendf(nil, "cpu  %012d 0 0 %012d 0 0 0 0 0 0\n", m.busy/jiffy, (total-m.busy)/jiffy), 0)
	return err
}

// TestFailoverLoad: with byLoad a machine that needs three times as long for a
// connection gets a third of them, without one that fails, and no faster than
// policy.moves allows.
func TestFailoverLoad(t *testing.T) {
	const (
		every = 5 * time.Millisecond // between two connections
		moves = 32
		slow  = 12 * time.Millisecond
		quick = 4 * time.Millisecond
		runs  = 40 * time.Second
	)
	f := newFailover(t, 3, patient)
	writeConfig(t, f.config, "name: byRandom ", "name: byLoad ", "detect: relaxed", "detect: "+f.detect)
	meters := map[string]*meter{}
	for i, n := range f.nodes {
		file, err := os.Create(filepath.Join(f.Dir, n.Name+".stat"))
		if err != nil {
			t.Fatal(err)
		}
		defer file.Close()
		m := &meter{file: file, cost: quick}
		if i == 0 {
			m.cost = slow
		}
		if err := m.tick(0, time.Second, time.Second); err != nil {
			t.Fatal(err)
		}
		meters[n.Name] = m
		n.StartHTTP()
		n.cloned = n.Start("cloned-busy", append([]string{file.Name()}, n.flags()...)...)
	}
	f.own(f.nodes...)
	c := f.startCrowd(f.client, every, 400, 0)
	began := time.Now()
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	shares, most := map[string]int{}, 0
	looked := began
	for seen, last := 0, began; time.Since(began) < runs; {
		<-tick.C
		now := time.Now()
		if now.Sub(looked) > time.Second {
			looked = now
			moved := 0
			for _, n := range f.nodes {
				share := f.nodes[1].shareOf(n).Buckets
				if was, known := shares[n.Name]; known {
					moved += max(0, share-was)
				}
				shares[n.Name] = share
			}
			most = max(most, moved)
		}
		answered := map[string]int{}
		c.mu.Lock()
		for ; seen < len(c.requests) && c.requests[seen].ended > 0; seen++ {
			answered[c.requests[seen].node]++
		}
		c.mu.Unlock()
		for name, m := range meters {
			if err := m.tick(answered[name], time.Second+now.Sub(began), now.Sub(last)); err != nil {
				t.Fatal(err)
			}
		}
		last = now
	}
	all := c.end()
	f.mustSucceed(all)
	late := all.outside(time.Time{}, began.Add(runs-10*time.Second))
	t.Logf("buckets %v, at most %d moved in a second; of all, %v; of the last ten seconds, %v", shares, most, all, late)
	// A seventh is what makes all equally busy.
	if got := shares[f.nodes[0].Name]; got < 1024/7*4/5 || got > 1024/7*3/2 {
		t.Errorf("the slow node has %d of 1024 buckets; want about %d", got, 1024/7)
	}
	of := map[string]int{}
	for _, r := range late {
		of[r.node]++
	}
	if got := float64(of[f.nodes[0].Name]) / float64(len(late)); got > 0.22 {
		t.Errorf("the slow node answers %.0f %% of the last connections; want about 14 %%", 100*got)
	}
	made := 0
	for _, n := range f.nodes {
		made += strings.Count(n.cloned.Output(), "node made a map")
	}
	if made < 5 {
		t.Errorf("%d maps were made: this shows nothing", made)
	}
	if most > 2*moves { // between two looks a second apart there may be two moves
		t.Errorf("%d buckets moved between two looks; want at most %d a second", most, moves)
	}
}
