package main

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net/http"
	"net/http/cookiejar"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"
)

// lockedBuffer is for a command that still writes.
type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(b)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// TestDashboardCommand: the printed link leads to the page of the node, and Ctrl-C
// ends it.
func TestDashboardCommand(t *testing.T) {
	_, at, _ := serveOne(t)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var out lockedBuffer
	root := newRoot()
	root.SetArgs(append([]string{"dashboard", "--no-browser"}, at...))
	root.SetOut(&out)
	root.SetErr(&out)
	ended := make(chan error, 1)
	go func() { ended <- root.ExecuteContext(ctx) }()
	var link string
	for deadline := time.Now().Add(20 * time.Second); link == ""; time.Sleep(10 * time.Millisecond) {
		link = regexp.MustCompile(`http://127\.0\.0\.1:\d+/\S+`).FindString(out.String())
		if time.Now().After(deadline) {
			t.Fatalf("no link, but\n%s", out.String())
		}
	}
	jar, _ := cookiejar.New(nil) // with nil it never fails
	resp, err := (&http.Client{Jar: jar, Timeout: 20 * time.Second}).Get(link)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	page, err := io.ReadAll(resp.Body)
	if err != nil || !strings.Contains(string(page), "dashboard.js") {
		t.Errorf("the link leads to %s, %v:\n%s", resp.Status, err, page)
	}
	cancel()
	if err := <-ended; err != nil {
		t.Errorf("at Ctrl-C: %v", err)
	}
}

func TestDashboardListensHere(t *testing.T) {
	_, at, _ := serveOne(t)
	for _, listen := range []string{"0.0.0.0:0", "192.0.2.1:80", "nonsense", ":9265"} {
		_, err := clonectl(t, append([]string{"dashboard", "--no-browser", "--listen", listen}, at...)...)
		if !errors.As(err, new(usageError)) {
			t.Errorf("--listen %s: %v; want a usage error", listen, err)
		}
	}
}
