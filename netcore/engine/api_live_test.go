package engine_test

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"clonecluster/config"
	"clonecluster/netcore/api"
)

const apiPort = 9264

func (c *cluster) authority() *api.Authority {
	c.t.Helper()
	demo := config.Demo()
	a, err := api.NewAuthority(demo.Cluster.Name, demo.Cluster.Key)
	if err != nil {
		c.t.Fatal(err)
	}
	return a
}

// operator asks the cluster from its client's host, at the VIP or elsewhere.
func (c *cluster) operator(role api.Role, at ...string) *api.Client {
	c.t.Helper()
	a := c.authority()
	cert, err := a.Issue(role, "operator", time.Now().Add(time.Hour))
	if err != nil {
		c.t.Fatal(err)
	}
	return c.asking(a.Client(cert), at...)
}

func (c *cluster) asking(conf *tls.Config, at ...string) *api.Client {
	var addresses []netip.AddrPort
	for _, a := range at {
		addresses = append(addresses, netip.AddrPortFrom(netip.MustParseAddr(a), apiPort))
	}
	client := api.NewClient(conf, addresses...)
	client.Dial = c.client.DialContext
	return client
}

// story gives what a node tells, one event in a line, and checks its order.
func story(t *testing.T, c *api.Client, node string) (lines []string) {
	t.Helper()
	var got api.Events
	if err := c.Get(t.Context(), "/v1/events", url.Values{"node": {node}}, &got); err != nil {
		t.Fatal(err)
	}
	for i, e := range got.Events {
		if e.ID != uint64(i+1) || e.Node != node || i > 0 && e.Time.Before(got.Events[i-1].Time) {
			t.Errorf("event %d is %+v", i, e)
		}
		lines = append(lines, fmt.Sprintf("%s %s: %s (%s)", e.Kind, e.About, e.Text, e.Why))
	}
	return lines
}

// tells waits until a node's story has lines that hold these texts, in this order.
func tells(t *testing.T, c *api.Client, node string, want ...string) {
	t.Helper()
	var lines []string
	for deadline := time.Now().Add(20 * time.Second); time.Now().Before(deadline); time.Sleep(200 * time.Millisecond) {
		lines = story(t, c, node)
		found := 0
		for _, l := range lines {
			if found < len(want) && strings.Contains(l, want[found]) {
				found++
			}
		}
		if found == len(want) {
			return
		}
	}
	t.Errorf("%s does not tell in this order %q; but\n%s", node, want, strings.Join(lines, "\n"))
}

// whole asks for all nodes until what is wanted of the answer is so.
func whole(t *testing.T, c *api.Client, what string, ok func(api.Cluster) bool) (all api.Cluster) {
	t.Helper()
	var err error
	for deadline := time.Now().Add(20 * time.Second); time.Now().Before(deadline); time.Sleep(200 * time.Millisecond) {
		all = api.Cluster{}
		if err = c.Get(t.Context(), "/v1/cluster", nil, &all); err == nil && ok(all) {
			return all
		}
	}
	t.Fatalf("%s: not so, but %+v, %v", what, all, err)
	return all
}

func allAnswer(n int) func(api.Cluster) bool {
	return func(c api.Cluster) bool {
		return len(c.Nodes) == n && !slices.ContainsFunc(c.Nodes, func(r api.NodeReport) bool { return r.Status == nil })
	}
}

