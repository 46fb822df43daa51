package engine_test

import (
	"errors"
	"net/http"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"clonecluster/netcore/api"
	"clonecluster/netcore/engine"
)

// shareOf is what a node says of the share of another, or of itself.
func (n *node) shareOf(other *node) engine.Member {
	n.c.t.Helper()
	for _, m := range n.Status().Members {
		if m.Node == other.MAC {
			return m
		}
	}
	n.c.t.Fatalf("%s does not know %s", n.Name, other.Name)
	return engine.Member{}
}

// TestWeights: shares follow the weights of the configuration, which is the same
// file on every node.
func TestWeights(t *testing.T) {
	c := newCluster(t, 3)
	writeConfig(t, c.config, "  # weights:  ", "  weights: [{mac: \""+c.nodes[1].MAC+"\", weight: 50}, {mac: \"*:03\", weight: 250}]   #")
	c.start()
	want := map[*node]int{c.nodes[0]: 256, c.nodes[1]: 128, c.nodes[2]: 640}
	for _, n := range c.nodes {
		for other, buckets := range want {
			if m := n.shareOf(other); m.Buckets != buckets {
				t.Errorf("%s says that %s has %d buckets; want %d", n.Name, other.Name, m.Buckets, buckets)
			}
		}
		s := n.Status()
		if got := s.Buckets.Settled + s.Buckets.Shared; got != want[n] {
			t.Errorf("%s owns %d buckets; want %d", n.Name, got, want[n])
		}
	}
}

// TestHealthGates: a node whose service fails gives its share away, keeps its
// connections, and has its share back when the service works again; and if the
// services of all nodes fail, they serve on.
func TestHealthGates(t *testing.T) {
	c := newCluster(t, 3)
	writeConfig(t, c.config, "interval: 1s", "interval: 100ms", "timeout: 500ms", "timeout: 100ms")
	c.start()
	streams := c.openStreams(9)
	sick := c.nodes[1]
	sick.setSick(true)
	c.agree(c.nodes[0], c.nodes[2])
	for range 30 {
		if got := c.get("http://" + vip4 + "/whoami"); got == sick.Name {
			t.Fatalf("a new connection was answered by %s, whose service fails", got)
		}
	}
	c.askAll(streams, "while one is sick")
	if s := sick.Status(); len(s.Unwell) != 1 || !strings.Contains(s.Unwell[0], "web: the answer is 503") {
		t.Errorf("the status of the sick node says %q; want the service and the reason", s.Unwell)
	}
	if !c.nodes[0].shareOf(sick).Unwell {
		t.Error("another node's status does not show that it is unwell")
	}
	sick.cloned.Await(0, `msg="service failed" service=web reason="the answer is 503`)

	c.nodes[0].setSick(true)
	c.nodes[2].setSick(true)
	c.agree(c.nodes...)
	if s := c.nodes[2].Status(); !s.FailOpen {
		t.Errorf("all services fail, and the status does not say so: %+v", s)
	}
	c.get("http://" + vip4 + "/whoami")
	c.nodes[2].setSick(false)
	c.agree(c.nodes[2])
	c.nodes[0].setSick(false)
	sick.setSick(false)
	c.agree(c.nodes...)
	c.askAll(streams, "after all")
}

