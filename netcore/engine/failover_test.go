package engine_test

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"clonecluster/netcore/engine"
	"clonecluster/netcore/netnstest"
)

// The tests named TestFailover… change who is there while clients are at work,
// and count what the clients see: at their sockets, or with tshark in what
// passed their cable. Those named TestFigure… print a figure with t.Logf and
// hold it against what the design promises.
//
// With CLONECLUSTER_FULL=1 in the environment they run at the size at which the
// figures are published and with the default detection time, which wants a
// machine of their own for half an hour:
//
//	CLONECLUSTER_FULL=1 go test -count=1 -timeout 60m -v -run '^TestFigure' ./netcore/engine
//
// Without it they take seconds each. A test that the machine was too busy to
// judge skips and says so, and fails at full size.
var full = os.Getenv("CLONECLUSTER_FULL") == "1"

// size is the one of two sizes that this run is for.
func size[T any](quick, published T) T {
	if full {
		return published
	}
	return quick
}

// tooBusy ends a test that cannot tell.
func tooBusy(t *testing.T, format string, args ...any) {
	t.Helper()
	message := "this machine is too busy to tell: " + fmt.Sprintf(format, args...)
	if full {
		t.Fatal(message)
	}
	t.Skip(message)
}

// A profile is one setting of the failure detector.
type profile struct {
	detect string
	dead   time.Duration // what it says
	// taken is what is promised: the time from the death of a machine until a
	// client's SYN is answered in 99 of 100 of its buckets.
	taken time.Duration
}

var (
	normal  = profile{"normal", 300 * time.Millisecond, 350 * time.Millisecond}
	fast    = profile{"fast", 150 * time.Millisecond, 160 * time.Millisecond}
	relaxed = profile{"relaxed", time.Second, 1200 * time.Millisecond}

	// patient is for what does not depend on the detector: a machine that runs
	// other things as well stands still for a third of a second now and then.
	patient = size(relaxed, normal)
)

// standstill is what may make a node late for its lease, two thirds of dead after
// a beacon, of which there are three in dead: no scheduling can help where the
// whole machine is not run for so long.
func (p profile) standstill() time.Duration { return p.dead / 4 }

// A failover is a cluster whose nodes come and go under load.
type failover struct {
	*cluster
	t *testing.T
	profile
	probe  *prober
	stalls *netnstest.Stalls // of a real-time thread
	delays *netnstest.Stalls // of a normal one
	http   map[*node]bool    // whose service runs
}

// newFailover builds n nodes, a client, and a prober, with nothing running.
func newFailover(t *testing.T, n int, p profile) *failover {
	t.Helper()
	f := &failover{cluster: newCluster(t, n), t: t, profile: p, stalls: netnstest.WatchStalls(t, true), delays: netnstest.WatchStalls(t, false), http: map[*node]bool{}}
	writeConfig(t, f.config, "detect: relaxed", "detect: "+p.detect)
	// A hundred thousand connections of one client need their ports.
	f.client.Sysctl("net.ipv4.ip_local_port_range", "1024 65535")
	f.probe = newProber(t, f.cluster)
	t.Cleanup(f.explain)
	return f
}

// stood tells whether the machine stood still before a time, for so long that
// what went wrong then says nothing of the cluster.
func (f *failover) stood(at time.Time) bool {
	return f.stalls.Between(at.Add(-2*f.dead-time.Second), at) > f.standstill()
}

// judge ends the test, if something went wrong but only while the machine stood
// still, as one that cannot tell.
func (f *failover) judge(wrong, explained int) {
	f.t.Helper()
	if wrong > 0 && wrong == explained {
		tooBusy(f.t, "%d things went wrong, all just after it had stood still for a real-time thread too, for up to %v",
			wrong, f.stalls.Longest(time.Time{}).Round(time.Millisecond))
	}
}

// explain tells, if the test has failed, what the nodes made of it.
func (f *failover) explain() {
	if !f.t.Failed() {
		return
	}
	for _, n := range f.nodes {
		if n.cloned == nil {
			continue
		}
		var said []string
		for _, line := range n.cloned.Lines(time.Time{}) {
			if !strings.Contains(line.Text, "level=DEBUG") {
				said = append(said, line.At.Format("15:04:05.000 ")+line.Text)
			}
		}
		f.t.Logf("%s, the last of %d lines:\n%s", n.Name, len(said), strings.Join(said[max(0, len(said)-25):], "\n"))
	}
}

