package config

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/goccy/go-yaml"
	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

const key = "Y2xvbmVjbHVzdGVyIGRlbW8sIG5vdCBhIHNlY3JldCE="

// minimal is the least that is a configuration; its last section is vip, so
// that a test can go on below it.
const minimal = "cluster:\n  name: a\n  key: " + key + "\nvip:\n  ipv4: 10.77.0.10/24\n"

const otherKey = "AQIDBAUGBwgJCgsMDQ4PEBESExQVFhcYGRobHB0eHyA=" // 1, 2, 3, … 32

// keyed is minimal with more lines in the section cluster, from line 4 on.
func keyed(lines string) string {
	return strings.Replace(minimal, "\nvip:", "\n  "+lines+"\nvip:", 1)
}

func load(t *testing.T, text string) *Config {
	t.Helper()
	c, err := Load([]byte(text), "cluster.yaml")
	if err != nil {
		t.Fatalf("Load: %v\n%s", err, text)
	}
	return c
}

func TestDemo(t *testing.T) {
	got := Demo()
	want := &Config{
		Cluster: Cluster{Name: "demo", Key: demoKey, FlowKey: demoKey, Detect: DetectRelaxed, Drain: 15 * time.Second},
		VIP: VIP{
			IPv4: netip.MustParsePrefix("10.77.0.10/24"), IPv4Gateway: netip.MustParseAddr("10.77.0.1"),
			IPv6: netip.MustParsePrefix("fd77::10/64"), IPv6Gateway: netip.MustParseAddr("fd77::1"),
			CloneMAC: net.HardwareAddr{0x02, 0xcc, 0x0a, 0x4d, 0x00, 0x0a},
		},
		Interface:  Interface{WaitCarrier: 10 * time.Second},
		Management: Management{Mode: ManagementDHCP, Port: 9264},
		Policy:     Policy{Name: ByRandom, Balance: BalanceEven, Affinity: AffinityNone, Moves: 32, WhenAllFail: ServeWhenAllFail},
		Services: []Service{{
			Name: "web", Run: []string{"/bin/webd"}, Ports: []PortRange{{80, 80, "tcp"}}, Affinity: AffinityNone,
			Health: Health{HTTP: "http://127.0.0.1/healthz", Interval: time.Second, Timeout: 500 * time.Millisecond, Rise: 2, Fall: 3},
		}},
		Network: Network{Mode: ModeAuto}, System: System{LogLevel: "info", Datapath: "auto", Ingress: "auto", Watchdog: 30 * time.Second},
	}
	opts := cmp.Options{
		cmpopts.IgnoreUnexported(Config{}),
		cmp.Comparer(func(a, b netip.Prefix) bool { return a == b }),
		cmp.Comparer(func(a, b netip.Addr) bool { return a == b }),
		cmp.Comparer(func(a, b Key) bool { return a == b }),
	}
	if diff := cmp.Diff(want, got, opts); diff != "" {
		t.Errorf("Demo() (-want +got):\n%s", diff)
	}
	if w := got.Warnings(); len(w) != 1 || !strings.Contains(w[0], "demo") {
		t.Errorf("Warnings() = %q; want that the key is the demo's, and no more", w)
	}
}

func TestMinimalHasDefaults(t *testing.T) {
	c := load(t, minimal)
	got := map[string]string{}
	for _, e := range c.Effective() {
		got[e.Path] = e.Value + " " + e.Source
	}
	for path, want := range map[string]string{
		"cluster.name":           "a cluster.yaml:2",
		"cluster.key":            "(secret) cluster.yaml:3",
		"cluster.accept-keys":    "[] default",
		"cluster.flow-key":       "(secret) derived",
		"cluster.detect":         "normal default",
		"cluster.drain":          "15s default",
		"vip.ipv6":               " default",
		"vip.clone-mac":          "02:cc:0a:4d:00:0a derived",
		"interface.wait-carrier": "10s default",
		"management.mode":        "dhcp default",
		"policy.name":            "byRandom derived",
		"policy.balance":         "even default",
		"policy.affinity":        "none default",
		"policy.moves":           "32 default",
		"policy.weights":         "[] default",
		"policy.when-all-fail":   "serve default",
		"services":               "[] default",
		"rules":                  "[] default",
		"system.watchdog":        "30s default",
	} {
		if got[path] != want {
			t.Errorf("effective %s = %q; want %q", path, got[path], want)
		}
	}
}

