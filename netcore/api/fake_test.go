package api

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"testing"
	"time"

	"clonecluster/config"
	"clonecluster/netcore/capture"
	"clonecluster/netcore/doctor"
	"clonecluster/netcore/finding"
)

var (
	testKey  = config.Key{1, 2, 3}
	otherKey = config.Key{4, 5, 6}
)

// engine is a node of which nothing is real but its API.
type engine struct {
	id, host string
	events   *Record[Event]
	log      *Record[LogLine]
	boot     bool

	mu      sync.Mutex
	drained bool
	orders  []string // who and why
	peers   []Peer
	owner   string // of every bucket
	socket  bool
	bucket  int
	found   []finding.Finding
	after   uint64 // the line after which the log was looked at last
}

func (e *engine) Self() (string, string)  { return e.id, e.host }
func (e *engine) Offered() OfferedBuckets { return OfferedBuckets{Node: e.id} }
func (e *engine) Health() Health          { return Health{State: "serving", OK: !e.isDrained()} }
func (e *engine) Status() Status {
	s := Status{Cluster: "test", Name: e.host, WireMAC: e.id, Drain: Drain{Draining: e.isDrained()}, Map: 1, Findings: e.found}
	s.Members = []Member{{Node: e.id, Name: e.host, Self: true, Live: true, State: "serving"}}
	for _, p := range e.Peers() {
		if p.Gone == "" {
			s.Members = append(s.Members, Member{Node: p.Node, Name: p.Name, Live: true, State: "serving"})
		}
	}
	return s
}
func (e *engine) Drain(_ context.Context, o Order, who string)  { e.order(true, o, who) }
func (e *engine) Resume(_ context.Context, o Order, who string) { e.order(false, o, who) }
func (e *engine) Policy() Policy                                { return Policy{Balance: "even"} }
func (e *engine) SetPolicy(_ context.Context, o PolicyOrder, who string) (Policy, error) {
	if o.Weights["nobody"] != 0 {
		return Policy{}, fmt.Errorf("%w: no node is meant", ErrOrder)
	}
	e.order(false, Order{Reason: o.Reason}, who)
	return Policy{Version: 1, Balance: o.Balance}, nil
}
func (e *engine) Reboot(_ context.Context, o Order, who string) error {
	if !e.boot {
		return ErrNoBoot
	}
	e.order(true, o, who)
	return nil
}
func (e *engine) Events() *Record[Event] { return e.events }

func (e *engine) order(drained bool, o Order, who string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.drained = drained
	e.orders = append(e.orders, who+": "+o.Reason)
}

func (e *engine) Metrics(w io.Writer, accept http.Header) (string, error) {
	fmt.Fprintf(w, "of %s for %s", e.host, accept.Get("Accept"))
	return "text/plain", nil
}

func (e *engine) isDrained() bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.drained
}

func (e *engine) Which(f Flow) (Which, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if f.Client.Addr().Is6() {
		return Which{}, errors.New("no IPv6 here")
	}
	w := Which{Client: f.ClientText(), VIP: "192.0.2.1", Port: f.Port, Protocol: f.Proto, Affinity: "none", Owner: e.owner, Nodes: []WhichNode{}}
	if f.Client.Port() != 0 {
		b := e.bucket
		w.Bucket = &b
		w.Nodes = append(w.Nodes, WhichNode{Node: e.id, Name: e.host, State: "settled", Socket: e.socket})
	}
	return w, nil
}

func (e *engine) Peers() []Peer {
	e.mu.Lock()
	defer e.mu.Unlock()
	return append([]Peer(nil), e.peers...)
}

func (e *engine) setPeers(p ...Peer) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.peers = p
}

func (e *engine) Owners() Owners {
	return Owners{Map: 1, Nodes: []string{e.id}, Buckets: make([]byte, 1024)}
}

func (e *engine) Logs(_ context.Context, after uint64) ([]LogLine, string, uint64, <-chan struct{}, error) {
	lines, lost, more := e.log.After(after)
	e.mu.Lock()
	defer e.mu.Unlock()
	e.after = after
	return lines, e.log.Run(), lost, more, nil
}

