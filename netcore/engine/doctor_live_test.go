package engine_test

import (
	"fmt"
	"net"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	"clonecluster/config"
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
// then what is done to it. On bpf one of them judges frames by XDP, before any socket.
func TestDoctor(t *testing.T) {
	c := newCluster(t, 3)
	c.mode(config.ModeFlooded)
	c.Switch.Run("ip", "link", "set", "br0", "type", "bridge", "ageing_time", "500") // 5 s
	for _, n := range c.nodes {
		n.StartHTTP()
		n.cloned = n.Start("cloned", n.flags("--log-level", "debug", "--ingress", map[bool]string{true: "xdp", false: "tc"}[n == c.nodes[1]])...)
	}
	c.agree(c.nodes...)
	if s := c.nodes[1].Status(); s.Datapath == "bpf" && s.Ingress != "XDP" {
		t.Fatalf("%s judges frames by %q; want XDP", c.nodes[1].Name, s.Ingress)
	}
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

	c.nodes[2].Run("ip", "link", "set", "eth0", "mtu", "1400")
	if codes := c.diagnose(); !slices.Contains(codes, "mtu-mismatch") {
		t.Errorf("with another MTU at one node: %v", codes)
	}
	c.nodes[2].Run("ip", "link", "set", "eth0", "mtu", "1500")

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

	// A machine announces the VIP, and does not answer: only raw hears who it is.
	announce := append(slices.Concat(slices.Repeat([]byte{0xff}, 6), []byte{2, 9, 9, 9, 9, 9, 8, 6, 0, 1, 8, 0, 6, 4, 0, 1, 2, 9, 9, 9, 9, 9, 10, 77, 0, 10}), make([]byte, 24)...)
	copy(announce[38:], announce[28:32])
	end := pester(t, c.client, 1, announce)
	time.Sleep(50 * time.Millisecond)
	end()
	for _, n := range c.nodes {
		want := "announces the VIP"
		if n.datapath == "raw" {
			want = "02:09:09:09:09:09"
		}
		if what := n.findingOf("vip-conflict", true); !strings.Contains(what, want) {
			t.Errorf("%s: after an announcement of the VIP by another host: %s", n.Name, what)
		}
	}

	// A leak, which nobody watches for any more: whatever the datapath, its cause is named.
	c.Captured()
	mac, err := net.ParseMAC(clone)
	if err != nil {
		t.Fatal(err)
	}
	rarp := append(slices.Concat(slices.Repeat([]byte{0xff}, 6), mac, []byte{0x80, 0x35}), make([]byte, 46)...)
	end = pester(t, c.client, 1, rarp)
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
	// Another host that has the VIPs, and says nothing of it until it is asked.
	other := c.Host("other", "02:09:09:09:09:08", vip4+"/24", vip6+"/64")
	if codes := c.diagnose(); !slices.Contains(codes, "vip-conflict") {
		t.Errorf("with a host that has the VIP: %v", codes)
	}
	for _, n := range c.nodes {
		what := n.findingOf("vip-conflict", true)
		for _, vip := range []string{vip4, vip6} {
			if !strings.Contains(what, fmt.Sprintf("%s says that %s is at", other.MAC, vip)) {
				t.Errorf("%s: with a host that has %s: %s", n.Name, vip, what)
			}
		}
	}
}
