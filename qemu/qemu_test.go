package qemu

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"
)

func valid() Config {
	return Config{
		Name: "node1", Machine: Q35, Accel: TCG, Dir: "/run/x", Kernel: "/k", Initrd: "/i", Cmdline: "console=ttyS0 a='b c'",
		NICs: []NIC{{MAC: net.HardwareAddr{0x52, 0x54, 0, 0x77, 0, 1}, Socket: "/run/x/s"}},
	}
}

func TestValidate(t *testing.T) {
	if err := valid().Validate(); err != nil {
		t.Fatalf("Validate = %v; want nil", err)
	}
	for _, tt := range []struct {
		name string
		mod  func(*Config)
		want string
	}{
		{"no name", func(c *Config) { c.Name = "" }, "machine name"},
		{"a path as name", func(c *Config) { c.Name = "../x" }, "machine name"},
		{"no machine", func(c *Config) { c.Machine = "" }, "machine type"},
		{"no accelerator", func(c *Config) { c.Accel = "" }, "accelerator"},
		{"an initrd alone", func(c *Config) { c.Kernel = "" }, "needs a kernel"},
		{"no directory", func(c *Config) { c.Dir = "" }, "control socket"},
		{"group address", func(c *Config) { c.NICs[0].MAC = net.HardwareAddr{1, 2, 3, 4, 5, 6} }, "unicast"},
		{"no socket", func(c *Config) { c.NICs[0].Socket = "" }, "no socket"},
		{"a comma", func(c *Config) { c.NICs[0].Socket = "/a,b" }, "comma"},
		{"negative", func(c *Config) { c.MemoryMB = -1 }, "negative"},
		{"no such firmware", func(c *Config) { c.Firmware = "coreboot" }, "coreboot"},
		{"UEFI on a microvm", func(c *Config) { c.Machine, c.Firmware = MicroVM, UEFI }, "microvm"},
		{"BIOS on Arm", func(c *Config) { c.Machine, c.Firmware = Virt, BIOS }, "virt has none"},
		{"Secure Boot on Arm", func(c *Config) { c.Machine, c.Firmware = Virt, SecureUEFI }, "none for machine virt"},
		{"variables without UEFI", func(c *Config) { c.Vars = "/v" }, "for UEFI"},
		{"KVM for another architecture", func(c *Config) {
			c.Accel, c.Machine = KVM, map[string]Machine{"amd64": Virt, "arm64": Q35}[runtime.GOARCH]
		}, "architecture"},
		{"two systems", func(c *Config) { c.NetBoot = PXE }, "always win"},
		{"no such network boot", func(c *Config) { c.NetBoot = "bootp" }, "bootp"},
		{"HTTP by BIOS", func(c *Config) { noKernel(c); c.NetBoot = HTTPBoot }, "UEFI"},
		{"network boot without firmware", func(c *Config) { noKernel(c); c.Machine, c.NetBoot = Virt, PXE }, "without UEFI"},
		{"network boot without a network", func(c *Config) { noKernel(c); c.NICs, c.NetBoot = nil, PXE }, "needs a NIC"},
		{"disk without a bus", func(c *Config) { c.Disks = []Disk{{Path: "/d"}} }, "bus"},
		{"disk without a path", func(c *Config) { c.Disks = []Disk{{Bus: USB}} }, "no path"},
		{"disk of a microvm", func(c *Config) { c.Machine, c.Disks = MicroVM, []Disk{{Path: "/d", Bus: Virtio}} }, "q35"},
		{"SATA on Arm", func(c *Config) { c.Machine, c.Disks = Virt, []Disk{{Path: "/d", Bus: SATA}} }, "no SATA"},
		{"disk that both refuses and forgets", func(c *Config) { c.Disks = []Disk{{Path: "/d", Bus: USB, ReadOnly: true, Snapshot: true}} }, "snapshot"},
		{"a comma in a disk's name", func(c *Config) { c.Disks = []Disk{{Path: "/d,e", Bus: USB}} }, "comma"},
	} {
		c := valid()
		tt.mod(&c)
		if err := c.Validate(); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: Validate = %v; want it to mention %q", tt.name, err, tt.want)
		}
	}
}

