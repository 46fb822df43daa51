package raw

import (
	"errors"
	"io"
	"log/slog"
	"math/bits"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"clonecluster/netcore/clone"
	"clonecluster/netcore/filter"
	"clonecluster/netcore/netnstest"
	"clonecluster/netcore/nic"
)

func TestMain(m *testing.M) { os.Exit(netnstest.Main(m, nil)) }

func now() int64 {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts); err != nil {
		panic(err)
	}
	return ts.Nano()
}

// testFilter takes everything.
func testFilter(tb testing.TB) *filter.Filter {
	tb.Helper()
	f, err := filter.New(filter.Config{CloneMAC: testClone, VIP4: testVIP4, VIP6: testVIP6})
	if err != nil {
		tb.Fatal(err)
	}
	var table filter.Table
	for b := range table {
		table[b] = filter.Settled
	}
	f.SetTable(&table, now())
	f.SetLease(now() + int64(time.Hour))
	return f
}

func testConfig(tb testing.TB) Config {
	return Config{
		Config: clone.Config{
			CloneMAC: testClone,
			VIP4:     netip.PrefixFrom(testVIP4, 24), VIP6: netip.PrefixFrom(testVIP6, 64),
			Gateway4: netip.MustParseAddr("10.77.0.1"), Gateway6: netip.MustParseAddr("fe80::1"),
			Logger: slog.New(slog.NewTextHandler(io.Discard, nil)),
		},
		Filter: testFilter(tb), Now: now,
	}
}

// open opens a datapath in a namespace.
func open(h *netnstest.Host, cfg Config) (d *Datapath, err error) {
	err = h.Do(func() error {
		nics, err := nic.List()
		if err != nil {
			return err
		}
		for _, n := range nics {
			if n.Name == "eth0" {
				cfg.NIC = n
			}
		}
		d, err = Open(cfg)
		return err
	})
	return d, err
}

// machine is what a datapath sets on a machine, in words.
func machine(h *netnstest.Host) string {
	var b strings.Builder
	for _, cmd := range []string{
		"ip addr show dev clone0", "ip rule", "ip -6 rule",
		"ip route show table 3264", "ip -6 route show table 3264", "ip route show table main", "ip -6 route show table main",
		"sysctl net.ipv4.conf.eth0.arp_ignore net.ipv4.conf.eth0.arp_announce net.ipv4.conf.all.arp_ignore net.ipv4.conf.all.arp_announce net.ipv4.conf.eth0.drop_unicast_in_l2_multicast net.ipv6.conf.eth0.drop_unicast_in_l2_multicast",
	} {
		args := strings.Fields(cmd)
		// The kernel makes a table when it is first used, and keeps it.
		if out, err := h.Try(args[0], args[1:]...); err == nil {
			b.WriteString(out)
		}
	}
	// A TAP has an operational state only once its reader has come and gone.
	return strings.ReplaceAll(b.String(), "state UNKNOWN", "state UP")
}

func newBed(tb testing.TB) (*netnstest.Bed, *netnstest.Host) {
	tb.Helper()
	bed := netnstest.New(tb, testClone[:])
	return bed, bed.Host("node", "52:54:00:77:00:01", "10.77.0.101/24", "fd77::101/64")
}

func TestOpenAndClose(t *testing.T) {
	_, h := newBed(t)
	h.Sysctl("net.ipv4.conf.eth0.arp_announce", "1")
	before := machine(h)
	d, err := open(h, testConfig(t))
	if err != nil {
		t.Fatal(err)
	}
	got := machine(h)
	for _, want := range []string{
		"link/ether 02:cc:0a:4d:00:0a", "inet 10.77.0.10/32 scope global", "inet6 fd77::10/128 scope global nodad noprefixroute",
		"from 10.77.0.10 lookup 3264", "from fd77::10 lookup 3264", "from all oif clone0 lookup 3264",
		"10.77.0.0/24 dev clone0", "default via 10.77.0.1 dev clone0", "unreachable default",
		"fd77::/64 dev clone0", "default via fe80::1 dev clone0",
		"eth0.arp_ignore = 1", "eth0.arp_announce = 2", "all.arp_ignore = 1", "all.arp_announce = 2",
	} {
		if !strings.Contains(got, want) {
			t.Errorf("no %q in\n%s", want, got)
		}
	}
	for _, no := range []string{"fe80::cc", "brd 10.77.0.255 scope global clone0", "tentative"} {
		if strings.Contains(got, no) {
			t.Errorf("%q in\n%s", no, got)
		}
	}
	if err := h.Do(d.Close); err != nil {
		t.Fatal(err)
	}
	if after := machine(h); after != before {
		t.Errorf("Close left\n%s\nwant, as before Open\n%s", after, before)
	}
}

