package pxe_test

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
	"github.com/insomniacslk/dhcp/iana"

	"clonecluster/image/pxe"
	"clonecluster/qemu/nethost"
	"clonecluster/qemu/vswitch"
)

// *nethost.Host is where the laboratory runs a server.
var _ pxe.Network = (*nethost.Host)(nil)

// events collects what a server reports.
type events struct {
	mu  sync.Mutex
	all []pxe.Event
}

func (e *events) add(ev pxe.Event) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.all = append(e.all, ev)
}

// find waits for an event that is wanted.
func (e *events) find(t *testing.T, d time.Duration, wanted func(pxe.Event) bool) pxe.Event {
	t.Helper()
	for end := time.Now().Add(d); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		e.mu.Lock()
		i := slices.IndexFunc(e.all, wanted)
		e.mu.Unlock()
		if i >= 0 {
			return e.all[i]
		}
	}
	t.Fatalf("it was not reported in %v:\n%s", d, e)
	return pxe.Event{}
}

func (e *events) String() string {
	e.mu.Lock()
	defer e.mu.Unlock()
	var lines []string
	for _, ev := range e.all {
		lines = append(lines, ev.String())
	}
	return strings.Join(lines, "\n")
}

func is(s pxe.Stage) func(pxe.Event) bool { return func(e pxe.Event) bool { return e.Event == s } }

func host(t *testing.T, sw *vswitch.Switch, n byte, dhcp *nethost.DHCP) *nethost.Host {
	t.Helper()
	h, err := nethost.Attach(sw, fmt.Sprintf("host%d", n), nethost.Config{
		MAC: net.HardwareAddr{0x52, 0x54, 0, 0x77, 0xff, n}, DHCP: dhcp,
		Addrs: []netip.Prefix{netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 77, 0, n}), 24)},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(h.Close)
	return h
}

// run runs a server until the test ends.
func run(t *testing.T, o pxe.Options) (*pxe.Server, *events) {
	t.Helper()
	var e events
	o.OnEvent = e.add
	s, err := pxe.New(o)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		select {
		case err := <-done:
			if err != nil {
				t.Errorf("the server: %v", err)
			}
		case <-time.After(10 * time.Second):
			t.Error("the server does not end")
		}
		s.Close()
	})
	return s, &e
}

