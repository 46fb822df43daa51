package evaluation

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"clonecluster/netcore/webstone"
)

// Document is the report's name.
const Document = "evaluation.md"

// A group is what is drawn together.
type group struct {
	name, title, what string
	setups            []Setup
}

// groups are those of which something was measured.
func (r *Report) groups() (groups []group) {
	all := []group{
		{name: "nodes", title: "More nodes", what: "One server without a cluster, and clusters of more and more nodes, byRandom."},
		{name: "policies", title: "The policies", what: "What was published, again: one server, and two nodes by each policy."},
		{name: "uneven", title: "Uneven nodes", what: "One node has half of the processor that the others have."},
		{name: "ways", title: "Other ways", what: "As many machines of the same quota, used in other ways. One of those behind haproxy and nginx is the dispatcher, so they have one server less."},
	}
	most := 0
	for _, s := range r.setups() {
		if s.Way == HAProxy || s.Way == NGINX {
			most = max(most, s.Machines)
		}
	}
	for _, s := range r.setups() {
		if s.Bystander {
			continue
		}
		plain := s.Way == Plain
		ours := s.Way == Clone
		for i, in := range []bool{
			plain || ours && s.Policy == "byRandom" && !s.Uneven,
			plain || ours && s.Machines == 2 && !s.Uneven,
			s.Uneven,
			plain || s.Machines == most && !s.Uneven && (!ours || s.Policy == "byRandom"),
		} {
			if in {
				all[i].setups = append(all[i].setups, s)
			}
		}
	}
	for _, g := range all {
		if len(g.setups) > 1 {
			groups = append(groups, g)
		}
	}
	return groups
}

// Files are the report and its drawings, by their names.
func (r *Report) Files() (map[string][]byte, error) {
	if len(r.Runs) == 0 && len(r.Failovers) == 0 {
		return nil, fmt.Errorf("the results have no run")
	}
	files := map[string][]byte{}
	files[Document] = r.markdown(files)
	return files, nil
}

