package evaluation

import (
	"encoding/json"
	"fmt"
	"math"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"clonecluster/config"
	"clonecluster/netcore/engine"
	"clonecluster/netcore/load"
	"clonecluster/netcore/netnstest"
	"clonecluster/netcore/webstone"
)

func TestMain(m *testing.M) {
	os.Exit(netnstest.Main(m, map[string]func([]string) int{
		"cloned": engine.Main, "cloned-quota": netnstest.Over(load.ProcStat, "cloned"), "clients": clients, "probe": probe,
	}))
}

const (
	vip      = "10.77.0.10"
	gateway  = "10.77.0.1" // the clients, who come from addresses behind it
	sources  = 200
	groupMAC = "01:00:5e:00:01:01" // of xt_cluster's frames, as in netcore/bench
)

// A machine is one of the bed, on a quota.
type machine struct {
	*netnstest.Host
	group  *cgroup
	start  func()        // all that runs on it; again after its power was cut
	part   float64       // of the plan's quota
	may    time.Duration // what its quotas have allowed so far
	stat   *os.File      // what /proc/stat is to its engine
	socket string        // of its engine's status

	engine *netnstest.Process
}

// A bed is one way to serve, ready to be asked.
type bed struct {
	t        *testing.T
	plan     Plan
	net      *netnstest.Bed
	awake    *netnstest.Awake
	groups   *cgroups
	client   *netnstest.Host
	clients  *cgroup
	machines []*machine
	servers  []*machine
	content  string // folder of what is served (www) and the servers' certificate
	gauge    *gauge
	on       []int // the processors that the machines are kept on
	target   string
	configs  map[string]string
	built    time.Time     // when a machine started last
	threads  bool          // each machine's kernel work is on its quota
	current  atomic.Uint64 // the quota of a whole machine, as its bits
}

// missing is what this machine lacks for a set-up.
type missing struct{ error }

func newBed(t *testing.T, p Plan, s Setup, content content, detect string) (*bed, error) {
	t.Helper()
	b := &bed{t: t, plan: p, groups: newCgroups(t), content: content.folder, gauge: content.gauge, target: vip, configs: map[string]string{}, threads: true}
	b.current.Store(math.Float64bits(p.Quota))
	b.net, b.awake = netnstest.NewUnwatched(t), netnstest.KeepAwake(t)
	b.client = b.net.Host("client", "", gateway+"/24")
	b.clients = b.groups.add("clients", 0, 0)
	b.threaded(b.client, b.clients)
	b.client.Sysctl("net.ipv4.ip_local_port_range", "1024 65535")
	b.client.Sysctl("net.ipv4.tcp_tw_reuse", "1")
	var batch strings.Builder
	for i := range sources {
		fmt.Fprintf(&batch, "addr add %s/32 dev lo\n", source(i))
	}
	file := filepath.Join(b.net.Dir, "sources")
	if err := os.WriteFile(file, []byte(batch.String()), 0o600); err != nil {
		t.Fatal(err)
	}
	b.client.Run("ip", "-batch", file)
	if err := b.build(s, detect); err != nil {
		return nil, err
	}
	b.client.Run("curl", "-sSf", "--max-time", "20", "--retry", "20", "--retry-connrefused", "--retry-delay", "1", "-o", "/dev/null", "http://"+b.target+"/2000")
	b.built = time.Now()
	return b, nil
}

func source(i int) string { return fmt.Sprintf("10.78.%d.%d", i/250, 1+i%250) }

// serve gives all machines the quota of a workload.
func (b *bed) serve(workload string) {
	b.t.Helper()
	q := b.plan.quota(workload)
	if b.current.Swap(math.Float64bits(q)) == math.Float64bits(q) {
		return
	}
	for _, m := range b.machines {
		m.group.limit(b.t, m.part*q, b.period())
	}
}

// quota is that of a whole machine at present.
func (b *bed) quota() float64 { return math.Float64frombits(b.current.Load()) }

func (b *bed) period() time.Duration {
	return time.Duration(b.plan.PeriodMS * float64(time.Millisecond))
}

