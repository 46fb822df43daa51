package api

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"clonecluster/netcore/doctor"
	"clonecluster/netcore/finding"
)

// signed makes a certificate that the authority would not make.
func signed(t testing.TB, a *Authority, units []string, usage x509.ExtKeyUsage, until time.Time) *tls.Config {
	t.Helper()
	public, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := a.sign(&x509.Certificate{
		Subject:   pkix.Name{Organization: []string{"test"}, OrganizationalUnit: units, CommonName: "tester"},
		NotBefore: always, NotAfter: until, ExtKeyUsage: []x509.ExtKeyUsage{usage},
	}, public, private)
	if err != nil {
		t.Fatal(err)
	}
	return a.Client(cert)
}

// TestAccess: who may do what. Code 0 stands for a connection that is refused.
func TestAccess(t *testing.T) {
	n := start(t, "02:00:00:00:00:01", "one", Limits{NewPerSecond: 1000, PerSource: 100}, authority(t, testKey, otherKey))
	n.boot = true
	ours, next, foreign := authority(t, testKey), authority(t, otherKey), authority(t, [32]byte{9})
	soon := time.Now().Add(time.Hour)
	// Of another authority, but takes this one's nodes: it gets as far as it can.
	withOurPool := func(c *tls.Config) *tls.Config {
		c = c.Clone()
		c.RootCAs = ours.pool
		// A client does not show what the server does not ask for.
		cert := c.Certificates[0]
		c.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &cert, nil }
		return c
	}
	selfMade := authority(t, [32]byte{10})
	selfMade.cluster = "test"
	for _, tt := range []struct {
		name                    string
		conf                    *tls.Config
		health, look, do, other int
	}{
		{"none", &tls.Config{RootCAs: ours.pool, ServerName: "test", MinVersion: tls.VersionTLS13}, 200, 401, 401, 401},
		{"control", issued(t, ours, RoleControl, "tester"), 200, 200, 200, 404},
		{"read-only", issued(t, ours, RoleReadOnly, "tester"), 200, 200, 403, 404},
		{"of a key that is accepted, too", withOurPool(issued(t, next, RoleControl, "tester")), 200, 200, 200, 404},
		{"of another cluster", withOurPool(issued(t, foreign, RoleControl, "tester")), 0, 0, 0, 0},
		{"of an authority with the same name", withOurPool(issued(t, selfMade, RoleControl, "tester")), 0, 0, 0, 0},
		{"expired", signed(t, ours, []string{"control"}, x509.ExtKeyUsageClientAuth, time.Now().Add(-time.Minute)), 0, 0, 0, 0},
		{"for servers alone", signed(t, ours, []string{"control"}, x509.ExtKeyUsageServerAuth, soon), 0, 0, 0, 0},
		{"without a role", signed(t, ours, nil, x509.ExtKeyUsageClientAuth, soon), 200, 401, 401, 401},
		{"with a role that is none", signed(t, ours, []string{"root"}, x509.ExtKeyUsageClientAuth, soon), 200, 401, 401, 401},
		{"with two roles", signed(t, ours, []string{"control", "read-only"}, x509.ExtKeyUsageClientAuth, soon), 200, 401, 401, 401},
		{"TLS 1.2", func() *tls.Config {
			c := issued(t, ours, RoleControl, "tester")
			c.MinVersion, c.MaxVersion = tls.VersionTLS12, tls.VersionTLS12
			return c
		}(), 0, 0, 0, 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := NewClient(tt.conf, n.at)
			defer c.Close()
			code := func(method, path string) int {
				t.Helper()
				resp, err := c.raw(t.Context(), method, path, nil, nil, nil)
				if err != nil {
					return 0
				}
				defer resp.Body.Close()
				if resp.StatusCode/100 != 2 {
					var p Problem
					if json.NewDecoder(resp.Body).Decode(&p) != nil || p.Error == "" {
						t.Errorf("%s %s: %s without a reason", method, path, resp.Status)
					}
				}
				return resp.StatusCode
			}
			if got := code("GET", "/v1/health"); got != tt.health {
				t.Errorf("GET /v1/health: %d; want %d", got, tt.health)
			}
			if got := code("GET", "/v1/nothing"); got != tt.other {
				t.Errorf("GET /v1/nothing: %d; want %d", got, tt.other)
			}
			for _, r := range Routes {
				path := r.Path
				if r.Name == "which" {
					path += "?client=192.0.2.9&port=80"
				}
				u, _ := url.Parse(path)
				var body []byte
				if r.Name == "setPolicy" {
					body = []byte(`{"balance":"load"}`)
				}
				before := len(n.orders)
				resp, err := c.raw(t.Context(), r.Method, u.Path, u.Query(), body, nil)
				got := 0
				if err == nil {
					got = resp.StatusCode
					resp.Body.Close()
				}
				want := map[Role]int{"": tt.health, RoleReadOnly: tt.look, RoleControl: tt.do}[r.Role]
				if r.Name == "health" { // the node may be drained by now
					continue
				}
				if got != want {
					t.Errorf("%s %s: %d; want %d", r.Method, r.Path, got, want)
				}
				if done := len(n.orders) > before; done != (r.Role == RoleControl && r.Method == http.MethodPost && want == 200) {
					t.Errorf("%s %s answered %d, and the node did as it was told: %v", r.Method, r.Path, got, done)
				}
				_ = n.isDrained()
				n.order(false, Order{}, "test")
				n.orders = nil
			}
		})
	}
}

