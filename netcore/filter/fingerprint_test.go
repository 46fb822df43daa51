package filter

import (
	"net/netip"
	"reflect"
	"slices"
	"testing"
	"time"
)

func fingerprintConfig() Config {
	cfg := testConfig()
	cfg.Rules = []Rule{
		{ProtoTCP, 22, 22, AffinitySingle, false},
		{ProtoTCP, 8000, 8010, AffinityClient, false},
		{ProtoUDP, 8000, 8010, AffinityClient, false},
		{ProtoTCP, 9, 9, AffinityNone, true},
	}
	return cfg
}

// TestFingerprint changes one thing at a time. Nothing that must be the same on
// every node goes unnoticed, and nothing else is noticed.
func TestFingerprint(t *testing.T) {
	last := fingerprintConfig().Fingerprint()
	seen := map[uint64]string{last: "nothing"}
	changed := map[string]bool{}
	for _, c := range []struct {
		name, field string
		change      func(*Config)
	}{
		{"first byte of the key", "HashKey", func(c *Config) { c.HashKey[0]++ }},
		{"last byte of the key", "HashKey", func(c *Config) { c.HashKey[15]++ }},
		{"IPv4 VIP", "VIP4", func(c *Config) { c.VIP4 = other4 }},
		{"no IPv4 VIP", "VIP4", func(c *Config) { c.VIP4 = netip.Addr{} }},
		{"IPv6 VIP", "VIP6", func(c *Config) { c.VIP6 = other6 }},
		{"no IPv6 VIP", "VIP6", func(c *Config) { c.VIP6 = netip.Addr{} }},
		{"default client", "Default", func(c *Config) { c.Default = AffinityClient }},
		{"default single", "Default", func(c *Config) { c.Default = AffinitySingle }},
		{"no rules", "Rules", func(c *Config) { c.Rules = nil }},
		{"a rule less", "Rules", func(c *Config) { c.Rules = c.Rules[1:] }},
		{"a rule more", "Rules", func(c *Config) { c.Rules = append(c.Rules, Rule{ProtoTCP, 1, 1, AffinityNone, false}) }},
		{"protocol", "Rules", func(c *Config) { c.Rules[0].Proto = ProtoUDP }},
		{"first port", "Rules", func(c *Config) { c.Rules[1].PortLo++ }},
		{"last port", "Rules", func(c *Config) { c.Rules[1].PortHi++ }},
		{"affinity", "Rules", func(c *Config) { c.Rules[0].Affinity = AffinityClient }},
		{"disabled", "Rules", func(c *Config) { c.Rules[3].Disabled = false }},
	} {
		cfg := fingerprintConfig()
		c.change(&cfg)
		got := cfg.Fingerprint()
		if before, ok := seen[got]; ok {
			t.Errorf("%s: the fingerprint is that of: %s", c.name, before)
		}
		seen[got], changed[c.field] = c.name, true
	}
	for name, change := range map[string]func(*Config){
		"order of the rules": func(c *Config) { slices.Reverse(c.Rules) },
		"a rule in two parts": func(c *Config) {
			c.Rules[1].PortHi = 8004
			c.Rules = append(c.Rules, Rule{ProtoTCP, 8005, 8010, AffinityClient, false})
		},
		"local ports":   func(c *Config) { c.LocalPorts = [2]uint16{1024, 2000} },
		"longest frame": func(c *Config) { c.MaxFrame = 1514 },
		"patience":      func(c *Config) { c.ResetPatience = time.Second },
		"clone MAC":     func(c *Config) { c.CloneMAC[5]++ },
	} {
		cfg := fingerprintConfig()
		change(&cfg)
		if got := cfg.Fingerprint(); got != last {
			t.Errorf("%s: fingerprint %x; want %x as without", name, got, last)
		}
	}
	// A field that somebody adds must be in one of the two lists.
	for _, f := range reflect.VisibleFields(reflect.TypeFor[Config]()) {
		if !changed[f.Name] && !slices.Contains([]string{"CloneMAC", "LocalPorts", "MaxFrame", "ResetPatience"}, f.Name) {
			t.Errorf("Config.%s is not in the fingerprint; is it meant to be?", f.Name)
		}
	}
}

// TestFingerprintStays: nodes of two versions compare theirs. If this must
// change, the text that begins the hash must, too.
func TestFingerprintStays(t *testing.T) {
	if got, want := fingerprintConfig().Fingerprint(), uint64(0xd2f9a414b367e724); got != want {
		t.Errorf("Fingerprint() = %#x; want %#x", got, want)
	}
}

func TestFingerprintLeavesTheRulesAlone(t *testing.T) {
	cfg := fingerprintConfig()
	slices.Reverse(cfg.Rules)
	before := slices.Clone(cfg.Rules)
	cfg.Fingerprint()
	if !slices.Equal(cfg.Rules, before) {
		t.Errorf("after Fingerprint the rules are %+v; want %+v", cfg.Rules, before)
	}
}