// TestErrors gives what follows the minimal file, or a whole file, and what the
// message must contain; the first text is the place.
func TestErrors(t *testing.T) {
	web := minimal + "services:\n  - name: web\n    run: [/bin/webd]\n"
	tests := []struct {
		name, text string
		want       []string
	}{
		{"empty file", "", []string{"cluster.yaml", "cluster: is missing", "vip: is missing"}},
		{"comment only", "# nothing\n", []string{"cluster: is missing"}},
		{"no key", "cluster:\n  name: a\nvip:\n  ipv4: 10.0.0.1/8\n", []string{"cluster.yaml:2:3: cluster.key: is missing", "head -c 32 /dev/urandom | base64"}},
		{"unknown key", minimal + "managment:\n  mode: dhcp\n", []string{"cluster.yaml:6:1: ", `unknown key "managment"`, `did you mean "management"?`, "  6 | managment:", "^"}},
		{"unknown key below", minimal + "system:\n  log_level: info\n", []string{"cluster.yaml:7:3: system: unknown key", `did you mean "log-level"?`, "known here: console, log-level, datapath, ingress, watchdog"}},
		{"unknown key, nothing near", minimal + "zzz: 1\n", []string{`unknown key "zzz"; known here: cluster, vip`}},
		{"section as text", minimal + "system: debug\n", []string{"cluster.yaml:6:9: system: is a text where keys with values are wanted"}},
		{"section as list", minimal + "system: [1]\n", []string{"cluster.yaml:6:9: system: is a list where"}},
		{"list as text", minimal + "services: web\n", []string{"cluster.yaml:6:11: services: is a text where a list"}},
		{"value as list", minimal + "system:\n  log-level: [info]\n", []string{"7:14: system.log-level: is a list where one value"}},
		{"no value", minimal + "system:\n  log-level:\n", []string{":7:", "system.log-level: has no value"}},
		{"number as name", strings.Replace(minimal, "name: a", "name: 12", 1), []string{"2:9: cluster.name: is a number", `"12"`}},
		{"bool as name", strings.Replace(minimal, "name: a", "name: true", 1), []string{"2:9: cluster.name: is a yes-or-no value"}},
		{"bad name", strings.Replace(minimal, "name: a", "name: A_b", 1), []string{`cluster.name: "A_b" must be 1 to 63`}},
		{"enum", minimal + "system:\n  log-level: inof\n", []string{`"inof" is not one of debug, info, warn, error`, `did you mean "info"?`}},
		{"no unit", minimal + "system:\n  watchdog: 30\n", []string{"time with its unit", "0 (off) or 5s to 5m"}},
		{"too short", minimal + "system:\n  watchdog: 1s\n", []string{"1s is out of range; allowed: 0 (off) or 5s to 5m"}},
		{"negative", minimal + "interface:\n  wait-carrier: -1s\n", []string{"-1s is out of range; allowed: 0s to 5m"}},
		{"short key", strings.Replace(minimal, key, "aGVsbG8=", 1), []string{"cluster.key: holds 5 bytes instead of 32"}},
		{"key not base64", strings.Replace(minimal, key, "hello!", 1), []string{"cluster.key: is not valid base64"}},
		{"zero key", strings.Replace(minimal, key, strings.Repeat("A", 43)+"=", 1), []string{"cluster.key: is all zeros"}},
		{"no VIP", strings.Replace(minimal, "ipv4: 10.77.0.10/24", "clone-mac: 02:cc:00:00:00:01", 1), []string{"5:3: vip: has neither ipv4 nor ipv6"}},
		{"no prefix length", strings.Replace(minimal, "/24", "", 1), []string{"5:9: vip.ipv4: ", "no prefix length", "10.77.0.10/24"}},
		{"network address", strings.Replace(minimal, "0.10/24", "0.0/24", 1), []string{"the network address of its subnet"}},
		{"broadcast address", strings.Replace(minimal, "0.10/24", "0.255/24", 1), []string{"the broadcast address of its subnet"}},
		{"multicast", strings.Replace(minimal, "10.77.0.10/24", "224.0.0.5/24", 1), []string{"a multicast address"}},
		{"loopback", strings.Replace(minimal, "10.77.0.10/24", "127.0.0.1/8", 1), []string{"a loopback address"}},
		{"IPv6 as IPv4", strings.Replace(minimal, "10.77.0.10/24", "fd77::10/64", 1), []string{"fd77::10 is not an IPv4 address"}},
		{"mapped", strings.Replace(minimal, "ipv4: 10.77.0.10/24", "ipv6: ::ffff:10.0.0.1/100", 1), []string{"vip.ipv6:"}},
		{"anycast", minimal + "  ipv6: fd77::/64\n", []string{"router anycast"}},
		{"gateway outside", minimal + "  ipv4-gateway: 10.78.0.1\n", []string{"6:17: vip.ipv4-gateway: 10.78.0.1 is not in the VIP's subnet 10.77.0.0/24"}},
		{"gateway is the VIP", minimal + "  ipv4-gateway: 10.77.0.10\n", []string{"is the VIP itself"}},
		{"gateway is broadcast", minimal + "  ipv4-gateway: 10.77.0.255\n", []string{"the broadcast address"}},
		{"gateway of nothing", minimal + "  ipv6-gateway: fd77::1\n", []string{"vip.ipv6-gateway: is set, but vip.ipv6 is not"}},
		{"gateway with zone", minimal + "  ipv6: fd77::10/64\n  ipv6-gateway: fe80::1%eth0\n", []string{"must not have a zone", "write fe80::1"}},
		{"multicast clone MAC", minimal + "  clone-mac: 03:00:5e:00:00:01\n", []string{"6:14: vip.clone-mac: 03:00:5e:00:00:01 is a multicast address"}},
		{"universal clone MAC", minimal + "  clone-mac: 52:54:00:00:00:01\n  ipv6: x\n", []string{"7:9: vip.ipv6:"}},
		{"manufacturer's clone MAC", minimal + "  clone-mac: 00:54:00:00:00:01\n", []string{"manufacturer", "leave it out for 02:cc:0a:4d:00:0a"}},
		{"long clone MAC", minimal + "  clone-mac: 02:cc:00:00:00:01:02:03\n", []string{"six bytes"}},
		{"static without pattern", minimal + "management:\n  mode: static\n", []string{"7:3: management.pattern: is missing"}},
		{"pattern without static", minimal + "management:\n  pattern: 10.0.0.0/8\n", []string{"7:12: management.pattern: is only for mode: static, and the mode is dhcp"}},
		{"pattern with host bits", minimal + "management: {mode: static, pattern: 10.0.0.1/8}\n", []string{"write 10.0.0.0/8"}},
		{"pattern too small", minimal + "management: {mode: static, pattern: 10.0.0.0/28}\n", []string{"28 is out of range; allowed for IPv4: 8 to 24"}},
		{"service without name", minimal + "services:\n  - run: [/bin/webd]\n", []string{"7:5: services[0].name: is missing"}},
		{"service without run", minimal + "services:\n  - name: web\n", []string{"services.web.run: is missing"}},
		{"empty run", minimal + "services:\n  - name: web\n    run: []\n", []string{"services.web.run: must have at least 1 entry"}},
		{"relative run", minimal + "services:\n  - {name: web, run: [webd]}\n", []string{"full path"}},
		{"service twice", web + "  - name: web\n    run: [/bin/x]\n", []string{`9:11: services[1].name: "web" is the name of two services`}},
		{"reserved name", minimal + "services:\n  - {name: init, run: [/bin/x]}\n", []string{`"init" is the name of a part of the node`}},
		{"port without protocol", web + "    ports: [80]\n", []string{"9:13: services.web.ports[0]: ", "write 80/tcp or 80/udp"}},
		{"port 0", web + "    ports: [0/tcp]\n", []string{"1 to 65535"}},
		{"port range upside down", web + "    ports: [90-80/tcp]\n", []string{"9:13: ", `"90-80/tcp" ends before it begins; write 80-90/tcp`}},
		{"port range without end", web + "    ports: [80-/tcp]\n", []string{"1 to 65535"}},
		{"port range from 0", web + "    ports: [0-80/tcp]\n", []string{"1 to 65535"}},
		{"port range of three", web + "    ports: [80-90-99/tcp]\n", []string{"1 to 65535"}},
		{"port range without protocol", web + "    ports: [80-90]\n", []string{"write 80-90/tcp or 80-90/udp"}},
		{"port too large", web + "    ports: [65536/tcp]\n", []string{"1 to 65535"}},
		{"port twice", web + "    ports: [80/tcp, 80/tcp]\n", []string{"9:21: services.web.ports[1]: 80/tcp is not free: it is here twice"}},
		{"port of another", web + "    ports: [80/tcp]\n  - {name: b, run: [/b], ports: [80/tcp]}\n", []string{"10:34: services.b.ports[0]: 80/tcp is not free: service web has 80/tcp (cluster.yaml:9:13)"}},
		{"range over its own port", web + "    ports: [80/tcp, 70-90/tcp]\n", []string{"9:21: services.web.ports[1]: 70-90/tcp is not free: 80/tcp is here too"}},
		{"ranges that meet", web + "    ports: [80-90/tcp]\n  - {name: b, run: [/b], ports: [90-99/tcp]}\n", []string{"services.b.ports[0]: 90-99/tcp is not free: service web has 80-90/tcp (cluster.yaml:9:13)"}},
		{"the API's port", web + "    ports: [9000-9999/tcp]\n", []string{"9:13: services.web.ports[0]: 9000-9999/tcp is not free: 9264/tcp is for the management API; give that another one (management.port)"}},
		{"port of no port", minimal + "management: {port: 65536}\n", []string{"management.port"}},
		{"rule for a service's port", web + "    ports: [80/tcp]\nrules:\n  - {ports: [1-99/tcp], affinity: single}\n", []string{"11:14: rules[0].ports[0]: 1-99/tcp is not free: service web has 80/tcp (cluster.yaml:9:13)"}},
		{"two rules for a port", minimal + "rules:\n  - {ports: [1-99/tcp], affinity: single}\n  - {ports: [99/tcp], affinity: client}\n", []string{"8:14: rules[1].ports[0]: 99/tcp is not free: rules[0] has 1-99/tcp (cluster.yaml:7:14)"}},
		{"rule without ports", minimal + "rules:\n  - affinity: single\n", []string{"7:5: rules[0].ports: is missing"}},
		{"rule for no ports", minimal + "rules:\n  - {ports: [], affinity: single}\n", []string{"rules[0].ports: must have at least 1 entry"}},
		{"rule without affinity", minimal + "rules:\n  - ports: [1/tcp]\n", []string{"7:5: rules[0].affinity: is missing"}},
		{"unknown key in a rule", minimal + "rules:\n  - {port: [1/tcp]}\n", []string{`7:6: rules[0]: unknown key "port"; did you mean "ports"?`}},
		{"disabled service", web + "    affinity: disabled\n", []string{`"disabled" is not one of none, client, network, single`}},
		{"disabled by default", minimal + "policy: {affinity: disabled}\n", []string{`policy.affinity: "disabled" is not one of`}},
		{"affinity", web + "    affinity: source\n", []string{"none, client, network, single"}},
		{"two checks", web + "    health: {http: \"http://127.0.0.1/\", tcp: \"127.0.0.1:1\"}\n", []string{"services.web.health: has both http and tcp"}},
		{"three checks", web + "    health: {exec: [/x], tcp: \"127.0.0.1:1\", http: \"http://127.0.0.1/\"}\n", []string{"services.web.health: has both http and tcp"}},
		{"exec and tcp", web + "    health: {exec: [/x], tcp: \"127.0.0.1:1\"}\n", []string{"9:13: services.web.health: has both tcp and exec; choose one"}},
		{"exec of nothing", web + "    health: {exec: []}\n", []string{"services.web.health.exec: must have at least 1 entry"}},
		{"relative exec", web + "    health: {exec: [check]}\n", []string{"9:20: services.web.health.exec: ", "full path"}},
		{"rise 0", web + "    health: {rise: 0}\n", []string{`9:20: services.web.health.rise: "0" is out of range; allowed: 1 to 100`}},
		{"fall as text", web + "    health: {fall: often}\n", []string{`"often" must be a whole number; allowed: 1 to 100`}},
		{"fall as fraction", web + "    health: {fall: 1.5}\n", []string{`"1.5" must be a whole number`}},
		{"fall too large for any number", web + "    health: {fall: 99999999999999999999}\n", []string{"is out of range; allowed: 1 to 100"}},
		{"detect", keyed("detect: quick"), []string{"4:11: cluster.detect: ", `"quick" must be a time with its unit`, "allowed: 100ms to 10s; or normal, fast or relaxed"}},
		{"detect too fast", keyed("detect: 99ms"), []string{"99ms is out of range; allowed: 100ms to 10s; or normal"}},
		{"detect 0", keyed("detect: 0s"), []string{"0s is out of range"}},
		{"drain", keyed("drain: 2h"), []string{"4:10: cluster.drain: 2h is out of range; allowed: 0 (do not wait) or 1ms to 1h"}},
		{"three keys more", keyed("accept-keys: [" + otherKey + ", " + otherKey + ", " + otherKey + "]"), []string{"cluster.accept-keys: has 3 entries; at most 2"}},
		{"own key accepted", keyed("accept-keys:\n    - " + otherKey + "\n    - " + key), []string{"6:7: cluster.accept-keys[1]: is cluster.key, which is accepted anyway"}},
		{"key accepted twice", keyed("accept-keys: [" + otherKey + ", " + otherKey + "]"), []string{"cluster.accept-keys[1]: is here twice"}},
		{"short key accepted", keyed("accept-keys: [aGVsbG8=]"), []string{"4:17: cluster.accept-keys[0]: holds 5 bytes instead of 32"}},
		{"short flow key", keyed("flow-key: aGVsbG8="), []string{"4:13: cluster.flow-key: holds 5 bytes instead of 32"}},
		{"policy name", minimal + "policy: {name: byload}\n", []string{`policy.name: "byload" is not one of byRandom, byLoad, bySource; did you mean "byLoad"?`}},
		{"name against balance", minimal + "policy:\n  balance: even\n  name: byLoad\n", []string{"7:12: policy.balance: is even, but policy.name byLoad (cluster.yaml:8:9) stands for load"}},
		{"name against affinity", minimal + "policy:\n  name: bySource\n  affinity: none\n", []string{"8:13: policy.affinity: is none, but policy.name bySource (cluster.yaml:7:9) stands for client"}},
		{"moves", minimal + "policy: {moves: 1025}\n", []string{"6:17: policy.moves: \"1025\" is out of range; allowed: 1 to 1024"}},
		{"weight without pattern", minimal + "policy:\n  weights:\n    - weight: 50\n", []string{"8:7: policy.weights[0].mac: is missing"}},
		{"weight without weight", minimal + "policy:\n  weights:\n    - mac: \"*\"\n", []string{"8:7: policy.weights[0].weight: is missing"}},
		{"weight 0", minimal + "policy: {weights: [{mac: \"*\", weight: 0}]}\n", []string{"policy.weights[0].weight: \"0\" is out of range; allowed: 1 to 1000"}},
		{"weights as map", minimal + "policy: {weights: {mac: x}}\n", []string{"policy.weights: is a map where a list"}},
		{"weight pattern", minimal + "policy: {weights: [{mac: \"[\", weight: 1}]}\n", []string{"policy.weights[0].mac: \"[\" must be a pattern"}},
		{"when all fail", minimal + "policy: {when-all-fail: panic}\n", []string{"policy.when-all-fail: \"panic\" is not one of serve, stop"}},
		{"https", web + "    health: {http: \"https://127.0.0.1/\"}\n", []string{"http:// URL whose host is an IP address"}},
		{"host name", web + "    health: {tcp: \"localhost:80\"}\n", []string{"IP address and a port"}},
		{"slow timeout", web + "    health: {timeout: 2s}\n", []string{"services.web.health.timeout: 2s is longer than the interval of 1s"}},
		{"env name", web + "    env: {A-B: x}\n", []string{`services.web.env: "A-B" must be letters`}},
		{"env number", web + "    env: {A: 1}\n", []string{"services.web.env.A: is a number", `put it in quotes: "1"`}},
		{"newline in run", minimal + "services:\n  - name: web\n    run: [\"/bin/x\", \"a\\nb\"]\n", []string{"without control characters"}},
		{"key twice", minimal + "vip:\n  ipv4: 10.0.0.1/8\n", []string{"6:1: ", "a second time; the first is in line 4"}},
		{"not YAML", "cluster: [\n", []string{"cluster.yaml:", "YAML"}},
		{"tab", "cluster:\n\tname: a\n", []string{"cluster.yaml:2:", "tab"}},
		{"two documents", minimal + "---\na: 1\n", []string{"a second YAML document"}},
		{"anchor", minimal + "interface: &a {}\n", []string{"6:12: ", "anchors"}},
		{"alias", minimal + "interface: *a\n", []string{"6:12: ", "aliases"}},
		{"merge", minimal + "interface:\n  <<: {}\n", []string{"7:3: ", "merge keys"}},
		{"tag", minimal + "interface: !x {}\n", []string{"6:12: ", "tags"}},
		{"binary", minimal + "#\x00\n", []string{"6:2: is not plain UTF-8"}},
		{"Latin-1", minimal + "# caf\xe9\n", []string{"6:6: is not plain UTF-8"}},
		{"a text", "hello\n", []string{"1:1: is a text where keys"}},
		{"a list", "- a\n", []string{"1:1: is a list where keys"}},
		{"deep flow", "a: " + strings.Repeat("[", 100_000), []string{"1:", "inside each other"}},
		{"too large", strings.Repeat("#", MaxBytes+1), []string{"larger than 1048576 bytes"}},
		{"many elements", strings.Repeat("- a\n", 100_000), []string{"more than 20000 elements"}},
		{"many services", minimal + "services:\n" + strings.Repeat("  - {}\n", 33), []string{"has 33 entries; at most 32"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			_, err := Load([]byte(tt.text), "cluster.yaml")
			if err == nil {
				t.Fatalf("Load succeeded; want %q", tt.want)
			}
			for _, want := range tt.want {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("Load: %v\nwant in it: %q", err, want)
				}
			}
			var p *Problem
			if !errors.As(err, &p) || p.Where == "" {
				t.Errorf("errors.As(%T, *Problem) found none with a place", err)
			}
			if len(err.Error()) > 10_000 {
				t.Errorf("a message of %d bytes", len(err.Error()))
			}
		})
	}
}