// TestServerIsChecked: a client takes no stranger for a node, not even one with a
// client's certificate of this cluster, and no node for another.
func TestServerIsChecked(t *testing.T) {
	ours := authority(t, testKey)
	for _, tt := range []struct {
		name string
		conf *tls.Config
		want error
	}{
		{"client's certificate", func() *tls.Config {
			cert, err := ours.Issue(RoleControl, "tester", time.Now().Add(time.Hour))
			if err != nil {
				t.Fatal(err)
			}
			return &tls.Config{Certificates: []tls.Certificate{cert}}
		}(), nil},
		{"another cluster's node", func() *tls.Config {
			id, err := newIdentity(authority(t, otherKey))
			if err != nil {
				t.Fatal(err)
			}
			return id.server(func() (string, string) { return "02:00:00:00:00:01", "" })
		}(), nil},
	} {
		l, err := tls.Listen("tcp", "127.0.0.1:0", tt.conf)
		if err != nil {
			t.Fatal(err)
		}
		go http.Serve(l, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.Write([]byte("{}")) }))
		c := NewClient(issued(t, ours, RoleControl, "tester"), netip.MustParseAddrPort(l.Addr().String()))
		var s Status
		if err := c.Get(t.Context(), "/v1/status", nil, &s); err == nil || !strings.Contains(err.Error(), "no node of this cluster") {
			t.Errorf("%s: %v; want that it is no node of this cluster", tt.name, err)
		}
		l.Close()
	}
	n := start(t, "02:00:00:00:00:01", "one", Limits{}, ours)
	c := NewClient(ofNode(issued(t, ours, RoleControl, "tester"), "02:00:00:00:00:02"), n.at)
	var s Status
	if err := c.Get(t.Context(), "/v1/status", nil, &s); !errors.Is(err, ErrOtherNode) {
		t.Errorf("a node taken for another: %v; want ErrOtherNode", err)
	}
}

// TestCertificateNames: who knows nothing of clusters, such as curl, can check the
// address or the name that it asked.
func TestCertificateNames(t *testing.T) {
	ours := authority(t, testKey)
	n := start(t, "02:00:00:00:00:01", "one", Limits{}, ours)
	for name, want := range map[string]bool{"127.0.0.1": true, "test": true, "one": true, "127.0.0.2": false, "two": false} {
		conf := issued(t, ours, RoleReadOnly, "tester")
		conf.ServerName = name
		conn, err := tls.Dial("tcp", n.at.String(), conf)
		if (err == nil) != want {
			t.Errorf("asked as %s: %v", name, err)
		}
		if err == nil {
			conn.Close()
		}
	}
	if a, b := authority(t, testKey), authority(t, testKey); !a.cert.Equal(b.cert) {
		t.Error("one key gives two authorities")
	}
}

