package lab

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"clonecluster/qemu"
	"clonecluster/qemu/vswitch"
)

// Machine is one node of a laboratory, running or not.
type Machine struct {
	lab  *Lab
	node Node
	cfg  qemu.Config
	port *vswitch.Port

	power sync.Mutex // starting and ending, one at a time

	mu      sync.Mutex
	vm      *qemu.VM // the last one
	started time.Time
	boots   int
	stages  []Stage       // of this boot
	running bool          // between Start and the end, over resets
	reset   bool          // QEMU is ending because of a reset
	wantOff bool          // a reset must not start it again
	changed chan struct{} // closed and replaced at each change
}

func (l *Lab) addMachine(i int) error {
	n := l.cfg.Nodes[i]
	port, err := l.sw.Listen(n.Name, filepath.Join(l.work, fmt.Sprintf("%d.sock", i)))
	if err != nil {
		return err
	}
	m := &Machine{lab: l, node: n, port: port, changed: make(chan struct{})}
	m.cfg = l.cfg.machine(i, l.work, port.Socket())
	if m.cfg.Initrd, err = l.initrd(l.cfg.boot(i).Initrd); err != nil {
		return err
	}
	m.cfg.ConsoleLog = filepath.Join(l.logs, n.Name+".console.log")
	m.cfg.OnLine = m.onLine
	m.cfg.OnEvent = m.onEvent
	m.cfg.NoReboot = true // see run
	l.machines = append(l.machines, m)
	return nil
}

// Name is the node's name.
func (m *Machine) Name() string { return m.node.Name }

// MAC is the address of the node's NIC: its wire MAC.
func (m *Machine) MAC() net.HardwareAddr { return m.node.MAC }

// Port is the node's port of the switch.
func (m *Machine) Port() *vswitch.Port { return m.port }

// VM is the node's current or last virtual machine, nil if it never ran.
func (m *Machine) VM() *qemu.VM {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.vm
}

// Running says whether the machine is on.
func (m *Machine) Running() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.running
}

// Stages are the stages that this boot has reached, oldest first.
func (m *Machine) Stages() []Stage {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.Clone(m.stages)
}

// Start turns the machine on.
func (m *Machine) Start() error {
	m.power.Lock()
	defer m.power.Unlock()
	m.mu.Lock()
	if m.running {
		m.mu.Unlock()
		return fmt.Errorf("starting machine %s: it runs", m.node.Name)
	}
	m.running, m.wantOff = true, false
	m.bootLocked()
	m.mu.Unlock()

	vm, err := m.boot(Started)
	if err != nil {
		m.ended(err)
		return err
	}
	m.lab.wg.Go(func() { m.run(vm) })
	return nil
}

func (m *Machine) bootLocked() {
	m.started, m.stages, m.reset = time.Now(), nil, false
	m.boots++
	m.changeLocked()
}

func (m *Machine) boot(kind Kind) (*qemu.VM, error) {
	m.emit(Event{Kind: kind, Text: m.cfg.Command()})
	vm, err := qemu.Start(m.lab.ctx, m.cfg)
	if err != nil {
		return nil, err
	}
	m.mu.Lock()
	m.vm = vm
	m.mu.Unlock()
	return vm, nil
}

// run waits for the machine's end and starts it again if that was a reset. QEMU
// could reset a machine by itself, but under TCG the next boot then writes over
// pages that hold translated code, which cost 4.5 s of CPU time against 0.4 s in a
// new process (QEMU 7.2: most of it in page_collection_lock).
func (m *Machine) run(vm *qemu.VM) {
	for {
		<-vm.Done()
		vm.Close()
		err := vm.Wait(context.Background())
		m.mu.Lock()
		again := m.reset && !m.wantOff && m.lab.ctx.Err() == nil
		if again {
			m.bootLocked()
		}
		m.mu.Unlock()
		if again {
			vm, err = m.boot(Reset)
		}
		if !again || err != nil {
			m.ended(err)
			return
		}
		m.mu.Lock()
		off := m.wantOff
		m.mu.Unlock()
		if off { // Kill or Shutdown found the machine before
			vm.Close()
		}
	}
}

func (m *Machine) ended(err error) {
	m.mu.Lock()
	m.running = false
	m.changeLocked()
	m.mu.Unlock()
	m.emit(Event{Kind: Exited, Err: err})
}

// Shutdown presses the power button and waits for the end; when ctx ends first,
// the machine is killed. A machine that is off is left so.
func (m *Machine) Shutdown(ctx context.Context) error {
	m.power.Lock()
	defer m.power.Unlock()
	vm := m.turnOff()
	if vm == nil {
		return nil
	}
	err := vm.Shutdown(ctx)
	m.waitOff()
	return err
}

// Kill turns the machine off at once, as if its power had failed.
func (m *Machine) Kill() {
	m.power.Lock()
	defer m.power.Unlock()
	if vm := m.turnOff(); vm != nil {
		vm.Close()
		m.waitOff()
	}
}

