package evaluation

import (
	"bytes"
	"encoding/json"
	"encoding/xml"
	"errors"
	"flag"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"clonecluster/netcore/webstone"
)

// window is one of a server with that rate and mean response time.
func window(rate float64, mean time.Duration) *webstone.Window {
	w := &webstone.Window{Seconds: 10, Requests: uint64(10 * rate), Bytes: uint64(10 * rate * 2000), CPU: 0.3}
	for i := range 1000 {
		w.Latency.Add(mean/2 + mean*time.Duration(i)/1000)
	}
	w.Busy = 10 * rate * mean.Seconds()
	return w
}

// fixture is what a machine might have measured whose servers can do 1000 requests a second
// each, but for one that was disturbed, and an nginx that is too good.
func fixture() *Report {
	r := &Report{
		Date: "2026-01-02", Machine: "An Example", Kernel: "6.12", Processors: 2, Versions: map[string]string{"nginx": "1.22.1", "Go": "1.26"},
		Accounting: "Whose time it was.", Plan: Plan{Quota: .05, Quotas: map[string]float64{"2k over TLS": .17}, PeriodMS: 20, ModerationMS: 1, WarmUp: 1, Window: 10, Timeout: 10, Rounds: 2},
		Missing:   map[string]string{"xt_cluster, 4 servers": "no such match"},
		Failovers: []Failover{{Way: CloneFailover, Seconds: []float64{.3, .2, .25}}, {Way: CloneFast, Seconds: []float64{.3, .2, .25}}, {Way: KeepalivedDefault, Seconds: []float64{3.5, 3.6, 3.4}}, {Way: KeepalivedTuned, Seconds: []float64{.4, .4, .4}}},
		Rest:      map[string]float64{"clone, 2 nodes, byRandom": .0061},
		Configs:   map[string]string{"haproxy": "global\n maxconn 2000\n"},
	}
	for _, n := range []int{10, 110, 200} {
		r.had(Setup{Way: Plain, Machines: 1}, n, min(1000, 50*float64(n)), 1)
		r.had(Setup{Way: Clone, Machines: 2, Policy: "byRandom"}, n, min(1950, 49.5*float64(n)), 1)
		r.had(Setup{Way: Clone, Machines: 2, Policy: "byLoad"}, n, min(1700, 49.5*float64(n)), 1)
		r.had(Setup{Way: Clone, Machines: 4, Policy: "byRandom"}, n, min(3800, 49.5*float64(n)), 0.02)
		r.had(Setup{Way: HAProxy, Machines: 4}, n, min(600, 30*float64(n)), 1)
	}
	return r
}

