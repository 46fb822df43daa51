// Package netnstest is a test bed of network namespaces around a real Linux
// bridge, which is the learning switch that the whole design is about. It
// captures every frame that enters the bridge and fails the test if one of them
// has the clone MAC as its source (I1).
//
// Hosts are namespaces with one interface, eth0, that is cabled to the bridge.
// Programs run in them as processes of their own: any command, or one that the
// test binary itself contains (see Main). All of it is gone when the test ends,
// and what a killed test binary left is removed by the next.
package netnstest

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// ProgramEnv names, in the environment, the program that a copy of the test binary
// is to be.
const ProgramEnv = "NETNSTEST_PROGRAM"

// Main runs the tests of m, or, in a process that Host.Start started, the
// program of that name. The result is the exit code.
func Main(m *testing.M, programs map[string]func(args []string) int) int {
	if name := os.Getenv(ProgramEnv); name != "" {
		program, ok := programs[name]
		if !ok {
			program, ok = registered[name]
		}
		if !ok {
			fmt.Fprintf(os.Stderr, "no program %q in this test binary\n", name)
			return 2
		}
		os.Unsetenv(ProgramEnv)
		return program(os.Args[1:])
	}
	return m.Run()
}

// Register adds a program to those of Main. It is for init functions of test
// files beside the one with TestMain.
func Register(name string, program func(args []string) int) { registered[name] = program }

var registered = map[string]func([]string) int{}

// Bed is one bridge with its hosts.
type Bed struct {
	tb     testing.TB
	prefix string
	Switch *Host // the namespace of the bridge, br0
	Dir    string

	hosts   []*Host
	capture *capture
	sink    bool     // the device that loses frames is there
	cut     []string // ports with a Cut
	parted  []*Host
}

var beds atomic.Int32

// New builds a bed for a cluster with that clone MAC, and skips the test where
// the machine does not allow it.
func New(tb testing.TB, cloneMAC net.HardwareAddr) *Bed {
	tb.Helper()
	b := NewUnwatched(tb)
	capture, err := startCapture(b.Switch, filepath.Join(b.Dir, "switch.pcap"), cloneMAC)
	if err != nil {
		tb.Fatalf("starting the capture: %v", err)
	}
	b.capture = capture
	// Runs before the namespaces are removed.
	tb.Cleanup(func() { b.stopCapture() })
	return b
}

// NewUnwatched is New without the capture, which takes time for each frame: for
// benchmarks. Nothing checks I1.
func NewUnwatched(tb testing.TB) *Bed {
	tb.Helper()
	if os.Geteuid() != 0 {
		tb.Skip("needs root: network namespaces, a bridge and packet sockets")
	}
	for _, tool := range []string{"ip", "bridge"} {
		if _, err := exec.LookPath(tool); err != nil {
			tb.Skipf("needs %s (Debian package iproute2)", tool)
		}
	}
	removeStale(tb)
	b := &Bed{tb: tb, prefix: fmt.Sprintf("cct%d-%d", os.Getpid(), beds.Add(1)), Dir: tb.TempDir()}
	tb.Cleanup(b.unmount)
	b.Switch = b.namespace("switch")
	// The switch itself has nothing to say on the segment.
	b.Switch.Sysctl("net.ipv6.conf.default.disable_ipv6", "1")
	b.Switch.Run("ip", "link", "add", "br0", "type", "bridge")
	b.Switch.Run("ip", "link", "set", "br0", "up")
	return b
}

// BPFFS is a BPF file system that ends with the test, after the namespaces: with a pin
// ends what a killed program left attached. That of the machine is not seen from the
// namespaces, where /sys is another.
func (b *Bed) BPFFS() string {
	b.tb.Helper()
	dir := b.bpffs()
	if err := os.Mkdir(dir, 0o700); errors.Is(err, os.ErrExist) {
		return dir
	} else if err != nil {
		b.tb.Fatal(err)
	}
	if err := unix.Mount("bpf", dir, "bpf", 0, ""); err != nil {
		b.tb.Fatalf("mounting a BPF file system: %v", err)
	}
	return dir
}

func (b *Bed) bpffs() string { return filepath.Join(b.Dir, "bpf") }

func (b *Bed) unmount() {
	if err := unix.Unmount(b.bpffs(), unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
		b.tb.Errorf("unmounting the BPF file system: %v", err)
	}
}

