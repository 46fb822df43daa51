package simulator

import (
	"bytes"
	"context"
	"encoding/xml"
	"errors"
	"io"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"clonecluster/netcore/membership"
)

// smallCosts are measured once for all tests; those of large clusters take minutes.
var smallCosts = sync.OnceValues(func() ([]Cost, error) {
	return MeasureCosts(context.Background(), []int{2, 3, 4, 8, 16}, nil)
})

func costsOf(t *testing.T) []Cost {
	t.Helper()
	costs, err := smallCosts()
	if err != nil {
		t.Fatal(err)
	}
	return costs
}

func TestCosts(t *testing.T) {
	costs := costsOf(t)
	if len(costs) != 10 {
		t.Fatalf("%d costs", len(costs))
	}
	for _, c := range costs {
		dead, interval := c.Profile.Dead, c.Profile.Interval
		const crossings = 2 * time.Millisecond // of a few frames
		for _, tt := range []struct {
			what        string
			got         Spread
			least, most time.Duration
		}{
			// Not before its lease has ended.
			{"noticed", c.Detect, c.Profile.Lease, dead + interval},
			{"served again", c.Recover, c.Profile.Lease, dead + interval},
			{"joined", c.Join, dead, dead + 2*interval},
			{"gap", c.Gap, 0, crossings},
		} {
			if tt.got.P50 < tt.least || tt.got.P50 > tt.got.P99 || tt.got.P99 > tt.got.Max || tt.got.Max > tt.most {
				t.Errorf("%d nodes, %s: %s after %v ms; want %v to %v", c.Nodes, c.Profile.Name, tt.what, tt.got, tt.least, tt.most)
			}
		}
		codec := membership.NewCodec("costs", make([]byte, 32))
		beacon := len(codec.Beacon(&membership.Beacon{Heard: make([]membership.Tag, c.Nodes-1)})) + overhead
		if rate := float64(beacon) / interval.Seconds(); c.Beacon != beacon || c.SentRate < 0.99*rate || c.SentRate > 1.01*rate {
			t.Errorf("%d nodes, %s: a beacon of %d bytes, %.0f bytes a second; want %d, %.0f", c.Nodes, c.Profile.Name, c.Beacon, c.SentRate, beacon, rate)
		}
		if c.Burst < 1 || c.Burst > 2*c.Nodes || c.JoinMaps < 1024 || c.CPU <= 0 || c.CPU > 1e6 || c.Memory < 1024 {
			t.Errorf("%d nodes, %s: %+v", c.Nodes, c.Profile.Name, c)
		}
	}
}

// TestCostsCurrent: docs/costs.md says what is measured.
func TestCostsCurrent(t *testing.T) {
	data, err := os.ReadFile("../../docs/costs.md")
	if err != nil {
		t.Fatal(err)
	}
	const repeat = `"clonectl sim --costs docs" writes it anew`
	_, times, traffic := cutTwice(string(data), "## How long it takes", "## What the segment carries")
	for _, p := range Profiles() {
		_, table, _ := strings.Cut(times, "**"+p.Name+"**")
		for _, c := range costsOf(t) {
			if row := c.timesRow() + "\n"; c.Profile == p && !strings.Contains(table, row) {
				t.Errorf("docs/costs.md lacks the times of %s: %s%s", p.Name, row, repeat)
			}
			if row := c.trafficRow() + "\n"; c.Profile == p && !strings.Contains(traffic, row) {
				t.Errorf("docs/costs.md lacks the traffic %s%s", row, repeat)
			}
		}
	}
}

func cutTwice(s, first, second string) (before, between, after string) {
	before, s, _ = strings.Cut(s, first)
	between, after, _ = strings.Cut(s, second)
	return before, between, after
}

