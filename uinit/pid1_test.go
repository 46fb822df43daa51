package uinit

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"clonecluster/config"
	"clonecluster/image/disk"
	"clonecluster/netcore/nic"
)

// The tests in this file run init as the first process of a new PID, mount and
// network namespace, with this test binary as init, as engine and as services.

func TestMain(m *testing.M) {
	if len(os.Args) > 1 {
		switch os.Args[1] {
		case "fake-init":
			fakeInit(os.Args[2], os.Args[3])
		case "fake-network":
			if err := fakeNetwork(os.Args[2]); err != nil {
				fmt.Println(err)
				os.Exit(1)
			}
			return
		case "fake-child":
			fakeChild(os.Args[2], os.Args[3:])
			return
		}
	}
	os.Exit(m.Run())
}

// fakeInit is init with an environment that touches nothing of this machine.
func fakeInit(dir, outerNamespace string) {
	inner, err := os.Readlink("/proc/self/ns/pid")
	if os.Getpid() != 1 || err != nil || inner == outerNamespace {
		fmt.Fprintln(os.Stderr, "not alone: refusing to be init here", os.Getpid(), inner, outerNamespace, err)
		os.Exit(3)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		fmt.Fprintln(os.Stderr, "making the mounts private:", err)
		os.Exit(3)
	}
	panics := 2
	env := appliance()
	env.mounts = []mount{{"proc", "/proc", "", hardened}}
	env.sysctlRoot = "" // most of them are the whole machine's
	env.setClock = false
	env.dev = filepath.Join(dir, "dev")
	env.sys = filepath.Join(dir, "sys")
	env.kmsg = filepath.Join(dir, "kmsg")
	env.cmdline = filepath.Join(dir, "cmdline")
	env.configFile = filepath.Join(dir, "cluster.yaml")
	env.runDir = filepath.Join(dir, "run")
	env.engine = []string{"/proc/self/exe", "fake-child", "engine", "CONFIG", "NIC"}
	env.policy.BackoffFirst = time.Millisecond
	env.policy.BackoffMost = 20 * time.Millisecond
	env.policy.CrashLoop = 1 << 30
	env.policy.AliveIsReady = 10 * time.Millisecond
	env.policy.ServiceGrace = 1500 * time.Millisecond
	env.hostname = func(string) error {
		if panics--; panics >= 0 {
			panic("a panic in an event")
		}
		return nil
	}
	env.network = func(_ context.Context, n *network) {
		if err := loopbackUp(); err != nil {
			n.log.Error("network", "error", err)
		}
		for range 3 { // the first ends in a panic
			n.found(nic.NIC{Name: "fake0", MAC: net.HardwareAddr{2, 0, 0, 0, 0, 1}, PermanentMAC: net.HardwareAddr{2, 0, 0, 0, 0, 1}, Carrier: true})
		}
		n.address(netip.MustParsePrefix("10.77.0.101/24"))
		panic("a panic in the network")
	}
	for {
		newInit(env, sinceBoot()).run()
	}
}

