package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"clonecluster/netcore/api"
	"clonecluster/netcore/doctor"
	"clonecluster/netcore/finding"
)

func TestDoctor(t *testing.T) {
	n, at, _ := serveOne(t)
	bad := func(f finding.Finding) doctor.Check {
		return doctor.Check{Name: "flooding", Verdict: doctor.Bad, What: f.What, Findings: []finding.Finding{f}}
	}
	good := doctor.Check{Name: "MTU", Verdict: doctor.Good, What: "frames of 1500 bytes arrive"}
	refuses := finding.Finding{Code: "no-flooding", Level: finding.Critical, What: "frames reach nobody", Fix: "allow it"}
	warns := finding.Finding{Code: "storm-control", Level: finding.Warning, What: "few arrive", Fix: "raise it"}
	tells := finding.Finding{Code: "other-cluster", Level: finding.Info, What: "another is here", Fix: "nothing"}
	around := refuses
	around.Level = finding.Warning
	for _, tt := range []struct {
		name     string
		checks   []doctor.Check
		code     int
		says     []string
		director string
	}{
		{"good", []doctor.Check{good}, 0, []string{"ok   MTU"}, ""},
		{"worth knowing", []doctor.Check{good, bad(tells)}, 0, []string{"BAD  flooding", "other-cluster (info)"}, ""},
		{"warning", []doctor.Check{good, bad(warns)}, exitDoubtful, []string{"storm-control (warning)", "What to do: raise it.", "looked at: few arrive"}, ""},
		{"unknown", []doctor.Check{good, {Name: "MTU", Verdict: doctor.Unknown, What: "nobody told"}}, exitDoubtful, []string{"?    MTU", "not everything"}, ""},
		{"refuses", []doctor.Check{good, bad(warns), bad(refuses)}, exitRefuses, []string{"does not cooperate: frames reach nobody", "no-flooding (critical)"}, ""},
		{"served around", []doctor.Check{good, bad(around)}, exitDoubtful, []string{"no-flooding (warning)", "frames reach nobody; the cluster serves around it in directed mode, by 02:00:00:00:00:07"}, "02:00:00:00:00:07"},
		{"directed, and something else", []doctor.Check{bad(warns)}, exitDoubtful, []string{"looked at: few arrive\n"}, "02:00:00:00:00:07"},
		{"directed", []doctor.Check{good}, 0, []string{"ok   MTU"}, "02:00:00:00:00:07"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			n.mu.Lock()
			n.exam = api.Examination{Node: oneNodeID, Nodes: 2, Checks: tt.checks, Director: tt.director}
			n.mu.Unlock()
			for _, more := range [][]string{nil, {"--json"}, {"--burst", "500", "--node", "web-1"}} {
				out, err := clonectl(t, append(append([]string{"doctor"}, at...), more...)...)
				var coded codedError
				if errors.As(err, &coded) != (tt.code != 0) || coded.code != tt.code {
					t.Fatalf("doctor %v: %v; want exit code %d\n%s", more, err, tt.code, out)
				}
				if err != nil {
					out += err.Error() + "\n"
				}
				if more == nil {
					for _, text := range tt.says {
						if !strings.Contains(out, text) {
							t.Errorf("it does not say %q:\n%s", text, out)
						}
					}
				}
				if len(more) == 1 {
					var d diagnosis
					if err := json.NewDecoder(strings.NewReader(out)).Decode(&d); err != nil || len(d.Nodes) != 1 {
						t.Errorf("--json: %v: %s", err, out)
					}
				}
				if len(more) == 4 && n.burst != 500 {
					t.Errorf("a burst of %d; want 500", n.burst)
				}
			}
		})
	}
	// A script tells what doctor has found from what kept it from looking.
	for _, code := range []int{exitDoubtful, exitRefuses} {
		if slices.Contains([]int{0, exitFailure, exitUsage, exitDiffers, exitNotDone, exitInterrupted}, code) || !strings.Contains(newRoot().Long, fmt.Sprintf(", %d ", code)) {
			t.Errorf("exit code %d means something else, or the help does not say what", code)
		}
	}
	for _, wrong := range []string{"1", "17000", "-1"} {
		if _, err := clonectl(t, append([]string{"doctor", "--burst", wrong}, at...)...); !errors.As(err, new(usageError)) {
			t.Errorf("--burst %s: %v; want a usage error", wrong, err)
		}
	}
}
