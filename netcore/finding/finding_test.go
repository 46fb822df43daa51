package finding

import (
	"encoding/json"
	"fmt"
	"slices"
	"testing"
	"time"
)

func TestBoard(t *testing.T) {
	var told []string
	b := NewBoard(func(f Finding, raised bool) {
		if raised {
			told = append(told, "+"+f.Code)
		} else {
			told = append(told, "-"+f.Code)
		}
	})
	first := time.Unix(1, 0)
	b.Raise(Finding{Code: "b", Level: Warning, Since: first})
	b.Raise(Finding{Code: "b", Level: Critical, What: "worse", Since: time.Unix(2, 0)})
	b.Raise(Finding{Code: "c", Level: Info})
	b.Raise(Finding{Code: "a", Level: Critical})
	b.Clear("none")
	got := b.Current()
	var codes []string
	for _, f := range got {
		codes = append(codes, f.Code)
	}
	if !slices.Equal(codes, []string{"a", "b", "c"}) {
		t.Fatalf("order %v; want a, b, c", codes)
	}
	if f := got[1]; !f.Since.Equal(first) || f.Count != 2 || f.What != "worse" {
		t.Errorf("noticed twice: %+v; want the first time, count 2 and the later text", f)
	}
	if got[0].Since.IsZero() {
		t.Error("a finding without a time got none")
	}
	b.Clear("b")
	if want := []string{"+b", "+b", "+c", "+a", "-b"}; !slices.Equal(told, want) {
		t.Errorf("told %v; want %v", told, want)
	}
}

func TestLevel(t *testing.T) {
	for _, l := range []Level{Info, Warning, Critical} {
		b, err := json.Marshal(l)
		var back Level
		if err == nil {
			err = json.Unmarshal(b, &back)
		}
		if err != nil || back != l {
			t.Errorf("%v as %s came back as %v (%v)", l, b, back, err)
		}
	}
	var l Level
	if err := json.Unmarshal([]byte(`"fatal"`), &l); err == nil {
		t.Error("an unknown level was taken")
	}
}

// TestSource: what a source sees again is not counted again, and what it no longer
// sees is cleared; it leaves what others have raised.
func TestSource(t *testing.T) {
	b := NewBoard(nil)
	b.Raise(Finding{Code: "z", Level: Info})
	s := b.Source()
	look := func(want string, found ...Finding) {
		t.Helper()
		s.Set(found...)
		var got string
		for _, f := range b.Current() {
			got += fmt.Sprintf("%s%s%d ", f.Code, f.What, f.Count)
		}
		if got != want {
			t.Errorf("on the board: %q; want %q", got, want)
		}
	}
	a := Finding{Code: "a", Level: Warning, What: "x"}
	look("ax1 z1 ", a)
	look("ax1 z1 ", a)
	a.What = "y"
	look("ay2 z1 ", a)
	a.Level = Critical
	look("ay3 z1 ", a)
	if f := b.Current()[0]; f.Level != Critical {
		t.Errorf("the level is %v; want what was said last", f.Level)
	}
	look("b1 z1 ", Finding{Code: "b", Level: Critical})
	look("z1 ")
}
