package evaluation

import (
	"container/heap"
	"fmt"
	"math"
	"math/rand/v2"
	"slices"

	"clonecluster/netcore/webstone"
)

// A Claim is something that the evaluation is to show.
type Claim struct {
	What         string
	Value, Limit float64
	AtLeast      bool // else at most
	Disturbed    bool // something that it rests on was
	Rounds       int  // the fewest of what it rests on
	// Most is what nobody can have more of who goes that way, by Proof; 0: nothing is known. It is not set
	// where a claim is that something is at most the limit.
	Most  float64
	Proof string
	kind  kind
}

// kind is what a claim is about, and so why it may not hold.
type kind uint8

const (
	below kind = iota + 1
	beyond
	requests
	latency
	uneven
	away
)

// why says for each kind why it may not hold.
var why = map[kind]string{
	below:    "Before one server is full, a cluster answers as fast as that only if its engines, and the frames that each node discards, cost no time; both are on its quota here, which is small.",
	beyond:   "Of each node's quota its engine takes a part at rest, and the frames of all others' requests take another, which grows with the nodes: see what a request takes. Both are the same for a server that works longer for a request, whose cluster so comes closer to its number of nodes. And clients that wait for their answers are not spread evenly by chance: some servers have none while others have several.",
	requests: "A dispatcher is a machine that serves nothing, and the more a request takes of a server, the less its own part matters: then it costs one machine of all, and no more.",
	latency:  "A dispatcher keeps a queue for each server and gives a request to the shortest. A cluster's nodes have no common queue: where a client's connection goes is decided by its port.",
	uneven:   "Shares follow the processors' load by some percent a second. Where all nodes are full, as with many clients that wait for their answers, they are equally loaded and there is nothing to follow.",
	away:     "The time is that of the detection, which can be configured: an engine notices a dead one after 150 ms with `detect: fast`, keepalived after three adverts that did not come.",
}

// enoughRounds is how many it takes to judge a claim.
const enoughRounds = 2

// Holds reports whether the value keeps the limit.
func (c Claim) Holds() bool { return c.AtLeast == (c.Value >= c.Limit) || c.Value == c.Limit }

// slack is how far a bound has to be from a limit, and a value from a bound, to be told apart: what is measured
// differs by some percent.
const slack = 0.05

// Bounded reports whether it was judged, does not hold, and could not for anybody, and was not itself better
// than the bound, which then is none.
func (c Claim) Bounded() bool {
	return !c.Disturbed && c.Rounds >= enoughRounds && !c.Holds() && c.Most > 0 && c.Most < (1-slack)*c.Limit && c.Value <= (1+slack)*c.Most
}

// OutOfReach reports whether that is all that is missing: it is as good as anybody could be.
func (c Claim) OutOfReach() bool { return c.Bounded() && c.Value >= (1-2*slack)*c.Most }

// Verdict is what the report says of it.
func (c Claim) Verdict() string {
	switch {
	case c.Disturbed:
		return "not judged: the machine was busy"
	case c.Rounds < enoughRounds:
		return fmt.Sprintf("not judged: %d of the %d rounds that it takes", c.Rounds, enoughRounds)
	case c.Holds():
		return "holds"
	case c.OutOfReach():
		return fmt.Sprintf("out of reach: %.2f at most, %s", c.Most, c.Proof)
	case c.Bounded():
		return fmt.Sprintf("%s; %.2f at most, %s", doesNotHold, c.Most, c.Proof)
	}
	return doesNotHold
}

const doesNotHold = "**does not hold**"

