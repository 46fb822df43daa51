package main

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"clonecluster/boards"
	"clonecluster/config"
	"clonecluster/image"
	"clonecluster/image/bundle"
	"clonecluster/image/kernel"
	"clonecluster/netcore/netnstest"
	"clonecluster/qemu/lab"
)

// built is the image of all tests here, made by the first that needs it.
var built struct {
	once sync.Once
	dir  string
	img  bootable
	err  error
}

func TestMain(m *testing.M) {
	// Clonectl is also a program of its own in network namespaces.
	code := netnstest.Main(m, map[string]func([]string) int{"clonectl": run})
	if built.dir != "" {
		os.RemoveAll(built.dir)
	}
	os.Exit(code)
}

// testImage is an image of the demo's cluster around the kernel that "make test"
// has built.
func testImage(t *testing.T) bootable {
	t.Helper()
	if testing.Short() {
		t.Skip("boots virtual machines, which takes minutes")
	}
	bzImage := os.Getenv("CLONECLUSTER_TEST_KERNEL")
	if bzImage == "" {
		t.Skip(`needs a kernel: make kernel, then CLONECLUSTER_TEST_KERNEL=$PWD/build/qemu-x86_64/bzImage ("make test" does both)`)
	}
	for _, program := range []string{"qemu-system-x86_64", "tshark"} {
		if _, err := exec.LookPath(program); err != nil {
			t.Skipf("needs %s (make deps-test)", program)
		}
	}
	built.once.Do(func() { built.img, built.err = buildTestImage(t.Context(), bzImage) })
	if built.err != nil {
		t.Fatal(built.err)
	}
	return built.img
}

func buildTestImage(ctx context.Context, bzImage string) (img bootable, err error) {
	if built.dir, err = os.MkdirTemp("", "clonecluster-test-image-"); err != nil {
		return img, err
	}
	board, err := boards.Get("qemu-x86_64")
	if err != nil {
		return img, err
	}
	_, err = bundle.Build(ctx, bundle.Options{
		Board: board, Config: config.DemoYAML, Minimal: true, OutDir: built.dir, Built: &kernel.Result{Image: bzImage},
	})
	if err != nil {
		return img, err
	}
	return openImage(built.dir, "")
}

