package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"clonecluster/config"
	"clonecluster/qemu/lab/crowd"
	"clonecluster/qemu/nethost"
	"clonecluster/qemu/vswitch"
)

// check is one thing that has to hold, and what was seen.
type check struct {
	Name   string `json:"name"`
	OK     bool   `json:"ok"`
	Detail string `json:"detail"`
}

func (c check) String() string {
	mark := "ok    "
	if !c.OK {
		mark = "FAILED"
	}
	return fmt.Sprintf("%s  %s: %s", mark, c.Name, c.Detail)
}

// answer is what the reference service says of itself.
type answer struct {
	Node     string `json:"node"`
	Hostname string `json:"hostname"`
}

// asker sends requests to the VIP, each on a connection of its own, as a crowd
// of clients would, and keeps the score.
type asker struct {
	host    *nethost.Host
	port    uint16
	timeout time.Duration     // for one request
	names   map[string]string // of nodes, by wire MAC

	mu     sync.Mutex
	byNode map[string]int
	failed []string
	last   string
	took   []time.Duration // by those that were answered, the last ones
}

func newAsker(host *nethost.Host, port uint16, nodes []nodeRef) *asker {
	names := map[string]string{}
	for _, n := range nodes {
		names[n.mac.String()] = n.name
	}
	return &asker{host: host, port: port, timeout: requestTimeout, names: names, byNode: map[string]int{}}
}

// requestTimeout is longer than a lost SYN's retransmissions under emulation.
const requestTimeout = 15 * time.Second

// ask sends one request to vip and returns which node answered.
func (a *asker) ask(ctx context.Context, vip netip.Addr) (answer, error) {
	begin := time.Now()
	got, err := a.get(ctx, vip)
	if ctx.Err() != nil && err != nil {
		return got, ctx.Err() // interrupted: nobody's fault
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if err != nil {
		a.failed = append(a.failed, err.Error())
		return got, err
	}
	a.byNode[got.Node]++
	a.took = append(a.took[max(0, len(a.took)-99):], time.Since(begin))
	a.last = fmt.Sprintf("last by %s (%s) in %.0f ms", a.names[got.Node], got.Hostname, float64(time.Since(begin).Microseconds())/1000)
	return got, nil
}

func (a *asker) get(ctx context.Context, vip netip.Addr) (got answer, err error) {
	reqCtx, cancel := context.WithTimeout(ctx, a.timeout)
	defer cancel()
	url := "http://" + netip.AddrPortFrom(vip, a.port).String() + "/whoami"
	req, err := http.NewRequestWithContext(reqCtx, http.MethodGet, url, nil)
	if err != nil {
		return got, err
	}
	req.Close = true
	resp, err := a.host.HTTPClient().Do(req)
	if err != nil {
		return got, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, 64<<10))
	if err != nil {
		return got, fmt.Errorf("GET %s: %w", url, err)
	}
	if resp.StatusCode != http.StatusOK {
		return got, fmt.Errorf("GET %s: %s", url, resp.Status)
	}
	if err := json.Unmarshal(body, &got); err != nil || got.Node == "" {
		return got, fmt.Errorf("GET %s: not the answer of a node: %.60q", url, body)
	}
	return got, nil
}

