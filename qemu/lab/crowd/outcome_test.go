package crowd

import (
	"errors"
	"testing"
	"time"
)

func TestJudge(t *testing.T) {
	start := time.Now()
	at := func(ms int) time.Time { return start.Add(time.Duration(ms) * time.Millisecond) }
	ms := func(n int) time.Duration { return time.Duration(n) * time.Millisecond }
	good := func(begin, end int) Request {
		return Request{Begin: at(begin), Connected: at(end - 1), End: at(end), Attempt: Attempt{SYNs: 1, Holders: []string{"node1"}}}
	}
	again := func(begin, lost, end int) Request {
		r := good(begin, end)
		r.Attempt.SYNs, r.Attempt.Lost = 2, at(lost)
		return r
	}
	bad := func(begin, end int, holder string) Request {
		r := Request{Begin: at(begin), End: at(end), Err: errors.New(holder + " reset it")}
		if holder != "" {
			r.Connected, r.Attempt = at(begin+1), Attempt{SYNs: 1, Holders: []string{holder}}
		}
		return r
	}
	for _, tt := range []struct {
		name string
		all  []Request
		want Outcome // of the time from 1000 to 5000, with node2 as the victim
	}{
		{"nothing", nil, Outcome{LongestGap: ms(4000)}},
		{"before and after", []Request{good(100, 900), good(5000, 5100)}, Outcome{LongestGap: ms(4200)}},
		{"steady", []Request{good(900, 990), good(995, 1010), good(2000, 2010), good(3000, 3010), good(4000, 4010), good(4990, 5005)},
			Outcome{Answered: 5, LongestGap: ms(1000), LongestWait: ms(14)}},
		{"a lost SYN", []Request{good(990, 1001), again(1500, 1500, 2510), good(3000, 3010), good(4500, 4501)},
			Outcome{Answered: 4, Slow: 1, LongestGap: ms(1509), LongestWait: ms(1009), Unanswered: ms(500)}},
		{"lost before the span", []Request{again(500, 500, 1510), good(3000, 3010)},
			Outcome{Answered: 2, Slow: 1, LongestGap: ms(1990), LongestWait: ms(1009)}},
		{"held by the victim, and by another", []Request{good(1000, 1001), bad(990, 2500, "node2"), bad(990, 2500, "node1"), good(2999, 3000), good(4999, 5000)},
			Outcome{Answered: 3, Held: 1, Failed: 1, LongestGap: ms(2000), LongestWait: ms(1)}},
		{"never connected", []Request{good(1000, 1001), bad(1100, 4100, ""), good(4000, 4001)},
			Outcome{Answered: 2, Failed: 1, LongestGap: ms(3000), LongestWait: ms(3000)}},
		{"failed before", []Request{bad(100, 200, ""), good(3000, 3001)}, Outcome{Answered: 1, LongestGap: ms(2001)}},
	} {
		got := Judge(tt.all, at(1000), at(5000), "node2")
		if (got.Failed > 0) != (got.FirstErr != nil) {
			t.Errorf("%s: %d failed, first %v", tt.name, got.Failed, got.FirstErr)
		}
		got.FirstErr = nil
		if got != tt.want {
			t.Errorf("%s:\ngot  %+v\nwant %+v", tt.name, got, tt.want)
		}
	}
}
