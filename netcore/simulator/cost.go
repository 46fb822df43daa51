package simulator

import (
	"bytes"
	"cmp"
	"context"
	"fmt"
	"math"
	"math/rand/v2"
	"runtime"
	"slices"
	"sort"
	"time"

	"golang.org/x/sys/unix"

	"clonecluster/netcore/filter"
	"clonecluster/netcore/membership"
)

// Cost is what membership takes in a cluster of one size with one profile. The
// times and bytes are of a simulated segment, and the same at every run; CPU, Change
// and Memory are of the machine that it ran on.
type Cost struct {
	Nodes    int
	Profile  Profile
	Trials   int     // deaths, and as many joins
	Detect   Spread  // from a node's death to the map without it
	Recover  Spread  // from a node's death until every bucket has an accepting owner
	Join     Spread  // from a node's start until all go by a map with it, and every bucket has an accepting owner
	Gap      Spread  // how long, in a join, some bucket has no accepting owner
	Beacon   int     // longest, bytes on the wire
	SentRate float64 // bytes a second on the wire, of one node in quiet
	Burst    int     // most beacons that the segment carries within a millisecond, in quiet
	JoinMaps int     // bytes of maps on the wire in a join, at most
	// CPU is the time of the protocol in one node, in millionths of a core: the
	// steps of its machine, and reading and writing beacons. System calls are not
	// in it.
	CPU float64
	// Change is the processor time that a death takes from each of the others, on
	// top of that.
	Change time.Duration
	Memory int // bytes that one node's machine keeps
}

// Profile is a set of times that goes by a name in the configuration.
type Profile struct {
	Name string
	membership.Params
}

// Profiles are those that costs are measured for.
func Profiles() []Profile {
	return []Profile{
		{"normal", membership.Detect(300 * time.Millisecond)},
		{"fast", membership.Detect(150 * time.Millisecond)},
	}
}

// CostSizes are the numbers of nodes that costs are measured for.
func CostSizes() []int { return []int{2, 3, 4, 8, 16, 32, 64, 128, membership.MaxNodes} }

// Spread is a distribution, by nearest rank.
type Spread struct{ P50, P99, Max time.Duration }

func spread(all []int64) Spread {
	slices.Sort(all)
	at := func(p float64) time.Duration { return time.Duration(all[int(math.Ceil(p*float64(len(all))))-1]) }
	return Spread{at(0.5), at(0.99), at(1)}
}

// trials is how often a node dies and joins: fewer in large clusters, where what
// has to be simulated grows with more than the square of their size.
func trials(nodes int) int { return max(1, min(100, 80_000/(nodes*nodes))) }

// MeasureCosts measures every size with every profile, by size. The error is that
// of ctx, or tells that a segment did not come to rest. Progress, if not nil, is
// told what comes next.
func MeasureCosts(ctx context.Context, sizes []int, progress func(nodes int, profile string)) ([]Cost, error) {
	var costs []Cost
	for _, n := range sizes {
		for _, p := range Profiles() {
			if progress != nil {
				progress(n, p.Name)
			}
			c, err := measureCost(ctx, n, p)
			if err != nil {
				return nil, fmt.Errorf("measuring %d nodes, %s: %w", n, p.Name, err)
			}
			costs = append(costs, c)
		}
	}
	return costs, nil
}

// quietIntervals is how long the quiet segment is looked at: longer where little
// happens in an interval.
func quietIntervals(nodes int) int64 { return int64(max(6, 1000/nodes)) }

func measureCost(ctx context.Context, nodes int, p Profile) (Cost, error) {
	c := Cost{Nodes: nodes, Profile: p, Trials: trials(nodes)}
	s := newSegment(ctx, nodes, p.Params)
	if err := s.start(); err != nil {
		return c, err
	}
	if err := s.quiet(&c); err != nil {
		return c, err
	}
	var detect, recovered, join, gap []int64
	victim := s.first
	for range c.Trials {
		d, r, err := s.death(victim)
		if err != nil {
			return c, err
		}
		s.log.of = nil
		j, g, maps, err := s.join(victim)
		if err != nil {
			return c, err
		}
		detect, recovered, join, gap = append(detect, d), append(recovered, r), append(join, j), append(gap, g)
		c.JoinMaps = max(c.JoinMaps, maps)
		victim = s.stations[s.rand.IntN(nodes)]
	}
	c.Detect, c.Recover, c.Join, c.Gap = spread(detect), spread(recovered), spread(join), spread(gap)
	log := s.log
	s = nil // so that no garbage collection goes through it
	log.replay(&c)
	return c, nil
}

// segment is a quiet switch with the nodes at it: nothing is lost, and what a
// node sends arrives everywhere at one time.
type segment struct {
	ctx      context.Context
	params   membership.Params
	rand     *rand.Rand
	codec    *membership.Codec
	now      int64
	stations []*station
	wire     []parcel // under way, by arrival
	first    *station // that dies
	log      recording

	owners    [filter.Buckets]int // that accept new flows
	uncovered int                 // buckets without one
	since     int64               // when uncovered was last 0, or ceased to be
	gap       int64               // the time for which it was not 0
	newest    membership.MapID
	madeAt    int64 // the first map of the trial
	maps      int   // bytes
	adoptedAt int64
	beacons   []sent
	news      []news
}

// sent is a beacon as sent.
type sent struct {
	at    int64
	bytes int
}

