package uinit_test

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"clonecluster/config"
	"clonecluster/image"
	"clonecluster/qemu/lab"
	"clonecluster/qemu/qemutest"
)

// TestPowerButton boots two nodes, one with a parameter that init must refuse,
// and turns one off by its power button while a client asks the VIP again and
// again: no request may fail, and the console must tell the end in order.
func TestPowerButton(t *testing.T) {
	if testing.Short() {
		t.Skip("boots virtual machines; not with -short")
	}
	dir := t.TempDir()
	cfg := lab.Demo(2)
	cfg.Kernel, cfg.Accel = qemutest.Kernel(t), qemutest.Accel(t)
	base, err := image.BuildBase(t.Context(), image.BaseOptions{OutDir: dir, Progress: t.Output()})
	if err != nil {
		t.Fatal(err)
	}
	member, err := image.ConfigCPIO(config.DemoYAML, "", time.Time{})
	if err != nil {
		t.Fatal(err)
	}
	if err := image.WriteFile(dir+"/config.cpio", member, 0o600); err != nil {
		t.Fatal(err)
	}
	cfg.Initrd = []string{base.Path, dir + "/config.cpio"}
	cfg.Nodes[0].Cmdline = "clonecluster.system.log-levle=debug clonecluster.system.watchdog=20s"
	var mu sync.Mutex
	var console []string // of node1
	ended := false
	cfg.OnEvent = func(e lab.Event) {
		if e.Node != "node1" {
			return
		}
		mu.Lock()
		defer mu.Unlock()
		switch e.Kind {
		case lab.Line:
			console = append(console, e.Text)
		case lab.Exited:
			ended = e.Err == nil
		}
	}
	l := qemutest.Lab(t, cfg)
	ctx, cancel := context.WithTimeout(t.Context(), 4*time.Minute)
	defer cancel()
	if err := l.WaitAll(ctx, "ready"); err != nil {
		t.Fatal(err)
	}

	client := http.Client{Timeout: 30 * time.Second, Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return l.Client().DialContext(ctx, "tcp", net.JoinHostPort(lab.VIP4.String(), "80"))
		},
	}}
	ask := func() (node string, err error) {
		r, err := client.Get("http://vip/whoami")
		if err != nil {
			return "", err
		}
		defer r.Body.Close()
		b, err := io.ReadAll(r.Body)
		for _, m := range l.Nodes() {
			if strings.Contains(string(b), m.MAC().String()) {
				node = m.Name()
			}
		}
		if err == nil && node == "" {
			err = fmt.Errorf("nobody's answer: %s", b)
		}
		return node, err
	}
	answered := map[string]int{}
	for answered["node1"] < 3 || answered["node2"] < 3 { // the table has settled
		n, err := ask()
		if err != nil {
			t.Fatal(err)
		}
		answered[n]++
		if ctx.Err() != nil {
			t.Fatalf("answers: %v; want some of each", answered)
		}
	}
	off := make(chan error, 1)
	go func() { off <- l.Node(0).Shutdown(ctx) }()
	after := 0
	for requests := 0; after < 10; requests++ {
		n, err := ask()
		if err != nil {
			t.Fatalf("request %d while a node was turned off: %v", requests, err)
		}
		if len(off) > 0 {
			after++
			if n != "node2" {
				t.Errorf("an answer of %s after it was turned off", n)
			}
		}
	}
	if err := <-off; err != nil {
		t.Errorf("turning node1 off: %v", err)
	}

	mu.Lock()
	defer mu.Unlock()
	if !ended {
		t.Error("node1 did not end by powering itself off")
	}
	// The engine ends when it holds no flow any more, which may be before or after the services have stopped.
	start := []string{
		"timeline stage=kernel at=", "timeline stage=unpack at=", "timeline stage=init at=",
		`clonecluster.system.log-levle: system: unknown name "log-levle"; did you mean "log-level"?`,
		"init: watchdog device=/dev/watchdog0", "timeout=20s", "timeline stage=link at=", "timeline stage=engine at=", "timeline stage=service:web at=",
		"timeline stage=ready at=", "the power button was pressed", "the engine leaves the cluster", "engine: level=INFO msg=leaving",
	}
	for _, end := range [][]string{
		{"init: stopping the services", "web has stopped: exit code 0", "everything has stopped"},
		{"agreed=true nodes=" + l.Node(1).MAC().String(), "engine has stopped: exit code 0", "everything has stopped"},
	} {
		at := 0
		for _, want := range slices.Concat(start, end) {
			i := at
			for i < len(console) && !strings.Contains(console[i], want) {
				i++
			}
			if i == len(console) {
				t.Fatalf("after line %d the console does not say %q:\n%s", at, want, strings.Join(console, "\n"))
			}
			at = i
		}
	}
}
