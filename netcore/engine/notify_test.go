package engine_test

import (
	"net"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// TestNotify follows what an engine tells its supervisor, in which WATCHDOG=1
// must come of itself while nothing happens, and not while the engine hangs.
func TestNotify(t *testing.T) {
	c := newCluster(t, 1)
	path := filepath.Join(c.Dir, "notify.sock")
	l, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	t.Setenv("NOTIFY_SOCKET", path)
	t.Setenv("WATCHDOG_USEC", "200000")
	await := func(want string) {
		t.Helper()
		if err := l.SetReadDeadline(time.Now().Add(time.Minute)); err != nil {
			t.Fatal(err)
		}
		b := make([]byte, 4096)
		for seen := []string{}; ; {
			n, err := l.Read(b)
			if err != nil {
				t.Fatalf("waiting for %s: %v; got %q:\n%s", want, err, seen, c.nodes[0].cloned.Output())
			}
			if strings.HasPrefix(string(b[:n]), want) {
				return
			}
			seen = append(seen, string(b[:n]))
		}
	}
	n := c.nodes[0]
	n.start()
	await("READY=1")
	await("STATUS=serving, node 1 of 1")
	for range 5 {
		await("WATCHDOG=1")
	}
	n.cloned.Signal(syscall.SIGSTOP)
	// At most the one that was on its way.
	if err := l.SetReadDeadline(time.Now().Add(time.Second)); err != nil {
		t.Fatal(err)
	}
	beats := 0
	for b := make([]byte, 4096); ; beats++ {
		if _, err := l.Read(b); err != nil {
			break
		}
	}
	if beats > 2 {
		t.Errorf("%d messages from a stopped engine", beats)
	}
	n.cloned.Signal(syscall.SIGCONT)
	await("WATCHDOG=1")
	n.cloned.Signal(syscall.SIGTERM)
	await("STOPPING=1")
	if err := n.cloned.Wait(); err != nil {
		t.Error(err)
	}
}

// TestWaitingBeats: an engine that waits for its cable is alive.
func TestWaitingBeats(t *testing.T) {
	c := newCluster(t, 1)
	path := filepath.Join(c.Dir, "notify.sock")
	l, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if err := l.SetReadDeadline(time.Now().Add(time.Minute)); err != nil {
		t.Fatal(err)
	}
	t.Setenv("NOTIFY_SOCKET", path)
	t.Setenv("WATCHDOG_USEC", "200000")
	writeConfig(t, c.config, "wait-carrier: 10s", "wait-carrier: 5m")
	n := c.nodes[0]
	c.Unplug(n.Host)
	n.start()
	beats := 0
	for b := make([]byte, 4096); ; {
		size, err := l.Read(b)
		if err != nil {
			t.Fatalf("after %d heartbeats: %v:\n%s", beats, err, n.cloned.Output())
		}
		switch got := string(b[:size]); {
		case got == "WATCHDOG=1":
			if beats++; beats == 5 {
				c.Plug(n.Host)
			}
		case got == "READY=1" && beats < 5:
			t.Fatal("the engine is ready without a carrier")
		case got == "READY=1":
			return
		}
	}
}
