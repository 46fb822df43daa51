package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"clonecluster/config"
	"clonecluster/qemu"
	"clonecluster/qemu/lab"
)

const (
	// bootTimeout is ten times what a loaded two-core machine took to emulate
	// three nodes.
	bootTimeout = 5 * time.Minute
	// shutdownTimeout is how long nodes may take to power off before they are
	// killed. A power button makes a node drain first.
	shutdownTimeout = 45 * time.Second
	answerPatience  = 15 * time.Second // of nodes that are up
	askInterval     = 400 * time.Millisecond
	drawInterval    = 200 * time.Millisecond
)

// up is a running "qemu up".
type up struct {
	o     upOptions
	cfg   *config.Config
	lab   *lab.Lab
	view  *view
	log   io.Writer // for lines that stay
	nodes []nodeRef
	asker *asker
	begin time.Time
	// target is where the service answers.
	target target
	first  time.Duration // until the first HTTP answer

	asks int // by askOn

	mu     sync.Mutex
	hint   string
	state  []nodeSnapshot
	scene  *scene // what is being shown, nil for nothing
	ending bool   // the nodes are ended on purpose
	victim string // the node that is killed on purpose
}

// report is what "qemu up --once --json" prints.
type report struct {
	OK     bool    `json:"ok"`
	Checks []check `json:"checks"`
	// FirstAnswer is the time from the start of the first machine to the first
	// HTTP answer, in seconds.
	FirstAnswer float64                   `json:"first_answer_seconds"`
	Timeline    map[string][]stageSeconds `json:"timeline"`
	Accel       string                    `json:"accel"`
	// Kill is what clients saw of a node that was killed and came back.
	Kill *killReport `json:"kill,omitempty"`
}

type stageSeconds struct {
	Stage   string  `json:"stage"`
	Seconds float64 `json:"seconds"`
}

var errChecksFailed = errors.New("not every check held")

func runUp(ctx context.Context, o upOptions, stdout io.Writer) error {
	img, err := openImage(o.image, o.append)
	if err != nil {
		return err
	}
	cache, err := cacheDir()
	if err != nil {
		return err
	}
	labCfg, err := labConfig(img, o, cache)
	if err != nil {
		return err
	}
	u := &up{o: o, cfg: img.config, view: newView(os.Stderr), log: os.Stderr, begin: time.Now()}
	for _, n := range labCfg.Nodes {
		u.nodes = append(u.nodes, nodeRef{n.Name, n.MAC})
		u.state = append(u.state, nodeSnapshot{name: n.Name, mac: n.MAC.String()})
	}
	labCfg.OnEvent = u.event
	u.say("cluster %q at %s: booting %s", u.cfg.Cluster.Name, strings.Join(vips(u.cfg), " and "), plural(o.nodes, "node"))
	if u.lab, err = lab.Start(ctx, labCfg); err != nil {
		if errors.Is(err, syscall.EADDRINUSE) {
			err = fmt.Errorf("%w; choose another port with --listen or --api", err)
		}
		return err
	}
	defer u.lab.Close()
	u.say("%s", u.accelerator())
	if o.listen != "" {
		u.hint = "http://" + u.lab.ForwardAddr(0).String() + "/"
	}
	if o.api != "" && u.cfg.Management.Port != 0 {
		forget, err := writeLab(u.cfg, u.lab.ForwardAddr(len(labCfg.Forwards)-1).String())
		if err != nil {
			return fmt.Errorf("noting where the cluster's API is: %w", err)
		}
		defer forget()
	}
	if u.target, err = webAddress(u.cfg); err != nil {
		return err
	}
	u.asker = newAsker(u.lab.Client(), u.target.Port(), u.nodes)

	stopDrawing := u.startDrawing(ctx)
	err = u.run(ctx, stdout)
	stopDrawing()
	u.end()
	return errors.Join(err, u.lab.Close())
}

