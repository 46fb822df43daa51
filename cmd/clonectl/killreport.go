package main

import (
	"fmt"
	"time"

	"clonecluster/qemu/lab/crowd"
)

// killReport is what clients saw of a node that lost its power and came back.
type killReport struct {
	Node string `json:"node"`
	// Away is from the power cut until the power came back, Back from then on until
	// some time after the node's first answer.
	Away spanReport `json:"away"`
	Back spanReport `json:"back"`
	// Others are the downloads of the nodes that lived, Lost those of the node that
	// was killed.
	Others othersReport `json:"others_downloads"`
	Lost   lostReport   `json:"lost_downloads"`
	// Doubles is the number of connections that two nodes answered.
	Doubles int          `json:"answered_twice"`
	Rejoin  rejoinReport `json:"rejoin"`
}

// spanReport is a [crowd.Outcome]; times are in seconds.
type spanReport struct {
	Seconds     float64 `json:"seconds"`
	Answered    int     `json:"answered"`
	Slow        int     `json:"slow"` // of those answered
	Held        int     `json:"held"` // lost with the node that held the connection
	Failed      int     `json:"failed"`
	FirstError  string  `json:"first_error,omitempty"`
	LongestGap  float64 `json:"longest_gap_seconds"`
	LongestWait float64 `json:"longest_wait_seconds"` // for a connection
	// Unanswered is from the beginning to the last SYN that nobody answered.
	Unanswered float64 `json:"unanswered_seconds"`
}

type othersReport struct {
	Begun   int    `json:"begun"`
	GoOn    int    `json:"go_on"` // when the power came back
	Right   int    `json:"right"` // ended with the right bytes
	Problem string `json:"problem,omitempty"`
}

type lostReport struct {
	Begun int `json:"begun"`
	Known int `json:"known"` // whose clients learned of it
	// From the power cut until the first and the last of them knew, in seconds.
	First float64 `json:"first_seconds"`
	Last  float64 `json:"last_seconds"`
}

type rejoinReport struct {
	// From power-on until the node was ready and until its first answer, in
	// seconds; 0 if that never came, or if with the service's affinity no client
	// here would see it.
	Ready       float64 `json:"ready_seconds"`
	FirstAnswer float64 `json:"first_answer_seconds"`
	Shares      bool    `json:"shares"` // whether an answer was to be expected
	Problem     string  `json:"problem,omitempty"`
}

func newSpanReport(o crowd.Outcome, length time.Duration) spanReport {
	r := spanReport{
		Seconds: length.Seconds(), Answered: o.Answered, Slow: o.Slow, Held: o.Held, Failed: o.Failed,
		LongestGap: o.LongestGap.Seconds(), LongestWait: o.LongestWait.Seconds(), Unanswered: o.Unanswered.Seconds(),
	}
	if o.FirstErr != nil {
		r.FirstError = o.FirstErr.Error()
	}
	return r
}

// String says how the requests of a span ended.
func (s spanReport) String() string {
	line := fmt.Sprintf("%d requests answered, %d of them slow, %d failed", s.Answered, s.Slow, s.Failed)
	if s.Held > 0 {
		line += fmt.Sprintf(", %d lost with the node that held them", s.Held)
	}
	return line
}

// checks are what must hold.
func (r *killReport) checks() []check {
	away, back := r.Away, r.Back
	failed := away.Failed + back.Failed
	requests := check{"every request while " + r.Node + " died and came back was answered", failed == 0,
		fmt.Sprintf("%d of %d, the longest gap between two answers %.2fs", away.Answered+back.Answered,
			away.Answered+back.Answered+failed, max(away.LongestGap, back.LongestGap))}
	if held := away.Held + back.Held; held > 0 {
		requests.Detail += fmt.Sprintf("; not counted: %d on connections that %s held", held, r.Node)
	}
	for _, s := range []spanReport{away, back} {
		if s.FirstError != "" {
			requests.Detail += "; first: " + s.FirstError
			break
		}
	}
	checks := []check{requests}
	others := check{"the survivors' downloads were not broken", r.Others.Right == r.Others.Begun,
		fmt.Sprintf("%d of %d ended with the right bytes", r.Others.Right, r.Others.Begun)}
	if r.Others.Problem != "" {
		others.Detail += "; first: " + r.Others.Problem
	}
	rejoin := check{"the killed node rejoined and took its share", r.Rejoin.Problem == "", r.Rejoin.Problem}
	if rejoin.OK {
		rejoin.Detail = r.Rejoin.String()
	}
	if r.Others.Begun > 0 { // with an affinity all may have been the victim's
		checks = append(checks, others)
	}
	twice := check{"no connection was answered by two nodes", r.Doubles == 0, fmt.Sprint(r.Doubles)}
	learned := check{"clients of the dead node's downloads learned of it", r.Lost.Known == r.Lost.Begun, r.Lost.String()}
	return append(checks, twice, learned, rejoin)
}

func (l lostReport) String() string {
	switch {
	case l.Begun == 0:
		return "it held none"
	case l.Known == 0:
		return fmt.Sprintf("0 of %d", l.Begun)
	}
	return fmt.Sprintf("%d of %d, after %.2fs to %.2fs", l.Known, l.Begun, l.First, l.Last)
}

func (r rejoinReport) String() string {
	if !r.Shares {
		return fmt.Sprintf("ready %.1fs after power-on; this client is another node's", r.Ready)
	}
	return fmt.Sprintf("first answer %.1fs after power-on", r.FirstAnswer)
}

// awayLines say what clients saw until the power came back.
func (r *killReport) awayLines() []string {
	taken := r.Node + "'s share: no SYN was lost"
	if r.Away.Unanswered > 0 {
		taken = fmt.Sprintf("%s's share was answered again %.2fs after the cut: the last SYN that nobody answered", r.Node, r.Away.Unanswered)
	}
	return []string{
		fmt.Sprintf("  the %.1fs without it: %v", r.Away.Seconds, r.Away),
		fmt.Sprintf("  the longest gap between two answers: %.2fs", r.Away.LongestGap),
		"  " + taken,
		fmt.Sprintf("  the longest wait for a connection: %.2fs (a client sends a lost SYN again after 1s and 3s)", r.Away.LongestWait),
		fmt.Sprintf("  downloads of the other nodes: %d of %d go on; of %s: lost, as their clients learned: %v",
			r.Others.GoOn, r.Others.Begun, r.Node, r.Lost),
	}
}

// backLines say how it came back.
func (r *killReport) backLines() []string {
	if r.Rejoin.Problem != "" {
		return []string{fmt.Sprintf("%s did not come back: %s", r.Node, r.Rejoin.Problem)}
	}
	return []string{
		fmt.Sprintf("%s is back: %v", r.Node, r.Rejoin),
		fmt.Sprintf("  meanwhile: %v; the longest gap %.2fs", r.Back, r.Back.LongestGap),
		fmt.Sprintf("  downloads of the other nodes, begun before the cut: %d of %d ended now with the right bytes", r.Others.Right, r.Others.Begun),
	}
}

// summary is for the hint that stays.
func (r *killReport) summary() string {
	if r.Rejoin.Problem != "" {
		return r.Node + " lost its power and did not come back"
	}
	return fmt.Sprintf("shown: %s lost its power and came back; the longest gap was %.2fs", r.Node, max(r.Away.LongestGap, r.Back.LongestGap))
}
