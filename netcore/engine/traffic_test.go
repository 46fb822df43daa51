package engine_test

import (
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"net"
	"net/http"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"clonecluster/config"
)

// TestNeighbors sees the cluster as a stock Linux host does: one answer to each
// ARP request, ping and probe, one address behind the VIP, and no duplicate.
func TestNeighbors(t *testing.T) {
	c := newCluster(t, 3)
	monitor := c.client.StartCommand("stdbuf", "-oL", "ip", "monitor", "neigh")
	c.start()

	out, err := c.client.Try("arping", "-I", "eth0", "-c", "4", vip4)
	if err != nil || !strings.Contains(out, "Received 4 response(s)") {
		t.Errorf("arping: %v: %s; want 4 responses to 4 requests", err, out)
	}
	if n := strings.Count(strings.ToLower(out), clone); n != 4 {
		t.Errorf("arping: %d replies name the clone MAC; want all 4: %s", n, out)
	}
	// RFC 5227: a probe for an address in use is answered, by one.
	out, err = c.client.Try("arping", "-D", "-I", "eth0", "-c", "2", vip4)
	if err == nil || !strings.Contains(out, "Received 1 response(s)") {
		t.Errorf("arping -D: %v: %s; want the address defended by one reply", err, out)
	}
	for _, vip := range []string{vip4, vip6} {
		out := c.client.Run("ping", "-c", "20", "-i", "0.05", "-W", "2", vip)
		if !strings.Contains(out, "20 received, 0% packet loss") || strings.Contains(out, "DUP") {
			t.Errorf("ping %s: %s", vip, out)
		}
		entry := c.client.Run("ip", "neigh", "show", vip)
		if !strings.Contains(entry, clone) {
			t.Errorf("the client's neighbour entry of %s is %q; want %s", vip, entry, clone)
		}
		// Once more with nothing cached.
		c.client.Run("ip", "neigh", "del", vip, "dev", "eth0")
		c.client.Run("ping", "-c", "1", "-W", "2", vip)
	}
	c.get("http://" + vip4 + "/whoami")
	for _, n := range c.nodes {
		addrs := n.Run("ip", "addr", "show", "dev", "clone0")
		for _, want := range []string{vip4 + "/32", vip6 + "/128"} {
			if !strings.Contains(addrs, want) {
				t.Errorf("%s: clone0 lacks %s: %s", n.Name, want, addrs)
			}
		}
		if strings.Contains(addrs, "dadfailed") || strings.Contains(addrs, "tentative") || strings.Contains(addrs, "fe80") {
			t.Errorf("%s: clone0 has %s", n.Name, addrs)
		}
	}
	for line := range strings.Lines(monitor.Output()) {
		if (strings.HasPrefix(line, vip4+" ") || strings.HasPrefix(line, vip6+" ")) &&
			strings.Contains(line, "lladdr") && !strings.Contains(line, clone) {
			t.Errorf("the client took another address for the VIP: %s", line)
		}
	}
	c.checkSwitch()
}

// TestTransfers moves much data both ways with every offload on, which crosses
// the segmentation path of socket and TAP, and compares checksums.
func TestTransfers(t *testing.T) {
	c := newCluster(t, 2)
	c.start()
	for _, host := range []string{vip4, "[" + vip6 + "]"} {
		c.transfer(host, 48<<20)
	}
	if n := c.LongestFrame(); n < 10000 {
		t.Errorf("the longest frame has %d bytes: no segmentation offload was in use", n)
	}
	for _, n := range c.nodes {
		n.mustBeHealthy(n.Status())
	}
}

// transfer moves so many octets both ways and compares checksums.
func (c *cluster) transfer(host string, size int64) {
	c.t.Helper()
	sum := sha256.New()
	if _, err := io.CopyN(sum, &pattern{}, size); err != nil {
		c.t.Fatal(err)
	}
	want := hex.EncodeToString(sum.Sum(nil))
	resp, err := c.http().Get(fmt.Sprintf("http://%s/download/%d", host, size))
	if err != nil {
		c.t.Fatal(err)
	}
	sum.Reset()
	n, err := io.Copy(sum, resp.Body)
	resp.Body.Close()
	if got := hex.EncodeToString(sum.Sum(nil)); err != nil || n != size || got != want {
		c.t.Errorf("download from %s: %d bytes, checksum %s, %v; want %d, %s", host, n, got, err, size, want)
	}
	resp, err = c.http().Post("http://"+host+"/upload", "", io.LimitReader(&pattern{}, size))
	if err != nil {
		c.t.Fatal(err)
	}
	body, _ := io.ReadAll(resp.Body)
	resp.Body.Close()
	if want := fmt.Sprintf("%d %s <nil>\n", size, want); string(body) != want {
		c.t.Errorf("upload to %s: the server has %q; want %q", host, body, want)
	}
}

