package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spf13/cobra"

	"clonecluster/config"
	"clonecluster/netcore/api"
	"clonecluster/netcore/capture"
	"clonecluster/netcore/finding"
)

// oneNode is a cluster of one node, of which nothing is real but its API.
type oneNode struct {
	mu      sync.Mutex
	drained bool
	flows   int
	policy  api.Policy
	orders  []string
	events  *api.Record[api.Event]
	log     *api.Record[api.LogLine]
	exam    api.Examination
	burst   int
	breaks  string // how its captures end; empty: as they should
}

// The ways in which a capture ends other than with statistics and this comment.
const (
	breaksOff   = "it fails"
	breaksClean = "without statistics"
)

const oneNodeID = "52:54:00:77:00:01"

func (n *oneNode) Self() (string, string) { return oneNodeID, "web-1" }
func (n *oneNode) Health() api.Health     { return api.Health{State: "serving", OK: true} }

func (n *oneNode) Status() api.Status {
	n.mu.Lock()
	defer n.mu.Unlock()
	s := api.Status{
		Cluster: "demo", Name: "web-1", Build: "0123456789ab", WireMAC: oneNodeID, VIP: []string{"10.77.0.10", "fd77::10"}, Datapath: "native", Ingress: "tcx",
		State: "serving", Agreed: true, Leader: oneNodeID, Map: 7, Policy: "byRandom", Balance: n.policy.Balance, PolicyVersion: n.policy.Version, UptimeSec: 3700,
		Members:  []api.Member{{Node: oneNodeID, Self: true, State: "serving", Live: true, Weight: 100, Busy: 0.12, Flows: n.flows, Buckets: 1024}},
		Findings: []finding.Finding{{Code: "service-unwell", Level: finding.Critical, Node: oneNodeID, What: "a service does not pass its check: web: the answer is 503", Fix: "look at the service's log, and so on, so that this is a line that has to be broken"}},
		Offered:  api.Offered{FramesPerSecond: 1234.4, SYNsPerSecond: 58.5, SYNsAgainPerSecond: 2.5, UnownedPerSecond: 0.4, LeaselessPerSecond: 1.5},
		Drain:    api.Drain{Draining: n.drained, Flows: n.flows},
	}
	if n.drained {
		s.State = "draining"
	}
	return s
}

func (n *oneNode) order(drained bool, o api.Order, who string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.drained = drained
	n.orders = append(n.orders, who+": "+o.Reason)
	n.events.Add(api.Event{Time: time.Now(), Node: oneNodeID, Kind: "drain", Text: "an order", Why: o.Reason})
}

func (n *oneNode) Drain(_ context.Context, o api.Order, who string)  { n.order(true, o, who) }
func (n *oneNode) Resume(_ context.Context, o api.Order, who string) { n.order(false, o, who) }
func (n *oneNode) Policy() api.Policy {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.policy
}

func (n *oneNode) SetPolicy(_ context.Context, o api.PolicyOrder, who string) (api.Policy, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	p := api.Policy{Version: n.policy.Version + 1, Balance: n.policy.Balance, Set: o.Balance, Configured: "even", Affinity: "none", By: o.Reason}
	if o.Balance != "" {
		p.Balance = o.Balance
	}
	for node, w := range o.Weights {
		p.Nodes = append(p.Nodes, api.PolicyNode{Node: node, Weight: w, Set: w != 0})
	}
	n.policy = p
	return p, nil
}

func (n *oneNode) Reboot(_ context.Context, o api.Order, who string) error {
	n.order(false, o, who)
	return nil
}
func (n *oneNode) Peers() []api.Peer {
	return []api.Peer{{Node: "52:54:00:77:00:02", Gone: "12s ago: lost"}}
}
func (n *oneNode) Owners() api.Owners {
	return api.Owners{Map: 7, Nodes: []string{oneNodeID}, Buckets: make([]byte, 1024)}
}

func (n *oneNode) Examine(burst int, _ string) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.burst, n.exam.Running = burst, true
	return nil
}

// Examination runs until it has been asked for twice.
func (n *oneNode) Examination() api.Examination {
	n.mu.Lock()
	defer n.mu.Unlock()
	e := n.exam
	n.exam.Running = false
	return e
}

