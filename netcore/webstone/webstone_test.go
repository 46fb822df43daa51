package webstone

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"math"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// TestHistogram: the percentiles are those of the sorted durations, within a bucket.
func TestHistogram(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	for name, draw := range map[string]func() time.Duration{
		"exponential": func() time.Duration { return time.Duration(random.ExpFloat64() * 3e6) },
		"wide":        func() time.Duration { return time.Duration(math.Exp(random.Float64() * 25)) },
		"few":         func() time.Duration { return time.Duration(random.IntN(3)) * time.Second },
		"tiny":        func() time.Duration { return time.Duration(random.IntN(300)) },
	} {
		var h, part Histogram
		var all []time.Duration
		var sum time.Duration
		for i := range 20_000 {
			d := draw()
			all, sum = append(all, d), sum+d
			if i%3 == 0 {
				part.Add(d)
			} else {
				h.Add(d)
			}
		}
		h.Merge(&part)
		data, err := json.Marshal(h)
		if err != nil {
			t.Fatal(err)
		}
		var again Histogram
		if err := json.Unmarshal(data, &again); err != nil {
			t.Fatal(err)
		}
		slices.Sort(all)
		for _, h := range []*Histogram{&h, &again} {
			for _, q := range []float64{0, .001, .5, .9, .99, .999, 1} {
				want := all[max(int(math.Ceil(q*float64(len(all))))-1, 0)]
				if got := h.Quantile(q); got < want || float64(got) > float64(want)*(1+1./128)+1 {
					t.Errorf("%s: quantile %v is %v; want %v or less than 1%% more", name, q, got, want)
				}
			}
			if mean := sum / time.Duration(len(all)); h.Max() != all[len(all)-1] || (h.Mean()-mean).Abs() > 1 || h.Count() != uint64(len(all)) {
				t.Errorf("%s: max %v, mean %v of %d; want %v, %v, %d", name, h.Max(), h.Mean(), h.Count(), all[len(all)-1], mean, len(all))
			}
		}
	}
	for _, d := range []time.Duration{0, 1, 127, 128, 255, 256, 257, 1 << 40, math.MaxInt64} {
		b := bucket(d)
		if most(b) < d || b > 0 && most(b-1) >= d {
			t.Errorf("%d is in bucket %d, which goes from %d to %d", d, b, most(max(b-1, 0))+1, most(b))
		}
	}
	if err := new(Histogram).UnmarshalJSON([]byte(`{"buckets":[[99999,1]]}`)); err == nil {
		t.Error("a bucket that there is not is taken")
	}
}

// TestMix: files come as often as their weights say, and the same ones of a seed.
func TestMix(t *testing.T) {
	const n = 200_000
	c, same, other := Standard.chooser(7, 3), Standard.chooser(7, 3), Standard.chooser(7, 4)
	counts, differ := make([]int, len(Standard.Files)), 0
	for range n {
		i := c.next()
		counts[i]++
		if i != same.next() {
			t.Fatal("a seed gives two sequences")
		}
		if i != other.next() {
			differ++
		}
	}
	if differ == 0 {
		t.Error("two clients ask for the same files")
	}
	// Chi-squared with four degrees of freedom: 18.5 is exceeded once in a thousand times.
	chi := 0.
	for i, f := range Standard.Files {
		want := n * float64(f.Weight) / 1000
		chi += (float64(counts[i]) - want) * (float64(counts[i]) - want) / want
	}
	if chi > 18.5 {
		t.Errorf("of %d files there came %v: chi squared %.1f", n, counts, chi)
	}
	if mean := Standard.Mean(); math.Abs(mean-19773) > 1 {
		t.Errorf("the mean is %.1f; want 19773", mean)
	}
	dir := t.TempDir()
	if err := WriteContent(dir); err != nil {
		t.Fatal(err)
	}
	for _, w := range Workloads() {
		for _, f := range w.Files {
			if fi, err := os.Stat(filepath.Join(dir, f.Name())); err != nil || fi.Size() != f.Size {
				t.Errorf("%s: %v, %v", f.Name(), fi, err)
			}
		}
	}
}