// TestPathMTU puts a client behind a router with a narrower link on the far
// side. "Fragmentation needed" and "packet too big" must reach the node that
// holds the connection.
func TestPathMTU(t *testing.T) {
	c := newCluster(t, 3)
	far := c.Detached("far")
	far.Run("ip", "link", "add", "eth0", "type", "veth", "peer", "name", "far", "netns", c.client.NS)
	for _, cmd := range []string{
		"addr add 10.99.0.2/24 dev eth0", "addr add fd99::2/64 dev eth0 nodad", "link set eth0 up",
		"route add default via 10.99.0.1", "route add default via fd99::1",
	} {
		far.Run("ip", strings.Fields(cmd)...)
	}
	for _, cmd := range []string{
		"addr add 10.99.0.1/24 dev far", "addr add fd99::1/64 dev far nodad", "link set far mtu 1300 up",
	} {
		c.client.Run("ip", strings.Fields(cmd)...)
	}
	c.client.Sysctl("net.ipv4.ip_forward", "1")
	c.client.Sysctl("net.ipv6.conf.all.forwarding", "1")
	c.start()

	client := &http.Client{Transport: &http.Transport{DialContext: far.DialContext, DisableKeepAlives: true}, Timeout: 20 * time.Second}
	for _, host := range []string{vip4, "[" + vip6 + "]"} {
		for range 9 {
			body, err := tryGet(client, "http://"+host+"/download/300000")
			if err != nil || len(body) < 299000 {
				t.Fatalf("download from %s through the narrow link: %d bytes, %v", host, len(body), err)
			}
		}
	}
	holders := 0
	for _, n := range c.nodes {
		if n.Status().Verdicts["accept-error"] > 0 {
			holders++
		}
	}
	if holders < 2 {
		t.Errorf("%d nodes took an ICMP error; want several: did the path not narrow?", holders)
	}
}

// TestOutward opens connections from the VIP on every node: their answers fall
// into buckets of other nodes, and must find their way and not be reset.
func TestOutward(t *testing.T) {
	c := newCluster(t, 3)
	c.client.Start("httpd", "outside").Await(0, "httpd ready")
	c.start()
	for _, n := range c.nodes {
		for _, to := range []struct{ vip, target string }{{vip4, "10.77.0.1:80"}, {vip6, "[fd77::1]:80"}} {
			client := &http.Client{
				Timeout: 20 * time.Second,
				Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, network, addr string) (conn net.Conn, err error) {
					err = n.Do(func() error {
						d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(to.vip)}}
						conn, err = d.DialContext(ctx, network, addr)
						return err
					})
					return conn, err
				}},
			}
			for range 12 {
				from, err := tryGet(client, "http://"+to.target+"/client")
				if host, _, _ := net.SplitHostPort(from); err != nil || host != to.vip {
					t.Errorf("%s: the outside saw %q, %v; want %s", n.Name, from, err, to.vip)
				}
			}
			if body, err := tryGet(client, "http://"+to.target+"/download/3000000"); err != nil || len(body) < 2999000 {
				t.Errorf("%s: download from outside: %d bytes, %v", n.Name, len(body), err)
			}
			out, err := n.Try("ping", "-c", "3", "-i", "0.1", "-W", "2", "-I", to.vip, strings.Trim(strings.TrimSuffix(to.target, ":80"), "[]"))
			if err != nil {
				t.Errorf("%s: ping from the VIP: %v: %s", n.Name, err, out)
			}
		}
		out, err := n.Try("curl", "-sS", "--max-time", "10", "--interface", "clone0", "http://10.77.0.1/client")
		if err != nil || !strings.HasPrefix(out, vip4+":") {
			t.Errorf("%s: curl bound to clone0: %q, %v", n.Name, out, err)
		}
		// What the node does on its own goes by the NIC and its own address.
		out, err = n.Try("curl", "-sS", "--max-time", "10", "http://10.77.0.1/client")
		if err != nil || !strings.HasPrefix(out, "10.77.0.10") || strings.HasPrefix(out, vip4+":") {
			t.Errorf("%s: curl from its own address: %q, %v", n.Name, out, err)
		}
	}
	c.checkSwitch()
}

