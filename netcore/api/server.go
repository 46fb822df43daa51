package api

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	stdlog "log"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"

	"clonecluster/netcore/capture"
	"clonecluster/netcore/dashboard"
	"clonecluster/netcore/doctor"
	"clonecluster/netcore/finding"
)

// Backend is the node that a Server speaks for. Its methods are called from
// several goroutines.
type Backend interface {
	// Self is the node's id, which is its wire MAC, and the name of its host.
	Self() (id, host string)
	Health() Health
	Offered() OfferedBuckets
	Status() Status
	// Drain and Resume do as they are told by who, and return at once.
	Drain(ctx context.Context, why Order, who string)
	Resume(ctx context.Context, why Order, who string)
	Policy() Policy
	// SetPolicy gives what holds then. The error matches ErrOrder if it names no node.
	SetPolicy(ctx context.Context, o PolicyOrder, who string) (Policy, error)
	// Reboot restarts the machine. The error matches ErrNoBoot on an ordinary host, and
	// ErrEnding if that is on its way already.
	Reboot(ctx context.Context, why Order, who string) error
	// Which is what this node alone knows: all but Why, with itself in Nodes.
	Which(Flow) (Which, error)
	// Peers are the other nodes, and those that were there a while ago.
	Peers() []Peer
	// Owners is the present map.
	Owners() Owners
	Events() *Record[Event]
	// Logs gives the lines after an id; more is closed when others come, and nil
	// if that is not known.
	Logs(ctx context.Context, after uint64) (lines []LogLine, run string, lost uint64, more <-chan struct{}, err error)
	// Examine has the network examined, unless that is under way, with a burst up to
	// so many frames a second; 0: none. With a burst the error matches doctor.ErrExamining
	// if it is under way. Examination is how far it is.
	Examine(burst int, who string) error
	Examination() Examination
	// Capture writes the frames that pass the node's NIC until ctx ends or the query is
	// satisfied.
	Capture(ctx context.Context, q capture.Query, w io.Writer, flush func() error) error
	// Boot matches ErrNoBoot on an ordinary host.
	Boot(ctx context.Context) (Boot, error)
	// Metrics writes the node's metrics for Prometheus, in the format that the header
	// Accept asks for, and gives its media type.
	Metrics(w io.Writer, accept http.Header) (mediaType string, err error)
}

// ErrNoBoot says that the engine did not boot the machine.
var ErrNoBoot = errors.New("this node is an ordinary host, whose boot is not ours to tell or to order; use its own tools")

// ErrEnding says that the machine is about to end.
var ErrEnding = errors.New("the node is on its way down already")

// Peer is another node.
type Peer struct {
	Node, Name string
	Addresses  []netip.AddrPort // with zones where needed; none: not known
	Gone       string           // it is no longer there, and why
}

// Limits bound what clients can take of a node. The zero value means the defaults. Of
// the connections with a certificate and of the streams those with read-only
// certificates have half, and those with one of these a quarter.
type Limits struct {
	Connections int // of clients with a certificate, 64
	Strangers   int // connections of which that is not known yet, 32; one more ends the oldest
	PerSource   int // connections of one address, or of one IPv6 /64, 16; half of that of strangers, three quarters with read-only certificates
	Streams     int // that are followed, 32
	// NewPerSecond bounds new connections, as the handshake costs processor time:
	// 100 of all strangers, and a fifth of that of one source. Sources that have shown a
	// certificate for control within an hour, and the cluster's nodes, have the fifth for
	// themselves; those that have shown a read-only one have half of the rate together.
	NewPerSecond float64
	// Requests bounds the requests of one client's connection in a second, 50; those with
	// one read-only certificate have twice that, and all of these four times.
	Requests float64
	Show     time.Duration // for showing a certificate, with the first request, 3 s
	Header   time.Duration // for the handshake and the request's header, 5 s
	Answer   time.Duration // for reading the body and writing an answer, 20 s
	Ask      time.Duration // for another node's answer, 2 s
	// Asked is told of each answer: the name of the route, "none" if it was refused
	// before that was known, and the code. nil: nobody is.
	Asked func(route string, code int)
}

