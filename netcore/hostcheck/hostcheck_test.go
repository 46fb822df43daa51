package hostcheck

import (
	"encoding/json"
	"errors"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"clonecluster/config"
	"clonecluster/netcore/clone"
	"clonecluster/netcore/nic"
)

var (
	cloneAddr = net.HardwareAddr{0x02, 0xcc, 0x0a, 0x4d, 0x00, 0x0a}
	wireAddr  = net.HardwareAddr{0x52, 0x54, 0, 0x77, 0, 1}
	vip4      = netip.MustParseAddr("10.77.0.10")
	vip6      = netip.MustParseAddr("fd77::10")
	want      = Want{Datapath: "raw", CloneMAC: cloneAddr, VIP4: vip4, VIP6: vip6, Services: []Service{{"web", []config.PortRange{{Protocol: "tcp", First: 80, Last: 80}}}}}
)

// good is a machine that nothing speaks against.
func good() Machine {
	return Machine{
		NIC: nic.NIC{Name: "eth0", Index: 2, MAC: wireAddr, Up: true, Carrier: true},
		Links: []Link{
			{Index: 1, Name: "lo"}, {Index: 2, Name: "eth0", MAC: wireAddr},
			{Index: 3, Name: "mv0", Kind: "macvlan", Parent: 2, MAC: net.HardwareAddr{2, 0, 0, 0, 0, 1}},
		},
		Addresses: []Address{{"lo", netip.MustParsePrefix("127.0.0.1/8"), false}, {"eth0", netip.MustParsePrefix("10.77.0.101/24"), true}},
		Gateways:  []netip.Addr{netip.MustParseAddr("10.77.0.1")},
		IPv6:      true,
		ARPIgnore: map[string]string{"all": "0", "lo": "0", "eth0": "3", "mv0": "2"},
		Balanced:  []netip.Addr{netip.MustParseAddr("10.77.0.20")},
		Networkd:  Networkd{Running: true},
	}
}

