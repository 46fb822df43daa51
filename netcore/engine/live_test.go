package engine_test

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"clonecluster/config"
	"clonecluster/netcore/engine"
	"clonecluster/netcore/netnstest"
	"clonecluster/qemu/qemutest"
)

func TestMain(m *testing.M) {
	qemutest.Guest()
	os.Exit(netnstest.Main(m, map[string]func([]string) int{
		"cloned": engine.Main,
		"httpd":  httpd,
	}))
}

// httpd is the service of the tests: who answers, streams both ways with their
// checksums, and the address of whoever asks. Its health check fails while the
// file of its second argument exists.
func httpd(args []string) int {
	name := args[0]
	mux := http.NewServeMux()
	mux.HandleFunc("GET /whoami", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, name) })
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) {
		if len(args) > 1 {
			if _, err := os.Stat(args[1]); err == nil {
				http.Error(w, "sick", http.StatusServiceUnavailable)
			}
		}
	})
	mux.HandleFunc("GET /client", func(w http.ResponseWriter, r *http.Request) { fmt.Fprintln(w, r.RemoteAddr) })
	mux.HandleFunc("GET /download/{size}", func(w http.ResponseWriter, r *http.Request) {
		size, _ := strconv.ParseInt(r.PathValue("size"), 10, 64)
		w.Header().Set("Content-Length", strconv.FormatInt(size, 10))
		_, _ = io.CopyN(w, &pattern{}, size)
	})
	mux.HandleFunc("POST /upload", func(w http.ResponseWriter, r *http.Request) {
		h := sha256.New()
		n, err := io.Copy(h, r.Body)
		fmt.Fprintf(w, "%d %x %v\n", n, h.Sum(nil), err)
	})
	// One line a tick on one connection, to see whether it lives.
	mux.HandleFunc("GET /echo", func(w http.ResponseWriter, r *http.Request) {
		conn, rw, err := w.(http.Hijacker).Hijack()
		if err != nil {
			return
		}
		defer conn.Close()
		for {
			line, err := rw.ReadString('\n')
			if err != nil {
				return
			}
			if _, err := fmt.Fprintf(conn, "%s %s", name, line); err != nil {
				return
			}
		}
	})
	l, err := net.Listen("tcp", ":80")
	if err != nil {
		fmt.Println(err)
		return 1
	}
	fmt.Println("httpd ready")
	fmt.Println(http.Serve(l, mux))
	return 1
}

// pattern is an endless stream in which a lost, doubled or moved piece shows.
type pattern struct{ offset int }

func (p *pattern) Read(b []byte) (int, error) {
	for i := range b {
		b[i] = byte(p.offset ^ p.offset>>8 ^ p.offset>>16)
		p.offset++
	}
	return len(b), nil
}

const (
	vip4  = "10.77.0.10"
	vip6  = "fd77::10"
	clone = "02:cc:0a:4d:00:0a"
)

var cloneMAC = net.HardwareAddr{0x02, 0xcc, 0x0a, 0x4d, 0x00, 0x0a}

// cluster is a bed with nodes that run cloned and httpd.
type cluster struct {
	*netnstest.Bed
	t      testing.TB
	config string
	nodes  []*node
	client *netnstest.Host
}

type node struct {
	*netnstest.Host
	c        *cluster
	status   string
	datapath string
	cloned   *netnstest.Process
}

// newCluster builds n nodes and a client, with nothing running yet.
func newCluster(t testing.TB, n int) *cluster {
	t.Helper()
	if testing.Short() {
		t.Skip("takes seconds: not with -short")
	}
	c := &cluster{Bed: netnstest.New(t, cloneMAC), t: t}
	c.config = filepath.Join(c.Dir, "cluster.yaml")
	writeConfig(t, c.config)
	c.client = c.Host("client", "", "10.77.0.1/24", "fd77::1/64")
	for i := range n {
		mgmt := []string{fmt.Sprintf("10.77.0.%d/24", 101+i), fmt.Sprintf("fd77::%d/64", 101+i)}
		h := c.Host(fmt.Sprintf("node%d", i+1), fmt.Sprintf("52:54:00:77:00:%02x", i+1), mgmt...)
		c.nodes = append(c.nodes, c.node(h))
	}
	return c
}

// Of the live tests each can run on any datapath: CLONECLUSTER_DATAPATH=raw, bpf, or
// mixed, which is both in turns; raw is the default. For native see TestNative.
func datapathOf(i int) string {
	switch want := os.Getenv("CLONECLUSTER_DATAPATH"); want {
	case "":
		return "raw"
	case "mixed":
		return []string{"bpf", "raw"}[i%2]
	default:
		return want
	}
}