func (l Limits) orDefaults() Limits {
	def(&l.Connections, 64)
	def(&l.Strangers, 32)
	def(&l.PerSource, 16)
	def(&l.Streams, 32)
	def(&l.NewPerSecond, 100)
	def(&l.Requests, 50)
	def(&l.Show, 3*time.Second)
	def(&l.Header, 5*time.Second)
	def(&l.Answer, 20*time.Second)
	def(&l.Ask, 2*time.Second)
	if l.Asked == nil {
		l.Asked = func(string, int) {}
	}
	return l
}

func def[T comparable](p *T, v T) {
	var zero T
	if *p == zero {
		*p = v
	}
}

// The bounds of a request.
const (
	mostHeader = 8 << 10
	mostBody   = 4 << 10
)

// Server serves the API of one node.
type Server struct {
	backend  Backend
	log      *slog.Logger
	limits   Limits
	identity *identity
	door     *door
	http     *http.Server
	captures chan struct{}
	ended    chan struct{} // closed when the streams have to end
	endOnce  sync.Once

	peersMu sync.Mutex
	peers   map[asked]*Client

	clusterMu sync.Mutex
	cluster   Cluster
	clusterAt time.Time

	watchMu  sync.Mutex
	watching *watch // while somebody looks
}

// NewServer makes the server of a node; Serve runs it.
func NewServer(a *Authority, b Backend, limits Limits, log *slog.Logger) (*Server, error) {
	id, err := newIdentity(a)
	if err != nil {
		return nil, err
	}
	limits = limits.orDefaults()
	s := &Server{
		backend: b, log: log, limits: limits, identity: id, door: newDoor(limits, b.Peers), captures: make(chan struct{}, mostCaptures),
		ended: make(chan struct{}), peers: map[asked]*Client{},
	}
	s.http = &http.Server{
		Handler:           s.handler(),
		ReadHeaderTimeout: limits.Header, ReadTimeout: limits.Answer, WriteTimeout: limits.Answer, IdleTimeout: 3 * limits.Answer,
		MaxHeaderBytes: mostHeader,
		// What strangers do wrong is counted by the door, and not for the log.
		ErrorLog:     stdlog.New(io.Discard, "", 0),
		TLSNextProto: map[string]func(*http.Server, *tls.Conn, http.Handler){}, // no HTTP/2: it has more ways to be abused than uses here
		ConnContext: func(ctx context.Context, c net.Conn) context.Context {
			if t, ok := c.(*tls.Conn); ok {
				c = t.NetConn()
			}
			g, _ := c.(*guest)
			return context.WithValue(ctx, guestKey{}, g)
		},
	}
	return s, nil
}

type guestKey struct{}

// guestOf gives the connection of a request; nil: it has not come by the door.
func guestOf(r *http.Request) *guest {
	g, _ := r.Context().Value(guestKey{}).(*guest)
	return g
}

// Serve answers on a listener until Close (nil) or until the listener fails. It may
// run several times at once.
func (s *Server) Serve(l net.Listener) error {
	err := s.http.Serve(tls.NewListener(s.door.at(l), s.identity.server(s.backend.Self)))
	if errors.Is(err, http.ErrServerClosed) || errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}

// Close ends what is served, at the latest when ctx does.
func (s *Server) Close(ctx context.Context) {
	s.endOnce.Do(func() { close(s.ended) })
	if s.http.Shutdown(ctx) != nil {
		_ = s.http.Close()
	}
	s.peersMu.Lock()
	defer s.peersMu.Unlock()
	for _, c := range s.peers {
		c.Close()
	}
}

// Refused is how many connections the limits have ended.
func (s *Server) Refused() uint64 { return s.door.refused.Load() }

// problem is an answer that is an error.
type problem struct {
	code int
	error
}

