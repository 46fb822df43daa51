package hostcheck

import (
	"bufio"
	"bytes"
	"encoding/hex"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"clonecluster/netcore/clone"
	"clonecluster/netcore/health/probe"
	"clonecluster/netcore/nic"
)

// Look reads the machine and changes nothing. find gives the network interface that
// the node would use.
func Look(find func() (nic.NIC, error), w Want) (m Machine, err error) {
	m.NIC, m.NICErr = find()
	if m.Links, err = links(); err != nil {
		return m, err
	}
	if m.Addresses, err = addresses(m.Links); err != nil {
		return m, err
	}
	if err := m.lookAtRoutes(); err != nil {
		return m, err
	}
	m.Missing = missing()
	m.TUN = openTUN()
	_, err = os.Stat("/proc/sys/net/ipv6/conf/all")
	m.IPv6 = err == nil
	m.ARPIgnore = arpIgnore(m.Links)
	m.Balanced = balancedBy("/proc/net/ip_vs")
	running := programs("/proc")
	m.Managers = findManagers("/", running, w)
	m.Networkd = findNetworkd("/", len(running["systemd-network"]) > 0)
	for i, l := range m.Links {
		if l.Name == clone.Device {
			m.Links[i].Managed = managedBy("/run", l.Index)
		}
	}
	for _, s := range w.Services {
		var ports []probe.PortRange
		for _, p := range s.Ports {
			if p.Protocol == "tcp" {
				ports = append(ports, probe.PortRange{Lo: p.First, Hi: p.Last})
			}
		}
		if len(ports) == 0 {
			continue
		}
		if err := probe.Listen(ports, w.vips()); err != nil {
			m.Silent = append(m.Silent, Silent{s.Name, err.Error()})
		}
	}
	return m, nil
}

func links() (all []Link, err error) {
	ls, err := netlink.LinkList()
	if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
		return nil, fmt.Errorf("listing network interfaces: %w", err)
	}
	for _, l := range ls {
		a := l.Attrs()
		link := Link{Index: a.Index, Name: a.Name, Kind: l.Type(), MAC: a.HardwareAddr, Alias: a.Alias, Group: a.Group, Parent: a.ParentIndex}
		if v, ok := l.(*netlink.Macvlan); ok && v.Mode == netlink.MACVLAN_MODE_PASSTHRU {
			link.Takes = true
		}
		all = append(all, link)
	}
	return all, nil
}

func addresses(links []Link) (all []Address, err error) {
	as, err := netlink.AddrList(nil, netlink.FAMILY_ALL)
	if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
		return nil, fmt.Errorf("listing addresses: %w", err)
	}
	for _, a := range as {
		ip, ok := netip.AddrFromSlice(a.IP)
		i := slices.IndexFunc(links, func(l Link) bool { return l.Index == a.LinkIndex })
		if !ok || i < 0 {
			continue
		}
		bits, _ := a.Mask.Size()
		all = append(all, Address{Link: links[i].Name, Address: netip.PrefixFrom(ip.Unmap(), bits), Dynamic: a.Flags&unix.IFA_F_PERMANENT == 0})
	}
	return all, nil
}

func (m *Machine) lookAtRoutes() error {
	for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
		rs, err := netlink.RouteListFiltered(family, &netlink.Route{Table: unix.RT_TABLE_UNSPEC}, netlink.RT_FILTER_TABLE)
		if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EAFNOSUPPORT) {
			continue // no IPv6
		}
		if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
			return fmt.Errorf("listing routes: %w", err)
		}
		for _, r := range rs {
			if r.Table == clone.Table && r.Protocol != clone.Protocol {
				m.TableRoutes = append(m.TableRoutes, r.String())
			}
			gw, ok := netip.AddrFromSlice(r.Gw)
			if ok && (r.Dst == nil || isDefault(r.Dst.String())) {
				m.Gateways = append(m.Gateways, gw.Unmap())
			}
		}
	}
	return nil
}

func isDefault(dst string) bool { return dst == "0.0.0.0/0" || dst == "::/0" }

// needs are the capabilities of the engine.
var needs = []struct {
	bit int
	Missing
}{
	{unix.CAP_NET_ADMIN, Missing{Name: "CAP_NET_ADMIN", Needed: true, For: "interfaces, routes and settings"}},
	{unix.CAP_NET_RAW, Missing{Name: "CAP_NET_RAW", Needed: true, For: "the frames of the segment"}},
	{unix.CAP_BPF, Missing{Name: "CAP_BPF", BPF: true, For: "the datapath in the kernel"}},
	{unix.CAP_PERFMON, Missing{Name: "CAP_PERFMON", BPF: true, For: "the datapath in the kernel"}},
	{unix.CAP_SYS_NICE, Missing{Name: "CAP_SYS_NICE", Needed: false, For: "beacons that go out in time on a busy machine"}},
	{unix.CAP_IPC_LOCK, Missing{Name: "CAP_IPC_LOCK", Needed: false, For: "memory that stays when the machine runs short"}},
}