// TestFlooded: what others' requests take a bystander bounds what a cluster can have, where it is known well
// enough; and it is in no drawing and no sum.
func TestFlooded(t *testing.T) {
	beside := func(nodes int) Setup { return Setup{Way: Clone, Machines: nodes, Policy: "byRandom", Bystander: true} }
	report := func(change func(*Report)) *Report {
		r := &Report{Plan: Plan{Quota: .05, PeriodMS: 20}}
		r.had(Setup{Way: Plain, Machines: 1}, 200, 1000, 1) // 49.9 µs each
		r.had(Setup{Way: Clone, Machines: 4, Policy: "byRandom"}, 200, 2400, 1)
		r.had(beside(2), 200, 1500, 1)
		r.had(beside(4), 200, 2500, 1)
		for _, m := range r.Runs {
			if m.Setup.Bystander { // 10 µs for each request, and 10 ms a second to be woken
				m.Nodes = append(m.Nodes, NodeUse{Name: bystander, Quota: .05, CPU: .01 + .00001*m.Result.Windows[0].Rate(), Throttled: .9})
			}
		}
		change(r)
		return r
	}
	bound := "out of reach: 2.50 at most, by what others' requests take a bystander"
	for name, tt := range map[string]struct {
		change func(*Report)
		want   string
	}{
		"as it was":      {func(*Report) {}, bound},
		"no bystander":   {func(r *Report) { r.drop(beside(2)); r.drop(beside(4)) }, doesNotHold},
		"at one rate":    {func(r *Report) { r.drop(beside(2)) }, doesNotHold},
		"once disturbed": {func(r *Report) { r.Runs[len(r.Runs)-1].Idle = 0 }, doesNotHold},
		"no server alone": {func(r *Report) {
			for _, m := range r.Runs[:1] {
				m.Idle = 0
			}
		}, "not judged: 1 of the 2 rounds that it takes"},
	} {
		got := map[string]string{}
		for _, c := range report(tt.change).Claims() {
			got[c.What] = c.Verdict()
		}
		for _, what := range []string{"with the most clients", "from its saturation on, worst"} {
			if what = "clone, 4 nodes, byRandom, 2k: throughput ÷ one server " + what; got[what] != tt.want {
				t.Errorf("%s: %s: %q; want %q", name, what, got[what], tt.want)
			}
		}
	}
	files, err := report(func(*Report) {}).Files()
	text := string(files[Document])
	for line, want := range map[string]bool{
		"| clone, 4 nodes, byRandom, a bystander | 2k | 80 | 120 | 14.0 |": true, "| clone, 4 nodes, byRandom | 2k | 83 | 125 | 11 |": true,
		"| clients | plain server | clone, 4 nodes, byRandom |\n": true, "byRandom, a bystander |\n": false,
	} {
		if err != nil || strings.Contains(text, line) != want {
			t.Errorf("%q is in the report: %v (%v); want %v\n%s", line, !want, err, want, text)
		}
	}
}

// drop forgets a set-up.
func (r *Report) drop(s Setup) {
	r.Runs = slices.DeleteFunc(r.Runs, func(m *Measured) bool { return m.Setup == s })
}

// had enters two rounds in which the machines of a set-up were full.
func (r *Report) had(s Setup, clients int, rate float64, idle float64) {
	nodes := slices.Repeat([]NodeUse{{Name: "server", Quota: .05, CPU: .0499, Throttled: .9}}, s.Machines)
	for round := range 2 {
		mean := time.Duration(float64(clients) / rate * 1e9)
		r.Enter(&Measured{Run: Run{Setup: s, Workload: "2k", Clients: clients}, Round: round, Idle: idle,
			Result: &webstone.Result{Clients: clients, Windows: []*webstone.Window{window(rate, mean)}},
			Nodes:  nodes})
	}
}

// TestClaims: what holds holds, what does not is said not to, and what was disturbed or was
// not done often enough judges nothing.
func TestClaims(t *testing.T) {
	got := map[string]string{}
	for _, c := range fixture().Claims() {
		got[c.What] = c.Verdict()
	}
	want := map[string]string{
		"clone, 2 nodes, byRandom, 2k: throughput ÷ one server below its saturation, worst":                      "holds",
		"clone, 2 nodes, byRandom, 2k: throughput ÷ one server from its saturation on, worst of 2 (median 1.95)": "holds",
		"clone, 2 nodes, byRandom, 2k: throughput ÷ one server with the most clients":                            "holds",
		"clone, 2 nodes, byLoad, 2k: throughput ÷ one server with the most clients":                              "**does not hold**",
		"clone, 4 nodes, byRandom, 2k: throughput ÷ one server with the most clients":                            "not judged: the machine was busy",
		"clone, 2 nodes, byLoad, 2k: throughput ÷ one server below its saturation, worst":                        "holds",
		"clone, 2 nodes, byLoad, 2k: throughput ÷ one server from its saturation on, worst of 2 (median 1.70)":   "**does not hold**",
		"clone, 4 nodes, byRandom, 2k: throughput ÷ one server from its saturation on, worst of 2 (median 3.80)": "not judged: the machine was busy",
		"4 nodes ÷ haproxy + 3 servers, 2k: requests/s with the most clients":                                    "not judged: the machine was busy",
		"4 nodes ÷ haproxy + 3 servers, 2k: p99 with the most clients":                                           "not judged: the machine was busy",
		"fail-over: keepalived, defaults ÷ clone, 2 nodes, medians":                                              "holds",
		"fail-over: keepalived, adverts each 0.1 s ÷ clone, 2 nodes, detect: fast, medians":                      "**does not hold**",
	}
	for what, verdict := range want {
		if got[what] != verdict {
			t.Errorf("%s: %q; want %q", what, got[what], verdict)
		}
	}
	for what := range got {
		if want[what] == "" {
			t.Errorf("a claim that nobody makes: %s: %s", what, got[what])
		}
	}
	r := fixture()
	r.Runs = slices.DeleteFunc(r.Runs, func(m *Measured) bool { return m.Round > 0 })
	for _, c := range r.Claims() {
		if strings.Contains(c.What, "2 nodes, byRandom") && c.Verdict() != "not judged: 1 of the 2 rounds that it takes" {
			t.Errorf("of one round: %s: %s", c.What, c.Verdict())
		}
	}
}

