package crowd

import (
	"context"
	"crypto/sha256"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"clonecluster/qemu/nethost"
	"clonecluster/qemu/vswitch"
)

const size = 8 << 20

// content is what the servers of these tests send.
var content = []byte(strings.Repeat("clonecluster ", size/13+1)[:size])

// bed is a client and a server on a switch. The server has the target's address.
type bed struct {
	sw     *vswitch.Switch
	client *nethost.Host
	crowd  *Crowd
}

func newBed(t *testing.T, cfg Config) *bed {
	t.Helper()
	sw, err := vswitch.New(vswitch.Config{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { sw.Close() })
	b := &bed{sw: sw}
	b.client = b.attach(t, "client", "10.77.0.1/24", 1)
	cfg.Host, cfg.Switch, cfg.Target = b.client, sw, vip
	b.crowd = New(cfg)
	t.Cleanup(b.crowd.Close)
	return b
}

func (b *bed) attach(t *testing.T, port, addr string, id byte) *nethost.Host {
	t.Helper()
	h, err := nethost.Attach(b.sw, port, nethost.Config{
		MAC: net.HardwareAddr{0x52, 0x54, 0, 0x77, 0, id}, Addrs: []netip.Prefix{netip.MustParsePrefix(addr)},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(h.Close)
	return h
}

// serve starts a server on a port of the switch. The servers of one bed have the
// same addresses: only one may be connected.
func (b *bed) serve(t *testing.T, port string, listen bool) {
	t.Helper()
	h := b.attach(t, port, "10.77.0.10/24", 10)
	if !listen {
		return
	}
	ln, err := h.Listen(vip)
	if err != nil {
		t.Fatal(err)
	}
	mux := http.NewServeMux()
	mux.HandleFunc("/whoami", func(w http.ResponseWriter, r *http.Request) {})
	mux.HandleFunc("/bench/8M", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Length", strconv.Itoa(size))
		w.Write(content)
	})
	mux.HandleFunc("/bench/cut", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Length", strconv.Itoa(size))
		w.Write(content[:1<<20])
		panic(http.ErrAbortHandler)
	})
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set(nodeHeader, port)
		mux.ServeHTTP(w, r)
	})}
	go srv.Serve(ln)
	t.Cleanup(func() { srv.Close() })
}

// cut takes a server off the switch without its knowing.
func (b *bed) cut(port string) {
	ports := b.sw.Ports()
	ports[slices.IndexFunc(ports, func(p *vswitch.Port) bool { return p.Name() == port })].Cut()
}

func within(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	t.Cleanup(cancel)
	return ctx
}

func TestAsk(t *testing.T) {
	var told atomic.Int32
	enough := make(chan struct{})
	b := newBed(t, Config{OnRequest: func(Request) {
		if told.Add(1) == 50 {
			close(enough)
		}
	}})
	b.serve(t, "node1", true)
	a := b.crowd.Ask(t.Context(), 5*time.Millisecond)
	<-enough
	all := a.Stop()
	if int(told.Load()) != len(all) || len(all) < 50 {
		t.Errorf("%d requests, %d told of; want at least 50 and the same", len(all), told.Load())
	}
	for _, r := range all {
		if r.Err != nil || r.Node != "node1" || r.Attempt.Holder() != "node1" || r.Attempt.SYNs != 1 ||
			r.Connected.Before(r.Begin) || r.End.Before(r.Connected) {
			t.Fatalf("request: %+v; want an answer of node1", r)
		}
	}
	if d := b.crowd.Doubles(); len(d) > 0 {
		t.Errorf("doubles: %+v", d)
	}
}