func TestJudge(t *testing.T) {
	none := func(*Machine) {}
	for _, tt := range []struct {
		name   string
		change func(*Machine)
		level  Level
		check  string
		err    error
		says   string // in what or fix
	}{
		{"a good machine", none, OK, "nic", nil, "eth0, wire MAC 52:54:00:77:00:01"},
		{"no NIC", func(m *Machine) { m.NICErr = &nic.NoNICError{} }, Refused, "nic", nic.ErrNoNIC, "interface in cluster.yaml"},
		{"down", func(m *Machine) { m.NIC.Up, m.NIC.Carrier = false, false }, Warn, "nic", errUnknown, "is down"},
		{"no carrier", func(m *Machine) { m.NIC.Carrier = false }, Warn, "nic", errUnknown, "cable"},
		{"VIP on the NIC", func(m *Machine) {
			m.Addresses[1].Address = netip.MustParsePrefix("10.77.0.10/24")
			m.Addresses[1].Dynamic = false
		}, Refused, "vip-elsewhere", ErrVIPElsewhere, "ip addr del 10.77.0.10/24 dev eth0"},
		{"VIP by DHCP", func(m *Machine) { m.Addresses[1].Address = netip.MustParsePrefix("10.77.0.10/24") }, Refused, "vip-elsewhere", ErrVIPElsewhere, "DHCP server"},
		{"IPv6 VIP on lo", func(m *Machine) {
			m.Addresses = append(m.Addresses, Address{"lo", netip.MustParsePrefix("fd77::10/128"), false})
		}, Refused, "vip-elsewhere", ErrVIPElsewhere, "fd77::10 is on lo"},
		{"VIP on our clone0", func(m *Machine) {
			m.Links = append(m.Links, Link{Index: 9, Name: "clone0", Kind: "tun", MAC: cloneAddr, Alias: "clonecluster nic=eth0"})
			m.Addresses = append(m.Addresses, Address{"clone0", netip.MustParsePrefix("10.77.0.10/32"), false})
			m.ARPIgnore["clone0"] = "8"
		}, OK, "clone0", nil, "is there"},
		{"clone0 of an engine that was killed early", func(m *Machine) {
			m.Links = append(m.Links, Link{Index: 9, Name: "clone0", Kind: "macvlan", MAC: cloneAddr, Group: clone.Group})
		}, OK, "clone0", nil, "is there"},
		{"clone0 of others", func(m *Machine) { m.Links = append(m.Links, Link{Index: 9, Name: "clone0", Kind: "dummy"}) }, Refused, "clone0", ErrDeviceInUse, "clonecluster has not made"},
		{"clone0 managed", func(m *Machine) {
			m.Links = append(m.Links, Link{Name: "clone0", MAC: cloneAddr, Alias: "clonecluster", Managed: "NetworkManager"})
		}, Warn, "clone0", ErrManaged, "NetworkManager manages clone0"},
		{"clone MAC on a macvlan", func(m *Machine) { m.Links[2].MAC = cloneAddr }, Refused, "clone-mac", ErrCloneMACInUse, "mv0 has the clone MAC"},
		{"clone MAC on the NIC", func(m *Machine) { m.Links[1].MAC = cloneAddr }, Refused, "clone-mac", ErrCloneMACInUse, "vip.clone-mac"},
		{"passthru on the NIC", func(m *Machine) { m.Links[2].Takes = true }, Refused, "nic-free", ErrNICTaken, "mv0"},
		{"passthru elsewhere", func(m *Machine) { m.Links[2].Takes, m.Links[2].Parent = true, 7 }, OK, "nic-free", nil, ""},
		{"VIP is the router", func(m *Machine) { m.Gateways[0] = vip4 }, Refused, "vip-gateway", ErrVIPIsGateway, "choose another VIP"},
		{"IPVS", func(m *Machine) { m.Balanced[0] = vip6 }, Refused, "ipvs", ErrVIPBalanced, "ipvsadm"},
		{"the table", func(m *Machine) { m.TableRoutes = []string{"{Dst: 10.9.0.0/16}"} }, Refused, "table", ErrTableInUse, "10.9.0.0/16"},
		{"arp_ignore of all", func(m *Machine) { m.ARPIgnore["all"] = "3" }, Refused, "arp", ErrARPSetting, "net.ipv4.conf.all.arp_ignore=3"},
		{"arp_ignore of one", func(m *Machine) { m.ARPIgnore["mv0"] = "5" }, Warn, "arp", ErrARPSetting, "net.ipv4.conf.mv0.arp_ignore"},
		{"no IPv6", func(m *Machine) { m.IPv6 = false }, Refused, "ipv6", ErrNoIPv6, "leave vip.ipv6 out"},
		{"keepalived runs", func(m *Machine) { m.Managers = []Manager{{"keepalived", "/etc/keepalived/keepalived.conf", true}} }, Refused, "managers", ErrManaged, "take the VIP out of /etc/keepalived"},
		{"keepalived does not run", func(m *Machine) { m.Managers = []Manager{{"keepalived", "/etc/k", false}} }, Warn, "managers", ErrManaged, "does not run"},
		{"networkd removes rules", func(m *Machine) { m.Networkd.ForeignRules = true }, Refused, "networkd", ErrForeignRules, "ManageForeignRoutingPolicyRules=no"},
		{"networkd takes clone0", func(m *Machine) { m.Networkd.Takes = "/etc/systemd/network/all.network" }, Refused, "networkd", ErrManaged, "Unmanaged=yes"},
		{"no networkd", func(m *Machine) { m.Networkd = Networkd{ForeignRules: true, Takes: "x"} }, OK, "vip-elsewhere", nil, ""},
		{"a capability", func(m *Machine) { m.Missing = []Missing{needs[0].Missing} }, Refused, "capabilities", ErrCapability, "CAP_NET_ADMIN"},
		{"not for raw", func(m *Machine) { m.Missing = []Missing{{Name: "CAP_BPF", BPF: true}} }, OK, "capabilities", nil, ""},
		{"a wish", func(m *Machine) { m.Missing = []Missing{{Name: "CAP_SYS_NICE", For: "x"}} }, Warn, "capabilities", ErrCapability, "CAP_SYS_NICE"},
		{"no TUN", func(m *Machine) { m.TUN = os.ErrNotExist }, Refused, "tun", ErrNoTUN, "modprobe tun"},
		{"nobody listens", func(m *Machine) { m.Silent = []Silent{{"web", "nobody listens at 80/tcp"}} }, Warn, "services", errServiceNotHeard, "0.0.0.0"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			m := good()
			tt.change(&m)
			findings, seen := Judge(m, want), false
			for _, f := range findings {
				if f.Check == "" || f.What == "" || !(f.Level >= OK && f.Level <= Refused) {
					t.Errorf("half a finding: %+v", f)
				}
				if (f.Level == OK) != (f.Err() == nil) || (f.Level == OK) != (f.Fix == "") {
					t.Errorf("%v with the error %v and the fix %q", f.Level, f.Err(), f.Fix)
				}
				if f.Check == tt.check && f.Level == tt.level && strings.Contains(f.What+f.Fix, tt.says) {
					seen = true
				} else if f.Level > OK {
					t.Errorf("also %+v", f)
				}
			}
			if !seen {
				t.Errorf("findings %+v; want %s %v that says %q", findings, tt.check, tt.level, tt.says)
			}
			err := Refuse(findings)
			if (err != nil) != (tt.level == Refused) {
				t.Errorf("Refuse = %v at level %v", err, tt.level)
			}
			if err != nil && (!errors.Is(err, ErrRefused) || !errors.Is(err, tt.err) || !strings.Contains(err.Error(), tt.says)) {
				t.Errorf("%q does not match ErrRefused and %q, or does not say %q", err, tt.err, tt.says)
			}
		})
	}
}

