package engine

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"clonecluster/config"
	"clonecluster/netcore/api"
	"clonecluster/netcore/filter"
	"clonecluster/netcore/membership"
	"clonecluster/netcore/sockdiag"
)

const (
	// cardInterval is the time between two cards of a node, if nobody comes.
	cardInterval = 5 * time.Second
	// addressInterval is the time between two looks at the NIC's addresses.
	addressInterval = 2 * time.Second
	// apiEnd is how long those who are being answered have when the engine ends.
	apiEnd = 500 * time.Millisecond
	// buildDelay leaves the processor to those who boot.
	buildDelay = 10 * time.Second

	localRoot = "root of this machine"
)

// serveAPI serves the API on the NIC's addresses, as they come and go, and on the
// VIP, until ctx ends. That it cannot be served is no reason for the data plane to
// stop.
func (e *engine) serveAPI(ctx context.Context) {
	cfg := e.opt.Config
	authority, err := api.NewAuthority(cfg.Cluster.Name, cfg.Cluster.Key, cfg.Cluster.AcceptKeys...)
	var server *api.Server
	if err == nil {
		server, err = api.NewServer(authority, backend{e, ctx}, api.Limits{Asked: e.metrics.asked}, e.log)
	}
	if err != nil {
		e.log.Error("no management API", "error", err)
		return
	}
	e.server.Store(server)
	var serving sync.WaitGroup
	listeners := map[netip.Addr]net.Listener{}
	ended := make(chan netip.Addr)
	said := map[netip.Addr]string{}
	tick := time.NewTimer(toBeat(addressInterval))
	defer tick.Stop()
	for ctx.Err() == nil {
		want := append(slices.Clone(e.lookAtAddresses()), e.vips...)
		for a, l := range listeners {
			if !slices.Contains(want, a) {
				_ = l.Close()
			}
		}
		for _, a := range want {
			if listeners[a] != nil {
				continue
			}
			l, err := e.listenAPI(ctx, a)
			if err != nil {
				// An address that is new may be tentative for some seconds.
				if text := err.Error(); said[a] != text && !errors.Is(err, unix.EADDRNOTAVAIL) {
					said[a] = text
					e.log.Warn("the management API is not to be had here", "address", a, "error", err)
				}
				continue
			}
			delete(said, a)
			listeners[a] = l
			serving.Go(func() {
				err := server.Serve(l)
				_ = l.Close()
				if err != nil {
					e.log.Warn("serving the management API", "address", a, "error", err)
				}
				select {
				case ended <- a:
				case <-ctx.Done():
				}
			})
		}
		select {
		case <-ctx.Done():
		case a := <-ended:
			delete(listeners, a)
		case <-tick.C:
			tick.Reset(toBeat(addressInterval))
		}
	}
	patience, stop := context.WithTimeout(context.WithoutCancel(ctx), apiEnd)
	defer stop()
	server.Close(patience)
	serving.Wait()
}

func (e *engine) listenAPI(ctx context.Context, a netip.Addr) (net.Listener, error) {
	if a.IsLinkLocalUnicast() && a.Is6() {
		a = a.WithZone(e.nic.Name)
	}
	return (&net.ListenConfig{}).Listen(ctx, "tcp", netip.AddrPortFrom(a, uint16(e.opt.Config.Management.Port)).String())
}

// lookAtAddresses reads the NIC's addresses: first those that others can use from
// afar.
func (e *engine) lookAtAddresses() []netip.Addr {
	list, err := netlink.AddrList(&netlink.Device{LinkAttrs: netlink.LinkAttrs{Index: e.nic.Index}}, netlink.FAMILY_ALL)
	if err != nil {
		return e.ownAddresses()
	}
	var all []netip.Addr
	for _, l := range list {
		a, ok := netip.AddrFromSlice(l.IP)
		a = a.Unmap()
		// An address that is tentative is not ours yet.
		if ok && l.Flags&(unix.IFA_F_TENTATIVE|unix.IFA_F_DADFAILED) == 0 && !slices.Contains(e.vips, a) && !slices.Contains(all, a) {
			all = append(all, a)
		}
	}
	slices.SortStableFunc(all, func(a, b netip.Addr) int { return rank(a) - rank(b) })
	all = all[:min(len(all), membership.MaxCardAddresses)]
	if old := e.addresses.Swap(&all); old == nil || !slices.Equal(*old, all) {
		select {
		case e.met <- struct{}{}: // the others have to know
		default:
		}
	}
	return all
}

