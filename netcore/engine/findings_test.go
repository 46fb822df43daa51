package engine

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"clonecluster/netcore/finding"
	"clonecluster/netcore/membership"
)

func TestConditions(t *testing.T) {
	const self, other = "02:00:00:00:00:01", "02:00:00:00:00:02"
	good := func() Status {
		return Status{
			WireMAC: self, Build: "a", UptimeSec: 100, Counters: map[string]uint64{},
			Members: []Member{{Node: self, Self: true, Live: true, Build: "a"}, {Node: other, Name: "b", Live: true, Build: "a"}},
		}
	}
	refused := func(k membership.RefusalKind) func(*Status) {
		return func(s *Status) {
			s.Refused = []membership.Refusal{{Kind: k, What: "x", From: other, Count: 3}, {Kind: k, What: "y", From: other, Count: 3}}
		}
	}
	for _, tt := range []struct {
		name   string
		change func(*Status)
		want   string // the codes
		says   string
	}{
		{"good", func(*Status) {}, "", ""},
		{"a program that is not known", func(s *Status) { s.Members[1].Build = "" }, "", ""},
		{"two programs", func(s *Status) { s.Members[1].Build = "b" }, "mixed-programs", "2 different"},
		{"fenced", func(s *Status) { s.Fenced = true }, "fenced", "another may not know of it"},
		{"deaf", func(s *Status) { s.Members[1].Live = false }, "one-way", other + " b"},
		{"deaf and a ghost", func(s *Status) { s.Members[1].Live = false; refused(membership.RefusedGhost)(s) }, "one-way", other + " b"},
		{"a ghost", func(s *Status) { refused(membership.RefusedGhost)(s); s.Members = s.Members[:1] }, "one-way", other},
		{"one that was a ghost", refused(membership.RefusedGhost), "", ""},
		{"starts", func(s *Status) { s.Unwell, s.UptimeSec = []string{"web: starting, refused"}, 14 }, "", ""},
		{"does not start", func(s *Status) { s.Unwell, s.UptimeSec = []string{"web: starting, refused"}, 16 }, "service-unwell", "web: starting, refused"},
		{"unwell", func(s *Status) { s.Unwell, s.UptimeSec = []string{"a: x", "web: starting"}, 3 }, "service-unwell", "check: a: x"},
		{"all unwell", func(s *Status) { s.FailOpen = true }, "all-services-unwell", "serves on"},
		{"a key", refused(membership.RefusedKey), "wrong-key", "from " + other},
		{"a cluster", refused(membership.RefusedCluster), "other-cluster", other},
		{"a version", refused(membership.RefusedVersion), "other-protocol", other},
		{"malformed", refused(membership.RefusedMalformed), "malformed-beacons", other},
		{"rules", refused(membership.RefusedRules), "other-rules", other},
		{"a twin", refused(membership.RefusedTwin), "same-mac", other},
		{"a restart", refused(membership.RefusedTwins), "", ""},
		{"a loop", refused(membership.RefusedEcho), "loop", other},
		{"too many", refused(membership.RefusedTooFar), "too-many-nodes", other},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := good()
			tt.change(&s)
			var l look
			now := time.Now()
			if early := l.at(&s, now); len(early) > 0 {
				t.Errorf("what was seen once is a finding: %v", early)
			}
			found := l.at(&s, now.Add(time.Second))
			if got := codes(found); got != tt.want {
				t.Fatalf("findings %q; want %q", got, tt.want)
			}
			for _, f := range found {
				if f.Node != self || f.Fix == "" || !strings.Contains(f.What, tt.says) || strings.Count(f.What, other) > 1 {
					t.Errorf("%+v; want %q, by %s, with what to do", f, tt.says, self)
				}
			}
			s = good()
			if gone := l.at(&s, now.Add(2*time.Second)); len(gone) > 0 {
				t.Errorf("when all is well again: %v", gone)
			}
		})
	}
}

// TestGuardedFinding: it ends some time after the last frame.
func TestGuardedFinding(t *testing.T) {
	s := Status{Counters: map[string]uint64{"Guarded": 3}}
	var l look
	var got []string
	now := time.Now()
	for minute := range 25 {
		if minute == 12 {
			s.Counters["Guarded"]++
		}
		got = append(got, fmt.Sprint(len(l.at(&s, now.Add(time.Duration(minute)*time.Minute)))))
	}
	// Two looks to notice it each time, ten minutes to forget it.
	if want := "0111111111000111111111000"; strings.Join(got, "") != want {
		t.Errorf("found by minutes: %s; want %s", strings.Join(got, ""), want)
	}
}

func codes(found []finding.Finding) string {
	var all []string
	for _, f := range found {
		all = append(all, f.Code)
	}
	slices.Sort(all)
	return strings.Join(all, " ")
}
