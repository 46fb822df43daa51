// Package lab is a laboratory for clusters: virtual machines on a virtual switch
// with a client host, started, disturbed, watched and cleaned up as one thing. The
// demonstration and the integration tests stand on it.
package lab

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"clonecluster/qemu"
	"clonecluster/qemu/nethost"
	"clonecluster/qemu/vswitch"
)

const clientPort = "client"

// Lab is a running laboratory.
type Lab struct {
	cfg      Config
	accel    qemu.Choice
	ctx      context.Context
	cancel   context.CancelFunc
	work     string // sockets, and what else goes away
	logs     string
	initrds  map[string]string // joined initramfs by the parts' names
	sw       *vswitch.Switch
	capture  *os.File
	client   *nethost.Host
	forwards []net.Addr
	machines []*Machine
	wg       sync.WaitGroup // watchers of machines

	eventMu sync.Mutex // one event at a time

	closeOnce sync.Once
	closeErr  error
}

// Start sets up a laboratory and starts its nodes (unless ManualStart is set); it
// does not wait until they have booted. When ctx ends everything is killed; for an
// orderly end call Shutdown before. Close it in any case.
func Start(ctx context.Context, cfg Config) (_ *Lab, err error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	l := &Lab{cfg: cfg, initrds: map[string]string{}}
	l.ctx, l.cancel = context.WithCancel(ctx)
	defer func() {
		if err != nil {
			l.Close()
			err = fmt.Errorf("setting up the lab: %w", err)
		}
	}()
	switch {
	case cfg.allForeign():
		l.accel = qemu.Choice{Accel: qemu.TCG, Reason: "the nodes have another architecture than this computer"}
	case cfg.Accel == "":
		if l.accel, err = qemu.ChooseAccel(ctx, qemu.AccelOptions{CacheDir: cfg.CacheDir, Log: cfg.Log}); err != nil {
			return nil, err
		}
		l.cfg.Accel = l.accel.Accel
	default:
		l.accel = qemu.Choice{Accel: cfg.Accel, Reason: "as configured"}
	}
	if err := l.folders(); err != nil {
		return nil, err
	}
	if err := l.network(); err != nil {
		return nil, err
	}
	for i := range cfg.Nodes {
		if err := l.addMachine(i); err != nil {
			return nil, err
		}
	}
	if cfg.ManualStart {
		return l, nil
	}
	errs := make([]error, len(l.machines))
	var starts sync.WaitGroup
	for i, m := range l.machines {
		starts.Go(func() { errs[i] = m.Start() })
	}
	starts.Wait()
	return l, errors.Join(errs...)
}

// folders makes the folders and what belongs in them. Sockets go to a temporary
// folder always, because their paths must be short.
func (l *Lab) folders() (err error) {
	if l.work, err = os.MkdirTemp("", "clonecluster-lab-"); err != nil {
		return err
	}
	l.logs = l.cfg.Dir
	if l.logs == "" {
		l.logs = l.work
	} else if err := os.MkdirAll(l.logs, 0o755); err != nil {
		return err
	}
	return nil
}

// initrd is one file with the parts joined.
func (l *Lab) initrd(parts []string) (string, error) {
	switch len(parts) {
	case 0:
		return "", nil
	case 1:
		return parts[0], nil
	}
	key := strings.Join(parts, "\x00")
	if file, ok := l.initrds[key]; ok {
		return file, nil
	}
	file := filepath.Join(l.work, fmt.Sprintf("initrd%d", len(l.initrds)))
	l.initrds[key] = file
	return file, joinInitrd(file, parts)
}

// joinInitrd joins archives. The kernel wants each to begin at a multiple of four
// bytes and skips zeros in between (Documentation/driver-api/early-userspace/
// buffer-format.rst).
func joinInitrd(name string, parts []string) error {
	out, err := os.Create(name)
	if err != nil {
		return err
	}
	defer out.Close()
	for _, p := range parts {
		in, err := os.Open(p)
		if err != nil {
			return err
		}
		n, err := io.Copy(out, in)
		in.Close()
		if err != nil {
			return fmt.Errorf("joining %s: %w", p, err)
		}
		if _, err := out.Write(make([]byte, (4-n%4)%4)); err != nil {
			return err
		}
	}
	return out.Close()
}

