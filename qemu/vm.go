package qemu

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"time"
)

// VM is a running virtual machine.
type VM struct {
	cfg     Config
	console *console
	stderr  tailBuffer
	qmp     *QMP
	cmd     *exec.Cmd
	cancel  context.CancelFunc

	wg   sync.WaitGroup
	done chan struct{} // QEMU has exited and its output was read
	err  error         // valid after done
}

// runTied runs a command that cannot outlive this process, not even if this
// process is killed with SIGKILL: the kernel then sends it the parent-death signal
// (PR_SET_PDEATHSIG, prctl(2)). That signal comes when the *thread* that forked
// dies, and Go's threads come and go; so the caller's goroutine is locked to its
// thread, on which it stays until the command has ended. The command is in a
// process group of its own, so that a Ctrl-C in the terminal reaches only us, and
// the guests can be shut down in order.
func runTied(cmd *exec.Cmd, started func(error)) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true}
	cmd.WaitDelay = 10 * time.Second
	err := cmd.Start()
	if started != nil {
		started(err)
	}
	if err != nil {
		return err
	}
	return cmd.Wait()
}

// Start boots a machine and returns once its monitor answers. The machine lives
// until it exits by itself, ctx ends, or Close is called, and never longer than
// this process, however that ends.
func Start(ctx context.Context, cfg Config) (_ *VM, err error) {
	if err := cfg.Validate(); err != nil {
		return nil, fmt.Errorf("starting machine: %w", err)
	}
	cfg = cfg.withDefaults()
	defer func() {
		if err != nil {
			err = fmt.Errorf("starting machine %s: %w", cfg.Name, err)
		}
	}()
	binary, err := exec.LookPath(cfg.Binary)
	if err != nil {
		_, pkg := cfg.Machine.Emulator()
		return nil, fmt.Errorf("%w (Debian: apt-get install %s)", err, pkg)
	}
	cfg.Binary = binary
	if err := cfg.prepareFirmware(); err != nil {
		return nil, err
	}
	for _, d := range cfg.Disks {
		if _, err := os.Stat(d.Path); err != nil {
			return nil, fmt.Errorf("disk: %w", err)
		}
	}
	for _, n := range cfg.NICs {
		// QEMU only prints a warning when it cannot connect.
		if _, err := os.Stat(n.Socket); err != nil {
			return nil, fmt.Errorf("switch port of NIC %s: %w", n.MAC, err)
		}
	}
	var log *os.File
	if cfg.ConsoleLog != "" {
		if log, err = os.OpenFile(cfg.ConsoleLog, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o644); err != nil {
			return nil, err
		}
	}
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: cfg.qmpSocket(), Net: "unix"})
	if err != nil {
		if log != nil {
			log.Close()
		}
		return nil, err
	}

	life, cancel := context.WithCancel(ctx)
	vm := &VM{cfg: cfg, cancel: cancel, done: make(chan struct{})}
	if log != nil {
		vm.console = newConsole(time.Now(), log)
	} else {
		vm.console = newConsole(time.Now(), nil)
	}
	if cfg.OnLine != nil {
		vm.console.subscribe(cfg.OnLine)
	}
	vm.cmd = exec.CommandContext(life, binary, cfg.Args()...)
	vm.cmd.Stdout, vm.cmd.Stderr = vm.console, &vm.stderr

	started := make(chan error, 1)
	vm.wg.Go(func() {
		defer close(vm.done)
		defer vm.console.close()
		if log != nil {
			defer log.Close()
		}
		if err := runTied(vm.cmd, func(err error) { started <- err }); err != nil {
			vm.err = &ExitError{
				Name:    cfg.Name,
				Err:     err,
				Stderr:  vm.stderr.String(),
				Console: vm.console.tail(30),
				Command: cfg.Command(),
			}
		}
		ln.Close() // ends Accept below
	})
	if err := <-started; err != nil {
		cancel()
		vm.wg.Wait()
		return nil, err
	}
	cfg.Log.Debug("started QEMU", "machine", cfg.Name, "pid", vm.cmd.Process.Pid, "command", cfg.Command())

	conn, err := ln.Accept()
	ln.Close()
	if err == nil {
		vm.qmp, err = NewQMP(life, conn, cfg.OnEvent)
	}
	if err != nil {
		cancel()
		vm.wg.Wait()
		if vm.err != nil && ctx.Err() == nil {
			return nil, vm.err // QEMU has said why
		}
		return nil, fmt.Errorf("connecting to the monitor: %w", err)
	}
	return vm, nil
}

