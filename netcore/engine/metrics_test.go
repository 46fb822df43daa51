package engine

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/goccy/go-yaml"
	"github.com/prometheus/client_golang/prometheus/testutil"
	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"

	"clonecluster/netcore/api"
	"clonecluster/netcore/finding"
	"clonecluster/netcore/membership"
)

// examplePage is what a node with this status tells Prometheus.
func examplePage(t *testing.T) (page []byte, families map[string]*dto.MetricFamily) {
	t.Helper()
	const self = "02:00:00:00:00:01"
	s := Status{
		Cluster: "demo", Name: "web-1", Build: "0123", WireMAC: self, Leader: self, NIC: "eth0", Datapath: "bpf", Ingress: "tcx", State: "serving", Agreed: true, Map: 7,
		Members: []Member{
			{Node: self, Self: true, Live: true, State: "serving", Weight: 150, Busy: 0.25, Flows: 12, Buckets: 700},
			{Node: "02:00:00:00:00:02", Live: true, State: "serving"}, {Node: "02:00:00:00:00:03", State: "serving"},
		},
		Buckets: Buckets{Foreign: 324, Settled: 690, Shared: 10}, Drain: Drain{Flows: 11}, Unwell: []string{"web: refused"},
		Findings: []finding.Finding{{Code: "one-way", Level: finding.Critical}, {Code: "mixed-programs", Level: finding.Info}},
		Offered:  api.Offered{Frames: 40, SYNs: 30, SYNsAgain: 20, Unowned: 10},
		Verdicts: map[string]uint64{"accept-new": 5}, Counters: map[string]uint64{"Guarded": 2, "SendErrors": 3},
		Beacons: membership.Counters{Sent: 100, Heard: 200, Missed: 1, Unauthentic: 4},
	}
	m := newMetrics(&statusMetrics{
		status: func() Status { return s }, refused: func() uint64 { return 9 }, services: []string{"web", "dns"},
		stages: func() []api.BootStage { return []api.BootStage{{Stage: "ready", At: 2.5}} }, booted: time.Unix(1000, 0),
	})
	m.asked("status", 200)
	m.events.WithLabelValues("map").Inc()
	if problems, err := testutil.GatherAndLint(m.registry); err != nil || len(problems) > 0 {
		t.Errorf("the linter of Prometheus: %v, %+v", err, problems)
	}
	var b bytes.Buffer
	mediaType, err := m.write(&b, http.Header{})
	if err != nil || !strings.HasPrefix(mediaType, "text/plain; version=0.0.4") {
		t.Fatalf("the page is %q, %v", mediaType, err)
	}
	parser := expfmt.NewTextParser(model.UTF8Validation)
	families, err = parser.TextToMetricFamilies(bytes.NewReader(b.Bytes()))
	if err != nil {
		t.Fatalf("the page cannot be read: %v\n%s", err, &b)
	}
	return b.Bytes(), families
}

func TestMetrics(t *testing.T) {
	page, families := examplePage(t)
	for _, want := range []string{
		`clonecluster_build_info{build="0123",goversion="go1.`, `clonecluster_node_info{cluster="demo",datapath="bpf"`,
		`clonecluster_node_state{state="serving"} 1`, `clonecluster_node_state{state="draining"} 0`, `clonecluster_members{state="serving"} 2`, "clonecluster_members_deaf 1",
		"clonecluster_leader 1", "clonecluster_agreed 1", "clonecluster_fenced 0", "clonecluster_draining 0", "clonecluster_fail_open 0", "clonecluster_map_version 7",
		"clonecluster_map_buckets 700", `clonecluster_buckets{state="settled"} 690`, "clonecluster_weight 150", "clonecluster_busy_ratio 0.25", "clonecluster_flows 12",
		"clonecluster_drain_flows 11", `clonecluster_frames_total{verdict="accept-new"} 5`, `clonecluster_frames_total{verdict="drop-egress-malformed"} 0`,
		`clonecluster_datapath_errors_total{reason="send-errors"} 3`, "clonecluster_guarded_frames_total 2", "clonecluster_beacons_sent_total 100",
		"clonecluster_offered_frames_total 40", "clonecluster_offered_syns_total 30", "clonecluster_offered_syn_retransmissions_total 20", "clonecluster_offered_unowned_frames_total 10",
		"clonecluster_beacons_heard_total 200", "clonecluster_beacons_missed_total 1", `clonecluster_beacons_refused_total{reason="wrong-key"} 4`,
		`clonecluster_service_healthy{service="web"} 0`, `clonecluster_service_healthy{service="dns"} 1`, `clonecluster_finding{code="one-way",level="critical"} 1`,
		"clonecluster_api_connections_refused_total 9", "clonecluster_boot_time_seconds 1000", `clonecluster_boot_stage_seconds{stage="ready"} 2.5`,
		`clonecluster_api_requests_total{code="200",route="status"} 1`, `clonecluster_events_total{kind="map"} 1`, `clonecluster_events_total{kind="drain"} 0`,
		"go_goroutines", "process_resident_memory_bytes", "process_start_time_seconds",
	} {
		if !bytes.Contains(page, []byte("\n"+want)) {
			t.Errorf("the page has no %s", want)
		}
	}
	// Nothing is without help.
	for name, f := range families {
		if f.GetHelp() == "" || f.GetType() == dto.MetricType_UNTYPED {
			t.Errorf("%s has no help or no type", name)
		}
	}
	if t.Failed() {
		t.Logf("%s", page)
	}
}

