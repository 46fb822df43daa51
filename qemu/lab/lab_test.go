package lab_test

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"clonecluster/qemu"
	"clonecluster/qemu/lab"
	"clonecluster/qemu/qemutest"
	"clonecluster/qemu/vswitch"
)

func within(t *testing.T, d time.Duration) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), d)
	t.Cleanup(cancel)
	return ctx
}

// events collects what a lab reports.
type events struct {
	mu  sync.Mutex
	all []string
}

func (e *events) add(ev lab.Event) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if ev.Kind != lab.Line {
		e.all = append(e.all, strings.TrimSpace(fmt.Sprint(ev.Node, " ", ev.Kind, " ", ev.Stage.Name)))
	}
}

func (e *events) of(node string) []string {
	e.mu.Lock()
	defer e.mu.Unlock()
	var of []string
	for _, s := range e.all {
		if rest, ok := strings.CutPrefix(s, node+" "); ok {
			of = append(of, rest)
		}
	}
	return of
}

// One laboratory through everything: boot, DHCP, both families, forward, cable,
// pause, reset, power button, power failure and a second start; tshark reads the
// capture at the end.
func TestLab(t *testing.T) {
	cfg := lab.Demo(2)
	for i := range cfg.Nodes {
		cfg.Nodes[i].Cmdline = fmt.Sprintf("guest.ip=fd77::%d/64 guest.dhcp", 100+i)
	}
	var ev events
	cfg.OnEvent = ev.add
	cfg.PCAP = filepath.Join(t.TempDir(), "lab.pcapng")
	cfg.Dir = t.TempDir()
	cfg.Forwards = []lab.Forward{{Listen: "127.0.0.1:0", To: netip.MustParseAddrPort("[fd77::100]:80")}}
	l := qemutest.Lab(t, cfg)
	if err := l.WaitAll(within(t, 180*time.Second), "ready"); err != nil {
		t.Fatal(err)
	}
	for i, m := range l.Nodes() {
		s, err := m.WaitStage(t.Context(), "ready")
		if err != nil {
			t.Fatal(err)
		}
		t.Logf("%s: ready at %v, %v", m.Name(), s.At, s.Attrs)
		if s.Attrs["node"] != m.MAC().String() {
			t.Errorf("node %d says it is %q; want %v", i, s.Attrs["node"], m.MAC())
		}
		addr, err := netip.ParseAddr(s.Attrs["mgmt"])
		if err != nil || addr.Less(cfg.Client.DHCP.First) || cfg.Client.DHCP.Last.Less(addr) {
			t.Errorf("node %d got address %q; want one of the pool", i, s.Attrs["mgmt"])
		}
		for _, a := range []netip.Addr{addr, netip.MustParseAddr(fmt.Sprintf("fd77::%d", 100+i))} {
			if _, err := l.Client().Ping(within(t, 30*time.Second), a); err != nil {
				t.Error(err)
			}
			if mac := l.Client().MACOf(a); !slices.Equal(mac, m.MAC()) {
				t.Errorf("the client's cache has %v at %v; want %v", a, mac, m.MAC())
			}
		}
		if port, ok := l.Switch().Lookup(m.MAC()); port != m.Name() {
			t.Errorf("the switch has %v on %q, %v; want it on %s", m.MAC(), port, ok, m.Name())
		}
	}
	web := &http.Client{Timeout: 60 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
	url := "http://" + l.ForwardAddr(0).String()
	get(t, web, url+"/", "from "+l.Node(0).MAC().String())
	begin := time.Now()
	if n := len(get(t, web, url+"/bench/4000000", "")); n != 4000000 {
		t.Errorf("got %d bytes; want 4000000", n)
	}
	t.Logf("4 MB through the forward in %v", time.Since(begin))

	node := l.Node(0)
	v6 := netip.MustParseAddr("fd77::100")
	if err := node.Unplug(t.Context()); err != nil {
		t.Error(err)
	}
	if _, ok := l.Switch().Lookup(node.MAC()); ok {
		t.Error("the switch still has a node whose cable is out")
	}
	waitConsole(t, node, "carrier lost")
	if err := node.Plug(t.Context()); err != nil {
		t.Error(err)
	}
	waitConsole(t, node, "carrier found")
	if _, err := l.Client().Ping(within(t, 30*time.Second), v6); err != nil {
		t.Error(err)
	}
	if err := node.Pause(t.Context()); err != nil {
		t.Error(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	if _, err := l.Client().Ping(ctx, v6); err == nil {
		t.Error("a paused node answered a ping")
	}
	cancel()
	if err := node.Resume(t.Context()); err != nil {
		t.Error(err)
	}
	if _, err := l.Client().Ping(within(t, 30*time.Second), v6); err != nil {
		t.Error(err)
	}

	if err := node.Shutdown(within(t, 60*time.Second)); err != nil {
		t.Error(err)
	}
	l.Node(1).Kill()
	if node.Running() || l.Node(1).Running() {
		t.Error("a machine runs after its end")
	}
	if _, err := node.WaitStage(t.Context(), "ready2"); err == nil || !strings.Contains(err.Error(), "power button") {
		t.Errorf("WaitStage of a machine that is off = %v; want an error with its console", err)
	}
	if err := node.Start(); err != nil {
		t.Fatal(err)
	}
	if err := node.Start(); err == nil {
		t.Error("a machine was started twice")
	}
	s, err := node.WaitStage(within(t, 180*time.Second), "ready")
	if err != nil {
		t.Fatal(err)
	}
	if leases := l.Client().Leases(); len(leases) != 2 {
		t.Errorf("%d leases after a second boot; want 2, stable by address", len(leases))
	}
	if err := node.Reset(t.Context()); err != nil {
		t.Error(err)
	}
	again, err := node.WaitBoot(within(t, 180*time.Second), 3, "ready")
	if err != nil || again.Attrs["mgmt"] != s.Attrs["mgmt"] {
		t.Errorf("after a reset: %v, %v; want the address %s again", again, err, s.Attrs["mgmt"])
	}

	if got, want := ev.of("node2"), []string{"started", "reached init", "reached link", "reached ready", "exited"}; !slices.Equal(got, want) {
		t.Errorf("events of node2 = %q; want %q", got, want)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if b, err := os.ReadFile(filepath.Join(cfg.Dir, "node1.console.log")); err != nil || strings.Count(string(b), "stage=ready") != 3 {
		t.Errorf("console log of node1: %v, %d boots; want 3", err, strings.Count(string(b), "stage=ready"))
	}
	checkCapture(t, cfg.PCAP)
}

func get(t *testing.T, c *http.Client, url, want string) string {
	t.Helper()
	r, err := c.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Body.Close()
	b, err := io.ReadAll(r.Body)
	if err != nil || !strings.Contains(string(b), want) {
		t.Fatalf("GET %s = %.200q, %v; want %q", url, b, err, want)
	}
	return string(b)
}

func waitConsole(t *testing.T, m *lab.Machine, text string) {
	t.Helper()
	if _, err := m.VM().WaitLine(within(t, 60*time.Second), func(s string) bool { return strings.Contains(s, text) }); err != nil {
		t.Errorf("%v (%q)", err, text)
	}
}

func checkCapture(t *testing.T, file string) {
	t.Helper()
	if _, err := exec.LookPath("tshark"); err != nil {
		t.Log("tshark is not installed: the capture was not judged")
		return
	}
	fields := []string{"frame.interface_name", "eth.src", "frame.len", "arp.opcode", "icmpv6.type", "tcp.len",
		"dhcp.option.dhcp", "dhcp.option.dhcp_server_id", "_ws.malformed"}
	args := []string{"-n", "-r", file, "-T", "fields"} // once: tshark takes seconds to start
	for _, f := range fields {
		args = append(args, "-e", f)
	}
	out, err := exec.Command("tshark", args...).Output()
	if err != nil {
		t.Fatalf("tshark: %v", err)
	}
	number := func(s string) int { n, _ := strconv.Atoi(s); return n }
	seen := map[string]int{}
	for line := range strings.Lines(string(out)) {
		r := map[string]string{}
		for i, v := range strings.Split(strings.TrimSuffix(line, "\n"), "\t") {
			r[fields[i]] = v
		}
		port, src := r["frame.interface_name"], r["eth.src"]
		for what, is := range map[string]bool{
			"an echo reply from node1":           port == "node1" && src == "52:54:00:77:00:01" && r["icmpv6.type"] == "129",
			"a DHCP ACK from the client host":    port == "client" && r["dhcp.option.dhcp"] == "5" && r["dhcp.option.dhcp_server_id"] == "10.77.0.1",
			"ARP from node2":                     port == "node2" && r["arp.opcode"] != "",
			"a solicitation from the client":     port == "client" && r["icmpv6.type"] == "135",
			"a full segment":                     number(r["tcp.len"]) > 1000,
			"BAD: malformed":                     r["_ws.malformed"] != "",
			"BAD: longer than the MTU":           number(r["frame.len"]) > 1514,
			"BAD: node1's port, another source":  port == "node1" && src != "52:54:00:77:00:01",
			"BAD: the clone MAC as source":       src == "02:cc:0a:4d:00:0a",
			"BAD: a frame from no known port":    port != "node1" && port != "node2" && port != "client",
			"BAD: the client's port, other host": port == "client" && src != "52:54:00:77:ff:01",
		} {
			seen[what] += 0
			if is {
				seen[what]++
			}
		}
	}
	for what, n := range seen {
		switch bad := strings.HasPrefix(what, "BAD: "); {
		case bad && n > 0:
			t.Errorf("%d frames in the capture: %s", n, what)
		case !bad && n == 0:
			t.Errorf("no frame in the capture: %s", what)
		}
	}
	if len(seen) == 0 {
		t.Error("the capture is empty")
	}
}

// A lab whose machines cannot start must leave nothing behind.
func TestStartFails(t *testing.T) {
	accel := qemutest.Accel(t)
	tmp := t.TempDir()
	t.Setenv("TMPDIR", tmp)
	cfg := lab.Demo(2)
	cfg.Accel, cfg.Kernel = accel, "/nonexistent/bzImage"
	if l, err := lab.Start(t.Context(), cfg); err == nil {
		l.Close()
		t.Fatal("Start without a kernel succeeded")
	} else if !strings.Contains(err.Error(), "/nonexistent/bzImage") {
		t.Errorf("Start = %v; want it to name the kernel", err)
	}
	if left, _ := os.ReadDir(tmp); len(left) != 0 {
		t.Errorf("left behind: %v", left)
	}
}

func TestContextEndsLab(t *testing.T) {
	cfg := lab.Demo(2)
	cfg.Accel, cfg.Kernel = qemutest.Accel(t), qemutest.Kernel(t)
	ctx, cancel := context.WithCancel(t.Context())
	l, err := lab.Start(ctx, cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	cancel()
	for _, m := range l.Nodes() {
		m.VM().Wait(t.Context())
	}
	if err := l.Close(); err != nil {
		t.Error(err)
	}
	if err := l.Node(0).Start(); err == nil {
		t.Error("a machine was started in a closed lab")
	}
}

func TestValidate(t *testing.T) {
	good := func() lab.Config {
		c := lab.Demo(3)
		c.Kernel = "/boot/bzImage"
		return c
	}
	if err := good().Validate(); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name string
		mod  func(*lab.Config)
		want string
	}{
		{"no kernel", func(c *lab.Config) { c.Kernel = "" }, "no kernel"},
		{"no nodes", func(c *lab.Config) { c.Nodes = nil }, "no nodes"},
		{"a name twice", func(c *lab.Config) { c.Nodes[1].Name = "node1" }, "taken twice"},
		{"the client's name", func(c *lab.Config) { c.Nodes[1].Name = "client" }, "taken twice"},
		{"an address twice", func(c *lab.Config) { c.Nodes[1].MAC = c.Nodes[0].MAC }, "taken twice"},
		{"no address", func(c *lab.Config) { c.Nodes[1].MAC = nil }, "unicast"},
		{"a bad name", func(c *lab.Config) { c.Nodes[0].Name = "a/b" }, "machine name"},
		{"machine", func(c *lab.Config) { c.Machine = "pc" }, "machine type"},
		{"accelerator", func(c *lab.Config) { c.Accel = "magic" }, "accelerator"},
		{"two captures", func(c *lab.Config) { c.PCAP, c.Switch.Mirror = "x", io.Discard }, "at once"},
		{"forwards alone", func(c *lab.Config) { c.Client, c.Forwards = nil, make([]lab.Forward, 1) }, "client host"},
		{"forward to nowhere", func(c *lab.Config) { c.Forwards = make([]lab.Forward, 1) }, "no target"},
		{"the client", func(c *lab.Config) { c.Client.MAC = nil }, "unicast"},
		{"the switch", func(c *lab.Config) { c.Switch = vswitch.Config{Ageing: -1} }, "negative"},
		{"an initramfs alone", func(c *lab.Config) { c.Nodes[1].Boot = &lab.Boot{Initrd: []string{"/i"}} }, "node 1: an initramfs needs"},
		{"a node's firmware", func(c *lab.Config) { c.Nodes[2].Boot = &lab.Boot{Firmware: "x"} }, "node 2: firmware"},
		{"too many", func(c *lab.Config) { c.Nodes = lab.Demo(65).Nodes }, "at most 64"},
	} {
		c := good()
		tt.mod(&c)
		if err := c.Validate(); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: Validate = %v; want it to mention %q", tt.name, err, tt.want)
		}
	}
}

// Nodes that boot by themselves need no kernel, and one of another architecture
// no accelerator.
func TestOwnBoots(t *testing.T) {
	c := lab.Demo(3)
	c.Accel = qemu.KVM
	stick := []qemu.Disk{{Path: "/usb.img", Bus: qemu.USB, Snapshot: true}}
	for i, b := range []lab.Boot{
		{Firmware: qemu.UEFI, Disks: stick},
		{Firmware: qemu.BIOS, NetBoot: qemu.PXE},
		{Machine: qemu.Virt, Kernel: "/Image", Initrd: []string{"/a", "/b"}},
	} {
		c.Nodes[i].Boot = &b
	}
	if runtime.GOARCH != "amd64" {
		c.Accel = qemu.TCG
	}
	if err := c.Validate(); err != nil {
		t.Fatal(err)
	}
	c.Nodes[0].Boot = nil
	if err := c.Validate(); err == nil || !strings.Contains(err.Error(), "no kernel") {
		t.Errorf("Validate with one node that needs the lab's kernel = %v; want an error", err)
	}
}

func TestParseStage(t *testing.T) {
	for _, tt := range []struct {
		line string
		want string
	}{
		{"[  2.345] init: timeline stage=engine at=2.345s", "engine 2.345s map[]"},
		{"[ 12.000] init: timeline stage=service:web at=12s", "service:web 12s map[]"},
		{"[  2.345] init: timeline stage=ready at=2.3s node=52:54:00:77:00:01 mgmt=-", "ready 2.3s map[mgmt:- node:52:54:00:77:00:01]"},
		{"[  2.345] webd: timeline stage=ready at=2.3s", ""},
		{"[  2.345] init: timeline stage= at=2.3s", ""},
		{"[  2.345] init: timeline stage=x at=2.3", ""},
		{"[  2.345] init: timeline stage=x", ""},
		{"[  2.345] init: timeline stage=x at=-1s", ""},
		{"", ""},
	} {
		got := ""
		if s, ok := lab.ParseStage(tt.line); ok {
			got = fmt.Sprint(s.Name, " ", s.At, " ", s.Attrs)
		}
		if got != tt.want {
			t.Errorf("ParseStage(%q) = %q; want %q", tt.line, got, tt.want)
		}
	}
}

func FuzzParseStage(f *testing.F) {
	f.Add("[  2.345] init: timeline stage=ready at=2.3s node=52:54:00:77:00:01 mgmt=-")
	f.Add("init: timeline stage== at=9e9h")
	f.Fuzz(func(t *testing.T, line string) {
		if s, ok := lab.ParseStage(line); ok && (s.Name == "" || s.At < 0) {
			t.Errorf("ParseStage(%q) = %+v", line, s)
		}
	})
}