// turnOff ends the resets and returns what is to be ended, nil if nothing runs.
func (m *Machine) turnOff() *qemu.VM {
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.running {
		return nil
	}
	m.wantOff = true
	return m.vm
}

// waitOff waits until the end is on record.
func (m *Machine) waitOff() {
	for {
		m.mu.Lock()
		running, changed := m.running, m.changed
		m.mu.Unlock()
		if !running {
			return
		}
		<-changed
	}
}

// Reset presses the reset button.
func (m *Machine) Reset(ctx context.Context) error { return m.monitor(ctx, (*qemu.QMP).Reset) }

// Pause freezes the node, clocks and all, as a host that stalls or migrates it.
func (m *Machine) Pause(ctx context.Context) error { return m.monitor(ctx, (*qemu.QMP).Stop) }

// Resume lets a paused node go on.
func (m *Machine) Resume(ctx context.Context) error { return m.monitor(ctx, (*qemu.QMP).Cont) }

// Unplug takes the node's cable out: the switch's port goes down, and the node
// sees that it has no carrier. To cut the segment without the node's knowing, use
// the port's Cut.
func (m *Machine) Unplug(ctx context.Context) error {
	m.port.Cut()
	return m.monitor(ctx, func(q *qemu.QMP, ctx context.Context) error { return q.SetLink(ctx, 0, false) })
}

// Plug puts the cable back in.
func (m *Machine) Plug(ctx context.Context) error {
	m.port.Restore()
	return m.monitor(ctx, func(q *qemu.QMP, ctx context.Context) error { return q.SetLink(ctx, 0, true) })
}

func (m *Machine) monitor(ctx context.Context, f func(*qemu.QMP, context.Context) error) error {
	vm := m.VM()
	if vm == nil {
		return fmt.Errorf("machine %s: never started", m.node.Name)
	}
	if err := f(vm.QMP(), ctx); err != nil {
		return fmt.Errorf("machine %s: %w", m.node.Name, err)
	}
	return nil
}

// WaitStage waits until this boot of the node has reached a stage. If the machine
// is off or ends, or ctx ends, the error has the end of its console.
func (m *Machine) WaitStage(ctx context.Context, name string) (Stage, error) {
	return m.WaitBoot(ctx, 0, name)
}

// WaitBoot is WaitStage for boot number n or a later one, as [Machine.Boots]
// counts them. It is for a reset, whose old boot may still have the stage.
func (m *Machine) WaitBoot(ctx context.Context, n int, name string) (Stage, error) {
	for {
		m.mu.Lock()
		i := slices.IndexFunc(m.stages, func(s Stage) bool { return s.Name == name })
		if i >= 0 && m.boots >= n {
			s := m.stages[i]
			m.mu.Unlock()
			return s, nil
		}
		running, changed, vm := m.running, m.changed, m.vm
		m.mu.Unlock()
		err := errors.New("it is off")
		if running {
			select {
			case <-changed:
				continue
			case <-ctx.Done():
				err = context.Cause(ctx)
			}
		}
		err = fmt.Errorf("waiting for stage %s of machine %s: %w", name, m.node.Name, err)
		if vm != nil && !errors.Is(err, context.Canceled) {
			err = fmt.Errorf("%w\n%s", err, vm.Report())
		}
		return Stage{}, err
	}
}

func (m *Machine) onLine(line qemu.Line) {
	m.emit(Event{Kind: Line, Text: line.Text})
	s, ok := ParseStage(line.Text)
	if !ok {
		return
	}
	m.mu.Lock()
	m.stages = append(m.stages, s)
	if len(m.stages) > maxStages {
		m.stages = slices.Delete(m.stages, 0, 1)
	}
	m.changeLocked()
	m.mu.Unlock()
	m.emit(Event{Kind: Reached, Stage: s})
}

// maxStages bounds what a node that announces stages for ever can cost.
const maxStages = 100

// onEvent learns why QEMU ends (SHUTDOWN in QEMU's qapi/run-state.json).
func (m *Machine) onEvent(e qemu.Event) {
	var data struct {
		Reason string `json:"reason"`
	}
	if e.Name != "SHUTDOWN" || json.Unmarshal(e.Data, &data) != nil {
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.reset = data.Reason == "guest-reset" || data.Reason == "host-qmp-system-reset"
}

// Boots counts the boots of the node: starts and resets.
func (m *Machine) Boots() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.boots
}

func (m *Machine) changeLocked() {
	close(m.changed)
	m.changed = make(chan struct{})
}

func (m *Machine) emit(e Event) {
	m.mu.Lock()
	e.Node, e.Time, e.Since = m.node.Name, time.Now(), time.Since(m.started)
	m.mu.Unlock()
	m.lab.emit(e)
}