// accelerator says how the nodes run, and why only if somebody wants to know.
func (u *up) accelerator() string {
	a := u.lab.Accel()
	switch {
	case u.o.verbose:
		return fmt.Sprintf("accelerator: %s (%s)", a.Accel, a.Reason)
	case a.Accel == qemu.TCG && u.o.accel == "auto":
		return "accelerator: tcg, as KVM does not work here (--verbose says why)"
	}
	return "accelerator: " + string(a.Accel)
}

func plural(n int, what string) string {
	if n != 1 {
		what += "s"
	}
	return fmt.Sprintf("%d %s", n, what)
}

func (u *up) run(ctx context.Context, stdout io.Writer) error {
	bootCtx, cancel := context.WithTimeout(ctx, bootTimeout)
	defer cancel()
	if err := u.lab.WaitAll(bootCtx, "ready"); err != nil {
		return u.bootError(ctx, err)
	}
	late := time.AfterFunc(answerPatience, func() {
		u.say("the nodes are up, but %v does not answer; does the service listen on that port? --logs FOLDER keeps what the nodes say", u.target)
	})
	defer late.Stop()
	if err := u.asker.first(bootCtx, u.target.Addr()); err != nil {
		return u.bootError(ctx, err)
	}
	late.Stop()
	u.first = time.Since(u.begin)
	u.say("first HTTP answer from the VIP after %s", seconds(u.first))
	if u.o.once {
		return u.once(ctx, stdout)
	}
	u.say("the cluster answers on %s   (try: curl %swhoami)   Ctrl-C ends it", u.hint, u.hint)
	if u.o.api != "" && u.cfg.Management.Port != 0 {
		u.say("to see in the browser what the nodes do, from another terminal: %s dashboard", os.Args[0])
	}
	u.status("%s   Ctrl-C ends it", u.hint)
	return u.stay(ctx)
}

// bootError adds what the consoles said, unless the user ended it.
func (u *up) bootError(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return ctx.Err()
	}
	return fmt.Errorf("the cluster did not come up: %w\n%s", err, u.lab.Report())
}

// once checks everything, stops the nodes, and checks I1 over all of it.
func (u *up) once(ctx context.Context, stdout io.Writer) error {
	checks := []check{{"every node came up", true, fmt.Sprintf("%d of %d", len(u.nodes), len(u.nodes))}}
	more, err := checkTraffic(ctx, u.asker, u.cfg, u.nodes, u.o.requests, u.status)
	if err != nil {
		return err
	}
	checks = append(checks, more...)
	var kill *killReport
	timeline := u.timelines()
	if u.kills() {
		u.status("a node loses its power, and comes back")
		if kill, err = u.killAndRejoin(ctx); err == nil {
			checks = append(checks, kill.checks()...)
		} else if ctx.Err() != nil {
			return ctx.Err()
		} else {
			checks = append(checks, check{"a node was killed and came back", false, err.Error()})
		}
	}
	checks = append(checks, checkSwitch(u.lab.Switch(), u.cfg.VIP.CloneMAC, u.nodes)...)

	u.status("stopping the nodes by their power buttons")
	u.end()
	stopCtx, cancel := context.WithTimeout(ctx, shutdownTimeout)
	defer cancel()
	off := check{"every node powered off when asked", true, fmt.Sprintf("%d of %d", len(u.nodes), len(u.nodes))}
	if err := u.lab.Shutdown(stopCtx); err != nil {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		off.OK, off.Detail = false, err.Error()
	}
	checks = append(checks, off, checkGuard(u.lab.Switch()))
	u.view.erase()

	r := report{OK: true, Checks: checks, FirstAnswer: u.first.Seconds(), Accel: string(u.lab.Accel().Accel), Timeline: timeline, Kill: kill}
	failed := 0
	for _, c := range checks {
		if !c.OK {
			failed++
			r.OK = false
		}
		if !u.o.asJSON {
			fmt.Fprintln(stdout, c)
		}
	}
	if u.o.asJSON {
		if err := printJSON(stdout, r); err != nil {
			return err
		}
	}
	if u.o.pcap != "" {
		u.say("every frame that crossed the switch is in %s", u.o.pcap)
	}
	if failed > 0 {
		return fmt.Errorf("%w: %d of %d failed\n%s", errChecksFailed, failed, len(checks), u.lab.Report())
	}
	return nil
}

