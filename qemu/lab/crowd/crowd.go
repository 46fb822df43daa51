// Package crowd is the clients of a cluster under test and what they see: short
// requests at a steady pace, each on a connection of its own, and long downloads,
// from one host of a virtual switch. A client alone cannot say which node holds a
// connection that broke, or whether its SYN was lost; the switch can, so both are
// asked. The reference service of the appliance (webd) answers at the other end.
package crowd

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"time"

	"clonecluster/qemu/nethost"
	"clonecluster/qemu/vswitch"
)

// nodeHeader names the node that answered, by its wire MAC.
const nodeHeader = "Clonecluster-Node"

// defaultTimeout is longer than the first three retransmissions of a SYN, which
// come after 1, 3 and 7 s (RFC 6298, section 2).
const defaultTimeout = 15 * time.Second

// Config says who asks whom.
type Config struct {
	Host   *nethost.Host // not to be closed before the crowd
	Switch *vswitch.Switch
	Target netip.AddrPort
	// Timeout is for one request, from the first SYN to the last byte. 0 means
	// 15 s.
	Timeout time.Duration
	// OnRequest is called for each request that has ended, if it is not nil, one
	// call at a time. It must be quick.
	OnRequest func(Request)
}

// Crowd asks and watches. Its methods may be called concurrently.
type Crowd struct {
	cfg   Config
	watch *watch
	stop  func()
}

// New makes a crowd that watches the switch until it is closed.
func New(cfg Config) *Crowd {
	if cfg.Timeout == 0 {
		cfg.Timeout = defaultTimeout
	}
	c := &Crowd{cfg: cfg, watch: newWatch(cfg.Target)}
	c.stop = cfg.Switch.Watch(c.watch.frame)
	return c
}

// Close ends the watching. What was asked goes on.
func (c *Crowd) Close() { c.stop() }

// Doubles are the connections that more than one node has answered: two owners of
// one SYN (I3).
func (c *Crowd) Doubles() []Double { return c.watch.doubled() }

// Judge sums up requests like [Judge], and knows of the SYNs of those that still wait.
func (c *Crowd) Judge(requests []Request, since, until time.Time, holder string) Outcome {
	o := Judge(requests, since, until, holder)
	if t := c.watch.lost(since, until, time.Now()); !t.IsZero() {
		o.Unanswered = max(o.Unanswered, t.Sub(since))
	}
	return o
}

// dial opens a connection that ends with ctx.
func (c *Crowd) dial(ctx context.Context) (conn net.Conn, done func() bool, err error) {
	conn, err = c.cfg.Host.DialContext(ctx, "tcp", c.cfg.Target.String())
	if err != nil {
		return nil, nil, err
	}
	// Not Close: what waits in Read or Write must return first.
	return conn, context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)) }), nil
}

// attempt is what the switch saw of a connection's beginning.
func (c *Crowd) attempt(conn net.Conn) Attempt {
	a, ok := conn.LocalAddr().(*net.TCPAddr)
	if !ok {
		return Attempt{} // the connection is broken and has none any more
	}
	local := a.AddrPort()
	return c.watch.attempt(netip.AddrPortFrom(local.Addr().Unmap(), local.Port()))
}

func (c *Crowd) head(path, more string) []byte {
	return fmt.Appendf(nil, "GET %s HTTP/1.1\r\nHost: %s\r\n%s\r\n", path, c.cfg.Target, more)
}