// threaded lets a thread do the kernel's work of what a host receives, and puts that into its
// cgroup. Otherwise it is done by, and is in the time of, whichever program sent.
func (b *bed) threaded(h *netnstest.Host, g *cgroup) {
	b.t.Helper()
	before := napiThreads()
	for _, step := range []struct {
		at   *netnstest.Host
		line string
	}{
		// Without GRO veth has no NAPI, and what came from a device with TSO passes it by
		// (veth_skb_is_eligible_for_napi in drivers/net/veth.c).
		{h, "ethtool -K eth0 gro on"},
		{b.net.Switch, "ethtool -K " + h.Name + " tso off"},
		{h, "echo 1 > /sys/class/net/eth0/threaded"},
		// A thread that is woken for each frame takes many times what an interrupt takes, and a card
		// does not interrupt for each frame. Here it looks again after a while until nothing has come.
		{h, fmt.Sprintf("echo %.0f > /sys/class/net/eth0/gro_flush_timeout", b.plan.ModerationMS*1e6)},
		{h, "echo 2 > /sys/class/net/eth0/napi_defer_hard_irqs"},
	} {
		if _, err := step.at.Try("sh", "-c", step.line); err != nil {
			b.threads = false
			return
		}
	}
	took := 0
	for pid := range napiThreads() {
		if !before[pid] && g.take(pid) == nil {
			took++
		}
	}
	b.threads = b.threads && took > 0
}

// napiThreads are all of this machine.
func napiThreads() map[int]bool {
	all := map[int]bool{}
	names, _ := filepath.Glob("/proc/[0-9]*/comm")
	for _, name := range names {
		if comm, err := os.ReadFile(name); err == nil && strings.HasPrefix(string(comm), "napi/") {
			if pid, err := strconv.Atoi(filepath.Base(filepath.Dir(name))); err == nil {
				all[pid] = true
			}
		}
	}
	return all
}

// accounting says it for the report.
func (b *bed) accounting() string {
	if b.threads {
		return "The kernel's work for what a machine receives, up to its sockets or to where a frame is discarded, is done by a thread of its own\n" +
			"  (threaded NAPI) on its quota. On kernels from 6.18 on a quota does not stop such a thread, as nothing stops a machine's\n" +
			"  interrupts, but what it takes is no longer there for the machine's programs. What a switch does for a frame, copying it to all\n" +
			"  ports included, is in the time of its sender. Towards a host the cables have no TSO, so large answers are cut up by their sender."
	}
	return "This kernel gives veth no threads of its own (threaded NAPI): the work for what a machine receives is done in the time of\n" +
		"  whoever sends, so that the quota limits only its programs and what they send."
}

// add adds a machine with that share of the quota.
func (b *bed) add(name, mac string, part float64, addresses ...string) *machine {
	b.t.Helper()
	m := &machine{Host: b.net.Host(name, mac, addresses...), part: part, group: b.groups.add(name, part*b.plan.Quota, b.period())}
	b.machines = append(b.machines, m)
	b.wire(m)
	return m
}

// wire is what is to be set on a machine whose kernel knows nothing yet.
func (b *bed) wire(m *machine) {
	b.t.Helper()
	b.threaded(m.Host, m.group)
	for key, value := range map[string]string{"net.ipv4.tcp_max_tw_buckets": "16384", "net.core.somaxconn": "8192", "net.ipv4.tcp_max_syn_backlog": "8192",
		"net.ipv4.ip_local_port_range": "1024 65535", "net.ipv4.tcp_tw_reuse": "1"} {
		m.Sysctl(key, value)
	}
	if out, err := m.Try("ip", "route", "replace", "default", "via", gateway); err != nil {
		b.t.Fatalf("%v: %s", err, out)
	}
}

// program starts a program of the test binary on a machine's quota, and command any other.
// They are put there when they have started: ip-netns(8) hides the cgroups from them.
func (m *machine) program(t *testing.T, name string, args ...string) *netnstest.Process {
	t.Helper()
	return m.limit(t, m.Start(name, args...))
}