// ExitError says that QEMU ended with an error, or was killed.
type ExitError struct {
	Name    string
	Err     error
	Stderr  string // the end of what QEMU said
	Console []Line // the end of what the guest said
	Command string
}

func (e *ExitError) Unwrap() error { return e.Err }

func (e *ExitError) Error() string {
	var b strings.Builder
	fmt.Fprintf(&b, "machine %s: QEMU: %v", e.Name, e.Err)
	if e.Stderr != "" {
		fmt.Fprintf(&b, ": %s", e.Stderr)
	}
	return b.String()
}

// Report is the whole story of a machine for a failure message: the command line,
// what QEMU said, and the end of the console.
func (vm *VM) Report() string {
	var b strings.Builder
	fmt.Fprintf(&b, "machine %s: %s\n", vm.cfg.Name, vm.Command())
	if s := vm.stderr.String(); s != "" {
		fmt.Fprintf(&b, "  QEMU: %s\n", s)
	}
	if vm.cfg.ConsoleLog != "" {
		fmt.Fprintf(&b, "  console, last lines of %s:\n", vm.cfg.ConsoleLog)
	} else {
		fmt.Fprintf(&b, "  console, last lines:\n")
	}
	for _, l := range vm.Tail(40) {
		fmt.Fprintf(&b, "  | %8.3f %s\n", l.Since.Seconds(), l.Text)
	}
	return b.String()
}

// Name returns the machine's name.
func (vm *VM) Name() string { return vm.cfg.Name }

// Command is the exact command line, quoted for a POSIX shell.
func (vm *VM) Command() string { return vm.cfg.Command() }

// Pid is QEMU's process id.
func (vm *VM) Pid() int { return vm.cmd.Process.Pid }

// QMP is the machine's monitor.
func (vm *VM) QMP() *QMP { return vm.qmp }

// Done is closed when QEMU has exited and its console has been handled; events may
// still come until Close has returned.
func (vm *VM) Done() <-chan struct{} { return vm.done }

// Wait waits for the machine's end. It returns nil if QEMU ended in order (the
// guest powered off), otherwise an *[ExitError], or ctx's cause if that is first.
func (vm *VM) Wait(ctx context.Context) error {
	select {
	case <-vm.done:
		return vm.err
	case <-ctx.Done():
		return fmt.Errorf("waiting for the end of machine %s: %w", vm.cfg.Name, context.Cause(ctx))
	}
}

// Subscribe calls f for the kept lines of the console (at least the last 1000)
// and then for each new one, until stop is called. See Config.OnLine for f's
// duties; it must not call methods of the machine that read the console.
func (vm *VM) Subscribe(f func(Line)) (stop func()) { return vm.console.subscribe(f) }

// Tail returns the last n lines of the console, at most 1000.
func (vm *VM) Tail(n int) []Line { return vm.console.tail(n) }

// WaitLine returns the first line of the console, past or to come, that matches.
func (vm *VM) WaitLine(ctx context.Context, match func(text string) bool) (Line, error) {
	l, err := vm.console.wait(ctx, match)
	if err != nil {
		return l, fmt.Errorf("waiting for a line of machine %s: %w", vm.cfg.Name, err)
	}
	return l, nil
}

// Shutdown presses the power button and waits until the guest has gone; when ctx
// ends before that, QEMU is killed and ctx's cause returned.
func (vm *VM) Shutdown(ctx context.Context) error {
	err := vm.qmp.PowerButton(ctx)
	if err == nil {
		err = vm.Wait(ctx)
	}
	select {
	case <-vm.done:
		return vm.err
	default:
	}
	vm.Close()
	return fmt.Errorf("shutting down machine %s: %w", vm.cfg.Name, err)
}

// Close kills QEMU, as a power failure would, and waits until it has gone and all
// its output and events have been handled. A machine that has already ended is
// left alone.
func (vm *VM) Close() {
	vm.cancel()
	vm.wg.Wait()
	if vm.qmp != nil {
		<-vm.qmp.done // at the end of what QEMU has sent; closing might lose the last events
	}
}