// TestAppliance takes one cluster of three through its life: boot, traffic, a
// cable pulled and plugged, a node that loses its power and comes back, and the
// power buttons. Then tshark reads what the switch saw, all of it.
func TestAppliance(t *testing.T) {
	img := testImage(t)
	ctx, cancel := context.WithTimeout(t.Context(), 15*time.Minute)
	defer cancel()
	o := upOptions{nodes: 3, accel: "auto", listen: "127.0.0.1:0", pcap: filepath.Join(t.TempDir(), "all.pcapng")}
	cache, err := cacheDir()
	if err != nil {
		t.Fatal(err)
	}
	cfg, err := labConfig(img, o, cache)
	if err != nil {
		t.Fatal(err)
	}
	l, err := lab.Start(ctx, cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	defer func() {
		if t.Failed() {
			t.Log(l.Report())
		}
	}()
	life := &applianceLife{lab: l, cfg: img.config}
	for _, n := range cfg.Nodes {
		life.nodes = append(life.nodes, nodeRef{n.Name, n.MAC})
	}
	life.asker = newAsker(l.Client(), 80, life.nodes)
	if err := l.WaitAll(ctx, "ready"); err != nil {
		t.Fatal(err)
	}
	life.native(t)
	life.phase("booted")
	life.serves(ctx, t)
	life.forwards(ctx, t, "http://"+l.ForwardAddr(0).String()+"/whoami")
	life.phase("cable")
	life.cable(ctx, t)
	life.phase("power")
	life.powerLoss(ctx, t)
	life.phase("button")
	life.powerButton(ctx, t)
	life.phase("shutdown")
	stopCtx, cancelStop := context.WithTimeout(ctx, shutdownTimeout)
	defer cancelStop()
	if err := l.Shutdown(stopCtx); err != nil {
		t.Errorf("shutting down: %v", err)
	}
	life.phase("off")
	if c := checkGuard(l.Switch()); !c.OK {
		t.Error(c)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	life.dissect(t, o.pcap)
}

// native: the appliance's kernel takes the BPF programs and has wire addresses. An engine
// that must do without serves as well, so nothing else would tell.
func (a *applianceLife) native(t *testing.T) {
	t.Helper()
	for _, n := range a.nodes {
		log, err := os.ReadFile(filepath.Join(a.lab.LogDir(), n.name+".console.log"))
		if err != nil {
			t.Fatal(err)
		}
		if !strings.Contains(string(log), "msg=datapath name=native ") {
			t.Errorf("%s does not say that its datapath is native", n.name)
		}
	}
}

// TestBootBudgets holds what one boot takes against the budgets.
func TestBootBudgets(t *testing.T) {
	r, err := measure(t.Context(), testImage(t), true)
	if err != nil {
		t.Fatal(err)
	}
	for _, row := range r.Rows() {
		t.Logf("%s: %d of %d", row.Quantity, row.Value, row.Budget)
	}
	for _, q := range []image.Quantity{image.BootToHTTPReady, image.InitRSS, image.EngineRSS, image.ServiceRSS} {
		if !slices.ContainsFunc(r.Rows(), func(row image.Row) bool { return row.Quantity == q && row.Budget > 0 && row.Value > 0 }) {
			t.Errorf("%s was not measured, or has no budget", q)
		}
	}
	if err := r.Check(); err != nil {
		t.Error(err)
	}
}

type applianceLife struct {
	lab    *lab.Lab
	cfg    *config.Config
	nodes  []nodeRef
	asker  *asker
	phases []phase
}

type phase struct {
	name  string
	begin time.Time
}

func (a *applianceLife) phase(name string) {
	a.phases = append(a.phases, phase{name, time.Now()})
}

func (a *applianceLife) serves(ctx context.Context, t *testing.T) {
	// All have to agree first, or a node that was slow to boot has no share yet.
	a.untilAnswers(ctx, t, a.nodes...)
	checks, err := checkTraffic(ctx, a.asker, a.cfg, a.nodes, 30, func(string, ...any) {})
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range append(checks, checkSwitch(a.lab.Switch(), a.cfg.VIP.CloneMAC, a.nodes)...) {
		if !c.OK {
			t.Error(c)
		}
	}
}

// forwards asks as a browser on this computer would, with curl.
func (a *applianceLife) forwards(ctx context.Context, t *testing.T, url string) {
	out, err := exec.CommandContext(ctx, "curl", "-sS", "--max-time", "20", url).CombinedOutput()
	if err != nil || !bytes.Contains(out, []byte(`"node"`)) {
		t.Errorf("curl %s: %v: %s", url, err, out)
	}
}

// cable pulls a node's cable and plugs it in again. The others answer for it, and
// afterwards it has its share again.
func (a *applianceLife) cable(ctx context.Context, t *testing.T) {
	victim := a.lab.Node(1)
	if err := victim.Unplug(ctx); err != nil {
		t.Fatal(err)
	}
	a.untilSilent(ctx, t, a.nodes[1])
	if err := victim.Plug(ctx); err != nil {
		t.Fatal(err)
	}
	a.untilAnswers(ctx, t, a.nodes[1])
}

// powerLoss kills a node and starts it again.
func (a *applianceLife) powerLoss(ctx context.Context, t *testing.T) {
	victim := a.lab.Node(2)
	victim.Kill()
	a.untilSilent(ctx, t, a.nodes[2])
	if err := victim.Start(); err != nil {
		t.Fatal(err)
	}
	if _, err := victim.WaitStage(ctx, "ready"); err != nil {
		t.Fatal(err)
	}
	a.untilAnswers(ctx, t, a.nodes[2])
}

// powerButton stops one node while it is asked. It gives its share away first, so
// that nobody is refused.
func (a *applianceLife) powerButton(ctx context.Context, t *testing.T) {
	off := make(chan error, 1)
	go func() {
		stopCtx, cancel := context.WithTimeout(ctx, shutdownTimeout)
		defer cancel()
		off <- a.lab.Node(0).Shutdown(stopCtx)
	}()
	for asked := 0; ; asked++ {
		select {
		case err := <-off:
			if err != nil {
				t.Errorf("stopping %s: %v", a.nodes[0].name, err)
			}
			t.Logf("%d requests while %s stopped", asked, a.nodes[0].name)
			return
		default:
		}
		if _, err := a.asker.get(ctx, a.cfg.VIP.IPv4.Addr()); err != nil {
			t.Errorf("request %d while %s stops: %v", asked, a.nodes[0].name, err)
		}
	}
}

// untilAnswers asks until each of the nodes has answered.
func (a *applianceLife) untilAnswers(ctx context.Context, t *testing.T, nodes ...nodeRef) {
	t.Helper()
	missing := map[string]string{}
	for _, n := range nodes {
		missing[n.mac.String()] = n.name
	}
	for len(missing) > 0 {
		got, err := a.asker.get(ctx, a.cfg.VIP.IPv4.Addr())
		if ctx.Err() != nil {
			t.Fatalf("no answer from %v: %v", missing, err)
		}
		delete(missing, got.Node)
	}
}

// untilSilent asks until forty requests in a row were answered, and none by a
// node that is cut off: the others have taken over its buckets.
func (a *applianceLife) untilSilent(ctx context.Context, t *testing.T, gone nodeRef) {
	t.Helper()
	for row := 0; row < 40; {
		got, err := a.asker.get(ctx, a.cfg.VIP.IPv4.Addr())
		switch {
		case ctx.Err() != nil:
			t.Fatalf("%s is away, and the others have not taken over: %v", gone.name, err)
		case err != nil:
			row = 0
		case got.Node == gone.mac.String():
			t.Fatalf("%s answered though it is cut off", gone.name)
		default:
			row++
		}
	}
}

// dissect lets tshark judge the capture.
func (a *applianceLife) dissect(t *testing.T, pcap string) {
	clone, vip4, vip6 := a.cfg.VIP.CloneMAC.String(), a.cfg.VIP.IPv4.Addr(), a.cfg.VIP.IPv6.Addr()
	count := func(filter string) int { return len(tshark(t, pcap, filter, "frame.number")) }
	none := func(what, filter string) {
		t.Helper()
		if rows := tshark(t, pcap, filter, "frame.number", "frame.interface_name", "_ws.col.Protocol", "_ws.col.Info"); len(rows) > 0 {
			t.Errorf("%s: %d frames, the first: %s", what, len(rows), rows[0])
		}
	}
	some := func(what, filter string) {
		t.Helper()
		if n := count(filter); n == 0 {
			t.Errorf("%s: no frame in the capture; the test has seen too little", what)
		} else {
			t.Logf("%s: %d frames", what, n)
		}
	}
	var wires []string
	for _, n := range a.nodes {
		wires = append(wires, n.mac.String())
	}
	nodes := "eth.src in {" + strings.Join(wires, ", ") + "}"

	none("I1: the clone MAC as a source", "eth.src == "+clone)
	some("frames to the clone MAC", "eth.dst == "+clone)

	for what, claim := range map[string]string{
		"ARP replies for the VIP":              fmt.Sprintf("arp.opcode == 2 && arp.src.proto_ipv4 == %v", vip4),
		"ARP requests from the VIP":            fmt.Sprintf("arp.opcode == 1 && arp.src.proto_ipv4 == %v", vip4),
		"neighbour advertisements for the VIP": fmt.Sprintf("icmpv6.type == 136 && icmpv6.nd.na.target_address == %v", vip6),
		"neighbour solicitations from the VIP": fmt.Sprintf("icmpv6.type == 135 && ipv6.src == %v", vip6),
	} {
		payload := "arp.src.hw_mac == " + clone
		if strings.HasPrefix(claim, "icmpv6") {
			payload = "icmpv6.opt.linkaddr == " + clone
		}
		some(what, claim)
		none("I2: "+what+" without the clone MAC in the payload", fmt.Sprintf("(%s) && !(%s)", claim, payload))
		none("I2: "+what+" from another source than a wire MAC", fmt.Sprintf("(%s) && !(%s)", claim, nodes))
	}
	none("a wire MAC announced for the VIP", fmt.Sprintf("arp.src.proto_ipv4 == %v && arp.src.hw_mac in {%s}", vip4, strings.Join(wires, ", ")))
	some("TCP from the VIP", fmt.Sprintf("tcp && ip.src == %v && %s", vip4, nodes))
	some("TCP over IPv6 from the VIP", fmt.Sprintf("tcp && ipv6.src == %v && %s", vip6, nodes))
	some("DHCP of the nodes", "dhcp.type == 1")
	none("bad checksums", "ip.checksum.status == 0 || tcp.checksum.status == 0 || icmpv6.checksum.status == 0")

	// Each phase of the nodes' life is in the capture.
	for i, p := range a.phases[:len(a.phases)-1] {
		some("frames of the nodes in phase "+p.name, fmt.Sprintf("%s && frame.time_epoch >= %d.%09d && frame.time_epoch < %d.%09d", nodes,
			p.begin.Unix(), p.begin.Nanosecond(), a.phases[i+1].begin.Unix(), a.phases[i+1].begin.Nanosecond()))
	}
	some("frames of the nodes while they boot", fmt.Sprintf("%s && frame.time_epoch < %d.%09d", nodes, a.phases[0].begin.Unix(), a.phases[0].begin.Nanosecond()))
}

// tshark gives the named fields of the frames that a display filter selects, a
// line each.
func tshark(t *testing.T, pcap, filter string, fields ...string) []string {
	t.Helper()
	args := []string{"-n", "-r", pcap, "-Y", filter, "-T", "fields",
		"-o", "ip.check_checksum:TRUE", "-o", "tcp.check_checksum:TRUE"}
	for _, f := range fields {
		args = append(args, "-e", f)
	}
	var stderr bytes.Buffer
	cmd := exec.Command("tshark", args...)
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("tshark -Y %q: %v: %s", filter, err, stderr.String())
	}
	return slices.DeleteFunc(strings.Split(string(out), "\n"), func(s string) bool { return s == "" })
}

func TestLabNetwork(t *testing.T) {
	for _, test := range []struct{ yaml, want string }{
		{"vip: {ipv4: 192.0.2.1/24}", "192.0.2.2/24 dhcp 192.0.2.100-192.0.2.199"},
		{"vip: {ipv4: 192.0.2.150/24, ipv4-gateway: 192.0.2.9}", "192.0.2.9/24 dhcp 192.0.2.200-192.0.2.250"},
		{"vip: {ipv4: 192.0.2.18/28}", "192.0.2.17/28"},
		{"vip: {ipv6: \"2001:db8::1/64\"}", "2001:db8::2/64"},
	} {
		yaml := "cluster: {name: x, key: Y2xvbmVjbHVzdGVyIGRlbW8sIG5vdCBhIHNlY3JldCE=}\n" + test.yaml +
			"\nservices: [{name: web, run: [/bin/webd], ports: [8080/tcp]}]\n"
		c, err := config.Load([]byte(yaml), "test.yaml")
		if err != nil {
			t.Fatal(err)
		}
		img := bootable{config: c}
		img.board.Consoles = []string{"ttyS0"}
		l, err := labConfig(img, upOptions{nodes: 2, accel: "tcg", machine: "q35", listen: "127.0.0.1:0"}, "")
		if err != nil {
			t.Fatal(err)
		}
		if err := l.Validate(); err != nil {
			t.Errorf("%s: %v", test.yaml, err)
		}
		got := l.Client.Addrs[0].String()
		if d := l.Client.DHCP; d != nil {
			got += fmt.Sprintf(" dhcp %v-%v", d.First, d.Last)
		}
		if got != test.want {
			t.Errorf("%s: client is %s; want %s", test.yaml, got, test.want)
		}
		if !slices.ContainsFunc(l.Switch.Guard, func(m net.HardwareAddr) bool { return slices.Equal(m, c.VIP.CloneMAC) }) {
			t.Errorf("%s: the switch does not guard the clone MAC", test.yaml)
		}
		if l.Forwards[0].To.Port() != 8080 {
			t.Errorf("%s: forwards to %v", test.yaml, l.Forwards[0].To)
		}
	}
}
