package engine_test

import (
	"net"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	"clonecluster/netcore/api"
	"clonecluster/netcore/finding"
)

// diagnose has every node examine the network and gives the codes of what is found.
func (c *cluster) diagnose() (codes []string) {
	c.t.Helper()
	control := c.operator(api.RoleControl, "10.77.0.101")
	for _, n := range c.nodes {
		var e api.Examination
		if err := control.Post(c.t.Context(), "/v1/doctor", url.Values{"node": {n.MAC}}, nil, &e); err != nil {
			c.t.Fatal(err)
		}
	}
	for _, n := range c.nodes {
		var e api.Examination
		for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(100 * time.Millisecond) {
			e = api.Examination{}
			if err := control.Get(c.t.Context(), "/v1/doctor", url.Values{"node": {n.MAC}}, &e); err != nil {
				c.t.Fatal(err)
			}
			if !e.Running {
				break
			}
			if time.Now().After(deadline) {
				c.t.Fatalf("%s: the examination does not end: %+v", n.Name, e)
			}
		}
		for _, check := range e.Checks {
			if check.Verdict == "unknown" {
				c.t.Errorf("%s does not know about %s: %s", n.Name, check.Name, check.What)
			}
			for _, f := range check.Findings {
				if !slices.Contains(codes, f.Code) {
					codes = append(codes, f.Code)
				}
			}
		}
	}
	slices.Sort(codes)
	return codes
}

// TestDoctor: on a Linux bridge with short ageing the nodes find nothing to say, and
// then what is done to it.
func TestDoctor(t *testing.T) {
	c := newCluster(t, 3)
	c.Switch.Run("ip", "link", "set", "br0", "type", "bridge", "ageing_time", "500") // 5 s
	c.start()
	if codes := c.diagnose(); len(codes) != 0 {
		t.Fatalf("on a good bridge the doctors find %v", codes)
	}
	time.Sleep(7 * time.Second) // what was learned has aged
	if codes := c.diagnose(); len(codes) != 0 {
		t.Errorf("after the ageing the doctors find %v", codes)
	}

	c.Switch.Run("bridge", "fdb", "replace", clone, "dev", "node2", "master", "static")
	if codes := c.diagnose(); !slices.Equal(codes, []string{"clone-mac-learned"}) {
		t.Errorf("with the clone MAC in the bridge's table: %v", codes)
	}
	c.Switch.Run("bridge", "fdb", "del", clone, "dev", "node2", "master")

	c.Switch.Run("bridge", "link", "set", "dev", "node3", "mcast_flood", "off")
	if codes := c.diagnose(); !slices.Contains(codes, "multicast-filtered") {
		t.Errorf("with multicast filtered: %v", codes)
	}
	c.Switch.Run("bridge", "link", "set", "dev", "node3", "mcast_flood", "on")

	for _, n := range c.nodes {
		c.Switch.Run("bridge", "link", "set", "dev", n.Name, "flood", "off")
	}
	if codes := c.diagnose(); !slices.Equal(codes, []string{"no-flooding"}) {
		t.Errorf("without flooding: %v", codes)
	}
	for _, n := range c.nodes {
		if s := n.Status(); len(s.Findings) == 0 || s.Findings[0].Code != "no-flooding" || !strings.Contains(s.Findings[0].What, "no node") {
			t.Errorf("%s: the status has %+v", n.Name, s.Findings)
		}
		c.Switch.Run("bridge", "link", "set", "dev", n.Name, "flood", "on")
	}
	if codes := c.diagnose(); len(codes) != 0 {
		t.Errorf("when all is well again: %v", codes)
	}
	c.checkSwitch()

	// A leak, which nobody watches for any more: whatever the datapath, its cause is named.
	c.Captured()
	mac, err := net.ParseMAC(clone)
	if err != nil {
		t.Fatal(err)
	}
	rarp := append(slices.Concat(slices.Repeat([]byte{0xff}, 6), mac, []byte{0x80, 0x35}), make([]byte, 46)...)
	end := pester(t, c.client, 1, rarp)
	time.Sleep(50 * time.Millisecond)
	end()
	if codes := c.diagnose(); !slices.Contains(codes, "clone-mac-leak") {
		t.Errorf("after a RARP from the clone MAC: %v", codes)
	}
	for _, n := range c.nodes {
		found := n.Status().Findings
		i := slices.IndexFunc(found, func(f finding.Finding) bool { return f.Code == "clone-mac-leak" })
		if i < 0 || !strings.Contains(found[i].What, "a RARP") {
			t.Errorf("%s: after a RARP from the clone MAC the status has %+v", n.Name, found)
		}
	}
}