func noKernel(c *Config) { c.Kernel, c.Initrd, c.Cmdline = "", "", "" }

// The arguments that decide what boots.
func TestBootArgs(t *testing.T) {
	for _, tt := range []struct {
		name      string
		mod       func(*Config)
		want, not []string
	}{
		{"a kernel only", func(c *Config) {}, []string{"-kernel /k", "romfile= "}, []string{"pflash", "bootindex", "xhci"}},
		{"a stick by UEFI", func(c *Config) {
			noKernel(c)
			c.Firmware, c.Disks = UEFI, []Disk{{Path: "/d", Bus: USB, Snapshot: true}}
		}, []string{"unit=0,format=raw,readonly=on,file=/usr/share/OVMF/OVMF_CODE_4M.fd", "unit=1,format=raw,file=/run/x/node1.vars",
			"qemu-xhci", "file=/d,snapshot=on", "usb-storage,removable=on,drive=disk0,bootindex=0"}, []string{"-kernel", "fw_cfg", "smm"}},
		{"disks before the network", func(c *Config) {
			noKernel(c)
			c.Firmware, c.NetBoot = BIOS, PXE
			c.Disks = []Disk{{Path: "/d", Bus: SATA}, {Path: "/e", Bus: Virtio, ReadOnly: true}}
		}, []string{"ide-hd,drive=disk0,bootindex=0", "file=/e,readonly=on", "drive=disk1,bootindex=1", ",bootindex=2"}, []string{"pflash", "xhci", "romfile"}},
		{"PXE by UEFI", func(c *Config) { noKernel(c); c.Firmware, c.NetBoot = UEFI, PXE }, []string{"romfile=,bootindex=0"}, []string{"fw_cfg"}},
		{"HTTP", func(c *Config) { noKernel(c); c.Firmware, c.NetBoot = UEFI, HTTPBoot },
			[]string{"IPv4PXESupport,string=no", "IPv6PXESupport,string=no"}, nil},
		{"Secure Boot", func(c *Config) { c.Firmware = SecureUEFI }, []string{"q35,smm=on", "secboot", "property=secure,value=on"}, nil},
		{"Arm", func(c *Config) { c.Machine, c.Firmware = Virt, UEFI }, []string{"virt,gic-version=3", "AAVMF_CODE.fd", "-cpu cortex-a72"}, nil},
		{"no ROM without PCI", func(c *Config) { c.Machine = MicroVM }, nil, []string{"romfile"}},
	} {
		c := valid()
		tt.mod(&c)
		if err := c.Validate(); err != nil {
			t.Errorf("%s: %v", tt.name, err)
			continue
		}
		args := strings.Join(c.Args(), " ") + " "
		for _, w := range tt.want {
			if !strings.Contains(args, w) {
				t.Errorf("%s: %s\nlacks %q", tt.name, args, w)
			}
		}
		for _, w := range tt.not {
			if strings.Contains(args, w) {
				t.Errorf("%s: %s\nhas %q", tt.name, args, w)
			}
		}
	}
}