func (s *Server) handler() http.Handler {
	serve := map[string]func(http.ResponseWriter, *http.Request) (any, error){
		"health": s.health, "status": s.status, "cluster": s.askCluster, "findings": s.findings, "offered": s.offered, "examination": s.examination, "examine": s.examine, "which": s.which, "events": s.events,
		"logs": s.logs, "boot": s.boot, "capture": s.capture, "metrics": s.metrics, "live": s.live,
		"drain": s.order(atOnce(s.backend.Drain)), "resume": s.order(atOnce(s.backend.Resume)), "reboot": s.order(s.backend.Reboot), "policy": s.policy, "setPolicy": s.setPolicy,
	}
	serve["page"] = func(w http.ResponseWriter, r *http.Request) (any, error) {
		dashboard.Serve(w, r)
		return nil, nil
	}
	serve["root"] = func(w http.ResponseWriter, r *http.Request) (any, error) {
		http.Redirect(w, r, dashboard.Root, http.StatusFound)
		return nil, nil
	}
	byPath := map[string][]Route{"/": {{Method: "GET", Path: "/", Name: "root", Role: RoleReadOnly}}}
	for _, p := range dashboard.Paths() {
		byPath[p] = []Route{{Method: "GET", Path: p, Name: "page", Role: RoleReadOnly}}
	}
	for _, r := range Routes {
		byPath[r.Path] = append(byPath[r.Path], r)
	}
	return http.HandlerFunc(func(plain http.ResponseWriter, r *http.Request) {
		// It knows only net/http's own writer, which then does not wait for the rest.
		r.Body = http.MaxBytesReader(plain, r.Body, mostBody)
		w, name := &coded{plain, http.StatusOK}, "none"
		defer func() { s.limits.Asked(name, w.code) }()
		answer, err := func() (any, error) {
			route, err := s.admit(w, r, byPath)
			if err != nil {
				return nil, err
			}
			name = route.Name
			if route.OfNode {
				if done, err := s.forward(w, r, route); done || err != nil {
					return nil, err
				}
			}
			return serve[route.Name](w, r)
		}()
		var p problem
		switch {
		case errors.As(err, &p):
			write(w, p.code, Problem{p.Error()})
		case err != nil:
			write(w, http.StatusInternalServerError, Problem{err.Error()})
		case answer != nil:
			code := http.StatusOK
			if h, ok := answer.(Health); ok && !h.OK {
				code = http.StatusServiceUnavailable
			}
			write(w, code, answer)
		}
	})
}

// refuseAfter is how long a connection waits of which too many requests have come.
const refuseAfter = 100 * time.Millisecond

// coded remembers the code of an answer.
type coded struct {
	http.ResponseWriter
	code int
}

func (c *coded) WriteHeader(code int) {
	c.code = code
	c.ResponseWriter.WriteHeader(code)
}

// Unwrap is for http.ResponseController.
func (c *coded) Unwrap() http.ResponseWriter { return c.ResponseWriter }

// admit finds the route of a request that may be answered.
func (s *Server) admit(w http.ResponseWriter, r *http.Request, byPath map[string][]Route) (Route, error) {
	w.Header().Set("Cache-Control", "no-store")
	w.Header().Set("X-Content-Type-Options", "nosniff")
	role := s.roleOf(r)
	if role == "" {
		w.Header().Set("Connection", "close") // the place is for those who have one
	} else if g := guestOf(r); g != nil {
		if !g.known(role, r.TLS.PeerCertificates[0]) {
			w.Header().Set("Connection", "close")
			return Route{}, problem{http.StatusServiceUnavailable, errors.New("too many clients are connected")}
		}
		if !g.asks() {
			// To refuse costs something, too.
			select {
			case <-r.Context().Done():
			case <-time.After(refuseAfter):
			}
			w.Header().Set("Retry-After", "1")
			return Route{}, problem{http.StatusTooManyRequests, errors.New("too many requests")}
		}
	}
	if r.ContentLength > mostBody {
		w.Header().Set("Connection", "close")
		return Route{}, problem{http.StatusRequestEntityTooLarge, fmt.Errorf("the body is longer than %d bytes", mostBody)}
	}
	routes := byPath[r.URL.Path]
	i := slices.IndexFunc(routes, func(x Route) bool { return x.Method == r.Method })
	// A stranger is not told what there is.
	if role == "" && (i < 0 || routes[i].Role != "") {
		return Route{}, problem{http.StatusUnauthorized, errors.New("a certificate of this cluster is needed")}
	}
	switch {
	case len(routes) == 0:
		return Route{}, problem{http.StatusNotFound, fmt.Errorf("there is no %s here", clip(r.URL.Path))}
	case i < 0:
		var methods []string
		for _, x := range routes {
			methods = append(methods, x.Method)
		}
		w.Header().Set("Allow", strings.Join(methods, ", "))
		return Route{}, problem{http.StatusMethodNotAllowed, fmt.Errorf("%s takes %s", clip(r.URL.Path), strings.Join(methods, " and "))}
	case routes[i].Role != "" && !role.allows(routes[i].Role):
		return Route{}, problem{http.StatusForbidden, fmt.Errorf("this certificate is for role %s, and %s %s needs %s", role, r.Method, routes[i].Path, routes[i].Role)}
	}
	// A browser shows its certificate also when another site has it ask.
	if err := http.NewCrossOriginProtection().Check(r); err != nil {
		return Route{}, problem{http.StatusForbidden, err}
	}
	if _, err := url.ParseQuery(r.URL.RawQuery); err != nil {
		return Route{}, problem{http.StatusBadRequest, fmt.Errorf("the query cannot be read: %w", err)}
	}
	return routes[i], nil
}

