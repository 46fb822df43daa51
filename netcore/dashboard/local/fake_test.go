package local_test

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"math"
	"net"
	"net/http/httptest"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"time"

	"clonecluster/config"
	"clonecluster/netcore/api"
	"clonecluster/netcore/dashboard/local"
	"clonecluster/netcore/finding"
)

// cluster is one of which nothing is real but the nodes' API.
type cluster struct {
	t         testing.TB
	authority *api.Authority

	mu    sync.Mutex
	nodes []*node
	maps  uint64
}

type node struct {
	api.Backend // nil: of what nobody asks here

	c        *cluster
	id, name string
	at       netip.AddrPort
	server   *api.Server
	begin    time.Time
	events   *api.Record[api.Event]

	// By c.mu.
	dead    bool
	drained bool
	orders  []string
	found   []finding.Finding
	frames  map[string]float64 // by verdict, until counted seconds after the begin
	counted float64
}

var key = config.Key{1, 2, 3}

func startCluster(t testing.TB, n int) *cluster {
	t.Helper()
	a, err := api.NewAuthority("demo", key)
	if err != nil {
		t.Fatal(err)
	}
	c := &cluster{t: t, authority: a, maps: 4}
	for i := range n {
		node := &node{c: c, id: fmt.Sprintf("52:54:00:77:00:%02x", i+1), name: fmt.Sprintf("node%d", i+1)}
		c.nodes = append(c.nodes, node)
		node.start("127.0.0.1:0")
	}
	t.Cleanup(func() {
		for _, n := range c.nodes {
			n.stop()
		}
	})
	return c
}

func (n *node) start(at string) {
	n.c.t.Helper()
	l, err := net.Listen("tcp", at)
	if err != nil {
		n.c.t.Fatal(err)
	}
	n.at, n.begin, n.events = netip.MustParseAddrPort(l.Addr().String()), time.Now(), api.NewEvents()
	n.events.Add(api.Event{Time: time.Now(), Node: n.id, Kind: "started", About: n.id, Text: "the engine begins"})
	n.events.Add(api.Event{Time: time.Now(), Node: n.id, Kind: "state", About: n.id, Text: "this node is serving", Why: "it was listening"})
	if n.server, err = api.NewServer(n.c.authority, n, api.Limits{NewPerSecond: 10000, PerSource: 200}, slog.New(slog.NewTextHandler(io.Discard, nil))); err != nil {
		n.c.t.Fatal(err)
	}
	go n.server.Serve(l)
}

func (n *node) stop() {
	ctx, cancel := context.WithTimeout(context.Background(), 200*time.Millisecond)
	defer cancel()
	n.server.Close(ctx)
}

// kill ends a node, and the others see it.
func (c *cluster) kill(i int) {
	c.mu.Lock()
	c.nodes[i].dead = true
	c.maps++
	c.mu.Unlock()
	c.tell(i, "lost", "%s (%s) counts as dead", "no beacon for 300ms")
	c.nodes[i].stop()
}

func (c *cluster) revive(i int) {
	c.nodes[i].start(c.nodes[i].at.String())
	c.mu.Lock()
	c.nodes[i].dead = false
	c.maps++
	c.mu.Unlock()
	c.tell(i, "joined", "%s (%s) is here: it and this node hear each other", "")
}

// tell has all the others tell of a node.
func (c *cluster) tell(i int, kind, text, why string) {
	about := c.nodes[i]
	for _, n := range c.nodes {
		c.mu.Lock()
		dead, maps := n.dead, c.maps
		c.mu.Unlock()
		if n == about || dead {
			continue
		}
		n.events.Add(api.Event{Time: time.Now(), Node: n.id, Kind: kind, About: about.id, Text: fmt.Sprintf(text, about.name, about.id), Why: why})
		n.events.Add(api.Event{Time: time.Now(), Node: n.id, Kind: "map", About: c.nodes[0].id, Text: fmt.Sprintf("map %d", maps), Why: "made by " + c.nodes[0].id})
	}
}

// find has a node notice things.
func (c *cluster) find(i int, found []finding.Finding) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.nodes[i].found = found
}

// owners is called with c.mu held.
func (c *cluster) owners() (o api.Owners, count map[string]int) {
	o = api.Owners{Map: c.maps, Buckets: make([]byte, 1024)}
	count = map[string]int{}
	for _, n := range c.nodes {
		if !n.dead && !n.drained {
			o.Nodes = append(o.Nodes, n.id)
		}
	}
	for b := range o.Buckets {
		best := uint32(0)
		for i, id := range o.Nodes {
			h := uint32(b+1)*2654435761 ^ uint32(id[len(id)-1])*2246822519
			h ^= h >> 15
			h *= 3266489917
			if h ^= h >> 13; h >= best {
				best, o.Buckets[b] = h, byte(i)
			}
		}
		if len(o.Nodes) == 0 {
			o.Buckets[b] = 255
		} else {
			count[o.Nodes[o.Buckets[b]]]++
		}
	}
	return o, count
}

func (n *node) Self() (string, string) { return n.id, n.name }
func (n *node) Health() api.Health     { return api.Health{State: "serving", OK: true} }