// TestExpiryOfAConnection: a certificate ends for who is connected, too.
func TestExpiryOfAConnection(t *testing.T) {
	ours := authority(t, testKey)
	n := start(t, "02:00:00:00:00:01", "one", Limits{}, ours)
	until := time.Now().Add(2 * time.Second).Truncate(time.Second)
	cert, err := ours.Issue(RoleControl, "tester", until)
	if err != nil {
		t.Fatal(err)
	}
	c := NewClient(ours.Client(cert), n.at)
	defer c.Close()
	var s Status
	if err := c.Get(t.Context(), "/v1/status", nil, &s); err != nil {
		t.Fatal(err)
	}
	time.Sleep(time.Until(until) + 20*time.Millisecond)
	var e *Error
	if err := c.Post(t.Context(), "/v1/drain", nil, Order{}, &s); !errors.As(err, &e) || e.Code != 401 || n.isDrained() {
		t.Errorf("after its end: %v, drained: %v; want 401", err, n.isDrained())
	}
}

func TestCluster(t *testing.T) {
	nodes := startAll(t, 3, Limits{Ask: 300 * time.Millisecond})
	// One that takes connections and says nothing, one that is not reached at all,
	// one that has gone, and one in whose place another answers.
	nodes[0].setPeers(append(nodes[0].Peers(),
		Peer{Node: "02:00:00:00:00:0a", Addresses: deaf(t)},
		Peer{Node: "02:00:00:00:00:0b"},
		Peer{Node: "02:00:00:00:00:0c", Gone: "12s ago: lost"},
		Peer{Node: "02:00:00:00:00:0d", Addresses: []netip.AddrPort{nodes[1].at}})...)
	begin := time.Now()
	var c Cluster
	if err := nodes[0].client(t, RoleReadOnly).Get(t.Context(), "/v1/cluster", nil, &c); err != nil {
		t.Fatal(err)
	}
	if took := time.Since(begin); took > 2*time.Second {
		t.Errorf("it took %v; want little more than what a node may take", took)
	}
	if len(c.Nodes) != 7 || c.Asked != nodes[0].id || c.Cluster != "test" {
		t.Fatalf("the cluster is %+v; want seven nodes", c)
	}
	for i, n := range c.Nodes {
		if i < 3 && (n.Status == nil || n.Status.WireMAC != nodes[i].id || n.Error != "") {
			t.Errorf("node %d is %+v; want its status", i, n)
		}
		if i >= 3 && (n.Status != nil || n.Error == "" || n.Gone != (i == 5)) {
			t.Errorf("node %d is %+v; want an error alone", i, n)
		}
	}
}

func TestFindings(t *testing.T) {
	nodes := startAll(t, 2, Limits{Ask: 300 * time.Millisecond})
	nodes[0].found = []finding.Finding{{Code: "loop", Level: finding.Critical, Node: nodes[0].id}, {Code: "mixed-programs", Node: nodes[0].id}}
	nodes[1].found = []finding.Finding{{Code: "loop", Level: finding.Critical, Node: nodes[1].id}, {Code: "fenced", Level: finding.Critical, Node: nodes[1].id}}
	nodes[0].setPeers(append(nodes[0].Peers(), Peer{Node: "02:00:00:00:00:0b"}, Peer{Node: "02:00:00:00:00:0c", Gone: "12s ago: lost"})...)
	var f Findings
	if err := nodes[0].client(t, RoleReadOnly).Get(t.Context(), "/v1/findings", nil, &f); err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, x := range f.Findings {
		got = append(got, x.Code+" "+x.Node[15:])
	}
	if want := []string{"fenced 02", "loop 01", "loop 02", "mixed-programs 01"}; !slices.Equal(got, want) {
		t.Errorf("findings %v; want %v", got, want)
	}
	if len(f.Silent) != 1 || f.Silent[0].Node != "02:00:00:00:00:0b" || f.Silent[0].Error == "" {
		t.Errorf("silent: %+v; want the one node that does not answer", f.Silent)
	}
}