// TestOutwardCrash: what a node has opened from the VIP goes on under the next
// engine, which finds the flows in the kernel.
func TestOutwardCrash(t *testing.T) {
	c := newCluster(t, 2)
	c.client.Start("httpd", "outside").Await(0, "httpd ready")
	c.start()
	n := c.nodes[0]
	var streams []*stream
	for range 8 {
		var conn net.Conn
		if err := n.Do(func() (err error) {
			d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(vip4)}, Timeout: 20 * time.Second}
			conn, err = d.Dial("tcp", "10.77.0.1:80")
			return err
		}); err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		fmt.Fprintf(conn, "GET /echo HTTP/1.1\r\nHost: outside\r\n\r\n")
		streams = append(streams, &stream{conn: conn, in: bufio.NewReader(conn), holder: "outside"})
	}
	c.askAll(streams, "before the crash")
	n.cloned.Kill()
	n.start()
	c.agree(c.nodes...)
	c.askAll(streams, "after the restart")
}

// stream is one long connection that asks and is answered.
type stream struct {
	conn   net.Conn
	in     *bufio.Reader
	holder string
}

func (c *cluster) openStream() *stream {
	c.t.Helper()
	conn, err := c.client.DialContext(context.Background(), "tcp", vip4+":80")
	if err != nil {
		c.t.Fatalf("opening a connection: %v", err)
	}
	c.t.Cleanup(func() { conn.Close() })
	fmt.Fprintf(conn, "GET /echo HTTP/1.1\r\nHost: vip\r\n\r\n")
	s := &stream{conn: conn, in: bufio.NewReader(conn)}
	answer, err := s.ask("hello", 10*time.Second)
	if err != nil {
		c.t.Fatalf("the first answer: %v", err)
	}
	s.holder, _, _ = strings.Cut(answer, " ")
	return s
}

// ask sends a line and gives the answer. TCP's retransmissions are the client
// of a patient user: the limit is wide.
func (s *stream) ask(line string, limit time.Duration) (string, error) {
	if err := s.conn.SetDeadline(time.Now().Add(limit)); err != nil {
		return "", err
	}
	if _, err := fmt.Fprintln(s.conn, line); err != nil {
		return "", err
	}
	answer, err := s.in.ReadString('\n')
	if err == nil && !strings.HasSuffix(strings.TrimSpace(answer), line) {
		err = fmt.Errorf("answer %q to %q", answer, line)
	}
	return answer, err
}

// openStreams opens connections until every node holds some.
func (c *cluster) openStreams(n int) []*stream {
	c.t.Helper()
	var streams []*stream
	for held := map[string]bool{}; len(streams) < n || len(held) < len(c.nodes); {
		if len(streams) > 200 {
			c.t.Fatalf("200 connections, all held by %v", held)
		}
		s := c.openStream()
		held[s.holder] = true
		streams = append(streams, s)
	}
	return streams
}

func (c *cluster) askAll(streams []*stream, line string) {
	c.t.Helper()
	for i, s := range streams {
		answer, err := s.ask(line, 30*time.Second)
		if err != nil {
			c.t.Errorf("connection %d, held by %s: %v", i, s.holder, err)
		} else if !strings.HasPrefix(answer, s.holder+" ") {
			c.t.Errorf("connection %d, held by %s, was answered %q", i, s.holder, answer)
		}
	}
}

