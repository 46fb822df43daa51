package simulator

import (
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"clonecluster/netcore/filter"
	"clonecluster/netcore/membership"
)

// Command is the command line that runs the schedule again and prints its timeline,
// where program is clonectl.
func (o Options) Command(program string) string {
	c := fmt.Sprintf("%s sim --replay %d", program, o.Seed)
	if o.Nodes != 0 {
		c += fmt.Sprintf(" --nodes %d", o.Nodes)
	}
	if o.Weakness != membership.None {
		c += " --weakness " + o.Weakness.String()
	}
	return c
}

// Print writes the legend and the timeline; of that the last so many lines, or all if
// most is 0.
func (r Result) Print(w io.Writer, most int) {
	for _, line := range r.Legend {
		fmt.Fprintln(w, line)
	}
	lines := r.Timeline
	if left := len(lines) - most; most > 0 && left > 0 {
		fmt.Fprintf(w, "    …        %d lines left out\n", left)
		lines = lines[left:]
	}
	for _, line := range lines {
		fmt.Fprintln(w, line)
	}
}

// legend tells what the timeline does not: the numbers, and what holds all the time.
func (s *sim) legend(format string, args ...any) {
	if s.o.Trace {
		s.result.Legend = append(s.result.Legend, fmt.Sprintf(format, args...))
	}
}

func (s *sim) explain() {
	ms := func(ns int64) string { return fmt.Sprintf("%.4g ms", float64(ns)/1e6) }
	p := s.params
	s.legend("schedule of seed %d, weakness %v", s.o.Seed, s.o.Weakness)
	s.legend("detection time %v: a beacon every %v, a lease of %v", p.Dead, p.Interval.Round(time.Microsecond), p.Lease)
	s.legend("a frame takes %s to %s; at first %.3g %% are lost, %.3g %% come twice",
		ms(s.minDelay), ms(s.minDelay+s.delay), 100*s.loss, 100*s.duplicate)
	if s.policy.Balance == membership.Load {
		s.legend("buckets follow the load")
	}
	if s.policy.StopWhenSick {
		s.legend("nobody serves when the services of all fail")
	}
	for _, n := range s.nodes {
		with := ""
		if n.weight != 100 {
			with = fmt.Sprintf(", weight %d", n.weight)
		}
		if n.filtered {
			with += ", behind a switch that filters multicast"
		}
		s.legend("node %d is %v%s", n.n, n.id, with)
	}
	for _, n := range s.strangers {
		s.legend("node %d is %v, of %s", n.n, n.id, strangenessNames[n.stranger])
	}
	if s.forger {
		s.legend("somebody without the key forges frames all the time")
	}
}

func (s *sim) trace(format string, args ...any) {
	if s.o.Trace {
		at := float64(s.now-int64(time.Second)) / 1e9
		s.result.Timeline = append(s.result.Timeline, fmt.Sprintf("%9.4f s  ", at)+s.numbered(fmt.Sprintf(format, args...)))
	}
}

// numbered puts the numbers of nodes for their ids.
func (s *sim) numbered(text string) string {
	if s.names == nil {
		byID := map[membership.NodeID]string{}
		for _, n := range slices.Concat(s.nodes, s.strangers) {
			for _, id := range append(n.former, n.id) {
				if twin := byID[id]; twin != "" {
					byID[id] = fmt.Sprintf("%s or %d", twin, n.n)
					continue
				}
				byID[id] = fmt.Sprintf("node %d", n.n)
			}
		}
		var pairs []string
		for id, name := range byID {
			pairs = append(pairs, id.String(), name)
		}
		s.names = strings.NewReplacer(pairs...)
	}
	return s.names.Replace(text)
}

func (s *sim) traceNote(n *node, note membership.Note) {
	text := note.What.String()
	switch {
	case note.Why != "":
		text += fmt.Sprintf(", %v: %s", note.Map, note.Why)
	case note.Map.Version != 0:
		text += fmt.Sprintf(", %v", note.Map)
	case note.Peer != n.self():
		text += fmt.Sprintf(": %v", note.Peer.ID)
	}
	text = fmt.Sprintf("node %d: %s", n.n, text)
	if note.What.Refused() { // each is said once, since some come with every frame
		if s.said[text] {
			return
		}
		s.said[text] = true
	}
	s.trace("%s", text)
}

// traceTable tells of what a node takes and gives up.
func (s *sim) traceTable(n *node) {
	if !s.o.Trace {
		return
	}
	var count [4]int
	for _, state := range n.table {
		count[state]++
	}
	s.trace("node %d: now has %d buckets settled, %d shared, %d draining", n.n,
		count[filter.Settled], count[filter.Shared], count[filter.Draining])
}