// TestExamine: who may only look may look, and who controls has another node examine.
func TestExamine(t *testing.T) {
	nodes := startAll(t, 2, Limits{})
	look, control := nodes[0].client(t, RoleReadOnly), nodes[0].client(t, RoleControl)
	other := url.Values{"node": {nodes[1].id}, "burst": {"500"}}
	var e Examination
	if err := look.Get(t.Context(), "/v1/doctor", url.Values{"node": {nodes[1].id}}, &e); err != nil || e.Node != nodes[1].id || len(e.Checks) != 1 {
		t.Errorf("looking: %+v, %v", e, err)
	}
	var refused *Error
	if err := look.Post(t.Context(), "/v1/doctor", other, nil, &e); !errors.As(err, &refused) || refused.Code != http.StatusForbidden {
		t.Errorf("who may only look orders an examination: %v; want 403", err)
	}
	if err := control.Post(t.Context(), "/v1/doctor", url.Values{"burst": {"7"}}, nil, &e); !errors.As(err, &refused) || refused.Code != http.StatusBadRequest {
		t.Errorf("a burst of 7: %v; want 400", err)
	}
	other.Set("burst", strconv.Itoa(doctor.MaxRate))
	if err := control.Post(t.Context(), "/v1/doctor", other, nil, &e); !errors.As(err, &refused) || refused.Code != http.StatusConflict {
		t.Errorf("a burst while the network is examined: %v; want 409", err)
	}
	other.Set("burst", "500")
	if len(nodes[1].orders) != 0 {
		t.Errorf("what was refused was done: %v", nodes[1].orders)
	}
	if err := control.Post(t.Context(), "/v1/doctor", other, nil, &e); err != nil || e.Node != nodes[1].id {
		t.Errorf("%+v, %v", e, err)
	}
	if len(nodes[1].orders) != 1 || !strings.HasSuffix(nodes[1].orders[0], "burst 500") || len(nodes[0].orders) != 0 {
		t.Errorf("orders %v and %v; want one burst of 500 at the second node", nodes[0].orders, nodes[1].orders)
	}
}

// TestMetricsPage: what a backend writes goes out as it is, also by way of another
// node, in the format that was asked for; and answers are counted.
func TestMetricsPage(t *testing.T) {
	var mu sync.Mutex
	asked := map[string]int{}
	nodes := startAll(t, 2, Limits{Asked: func(route string, code int) {
		mu.Lock()
		defer mu.Unlock()
		asked[fmt.Sprint(route, " ", code)]++
	}})
	c := nodes[0].client(t, RoleReadOnly)
	for _, name := range []string{"node1", "node2"} {
		resp, err := c.raw(t.Context(), "GET", "/metrics", url.Values{"node": {name}}, nil, http.Header{"Accept": {"text/x"}})
		if err != nil {
			t.Fatal(err)
		}
		page, _ := io.ReadAll(resp.Body)
		resp.Body.Close()
		if string(page) != "of "+name+" for text/x" || resp.Header.Get("Content-Type") != "text/plain" {
			t.Errorf("%s: %s, %q", name, resp.Header.Get("Content-Type"), page)
		}
	}
	_ = c.Post(t.Context(), "/v1/drain", nil, Order{}, nil)
	c.Close()
	mu.Lock()
	defer mu.Unlock()
	// One by way of the other counts at both.
	if want := map[string]int{"metrics 200": 3, "none 403": 1}; !maps.Equal(asked, want) {
		t.Errorf("counted %v; want %v", asked, want)
	}
}

