// Package clone sets a machine up for the VIP and takes it back: the interface
// clone0 with the clone MAC, the VIP on it, the routes of what the VIP sends, and the
// settings that keep the NIC from speaking for the VIP. What moves the frames
// between clone0 and the wire are the datapaths.
//
// Sources: ip-sysctl.rst, ip-rule(8), the kernel's linux/if_link.h.
package clone

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"clonecluster/netcore/nic"
)

// Table is the routing table of what the VIP sends, and the preference of the
// rules that lead to it. Protocol marks those rules and routes as ours.
const (
	Table    = 3264
	Protocol = 0xcc
)

// Device is the name of the interface.
const Device = "clone0"

// Group is the device group of a clone0 that outlives its engine. Unlike the alias a group
// can be given when the device is made, so it tells whose a clone0 is whose engine was
// killed before it could write the alias.
const Group = Protocol

// Ours reports whether an interface with the name Device was made by an engine.
func Ours(alias string, group uint32) bool {
	return strings.HasPrefix(alias, hostNote) || group == Group
}

// Kind is what clone0 is, in the kernel's words.
type Kind string

// The kinds.
const (
	TAP     Kind = "tuntap"  // the engine moves the frames
	Macvlan Kind = "macvlan" // the kernel does
)

// Config says what to set up.
type Config struct {
	NIC      nic.NIC
	Kind     Kind
	CloneMAC [6]byte
	// VIP4 and VIP6 are the VIP with its subnet; at least one is valid.
	VIP4, VIP6         netip.Prefix
	Gateway4, Gateway6 netip.Addr // may be invalid: only the subnet is reached
	Logger             *slog.Logger
}

// Host is what is set on the machine. Each step can be repeated, so that an engine
// that comes after a crash brings the machine to the same state from wherever the
// other left it.
type Host struct {
	cfg   Config
	log   *slog.Logger
	lock  int    // the socket whose name says that an engine is here
	index int    // of clone0
	alias string // of clone0
	mld   *os.File
}

// ErrBusy is matched by the error of Claim when another engine has clone0.
var ErrBusy = errors.New("in use by another engine")

// ErrMACInUse is matched by the error of Claim when another interface of this machine
// has the clone MAC, and would send with it.
var ErrMACInUse = errors.New("another interface has the clone MAC")

// hostNote is what clone0's alias says. It is kept with the device, so it lives
// exactly as long as what it describes: the marks of a crashed engine can be
// taken back by the next one, and another's TAP of the same name is not touched.
const hostNote = "clonecluster"

// noteWas precedes the former values of nicSettings, in that order. The whole
// has to fit into 255 bytes (IFALIASZ).
const noteWas = " was="

// ErrARPSetting is matched by the error of SetUp when a setting of the machine
// would make it answer ARP for the VIP with another address than the clone MAC.
var ErrARPSetting = errors.New("unfit ARP setting")

// nicSettings are what the machine needs while the VIP is on clone0. No other
// interface may answer ARP for the VIP, nor ask with it (ip-sysctl.rst). A second
// NIC on the segment would answer with its own address (I2), so they are set for
// "all", of which the kernel takes the maximum with the interface's own value,
// and for the NIC itself, in case that maximum is one that does not do.
var nicSettings = []nicSetting{
	{all, "ipv4", "arp_ignore", "1", arpIgnoreDo},
	{all, "ipv4", "arp_announce", "2", nil},
	{"", "ipv4", "arp_ignore", "1", arpIgnoreDo},
	{"", "ipv4", "arp_announce", "2", nil},
	// Every kernel would take a packet for the VIP in a broadcast frame past the
	// filter, and answer it.
	{"", "ipv4", "drop_unicast_in_l2_multicast", "1", nil},
	{"", "ipv6", "drop_unicast_in_l2_multicast", "1", nil},
}

type nicSetting struct {
	device            string // empty: the NIC
	family, key, want string
	keep              []string // values that do as well
}

const all = "all"

// arpIgnoreDo are the values of arp_ignore with which an interface does not
// answer for an address of another. 3 does: it only spares addresses of scope
// host.
var arpIgnoreDo = []string{"1", "2", "8"}

