package nethost

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"clonecluster/qemu/vswitch"
)

var (
	clientMAC = net.HardwareAddr{0x52, 0x54, 0, 0x77, 0xff, 1}
	serverMAC = net.HardwareAddr{0x52, 0x54, 0, 0x77, 0, 2}
)

func prefixes(s ...string) []netip.Prefix {
	var ps []netip.Prefix
	for _, p := range s {
		ps = append(ps, netip.MustParsePrefix(p))
	}
	return ps
}

// pair is two hosts on one switch; the server has 10.77.0.2 and fd77::2.
func pair(t *testing.T) (sw *vswitch.Switch, client, server *Host) {
	t.Helper()
	sw, err := vswitch.New(vswitch.Config{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { sw.Close() })
	attach := func(port string, cfg Config) *Host {
		h, err := Attach(sw, port, cfg)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(h.Close)
		return h
	}
	client = attach("client", Config{MAC: clientMAC, Addrs: prefixes("10.77.0.1/24", "10.77.0.11/24", "10.77.0.12/24", "fd77::1/64")})
	server = attach("server", Config{MAC: serverMAC, Addrs: prefixes("10.77.0.2/24", "fd77::2/64")})
	return sw, client, server
}

func timeout(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	t.Cleanup(cancel)
	return ctx
}

func serve(t *testing.T, h *Host, addr string) {
	t.Helper()
	ln, err := h.Listen(netip.MustParseAddrPort(addr))
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == "POST" {
			io.Copy(w, r.Body)
			return
		}
		host, _, _ := net.SplitHostPort(r.RemoteAddr)
		fmt.Fprint(w, host)
	})}
	go srv.Serve(ln)
	t.Cleanup(func() { srv.Close() })
}

func TestHTTPBothFamilies(t *testing.T) {
	_, client, server := pair(t)
	serve(t, server, "0.0.0.0:80")
	serve(t, server, "[::]:80")
	c := client.HTTPClient()
	defer c.CloseIdleConnections()
	for url, want := range map[string]string{"http://10.77.0.2/": "10.77.0.1", "http://[fd77::2]/": "fd77::1"} {
		r, err := c.Get(url)
		if err != nil {
			t.Fatal(err)
		}
		b, _ := io.ReadAll(r.Body)
		r.Body.Close()
		if string(b) != want {
			t.Errorf("GET %s came from %s; want %s", url, b, want)
		}
	}
	for _, a := range []string{"10.77.0.2", "fd77::2"} {
		if m := client.MACOf(netip.MustParseAddr(a)); !bytes.Equal(m, serverMAC) {
			t.Errorf("the client's cache has %v at %v; want %v", a, m, serverMAC)
		}
	}
	client.FlushNeighbors()
	if n := client.Neighbors(); len(n) != 0 {
		t.Errorf("neighbours after a flush = %v; want none", n)
	}
}

func TestSourceAddresses(t *testing.T) {
	_, client, server := pair(t)
	serve(t, server, "10.77.0.2:80")
	c := client.HTTPClient(netip.MustParseAddr("10.77.0.11"), netip.MustParseAddr("10.77.0.12"))
	c.Transport.(*http.Transport).DisableKeepAlives = true
	var got []string
	for range 4 {
		r, err := c.Get("http://10.77.0.2/")
		if err != nil {
			t.Fatal(err)
		}
		b, _ := io.ReadAll(r.Body)
		r.Body.Close()
		got = append(got, string(b))
	}
	if s := strings.Join(got, " "); s != "10.77.0.11 10.77.0.12 10.77.0.11 10.77.0.12" {
		t.Errorf("sources = %s; want them in turn", s)
	}
}

func TestPing(t *testing.T) {
	sw, client, _ := pair(t)
	for _, a := range []string{"10.77.0.2", "fd77::2"} {
		if _, err := client.Ping(timeout(t), netip.MustParseAddr(a)); err != nil {
			t.Error(err)
		}
	}
	if _, err := client.PingFrom(timeout(t), netip.MustParseAddr("10.77.0.12"), netip.MustParseAddr("10.77.0.2")); err != nil {
		t.Error(err)
	}
	// The first request is lost, the second is answered.
	if _, err := sw.AddRule(vswitch.Rule{At: vswitch.Egress, To: "server", Drop: true, Limit: 1}); err != nil {
		t.Fatal(err)
	}
	if rtt, err := client.Ping(timeout(t), netip.MustParseAddr("10.77.0.2")); err != nil || rtt > 900*time.Millisecond {
		t.Errorf("Ping = %v, %v; want the time of the second request", rtt, err)
	}
	if _, err := sw.AddRule(vswitch.Rule{At: vswitch.Ingress, From: "server", Drop: true}); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := client.Ping(ctx, netip.MustParseAddr("10.77.0.2")); err == nil {
		t.Error("a ping without an answer succeeded")
	}
}

