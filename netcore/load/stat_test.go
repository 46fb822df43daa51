package load

import (
	"strings"
	"testing"
)

func TestParseStat(t *testing.T) {
	for _, tt := range []struct {
		name, text string
		want       Stat
		wrong      string // part of the error
	}{
		{"kernel 6.12", "cpu  100 20 3000 40000 500 6 70 800 50 1\ncpu0 1 2 3\nintr 1\n", Stat{100 + 20 + 3000 + 6 + 70 + 800, 40500}, ""},
		{"guest time is not counted twice", "cpu 10 0 0 0 0 0 0 0 10 0\n", Stat{10, 0}, ""},
		{"steal", "cpu 0 0 0 1 0 0 0 3\n", Stat{3, 1}, ""},
		{"without steal", "cpu 1 2 3 4 5 6 7\n", Stat{19, 9}, ""},
		{"old kernel", "cpu 1 2 3 4\n", Stat{6, 4}, ""},
		{"columns to come", "cpu 1 2 3 4 5 6 7 8 9 10 x\n", Stat{27, 9}, ""},
		{"largest", "cpu 18446744073709551615 0 0 18446744073709551615 0\n", Stat{1<<64 - 1, 1<<64 - 1}, ""},
		{"empty", "", Stat{}, "no end"},
		{"cut off", "cpu 1 2 3 4", Stat{}, "no end"},
		{"endless", "cpu " + strings.Repeat("1 ", 1000) + "\n", Stat{}, "no end"},
		{"one CPU", "cpu0 1 2 3 4\n", Stat{}, "not that of all CPUs"},
		{"too few", "cpu 1 2 3\n", Stat{}, "not that of all CPUs"},
		{"negative", "cpu 1 2 3 -4\n", Stat{}, "invalid syntax"},
		{"no number", "cpu 1 2 x 4\n", Stat{}, "invalid syntax"},
		{"too large", "cpu 18446744073709551616 0 0 0\n", Stat{}, "out of range"},
		{"overflow of busy", "cpu 18446744073709551615 1 0 0\n", Stat{}, "overflow"},
		{"overflow of idle", "cpu 0 0 0 18446744073709551615 1\n", Stat{}, "overflow"},
	} {
		got, err := parseStat([]byte(tt.text))
		if got != tt.want || (err == nil) != (tt.wrong == "") || err != nil && !strings.Contains(err.Error(), tt.wrong) {
			t.Errorf("%s: parseStat = %+v, %v; want %+v, %q", tt.name, got, err, tt.want, tt.wrong)
		}
	}
}

func FuzzParseStat(f *testing.F) {
	f.Add("cpu  124481 0 51004 23824 805 0 397 0 0 0\ncpu0 1\n")
	f.Add("cpu 18446744073709551615 1 0 0\n")
	f.Add("cpu")
	f.Fuzz(func(t *testing.T, text string) {
		s, err := parseStat([]byte(text))
		if err != nil && s != (Stat{}) {
			t.Errorf("parseStat(%q) = %+v and %v", text, s, err)
		}
		if err == nil && !strings.Contains(text[:min(len(text), 512)], "cpu") {
			t.Errorf("parseStat(%q) = %+v", text, s)
		}
	})
}
