package bench

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"clonecluster/config"
	"clonecluster/netcore/engine"
	"clonecluster/netcore/netnstest"
)

func TestMain(m *testing.M) {
	os.Exit(netnstest.Main(m, map[string]func([]string) int{"cloned": engine.Main, "sink": sink}))
}

// sink takes uploads on port 81.
func sink([]string) int {
	http.HandleFunc("/", func(_ http.ResponseWriter, r *http.Request) { _, _ = io.Copy(io.Discard, r.Body) })
	l, err := net.Listen("tcp", ":81")
	if err != nil {
		fmt.Println(err)
		return 1
	}
	fmt.Println("sink ready")
	fmt.Println(http.Serve(l, nil))
	return 1
}

// scale is how much is done in a round.
type scale struct {
	rounds   int
	requests time.Duration // of each kind
	octets   int64         // down, and up
	frames   int
}

const vip = "10.77.0.10"

var cloneMAC = [6]byte{0x02, 0xcc, 0x0a, 0x4d, 0x00, 0x0a}

// TestBench is "make bench".
func TestBench(t *testing.T) {
	if os.Getenv("CLONECLUSTER_BENCH") == "" {
		t.Skip("takes a quarter of an hour, and a machine with nothing else to do: make bench")
	}
	s := scale{rounds: 7, requests: 2 * time.Second, octets: 256 << 20, frames: 600_000}
	if n, err := strconv.Atoi(os.Getenv("BENCH_ROUNDS")); err == nil && n > 0 {
		s.rounds = n
	}
	r := measure(t, s)
	data, err := r.JSON()
	if err != nil {
		t.Fatal(err)
	}
	for path, data := range map[string][]byte{os.Getenv("CLONECLUSTER_BENCH"): data, "../../docs/benchmarks.md": r.Markdown()} {
		if err := os.WriteFile(path, data, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	fmt.Printf("%s", r.Markdown())
	for _, c := range r.Claims() {
		if !c.Holds() {
			t.Errorf("%s: %.2f; want %.2f or less", c.What, c.Value, c.Limit)
		}
	}
}

// TestSmoke: everything that is compared serves.
func TestSmoke(t *testing.T) {
	if testing.Short() {
		t.Skip("takes seconds: not with -short")
	}
	r := measure(t, scale{rounds: 1, requests: time.Second, octets: 1 << 20, frames: 2000})
	for _, s := range r.Series {
		if s.Why == "" && len(s.Runs) != 1 {
			t.Errorf("%s, %s: %d runs", s.Way, s.Work, len(s.Runs))
		}
		t.Logf("%s, %s: %+v %s", s.Way, s.Work, s.Runs, s.Why)
	}
	if text := string(r.Markdown()); !strings.Contains(text, "| plain host | 1.00 | 1.00 | 1.00 | 1.00 |") {
		t.Errorf("the report is\n%s", text)
	}
}

// A way is one way to serve, ready to be asked.
type way struct {
	name   string
	client *netnstest.Host
	target string
}

func measure(t *testing.T, s scale) *Report {
	for _, tool := range []string{"nginx", "haproxy", "wrk", "curl", "iptables"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("needs %s: make deps-test", tool)
		}
	}
	var uts unix.Utsname
	if err := unix.Uname(&uts); err != nil {
		t.Fatal(err)
	}
	r := &Report{Kernel: unix.ByteSliceToString(uts.Release[:]), Processors: runtime.NumCPU(), Rounds: s.rounds}
	served := prepareFiles(t, s)
	ways := []way{
		plain(t, served), cluster(t, served, "raw", 1), cluster(t, served, "bpf", 1), cluster(t, served, "raw", 2), cluster(t, served, "bpf", 2),
		xtCluster(t, served), dispatcher(t, served, "haproxy http"), dispatcher(t, served, "haproxy tcp"), dispatcher(t, served, "nginx proxy"),
	}
	series := map[[2]string]*Series{}
	add := func(way, work string, run Run) {
		k := [2]string{way, work}
		if series[k] == nil {
			series[k] = &Series{Way: way, Work: work}
		}
		series[k].Runs = append(series[k].Runs, run)
	}
	works := []struct {
		name string
		do   func(*testing.T, way, scale, files) Run
	}{{KeepAlive, keepAlive}, {Connection, connection}, {Download, download}, {Upload, upload}}
	receivers := receivers(t)
	for round := range s.rounds {
		for _, work := range works {
			for _, w := range ways {
				progress("round %d of %d: %s, %s", round+1, s.rounds, work.name, w.name)
				add(w.name, work.name, work.do(t, w, s, served))
			}
		}
		for _, rc := range receivers {
			progress("round %d of %d: %s, %s", round+1, s.rounds, Discard, rc.name)
			add(rc.name, Discard, rc.flood(t, s.frames))
		}
	}
	for _, work := range works {
		for _, w := range ways {
			r.Series = append(r.Series, *series[[2]string{w.name, work.name}])
		}
	}
	for _, rc := range receivers {
		r.Series = append(r.Series, *series[[2]string{rc.name, Discard}])
	}
	return r
}

// progress tells who watches a terminal where it is.
func progress(format string, args ...any) {
	if _, err := unix.IoctlGetTermios(int(os.Stderr.Fd()), unix.TCGETS); err == nil {
		fmt.Fprintf(os.Stderr, "\r\x1b[K"+format, args...)
	}
}

// busy is how long the processors of this machine have been at work since it booted.
func busy(t *testing.T) time.Duration {
	t.Helper()
	data, err := os.ReadFile("/proc/stat")
	if err != nil {
		t.Fatal(err)
	}
	line, _, _ := strings.Cut(string(data), "\n")
	sum := time.Duration(0)
	for i, field := range strings.Fields(line)[1:] {
		n, err := strconv.ParseInt(field, 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		switch i {
		case 3, 4, 7, 8, 9: // idle, waiting for a disk, stolen, and guests, which are user time already
		default:
			sum += time.Duration(n) * 10 * time.Millisecond
		}
	}
	return sum
}

// spent is what do cost the machine, less what it costs anyway, and how long it took.
func spent(t *testing.T, do func()) (cpu, wall time.Duration) {
	t.Helper()
	const rest = 300 * time.Millisecond
	idle := busy(t)
	time.Sleep(rest)
	before, start := busy(t), time.Now()
	idle = before - idle
	do()
	cpu, wall = busy(t)-before, time.Since(start)
	return max(cpu-time.Duration(float64(idle)*wall.Seconds()/rest.Seconds()), time.Millisecond), wall
}

var (
	wrkRequests = regexp.MustCompile(`(\d+) requests in `)
	wrkP99      = regexp.MustCompile(`(?m)^\s+99%\s+([0-9.]+)(us|ms|s)$`)
	wrkErrors   = regexp.MustCompile(`Socket errors: .*|Non-2xx.*`)
)

func keepAlive(t *testing.T, w way, s scale, _ files) Run { return wrk(t, w, s) }

func connection(t *testing.T, w way, s scale, _ files) Run {
	return wrk(t, w, s, "-H", "Connection: close")
}

func wrk(t *testing.T, w way, s scale, args ...string) Run {
	t.Helper()
	var out string
	cpu, wall := spent(t, func() {
		out = w.client.Run("wrk", append([]string{"-t1", "-c16", fmt.Sprintf("-d%ds", int(s.requests.Seconds())), "--latency",
			"http://" + w.target + "/small"}, args...)...)
	})
	m, p := wrkRequests.FindStringSubmatch(out), wrkP99.FindStringSubmatch(out)
	if m == nil || p == nil {
		t.Fatalf("%s: wrk says\n%s", w.name, out)
	}
	if e := wrkErrors.FindString(out); e != "" && !(len(args) > 0 && strings.HasPrefix(e, "Socket errors: connect 0, read")) {
		t.Errorf("%s: %s", w.name, e)
	}
	n, err := strconv.ParseFloat(m[1], 64)
	if err != nil || n == 0 {
		t.Fatalf("%s: wrk says\n%s", w.name, out)
	}
	latency, err := time.ParseDuration(p[1] + p[2])
	if err != nil {
		t.Fatal(err)
	}
	return Run{CPU: float64(cpu) / n, Rate: n / wall.Seconds(), P99: float64(latency)}
}

func download(t *testing.T, w way, s scale, _ files) Run {
	return transfer(t, w, s, "-o", "/dev/null", "http://"+w.target+"/big")
}

func upload(t *testing.T, w way, s scale, f files) Run {
	return transfer(t, w, s, "-T", f.big, "http://"+w.target+":81/upload")
}

func transfer(t *testing.T, w way, s scale, args ...string) Run {
	t.Helper()
	cpu, wall := spent(t, func() { w.client.Run("curl", append([]string{"-sSf", "--max-time", "120"}, args...)...) })
	n := float64(s.octets)
	return Run{CPU: float64(cpu) / n, Rate: n / wall.Seconds()}
}

// files are what is served and sent.
type files struct{ dir, big string }

func prepareFiles(t *testing.T, s scale) files {
	dir := t.TempDir()
	if shm, err := os.MkdirTemp("/dev/shm", "clonecluster-bench"); err == nil { // no disk shall matter
		t.Cleanup(func() { _ = os.RemoveAll(shm) })
		dir = shm
	}
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	f := files{dir, filepath.Join(dir, "big")}
	file, err := os.Create(f.big)
	if err == nil {
		err = file.Chmod(0o644)
	}
	if err == nil {
		err = file.Truncate(s.octets)
	}
	if err == nil {
		err = file.Close()
	}
	if err != nil {
		t.Fatal(err)
	}
	return f
}

// serve starts nginx and the sink on a host.
func serve(t *testing.T, h *netnstest.Host, f files) {
	t.Helper()
	nginx(t, h, fmt.Sprintf(`
		server {
			listen 80 backlog=4096;
			location = /small { default_type text/plain; return 200 "%s"; }
			location = /healthz { return 200; }
			location = /big { root %s; }
		}`, strings.Repeat("x", 1000), f.dir))
	h.Start("sink").Await(0, "sink ready")
	for _, url := range []string{"http://127.0.0.1/small", "http://127.0.0.1:81/"} {
		h.Run("curl", "-sSf", "--retry", "20", "--retry-connrefused", "--retry-delay", "1", "-o", "/dev/null", url)
	}
}

func nginx(t *testing.T, h *netnstest.Host, server string) {
	t.Helper()
	conf := filepath.Join(t.TempDir(), "nginx.conf")
	dir := t.TempDir()
	text := fmt.Sprintf(`daemon off; master_process off; pid %[1]s/pid; error_log stderr warn; user root;
		events { worker_connections 4096; }
		http {
			access_log off; sendfile on; tcp_nopush on; keepalive_requests 1000000000; client_max_body_size 0;
			client_body_temp_path %[1]s/b; proxy_temp_path %[1]s/p; fastcgi_temp_path %[1]s/f; uwsgi_temp_path %[1]s/u; scgi_temp_path %[1]s/s;
			%[2]s
		}`, dir, server)
	if err := os.WriteFile(conf, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	h.StartCommand("nginx", "-e", "stderr", "-c", conf)
}

func client(b *netnstest.Bed) *netnstest.Host {
	c := b.Host("client", "", "10.77.0.1/24")
	c.Sysctl("net.ipv4.ip_local_port_range", "1024 65535")
	c.Sysctl("net.ipv4.tcp_tw_reuse", "1")
	return c
}

// server is a host that serves, by default with an address of its own.
func server(t *testing.T, b *netnstest.Bed, i int, f files) *netnstest.Host {
	h := b.Host(fmt.Sprintf("server%d", i), fmt.Sprintf("52:54:00:77:00:%02x", i), fmt.Sprintf("10.77.0.%d/24", 100+i))
	serve(t, h, f)
	return h
}

func plain(t *testing.T, f files) way {
	b := netnstest.NewUnwatched(t)
	w := way{Plain, client(b), "10.77.0.101"}
	server(t, b, 1, f)
	return w
}

func cluster(t *testing.T, f files, datapath string, nodes int) way {
	b := netnstest.NewUnwatched(t)
	w := way{datapath, client(b), vip}
	if nodes > 1 {
		w.name = fmt.Sprintf("%s, %d nodes", datapath, nodes)
	}
	conf := filepath.Join(b.Dir, "cluster.yaml")
	text := strings.Replace(string(config.DemoYAML), "ports: [80/tcp]", "ports: [80-81/tcp]", 1)
	if err := os.WriteFile(conf, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	var engines []*netnstest.Process
	for i := range nodes {
		h := server(t, b, i+1, f)
		engines = append(engines, h.Start("cloned", "--config", conf, "--interface", "eth0", "--status-socket", filepath.Join(b.Dir, h.Name+".sock"),
			"--datapath", datapath, "--bpffs", b.BPFFS()))
	}
	for _, e := range engines {
		e.Await(0, fmt.Sprintf("state=serving slot=. of=%d agreed=true", nodes))
	}
	return w
}

// xtCluster is the kernel's own match: both servers have one address and one MAC, the
// switch learns nothing, and each drops what the hash of the client's address gives to the
// other.
func xtCluster(t *testing.T, f files) way {
	b := netnstest.NewUnwatched(t)
	w := way{"xt_cluster", client(b), vip}
	b.Switch.Run("ip", "link", "set", "br0", "type", "bridge", "ageing_time", "0")
	for i := range 2 {
		h := b.Host(fmt.Sprintf("server%d", i+1), "52:54:00:77:00:99", vip+"/24")
		serve(t, h, f)
		xtRules(h, i+1)
	}
	return w
}

// xtRules are those of iptables-extensions(8), on a host with the address already.
func xtRules(h *netnstest.Host, node int) {
	for _, rule := range [][]string{
		{"-m", "cluster", "--cluster-total-nodes", "2", "--cluster-local-node", strconv.Itoa(node), "--cluster-hash-seed", "0xdeadbeef", "-j", "MARK", "--set-mark", "0xffff"},
		{"-m", "mark", "!", "--mark", "0xffff", "-j", "DROP"},
	} {
		h.Run("iptables", append([]string{"-t", "mangle", "-A", "PREROUTING", "-i", "eth0"}, rule...)...)
	}
	h.Sysctl("net.netfilter.nf_conntrack_tcp_loose", "0")
}

func dispatcher(t *testing.T, f files, name string) way {
	b := netnstest.NewUnwatched(t)
	w := way{name, client(b), vip}
	for i := range 2 {
		server(t, b, i+1, f)
	}
	d := b.Host("dispatcher", "52:54:00:77:00:50", vip+"/24")
	d.Sysctl("net.ipv4.ip_local_port_range", "1024 65535")
	d.Sysctl("net.ipv4.tcp_tw_reuse", "1")
	if name == "nginx proxy" {
		var text strings.Builder
		for _, port := range []int{80, 81} {
			fmt.Fprintf(&text, `
				upstream u%[1]d { server 10.77.0.101:%[1]d; server 10.77.0.102:%[1]d; keepalive 64; }
				server {
					listen %[1]d backlog=4096;
					location / { proxy_pass http://u%[1]d; proxy_http_version 1.1; proxy_set_header Connection ""; proxy_request_buffering off; proxy_max_temp_file_size 0; }
				}`, port)
		}
		nginx(t, d, text.String())
	} else {
		mode := strings.TrimPrefix(name, "haproxy ")
		text := fmt.Sprintf("global\n maxconn 2000\ndefaults\n mode %s\n timeout connect 5s\n timeout client 60s\n timeout server 60s\n", mode)
		for _, port := range []int{80, 81} {
			text += fmt.Sprintf("listen l%[1]d\n bind :%[1]d\n balance roundrobin\n server s1 10.77.0.101:%[1]d\n server s2 10.77.0.102:%[1]d\n", port)
		}
		conf := filepath.Join(b.Dir, "haproxy.cfg")
		if err := os.WriteFile(conf, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		d.StartCommand("haproxy", "-db", "-f", conf)
	}
	w.client.Run("curl", "-sSf", "--retry", "20", "--retry-connrefused", "--retry-delay", "1", "-o", "/dev/null", "http://"+vip+"/small")
	return w
}

var clientAddr = netip.MustParseAddr("10.77.0.1")

func background(t *testing.T, h *netnstest.Host, run func(context.Context) error) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- h.Do(func() error { return run(ctx) }) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}