func (b *Bed) namespace(name string) *Host {
	b.tb.Helper()
	h := &Host{bed: b, tb: b.tb, Name: name, NS: b.prefix + "-" + name}
	if out, err := exec.Command("ip", "netns", "add", h.NS).CombinedOutput(); err != nil {
		b.tb.Skipf("needs network namespaces: ip netns add: %v: %s", err, out)
	}
	b.tb.Cleanup(h.remove)
	b.hosts = append(b.hosts, h)
	h.Run("ip", "link", "set", "lo", "up")
	return h
}

// run runs a command of this machine that must not fail.
func (b *Bed) run(name string, args ...string) {
	b.tb.Helper()
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		b.tb.Fatalf("%s %s: %v: %s", name, strings.Join(args, " "), err, out)
	}
}

// removeStale removes namespaces of test binaries that are no more.
func removeStale(tb testing.TB) {
	out, err := exec.Command("ip", "netns", "list").Output()
	if err != nil {
		tb.Skipf("needs network namespaces: ip netns list: %v", err)
	}
	for line := range strings.Lines(string(out)) {
		name, _, _ := strings.Cut(strings.TrimSpace(line), " ")
		owner, ok := strings.CutPrefix(name, "cct")
		if !ok {
			continue
		}
		pid, err := strconv.Atoi(strings.SplitN(owner, "-", 2)[0])
		if err == nil && !errors.Is(unix.Kill(pid, 0), unix.ESRCH) {
			continue
		}
		_ = exec.Command("ip", "netns", "del", name).Run()
	}
}

// Host adds a host with that name and MAC ("" for a random one) and cables it to
// the bridge, at the port that bears its name. Addresses are like
// "10.77.0.1/24"; IPv6 ones are usable at once.
func (b *Bed) Host(name, mac string, addresses ...string) *Host {
	b.tb.Helper()
	h := b.namespace(name)
	b.cable(h, "eth0", name, mac, addresses)
	h.MAC = strings.TrimSpace(h.Run("cat", "/sys/class/net/eth0/address"))
	return h
}

// Cable gives a host another interface with that name and MAC ("" for a random
// one), cabled to a port of the bridge with the names of both.
func (b *Bed) Cable(h *Host, device, mac string, addresses ...string) {
	b.tb.Helper()
	b.cable(h, device, h.Name+"-"+device, mac, addresses)
}

// cable is what connects one interface of a host to the bridge.
type cable struct {
	device, port, mac string
	addresses         []string
}

func (b *Bed) cable(h *Host, device, port, mac string, addresses []string) {
	b.tb.Helper()
	c := cable{device, port, mac, addresses}
	h.cables = append(h.cables, c)
	b.connect(h, c)
}

func (b *Bed) connect(h *Host, c cable) {
	b.tb.Helper()
	h.Run("ip", "link", "add", c.device, "type", "veth", "peer", "name", c.port, "netns", b.Switch.NS)
	if c.mac != "" {
		h.Run("ip", "link", "set", c.device, "address", c.mac)
	}
	b.Switch.Run("ip", "link", "set", c.port, "master", "br0", "up")
	h.Run("ip", "link", "set", c.device, "up")
	for _, a := range c.addresses {
		args := []string{"addr", "add", a, "dev", c.device}
		if strings.Contains(a, ":") {
			args = append(args, "nodad")
		}
		h.Run("ip", args...)
	}
}

// Detached adds a host without a cable.
func (b *Bed) Detached(name string) *Host {
	b.tb.Helper()
	return b.namespace(name)
}

// Unplug and Plug take the cable of a host out of the switch and put it back:
// the host loses and gets its carrier.
func (b *Bed) Unplug(h *Host) { b.tb.Helper(); b.Switch.Run("ip", "link", "set", h.Name, "down") }

// Plug undoes Unplug.
func (b *Bed) Plug(h *Host) { b.tb.Helper(); b.Switch.Run("ip", "link", "set", h.Name, "up") }

// An Entry is one line of the switch's MAC table.
type Entry struct {
	MAC   string   `json:"mac"`
	Port  string   `json:"ifname"`
	Flags []string `json:"flags"`
	State string   `json:"state"` // "permanent": the port's own, not learned
}

