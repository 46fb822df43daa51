// Package hostcheck finds out, before anything is changed, whether a machine can
// be a node of a cluster, and what on it or on its segment would fight with one:
// the VIP on another interface, another program that manages it, a host on the
// segment that answers for it.
//
// Look reads the machine, Judge decides and touches nothing, Probe asks the
// segment. Every finding that stands in the way names what to do about it and has
// an error of its own.
//
// Sources: rtnetlink(7), capabilities(7), systemd-networkd's networkd.conf(5) and
// systemd.network(5), NetworkManager.conf(5), the kernel's ip-sysctl.rst, RFC 5227
// and RFC 4862 (probes).
package hostcheck

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"

	"clonecluster/config"
	"clonecluster/netcore/clone"
	"clonecluster/netcore/nic"
)

// What a machine is refused for: the error of Refuse matches ErrRefused and one or
// more of the others.
var (
	ErrRefused         = errors.New("this machine is not ready to be a node")
	ErrCapability      = errors.New("a capability is missing")
	ErrNoTUN           = errors.New("no TUN/TAP device")
	ErrNIC             = errors.New("no network interface to use")
	ErrVIPElsewhere    = errors.New("the VIP is on another interface")
	ErrVIPIsGateway    = errors.New("the VIP is this machine's router")
	ErrVIPBalanced     = errors.New("IPVS has the VIP")
	ErrVIPInUse        = errors.New("somebody else on the segment has the VIP")
	ErrCloneMACInUse   = errors.New("another interface has the clone MAC")
	ErrDeviceInUse     = errors.New("clone0 is somebody else's")
	ErrNICTaken        = errors.New("another device takes the frames of the network interface")
	ErrTableInUse      = errors.New("the routing table of the VIP is in use")
	ErrManaged         = errors.New("another program manages the VIP or clone0")
	ErrForeignRules    = errors.New("systemd-networkd removes routing rules that are not its own")
	ErrARPSetting      = errors.New("unfit ARP setting")
	ErrNoIPv6          = errors.New("this kernel has no IPv6")
	errUnknown         = errors.New("cannot be told")
	errServiceNotHeard = errors.New("a service does not listen at the VIP")
)

// Level says what a finding means for the node. The zero value is invalid.
type Level uint8

// The levels, and what Level.String makes of them.
const (
	OK      Level = iota + 1 // "ok"
	Warn                     // "warn": it works, but look at it
	Refused                  // "refused": it would do harm, or cannot work
)

func (l Level) String() string {
	if l < OK || l > Refused {
		return "invalid"
	}
	return [...]string{"ok", "warn", "refused"}[l-OK]
}

// MarshalText gives the name, for JSON.
func (l Level) MarshalText() ([]byte, error) { return []byte(l.String()), nil }

// UnmarshalText reads it.
func (l *Level) UnmarshalText(b []byte) error {
	for *l = OK; *l <= Refused; *l++ {
		if l.String() == string(b) {
			return nil
		}
	}
	return fmt.Errorf("level %q: want ok, warn or refused", b)
}

// A Finding is what one check has found.
type Finding struct {
	Check string `json:"check"` // "vip-elsewhere"
	Level Level  `json:"level"`
	What  string `json:"what"`
	Fix   string `json:"fix,omitempty"` // what to do about it

	err error
}

// Err is the reason as an error; nil for OK.
func (f Finding) Err() error { return f.err }

// Refuse gives an error that names all that is refused and what to do about it, nil
// if there is nothing. It matches ErrRefused and the error of each.
func Refuse(findings []Finding) error {
	e := &refusal{}
	for _, f := range findings {
		if f.Level == Refused {
			e.findings = append(e.findings, f)
		}
	}
	if len(e.findings) == 0 {
		return nil
	}
	return e
}

type refusal struct{ findings []Finding }

func (e *refusal) Error() string {
	var b strings.Builder
	b.WriteString(ErrRefused.Error())
	for i, f := range e.findings {
		b.WriteString(map[bool]string{true: ": ", false: "; "}[i == 0])
		fmt.Fprintf(&b, "%s (%s)", f.What, f.Fix)
	}
	return b.String()
}

