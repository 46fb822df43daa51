package bench

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
)

// Markdown gives benchmarks.md. native is what was measured on the patched kernel in a
// guest, and virtio what was measured in one behind NICs of virtio-net; nil if that was not done.
func (r *Report) Markdown(native, virtio *Report) []byte {
	var b strings.Builder
	say := func(format string, args ...any) { fmt.Fprintf(&b, format+"\n", args...) }
	requests := []string{KeepAlive, Connection, Download, Upload}
	table := func(first string, columns []string, rows []string, cell func(way string, column int) string) {
		say("")
		say("| %s | %s |", first, strings.Join(columns, " | "))
		say("|---|%s", strings.Repeat("---|", len(columns)))
		for _, way := range rows {
			var cells []string
			for i := range columns {
				cells = append(cells, cell(way, i))
			}
			say("| %s | %s |", way, strings.Join(cells, " | "))
		}
		say("")
	}
	ratios := func(r *Report, of func(Run) float64) {
		table("", requests, r.ways(requests...), func(way string, i int) string {
			return spread(r.Ratio(way, Plain, requests[i], of), way == Plain)
		})
	}

	say("# Benchmarks")
	say("")
	say("What a request and a frame cost. Written by `make bench-costs`, as root: seven rounds take some forty minutes on a machine with nothing")
	say("else to do, `BENCH_ROUNDS=2 make bench-costs` a third of that. All runs are in build/bench.json. Measured on %s, %d processors, Linux %s, in %d rounds.", cmp.Or(r.Machine, "a processor without a name"), r.Processors, r.Kernel, r.Rounds)
	say("")
	say("Everybody is a network namespace of this machine: the cables are veth, the switch is a Linux bridge. Real NICs and switches add")
	say("their own. In each round all take turns, and right before and after each the plain host does the same work (of frames that are")
	say("discarded: xt_cluster), by whose mean it is divided, but for latencies: a machine that shares its processors with others may be a fifth")
	say("faster or slower a minute later. Every figure is the median over the rounds, and in parentheses the least and the greatest of them, which is how far to trust it.")
	say("%s", r.others())
	say("")
	say("## CPU")
	say("")
	say("The processor time of client, servers, dispatcher and engine together, the kernel's network work included, for one request or")
	say("one octet, divided by that of the plain host. The client is wrk with 16 connections and 1000 octets an answer,")
	say("or curl with files of 64 MiB, a connection each; the server is nginx, and a small program that takes the uploads. *bpf*, *raw* and")
	say("(below) *native* are clusters of one node; where it says *2 nodes*, and behind the dispatchers, there are two servers. *directed* is")
	say("directed mode, for a network that does not flood: one of the two gets all frames, and passes on what is the other's.")
	ratios(r, cpu)
	r.sayFloors(say)
	say("XDP is in the driver, generic XDP is XDP without one; where nothing is said it is tcx. All processes' time is that of the kernel's")
	say("scheduler, to the nanosecond. The same from /proc/stat, which counts the whole machine in ticks, with whatever else it did, less what it")
	say("did at rest:")
	ratios(r, all)
	say("## Rate and latency")
	say("")
	say("Requests or octets a second, and the 99th percentile of the latency of requests, divided by those of the plain host. All of")
	say("it is on %d processors, so whoever needs more of them is slower. xt_cluster goes by the client's address only, so one client has", r.Processors)
	say("one of its servers.")
	table("", append(slices.Clone(requests), "p99 "+KeepAlive, "p99 "+Connection), r.ways(requests...), func(way string, i int) string {
		if i < len(requests) {
			return spread(r.Ratio(way, Plain, requests[i], rate), way == Plain)
		}
		return spread(r.Ratio(way, Plain, requests[i-len(requests)], p99), way == Plain)
	})
	if f := r.Of(Plain, KeepAlive, rate); f.OK {
		say("The plain host: %.0f requests a second, p99 %.2f ms; with a connection each %.0f, %.2f ms; %.1f GB/s down, %.1f GB/s up. It takes", f.Median,
			r.Of(Plain, KeepAlive, p99).Median/1e6, r.Of(Plain, Connection, rate).Median, r.Of(Plain, Connection, p99).Median/1e6,
			r.Of(Plain, Download, rate).Median/1e9, r.Of(Plain, Upload, rate).Median/1e9)
		say("%.1f µs of a processor for a request, %.1f µs with a connection, and %.2f and %.2f ns for an octet: a service that has more to do for",
			r.Of(Plain, KeepAlive, cpu).Median/1e3, r.Of(Plain, Connection, cpu).Median/1e3, r.Of(Plain, Download, cpu).Median, r.Of(Plain, Upload, cpu).Median)
		say("a request than nginx has for 1000 octets is nearer to 1.00 with everybody.")
		say("")
	}
	if native != nil {
		say("## The patched kernel")
		say("")
		say("*native* needs the kernel of the appliance, so all of this was measured again in a guest of QEMU with it (`make bench-native`): the kernel")
		say("of the board pc-x86_64, Linux %s, %d processors, in %d rounds, with files of 8 MiB. Its processors are emulated, and each of their", native.Kernel, native.Processors, native.Rounds)
		say("instructions takes a nanosecond of the guest's time (TCG, icount): so what is compared are instructions, which no other load disturbs,")
		say("and which know nothing of caches or of the time of day: each is divided by the plain host of the same round. As in the first table:")
		ratios(native, cpu)
		say("With a connection for each request *native* costs more than the plain host by what lies in the way of each frame, of which a connection has")
		say("some ten and a request on a connection that is kept two: the filter, a second device, the guard. To that come routes: a node has")
		say("rules for what the VIP sends, and with any rules the kernel asks its tables one after the other, also for where a SYN or the ACK to it")
		say("comes from.")
		say("")
		if of := func(way string) float64 { return native.Ratio(way, Plain, Connection, cpu).Median }; of(NoEngine) > 0 {
			say("The floors are those of above, here with the wire address. Of a connection per request, *%s* takes %.2f, which is the", MacvlanFloor, of(MacvlanFloor))
			hashed := ""
			if f := of(HashedMacvlan); f > 0 {
				hashed = fmt.Sprintf("with programs that only hash it is %.2f, ", f)
			}
			say("second device and its routes; %swith a node's programs, but without its engine, it is %.2f, and *native* is %.2f.", hashed, of(NoEngine), of("native"))
			say("*%s* takes %.2f, and with a node's programs %.2f.", OneDevice, of(OneDevice), of(OneJudged))
			say("")
		}
	}
	say("## A frame")
	say("")
	say("What one costs its receiver: nanoseconds of processor time more than when it is lost at the sender. They come in batches, as by a")
	say("NIC whose driver polls (NAPI, GRO). Discarded are small TCP segments for the VIP whose flows are another node's; an *uninvolved host* is one to which the switch floods them and")
	say("that has nothing to do with the VIP. Accepted are datagrams, as far as a socket whose queue is full. All have come across a cable,")
	say("which by itself takes what a program takes that only drops. One that only hashes does what a filter with this hash (SipHash-1-3) cannot leave out: it hashes the flow,")
	say("looks into the table, counts, and drops; it checks nothing.")
	columns := []string{"discarded, ns", "÷ xt_cluster", "accepted, ns", "÷ plain host"}
	table("", columns, r.ways(Discard, Accept), func(way string, i int) string {
		work, other := Discard, XtCluster
		if i > 1 {
			work, other = Accept, Plain
		}
		if i%2 == 0 {
			return nanoseconds(r.Of(way, work, cpu))
		}
		return spread(r.Ratio(way, other, work, cpu), way == other)
	})
	say("The filter alone, by `BPF_PROG_TEST_RUN`, in nanoseconds:")
	tests := []string{TestDiscard, TestStranger, TestAccept, TestFloor}
	names := []string{}
	for _, test := range tests {
		names = append(names, strings.TrimPrefix(test, "test run: "))
	}
	table("", names, r.ways(TestDiscard), func(way string, i int) string {
		return nanoseconds(r.Of(way, tests[i], cpu))
	})
	if virtio != nil {
		say("## A NIC of virtio-net")
		say("")
		say("In a guest of QEMU (Linux %s, emulated as above, processors: %d, rounds: %d), whose NICs are taps on a Linux bridge. By default the host", virtio.Kernel, virtio.Processors, virtio.Rounds)
		say("gives such a NIC *the guest's offloads*: segments of TCP of up to 64 KiB in one piece, with checksums that nobody has to check. A")
		say("program in the driver (XDP) attaches either way, and takes them away while it is there. In instructions of all parties, the sending")
		say("by another NIC of the guest included, and those of interrupts:")
		nics := []string{VirtioOffloads, VirtioPlain}
		table("", []string{"discarded frame, " + nics[0], nics[1], "upload ÷ plain host, " + nics[0], nics[1]}, virtio.ways(nics[0]+": "+Upload, nics[0]+": "+Discard), func(way string, i int) string {
			if i < 2 {
				return nanoseconds(virtio.Of(way, nics[i]+": "+Discard, cpu))
			}
			return spread(virtio.Ratio(way, Plain, nics[i-2]+": "+Upload, cpu), way == Plain)
		})
		say("So `auto` takes tcx on virtio-net: it may lose the offloads for what XDP saves of a frame that is another node's. Where the host does not")
		say("give them, nothing is lost, and `system.ingress: xdp` is the better. How many frames an interrupt brings depends on the machine below:")
		say("a frame's numbers differ by some hundreds from run to run.")
		say("")
	}
	say("## What is promised")
	say("")
	say("| | measured | promised | |")
	say("|---|---|---|---|")
	claims := r.Claims()
	if native != nil {
		claims = append(claims, native.claimsOf("native")...)
	}
	for _, c := range claims {
		holds := "holds"
		switch {
		case !c.Judged():
			holds = fmt.Sprintf("not judged: %d of the %d quiet rounds that it takes", c.Rounds, enough)
		case c.OutOfReach():
			holds = strings.TrimSpace("out of reach "+c.Going) + ": " + c.proof()
		case !c.Holds():
			holds = strings.TrimSuffix("**does not hold**; "+c.proof(), "; ")
		}
		digits := c.digits()
		say("| %s | %.*f%s | ≤ %.*f%s | %s |", c.What, digits, c.Value, c.Unit, digits, c.Limit, c.Unit, holds)
	}
	say("")
	if slices.ContainsFunc(claims, Claim.OutOfReach) {
		say("*Out of reach* is what floors do not keep either, in any quiet round: so on such a bed nobody can who goes that way. *One device with the filter* is another way than a macvlan,")
		say("and [decision 17](decisions/0017-in-the-kernel.md) says what it would take.")
		say("")
	}
	say("Where *raw* is dear: a process handles each frame, which takes two system calls and two copies each way, where nginx takes %.0f µs for all of", r.Of(Plain, KeepAlive, cpu).Median/1e3)
	say("a request. Its answers could leave by the NIC, past the process; but then nothing would judge what leaves, a RST in a bucket that changes")
	say("hands would reach a client of another node, and the kernel might tell the VIP's neighbours the wire MAC. So it is what is left where")
	say("the kernel has nothing better, and what the other datapaths are compared with, frame by frame.")
	say("")
	say("The dispatcher that is hardest to beat at downloads is nginx, with buffers that take whole files from a server at a time; haproxy takes")
	say("half as much again or more than that.")
	var missing []string
	for _, s := range r.Series {
		if s.Why != "" && (native == nil || !strings.HasPrefix(s.Way, "native")) {
			missing = append(missing, fmt.Sprintf("- %s, %s: %s", s.Way, s.Work, s.Why))
		}
	}
	if len(missing) > 0 {
		say("")
		say("Not measured, for what this machine lacks:")
		say("")
		say("%s", strings.Join(missing, "\n"))
	}
	return []byte(b.String())
}

