package bench

import (
	"errors"
	"strings"
	"testing"
)

func TestReport(t *testing.T) {
	r := &Report{Kernel: "6.12", Processors: 2, Rounds: 3}
	add := func(way, work string, costs ...float64) {
		for _, c := range costs {
			r.add(way, work, Run{CPU: c, All: 2 * c, Rate: 1 / c, P99: c})
		}
	}
	// The machine is ten times slower in the second round; the ratios are not.
	add("raw", KeepAlive, 14, 150, 13)
	add(Plain, KeepAlive, 10, 100, 10)
	add("bpf", KeepAlive, 10.4, 100, 11)
	add("bpf, 2 nodes", KeepAlive, 12, 120, 12)
	add("haproxy tcp", KeepAlive, 22, 220, 22)
	add("nginx proxy", KeepAlive, 15, 150, 15)
	add(XtCluster, Discard, 800, 800, 800)
	add("bpf, tcx", Discard, 500, 500, 300)
	add("bpf, XDP", Discard, 20, 40, 10)
	add("bpf, XDP", TestDiscard, 49, 51, 48)
	// In the third round others were at work.
	r.add(Plain, Upload, Run{CPU: 10})
	r.add(Plain, Upload, Run{CPU: 10})
	r.add(Plain, Upload, Run{CPU: 10})
	r.add("bpf", Upload, Run{CPU: 10})
	r.add("bpf", Upload, Run{CPU: 12})
	r.add("bpf", Upload, Run{CPU: 40, Others: 0.9})
	if f := r.Ratio("bpf", Plain, Upload, cpu); f != (Figure{1.1, 1, 1.2, 2, 2, true}) {
		t.Errorf("with a disturbed round the ratio is %+v; want 1.1 from 1 to 1.2", f)
	}
	r.miss("native", "requests", errors.New("no such kernel"))
	r.sort([]string{Plain, "bpf", "raw"})

	for _, c := range r.Claims() {
		if want := c.What != "CPU ÷ plain host: bpf, upload"; c.Judged() != want {
			t.Errorf("%s, of %d quiet rounds: judged %v; want %v", c.What, c.Rounds, c.Judged(), want)
		}
	}
	got := map[string]bool{}
	for _, c := range r.Claims() {
		got[c.What] = c.Holds()
	}
	want := map[string]bool{
		"CPU ÷ plain host: bpf, keep-alive":                       true,
		"CPU ÷ plain host: bpf, upload":                           false,
		"CPU ÷ plain host: raw, keep-alive":                       false,
		"CPU ÷ best dispatcher: bpf, 2 nodes, keep-alive":         false,
		"p99 latency ÷ best dispatcher: bpf, 2 nodes, keep-alive": true,
		"discarded frame ÷ xt_cluster: bpf, XDP":                  true,
		"discarded frame ÷ xt_cluster: bpf, tcx":                  false,
		"discarded frame by BPF_PROG_TEST_RUN: bpf, XDP":          true,
	}
	for what := range got {
		if _, ok := want[what]; !ok {
			t.Errorf("claims have %q, of which nothing was measured", what)
		}
	}
	for what, holds := range want {
		if is, ok := got[what]; !ok || is != holds {
			t.Errorf("%s: holds %v, judged %v; want %v", what, is, ok, holds)
		}
	}
	text := string(r.Markdown(nil, nil))
	for _, line := range []string{
		"| plain host | 1.00 | – | – | 1.00 |", "| raw | 1.40 (1.30–1.50) | – | – | – |", "| xt_cluster | 800 (800–800) | 1.00 | – | – |",
		"| bpf, XDP | 20 (10–40) | 0.03 (0.01–0.05) | – | – |", "- native, requests: no such kernel", "| ≤ 50 ns | holds |", "| ≤ 0.125 | holds |",
	} {
		if !strings.Contains(text, line) {
			t.Errorf("the report lacks %q:\n%s", line, text)
		}
	}
	if i, j, k := strings.Index(text, "| plain host"), strings.Index(text, "| bpf |"), strings.Index(text, "| raw |"); i > j || j > k {
		t.Errorf("the order is %d, %d, %d:\n%s", i, j, k, text)
	}
}