// TestAttainable: what so many clients have of so many servers, against what is known of it: of two clients
// or two servers, and of any number where requests are so small that they fill up what a quota leaves.
func TestAttainable(t *testing.T) {
	// Without a quota, requests of one length go in step. Two servers are a random walk between two walls, 2−1/n;
	// two clients meet at one of m servers as often as not: 2−1/m.
	whole := func(m, n int) float64 { return attainable(m, n, 1, 1, 1000) }
	for _, n := range []int{1, 2, 10, 30, 200} {
		for m, want := range map[int]float64{1: 1, 2: 2 - 1/float64(n)} {
			if got := whole(m, n); got < 0.99*want || got > 1.01*want {
				t.Errorf("%d servers, %d clients: %.3f; want %.3f", m, n, got, want)
			}
		}
	}
	for _, m := range []int{4, 8} {
		if got, want := whole(m, 2), 2-1/float64(m); got < 0.99*want || got > 1.01*want {
			t.Errorf("%d servers, 2 clients: %.3f; want %.3f", m, got, want)
		}
		for _, n := range []int{10, 30} {
			// Exponential ones have this; those of one length have more.
			exponential := float64(m*n) / float64(n+m-1)
			if got := whole(m, n); got < 1.02*exponential || got > float64(m) || got != whole(m, n) {
				t.Errorf("%d servers, %d clients: %.3f; want more than %.3f, each time", m, n, got, exponential)
			}
		}
		// A hundred requests in a period: who has none for a moment has the quota's rest for others.
		if got := attainable(m, 10, 0.01, 0.1, 10); got < 0.95*float64(m) || got > 1.01*float64(m) {
			t.Errorf("%d servers of small requests: %.3f; want nearly %d", m, got, m)
		}
		// A request that takes longer than a period's quota leaves no rest.
		if got, want := attainable(m, 10, 10, 0.1, 10), whole(m, 10); got < 0.97*want || got > 1.15*want {
			t.Errorf("%d servers of long requests: %.3f; want about %.3f", m, got, want)
		}
	}
}

// TestOutOfReach: what nobody can have is told, and is out of reach only if nothing else is missing.
func TestOutOfReach(t *testing.T) {
	for _, tt := range []struct {
		c    Claim
		want string
	}{
		{Claim{Value: 5.1, Limit: 7, AtLeast: true, Rounds: 2, Most: 5.44, Proof: "as it is"}, "out of reach: 5.44 at most, as it is"},
		{Claim{Value: 4, Limit: 7, AtLeast: true, Rounds: 2, Most: 5.44, Proof: "as it is"}, "**does not hold**; 5.44 at most, as it is"},
		{Claim{Value: 6, Limit: 7, AtLeast: true, Rounds: 2, Most: 5.44, Proof: "which is refuted"}, "**does not hold**"},
		{Claim{Value: 6.6, Limit: 7, AtLeast: true, Rounds: 2, Most: 6.8, Proof: "too near"}, "**does not hold**"},
		{Claim{Value: 7, Limit: 7, AtLeast: true, Rounds: 2, Most: 5.44, Proof: "as it is"}, "holds"},
		{Claim{Value: 4, Limit: 7, AtLeast: true, Rounds: 2}, "**does not hold**"},
		{Claim{Value: 5.1, Limit: 7, AtLeast: true, Rounds: 1, Most: 5.44, Proof: "as it is"}, "not judged: 1 of the 2 rounds that it takes"},
		{Claim{Value: 5.1, Limit: 7, AtLeast: true, Rounds: 2, Most: 5.44, Proof: "as it is", Disturbed: true}, "not judged: the machine was busy"},
	} {
		if got := tt.c.Verdict(); got != tt.want {
			t.Errorf("%+v: %q; want %q", tt.c, got, tt.want)
		}
	}
}

