package main

import (
	"bytes"
	"context"
	"errors"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"clonecluster/config"
	"clonecluster/netcore/api"
)

// rollNode is a node of a cluster of which nothing is real but the APIs.
type rollNode struct {
	*oneNode
	c     *rollCluster
	id    string
	name  string
	at    netip.AddrPort
	born  time.Time
	build string
	next  string // what it runs after a restart
	aside bool
}

type rollCluster struct {
	mu      sync.Mutex
	nodes   []*rollNode
	reboots []string
	ordered func(*rollNode) error // instead of a restart; may be nil
	other   *api.Policy           // an order of somebody else's, which holds in the end
}

func (n *rollNode) Self() (string, string) { return n.id, n.name }

func (n *rollNode) Status() api.Status {
	drained := n.isDrained()
	n.c.mu.Lock()
	defer n.c.mu.Unlock()
	s := api.Status{
		Cluster: "demo", Name: n.name, WireMAC: n.id, State: "serving", Agreed: true, Leader: n.c.nodes[0].id, Build: n.build, Policy: "byRandom",
		UptimeSec: time.Since(n.born).Seconds(), Drain: api.Drain{Draining: drained || n.aside, Aside: n.aside, Flows: n.flows},
	}
	p := n.Policy()
	s.PolicyVersion, s.PolicyAuthor = p.Version, p.Author
	if drained || n.aside {
		s.State = "draining"
	}
	for _, m := range n.c.nodes {
		member := api.Member{Node: m.id, Self: m == n, State: "serving", Live: true, Weight: 100, Buckets: 1024 / len(n.c.nodes)}
		if m == n && drained {
			member.State, member.Buckets = "draining", 0
		}
		s.Members = append(s.Members, member)
	}
	return s
}

func (n *oneNode) isDrained() bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.drained
}

func (n *rollNode) Peers() (peers []api.Peer) {
	n.c.mu.Lock()
	defer n.c.mu.Unlock()
	for _, m := range n.c.nodes {
		if m != n {
			peers = append(peers, api.Peer{Node: m.id, Name: m.name, Addresses: []netip.AddrPort{m.at}})
		}
	}
	return peers
}

// SetPolicy changes it here at once, and soon at all.
func (n *rollNode) SetPolicy(ctx context.Context, o api.PolicyOrder, who string) (api.Policy, error) {
	p, err := n.oneNode.SetPolicy(ctx, o, who)
	p.Author = n.id
	n.setPolicy(p)
	holds := p
	n.c.mu.Lock()
	if n.c.other != nil {
		holds = *n.c.other
	}
	others := n.c.nodes[1:]
	n.c.mu.Unlock()
	for _, m := range others {
		m.setPolicy(holds)
	}
	time.AfterFunc(700*time.Millisecond, func() { n.setPolicy(holds) })
	return p, err
}

func (n *rollNode) setPolicy(p api.Policy) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.policy = p
}

func (n *rollNode) Reboot(_ context.Context, o api.Order, who string) error {
	n.c.mu.Lock()
	defer n.c.mu.Unlock()
	if n.c.ordered != nil {
		if err := n.c.ordered(n); err != nil {
			return err
		}
	}
	n.restart(o, who)
	return nil
}

// restart restarts it; c.mu is held.
func (n *rollNode) restart(o api.Order, who string) {
	n.c.reboots = append(n.c.reboots, n.name)
	n.born, n.build = time.Now(), n.next
	n.oneNode.order(false, o, who)
}

func serveRollout(t *testing.T) (c *rollCluster, at []string) {
	t.Helper()
	t.Setenv("CLONECLUSTER_CACHE", t.TempDir())
	t.Chdir(t.TempDir())
	if err := os.WriteFile("cluster.yaml", config.DemoYAML, 0o600); err != nil {
		t.Fatal(err)
	}
	demo := config.Demo()
	a, err := api.NewAuthority(demo.Cluster.Name, demo.Cluster.Key)
	if err != nil {
		t.Fatal(err)
	}
	c = &rollCluster{}
	for i, name := range []string{"web-1", "web-2", "web-3"} {
		n := &rollNode{
			oneNode: &oneNode{events: api.NewEvents(), log: api.NewLog()}, c: c, id: net.HardwareAddr{0x52, 0x54, 0, 0x77, 0, byte(i + 1)}.String(),
			name: name, born: time.Now().Add(-time.Hour), build: "0ld", next: "new",
		}
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		n.at = netip.MustParseAddrPort(l.Addr().String())
		c.mu.Lock()
		c.nodes = append(c.nodes, n)
		c.mu.Unlock()
		serveFake(t, a, n, l)
	}
	return c, []string{"--address", c.nodes[0].at.String()}
}

func (c *rollCluster) setFlows(node, flows int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.nodes[node].flows = flows
}

// setAt says where a node is reached.
func (c *rollCluster) setAt(node int, at netip.AddrPort) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.nodes[node].at = at
}

