package uinit

import (
	"errors"
	"fmt"
	"net"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// maxNotify is the longest message that is read, and maxStatus how much of a
// status text is kept.
const (
	maxNotify = 4096
	maxStatus = 256
)

// listenNotify makes the socket that children write sd_notify(3) messages to.
// The kernel adds the sender's process id, so that a message needs no trust.
func listenNotify(path string) (*net.UnixConn, error) {
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("making the notify socket: %w", err)
	}
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		return nil, fmt.Errorf("making the notify socket: %w", err)
	}
	raw, err := conn.SyscallConn()
	if err == nil {
		cerr := raw.Control(func(fd uintptr) {
			err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_PASSCRED, 1)
		})
		err = errors.Join(cerr, err)
	}
	if err == nil {
		err = os.Chmod(path, 0o600)
	}
	if err != nil {
		conn.Close()
		return nil, fmt.Errorf("making the notify socket: %w", err)
	}
	return conn, nil
}

// serveNotify reads messages until the socket is closed.
func serveNotify(conn *net.UnixConn, got func(pid int, m message)) error {
	buf := make([]byte, maxNotify)
	oob := make([]byte, unix.CmsgSpace(unix.SizeofUcred)+unix.CmsgSpace(4*253)) // SCM_MAX_FD descriptors at most
	for {
		n, oobn, flags, _, err := conn.ReadMsgUnix(buf, oob)
		if err != nil {
			return fmt.Errorf("reading the notify socket: %w", err)
		}
		pid := sender(oob[:oobn])
		if pid == 0 || flags&unix.MSG_TRUNC != 0 {
			continue
		}
		if m, ok := parseNotify(buf[:n]); ok {
			got(pid, m)
		}
	}
}

// sender is the process id in a message's control data, 0 if there is none.
// Descriptors that came along are closed: whoever sends them must not be able
// to use up init's.
func sender(oob []byte) (pid int) {
	messages, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return 0
	}
	for i := range messages {
		m := &messages[i]
		if m.Header.Level != unix.SOL_SOCKET {
			continue
		}
		switch m.Header.Type {
		case unix.SCM_CREDENTIALS:
			if c, err := unix.ParseUnixCredentials(m); err == nil {
				pid = int(c.Pid)
			}
		case unix.SCM_RIGHTS:
			fds, err := unix.ParseUnixRights(m)
			if err != nil {
				continue
			}
			for _, fd := range fds {
				unix.Close(fd)
			}
		}
	}
	return pid
}

// parseNotify reads the assignments of a message, one a line. Unknown ones are
// left to whoever knows them; ok is false if there is none that init knows.
func parseNotify(b []byte) (m message, ok bool) {
	for line := range strings.SplitSeq(string(b), "\n") {
		name, value, found := strings.Cut(line, "=")
		if !found {
			continue
		}
		switch {
		case name == "READY" && value == "1":
			m.Ready = true
		case name == "STOPPING" && value == "1":
			m.Stopping = true
		case name == "WATCHDOG" && value == "1":
			m.Watchdog = true
		case name == "STATUS":
			m.Status, m.HasStatus = printable(value[:min(len(value), maxStatus)]), true
		default:
			continue
		}
		ok = true
	}
	return m, ok
}
