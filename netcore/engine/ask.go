package engine

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"

	"golang.org/x/sys/unix"
)

// verbs are what can be asked of a running engine: the request of each.
var verbs = map[string]struct{ method, path string }{
	"status": {http.MethodGet, "/v1/status"},
	"drain":  {http.MethodPost, "/v1/drain"},
	"resume": {http.MethodPost, "/v1/resume"},
}

// ErrNotDrained is matched by the error of a drain whose time ran out.
var ErrNotDrained = errors.New("not drained in time")

// ask sends a request to the engine that runs on this machine and prints the
// answer. The result is the exit code.
func ask(ctx context.Context, verb string, args []string, stdout, stderr io.Writer) int {
	flags := flag.NewFlagSet("cloned "+verb, flag.ContinueOnError)
	flags.SetOutput(stderr)
	socket := flags.String("status-socket", DefaultStatusSocket, "`path` of the running engine's socket")
	asJSON := flags.Bool("json", false, "print the status as JSON")
	var wait time.Duration
	if verb == "drain" {
		flags.DurationVar(&wait, "wait", 0, "wait so long for the connections to end; exit code 3 if they do not")
	}
	flags.Usage = func() {
		fmt.Fprintf(stderr, "Usage: cloned %s [flags]\n\nFlags:\n", verb)
		flags.PrintDefaults()
	}
	if err := flags.Parse(args); errors.Is(err, flag.ErrHelp) {
		return 0
	} else if err != nil {
		return 2
	}
	if flags.NArg() > 0 {
		fmt.Fprintf(stderr, "cloned %s: unexpected argument %q\n", verb, flags.Arg(0))
		return 2
	}
	ctx, stop := signal.NotifyContext(ctx, syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	c := &client{socket: *socket}
	s, err := c.do(ctx, verbs[verb].method, verbs[verb].path)
	if err == nil && wait > 0 {
		s, err = c.drained(ctx, wait, stderr)
	}
	switch {
	case errors.Is(err, ErrNotDrained):
		if s.Drain.Owned {
			fmt.Fprintf(stderr, "cloned drain: %v: no other node has taken over\n", err)
		} else {
			fmt.Fprintf(stderr, "cloned drain: %v: %d connections are left\n", err, s.Drain.Flows)
		}
		return 3
	case err != nil:
		fmt.Fprintf(stderr, "cloned %s: %v\n", verb, err)
		return 1
	case *asJSON:
		enc := json.NewEncoder(stdout)
		enc.SetIndent("", "  ")
		_ = enc.Encode(s)
	default:
		printStatus(stdout, &s)
	}
	return 0
}

// client speaks with the engine that has that socket.
type client struct{ socket string }

func (c *client) do(ctx context.Context, method, path string) (s Status, err error) {
	tr := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", c.socket)
	}}
	defer tr.CloseIdleConnections()
	req, err := http.NewRequestWithContext(ctx, method, "http://cloned"+path, nil)
	if err != nil {
		return s, err
	}
	resp, err := (&http.Client{Transport: tr, Timeout: 10 * time.Second}).Do(req)
	switch {
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ECONNREFUSED):
		return s, fmt.Errorf("no engine answers on %s: does cloned run here? (--status-socket names another)", c.socket)
	case errors.Is(err, os.ErrPermission):
		return s, fmt.Errorf("%s may be used by root only", c.socket)
	case err != nil:
		return s, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return s, fmt.Errorf("the engine answers %s", resp.Status)
	}
	if err := json.NewDecoder(io.LimitReader(resp.Body, 4<<20)).Decode(&s); err != nil {
		return s, fmt.Errorf("reading the engine's answer: %w", err)
	}
	return s, nil
}

// drained waits until the node owns nothing and its connections have ended, and
// says now and then how many are left.
func (c *client) drained(ctx context.Context, most time.Duration, progress io.Writer) (s Status, err error) {
	ctx, cancel := context.WithTimeout(ctx, most)
	defer cancel()
	tick := time.NewTicker(200 * time.Millisecond)
	defer tick.Stop()
	for last, said := time.Now(), -1; ; {
		next, err := c.do(ctx, http.MethodGet, "/v1/status")
		if err == nil {
			s = next
		}
		switch {
		case context.Cause(ctx) == context.DeadlineExceeded:
			return s, ErrNotDrained
		case err != nil:
			return s, err
		case !s.Drain.Draining:
			return s, errors.New("somebody has resumed the node")
		case !s.Drain.Owned && s.Drain.Flows == 0:
			return s, nil
		case time.Since(last) > 2*time.Second && s.Drain.Flows != said:
			last, said = time.Now(), s.Drain.Flows
			fmt.Fprintf(progress, "%d connections left\n", said)
		}
		select {
		case <-ctx.Done():
		case <-tick.C:
		}
	}
}

// printStatus writes the status for a person.
func printStatus(w io.Writer, s *Status) {
	fmt.Fprintf(w, "%s on %s (%s), datapath %s by %s, %s\n", s.State, s.NIC, s.WireMAC, s.Datapath, s.Ingress, strings.Join(s.VIP, " "))
	switch {
	case s.Fenced:
		fmt.Fprintln(w, "FENCED: takes no new connections, as another node may not know of this one")
	case s.Drain.Draining && s.Drain.Owned:
		fmt.Fprintln(w, "draining: no other node has taken over yet")
	case s.Drain.Draining:
		fmt.Fprintf(w, "draining: %d connections left\n", s.Drain.Flows)
	}
	fmt.Fprintf(w, "map %d of leader %s, agreed: %v; buckets here: %d settled, %d shared, %d draining\n\n",
		s.Map, s.Leader, s.Agreed, s.Buckets.Settled, s.Buckets.Shared, s.Buckets.Draining)
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "NODE\tSTATE\tBUCKETS\tWEIGHT\tBUSY\tSOCKETS\t")
	for _, m := range s.Members {
		var remarks []string
		for _, r := range []struct {
			on   bool
			text string
		}{{m.Self, "this node"}, {!m.Live, "does not hear this node"}, {m.Unwell, "unwell"}} {
			if r.on {
				remarks = append(remarks, r.text)
			}
		}
		fmt.Fprintf(t, "%s\t%s\t%d\t%d\t%.0f%%\t%d\t%s\n", m.Node, m.State, m.Buckets, m.Weight, 100*m.Busy, m.Flows, strings.Join(remarks, ", "))
	}
	_ = t.Flush()
	for _, f := range s.Findings {
		fmt.Fprintf(w, "\n%s (%v): %s\n  %s\n", f.Code, f.Level, f.What, f.Fix)
	}
}