// news is something to be counted.
type news struct {
	at    int64
	count func()
}

// station is a node at the segment.
type station struct {
	id      membership.NodeID
	delay   int64 // of what it sends
	on      bool
	boots   int
	machine *membership.Machine
	next    int64
	leased  bool
	table   filter.Table
	accepts [filter.Buckets]bool
	adopted membership.MapID
}

// parcel is an event for one station, or for all but the sender.
type parcel struct {
	at    int64
	from  *station
	to    *station // nil: all
	boots int      // of to
	event membership.Event
	frame []byte // what event was read from; nil: nothing
}

// What stands between two nodes, in nanoseconds: each has its own delay, from the
// decision to send to the other's reading, of this range.
const (
	leastDelay = 50_000
	mostDelay  = 200_000
	// lookUp is how long it takes to look up the kernel's flows.
	lookUp = 1_000_000
	// overhead is what Ethernet adds to a frame on the wire, in bytes: checksum,
	// preamble and gap.
	overhead = 4 + 20
)

func newSegment(ctx context.Context, nodes int, p membership.Params) *segment {
	s := &segment{
		ctx: ctx, params: p, rand: rand.New(rand.NewPCG(uint64(nodes), uint64(p.Dead))), now: int64(time.Second),
		codec: membership.NewCodec("costs", make([]byte, 32)), uncovered: filter.Buckets,
	}
	for i := range nodes {
		st := &station{id: membership.NodeID{0x52, 0x54, 0, 0x77, 0, byte(i + 1)}, delay: leastDelay + s.rand.Int64N(mostDelay-leastDelay)}
		s.stations = append(s.stations, st)
	}
	first := s.rand.IntN(nodes)
	s.first, s.log.of = s.stations[first], s.stations[(first+1)%nodes]
	return s
}

// start boots all and waits until they have shared the buckets. They boot such
// that first the leader has listened for long enough and then all others at once:
// it is not the start that is measured, and one map after the other costs the
// simulation the most.
func (s *segment) start() error {
	type boot struct {
		st  *station
		cfg membership.Config
		at  int64
	}
	var boots []boot
	for i, st := range s.stations {
		cfg := s.config(st)
		enter := s.now + 2*int64(s.params.Dead)
		if i > 0 {
			enter += int64(s.params.Interval)
		}
		boots = append(boots, boot{st, cfg, enter - s.listens(cfg)})
	}
	slices.SortFunc(boots, func(a, b boot) int { return cmp.Compare(a.at, b.at) })
	for _, b := range boots {
		if err := s.run(b.at); err != nil {
			return err
		}
		if s.log.of == b.st {
			s.log.config, s.log.started = b.cfg, s.now
		}
		s.boot(b.st, b.cfg)
	}
	return s.rest(membership.MapID{})
}

func (s *segment) config(st *station) membership.Config {
	return membership.Config{
		Self: membership.Peer{ID: st.id, Incarnation: s.rand.Uint64()}, Params: s.params, Policy: membership.Policy{Moves: 32}, Weight: 100, Rules: 1,
	}
}

// listens is how long a node listens before it takes part, if it is alone.
func (s *segment) listens(cfg membership.Config) int64 {
	at := s.now
	m := membership.New(cfg, at)
	for {
		a := m.Step(membership.Tick{}, at)
		if a.Beacon != nil {
			a = m.Step(membership.Sent{At: at}, at)
		}
		if m.View().State != membership.Listening {
			return at - s.now
		}
		at = a.Next
	}
}

func (s *segment) boot(st *station, cfg membership.Config) {
	st.on, st.adopted = true, membership.MapID{}
	st.boots++
	st.machine = membership.New(cfg, s.now)
	st.table = st.machine.Table()
	s.step(st, membership.Tick{}, nil)
}

// rest runs until all nodes go by one map newer than that, and every bucket has an
// owner, and then for a while, in case that is not the end of it.
func (s *segment) rest(than membership.MapID) error {
	interval := int64(s.params.Interval)
	limit := s.now + 60*int64(s.params.Dead)
	for last := s.now; s.now-last < interval/2; {
		if err := s.run(s.now + interval/8); err != nil {
			return err
		}
		if s.newest == than || !s.settled() {
			last = s.now
		}
		if s.now > limit {
			return fmt.Errorf("no rest after %v", 60*s.params.Dead)
		}
	}
	return nil
}

func (s *segment) settled() bool {
	for _, st := range s.stations {
		if st.on && st.adopted != s.newest {
			return false
		}
	}
	return s.uncovered == 0
}

// quiet measures what the segment carries when nothing happens, and notes what
// one node hears.
func (s *segment) quiet(c *Cost) error {
	if err := s.run(s.now + int64(s.params.Interval)); err != nil {
		return err
	}
	s.log.from = len(s.log.events)
	s.beacons = nil
	begin := s.now
	if err := s.run(begin + quietIntervals(len(s.stations))*int64(s.params.Interval)); err != nil {
		return err
	}
	s.log.quiet, s.log.to = s.now-begin, len(s.log.events)
	slices.SortFunc(s.beacons, func(a, b sent) int { return cmp.Compare(a.at, b.at) })
	total, first := 0, 0
	for i, b := range s.beacons {
		total += b.bytes
		c.Beacon = max(c.Beacon, b.bytes)
		for b.at-s.beacons[first].at > int64(time.Millisecond) {
			first++
		}
		c.Burst = max(c.Burst, i-first+1)
	}
	c.SentRate = float64(total) / float64(len(s.stations)) / (float64(s.now-begin) / 1e9)
	return nil
}