// TestCrash kills an engine with SIGKILL while connections are open on it, sends
// data into the gap, and starts it again.
func TestCrash(t *testing.T) {
	c := newCluster(t, 3)
	// Later than a busy machine takes to start an engine.
	writeConfig(t, c.config, "detect: relaxed", "detect: 5s")
	c.start()
	streams := c.openStreams(12)
	crashed := c.nodes[1]
	crashed.cloned.Kill()
	for _, s := range streams {
		if s.holder == crashed.Name {
			fmt.Fprintln(s.conn, "into the gap")
		}
	}
	// The dead engine's kernel still speaks by clone0: with nobody to carry it on the
	// raw datapath, and with the right source where the kernel sees to that itself. For
	// less than the detection time, after which the others reset its connections.
	out, err := crashed.Try("ping", "-c", "2", "-i", "0.1", "-W", "0.2", "-I", vip4, "10.77.0.1")
	if crashed.datapath == "raw" && err == nil {
		t.Errorf("a frame of clone0 got out without an engine: %s", out)
	} else if crashed.datapath != "raw" && err != nil {
		t.Errorf("without an engine the kernel is mute: %s", out)
	}
	crashed.start()
	for _, s := range streams {
		if s.holder != crashed.Name {
			continue
		}
		if err := s.conn.SetDeadline(time.Now().Add(30 * time.Second)); err != nil {
			t.Fatal(err)
		}
		if answer, err := s.in.ReadString('\n'); err != nil || answer != crashed.Name+" into the gap\n" {
			t.Errorf("what was sent into the gap was answered %q, %v", answer, err)
		}
	}
	c.agree(c.nodes...)
	c.askAll(streams, "after the restart")
	c.checkSwitch()
}

// TestCrashAlone leaves the only node without an engine for longer than any
// detection time: nobody else resets its connections, and they go on.
func TestCrashAlone(t *testing.T) {
	c := newCluster(t, 1)
	c.start()
	streams := c.openStreams(3)
	c.nodes[0].cloned.Kill()
	fmt.Fprintln(streams[0].conn, "into the gap")
	if c.nodes[0].datapath != "raw" {
		time.Sleep(c.nodes[0].lease(t)) // until then its kernel still takes new ones
	}
	if _, err := tryGet(&http.Client{Transport: &http.Transport{DialContext: c.client.DialContext}, Timeout: 3 * time.Second}, "http://"+vip4+"/whoami"); err == nil {
		t.Error("a request was answered without an engine")
	}
	c.nodes[0].start()
	c.agree(c.nodes...)
	if answer, err := streams[0].in.ReadString('\n'); err != nil || answer != "node1 into the gap\n" {
		t.Errorf("what was sent into the gap was answered %q, %v", answer, err)
	}
	c.askAll(streams, "after the restart")
}

// TestSecondEngine: one that is started beside another by mistake, with another
// interface and another VIP, goes without harm.
func TestSecondEngine(t *testing.T) {
	c := newCluster(t, 1)
	c.start()
	n := c.nodes[0]
	c.Cable(n.Host, "eth1", "")
	other := filepath.Join(c.Dir, "other.yaml")
	writeConfig(t, other, "10.77.0.10/24", "10.77.0.20/24")
	streams := c.openStreams(1)
	for _, socket := range []string{n.status, filepath.Join(c.Dir, "other.sock")} {
		second := n.Start("cloned", n.flags("--config", other, "--interface", "eth1", "--status-socket", socket)...)
		if err := second.Wait(); err == nil || !strings.Contains(second.Output(), "stop that one") {
			t.Errorf("the second engine ended with %v:\n%s", err, second.Output())
		}
	}
	c.askAll(streams, "after the second engine")
	n.Status()
	c.get("http://" + vip4 + "/whoami")
}

// TestLinkFlap takes a node's cable out and puts it back. It must not take part
// until it has listened again, and loses no connection.
func TestLinkFlap(t *testing.T) {
	c := newCluster(t, 3)
	c.start()
	streams := c.openStreams(12)
	cut, others := c.nodes[2], c.nodes[:2]
	c.Unplug(cut.Host)
	cut.cloned.Await(0, `msg=link.*carrier=false`)
	c.agree(others...)
	for range 20 {
		if got := c.get("http://" + vip4 + "/whoami"); got == cut.Name {
			t.Errorf("answered by %s, whose cable is out", got)
		}
	}
	c.Plug(cut.Host)
	c.agree(c.nodes...)
	// Those held by the node that was cut off past the detection time may have
	// been reset by the new owner (I6). The others must not have noticed.
	var kept []*stream
	for _, s := range streams {
		if s.holder != cut.Name {
			kept = append(kept, s)
		}
	}
	c.askAll(kept, "after the flap")
	c.get("http://" + vip4 + "/whoami")
	c.checkSwitch()
}

