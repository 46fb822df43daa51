package uinit

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// program is what a child runs.
type program struct {
	Path     string
	Args     []string // the first is the name
	Env      []string
	OOMScore int // oom_score_adj, −1000 to 1000
}

// startProcess runs a program in a session and process group of its own; output
// is the end of a pipe that it writes to. os/exec and os.Process are not used:
// they wait for children themselves, and here the loop alone reaps. There is no
// parent-death signal either: it would come when the thread that forked ends,
// and when init itself ends the kernel panics.
func startProcess(p program) (pid int, output *os.File, err error) {
	null, err := os.OpenFile(os.DevNull, os.O_RDONLY, 0)
	if err != nil {
		return 0, nil, err
	}
	defer null.Close()
	r, w, err := os.Pipe()
	if err != nil {
		return 0, nil, fmt.Errorf("making a pipe for the output: %w", err)
	}
	defer w.Close()
	pid, err = syscall.ForkExec(p.Path, p.Args, &syscall.ProcAttr{
		Dir:   "/",
		Env:   p.Env,
		Files: []uintptr{null.Fd(), w.Fd(), w.Fd()},
		Sys:   &syscall.SysProcAttr{Setsid: true},
	})
	if err != nil {
		r.Close()
		return 0, nil, fmt.Errorf("running %s: %w", p.Path, err)
	}
	if p.OOMScore != 0 {
		// Failing is no reason not to run.
		_ = os.WriteFile("/proc/"+strconv.Itoa(pid)+"/oom_score_adj", []byte(strconv.Itoa(p.OOMScore)), 0)
	}
	return pid, r, nil
}

// death is a process that has ended and was reaped.
type death struct {
	pid int
	how string
}

// reap collects every process that has ended, children and orphans alike, at
// most so many at a time; more is whether there may be others. Before a process
// is reaped, and so while its number cannot be another's, what is left of its
// process group is killed if it is one of ours: a forgotten helper would keep
// the service's port.
func reap(limit int, ours func(pid int) bool) (dead []death, more bool) {
	for len(dead) < limit {
		var info unix.Siginfo
		err := unix.Waitid(unix.P_ALL, 0, &info, unix.WEXITED|unix.WNOHANG|unix.WNOWAIT, nil)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		pid := siginfoPid(&info)
		if err != nil || pid == 0 {
			return dead, false
		}
		if ours(pid) {
			_ = unix.Kill(-pid, unix.SIGKILL)
		}
		var ws unix.WaitStatus
		if got, err := unix.Wait4(pid, &ws, unix.WNOHANG, nil); err != nil || got != pid {
			if errors.Is(err, unix.EINTR) {
				continue
			}
			return dead, false
		}
		dead = append(dead, death{pid, describe(ws)})
	}
	return dead, true
}

// siginfoPid is si_pid, which golang.org/x/sys does not name; on 64-bit machines
// it follows three ints and a gap (include/uapi/asm-generic/siginfo.h).
func siginfoPid(info *unix.Siginfo) int {
	return int(*(*int32)(unsafe.Add(unsafe.Pointer(info), 16)))
}

func describe(ws unix.WaitStatus) string {
	switch {
	case ws.Exited() && ws.ExitStatus() == 0:
		return "exit code 0"
	case ws.Exited():
		return "exit code " + strconv.Itoa(ws.ExitStatus())
	case ws.Signaled():
		s := unix.SignalName(ws.Signal())
		if s == "" {
			s = "signal " + strconv.Itoa(int(ws.Signal()))
		}
		if ws.CoreDump() {
			s += " (core dumped)"
		}
		return "killed by " + s
	}
	return fmt.Sprintf("wait status %#x", uint32(ws))
}

// endOutput ends the reading of a dead child's output, which a grandchild that
// left the process group may still hold open, when there was time to read what
// is in the pipe.
func endOutput(r *os.File) { _ = r.SetReadDeadline(time.Now().Add(time.Second)) }