// fakeChild is the engine or a service.
func fakeChild(what string, args []string) {
	notify := func(text string) {
		c, err := net.Dial("unixgram", os.Getenv("NOTIFY_SOCKET"))
		if err != nil {
			fmt.Println("notify:", err)
			return
		}
		defer c.Close()
		fmt.Fprint(c, text)
	}
	term := make(chan os.Signal, 1)
	signal.Notify(term, syscall.SIGTERM)
	switch what {
	case "engine":
		c, err := config.LoadFile(args[0])
		if err != nil || args[1] != "fake0" || os.Getenv("CLONECLUSTER_NODE") == "" || os.Getenv("WATCHDOG_USEC") == "" {
			fmt.Println("the engine was not told what it needs:", err, args, os.Environ())
			os.Exit(1)
		}
		notify("READY=1\nSTATUS=cluster " + c.Cluster.Name)
		for {
			select {
			case <-term:
				notify("STOPPING=1")
				fmt.Println("engine leaves")
				time.Sleep(2 * time.Second) // as if it had flows
				fmt.Println("engine stops")
				return
			case <-time.After(100 * time.Millisecond):
				notify("WATCHDOG=1")
			}
		}
	case "web":
		l, err := net.Listen("tcp", "127.0.0.1:8080")
		if err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		go http.Serve(l, http.NotFoundHandler())
		<-term
		fmt.Println("web stops")
	case "loud":
		big := bytes.Repeat([]byte("x\x00\xff\x1b"), 1<<16)
		os.Stdout.Write(big)
		os.Stderr.Write([]byte("\nloud is done\n"))
		for range 100 {
			notify("READY=0\n\xff\x00garbage=")
			notify(strings.Repeat("STATUS=", 4000))
		}
		<-term
		time.Sleep(50 * time.Millisecond)
		fmt.Println("loud stops")
	case "deaf":
		signal.Ignore(syscall.SIGTERM)
		notify("READY=1")
		for { // also holds its output in a grandchild that leaves the group
			time.Sleep(time.Hour)
		}
	case "orphans":
		// Each subshell ends at once and leaves its sleeper to init.
		n := args[0]
		if out, err := exec.Command("/bin/sh", "-c", "for i in $(seq "+n+"); do (sleep 0.$((i % 10)) & ) ; done").CombinedOutput(); err != nil {
			fmt.Println("sh:", err, string(out))
		}
		fmt.Println("orphans made")
		<-term
	}
}

// machine is a running init.
type machine struct {
	t    *testing.T
	dir  string
	cmd  *exec.Cmd
	http *http.Client

	mu      sync.Mutex
	console []string
	grown   chan struct{}
	read    chan struct{} // closed when the console was read to its end
}

func boot(t *testing.T, configuration, cmdline string) *machine {
	t.Helper()
	return bootWith(t, configuration, cmdline, nil)
}

// bootWith boots where stickConfig, if it is not nil, is the cluster.yaml on one.
func bootWith(t *testing.T, configuration, cmdline string, stickConfig []byte) *machine {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root, to be PID 1 of new namespaces")
	}
	dir := t.TempDir()
	m := &machine{t: t, dir: dir, grown: make(chan struct{}, 1), read: make(chan struct{})}
	for _, d := range []string{"dev", "sys/class", "run"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for name, text := range map[string]string{
		"kmsg": "6,1,100000,-;Trying to unpack rootfs image as initramfs...\n", "cmdline": cmdline, "cluster.yaml": configuration,
	} {
		if text == "" {
			continue
		}
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if stickConfig != nil {
		o := disk.Options{UKI: []byte("x"), Arch: "amd64", Config: stickConfig}
		if err := disk.Write(filepath.Join(dir, "dev/sda"), o); err != nil {
			t.Fatal(err)
		}
		if err := os.MkdirAll(filepath.Join(dir, "sys/class/block/sda"), 0o755); err != nil {
			t.Fatal(err)
		}
		fi, err := os.Stat(filepath.Join(dir, "dev/sda"))
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, "sys/class/block/sda/size"), fmt.Appendln(nil, fi.Size()/512), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink("/proc/self/fd/1", filepath.Join(dir, "dev/console")); err != nil {
		t.Fatal(err)
	}
	outer, err := os.Readlink("/proc/self/ns/pid")
	if err != nil {
		t.Fatal(err)
	}
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	m.cmd = exec.Command(exe, "fake-init", dir, outer)
	m.cmd.Env = []string{}
	m.cmd.Stdout, m.cmd.Stderr = w, w
	m.cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: unix.CLONE_NEWPID | unix.CLONE_NEWNS | unix.CLONE_NEWNET | unix.CLONE_NEWUTS | unix.CLONE_NEWIPC,
	}
	if err := m.cmd.Start(); err != nil {
		if errors.Is(err, os.ErrPermission) {
			t.Skip("needs the right to make namespaces: ", err)
		}
		t.Fatal(err)
	}
	w.Close()
	t.Cleanup(func() {
		m.cmd.Process.Kill() // the kernel ends the whole namespace with its init
		m.cmd.Wait()
		<-m.read
		r.Close()
		if t.Failed() {
			m.mu.Lock()
			defer m.mu.Unlock()
			t.Logf("console, last lines:\n%s", strings.Join(m.console[max(0, len(m.console)-60):], "\n"))
		}
	})
	go func() {
		defer close(m.read)
		s := bufio.NewScanner(r)
		s.Buffer(nil, 1<<20)
		for s.Scan() {
			m.mu.Lock()
			m.console = append(m.console, s.Text())
			m.mu.Unlock()
			select {
			case m.grown <- struct{}{}:
			default:
			}
		}
	}()
	m.http = &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", filepath.Join(dir, "run/init.sock"))
	}}}
	t.Cleanup(m.http.CloseIdleConnections)
	return m
}

