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
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"clonecluster/netcore/api"
	"clonecluster/netcore/filter"
)

// rebooting is how nodes are restarted, one after the other.
type rebooting struct {
	wait, timeout time.Duration
	force         bool
	reason        string
}

func (r *rebooting) add(cmd *cobra.Command) {
	f := cmd.Flags()
	f.DurationVar(&r.wait, "wait", time.Minute, "wait so long for a node's connections to end")
	f.DurationVar(&r.timeout, "timeout", 5*time.Minute, "wait so long for a node to come back")
	f.BoolVar(&r.force, "force", false, "reboot though connections are left after --wait: they break")
	f.StringVar(&r.reason, "reason", "", "`WHY`, for the events")
}

func (r *rebooting) check() error {
	if r.wait < 0 || r.timeout <= 0 {
		return usageError{fmt.Errorf("--wait %v, --timeout %v: want times, as 5m", r.wait, r.timeout)}
	}
	return nil
}

func newRebootCmd() *cobra.Command {
	var a access
	var r rebooting
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "reboot NODE",
		Short: "Drain an appliance, restart it, and wait until it serves again",
		Long: `Reboot gives a node's share to the others, waits for its connections to end, has its
machine restart, and waits until it serves again and has its share back. If
connections are left after --wait, it takes part again and is not restarted (exit
code 3), unless --force says otherwise. One that was drained before stays so then; a
restart ends that.

What it boots is what its disk or its boot server has by then. An ordinary host is
not restarted: that is for its own tools.`,
		Example: `  clonectl reboot web-2
  clonectl reboot 77:00:02 --wait 10m --force --reason "new memory"`,
		Args:              usageArgs(cobra.ExactArgs(1)),
		ValidArgsFunction: a.completeNodes,
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := r.check(); err != nil {
				return err
			}
			c, _, err := a.client(cmd.Context())
			if err != nil {
				return err
			}
			defer c.Close()
			ro := newRollout(c, r, asJSON, cmd.OutOrStdout())
			defer ro.p.Clear()
			var s api.Status
			if err := c.Get(cmd.Context(), "/v1/status", url.Values{"node": {args[0]}}, &s); err != nil {
				return notReached(err)
			}
			return ro.node(cmd.Context(), s)
		},
	}
	a.add(cmd)
	r.add(cmd)
	cmd.Flags().BoolVar(&asJSON, "json", false, "print one JSON object in a line for each step")
	return cmd
}

func newRolloutCmd() *cobra.Command {
	var a access
	var r rebooting
	var asJSON, dry, resume, anew bool
	var expect string
	cmd := &cobra.Command{
		Use:   "rollout [NODE]...",
		Short: "Restart all appliances into what they boot now, one after the other",
		Long: `Rollout does with each node, or with those that are named, what "reboot" does: drain,
restart, wait until it serves with its share again; then the next. The leader is the
last. It begins with no node, and restarts none that is drained, while another one is not
well or is drained, also by another rollout; and it stops at the first that does not
come back, comes back with another program than --expect (or than the first that was
restarted), or keeps connections for longer than --wait.

Put what they shall boot where they boot from first: onto the boot server, or onto
their disks.

One that has stopped goes on with --resume, without the nodes that are done; with
--expect, those that run another program are not done. Ctrl-C while a node drains has
it take part again; one that restarts already comes back by itself.`,
		Example: `  clonectl rollout --dry-run
  clonectl rollout --reason "kernel 6.12.9" --wait 10m
  clonectl rollout --resume`,
		ValidArgsFunction: func(cmd *cobra.Command, _ []string, _ string) ([]string, cobra.ShellCompDirective) {
			return a.nodeNames(cmd)
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := r.check(); err != nil {
				return err
			}
			if resume && (anew || len(args) > 0) {
				return usageError{errors.New("--resume goes neither with --anew nor with names of nodes")}
			}
			c, cluster, err := a.client(cmd.Context())
			if err != nil {
				return err
			}
			defer c.Close()
			state, err := openRollout(cluster, resume, anew, dry)
			if err != nil {
				return err
			}
			defer state.close()
			if !resume {
				state.Only = args
			}
			if expect != "" {
				state.Expect = expect
			}
			ro := newRollout(c, r, asJSON, cmd.OutOrStdout())
			defer ro.p.Clear()
			ro.careful = true
			return ro.all(cmd.Context(), state, dry)
		},
	}
	a.add(cmd)
	r.add(cmd)
	f := cmd.Flags()
	f.StringVar(&expect, "expect", "", "the program that nodes must come back with, as \"clonectl status\" shows it: `BUILD`")
	f.BoolVar(&dry, "dry-run", false, "only tell what would be done")
	f.BoolVar(&resume, "resume", false, "go on with the one that stopped")
	f.BoolVar(&anew, "anew", false, "forget the one that stopped")
	f.BoolVar(&asJSON, "json", false, "print one JSON object in a line for each step")
	return cmd
}