// TestDrainAndResume drains two of three nodes at once by the command that an
// operator has, and takes them back.
func TestDrainAndResume(t *testing.T) {
	c := newCluster(t, 3)
	c.start()
	streams := c.openStreams(9)
	for _, n := range c.nodes[:2] {
		if out, err := n.ask("drain"); err != nil {
			t.Fatalf("drain: %v: %s", err, out)
		}
	}
	c.agree(c.nodes[2])
	for range 20 {
		if got := c.get("http://" + vip4 + "/whoami"); got != c.nodes[2].Name {
			t.Fatalf("a new connection was answered by %s, which drains", got)
		}
	}
	c.askAll(streams, "while two drain")
	// Progress, and what happens if the connections do not end.
	out, err := c.nodes[0].ask("drain", "--wait", "1s")
	if err == nil || !strings.Contains(out, "not drained in time") || !strings.Contains(out, "connections are left") {
		t.Errorf("drain with connections open: %v: %s", err, out)
	}
	for _, s := range streams {
		if s.holder == c.nodes[0].Name {
			s.conn.Close()
		}
	}
	if out, err := c.nodes[0].ask("drain", "--wait", "30s"); err != nil || !strings.Contains(out, "draining: 0 connections left") {
		t.Errorf("drain after they were closed: %v: %s", err, out)
	}
	for _, n := range c.nodes[:2] {
		if out, err := n.ask("resume"); err != nil {
			t.Errorf("resume: %v: %s", err, out)
		}
	}
	c.agree(c.nodes...)
	if out, err := c.nodes[1].ask("status"); err != nil || strings.Count(out, "serving") != 4 || !strings.Contains(out, "this node") {
		t.Errorf("status: %v: %s", err, out)
	}
}

// ask runs cloned's command for the running engine.
func (n *node) ask(verb string, args ...string) (string, error) {
	p := n.Start("cloned", append([]string{verb, "--status-socket", n.status}, args...)...)
	err := p.Wait()
	return p.Output(), err
}

// TestKeyRoll changes the cluster's key node by node, in three rounds, while
// connections are open and new ones come.
func TestKeyRoll(t *testing.T) {
	c := newCluster(t, 3)
	writeConfig(t, c.config, "drain: 15s", "drain: 500ms")
	c.start()
	const (
		older = "Y2xvbmVjbHVzdGVyIGRlbW8sIG5vdCBhIHNlY3JldCE="
		newer = "bmV3ZXIsIGFuZCBhcyBsaXR0bGUgb2YgYSBzZWNyZXQ="
	)
	for round, lines := range []string{
		"key: " + older + "\n  accept-keys: [" + newer + "]\n  flow-key: " + older,
		"key: " + newer + "\n  accept-keys: [" + older + "]\n  flow-key: " + older,
		"key: " + newer + "\n  flow-key: " + older,
	} {
		writeConfig(t, c.config, "key: "+older, lines, "drain: 15s", "drain: 500ms")
		for _, n := range c.nodes {
			streams := c.openStreams(6)
			if err := n.cloned.Stop(); err != nil {
				t.Fatalf("round %d: stopping %s: %v", round, n.Name, err)
			}
			var others []*node
			for _, o := range c.nodes {
				if o != n {
					others = append(others, o)
				}
			}
			c.agree(others...)
			c.get("http://" + vip4 + "/whoami")
			n.start()
			c.agree(c.nodes...)
			for _, s := range streams {
				if s.holder == n.Name {
					continue // it was stopped before they ended
				}
				if _, err := s.ask("across the roll", 10*time.Second); err != nil {
					t.Errorf("round %d: a connection held by %s: %v", round, s.holder, err)
				}
				s.conn.Close()
			}
		}
	}
	for _, n := range c.nodes {
		if s := n.Status(); s.Beacons.Unauthentic != 0 {
			t.Errorf("%s refused %d frames", n.Name, s.Beacons.Unauthentic)
		}
	}
}

// TestOtherRules: a node with other port rules gives flows other buckets. It
// waits, says so, and is named by the others.
func TestOtherRules(t *testing.T) {
	c := newCluster(t, 2)
	c.start()
	odd := c.node(c.Host("odd", "52:54:00:77:00:00"))
	file := filepath.Join(c.Dir, "odd.yaml")
	writeConfig(t, file, "name: byRandom ", "name: bySource ")
	odd.StartHTTP()
	odd.cloned = odd.Start("cloned", odd.flags("--config", file)...)
	c.nodes[0].cloned.Await(0, "another configuration of ports, key or address")
	odd.cloned.Await(0, "state=serving slot=0 of=2")
	for range 20 {
		if got := c.get("http://" + vip4 + "/whoami"); got == odd.Name {
			t.Fatal("a node with other rules answers")
		}
	}
	if s := odd.Status(); len(s.Refused) == 0 || s.Buckets.Settled+s.Buckets.Shared != 0 {
		t.Errorf("the odd node has %+v and refuses %v", s.Buckets, s.Refused)
	}
	// When the last of the others stops, it takes over.
	for _, n := range c.nodes {
		if err := n.cloned.Stop(); err != nil {
			t.Errorf("stopping %s: %v", n.Name, err)
		}
	}
	odd.cloned.Await(0, "state=serving slot=1 of=1 agreed=true")
}