// patience is for a machine that does other things as well.
const patience = 30 * time.Second

// line waits for a line of the console that contains the text.
func (m *machine) line(text string) string {
	m.t.Helper()
	deadline := time.After(patience)
	for {
		m.mu.Lock()
		i := slices.IndexFunc(m.console, func(l string) bool { return strings.Contains(l, text) })
		var l string
		if i >= 0 {
			l = m.console[i]
		}
		m.mu.Unlock()
		if i >= 0 {
			return l
		}
		select {
		case <-m.grown:
		case <-deadline:
			m.t.Fatalf("the console never says %q", text)
		}
	}
}

func (m *machine) status() (Status, error) {
	var s Status
	r, err := m.http.Get("http://init/v1/status")
	if err != nil {
		return s, err
	}
	defer r.Body.Close()
	return s, json.NewDecoder(r.Body).Decode(&s)
}

// until polls the status until it is as wanted.
func (m *machine) until(what string, ok func(Status) bool) Status {
	m.t.Helper()
	end := time.Now().Add(patience)
	for {
		s, err := m.status()
		if err == nil && ok(s) {
			return s
		}
		if time.Now().After(end) {
			b, _ := json.MarshalIndent(s.Children, "", " ")
			m.t.Fatalf("never %s: %v\n%s", what, err, b)
		}
		time.Sleep(2 * time.Millisecond)
	}
}

func allReady(s Status) bool {
	for _, c := range s.Children {
		if c.State != "ready" {
			return false
		}
	}
	return len(s.Children) > 0
}

// outside is the process id, as this side of the namespace knows it, of the
// process that init knows under pid.
func (m *machine) outside(pid int) int {
	m.t.Helper()
	files, err := filepath.Glob("/proc/[0-9]*/status")
	if err != nil {
		m.t.Fatal(err)
	}
	parent := strconv.Itoa(m.cmd.Process.Pid)
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			continue
		}
		fields := map[string]string{}
		for line := range strings.SplitSeq(string(b), "\n") {
			k, v, _ := strings.Cut(line, ":")
			fields[k] = strings.TrimSpace(v)
		}
		ids := strings.Fields(fields["NSpid"])
		if fields["PPid"] == parent && len(ids) > 1 && ids[len(ids)-1] == strconv.Itoa(pid) {
			n, _ := strconv.Atoi(ids[0])
			return n
		}
	}
	return 0
}

// zombies counts the dead children of init that were not reaped.
func (m *machine) zombies() int {
	files, _ := filepath.Glob("/proc/[0-9]*/stat")
	n := 0
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			continue
		}
		_, rest, _ := strings.Cut(string(b), ") ")
		fs := strings.Fields(rest)
		if len(fs) > 1 && fs[0] == "Z" && fs[1] == strconv.Itoa(m.cmd.Process.Pid) {
			n++
		}
	}
	return n
}

// ends waits for the end and returns how the namespace's kernel side ended
// init: by SIGINT for a power off, by SIGHUP for a restart (reboot(2)).
func (m *machine) ends() syscall.Signal {
	m.t.Helper()
	done := make(chan error, 1)
	go func() { done <- m.cmd.Wait() }()
	select {
	case <-done:
	case <-time.After(patience):
		m.t.Fatal("init does not end the machine")
	}
	<-m.read
	ws := m.cmd.ProcessState.Sys().(syscall.WaitStatus)
	if !ws.Signaled() {
		m.t.Fatalf("PID 1 exited with code %d", ws.ExitStatus())
	}
	return ws.Signal()
}

