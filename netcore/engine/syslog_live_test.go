package engine_test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// TestSyslog: what a node logs arrives at a collector that was not there at first and
// is started only later, with nothing missing in between.
func TestSyslog(t *testing.T) {
	path, err := exec.LookPath("rsyslogd")
	if err != nil {
		t.Skip("needs the Debian package rsyslog")
	}
	c := newCluster(t, 1)
	writeConfig(t, c.config, "  mode: dhcp ", "  syslog: tcp://10.77.0.1:5514\n  mode: dhcp ")
	c.start()
	n := c.nodes[0]
	n.cloned.Await(0, "logs do not reach the syslog collector")
	out, file := filepath.Join(c.Dir, "collected"), filepath.Join(c.Dir, "rsyslog.conf")
	text := fmt.Sprintf(`global(workDirectory="%s")
module(load="imtcp")
input(type="imtcp" address="10.77.0.1" port="5514")
template(name="parts" type="string" string="%%protocol-version%%|%%syslogseverity-text%%|%%app-name%%|%%msg%%\n")
action(type="omfile" file="%s" template="parts")
`, c.Dir, out)
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	collector := c.client.StartCommand(path, "-n", "-f", file, "-i", filepath.Join(c.Dir, "rsyslog.pid"))
	defer collector.Stop()
	want := []string{`1|info|engine|level=INFO msg="engine running"`, `1|warning|engine|level=WARN msg="logs do not reach`, `1|info|engine|level=INFO msg="logs reach the syslog collector again"`}
	var got string
	for deadline := time.Now().Add(60 * time.Second); time.Now().Before(deadline); time.Sleep(200 * time.Millisecond) {
		b, _ := os.ReadFile(out)
		if got = string(b); strings.Contains(got, want[2]) {
			break
		}
	}
	at := 0
	for _, w := range want {
		i := strings.Index(got[at:], w)
		if i < 0 {
			t.Fatalf("after %d bytes the collector has no %q:\n%s\n%s", at, w, got, collector.Output())
		}
		at += i
	}
}
