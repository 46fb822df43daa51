// Package uinit is the appliance's PID 1: it makes a machine of a kernel and an
// initramfs, runs the engine and the services, and ends them in order.
//
// PID 1 must never end: the kernel panics if it does. So one goroutine owns the
// children, decides by a state machine that is tested without processes, and is
// shielded from panics, as is every other goroutine; whatever the network sends
// is parsed under such a shield; nothing waits for the console or for a child.
// A panic that cannot be caught is a kernel panic, and kernel.panic=10 makes
// that a restart of the node.
//
// Sources: the kernel's Documentation (admin-guide/init.rst, watchdog,
// devices), sd_notify(3), RFC 2131 for DHCP; u-root's pkg/libinit and gokrazy
// for what an init in Go has to do.
package uinit

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/netip"
	"os"
	"os/signal"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"clonecluster/config"
	"clonecluster/netcore/health/probe"
	"clonecluster/netcore/nic"
	"clonecluster/uinit/stick"
)

// Where things are in the appliance.
const (
	ConfigFile   = "/etc/clonecluster/cluster.yaml"
	RunDir       = "/run/clonecluster"
	StatusSocket = RunDir + "/init.sock"    // HTTP: GET /v1/status, GET /v1/log?name=NAME
	NotifySocket = RunDir + "/notify"       // sd_notify(3)
	EngineConfig = RunDir + "/cluster.yaml" // the effective configuration, for the engine
	EngineBinary = "/bin/cloned"
)

// Main is PID 1 of the appliance. It does not return, except at once when the
// process is not PID 1.
func Main() {
	if os.Getpid() != 1 {
		fmt.Fprintln(os.Stderr, "init: this is the appliance's first process; it does nothing when started by hand")
		return
	}
	// The heap is small; what matters is that it stays so. Collecting at a
	// quarter more than is in use costs microseconds at this size.
	debug.SetGCPercent(25)
	debug.SetMemoryLimit(24 << 20)
	start := sinceBoot()
	for {
		func() {
			defer func() {
				if r := recover(); r != nil {
					fmt.Fprintf(os.Stderr, "init: panic: %v\n%s\n", r, debug.Stack())
				}
			}()
			newInit(appliance(), start).run()
		}()
		time.Sleep(time.Second)
	}
}

// environment is what init does to the machine it runs on; tests give another.
type environment struct {
	mounts     []mount
	sysctlRoot string // "": no settings
	dev        string // the folder with console, watchdogs and input devices
	sys        string // sysfs
	kmsg       string
	cmdline    string // the kernel's command line, a file
	configFile string
	runDir     string
	engine     []string // program and arguments; CONFIG and NIC stand for the two
	policy     policy
	setClock   bool
	arm        func(classDir, devDir string, timeout time.Duration) (*watchdog, error)
	hostname   func(string) error
	network    func(ctx context.Context, n *network)
	end        func(ending) error
}

func appliance() environment {
	return environment{
		mounts:     mounts,
		sysctlRoot: "/proc/sys",
		dev:        "/dev",
		sys:        "/sys",
		kmsg:       "/dev/kmsg",
		cmdline:    "/proc/cmdline",
		configFile: ConfigFile,
		runDir:     RunDir,
		// Nothing else runs here that the engine could be refused for, and a boot is not to wait.
		engine:   []string{EngineBinary, "--check=false", "--config", "CONFIG", "--interface", "NIC"},
		policy:   defaultPolicy,
		setClock: true,
		arm:      openWatchdog,
		hostname: func(name string) error { return unix.Sethostname([]byte(name)) },
		network: func(ctx context.Context, n *network) {
			if err := loopbackUp(); err != nil {
				n.log.Error("network", "error", err)
			}
			n.run(ctx)
		},
		end: reboot,
	}
}