// death takes a node's power at a random moment.
func (s *segment) death(victim *station) (noticed, recovered int64, err error) {
	quiet := s.now
	if err := s.wait(); err != nil {
		return 0, 0, err
	}
	at, last := s.now, s.newest
	s.madeAt = 0
	victim.on, victim.leased = false, false
	s.cover(victim)
	if err := s.rest(last); err != nil {
		return 0, 0, err
	}
	s.log.change = s.now - quiet
	return s.madeAt - at, s.since - at, nil
}

// join starts a node at a random moment.
func (s *segment) join(st *station) (joined, gap int64, maps int, err error) {
	if err := s.wait(); err != nil {
		return 0, 0, 0, err
	}
	at, last := s.now, s.newest
	s.gap, s.maps = 0, 0
	s.boot(st, s.config(st))
	if err := s.rest(last); err != nil {
		return 0, 0, 0, err
	}
	return max(s.since, s.adoptedAt) - at, s.gap, s.maps, nil
}

// wait lets a random part of an interval pass.
func (s *segment) wait() error { return s.run(s.now + s.rand.Int64N(int64(s.params.Interval))) }

// run lets everything happen up to a time. The error is that of the context.
func (s *segment) run(until int64) error {
	for s.ctx.Err() == nil {
		begin := int64(math.MaxInt64)
		if len(s.wire) > 0 {
			begin = s.wire[0].at
		}
		for _, st := range s.stations {
			if st.on {
				begin = min(begin, st.next)
			}
		}
		if begin > until {
			s.now = until
			return nil
		}
		s.window(max(begin, s.now), until)
	}
	return s.ctx.Err()
}

// window lets happen what is due in less than the least delay, during which no
// node can know what another does. So one node after the other is looked at,
// which keeps a large segment's nodes from pushing each other out of the
// processor's caches.
func (s *segment) window(begin, until int64) {
	end := min(begin+leastDelay-1, until)
	n := sort.Search(len(s.wire), func(i int) bool { return s.wire[i].at > end })
	arrived := s.wire[:n:n]
	s.wire = s.wire[n:]
	for _, st := range s.stations {
		for i := range arrived {
			if p := &arrived[i]; st.on && st != p.from && (p.to == nil || p.to == st && p.boots == st.boots) {
				s.tick(st, begin, p.at)
				s.now = p.at
				s.step(st, p.event, p.frame)
			}
		}
		s.tick(st, begin, end)
	}
	s.now = end
	slices.SortStableFunc(s.news, func(a, b news) int { return cmp.Compare(a.at, b.at) })
	for _, n := range s.news {
		s.now = n.at
		n.count()
	}
	s.now, s.news = end, s.news[:0]
}

// tick gives a node its ticks up to a time.
func (s *segment) tick(st *station, begin, until int64) {
	for st.on && st.next <= until {
		s.now = max(st.next, begin)
		s.step(st, membership.Tick{}, nil)
	}
}

func (s *segment) send(p parcel) {
	i := len(s.wire)
	for i > 0 && s.wire[i-1].at > p.at {
		i--
	}
	s.wire = slices.Insert(s.wire, i, p)
}

// step does what Node does with an event, with the same frames.
func (s *segment) step(st *station, ev membership.Event, frame []byte) {
	if s.log.of == st {
		s.log.add(s.now, ev, frame)
	}
	for ev != nil {
		a := st.machine.Step(ev, s.now)
		ev = nil
		if leased := a.Lease > s.now; a.Table != nil || leased != st.leased {
			if st.leased = leased; a.Table != nil {
				st.table = *a.Table
			}
			s.later(func() { s.cover(st) })
		}
		s.note(st, a.Notes)
		if a.Map != nil {
			s.sendMap(st, &a)
		}
		if a.Beacon != nil {
			s.sendBeacon(st, a.Beacon)
			ev = membership.Sent{At: s.now}
		}
		if a.PollFlows {
			s.send(parcel{at: s.now + lookUp, to: st, boots: st.boots, event: membership.FlowsSeen{Asked: s.now}})
		}
		st.next = a.Next
	}
}

// later counts what has changed when all that came before it has been.
func (s *segment) later(count func()) { s.news = append(s.news, news{s.now, count}) }

func (s *segment) note(st *station, notes []membership.Note) {
	for _, n := range notes {
		switch n.What {
		case membership.NewMap:
			s.later(func() {
				if s.newest.Compare(n.Map) < 0 {
					s.newest = n.Map
				}
				if s.madeAt == 0 {
					s.madeAt = s.now
				}
			})
		case membership.Adopted:
			s.later(func() { st.adopted, s.adoptedAt = n.Map, s.now })
		}
	}
}

func (s *segment) sendMap(st *station, a *membership.Actions) {
	for _, f := range s.codec.Map(a.Map, st.machine.Self(), a.MapSequence) {
		s.maps += len(f) + overhead
	}
	s.send(parcel{at: s.now + st.delay, from: st, event: membership.ReceivedMap{Map: a.Map, From: st.machine.Self(), Sequence: a.MapSequence}})
}