// TestJudgeDatapath: what matters for one datapath does not for another.
func TestJudgeDatapath(t *testing.T) {
	m := good()
	m.Missing, m.TUN = []Missing{{Name: "CAP_BPF", BPF: true, For: "x"}}, os.ErrNotExist
	m.Links[2].Kind = "ipvlan"
	for datapath, levels := range map[string][3]Level{"raw": {OK, Refused, OK}, "bpf": {Refused, OK, Refused}, "auto": {Warn, Warn, Refused}} {
		w := want
		w.Datapath = datapath
		got := map[string]Level{}
		for _, f := range Judge(m, w) {
			got[f.Check] = f.Level
		}
		if now := [3]Level{got["capabilities"], got["tun"], got["nic-free"]}; now != levels {
			t.Errorf("%s: %v; want %v", datapath, now, levels)
		}
	}
}

func TestJudgeClaims(t *testing.T) {
	other := net.HardwareAddr{2, 0, 0, 0, 0, 9}
	for _, tt := range []struct {
		claims  []Claim
		running bool
		level   Level
		says    string
	}{
		{nil, false, OK, "nobody on the segment has the VIP yet"},
		{nil, true, OK, "nobody on the segment but this node"},
		{[]Claim{{vip4, cloneAddr}, {vip6, cloneAddr}}, false, OK, "nodes of the cluster"},
		{[]Claim{{vip4, cloneAddr}}, true, OK, "nodes of the cluster"},
		{[]Claim{{vip4, cloneAddr}, {vip6, other}}, true, Refused, "fd77::10 is in use on the segment by 02:00:00:00:00:09"},
	} {
		fs := JudgeClaims(tt.claims, want, tt.running)
		if len(fs) != 1 || fs[0].Level != tt.level || !strings.Contains(fs[0].What, tt.says) || fs[0].Check != "segment" {
			t.Errorf("JudgeClaims(%v) = %+v; want %v and %q", tt.claims, fs, tt.level, tt.says)
		}
		if err := Refuse(fs); (err != nil) != errors.Is(err, ErrVIPInUse) {
			t.Errorf("%v does not match ErrVIPInUse", err)
		}
	}
}

func TestLevelText(t *testing.T) {
	b, err := json.Marshal(Finding{Check: "x", Level: Refused})
	if err != nil || !strings.Contains(string(b), `"refused"`) {
		t.Fatalf("%s, %v", b, err)
	}
	var f Finding
	if err := json.Unmarshal(b, &f); err != nil || f.Level != Refused {
		t.Errorf("%+v, %v", f, err)
	}
	if err := json.Unmarshal([]byte(`{"level":"fine"}`), &f); err == nil {
		t.Error("level fine is taken")
	}
}