func TestAllProblemsAtOnce(t *testing.T) {
	_, err := Load([]byte(minimal+"sytem: {}\nservices:\n  - name: X\n    run: 1\n"), "c.yaml")
	var ps Problems
	if !errors.As(err, &ps) || len(ps) != 3 {
		t.Fatalf("Load: %v; want three problems", err)
	}
	for i, line := range []string{"c.yaml:6:", "c.yaml:8:", "c.yaml:9:"} {
		if !strings.HasPrefix(ps[i].Where, line) {
			t.Errorf("problem %d is at %s; want %s", i, ps[i].Where, line)
		}
	}
}

// TestDeepBlock nests block maps and lists, on one line and on many.
func TestDeepBlock(t *testing.T) {
	var steps strings.Builder
	for i := range 500 {
		steps.WriteString(strings.Repeat(" ", i) + "a:\n")
	}
	for _, text := range []string{steps.String(), strings.Repeat("- ", 10_000) + "a", strings.Repeat("a: ", 10_000)} {
		start := time.Now()
		if _, err := Load([]byte(text), "c.yaml"); err == nil {
			t.Errorf("Load(%.20q…) succeeded", text)
		}
		if d := time.Since(start); d > 20*time.Second {
			t.Errorf("Load(%.20q…) took %v", text, d)
		}
	}
}

