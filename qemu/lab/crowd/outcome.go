package crowd

import (
	"slices"
	"time"
)

// SlowAfter is what makes an answer slow: a SYN that nobody answers is sent again
// after a second.
const SlowAfter = time.Second

// Outcome is what clients can say of a span of time.
type Outcome struct {
	Answered int
	Slow     int // of Answered: took longer than [SlowAfter]
	Held     int // not answered, on a connection that the named node held
	Failed   int // not answered otherwise
	FirstErr error
	// LongestGap is between two answers that follow each other, and LongestWait
	// from a request's beginning to its connection.
	LongestGap, LongestWait time.Duration
	// Unanswered is from the beginning of the span to the last SYN in it that
	// nobody answered. That one was sent again later; the time until then is in
	// LongestWait. Zero if every SYN was answered.
	Unanswered time.Duration
}

// Total is the number of requests.
func (o Outcome) Total() int { return o.Answered + o.Held + o.Failed }

// Judge sums up the requests that were under way between since and until. Those
// that failed on a connection held by the given port of the switch are told apart;
// empty means none. A gap at either end of the span counts with its whole length.
func Judge(requests []Request, since, until time.Time, holder string) Outcome {
	var o Outcome
	var answers []time.Time
	for _, r := range requests {
		if r.Err == nil {
			answers = append(answers, r.End)
		}
		if !r.End.After(since) || !r.Begin.Before(until) {
			continue
		}
		switch {
		case r.Err == nil:
			o.Answered++
			if r.End.Sub(r.Begin) > SlowAfter {
				o.Slow++
			}
		case holder != "" && r.Attempt.Holder() == holder:
			o.Held++
		default:
			o.Failed++
			if o.FirstErr == nil {
				o.FirstErr = r.Err
			}
		}
		connected := r.Connected
		if connected.IsZero() {
			connected = r.End
		}
		o.LongestWait = max(o.LongestWait, connected.Sub(r.Begin))
		if r.Attempt.Lost.Before(until) {
			o.Unanswered = max(o.Unanswered, r.Attempt.Lost.Sub(since))
		}
	}
	o.LongestGap = longestGap(answers, since, until)
	return o
}

// longestGap is the longest time without an answer that touches the span. Where
// there is no answer before or after it, the span's own end stands for it.
func longestGap(answers []time.Time, since, until time.Time) time.Duration {
	slices.SortFunc(answers, time.Time.Compare)
	var longest time.Duration
	last := since
	for _, t := range answers {
		if t.After(since) {
			longest = max(longest, t.Sub(last))
		}
		if last = t; !t.Before(until) {
			return longest
		}
	}
	return max(longest, until.Sub(last))
}