// nowhere is where nobody answers.
var nowhere = netip.MustParseAddrPort("127.0.0.1:1")

func (c *rollCluster) rebooted() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return strings.Join(c.reboots, " ")
}

// TestRollout: one after the other, the leader last; what goes wrong ends it, and it
// goes on from there.
func TestRollout(t *testing.T) {
	c, at := serveRollout(t)
	run := func(args string) (string, error) {
		t.Helper()
		return clonectl(t, append(strings.Fields(args), at...)...)
	}
	out, err := run("rollout --dry-run")
	if err != nil || !strings.Contains(out, "web-2: 1 of 3: serving, 341 buckets") || !strings.Contains(out, "web-1: 3 of 3") || c.rebooted() != "" {
		t.Fatalf("a dry run does %q and says\n%s%v", c.rebooted(), out, err)
	}
	c.nodes[2].next = "other"
	out, err = run("rollout --timeout 5s")
	if err == nil || !strings.Contains(err.Error(), "web-3 came back with program other; want new") || c.rebooted() != "web-2 web-3" {
		t.Fatalf("with another program on web-3: %q, %v\n%s", c.rebooted(), err, out)
	}
	if out, err = run("rollout"); !errors.As(err, new(usageError)) || !strings.Contains(err.Error(), "--resume") {
		t.Errorf("beginning while one has stopped: %v\n%s", err, out)
	}
	if out, err = run("rollout --resume --expect newer --dry-run"); err != nil || strings.Count(out, "web-") != 3 {
		t.Errorf("what is left if another program is expected: %v\n%s", err, out)
	}
	if out, err = run("rollout --resume --expect newer --timeout 5s"); err == nil || !strings.Contains(err.Error(), "web-2 came back with program new; want newer") || c.rebooted() != "web-2 web-3 web-2" {
		t.Errorf("resumed with another program to expect: %q, %v\n%s", c.rebooted(), err, out)
	}
	c.mu.Lock()
	c.reboots = []string{"web-2", "web-3"}
	c.mu.Unlock()
	c.nodes[2].next = "new"
	if out, err = run("rollout --resume --expect new --json"); err != nil || c.rebooted() != "web-2 web-3 web-3 web-1" || strings.Count(out, `"step":"done"`) != 2 {
		t.Errorf("resumed: %q, %v\n%s", c.rebooted(), err, out)
	}
	if out, err = run("rollout --resume"); !errors.As(err, new(usageError)) {
		t.Errorf("resumed when it is done: %v\n%s", err, out)
	}

	// Connections that do not end, another node that is drained, and one that refuses.
	for _, tt := range []struct {
		args, want string
		set        func(on bool)
	}{
		{"rollout --wait 300ms", "2 connections left", func(on bool) { c.nodes[1].flows = map[bool]int{true: 2}[on] }},
		{"reboot web-2 --wait 300ms", "2 connections left", func(on bool) { c.nodes[1].flows = map[bool]int{true: 2}[on] }},
		{"reboot web-2", "on its way down", func(on bool) {
			c.ordered = map[bool]func(*rollNode) error{true: func(*rollNode) error { return api.ErrEnding }}[on]
		}},
	} {
		before := c.rebooted()
		tt.set(true)
		out, err = run(tt.args)
		tt.set(false)
		if err == nil || !strings.Contains(err.Error(), tt.want) || c.rebooted() != before || c.nodes[1].isDrained() || !strings.Contains(out, "web-2: takes part again, and was not restarted") {
			t.Errorf("clonectl %s: %v; want %q, and web-2 as before\n%s", tt.args, err, tt.want, out)
		}
	}
	c.nodes[1].flows = 2
	if out, err = run("reboot web-2 --wait 300ms --force"); err != nil || !strings.HasSuffix(c.rebooted(), "web-2") {
		t.Errorf("reboot --force: %v\n%s", err, out)
	}
	c.nodes[1].flows = 0
}

// TestRolloutBeside: what has come to another node while one drained counts before that
// one is restarted; and a second rollout from here is told of the first.
func TestRolloutBeside(t *testing.T) {
	c, at := serveRollout(t)
	c.setFlows(1, 1)
	c.ordered = func(n *rollNode) error {
		for _, m := range c.nodes {
			if m != n && m.isDrained() {
				t.Errorf("%s is restarted while %s is drained", n.name, m.name)
			}
		}
		return nil
	}
	ended := make(chan error, 1)
	go func() {
		_, err := clonectl(t, append([]string{"rollout", "web-2", "--timeout", "20s"}, at...)...)
		ended <- err
	}()
	for !c.nodes[1].isDrained() {
		time.Sleep(10 * time.Millisecond)
	}
	if out, err := clonectl(t, append([]string{"rollout", "--dry-run"}, at...)...); err != nil {
		t.Errorf("a dry run meanwhile: %v\n%s", err, out)
	}
	if _, err := clonectl(t, append([]string{"rollout", "web-3"}, at...)...); err == nil || !strings.Contains(err.Error(), "another rollout of this cluster runs here") {
		t.Errorf("a second rollout: %v", err)
	}
	c.nodes[2].order(true, api.Order{}, "another operator")
	c.setFlows(1, 0)
	time.Sleep(time.Second)
	if got := c.rebooted(); got != "" {
		t.Errorf("restarted: %s", got)
	}
	c.nodes[2].order(false, api.Order{}, "another operator")
	if err := <-ended; err != nil || c.rebooted() != "web-2" {
		t.Errorf("in the end: %v, restarted: %s", err, c.rebooted())
	}
}

