package nic

import (
	"context"
	"errors"
	"net"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"clonecluster/config"
	"clonecluster/netcore/netnstest"
)

// selectProgram runs Select in a namespace and prints what came of it.
func selectProgram(args []string) int {
	wait, err := time.ParseDuration(args[1])
	if err != nil {
		println(err.Error())
		return 2
	}
	println("selecting")
	n, err := Select(context.Background(), config.Interface{Name: args[0], WaitCarrier: wait})
	if err != nil {
		println("error:", err.Error())
		return 1
	}
	println("chosen:", n.Name, n.MAC.String(), n.Carrier)
	err = Follow(context.Background(), n.Index, func(n NIC) { println("now:", n.MAC.String(), n.MTU, n.Carrier) })
	println("followed:", err.Error(), errors.Is(err, ErrRemoved))
	return 0
}

func TestMain(m *testing.M) {
	os.Exit(netnstest.Main(m, map[string]func([]string) int{"select": selectProgram}))
}

func mac(last byte) net.HardwareAddr { return net.HardwareAddr{0x52, 0x54, 0, 0x77, 0, last} }

func TestChoose(t *testing.T) {
	hardware := func(name string, index int, pci string, carrier bool) NIC {
		return NIC{Name: name, Index: index, PCI: pci, Driver: "virtio_net", MAC: mac(byte(index)), PermanentMAC: mac(byte(index)), Carrier: carrier, ether: true}
	}
	virtual := func(name, kind string) NIC {
		n := hardware(name, 50, "", true)
		n.Driver, n.kind = kind, kind
		return n
	}
	lo := NIC{Name: "lo", Index: 1, kind: "", ether: false}
	port := hardware("eth9", 9, "0000:00:01.0", true)
	port.master = 3
	renamed := hardware("eth7", 7, "0000:00:07.0", true)
	renamed.MAC = mac(0xaa) // not its permanent one
	zero := hardware("eth8", 8, "0000:00:08.0", true)
	zero.MAC = make(net.HardwareAddr, 6)

	for _, tt := range []struct {
		name string
		nics []NIC
		cfg  config.Interface
		want string
		says string // one of the refusals
	}{
		{"nothing there", nil, config.Interface{}, "", ""},
		{"loopback", []NIC{lo}, config.Interface{}, "", "not Ethernet"},
		{"loopback by name", []NIC{lo}, config.Interface{Name: "lo"}, "", "not Ethernet"},
		{"with carrier before without", []NIC{hardware("eth0", 2, "0000:00:02.0", false), hardware("eth1", 3, "0000:00:03.0", true)}, config.Interface{}, "eth1", ""},
		{"lowest PCI address", []NIC{hardware("eth0", 2, "0000:00:09.0", true), hardware("eth1", 3, "0000:00:03.0", true)}, config.Interface{}, "eth1", ""},
		{"on PCI before not", []NIC{hardware("usb0", 2, "", true), hardware("eth1", 3, "0000:00:03.0", true)}, config.Interface{}, "eth1", ""},
		{"kernel's order without PCI", []NIC{hardware("b", 3, "", true), hardware("a", 2, "", true)}, config.Interface{}, "a", ""},
		{"by driver", []NIC{hardware("eth0", 2, "", true)}, config.Interface{Driver: "e1000*"}, "", `driver "virtio_net" does not match "e1000*"`},
		{"by PCI", []NIC{hardware("eth0", 2, "0000:00:02.0", true), hardware("eth1", 3, "0000:00:03.0", false)}, config.Interface{PCI: "0000:00:03.*"}, "eth1", `pci "0000:00:02.0"`},
		{"by permanent MAC", []NIC{hardware("eth0", 2, "", true), renamed}, config.Interface{MAC: "52:54:00:77:00:07"}, "eth7", ""},
		{"MAC in capitals", []NIC{hardware("eth0", 10, "", true)}, config.Interface{MAC: "52:54:00:77:00:0A"}, "eth0", ""},
		{"all criteria", []NIC{hardware("eth0", 2, "0000:00:02.0", true)}, config.Interface{Name: "eth*", Driver: "virtio_net", PCI: "0000:00:02.0", MAC: "52:54:*"}, "eth0", ""},
		{"one criterion of several fails", []NIC{hardware("eth0", 2, "0000:00:02.0", true)}, config.Interface{Name: "eth*", MAC: "00:11:*"}, "", "mac"},
		{"bad pattern", []NIC{hardware("eth0", 2, "", true)}, config.Interface{Name: "eth["}, "", "no valid pattern"},
		{"bridge", []NIC{virtual("br0", "bridge")}, config.Interface{Name: "br0"}, "", "not hardware but a bridge"},
		{"macvlan", []NIC{virtual("mv0", "macvlan")}, config.Interface{Name: "mv0"}, "", "not hardware but a macvlan"},
		{"our own TAP", []NIC{virtual("clone0", "tun")}, config.Interface{}, "", "not hardware but a tun"},
		{"veth by name", []NIC{virtual("eth0", "veth")}, config.Interface{Name: "eth0"}, "eth0", ""},
		{"veth by pattern", []NIC{virtual("eth0", "veth")}, config.Interface{Name: "eth*"}, "", "named in full"},
		{"veth by nothing", []NIC{virtual("eth0", "veth")}, config.Interface{}, "", "named in full"},
		{"port of a bridge", []NIC{port}, config.Interface{}, "", "a port of interface 3"},
		{"no address", []NIC{zero}, config.Interface{}, "", "no unicast address"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			best, refusals := choose(tt.nics, tt.cfg)
			got := ""
			if best >= 0 {
				got = tt.nics[best].Name
			}
			if got != tt.want {
				t.Errorf("choose = %q; want %q (refusals %v)", got, tt.want, refusals)
			}
			if tt.says != "" && !slices.ContainsFunc(refusals, func(r Refusal) bool { return strings.Contains(r.Reason, tt.says) }) {
				t.Errorf("refusals %v; want one that says %q", refusals, tt.says)
			}
		})
	}
}

