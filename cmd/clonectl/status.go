package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"clonecluster/netcore/api"
	"clonecluster/netcore/finding"
)

// watchInterval is the time between two looks of "status --watch".
const watchInterval = time.Second

func newStatusCmd() *cobra.Command {
	var a access
	var asJSON, watch bool
	cmd := &cobra.Command{
		Use:   "status",
		Short: "Show what the nodes of a running cluster do",
		Long: `Status asks one node, by the VIP or by --address, which asks all others: who takes
which share of the connections, how busy it is, and what an operator should look
at. A node that does not answer is listed with the reason, one that has gone for
ten minutes.

The cluster is that of cluster.yaml, which holds the key that opens its API; with
--cluster it may be a folder from "clonectl key issue" instead.`,
		Example: `  clonectl status
  clonectl status --watch
  clonectl status --cluster read-only/ --json | jq '.nodes[].status.findings'
  clonectl status --address 10.77.0.101         # by a node's own address`,
		Args: usageArgs(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, _, err := a.client(cmd.Context())
			if err != nil {
				return err
			}
			defer c.Close()
			if watch {
				return watchStatus(cmd.Context(), c, cmd.OutOrStdout(), asJSON)
			}
			var all api.Cluster
			if err := c.Get(cmd.Context(), "/v1/cluster", nil, &all); err != nil {
				return notReached(err)
			}
			if asJSON {
				return printJSON(cmd.OutOrStdout(), all)
			}
			printCluster(cmd.OutOrStdout(), &all)
			return nil
		},
	}
	a.add(cmd)
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON; with --watch, one object in a line")
	cmd.Flags().BoolVarP(&watch, "watch", "w", false, "show it again every second, until Ctrl-C")
	return cmd
}

// notReached adds what to look at.
func notReached(err error) error {
	if errors.As(err, new(*api.Error)) || errors.Is(err, context.Canceled) {
		return err
	}
	return fmt.Errorf("no node of the cluster answers: %w", err)
}