func TestForward(t *testing.T) {
	nodes := startAll(t, 3, Limits{})
	var s Status
	control := nodes[0].client(t, RoleControl)
	for _, name := range []string{"node2", "NODE2", nodes[1].id, "00:02"} {
		if err := control.Post(t.Context(), "/v1/drain", url.Values{"node": {name}}, Order{Reason: "new disk"}, &s); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if s.WireMAC != nodes[1].id || !s.Drain.Draining || !nodes[1].isDrained() || nodes[0].isDrained() {
			t.Errorf("%s: %+v; want that node2 drains", name, s)
		}
		nodes[1].order(false, Order{}, "")
	}
	if want := "tester by way of " + nodes[0].id + ": new disk"; nodes[1].orders[0] != want {
		t.Errorf("the order was %q; want %q", nodes[1].orders[0], want)
	}
	for _, tt := range []struct {
		role Role
		node string
		code int
		says string
	}{
		{RoleReadOnly, "node2", 403, "needs control"},
		{RoleControl, "node9", 404, "no node is meant"},
		{RoleControl, "00", 404, "no node is meant"},
		{RoleControl, "", 200, ""},
		{RoleControl, strings.Repeat("x", 3000), 404, "no node"},
	} {
		err := nodes[0].client(t, tt.role).Post(t.Context(), "/v1/drain", url.Values{"node": {tt.node}}, Order{}, &s)
		var e *Error
		if tt.code != 200 && (!errors.As(err, &e) || e.Code != tt.code || !strings.Contains(e.Text, tt.says) || len(e.Text) > 300) || tt.code == 200 && err != nil {
			t.Errorf("node %.20q as %s: %v; want %d, %q", tt.node, tt.role, err, tt.code, tt.says)
		}
	}
	// What nodes think of each other may be wrong, but no request goes on and on.
	nodes[1].setPeers()
	nodes[2].setPeers()
	nodes[0].setPeers(Peer{Node: "02:00:00:00:00:09", Name: "node2", Addresses: []netip.AddrPort{nodes[2].at}})
	var e *Error
	if err := control.Get(t.Context(), "/v1/status", url.Values{"node": {"node2"}}, &s); !errors.As(err, &e) || e.Code != 502 {
		t.Errorf("another node in its place: %v; want 502", err)
	}
	conf, err := nodes[1].server.identity.client(nodes[1].id, "", RoleNode)
	if err != nil {
		t.Fatal(err)
	}
	asNode := NewClient(conf, nodes[0].at)
	if err := asNode.Get(t.Context(), "/v1/status", url.Values{"node": {"node2"}}, &s); !errors.As(err, &e) || e.Code != 404 {
		t.Errorf("a node that asks for a third: %v; want 404", err)
	}
}

func TestWhich(t *testing.T) {
	nodes := startAll(t, 3, Limits{Ask: 300 * time.Millisecond})
	for _, n := range nodes {
		n.owner, n.bucket = nodes[1].id, 77
	}
	nodes[2].socket = true
	c := nodes[0].client(t, RoleReadOnly)
	var w Which
	ask := func(query string) error {
		w = Which{}
		q, _ := url.ParseQuery(query)
		return c.Get(t.Context(), "/v1/which", q, &w)
	}
	if err := ask("client=192.0.2.9:4000&port=80"); err != nil {
		t.Fatal(err)
	}
	if w.Owner != nodes[1].id || w.Holder != nodes[2].id || len(w.Nodes) != 3 || *w.Bucket != 77 || !strings.Contains(w.Why, "with node3") {
		t.Errorf("which: %+v; want node2, and node3 for the connection", w)
	}
	nodes[1].bucket = 78
	if err := ask("client=192.0.2.9:4000&port=80"); err != nil || !strings.Contains(w.Why, "other rules") {
		t.Errorf("which: %v, %q; want that one goes by other rules", err, w.Why)
	}
	if err := ask("client=192.0.2.9&port=80"); err != nil || w.Bucket != nil || len(w.Nodes) != 0 || !strings.Contains(w.Why, "give the port") {
		t.Errorf("which: %v, %+v; want that the port is needed", err, w)
	}
	for _, query := range []string{"", "client=192.0.2.9", "client=x&port=80", "client=192.0.2.9&port=0", "client=192.0.2.9&port=80&proto=icmp", "client=2001:db8::1&port=80"} {
		var e *Error
		if err := ask(query); !errors.As(err, &e) || e.Code != 400 {
			t.Errorf("which?%s: %v; want 400", query, err)
		}
	}
}

