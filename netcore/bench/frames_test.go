package bench

import (
	"io"
	"log/slog"
	"net"
	"net/netip"
	"strings"
	"testing"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
	"golang.org/x/sys/unix"

	"clonecluster/netcore/clone"
	"clonecluster/netcore/filter"
	"clonecluster/netcore/macvlan"
	"clonecluster/netcore/netnstest"
	"clonecluster/netcore/nic"
	"clonecluster/netcore/raw"
)

// A receiver is somebody to whom frames are flooded that are not for him.
type receiver struct {
	name string
	fd   int // by which they are sent
}

// receivers gives one switch each, with a generator and the receiver.
func receivers(t *testing.T) (all []receiver) {
	add := func(name string, prepare func(*netnstest.Bed, *netnstest.Host)) {
		b := netnstest.NewUnwatched(t)
		generator := b.Host("generator", "52:54:00:77:03:01")
		if prepare != nil {
			mac := "52:54:00:77:03:02"
			if name == "xt_cluster" {
				mac = net.HardwareAddr(cloneMAC[:]).String()
			}
			h := b.Host("receiver", mac, "10.77.0.101/24")
			prepare(b, h)
		}
		r := receiver{name: name}
		err := generator.Do(func() (err error) {
			ifi, err := net.InterfaceByName("eth0")
			if err != nil {
				return err
			}
			if r.fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0); err != nil {
				return err
			}
			_ = unix.SetsockoptInt(r.fd, unix.SOL_PACKET, unix.PACKET_QDISC_BYPASS, 1)
			return unix.Bind(r.fd, &unix.SockaddrLinklayer{Ifindex: ifi.Index})
		})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { unix.Close(r.fd) })
		all = append(all, r)
	}
	add(None, nil)
	add(Uninvolved, func(*netnstest.Bed, *netnstest.Host) {})
	for _, xdp := range []bool{true, false} {
		name := "bpf, tcx"
		if xdp {
			name = "bpf, XDP"
		}
		add(name, func(b *netnstest.Bed, h *netnstest.Host) { openMacvlan(t, b, h, xdp) })
	}
	add("raw", func(_ *netnstest.Bed, h *netnstest.Host) { openRaw(t, h) })
	add("xt_cluster", func(_ *netnstest.Bed, h *netnstest.Host) {
		h.Run("ip", "addr", "add", vip+"/24", "dev", "eth0")
		xtRules(h, 1)
	})
	return all
}