// TestAside: a node that stands aside is told of as such, and not as one that somebody drained.
func TestAside(t *testing.T) {
	c, at := serveRollout(t)
	c.nodes[1].aside = true
	out, err := clonectl(t, append([]string{"resume", "web-2"}, at...)...)
	if err != nil || !strings.Contains(out, "still stands aside") {
		t.Errorf("resume: %v\n%s", err, out)
	}
	if lack := lacks(c.nodes[1].Status()); !strings.Contains(lack, "stands aside in directed mode") {
		t.Errorf("before a rollout it lacks %q", lack)
	}
}

// TestRebootDrained: who drained a node before finds it drained if it is not restarted.
func TestRebootDrained(t *testing.T) {
	c, at := serveRollout(t)
	c.nodes[1].flows = 2
	for _, args := range []string{"drain web-2 --reason disk-broken", "reboot web-2 --wait 300ms"} {
		out, err := clonectl(t, append(strings.Fields(args), at...)...)
		if rebooting := strings.HasPrefix(args, "reboot"); err != nil != rebooting || rebooting && !strings.Contains(out, "web-2: stays drained, as it was before, and was not restarted") {
			t.Errorf("clonectl %s: %v\n%s", args, err, out)
		}
	}
	if !c.nodes[1].isDrained() || c.rebooted() != "" {
		t.Errorf("drained %v, restarted %q; want web-2 drained, as it was, and nothing restarted", c.nodes[1].isDrained(), c.rebooted())
	}
}

// TestRebootUnknown: if the answer to the order is lost, what the node does then counts.
func TestRebootUnknown(t *testing.T) {
	for _, tt := range []struct {
		name, says, fails string
		restarts, drained bool
	}{
		{"it restarts all the same", "web-2: is back after", "", true, false},
		{"it goes on", "web-2: takes part again, and was not restarted", "web-2: it goes on as before, after the order to restart got no answer: lost", false, false},
		{"it goes on, and was drained", "web-2: stays drained, as it was before, and was not restarted", "it goes on as before", false, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c, at := serveRollout(t)
			if tt.drained {
				if out, err := clonectl(t, append([]string{"drain", "web-2"}, at...)...); err != nil {
					t.Fatalf("%v\n%s", err, out)
				}
			}
			c.ordered = func(n *rollNode) error {
				if tt.restarts {
					n.restart(api.Order{}, "test")
				}
				return errors.New("lost")
			}
			out, err := clonectl(t, append([]string{"reboot", "web-2", "--timeout", "2s"}, at...)...)
			if (err == nil) != (tt.fails == "") || err != nil && !strings.Contains(err.Error(), tt.fails) || !strings.Contains(out, tt.says) {
				t.Errorf("%v; want %q\n%s", err, tt.fails, out)
			}
			resumed := strings.Contains(strings.Join(c.nodes[1].orders, "\n"), "not restarted after all")
			if c.nodes[1].isDrained() != tt.drained || resumed != (!tt.restarts && !tt.drained) {
				t.Errorf("drained %v, orders %q", c.nodes[1].isDrained(), c.nodes[1].orders)
			}
		})
	}
}

// TestRolloutInterrupted: who ends it while a node drains finds the node as it was.
func TestRolloutInterrupted(t *testing.T) {
	c, at := serveRollout(t)
	c.nodes[1].flows = 1
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var out bytes.Buffer
	root := newRoot()
	root.SetArgs(append([]string{"rollout"}, at...))
	root.SetOut(&out)
	go func() {
		for !c.nodes[1].isDrained() {
			time.Sleep(10 * time.Millisecond)
		}
		cancel()
	}()
	if err := root.ExecuteContext(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("the end is %v", err)
	}
	if c.nodes[1].isDrained() || c.rebooted() != "" || !strings.Contains(out.String(), "web-2: takes part again") {
		t.Errorf("after Ctrl-C: drained %v, restarted %q\n%s", c.nodes[1].isDrained(), c.rebooted(), out.String())
	}
	dir, _ := cacheDir()
	if _, err := os.Stat(filepath.Join(dir, "rollouts/demo.json")); err != nil {
		t.Errorf("it cannot go on: %v", err)
	}
}
