package api

import (
	"context"
	"encoding/json"
	"errors"
	"net/url"
	"slices"
	"testing"
	"time"
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

// TestLiveStreams: those who look are as bounded as those who follow something else.
func TestLiveStreams(t *testing.T) {
	n := start(t, "02:00:00:00:00:01", "one", Limits{Streams: 2}, authority(t, testKey))
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
}