func rank(a netip.Addr) int {
	switch {
	case a.IsLinkLocalUnicast():
		return 2
	case a.Is6():
		return 1
	}
	return 0
}

func (e *engine) ownAddresses() []netip.Addr {
	if a := e.addresses.Load(); a != nil {
		return *a
	}
	return nil
}

// sendCards says where this node is reached, now and again until ctx ends.
func (e *engine) sendCards(ctx context.Context) {
	tick := time.NewTimer(toBeat(cardInterval))
	defer tick.Stop()
	later := time.NewTimer(buildDelay)
	defer later.Stop()
	for {
		card := membership.Card{Port: uint16(e.opt.Config.Management.Port), Addresses: e.ownAddresses(), Name: e.host, Build: e.buildID()}
		if len(card.Addresses) > 0 {
			_ = e.node.SendCard(card) // the next one says the same
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			tick.Reset(toBeat(cardInterval))
		case <-e.met:
			// Several come at a time when a cluster starts.
			select {
			case <-ctx.Done():
				return
			case <-time.After(50 * time.Millisecond):
			}
		case <-later.C:
			id := hashOfProgram()
			e.build.Store(&id)
		}
	}
}

func (e *engine) buildID() string {
	if b := e.build.Load(); b != nil {
		return *b
	}
	return ""
}

// hashOfProgram tells programs apart whatever they were built from: the first
// digits of the SHA-256 of the file; empty if that cannot be read.
func hashOfProgram() string {
	f, err := os.Open("/proc/self/exe")
	if err != nil {
		return ""
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return ""
	}
	return hex.EncodeToString(h.Sum(nil)[:6])
}

// hostname is the host's name, if it is one that can be told others.
func hostname() string {
	name, err := os.Hostname()
	if err != nil || len(name) > membership.MaxCardText {
		return ""
	}
	for _, c := range []byte(name) {
		if !strings.ContainsRune("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-.", rune(c)) {
			return ""
		}
	}
	return name
}

func policyName(c *config.Config) string {
	if c.Policy.Name != "" {
		return string(c.Policy.Name)
	}
	return fmt.Sprintf("%s, affinity %s", c.Policy.Balance, c.Policy.Affinity)
}

// drain and resume do as somebody says.
func (e *engine) drain(ctx context.Context, o api.Order, who string) {
	e.ordered("drain", "this node was told to give its share to the others", o, who)
	e.node.Drain(ctx)
	e.noteDrain(true)
}

func (e *engine) resume(ctx context.Context, o api.Order, who string) {
	e.ordered("resume", "this node was told to take its share", o, who)
	e.node.Resume(ctx)
	e.noteDrain(false)
}

func (e *engine) ordered(kind, text string, o api.Order, who string) {
	why := "by " + who
	if o.Reason != "" {
		why += ": " + o.Reason
	}
	e.log.Info(text, "by", who, "reason", o.Reason)
	e.happened(func() api.Event { return api.Event{Kind: kind, About: e.self(), Text: text, Why: why} })
}

// backend is the engine as the API sees it.
type backend struct {
	*engine
	parts context.Context // what was ordered goes on when whoever ordered it has gone
}

var _ api.Backend = backend{}

func (b backend) Self() (id, host string)                           { return b.self(), b.host }
func (b backend) Status() api.Status                                { return b.status() }
func (b backend) Events() *api.Record[api.Event]                    { return b.events }
func (b backend) Drain(_ context.Context, o api.Order, who string)  { b.drain(b.parts, o, who) }
func (b backend) Resume(_ context.Context, o api.Order, who string) { b.resume(b.parts, o, who) }

func (b backend) Health() api.Health {
	v := b.node.View()
	return api.Health{State: v.State.String(), OK: v.State == membership.Serving && !v.Fenced}
}

// Offered gives what each bucket was offered.
func (b backend) Offered() api.OfferedBuckets {
	o, unowned := b.offering.buckets()
	return api.OfferedBuckets{Node: b.self(), Time: time.Now(), Total: b.offering.rates(), Frames: o.Frames[:], Unowned: unowned[:], SYNs: o.SYNs[:], SYNsAgain: o.Again[:]}
}

