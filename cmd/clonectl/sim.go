package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"clonecluster/image"
	"clonecluster/netcore/membership"
	"clonecluster/netcore/simulator"
)

// simOptions are the flags of "sim".
type simOptions struct {
	schedules int
	seed      uint64
	nodes     int
	replay    uint64
	weakness  string
	costs     string
	asJSON    bool
}

func newSimCmd() *cobra.Command {
	var o simOptions
	cmd := &cobra.Command{
		Use:   "sim",
		Short: "Explore the membership protocol in simulation",
		Long: fmt.Sprintf(`Sim runs clusters of simulated nodes under schedules of what can go wrong, each
drawn from a seed: frames lost, doubled, late or played back, one-way cables,
partitions, pauses, crashes, clocks that jump, wrong keys. At every step it checks
that no two nodes that hear each other accept new flows of a bucket (I3), that
flows stay with their holders (I5), that frames without the key have no effect
(I7), and, when nothing has happened for 2 1/3 detection times, that every bucket
has one owner (I4), who resets what the dead have left (I6). It ends at the first
violation, or at Ctrl-C with the numbers so far.

One seed is always the same schedule. What was found with --nodes or --weakness
is replayed with them.

--weakness leaves out one precaution of the protocol, to see how it fails without:
%s.

--costs measures what membership takes in quiet clusters of up to %d nodes, and
writes costs.md and costs.svg.`, wrapped(weaknessNames(), 80), membership.MaxNodes),
		Example: `  clonectl sim                                     # 1000 schedules
  clonectl sim --schedules 100000 --seed 1000000   # others, for longer
  clonectl sim --replay 4711                       # what happens in one of them
  clonectl sim --weakness no-lease                 # what the lease is good for
  clonectl sim --costs docs                        # takes one or two minutes`,
		Args: usageArgs(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			weakness, err := o.validate(cmd.Flags().Changed)
			if err != nil {
				return usageError{fmt.Errorf("%w; see %q", err, cmd.CommandPath()+" --help")}
			}
			run := simulator.Options{Seed: o.replay, Nodes: o.nodes, Weakness: weakness}
			switch {
			case o.costs != "":
				return writeCosts(cmd.Context(), o.costs, simulator.CostSizes(), cmd.OutOrStdout())
			case cmd.Flags().Changed("replay"):
				return replaySchedule(cmd.Context(), run, o.asJSON, cmd.OutOrStdout())
			}
			run.Seed = o.seed
			return exploreSchedules(cmd.Context(), run, o.schedules, o.asJSON, cmd.OutOrStdout())
		},
	}
	f := cmd.Flags()
	f.IntVar(&o.schedules, "schedules", 1000, "how many schedules")
	f.Uint64Var(&o.seed, "seed", 0, "the first `SEED`; each schedule has the next one")
	f.IntVar(&o.nodes, "nodes", 0, fmt.Sprintf("how many nodes, 2 to %d (default drawn from the seed, 2 to 64)", membership.MaxNodes))
	f.Uint64Var(&o.replay, "replay", 0, "print the timeline of the schedule of `SEED`")
	f.StringVar(&o.weakness, "weakness", "", "leave out one precaution, by its `NAME`")
	f.StringVar(&o.costs, "costs", "", "measure what membership takes, and write it to `FOLDER`")
	f.BoolVar(&o.asJSON, "json", false, "print the result as JSON")
	cmd.MarkFlagDirname("costs")
	cmd.RegisterFlagCompletionFunc("weakness", cobra.FixedCompletions(weaknessNames(), cobra.ShellCompDirectiveNoFileComp))
	for _, flag := range []string{"schedules", "seed", "nodes", "replay"} {
		cmd.RegisterFlagCompletionFunc(flag, cobra.NoFileCompletions)
	}
	return cmd
}

// validate gives the weakness that is meant. Changed tells which flags were given.
func (o simOptions) validate(changed func(flag string) bool) (membership.Weakness, error) {
	for _, pair := range [][2]string{
		{"replay", "schedules"}, {"replay", "seed"},
		{"costs", "schedules"}, {"costs", "seed"}, {"costs", "nodes"}, {"costs", "replay"}, {"costs", "weakness"}, {"costs", "json"},
	} {
		if changed(pair[0]) && changed(pair[1]) {
			return 0, fmt.Errorf("--%s does not go with --%s", pair[0], pair[1])
		}
	}
	switch {
	case changed("costs") && o.costs == "":
		return 0, errors.New("--costs: want a folder")
	case o.schedules < 1:
		return 0, fmt.Errorf("--schedules %d: want 1 or more", o.schedules)
	case changed("nodes") && (o.nodes < 2 || o.nodes > membership.MaxNodes):
		return 0, fmt.Errorf("--nodes %d: want 2 to %d", o.nodes, membership.MaxNodes)
	case !changed("weakness"):
		return membership.None, nil
	}
	for _, w := range membership.AllWeaknesses() {
		if w.String() == o.weakness {
			return w, nil
		}
	}
	return 0, fmt.Errorf("--weakness %q: want one of %s", o.weakness, strings.Join(weaknessNames(), ", "))
}