// TestFewClients: numbers of clients that cannot keep all servers busy are judged on their own, against what they
// can, and so is what a dispatcher leaves to be won.
func TestFewClients(t *testing.T) {
	r := &Report{Plan: Plan{Quota: .05, PeriodMS: 20}}
	for n, nodes4 := range map[int]float64{10: 33, 50: 37.2, 200: 38} {
		r.had(Setup{Way: Plain, Machines: 1}, n, 10, 1)
		r.had(Setup{Way: Clone, Machines: 2, Policy: "byRandom"}, n, 19, 1)
		r.had(Setup{Way: Clone, Machines: 4, Policy: "byRandom"}, n, nodes4, 1)
		r.had(Setup{Way: HAProxy, Machines: 4}, n, 29, 1)
		r.had(Setup{Way: NGINX, Machines: 4}, n, 26, 1)
	}
	if files, err := r.Files(); err != nil || !strings.Contains(string(files[Document]), "*At most* is what") {
		t.Errorf("the report does not say what out of reach is (%v)", err)
	}
	verdicts := func() map[string]string {
		got := map[string]string{}
		for _, c := range r.Claims() {
			got[c.What] = c.Verdict()
		}
		return got
	}
	got := verdicts()
	for what, verdict := range map[string]string{
		"clone, 2 nodes, byRandom, 2k: throughput ÷ one server from its saturation on, worst of 3 (median 1.90)": "holds",
		"clone, 4 nodes, byRandom, 2k: throughput ÷ one server from its saturation on, worst of 2 (median 3.76)": "holds",
		"clone, 4 nodes, byRandom, 2k: throughput ÷ one server with 10 clients":                                  "out of reach: 3.4",
		"4 nodes ÷ haproxy + 3 servers, 2k: requests/s with the most clients":                                    "out of reach: 1.38 at most, which is 4 times one server's best",
		"4 nodes ÷ nginx proxy + 3 servers, 2k: requests/s with the most clients":                                doesNotHold,
	} {
		if got[what] == "" || !strings.HasPrefix(got[what], verdict) {
			t.Errorf("%s: %q; want %q", what, got[what], verdict)
		}
	}
	// A server's best of which not all is known is none.
	r.Runs[slices.IndexFunc(r.Runs, func(m *Measured) bool { return m.Way == Plain && m.Clients == 10 })].Idle = 0
	if what := "4 nodes ÷ haproxy + 3 servers, 2k: requests/s with the most clients"; verdicts()[what] != doesNotHold {
		t.Errorf("%s: %q; want %q", what, verdicts()[what], doesNotHold)
	}
}

