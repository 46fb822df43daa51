package webd

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

func dial(t *testing.T, addr string) net.Conn {
	t.Helper()
	c, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(long))
	return c
}

// get asks on an open connection and reads the whole answer.
func get(t *testing.T, c net.Conn, path string) *http.Response {
	t.Helper()
	if _, err := fmt.Fprintf(c, "GET %s HTTP/1.1\r\nHost: x\r\n\r\n", path); err != nil {
		t.Fatal(err)
	}
	resp, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil {
		t.Fatalf("GET %s: %v", path, err)
	}
	if _, err := io.Copy(io.Discard, resp.Body); err != nil {
		t.Fatalf("GET %s: %v", path, err)
	}
	return resp
}

// waitClosed fails unless the server closes the connection.
func waitClosed(t *testing.T, c net.Conn) {
	t.Helper()
	if _, err := io.Copy(io.Discard, c); errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatal("the server keeps the connection")
	}
}

// Clients that hold a connection without asking anything are cut off.
func TestSlowClientsAreCutOff(t *testing.T) {
	opt := testOptions(t)
	opt.ReadTimeout = 200 * time.Millisecond
	opt.IdleTimeout = 300 * time.Millisecond
	addr, _ := start(t, opt)

	t.Run("silent", func(t *testing.T) { waitClosed(t, dial(t, addr)) })
	t.Run("half a request", func(t *testing.T) {
		c := dial(t, addr)
		io.WriteString(c, "GET / HTTP/1.1\r\nHost: x\r\nX-")
		waitClosed(t, c)
	})
	t.Run("a byte at a time", func(t *testing.T) {
		c := dial(t, addr)
		io.WriteString(c, "GET / HTTP/1.1\r\nHost: x\r\n")
		stop := make(chan struct{})
		var w sync.WaitGroup
		w.Go(func() {
			tick := time.NewTicker(20 * time.Millisecond)
			defer tick.Stop()
			for {
				select {
				case <-stop:
					return
				case <-tick.C:
					if _, err := io.WriteString(c, "X"); err != nil {
						return
					}
				}
			}
		})
		waitClosed(t, c)
		close(stop)
		w.Wait()
	})
	t.Run("idle after an answer", func(t *testing.T) {
		c := dial(t, addr)
		get(t, c, "/whoami")
		waitClosed(t, c)
	})
}

func TestRefusedRequests(t *testing.T) {
	addr, _ := start(t, testOptions(t))
	for _, tc := range []struct {
		name, request string
		status        int
	}{
		{"large header", "GET / HTTP/1.1\r\nHost: x\r\nX: " + strings.Repeat("y", 20<<10) + "\r\n\r\n", 431},
		{"body", "GET / HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000000\r\n\r\nx", 413},
		{"chunked body", "POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n", 413},
		{"both lengths", "GET / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n", 413},
		{"no host", "GET / HTTP/1.1\r\n\r\n", 400},
		{"rubbish", "\x16\x03\x01\x00\xa5\r\n\r\n", 400},
		{"http/2 preface", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 413},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c := dial(t, addr)
			io.WriteString(c, tc.request)
			resp, err := http.ReadResponse(bufio.NewReader(c), nil)
			if err != nil {
				t.Fatal(err)
			}
			if resp.StatusCode != tc.status || !resp.Close {
				t.Errorf("status %d, close %v; want %d and close", resp.StatusCode, resp.Close, tc.status)
			}
			waitClosed(t, c)
		})
	}
}

