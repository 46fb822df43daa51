package main

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
	"github.com/insomniacslk/dhcp/dhcpv4"

	"clonecluster/image/pxe"
	"clonecluster/qemu"
	"clonecluster/qemu/lab"
	"clonecluster/qemu/nethost"
	"clonecluster/qemu/vswitch"
)

// TestNetworkBoot boots machines from the network, each in its own way, by
// firmware that is Debian's: iPXE in the ROM of QEMU's network card, OVMF by PXE,
// OVMF by HTTP, and with CLONECLUSTER_FULL one as if its BIOS had no iPXE. Their network has a DHCP server, beside which the server for their
// files stands. Each is followed until its node answers; then they are a cluster.
func TestNetworkBoot(t *testing.T) {
	img := testImage(t)
	kernel, err := os.ReadFile(img.kernel())
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.HasPrefix(kernel, []byte("MZ")) {
		t.Skip("needs a kernel with CONFIG_EFI_STUB; this board's has none")
	}
	if _, err := os.Stat("/usr/share/OVMF/OVMF_CODE_4M.fd"); err != nil {
		t.Skip("needs UEFI firmware (Debian package ovmf)")
	}
	efi, err := unified(img, "console=ttyS0 quiet panic=10 tsc=unstable", servedFiles(img.dir))
	if err != nil {
		t.Skip(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
	defer cancel()
	boots := []lab.Boot{
		{Firmware: qemu.BIOS, NetBoot: qemu.PXE},
		{Firmware: qemu.UEFI, NetBoot: qemu.PXE},
		{Firmware: qemu.UEFI, NetBoot: qemu.HTTPBoot},
	}
	ways := []string{"iPXE, amd64", "UEFI PXE, amd64", "UEFI HTTP boot, amd64"}
	if os.Getenv("CLONECLUSTER_FULL") != "" {
		boots, ways = append(boots, boots[0]), append(ways, "BIOS PXE, amd64")
	}
	cfg := lab.Demo(len(boots))
	cfg.Cmdline, cfg.ManualStart, cfg.MemoryMB = "", true, 512
	if cfg.CacheDir, err = cacheDir(); err != nil {
		t.Fatal(err)
	}
	for i, b := range boots {
		cfg.Nodes[i].Boot = &b
	}
	l, err := lab.Start(ctx, cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	defer func() {
		if t.Failed() {
			t.Log(l.Report())
		}
	}()
	stop := advertise(t, l.Switch())
	defer stop()

	host, err := nethost.Attach(l.Switch(), "pxe", nethost.Config{
		MAC: net.HardwareAddr{0x52, 0x54, 0, 0x77, 0xff, 2}, Addrs: []netip.Prefix{netip.MustParsePrefix("10.77.0.2/24")},
	})
	if err != nil {
		t.Fatal(err)
	}
	defer host.Close()
	var mu sync.Mutex
	var seen []pxe.Event
	network := oldBIOS{host, net.HardwareAddr{0x52, 0x54, 0, 0x77, 0, 4}, new(atomic.Bool)}
	s, err := pxe.New(pxe.Options{
		Network: network, Addr: netip.MustParsePrefix("10.77.0.2/24"), Undionly: undionlyPath, Health: healthURL(img.config),
		Images: []pxe.Image{{Arch: "amd64", Folder: img.dir, Cmdline: "console=ttyS0 quiet panic=10 tsc=unstable", EFI: efi}},
		OnEvent: func(e pxe.Event) {
			mu.Lock()
			defer mu.Unlock()
			seen = append(seen, e)
			if e.File == "undionly.kpxe" && e.Event == pxe.File {
				network.loaded.Store(true)
			}
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	serveCtx, end := context.WithCancel(ctx)
	done := make(chan error, 1)
	go func() { done <- s.Run(serveCtx) }()
	defer func() {
		end()
		if err := <-done; err != nil {
			t.Errorf("the server: %v", err)
		}
	}()

	for i, way := range ways {
		n := l.Node(i)
		start := time.Now()
		if err := n.Start(); err != nil {
			t.Fatal(err)
		}
		up := func() []pxe.Event {
			mu.Lock()
			defer mu.Unlock()
			var mine []pxe.Event
			for _, e := range seen {
				if e.Machine == n.MAC().String() {
					mine = append(mine, e)
				}
			}
			return mine
		}
		isUp := func(e pxe.Event) bool { return e.Event == pxe.Up }
		for !slices.ContainsFunc(up(), isUp) && time.Since(start) < 3*time.Minute && n.Running() {
			time.Sleep(100 * time.Millisecond)
		}
		var lines []string
		for _, e := range up() {
			lines = append(lines, e.String())
		}
		t.Logf("%s, after %.1f s:\n%s", way, time.Since(start).Seconds(), strings.Join(lines, "\n"))
		if !slices.ContainsFunc(up(), isUp) || up()[0].Client != way {
			t.Fatalf("the machine that boots by %s is not up", way)
		}
		for _, e := range up() {
			if e.Event == pxe.Stuck || e.Event == pxe.Refused || e.Event == pxe.Aborted {
				t.Errorf("%s: %v", way, e)
			}
		}
	}
	// They share the VIP: with enough flows one meets all.
	answered := map[string]int{}
	client := l.Client().HTTPClient()
	client.Transport.(*http.Transport).DisableKeepAlives = true
	vip := netip.AddrPortFrom(img.config.VIP.IPv4.Addr(), 80)
	for end := time.Now().Add(time.Minute); len(answered) < len(boots) && time.Now().Before(end); {
		req, _ := http.NewRequestWithContext(ctx, http.MethodGet, fmt.Sprintf("http://%v/whoami", vip), nil)
		resp, err := client.Do(req)
		if err != nil {
			continue // a share that is being handed over
		}
		var b bytes.Buffer
		b.ReadFrom(resp.Body)
		resp.Body.Close()
		for _, n := range cfg.Nodes {
			if strings.Contains(b.String(), n.MAC.String()) {
				answered[n.Name]++
			}
		}
	}
	if len(answered) != len(boots) {
		t.Errorf("of %d nodes these answer at the VIP: %v", len(boots), answered)
	}
	t.Logf("answers at the VIP: %v", answered)
}

// oldBIOS is a network on which one machine's iPXE looks like a BIOS's own PXE, of
// which QEMU has none, until it has loaded undionly.kpxe: so it goes the way of a
// machine without iPXE.
type oldBIOS struct {
	*nethost.Host
	mac    net.HardwareAddr
	loaded *atomic.Bool
}

func (o oldBIOS) ListenPacket(a netip.AddrPort) (net.PacketConn, error) {
	c, err := o.Host.ListenPacket(a)
	if err != nil || a.Port() != dhcpv4.ServerPort {
		return c, err
	}
	return plainPXE{c, o}, nil
}

type plainPXE struct {
	net.PacketConn
	oldBIOS
}

func (p plainPXE) ReadFrom(b []byte) (int, net.Addr, error) {
	n, from, err := p.PacketConn.ReadFrom(b)
	if err != nil || p.loaded.Load() {
		return n, from, err
	}
	if m, perr := dhcpv4.FromBytes(b[:n]); perr == nil && slices.Equal(m.ClientHWAddr, p.mac) {
		m.Options.Del(dhcpv4.OptionUserClassInformation)
		n = copy(b, m.ToBytes())
	}
	return n, from, err
}

// advertise says twice a second that there is an IPv6 router, and that it is not
// one to use (RFC 4861, lifetime 0): iPXE else waits 16 s for one.
func advertise(t *testing.T, sw *vswitch.Switch) (stop func()) {
	t.Helper()
	eth := &layers.Ethernet{SrcMAC: net.HardwareAddr{0x52, 0x54, 0, 0x77, 0xff, 3}, DstMAC: net.HardwareAddr{0x33, 0x33, 0, 0, 0, 1}, EthernetType: layers.EthernetTypeIPv6}
	ip := &layers.IPv6{Version: 6, HopLimit: 255, NextHeader: layers.IPProtocolICMPv6, SrcIP: net.ParseIP("fe80::5054:ff:fe77:ff03"), DstIP: net.ParseIP("ff02::1")}
	icmp := &layers.ICMPv6{TypeCode: layers.CreateICMPv6TypeCode(layers.ICMPv6TypeRouterAdvertisement, 0)}
	icmp.SetNetworkLayerForChecksum(ip)
	buf := gopacket.NewSerializeBuffer()
	if err := gopacket.SerializeLayers(buf, gopacket.SerializeOptions{FixLengths: true, ComputeChecksums: true}, eth, ip, icmp, &layers.ICMPv6RouterAdvertisement{HopLimit: 64}); err != nil {
		t.Fatal(err)
	}
	port, err := sw.Attach("router", sender{})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		tick := time.NewTicker(500 * time.Millisecond)
		defer tick.Stop()
		for {
			port.Send(buf.Bytes())
			select {
			case <-tick.C:
			case <-ctx.Done():
				return
			}
		}
	})
	return func() { cancel(); wg.Wait() }
}

// sender is a port that only sends.
type sender struct{}

func (sender) Receive([]byte) {}