// pid1 is the running init. Its fields belong to the goroutine of loop, except
// where a comment says otherwise.
type pid1 struct {
	env     environment
	journal *journal // any goroutine
	level   *slog.LevelVar
	log     *slog.Logger // any goroutine
	events  chan func()  // what other goroutines have to say
	died    chan os.Signal

	started    time.Duration
	timeline   timeline
	config     *config.Config // nil: none that can be used
	configErr  error
	stick      *stick.Found // nil: there is none
	stickErr   error        // why the stick's configuration is not used
	ignored    config.Problems
	sup        *supervisor
	programs   map[string]program
	outputs    map[string]*os.File           // of the running children
	probing    map[string]context.CancelFunc // health checks of the running children
	card       nic.NIC
	hasCard    bool
	address    netip.Prefix
	dog        *watchdog
	dogErr     string
	notifySock *net.UnixConn
	strangers  int // notify messages from processes that are no children
	orphans    int // reaped
	ended      bool
}

func newInit(env environment, started time.Duration) *pid1 {
	level := new(slog.LevelVar)
	j := newJournal(sinceBoot)
	return &pid1{
		env: env, journal: j, level: level, log: j.logger(level), started: started,
		events: make(chan func(), 64), programs: map[string]program{},
		outputs: map[string]*os.File{}, probing: map[string]context.CancelFunc{},
		sup: newSupervisor(env.policy, nil, started), died: make(chan os.Signal, 1),
	}
}

// catch is deferred where a panic must not be the end.
func catch(log *slog.Logger, what string) {
	if r := recover(); r != nil {
		log.Error(what+" panicked", "panic", fmt.Sprint(r))
		log.Error(string(debug.Stack()))
	}
}

// keep runs f in a goroutine, again after a panic, until it returns.
func (p *pid1) keep(what string, f func()) {
	go func() {
		for again := true; again; {
			func() {
				defer catch(p.log, what)
				f()
				again = false
			}()
			if again {
				time.Sleep(time.Second)
			}
		}
	}()
}

// tell hands something to the loop.
func (p *pid1) tell(f func()) { p.events <- f }

// run boots and then runs the loop; it does not return.
func (p *pid1) run() {
	// Signals first: from here on an early Ctrl-Alt-Del is remembered.
	sigs := make(chan os.Signal, 16)
	signal.Notify(sigs, unix.SIGTERM, unix.SIGINT, unix.SIGUSR1, unix.SIGUSR2, unix.SIGPWR)
	// Caught and not ignored: children would inherit the ignoring.
	signal.Notify(make(chan os.Signal, 1), unix.SIGHUP, unix.SIGPIPE)
	signal.Notify(p.died, unix.SIGCHLD)

	p.step("booting", p.boot)
	p.loop(sigs)
}

// step runs a part of the boot; whatever it does, the boot goes on.
func (p *pid1) step(what string, f func()) {
	defer catch(p.log, what)
	f()
}

// boot does what comes before the children. The order is by need: the console
// needs /dev, the configuration is wanted for the console, and everything from
// here on may want to log.
func (p *pid1) boot() {
	mountErr := mountAll(p.env.mounts)
	p.step("reading the configuration", p.readConfig)
	p.step("opening the console", p.startConsole)
	p.log.Info("clonecluster", "pid", os.Getpid())
	if mountErr != nil {
		p.log.Error("mounts", "error", mountErr)
	}
	for _, s := range kernelStages(readKernelLog(p.env.kmsg)) {
		p.stage(s.Name, s.At)
	}
	p.stage("init", p.started)
	_ = unix.Reboot(unix.LINUX_REBOOT_CMD_CAD_OFF) // Ctrl-Alt-Del becomes SIGINT; refused in a container
	if p.env.sysctlRoot != "" {
		applySettings(p.env.sysctlRoot, settings, p.log)
	}
	if p.env.setClock {
		setClock(p.log)
		// Nothing below waits for it; who needs random numbers waits itself.
		p.keep("waiting for random numbers", func() { waitEntropy(10*time.Second, p.log) })
	}
	if err := os.MkdirAll(p.env.runDir, 0o755); err != nil {
		p.log.Error("making the run folder", "error", err)
	}
	p.step("listening for notifications", p.startNotify)
	p.step("serving the status", p.startStatus)
	p.step("looking for power buttons", p.startButtons)
	p.reportConfig()
	p.step("preparing the children", p.prepare)
	if p.config == nil {
		return
	}
	p.step("naming the host", func() { p.nameHost(p.config.Cluster.Name) })
	p.step("starting the network", p.startNetwork)
}

