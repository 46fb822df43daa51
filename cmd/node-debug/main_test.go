package main

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
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

// A terminal, Enter, a command, end of file: the shell runs, and the offer
// comes again.
func TestConsole(t *testing.T) {
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR, 0)
	if err != nil {
		t.Skip("no pseudo-terminals here:", err)
	}
	defer master.Close()
	if err := unix.IoctlSetPointerInt(int(master.Fd()), unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	n, err := unix.IoctlGetInt(int(master.Fd()), unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	slave, err := os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan int)
	go func() {
		code := console(slave, slave, "/bin/sh")
		slave.Close()
		done <- code
	}()
	in := bufio.NewReader(master)
	see := func(want string) {
		t.Helper()
		for {
			line, err := in.ReadString('\n')
			if err != nil {
				t.Fatalf("waiting for %q: %v", want, err)
			}
			if strings.Contains(line, want) && !strings.Contains(line, "echo") {
				return
			}
		}
	}
	see("press Enter")
	io.WriteString(master, "\n")
	io.WriteString(master, "echo in $((40+2))\n")
	see("in 42")
	io.WriteString(master, "exit\n")
	see("press Enter")
	io.WriteString(master, "\x04") // end of file: the console is gone
	if code := <-done; code != 1 {
		t.Errorf("console returned %d", code)
	}
}
