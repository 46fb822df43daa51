package netnstest

import (
	"net"
	"os/exec"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func (h *Host) reaches(address string) bool {
	_, err := h.Try("ping", "-c", "1", "-W", "1", address)
	return err == nil
}

// hears tells whether frames from one host get to another, who need not answer.
func (h *Host) hears(t *testing.T, from *Host, etherType uint16) bool {
	t.Helper()
	var sock [2]int
	for i, host := range []*Host{from, h} {
		if err := host.Do(func() (err error) {
			ifi, err := net.InterfaceByName("eth0")
			if err != nil {
				return err
			}
			if sock[i], err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0); err != nil {
				return err
			}
			timeout := unix.NsecToTimeval(500e6)
			if err := unix.SetsockoptTimeval(sock[i], unix.SOL_SOCKET, unix.SO_RCVTIMEO, &timeout); err != nil {
				return err
			}
			return unix.Bind(sock[i], &unix.SockaddrLinklayer{Ifindex: ifi.Index, Protocol: etherType<<8 | etherType>>8})
		}); err != nil {
			t.Fatal(err)
		}
		defer unix.Close(sock[i])
	}
	frame := append([]byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 2, 0, 0, 0, 0, 1, byte(etherType >> 8), byte(etherType)}, make([]byte, 46)...)
	if _, err := unix.Write(sock[0], frame); err != nil {
		t.Fatal(err)
	}
	_, err := unix.Read(sock[1], make([]byte, 100))
	return err == nil
}

func TestCut(t *testing.T) {
	const beacons, others = 0x88b5, 0x88b6
	for _, tt := range []struct {
		name string
		cuts []struct {
			Direction
			etherType uint16
		}
		beaconsIn, othersIn, beaconsOut, othersOut bool
	}{
		{"nothing", nil, true, true, true, true},
		{"all to the host", []struct {
			Direction
			etherType uint16
		}{{ToHost, 0}}, false, false, true, true},
		{"all from the host", []struct {
			Direction
			etherType uint16
		}{{FromHost, 0}}, true, true, false, false},
		{"beacons both ways", []struct {
			Direction
			etherType uint16
		}{{FromHost, beacons}, {ToHost, beacons}}, false, true, false, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			b := New(t, cloneMAC)
			one, two := b.Host("one", "", "10.77.0.1/24"), b.Host("two", "", "10.77.0.2/24")
			for _, c := range tt.cuts {
				b.Cut(one, c.Direction, c.etherType)
			}
			if in, out := one.hears(t, two, beacons), two.hears(t, one, beacons); in != tt.beaconsIn || out != tt.beaconsOut {
				t.Errorf("beacons come in: %v, out: %v; want %v, %v", in, out, tt.beaconsIn, tt.beaconsOut)
			}
			if in, out := one.hears(t, two, others), two.hears(t, one, others); in != tt.othersIn || out != tt.othersOut {
				t.Errorf("other frames come in: %v, out: %v; want %v, %v", in, out, tt.othersIn, tt.othersOut)
			}
			if len(tt.cuts) > 0 {
				b.Mend(one)
			}
			if !one.reaches("10.77.0.2") {
				t.Error("mended, they do not reach each other")
			}
		})
	}
}

func TestPart(t *testing.T) {
	b := New(t, cloneMAC)
	one, two, three := b.Host("one", "", "10.77.0.1/24"), b.Host("two", "", "10.77.0.2/24"), b.Host("three", "", "10.77.0.3/24")
	b.Part(two, three)
	if one.reaches("10.77.0.2") || !two.reaches("10.77.0.3") {
		t.Error("the parts are not as they should be")
	}
	if carrier := strings.TrimSpace(two.Run("cat", "/sys/class/net/eth0/carrier")); carrier != "1" {
		t.Errorf("the carrier of a parted host is %s; want 1", carrier)
	}
	b.Heal()
	// The switch takes its time to forward on a port that came up.
	healed := func() bool { return one.reaches("10.77.0.2") && three.reaches("10.77.0.1") }
	for range 10 {
		if healed() {
			return
		}
	}
	t.Error("healed, they do not reach each other")
}

func TestPower(t *testing.T) {
	b := New(t, cloneMAC)
	one, two := b.Host("one", "52:54:00:77:00:01", "10.77.0.1/24"), b.Host("two", "", "10.77.0.2/24")
	one.Run("ip", "link", "add", "left-over", "type", "bridge")
	p := one.StartCommand("sleep", "1000")
	one.PowerOff()
	if err := p.Wait(); err == nil || !strings.Contains(err.Error(), "killed") {
		t.Errorf("the program ended with %v; want killed", err)
	}
	if two.reaches("10.77.0.1") {
		t.Error("a host without power answers")
	}
	one.PowerOn()
	if !two.reaches("10.77.0.1") {
		t.Error("with power again, the host does not answer")
	}
	if got := one.Run("ip", "-br", "link"); strings.Contains(got, "left-over") || !strings.Contains(got, one.MAC) {
		t.Errorf("after power-on the host has %s", got)
	}
}

func TestSniff(t *testing.T) {
	b := New(t, cloneMAC)
	one := b.Host("one", "", "10.77.0.1/24")
	b.Host("two", "", "10.77.0.2/24")
	s := one.Sniff("icmp")
	one.Run("ping", "-c", "3", "-i", "0.01", "-W", "5", "10.77.0.2")
	out, err := exec.Command("tshark", "-r", s.Stop(), "-Y", "icmp").CombinedOutput()
	if n := strings.Count(string(out), "Echo (ping)"); err != nil || n != 6 {
		t.Errorf("the capture has %d pings and answers, %v; want 6:\n%s", n, err, out)
	}
}