// stickWait is how long a node that was booted from a stick waits for it: hubs
// and slow sticks take up to 10 s to be there.
const stickWait = 15 * time.Second

// readConfig takes the configuration of the stick if there is one that can be
// used, and else the one that was built in.
func (p *pid1) readConfig() {
	cmdline, err := os.ReadFile(p.env.cmdline)
	if err != nil {
		cmdline = nil
	}
	p.step("reading the stick", func() { p.readStick(string(cmdline)) })
	if p.config != nil {
		return
	}
	data, err := config.ReadFile(p.env.configFile)
	if err != nil {
		p.configErr = err
		return
	}
	p.config, p.ignored, p.configErr = config.LoadWithCmdline(data, filepath.Base(p.env.configFile), string(cmdline))
	if p.config != nil {
		p.level.Set(p.config.System.Level())
	}
}

func (p *pid1) readStick(cmdline string) {
	wait := time.Duration(0)
	switch config.Stick(cmdline) {
	case "0":
		return
	case "1":
		wait = stickWait
	}
	p.stick = stick.Find(filepath.Join(p.env.sys, "class/block"), p.env.dev, wait, config.MaxBytes)
	if p.stick == nil {
		if wait > 0 {
			p.stickErr = fmt.Errorf("this machine was booted from a stick, which did not appear within %v", wait)
		}
		return
	}
	if p.stickErr = p.stick.Err; p.stickErr != nil {
		return
	}
	c, ignored, err := config.LoadWithCmdline(p.stick.Config, stick.ConfigFile, cmdline)
	if p.stickErr = err; err != nil {
		return
	}
	p.config, p.ignored, p.stick.Config = c, ignored, nil
	p.level.Set(c.System.Level())
}

func (p *pid1) startConsole() {
	name := ""
	if p.config != nil {
		name = p.config.System.Console
	}
	f, err := openConsole(p.env.dev, name)
	if f == nil {
		f = os.Stderr
	}
	if err != nil {
		p.log.Warn("console", "error", err)
	}
	p.keep("the console", func() { p.journal.show(context.Background(), f) })
}

// reportConfig tells what is wrong with the configuration. Without a usable one
// it is told again every minute: whoever plugs a screen in must see it.
func (p *pid1) reportConfig() {
	p.reportStick()
	for _, problem := range p.ignored {
		p.log.Warn(problem.Error() + " (parameter ignored)")
	}
	if p.config != nil {
		for _, w := range p.config.Warnings() {
			p.log.Warn(w)
		}
		return
	}
	err := p.configErr
	if err == nil {
		err = errors.New("it could not be read")
	}
	p.keep("reporting the configuration", func() {
		for {
			p.log.Error("this node does nothing: its configuration cannot be used", "file", p.env.configFile)
			p.log.Error(err.Error())
			if errors.Is(err, os.ErrNotExist) {
				p.log.Error("the image has no configuration; build one that has: clonectl image --config cluster.yaml")
			}
			time.Sleep(time.Minute)
		}
	})
}

func (p *pid1) reportStick() {
	disk := "?"
	if p.stick != nil {
		disk = p.stick.Disk
		if len(p.stick.Others) > 0 {
			p.log.Warn("several sticks: only the first is read", "disk", disk, "others", p.stick.Others)
		}
	}
	switch {
	case p.stickErr != nil:
		p.log.Error("the stick's configuration cannot be used: this node takes the one that was built in", "disk", disk)
		p.log.Error(p.stickErr.Error())
	case p.stick != nil:
		p.log.Info("the configuration is the stick's", "disk", disk, "file", stick.ConfigFile)
	}
}

func (p *pid1) startNotify() {
	conn, err := listenNotify(filepath.Join(p.env.runDir, filepath.Base(NotifySocket)))
	if err != nil {
		p.log.Error("children cannot say that they are ready", "error", err)
		return
	}
	p.notifySock = conn
	p.keep("the notify socket", func() {
		for {
			err := serveNotify(conn, func(pid int, m message) {
				p.tell(func() {
					if !p.sup.notified(pid, m, sinceBoot()) {
						p.strangers++
					}
				})
			})
			if errors.Is(err, net.ErrClosed) {
				return
			}
			p.log.Error("notify", "error", err)
			time.Sleep(time.Second)
		}
	})
}

