package main

import (
	"context"
	"net"
	"net/netip"
	"sync"
	"testing"
	"time"

	"clonecluster/qemu/lab"
	"clonecluster/qemu/nethost"
)

// What is still good when emulated nodes share two busy cores. A SYN that is lost
// is sent again after 1, 3 and 7 s.
const (
	waitBound   = 10 * time.Second // for a connection, whatever happens
	orphanBound = 30 * time.Second // for a client to learn that its server is dead
	stepBound   = 90 * time.Second
	pauseTime   = 5 * time.Second
	// finishTimeout is for the rest of one download.
	finishTimeout = 10 * time.Second
)

// TestFaults takes one cluster of three through what can happen to it, while a
// client asks all the time and holds long downloads on every node. A node that is
// within reach all the time breaks none of them, requests are answered again soon,
// and afterwards all nodes share again.
func TestFaults(t *testing.T) {
	f := newFaults(t)
	for _, step := range []struct {
		name string
		run  func(*testing.T, *faults)
	}{
		{"join", join},
		{"graceful stop", gracefulStop},
		{"kill", kill},
		{"pause", pause},
		{"cable", cable},
		{"mute", mute},
		{"deaf", deaf},
		{"partition", partition},
	} {
		begin := time.Now()
		if !t.Run(step.name, func(t *testing.T) { step.run(t, f) }) && !f.whole(t) {
			t.Fatalf("after %q the nodes do not all share again: the other steps would tell nothing", step.name)
		}
		t.Logf("%s took %.1fs", step.name, time.Since(begin).Seconds())
	}
}

// faults is a cluster and its clients.
type faults struct {
	lab    *lab.Lab
	nodes  []nodeRef
	target target
	pace   time.Duration
	sum    [32]byte
}

// newFaults boots two of three nodes.
func newFaults(t *testing.T) *faults {
	img := testImage(t)
	cache, err := cacheDir()
	if err != nil {
		t.Fatal(err)
	}
	cfg, err := labConfig(img, upOptions{nodes: 3, accel: "auto", logs: t.ArtifactDir()}, cache)
	if err != nil {
		t.Fatal(err)
	}
	cfg.ManualStart = true
	f := &faults{}
	if f.target, err = webAddress(img.config); err != nil {
		t.Fatal(err)
	}
	if f.sum, err = benchSum(downloadSize); err != nil {
		t.Fatal(err)
	}
	for _, n := range cfg.Nodes {
		f.nodes = append(f.nodes, nodeRef{n.Name, n.MAC})
	}
	if f.lab, err = lab.Start(t.Context(), cfg); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.lab.Close() })
	f.lab.Switch().FailOnViolation(t)
	t.Cleanup(func() {
		if t.Failed() {
			t.Log(f.lab.Report())
		}
	})
	ctx, cancel := context.WithTimeout(t.Context(), bootTimeout)
	defer cancel()
	var wg sync.WaitGroup
	for i := range 2 {
		wg.Go(func() { f.boot(ctx, t, i) })
	}
	wg.Wait()
	asker := newAsker(f.lab.Client(), f.target.Port(), f.nodes)
	for len(asker.score().byNode) < 2 || asker.score().asked < 20 {
		if _, err := asker.ask(ctx, f.target.Addr()); ctx.Err() != nil {
			t.Fatalf("the first two nodes do not share: %v; %v", asker.score().byNode, err)
		}
	}
	f.pace = 2 * asker.pace() // it is not speed that is tested
	t.Logf("a request every %v", f.pace)
	return f
}

func (f *faults) boot(ctx context.Context, t *testing.T, i int) {
	if err := f.lab.Node(i).Start(); err != nil {
		t.Error(err)
	} else if _, err := f.lab.Node(i).WaitStage(ctx, "ready"); err != nil {
		t.Error(err)
	}
}

// whole says whether all nodes run and share.
func (f *faults) whole(t *testing.T) bool {
	ctx, cancel := context.WithTimeout(t.Context(), stepBound/3)
	defer cancel()
	asker := newAsker(f.lab.Client(), f.target.Port(), f.nodes)
	for len(asker.score().byNode) < len(f.nodes) {
		if asker.ask(ctx, f.target.Addr()); ctx.Err() != nil {
			return false
		}
	}
	return true
}

func join(t *testing.T, f *faults) {
	c := f.clients(t, f.lab.Client(), downloadChatter, 0, 1)
	on := c.now("power on")
	f.boot(c.ctx, t, 2)
	c.untilShared(on, 0, 1, 2)
	c.judgeStrictly("", 0, 1)
}

