package health

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestCommand(t *testing.T) {
	for _, tt := range []struct{ script, want string }{
		{"exit 0", "<nil>"},
		{"echo all is well", "<nil>"},
		{"exit 3", "exit code 3"},
		{"echo starting; echo disk is full >&2; echo; exit 2", "exit code 2: disk is full"},
		{"printf 'no newline'; exit 1", "exit code 1: no newline"},
		{`printf '\033[2Jforged\n'; exit 1`, "exit code 1: ·[2Jforged"},
		{"head -c 1000000 /dev/zero | tr '\\0' x; exit 1", "exit code 1: " + strings.Repeat("x", maxOutput)},
		{"kill -TERM $$", "signal: terminated"},
		{"read x", "exit code 1"}, // there is nothing to read
		{"pwd; echo $HOME $WHO $NOTIFY_SOCKET; exit 1", "exit code 1: / me"},
		{"ls / >/dev/null", "<nil>"}, // found by PATH
	} {
		c := &command{argv: []string{"/bin/sh", "-c", tt.script}, env: []string{"WHO=me"}}
		t.Setenv("NOTIFY_SOCKET", "/engine")
		if got := fmt.Sprint(c.run(t.Context())); got != tt.want {
			t.Errorf("%s: %q; want %q", tt.script, got, tt.want)
		}
	}
	c := &command{argv: []string{"/nonexistent"}}
	if err := c.run(t.Context()); err == nil || !strings.Contains(err.Error(), "no such file") {
		t.Errorf("a program that is not there: %v", err)
	}
}

// TestCommandLate: at the timeout the whole group is killed, and the reason has
// what the program said so far.
func TestCommandLate(t *testing.T) {
	pids := filepath.Join(t.TempDir(), "pids")
	c := &command{argv: []string{"/bin/sh", "-c", "echo waiting for the disk; sleep 1000 & echo $$ $! >" + pids + ".new; mv " + pids + ".new " + pids + "; wait"}}
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		defer cancel()
		for _, err := os.Stat(pids); err != nil && t.Context().Err() == nil; _, err = os.Stat(pids) {
			time.Sleep(time.Millisecond)
		}
	}()
	if err := c.run(ctx); fmt.Sprint(err) != "no answer in time: waiting for the disk" {
		t.Errorf("a hanging check: %v", err)
	}
	wantGone(t, pids)
}

// TestCommandLeavesNothing: a check that ends may not leave processes, be it that
// they hold its output open.
func TestCommandLeavesNothing(t *testing.T) {
	pids := filepath.Join(t.TempDir(), "pids")
	c := &command{argv: []string{"/bin/sh", "-c", "sleep 1000 & echo $! >" + pids}}
	if err := c.run(t.Context()); err != nil {
		t.Errorf("a check that is well: %v", err)
	}
	wantGone(t, pids)
}

// TestCommandOutOfReach: a process that left the group holds the output open.
func TestCommandOutOfReach(t *testing.T) {
	if _, err := exec.LookPath("setsid"); err != nil {
		t.Skip("needs setsid (Debian package util-linux)")
	}
	pids := filepath.Join(t.TempDir(), "pids")
	c := &command{argv: []string{"/bin/sh", "-c", "setsid sh -c 'echo $$ >" + pids + "; exec sleep 1000' & while ! [ -s " + pids + " ]; do :; done; echo gone; exit 4"}}
	if err := c.run(t.Context()); fmt.Sprint(err) != "exit code 4: gone" {
		t.Errorf("a check that left a process: %v", err)
	}
	for _, pid := range readPids(t, pids) {
		if err := unix.Kill(pid, unix.SIGKILL); err != nil {
			t.Errorf("killing what was left: %v", err)
		}
	}
}

// TestCommandStuck: while a process cannot be killed no other is started.
func TestCommandStuck(t *testing.T) {
	ran := filepath.Join(t.TempDir(), "ran")
	c := &command{argv: []string{"/bin/sh", "-c", "echo >" + ran}, stuck: make(chan struct{})}
	if err := c.run(t.Context()); err == nil || !strings.Contains(err.Error(), "cannot be killed") {
		t.Errorf("beside a stuck one: %v", err)
	}
	if _, err := os.Stat(ran); err == nil {
		t.Error("a second process ran beside a stuck one")
	}
	close(c.stuck)
	if err := c.run(t.Context()); err != nil {
		t.Errorf("after it has ended: %v", err)
	}
}

// TestCommandIsNotSpared: a check has the oom_score_adj of any process, whatever
// the engine's is. The test has a higher one than usual, which takes no privilege.
func TestCommandIsNotSpared(t *testing.T) {
	const file = "/proc/self/oom_score_adj"
	before, err := os.ReadFile(file)
	if err == nil {
		err = os.WriteFile(file, []byte("300"), 0)
	}
	if err != nil {
		t.Skip("needs an oom_score_adj of its own: ", err)
	}
	defer os.WriteFile(file, before, 0)
	c := &command{argv: []string{"/bin/sh", "-c", "until read x </proc/$$/oom_score_adj && [ $x = 0 ]; do :; done"}}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	if err := c.run(ctx); err != nil {
		t.Errorf("a check keeps the engine's oom_score_adj: %v", err)
	}
}

func TestLastLine(t *testing.T) {
	for _, tt := range []struct {
		writes []string
		want   string
	}{
		{nil, "why"},
		{[]string{"a\n", "b"}, "why: b"},
		{[]string{"a", "b\n\n \n"}, "why: ab"},
		{[]string{"  a  \r\n"}, "why: a"},
		{[]string{strings.Repeat("x", 1000), "y\n"}, "why: " + strings.Repeat("x", maxOutput)},
		{[]string{strings.Repeat("x", 1000), "\ny\n"}, "why: y"},
	} {
		l := new(lastLine)
		for _, w := range tt.writes {
			if n, err := l.Write([]byte(w)); n != len(w) || err != nil {
				t.Errorf("Write = %d, %v; want %d", n, err, len(w))
			}
		}
		if got := l.explain("why").Error(); got != tt.want {
			t.Errorf("%.50q: %q; want %q", tt.writes, got, tt.want)
		}
	}
}

func readPids(t *testing.T, file string) (pids []int) {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	for f := range strings.FieldsSeq(string(b)) {
		pid, err := strconv.Atoi(f)
		if err != nil {
			t.Fatal(err)
		}
		pids = append(pids, pid)
	}
	return pids
}

// wantGone waits until the processes of a file have ended. An orphan that
// nobody reaps has ended too.
func wantGone(t *testing.T, file string) {
	t.Helper()
	for _, pid := range readPids(t, file) {
		for deadline := time.Now().Add(5 * time.Second); ; time.Sleep(time.Millisecond) {
			stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
			if err != nil || strings.Contains(string(stat), ") Z ") {
				break
			}
			if time.Now().After(deadline) {
				t.Errorf("process %d is left: %s", pid, stat)
				_ = unix.Kill(pid, unix.SIGKILL)
				break
			}
		}
	}
}
