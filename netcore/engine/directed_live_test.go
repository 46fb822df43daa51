package engine_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/url"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"clonecluster/config"
	"clonecluster/netcore/api"
	"clonecluster/netcore/engine"
	"clonecluster/netcore/finding"
	"clonecluster/netcore/netnstest"
)

// findingOf waits until a node has a finding, or (want false) has it no more.
func (n *node) findingOf(code string, want bool) (what string) {
	n.c.t.Helper()
	for deadline := time.Now().Add(70 * time.Second); time.Now().Before(deadline); time.Sleep(200 * time.Millisecond) {
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

// flooding has the switch flood unknown unicast to the nodes ("on"), or not ("off").
func (c *cluster) flooding(onOff string) {
	c.t.Helper()
	for _, n := range c.nodes {
		c.Switch.Run("bridge", "link", "set", "dev", n.Name, "flood", onOff, "mcast_flood", "on")
	}
}

// mode writes a mode of the network into the configuration.
func (c *cluster) mode(mode string) {
	c.t.Helper()
	text, err := os.ReadFile(c.config)
	if err != nil {
		c.t.Fatal(err)
	}
	if err := os.WriteFile(c.config, fmt.Appendf(text, "\nnetwork:\n  mode: %s\n", mode), 0o600); err != nil {
		c.t.Fatal(err)
	}
}

// servedAround checks that the doctors say who directs, and that it makes up for what the
// network lacks.
func (c *cluster) servedAround() {
	c.t.Helper()
	c.diagnose()
	look := c.operator(api.RoleReadOnly, "10.77.0.101")
	for _, n := range c.nodes {
		var e api.Examination
		if err := look.Get(c.t.Context(), "/v1/doctor", url.Values{"node": {n.MAC}}, &e); err != nil {
			c.t.Fatal(err)
		}
		level := finding.Info
		for _, check := range e.Checks {
			for _, f := range check.Findings {
				if f.Code == "no-flooding" {
					level = f.Level
				}
			}
		}
		if e.Director != c.nodes[0].MAC || level != finding.Warning {
			c.t.Errorf("%s: %+v; want that %s directs, and no-flooding as a warning", n.Name, e, c.nodes[0].MAC)
		}
	}
}

// TestDirectedMode: where the switch does not flood, the nodes find it out and serve in
// directed mode; connections of all nodes live on when the director dies, but for its
// own, and when another starts.
func TestDirectedMode(t *testing.T) {
	c := newCluster(t, 3)
	c.flooding("off")
	c.start()
	for _, n := range c.nodes {
		if what := n.findingOf("directed-mode", true); !strings.Contains(what, c.nodes[0].MAC) {
			t.Errorf("%s: %s; want that the leader directs", n.Name, what)
		}
	}
	c.servedAround()
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
	for _, host := range []string{vip4, "[" + vip6 + "]"} {
		first := c.get("http://" + host + "/whoami")
		took := time.Since(killed)
		t.Logf("after the director was killed %s answered at %s in %v", first, host, took.Round(time.Millisecond))
		if took > 8*time.Second {
			t.Errorf("an answer at %s after %v", host, took)
		}
	}
	streams = slices.DeleteFunc(streams, func(s *stream) bool { return s.holder == c.nodes[0].Name })
	c.askAll(streams, "are you there?")
	if what := c.nodes[1].findingOf("directed-mode", true); !strings.Contains(what, c.nodes[1].MAC) {
		t.Errorf("the next director: %s", what)
	}

	c.nodes[0].PowerOn()
	c.flooding("off")
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

func init() { netnstest.Register("cloned-soon-flooded", clonedSoonFlooded) }

// soonFlooded is how long clonedSoonFlooded has to see flooding.
const soonFlooded = 3 * time.Second

// soonAgain is after what time it tries a failed directed mode again.
const soonAgain = 5 * time.Second

// clonedSoonFlooded is cloned that takes a network's word for it sooner.
func clonedSoonFlooded(args []string) int {
	cfg, err := config.LoadFile(args[0])
	if err == nil {
		ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
		defer stop()
		err = engine.Run(ctx, engine.Options{
			Config: cfg, Interface: "eth0", StatusSocket: args[1], Drain: -1, Datapath: args[2], BPFFS: args[3],
			Logger: slog.New(slog.NewTextHandler(os.Stderr, nil)), FloodedAfter: soonFlooded, AgainAfter: soonAgain,
		})
	}
	if err != nil {
		fmt.Println(err)
		return 1
	}
	return 0
}

// TestFloodedAgain: when frames are flooded again, directed mode ends after a while, and
// no connection with it, also of a client that has missed the announcement.
func TestFloodedAgain(t *testing.T) {
	c := newCluster(t, 3)
	c.flooding("off")
	for _, n := range c.nodes {
		n.StartHTTP()
		n.cloned = n.Start("cloned-soon-flooded", c.config, n.status, n.datapath, c.BPFFS())
	}
	c.agree(c.nodes...)
	for _, n := range c.nodes {
		n.findingOf("directed-mode", true)
	}
	streams := c.openStreams(12)
	neighbours := func() string {
		return c.client.Run("ip", "neigh", "show", vip4) + c.client.Run("ip", "neigh", "show", vip6)
	}
	c.get("http://[" + vip6 + "]/whoami")
	if n := neighbours(); strings.Count(n, c.nodes[0].MAC) != 2 {
		t.Errorf("directed, the client has the VIP at\n%s; want the leader's MAC %s", n, c.nodes[0].MAC)
	}

	stop, failed := make(chan struct{}), make(chan []error)
	go func() {
		var errs []error
		for n := 0; ; n++ {
			select {
			case <-stop:
				t.Logf("%d requests on the way back", n)
				failed <- errs
				return
			case <-time.After(20 * time.Millisecond):
			}
			if _, err := tryGet(c.http(), "http://"+vip4+"/whoami"); err != nil {
				errs = append(errs, err)
			}
		}
	}()
	c.flooding("on")
	for _, n := range c.nodes {
		n.findingOf("directed-mode", false)
	}
	time.Sleep(2 * time.Second) // the announcements
	close(stop)
	if errs := <-failed; len(errs) > 0 {
		t.Errorf("%d requests failed, the first by %v", len(errs), errs[0])
	}
	c.askAll(streams, "are you there?")
	c.get("http://[" + vip6 + "]/whoami")
	if n := neighbours(); strings.Count(n, clone) != 2 {
		t.Errorf("flooded, the client has the VIP at\n%s; want the clone MAC", n)
	}
	c.client.Run("ip", "neigh", "replace", vip4, "lladdr", c.nodes[0].MAC, "dev", "eth0", "nud", "permanent")
	answers := map[string]int{}
	for range 30 {
		answers[c.get("http://"+vip4+"/whoami")]++
	}
	if len(answers) != 3 {
		t.Errorf("30 connections by the former director were answered by %v; want all three nodes", answers)
	}
	c.askAll(streams, "and now?")
	for _, n := range c.nodes {
		n.mustBeHealthy(n.Status())
	}
	c.checkSwitch()
}

// fullOfPrograms leaves no room for directed mode's tcx program at a node's NIC, until it is
// freed.
func (n *node) fullOfPrograms() (free func()) {
	n.c.t.Helper()
	var links []link.Link
	free = func() {
		for _, l := range links {
			_ = l.Close()
		}
		links = nil
	}
	n.c.t.Cleanup(free)
	err := n.Do(func() error {
		nic, err := net.InterfaceByName("eth0")
		if err != nil {
			return err
		}
		for {
			p, err := ebpf.NewProgram(&ebpf.ProgramSpec{Type: ebpf.SchedCLS, License: "GPL", Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, -1), asm.Return()}})
			if err != nil {
				return err
			}
			defer p.Close()
			l, err := link.AttachTCX(link.TCXOptions{Interface: nic.Index, Program: p, Attach: ebpf.AttachTCXIngress})
			switch {
			case errors.Is(err, unix.ERANGE) && n.datapath == "raw":
				return nil
			case errors.Is(err, unix.ERANGE): // one for the filter
				return links[len(links)-1].Close()
			case err != nil:
				return err
			}
			links = append(links, l)
		}
	})
	if err != nil {
		n.c.t.Fatal(err)
	}
	return free
}

// TestDirectedWithoutOne: a node that cannot do its part in directed mode, and that would
// lead, joins: the others serve on and it takes nothing, until it can.
func TestDirectedWithoutOne(t *testing.T) {
	c := newCluster(t, 3)
	c.flooding("off")
	able := c.nodes[1:]
	for _, n := range able {
		n.StartHTTP()
		n.cloned = n.Start("cloned-soon-flooded", c.config, n.status, n.datapath, c.BPFFS())
	}
	c.agree(able...)
	for _, n := range able {
		n.findingOf("directed-mode", true)
	}
	var streams []*stream
	for range 6 {
		streams = append(streams, c.openStream())
	}
	free := c.nodes[0].fullOfPrograms()
	c.nodes[0].StartHTTP()
	c.nodes[0].cloned = c.nodes[0].Start("cloned-soon-flooded", c.config, c.nodes[0].status, c.nodes[0].datapath, c.BPFFS())
	var longest time.Duration
	told := func() bool {
		for _, f := range able[0].Status().Findings {
			if f.Code == "directed-mode" && strings.Contains(f.What, able[0].MAC) {
				s := c.nodes[0].Status()
				return s.State == "draining" && slices.ContainsFunc(s.Findings, func(f finding.Finding) bool {
					return f.Code == "directed-mode" && f.Level == finding.Critical && strings.Contains(f.What, "this node cannot")
				})
			}
		}
		return false
	}
	c.nodes[0].cloned.Await(0, "there is no directed mode")
	for deadline := time.Now().Add(20 * time.Second); !told(); {
		if time.Now().After(deadline) {
			t.Fatalf("node1 does not tell that it cannot, and stand aside:\n%+v\n%s", c.nodes[0].Status().Findings, c.nodes[0].cloned.Output())
		}
		began := time.Now()
		c.get("http://" + vip4 + "/whoami")
		longest = max(longest, time.Since(began))
	}
	t.Logf("as it came the longest wait was %v", longest.Round(time.Millisecond))
	if longest > 4*time.Second {
		t.Errorf("as it came a request waited %v", longest)
	}
	answers := map[string]int{}
	for range 40 {
		answers[c.get("http://"+vip4+"/whoami")]++
	}
	if len(answers) != 2 || answers[c.nodes[0].Name] > 0 {
		t.Errorf("40 connections were answered by %v; want the two that can", answers)
	}
	c.askAll(streams, "are you there?")

	free()
	if what := c.nodes[0].findingOf("directed-mode", true); strings.Contains(what, "this node cannot") {
		c.nodes[0].cloned.Await(0, "frames for the VIP are directed\\S* by="+c.nodes[0].MAC)
	}
	c.agree(c.nodes...)
	clear(answers)
	for range 60 {
		answers[c.get("http://"+vip4+"/whoami")]++
	}
	if len(answers) != 3 {
		t.Errorf("60 connections were answered by %v; want all three nodes", answers)
	}
	c.askAll(streams, "and now?")
}

// TestDirectedFromTheStart: a cluster that is told to serves in directed mode on any network,
// and on one that floods nobody answers twice.
func TestDirectedFromTheStart(t *testing.T) {
	c := newCluster(t, 3)
	c.mode(config.ModeDirected)
	c.start()
	for _, n := range c.nodes {
		n.findingOf("directed-mode", true)
	}
	time.Sleep(2 * time.Second) // the announcements
	answers := map[string]int{}
	for range 100 {
		answers[c.get("http://"+vip4+"/whoami")]++
	}
	if len(answers) != 3 {
		t.Errorf("100 connections were answered by %v; want all three nodes", answers)
	}
	for i := range 6 { // some of them by way of the director
		c.transfer([]string{vip4, "[" + vip6 + "]"}[i%2], 4<<20)
	}
	if n := c.LongestFrame(); n < 10000 {
		t.Errorf("the longest frame has %d bytes: no segmentation offload was in use", n)
	}
	c.client.Run("ip", "neigh", "flush", "dev", "eth0")
	if out := c.client.Run("ping", "-c", "5", "-i", "0.1", "-W", "5", vip4); !strings.Contains(out, " 5 received") || strings.Contains(out, "duplicates") {
		t.Errorf("ping says\n%s", out)
	}
	if n := c.client.Run("ip", "neigh", "show", vip4); !strings.Contains(n, c.nodes[0].MAC) {
		t.Errorf("the client has the VIP at %s; want the leader's MAC %s", n, c.nodes[0].MAC)
	}
	for _, n := range c.nodes {
		n.mustBeHealthy(n.Status())
	}
	c.checkSwitch()
}
