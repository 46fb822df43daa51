package main

import (
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"clonecluster/image/kernel/wiretest"
)

// attribute tries what the file itself takes and says.
func (b *bench) attribute() error {
	remove, err := b.wire(shared)
	if err != nil {
		return err
	}
	b.equal("a new device has no wire address", getWire(nearVeth), "\n")
	b.check("clearing what is not set", setWire(nearVeth, ""))
	b.check("setting", setWire(nearVeth, wire1))
	b.equal("reading back", getWire(nearVeth), wire1+"\n")
	b.check("setting the same again", setWire(nearVeth, wire1))
	b.fails("garbage", setWire(nearVeth, "02:00"), unix.EINVAL)
	b.fails("a multicast address", setWire(nearVeth, "01:00:5e:00:00:01"), unix.EADDRNOTAVAIL)
	b.fails("the zero address", setWire(nearVeth, "00:00:00:00:00:00"), unix.EADDRNOTAVAIL)
	b.equal("failures change nothing", getWire(nearVeth), wire1+"\n")
	text, err := os.ReadFile("/sys/class/net/" + nearVeth + "/address")
	b.equal("the hardware address stays", strings.TrimSpace(string(text))+fmt.Sprint(err), shared+"<nil>")
	b.fails("without CAP_NET_ADMIN", onThread(func() error {
		if err := dropNetAdmin(); err != nil {
			return fmt.Errorf("dropping the capability: %v", err)
		}
		return setWire(nearVeth, wire2)
	}), unix.EPERM)
	b.equal("refused, it changes nothing", getWire(nearVeth), wire1+"\n")

	link, err := netlink.LinkByName(nearVeth)
	if err != nil {
		return err
	}
	if err := netlink.LinkSetNsFd(link, int(b.far.fd)); err != nil {
		return err
	}
	b.check("moved to another namespace", b.far.do(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
			return err
		}
		if err := unix.Mount("sysfs", "/sys", "sysfs", 0, ""); err != nil {
			return err
		}
		if got := getWire(nearVeth); got != wire1+"\n" {
			return fmt.Errorf("it reads %q; want %q", got, wire1+"\n")
		}
		return setWire(nearVeth, "")
	}))
	far, err := b.far.nl.LinkByName(nearVeth)
	if err != nil {
		return err
	}
	// Removed with a wire address set, it must free it (kmemleak would see).
	if err := b.far.nl.LinkDel(far); err != nil {
		return err
	}
	_ = remove

	la := netlink.NewLinkAttrs()
	la.Name = "tun"
	tun := &netlink.Tuntap{LinkAttrs: la, Mode: netlink.TUNTAP_MODE_TUN}
	if err := netlink.LinkAdd(tun); err != nil {
		return fmt.Errorf("making a TUN device: %w", err)
	}
	b.fails("a TUN device", setWire("tun", wire1), unix.EOPNOTSUPP)
	b.fails("loopback", setWire("lo", wire1), unix.EOPNOTSUPP)
	return netlink.LinkDel(tun)
}

func (b *bench) fails(name string, err, want error) {
	if errors.Is(err, want) {
		err = nil
	} else {
		err = fmt.Errorf("error %v; want %v", err, want)
	}
	b.check("refusing "+name, err)
}

// netpoll has the kernel's network console, which builds whole frames by hand,
// print a line on the NIC.
func (b *bench) netpoll() error {
	const nic = "eth0"
	link, err := netlink.LinkByName(nic)
	if _, absent := os.Stat("/sys/module/netconsole"); err != nil || absent != nil {
		fmt.Println("wiretest: no network console in this kernel")
		return nil
	}
	if err := setWire(nic, wire1); err != nil {
		return err
	}
	if err := mark(nic, wiretest.MarkSettled); err != nil {
		return err
	}
	if err := os.WriteFile("/dev/kmsg", []byte("<0>wiretest: hear, hear\n"), 0); err != nil {
		return err
	}
	hardware := link.Attrs().HardwareAddr.String()
	b.report.Captures = append(b.report.Captures, wiretest.Capture{
		Name: wiretest.Netpoll, Hardware: hardware, Before: hardware, Source: wire1, Want: map[string]int{"udp": 1},
	})
	return mark(nic, wiretest.MarkEnd)
}

// dropNetAdmin takes the capability from the calling thread.
func dropNetAdmin() error {
	hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&hdr, &data[0]); err != nil {
		return err
	}
	data[0].Effective &^= 1 << unix.CAP_NET_ADMIN
	data[0].Permitted &^= 1 << unix.CAP_NET_ADMIN
	return unix.Capset(&hdr, &data[0])
}