func missing() (all []Missing) {
	var header = unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&header, &data[0]); err != nil {
		return nil // whatever is missing will say so itself
	}
	for _, n := range needs {
		if data[n.bit/32].Effective&(1<<(n.bit%32)) != 0 || n.BPF && data[unix.CAP_SYS_ADMIN/32].Effective&(1<<unix.CAP_SYS_ADMIN) != 0 {
			continue
		}
		var limit unix.Rlimit
		if n.bit == unix.CAP_IPC_LOCK && unix.Getrlimit(unix.RLIMIT_MEMLOCK, &limit) == nil && limit.Cur == unix.RLIM_INFINITY {
			continue
		}
		all = append(all, n.Missing)
	}
	return all
}

func openTUN() error {
	f, err := os.OpenFile("/dev/net/tun", os.O_RDWR, 0)
	if err == nil {
		f.Close()
	}
	return err
}

func arpIgnore(links []Link) map[string]string {
	values := map[string]string{}
	for _, l := range append(links, Link{Name: "all"}) {
		if v, err := (nic.Sysctl{Family: "ipv4", Interface: l.Name, Key: "arp_ignore"}).Get(); err == nil {
			values[l.Name] = v
		}
	}
	return values
}

// balancedBy reads the addresses of IPVS's virtual services, in the format of
// ip_vs_ctl.c: "TCP  0A4D000A:0050 rr" and "TCP  [fd77:…]:0050 rr".
func balancedBy(file string) (all []netip.Addr) {
	data, err := os.ReadFile(file)
	if err != nil {
		return nil // no IPVS
	}
	for line := range strings.Lines(string(data)) {
		f := strings.Fields(line)
		if len(f) < 2 || f[0] != "TCP" && f[0] != "UDP" && f[0] != "SCTP" {
			continue
		}
		i := strings.LastIndexByte(f[1], ':')
		if i < 0 {
			continue
		}
		host := strings.Trim(f[1][:i], "[]")
		if b, err := hex.DecodeString(host); err == nil && len(b) == 4 {
			all = append(all, netip.AddrFrom4([4]byte(b)))
		} else if a, err := netip.ParseAddr(host); err == nil {
			all = append(all, a)
		}
	}
	return all
}

// programs gives the command lines of the running programs, by the kernel's short
// name of each (15 bytes).
func programs(proc string) map[string][]string {
	running := map[string][]string{}
	entries, err := os.ReadDir(proc)
	if err != nil {
		return running
	}
	for _, e := range entries {
		if _, err := strconv.Atoi(e.Name()); err != nil {
			continue
		}
		comm, err := os.ReadFile(filepath.Join(proc, e.Name(), "comm"))
		if err != nil {
			continue
		}
		cmdline, _ := os.ReadFile(filepath.Join(proc, e.Name(), "cmdline"))
		name := strings.TrimSpace(string(comm))
		running[name] = append(running[name], string(bytes.ReplaceAll(cmdline, []byte{0}, []byte{' '})))
	}
	return running
}

// anyLine fits the files in which an address is named for no other purpose.
var (
	anyLine     = regexp.MustCompile(``)
	addressLine = regexp.MustCompile(`(?i)^\s*(up\s+ip\s+addr|address)`)
)

// knownManagers are programs that put addresses on interfaces, and what says which.
// Of one in a standby role the VIP is not to be seen on any interface.
var knownManagers = []struct {
	name  string
	comm  string // "": it runs at boot
	files []string
	line  *regexp.Regexp
	argv  bool
}{
	{name: "keepalived", comm: "keepalived", files: []string{"etc/keepalived/*.conf", "etc/keepalived/*/*.conf"}, line: anyLine},
	{name: "ucarp", comm: "ucarp", argv: true},
	{name: "vrrpd", comm: "vrrpd", argv: true},
	{name: "Pacemaker", comm: "pacemakerd", files: []string{"var/lib/pacemaker/cib/cib.xml"}, line: anyLine},
	{name: "NetworkManager", comm: "NetworkManager", files: []string{"etc/NetworkManager/system-connections/*", "run/NetworkManager/system-connections/*"}, line: addressLine},
	{name: "systemd-networkd", comm: "systemd-network", files: []string{"etc/systemd/network/*.network", "run/systemd/network/*.network"}, line: addressLine},
	{name: "ifupdown", files: []string{"etc/network/interfaces", "etc/network/interfaces.d/*"}, line: addressLine},
}

func findManagers(root string, running map[string][]string, w Want) (all []Manager) {
	for _, k := range knownManagers {
		runs := k.comm != "" && len(running[k.comm]) > 0
		if k.argv {
			for _, line := range running[k.comm] {
				if names(line, w) {
					all = append(all, Manager{k.name, "its command line", true})
				}
			}
		}
		for _, glob := range k.files {
			files, _ := filepath.Glob(filepath.Join(root, glob))
			for _, f := range files {
				data, err := os.ReadFile(f)
				if err != nil {
					continue
				}
				for line := range strings.Lines(string(data)) {
					if k.line.MatchString(line) && names(line, w) {
						all = append(all, Manager{k.name, f, runs})
						break
					}
				}
			}
		}
	}
	return all
}

