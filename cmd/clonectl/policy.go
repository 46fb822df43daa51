package main

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"clonecluster/netcore/api"
)

// balances are what can be set.
var balances = []string{"even", "load", "configured"}

// policyNames are the policies that have names, and what they are.
var policyNames = map[string]namedPolicy{
	"byrandom": {"even", "none"}, "byload": {"load", "none"}, "bysource": {"even", "client"},
}

type namedPolicy struct{ balance, affinity string }

// named gives the policy that the argument names, if there is one that does.
func named(args []string) (p namedPolicy, ok bool) {
	if len(args) > 0 {
		p, ok = policyNames[strings.ToLower(args[0])]
	}
	return p, ok
}

func newPolicyCmd() *cobra.Command {
	var a access
	var reason string
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "policy [even|load|configured]",
		Short: "Show or change who gets how many buckets",
		Long: `Policy without more shows the balance and the weights that hold. With a balance it
changes that on all nodes at run time: even goes by the weights alone, load gives
busy nodes less, configured is what cluster.yaml says. byRandom, byLoad and
bySource are taken, too, if their affinity is the configured one: that cannot be
changed at run time, since it decides which node an established connection is with.

What was set holds as long as any node runs, and for nodes that join, too. When all
have been restarted at the same time, the configuration holds again: what shall
stay belongs into cluster.yaml.`,
		Example: `  clonectl policy
  clonectl policy load --reason "the batch jobs run"
  clonectl policy configured`,
		Args:              usageArgs(cobra.MaximumNArgs(1)),
		ValidArgsFunction: cobra.FixedCompletions(balances, cobra.ShellCompDirectiveNoFileComp),
		RunE: func(cmd *cobra.Command, args []string) error {
			named, isName := named(args)
			if !isName && len(args) > 0 && !slices.Contains(balances, args[0]) {
				return usageError{fmt.Errorf("policy %q: want even, load, configured, byRandom, byLoad or bySource", args[0])}
			}
			c, _, err := a.client(cmd.Context())
			if err != nil {
				return err
			}
			defer c.Close()
			var now api.Policy
			if err := c.Get(cmd.Context(), "/v1/policy", nil, &now); err != nil {
				return notReached(err)
			}
			if len(args) == 0 {
				return show(cmd, asJSON, &now, printPolicy)
			}
			balance := args[0]
			if isName {
				if balance = named.balance; named.affinity != now.Affinity {
					return usageError{fmt.Errorf("policy %s has affinity %s, and this cluster is configured with %s, which cannot be changed while it runs: set it in cluster.yaml, and roll that out", args[0], named.affinity, now.Affinity)}
				}
			}
			return changePolicy(cmd, c, api.PolicyOrder{Balance: balance, Reason: reason}, asJSON)
		},
	}
	a.add(cmd)
	cmd.Flags().StringVar(&reason, "reason", "", "`WHY`, for the events")
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

func newWeightCmd() *cobra.Command {
	var a access
	var reason string
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "weight NODE WEIGHT|configured",
		Short: "Change how much a node gets",
		Long: `Weight gives a node a share in proportion to its weight, 1 to 1000, at run time: only
new connections move. "configured" is what cluster.yaml says again; 100 is the
default there. It holds for as long as any node runs; see "clonectl policy --help".
NODE is a host name, a wire MAC or the end of one.`,
		Example: `  clonectl weight web-2 50
  clonectl weight web-2 configured`,
		Args:              usageArgs(cobra.ExactArgs(2)),
		ValidArgsFunction: a.completeNodes,
		RunE: func(cmd *cobra.Command, args []string) error {
			weight := 0
			if args[1] != "configured" {
				var err error
				if weight, err = strconv.Atoi(args[1]); err != nil || weight < 1 || weight > 1000 {
					return usageError{fmt.Errorf("weight %q: want a number of 1 to 1000, or configured", args[1])}
				}
			}
			c, _, err := a.client(cmd.Context())
			if err != nil {
				return err
			}
			defer c.Close()
			return changePolicy(cmd, c, api.PolicyOrder{Weights: map[string]int{args[0]: weight}, Reason: reason}, asJSON)
		},
	}
	a.add(cmd)
	cmd.Flags().StringVar(&reason, "reason", "", "`WHY`, for the events")
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

// policySpread is how long a change may take until all nodes know of it; it takes a
// beacon's time.
const policySpread = 10 * time.Second

