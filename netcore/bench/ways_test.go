package bench

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"

	"clonecluster/config"
	"clonecluster/netcore/macvlan"
	"clonecluster/netcore/netnstest"
)

const (
	vip = "10.77.0.10"
	// groupMAC is the address of xt_cluster's frames in iptables-extensions(8): a group, so
	// that the switch floods them.
	groupMAC = "01:00:5e:00:01:01"
)

var cloneMAC = [6]byte{0x02, 0xcc, 0x0a, 0x4d, 0x00, 0x0a}

// A way is one way to serve, on a switch of its own, ready to be asked.
type way struct {
	name    string
	bed     *netnstest.Bed
	client  *netnstest.Host
	target  string
	cluster bool     // of this project
	sockets []string // of its engines' status
}

// A plan is a way that is not built yet. The error of build says what this machine lacks.
type plan struct {
	name  string
	build func(w *way, f files) error
}

// plans are all ways, in the order of the report.
func (m *measurer) plans() []plan {
	return append([]plan{
		{Plain, m.plain},
		{"bpf", m.clones("bpf", "tc", 1, "")},
		{"raw", m.clones("raw", "tc", 1, "")},
		{"native", m.clones("native", "tc", 1, "")},
		{"bpf, XDP", m.clones("bpf", "xdp", 1, "")},
		{"bpf, generic XDP", m.genericXDP},
		{"bpf, 2 nodes", m.clones("bpf", "tc", 2, "")},
		{"raw, 2 nodes", m.clones("raw", "tc", 2, "")},
		{"native, 2 nodes", m.clones("native", "tc", 2, "")},
		{"bpf, 2 nodes, directed", m.clones("bpf", "tc", 2, directed)},
		{"raw, 2 nodes, directed", m.clones("raw", "tc", 2, directed)},
		{"xt_cluster, 2 nodes", m.xtCluster},
		{"haproxy http", m.haproxy("http")},
		{"haproxy tcp", m.haproxy("tcp")},
		{"nginx proxy", m.nginxProxy},
	}, m.floors()...)
}

// build builds a way; why says what this machine lacks for it.
func (m *measurer) build(p plan, f files) (w *way, why error) {
	if err := netnstest.Lacks("nginx", "wrk", "curl"); err != nil {
		m.t.Skipf("%v: make deps-test", err)
	}
	b := netnstest.NewUnwatched(m.t)
	w = &way{name: p.name, bed: b, client: b.Host("client", "", "10.77.0.1/24"), target: vip}
	clientSettings(w.client)
	if err := p.build(w, f); err != nil {
		return nil, err
	}
	for _, url := range []string{w.small(), w.sink()} {
		m.await(w.client, url)
	}
	return w, nil
}

func (w *way) small() string { return "http://" + w.target + "/small" }
func (w *way) big() string   { return "http://" + w.target + "/big" }
func (w *way) sink() string  { return "http://" + w.target + ":81/sink" }

// clientSettings let a host open so many connections to one address and port.
func clientSettings(h *netnstest.Host) {
	h.Sysctl("net.ipv4.ip_local_port_range", "1024 65535")
	h.Sysctl("net.ipv4.tcp_tw_reuse", "1")
}

// await waits until there is an answer.
func (m *measurer) await(h *netnstest.Host, url string) {
	h.Run("curl", "-sSf", "--max-time", "20", "--retry", "20", "--retry-connrefused", "--retry-delay", "1", "-o", "/dev/null", url)
}

// files are what is served and sent.
type files struct {
	dir, big string
	octets   int64
}

func prepareFiles(t *testing.T, octets int64) files {
	dir := t.TempDir()
	if shm, err := os.MkdirTemp("/dev/shm", "clonecluster-bench"); err == nil { // no disk shall matter
		t.Cleanup(func() { _ = os.RemoveAll(shm) })
		dir = shm
	}
	f := files{dir, filepath.Join(dir, "big"), octets}
	if err := errors.Join(os.WriteFile(f.big, make([]byte, octets), 0o644), os.Chmod(dir, 0o755)); err != nil {
		t.Fatal(err)
	}
	return f
}

// sink takes uploads on port 81. nginx would answer before it has them.
func sink([]string) int {
	l, err := net.Listen("tcp", ":81")
	if err != nil {
		fmt.Println(err)
		return 1
	}
	fmt.Println("sink ready")
	fmt.Println(http.Serve(l, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		n, buf := 0, make([]byte, 256<<10)
		for {
			more, err := r.Body.Read(buf)
			if n += more; err == io.EOF {
				break
			} else if err != nil {
				return
			}
		}
		fmt.Fprintln(w, n)
	})))
	return 1
}

