package uinit

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
	"github.com/insomniacslk/dhcp/dhcpv4/server4"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"clonecluster/config"
	"clonecluster/netcore/nic"
)

// TestNetwork runs this binary again in a network namespace of its own, where
// fakeNetwork does the rest: namespaces belong to threads, and goroutines do
// not.
func TestNetwork(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root, to make network namespaces")
	}
	for _, mode := range []string{"dhcp", "dhcp-bad-router", "static", "link-local"} {
		t.Run(mode, func(t *testing.T) {
			exe, err := os.Executable()
			if err != nil {
				t.Fatal(err)
			}
			cmd := exec.Command(exe, "fake-network", mode)
			cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET | unix.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
			runtime.LockOSThread() // the death signal is the thread's
			defer runtime.UnlockOSThread()
			out, err := cmd.CombinedOutput()
			if err != nil {
				t.Errorf("%v\n%s", err, out)
			}
		})
	}
}

// fakeNetwork has a cable with init's network at one end and, in another
// namespace, a DHCP server at the other.
func fakeNetwork(mode string) error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return err
	}
	if err := unix.Mount("tmpfs", "/etc", "tmpfs", 0, ""); err != nil { // for resolv.conf
		return err
	}
	runtime.LockOSThread()
	here, err := netns.Get()
	if err != nil {
		return err
	}
	there, err := netns.New() // and enters it
	if err != nil {
		return err
	}
	if err := netns.Set(here); err != nil {
		return err
	}
	if err := loopbackUp(); err != nil {
		return err
	}
	s := &dhcpServer{routers: []net.IP{net.IPv4(10, 77, 0, 10), net.IPv4(10, 77, 0, 1)}} // the VIP is none
	mode, bad := strings.CutSuffix(mode, "-bad-router")
	if bad { // the subnet's broadcast address, which the kernel refuses
		s.routers = []net.IP{net.IPv4(10, 77, 0, 255)}
	}
	var ours []setting
	for _, s := range settings {
		if strings.HasPrefix(s.Path, "net/") { // the namespace's own
			ours = append(ours, s)
		}
	}
	applySettings("/proc/sys", ours, slog.New(slog.NewTextHandler(os.Stdout, nil)))
	if err := plug(here, there, s); err != nil {
		return err
	}
	for _, s := range []setting{
		{"net/ipv4/conf/a0/arp_ignore", "1"}, {"net/ipv4/conf/all/arp_ignore", "1"},
		{"net/ipv4/conf/a0/arp_announce", "2"}, {"net/ipv4/conf/all/arp_announce", "2"},
		{"net/ipv4/conf/a0/drop_unicast_in_l2_multicast", "1"}, {"net/ipv4/conf/all/drop_unicast_in_l2_multicast", "1"},
		{"net/ipv6/conf/a0/drop_unicast_in_l2_multicast", "1"}, {"net/ipv6/conf/lo/drop_unicast_in_l2_multicast", "1"},
	} {
		if b, err := os.ReadFile("/proc/sys/" + s.Path); err != nil || strings.TrimSpace(string(b)) != s.Value {
			return fmt.Errorf("%s is %q, %v; want %s", s.Path, b, err, s.Value)
		}
	}

	text := "cluster: {name: test, key: Y2xvbmVjbHVzdGVyIGRlbW8sIG5vdCBhIHNlY3JldCE=}\n" +
		"vip: {ipv4: 10.77.0.10/24, ipv4-gateway: 10.77.0.1}\ninterface: {name: a0}\nmanagement: {mode: " + mode + "}\n"
	if mode == "static" {
		text = strings.Replace(text, "static}", "static, pattern: 10.78.0.0/16}", 1)
	}
	c, err := config.Load([]byte(text), "test")
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	addresses := make(chan netip.Prefix, 64)
	found := make(chan nic.NIC, 64)
	linked := make(chan struct{}, 64)
	n := &network{
		config: c, log: slog.New(slog.NewTextHandler(os.Stdout, &slog.HandlerOptions{Level: slog.LevelDebug})),
		found: func(c nic.NIC) { found <- c },
		carrier: func(on bool) {
			if on {
				linked <- struct{}{}
			}
		},
		address: func(p netip.Prefix) { addresses <- p },
	}
	go n.run(ctx)
	last := "" // told again at each renewal
	want := func(address string) error {
		for {
			select {
			case p := <-addresses:
				switch got := p.String(); {
				case got == address:
					last = got
					return nil
				case p.IsValid() && got != last:
					return fmt.Errorf("the management address is %s; want %s", got, address)
				}
			case <-time.After(patience):
				return fmt.Errorf("the management address is never %s", address)
			}
		}
	}
	<-found
	<-linked

	switch mode {
	case "static":
		// 52:54:00:77:00:01 ends in 00:01 and the pattern leaves 16 bits.
		return want("10.78.0.1/16")
	case "link-local":
		return want("fe80::5054:ff:fe77:1/64")
	}
	if err := want("10.77.0.100/24"); err != nil || bad {
		return err
	}
	if err := checkKernel("10.77.0.100/24"); err != nil {
		return err
	}
	// The server refuses the second renewal: the address goes, another comes.
	if err := want("10.77.0.101/24"); err != nil {
		return err
	}
	if err := checkKernel("10.77.0.101/24"); err != nil {
		return err
	}
	if got := s.log(); !strings.HasPrefix(got, "DISCOVER→10.77.0.10 ") || !strings.Contains(got, "RENEW RENEW→NAK DISCOVER→10.77.0.101 REQUEST") {
		return fmt.Errorf("the server saw: %s", got)
	}
	if b, err := os.ReadFile("/etc/resolv.conf"); err != nil || string(b) != "nameserver 10.77.0.2\n" {
		return fmt.Errorf("resolv.conf %q, %v", b, err)
	}
	// The NIC is pulled out and another of the same name plugged in.
	for len(found) > 0 {
		<-found
	}
	a, err := netlink.LinkByName("a0")
	if err != nil {
		return err
	}
	if err := netlink.LinkDel(a); err != nil {
		return err
	}
	if err := plug(here, there, s); err != nil {
		return err
	}
	<-found
	return want("10.77.0.102/24")
}

