package load

import (
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// TestReader has this machine work until its kernel says so, and compares the number of
// sockets with some of its own.
func TestReader(t *testing.T) {
	r, err := Open(ProcStat, ProcSockets, ProcSockets6)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	before, socketsBefore, err := r.Read()
	if err != nil {
		t.Fatal(err)
	}
	const n = 200 // so that what others do on the machine is small beside it
	for range n {
		l, err := net.Listen("tcp4", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
	}
	m := NewMeter(0)
	m.Add(before, 0, 0)
	for start := time.Now(); ; {
		now, sockets, err := r.Read()
		if err != nil || sockets < socketsBefore+n/2 {
			t.Fatalf("%d sockets before and %d after %d were opened, %v", socketsBefore, sockets, n, err)
		}
		if got := m.Add(now, 0, time.Since(start)); got.Busy > 0 {
			break
		}
		if time.Since(start) > 10*time.Second {
			t.Fatalf("ten seconds of work are not seen: %+v, then %+v", before, now)
		}
	}
}

// TestReaderFiles: a file that is written anew is read anew, and what is wrong with one is
// said with its name.
func TestReaderFiles(t *testing.T) {
	dir := t.TempDir()
	write := func(name, text string) string {
		t.Helper()
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		return path
	}
	stat, sockets := write("stat", "cpu 1 0 0 2 0\n"), write("sockets", "TCP: inuse 5\n")
	r, err := Open(stat, sockets, filepath.Join(dir, "none"))
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	for _, want := range []Stat{{1, 2}, {30, 40}} {
		if got, n, err := r.Read(); got != want || n != 5 || err != nil {
			t.Errorf("%+v, %d, %v; want %+v and 5", got, n, err, want)
		}
		write("stat", "cpu 30 0 0 40 0\n")
	}
	for path, name := range map[string]string{stat: "stat", sockets: "sockets"} {
		write(name, "intr 1\n")
		if _, _, err := r.Read(); err == nil || !strings.Contains(err.Error(), path) {
			t.Errorf("something else: %v", err)
		}
		write("stat", "cpu 1 0 0 2 0\n")
	}
	for _, none := range [][2]string{{stat + ".none", sockets}, {stat, sockets + ".none"}} {
		if _, err := Open(none[0], none[1], ""); err == nil || !strings.Contains(err.Error(), ".none") {
			t.Errorf("a file that is not there was opened: %v", err)
		}
	}
}