func (r *Report) markdown(files map[string][]byte) []byte {
	var b strings.Builder
	say := func(format string, args ...any) { fmt.Fprintf(&b, format+"\n", args...) }
	p := r.Plan
	say("# Evaluation")
	say("")
	say("The published experiment, done again: WebStone's load on one server, on clusters, and on what else there is to share a load.")
	say("Measured by `make evaluation` on %s on %s, %d processors, Linux %s; written from its results, build/evaluation.json,", r.Date, cmp.Or(r.Machine, "a processor without a name"), r.Processors, r.Kernel)
	say("by `clonectl bench --report build/evaluation.json`. %s", versions(r.Versions))
	say("")
	say("## What was measured, and what that is worth")
	say("")
	say("- Every machine is a network namespace whose programs may take %.1f %% of a processor (%.1f ms in each %.0f ms), so that one is", 100*p.Quota, p.Quota*p.PeriodMS, p.PeriodMS)
	say("  full long before this real machine is; a machine at half speed has as much in twice the time. Nothing is scaled by arithmetic. Cables are veth, the switch is a Linux bridge.")
	say("- %s", r.Accounting)
	for _, w := range slices.Sorted(maps.Keys(p.Quotas)) {
		say("- For the workload %s a machine may take %.1f %%: more fits into the real one, as its clients and its network take less for each second of a server.", w, 100*p.Quotas[w])
	}
	say("- A node's engine, and a dispatcher, live on the same quota as the web server would. The server is nginx with one process;")
	say("  files are in memory. Every request has its own connection (HTTP/1.0) unless it says keep-alive.")
	say("- The published server answered a request each 770 µs at its best, one of today takes 60 µs for a file from its memory, and the network")
	say("  takes what it takes. So the same files are asked for *over TLS*, as they would be today, with a full handshake for each request, which")
	say("  is work: a certificate of RSA, %d bits, TLS 1.3, no session resumed. What that takes is in a table below. It shows what a cluster is worth to", CertificateBits)
	say("  servers that do some work, files from memory what it is worth to those that do hardly any. haproxy passes TLS through to the servers.")
	say("- The load of a node, which byLoad goes by, is that of its quota: its engine sees a /proc/stat of its own, as in a container")
	say("  with lxcfs. That of the real machine says nothing about one of its namespaces.")
	say("- The clients are one program (`clonectl bench`) with no quota. Its share of the processors is in the tables, as is what the")
	say("  machine had left (*idle*): where that is less than %.2f processors, or others took more than %.2f, or where by Little's law", leastIdle, mostOthers)
	say("  not all clients had a request under way, the run is marked † and judges nothing.")
	say("- Others share the hardware below a virtual machine, and may make one of its processors slower by a third for minutes. So machines are kept on one processor, the")
	say("  fastest, if they all fit into %.1f of it and are %d at most (a bystander comes on top), and otherwise on as many as there are, in turn. Machines on one processor take turns", onePart, mostOnOne)
	say("  in its caches, which a lone server has for itself. The clients run where there is room, also on a slow processor: those of many machines, which need")
	say("  all to be fast, take less for a request. Where a processor that machines were on was slower right")
	say("  before or right after than %.0f %% of what one was at its best (in signatures of RSA), the run is marked †, too.", 100*leastPace)
	say("- A cluster is that of config/demo.yaml, with `detect: relaxed` as for emulated machines (a beacon each third of a second, which takes a machine")
	say("  with so small a part of a processor as much as ten a second take a real one), the policy that is named, and a health check by TCP. The datapath is bpf.")
	say("  For fail-over it is `detect: normal` or what is named, and each machine has a quarter of a processor.")
	say("- A network card keeps what comes for up to %.3g ms before it interrupts, once for all of it: to a machine with so small a part of a processor", p.ModerationMS)
	say("  that is what a tenth of it is to a whole one, and to be woken more often would be most of what it does.")
	if p.Settle > 0 {
		say("- Of uneven nodes byLoad has %.0f s of requests at a rate before it is measured. *At a rate* comes first, then the closed loops.", p.Settle)
	}
	say("- Programs of the lowest priority keep the processors from sleeping meanwhile: a virtual machine's would be given away between two slices of a quota. What they take counts as *idle*.")
	say("- Each run is %.3g s of warm-up, and %.3g s that count (over TLS the warm-up is twice as long or more; with 2000 clients three times, and half as much again counts), in %d rounds. Figures are medians", p.WarmUp, p.Window, p.Rounds)
	say("  of the rounds, percentiles are those of all requests. A request that takes longer than %.0f s has failed.", p.Timeout)
	say("- What was published was measured on other machines, with an unknown file mix: its runs have about 2 kB for a request. Compare")
	say("  the shapes of the curves, not their heights. Where a published figure is not known, nothing is drawn.")
	say("")
	say("`make evaluation` measures all of it, in less than two hours; interrupted, it goes on where it was when it is called again.")
	say("`EVALUATION_ONLY='2 nodes, byLoad' make evaluation` measures those set-ups anew whose names match that regular expression, which is")
	say("how to repeat the figures of a table or a drawing: the names are in them. `make bench` does a few of them in some minutes. A drawing like these of any web server:")
	say("`clonectl bench URL --workload 2k --svg FILE`.")

	if claims := r.Claims(); len(claims) > 0 {
		say("")
		say("## What it was to show")
		say("")
		say("| | measured | wanted | |")
		say("|---|--:|--:|---|")
		var lost []kind
		for _, c := range claims {
			sign := "≤"
			if c.AtLeast {
				sign = "≥"
			}
			say("| %s | %.2f | %s %.2f | %s |", c.What, c.Value, sign, c.Limit, c.Verdict())
			if strings.HasPrefix(c.Verdict(), doesNotHold) && !slices.Contains(lost, c.kind) {
				lost = append(lost, c.kind)
			}
		}
		if slices.ContainsFunc(claims, Claim.Bounded) {
			say("")
			say("*At most* is what nobody can have who goes that way, *out of reach* what does not hold and comes to nine tenths of that or more. So few clients: where each request goes to one of the servers by")
			say("chance, and clients wait for their answers, some servers have nothing to do. It is what a simulation gives of servers on these quotas, of requests that all take as much as a plain server's,")
			say("and no engine and no network any; where requests differ it is less. A bystander: whoever is on a switch that floods receives the others' frames, and has less left for its")
			say("own. If another's request takes u more of *a bystander*, see below, and one of its own takes a server alone s, m servers have m/(1+(m−1)u/s), though they throw away for nothing what the kernel has")
			say("received. And as many machines as the others have, the dispatcher included, cannot do more than that many times one server's best.")
		}
		if len(lost) > 0 {
			say("")
			say("What does not hold, and why:")
			say("")
			for _, k := range slices.Sorted(slices.Values(lost)) {
				say("- %s", why[k])
			}
		}
	}
	r.sayRequests(say)
	r.sayPublished(say)
	for _, w := range r.workloads() {
		r.sayWorkload(say, w, files)
	}
	r.sayEvents(say)
	r.sayFailovers(say)
	if len(r.Rest) > 0 {
		say("")
		say("## At rest")
		say("")
		say("What the busiest machine of a set-up takes when nobody asks. It is a part of its quota that a real machine, which has a whole")
		say("processor or more, would not miss; here it is one of the reasons why machines of a cluster do less than a server alone.")
		say("")
		say("| set-up | of a processor | of the quota of %.1f %% |", 100*r.Plan.Quota)
		say("|---|--:|--:|")
		for _, name := range slices.Sorted(maps.Keys(r.Rest)) {
			say("| %s | %.2f %% | %.0f %% |", name, 100*r.Rest[name], 100*r.Rest[name]/r.Plan.Quota)
		}
	}
	if len(r.Missing) > 0 {
		say("")
		say("## Not measured")
		say("")
		for _, name := range slices.Sorted(maps.Keys(r.Missing)) {
			say("- %s: %s", name, r.Missing[name])
		}
	}
	if len(r.Configs) > 0 {
		say("")
		say("## The others' configurations")
		for _, name := range slices.Sorted(maps.Keys(r.Configs)) {
			say("")
			say("%s:", name)
			say("")
			say("```\n%s\n```", strings.TrimSpace(r.Configs[name]))
		}
	}
	return []byte(b.String())
}