func TestEvents(t *testing.T) {
	nodes := startAll(t, 2, Limits{})
	n := nodes[1]
	add := func(text string, at time.Time) { n.events.Add(Event{Time: at, Kind: "state", Text: text}) }
	now := time.Now()
	add("one", now.Add(-time.Hour))
	add("two", now.Add(-time.Minute))
	add("three", now)
	c := nodes[0].client(t, RoleReadOnly) // by way of the other node
	for since, want := range map[string]string{
		"": "one two three", "0": "one two three", "2": "three", "3": "", "10m": "two three", now.Add(-30 * time.Second).Format(time.RFC3339Nano): "three",
	} {
		var got Events
		q := url.Values{"node": {"node2"}}
		if since != "" {
			q.Set("since", since)
		}
		if err := c.Get(t.Context(), "/v1/events", q, &got); err != nil {
			t.Fatalf("since %q: %v", since, err)
		}
		var texts []string
		for _, e := range got.Events {
			texts = append(texts, e.Text)
		}
		if s := strings.Join(texts, " "); s != want || got.Lost != 0 || got.Run != n.events.Run() {
			t.Errorf("since %q: %q, %d lost; want %q", since, s, got.Lost, want)
		}
	}
	var e *Error
	var got Events
	if err := c.Get(t.Context(), "/v1/events", url.Values{"since": {"yesterday"}}, &got); !errors.As(err, &e) || e.Code != 400 {
		t.Errorf("since yesterday: %v; want 400", err)
	}

	for _, tt := range []struct {
		name   string
		header http.Header
		query  url.Values
		want   []string
	}{
		{"accept", http.Header{"Accept": {"text/event-stream"}}, url.Values{"since": {"2"}}, []string{"three", "four"}},
		{"follow", nil, url.Values{"follow": {"1"}, "since": {"2"}}, []string{"three", "four"}},
		{"last id", http.Header{"Accept": {"text/event-stream"}, "Last-Event-Id": {n.events.Run() + ".1"}}, nil, []string{"two", "three", "four"}},
		{"last id of another run", http.Header{"Accept": {"text/event-stream"}, "Last-Event-Id": {"0123.3"}}, nil, []string{"one", "two", "three", "four"}},
	} {
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		if tt.query == nil {
			tt.query = url.Values{}
		}
		tt.query.Set("node", "node2")
		resp, err := c.raw(ctx, "GET", "/v1/events", tt.query, nil, tt.header)
		if err != nil {
			t.Fatalf("%s: %v", tt.name, err)
		}
		if ct := resp.Header.Get("Content-Type"); ct != "text/event-stream" {
			t.Errorf("%s: it is %q", tt.name, ct)
		}
		var texts []string
		stop := errors.New("enough")
		err = readEvents(resp.Body, func(data []byte) error {
			var e Event
			if err := json.Unmarshal(data, &e); err != nil {
				return err
			}
			if texts = append(texts, e.Text); len(texts) == len(tt.want)-1 {
				add("four", time.Now()) // while somebody follows
			}
			if len(texts) == len(tt.want) {
				return stop
			}
			return nil
		}, nil)
		if !errors.Is(err, stop) || !slices.Equal(texts, tt.want) {
			t.Errorf("%s: %q, %v; want %q", tt.name, texts, err, tt.want)
		}
		resp.Body.Close()
		cancel()
		// As it was.
		n.events.mu.Lock()
		n.events.ring, n.events.next = n.events.ring[:3], 4
		n.events.mu.Unlock()
	}
}

// TestFollowLost: who follows is told of what is lost, if it was to come, and what is not
// wanted is looked at once.
func TestFollowLost(t *testing.T) {
	for _, tt := range []struct {
		since string
		lost  uint64
	}{{"", 0}, {"0", 0}, {"1h", 0}, {"2", 100}, {fmt.Sprint(mostLines), 0}} {
		n := start(t, "02:00:00:00:00:01", "one", Limits{}, authority(t, testKey))
		add := func(source string) { n.log.Add(LogLine{Time: time.Now(), Source: source, Text: source}) }
		const last = 1 + mostLines + 100 + 1
		add("engine")
		for range mostLines + 100 {
			add("web")
		}
		add("engine")
		var lost uint64
		c := n.client(t, RoleReadOnly)
		c.Lost = func(n uint64) { lost += n }
		enough := errors.New("enough")
		ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
		err := c.Follow(ctx, "/v1/logs", url.Values{"since": {tt.since}, "source": {"engine"}}, func([]byte) error {
			for ctx.Err() == nil && n.lookedAfter() <= last {
				add("web")
				time.Sleep(10 * time.Millisecond)
			}
			if n.lookedAfter() <= last {
				return fmt.Errorf("it looks again and again at what came after line %d", n.lookedAfter())
			}
			return enough
		})
		cancel()
		if !errors.Is(err, enough) || lost != tt.lost {
			t.Errorf("since %q: %d lost, %v; want %d", tt.since, lost, err, tt.lost)
		}
	}
}