func (m *machine) command(t *testing.T, name string, args ...string) *netnstest.Process {
	t.Helper()
	return m.limit(t, m.StartCommand(name, args...))
}

func (m *machine) limit(t *testing.T, p *netnstest.Process) *netnstest.Process {
	t.Helper()
	if err := m.group.take(p.PID()); err != nil {
		t.Fatalf("%s: %s: %v\n%s", m.Name, p.Name, err, p.Output())
	}
	return p
}

// nginx starts one with these servers.
func (b *bed) nginx(m *machine, servers string) {
	b.t.Helper()
	dir, err := os.MkdirTemp(b.net.Dir, "nginx")
	if err != nil {
		b.t.Fatal(err)
	}
	conf := filepath.Join(dir, "nginx.conf")
	text := fmt.Sprintf(`daemon off; master_process off; pid %[1]s/pid; error_log stderr warn; user root; worker_rlimit_nofile 65536;
events { worker_connections 8192; }
http {
  access_log off; sendfile on; tcp_nopush on; keepalive_requests 1000000000; open_file_cache max=100;
  client_body_temp_path %[1]s/b; proxy_temp_path %[1]s/p; fastcgi_temp_path %[1]s/f; uwsgi_temp_path %[1]s/u; scgi_temp_path %[1]s/s;
%[2]s
}
`, dir, servers)
	if err := os.WriteFile(conf, []byte(text), 0o644); err != nil {
		b.t.Fatal(err)
	}
	m.command(b.t, "nginx", "-e", "stderr", "-c", conf)
}

// server adds one with an address of its own.
func (b *bed) server(i int, part float64) *machine {
	b.t.Helper()
	m := b.add(fmt.Sprintf("server%d", i), fmt.Sprintf("52:54:00:77:00:%02x", i), part, fmt.Sprintf("10.77.0.%d/24", 100+i))
	m.start = func() {
		b.nginx(m, fmt.Sprintf("  server { listen 80 backlog=8192; listen 443 ssl backlog=8192; root %[1]s/www;\n"+
			"    ssl_certificate %[1]s/cert.pem; ssl_certificate_key %[1]s/key.pem; ssl_protocols TLSv1.3; ssl_session_cache off; ssl_session_tickets off; }", b.content))
		m.Run("curl", "-sSf", "--max-time", "20", "--retry", "20", "--retry-connrefused", "--retry-delay", "1", "-o", "/dev/null", "http://127.0.0.1/2000")
	}
	b.servers = append(b.servers, m)
	return m
}

func (b *bed) build(s Setup, detect string) error {
	servers := s.Machines
	if s.Way == HAProxy || s.Way == NGINX {
		servers--
	}
	for i := range servers {
		part := 1.
		if s.Uneven && i == servers-1 {
			part = 0.5
		}
		b.server(i+1, part)
	}
	switch s.Way {
	case Plain:
		b.target = "10.77.0.101"
	case Clone:
		b.clone(s.Policy, detect)
	case XtCluster:
		if err := b.xtCluster(); err != nil {
			return missing{err}
		}
	case HAProxy, NGINX:
		if err := netnstest.Lacks(strings.Fields(s.Way)[0]); err != nil {
			return missing{err}
		}
	default:
		return missing{fmt.Errorf("no way to serve is called %q", s.Way)}
	}
	for _, m := range b.servers {
		m.start()
	}
	if s.Way == HAProxy || s.Way == NGINX {
		b.dispatcher(s.Way)
	}
	if s.Bystander {
		b.add(bystander, "52:54:00:77:00:60", 1, "10.77.0.199/24")
	}
	if s.Way == Clone {
		b.agreed()
	}
	return nil
}

