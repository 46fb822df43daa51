package probe

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"testing"
)

var vips = []netip.Addr{netip.MustParseAddr("10.77.0.10"), netip.MustParseAddr("fd77::10")}

func TestListenNeeds(t *testing.T) {
	there := func(each func(netip.AddrPort)) error {
		for _, at := range []string{"0.0.0.0:80", "127.0.0.1:25", "10.77.0.10:443", "[::]:8001", "[::1]:8002", "[fd77::10]:8003"} {
			each(netip.MustParseAddrPort(at))
		}
		return nil
	}
	one := func(ports ...uint16) (r []PortRange) {
		for _, p := range ports {
			r = append(r, PortRange{p, p})
		}
		return r
	}
	for _, tt := range []struct {
		name  string
		ports []PortRange
		want  string
	}{
		{"nothing", nil, "<nil>"},
		{"wildcard", one(80), "<nil>"},
		{"VIP", one(443), "<nil>"},
		{"IPv6 wildcard", one(8001), "<nil>"},
		{"IPv6 VIP", one(8003), "<nil>"},
		{"all of several", one(80, 443, 8001, 8003), "<nil>"},
		{"loopback", one(25), "nobody listens on 25/tcp"},
		{"IPv6 loopback", one(8002), "nobody listens on 8002/tcp"},
		{"one of several", one(80, 81), "nobody listens on 81/tcp"},
		{"range", []PortRange{{8000, 8001}}, "<nil>"},
		{"range without", []PortRange{{8005, 8010}}, "nobody listens on 8005-8010/tcp"},
		{"one range of two", []PortRange{{8005, 8010}, {440, 450}}, "<nil>"},
		{"none of two", []PortRange{{8005, 8010}, {1, 9}}, "nobody listens on 8005-8010/tcp 1-9/tcp"},
		{"range opened when needed", append(one(80), PortRange{50000, 50100}), "<nil>"},
		{"range does not help", append(one(81), PortRange{80, 90}), "nobody listens on 81/tcp"},
	} {
		if got := fmt.Sprint(listen(there, tt.ports, vips)); got != tt.want {
			t.Errorf("%s: listen(%v) = %q; want %q", tt.name, tt.ports, got, tt.want)
		}
	}
	failed := errors.New("no answer")
	if err := listen(func(func(netip.AddrPort)) error { return failed }, nil, vips); !errors.Is(err, failed) {
		t.Errorf("listen(a kernel that does not answer) = %v; want %v", err, failed)
	}
}

// TestListenLive has sockets of this machine's kernel.
func TestListenLive(t *testing.T) {
	for _, address := range []string{"127.0.0.1:0", "[::1]:0", "0.0.0.0:0", "[::]:0"} {
		l, err := net.Listen("tcp", address)
		if err != nil {
			t.Logf("no listener at %s: %v", address, err)
			continue
		}
		at := l.Addr().(*net.TCPAddr).AddrPort()
		ports := []PortRange{{at.Port(), at.Port()}}
		// A connection, which the kernel shows with the listener's port too.
		c, err := net.Dial("tcp", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		if err := Listen(ports, []netip.Addr{at.Addr().Unmap()}); err != nil {
			t.Errorf("a listener at %s: %v", at, err)
		}
		if err := Listen(ports, vips); (err == nil) != at.Addr().IsUnspecified() {
			t.Errorf("a listener at %s, for the VIP: %v", at, err)
		}
		l.Close()
		if err := Listen(ports, []netip.Addr{at.Addr().Unmap()}); err == nil {
			t.Errorf("%s is closed, but for a connection, and somebody listens", at)
		}
		c.Close()
	}
}