// TestJoinAndLeave runs requests without a pause while a node joins and another
// leaves gracefully: none may fail, and no connection may break.
func TestJoinAndLeave(t *testing.T) {
	c := newCluster(t, 3)
	for _, n := range c.nodes {
		n.StartHTTP()
	}
	before := c.nodes[0].describe()
	for _, n := range c.nodes[:2] {
		n.start()
	}
	c.agree(c.nodes[:2]...)

	ctx, stop := context.WithCancel(context.Background())
	type result struct {
		requests int
		failed   []string
		slow     int
	}
	results := make(chan result)
	go func() {
		var r result
		for ctx.Err() == nil {
			start := time.Now()
			if _, err := tryGet(c.http(), "http://"+vip4+"/whoami"); err != nil {
				r.failed = append(r.failed, err.Error())
			}
			if time.Since(start) > 900*time.Millisecond {
				r.slow++
			}
			r.requests++
		}
		results <- r
	}()
	streams := c.openStream()
	third := c.nodes[2]
	third.start()
	c.agree(c.nodes...)
	if s := third.Status(); s.Buckets.Settled+s.Buckets.Shared < 200 {
		t.Errorf("the node that joined has %+v; want about a third of 1024", s.Buckets)
	}
	if _, err := streams.ask("after the join", 10*time.Second); err != nil {
		t.Errorf("a connection from before the join: %v", err)
	}
	leaving := c.nodes[0]
	if err := leaving.cloned.Stop(); err != nil {
		t.Errorf("a graceful stop: %v:\n%s", err, leaving.cloned.Output())
	}
	c.agree(c.nodes[1:]...)
	stop()
	r := <-results
	t.Logf("%d requests, %d waited for a retransmission", r.requests, r.slow)
	for _, f := range r.failed {
		t.Errorf("a request failed: %s", f)
	}
	if after := leaving.describe(); after != before {
		t.Errorf("the stop left the machine as\n%s\nwant, as it was\n%s", after, before)
	}
}

// describe is what an engine changes on a machine.
func (n *node) describe() string {
	n.c.t.Helper()
	var b strings.Builder
	for _, cmd := range []string{
		"ip -br link", "ip rule", "ip -6 rule", "ip route show table 3264", "ip -6 route show table 3264",
		"sysctl net.ipv4.conf.eth0.arp_ignore net.ipv4.conf.eth0.arp_announce",
	} {
		args := strings.Fields(cmd)
		// The kernel makes a table when it is first used, and keeps it.
		if out, err := n.Try(args[0], args[1:]...); err == nil {
			b.WriteString(out)
		}
	}
	return b.String()
}

// lease is how long a node takes new connections after its last beacon.
func (n *node) lease(t *testing.T) time.Duration {
	t.Helper()
	cfg, err := config.LoadFile(n.c.config)
	if err != nil {
		t.Fatal(err)
	}
	return cfg.Cluster.Detect.Lease()
}

// TestDeath switches a node off for good. Within the detection time new connections
// find another, and the orphans are reset instead of hanging (I6).
func TestDeath(t *testing.T) {
	c := newCluster(t, 3)
	c.start()
	streams := c.openStreams(12)
	dead := c.nodes[0]
	dead.PowerOff()
	c.agree(c.nodes[1:]...)
	for range 30 {
		if got := c.get("http://" + vip4 + "/whoami"); got == dead.Name {
			t.Errorf("answered by %s, which is dead", got)
		}
	}
	for _, s := range streams {
		_, err := s.ask("after the death", 10*time.Second)
		switch {
		case s.holder != dead.Name && err != nil:
			t.Errorf("a connection held by %s: %v", s.holder, err)
		case s.holder == dead.Name && !isReset(err):
			t.Errorf("an orphan of %s: %v; want a reset", dead.Name, err)
		}
	}
}

func isReset(err error) bool {
	return err != nil && strings.Contains(err.Error(), syscall.ECONNRESET.Error())
}