func (n *oneNode) Events() *api.Record[api.Event] { return n.events }
func (n *oneNode) Which(f api.Flow) (api.Which, error) {
	b := 313
	return api.Which{
		Client: f.ClientText(), VIP: "10.77.0.10", Port: f.Port, Protocol: f.Proto, Affinity: "none", Bucket: &b, Owner: oneNodeID,
		Nodes: []api.WhichNode{{Node: oneNodeID, Name: "web-1", State: "settled", Socket: true}},
	}, nil
}

func (n *oneNode) Logs(_ context.Context, after uint64) ([]api.LogLine, string, uint64, <-chan struct{}, error) {
	lines, lost, more := n.log.After(after)
	return lines, n.log.Run(), lost, more, nil
}

func (n *oneNode) Offered() api.OfferedBuckets { return api.OfferedBuckets{Node: oneNodeID} }

// Capture gives a SYN with each verdict in turn, the later one first.
func (n *oneNode) Capture(_ context.Context, q capture.Query, w io.Writer, flush func() error) error {
	out, err := capture.NewWriter(w)
	if err != nil {
		return err
	}
	id, err := out.AddInterface("web-1", "", q.Snap)
	syn := make([]byte, 60)
	copy(syn, "\x02\xcc\x0a\x4d\x00\x0a\x52\x54\x00\x11\x22\x33\x08\x00")
	for i, comment := range []string{"accept-new, bucket 7 is settled", "drop-foreign, bucket 9 is foreign"} {
		err = errors.Join(err, out.Packet(id, capture.Frame{Time: time.Unix(int64(100-i), 5), Data: syn, Length: len(syn), Left: i == 1, Comment: comment}))
	}
	switch n.breaks {
	case "":
		return errors.Join(err, out.Statistics(id, time.Unix(200, 0), 2, 3, "complete"), flush())
	case breaksOff:
		return errors.Join(errors.New(breaksOff), flush())
	case breaksClean:
		return errors.Join(err, flush())
	}
	return errors.Join(err, out.Statistics(id, time.Unix(200, 0), 2, 3, n.breaks), flush())
}

func (n *oneNode) Metrics(io.Writer, http.Header) (string, error) { return "text/plain", nil }

func (n *oneNode) Boot(context.Context) (api.Boot, error) {
	return api.Boot{Hostname: "web-1", Node: oneNodeID, Uptime: 61, Timeline: []api.BootStage{{Stage: "kernel", At: 1.5}, {Stage: "ready", At: 2}},
		Children: []api.BootChild{{Name: "engine", State: "ready", RSS: 12e6}}}, nil
}

// serveOne gives the node, the flags that lead to it, and a folder with the demo's
// cluster.yaml.
func serveOne(t *testing.T) (n *oneNode, at []string, dir string) {
	t.Helper()
	t.Setenv("CLONECLUSTER_CACHE", t.TempDir())
	dir = t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "cluster.yaml"), config.DemoYAML, 0o600); err != nil {
		t.Fatal(err)
	}
	t.Chdir(dir)
	n = &oneNode{events: api.NewEvents(), log: api.NewLog(), policy: api.Policy{Balance: "even", Configured: "even", Affinity: "none"}}
	demo := config.Demo()
	a, err := api.NewAuthority(demo.Cluster.Name, demo.Cluster.Key)
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	serveFake(t, a, n, l)
	return n, []string{"--address", l.Addr().String()}, dir
}

// serveFake serves the API of a node that is not real until the test ends.
func serveFake(t *testing.T, a *api.Authority, b api.Backend, l net.Listener) {
	s, err := api.NewServer(a, b, api.Limits{NewPerSecond: 1000, Requests: 1000}, slog.New(slog.NewTextHandler(io.Discard, nil)))
	if err != nil {
		t.Fatal(err)
	}
	go s.Serve(l)
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		s.Close(ctx)
	})
}

// clonectl runs a command line.
func clonectl(t *testing.T, args ...string) (string, error) {
	t.Helper()
	return clonectlWithin(t, 20*time.Second, args...)
}

