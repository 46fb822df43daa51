package health

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"clonecluster/netcore/health/probe"
)

// command is an exec check.
type command struct {
	argv, env []string
	stuck     chan struct{} // closed when a process that could not be killed has ended
}

const (
	// killGrace is how long a killed process may take to end. One that waits
	// for a dead disk takes no signal.
	killGrace = time.Second
	// pipeGrace is how long the output is read after the end of the process:
	// one that left the process group may hold the pipe open for ever.
	pipeGrace = 500 * time.Millisecond
)

// run runs the program once. When ctx ends its whole process group is killed, and
// so is what it leaves behind when it ends by itself. The error is a reason for
// the log, with the last line that the program wrote.
func (c *command) run(ctx context.Context) error {
	if c.stuck != nil {
		select {
		case <-c.stuck:
			c.stuck = nil
		default:
			return errors.New("an earlier run of the check cannot be killed")
		}
	}
	out := new(lastLine)
	cmd := exec.Command(c.argv[0], c.argv[1:]...)
	cmd.Dir = "/"
	// Not the engine's environment, in which NOTIFY_SOCKET is the engine's own.
	cmd.Env = append([]string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/"}, c.env...)
	cmd.Stdout, cmd.Stderr = out, out
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.WaitDelay = pipeGrace
	if err := cmd.Start(); err != nil {
		return err
	}
	pid := cmd.Process.Pid
	// The engine may be spared when memory runs out; its checks must not be.
	_ = os.WriteFile("/proc/"+strconv.Itoa(pid)+"/oom_score_adj", []byte("0"), 0)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		awaitEnd(pid)
	}()
	late := false
	select {
	case <-ended:
	case <-ctx.Done():
		late = true
	}
	// It is not reaped yet, so its number, and its group's, cannot be another's.
	_ = unix.Kill(-pid, unix.SIGKILL)
	grace := time.NewTimer(killGrace)
	defer grace.Stop()
	select {
	case <-ended:
	case <-grace.C:
		c.abandon(cmd, ended)
		return fmt.Errorf("%w, and the check cannot be killed", probe.ErrLate)
	}
	err := cmd.Wait()
	switch {
	case late:
		return fmt.Errorf("%w%s", probe.ErrLate, out.said())
	case err == nil, errors.Is(err, exec.ErrWaitDelay):
		return nil
	case cmd.ProcessState.Exited():
		return out.explain(fmt.Sprintf("exit code %d", cmd.ProcessState.ExitCode()))
	}
	return out.explain(cmd.ProcessState.String())
}

// abandon leaves a process that cannot be killed to a goroutine that nobody
// waits for: neither the verdict on the service nor the end of the engine may
// depend on it. There is never more than one per check.
func (c *command) abandon(cmd *exec.Cmd, ended <-chan struct{}) {
	stuck := make(chan struct{})
	c.stuck = stuck
	go func() {
		defer close(stuck)
		<-ended
		_ = cmd.Wait()
	}()
}

// awaitEnd returns when a child has ended, and leaves it to be reaped.
func awaitEnd(pid int) {
	for errors.Is(unix.Waitid(unix.P_PID, pid, nil, unix.WEXITED|unix.WNOWAIT, nil), unix.EINTR) {
	}
}

// lastLine keeps the beginning of the last line written to it that is not blank.
type lastLine struct{ last, current []byte }

// maxOutput is how much of a line is kept, in bytes.
const maxOutput = 200

func (l *lastLine) Write(p []byte) (int, error) {
	n := len(p)
	for {
		line, rest, whole := bytes.Cut(p, []byte("\n"))
		l.current = append(l.current, line[:min(len(line), maxOutput-len(l.current))]...)
		if !whole {
			return n, nil
		}
		l.endLine()
		p = rest
	}
}

func (l *lastLine) endLine() {
	if len(bytes.TrimSpace(l.current)) > 0 {
		l.last = append(l.last[:0], l.current...)
	}
	l.current = l.current[:0]
}

// explain is the error that what says, with the line.
func (l *lastLine) explain(what string) error { return errors.New(what + l.said()) }

// said is the line, behind a colon; empty if there is none.
func (l *lastLine) said() string {
	l.endLine()
	if text := strings.TrimSpace(string(l.last)); text != "" {
		return ": " + probe.Printable(text)
	}
	return ""
}