// writeConfig writes the demo's configuration with texts replaced, given in
// pairs of old and new.
func writeConfig(t testing.TB, file string, replace ...string) {
	t.Helper()
	text := string(config.DemoYAML)
	for i := 0; i < len(replace); i += 2 {
		if !strings.Contains(text, replace[i]) {
			t.Fatalf("the demo's configuration has no %q", replace[i])
		}
		text = strings.ReplaceAll(text, replace[i], replace[i+1])
	}
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

// start starts all nodes and waits until they agree.
func (c *cluster) start() {
	c.t.Helper()
	for _, n := range c.nodes {
		n.StartHTTP()
		n.start()
	}
	c.agree(c.nodes...)
}

func (n *node) StartHTTP() { n.Start("httpd", n.Name, n.sickness()).Await(0, "httpd ready") }

// sickness is the file that makes the node's service fail its check.
func (n *node) sickness() string { return filepath.Join(n.c.Dir, n.Name+".sick") }

func (n *node) setSick(sick bool) {
	n.c.t.Helper()
	var err error
	if sick {
		err = os.WriteFile(n.sickness(), nil, 0o600)
	} else {
		err = os.Remove(n.sickness())
	}
	if err != nil {
		n.c.t.Fatal(err)
	}
}

func (n *node) start() { n.cloned = n.Start("cloned", n.flags("--log-level", "debug")...) }

// flags are those of cloned for this node, and more.
func (n *node) flags(more ...string) []string {
	return append([]string{
		"--config", n.c.config, "--interface", "eth0", "--status-socket", n.status, "--datapath", n.datapath, "--bpffs", n.c.BPFFS(),
	}, more...)
}

// node makes a host one of this cluster; it is not one of its nodes.
func (c *cluster) node(h *netnstest.Host) *node {
	return &node{Host: h, c: c, status: filepath.Join(c.Dir, h.Name+".sock"), datapath: datapathOf(len(c.nodes))}
}

// agree waits until exactly these nodes serve, and all of them say so.
func (c *cluster) agree(nodes ...*node) {
	c.t.Helper()
	var want []string
	for _, n := range nodes {
		want = append(want, n.MAC)
	}
	for _, n := range nodes {
		pattern := fmt.Sprintf(`state=serving slot=\d+ of=%d agreed=true nodes="?%s"?\n`, len(want), strings.Join(want, " "))
		n.cloned.Await(n.lastView(), pattern)
	}
}

// lastView is the offset of the last line about the view: what came before it
// does not count.
func (n *node) lastView() int {
	lines := regexp.MustCompile(`(?m)^.*msg=view.*\n`).FindAllStringIndex(n.cloned.Output(), -1)
	if len(lines) == 0 {
		return 0
	}
	return lines[len(lines)-1][0]
}

func (n *node) Status() engine.Status {
	n.c.t.Helper()
	tr := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", n.status)
	}}
	defer tr.CloseIdleConnections()
	resp, err := (&http.Client{Transport: tr, Timeout: 10 * time.Second}).Get("http://cloned/v1/status")
	if err != nil {
		n.c.t.Fatalf("%s: status: %v", n.Name, err)
	}
	defer resp.Body.Close()
	var s engine.Status
	if err := json.NewDecoder(resp.Body).Decode(&s); err != nil {
		n.c.t.Fatalf("%s: status: %v", n.Name, err)
	}
	return s
}

// http is a client that opens a connection for each request.
func (c *cluster) http() *http.Client {
	return &http.Client{
		Transport: &http.Transport{DialContext: c.client.DialContext, DisableKeepAlives: true},
		Timeout:   20 * time.Second,
	}
}

func (c *cluster) get(url string) string {
	c.t.Helper()
	body, err := tryGet(c.http(), url)
	if err != nil {
		for _, n := range c.nodes {
			if n.cloned != nil {
				c.t.Logf("%s:\n%s", n.Name, n.cloned.Output())
			}
		}
		c.t.Fatal(err)
	}
	return body
}

func tryGet(client *http.Client, url string) (string, error) {
	resp, err := client.Get(url)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	return strings.TrimSpace(string(b)), err
}

// checkSwitch asserts that the switch knows every node by its wire MAC, and
// nobody by the clone MAC.
func (c *cluster) checkSwitch() {
	c.t.Helper()
	learned := c.Learned()
	if port, ok := learned[clone]; ok {
		c.t.Errorf("the switch has learned the clone MAC at port %s", port)
	}
	for _, n := range c.nodes {
		if learned[n.MAC] != n.Name {
			c.t.Errorf("the switch has %s (%s) at port %q", n.MAC, n.Name, learned[n.MAC])
		}
	}
}

// mustBeHealthy fails the test if the datapath counts what a healthy one does not.
func (n *node) mustBeHealthy(s engine.Status) {
	n.c.t.Helper()
	for name, count := range s.Counters {
		switch name {
		case "RxKernelDrops", "TxNoBuffer", "TxLinkDown":
		default:
			if count != 0 {
				n.c.t.Errorf("%s: the %s datapath counts %s %d", n.Name, s.Datapath, name, count)
			}
		}
	}
}

func TestClusterServes(t *testing.T) {
	c := newCluster(t, 3)
	c.start()
	for _, host := range []string{vip4, "[" + vip6 + "]"} {
		answers := map[string]int{}
		for range 60 {
			answers[c.get("http://"+host+"/whoami")]++
		}
		t.Logf("%s: %v", host, answers)
		if len(answers) != 3 {
			t.Errorf("%s: 60 connections were answered by %v; want all three nodes", host, answers)
		}
	}
	c.checkSwitch()
	total := 0
	for _, n := range c.nodes {
		s := n.Status()
		n.mustBeHealthy(s)
		total += s.Buckets.Settled
	}
	if total != 1024 {
		t.Errorf("%d buckets are settled; want each of the 1024 once", total)
	}
}

// rss is the memory of a node's engine that is in use, in kB.
func rss(t *testing.T, n *node) int {
	t.Helper()
	m := regexp.MustCompile(`(?m)^VmRSS:\s+(\d+) kB`).FindSubmatch(n.cloned.Proc(t, "status"))
	if m == nil {
		t.Fatalf("%s: the memory is not told", n.Name)
	}
	kB, err := strconv.Atoi(string(m[1]))
	if err != nil {
		t.Fatal(err)
	}
	return kB
}
