package crowd

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net/http"
	"slices"
	"sync"
	"time"
)

// Request is one request and how it ended.
type Request struct {
	Begin     time.Time
	Connected time.Time // zero if never
	End       time.Time
	Attempt   Attempt // only of a request that was connected
	Node      string  // who answered, by wire MAC
	Err       error   // nil if it was answered
}

// Asking is a crowd that asks.
type Asking struct {
	crowd  *Crowd
	cancel context.CancelFunc // of the pace, not of the requests
	paced  chan struct{}      // closed when no more requests begin
	wg     sync.WaitGroup     // of the requests

	mu  sync.Mutex
	all []Request
}

// Ask begins a request in every interval, without waiting for the answer of the
// one before, until Stop is called. When ctx ends, what is in flight is given up
// and not recorded. Call Stop in any case.
func (c *Crowd) Ask(ctx context.Context, interval time.Duration) *Asking {
	paceCtx, cancel := context.WithCancel(ctx)
	a := &Asking{crowd: c, cancel: cancel, paced: make(chan struct{})}
	go func() {
		defer close(a.paced)
		tick := time.NewTicker(interval)
		defer tick.Stop()
		for {
			select {
			case <-paceCtx.Done():
				return
			case <-tick.C:
				a.wg.Go(func() { a.ask(ctx) })
			}
		}
	}()
	return a
}

// Stop begins no more requests, waits for those in flight (no longer than a
// request may take), and returns all, in the order of their ends.
func (a *Asking) Stop() []Request {
	a.cancel()
	<-a.paced
	a.wg.Wait()
	return a.Requests()
}

// Requests are those that have ended.
func (a *Asking) Requests() []Request {
	a.mu.Lock()
	defer a.mu.Unlock()
	return slices.Clone(a.all)
}

func (a *Asking) ask(ctx context.Context) {
	r := a.crowd.request(ctx)
	if ctx.Err() != nil {
		return
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.all = append(a.all, r)
	if a.crowd.cfg.OnRequest != nil {
		a.crowd.cfg.OnRequest(r)
	}
}

// request is one request on a connection of its own.
func (c *Crowd) request(ctx context.Context) (r Request) {
	r.Begin = time.Now()
	defer func() { r.End = time.Now() }()
	ctx, cancel := context.WithTimeout(ctx, c.cfg.Timeout)
	defer cancel()
	conn, done, err := c.dial(ctx)
	if err != nil {
		r.Err = err
		return r
	}
	defer conn.Close()
	defer done()
	r.Connected = time.Now()
	// Now, since a connection that was reset has no address any more.
	r.Attempt = c.attempt(conn)
	if _, err := conn.Write(c.head("/whoami", "Connection: close\r\n")); err != nil {
		r.Err = fmt.Errorf("sending the request: %w", err)
		return r
	}
	resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		r.Err = fmt.Errorf("reading the answer: %w", err)
		return r
	}
	defer resp.Body.Close()
	if _, err := io.Copy(io.Discard, io.LimitReader(resp.Body, 64<<10)); err != nil {
		r.Err = fmt.Errorf("reading the answer: %w", err)
		return r
	}
	if r.Node = resp.Header.Get(nodeHeader); resp.StatusCode != http.StatusOK || r.Node == "" {
		r.Err = fmt.Errorf("not the answer of a node: %s", resp.Status)
	}
	return r
}