// Peers are the other nodes that are heard or were so until a while ago.
func (b backend) Peers() (peers []api.Peer) {
	heard := map[membership.NodeID]bool{}
	for _, m := range b.node.View().Members {
		heard[m.ID] = true
		if !m.Self {
			peers = append(peers, b.peer(m.ID))
		}
	}
	b.goneMu.Lock()
	defer b.goneMu.Unlock()
	for id, d := range b.gone {
		switch since := time.Since(d.at); {
		case since > goneFor:
			delete(b.gone, id)
		case !heard[id]:
			p := b.peer(id)
			p.Gone = fmt.Sprintf("%v ago: %s", since.Round(time.Second), d.why)
			peers = append(peers, p)
		}
	}
	slices.SortFunc(peers, func(x, y api.Peer) int { return strings.Compare(x.Node, y.Node) })
	return peers
}

func (b backend) peer(id membership.NodeID) api.Peer {
	p := api.Peer{Node: id.String()}
	if c := b.node.Card(id); c != nil {
		p.Name = c.Name
		for _, a := range c.Addresses {
			if a.IsLinkLocalUnicast() && a.Is6() {
				a = a.WithZone(b.nic.Name)
			}
			p.Addresses = append(p.Addresses, netip.AddrPortFrom(a, c.Port))
		}
	}
	return p
}

// Owners is the present map; of version 0 if there is none.
func (b backend) Owners() api.Owners {
	m := b.node.View().Owners
	if m == nil {
		return api.Owners{Nodes: []string{}, Buckets: bytes.Repeat([]byte{membership.Nobody}, filter.Buckets)}
	}
	o := api.Owners{Map: m.Version, Nodes: []string{}, Buckets: m.Owner[:]}
	for _, id := range m.Members {
		o.Nodes = append(o.Nodes, id.String())
	}
	return o
}

// Which says what this node makes of a flow.
func (b backend) Which(f api.Flow) (w api.Which, err error) {
	client := f.Client.Addr().Unmap()
	i := slices.IndexFunc(b.vips, func(v netip.Addr) bool { return v.Is4() == client.Is4() })
	if i < 0 {
		return w, fmt.Errorf("the cluster has no address that %v could ask: it is at %v", client, b.vips)
	}
	t := filter.Tuple{Proto: filter.ProtoTCP, VIP: netip.AddrPortFrom(b.vips[i], f.Port), Client: f.Client}
	if f.Proto == "udp" {
		t.Proto = filter.ProtoUDP
	}
	w = api.Which{Client: f.ClientText(), VIP: b.vips[i].String(), Port: f.Port, Protocol: f.Proto, Nodes: []api.WhichNode{}}
	affinity, disabled := affinityOf(b.fc, t.Proto, f.Port)
	w.Affinity = affinityNames[affinity]
	switch {
	case disabled:
		w.Affinity = string(config.AffinityDisabled)
		return w, nil
	case affinity == filter.AffinityNone && f.Client.Port() == 0:
		return w, nil
	}
	bucket, view, table := b.filter.Bucket(t), b.node.View(), b.filter.Table()
	w.Bucket = &bucket
	if owner, ok := view.Owner(bucket); ok {
		w.Owner = owner.String()
	}
	self := api.WhichNode{Node: view.Self.ID.String(), Name: b.host, State: strings.ToLower(table[bucket].String()), Fenced: view.Fenced}
	if f.Proto == "tcp" && f.Client.Port() != 0 {
		self.Socket = hasSocket(t)
	}
	w.Nodes = append(w.Nodes, self)
	return w, nil
}

var affinityNames = map[filter.Affinity]string{
	filter.AffinityNone: string(config.AffinityNone), filter.AffinityClient: string(config.AffinityClient),
	filter.AffinityNetwork: string(config.AffinityNetwork), filter.AffinitySingle: string(config.AffinitySingle),
}

// affinityOf gives what a port's rule says.
func affinityOf(fc filter.Config, proto uint8, port uint16) (a filter.Affinity, disabled bool) {
	for _, r := range fc.Rules {
		if r.Proto == proto && r.PortLo <= port && port <= r.PortHi {
			return r.Affinity, r.Disabled
		}
	}
	return fc.Default, false
}

func hasSocket(t filter.Tuple) bool {
	s, err := sockdiag.Open(0)
	if err != nil {
		return false
	}
	defer s.Close()
	return s.Lookup(t) == filter.SocketEstablished
}