// tree writes files below a root, given in pairs of path and text.
func tree(t *testing.T, files ...string) string {
	t.Helper()
	root := t.TempDir()
	for i := 0; i < len(files); i += 2 {
		file := filepath.Join(root, files[i])
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, []byte(files[i+1]), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return root
}

func TestFindManagers(t *testing.T) {
	root := tree(t,
		"etc/keepalived/keepalived.conf", "vrrp_instance VI_1 {\n  virtual_ipaddress {\n    10.77.0.10/24 dev eth0\n  }\n}\n",
		"etc/network/interfaces", "iface eth0 inet static\n    address 10.77.0.101/24\n    dns-nameservers 10.77.0.10\n# address 10.77.0.10\n",
		"etc/network/interfaces.d/eth1", "iface eth1 inet6 static\n\taddress FD77:0:0::10/64\n",
		"etc/systemd/network/10-eth0.network", "[Network]\nAddress=10.77.0.100/24\nDNS=10.77.0.10\n",
		"var/lib/pacemaker/cib/cib.xml", `<nvpair name="ip" value="10.77.0.11"/>`,
	)
	got := findManagers(root, map[string][]string{
		"keepalived": {"/usr/sbin/keepalived"}, "ucarp": {"ucarp -a 10.77.0.10 -s 10.77.0.2"}, "pacemakerd": {"pacemakerd"},
	}, want)
	var names []string
	for _, m := range got {
		names = append(names, m.Name)
	}
	if !slices.Equal(names, []string{"keepalived", "ucarp", "ifupdown"}) || !got[0].Running || !got[1].Running || got[2].Running {
		t.Errorf("%+v; want keepalived and ucarp, which run, and ifupdown for eth1", got)
	}
	if m := findManagers(tree(t), nil, want); len(m) > 0 {
		t.Errorf("on an empty machine: %+v", m)
	}
}

func TestFindNetworkd(t *testing.T) {
	const unmanaged = "[Match]\nName=clone0\n\n[Link]\nUnmanaged=yes\n"
	for _, tt := range []struct {
		name  string
		files []string
		rules bool
		takes string // the file's name
	}{
		{"as it is", nil, true, ""},
		{"told in the drop-in", []string{"usr/lib/systemd/networkd.conf.d/clonecluster.conf", "[Network]\nManageForeignRoutingPolicyRules=no\n"}, false, ""},
		{"told otherwise in etc", []string{
			"usr/lib/systemd/networkd.conf.d/c.conf", "[Network]\nManageForeignRoutingPolicyRules=no\n",
			"etc/systemd/networkd.conf.d/c.conf", "[Network]\nManageForeignRoutingPolicyRules=yes\n",
		}, true, ""},
		{"main file and drop-in", []string{
			"etc/systemd/networkd.conf", "[Network]\nManageForeignRoutingPolicyRules=yes\n",
			"etc/systemd/networkd.conf.d/c.conf", "[Network]\nManageForeignRoutingPolicyRules=no\n",
		}, false, ""},
		{"all interfaces", []string{"etc/systemd/network/50-all.network", "[Match]\nName=*\n[Network]\nDHCP=yes\n"}, true, "50-all.network"},
		{"all Ethernet", []string{"etc/systemd/network/50-all.network", "[Match]\nType=ether\n[Network]\nDHCP=yes\n"}, true, "50-all.network"},
		{"ours comes first", []string{"etc/systemd/network/50-all.network", "[Match]\nName=*\n", "usr/lib/systemd/network/05-clone0.network", unmanaged}, true, ""},
		{"ours comes too late", []string{"etc/systemd/network/01-all.network", "[Match]\nName=*\n", "usr/lib/systemd/network/05-clone0.network", unmanaged}, true, "01-all.network"},
		{"one NIC", []string{"etc/systemd/network/50-eth.network", "[Match]\nName=eth* en*\n"}, true, ""},
		{"all but one", []string{"etc/systemd/network/50.network", "[Match]\nName=!clone0\n"}, true, ""},
		{"by driver", []string{"etc/systemd/network/50.network", "[Match]\nDriver=virtio_net\nName=*\n"}, true, ""},
	} {
		n := findNetworkd(tree(t, tt.files...), true)
		takes := ""
		if n.Takes != "" {
			takes = filepath.Base(n.Takes)
		}
		if n.ForeignRules != tt.rules || takes != tt.takes {
			t.Errorf("%s: %+v; want foreign rules %v, taken by %q", tt.name, n, tt.rules, tt.takes)
		}
	}
}

func TestManagedBy(t *testing.T) {
	run := tree(t,
		"systemd/netif/links/7", "# private\nADMIN_STATE=configured\nOPER_STATE=routable\n", "systemd/netif/links/8", "ADMIN_STATE=unmanaged\n",
		"NetworkManager/devices/9", "[device]\nmanaged=true\nconnection-uuid=1-2\n", "NetworkManager/devices/10", "[device]\nmanaged=false\n",
	)
	for index, want := range map[int]string{7: "systemd-networkd", 8: "", 9: "NetworkManager", 10: "", 11: ""} {
		if got := managedBy(run, index); got != want {
			t.Errorf("interface %d: %q; want %q", index, got, want)
		}
	}
}

func TestBalancedBy(t *testing.T) {
	file := filepath.Join(tree(t, "ip_vs", `IP Virtual Server version 1.2.1 (size=4096)
Prot LocalAddress:Port Scheduler Flags
  -> RemoteAddress:Port Forward Weight ActiveConn InActConn
TCP  0A4D000A:0050 rr
  -> 0A4D0065:0050      Route   1      0          0
UDP  [fd77:0000:0000:0000:0000:0000:0000:0010]:0035 wlc
FWM  00000001 rr
TCP  nonsense
`), "ip_vs")
	if got := balancedBy(file); !slices.Equal(got, []netip.Addr{vip4, vip6}) {
		t.Errorf("%v; want %v and %v", got, vip4, vip6)
	}
	if got := balancedBy(file + "x"); got != nil {
		t.Errorf("without IPVS: %v", got)
	}
}
