package uinit

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"

	"clonecluster/config"
)

func TestJournal(t *testing.T) {
	j := newJournal(func() time.Duration { return 12345 * time.Millisecond })
	var out bytes.Buffer
	j.line("web", "hello")
	j.line("web", "\x1b[2Jforged\x00\ttab é \u202e")
	level := new(slog.LevelVar)
	log := j.logger(level)
	log.Info("started", "nic", "eth0", "why", "two words")
	log.WithGroup("g").With("a", 1).Warn("odd", "key", config.Key{1})
	log.Debug("not shown")
	log.Error("two\nlines")
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	j.show(ctx, &out)
	want := `[  12.345] web: hello
[  12.345] web: ·[2Jforged· tab é ·
[  12.345] init: started nic=eth0 why="two words"
[  12.345] init: warn: odd g.a=1 g.key=(secret)
[  12.345] init: error: two
[  12.345] init: lines
`
	if out.String() != want {
		t.Errorf("console:\n%s\nwant:\n%s", out.String(), want)
	}
	if got := j.lines("web"); len(got) != 2 || got[0].Text != "hello" {
		t.Errorf("lines of web: %v", got)
	}
}

// TestSlowConsole floods a console that takes nothing.
func TestSlowConsole(t *testing.T) {
	j := newJournal(sinceBoot)
	for i := range 10 * queueLines {
		j.line("web", fmt.Sprintf("line %d", i))
	}
	if got := j.lost(); got != 9*queueLines {
		t.Errorf("lost %d lines; want %d", got, 9*queueLines)
	}
	if got := j.lines("web"); len(got) != ringLines || got[ringLines-1].Text != fmt.Sprintf("line %d", 10*queueLines-1) {
		t.Errorf("%d lines are kept, the last %q", len(got), got[len(got)-1].Text)
	}
	<-j.queue
	j.line("web", "after")
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	var out bytes.Buffer
	j.show(ctx, &out)
	if !strings.Contains(out.String(), fmt.Sprintf("init: %d lines are not shown", 9*queueLines)) || !strings.HasSuffix(out.String(), "web: after\n") {
		t.Errorf("the gap is not told: …%s", out.String()[out.Len()-200:])
	}
}

func TestRingIsBounded(t *testing.T) {
	var r ring
	for range 10_000 {
		r.add(entry{Text: strings.Repeat("x", maxLine)})
	}
	if len(r.lines) != ringBytes/maxLine || r.bytes != ringBytes {
		t.Errorf("%d lines of %d bytes; want %d of %d", len(r.lines), r.bytes, ringBytes/maxLine, ringBytes)
	}
	for range 10_000 {
		r.add(entry{Text: "x"})
	}
	if len(r.lines) != ringLines || r.bytes != ringLines || cap(r.lines) > ringLines {
		t.Errorf("%d lines of %d bytes, room for %d; want %d", len(r.lines), r.bytes, cap(r.lines), ringLines)
	}
}

func TestLineSplitter(t *testing.T) {
	var got []string
	s := &lineSplitter{emit: func(l string) { got = append(got, l) }}
	for _, part := range []string{"one\ntw", "o\r\n\n", strings.Repeat("a", 2*maxLine+3), "\nlast"} {
		io.WriteString(s, part)
	}
	s.flush(false)
	s.flush(false)
	want := []string{"one", "two", "", strings.Repeat("a", maxLine), strings.Repeat("a", maxLine), "aaa", "last"}
	if fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("lines %q; want %q", got, want)
	}
}

func TestParseNotify(t *testing.T) {
	m, ok := parseNotify([]byte("READY=1\nSTATUS=all\x1b well\nX=1\nWATCHDOG=1\nSTOPPING=1\n\n=\n"))
	want := message{Ready: true, Watchdog: true, Stopping: true, HasStatus: true, Status: "all· well"}
	if !ok || m != want {
		t.Errorf("parseNotify = %+v, %v; want %+v", m, ok, want)
	}
	for _, text := range []string{"", "READY=0", "READY", "ready=1", "\x00\xff", "FDSTORE=1"} {
		if m, ok := parseNotify([]byte(text)); ok {
			t.Errorf("parseNotify(%q) = %+v; want nothing", text, m)
		}
	}
}