func TestDerivedTimeout(t *testing.T) {
	c := load(t, minimal+"services:\n  - {name: web, run: [/w], health: {interval: 200ms}}\n")
	if got := c.Services[0].Health.Timeout; got != 200*time.Millisecond {
		t.Errorf("timeout = %v; want the interval", got)
	}
}

func TestValuesThatAreRight(t *testing.T) {
	c := load(t, minimal+`  ipv6: fd77::10/64
  ipv6-gateway: fe80::1
  clone-mac: 0A:cc:00:00:00:01
interface: {driver: virtio_net, mac: "52:54:*", pci: "0000:00:0[12].?", wait-carrier: 0s}
management: {mode: static, pattern: 10.78.0.0/16}
system: {watchdog: 0, console: ttyS0}
services:
  - name: "1"
    run:
      - /bin/x
      - --a=b c
    env: {A: "1", B: "it's"}
    ports: [53/udp, 53/tcp]
`)
	if got := c.VIP.CloneMAC.String(); got != "0a:cc:00:00:00:01" {
		t.Errorf("clone MAC %s", got)
	}
	if c.System.Watchdog != 0 || c.Interface.WaitCarrier != 0 {
		t.Errorf("watchdog %v, wait-carrier %v; want 0", c.System.Watchdog, c.Interface.WaitCarrier)
	}
	if s := c.Services[0]; !slices.Equal(s.Run, []string{"/bin/x", "--a=b c"}) || s.Env["B"] != "it's" || s.Ports[0] != (PortRange{53, 53, "udp"}) {
		t.Errorf("service %+v", s)
	}
}