func (l *Lab) network() (err error) {
	sc := l.cfg.Switch
	if sc.Log == nil {
		sc.Log = l.cfg.Log
	}
	if l.cfg.PCAP != "" {
		if l.capture, err = os.Create(l.cfg.PCAP); err != nil {
			return err
		}
		sc.Mirror = l.capture
	}
	if l.sw, err = vswitch.New(sc); err != nil {
		return err
	}
	if l.cfg.Client == nil {
		return nil
	}
	cc := *l.cfg.Client
	if cc.Log == nil {
		cc.Log = l.cfg.Log
	}
	if l.client, err = nethost.Attach(l.sw, clientPort, cc); err != nil {
		return err
	}
	for _, f := range l.cfg.Forwards {
		addr, err := l.client.Forward(f.Listen, f.To)
		if err != nil {
			return err
		}
		l.forwards = append(l.forwards, addr)
	}
	return nil
}

// Accel is the accelerator the nodes run under, and why.
func (l *Lab) Accel() qemu.Choice { return l.accel }

// Switch is the switch that all are connected to.
func (l *Lab) Switch() *vswitch.Switch { return l.sw }

// Client is the client host, nil if there is none.
func (l *Lab) Client() *nethost.Host { return l.client }

// ForwardAddr is the address that forward i listens on.
func (l *Lab) ForwardAddr(i int) net.Addr { return l.forwards[i] }

// Nodes are all machines, in order.
func (l *Lab) Nodes() []*Machine { return slices.Clone(l.machines) }

// Node is machine i, from 0.
func (l *Lab) Node(i int) *Machine { return l.machines[i] }

// LogDir is where the console logs are.
func (l *Lab) LogDir() string { return l.logs }

// WaitAll waits until every node has reached a boot stage. Its error has the
// console of the node that failed.
func (l *Lab) WaitAll(ctx context.Context, stage string) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	errs := make([]error, len(l.machines))
	var wg sync.WaitGroup
	for i, m := range l.machines {
		wg.Go(func() {
			if _, errs[i] = m.WaitStage(ctx, stage); errs[i] != nil {
				cancel()
			}
		})
	}
	wg.Wait()
	return firstCause(errs)
}

// firstCause prefers the error that made the others give up.
func firstCause(errs []error) error {
	var first error
	for _, err := range errs {
		if err != nil && (first == nil || errors.Is(first, context.Canceled) && !errors.Is(err, context.Canceled)) {
			first = err
		}
	}
	return first
}

// Shutdown presses the power button of every running node and waits until they
// have powered off. Those that have not when ctx ends are killed.
func (l *Lab) Shutdown(ctx context.Context) error {
	errs := make([]error, len(l.machines))
	var wg sync.WaitGroup
	for i, m := range l.machines {
		wg.Go(func() { errs[i] = m.Shutdown(ctx) })
	}
	wg.Wait()
	return errors.Join(errs...)
}

// Close kills what runs, closes the capture and removes temporary files. Its error
// says that the capture is not complete.
func (l *Lab) Close() error {
	l.closeOnce.Do(func() {
		l.cancel()
		for _, m := range l.machines {
			m.Kill()
		}
		l.wg.Wait()
		if l.client != nil {
			l.client.Close()
		}
		if l.sw != nil {
			l.closeErr = l.sw.Close()
		}
		if l.capture != nil {
			l.closeErr = errors.Join(l.closeErr, l.capture.Close())
		}
		if l.work != "" {
			os.RemoveAll(l.work)
		}
	})
	return l.closeErr
}

// Report is the state of everything, for a failure message: every machine with its
// command line and the end of its console, and the switch's table and counters.
func (l *Lab) Report() string {
	var b strings.Builder
	for _, m := range l.machines {
		if vm := m.VM(); vm != nil {
			b.WriteString(vm.Report())
		} else {
			fmt.Fprintf(&b, "machine %s: never started\n", m.Name())
		}
	}
	fmt.Fprintf(&b, "switch: %+v\n", l.sw.Stats())
	for _, e := range l.sw.Table() {
		fmt.Fprintf(&b, "  %v on %s, %v old, %d moves\n", e.MAC, e.Port, e.Age.Round(time.Millisecond), e.Moves)
	}
	for i, v := range l.sw.Violations() {
		if i == 10 {
			fmt.Fprintf(&b, "  …\n")
			break
		}
		fmt.Fprintf(&b, "  I1 violated: %s\n", v)
	}
	if l.client != nil {
		for _, n := range l.client.Neighbors() {
			fmt.Fprintf(&b, "  client's cache: %v at %v, %s\n", n.Addr, n.MAC, n.State)
		}
	}
	return b.String()
}

func (l *Lab) emit(e Event) {
	if l.cfg.OnEvent == nil {
		return
	}
	l.eventMu.Lock()
	defer l.eventMu.Unlock()
	l.cfg.OnEvent(e)
}