const header = "cluster: {name: test, key: Y2xvbmVjbHVzdGVyIGRlbW8sIG5vdCBhIHNlY3JldCE=}\nvip: {ipv4: 10.77.0.10/24}\n"

func service(name string, args string, more string) string {
	return fmt.Sprintf("  - {name: %s, run: [/proc/self/exe, fake-child, %s]%s}\n", name, args, more)
}

const webHealth = `, health: {http: "http://127.0.0.1:8080/", interval: 100ms}`

// TestKillEveryChildInEveryOrder kills the engine and three services in each of
// the 24 orders, one after the other has come back in none, some or all cases.
func TestKillEveryChildInEveryOrder(t *testing.T) {
	// An answer of 404 would not be healthy, so this check is of the connection.
	m := boot(t, header+"services:\n"+service("web", "web", `, health: {tcp: "127.0.0.1:8080", interval: 100ms}`)+service("loud", "loud", "")+service("deaf", "deaf", ""), "")
	ready := m.line("timeline stage=ready at=")
	if !strings.Contains(ready, "node=02:00:00:00:00:01") || !strings.Contains(ready, "mgmt=10.77.0.101") && !strings.Contains(ready, "mgmt=-") {
		t.Errorf("ready line %q", ready)
	}
	names := []string{"engine", "web", "loud", "deaf"}
	rounds := 0
	permute(names, func(order []string) {
		rounds++
		before := m.until("all ready", allReady)
		pids := map[string]int{}
		for _, c := range before.Children {
			pids[c.Name] = c.PID
		}
		for i, name := range order {
			out := m.outside(pids[name])
			if out == 0 {
				t.Fatalf("order %v: %s (pid %d) is not there", order, name, pids[name])
			}
			sig := []syscall.Signal{syscall.SIGKILL, syscall.SIGSEGV, syscall.SIGKILL, syscall.SIGABRT}[(rounds+i)%4]
			if err := syscall.Kill(out, sig); err != nil {
				t.Fatal(err)
			}
			if rounds%3 == 0 || rounds%3 == 1 && i == 1 { // let this one come back first
				m.until(name+" back", func(s Status) bool {
					c := s.Children[slices.IndexFunc(s.Children, func(c ChildStatus) bool { return c.Name == name })]
					return c.State == "ready" && c.PID != pids[name]
				})
			}
		}
		m.until("all back", func(s Status) bool {
			for _, c := range s.Children {
				if c.PID == pids[c.Name] {
					return false
				}
			}
			return allReady(s)
		})
	})
	s := m.until("all ready", allReady)
	for _, c := range s.Children {
		if c.Restarts != 24 {
			t.Errorf("%s was started again %d times; want 24 (last exit: %s)", c.Name, c.Restarts, c.LastExit)
		}
	}
	if rounds != 24 {
		t.Errorf("%d orders", rounds)
	}
	if n := m.zombies(); n != 0 {
		t.Errorf("%d zombies", n)
	}
}

func permute(list []string, visit func([]string)) {
	var rec func(int)
	rec = func(k int) {
		if k == len(list) {
			visit(slices.Clone(list))
			return
		}
		for i := k; i < len(list); i++ {
			list[k], list[i] = list[i], list[k]
			rec(k + 1)
			list[k], list[i] = list[i], list[k]
		}
	}
	rec(0)
}

