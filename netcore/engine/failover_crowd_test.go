package engine_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"clonecluster/netcore/netnstest"
)

// A crowd is clients on one host that open a connection each, one after the
// other at a steady pace whatever became of those before, ask who is there, and
// go.
type crowd struct {
	t       testing.TB
	total   int // 0: until it is stopped
	stop    context.CancelFunc
	opening sync.WaitGroup
	asking  sync.WaitGroup
	slots   chan struct{}

	mu       sync.Mutex
	changed  *sync.Cond
	requests []request
	err      error
}

// request is one connection of a crowd.
type request struct {
	started   time.Time
	connected time.Duration // after started; 0: never
	ended     time.Duration // after started
	node      string        // who answered
	err       error
}

const (
	// patience is how long a client waits for its answer.
	patience = 20 * time.Second
	// slow is what only a client that sent its SYN again waits for.
	slow = 900 * time.Millisecond
)

// startCrowd starts a crowd on a host that asks by IPv4 and IPv6 in turns,
// with at most limit requests in flight. It ends after total requests (0: when
// it is stopped).
func (f *failover) startCrowd(from *netnstest.Host, every time.Duration, limit, total int) *crowd {
	f.t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	c := &crowd{t: f.t, total: total, stop: cancel, slots: make(chan struct{}, limit)}
	c.changed = sync.NewCond(&c.mu)
	targets := []netip.AddrPort{netip.MustParseAddrPort(vip4 + ":80"), netip.MustParseAddrPort("[" + vip6 + "]:80")}
	c.opening.Go(func() {
		if err := from.Do(func() error { return c.open(ctx, targets, every) }); err != nil {
			c.mu.Lock()
			c.err = err
			c.mu.Unlock()
		}
	})
	f.t.Cleanup(func() { cancel(); c.opening.Wait() })
	return c
}

// open opens the connections from a thread in the client's namespace.
func (c *crowd) open(ctx context.Context, targets []netip.AddrPort, every time.Duration) error {
	next := time.Now()
	for i := 0; c.total == 0 || i < c.total; i++ {
		select {
		case c.slots <- struct{}{}:
		case <-ctx.Done():
			return nil
		}
		time.Sleep(time.Until(next))
		// Who is late catches up, but not by more than a burst.
		next = latest(next.Add(every), time.Now().Add(-10*every))
		started := time.Now()
		conn, err := connect(targets[i%len(targets)], 0)
		if err != nil {
			return err
		}
		c.mu.Lock()
		c.requests = append(c.requests, request{started: started})
		c.mu.Unlock()
		c.asking.Go(func() { c.ask(i, conn, started) })
	}
	return nil
}

func latest(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

// connect begins to open a TCP connection in the calling thread's namespace.
// The first write waits for the end of that. A receive buffer of 0 is the
// kernel's.
func connect(to netip.AddrPort, receiveBuffer int) (*os.File, error) {
	family, sa := unix.AF_INET, unix.Sockaddr(&unix.SockaddrInet4{Port: int(to.Port())})
	if to.Addr().Is6() {
		family, sa = unix.AF_INET6, &unix.SockaddrInet6{Port: int(to.Port()), Addr: to.Addr().As16()}
	} else {
		sa.(*unix.SockaddrInet4).Addr = to.Addr().As4()
	}
	fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("opening a socket: %w", err)
	}
	if receiveBuffer > 0 {
		err = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, receiveBuffer)
	}
	if err == nil {
		err = unix.Connect(fd, sa)
	}
	if err != nil && !errors.Is(err, unix.EINPROGRESS) {
		unix.Close(fd)
		return nil, fmt.Errorf("connecting to %v: %w", to, err)
	}
	return os.NewFile(uintptr(fd), to.String()), nil
}

var answerBuffers = sync.Pool{New: func() any { b := make([]byte, 1024); return &b }}