func (s *segment) sendBeacon(st *station, b *membership.Beacon) {
	frame := s.codec.Beacon(b)
	s.beacons = append(s.beacons, sent{s.now, len(frame) + overhead})
	read, _, err := s.codec.Decode(frame)
	if err != nil {
		panic(err) // it was written a moment ago
	}
	s.send(parcel{at: s.now + st.delay, from: st, event: membership.Received{Beacon: read}, frame: frame})
}

// cover counts for which buckets a node accepts new flows.
func (s *segment) cover(st *station) {
	before := s.uncovered
	for b, state := range st.table {
		accepts := st.leased && state.Owned()
		if accepts == st.accepts[b] {
			continue
		}
		st.accepts[b] = accepts
		if accepts {
			if s.owners[b]++; s.owners[b] == 1 {
				s.uncovered--
			}
		} else if s.owners[b]--; s.owners[b] == 0 {
			s.uncovered++
		}
	}
	switch {
	case before > 0 && s.uncovered == 0:
		s.gap += s.now - s.since
		s.since = s.now
	case before == 0 && s.uncovered > 0:
		s.since = s.now
	}
}

// recording is all that one node hears from its start on, so that its work can be
// repeated without that of the others: what comes before the quiet time, that, and
// the first death.
type recording struct {
	of            *station
	config        membership.Config
	started       int64
	events        []logged
	from, to      int   // the quiet time's
	quiet, change int64 // how long it and the first death are looked at
}

type logged struct {
	at    int64
	event membership.Event
	frame []byte
}

func (r *recording) add(at int64, ev membership.Event, frame []byte) {
	if frame != nil {
		ev = nil // it is read again
	}
	r.events = append(r.events, logged{at, ev, frame})
}

const replays = 5

// replay does the node's work again and measures it: the least of several times,
// since whatever else the machine does only adds.
func (r *recording) replay(c *Cost) {
	quiet, change := int64(math.MaxInt64), int64(math.MaxInt64)
	for range replays {
		q, ch, kept := r.once()
		quiet, change, c.Memory = min(quiet, q), min(change, ch), kept
	}
	c.CPU = float64(quiet) / float64(r.quiet) * 1e6
	c.Change = max(0, time.Duration(change-quiet*r.change/r.quiet))
}

// once gives the processor time of the quiet time and of the first death, and how
// many bytes the machine keeps after that.
func (r *recording) once() (quiet, change int64, kept int) {
	codec := membership.NewCodec("costs", make([]byte, 32))
	before := heap()
	m := membership.New(r.config, r.started)
	r.work(m, codec, 0, r.from)
	begin := cpuTime()
	r.work(m, codec, r.from, r.to)
	middle := cpuTime()
	r.work(m, codec, r.to, len(r.events))
	end := cpuTime()
	kept = heap() - before
	runtime.KeepAlive(m)
	return middle - begin, end - middle, kept
}

// work is what Node does with those events, but for the system calls.
func (r *recording) work(m *membership.Machine, codec *membership.Codec, from, to int) {
	for _, e := range r.events[from:to] {
		ev := e.event
		if e.frame != nil {
			b, _, err := codec.Decode(e.frame)
			if err != nil {
				panic(err) // it was read before
			}
			ev = membership.Received{Beacon: b}
		}
		for ev != nil {
			a := m.Step(ev, e.at)
			if ev = nil; a.Beacon != nil {
				codec.Beacon(a.Beacon)
				ev = membership.Sent{At: e.at}
			}
		}
	}
}

// cpuTime is the processor time of this process, in nanoseconds.
func cpuTime() int64 {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_PROCESS_CPUTIME_ID, &ts); err != nil {
		panic(err)
	}
	return ts.Nano()
}

func heap() int {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int(m.HeapAlloc)
}

// CostReport is what costs.md and costs.svg say.
type CostReport struct {
	Costs      []Cost  // by size, at each size every profile
	Processors int     // of the machine that CPU was measured on
	Load       float64 // of it, before that
}

// The example by which flooding is judged: a lone node's core is busy with so many
// requests a second, of so many frames from the client.
const (
	exampleRequests = 10_000
	exampleFrames   = 10
	exampleForeign  = exampleRequests * exampleFrames // frames a second from each other node's clients
	smallestFrame   = 64 + 20                         // bytes on the wire
	pays            = 0.5                             // what a node must add, in lone nodes
)

// datapath is what a node does with a frame for another.
type datapath struct {
	name    string
	discard time.Duration
}

// As measured between network namespaces, rounded up, with the 0.16 µs that sending a
// frame took on the same core.
var datapaths = []datapath{
	{"XDP", 200 * time.Nanosecond}, {"tcx", 700 * time.Nanosecond},
	{"raw, at best", 1000 * time.Nanosecond}, {"raw, at worst", 2700 * time.Nanosecond},
}

// share is the part of a core that n nodes' clients take from each in the example.
func (d datapath) share(n int) float64 { return float64(n-1) * exampleForeign * d.discard.Seconds() }

// reaches is the number of nodes at which that is so many hundredths.
func (d datapath) reaches(percent int) int {
	each := int64(d.discard) * exampleForeign // of 1e9
	return 1 + int((int64(percent)*1e7+each-1)/each)
}

// profile gives the costs of one profile, by size.
func (r *CostReport) profile(name string) []Cost {
	return slices.DeleteFunc(slices.Clone(r.Costs), func(c Cost) bool { return c.Profile.Name != name })
}

