package main

import (
	"errors"
	"fmt"
	"net"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"clonecluster/image/kernel/wiretest"
)

const (
	shared = "02:cc:c0:00:02:01" // what ARP and NDP announce
	wire1  = "02:00:00:00:00:01"
	wire2  = "02:00:00:00:00:02"
	tag    = 7
	rounds = 100 // TCP segments each way
)

// kind is a way to get a device that can have a wire address.
type kind struct {
	name string
	dev  string // device under test
	set  string // device whose attribute is written
	near string // address of the veth's near end
	tag  int
	make func() error // on top of the veth pair
}

var kinds = []kind{
	{name: "veth", dev: nearVeth, set: nearVeth, near: shared, make: func() error { return nil }},
	{name: "macvlan", dev: "mv", set: "mv", near: wire1, make: func() error { return macvlan("mv") }},
	{name: "vlan", dev: "vl", set: "vl", near: shared, tag: tag, make: func() error { return vlan("vl", nearVeth) }},
	{name: "vlan-on-macvlan", dev: "vl", set: "vl", near: wire1, tag: tag, make: func() error {
		return errors.Join(macvlan("mv"), silence("mv"), number(hereNL, "mv"), vlan("vl", "mv"))
	}},
	// A VLAN without a setting of its own, of the same address as its lower
	// device.
	{name: "vlan-follows", dev: "vl", set: nearVeth, near: shared, tag: tag, make: func() error { return vlan("vl", nearVeth) }},
}

// silence keeps a lower device from speaking for itself.
func silence(dev string) error {
	return errors.Join(sysctl("net/ipv6/conf/"+dev+"/disable_ipv6", "1"), sysctl("net/ipv4/conf/"+dev+"/arp_ignore", "8"))
}

func macvlan(name string) error {
	lower, err := netlink.LinkByName(nearVeth)
	if err != nil {
		return err
	}
	la := netlink.NewLinkAttrs()
	la.Name, la.ParentIndex, la.HardwareAddr = name, lower.Attrs().Index, mac(shared)
	if err := netlink.LinkAdd(&netlink.Macvlan{LinkAttrs: la, Mode: netlink.MACVLAN_MODE_PRIVATE}); err != nil {
		return fmt.Errorf("making macvlan: %w", err)
	}
	return nil
}

func vlan(name, on string) error {
	lower, err := netlink.LinkByName(on)
	if err != nil {
		return err
	}
	la := netlink.NewLinkAttrs()
	la.Name, la.ParentIndex = name, lower.Attrs().Index
	if err := netlink.LinkAdd(&netlink.Vlan{LinkAttrs: la, VlanId: tag}); err != nil {
		return fmt.Errorf("making VLAN: %w", err)
	}
	return nil
}

var hereNL = &netlink.Handle{} // requests on a socket each, in the namespace of PID 1

// device tries one kind: unset, set while up, changed, through a link flap, and
// cleared.
func (b *bench) device(k kind) error {
	remove, err := b.wire(k.near)
	if err != nil {
		return err
	}
	if k.dev != nearVeth {
		if err := silence(nearVeth); err != nil {
			return err
		}
	}
	if err := number(hereNL, nearVeth); err != nil {
		return err
	}
	if err := k.make(); err != nil {
		return err
	}
	for _, s := range []string{"net/ipv4/conf/" + k.dev + "/arp_notify", "net/ipv6/conf/" + k.dev + "/ndisc_notify"} {
		if err := sysctl(s, "1"); err != nil {
			return err
		}
	}
	if err := number(hereNL, k.dev, near4, near6); err != nil {
		return err
	}
	farDev := farVeth
	if k.tag != 0 {
		farDev = "farvl"
		lower, err := b.far.nl.LinkByName(farVeth)
		if err != nil {
			return err
		}
		la := netlink.NewLinkAttrs()
		la.Name, la.ParentIndex = farDev, lower.Attrs().Index
		if err := b.far.nl.LinkAdd(&netlink.Vlan{LinkAttrs: la, VlanId: k.tag}); err != nil {
			return fmt.Errorf("making the far VLAN: %w", err)
		}
	}
	if err := number(b.far.nl, farDev, far4, far6); err != nil {
		return err
	}
	if err := settled(k.dev); err != nil {
		return err
	}
	before := shared
	for _, phase := range []struct{ name, wire string }{{"unset", ""}, {"set", wire1}, {"changed", wire2}, {"cleared", ""}} {
		source := phase.wire
		if source == "" {
			source = shared
		}
		if err := b.phase(k, farDev, phase.name, phase.wire, before, source); err != nil {
			return fmt.Errorf("%s: %w", phase.name, err)
		}
		before = source
	}
	if err := b.flap(k); err != nil {
		return fmt.Errorf("link flap: %w", err)
	}
	return remove()
}

// phase captures what the device sends with one setting of its wire address.
func (b *bench) phase(k kind, farDev, name, address, before, source string) error {
	want := wiretest.Capture{
		Name: k.name + "-" + name, Hardware: shared, Before: before, Source: source, VLAN: k.tag,
		Want: map[string]int{
			"arp-request": 1, "arp-reply": 1, "ns": 1, "na": 1, "mld": 1, "igmp": 1,
			"echo-reply": 1, "echo6-reply": 1, "tcp4": 2 * rounds, "tcp6": 2 * rounds,
			"udp-broadcast": 1, "udp-multicast": 1, "packet-dgram": 2,
		},
	}
	if address != "" && k.set == k.dev {
		want.Never = []string{"dad"}
	}
	c, err := b.startCapture()
	if err != nil {
		return err
	}
	if name != "unset" {
		if k.set == k.dev { // the write tells the device, and so its notifiers
			want.Want["arp-announcement"], want.Want["na-announcement"] = 1, 1
		}
		if err := setWire(k.set, address); err != nil {
			return err
		}
	}
	if err := errors.Join(mark(k.dev, wiretest.MarkSettled), b.traffic(c, k.dev, farDev)); err != nil {
		return err
	}
	return b.keep(c, k.dev, want)
}