func weaknessNames() (names []string) {
	for _, w := range membership.AllWeaknesses() {
		names = append(names, w.String())
	}
	return names
}

// wrapped joins names to lines of at most so many characters.
func wrapped(names []string, width int) string {
	var b strings.Builder
	at := 0
	for i, name := range names {
		switch {
		case i == 0:
		case at+len(", ")+len(name) > width-len(","):
			b.WriteString(",\n")
			at = 0
		default:
			b.WriteString(", ")
			at += len(", ")
		}
		b.WriteString(name)
		at += len(name)
	}
	return b.String()
}

// exploration is what came of many schedules.
type exploration struct {
	Schedules   int        `json:"schedules"` // done
	FirstSeed   uint64     `json:"first_seed"`
	Nodes       int        `json:"nodes,omitempty"` // 0: drawn from the seeds
	Weakness    string     `json:"weakness,omitempty"`
	Accepted    int        `json:"accepted"` // connections
	Refused     int        `json:"refused"`  // attempts that nobody took
	Maps        uint64     `json:"maps"`     // made
	Steps       int        `json:"steps"`    // of machines
	Seconds     float64    `json:"seconds"`
	Interrupted bool       `json:"interrupted,omitempty"`
	Violation   *violation `json:"violation,omitempty"` // that of the lowest seed
}

// violation is how one schedule broke an invariant.
type violation struct {
	Seed      uint64  `json:"seed"`
	Nodes     int     `json:"nodes"`
	At        float64 `json:"at_seconds"`
	Invariant string  `json:"invariant"`
	Text      string  `json:"text"`
	Replay    string  `json:"replay"` // the command
}

func newViolation(r simulator.Result, o simulator.Options) *violation {
	o.Seed = r.Seed
	return &violation{r.Seed, r.Nodes, r.At, r.Invariant, r.Violation, o.Command(os.Args[0])}
}

func (v *violation) Error() string {
	return fmt.Sprintf("the schedule of seed %d violates %s", v.Seed, v.Invariant)
}

// line tells all but the replay.
func (v *violation) line() string {
	return fmt.Sprintf("VIOLATION  of %s with seed %d, %d nodes, at %.4f s: %s", v.Invariant, v.Seed, v.Nodes, v.At, v.Text)
}

// exploreSchedules runs schedules and prints what came of them.
func exploreSchedules(ctx context.Context, o simulator.Options, schedules int, asJSON bool, w io.Writer) error {
	p := newProgress(os.Stderr)
	status := func(done int, took time.Duration) {
		if p.tty {
			p.Status("%d of %d schedules, %.0f a second", done, schedules, float64(done)/took.Seconds())
		}
	}
	e := explore(ctx, o, schedules, simulator.Run, status)
	p.Clear()
	if asJSON {
		if err := printJSON(w, e); err != nil {
			return err
		}
	} else {
		e.print(w, schedules)
		e.explain(o, w)
	}
	switch {
	case e.Violation != nil:
		return e.Violation
	case e.Interrupted:
		return ctx.Err()
	}
	return nil
}

// statusInterval is between two progress lines.
const statusInterval = 100 * time.Millisecond

// explore runs schedules on all processors until one violates an invariant. Seeds
// are given out in order and those under way are waited for, so the lowest one
// that fails is always the same. If ctx ends, they are not: one can take a minute.
func explore(ctx context.Context, o simulator.Options, schedules int, run func(simulator.Options) simulator.Result, status func(done int, took time.Duration)) exploration {
	e := exploration{FirstSeed: o.Seed, Nodes: o.Nodes}
	if o.Weakness != membership.None {
		e.Weakness = o.Weakness.String()
	}
	begin := time.Now()
	var next atomic.Int64
	results := make(chan simulator.Result)
	var workers sync.WaitGroup
	for range runtime.GOMAXPROCS(0) {
		workers.Go(func() {
			for i := next.Add(1) - 1; i < int64(schedules); i = next.Add(1) - 1 {
				one := o
				one.Seed += uint64(i)
				select {
				case results <- runCaught(one, run):
				case <-ctx.Done():
					return
				}
			}
		})
	}
	go func() {
		workers.Wait()
		close(results)
	}()
	tick := time.NewTicker(statusInterval)
	defer tick.Stop()
	for running := true; running; {
		select {
		case r, open := <-results:
			if running = open; open && e.add(r, o) {
				next.Store(int64(schedules)) // no more
			}
		case <-tick.C:
			status(e.Schedules, time.Since(begin))
		case <-ctx.Done():
			running, e.Interrupted = false, true
		}
	}
	e.Seconds = time.Since(begin).Seconds()
	return e
}

// noPanic is what a schedule violates in which the protocol's code panics.
const noPanic = "no panic"

