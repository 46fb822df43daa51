package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/pcapgo"

	"clonecluster/netcore/api"
	"clonecluster/qemu/lab"
	"clonecluster/qemu/lab/crowd"
	"clonecluster/qemu/nethost"
)

// TestApplianceAPI: nodes without a shell are asked and told by their API: what they
// know of each other, how they booted, what init and the services said, and a drain.
// Then an operator takes the tour.
func TestApplianceAPI(t *testing.T) {
	img := testImage(t)
	ctx, cancel := context.WithTimeout(t.Context(), 12*time.Minute)
	defer cancel()
	cache, err := cacheDir()
	if err != nil {
		t.Fatal(err)
	}
	cfg, err := labConfig(img, upOptions{
		nodes: 3, accel: "auto", api: "127.0.0.1:0", logs: t.ArtifactDir(), append: "clonecluster.management.syslog=udp://" + collector.String(),
	}, cache)
	if err != nil {
		t.Fatal(err)
	}
	l, err := lab.Start(ctx, cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	l.Switch().FailOnViolation(t)
	collected := collectSyslog(t, l.Client())
	if err := l.WaitAll(ctx, "ready"); err != nil {
		t.Fatal(err)
	}
	demo := img.config
	authority, err := api.NewAuthority(demo.Cluster.Name, demo.Cluster.Key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := authority.Issue(api.RoleControl, "tester", time.Now().Add(time.Hour))
	if err != nil {
		t.Fatal(err)
	}
	c := api.NewClient(authority.Client(cert), netip.AddrPortFrom(demo.VIP.IPv4.Addr(), uint16(demo.Management.Port)))
	c.Dial = l.Client().DialContext
	defer c.Close()

	// Emulated nodes are busy when they have just booted.
	var all api.Cluster
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(500 * time.Millisecond) {
		all = api.Cluster{}
		err := c.Get(ctx, "/v1/cluster", nil, &all)
		if err == nil && len(all.Nodes) == 3 && !slices.ContainsFunc(all.Nodes, func(n api.NodeReport) bool {
			return n.Status == nil || n.Status.State != "serving"
		}) {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("the cluster says of itself %+v, %v\n%s", all, err, l.Report())
		}
	}
	other := all.Nodes[slices.IndexFunc(all.Nodes, func(n api.NodeReport) bool { return n.Node != all.Asked })]
	for _, n := range all.Nodes {
		if n.Name == "" || n.Status.Datapath != "native" || len(n.Addresses) == 0 {
			t.Errorf("a node is %+v", n)
		}
	}
	of := url.Values{"node": {other.Name}}
	var boot api.Boot
	if err := c.Get(ctx, "/v1/boot", of, &boot); err != nil {
		t.Fatal(err)
	}
	if boot.Node != other.Node || !boot.Ready || len(boot.Timeline) < 5 || len(boot.Children) != 2 {
		t.Errorf("the boot of %s is %+v", other.Node, boot)
	}
	var logs api.Logs
	if err := c.Get(ctx, "/v1/logs", of, &logs); err != nil {
		t.Fatal(err)
	}
	sources := map[string]bool{}
	for _, line := range logs.Lines {
		sources[line.Source] = true
	}
	if !sources["init"] || !sources["engine"] {
		t.Errorf("the log has lines of %v; want those of init and the engine, too", sources)
	}
	var s api.Status
	if err := c.Post(ctx, "/v1/drain", of, api.Order{Reason: "test"}, &s); err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(time.Minute); s.State != "draining" || s.Drain.Owned; time.Sleep(200 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("it does not drain: %+v", s)
		}
		if err := c.Get(ctx, "/v1/status", of, &s); err != nil && !strings.Contains(err.Error(), "deadline") {
			t.Logf("meanwhile: %v", err)
		}
	}
	if err := c.Post(ctx, "/v1/resume", of, api.Order{}, &s); err != nil {
		t.Fatal(err)
	}
	c.Close()
	judgeSyslog(t, collected, all)
	takeTour(t, img, l, all)
}

// collector is where the nodes of the test send their log lines to, on the client.
var collector = netip.MustParseAddrPort("10.77.0.1:514")

// collectSyslog gives what comes to the collector, a datagram each. What is not fetched
// in time is not kept.
func collectSyslog(t *testing.T, h *nethost.Host) <-chan []byte {
	t.Helper()
	conn, err := h.ListenPacket(collector)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	collected := make(chan []byte, 1024)
	go func() {
		buf := make([]byte, 4096)
		for {
			n, _, err := conn.ReadFrom(buf)
			if err != nil {
				return
			}
			select {
			case collected <- bytes.Clone(buf[:n]):
			default:
			}
		}
	}()
	return collected
}

// judgeSyslog has tshark take apart, as RFC 5424 says, what has come from every node until
// now: lines of init, of the engine and of the service.
func judgeSyslog(t *testing.T, collected <-chan []byte, all api.Cluster) {
	t.Helper()
	const name, linkType = "syslog.pcap", 147 // DLT_USER0
	var b bytes.Buffer
	w := pcapgo.NewWriter(&b)
	if err := w.WriteFileHeader(4096, linkType); err != nil {
		t.Fatal(err)
	}
	for range len(collected) {
		m := <-collected
		if err := w.WritePacket(gopacket.CaptureInfo{Timestamp: time.Now(), CaptureLength: len(m), Length: len(m)}, m); err != nil {
			t.Fatal(err)
		}
	}
	file := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(file, b.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	said := tsharkFields(t, file, "syslog.version", "syslog.hostname", "syslog.appname", "syslog.level", "syslog.timestamp", "syslog.msg")
	var missing []string
	for _, n := range all.Nodes {
		for _, app := range []string{"init", "engine"} {
			if !regexp.MustCompile(`(?m)^1\|` + n.Name + `\|` + app + `\|[0-7]\|\w{3} .* UTC\|.+$`).MatchString(said) {
				missing = append(missing, n.Name+" "+app)
			}
		}
	}
	if len(missing) > 0 {
		t.Errorf("the collector has no line of RFC 5424 of %v; it has\n%s", missing, said)
	}
	t.Logf("%d log lines were collected", strings.Count(said, "\n"))
}

// tour is an operator with clonectl, while clients ask.
type tour struct {
	t     *testing.T
	at    []string
	lab   *lab.Lab
	names []string // of the nodes, by id
}

// takeTour looks at the cluster, steers it, captures, and restarts all its nodes, and no
// client fails.
func takeTour(t *testing.T, img bootable, l *lab.Lab, all api.Cluster) {
	t.Chdir(t.TempDir())
	t.Setenv("CLONECLUSTER_CACHE", t.TempDir())
	if err := os.WriteFile("cluster.yaml", img.config.Clear(), 0o600); err != nil {
		t.Fatal(err)
	}
	o := &tour{t: t, at: []string{"--address", l.ForwardAddr(0).String()}, lab: l}
	for _, n := range all.Nodes {
		o.names = append(o.names, n.Name)
	}
	first, second := o.names[0], o.names[1]
	o.until("status", append([]string{"agreed", "native"}, o.names...)...)
	var w api.Which
	if err := json.Unmarshal([]byte(o.run("which", "10.77.0.1:40000", "80", "--json")), &w); err != nil || w.Bucket == nil || len(w.Nodes) != 3 {
		t.Errorf("which: %+v, %v", w, err)
	}
	target, err := webAddress(img.config)
	if err != nil {
		t.Fatal(err)
	}
	for range 6 {
		o.which(target.AddrPort)
	}
	o.run("drain", second, "--wait", "30s", "--reason", "a look inside")
	o.until("status", "draining")
	o.run("resume", second)
	o.run("weight", second, "50", "--reason", "it is small")
	o.until("policy", "50  set at run time", "it is small")
	o.run("weight", second, "configured")
	story := o.run("events", "--node", second)
	for _, want := range []string{"drain ", "a look inside", "resume ", "policy 1: weight 50 of " + second, "map "} {
		if !strings.Contains(story, want) {
			t.Errorf("the events do not tell of %q:\n%s", want, story)
		}
	}

	clients := crowd.New(crowd.Config{Host: l.Client(), Switch: l.Switch(), Target: target.AddrPort})
	defer clients.Close()
	begin := time.Now()
	asking := clients.Ask(t.Context(), 250*time.Millisecond)
	o.capture() // which long downloads would fill
	longer := o.longer(clients)
	out := o.within(8*time.Minute, "rollout", "--reason", "another kernel", "--wait", "1m", "--timeout", "4m")
	end := time.Now()
	requests := asking.Stop()
	whole, broken := longer()
	t.Logf("%v, while %d requests were made, and %d long downloads:\n%s", end.Sub(begin).Round(time.Second), len(requests), whole, out)
	if len(broken) > 0 || whole < 2*longDownloads {
		t.Errorf("%d long downloads came whole, and %d broke: %v; want none", whole, len(broken), errors.Join(broken...))
	}
	if strings.Count(out, "is back after") != 3 || strings.LastIndex(out, first+": is back") < strings.LastIndex(out, second+": is back") {
		t.Errorf("the rollout is to bring back all three, %s, who leads, as the last", first)
	}
	for i := range 3 {
		if n := l.Node(i).Boots(); n != 2 {
			t.Errorf("%s has booted %d times", l.Node(i).Name(), n)
		}
	}
	if got := clients.Judge(requests, begin, end, ""); got.Failed > 0 || got.Held > 0 || got.Answered < 20 {
		t.Errorf("of the clients' requests %d were answered, %d not", got.Answered, got.Failed+got.Held)
		for _, r := range requests {
			if r.Err != nil {
				t.Errorf("from %.3fs to %.3fs, connected at %.3fs to %s (%+v): %v", r.Begin.Sub(begin).Seconds(), r.End.Sub(begin).Seconds(), r.Connected.Sub(begin).Seconds(), r.Attempt.Holder(), r.Attempt, r.Err)
			}
		}
	}
	// The one that was restarted first has seen the others go and come.
	story = o.run("events", "--node", second)
	leader := first + " (" + all.Nodes[0].Node + ") "
	for _, want := range []string{leader + "has left, as it said", leader + "is here", "map "} {
		if !strings.Contains(story, want) {
			t.Errorf("the events do not tell of %q:\n%s", want, story)
		}
	}
}

// longDownloads is how many there are at a time.
const longDownloads = 4

// longer has clients download, for some ten seconds each, until it is ended: then it gives
// how many came whole, and why others did not.
func (o *tour) longer(clients *crowd.Crowd) (end func() (whole int, broken []error)) {
	o.t.Helper()
	const size = 3 << 20
	sum, err := benchSum(size)
	if err != nil {
		o.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(o.t.Context())
	ends := make(chan []error, longDownloads)
	for range longDownloads {
		go func() {
			var all []error
			for err := error(nil); err == nil && ctx.Err() == nil; all = append(all, err) {
				var d *crowd.Download
				d, err = clients.Download(o.t.Context(), crowd.DownloadConfig{Path: fmt.Sprintf("/bench/%d", size), Size: size, Sum: sum, Rate: 150 << 10})
				if err == nil {
					err = d.Wait(o.t.Context())
				}
			}
			ends <- all
		}()
	}
	return func() (whole int, broken []error) {
		cancel()
		for range longDownloads {
			for _, err := range <-ends {
				if err == nil {
					whole++
				} else {
					broken = append(broken, err)
				}
			}
		}
		return whole, broken
	}
}

func (o *tour) run(args ...string) string {
	o.t.Helper()
	return o.within(time.Minute, args...)
}

func (o *tour) within(most time.Duration, args ...string) string {
	o.t.Helper()
	out, err := clonectlWithin(o.t, most, append(args, o.at...)...)
	if err != nil {
		o.t.Fatalf("clonectl %s: %v\n%s%s", strings.Join(args, " "), err, out, o.lab.Report())
	}
	return out
}

// until runs a command until what it says has all these texts.
func (o *tour) until(command string, want ...string) {
	o.t.Helper()
	out := ""
	for deadline := time.Now().Add(time.Minute); time.Now().Before(deadline); time.Sleep(300 * time.Millisecond) {
		out, _ = clonectl(o.t, append([]string{command}, o.at...)...)
		if !slices.ContainsFunc(want, func(s string) bool { return !strings.Contains(out, s) }) {
			return
		}
	}
	o.t.Fatalf("clonectl %s does not come to say all of %q; but\n%s", command, want, out)
}

// which asks who takes a connection that is there, and compares that with who answers it.
func (o *tour) which(target netip.AddrPort) {
	o.t.Helper()
	conn, err := o.lab.Client().DialContext(o.t.Context(), "tcp", target.String())
	if err != nil {
		o.t.Fatal(err)
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(time.Minute))
	if _, err := fmt.Fprintf(conn, "GET /whoami HTTP/1.1\r\nHost: %v\r\n\r\n", target); err != nil {
		o.t.Fatal(err)
	}
	res, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		o.t.Fatal(err)
	}
	defer res.Body.Close()
	var who struct{ Node string }
	if err := json.NewDecoder(res.Body).Decode(&who); err != nil || who.Node == "" {
		o.t.Fatalf("who answers: %+v, %v", who, err)
	}
	var w api.Which
	if err := json.Unmarshal([]byte(o.run("which", conn.LocalAddr().String(), "80", "--json")), &w); err != nil || w.Owner != who.Node || w.Holder != who.Node {
		o.t.Errorf("%s answers %v; which says %+v, %v", who.Node, conn.LocalAddr(), w, err)
	}
}

// capture looks, with tshark, at what all nodes make of the clients' connections.
func (o *tour) capture() {
	o.t.Helper()
	o.run("capture", "--port", "80", "--duration", "4s", "-w", "tour.pcapng")
	seen, taken := map[string]map[string]bool{}, map[string]int{}
	for line := range strings.Lines(tsharkFields(o.t, "tour.pcapng", "tcp.flags", "tcp.srcport", "frame.interface_name", "frame.comment")) {
		f := strings.Split(strings.TrimSpace(line), "|")
		if len(f) != 4 || f[0] != "0x0002" { // SYN
			continue
		}
		if seen[f[1]] == nil {
			seen[f[1]] = map[string]bool{}
		}
		seen[f[1]][f[2]] = true
		if strings.HasPrefix(f[3], "accept-new, bucket ") {
			taken[f[1]]++
		}
	}
	whole := 0
	for port, by := range seen {
		if len(by) == len(o.names) {
			whole++
			if taken[port] != 1 {
				o.t.Errorf("the SYN from port %s was seen by %d nodes and taken by %d", port, len(by), taken[port])
			}
		}
	}
	if whole < 3 {
		o.t.Errorf("all nodes have seen %d of %d connections; want most", whole, len(seen))
	}
	o.t.Logf("captured: %d connections, %d of them by all nodes", len(seen), whole)
}