// A long answer may take many times the stall timeout, as long as the client
// goes on reading; and the connection is good for another request.
func TestLongDownload(t *testing.T) {
	opt := testOptions(t)
	opt.Content = site(t)
	opt.StallTimeout = 500 * time.Millisecond
	opt.ReadTimeout = 500 * time.Millisecond
	opt.MaxBench = 1e9
	addr, _ := start(t, opt)
	if err := os.WriteFile(opt.Content+"/large", make([]byte, 48e6), 0o644); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{"/bench/48M", "/large"} {
		t.Run(path[1:], func(t *testing.T) {
			t.Parallel()
			c := dial(t, addr)
			c.(*net.TCPConn).SetReadBuffer(64 << 10) // so that the server has to wait for us
			fmt.Fprintf(c, "GET %s HTTP/1.1\r\nHost: x\r\n\r\n", path)
			in := bufio.NewReader(c)
			resp, err := http.ReadResponse(in, nil)
			if err != nil {
				t.Fatal(err)
			}
			begin := time.Now()
			var n int64
			for {
				m, err := io.CopyN(io.Discard, resp.Body, 1e6)
				n += m
				if err == io.EOF {
					break
				}
				if err != nil {
					t.Fatalf("after %v and %d bytes: %v", time.Since(begin), n, err)
				}
				time.Sleep(40 * time.Millisecond) // being slow is what is tested
			}
			if n != 48e6 || time.Since(begin) < 3*opt.StallTimeout {
				t.Fatalf("read %d bytes in %v; want 48 MB, slowly", n, time.Since(begin))
			}
			fmt.Fprintf(c, "GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
			if resp, err = http.ReadResponse(in, nil); err != nil || resp.StatusCode != 200 {
				t.Fatalf("next request on the connection: %v %v", resp, err)
			}
		})
	}
}

// A client that stops reading is cut off. Until then it costs the kernel little.
func TestStalledDownload(t *testing.T) {
	opt := testOptions(t)
	opt.StallTimeout = 300 * time.Millisecond
	opt.DrainTimeout = long
	addr, stop := start(t, opt)
	c := dial(t, addr)
	c.(*net.TCPConn).SetReadBuffer(64 << 10)
	fmt.Fprintf(c, "GET /bench/500M HTTP/1.1\r\nHost: x\r\n\r\n")
	if _, err := c.Read(make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	begin := time.Now()
	stop() // returns when the last connection is gone
	if d := time.Since(begin); d > long/2 {
		t.Errorf("the stalled connection lasted %v", d)
	}
	if n, _ := io.Copy(io.Discard, c); n > 1e6 {
		t.Errorf("%d bytes were on the way", n)
	}
}

// With all connections taken, one that idles makes room; one that is busy
// does not.
func TestConnectionLimit(t *testing.T) {
	opt := testOptions(t)
	opt.MaxConns = 2
	addr, _ := start(t, opt)
	first, second := dial(t, addr), dial(t, addr)
	get(t, first, "/whoami")
	get(t, second, "/whoami")
	get(t, dial(t, addr), "/whoami")
	closed := make(chan error, 2)
	for _, c := range []net.Conn{first, second} {
		go func() {
			_, err := c.Read(make([]byte, 1))
			closed <- err
		}()
	}
	if err := <-closed; errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatal("the server keeps both connections")
	}

	// All busy: the newcomer waits until one is done.
	opt.MaxConns = 1
	addr, _ = start(t, opt)
	busy := dial(t, addr)
	fmt.Fprintf(busy, "GET /bench/500M HTTP/1.1\r\nHost: x\r\n\r\n")
	if _, err := busy.Read(make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	third := dial(t, addr)
	fmt.Fprintf(third, "GET /whoami HTTP/1.1\r\nHost: x\r\n\r\n")
	third.SetReadDeadline(time.Now().Add(200 * time.Millisecond))
	if _, err := third.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatalf("a connection above the limit was served: %v", err)
	}
	busy.Close()
	third.SetReadDeadline(time.Now().Add(long))
	if _, err := http.ReadResponse(bufio.NewReader(third), nil); err != nil {
		t.Fatalf("the waiting connection: %v", err)
	}
}

// pipes is a listener of connections that are handed to it.
type pipes chan net.Conn

func (p pipes) Accept() (net.Conn, error) { return <-p, nil }
func (p pipes) Close() error              { return nil }
func (p pipes) Addr() net.Addr            { return &net.UnixAddr{} }

// Whoever has idled longest goes first, each only once, and a busy one never.
func TestEviction(t *testing.T) {
	in := make(pipes, 10)
	l := newConns(in, 3)
	peer := map[net.Conn]net.Conn{}
	enter := func() net.Conn {
		server, client := net.Pipe()
		peer[server] = client
		in <- server
		return server
	}
	var have []net.Conn
	for range 3 {
		c := enter()
		if got, err := l.Accept(); got != c || err != nil {
			t.Fatalf("Accept = %v, %v", got, err)
		}
		l.state(c, http.StateNew)
		l.state(c, http.StateActive)
		have = append(have, c)
	}
	l.state(have[1], http.StateIdle)
	l.state(have[0], http.StateIdle)
	l.state(have[1], http.StateActive) // asked again: now 0 has idled longest
	l.state(have[1], http.StateIdle)
	for _, c := range []net.Conn{have[0], have[1], have[2]} {
		next := enter()
		accepted := make(chan net.Conn)
		go func() {
			got, _ := l.Accept()
			accepted <- got
		}()
		if c == have[2] {
			l.state(c, http.StateIdle) // while a newcomer waits
		}
		peer[c].SetReadDeadline(time.Now().Add(long))
		if _, err := peer[c].Read(make([]byte, 1)); err != io.EOF {
			t.Fatalf("connection %d: %v; want it closed", slices.Index(have, c), err)
		}
		l.state(c, http.StateIdle) // as a server may say that has not noticed yet
		l.state(c, http.StateClosed)
		if got := <-accepted; got != next {
			t.Fatalf("Accept = %v; want the newcomer", got)
		}
		l.state(next, http.StateNew)
	}
	if l.open != 3 || l.evicting != 0 || l.idle.Len() != 0 || len(l.where) != 0 || len(l.evicted) != 0 {
		t.Errorf("open %d, evicting %d, idle %d, known %d and %d; want 3 and nothing else", l.open, l.evicting, l.idle.Len(), len(l.where), len(l.evicted))
	}
}

// Many clients at the limit all get answers.
func TestManyAtTheLimit(t *testing.T) {
	opt := testOptions(t)
	opt.MaxConns = 3
	addr, _ := start(t, opt)
	var w sync.WaitGroup
	for range 20 {
		w.Go(func() {
			for range 10 {
				c, err := net.Dial("tcp", addr)
				if err != nil {
					t.Error(err)
					return
				}
				c.SetDeadline(time.Now().Add(long))
				fmt.Fprintf(c, "GET /bench/5125 HTTP/1.1\r\nHost: x\r\n\r\n")
				resp, err := http.ReadResponse(bufio.NewReader(c), nil)
				if err == nil {
					_, err = io.Copy(io.Discard, resp.Body)
				}
				if err != nil {
					t.Error(err)
				}
				c.Close()
			}
		})
	}
	w.Wait()
}

func TestDrain(t *testing.T) {
	opt := testOptions(t)
	opt.IdleGrace = long // so that only a polite server lets this test end in time
	opt.DrainTimeout = 2 * long
	opt.StallTimeout = long
	stopping := make(chan struct{})
	opt.Notify = func(s string) {
		if s == "STOPPING=1" {
			close(stopping)
		}
	}
	addr, stop := start(t, opt)
	idle, busy := dial(t, addr), dial(t, addr)
	get(t, idle, "/whoami")
	fmt.Fprintf(busy, "GET /bench/100M HTTP/1.1\r\nHost: x\r\n\r\n")
	resp, err := http.ReadResponse(bufio.NewReader(busy), nil)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error)
	go func() { done <- stop() }()
	<-stopping

	// An open connection is answered once more, and told to go.
	for {
		r := get(t, idle, "/healthz")
		if r.StatusCode == http.StatusServiceUnavailable && r.Close {
			break
		}
		if r.Close {
			t.Fatalf("draining answer = %s", r.Status)
		}
	}
	waitClosed(t, idle)
	// A download that runs is finished, and its connection is not cut either.
	if n, err := io.Copy(io.Discard, resp.Body); n != 100e6 || err != nil {
		t.Errorf("read %d bytes: %v", n, err)
	}
	if r := get(t, busy, "/whoami"); !r.Close {
		t.Error("a draining server did not close after the last answer")
	}
	if err := <-done; err != nil {
		t.Errorf("Run = %v", err)
	}
	if c, err := net.Dial("tcp", addr); err == nil {
		c.Close()
		t.Error("a new connection was taken after the end")
	}
}