// plug makes the cable a0–b0 and starts the server on b0.
func plug(here, there netns.NsHandle, s *dhcpServer) error {
	a := &netlink.Veth{
		LinkAttrs: netlink.LinkAttrs{Name: "a0", HardwareAddr: net.HardwareAddr{0x52, 0x54, 0, 0x77, 0, 1}},
		PeerName:  "b0", PeerNamespace: netlink.NsFd(there),
	}
	if err := netlink.LinkAdd(a); err != nil {
		return fmt.Errorf("making the cable: %w", err)
	}
	if err := netns.Set(there); err != nil {
		return err
	}
	defer netns.Set(here)
	b, err := netlink.LinkByName("b0")
	if err != nil {
		return err
	}
	addr, err := netlink.ParseAddr("10.77.0.1/24")
	if err == nil {
		err = netlink.AddrAdd(b, addr)
	}
	if err == nil {
		err = netlink.LinkSetUp(b)
	}
	if err != nil {
		return err
	}
	// A server that does not ask for its client's MAC: its answers to a renewal
	// come as a packet for the client in a frame for everybody.
	for _, ip := range []net.IP{net.IPv4(10, 77, 0, 100), net.IPv4(10, 77, 0, 101)} {
		n := &netlink.Neigh{LinkIndex: b.Attrs().Index, IP: ip, State: netlink.NUD_PERMANENT, HardwareAddr: net.HardwareAddr{255, 255, 255, 255, 255, 255}}
		if err := netlink.NeighSet(n); err != nil {
			return fmt.Errorf("setting a neighbour: %w", err)
		}
	}
	srv, err := server4.NewServer("b0", &net.UDPAddr{IP: net.IPv4zero, Port: dhcpv4.ServerPort}, s.handle)
	if err != nil {
		return err
	}
	go srv.Serve()
	return nil
}

// checkKernel compares what the kernel has with the lease.
func checkKernel(want string) error {
	link, err := netlink.LinkByName("a0")
	if err != nil {
		return err
	}
	addrs, err := netlink.AddrList(link, netlink.FAMILY_V4)
	if err != nil {
		return err
	}
	if len(addrs) != 1 || addrs[0].IPNet.String() != want || addrs[0].ValidLft <= 0 || addrs[0].ValidLft > 120 {
		return fmt.Errorf("addresses %v; want %s for two minutes", addrs, want)
	}
	routes, err := netlink.RouteListFiltered(netlink.FAMILY_V4, &netlink.Route{Table: unix.RT_TABLE_MAIN}, netlink.RT_FILTER_TABLE)
	if err != nil {
		return err
	}
	i := slices.IndexFunc(routes, func(r netlink.Route) bool { return r.Gw != nil })
	if i < 0 || routes[i].Gw.String() != "10.77.0.1" || routes[i].Src.String()+"/24" != want {
		return fmt.Errorf("routes %v; want a default one by 10.77.0.1", routes)
	}
	return nil
}

// dhcpServer offers the VIP first, then 10.77.0.100 and on; the lease is to be
// renewed every second, and the second renewal is refused.
type dhcpServer struct {
	routers  []net.IP
	mu       sync.Mutex
	seen     []string
	discover int
	renewed  int
	last     byte
}

func (s *dhcpServer) log() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return strings.Join(s.seen, " ")
}

func (s *dhcpServer) handle(conn net.PacketConn, peer net.Addr, m *dhcpv4.DHCPv4) {
	s.mu.Lock()
	defer s.mu.Unlock()
	typ, ip := dhcpv4.MessageTypeAck, m.RequestedIPAddress()
	note := m.MessageType().String()
	switch {
	case m.MessageType() == dhcpv4.MessageTypeDiscover:
		typ = dhcpv4.MessageTypeOffer
		ip = net.IPv4(10, 77, 0, 10) // the VIP: to be refused
		if s.discover > 0 {
			if s.last == 0 {
				s.last = 99
			}
			ip = net.IPv4(10, 77, 0, s.last+1)
		}
		s.discover++
		note += "→" + ip.String()
	case !m.ClientIPAddr.IsUnspecified():
		note, ip = "RENEW", m.ClientIPAddr
		if s.renewed++; s.renewed == 2 {
			note, typ = "RENEW→NAK", dhcpv4.MessageTypeNak
		}
	default:
		s.last = ip.To4()[3]
	}
	s.seen = append(s.seen, note)
	reply, err := dhcpv4.NewReplyFromRequest(m,
		dhcpv4.WithMessageType(typ), dhcpv4.WithYourIP(ip), dhcpv4.WithNetmask(net.CIDRMask(24, 32)),
		dhcpv4.WithRouter(s.routers...), dhcpv4.WithDNS(net.IPv4(10, 77, 0, 2)), dhcpv4.WithLeaseTime(120),
		dhcpv4.WithOption(dhcpv4.OptServerIdentifier(net.IPv4(10, 77, 0, 1))),
		dhcpv4.WithOption(dhcpv4.OptRenewTimeValue(time.Second)),
		dhcpv4.WithOption(dhcpv4.OptRebindingTimeValue(30*time.Second)))
	if err != nil {
		return
	}
	_, _ = conn.WriteTo(reply.ToBytes(), peer)
}
