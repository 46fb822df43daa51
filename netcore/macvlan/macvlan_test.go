package macvlan

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
	"golang.org/x/sys/unix"

	"clonecluster/netcore/bpf"
	"clonecluster/netcore/clone"
	"clonecluster/netcore/filter"
	"clonecluster/netcore/netnstest"
	"clonecluster/netcore/nic"
	"clonecluster/netcore/raw"
)

func TestMain(m *testing.M) { os.Exit(netnstest.Main(m, nil)) }

var (
	testClone = [6]byte{0x02, 0xcc, 0x0a, 0x4d, 0, 0x0a}
	testVIP4  = netip.MustParseAddr("10.77.0.10")
	testVIP6  = netip.MustParseAddr("fd77::10")
)

func now() int64 {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts); err != nil {
		panic(err)
	}
	return ts.Nano()
}

// open opens a datapath in a namespace, as a process there would.
func open(tb testing.TB, b *netnstest.Bed, h *netnstest.Host, change func(*Config)) (d *Datapath, err error) {
	tb.Helper()
	cfg := Config{
		Config: clone.Config{
			CloneMAC: testClone, VIP4: netip.PrefixFrom(testVIP4, 24), VIP6: netip.PrefixFrom(testVIP6, 64),
			Gateway4: netip.MustParseAddr("10.77.0.1"), Gateway6: netip.MustParseAddr("fe80::1"),
			Logger: slog.New(slog.NewTextHandler(io.Discard, nil)),
		},
		Filter: filter.Config{CloneMAC: testClone, VIP4: testVIP4, VIP6: testVIP6, ResetPatience: 50 * time.Millisecond}, Now: now,
	}
	bpffs := b.BPFFS()
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
		if cfg.Pins, err = PinsOf(bpffs); err != nil {
			return err
		}
		if change != nil {
			change(&cfg)
		}
		d, err = Open(cfg)
		return err
	})
	return d, err
}

// TestRunEnds: a datapath that is asked to stop does, at once.
func TestRunEnds(t *testing.T) {
	b := netnstest.New(t, testClone[:])
	h := b.Host("node", "52:54:00:77:00:01", "10.77.0.101/24")
	d, err := open(t, b, h, nil)
	if err != nil {
		t.Fatal(err)
	}
	for range 20 {
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
		done := make(chan error, 1)
		go func() { done <- h.Do(func() error { return d.Run(ctx) }) }()
		select {
		case err := <-done:
			if err != nil {
				t.Error(err)
			}
		case <-time.After(10 * time.Second):
			panic("the datapath does not end")
		}
		cancel()
	}
	if err := h.Do(d.Close); err != nil {
		t.Error(err)
	}
}

// machine is all that a datapath may change.
func machine(h *netnstest.Host) string {
	var b strings.Builder
	for _, c := range [][]string{
		{"ip", "-d", "link"}, {"ip", "addr"}, {"ip", "rule"}, {"ip", "-6", "rule"},
		{"ip", "route", "show", "table", "all"}, {"ip", "-6", "route", "show", "table", "all"},
		{"tc", "qdisc"}, {"tc", "filter", "show", "dev", "eth0", "ingress"}, {"tc", "filter", "show", "dev", "eth0", "egress"},
		{"sh", "-c", "grep -r . /proc/sys/net/ipv4/conf/*/arp_* /proc/sys/net/ipv[46]/conf/*/drop_unicast_in_l2_multicast"},
	} {
		b.WriteString(h.Run(c[0], c[1:]...))
	}
	// Lifetimes of addresses and promiscuity come and go by themselves.
	return regexp.MustCompile(`valid_lft \S+ preferred_lft \S+|expires \S+`).ReplaceAllString(b.String(), "")
}