func TestParseHead(t *testing.T) {
	for _, tt := range []struct {
		in   string
		want head
		n    int
		err  string
	}{
		{"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello", head{200, 5, false}, 38, ""},
		{"HTTP/1.0 200\r\n\r\n", head{200, -1, true}, 16, ""},
		{"HTTP/1.0 200 OK\r\nconnection: Keep-Alive\r\n\r\n", head{200, -1, false}, 43, ""},
		{"HTTP/1.1 503 No\r\nConnection: close\r\ncontent-length:0\r\n\r\n", head{503, 0, true}, 56, ""},
		{"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n", head{}, 0, ""},
		{"HTT", head{}, 0, ""},
		{"SSH-2.0-x", head{}, 0, "begins with"},
		{"HTTP/1.1 2x0 OK\r\n\r\n", head{}, 0, "status"},
		{"HTTP/2 200\r\n\r\n", head{}, 0, "begins with"},
		{"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n", head{}, 0, "Content-Length"},
		{"HTTP/1.1 200 OK\r\nContent-Length: \r\n\r\n", head{}, 0, "Content-Length"},
		{"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n", head{}, 0, "Content-Length"},
		{"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", head{}, 0, "Transfer-Encoding"},
		{"HTTP/1.1 200 OK\r\n" + strings.Repeat("a", maxHead), head{}, 0, "no end"},
	} {
		h, n, err := parseHead([]byte(tt.in))
		if tt.err != "" {
			if err == nil || !strings.Contains(err.Error(), tt.err) || kindOf(err) != Protocol {
				t.Errorf("%.40q: error %v; want one with %q", tt.in, err, tt.err)
			}
		} else if err != nil || n != tt.n || n > 0 && h != tt.want {
			t.Errorf("%.40q = %+v, %d, %v; want %+v, %d", tt.in, h, n, err, tt.want, tt.n)
		}
	}
}

// FuzzParseHead compares with net/http what both take.
func FuzzParseHead(f *testing.F) {
	for _, s := range []string{"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello", "HTTP/1.0 404 x\r\nConnection: close\r\n\r\n", "HTTP/1.1 200 OK\r\n\r\n", "HTTP/"} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		h, n, err := parseHead(b)
		if n < 0 || n > len(b) || err != nil && n != 0 || h.length < -1 {
			t.Fatalf("%q: %+v, %d, %v", b, h, n, err)
		}
		if n == 0 {
			return
		}
		theirs, err := http.ReadResponse(bufio.NewReader(bytes.NewReader(b)), &http.Request{Method: http.MethodHead})
		if err != nil {
			return // stricter than this
		}
		if theirs.StatusCode != h.status || theirs.ContentLength >= 0 && theirs.Header.Get("Content-Length") != "" && theirs.ContentLength != h.length {
			t.Errorf("%q: %+v; net/http has %d, %d", b, h, theirs.StatusCode, theirs.ContentLength)
		}
		_, _, _ = readAnswer(bytes.NewReader(b), make([]byte, maxHead), 5, true)
	})
}

// serve gives the address of a listener whose connections a function answers.
func serve(t *testing.T, answer func(net.Conn)) netip.AddrPort {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var working sync.WaitGroup
	working.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			working.Go(func() { defer c.Close(); answer(c) })
		}
	})
	t.Cleanup(func() { l.Close(); working.Wait() })
	return netip.MustParseAddrPort(l.Addr().String())
}

// asked reads a request; false at the end.
func asked(c net.Conn) bool {
	var got []byte
	b := make([]byte, 1024)
	for !bytes.HasSuffix(got, []byte("\r\n\r\n")) {
		n, err := c.Read(b)
		if err != nil {
			return false
		}
		got = append(got, b[:n]...)
	}
	return true
}

var tiny = Workload{"tiny", "", []File{{5, 1}}}

func config(target netip.AddrPort) Config {
	return Config{Target: target, Prefix: "/", Workload: tiny, Clients: 4, Timeout: 200 * time.Millisecond,
		WarmUp: 20 * time.Millisecond, Window: 150 * time.Millisecond, Windows: 2, Seed: 1}
}

