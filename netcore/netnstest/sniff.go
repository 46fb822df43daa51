package netnstest

import (
	"bytes"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// A Sniffer is a capture at one host, by a program that is not ours.
type Sniffer struct {
	host *Host
	p    *Process
	path string
}

// markType is the EtherType of the frame that ends a capture: "local
// experimental 2" (IEEE 802).
const markType = 0x88b6

// Sniff captures the headers of the frames that pass a host's eth0 both ways
// and match a filter in the language of pcap-filter(7). It skips the test where
// there is no dumpcap, which comes with tshark.
func (h *Host) Sniff(filter string) *Sniffer {
	h.tb.Helper()
	if _, err := exec.LookPath("dumpcap"); err != nil {
		h.tb.Skip("needs dumpcap (Debian package tshark)")
	}
	s := &Sniffer{host: h, path: filepath.Join(h.bed.Dir, h.Name+".pcapng")}
	s.p = h.StartCommand("dumpcap", "-q", "-i", "eth0", "-f", fmt.Sprintf("(%s) or ether proto %#x", filter, markType),
		"-s", "128", "-B", "64", "-w", s.path)
	s.p.Await(0, "File: ")
	return s
}

// Stop ends the capture and gives the file. It fails the test if frames are
// missing in it: whoever counts them could not tell.
func (s *Sniffer) Stop() string {
	s.host.tb.Helper()
	// It reads its buffer four times a second, and when it is stopped what is in
	// there is lost. So it is stopped when a last frame is in the file.
	mark := []byte("the capture of this host ends here")
	for deadline := time.Now().Add(time.Minute); ; {
		if err := s.host.sendMark(mark); err != nil {
			s.host.tb.Fatalf("%s: marking the end of the capture: %v", s.host.Name, err)
		}
		if data, err := os.ReadFile(s.path); err == nil && bytes.Contains(data, mark) {
			break
		}
		if time.Now().After(deadline) {
			s.host.tb.Fatalf("%s: the end of the capture is not in it:\n%s", s.host.Name, s.p.Output())
		}
		time.Sleep(100 * time.Millisecond)
	}
	s.p.Signal(syscall.SIGINT)
	_ = s.p.Wait()
	m := regexp.MustCompile(`received/dropped on interface 'eth0': (\d+)/(\d+)`).FindStringSubmatch(s.p.Output())
	if m == nil {
		s.host.tb.Fatalf("%s: dumpcap does not say what it dropped:\n%s", s.host.Name, s.p.Output())
	}
	if n, err := strconv.Atoi(m[2]); err != nil || n > 0 {
		s.host.tb.Fatalf("%s: the machine is too busy: the capture lacks %s of %s frames", s.host.Name, m[2], m[1])
	}
	return s.path
}

// sendMark sends a frame to nobody.
func (h *Host) sendMark(payload []byte) error {
	frame := append([]byte{2, 0, 0, 0, 0, 0xff, 2, 0, 0, 0, 0, 0xfe, markType >> 8, markType & 0xff}, payload...)
	return h.Do(func() error {
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
	})
}