// sayRequests says what a request takes of all machines, and so what another node's takes of one.
func (r *Report) sayRequests(say func(string, ...any)) {
	begun := false
	for _, w := range r.workloads() {
		var alone float64
		for _, s := range r.setups() {
			ps := r.points(s, w, false)
			// With the most clients that were published: nobody waits for work then.
			i := slices.IndexFunc(ps, func(p *Point) bool { return p.Clients == slices.Max(webstone.PublishedClients()) })
			if i < 0 || ps[i].Request == 0 {
				continue
			}
			p := ps[i]
			if !begun {
				begun = true
				say("")
				say("## What a request takes")
				say("")
				say("Of the processors, in microseconds, with %d clients: of all machines together, at rest and in the kernel included, and of the clients, the", p.Clients)
				say("switch's copies of their frames included. *Another's* is what a node does for a request that another node answers: what a request takes beyond that of a")
				say("plain server, divided by the other nodes. In it is what an engine does at rest. For *a bystander* it is what each request takes a machine that has nothing to do with")
				say("the cluster, and no engine, by being on the same switch; what it takes to be woken at all is in it.")
				say("")
				say("| set-up | workload | machines | clients | another's |")
				say("|---|---|--:|--:|--:|")
			}
			if s.Way == Plain {
				alone = p.Request
			}
			another := "–"
			if (s.Way == Clone || s.Way == XtCluster) && s.Machines > 1 && alone > 0 {
				another = fmt.Sprintf("%.0f", 1e6*(p.Request-alone)/float64(s.Machines-1))
			}
			if s.Bystander && p.Aside > 0 {
				another = fmt.Sprintf("%.1f", 1e6*p.Aside)
			}
			say("| %s%s | %s | %.0f | %.0f | %s |", s, dagger(p.Disturbed), w, 1e6*p.Request, 1e6*p.Generator/p.Rate, another)
		}
	}
}

