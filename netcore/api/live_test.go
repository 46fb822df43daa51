package api

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"testing"
	"time"

	"clonecluster/netcore/dashboard"
)

// lookOn follows a node's live messages until enough says that it has seen enough.
func lookOn(t *testing.T, n *node, enough func(Live) bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 15*time.Second)
	defer cancel()
	done := errors.New("enough")
	var last string
	err := n.client(t, RoleReadOnly).Follow(ctx, "/v1/live", nil, func(data []byte) error {
		var l Live
		last = string(data)
		if err := json.Unmarshal(data, &l); err != nil {
			return err
		}
		if enough(l) {
			return done
		}
		return nil
	})
	if !errors.Is(err, done) {
		t.Fatalf("%v; the last message was %s", err, last)
	}
}

// TestLive: one node tells of all: their status, map, boots and events, each once, and
// of a new event at once.
func TestLive(t *testing.T) {
	nodes := startAll(t, 3, Limits{})
	nodes[1].boot = true
	nodes[2].events.Add(Event{Time: time.Now(), Node: nodes[2].id, Kind: "drain", Text: "on the third"})
	said, boots, owners, events, looks := map[string]int{}, 0, 0, []string{}, 0
	begin := time.Now()
	var added time.Time
	lookOn(t, nodes[0], func(l Live) bool {
		looks++
		if l.Asked != nodes[0].id || l.Role != RoleReadOnly || l.Cluster != "test" {
			t.Errorf("asked %s, role %s, cluster %s", l.Asked, l.Role, l.Cluster)
		}
		for _, n := range l.Nodes {
			if n.Said != nil {
				said[n.Node]++
			}
			if n.Boot != nil {
				boots++
			}
		}
		if l.Owners != nil {
			owners++
		}
		for _, e := range l.Events {
			events = append(events, e.Text)
		}
		if added.IsZero() && len(said) == 3 && len(events) > 0 {
			added = time.Now()
			nodes[0].events.Add(Event{Time: added, Node: nodes[0].id, Kind: "lost", Text: "at once"})
		}
		if len(events) > 1 && time.Since(begin) < 3*time.Second {
			if took := time.Since(added); events[1] == "at once" && took > liveInterval && !testing.Short() {
				t.Logf("an event was told after %v", took)
			}
			return false
		}
		return len(events) > 1
	})
	if !slices.Equal(events, []string{"on the third", "at once"}) || owners != 1 || boots == 0 {
		t.Errorf("events %q, %d maps, %d boots; want each once", events, owners, boots)
	}
	// The node itself with every message, the others once in a second.
	if most := int(time.Since(begin)/liveAsk) + 2; said[nodes[0].id] != looks || said[nodes[1].id] > most || said[nodes[1].id] == 0 {
		t.Errorf("in %d messages and %v the nodes said %v", looks, time.Since(begin), said)
	}
	if looks > int(time.Since(begin)/liveInterval)+5 {
		t.Errorf("%d messages in %v", looks, time.Since(begin))
	}
	// Nobody looks any more: nobody is asked.
	for deadline := time.Now().Add(5 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		nodes[0].server.watchMu.Lock()
		watching := nodes[0].server.watching
		nodes[0].server.watchMu.Unlock()
		if watching == nil {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("it is still watched, and nobody looks")
		}
	}
}

// TestLiveOnce: without following there is one message with everything.
func TestLiveOnce(t *testing.T) {
	nodes := startAll(t, 3, Limits{})
	nodes[0].events.Add(Event{Time: time.Now(), Node: nodes[0].id, Kind: "started", Text: "here"})
	var l Live
	if err := nodes[0].client(t, RoleControl).Get(t.Context(), "/v1/live", nil, &l); err != nil {
		t.Fatal(err)
	}
	said := 0
	for _, n := range l.Nodes {
		if n.Said != nil && n.Said.Name == n.Name {
			said++
		}
	}
	if said != 3 || l.Owners == nil || len(l.Owners.Buckets) != 1024 || len(l.Events) != 1 || l.Role != RoleControl {
		t.Errorf("%d of 3 nodes said something, owners %v, %d events, role %s", said, l.Owners != nil, len(l.Events), l.Role)
	}
}

// TestLiveSilentNode: a node that does not answer is told of, and holds nobody up.
func TestLiveSilentNode(t *testing.T) {
	nodes := startAll(t, 3, Limits{})
	silent := deaf(t)
	nodes[0].mu.Lock()
	nodes[0].peers[1].Addresses = silent
	nodes[0].mu.Unlock()
	begin, looks := time.Now(), 0
	lookOn(t, nodes[0], func(l Live) bool {
		looks++
		for _, n := range l.Nodes {
			if n.Node == nodes[2].id && n.Error != "" {
				return true
			}
		}
		return false
	})
	if took := time.Since(begin); looks < 3 || took < time.Second {
		t.Errorf("%d messages within %v, while a node did not answer", looks, took)
	}
}

