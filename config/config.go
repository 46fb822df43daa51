// Package config gives the cluster's one configuration file, cluster.yaml, as
// Go values. The same file, bit for bit, goes to every node: nothing in it may
// name a single node.
//
// The file is read strictly, because a typing error in it would otherwise show
// as an outage: an unknown key, a value of the wrong kind or out of range, and
// values that contradict each other are all errors, and each names its line,
// its column and what would have been right. The types below are the only
// description of the file; the decoder, the JSON schema and the reference page
// all read their struct tags:
//
//	yaml      the key
//	default   the value when the key is left out, as it would be written
//	enum      the allowed values, separated by commas
//	format    the name of a text format (see formats)
//	min, max  the range of a duration or number, or the number of items of a list or map
//	zero      what the duration 0 means, which is allowed although it is below min: "off"
//	required  "true": the key must be there
package config

import (
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"time"
)

//go:generate go run ./schema/generate

// Config is the whole of cluster.yaml with every default filled in. Values come
// from Load and its relatives; a Config is not changed after that.
type Config struct {
	Cluster    Cluster    `yaml:"cluster" required:"true"`
	VIP        VIP        `yaml:"vip" required:"true"`
	Interface  Interface  `yaml:"interface"`
	Management Management `yaml:"management"`
	Policy     Policy     `yaml:"policy"`
	// Services are the programs that every node runs.
	Services []Service `yaml:"services" max:"32"`
	// Rules are for the ports of other programs.
	Rules   []Rule  `yaml:"rules" max:"64"`
	Network Network `yaml:"network"`
	System  System  `yaml:"system"`

	origins origins // where each value came from, by path
}

// Cluster names the cluster, holds its secrets, and says how soon a node is
// missed.
type Cluster struct {
	// Name tells clusters on one segment apart in logs, metrics and host
	// names: 1 to 63 lower-case letters, digits and inner hyphens (a DNS
	// label, RFC 1035).
	Name string `yaml:"name" required:"true" format:"dns-label"`
	// Key is the cluster's shared secret: 32 random bytes, base64. The keys of
	// the flow hash and of the frames between nodes are derived from it. Make
	// one with: head -c 32 /dev/urandom | base64
	Key Key `yaml:"key" required:"true"`
	// AcceptKeys are up to two further keys whose frames are accepted; a node
	// sends with key alone. They let a cluster change its key one node at a
	// time: first every node accepts the new key, then every node gets it as
	// its key and accepts the old one, then the old one goes. Set flow-key to
	// the old key before the first step, and leave it there.
	AcceptKeys []Key `yaml:"accept-keys" max:"2"`
	// FlowKey is the key that the flow hash is derived from; left out, it is
	// key. It stays when key is changed: nodes whose flow hashes differ would
	// take the same flows twice. Change it only while the whole cluster is
	// down.
	FlowKey Key `yaml:"flow-key"`
	// Detect is how long nothing is heard of a node until it counts as dead:
	// normal is 300ms, fast is 150ms, relaxed is 1s; or a time. A third of it
	// lies between two beacons, and a node that cannot send takes nothing new
	// after two thirds. Emulated machines, and those with far more virtual
	// processors than real ones, want relaxed: what stands still for longer
	// than this is taken for dead.
	Detect Detect `yaml:"detect" default:"normal" min:"100ms" max:"10s"`
	// Drain is how long a node that is stopped or drained in an orderly way
	// waits for its connections to end, once it takes no new ones.
	Drain time.Duration `yaml:"drain" default:"15s" min:"1ms" max:"1h" zero:"do not wait"`
}

// VIP is the shared address of the cluster. At least one of ipv4 and ipv6 is
// needed.
type VIP struct {
	// IPv4 is the shared IPv4 address with the length of its subnet's prefix,
	// such as 10.77.0.10/24.
	IPv4 netip.Prefix `yaml:"ipv4"`
	// IPv4Gateway is the router of that subnet. Left out, only clients on the
	// subnet itself are answered.
	IPv4Gateway netip.Addr `yaml:"ipv4-gateway"`
	// IPv6 is the shared IPv6 address with the length of its subnet's prefix,
	// such as fd77::10/64.
	IPv6 netip.Prefix `yaml:"ipv6"`
	// IPv6Gateway is the IPv6 router: an address of that subnet, or a
	// link-local one.
	IPv6Gateway netip.Addr `yaml:"ipv6-gateway"`
	// CloneMAC is what clients' ARP and NDP caches hold for the VIP: a locally
	// administered unicast address that no device on the segment uses. Left
	// out, it is derived from the VIP: 02:cc and the four bytes of the IPv4
	// address, or the first four bytes of the SHA-256 of the IPv6 address.
	CloneMAC net.HardwareAddr `yaml:"clone-mac"`
}