func clonectlWithin(t *testing.T, most time.Duration, args ...string) (string, error) {
	t.Helper()
	var out bytes.Buffer
	root := newRoot()
	root.SetArgs(args)
	root.SetOut(&out)
	root.SetErr(&out)
	ctx, cancel := context.WithTimeout(t.Context(), most)
	defer cancel()
	err := root.ExecuteContext(ctx)
	return out.String(), err
}

func TestOperate(t *testing.T) {
	n, at, dir := serveOne(t)
	n.log.Add(api.LogLine{Time: time.Now(), Source: "engine", Text: "a line with \x1b[2J"})
	n.log.Add(api.LogLine{Time: time.Now(), Source: "web", Text: "another"})
	for _, tt := range []struct {
		args string
		says []string
	}{
		{"status", []string{"cluster demo at 10.77.0.10 and fd77::10", "map 7 made by web-1, agreed", "web-1 ", "serving", "1024", " 12%", "1h01m", "native tcx", "offered: 1234 frames/s, 56 connections/s; SYNs again: 2.5/s; for nobody: 1.9/s", "gone 12s ago: lost", "program 0123456789ab on all nodes", "!! web-1: service-unwell: a service does not pass", "-> look at the service's log"}},
		{"status --json", []string{`"wire_mac": "52:54:00:77:00:01"`}},
		{"which 192.0.2.7:40312 80", []string{"192.0.2.7:40312 to 10.77.0.10 port 80/tcp: web-1\n", "gives bucket 313 of\n1024", "has this connection"}},
		{"which 192.0.2.7 53/udp --json", []string{`"protocol": "udp"`}},
		{"logs web-1", []string{"engine: a line with ·[2J\n", "web: another"}},
		{"logs 00:01 --source web", []string{"web: another"}},
		{"boot web-1", []string{"   2.000s  +0.500s  ready", "engine", "12.0MB"}},
		{"drain web-1 --reason disk", []string{"web-1 (52:54:00:77:00:01) is drained: it has no connections left"}},
		{"events", []string{"drain      an order (disk)"}},
		{"events --all", []string{"web-1             drain"}},
		{"events --json --since 1h", []string{`"why":"disk"`}},
		{"resume web-1", []string{"takes part again"}},
		{"policy", []string{"balance even, as configured; affinity none"}},
		{"policy byLoad --reason why", []string{"balance load, set at run time (configured: even)", "last change, number 1, by why"}},
		{"weight web-1 50", []string{"web-1", "50  set at run time"}},
		{"status", []string{"policy byRandom (balance load by change 2)"}},
		{"policy --json", []string{`"version": 2`}},
	} {
		out, err := clonectl(t, append(strings.Fields(tt.args), at...)...)
		if err != nil {
			t.Errorf("clonectl %s: %v", tt.args, err)
		}
		for _, s := range tt.says {
			if !strings.Contains(out, s) {
				t.Errorf("clonectl %s does not say %q, but\n%s", tt.args, s, out)
			}
		}
		for line := range strings.Lines(out) {
			if len([]rune(line)) > 81 && !strings.Contains(tt.args, "json") {
				t.Errorf("clonectl %s has a line of %d columns: %s", tt.args, len([]rune(line))-1, line)
			}
		}
	}
	if _, err := clonectl(t, append([]string{"policy", "bySource"}, at...)...); !errors.As(err, new(usageError)) || !strings.Contains(err.Error(), "affinity client") {
		t.Errorf("policy bySource: %v; want that affinity cannot be changed", err)
	}
	if len(n.orders) != 2 || !strings.HasSuffix(n.orders[0], ": disk") {
		t.Errorf("the node was told %q", n.orders)
	}

	// Its certificates.
	if out, err := clonectl(t, "key", "issue", "--read-only", "--out", "looks", "--days", "7"); err != nil || !strings.Contains(out, "read-only for looks, until") {
		t.Fatalf("key issue: %v, %s", err, out)
	}
	for _, file := range []string{"ca.pem", "client.pem", "client.key", "cluster.json"} {
		if info, err := os.Stat(filepath.Join(dir, "looks", file)); err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v, %v; want a file of mode 0600", file, info, err)
		}
	}
	if _, err := clonectl(t, append([]string{"status", "--cluster", "looks"}, at...)...); err != nil {
		t.Errorf("status with the read-only certificate: %v", err)
	}
	if _, err := clonectl(t, append([]string{"drain", "web-1", "--cluster", "looks"}, at...)...); err == nil || !strings.Contains(err.Error(), "needs control") {
		t.Errorf("drain with the read-only certificate: %v; want that it needs control", err)
	}
	if _, err := clonectl(t, "key", "issue", "--out", "looks"); err == nil || !strings.Contains(err.Error(), "holds a certificate already") {
		t.Errorf("key issue into the same folder: %v", err)
	}
	other := strings.Replace(string(config.DemoYAML), "key: Y2", "key: Z2", 1)
	if err := os.WriteFile("other.yaml", []byte(other), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := clonectl(t, append([]string{"status", "--cluster", "other.yaml"}, at...)...); err == nil || !strings.Contains(err.Error(), "no node of this cluster") {
		t.Errorf("status with another cluster's key: %v", err)
	}
}