// roleOf gives the role of whoever asks. That the chain ends in this cluster's
// authority the handshake has made sure of.
func (s *Server) roleOf(r *http.Request) Role {
	if r.TLS == nil || len(r.TLS.VerifiedChains) == 0 {
		return ""
	}
	leaf := r.TLS.PeerCertificates[0]
	// A connection may outlive what opened it.
	if time.Now().After(leaf.NotAfter) {
		return ""
	}
	return roleOf(leaf)
}

func who(r *http.Request) string {
	if r.TLS == nil || len(r.TLS.PeerCertificates) == 0 {
		return ""
	}
	name := r.TLS.PeerCertificates[0].Subject.CommonName
	if roleOf(r.TLS.PeerCertificates[0]) == RoleNode {
		if behalf := r.Header.Get(onBehalf); behalf != "" {
			return clip(behalf) + " by way of " + name
		}
	}
	return clip(name)
}

// onBehalf is the header in which a node says for whom it asks another one.
const onBehalf = "Clonecluster-On-Behalf"

func write(w http.ResponseWriter, code int, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	enc := json.NewEncoder(w)
	enc.SetIndent("", "  ")
	_ = enc.Encode(v)
}

func (s *Server) health(http.ResponseWriter, *http.Request) (any, error) {
	return s.backend.Health(), nil
}

func (s *Server) status(http.ResponseWriter, *http.Request) (any, error) {
	return s.backend.Status(), nil
}

func (s *Server) examination(http.ResponseWriter, *http.Request) (any, error) {
	return s.backend.Examination(), nil
}

func (s *Server) examine(_ http.ResponseWriter, r *http.Request) (any, error) {
	burst, err := ParseBurst(r.URL.Query().Get("burst"))
	if err != nil {
		return nil, problem{http.StatusBadRequest, err}
	}
	switch err := s.backend.Examine(burst, who(r)); {
	case errors.Is(err, doctor.ErrExamining):
		return nil, problem{http.StatusConflict, err}
	case err != nil:
		return nil, err
	}
	return s.backend.Examination(), nil
}

func (s *Server) metrics(w http.ResponseWriter, r *http.Request) (any, error) {
	var page bytes.Buffer
	mediaType, err := s.backend.Metrics(&page, r.Header)
	if err != nil {
		return nil, err
	}
	w.Header().Set("Content-Type", mediaType)
	_, _ = w.Write(page.Bytes()) // or the client has gone
	return nil, nil
}

func (s *Server) offered(http.ResponseWriter, *http.Request) (any, error) {
	return s.backend.Offered(), nil
}

func (s *Server) boot(_ http.ResponseWriter, r *http.Request) (any, error) {
	b, err := s.backend.Boot(r.Context())
	if errors.Is(err, ErrNoBoot) {
		return nil, problem{http.StatusNotFound, err}
	} else if err != nil {
		return nil, problem{http.StatusBadGateway, err}
	}
	return b, nil
}

// atOnce is an order that cannot fail.
func atOnce(do func(context.Context, Order, string)) func(context.Context, Order, string) error {
	return func(ctx context.Context, o Order, who string) error {
		do(ctx, o, who)
		return nil
	}
}