// membership is the part of a core that the protocol takes from each of n nodes:
// between the measured sizes by straight lines.
func (r *CostReport) membership(profile string, n int) float64 {
	last := Cost{Nodes: 1}
	for _, c := range r.profile(profile) {
		if n <= c.Nodes {
			return (last.CPU + (c.CPU-last.CPU)*float64(n-last.Nodes)/float64(c.Nodes-last.Nodes)) / 1e6
		}
		last = c
	}
	return last.CPU / 1e6
}

// membershipReaches is the number of nodes at which that is so much; 0: at none.
func (r *CostReport) membershipReaches(profile string, share float64) int {
	for n := 2; n <= membership.MaxNodes; n++ {
		if r.membership(profile, n) >= share {
			return n
		}
	}
	return 0
}

// capacity is what n nodes serve in the example, in lone nodes, with the profile
// normal. A node's core is full when what it serves, discards and says is.
func (r *CostReport) capacity(d datapath, n int) float64 {
	return float64(n) * (1 - r.membership("normal", n)) / (1 + d.share(n))
}

// paysUpTo is the number of nodes of which the last still adds enough.
func (r *CostReport) paysUpTo(d datapath) int {
	n := 1
	for n < membership.MaxNodes && r.capacity(d, n+1)-r.capacity(d, n) >= pays {
		n++
	}
	return n
}

// Markdown gives costs.md.
func (r *CostReport) Markdown() []byte {
	var b bytes.Buffer
	say := func(format string, args ...any) { fmt.Fprintf(&b, format+"\n", args...) }
	say("# What membership takes, and how many nodes pay")
	say("")
	say("Written by `clonectl sim --costs docs`. Times and bytes are simulated and the same at every run;")
	say("processor time and memory are of the machine that it ran on.")
	say("More than 255 nodes there cannot be: a map names the owner of a bucket with an octet, and one value stands for nobody.")
	say("")
	say("![Recovery time, traffic and processor time by the number of nodes](costs.svg)")
	say("")
	r.conclusion(say)
	r.times(say)
	r.traffic(say)
	r.processor(say)
	r.flooding(say)
	r.assumptions(say)
	return b.Bytes()
}

type sayFunc func(format string, args ...any)

func (r *CostReport) conclusion(say sayFunc) {
	first, last := r.Costs[0], r.Costs[len(r.Costs)-1]
	n := last.Nodes
	xdp := datapaths[0]
	most := r.paysUpTo(xdp)
	say("## In short")
	say("")
	say("- **What ends it is the flooding, not the membership.** Take nodes of which one alone has a core full with %d requests a", exampleRequests)
	say("  second, of %d frames each from the client. If XDP discards the others' frames, nodes are worth adding **up to about %d**;", exampleFrames, most)
	say("  with tcx up to %d, with the raw datapath up to %d to %d. Of %d with XDP, each spends %.0f %% of its core on frames for others", r.paysUpTo(datapaths[1]),
		r.paysUpTo(datapaths[3]), r.paysUpTo(datapaths[2]), most, 100*xdp.share(most)/(1+xdp.share(most)))
	say("  and %s on membership. Where requests cost more or have fewer frames, it is in proportion more nodes.", percent(r.membership("normal", most)))
	say("- Before that the line may be full: with the clients' smallest frames a port of 1 Gbit/s is at %d such nodes, one of 10 Gbit/s", portHolds(1e9))
	say("  at %d. Membership puts %.2g Mbit/s on it with %d nodes and %.2g with %d (fast: twice that).", portHolds(10e9),
		first.segment()/1e6, first.Nodes, r.profile("normal")[len(r.profile("normal"))-1].segment()/1e6, n)
	say("- Membership takes %s of a core with %d nodes and %s with %d (fast: %s and %s). It takes 1 %% of a core with", percent(r.membership("normal", first.Nodes)),
		first.Nodes, percent(r.membership("normal", n)), n, percent(r.membership("fast", first.Nodes)), percent(r.membership("fast", n)))
	say("  %s (fast: %s).", r.onePercent("normal"), r.onePercent("fast"))
	say("- The times do not grow with the number of nodes: a death was noticed within %.0f ms (fast: %.0f ms), and every bucket had an",
		r.longest("normal"), r.longest("fast"))
	say("  owner again within %.0f ms (fast: %.0f ms) of it.", r.longestOutage("normal"), r.longestOutage("fast"))
	say("")
}

// longest is the longest that it took to notice a death, in milliseconds.
func (r *CostReport) longest(profile string) (most float64) {
	for _, c := range r.profile(profile) {
		most = max(most, c.Detect.Max.Seconds()*1e3)
	}
	return most
}

// longestOutage is the longest that buckets went without an owner after a death, in
// milliseconds.
func (r *CostReport) longestOutage(profile string) (most float64) {
	for _, c := range r.profile(profile) {
		most = max(most, c.Recover.Max.Seconds()*1e3)
	}
	return most
}

func (r *CostReport) onePercent(profile string) string {
	if n := r.membershipReaches(profile, 0.01); n != 0 {
		return fmt.Sprintf("%d nodes", n)
	}
	return "no number of nodes that was tried"
}

// portHolds is the number of nodes whose clients fill a port, in the example.
func portHolds(bitsPerSecond int) int { return bitsPerSecond / (exampleForeign * smallestFrame * 8) }

