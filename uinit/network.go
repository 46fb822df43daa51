package uinit

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"clonecluster/config"
	"clonecluster/netcore/nic"
)

// loopbackUp sets lo up; the kernel gives it its addresses.
func loopbackUp() error {
	lo, err := netlink.LinkByName("lo")
	if err == nil {
		err = netlink.LinkSetUp(lo)
	}
	if err != nil {
		return fmt.Errorf("setting the loopback interface up: %w", err)
	}
	return nil
}

// network finds the NIC and gives it its own address.
type network struct {
	config *config.Config
	log    *slog.Logger
	// found is told the NIC, at first and when another one has taken its place;
	// carrier, whether it has one; address, the management address (invalid: none).
	found   func(nic.NIC)
	carrier func(on bool)
	address func(netip.Prefix)
}

// run goes on until ctx ends: a NIC that is removed is looked for again.
func (n *network) run(ctx context.Context) {
	warned := ""
	for ctx.Err() == nil {
		card, err := nic.Select(ctx, n.config.Interface)
		if err != nil {
			if ctx.Err() == nil && err.Error() != warned {
				warned = err.Error()
				n.log.Error("looking for the NIC of the cluster; going on looking", "error", err)
			}
			wait(ctx, time.Second)
			continue
		}
		warned = ""
		if !card.Carrier {
			n.log.Warn("the NIC has no carrier; going on without", "nic", card.Name)
		}
		n.found(card)
		n.use(ctx, card)
	}
}

// use keeps the management address of one NIC until the NIC is gone.
func (n *network) use(ctx context.Context, card nic.NIC) {
	ctx, cancel := context.WithCancel(ctx)
	done := make(chan struct{})
	go func() {
		defer close(done)
		defer catch(n.log, "the keeper of the management address")
		n.manage(ctx, card)
	}()
	last := card
	err := nic.Follow(ctx, card.Index, func(now nic.NIC) {
		n.carrier(now.Carrier)
		if now.Carrier != last.Carrier {
			n.log.Info("carrier", "nic", now.Name, "on", now.Carrier)
		}
		last = now
	})
	if err != nil && ctx.Err() == nil {
		n.log.Error("following the NIC", "nic", card.Name, "error", err)
		if !errors.Is(err, nic.ErrRemoved) {
			wait(ctx, time.Second)
		}
	}
	cancel()
	<-done
	n.address(netip.Prefix{})
}

// manage gives the NIC its own address in the configured way.
func (n *network) manage(ctx context.Context, card nic.NIC) {
	link, err := netlink.LinkByIndex(card.Index)
	if err != nil {
		n.log.Error("reading the NIC", "nic", card.Name, "error", err)
		return
	}
	switch n.config.Management.Mode {
	case config.ManagementStatic:
		n.static(ctx, link, card)
	case config.ManagementLinkLocal:
		n.linkLocal(ctx, link)
	default:
		n.dhcp(ctx, link, card)
	}
}

// static computes the address from the permanent MAC.
func (n *network) static(ctx context.Context, link netlink.Link, card nic.NIC) {
	p, err := n.config.ManagementAddress(card.PermanentMAC)
	if err == nil {
		err = setAddress(link, p, 0)
	}
	if err != nil {
		n.log.Error("no management address; this node is reached by its IPv6 link-local address", "error", err)
		return
	}
	for _, gw := range []netip.Addr{n.config.VIP.IPv4Gateway, n.config.VIP.IPv6Gateway} {
		if gw.IsValid() && gw.Is4() == p.Addr().Is4() && p.Contains(gw) {
			if err := setDefaultRoute(link, gw, p.Addr()); err != nil {
				n.log.Error("setting the default route", "error", err)
			}
		}
	}
	n.address(p)
	<-ctx.Done()
	_ = removeAddress(link, p)
}