func (s *Server) order(do func(context.Context, Order, string) error) func(http.ResponseWriter, *http.Request) (any, error) {
	return func(_ http.ResponseWriter, r *http.Request) (any, error) {
		o, err := ParseOrder(r.Body)
		if err != nil {
			return nil, badBody(err)
		}
		switch err := do(r.Context(), o, who(r)); {
		case errors.Is(err, ErrNoBoot):
			return nil, problem{http.StatusNotFound, err}
		case errors.Is(err, ErrEnding):
			return nil, problem{http.StatusConflict, err}
		case err != nil:
			return nil, problem{http.StatusBadGateway, err}
		}
		return s.backend.Status(), nil
	}
}

// badBody says what is wrong with the body of a request.
func badBody(err error) error {
	if errors.As(err, new(*http.MaxBytesError)) {
		return problem{http.StatusRequestEntityTooLarge, err}
	}
	return problem{http.StatusBadRequest, err}
}

func (s *Server) policy(http.ResponseWriter, *http.Request) (any, error) {
	return s.backend.Policy(), nil
}

func (s *Server) setPolicy(_ http.ResponseWriter, r *http.Request) (any, error) {
	o, err := ParsePolicyOrder(r.Body)
	if err != nil {
		return nil, badBody(err)
	}
	ctx, cancel := context.WithTimeout(r.Context(), s.limits.Ask)
	defer cancel()
	p, err := s.backend.SetPolicy(ctx, o, who(r))
	switch {
	case errors.Is(err, ErrOrder):
		return nil, problem{http.StatusBadRequest, err}
	case err != nil:
		return nil, problem{http.StatusBadGateway, err}
	}
	return p, nil
}

// Find gives the one node that is meant by its id, by the end of it, or by its
// host's name.
func Find(name string, nodes []Peer) (Peer, error) {
	name = strings.ToLower(name)
	var found, ends []Peer
	for _, n := range nodes {
		switch {
		case n.Node == name:
			return n, nil
		case n.Name != "" && strings.EqualFold(n.Name, name):
			found = append(found, n)
		case len(name) >= 2 && (strings.HasSuffix(n.Node, name) || strings.HasSuffix(strings.ReplaceAll(n.Node, ":", ""), name)):
			ends = append(ends, n)
		}
	}
	if len(found) == 0 {
		found = ends
	}
	if len(found) == 1 {
		return found[0], nil
	}
	var all []string
	for _, n := range nodes {
		all = append(all, strings.TrimSpace(n.Node+" "+n.Name))
	}
	if len(found) > 1 {
		return Peer{}, fmt.Errorf("several nodes are meant by %q; say more of one of: %s", clip(name), strings.Join(all, ", "))
	}
	return Peer{}, fmt.Errorf("no node is meant by %q; there are: %s", clip(name), strings.Join(all, ", "))
}

// forward asks another node, if one is meant.
func (s *Server) forward(w http.ResponseWriter, r *http.Request, route Route) (done bool, err error) {
	query := r.URL.Query()
	name := query.Get("node")
	if name == "" {
		return false, nil
	}
	id, host := s.backend.Self()
	peer, err := Find(name, append([]Peer{{Node: id, Name: host}}, s.backend.Peers()...))
	switch {
	case err != nil:
		return false, problem{http.StatusNotFound, err}
	case peer.Node == id:
		return false, nil
	case s.roleOf(r) == RoleNode: // asked on behalf of somebody: once is enough
		return false, problem{http.StatusNotFound, fmt.Errorf("this is node %s and not %s", id, peer.Node)}
	}
	c, err := s.peer(peer, s.roleOf(r))
	if err != nil {
		return false, problem{http.StatusBadGateway, err}
	}
	query.Del("node")
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return false, problem{http.StatusRequestEntityTooLarge, err}
	}
	header := http.Header{onBehalf: {who(r)}}
	for _, h := range []string{"Accept", "Last-Event-Id"} {
		if v := r.Header.Get(h); v != "" {
			header.Set(h, v)
		}
	}
	streams := route.Streams || route.Events != nil && follows(r)
	ctx := r.Context()
	if !streams {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, s.limits.Ask)
		defer cancel()
	} else if leave, err := s.door.stream(guestOf(r)); err != nil {
		return false, err
	} else {
		defer leave()
		var cancel func()
		ctx, cancel = s.untilEnd(ctx)
		defer cancel()
	}
	resp, err := c.raw(ctx, r.Method, route.Path, query, body, header)
	if err != nil {
		return false, problem{http.StatusBadGateway, fmt.Errorf("node %s does not answer: %w", peer.Node, err)}
	}
	defer resp.Body.Close()
	w.Header().Set("Content-Type", resp.Header.Get("Content-Type"))
	w.WriteHeader(resp.StatusCode)
	if pass(w, resp.Body, s.limits.Answer) != nil {
		breakOff()
	}
	return true, nil
}

