package config

import (
	"strings"
	"testing"
)

func TestWarnings(t *testing.T) {
	// A configuration about which there is nothing to say.
	quiet := strings.Replace(minimal, key, otherKey, 1) + "services:\n  - {name: web, run: [/w], ports: [80/tcp]}\n"
	with := func(lines string) string { return strings.Replace(quiet, "\nvip:", "\n  "+lines+"\nvip:", 1) }
	weights := func(entries string) string { return quiet + "policy: {weights: [" + entries + "]}\n" }
	service := func(keys string) string {
		return strings.Replace(quiet, "run: [/w], ports: [80/tcp]", keys, 1)
	}
	for _, tt := range []struct {
		name, text string
		want       []string // a text of each warning
	}{
		{"nothing", quiet, nil},
		{"demo key", strings.Replace(quiet, otherKey, key, 1), []string{"cluster.key is the published key"}},
		{"demo key accepted", with("accept-keys: [" + key2 + ", " + key + "]\n  flow-key: " + otherKey), []string{"cluster.accept-keys[1] is the published key of the demo, and everybody's frames"}},
		{"demo key as flow key", with("flow-key: " + key), []string{"cluster.flow-key is the published key"}},
		{"keys change", with("accept-keys: [" + key2 + "]\n  flow-key: " + otherKey), nil},
		{"keys have changed", with("accept-keys: [" + key2 + "]\n  flow-key: " + key2), nil},
		{"keys change without flow key", with("accept-keys: [" + key2 + "]"), []string{"cluster.accept-keys without cluster.flow-key"}},
		{"flow key of its own", with("flow-key: " + key2), nil},
		{"no services", strings.Replace(minimal, key, otherKey, 1), []string{"services is empty"}},
		{"no ports", strings.Replace(quiet, ", ports: [80/tcp]", "", 1) + "policy: {name: bySource}\n", []string{"services.web has no ports: its clients are spread as for affinity client"}},
		{"ports of webd", service("run: [/bin/webd], ports: [80/tcp], health: {http: http://127.0.0.1/healthz}"), nil},
		{"webd elsewhere", service(`run: [/bin/webd, --listen, ":8081"], ports: [8000-8081/tcp], health: {http: "http://127.0.0.1:8081/healthz"}`), nil},
		{"webd listens elsewhere", service(`run: [/bin/webd, --listen, ":8081"], ports: [80/tcp]`), []string{"services.web listens on port 8081, which is not among its ports"}},
		{"webd listens=", service(`run: [/bin/webd, "--listen=:8081"], ports: [80/tcp, 8081/udp]`), []string{"services.web listens on port 8081"}},
		{"webd listens on 80", service(`run: [/bin/webd], ports: [8081/tcp], health: {http: "http://[::1]:8081/"}`), []string{"services.web listens on port 80,", "services.web.health.http asks port 8081, and the service listens on port 80"}},
		{"webd's health by TCP", service(`run: [/bin/webd], ports: [80/tcp], health: {tcp: "127.0.0.1:26"}`), []string{"services.web.health.tcp asks port 26"}},
		{"health of another program", service(`run: [/w], ports: [443/tcp], health: {http: http://127.0.0.1/}`), nil},
		{"weights", weights(`{mac: "a*", weight: 1}, {mac: "*", weight: 2}`), nil},
		{"weights behind all", weights(`{mac: "**", weight: 1}, {mac: "a*", weight: 2}, {mac: "b*", weight: 2}`), []string{"policy.weights[1] never counts: policy.weights[0] matches every machine", "policy.weights[2] never counts"}},
		{"weight twice", weights(`{mac: "AB*", weight: 1}, {mac: "ab*", weight: 2}`), []string{"policy.weights[1] never counts: policy.weights[0] has the same pattern"}},
		{"weight of half an address", weights(`{mac: "52:54:00", weight: 1}`), []string{`policy.weights[0] never counts: no MAC address is "52:54:00"`}},
		{"weight of a whole address", weights(`{mac: "52:54:00:AA:BB:CC", weight: 1}`), nil},
		{"disabled", quiet + "rules: [{ports: [22/tcp, 1-79/udp], affinity: disabled}, {ports: [40000/tcp], affinity: single}]\n", nil},
		{"local ports disabled", quiet + "rules: [{ports: [22/tcp, 81-65535/tcp], affinity: disabled}]\n", []string{"rules[0] disables 81-65535/tcp, and nodes open connections from ports 32768 to 60999"}},
	} {
		got := load(t, tt.text).Warnings()
		if len(got) != len(tt.want) {
			t.Errorf("%s: warnings %q; want %q", tt.name, got, tt.want)
			continue
		}
		for i, want := range tt.want {
			if !strings.Contains(got[i], want) {
				t.Errorf("%s: warning %q; want %q in it", tt.name, got[i], want)
			}
		}
	}
}
