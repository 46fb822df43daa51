package probe

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// What a kernel 6.12 shows on a little-endian machine: listeners at 0.0.0.0:80,
// 127.0.0.1:25, 10.77.0.10:443 and one that is being closed, then connections.
const (
	tcp4 = `  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode                                                     
   0: 00000000:0050 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 1045 1 0000000091a1e545 100 0 0 10 0                      
   1: 0100007F:0019 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 1046 1 0000000091a1e545 100 0 0 10 0                      
   2: 0A004D0A:1F90 00000000:0000 07 00000000:00000000 00:00000000 00000000     0        0 0 1 0000000091a1e545 100 0 0 10 0                         
   3: 0A004D0A:01BB 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 1047 1 0000000091a1e545 100 0 0 10 0                      
   4: 0A004D0A:0016 02004D0A:D431 01 00000000:00000000 02:000A7A5E 00000000     0        0 2043 2 0000000091a1e545 20 4 30 10 -1                     
   5: 0A004D0A:0050 02004D0A:D432 06 00000000:00000000 03:00001734 00000000     0        0 0 3 0000000091a1e545                                      
`
	// [::]:8001, [::1]:8002, [fd77::10]:8003, [::ffff:10.77.0.10]:8004.
	tcp6 = `  sl  local_address                         remote_address                        st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 00000000000000000000000000000000:1F41 00000000000000000000000000000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 1048 1 0000000091a1e545 100 0 0 10 0
   1: 00000000000000000000000001000000:1F42 00000000000000000000000000000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 1049 1 0000000091a1e545 100 0 0 10 0
   2: 000077FD000000000000000010000000:1F43 00000000000000000000000000000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 1050 1 0000000091a1e545 100 0 0 10 0
   3: 0000000000000000FFFF00000A004D0A:1F44 00000000000000000000000000000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 1051 1 0000000091a1e545 100 0 0 10 0
`
)

var vips = []netip.Addr{netip.MustParseAddr("10.77.0.10"), netip.MustParseAddr("fd77::10")}

func TestParseListeners(t *testing.T) {
	for _, tt := range []struct{ text, want string }{
		{tcp4, "0.0.0.0:80 127.0.0.1:25 10.77.0.10:443"},
		{tcp6, "[::]:8001 [::1]:8002 [fd77::10]:8003 [::ffff:10.77.0.10]:8004"},
		{"  sl  local_address rem_address\n", ""},
	} {
		var got []string
		err := parseListeners(strings.NewReader(tt.text), func(a netip.AddrPort) { got = append(got, a.String()) })
		if err != nil || strings.Join(got, " ") != tt.want {
			t.Errorf("listeners %s, %v; want %s", got, err, tt.want)
		}
	}
}

func TestParseListenersRefuses(t *testing.T) {
	const header = "  sl  local_address rem_address   st\n"
	for _, tt := range []struct{ text, want string }{
		{"", "no table of sockets"},
		{"garbage\n", "no table of sockets"},
		{header + "0: 00000000:0050\n", "too short"},
		{header + "0: 00000000:10050 0:0 0A\n", "the port"},
		{header + "0: 00000000 0:0 0A\n", "the port"},
		{header + "0: 00000000:0050 0:0 1FF\n", "the state"},
		{header + "0: 0000000:0050 0:0 0A\n", "is none"},
		{header + "0: 0000000000:0050 0:0 0A\n", "is none"},
		{header + "0: " + strings.Repeat("0", 34) + ":0050 0:0 0A\n", "is none"},
		{header + "0: :0050 0:0 0A\n", "is none"},
		{header + strings.Repeat("x", 10_000), "too long"},
		{header + strings.Repeat("0: 00000000:0050 0:0 0A\n", maxListeners+1), "more than 65536"},
	} {
		err := parseListeners(strings.NewReader(tt.text), func(netip.AddrPort) {})
		if err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("parseListeners(%.60q…) = %v; want %q", tt.text, err, tt.want)
		}
	}
}

func TestListenNeeds(t *testing.T) {
	dir := t.TempDir()
	write := func(name, text string) {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	write("tcp", tcp4)
	write("tcp6", tcp6)
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
		{"IPv4 VIP on an IPv6 socket", one(8004), "<nil>"},
		{"all of several", one(80, 443, 8001, 8003), "<nil>"},
		{"loopback", one(25), "nobody listens on 25/tcp"},
		{"IPv6 loopback", one(8002), "nobody listens on 8002/tcp"},
		{"a connection", one(22), "nobody listens on 22/tcp"},
		{"being closed", one(8080), "nobody listens on 8080/tcp"},
		{"one of several", one(80, 81), "nobody listens on 81/tcp"},
		{"range", []PortRange{{8000, 8001}}, "<nil>"},
		{"range without", []PortRange{{8005, 8010}}, "nobody listens on 8005-8010/tcp"},
		{"one range of two", []PortRange{{8005, 8010}, {440, 450}}, "<nil>"},
		{"none of two", []PortRange{{8005, 8010}, {1, 9}}, "nobody listens on 8005-8010/tcp 1-9/tcp"},
		{"range opened when needed", append(one(80), PortRange{50000, 50100}), "<nil>"},
		{"range does not help", append(one(81), PortRange{80, 90}), "nobody listens on 81/tcp"},
	} {
		if got := fmt.Sprint(listen(dir, tt.ports, vips)); got != tt.want {
			t.Errorf("%s: listen(%v) = %q; want %q", tt.name, tt.ports, got, tt.want)
		}
	}
	os.Remove(filepath.Join(dir, "tcp6"))
	if err := listen(dir, one(80), vips); err != nil {
		t.Errorf("without IPv6: %v", err)
	}
	os.Remove(filepath.Join(dir, "tcp"))
	if err := listen(dir, one(80), vips); err == nil {
		t.Error("without any table all is well")
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

func FuzzParseListeners(f *testing.F) {
	f.Add([]byte(tcp4))
	f.Add([]byte(tcp6))
	f.Add([]byte(tcp4[:len(tcp4)/2]))
	f.Add([]byte("local_address\n: : : A\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		n := 0
		err := parseListeners(strings.NewReader(string(b)), func(a netip.AddrPort) {
			if n++; !a.IsValid() {
				t.Errorf("listener %v", a)
			}
		})
		if lines := strings.Count(string(b), "\n"); n > lines {
			t.Errorf("%d listeners in %d lines, %v", n, lines, err)
		}
	})
}
