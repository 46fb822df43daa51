package probe

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

func TestHTTPAndTCP(t *testing.T) {
	hang := make(chan struct{})
	mux := http.NewServeMux()
	mux.HandleFunc("/ok", func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Query().Get("q") != "1" {
			w.WriteHeader(400)
		}
	})
	mux.HandleFunc("/no", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(503) })
	mux.HandleFunc("/moved", func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, "/ok", http.StatusFound) })
	mux.HandleFunc("/hang", func(http.ResponseWriter, *http.Request) { <-hang })
	srv := httptest.NewServer(mux)
	defer srv.Close()
	defer close(hang)
	raw := func(answer string) string {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { l.Close() })
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				c.Read(make([]byte, 1024))
				io.WriteString(c, answer)
				c.Close()
			}
		}()
		return "http://" + l.Addr().String() + "/"
	}
	closed, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	closed.Close()
	for _, tt := range []struct{ http, tcp, want string }{
		{http: srv.URL + "/ok?q=1", want: "<nil>"},
		{http: srv.URL + "/ok", want: "the answer is 400 Bad Request"},
		{http: srv.URL + "/no", want: "the answer is 503 Service Unavailable"},
		{http: srv.URL + "/moved", want: "the answer is 302 Found"},
		{http: srv.URL + "/hang", want: "no answer in time"},
		{http: "http://" + closed.Addr().String() + "/", want: "connection refused"},
		{http: raw("SSH-2.0-x\r\n"), want: "the answer is not HTTP"},
		{http: raw(""), want: "the answer is not HTTP"},
		{http: raw(strings.Repeat("x", 10_000)), want: "the answer is not HTTP"},
		{http: raw("HTTP/1.1 200\r\n"), want: "<nil>"},
		{tcp: srv.Listener.Addr().String(), want: "<nil>"},
		{tcp: closed.Addr().String(), want: "connection refused"},
	} {
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		err := error(nil)
		if tt.http != "" {
			err = HTTP(ctx, tt.http)
		} else {
			err = TCP(ctx, tt.tcp)
		}
		cancel()
		if got := fmt.Sprint(err); got != tt.want {
			t.Errorf("asking %s%s: %q; want %q", tt.http, tt.tcp, got, tt.want)
		}
	}
}

func FuzzStatusLine(f *testing.F) {
	f.Add("HTTP/1.1 200 OK\r\n")
	f.Add("HTTP/1.1 2")
	f.Add("")
	f.Fuzz(func(t *testing.T, line string) {
		if err := statusLine(line); err == nil && !strings.Contains(line, " 2") {
			t.Errorf("statusLine(%q) = nil", line)
		}
	})
}

// TestHTTPEndsWithContext: the end of the engine does not wait for a timeout.
func TestHTTPEndsWithContext(t *testing.T) {
	asked, end := make(chan struct{}), make(chan struct{})
	srv := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {
		close(asked)
		<-end
	}))
	defer srv.Close()
	defer close(end)
	ctx, cancel := context.WithCancel(t.Context()) // no deadline: without the cancellation this hangs
	answer := make(chan error)
	go func() { answer <- HTTP(ctx, srv.URL) }()
	<-asked
	cancel()
	if err := <-answer; err == nil {
		t.Error("an unanswered question was answered")
	}
}

func TestPrintable(t *testing.T) {
	for text, want := range map[string]string{
		"":                              "",
		"disk 95 % füll":                "disk 95 % füll",
		"\x1b[2J\ttab\u202eevil\xff":    "·[2J·tab·evil·",
		strings.Repeat("x", 1000):       strings.Repeat("x", 200),
		strings.Repeat("é", 1000):       strings.Repeat("é", 100),
		"x" + strings.Repeat("é", 1000): "x" + strings.Repeat("é", 99) + "·",
	} {
		if got := Printable(text); got != want {
			t.Errorf("Printable(%q) = %q; want %q", text, got, want)
		}
	}
}

