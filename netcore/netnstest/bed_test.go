package netnstest

import (
	"net"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

var cloneMAC = net.HardwareAddr{0x02, 0xcc, 0x0a, 0x4d, 0x00, 0x0a}

func TestMain(m *testing.M) {
	os.Exit(Main(m, map[string]func([]string) int{
		"say": func(args []string) int { println(strings.Join(args, " ")); return 3 },
	}))
}

// TestViolationIsSeen sends the one frame that must never be, and sees both
// what it does to a switch and that the bed notices.
func TestViolationIsSeen(t *testing.T) {
	b := New(t, cloneMAC)
	h := b.Host("bad", "", "10.77.0.1/24")
	frame := append(append([]byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}, cloneMAC...), make([]byte, 48)...)
	if err := h.Do(func() error {
		ifi, err := net.InterfaceByName("eth0")
		if err != nil {
			return err
		}
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		return unix.Sendto(fd, frame, 0, &unix.SockaddrLinklayer{Ifindex: ifi.Index})
	}); err != nil {
		t.Fatal(err)
	}
	if port := b.Learned()[cloneMAC.String()]; port != "bad" {
		t.Errorf("the switch has the clone MAC at port %q; want bad", port)
	}
	frames, dropped, violations, err := b.capture.stop()
	if err != nil || frames == 0 || dropped != 0 || len(violations) != 1 {
		t.Errorf("captured %d frames, %d dropped, violations %q, %v; want one violation", frames, dropped, violations, err)
	}
	b.capture.violations = nil // or this test would fail, as others should
}

func TestProgramsRunInTheirNamespace(t *testing.T) {
	b := New(t, cloneMAC)
	h := b.Host("one", "52:54:00:77:00:01", "10.77.0.1/24")
	if h.MAC != "52:54:00:77:00:01" {
		t.Errorf("MAC = %s", h.MAC)
	}
	p := h.Start("say", "hello", "there")
	p.Await(0, "hello there")
	if err := p.Wait(); err == nil || !strings.Contains(err.Error(), "exit status 3") {
		t.Errorf("Wait = %v; want exit status 3", err)
	}
	if out := h.Run("ip", "-br", "addr", "show", "eth0"); !strings.Contains(out, "10.77.0.1/24") {
		t.Errorf("eth0 has %s", out)
	}
	if _, err := h.Try("false"); err == nil {
		t.Error("Try(false) gives no error")
	}
	two := b.Host("two", "", "10.77.0.2/24")
	two.Run("ping", "-c", "1", "-W", "5", "10.77.0.1")
	learned := b.Learned()
	if learned[h.MAC] != "one" || learned[two.MAC] != "two" {
		t.Errorf("the switch has learned %v", learned)
	}
	b.Unplug(h)
	if _, err := two.Try("ping", "-c", "1", "-W", "1", "10.77.0.1"); err == nil {
		t.Error("a host whose cable is out answers")
	}
	b.Plug(h)
	two.Run("ping", "-c", "3", "-W", "5", "10.77.0.1")
}

// TestNothingIsLeft builds a bed in a subtest and looks for what it left.
func TestNothingIsLeft(t *testing.T) {
	var names []string
	t.Run("bed", func(t *testing.T) {
		b := New(t, cloneMAC)
		h := b.Host("one", "")
		h.StartCommand("sleep", "1000")
		names = []string{b.Switch.NS, h.NS}
	})
	if len(names) == 0 {
		t.Skip("needs network namespaces")
	}
	out, err := exec.Command("ip", "netns", "list").Output()
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(out)) {
		if name, _, _ := strings.Cut(strings.TrimSpace(line), " "); slices.Contains(names, name) {
			t.Errorf("namespace %s is left", name)
		}
	}
}
