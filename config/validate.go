package config

import (
	"fmt"
	"net/netip"
	"path"
	"strings"
)

// validate checks what no single value can tell: the values are all well
// formed and the defaults filled in. It also fills in the values that are
// derived from others.
func (b *builder) validate() {
	b.validateVIP()
	b.validateManagement()
	b.validateServices()
}

func (b *builder) validateVIP() {
	vip := &b.config.VIP
	if !vip.IPv4.IsValid() && !vip.IPv6.IsValid() {
		b.failAt("has neither ipv4 nor ipv6; the cluster needs an address, such as ipv4: 10.77.0.10/24", "vip")
		return
	}
	b.validateFamily("vip.ipv4", vip.IPv4, vip.IPv4Gateway, netip.Addr.Is4, "IPv4")
	b.validateFamily("vip.ipv6", vip.IPv6, vip.IPv6Gateway, netip.Addr.Is6, "IPv6")
	if vip.CloneMAC == nil {
		vip.CloneMAC = DefaultCloneMAC(vip.first())
		b.config.origins["vip.clone-mac"] = origin{label: fromDerived}
		return
	}
	switch first := vip.CloneMAC[0]; {
	case first&1 != 0:
		b.failAt(fmt.Sprintf("%v is a multicast address; the first byte must be even, and x2, x6, xa or xe", vip.CloneMAC), "vip.clone-mac")
	case first&2 == 0:
		b.failAt(fmt.Sprintf("%v is an address that a manufacturer gives; it must be a locally administered one, whose first byte is x2, x6, xa or xe (leave it out for %v)",
			vip.CloneMAC, DefaultCloneMAC(vip.first())), "vip.clone-mac")
	}
}

// first is the address from which the clone MAC is derived.
func (v *VIP) first() netip.Addr {
	if v.IPv4.IsValid() {
		return v.IPv4.Addr()
	}
	return v.IPv6.Addr()
}

func (b *builder) validateFamily(at string, vip netip.Prefix, gateway netip.Addr, ofFamily func(netip.Addr) bool, family string) {
	if !vip.IsValid() {
		if gateway.IsValid() {
			b.failAt(fmt.Sprintf("is set, but %s is not", at), at+"-gateway", at)
		}
		return
	}
	if !ofFamily(vip.Addr()) {
		b.failAt(fmt.Sprintf("%v is not an %s address", vip.Addr(), family), at)
		return
	}
	if what := notAHost(vip); what != "" {
		b.failAt(fmt.Sprintf("%v is %s; the VIP must be an address that a host can have", vip, what), at)
		return
	}
	if vip.Addr().IsLinkLocalUnicast() && vip.Addr().Is6() {
		b.failAt(fmt.Sprintf("%v is a link-local address; clients cannot use it without naming their own interface", vip.Addr()), at)
	}
	switch {
	case !gateway.IsValid():
	case !ofFamily(gateway):
		b.failAt(fmt.Sprintf("%v is not an %s address", gateway, family), at+"-gateway")
	case gateway == vip.Addr():
		b.failAt("is the VIP itself; it must be the router's own address", at+"-gateway", at)
	case gateway.Is6() && gateway.IsLinkLocalUnicast():
	case !vip.Contains(gateway):
		b.failAt(fmt.Sprintf("%v is not in the VIP's subnet %v", gateway, vip.Masked()), at+"-gateway", at)
	case notAHost(netip.PrefixFrom(gateway, vip.Bits())) != "":
		b.failAt(fmt.Sprintf("%v is %s", gateway, notAHost(netip.PrefixFrom(gateway, vip.Bits()))), at+"-gateway", at)
	}
}

// notAHost says why the address of a prefix cannot be a host's; "" if it can.
func notAHost(p netip.Prefix) string {
	a := p.Addr()
	switch {
	case a.IsUnspecified():
		return "the unspecified address"
	case a.IsLoopback():
		return "a loopback address"
	case a.IsMulticast():
		return "a multicast address"
	case a.Is4() && a.As4()[0] == 0:
		return "an address of 0.0.0.0/8, which means this network"
	case a.Is4() && a.As4()[0] >= 240:
		return "a reserved or broadcast address"
	case p.Bits() == 0:
		return "in a subnet that is the whole Internet"
	case p.Bits() >= a.BitLen()-1: // a single address, or a point-to-point link (RFC 3021, RFC 6164)
		return ""
	case a == p.Masked().Addr() && a.Is4():
		return "the network address of its subnet"
	case a == p.Masked().Addr():
		return "the router anycast address of its subnet (RFC 4291)"
	case a.Is4() && !p.Contains(a.Next()):
		return "the broadcast address of its subnet"
	}
	return ""
}