// TestRepeat has answers at given times and looks when the questions come.
func TestRepeat(t *testing.T) {
	bad := errors.New("bad")
	type answer struct {
		after time.Duration
		err   error
	}
	for _, tt := range []struct {
		name              string
		interval, timeout time.Duration
		answers           []answer
		want              string // when each question came
	}{
		{"well at once", time.Second, 500 * time.Millisecond, []answer{{0, nil}, {0, nil}, {0, nil}}, "0s 1s 2s"},
		{"fast until well", time.Second, 500 * time.Millisecond, []answer{{0, bad}, {0, bad}, {0, nil}, {0, bad}, {0, bad}}, "0s 100ms 200ms 1.2s 2.2s"},
		{"no faster than the interval allows", 50 * time.Millisecond, 10 * time.Millisecond, []answer{{0, bad}, {0, bad}, {0, nil}}, "0s 50ms 100ms"},
		{"an answer takes time", time.Second, 500 * time.Millisecond, []answer{{300 * time.Millisecond, nil}, {400 * time.Millisecond, bad}, {0, nil}}, "0s 1s 2s"},
		{"longer than the fast interval", time.Second, 500 * time.Millisecond, []answer{{300 * time.Millisecond, bad}, {400 * time.Millisecond, nil}, {0, nil}}, "0s 300ms 1.3s"},
		{"longer than the interval", time.Second, 5 * time.Second, []answer{{0, nil}, {1500 * time.Millisecond, nil}, {0, nil}}, "0s 1s 2.5s"},
		{"timeout", time.Second, 500 * time.Millisecond, []answer{{time.Hour, nil}, {0, nil}, {time.Hour, nil}, {0, nil}}, "0s 500ms 1.5s 2.5s"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				start := time.Now()
				var asked, told []string
				Repeat(ctx, tt.interval, tt.timeout, nil, func(ctx context.Context) error {
					a := tt.answers[len(asked)]
					asked = append(asked, time.Since(start).String())
					select {
					case <-ctx.Done():
						return ErrLate
					case <-time.After(a.after):
						return a.err
					}
				}, func(err error) {
					want := tt.answers[len(told)].err
					if tt.answers[len(told)].after > tt.timeout {
						want = ErrLate
					}
					if !errors.Is(err, want) {
						t.Errorf("answer %d is %v; want %v", len(told), err, want)
					}
					if told = append(told, fmt.Sprint(err)); len(told) == len(tt.answers) {
						cancel()
					}
				})
				if got := strings.Join(asked, " "); got != tt.want {
					t.Errorf("asked at %s; want %s", got, tt.want)
				}
			})
		})
	}
}

// TestRepeatEnds: what is answered after the end is not told.
func TestRepeatEnds(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	Repeat(ctx, time.Hour, time.Hour, nil, func(ctx context.Context) error {
		cancel()
		<-ctx.Done()
		return ctx.Err()
	}, func(err error) { t.Errorf("told %v", err) })
}

// TestBell: who rings is asked at once, also who is just being asked; and then again
// at the interval.
func TestBell(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		var bell Bell
		start := time.Now()
		var asked []time.Duration
		go Repeat(ctx, time.Minute, time.Second, &bell, func(context.Context) error {
			asked = append(asked, time.Since(start))
			time.Sleep(500 * time.Millisecond)
			return nil
		}, func(error) {})
		for _, at := range []time.Duration{10 * time.Second, 10*time.Second + 200*time.Millisecond, 30 * time.Second} {
			time.Sleep(at - time.Since(start))
			bell.Ring()
		}
		time.Sleep(70 * time.Second)
		cancel()
		synctest.Wait()
		want := []time.Duration{0, 10 * time.Second, 10*time.Second + 500*time.Millisecond, 30 * time.Second, 90 * time.Second}
		if !slices.Equal(asked, want) {
			t.Errorf("asked at %v; want %v", asked, want)
		}
	})
}
