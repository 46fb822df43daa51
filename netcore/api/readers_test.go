package api

import (
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// askFrom asks a node from one of the loopback addresses.
func askFrom(t testing.TB, n *node, conf *tls.Config, source string) *Client {
	c := NewClient(conf, n.at)
	c.Dial = (&net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(source)}}).DialContext
	t.Cleanup(c.Close)
	return c
}

// besiege has one read-only certificate hold and ask whatever it can at a node, from
// five addresses, until the test ends. It gives the count of the answers by code.
func besiege(t *testing.T, n *node, conf *tls.Config) *[600]atomic.Int64 {
	ctx, cancel := context.WithCancel(context.Background())
	var all sync.WaitGroup
	t.Cleanup(func() { cancel(); all.Wait() })
	var codes [600]atomic.Int64
	loop := func(c *Client, path string, query url.Values) {
		for ctx.Err() == nil {
			resp, err := c.raw(ctx, "GET", path, query, nil, nil)
			if err == nil {
				codes[resp.StatusCode].Add(1)
				_, _ = io.Copy(io.Discard, resp.Body)
				resp.Body.Close()
			}
			if err != nil || resp.StatusCode == http.StatusServiceUnavailable {
				time.Sleep(200 * time.Millisecond) // the nodes have no other processors than this test
			}
		}
	}
	flow := url.Values{"client": {"192.0.2.9:4000"}, "port": {"80"}}
	for source := range 5 {
		c := askFrom(t, n, conf, fmt.Sprintf("127.0.1.%d", source+1))
		for _, path := range []string{"/v1/events", "/v1/live"} {
			for _, of := range []string{"", "node1", "node2", "node3"} {
				all.Go(func() { loop(c, path, url.Values{"follow": {"1"}, "node": {of}}) })
			}
		}
		for _, of := range []string{"node1", "node2", "node3"} {
			all.Go(func() { loop(c, "/v1/status", url.Values{"node": {of}}) })
		}
		all.Go(func() { loop(c, "/v1/which", flow) })
		all.Go(func() { loop(c, "/v1/live", nil) })
	}
	return &codes
}

// TestReaders: while one read-only certificate holds all that it can get at two nodes,
// from several addresses, and asks as fast as it can, an operator drains, resumes and
// captures there, also by way of the other one, another node is answered, and somebody
// else with a read-only certificate is so, too.
func TestReaders(t *testing.T) {
	if testing.Short() {
		t.Skip("a siege takes all the processors there are")
	}
	nodes := startAll(t, 3, Limits{Ask: 10 * time.Second, Show: 10 * time.Second, Header: 10 * time.Second}) // for slow machines
	conf := issued(t, authority(t, testKey), RoleReadOnly, "reader")
	codes := besiege(t, nodes[0], conf)
	besiege(t, nodes[1], conf)
	for deadline := time.Now().Add(20 * time.Second); codes[200].Load() == 0 || codes[503].Load() < 100; time.Sleep(50 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%d questions were answered, and %d refused: it is no siege", codes[200].Load(), codes[503].Load())
		}
	}
	do := func(what string, ask func(ctx context.Context) error) {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
		defer cancel()
		if err := ask(ctx); err != nil {
			t.Errorf("%s: %v", what, err)
		}
	}
	operator := issued(t, authority(t, testKey), RoleControl, "operator")
	for round := range 3 {
		// The first time from a new address, like any operator, and then from a known one.
		c := askFrom(t, nodes[round%2], operator, "127.0.0.9")
		for _, of := range []*node{nodes[0], nodes[1]} {
			about := url.Values{"node": {of.id}}
			for _, order := range []string{"/v1/drain", "/v1/resume"} {
				do(order+" "+of.host, func(ctx context.Context) error {
					var s Status
					err := c.Post(ctx, order, about, Order{}, &s)
					if err == nil && of.isDrained() != (order == "/v1/drain") {
						return fmt.Errorf("the node did not do it")
					}
					return err
				})
			}
			do("capture "+of.host, func(ctx context.Context) error {
				resp, err := c.Stream(ctx, "/v1/capture", url.Values{"node": {of.id}, "count": {"3"}})
				if err != nil {
					return err
				}
				defer resp.Close()
				n, err := io.Copy(io.Discard, resp)
				if err == nil && n < 300 {
					return fmt.Errorf("%d bytes", n)
				}
				return err
			})
			do("another node's question of "+of.host, func(ctx context.Context) error {
				var s Status
				return askFrom(t, nodes[2], operator, "127.0.0.9").Get(ctx, "/v1/status", about, &s)
			})
		}
		do("the cluster", func(ctx context.Context) error {
			var all Cluster
			err := c.Get(ctx, "/v1/cluster", nil, &all)
			for _, n := range all.Nodes {
				if n.Status == nil {
					return fmt.Errorf("%s: %s", n.Node, n.Error)
				}
			}
			return err
		})
		c.Close()
	}
	do("another reader", func(ctx context.Context) error {
		var s Status
		return askFrom(t, nodes[0], issued(t, authority(t, testKey), RoleReadOnly, "another reader"), "127.0.0.10").Get(ctx, "/v1/status", nil, &s)
	})
}