func watchStatus(ctx context.Context, c *api.Client, out io.Writer, asJSON bool) error {
	f, isFile := out.(*os.File)
	tty := isFile && !asJSON && term.IsTerminal(int(f.Fd()))
	tick := time.NewTicker(watchInterval)
	defer tick.Stop()
	for {
		var all api.Cluster
		err := c.Get(ctx, "/v1/cluster", nil, &all)
		if ctx.Err() != nil {
			return nil // Ctrl-C is the normal end
		}
		var b strings.Builder
		switch {
		case err != nil && asJSON:
			fmt.Fprintln(os.Stderr, "clonectl:", notReached(err))
		case err != nil:
			fmt.Fprintf(&b, "%s  %v\n", time.Now().Format(time.TimeOnly), notReached(err))
		case asJSON:
			_ = json.NewEncoder(&b).Encode(all)
		default:
			printCluster(&b, &all)
		}
		if tty {
			// From the top, line by line, so that nothing flickers.
			fmt.Fprint(out, "\x1b[H"+strings.ReplaceAll(b.String(), "\n", "\x1b[K\n")+"\x1b[J")
		} else if _, err := io.WriteString(out, b.String()); err != nil {
			return err
		}
		if !tty && !asJSON {
			fmt.Fprintln(out)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

// printCluster writes the status of all nodes for a person, at most 80 columns wide
// as long as names are short.
func printCluster(w io.Writer, c *api.Cluster) {
	called := callNodes(c.Nodes)
	var asked *api.Status
	for _, n := range c.Nodes {
		if n.Node == c.Asked {
			asked = n.Status
		}
	}
	if asked != nil {
		agreed := "agreed"
		if !asked.Agreed {
			agreed = "NOT AGREED"
		}
		leader := asked.Leader
		if called[leader] != "" {
			leader = called[leader]
		}
		fmt.Fprintf(w, "cluster %s at %s\n", c.Cluster, strings.Join(asked.VIP, " and "))
		changed := ""
		if asked.PolicyVersion > 0 {
			changed = fmt.Sprintf(" (balance %s by change %d)", asked.Balance, asked.PolicyVersion)
		}
		fmt.Fprintf(w, "policy %s%s; map %d made by %s, %s\n\n", asked.Policy, changed, asked.Map, leader, agreed)
	}
	name := len("NODE")
	for _, n := range c.Nodes {
		name = min(max(name, len(called[n.Node])), 24)
	}
	fmt.Fprintf(w, "%-*s  %-10s %7s %6s %5s %6s %7s  %s\n", name, "NODE", "STATE", "BUCKETS", "WEIGHT", "BUSY", "FLOWS", "UP", "DATAPATH")
	builds, there := map[string][]string{}, 0
	for _, n := range c.Nodes {
		if !n.Gone {
			there++
		}
		label := clip(called[n.Node], 24)
		s := n.Status
		if s == nil {
			state := "no answer:"
			if n.Gone {
				state = "gone"
			}
			fmt.Fprintf(w, "%-*s  %s %s\n", name, label, state, n.Error)
			continue
		}
		if s.Build != "" {
			builds[s.Build] = append(builds[s.Build], label)
		}
		m := selfIn(s)
		fmt.Fprintf(w, "%-*s  %-10s %7d %6d %4.0f%% %6d %7s  %s\n", name, label, s.State, m.Buckets, m.Weight, 100*m.Busy, m.Flows,
			upFor(time.Duration(s.UptimeSec*float64(time.Second))), datapathOf(s))
	}
	if asked != nil {
		nobody := asked.Offered.UnownedPerSecond
		for _, n := range c.Nodes {
			if n.Status != nil {
				nobody += n.Status.Offered.LeaselessPerSecond
			}
		}
		printOffered(w, &asked.Offered, nobody)
	}
	switch len(builds) {
	case 0:
	case 1:
		for b, on := range builds {
			all := "all nodes"
			if len(on) < there {
				all = fmt.Sprintf("%d of %d nodes", len(on), there)
			}
			fmt.Fprintf(w, "\nprogram %s on %s\n", b, all)
		}
	default:
		fmt.Fprintln(w)
		for _, b := range slices.Sorted(maps.Keys(builds)) {
			fmt.Fprintf(w, "program %s on %s\n", b, strings.Join(builds[b], ", "))
		}
	}
	var found []finding.Finding
	for _, n := range c.Nodes {
		if n.Status != nil {
			found = append(found, n.Status.Findings...)
		}
	}
	slices.SortStableFunc(found, finding.Compare)
	for i, f := range found {
		if i == 0 {
			fmt.Fprintln(w)
		}
		who := called[f.Node]
		if who == "" {
			who = f.Node
		}
		fmt.Fprintln(w, wrap(fmt.Sprintf("%s %s: %s: %s", marks[f.Level], who, f.Code, printable(f.What)), 78, "  "))
		if f.Fix != "" && f.Level > finding.Info {
			fmt.Fprintln(w, "  "+wrap("-> "+printable(f.Fix), 76, "     "))
		}
	}
}

// printOffered writes what clients send to all nodes together, and how many frames a
// second of that no node takes.
func printOffered(w io.Writer, o *api.Offered, nobody float64) {
	fmt.Fprintf(w, "\noffered: %s frames/s, %s connections/s", perSecond(o.FramesPerSecond), perSecond(max(0, o.SYNsPerSecond-o.SYNsAgainPerSecond)))
	if o.SYNsAgainPerSecond > 0 {
		fmt.Fprintf(w, "; SYNs again: %s/s", perSecond(o.SYNsAgainPerSecond))
	}
	if nobody > 0 {
		fmt.Fprintf(w, "; for nobody: %s/s", perSecond(nobody))
	}
	fmt.Fprintln(w)
}

// perSecond has a digit behind the point where that matters.
func perSecond(rate float64) string {
	if rate > 0 && rate < 10 {
		return fmt.Sprintf("%.1f", rate)
	}
	return fmt.Sprintf("%.0f", rate)
}

// marks are what a finding of a level begins with.
var marks = map[finding.Level]string{finding.Info: ".", finding.Warning: "!", finding.Critical: "!!"}

// datapathOf leaves out what goes without saying.
func datapathOf(s *api.Status) string {
	if s.Datapath == "raw" {
		return s.Datapath
	}
	return s.Datapath + " " + s.Ingress
}

func selfIn(s *api.Status) api.Member {
	for _, m := range s.Members {
		if m.Self {
			return m
		}
	}
	return api.Member{}
}

// upFor is a time in its two largest units.
func upFor(d time.Duration) string {
	switch {
	case d < time.Minute:
		return fmt.Sprintf("%ds", int(d.Seconds()))
	case d < time.Hour:
		return fmt.Sprintf("%dm%02ds", int(d.Minutes()), int(d.Seconds())%60)
	case d < 24*time.Hour:
		return fmt.Sprintf("%dh%02dm", int(d.Hours()), int(d.Minutes())%60)
	}
	return fmt.Sprintf("%dd%02dh", int(d.Hours())/24, int(d.Hours())%24)
}

// wrap breaks a text into lines, of which all but the first are indented.
func wrap(text string, width int, indent string) string {
	var b strings.Builder
	at := 0
	for i, word := range strings.Fields(text) {
		n := len([]rune(word))
		switch {
		case i == 0:
		case at+1+n > width:
			b.WriteString("\n" + indent)
			at = len(indent)
		default:
			b.WriteByte(' ')
			at++
		}
		b.WriteString(word)
		at += n
	}
	return b.String()
}