// TestStrangers: a node with another key, one of another cluster and one with
// the same MAC have no effect on those that belong together.
func TestStrangers(t *testing.T) {
	c := newCluster(t, 2)
	c.start()
	otherVIP := []string{vip4, "10.77.0.20", vip6, "fd77::20"}
	for _, stranger := range []struct {
		name, mac, counter string
		replace            []string
	}{
		{"badkey", "52:54:00:77:00:21", "wrong key", append(otherVIP, "Y2xvbmVj", "Z2xvbmVj")},
		{"elsewhere", "52:54:00:77:00:22", "another cluster", append(otherVIP, "name: demo ", "name: demo2 ")},
		{"twin", c.nodes[0].MAC, "this node's wire MAC", nil},
	} {
		h := c.node(c.Host(stranger.name, stranger.mac))
		file := filepath.Join(c.Dir, stranger.name+".yaml")
		writeConfig(t, file, stranger.replace...)
		p := h.Start("cloned", h.flags("--config", file, "--status-socket", "")...)
		c.nodes[0].cloned.Await(0, stranger.counter)
		for range 60 { // longer than any detection time
			c.get("http://" + vip4 + "/whoami")
			time.Sleep(25 * time.Millisecond)
		}
		if err := p.Stop(); err != nil {
			t.Errorf("%s: %v", stranger.name, err)
		}
		// Its port has taught the switch the twin's address.
		c.Unplug(h.Host)
	}
	for _, n := range c.nodes {
		if s := n.Status(); len(s.Nodes) != 2 || s.State != "serving" {
			t.Errorf("%s: %s with %v; want serving with 2 nodes", n.Name, s.State, s.Nodes)
		}
	}
	if s := c.nodes[0].Status(); s.Beacons.Unauthentic == 0 || s.Beacons.OtherCluster == 0 || s.Beacons.Ignored == 0 {
		t.Errorf("beacon counters %+v; want all kinds", s.Beacons)
	}
	c.get("http://" + vip4 + "/whoami")
}

// TestWireMACChange gives a NIC another address while it serves.
func TestWireMACChange(t *testing.T) {
	c := newCluster(t, 2)
	c.start()
	n := c.nodes[0]
	n.MAC = "52:54:00:77:00:77"
	n.Run("ip", "link", "set", "eth0", "address", n.MAC)
	c.agree(c.nodes[1], n)
	for range 20 {
		c.get("http://" + vip4 + "/whoami")
	}
	c.checkSwitch()
	// Not even by mistake may a NIC have the clone MAC.
	n.Run("ip", "link", "set", "eth0", "down")
	n.Run("ip", "link", "set", "eth0", "address", clone)
	if err := n.cloned.Wait(); err == nil || !strings.Contains(n.cloned.Output(), "has the clone MAC") {
		t.Errorf("with the clone MAC on the NIC the engine ended with %v:\n%s", err, n.cloned.Output())
	}
}

// TestRemovedNIC: the engine cannot go on, says why, and the next one starts
// from what it left.
func TestRemovedNIC(t *testing.T) {
	c := newCluster(t, 1)
	c.start()
	n := c.nodes[0]
	n.Run("ip", "link", "del", "eth0")
	if err := n.cloned.Wait(); err == nil || !strings.Contains(n.cloned.Output(), "was removed") {
		t.Errorf("without its NIC the engine ended with %v:\n%s", err, n.cloned.Output())
	}
	again := n.Start("cloned", n.flags()...)
	n.Run("ip", "link", "add", "eth0", "type", "veth", "peer", "name", n.Name, "netns", c.Switch.NS)
	c.Switch.Run("ip", "link", "set", n.Name, "master", "br0", "up")
	n.Run("ip", "link", "set", "eth0", "address", n.MAC, "up")
	n.cloned = again
	c.agree(n)
	c.get("http://" + vip4 + "/whoami")
}