// sayFloors says what the floors are that were measured.
func (r *Report) sayFloors(say func(string, ...any)) {
	var floors []string
	for _, f := range []struct{ way, is string }{
		{TwoPlain, "have the VIP both, and the client a route to each: nothing lies between, and as much runs as in a cluster of two"},
		{CopyFloor, "is what raw is without a filter and without Go's scheduler: two threads read from the NIC or a TAP, write to the other, and look at nothing"},
		{RingFloor, "is the same with PACKET_RX_RING, so that it need not ask for each frame"},
		{MacvlanFloor, "is a node's clone0 with its routes, where all frames pass"},
		{HashedMacvlan, "is that with programs in the three places where a node has one: a frame that comes is hashed, looked up and counted, and nothing is checked; what leaves is not looked at"},
		{NoEngine, "is a node with its programs, and nothing that would change what they do"},
		{OneDevice, "is a host with the VIP on lo and a program that makes frames to the clone MAC its own; it has no clone0, and no routes of the VIP's"},
		{OneJudged, "is that with a node's programs before it"},
	} {
		if r.find(f.way, KeepAlive) != nil {
			floors = append(floors, fmt.Sprintf("- *%s* %s;", f.way, f.is))
		}
	}
	if len(floors) == 0 {
		return
	}
	say("The last rows are floors: ways that do nothing of what a cluster has to do, or only a part, to see what is left of the cost.")
	say("")
	say("%s", strings.TrimSuffix(strings.Join(floors, "\n"), ";")+".")
	say("")
}

