package engine_test

import (
	"syscall"
	"testing"
	"time"

	"clonecluster/netcore/netnstest"
)

// load is a crowd and downloads that are in flight while nodes come and go.
func (f *failover) load(downloads int, nodes ...*node) (*crowd, *downloads) {
	f.t.Helper()
	d := f.startDownloads(f.client, downloads, nodes...)
	c := f.startCrowd(f.client, 5*time.Millisecond, 400, 0)
	c.await(50)
	return c, d
}

// TestFailoverJoin: one more node takes its share, and nobody notices.
func TestFailoverJoin(t *testing.T) {
	f := newFailover(t, 3, patient)
	f.boot(f.nodes[:2]...)
	f.own(f.nodes[:2]...)
	c, d := f.load(60, f.nodes[:2]...)
	f.boot(f.nodes[2])
	o := f.own(f.nodes...)
	c.await(50, f.nodes...)
	d.mustGoOn("after a node joined")
	all := c.end()
	t.Logf("%v; %v; buckets %v", all, d, &o)
	f.mustSucceed(all)
}

// TestFailoverDrain: one node is asked to stop, then two at once.
func TestFailoverDrain(t *testing.T) {
	f := newFailover(t, 4, patient)
	f.boot(f.nodes...)
	f.own(f.nodes...)
	c, d := f.load(80, f.nodes...)
	for _, leaving := range [][]*node{f.nodes[:1], f.nodes[1:3]} {
		f.leave(leaving...)
		c.await(50)
		d.mustGoOn("while nodes drain")
		// What ends now was long enough.
		d.of(leaving...).close()
		f.gone(leaving...)
	}
	left := d.of(f.nodes[3])
	left.mustGoOn("after three of four nodes left")
	all := c.end()
	t.Logf("%v; %v", all, left)
	f.mustSucceed(all)
}

// TestFailoverRebalance: five nodes join three at once, and then four of the
// eight leave at once.
func TestFailoverRebalance(t *testing.T) {
	f := newFailover(t, 8, patient)
	f.boot(f.nodes[:3]...)
	f.own(f.nodes[:3]...)
	c, d := f.load(60, f.nodes[:3]...)
	f.boot(f.nodes[3:]...)
	o := f.own(f.nodes...)
	c.await(100, f.nodes...)
	d.mustGoOn("after five nodes joined")
	leaving := f.nodes[1:5]
	f.leave(leaving...)
	c.await(100, f.others(leaving...)...)
	d.mustGoOn("while four nodes drain")
	d.of(leaving...).close()
	f.gone(leaving...)
	d.mustGoOn("after four nodes left")
	all := c.end()
	t.Logf("%v; %v; buckets of the eight %v", all, d, &o)
	f.mustSucceed(all)
}

// TestFailoverFaults takes one of three nodes away in every way that has no
// last word, and gives it back. The downloads of the others never notice. Of
// the requests, those fail at most that were in flight when it began, or, where
// the node still reaches the client, until the others took its buckets.
func TestFailoverFaults(t *testing.T) {
	const beacons = 0x88b5
	for _, tt := range []struct {
		name       string
		begin, end func(f *failover, n *node)
		speaks     bool // the clients still hear the node
	}{
		{
			name:  "death of the machine",
			begin: func(f *failover, n *node) { f.powerOff(n) },
			end:   func(f *failover, n *node) { f.powerOn(n) },
		},
		{
			name:  "pause of the engine for two seconds",
			begin: func(_ *failover, n *node) { n.cloned.Signal(syscall.SIGSTOP) },
			end: func(_ *failover, n *node) {
				time.Sleep(2 * time.Second) // the length of the pause is the point
				n.cloned.Signal(syscall.SIGCONT)
			},
		},
		{
			name:  "cable cut",
			begin: func(f *failover, n *node) { f.Unplug(n.Host) },
			end:   func(f *failover, n *node) { f.Plug(n.Host) },
		},
		{
			name:  "cable deaf",
			begin: func(f *failover, n *node) { f.Cut(n.Host, netnstest.ToHost, 0) },
			end:   func(f *failover, n *node) { f.Mend(n.Host) },
		},
		{
			name:  "cable mute",
			begin: func(f *failover, n *node) { f.Cut(n.Host, netnstest.FromHost, 0) },
			end:   func(f *failover, n *node) { f.Mend(n.Host) },
		},
		{
			name:   "beacons mute",
			begin:  func(f *failover, n *node) { f.Cut(n.Host, netnstest.FromHost, beacons) },
			end:    func(f *failover, n *node) { f.Mend(n.Host) },
			speaks: true,
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			f := newFailover(t, 3, patient)
			f.boot(f.nodes...)
			f.own(f.nodes...)
			c, d := f.load(60, f.nodes...)
			victim, others := f.nodes[1], []*node{f.nodes[0], f.nodes[2]}

			begin := time.Now()
			tt.begin(f, victim)
			begun := time.Now() // a command that cuts a cable takes milliseconds to do so
			f.own(others...)
			taken := time.Now()
			c.await(50, others...)
			d.of(others...).mustGoOn("while one node is away")
			tt.end(f, victim)
			f.own(f.nodes...)
			c.await(50, f.nodes...)
			d.of(others...).mustGoOn("after the node is back")

			all := c.end()
			until := begun
			if tt.speaks {
				until = taken
			}
			untouched := all.outside(begin, until)
			t.Logf("%v; %d were in flight when it began; buckets taken by the others, as seen from outside, after %v",
				all, len(all)-len(untouched), taken.Sub(begin).Round(time.Millisecond))
			f.mustSucceed(untouched)
		})
	}
}

