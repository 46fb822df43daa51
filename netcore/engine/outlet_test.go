package engine

import (
	"fmt"
	"log/slog"
	"strings"
	"testing"
	"time"
)

// stuck is a writer that waits, as a pipe that nobody reads.
type stuck struct {
	enter chan string
	leave chan struct{}
}

func (s stuck) Write(p []byte) (int, error) {
	s.enter <- string(p)
	<-s.leave
	return len(p), nil
}

func TestOutlet(t *testing.T) {
	s := stuck{make(chan string), make(chan struct{})}
	o := newOutlet(s, 2, lostLines)
	for i := range 10 { // one is under way at most, and two wait
		if n, err := fmt.Fprintf(o, "line %d\n", i); n != 7 || err != nil {
			t.Fatalf("Write = %d, %v", n, err)
		}
		if i == 0 {
			if got := <-s.enter; got != "line 0\n" {
				t.Fatalf("written %q", got)
			}
		}
	}
	var said []string
	for range 3 {
		s.leave <- struct{}{}
		said = append(said, <-s.enter)
	}
	s.leave <- struct{}{}
	o.close(time.Minute)
	if got, want := strings.Join(said, ""), "level=WARN msg=\"log lines were lost: whoever reads them is too slow\" lost=7\nline 1\nline 2\n"; got != want {
		t.Errorf("written %q; want %q", got, want)
	}
}

// TestOutletGivesUp: an engine ends though nobody reads its log.
func TestOutletGivesUp(t *testing.T) {
	s := stuck{make(chan string, 1), make(chan struct{})}
	defer close(s.leave)
	o := newOutlet(s, 16, lostLines)
	log := slog.New(slog.NewTextHandler(o, nil))
	log.Info("the first, which is under way")
	<-s.enter
	for range 1000 {
		log.Info("another")
	}
	o.close(10 * time.Millisecond)
	select {
	case <-o.ended:
		t.Error("all was written: this shows nothing")
	default:
	}
	if lost := o.lost.Load(); lost != 1000-16 {
		t.Errorf("%d lines are lost; want %d", lost, 1000-16)
	}
}
