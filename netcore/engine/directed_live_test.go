package engine_test

import (
	"slices"
	"strings"
	"testing"
	"time"
)

// findingOf waits until a node has a finding, or (want false) has it no more.
func (n *node) findingOf(code string, want bool) (what string) {
	n.c.t.Helper()
	for deadline := time.Now().Add(40 * time.Second); time.Now().Before(deadline); time.Sleep(200 * time.Millisecond) {
		what = ""
		for _, f := range n.Status().Findings {
			if f.Code == code {
				what = f.What
			}
		}
		if (what != "") == want {
			return what
		}
	}
	n.c.t.Fatalf("%s: the finding %s is there: %v; want %v\n%+v", n.Name, code, !want, want, n.Status().Findings)
	return ""
}

// noFlooding has the switch flood no unknown unicast to the nodes.
func (c *cluster) noFlooding() {
	c.t.Helper()
	for _, n := range c.nodes {
		c.Switch.Run("bridge", "link", "set", "dev", n.Name, "flood", "off", "mcast_flood", "on")
	}
}

// TestDirectedMode: where the switch does not flood, the nodes find it out and serve in
// directed mode; connections of all nodes live on when the director dies, but for its
// own, and when another starts.
func TestDirectedMode(t *testing.T) {
	if datapathOf(0) != "raw" {
		t.Skip("directed mode is raw's")
	}
	c := newCluster(t, 3)
	c.noFlooding()
	c.start()
	for _, n := range c.nodes {
		if what := n.findingOf("directed-mode", true); !strings.Contains(what, c.nodes[0].MAC) {
			t.Errorf("%s: %s; want that the leader directs", n.Name, what)
		}
	}
	for _, host := range []string{vip4, "[" + vip6 + "]"} {
		answers := map[string]int{}
		for range 60 {
			answers[c.get("http://"+host+"/whoami")]++
		}
		t.Logf("%s: %v", host, answers)
		if len(answers) != 3 {
			t.Errorf("%s: 60 connections were answered by %v; want all three nodes", host, answers)
		}
	}
	streams := c.openStreams(12)
	held := map[string]int{}
	for _, s := range streams {
		held[s.holder]++
	}
	t.Logf("12 streams: %v", held)
	killed := c.nodes[0].PowerOff()
	first := c.get("http://" + vip4 + "/whoami")
	t.Logf("after the director was killed %s answered in %v", first, time.Since(killed).Round(time.Millisecond))
	if took := time.Since(killed); took > 8*time.Second {
		t.Errorf("an answer after %v", took)
	}
	streams = slices.DeleteFunc(streams, func(s *stream) bool { return s.holder == c.nodes[0].Name })
	c.askAll(streams, "are you there?")
	if what := c.nodes[1].findingOf("directed-mode", true); !strings.Contains(what, c.nodes[1].MAC) {
		t.Errorf("the next director: %s", what)
	}

	c.nodes[0].PowerOn()
	c.noFlooding()
	c.nodes[0].StartHTTP()
	c.nodes[0].start()
	c.agree(c.nodes...)
	for range 20 {
		c.get("http://" + vip4 + "/whoami")
	}
	c.askAll(streams, "and now?")
	if c.Learned()[clone] != "" {
		t.Error("the switch has learned the clone MAC")
	}
}