// rolloutState is how far a rollout has come: a file, until it is done.
type rolloutState struct {
	Started time.Time `json:"started"`
	Only    []string  `json:"only,omitempty"`   // the nodes that are meant; none: all
	Expect  string    `json:"expect,omitempty"` // the program that nodes come back with
	Done    []string  `json:"done"`             // wire MACs

	path string
	lock *os.File
}

// openRollout begins a rollout of the cluster, or goes on with the one that stopped.
func openRollout(cluster string, resume, anew, dry bool) (_ *rolloutState, err error) {
	cache, err := cacheDir()
	if err != nil {
		return nil, err
	}
	s := &rolloutState{Started: time.Now(), path: filepath.Join(cache, "rollouts", filepath.Base(cluster)+".json")}
	if !dry {
		if err := s.open(); err != nil {
			return nil, err
		}
	}
	defer func() {
		if err != nil {
			s.close()
		}
	}()
	text, err := os.ReadFile(s.path)
	switch {
	case errors.Is(err, os.ErrNotExist) && resume:
		return nil, usageError{fmt.Errorf("no rollout of %s has stopped here: begin one without --resume", cluster)}
	case errors.Is(err, os.ErrNotExist), err == nil && (anew || dry):
		return s, nil
	case err != nil:
		return nil, err
	}
	if err := json.Unmarshal(text, s); err != nil {
		return nil, fmt.Errorf("%s: %w; begin with --anew", s.path, err)
	}
	if !resume {
		return nil, usageError{fmt.Errorf("a rollout of %s has stopped after %s: go on with --resume, or begin with --anew", s.Started.Format("Jan 02 15:04"), plural(len(s.Done), "node"))}
	}
	return s, nil
}

