package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"clonecluster/netcore/api"
)

// exitNotDone is the exit code of "drain --wait" when its time has run out.
const exitNotDone = 3

// codedError is an error with an exit code of its own.
type codedError struct {
	error
	code int
}

func (e codedError) Unwrap() error { return e.error }

func newDrainCmd() *cobra.Command {
	var a access
	var wait time.Duration
	var reason string
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "drain NODE",
		Short: "Give a node's share to the others",
		Long: `Drain has a node take no new connections; those it has go on, and end in their own
time. It stays drained until "clonectl resume", also when its engine is started
again. NODE is a host name, a wire MAC or the end of one.

With --wait it waits until the node has no connections left, and ends with exit
code 3 if that takes longer.`,
		Example: `  clonectl drain web-2
  clonectl drain 77:00:02 --wait 5m --reason "new disk" && echo now`,
		Args:              usageArgs(cobra.ExactArgs(1)),
		ValidArgsFunction: a.completeNodes,
		RunE: func(cmd *cobra.Command, args []string) error {
			if wait < 0 {
				return usageError{fmt.Errorf("--wait %v: want a time, as 5m", wait)}
			}
			return a.order(cmd, "/v1/drain", args[0], reason, wait, asJSON)
		},
	}
	a.add(cmd)
	cmd.Flags().DurationVar(&wait, "wait", 0, "wait so long for the node's connections to end; exit code 3 if they do not")
	cmd.Flags().StringVar(&reason, "reason", "", "`WHY`, for the events")
	cmd.Flags().BoolVar(&asJSON, "json", false, "print the node's status as JSON")
	return cmd
}

func newResumeCmd() *cobra.Command {
	var a access
	var reason string
	var asJSON bool
	cmd := &cobra.Command{
		Use:               "resume NODE",
		Short:             "Have a drained node take its share again",
		Example:           `  clonectl resume web-2`,
		Args:              usageArgs(cobra.ExactArgs(1)),
		ValidArgsFunction: a.completeNodes,
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.order(cmd, "/v1/resume", args[0], reason, 0, asJSON)
		},
	}
	a.add(cmd)
	cmd.Flags().StringVar(&reason, "reason", "", "`WHY`, for the events")
	cmd.Flags().BoolVar(&asJSON, "json", false, "print the node's status as JSON")
	return cmd
}

// order drains or resumes a node, and waits for what follows from it if that is
// wanted.
func (a *access) order(cmd *cobra.Command, path, node, reason string, wait time.Duration, asJSON bool) error {
	ctx := cmd.Context()
	c, _, err := a.client(ctx)
	if err != nil {
		return err
	}
	defer c.Close()
	var s api.Status
	if err := c.Post(ctx, path, url.Values{"node": {node}}, api.Order{Reason: reason}, &s); err != nil {
		return notReached(err)
	}
	if wait > 0 {
		s, err = awaitDrained(ctx, c, s, wait)
		if err != nil {
			return err
		}
	}
	if asJSON {
		return printJSON(cmd.OutOrStdout(), s)
	}
	out, name := cmd.OutOrStdout(), s.WireMAC
	if s.Name != "" {
		name = s.Name + " (" + name + ")"
	}
	switch {
	case path == "/v1/resume" && s.Drain.Aside:
		fmt.Fprintf(out, "%s still stands aside, as it cannot do its part in directed mode: clonectl status has the finding\n", name)
	case path == "/v1/resume":
		fmt.Fprintf(out, "%s takes part again\n", name)
	case s.Drain.Flows == 0 && !s.Drain.Owned:
		fmt.Fprintf(out, "%s is drained: it has no connections left\n", name)
	default:
		fmt.Fprintf(out, "%s drains: %s left\n", name, plural(s.Drain.Flows, "connection"))
	}
	return nil
}