// Learned gives what the switch has learned: MAC to port.
func (b *Bed) Learned() map[string]string {
	b.tb.Helper()
	var entries []Entry
	if err := json.Unmarshal([]byte(b.Switch.Run("bridge", "-j", "fdb", "show", "br", "br0")), &entries); err != nil {
		b.tb.Fatalf("reading bridge fdb: %v", err)
	}
	learned := map[string]string{}
	for _, e := range entries {
		if e.State != "permanent" {
			learned[e.MAC] = e.Port
		}
	}
	return learned
}

// Captured ends the capture, fails the test on a violation, and gives the path
// of the pcap file with every frame that entered the switch.
func (b *Bed) Captured() string {
	b.tb.Helper()
	b.stopCapture()
	return b.capture.path
}

// LongestFrame ends the capture and gives the length of the longest frame: with
// segmentation offload it is longer than any MTU.
func (b *Bed) LongestFrame() int {
	b.tb.Helper()
	b.stopCapture()
	return b.capture.longest
}

func (b *Bed) stopCapture() {
	b.tb.Helper()
	frames, dropped, violations, err := b.capture.stop()
	if err != nil {
		b.tb.Errorf("capturing: %v", err)
	}
	if dropped > 0 {
		b.tb.Logf("the pcap file lacks %d of %d frames; the check of I1 lacks none", dropped, frames+dropped)
	}
	for _, v := range violations {
		b.tb.Errorf("I1 broken: a frame with the clone MAC as source entered the switch: %s", v)
	}
	if dir := os.Getenv("NETNSTEST_KEEP"); dir != "" {
		data, err := os.ReadFile(b.capture.path)
		if err == nil {
			err = os.WriteFile(filepath.Join(dir, strings.ReplaceAll(b.tb.Name(), "/", "_")+".pcap"), data, 0o644)
		}
		if err != nil {
			b.tb.Logf("keeping the capture: %v", err)
		}
	}
}

// Host is one namespace.
type Host struct {
	Name string
	NS   string // as ip netns knows it
	MAC  string // of eth0
	bed  *Bed
	tb   testing.TB

	cables []cable

	mu        sync.Mutex
	processes []*Process
}

func (h *Host) remove() {
	h.mu.Lock()
	processes := h.processes
	h.mu.Unlock()
	for _, p := range processes {
		p.Kill()
	}
	if out, err := exec.Command("ip", "netns", "del", h.NS).CombinedOutput(); err != nil {
		h.tb.Errorf("removing namespace %s: %v: %s", h.NS, err, out)
	}
}

// Command is a command in the namespace, with /sys as seen from there.
func (h *Host) Command(ctx context.Context, name string, args ...string) *exec.Cmd {
	return exec.CommandContext(ctx, "ip", append([]string{"netns", "exec", h.NS, name}, args...)...)
}

// Try runs a command and gives what it printed on both outputs.
func (h *Host) Try(name string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	out, err := h.Command(ctx, name, args...).CombinedOutput()
	if err != nil {
		err = fmt.Errorf("%s: %s %s: %w", h.Name, name, strings.Join(args, " "), err)
	}
	return string(out), err
}

// Run is Try for what must not fail.
func (h *Host) Run(name string, args ...string) string {
	h.tb.Helper()
	out, err := h.Try(name, args...)
	if err != nil {
		h.tb.Fatalf("%v: %s", err, out)
	}
	return out
}

// Sysctl sets a kernel parameter of the namespace.
func (h *Host) Sysctl(key, value string) {
	h.tb.Helper()
	err := h.Do(func() error {
		f, err := os.OpenFile("/proc/sys/"+strings.ReplaceAll(key, ".", "/"), os.O_WRONLY, 0)
		if err != nil {
			return err
		}
		defer f.Close()
		_, err = f.WriteString(value)
		return err
	})
	if err != nil {
		h.tb.Fatalf("%s: setting %s: %v", h.Name, key, err)
	}
}

// Do calls f on a thread in the namespace: sockets that f opens belong there. f
// must not start processes.
func (h *Host) Do(f func() error) error {
	result := make(chan error, 1)
	go func() {
		// Never unlocked: the runtime ends the thread with the goroutine.
		runtime.LockOSThread()
		result <- func() error {
			fd, err := unix.Open("/run/netns/"+h.NS, unix.O_RDONLY|unix.O_CLOEXEC, 0)
			if err != nil {
				return fmt.Errorf("opening namespace %s: %w", h.NS, err)
			}
			defer unix.Close(fd)
			if err := unix.Setns(fd, unix.CLONE_NEWNET); err != nil {
				return fmt.Errorf("entering namespace %s: %w", h.NS, err)
			}
			return f()
		}()
	}()
	return <-result
}