// TestDisturbed: what others took, or another machine, is not held against anybody.
func TestDisturbed(t *testing.T) {
	result := func(clients float64) *webstone.Result {
		return &webstone.Result{Windows: []*webstone.Window{window(clients, time.Second)}}
	}
	for name, tt := range map[string]struct {
		m    Measured
		want bool
	}{
		"quiet":                     {Measured{Run: Run{Clients: 10}, Result: result(10), Idle: 1, Pace: 0.95}, false},
		"its pace is not known":     {Measured{Run: Run{Clients: 10}, Result: result(10), Idle: 1}, false},
		"others":                    {Measured{Run: Run{Clients: 10}, Result: result(10), Idle: 1, Pace: 0.95, Others: 0.4}, true},
		"another machine":           {Measured{Run: Run{Clients: 10}, Result: result(10), Idle: 1, Pace: 0.7}, true},
		"nothing left":              {Measured{Run: Run{Clients: 10}, Result: result(10), Idle: 0.05, Pace: 0.95}, true},
		"not all clients ask":       {Measured{Run: Run{Clients: 10}, Result: result(8), Idle: 1, Pace: 0.95}, true},
		"nor are they to at a rate": {Measured{Run: Run{Clients: 10, Share: 2}, Result: result(8), Idle: 1, Pace: 0.95}, false},
	} {
		if got := tt.m.Disturbed(); got != tt.want {
			t.Errorf("%s: %v; want %v", name, got, tt.want)
		}
	}
}

// TestMiddle: the median stands beside the worst of several, which judges.
func TestMiddle(t *testing.T) {
	quiet := func(v float64) ratio { return ratio{v, false, 3} }
	for want, all := range map[string][]ratio{
		"":                    {quiet(2)},
		" of 2 (median 1.85)": {quiet(2), quiet(1.7)},
		" of 3 (median 1.95)": {quiet(2), quiet(1.7), {1.95, true, 1}},
	} {
		if got := middle(all); got != want {
			t.Errorf("middle(%v) = %q; want %q", all, got, want)
		}
	}
}

var update = flag.Bool("update", false, "write testdata anew")

// TestReport: the report of the fixture is the one in testdata, the results survive being
// written and read, and the same results give the same bytes.
func TestReport(t *testing.T) {
	data, err := json.Marshal(fixture())
	if err != nil {
		t.Fatal(err)
	}
	var again Report
	if err := json.Unmarshal(data, &again); err != nil {
		t.Fatal(err)
	}
	first, err := fixture().Files()
	if err != nil {
		t.Fatal(err)
	}
	second, err := again.Files()
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{Document, "evaluation-2k-nodes.svg", "evaluation-2k-policies.svg", "evaluation-2k-ways.svg"} {
		if len(first[name]) == 0 || !bytes.Equal(first[name], second[name]) {
			t.Errorf("%s: %d octets, then %d: want the same ones", name, len(first[name]), len(second[name]))
		}
		golden := filepath.Join("testdata", name)
		if *update {
			if err := os.WriteFile(golden, first[name], 0o644); err != nil {
				t.Fatal(err)
			}
		}
		if want, err := os.ReadFile(golden); err != nil || !bytes.Equal(first[name], want) {
			t.Errorf("%s is not the one in testdata (%v): if that is right, go test -run TestReport -update", name, err)
		}
	}
	for _, line := range []string{"| 200 | 16.00 / 0.200 |", "**does not hold**", "- xt_cluster, 4 servers: no such match", "| clone, 2 nodes | 3 | 0.250 | 0.200 | 0.300 |", "![The policies](evaluation-2k-policies.svg)", "| clone, 2 nodes, byRandom | 0.61 % | 12 % |", "| clone, 2 nodes, byLoad | 2k | 59 | 176 | 9 |", "85 ms and 104 ms: 19 ms more"} {
		if !strings.Contains(string(first[Document]), line) {
			t.Errorf("the report lacks %q", line)
		}
	}
	if _, err := new(Report).Files(); err == nil {
		t.Error("a report of nothing is written")
	}
}