// awaitDrained waits until the node owns nothing and has no connections.
func awaitDrained(ctx context.Context, c *api.Client, s api.Status, most time.Duration) (api.Status, error) {
	p := newProgress(os.Stderr)
	defer p.Clear()
	deadline := time.Now().Add(most)
	node := url.Values{"node": {s.WireMAC}}
	tick := time.NewTicker(250 * time.Millisecond)
	defer tick.Stop()
	for begin := time.Now(); ; {
		var next api.Status
		ask, cancel := context.WithDeadline(ctx, deadline)
		err := c.Get(ask, "/v1/status", node, &next)
		cancel()
		switch {
		case ctx.Err() != nil:
			return s, ctx.Err()
		case err == nil:
			s = next
		case errors.As(err, new(*api.Error)):
			return s, err
		}
		switch {
		case err == nil && !s.Drain.Draining:
			return s, errors.New("somebody has resumed the node")
		case err == nil && !s.Drain.Owned && s.Drain.Flows == 0:
			return s, nil
		case !time.Now().Before(deadline) && s.Drain.Owned:
			return s, codedError{errors.New("not drained in time: no other node has taken over"), exitNotDone}
		case !time.Now().Before(deadline):
			return s, codedError{fmt.Errorf("not drained in time: %s left", plural(s.Drain.Flows, "connection")), exitNotDone}
		case time.Since(begin) > 2*time.Second:
			p.Status("draining: %s left, %s to go", plural(s.Drain.Flows, "connection"), time.Until(deadline).Round(time.Second))
		}
		select {
		case <-ctx.Done():
		case <-tick.C:
		}
	}
}

func newEventsCmd() *cobra.Command {
	var a access
	var since, node string
	var follow, all, asJSON bool
	cmd := &cobra.Command{
		Use:   "events",
		Short: "Tell what changed in a cluster, when and why",
		Long: `Events lists what a node saw: nodes that joined, left or died, and by what it knew;
maps of who takes which share; drains and who wanted them; services that failed
their checks; frames that were refused. It is told by the node that answers at the
VIP, or by --node, or by --all nodes, whose clocks may differ.`,
		Example: `  clonectl events --since 1h
  clonectl events --follow
  clonectl events --all --json | jq 'select(.kind == "lost")'`,
		Args: usageArgs(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if all && (follow || node != "") {
				return usageError{errors.New("--all goes neither with --follow nor with --node")}
			}
			if _, err := api.ParseSince(since, time.Now()); err != nil {
				return usageError{fmt.Errorf("--%w", err)}
			}
			c, _, err := a.client(cmd.Context())
			if err != nil {
				return err
			}
			defer c.Close()
			p := eventPrinter{w: cmd.OutOrStdout(), asJSON: asJSON, withNode: all}
			if follow {
				return p.follow(cmd.Context(), c, node, since)
			}
			nodes := []string{node}
			if all {
				var cluster api.Cluster
				if err := c.Get(cmd.Context(), "/v1/cluster", nil, &cluster); err != nil {
					return notReached(err)
				}
				p.called = callNodes(cluster.Nodes)
				nodes = nil
				for _, n := range cluster.Nodes {
					if !n.Gone {
						nodes = append(nodes, n.Node)
					}
				}
			}
			return p.once(cmd.Context(), c, nodes, since)
		},
	}
	a.add(cmd)
	f := cmd.Flags()
	f.StringVar(&since, "since", "", "only what came after `WHEN`: 10m, 2026-01-02T15:04:05Z, or the number of an event")
	f.StringVar(&node, "node", "", "as this `NODE` saw it")
	f.BoolVar(&all, "all", false, "as all nodes saw it")
	f.BoolVarP(&follow, "follow", "f", false, "go on with what comes, until Ctrl-C")
	f.BoolVar(&asJSON, "json", false, "print one JSON object in a line for each event")
	cmd.RegisterFlagCompletionFunc("node", a.completeNodeFlag)
	return cmd
}

