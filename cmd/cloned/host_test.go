package main

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"clonecluster/netcore/bpf"
	"clonecluster/netcore/netnstest"
)

// These tests have hosts as an operator has them: nginx from Debian and cloned as a
// program of its own, with the package's example of a configuration. curl is the client.

const (
	vip4 = "10.77.0.10"
	vip6 = "fd77::10"
)

var cloneMAC = net.HardwareAddr{0x02, 0xcc, 0x0a, 0x4d, 0x00, 0x0a}

func TestMain(m *testing.M) {
	code := netnstest.Main(m, nil)
	if builtDir != "" {
		_ = os.RemoveAll(builtDir)
	}
	os.Exit(code)
}

// hosts are a bed of nodes and a client.
type hosts struct {
	*netnstest.Bed
	t      *testing.T
	cloned string // the program
	config string
	client *netnstest.Host
	nodes  []*host
	data   []byte // what nginx has for downloads
}

type host struct {
	*netnstest.Host
	hs       *hosts
	socket   string
	datapath string
	engine   *netnstest.Process
}

// newHosts builds a node for each of the datapaths, with nothing running.
func newHosts(t *testing.T, datapaths ...string) *hosts {
	t.Helper()
	if testing.Short() {
		t.Skip("takes seconds: not with -short")
	}
	hs := &hosts{Bed: netnstest.New(t, cloneMAC), t: t}
	if slices.Contains(datapaths, "bpf") {
		if err := bpf.Probe(); errors.Is(err, bpf.ErrUnsupported) {
			t.Skip(err)
		}
	}
	for _, tool := range []string{"nginx", "curl"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("needs %s (Debian packages nginx-light and curl)", tool)
		}
	}
	hs.cloned = filepath.Join(hs.Dir, "cloned")
	if out, err := exec.Command("go", "build", "-o", hs.cloned, ".").CombinedOutput(); err != nil {
		t.Fatalf("building cloned: %v: %s", err, out)
	}
	hs.config = filepath.Join(hs.Dir, "cluster.yaml")
	if err := os.WriteFile(hs.config, []byte(exampleConfig(t)), 0o600); err != nil {
		t.Fatal(err)
	}
	hs.data = make([]byte, 8<<20)
	if _, err := rand.Read(hs.data); err != nil {
		t.Fatal(err)
	}
	hs.client = hs.Host("client", "", "10.77.0.1/24", "fd77::1/64")
	for i, datapath := range datapaths {
		h := hs.Host(fmt.Sprintf("node%d", i+1), fmt.Sprintf("52:54:00:77:00:%02x", i+1), fmt.Sprintf("10.77.0.%d/24", 101+i), fmt.Sprintf("fd77::%d/64", 101+i))
		hs.nodes = append(hs.nodes, &host{Host: h, hs: hs, socket: filepath.Join(hs.Dir, h.Name+".sock"), datapath: datapath})
	}
	return hs
}

// exampleConfig is the package's example, with what has to be filled in, and the
// addresses of the bed.
func exampleConfig(t *testing.T) string {
	t.Helper()
	data, err := os.ReadFile("debian/cluster.yaml")
	if err != nil {
		t.Fatal(err)
	}
	text := string(data)
	for _, r := range [][2]string{
		{`key: ""`, "key: MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY="},
		{"192.0.2.10/24", vip4 + "/24"}, {"192.0.2.1 ", "10.77.0.1 "},
		{"# ipv6: 2001:db8::10/64", "ipv6: " + vip6 + "/64"}, {"# ipv6-gateway: fe80::1", "ipv6-gateway: fd77::1"},
		{", 443/tcp", ""},
		// This machine is busy with other tests.
		{"  drain: 30s", "  detect: relaxed\n  drain: 30s"},
	} {
		if !strings.Contains(text, r[0]) {
			t.Fatalf("the example has no %q", r[0])
		}
		text = strings.Replace(text, r[0], r[1], 1)
	}
	return text
}