func (r *CostReport) times(say sayFunc) {
	say("## How long it takes")
	say("")
	say("In milliseconds, as p50 / p99 / max over so many trials of each kind (with fewer than 100, p99 is the largest). A random")
	say("node, often the leader in small clusters, loses its power at a random moment, and starts again later. *Noticed*: a leader")
	say("has made the map without it. *Served again*: every bucket has an owner that accepts. *Joined*: from its start until all go")
	say("by a map with it and every bucket has an owner that accepts; it listens for the detection time and up to an interval")
	say("first. *Gap*: for how long, during a join, some bucket had no such owner.")
	for _, p := range Profiles() {
		say("")
		say("**%s**: a beacon every %v, dead after %v, lease %v", p.Name, p.Interval, p.Dead, p.Lease)
		say("")
		say("| nodes | trials | noticed | served again | joined | gap |")
		say("|--:|--:|--:|--:|--:|--:|")
		for _, c := range r.profile(p.Name) {
			say("%s", c.timesRow())
		}
	}
	say("")
}

func (c Cost) timesRow() string {
	return fmt.Sprintf("| %d | %d | %v | %v | %v | %v |", c.Nodes, c.Trials, c.Detect, c.Recover, c.Join, c.Gap)
}

// String gives the spread in milliseconds.
func (s Spread) String() string {
	ms := func(d time.Duration) float64 { return d.Seconds() * 1000 }
	return fmt.Sprintf("%.1f / %.1f / %.1f", ms(s.P50), ms(s.P99), ms(s.Max))
}

func (r *CostReport) traffic(say sayFunc) {
	say("## What the segment carries")
	say("")
	say("In quiet, with checksum, preamble and gap (24 bytes a frame). A switch floods multicast, so every port carries what all nodes")
	say("send, and every node receives it. *At once* is the most beacons within a millisecond: each map is answered by all")
	say("nodes at once, and so their beacons stay in step. *Maps* is what a join adds to it, at most.")
	say("")
	say("| nodes | profile | beacon, bytes | a node sends, kB/s | the segment carries, Mbit/s | beacons at once | maps in a join, kB |")
	say("|--:|---|--:|--:|--:|--:|--:|")
	for _, c := range r.Costs {
		say("%s", c.trafficRow())
	}
	say("")
}

func (c Cost) trafficRow() string {
	return fmt.Sprintf("| %d | %s | %d | %.2f | %.3f | %d | %.1f |",
		c.Nodes, c.Profile.Name, c.Beacon, c.SentRate/1e3, c.segment()/1e6, c.Burst, float64(c.JoinMaps)/1e3)
}

// segment is what all nodes send, in bits per second.
func (c Cost) segment() float64 { return 8 * c.SentRate * float64(c.Nodes) }

// receiving is what the system calls for a received frame cost at most, in
// seconds: what the raw datapath takes for one.
var receiving = datapaths[len(datapaths)-1].discard.Seconds()

func (r *CostReport) processor(say sayFunc) {
	say("## Processor and memory of a node")
	say("")
	say("The protocol alone: the state machine, and writing, reading and authenticating beacons, as measured over %d or more quiet", quietIntervals(membership.MaxNodes))
	say("intervals of one node (the least of %d runs), in millionths of a core. *With receiving* adds %.1f µs for the system calls of", replays, 1e6*receiving)
	say("each frame, which is what the raw datapath needs at worst. *A death* is the work that it makes for each of the others, on top")
	say("(the larger of two, one with each profile). *Memory* is what the state machine keeps.")
	say("")
	say("Measured on a machine with %d processors at a load average of %.0f: on another, or an idle one, expect other figures.", r.Processors, r.Load)
	say("")
	say("| nodes | normal, ppm | with receiving | fast, ppm | with receiving | a death, ms | memory, kB |")
	say("|--:|--:|--:|--:|--:|--:|--:|")
	fast := r.profile("fast")
	for i, c := range r.profile("normal") {
		f := fast[i]
		say("| %d | %.0f | %s | %.0f | %s | %.2f | %d |", c.Nodes, c.CPU, percent(c.withReceiving()), f.CPU, percent(f.withReceiving()),
			max(c.Change, f.Change).Seconds()*1e3, (c.Memory+999)/1000)
	}
	say("")
}

// withReceiving is a part of a core.
func (c Cost) withReceiving() float64 {
	return c.CPU/1e6 + float64(c.Nodes-1)*c.SentRate/float64(c.Beacon)*receiving
}

// percent has two digits that count.
func percent(share float64) string {
	digits := 1 - int(math.Floor(math.Log10(100*max(share, 1e-7))))
	return fmt.Sprintf("%.*f %%", max(0, digits), 100*share)
}

