package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spf13/cobra"

	"clonecluster/netcore/membership"
	"clonecluster/netcore/simulator"
)

// runSim runs the command and gives what it prints.
func runSim(t *testing.T, args ...string) (string, error) {
	t.Helper()
	cmd := newSimCmd()
	cmd.SetArgs(args)
	cmd.SilenceUsage, cmd.SilenceErrors = true, true
	var out bytes.Buffer
	cmd.SetOut(&out)
	err := cmd.ExecuteContext(t.Context())
	return out.String(), err
}

func noStatus(int, time.Duration) {}

func TestSimUsage(t *testing.T) {
	for _, tt := range []struct {
		args []string
		want string
	}{
		{[]string{"--schedules", "0"}, "--schedules 0: want 1 or more"},
		{[]string{"--nodes", "1"}, "--nodes 1: want 2 to 255"},
		{[]string{"--nodes", "0"}, "--nodes 0: want"},
		{[]string{"--nodes", "256"}, "--nodes 256: want"},
		{[]string{"--weakness", "none"}, `--weakness "none": want one of take-at-once, `},
		{[]string{"--weakness", ""}, `--weakness "": want`},
		{[]string{"--replay", "0", "--seed", "0"}, "--replay does not go with --seed"},
		{[]string{"--replay", "1", "--schedules", "5"}, "--replay does not go with --schedules"},
		{[]string{"--costs", "x", "--nodes", "5"}, "--costs does not go with --nodes"},
		{[]string{"--costs", ""}, "--costs: want a folder"},
		{[]string{"7"}, "unknown command"},
	} {
		_, err := runSim(t, tt.args...)
		if !errors.As(err, new(usageError)) || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("sim %q: %v; want a usage error with %q", tt.args, err, tt.want)
		}
	}
}

func TestSimExplores(t *testing.T) {
	out, err := runSim(t, "--schedules", "3", "--seed", "7", "--nodes", "3")
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	for _, want := range []string{"schedules  3, from seed 7 on\n", " connections\n", " attempts\n", " made\n", "steps  ", " schedules a second\n"} {
		if !strings.Contains(out, want) {
			t.Errorf("sim prints %q; want %q", out, want)
		}
	}
	out, err = runSim(t, "--schedules", "3", "--seed", "7", "--nodes", "3", "--json")
	var e exploration
	if err := errors.Join(err, json.Unmarshal([]byte(out), &e)); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if e.Schedules != 3 || e.FirstSeed != 7 || e.Nodes != 3 || e.Accepted == 0 || e.Maps == 0 || e.Steps == 0 || e.Seconds <= 0 || e.Interrupted || e.Violation != nil {
		t.Errorf("sim --json gives %+v", e)
	}
}

// TestSimViolation finds how the protocol fails without a precaution, and sees
// the same again with the command that is printed.
func TestSimViolation(t *testing.T) {
	out, err := runSim(t, "--weakness", "keep-lost", "--schedules", "3000", "--json")
	var e exploration
	if err := json.Unmarshal([]byte(out), &e); err != nil {
		t.Fatal(err)
	}
	v := e.Violation
	if v == nil || err == nil || errors.As(err, new(usageError)) {
		t.Fatalf("sim --weakness keep-lost: %v\n%s", err, out)
	}
	if want := fmt.Sprintf("%s sim --replay %d --weakness keep-lost", os.Args[0], v.Seed); v.Replay != want || e.Weakness != "keep-lost" {
		t.Errorf("replay with %q, weakness %q; want %q", v.Replay, e.Weakness, want)
	}
	out, err = runSim(t, strings.Fields(v.Replay)[2:]...)
	if err == nil || !strings.HasSuffix(out, v.line()+"\n") || strings.Count(out, "\n") < 10 {
		t.Errorf("%s: %v\n%s\nwant a timeline that ends with %s", v.Replay, err, out, v.line())
	}
}

// TestSimTimeline: a violation is shown with the end of the timeline that --replay shows
// all of.
func TestSimTimeline(t *testing.T) {
	for seed := range 1000 {
		out, err := runSim(t, "--weakness", "keep-lost", "--nodes", "4", "--seed", fmt.Sprint(seed), "--schedules", "1")
		_, last, long := strings.Cut(out, " lines left out\n")
		if err == nil || !long {
			continue
		}
		last, command, _ := strings.Cut(last, "\n\nreplay     "+os.Args[0]+" sim ")
		full, _ := runSim(t, strings.Fields(command)...)
		if strings.Count(last, "\n") != linesOfTimeline-1 || !strings.Contains(full, last) || !strings.Contains(full, "\nVIOLATION ") {
			t.Errorf("sim prints\n%s\nwant the last %d lines of\n%s", out, linesOfTimeline, full)
		}
		return
	}
	t.Error("no schedule fails late")
}

func TestSimReplay(t *testing.T) {
	out, err := runSim(t, "--replay", "0", "--nodes", "2")
	if err != nil || !strings.HasPrefix(out, "schedule of seed 0") || !strings.Contains(out, "\nnode 1 is 52:54:00:77:00:02\n") || !strings.Contains(out, "node 0 starts\n") || !strings.Contains(out, "\nall held   seed 0, 2 nodes: ") {
		t.Errorf("sim --replay 0 --nodes 2: %v\n%s", err, out)
	}
	out, err = runSim(t, "--replay", "0", "--nodes", "2", "--json")
	var r simulator.Result
	if err := errors.Join(err, json.Unmarshal([]byte(out), &r)); err != nil || len(r.Timeline) == 0 || r.Nodes != 2 {
		t.Errorf("sim --replay 0 --nodes 2 --json: %v\n%s", err, out)
	}
}