// Idle connections and stuck downloads do not hold up a shutdown for ever.
func TestDrainLimits(t *testing.T) {
	opt := testOptions(t)
	opt.IdleGrace = 50 * time.Millisecond
	opt.DrainTimeout = 300 * time.Millisecond
	addr, stop := start(t, opt)
	idle, stuck := dial(t, addr), dial(t, addr)
	get(t, idle, "/whoami")
	fmt.Fprintf(stuck, "GET /bench/500M HTTP/1.1\r\nHost: x\r\n\r\n")
	if _, err := stuck.Read(make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	if err := stop(); err != nil {
		t.Errorf("Run = %v", err)
	}
	waitClosed(t, idle)
}

func TestDualStack(t *testing.T) {
	l, err := net.Listen("tcp6", "[::1]:0")
	if err != nil {
		t.Skip("no IPv6 loopback here:", err)
	}
	l.Close()
	opt := testOptions(t)
	s := newServer(t, opt)
	if l, err = net.Listen("tcp", ":0"); err != nil {
		t.Fatal(err)
	}
	ctx := t.Context()
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx, l) }()
	t.Cleanup(func() { <-done })
	_, port, _ := net.SplitHostPort(l.Addr().String())
	for _, host := range []string{"127.0.0.1", "::1"} {
		c := dial(t, net.JoinHostPort(host, port))
		get(t, c, "/healthz")
		c.Close()
	}
}
