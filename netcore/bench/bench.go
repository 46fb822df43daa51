// Package bench compares what a request costs when it is answered by a plain host, by
// a cluster on each datapath, and by servers behind a dispatcher; and what it costs a
// node to discard a frame. The measuring is in its tests, which "make bench" runs; this
// is the arithmetic and the report.
//
// What is measured is the processor time of the whole machine, of which everything is a
// part: clients, servers, dispatcher, engine, and the work of the kernel for the network,
// which is nobody's. So the machine must have nothing else to do. Every figure is taken in
// rounds in which all take turns, and is a ratio to the plain host of the same round.
package bench

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
)

// Run is one measurement of one way to serve in one round.
type Run struct {
	CPU  float64 `json:"cpu_ns"`           // of the whole machine, per request, octet or frame
	Rate float64 `json:"rate"`             // of those a second
	P99  float64 `json:"p99_ns,omitempty"` // latency of requests; 0: not measured
}

// Series is what one way to serve cost at one kind of work, round by round.
type Series struct {
	Way  string `json:"way"`
	Work string `json:"work"`
	Runs []Run  `json:"runs"`
	// Why says why there are none.
	Why string `json:"why,omitempty"`
}

// Report is all of a run.
type Report struct {
	Kernel     string   `json:"kernel"`
	Processors int      `json:"processors"`
	Rounds     int      `json:"rounds"`
	Series     []Series `json:"series"`
}

// A Claim is something that the design promises.
type Claim struct {
	What  string
	Value float64
	Limit float64
}

// Holds reports whether the value is not above the limit.
func (c Claim) Holds() bool { return c.Value <= c.Limit }

// find gives a series; nil if it has no runs.
func (r *Report) find(way, work string) *Series {
	for i := range r.Series {
		if s := &r.Series[i]; s.Way == way && s.Work == work && len(s.Runs) > 0 {
			return s
		}
	}
	return nil
}

// Ratio is the median over the rounds of what way cost against what other cost in the
// same round, with the least and the greatest; ok is false if one of them is missing.
func (r *Report) Ratio(way, other, work string, of func(Run) float64) (median, least, most float64, ok bool) {
	a, b := r.find(way, work), r.find(other, work)
	if a == nil || b == nil {
		return 0, 0, 0, false
	}
	var ratios []float64
	for i := range min(len(a.Runs), len(b.Runs)) {
		if x, y := of(a.Runs[i]), of(b.Runs[i]); x > 0 && y > 0 {
			ratios = append(ratios, x/y)
		}
	}
	if len(ratios) == 0 {
		return 0, 0, 0, false
	}
	slices.Sort(ratios)
	return middle(ratios), ratios[0], ratios[len(ratios)-1], true
}

// CPU, Rate and P99 are what Ratio can compare.
func CPU(r Run) float64  { return r.CPU }
func Rate(r Run) float64 { return r.Rate }
func P99(r Run) float64  { return r.P99 }

// Median is that of one figure of a series.
func (r *Report) Median(way, work string, of func(Run) float64) (float64, bool) {
	s := r.find(way, work)
	if s == nil {
		return 0, false
	}
	var all []float64
	for _, run := range s.Runs {
		all = append(all, of(run))
	}
	slices.Sort(all)
	return middle(all), true
}

func middle(sorted []float64) float64 {
	n := len(sorted)
	if n%2 == 1 {
		return sorted[n/2]
	}
	return (sorted[n/2-1] + sorted[n/2]) / 2
}

// The kinds of work, in the order of the table.
const (
	KeepAlive  = "keep-alive"
	Connection = "connection per request"
	Download   = "download"
	Upload     = "upload"
	Discard    = "discarded frame"
)

// The ways to serve.
const (
	Plain      = "plain host"
	None       = "nobody listens"
	Uninvolved = "uninvolved host"
)

// dispatchers are what stands in front of two servers elsewhere.
var dispatchers = []string{"haproxy http", "haproxy tcp", "nginx proxy"}

// Claims are what the design promises of what was measured.
func (r *Report) Claims() (claims []Claim) {
	add := func(what string, value float64, ok bool, limit float64) {
		if ok {
			claims = append(claims, Claim{what, value, limit})
		}
	}
	for _, work := range []string{KeepAlive, Connection, Download, Upload} {
		for _, way := range []string{"bpf", "raw"} {
			limit := 1.05
			if way == "raw" {
				limit = 1.35
				if work == Upload {
					limit = 1.6
				}
			}
			m, _, _, ok := r.Ratio(way, Plain, work, CPU)
			add(fmt.Sprintf("CPU of %s, %s, against the plain host", way, work), m, ok, limit)
		}
	}
	const cluster = "bpf, 2 nodes"
	for _, c := range []struct {
		work  string
		limit float64
	}{{KeepAlive, 0.6}, {Download, 0.4}, {Connection, 1}} {
		best, ok := 0.0, false
		for _, d := range dispatchers {
			if m, _, _, have := r.Ratio(cluster, d, c.work, CPU); have && m > best {
				best, ok = m, true
			}
		}
		add(fmt.Sprintf("CPU of two nodes, %s, against the best dispatcher", c.work), best, ok, c.limit)
	}
	for _, work := range []string{KeepAlive, Connection} {
		worst, ok := 0.0, false
		for _, d := range dispatchers {
			if m, _, _, have := r.Ratio(cluster, d, work, P99); have {
				worst, ok = max(worst, m), true
			}
		}
		add(fmt.Sprintf("p99 of two nodes, %s, against the best dispatcher", work), worst, ok, 1)
	}
	for _, c := range []struct {
		way   string
		limit float64
	}{{"bpf, XDP", 1.0 / 8}, {"bpf, tcx", 1.0 / 2}} {
		m, ok := r.discard(c.way)
		x, ok2 := r.discard("xt_cluster")
		if ok && ok2 && x > 0 {
			add(fmt.Sprintf("a discarded frame, %s, against xt_cluster", c.way), m/x, true, c.limit)
		}
	}
	return claims
}