func measure(t *testing.T, cfg Config) *Result {
	t.Helper()
	r, err := Run(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

const right = "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n12345"

// TestErrors: what servers do wrong is called by its name.
func TestErrors(t *testing.T) {
	say := func(text string) func(net.Conn) {
		return func(c net.Conn) {
			if asked(c) {
				io.WriteString(c, text)
			}
		}
	}
	closed, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	closed.Close()
	for _, tt := range []struct {
		kind   Kind
		answer func(net.Conn)
	}{
		{"", say(right)},
		{Refused, nil},
		{Reset, func(c net.Conn) {
			if asked(c) {
				io.WriteString(c, right[:len(right)-2])
				_ = c.(*net.TCPConn).SetLinger(0)
			}
		}},
		{Timeout, func(c net.Conn) { asked(c); asked(c) }},
		{Short, say(right[:len(right)-2])},
		{Short, say("")},
		{Status, say("HTTP/1.1 503 Busy\r\nContent-Length: 5\r\n\r\n12345")},
		{Protocol, say("HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\n123456")},
		{Protocol, say("HTTP/1.1 200 OK\r\n\r\n123456")},
		{Protocol, say(right + "6")},
		{Protocol, say("220 mail.example ESMTP\r\n")},
	} {
		target := netip.MustParseAddrPort(closed.Addr().String())
		if tt.answer != nil {
			target = serve(t, tt.answer)
		}
		cfg := config(target)
		if tt.kind == Timeout {
			cfg.Window *= 2
		}
		w := measure(t, cfg).Total()
		if tt.kind == "" {
			if w.Requests == 0 || w.Failed() > 0 || w.Bytes != 5*w.Requests || w.Latency.Count() != w.Requests || w.Connect.Count() != w.Requests {
				t.Errorf("a good server: %d answers of %d octets, %d latencies, %d connections, errors %v", w.Requests, w.Bytes, w.Latency.Count(), w.Connect.Count(), w.Examples)
			}
			continue
		}
		if w.Requests > 0 || w.Failed() == 0 || w.Errors[tt.kind] != w.Failed() || w.Examples[tt.kind] == "" {
			t.Errorf("%s: %d answers, errors %v %v", tt.kind, w.Requests, w.Errors, w.Examples)
		}
	}
}

// TestKeepAlive: a client keeps its connection, and asks again on another one if the server
// has closed it.
func TestKeepAlive(t *testing.T) {
	for _, each := range []int{1 << 30, 3} {
		var conns atomic.Int64
		cfg := config(serve(t, func(c net.Conn) {
			conns.Add(1)
			for n := 0; n < each && asked(c); n++ {
				io.WriteString(c, right)
			}
		}))
		cfg.KeepAlive = true
		w := measure(t, cfg).Total()
		if w.Requests < 10 || w.Failed() > 0 {
			t.Fatalf("%d answers, errors %v", w.Requests, w.Examples)
		}
		if n := conns.Load(); each > 3 && n != 4 || each == 3 && w.Reconnects == 0 {
			t.Errorf("%d connections, %d of them anew, for %d requests: each has %d", n, w.Reconnects, w.Requests, each)
		}
	}
}

// TestTLS: over TLS each request has a handshake of its own, or each client with keep-alive;
// who speaks no TLS is told of.
func TestTLS(t *testing.T) {
	var handshakes, resumed atomic.Int64
	server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "12345") }))
	server.TLS = &tls.Config{VerifyConnection: func(s tls.ConnectionState) error {
		handshakes.Add(1)
		if s.DidResume {
			resumed.Add(1)
		}
		return nil
	}}
	server.Config.ErrorLog = log.New(io.Discard, "", 0) // of clients that are interrupted
	server.StartTLS()
	defer server.Close()
	cfg := config(netip.MustParseAddrPort(server.Listener.Addr().String()))
	cfg.TLS, cfg.Timeout = true, 5*time.Second
	r := measure(t, cfg).Total()
	if n := handshakes.Swap(0); r.Requests == 0 || r.Failed() > 0 || uint64(n) < r.Requests || resumed.Load() > 0 {
		t.Errorf("%d answers, %d handshakes, %d of them resumed, errors %v", r.Requests, n, resumed.Load(), r.Examples)
	}
	cfg.KeepAlive = true
	r = measure(t, cfg).Total()
	// One of before may be counted late.
	if n := handshakes.Load(); r.Requests == 0 || r.Failed() > 0 || n > 2*int64(cfg.Clients) {
		t.Errorf("with keep-alive: %d answers, %d handshakes of %d clients, errors %v", r.Requests, n, cfg.Clients, r.Examples)
	}
	cfg.Target = serve(t, func(c net.Conn) { _, _ = io.WriteString(c, right) })
	if r = measure(t, cfg).Total(); r.Requests > 0 || r.Errors[Protocol] == 0 || len(r.Errors) > 1 {
		t.Errorf("without TLS: %d answers, %v %v", r.Requests, r.Errors, r.Examples)
	}
}