// TestBeside: what was measured right beside a run counts, and not what the reference took at
// another time of the round.
func TestBeside(t *testing.T) {
	r := &Report{}
	for i := range 3 {
		slow := float64(i + 1) // how slow the machine is when the others are measured
		beside := func(slow float64, run Run) Run {
			run.CPU, run.Rate = run.CPU*slow, run.Rate/slow
			run.Beside = between(Run{CPU: 9 * slow, Rate: 100 / slow, Others: 0.1}, Run{CPU: 11 * slow, Rate: 100 / slow})
			return run
		}
		r.add(Plain, KeepAlive, Run{CPU: 10, Rate: 100, P99: 1})
		r.add("bpf", KeepAlive, beside(slow, Run{CPU: 11, Rate: 90, P99: 2}))
		r.add("nginx proxy", KeepAlive, beside(slow+1, Run{CPU: 22, Rate: 50, P99: 4}))
		r.add(XtCluster, Discard, Run{CPU: 400})
		r.add("bpf, tcx", Discard, Run{CPU: 150 * slow, Beside: &Run{CPU: 300 * slow}})
	}
	for _, tt := range []struct {
		way, other, work string
		of               func(Run) float64
		want             float64
	}{
		{"bpf", Plain, KeepAlive, cpu, 1.1}, {"bpf", Plain, KeepAlive, rate, 0.9}, {"bpf", Plain, KeepAlive, p99, 2},
		{"bpf", "nginx proxy", KeepAlive, cpu, 0.5}, {"bpf", "nginx proxy", KeepAlive, p99, 0.5}, {Plain, "nginx proxy", KeepAlive, cpu, 1 / 2.2},
		{Plain, Plain, KeepAlive, cpu, 1}, {"bpf, tcx", XtCluster, Discard, cpu, 0.5},
	} {
		f := r.Ratio(tt.way, tt.other, tt.work, tt.of)
		if off := max(f.Most-tt.want, tt.want-f.Least); !f.OK || off > 1e-9 || f.Quiet != 3 {
			t.Errorf("%s ÷ %s, %s: %+v; want %v in three quiet rounds", tt.way, tt.other, tt.work, f, tt.want)
		}
	}
	r.find("bpf", KeepAlive).Runs[1].Beside.Others = 0.6
	if f := r.Ratio("bpf", Plain, KeepAlive, cpu); f.Quiet != 2 {
		t.Errorf("with a disturbed reference there are %d quiet rounds; want 2", f.Quiet)
	}
}

// TestOutOfReach: a promise is out of reach when every floor was above it in each of enough
// quiet rounds, and otherwise it is broken.
func TestOutOfReach(t *testing.T) {
	tests := []struct {
		name   string
		floors map[string][]Run
		want   string // what the report says of raw, whose promise is 1.35
	}{
		{"no floor", nil, "**does not hold** |"},
		{"a floor above it", map[string][]Run{CopyFloor: {{CPU: 15}, {CPU: 14}, {CPU: 16}}}, "out of reach by a process: a process that only copies takes 1.50 (1.40–1.60) |"},
		{"a floor that once was not", map[string][]Run{CopyFloor: {{CPU: 15}, {CPU: 13.5}, {CPU: 16}}}, "**does not hold**; a process that only copies takes 1.50 (1.35–1.60) |"},
		{"a floor below it", map[string][]Run{CopyFloor: {{CPU: 11}, {CPU: 11}, {CPU: 11}}}, "**does not hold**; a process that only copies takes 1.10 (1.10–1.10) |"},
		{"one of two below it", map[string][]Run{CopyFloor: {{CPU: 15}, {CPU: 15}, {CPU: 15}}, RingFloor: {{CPU: 12}, {CPU: 12}, {CPU: 12}}},
			"**does not hold**; a process that only copies takes 1.50 (1.50–1.50), a process that only copies from a ring takes 1.20 (1.20–1.20) |"},
		{"both above it", map[string][]Run{CopyFloor: {{CPU: 15}, {CPU: 15}, {CPU: 15}}, RingFloor: {{CPU: 14}, {CPU: 14}, {CPU: 14}}},
			"out of reach by a process: a process that only copies takes 1.50 (1.50–1.50), a process that only copies from a ring takes 1.40 (1.40–1.40) |"},
		{"too few quiet rounds", map[string][]Run{CopyFloor: {{CPU: 15}, {CPU: 15}, {CPU: 15, Others: 0.9}}}, "**does not hold**; a process that only copies takes 1.50 (1.50–1.50) |"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			r := &Report{}
			for range enough {
				r.add(Plain, KeepAlive, Run{CPU: 10})
				r.add("raw", KeepAlive, Run{CPU: 20})
			}
			for way, runs := range tt.floors {
				for _, run := range runs {
					r.add(way, KeepAlive, run)
				}
			}
			if text := string(r.Markdown(nil, nil)); !strings.Contains(text, "| CPU ÷ plain host: raw, keep-alive | 2.00 | ≤ 1.35 | "+tt.want) {
				t.Errorf("the report lacks %q:\n%s", tt.want, text)
			}
		})
	}
}