// TestLeavesTheHost as it was: on a stop, after a failure half way, and when an engine
// that died is followed by one that stops.
func TestLeavesTheHost(t *testing.T) {
	b := netnstest.New(t, testClone[:])
	h := b.Host("node", "52:54:00:77:00:01", "10.77.0.101/24", "fd77::101/64")
	for strings.Contains(h.Run("ip", "addr"), "tentative") { // it will be as soon as nobody objects
		time.Sleep(10 * time.Millisecond)
	}
	before := machine(h)
	check := func(when string) {
		t.Helper()
		if after := machine(h); after != before {
			t.Errorf("%s the machine is\n%s\nwant\n%s", when, after, before)
		}
		if left, err := filepath.Glob(filepath.Join(b.BPFFS(), "clonecluster*")); err != nil || len(left) > 0 {
			t.Errorf("%s these pins are left: %q, %v", when, left, err)
		}
	}
	d, err := open(t, b, h, nil)
	if err != nil {
		t.Fatal(err)
	}
	if machine(h) == before {
		t.Error("an open datapath does not show: this shows nothing")
	}
	if err := h.Do(d.Close); err != nil {
		t.Error(err)
	}
	check("after a stop")

	for _, how := range []string{"taken back", "stopped", "crashed"} {
		if d, err = open(t, b, h, nil); err != nil {
			t.Fatal(err)
		}
		usual := programs(b, h)
		if err := h.Do(func() error { return d.SetDirected(&raw.Directed{Director: [6]byte(d.WireMAC())}) }); err != nil {
			t.Fatal(err)
		}
		if directed := programs(b, h); len(directed) != len(usual)+2 {
			t.Errorf("directed mode has the programs %q; before it were %q", directed, usual)
		}
		if how == "crashed" {
			d.Abandon()
			if d, err = open(t, b, h, nil); err != nil {
				t.Fatal(err)
			}
		} else if how == "taken back" {
			if err := h.Do(func() error { return d.SetDirected(nil) }); err != nil {
				t.Error(err)
			}
		}
		if how != "stopped" {
			if after := programs(b, h); len(after) != len(usual) {
				t.Errorf("after directed mode, %s, the programs are %q; want %q", how, after, usual)
			}
		}
		if err := h.Do(d.Close); err != nil {
			t.Error(err)
		}
		check("after directed mode, " + how + ",")
	}

	if _, err := open(t, b, h, func(c *Config) { c.Gateway4 = netip.MustParseAddr("224.0.0.1") }); err == nil {
		t.Error("Open took a group as gateway")
	}
	check("after a failure half way")

	if d, err = open(t, b, h, nil); err != nil {
		t.Fatal(err)
	}
	d.Abandon()
	if d, err = open(t, b, h, nil); err != nil {
		t.Fatal(err)
	}
	if err := h.Do(d.Close); err != nil {
		t.Error(err)
	}
	check("after a crash and a stop")

	// An engine that was killed before it could write down what it made.
	h.Run("ip", "link", "add", "link", "eth0", "name", clone.Device, "address", net.HardwareAddr(testClone[:]).String(), "group", fmt.Sprint(clone.Group), "type", "macvlan", "mode", "private")
	if d, err = open(t, b, h, nil); err != nil {
		t.Fatal(err)
	}
	if err := h.Do(d.Close); err != nil {
		t.Error(err)
	}
	check("after a crash on the way, and a stop")
}

// programs are the pins of what is attached.
func programs(b *netnstest.Bed, h *netnstest.Host) (names []string) {
	_ = h.Do(func() error {
		pins, err := PinsOf(b.BPFFS())
		if err == nil {
			names, err = filepath.Glob(filepath.Join(pins, "*"))
		}
		return err
	})
	return names
}