// TestClusterAPI: three nodes are asked and told by their API: at the VIP and at their
// own addresses, what they say of a client's connection is what it finds, and their
// events tell what happened.
func TestClusterAPI(t *testing.T) {
	c := newCluster(t, 3)
	c.start()
	control := c.operator(api.RoleControl, vip4)

	all := whole(t, control, "all nodes answer at the VIP", allAnswer(3))
	for i, n := range c.nodes {
		if s := all.Nodes[i].Status; s.WireMAC != n.MAC || s.Cluster != "demo" || len(s.Members) != 3 {
			t.Errorf("node %d is %+v; want %s, which knows all three", i, s, n.MAC)
		}
	}
	// At the VIP of the other family, at every node's own address, and by link-local
	// addresses among each other, if there is nothing else.
	for _, at := range []string{vip6, "10.77.0.101", "10.77.0.102", "10.77.0.103", "fd77::102"} {
		var s api.Status
		if err := c.operator(api.RoleReadOnly, at).Get(t.Context(), "/v1/status", nil, &s); err != nil {
			t.Errorf("at %s: %v", at, err)
		}
	}

	which := func(client net.Addr, port int) (w api.Which) {
		t.Helper()
		err := control.Get(t.Context(), "/v1/which", url.Values{"client": {client.String()}, "port": {fmt.Sprint(port)}}, &w)
		if err != nil {
			t.Fatal(err)
		}
		return w
	}
	ids := map[string]string{}
	for _, n := range c.nodes {
		ids[n.Name] = n.MAC
	}
	streams := c.openStreams(12)
	for _, s := range streams {
		w := which(s.conn.LocalAddr(), 80)
		if w.Owner != ids[s.holder] || w.Holder != ids[s.holder] {
			t.Errorf("%v is said to be with %s and to belong to %s; it is with %s (%s)", s.conn.LocalAddr(), w.Holder, w.Owner, ids[s.holder], w.Why)
		}
	}

	c.captureShows(control)

	drained := c.nodes[1]
	refused := func(name string, client *api.Client, want int) {
		t.Helper()
		var s api.Status
		err := client.Post(t.Context(), "/v1/drain", url.Values{"node": {drained.MAC}}, api.Order{}, &s)
		var e *api.Error
		if want != 0 && (!errors.As(err, &e) || e.Code != want) || err == nil {
			t.Errorf("a drain %s: %v; want that it is refused with %d", name, err, want)
		}
	}
	refused("with a read-only certificate", c.operator(api.RoleReadOnly, vip4), http.StatusForbidden)
	foreign, err := api.NewAuthority("demo", config.Key{1})
	if err != nil {
		t.Fatal(err)
	}
	cert, err := foreign.Issue(api.RoleControl, "intruder", time.Now().Add(time.Hour))
	if err != nil {
		t.Fatal(err)
	}
	intruder := &tls.Config{InsecureSkipVerify: true, GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &cert, nil }}
	refused("with another cluster's certificate", c.asking(intruder, vip4), 0)
	refused("without a certificate", c.asking(&tls.Config{InsecureSkipVerify: true}, vip4), http.StatusUnauthorized)
	if s := drained.Status(); s.Drain.Draining {
		t.Fatal("and yet it drains")
	}

	var s api.Status
	if err := control.Post(t.Context(), "/v1/drain", url.Values{"node": {drained.MAC}}, api.Order{Reason: "a new disk"}, &s); err != nil {
		t.Fatal(err)
	}
	if s.WireMAC != drained.MAC || !s.Drain.Draining {
		t.Errorf("the answer is of %s, draining %v; want %s", s.WireMAC, s.Drain.Draining, drained.MAC)
	}
	c.agree(c.nodes[0], c.nodes[2])
	c.askAll(streams, "after the drain")
	held := 0
	for _, s := range streams {
		w := which(s.conn.LocalAddr(), 80)
		if w.Holder != ids[s.holder] || (w.Owner == w.Holder) != (s.holder != drained.Name) {
			t.Errorf("after the drain %v is said to be with %s and to belong to %s; it is with %s", s.conn.LocalAddr(), w.Holder, w.Owner, ids[s.holder])
		}
		if s.holder == drained.Name {
			held++
			s.conn.Close()
		}
	}
	t.Logf("%d connections stayed with the drained node", held)
	// Who waits by the API for the connections to end is none of them.
	whole(t, c.operator(api.RoleControl, "10.77.0.102"), "the drain is over", func(all api.Cluster) bool {
		d := all.Nodes[1].Status
		return d != nil && d.Drain.Draining && !d.Drain.Owned && d.Drain.Flows == 0
	})
	tells(t, control, drained.MAC, "started", "joined", "map ", "drain "+drained.MAC+": this node was told to give its share to the others (by operator", "this node is draining", "map ")
	if all := strings.Join(story(t, control, drained.MAC), "\n"); !strings.Contains(all, ": a new disk)") {
		t.Errorf("the reason is not told:\n%s", all)
	}
	if err := control.Post(t.Context(), "/v1/resume", url.Values{"node": {drained.MAC}}, api.Order{}, &s); err != nil {
		t.Fatal(err)
	}
	c.agree(c.nodes...)

	// A death, as the others tell it while somebody follows.
	seen := make(chan api.Event, 100)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	go func() {
		_ = c.operator(api.RoleReadOnly, "10.77.0.101").Follow(ctx, "/v1/events", url.Values{"since": {"0s"}}, func(data []byte) error {
			var e api.Event
			if err := json.Unmarshal(data, &e); err != nil {
				return err
			}
			seen <- e
			return nil
		})
	}()
	time.Sleep(200 * time.Millisecond)
	dead := c.nodes[2]
	dead.PowerOff()
	dead.cloned = nil
	c.agree(c.nodes[0], c.nodes[1])
	for begin := time.Now(); ; {
		var e api.Event
		select {
		case e = <-seen:
		case <-time.After(20 * time.Second):
			t.Fatal("who follows was not told of the death")
		}
		if e.Kind == "lost" && e.About == dead.MAC {
			if !strings.Contains(e.Why, "no beacon for") {
				t.Errorf("why: %q; want the evidence", e.Why)
			}
			t.Logf("told after %v: %s (%s)", time.Since(begin).Round(time.Millisecond), e.Text, e.Why)
			break
		}
	}
	tells(t, c.operator(api.RoleControl, "10.77.0.102"), c.nodes[0].MAC, "joined "+dead.MAC, "lost "+dead.MAC, "map ")
	all = whole(t, c.operator(api.RoleControl, "10.77.0.101"), "the dead node is told of", func(all api.Cluster) bool {
		return len(all.Nodes) == 3 && all.Nodes[2].Gone && all.Nodes[2].Status == nil
	})
	if !strings.Contains(all.Nodes[2].Error, "ago: lost: no beacon for") {
		t.Errorf("of the dead node it is said %q", all.Nodes[2].Error)
	}

	// The log, and what an ordinary host has not.
	var logs api.Logs
	if err := c.operator(api.RoleReadOnly, "10.77.0.101").Get(t.Context(), "/v1/logs", url.Values{"source": {"engine"}}, &logs); err != nil {
		t.Fatal(err)
	}
	if !slices.ContainsFunc(logs.Lines, func(l api.LogLine) bool { return strings.Contains(l.Text, "node lost") }) {
		t.Errorf("no line of %d tells of the death", len(logs.Lines))
	}
	var boot api.Boot
	var e *api.Error
	if err := c.operator(api.RoleReadOnly, "10.77.0.101").Get(t.Context(), "/v1/boot", nil, &boot); !errors.As(err, &e) || e.Code != http.StatusNotFound {
		t.Errorf("boot: %v; want 404", err)
	}
}