// server is a host that serves, with an address of its own.
func (m *measurer) server(b *netnstest.Bed, i int, f files) *netnstest.Host {
	m.t.Helper()
	h := b.Host(fmt.Sprintf("server%d", i), fmt.Sprintf("52:54:00:77:00:%02x", i), fmt.Sprintf("10.77.0.%d/24", 100+i))
	// Connections that were closed stay for a minute; hundreds of thousands of them would make
	// every look-up of the machine dearer for whoever is measured later.
	h.Sysctl("net.ipv4.tcp_max_tw_buckets", "16384")
	h.Sysctl("net.core.somaxconn", "4096")
	m.nginx(h, fmt.Sprintf(`
		server {
			listen 80 backlog=4096;
			location = /small { default_type text/plain; return 200 "%s"; }
			location = /healthz { return 200; }
			location = /big { root %s; }
		}`, strings.Repeat("x", 1000), f.dir))
	h.Start("sink").Await(0, "sink ready")
	m.await(h, "http://127.0.0.1/small")
	return h
}

func (m *measurer) nginx(h *netnstest.Host, servers string) {
	m.t.Helper()
	dir := m.t.TempDir()
	conf := filepath.Join(dir, "nginx.conf")
	text := fmt.Sprintf(`daemon off; master_process off; pid %[1]s/pid; error_log stderr warn; user root;
		events { worker_connections 4096; }
		http {
			access_log off; sendfile on; tcp_nopush on; keepalive_requests 1000000000; client_max_body_size 0;
			client_body_temp_path %[1]s/b; proxy_temp_path %[1]s/p; fastcgi_temp_path %[1]s/f; uwsgi_temp_path %[1]s/u; scgi_temp_path %[1]s/s;
			%[2]s
		}`, dir, servers)
	if err := os.WriteFile(conf, []byte(text), 0o644); err != nil {
		m.t.Fatal(err)
	}
	h.StartCommand("nginx", "-e", "stderr", "-c", conf)
}

func (m *measurer) plain(w *way, f files) error {
	w.target = "10.77.0.101"
	m.server(w.bed, 1, f)
	return nil
}

// directed is the configuration's line for a network that does not flood.
const directed = "\nnetwork: {mode: directed}\n"

// clones is a cluster of this project, with more lines in its configuration.
func (m *measurer) clones(datapath, ingress string, nodes int, more string) func(*way, files) error {
	return func(w *way, f files) error {
		if datapath == "native" {
			if err := macvlan.ProbeWireAddress(); err != nil {
				return err
			}
		}
		w.cluster = true
		conf := filepath.Join(w.bed.Dir, "cluster.yaml")
		text := strings.NewReplacer("ports: [80/tcp]", "ports: [80-81/tcp]", "detect: relaxed", "detect: normal").Replace(string(config.DemoYAML)) + more
		if err := os.WriteFile(conf, []byte(text), 0o600); err != nil {
			m.t.Fatal(err)
		}
		var engines []*netnstest.Process
		for i := range nodes {
			h := m.server(w.bed, i+1, f)
			socket := filepath.Join(w.bed.Dir, h.Name+".sock")
			w.sockets = append(w.sockets, socket)
			engines = append(engines, h.Start("cloned", "--config", conf, "--interface", "eth0",
				"--status-socket", socket, "--datapath", datapath, "--ingress", ingress, "--bpffs", w.bed.BPFFS()))
		}
		hook := map[string]string{"tc": "(tcx|clsact)", "xdp": "XDP"}[ingress]
		if datapath == "raw" {
			hook = ".*"
		}
		for _, e := range engines {
			e.Await(0, fmt.Sprintf("msg=datapath name=%s ingress=%s", datapath, hook))
			e.Await(0, fmt.Sprintf("state=serving slot=. of=%d agreed=true", nodes))
			if more == directed {
				e.Await(0, "frames for the VIP are directed")
			}
		}
		return nil
	}
}

// awaitHashed waits until all engines know which program they are. They read it ten seconds
// after their start, which takes as much of a processor as thousands of requests.
func (m *measurer) awaitHashed(ways []*way) {
	m.t.Helper()
	for _, w := range ways {
		for _, socket := range w.sockets {
			m.progress("preparing: %s comes to rest", w.name)
			known := func() bool {
				// Others' programs are in the lists of the members, which stand further in.
				return strings.Contains(w.client.Run("curl", "-sSf", "--unix-socket", socket, "http://node/v1/status"), "\n  \"build\": ")
			}
			for deadline := time.Now().Add(time.Minute); !known(); time.Sleep(500 * time.Millisecond) {
				if m.mustGoOn(); time.Now().After(deadline) {
					m.t.Fatalf("%s: an engine does not say which program it is", w.name)
				}
			}
		}
	}
}

// genericXDP is a node whose XDP program the kernel runs, instead of the driver: on the
// packet, as tcx does, but earlier. The engine does not offer it.
func (m *measurer) genericXDP(w *way, f files) error {
	if err := m.clones("bpf", "xdp", 1, "")(w, f); err != nil {
		return err
	}
	m.makeGeneric(w.bed, w.bed.Hosts()[len(w.bed.Hosts())-1])
	return nil
}

// makeGeneric moves a node's XDP program from the driver to the kernel.
func (m *measurer) makeGeneric(b *netnstest.Bed, h *netnstest.Host) {
	m.t.Helper()
	program, pinned := m.pinned(b, h, "ingress_xdp")
	if err := errors.Join(pinned.Detach(), pinned.Unpin(), pinned.Close()); err != nil {
		m.t.Fatal(err)
	}
	if err := m.attach(h, "eth0", program, func(ifindex int) (io.Closer, error) {
		return link.AttachXDP(link.XDPOptions{Program: program, Interface: ifindex, Flags: link.XDPGenericMode})
	}); err != nil {
		m.t.Fatal(err)
	}
}