// TestOrderlyEnd powers off by SIGTERM: the engine leaves first, the services
// stop, the deaf one is killed, the engine is awaited, and PID 1 ends by
// reboot(2) alone.
func TestOrderlyEnd(t *testing.T) {
	m := boot(t, header+"services:\n"+service("web", "web", "")+service("loud", "loud", "")+service("deaf", "deaf", ""), "")
	m.line("timeline stage=ready")
	m.line("loud: loud is done")
	if err := m.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if sig := m.ends(); sig != syscall.SIGINT {
		t.Errorf("init was ended by %v; want the one of a power off", sig)
	}
	last := -1
	for _, want := range []string{
		"init: going to power off: the engine leaves the cluster", "engine: engine leaves", "init: stopping the services", "web: web stops", "loud: loud stops",
		"init: warn: deaf did not stop in time: killing it", "init: deaf has stopped: killed by SIGKILL",
		"init: the services have stopped: waiting for the engine", "init: engine has stopped: exit code 0",
		"init: everything has stopped",
	} {
		i := slices.IndexFunc(m.console, func(l string) bool { return strings.Contains(l, want) })
		if i <= last {
			t.Errorf("%q is line %d of the console; want it after line %d", want, i, last)
		}
		last = i
	}
	for _, l := range m.console {
		if len(l) > maxLine*2+100 || strings.ContainsAny(l, "\x00\x1b") {
			t.Errorf("the console shows %.80q… (%d bytes)", l, len(l))
		}
	}
}

func TestCtrlAltDelRestarts(t *testing.T) {
	m := boot(t, header, "")
	m.line("timeline stage=ready")
	m.cmd.Process.Signal(syscall.SIGINT)
	if sig := m.ends(); sig != syscall.SIGHUP {
		t.Errorf("init was ended by %v; want the one of a restart", sig)
	}
}

// TestFloodOfOrphans leaves hundreds of processes to init, and looks for the
// dead among them.
// TestOrderedReboot: the engine may order it, once: a second order kills nothing.
func TestOrderedReboot(t *testing.T) {
	m := boot(t, header, "")
	m.line("timeline stage=ready")
	for _, want := range []int{http.StatusNoContent, http.StatusConflict} {
		r, err := m.http.Post("http://init/v1/reboot", "", nil)
		if err != nil {
			if want == http.StatusNoContent {
				t.Fatal(err)
			}
			break // the machine was that fast
		}
		r.Body.Close()
		if r.StatusCode != want {
			t.Errorf("the answer is %s; want %d", r.Status, want)
		}
	}
	if sig := m.ends(); sig != syscall.SIGHUP {
		t.Errorf("ended by %v; want a restart", sig)
	}
}

func TestFloodOfOrphans(t *testing.T) {
	m := boot(t, header+"services:\n"+service("web", "web", "")+service("orphans", "orphans, \"300\"", ""), "")
	m.line("orphans: orphans made")
	s := m.until("300 orphans reaped", func(s Status) bool { return s.Orphans >= 300 && m.zombies() == 0 })
	if !allReady(s) {
		t.Errorf("children: %+v", s.Children)
	}
}

// TestHostileNotifications come from a process that is no child.
func TestHostileNotifications(t *testing.T) {
	m := boot(t, header+"services:\n"+service("web", "web", `, health: {tcp: "127.0.0.1:1", interval: 100ms}`), "")
	m.until("the engine ready", func(s Status) bool { return len(s.Children) > 0 && s.Children[0].State == "ready" })
	to := &net.UnixAddr{Name: filepath.Join(m.dir, "run/notify"), Net: "unixgram"}
	c, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	for i := range 2000 {
		b := bytes.Repeat([]byte{byte(i), byte(i >> 3), '\n', '='}, i%1200)
		if i%2 == 0 {
			b = []byte("READY=1\nSTATUS=forged\nWATCHDOG=1")
		}
		if _, err := c.WriteToUnix(b, to); err != nil {
			t.Fatal(err)
		}
	}
	// A process outside the PID namespace has no number in it, so its messages
	// are dropped before they are counted.
	s := m.until("the rest answered", func(Status) bool { return true })
	if s.Children[0].Status != "cluster test" || s.Children[1].State != "starting" {
		t.Errorf("children after forged messages: %+v", s.Children)
	}
}

// TestBrokenConfiguration shows the error and stays up.
func TestBrokenConfiguration(t *testing.T) {
	m := boot(t, header+"sytem: {}\n", "")
	l := m.line(`unknown key "sytem"`)
	if !strings.Contains(l, "cluster.yaml:3:1") || !strings.Contains(l, `did you mean "system"?`) {
		t.Errorf("the console says %q", l)
	}
	s := m.until("a status", func(Status) bool { return true })
	if !strings.Contains(s.Config.Error, "sytem") || len(s.Children) != 0 {
		t.Errorf("status %+v", s)
	}
	m.cmd.Process.Signal(syscall.SIGTERM)
	if sig := m.ends(); sig != syscall.SIGINT {
		t.Errorf("ended by %v", sig)
	}
}