// TestFailoverFilteredMulticast: a switch that keeps the beacons' group from one
// node costs no request and no download.
func TestFailoverFilteredMulticast(t *testing.T) {
	f := newFailover(t, 3, patient)
	f.boot(f.nodes...)
	f.own(f.nodes...)
	c, d := f.load(60, f.nodes...)
	before := time.Now()
	f.Switch.Run("bridge", "link", "set", "dev", f.nodes[1].Name, "mcast_flood", "off")
	time.Sleep(4 * f.dead) // longer than it takes to lose a node
	c.await(50, f.nodes...)
	d.mustGoOn("while multicast is filtered")
	f.own(f.nodes...)
	all := c.end()
	t.Logf("%v", all)
	f.mustSucceed(all)
	lost, _ := f.views(before) // a busy machine may be late with the first unicast beacon
	t.Logf("%d times a view lacked a node", lost)
}

// TestFailoverPartition parts the segment, with nodes and a client on each side,
// and joins it again. Each side serves its own client with what it has, and the
// connections of a client to its own side go on throughout.
func TestFailoverPartition(t *testing.T) {
	f := newFailover(t, 4, patient)
	far := f.Host("far", "", "10.77.0.3/24", "fd77::3/64")
	f.boot(f.nodes...)
	f.own(f.nodes...)
	here, there := f.nodes[:2], f.nodes[2:]
	near := f.startDownloads(f.client, 40, here...)
	c := f.startCrowd(f.client, 10*time.Millisecond, 400, 0)
	farther := f.startDownloads(far, 40, there...)
	farCrowd := f.startCrowd(far, 10*time.Millisecond, 400, 0)
	c.await(20)
	farCrowd.await(20)

	begin := time.Now()
	f.Part(append([]*netnstest.Host{far}, hosts(there)...)...)
	f.own(here...)
	farCrowd.await(50, there...)
	taken := time.Now()
	c.await(50, here...)
	near.of(here...).mustGoOn("while the segment is parted")
	farther.of(there...).mustGoOn("while the segment is parted")

	heal := time.Now()
	f.Heal()
	f.own(f.nodes...)
	merged := time.Now()
	c.await(50, f.nodes...)
	farCrowd.await(50, f.nodes...)
	near.of(here...).mustGoOn("after the segment was joined")
	farther.of(there...).mustGoOn("after the segment was joined")
	for _, side := range []struct {
		name string
		all  requests
	}{{"here", c.end()}, {"there", farCrowd.end()}} {
		t.Logf("%s: %v; in flight while the sides merged: %v", side.name, side.all, side.all.touching(heal, merged))
		f.mustSucceed(side.all.outside(begin, taken))
	}
}

func hosts(nodes []*node) (hosts []*netnstest.Host) {
	for _, n := range nodes {
		hosts = append(hosts, n.Host)
	}
	return hosts
}