// DialContext opens a connection from the namespace. address is an IP address
// and a port, no name.
func (h *Host) DialContext(ctx context.Context, network, address string) (conn net.Conn, err error) {
	err = h.Do(func() error {
		conn, err = (&net.Dialer{}).DialContext(ctx, network, address)
		return err
	})
	return conn, err
}

// Start starts a program of the test binary (see Main) in the namespace. It is
// killed at the end of the test if it still runs.
func (h *Host) Start(program string, args ...string) *Process {
	h.tb.Helper()
	self, err := os.Executable()
	if err != nil {
		h.tb.Fatal(err)
	}
	cmd := h.Command(context.Background(), self, args...)
	cmd.Env = append(os.Environ(), ProgramEnv+"="+program)
	return h.start(program, cmd)
}

// StartCommand starts any command in the namespace.
func (h *Host) StartCommand(name string, args ...string) *Process {
	h.tb.Helper()
	return h.start(filepath.Base(name), h.Command(context.Background(), name, args...))
}

func (h *Host) start(name string, cmd *exec.Cmd) *Process {
	h.tb.Helper()
	p := &Process{Name: name, host: h, cmd: cmd, done: make(chan struct{})}
	p.more = sync.NewCond(&p.mu)
	out, err := cmd.StdoutPipe()
	if err != nil {
		h.tb.Fatal(err)
	}
	cmd.Stderr = cmd.Stdout
	if err := startBound(cmd); err != nil {
		h.tb.Fatalf("%s: starting %s: %v", h.Name, name, err)
	}
	go func() {
		defer close(p.done)
		lines := bufio.NewScanner(out)
		for lines.Scan() {
			p.add(lines.Text())
		}
		err := cmd.Wait()
		p.mu.Lock()
		p.err, p.ended = err, true
		p.more.Broadcast()
		p.mu.Unlock()
	}()
	h.mu.Lock()
	h.processes = append(h.processes, p)
	h.mu.Unlock()
	return p
}

// startBound starts cmd so that it is killed when the test binary ends, however
// that ends. The kernel sends that signal at the end of the starting thread, and
// threads come and go (see Do), so one that stays starts them all.
func startBound(cmd *exec.Cmd) error {
	starter.Do(func() {
		go func() {
			runtime.LockOSThread()
			for f := range starts {
				f()
			}
		}()
	})
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	result := make(chan error, 1)
	starts <- func() { result <- cmd.Start() }
	return <-result
}

var (
	starter sync.Once
	starts  = make(chan func())
)

// Process is a running program.
type Process struct {
	Name string
	host *Host
	cmd  *exec.Cmd
	done chan struct{}

	mu    sync.Mutex
	more  *sync.Cond
	lines bytes.Buffer
	times []time.Time // of the lines
	ended bool
	err   error
}

func (p *Process) add(line string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.lines.WriteString(line + "\n")
	p.times = append(p.times, time.Now())
	p.more.Broadcast()
}

// Output is what the program has printed so far.
func (p *Process) Output() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.lines.String()
}

// A Line is one line of a program's output and when it came.
type Line struct {
	At   time.Time
	Text string
}

// Lines are the lines that have come after a time.
func (p *Process) Lines(after time.Time) (lines []Line) {
	p.mu.Lock()
	defer p.mu.Unlock()
	i := 0
	for text := range strings.Lines(p.lines.String()) {
		if at := p.times[i]; at.After(after) {
			lines = append(lines, Line{at, strings.TrimSuffix(text, "\n")})
		}
		i++
	}
	return lines
}

// Await waits until the output from offset on matches, and gives the offset
// behind the match. It fails the test if the program ends first or a minute
// passes.
func (p *Process) Await(offset int, pattern string) int {
	p.host.tb.Helper()
	re := regexp.MustCompile(pattern)
	expired := false
	timer := time.AfterFunc(time.Minute, func() {
		p.mu.Lock()
		expired = true
		p.more.Broadcast()
		p.mu.Unlock()
	})
	defer timer.Stop()
	p.mu.Lock()
	defer p.mu.Unlock()
	for {
		if m := re.FindIndex(p.lines.Bytes()[offset:]); m != nil {
			return offset + m[1]
		}
		if p.ended || expired {
			p.host.tb.Fatalf("%s: %s (ended: %v, %v) did not print %q:\n%s", p.host.Name, p.Name, p.ended, p.err, pattern, p.lines.String())
		}
		p.more.Wait()
	}
}