// neighbours shows that a write flushes neighbours, those made by hand as well,
// because their headers are cached.
func (b *bench) neighbours() error {
	remove, err := b.wire(shared)
	if err != nil {
		return err
	}
	if err := number(hereNL, nearVeth, near4, near6); err != nil {
		return err
	}
	link, err := netlink.LinkByName(nearVeth)
	if err != nil {
		return err
	}
	for _, ip := range []net.IP{far4, far6} {
		n := &netlink.Neigh{LinkIndex: link.Attrs().Index, State: netlink.NUD_PERMANENT, IP: ip, HardwareAddr: mac(farMAC)}
		if err := netlink.NeighAdd(n); err != nil {
			return err
		}
	}
	count := func() int {
		n := 0
		for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
			known, err := netlink.NeighList(link.Attrs().Index, family)
			if err != nil {
				return -1
			}
			for _, k := range known {
				if k.State == netlink.NUD_PERMANENT && (k.IP.Equal(far4) || k.IP.Equal(far6)) {
					n++
				}
			}
		}
		return n
	}
	b.equal("permanent neighbours before", count(), 2)
	if err := setWire(nearVeth, wire1); err != nil {
		return err
	}
	b.equal("permanent neighbours after", count(), 0)
	return remove()
}

// duplicates shows what another holder of our addresses does to us.
func (b *bench) duplicates() error {
	const taken = "2001:db8::77"
	remove, err := b.wire(shared)
	if err != nil {
		return err
	}
	if err := errors.Join(number(hereNL, nearVeth, near6), number(b.far.nl, farVeth, far6, net.ParseIP(taken))); err != nil {
		return err
	}
	link, err := netlink.LinkByName(nearVeth)
	if err != nil {
		return err
	}
	add := func() error { return netlink.AddrAdd(link, addr(net.ParseIP(taken), 0)) }
	del := func() error { return netlink.AddrDel(link, addr(net.ParseIP(taken), 0)) }
	const warning = "IPv6 duplicate address " + taken
	const advertised = "advertised our address"

	// Without a wire address, to show that the far end defends its address.
	if err := add(); err != nil {
		return err
	}
	flags, err := settledFlags(link, taken)
	b.check("detection runs without a wire address", err)
	b.equal("a duplicate fails without a wire address", flags&unix.IFA_F_DADFAILED != 0, true)
	b.equal("and is warned of", kernelSaid(warning), 1)
	if err := del(); err != nil {
		return err
	}

	// The wire address comes while detection runs.
	if err := errors.Join(add(), setWire(nearVeth, wire1)); err != nil {
		return err
	}
	flags, err = settledFlags(link, taken)
	b.check("detection ends after the wire address came", err)
	b.equal("a running detection is ignored", flags&(unix.IFA_F_DADFAILED|unix.IFA_F_TENTATIVE), 0)
	if err := del(); err != nil {
		return err
	}

	// And with one.
	if err := add(); err != nil {
		return err
	}
	flags, err = addressFlags(link, taken)
	b.check("the address is there", err)
	b.equal("a duplicate is valid at once", flags&(unix.IFA_F_DADFAILED|unix.IFA_F_TENTATIVE), 0)
	said := kernelSaid(advertised)
	if err := b.announce("02:00:00:00:00:0e"); err != nil {
		return err
	}
	b.equal("the announcement is not warned of", kernelSaid(advertised), said)
	b.equal("nor has anything else been", kernelSaid(warning), 1)
	if err := setWire(nearVeth, ""); err != nil {
		return err
	}
	if err := b.announce(farMAC); err != nil {
		return err
	}
	b.equal("without a wire address it is", kernelSaid(advertised), said+1)
	return remove()
}

// announce has the far end say where its addresses are, and returns when we have
// heard it.
func (b *bench) announce(newMAC string) error {
	far, err := b.far.nl.LinkByName(farVeth)
	if err != nil {
		return err
	}
	if err := b.far.do(func() error { return sysctl("net/ipv6/conf/"+farVeth+"/ndisc_notify", "1") }); err != nil {
		return err
	}
	if err := b.far.nl.LinkSetHardwareAddr(far, mac(newMAC)); err != nil {
		return err
	}
	// What follows on the same wire arrives later.
	return b.far.do(func() error { return ping(far6, near6) })
}

func addressFlags(link netlink.Link, ip string) (int, error) {
	addrs, err := netlink.AddrList(link, netlink.FAMILY_V6)
	if err != nil {
		return 0, err
	}
	for _, a := range addrs {
		if a.IP.String() == ip {
			return a.Flags, nil
		}
	}
	return 0, fmt.Errorf("%s has no address %s", link.Attrs().Name, ip)
}

// settledFlags waits for the end of duplicate address detection.
func settledFlags(link netlink.Link, ip string) (int, error) {
	for deadline := time.Now().Add(patience); ; time.Sleep(10 * time.Millisecond) {
		flags, err := addressFlags(link, ip)
		if err != nil || flags&unix.IFA_F_TENTATIVE == 0 || flags&unix.IFA_F_DADFAILED != 0 {
			return flags, err
		}
		if time.Now().After(deadline) {
			return flags, fmt.Errorf("%s is still tentative", ip)
		}
	}
}

// settled waits until duplicate address detection has ended for all addresses
// of a device, so that none runs on into a capture.
func settled(dev string) error {
	link, err := netlink.LinkByName(dev)
	if err != nil {
		return err
	}
	addrs, err := netlink.AddrList(link, netlink.FAMILY_V6)
	if err != nil {
		return err
	}
	for _, a := range addrs {
		if _, err := settledFlags(link, a.IP.String()); err != nil {
			return err
		}
	}
	return nil
}
