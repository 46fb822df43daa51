package main

import (
	"context"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	"clonecluster/netcore/api"
	"clonecluster/qemu/lab"
)

// TestApplianceAPI: nodes without a shell are asked and told by their API: what they
// know of each other, how they booted, what init and the services said, and a drain.
func TestApplianceAPI(t *testing.T) {
	img := testImage(t)
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	cache, err := cacheDir()
	if err != nil {
		t.Fatal(err)
	}
	cfg, err := labConfig(img, upOptions{nodes: 2, accel: "auto"}, cache)
	if err != nil {
		t.Fatal(err)
	}
	l, err := lab.Start(ctx, cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if err := l.WaitAll(ctx, "ready"); err != nil {
		t.Fatal(err)
	}
	demo := img.config
	authority, err := api.NewAuthority(demo.Cluster.Name, demo.Cluster.Key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := authority.Issue(api.RoleControl, "tester", time.Now().Add(time.Hour))
	if err != nil {
		t.Fatal(err)
	}
	c := api.NewClient(authority.Client(cert), netip.AddrPortFrom(demo.VIP.IPv4.Addr(), uint16(demo.Management.Port)))
	c.Dial = l.Client().DialContext
	defer c.Close()

	// Emulated nodes are busy when they have just booted.
	var all api.Cluster
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(500 * time.Millisecond) {
		all = api.Cluster{}
		err := c.Get(ctx, "/v1/cluster", nil, &all)
		if err == nil && len(all.Nodes) == 2 && !slices.ContainsFunc(all.Nodes, func(n api.NodeReport) bool {
			return n.Status == nil || n.Status.State != "serving"
		}) {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("the cluster says of itself %+v, %v\n%s", all, err, l.Report())
		}
	}
	other := all.Nodes[slices.IndexFunc(all.Nodes, func(n api.NodeReport) bool { return n.Node != all.Asked })]
	for _, n := range all.Nodes {
		if n.Name == "" || n.Status.Datapath != "native" || len(n.Addresses) == 0 {
			t.Errorf("a node is %+v", n)
		}
	}
	of := url.Values{"node": {other.Name}}
	var boot api.Boot
	if err := c.Get(ctx, "/v1/boot", of, &boot); err != nil {
		t.Fatal(err)
	}
	if boot.Node != other.Node || !boot.Ready || len(boot.Timeline) < 5 || len(boot.Children) != 2 {
		t.Errorf("the boot of %s is %+v", other.Node, boot)
	}
	var logs api.Logs
	if err := c.Get(ctx, "/v1/logs", of, &logs); err != nil {
		t.Fatal(err)
	}
	sources := map[string]bool{}
	for _, line := range logs.Lines {
		sources[line.Source] = true
	}
	if !sources["init"] || !sources["engine"] {
		t.Errorf("the log has lines of %v; want those of init and the engine, too", sources)
	}
	var s api.Status
	if err := c.Post(ctx, "/v1/drain", of, api.Order{Reason: "test"}, &s); err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(time.Minute); s.State != "draining" || s.Drain.Owned; time.Sleep(200 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("it does not drain: %+v", s)
		}
		if err := c.Get(ctx, "/v1/status", of, &s); err != nil && !strings.Contains(err.Error(), "deadline") {
			t.Logf("meanwhile: %v", err)
		}
	}
}
