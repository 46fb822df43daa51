package netnstest

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"runtime/debug"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// Awake keeps all processors of this machine busy with what gives way to everything else (SCHED_IDLE). A virtual
// machine's processor that goes to sleep is given away, and where and when it goes on is another's choice: programs
// that run for some milliseconds at a time then take up to one and a half times as long for the same work, for
// minutes, and then do not. On real hardware it keeps the frequency up.
type Awake struct {
	cmd   *exec.Cmd
	ended chan struct{}
}

// KeepAwake does so until the test ends.
func KeepAwake(tb testing.TB) *Awake {
	tb.Helper()
	self, err := os.Executable()
	if err != nil {
		tb.Fatal(err)
	}
	cmd := exec.Command(self)
	// The signals of Go's scheduler would be all that happens in there.
	cmd.Env = append(os.Environ(), ProgramEnv+"="+awakeProgram, "GODEBUG=asyncpreemptoff=1")
	// It ends with this pipe. A signal at the death of its parent (PR_SET_PDEATHSIG) would come at that of the
	// thread which has started it, and threads that enter namespaces end.
	in, err := cmd.StdinPipe()
	if err != nil {
		tb.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		tb.Fatal(err)
	}
	line, err := bufio.NewReader(out).ReadString('\n')
	a := &Awake{cmd, make(chan struct{})}
	go func() {
		_ = cmd.Wait()
		close(a.ended)
	}()
	tb.Cleanup(func() {
		_ = in.Close()
		<-a.ended
	})
	if line != "awake\n" {
		tb.Fatalf("keeping the processors awake: %s%v", line, err)
	}
	return a
}

// CPU is what it has taken: what nobody else wanted.
func (a *Awake) CPU(tb testing.TB) time.Duration {
	tb.Helper()
	d, err := a.taken()
	if err != nil {
		tb.Fatalf("what keeps the processors awake: %v", err)
	}
	return d
}

func (a *Awake) taken() (time.Duration, error) {
	select {
	case <-a.ended:
		return 0, os.ErrProcessDone
	default:
		return CPUOf(a.cmd.Process.Pid)
	}
}

const awakeProgram = "netnstest-awake"

func init() { Register(awakeProgram, awake) }

func awake([]string) int {
	usable, err := UsableProcessors()
	if err != nil {
		fmt.Println(err)
		return 1
	}
	debug.SetGCPercent(-1)
	runtime.GOMAXPROCS(len(usable) + 1)
	ready := make(chan error)
	for _, i := range usable {
		go func() {
			runtime.LockOSThread()
			err := Pin(i)
			if err == nil {
				err = unix.SchedSetAttr(0, &unix.SchedAttr{Size: unix.SizeofSchedAttr, Policy: unix.SCHED_IDLE}, 0)
			}
			ready <- err
			for n := 0; ; n++ {
			}
		}()
	}
	for range usable {
		if err := <-ready; err != nil {
			fmt.Println(err)
			return 1
		}
	}
	fmt.Println("awake")
	_, _ = io.Copy(io.Discard, os.Stdin)
	return 0
}