// runCaught makes a panic a violation, so that it has a seed. When replayed it is
// not caught, and shows where it comes from.
func runCaught(o simulator.Options, run func(simulator.Options) simulator.Result) (r simulator.Result) {
	defer func() {
		if p := recover(); p != nil {
			r = simulator.Result{Seed: o.Seed, Nodes: o.Nodes, Invariant: noPanic, Violation: fmt.Sprint("panic: ", p)}
		}
	}()
	return run(o)
}

// add counts a result, and reports whether it is a violation.
func (e *exploration) add(r simulator.Result, o simulator.Options) bool {
	e.Schedules++
	e.Accepted += r.Accepted
	e.Refused += r.Refused
	e.Maps += r.Maps
	e.Steps += r.Steps
	if r.Violation == "" {
		return false
	}
	if e.Violation == nil || r.Seed-e.FirstSeed < e.Violation.Seed-e.FirstSeed {
		e.Violation = newViolation(r, o)
	}
	return true
}

func (e *exploration) print(w io.Writer, of int) {
	done := fmt.Sprintf("%d, from seed %d on", e.Schedules, e.FirstSeed)
	if e.Schedules < of {
		done = fmt.Sprintf("%d of %d, from seed %d on", e.Schedules, of, e.FirstSeed)
	}
	if e.Interrupted {
		done += ", interrupted"
	}
	fmt.Fprintf(w, "schedules  %s\n", done)
	fmt.Fprintf(w, "accepted   %d connections\n", e.Accepted)
	fmt.Fprintf(w, "refused    %d attempts\n", e.Refused)
	fmt.Fprintf(w, "maps       %d made\n", e.Maps)
	fmt.Fprintf(w, "steps      %d\n", e.Steps)
	fmt.Fprintf(w, "time       %.1f s, %.0f schedules a second\n", e.Seconds, float64(e.Schedules)/e.Seconds)
	if v := e.Violation; v != nil {
		fmt.Fprintln(w, v.line())
	}
}

// linesOfTimeline are shown without being asked for.
const linesOfTimeline = 60

// explain prints how the violation came about, and how to see all of it.
func (e *exploration) explain(o simulator.Options, w io.Writer) {
	v := e.Violation
	if v == nil {
		return
	}
	if v.Invariant != noPanic {
		o.Seed, o.Trace = v.Seed, true
		fmt.Fprintln(w)
		simulator.Run(o).Print(w, linesOfTimeline)
		fmt.Fprintln(w)
	}
	fmt.Fprintf(w, "replay     %s\n", v.Replay)
}

// replaySchedule prints what happens in one schedule.
func replaySchedule(ctx context.Context, o simulator.Options, asJSON bool, w io.Writer) error {
	o.Trace = true
	done := make(chan simulator.Result, 1)
	go func() { done <- simulator.Run(o) }() // it cannot be stopped, and ends with the process
	var r simulator.Result
	select {
	case r = <-done:
	case <-ctx.Done():
		return ctx.Err()
	}
	if asJSON {
		if err := printJSON(w, r); err != nil {
			return err
		}
	} else {
		r.Print(w, 0)
	}
	if r.Violation != "" {
		v := newViolation(r, o)
		if !asJSON {
			fmt.Fprintln(w, v.line())
		}
		return v
	}
	if !asJSON {
		fmt.Fprintf(w, "all held   seed %d, %d nodes: %d connections accepted, %d attempts refused, %d maps made, %d steps\n",
			r.Seed, r.Nodes, r.Accepted, r.Refused, r.Maps, r.Steps)
	}
	return nil
}

// writeCosts measures and writes the two files.
func writeCosts(ctx context.Context, folder string, sizes []int, w io.Writer) error {
	p := newProgress(os.Stderr)
	begin, load := time.Now(), loadAverage()
	costs, err := simulator.MeasureCosts(ctx, sizes, func(nodes int, profile string) {
		if p.tty {
			p.Status("measuring: up to %d of %d nodes, %s", nodes, slices.Max(sizes), profile)
		}
	})
	p.Clear()
	if err != nil {
		return err
	}
	report := simulator.CostReport{Costs: costs, Processors: runtime.NumCPU(), Load: load}
	for name, data := range map[string][]byte{"costs.md": report.Markdown(), "costs.svg": report.SVG()} {
		if err := image.WriteFile(filepath.Join(folder, name), data, 0o644); err != nil {
			return err
		}
	}
	fmt.Fprintf(w, "measured in %.0f s: %s and costs.svg\n", time.Since(begin).Seconds(), filepath.Join(folder, "costs.md"))
	return nil
}

// loadAverage is the mean number of threads that ran or wanted to, over the last
// minute; 0 if the kernel does not tell.
func loadAverage() float64 {
	var info unix.Sysinfo_t
	if unix.Sysinfo(&info) != nil {
		return 0
	}
	return float64(info.Loads[0]) / (1 << 16)
}