// TestCaptureWithout: the end says at which nodes XDP drops frames unseen, and of
// others nothing.
func TestCaptureWithout(t *testing.T) {
	for _, tt := range []struct {
		about []string // the descriptions of n0, n1, ...
		want  string
	}{
		{[]string{"node, eth0, datapath native, frames judged by tcx"}, ""},
		{[]string{"node; " + capture.WithoutDropped, "frames judged by packet socket", "other; " + capture.WithoutDropped}, "What XDP drops at n0, n2 is not in it"},
	} {
		m := newMerger(len(tt.about), 0)
		for i, about := range tt.about {
			var b bytes.Buffer
			w, err := capture.NewWriter(&b)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := w.AddInterface(fmt.Sprintf("n%d", i), about, 96); err != nil {
				t.Fatal(err)
			}
			if err := w.Statistics(0, time.Now(), 0, 0, "complete"); err != nil {
				t.Fatal(err)
			}
			if err := m.read(t.Context(), i, &b); err != nil {
				t.Fatal(err)
			}
		}
		close(m.frames)
		if err := m.write(t.Context(), io.Discard, func(int) {}); err != nil {
			t.Fatal(err)
		}
		if got := m.withoutText(); !strings.Contains(got, tt.want) || (got == "") != (tt.want == "") {
			t.Errorf("of %q: %q; want %q", tt.about, got, tt.want)
		}
	}
}

// TestCapture: what nodes saw is in the order of time, and tshark reads the node and the
// verdict with each frame.
func TestCapture(t *testing.T) {
	_, at, _ := serveOne(t)
	if _, err := clonectl(t, append([]string{"capture", "-w", "c.pcapng"}, at...)...); err != nil {
		t.Fatal(err)
	}
	got := tsharkFields(t, "c.pcapng", "frame.time_epoch", "frame.interface_name", "frame.packet_flags_direction", "frame.comment")
	want := "99.000000005|web-1|0x00000002|drop-foreign, bucket 9 is foreign\n100.000000005|web-1|0x00000001|accept-new, bucket 7 is settled\n"
	if got != want {
		t.Errorf("tshark reads\n%swant\n%s", got, want)
	}
	if info, err := os.Stat("c.pcapng"); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("the file is %v, %v; want one of mode 0600: it has what clients said", info, err)
	}
	if out, err := clonectl(t, append([]string{"capture", "web-1", "--count", "1", "-w", "-"}, at...)...); err != nil || len(out) == 0 || len(out) > 400 {
		t.Errorf("to the standard output, one frame: %d bytes, %v", len(out), err)
	}
	if _, err := clonectl(t, append([]string{"capture", "nobody", "-w", "x"}, at...)...); err == nil || !strings.Contains(err.Error(), "no node is meant") {
		t.Errorf("of a node that is not there: %v", err)
	}
	if _, err := os.Stat("x"); err == nil {
		t.Error("a capture that could not begin leaves a file")
	}
}