func FuzzParseNotify(f *testing.F) {
	f.Add([]byte("READY=1\nSTATUS=x"))
	f.Add([]byte("STATUS=\xff\xfe\n\n="))
	f.Fuzz(func(t *testing.T, b []byte) {
		m, _ := parseNotify(b)
		if len(m.Status) > 3*maxStatus || strings.ContainsAny(m.Status, "\n\x1b") {
			t.Errorf("status %q", m.Status)
		}
	})
}

// TestNotifySocket sends what a hostile child may send.
func TestNotifySocket(t *testing.T) {
	path := filepath.Join(t.TempDir(), "notify")
	conn, err := listenNotify(path)
	if err != nil {
		t.Fatal(err)
	}
	got := make(chan message, 16)
	done := make(chan error, 1)
	go func() {
		done <- serveNotify(conn, func(pid int, m message) {
			if pid != os.Getpid() {
				t.Errorf("the message is of %d; want %d", pid, os.Getpid())
			}
			got <- m
		})
	}()
	to := &net.UnixAddr{Name: path, Net: "unixgram"}
	c, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	before := openFiles(t)
	null, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	fds := make([]int, 200)
	for i := range fds {
		fds[i] = int(null.Fd())
	}
	for _, send := range [][]byte{nil, []byte("garbage"), bytes.Repeat([]byte("READY=1\n"), 4096), {0xff, 0, '\n'}} {
		if _, _, err := c.WriteMsgUnix(send, nil, to); err != nil {
			t.Fatal(err)
		}
	}
	for range 20 {
		if _, _, err := c.WriteMsgUnix([]byte("BARRIER=1"), unix.UnixRights(fds...), to); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := c.WriteTo([]byte("READY=1\nSTATUS=here"), to); err != nil {
		t.Fatal(err)
	}
	if m := <-got; !m.Ready || m.Status != "here" {
		t.Errorf("the first message that counts is %+v", m)
	}
	if after := openFiles(t); after > before+1 {
		t.Errorf("%d open files, %d before: descriptors that were sent are kept", after, before)
	}
	conn.Close()
	if err := <-done; !errors.Is(err, net.ErrClosed) {
		t.Errorf("serveNotify = %v", err)
	}
}

func openFiles(t *testing.T) int {
	t.Helper()
	d, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Skip("no /proc: ", err)
	}
	return len(d)
}

// TestInitRunsNoExec: os/exec waits for its children itself, and in init the loop
// alone reaps.
func TestInitRunsNoExec(t *testing.T) {
	out, err := exec.Command("go", "list", "-deps", ".").Output()
	if err != nil {
		t.Fatalf("go list -deps: %v", err)
	}
	deps := strings.Fields(string(out))
	if !slices.Contains(deps, "clonecluster/netcore/health/probe") {
		t.Errorf("init does not ask its services by package probe: %d dependencies", len(deps))
	}
	if slices.Contains(deps, "os/exec") {
		t.Error("init imports os/exec")
	}
}

// TestQuestion: a service whose check init cannot run counts by its process.
func TestQuestion(t *testing.T) {
	for _, tt := range []struct {
		health config.Health
		asks   bool
	}{
		{config.Health{HTTP: "http://127.0.0.1/"}, true},
		{config.Health{TCP: "127.0.0.1:25"}, true},
		{config.Health{Interval: time.Second}, false},
	} {
		if got := question(tt.health) != nil; got != tt.asks {
			t.Errorf("init asks %+v: %v; want %v", tt.health, got, tt.asks)
		}
	}
}

