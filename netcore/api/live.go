package api

import (
	"context"
	"errors"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

// Live is the cluster at one time, as the node that is asked sees it: the answer to
// GET /v1/live, and what follows there twice a second and whenever something happens.
type Live struct {
	Cluster  string     `json:"cluster"`
	VIP      []string   `json:"vip"`
	CloneMAC string     `json:"clone_mac"`
	Policy   string     `json:"policy"`
	Time     time.Time  `json:"time"`
	Asked    string     `json:"asked"` // the node that answers for all, by wire MAC
	Role     Role       `json:"role"`  // of who asks
	Leader   string     `json:"leader"`
	Map      uint64     `json:"map"`
	Agreed   bool       `json:"agreed"`
	FailOpen bool       `json:"fail_open"`
	Nodes    []LiveNode `json:"nodes"` // in the order of their ids
	// Owners are left out when they are as in the message before.
	Owners *Owners `json:"owners,omitempty"`
	// Events are those of all nodes that are new, each node's in order: at first the
	// last 200. Two nodes that saw the same tell it twice. Their ids are not those of
	// GET /v1/events.
	Events []Event `json:"events,omitempty"`
}

// LiveNode is one node in Live. What it is and has comes from its beacons, and so is
// never older than the detection time.
type LiveNode struct {
	Node    string  `json:"node"` // wire MAC
	Name    string  `json:"name,omitempty"`
	State   string  `json:"state"`
	Live    bool    `json:"live"`           // it and the node that is asked hear each other
	Gone    string  `json:"gone,omitempty"` // it was there in the last ten minutes: since when not, and why
	Unwell  bool    `json:"unwell,omitempty"`
	Weight  int     `json:"weight"`
	Busy    float64 `json:"busy"` // share of the processors, 0 to 1
	Flows   int     `json:"flows"`
	Buckets int     `json:"buckets"` // of 1024, by the map
	// Said is what the node says itself, without its view of the others (members,
	// nodes, heard); left out when it is as in the message before.
	Said  *Status `json:"said,omitempty"`
	Error string  `json:"error,omitempty"` // why it says nothing now
	// Boot is how an appliance came up; left out as Said is.
	Boot *Boot `json:"boot,omitempty"`
}

// Owners is the map: which node takes the new connections of each bucket.
type Owners struct {
	Map   uint64   `json:"map"`   // its version
	Nodes []string `json:"nodes"` // by wire MAC
	// Buckets has one byte for each of the 1024: the place in Nodes, from 0, of its
	// owner; 255 for nobody.
	Buckets []byte `json:"buckets"`
}

const (
	liveInterval = 500 * time.Millisecond
	// liveSpacing is the least time between two looks, however much happens.
	liveSpacing = 100 * time.Millisecond
	// Each node is asked so often, and the more there are, the less often.
	liveAsk        = time.Second
	liveAskPerNode = 20 * time.Millisecond
	// mostNews is how many events of the past somebody is told who comes.
	mostNews = 200
)

// watch gathers what the cluster does, while somebody looks, for all who look.
type watch struct {
	server  *Server
	viewers int // by Server.watchMu
	cancel  context.CancelFunc
	running sync.WaitGroup
	events  *Record[Event]

	mu     sync.Mutex
	more   chan struct{} // closed and replaced with each look
	seq    uint64        // of looks
	now    Live
	owners *Owners
	heard  map[string]*hearsay
}

// hearsay is what a node has said of itself.
type hearsay struct {
	asking bool
	asked  uint64 // the look that first has what came of asking once; 0: that has not come
	due    time.Time
	said   *Status
	saidAt uint64 // the look that had it first
	err    string
	run    string // of its events, and the last one that is known
	last   uint64
	boot   *Boot // nil also for an ordinary host, once booted is set
	bootAt uint64
	booted bool
}

// watch joins those who look. It begins with the first, who is charged for what is asked
// then, and ends with the last.
func (s *Server) watch(g *guest) (w *watch, leave func()) {
	s.watchMu.Lock()
	defer s.watchMu.Unlock()
	if s.watching == nil {
		g.owes(3 * len(s.backend.Peers()))
		ctx, cancel := context.WithCancel(context.Background())
		w := &watch{server: s, cancel: cancel, events: NewEvents(), more: make(chan struct{}), heard: map[string]*hearsay{}}
		w.running.Go(func() { w.run(ctx) })
		s.watching = w
	}
	w = s.watching
	w.viewers++
	return w, func() {
		s.watchMu.Lock()
		w.viewers--
		last := w.viewers == 0
		if last {
			s.watching = nil
		}
		s.watchMu.Unlock()
		if last {
			w.cancel()
			w.running.Wait()
		}
	}
}

func (w *watch) run(ctx context.Context) {
	record := w.server.backend.Events()
	var last uint64
	for {
		events, _, more := record.After(last)
		for _, e := range events {
			last = e.ID
			w.events.Add(e)
		}
		w.ask(ctx, w.look())
		next := time.NewTimer(liveInterval)
		select {
		case <-ctx.Done():
		case <-next.C:
		case <-more:
			select {
			case <-ctx.Done():
			case <-time.After(liveSpacing):
			}
		}
		next.Stop()
		if ctx.Err() != nil {
			return
		}
	}
}

// look takes a picture and shows it. It gives the other nodes.
func (w *watch) look() []Peer {
	b := w.server.backend
	own, peers := b.Status(), b.Peers()
	w.mu.Lock()
	defer w.mu.Unlock()
	w.seq++
	l := Live{
		Cluster: own.Cluster, VIP: own.VIP, CloneMAC: own.CloneMAC, Policy: own.Policy, Time: time.Now(), Asked: own.WireMAC,
		Leader: own.Leader, Map: own.Map, Agreed: own.Agreed, FailOpen: own.FailOpen,
	}
	if w.owners == nil || w.owners.Map != own.Map || w.now.Leader != l.Leader {
		o := b.Owners()
		w.owners = &o
	}
	for _, m := range own.Members {
		l.Nodes = append(l.Nodes, LiveNode{
			Node: m.Node, Name: m.Name, State: m.State, Live: m.Live, Unwell: m.Unwell, Weight: m.Weight, Busy: m.Busy, Flows: m.Flows, Buckets: m.Buckets,
		})
	}
	for _, p := range peers {
		if p.Gone != "" {
			l.Nodes = append(l.Nodes, LiveNode{Node: p.Node, Name: p.Name, State: "gone", Gone: p.Gone})
		}
	}
	slices.SortFunc(l.Nodes, func(a, b LiveNode) int { return strings.Compare(a.Node, b.Node) })
	h := w.of(own.WireMAC)
	h.said, h.saidAt = alone(own), w.seq
	for _, n := range l.Nodes {
		if n.Gone != "" { // what it said is no longer so
			delete(w.heard, n.Node)
		}
	}
	w.now = l
	close(w.more)
	w.more = make(chan struct{})
	return peers
}

// alone leaves out what Live has once for all.
func alone(s Status) *Status {
	s.Members, s.Nodes, s.Heard = []Member{}, []string{}, []string{}
	return &s
}

// of gives what a node has said; w.mu is held.
func (w *watch) of(node string) *hearsay {
	h := w.heard[node]
	if h == nil {
		h = &hearsay{}
		w.heard[node] = h
	}
	return h
}

// ask has the nodes asked of which news are due, and does not wait for them: one that
// does not answer holds nobody up.
func (w *watch) ask(ctx context.Context, peers []Peer) {
	id, _ := w.server.backend.Self()
	now, again := time.Now(), max(liveAsk, time.Duration(len(peers))*liveAskPerNode)
	w.mu.Lock()
	defer w.mu.Unlock()
	asking := 0
	for _, h := range w.heard {
		if h.asking {
			asking++
		}
	}
	for _, p := range append([]Peer{{Node: id}}, peers...) {
		h := w.of(p.Node)
		if p.Gone != "" || h.asking || now.Before(h.due) || asking >= askedAtOnce || p.Node == id && h.booted {
			continue
		}
		asking++
		h.asking, h.due = true, now.Add(again)
		w.running.Go(func() {
			ctx, cancel := context.WithTimeout(ctx, w.server.limits.Ask)
			defer cancel()
			if p.Node == id {
				boot, err := w.server.backend.Boot(ctx)
				w.told(h, func() { h.keepBoot(w.seq, boot, err, errors.Is(err, ErrNoBoot)) })
				return
			}
			err := w.askPeer(ctx, p, h)
			w.told(h, func() {
				if h.err = ""; err != nil {
					h.err = err.Error()
				}
			})
		})
	}
}

// told notes what came of asking.
func (w *watch) told(h *hearsay, note func()) {
	w.mu.Lock()
	defer w.mu.Unlock()
	note()
	h.asking = false
	if h.asked == 0 {
		h.asked = w.seq + 1
	}
}

// askPeer asks another node for its status, its events and its boot. Only the
// goroutine that asks changes run and last.
func (w *watch) askPeer(ctx context.Context, p Peer, h *hearsay) error {
	c, err := w.server.peer(p, RoleNode)
	if err != nil {
		return err
	}
	var status Status
	if err := c.Get(ctx, "/v1/status", nil, &status); err != nil {
		return err
	}
	var news Events
	for range 2 {
		news = Events{}
		if err := c.Get(ctx, "/v1/events", url.Values{"since": {strconv.FormatUint(h.last, 10)}}, &news); err != nil {
			return err
		}
		if news.Run == h.run || h.last == 0 {
			break
		}
		h.last = 0 // its engine has started again, and counts anew
	}
	again := news.Run != h.run
	h.run = news.Run
	for _, e := range news.Events {
		h.last = e.ID
		w.events.Add(e)
	}
	w.mu.Lock()
	h.said, h.saidAt = alone(status), w.seq+1
	h.booted = h.booted && !again
	booted := h.booted
	w.mu.Unlock()
	if booted {
		return nil
	}
	var boot Boot
	err = c.Get(ctx, "/v1/boot", nil, &boot)
	refused := new(Error)
	w.mu.Lock()
	defer w.mu.Unlock()
	h.keepBoot(w.seq, boot, err, errors.As(err, &refused) && refused.Code == http.StatusNotFound)
	return nil
}

// keepBoot keeps a boot; once the node is ready, or is an ordinary host, that is all.
func (h *hearsay) keepBoot(seq uint64, boot Boot, err error, none bool) {
	if err == nil {
		h.boot, h.bootAt = &boot, seq+1
	}
	h.booted = none || err == nil && boot.Ready
}

// seen is what somebody who looks has been told.
type seen struct {
	look  uint64
	event uint64
	owner *Owners
}

// since gives what is new, unless nothing is.
func (w *watch) since(s *seen, role Role) (l Live, ok bool, more <-chan struct{}) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.seq == s.look {
		return l, false, w.more
	}
	l = w.now
	l.Role = role
	l.Nodes = slices.Clone(l.Nodes)
	for i := range l.Nodes {
		n := &l.Nodes[i]
		h := w.heard[n.Node]
		if h == nil {
			continue
		}
		n.Error = h.err
		if h.said != nil && h.saidAt > s.look && h.saidAt <= w.seq {
			n.Said = h.said
		}
		if h.boot != nil && h.bootAt > s.look && h.bootAt <= w.seq {
			n.Boot = h.boot
		}
	}
	if s.owner != w.owners {
		l.Owners = w.owners
	}
	events, _, _ := w.events.After(s.event)
	if s.event == 0 {
		events = events[max(0, len(events)-mostNews):]
	}
	if n := len(events); n > 0 {
		s.event = events[n-1].ID
	}
	l.Events, s.owner, s.look = events, w.owners, w.seq
	return l, true, w.more
}