// Claims are those of which something was measured.
func (r *Report) Claims() (claims []Claim) {
	for _, w := range r.workloads() {
		claims = append(claims, r.scaleClaims(w)...)
		for _, s := range r.setups() {
			if s.Way != HAProxy && s.Way != NGINX {
				continue
			}
			// As many machines, and so as much of the processors.
			clone := r.points(Setup{Way: Clone, Machines: s.Machines, Policy: "byRandom"}, w, false)
			other := r.points(s, w, false)
			what := fmt.Sprintf("%d nodes ÷ %s, %s: requests/s with the most clients", s.Machines, s, w)
			claims = add(claims, ratios(most(clone), most(other), always), what, 1.5, true, requests)
			if len(other) > 0 && rate(most(other)[0]) > 0 {
				claims = bounded(claims, what, float64(s.Machines)*r.sureBest(w)/rate(most(other)[0]), fmt.Sprintf("which is %d times one server's best", s.Machines))
			}
			claims = add(claims, compare(most(clone), most(other), always, p99), fmt.Sprintf("%d nodes ÷ %s, %s: p99 with the most clients", s.Machines, s, w), 1, false, latency)
		}
		for _, s := range r.setups() {
			if !s.Uneven || s.Policy != "byLoad" {
				continue
			}
			random := s
			random.Policy = "byRandom"
			claims = add(claims, compare(r.points(s, w, false), r.points(random, w, false), always, p99), fmt.Sprintf("%s, %s: p99 ÷ byRandom, closed loop, worst", s, w), 0.5, false, uneven)
			for _, m := range r.Runs {
				if m.Setup == s && m.Workload == w && m.Share > 0 && m.Round == 0 {
					other := m.Run
					other.Setup = random
					if p, q := r.point(m.Run), r.point(other); p != nil && q != nil {
						claims = add(claims, compare([]*Point{p}, []*Point{q}, always, p99), fmt.Sprintf("%s, %s: p99 ÷ byRandom, at %.1f times the rate of one server", s, w, m.Share), 0.5, false, uneven)
					}
				}
			}
		}
	}
	return append(claims, r.failoverClaims()...)
}

// scaleClaims are those of more and more nodes against one server.
func (r *Report) scaleClaims(w string) (claims []Claim) {
	single := r.points(Setup{Way: Plain, Machines: 1}, w, false)
	full := saturation(single)
	alone := r.alone(w)
	reach := map[int]float64{}
	for _, nodes := range []struct {
		machines int
		least    float64
	}{{2, 1.9}, {4, 3.7}, {8, 7}} {
		clear(reach)
		ceiling := func(clients int) float64 {
			if _, known := reach[clients]; !known && alone > 0 && r.Plan.quota(w) > 0 && r.Plan.PeriodMS > 0 {
				reach[clients] = attainable(nodes.machines, clients, alone, r.Plan.quota(w), r.Plan.PeriodMS/1e3)
			}
			return reach[clients]
		}
		able := func(clients int) bool { return ceiling(clients) == 0 || ceiling(clients) >= (1-slack)*nodes.least }
		flooded := r.flooded(nodes.machines, w, alone)
		for _, policy := range []string{"byLoad", "byRandom"} {
			s := Setup{Way: Clone, Machines: nodes.machines, Policy: policy}
			cluster := r.points(s, w, false)
			if nodes.machines == 2 {
				claims = add(claims, ratios(cluster, single, func(n int) bool { return n < full }), fmt.Sprintf("%s, %s: throughput ÷ one server below its saturation, worst", s, w), 0.98, true, below)
			}
			beside := func(all []ratio, where string, clients int) {
				if len(all) == 0 {
					return
				}
				what := fmt.Sprintf("%s, %s: throughput ÷ one server %s", s, w, where)
				claims = add(claims, all, what, nodes.least, true, beyond)
				if few := ceiling(clients); few > 0 && (flooded == 0 || few < flooded) {
					claims = bounded(claims, what, few, "as so few clients do not keep all servers busy")
				} else {
					claims = bounded(claims, what, flooded, "by what others' requests take a bystander")
				}
			}
			if last := most(cluster); len(last) > 0 {
				beside(ratios(last, most(single), always), "with the most clients", last[0].Clients)
			}
			fewest := 0
			reached := ratios(cluster, single, func(n int) bool {
				in := n >= full && able(n)
				if in && fewest == 0 {
					fewest = n
				}
				return in
			})
			beside(reached, "from its saturation on, worst"+middle(reached), fewest)
			for _, p := range cluster {
				if p.Clients >= full && !able(p.Clients) {
					beside(ratios([]*Point{p}, single, always), fmt.Sprintf("with %d clients", p.Clients), p.Clients)
				}
			}
		}
	}
	return claims
}