// sayPublished says what follows from what was published.
func (r *Report) sayPublished(say func(string, ...any)) {
	one, two := webstone.PublishedOne[0], webstone.PublishedTwo[0]
	// In a closed loop a client has one request under way: clients = rate × response time.
	const octets = 2000
	rate := func(mbit float64) float64 { return mbit * 1e6 / 8 / octets }
	response := func(p webstone.Published) float64 { return 1e3 * float64(p.Clients) / rate(p.Mbit) }
	say("")
	say("## What was published, and why two were slower than one")
	say("")
	say("Before the single machine was full it was faster than two: with %d clients %.2f Mbit/s, two had %.2f. If a request is 2 kB, as it is on", one.Clients, one.Mbit, two.Mbit)
	say("average in these runs, that is %.0f and %.0f requests a second, and since each client waits for its answer before it asks again, answers took", rate(one.Mbit), rate(two.Mbit))
	say("%.0f ms and %.0f ms: %.0f ms more. Two machines that are not full have no reason to be slower but what they do besides serving: each receives", response(one), response(two), response(two)-response(one))
	say("the frames of the other's requests, too, and has to look at each to discard it, and whatever decides that looks at its own. At %.0f requests a", rate(one.Mbit))
	say("second one machine had %.0f µs for each, so that was dear. More than that cannot be derived from what is known of it.", 1e6/rate(one.Mbit))
	say("The same comparison here is the first of the claims, and what discarding takes is in the table before.")
	say("")
	say("Beyond that the single machine collapsed, to %.2f Mbit/s with %d clients, and two did not. Whether the one here does with so", webstone.PublishedOne[2].Mbit, webstone.PublishedOne[2].Clients)
	say("many clients is in the tables below. Where one does not collapse, two can be worth twice as much at most; there they were worth more.")
	say("With %d clients byRandom had %.2f Mbit/s and byLoad %.2f: with even machines there is nothing to be gained by following the load.", webstone.PublishedByLoad[0].Clients, webstone.PublishedByRandom[0].Mbit, webstone.PublishedByLoad[0].Mbit)
}

func (r *Report) sayWorkload(say func(string, ...any), name string, files map[string][]byte) {
	title := name
	if w, _, err := workload(name); err == nil {
		title = w.Title
	}
	say("")
	say("## %s", title)
	for _, g := range r.groups() {
		var lines []Line
		var points [][]*Point
		for _, s := range g.setups {
			ps := r.points(s, name, false)
			if len(ps) == 0 {
				continue
			}
			l := Line{Name: s.String()}
			for _, p := range ps {
				// More would press what was published into a corner; they are in the table.
				if p.Clients <= slices.Max(webstone.PublishedClients()) {
					l.Points = append(l.Points, LinePoint{p.Clients, p.Mbit, p.Total.Latency.Mean().Seconds()})
				}
			}
			lines, points = append(lines, l), append(points, ps)
		}
		if len(lines) == 0 || len(lines) == 1 && g.name != "nodes" {
			continue
		}
		drawing := fmt.Sprintf("evaluation-%s-%s.svg", strings.ReplaceAll(name, " ", "-"), g.name)
		files[drawing] = Drawing(g.title+": "+title, lines)
		say("")
		say("### %s", g.title)
		say("")
		say("%s", g.what)
		say("")
		say("![%s](%s)", g.title, drawing)
		say("")
		say("Throughput in Mbit/s, and the mean response time in seconds:")
		say("")
		header, rule := "| clients |", "|--:|"
		for _, l := range lines {
			header, rule = header+" "+l.Name+" |", rule+"--:|"
		}
		say("%s\n%s", header, rule)
		for _, n := range r.clients() {
			row, any := fmt.Sprintf("| %d |", n), false
			for _, ps := range points {
				cell := "–"
				for _, p := range ps {
					if p.Clients == n {
						cell, any = fmt.Sprintf("%.2f / %.3f%s", p.Mbit, p.Total.Latency.Mean().Seconds(), dagger(p.Disturbed)), true
					}
				}
				row += " " + cell + " |"
			}
			if any {
				say("%s", row)
			}
		}
	}
	say("")
	say("### All figures")
	say("")
	say("Times in milliseconds. *Load* is Little's: what was under way on average. *Generator* and *idle* are processors. *Full* is how many")
	say("of the machines took all that they may.")
	for _, keep := range []bool{false, true} {
		r.sayAll(say, name, keep)
	}
}