type eventPrinter struct {
	w                io.Writer
	asJSON, withNode bool
	called           map[string]string
}

func (p *eventPrinter) print(e api.Event) error {
	if p.asJSON {
		return json.NewEncoder(p.w).Encode(e)
	}
	who := ""
	if p.withNode {
		who = fmt.Sprintf("%-18s", clip(p.called[e.Node], 17))
	}
	text := e.Text
	if e.Why != "" {
		text += " (" + e.Why + ")"
	}
	_, err := fmt.Fprintf(p.w, "%s  %s%-10s %s\n", e.Time.Local().Format("Jan 02 15:04:05.000"), who, e.Kind, text)
	return err
}

func (p *eventPrinter) once(ctx context.Context, c *api.Client, nodes []string, since string) error {
	var all []api.Event
	var errs []error
	for _, n := range nodes {
		var got api.Events
		if err := c.Get(ctx, "/v1/events", about(n, since), &got); err != nil {
			errs = append(errs, notReached(err))
			continue
		}
		if got.Lost > 0 {
			fmt.Fprintf(os.Stderr, "clonectl: %s no longer has %s\n", got.Node, plural(int(got.Lost), "event"))
		}
		all = append(all, got.Events...)
	}
	slices.SortStableFunc(all, func(a, b api.Event) int { return a.Time.Compare(b.Time) })
	for _, e := range all {
		if err := p.print(e); err != nil {
			return err
		}
	}
	return errors.Join(errs...)
}

// follow goes on when a connection is lost: another node may answer then, whose
// numbers are others, but not its clock.
func (p *eventPrinter) follow(ctx context.Context, c *api.Client, node, since string) error {
	return follow(ctx, c, "/v1/events", about(node, since), func(data []byte) (time.Time, error) {
		var e api.Event
		if err := json.Unmarshal(data, &e); err != nil {
			return time.Time{}, fmt.Errorf("reading an event: %w", err)
		}
		return e.Time, p.print(e)
	})
}

func about(node, since string) url.Values {
	v := url.Values{}
	if node != "" {
		v.Set("node", node)
	}
	if since != "" {
		v.Set("since", since)
	}
	return v
}

// follow hands on what comes until the user ends it. Each gives the time of what it
// was given.
func follow(ctx context.Context, c *api.Client, path string, query url.Values, each func([]byte) (time.Time, error)) error {
	c.Lost = func(n uint64) {
		fmt.Fprintf(os.Stderr, "clonectl: %d of those that come next are lost: the node no longer had them\n", n)
	}
	connected := false
	for {
		var failed error
		err := c.Follow(ctx, path, query, func(data []byte) error {
			connected = true
			var at time.Time
			if at, failed = each(data); failed == nil {
				query.Set("since", at.Format(time.RFC3339Nano))
			}
			return failed
		})
		var answer *api.Error
		switch {
		case ctx.Err() != nil:
			return nil // Ctrl-C is the normal end
		case failed != nil:
			return failed
		case errors.As(err, &answer) && answer.Code < http.StatusInternalServerError:
			return err
		case err != nil && !connected && !errors.Is(err, io.ErrUnexpectedEOF):
			return notReached(err)
		}
		connected = true
		fmt.Fprintln(os.Stderr, "clonectl: the connection is lost; asking again")
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(time.Second):
		}
	}
}

