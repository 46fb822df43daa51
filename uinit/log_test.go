package uinit

import (
	"encoding/json"
	"fmt"
	"reflect"
	"testing"
	"time"

	"clonecluster/netcore/api"
)

// TestLinesOfAll: lines come in the order in which they were written, whoever wrote
// them, each once for whoever says where they have got to.
func TestLinesOfAll(t *testing.T) {
	at := time.Duration(0)
	j := newJournal(func() time.Duration { at += time.Second; return at })
	for i := range 6 {
		j.line([]string{"init", "engine", "web"}[i%3], fmt.Sprint(i+1))
	}
	lines, lost := j.after(0)
	if len(lines) != 6 || lost != 0 {
		t.Fatalf("%d lines, %d lost; want 6", len(lines), lost)
	}
	for i, l := range lines {
		if l.ID != uint64(i+1) || l.Text != fmt.Sprint(i+1) || l.At != float64(i+1) {
			t.Errorf("line %d is %+v", i, l)
		}
	}
	if lines, lost = j.after(4); len(lines) != 2 || lost != 0 || lines[0].ID != 5 {
		t.Errorf("after the fourth: %+v, %d lost", lines, lost)
	}
	if lines, lost = j.after(6); len(lines) != 0 || lost != 0 {
		t.Errorf("after the last: %+v, %d lost", lines, lost)
	}
	for range 2 * ringLines {
		j.line("web", "x")
	}
	if lines, lost = j.after(6); len(lines) != ringLines || lost != ringLines {
		t.Errorf("after a flood: %d lines, %d lost; want %d each", len(lines), lost, ringLines)
	}
	if lines, _ = j.after(1 << 40); len(lines) != ringLines+4 {
		t.Errorf("after one of another boot: %d lines; want all", len(lines))
	}
}

// TestBootIsWhatInitSays: the API tells of a boot what init does, by the same names.
func TestBootIsWhatInitSays(t *testing.T) {
	var have, want map[string]any
	fill := func(v any) (m map[string]any) {
		t.Helper()
		text, err := json.Marshal(v)
		if err == nil {
			err = json.Unmarshal(text, &m)
		}
		if err != nil {
			t.Fatal(err)
		}
		return m
	}
	healthy := true
	said := Status{
		Hostname: "h", Node: "n", Address: "a", Uptime: 1, Ready: true, Ending: "halt",
		Timeline: []StageStatus{{"kernel", 1}},
		Children: []ChildStatus{{Name: "web", State: "ready", Since: 1, PID: 2, Restarts: 3, LastExit: "x", Status: "s", Healthy: &healthy, Health: "h", RSS: 4}},
		Watchdog: WatchdogStatus{Device: "d", Timeout: 1, Off: "o"}, Memory: MemoryStatus{Init: 1, Engine: 2, Free: 3},
	}
	text, err := json.Marshal(said)
	if err != nil {
		t.Fatal(err)
	}
	var boot api.Boot
	if err := json.Unmarshal(text, &boot); err != nil {
		t.Fatal(err)
	}
	have, want = fill(boot), fill(said)
	var check func(path string, have, want any)
	check = func(path string, have, want any) {
		switch h := have.(type) {
		case map[string]any:
			for k, v := range h {
				check(path+"."+k, v, want.(map[string]any)[k])
			}
		case []any:
			check(path+"[0]", h[0], want.([]any)[0])
		default:
			if !reflect.DeepEqual(have, want) || reflect.ValueOf(have).IsZero() {
				t.Errorf("%s is %v; init says %v", path, have, want)
			}
		}
	}
	check("", have, want)
}
