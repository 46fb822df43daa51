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