func (p *pid1) startButtons() {
	p.keep("the power button", func() {
		err := powerButtons(context.Background(), filepath.Join(p.env.sys, "class/input"), filepath.Join(p.env.dev, "input"), func() {
			p.tell(func() {
				p.log.Info("the power button was pressed")
				p.sup.stop(endPowerOff, sinceBoot())
			})
		})
		switch {
		case errors.Is(err, errNoPowerButton):
			p.log.Debug("power button", "error", err)
		case err != nil:
			p.log.Warn("power button", "error", err)
		}
	})
}

func (p *pid1) startWatchdog() {
	timeout := p.config.System.Watchdog
	if timeout == 0 {
		p.dogErr = "off by the configuration"
		return
	}
	dog, err := p.env.arm(filepath.Join(p.env.sys, "class/watchdog"), p.env.dev, timeout)
	if err != nil {
		p.dogErr = err.Error()
		p.log.Warn("nobody resets this machine if it stands still", "error", err)
		return
	}
	p.dog = dog
	p.log.Info("watchdog", "device", dog.Device, "identity", dog.Identity, "timeout", dog.Timeout)
}

// prepare arms the watchdog and makes the supervisor with its children, whose
// times follow what the watchdog can do. Without a configuration there is
// neither a watchdog nor a child.
func (p *pid1) prepare() {
	policy := p.env.policy
	var specs []spec
	if p.config != nil {
		p.step("arming the watchdog", p.startWatchdog)
		armed := time.Duration(0)
		if p.dog != nil {
			armed = p.dog.Timeout
		}
		policy = policy.withWatchdog(p.config.System.Watchdog, armed)
		// The engine waits that long for the others to take over.
		policy.LeaveMost += 2 * p.config.Cluster.Detect.Dead()
		if d := p.config.Cluster.Drain; d > defaultPolicy.ServiceGrace {
			policy.ServiceGrace = d
		}
		specs = append(specs, spec{Name: "engine", Engine: true})
		for _, s := range p.config.Services {
			specs = append(specs, spec{Name: s.Name, Checked: question(s.Health) != nil})
		}
		file := filepath.Join(p.env.runDir, filepath.Base(EngineConfig))
		if err := os.WriteFile(file, p.config.Clear(), 0o600); err != nil {
			p.log.Error("writing the engine's configuration", "error", err)
		}
	}
	p.sup = newSupervisor(policy, specs, sinceBoot())
}

// program is what a child runs, with what is known of the machine now.
func (p *pid1) program(c *child) program {
	env := map[string]string{
		"PATH":              "/bin",
		"HOME":              "/",
		"NOTIFY_SOCKET":     filepath.Join(p.env.runDir, filepath.Base(NotifySocket)),
		"CLONECLUSTER_NODE": p.card.MAC.String(),
	}
	if c.Engine {
		if p.sup.policy.EngineHang > 0 { // sd_watchdog_enabled(3)
			env["WATCHDOG_USEC"] = strconv.FormatInt(p.sup.policy.EngineHang.Microseconds(), 10)
		}
		args := slices.Clone(p.env.engine)
		for i, a := range args {
			switch a {
			case "CONFIG":
				args[i] = filepath.Join(p.env.runDir, filepath.Base(EngineConfig))
			case "NIC":
				args[i] = p.card.Name
			}
		}
		// Whatever needs memory, the data plane is the last to pay for it.
		return program{Path: args[0], Args: args, Env: environ(env), OOMScore: -1000}
	}
	for _, s := range p.config.Services {
		if s.Name == c.Name {
			if s.Content != "" {
				env["CLONECLUSTER_CONTENT"] = s.ContentDir()
			}
			maps.Copy(env, s.Env)
			return program{Path: s.Run[0], Args: s.Run, Env: environ(env)}
		}
	}
	return program{}
}

func environ(m map[string]string) []string {
	var list []string
	for _, k := range slices.Sorted(maps.Keys(m)) {
		list = append(list, k+"="+m[k])
	}
	return list
}