// TestExploreLowestSeed: several seeds fail, the lowest one last.
func TestExploreLowestSeed(t *testing.T) {
	const bad = 20
	later := make(chan struct{})
	run := func(o simulator.Options) simulator.Result {
		r := simulator.Result{Seed: o.Seed, Nodes: 5, Accepted: 2, Refused: 1, Maps: 3, Steps: 10}
		switch {
		case o.Seed == 100+bad:
			<-later
		case o.Seed == 101+bad:
			close(later)
		case o.Seed < 100+bad:
			return r
		}
		r.Invariant, r.Violation, r.At = "I3", "two own one", 1.5
		return r
	}
	o := simulator.Options{Seed: 100, Nodes: 5, Weakness: membership.NoLease}
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(2)) // one waits for the other
	e := explore(t.Context(), o, 1000, run, noStatus)
	want := violation{120, 5, 1.5, "I3", "two own one", os.Args[0] + " sim --replay 120 --nodes 5 --weakness no-lease"}
	if e.Violation == nil || *e.Violation != want {
		t.Errorf("explore finds %+v; want %+v", e.Violation, want)
	}
	if e.Schedules < bad+2 || e.Schedules > bad+4 || e.Accepted != 2*e.Schedules || e.Refused != e.Schedules || e.Maps != uint64(3*e.Schedules) || e.Steps != 10*e.Schedules {
		t.Errorf("explore counts %+v", e)
	}
	var out bytes.Buffer
	e.print(&out, 1000)
	for _, part := range []string{" of 1000, from seed 100 on\n", "VIOLATION  of I3 with seed 120, 5 nodes, at 1.5000 s: two own one\n"} {
		if !strings.Contains(out.String(), part) {
			t.Errorf("printed %q; want %q", out.String(), part)
		}
	}
}

// TestExploreInterrupted: the end of the context is the end, even if a schedule
// is not.
func TestExploreInterrupted(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	hang := make(chan struct{})
	defer close(hang)
	run := func(o simulator.Options) simulator.Result {
		if o.Seed == 10 {
			cancel()
		}
		if o.Seed >= 10 {
			<-hang
		}
		return simulator.Result{Seed: o.Seed, Accepted: 1}
	}
	e := explore(ctx, simulator.Options{}, 1000, run, noStatus)
	if !e.Interrupted || e.Schedules > 10 || e.Accepted != e.Schedules {
		t.Errorf("explore gives %+v", e)
	}
	var out bytes.Buffer
	if e.print(&out, 1000); !strings.Contains(out.String(), " of 1000, from seed 0 on, interrupted\n") {
		t.Errorf("printed %q", out.String())
	}
}

func TestExplorePanic(t *testing.T) {
	run := func(o simulator.Options) simulator.Result {
		if o.Seed == 3 {
			panic("nil map")
		}
		return simulator.Result{Seed: o.Seed}
	}
	e := explore(t.Context(), simulator.Options{}, 10, run, noStatus)
	if v := e.Violation; v == nil || v.Seed != 3 || !strings.Contains(v.Text, "nil map") || v.Replay != os.Args[0]+" sim --replay 3" {
		t.Errorf("explore finds %+v", v)
	}
}

// TestSimNamesWeaknesses: in help and completion are exactly those that there are.
func TestSimNamesWeaknesses(t *testing.T) {
	cmd := newSimCmd()
	_, list, found := strings.Cut(cmd.Long, "fails without:\n")
	list, _, _ = strings.Cut(list, ".\n")
	if got := strings.FieldsFunc(list, func(r rune) bool { return r == ',' || r == ' ' || r == '\n' }); !found || !slices.Equal(got, weaknessNames()) {
		t.Errorf("the help names %q; want %q", got, weaknessNames())
	}
	for _, line := range strings.Split(cmd.Long, "\n") {
		if len(line) > 82 {
			t.Errorf("a line of the help is too long: %q", line)
		}
	}
	complete, _ := cmd.GetFlagCompletionFunc("weakness")
	if got, directive := complete(cmd, nil, ""); !slices.Equal(got, weaknessNames()) || directive != cobra.ShellCompDirectiveNoFileComp {
		t.Errorf("--weakness is completed with %q", got)
	}
}

func TestSimCosts(t *testing.T) {
	dir := t.TempDir()
	var out bytes.Buffer
	if err := writeCosts(t.Context(), dir, []int{2, 3}, &out); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{"costs.md": "| 3 | fast |", "costs.svg": "</svg>"} {
		if data, err := os.ReadFile(filepath.Join(dir, name)); err != nil || !bytes.Contains(data, []byte(want)) {
			t.Errorf("%s: %v, want %q in\n%s", name, err, want, data)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := writeCosts(ctx, dir, []int{2}, &out); !errors.Is(err, context.Canceled) {
		t.Errorf("writeCosts of a context that has ended: %v", err)
	}
}
