// Package bench compares what a request costs when it is answered by a plain host, by
// a cluster on each datapath, and by servers behind a dispatcher; and what a frame costs a
// node that discards it or takes it. The measuring is in its tests, which "make bench-costs" runs;
// this is the arithmetic and the report.
//
// What is measured is the processor time of all parties: client, servers, dispatcher,
// engine, and the kernel's network work, which on one machine is done in their name. All
// take turns in each round, and every figure is compared with that of a reference right beside
// it, or else of the same round.
package bench

import (
	"encoding/json"
	"fmt"
	"slices"
)

// Run is one measurement of one way to serve in one round.
type Run struct {
	CPU    float64 `json:"cpu_ns"`           // of all parties, per request, octet or frame
	All    float64 `json:"all_ns,omitempty"` // of the whole machine, less what it takes at rest
	Rate   float64 `json:"rate,omitempty"`   // of requests, octets or frames a second
	P99    float64 `json:"p99_ns,omitempty"` // latency of requests
	Others float64 `json:"others,omitempty"` // how many processors did something else meanwhile
	// Beside is what the reference for this work took right before and right after, but for the
	// percentile, the mean of both: what a processor gets done in a second is not the same a minute later where others
	// share the machine below it.
	Beside *Run `json:"beside,omitempty"`
}

// disturbed reports whether others had a large part of the machine. Such a run only counts
// if there is no better one: with others at work a processor's time is worth less.
func (r Run) disturbed() bool { return r.Others > 0.5 || r.Beside != nil && r.Beside.disturbed() }

// against gives a run's value divided by that of the reference beside it; 0 if there is none.
func (r Run) against(of func(Run) float64) float64 {
	if r.Beside == nil || of(*r.Beside) == 0 {
		return 0
	}
	return of(r) / of(*r.Beside)
}

// between is the reference between two of its runs.
func between(a, b Run) *Run {
	mean := func(of func(Run) float64) float64 { return (of(a) + of(b)) / 2 }
	return &Run{CPU: mean(cpu), All: mean(all), Rate: mean(rate), Others: max(a.Others, b.Others)}
}

// Series is what one way to serve cost at one kind of work, round by round.
type Series struct {
	Way  string `json:"way"`
	Work string `json:"work"`
	Runs []Run  `json:"runs,omitempty"`
	// Why says what this machine lacks for it.
	Why string `json:"why,omitempty"`
}

// Report is all of a run.
type Report struct {
	Machine    string   `json:"machine,omitempty"`
	Kernel     string   `json:"kernel"`
	Processors int      `json:"processors"`
	Rounds     int      `json:"rounds"`
	Series     []Series `json:"series"`
}

// The kinds of work.
const (
	KeepAlive  = "keep-alive"
	Connection = "connection per request"
	Download   = "download"
	Upload     = "upload"

	Discard = "discarded"
	Accept  = "accepted"

	// Behind a NIC of virtio-net; what is done there follows after ": ".
	VirtioOffloads = "with the guest's offloads"
	VirtioPlain    = "without"

	// By BPF_PROG_TEST_RUN.
	TestDiscard  = "test run: another node's flow"
	TestStranger = "test run: another host's frame"
	TestAccept   = "test run: accepted datagram"
	TestFloor    = "test run: a program that only drops"
)

// The ways that others are compared with.
const (
	Plain      = "plain host"
	XtCluster  = "xt_cluster"
	Floor      = "a program that only drops (XDP)"
	HashFloor  = "a program that only hashes (XDP)"
	Uninvolved = "uninvolved host"
)

// reference is whom the others are measured beside.
func reference(work string) string {
	if work == Discard {
		return XtCluster
	}
	return Plain
}

// The floors: ways that do nothing of what a cluster has to do, or only a part.
const (
	TwoPlain      = "two plain servers"
	CopyFloor     = "a process that only copies"
	RingFloor     = "a process that only copies from a ring"
	MacvlanFloor  = "a macvlan without programs"
	HashedMacvlan = "a macvlan with programs that only hash"
	NoEngine      = "a node without its engine"
	OneDevice     = "one device"
	OneJudged     = "one device with the filter"
)

