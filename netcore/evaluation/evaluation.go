// Package evaluation repeats the published evaluation of the idea: WebStone's throughput and
// response time against the number of clients, for one machine and for clusters of them, and
// the same for what else there is to share a load. This is the plan, the arithmetic and the
// report; the test bed is in its tests, which "make evaluation" runs.
//
// Every machine of the bed may take a given share of a processor and no more (a cgroup with
// a quota), so that one of them is full long before the real machine is, and further ones
// add what they would add. Nothing is scaled by arithmetic.
package evaluation

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"

	"clonecluster/netcore/webstone"
)

// The ways to serve.
const (
	Plain     = "plain server"
	Clone     = "clone"
	HAProxy   = "haproxy"
	NGINX     = "nginx proxy"
	XtCluster = "xt_cluster"
)

// Setup is a way to serve with so many machines, each of the same quota.
type Setup struct {
	Way string `json:"way"`
	// Machines is all of them: before the servers of haproxy and nginx one is the dispatcher.
	Machines int `json:"machines"`
	// Policy is that of a clone cluster.
	Policy string `json:"policy,omitempty"`
	// Uneven gives the last server half of the quota.
	Uneven bool `json:"uneven,omitempty"`
	// Bystander adds a machine that is none of them, to which the switch floods what it floods to them.
	Bystander bool `json:"bystander,omitempty"`
}

// String is the name in tables.
func (s Setup) String() string {
	text := s.Way
	switch {
	case s.Way == Clone && s.Machines == 1:
		text += ", 1 node"
	case s.Way == Clone:
		text += fmt.Sprintf(", %d nodes", s.Machines)
	case s.Way == HAProxy || s.Way == NGINX:
		text += fmt.Sprintf(" + %d servers", s.Machines-1)
	case s.Machines > 1:
		text += fmt.Sprintf(", %d servers", s.Machines)
	}
	if s.Policy != "" {
		text += ", " + s.Policy
	}
	if s.Uneven {
		text += ", one at half speed"
	}
	if s.Bystander {
		text += ", a bystander"
	}
	return text
}

// Run is one measurement that is to be made.
type Run struct {
	Setup
	Workload  string `json:"workload"`
	Clients   int    `json:"clients"`
	KeepAlive bool   `json:"keep_alive,omitempty"`
	// Share makes it an open loop: requests begin at so many times the rate that one plain
	// server had at best, by the same results.
	Share float64 `json:"share,omitempty"`
	// Kill cuts the power of a server after a third of the time, and gives it back after two.
	Kill bool `json:"kill,omitempty"`
}

// Plan is what is measured, and how.
type Plan struct {
	Quota    float64 `json:"quota"`     // of a machine, in processors
	PeriodMS float64 `json:"period_ms"` // in which it may take that
	// Quotas are those of workloads that have one of their own.
	Quotas map[string]float64 `json:"quotas,omitempty"`
	// ModerationMS is for how long a network card keeps what has come before it interrupts.
	ModerationMS float64 `json:"moderation_ms"`
	WarmUp       float64 `json:"warm_up_s"`
	Window       float64 `json:"window_s"`
	// Settle is how long the clients ask before the first run, where shares follow the load.
	Settle  float64 `json:"settle_s"`
	Timeout float64 `json:"timeout_s"`
	Rounds  int     `json:"rounds"` // each run as often
	// Failovers is how often the time of each fail-over is taken.
	Failovers int   `json:"failovers"`
	Runs      []Run `json:"runs"`
}

// quota is that of a machine that serves a workload.
func (p *Plan) quota(workload string) float64 {
	if q := p.Quotas[workload]; q > 0 {
		return q
	}
	return p.Quota
}

// parts are how many machines of a whole quota a set-up has.
func (s Setup) parts() float64 {
	if s.Uneven {
		return float64(s.Machines) - 0.5
	}
	return float64(s.Machines)
}

// onePart is what of a processor machines may take that are kept on one together, and mostOnOne how many they
// may be: with them grows what their clients and the switch take.
const (
	onePart   = 0.8
	mostOnOne = 4
)

// processors are how many processors the machines of a run are kept on: one if they fit into it, else as many as there
// are machines or processors. It has to be a fast one only, where a virtual machine has not all fast at once all the time.
func (p *Plan) processors(r Run) int {
	if r.parts()*p.quota(r.Workload) <= onePart && r.Machines <= mostOnOne {
		return 1
	}
	return r.Machines
}

// needs is how many of so many processors a set-up has to have for its runs.
func (p *Plan) needs(s Setup, usable int) (n int) {
	for _, r := range p.Runs {
		if r.Setup == s {
			n = max(n, min(p.processors(r), usable))
		}
	}
	return n
}

// next gives the index of the set-up that is to be measured next, where so many of the processors are fast: the first
// of those that need the most of them and no more; if there is none, the first.
func (p *Plan) next(setups []Setup, fast, usable int) (next int) {
	most := 0
	for i, s := range setups {
		if n := p.needs(s, usable); n <= fast && n > most {
			next, most = i, n
		}
	}
	return next
}