// changePolicy changes it, waits until all nodes go by one policy, and shows that: it may
// be another one than was ordered, if somebody else did so at the same time.
func changePolicy(cmd *cobra.Command, c *api.Client, o api.PolicyOrder, asJSON bool) error {
	var p api.Policy
	if err := c.Post(cmd.Context(), "/v1/policy", nil, o, &p); err != nil {
		return notReached(err)
	}
	if err := awaitPolicy(cmd.Context(), c, p.Version); err != nil {
		return err
	}
	var now api.Policy
	if err := c.Get(cmd.Context(), "/v1/policy", nil, &now); err != nil {
		return notReached(err)
	}
	if err := show(cmd, asJSON, &now, printPolicy); err != nil {
		return err
	}
	if lack := notAsOrdered(o, now); lack != "" {
		return fmt.Errorf("%s, as change %d by %s holds: it came at the same time, or later; order it again if it shall hold", lack, now.Version, printable(now.By))
	}
	return nil
}

// notAsOrdered says what is otherwise than ordered; empty: nothing.
func notAsOrdered(o api.PolicyOrder, p api.Policy) string {
	want := o.Balance
	if want == "configured" {
		want = ""
	}
	if o.Balance != "" && p.Set != want {
		return "the balance is not " + o.Balance
	}
	var nodes []api.Peer
	for _, n := range p.Nodes {
		nodes = append(nodes, api.Peer{Node: n.Node, Name: n.Name})
	}
	for name, weight := range o.Weights {
		found, err := api.Find(name, nodes)
		i := slices.IndexFunc(p.Nodes, func(n api.PolicyNode) bool { return err == nil && n.Node == found.Node })
		switch {
		case weight == 0 && (i < 0 || !p.Nodes[i].Set):
		case weight == 0:
			return "the weight of " + name + " is not the configured one"
		case i < 0 || !p.Nodes[i].Set || p.Nodes[i].Weight != weight:
			return fmt.Sprintf("the weight of %s is not %d", name, weight)
		}
	}
	return ""
}

// awaitPolicy waits until all nodes have this version or a later one, and the same.
func awaitPolicy(ctx context.Context, c *api.Client, version uint64) error {
	progress := newProgress(os.Stderr)
	defer progress.Clear()
	behind := "no node answers"
	for begin := time.Now(); time.Since(begin) < policySpread; breathe(ctx, 1) {
		var all api.Cluster
		if err := c.Get(ctx, "/v1/cluster", nil, &all); err != nil {
			if ctx.Err() != nil {
				return ctx.Err()
			}
			continue
		}
		behind = ""
		author := ""
		for _, n := range all.Nodes {
			switch s := n.Status; {
			case s == nil && n.Gone:
			case s == nil:
				behind = fmt.Sprintf("%s does not say whether it knows of it: %s", cmp.Or(n.Name, n.Node), n.Error)
			case s.PolicyVersion < version:
				behind = nodeName(*s) + " does not know of it yet"
			case author != "" && s.PolicyAuthor != "" && s.PolicyAuthor != author:
				behind = "the nodes go by two orders that came at the same time"
			default:
				author = cmp.Or(s.PolicyAuthor, author) // one of before has none
			}
		}
		if behind == "" {
			return nil
		}
		if time.Since(begin) > 2*time.Second {
			progress.Status("%s", behind)
		}
	}
	return fmt.Errorf("it is set on the node that was asked, but after %v %s; see clonectl status", policySpread, behind)
}

func printPolicy(w io.Writer, p *api.Policy) {
	fmt.Fprintf(w, "balance %s", p.Balance)
	switch {
	case p.Set == "":
		fmt.Fprint(w, ", as configured")
	default:
		fmt.Fprintf(w, ", set at run time (configured: %s)", p.Configured)
	}
	fmt.Fprintf(w, "; affinity %s\n", p.Affinity)
	if p.Version > 0 {
		fmt.Fprintln(w, wrap(fmt.Sprintf("last change, number %d, by %s", p.Version, printable(p.By)), 78, "  "))
	}
	var nodes []api.NodeReport
	for _, n := range p.Nodes {
		nodes = append(nodes, api.NodeReport{Node: n.Node, Name: n.Name})
	}
	called := callNodes(nodes)
	for i, n := range p.Nodes {
		if i == 0 {
			fmt.Fprintf(w, "\n%-24s  %6s\n", "NODE", "WEIGHT")
		}
		set := ""
		if n.Set {
			set = "  set at run time"
		}
		fmt.Fprintf(w, "%-24s  %6d%s\n", clip(called[n.Node], 24), n.Weight, set)
	}
}