// dispatchers are what stands in front of two servers elsewhere.
var dispatchers = []string{"haproxy http", "haproxy tcp", "nginx proxy"}

// add adds a run to its series.
func (r *Report) add(way, work string, run Run) {
	for i := range r.Series {
		if s := &r.Series[i]; s.Way == way && s.Work == work {
			s.Runs = append(s.Runs, run)
			return
		}
	}
	r.Series = append(r.Series, Series{Way: way, Work: work, Runs: []Run{run}})
}

// miss notes what cannot be measured on this machine.
func (r *Report) miss(way, work string, why error) {
	r.Series = append(r.Series, Series{Way: way, Work: work, Why: why.Error()})
}

// sort brings the ways into an order.
func (r *Report) sort(ways []string) {
	slices.SortStableFunc(r.Series, func(a, b Series) int { return slices.Index(ways, a.Way) - slices.Index(ways, b.Way) })
}

// find gives a series; nil if it has no runs.
func (r *Report) find(way, work string) *Series {
	for i := range r.Series {
		if s := &r.Series[i]; s.Way == way && s.Work == work && len(s.Runs) > 0 {
			return s
		}
	}
	return nil
}

// A Figure is a median over the rounds, with the least and the greatest. Without rounds it
// is not OK.
type Figure struct {
	Median, Least, Most float64
	Rounds, Quiet       int // of which it is; and how many of them nobody disturbed
	OK                  bool
}

func figure(values []float64) Figure {
	if len(values) == 0 {
		return Figure{}
	}
	slices.Sort(values)
	n := len(values)
	return Figure{(values[(n-1)/2] + values[n/2]) / 2, values[0], values[n-1], n, 0, true}
}

// choose takes quiet rounds, and others only if there are none.
func choose(quiet, disturbed []float64) Figure {
	if len(quiet) == 0 {
		return figure(disturbed)
	}
	f := figure(quiet)
	f.Quiet = f.Rounds
	return f
}

// What a Figure can be of.
func cpu(r Run) float64  { return r.CPU }
func all(r Run) float64  { return r.All }
func rate(r Run) float64 { return r.Rate }
func p99(r Run) float64  { return r.P99 }

// Of is the figure of a series.
func (r *Report) Of(way, work string, of func(Run) float64) Figure {
	s := r.find(way, work)
	if s == nil {
		return Figure{}
	}
	var values, disturbed []float64
	for _, run := range s.Runs {
		if run.disturbed() {
			disturbed = append(disturbed, of(run))
		} else {
			values = append(values, of(run))
		}
	}
	return choose(values, disturbed)
}

// Ratio is that of one way against another in the same round, each by what stands beside it.
func (r *Report) Ratio(way, other, work string, of func(Run) float64) Figure {
	a, b := r.find(way, work), r.find(other, work)
	if a == nil || b == nil {
		return Figure{}
	}
	var values, disturbed []float64
	for i := range min(len(a.Runs), len(b.Runs)) {
		x, y := of(a.Runs[i]), of(b.Runs[i])
		switch p, q := a.Runs[i].against(of), b.Runs[i].against(of); {
		case other == reference(work) && p > 0:
			x, y = p, 1
		case way == reference(work) && q > 0:
			x, y = 1, q
		case p > 0 && q > 0:
			x, y = p, q
		}
		if x > 0 && y > 0 {
			if a.Runs[i].disturbed() || b.Runs[i].disturbed() {
				disturbed = append(disturbed, x/y)
			} else {
				values = append(values, x/y)
			}
		}
	}
	return choose(values, disturbed)
}

// A Claim is something that the design promises of a figure.
type Claim struct {
	What         string
	Value, Limit float64
	Unit         string
	Rounds       int // quiet ones
	// Bounds are the same figure of floors: whoever keeps the promise takes no less than the
	// least of them. Empty: none was measured.
	Bounds []Bound
	// Going is the way that the floors go, where others are conceivable.
	Going string
}

// A Bound is the figure of a floor.
type Bound struct {
	Way string
	Figure
}

// enough is how many quiet rounds it takes to judge a claim.
const enough = 3

// Judged reports whether there is enough to say whether it holds.
func (c Claim) Judged() bool { return c.Rounds >= enough }