func (r *Report) failoverClaims() (claims []Claim) {
	for _, c := range []struct {
		ours, other string
		least       float64
	}{{CloneFailover, KeepalivedDefault, 5}, {CloneFast, KeepalivedTuned, 2}} {
		ours, theirs := r.failover(c.ours), r.failover(c.other)
		if len(ours) > 0 && len(theirs) > 0 {
			claims = append(claims, Claim{What: fmt.Sprintf("fail-over: %s ÷ %s, medians", c.other, c.ours), Value: median(theirs) / median(ours), Limit: c.least, AtLeast: true, Rounds: min(len(ours), len(theirs)), kind: away})
		}
	}
	return claims
}

// alone is what a request takes one plain server of a processor, in seconds, where it always has work; 0
// if that was not measured often enough.
func (r *Report) alone(workload string) float64 {
	p := r.point(Run{Setup: Setup{Way: Plain, Machines: 1}, Workload: workload, Clients: slices.Max(webstone.PublishedClients())})
	if p == nil || p.Disturbed || p.Rounds < enoughRounds {
		return 0
	}
	return p.Request
}

// sureBest is best where all that it is the best of was measured; otherwise 0.
func (r *Report) sureBest(workload string) float64 {
	for _, p := range r.points(Setup{Way: Plain, Machines: 1}, workload, false) {
		if p.Disturbed || p.Rounds < enoughRounds {
			return 0
		}
	}
	return r.best(workload)
}

// flooded is what machines that get each other's frames can do, in what one does alone that needs so much for
// a request, if another's request takes them no more than a bystander; 0 if that was not measured. What a
// bystander takes anyway to be woken, however many frames come, a server takes for its own. So it is by how much
// more it takes beside many nodes, which are asked more, than beside few.
func (r *Report) flooded(machines int, workload string, alone float64) float64 {
	var least, greatest *Point
	for _, s := range r.setups() {
		if !s.Bystander {
			continue
		}
		for _, p := range r.points(s, workload, false) {
			if p.Disturbed || p.Rounds < enoughRounds || p.Aside == 0 {
				return 0
			}
			if least == nil || p.Rate < least.Rate {
				least = p
			}
			if greatest == nil || p.Rate > greatest.Rate {
				greatest = p
			}
		}
	}
	if alone == 0 || least == nil || greatest.Rate < 1.3*least.Rate {
		return 0
	}
	another := (greatest.Aside*greatest.Rate - least.Aside*least.Rate) / (greatest.Rate - least.Rate)
	m := float64(machines)
	return m / (1 + (m-1)*max(another, 0)/alone)
}

// bounded notes in the claim of that name, if it is there, what is possible at all.
func bounded(claims []Claim, what string, most float64, proof string) []Claim {
	for i := range claims {
		if claims[i].What == what {
			claims[i].Most, claims[i].Proof = most, proof
		}
	}
	return claims
}

// attainable is what equal servers do together, divided by what one does that always has work,
// when so many clients wait for each answer before they ask again, each request goes to any of
// the servers by chance, and nothing else takes time. A request takes a server so much of its processor, of which
// it may have a part in each period, all in seconds: what it does not use while nobody asks it can use in the rest of the period. It is that of
// requests which all take the same, in the order in which they come; of others it is less: without
// a quota, of m servers and n clients, mn/(n+m−1) where they are exponential. By a simulation that is the same each time, to about a hundredth.
func attainable(servers, clients int, request, quota, period float64) float64 {
	const early, requests = 5_000, 55_000
	chance := rand.New(rand.NewPCG(1, 2))
	all := make([]server, servers)
	for i := range all {
		all[i] = server{phase: chance.Float64() * period, may: quota * period, period: period}
	}
	asks := make(times, clients) // when each client asks next
	start, now := 0., 0.
	for i := range requests {
		if now = asks[0]; i == early {
			start = now
		}
		asks[0] = all[chance.IntN(servers)].serve(now, request)
		heap.Fix(&asks, 0)
	}
	return (requests - early) / (now - start) * request / quota
}

// A server works in the order in which it is asked, and has so much of a processor in each period.
type server struct {
	phase, may, period float64 // when a period begins, what it may take in one, and how long one is
	free               float64 // when it has done all that it was asked
	current, taken     float64 // the number of a period, and what was taken in it
}

