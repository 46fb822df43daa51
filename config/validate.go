package config

import (
	"fmt"
	"net/netip"
	"path"
	"slices"
	"strings"
)

// validate checks what no single value can tell: the values are all well
// formed and the defaults filled in. It also fills in the values that are
// derived from others.
func (b *builder) validate() {
	b.validateKeys()
	b.validateVIP()
	b.validateManagement()
	b.validatePolicy()
	b.validateServices()
	b.validatePorts()
}

func (b *builder) validateKeys() {
	const at = "cluster.accept-keys"
	c := &b.config.Cluster
	for i, k := range c.AcceptKeys {
		switch {
		case k == c.Key:
			b.failAt("is cluster.key, which is accepted anyway; for a change of keys, give the other one", indexed(at, i), at, "cluster.key")
		case slices.Index(c.AcceptKeys, k) < i:
			b.failAt("is here twice", indexed(at, i), at)
		}
	}
	if c.FlowKey == (Key{}) {
		c.FlowKey = c.Key
		b.config.origins["cluster.flow-key"] = origin{label: fromDerived}
	}
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

func (b *builder) validatePolicy() {
	p := &b.config.Policy
	agree := func(key, have, want string) {
		at := "policy." + key
		if b.config.origins[at].label == fromDefault {
			b.config.origins[at] = origin{label: fromDerived}
			return
		}
		if have != want {
			name := b.config.origins["policy.name"].where
			b.failAt(fmt.Sprintf("is %s, but policy.name %s (%s) stands for %s; leave one of them out", have, p.Name, name, want), at, "policy.name")
		}
	}
	if p.Name != "" {
		want := pairs[p.Name]
		agree("balance", string(p.Balance), string(want.balance))
		agree("affinity", string(p.Affinity), string(want.affinity))
		p.Balance, p.Affinity = want.balance, want.affinity
		return
	}
	for name, pair := range pairs {
		if p.Balance == pair.balance && p.Affinity == pair.affinity {
			p.Name = name
			b.config.origins["policy.name"] = origin{label: fromDerived}
		}
	}
}

// reserved are names that the log and the status use for the node's own parts.
var reserved = map[string]bool{"init": true, "engine": true, "kernel": true}

func (b *builder) validateServices() {
	names := map[string]string{}
	for i := range b.config.Services {
		s, at := &b.config.Services[i], b.servicePath(i)
		if reserved[s.Name] {
			b.failAt(fmt.Sprintf("%q is the name of a part of the node; choose another", s.Name), at+".name")
		}
		if _, taken := names[s.Name]; taken {
			b.failAt(fmt.Sprintf("%q is the name of two services; each needs its own", s.Name), at+".name", names[s.Name])
		}
		names[s.Name] = at
		b.validateProgram(s.Run, at+".run")
		b.validateBuild(s, at)
		if s.Affinity == "" {
			s.Affinity = b.config.Policy.Affinity
			b.config.origins[at+".affinity"] = origin{label: fromDerived}
		}
		b.validateHealth(&s.Health, at+".health")
	}
}

// validatePorts checks that no port has two owners.
func (b *builder) validatePorts() {
	type claim struct {
		PortRange
		owner string // path
		where string
	}
	var claims []claim
	check := func(ports []PortRange, owner string) {
		at := owner + ".ports"
		for i, p := range ports {
			for _, c := range claims {
				if !p.Overlaps(c.PortRange) {
					continue
				}
				what := "it is here twice"
				if p != c.PortRange {
					what = fmt.Sprintf("%v is here too", c.PortRange)
				}
				if c.owner != owner {
					what = fmt.Sprintf("%s has %v (%s)", nameOf(c.owner), c.PortRange, c.where)
				}
				b.failAt(fmt.Sprintf("%v is not free: %s", p, what), indexed(at, i), at, c.owner+".ports")
				break
			}
			o, _ := b.at(indexed(at, i))
			claims = append(claims, claim{p, owner, o.where})
		}
	}
	for i, s := range b.config.Services {
		check(s.Ports, b.servicePath(i))
		b.validateAPIPort(s.Ports, b.servicePath(i)+".ports")
	}
	for i, r := range b.config.Rules {
		check(r.Ports, indexed("rules", i))
	}
}

// validateAPIPort checks that the service leaves the API its port.
func (b *builder) validateAPIPort(ports []PortRange, at string) {
	api := b.config.Management.Port
	for i, p := range ports {
		if api != 0 && p.Overlaps(PortRange{uint16(api), uint16(api), "tcp"}) {
			b.failAt(fmt.Sprintf("%v is not free: %d/tcp is for the management API; give that another one (management.port), or none (0)", p, api), indexed(at, i), at, "management.port")
		}
	}
}

// nameOf is how a message calls what is at a path: "service web", "rules[0]".
func nameOf(path string) string {
	if name, ok := strings.CutPrefix(path, "services."); ok {
		return "service " + name
	}
	return path
}

func (b *builder) validateProgram(command []string, at string) {
	if p := command[0]; !path.IsAbs(p) || path.Clean(p) != p || strings.HasSuffix(p, "/") {
		b.failAt(fmt.Sprintf("%s must be the full path of a program in the image, such as /bin/webd", quote(p)), at)
	}
}

// validateBuild checks that what is built has one place to go to, and that an
// import path says which version it means.
func (b *builder) validateBuild(s *Service, at string) {
	if s.Build == "" {
		return
	}
	if dir, name := path.Split(s.Run[0]); dir != "/bin/" {
		b.failAt(fmt.Sprintf("%s is not directly in /bin, where what build makes has to go; write /bin/%s", quote(s.Run[0]), name), at+".run", at+".build")
	}
	for _, o := range b.config.Services {
		if o.Name != s.Name && o.Build != "" && o.Build != s.Build && o.Run[0] == s.Run[0] {
			b.failAt(fmt.Sprintf("the program of service %s, of another build, goes to %s as well; choose another name", o.Name, o.Run[0]), at+".run", at+".build")
			return
		}
	}
	if IsPath(s.Build) {
		return
	}
	switch module, version, versioned := strings.Cut(s.Build, "@"); {
	case !strings.Contains(module, "/") || strings.ContainsAny(module, " \\"):
		b.failAt(fmt.Sprintf("%s is neither a path nor an import path; for a folder or file beside cluster.yaml write ./%s", quote(s.Build), s.Build), at+".build")
	case !versioned || version == "" || version == "latest":
		b.failAt(fmt.Sprintf("%s does not say which version, so every build might be another program; write %s@v1.2.3", quote(s.Build), module), at+".build")
	}
}

// IsPath tells whether a build names a folder or file, and not an import path.
func IsPath(build string) bool {
	return path.IsAbs(build) || build == "." || build == ".." || strings.HasPrefix(build, "./") || strings.HasPrefix(build, "../")
}

func (b *builder) validateHealth(h *Health, at string) {
	var checks []string
	for _, c := range []struct {
		name string
		set  bool
	}{{"http", h.HTTP != ""}, {"tcp", h.TCP != ""}, {"exec", len(h.Exec) > 0}} {
		if c.set {
			checks = append(checks, c.name)
		}
	}
	if len(checks) > 1 {
		b.failAt(fmt.Sprintf("has both %s and %s; choose one", checks[0], checks[1]), at, at+"."+checks[0], at+"."+checks[1])
	}
	if len(h.Exec) > 0 {
		b.validateProgram(h.Exec, at+".exec")
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