// names reports whether a line that is no comment names the VIP, in any of the ways
// in which an address can be written.
func names(line string, w Want) bool {
	line = strings.TrimSpace(line)
	if line == "" || strings.ContainsRune("#;!", rune(line[0])) {
		return false
	}
	for _, word := range strings.FieldsFunc(line, func(r rune) bool {
		return !strings.ContainsRune("0123456789abcdefABCDEF.:", r)
	}) {
		if a, err := netip.ParseAddr(word); err == nil && w.has(a.Unmap()) {
			return true
		}
	}
	return false
}

// findNetworkd reads what systemd-networkd's settings mean for the VIP's rules and for
// clone0. Of drop-ins and of .network files the ones in etc come before those of the
// same name in run and lib; the whole goes by the names' order.
func findNetworkd(root string, running bool) Networkd {
	n := Networkd{Running: running, ForeignRules: true}
	var conf []string
	if main := filepath.Join(root, "etc/systemd/networkd.conf"); exists(main) {
		conf = append(conf, main)
	}
	conf = append(conf, layered(root, "networkd.conf.d", "*.conf")...)
	for _, f := range conf {
		if v := ini(f)["Network.ManageForeignRoutingPolicyRules"]; len(v) > 0 {
			n.ForeignRules = isTrue(v[len(v)-1])
		}
	}
	for _, f := range layered(root, "network", "*.network") {
		keys := ini(f)
		if !matchesClone(keys) {
			continue
		}
		if v := keys["Link.Unmanaged"]; len(v) == 0 || !isTrue(v[len(v)-1]) {
			n.Takes = f
		}
		break
	}
	return n
}

func exists(file string) bool { _, err := os.Stat(file); return err == nil }

func isTrue(v string) bool {
	switch strings.ToLower(v) {
	case "1", "yes", "y", "true", "t", "on":
		return true
	}
	return false
}

// layered gives systemd's files of a kind, in the order in which they count.
func layered(root, dir, glob string) []string {
	byName := map[string]string{}
	for _, layer := range []string{"usr/lib", "usr/local/lib", "run", "etc"} { // a later one masks
		files, _ := filepath.Glob(filepath.Join(root, layer, "systemd", dir, glob))
		for _, f := range files {
			byName[filepath.Base(f)] = f
		}
	}
	var files []string
	for _, name := range sorted(byName) {
		files = append(files, byName[name])
	}
	return files
}

// ini reads a file of systemd's as Section.Key to its values.
func ini(file string) map[string][]string {
	keys := map[string][]string{}
	f, err := os.Open(file)
	if err != nil {
		return keys
	}
	defer f.Close()
	section := ""
	for lines := bufio.NewScanner(f); lines.Scan(); {
		line := strings.TrimSpace(lines.Text())
		switch {
		case line == "" || line[0] == '#' || line[0] == ';':
		case line[0] == '[':
			section = strings.Trim(line, "[]")
		default:
			if k, v, ok := strings.Cut(line, "="); ok {
				k = section + "." + strings.TrimSpace(k)
				keys[k] = append(keys[k], strings.TrimSpace(v))
			}
		}
	}
	return keys
}

// matchesClone reports whether a [Match] section fits clone0, a virtual Ethernet
// device that no bus, driver or permanent address has brought.
func matchesClone(keys map[string][]string) bool {
	any := false
	for k, values := range keys {
		key, ok := strings.CutPrefix(k, "Match.")
		if !ok {
			continue
		}
		all := strings.Fields(strings.Join(values, " "))
		switch key {
		case "Name", "OriginalName":
			any = true
			if !fits(all, clone.Device) {
				return false
			}
		case "Type":
			any = true
			if !fits(all, "ether") {
				return false
			}
		case "Kind":
			any = true
			if !fits(all, "tun") && !fits(all, "tap") && !fits(all, "macvlan") {
				return false
			}
		case "Host", "Virtualization", "KernelVersion", "Architecture": // of the machine, not of the device
		default:
			return false
		}
	}
	return any
}

func fits(globs []string, name string) bool {
	inverted := len(globs) > 0 && strings.HasPrefix(globs[0], "!")
	for _, g := range globs {
		if ok, _ := path.Match(strings.TrimPrefix(g, "!"), name); ok {
			return !inverted
		}
	}
	return inverted
}

// managedBy names the program that has set up the interface of that index.
func managedBy(run string, index int) string {
	link := ini(filepath.Join(run, "systemd/netif/links", strconv.Itoa(index)))
	if v := link[".ADMIN_STATE"]; len(v) > 0 && v[0] != "unmanaged" && v[0] != "initialized" && v[0] != "pending" {
		return "systemd-networkd"
	}
	dev := ini(filepath.Join(run, "NetworkManager/devices", strconv.Itoa(index)))
	if v := dev["device.managed"]; len(v) > 0 && isTrue(v[0]) && len(dev["device.connection-uuid"]) > 0 {
		return "NetworkManager"
	}
	return ""
}
