package membership

import (
	"encoding/binary"
	"fmt"
	"net"
	"os"
	"time"
	"unsafe"

	"github.com/mdlayher/packet"
	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"

	"clonecluster/netcore/realtime"
)

// Link sends and receives the frames on one NIC. One thread waits in it, so it
// does without the runtime's poller: whoever waits there is woken by another
// thread, which has no real-time priority. None of the other system calls waits,
// so the runtime is not told of them, which would wake its monitor.
type Link struct {
	conn  *packet.Conn
	fd    int
	wake  int // eventfd
	waits [2]unix.PollFd
}

// OpenLink opens a packet socket that hears nothing but the cluster's frames.
func OpenLink(ifindex int, name string) (*Link, error) {
	drop, accept := bpf.RetConstant{Val: 0}, bpf.RetConstant{Val: MaxFrame + 1}
	program, err := bpf.Assemble([]bpf.Instruction{
		bpf.LoadExtension{Num: bpf.ExtType},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: unix.PACKET_OUTGOING, SkipTrue: 7},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: unix.PACKET_OTHERHOST, SkipTrue: 6},
		bpf.LoadExtension{Num: bpf.ExtVLANTagPresent},
		bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: 0, SkipTrue: 4},
		bpf.LoadAbsolute{Off: 17, Size: 1},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: kindProbe, SkipTrue: 2}, // netcore/doctor hears those
		bpf.LoadAbsolute{Off: 14, Size: 2},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: 'C'<<8 | 'C', SkipTrue: 1},
		drop,
		accept,
	})
	if err != nil {
		return nil, fmt.Errorf("assembling the beacon filter: %w", err)
	}
	conn, err := packet.Listen(&net.Interface{Index: ifindex, Name: name}, packet.Raw, EtherType, &packet.Config{Filter: program})
	if err != nil {
		return nil, fmt.Errorf("opening the beacon socket on %s: %w", name, err)
	}
	l := &Link{conn: conn, wake: -1}
	if err := l.prepare(); err != nil {
		l.Close()
		return nil, fmt.Errorf("preparing the beacon socket on %s: %w", name, err)
	}
	return l, nil
}

func (l *Link) prepare() error {
	if err := l.conn.JoinGroup(Group[:]); err != nil {
		return fmt.Errorf("joining the beacon group: %w", err)
	}
	rc, err := l.conn.SyscallConn()
	if err != nil {
		return err
	}
	if err := rc.Control(func(fd uintptr) { l.fd = int(fd) }); err != nil {
		return err
	}
	// Room for the frames of 255 nodes while this one is held up, and for a flood.
	_ = unix.SetsockoptInt(l.fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 2<<20)
	// Before everything else in the NIC's queue (pfifo_fast, TC_PRIO_CONTROL).
	_ = unix.SetsockoptInt(l.fd, unix.SOL_SOCKET, unix.SO_PRIORITY, 7)
	l.wake, err = unix.Eventfd(0, unix.EFD_NONBLOCK|unix.EFD_CLOEXEC)
	return os.NewSyscallError("eventfd", err)
}

// Close closes the socket. Nobody may wait in it.
func (l *Link) Close() error {
	if l.wake >= 0 {
		_ = unix.Close(l.wake)
		l.wake = -1
	}
	return l.conn.Close()
}

// wait returns when there is a frame, after Wake, or after d.
func (l *Link) wait(d time.Duration) {
	l.waits = [2]unix.PollFd{{Fd: int32(l.fd), Events: unix.POLLIN}, {Fd: int32(l.wake), Events: unix.POLLIN}}
	realtime.Poll(l.waits[:], d) // whatever it was, the caller looks for itself
	if l.waits[1].Revents != 0 {
		var b [8]byte
		_, _, _ = unix.RawSyscall(unix.SYS_READ, uintptr(l.wake), uintptr(unsafe.Pointer(&b)), uintptr(len(b)))
	}
}

// Wake ends a wait.
func (l *Link) Wake() {
	var b [8]byte
	binary.NativeEndian.PutUint64(b[:], 1)
	_, _, _ = unix.RawSyscall(unix.SYS_WRITE, uintptr(l.wake), uintptr(unsafe.Pointer(&b)), uintptr(len(b)))
}

// receive reads a frame without waiting; 0 if there is none.
func (l *Link) receive(b []byte) (int, error) {
	for {
		n, _, errno := unix.RawSyscall6(unix.SYS_RECVFROM, uintptr(l.fd), uintptr(unsafe.Pointer(&b[0])), uintptr(len(b)), unix.MSG_DONTWAIT, 0, 0)
		switch errno {
		case 0:
			return int(n), nil
		case unix.EINTR:
		case unix.EAGAIN, unix.ENETDOWN: // the socket works again when the NIC is up
			return 0, nil
		default:
			return 0, errno
		}
	}
}

// send sends a frame without waiting: the next one says more than a late one.
func (l *Link) send(frame []byte) error {
	_, _, errno := unix.RawSyscall6(unix.SYS_SENDTO, uintptr(l.fd), uintptr(unsafe.Pointer(&frame[0])), uintptr(len(frame)), unix.MSG_DONTWAIT, 0, 0)
	if errno != 0 {
		return errno
	}
	return nil
}
