// Command guest is the PID 1 of test guests: as little as can show that a virtual
// machine, its console, its network card and its buttons work. It takes its orders
// from the kernel command line:
//
//	guest.mac=MAC        before anything else, set the NIC's address (to break I1)
//	guest.ip=PREFIX      add an address, several times
//	guest.dhcp           ask for an address by DHCP
//	guest.then=poweroff|reboot|panic|tick   what to do once ready
//
// It serves HTTP on port 80 and powers off at the press of the power button.
package main

import (
	"context"
	"encoding/binary"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4/nclient4"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

func main() {
	if os.Getpid() != 1 {
		fmt.Fprintln(os.Stderr, "guest: this is the init of a test guest")
		os.Exit(2)
	}
	stage("init", "")
	if err := run(); err != nil {
		say("failed: %v", err)
	}
	select {}
}

func run() error {
	for _, m := range []struct{ fs, dir string }{{"proc", "/proc"}, {"sysfs", "/sys"}, {"devtmpfs", "/dev"}} {
		os.MkdirAll(m.dir, 0o755)
		if err := unix.Mount(m.fs, m.dir, m.fs, 0, ""); err != nil && err != unix.EBUSY {
			return fmt.Errorf("mounting %s: %w", m.dir, err)
		}
	}
	go powerButton()
	b, err := os.ReadFile("/proc/cmdline")
	if err != nil {
		return err
	}
	args := strings.Fields(string(b))
	mgmt := "-"
	link, err := netlink.LinkByName("eth0")
	if err == nil {
		if mgmt, err = network(link, args); err != nil {
			return err
		}
	}
	ln, err := net.Listen("tcp", ":80")
	if err != nil {
		return err
	}
	if link != nil {
		go carrier()
		stage("ready", fmt.Sprintf(" node=%s mgmt=%s firmware=%s", link.Attrs().HardwareAddr, mgmt, firmware()))
	} else {
		stage("ready", " node=- mgmt=- firmware="+firmware())
	}
	switch value(args, "guest.then") {
	case "poweroff":
		return unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
	case "reboot":
		return unix.Reboot(unix.LINUX_REBOOT_CMD_RESTART)
	case "panic":
		os.Exit(3) // PID 1 must not exit
	case "tick":
		go func() {
			for range time.Tick(time.Second) {
				say("tick")
			}
		}()
	}
	return http.Serve(ln, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if n, _ := fmt.Sscanf(r.URL.Path, "/bench/%d", new(int)); n == 1 {
			size := 0
			fmt.Sscanf(r.URL.Path, "/bench/%d", &size)
			w.Write(make([]byte, size))
			return
		}
		fmt.Fprintf(w, "hello %s from %s\n", r.RemoteAddr, link.Attrs().HardwareAddr)
	}))
}

// firmware is what the kernel was started by, as far as it can tell.
func firmware() string {
	if _, err := os.Stat("/sys/firmware/efi"); err == nil {
		return "uefi"
	}
	return "bios"
}

func network(link netlink.Link, args []string) (mgmt string, err error) {
	if m := value(args, "guest.mac"); m != "" {
		mac, err := net.ParseMAC(m)
		if err != nil {
			return "", err
		}
		if err := netlink.LinkSetHardwareAddr(link, mac); err != nil {
			return "", err
		}
	}
	if lo, err := netlink.LinkByName("lo"); err == nil {
		netlink.LinkSetUp(lo)
	}
	if err := netlink.LinkSetUp(link); err != nil {
		return "", err
	}
	stage("link", "")
	mgmt = "-"
	for _, a := range args {
		if p, ok := strings.CutPrefix(a, "guest.ip="); ok {
			addr, err := netlink.ParseAddr(p)
			if err != nil {
				return "", err
			}
			addr.Flags = unix.IFA_F_NODAD
			if err := netlink.AddrAdd(link, addr); err != nil {
				return "", err
			}
			mgmt = addr.IP.String()
		}
		if a == "guest.dhcp" {
			if mgmt, err = dhcp(link); err != nil {
				return "", err
			}
		}
	}
	return mgmt, nil
}

func dhcp(link netlink.Link) (string, error) {
	c, err := nclient4.New(link.Attrs().Name, nclient4.WithTimeout(5*time.Second), nclient4.WithRetry(10))
	if err != nil {
		return "", err
	}
	defer c.Close()
	lease, err := c.Request(context.Background())
	if err != nil {
		return "", fmt.Errorf("asking by DHCP: %w", err)
	}
	n := &net.IPNet{IP: lease.ACK.YourIPAddr, Mask: lease.ACK.SubnetMask()}
	say("lease of %v from %v, router %v", n, lease.ACK.ServerIdentifier(), lease.ACK.Router())
	return n.IP.String(), netlink.AddrAdd(link, &netlink.Addr{IPNet: n})
}

// carrier reports what happens to the NIC's carrier.
func carrier() {
	updates := make(chan netlink.LinkUpdate)
	if err := netlink.LinkSubscribe(updates, nil); err != nil {
		say("no link updates: %v", err)
		return
	}
	up := true
	for u := range updates {
		if u.Link.Attrs().Name != "eth0" {
			continue
		}
		if now := u.Link.Attrs().OperState == netlink.OperUp; now != up {
			up = now
			say("carrier %s", map[bool]string{true: "found", false: "lost"}[up])
		}
	}
}

// powerButton waits for EV_KEY KEY_POWER (Documentation/input/event-codes.rst).
func powerButton() {
	for {
		names, _ := filepath.Glob("/dev/input/event*")
		if len(names) == 0 {
			say("no power button")
			return
		}
		for _, n := range names {
			f, err := os.Open(n)
			if err != nil {
				continue
			}
			go func() {
				ev := make([]byte, 24) // struct input_event
				for {
					if n, err := f.Read(ev); n != len(ev) || err != nil {
						return
					}
					kind, code := binary.LittleEndian.Uint16(ev[16:]), binary.LittleEndian.Uint16(ev[18:])
					if kind == 1 && code == 116 && ev[20] == 1 {
						say("power button")
						unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
					}
				}
			}()
		}
		return
	}
}

func value(args []string, key string) string {
	for _, a := range args {
		if v, ok := strings.CutPrefix(a, key+"="); ok {
			return v
		}
	}
	return ""
}

func stage(name, more string) {
	say("timeline stage=%s at=%.3fs%s", name, uptime(), more)
}

func say(format string, args ...any) {
	fmt.Printf("[%7.3f] init: %s\n", uptime(), fmt.Sprintf(format, args...))
}

func uptime() float64 {
	var ts unix.Timespec
	unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts)
	return time.Duration(ts.Nano()).Seconds()
}
