package engine_test

import (
	"encoding/json"
	"errors"
	"os/exec"
	"slices"
	"strings"
	"testing"

	"clonecluster/netcore/hostcheck"
	"clonecluster/netcore/netnstest"
)

// ownKey replaces the published key of the demo, of which a check warns.
const demoKey, ownKey = "Y2xvbmVjbHVzdGVyIGRlbW8sIG5vdCBhIHNlY3JldCE=", "MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY="

// check runs "cloned check" and gives its exit code and findings.
func (n *node) check() (code int, findings []hostcheck.Finding) {
	n.c.t.Helper()
	p := n.Start("cloned", "check", "--json", "--config", n.c.config, "--interface", "eth0", "--bpffs", n.c.BPFFS())
	code = exitCode(p)
	if err := json.Unmarshal([]byte(p.Output()), &findings); err != nil {
		n.c.t.Fatalf("cloned check printed %q: %v", p.Output(), err)
	}
	return code, findings
}

// TestCheckDatapath: without a BPF file system there is raw, with a warning, and nothing
// for who asks for bpf.
func TestCheckDatapath(t *testing.T) {
	c := newCluster(t, 1)
	writeConfig(t, c.config, demoKey, ownKey)
	n := c.nodes[0]
	n.StartHTTP()
	for _, tt := range []struct {
		datapath, bpffs string
		code            int
		level           hostcheck.Level
	}{
		{"auto", c.BPFFS(), 0, hostcheck.OK}, {"bpf", c.BPFFS(), 0, hostcheck.OK},
		{"auto", c.Dir, 1, hostcheck.Warn}, {"bpf", c.Dir, 2, hostcheck.Refused}, {"raw", c.Dir, 0, hostcheck.OK},
	} {
		p := n.Start("cloned", "check", "--json", "--config", c.config, "--interface", "eth0", "--datapath", tt.datapath, "--bpffs", tt.bpffs)
		code := exitCode(p)
		var findings []hostcheck.Finding
		if err := json.Unmarshal([]byte(p.Output()), &findings); err != nil {
			t.Fatalf("cloned check printed %q: %v", p.Output(), err)
		}
		i := slices.IndexFunc(findings, func(f hostcheck.Finding) bool { return f.Check == "datapath" })
		if code != tt.code || i < 0 || findings[i].Level != tt.level {
			t.Errorf("%s with %s: exit code %d, %+v; want %d and %v", tt.datapath, tt.bpffs, code, findings, tt.code, tt.level)
		}
	}
}

func exitCode(p *netnstest.Process) int {
	var exit *exec.ExitError
	switch err := p.Wait(); {
	case err == nil:
		return 0
	case errors.As(err, &exit):
		return exit.ExitCode()
	}
	return -1
}