func (e *refusal) Unwrap() []error {
	errs := []error{ErrRefused}
	for _, f := range e.findings {
		errs = append(errs, f.err)
	}
	return errs
}

// Want is what the machine is to be a node of.
type Want struct {
	CloneMAC   net.HardwareAddr
	VIP4, VIP6 netip.Addr // at least one is valid
	Services   []Service
	Datapath   string // native, bpf, raw or auto
}

// Service is what should listen.
type Service struct {
	Name  string
	Ports []config.PortRange
}

// WantOf gives that of a configuration.
func WantOf(cfg *config.Config) Want {
	w := Want{CloneMAC: cfg.VIP.CloneMAC, VIP4: cfg.VIP.IPv4.Addr(), VIP6: cfg.VIP.IPv6.Addr(), Datapath: cfg.System.Datapath}
	for _, s := range cfg.Services {
		w.Services = append(w.Services, Service{s.Name, s.Ports})
	}
	return w
}

func (w Want) has(a netip.Addr) bool {
	return a.IsValid() && (a == w.VIP4 || a == w.VIP6)
}

func (w Want) vips() (vips []netip.Addr) {
	for _, v := range []netip.Addr{w.VIP4, w.VIP6} {
		if v.IsValid() {
			vips = append(vips, v)
		}
	}
	return vips
}

// Machine is what Look has read.
type Machine struct {
	NIC       nic.NIC
	NICErr    error // there is none
	Links     []Link
	Addresses []Address
	Gateways  []netip.Addr // of default routes
	// TableRoutes are those in the VIP's table that are not ours, in words.
	TableRoutes []string
	Missing     []Missing // capabilities
	TUN         error
	IPv6        bool
	ARPIgnore   map[string]string // by interface
	Balanced    []netip.Addr      // virtual services of IPVS
	Managers    []Manager
	Networkd    Networkd
	Silent      []Silent // services that nobody would answer for
}

// Link is one interface.
type Link struct {
	Index   int
	Name    string
	Kind    string // "" for hardware
	MAC     net.HardwareAddr
	Alias   string
	Group   uint32
	Parent  int
	Takes   bool // all frames of its parent: a macvlan of mode passthru
	Managed string
}

func (l Link) ours() bool { return l.Name == clone.Device && clone.Ours(l.Alias, l.Group) }

// Address is one address of an interface.
type Address struct {
	Link    string
	Address netip.Prefix
	Dynamic bool // it has a lifetime: DHCP, or a router advertisement
}

// Missing is a capability that this process lacks.
type Missing struct {
	Name   string // "CAP_NET_ADMIN"
	Needed bool   // nothing works without it
	BPF    bool   // the datapaths native and bpf need it
	For    string
}

// Manager is another program that is set to use the VIP.
type Manager struct {
	Name    string // "keepalived"
	Where   string // what says so
	Running bool
}

// Networkd is what systemd-networkd would do.
type Networkd struct {
	Running      bool
	ForeignRules bool   // it removes routing rules of others
	Takes        string // the .network file by which it would manage clone0; "": none
}

// Silent is a service without a listener.
type Silent struct{ Name, Why string }

// Running reports whether an engine runs here or has left its interface: clone0 is
// there and ours.
func (m Machine) Running() bool { return slices.ContainsFunc(m.Links, Link.ours) }

// Judge decides. It gives one finding for each check at least.
func Judge(m Machine, w Want) []Finding {
	var fs []Finding
	for _, check := range []struct {
		name string
		do   func(Machine, Want) []Finding
		ok   string
	}{
		{"capabilities", capabilities, "all that are needed"},
		{"tun", tun, "/dev/net/tun can be opened"},
		{"nic", theNIC, ""},
		{"nic-free", nicFree, "no other device takes its frames"},
		{"vip-elsewhere", vipElsewhere, "no other interface has the VIP"},
		{"vip-gateway", vipGateway, "the VIP is not this machine's router"},
		{"ipvs", balanced, "IPVS does not have the VIP"},
		{"clone-mac", cloneMAC, "no other interface has the clone MAC " + w.CloneMAC.String()},
		{"clone0", clone0, ""},
		{"table", tableFree, fmt.Sprintf("routing table %d has no routes of others", clone.Table)},
		{"arp", arpSettings, "no setting makes interfaces answer for each other"},
		{"ipv6", ipv6, ""},
		{"managers", managers, "no other program is set to use the VIP"},
		{"networkd", networkd, ""},
		{"services", services, ""},
	} {
		found := check.do(m, w)
		if len(found) == 0 && check.ok != "" {
			found = []Finding{ok("%s", check.ok)}
		}
		for _, f := range found {
			f.Check = check.name
			fs = append(fs, f)
		}
	}
	return fs
}

