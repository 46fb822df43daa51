package netnstest

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Lacks gives the first tool that this machine does not have.
func Lacks(tools ...string) error {
	for _, tool := range tools {
		if _, err := exec.LookPath(tool); err != nil {
			return err
		}
	}
	return nil
}

// Interruptible gives a context that Ctrl-C ends.
func Interruptible() (context.Context, context.CancelFunc) {
	return signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
}

// Progress prints a line over the last one at a terminal, and below it elsewhere. An empty
// one ends that.
func Progress(format string, args ...any) {
	if _, err := unix.IoctlGetTermios(int(os.Stderr.Fd()), unix.TCGETS); err == nil {
		fmt.Fprintf(os.Stderr, "\r\x1b[K"+format, args...)
	} else if format != "" {
		fmt.Fprintf(os.Stderr, format+"\n", args...)
	}
}

// Kernel is the release of this machine's.
func Kernel(tb testing.TB) string {
	tb.Helper()
	var uts unix.Utsname
	if err := unix.Uname(&uts); err != nil {
		tb.Fatal(err)
	}
	return unix.ByteSliceToString(uts.Release[:])
}

// Processor is what this machine's calls itself; empty if it does not.
func Processor(tb testing.TB) string {
	tb.Helper()
	info, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		tb.Fatal(err)
	}
	name := regexp.MustCompile(`(?m)^model name\s*: (.*)$`).FindSubmatch(info)
	if name == nil {
		return ""
	}
	return strings.TrimSpace(string(name[1]))
}

// UsableProcessors are the numbers of those that this process may run on.
func UsableProcessors() (all []int, err error) {
	var set unix.CPUSet
	if err := unix.SchedGetaffinity(0, &set); err != nil {
		return nil, err
	}
	for i := range 8 * int(unsafe.Sizeof(set)) {
		if set.IsSet(i) {
			all = append(all, i)
		}
	}
	return all, nil
}

// Pin keeps the calling thread on some of them; it has to be locked (runtime.LockOSThread).
func Pin(processors ...int) error {
	var set unix.CPUSet
	for _, i := range processors {
		set.Set(i)
	}
	return unix.SchedSetaffinity(0, &set)
}

// Times are what the processors of this machine have done since it booted, with the
// resolution of proc_stat(5), 10 ms.
type Times struct {
	Busy, Idle time.Duration
	Stolen     time.Duration // wanted, and taken by another machine on the same hardware
}

// Processors gives them.
func Processors(tb testing.TB) (t Times) {
	tb.Helper()
	data, err := os.ReadFile("/proc/stat")
	if err != nil {
		tb.Fatal(err)
	}
	line, _, _ := strings.Cut(string(data), "\n")
	for i, field := range strings.Fields(line)[1:] {
		n, err := strconv.ParseInt(field, 10, 64)
		if err != nil {
			tb.Fatal(err)
		}
		d := time.Duration(n) * 10 * time.Millisecond
		switch i {
		case 3, 4: // idle, and waiting for a disk
			t.Idle += d
		case 7:
			t.Stolen += d
		case 8, 9: // guests, which are user time already
		default:
			t.Busy += d
		}
	}
	return t
}

// Over makes a program of the test binary one for which a file of this machine, such as
// /proc/stat, is the one of its first argument: the hosts of a bed share one machine.
func Over(file, program string) func(args []string) int {
	return func(args []string) int {
		runtime.LockOSThread()
		err := func() error {
			if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
				return os.NewSyscallError("unshare", err)
			}
			if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
				return os.NewSyscallError("mount", err)
			}
			if err := unix.Mount(args[0], file, "", unix.MS_BIND, ""); err != nil {
				return fmt.Errorf("mounting %s over %s: %w", args[0], file, err)
			}
			self, err := os.Executable()
			if err != nil {
				return err
			}
			// So that the whole process has the thread's view of the files.
			return syscall.Exec(self, append([]string{self}, args[1:]...), append(os.Environ(), ProgramEnv+"="+program))
		}()
		fmt.Println(err)
		return 1
	}
}