func (p *pid1) startNetwork() {
	n := &network{
		config: p.config,
		log:    p.log,
		found: func(card nic.NIC) {
			p.tell(func() { p.useCard(card) })
		},
		carrier: func(on bool) {
			p.tell(func() { p.useCarrier(on) })
		},
		address: func(a netip.Prefix) {
			p.tell(func() {
				p.address = a
				if a.IsValid() {
					p.stage("address", sinceBoot())
				}
			})
		},
	}
	p.keep("the network", func() { p.env.network(context.Background(), n) })
}

func (p *pid1) useCard(card nic.NIC) {
	p.card, p.hasCard = card, true
	p.useCarrier(card.Carrier)
	name := hostName(p.config.Cluster.Name, card.PermanentMAC)
	p.log.Info("node", "name", name, "nic", card.Name, "driver", card.Driver, "pci", card.PCI, "mac", card.MAC)
	p.step("naming the host", func() { p.nameHost(name) })
	p.sup.link(sinceBoot())
}

func (p *pid1) useCarrier(on bool) {
	if on {
		p.stage("link", sinceBoot())
	}
	p.sup.hasCarrier(on, sinceBoot())
}

func (p *pid1) nameHost(name string) {
	if err := p.env.hostname(name); err != nil {
		p.log.Warn("setting the host name", "error", err)
	}
}

// stage notes a stage of the boot and shows it.
func (p *pid1) stage(name string, at time.Duration) {
	if !p.timeline.add(name, at) {
		return
	}
	line := fmt.Sprintf("timeline stage=%s at=%ss", name, seconds(at))
	if name == "ready" {
		mgmt := "-"
		if p.address.IsValid() {
			mgmt = p.address.Addr().String()
		}
		line += fmt.Sprintf(" node=%v mgmt=%s", p.card.MAC, mgmt)
	}
	p.journal.line("init", line)
	if name == "ready" {
		debug.FreeOSMemory() // what the boot needed and the rest of the life does not
		p.journal.line("init", p.memoryLine())
	}
}

// memoryLine says what a node that has just become ready takes, in bytes of
// resident memory. Programs that measure an image read it.
func (p *pid1) memoryLine() string {
	line := fmt.Sprintf("memory init=%d", residentBytes("/proc", "self"))
	for _, c := range p.sup.children {
		if c.pid != 0 {
			line += fmt.Sprintf(" %s=%d", c.Name, residentBytes("/proc", strconv.Itoa(c.pid)))
		}
	}
	return line + fmt.Sprintf(" available=%d", availableBytes("/proc/meminfo"))
}

// loop is the only owner of the children: it starts, signals and reaps them, so
// that a process id it knows cannot be another process's.
func (p *pid1) loop(sigs <-chan os.Signal) {
	timer := time.NewTimer(0)
	for {
		select {
		case <-p.died:
			p.step("reaping", p.reap)
		case s := <-sigs:
			p.step("handling a signal", func() { p.signalled(s) })
		case f := <-p.events:
			p.step("handling an event", f)
		case <-timer.C:
			p.step("handling the clock", func() { p.sup.tick(sinceBoot()) })
		}
		p.step("acting", p.act)
		now := sinceBoot()
		timer.Reset(max(time.Millisecond, p.sup.due(now)-now))
	}
}

// reap takes some of the dead at a time: a flood of orphans must not keep the
// watchdog from being fed.
func (p *pid1) reap() {
	dead, more := reap(64, func(pid int) bool {
		return slices.ContainsFunc(p.sup.children, func(c *child) bool { return c.pid == pid })
	})
	for _, d := range dead {
		for _, c := range p.sup.children {
			if c.pid == d.pid {
				p.forget(c)
			}
		}
		if !p.sup.exited(d.pid, d.how, sinceBoot()) {
			p.orphans++
		}
	}
	if more {
		select {
		case p.died <- unix.SIGCHLD:
		default: // it will be told again anyhow
		}
	}
}

