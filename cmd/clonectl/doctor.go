package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/url"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"clonecluster/netcore/api"
	"clonecluster/netcore/doctor"
	"clonecluster/netcore/finding"
)

const (
	// examineAgain is the time between two looks at how far an examination is.
	examineAgain = 300 * time.Millisecond
	// examineFor is more than one takes.
	examineFor = time.Minute
)

// diagnosis is what doctor has found.
type diagnosis struct {
	Verdict  string            `json:"verdict"` // good, warnings or refuses
	Nodes    []api.Examination `json:"nodes"`
	Findings []cause           `json:"findings"`
	Failed   map[string]string `json:"failed,omitempty"` // nodes that could not be asked, and why
}

// cause is one finding, and who has it.
type cause struct {
	finding.Finding
	Nodes []string `json:"nodes"`
}

func newDoctorCmd() *cobra.Command {
	var a access
	var asJSON bool
	var node string
	var burst int
	cmd := &cobra.Command{
		Use:   "doctor",
		Short: "Say whether the network cooperates, and what is wrong if not",
		Long: fmt.Sprintf(`Doctor has the nodes examine the network between them: whether frames to the
clone MAC reach all of them, or the switch has learned it somewhere; whether beacons
pass; both directions of every cable; the MTU; duplicates; other clusters, and other
hosts with the VIP. It takes some seconds. Nodes examine it by themselves as well, at
boot and then now and again: what they find shows in "clonectl status".

With --burst the first node also sends a burst to the clone MAC, of up to so many
frames a second for a few seconds, to find storm control. Every host on the segment
gets those frames.

The exit code is 0 if all is well, %d if something should be looked at or could not be
told, or the cluster serves around it in directed mode, and %d if the network does not
do what the cluster needs; 1 if no node could be asked. docs/findings has a page on
each finding.`, exitDoubtful, exitRefuses),
		Example: `  clonectl doctor
  clonectl doctor --burst 8000
  clonectl doctor --node web-2 --json | jq '.findings[].what'`,
		Args: usageArgs(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if _, err := api.ParseBurst(strconv.Itoa(burst)); err != nil {
				return usageError{fmt.Errorf("--%w", err)}
			}
			ctx, cancel := context.WithTimeout(cmd.Context(), examineFor)
			defer cancel()
			c, _, err := a.client(ctx)
			if err != nil {
				return err
			}
			defer c.Close()
			d, err := diagnose(ctx, c, node, burst)
			if err != nil {
				return err
			}
			if err := show(cmd, asJSON, d, printDiagnosis); err != nil {
				return err
			}
			return d.exit()
		},
	}
	a.add(cmd)
	f := cmd.Flags()
	f.BoolVar(&asJSON, "json", false, "print JSON")
	f.StringVar(&node, "node", "", "ask this `NODE` alone; the others probe with it, but are not asked what they found")
	f.IntVar(&burst, "burst", 0, fmt.Sprintf("find storm control, by up to so many `FRAMES` a second: %d to %d", doctor.MinRate, doctor.MaxRate))
	cmd.RegisterFlagCompletionFunc("node", a.completeNodeFlag)
	return cmd
}

// diagnose examines, and waits until that is done. The first node sends the burst.
func diagnose(ctx context.Context, c *api.Client, node string, burst int) (*diagnosis, error) {
	nodes := []string{node}
	if node == "" {
		var all api.Cluster
		if err := c.Get(ctx, "/v1/cluster", nil, &all); err != nil {
			return nil, notReached(err)
		}
		nodes = nil
		for _, n := range all.Nodes {
			if !n.Gone {
				nodes = append(nodes, n.Node)
			}
		}
	}
	p := newProgress(os.Stderr)
	defer p.Clear()
	d := &diagnosis{Failed: map[string]string{}, Nodes: []api.Examination{}}
	asked := map[string]api.Examination{}
	ask := func(n string, do func(context.Context, url.Values, any) error) {
		query := url.Values{"node": {n}}
		if n == nodes[0] && burst > 0 {
			query.Set("burst", strconv.Itoa(burst))
		}
		e := api.Examination{Running: true}
		switch err := do(ctx, query, &e); {
		case err == nil:
			asked[n] = e
			delete(d.Failed, n)
		default:
			d.Failed[n] = err.Error()
		}
	}
	for _, n := range nodes {
		ask(n, func(ctx context.Context, q url.Values, e any) error { return c.Post(ctx, "/v1/doctor", q, nil, e) })
	}
	if len(asked) == 0 {
		return nil, fmt.Errorf("no node could be asked: %s", d.Failed[nodes[0]])
	}
	for begin := time.Now(); ; {
		running := ""
		for _, n := range nodes {
			if asked[n].Running {
				running = asked[n].Doing
			}
		}
		if running == "" {
			break
		}
		p.Status("%s (%.0f s)", running, time.Since(begin).Seconds())
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("waiting for the examination: %w", context.Cause(ctx))
		case <-time.After(examineAgain):
		}
		for _, n := range nodes {
			if asked[n].Running {
				ask(n, func(ctx context.Context, q url.Values, e any) error {
					q.Del("burst")
					return c.Get(ctx, "/v1/doctor", q, e)
				})
			}
		}
	}
	for _, n := range nodes {
		if e, ok := asked[n]; ok {
			d.Nodes = append(d.Nodes, e)
		}
	}
	d.conclude()
	return d, nil
}