// Interface says which NIC of a machine carries the cluster. The criteria that
// are set must all match; among several matches the first with carrier, then
// the lowest PCI path, wins. None set: the first Ethernet NIC with carrier.
// In the patterns * stands for any text and ? for one character.
type Interface struct {
	// Name is a pattern on the kernel's name, such as eth*.
	Name string `yaml:"name" format:"glob"`
	// Driver is a pattern on the driver's name, such as virtio_net.
	Driver string `yaml:"driver" format:"glob"`
	// PCI is a pattern on the PCI address, such as 0000:03:00.*.
	PCI string `yaml:"pci" format:"glob"`
	// MAC is a pattern on the permanent address, in lower case, such as
	// 52:54:00:*.
	MAC string `yaml:"mac" format:"glob"`
	// WaitCarrier is how long a node waits for a carrier before it goes on
	// with a NIC that has none.
	WaitCarrier time.Duration `yaml:"wait-carrier" default:"10s" min:"0s" max:"5m"`
}

// ManagementMode says how the NIC itself gets an address.
type ManagementMode string

// The management modes. The zero value is not valid; the default is
// ManagementDHCP.
const (
	ManagementDHCP      ManagementMode = "dhcp"
	ManagementStatic    ManagementMode = "static"
	ManagementLinkLocal ManagementMode = "link-local"
)

// Management is the address by which one node is reached, and from which it
// opens connections of its own.
type Management struct {
	// Mode is how a node gets its own address: dhcp asks for one (and
	// goes on asking), static computes one from the pattern, link-local takes
	// none but the IPv6 link-local one, which the other modes have as well.
	Mode ManagementMode `yaml:"mode" default:"dhcp" enum:"dhcp,static,link-local"`
	// Pattern is the prefix whose host part static fills from the NIC's
	// permanent MAC, so that one file serves every node: the low bits of the
	// MAC become the host bits. IPv4 with /8 to /24 or IPv6 with /16 to /80,
	// such as 10.78.0.0/16.
	Pattern netip.Prefix `yaml:"pattern"`
	// Port is the TCP port of the management API, on every node's own addresses
	// and on the VIP, where one of the nodes answers for all. It is a port of the
	// VIP like others: no service can have it, and a rule that disables it closes
	// it on the VIP alone. 0: no API.
	Port int `yaml:"port" default:"9264" min:"0" max:"65535"`
	// Syslog is where each node sends its log lines, as RFC 5424 has it:
	// udp://192.0.2.5:514, or tcp://192.0.2.5:601 with the length before each. None: nowhere.
	Syslog string `yaml:"syslog" format:"syslog-url"`
}

// Service is a program that every node runs on the VIP.
type Service struct {
	// Name tells services apart in logs and metrics: a DNS label, unique.
	Name string `yaml:"name" required:"true" format:"dns-label"`
	// Run is the program, with its full path in the image, and its arguments.
	// No shell reads it.
	Run []string `yaml:"run" required:"true" format:"text" min:"1" max:"64"`
	// Build is where the program comes from if it is not one of the image's
	// own: a folder with a Go main package (./hello), a static Linux binary
	// (./bin/hello), or the import path of a Go main package with its version
	// (example.com/tools/cmd/hello@v1.2.3). Paths that begin with a dot are
	// relative to the folder of cluster.yaml. What is built goes where run
	// says, which is directly in /bin. Only the building of an image reads it.
	Build string `yaml:"build" format:"text"`
	// Content is a folder whose files the image gets as /srv/NAME, with the
	// name of the service. Its path is as for build. The service finds it by
	// the environment variable CLONECLUSTER_CONTENT.
	Content string `yaml:"content" format:"text"`
	// Env is added to a minimal environment (PATH, HOME, NOTIFY_SOCKET,
	// CLONECLUSTER_NODE, the node's wire MAC, and, with content,
	// CLONECLUSTER_CONTENT).
	Env map[string]string `yaml:"env" format:"text" max:"64"`
	// Ports are what the service listens on, such as 80/tcp, 53/udp or
	// 8000-8010/tcp. No two services or rules share one.
	Ports []PortRange `yaml:"ports" max:"64"`
	// Affinity is what keeps a client on one node: none spreads every
	// connection by itself, client keeps the connections of one client
	// address together, network those of one /24 (IPv6 /64), and single gives
	// all of them to one node. Left out, it is the affinity of the policy.
	Affinity Affinity `yaml:"affinity" enum:"none,client,network,single"`
	Health   Health   `yaml:"health"`
}

// Rule says what becomes of ports that belong to none of the services above,
// such as those of programs that a machine runs besides. Ports without a
// service or a rule have the affinity of the policy.
type Rule struct {
	// Ports are what the rule is for, such as 22/tcp or 6000-6010/udp.
	Ports []PortRange `yaml:"ports" required:"true" min:"1" max:"64"`
	// Affinity is as for services. With disabled, every node drops what comes
	// to these ports, answers to flows it opened from them included; what
	// leaves from them is not touched.
	Affinity Affinity `yaml:"affinity" required:"true" enum:"none,client,network,single,disabled"`
}