// cloneSettings leave nothing to detect, autoconfigure or announce. Who answers for the
// VIP is the engine, or on a macvlan the kernel, when the filter lets it hear who asks.
func cloneSettings(kind Kind, v6 bool) [][3]string {
	ignore := "8"
	if kind == Macvlan {
		ignore = "1"
	}
	s := [][3]string{
		{"ipv4", "arp_ignore", ignore},
		{"ipv4", "arp_announce", "2"},
		{"ipv4", "arp_notify", "0"},
	}
	if kind == TAP {
		s = append(s, [3]string{"ipv4", "rp_filter", "2"})
	} else {
		// It hears every broadcast frame that the NIC does, past the filter. The reverse path
		// of what is for the VIP is clone0, that of a broadcast is not: so a service that
		// listens for broadcasts has them once, from the NIC.
		s = append(s, [3]string{"ipv4", "rp_filter", "1"},
			[3]string{"ipv4", "drop_unicast_in_l2_multicast", "1"}, [3]string{"ipv6", "drop_unicast_in_l2_multicast", "1"})
	}
	if !v6 {
		return append(s, [3]string{"ipv6", "disable_ipv6", "1"})
	}
	return append(s,
		[3]string{"ipv6", "disable_ipv6", "0"},
		// No link-local address: it would be the same on every node.
		[3]string{"ipv6", "addr_gen_mode", "1"},
		[3]string{"ipv6", "accept_dad", "0"},
		[3]string{"ipv6", "dad_transmits", "0"},
		[3]string{"ipv6", "accept_ra", "0"},
		[3]string{"ipv6", "autoconf", "0"},
		[3]string{"ipv6", "ndisc_notify", "0"},
	)
}

// Claim makes this process the one that has clone0 in its network namespace, until
// Close or Abandon. A clone0 that a former engine left is kept if it fits (left), and
// removed otherwise, with the NIC that it used restored; any other is an error.
func Claim(cfg Config) (h *Host, left bool, err error) {
	h = &Host{cfg: cfg, log: cfg.Logger, lock: -1}
	if name, err := macElsewhere(cfg.CloneMAC); err != nil {
		return nil, false, err
	} else if name != "" || [6]byte(cfg.NIC.MAC) == cfg.CloneMAC {
		return nil, false, fmt.Errorf("%w: %s has %v; give it another, or the cluster another clone MAC", ErrMACInUse, cmp.Or(name, cfg.NIC.Name), net.HardwareAddr(cfg.CloneMAC[:]))
	}
	link, err := netlink.LinkByName(Device)
	if errors.As(err, &netlink.LinkNotFoundError{}) {
		link = nil
	} else if err != nil {
		return nil, false, fmt.Errorf("looking for %s: %w", Device, err)
	}
	alias := ""
	if link != nil {
		if alias = link.Attrs().Alias; !Ours(alias, link.Attrs().Group) {
			return nil, false, fmt.Errorf("interface %s (%s) exists and was not made by clonecluster: remove it or give it another name", Device, link.Type())
		}
	}
	note, _, _ := strings.Cut(alias, noteWas)
	if err := h.acquire(); errors.Is(err, ErrBusy) {
		return nil, false, fmt.Errorf("%s: %w; a machine is one node of one cluster: stop that one first (it has %s)", Device, err, strings.TrimPrefix(note, hostNote+" "))
	} else if err != nil {
		return nil, false, err
	}
	if link == nil || note == h.note() && link.Type() == string(cfg.Kind) {
		return h, link != nil, nil
	}
	h.log.Info("replacing an interface left with another configuration", "interface", Device, "kind", link.Type(), "left", alias)
	if err = netlink.LinkDel(link); err != nil {
		err = fmt.Errorf("removing %s: %w", Device, err)
	} else {
		err = h.release(alias)
	}
	if err != nil {
		h.Abandon()
		return nil, false, err
	}
	return h, false, nil
}

// acquire binds an abstract socket, which belongs to the network namespace and ends
// with the process.
func (h *Host) acquire() (err error) {
	if h.lock, err = unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0); err != nil {
		return os.NewSyscallError("socket", err)
	}
	err = unix.Bind(h.lock, &unix.SockaddrUnix{Name: "@clonecluster/" + Device})
	if errors.Is(err, unix.EADDRINUSE) {
		err = ErrBusy
	}
	if err != nil {
		h.Abandon()
	}
	return err
}