// keep ends a capture and stores it.
func (b *bench) keep(c *capture, dev string, want wiretest.Capture) error {
	if err := mark(dev, wiretest.MarkEnd); err != nil {
		return err
	}
	data, err := c.wait()
	if err != nil {
		return err
	}
	b.report.Captures = append(b.report.Captures, want)
	return b.file(want.Name+".pcap", data)
}

// traffic makes the device send everything that it sends by itself.
func (b *bench) traffic(c *capture, dev, farDev string) error {
	farSide := b.far.do
	steps := []struct {
		name string
		do   func() error
	}{
		// Neither end knows the other: the device asks.
		{"forgetting neighbours", func() error { return errors.Join(forget(hereNL, dev), forget(b.far.nl, farDev)) }},
		{"TCP over IPv4", func() error { return pingPong(farSide, here, "tcp4", far4, rounds) }},
		{"TCP over IPv6", func() error { return pingPong(farSide, here, "tcp6", far6, rounds) }},
		// The far end has forgotten again: it asks.
		{"forgetting", func() error { return forget(b.far.nl, farDev) }},
		{"ping from the far end", func() error {
			return farSide(func() error { return errors.Join(ping(far4, near4), ping(far6, near6)) })
		}},
		{"TCP over IPv4 from the far end", func() error { return pingPong(here, farSide, "tcp4", near4, rounds) }},
		{"TCP over IPv6 from the far end", func() error { return pingPong(here, farSide, "tcp6", near6, rounds) }},
		{"groups", func() error { return groups(c, dev) }},
		{"a new address", func() error { return newAddress(dev) }},
	}
	for _, s := range steps {
		if err := s.do(); err != nil {
			return fmt.Errorf("%s: %w", s.name, err)
		}
	}
	return nil
}

// groups joins and leaves multicast groups, and sends to one and to everybody.
func groups(c *capture, dev string) error {
	ifi, err := net.InterfaceByName(dev)
	if err != nil {
		return err
	}
	for network, group := range map[string]net.IP{"udp4": net.IPv4(239, 1, 2, 3), "udp6": net.ParseIP("ff02::1234")} {
		l, err := net.ListenMulticastUDP(network, ifi, &net.UDPAddr{IP: group, Port: 4000})
		if err != nil {
			return err
		}
		defer l.Close()
	}
	if err := c.membership(); err != nil {
		return err
	}
	link, err := netlink.LinkByName(dev)
	if err != nil {
		return err
	}
	def := &netlink.Route{LinkIndex: link.Attrs().Index, Dst: &net.IPNet{IP: net.IPv4zero, Mask: net.CIDRMask(0, 32)}, Src: near4}
	if err := netlink.RouteReplace(def); err != nil {
		return err
	}
	for _, to := range []net.IP{net.IPv4(239, 1, 2, 3), net.IPv4bcast} {
		u, err := net.DialUDP("udp4", &net.UDPAddr{IP: near4}, &net.UDPAddr{IP: to, Port: 4000})
		if err != nil {
			return err
		}
		_, err = u.Write([]byte("x"))
		if err := errors.Join(err, u.Close()); err != nil {
			return err
		}
	}
	return netlink.RouteDel(def)
}

// newAddress adds an address for which duplicate address detection would run.
func newAddress(dev string) error {
	link, err := netlink.LinkByName(dev)
	if err != nil {
		return err
	}
	a := addr(net.ParseIP("2001:db8::1234"), 0)
	return errors.Join(netlink.AddrAdd(link, a), netlink.AddrDel(link, a))
}

// flap takes the veth's near end down and up with the wire address set.
func (b *bench) flap(k kind) error {
	if err := setWire(k.set, wire1); err != nil {
		return err
	}
	c, err := b.startCapture()
	if err != nil {
		return err
	}
	want := wiretest.Capture{
		Name: k.name + "-flap", Hardware: shared, Before: wire1, Source: wire1, VLAN: k.tag,
		Want: map[string]int{"tcp4": 3},
	}
	if k.near == shared { // a macvlan stays up and has nothing to announce
		want.Want["arp-announcement"] = 1
	}
	if k.set == k.dev {
		want.Never = []string{"dad"}
	}
	near, err := netlink.LinkByName(nearVeth)
	if err != nil {
		return err
	}
	if err := errors.Join(mark(k.dev, wiretest.MarkSettled), netlink.LinkSetDown(near)); err != nil {
		return err
	}
	if err := number(hereNL, nearVeth); err != nil {
		return err
	}
	// A device that went down with the lower one has lost its IPv6 addresses.
	if err := errors.Join(number(hereNL, k.dev, near6), running(k.dev), b.far.running(farVeth)); err != nil && !errors.Is(err, unix.EEXIST) {
		return err
	}
	if err := pingPong(b.far.do, here, "tcp4", far4, 3); err != nil {
		return err
	}
	return b.keep(c, k.dev, want)
}

// running waits until a device has its carrier and sends.
func running(dev string) error { return waitRunning(hereNL, dev) }

func (ns *namespace) running(dev string) error { return waitRunning(ns.nl, dev) }

func waitRunning(nl *netlink.Handle, dev string) error {
	for deadline := time.Now().Add(patience); ; time.Sleep(5 * time.Millisecond) {
		link, err := nl.LinkByName(dev)
		if err != nil {
			return err
		}
		if link.Attrs().OperState == netlink.OperUp {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("%s is %v", dev, link.Attrs().OperState)
		}
	}
}