// nginx starts one that says who it is.
func (h *host) nginx() {
	t := h.hs.t
	t.Helper()
	dir := filepath.Join(h.hs.Dir, h.Name)
	for _, d := range []string{"logs", "www"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	conf := fmt.Sprintf(`daemon off; user root; worker_processes 1; pid nginx.pid; error_log stderr;
events {}
http {
	access_log off; default_type text/plain; client_body_temp_path body; proxy_temp_path proxy; fastcgi_temp_path fastcgi; uwsgi_temp_path uwsgi; scgi_temp_path scgi;
	server { listen 80; listen [::]:80; root %s/www; location = /whoami { return 200 "%s\n"; } }
}
`, dir, h.Name)
	file := filepath.Join(dir, "nginx.conf")
	for name, data := range map[string][]byte{file: []byte(conf), filepath.Join(dir, "www", "data"): h.hs.data} {
		if err := os.WriteFile(name, data, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	p := h.StartCommand("nginx", "-p", dir, "-c", file)
	// Its workers would outlive it.
	t.Cleanup(func() { _ = p.Stop() })
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		if _, err := h.Try("curl", "-sf", "http://127.0.0.1/whoami"); err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s: nginx does not answer: %s", h.Name, p.Output())
		}
	}
}

// start starts cloned, wrapped in other commands if there are any.
func (h *host) start(wrap ...string) {
	h.engine = h.launch(wrap...)
	h.engine.Await(0, "engine running")
}

func (h *host) launch(wrap ...string) *netnstest.Process {
	args := append(slices.Clone(wrap), h.hs.cloned, "--config", h.hs.config, "--status-socket", h.socket, "--datapath", h.datapath, "--bpffs", h.hs.BPFFS())
	return h.StartCommand(args[0], args[1:]...)
}

// agree waits until all nodes serve together.
func (hs *hosts) agree() {
	hs.t.Helper()
	for _, h := range hs.nodes {
		h.engine.Await(0, fmt.Sprintf(`state=serving slot=\d+ of=%d agreed=true`, len(hs.nodes)))
	}
}

// answers counts who answers n requests.
func (hs *hosts) answers(n int, host string) map[string]int {
	hs.t.Helper()
	count := map[string]int{}
	for range n {
		count[strings.TrimSpace(hs.client.Run("curl", "-sSf", "--max-time", "20", "http://"+host+"/whoami"))]++
	}
	return count
}

// TestHosts: three of them serve, restart under downloads, and are afterwards as if
// cloned had never been there: addresses, routes, rules, every setting, firewalls.
func TestHosts(t *testing.T) {
	t.Run("raw first", func(t *testing.T) { testHosts(t, "raw", "bpf", "bpf") })
	t.Run("bpf first", func(t *testing.T) { testHosts(t, "bpf", "raw", "raw") })
}

func testHosts(t *testing.T, datapaths ...string) {
	hs := newHosts(t, datapaths...)
	before := map[*host]string{}
	for _, h := range hs.nodes {
		h.nginx()
		before[h] = h.State()
		if out, err := h.Try(hs.cloned, "check", "--config", hs.config, "--bpffs", hs.BPFFS()); err != nil {
			t.Errorf("%s: cloned check: %v:\n%s", h.Name, err, out)
		}
	}
	for _, h := range hs.nodes {
		h.start()
	}
	hs.agree()
	for _, host := range []string{vip4, "[" + vip6 + "]"} {
		if got := hs.answers(45, host); len(got) != 3 {
			t.Errorf("%s: 45 requests were answered by %v; want all three", host, got)
		}
	}

	// Downloads of two seconds and more, while each engine is restarted.
	want := fmt.Sprintf("%x", sha256.Sum256(hs.data))
	var downloads sync.WaitGroup
	for i := range 12 {
		host := []string{vip4, "[" + vip6 + "]"}[i%2]
		downloads.Go(func() {
			ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
			defer cancel()
			out, err := hs.client.Command(ctx, "sh", "-c", "curl -sSf --limit-rate 1M http://"+host+"/data | sha256sum").CombinedOutput()
			if err != nil || !strings.HasPrefix(string(out), want) {
				t.Errorf("a download: %v: %s; want %s", err, out, want)
			}
		})
	}
	for _, h := range hs.nodes {
		time.Sleep(200 * time.Millisecond)
		h.engine.Signal(syscall.SIGHUP)
		if err := h.engine.Wait(); err != nil {
			t.Errorf("%s: ended with %v for the restart:\n%s", h.Name, err, h.engine.Output())
		}
		h.start()
		hs.answers(5, vip4)
	}
	downloads.Wait()
	for _, h := range hs.nodes {
		h.engine.Await(0, `state=serving slot=\d+ of=3 agreed=true`)
	}

	// The first ends gracefully; the second was killed, and its next one ends so; the
	// third was killed, and somebody cleans up.
	stop := func(h *host) {
		if err := h.engine.Stop(); err != nil {
			t.Errorf("%s: a graceful stop: %v:\n%s", h.Name, err, h.engine.Output())
		}
	}
	stop(hs.nodes[0])
	hs.nodes[1].engine.Kill()
	hs.nodes[1].start()
	if out, err := hs.nodes[2].Try(hs.cloned, "clean", "--status-socket", hs.nodes[2].socket, "--bpffs", hs.BPFFS()); err == nil {
		t.Errorf("cloned clean beside a running engine: %s", out)
	}
	hs.nodes[2].engine.Kill()
	if out := hs.nodes[2].Run(hs.cloned, "clean", "--status-socket", hs.nodes[2].socket, "--bpffs", hs.BPFFS()); !strings.Contains(out, "removed clone0") {
		t.Errorf("cloned clean: %s", out)
	}
	hs.nodes[1].engine.Await(0, `state=serving slot=\d+ of=1 agreed=true`)
	if got := hs.answers(10, vip4); got["node2"] != 10 {
		t.Errorf("the last node left answers %v", got)
	}
	stop(hs.nodes[1])
	if pins, _ := filepath.Glob(filepath.Join(hs.BPFFS(), "clonecluster", "*")); len(pins) > 0 {
		t.Errorf("BPF programs are left: %v", pins)
	}
	for _, h := range hs.nodes {
		if after := h.State(); after != before[h] {
			t.Errorf("%s is not as it was:\n%s", h.Name, netnstest.Difference(before[h], after))
		}
	}
	if port, ok := hs.Learned()[cloneMAC.String()]; ok {
		t.Errorf("the switch has learned the clone MAC at port %s", port)
	}
}

// confined runs a command with these capabilities and this limit of locked memory
// ("" for the default), as the service manager does.
func confined(caps []string, memlock string) []string {
	set := "-all"
	for _, c := range caps {
		set += ",+" + strings.TrimPrefix(strings.ToLower(c), "cap_")
	}
	limit := "65536"
	if memlock == "infinity" {
		limit = "unlimited"
	}
	return []string{"prlimit", "--memlock=" + limit + ":" + limit, "setpriv", "--bounding-set", set, "--inh-caps", "-all", "--no-new-privs"}
}

// TestCapabilities runs cloned with exactly what the unit grants: it serves, warns of
// nothing and takes everything down. With one less each it refuses, or says what it
// lacks.
func TestCapabilities(t *testing.T) {
	for _, tool := range []string{"setpriv", "prlimit"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("needs %s (Debian package util-linux)", tool)
		}
	}
	t.Run("raw", func(t *testing.T) {
		testCapabilities(t, "raw", []less{
			{"CAP_NET_ADMIN", true, "CAP_NET_ADMIN is missing"}, {"CAP_NET_RAW", true, "CAP_NET_RAW is missing"},
			{"CAP_SYS_NICE", false, "no urgent thread"}, {"LimitMEMLOCK", false, "memory cannot be locked"},
		})
	})
	t.Run("bpf", func(t *testing.T) {
		testCapabilities(t, "bpf", []less{
			{"CAP_NET_ADMIN", true, "CAP_NET_ADMIN is missing"}, {"CAP_NET_RAW", true, "CAP_NET_RAW is missing"},
			{"CAP_BPF", true, "CAP_BPF is missing"}, {"CAP_PERFMON", true, "CAP_PERFMON is missing"},
		})
	})
}