// TestLittle: of a closed loop all clients are under way, however long an answer takes.
func TestLittle(t *testing.T) {
	cfg := config(serve(t, func(c net.Conn) {
		if asked(c) {
			// Long beside what a client waits for the processor between two requests.
			time.Sleep(time.Duration(40+time.Now().UnixNano()%20) * time.Millisecond)
			io.WriteString(c, right)
		}
	}))
	cfg.Clients, cfg.Timeout, cfg.Window = 20, 5*time.Second, 400*time.Millisecond
	r := measure(t, cfg)
	for _, w := range r.Windows {
		if load := w.Load(); load < 18 || load > 20.01 {
			t.Errorf("Little's load is %.2f; want about 20", load)
		}
		if product := w.Rate() * w.Latency.Mean().Seconds(); math.Abs(product-w.Load()) > 2 {
			t.Errorf("rate by mean latency is %.2f, the load %.2f", product, w.Load())
		}
	}
}

// stalling answers at once, except that it stands still once for a while.
func stalling(t *testing.T, after, stall time.Duration) netip.AddrPort {
	begin := time.Now()
	return serve(t, func(c net.Conn) {
		for asked(c) {
			if at := time.Since(begin); at > after && at < after+stall {
				time.Sleep(after + stall - at)
			}
			io.WriteString(c, right)
		}
	})
}

// TestCoordinatedOmission: a server stands still for half of the time. In the closed loop
// that is one slow request for each client; whoever comes at a rate knows it.
func TestCoordinatedOmission(t *testing.T) {
	const window, stall = time.Second, 500 * time.Millisecond
	run := func(rate float64, constant bool) *Window {
		cfg := config(stalling(t, 200*time.Millisecond, stall))
		cfg.KeepAlive, cfg.Clients, cfg.Timeout, cfg.WarmUp, cfg.Window, cfg.Windows = true, 2, 5*time.Second, 0, window, 1
		cfg.Rate, cfg.Constant = rate, constant
		return measure(t, cfg).Total()
	}
	if w := run(0, false); w.Latency.Quantile(.99) > 100*time.Millisecond || w.Latency.Max() < 300*time.Millisecond {
		t.Errorf("closed loop: p99 %v, max %v; want it to hide the stall in its p99", w.Latency.Quantile(.99), w.Latency.Max())
	}
	for _, constant := range []bool{true, false} {
		w := run(400, constant)
		// Of the requests of a second a half came while it stood still, and waited for half of that on average.
		if n := w.Latency.Count(); n < 330 || n > 470 || constant && n != 399 {
			t.Errorf("constant %v: %d requests in a second; want 400", constant, n)
		}
		if p := w.Latency.Quantile(.75); p < stall/4 || p > stall*3/4 {
			t.Errorf("constant %v: p75 %v; want about half of the stall", constant, p)
		}
		if w.Late == 0 {
			t.Errorf("constant %v: no request began late", constant)
		}
	}
}

// TestOverload: what comes too fast is not hidden either: it times out.
func TestOverload(t *testing.T) {
	cfg := config(serve(t, func(c net.Conn) {
		if asked(c) {
			time.Sleep(20 * time.Millisecond)
			io.WriteString(c, right)
		}
	}))
	cfg.Clients, cfg.Rate, cfg.Windows, cfg.Window = 2, 1000, 1, 600*time.Millisecond
	begin := time.Now()
	w := measure(t, cfg).Total()
	if all := w.Latency.Count() + w.Failed(); w.Errors[Timeout] < all/2 || all < 500 || all > 700 {
		t.Errorf("%d answers in time, errors %v; want 600, most of them timed out", w.Latency.Count(), w.Errors)
	}
	if w.Rate() > 130 {
		t.Errorf("%.0f requests a second of a server that can do 100", w.Rate())
	}
	if took := time.Since(begin); took > 3*time.Second {
		t.Errorf("it took %v", took)
	}
}