func (u *up) timelines() map[string][]stageSeconds {
	u.mu.Lock()
	defer u.mu.Unlock()
	all := map[string][]stageSeconds{}
	for _, n := range u.state {
		for _, s := range n.stages {
			all[n.name] = append(all[n.name], stageSeconds{s.name, s.at.Seconds()})
		}
	}
	return all
}

// stay asks now and then until the user ends it. After a while it shows how a node
// loses its power and comes back.
func (u *up) stay(ctx context.Context) error {
	u.asker.timeout = 3 * time.Second // an outage should show soon
	hint := u.hint
	if u.kills() {
		normal, cancel := context.WithTimeout(ctx, normalTime)
		u.askOn(normal)
		cancel()
		if err := u.showKill(ctx, hint); err != nil && ctx.Err() == nil {
			u.say("showing the loss of a node: %v", err)
		}
	}
	u.askOn(ctx)
	u.view.erase()
	return u.goodbye()
}

// kills says whether a node is to be killed. Somebody may have been faster.
func (u *up) kills() bool {
	return !u.o.noKill && len(u.nodes) > 1
}

func (u *up) showKill(ctx context.Context, hint string) error {
	if i := slices.IndexFunc(u.lab.Nodes(), func(m *lab.Machine) bool { return !m.Running() }); i >= 0 {
		u.say("%s is down already, so no other node is killed", u.nodes[i].name)
		return nil
	}
	r, err := u.killAndRejoin(ctx)
	if err != nil {
		return err
	}
	for _, c := range r.checks() {
		if !c.OK {
			u.say("%v", c)
		}
	}
	u.status("%s   %s", hint, r.summary())
	if !u.view.tty {
		u.say("%s; Ctrl-C ends it", r.summary())
	}
	return nil
}

// askOn asks now and then until ctx ends.
func (u *up) askOn(ctx context.Context) {
	vips := []netip.Addr{}
	for _, p := range []netip.Prefix{u.cfg.VIP.IPv4, u.cfg.VIP.IPv6} {
		if p.IsValid() {
			vips = append(vips, p.Addr())
		}
	}
	tick := time.NewTicker(askInterval)
	defer tick.Stop()
	for ; ; u.asks++ {
		i := u.asks
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		got, err := u.asker.ask(ctx, vips[i%len(vips)])
		if !u.view.tty && ctx.Err() == nil {
			u.sayAnswer(i, vips[i%len(vips)], got, err)
		}
	}
}

// sayAnswer prints the first answers, all failures, and a sum now and then: a
// log that somebody may keep for hours.
func (u *up) sayAnswer(i int, vip netip.Addr, got answer, err error) {
	switch {
	case err != nil:
		u.say("%s: %v", vip, err)
	case i < 10:
		u.say("%s answered by %s (%s)", vip, u.asker.names[got.Node], got.Hostname)
	case i%75 == 0:
		s := u.snapshot()
		u.say("%d answered, %d failed; %d frames flooded; clone MAC in the switch's table: %v; I1 violations: %d",
			s.asked, s.failed, s.flooded, s.learned, s.breaches)
	}
}

// goodbye says what was seen. A user's Ctrl-C is a good end, unless I1 was broken.
func (u *up) goodbye() error {
	s := u.snapshot()
	u.say("%d requests of this view answered, %d failed; %d frames flooded", s.asked, s.failed, s.flooded)
	if c := checkGuard(u.lab.Switch()); !c.OK {
		return fmt.Errorf("%w: %s", errChecksFailed, c)
	}
	return nil
}

// show makes a scene part of the live view; nil ends it.
func (u *up) show(s *scene) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.scene = s
}

