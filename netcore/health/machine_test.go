package health

import (
	"errors"
	"strings"
	"testing"
)

// TestMachine writes answers as +, - and e (excused), and the states after each as s
// (starting), h (healthy) and f (failed).
func TestMachine(t *testing.T) {
	for _, tt := range []struct {
		name          string
		rise, fall    int
		answers, want string
	}{
		{"the first success decides", 3, 3, "+", "h"},
		{"no success yet is no failure", 1, 1, "-----", "sssss"},
		{"starts late", 3, 3, "----+", "ssssh"},
		{"fall", 2, 3, "+---", "hhhf"},
		{"fall in a row", 2, 3, "+--+--+---", "hhhhhhhhhf"},
		{"rise", 2, 1, "+-++", "hffh"},
		{"rise in a row", 3, 1, "+-++-++-+++", "hfffffffffh"},
		{"failed stays so", 2, 1, "+------", "hffffff"},
		{"one is enough", 1, 1, "+-+-+", "hfhfh"},
		{"zero is one", 0, 0, "+-+-+", "hfhfh"},
		{"a streak ends with its state", 2, 2, "+--++-+--", "hhffhhhhf"},
		{"excused", 1, 1, "+eeeeeeeee+", "hhhhhhhhhhh"},
		{"excused too often", 1, 1, "+eeeeeeeeee", "hhhhhhhhhhf"},
		{"excused between others", 1, 3, "+-e-e-", "hhhhhf"},
		{"no excuse for what has failed", 2, 1, "+-+e++", "hffffh"},
		{"no excuse before the start", 1, 1, "ee+", "ssh"},
		{"failures before the start do not count", 1, 3, "---+--", "ssshhh"},
	} {
		m := newMachine(tt.rise, tt.fall)
		var got strings.Builder
		for _, a := range tt.answers {
			if a == '+' {
				m.step(nil, false)
			} else {
				m.step(errors.New("bad"), a == 'e')
			}
			got.WriteByte(" shf"[m.state])
			if (m.why() == "") != (m.state == healthy) {
				t.Errorf("%s: state %d, reason %q", tt.name, m.state, m.why())
			}
		}
		if got.String() != tt.want {
			t.Errorf("%s: %s gives %s; want %s", tt.name, tt.answers, got.String(), tt.want)
		}
	}
}

func TestReason(t *testing.T) {
	m := newMachine(2, 2)
	for i, tt := range []struct {
		answer error
		want   string
	}{
		{errors.New("refused"), "starting, refused"},
		{nil, ""},
		{errors.New("one"), ""},
		{errors.New("two"), "two"},
		{errors.New("three"), "three"},
		{nil, "three"},
		{nil, ""},
	} {
		m.step(tt.answer, false)
		if got := m.why(); got != tt.want {
			t.Errorf("after answer %d, %v: reason %q; want %q", i, tt.answer, got, tt.want)
		}
	}
	if m := newMachine(1, 1); m.why() != "starting" {
		t.Errorf("before any answer: %q", m.why())
	}
}
