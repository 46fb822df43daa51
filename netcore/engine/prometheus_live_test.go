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
	"testing"
	"time"

	"clonecluster/netcore/api"
)

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
	config := fmt.Sprintf(`
scrape_configs:
  - job_name: clonecluster
    scrape_interval: 500ms
    scrape_timeout: 400ms
    scheme: https
    tls_config: {ca_file: %[1]s/ca.pem, cert_file: %[1]s/client.pem, key_file: %[1]s/client.key}
    static_configs:
      - targets: ["10.77.0.101:9264", "10.77.0.102:9264"]
`, dir)
	file := filepath.Join(dir, "prometheus.yml")
	if err := os.WriteFile(file, []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	prometheus := c.client.StartCommand(path, "--config.file", file, "--storage.tsdb.path", filepath.Join(dir, "data"), "--web.listen-address", "127.0.0.1:9090")
	defer prometheus.Stop()
	asking := http.Client{Timeout: 2 * time.Second, Transport: &http.Transport{DialContext: c.client.DialContext}}
	for _, tt := range []struct{ query, want string }{
		{`sum(up)`, "2"},
		{`sum(clonecluster_map_buckets)`, "1024"},
		{`sum(clonecluster_leader)`, "1"},
		{`count(clonecluster_node_state{state="serving"} == 1)`, "2"},
		{`count(rate(clonecluster_beacons_heard_total[5s]) > 1)`, "2"},
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