// less is what is taken away, and what comes of it.
type less struct {
	what    string
	refused bool
	says    string
}

func testCapabilities(t *testing.T, datapath string, lesses []less) {
	hs := newHosts(t, datapath)
	u := readUnit(t)
	caps := u.words("CapabilityBoundingSet")
	memlock := u.last("LimitMEMLOCK")
	granted := slices.Clone(caps)
	if err := exec.Command("prlimit", "--memlock=unlimited:unlimited", "true").Run(); err != nil {
		t.Log("without CAP_SYS_RESOURCE this test cannot set LimitMEMLOCK=infinity; CAP_IPC_LOCK stands for it")
		caps, memlock = append(slices.Clone(caps), "CAP_IPC_LOCK"), ""
	}
	h := hs.nodes[0]
	h.nginx()
	before := h.State()

	h.start(confined(caps, memlock)...)
	hs.agree()
	if got := hs.answers(5, vip4); got["node1"] != 5 {
		t.Errorf("with %v: answers %v", caps, got)
	}
	status, err := os.ReadFile("/proc/" + strconv.Itoa(h.pid()) + "/status")
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"NoNewPrivs:\t1", fmt.Sprintf("CapEff:\t%016x", u.capMask(caps))} {
		if !strings.Contains(string(status), want) {
			t.Errorf("the engine runs with other privileges than the unit's: no %q in\n%s", want, status)
		}
	}
	if err := h.engine.Stop(); err != nil {
		t.Errorf("a graceful stop: %v", err)
	}
	if out := h.engine.Output(); strings.Contains(out, "level=WARN") || strings.Contains(out, "level=ERROR") {
		t.Errorf("with what the unit grants:\n%s", out)
	}
	if after := h.State(); after != before {
		t.Errorf("it could not take everything down:\n%s", netnstest.Difference(before, after))
	}

	for _, tt := range lesses {
		rest, limit := slices.DeleteFunc(slices.Clone(caps), func(c string) bool { return c == tt.what }), memlock
		if tt.what == "LimitMEMLOCK" {
			rest, limit = granted, ""
		} else if len(rest) == len(caps) {
			t.Errorf("the unit does not grant %s", tt.what)
			continue
		}
		p := h.launch(confined(rest, limit)...)
		if tt.refused {
			if err := p.Wait(); err == nil || !strings.Contains(p.Output(), tt.says) {
				t.Errorf("without %s: %v; want a refusal that says %q:\n%s", tt.what, err, tt.says, p.Output())
			}
		} else {
			p.Await(0, tt.says)
			p.Await(0, "state=serving")
			if err := p.Stop(); err != nil {
				t.Errorf("without %s: a graceful stop: %v", tt.what, err)
			}
		}
		if after := h.State(); after != before {
			t.Errorf("without %s the machine is not as it was:\n%s", tt.what, netnstest.Difference(before, after))
		}
	}
}

// pid finds the engine's process by its status socket's path.
func (h *host) pid() int {
	out, err := exec.Command("pgrep", "-f", "cloned --config "+h.hs.config+" --status-socket "+h.socket).Output()
	if err != nil {
		h.hs.t.Fatalf("looking for the engine: %v", err)
	}
	pid, err := strconv.Atoi(strings.Fields(string(out))[0])
	if err != nil {
		h.hs.t.Fatal(err)
	}
	return pid
}