// Times are the warm-up and the measured time of a run. With very many clients each of them
// waits for seconds, and there are to be many answers to each.
func (p *Plan) Times(r Run) (warmUp, window time.Duration) {
	warmUp, window = time.Duration(p.WarmUp*float64(time.Second)), time.Duration(p.Window*float64(time.Second))
	switch {
	case r.Clients > 500 && r.Share == 0:
		warmUp, window = 3*warmUp, 3*window/2
	case strings.HasSuffix(r.Workload, overTLS): // whose answers are few
		warmUp *= 2
		if r.Share == 0 { // until the clients wait for as long as they will
			warmUp = max(warmUp, time.Duration(r.Clients)*20*time.Millisecond)
		}
	}
	if r.Kill {
		window *= 3
	}
	return warmUp, window
}

// settle is for how long a set-up is asked before it is measured.
func (p *Plan) settle(s Setup) time.Duration {
	if s.Policy != "byLoad" || !s.Uneven {
		return 0
	}
	return time.Duration(p.Settle * float64(time.Second))
}

// NodeUse is what a machine of the bed took during a run.
type NodeUse struct {
	Name  string  `json:"name"`
	Quota float64 `json:"quota"` // processors
	CPU   float64 `json:"cpu"`
	// Throttled is in what share of the periods it wanted more than it has.
	Throttled float64 `json:"throttled"`
	// Buckets is the share of a cluster's node at the end.
	Buckets int `json:"buckets,omitempty"`
}

// Full reports whether it took what it may: that was the limit then.
func (n NodeUse) Full() bool { return n.CPU > 0.9*n.Quota || n.Throttled > 0.5 }

// Measured is a run as it went.
type Measured struct {
	Run
	Round  int              `json:"round"`
	Result *webstone.Result `json:"result"`
	Nodes  []NodeUse        `json:"nodes"`
	// Idle is how many processors of the real machine nobody wanted, and Others how many
	// were taken by what has nothing to do with it.
	Idle   float64 `json:"idle"`
	Others float64 `json:"others"`
	// Pace is how fast the slowest processor of those that the machines were on was right before and right
	// after, at worst, in what one was at its best; 0: not known.
	Pace float64 `json:"pace,omitempty"`
}

// robbed reports whether somebody else took a part of the processors: another program, or another machine on
// the same hardware.
func (m *Measured) robbed() bool {
	return m.Others > mostOthers || m.Pace > 0 && m.Pace < leastPace
}

// sounder reports whether nobody took a part, or less than of another run.
func (m *Measured) sounder(than *Measured) bool {
	return !m.robbed() || m.Pace-m.Others > than.Pace-than.Others
}

// Disturbed reports whether the figures are those of the real machine rather than of the bed:
// it had nothing left, or others had a large part of it, or in a closed loop without errors
// not all clients had a request under way.
func (m *Measured) Disturbed() bool {
	if m.Idle < leastIdle || m.robbed() {
		return true
	}
	t := m.Result.Total()
	return m.Share == 0 && t.Failed() == 0 && t.Load() < 0.9*float64(m.Clients)
}

// leastIdle is how many processors have to be left of a run, mostOthers how many others may take, and leastPace
// what has to be left of their pace.
const (
	leastIdle  = 0.1
	mostOthers = 0.3
	leastPace  = 0.8
)

// Failover is how long a way to serve was away when its machine was lost, per trial.
type Failover struct {
	Way     string    `json:"way"`
	Seconds []float64 `json:"seconds,omitempty"`
	Why     string    `json:"why,omitempty"` // what this machine lacks for it
}

// Report is all of the results.
type Report struct {
	Date       string            `json:"date"`
	Machine    string            `json:"machine"`
	Kernel     string            `json:"kernel"`
	Processors int               `json:"processors"`
	Versions   map[string]string `json:"versions"` // of the programs that took part
	// Rest is what the busiest machine of a set-up takes of a processor when nobody asks.
	Rest map[string]float64 `json:"rest,omitempty"`
	// Accounting says whose time the kernel's network work was.
	Accounting string            `json:"accounting"`
	Plan       Plan              `json:"plan"`
	Runs       []*Measured       `json:"runs"`
	Missing    map[string]string `json:"missing,omitempty"` // set-ups, and what this machine lacks for them
	Failovers  []Failover        `json:"failovers,omitempty"`
	Configs    map[string]string `json:"configs,omitempty"` // as the dispatchers were given them
	// Best is the pace of a processor at its best, in signatures a second.
	Best float64 `json:"best,omitempty"`
	// Complete reports whether all of the plan was measured.
	Complete bool `json:"complete"`
}

