package engine_test

import (
	"fmt"
	"os/exec"
	"strings"
	"testing"
	"time"
)

// synFilter passes the SYNs and SYN-ACKs of the client and port 80. pcap-filter(7)
// knows the flags of TCP by name in IPv4 alone.
const synFilter = "(ip and host 10.77.0.1 and tcp port 80 and tcp[13] & 2 != 0) or " +
	"(ip6 and host fd77::1 and tcp port 80 and ip6[53] & 2 != 0)"

// TestFigureSYNs moves buckets to and fro under load, and has tshark read at the
// client's cable what became of each SYN: no two nodes may answer one, and none
// may wait for more than the client's first retransmission.
func TestFigureSYNs(t *testing.T) {
	if _, err := exec.LookPath("tshark"); err != nil {
		t.Skip("needs tshark (Debian package tshark)")
	}
	f := newFailover(t, 3, patient)
	f.boot(f.nodes...)
	f.own(f.nodes...)
	sniffer := f.client.Sniff(synFilter)
	d := f.startDownloads(f.client, 30, f.nodes...)
	c := f.startCrowd(f.client, 4*time.Millisecond, 500, 0)
	changes := size(100, 1000)
	for i := range changes / 2 { // each is two
		n := f.nodes[i%len(f.nodes)]
		n.drain()
		f.agreed(f.others(n)...)
		c.await(20)
		n.takePart()
		f.agreed(f.nodes...)
		c.await(20)
	}
	all := c.end()
	d.mustGoOn("after all the changes")

	s := readSYNs(t, sniffer.Stop())
	t.Logf("%d map changes, %v: %v", changes, all, s)
	f.mustSucceed(all)
	if s.connections < len(all) {
		t.Errorf("the capture has %d connections; the client opened %d", s.connections, len(all))
	}
	for _, problem := range s.problems[:min(10, len(s.problems))] {
		t.Error(problem)
	}
}

// synCounts is what a capture says of the connections in it.
type synCounts struct {
	connections, answeredAtOnce, answeredAfterOne, twice int
	problems                                             []string
}

func (s synCounts) String() string {
	return fmt.Sprintf("of %d SYNs %d were answered at once, %d after the first retransmission, %d not as they should",
		s.connections, s.answeredAtOnce, s.answeredAfterOne, len(s.problems))
}

// A connection is what a capture shows of one SYN.
type connection struct {
	syns      int
	answerers map[string]bool
	story     []string
}

// verdict is what is wrong with it; empty: nothing.
func (c *connection) verdict() string {
	switch {
	case c.syns == 0:
		return "answered and never sent"
	case len(c.answerers) > 1:
		return "answered by several nodes"
	case len(c.answerers) == 0:
		return "never answered"
	case c.syns > 2:
		return "left waiting for more than one retransmission"
	}
	return ""
}

// readSYNs counts how often each connection's SYN was sent and by whom it was
// answered.
func readSYNs(t *testing.T, file string) (s synCounts) {
	t.Helper()
	connections := map[string]*connection{}
	for _, line := range tshark(t, file, "tcp.flags.syn == 1", "frame.time_relative",
		"tcp.flags.ack", "eth.src", "ip.version", "tcp.srcport", "tcp.dstport", "tcp.seq_raw", "tcp.ack_raw") {
		fields := strings.Split(line, "\t")
		if len(fields) != 8 {
			t.Fatalf("tshark printed %q", line)
		}
		at, answer, source, version, port, seq := fields[0], fields[1] == "1", fields[2], fields[3], fields[4], fields[6]
		if answer {
			var n uint32
			if _, err := fmt.Sscan(fields[7], &n); err != nil {
				t.Fatalf("tshark printed %q: %v", line, err)
			}
			port, seq = fields[5], fmt.Sprint(n-1)
		}
		key := fmt.Sprintf("IPv%s from port %s, sequence number %s", version, port, seq)
		c := connections[key]
		if c == nil {
			c = &connection{answerers: map[string]bool{}}
			connections[key] = c
		}
		if answer {
			c.answerers[source] = true
			c.story = append(c.story, fmt.Sprintf("at %s s answered by %s", at, source))
		} else {
			c.syns++
			c.story = append(c.story, fmt.Sprintf("at %s s sent", at))
		}
	}
	s.connections = len(connections)
	for key, c := range connections {
		if len(c.answerers) > 1 {
			s.twice++
		}
		switch problem := c.verdict(); {
		case problem != "":
			s.problems = append(s.problems, fmt.Sprintf("%s: %s: %s", key, problem, strings.Join(c.story, ", ")))
		case c.syns == 2:
			s.answeredAfterOne++
		default:
			s.answeredAtOnce++
		}
	}
	return s
}