// TestTakeOver: a datapath that ended like in a crash is taken up as it is, and
// what it found on the machine is still known to the one that closes.
func TestTakeOver(t *testing.T) {
	_, h := newBed(t)
	before := machine(h)
	first, err := open(h, testConfig(t))
	if err != nil {
		t.Fatal(err)
	}
	index := first.host.Index()
	set := machine(h)
	another := testConfig(t)
	another.VIP4 = netip.MustParsePrefix("10.77.0.20/24")
	for _, cfg := range []Config{testConfig(t), another} {
		if _, err := open(h, cfg); !errors.Is(err, clone.ErrBusy) || !strings.Contains(err.Error(), "stop that one first (it has nic=eth0") {
			t.Errorf("a second datapath with %v beside the first: %v; want clone.ErrBusy", cfg.VIP4, err)
		}
		if got := machine(h); got != set {
			t.Errorf("a second datapath with %v beside the first made of it\n%s\nwant\n%s", cfg.VIP4, got, set)
		}
	}
	first.Abandon()

	// An engine that cannot start leaves what a crashed one left.
	abandoned := machine(h)
	h.Sysctl("net.ipv4.conf.all.arp_ignore", "3")
	if _, err := open(h, testConfig(t)); !errors.Is(err, clone.ErrARPSetting) {
		t.Errorf("Open = %v; want clone.ErrARPSetting", err)
	}
	h.Sysctl("net.ipv4.conf.all.arp_ignore", "1")
	if got := machine(h); got != abandoned {
		t.Errorf("a failed take-over left\n%s\nwant\n%s", got, abandoned)
	}

	second, err := open(h, testConfig(t))
	if err != nil {
		t.Fatal(err)
	}
	if second.host.Index() != index {
		t.Errorf("clone0 was made anew: its index is %d; want %d", second.host.Index(), index)
	}
	if got := machine(h); got != set {
		t.Errorf("after the take-over\n%s\nwant\n%s", got, set)
	}
	second.Abandon()

	// Another VIP: what is left does not fit, and goes.
	cfg := testConfig(t)
	cfg.VIP4, cfg.VIP6 = netip.MustParsePrefix("10.77.0.20/24"), netip.Prefix{}
	third, err := open(h, cfg)
	if err != nil {
		t.Fatal(err)
	}
	if got := machine(h); strings.Contains(got, "10.77.0.10 ") || strings.Contains(got, "fd77::10 ") || !strings.Contains(got, "10.77.0.20/32") {
		t.Errorf("after a change of the VIP\n%s", got)
	}
	if err := h.Do(third.Close); err != nil {
		t.Fatal(err)
	}
	if after := machine(h); after != before {
		t.Errorf("Close left\n%s\nwant\n%s", after, before)
	}
}