// TestDissected has tshark, not our code, read what entered the switch from
// boot to shutdown.
func TestDissected(t *testing.T) {
	if _, err := exec.LookPath("tshark"); err != nil {
		t.Skip("needs tshark (Debian package tshark)")
	}
	c := newCluster(t, 3)
	c.start()
	for _, host := range []string{vip4, "[" + vip6 + "]"} {
		// Until each node has answered, and so had to ask for the client.
		seen := map[string]bool{}
		for asked := 0; asked < 10 || len(seen) < len(c.nodes) && asked < 200; asked++ {
			seen[c.get("http://"+host+"/whoami")] = true
		}
		c.client.Run("ping", "-c", "3", "-i", "0.1", "-W", "2", strings.Trim(host, "[]"))
	}
	c.client.Run("ip", "neigh", "flush", "dev", "eth0")
	c.client.Run("ping", "-c", "1", "-W", "2", vip6)
	c.client.Run("arping", "-I", "eth0", "-c", "2", vip4)
	c.Unplug(c.nodes[0].Host)
	c.agree(c.nodes[1:]...)
	c.Plug(c.nodes[0].Host)
	c.agree(c.nodes...)
	c.nodes[1].cloned.Kill()
	c.get("http://" + vip4 + "/download/200000")
	for _, n := range []*node{c.nodes[0], c.nodes[2]} {
		if err := n.cloned.Stop(); err != nil {
			t.Errorf("%s: %v", n.Name, err)
		}
	}
	file := c.Captured()

	for _, q := range []struct {
		what, filter string
		fields       []string
		want         *regexp.Regexp
		min          int
	}{
		{what: "frames with the clone MAC as source", filter: "eth.src == " + clone},
		{"ARP replies for the VIP", "arp.opcode == 2 && arp.src.proto_ipv4 == " + vip4,
			[]string{"eth.src", "arp.src.hw_mac"}, wireAndClone, 3},
		{"ARP requests from the VIP", "arp.opcode == 1 && arp.src.proto_ipv4 == " + vip4,
			[]string{"eth.src", "arp.src.hw_mac"}, wireAndClone, 3},
		{"neighbour advertisements for the VIP", "icmpv6.type == 136 && icmpv6.nd.na.target_address == " + vip6,
			[]string{"eth.src", "icmpv6.opt.linkaddr"}, wireAndClone, 3},
		{"neighbour solicitations from the VIP", "icmpv6.type == 135 && ipv6.src == " + vip6,
			[]string{"eth.src", "icmpv6.opt.linkaddr"}, wireAndClone, 2}, // whoever answers the client knows its address
		{"HTTP answers of the VIP", "http.response && ip.src == " + vip4,
			[]string{"eth.src", "ip.src"}, regexp.MustCompile(`^52:54:00:77:00:0[123]\t10\.77\.0\.10$`), 10},
		{what: "ARP that binds the VIP to a wire MAC",
			filter: "arp.src.proto_ipv4 == " + vip4 + " && !(arp.src.hw_mac == " + clone + ")"},
		{what: "malformed frames", filter: "_ws.malformed"},
	} {
		lines := tshark(t, file, q.filter, q.fields...)
		if q.want == nil {
			if len(lines) > 0 {
				t.Errorf("%s: %d, such as frame %s", q.what, len(lines), lines[0])
			}
			continue
		}
		t.Logf("%s: %d", q.what, len(lines))
		if len(lines) < q.min {
			t.Errorf("%s: %d; want %d or more", q.what, len(lines), q.min)
		}
		for _, l := range lines {
			if !q.want.MatchString(l) {
				t.Errorf("%s: %q; want %v", q.what, l, q.want)
			}
		}
	}
}

// wireAndClone matches an Ethernet source that is a node's and a payload that
// says the clone MAC.
var wireAndClone = regexp.MustCompile(`^52:54:00:77:00:0[123]\t` + clone + `$`)

func tshark(t *testing.T, file, filter string, fields ...string) []string {
	t.Helper()
	args := []string{"-r", file, "-Y", filter, "-T", "fields"}
	if len(fields) == 0 {
		fields = []string{"frame.number"}
	}
	for _, f := range fields {
		args = append(args, "-e", f)
	}
	cmd := exec.Command("tshark", args...)
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("tshark -Y %q: %v: %s", filter, err, stderr.String())
	}
	return strings.FieldsFunc(string(out), func(r rune) bool { return r == '\n' })
}

// TestSleep stops an engine like a paused virtual machine would, for longer than
// the detection time. When it wakes, what has queued for it meanwhile belongs to
// the others, and must not be reset by a kernel that knows no socket for it.
func TestSleep(t *testing.T) {
	c := newCluster(t, 2)
	c.start()
	sleeper, other := c.nodes[0], c.nodes[1]
	sleeper.cloned.Signal(syscall.SIGSTOP)
	c.agree(other)
	var streams []*stream
	for range 16 { // about half of them in buckets that the sleeper owned
		streams = append(streams, c.openStream())
	}
	c.askAll(streams, "while one sleeps")
	sleeper.cloned.Signal(syscall.SIGCONT)
	sleeper.cloned.Await(0, "node was silent")
	c.agree(c.nodes...)
	c.askAll(streams, "after it woke")
	for range 20 {
		c.get("http://" + vip4 + "/whoami")
	}
}

