package engine

import (
	"bytes"
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"clonecluster/config"
)

func TestUsage(t *testing.T) {
	dir := t.TempDir()
	good, bad := filepath.Join(dir, "good.yaml"), filepath.Join(dir, "bad.yaml")
	cmdline := filepath.Join(dir, "cmdline")
	for file, text := range map[string]string{
		good: string(config.DemoYAML), bad: "cluster: {nome: x}\n", cmdline: "quiet clonecluster.interface.name=none0 clonecluster.interface.wait-carrier=0s\n",
	} {
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, tt := range []struct {
		args string
		code int
		says string
	}{
		{"--help", 0, "Examples:"},
		{"--nonsense", 2, "flag provided but not defined"},
		{"up", 2, `unexpected argument "up"`},
		{"--config " + filepath.Join(dir, "none.yaml"), 4, "no such file"},
		{"--config " + bad, 4, "bad.yaml:1:"},
		{"--config " + good + " --log-level loud", 2, `--log-level "loud"`},
		{"--config " + good + " --cmdline " + filepath.Join(dir, "none"), 4, "reading kernel parameters"},
		// The override is in effect: there is no such interface, and no wait.
		{"--config " + good + " --status-socket= --cmdline " + cmdline, 1, `does not match \"none0\"`},
	} {
		var out bytes.Buffer
		code := run(context.Background(), strings.Fields(tt.args), func(string) string { return "" }, &out)
		if code != tt.code || !strings.Contains(out.String(), tt.says) {
			t.Errorf("cloned %s: exit code %d, %s\nwant %d and %q", tt.args, code, out.String(), tt.code, tt.says)
		}
	}
}

func TestStatusSocket(t *testing.T) {
	path := filepath.Join(t.TempDir(), "run", "cloned.sock")
	first, err := listenStatus(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := listenStatus(t.Context(), path); !errors.Is(err, ErrStatusSocketBusy) {
		t.Errorf("beside one that is served: %v; want ErrStatusSocketBusy", err)
	}
	if conn, err := net.Dial("unix", path); err != nil {
		t.Errorf("the served socket is gone: %v", err)
	} else {
		conn.Close()
	}
	first.(*net.UnixListener).SetUnlinkOnClose(false) // a crash
	first.Close()
	second, err := listenStatus(t.Context(), path)
	if err != nil {
		t.Fatalf("after a crash: %v", err)
	}
	second.Close()
	if err := os.WriteFile(path, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := listenStatus(t.Context(), path); err == nil || !strings.Contains(err.Error(), "no socket") {
		t.Errorf("in the place of a file: %v; want a refusal", err)
	}
	if b, err := os.ReadFile(path); string(b) != "precious" {
		t.Errorf("the file is %q, %v", b, err)
	}
}

func TestHeartbeat(t *testing.T) {
	for in, want := range map[string]time.Duration{
		"": time.Second, "x": time.Second, "-5": time.Second, "0": time.Second,
		"30000000": time.Second, "1000000": 500 * time.Millisecond, "1": 10 * time.Millisecond,
	} {
		if got := heartbeat(in); got != want {
			t.Errorf("heartbeat(%q) = %v; want %v", in, got, want)
		}
	}
}

// TestStandsStill: the first beat may come before a loop has run at all, as beats are aligned.
func TestStandsStill(t *testing.T) {
	const started = int64(1000 * time.Second)
	at := func(d time.Duration) int64 { return started + int64(d) }
	for _, c := range []struct {
		what       string
		now        int64
		path, node int64
		want       bool
	}{
		{"the first beat, before the membership ran", at(time.Millisecond), at(0), 0, false},
		{"none has run for less than three beats", at(3*time.Second - 1), 0, 0, false},
		{"the membership never began", at(3 * time.Second), at(3 * time.Second), 0, true},
		{"the data path never began", at(3 * time.Second), 0, at(3 * time.Second), true},
		{"both run", at(time.Hour), at(time.Hour - time.Second), at(time.Hour - 2*time.Second), false},
		{"one stands", at(time.Hour), at(time.Hour - 3*time.Second), at(time.Hour), true},
	} {
		if got := standsStill(c.now, started, time.Second, c.path, c.node); got != c.want {
			t.Errorf("%s: %v; want %v", c.what, got, c.want)
		}
	}
}

func TestNotifier(t *testing.T) {
	if notify, _, err := newNotifier(""); notify != nil || err != nil {
		t.Errorf("without a socket: %p, %v; want nil, nil", notify, err)
	}
	for _, name := range []string{filepath.Join(t.TempDir(), "n.sock"), "@clonecluster-test-" + filepath.Base(t.TempDir())} {
		l, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: name, Net: "unixgram"})
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		notify, flush, err := newNotifier(name)
		if err != nil {
			t.Fatal(err)
		}
		notify("READY=1")
		flush()
		if err := l.SetReadDeadline(time.Now().Add(time.Minute)); err != nil {
			t.Fatal(err)
		}
		b := make([]byte, 100)
		n, err := l.Read(b)
		if err != nil || string(b[:n]) != "READY=1" {
			t.Errorf("%s: got %q, %v", name, b[:n], err)
		}
	}
	if _, _, err := newNotifier(filepath.Join(t.TempDir(), "none")); err == nil {
		t.Error("a socket that is not there is no error")
	}
}
