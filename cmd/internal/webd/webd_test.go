package webd

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// long is how long an event may take on a loaded machine before a test fails.
const long = 20 * time.Second

func testOptions(t *testing.T) Options {
	return Options{
		Node:      "52:54:00:77:00:01",
		Hostname:  "demo-770001",
		IdleGrace: time.Millisecond,
		Logger:    slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelWarn})),
	}
}

// site makes a content directory, with a secret beside it.
func site(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	for name, data := range map[string]string{
		"secret":                  "not yours",
		"www/index.html":          "<h1>home</h1>",
		"www/docs/index.html":     "<h1>docs</h1>",
		"www/docs/a b.txt":        "spaces",
		"www/empty/.keep":         "",
		"www/.git/config":         "hidden",
		"www/.well-known/x.txt":   "known",
		"www/big.bin":             strings.Repeat("0123456789abcdef", 20_000),
		"www/docs/deep/.htaccess": "hidden",
	} {
		file := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, []byte(data), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink("../secret", filepath.Join(dir, "www/out")); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("index.html", filepath.Join(dir, "www/home.html")); err != nil {
		t.Fatal(err)
	}
	return filepath.Join(dir, "www")
}

func newServer(t *testing.T, opt Options) *Server {
	t.Helper()
	s, err := New(opt)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

// start runs a server on loopback until the test ends or stop is called; stop
// returns what Run returned.
func start(t *testing.T, opt Options) (addr string, stop func() error) {
	t.Helper()
	s := newServer(t, opt)
	ctx, cancel := context.WithCancel(context.Background())
	l, err := Listen(ctx, "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx, l) }()
	stopped := false
	stop = func() error {
		cancel()
		if stopped {
			return nil
		}
		stopped = true
		select {
		case err := <-done:
			return err
		case <-time.After(long):
			return errors.New("Run did not return")
		}
	}
	t.Cleanup(func() { stop() })
	return l.Addr().String(), stop
}

func TestAnswers(t *testing.T) {
	opt := testOptions(t)
	opt.Content = site(t)
	opt.MaxBench = 1e6
	h := newServer(t, opt).Handler()
	for _, tc := range []struct {
		method, path string
		status       int
		body         string // "" means any
		header       map[string]string
	}{
		{"GET", "/", 200, "<h1>home</h1>", map[string]string{"Content-Type": "text/html; charset=utf-8", "Last-Modified": ""}},
		{"GET", "/docs/", 200, "<h1>docs</h1>", nil},
		{"GET", "/docs", 301, "", map[string]string{"Location": "./docs/"}},
		{"GET", "/docs/a%20b.txt", 200, "spaces", nil},
		{"GET", "/home.html", 200, "<h1>home</h1>", nil},
		{"GET", "/.well-known/x.txt", 200, "known", nil},
		{"GET", "/empty/", 404, "", nil},
		{"GET", "/empty", 301, "", nil},
		{"GET", "/none", 404, "", nil},
		{"GET", "/index.html/", 404, "", nil},
		{"GET", "/.git/config", 404, "", nil},
		{"GET", "/docs/deep/.htaccess", 404, "", nil},
		{"GET", "/out", 404, "", nil},
		{"GET", "/..%2fsecret", 404, "", nil},
		{"GET", "/docs%2f..%2f..%2fsecret", 404, "", nil},
		{"GET", "/a%00b", 404, "", nil},
		{"GET", "/" + strings.Repeat("x", 5000), 404, "", nil},
		{"GET", "/healthz", 200, "ok\n", map[string]string{"Cache-Control": "no-store"}},
		{"POST", "/", 405, "", map[string]string{"Allow": "GET, HEAD"}},
		{"DELETE", "/whoami", 405, "", nil},
		{"PUT", "/bench/500", 405, "", nil},
		{"HEAD", "/bench/500", 200, "", map[string]string{"Content-Length": "500"}},
		{"GET", "/bench/1000001", 404, "", nil},
		{"GET", "/bench/1M", 200, "", map[string]string{"Content-Length": "1000000", "Accept-Ranges": "bytes", "ETag": `"bench-1000000"`}},
		{"GET", "/bench/-1", 404, "", nil},
		{"GET", "/bench/0", 200, "", map[string]string{"Content-Length": "0"}},
		{"GET", "/bench/", 404, "", nil},
		{"GET", "/bench/1/2", 404, "", nil},
	} {
		t.Run(tc.method+" "+tc.path[:min(len(tc.path), 40)], func(t *testing.T) {
			w := httptest.NewRecorder()
			h.ServeHTTP(w, httptest.NewRequest(tc.method, tc.path, nil))
			if w.Code != tc.status {
				t.Fatalf("%s %s = %d %q; want %d", tc.method, tc.path, w.Code, w.Body, tc.status)
			}
			if tc.body != "" && w.Body.String() != tc.body {
				t.Errorf("body = %q; want %q", w.Body, tc.body)
			}
			if strings.Contains(w.Body.String(), "not yours") {
				t.Error("the file outside the content directory was served")
			}
			for k, want := range tc.header {
				if got := w.Header().Get(k); got != want {
					t.Errorf("%s = %q; want %q", k, got, want)
				}
			}
			for k, want := range map[string]string{"X-Content-Type-Options": "nosniff", "Clonecluster-Node": opt.Node} {
				if got := w.Header().Get(k); got != want {
					t.Errorf("%s = %q; want %q", k, got, want)
				}
			}
		})
	}
}

// A path with two slashes must not become a redirect to another host.
func TestRedirectStaysHere(t *testing.T) {
	opt := testOptions(t)
	opt.Content = site(t)
	addr, _ := start(t, opt)
	for _, p := range []string{"//docs", "//example.net/..", "/\\example.net", "//docs/../docs"} {
		c := dial(t, addr)
		fmt.Fprintf(c, "GET %s HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", p)
		resp, err := http.ReadResponse(bufio.NewReader(c), nil)
		if err != nil {
			t.Fatal(err)
		}
		if loc := resp.Header.Get("Location"); strings.HasPrefix(loc, "//") || strings.Contains(loc, ":") || strings.HasPrefix(loc, "/\\") {
			t.Errorf("GET %s redirects to %q", p, loc)
		}
	}
}

func TestWhoami(t *testing.T) {
	addr, _ := start(t, testOptions(t))
	var got struct {
		Node, Hostname, Remote, Local, Proto string
		Uptime                               *float64 `json:"uptime_seconds"`
		Since                                time.Time
		Requests                             uint64
	}
	for i := range 3 {
		http.Get("http://" + addr + "/healthz") // not counted
		resp, err := http.Get("http://" + addr + "/whoami")
		if err != nil {
			t.Fatal(err)
		}
		b, _ := io.ReadAll(resp.Body)
		resp.Body.Close()
		if err := json.Unmarshal(b, &got); err != nil {
			t.Fatalf("%s: %v", b, err)
		}
		if want := uint64(i + 1); got.Requests != want {
			t.Errorf("requests = %d; want %d", got.Requests, want)
		}
		if resp.Header.Get("Cache-Control") != "no-store" || resp.Header.Get("Content-Type") != "application/json" {
			t.Errorf("header = %v", resp.Header)
		}
	}
	if got.Node != "52:54:00:77:00:01" || got.Hostname != "demo-770001" || got.Proto != "HTTP/1.1" || got.Local != addr ||
		!strings.HasPrefix(got.Remote, "127.0.0.1:") || got.Uptime == nil || time.Since(got.Since) > time.Hour {
		t.Errorf("/whoami = %+v", got)
	}
}

// Without content the page names the node, escaped, and cannot run anything.
func TestIndexPage(t *testing.T) {
	opt := testOptions(t)
	opt.Hostname = "<script>alert(1)</script>"
	opt.Content = filepath.Join(t.TempDir(), "absent")
	h := newServer(t, opt).Handler()
	w := httptest.NewRecorder()
	h.ServeHTTP(w, httptest.NewRequest("GET", "/", nil))
	page := w.Body.String()
	if w.Code != 200 || !strings.Contains(page, opt.Node) || !strings.Contains(page, "192.0.2.1:1234") {
		t.Errorf("page = %d %s", w.Code, page)
	}
	if strings.Contains(page, "<script>") {
		t.Error("the hostname is not escaped")
	}
	if csp := w.Header().Get("Content-Security-Policy"); !strings.HasPrefix(csp, "default-src 'none'") {
		t.Errorf("Content-Security-Policy = %q", csp)
	}
}

// Any part of a generated or real file, from any node, is the same part.
func TestRanges(t *testing.T) {
	opt := testOptions(t)
	opt.Content = site(t)
	addr, _ := start(t, opt)
	other, _ := start(t, opt)
	for _, p := range []string{"/bench/300000", "/big.bin"} {
		whole, tag := fetch(t, addr, p, "", 200)
		if p == "/bench/300000" && len(whole) != 300000 {
			t.Fatalf("%s: %d bytes", p, len(whole))
		}
		for _, r := range [][2]int{{0, 0}, {65520, 65522}, {65535, 131073}, {131072, 299999}, {7, 250000}} {
			part, tag2 := fetch(t, other, p, fmt.Sprintf("bytes=%d-%d", r[0], r[1]), 206)
			if !bytes.Equal(part, whole[r[0]:r[1]+1]) {
				t.Errorf("%s bytes %d-%d differ from the same part of the whole", p, r[0], r[1])
			}
			if tag2 != tag || tag == "" {
				t.Errorf("%s: tags %q and %q from two nodes", p, tag, tag2)
			}
		}
		fetch(t, addr, p, "bytes=99999999-", 416)
	}
}

func fetch(t *testing.T, addr, path, rng string, status int) ([]byte, string) {
	t.Helper()
	r, _ := http.NewRequest("GET", "http://"+addr+path, nil)
	if rng != "" {
		r.Header.Set("Range", rng)
	}
	resp, err := http.DefaultClient.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatalf("GET %s: %v", path, err)
	}
	if resp.StatusCode != status {
		t.Fatalf("GET %s %s = %s; want %d", path, rng, resp.Status, status)
	}
	return b, resp.Header.Get("ETag")
}

func TestSendingAllocatesNothingPerByte(t *testing.T) {
	addr, _ := start(t, testOptions(t))
	get := func() {
		resp, err := http.Get("http://" + addr + "/bench/20M")
		if err != nil {
			t.Fatal(err)
		}
		if n, err := io.Copy(io.Discard, resp.Body); n != 20e6 || err != nil {
			t.Fatalf("read %d bytes: %v", n, err)
		}
		resp.Body.Close()
	}
	get()
	r := testing.Benchmark(func(b *testing.B) {
		for b.Loop() {
			get()
		}
	})
	if per := r.AllocedBytesPerOp(); per > 1<<20 {
		t.Errorf("20 MB cost %d bytes of allocations", per)
	}
}

func FuzzParseSize(f *testing.F) {
	for _, s := range []string{"", "0", "500", "5125", "51k", "1M", "1G", "2G", "k", "00", "01", "+1", "-1", "1e3", "９", "999999999999999999", "9223372036854775808", "99999999999999999G", "1 k", "1kk"} {
		f.Add(s, int64(1e9))
	}
	f.Add("0", int64(-1))
	f.Add("0k", int64(-1))
	f.Add("9223372036854775k", int64(1<<62))
	f.Fuzz(func(t *testing.T, s string, limit int64) {
		n, err := parseSize(s, limit)
		if err != nil {
			return
		}
		if n < 0 || n > limit {
			t.Fatalf("parseSize(%q, %d) = %d", s, limit, n)
		}
		unit := map[byte]string{'k': "000", 'M': "000000", 'G': "000000000"}[s[len(s)-1]]
		want := strings.TrimRight(s, "kMG") + unit
		if strings.HasPrefix(want, "0") {
			want = "0"
		}
		if got := fmt.Sprint(n); got != want {
			t.Fatalf("parseSize(%q) = %s; want %s", s, got, want)
		}
	})
}

func TestParseSize(t *testing.T) {
	for s, want := range map[string]int64{"0": 0, "500": 500, "51k": 51000, "1M": 1e6, "1G": 1e9, "1000000000": 1e9,
		"1000000001": -1, "2G": -1, "": -1, "k": -1, "01": -1, "1.5k": -1, "1K": -1, "0x10": -1, "99999999999999999999": -1} {
		got, err := parseSize(s, 1e9)
		if err != nil {
			got = -1
		}
		if got != want {
			t.Errorf("parseSize(%q) = %d, %v; want %d", s, got, err, want)
		}
	}
}

// The generated bytes are part of the interface: a client may continue a
// download at a node with another version.
func TestPatternIsStable(t *testing.T) {
	g := &generated{size: 128}
	b, _ := io.ReadAll(g)
	const want = "7ouObxQt6k+aj6Fn2KyTbWJGuJFjjwPqLPjdALecGjp6wibapDva8phuOAfcR9E\n" +
		"UI12WSCD+ddbtEHN+eSNtuvfxdmfeHKADWOIiUrzqGODw2-ug-PSqrV14+VUxWx\n"
	if string(b) != want {
		t.Errorf("pattern = %q; want %q", b, want)
	}
}

func TestFlags(t *testing.T) {
	for _, tc := range []struct {
		args []string
		code int
		out  string
	}{
		{[]string{"--help"}, 0, "Examples:"},
		{[]string{"--nope"}, 2, "-nope"},
		{[]string{"--bench-max", "many"}, 2, "want a number of bytes"},
		{[]string{"--max-conns", "0"}, 2, "want at least 1"},
		{[]string{"--idle-timeout", "0"}, 2, "want more than 0"},
		{[]string{"--log-level", "loud"}, 2, "loud"},
		{[]string{"extra"}, 2, `unexpected argument "extra"`},
		{[]string{"--listen", "127.0.0.1:http-nope"}, 1, "http-nope"},
		{[]string{"--content", "/dev/null"}, 1, "content directory"},
	} {
		var out strings.Builder
		code := run(context.Background(), tc.args, func(string) string { return "" }, &out)
		if code != tc.code || !strings.Contains(out.String(), tc.out) {
			t.Errorf("webd %q = %d\n%s\nwant %d with %q", tc.args, code, &out, tc.code, tc.out)
		}
	}
}

// The service tells its supervisor when it answers and when it stops.
func TestNotify(t *testing.T) {
	dir := t.TempDir()
	sock, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: filepath.Join(dir, "notify"), Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer sock.Close()
	sock.SetDeadline(time.Now().Add(long))
	env := map[string]string{"NOTIFY_SOCKET": sock.LocalAddr().String(), "CLONECLUSTER_NODE": "n"}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	done := make(chan int)
	go func() {
		done <- run(ctx, []string{"--listen", "127.0.0.1:0"}, func(k string) string { return env[k] }, t.Output())
	}()
	buf := make([]byte, 100)
	for _, want := range []string{"READY=1", "STOPPING=1"} {
		n, err := sock.Read(buf)
		if err != nil {
			t.Fatal(err)
		}
		if got := string(buf[:n]); got != want {
			t.Errorf("notified %q; want %q", got, want)
		}
		cancel()
	}
	if code := <-done; code != 0 {
		t.Errorf("exit code %d", code)
	}
}