// Signal sends a signal.
func (p *Process) Signal(sig syscall.Signal) { _ = p.cmd.Process.Signal(sig) }

// Kill ends the program as a crash would, and waits for it.
func (p *Process) Kill() {
	p.Signal(syscall.SIGKILL)
	<-p.done
}

// Stop asks the program to end with SIGTERM, waits, and gives its error.
func (p *Process) Stop() error {
	p.Signal(syscall.SIGTERM)
	return p.Wait()
}

// Wait waits for the end of the program, at most a minute.
func (p *Process) Wait() error {
	select {
	case <-p.done:
	case <-time.After(time.Minute):
		p.host.tb.Errorf("%s: %s does not end:\n%s", p.host.Name, p.Name, p.Output())
		p.Kill()
	}
	return p.err
}

// PID is the process's identifier.
func (p *Process) PID() int { return p.cmd.Process.Pid }

// Proc reads a file of its folder in /proc: "status".
func (p *Process) Proc(tb testing.TB, file string) []byte {
	tb.Helper()
	b, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(p.cmd.Process.Pid), file))
	if err != nil {
		tb.Fatal(err)
	}
	return b
}

// CPU is the processor time that the program has used so far, in all its threads. What it
// makes the kernel do inline, as on a veth, is in it.
func (p *Process) CPU() time.Duration {
	p.host.tb.Helper()
	cpu, err := CPUOf(p.cmd.Process.Pid)
	if err != nil {
		p.host.tb.Fatalf("%s: the processor time of %s: %v:\n%s", p.host.Name, p.Name, err, p.Output())
	}
	return cpu
}

// Waits is how often the program's threads have waited for something so far, each wait of each
// thread counted: a number that, unlike CPU, does not depend on what else the machine does.
func (p *Process) Waits() (waits int) {
	p.host.tb.Helper()
	const field = "voluntary_ctxt_switches:"
	files, _ := filepath.Glob(filepath.Join("/proc", strconv.Itoa(p.cmd.Process.Pid), "task/*/status"))
	for _, file := range files {
		b, err := os.ReadFile(file)
		if err != nil {
			continue // the thread has ended
		}
		_, count, _ := strings.Cut(string(b), field)
		count, _, _ = strings.Cut(count, "\n")
		n, err := strconv.Atoi(strings.TrimSpace(count))
		if err != nil {
			p.host.tb.Fatalf("%s: %s in %s: %v", p.host.Name, field, file, err)
		}
		waits += n
	}
	if waits == 0 {
		p.host.tb.Fatalf("%s: %s has no threads:\n%s", p.host.Name, p.Name, p.Output())
	}
	return waits
}

// Used is the processor time that the program has used when it has ended.
func (p *Process) Used() time.Duration {
	<-p.done
	return p.cmd.ProcessState.UserTime() + p.cmd.ProcessState.SystemTime()
}

// Done is closed when the program has ended.
func (p *Process) Done() <-chan struct{} { return p.done }

// CPUOf is the processor time of any process of this machine, to the nanosecond: its
// clock_getcpuclockid(3), which Linux makes from the identifier (linux/posix-timers.h).
func CPUOf(pid int) (time.Duration, error) {
	const sched = 2 // CPUCLOCK_SCHED: what the scheduler has accounted, not ticks
	var ts unix.Timespec
	if err := unix.ClockGettime(int32(^pid<<3|sched), &ts); err != nil {
		return 0, err
	}
	return time.Duration(ts.Nano()), nil
}

// Hosts are all of the bed in the order in which they came, the switch first.
func (b *Bed) Hosts() []*Host { return b.hosts }

// CPU is that of all programs that run in the bed.
func (b *Bed) CPU() (sum time.Duration) {
	b.tb.Helper()
	for _, h := range b.hosts {
		h.mu.Lock()
		processes := slices.Clone(h.processes)
		h.mu.Unlock()
		for _, p := range processes {
			select {
			case <-p.done:
			default:
				sum += p.CPU()
			}
		}
	}
	return sum
}