// complete reports whether all have been asked once, and have answered or failed to; if
// not, more is closed when it may be so.
func (w *watch) complete() (ok bool, more <-chan struct{}) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, n := range w.now.Nodes {
		if h := w.heard[n.Node]; n.Gone == "" && (h == nil || h.asked == 0 || h.asked > w.seq) {
			return false, w.more
		}
	}
	return w.seq > 0, w.more
}

func (s *Server) live(w http.ResponseWriter, r *http.Request) (any, error) {
	role, had := s.roleOf(r), seen{}
	if !follows(r) {
		free, err := s.door.stream(guestOf(r))
		if err != nil {
			return nil, err
		}
		defer free()
		all, leave := s.watch(guestOf(r))
		defer leave()
		// Many nodes that do not answer are not waited for one after the other.
		enough := time.NewTimer(s.limits.Ask + time.Second)
		defer enough.Stop()
		over := false
		for {
			ok, more := all.complete()
			if ok || over {
				l, _, _ := all.since(&had, role)
				return l, nil
			}
			select {
			case <-r.Context().Done():
				return nil, r.Context().Err()
			case <-s.ended:
				return nil, problem{http.StatusServiceUnavailable, errEnds}
			case <-enough.C:
				over = true
			case <-more:
			}
		}
	}
	var all *watch
	leave := func() {}
	defer func() { leave() }()
	next := func(uint64) ([]Live, uint64, <-chan struct{}, error) {
		if all == nil { // not before there is a place for one more who follows
			all, leave = s.watch(guestOf(r))
		}
		l, ok, more := all.since(&had, role)
		if !ok {
			return nil, 0, more, nil
		}
		return []Live{l}, 0, more, nil
	}
	return nil, follow(s, w, r, "look", 0, next, func(Live) bool { return true }, func(Live) (uint64, string) { return had.look, "live" })
}
