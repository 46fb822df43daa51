package engine

import (
	"testing"
	"time"

	"clonecluster/netcore/api"
)

// TestRecordInOrder: of two threads that note something at once, the one that looked at
// the clock first may come second.
func TestRecordInOrder(t *testing.T) {
	var told telling
	told.init()
	now := time.Now()
	for _, ms := range []time.Duration{0, 20, 10, 30} {
		told.write(now.Add(ms*time.Millisecond), api.Event{Kind: "state"})
	}
	got, _, _ := told.events.After(0)
	for i, ms := range []time.Duration{0, 20, 20, 30} {
		if want := now.Add(ms * time.Millisecond); len(got) != 4 || !got[i].Time.Equal(want) {
			t.Fatalf("event %d is not of %s: %+v", i, want, got)
		}
	}
}