// captureShows: of one connection all three nodes see each frame of the client, one
// accepts it, and that one answers; tshark is who says so.
func (c *cluster) captureShows(control *api.Client) {
	c.t.Helper()
	if _, err := exec.LookPath("tshark"); err != nil {
		c.t.Log("without tshark (Debian package tshark) no capture is looked at")
		return
	}
	var streams []io.ReadCloser
	for _, n := range c.nodes {
		r, err := control.Stream(c.t.Context(), "/v1/capture", url.Values{"node": {n.MAC}, "client": {"10.77.0.1"}, "port": {"80"}, "duration": {"2s"}})
		if err != nil {
			c.t.Fatal(err)
		}
		defer r.Close()
		streams = append(streams, r)
	}
	if _, err := control.Stream(c.t.Context(), "/v1/capture", url.Values{"port": {"0"}}); err == nil {
		c.t.Error("a capture of port 0 is not refused")
	}
	time.Sleep(200 * time.Millisecond)
	answered := c.get("http://" + vip4 + "/whoami")
	syns, answers := map[string]int{}, map[string]int{}
	for i, r := range streams {
		file := filepath.Join(c.Dir, fmt.Sprintf("capture%d.pcapng", i))
		all, err := io.ReadAll(r)
		if err != nil {
			c.t.Error(err)
		}
		if err := os.WriteFile(file, all, 0o600); err != nil {
			c.t.Fatal(err)
		}
		out, err := exec.Command("tshark", "-r", file, "-T", "fields", "-E", "separator=|", "-e", "tcp.flags.str", "-e", "eth.src", "-e", "frame.comment").Output()
		if err != nil {
			c.t.Fatal(err)
		}
		for line := range strings.Lines(string(out)) {
			f := strings.Split(strings.TrimSpace(line), "|")
			verdict, _, _ := strings.Cut(f[2], ",")
			switch {
			case f[1] == c.nodes[i].MAC:
				answers[verdict]++
			case strings.HasSuffix(f[0], "··S·"):
				syns[verdict]++
				if (verdict == "accept-new") != (c.nodes[i].Name == answered) {
					c.t.Errorf("%s: the SYN is %s; %s answered", c.nodes[i].Name, f[2], answered)
				}
			}
		}
	}
	if syns["accept-new"] != 1 || syns["drop-foreign"] != 2 || answers["send"] < 3 || len(answers) != 1 {
		c.t.Errorf("of one connection the captures show SYNs %v and answers %v", syns, answers)
	}
}