// Health is how a node finds out that its service works. At most one of http,
// tcp and exec is set; with none, the service is healthy while something
// listens on its TCP ports. A service without TCP ports needs a check of its
// own: without one it always counts as healthy. A node with a failed service
// drains itself.
type Health struct {
	// HTTP is a URL that answers 2xx when the service is healthy, such as
	// http://127.0.0.1/healthz.
	HTTP string `yaml:"http" format:"http-url"`
	// TCP is an address and port that accepts a connection when the service is
	// healthy, such as 127.0.0.1:25.
	TCP string `yaml:"tcp" format:"host-port"`
	// Exec is a program, with its full path in the image, and its arguments,
	// which ends with status 0 when the service is healthy. No shell reads it.
	Exec []string `yaml:"exec" format:"text" min:"1" max:"64"`
	// Interval is the time between two checks.
	Interval time.Duration `yaml:"interval" default:"1s" min:"100ms" max:"1h"`
	// Timeout is how long an answer may take; at most the interval.
	Timeout time.Duration `yaml:"timeout" default:"500ms" min:"10ms" max:"1h"`
	// Rise is how many checks in a row must succeed before a failed service
	// counts as healthy.
	Rise int `yaml:"rise" default:"2" min:"1" max:"100"`
	// Fall is how many checks in a row must fail before a service counts as
	// failed.
	Fall int `yaml:"fall" default:"3" min:"1" max:"100"`
}

// The modes of Network.
const (
	ModeAuto     = "auto"
	ModeFlooded  = "flooded"
	ModeDirected = "directed"
)

// Network is what is asked of the network.
type Network struct {
	// Mode is how frames for the VIP reach the nodes: flooded, by the switch, to all;
	// directed, to one node that sends each on to its owner, where no switch floods; auto
	// is flooded until the nodes find that it does not work. Directed needs Linux 6.6: a
	// node without it, or with flooded, stands aside while the others direct.
	Mode string `yaml:"mode" default:"auto" enum:"auto,flooded,directed"`
}

// System is how the appliance itself behaves.
type System struct {
	// Console is the kernel console that init writes to, such as ttyS0. Left
	// out, it is the one the kernel was started with.
	Console string `yaml:"console" format:"tty"`
	// LogLevel is the least severity that is logged.
	LogLevel string `yaml:"log-level" default:"info" enum:"debug,info,warn,error"`
	// Datapath is how frames pass between the VIP and the wire: native by a kernel
	// with wire addresses, bpf by BPF programs in any new kernel, raw by the engine
	// itself on any Linux; auto is the first of these that works here.
	Datapath string `yaml:"datapath" default:"auto" enum:"auto,native,bpf,raw"`
	// Ingress is where native and bpf judge what comes in: xdp in the NIC's driver,
	// which makes a frame for another node cheapest, or tc, which every NIC has; auto
	// is xdp where the driver has it and does not lose offloads by it.
	Ingress string `yaml:"ingress" default:"auto" enum:"auto,xdp,tc"`
	// Watchdog resets a machine whose data plane has stopped for this long;
	// 0 turns it off.
	Watchdog time.Duration `yaml:"watchdog" default:"30s" min:"5s" max:"5m" zero:"off"`
}

// ContentDir is where a service with content finds it on a node.
func (s Service) ContentDir() string { return "/srv/" + s.Name }

// Level is LogLevel for log/slog.
func (s System) Level() slog.Level {
	var l slog.Level
	if err := l.UnmarshalText([]byte(s.LogLevel)); err != nil {
		return slog.LevelInfo
	}
	return l
}

// ManagementAddress is the address of the node whose NIC has this permanent
// MAC, with the prefix length of its subnet, for ManagementStatic. It is an
// error when the MAC's low bits happen to give an address of the VIP, of a
// gateway, or the subnet's network or broadcast address.
func (c *Config) ManagementAddress(mac net.HardwareAddr) (netip.Prefix, error) {
	pattern := c.Management.Pattern
	if !pattern.IsValid() || len(mac) != 6 {
		return netip.Prefix{}, fmt.Errorf("computing the management address of %v: no pattern, or not an Ethernet address", mac)
	}
	b := pattern.Masked().Addr().AsSlice()
	for i := range min(len(mac)*8, len(b)*8-pattern.Bits()) { // bit i, counted from the lowest
		bit := mac[len(mac)-1-i/8] >> (i % 8) & 1
		b[len(b)-1-i/8] |= bit << (i % 8)
	}
	addr, _ := netip.AddrFromSlice(b)
	got := netip.PrefixFrom(addr, pattern.Bits())
	if what := notAHost(got); what != "" {
		return netip.Prefix{}, fmt.Errorf("the low bits of %v give %v, %s", mac, addr, what)
	}
	for _, taken := range []netip.Addr{c.VIP.IPv4.Addr(), c.VIP.IPv6.Addr(), c.VIP.IPv4Gateway, c.VIP.IPv6Gateway} {
		if addr == taken {
			return netip.Prefix{}, fmt.Errorf("the low bits of %v give %v, which is the address of the VIP or of a gateway", mac, addr)
		}
	}
	return got, nil
}
