// Package config gives the cluster's one configuration file, cluster.yaml, as
// Go values. The same file, bit for bit, goes to every node: nothing in it may
// name a single node.
package config

import (
	"net"
	"net/netip"
	"time"
)

// Config is the whole of cluster.yaml with every default filled in.
type Config struct {
	Cluster    Cluster    `yaml:"cluster"`
	VIP        VIP        `yaml:"vip"`
	Interface  Interface  `yaml:"interface"`
	Management Management `yaml:"management"`
	Services   []Service  `yaml:"services"`
	System     System     `yaml:"system"`
}

// Cluster names the cluster and holds its secret.
type Cluster struct {
	// Name tells clusters on one segment apart in logs and metrics: 1 to 63
	// letters, digits and hyphens (a DNS label, RFC 1035).
	Name string `yaml:"name"`
	// Key is the cluster's shared secret, 32 bytes, base64 in the file. The
	// keys of the flow hash and of the presence frames are derived from it.
	Key Key `yaml:"key"`
}

// Key is the cluster's shared secret. It prints as "(secret)".
type Key [32]byte

// VIP is the shared address of the cluster. At least one of IPv4, IPv6 is set.
type VIP struct {
	IPv4        netip.Prefix `yaml:"ipv4"` // address with its subnet, 10.77.0.10/24
	IPv4Gateway netip.Addr   `yaml:"ipv4-gateway"`
	IPv6        netip.Prefix `yaml:"ipv6"`
	IPv6Gateway netip.Addr   `yaml:"ipv6-gateway"`
	// CloneMAC is what clients' ARP and NDP caches hold for the VIP. Default:
	// DefaultCloneMAC of the VIP.
	CloneMAC net.HardwareAddr `yaml:"clone-mac"`
}

// Interface says which NIC of a machine carries the cluster. The criteria that
// are set must all match; among several matches the first with carrier, then
// the lowest PCI path, wins. None set: the first Ethernet NIC with carrier.
type Interface struct {
	Name   string `yaml:"name"`   // glob on the kernel's name, "eth*"
	Driver string `yaml:"driver"` // glob on the driver, "virtio_net"
	PCI    string `yaml:"pci"`    // glob on the PCI address, "0000:03:00.*"
	MAC    string `yaml:"mac"`    // glob on the permanent address, "52:54:00:*"
	// WaitCarrier is how long a node waits for a carrier before it goes on
	// with a NIC that has none. 0 to 5m, default 10s.
	WaitCarrier time.Duration `yaml:"wait-carrier"`
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

// Management is the address by which one node is reached.
type Management struct {
	Mode ManagementMode `yaml:"mode"`
	// Pattern is, for ManagementStatic, a prefix whose host part is filled from
	// the NIC's permanent MAC (so that one file serves every node): the low
	// bits of the MAC replace the host bits. 10.78.0.0/16.
	Pattern netip.Prefix `yaml:"pattern"`
}

// Affinity says which fields of a flow choose its bucket.
type Affinity string

// The affinities. The zero value is not valid; the default is AffinityNone.
const (
	AffinityNone    Affinity = "none"    // addresses and ports
	AffinityClient  Affinity = "client"  // the client's address
	AffinityNetwork Affinity = "network" // the client's /24 or /64
	AffinitySingle  Affinity = "single"  // a constant: one node takes all
)

// Service is a program that every node runs on the VIP.
type Service struct {
	Name     string            `yaml:"name"`     // a DNS label, unique
	Run      []string          `yaml:"run"`      // program and arguments, no shell
	Env      map[string]string `yaml:"env"`      // added to a minimal environment
	Ports    []Port            `yaml:"ports"`    // what the service listens on, "80/tcp"
	Affinity Affinity          `yaml:"affinity"` // of these ports
	Health   Health            `yaml:"health"`
}

// Port is a transport port, written "80/tcp" or "53/udp".
type Port struct {
	Number   uint16 // 1 to 65535
	Protocol string // "tcp" or "udp"
}

// Health is how a node finds out that its service works. At most one of HTTP
// and TCP is set; neither means the process being alive is enough.
type Health struct {
	HTTP     string        `yaml:"http"`     // URL; 2xx is healthy
	TCP      string        `yaml:"tcp"`      // host:port; a connection is healthy
	Interval time.Duration `yaml:"interval"` // 100ms to 1h, default 1s
	Timeout  time.Duration `yaml:"timeout"`  // 10ms to Interval, default 500ms
}

// System is how the appliance itself behaves.
type System struct {
	// Console is the kernel console the init writes to, "ttyS0"; empty means
	// the board's.
	Console string `yaml:"console"`
	// LogLevel is debug, info, warn or error; default info.
	LogLevel string `yaml:"log-level"`
	// Watchdog resets a machine whose data plane has stopped for this long.
	// 0 turns it off; otherwise 5s to 5m; default 30s.
	Watchdog time.Duration `yaml:"watchdog"`
}
