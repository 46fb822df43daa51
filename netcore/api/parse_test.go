package api

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	"clonecluster/netcore/dashboard"
)

func TestParseFlow(t *testing.T) {
	for _, tt := range []struct{ client, port, proto, want string }{
		{"192.0.2.1", "80", "", "192.0.2.1 80 tcp"},
		{"192.0.2.1:4000", "65535", "udp", "192.0.2.1:4000 65535 udp"},
		{"2001:db8::1", "80", "tcp", "2001:db8::1 80 tcp"},
		{"[2001:db8::1]:4000", "80", "tcp", "[2001:db8::1]:4000 80 tcp"},
		{"::ffff:192.0.2.1", "80", "tcp", "192.0.2.1 80 tcp"},
		{"", "80", "", ""}, {"192.0.2.1:0", "80", "", ""}, {"192.0.2", "80", "", ""}, {"web", "80", "", ""}, {"0.0.0.0", "80", "", ""},
		{"224.0.0.1", "80", "", ""}, {"fe80::1%eth0", "80", "", ""}, {"[2001:db8::1]", "80", "", ""},
		{"192.0.2.1", "", "", ""}, {"192.0.2.1", "0", "", ""}, {"192.0.2.1", "65536", "", ""}, {"192.0.2.1", "-1", "", ""}, {"192.0.2.1", "80", "icmp", ""},
	} {
		f, err := ParseFlow(tt.client, tt.port, tt.proto)
		got := fmt.Sprintf("%s %d %s", f.ClientText(), f.Port, f.Proto)
		if err != nil {
			got = ""
		}
		if got != tt.want {
			t.Errorf("ParseFlow(%q, %q, %q) = %q, %v; want %q", tt.client, tt.port, tt.proto, got, err, tt.want)
		}
	}
}

func TestParseBurst(t *testing.T) {
	for text, want := range map[string]int{
		"": 0, "0": 0, "250": 250, "16000": 16000,
		"249": -1, "16001": -1, "-1": -1, "many": -1, "1e3": -1, "99999999999999999999": -1,
	} {
		got, err := ParseBurst(text)
		if err != nil {
			got = -1
		}
		if got != want {
			t.Errorf("ParseBurst(%q) = %d, %v; want %d", text, got, err, want)
		}
	}
}

func FuzzParseFlow(f *testing.F) {
	f.Add("192.0.2.1:4000", "80", "tcp")
	f.Add("[fe80::1%eth0]:1", "0", "udp")
	f.Fuzz(func(t *testing.T, client, port, proto string) {
		flow, err := ParseFlow(client, port, proto)
		if err != nil {
			if len(err.Error()) > 1000 {
				t.Errorf("an error of %d bytes", len(err.Error()))
			}
			return
		}
		again, err := ParseFlow(flow.ClientText(), fmt.Sprint(flow.Port), flow.Proto)
		if err != nil || again != flow {
			t.Errorf("%+v is read as %+v, %v", flow, again, err)
		}
	})
}

func FuzzParseSince(f *testing.F) {
	for _, s := range []string{"", "17", "10m", "-10m", "2026-01-02T15:04:05Z", "2026-01-02T15:04:05.123456789+02:00", "9999999h"} {
		f.Add(s)
	}
	now := time.Unix(1_800_000_000, 0)
	f.Fuzz(func(t *testing.T, text string) {
		s, err := ParseSince(text, now)
		if err == nil && s.ID != 0 && !s.Time.IsZero() {
			t.Errorf("%q is a number and a time", text)
		}
	})
}

func FuzzParseOrder(f *testing.F) {
	for _, s := range []string{"", "{}", `{"reason":"new disk"}`, `{"reason":"\u0000"}`, `[[[[`, `{"reason":"x"}{}`, "null"} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		o, err := ParseOrder(bytes.NewReader(body))
		if err == nil && (len([]rune(o.Reason)) > mostReason || strings.ContainsAny(o.Reason, "\n\r\x00\x1b")) {
			t.Errorf("reason %q", o.Reason)
		}
	})
}

func FuzzReadEvents(f *testing.F) {
	f.Add([]byte("id: a.1\nevent: lost\ndata: {}\n\n: \n\ndata:x\n: lost 7\n: lost -1\n"))
	f.Fuzz(func(t *testing.T, stream []byte) {
		if err := readEvents(bytes.NewReader(stream), func(data []byte) error {
			if bytes.ContainsRune(data, '\n') {
				t.Errorf("data of two lines: %q", data)
			}
			return nil
		}, func(uint64) {}); err == nil {
			t.Error("a stream without an end")
		}
	})
}

// timed is a recorder that takes the deadlines of a connection.
type timed struct{ *httptest.ResponseRecorder }