func (r *CostReport) flooding(say sayFunc) {
	say("## What flooding takes, and where it stops paying")
	say("")
	say("Every node receives every frame from every client, and discards those of the others. With n nodes that serve r requests")
	say("a second each, of f frames from the client, that takes from each of them")
	say("")
	say("    (n − 1) · r · f · cost of discarding one")
	say("")
	say("Here r = %d and f = %d: each other node brings %d frames a second to discard. *Pays up to*: the nodes after that add less", exampleRequests, exampleFrames, exampleForeign)
	say("than half of what a lone node serves, if a lone node's core is full with r requests. *Never more than*: what the cluster can")
	say("serve at all, however many nodes, in lone nodes.")
	say("")
	say("| datapath | discards one in | 10 %% of a core at | 50 %% of a core at | pays up to | they serve as much as | never more than |")
	say("|---|--:|--:|--:|--:|--:|--:|")
	for _, d := range datapaths {
		n := r.paysUpTo(d)
		say("| %s | %.1f µs | %d nodes | %d nodes | %d nodes | %.1f lone ones | %.0f lone ones |", d.name, 1e6*d.discard.Seconds(),
			d.reaches(10), d.reaches(50), n, r.capacity(d, n), 1/d.share(2))
	}
	say("")
	say("Side by side, if each node's clients send that much, whether it can be served or not (profile normal):")
	say("")
	say("| nodes | membership, of a core | discarding with XDP | with tcx | raw, at best | membership on a port, Mbit/s | clients on a port, Mbit/s |")
	say("|--:|--:|--:|--:|--:|--:|--:|")
	for _, c := range r.profile("normal") {
		say("| %d | %s | %.0f %% | %.0f %% | %.0f %% | %.2f | %.0f |", c.Nodes, percent(c.CPU/1e6), 100*datapaths[0].share(c.Nodes),
			100*datapaths[1].share(c.Nodes), 100*datapaths[2].share(c.Nodes), c.segment()/1e6, float64(c.Nodes)*exampleForeign*smallestFrame*8/1e6)
	}
	say("")
	say("What counts is the cost of the frames to be discarded against that of a request. Where a request costs ten times as much (a")
	say("core is full with %d requests a second), the nodes that pay are about ten times as many, and so it is with a tenth of the", exampleRequests/10)
	say("frames. More cores in every node change nothing: they serve more, and there is more to discard.")
	say("")
	say("Of the smallest frames (%d bytes on the wire) each node's clients bring %.0f Mbit/s to every port: one of 1 Gbit/s is full at", smallestFrame, exampleForeign*smallestFrame*8/1e6)
	say("%d nodes, one of 10 Gbit/s at %d.", portHolds(1e9), portHolds(10e9))
	say("")
}

func (r *CostReport) assumptions(say sayFunc) {
	say("## What is assumed, and how to repeat it")
	say("")
	say("- The machines and the codec are the real ones. The segment loses nothing; between the decision to send and the other's")
	last := r.Costs[len(r.Costs)-1].Nodes
	longest := slices.MaxFunc(r.Costs, func(a, b Cost) int { return cmp.Compare(a.Change, b.Change) }).Change
	say("  reading there are %.0f to %.0f µs, for each node its own. Processors take no time there: what a death makes each of %d nodes", leastDelay/1e3, mostDelay/1e3, last)
	say("  do, here %.0f ms of work, comes on top.", longest.Seconds()*1e3)
	say("- Nobody holds flows while maps change, so a join is not slowed down by what it hands over; it never waits for flows.")
	say("- The costs of discarding a frame were measured between network namespaces on two contended cores, and have in them the")
	say("  0.16 µs of sending one. [Benchmarks](benchmarks.md) has later figures without that: with XDP and tcx a third of these, with raw")
	say("  twice as much, and a NIC's driver adds its own. This is the assumption that weighs the most; the node counts are in inverse")
	say("  proportion to it: take those of XDP and tcx for the least that pays, and raw for two nodes.")
	say("- `clonectl sim --costs docs` measures all of it again, in one or two minutes, on one core.")
}

// enough is how many trials a time must come from to be drawn.
const enough = 9

