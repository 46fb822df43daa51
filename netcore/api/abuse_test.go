package api

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"runtime"
	"strings"
	"testing"
	"time"
)

// from connects from one of the loopback addresses, which are sources of their own.
func from(t testing.TB, n *node, source string) net.Conn {
	t.Helper()
	d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(source)}, Timeout: 5 * time.Second}
	conn, err := d.Dial("tcp", n.at.String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

// closedWithin reports whether the other end closes a connection in time.
func closedWithin(conn net.Conn, d time.Duration) bool {
	_ = conn.SetReadDeadline(time.Now().Add(d))
	_, err := io.Copy(io.Discard, conn)
	var netErr net.Error
	return !(errors.As(err, &netErr) && netErr.Timeout())
}

// TestSlow: who says nothing, or little at a time, is not waited for, and others are
// answered meanwhile.
func TestSlow(t *testing.T) {
	limits := Limits{Header: 400 * time.Millisecond, Answer: 800 * time.Millisecond}
	n := start(t, "02:00:00:00:00:01", "one", limits, authority(t, testKey))
	secure := func() net.Conn {
		c := tls.Client(from(t, n, "127.0.0.3"), issued(t, authority(t, testKey), RoleControl, "slow"))
		if err := c.Handshake(); err != nil {
			t.Fatal(err)
		}
		return c
	}
	drip := func(conn net.Conn, text string) {
		for _, b := range []byte(text) {
			if _, err := conn.Write([]byte{b}); err != nil {
				return
			}
			time.Sleep(50 * time.Millisecond)
		}
	}
	type slow struct {
		name string
		conn net.Conn
		text string
	}
	all := []slow{
		{"says nothing", from(t, n, "127.0.0.2"), ""},
		{"drips its handshake", from(t, n, "127.0.0.2"), "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + strings.Repeat("x", 400)},
		{"shows its certificate, and no more", secure(), ""},
		{"drips its header", secure(), "GET /v1/status HTTP/1.1\r\nHost: cluster\r\nX: " + strings.Repeat("x", 400)},
	}
	body := secure()
	if _, err := io.WriteString(body, "POST /v1/drain HTTP/1.1\r\nHost: cluster\r\nContent-Length: 400\r\n\r\n{"); err != nil {
		t.Fatal(err)
	}
	all = append(all, slow{"drips its body", body, strings.Repeat(" ", 400)})
	for _, s := range all {
		go drip(s.conn, s.text)
	}
	var status Status
	if err := n.client(t, RoleReadOnly).Get(t.Context(), "/v1/status", nil, &status); err != nil {
		t.Errorf("meanwhile: %v", err)
	}
	for _, s := range all {
		if !closedWithin(s.conn, 5*time.Second) {
			t.Errorf("who %s is still connected", s.name)
		}
	}
	if n.isDrained() {
		t.Error("an order was taken that never came to an end")
	}
}

// TestHuge: headers and bodies are bounded, with and without a length.
func TestHuge(t *testing.T) {
	n := start(t, "02:00:00:00:00:01", "one", Limits{Answer: 2 * time.Second}, authority(t, testKey))
	for _, tt := range []struct {
		name, request string
		code          int
	}{
		{"header", "GET /v1/status HTTP/1.1\r\nHost: cluster\r\nX: " + strings.Repeat("x", 64<<10) + "\r\n\r\n", 431},
		{"many headers", "GET /v1/status HTTP/1.1\r\nHost: cluster\r\n" + strings.Repeat("X: y\r\n", 16<<10) + "\r\n", 431},
		{"path", "GET /v1/" + strings.Repeat("x", 64<<10) + " HTTP/1.1\r\nHost: cluster\r\n\r\n", 431},
		{"body", "POST /v1/drain HTTP/1.1\r\nHost: cluster\r\nContent-Length: 1000000000\r\n\r\n{", 413},
		{"body without a length", "POST /v1/drain HTTP/1.1\r\nHost: cluster\r\nTransfer-Encoding: chunked\r\n\r\n" +
			strings.Repeat("400\r\n"+strings.Repeat(" ", 0x400)+"\r\n", 8), 413},
		{"no HTTP", strings.Repeat("\x00\xff", 4000) + "\r\n\r\n", 400},
	} {
		conn := tls.Client(from(t, n, "127.0.0.2"), issued(t, authority(t, testKey), RoleControl, "huge"))
		go io.WriteString(conn, tt.request)
		_ = conn.SetReadDeadline(time.Now().Add(10 * time.Second))
		resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
		if err != nil {
			t.Errorf("%s: %v", tt.name, err)
			continue
		}
		if resp.StatusCode != tt.code {
			t.Errorf("%s: %s; want %d", tt.name, resp.Status, tt.code)
		}
		if !closedWithin(conn, 5*time.Second) {
			t.Errorf("%s: the connection is kept", tt.name)
		}
	}
	if n.isDrained() {
		t.Error("it did as it was told")
	}
}

// TestMany: connections are bounded for each source and in all, and however many
// strangers come, a client is answered.
func TestMany(t *testing.T) {
	limits := Limits{PerSource: 4, Strangers: 10, Connections: 6, NewPerSecond: 1000, Header: time.Minute}
	n := start(t, "02:00:00:00:00:01", "one", limits, authority(t, testKey))
	before := runtime.NumGoroutine()
	var strangers []net.Conn
	for source := range 10 {
		for range 8 {
			strangers = append(strangers, from(t, n, fmt.Sprintf("127.0.1.%d", source+1)))
		}
	}
	var s Status
	c := n.client(t, RoleReadOnly)
	if err := c.Get(t.Context(), "/v1/status", nil, &s); err != nil {
		t.Errorf("among strangers: %v", err)
	}
	open := 0
	for _, conn := range strangers {
		if !closedWithin(conn, 20*time.Millisecond) {
			open++
		}
	}
	if open > limits.Strangers {
		t.Errorf("%d strangers are connected; want at most %d", open, limits.Strangers)
	}
	if n.server.Refused() < uint64(len(strangers)-limits.Strangers) {
		t.Errorf("%d connections were refused; want %d", n.server.Refused(), len(strangers)-limits.Strangers)
	}
	if grown := runtime.NumGoroutine() - before; grown > 3*(limits.Strangers+limits.Connections) {
		t.Errorf("%d goroutines more", grown)
	}

	// Of those with a certificate there may be so many, of which half may only look. One
	// is there already.
	for _, tt := range []struct {
		role Role
		more int
	}{{RoleReadOnly, limits.Connections/2 - 1}, {RoleControl, limits.Connections / 2}} {
		got := answersTo(t, n, tt.role, 2*limits.Connections)
		if got[200] != tt.more || got[503] != 2*limits.Connections-tt.more {
			t.Errorf("answers to %s by code: %v; want that %d are served", tt.role, got, tt.more)
		}
	}
}

// answersTo counts the answers to so many clients, each with a certificate and an address
// of its own, by code; they stay connected.
func answersTo(t *testing.T, n *node, role Role, clients int) map[int]int {
	t.Helper()
	got := map[int]int{}
	for i := range clients {
		conn := tls.Client(from(t, n, fmt.Sprintf("127.0.2.%d", i+1)), issued(t, authority(t, testKey), role, "one of many"))
		if _, err := io.WriteString(conn, "GET /v1/status HTTP/1.1\r\nHost: cluster\r\n\r\n"); err != nil {
			t.Fatal(err)
		}
		_ = conn.SetReadDeadline(time.Now().Add(10 * time.Second))
		resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
		if err != nil {
			t.Fatal(err)
		}
		got[resp.StatusCode]++
	}
	return got
}

func TestRate(t *testing.T) {
	n := start(t, "02:00:00:00:00:01", "one", Limits{Requests: 10, Streams: 4}, authority(t, testKey))
	c := n.client(t, RoleReadOnly)
	codes := map[int]int{}
	for begin := time.Now(); time.Since(begin) < 4*time.Second && codes[429] < 20; {
		resp, err := c.raw(t.Context(), "GET", "/v1/status", nil, nil, nil)
		if err != nil {
			t.Fatal(err)
		}
		_, _ = io.Copy(io.Discard, resp.Body)
		resp.Body.Close()
		codes[resp.StatusCode]++
	}
	if codes[200] < 10 || codes[200] > 60 || codes[429] == 0 {
		t.Errorf("answers by code: %v; want some 20, and then too many", codes)
	}

	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var last int
	for range 3 {
		resp, err := n.client(t, RoleReadOnly).raw(ctx, "GET", "/v1/events", url.Values{"follow": {"1"}}, nil, nil)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		last = resp.StatusCode
	}
	if last != 503 {
		t.Errorf("the third who follows: %d; want 503", last)
	}

	// New connections come at a rate, too.
	few := start(t, "02:00:00:00:00:02", "two", Limits{NewPerSecond: 10, PerSource: 1000}, authority(t, testKey))
	closed := 0
	for range 30 {
		if closedWithin(from(t, few, "127.0.0.2"), 20*time.Millisecond) {
			closed++
		}
	}
	if closed < 15 {
		t.Errorf("of 30 connections at once %d were closed; want most", closed)
	}
}

func TestBucket(t *testing.T) {
	var b bucket
	now := time.Unix(1000, 0)
	taken := 0
	for range 20 {
		if b.take(now, 2, 5) {
			taken++
		}
	}
	if taken != 5 {
		t.Errorf("%d at once; want 5", taken)
	}
	now = now.Add(time.Second)
	taken = 0
	for range 5 {
		if b.take(now, 2, 5) {
			taken++
		}
	}
	if taken != 2 {
		t.Errorf("%d after a second; want 2", taken)
	}
	if now = now.Add(-time.Hour); b.take(now, 2, 5) { // a clock that goes back gives nothing
		t.Error("the past gave one")
	}
}
