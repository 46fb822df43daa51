package qemutest

import (
	"context"
	"io"
	"net/http"
	"testing"

	"clonecluster/qemu/lab"
)

// Lab starts a laboratory for a test and closes it at its end. A frame that breaks
// I1, or a capture with a hole, fails the test, and a test that fails shows the
// consoles. Kernel and accelerator are filled in if they are empty, and so is the
// initramfs, with the test guest.
func Lab(t testing.TB, cfg lab.Config) *lab.Lab {
	t.Helper()
	if cfg.Accel == "" {
		cfg.Accel = Accel(t)
	}
	if cfg.Kernel == "" {
		cfg.Kernel = Kernel(t)
	}
	if cfg.Initrd == nil {
		cfg.Initrd = []string{Initrd(t)}
	}
	// Not t.Context: that ends before the clean-ups, which may want a live lab.
	l, err := lab.Start(context.Background(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	l.Switch().FailOnViolation(t)
	t.Cleanup(func() {
		if t.Failed() {
			t.Log(l.Report())
		}
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
	return l
}

// Get asks at the demonstration network's VIP, for a path or ":port/path", on a
// connection of its own, and fails the test if the answer is not 200.
func Get(ctx context.Context, t testing.TB, l *lab.Lab, path string) (body string, header http.Header) {
	t.Helper()
	client := l.Client().HTTPClient()
	defer client.CloseIdleConnections()
	r, err := http.NewRequestWithContext(ctx, "GET", "http://"+lab.VIP4.String()+path, nil)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := client.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != http.StatusOK {
		t.Fatalf("GET %s = %s, %v", path, resp.Status, err)
	}
	return string(b), resp.Header
}