func ok(format string, args ...any) Finding {
	return Finding{Level: OK, What: fmt.Sprintf(format, args...)}
}

func refuse(err error, fix, format string, args ...any) Finding {
	return Finding{Level: Refused, What: fmt.Sprintf(format, args...), Fix: fix, err: err}
}

func warn(err error, fix, format string, args ...any) Finding {
	return Finding{Level: Warn, What: fmt.Sprintf(format, args...), Fix: fix, err: err}
}

func capabilities(m Machine, w Want) (fs []Finding) {
	for _, c := range m.Missing {
		if c.BPF {
			if w.Datapath == "raw" {
				continue
			}
			c.Needed = w.Datapath != "auto"
		}
		what, fix := fmt.Sprintf("%s is missing, for %s", c.Name, c.For), "run it as root, or by the unit cloned.service, which grants it"
		if c.Needed {
			fs = append(fs, refuse(ErrCapability, fix, "%s", what))
		} else {
			fs = append(fs, warn(ErrCapability, fix, "%s", what))
		}
	}
	return fs
}

func tun(m Machine, w Want) []Finding {
	if m.TUN == nil {
		return nil
	}
	const fix = "modprobe tun; in a container, pass /dev/net/tun in"
	switch w.Datapath {
	case "raw":
		return []Finding{refuse(ErrNoTUN, fix, "no TAP can be made: %v", m.TUN)}
	case "auto":
		return []Finding{warn(ErrNoTUN, fix, "no TAP can be made, should the kernel be too old for another datapath than raw: %v", m.TUN)}
	}
	return nil
}

func theNIC(m Machine, _ Want) []Finding {
	switch {
	case errors.Is(m.NICErr, nic.ErrPort):
		return []Finding{refuse(errors.Join(ErrNIC, m.NICErr), "take it out of that device, or give the cluster another NIC (interface in cluster.yaml)", "%v", m.NICErr)}
	case m.NICErr != nil:
		return []Finding{refuse(errors.Join(ErrNIC, m.NICErr), "name the one to use: interface in cluster.yaml, or --interface", "%v", m.NICErr)}
	case !m.NIC.Up:
		return []Finding{warn(errUnknown, "ip link set "+m.NIC.Name+" up, to have it looked at", "%s is down: whether it has a carrier is seen only when the engine sets it up", m.NIC.Name)}
	case !m.NIC.Carrier:
		return []Finding{warn(errUnknown, "plug in its cable", "%s has no carrier", m.NIC.Name)}
	}
	return []Finding{ok("%s, wire MAC %v, with a carrier", m.NIC.Name, m.NIC.MAC)}
}

func nicFree(m Machine, w Want) (fs []Finding) {
	for _, l := range m.Links {
		if l.Parent != m.NIC.Index || m.NICErr != nil {
			continue
		}
		if (l.Kind == "ipvlan" || l.Kind == "ipvtap") && w.Datapath != "raw" {
			fs = append(fs, refuse(ErrNICTaken, "remove "+l.Name+", or set system.datapath to raw", "%s, an %s, keeps %s from having a macvlan", l.Name, l.Kind, m.NIC.Name))
		}
		if l.Takes {
			fs = append(fs, refuse(ErrNICTaken, "remove "+l.Name+", or give the cluster another NIC", "%s, a macvlan in passthru mode, takes all frames of %s", l.Name, m.NIC.Name))
		}
	}
	return fs
}