// serve gives the time when a request is answered that takes so much and came at a time.
func (s *server) serve(at, takes float64) float64 {
	const nothing = 1e-12
	at = max(at, s.free)
	for takes > nothing {
		n := math.Floor((at + s.phase) / s.period)
		if n > s.current {
			s.current, s.taken = n, 0
		}
		next := (s.current+1)*s.period - s.phase
		run := min(takes, s.may-s.taken, next-at)
		if run <= nothing {
			at = next
			s.current, s.taken = s.current+1, 0
			continue
		}
		at, takes, s.taken = at+run, takes-run, s.taken+run
	}
	s.free = at
	return at
}

// times is a heap of points in time, the earliest first.
type times []float64

func (t times) Len() int           { return len(t) }
func (t times) Less(i, j int) bool { return t[i] < t[j] }
func (t times) Swap(i, j int)      { t[i], t[j] = t[j], t[i] }
func (t *times) Push(any)          {} // its length does not change
func (t *times) Pop() any          { return nil }

func always(int) bool { return true }

// most is the point with the most clients.
func most(points []*Point) []*Point { return points[max(len(points)-1, 0):] }

// The ways whose fail-over is timed.
const (
	CloneFailover     = "clone, 2 nodes"
	CloneFast         = "clone, 2 nodes, detect: fast"
	KeepalivedDefault = "keepalived, defaults"
	KeepalivedTuned   = "keepalived, adverts each 0.1 s"
)

var failoverWays = []string{CloneFailover, CloneFast, KeepalivedDefault, KeepalivedTuned}

func (r *Report) failover(way string) []float64 {
	for _, f := range r.Failovers {
		if f.Way == way {
			return slices.Clone(f.Seconds)
		}
	}
	return nil
}

func median(values []float64) float64 {
	values = slices.Sorted(slices.Values(values))
	n := len(values)
	return (values[(n-1)/2] + values[n/2]) / 2
}

// saturation is the fewest clients with which a set-up has 95 % of its best throughput.
func saturation(points []*Point) int {
	best := 0.
	for _, p := range points {
		best = max(best, p.Mbit)
	}
	for _, p := range points {
		if p.Mbit >= 0.95*best {
			return p.Clients
		}
	}
	return 0
}

// A ratio is one value by another, of runs with the same clients.
type ratio struct {
	value     float64
	disturbed bool
	rounds    int
}

func rate(p *Point) float64 { return p.Rate }
func p99(p *Point) float64  { return p.Total.Latency.Quantile(.99).Seconds() }

func ratios(a, b []*Point, where func(clients int) bool) []ratio { return compare(a, b, where, rate) }

func compare(a, b []*Point, where func(clients int) bool, of func(*Point) float64) (all []ratio) {
	for _, p := range a {
		for _, q := range b {
			if p.Clients == q.Clients && where(p.Clients) && of(q) > 0 {
				all = append(all, ratio{of(p) / of(q), p.Disturbed || q.Disturbed, min(p.Rounds, q.Rounds)})
			}
		}
	}
	return all
}

// add adds a claim for the worst of some ratios.
func add(claims []Claim, all []ratio, what string, limit float64, atLeast bool, of kind) []Claim {
	if len(all) == 0 {
		return claims
	}
	c := Claim{What: what, Value: all[0].value, Limit: limit, AtLeast: atLeast, Rounds: all[0].rounds, kind: of}
	for _, x := range all {
		if x.value < c.Value == atLeast {
			c.Value = x.value
		}
		c.Disturbed = c.Disturbed || x.disturbed
		c.Rounds = min(c.Rounds, x.rounds)
	}
	return append(claims, c)
}

// middle names the median of several ratios. One point is of some hundred requests, so that
// the worst of many is lower by chance than most.
func middle(all []ratio) string {
	if len(all) < 2 {
		return ""
	}
	values := make([]float64, len(all))
	for i, x := range all {
		values[i] = x.value
	}
	return fmt.Sprintf(" of %d (median %.2f)", len(all), median(values))
}

func (r *Report) workloads() (all []string) {
	for _, m := range r.Runs {
		if !slices.Contains(all, m.Workload) {
			all = append(all, m.Workload)
		}
	}
	slices.Sort(all)
	return all
}