func (timed) SetReadDeadline(time.Time) error  { return nil }
func (timed) SetWriteDeadline(time.Time) error { return nil }

// FuzzHandler asks whatever there is of a node, as an operator: it answers with a code
// that is described, in JSON, and does not do what it was not told.
func FuzzHandler(f *testing.F) {
	for _, r := range Routes {
		f.Add(r.Method, r.Path, "node=node2&since=1&client=192.0.2.1:1&port=80&source=x", []byte("{}"))
	}
	f.Add("POST", "/v1/drain", "node=%zz;", []byte(`{"reason":1}`))
	f.Add("POST", "/v1/policy", "", []byte(`{"balance":"load","weights":{"one":50},"reason":"x"}`))
	f.Add("GET", dashboard.Root, "", []byte{})
	f.Add("DELETE", "/v1/../v1/status", "", []byte{})
	for _, path := range []string{"/v1/live", "/v1/events", "/v1/logs"} {
		f.Add("GET", path, "follow=1&since=0", []byte{})
	}
	f.Add("GET", "/v1/capture", "count=13", []byte{})
	f.Add("GET", "/v1/capture", "verdict=drop,accept-new&count=3&duration=1s&snap=64&beacons=1&client=[fd77::1]:5", []byte{})
	a := authority(f, testKey)
	cert, err := a.Issue(RoleControl, "fuzz", time.Now().Add(time.Hour))
	if err != nil {
		f.Fatal(err)
	}
	state := &tls.ConnectionState{PeerCertificates: []*x509.Certificate{cert.Leaf}, VerifiedChains: [][]*x509.Certificate{{cert.Leaf, a.cert}}}
	e := &engine{id: "02:00:00:00:00:01", host: "one", events: NewEvents(), log: NewLog()}
	s, err := NewServer(a, e, Limits{}, quiet)
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, method, path, query string, body []byte) {
		r, err := http.NewRequest(method, "https://cluster/", bytes.NewReader(body))
		if err != nil {
			return
		}
		r.URL = &url.URL{Scheme: "https", Host: "cluster", Path: path, RawQuery: query}
		if follows(r) || path == "/v1/capture" { // it goes on until its end is asked for
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
			defer cancel()
			r = r.WithContext(ctx)
		}
		r.TLS = state
		e.order(false, Order{}, "")
		w := httptest.NewRecorder()
		func() {
			defer func() {
				if p := recover(); p != nil && p != http.ErrAbortHandler { // which ends a connection
					panic(p)
				}
			}()
			s.http.Handler.ServeHTTP(timed{w}, r)
		}()
		if path == "/" || slices.Contains(dashboard.Paths(), path) {
			return // no JSON
		}
		switch w.Code {
		case 200, 400, 404, 405, 413, 502:
		default:
			t.Errorf("%s %q?%q: %d", method, path, query, w.Code)
		}
		kinds := []string{"application/json"}
		if w.Code == http.StatusOK && follows(r) {
			kinds = append(kinds, "text/event-stream")
		} else if w.Code == http.StatusOK && path == "/v1/capture" {
			kinds = append(kinds, "application/x-pcapng")
		}
		if kind := w.Header().Get("Content-Type"); !slices.Contains(kinds, kind) {
			t.Errorf("%s %q?%q: it is %q; want one of %q", method, path, query, kind, kinds)
		}
		if e.isDrained() != (method == "POST" && path == "/v1/drain" && w.Code == 200) {
			t.Errorf("%s %q?%q: %d, drained: %v", method, path, query, w.Code, e.isDrained())
		}
	})
}

func TestRecord(t *testing.T) {
	r := NewEvents()
	for i := range 3 * mostEvents {
		r.Add(Event{Text: fmt.Sprint(i + 1)})
	}
	some, lost, more := r.After(0)
	if len(some) != mostEvents || lost != 2*mostEvents || some[0].ID != 2*mostEvents+1 || some[0].Text != fmt.Sprint(some[0].ID) {
		t.Errorf("%d events, the first %+v, %d lost; want the last %d", len(some), some[0], lost, mostEvents)
	}
	if some, lost, _ = r.After(3*mostEvents - 1); len(some) != 1 || lost != 0 {
		t.Errorf("after the last but one: %d events, %d lost", len(some), lost)
	}
	if some, _, _ = r.After(1 << 40); len(some) != mostEvents {
		t.Errorf("after one of another run: %d events", len(some))
	}
	r.Add(Event{Text: strings.Repeat("x", 2*mostBytes)})
	<-more
	if some, _, _ = r.After(0); len(some) != 1 {
		t.Errorf("%d events beside a huge one; want none", len(some)-1)
	}
	r.Add(Event{})
	if some, _, _ = r.After(0); len(some) != 1 || some[0].Text != "" {
		t.Errorf("%d events; want that the huge one has gone", len(some))
	}
}