func TestOpenRefuses(t *testing.T) {
	_, h := newBed(t)
	before := machine(h)
	t.Run("the clone MAC on another interface", func(t *testing.T) {
		h.Run("ip", "link", "add", "d0", "address", net.HardwareAddr(testClone[:]).String(), "type", "veth", "peer", "name", "d1")
		defer h.Run("ip", "link", "del", "d0")
		if _, err := open(h, testConfig(t)); !errors.Is(err, clone.ErrMACInUse) {
			t.Errorf("Open = %v; want clone.ErrMACInUse", err)
		}
	})
	t.Run("another's clone0", func(t *testing.T) {
		h.Run("ip", "tuntap", "add", "clone0", "mode", "tap")
		defer h.Run("ip", "link", "del", "clone0")
		if _, err := open(h, testConfig(t)); err == nil || !strings.Contains(err.Error(), "was not made by clonecluster") {
			t.Errorf("Open = %v; want a refusal", err)
		}
	})
	t.Run("all interfaces made to answer", func(t *testing.T) {
		h.Sysctl("net.ipv4.conf.all.arp_ignore", "3")
		defer h.Sysctl("net.ipv4.conf.all.arp_ignore", "0")
		if _, err := open(h, testConfig(t)); !errors.Is(err, clone.ErrARPSetting) || !strings.Contains(err.Error(), "net.ipv4.conf.all.arp_ignore=3") {
			t.Errorf("Open = %v; want clone.ErrARPSetting that names the setting", err)
		}
	})
	t.Run("a failure half way", func(t *testing.T) {
		cfg := testConfig(t)
		cfg.Gateway4 = netip.MustParseAddr("224.0.0.1")
		if _, err := open(h, cfg); err == nil {
			t.Error("Open took a group as gateway")
		}
	})
	if after := machine(h); after != before {
		t.Errorf("refusals left\n%s\nwant\n%s", after, before)
	}
}

// TestSecondNIC: of a machine with two interfaces on the segment the other one
// must not answer for the VIP (I2). Nobody runs the datapath, so there is no
// right answer here.
func TestSecondNIC(t *testing.T) {
	if _, err := exec.LookPath("arping"); err != nil {
		t.Skip("needs arping (Debian package arping or iputils-arping)")
	}
	bed, h := newBed(t)
	bed.Cable(h, "eth1", "52:54:00:77:01:01", "10.77.0.102/24")
	client := bed.Host("client", "", "10.77.0.1/24")
	ask := func(address string) string {
		out, _ := client.Try("arping", "-I", "eth0", "-c", "2", "-w", "3", address) // fails without an answer
		return out
	}
	for _, all := range []string{"0", "2"} {
		h.Sysctl("net.ipv4.conf.all.arp_ignore", all)
		before := machine(h)
		d, err := open(h, testConfig(t))
		if err != nil {
			t.Fatal(err)
		}
		if out := ask(testVIP4.String()); !regexp.MustCompile(`Received 0 resp|, 0 packets received`).MatchString(out) {
			t.Errorf("all.arp_ignore=%s: an interface answers for the VIP: %s", all, out)
		}
		if out := ask("10.77.0.102"); !strings.Contains(strings.ToLower(out), "52:54:00:77:01:01") {
			t.Errorf("all.arp_ignore=%s: the second interface does not answer for its own address: %s", all, out)
		}
		if err := h.Do(d.Close); err != nil {
			t.Fatal(err)
		}
		if after := machine(h); after != before {
			t.Errorf("Close left\n%s\nwant\n%s", after, before)
		}
	}
}

// TestBroadcastToVIP: a packet for the VIP in a broadcast frame would reach the
// kernel of every node by the NIC, past the filter.
func TestBroadcastToVIP(t *testing.T) {
	bed, h := newBed(t)
	client := bed.Host("client", "", "10.77.0.1/24", "fd77::1/64")
	d, err := open(h, testConfig(t))
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := h.Do(d.Close); err != nil {
			t.Error(err)
		}
	}()
	echos := regexp.MustCompile(`(?m)^IcmpInEchos +(\d+)|^Icmp6InEchos +(\d+)`)
	count := func() []string { return echos.FindAllString(h.Run("nstat", "-asz", "IcmpInEchos", "Icmp6InEchos"), -1) }
	before := count()
	for _, vip := range []string{testVIP4.String(), testVIP6.String()} {
		client.Run("ip", "neigh", "replace", vip, "lladdr", "ff:ff:ff:ff:ff:ff", "dev", "eth0")
		_, _ = client.Try("ping", "-c", "2", "-i", "0.2", "-W", "1", vip)
	}
	after := count()
	if len(before) != 2 || !slices.Equal(before, after) {
		t.Errorf("echo requests to the VIP that reached the kernel: %q, then %q; want no more", before, after)
	}
	client.Run("ping", "-c", "1", "-W", "5", "10.77.0.101")
	if slices.Equal(after, count()) {
		t.Errorf("the count %q does not count", after)
	}
}

