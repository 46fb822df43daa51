package realtime

import (
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Poll is ppoll(2) with all signals let in: it waits until one of the files is ready, a
// signal has come, or the time is over, and says of each file what it is in Revents. A time
// of 0 or less does not wait.
//
// An ordinary system call keeps its place among the goroutines that run (Go's P) until the
// runtime's monitor takes it away, for which that looks every 20 µs and more, ten
// milliseconds long. Of a thread that waits for some milliseconds again and again that is
// more work than all that it does itself. Poll gives the place up before it waits, and so
// leaves the monitor asleep.
func Poll(fds []unix.PollFd, d time.Duration) {
	ts := unix.NsecToTimespec(max(0, int64(d)))
	ppoll(unsafe.SliceData(fds), len(fds), &ts)
}

// ppoll may not be preempted or have its stack moved between the two calls of the runtime.
//
//go:nosplit
//go:norace
func ppoll(fds *unix.PollFd, n int, ts *unix.Timespec) {
	entersyscallblock()
	unix.RawSyscall6(unix.SYS_PPOLL, uintptr(unsafe.Pointer(fds)), uintptr(n), uintptr(unsafe.Pointer(ts)), 0, 0, 0)
	exitsyscall()
}

// The runtime keeps these two for those who wait in system calls of their own
// (https://go.dev/issue/67401).
//
//go:linkname entersyscallblock runtime.entersyscallblock
func entersyscallblock()

//go:linkname exitsyscall runtime.exitsyscall
func exitsyscall()