// TestPolicyAtRunTime: weights that are set hold on all nodes, move no connection, are
// told to a node that joins, and end with the last engine.
func TestPolicyAtRunTime(t *testing.T) {
	c := newCluster(t, 3)
	c.start()
	streams := c.openStreams(9)
	set := func(at string, o api.PolicyOrder) (p api.Policy) {
		t.Helper()
		if err := c.operator(api.RoleControl, at).Post(t.Context(), "/v1/policy", nil, o, &p); err != nil {
			t.Fatal(err)
		}
		return p
	}
	shares := func(what string, version uint64, want ...int) {
		t.Helper()
		whole(t, c.operator(api.RoleReadOnly, "10.77.0.102"), what, func(all api.Cluster) bool {
			for i, n := range all.Nodes {
				s := n.Status
				if s == nil || len(all.Nodes) != 3 || s.PolicyVersion != version || s.Buckets.Settled+s.Buckets.Shared != want[i] || !s.Agreed {
					return false
				}
			}
			return true
		})
	}
	shares("as configured", 0, 342, 341, 341)
	p := set("10.77.0.103", api.PolicyOrder{Weights: map[string]int{c.nodes[0].MAC: 600}, Reason: "it is new"})
	if p.Version != 1 || p.Author != c.nodes[2].MAC || p.By != "operator: it is new" || !p.Nodes[0].Set || p.Nodes[0].Weight != 600 {
		t.Errorf("the answer is %+v", p)
	}
	shares("six times as much for the first", 1, 768, 128, 128)
	c.askAll(streams, "after a change of weights")
	tells(t, c.operator(api.RoleReadOnly, "10.77.0.102"), c.nodes[1].MAC, "policy "+c.nodes[2].MAC+": policy 1: weight 600 of", "map ")

	// The leader goes, and comes back without knowing anything.
	first := c.nodes[0]
	first.cloned.Signal(syscall.SIGTERM)
	if err := first.cloned.Wait(); err != nil {
		t.Error(err)
	}
	c.agree(c.nodes[1:]...)
	first.start()
	c.agree(c.nodes...)
	shares("the leader has joined again", 1, 768, 128, 128)

	var e *api.Error
	err := c.operator(api.RoleReadOnly, vip4).Post(t.Context(), "/v1/policy", nil, api.PolicyOrder{Balance: "load"}, &p)
	if !errors.As(err, &e) || e.Code != http.StatusForbidden {
		t.Errorf("with a read-only certificate: %v", err)
	}
	err = c.operator(api.RoleControl, vip4).Post(t.Context(), "/v1/policy", nil, api.PolicyOrder{Weights: map[string]int{"nobody": 1}}, &p)
	if !errors.As(err, &e) || e.Code != http.StatusBadRequest {
		t.Errorf("for a node that is not there: %v", err)
	}
	if p = set("10.77.0.101", api.PolicyOrder{Weights: map[string]int{first.MAC: 0}, Balance: "load"}); p.Version != 2 || p.Balance != "load" || p.Set != "load" || p.Configured != "even" {
		t.Errorf("the answer is %+v", p)
	}
	set("10.77.0.101", api.PolicyOrder{Balance: "configured"})
	shares("as configured again", 3, 342, 341, 341)

	for _, n := range c.nodes {
		n.cloned.Signal(syscall.SIGTERM)
	}
	for _, n := range c.nodes {
		if err := n.cloned.Wait(); err != nil {
			t.Error(err)
		}
	}
	for _, n := range c.nodes {
		n.start()
	}
	c.agree(c.nodes...)
	shares("after all have ended", 0, 342, 341, 341)
}