func vipElsewhere(m Machine, w Want) (fs []Finding) {
	for _, a := range m.Addresses {
		if !w.has(a.Address.Addr()) || isOurs(m, a.Link) {
			continue
		}
		remove := fmt.Sprintf("ip addr del %v dev %s, and mend what has put it there", a.Address, a.Link)
		switch {
		case a.Dynamic:
			fs = append(fs, refuse(ErrVIPElsewhere, remove+": reserve the VIP in the DHCP server, outside of its range", "the VIP %v is on %s, by DHCP or a router's advertisement", a.Address.Addr(), a.Link))
		case m.NICErr == nil && a.Link == m.NIC.Name:
			fs = append(fs, refuse(ErrVIPElsewhere, remove+": the NIC needs an address of its own, or none", "the VIP %v is %s's own address", a.Address.Addr(), a.Link))
		default:
			fs = append(fs, refuse(ErrVIPElsewhere, remove+" (keepalived, ucarp, a load balancer's set-up of lo, …)", "the VIP %v is on %s", a.Address.Addr(), a.Link))
		}
	}
	return fs
}

func isOurs(m Machine, name string) bool {
	return slices.ContainsFunc(m.Links, func(l Link) bool { return l.Name == name && l.ours() })
}

func vipGateway(m Machine, w Want) (fs []Finding) {
	for _, g := range m.Gateways {
		if w.has(g) {
			fs = append(fs, refuse(ErrVIPIsGateway, "choose another VIP: this address belongs to a router", "the VIP %v is the gateway of this machine's default route", g))
		}
	}
	return fs
}

func balanced(m Machine, w Want) (fs []Finding) {
	for _, a := range m.Balanced {
		if w.has(a) {
			fs = append(fs, refuse(ErrVIPBalanced, fmt.Sprintf("remove the virtual service of %v (ipvsadm -L -n; ipvsadm -D …)", a), "IPVS balances the VIP %v, and would take the connections before this node's services", a))
		}
	}
	return fs
}

func cloneMAC(m Machine, w Want) (fs []Finding) {
	for _, l := range m.Links {
		if l.MAC.String() != w.CloneMAC.String() || l.ours() {
			continue
		}
		fs = append(fs, refuse(ErrCloneMACInUse, "give "+l.Name+" another address, or set vip.clone-mac", "%s has the clone MAC %v, and would teach it to the switch", l.Name, l.MAC))
	}
	return fs
}

func clone0(m Machine, _ Want) (fs []Finding) {
	for _, l := range m.Links {
		switch {
		case l.Name != clone.Device:
		case !l.ours():
			fs = append(fs, refuse(ErrDeviceInUse, "remove it or rename it: ip link set clone0 name …", "an interface %s (%s) is there that clonecluster has not made", clone.Device, l.Kind))
		case l.Managed != "":
			fs = append(fs, warn(ErrManaged, "have it leave clone0 alone: the package's files for NetworkManager and systemd-networkd do that, from their next start", "%s manages %s", l.Managed, clone.Device))
		default:
			fs = append(fs, ok("%s is there, of an engine that runs or that another will go on from", clone.Device))
		}
	}
	if len(fs) == 0 {
		fs = append(fs, ok("the name %s is free", clone.Device))
	}
	return fs
}

func tableFree(m Machine, _ Want) (fs []Finding) {
	if len(m.TableRoutes) > 0 {
		fs = append(fs, refuse(ErrTableInUse, fmt.Sprintf("move them to a table of another number: ip route show table %d", clone.Table), "routing table %d has routes of others, such as %s", clone.Table, m.TableRoutes[0]))
	}
	return fs
}

// arpFit are the values of arp_ignore with which an interface does not answer for an
// address of another.
func arpFit(value string) bool { return value == "1" || value == "2" || value == "8" }