// A machine keeps its variables; a missing firmware names its package.
func TestFirmwareFiles(t *testing.T) {
	saved := firmwares
	t.Cleanup(func() { firmwares = saved })
	dir := t.TempDir()
	code, vars := filepath.Join(dir, "code"), filepath.Join(dir, "vars")
	firmwares = map[Machine]map[Firmware]firmwareFiles{Q35: {UEFI: {code, vars, "some-package"}}}
	c := valid()
	c.Dir, c.Firmware = t.TempDir(), UEFI
	for _, file := range []string{code, vars} {
		for _, err := range []error{c.prepareFirmware(), FirmwareInstalled(Q35, UEFI)} {
			if err == nil || !strings.Contains(err.Error(), "apt-get install some-package") || !strings.Contains(err.Error(), file) {
				t.Errorf("without %s: %v; want an error that names it and its package", file, err)
			}
		}
		if err := os.WriteFile(file, []byte("empty"), 0o444); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(c.prepareFirmware(), FirmwareInstalled(Q35, UEFI)); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(c.VarsFile(), []byte("written by the guest"), 0o600); err != nil {
		t.Fatalf("the machine's variables cannot be written: %v", err)
	}
	if err := c.prepareFirmware(); err != nil {
		t.Fatal(err)
	}
	if b, _ := os.ReadFile(c.VarsFile()); string(b) != "written by the guest" {
		t.Errorf("the second start has the variables %q; want those that the guest wrote", b)
	}
	c.Name, c.Vars = "other", filepath.Join(dir, "enrolled")
	if err := c.prepareFirmware(); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("variables from a missing file: %v; want %v", err, fs.ErrNotExist)
	}
	if err := os.WriteFile(c.Vars, []byte("keys"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := c.prepareFirmware(); err != nil {
		t.Fatal(err)
	}
	if b, _ := os.ReadFile(c.VarsFile()); string(b) != "keys" {
		t.Errorf("variables %q; want the given ones", b)
	}
}

// A shell must read back from Command what Args gives.
func TestCommandSurvivesAShell(t *testing.T) {
	c := valid()
	c.Extra = []string{"", "it's", `back\slash "quoted" $HOME *`, "two\nlines", "-fw_cfg", "name=opt/x,string=ü"}
	c.Binary = "printf"
	out, err := exec.Command("sh", "-c", strings.Replace(c.Command(), "printf", `printf '%s\0'`, 1)).Output()
	if err != nil {
		t.Fatal(err)
	}
	got := strings.Split(strings.TrimSuffix(string(out), "\x00"), "\x00")
	if !slices.Equal(got, c.Args()) {
		t.Errorf("the shell read %q; want %q", got, c.Args())
	}
}

func TestConsole(t *testing.T) {
	var raw strings.Builder
	c := newConsole(time.Now(), &raw)
	var got []string
	stop := c.subscribe(func(l Line) { got = append(got, l.Text) })
	in := "\x1bc\x1b[?7l\x1b[2JSeaBIOS\r\nhalf"
	for _, b := range []byte(in) {
		c.Write([]byte{b})
	}
	c.Write([]byte(" a line\n\n\x00bell\x07 \xff\n" + strings.Repeat("x", maxLine+1) + "\nlast"))
	c.close()
	want := []string{"SeaBIOS", "half a line", "", "bell \uFFFD", strings.Repeat("x", maxLine), "x", "last"}
	if !slices.Equal(got, want) {
		t.Errorf("lines = %q; want %q", got, want)
	}
	if !strings.HasPrefix(raw.String(), in) {
		t.Errorf("raw log starts with %q; want the bytes as they came", raw.String()[:20])
	}
	stop()
	var late []string
	c.subscribe(func(l Line) { late = append(late, l.Text) })
	if !slices.Equal(late, want) {
		t.Errorf("a late subscriber got %q; want %q", late, want)
	}
}

func TestConsoleKeepsTheEnd(t *testing.T) {
	c := newConsole(time.Now(), nil)
	for i := range 5*keptLines + 7 {
		fmt.Fprintln(c, i)
	}
	if n := len(c.kept); n > 2*keptLines {
		t.Errorf("%d lines kept; want at most %d", n, 2*keptLines)
	}
	tail := c.tail(keptLines + 5)
	if len(tail) != keptLines || tail[len(tail)-1].Text != fmt.Sprint(5*keptLines+6) {
		t.Errorf("tail has %d lines and ends with %q; want %d and the last line", len(tail), tail[len(tail)-1].Text, keptLines)
	}
}

func TestConsoleWait(t *testing.T) {
	c := newConsole(time.Now(), nil)
	fmt.Fprintln(c, "past")
	is := func(w string) func(string) bool { return func(s string) bool { return s == w } }
	if _, err := c.wait(t.Context(), is("past")); err != nil {
		t.Errorf("waiting for a past line: %v", err)
	}
	go fmt.Fprintln(c, "future")
	if _, err := c.wait(t.Context(), is("future")); err != nil {
		t.Errorf("waiting for a future line: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := c.wait(ctx, is("never")); !errors.Is(err, context.Canceled) {
		t.Errorf("waiting without time = %v; want context.Canceled", err)
	}
	go c.close()
	if _, err := c.wait(t.Context(), is("never")); !errors.Is(err, io.EOF) {
		t.Errorf("waiting past the end = %v; want io.EOF", err)
	}
}

func FuzzConsole(f *testing.F) {
	f.Add([]byte("a\x1b[0;1mb\r\n\x9b\xff"))
	f.Fuzz(func(t *testing.T, in []byte) {
		c := newConsole(time.Now(), nil)
		c.subscribe(func(l Line) {
			if strings.ContainsAny(l.Text, "\x1b\n\r\x00\x07\u009b") {
				t.Errorf("line %q has control characters", l.Text)
			}
		})
		c.Write(in)
		c.close()
	})
}

// monitor is a fake QEMU: it answers each command with what answer gives.
func monitor(t *testing.T, answer func(command string, id json.RawMessage) string) net.Conn {
	t.Helper()
	ours, theirs := net.Pipe()
	t.Cleanup(func() { theirs.Close() })
	go func() {
		io.WriteString(theirs, `{"QMP": {"version": {"qemu": {"major": 7}}, "capabilities": ["oob"]}}`+"\r\n")
		for in := bufio.NewScanner(theirs); in.Scan(); {
			var c struct {
				Execute string
				ID      json.RawMessage
			}
			if json.Unmarshal(in.Bytes(), &c) != nil {
				return
			}
			out := fmt.Sprintf(`{"return": {}, "id": %s}`, c.ID)
			if c.Execute != "qmp_capabilities" {
				out = answer(c.Execute, c.ID)
			}
			if out == "" {
				theirs.Close()
				return
			}
			io.WriteString(theirs, out+"\r\n")
		}
	}()
	return ours
}

func TestQMP(t *testing.T) {
	events := make(chan Event, 20)
	conn := monitor(t, func(command string, id json.RawMessage) string {
		switch command {
		case "query-status":
			return `{"event": "STOP", "timestamp": {"seconds": 1, "microseconds": 2}, "data": {"a": 1}}` + "\r\n" +
				`{"return": {"status": "stale"}, "id": 0}` + "\r\n" +
				fmt.Sprintf(`{"return": {"status": "paused"}, "id": %s}`, id)
		case "quit":
			return ""
		}
		return fmt.Sprintf(`{"error": {"class": "CommandNotFound", "desc": "no such thing"}, "id": %s}`, id)
	})
	q, err := NewQMP(t.Context(), conn, func(e Event) { events <- e })
	if err != nil {
		t.Fatal(err)
	}
	defer q.Close()
	for range 20 { // the stale reply comes right before the true one
		if s, err := q.Status(t.Context()); s != "paused" || err != nil {
			t.Fatalf("Status = %q, %v; want paused", s, err)
		}
	}
	if e := <-events; e.Name != "STOP" || string(e.Data) != `{"a": 1}` {
		t.Errorf("event = %+v; want STOP with its data", e)
	}
	var refused *QMPError
	if err := q.Stop(t.Context()); !errors.As(err, &refused) || refused.Class != "CommandNotFound" {
		t.Errorf("Stop = %v; want a QMPError", err)
	}
	if err := q.Quit(t.Context()); err != nil {
		t.Errorf("Quit = %v; want nil although the monitor hung up", err)
	}
	if err := q.Cont(t.Context()); err == nil {
		t.Error("Cont after the end succeeded")
	}
}

func TestQMPGivesUp(t *testing.T) {
	block := make(chan struct{})
	conn := monitor(t, func(string, json.RawMessage) string { <-block; return "" })
	defer close(block)
	q, err := NewQMP(t.Context(), conn, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer q.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	if err := q.Stop(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Stop = %v; want the deadline", err)
	}
}

func FuzzQMP(f *testing.F) {
	f.Add([]byte(`{"QMP":{}}` + "\n" + `{"return":{},"id":1}` + "\n" + `{"return":{"status":"running"},"id":2}`))
	f.Add([]byte(`{"QMP":{}}` + "\n" + `{"QMP":{}}` + "\n" + `{"error":{},"id":1}`))
	f.Add([]byte(`[]`))
	f.Fuzz(func(t *testing.T, in []byte) {
		ours, theirs := net.Pipe()
		go io.Copy(io.Discard, theirs)
		go func() { theirs.Write(in); theirs.Close() }()
		q, err := NewQMP(t.Context(), ours, func(Event) {})
		if err != nil {
			return
		}
		q.Status(t.Context())
		q.Close()
	})
}

func TestParseChoice(t *testing.T) {
	now := time.Date(2026, 1, 2, 12, 0, 0, 0, time.UTC)
	for _, tt := range []struct {
		in string
		ok bool
	}{
		{`{"k": {"accel": "kvm", "reason": "r", "tried": "2020-01-01T00:00:00Z"}}`, true},
		{`{"k": {"accel": "tcg", "reason": "r", "tried": "2026-01-01T13:00:00Z"}}`, true},
		{`{"k": {"accel": "tcg", "reason": "r", "tried": "2026-01-01T12:00:00Z"}}`, false},
		{`{"k": {"accel": "tcg", "reason": "r", "tried": "2027-01-01T12:00:00Z"}}`, false},
		{`{"k": {"accel": "tcg"}}`, false},
		{`{"other": {"accel": "kvm"}}`, false},
		{`{"k": {"accel": "magic"}}`, false},
		{`{"k": 1}`, false},
		{``, false},
	} {
		if c, ok := parseChoice([]byte(tt.in), "k", now); ok != tt.ok {
			t.Errorf("parseChoice(%s) = %v, %v; want %v", tt.in, c, ok, tt.ok)
		}
	}
}

func TestChooseAccel(t *testing.T) {
	if _, err := exec.LookPath("qemu-system-x86_64"); err != nil {
		t.Skip("QEMU is not installed (apt-get install qemu-system-x86)")
	}
	dir := t.TempDir()
	start := time.Now()
	c, err := ChooseAccel(t.Context(), AccelOptions{CacheDir: dir})
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%s in %v: %s", c.Accel, time.Since(start).Round(time.Millisecond), c.Reason)
	if again, err := ChooseAccel(t.Context(), AccelOptions{}); again != c || err != nil {
		t.Errorf("a second choice = %v, %v; want the remembered %v", again, err, c)
	}
	if f, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0); err == nil {
		f.Close()
		b, err := os.ReadFile(filepath.Join(dir, "accel.json"))
		if err != nil || !strings.Contains(string(b), string(c.Accel)) {
			t.Errorf("the cache has %q, %v; want the choice", b, err)
		}
	}
	if _, err := ChooseAccel(t.Context(), AccelOptions{Binary: "nonexistent-qemu"}); err == nil {
		t.Error("ChooseAccel without QEMU succeeded")
	}
}

func TestTrialUnderTCG(t *testing.T) {
	if _, err := exec.LookPath("qemu-system-x86_64"); err != nil {
		t.Skip("QEMU is not installed (apt-get install qemu-system-x86)")
	}
	if took, err := trial(t.Context(), "qemu-system-x86_64", TCG, time.Minute); took <= 0 || err != nil {
		t.Errorf("trial = %v, %v; want success", took, err)
	}
	if _, err := trial(t.Context(), "qemu-system-x86_64", TCG, time.Millisecond); err == nil || !strings.Contains(err.Error(), "did not end within") {
		t.Errorf("trial of 1 ms = %v; want it to be given up", err)
	}
	if _, err := trial(t.Context(), "true", TCG, time.Minute); err == nil {
		t.Error("a trial with something that is not QEMU succeeded")
	}
}
