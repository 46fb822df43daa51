package qemu_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"clonecluster/qemu"
	"clonecluster/qemu/qemutest"
	"clonecluster/qemu/vswitch"
)

const cmdline = "console=ttyS0 quiet panic=1"

func config(t *testing.T, m qemu.Machine, more string) qemu.Config {
	t.Helper()
	return qemu.Config{
		Name:    "test",
		Machine: m,
		Accel:   qemutest.Accel(t),
		Kernel:  qemutest.Kernel(t),
		Initrd:  qemutest.Initrd(t),
		Cmdline: strings.TrimSpace(cmdline + " " + more),
		Dir:     t.TempDir(),
	}
}

func start(t *testing.T, cfg qemu.Config) *qemu.VM {
	t.Helper()
	vm, err := qemu.Start(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		vm.Close()
		if t.Failed() {
			t.Log(vm.Report())
		}
	})
	return vm
}

func waitLine(t *testing.T, vm *qemu.VM, text string) qemu.Line {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 120*time.Second)
	defer cancel()
	l, err := vm.WaitLine(ctx, func(s string) bool { return strings.Contains(s, text) })
	if err != nil {
		t.Fatalf("%v (%q)", err, text)
	}
	return l
}

func TestBootAndPowerButton(t *testing.T) {
	cfg := config(t, qemu.Q35, "")
	cfg.ConsoleLog = filepath.Join(t.TempDir(), "console.log")
	vm := start(t, cfg)
	l := waitLine(t, vm, "stage=ready")
	t.Logf("ready after %v", l.Since)
	if s, err := vm.QMP().Status(t.Context()); s != "running" || err != nil {
		t.Errorf("status = %q, %v; want running", s, err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	defer cancel()
	pressed := time.Now()
	if err := vm.Shutdown(ctx); err != nil {
		t.Fatalf("Shutdown: %v", err)
	}
	t.Logf("off %v after the button", time.Since(pressed))
	b, err := os.ReadFile(cfg.ConsoleLog)
	if err != nil || !strings.Contains(string(b), "init: power button") {
		t.Errorf("the console log (%d bytes, %v) does not have the power button", len(b), err)
	}
}

// The same kernel, loaded by two firmwares.
func TestFirmwareBoots(t *testing.T) {
	for _, f := range []qemu.Firmware{qemu.BIOS, qemu.UEFI} {
		t.Run(string(f), func(t *testing.T) {
			qemutest.Firmware(t, qemu.Q35, f)
			cfg := config(t, qemu.Q35, "")
			cfg.Firmware = f
			vm := start(t, cfg)
			l := waitLine(t, vm, "stage=ready")
			t.Logf("ready after %v", l.Since)
			ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
			defer cancel()
			if err := vm.Shutdown(ctx); err != nil {
				t.Error(err)
			}
			if want := " firmware=" + string(f); !strings.Contains(l.Text, want) {
				t.Errorf("the guest says %q; want%s", l.Text, want)
			}
		})
	}
}

func TestMicroVM(t *testing.T) {
	cfg := config(t, qemu.MicroVM, "reboot=t guest.then=reboot")
	cfg.NoReboot = true
	vm := start(t, cfg)
	l := waitLine(t, vm, "stage=ready")
	t.Logf("ready after %v", l.Since)
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	defer cancel()
	if err := vm.Wait(ctx); err != nil {
		t.Errorf("Wait after the guest's reboot = %v; want nil", err)
	}
}

// A guest that panics reboots by itself (panic=1) and is there again.
func TestRebootAfterPanic(t *testing.T) {
	resets := make(chan string, 16)
	cfg := config(t, qemu.Q35, "guest.then=panic")
	cfg.OnEvent = func(e qemu.Event) {
		if e.Name == "RESET" {
			resets <- e.Name
		}
	}
	booted := make(chan string, 16)
	cfg.OnLine = func(l qemu.Line) {
		if strings.Contains(l.Text, "stage=ready") {
			booted <- l.Text
		}
	}
	start(t, cfg)
	for _, c := range []chan string{booted, resets, booted} {
		select {
		case <-c:
		case <-time.After(120 * time.Second):
			t.Fatal("the guest did not come back in 120 s")
		}
	}
}

func TestPowerOffEndsQEMU(t *testing.T) {
	vm := start(t, config(t, qemu.Q35, "guest.then=poweroff"))
	ctx, cancel := context.WithTimeout(t.Context(), 120*time.Second)
	defer cancel()
	if err := vm.Wait(ctx); err != nil {
		t.Errorf("Wait = %v; want nil", err)
	}
}

func TestStartErrors(t *testing.T) {
	accel := qemutest.Accel(t)
	for _, tt := range []struct {
		name string
		cfg  qemu.Config
		want string
	}{
		{"no such kernel", qemu.Config{Name: "x", Machine: qemu.Q35, Accel: accel, Kernel: "/nonexistent"}, "nonexistent"},
		{"bad argument", qemu.Config{Name: "x", Machine: qemu.Q35, Accel: accel, Extra: []string{"-bogus"}}, "bogus"},
		{"no such program", qemu.Config{Name: "x", Machine: qemu.Q35, Accel: accel, Binary: "nonexistent-qemu"}, "nonexistent-qemu"},
		{"no switch", qemu.Config{Name: "x", Machine: qemu.Q35, Accel: accel, NICs: []qemu.NIC{{MAC: nodeMAC, Socket: "/nonexistent"}}}, "no such file"},
		{"invalid", qemu.Config{Name: "x", Machine: "pc", Accel: accel}, `machine type "pc"`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			tt.cfg.Dir = t.TempDir()
			vm, err := qemu.Start(t.Context(), tt.cfg)
			if err == nil {
				vm.Close()
				t.Fatal("Start succeeded")
			}
			if !strings.Contains(err.Error(), tt.want) {
				t.Errorf("Start = %v; want it to mention %q", err, tt.want)
			}
		})
	}
}

func TestContextEndsMachine(t *testing.T) {
	cfg := config(t, qemu.Q35, "")
	ctx, cancel := context.WithCancel(t.Context())
	vm, err := qemu.Start(ctx, cfg)
	if err != nil {
		t.Fatal(err)
	}
	cancel()
	var exit *qemu.ExitError
	if err := vm.Wait(t.Context()); !errors.As(err, &exit) {
		t.Errorf("Wait = %v; want an ExitError", err)
	}
	if err := unix.Kill(vm.Pid(), 0); !errors.Is(err, unix.ESRCH) {
		t.Errorf("kill(pid, 0) = %v; want ESRCH", err)
	}
	vm.Close()
}

// TestMain also serves as the parent that TestParentKilled kills.
func TestMain(m *testing.M) {
	if dir := os.Getenv("QEMU_TEST_PARENT"); dir != "" {
		vm, err := qemu.Start(context.Background(), qemu.Config{
			Name: "orphan", Machine: qemu.Q35, Accel: qemu.TCG, Dir: dir, Extra: []string{"-S"},
		})
		if err != nil {
			fmt.Println("error", err)
			os.Exit(1)
		}
		fmt.Println(vm.Pid())
		if os.Getenv("QEMU_TEST_PANIC") != "" {
			panic("as asked")
		}
		select {}
	}
	os.Exit(m.Run())
}

// However this process ends, QEMU must end with it.
func TestParentKilled(t *testing.T) {
	qemutest.Accel(t)
	for _, how := range []string{"SIGKILL", "SIGINT", "panic"} {
		t.Run(how, func(t *testing.T) {
			cmd := exec.Command(os.Args[0], "-test.run=^$")
			cmd.Env = append(os.Environ(), "QEMU_TEST_PARENT="+t.TempDir())
			if how == "panic" {
				cmd.Env = append(cmd.Env, "QEMU_TEST_PANIC=1")
			}
			out, err := cmd.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			var pid int
			if _, err := fmt.Fscan(out, &pid); err != nil {
				cmd.Process.Kill()
				t.Fatalf("the parent did not start QEMU: %v", err)
			}
			// A pidfd tells of the end of a process that is not our child.
			fd, err := unix.PidfdOpen(pid, 0)
			if err != nil && !errors.Is(err, unix.ESRCH) {
				t.Fatal(err)
			}
			switch how {
			case "SIGKILL":
				cmd.Process.Kill()
			case "SIGINT":
				cmd.Process.Signal(os.Interrupt)
			}
			cmd.Wait()
			if fd < 0 {
				return // already gone
			}
			defer unix.Close(fd)
			n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 30_000)
			if n != 1 || err != nil {
				unix.Kill(pid, unix.SIGKILL)
				t.Errorf("QEMU (pid %d) was there 30 s after its parent had ended by %s", pid, how)
			}
		})
	}
}

