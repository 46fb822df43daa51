package engine_test

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"clonecluster/config"
	"clonecluster/netcore/engine"
	"clonecluster/netcore/filter"
	"clonecluster/netcore/netnstest"
)

func init() { netnstest.Register("cloned-forced", clonedForced) }

// Signals by which the engine of clonedForced is told to own every bucket,
// whatever the protocol says.
const (
	forceShared  = syscall.SIGUSR1 // and to swallow pure resets, as in any bucket that others may hold flows in
	forceSettled = syscall.SIGUSR2 // and not to
	// forceNothing ends it, as a node gives buckets up: it may hold flows there.
	forceNothing = syscall.SIGHUP
	// forceWary has it look every segment up that it owns, as if others might hold flows.
	forceWary = syscall.SIGWINCH
)

// clonedForced is cloned with a hand in its table.
func clonedForced(args []string) int {
	file, socket, path, bpffs := args[0], args[1], args[2], args[3]
	cfg, err := config.LoadFile(file)
	if err != nil {
		fmt.Println(err)
		return 1
	}
	var force atomic.Pointer[func(*filter.Table)]
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, forceShared, forceSettled, forceNothing, forceWary)
	go func() {
		for s := range signals {
			change, name := all(filter.Shared), "shared"
			switch s {
			case forceSettled:
				change, name = all(filter.Settled), "settled"
			case forceNothing:
				change, name = giveUp, "nothing"
			case forceWary:
				change, name = wary, "wary"
			}
			force.Store(&change)
			fmt.Println("forcing", name)
		}
	}()
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	err = engine.Run(ctx, engine.Options{
		Config: cfg, Interface: "eth0", StatusSocket: socket, Drain: -1, Datapath: path, BPFFS: bpffs,
		Logger: slog.New(slog.NewTextHandler(os.Stderr, nil)),
		Intercept: func(t *filter.Table) {
			if change := force.Load(); change != nil {
				(*change)(t)
			}
		},
	})
	if err != nil {
		fmt.Println(err)
		return 1
	}
	return 0
}

func all(state filter.State) func(*filter.Table) {
	return func(t *filter.Table) {
		for b := range t {
			t[b] = state
		}
	}
}

func wary(t *filter.Table) {
	for b := range t {
		if t[b] == filter.Settled {
			t[b] = filter.Shared
		}
	}
}

func giveUp(t *filter.Table) {
	for b := range t {
		if t[b] == filter.Foreign {
			t[b] = filter.Draining
		}
	}
}

// TestFigureForcedDoubleOwnership forces two nodes to own every bucket for a
// second, so that both answer every SYN. Where pure resets are swallowed no
// connection breaks; where the test has switched that rule off many do, which
// shows that it is the rule that helps.
func TestFigureForcedDoubleOwnership(t *testing.T) {
	for _, tt := range []struct {
		name   string
		force  syscall.Signal
		breaks bool
	}{{"resets swallowed", forceShared, false}, {"resets let out", forceSettled, true}} {
		t.Run(tt.name, func(t *testing.T) {
			f := newFailover(t, 3, patient)
			for _, n := range f.nodes {
				n.StartHTTP()
				n.cloned = n.Start("cloned-forced", f.config, n.status, n.datapath, f.BPFFS())
			}
			f.own(f.nodes...)
			both := f.nodes[:2]
			sniffer := f.client.Sniff(synFilter)
			d := f.startDownloads(f.client, 40, both...)
			c := f.startCrowd(f.client, 2*time.Millisecond, 1000, 0)
			c.await(20)

			for _, n := range both {
				n.cloned.Signal(tt.force)
				n.cloned.Await(0, "forcing (shared|settled)")
			}
			for _, n := range both {
				n.awaitBuckets(filter.Buckets)
			}
			begin := time.Now()
			time.Sleep(time.Second) // the length of the double ownership is the point
			end := time.Now()
			for _, n := range both {
				n.cloned.Signal(forceNothing)
				n.cloned.Await(0, "forcing nothing")
			}
			f.own(f.nodes...)
			c.await(50)
			all := c.end()
			if !tt.breaks {
				d.mustGoOn("after a second of double ownership")
				f.mustSucceed(all)
			}
			s := readSYNs(t, sniffer.Stop())
			broken := len(all.failed())
			t.Logf("%s: of %d connections opened in %v of double ownership, %d SYNs were answered by two nodes; %d requests failed and %d of %d downloads broke",
				tt.name, len(all.touching(begin, end)), end.Sub(begin).Round(time.Millisecond), s.twice, broken, d.countBroken(), len(d.all))
			if s.twice < 50 {
				t.Errorf("%d SYNs were answered by two nodes; want many: the ownership was not double", s.twice)
			}
			if tt.breaks && broken+d.countBroken() == 0 {
				t.Error("without the rule nothing broke: this test would not notice its loss")
			}
		})
	}
}