func imageFolder(t *testing.T) string {
	dir := t.TempDir()
	for _, n := range []string{"bzImage", "initrd.img", "clonecluster.efi", "undionly.kpxe"} {
		if err := os.WriteFile(filepath.Join(dir, n), bytes.Repeat([]byte(n), 100_000), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// A machine, played on a host of the virtual switch, goes through a whole boot by
// HTTP beside the network's DHCP server, and is followed to its end.
func TestBootOnVirtualSwitch(t *testing.T) {
	sw, err := vswitch.New(vswitch.Config{})
	if err != nil {
		t.Fatal(err)
	}
	defer sw.Close()
	host(t, sw, 1, &nethost.DHCP{First: netip.MustParseAddr("10.77.0.100"), Last: netip.MustParseAddr("10.77.0.110")})
	dir := imageFolder(t)
	_, seen := run(t, pxe.Options{
		Network: host(t, sw, 2, nil), Addr: netip.MustParsePrefix("10.77.0.2/24"),
		Images: []pxe.Image{{Arch: "amd64", Folder: dir}}, Health: ":80/healthz",
	})
	machine := host(t, sw, 3, nil)
	conn, err := machine.ListenPacket(netip.MustParseAddrPort("0.0.0.0:68"))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	mac := net.HardwareAddr{0x52, 0x54, 0, 0x77, 0xff, 3}
	send := func(mods ...dhcpv4.Modifier) {
		t.Helper()
		m, err := dhcpv4.NewDiscovery(mac, mods...)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := conn.WriteTo(m.ToBytes(), &net.UDPAddr{IP: net.IPv4bcast.To4(), Port: 67}); err != nil {
			t.Fatal(err)
		}
	}
	var file string
	addressed := false
	for range 20 { // the server may not listen yet
		send(dhcpv4.WithOption(dhcpv4.OptClassIdentifier("HTTPClient:Arch:00016:UNDI:003016")), dhcpv4.WithOption(dhcpv4.OptClientArch(iana.EFI_X86_64_HTTP)))
		conn.SetReadDeadline(time.Now().Add(300 * time.Millisecond))
		buf := make([]byte, 1500)
		for {
			n, _, err := conn.ReadFrom(buf)
			if err != nil {
				break
			}
			if r, err := dhcpv4.FromBytes(buf[:n]); err == nil && r.ClientHWAddr.String() == mac.String() {
				addressed = addressed || !r.YourIPAddr.IsUnspecified()
				file = max(file, r.BootFileName)
			}
		}
		if file != "" && addressed {
			break
		}
	}
	if !strings.HasPrefix(file, "http://10.77.0.2:8067/525400") || !addressed {
		t.Fatalf("offers name the file %q, and an address: %v", file, addressed)
	}
	client := machine.HTTPClient()
	defer client.CloseIdleConnections()
	want, _ := os.ReadFile(filepath.Join(dir, "clonecluster.efi"))
	for _, tt := range []struct {
		method, url, bytes string
		status             int
		want               []byte
	}{
		{http.MethodGet, "http://10.77.0.2:8067/clonecluster.efi", "", 404, nil}, // without the machine's folder
		{http.MethodGet, file + "x", "", 404, nil},
		{http.MethodPost, file, "", 405, nil},
		{http.MethodHead, file, "", 200, nil},
		{http.MethodGet, file, "bytes=5-9", 206, want[5:10]},
		{http.MethodGet, file, "", 200, want},
	} {
		req, _ := http.NewRequest(tt.method, tt.url, nil)
		if tt.bytes != "" {
			req.Header.Set("Range", tt.bytes)
		}
		resp, err := client.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		got, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if err != nil || resp.StatusCode != tt.status || tt.want != nil && !bytes.Equal(got, tt.want) {
			t.Errorf("%s %s %s: %s, %d bytes, %v; want %d", tt.method, tt.url, tt.bytes, resp.Status, len(got), err, tt.status)
		}
	}
	e := seen.find(t, 2*time.Second, is(pxe.File))
	if e.Bytes != int64(len(want)) || e.By != "HTTP" || e.Address != "10.77.0.3" {
		t.Errorf("reported %+v", e)
	}
	// The kernel starts, and the node takes an address: here the machine's own.
	node := dhcpv4.WithOption(dhcpv4.OptClassIdentifier("clonecluster"))
	send(node)
	send(node, dhcpv4.WithMessageType(dhcpv4.MessageTypeRequest), dhcpv4.WithOption(dhcpv4.OptRequestedIPAddress(net.IPv4(10, 77, 0, 3))))
	seen.find(t, 2*time.Second, is(pxe.Address))
	l, err := machine.Listen(netip.MustParseAddrPort("0.0.0.0:80"))
	if err != nil {
		t.Fatal(err)
	}
	go http.Serve(l, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/healthz" {
			http.NotFound(w, r)
		}
	}))
	defer l.Close()
	if e := seen.find(t, 5*time.Second, is(pxe.Up)); e.Address != "http://10.77.0.3:80/healthz" {
		t.Errorf("reported %+v", e)
	}
	if s := seen.String(); strings.Contains(s, "no DHCP server") {
		t.Errorf("the network's DHCP server was not heard:\n%s", s)
	}
}

// A DHCP server does not begin beside another.
func TestTwoServers(t *testing.T) {
	sw, err := vswitch.New(vswitch.Config{})
	if err != nil {
		t.Fatal(err)
	}
	defer sw.Close()
	host(t, sw, 1, &nethost.DHCP{First: netip.MustParseAddr("10.77.0.100"), Last: netip.MustParseAddr("10.77.0.110")})
	s, err := pxe.New(pxe.Options{
		Network: host(t, sw, 2, nil), Addr: netip.MustParsePrefix("10.77.0.2/24"),
		Images: []pxe.Image{{Arch: "amd64", Folder: imageFolder(t)}},
		Pool:   &pxe.Pool{First: netip.MustParseAddr("10.77.0.200"), Last: netip.MustParseAddr("10.77.0.210")},
	})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	if err := s.Run(ctx); err == nil || !strings.Contains(err.Error(), "10.77.0.1 is a DHCP server on this segment, too") {
		t.Errorf("Run: %v; want an error that names the other server", err)
	}
}

// A proxy without a DHCP server says what is missing.
func TestNoServer(t *testing.T) {
	sw, err := vswitch.New(vswitch.Config{})
	if err != nil {
		t.Fatal(err)
	}
	defer sw.Close()
	_, seen := run(t, pxe.Options{
		Network: host(t, sw, 2, nil), Addr: netip.MustParsePrefix("10.77.0.2/24"),
		Images: []pxe.Image{{Arch: "amd64", Folder: imageFolder(t)}},
	})
	if e := seen.find(t, 15*time.Second, is(pxe.Note)); !strings.Contains(e.Text, "--dhcp") {
		t.Errorf("reported %v", e)
	}
}
