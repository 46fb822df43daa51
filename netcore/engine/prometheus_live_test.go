package engine_test

import (
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"clonecluster/netcore/api"
)

// documentedScrapes gives the two configurations of docs/monitoring.md: of the nodes'
// addresses, and by the VIP, which is the former with other targets.
func documentedScrapes(t *testing.T) (direct, byVIP string) {
	t.Helper()
	page, err := os.ReadFile("../../docs/monitoring.md")
	if err != nil {
		t.Fatal(err)
	}
	blocks := regexp.MustCompile("(?s)```yaml\n(.*?)```").FindAllStringSubmatch(string(page), -1)
	if len(blocks) < 2 {
		t.Fatalf("docs/monitoring.md has %d configurations; want two", len(blocks))
	}
	head, _, found := strings.Cut(blocks[0][1], "    static_configs:\n")
	if !found || !strings.HasPrefix(blocks[1][1], "    static_configs:\n") {
		t.Fatal("the second configuration does not replace the targets of the first")
	}
	return blocks[0][1], head + blocks[1][1]
}

// TestScrapeConfigurations: promtool takes them, and each is one job, by whose name rules and
// dashboard add up.
func TestScrapeConfigurations(t *testing.T) {
	path, err := exec.LookPath("promtool")
	if err != nil {
		t.Skip("needs promtool of the Debian package prometheus")
	}
	direct, byVIP := documentedScrapes(t)
	for name, text := range map[string]string{"direct": direct, "by the VIP": byVIP} {
		file := filepath.Join(t.TempDir(), "prometheus.yml")
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if out, err := exec.Command(path, "check", "config", "--syntax-only", file).CombinedOutput(); err != nil {
			t.Errorf("%s: %v\n%s", name, err, out)
		}
		if strings.Count(text, "job_name: clonecluster\n") != 1 || strings.Count(text, "job_name") != 1 {
			t.Errorf("%s: it is not one job\n%s", name, text)
		}
	}
}

// TestPrometheus: Prometheus itself, as docs/monitoring.md sets it up, scrapes all
// nodes with a read-only certificate, and what it adds up is the cluster.
func TestPrometheus(t *testing.T) {
	path, err := exec.LookPath("prometheus")
	if err != nil {
		t.Skip("needs the Debian package prometheus")
	}
	c := newCluster(t, 2)
	c.start()
	dir := t.TempDir()
	a := c.authority()
	cert, err := a.Issue(api.RoleReadOnly, "prometheus", time.Now().Add(time.Hour))
	if err != nil {
		t.Fatal(err)
	}
	key, err := x509.MarshalPKCS8PrivateKey(cert.PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	for name, data := range map[string][]byte{
		"ca.pem": a.PEM(), "client.pem": pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Certificate[0]}),
		"client.key": pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: key}),
	} {
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	direct, byVIP := documentedScrapes(t)
	replace := strings.NewReplacer(
		"/etc/prometheus/clonecluster", dir, `, "10.77.0.103:9264"`, "", // as there are
		"targets: [web-1, web-2, web-3]", fmt.Sprintf("targets: [%q, %q]", c.nodes[0].MAC, c.nodes[1].MAC),
		"scheme:", "scrape_interval: 500ms\n    scrape_timeout: 400ms\n    scheme:",
	)
	_, job, _ := strings.Cut(byVIP, "\n") // another one of the same file
	config := replace.Replace(direct + strings.Replace(job, "job_name: clonecluster", "job_name: by-vip", 1))
	file := filepath.Join(dir, "prometheus.yml")
	if err := os.WriteFile(file, []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	prometheus := c.client.StartCommand(path, "--config.file", file, "--storage.tsdb.path", filepath.Join(dir, "data"), "--web.listen-address", "127.0.0.1:9090")
	defer prometheus.Stop()
	asking := http.Client{Timeout: 2 * time.Second, Transport: &http.Transport{DialContext: c.client.DialContext}}
	for _, tt := range []struct{ query, want string }{
		{`sum(up{job="clonecluster"})`, "2"},
		{`sum(clonecluster_map_buckets{job="clonecluster"})`, "1024"},
		{`sum(clonecluster_leader{job="clonecluster"})`, "1"},
		{`count(clonecluster_node_state{job="clonecluster", state="serving"} == 1)`, "2"},
		{`count(rate(clonecluster_beacons_heard_total{job="clonecluster"}[5s]) > 1)`, "2"},
		{`sum(up{job="by-vip"})`, "2"},
		{`sum(clonecluster_map_buckets{job="by-vip"})`, "1024"},
		{`count by (job) (clonecluster_leader{job="by-vip"} == 1)`, "1"},
		{fmt.Sprintf(`count(clonecluster_map_buckets{job="by-vip", instance=~"%s|%s"})`, c.nodes[0].MAC, c.nodes[1].MAC), "2"},
	} {
		got := ""
		for deadline := time.Now().Add(30 * time.Second); got != tt.want && time.Now().Before(deadline); time.Sleep(200 * time.Millisecond) {
			got = ""
			resp, err := asking.Get("http://127.0.0.1:9090/api/v1/query?query=" + url.QueryEscape(tt.query))
			if err != nil {
				continue
			}
			var answer struct {
				Data struct{ Result []struct{ Value [2]any } }
			}
			if json.NewDecoder(resp.Body).Decode(&answer) == nil && len(answer.Data.Result) == 1 {
				got, _ = answer.Data.Result[0].Value[1].(string)
			}
			resp.Body.Close()
		}
		if got != tt.want {
			t.Errorf("%s is %q; want %s\n%s", tt.query, got, tt.want, prometheus.Output())
		}
	}
}