// pinned gives a program that a node has attached, and the link; the caller closes both.
func (m *measurer) pinned(b *netnstest.Bed, h *netnstest.Host, name string) (*ebpf.Program, link.Link) {
	m.t.Helper()
	pins := ""
	bpffs := b.BPFFS()
	err := h.Do(func() (err error) { pins, err = macvlan.PinsOf(bpffs); return err })
	if err != nil {
		m.t.Fatal(err)
	}
	l, err := link.LoadPinnedLink(filepath.Join(pins, name), nil)
	if err != nil {
		m.t.Fatal(err)
	}
	info, err := l.Info()
	if err != nil {
		m.t.Fatal(err)
	}
	p, err := ebpf.NewProgramFromID(info.Program)
	if err != nil {
		m.t.Fatal(err)
	}
	return p, l
}

// xtCluster is the kernel's own match, set up as in iptables-extensions(8): all frames go to
// a group MAC, and each server drops what the hash of the client's address gives to another.
// The client has the VIP's MAC by hand, which arptables would tell it.
func (m *measurer) xtCluster(w *way, f files) error {
	for i := range 2 {
		h := m.server(w.bed, i+1, f)
		h.Run("ip", "addr", "add", vip+"/24", "dev", "eth0")
		h.Run("ip", "maddr", "add", groupMAC, "dev", "eth0")
		if err := xtRules(h, 1<<i); err != nil {
			return err
		}
	}
	w.client.Run("ip", "neigh", "replace", vip, "lladdr", groupMAC, "dev", "eth0")
	return nil
}

// xtRules are those of the manual, for the parts of two in mask.
func xtRules(h *netnstest.Host, mask int) error {
	for _, rule := range [][]string{
		{"-m", "cluster", "--cluster-total-nodes", "2", "--cluster-local-nodemask", strconv.Itoa(mask), "--cluster-hash-seed", "0xdeadbeef", "-j", "MARK", "--set-mark", "0xffff"},
		{"-m", "mark", "!", "--mark", "0xffff", "-j", "DROP"},
	} {
		if out, err := h.Try("iptables", append([]string{"-w", "-t", "mangle", "-A", "PREROUTING", "-i", "eth0"}, rule...)...); err != nil {
			return fmt.Errorf("iptables with the match xt_cluster: %s", strings.TrimSpace(out))
		}
	}
	h.Sysctl("net.netfilter.nf_conntrack_tcp_loose", "0")
	return nil
}

// dispatcher is a host with the VIP in front of two servers.
func (m *measurer) dispatcher(w *way, f files) *netnstest.Host {
	for i := range 2 {
		m.server(w.bed, i+1, f)
	}
	d := w.bed.Host("dispatcher", "52:54:00:77:00:50", vip+"/24")
	clientSettings(d)
	d.Sysctl("net.ipv4.tcp_max_tw_buckets", "16384")
	d.Sysctl("net.core.somaxconn", "4096")
	return d
}

func (m *measurer) haproxy(mode string) func(*way, files) error {
	return func(w *way, f files) error {
		if err := netnstest.Lacks("haproxy"); err != nil {
			return err
		}
		options := map[string]string{
			"http": "option http-keep-alive\n http-reuse always",
			"tcp":  "option splice-auto",
		}[mode]
		text := fmt.Sprintf("global\n maxconn 2000\ndefaults\n mode %s\n %s\n timeout connect 5s\n timeout client 60s\n timeout server 60s\n", mode, options)
		for _, port := range []int{80, 81} {
			text += fmt.Sprintf("listen l%[1]d\n bind :%[1]d backlog 4096\n balance roundrobin\n server s1 10.77.0.101:%[1]d\n server s2 10.77.0.102:%[1]d\n", port)
		}
		conf := filepath.Join(w.bed.Dir, "haproxy.cfg")
		if err := os.WriteFile(conf, []byte(text), 0o644); err != nil {
			m.t.Fatal(err)
		}
		m.dispatcher(w, f).StartCommand("haproxy", "-db", "-f", conf)
		return nil
	}
}

func (m *measurer) nginxProxy(w *way, f files) error {
	var text strings.Builder
	for _, port := range []int{80, 81} {
		fmt.Fprintf(&text, `
			upstream u%[1]d { server 10.77.0.101:%[1]d; server 10.77.0.102:%[1]d; keepalive 64; }
			server {
				listen %[1]d backlog=4096;
				location / {
					proxy_pass http://u%[1]d; proxy_http_version 1.1; proxy_set_header Connection "";
					proxy_request_buffering off; proxy_max_temp_file_size 0; proxy_buffers 16 64k; proxy_buffer_size 64k; proxy_busy_buffers_size 128k;
				}
			}`, port)
	}
	m.nginx(m.dispatcher(w, f), text.String())
	return nil
}
