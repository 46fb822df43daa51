// Package finding holds what a node has noticed to be wrong, or worth knowing, of
// itself, of its network and of its service.
package finding

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"
)

// Level says how much a finding matters.
type Level int

const (
	Info     Level = iota // worth knowing; nothing is lost
	Warning               // works now, and will not when something else happens
	Critical              // clients lose something
)

var levels = []string{"info", "warning", "critical"}

func (l Level) String() string {
	if l < 0 || int(l) >= len(levels) {
		return fmt.Sprintf("level %d", int(l))
	}
	return levels[l]
}

// MarshalText gives the level by its name.
func (l Level) MarshalText() ([]byte, error) { return []byte(l.String()), nil }

// UnmarshalText reads the name of a level.
func (l *Level) UnmarshalText(text []byte) error {
	i := slices.Index(levels, string(text))
	if i < 0 {
		return fmt.Errorf("%q is no level of a finding; they are %v", text, levels)
	}
	*l = Level(i)
	return nil
}

// A Finding is something that a node has noticed.
type Finding struct {
	// Code names its kind, like no-flooding; docs/findings has a page on each.
	Code  string `json:"code"`
	Level Level  `json:"level"`
	// Node is who noticed it: its wire MAC.
	Node string `json:"node"`
	What string `json:"what"` // a sentence
	Fix  string `json:"fix"`  // what to do about it
	// Since is when it was first noticed, and has been there since.
	Since time.Time `json:"since"`
	// Count is how often it was noticed in this time, 1 or more.
	Count uint64 `json:"count"`
}

// A Board holds the findings that are current, one for each code. It may be used by
// several goroutines.
type Board struct {
	mu      sync.Mutex
	current map[string]Finding
	changed func(f Finding, raised bool)
}

// NewBoard gives an empty one. It calls changed, unless that is nil, when a finding
// comes or gets another level and when it goes, in order, and never from two goroutines at once; changed
// must not use the board.
func NewBoard(changed func(f Finding, raised bool)) *Board {
	if changed == nil {
		changed = func(Finding, bool) {}
	}
	return &Board{current: map[string]Finding{}, changed: changed}
}

// Raise notes a finding. One with the same code keeps the time when it was first
// noticed (Since; now, when f has none), and counts.
func (b *Board) Raise(f Finding) {
	b.mu.Lock()
	defer b.mu.Unlock()
	was, there := b.current[f.Code]
	switch {
	case there:
		f.Since = was.Since
	case f.Since.IsZero():
		f.Since = time.Now()
	}
	f.Count = was.Count + 1
	b.current[f.Code] = f
	if !there || was.Level != f.Level {
		b.changed(f, true)
	}
}

// Clear takes a finding away, if it is there.
func (b *Board) Clear(code string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if f, there := b.current[code]; there {
		delete(b.current, code)
		b.changed(f, false)
	}
}

// Current gives all that are there, those that matter most first.
func (b *Board) Current() []Finding {
	b.mu.Lock()
	defer b.mu.Unlock()
	return slices.SortedFunc(maps.Values(b.current), Compare)
}

// Compare puts what matters most first, then goes by code and node.
func Compare(x, y Finding) int {
	return cmp.Or(cmp.Compare(y.Level, x.Level), strings.Compare(x.Code, y.Code), strings.Compare(x.Node, y.Node))
}

// A Source puts on a board what somebody notices who looks again and again. It is
// for one goroutine.
type Source struct {
	board *Board
	said  map[string]saying
}

// saying is what was said of a code.
type saying struct {
	level Level
	what  string
}

// Source gives one that has noticed nothing yet. No two of a board may have the
// same codes.
func (b *Board) Source() *Source { return &Source{b, map[string]saying{}} }

// Set raises what was noticed at this look, unless the same was said before, and
// clears what was at an earlier one and is not now.
func (s *Source) Set(found ...Finding) {
	now := map[string]saying{}
	for _, f := range found {
		now[f.Code] = saying{f.Level, f.What}
		if was, there := s.said[f.Code]; !there || was != now[f.Code] {
			s.board.Raise(f)
		}
	}
	for code := range s.said {
		if _, there := now[code]; !there {
			s.board.Clear(code)
		}
	}
	s.said = now
}