func (c *crowd) ask(i int, conn *os.File, started time.Time) {
	defer conn.Close()
	var connected time.Duration
	node, err := func() (string, error) {
		if err := conn.SetDeadline(started.Add(patience)); err != nil {
			return "", err
		}
		if _, err := conn.WriteString("GET /whoami HTTP/1.1\r\nHost: vip\r\nConnection: close\r\n\r\n"); err != nil {
			return "", fmt.Errorf("connecting: %w", err)
		}
		connected = time.Since(started)
		buf := answerBuffers.Get().(*[]byte)
		defer answerBuffers.Put(buf)
		n := 0
		for n < len(*buf) {
			m, err := conn.Read((*buf)[n:])
			if n += m; err != nil && m == 0 {
				if !errors.Is(err, io.EOF) {
					return "", fmt.Errorf("after %d bytes of the answer: %w", n, err)
				}
				break
			}
		}
		head, body, ok := bytes.Cut((*buf)[:n], []byte("\r\n\r\n"))
		if !ok || !bytes.HasPrefix(head, []byte("HTTP/1.1 200 ")) {
			return "", fmt.Errorf("the answer is %q", (*buf)[:n])
		}
		return strings.TrimSpace(string(body)), nil
	}()
	c.mu.Lock()
	r := &c.requests[i]
	r.connected, r.ended, r.node, r.err = connected, time.Since(started), node, err
	c.changed.Broadcast()
	c.mu.Unlock()
	<-c.slots
}

// await waits until n requests that were started from now on have been
// answered, and one by each of the nodes.
func (c *crowd) await(n int, nodes ...*node) {
	c.t.Helper()
	expired := false
	timer := time.AfterFunc(time.Minute, func() {
		c.mu.Lock()
		expired = true
		c.changed.Broadcast()
		c.mu.Unlock()
	})
	defer timer.Stop()
	c.mu.Lock()
	defer c.mu.Unlock()
	from := len(c.requests)
	for !expired && c.err == nil {
		answered := map[string]int{}
		for _, r := range c.requests[from:] {
			if r.ended > 0 && r.err == nil {
				answered[""]++
				answered[r.node]++
			}
		}
		missing := slices.ContainsFunc(nodes, func(n *node) bool { return answered[n.Name] == 0 })
		if answered[""] >= n && !missing {
			return
		}
		c.changed.Wait()
	}
	c.t.Fatalf("of %d requests in a minute too few were answered, or not by all of %v; %v", len(c.requests)-from, names(nodes), c.err)
}

// end stops the crowd, waits for the requests in flight, and gives them all.
func (c *crowd) end() requests {
	c.t.Helper()
	c.stop()
	return c.wait()
}

// opened tells whether a crowd of limited size has begun its last request.
func (c *crowd) opened() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.err != nil || len(c.requests) == c.total
}

// wait waits for the end of a crowd of limited size.
func (c *crowd) wait() requests {
	c.t.Helper()
	c.opening.Wait()
	c.asking.Wait()
	if c.err != nil {
		c.t.Fatalf("the crowd cannot ask: %v", c.err)
	}
	return c.requests
}

// requests are those of a crowd, in the order of their start.
type requests []request

func (rs requests) String() string {
	answered, late, worst := map[string]int{}, 0, time.Duration(0)
	failed := 0
	for _, r := range rs {
		if r.err != nil {
			failed++
			continue
		}
		answered[r.node]++
		worst = max(worst, r.ended)
		if r.ended > slow {
			late++
		}
	}
	return fmt.Sprintf("%d requests answered by %v, %d failed, %d waited for a retransmission, the longest %v",
		len(rs), answered, failed, late, worst.Round(time.Millisecond))
}

// failed gives those that failed.
func (rs requests) failed() (failed requests) {
	for _, r := range rs {
		if r.err != nil {
			failed = append(failed, r)
		}
	}
	return failed
}

// outside gives those that were not in flight between two instants.
func (rs requests) outside(from, to time.Time) (out requests) {
	for _, r := range rs {
		if !r.touches(from, to) {
			out = append(out, r)
		}
	}
	return out
}

// touching gives the others.
func (rs requests) touching(from, to time.Time) (in requests) {
	for _, r := range rs {
		if r.touches(from, to) {
			in = append(in, r)
		}
	}
	return in
}

func (r request) touches(from, to time.Time) bool {
	return !r.started.After(to) && !r.started.Add(r.ended).Before(from)
}

// mustSucceed fails the test for each that failed.
func (f *failover) mustSucceed(rs requests) {
	f.t.Helper()
	failed, explained := rs.failed(), 0
	for _, r := range failed {
		if f.stood(r.started.Add(r.ended)) {
			explained++
		}
	}
	f.judge(len(failed), explained)
	for _, r := range failed[:min(10, len(failed))] {
		f.t.Errorf("a request of %s, connected after %v, failed after %v: %v; the longest stall near it %v",
			r.started.Format("15:04:05.000"), r.connected.Round(time.Millisecond), r.ended.Round(time.Millisecond), r.err,
			f.stalls.Between(r.started.Add(-2*time.Second), r.started.Add(r.ended)))
	}
	if len(failed) > 0 {
		f.t.Errorf("%d of %d requests failed", len(failed), len(rs))
	}
}