var (
	nodeMAC  = net.HardwareAddr{0x52, 0x54, 0, 0x77, 0, 1}
	cloneMAC = net.HardwareAddr{0x02, 0xcc, 0x0a, 0x4d, 0, 0x0a}
)

// bed is a guest with one NIC on a switch, and the switch.
func bed(t *testing.T, machine qemu.Machine, args string) (*vswitch.Switch, *vswitch.Port, *qemu.VM) {
	t.Helper()
	cfg := config(t, machine, args)
	s, err := vswitch.New(vswitch.Config{Guard: []net.HardwareAddr{cloneMAC}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	p, err := s.Listen("vm", filepath.Join(cfg.Dir, "vm.sock"))
	if err != nil {
		t.Fatal(err)
	}
	cfg.NICs = []qemu.NIC{{MAC: nodeMAC, Socket: p.Socket()}}
	return s, p, start(t, cfg)
}

// A guest that takes the clone MAC for its own is found out, and its frames have
// the consequences they would have on a real switch.
func TestGuardSeesAGuest(t *testing.T) {
	s, _, vm := bed(t, qemu.Q35, "guest.mac="+cloneMAC.String()+" guest.ip=10.77.0.100/24")
	first := make(chan struct{}, 1)
	defer s.Watch(func(vswitch.Frame) {
		select {
		case first <- struct{}{}:
		default:
		}
	})()
	waitLine(t, vm, "stage=ready")
	select {
	case <-first: // the kernel reports its multicast groups by itself
	case <-time.After(60 * time.Second):
		t.Fatal("no frame in 60 s")
	}
	vs := s.Violations()
	if len(vs) == 0 {
		t.Fatal("no violation on record")
	}
	t.Log(vs[0])
	if port, ok := s.Lookup(cloneMAC); !ok || port != "vm" {
		t.Errorf("Lookup(clone) = %q, %v; want it learnt", port, ok)
	}
}

// set_link is what shows the guest a lost carrier; it is also seen by the guest
// only, so the switch's Cut is the other half.
func TestSetLink(t *testing.T) {
	_, _, vm := bed(t, qemu.Q35, "guest.ip=10.77.0.100/24")
	waitLine(t, vm, "stage=ready")
	if err := vm.QMP().SetLink(t.Context(), 0, false); err != nil {
		t.Error(err)
	}
	waitLine(t, vm, "carrier lost")
	if err := vm.QMP().SetLink(t.Context(), 0, true); err != nil {
		t.Error(err)
	}
	waitLine(t, vm, "carrier found")
	var refused *qemu.QMPError
	if err := vm.QMP().SetLink(t.Context(), 7, true); !errors.As(err, &refused) {
		t.Errorf("SetLink of a NIC that is not there = %v; want a QMPError", err)
	}
}