func (n *node) Owners() api.Owners {
	n.c.mu.Lock()
	defer n.c.mu.Unlock()
	o, _ := n.c.owners()
	return o
}

func (n *node) Status() api.Status {
	n.c.mu.Lock()
	defer n.c.mu.Unlock()
	_, count := n.c.owners()
	up := time.Since(n.begin).Seconds()
	s := api.Status{
		Cluster: "demo", Name: n.name, Build: "0123456789ab", WireMAC: n.id, CloneMAC: "02:cc:0a:4d:00:0a", VIP: []string{"10.77.0.10", "fd77::10"},
		Datapath: "native", Ingress: "tcx", NIC: "eth0", State: "serving", Agreed: true, Leader: n.c.nodes[0].id, Map: n.c.maps, Policy: "byRandom",
		UptimeSec: up, Drain: api.Drain{Draining: n.drained, Flows: 3}, Findings: n.found, Unwell: []string{},
		Buckets: api.Buckets{Settled: count[n.id], Foreign: 1024 - count[n.id]},
	}
	wave := 20 + 8*math.Sin(up/5)
	share := float64(count[n.id]) / 1024
	if n.frames == nil || up < n.counted {
		n.frames, n.counted = map[string]float64{}, up
	}
	for verdict, rate := range map[string]float64{
		"accept-new": 3 * wave * share, "accept-flow": 900 * share, "drop-foreign": 900 * (1 - share), "answer-neighbor": 0.2, "drop-not-ours": 1, "send": 700 * share,
	} {
		n.frames[verdict] += rate * (up - n.counted)
	}
	n.counted = up
	s.Verdicts = map[string]uint64{}
	for verdict, frames := range n.frames {
		s.Verdicts[verdict] = uint64(frames)
	}
	for _, m := range n.c.nodes {
		if m.dead {
			continue
		}
		member := api.Member{Node: m.id, Name: m.name, Self: m == n, State: "serving", Live: true, Weight: 100, Busy: 0.1 + 0.5*share, Flows: int(wave * 2 * float64(count[m.id]) / 341), Buckets: count[m.id], Map: n.c.maps}
		if m.drained {
			member.State, member.Flows = "draining", 3
		}
		s.Members = append(s.Members, member)
	}
	return s
}

func (n *node) Drain(_ context.Context, o api.Order, who string)  { n.order("drain", o, who) }
func (n *node) Resume(_ context.Context, o api.Order, who string) { n.order("resume", o, who) }

func (n *node) order(verb string, o api.Order, who string) {
	n.c.mu.Lock()
	n.drained = verb == "drain"
	n.c.maps++
	n.orders = append(n.orders, verb+" by "+who+": "+o.Reason)
	n.c.mu.Unlock()
	n.events.Add(api.Event{Time: time.Now(), Node: n.id, Kind: verb, About: n.id, Text: "this node was told to give its share to the others", Why: "by " + who + ": " + o.Reason})
}

func (n *node) Peers() (peers []api.Peer) {
	n.c.mu.Lock()
	defer n.c.mu.Unlock()
	for _, m := range n.c.nodes {
		if m == n {
			continue
		}
		p := api.Peer{Node: m.id, Name: m.name, Addresses: []netip.AddrPort{m.at}}
		if m.dead {
			p.Gone = "3s ago: lost: no beacon for 300ms"
		}
		peers = append(peers, p)
	}
	return peers
}

func (n *node) Events() *api.Record[api.Event] { return n.events }

func (n *node) Boot(context.Context) (api.Boot, error) {
	if n.name == "node3" {
		return api.Boot{}, api.ErrNoBoot
	}
	return api.Boot{Hostname: n.name, Node: n.id, Ready: true,
		Timeline: []api.BootStage{{Stage: "kernel", At: 0.9}, {Stage: "init", At: 1.1}, {Stage: "network", At: 1.6}, {Stage: "engine", At: 2.0}, {Stage: "ready", At: 2.9}},
		Children: []api.BootChild{{Name: "engine", State: "running"}, {Name: "web", State: "running", Restarts: 2}}}, nil
}

// proxy gives a proxy before some of the nodes, in the order in which they are asked.
func (c *cluster) proxy(role api.Role, control bool, nodes ...*node) *local.Proxy {
	c.t.Helper()
	cert, err := c.authority.Issue(role, "tester", time.Now().Add(time.Hour))
	if err != nil {
		c.t.Fatal(err)
	}
	var at []netip.AddrPort
	for _, n := range nodes {
		at = append(at, n.at)
	}
	client := api.NewClient(c.authority.Client(cert), at...)
	c.t.Cleanup(client.Close)
	srv := httptest.NewUnstartedServer(nil)
	p := local.New(client, srv.Listener.Addr().String(), control)
	srv.Config.Handler = p
	srv.Start()
	c.t.Cleanup(func() { srv.CloseClientConnections(); srv.Close() })
	return p
}

func (n *node) ordered() []string {
	n.c.mu.Lock()
	defer n.c.mu.Unlock()
	return slices.Clone(n.orders)
}