// forwarding is a datapath whose loops are called one frame at a time.
type forwarding struct {
	bed            *netnstest.Bed
	rx             *receiveLoop
	tx             *transmitLoop
	rxFD, tapFD    uintptr
	wire, inside   int // packet sockets: the far end of the NIC's cable, and clone0
	toVIP, fromVIP []byte
}

func newForwarding(tb testing.TB) *forwarding {
	tb.Helper()
	bed, h := newBed(tb)
	d, err := open(h, testConfig(tb))
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		if err := h.Do(d.Close); err != nil {
			tb.Error(err)
		}
	})
	f := &forwarding{bed: bed, toVIP: udp(tb, false), fromVIP: udp(tb, true)}
	f.wire = packetSocket(tb, bed.Switch, "node")
	f.inside = packetSocket(tb, h, "clone0")
	rc, err := d.rx.SyscallConn()
	if err != nil {
		tb.Fatal(err)
	}
	tap, err := d.tap.SyscallConn()
	if err != nil {
		tb.Fatal(err)
	}
	_ = rc.Control(func(fd uintptr) { f.rxFD = fd })
	_ = tap.Control(func(fd uintptr) { f.tapFD = fd })
	f.rx = &receiveLoop{d: d, tap: f.tapFD, buf: make([]byte, vnetHdrLen+maxFrame), answer: make([]byte, vnetHdrLen, 256)}
	f.tx = &transmitLoop{d: d, buf: make([]byte, vnetHdrLen+maxFrame)}
	// What the kernel had to say on its own.
	f.rx.burst(f.rxFD)
	f.tx.burst(f.tapFD)
	return f
}

// packetSocket is one to send on.
func packetSocket(tb testing.TB, h *netnstest.Host, ifname string) (fd int) {
	tb.Helper()
	return packetSocketFor(tb, h, ifname, 0)
}

// packetListener is one to receive on, for up to ten seconds.
func packetListener(tb testing.TB, h *netnstest.Host, ifname string) (fd int) {
	tb.Helper()
	fd = packetSocketFor(tb, h, ifname, unix.ETH_P_ALL)
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 10}); err != nil {
		tb.Fatal(err)
	}
	return fd
}

func packetSocketFor(tb testing.TB, h *netnstest.Host, ifname string, protocol uint16) (fd int) {
	tb.Helper()
	protocol = bits.ReverseBytes16(protocol)
	err := h.Do(func() error {
		ifi, err := net.InterfaceByName(ifname)
		if err != nil {
			return err
		}
		if fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, int(protocol)); err != nil {
			return err
		}
		return unix.Bind(fd, &unix.SockaddrLinklayer{Ifindex: ifi.Index, Protocol: protocol})
	})
	if err != nil {
		tb.Fatalf("packet socket on %s: %v", ifname, err)
	}
	tb.Cleanup(func() { unix.Close(fd) })
	return fd
}

// udp is a datagram of 1000 bytes between a client and the VIP. No socket takes
// it, and its protocol is one that the kernel does not answer for.
func udp(tb testing.TB, out bool) []byte {
	tb.Helper()
	f := make([]byte, 14+20+8+1000)
	client := []byte{0x52, 0x54, 0, 0x77, 0, 0xee}
	a, b := []byte{10, 77, 0, 1}, []byte{10, 77, 0, 10}
	dst, src := testClone[:], client
	if out {
		a, b, dst, src = b, a, client, testClone[:]
	}
	copy(f, dst)
	copy(f[6:], src)
	f[12], f[13] = 8, 0
	ip := f[14:]
	ip[0], ip[8], ip[9] = 0x45, 64, 17
	ip[2], ip[3] = byte((len(f)-14)>>8), byte((len(f)-14)&0xff)
	copy(ip[12:], a)
	copy(ip[16:], b)
	ip[20], ip[21], ip[22], ip[23] = 0x30, 0x39, 0, 53
	if out {
		ip[20], ip[21], ip[22], ip[23] = 0, 53, 0x30, 0x39
	}
	ip[24], ip[25] = byte((len(f)-34)>>8), byte((len(f)-34)&0xff)
	return f
}