// TestClear reads back what Clear writes, with every value set.
func TestClear(t *testing.T) {
	full := minimal + `  ipv4-gateway: 10.77.0.1
  ipv6: fd77::10/64
  ipv6-gateway: fe80::1
  clone-mac: 0a:cc:00:00:00:01
interface: {name: "e*", driver: virtio_net, pci: "0000:*", mac: "52:54:*", wait-carrier: 0s}
management: {mode: static, pattern: 10.78.0.0/16}
system: {watchdog: 0, console: ttyS0, log-level: warn}
policy:
  name: bySource
  moves: 1
  weights: [{mac: "52:54:*", weight: 50}, {mac: "*", weight: 1000}]
  when-all-fail: stop
rules:
  - {ports: [22/tcp, 6000-6010/udp], affinity: single}
  - {ports: [7/tcp], affinity: disabled}
services:
  - name: "1"
    run: [/bin/x, "--a=\"b\" c: #é\u2028", "", "*x", "\\"]
    env: {A: "1", B: "it's: {x}, [y]"}
    ports: [53/udp, 53-60/tcp]
    affinity: single
    health: {tcp: "[::1]:53", interval: 90s, timeout: 1m, rise: 1, fall: 100}
  - {name: on, run: ["/bin/y"], health: {exec: [/bin/z, "a, b"]}}
`
	full = strings.Replace(full, "\nvip:", "\n  detect: 250ms\n  drain: 0\n  flow-key: "+otherKey+"\n  accept-keys: ["+otherKey+"]\nvip:", 1)
	for _, text := range []string{minimal, full, string(DemoYAML)} {
		c := load(t, text)
		again, err := Load(c.Clear(), "clear")
		if err != nil {
			t.Fatalf("%v\n%s", err, c.Clear())
		}
		again.origins, c.origins = nil, nil
		if again.Cluster.Key != c.Cluster.Key || again.Cluster.FlowKey != c.Cluster.FlowKey || !reflect.DeepEqual(c, again) {
			t.Errorf("got  %+v\nwant %+v", again, c)
		}
	}
}

func TestCRLFAndBOM(t *testing.T) {
	load(t, "\ufeff"+strings.ReplaceAll(minimal, "\n", "\r\n"))
}

func TestManagementAddress(t *testing.T) {
	tests := []struct{ pattern, mac, want string }{
		{"10.78.0.0/16", "52:54:00:77:00:01", "10.78.0.1/16"},
		{"10.78.0.0/16", "52:54:00:77:12:34", "10.78.18.52/16"},
		{"10.0.0.0/8", "52:54:00:77:12:34", "10.119.18.52/8"},
		{"10.78.8.0/21", "52:54:00:77:ff:34", "10.78.15.52/21"},
		{"fd78::/64", "52:54:00:77:12:34", "fd78::5254:77:1234/64"},
		{"fd78::/80", "52:54:00:77:12:34", "fd78::5254:77:1234/80"},
		{"10.78.0.0/16", "52:54:00:77:00:00", "network address"},
		{"10.78.0.0/16", "52:54:00:77:ff:ff", "broadcast address"},
		{"10.77.0.0/24", "52:54:00:77:00:0a", "address of the VIP"},
	}
	for _, tt := range tests {
		c := load(t, minimal+"management: {mode: static, pattern: \""+tt.pattern+"\"}\n")
		mac, _ := net.ParseMAC(tt.mac)
		got, err := c.ManagementAddress(mac)
		if s := fmt.Sprint(got, err); !strings.Contains(s, tt.want) {
			t.Errorf("ManagementAddress(%s) in %s = %s; want %s", tt.mac, tt.pattern, s, tt.want)
		}
	}
}

func TestDefaultCloneMAC(t *testing.T) {
	for addr, want := range map[string]string{
		"10.77.0.10":        "02:cc:0a:4d:00:0a",
		"::ffff:10.77.0.10": "02:cc:0a:4d:00:0a",
		"fd77::10":          "02:cc:61:52:e0:f4",
	} {
		if got := DefaultCloneMAC(netip.MustParseAddr(addr)).String(); got != want {
			t.Errorf("DefaultCloneMAC(%s) = %s; want %s", addr, got, want)
		}
	}
}

func TestDerive(t *testing.T) {
	k := demoKey
	a, b := k.Derive("flow hash", 16), k.Derive("presence", 16)
	if bytes.Equal(a, b) || len(a) != 16 || bytes.Contains(k[:], a[:4]) {
		t.Errorf("Derive gives %x and %x", a, b)
	}
	if want := "ae6939f4a31c3a17caeaf9ce40e66945"; fmt.Sprintf("%x", a) != want {
		t.Errorf(`Derive("flow hash", 16) = %x; want %s: nodes of another version would disagree`, a, want)
	}
}