// TestCaptureLacks: a capture that lacks a node, or the end of what one saw, is written,
// and not said to be complete.
func TestCaptureLacks(t *testing.T) {
	for _, tt := range []struct {
		name, breaks string
		silent       bool
		named        bool
		want         string
	}{
		{"whole", "complete: the time that was asked for", false, false, ""},
		{"of an older node", "", false, false, ""},
		{"the node's engine ends", capture.EndedEarly + "this node's engine ends", false, false, "web-2: the capture ended early: this node's engine ends"},
		{"the node fails", breaksOff, false, false, "web-2: the capture ended early"},
		{"no statistics at its end", breaksClean, false, false, "web-2: the capture ended early"},
		{"a silent node", "", true, false, "web-3 does not answer, and is not in it"},
		{"a silent node that was named", "", true, true, "web-3: "},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c, at := serveRollout(t)
			c.nodes[1].breaks = tt.breaks
			if tt.silent {
				c.setAt(2, nowhere)
			}
			args := []string{"capture", "-w", "c.pcapng"}
			if tt.named {
				args = append(args, "web-1", "web-3")
			}
			out, err := clonectl(t, append(args, at...)...)
			if (err == nil) != (tt.want == "") || err != nil && !strings.Contains(err.Error(), "c.pcapng is not complete: "+tt.want) {
				t.Errorf("%v; want %q\n%s", err, tt.want, out)
			}
			if info, err := os.Stat("c.pcapng"); err != nil || info.Size() < 300 {
				t.Errorf("what there was is not written: %v, %v", info, err)
			}
		})
	}
}

// tsharkFields reads fields of each frame of a capture, with | between them.
func tsharkFields(t *testing.T, file string, fields ...string) string {
	t.Helper()
	if _, err := exec.LookPath("tshark"); err != nil {
		t.Skip("needs tshark (Debian package tshark)")
	}
	// DLT_USER0 is log messages, of RFC 5424.
	args := []string{"-r", file, "-T", "fields", "-E", "separator=|", "-o", `uat:user_dlts:"User 0 (DLT=147)","syslog","0","","0",""`}
	for _, f := range fields {
		args = append(args, "-e", f)
	}
	cmd := exec.CommandContext(t.Context(), "tshark", args...)
	var errs bytes.Buffer
	cmd.Stderr = &errs
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("tshark: %v: %s", err, errs.String())
	}
	return string(out)
}

// TestPolicyHolds: a change is done when all nodes know of it, and what holds is told and
// counts, which may be somebody else's.
func TestPolicyHolds(t *testing.T) {
	t.Run("a silent node", func(t *testing.T) {
		c, at := serveRollout(t)
		there := c.nodes[2].at
		c.setAt(2, nowhere)
		begin := time.Now()
		time.AfterFunc(time.Second, func() { c.setAt(2, there) })
		out, err := clonectl(t, append([]string{"policy", "load"}, at...)...)
		if took := time.Since(begin); err != nil || took < time.Second || !strings.Contains(out, "balance load") {
			t.Errorf("done after %v, while a node was silent for 1s: %v\n%s", took, err, out)
		}
	})
	other := api.Policy{Version: 1, Balance: "even", Set: "even", Configured: "even", Affinity: "none", Author: "52:54:00:77:00:02", By: "somebody else"}
	other.Nodes = []api.PolicyNode{{Node: "52:54:00:77:00:01", Name: "web-1", Weight: 70, Set: true}, {Node: "52:54:00:77:00:02", Name: "web-2", Weight: 100}}
	for _, tt := range []struct{ args, fails string }{
		{"policy load", "the balance is not load, as change 1 by somebody else holds"},
		{"policy configured", "the balance is not configured"},
		{"policy even", ""},
		{"weight web-1 50", "the weight of web-1 is not 50"},
		{"weight web-1 configured", "the weight of web-1 is not the configured one"},
		{"weight web-2 100", "the weight of web-2 is not 100"},
		{"weight web-2 configured", ""},
		{"weight 00:01 70", ""},
	} {
		t.Run(tt.args, func(t *testing.T) {
			c, at := serveRollout(t)
			c.other = &other
			out, err := clonectl(t, append(strings.Fields(tt.args), at...)...)
			if (err == nil) != (tt.fails == "") || err != nil && !strings.Contains(err.Error(), tt.fails) || !strings.Contains(out, "somebody else") {
				t.Errorf("%v; want %q, and what holds\n%s", err, tt.fails, out)
			}
		})
	}
}

