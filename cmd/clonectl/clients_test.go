package main

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"clonecluster/qemu/lab/crowd"
	"clonecluster/qemu/nethost"
)

// clients are those of one step.
type clients struct {
	*faults
	t         *testing.T
	ctx       context.Context
	crowd     *crowd.Crowd
	asking    *crowd.Asking
	begin     time.Time
	downloads []*crowd.Download
	broke     []string
}

// clients begin to ask, and to download from every node that runs. They end with
// the step.
func (f *faults) clients(t *testing.T, host *nethost.Host, chatter time.Duration, nodes ...int) *clients {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), stepBound)
	c := &clients{faults: f, t: t, ctx: ctx, begin: time.Now()}
	c.crowd = crowd.New(crowd.Config{Host: host, Switch: f.lab.Switch(), Target: f.target.AddrPort})
	c.asking = c.crowd.Ask(ctx, f.pace)
	t.Cleanup(func() {
		cancel()
		c.asking.Stop()
		for _, d := range c.downloads {
			d.Wait(context.Background()) // at once: their context has ended
		}
		c.crowd.Close()
	})
	for slices.ContainsFunc(nodes, func(i int) bool { return len(c.of(i)) < 2 }) {
		c.download(chatter)
	}
	return c
}

func (c *clients) errorf(format string, args ...any) {
	c.broke = append(c.broke, fmt.Sprintf(format, args...))
}

// end makes what broke an error.
func (c *clients) end() {
	c.t.Helper()
	if len(c.broke) > 0 {
		c.t.Error(strings.Join(c.broke, "\n"))
	}
}

// fatalf is errorf for what nothing can follow.
func (c *clients) fatalf(format string, args ...any) {
	c.t.Helper()
	c.errorf(format, args...)
	c.end()
	c.t.FailNow()
}

// now is the time of an event, which goes to the log.
func (c *clients) now(event string) time.Time {
	now := time.Now()
	c.t.Logf("at %.3fs: %s", now.Sub(c.begin).Seconds(), event)
	return now
}

func (c *clients) download(chatter time.Duration) *crowd.Download {
	c.t.Helper()
	d, err := c.crowd.Download(c.ctx, crowd.DownloadConfig{
		Path: fmt.Sprintf("/bench/%d", downloadSize), Size: downloadSize, Sum: c.sum, Rate: downloadRate, Chatter: chatter,
	})
	if err != nil {
		c.fatalf("%v", err)
	}
	c.downloads = append(c.downloads, d)
	return d
}

// of are the downloads of some nodes.
func (c *clients) of(nodes ...int) []*crowd.Download {
	return slices.DeleteFunc(slices.Clone(c.downloads), func(d *crowd.Download) bool {
		return !slices.ContainsFunc(nodes, func(i int) bool { return c.nodes[i].name == d.Holder() })
	})
}

// until waits for what the clients see.
func (c *clients) until(what string, cond func() bool) {
	c.t.Helper()
	for !cond() {
		if sleep(c.ctx, pollInterval) != nil {
			c.fatalf("waited in vain until %s; last requests: %+v", what, last(c.asking.Requests(), 5))
		}
	}
}

func last(all []crowd.Request, n int) []crowd.Request { return all[max(0, len(all)-n):] }

// untilShared waits until each of the nodes has answered a request that began
// after a time.
func (c *clients) untilShared(since time.Time, nodes ...int) {
	c.t.Helper()
	c.until(fmt.Sprintf("nodes %v share", nodes), func() bool {
		seen := map[string]bool{}
		for _, r := range c.asking.Requests() {
			if r.Err == nil && r.Begin.After(since) {
				seen[r.Node] = true
			}
		}
		return !slices.ContainsFunc(nodes, func(i int) bool { return !seen[c.nodes[i].mac.String()] })
	})
}

// untilTaken waits until no SYN has been lost for some time: others have the share
// of whoever went away.
func (c *clients) untilTaken(since time.Time) {
	c.t.Helper()
	c.until("the others have taken over", func() bool {
		return time.Since(since) > quietTime+c.crowd.Judge(c.asking.Requests(), since, time.Now(), "").Unanswered
	})
}

// judge ends the asking and the downloads of the nodes that were within reach all
// the time, and checks what the clients saw. Requests held by the victim may have
// failed; an empty name means that there is none.
func (c *clients) judge(victim string, steady ...int) {
	c.t.Helper()
	all := c.asking.Stop()
	o := crowd.Judge(all, c.begin, time.Now(), victim)
	c.t.Logf("%d requests answered, %d slow, %d held by the victim; longest gap %v, longest wait for a connection %v; answered twice: %d",
		o.Answered, o.Slow, o.Held, o.LongestGap.Round(time.Millisecond), o.LongestWait.Round(time.Millisecond), len(c.crowd.Doubles()))
	if o.Failed > 0 {
		c.errorf("%d of %d requests failed", o.Failed, o.Total())
	}
	for _, r := range all {
		if r.Err != nil && (victim == "" || r.Attempt.Holder() != victim) {
			t := func(at time.Time) float64 { return at.Sub(c.begin).Seconds() }
			c.errorf("failed: begun at %.3fs, given up at %.3fs, answered by %q: %v", t(r.Begin), t(r.End), r.Attempt.Holders, r.Err)
		}
	}
	if o.LongestWait > waitBound || o.LongestGap > waitBound {
		c.errorf("a request waited %v for its connection, and there was none answered for %v; want at most %v", o.LongestWait, o.LongestGap, waitBound)
	}
	for _, d := range c.of(steady...) {
		if err := c.finish(d); err != nil {
			c.errorf("a download from %s, which was within reach all the time: %v", d.Holder(), err)
		}
	}
	if guard := checkGuard(c.lab.Switch()); !guard.OK {
		c.t.Error(guard)
	}
	c.end()
}

// finish takes the rest of a download: of one after the other, as the nodes have
// other work.
func (c *clients) finish(d *crowd.Download) error {
	ctx, cancel := context.WithTimeout(c.ctx, finishTimeout)
	defer cancel()
	d.Hurry()
	return d.Wait(ctx)
}

// judgeStrictly is for steps in which no SYN may be answered by two nodes, too.
func (c *clients) judgeStrictly(victim string, steady ...int) {
	c.t.Helper()
	if d := c.crowd.Doubles(); len(d) > 0 {
		c.errorf("%d connections were answered by two nodes; first: %+v", len(d), d[0])
	}
	c.judge(victim, steady...)
}
