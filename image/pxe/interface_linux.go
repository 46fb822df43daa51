package pxe

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Interface is a network interface of this computer: what is sent and received
// there, and nowhere else (SO_BINDTODEVICE).
type Interface struct {
	Name string
	Addr netip.Prefix // its first IPv4 address
}

// FindInterface gives the interface of that name. Without a name it is the only
// one with an IPv4 address that is up and not a loopback; where there are several,
// the error names them.
func FindInterface(name string) (Interface, error) {
	all, err := net.Interfaces()
	if err != nil {
		return Interface{}, err
	}
	var found []Interface
	var names []string
	for _, i := range all {
		if name != "" && i.Name != name || name == "" && i.Flags&(net.FlagLoopback|net.FlagPointToPoint) != 0 {
			continue
		}
		addr := firstIPv4(i)
		switch {
		case name == "":
			if i.Flags&net.FlagUp != 0 && addr.IsValid() {
				found = append(found, Interface{i.Name, addr})
				names = append(names, fmt.Sprintf("%s (%v)", i.Name, addr))
			}
			continue
		case i.Flags&net.FlagUp == 0:
			return Interface{}, fmt.Errorf("the interface %s is down: ip link set %s up", name, name)
		case !addr.IsValid():
			return Interface{}, fmt.Errorf("the interface %s has no IPv4 address, and PXE needs one: ip address add 192.0.2.1/24 dev %s, with an address of your own", name, name)
		}
		return Interface{i.Name, addr}, nil
	}
	switch {
	case name != "":
		return Interface{}, fmt.Errorf("there is no network interface %q; \"ip link\" lists those there are", name)
	case len(found) == 0:
		return Interface{}, errors.New("no network interface is up and has an IPv4 address: give that of the machines' segment one, as with \"ip addr add 10.9.0.1/24 dev NAME\"")
	case len(found) > 1:
		return Interface{}, fmt.Errorf("which network are the machines on? Say --interface with one of %s", strings.Join(names, ", "))
	}
	return found[0], nil
}

func firstIPv4(i net.Interface) netip.Prefix {
	addrs, err := i.Addrs()
	if err != nil {
		return netip.Prefix{} // gone by now
	}
	for _, a := range addrs {
		n, ok := a.(*net.IPNet)
		if !ok {
			continue
		}
		if ip, ok := netip.AddrFromSlice(n.IP.To4()); ok && !ip.IsLoopback() {
			ones, _ := n.Mask.Size()
			return netip.PrefixFrom(ip, ones)
		}
	}
	return netip.Prefix{}
}

// config makes sockets that are bound to the interface.
func (i Interface) config(shared bool) net.ListenConfig {
	return net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		var err error
		if cerr := c.Control(func(fd uintptr) {
			err = os.NewSyscallError("SO_BINDTODEVICE", unix.BindToDevice(int(fd), i.Name))
			if err == nil && shared {
				err = os.NewSyscallError("SO_REUSEADDR", unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEADDR, 1))
			}
		}); cerr != nil {
			return cerr
		}
		return err
	}}
}

// ListenPacket implements [Network]. A socket for broadcasts alone shares its port
// with this computer's own DHCP client, and takes nothing from it.
func (i Interface) ListenPacket(a netip.AddrPort) (net.PacketConn, error) {
	c := i.config(a.Addr() == netip.AddrFrom4([4]byte{255, 255, 255, 255}))
	return c.ListenPacket(context.Background(), "udp4", a.String())
}

// Listen implements [Network].
func (i Interface) Listen(a netip.AddrPort) (net.Listener, error) {
	c := i.config(false)
	return c.Listen(context.Background(), "tcp4", a.String())
}

// DialContext implements [Network].
func (i Interface) DialContext(ctx context.Context, network, addr string) (net.Conn, error) {
	d := net.Dialer{Control: i.config(false).Control}
	return d.DialContext(ctx, network, addr)
}

// Explain says what to do about a port that cannot be had: who has it, or which
// right is missing. Other errors it gives back as they are.
func Explain(ctx context.Context, err error) error {
	var l *ListenError
	if !errors.As(err, &l) {
		return err
	}
	switch {
	case errors.Is(err, os.ErrPermission):
		exe, _ := os.Executable()
		return fmt.Errorf("%w; it takes root, or the right to ports below 1024: sudo setcap cap_net_bind_service+ep %s", err, exe)
	case errors.Is(err, unix.EADDRINUSE):
		who := portUser(ctx, l)
		if who == "" {
			return fmt.Errorf("%w; \"sudo ss -lpn sport = :%d\" names the program that has it", err, l.Port)
		}
		if l.Network == "TCP" {
			return fmt.Errorf("%w by %s; choose another port with --http-port", err, who)
		}
		return fmt.Errorf("%w by %s; end that, or serve from another computer", err, who)
	}
	return err
}

// portUser asks ss (iproute2) which program has a port: "dnsmasq (process 812)", ""
// if it does not say.
func portUser(ctx context.Context, l *ListenError) string {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	proto := map[string]string{"UDP": "-u", "TCP": "-t"}[l.Network]
	out, err := exec.CommandContext(ctx, "ss", "-H", "-l", "-p", "-n", proto, "sport", "=", fmt.Sprintf(":%d", l.Port)).Output()
	if err != nil {
		return ""
	}
	return programs(string(out))
}

// programs reads users:(("dnsmasq",pid=812,fd=4)) out of what ss prints.
func programs(out string) string {
	var all []string
	for _, part := range strings.Split(out, `("`)[1:] {
		name, rest, _ := strings.Cut(part, `",pid=`)
		pid, _, ok := strings.Cut(rest, ",")
		who := fmt.Sprintf("%s (process %s)", name, pid)
		if ok && !slices.Contains(all, who) {
			all = append(all, who)
		}
	}
	return strings.Join(all, " and ")
}