func TestNoNICError(t *testing.T) {
	_, refusals := choose([]NIC{{Name: "lo"}, {Name: "eth0", Driver: "e1000e", PCI: "0000:00:19.0", MAC: mac(1), PermanentMAC: mac(1), ether: true}}, config.Interface{Driver: "virtio_net"})
	err := error(&NoNICError{Waited: time.Second, Refusals: refusals})
	if !errors.Is(err, ErrNoNIC) {
		t.Error("the error does not match ErrNoNIC")
	}
	for _, want := range []string{"after 1s", "lo (", "not Ethernet", "eth0 (driver e1000e, pci 0000:00:19.0, mac 52:54:00:77:00:01)", `does not match "virtio_net"`} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("%q is not in %q", want, err)
		}
	}
}

func TestPCIAddress(t *testing.T) {
	for in, want := range map[string]string{
		"0000:03:00.1": "0000:03:00.1", "": "", "virtio0": "", "usb-0000:00:14.0-1": "", "N/A": "", "tap": "",
	} {
		if got := pciAddress(in); got != want {
			t.Errorf("pciAddress(%q) = %q; want %q", in, got, want)
		}
	}
}

// TestSelectWaits: an interface that appears, comes up, and gets its carrier
// only after the program has begun to wait; and then all that can befall it.
func TestSelectWaits(t *testing.T) {
	bed := netnstest.New(t, mac(0xff))
	h := bed.Detached("late")
	p := h.Start("select", "eth0", "60s")
	p.Await(0, "selecting")
	h.Run("ip", "link", "add", "eth0", "address", mac(1).String(), "type", "veth", "peer", "name", "late", "netns", bed.Switch.NS)
	// Select sets it up; the carrier comes with the other end.
	bed.Switch.Run("ip", "link", "set", "late", "master", "br0", "up")
	at := p.Await(0, "chosen: eth0 52:54:00:77:00:01 true")
	h.Run("ip", "link", "set", "eth0", "mtu", "1400")
	at = p.Await(at, "now: 52:54:00:77:00:01 1400 true")
	bed.Switch.Run("ip", "link", "set", "late", "down")
	at = p.Await(at, "now: 52:54:00:77:00:01 1400 false")
	h.Run("ip", "link", "set", "eth0", "address", mac(2).String())
	at = p.Await(at, "now: 52:54:00:77:00:02 1400 false")
	h.Run("ip", "link", "del", "eth0")
	p.Await(at, "followed: the interface was removed true")
	if err := p.Wait(); err != nil {
		t.Errorf("%v:\n%s", err, p.Output())
	}
}

// TestSelectGivesUp: without a carrier it goes on with what there is, and
// without an interface it says what it saw. What it set up and did not take is
// down again.
func TestSelectGivesUp(t *testing.T) {
	bed := netnstest.New(t, mac(0xff))
	h := bed.Detached("dark")
	h.Run("ip", "link", "add", "eth0", "address", mac(1).String(), "type", "veth", "peer", "name", "dark", "netns", bed.Switch.NS)
	h.Start("select", "eth0", "300ms").Await(0, "chosen: eth0 52:54:00:77:00:01 false")
	if out := h.Run("ip", "link", "show", "eth0"); !strings.Contains(out, ",UP") {
		t.Errorf("the chosen interface is not up: %s", out)
	}
	p := h.Start("select", "eth1", "0s")
	if err := p.Wait(); err == nil || !strings.Contains(p.Output(), "eth0 (driver veth") {
		t.Errorf("for an interface that is not there: %v:\n%s", err, p.Output())
	}
}

func TestSysctl(t *testing.T) {
	s := Sysctl{"ipv4", "lo", "arp_ignore"}
	if got, err := s.Get(); err != nil || got == "" {
		t.Errorf("Get(%v) = %q, %v", s, got, err)
	}
	if s.String() != "net.ipv4.conf.lo.arp_ignore" {
		t.Errorf("String() = %v", s)
	}
	missing := Sysctl{"ipv4", "none such.5", "arp_ignore"}
	if _, err := missing.Get(); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("Get(%v): %v; want os.ErrNotExist", missing, err)
	}
	if err := missing.Set("1"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("Set(%v): %v; want os.ErrNotExist", missing, err)
	}
}