// segment is a small one of the middle of a connection to the VIP.
func segment(t *testing.T) []byte {
	ip := &layers.IPv4{Version: 4, TTL: 64, Protocol: layers.IPProtocolTCP, SrcIP: clientAddr.AsSlice(), DstIP: net.ParseIP(vip).To4()}
	tcp := &layers.TCP{SrcPort: 40000, DstPort: 80, ACK: true, Seq: 1, Ack: 1, Window: 65535}
	if err := tcp.SetNetworkLayerForChecksum(ip); err != nil {
		t.Fatal(err)
	}
	buf := gopacket.NewSerializeBuffer()
	err := gopacket.SerializeLayers(buf, gopacket.SerializeOptions{FixLengths: true, ComputeChecksums: true},
		&layers.Ethernet{SrcMAC: net.HardwareAddr{0x52, 0x54, 0, 0x77, 3, 1}, DstMAC: cloneMAC[:], EthernetType: layers.EthernetTypeIPv4}, ip, tcp, gopacket.Payload("123456"))
	if err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

func (r receiver) flood(t *testing.T, frames int) Run {
	frame := segment(t)
	cpu, wall := spent(t, func() {
		for range frames {
			_, _ = unix.Write(r.fd, frame)
		}
	})
	return Run{CPU: float64(cpu) / float64(frames), Rate: float64(frames) / wall.Seconds()}
}

func hostConfig(t *testing.T, h *netnstest.Host) clone.Config {
	c := clone.Config{CloneMAC: cloneMAC, VIP4: netip.MustParsePrefix(vip + "/24"), Logger: slog.New(slog.NewTextHandler(io.Discard, nil))}
	err := h.Do(func() error {
		nics, err := nic.List()
		for _, n := range nics {
			if n.Name == "eth0" {
				c.NIC = n
			}
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func filterConfig() filter.Config {
	return filter.Config{CloneMAC: cloneMAC, VIP4: netip.MustParseAddr(vip), Rules: []filter.Rule{{Proto: filter.ProtoTCP, PortLo: 80, PortHi: 80}}}
}

func now() int64 {
	var ts unix.Timespec
	_ = unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts)
	return ts.Nano()
}

// openMacvlan makes a node to which every flow is foreign.
func openMacvlan(t *testing.T, b *netnstest.Bed, h *netnstest.Host, xdp bool) {
	cfg := macvlan.Config{Config: hostConfig(t, h), Filter: filterConfig(), XDP: xdp, Now: now}
	bpffs := b.BPFFS()
	var d *macvlan.Datapath
	err := h.Do(func() (err error) {
		if cfg.Pins, err = macvlan.PinsOf(bpffs); err != nil {
			return err
		}
		d, err = macvlan.Open(cfg)
		return err
	})
	if err != nil {
		t.Fatalf("opening the datapath: %v", err)
	}
	t.Cleanup(func() {
		if n := d.Filter().Counters()[filter.DropForeign]; n == 0 {
			t.Errorf("%s has discarded nothing", d.Ingress())
		}
		if err := h.Do(d.Close); err != nil {
			t.Error(err)
		}
	})
}

func openRaw(t *testing.T, h *netnstest.Host) {
	f, err := filter.New(filterConfig())
	if err != nil {
		t.Fatal(err)
	}
	var d *raw.Datapath
	cfg := raw.Config{Config: hostConfig(t, h), Filter: f, Now: now}
	if err := h.Do(func() (err error) { d, err = raw.Open(cfg); return err }); err != nil {
		t.Fatalf("opening the datapath: %v", err)
	}
	t.Cleanup(func() {
		if f.Counters()[filter.DropForeign] == 0 {
			t.Error("raw has discarded nothing")
		}
		if err := h.Do(d.Close); err != nil {
			t.Error(err)
		}
	})
	background(t, h, d.Run)
}

func TestClaims(t *testing.T) {
	run := func(way, work string, cpu float64) Series {
		return Series{Way: way, Work: work, Runs: []Run{{CPU: cpu, Rate: 1, P99: 1}}}
	}
	r := Report{Series: []Series{
		run(Plain, KeepAlive, 10), run("bpf", KeepAlive, 10.4), run("raw", KeepAlive, 14), run("bpf, 2 nodes", KeepAlive, 11), run("haproxy tcp", KeepAlive, 22),
		run("nginx proxy", KeepAlive, 30), run(None, Discard, 100), run("xt_cluster", Discard, 900), run("bpf, tcx", Discard, 600), run("bpf, XDP", Discard, 120),
	}}
	got := map[string]bool{}
	for _, c := range r.Claims() {
		got[c.What] = c.Holds()
	}
	for what, want := range map[string]bool{
		"CPU of bpf, keep-alive, against the plain host": true, "CPU of raw, keep-alive, against the plain host": false,
		"CPU of two nodes, keep-alive, against the best dispatcher": true, "a discarded frame, bpf, XDP, against xt_cluster": true,
		"a discarded frame, bpf, tcx, against xt_cluster": false,
	} {
		if holds, ok := got[what]; !ok || holds != want {
			t.Errorf("%s: %v, %v; want %v", what, holds, ok, want)
		}
	}
	if text := string(r.Markdown()); !strings.Contains(text, "| raw | 1.40 (1.40–1.40) | – |") || !strings.Contains(text, "| xt_cluster | 800 | 1.00 |") {
		t.Errorf("the report is\n%s", text)
	}
}