// at gives a run as it went in a round; nil if it was not made.
func (r *Report) at(run Run, round int) *Measured {
	if i := slices.IndexFunc(r.Runs, func(m *Measured) bool { return m.Run == run && m.Round == round }); i >= 0 {
		return r.Runs[i]
	}
	return nil
}

// Enter adds a run, instead of the same one of before if there is one.
func (r *Report) Enter(m *Measured) {
	if old := r.at(m.Run, m.Round); old != nil {
		*old = *m
		return
	}
	r.Runs = append(r.Runs, m)
}

// Point is the figures of a run over the rounds.
type Point struct {
	Run
	Rounds            int
	Mbit, Least, Most float64 // the median, and the ends
	Rate              float64
	Total             *webstone.Window // of all rounds
	Disturbed         bool             // all of the rounds were
	Generator, Idle   float64          // processors, the worst of the rounds
	Full              int              // nodes that were, in most rounds
	// Request is what all machines together take of a processor for one, in seconds, and Aside what
	// it takes a bystander; 0 if none was answered, or there is none.
	Request, Aside float64
}

// bystander is the name of a machine that has nothing to do with what is asked.
const bystander = "bystander"

// point takes the rounds of a run that nobody disturbed, or all if there is none; nil
// without any.
func (r *Report) point(run Run) *Point {
	var quiet, all []*Measured
	for _, m := range r.Runs {
		if m.Run != run || m.Result == nil {
			continue
		}
		if all = append(all, m); !m.Disturbed() {
			quiet = append(quiet, m)
		}
	}
	if len(all) == 0 {
		return nil
	}
	p := &Point{Run: run, Disturbed: len(quiet) == 0}
	if len(quiet) > 0 {
		all = quiet
	}
	merged := &webstone.Result{}
	p.Idle = all[0].Idle
	full, taken, aside, answered := 0, 0., 0., 0.
	for _, m := range all {
		for _, n := range m.Nodes {
			if n.Name == bystander {
				aside += n.CPU
			} else {
				taken += n.CPU
			}
		}
		answered += m.Result.Total().Rate()
		merged.Windows = append(merged.Windows, m.Result.Windows...)
		p.Idle = min(p.Idle, m.Idle)
		for _, n := range m.Nodes {
			if n.Name != bystander && n.Full() {
				full++
			}
		}
	}
	p.Full = (full + len(all)/2) / len(all)
	p.Rounds = len(all)
	if answered > 0 {
		p.Request, p.Aside = taken/answered, aside/answered
	}
	p.Total = merged.Total()
	p.Mbit = merged.Median((*webstone.Window).Throughput)
	p.Rate = merged.Median((*webstone.Window).Rate)
	for i, w := range merged.Windows {
		x := w.Throughput()
		if p.Generator = max(p.Generator, w.CPU); i == 0 {
			p.Least = x
		}
		p.Least, p.Most = min(p.Least, x), max(p.Most, x)
	}
	return p
}

// points are those of a set-up in a closed loop, by the number of clients.
func (r *Report) points(s Setup, workload string, keepAlive bool) (points []*Point) {
	for _, n := range r.clients() {
		if p := r.point(Run{Setup: s, Workload: workload, Clients: n, KeepAlive: keepAlive}); p != nil {
			points = append(points, p)
		}
	}
	return points
}

// best is the most requests per second that one plain server has answered, at worst at a
// disturbed time; 0 if that was not measured.
func (r *Report) best(workload string) (best float64) {
	for _, p := range r.points(Setup{Way: Plain, Machines: 1}, workload, false) {
		best = max(best, p.Rate)
	}
	return best
}

// clients are all numbers of clients, the least first.
func (r *Report) clients() (all []int) {
	for _, m := range r.Runs {
		all = append(all, m.Clients)
	}
	slices.Sort(all)
	return slices.Compact(all)
}

// setups are all that were measured, in the order of the report.
func (r *Report) setups() (all []Setup) {
	for _, m := range r.Runs {
		if !slices.Contains(all, m.Setup) {
			all = append(all, m.Setup)
		}
	}
	order := []string{Plain, Clone, XtCluster, HAProxy, NGINX}
	slices.SortStableFunc(all, func(a, b Setup) int {
		uneven := func(s Setup) int {
			switch {
			case s.Uneven:
				return 1
			case s.Bystander:
				return 2
			}
			return 0
		}
		return cmp.Or(uneven(a)-uneven(b), slices.Index(order, a.Way)-slices.Index(order, b.Way), cmp.Compare(a.Machines, b.Machines), cmp.Compare(a.Policy, b.Policy))
	})
	return all
}

// Errors says how many requests failed, and of what.
func Errors(w *webstone.Window) string {
	if w.Failed() == 0 {
		return "0"
	}
	var kinds []string
	for k, n := range w.Errors {
		kinds = append(kinds, fmt.Sprintf("%d %s", n, k))
	}
	slices.Sort(kinds)
	return strings.Join(kinds, ", ")
}
