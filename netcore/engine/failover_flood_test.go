package engine_test

import (
	"net"
	"net/netip"
	"regexp"
	"slices"
	"strconv"
	"testing"
	"time"

	"clonecluster/netcore/filter"
)

// TestFailoverFlood: SYNs of a client that does not exist come down on one node's
// buckets, some ten thousand a second. Everybody's connections go on, new ones
// succeed, with SYN cookies where the flood is, and no memory is used up, whether the
// buckets are settled or every segment is looked up.
func TestFailoverFlood(t *testing.T) {
	for _, wary := range []bool{false, true} {
		name := "settled"
		if wary {
			name = "shared"
		}
		t.Run(name, func(t *testing.T) { flood(t, wary) })
	}
}

func flood(t *testing.T, wary bool) {
	f := newFailover(t, 3, patient)
	for _, n := range f.nodes {
		// So that a flood that two processors can make is one.
		n.Sysctl("net.core.somaxconn", "128")
		n.Sysctl("net.ipv4.tcp_max_syn_backlog", "128")
		n.StartHTTP()
		n.cloned = n.Start("cloned-forced", f.config, n.status, n.datapath, f.BPFFS())
	}
	o := f.own(f.nodes...)
	victim := f.nodes[1]
	if wary {
		for _, n := range f.nodes {
			n.cloned.Signal(forceWary)
			n.cloned.Await(0, "forcing wary")
		}
	}

	attacker := f.Host("attacker", "52:54:00:77:02:02")
	nobody := netip.MustParseAddr("10.77.0.3")
	for _, n := range f.nodes { // it is somewhere, and does not answer
		n.Run("ip", "neigh", "replace", nobody.String(), "lladdr", attacker.MAC, "dev", "clone0", "nud", "permanent")
	}
	mac, err := net.ParseMAC(attacker.MAC)
	if err != nil {
		t.Fatal(err)
	}
	var frames [][]byte
	buckets := o.of(victim)
	for port := uint16(1024); len(frames) < 8192; port++ {
		b := f.probe.bucketOf(netip.AddrPortFrom(nobody, port))
		if slices.Contains(buckets, b) {
			frames = append(frames, syn(mac, nobody, port))
		}
	}
	c, d := f.load(60, f.nodes...)
	before := rss(t, victim)
	end := pester(t, attacker, 100, frames...)
	began := time.Now()
	for time.Since(began) < size(6*time.Second, time.Minute) {
		c.await(50, f.nodes...)
	}
	d.mustGoOn("under a flood of SYNs")
	end()
	all := c.end()
	f.mustSucceed(all)
	cookies := map[string]int{}
	for _, what := range []string{"TcpExtSyncookiesSent", "TcpExtSyncookiesRecv"} {
		m := regexp.MustCompile(what + ` +(\d+)`).FindStringSubmatch(victim.Run("nstat", "-asz", what))
		if m == nil {
			t.Fatalf("nstat does not tell %s", what)
		}
		if cookies[what], err = strconv.Atoi(m[1]); err != nil {
			t.Fatal(err)
		}
		if cookies[what] == 0 {
			t.Errorf("%s is 0: this shows nothing", what)
		}
	}
	after := rss(t, victim)
	t.Logf("%v; %v; the victim's %v; the engine's memory %d kB, then %d kB", all, d, cookies, before, after)
	if after > before+16<<10 {
		t.Errorf("the engine had %d kB before the flood, and has %d kB", before, after)
	}
	if s := victim.Status(); wary && s.Buckets.Shared < 300 || !wary && s.Buckets.Settled < 300 {
		t.Errorf("the victim's buckets were %+v", s.Buckets)
	}
}

// bucketOf is the bucket of a client's flow to the prober's target.
func (p *prober) bucketOf(client netip.AddrPort) int {
	return p.filter.Bucket(filter.Tuple{Proto: filter.ProtoTCP, VIP: netip.AddrPortFrom(netip.MustParseAddr(vip4), 80), Client: client})
}
