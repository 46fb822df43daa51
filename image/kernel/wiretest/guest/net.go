package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"runtime"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// namespace is the network namespace of the far end.
type namespace struct {
	fd netns.NsHandle
	nl *netlink.Handle
}

func newNamespace() (*namespace, error) {
	ns := &namespace{}
	err := onThread(func() error {
		var err error
		if ns.fd, err = netns.New(); err != nil {
			return err
		}
		ns.nl, err = netlink.NewHandleAt(ns.fd, unix.NETLINK_ROUTE)
		return err
	})
	return ns, err
}

// onThread runs f on a thread of its own, which ends with it: f may change the
// thread's namespace or credentials.
func onThread(f func() error) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread()
		done <- f()
	}()
	return <-done
}

// do runs f in the namespace. Sockets that f makes stay there.
func (ns *namespace) do(f func() error) error {
	return onThread(func() error {
		if err := netns.Set(ns.fd); err != nil {
			return err
		}
		return f()
	})
}

// The addresses on the wire. near is the device under test.
var (
	near4, far4 = net.IPv4(192, 0, 2, 1), net.IPv4(192, 0, 2, 2)
	near6, far6 = net.ParseIP("2001:db8::1"), net.ParseIP("2001:db8::2")
)

const (
	nearVeth = "near"
	farVeth  = "far"
	farMAC   = "02:00:00:00:00:0f"
)

func addr(ip net.IP, flags int) *netlink.Addr {
	mask := net.CIDRMask(24, 32)
	if ip.To4() == nil {
		mask = net.CIDRMask(64, 128)
	}
	return &netlink.Addr{IPNet: &net.IPNet{IP: ip, Mask: mask}, Flags: flags}
}

// wire makes the veth pair, without addresses, the near end with the given MAC.
func (b *bench) wire(nearMAC string) (remove func() error, err error) {
	la := netlink.NewLinkAttrs()
	la.Name, la.HardwareAddr = nearVeth, mac(nearMAC)
	veth := &netlink.Veth{LinkAttrs: la, PeerName: farVeth, PeerHardwareAddr: mac(farMAC), PeerNamespace: netlink.NsFd(b.far.fd)}
	if err := netlink.LinkAdd(veth); err != nil {
		return nil, fmt.Errorf("making the veth pair: %w", err)
	}
	far, err := b.far.nl.LinkByName(farVeth)
	if err == nil {
		err = b.far.nl.LinkSetUp(far)
	}
	return func() error { return netlink.LinkDel(veth) }, err
}

// number gives a device its end's addresses and takes it up.
func number(nl *netlink.Handle, dev string, ips ...net.IP) error {
	link, err := nl.LinkByName(dev)
	if err != nil {
		return err
	}
	if err := nl.LinkSetUp(link); err != nil {
		return err
	}
	for _, ip := range ips {
		if err := nl.AddrAdd(link, addr(ip, unix.IFA_F_NODAD)); err != nil {
			return fmt.Errorf("adding %v: %w", ip, err)
		}
	}
	return nil
}

// forget removes what a device knows of its neighbours.
func forget(nl *netlink.Handle, dev string) error {
	link, err := nl.LinkByName(dev)
	if err != nil {
		return err
	}
	for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
		known, err := nl.NeighList(link.Attrs().Index, family)
		if err != nil {
			return err
		}
		for _, n := range known {
			if err := nl.NeighDel(&n); err != nil && !errors.Is(err, unix.ENOENT) {
				return err
			}
		}
	}
	return nil
}

func sysctl(name, value string) error {
	return os.WriteFile("/proc/sys/"+name, []byte(value), 0)
}

const patience = 10 * time.Second

// pingPong exchanges n single bytes over a TCP connection from the calling
// thread's namespace to a server in the other one: n segments each way, and
// nothing that segmentation offload could join.
func pingPong(serve, dial func(func() error) error, network string, ip net.IP, n int) error {
	var l net.Listener
	if err := serve(func() (err error) {
		l, err = net.Listen(network, net.JoinHostPort(ip.String(), "7"))
		return err
	}); err != nil {
		return err
	}
	defer l.Close()
	served := make(chan error, 1)
	go func() {
		c, err := l.Accept()
		if err != nil {
			served <- err
			return
		}
		defer c.Close()
		_ = c.SetDeadline(time.Now().Add(patience))
		buf := make([]byte, 1)
		for range n {
			if _, err = c.Read(buf); err != nil {
				break
			}
			if _, err = c.Write(buf); err != nil {
				break
			}
		}
		served <- err
	}()
	err := dial(func() error {
		c, err := net.DialTimeout(network, net.JoinHostPort(ip.String(), "7"), patience)
		if err != nil {
			return err
		}
		defer c.Close()
		_ = c.SetDeadline(time.Now().Add(patience))
		buf := make([]byte, 1)
		for range n {
			if _, err := c.Write(buf); err != nil {
				return err
			}
			if _, err := c.Read(buf); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("%s: %w", network, err)
	}
	return <-served
}

// here runs f in the namespace of the device under test.
func here(f func() error) error { return f() }

// ping sends an echo request and waits for its reply.
func ping(from, ip net.IP) error {
	family, proto, request, reply := unix.AF_INET, unix.IPPROTO_ICMP, byte(8), byte(0)
	var source, to unix.Sockaddr
	if ip.To4() != nil {
		source, to = &unix.SockaddrInet4{Addr: [4]byte(from.To4())}, &unix.SockaddrInet4{Addr: [4]byte(ip.To4())}
	} else {
		family, proto, request, reply = unix.AF_INET6, unix.IPPROTO_ICMPV6, 128, 129
		source, to = &unix.SockaddrInet6{Addr: [16]byte(from)}, &unix.SockaddrInet6{Addr: [16]byte(ip)}
	}
	fd, err := unix.Socket(family, unix.SOCK_RAW|unix.SOCK_CLOEXEC, proto)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	tv := unix.NsecToTimeval(int64(patience))
	if err := errors.Join(unix.Bind(fd, source), unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv)); err != nil {
		return err
	}
	msg := []byte{request, 0, 0, 0, 'w', 't', 0, 1}
	if family == unix.AF_INET { // for ICMPv6 the kernel does it
		binary.BigEndian.PutUint16(msg[2:], ^onesSum(msg))
	}
	if err := unix.Sendto(fd, msg, 0, to); err != nil {
		return fmt.Errorf("ping %v: %w", ip, err)
	}
	buf := make([]byte, 1500)
	for {
		n, _, err := unix.Recvfrom(fd, buf, 0)
		if err != nil {
			return fmt.Errorf("no echo reply from %v: %w", ip, err)
		}
		icmp := buf[:n]
		if family == unix.AF_INET && n >= 20 {
			icmp = icmp[int(icmp[0]&15)*4:]
		}
		if len(icmp) >= 8 && icmp[0] == reply && icmp[4] == 'w' {
			return nil
		}
	}
}

func onesSum(b []byte) uint16 {
	var s uint32
	for i := 0; i+1 < len(b); i += 2 {
		s += uint32(binary.BigEndian.Uint16(b[i:]))
	}
	return uint16(s>>16) + uint16(s)
}