// TestPromtool: Prometheus' own tool finds nothing wrong with the page.
func TestPromtool(t *testing.T) {
	page, _ := examplePage(t)
	cmd := exec.Command(promtool(t), "check", "metrics")
	cmd.Stdin = bytes.NewReader(page)
	if out, err := cmd.CombinedOutput(); err != nil || len(bytes.TrimSpace(out)) > 0 {
		t.Errorf("promtool check metrics: %v\n%s", err, out)
	}
}

// TestMonitoringExamples: promtool takes the alert rules and what they are tried with,
// and every metric that rules and dashboard name exists.
func TestMonitoringExamples(t *testing.T) {
	const dir = "../../docs/monitoring/"
	_, families := examplePage(t)
	var dashboard struct {
		Panels []struct {
			Title   string
			Targets []struct{ Expr string }
		}
	}
	data, err := os.ReadFile(dir + "grafana.json")
	if err == nil {
		err = json.Unmarshal(data, &dashboard)
	}
	if err != nil {
		t.Fatal(err)
	}
	rules, err := os.ReadFile(dir + "alerts.yaml")
	if err != nil {
		t.Fatal(err)
	}
	texts := map[string]string{"alerts.yaml": string(rules)}
	for _, p := range dashboard.Panels {
		for _, target := range p.Targets {
			texts["panel "+p.Title] += target.Expr + "\n"
		}
	}
	named := 0
	for where, text := range texts {
		for _, name := range regexp.MustCompile(`\b(clonecluster|process|go)_[a-z_]+`).FindAllString(text, -1) {
			named++
			if families[name] == nil {
				t.Errorf("%s names %s, which is no metric", where, name)
			}
		}
	}
	if named < 30 {
		t.Errorf("%d metrics are named; are those all?", named)
	}
	tool := promtool(t)
	for _, args := range [][]string{{"check", "rules", dir + "alerts.yaml"}, {"test", "rules", dir + "alerts_test.yaml"}} {
		if out, err := exec.Command(tool, args...).CombinedOutput(); err != nil {
			t.Errorf("promtool %v: %v\n%s", args, err, out)
		}
	}
	// The dashboard's expressions, as rules, with what Grafana puts in for its variables.
	var b strings.Builder
	b.WriteString("groups:\n- name: dashboard\n  rules:\n")
	n := 0
	for _, p := range dashboard.Panels {
		for _, target := range p.Targets {
			n++
			expr := strings.NewReplacer("$__rate_interval", "1m", "$job", "clonecluster").Replace(target.Expr)
			fmt.Fprintf(&b, "  - record: panel:%d\n    expr: %q\n", n, expr)
		}
	}
	file := filepath.Join(t.TempDir(), "dashboard.yaml")
	if err := os.WriteFile(file, []byte(b.String()), 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command(tool, "check", "rules", file).CombinedOutput(); err != nil {
		t.Errorf("promtool does not take the dashboard's expressions: %v\n%s", err, out)
	}
}

// TestAlertsAreTried: each rule is tried with what it fires at and with what it does not.
func TestAlertsAreTried(t *testing.T) {
	const dir = "../../docs/monitoring/"
	read := func(name string, into any) {
		t.Helper()
		data, err := os.ReadFile(dir + name)
		if err == nil {
			err = yaml.Unmarshal(data, into)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	var rules struct {
		Groups []struct {
			Rules []struct{ Alert string }
		}
	}
	var tried struct {
		Tests []struct {
			Cases []struct {
				Alert string `yaml:"alertname"`
				Fires []any  `yaml:"exp_alerts"`
			} `yaml:"alert_rule_test"`
		}
	}
	read("alerts.yaml", &rules)
	read("alerts_test.yaml", &tried)
	fires, quiet := map[string]bool{}, map[string]bool{}
	for _, test := range tried.Tests {
		for _, c := range test.Cases {
			if len(c.Fires) > 0 {
				fires[c.Alert] = true
			} else {
				quiet[c.Alert] = true
			}
		}
	}
	n := 0
	for _, g := range rules.Groups {
		for _, r := range g.Rules {
			n++
			if !fires[r.Alert] || !quiet[r.Alert] {
				t.Errorf("%s is tried firing: %v, quiet: %v; want both", r.Alert, fires[r.Alert], quiet[r.Alert])
			}
		}
	}
	if n != len(fires) || n < 10 {
		t.Errorf("%d rules, of which %d are tried", n, len(fires))
	}
}

func promtool(t *testing.T) string {
	t.Helper()
	path, err := exec.LookPath("promtool")
	if err != nil {
		t.Skip("needs promtool of the Debian package prometheus")
	}
	return path
}
