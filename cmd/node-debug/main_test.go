package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestRun(t *testing.T) {
	dir := t.TempDir()
	var out strings.Builder
	for _, tc := range []struct {
		args []string
		code int
	}{
		{[]string{"/bin/touch", filepath.Join(dir, "a")}, 0},
		{[]string{"node-debug", "mkdir", filepath.Join(dir, "b")}, 0},
		{[]string{"/bin/rm", filepath.Join(dir, "none")}, 1},
		{[]string{"node-debug", "nonsense"}, 2},
		{[]string{"node-debug"}, 2},
	} {
		if code := run(tc.args, &out); code != tc.code {
			t.Errorf("run(%q) = %d; want %d\n%s", tc.args, code, tc.code, &out)
		}
	}
	for _, name := range []string{"a", "b"} {
		if _, err := os.Stat(filepath.Join(dir, name)); err != nil {
			t.Error(err)
		}
	}
	if !strings.Contains(out.String(), "commands: [base64 cat") {
		t.Errorf("usage = %s", &out)
	}
}