// TestOutOfReachOfHashing: what has to hash is judged by floors that only hash, and not by those
// that do less.
func TestOutOfReachOfHashing(t *testing.T) {
	for least, want := range map[float64]string{
		126: "out of reach: a program that only hashes (XDP) takes 0.130 (0.126–0.131) |",
		125: "**does not hold**; a program that only hashes (XDP) takes 0.130 (0.125–0.131) |",
	} {
		r := &Report{}
		for i := range enough {
			r.add(XtCluster, Discard, Run{CPU: 1000})
			r.add("bpf, XDP", Discard, Run{CPU: 150})
			r.add(Floor, Discard, Run{CPU: 90})
			r.add(HashFloor, Discard, Run{CPU: []float64{131, least, 130}[i]})
			r.add(Plain, Connection, Run{CPU: 100})
			r.add("native", Connection, Run{CPU: 108})
			r.add(MacvlanFloor, Connection, Run{CPU: 104})
			r.add(HashedMacvlan, Connection, Run{CPU: 106})
		}
		text := string(r.Markdown(nil, nil))
		for _, line := range []string{"| discarded frame ÷ xt_cluster: bpf, XDP | 0.150 | ≤ 0.125 | " + want,
			"| CPU ÷ plain host: native, connection per request | 1.08 | ≤ 1.05 | out of reach with a macvlan: a macvlan with programs that only hash takes 1.06 (1.06–1.06) |"} {
			if !strings.Contains(text, line) {
				t.Errorf("the report lacks %q:\n%s", line, text)
			}
		}
	}
}

// TestOutOfReachOfDispatchers: the plain host is a floor of what a cluster takes against a
// dispatcher, and none of its latency.
func TestOutOfReachOfDispatchers(t *testing.T) {
	r := &Report{}
	for range enough {
		for way, cost := range map[string]float64{Plain: 10, TwoPlain: 11, "bpf, 2 nodes": 12, "nginx proxy": 20, "haproxy tcp": 30} {
			for _, work := range []string{KeepAlive, Download} {
				r.add(way, work, Run{CPU: cost, P99: cost})
			}
		}
	}
	latency := func(ps ...float64) (runs []Run) {
		for _, p := range ps {
			runs = append(runs, Run{CPU: 20, P99: p})
		}
		return runs
	}
	r.find("nginx proxy", KeepAlive).Runs = latency(10, 10, 10)
	lines := []string{
		"| CPU ÷ best dispatcher: bpf, 2 nodes, keep-alive | 0.60 | ≤ 0.60 | holds |",
		"| CPU ÷ best dispatcher: bpf, 2 nodes, download | 0.60 | ≤ 0.40 | out of reach: the plain host alone takes 0.50 (0.50–0.50), two plain servers take 0.55 (0.55–0.55) |",
	}
	check := func(p99 string) {
		t.Helper()
		text := string(r.Markdown(nil, nil))
		for _, line := range append(lines, "| p99 latency ÷ best dispatcher: bpf, 2 nodes, keep-alive | 1.20 | ≤ 1.00 | "+p99) {
			if !strings.Contains(text, line) {
				t.Errorf("the report lacks %q:\n%s", line, text)
			}
		}
	}
	check("out of reach: two plain servers take 1.10 (1.10–1.10) |")
	r.find("nginx proxy", KeepAlive).Runs = latency(10, 10, 11)
	check("**does not hold**; two plain servers take 1.10 (1.00–1.10) |")
}