// Keys whose text is known in every form.
var (
	key2 = base64.StdEncoding.EncodeToString([]byte("another secret, of 32 characters"))
	key3 = base64.StdEncoding.EncodeToString([]byte("a third secret of 32 characters!"))
)

// TestKeyNeverShows prints a key and a configuration in every way at hand.
func TestKeyNeverShows(t *testing.T) {
	c := load(t, keyed("accept-keys: ["+key3+"]\n  flow-key: "+key2))
	var out bytes.Buffer
	for _, format := range []string{"%v", "%+v", "%#v", "%s", "%x", "%q", "%d"} {
		fmt.Fprintf(&out, format+"\n", c.Cluster.Key)
		fmt.Fprintf(&out, format+"\n", &c.Cluster.Key)
		fmt.Fprintf(&out, format+"\n", c)
		fmt.Fprintf(&out, format+"\n", *c)
	}
	slog.New(slog.NewTextHandler(&out, nil)).Info("x", "key", c.Cluster.Key, "config", c, "pointer", &c.Cluster.Key)
	slog.New(slog.NewJSONHandler(&out, nil)).Info("x", "key", c.Cluster.Key, "config", c)
	for _, marshal := range []func(any) ([]byte, error){json.Marshal, yaml.Marshal} {
		b, err := marshal(c)
		if err != nil {
			t.Error(err)
		}
		out.Write(b)
	}
	fmt.Fprint(&out, c.Effective())
	// In messages, where the line with the key is the one in error, or near it.
	for _, text := range []string{
		strings.Replace(minimal, "  key: ", "  key:  [", 1),
		strings.Replace(minimal, "  key: ", "  kye: ", 1),
		strings.Replace(minimal, "  key: ", "  \"key\": x", 1),
		strings.Replace(minimal, "  key: ", "  key: |\n    ", 1),
		"cluster: {name: A, key: " + key + "}\nvip: {}\n",
		strings.Replace(minimal, "name: a", "name: a\n  key: "+key, 1),
		strings.Replace(minimal, "\n", "\n\t", 2),
		keyed("accept-keys: [" + key2[:20] + ", " + key3[:20] + "]"),
		keyed("accept-keys:\n    - " + key2[:20] + "\n    - \"" + key3[:20] + "\""),
		keyed("accept-keys: [" + key2 + ", " + key2 + "]"),
		keyed("accept-keys: " + key2[:20]),
		keyed("flow-key: " + key2[:20]),
		keyed("flow-keys: [" + key2[:20] + ", " + key3[:20] + "]"),
	} {
		_, err := Load([]byte(text), "c.yaml")
		fmt.Fprintln(&out, err)
	}
	_, ignored, _ := LoadWithCmdline([]byte(minimal), "c.yaml", "clonecluster.cluster.key="+key[:40]+" clonecluster.cluster.kye="+key+" clonecluster.cluster.accept-keys="+key2+","+key3[:20]+" clonecluster.cluster.flow-key="+key3[:20])
	fmt.Fprintln(&out, ignored)
	s := out.String()
	for _, secret := range []string{key[:12], key[20:32], "not a secret", "110 111 116", "0x6e, 0x6f", "6e6f7420", key2[:12], key3[:12], "another secret", "third secret"} {
		if i := strings.Index(s, secret); i >= 0 {
			t.Errorf("the key shows: %q", s[max(0, i-200):min(len(s), i+80)])
		}
	}
}

