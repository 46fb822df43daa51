package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// unit is the unit file: key to values, in order.
type unit map[string][]string

const unitFile = "debian/cloned.service"

func readUnit(t *testing.T) unit {
	t.Helper()
	data, err := os.ReadFile(unitFile)
	if err != nil {
		t.Fatal(err)
	}
	u := unit{}
	for line := range strings.Lines(string(data)) {
		if k, v, ok := strings.Cut(strings.TrimSpace(line), "="); ok && !strings.HasPrefix(line, "#") {
			u[k] = append(u[k], v)
		}
	}
	return u
}

func (u unit) words(key string) []string { return strings.Fields(strings.Join(u[key], " ")) }

func (u unit) last(key string) string {
	if v := u[key]; len(v) > 0 {
		return v[len(v)-1]
	}
	return ""
}

var capBits = map[string]int{
	"CAP_NET_ADMIN": unix.CAP_NET_ADMIN, "CAP_NET_RAW": unix.CAP_NET_RAW, "CAP_SYS_NICE": unix.CAP_SYS_NICE,
	"CAP_IPC_LOCK": unix.CAP_IPC_LOCK, "CAP_BPF": unix.CAP_BPF, "CAP_PERFMON": unix.CAP_PERFMON,
}

func (u unit) capMask(caps []string) (mask uint64) {
	for _, c := range caps {
		mask |= 1 << capBits[c]
	}
	return mask
}

// TestUnit holds the unit to what the engine relies on.
func TestUnit(t *testing.T) {
	u := readUnit(t)
	for key, want := range map[string]string{
		"Type": "notify", "RestartKillSignal": "SIGHUP", "KillSignal": "SIGTERM", "KillMode": "mixed", "Restart": "always",
		"RuntimeDirectory": "clonecluster", "RuntimeDirectoryPreserve": "restart", "StartLimitIntervalSec": "0",
		// A Go program that panics exits with 2, and has to be started again.
		"RestartPreventExitStatus": "4",
	} {
		if got := u.last(key); got != want {
			t.Errorf("%s=%s; want %s", key, got, want)
		}
	}
	// Any of these would break the node.
	for key, bad := range map[string]string{
		"ProtectKernelTunables": "yes", "PrivateNetwork": "yes", "PrivateUsers": "yes", "PrivateDevices": "yes", "RestrictRealtime": "yes",
	} {
		if u.last(key) == bad {
			t.Errorf("%s=%s", key, bad)
		}
	}
	for _, family := range []string{"AF_UNIX", "AF_INET", "AF_INET6", "AF_NETLINK", "AF_PACKET"} {
		if !slices.Contains(u.words("RestrictAddressFamilies"), family) {
			t.Errorf("RestrictAddressFamilies lacks %s", family)
		}
	}
}

// TestManPage: the page has every flag and exit code of the help.
func TestManPage(t *testing.T) {
	page, err := os.ReadFile("debian/cloned.8")
	if err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command("go", "run", ".", "--help").CombinedOutput()
	if err != nil {
		t.Fatalf("cloned --help: %v: %s", err, out)
	}
	flags := regexp.MustCompile(`(?m)^  -([a-z-]+)`).FindAllStringSubmatch(string(out), -1)
	if len(flags) < 5 {
		t.Fatalf("cloned --help names %d flags:\n%s", len(flags), out)
	}
	for _, f := range flags {
		if name := `\-\-` + strings.ReplaceAll(f[1], "-", `\-`); !strings.Contains(string(page), name) {
			t.Errorf("the manual page lacks --%s", f[1])
		}
	}
	for _, code := range []string{"0", "1", "2", "3", "4"} {
		if !strings.Contains(string(page), ".B "+code+"\n") || !regexp.MustCompile(`(?s)Exit codes:.*\b`+code+` `).Match(out) {
			t.Errorf("exit code %s is not in both, the page and the help", code)
		}
	}
}

// TestUnitVerified has systemd's own tools look at it.
func TestUnitVerified(t *testing.T) {
	if _, err := exec.LookPath("systemd-analyze"); err != nil {
		t.Skip("needs systemd-analyze (Debian package systemd)")
	}
	data, err := os.ReadFile(unitFile)
	if err != nil {
		t.Fatal(err)
	}
	// It looks whether the program is there.
	file := filepath.Join(t.TempDir(), "cloned.service")
	text := strings.Replace(string(data), "/usr/sbin/cloned", "/bin/true", 1)
	if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("systemd-analyze", "verify", "--man=no", file).CombinedOutput(); err != nil || len(out) > 0 {
		t.Errorf("systemd-analyze verify: %v: %s", err, out)
	}
	out, err := exec.Command("systemd-analyze", "security", "--offline=true", "--no-pager", file).CombinedOutput()
	if err != nil && strings.Contains(string(out), "offline") {
		t.Skip("this systemd-analyze does not look at files")
	}
	m := regexp.MustCompile(`exposure level for cloned.service: ([0-9.]+)`).FindStringSubmatch(string(out))
	if m == nil {
		t.Fatalf("systemd-analyze security: %v: %s", err, out)
	}
	score, err := strconv.ParseFloat(m[1], 64)
	t.Logf("systemd-analyze security: exposure %v of 10", score)
	if err != nil || score > 3.5 {
		t.Errorf("the exposure is %v; want 3.5 or less", score)
	}
}