func TestKernelStages(t *testing.T) {
	var log []kernelLine
	for _, record := range []string{
		"6,1,0,-;Linux version 6.12\n",
		"6,99,512345,-;Trying to unpack rootfs image as initramfs...\n SUBSYSTEM=x\n",
		"6,120,1500000,-;Freeing initrd memory: 4000K\n",
		"garbage", "6,1;x", "6,1,-5,-;Freeing initrd memory: 1K\n",
	} {
		if l, ok := parseKernelLine([]byte(record)); ok {
			log = append(log, l)
		}
	}
	got := fmt.Sprint(kernelStages(log))
	if want := "[{kernel 512.345ms} {unpack 1.5s}]"; got != want {
		t.Errorf("kernelStages = %s; want %s", got, want)
	}
	if readKernelLog("/nonexistent") != nil {
		t.Error("a kernel log that is not there has lines")
	}
}

func FuzzKernelLine(f *testing.F) {
	f.Add([]byte("6,339,5140900,-,caller=T1;NET: Registered\n"))
	f.Add([]byte(",,;"))
	f.Fuzz(func(t *testing.T, b []byte) {
		if l, ok := parseKernelLine(b); ok && (l.at < 0 || strings.Contains(l.text, "\n")) {
			t.Errorf("%+v", l)
		}
	})
}

func TestPowerKey(t *testing.T) {
	for bitmap, want := range map[string]bool{
		"10000000000000 0":     true, // bit 116, as the ACPI button shows it
		"0 0 10000000000000 0": true,
		"402000000 3803078f800d001 fecfffdfffefffff fffffffffffffffe": false, // a keyboard without it
		"10000000000000": false,
		"":               false,
		"zzz 0":          false,
	} {
		if got := hasPowerKey(bitmap); got != want {
			t.Errorf("hasPowerKey(%q) = %v; want %v", bitmap, got, want)
		}
	}
}