// TestBroadcast: a service that listens for broadcasts hears each of them once, and still
// what is sent to the VIP.
func TestBroadcast(t *testing.T) {
	b := netnstest.New(t, testClone[:])
	h := b.Host("node", "52:54:00:77:00:01", "10.77.0.101/24")
	client := b.Host("client", "", "10.77.0.1/24")
	h.Run("ip", "addr", "replace", "10.77.0.101/24", "brd", "+", "dev", "eth0")
	d, err := open(t, b, h, func(c *Config) {
		c.Filter.Rules = []filter.Rule{{Proto: filter.ProtoUDP, PortLo: 7000, PortHi: 7000}}
	})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := h.Do(d.Close); err != nil {
			t.Error(err)
		}
	}()
	var table filter.Table
	for i := range table {
		table[i] = filter.Settled
	}
	d.Filter().SetTable(&table, now())
	d.Filter().SetLease(now() + int64(time.Hour))
	var service, sender net.PacketConn
	if err := h.Do(func() (err error) { service, err = net.ListenPacket("udp4", "0.0.0.0:7000"); return err }); err != nil {
		t.Fatal(err)
	}
	defer service.Close()
	if err := client.Do(func() (err error) { sender, err = net.ListenPacket("udp4", "10.77.0.1:0"); return err }); err != nil {
		t.Fatal(err)
	}
	defer sender.Close()
	want := []string{}
	for _, to := range []string{"10.77.0.255", "255.255.255.255", testVIP4.String()} {
		if _, err := sender.WriteTo([]byte(to), &net.UDPAddr{IP: net.ParseIP(to), Port: 7000}); err != nil {
			t.Fatal(err)
		}
		want = append(want, to)
	}
	got := []string{}
	for buf := make([]byte, 100); ; {
		wait := 10 * time.Second
		if len(got) >= len(want) {
			wait = 300 * time.Millisecond // for what should not come
		}
		_ = service.SetReadDeadline(time.Now().Add(wait))
		n, _, err := service.ReadFrom(buf)
		if err != nil {
			break
		}
		got = append(got, string(buf[:n]))
	}
	slices.Sort(got)
	slices.Sort(want)
	if !slices.Equal(got, want) {
		t.Errorf("the service has heard %q; want %q", got, want)
	}
}

// TestSurvives: what an engine leaves when it dies goes on, and the next one finds it.
func TestSurvives(t *testing.T) {
	b := netnstest.New(t, testClone[:])
	h := b.Host("node", "52:54:00:77:00:01", "10.77.0.101/24")
	client := b.Host("client", "", "10.77.0.1/24")
	d, err := open(t, b, h, nil)
	if err != nil {
		t.Fatal(err)
	}
	var table filter.Table
	for i := range table {
		table[i] = filter.Settled
	}
	d.Filter().SetTable(&table, now())
	d.Filter().SetLease(now() + int64(time.Hour))
	ping := func(when string) {
		t.Helper()
		if out, err := client.Try("ping", "-c", "1", "-W", "5", testVIP4.String()); err != nil {
			t.Errorf("%s: %s", when, out)
		}
	}
	ping("with the engine")
	d.Abandon()
	ping("without the engine")
	if d, err = open(t, b, h, nil); err != nil {
		t.Fatal(err)
	}
	if got := d.Filter().Table(); got != table {
		t.Error("the next engine does not find the table")
	}
	ping("with the next engine")
	d.Filter().SetLease(0)
	d.Abandon()
	if out, err := client.Try("ping", "-c", "1", "-W", "1", testVIP4.String()); err == nil {
		t.Errorf("without a lease: %s", out)
	}
	if d, err = open(t, b, h, nil); err != nil {
		t.Fatal(err)
	}
	if d.Ingress() != bpf.TCX {
		t.Errorf("frames are judged by %v", d.Ingress())
	}
	if err := h.Do(d.Close); err != nil {
		t.Error(err)
	}
	// I1 is checked on all frames of the bed at its end.
}

// TestGuard: a frame that another program sends with the clone MAC as its source leaves
// with the wire MAC, and is counted.
func TestGuard(t *testing.T) {
	b := netnstest.New(t, testClone[:])
	h := b.Host("node", "52:54:00:77:00:01", "10.77.0.101/24")
	d, err := open(t, b, h, nil)
	if err != nil {
		t.Fatal(err)
	}
	frame := append(append(bytes.Repeat([]byte{0xff}, 6), testClone[:]...), 0x88, 0xb6)
	frame = append(frame, make([]byte, 46)...)
	for _, device := range []string{"eth0", clone.Device} {
		was := d.Counters().Guarded + d.Filter().Counters()[filter.DropEgressSource]
		err := h.Do(func() error {
			ifi, err := net.InterfaceByName(device)
			if err != nil {
				return err
			}
			fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
			if err != nil {
				return err
			}
			defer unix.Close(fd)
			return unix.Sendto(fd, frame, 0, &unix.SockaddrLinklayer{Ifindex: ifi.Index})
		})
		if err != nil && !errors.Is(err, unix.ENOBUFS) { // that it was dropped
			t.Fatal(err)
		}
		if got := d.Counters().Guarded + d.Filter().Counters()[filter.DropEgressSource]; got != was+1 {
			t.Errorf("%d frames sent on %s were stopped or mended; want 1", got-was, device)
		}
	}
	if got := d.Counters().Guarded; got != 1 {
		t.Errorf("the guard counts %d; want the one on the NIC", got)
	}
	if err := h.Do(d.Close); err != nil {
		t.Error(err)
	}
}