// TestDrainWait: the exit code says whether the connections have ended.
func TestDrainWait(t *testing.T) {
	n, at, _ := serveOne(t)
	n.flows = 3
	_, err := clonectl(t, append([]string{"drain", "web-1", "--wait", "600ms"}, at...)...)
	if coded := (codedError{}); !errors.As(err, &coded) || coded.code != exitNotDone || !strings.Contains(err.Error(), "3 connections left") {
		t.Errorf("with connections left: %v; want exit code %d", err, exitNotDone)
	}
	time.AfterFunc(400*time.Millisecond, func() {
		n.mu.Lock()
		defer n.mu.Unlock()
		n.flows = 0
	})
	if out, err := clonectl(t, append([]string{"drain", "web-1", "--wait", "10s"}, at...)...); err != nil || !strings.Contains(out, "no connections left") {
		t.Errorf("when they end: %v, %s", err, out)
	}
}

func TestOperateUsage(t *testing.T) {
	serveOne(t)
	for _, args := range []string{
		"drain", "drain a b", "which 192.0.2.7", "which x 80", "which 192.0.2.7 0", "events --all --follow", "events --since yesterday", "logs", "boot",
		"key issue", "key issue --out x --days 0", "drain a --wait -1s", "status --address x:y",
		"policy fast", "policy a b", "weight a", "weight a 0", "weight a 1001", "weight a much", "reboot", "reboot a b", "reboot a --timeout 0s", "rollout --resume a", "capture", "capture -w - --verdict none", "capture -w - --client x", "capture -w - --count -1", "capture -w - --duration 1h", "capture -w - --port 0",
	} {
		if _, err := clonectl(t, strings.Fields(args)...); !errors.As(err, new(usageError)) {
			t.Errorf("clonectl %s: %v; want a mistake in its use", args, err)
		}
	}
	t.Chdir(t.TempDir())
	if _, err := clonectl(t, "status"); !errors.As(err, new(usageError)) || !strings.Contains(err.Error(), "--cluster") {
		t.Errorf("without a cluster: %v", err)
	}
}

// TestLabIsFound: the demo that runs is asked without a word of where it is.
func TestLabIsFound(t *testing.T) {
	_, at, _ := serveOne(t)
	forget, err := writeLab(config.Demo(), at[1])
	if err != nil {
		t.Fatal(err)
	}
	issued := filepath.Join(t.TempDir(), "issued")
	if out, err := clonectl(t, "key", "issue", "--read-only", "--out", issued); err != nil {
		t.Errorf("key issue: %v, %s", err, out)
	}
	// With its configuration here, and without.
	for _, dir := range []string{".", t.TempDir()} {
		t.Chdir(dir)
		if out, err := clonectl(t, "status"); err != nil || !strings.Contains(out, "web-1") {
			t.Errorf("in %s: %v, %s", dir, err, out)
		}
	}
	if out, err := clonectl(t, "status", "--cluster", issued); err != nil || !strings.Contains(out, "web-1") {
		t.Errorf("with an issued certificate: %v, %s", err, out)
	}
	names, _ := (&access{}).completeNodes(withContext(t), nil, "")
	if len(names) != 1 || names[0] != "web-1\t"+oneNodeID {
		t.Errorf("completion offers %q; want the node that is there", names)
	}
	forget()
	if l := readLab(); l.Address != "" {
		t.Errorf("after its end the lab is at %s", l.Address)
	}
}

func withContext(t *testing.T) *cobra.Command {
	cmd := &cobra.Command{}
	cmd.SetContext(t.Context())
	return cmd
}

func TestWrap(t *testing.T) {
	for _, tt := range []struct{ text, want string }{
		{"", ""}, {"one", "one"}, {"one two three", "one two\n  three"}, {"onetwothree four", "onetwothree\n  four"},
	} {
		if got := wrap(tt.text, 8, "  "); got != tt.want {
			t.Errorf("wrap(%q) = %q; want %q", tt.text, got, tt.want)
		}
	}
	for d, want := range map[time.Duration]string{5 * time.Second: "5s", 61 * time.Second: "1m01s", 3700 * time.Second: "1h01m", 50 * time.Hour: "2d02h"} {
		if got := upFor(d); got != want {
			t.Errorf("upFor(%v) = %s; want %s", d, got, want)
		}
	}
}