// linkLocal waits for the address that the kernel makes of the MAC.
func (n *network) linkLocal(ctx context.Context, link netlink.Link) {
	for {
		addrs, err := netlink.AddrList(link, netlink.FAMILY_V6)
		if err == nil {
			for _, a := range addrs {
				ip, ok := netip.AddrFromSlice(a.IP)
				if ok && ip.IsLinkLocalUnicast() && a.Flags&unix.IFA_F_TENTATIVE == 0 {
					ones, _ := a.Mask.Size()
					n.address(netip.PrefixFrom(ip.WithZone(""), ones))
					<-ctx.Done()
					return
				}
			}
		}
		if !wait(ctx, 200*time.Millisecond) {
			return
		}
	}
}

func (n *network) dhcp(ctx context.Context, link netlink.Link, card nic.NIC) {
	ifi := &net.Interface{Index: card.Index, Name: card.Name, MTU: card.MTU, HardwareAddr: card.MAC}
	v := n.config.VIP
	d := &dhcpClient{
		ifi:      ifi,
		hostname: hostName(n.config.Cluster.Name, card.PermanentMAC),
		taken:    shared{VIP: v.IPv4.Addr(), Gateway: v.IPv4Gateway},
		log:      n.log,
		listen:   func(source netip.Addr) (net.PacketConn, error) { return listenDHCP(ifi, source) },
		apply: func(l lease) error {
			// The kernel takes the address away by itself when the lease
			// ends, should nobody be there to do it.
			length := l.Length
			if length >= infiniteLease {
				length = 0
			}
			if err := setAddress(link, l.Address, length); err != nil {
				return err
			}
			if l.Router.IsValid() {
				// Without it the segment still reaches the node.
				if err := setDefaultRoute(link, l.Router, l.Address.Addr()); err != nil {
					n.log.Error("setting the default route that DHCP gave; going on without", "error", err)
				}
			}
			n.resolver(l.DNS)
			n.address(l.Address)
			return nil
		},
		remove: func(l lease) {
			_ = removeAddress(link, l.Address)
			n.address(netip.Prefix{})
		},
	}
	for ctx.Err() == nil { // again after a panic
		func() {
			defer catch(n.log, "the DHCP client")
			d.keep(ctx)
		}()
		wait(ctx, time.Second)
	}
}

// resolver tells services where to ask for names.
func (n *network) resolver(servers []netip.Addr) {
	if len(servers) == 0 {
		return
	}
	var b strings.Builder
	for _, s := range servers {
		fmt.Fprintf(&b, "nameserver %v\n", s)
	}
	err := os.MkdirAll("/etc", 0o755)
	if err == nil {
		err = os.WriteFile("/etc/resolv.conf", []byte(b.String()), 0o644)
	}
	if err != nil {
		n.log.Warn("writing /etc/resolv.conf", "error", err)
	}
}

// setAddress sets or refreshes an address; with a length, it lasts so long.
func setAddress(link netlink.Link, p netip.Prefix, length time.Duration) error {
	a := &netlink.Addr{IPNet: ipNet(p)}
	if length > 0 {
		a.ValidLft, a.PreferedLft = int(length/time.Second), int(length/time.Second)
	}
	if err := netlink.AddrReplace(link, a); err != nil {
		return fmt.Errorf("setting the address %v: %w", p, err)
	}
	return nil
}

func removeAddress(link netlink.Link, p netip.Prefix) error {
	return netlink.AddrDel(link, &netlink.Addr{IPNet: ipNet(p)})
}

func setDefaultRoute(link netlink.Link, gateway, source netip.Addr) error {
	r := &netlink.Route{LinkIndex: link.Attrs().Index, Gw: gateway.AsSlice(), Src: source.AsSlice(), Protocol: unix.RTPROT_DHCP}
	if err := netlink.RouteReplace(r); err != nil {
		return fmt.Errorf("setting the default route by %v: %w", gateway, err)
	}
	return nil
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}