// A megabyte each way, through the real loopback and the segment, over a switch
// that loses, doubles and reorders.
func TestForwardThroughABadNetwork(t *testing.T) {
	sw, client, server := pair(t)
	for _, r := range []vswitch.Rule{
		{Name: "loss", At: vswitch.Ingress, Drop: true, Probability: 0.005},
		{Name: "reorder", At: vswitch.Ingress, From: "server", Delay: time.Millisecond, Jitter: time.Millisecond, Probability: 0.05},
		{Name: "double", At: vswitch.Egress, Duplicate: 1, Probability: 0.01},
	} {
		if _, err := sw.AddRule(r); err != nil {
			t.Fatal(err)
		}
	}
	serve(t, server, "10.77.0.2:80")
	addr, err := client.Forward("127.0.0.1:0", netip.MustParseAddrPort("10.77.0.2:80"))
	if err != nil {
		t.Fatal(err)
	}
	body := bytes.Repeat([]byte("0123456789abcdef"), 1<<16)
	c := &http.Client{Timeout: 60 * time.Second}
	defer c.CloseIdleConnections()
	r, err := c.Post("http://"+addr.String()+"/", "application/octet-stream", bytes.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	defer r.Body.Close()
	if b, err := io.ReadAll(r.Body); err != nil || !bytes.Equal(b, body) {
		t.Errorf("got %d bytes back, %v; want the same %d", len(b), err, len(body))
	}
	if s := sw.Stats(); s.RuleDrop == 0 {
		t.Error("no frame was lost: the test tests nothing")
	}
}

func TestForwardToNobody(t *testing.T) {
	_, client, _ := pair(t)
	addr, err := client.Forward("127.0.0.1:0", netip.MustParseAddrPort("10.77.0.2:81"))
	if err != nil {
		t.Fatal(err)
	}
	conn, err := net.Dial("tcp", addr.String())
	if err == nil { // the reset may come before Dial returns
		defer conn.Close()
		conn.SetDeadline(time.Now().Add(30 * time.Second))
		_, err = conn.Read(make([]byte, 1))
	}
	if !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("Read = %v; want a reset, as from a closed port", err)
	}
}

func TestUDP(t *testing.T) {
	_, client, server := pair(t)
	pc, err := server.ListenPacket(netip.MustParseAddrPort("10.77.0.2:53"))
	if err != nil {
		t.Fatal(err)
	}
	defer pc.Close()
	c, err := client.DialContext(timeout(t), "udp", "10.77.0.2:53")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	pc.SetDeadline(time.Now().Add(30 * time.Second))
	c.SetDeadline(time.Now().Add(30 * time.Second))
	c.Write([]byte("hello"))
	buf := make([]byte, 100)
	n, from, err := pc.ReadFrom(buf)
	if err != nil || string(buf[:n]) != "hello" {
		t.Fatalf("server read %q, %v; want hello", buf[:n], err)
	}
	pc.WriteTo([]byte("back"), from)
	if n, err := c.Read(buf); err != nil || string(buf[:n]) != "back" {
		t.Errorf("client read %q, %v; want back", buf[:n], err)
	}
}

func TestDialErrors(t *testing.T) {
	_, client, _ := pair(t)
	for _, d := range []struct{ network, addr string }{
		{"tcp", "example.org:80"}, {"sctp", "10.77.0.2:80"}, {"tcp", "10.77.0.2:1"}, {"tcp", "192.0.2.1:80"},
	} {
		if c, err := client.DialContext(timeout(t), d.network, d.addr); err == nil {
			c.Close()
			t.Errorf("DialContext(%s, %s) succeeded", d.network, d.addr)
		}
	}
}

func TestConfigValidate(t *testing.T) {
	good := Config{MAC: clientMAC, Addrs: prefixes("10.77.0.1/24"), DHCP: &DHCP{First: netip.MustParseAddr("10.77.0.100"), Last: netip.MustParseAddr("10.77.0.199")}}
	if err := good.Validate(); err != nil {
		t.Fatal(err)
	}
	for name, mod := range map[string]func(*Config){
		"no MAC":       func(c *Config) { c.MAC = nil },
		"group MAC":    func(c *Config) { c.MAC = net.HardwareAddr{1, 0, 0, 0, 0, 0} },
		"zero address": func(c *Config) { c.Addrs = []netip.Prefix{{}} },
		"pool elsewhere": func(c *Config) {
			c.DHCP = &DHCP{First: netip.MustParseAddr("10.0.0.1"), Last: netip.MustParseAddr("10.77.0.2")}
		},
		"pool upside down": func(c *Config) {
			c.DHCP = &DHCP{First: netip.MustParseAddr("10.77.0.9"), Last: netip.MustParseAddr("10.77.0.2")}
		},
		"DHCP without IPv4": func(c *Config) {
			c.Addrs = prefixes("fd77::1/64")
		},
	} {
		c := good
		mod(&c)
		if c.Validate() == nil {
			t.Errorf("%s: Validate = nil; want an error", name)
		}
	}
}