// TestComplete compares the checksum with gopacket's.
func TestComplete(t *testing.T) {
	ether := &layers.Ethernet{SrcMAC: testClone[:], DstMAC: net.HardwareAddr{2, 0, 0, 0, 0, 1}, EthernetType: layers.EthernetTypeIPv4}
	ip4 := &layers.IPv4{Version: 4, TTL: 64, Protocol: layers.IPProtocolTCP, SrcIP: testVIP4.AsSlice(), DstIP: net.IP{10, 77, 0, 1}}
	ip6 := &layers.IPv6{Version: 6, HopLimit: 64, NextHeader: layers.IPProtocolTCP, SrcIP: testVIP6.AsSlice(), DstIP: net.ParseIP("fd77::1")}
	for _, options := range [][]layers.TCPOption{nil, {{OptionType: layers.TCPOptionKindTimestamps, OptionLength: 10, OptionData: make([]byte, 8)}}} {
		for _, v6 := range []bool{false, true} {
			tcp := &layers.TCP{SrcPort: 80, DstPort: 12345, Seq: 0xdeadbeef, RST: true, Options: options}
			out := gopacket.NewSerializeBuffer()
			network := gopacket.SerializableLayer(ip4)
			ether.EthernetType = layers.EthernetTypeIPv4
			err := tcp.SetNetworkLayerForChecksum(ip4)
			if v6 {
				network, ether.EthernetType = ip6, layers.EthernetTypeIPv6
				err = tcp.SetNetworkLayerForChecksum(ip6)
			}
			if err == nil {
				err = gopacket.SerializeLayers(out, gopacket.SerializeOptions{FixLengths: true, ComputeChecksums: true}, ether, network, tcp)
			}
			if err != nil {
				t.Fatal(err)
			}
			want := out.Bytes()
			got := bytes.Clone(want)
			at := 14 + 20 + 16
			if v6 {
				at += 20
			}
			got[at], got[at+1] = 0x12, 0x34 // as the kernel left it
			if !complete(got) || !bytes.Equal(got, want) {
				t.Errorf("IPv6 %v, options %v:\n% x, want\n% x", v6, options, got, want)
			}
		}
	}
}

func FuzzComplete(f *testing.F) {
	f.Add([]byte{})
	f.Add(append(append(make([]byte, 12), 8, 0, 0x4f, 0, 0, 20), make([]byte, 80)...))
	f.Add(append(append(make([]byte, 12), 0x86, 0xdd, 0x60, 0, 0, 0, 0, 20, 6), make([]byte, 80)...))
	f.Fuzz(func(t *testing.T, frame []byte) {
		was := len(frame)
		if complete(frame); len(frame) != was {
			t.Error("the length changed")
		}
	})
}