// boot starts the engines of nodes, and the service where it does not run,
// without waiting for the engines.
func (f *failover) boot(nodes ...*node) {
	f.t.Helper()
	for _, n := range nodes {
		if !f.http[n] {
			n.StartHTTP()
			f.http[n] = true
		}
	}
	for _, n := range nodes {
		n.resume()
	}
}

// resume starts an engine that, asked to stop, waits for its flows as long as
// it takes.
func (n *node) resume() {
	n.cloned = n.Start("cloned", n.flags("--drain", "10m")...)
}

// own waits until exactly these nodes take new connections, every bucket has its
// node, and nothing moves any more.
func (f *failover) own(nodes ...*node) owners {
	f.t.Helper()
	var seen, last owners
	for deadline := time.Now().Add(time.Minute); time.Now().Before(deadline); last = seen {
		seen = f.probe.owners()
		if seen == last && seen.complete() && slices.Equal(seen.nodes(), names(nodes)) {
			return seen
		}
	}
	f.t.Fatalf("new connections are answered by %v; want all of them, by %v", &seen, names(nodes))
	return seen
}

func names(nodes []*node) (s []string) {
	for _, n := range nodes {
		s = append(s, n.Name)
	}
	slices.Sort(s)
	return s
}

// others are the nodes that run, without these.
func (f *failover) others(nodes ...*node) (others []*node) {
	for _, n := range f.nodes {
		if n.cloned != nil && !slices.Contains(nodes, n) {
			others = append(others, n)
		}
	}
	return others
}

// leave asks the engines of nodes to stop, all at once, and returns when they
// take no new connections any more and the others all of them. Their
// connections go on; gone waits for the end.
func (f *failover) leave(nodes ...*node) {
	f.t.Helper()
	for _, n := range nodes {
		n.cloned.Signal(syscall.SIGTERM)
	}
	f.own(f.others(nodes...)...)
}

// gone waits until the engines of nodes that leave have ended.
func (f *failover) gone(nodes ...*node) {
	f.t.Helper()
	for _, n := range nodes {
		if err := n.cloned.Wait(); err != nil {
			f.t.Errorf("%s ended with %v", n.Name, err)
		}
		n.cloned = nil
	}
}

// powerOff ends a node as a power cut does, and tells when.
func (f *failover) powerOff(n *node) time.Time {
	f.t.Helper()
	at := n.PowerOff()
	n.cloned, f.http[n] = nil, false
	return at
}

// powerOn boots a node that was powered off.
func (f *failover) powerOn(n *node) {
	f.t.Helper()
	n.PowerOn()
	f.boot(n)
}

// agreed waits until these nodes share the buckets and say so.
func (f *failover) agreed(nodes ...*node) {
	f.t.Helper()
	var want []string
	for _, n := range nodes {
		want = append(want, n.MAC)
	}
	slices.Sort(want)
	for _, n := range nodes {
		var s engine.Status
		for deadline := time.Now().Add(time.Minute); ; time.Sleep(2 * time.Millisecond) {
			if s = n.Status(); s.State == "serving" && s.Agreed && slices.Equal(s.Nodes, want) {
				break
			}
			if time.Now().After(deadline) {
				f.t.Fatalf("%s is %s, agreed %v, with %v; want serving, agreed, with %v", n.Name, s.State, s.Agreed, s.Nodes, want)
			}
		}
	}
}

// awaitBuckets waits until a node owns that many.
func (n *node) awaitBuckets(want int) {
	n.c.t.Helper()
	owned := -1
	for deadline := time.Now().Add(time.Minute); time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
		b := n.Status().Buckets
		if owned = b.Settled + b.Shared; owned == want {
			return
		}
	}
	n.c.t.Fatalf("%s owns %d buckets; want %d", n.Name, owned, want)
}

// drain and takePart are what an operator asks of a node.
func (n *node) drain()    { n.c.t.Helper(); n.post("/v1/drain") }
func (n *node) takePart() { n.c.t.Helper(); n.post("/v1/resume") }

func (n *node) post(path string) {
	n.c.t.Helper()
	tr := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", n.status)
	}}
	defer tr.CloseIdleConnections()
	resp, err := (&http.Client{Transport: tr, Timeout: 10 * time.Second}).Post("http://cloned"+path, "", nil)
	if err != nil {
		n.c.t.Fatalf("%s: %s: %v", n.Name, path, err)
	}
	defer resp.Body.Close()
	if resp.StatusCode/100 != 2 {
		body, _ := io.ReadAll(resp.Body)
		n.c.t.Fatalf("%s: %s: %s: %s", n.Name, path, resp.Status, body)
	}
}