// TestCloneMeddledWith: someone sets clone0 down, and then removes it.
func TestCloneMeddledWith(t *testing.T) {
	c := newCluster(t, 1)
	c.start()
	n := c.nodes[0]
	n.Run("ip", "link", "set", "clone0", "down")
	n.cloned.Await(0, "clone0 was set down")
	for _, host := range []string{vip4, "[" + vip6 + "]"} {
		c.get("http://" + host + "/whoami")
	}
	n.Run("ip", "link", "del", "clone0")
	if err := n.cloned.Wait(); err == nil {
		t.Errorf("without clone0 the engine ended without an error:\n%s", n.cloned.Output())
	}
	n.start()
	c.agree(n)
	c.get("http://" + vip4 + "/whoami")
}

// TestNeighborsAge makes the nodes' neighbour entries age a hundred times faster
// than by default: asking again works as well, without a link-local address to
// ask from.
func TestNeighborsAge(t *testing.T) {
	c := newCluster(t, 1)
	c.start()
	for _, f := range []string{"ipv4", "ipv6"} {
		c.nodes[0].Sysctl("net."+f+".neigh.clone0.base_reachable_time_ms", "300")
		c.nodes[0].Sysctl("net."+f+".neigh.clone0.delay_first_probe_time", "1")
	}
	for _, vip := range []string{vip4, vip6} {
		out := c.client.Run("ping", "-c", "70", "-i", "0.1", "-W", "2", vip)
		if !strings.Contains(out, "70 received, 0% packet loss") || strings.Contains(out, "DUP") {
			t.Errorf("ping %s: %s", vip, out)
		}
	}
}

// TestSnooping: a switch that forwards IPv6 multicast only where listeners have
// reported themselves must forward solicitations for the VIP to every node.
func TestSnooping(t *testing.T) {
	c := newCluster(t, 3)
	c.Switch.Sysctl("net.ipv6.conf.br0.disable_ipv6", "0") // its queries have a source
	c.Switch.Run("ip", "link", "set", "br0", "type", "bridge", "mcast_snooping", "1", "mcast_querier", "1",
		"mcast_query_interval", "100", "mcast_query_response_interval", "50", "mcast_startup_query_interval", "50")
	c.start()
	const group = "ff02::1:ff00:10"
	deadline := time.Now().Add(30 * time.Second)
	for {
		mdb := c.Switch.Run("bridge", "mdb", "show", "dev", "br0")
		ports := 0
		for _, n := range c.nodes {
			if strings.Contains(mdb, "port "+n.Name+" grp "+group) {
				ports++
			}
		}
		if ports == len(c.nodes) {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("the switch knows %d of %d nodes as listeners of %s:\n%s", ports, len(c.nodes), group, mdb)
		}
		time.Sleep(50 * time.Millisecond)
	}
	for range 5 {
		out := c.client.Run("ping", "-c", "1", "-W", "5", vip6)
		if strings.Contains(out, "DUP") {
			t.Error(out)
		}
		c.client.Run("ip", "neigh", "del", vip6, "dev", "eth0")
	}
}

// TestDatapathChanges: an engine is killed, and the next one has another datapath, back
// and forth; the node serves each time, and at the end the host is as it was.
func TestDatapathChanges(t *testing.T) {
	c := newCluster(t, 1)
	n := c.nodes[0]
	before := n.describe()
	n.StartHTTP()
	for _, datapath := range []string{"bpf", "raw", "bpf", "raw"} {
		n.datapath = datapath
		// With XDP the next datapath would not even see a frame.
		n.cloned = n.Start("cloned", n.flags("--ingress", "xdp", "--log-level", "debug")...)
		c.agree(n)
		for range 5 {
			c.get("http://" + vip4 + "/whoami")
			c.get("http://[" + vip6 + "]/whoami")
		}
		if s := n.Status(); s.Datapath != datapath {
			t.Errorf("the datapath is %s; want %s", s.Datapath, datapath)
		}
		n.cloned.Kill()
	}
	n.start()
	c.agree(n)
	c.checkSwitch()
	if err := n.cloned.Stop(); err != nil {
		t.Error(err)
	}
	if after := n.describe() + n.Run("tc", "qdisc", "show", "dev", "eth0"); after != before+n.Run("tc", "qdisc", "show", "dev", "eth0") {
		t.Errorf("the host is\n%s\nwant\n%s", after, before)
	}
	if pins, err := filepath.Glob(filepath.Join(c.BPFFS(), "clonecluster", "*")); err != nil || len(pins) > 0 {
		t.Errorf("pins are left: %q, %v", pins, err)
	}
}
