package evaluation

import (
	"strings"
	"time"

	"clonecluster/netcore/webstone"
)

// Policies are those of a clone cluster.
var policies = []string{"byRandom", "byLoad", "bySource"}

// overTLS ends the names of workloads whose requests have a TLS connection of their own each.
const overTLS = " over TLS"

// The workloads: what was published asked for files from memory, which took a server 770 µs then and
// takes 60 µs today. With a handshake each of TLS a request of today takes a server more than that.
var (
	smallTLS    = webstone.Small.Name + overTLS
	standardTLS = webstone.Standard.Name + overTLS
)

// CertificateBits is of the key of RSA that the servers sign with in a handshake.
const CertificateBits = 4096

// Full is the plan of "make evaluation": an hour and some minutes (TestPlans adds it up), another fifteen for what is built and repeated, and as much or more of waiting where others share the hardware.
//
// A request of the 2 kB file takes about 60 µs of a server and 100 µs of the clients, with
// eight machines 170 µs, as the switch's copies of each frame are made in the clients' time. So
// eight machines with 6 % of a processor each, full, take 0.48 processors and have the clients
// take 1.3: 1.8 of two. One machine answers some thousand requests in a run then. Over TLS a request takes
// five milliseconds of a server, and one of the clients, so machines may take more there.
//
// A network card that interrupts for each frame would take most of so small a part of a processor: to wake a
// thread took 40 µs here, each millisecond 4 % of a processor. Where a machine has a tenth of one, 4 ms are what 0.4 ms are to a whole one.
func Full() Plan {
	p := Plan{Quota: 0.06, Quotas: map[string]float64{smallTLS: 0.19, standardTLS: 0.19}, PeriodMS: 20, ModerationMS: 4, WarmUp: 0.5, Window: 2.8, Settle: 25, Timeout: 10, Rounds: 2, Failovers: 5}
	setups := []Setup{{Way: Plain, Machines: 1}, {Way: Clone, Machines: 1, Policy: "byRandom"}}
	for _, n := range []int{2, 4, 8} {
		for _, policy := range policies {
			setups = append(setups, Setup{Way: Clone, Machines: n, Policy: policy})
		}
	}
	for _, policy := range policies[:2] {
		setups = append(setups, Setup{Way: Clone, Machines: 4, Policy: policy, Uneven: true})
	}
	for _, n := range []int{2, 4, 8} {
		setups = append(setups, Setup{Way: Clone, Machines: n, Policy: "byRandom", Bystander: true})
	}
	for _, way := range []string{XtCluster, HAProxy, NGINX} {
		setups = append(setups, Setup{Way: way, Machines: 4})
	}
	few := []int{10, 50, 110, 200}
	for _, s := range setups {
		runs := func(workload string, clients ...int) {
			for _, n := range clients {
				p.Runs = append(p.Runs, Run{Setup: s, Workload: workload, Clients: n})
			}
		}
		// At rates that four machines can serve, of which one of half the speed cannot serve its
		// fourth: first, so that shares that follow the load have something to go by. Where all are
		// full, and clients wait for their answers, the loads are all the same.
		if s.Way == Clone && s.Machines == 4 && s.Policy != "bySource" && !s.Bystander {
			for _, share := range []float64{2.2, 2.6} {
				p.Runs = append(p.Runs, Run{Setup: s, Workload: smallTLS, Clients: 1000, Share: share})
			}
		}
		switch {
		case s.Bystander:
			runs(webstone.Small.Name, 200)
			runs(webstone.Standard.Name, 200)
			continue
		case s.Uneven:
			runs(smallTLS, few...)
			continue
		case s.Way == Plain || s.Way == Clone:
			runs(smallTLS, webstone.PublishedClients()...)
			if s.Policy == "bySource" {
				runs(standardTLS, few...)
			} else {
				runs(standardTLS, webstone.PublishedClients()...)
			}
		case s.Way == HAProxy:
			runs(smallTLS, few...)
		}
		if s.Policy == "" || s.Policy == "byRandom" {
			runs(webstone.Small.Name, 10, 30, 50, 110, 200, 2000)
			runs(webstone.Standard.Name, few...)
		}
		if s.Way == Clone && s.Machines == 4 {
			p.Runs = append(p.Runs, Run{Setup: s, Workload: webstone.Small.Name, Clients: 110, Kill: true})
		}
	}
	return p
}

// workload gives one by its name.
func workload(name string) (w webstone.Workload, tls bool, err error) {
	name, tls = strings.CutSuffix(name, overTLS)
	if w, err = webstone.WorkloadNamed(name); tls {
		w.Title += overTLS
	}
	return w, tls, err
}

// Short is that of "make bench": some minutes, and too few rounds to judge.
func Short() Plan {
	p := Full()
	p.Rounds, p.Failovers, p.Window = 1, 2, 1.4
	var few []Run
	for _, r := range p.Runs {
		if r.Bystander { // which never judges
			continue
		}
		if (r.Workload == webstone.Small.Name || r.Workload == smallTLS && r.Clients == 200) && (r.Machines <= 2 || r.Machines == 4 && r.Policy != "bySource") && (r.Clients == 10 || r.Clients == 110 || r.Clients == 200 || r.Uneven && r.Share > 0) {
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
			if r.Missing[run.Setup.String()] != "" || r.at(run, round) != nil {
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
