package realtime

import (
	"encoding/binary"
	"fmt"
	"io"
	"os"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// A Waiter is how a thread waits for a file of its own, past the runtime's poller: whoever
// waits in that is woken by another thread, which takes time of its own and has no priority.
type Waiter struct {
	file  int
	event atomic.Int32 // an eventfd; -1: it is closed
}

// NewWaiter waits for a file.
func NewWaiter(file int) (*Waiter, error) {
	event, err := unix.Eventfd(0, unix.EFD_NONBLOCK|unix.EFD_CLOEXEC)
	if err != nil {
		return nil, os.NewSyscallError("eventfd", err)
	}
	w := &Waiter{file: file}
	w.event.Store(int32(event))
	return w, nil
}

// Wait returns when there is something to read, after Wake, after d, or sooner. It is for
// one goroutine at a time.
func (w *Waiter) Wait(d time.Duration) {
	event := w.event.Load()
	fds := [2]unix.PollFd{{Fd: int32(w.file), Events: unix.POLLIN}, {Fd: event, Events: unix.POLLIN}}
	Poll(fds[:], d)
	if fds[1].Revents != 0 {
		var b [8]byte
		_, _, _ = unix.RawSyscall(unix.SYS_READ, uintptr(event), uintptr(unsafe.Pointer(&b)), uintptr(len(b)))
	}
}

// Wake ends a wait: the next one, if nobody waits. Anybody may call it, and after Close it
// does nothing.
func (w *Waiter) Wake() {
	event := w.event.Load()
	if event < 0 {
		return
	}
	var b [8]byte
	binary.NativeEndian.PutUint64(b[:], 1)
	_, _, _ = unix.RawSyscall(unix.SYS_WRITE, uintptr(event), uintptr(unsafe.Pointer(&b)), uintptr(len(b)))
}

// Close ends the Waiter, not the file. Nobody may wait any more.
func (w *Waiter) Close() error {
	event := w.event.Swap(-1)
	if event < 0 {
		return os.ErrClosed
	}
	return os.NewSyscallError("close", unix.Close(int(event)))
}

// Unpolled takes a file out of the runtime's poller, which would else be woken, too, by all
// that comes. It closes c and gives another descriptor of the same file.
func Unpolled(c interface {
	syscall.Conn
	io.Closer
}) (fd int, err error) {
	rc, err := c.SyscallConn()
	if err != nil {
		return -1, err
	}
	var inner error
	err = rc.Control(func(was uintptr) { fd, inner = unix.FcntlInt(was, unix.F_DUPFD_CLOEXEC, 0) })
	if err == nil {
		err = inner
	}
	if err != nil {
		return -1, fmt.Errorf("another descriptor of the file: %w", err)
	}
	if err := c.Close(); err != nil {
		_ = unix.Close(fd)
		return -1, err
	}
	return fd, nil
}