// forget lets go of what belongs to a process that has ended.
func (p *pid1) forget(c *child) {
	if r := p.outputs[c.Name]; r != nil {
		endOutput(r)
		delete(p.outputs, c.Name)
	}
	if cancel := p.probing[c.Name]; cancel != nil {
		cancel()
		delete(p.probing, c.Name)
	}
}

func (p *pid1) signalled(s os.Signal) {
	how := endPowerOff
	switch s {
	case unix.SIGINT: // Ctrl-Alt-Del
		how = endRestart
	case unix.SIGUSR1: // as in busybox
		how = endHalt
	}
	p.log.Info("signal", "signal", s)
	p.sup.stop(how, sinceBoot())
}

// act does what the supervisor has decided.
func (p *pid1) act() {
	for pending := p.sup.take(); len(pending) > 0; pending = p.sup.take() {
		for _, d := range pending {
			p.step("acting", func() { p.do(d) })
		}
	}
}

func (p *pid1) do(d do) {
	switch d := d.(type) {
	case doStart:
		p.start(d.Child)
	case doSignal:
		if d.Child.pid > 1 {
			// ESRCH: it has ended, and the reaper is about to say so.
			if err := unix.Kill(-d.Child.pid, d.Signal); err != nil && !errors.Is(err, unix.ESRCH) {
				p.log.Error("signalling a child", "name", d.Child.Name, "error", err)
			}
		}
	case doLog:
		p.log.Log(context.Background(), d.Level, d.Text)
	case doStage:
		p.stage(d.Stage, sinceBoot())
	case doFeed:
		if p.dog != nil {
			if err := p.dog.feed(); err != nil {
				p.log.Error("feeding the watchdog", "error", err)
			}
		}
	case doEnd:
		p.finish(d.How)
	}
}

func (p *pid1) start(c *child) {
	pid, output, err := 0, (*os.File)(nil), errors.New("panic")
	defer func() { p.sup.startedAs(c, pid, err, sinceBoot()) }()
	pid, output, err = startProcess(p.program(c))
	if err != nil {
		return
	}
	p.outputs[c.Name] = output
	name := c.Name
	go func() {
		defer catch(p.log, "reading the output of "+name)
		capture(output, func(line string) { p.journal.line(name, line) })
	}()
	if !c.Checked {
		return
	}
	for _, s := range p.config.Services {
		if s.Name != c.Name {
			continue
		}
		ctx, cancel := context.WithCancel(context.Background())
		p.probing[c.Name] = cancel
		health, pid := s.Health, pid
		go func() {
			defer catch(p.log, "the health check of "+name)
			probe.Repeat(ctx, health.Interval, health.Timeout, nil, question(health), func(err error) {
				p.tell(func() { p.sup.checked(name, pid, err, sinceBoot()) })
			})
		}()
	}
}

// finish ends the machine: every process is gone or going, and nothing is left
// but what the kernel holds.
func (p *pid1) finish(how ending) {
	if p.ended {
		return
	}
	p.ended = true
	p.log.Info("everything has stopped", "next", how)
	if os.Getpid() == 1 { // anywhere else −1 means every process of the machine
		_ = unix.Kill(-1, unix.SIGKILL)
	}
	if p.dog != nil {
		p.dog.disarm()
		p.dog = nil
	}
	syncDisks(5 * time.Second)
	p.drainConsole(2 * time.Second)
	unmountAll("/proc/self/mounts")
	if err := p.env.end(how); err != nil {
		p.log.Error("the machine does not end", "error", err)
		if how != endRestart {
			err = p.env.end(endRestart) // rather back than stuck
			p.log.Error("nor does it restart", "error", err)
		}
	}
}

// syncDisks writes to the disks what is to be written, but does not wait for a
// disk that is broken.
func syncDisks(most time.Duration) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		unix.Sync()
	}()
	t := time.NewTimer(most)
	defer t.Stop()
	select {
	case <-done:
	case <-t.C:
	}
}

// drainConsole waits until the console has shown what was logged.
func (p *pid1) drainConsole(most time.Duration) {
	end := time.Now().Add(most)
	for len(p.journal.queue) > 0 && time.Now().Before(end) {
		time.Sleep(10 * time.Millisecond)
	}
	time.Sleep(20 * time.Millisecond) // the last line is out of the queue and on its way
}
