package evaluation

import (
	"math"

	"clonecluster/netcore/webstone"
)

// Policies are those of a clone cluster.
var policies = []string{"byRandom", "byLoad", "bySource"}

// Full is the plan of "make evaluation": about two hours.
func Full() Plan {
	p := Plan{Quota: 0.05, PeriodMS: 20, WarmUp: 1, Window: 3, Timeout: 10, Rounds: 2, Failovers: 10}
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
		for _, w := range []webstone.Workload{webstone.Small, webstone.Standard} {
			for _, n := range append(webstone.PublishedClients(), 2000) {
				p.Runs = append(p.Runs, Run{Setup: s, Workload: w.Name, Clients: n})
			}
		}
		// At 40, 60 and 80 % of what four machines could do, or of three and a half.
		if s.Machines == 4 && s.Policy != "bySource" {
			of := 4.
			if s.Uneven {
				of = 3.5
			}
			for _, part := range []float64{.4, .6, .8} {
				p.Runs = append(p.Runs, Run{Setup: s, Workload: webstone.Small.Name, Clients: 1000, Share: math.Round(part*of*10) / 10})
			}
		}
		if s.Way == Clone && s.Machines == 4 && !s.Uneven {
			p.Runs = append(p.Runs, Run{Setup: s, Workload: webstone.Small.Name, Clients: 110, Kill: true})
		}
	}
	return p
}

// Short is that of "make evaluation-short": some minutes, and too few rounds to judge.
func Short() Plan {
	p := Full()
	p.Rounds, p.Failovers, p.WarmUp, p.Window = 1, 2, 0.5, 2
	var few []Run
	for _, r := range p.Runs {
		if r.Workload == webstone.Small.Name && (r.Machines <= 2 || r.Machines == 4 && r.Policy != "bySource") && (r.Clients == 10 || r.Clients == 110 || r.Clients == 200 || r.Uneven && r.Share > 0) {
			few = append(few, r)
		}
	}
	p.Runs = few
	return p
}