// pass hands on what comes as it comes, until its end.
func pass(w http.ResponseWriter, r io.Reader, patience time.Duration) error {
	control := http.NewResponseController(w)
	buf := make([]byte, 16<<10)
	for {
		n, err := r.Read(buf)
		_ = control.SetWriteDeadline(time.Now().Add(patience))
		if _, werr := w.Write(buf[:n]); werr != nil {
			return werr
		}
		switch ferr := control.Flush(); {
		case errors.Is(err, io.EOF):
			return ferr
		case err != nil:
			return err
		case ferr != nil:
			return ferr
		}
	}
}

// asked is a node and the role for which it is asked.
type asked struct {
	node string
	role Role
}

// peer gives the client for a node, with a connection that stays for a while. For those
// who may only look nodes are asked as by one who may only look, apart from what
// they ask for others and of themselves, and with few new connections.
func (s *Server) peer(p Peer, behalf Role) (*Client, error) {
	if p.Gone != "" {
		return nil, errors.New(p.Gone)
	}
	if len(p.Addresses) == 0 {
		return nil, fmt.Errorf("node %s has not said where it is reached", p.Node)
	}
	who := asked{p.Node, RoleNode}
	if behalf == RoleReadOnly {
		who.role = behalf
	}
	s.peersMu.Lock()
	defer s.peersMu.Unlock()
	c := s.peers[who]
	if c == nil {
		id, host := s.backend.Self()
		conf, err := s.identity.client(id, host, who.role)
		if err != nil {
			return nil, err
		}
		if len(s.peers) >= 1024 { // of many ids over the years
			for _, old := range s.peers {
				old.Close()
			}
			clear(s.peers)
		}
		c = NewClient(ofNode(conf, p.Node))
		if who.role == RoleReadOnly {
			c.Dial = sparingly(s.limits.NewPerSecond / 10)
		}
		s.peers[who] = c
	}
	c.SetAddresses(p.Addresses...)
	return c, nil
}

// sparingly dials each address so many times a second at most, of what its door lets in
// of this node.
func sparingly(rate float64) func(ctx context.Context, network, address string) (net.Conn, error) {
	var mu sync.Mutex
	dials := map[string]*bucket{}
	take := func(address string) bool {
		mu.Lock()
		defer mu.Unlock()
		b := dials[address]
		if b == nil {
			if len(dials) >= 64 { // it had many over the years
				clear(dials)
			}
			b = &bucket{}
			dials[address] = b
		}
		return b.take(time.Now(), rate, rate)
	}
	return func(ctx context.Context, network, address string) (net.Conn, error) {
		if !take(address) {
			return nil, errors.New("too many new connections for read-only clients")
		}
		return (&net.Dialer{}).DialContext(ctx, network, address)
	}
}

// clusterFor is how long one answer of all nodes serves all who ask.
const clusterFor = 300 * time.Millisecond

func (s *Server) askCluster(_ http.ResponseWriter, r *http.Request) (any, error) {
	return s.ofAll(r.Context()), nil
}

func (s *Server) findings(_ http.ResponseWriter, r *http.Request) (any, error) {
	c := s.ofAll(r.Context())
	f := Findings{Cluster: c.Cluster, Time: c.Time, Asked: c.Asked, Findings: []finding.Finding{}, Silent: []NodeReport{}}
	for _, n := range c.Nodes {
		switch {
		case n.Status != nil:
			f.Findings = append(f.Findings, n.Status.Findings...)
		case !n.Gone:
			f.Silent = append(f.Silent, n)
		}
	}
	slices.SortStableFunc(f.Findings, finding.Compare)
	return f, nil
}