func newWhichCmd() *cobra.Command {
	var a access
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "which CLIENT[:PORT] PORT[/udp]",
		Short: "Say which node takes a client's connection, and why",
		Long: `Which tells who takes a connection from CLIENT to a port of the VIP: by the rule of
that port, the map, and what each node makes of it. With the client's port it also
tells who has that very connection now, which may be another node since the map
changed.`,
		Example: `  clonectl which 192.0.2.7:40312 80
  clonectl which 192.0.2.7 443              # where one client's connections stay together
  clonectl which [2001:db8::7]:40312 80`,
		Args: usageArgs(cobra.ExactArgs(2)),
		ValidArgsFunction: func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
			return nil, cobra.ShellCompDirectiveNoFileComp
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			port, proto, _ := strings.Cut(args[1], "/")
			f, err := api.ParseFlow(args[0], port, proto)
			if err != nil {
				return usageError{err}
			}
			c, _, err := a.client(cmd.Context())
			if err != nil {
				return err
			}
			defer c.Close()
			var w api.Which
			if err := c.Get(cmd.Context(), "/v1/which", f.Values(), &w); err != nil {
				return notReached(err)
			}
			return show(cmd, asJSON, &w, printWhich)
		},
	}
	a.add(cmd)
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

// show prints an answer for programs or for people.
func show[T any](cmd *cobra.Command, asJSON bool, answer *T, print func(io.Writer, *T)) error {
	if asJSON {
		return printJSON(cmd.OutOrStdout(), answer)
	}
	print(cmd.OutOrStdout(), answer)
	return nil
}

func printWhich(w io.Writer, which *api.Which) {
	var nodes []api.NodeReport
	for _, n := range which.Nodes {
		nodes = append(nodes, api.NodeReport{Node: n.Node, Name: n.Name})
	}
	called := callNodes(nodes)
	call := func(id string) string {
		if called[id] != "" {
			return called[id]
		}
		return id
	}
	owner := "nobody"
	switch {
	case which.Owner != "":
		owner = call(which.Owner)
	case which.Bucket == nil && which.Affinity != "disabled":
		owner = "any node"
	}
	fmt.Fprintf(w, "%s to %s port %d/%s: %s\n", which.Client, which.VIP, which.Port, which.Protocol, owner)
	if which.Holder != "" && which.Holder != which.Owner {
		fmt.Fprintf(w, "the connection there is now: %s\n", call(which.Holder))
	}
	fmt.Fprintln(w, wrap(which.Why, 78, ""))
	for i, n := range which.Nodes {
		if i == 0 {
			fmt.Fprintf(w, "\n%-24s  %-9s %s\n", "NODE", "BUCKET IS", "")
		}
		remarks := []string{}
		for _, r := range []struct {
			on   bool
			text string
		}{{n.Socket, "has this connection"}, {n.Fenced, "fenced"}, {n.Error != "", n.Error}} {
			if r.on {
				remarks = append(remarks, r.text)
			}
		}
		fmt.Fprintf(w, "%-24s  %-9s %s\n", clip(call(n.Node), 24), n.State, strings.Join(remarks, ", "))
	}
}

func newLogsCmd() *cobra.Command {
	var a access
	var source, since string
	var followIt, asJSON bool
	cmd := &cobra.Command{
		Use:   "logs NODE",
		Short: "Print what a node has logged",
		Long: `Logs prints the last lines of a node: of an appliance those of init, the engine and
the services, of an ordinary host those of its engine.`,
		Example: `  clonectl logs web-2 -f
  clonectl logs web-2 --source web --since 10m`,
		Args:              usageArgs(cobra.ExactArgs(1)),
		ValidArgsFunction: a.completeNodes,
		RunE: func(cmd *cobra.Command, args []string) error {
			if _, err := api.ParseSince(since, time.Now()); err != nil {
				return usageError{fmt.Errorf("--%w", err)}
			}
			c, _, err := a.client(cmd.Context())
			if err != nil {
				return err
			}
			defer c.Close()
			query := about(args[0], since)
			if source != "" {
				query.Set("source", source)
			}
			print := func(l api.LogLine) error {
				if asJSON {
					return json.NewEncoder(cmd.OutOrStdout()).Encode(l)
				}
				_, err := fmt.Fprintf(cmd.OutOrStdout(), "%s %s: %s\n", l.Time.Local().Format("Jan 02 15:04:05.000"), l.Source, printable(l.Text))
				return err
			}
			if followIt {
				return follow(cmd.Context(), c, "/v1/logs", query, func(data []byte) (time.Time, error) {
					var l api.LogLine
					if err := json.Unmarshal(data, &l); err != nil {
						return time.Time{}, fmt.Errorf("reading a line: %w", err)
					}
					return l.Time, print(l)
				})
			}
			var got api.Logs
			if err := c.Get(cmd.Context(), "/v1/logs", query, &got); err != nil {
				return notReached(err)
			}
			if got.Lost > 0 {
				fmt.Fprintf(os.Stderr, "clonectl: %s no longer has %s\n", got.Node, plural(int(got.Lost), "line"))
			}
			for _, l := range got.Lines {
				if err := print(l); err != nil {
					return err
				}
			}
			return nil
		},
	}
	a.add(cmd)
	f := cmd.Flags()
	f.StringVar(&since, "since", "", "only what came after `WHEN`: 10m, 2026-01-02T15:04:05Z, or the number of a line")
	f.StringVar(&source, "source", "", "only the lines of `NAME`: engine, init or a service")
	f.BoolVarP(&followIt, "follow", "f", false, "go on with what comes, until Ctrl-C")
	f.BoolVar(&asJSON, "json", false, "print one JSON object in a line for each")
	return cmd
}