func TestInterrupted(t *testing.T) {
	for _, rate := range []float64{0, 100} {
		cfg := config(serve(t, func(c net.Conn) {
			if asked(c) {
				time.Sleep(20 * time.Millisecond)
				io.WriteString(c, right)
			}
		}))
		cfg.Window, cfg.Timeout, cfg.Rate = time.Minute, time.Minute, rate
		ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
		begin := time.Now()
		r, err := Run(ctx, cfg)
		cancel()
		if !errors.Is(err, context.DeadlineExceeded) || !r.Interrupted || len(r.Windows) != 1 || time.Since(begin) > 2*time.Second {
			t.Fatalf("%v: %d windows, interrupted %v, after %v", err, len(r.Windows), r.Interrupted, time.Since(begin))
		}
		if w := r.Windows[0]; w.Requests == 0 || w.Failed() > 0 || w.Seconds < .2 || w.Seconds > 1 {
			t.Errorf("%d answers in %.2f s, errors %v", w.Requests, w.Seconds, w.Examples)
		}
	}
}

func TestConfig(t *testing.T) {
	good := config(netip.MustParseAddrPort("127.0.0.1:80"))
	for name, spoil := range map[string]func(*Config){
		"target":  func(c *Config) { c.Target = netip.AddrPort{} },
		"prefix":  func(c *Config) { c.Prefix = "x" },
		"spaces":  func(c *Config) { c.Host = "a\r\nb" },
		"clients": func(c *Config) { c.Clients = 0 },
		"window":  func(c *Config) { c.Window = 0 },
		"rate":    func(c *Config) { c.Rate = -1 },
		"source":  func(c *Config) { c.Sources = []netip.Addr{netip.MustParseAddr("::1")} },
		"files":   func(c *Config) { c.Workload = Workload{} },
	} {
		c := good
		if spoil(&c); c.validate() == nil {
			t.Errorf("%s: %+v is taken", name, c)
		}
	}
	if err := good.validate(); err != nil {
		t.Error(err)
	}
}

// TestSources: clients have the addresses that they are given, in turn.
func TestSources(t *testing.T) {
	var mu sync.Mutex
	seen := map[string]bool{}
	cfg := config(serve(t, func(c net.Conn) {
		mu.Lock()
		seen[c.RemoteAddr().(*net.TCPAddr).IP.String()] = true
		mu.Unlock()
		if asked(c) {
			io.WriteString(c, right)
		}
	}))
	cfg.Sources = []netip.Addr{netip.MustParseAddr("127.0.0.2"), netip.MustParseAddr("127.0.0.3")}
	if w := measure(t, cfg).Total(); w.Failed() > 0 {
		t.Fatal(w.Examples)
	}
	if len(seen) != 2 || !seen["127.0.0.2"] || !seen["127.0.0.3"] {
		t.Errorf("the server has seen %v", seen)
	}
}

// BenchmarkRequest compares the processor time of a request, the server's in it, with that
// of net/http. What it says led to the former.
func BenchmarkRequest(b *testing.B) {
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Length", "2000")
		w.Write(make([]byte, 2000))
	}))
	defer srv.Close()
	for _, keep := range []bool{false, true} {
		cfg := config(netip.MustParseAddrPort(srv.Listener.Addr().String()))
		cfg.Workload, cfg.KeepAlive = Small, keep
		b.Run(fmt.Sprintf("own/keep-alive=%v", keep), func(b *testing.B) {
			r := &run{cfg: cfg, heads: requests(&cfg), begin: time.Now()}
			r.cfg.Timeout = time.Hour
			c := &client{run: r, files: Small.chooser(1, 1), buf: make([]byte, bufferSize)}
			c.dialer.KeepAlive = -1
			defer c.hangUp()
			used := processors()
			for b.Loop() {
				var t try
				t.size = 2000
				if c.request(b.Context(), &t, 0); t.err != nil {
					b.Fatal(t.err)
				}
			}
			b.ReportMetric(float64(processors()-used)/float64(b.N), "cpu-ns/op")
		})
		b.Run(fmt.Sprintf("net-http/keep-alive=%v", keep), func(b *testing.B) {
			client := &http.Client{Transport: &http.Transport{DisableKeepAlives: !keep, DisableCompression: true}}
			used := processors()
			for b.Loop() {
				res, err := client.Get(srv.URL + "/" + strconv.Itoa(2000))
				if err != nil {
					b.Fatal(err)
				}
				io.Copy(io.Discard, res.Body)
				res.Body.Close()
			}
			b.ReportMetric(float64(processors()-used)/float64(b.N), "cpu-ns/op")
		})
	}
}