// TestPowerButtons has a named pipe for a device.
func TestPowerButtons(t *testing.T) {
	dir := t.TempDir()
	class, dev := filepath.Join(dir, "class"), filepath.Join(dir, "dev")
	for i, keys := range []string{"fffffffffffffffe", "10000000000000 0"} {
		d := filepath.Join(class, fmt.Sprintf("event%d/device/capabilities", i))
		if err := os.MkdirAll(d, 0o755); err != nil {
			t.Fatal(err)
		}
		os.WriteFile(filepath.Join(d, "key"), []byte(keys+"\n"), 0o644)
	}
	os.MkdirAll(dev, 0o755)
	if err := unix.Mkfifo(filepath.Join(dev, "event1"), 0o600); err != nil {
		t.Fatal(err)
	}
	// First the writer: a pipe without one has an end, which a device has not.
	w, err := os.OpenFile(filepath.Join(dev, "event1"), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	pressed := make(chan struct{}, 8)
	done := make(chan error, 1)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	go func() { done <- powerButtons(ctx, class, dev, func() { pressed <- struct{}{} }) }()
	event := func(typ, code uint16, value uint32) []byte {
		b := make([]byte, inputEventSize)
		binary.NativeEndian.PutUint16(b[16:], typ)
		binary.NativeEndian.PutUint16(b[18:], code)
		binary.NativeEndian.PutUint32(b[20:], value)
		return b
	}
	w.Write(append(append(event(evKey, 30, 1), event(evKey, keyPower, 0)...), event(0, keyPower, 1)...))
	w.Write(event(evKey, keyPower, 1))
	<-pressed
	select {
	case <-pressed:
		t.Error("something else counted as a press")
	default:
	}
	cancel()
	if err := <-done; err != nil {
		t.Errorf("powerButtons = %v", err)
	}
	if err := powerButtons(t.Context(), filepath.Join(dir, "none"), dev, nil); !errors.Is(err, errNoPowerButton) {
		t.Errorf("powerButtons without any = %v", err)
	}
}

func TestWatchdogChoice(t *testing.T) {
	dir := t.TempDir()
	if _, err := openWatchdog(dir, dir, time.Minute); err == nil || !strings.Contains(err.Error(), "no watchdog") {
		t.Errorf("without any: %v", err)
	}
	for i, id := range []string{"Software Watchdog", "iTCO_wdt", "i6300ESB timer"} {
		d := filepath.Join(dir, fmt.Sprintf("watchdog%d", i))
		os.MkdirAll(d, 0o755)
		os.WriteFile(filepath.Join(d, "identity"), []byte(id+"\n"), 0o644)
	}
	// Nothing can be opened: the error shows the order in which it was tried.
	_, err := openWatchdog(dir, "/nonexistent", time.Minute)
	got := fmt.Sprint(err)
	if a, b, c := strings.Index(got, "watchdog1"), strings.Index(got, "watchdog2"), strings.Index(got, "watchdog0"); a < 0 || a > b || b > c {
		t.Errorf("tried in another order than hardware first: %v", got)
	}
}

// TestTimesFollowTheWatchdog: what the engine is told and watched by is what the
// device can do, not what the configuration wants.
func TestTimesFollowTheWatchdog(t *testing.T) {
	for _, tt := range []struct {
		watchdog string
		armed    time.Duration // 0: no device
		hang     time.Duration
	}{{"30s", 30 * time.Second, 15 * time.Second}, {"30s", 10 * time.Second, 5 * time.Second}, {"20s", 0, 10 * time.Second}, {"0", 0, hangWithoutWatchdog}} {
		env := appliance()
		env.runDir = t.TempDir()
		env.arm = func(_, _ string, _ time.Duration) (*watchdog, error) {
			if tt.armed == 0 {
				return nil, errors.New("none here")
			}
			return &watchdog{Timeout: tt.armed}, nil
		}
		p := newInit(env, 0)
		var err error
		if p.config, err = config.Load([]byte(header+"system: {watchdog: "+tt.watchdog+"}\n"), "test"); err != nil {
			t.Fatal(err)
		}
		p.prepare()
		told := p.program(p.sup.engine()).Env
		if want := fmt.Sprintf("WATCHDOG_USEC=%d", tt.hang.Microseconds()); p.sup.policy.EngineHang != tt.hang || !slices.Contains(told, want) {
			t.Errorf("watchdog %s, armed with %v: hang %v, engine is told %q; want %v", tt.watchdog, tt.armed, p.sup.policy.EngineHang, told, tt.hang)
		}
	}
	for timeout, good := range map[time.Duration]bool{0: false, 2 * time.Second: false, 3*feedPeriod - 1: false, 3 * feedPeriod: true, time.Minute: true} {
		if err := longEnough(timeout); (err == nil) != good {
			t.Errorf("longEnough(%v) = %v", timeout, err)
		}
	}
}

func TestSettings(t *testing.T) {
	root := t.TempDir()
	for _, name := range []string{"kernel/panic", "net/ipv6/conf/all/accept_ra", "net/ipv6/conf/eth0.5/accept_ra"} {
		os.MkdirAll(filepath.Dir(filepath.Join(root, name)), 0o755)
		os.WriteFile(filepath.Join(root, name), nil, 0o644)
	}
	var lines []string
	j := newJournal(sinceBoot)
	applySettings(root, settings, j.logger(new(slog.LevelVar)))
	for _, e := range j.lines("init") {
		lines = append(lines, e.Text)
	}
	if len(lines) > 0 {
		t.Errorf("settings that the kernel lacks are told at info: %q", lines)
	}
	for name, want := range map[string]string{"kernel/panic": "10", "net/ipv6/conf/all/accept_ra": "0", "net/ipv6/conf/eth0.5/accept_ra": "0"} {
		if b, _ := os.ReadFile(filepath.Join(root, name)); string(b) != want {
			t.Errorf("%s = %q; want %q", name, b, want)
		}
	}
	if _, err := os.Stat(filepath.Join(root, "kernel/panic_on_oops")); err == nil {
		t.Error("a setting that the kernel lacks was created")
	}
	for _, s := range settings {
		if strings.HasPrefix(s.Path, "/") || s.Value == "" {
			t.Errorf("setting %+v", s)
		}
	}
}

func TestClock(t *testing.T) {
	if _, wrong := clockToSet(time.Unix(0, 0)); !wrong {
		t.Error("1970 counts as right")
	}
	if _, wrong := clockToSet(clockFloor.AddDate(1, 0, 0)); wrong {
		t.Error("a year after the floor counts as wrong")
	}
}

func TestHostName(t *testing.T) {
	mac := net.HardwareAddr{0x52, 0x54, 0, 0x77, 0, 1}
	if got := hostName("demo", mac); got != "demo-770001" {
		t.Errorf("hostName = %s", got)
	}
	if got := hostName(strings.Repeat("a", 63), mac); len(got) != 64 {
		t.Errorf("hostName of a long cluster = %s", got)
	}
	if got := hostName("demo", nil); got != "demo" {
		t.Errorf("hostName without a NIC = %s", got)
	}
}

func offer(mods ...dhcpv4.Modifier) *dhcpv4.DHCPv4 {
	m, err := dhcpv4.New(append([]dhcpv4.Modifier{
		dhcpv4.WithReply(&dhcpv4.DHCPv4{OpCode: dhcpv4.OpcodeBootRequest, ClientHWAddr: net.HardwareAddr{2, 0, 0, 0, 0, 1}}),
		dhcpv4.WithMessageType(dhcpv4.MessageTypeOffer),
		dhcpv4.WithYourIP(net.IPv4(10, 77, 0, 100)),
		dhcpv4.WithServerIP(net.IPv4(10, 77, 0, 1)),
		dhcpv4.WithOption(dhcpv4.OptServerIdentifier(net.IPv4(10, 77, 0, 1))),
		dhcpv4.WithNetmask(net.CIDRMask(24, 32)),
		dhcpv4.WithRouter(net.IPv4(10, 78, 0, 1), net.IPv4(10, 77, 0, 1)),
		dhcpv4.WithDNS(net.IPv4(10, 77, 0, 2)),
		dhcpv4.WithLeaseTime(3600),
	}, mods...)...)
	if err != nil {
		panic(err)
	}
	return m
}

func TestNewLease(t *testing.T) {
	taken := shared{VIP: netip.MustParseAddr("10.77.0.10")}
	l, err := newLease(offer(), taken)
	if err != nil {
		t.Fatal(err)
	}
	if got := fmt.Sprint(l.Address, l.Router, l.DNS, l.Server, l.Length, l.T1, l.T2); got != "10.77.0.100/24 10.77.0.1 [10.77.0.2] 10.77.0.1 1h0m0s 30m0s 52m30s" {
		t.Errorf("lease %s", got)
	}
	for want, mod := range map[string]dhcpv4.Modifier{
		"the address of the VIP": dhcpv4.WithYourIP(net.IPv4(10, 77, 0, 10)),
		"no address for a host":  dhcpv4.WithYourIP(net.IPv4(127, 0, 0, 1)),
		"no address for a host ": dhcpv4.WithYourIP(net.IPv4bcast),
		"does not name itself":   dhcpv4.WithoutOption(dhcpv4.OptionServerIdentifier),
		"subnet mask":            dhcpv4.WithNetmask(net.IPMask{255, 0, 255, 0}),
	} {
		if _, err := newLease(offer(mod), taken); err == nil || !strings.Contains(err.Error(), strings.TrimSpace(want)) {
			t.Errorf("newLease = %v; want %s", err, want)
		}
	}
	for want, routers := range map[string][]net.IP{
		"10.77.0.1":  {net.IPv4(10, 77, 0, 10), net.IPv4(10, 77, 0, 1)}, // the VIP first
		"invalid IP": {net.IPv4(10, 77, 0, 10), net.IPv4(10, 77, 0, 100), net.IPv4(10, 78, 0, 1)},
	} {
		if l, err := newLease(offer(dhcpv4.WithRouter(routers...)), taken); err != nil || l.Router.String() != want {
			t.Errorf("of the routers %v %v is taken, %v; want %s", routers, l.Router, err, want)
		}
	}
	l, err = newLease(offer(dhcpv4.WithLeaseTime(1), dhcpv4.WithOption(dhcpv4.OptRenewTimeValue(time.Hour))), taken)
	if err != nil || l.Length != shortestLease || l.T1 != shortestLease/2 || l.T2 >= l.Length {
		t.Errorf("a lease of a second: %v, %v %v %v", err, l.Length, l.T1, l.T2)
	}
	l, err = newLease(offer(dhcpv4.WithLeaseTime(0xffffffff)), taken)
	if err != nil || l.Length < infiniteLease {
		t.Errorf("an endless lease: %v, %v", err, l.Length)
	}
}

// TestRenewalThatCannotBeSent has a NIC that refuses every request at once.
func TestRenewalThatCannotBeSent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		start, tries := time.Now(), 0
		d := &dhcpClient{
			ifi: &net.Interface{Name: "x", HardwareAddr: net.HardwareAddr{2, 0, 0, 0, 0, 1}}, log: slog.New(slog.DiscardHandler),
			listen: func(netip.Addr) (net.PacketConn, error) {
				if tries++; tries > 1000 {
					cancel()
				}
				return nil, errors.New("network is down")
			},
		}
		l := lease{Length: 2 * time.Minute, T1: time.Minute, T2: 105 * time.Second}
		time.Sleep(l.T1)
		if _, err := d.renew(ctx, l, start); !errors.Is(err, errNoAnswer) {
			t.Errorf("renew = %v", err)
		}
		if took := time.Since(start); tries < 4 || tries > 60 || took < l.Length || took > l.Length+2*time.Second {
			t.Errorf("%d tries in the last minute of a lease, given up after %v", tries, took)
		}
	})
}

