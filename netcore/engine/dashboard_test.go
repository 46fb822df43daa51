package engine_test

import (
	"context"
	"net"
	"net/http"
	"sync"
	"testing"
	"time"

	"clonecluster/netcore/api"
	"clonecluster/netcore/dashboard/chromiumtest"
	"clonecluster/netcore/dashboard/local"
)

// visit asks the cluster now and then until the function that it gives is called.
func (c *cluster) visit(every time.Duration) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	var g sync.WaitGroup
	client := c.http()
	g.Go(func() {
		tick := time.NewTicker(every)
		defer tick.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
				g.Go(func() { _, _ = tryGet(client, "http://"+vip4+"/download/20000") })
			}
		}
	})
	return func() {
		cancel()
		g.Wait()
	}
}

// TestDashboard: a browser that looks at three nodes sees one lose its power and come
// back, also when it is the node that tells it everything, and has nothing to complain
// of.
func TestDashboard(t *testing.T) {
	c := newCluster(t, 3)
	c.start()
	ids := map[string]*node{}
	for _, n := range c.nodes {
		ids[n.MAC] = n
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	client := c.operator(api.RoleReadOnly, vip4)
	proxy := local.New(client, l.Addr().String(), false)
	srv := &http.Server{Handler: proxy, ReadHeaderTimeout: time.Minute}
	go srv.Serve(l)
	t.Cleanup(func() { _ = srv.Close(); client.Close() })
	defer c.visit(50 * time.Millisecond)()

	p := chromiumtest.Open(t, proxy.Link(), 1360, 900)
	p.AwaitText(60*time.Second, "All 3 nodes serve", "Each takes 341 bucket", "accept-new")
	p.Await("new connections are counted", `parseFloat(document.querySelector('#rate').textContent) > 1`, 20*time.Second)
	shares := `[...document.querySelectorAll('#ring .b')].reduce((n, b) => { const o = b.getAttribute('class').split(' ')[1]; n[o] = (n[o] || 0) + 1; return n; }, {})`
	if got := chromiumtest.Eval[map[string]int](p, shares); len(got) != 3 {
		t.Errorf("the ring shows %v; want three shares", got)
	}
	p.Shot("well")

	// Once the node that is asked, then another.
	asked := func() (name string) {
		text := chromiumtest.Eval[string](p, `[...document.querySelectorAll('.node')].find((n) => n.textContent.includes('· asked'))?.querySelector('.small:last-of-type').textContent || ''`)
		for id, n := range ids {
			if len(text) >= len(id) && text[:len(id)] == id {
				return n.Name
			}
		}
		return ""
	}
	pick := func(want bool) *node {
		t.Helper()
		teller := asked()
		if teller == "" {
			t.Fatal("the page does not say who tells it")
		}
		for _, n := range c.nodes {
			if (n.Name == teller) == want {
				return n
			}
		}
		return nil
	}
	for _, teller := range []bool{false, true} {
		dead := pick(teller)
		name := map[bool]string{false: "another", true: "teller"}[teller]
		begin := time.Now()
		dead.PowerOff()
		dead.cloned = nil
		p.Await("the page tells of the death", `/has failed/.test(document.querySelector('#headline').textContent) && document.querySelectorAll('.node.gone').length === 1`, 20*time.Second)
		t.Logf("%s, the node that tells the page: %v; shown after %v", dead.Name, teller, time.Since(begin).Round(10*time.Millisecond))
		p.AwaitText(5*time.Second, "counts as dead", "No beacon for", "Its buckets are with")
		if got := chromiumtest.Eval[map[string]int](p, shares); len(got) != 2 {
			t.Errorf("without %s the ring shows %v; want two shares", dead.Name, got)
		}
		p.Shot(name + "-dead")
		dead.PowerOn()
		dead.StartHTTP()
		dead.start()
		p.Await("the page tells of the return", `/is here/.test(document.querySelector('#headline').textContent) && document.querySelectorAll('.node.gone').length === 0`, 30*time.Second)
		p.Await("the ring has three shares", `Object.keys(`+shares+`).length === 3`, 20*time.Second)
		p.Shot(name + "-back")
		c.agree(c.nodes...)
	}
	p.CheckShift()
	p.NoComplaints()
}

// TestDashboardCost: what one viewer costs the nodes, for docs/management.md.
func TestDashboardCost(t *testing.T) {
	c := newCluster(t, 3)
	c.start()
	spent := func() (all time.Duration) {
		for _, n := range c.nodes {
			all += n.cloned.CPU()
		}
		return all
	}
	const span = 10 * time.Second
	over := func() time.Duration {
		begin := spent()
		time.Sleep(span)
		return spent() - begin
	}
	idle := over()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	bytes, looks := 0, 0
	var mu sync.Mutex
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = c.operator(api.RoleReadOnly, "10.77.0.101").Follow(ctx, "/v1/live", nil, func(data []byte) error {
			mu.Lock()
			defer mu.Unlock()
			bytes += len(data)
			looks++
			return nil
		})
	}()
	time.Sleep(2 * time.Second)
	mu.Lock()
	bytes, looks = 0, 0
	mu.Unlock()
	watched := over()
	cancel()
	<-done
	t.Logf("CPU of three engines in %v: %v without a viewer, %v with one; %d messages of %d bytes on average", span, idle, watched, looks, bytes/max(looks, 1))
	if looks < 15 || looks > 40 {
		t.Errorf("%d messages in %v; want two a second", looks, span)
	}
}
