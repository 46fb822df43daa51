package evaluation

import (
	"time"

	"clonecluster/netcore/webstone"
)

// Policies are those of a clone cluster.
var policies = []string{"byRandom", "byLoad", "bySource"}

// Full is the plan of "make evaluation": an hour (TestPlans adds it up).
//
// A request of the 2 kB file takes about 60 µs of a server and 100 µs of the clients, with
// eight machines 170 µs, as the switch's copies of each frame are made in the clients' time. So
// eight machines with 6 % of a processor each, full, take 0.48 processors and have the clients
// take 1.3: 1.8 of two. One machine answers some thousand requests in a run then. A page that
// is work takes more than a millisecond of a server and little of the clients, so machines may take more there.
func Full() Plan {
	p := Plan{Quota: 0.06, Quotas: map[string]float64{webstone.Page.Name: 0.17}, PeriodMS: 20, ModerationMS: 1, WarmUp: 0.5, Window: 1.4, Settle: 25, Timeout: 10, Rounds: 2, Failovers: 5}
	setups := []Setup{{Way: Plain, Machines: 1}, {Way: Clone, Machines: 1, Policy: "byRandom"}}
	for _, n := range []int{2, 4, 8} {
		for _, policy := range policies {
			setups = append(setups, Setup{Way: Clone, Machines: n, Policy: policy})
		}
	}
	for _, policy := range policies[:2] {
		setups = append(setups, Setup{Way: Clone, Machines: 4, Policy: policy, Uneven: true})
	}
	for _, way := range []string{XtCluster, HAProxy, NGINX} {
		setups = append(setups, Setup{Way: way, Machines: 4})
	}
	for _, s := range setups {
		// At rates that four machines can serve, of which one of half the speed cannot serve its
		// fourth: first, so that shares that follow the load have something to go by. Where all are
		// full, and clients wait for their answers, the loads are all the same.
		if s.Machines == 4 && s.Policy != "bySource" {
			for _, w := range []struct {
				workload webstone.Workload
				shares   []float64
			}{{webstone.Small, []float64{0.8, 1.1, 1.4}}, {webstone.Page, []float64{2.2, 2.6}}} {
				for _, share := range w.shares {
					p.Runs = append(p.Runs, Run{Setup: s, Workload: w.workload.Name, Clients: 1000, Share: share})
				}
			}
		}
		for _, w := range []webstone.Workload{webstone.Small, webstone.Standard} {
			for _, n := range append(webstone.PublishedClients(), 2000) {
				p.Runs = append(p.Runs, Run{Setup: s, Workload: w.Name, Clients: n})
			}
		}
		if s.Policy != "bySource" && (s.Way != Clone || s.Machines > 1) {
			for _, n := range []int{10, 50, 110, 200, 500} {
				p.Runs = append(p.Runs, Run{Setup: s, Workload: webstone.Page.Name, Clients: n})
			}
		}
		if s.Way == Clone && s.Machines == 4 && !s.Uneven {
			p.Runs = append(p.Runs, Run{Setup: s, Workload: webstone.Small.Name, Clients: 110, Kill: true})
		}
	}
	return p
}

// Short is that of "make bench": some minutes, and too few rounds to judge.
func Short() Plan {
	p := Full()
	p.Rounds, p.Failovers = 1, 2
	var few []Run
	for _, r := range p.Runs {
		if (r.Workload == webstone.Small.Name || r.Workload == webstone.Page.Name && r.Clients == 200) && (r.Machines <= 2 || r.Machines == 4 && r.Policy != "bySource") && (r.Clients == 10 || r.Clients == 110 || r.Clients == 200 || r.Uneven && r.Share > 0) {
			few = append(few, r)
		}
	}
	p.Runs = few
	return p
}

// What there is to a run besides its times, to a set-up that is built, and to a fail-over.
const (
	runTakes      = 300 * time.Millisecond
	setupTakes    = 10 * time.Second // with a rest and until it is calm
	failoverTakes = 12 * time.Second
)

// Takes is about how long a plan takes, less what is done already.
func (p *Plan) Takes(r *Report) (all time.Duration) {
	for round := range p.Rounds {
		built := map[Setup]bool{}
		for _, run := range p.Runs {
			if r.Missing[run.Setup.String()] != "" || r.has(run, round) {
				continue
			}
			if !built[run.Setup] {
				built[run.Setup] = true
				all += setupTakes + p.settle(run.Setup)
			}
			warmUp, window := p.Times(run)
			all += warmUp + window + runTakes
		}
	}
	for _, way := range failoverWays {
		all += time.Duration(max(0, p.Failovers-len(r.failover(way)))) * failoverTakes
	}
	return all
}
