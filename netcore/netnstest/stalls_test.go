package netnstest

import (
	"testing"
	"time"
)

func TestStalls(t *testing.T) {
	start := time.Now()
	at := func(ms int) time.Time { return start.Add(time.Duration(ms) * time.Millisecond) }
	s := &Stalls{spans: []stall{{at(100), at(125)}, {at(300), at(345)}, {at(500), at(520)}}}
	for _, tt := range []struct {
		from, to int
		want     time.Duration
	}{
		{0, 1000, 40}, {0, 200, 20}, {110, 120, 20}, {130, 290, 0}, {320, 600, 40}, {346, 600, 15}, {600, 1000, 0},
	} {
		if got := s.Between(at(tt.from), at(tt.to)); got != tt.want*time.Millisecond {
			t.Errorf("Between(%d, %d) = %v; want %v", tt.from, tt.to, got, tt.want*time.Millisecond)
		}
	}
}