func TestOverrides(t *testing.T) {
	file := minimal + "services:\n  - {name: web, run: [/w], env: {A: x}}\n  - {name: a-b, run: [/w]}\n"
	tests := []struct {
		name, cmdline string
		want          map[string]string // path → value
		ignored       []string          // a text of each problem
	}{
		{"none", "console=ttyS0 quiet", map[string]string{"system.log-level": "info default"}, nil},
		{"one", "quiet clonecluster.system.log-level=debug panic=10", map[string]string{"system.log-level": "debug cmdline"}, nil},
		{"underscore", "clonecluster.system.log_level=debug", map[string]string{"system.log-level": "debug cmdline"}, nil},
		{"last wins", "clonecluster.system.log-level=debug clonecluster.system.log-level=warn", map[string]string{"system.log-level": "warn cmdline"}, nil},
		{"service", "clonecluster.services.web.affinity=client clonecluster.services.a_b.affinity=single", map[string]string{"services.web.affinity": "client cmdline", "services.a-b.affinity": "single cmdline"}, nil},
		{"list", "clonecluster.services.web.ports=80/tcp,53/udp", map[string]string{"services.web.ports": `["80/tcp","53/udp"] cmdline`}, nil},
		{"environment", `clonecluster.services.web.env.B="two words"`, map[string]string{"services.web.env.A": "x cluster.yaml:7", "services.web.env.B": "two words cmdline"}, nil},
		{"all in quotes", `"clonecluster.services.web.env.B=two words" clonecluster.system.console=tty0`, map[string]string{"services.web.env.B": "two words cmdline", "system.console": "tty0 cmdline"}, nil},
		{"after --", "-- clonecluster.system.log-level=debug", map[string]string{"system.log-level": "info default"}, nil},
		{"VIP and gateway together", "clonecluster.vip.ipv4-gateway=10.9.0.1 clonecluster.vip.ipv4=10.9.0.2/24", map[string]string{"vip.ipv4": "10.9.0.2/24 cmdline", "vip.ipv4-gateway": "10.9.0.1 cmdline", "vip.clone-mac": "02:cc:0a:09:00:02 derived"}, nil},
		{"glob", "clonecluster.interface.mac=*:01", map[string]string{"interface.mac": "*:01 cmdline"}, nil},
		{"unknown", "clonecluster.system.log-levle=debug clonecluster.system.watchdog=0", map[string]string{"system.log-level": "info default", "system.watchdog": "0s cmdline"},
			[]string{`clonecluster.system.log-levle: system: unknown name "log-levle"; did you mean "log-level"?`}},
		{"bad value", "clonecluster.system.log-level=loud", map[string]string{"system.log-level": "info default"}, []string{"clonecluster.system.log-level: system.log-level: \"loud\" is not one of debug"}},
		{"contradiction", "clonecluster.vip.ipv4-gateway=10.9.0.1 clonecluster.system.log-level=debug", map[string]string{"vip.ipv4-gateway": " default", "system.log-level": "debug cmdline"}, []string{"not in the VIP's subnet 10.77.0.0/24"}},
		{"mode without pattern", "clonecluster.management.mode=static", map[string]string{"management.mode": "dhcp default"}, []string{"management.pattern: is missing"}},
		{"mode with pattern", "clonecluster.management.mode=static clonecluster.management.pattern=10.8.0.0/16", map[string]string{"management.mode": "static cmdline"}, nil},
		{"no such service", "clonecluster.services.wbe.affinity=client", nil, []string{`no service is called "wbe"; did you mean "web"?`}},
		{"section", "clonecluster.system=1", nil, []string{"is a section; name one of its values: console, log-level, datapath, ingress, watchdog"}},
		{"too deep", "clonecluster.system.log-level.x=1", nil, []string{"is one value; nothing can follow it"}},
		{"name of a service", "clonecluster.services.web.name=x", nil, []string{"cannot be overridden"}},
		{"run emptied", "clonecluster.services.web.run=", map[string]string{"services.web.run": `["/w"] cluster.yaml:7`}, []string{"at least 1 entry"}},
		{"keys", "clonecluster.cluster.accept_keys=" + otherKey + " clonecluster.cluster.flow-key=" + otherKey, map[string]string{"cluster.accept-keys": `["(secret)"] cmdline`, "cluster.flow-key": "(secret) cmdline"}, nil},
		{"own key accepted", "clonecluster.cluster.accept-keys=" + key, map[string]string{"cluster.accept-keys": "[] default"}, []string{"is cluster.key"}},
		{"detect", "clonecluster.cluster.detect=fast clonecluster.cluster.drain=0", map[string]string{"cluster.detect": "fast cmdline", "cluster.drain": "0s cmdline"}, nil},
		{"policy by name", "clonecluster.policy.name=byLoad clonecluster.policy.when_all_fail=stop clonecluster.policy.moves=7", map[string]string{"policy.name": "byLoad cmdline", "policy.balance": "load derived", "policy.affinity": "none derived", "policy.when-all-fail": "stop cmdline", "policy.moves": "7 cmdline"}, nil},
		{"policy of its own", "clonecluster.policy.balance=load clonecluster.policy.affinity=client", map[string]string{"policy.name": " default", "policy.balance": "load cmdline", "services.web.affinity": "client derived"}, nil},
		{"policy against itself", "clonecluster.policy.balance=load clonecluster.policy.name=byRandom", map[string]string{"policy.name": "byRandom derived", "policy.balance": "even default"}, []string{"is load, but policy.name byRandom (clonecluster.policy.name) stands for even", "policy.balance"}},
		{"number", "clonecluster.policy.moves=many", map[string]string{"policy.moves": "32 default"}, []string{"policy.moves: \"many\" must be a whole number"}},
		{"weight of this machine", "clonecluster.policy.weights[0].mac=* clonecluster.policy.weights[0].weight=50", map[string]string{"policy.weights[0].mac": "* cmdline", "policy.weights[0].weight": "50 cmdline"}, nil},
		{"two weights", "clonecluster.policy.weights[0].mac=a* clonecluster.policy.weights[0].weight=50 clonecluster.policy.weights[1].mac=b* clonecluster.policy.weights[1].weight=60", map[string]string{"policy.weights[1].mac": "b* cmdline", "policy.weights[1].weight": "60 cmdline"}, nil},
		{"half a weight", "clonecluster.policy.weights[0].mac=* clonecluster.system.log-level=debug", map[string]string{"policy.weights": "[] default", "system.log-level": "debug cmdline"}, []string{"clonecluster.policy.weights[0].mac: policy.weights[0].weight: is missing"}},
		{"weight beyond the last", "clonecluster.policy.weights[1].mac=*", map[string]string{"policy.weights": "[] default"}, []string{`policy.weights: "[1]" is not the number of an entry; there are 0, and [0] makes a new one`}},
		{"weight without number", "clonecluster.policy.weights.mac=*", nil, []string{"policy.weights: is a list; say which entry, such as [0]"}},
		{"all weights", "clonecluster.policy.weights=50", nil, []string{"cannot be overridden as a whole"}},
		{"one weight as a whole", "clonecluster.policy.weights[0]=50", map[string]string{"policy.weights": "[] default"}, []string{"is a section; name one of its values: mac, weight"}},
		{"one port", "clonecluster.services.web.ports[0]=80/tcp", nil, []string{"services.web.ports: is a list; give all of it, with commas"}},
		{"rule", "clonecluster.rules[0].ports=22/tcp,6000-6010/udp clonecluster.rules[0].affinity=disabled", map[string]string{"rules[0].ports": `["22/tcp","6000-6010/udp"] cmdline`, "rules[0].affinity": "disabled cmdline"}, nil},
		{"rule for a service's port", "clonecluster.services.web.ports=80/tcp clonecluster.rules[0].ports=1-99/tcp clonecluster.rules[0].affinity=single", map[string]string{"rules": "[] default"}, []string{"not free", "not free", "is missing"}},
		{"check", "clonecluster.services.web.health.exec=/bin/check,-v clonecluster.services.web.health.fall=1", map[string]string{"services.web.health.exec": `["/bin/check","-v"] cmdline`, "services.web.health.fall": "1 cmdline"}, nil},
		{"port of another", "clonecluster.services.web.ports=80/tcp clonecluster.services.a-b.ports=80/tcp", map[string]string{"services.web.ports": "[] default"}, []string{"not free", "not free"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			c, ignored, err := LoadWithCmdline([]byte(file), "cluster.yaml", tt.cmdline)
			if err != nil {
				t.Fatal(err)
			}
			got := map[string]string{}
			for _, e := range c.Effective() {
				got[e.Path] = e.Value + " " + e.Source
			}
			for path, want := range tt.want {
				if got[path] != want {
					t.Errorf("%s = %q; want %q", path, got[path], want)
				}
			}
			if len(ignored) != len(tt.ignored) {
				t.Fatalf("ignored: %v; want %q", ignored, tt.ignored)
			}
			for i, want := range tt.ignored {
				if !strings.Contains(ignored[i].Error(), want) || !strings.HasPrefix(ignored[i].Where, Prefix) || strings.Contains(ignored[i].Error(), "ignored") {
					t.Errorf("ignored: %v; want %q", ignored[i], want)
				}
			}
		})
	}
}