// clone makes nodes of the servers.
func (b *bed) clone(policy, detect string) {
	b.t.Helper()
	text := strings.NewReplacer("detect: relaxed", "detect: "+detect, "name: byRandom ", "name: "+policy+" ", "ports: [80/tcp]", "ports: [80/tcp, 443/tcp]",
		// A full server answers, but not within the half second of a check by HTTP.
		"http: http://127.0.0.1/healthz ", "tcp: 127.0.0.1:80 ").Replace(string(config.DemoYAML))
	conf := filepath.Join(b.net.Dir, "cluster.yaml")
	if err := os.WriteFile(conf, []byte(text), 0o600); err != nil {
		b.t.Fatal(err)
	}
	for _, m := range b.servers {
		stat, err := os.Create(filepath.Join(b.net.Dir, m.Name+".stat"))
		if err != nil {
			b.t.Fatal(err)
		}
		m.stat, m.socket = stat, filepath.Join(b.net.Dir, m.Name+".sock")
		b.t.Cleanup(func() { stat.Close() })
		web := m.start
		m.start = func() {
			web()
			m.engine = m.program(b.t, "cloned-quota", stat.Name(), "--config", conf, "--interface", "eth0",
				"--status-socket", m.socket, "--datapath", "bpf", "--bpffs", b.net.BPFFS())
		}
	}
	// Before anything starts, and from then on while the bed is there.
	last := time.Now()
	b.tellLoad(0)
	stop, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		tick := time.NewTicker(100 * time.Millisecond)
		defer tick.Stop()
		for {
			select {
			case <-stop:
				return
			case <-tick.C:
				now := time.Now()
				b.tellLoad(now.Sub(last))
				last = now
			}
		}
	}()
	b.t.Cleanup(func() { close(stop); <-done })
}

// tellLoad writes each node's /proc/stat, a while after the last time: what it takes of its quota is busy, in microseconds.
func (b *bed) tellLoad(while time.Duration) {
	for _, m := range b.servers {
		busy := m.group.used(b.t).cpu
		m.may += time.Duration(m.part * b.quota() * float64(while))
		_, _ = m.stat.WriteAt(fmt.Appendf(nil, "cpu  %015d 0 0 %015d 0 0 0 0 0 0\n", busy.Microseconds(), max(m.may-busy, 0).Microseconds()), 0)
	}
}

// agreed waits until all nodes serve.
func (b *bed) agreed() {
	b.t.Helper()
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(200 * time.Millisecond) {
		serving, last := 0, ""
		for _, m := range b.servers {
			last = m.engine.Output()
			if strings.Contains(last, fmt.Sprintf("of=%d agreed=true", len(b.servers))) {
				serving++
			}
		}
		if serving == len(b.servers) {
			return
		}
		if time.Now().After(deadline) {
			b.t.Fatalf("%d of %d nodes serve; the last says\n%s", serving, len(b.servers), last)
		}
	}
}

// xtCluster is set up as in iptables-extensions(8); see netcore/bench.
func (b *bed) xtCluster() error {
	for i, m := range b.servers {
		web := m.start
		rules := func() error {
			m.Run("ip", "addr", "add", vip+"/24", "dev", "eth0")
			m.Run("ip", "maddr", "add", groupMAC, "dev", "eth0")
			for _, rule := range [][]string{
				{"-m", "cluster", "--cluster-total-nodes", strconv.Itoa(len(b.servers)), "--cluster-local-node", strconv.Itoa(i + 1), "--cluster-hash-seed", "0xdeadbeef", "-j", "MARK", "--set-mark", "0xffff"},
				{"-d", vip, "-m", "mark", "!", "--mark", "0xffff", "-j", "DROP"},
			} {
				if out, err := m.Try("iptables", append([]string{"-w", "-t", "mangle", "-A", "PREROUTING", "-i", "eth0"}, rule...)...); err != nil {
					return fmt.Errorf("iptables with the match xt_cluster: %s", strings.TrimSpace(out))
				}
			}
			m.Sysctl("net.netfilter.nf_conntrack_tcp_loose", "0")
			return nil
		}
		if err := rules(); err != nil {
			return err
		}
		m.start = func() { web() }
	}
	b.client.Run("ip", "neigh", "replace", vip, "lladdr", groupMAC, "dev", "eth0")
	b.configs[XtCluster] = fmt.Sprintf("iptables -t mangle -A PREROUTING -i eth0 -m cluster --cluster-total-nodes %d --cluster-local-node N --cluster-hash-seed 0xdeadbeef -j MARK --set-mark 0xffff\n"+
		"iptables -t mangle -A PREROUTING -i eth0 -d %s -m mark ! --mark 0xffff -j DROP", len(b.servers), vip)
	return nil
}

