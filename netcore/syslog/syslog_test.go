package syslog

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
	"unicode/utf8"
)

var at = time.Date(2026, 1, 2, 15, 4, 5, 123456000, time.UTC)

func TestAppend(t *testing.T) {
	long := strings.Repeat("ä", MaxLength)
	for _, tt := range []struct {
		m    Message
		want string
	}{
		{Message{at, "web-1", "engine", slog.LevelInfo, `msg="all is well" n=1`}, `<30>1 2026-01-02T15:04:05.123456Z web-1 engine - - - msg="all is well" n=1`},
		{Message{at, "web-1", "engine", slog.LevelError, "x"}, `<27>1 2026-01-02T15:04:05.123456Z web-1 engine - - - x`},
		{Message{at, "web-1", "engine", slog.LevelWarn, "x"}, `<28>1 2026-01-02T15:04:05.123456Z web-1 engine - - - x`},
		{Message{at, "", "a b\nc\x00é", slog.LevelDebug, "one\ntwo\x1b[1m"}, `<31>1 2026-01-02T15:04:05.123456Z - abc - - - one two [1m`},
		{Message{at, "h", strings.Repeat("a", 60), slog.LevelInfo, ""}, `<30>1 2026-01-02T15:04:05.123456Z h ` + strings.Repeat("a", 48) + ` - - - `},
	} {
		if got := string(tt.m.Append(nil)); got != tt.want {
			t.Errorf("%+v\n%s\nwant\n%s", tt.m, got, tt.want)
		}
	}
	if got := (Message{at, "h", "a", slog.LevelInfo, long}).Append([]byte("before")); len(got) > MaxLength+6 || len(got) < MaxLength || !utf8.Valid(got) {
		t.Errorf("a long one has %d bytes, valid %v; want at most %d", len(got)-6, utf8.Valid(got), MaxLength)
	}
}

func TestParseURL(t *testing.T) {
	for text, want := range map[string]string{
		"udp://192.0.2.5:514": "udp 192.0.2.5:514", "tcp://[2001:db8::5]:601": "tcp [2001:db8::5]:601", "http://192.0.2.5:514": "", "192.0.2.5:514": "", "udp://": "", "": "",
	} {
		network, address, err := ParseURL(text)
		if got := strings.TrimSpace(network + " " + address); got != want || (err == nil) != (want != "") {
			t.Errorf("ParseURL(%q) = %q, %v; want %q", text, got, err, want)
		}
	}
}

// TestCollector: rsyslog, which we did not write, takes the messages apart, by UDP and
// by TCP, also after it was started again.
func TestCollector(t *testing.T) {
	path, err := exec.LookPath("rsyslogd")
	if err != nil {
		t.Skip("needs the Debian package rsyslog")
	}
	for _, network := range []string{"udp", "tcp"} {
		t.Run(network, func(t *testing.T) {
			dir := t.TempDir()
			out := filepath.Join(dir, "out")
			port := freePort(t)
			config := filepath.Join(dir, "rsyslog.conf")
			text := fmt.Sprintf(`global(workDirectory="%[1]s")
module(load="im%[2]s")
input(type="im%[2]s" address="127.0.0.1" port="%[3]d")
template(name="parts" type="string" string="%%protocol-version%%|%%pri%%|%%timereported:::date-rfc3339%%|%%hostname%%|%%app-name%%|%%msg%%\n")
action(type="omfile" file="%[4]s" template="parts")
`, dir, network, port, out)
			if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
			s := NewSender(network, fmt.Sprintf("127.0.0.1:%d", port))
			defer s.Close()
			for round := range 2 {
				ctx, cancel := context.WithCancel(t.Context())
				var said strings.Builder
				cmd := exec.CommandContext(ctx, path, "-n", "-f", config, "-i", filepath.Join(dir, "pid"))
				cmd.Stdout, cmd.Stderr = &said, &said
				if err := cmd.Start(); err != nil {
					t.Fatal(err)
				}
				line := fmt.Sprintf(`level=WARN msg="größer als 1|2" round=%d`, round)
				want := "1|28|2026-01-02T15:04:05.123456+00:00|web-1|engine|" + line
				var got string
				for deadline := time.Now().Add(20 * time.Second); time.Now().Before(deadline) && !strings.Contains(got, want); time.Sleep(100 * time.Millisecond) {
					_ = s.Send(ctx, Message{at, "web-1", "engine", slog.LevelWarn, line}) // it may not be there yet
					b, _ := os.ReadFile(out)
					got = strings.ReplaceAll(string(b), "Z|", "+00:00|")
				}
				cancel()
				_ = cmd.Wait()
				if !strings.Contains(got, want) {
					t.Fatalf("rsyslog wrote\n%s\nwant\n%s\n%s", got, want, &said)
				}
			}
		})
	}
}

// freePort gives one of both protocols.
func freePort(t *testing.T) int {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port
}
