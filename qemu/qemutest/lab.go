package qemutest

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"testing"
	"time"

	"clonecluster/image/pxe"
	"clonecluster/qemu/lab"
	"clonecluster/qemu/nethost"
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
	body, header, err := get(ctx, l, path)
	if err != nil {
		t.Fatal(err)
	}
	return body, header
}

// Await is Get that asks until it is answered, for nodes whose serial line does not
// say when they are ready.
func Await(ctx context.Context, t testing.TB, l *lab.Lab, path string) (body string, header http.Header) {
	t.Helper()
	for {
		once, cancel := context.WithTimeout(ctx, 2*time.Second)
		body, header, err := get(once, l, path)
		cancel()
		if err == nil {
			return body, header
		}
		select {
		case <-ctx.Done():
			t.Fatal(err)
		case <-time.After(200 * time.Millisecond):
		}
	}
}

func get(ctx context.Context, l *lab.Lab, path string) (string, http.Header, error) {
	client := l.Client().HTTPClient()
	defer client.CloseIdleConnections()
	r, err := http.NewRequestWithContext(ctx, "GET", "http://"+lab.VIP4.String()+path, nil)
	if err != nil {
		return "", nil, err
	}
	resp, err := client.Do(r)
	if err != nil {
		return "", nil, err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("GET %s = %s", path, resp.Status)
	}
	return string(b), resp.Header, err
}

// ServePXE boots the machines of a laboratory in the demonstration network from
// the network, beside its DHCP server, until the test ends.
func ServePXE(t testing.TB, l *lab.Lab, img pxe.Image) {
	t.Helper()
	at := netip.MustParsePrefix("10.77.0.2/24")
	host, err := nethost.Attach(l.Switch(), "pxe", nethost.Config{MAC: net.HardwareAddr{0x52, 0x54, 0, 0x77, 0xff, 2}, Addrs: []netip.Prefix{at}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(host.Close)
	s, err := pxe.New(pxe.Options{Network: host, Addr: at, Images: []pxe.Image{img}, OnEvent: func(e pxe.Event) { t.Log(e) }})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("the server: %v", err)
		}
		s.Close()
	})
}