func (b *builder) validateManagement() {
	const at = "management.pattern"
	mode, p := b.config.Management.Mode, b.config.Management.Pattern
	switch {
	case mode != ManagementStatic && p.IsValid():
		b.failAt(fmt.Sprintf("is only for mode: static, and the mode is %s", mode), at, "management.mode")
	case mode != ManagementStatic:
	case !p.IsValid():
		b.failAt("is missing; mode static computes each node's address from it, such as pattern: 10.78.0.0/16", at, "management.mode")
	case p != p.Masked():
		b.failAt(fmt.Sprintf("%v has host bits, and each node fills them from its MAC; write %v", p, p.Masked()), at)
	case p.Addr().Is4() && (p.Bits() < 8 || p.Bits() > 24):
		b.failAt(fmt.Sprintf("the prefix length %d is out of range; allowed for IPv4: 8 to 24", p.Bits()), at)
	case p.Addr().Is6() && (p.Bits() < 16 || p.Bits() > 80):
		b.failAt(fmt.Sprintf("the prefix length %d is out of range; allowed for IPv6: 16 to 80", p.Bits()), at)
	case p.Addr().IsMulticast() || p.Addr().IsLoopback() || p.Addr().IsLinkLocalUnicast() || p.Addr().Is4() && (p.Addr().As4()[0] >= 240 || p.Addr().As4()[0] == 0):
		b.failAt(fmt.Sprintf("%v has no addresses that a host can have", p), at)
	}
}

// reserved are names that the log and the status use for the node's own parts.
var reserved = map[string]bool{"init": true, "engine": true, "kernel": true}

func (b *builder) validateServices() {
	names := map[string]string{}
	ports := map[Port]string{}
	for i := range b.config.Services {
		s, at := &b.config.Services[i], b.servicePath(i)
		if reserved[s.Name] {
			b.failAt(fmt.Sprintf("%q is the name of a part of the node; choose another", s.Name), at+".name")
		}
		if _, taken := names[s.Name]; taken {
			b.failAt(fmt.Sprintf("%q is the name of two services; each needs its own", s.Name), at+".name", names[s.Name])
		}
		names[s.Name] = at
		if p := s.Run[0]; !path.IsAbs(p) || path.Clean(p) != p || strings.HasSuffix(p, "/") {
			b.failAt(fmt.Sprintf("%s must be the full path of a program in the image, such as /bin/webd", quote(p)), at+".run")
		}
		for j, p := range s.Ports {
			other, taken := ports[p]
			if taken {
				what := "service " + strings.TrimPrefix(other, "services.") + " has it too"
				if other == at {
					what = "it is here twice"
				}
				b.failAt(fmt.Sprintf("%v is not free: %s", p, what), indexed(at+".ports", j), at+".ports", other+".ports")
			}
			ports[p] = at
		}
		b.validateHealth(&s.Health, at+".health")
	}
}

func (b *builder) validateHealth(h *Health, at string) {
	if h.HTTP != "" && h.TCP != "" {
		b.failAt("has both http and tcp; choose one", at, at+".http", at+".tcp")
	}
	if h.Timeout <= h.Interval {
		return
	}
	if b.config.origins[at+".timeout"].label == fromDefault {
		h.Timeout = h.Interval
		b.config.origins[at+".timeout"] = origin{label: fromDerived}
		return
	}
	b.failAt(fmt.Sprintf("%s is longer than the interval of %s, so checks would pile up", shortDuration(h.Timeout), shortDuration(h.Interval)), at+".timeout", at+".interval")
}

// Warnings are what is allowed and yet is likely a mistake.
func (c *Config) Warnings() []string {
	var w []string
	if c.Cluster.Key == demoKey {
		w = append(w, "cluster.key is the published key of the demo; "+newKey)
	}
	if len(c.Services) == 0 {
		w = append(w, "services is empty: the cluster answers ARP and ping, and nothing listens on the VIP")
	}
	for _, s := range c.Services {
		if len(s.Ports) == 0 {
			w = append(w, "services."+s.Name+" has no ports: its clients are spread as for affinity none")
		}
	}
	return w
}