// A SYN that is lost is sent again, and its loss is on record.
func TestLostSYN(t *testing.T) {
	b := newBed(t, Config{})
	b.serve(t, "node1", true)
	if r := b.crowd.request(within(t)); r.Err != nil {
		t.Fatal(r.Err) // and the client has the server's address from now on
	}
	_, err := b.sw.AddRule(vswitch.Rule{At: vswitch.Egress, To: "node1", Drop: true, Limit: 1,
		Match: func(f []byte) bool { s, ok := parseSYN(f); return ok && !s.ack }})
	if err != nil {
		t.Fatal(err)
	}
	r := b.crowd.request(within(t))
	if r.Err != nil || r.Attempt.SYNs != 2 || r.Attempt.Lost.Before(r.Begin) || r.Connected.Sub(r.Attempt.Lost) < 500*time.Millisecond {
		t.Errorf("request: %+v; want an answer at the second SYN", r)
	}
}

func TestNobodyAnswers(t *testing.T) {
	b := newBed(t, Config{Timeout: 300 * time.Millisecond})
	r := b.crowd.request(within(t))
	if r.Err == nil || !r.Connected.IsZero() || r.Attempt.Holder() != "" {
		t.Errorf("request: %+v; want an error without a connection", r)
	}
	// What is given up is not recorded.
	ctx, cancel := context.WithCancel(t.Context())
	a := b.crowd.Ask(ctx, time.Millisecond)
	time.Sleep(20 * time.Millisecond) // some are in flight, and none has ended
	cancel()
	if all := a.Stop(); len(all) > 0 {
		t.Errorf("recorded: %+v", all)
	}
}

func TestDownload(t *testing.T) {
	b := newBed(t, Config{})
	b.serve(t, "node1", true)
	right := DownloadConfig{Path: "/bench/8M", Size: size, Sum: sha256.Sum256(content), Rate: 100_000, Chatter: 10 * time.Millisecond}
	for _, tt := range []struct {
		name string
		mod  func(*DownloadConfig)
		want string
	}{
		{"right", func(*DownloadConfig) {}, ""},
		{"without chatter", func(c *DownloadConfig) { c.Chatter = 0 }, ""},
		{"other bytes", func(c *DownloadConfig) { c.Sum[0]++ }, "wrong bytes"},
		{"broken off", func(c *DownloadConfig) { c.Path, c.Chatter = "/bench/cut", 0 }, "after "},
	} {
		cfg := right
		tt.mod(&cfg)
		d, err := b.crowd.Download(within(t), cfg)
		if err != nil {
			t.Fatalf("%s: %v", tt.name, err)
		}
		if d.Node() != "node1" || d.Holder() != "node1" {
			t.Errorf("%s: node %q, holder %q; want node1", tt.name, d.Node(), d.Holder())
		}
		if _, _, ended := d.Ended(); ended {
			t.Errorf("%s: ended at once, though it is slow", tt.name)
		}
		d.Hurry()
		if err := d.Wait(within(t)); (err == nil) != (tt.want == "") || err != nil && !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: Wait = %v; want %q", tt.name, err, tt.want)
		}
	}
	missing := right
	missing.Path = "/nothing"
	if d, err := b.crowd.Download(within(t), missing); err == nil {
		t.Errorf("downloading a file that is not there: %+v", d)
	}
}

// A client that talks learns from the next one with the same address that its
// server has died, though its buffer is full of data that it has not taken.
func TestDownloadOfTheDead(t *testing.T) {
	b := newBed(t, Config{})
	b.serve(t, "node1", true)
	cfg := DownloadConfig{Path: "/bench/8M", Size: size, Rate: 10_000, Chatter: 50 * time.Millisecond}
	d, err := b.crowd.Download(within(t), cfg)
	if err != nil {
		t.Fatal(err)
	}
	b.cut("node1")
	cut := time.Now()
	b.serve(t, "node2", false)
	if err := d.Wait(within(t)); err == nil || !strings.Contains(err.Error(), "sending") {
		t.Errorf("Wait = %v; want a reset when sending", err)
	}
	at, _, _ := d.Ended()
	t.Logf("the client knew after %v", at.Sub(cut))
}