func TestRetryDelay(t *testing.T) {
	for n, most := range []time.Duration{1, 2, 4, 8, 16, 32, 60, 60} {
		most *= time.Second
		if d := retryDelay(n, 0); d != most {
			t.Errorf("retryDelay(%d, 0) = %v; want %v", n, d, most)
		}
		if d := retryDelay(n, 255); d < most*3/4 || d >= most {
			t.Errorf("retryDelay(%d, 255) = %v; want a quarter less than %v at most", n, d, most)
		}
	}
	if d := retryDelay(1000, 0); d != time.Minute {
		t.Errorf("retryDelay(1000, 0) = %v", d)
	}
}

func FuzzDHCPAnswer(f *testing.F) {
	q := offer()
	f.Add(q.ToBytes())
	f.Add([]byte{2, 1, 6})
	taken := shared{VIP: netip.MustParseAddr("10.77.0.10")}
	f.Fuzz(func(t *testing.T, b []byte) {
		m := parseAnswer(b, q)
		if m == nil {
			return
		}
		l, err := newLease(m, taken)
		if err != nil {
			return
		}
		if l.Address.Addr() == taken.VIP || l.Router == taken.VIP || !l.Address.IsValid() || l.T1 <= 0 || l.T1 >= l.T2 || l.T2 >= l.Length || len(l.DNS) > maxDNS {
			t.Errorf("lease %+v", l)
		}
	})
}