// Nobody notices that a node stops and comes back.
func gracefulStop(t *testing.T, f *faults) {
	c := f.clients(t, f.lab.Client(), 0, 0, 1, 2)
	c.now("power button")
	off := make(chan error, 1)
	go func() {
		ctx, cancel := context.WithTimeout(c.ctx, shutdownTimeout)
		defer cancel()
		off <- f.lab.Node(2).Shutdown(ctx)
	}()
	// Its clients take what is left, which is within the time that a node grants.
	for _, d := range c.of(2) {
		d.Hurry()
	}
	if err := <-off; err != nil {
		t.Errorf("stopping %s: %v", f.nodes[2].name, err)
	}
	on := c.now("power on")
	f.boot(c.ctx, t, 2)
	c.untilShared(on, 0, 1, 2)
	c.judgeStrictly("", 0, 1, 2)
}

func kill(t *testing.T, f *faults) {
	c := f.clients(t, f.lab.Client(), downloadChatter, 0, 1, 2)
	cut := c.now("power cut")
	f.lab.Node(1).Kill()
	c.untilTaken(cut)
	lost := c.of(1)
	c.until("the clients of the dead node know it", func() bool { return running(lost) == 0 || time.Since(cut) > orphanBound })
	if r := lostOf(lost, cut); r.Known < r.Begun {
		c.errorf("clients that learned that their server is dead: %v", r)
	} else {
		t.Logf("clients that learned that their server is dead: %v", r)
	}
	on := c.now("power on")
	f.boot(c.ctx, t, 1)
	c.untilShared(on, 0, 1, 2)
	c.judgeStrictly(f.nodes[1].name, 0, 2)
}

// A node whose clock stands still with it cannot know that it was away.
func pause(t *testing.T, f *faults) {
	c := f.clients(t, f.lab.Client(), downloadChatter, 0, 1, 2)
	node := f.lab.Node(2)
	if err := node.Pause(c.ctx); err != nil {
		t.Fatal(err)
	}
	resume := time.NewTimer(pauseTime)
	defer resume.Stop()
	if err := sleep(c.ctx, pauseTime/2); err != nil {
		t.Fatal(err)
	}
	for range 6 { // some in what was the paused node's share
		c.download(downloadChatter)
	}
	<-resume.C
	back := c.now("resumed")
	if err := node.Resume(c.ctx); err != nil {
		t.Fatal(err)
	}
	c.untilShared(back.Add(quietTime), 0, 1, 2)
	c.judge(node.Name(), 0, 1)
}

func cable(t *testing.T, f *faults) {
	c := f.clients(t, f.lab.Client(), downloadChatter, 0, 1, 2)
	node := f.lab.Node(0)
	out := c.now("cable out")
	if err := node.Unplug(c.ctx); err != nil {
		t.Fatal(err)
	}
	c.untilTaken(out)
	in := c.now("cable in")
	if err := node.Plug(c.ctx); err != nil {
		t.Fatal(err)
	}
	c.untilShared(in, 0, 1, 2)
	c.judge(node.Name(), 1, 2)
}

func mute(t *testing.T, f *faults) {
	f.oneWay(f.clients(t, f.lab.Client(), downloadChatter, 0, 1, 2), (*lab.Machine).Mute)
}

func deaf(t *testing.T, f *faults) {
	c := f.clients(t, f.lab.Client(), downloadChatter, 0, 1, 2)
	f.oneWay(c, (*lab.Machine).Deafen)
}

// A cable with one broken wire: half a node must not keep its share.
func (f *faults) oneWay(c *clients, cut func(*lab.Machine) (func(), error)) {
	node := f.lab.Node(1)
	out := c.now("cable half broken")
	undo, err := cut(node)
	if err != nil {
		c.t.Fatal(err)
	}
	c.untilTaken(out)
	undo()
	c.untilShared(c.now("cable whole"), 0, 1, 2)
	c.judge(node.Name(), 0, 2)
}

// Each side of a partition serves the clients that it can hear, and when it heals
// no side's flows break.
func partition(t *testing.T, f *faults) {
	far, err := nethost.Attach(f.lab.Switch(), "far", nethost.Config{
		MAC:   net.HardwareAddr{0x52, 0x54, 0, 0x77, 0xff, 2},
		Addrs: []netip.Prefix{netip.MustParsePrefix("10.77.0.2/24")},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(far.Close)
	c := f.clients(t, f.lab.Client(), downloadChatter, 0, 1, 2)
	out := c.now("partition")
	heal, err := f.lab.Partition([]string{"client", f.nodes[0].name, f.nodes[1].name}, []string{"far", f.nodes[2].name})
	if err != nil {
		t.Fatal(err)
	}
	c.untilTaken(out)
	there := f.clients(t, far, downloadChatter, 2)
	there.untilTaken(there.begin)
	heal()
	healed := c.now("healed")
	c.untilShared(healed.Add(quietTime), 0, 1, 2)
	there.untilShared(healed.Add(quietTime), 0, 1, 2)
	c.judge(f.nodes[2].name, 0, 1)
	there.judge("", 2)
}