func send(tb testing.TB, fd int, frame []byte) {
	if _, err := unix.Write(fd, frame); err != nil {
		tb.Fatal(err)
	}
}

// TestForwardAllocatesNothing: the steady state of both directions.
func TestForwardAllocatesNothing(t *testing.T) {
	f := newForwarding(t)
	before := f.rx.d.cfg.Filter.Counters()
	if n := testing.AllocsPerRun(200, func() {
		send(t, f.wire, f.toVIP)
		f.rx.burst(f.rxFD)
	}); n != 0 {
		t.Errorf("a frame to the VIP allocates %v times; want 0", n)
	}
	if n := testing.AllocsPerRun(200, func() {
		send(t, f.inside, f.fromVIP)
		f.tx.burst(f.tapFD)
	}); n != 0 {
		t.Errorf("a frame from the VIP allocates %v times; want 0", n)
	}
	after := f.rx.d.cfg.Filter.Counters()
	for _, v := range []filter.Verdict{filter.AcceptNew, filter.Send} {
		if got := after[v] - before[v]; got < 200 {
			t.Errorf("%v counts %d frames; want 200 or more", v, got)
		}
	}
	if c := f.rx.d.Counters(); c != (Counters{}) {
		t.Errorf("counters %+v; want zeros", c)
	}
}

// TestEveryFrameIsLife: each send may wait for room in the NIC's queue, so a
// burst may take longer than a supervisor's patience.
func TestEveryFrameIsLife(t *testing.T) {
	f := newForwarding(t)
	d := f.rx.d
	d.rxAlive.Store(0)
	d.txAlive.Store(0)
	send(t, f.wire, f.toVIP)
	f.rx.burst(f.rxFD)
	send(t, f.inside, f.fromVIP)
	f.tx.burst(f.tapFD)
	if d.Alive() == 0 {
		t.Errorf("after a frame each way the loops last ran at %d and %d", d.rxAlive.Load(), d.txAlive.Load())
	}
}

// TestVLAN: the kernel takes the tag out of a frame before a packet socket sees
// it, so the socket's filter has to ask for it.
func TestVLAN(t *testing.T) {
	f := newForwarding(t)
	for _, tt := range []struct {
		name string
		tag  []byte
		want uint64
	}{
		{"no tag", nil, 1},
		{"priority tag", []byte{0x81, 0x00, 0xa0, 0x00}, 1},
		{"VLAN 5", []byte{0x81, 0x00, 0x00, 0x05}, 0},
		{"VLAN 5 with priority", []byte{0x81, 0x00, 0xa0, 0x05}, 0},
	} {
		frame := slices.Concat(f.toVIP[:12], tt.tag, f.toVIP[12:])
		before := f.rx.d.cfg.Filter.Counters()
		send(t, f.wire, frame)
		f.rx.burst(f.rxFD)
		after := f.rx.d.cfg.Filter.Counters()
		if got := after[filter.AcceptNew] - before[filter.AcceptNew]; got != tt.want {
			t.Errorf("%s: %d frames accepted; want %d", tt.name, got, tt.want)
		}
		before[filter.AcceptNew] = after[filter.AcceptNew]
		if after != before {
			t.Errorf("%s: other verdicts: %v; want %v", tt.name, after, before)
		}
	}
}

// BenchmarkForward includes the generator: the send on a packet socket.
func BenchmarkForward(b *testing.B) {
	f := newForwarding(b)
	for _, bm := range []struct {
		name  string
		fd    int
		frame []byte
		move  func()
	}{
		{"ToVIP", f.wire, f.toVIP, func() { f.rx.burst(f.rxFD) }},
		{"FromVIP", f.inside, f.fromVIP, func() { f.tx.burst(f.tapFD) }},
	} {
		b.Run(bm.name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				send(b, bm.fd, bm.frame)
				bm.move()
			}
		})
	}
}