// keeper puts the engine's lines where the API finds them.
type keeper struct{ log *api.Record[api.LogLine] }

func (k keeper) Write(b []byte) (int, error) {
	for line := range strings.Lines(string(b)) {
		line = strings.TrimRight(line, "\n")
		line = strings.ToValidUTF8(line[:min(len(line), api.MaxLine)], "·")
		k.log.Add(api.LogLine{Time: time.Now(), Source: "engine", Text: line})
	}
	return len(b), nil
}

// Logs gives the lines of the appliance's init, which keeps those of all programs,
// or else of this engine.
func (b backend) Logs(ctx context.Context, after uint64) (lines []api.LogLine, run string, lost uint64, more <-chan struct{}, err error) {
	var theirs struct {
		Run   string
		Lost  uint64
		Lines []struct {
			ID     uint64
			At     float64 `json:"at_seconds"`
			Source string
			Text   string
		}
	}
	err = b.askInit(ctx, "/v1/log", url.Values{"format": {"json"}, "after": {strconv.FormatUint(after, 10)}}, &theirs)
	switch {
	case err == nil:
		up := sinceBoot()
		for _, l := range theirs.Lines {
			at := time.Now().Add(time.Duration(l.At*float64(time.Second)) - up).Round(time.Millisecond)
			lines = append(lines, api.LogLine{ID: l.ID, Time: at, Source: l.Source, Text: l.Text})
		}
		return lines, theirs.Run, theirs.Lost, nil, nil
	case !errors.Is(err, api.ErrNoBoot):
		return nil, "", 0, nil, err
	case b.opt.Log == nil:
		return nil, "", 0, nil, errors.New("this engine keeps no log")
	}
	lines, lost, more = b.opt.Log.After(after)
	return lines, b.opt.Log.Run(), lost, more, nil
}

// Boot asks the appliance's init.
func (b backend) Boot(ctx context.Context) (boot api.Boot, err error) {
	err = b.askInit(ctx, "/v1/status", nil, &boot)
	return boot, err
}

// Reboot has the appliance's init restart the machine.
func (b backend) Reboot(ctx context.Context, o api.Order, who string) error {
	// Before it is asked: the engine may be gone soon. An ordinary host is told nothing.
	if err := b.askInit(ctx, "/v1/status", nil, &struct{}{}); err != nil {
		return err
	}
	b.ordered("reboot", "this node was told to restart its machine", o, who)
	return b.tellInit(ctx, http.MethodPost, "/v1/reboot", nil, nil)
}

// askInit asks the appliance's init. The error matches ErrNoBoot where there is
// none.
func (b backend) askInit(ctx context.Context, path string, query url.Values, out any) error {
	return b.tellInit(ctx, http.MethodGet, path, query, out)
}

// tellInit is askInit with any method; out nil: no answer is wanted.
func (b backend) tellInit(ctx context.Context, method, path string, query url.Values, out any) error {
	if b.opt.InitSocket == "" {
		return api.ErrNoBoot
	}
	tr := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", b.opt.InitSocket)
	}}
	defer tr.CloseIdleConnections()
	u := url.URL{Scheme: "http", Host: "init", Path: path, RawQuery: query.Encode()}
	req, err := http.NewRequestWithContext(ctx, method, u.String(), nil)
	if err != nil {
		return err
	}
	resp, err := (&http.Client{Transport: tr, Timeout: 5 * time.Second}).Do(req)
	switch {
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ECONNREFUSED):
		return api.ErrNoBoot
	case err != nil:
		return fmt.Errorf("asking init: %w", err)
	}
	defer resp.Body.Close()
	switch {
	case resp.StatusCode == http.StatusConflict:
		return api.ErrEnding
	case resp.StatusCode/100 != 2:
		return fmt.Errorf("asking init: it answers %s", resp.Status)
	case out == nil:
		return nil
	}
	if err := json.NewDecoder(io.LimitReader(resp.Body, 4<<20)).Decode(out); err != nil {
		return fmt.Errorf("reading init's answer: %w", err)
	}
	return nil
}

// sinceBoot is init's clock.
func sinceBoot() time.Duration {
	var ts unix.Timespec
	if unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts) != nil {
		return 0
	}
	return time.Duration(ts.Nano())
}