// TestCostReplay: the node whose work is measured comes to where it was.
func TestCostReplay(t *testing.T) {
	s := newSegment(t.Context(), 5, Profiles()[0].Params)
	st := s.log.of
	var c Cost
	if err := errors.Join(s.start(), s.quiet(&c)); err != nil {
		t.Fatal(err)
	}
	m := membership.New(s.log.config, s.log.started)
	codec := membership.NewCodec("costs", make([]byte, 32))
	s.log.work(m, codec, 0, len(s.log.events))
	got, want := m.View(), st.machine.View()
	if got.Map != want.Map || !got.Agreed || got.State != membership.Serving || len(got.Members) != 5 {
		t.Errorf("after the replay %+v; want %+v", got, want)
	}
	if n := len(s.log.events) - s.log.from; n < 4*int(quietIntervals(5)) || s.log.quiet != quietIntervals(5)*int64(s.params.Interval) {
		t.Errorf("%d events in %v of quiet", n, time.Duration(s.log.quiet))
	}
}

func TestCostsInterrupted(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	_, err := MeasureCosts(ctx, []int{2, 3}, func(nodes int, _ string) {
		if nodes == 3 {
			cancel()
		}
	})
	if !errors.Is(err, context.Canceled) {
		t.Errorf("MeasureCosts of a context that has ended: %v", err)
	}
}

func TestSpread(t *testing.T) {
	all := make([]int64, 200)
	for i := range all {
		all[(i*7)%200] = int64(i + 1)
	}
	if got, want := spread(all), (Spread{100, 198, 200}); got != want {
		t.Errorf("spread of 1 to 200 = %d; want %d", got, want)
	}
	if got, want := spread([]int64{5}), (Spread{5, 5, 5}); got != want {
		t.Errorf("spread of 5 = %d; want %d", got, want)
	}
}

func TestFlooding(t *testing.T) {
	idle := &CostReport{Costs: []Cost{{Nodes: 255, Profile: Profiles()[0]}}}
	busy := &CostReport{Costs: []Cost{{Nodes: 5, Profile: Profiles()[0], CPU: 0}, {Nodes: 15, Profile: Profiles()[0], CPU: 500_000}}}
	for _, tt := range []struct {
		discard        time.Duration
		ten, half      int
		idle, withBusy int
	}{
		{200, 6, 26, 21, 6},
		{700, 3, 9, 6, 5},
		{1000, 2, 6, 4, 4},
		{2700, 2, 3, 2, 2},
	} {
		d := datapath{discard: tt.discard}
		if ten, half := d.reaches(10), d.reaches(50); ten != tt.ten || half != tt.half {
			t.Errorf("%v: 10 %% at %d, 50 %% at %d; want %d, %d", tt.discard, ten, half, tt.ten, tt.half)
		}
		if a, b := idle.paysUpTo(d), busy.paysUpTo(d); a != tt.idle || b != tt.withBusy {
			t.Errorf("%v: pays up to %d, %d with a costly membership; want %d, %d", tt.discard, a, b, tt.idle, tt.withBusy)
		}
	}
	if got := busy.membership("normal", 10); got != 0.25 {
		t.Errorf("membership of 10 nodes = %v; want 0.25", got)
	}
	if a, b := busy.membershipReaches("normal", 0.25), idle.membershipReaches("normal", 0.25); a != 10 || b != 0 {
		t.Errorf("membership reaches a quarter of a core at %d, %d; want 10, 0", a, b)
	}
}

func TestPercent(t *testing.T) {
	for share, want := range map[float64]string{0.000023: "0.0023 %", 0.0777: "7.8 %", 0.5: "50 %", 1.2: "120 %"} {
		if got := percent(share); got != want {
			t.Errorf("percent(%v) = %q; want %q", share, got, want)
		}
	}
}

// TestCostReport: what is drawn and said has a value everywhere.
func TestCostReport(t *testing.T) {
	r := CostReport{Costs: costsOf(t), Processors: 2, Load: 3}
	for name, data := range map[string][]byte{"SVG": r.SVG(), "Markdown": r.Markdown()} {
		for _, bad := range []string{"NaN", "Inf", "%!"} {
			if bytes.Contains(data, []byte(bad)) {
				t.Errorf("%s has %q:\n%s", name, bad, data)
			}
		}
	}
	dec := xml.NewDecoder(bytes.NewReader(r.SVG()))
	for {
		if _, err := dec.Token(); err == io.EOF {
			break
		} else if err != nil {
			t.Fatalf("the SVG is no XML: %v", err)
		}
	}
}