// TestDrawing: it is XML with every line and every published point, and nothing lies outside.
func TestDrawing(t *testing.T) {
	lines := []Line{{"a < b", []LinePoint{{10, 3, .01}, {2000, 700, 3}}}}
	svg := Drawing("Title & more", lines)
	d := xml.NewDecoder(bytes.NewReader(svg))
	for {
		if _, err := d.Token(); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatalf("%v:\n%s", err, svg)
		}
	}
	for _, text := range []string{"a &lt; b", "Title &amp; more", "published: two, byLoad", ">2000<", ">700<"} {
		if !strings.Contains(string(svg), text) {
			t.Errorf("the drawing lacks %q", text)
		}
	}
	if bytes.Contains(svg, []byte("NaN")) || !bytes.Equal(svg, Drawing("Title & more", lines)) {
		t.Error("the drawing is not the same twice, or has no numbers")
	}
	for most, want := range map[float64][2]float64{0: {1, 4}, 20.8: {5, 25}, 1.457: {.2, 1.6}, 200: {50, 200}, 2000: {500, 2000}, 0.03: {.005, .03}, 9: {1, 9}} {
		step, end := ticks(most)
		if diff := step - want[0]; diff > 1e-9 || diff < -1e-9 || end-want[1] > 1e-9 || want[1]-end > 1e-9 {
			t.Errorf("ticks(%v) = %v, %v; want %v", most, step, end, want)
		}
	}
}

func TestPlans(t *testing.T) {
	for name, p := range map[string]Plan{"full": Full(), "short": Short()} {
		seen := map[Run]bool{}
		for _, r := range p.Runs {
			if seen[r] {
				t.Errorf("%s: %+v is there twice", name, r)
			}
			seen[r] = true
		}
		took := p.Takes(&Report{})
		if most := map[string]time.Duration{"full": 90 * time.Minute, "short": 8 * time.Minute}[name]; took > most || len(p.Runs) == 0 {
			t.Errorf("%s: %d runs take %v", name, len(p.Runs), took)
		}
		t.Logf("%s: %d runs, %v", name, len(p.Runs), took)
	}
}

// TestProcessors: eight machines of the plan need more than one processor, four fit into one, and what needs more
// comes when more are fast.
func TestProcessors(t *testing.T) {
	p := Full()
	for _, r := range p.Runs {
		n := 1
		if r.Machines > 4 {
			n = 8
		}
		if got := p.processors(r); got != n {
			t.Errorf("%s, %s: kept on %d processors; want %d", r.Setup, r.Workload, got, n)
		}
	}
	small, large := Setup{Way: Clone, Machines: 4, Policy: "byRandom", Uneven: true}, Setup{Way: Clone, Machines: 8, Policy: "byLoad"}
	if run := (Run{Setup: small, Workload: standardTLS}); p.processors(run) != 1 || (&Plan{Quota: 0.25}).processors(run) == 1 {
		t.Error("what machines may take together does not matter")
	}
	setups := []Setup{small, large, {Way: Plain, Machines: 1}}
	for i, tt := range []struct {
		left         []Setup
		fast, usable int
		want         int
	}{
		{setups, 2, 2, 1}, {setups, 1, 2, 0}, {setups, 0, 2, 0}, {setups[1:], 1, 2, 1}, {setups[1:2], 1, 2, 0}, {setups[2:], 2, 2, 0},
		{setups, 1, 1, 0}, {setups, 7, 16, 0}, {setups, 8, 16, 1},
	} {
		if got := p.next(tt.left, tt.fast, tt.usable); got != tt.want {
			t.Errorf("%d: of %v number %d comes next; want %d", i, tt.left, got, tt.want)
		}
	}
}

// TestSounder: what nobody disturbed is the better one, and of two that were disturbed the less disturbed.
func TestSounder(t *testing.T) {
	well, slow, robbed := &Measured{Pace: 0.9}, &Measured{Pace: 0.6}, &Measured{Pace: 1, Others: 0.9}
	for i, tt := range []struct {
		m, than *Measured
		want    bool
	}{{well, slow, true}, {well, well, true}, {slow, well, false}, {slow, robbed, true}, {robbed, slow, false}, {slow, slow, false}} {
		if got := tt.m.sounder(tt.than); got != tt.want {
			t.Errorf("%d: sounder %v; want %v", i, got, tt.want)
		}
	}
}
