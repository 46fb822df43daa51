package api

import (
	"fmt"
	"net"
	"net/netip"
	"testing"
	"testing/synctest"
	"time"
)

// caller is a connection of which nothing is real but where it comes from.
type caller struct {
	net.Conn
	from   string
	closed bool
}

func (c *caller) RemoteAddr() net.Addr {
	return net.TCPAddrFromAddrPort(netip.MustParseAddrPort(c.from))
}
func (c *caller) Close() error { c.closed = true; return nil }

// TestFlood: strangers of many sources take neither the operator's connections, nor
// the nodes', with the limits that hold if nobody says another thing.
func TestFlood(t *testing.T) {
	peers := []Peer{{Node: "a", Addresses: []netip.AddrPort{netip.MustParseAddrPort("[fe80::2%eth0]:9264"), netip.MustParseAddrPort("[2001:db8::2]:9264")}}}
	for _, tt := range []struct {
		name    string
		from    string
		sources int
		before  time.Duration // the operator has been here; 0: not yet
		read    bool          // those that flood have read-only certificates, as far as that is remembered
	}{
		{"an operator's first", "192.0.2.7:5000", 40, 0, false},
		{"an operator's first among readers", "192.0.2.7:5000", 40, 0, true},
		{"an operator's first among many readers", "192.0.2.7:5000", 400, 0, true},
		{"an operator who has been here, and readers", "192.0.2.7:5000", 400, 50 * time.Minute, true},
		{"a node, and readers", "[fe80::2%eth0]:5000", 400, 0, true},
		{"an operator who has been here", "192.0.2.7:5000", 40, 50 * time.Minute, false},
		{"an operator who has been here, and a flood of ten times as many", "192.0.2.7:5000", 400, 50 * time.Minute, false},
		{"an operator who was here long ago", "192.0.2.7:5000", 400, 2 * time.Hour, false},
		{"a node", "[fe80::2%eth0]:5000", 400, 0, false},
		{"a node in the prefix of a flood", "[2001:db8::2]:5000", 400, 0, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				d := newDoor(Limits{}.orDefaults(), func() []Peer { return peers })
				come := func(from string) (*guest, *caller) {
					c := &caller{from: from}
					return d.enter(c, time.Now()), c
				}
				operator := func() bool {
					g, c := come(tt.from)
					if g == nil {
						return false
					}
					time.Sleep(30 * time.Millisecond) // of the handshake
					defer g.Close()
					return g.known(RoleControl, nil) && !c.closed // by this goroutine, or with d.mu, which known takes
				}
				if tt.before > 0 {
					if !operator() {
						t.Fatal("nobody else was there, and the operator was refused")
					}
					time.Sleep(tt.before)
				}
				address := func(source, port int) string {
					switch source % 4 {
					case 1:
						return fmt.Sprintf("[2001:db8:0:%x::1]:%d", source, port)
					case 3:
						return fmt.Sprintf("[2001:db8::1:%x]:%d", source, port)
					}
					return fmt.Sprintf("198.51.%d.%d:%d", 100+source/250, source%250, port)
				}
				if tt.read {
					for i := range tt.sources {
						from, _ := d.sourceOf((&caller{from: address(i, 1)}).RemoteAddr(), time.Now())
						d.sources[from] = &source{}
						d.trust(d.sources[from], looks, time.Now())
					}
				}
				refused, strangers, begin := 0, 0, time.Now()
				for step := range 10 * 25 { // 10 s, 25 connections a second from each
					for source := range tt.sources {
						if g, _ := come(address(source, 1000+step)); g != nil {
							strangers++
						}
					}
					// At once, as what comes later may find what has come again meanwhile.
					if step >= 25 && step%12 == 0 && !operator() {
						refused++
					}
					time.Sleep(time.Until(begin.Add(time.Duration(step+1) * 40 * time.Millisecond)))
				}
				if refused > 0 {
					t.Errorf("%d of the operator's 18 connections were refused; want none", refused)
				}
				if strangers < 500 || strangers > 2000 {
					t.Errorf("%d strangers came in; want some 100 a second", strangers)
				}
				count := func() (strangers, clients int) {
					d.mu.Lock()
					defer d.mu.Unlock()
					return len(d.strangers), d.clients.connections
				}
				if n, _ := count(); n > d.limits.Strangers {
					t.Errorf("%d strangers are there; want at most %d", n, d.limits.Strangers)
				}
				time.Sleep(d.limits.Show) // and their time is over
				synctest.Wait()
				if strangers, clients := count(); strangers != 0 || clients != 0 {
					t.Errorf("%d strangers and %d clients are left; want none", strangers, clients)
				}
			})
		})
	}
}

// TestTrusted: that of few sources it is remembered that they have shown a
// certificate, and not for ever; those with read-only ones take nothing from the others.
func TestTrusted(t *testing.T) {
	d := newDoor(Limits{}.orDefaults(), func() []Peer { return nil })
	count := func(now time.Time) (n int) {
		for _, s := range d.sources {
			if s.standing(now) == trusted {
				n++
			}
		}
		return n
	}
	now := time.Unix(1e9, 0)
	first := netip.Prefix{}
	for i := range 2 * mostTrusted {
		from := netip.PrefixFrom(netip.AddrFrom4([4]byte{192, 0, byte(i >> 8), byte(i)}), 32)
		if i == 0 {
			first = from
		}
		d.sources[from] = &source{}
		now = now.Add(time.Second)
		d.trust(d.sources[from], trusted, now)
	}
	if n := count(now); n != mostTrusted || d.sources[first].standing(now) != strange {
		t.Errorf("%d sources are trusted, the first of them %v; want %d and not the first", n, d.sources[first].standing(now), mostTrusted)
	}
	for i := range 2 * mostTrusted {
		from := netip.PrefixFrom(netip.AddrFrom4([4]byte{198, 51, byte(i >> 8), byte(i)}), 32)
		d.sources[from] = &source{}
		d.trust(d.sources[from], looks, now)
	}
	if n := count(now); n != mostTrusted {
		t.Errorf("%d sources are trusted after many with read-only certificates; want %d", n, mostTrusted)
	}
	if d.forget(now); len(d.sources) != 2*mostTrusted {
		t.Errorf("%d sources are kept; want those that are trusted", len(d.sources))
	}
	if n := count(now.Add(trustFor)); n != 0 {
		t.Errorf("%d are trusted for ever", n)
	}
}

// TestNeighbour: who says nothing from the operator's own address does not shut it out.
func TestNeighbour(t *testing.T) {
	n := start(t, "02:00:00:00:00:01", "one", Limits{Show: time.Second, Header: time.Minute}, authority(t, testKey))
	var idle []net.Conn
	for range 16 {
		idle = append(idle, from(t, n, "127.0.0.1"))
	}
	var s Status
	for range 3 {
		c := n.client(t, RoleReadOnly)
		if err := c.Get(t.Context(), "/v1/status", nil, &s); err != nil {
			t.Errorf("beside 16 that say nothing: %v", err)
		}
	}
	for _, c := range idle {
		if !closedWithin(c, 3*time.Second) {
			t.Error("one that says nothing is still connected")
		}
	}
}