// TestDHCPFilter runs the socket's filter over packets, which begin with their
// IP header.
func TestDHCPFilter(t *testing.T) {
	vm, err := bpf.NewVM(func() []bpf.Instruction {
		ins, ok := bpf.Disassemble(dhcpFilter)
		if !ok {
			t.Fatal("the filter has instructions without a name")
		}
		return ins
	}())
	if err != nil {
		t.Fatal(err)
	}
	packet := func(ihl byte, proto byte, fragment uint16, port uint16) []byte {
		b := make([]byte, int(ihl)*4+8)
		b[0], b[9] = 0x40|ihl, proto
		binary.BigEndian.PutUint16(b[6:], fragment)
		binary.BigEndian.PutUint16(b[int(ihl)*4+2:], port)
		return b
	}
	for _, tt := range []struct {
		name string
		b    []byte
		want bool
	}{
		{"answer", packet(5, 17, 0x4000, 68), true},
		{"answer with options", packet(8, 17, 0, 68), true},
		{"to the server", packet(5, 17, 0, 67), false},
		{"TCP", packet(5, 6, 0, 68), false},
		{"later fragment", packet(5, 17, 185, 68), false},
		{"short", packet(5, 17, 0, 68)[:21], false},
		{"empty", nil, false},
	} {
		n, err := vm.Run(tt.b)
		if (n > 0 && err == nil) != tt.want {
			t.Errorf("%s: %d, %v; want %v", tt.name, n, err, tt.want)
		}
	}
}

