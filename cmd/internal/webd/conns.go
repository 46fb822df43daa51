package webd

import (
	"container/list"
	"net"
	"net/http"
	"sync"
)

// conns bounds the number of open connections. When all are taken and a client
// waits, the connection that has idled longest between two requests is closed
// for it; while none idles, clients wait in the kernel's queue. Connections are
// not wrapped: net/http finds sendfile only on a bare *net.TCPConn.
type conns struct {
	net.Listener
	max int

	mu       sync.Mutex
	change   sync.Cond // open, idle or closed has changed
	open     int
	evicting int // closed by us, not yet seen closed by the server
	idle     *list.List
	where    map[net.Conn]*list.Element // the place in idle of those that idle
	evicted  map[net.Conn]bool
	closed   bool
}

func newConns(l net.Listener, max int) *conns {
	c := &conns{Listener: l, max: max, idle: list.New(), where: map[net.Conn]*list.Element{}, evicted: map[net.Conn]bool{}}
	c.change.L = &c.mu
	return c
}

// Accept returns the next connection when there is room for it.
func (c *conns) Accept() (net.Conn, error) {
	conn, err := c.Listener.Accept()
	if err != nil {
		return nil, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for c.open >= c.max && !c.closed {
		if c.open-c.evicting >= c.max {
			c.evict()
		}
		c.change.Wait()
	}
	if c.closed {
		conn.Close()
		return nil, net.ErrClosed
	}
	c.open++
	return conn, nil
}

// evict closes the connection that has idled longest, if any idles.
func (c *conns) evict() {
	first := c.idle.Front()
	if first == nil {
		return
	}
	conn := c.idle.Remove(first).(net.Conn)
	delete(c.where, conn)
	c.evicted[conn] = true
	c.evicting++
	conn.Close()
}

// Close stops accepting; connections that are open stay so.
func (c *conns) Close() error {
	c.mu.Lock()
	c.closed = true
	c.mu.Unlock()
	c.change.Broadcast()
	return c.Listener.Close()
}

// state is the server's ConnState hook.
func (c *conns) state(conn net.Conn, s http.ConnState) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if e := c.where[conn]; e != nil {
		c.idle.Remove(e)
		delete(c.where, conn)
	}
	switch s {
	case http.StateIdle:
		if !c.evicted[conn] {
			c.where[conn] = c.idle.PushBack(conn)
		}
	case http.StateClosed, http.StateHijacked:
		c.open--
		if c.evicted[conn] {
			c.evicting--
			delete(c.evicted, conn)
		}
	default:
		return
	}
	c.change.Broadcast()
}

// untilEmpty gives a channel that is closed when no connection is open. The
// caller calls stop when it no longer waits.
func (c *conns) untilEmpty() (empty <-chan struct{}, stop func()) {
	done := make(chan struct{})
	stopped := false
	go func() {
		defer close(done)
		c.mu.Lock()
		defer c.mu.Unlock()
		for c.open > 0 && !stopped {
			c.change.Wait()
		}
	}()
	return done, func() {
		c.mu.Lock()
		stopped = true
		c.mu.Unlock()
		c.change.Broadcast()
		<-done
	}
}