// Holds reports whether the value is not above the limit.
func (c Claim) Holds() bool { return c.Value <= c.Limit }

// OutOfReach reports whether it does not hold and could not for anybody: each floor was above
// the limit in every quiet round.
func (c Claim) OutOfReach() bool {
	return c.Judged() && !c.Holds() && len(c.Bounds) > 0 && !slices.ContainsFunc(c.Bounds, func(b Bound) bool { return b.Quiet < enough || b.Least <= c.Limit })
}

// Claims are what the design promises of what was measured.
func (r *Report) Claims() (claims []Claim) {
	for _, way := range []string{"bpf", "native", "raw"} {
		claims = append(claims, r.claimsOf(way)...)
	}
	for _, way := range []string{"bpf, 2 nodes", "native, 2 nodes"} {
		for _, c := range []struct {
			work  string
			limit float64
		}{{KeepAlive, 0.6}, {Download, 0.4}, {Connection, 1}} {
			against := func(way string) Figure { return r.againstBest(way, c.work, cpu) }
			claims = claim(claims, against(way), c.limit, "", bounds(against, Plain, TwoPlain), "CPU ÷ best dispatcher: %s, %s", way, c.work)
		}
		for _, work := range []string{KeepAlive, Connection} {
			// Not the plain host: one server has more of the machine than each of two.
			against := func(way string) Figure { return r.againstBest(way, work, p99) }
			claims = claim(claims, against(way), 1, "", bounds(against, TwoPlain), "p99 latency ÷ best dispatcher: %s, %s", way, work)
		}
	}
	for _, c := range []struct {
		way   string
		limit float64
	}{{"bpf, XDP", 1. / 8}, {"bpf, tcx", 1. / 2}} {
		against := func(way string) Figure { return r.Ratio(way, XtCluster, Discard, cpu) }
		var floors []string
		if c.way == "bpf, XDP" {
			floors = []string{HashFloor}
		}
		claims = claim(claims, against(c.way), c.limit, "", bounds(against, floors...), "discarded frame ÷ xt_cluster: %s", c.way)
		claims = claim(claims, r.Of(c.way, TestDiscard, cpu), 50, " ns", nil, "discarded frame by BPF_PROG_TEST_RUN: %s", c.way)
	}
	return claims
}

func claim(claims []Claim, f Figure, limit float64, unit string, bounds []Bound, what string, args ...any) []Claim {
	if !f.OK {
		return claims
	}
	return append(claims, Claim{What: fmt.Sprintf(what, args...), Value: f.Median, Limit: limit, Unit: unit, Rounds: f.Quiet, Bounds: bounds})
}

// claimsOf are those of one node with that datapath against the plain host.
func (r *Report) claimsOf(way string) (claims []Claim) {
	floors, going := []string{HashedMacvlan}, "with a macvlan"
	if way == "raw" {
		floors, going = []string{CopyFloor, RingFloor}, "by a process"
	}
	for _, work := range []string{KeepAlive, Connection, Download, Upload} {
		limit := 1.05
		if way == "raw" {
			limit = 1.35
			if work == Upload {
				limit = 1.6
			}
		}
		against := func(way string) Figure { return r.Ratio(way, Plain, work, cpu) }
		claims = claim(claims, against(way), limit, "", bounds(against, floors...), "CPU ÷ plain host: %s, %s", way, work)
	}
	for i := range claims {
		claims[i].Going = going
	}
	return claims
}

// bounds are the figures of those floors that were measured.
func bounds(of func(way string) Figure, floors ...string) (found []Bound) {
	for _, way := range floors {
		if f := of(way); f.OK {
			found = append(found, Bound{way, f})
		}
	}
	return found
}

// againstBest is the ratio to the dispatcher that is hardest to beat.
func (r *Report) againstBest(way, work string, of func(Run) float64) (worst Figure) {
	for _, d := range dispatchers {
		if f := r.Ratio(way, d, work, of); f.OK && (!worst.OK || f.Median > worst.Median) {
			worst = f
		}
	}
	return worst
}

// JSON gives bench.json.
func (r *Report) JSON() ([]byte, error) { return json.MarshalIndent(r, "", "  ") }
