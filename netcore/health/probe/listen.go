package probe

import (
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"clonecluster/netcore/sockdiag"
)

// PortRange are the TCP ports from Lo to Hi, both included.
type PortRange struct{ Lo, Hi uint16 }

func (r PortRange) String() string {
	if r.Lo == r.Hi {
		return strconv.Itoa(int(r.Lo)) + "/tcp"
	}
	return fmt.Sprintf("%d-%d/tcp", r.Lo, r.Hi)
}

func (r PortRange) has(port uint16) bool { return r.Lo <= port && port <= r.Hi }

// Listen looks whether somebody listens on the ports, at one of the addresses or
// at a wildcard address. The error is a reason for the log.
//
// Each range of a single port needs its listener. In longer ranges a service may
// open ports when it needs them, as FTP does for its data, so these need none if
// there are single ports to go by, and otherwise one listener in all. A listener
// of either IP version counts for both: one at :: may take IPv4 as well, and a
// service may be meant for one version alone.
func Listen(ports []PortRange, addresses []netip.Addr) error {
	return listen(sockdiag.EachListener, ports, addresses)
}

func listen(each func(func(netip.AddrPort)) error, ports []PortRange, addresses []netip.Addr) error {
	heard := make([]bool, len(ports))
	err := each(func(at netip.AddrPort) {
		if a := at.Addr(); !a.IsUnspecified() && !slices.Contains(addresses, a) {
			return
		}
		for i, r := range ports {
			heard[i] = heard[i] || r.has(at.Port())
		}
	})
	if err != nil {
		return err
	}
	return missing(ports, heard)
}

// missing is the error for the ranges that lack a listener they need.
func missing(ports []PortRange, heard []bool) error {
	singles := false
	for i, r := range ports {
		if r.Lo != r.Hi {
			continue
		}
		singles = true
		if !heard[i] {
			return fmt.Errorf("nobody listens on %v", r)
		}
	}
	if singles || len(ports) == 0 || slices.Contains(heard, true) {
		return nil
	}
	return fmt.Errorf("nobody listens on %s", strings.Trim(fmt.Sprint(ports), "[]"))
}