// TestStick: the stick's configuration goes before the one that was built in.
func TestStick(t *testing.T) {
	m := bootWith(t, header, "clonecluster.stick=1 clonecluster.cluster.name=both", []byte(strings.Replace(header, "name: test", "name: edited", 1)))
	m.line("the configuration is the stick's disk=sda")
	s := m.until("a status", func(s Status) bool { return s.Cluster != "" })
	if s.Cluster != "both" || s.Config.Stick != "sda" || s.Config.StickError != "" || s.Config.File != "cluster.yaml" || len(s.Config.Ignored) != 0 {
		t.Errorf("status %+v", s)
	}
	m = bootWith(t, header, "clonecluster.stick=0", []byte(strings.Replace(header, "name: test", "name: edited", 1)))
	if s := m.until("a status", func(s Status) bool { return s.Cluster != "" }); s.Cluster != "test" {
		t.Errorf("clonecluster.stick=0: cluster %q; want the one built in", s.Cluster)
	}
}

// TestBrokenStick: every mistake is told, and the node serves.
func TestBrokenStick(t *testing.T) {
	m := bootWith(t, header, "clonecluster.stick=1", []byte(header+"sytem: {}\nservices: 7\n"))
	m.line("the stick's configuration cannot be used: this node takes the one that was built in disk=sda")
	m.line(`unknown key "sytem"`)
	s := m.until("a status", func(s Status) bool { return s.Cluster != "" })
	if s.Cluster != "test" || s.Config.Stick != "sda" || !strings.Contains(s.Config.StickError, "sytem") || !strings.Contains(s.Config.StickError, "services") ||
		s.Config.Error != "" || s.Config.File == "cluster.yaml" || len(s.Children) == 0 {
		t.Errorf("status %+v", s)
	}
}

func TestMissingConfiguration(t *testing.T) {
	m := boot(t, "", "")
	m.line("no such file")
	m.line("clonectl image --config")
}

// TestOverridesAndStatus looks at what the status and the log tell.
func TestOverridesAndStatus(t *testing.T) {
	m := boot(t, header+"services:\n"+service("web", "web", webHealth), "quiet clonecluster.cluster.name=other clonecluster.sytem.x=1")
	m.line("clonecluster.sytem.x: unknown name")
	m.line("system (parameter ignored)")
	s := m.until("the health check answered", func(s Status) bool {
		return len(s.Children) == 2 && s.Children[1].Health == "the answer is 404 Not Found"
	})
	if s.Cluster != "other" || s.Node != "02:00:00:00:00:01" || s.NIC != "fake0" || s.Address != "10.77.0.101/24" || s.Children[0].Status != "cluster other" {
		t.Errorf("status %+v", s)
	}
	if web := s.Children[1]; *web.Healthy || web.State != "starting" {
		t.Errorf("web %+v", web)
	}
	if s.Memory.Init == 0 || s.Memory.Engine == 0 || s.Watchdog.Off == "" || len(s.Config.Ignored) != 1 {
		t.Errorf("status %+v", s)
	}
	var stages []string
	for _, st := range s.Timeline {
		stages = append(stages, st.Stage)
	}
	if got := strings.Join(stages, " "); !strings.HasPrefix(got, "kernel init link") || !strings.Contains(got, "engine") || strings.Contains(got, "ready") {
		t.Errorf("timeline %s", got)
	}
	for _, e := range s.Config.Values {
		if e.Path == "cluster.key" && e.Value != "(secret)" {
			t.Errorf("the status shows the key: %s", e.Value)
		}
	}
	r, err := m.http.Get("http://init/v1/log?name=init")
	if err != nil {
		t.Fatal(err)
	}
	defer r.Body.Close()
	var b bytes.Buffer
	b.ReadFrom(r.Body)
	if !strings.Contains(b.String(), "timeline stage=engine") {
		t.Errorf("log of init: %s", b.String())
	}
}
