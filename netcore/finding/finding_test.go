package finding

import (
	"encoding/json"
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
	if want := []string{"+b", "+c", "+a", "-b"}; !slices.Equal(told, want) {
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