// SVG gives costs.svg.
func (r *CostReport) SVG() []byte {
	var b bytes.Buffer
	fmt.Fprint(&b, `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 725" width="760" height="725" role="img" aria-labelledby="t d" font-family="system-ui, sans-serif" font-size="12">
  <title id="t">What membership and flooding cost, by the number of nodes</title>
  <desc id="d">Three plots over 2 to 255 nodes: the time until all buckets are served again after a death, the traffic of the membership, and the share of one core that membership and the discarding of other nodes' frames take.</desc>
  <style>
    .t{fill:#0f172a;font-weight:600;font-size:13px}.s{fill:#475569}.g{stroke:#cbd5e1;stroke-width:1}.m{stroke:#64748b;stroke-width:1;stroke-dasharray:2 3}
    .l{fill:none;stroke-width:2;stroke-linejoin:round}.thin{stroke-width:1.5;stroke-dasharray:5 3}
    .blue{stroke:#1d4ed8}.amber{stroke:#b45309}.green{stroke:#15803d}.red{stroke:#b91c1c}.violet{stroke:#7e22ce}.grey{stroke:#64748b}
    @media (prefers-color-scheme: dark){svg{background:#0f172a}.t{fill:#f1f5f9}.s{fill:#cbd5e1}.g{stroke:#334155}.m{stroke:#94a3b8}.blue{stroke:#93c5fd}.amber{stroke:#fbbf24}.green{stroke:#4ade80}.red{stroke:#fca5a5}.violet{stroke:#d8b4fe}.grey{stroke:#94a3b8}}
  </style>
`)
	times := plot{
		x: 50, y: 80, width: 300, height: 200, title: fmt.Sprintf("Served again after a death, ms (%d trials or more)", enough), columns: 2, most: 350,
		ticks: []tick{{0, "0"}, {100, "100"}, {200, "200"}, {300, "300"}},
	}
	traffic := plot{
		x: 440, y: 80, width: 300, height: 200, title: "Membership on every port, Mbit/s", columns: 1, least: 0.01, most: 100, log: true,
		ticks: []tick{{0.01, "0.01"}, {0.1, "0.1"}, {1, "1"}, {10, "10"}, {100, "100"}},
	}
	for i, p := range Profiles() {
		color := []string{"blue", "amber"}[i]
		var p50, most, carried []point
		for _, c := range r.profile(p.Name) {
			n := float64(c.Nodes)
			if c.Trials >= enough {
				p50 = append(p50, point{n, c.Recover.P50.Seconds() * 1e3})
				most = append(most, point{n, c.Recover.Max.Seconds() * 1e3})
			}
			carried = append(carried, point{n, c.segment() / 1e6})
		}
		times.lines = append(times.lines, line{p.Name + ", longest", color, most}, line{p.Name + ", median", color + " thin", p50})
		traffic.lines = append(traffic.lines, line{p.Name, color, carried})
	}
	times.draw(&b)
	traffic.draw(&b)
	cores := plot{
		x: 50, y: 430, width: 690, height: 250, columns: 3,
		title: fmt.Sprintf("Share of one core, %% (discarding: %d frames a second from each other node's clients)", exampleForeign),
		least: 0.001, most: 100, log: true,
		ticks: []tick{{0.001, "0.001"}, {0.01, "0.01"}, {0.1, "0.1"}, {1, "1"}, {10, "10"}, {100, "100"}}, marks: []tick{{50, "50"}},
	}
	for i, d := range datapaths {
		var ps []point
		for n := 2; n <= membership.MaxNodes && d.share(n) <= 1; n++ {
			ps = append(ps, point{float64(n), 100 * d.share(n)})
		}
		ps = append(ps, point{1 + 1/d.share(2), 100})
		cores.lines = append(cores.lines, line{"discarding, " + d.name, []string{"green", "violet", "red", "red thin"}[i], ps})
	}
	for i, p := range Profiles() {
		var ps []point
		for _, c := range r.profile(p.Name) {
			ps = append(ps, point{float64(c.Nodes), c.CPU / 1e4})
		}
		cores.lines = append(cores.lines, line{"membership, " + p.Name, []string{"blue", "amber"}[i], ps})
	}
	cores.draw(&b)
	fmt.Fprint(&b, "</svg>\n")
	return b.Bytes()
}

type point struct{ nodes, value float64 }

type tick struct {
	value float64
	label string
}

type line struct {
	label, class string
	points       []point
}

// plot is a plot over the number of nodes, which is drawn by its logarithm.
type plot struct {
	x, y, width, height float64 // of the area
	title               string
	least, most         float64
	log                 bool
	columns             int // of the legend
	ticks, marks        []tick
	lines               []line
}

func (p *plot) draw(b *bytes.Buffer) {
	rows := (len(p.lines) + p.columns - 1) / p.columns
	fmt.Fprintf(b, `  <text class="t" x="%.0f" y="%.0f">%s</text>`+"\n", p.x, p.y-22-16*float64(rows), p.title)
	for _, t := range p.ticks {
		fmt.Fprintf(b, `  <path class="g" d="M%.0f %.1fh%.0f"/><text class="s" x="%.0f" y="%.1f" text-anchor="end">%s</text>`+"\n",
			p.x, p.vertical(t.value), p.width, p.x-5, p.vertical(t.value)+4, t.label)
	}
	for _, t := range p.marks {
		fmt.Fprintf(b, `  <path class="m" d="M%.0f %.1fh%.0f"/><text class="s" x="%.0f" y="%.1f" text-anchor="end">%s</text>`+"\n",
			p.x, p.vertical(t.value), p.width, p.x-5, p.vertical(t.value)+4, t.label)
	}
	for _, n := range CostSizes() {
		fmt.Fprintf(b, `  <text class="s" x="%.1f" y="%.0f" text-anchor="middle">%d</text>`+"\n", p.horizontal(float64(n)), p.y+p.height+16, n)
	}
	fmt.Fprintf(b, `  <text class="s" x="%.0f" y="%.0f" text-anchor="middle">nodes</text>`+"\n", p.x+p.width/2, p.y+p.height+32)
	for i, l := range p.lines {
		x, y := p.x+p.width/float64(p.columns)*float64(i%p.columns), p.y-16*float64(rows-i/p.columns)
		fmt.Fprintf(b, `  <path class="l %s" d="M%.0f %.0fh20"/><text class="s" x="%.0f" y="%.0f">%s</text>`+"\n", l.class, x, y-4, x+26, y, l.label)
		d := byte('M')
		fmt.Fprintf(b, `  <path class="l %s" d="`, l.class)
		for _, q := range l.points {
			fmt.Fprintf(b, "%c%.1f %.1f", d, p.horizontal(q.nodes), p.vertical(q.value))
			d = 'L'
		}
		fmt.Fprint(b, "\"/>\n")
	}
}

func (p *plot) horizontal(nodes float64) float64 {
	return p.x + p.width*math.Log(nodes/2)/math.Log(membership.MaxNodes/2.0)
}

func (p *plot) vertical(value float64) float64 {
	part := (value - p.least) / (p.most - p.least)
	if p.log {
		part = math.Log(max(value, p.least)/p.least) / math.Log(p.most/p.least)
	}
	return p.y + p.height*(1-part)
}