// TestCheckRefuses has a machine and its segment set up wrongly in every way that a
// namespace allows: the check names it, the engine does not start, and neither
// changes anything.
func TestCheckRefuses(t *testing.T) {
	c := newCluster(t, 1)
	writeConfig(t, c.config, demoKey, ownKey)
	n := c.nodes[0]
	n.StartHTTP()
	if code, fs := n.check(); code != 0 {
		t.Errorf("on a machine that is ready: exit code %d, %+v", code, fs)
	}
	for _, tt := range []struct {
		check    string
		on       *netnstest.Host
		do, undo []string // commands of ip(8)
	}{
		{"vip-elsewhere", n.Host, []string{"addr add 10.77.0.10/32 dev lo"}, []string{"addr del 10.77.0.10/32 dev lo"}},
		{"vip-elsewhere", n.Host, []string{"addr add fd77::10/64 dev eth0 nodad"}, []string{"addr del fd77::10/64 dev eth0"}},
		{"vip-elsewhere", n.Host, []string{"addr add 10.77.0.10/24 dev eth0 valid_lft 1000 preferred_lft 1000"}, []string{"addr del 10.77.0.10/24 dev eth0"}},
		{"nic", n.Host, []string{"link add br9 type bridge", "link set eth0 master br9"}, []string{"link del br9"}},
		{"nic-free", n.Host, []string{"link add mv9 link eth0 type macvlan mode passthru"}, []string{"link del mv9"}},
		{"clone-mac", n.Host, []string{"link add v9 address " + clone + " type veth peer name v10"}, []string{"link del v9"}},
		{"clone0", n.Host, []string{"link add clone0 type veth peer name v10"}, []string{"link del clone0"}},
		{"vip-gateway", n.Host, []string{"route add default via 10.77.0.10"}, []string{"route del default"}},
		{"table", n.Host, []string{"route add 10.9.0.0/16 dev eth0 table 3264"}, []string{"route del 10.9.0.0/16 table 3264"}},
		{"segment", c.client, []string{"addr add 10.77.0.10/24 dev eth0"}, []string{"addr del 10.77.0.10/24 dev eth0"}},
		{"segment", c.client, []string{"addr add fd77::10/64 dev eth0 nodad"}, []string{"addr del fd77::10/64 dev eth0"}},
	} {
		t.Run(tt.check+" "+strings.ReplaceAll(tt.do[0], "/", "_"), func(t *testing.T) {
			for _, cmd := range tt.do {
				tt.on.Run("ip", strings.Fields(cmd)...)
			}
			before := n.State()
			code, findings := n.check()
			var refused []string
			for _, f := range findings {
				if f.Level == hostcheck.Refused {
					refused = append(refused, f.Check)
					t.Logf("%s (%s)", f.What, f.Fix)
				}
			}
			if code != 2 || len(refused) != 1 || refused[0] != tt.check {
				t.Errorf("cloned check: exit code %d, refused %v; want 2 and %s: %+v", code, refused, tt.check, findings)
			}
			p := n.Start("cloned", "--config", n.c.config, "--interface", "eth0", "--status-socket", n.status)
			if code := exitCode(p); code != 4 {
				t.Errorf("cloned: exit code %d; want 4:\n%s", code, p.Output())
			}
			if after := n.State(); after != before {
				t.Errorf("the refusal changed the machine:\n%s", netnstest.Difference(before, after))
			}
			for _, cmd := range tt.undo {
				tt.on.Run("ip", strings.Fields(cmd)...)
			}
			// Linux forgets that somebody has had the address.
			_, _ = n.Try("ip", "neigh", "flush", "all")
		})
	}
	n.start()
	c.agree(n)
	if code, fs := n.check(); code != 0 {
		t.Errorf("once all is undone and the engine runs: exit code %d, %+v", code, fs)
	}
}

// TestCheckBesideNodes: that nodes answer for the VIP is how it should be, and on a
// node that serves nothing is wrong either.
func TestCheckBesideNodes(t *testing.T) {
	c := newCluster(t, 3)
	writeConfig(t, c.config, demoKey, ownKey)
	for _, n := range c.nodes[:2] {
		n.StartHTTP()
		n.start()
	}
	c.agree(c.nodes[:2]...)
	const others, alone = "nodes of the cluster answer", "nobody on the segment but this node"
	for _, tt := range []struct {
		n    *node
		code int
		says []string
	}{
		// It has no service yet.
		{c.nodes[2], 1, []string{others}},
		// Whichever of the two owns the bucket of the question answers it.
		{c.nodes[0], 0, []string{others, alone}},
	} {
		code, findings := tt.n.check()
		said := slices.ContainsFunc(findings, func(f hostcheck.Finding) bool {
			return f.Check == "segment" && slices.ContainsFunc(tt.says, func(s string) bool { return strings.Contains(f.What, s) })
		})
		if code != tt.code || !said {
			t.Errorf("%s: exit code %d; want %d, and one of %q: %+v", tt.n.Name, code, tt.code, tt.says, findings)
		}
	}
}