// digits are those behind the point that tell its value from its limit.
func (c Claim) digits() int {
	switch {
	case c.Unit != "":
		return 0
	case c.Limit < 0.2:
		return 3
	}
	return 2
}

// proof says what the floors take.
func (c Claim) proof() string {
	var takes []string
	for _, b := range c.Bounds {
		subject := b.Way + " takes"
		switch b.Way {
		case Plain:
			subject = "the plain host alone takes"
		case TwoPlain:
			subject = "two plain servers take"
		}
		takes = append(takes, fmt.Sprintf("%s %.*f %s", subject, c.digits(), b.Median, b.between(c.digits())))
	}
	return strings.Join(takes, ", ")
}

// others says what the machine did besides.
func (r *Report) others() string {
	var values []float64
	for _, s := range r.Series {
		for _, run := range s.Runs {
			values = append(values, run.Others)
			if run.Beside != nil {
				values = append(values, run.Beside.Others)
			}
		}
	}
	f := figure(values)
	return fmt.Sprintf("What else the machine did meanwhile took %.2f\nprocessors, at worst %.2f; rounds with more than 0.50 count only where there is no other.", f.Median, f.Most)
}

func nanoseconds(f Figure) string {
	if !f.OK {
		return "–"
	}
	return fmt.Sprintf("%.0f %s", f.Median, f.between(0))
}

func spread(f Figure, reference bool) string {
	switch {
	case !f.OK:
		return "–"
	case reference:
		return "1.00"
	}
	return fmt.Sprintf("%.2f %s", f.Median, f.between(2))
}

// between is how far to trust a figure. One round has no spread.
func (f Figure) between(digits int) string {
	mark := ""
	if f.Quiet == 0 {
		mark = ", disturbed"
	}
	if f.Rounds == 1 {
		return "(one round" + mark + ")"
	}
	return fmt.Sprintf("(%.*f–%.*f%s)", digits, f.Least, digits, f.Most, mark)
}

// ways are those that did some of the works, in the order of the report.
func (r *Report) ways(works ...string) (ways []string) {
	for _, s := range r.Series {
		if slices.Contains(works, s.Work) && len(s.Runs) > 0 && !slices.Contains(ways, s.Way) {
			ways = append(ways, s.Way)
		}
	}
	return ways
}
