package probe

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// PortRange are the TCP ports from Lo to Hi, both included.
type PortRange struct{ Lo, Hi uint16 }

func (r PortRange) String() string {
	if r.Lo == r.Hi {
		return strconv.Itoa(int(r.Lo)) + "/tcp"
	}
	return fmt.Sprintf("%d-%d/tcp", r.Lo, r.Hi)
}

func (r PortRange) has(port uint16) bool { return r.Lo <= port && port <= r.Hi }

// Listen looks whether somebody listens on the ports, at one of the addresses or
// at a wildcard address. The error is a reason for the log.
//
// Each range of a single port needs its listener. In longer ranges a service may
// open ports when it needs them, as FTP does for its data, so these need none if
// there are single ports to go by, and otherwise one listener in all. A listener
// of either IP version counts for both: nothing in /proc tells whether one at ::
// takes IPv4 as well, and a service may be meant for one version alone.
func Listen(ports []PortRange, addresses []netip.Addr) error {
	return listen("/proc/net", ports, addresses)
}

func listen(dir string, ports []PortRange, addresses []netip.Addr) error {
	heard := make([]bool, len(ports))
	for _, name := range []string{"tcp", "tcp6"} {
		err := readListeners(filepath.Join(dir, name), func(at netip.AddrPort) {
			if a := at.Addr().Unmap(); !a.IsUnspecified() && !slices.Contains(addresses, a) {
				return
			}
			for i, r := range ports {
				heard[i] = heard[i] || r.has(at.Port())
			}
		})
		if name == "tcp6" && errors.Is(err, fs.ErrNotExist) { // a kernel without IPv6
			continue
		}
		if err != nil {
			return fmt.Errorf("looking for listeners: %w", err)
		}
	}
	return missing(ports, heard)
}

// missing is the error for the ranges that lack a listener they need.
func missing(ports []PortRange, heard []bool) error {
	singles := false
	for i, r := range ports {
		if r.Lo != r.Hi {
			continue
		}
		singles = true
		if !heard[i] {
			return fmt.Errorf("nobody listens on %v", r)
		}
	}
	if singles || len(ports) == 0 || slices.Contains(heard, true) {
		return nil
	}
	return fmt.Errorf("nobody listens on %s", strings.Trim(fmt.Sprint(ports), "[]"))
}

func readListeners(path string, each func(netip.AddrPort)) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := parseListeners(f, each); err != nil {
		return fmt.Errorf("reading %s: %w", path, err)
	}
	return nil
}

const (
	maxListeners = 1 << 16
	maxSockLine  = 512 // the kernel's lines have less than 200 bytes

	// include/net/tcp_states.h
	tcpClose  = 7
	tcpListen = 10
)

// parseListeners reads /proc/net/tcp or tcp6 (get_tcp4_sock in the kernel's
// net/ipv4/tcp_ipv4.c) and gives the address of each listener.
//
// The kernel shows the listeners first (tcp_get_idx, ibid.), and the reading ends
// with them: there may be a hundred thousand connections behind. A listener that
// is being closed can stand between them in the state CLOSE.
func parseListeners(r io.Reader, each func(netip.AddrPort)) error {
	lines := bufio.NewScanner(r)
	lines.Buffer(make([]byte, 0, maxSockLine), maxSockLine)
	if !lines.Scan() || !bytes.Contains(lines.Bytes(), []byte("local_address")) {
		return errors.Join(errors.New("this is no table of sockets"), lines.Err())
	}
	for n := 0; lines.Scan(); n++ {
		if n == maxListeners {
			return fmt.Errorf("more than %d listeners", maxListeners)
		}
		at, state, err := parseSocket(lines.Bytes())
		if err != nil {
			return err
		}
		switch state {
		case tcpListen:
			each(at)
		case tcpClose:
		default:
			return nil
		}
	}
	return lines.Err()
}

// parseSocket reads the local address and the state, fields 2 and 4 of a line.
func parseSocket(line []byte) (at netip.AddrPort, state uint64, err error) {
	fields := bytes.Fields(line)
	if len(fields) < 4 {
		return at, 0, fmt.Errorf("the line %q is too short", line)
	}
	host, port, _ := bytes.Cut(fields[1], []byte(":"))
	p, err := strconv.ParseUint(string(port), 16, 16)
	if err != nil {
		return at, 0, fmt.Errorf("the port of %q: %w", fields[1], err)
	}
	state, err = strconv.ParseUint(string(fields[3]), 16, 8)
	if err != nil {
		return at, 0, fmt.Errorf("the state of a socket: %w", err)
	}
	a, ok := parseHost(host)
	if !ok {
		return at, 0, fmt.Errorf("the address of %q is none", fields[1])
	}
	return netip.AddrPortFrom(a, uint16(p)), state, nil
}

// parseHost reads an address as the kernel prints it: each four bytes of it as
// one number of the machine's own byte order.
func parseHost(text []byte) (netip.Addr, bool) {
	var b [16]byte
	if len(text) > 2*len(b) {
		return netip.Addr{}, false
	}
	n, err := hex.Decode(b[:], text)
	if err != nil || n != 4 && n != 16 {
		return netip.Addr{}, false
	}
	for w := b[:n]; len(w) > 0; w = w[4:] {
		binary.NativeEndian.PutUint32(w, binary.BigEndian.Uint32(w))
	}
	return netip.AddrFromSlice(b[:n])
}