func TestOverrideMendsFile(t *testing.T) {
	file := "cluster:\n  name: a\nvip:\n  ipv4: 10.77.0.10/24\n"
	if _, _, err := LoadWithCmdline([]byte(file), "c.yaml", ""); err == nil {
		t.Error("a file without a key was loaded")
	}
	c, ignored, err := LoadWithCmdline([]byte(file), "c.yaml", "clonecluster.cluster.key="+key)
	if err != nil || len(ignored) > 0 || c.Cluster.Key != demoKey {
		t.Errorf("with the key on the command line: %v, %v", ignored, err)
	}
	if _, ignored, err = LoadWithCmdline([]byte(file), "c.yaml", "clonecluster.system.x=1"); err == nil || len(ignored) != 1 {
		t.Errorf("broken file and broken override: ignored %v, err %v", ignored, err)
	}
}

// TestTags checks that every value has what the decoder and the generators
// need, so that the panics there cannot happen.
func TestTags(t *testing.T) {
	var walk func(reflect.Type)
	walk = func(typ reflect.Type) {
		for _, f := range reflect.VisibleFields(typ) {
			if !f.IsExported() {
				continue
			}
			if f.Tag.Get("yaml") == "" {
				t.Errorf("%v.%s has no yaml tag", typ, f.Name)
			}
			if name := f.Tag.Get("format"); name != "" && Formats[name].check == nil {
				t.Errorf("%v.%s: no format %q", typ, f.Name, name)
			}
			if d := f.Tag.Get("default"); d != "" {
				if err := setScalar(reflect.New(f.Type).Elem(), f.Tag, d); err != nil {
					t.Errorf("%v.%s: the default %v", typ, f.Name, err)
				}
			}
			switch {
			case f.Type == typeOf[time.Duration](), f.Type == typeOf[Detect]():
				tagDuration(f.Tag, "min")
				tagDuration(f.Tag, "max")
			case f.Type == typeOf[int]():
				tagCount(f.Tag, "min")
				tagCount(f.Tag, "max")
			case isScalar(f.Type):
			case f.Type.Kind() == reflect.Struct:
				walk(f.Type)
			default:
				tagCount(f.Tag, "max")
				if f.Type.Elem().Kind() == reflect.Struct && !isScalar(f.Type.Elem()) {
					walk(f.Type.Elem())
				}
			}
		}
	}
	walk(reflect.TypeFor[Config]())
}

// TestNodeStaysSmall keeps the schema generator and the YAML encoder's friends
// out of what runs on a node.
func TestNodeStaysSmall(t *testing.T) {
	root, err := filepath.Abs("..")
	if err != nil {
		t.Fatal(err)
	}
	for _, pkg := range []string{"./config", "./uinit", "./netcore/..."} {
		cmd := exec.Command("go", "list", "-e", "-deps", pkg)
		cmd.Dir = root
		out, err := cmd.Output()
		if err != nil {
			t.Fatalf("go list -deps %s: %v", pkg, err)
		}
		for dep := range strings.FieldsSeq(string(out)) {
			for _, banned := range []string{"github.com/invopop/jsonschema", "clonecluster/config/schema", "github.com/spf13/cobra", "gvisor.dev/", "golang.org/x/tools"} {
				if strings.HasPrefix(dep, banned) && !strings.Contains(pkg, "netnstest") {
					t.Errorf("%s imports %s", pkg, dep)
				}
			}
		}
	}
}

func FuzzLoad(f *testing.F) {
	f.Add(string(DemoYAML), "clonecluster.services.web.ports=80/tcp,90/udp")
	f.Add(minimal, `clonecluster.system.log-level="debug" "clonecluster.vip.ipv4=1.2.3.4/8"`)
	f.Add("a: [", "clonecluster.")
	f.Add("? a\n: b\n", "clonecluster.services.0.run")
	f.Add(minimal+"policy: {name: byLoad, weights: [{mac: x, weight: 5}]}\nrules: [{ports: [1-9/udp], affinity: disabled}]\n", "clonecluster.policy.weights[1].mac=* clonecluster.rules[0].ports=1/tcp clonecluster.policy.weights[1].weight=3")
	f.Add(keyed("detect: 1s\n  accept-keys: ["+otherKey+"]"), "clonecluster.cluster.detect=fast clonecluster.policy.[0]=")
	f.Add("services: [{name: a}, {name: a}, {}]", "clonecluster.services.a.env.X=1")
	f.Add("cluster: {key: |\n  x\n}", "\"")
	f.Fuzz(func(t *testing.T, text, cmdline string) {
		c, _, err := LoadWithCmdline([]byte(text), "f.yaml", cmdline)
		if (c == nil) == (err == nil) {
			t.Fatalf("config %v and error %v", c, err)
		}
		if c == nil {
			_ = err.Error()
			return
		}
		for _, e := range c.Effective() {
			if e.Source == "" || e.Path == "" {
				t.Errorf("entry %+v", e)
			}
		}
		if again, err := Load(c.Clear(), "clear"); err != nil || again.Cluster.Key != c.Cluster.Key || len(again.Services) != len(c.Services) || len(again.Rules) != len(c.Rules) || !reflect.DeepEqual(again.Policy, c.Policy) {
			t.Errorf("Clear is not read back: %v\n%s", err, c.Clear())
		}
		if !c.VIP.IPv4.IsValid() && !c.VIP.IPv6.IsValid() || len(c.VIP.CloneMAC) != 6 || c.VIP.CloneMAC[0]&3 != 2 {
			t.Errorf("accepted VIP %+v", c.VIP)
		}
	})
}