// first asks until vip answers: the moment that counts for a user.
func (a *asker) first(ctx context.Context, vip netip.Addr) error {
	for {
		// Short, so that it is not the retransmission of a lost SYN that is measured.
		attempt, cancel := context.WithTimeout(ctx, 2*time.Second)
		_, err := a.get(attempt, vip)
		cancel()
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("no HTTP answer from %v: %w", vip, err)
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// enter counts what a crowd asked. How its failures come about the crowd tells.
func (a *asker) enter(r crowd.Request) {
	if r.Err != nil {
		return
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.byNode[r.Node]++
	a.last = fmt.Sprintf("last by %s in %.0f ms", a.names[r.Node], float64(r.End.Sub(r.Begin).Microseconds())/1000)
}

// pace is an interval in which this cluster can be asked without being kept busy
// by it: emulated processors may take a tenth of a second for an answer.
func (a *asker) pace() time.Duration {
	a.mu.Lock()
	defer a.mu.Unlock()
	if len(a.took) == 0 {
		return longestPace
	}
	median := slices.Sorted(slices.Values(a.took))[len(a.took)/2]
	return min(max(2*median, shortestPace), longestPace)
}

const (
	shortestPace = 20 * time.Millisecond
	longestPace  = 200 * time.Millisecond
)

type score struct {
	byNode map[string]int
	asked  int
	failed []string
	last   string
}

func (a *asker) score() score {
	a.mu.Lock()
	defer a.mu.Unlock()
	s := score{byNode: maps.Clone(a.byNode), failed: slices.Clone(a.failed), last: a.last}
	for _, n := range s.byNode {
		s.asked += n
	}
	return s
}

// nodeRef is a node by its name in the lab and its wire MAC.
type nodeRef struct {
	name string
	mac  net.HardwareAddr
}

// checkTraffic sends requests over both IP versions and pings, and says whether
// the cluster answered as one server.
func checkTraffic(ctx context.Context, a *asker, cfg *config.Config, nodes []nodeRef, requests int, status func(string, ...any)) ([]check, error) {
	var checks []check
	for _, p := range []netip.Prefix{cfg.VIP.IPv4, cfg.VIP.IPv6} {
		if !p.IsValid() {
			continue
		}
		before := a.score()
		for i := range requests {
			status("asking %s: %d of %d", p.Addr(), i+1, requests)
			if _, err := a.ask(ctx, p.Addr()); errors.Is(err, context.Canceled) {
				return checks, err
			}
		}
		after := a.score()
		failed := after.failed[len(before.failed):]
		c := check{Name: "every request to " + p.Addr().String() + " was answered", OK: len(failed) == 0,
			Detail: fmt.Sprintf("%d of %d", after.asked-before.asked, requests)}
		if len(failed) > 0 {
			c.Detail += "; first: " + failed[0]
		}
		checks = append(checks, c)
	}
	share, err := checkShares(ctx, a, cfg, nodes, status)
	if err != nil {
		return checks, err
	}
	checks = append(checks, share)
	checks = append(checks, checkPings(ctx, a.host, cfg)...)
	return checks, ctx.Err()
}

// sharesWithin is how long nodes may take from their first answer to their share.
const sharesWithin = 10 * time.Second

// checkShares asks on until every node has answered, or until it would be a
// wonder if one that takes its share had not. With an affinity one client has
// one node, and there is nothing to wait for.
func checkShares(ctx context.Context, a *asker, cfg *config.Config, nodes []nodeRef, status func(string, ...any)) (check, error) {
	target, err := webAddress(cfg)
	if err != nil {
		return check{}, err
	}
	if target.affinity != config.AffinityNone {
		served := len(a.score().byNode)
		return check{"one client is served by one node (affinity " + string(target.affinity) + ")", served >= 1 && served <= 2,
			fmt.Sprintf("%d served", served)}, nil // one per IP version
	}
	// That one of n nodes is left out by 20·n requests has a chance of n·e⁻²⁰. A node
	// that has just come up takes its share within a few detection times.
	most, until := 20*len(nodes), time.Now().Add(sharesWithin)
	for asked := 0; ; asked++ {
		s := a.score()
		var shares []string
		all := true
		for _, n := range nodes {
			count := s.byNode[n.mac.String()]
			all = all && count > 0
			shares = append(shares, fmt.Sprintf("%s %d", n.name, count))
		}
		if all || asked >= most && time.Now().After(until) {
			return check{"every node took a share", all, strings.Join(shares, ", ")}, nil
		}
		status("asking until every node has answered: %s", strings.Join(shares, ", "))
		if _, err := a.ask(ctx, target.Addr()); errors.Is(err, context.Canceled) {
			return check{}, err
		}
	}
}

func checkPings(ctx context.Context, host *nethost.Host, cfg *config.Config) []check {
	var checks []check
	for _, p := range []netip.Prefix{cfg.VIP.IPv4, cfg.VIP.IPv6} {
		if !p.IsValid() {
			continue
		}
		pingCtx, cancel := context.WithTimeout(ctx, requestTimeout)
		rtt, err := host.Ping(pingCtx, p.Addr())
		cancel()
		c := check{Name: "ping " + p.Addr().String(), OK: err == nil, Detail: rtt.Round(100 * time.Microsecond).String()}
		if err != nil {
			c.Detail = err.Error()
		}
		checks = append(checks, c)
		held := host.MACOf(p.Addr())
		checks = append(checks, check{"the client holds the clone MAC for " + p.Addr().String(),
			slices.Equal(held, cfg.VIP.CloneMAC), held.String()})
	}
	return checks
}

// checkSwitch says what the switch saw: it must have learnt every node, and
// never the clone MAC.
func checkSwitch(sw *vswitch.Switch, clone net.HardwareAddr, nodes []nodeRef) []check {
	var missing []string
	for _, n := range nodes {
		if port, ok := sw.Lookup(n.mac); !ok || port != n.name {
			missing = append(missing, n.name)
		}
	}
	wires := check{"the switch has learnt every wire MAC", len(missing) == 0, fmt.Sprintf("%d of %d", len(nodes)-len(missing), len(nodes))}
	if len(missing) > 0 {
		wires.Detail += ", not " + strings.Join(missing, ", ")
	}
	_, learned := sw.Lookup(clone)
	st := sw.Stats()
	return []check{
		wires,
		{"the switch has not learnt the clone MAC", !learned, clone.String()},
		{"frames to the clone MAC were flooded", st.GuardFloods > 0, fmt.Sprint(st.GuardFloods)},
		{"no address moved between ports", st.Moves == 0, fmt.Sprint(st.Moves)},
	}
}

// checkGuard is the check of I1, over all frames until now.
func checkGuard(sw *vswitch.Switch) check {
	c := check{Name: "no frame had the clone MAC as its source", OK: true, Detail: fmt.Sprintf("%d frames seen", sw.Stats().Received)}
	if v := sw.Violations(); len(v) > 0 {
		c.OK, c.Detail = false, fmt.Sprintf("%d had; first: %v", sw.Stats().Violations, v[0])
	}
	return c
}
