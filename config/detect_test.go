package config

import (
	"testing"
	"time"
)

func TestDetect(t *testing.T) {
	const ms = time.Millisecond
	for _, tt := range []struct {
		text                string // in the file; empty: left out
		shown               string
		dead, beacon, lease time.Duration
	}{
		{"", "normal", 300 * ms, 100 * ms, 200 * ms},
		{"normal", "normal", 300 * ms, 100 * ms, 200 * ms},
		{"fast", "fast", 150 * ms, 50 * ms, 100 * ms},
		{"relaxed", "relaxed", time.Second, time.Second / 3, time.Second * 2 / 3},
		{"1000ms", "relaxed", time.Second, time.Second / 3, time.Second * 2 / 3},
		{"900ms", "900ms", 900 * ms, 300 * ms, 600 * ms},
		{"100ms", "100ms", 100 * ms, 100 * ms / 3, 200 * ms / 3},
		{"10s", "10s", 10 * time.Second, 10 * time.Second / 3, 20 * time.Second / 3},
	} {
		text := minimal
		if tt.text != "" {
			text = keyed("detect: " + tt.text)
		}
		d := load(t, text).Cluster.Detect
		if d.String() != tt.shown || d.Dead() != tt.dead || d.Beacon() != tt.beacon || d.Lease() != tt.lease {
			t.Errorf("detect: %q = %v: dead %v, beacon %v, lease %v; want %v: %v, %v, %v",
				tt.text, d, d.Dead(), d.Beacon(), d.Lease(), tt.shown, tt.dead, tt.beacon, tt.lease)
		}
	}
}