// TestRefuses: what is not on a BPF file system, and a second engine.
func TestRefuses(t *testing.T) {
	b := netnstest.New(t, testClone[:])
	h := b.Host("node", "52:54:00:77:00:01", "10.77.0.101/24")
	if _, err := open(t, b, h, func(c *Config) { c.Pins = filepath.Join(b.Dir, "pins") }); err == nil || !strings.Contains(err.Error(), "mount -t bpf") {
		t.Errorf("without a BPF file system: %v", err)
	}
	d, err := open(t, b, h, nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := open(t, b, h, nil); !errors.Is(err, clone.ErrBusy) {
		t.Errorf("a second one: %v", err)
	}
	if _, err := open(t, b, h, func(c *Config) { c.WireAddress = true }); !errors.Is(err, clone.ErrBusy) {
		t.Errorf("a second one: %v", err)
	}
	if err := h.Do(d.Close); err != nil {
		t.Error(err)
	}
	if ProbeWireAddress() != nil {
		if _, err := open(t, b, h, func(c *Config) { c.WireAddress = true }); err == nil || !strings.Contains(err.Error(), "wire address") {
			t.Errorf("without wire addresses in the kernel: %v", err)
		}
	}
}

// TestIngressKept: where tcx has no room for what directed mode needs, XDP judges on, and is
// said to.
func TestIngressKept(t *testing.T) {
	b := netnstest.New(t, testClone[:])
	h := b.Host("node", "52:54:00:77:00:01", "10.77.0.101/24")
	d, err := open(t, b, h, func(c *Config) { c.XDP = true })
	if err != nil {
		t.Fatal(err)
	}
	defer d.Abandon()
	err = h.Do(func() error {
		for {
			p, err := ebpf.NewProgram(&ebpf.ProgramSpec{Type: ebpf.SchedCLS, License: "GPL", Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, -1), asm.Return()}})
			if err != nil {
				return err
			}
			defer p.Close()
			l, err := link.AttachTCX(link.TCXOptions{Interface: d.cfg.NIC.Index, Program: p, Attach: ebpf.AttachTCXIngress})
			if errors.Is(err, unix.ERANGE) { // full
				break
			} else if err != nil {
				return err
			}
			defer l.Close()
		}
		return d.SetDirected(&raw.Directed{Director: [6]byte(d.WireMAC())})
	})
	if err == nil || d.Ingress() != bpf.XDP || !strings.Contains(h.Run("ip", "-d", "link", "show", "dev", "eth0"), "xdp") {
		t.Errorf("without room at tcx: %v, and frames are judged by %q; want an error, and XDP", err, d.Ingress())
	}
}

// TestIngress: where frames are judged can change from one engine to the next, without
// a frame that is not judged or judged twice.
func TestIngress(t *testing.T) {
	b := netnstest.New(t, testClone[:])
	h := b.Host("node", "52:54:00:77:00:01", "10.77.0.101/24")
	client := b.Host("client", "", "10.77.0.1/24")
	var table filter.Table
	for i := range table {
		table[i] = filter.Settled
	}
	for _, xdp := range []bool{false, true, true, false} {
		d, err := open(t, b, h, func(c *Config) { c.XDP = xdp })
		if err != nil {
			t.Fatal(err)
		}
		if want := map[bool]bpf.Hook{false: bpf.TCX, true: bpf.XDP}[xdp]; d.Ingress() != want {
			t.Errorf("frames are judged by %s; want %s", d.Ingress(), want)
		}
		d.Filter().SetTable(&table, now())
		d.Filter().SetLease(now() + int64(time.Hour))
		was := d.Filter().Counters()[filter.AcceptNew]
		client.Run("ping", "-c", "3", "-i", "0.01", "-W", "5", testVIP4.String())
		if got := d.Filter().Counters()[filter.AcceptNew] - was; got != 3 {
			t.Errorf("XDP %v: %d of 3 echo requests were judged", xdp, got)
		}
		judgedBy := func(xdp bool) {
			t.Helper()
			if link := h.Run("ip", "-d", "link", "show", "dev", "eth0"); strings.Contains(link, "xdp") != xdp {
				t.Errorf("XDP %v: %s", xdp, link)
			}
		}
		judgedBy(xdp)
		// In directed mode others have to see the frames.
		if err := h.Do(func() error { return d.SetDirected(&raw.Directed{Director: [6]byte(d.WireMAC())}) }); err != nil {
			t.Fatal(err)
		}
		judgedBy(false)
		client.Run("ip", "neigh", "replace", testVIP4.String(), "lladdr", d.WireMAC().String(), "dev", "eth0")
		was = d.Filter().Counters()[filter.AcceptNew]
		client.Run("ping", "-c", "3", "-i", "0.01", "-W", "5", testVIP4.String())
		if got := d.Filter().Counters()[filter.AcceptNew] - was; got != 3 {
			t.Errorf("XDP %v, directed: %d of 3 echo requests were judged", xdp, got)
		}
		if err := h.Do(func() error { return d.SetDirected(nil) }); err != nil {
			t.Fatal(err)
		}
		judgedBy(xdp)
		client.Run("ip", "neigh", "del", testVIP4.String(), "dev", "eth0")
		d.Abandon()
	}
	d, err := open(t, b, h, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := h.Do(d.Close); err != nil {
		t.Error(err)
	}
}