// discard is what a frame costs its receiver: the median over the rounds of what it
// costs the machine more than one that nobody receives.
func (r *Report) discard(way string) (float64, bool) {
	a, b := r.find(way, Discard), r.find(None, Discard)
	if a == nil || b == nil {
		return 0, false
	}
	var more []float64
	for i := range min(len(a.Runs), len(b.Runs)) {
		more = append(more, a.Runs[i].CPU-b.Runs[i].CPU)
	}
	slices.Sort(more)
	return middle(more), true
}

// JSON gives bench.json.
func (r *Report) JSON() ([]byte, error) { return json.MarshalIndent(r, "", "  ") }

// Markdown gives benchmarks.md.
func (r *Report) Markdown() []byte {
	var b strings.Builder
	say := func(format string, args ...any) { fmt.Fprintf(&b, format+"\n", args...) }
	say("# What a request costs")
	say("")
	say("Written by `make bench` (as root, on a machine with nothing else to do): Linux %s, %d processors, %d rounds in which all took", r.Kernel, r.Processors, r.Rounds)
	say("turns. Clients, switch, dispatcher and servers are network namespaces of one machine; the switch is a Linux bridge.")
	say("")
	say("## CPU")
	say("")
	say("The processor time of all of them together, the kernel's network work included, for one request or one octet, divided by")
	say("that of the plain host in the same round: the median, and the least and the greatest of all rounds. *2 nodes*: two servers,")
	say("and the dispatchers stand in front of the same two.")
	say("")
	works := []string{KeepAlive, Connection, Download, Upload}
	say("| | %s |", strings.Join(works, " | "))
	say("|---|%s", strings.Repeat("---|", len(works)))
	for _, way := range r.ways(works...) {
		cells := []string{}
		for _, work := range works {
			cell := "–"
			if m, least, most, ok := r.Ratio(way, Plain, work, CPU); ok {
				cell = fmt.Sprintf("%.2f (%.2f–%.2f)", m, least, most)
				if way == Plain {
					cell = "1.00"
				}
			}
			cells = append(cells, cell)
		}
		say("| %s | %s |", way, strings.Join(cells, " | "))
	}
	say("")
	say("## Rate and latency")
	say("")
	say("Requests or octets a second against the plain host, and the 99th percentile of a request's latency against its own.")
	say("")
	say("| | %s | p99 %s | p99 %s |", strings.Join(works, " | "), KeepAlive, Connection)
	say("|---|%s", strings.Repeat("---|", len(works)+2))
	for _, way := range r.ways(works...) {
		cells := []string{}
		for _, work := range works {
			cells = append(cells, cell(r.Ratio(way, Plain, work, Rate)))
		}
		for _, work := range works[:2] {
			cells = append(cells, cell(r.Ratio(way, Plain, work, P99)))
		}
		say("| %s | %s |", way, strings.Join(cells, " | "))
	}
	say("")
	say("## A frame for another node")
	say("")
	say("Small TCP segments to the VIP whose flows belong to another node, from a generator on the same switch: what one costs the")
	say("machine more than when nobody is at the port. *Uninvolved* is a host to which they are flooded and that has nothing to do with")
	say("the VIP.")
	say("")
	say("| | ns a frame | ÷ xt_cluster |")
	say("|---|---|---|")
	for _, way := range r.ways(Discard) {
		m, ok := r.discard(way)
		if !ok || way == None {
			continue
		}
		against := "–"
		if x, ok := r.discard("xt_cluster"); ok && x > 0 {
			against = fmt.Sprintf("%.2f", m/x)
		}
		say("| %s | %.0f | %s |", way, m, against)
	}
	say("")
	say("The same without the driver and the bridge, by `BPF_PROG_TEST_RUN`: `go test -run ^$ -bench Verdict ./netcore/bpf`.")
	say("")
	say("## What is promised")
	say("")
	say("| | measured | promised | |")
	say("|---|---|---|---|")
	for _, c := range r.Claims() {
		holds := "holds"
		if !c.Holds() {
			holds = "**does not hold**"
		}
		say("| %s | %.2f | ≤ %.2f | %s |", c.What, c.Value, c.Limit, holds)
	}
	for _, s := range r.Series {
		if s.Why != "" {
			say("")
			say("%s, %s: not measured, as %s", s.Way, s.Work, s.Why)
		}
	}
	return []byte(b.String())
}

func cell(median, _, _ float64, ok bool) string {
	if !ok {
		return "–"
	}
	return fmt.Sprintf("%.2f", median)
}

// ways are those that did some of the works, in the order of the report.
func (r *Report) ways(works ...string) (ways []string) {
	for _, s := range r.Series {
		if slices.Contains(works, s.Work) && len(s.Runs) > 0 && !slices.Contains(ways, s.Way) {
			ways = append(ways, s.Way)
		}
	}
	return ways
}