// SetUp does its steps in the order in which nothing can go wrong: the NIC is kept
// from speaking for the VIP, then the VIP's way out is laid, and only then clone0,
// which exists by now, comes up and the VIP with it. Ready, if set, is the last step
// before that.
func (h *Host) SetUp(ready func(clone netlink.Link) error) error {
	link, err := netlink.LinkByName(Device)
	if err != nil {
		return fmt.Errorf("looking for %s: %w", Device, err)
	}
	h.index = link.Attrs().Index
	err = h.guardNIC(link)
	h.alias = link.Attrs().Alias
	if err != nil {
		return err
	}
	if err := h.prepareClone(link); err != nil {
		return err
	}
	if err := h.divert(); err != nil {
		return err
	}
	if ready != nil {
		if err := ready(link); err != nil {
			return err
		}
	}
	if err := netlink.LinkSetUp(link); err != nil {
		return fmt.Errorf("setting %s up: %w", Device, err)
	}
	if err := h.address(link); err != nil {
		return err
	}
	if h.cfg.VIP6.IsValid() {
		if h.mld, err = joinSolicitedNode(h.cfg.NIC.Index, h.cfg.VIP6.Addr()); err != nil {
			h.log.Info("no listener reports for the VIP from the NIC itself", "error", err)
		}
	}
	return nil
}

// Index is clone0's, after SetUp.
func (h *Host) Index() int { return h.index }

// Close takes everything back but clone0, which the caller has removed, and its routes
// with it. It goes on after an error and gives all.
func (h *Host) Close() error {
	defer h.Abandon()
	return h.release(h.alias)
}

// Abandon leaves everything to the next Claim.
func (h *Host) Abandon() {
	if h.lock >= 0 {
		_ = unix.Close(h.lock)
		h.lock = -1
	}
	if h.mld != nil {
		_ = h.mld.Close()
		h.mld = nil
	}
}

// note names what clone0 is configured for.
func (h *Host) note() string {
	c := h.cfg
	return fmt.Sprintf("%s nic=%s mac=%v v4=%v,%v v6=%v,%v", hostNote, c.NIC.Name, net.HardwareAddr(c.CloneMAC[:]), c.VIP4, c.Gateway4, c.VIP6, c.Gateway6)
}

// guardNIC sets the machine's ARP behaviour and writes the former values to
// clone0's alias first.
func (h *Host) guardNIC(clone netlink.Link) error {
	if err := h.checkARP(); err != nil {
		return err
	}
	if clone.Attrs().Alias == "" {
		var was []string
		for _, s := range nicSettings {
			value, err := s.of(h.cfg.NIC.Name).Get()
			if err != nil && !s.missing(err) {
				return err
			}
			was = append(was, value)
		}
		alias := h.note() + noteWas + strings.Join(was, ",")
		if err := netlink.LinkSetAlias(clone, alias); err != nil {
			return fmt.Errorf("setting the alias of %s: %w", Device, err)
		}
		clone.Attrs().Alias = alias
	}
	for _, s := range nicSettings {
		ctl := s.of(h.cfg.NIC.Name)
		value, err := ctl.Get()
		if s.missing(err) || err == nil && slices.Contains(s.keep, value) {
			continue
		}
		if err != nil {
			return err
		}
		if err := ctl.Set(s.want); err != nil {
			return err
		}
	}
	return nil
}

// checkARP refuses what the settings cannot mend: lowering an administrator's
// value for all interfaces would change what the others do. Of a value that an
// interface other than the NIC has of its own it only warns, as that one may be
// on another segment.
func (h *Host) checkARP() error {
	ctl := nic.Sysctl{Family: "ipv4", Interface: all, Key: "arp_ignore"}
	value, err := ctl.Get()
	if err != nil {
		return err
	}
	if value != "0" && !slices.Contains(arpIgnoreDo, value) {
		return fmt.Errorf("%w: %v=%s lets every interface answer for the VIP with its own address; set it to 0, 1, 2 or 8", ErrARPSetting, ctl, value)
	}
	nics, err := nic.List()
	if err != nil {
		return err
	}
	for _, n := range nics {
		if n.Name == Device || n.Name == h.cfg.NIC.Name {
			continue
		}
		ctl := nic.Sysctl{Family: "ipv4", Interface: n.Name, Key: "arp_ignore"}
		value, err := ctl.Get()
		if err == nil && value != "0" && !slices.Contains(arpIgnoreDo, value) {
			h.log.Warn("this interface answers ARP for the VIP with its own address: set it to 0, 1, 2 or 8 if it is on the cluster's segment", "setting", ctl.String(), "value", value)
		}
	}
	return nil
}