// ofAll gives the status of all nodes.
func (s *Server) ofAll(ctx context.Context) Cluster {
	s.clusterMu.Lock()
	defer s.clusterMu.Unlock()
	if time.Since(s.clusterAt) < clusterFor {
		return s.cluster
	}
	own := s.backend.Status()
	id, host := s.backend.Self()
	c := Cluster{Cluster: own.Cluster, Time: time.Now(), Asked: id}
	c.Nodes = []NodeReport{{Node: id, Name: host, Addresses: own.Addresses, Status: &own}}
	peers := s.backend.Peers()
	reports := make([]NodeReport, len(peers))
	// It is for all who wait here, and not only for who came first.
	s.askAll(context.WithoutCancel(ctx), peers, RoleNode, func(ctx context.Context, i int, client *Client, err error) {
		p := peers[i]
		report := NodeReport{Node: p.Node, Name: p.Name, Gone: p.Gone != ""}
		for _, a := range p.Addresses {
			report.Addresses = append(report.Addresses, netip.AddrPortFrom(a.Addr().WithZone(""), a.Port()).String())
		}
		var status Status
		if err == nil {
			err = client.Get(ctx, "/v1/status", nil, &status)
		}
		if err != nil {
			report.Error = err.Error()
		} else {
			report.Status = &status
		}
		reports[i] = report
	})
	c.Nodes = append(c.Nodes, reports...)
	slices.SortFunc(c.Nodes, func(a, b NodeReport) int { return strings.Compare(a.Node, b.Node) })
	s.cluster, s.clusterAt = c, time.Now()
	return c
}

// askedAtOnce is how many nodes are asked at a time.
const askedAtOnce = 32

// askAll asks nodes at the same time for somebody of that role, and returns when all
// have answered or their time is over.
func (s *Server) askAll(ctx context.Context, peers []Peer, behalf Role, ask func(ctx context.Context, i int, c *Client, err error)) {
	ctx, cancel := context.WithTimeout(ctx, s.limits.Ask)
	defer cancel()
	places := make(chan struct{}, askedAtOnce)
	var g sync.WaitGroup
	for i, p := range peers {
		places <- struct{}{}
		g.Go(func() {
			defer func() { <-places }()
			c, err := s.peer(p, behalf)
			ask(ctx, i, c, err)
		})
	}
	g.Wait()
}

func (s *Server) which(_ http.ResponseWriter, r *http.Request) (any, error) {
	q := r.URL.Query()
	f, err := ParseFlow(q.Get("client"), q.Get("port"), q.Get("proto"))
	if err != nil {
		return nil, problem{http.StatusBadRequest, err}
	}
	w, err := s.backend.Which(f)
	if err != nil {
		return nil, problem{http.StatusBadRequest, err}
	}
	id, host := s.backend.Self()
	names := map[string]string{id: host}
	if w.Bucket != nil && q.Get("alone") == "" {
		peers := slices.DeleteFunc(s.backend.Peers(), func(p Peer) bool { return p.Gone != "" })
		said := make([]WhichNode, len(peers))
		query := f.Values()
		query.Set("alone", "1")
		guestOf(r).owes(len(peers))
		s.askAll(r.Context(), peers, s.roleOf(r), func(ctx context.Context, i int, c *Client, err error) {
			said[i] = WhichNode{Node: peers[i].Node, Name: peers[i].Name}
			var theirs Which
			if err == nil {
				err = c.Get(ctx, "/v1/which", query, &theirs)
			}
			switch {
			case err != nil:
				said[i].Error = err.Error()
			case theirs.Bucket == nil || *theirs.Bucket != *w.Bucket || len(theirs.Nodes) != 1:
				said[i].Error = "it goes by other rules"
			default:
				said[i] = theirs.Nodes[0]
			}
		})
		w.Nodes = append(w.Nodes, said...)
	}
	for _, n := range w.Nodes {
		if n.Name != "" {
			names[n.Node] = n.Name
		}
		if n.Socket {
			w.Holder = n.Node
		}
	}
	slices.SortFunc(w.Nodes, func(a, b WhichNode) int { return strings.Compare(a.Node, b.Node) })
	w.Why = w.explain(names)
	return w, nil
}
