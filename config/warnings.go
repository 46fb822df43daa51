package config

import (
	"cmp"
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"slices"
	"strconv"
	"strings"
)

// Warnings are what is allowed and yet is likely a mistake.
func (c *Config) Warnings() []string {
	var w []string
	w = append(w, c.keyWarnings()...)
	w = append(w, c.weightWarnings()...)
	if len(c.Services) == 0 {
		w = append(w, "services is empty: the cluster answers ARP and ping, and nothing listens on the VIP")
	}
	for _, s := range c.Services {
		if len(s.Ports) == 0 {
			w = append(w, fmt.Sprintf("services.%s has no ports: its clients are spread as for affinity %s, that of the policy", s.Name, c.Policy.Affinity))
		}
		w = append(w, s.portWarnings()...)
	}
	for i, r := range c.Rules {
		for _, p := range r.Ports {
			if r.Affinity == AffinityDisabled && p.First <= lastLocalPort && p.Last >= firstLocalPort {
				w = append(w, fmt.Sprintf("rules[%d] disables %v, and nodes open connections from ports %d to %d: those from the VIP will get no answer", i, p, firstLocalPort, lastLocalPort))
			}
		}
	}
	return w
}

// portWarnings compares the ports of the image's own web service, which are said in up
// to three places. What other programs listen on is not known.
func (s *Service) portWarnings() []string {
	if len(s.Run) == 0 || s.Run[0] != Webd {
		return nil
	}
	var w []string
	listens := "80"
	for i, arg := range s.Run {
		listen, is := strings.CutPrefix(arg, "--listen=")
		if arg == "--listen" && i+1 < len(s.Run) {
			listen, is = s.Run[i+1], true
		}
		if _, port, err := net.SplitHostPort(listen); is && err == nil {
			listens = port
		}
	}
	port, err := strconv.ParseUint(listens, 10, 16)
	if err != nil {
		return nil // it says so itself
	}
	if len(s.Ports) > 0 && !slices.ContainsFunc(s.Ports, func(r PortRange) bool {
		return r.Protocol == "tcp" && uint64(r.First) <= port && port <= uint64(r.Last)
	}) {
		w = append(w, fmt.Sprintf("services.%s listens on port %d, which is not among its ports", s.Name, port))
	}
	for key, at := range map[string]string{"http": hostPort(s.Health.HTTP), "tcp": s.Health.TCP} {
		if a, err := netip.ParseAddrPort(at); err == nil && uint64(a.Port()) != port {
			w = append(w, fmt.Sprintf("services.%s.health.%s asks port %d, and the service listens on port %d", s.Name, key, a.Port(), port))
		}
	}
	return w
}

// hostPort gives the address and port of an http URL, and "" of none.
func hostPort(raw string) string {
	u, err := url.Parse(raw)
	if err != nil || u.Host == "" {
		return ""
	}
	return net.JoinHostPort(u.Hostname(), cmp.Or(u.Port(), "80"))
}

// Webd is the web service that every image has; it listens on port 80 unless told otherwise.
const Webd = "/bin/webd"

// The kernel's ip_local_port_range, unless somebody has changed it.
const firstLocalPort, lastLocalPort = 32768, 60999

// PublishedKey tells whether the cluster's key is that of the demo, which everybody has.
func (c *Config) PublishedKey() bool { return c.Cluster.Key == demoKey }

func (c *Config) keyWarnings() []string {
	var w []string
	published := func(path, but string) {
		w = append(w, path+" is the published key of the demo"+but+"; "+newKey)
	}
	if c.PublishedKey() {
		published("cluster.key", "")
	} else if c.Cluster.FlowKey == demoKey {
		published("cluster.flow-key", ", with which anybody can make connections that all fall on one node")
	}
	for i, k := range c.Cluster.AcceptKeys {
		if k == demoKey {
			published(indexed("cluster.accept-keys", i), ", and everybody's frames are accepted")
		}
	}
	if len(c.Cluster.AcceptKeys) > 0 && c.origins["cluster.flow-key"].label == fromDerived {
		w = append(w, "cluster.accept-keys without cluster.flow-key: once cluster.key is changed, nodes with the old and the new one would take the same flows twice; give all nodes the old key as flow-key before")
	}
	return w
}

// weightWarnings finds the entries that no machine can meet.
func (c *Config) weightWarnings() []string {
	var w []string
	seen := map[string]int{}
	all := -1 // the entry that takes what is left
	for i, entry := range c.Policy.Weights {
		pattern := strings.ToLower(entry.MAC)
		at := fmt.Sprintf("policy.weights[%d]", i)
		first, again := seen[pattern]
		switch {
		case all >= 0:
			w = append(w, fmt.Sprintf("%s never counts: policy.weights[%d] matches every machine before", at, all))
			continue
		case again:
			w = append(w, fmt.Sprintf("%s never counts: policy.weights[%d] has the same pattern", at, first))
		case !strings.ContainsAny(pattern, `*?[\`):
			if _, err := net.ParseMAC(pattern); err != nil || len(pattern) != len("02:cc:0a:4d:00:0a") {
				w = append(w, fmt.Sprintf("%s never counts: no MAC address is %s; for those that begin so, put * behind it", at, quote(entry.MAC)))
			}
		case strings.Trim(pattern, "*") == "":
			all = i
		}
		seen[pattern] = i
	}
	return w
}
