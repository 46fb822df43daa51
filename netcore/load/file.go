package load

import (
	"errors"
	"fmt"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// file is one of /proc that is read again and again. It stays open, and it is read without
// word to Go's runtime, as nothing in it waits: otherwise each reading would wake the
// runtime's monitor and its poller, which is more work than the reading.
type file struct {
	path string
	fd   int // -1: it is not there
	b    [4096]byte
}

func open(path string) (file, error) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return file{fd: -1}, &os.PathError{Op: "open", Path: path, Err: err}
	}
	return file{path: path, fd: fd}, nil
}

// read gives the beginning of the file, up to n octets. They are valid until the next call.
func (f *file) read(n int) ([]byte, error) {
	for {
		got, _, errno := unix.RawSyscall6(unix.SYS_PREAD64, uintptr(f.fd), uintptr(unsafe.Pointer(&f.b)), uintptr(min(n, len(f.b))), 0, 0, 0)
		if errno == 0 {
			return f.b[:got], nil
		}
		if errno != unix.EINTR {
			return nil, &os.PathError{Op: "read", Path: f.path, Err: errno}
		}
	}
}

func (f *file) close() error {
	if f.fd < 0 {
		return nil
	}
	fd := f.fd
	f.fd = -1
	return os.NewSyscallError("close", unix.Close(fd))
}

// Reader reads what a Meter is given, of the network namespace in which it was opened.
type Reader struct{ stat, sockets, sockets6 file }

// Open opens files in the form of ProcStat, ProcSockets and ProcSockets6, of which the last
// need not be there.
func Open(stat, sockets, sockets6 string) (r *Reader, err error) {
	r = &Reader{file{fd: -1}, file{fd: -1}, file{fd: -1}}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("how busy this machine is: %w", err), r.Close())
			r = nil
		}
	}()
	if r.stat, err = open(stat); err != nil {
		return r, err
	}
	if r.sockets, err = open(sockets); err != nil {
		return r, err
	}
	if r.sockets6, err = open(sockets6); errors.Is(err, os.ErrNotExist) { // a kernel without IPv6
		err = nil
	}
	return r, err
}

// Close closes them.
func (r *Reader) Close() error {
	return errors.Join(r.stat.close(), r.sockets.close(), r.sockets6.close())
}

// Read gives the processor times, and the number of TCP sockets in use: a measure of
// concurrency that costs the same however many there are.
func (r *Reader) Read() (stat Stat, sockets int, err error) {
	b, err := r.stat.read(longestLine)
	if err == nil {
		stat, err = parseStat(b)
	}
	if err != nil {
		return Stat{}, 0, fmt.Errorf("reading the CPU times from %s: %w", r.stat.path, err)
	}
	for _, f := range []*file{&r.sockets, &r.sockets6} {
		if f.fd < 0 {
			continue
		}
		b, err := f.read(len(f.b))
		n := 0
		if err == nil {
			n, err = parseSockets(b)
		}
		if err != nil {
			return Stat{}, 0, fmt.Errorf("counting sockets in %s: %w", f.path, err)
		}
		sockets += n
	}
	return stat, sockets, nil
}
