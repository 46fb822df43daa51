package membership

import (
	"errors"
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
// does without the runtime's poller. None of the other system calls waits, so the
// runtime is not told of them, which would wake its monitor.
type Link struct {
	fd     int
	waiter *realtime.Waiter
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
	l, err := newLink(conn)
	if err != nil {
		return nil, fmt.Errorf("preparing the beacon socket on %s: %w", name, err)
	}
	return l, nil
}

// newLink makes a link of a socket, which it closes if it cannot.
func newLink(conn *packet.Conn) (_ *Link, err error) {
	l := &Link{fd: -1}
	if err = conn.JoinGroup(Group[:]); err != nil {
		err = fmt.Errorf("joining the beacon group: %w", err)
	} else {
		l.fd, err = realtime.Unpolled(conn)
	}
	if err != nil {
		_ = conn.Close()
		return nil, err
	}
	// Room for the frames of 255 nodes while this one is held up, and for a flood.
	_ = unix.SetsockoptInt(l.fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 2<<20)
	// Before everything else in the NIC's queue (pfifo_fast, TC_PRIO_CONTROL).
	_ = unix.SetsockoptInt(l.fd, unix.SOL_SOCKET, unix.SO_PRIORITY, 7)
	if l.waiter, err = realtime.NewWaiter(l.fd); err != nil {
		_ = unix.Close(l.fd)
		return nil, err
	}
	return l, nil
}

// Close closes the socket. Nobody may wait in it.
func (l *Link) Close() error {
	return errors.Join(l.waiter.Close(), os.NewSyscallError("close", unix.Close(l.fd)))
}

// wait returns when there is a frame, after Wake, or after d.
func (l *Link) wait(d time.Duration) { l.waiter.Wait(d) }

// Wake ends a wait.
func (l *Link) Wake() { l.waiter.Wake() }

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