// conclude puts together what the nodes have found.
func (d *diagnosis) conclude() {
	d.Verdict = "good"
	d.Findings = []cause{}
	if len(d.Failed) > 0 {
		d.Verdict = "warnings"
	}
	for _, n := range d.Nodes {
		for _, c := range n.Checks {
			if c.Verdict == doctor.Unknown && d.Verdict == "good" {
				d.Verdict = "warnings"
			}
			for _, f := range c.Findings {
				i := slices.IndexFunc(d.Findings, func(x cause) bool { return x.Code == f.Code && x.What == f.What })
				if i < 0 {
					i = len(d.Findings)
					d.Findings = append(d.Findings, cause{Finding: f})
				}
				d.Findings[i].Nodes = append(d.Findings[i].Nodes, n.Node)
				switch {
				case f.Level == finding.Critical:
					d.Verdict = "refuses"
				case f.Level == finding.Warning && d.Verdict == "good":
					d.Verdict = "warnings"
				}
			}
		}
	}
	slices.SortStableFunc(d.Findings, func(a, b cause) int { return finding.Compare(a.Finding, b.Finding) })
}

// exit gives the error with the exit code, which names the cause.
func (d *diagnosis) exit() error {
	switch d.Verdict {
	case "refuses":
		return codedError{fmt.Errorf("the network does not cooperate: %s", d.Findings[0].What), exitRefuses}
	case "warnings":
		why := "not everything could be told"
		if len(d.Findings) > 0 && d.Findings[0].Level > finding.Info {
			why = d.Findings[0].What
		}
		i := slices.IndexFunc(d.Nodes, func(e api.Examination) bool { return e.Director != "" })
		if i >= 0 && slices.ContainsFunc(d.Findings, func(c cause) bool { return doctor.ServedAround(c.Code) }) {
			why += fmt.Sprintf("; the cluster serves around it in directed mode, by %s", d.Nodes[i].Director)
		}
		return codedError{errors.New("something should be looked at: " + why), exitDoubtful}
	}
	return nil
}

func printDiagnosis(w io.Writer, d *diagnosis) {
	// What all say is said once.
	type line struct {
		check doctor.Check
		nodes []string
	}
	var lines []line
	for _, n := range d.Nodes {
		for _, c := range n.Checks {
			i := slices.IndexFunc(lines, func(l line) bool { return l.check.Name == c.Name && l.check.What == c.What })
			if i < 0 {
				// Beside what others say of the same.
				i = len(lines)
				if last := slices.IndexFunc(lines, func(l line) bool { return l.check.Name == c.Name }); last >= 0 {
					for i = last; i < len(lines) && lines[i].check.Name == c.Name; i++ {
					}
				}
				lines = slices.Insert(lines, i, line{check: c})
			}
			lines[i].nodes = append(lines[i].nodes, n.Node)
		}
	}
	marks := map[doctor.Verdict]string{doctor.Good: "ok", doctor.Unknown: "?", doctor.Bad: "BAD"}
	for _, l := range lines {
		who := ""
		if len(l.nodes) < len(d.Nodes) {
			who = " (" + strings.Join(l.nodes, ", ") + ")"
		}
		fmt.Fprintf(w, "%-4s %-14s %s\n", marks[l.check.Verdict], l.check.Name, wrap(l.check.What+who, 60, strings.Repeat(" ", 20)))
	}
	for n, why := range d.Failed {
		fmt.Fprintf(w, "%-4s %s could not be asked: %s\n", "?", n, why)
	}
	for _, f := range d.Findings {
		fmt.Fprintf(w, "\n%s (%v)\n  %s\n  What to do: %s.\n", f.Code, f.Level, wrap(f.What, 76, "  "), wrap(f.Fix, 64, "  "))
	}
}