// expect says that the end of a node will be no surprise.
func (u *up) expect(victim string) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.victim = victim
}

// end says that nodes which end from now on are ended on purpose.
func (u *up) end() {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.ending = true
}

// event is called by the lab for everything that happens to a node.
func (u *up) event(e lab.Event) {
	u.mu.Lock()
	defer u.mu.Unlock()
	i := slices.IndexFunc(u.state, func(n nodeSnapshot) bool { return n.name == e.Node })
	if i < 0 {
		return
	}
	n := &u.state[i]
	switch e.Kind {
	case lab.Started:
		n.gone, n.ready, n.stages = false, false, nil
		if u.victim == n.name {
			u.victim = ""
		}
		if u.o.verbose {
			u.line("%s: %s", n.name, e.Text)
		}
	case lab.Reset:
		n.ready, n.stages = false, nil
	case lab.Reached:
		n.stages = append(n.stages, stage{e.Stage.Name, e.Stage.At})
		if mgmt := e.Stage.Attrs["mgmt"]; mgmt != "" {
			n.mgmt = mgmt
		}
		if e.Stage.Name == "ready" {
			n.ready = true
			if !u.view.tty {
				u.line("%s is up: %s", n.name, timeline(n.stages))
			}
		}
	case lab.Exited:
		n.gone, n.ready, n.lived = true, false, e.Since
		if u.ending || u.victim == n.name {
			u.victim = ""
			return
		}
		how := "powered off"
		if e.Err != nil {
			how = firstLine(e.Err)
		}
		u.line("%s ended after %s: %s", n.name, seconds(e.Since), how)
	}
}

func firstLine(err error) string {
	s, _, _ := strings.Cut(err.Error(), "\n")
	return s
}

// say prints a line that stays, above the live view.
func (u *up) say(format string, args ...any) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.line(format, args...)
}

func (u *up) line(format string, args ...any) {
	u.view.erase()
	fmt.Fprintf(u.log, format+"\n", args...)
}

// status is for what the view shows anyway in another form.
func (u *up) status(format string, args ...any) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.hint = fmt.Sprintf(format, args...)
}

// startDrawing keeps the live view current until the function it returns is
// called.
func (u *up) startDrawing(ctx context.Context) (stop func()) {
	if !u.view.tty {
		return func() {}
	}
	ctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	done := make(chan struct{})
	go func() {
		defer close(done)
		tick := time.NewTicker(drawInterval)
		defer tick.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
				s := u.snapshot()
				u.mu.Lock()
				if ctx.Err() == nil {
					u.view.draw(s)
				}
				u.mu.Unlock()
			}
		}
	}()
	return func() {
		cancel()
		<-done
		u.mu.Lock()
		defer u.mu.Unlock()
		u.view.erase()
	}
}

func (u *up) snapshot() snapshot {
	sw := u.lab.Switch()
	st := sw.Stats()
	score := u.asker.score()
	clone := u.cfg.VIP.CloneMAC
	s := snapshot{
		title: fmt.Sprintf("cluster %s  %s", u.cfg.Cluster.Name, strings.Join(vips(u.cfg), "  ")), elapsed: time.Since(u.begin),
		asked: score.asked, failed: len(score.failed), last: score.last,
		clone: clone.String(), flooded: st.GuardFloods, breaches: int(st.Violations),
	}
	for _, e := range sw.Table() {
		s.table = append(s.table, fmt.Sprintf("%s  %-8s %s ago", e.MAC, e.Port, e.Age.Round(100*time.Millisecond)))
		s.learned = s.learned || slices.Equal(e.MAC, clone)
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.scene != nil {
		s.scene = u.scene.lines()
	}
	s.hint = u.hint
	for i, n := range u.state {
		n.stages = slices.Clone(n.stages)
		n.answers = score.byNode[net.HardwareAddr(u.nodes[i].mac).String()]
		s.nodes = append(s.nodes, n)
	}
	return s
}