// TestFollowEnds: those who follow do not keep a server from ending, and a client
// learns that it has ended.
func TestFollowEnds(t *testing.T) {
	n := start(t, "02:00:00:00:00:01", "one", Limits{}, authority(t, testKey))
	n.log.Add(LogLine{Time: time.Now(), Source: "engine", Text: "hello"})
	c := n.client(t, RoleReadOnly)
	got := make(chan string, 1)
	ended := make(chan error, 1)
	go func() {
		ended <- c.Follow(context.Background(), "/v1/logs", url.Values{"source": {"engine"}}, func(data []byte) error {
			got <- string(data)
			return nil
		})
	}()
	if line := <-got; !strings.Contains(line, "hello") {
		t.Errorf("the line is %s", line)
	}
	begin := time.Now()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	n.server.Close(ctx)
	if took := time.Since(begin); took > 2*time.Second {
		t.Errorf("ending took %v", took)
	}
	if err := <-ended; err == nil {
		t.Error("the client did not notice")
	}
}

// TestCaptureEnds: one that fails does not look whole, also by way of another node, and
// one that ends with the engine says so.
func TestCaptureEnds(t *testing.T) {
	nodes := startAll(t, 2, Limits{})
	c := nodes[0].client(t, RoleControl)
	for _, tt := range []struct {
		name  string
		count int
		fails bool
	}{{"node1", 3, false}, {"node2", 3, false}, {"node1", breaksAfter, true}, {"node2", breaksAfter, true}} {
		body, err := c.Stream(t.Context(), "/v1/capture", url.Values{"node": {tt.name}, "count": {fmt.Sprint(tt.count)}})
		if err != nil {
			t.Fatal(err)
		}
		got, err := io.ReadAll(body)
		if body.Close(); (err != nil) != tt.fails || len(got) < 100 {
			t.Errorf("%d frames of %s: %d bytes, %v; want an error: %v", tt.count, tt.name, len(got), err, tt.fails)
		}
	}
	body, err := c.Stream(t.Context(), "/v1/capture", nil)
	if err != nil {
		t.Fatal(err)
	}
	defer body.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	go nodes[0].server.Close(ctx)
	if got, err := io.ReadAll(body); err != nil || !strings.Contains(string(got), "ended early: this node's engine ends") {
		t.Errorf("when the engine ends: %q, %v", got, err)
	}
}

func TestOrders(t *testing.T) {
	n := start(t, "02:00:00:00:00:01", "one", Limits{}, authority(t, testKey))
	c := n.client(t, RoleControl)
	for _, tt := range []struct {
		body string
		code int
	}{
		{"", 200}, {"{}", 200}, {`{"reason":"x"}`, 200}, {`{"reason":"` + strings.Repeat("ä", 200) + `"}`, 200},
		{`{"reason":"` + strings.Repeat("ä", 201) + `"}`, 400}, {`{"reason":"a\nb"}`, 400}, {`{"reasons":"x"}`, 400}, {`{"reason":1}`, 400},
		{"{} {}", 400}, {"[", 400}, {"null", 200}, {"0", 400},
		{`{"reason":"` + strings.Repeat("x", mostBody) + `"}`, 413},
	} {
		n.orders = nil
		resp, err := c.raw(t.Context(), "POST", "/v1/drain", nil, []byte(tt.body), nil)
		if err != nil {
			t.Fatalf("%.40s: %v", tt.body, err)
		}
		resp.Body.Close()
		if resp.StatusCode != tt.code || len(n.orders) != map[bool]int{true: 1}[tt.code == 200] {
			t.Errorf("%.40s: %d, orders %q; want %d", tt.body, resp.StatusCode, n.orders, tt.code)
		}
	}
}

func TestParsePolicyOrder(t *testing.T) {
	for body, ok := range map[string]bool{
		`{"balance":"even"}`: true, `{"balance":"configured","reason":"x"}`: true, `{"weights":{"web-1":1000,"web-2":0}}`: true,
		``: false, `{}`: false, `{"balance":"fast"}`: false, `{"weights":{"a":1001}}`: false, `{"weights":{"a":-1}}`: false,
		`{"balance":"even","affinity":"client"}`: false, `{"balance":"even"}{}`: false, `{"balance":"even","reason":"\u001b"}`: false,
	} {
		if _, err := ParsePolicyOrder(strings.NewReader(body)); (err == nil) != ok || err != nil && !errors.Is(err, ErrOrder) {
			t.Errorf("%s: %v", body, err)
		}
	}
}