// restoreNIC undoes guardNIC from the alias.
func (h *Host) restoreNIC(alias string) error {
	note, was, _ := strings.Cut(alias, noteWas)
	var name string
	for _, field := range strings.Fields(note) {
		if v, ok := strings.CutPrefix(field, "nic="); ok {
			name = v
		}
	}
	var errs []error
	for i, value := range strings.Split(was, ",") {
		if value == "" || i >= len(nicSettings) {
			continue
		}
		if err := nicSettings[i].of(name).Set(value); err != nil && !errors.Is(err, os.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// missing reports whether err says that the machine has no IPv6.
func (s nicSetting) missing(err error) bool {
	return s.family == "ipv6" && errors.Is(err, os.ErrNotExist)
}

// of is the setting on a machine with that NIC.
func (s nicSetting) of(nicName string) nic.Sysctl {
	return nic.Sysctl{Family: s.family, Interface: cmp.Or(s.device, nicName), Key: s.key}
}

// prepareClone gives clone0, which is still down, its address and settings.
func (h *Host) prepareClone(clone netlink.Link) error {
	if a := clone.Attrs(); a.HardwareAddr.String() != net.HardwareAddr(h.cfg.CloneMAC[:]).String() {
		if err := netlink.LinkSetHardwareAddr(clone, h.cfg.CloneMAC[:]); err != nil {
			return fmt.Errorf("setting the address of %s: %w", Device, err)
		}
	}
	if err := netlink.LinkSetMTU(clone, h.cfg.NIC.MTU); err != nil {
		return fmt.Errorf("setting the MTU of %s to %d: %w", Device, h.cfg.NIC.MTU, err)
	}
	for _, s := range cloneSettings(h.cfg.Kind, h.cfg.VIP6.IsValid()) {
		err := nic.Sysctl{Family: s[0], Interface: Device, Key: s[1]}.Set(s[2])
		if errors.Is(err, os.ErrNotExist) && s[0] == "ipv6" && !h.cfg.VIP6.IsValid() {
			continue // a kernel without IPv6
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// family is what differs between the two VIPs.
type family struct {
	netlink int
	vip     netip.Prefix
	gateway netip.Addr
}

func (h *Host) families() []family {
	var fs []family
	if h.cfg.VIP4.IsValid() {
		fs = append(fs, family{unix.AF_INET, h.cfg.VIP4, h.cfg.Gateway4})
	}
	if h.cfg.VIP6.IsValid() {
		fs = append(fs, family{unix.AF_INET6, h.cfg.VIP6, h.cfg.Gateway6})
	}
	return fs
}

// hostPrefix is the VIP alone, without its subnet: the NIC may have an address
// in the same subnet, and the machine's own traffic is to go by the NIC. (With
// the subnet, the kernel would also put its broadcast address on clone0.)
func (f family) hostPrefix() netip.Prefix {
	return netip.PrefixFrom(f.vip.Addr(), f.vip.Addr().BitLen())
}

// divert leads what the VIP sends to a table of its own, which ends in
// "unreachable": without clone0 nothing of the VIP may leave by another way.
func (h *Host) divert() error {
	if err := h.dropRules(); err != nil {
		return err
	}
	for _, f := range h.families() {
		if err := netlink.RouteReplace(fallback(f.netlink)); err != nil {
			return fmt.Errorf("adding the fallback route of table %d: %w", Table, err)
		}
		for _, r := range h.rules(f) {
			if err := netlink.RuleAdd(r); err != nil && !errors.Is(err, unix.EEXIST) {
				return fmt.Errorf("adding %v: %w", r, err)
			}
		}
	}
	return nil
}

func (h *Host) rules(f family) []*netlink.Rule {
	fromVIP, byDevice := netlink.NewRule(), netlink.NewRule()
	for _, r := range []*netlink.Rule{fromVIP, byDevice} {
		r.Family, r.Table, r.Priority, r.Protocol = f.netlink, Table, Table, Protocol
	}
	fromVIP.Src = ipNet(f.hostPrefix())
	byDevice.OifName = Device // for sockets bound to clone0
	return []*netlink.Rule{fromVIP, byDevice}
}

func fallback(fam int) *netlink.Route {
	return &netlink.Route{
		Family: fam, Dst: everywhere(fam), Table: Table, Protocol: Protocol,
		Type: unix.RTN_UNREACHABLE, Priority: 1 << 30,
	}
}

func everywhere(fam int) *net.IPNet {
	if fam == unix.AF_INET6 {
		return ipNet(netip.PrefixFrom(netip.IPv6Unspecified(), 0))
	}
	return ipNet(netip.PrefixFrom(netip.IPv4Unspecified(), 0))
}

// dropRules removes our rules that the configuration does not ask for (any
// more), so that a former VIP leaves nothing behind.
func (h *Host) dropRules() error {
	wanted := map[string]bool{}
	for _, f := range h.families() {
		for _, r := range h.rules(f) {
			wanted[ruleID(r)] = true
		}
	}
	return eachRule(func(r *netlink.Rule) error {
		if wanted[ruleID(r)] {
			return nil
		}
		return netlink.RuleDel(r)
	})
}

func ruleID(r *netlink.Rule) string { return fmt.Sprint(r.Family, r.Src, r.OifName) }

// eachRule calls do with every rule that leads to our table.
func eachRule(do func(*netlink.Rule) error) error {
	for _, fam := range []int{unix.AF_INET, unix.AF_INET6} {
		rules, err := netlink.RuleListFiltered(fam, &netlink.Rule{Table: Table}, netlink.RT_FILTER_TABLE)
		if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EAFNOSUPPORT) {
			continue // no IPv6
		}
		if err != nil {
			return fmt.Errorf("listing routing rules: %w", err)
		}
		for i := range rules {
			rules[i].Family = fam
			if err := do(&rules[i]); err != nil && !errors.Is(err, unix.ENOENT) {
				return fmt.Errorf("removing %v: %w", rules[i], err)
			}
		}
	}
	return nil
}

// address puts the VIP on clone0, which is up, and its routes into the table.
func (h *Host) address(clone netlink.Link) error {
	for _, f := range h.families() {
		addr := &netlink.Addr{
			IPNet: ipNet(f.hostPrefix()),
			// DAD would hear the other nodes and take the address down (I8).
			Flags:     unix.IFA_F_NODAD | unix.IFA_F_NOPREFIXROUTE,
			Broadcast: net.IPv4zero,
		}
		if err := netlink.AddrReplace(clone, addr); err != nil {
			return fmt.Errorf("adding %v to %s: %w", f.hostPrefix(), Device, err)
		}
		for _, r := range f.routes(clone.Attrs().Index) {
			if err := netlink.RouteReplace(r); err != nil {
				return fmt.Errorf("adding route %v: %w", r, err)
			}
		}
	}
	return nil
}

func (f family) routes(ifindex int) []*netlink.Route {
	src := f.vip.Addr().AsSlice()
	subnet := &netlink.Route{
		Family: f.netlink, LinkIndex: ifindex, Table: Table, Protocol: Protocol,
		Dst: ipNet(f.vip.Masked()), Src: src, Scope: netlink.SCOPE_LINK,
	}
	if !f.gateway.IsValid() {
		return []*netlink.Route{subnet}
	}
	def := &netlink.Route{
		Family: f.netlink, LinkIndex: ifindex, Table: Table, Protocol: Protocol,
		Dst: everywhere(f.netlink), Gw: f.gateway.AsSlice(), Src: src, Priority: 1,
	}
	if !f.vip.Contains(f.gateway) {
		def.SetFlag(netlink.FLAG_ONLINK)
	}
	return []*netlink.Route{subnet, def}
}

// release undoes guardNIC, whose marks alias has, and divert.
func (h *Host) release(alias string) error {
	var errs []error
	for _, fam := range []int{unix.AF_INET, unix.AF_INET6} {
		err := netlink.RouteDel(fallback(fam))
		if err != nil && !errors.Is(err, unix.ESRCH) && !errors.Is(err, unix.EAFNOSUPPORT) && !errors.Is(err, unix.EOPNOTSUPP) {
			errs = append(errs, fmt.Errorf("removing the fallback route of table %d: %w", Table, err))
		}
	}
	errs = append(errs, eachRule(netlink.RuleDel), h.restoreNIC(alias))
	return errors.Join(errs...)
}

// macElsewhere gives the name of another interface that has the clone MAC, which the
// kernel would send with (I1); empty: none.
func macElsewhere(mac [6]byte) (string, error) {
	nics, err := nic.List()
	if err != nil {
		return "", err
	}
	for _, n := range nics {
		if n.Name != Device && len(n.MAC) == 6 && [6]byte(n.MAC) == mac {
			return n.Name, nil
		}
	}
	return "", nil
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

// joinSolicitedNode makes the NIC a member of the VIP's solicited-node group,
// so that its stack sends the listener reports by which a snooping switch
// forwards neighbour solicitations (RFC 4541, RFC 3810); clone0's own reports
// have no source address, which some switches ignore. The membership ends with
// the socket. Without IPv6 on the NIC there is none.
func joinSolicitedNode(ifindex int, vip6 netip.Addr) (*os.File, error) {
	fd, err := unix.Socket(unix.AF_INET6, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, os.NewSyscallError("socket", err)
	}
	a := vip6.As16()
	mreq := &unix.IPv6Mreq{Interface: uint32(ifindex), Multiaddr: [16]byte{0xff, 2, 11: 1, 12: 0xff, 13: a[13], 14: a[14], 15: a[15]}}
	if err := unix.SetsockoptIPv6Mreq(fd, unix.IPPROTO_IPV6, unix.IPV6_JOIN_GROUP, mreq); err != nil {
		_ = unix.Close(fd)
		return nil, os.NewSyscallError("IPV6_JOIN_GROUP", err)
	}
	return os.NewFile(uintptr(fd), "mld"), nil
}

// Events is what Follow tells.
type Events struct {
	WireMAC func(net.HardwareAddr) error // the NIC's address has changed; an error ends Follow
	Carrier func(bool)                   // the NIC has got or lost its carrier; may be nil
}

// Follow keeps to the NIC, its address, its MTU, its carrier and its existence, and
// keeps clone0 as SetUp made it, until ctx ends (nil), an interface is gone
// (nic.ErrRemoved) or the NIC is given the clone MAC (ErrMACInUse).
func (h *Host) Follow(ctx context.Context, tell Events) error {
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return h.followNIC(ctx, tell) })
	g.Go(func() error { return h.followClone(ctx) })
	return g.Wait()
}

func (h *Host) followNIC(ctx context.Context, tell Events) error {
	last := h.cfg.NIC
	var fatal error
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	err := nic.Follow(ctx, h.cfg.NIC.Index, func(n nic.NIC) {
		if n.MAC.String() != last.MAC.String() {
			h.log.Warn("the NIC's address changed", "nic", n.Name, "from", last.MAC, "to", n.MAC)
			if len(n.MAC) != 6 || [6]byte(n.MAC) == h.cfg.CloneMAC {
				fatal = fmt.Errorf("%w: %s has %v", ErrMACInUse, n.Name, n.MAC)
			} else {
				fatal = tell.WireMAC(n.MAC)
			}
			if fatal != nil {
				stop()
				return
			}
		}
		if n.MTU != last.MTU {
			h.log.Warn("the NIC's MTU changed", "nic", n.Name, "from", last.MTU, "to", n.MTU)
			if err := netlink.LinkSetMTU(h.link(), n.MTU); err != nil {
				h.log.Error("the MTU of clone0 cannot follow", "error", err)
			}
		}
		if n.Carrier != last.Carrier {
			h.log.Warn("link", "nic", n.Name, "carrier", n.Carrier, "up", n.Up)
			if tell.Carrier != nil {
				tell.Carrier(n.Carrier)
			}
		}
		last = n
	})
	if fatal != nil {
		return fatal
	}
	if err != nil {
		return fmt.Errorf("following %s: %w", h.cfg.NIC.Name, err)
	}
	return nil
}

func (h *Host) link() netlink.Link {
	return &netlink.Device{LinkAttrs: netlink.LinkAttrs{Index: h.index, Name: Device}}
}

// followClone: set down by someone, clone0 would lose the VIP's IPv6 address and
// routes, and the node would own buckets that it cannot serve.
func (h *Host) followClone(ctx context.Context) error {
	var failed error
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	err := nic.Follow(ctx, h.index, func(n nic.NIC) {
		if n.Up {
			return
		}
		h.log.Error("clone0 was set down by someone; setting it up again")
		failed = netlink.LinkSetUp(h.link())
		if failed == nil {
			failed = h.address(h.link())
		}
		if failed != nil {
			stop()
		}
	})
	if err = errors.Join(failed, err); err != nil {
		return fmt.Errorf("following %s: %w", Device, err)
	}
	return nil
}