// printable keeps what was logged from moving the cursor.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if r < ' ' || r >= 0x7f && r < 0xa0 {
			return '·'
		}
		return r
	}, s)
}

func newBootCmd() *cobra.Command {
	var a access
	var asJSON bool
	cmd := &cobra.Command{
		Use:               "boot NODE",
		Short:             "Show how an appliance came up, and what it runs",
		Example:           `  clonectl boot web-2`,
		Args:              usageArgs(cobra.ExactArgs(1)),
		ValidArgsFunction: a.completeNodes,
		RunE: func(cmd *cobra.Command, args []string) error {
			c, _, err := a.client(cmd.Context())
			if err != nil {
				return err
			}
			defer c.Close()
			var b api.Boot
			if err := c.Get(cmd.Context(), "/v1/boot", about(args[0], ""), &b); err != nil {
				return notReached(err)
			}
			return show(cmd, asJSON, &b, printBoot)
		},
	}
	a.add(cmd)
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

func printBoot(w io.Writer, b *api.Boot) {
	up := time.Duration(b.Uptime * float64(time.Second))
	fmt.Fprintf(w, "%s (%s) at %s, up %s\n\n", b.Hostname, b.Node, b.Address, upFor(up))
	last := 0.0
	for _, s := range b.Timeline {
		fmt.Fprintf(w, "%8.3fs  +%.3fs  %s\n", s.At, s.At-last, s.Stage)
		last = s.At
	}
	fmt.Fprintf(w, "\n%-12s %-10s %6s %8s  %s\n", "PROGRAM", "STATE", "STARTS", "MEMORY", "")
	for _, c := range b.Children {
		var remarks []string
		if c.Healthy != nil && !*c.Healthy {
			remarks = append(remarks, "unwell: "+c.Health)
		}
		if c.LastExit != "" {
			remarks = append(remarks, "ended last with "+c.LastExit)
		}
		if c.Status != "" {
			remarks = append(remarks, c.Status)
		}
		fmt.Fprintf(w, "%-12s %-10s %6d %6.1fMB  %s\n", clip(c.Name, 12), c.State, c.Restarts+1, megabytes(c.RSS), strings.Join(remarks, "; "))
	}
	switch {
	case b.Watchdog.Device != "":
		fmt.Fprintf(w, "\nwatchdog %s, %.0fs\n", b.Watchdog.Device, b.Watchdog.Timeout)
	case b.Watchdog.Off != "":
		fmt.Fprintf(w, "\nno watchdog: %s\n", b.Watchdog.Off)
	}
	if b.Ending != "" {
		fmt.Fprintf(w, "\nit is about to end: %s\n", b.Ending)
	}
}