// open makes sure that no other rollout of this user's goes by the file.
func (s *rolloutState) open() (err error) {
	if err := os.MkdirAll(filepath.Dir(s.path), 0o700); err != nil {
		return err
	}
	if s.lock, err = os.OpenFile(s.path+".lock", os.O_RDWR|os.O_CREATE, 0o600); err != nil {
		return err
	}
	if err := unix.Flock(int(s.lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		s.close()
		return fmt.Errorf("another rollout of this cluster runs here; wait for it, or end it with Ctrl-C (locking %s: %w)", s.lock.Name(), err)
	}
	return nil
}

func (s *rolloutState) close() { s.lock.Close() }

func (s *rolloutState) save() error {
	text, err := json.Marshal(s)
	if err != nil {
		return err
	}
	return os.WriteFile(s.path, text, 0o600)
}

// rollout restarts nodes.
type rollout struct {
	rebooting
	c       *api.Client
	p       *progress
	expect  string // build
	careful bool   // no node is restarted while another one is not well
	asJSON  bool
	w       io.Writer
}

// rolloutStep is one step, for programs.
type rolloutStep struct {
	Time time.Time `json:"time"`
	Node string    `json:"node"`
	Name string    `json:"name,omitempty"`
	Step string    `json:"step"` // plan, drain, reboot, done or failed
	Text string    `json:"text"`
}

func newRollout(c *api.Client, r rebooting, asJSON bool, w io.Writer) *rollout {
	return &rollout{rebooting: r, c: c, p: newProgress(os.Stderr), asJSON: asJSON, w: w}
}

func (r *rollout) say(s api.Status, step, format string, args ...any) {
	text := fmt.Sprintf(format, args...)
	r.p.Clear()
	if r.asJSON {
		_ = json.NewEncoder(r.w).Encode(rolloutStep{time.Now(), s.WireMAC, s.Name, step, text})
		return
	}
	fmt.Fprintf(r.w, "%s: %s\n", nodeName(s), text)
}

func nodeName(s api.Status) string {
	if s.Name != "" {
		return s.Name
	}
	return s.WireMAC
}

// all restarts all nodes that the state means and that are not done.
func (r *rollout) all(ctx context.Context, state *rolloutState, dry bool) error {
	nodes, err := r.cluster(ctx)
	if err != nil {
		return err
	}
	if nodes, err = r.plan(nodes, state); err != nil {
		return err
	}
	r.expect = state.Expect
	for i, s := range nodes {
		if dry {
			r.say(s, "plan", "%d of %d: %s, %s, %s, program %s", i+1, len(nodes), s.State, plural(selfIn(&s).Buckets, "bucket"), plural(s.Drain.Flows, "connection"), s.Build)
		}
	}
	if dry {
		return nil
	}
	for i, s := range nodes {
		if err := state.save(); err != nil {
			return fmt.Errorf("noting how far the rollout is: %w", err)
		}
		err := r.allAreWell(ctx, s.WireMAC, false)
		if err == nil {
			err = r.node(ctx, s)
		}
		if err != nil {
			if ctx.Err() == nil {
				r.say(s, "failed", "%v", err)
			}
			fmt.Fprintf(os.Stderr, "clonectl: %d of %s done; go on with: clonectl rollout --resume\n", i, plural(len(nodes), "node"))
			return err
		}
		state.Done, state.Expect = append(state.Done, s.WireMAC), r.expect
	}
	return os.Remove(state.path)
}

// cluster gives the status of all nodes that are there, and fails if one is silent. Each
// is asked for its own, as what a node says of the whole cluster may be a second old.
func (r *rollout) cluster(ctx context.Context) (nodes []api.Status, err error) {
	var all api.Cluster
	if err := r.c.Get(ctx, "/v1/cluster", nil, &all); err != nil {
		return nil, notReached(err)
	}
	for _, n := range all.Nodes {
		switch {
		case n.Status != nil:
			var now api.Status
			if err := r.c.Get(ctx, "/v1/status", url.Values{"node": {n.Node}}, &now); err != nil {
				return nil, notReached(err)
			}
			nodes = append(nodes, now)
		case !n.Gone:
			return nil, fmt.Errorf("%s does not answer: %s", n.Node, n.Error)
		}
	}
	return nodes, nil
}

// plan gives the nodes that are to be restarted, the leader last.
func (r *rollout) plan(all []api.Status, state *rolloutState) (nodes []api.Status, err error) {
	var peers []api.Peer
	for _, s := range all {
		peers = append(peers, api.Peer{Node: s.WireMAC, Name: s.Name})
	}
	only := map[string]bool{}
	for _, name := range state.Only {
		p, err := api.Find(name, peers)
		if err != nil {
			return nil, usageError{err}
		}
		only[p.Node] = true
	}
	for _, s := range all {
		// One that was done is not, if another program is expected meanwhile.
		done := slices.Contains(state.Done, s.WireMAC) && strings.HasPrefix(s.Build, state.Expect)
		if !done && (len(only) == 0 || only[s.WireMAC]) {
			nodes = append(nodes, s)
		}
	}
	slices.SortStableFunc(nodes, func(a, b api.Status) int {
		leads := map[bool]int{true: 1}
		return leads[a.Leader == a.WireMAC] - leads[b.Leader == b.WireMAC]
	})
	if len(nodes) == 0 && len(state.Done) == 0 {
		return nil, errors.New("there is no node to restart")
	}
	return nodes, nil
}

// allAreWell waits a little for the cluster to come to rest, and says why it is no time
// to restart a node, which is drained for it or is to be well as the others are.
func (r *rollout) allAreWell(ctx context.Context, node string, drained bool) error {
	var why error
	requests := 1
	for deadline := time.Now().Add(20 * time.Second); time.Now().Before(deadline); {
		nodes, err := r.cluster(ctx)
		if why = err; err == nil {
			for _, s := range nodes {
				if lack := lacks(s); lack != "" && !(drained && s.WireMAC == node) {
					if s.WireMAC == node {
						why = fmt.Errorf("it is not well before it is restarted: %s", lack)
					} else {
						why = fmt.Errorf("no time to take a node out: %s: %s", nodeName(s), lack)
					}
				}
			}
			if why == nil && len(nodes) < 2 {
				why = errors.New("there is no other node that could serve meanwhile")
			}
		}
		if why == nil || ctx.Err() != nil {
			return errors.Join(why, ctx.Err())
		}
		requests = max(requests, 1+len(nodes)) // of one that failed it is not known
		breathe(ctx, requests)
	}
	return why
}

// lacks says what a node lacks that serves as it should; empty: nothing.
func lacks(s api.Status) string {
	switch self := selfIn(&s); {
	case s.Drain.Aside:
		return "it stands aside in directed mode: clonectl reboot it by itself, when what it boots can do its part"
	case s.Drain.Draining:
		return "it is drained"
	case s.State != "serving":
		return "it is " + s.State
	case len(s.Unwell) > 0:
		return "unwell: " + s.Unwell[0]
	case s.Fenced:
		return "it takes no new connections, as another node may not know of it"
	case !s.Agreed:
		return "not all nodes go by its map"
	case self.Buckets < fairShare(s)*9/10:
		return fmt.Sprintf("it has %d buckets of the %d that are its share", self.Buckets, fairShare(s))
	}
	return ""
}

// fairShare is how many buckets a node's weight gives it. With balance by load nodes
// begin with it, and may have less later.
func fairShare(s api.Status) int {
	total := 0
	for _, m := range s.Members {
		if m.State == "serving" && m.Live && !m.Unwell {
			total += m.Weight
		}
	}
	if total == 0 || s.Balance == "load" {
		return 1
	}
	return filter.Buckets * selfIn(&s).Weight / total
}

// breathe waits until a look with so many requests can be made again, of which a node
// answers 50 in a second.
func breathe(ctx context.Context, requests int) {
	select {
	case <-ctx.Done():
	case <-time.After(max(300*time.Millisecond, time.Duration(requests)*time.Second/40)):
	}
}

// unknownFor is how long a node goes on as before of which it is not known whether it
// was told to restart, until that counts as no.
const unknownFor = 10 * time.Second

// errNotRestarted says that a node goes on as before.
var errNotRestarted = errors.New("it goes on as before")

// node drains a node, restarts it, and waits until it is back. What has been given up
// before the restart is undone.
func (r *rollout) node(ctx context.Context, s api.Status) error {
	of := url.Values{"node": {s.WireMAC}}
	order := api.Order{Reason: r.reason}
	// One that cannot be restarted is not drained.
	var boot api.Boot
	if err := r.c.Get(ctx, "/v1/boot", of, &boot); err != nil {
		if e := (*api.Error)(nil); errors.As(err, &e) && e.Code == http.StatusNotFound {
			return fmt.Errorf("%s cannot be restarted from here: %w. On a host of your own: upgrade the package there, \"cloned drain --wait 5m\", \"systemctl restart cloned\"", nodeName(s), err)
		}
		return notReached(err)
	}
	// What is undone goes by what it is now, and not when the rollout was planned.
	if err := r.c.Get(ctx, "/v1/status", of, &s); err != nil {
		return notReached(err)
	}
	r.say(s, "drain", "drains, %s", plural(s.Drain.Flows, "connection"))
	begin := time.Now()
	var draining api.Status
	err := r.c.Post(ctx, "/v1/drain", of, order, &draining)
	if err == nil {
		draining, err = awaitDrained(ctx, r.c, draining, r.wait)
		if coded := (codedError{}); r.force && errors.As(err, &coded) {
			r.say(s, "drain", "%s left", plural(draining.Drain.Flows, "connection"))
			err = nil
		}
	}
	if err == nil && r.careful {
		// That may have taken long. And of two rollouts that have drained a node each at
		// the same time, none has come by here that does not see the other's.
		err = r.allAreWell(ctx, s.WireMAC, true)
	}
	if err != nil {
		return r.undo(ctx, s, err)
	}
	ordered := time.Now()
	lost := r.c.Post(ctx, "/v1/reboot", of, order, &draining)
	switch {
	case lost == nil:
		r.say(s, "reboot", "restarts, after %v", time.Since(begin).Round(100*time.Millisecond))
	case refused(lost):
		return r.undo(ctx, s, lost)
	default:
		r.say(s, "reboot", "may restart, which is looked at: %v", lost)
	}
	back, err := r.await(ctx, s, ordered, lost != nil)
	if errors.Is(err, errNotRestarted) {
		return r.undo(ctx, s, fmt.Errorf("%s: %w, after the order to restart got no answer: %w", nodeName(s), err, lost))
	} else if err != nil {
		return err
	}
	r.say(s, "done", "is back after %v, with %s and program %s", time.Since(ordered).Round(100*time.Millisecond), plural(selfIn(&back).Buckets, "bucket"), back.Build)
	return nil
}

// refused reports whether an error of an order says that it is not followed. Without an
// answer, or with one that only says that there was none, it may be.
func refused(err error) bool {
	e := (*api.Error)(nil)
	return errors.As(err, &e) && (e.Code < 500 || e.Code == http.StatusServiceUnavailable)
}

// undo has a node take part again whose restart was not ordered, unless it was drained
// before.
func (r *rollout) undo(ctx context.Context, s api.Status, why error) error {
	if s.Drain.Draining {
		r.say(s, "failed", "stays drained, as it was before, and was not restarted")
		return why
	}
	last, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
	defer cancel()
	var now api.Status
	if err := r.c.Post(last, "/v1/resume", url.Values{"node": {s.WireMAC}}, api.Order{Reason: "it is not restarted after all"}, &now); err != nil {
		r.say(s, "failed", "may still be drained: clonectl resume %s", nodeName(s))
		return errors.Join(why, err)
	}
	r.say(s, "failed", "takes part again, and was not restarted")
	return why
}

// await waits until a node that was told to restart serves again as it should; if it is
// unknown whether it was told, until it is clear that it does not (errNotRestarted).
func (r *rollout) await(ctx context.Context, s api.Status, ordered time.Time, unknown bool) (api.Status, error) {
	lack, silent := "it has not answered since", ordered
	for time.Since(ordered) < r.timeout {
		var now api.Status
		ask, cancel := context.WithTimeout(ctx, 5*time.Second)
		err := r.c.Get(ask, "/v1/status", url.Values{"node": {s.WireMAC}}, &now)
		cancel()
		switch {
		case ctx.Err() != nil && unknown:
			r.say(s, "failed", "restarts, or stays drained: clonectl status; clonectl resume %s", nodeName(s))
			return now, ctx.Err()
		case ctx.Err() != nil:
			r.say(s, "failed", "restarts, and takes part by itself when it is up: clonectl status")
			return now, ctx.Err()
		case err != nil:
			silent = time.Now()
		case now.UptimeSec >= time.Since(ordered).Seconds():
			lack = "its machine has not restarted yet"
			if goesOn := now.State == "serving" || now.State == "draining"; !goesOn {
				silent = time.Now() // on its way down
			}
			if unknown && time.Since(silent) > min(unknownFor, r.timeout/2) {
				return now, errNotRestarted
			}
		default:
			if lack = lacks(now); lack == "" && now.Build == "" {
				lack = "it does not say yet what program it runs"
			}
			if now.Build != "" && r.expect != "" && !strings.HasPrefix(now.Build, r.expect) {
				return now, fmt.Errorf("%s came back with program %s; want %s", nodeName(s), now.Build, r.expect)
			}
			if lack == "" {
				r.expect = now.Build
				return now, nil
			}
		}
		if took := time.Since(ordered); took > 2*time.Second {
			r.p.Status("%s: %s, for %v", nodeName(s), lack, took.Round(time.Second))
		}
		breathe(ctx, 1)
	}
	return s, fmt.Errorf("%s is not back after %v: %s", nodeName(s), r.timeout, lack)
}
