package main

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"time"

	"clonecluster/cmd/internal/webd"
	"clonecluster/qemu/lab/crowd"
)

func goodKill() killReport {
	return killReport{
		Node:   "node2",
		Away:   spanReport{Seconds: 5, Answered: 200, Slow: 9, Held: 2, LongestGap: 0.21, LongestWait: 3.01, Unanswered: 1.12},
		Back:   spanReport{Seconds: 9, Answered: 400, LongestGap: 0.3, LongestWait: 0.4},
		Others: othersReport{Begun: 8, GoOn: 8, Right: 8},
		Lost:   lostReport{Begun: 4, Known: 4, First: 1.3, Last: 1.62},
		Rejoin: rejoinReport{Ready: 5, FirstAnswer: 6.26, Shares: true},
	}
}

func TestKillChecks(t *testing.T) {
	for _, tt := range []struct {
		name   string
		mod    func(*killReport)
		failed string // the beginning of the one check that fails
		detail string // in one of the checks
	}{
		{"good", func(*killReport) {}, "", "600 of 600, the longest gap between two answers 0.30s; not counted: 2 on connections that node2 held"},
		{"rejoined", func(*killReport) {}, "", "first answer 6.3s after power-on"},
		{"a request failed", func(r *killReport) { r.Away.Failed, r.Away.FirstError = 1, "timeout" }, "every request", "600 of 601"},
		{"a request failed later", func(r *killReport) { r.Back.Failed, r.Back.FirstError = 1, "reset" }, "every request", "first: reset"},
		{"a download broke", func(r *killReport) { r.Others.Right, r.Others.Problem = 7, "wrong bytes" }, "the survivors'", "7 of 8 ended with the right bytes; first: wrong bytes"},
		{"not back", func(r *killReport) { r.Rejoin.Problem = "no carrier" }, "the killed node", "no carrier"},
		{"another node's client", func(r *killReport) { r.Rejoin.Shares, r.Rejoin.FirstAnswer = false, 0 }, "", "ready 5.0s after power-on"},
		{"clients that never learned of it", func(r *killReport) { r.Lost.Known = 0 }, "clients of the dead", "0 of 4"},
		{"two answered", func(r *killReport) { r.Doubles = 3 }, "no connection was answered by two", "3"},
		{"all was the dead node's", func(r *killReport) { r.Others = othersReport{} }, "", "600 of 600"},
	} {
		r := goodKill()
		tt.mod(&r)
		var failed, details []string
		for _, c := range r.checks() {
			details = append(details, c.Detail)
			if !c.OK {
				failed = append(failed, c.Name)
			}
		}
		switch {
		case tt.failed == "" && len(failed) > 0, tt.failed != "" && (len(failed) != 1 || !strings.HasPrefix(failed[0], tt.failed)):
			t.Errorf("%s: failed %q; want %q", tt.name, failed, tt.failed)
		case !slices.ContainsFunc(details, func(d string) bool { return strings.Contains(d, tt.detail) }):
			t.Errorf("%s: details %q; want %q", tt.name, details, tt.detail)
		}
	}
}

func TestKillLines(t *testing.T) {
	good := goodKill()
	quick := goodKill()
	quick.Away.Unanswered, quick.Away.Held, quick.Lost = 0, 0, lostReport{}
	lost := goodKill()
	lost.Rejoin.Problem = "it is off"
	for _, tt := range []struct {
		lines []string
		want  string
	}{
		{good.awayLines(), "the 5.0s without it: 200 requests answered, 9 of them slow, 0 failed, 2 lost with the node that held them"},
		{good.awayLines(), "node2's share was answered again 1.12s after the cut"},
		{good.awayLines(), "the longest wait for a connection: 3.01s"},
		{good.awayLines(), "of the other nodes: 8 of 8 go on; of node2: lost, as their clients learned: 4 of 4, after 1.30s to 1.62s"},
		{quick.awayLines(), "node2's share: no SYN was lost"},
		{quick.awayLines(), "it held none"},
		{good.backLines(), "node2 is back: first answer 6.3s after power-on"},
		{good.backLines(), "8 of 8 ended now with the right bytes"},
		{lost.backLines(), "node2 did not come back: it is off"},
		{[]string{good.summary()}, "node2 lost its power and came back; the longest gap was 0.30s"},
		{[]string{lost.summary()}, "did not come back"},
	} {
		if !strings.Contains(strings.Join(tt.lines, "\n"), tt.want) {
			t.Errorf("lines %q; want %q", tt.lines, tt.want)
		}
	}
}

func TestSpanReport(t *testing.T) {
	got := newSpanReport(crowd.Outcome{Answered: 3, Slow: 2, Held: 1, Failed: 1, FirstErr: errors.New("reset"),
		LongestGap: time.Second, LongestWait: 2 * time.Second, Unanswered: 500 * time.Millisecond}, 10*time.Second)
	want := spanReport{Seconds: 10, Answered: 3, Slow: 2, Held: 1, Failed: 1, FirstError: "reset", LongestGap: 1, LongestWait: 2, Unanswered: 0.5}
	if got != want {
		t.Errorf("newSpanReport = %+v; want %+v", got, want)
	}
}

// The sum is that of what a client gets, and of no other length.
func TestBenchSum(t *testing.T) {
	node, err := webd.New(webd.Options{Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	srv := httptest.NewServer(node.Handler())
	defer srv.Close()
	const size = 200_000 // more than the pattern's period
	resp, err := http.Get(fmt.Sprintf("%s/bench/%d", srv.URL, size))
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil || len(body) != size {
		t.Fatalf("got %d bytes, %v; want %d", len(body), err, size)
	}
	if got, err := benchSum(size); err != nil || got != sha256.Sum256(body) {
		t.Errorf("benchSum(%d) = %x, %v; want %x", size, got, err, sha256.Sum256(body))
	}
	if _, err := benchSum(-1); err == nil {
		t.Error("benchSum(-1) worked")
	}
}

func TestPace(t *testing.T) {
	ms := func(all ...int) (took []time.Duration) {
		for _, n := range all {
			took = append(took, time.Duration(n)*time.Millisecond)
		}
		return took
	}
	for _, tt := range []struct {
		took []time.Duration
		want time.Duration
	}{
		{nil, longestPace},
		{ms(1, 2, 3), shortestPace},
		{ms(900, 15, 12, 31, 17), 34 * time.Millisecond},
		{ms(900, 800, 700), longestPace},
	} {
		a := &asker{took: tt.took}
		if got := a.pace(); got != tt.want {
			t.Errorf("pace after answers in %v = %v; want %v", tt.took, got, tt.want)
		}
	}
}

func TestRenderScene(t *testing.T) {
	s := snapshot{asked: 7, last: "last by node1"}
	if text := strings.Join(s.render(100), "\n"); !strings.Contains(text, "7 answered") {
		t.Errorf("view without a scene: %q", text)
	}
	s.scene = []string{"node2 has had no power for 1.0s", "  3 requests answered"}
	text := strings.Join(s.render(100), "\n")
	if strings.Contains(text, "7 answered") || !strings.Contains(text, bold+s.scene[0]) || !strings.Contains(text, "\n"+s.scene[1]) {
		t.Errorf("view with a scene: %q", text)
	}
}