func (r *Report) sayAll(say func(string, ...any), name string, keep bool) {
	begun := false
	for _, s := range r.setups() {
		for _, p := range r.points(s, name, keep) {
			if !begun {
				begun = true
				if keep {
					say("")
					say("With keep-alive:")
				}
				say("")
				say("| set-up | clients | Mbit/s | requests/s | mean | p50 | p90 | p99 | p99.9 | max | load | errors | generator | idle | full |")
				say("|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|---|--:|--:|--:|")
			}
			say("%s", p.row())
		}
	}
}

func (p *Point) row() string {
	l := &p.Total.Latency
	ms := func(d time.Duration) string { return fmt.Sprintf("%.1f", float64(d.Microseconds())/1e3) }
	return fmt.Sprintf("| %s%s | %d | %.2f (%.2f–%.2f) | %.1f | %s | %s | %s | %s | %s | %s | %.1f | %s | %.2f | %.2f | %d |", p.Setup, dagger(p.Disturbed), p.Clients,
		p.Mbit, p.Least, p.Most, p.Rate, ms(l.Mean()), ms(l.Quantile(.5)), ms(l.Quantile(.9)), ms(l.Quantile(.99)), ms(l.Quantile(.999)), ms(l.Max()),
		p.Total.Load(), Errors(p.Total), p.Generator, p.Idle, p.Full)
}

// sayEvents are the runs that are in no closed loop, or in which a server was lost.
func (r *Report) sayEvents(say func(string, ...any)) {
	seen := map[Run]bool{}
	for _, m := range r.Runs {
		if m.Share == 0 && !m.Kill || seen[m.Run] {
			continue
		}
		if len(seen) == 0 {
			say("")
			say("## At a rate, and with a server killed")
			say("")
			say("Requests that begin at a rate, whatever becomes of those before: their time counts from when they should have begun. *Killed* is")
			say("a server whose power was cut after a third of the time, and given back after two thirds.")
			say("")
			say("*Rate* is in requests a second, and in what one plain server had at best; *clients* how many could be under way.")
			say("")
			say("| run | rate | set-up | clients | Mbit/s | requests/s | mean | p50 | p90 | p99 | p99.9 | max | load | errors | generator | idle | full |")
			say("|---|--:|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|---|--:|--:|--:|")
		}
		seen[m.Run] = true
		if p := r.point(m.Run); p != nil {
			what := m.Workload
			if m.Kill {
				what += ", killed"
			}
			rate := "–"
			if m.Share > 0 {
				rate = fmt.Sprintf("%.0f = %.1f ×", m.Result.Rate, m.Share)
			}
			say("| %s | %s %s", what, rate, p.row())
		}
	}
}

func (r *Report) sayFailovers(say func(string, ...any)) {
	if len(r.Failovers) == 0 {
		return
	}
	say("")
	say("## Fail-over")
	say("")
	say("The power of a server is cut (the active one of keepalived's two). A connection is tried every 5 ms and given up after 50 ms: the")
	say("time is from the cut to the beginning of the last one that failed before fifty that did not. Of a cluster's two nodes only half of the connections are concerned.")
	say("")
	say("| | trials | median s | least | most |")
	say("|---|--:|--:|--:|--:|")
	for _, f := range r.Failovers {
		if len(f.Seconds) == 0 {
			say("| %s | 0: %s | | | |", f.Way, cmp.Or(f.Why, "none"))
			continue
		}
		say("| %s | %d | %.3f | %.3f | %.3f |", f.Way, len(f.Seconds), median(f.Seconds), slices.Min(f.Seconds), slices.Max(f.Seconds))
	}
}

func dagger(disturbed bool) string {
	if disturbed {
		return " †"
	}
	return ""
}

func versions(v map[string]string) string {
	var all []string
	for _, name := range slices.Sorted(maps.Keys(v)) {
		all = append(all, name+" "+v[name])
	}
	if len(all) == 0 {
		return ""
	}
	return "With " + strings.Join(all, ", ") + "."
}