// dispatcher is a machine with the VIP in front of the servers.
func (b *bed) dispatcher(way string) {
	b.t.Helper()
	d := b.add("dispatcher", "52:54:00:77:00:50", 1, vip+"/24")
	var servers strings.Builder
	if way == NGINX {
		for i := range b.servers {
			fmt.Fprintf(&servers, "server 10.77.0.%d:80; ", 101+i)
		}
		text := fmt.Sprintf("  upstream servers { %skeepalive 64; }\n  server {\n    listen 80 backlog=8192;\n    location / {\n"+
			"      proxy_pass http://servers; proxy_http_version 1.1; proxy_set_header Connection \"\";\n"+
			"      proxy_max_temp_file_size 0; proxy_buffers 16 64k; proxy_buffer_size 64k; proxy_busy_buffers_size 128k;\n    }\n  }", servers.String())
		b.configs[way] = text
		b.nginx(d, text)
		return
	}
	// One thread: with two it would be stopped twice as soon, by one quota.
	text := "global\n  nbthread 1\n  maxconn 4096\ndefaults\n  mode http\n  option http-keep-alive\n  http-reuse always\n  timeout connect 10s\n  timeout client 60s\n  timeout server 60s\n" +
		"listen web\n  bind :80 backlog 8192\n  balance leastconn\n"
	for i := range b.servers {
		text += fmt.Sprintf("  server s%d 10.77.0.%d:80\n", i+1, 101+i)
	}
	text += "listen tls\n  mode tcp\n  option splice-auto\n  bind :443 backlog 8192\n  balance leastconn\n"
	for i := range b.servers {
		text += fmt.Sprintf("  server s%d 10.77.0.%d:443\n", i+1, 101+i)
	}
	conf := filepath.Join(b.net.Dir, "haproxy.cfg")
	if err := os.WriteFile(conf, []byte(text), 0o644); err != nil {
		b.t.Fatal(err)
	}
	b.configs[way] = text
	d.command(b.t, "haproxy", "-db", "-f", conf)
}

// clients is the load generator: the configuration comes from a file, the result goes to one.
func clients(args []string) int {
	err := func() error {
		data, err := os.ReadFile(args[0])
		if err != nil {
			return err
		}
		var cfg webstone.Config
		if err := json.Unmarshal(data, &cfg); err != nil {
			return err
		}
		ctx, stop := netnstest.Interruptible()
		defer stop()
		r, err := webstone.Run(ctx, cfg)
		if err != nil {
			return err
		}
		if data, err = json.Marshal(r); err != nil {
			return err
		}
		return os.WriteFile(args[1], data, 0o600)
	}()
	if err != nil {
		fmt.Println(err)
		return 1
	}
	return 0
}

// probe tries a connection every 5 ms until it is interrupted, and prints when each began,
// and how it ended.
func probe(args []string) int {
	ctx, stop := netnstest.Interruptible()
	defer stop()
	type try struct {
		at time.Time
		ok bool
	}
	tries := make(chan try, 1<<16)
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	fmt.Println("probing")
	var working sync.WaitGroup
	for {
		select {
		case <-ctx.Done():
			working.Wait()
			close(tries)
			for t := range tries {
				fmt.Println("try", t.at.UnixNano(), t.ok)
			}
			fmt.Println("end")
			return 0
		case <-tick.C:
			working.Go(func() {
				begin := time.Now()
				err := ask(args[0], begin.Add(50*time.Millisecond))
				tries <- try{begin, err == nil}
			})
		}
	}
}

func ask(address string, deadline time.Time) error {
	c, err := (&net.Dialer{Deadline: deadline}).Dial("tcp", address)
	if err != nil {
		return err
	}
	defer c.Close()
	_ = c.SetDeadline(deadline)
	if _, err := c.Write([]byte("HEAD /2000 HTTP/1.0\r\n\r\n")); err != nil {
		return err
	}
	_, err = c.Read(make([]byte, 1))
	return err
}