func arpSettings(m Machine, _ Want) (fs []Finding) {
	const fix = "sysctl -w net.ipv4.conf.%s.arp_ignore=1, and mend where it is set"
	for _, name := range sorted(m.ARPIgnore) {
		value := m.ARPIgnore[name]
		switch {
		case arpFit(value) || value == "0" || name == m.NIC.Name || isOurs(m, name):
		case name == "all":
			fs = append(fs, refuse(ErrARPSetting, fmt.Sprintf(fix, name), "net.ipv4.conf.all.arp_ignore=%s lets every interface answer for the VIP with its own address", value))
		default:
			fs = append(fs, warn(ErrARPSetting, fmt.Sprintf(fix, name)+", if it is on the cluster's segment", "net.ipv4.conf.%s.arp_ignore=%s lets %s answer for the VIP with its own address", name, value, name))
		}
	}
	return fs
}

func ipv6(m Machine, w Want) []Finding {
	switch {
	case !w.VIP6.IsValid():
		return nil
	case !m.IPv6:
		return []Finding{refuse(ErrNoIPv6, "boot without ipv6.disable=1, or leave vip.ipv6 out on all nodes", "the VIP %v is an IPv6 address, and this kernel has no IPv6", w.VIP6)}
	}
	return []Finding{ok("the kernel has IPv6")}
}

func managers(m Machine, _ Want) (fs []Finding) {
	for _, p := range m.Managers {
		fix := "take the VIP out of " + p.Where
		if p.Running {
			fs = append(fs, refuse(ErrManaged, fix+", and have "+p.Name+" read it again", "%s runs and is set to use the VIP (%s)", p.Name, p.Where))
		} else {
			fs = append(fs, warn(ErrManaged, fix, "%s does not run, but is set to use the VIP (%s)", p.Name, p.Where))
		}
	}
	return fs
}

func networkd(m Machine, _ Want) (fs []Finding) {
	n := m.Networkd
	if !n.Running {
		return nil
	}
	if n.ForeignRules {
		fs = append(fs, refuse(ErrForeignRules,
			"write \"[Network]\", \"ManageForeignRoutingPolicyRules=no\" and \"ManageForeignRoutes=no\" into /etc/systemd/networkd.conf.d/clonecluster.conf (the package brings that) and restart systemd-networkd",
			"systemd-networkd removes the VIP's routing rules whenever it starts"))
	}
	if n.Takes != "" {
		fs = append(fs, refuse(ErrManaged,
			"write \"[Match]\", \"Name=clone0\", \"[Link]\", \"Unmanaged=yes\" into /etc/systemd/network/00-clone0.network, or narrow that file",
			"systemd-networkd would manage clone0 by %s, and take the VIP off it", n.Takes))
	}
	if len(fs) == 0 {
		fs = append(fs, ok("systemd-networkd leaves clone0 and the VIP's rules alone"))
	}
	return fs
}

func services(m Machine, w Want) (fs []Finding) {
	for _, s := range m.Silent {
		fs = append(fs, warn(errServiceNotHeard, "start it, and have it listen at 0.0.0.0 and [::], or at the VIP", "service %s: %s", s.Name, s.Why))
	}
	if len(fs) == 0 && len(w.Services) > 0 {
		fs = append(fs, ok("all services listen"))
	}
	return fs
}

// JudgeClaims decides about what Probe has heard from a machine. One that runs an
// engine itself may own the bucket of its own question: then no other node answers.
func JudgeClaims(claims []Claim, w Want, running bool) (fs []Finding) {
	ours := false
	for _, c := range claims {
		if c.MAC.String() == w.CloneMAC.String() {
			ours = true
			continue
		}
		fs = append(fs, refuse(ErrVIPInUse, "take the VIP from that host, or choose another one; a router that answers for it has proxy ARP on",
			"the VIP %v is in use on the segment by %v, which is not the clone MAC %v", c.VIP, c.MAC, w.CloneMAC))
	}
	switch {
	case len(fs) > 0:
	case ours:
		fs = append(fs, ok("nodes of the cluster answer for the VIP, and nobody else"))
	case running:
		fs = append(fs, ok("nobody on the segment but this node answers for the VIP"))
	default:
		fs = append(fs, ok("nobody on the segment has the VIP yet"))
	}
	for i := range fs {
		fs[i].Check = "segment"
	}
	return fs
}

func sorted(m map[string]string) (keys []string) {
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}
