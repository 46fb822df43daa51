package config

import (
	"fmt"
	"net"
	"slices"
	"testing"
)

func TestPolicyNames(t *testing.T) {
	for _, tt := range []struct{ text, want string }{
		{"{}", "byRandom even none"},
		{"{name: byRandom}", "byRandom even none"},
		{"{name: byLoad}", "byLoad load none"},
		{"{name: bySource}", "bySource even client"},
		{"{name: bySource, affinity: client, balance: even}", "bySource even client"},
		{"{balance: load}", "byLoad load none"},
		{"{affinity: client}", "bySource even client"},
		{"{affinity: single}", " even single"},
		{"{balance: load, affinity: client}", " load client"},
	} {
		p := load(t, minimal+"policy: "+tt.text+"\n").Policy
		if got := fmt.Sprintf("%s %s %s", p.Name, p.Balance, p.Affinity); got != tt.want {
			t.Errorf("policy: %s is %q; want %q", tt.text, got, tt.want)
		}
	}
}

func TestAffinityOfServices(t *testing.T) {
	c := load(t, minimal+"policy: {name: bySource}\nservices:\n  - {name: a, run: [/a]}\n  - {name: b, run: [/b], affinity: none}\n")
	if a, b := c.Services[0].Affinity, c.Services[1].Affinity; a != AffinityClient || b != AffinityNone {
		t.Errorf("affinities %s and %s; want client, from the policy, and none", a, b)
	}
	if i := slices.IndexFunc(c.Effective(), func(e Entry) bool { return e == Entry{"services.a.affinity", "client", fromDerived} }); i < 0 {
		t.Errorf("Effective() does not say that the affinity is derived: %v", c.Effective())
	}
}

func TestWeight(t *testing.T) {
	c := load(t, minimal+`policy:
  weights:
    - {mac: "52:54:00:77:00:01", weight: 1}
    - {mac: "52:54:00:AB:*", weight: 1000}
    - {mac: "52:54:00:*", weight: 50}
    - {mac: "52:54:00:77:00:02", weight: 7}
`)
	for mac, want := range map[string]int{
		"52:54:00:77:00:01": 1,
		"52:54:00:77:00:02": 50, // an earlier pattern matches
		"52:54:00:ab:00:02": 1000,
		"52:55:00:77:00:01": DefaultWeight,
	} {
		hw, err := net.ParseMAC(mac)
		if err != nil {
			t.Fatal(err)
		}
		if got := c.Weight(hw); got != want {
			t.Errorf("Weight(%s) = %d; want %d", mac, got, want)
		}
	}
	if got := load(t, minimal).Weight(net.HardwareAddr{2, 0, 0, 0, 0, 1}); got != 100 {
		t.Errorf("Weight without a list = %d; want 100", got)
	}
}