// TestLiveOnceSilentNodes: nor does it hold up who does not follow, however many there
// are.
func TestLiveOnceSilentNodes(t *testing.T) {
	for _, silent := range []int{1, askedAtOnce + 8} {
		nodes := startAll(t, 2, Limits{})
		nodes[0].mu.Lock()
		for i := range silent {
			nodes[0].peers = append(nodes[0].peers, Peer{Node: fmt.Sprintf("02:00:00:00:01:%02x", i), Addresses: deaf(t)})
		}
		nodes[0].mu.Unlock()
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		begin := time.Now()
		var l Live
		if err := nodes[0].client(t, RoleReadOnly).Get(ctx, "/v1/live", nil, &l); err != nil {
			t.Errorf("with %d that say nothing: %v", silent, err)
			continue
		}
		said, failed := 0, 0
		for _, n := range l.Nodes {
			if n.Said != nil {
				said++
			}
			if n.Error != "" {
				failed++
			}
		}
		if took := time.Since(begin); said != 2 || failed != min(silent, askedAtOnce-1) && failed != min(silent, askedAtOnce) || took > nodes[0].server.limits.Ask+2*time.Second {
			t.Errorf("with %d that say nothing, after %v: %d said something, %d did not answer", silent, took, said, failed)
		}
	}
}

// TestLiveStreams: those who look are as bounded as those who follow something else.
func TestLiveStreams(t *testing.T) {
	n := start(t, "02:00:00:00:00:01", "one", Limits{Streams: 4}, authority(t, testKey))
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var codes []int
	for range 3 {
		resp, err := n.client(t, RoleReadOnly).raw(ctx, "GET", "/v1/live", url.Values{"follow": {"1"}}, nil, nil)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		codes = append(codes, resp.StatusCode)
	}
	if !slices.Equal(codes, []int{200, 200, 503}) {
		t.Errorf("three who look: %v; want 200, 200, 503", codes)
	}
	once := func() int {
		resp, err := n.client(t, RoleReadOnly).raw(t.Context(), "GET", "/v1/live", nil, nil, nil)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		return resp.StatusCode
	}
	if code := once(); code != 503 {
		t.Errorf("one more who looks once: %d; want 503", code)
	}
	cancel()
	for deadline := time.Now().Add(5 * time.Second); n.streams() > 0; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the places are not free again")
		}
	}
	for range 3 {
		if code := once(); code != 200 {
			t.Errorf("one after the other, who look once: %d; want 200", code)
		}
	}
}

// streams is how many are followed now.
func (n *node) streams() int {
	n.server.door.mu.Lock()
	defer n.server.door.mu.Unlock()
	return n.server.door.clients.streams
}

// TestPage: a node gives the dashboard to those with a certificate, and takes no
// orders from a page of somebody else's.
func TestPage(t *testing.T) {
	n := start(t, "02:00:00:00:00:01", "one", Limits{}, authority(t, testKey))
	stranger := NewClient(&tls.Config{RootCAs: authority(t, testKey).pool, ServerName: "test", MinVersion: tls.VersionTLS13}, n.at)
	defer stranger.Close()
	ask := func(c *Client, method, path string, header http.Header) *http.Response {
		t.Helper()
		resp, err := c.raw(t.Context(), method, path, nil, nil, header)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { resp.Body.Close() })
		return resp
	}
	for _, path := range append(dashboard.Paths(), "/") {
		if resp := ask(stranger, "GET", path, nil); resp.StatusCode != 401 {
			t.Errorf("%s without a certificate: %s; want 401", path, resp.Status)
		}
		resp := ask(n.client(t, RoleReadOnly), "GET", path, nil)
		if resp.StatusCode != 200 || resp.Header.Get("Content-Security-Policy") != dashboard.Policy || resp.Header.Get("Content-Type") == "" {
			t.Errorf("%s: %s, %v", path, resp.Status, resp.Header)
		}
	}
	for name, header := range map[string]http.Header{
		"another site's": {"Sec-Fetch-Site": {"cross-site"}}, "of an old browser, another site's": {"Origin": {"https://evil.example"}},
	} {
		if resp := ask(n.client(t, RoleControl), "POST", "/v1/drain", header); resp.StatusCode != 403 || n.isDrained() {
			t.Errorf("an order on a page, %s: %s, drained %v; want 403", name, resp.Status, n.isDrained())
		}
	}
}