// scripted is a packet connection whose answers a function makes.
type scripted struct {
	answers chan []byte
	reply   func(*dhcpv4.DHCPv4) []*dhcpv4.DHCPv4
	sent    *[]string
}

func (s *scripted) WriteTo(b []byte, _ net.Addr) (int, error) {
	m, err := dhcpv4.FromBytes(b)
	if err != nil {
		return 0, err
	}
	*s.sent = append(*s.sent, m.MessageType().String())
	s.answers <- []byte("garbage")
	for _, a := range s.reply(m) {
		s.answers <- a.ToBytes()
	}
	return len(b), nil
}

func (s *scripted) ReadFrom(b []byte) (int, net.Addr, error) {
	select {
	case a := <-s.answers:
		return copy(b, a), nil, nil
	default:
		return 0, nil, os.ErrDeadlineExceeded
	}
}
func (s *scripted) Close() error                     { return nil }
func (s *scripted) LocalAddr() net.Addr              { return nil }
func (s *scripted) SetDeadline(time.Time) error      { return nil }
func (s *scripted) SetReadDeadline(time.Time) error  { return nil }
func (s *scripted) SetWriteDeadline(time.Time) error { return nil }

// TestDHCPExchange is offered the VIP first, then an address, is refused once,
// and gets it the second time.
func TestDHCPExchange(t *testing.T) {
	refusals := 1
	var sent []string
	conn := &scripted{answers: make(chan []byte, 16), sent: &sent}
	answer := func(q *dhcpv4.DHCPv4, typ dhcpv4.MessageType, ip net.IP) *dhcpv4.DHCPv4 {
		return offer(dhcpv4.WithReply(q), dhcpv4.WithMessageType(typ), dhcpv4.WithYourIP(ip))
	}
	conn.reply = func(q *dhcpv4.DHCPv4) []*dhcpv4.DHCPv4 {
		other := answer(q, dhcpv4.MessageTypeOffer, net.IPv4(10, 77, 0, 99))
		other.TransactionID[0]++
		switch q.MessageType() {
		case dhcpv4.MessageTypeDiscover:
			return []*dhcpv4.DHCPv4{other, answer(q, dhcpv4.MessageTypeOffer, net.IPv4(10, 77, 0, 10)), answer(q, dhcpv4.MessageTypeOffer, net.IPv4(10, 77, 0, 100))}
		case dhcpv4.MessageTypeRequest:
			if refusals > 0 {
				refusals--
				return []*dhcpv4.DHCPv4{answer(q, dhcpv4.MessageTypeNak, net.IPv4zero)}
			}
			return []*dhcpv4.DHCPv4{answer(q, dhcpv4.MessageTypeAck, q.RequestedIPAddress())}
		}
		return nil
	}
	d := &dhcpClient{
		ifi: &net.Interface{Name: "x", HardwareAddr: net.HardwareAddr{2, 0, 0, 0, 0, 1}}, hostname: "n",
		taken: shared{VIP: netip.MustParseAddr("10.77.0.10")}, log: slog.New(slog.DiscardHandler),
		listen: func(netip.Addr) (net.PacketConn, error) { return conn, nil },
	}
	if _, err := d.exchange(t.Context(), 0); !errors.Is(err, errRefused) {
		t.Errorf("the first exchange: %v; want a refusal", err)
	}
	l, err := d.exchange(t.Context(), 0)
	if err != nil || l.Address.String() != "10.77.0.100/24" {
		t.Errorf("the second exchange: %v %v", l.Address, err)
	}
	if got := strings.Join(sent, " "); got != "DISCOVER REQUEST DISCOVER REQUEST" {
		t.Errorf("sent %s", got)
	}
	conn.reply = func(q *dhcpv4.DHCPv4) []*dhcpv4.DHCPv4 {
		return []*dhcpv4.DHCPv4{answer(q, dhcpv4.MessageTypeOffer, net.IPv4(10, 77, 0, 10))}
	}
	if _, err := d.exchange(t.Context(), 0); err == nil || !strings.Contains(err.Error(), "the address of the VIP") {
		t.Errorf("offered nothing but the VIP: %v", err)
	}
}