func (e *engine) lookedAfter() uint64 {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.after
}

func (e *engine) Examine(burst int, who string) error {
	if burst == doctor.MaxRate {
		return doctor.ErrExamining
	}
	e.order(false, Order{Reason: fmt.Sprint("burst ", burst)}, who)
	return nil
}
func (e *engine) Examination() Examination {
	return Examination{Node: e.id, Checks: []doctor.Check{{Name: "flooding", Verdict: doctor.Good}}}
}

func (e *engine) Capture(ctx context.Context, q capture.Query, w io.Writer, flush func() error) error {
	out, err := capture.NewWriter(w)
	if err != nil {
		return err
	}
	id, err := out.AddInterface(e.host, "", q.Snap)
	for i := 0; err == nil && i < q.Count; i++ {
		err = out.Packet(id, capture.Frame{Time: time.Unix(int64(i), 0), Data: make([]byte, 60), Length: 60, Comment: "accept-new"})
	}
	if q.Count == 0 { // until its end is asked for
		err = errors.Join(err, flush())
		<-ctx.Done()
		return errors.Join(err, out.Statistics(id, time.Now(), 0, 0, capture.EndedEarly+context.Cause(ctx).Error()))
	}
	if q.Count == breaksAfter {
		return errors.Join(errors.New("broken"), flush())
	}
	return errors.Join(err, out.Statistics(id, time.Now(), uint64(q.Count), 0, "complete"), flush())
}

// breaksAfter is the number of frames after which a capture fails.
const breaksAfter = 13

func (e *engine) Boot(context.Context) (Boot, error) {
	if !e.boot {
		return Boot{}, ErrNoBoot
	}
	return Boot{Hostname: e.host}, nil
}

// node is an engine with its server.
type node struct {
	*engine
	server *Server
	at     netip.AddrPort
}

var quiet = slog.New(slog.NewTextHandler(io.Discard, nil))

func authority(t testing.TB, key config.Key, accept ...config.Key) *Authority {
	t.Helper()
	a, err := NewAuthority("test", key, accept...)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// start runs a node on a loopback address.
func start(t testing.TB, id, host string, limits Limits, a *Authority) *node {
	t.Helper()
	n := &node{engine: &engine{id: id, host: host, events: NewEvents(), log: NewLog()}}
	var err error
	if n.server, err = NewServer(a, n, limits, quiet); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	n.at = netip.MustParseAddrPort(l.Addr().String())
	done := make(chan error, 1)
	go func() { done <- n.server.Serve(l) }()
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		n.server.Close(ctx)
		if err := <-done; err != nil {
			t.Errorf("Serve: %v", err)
		}
	})
	return n
}

// startAll runs nodes that know each other.
func startAll(t testing.TB, n int, limits Limits) (nodes []*node) {
	t.Helper()
	for i := range n {
		nodes = append(nodes, start(t, net.HardwareAddr{2, 0, 0, 0, 0, byte(i + 1)}.String(), "node"+string(rune('1'+i)), limits, authority(t, testKey)))
	}
	for _, n := range nodes {
		for _, o := range nodes {
			if o != n {
				n.setPeers(append(n.Peers(), Peer{Node: o.id, Name: o.host, Addresses: []netip.AddrPort{o.at}})...)
			}
		}
	}
	return nodes
}

func issued(t testing.TB, a *Authority, role Role, name string) *tls.Config {
	t.Helper()
	cert, err := a.Issue(role, name, time.Now().Add(time.Hour))
	if err != nil {
		t.Fatal(err)
	}
	return a.Client(cert)
}

// client asks a node as the cluster's operator.
func (n *node) client(t testing.TB, role Role) *Client {
	t.Helper()
	c := NewClient(issued(t, authority(t, testKey), role, "tester"), n.at)
	t.Cleanup(c.Close)
	return c
}

// deaf is where connections are taken, and nothing is said.
func deaf(t testing.TB) []netip.AddrPort {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return []netip.AddrPort{netip.MustParseAddrPort(l.Addr().String())}
}
