package netnstest

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"
)

// A Direction is one of the two of a cable.
type Direction string

// The directions, named as tc(8) names them at the switch's port.
const (
	FromHost Direction = "ingress"
	ToHost   Direction = "egress"
)

// Cut makes a host's cable lose every frame in one direction, or, with an
// EtherType other than 0, those that have it. Carriers stay. It may be called
// several times; Mend undoes it all. The capture still has what is lost on its
// way from the host.
func (b *Bed) Cut(h *Host, d Direction, etherType uint16) {
	b.tb.Helper()
	// Frames are dropped by sending them into a cable whose far end is down: a
	// kernel may lack the action that drops, and netem.
	if !b.sink {
		b.Switch.Run("ip", "link", "add", "sink", "type", "veth", "peer", "name", "sink-end")
		b.Switch.Run("ip", "link", "set", "sink", "up")
		b.sink = true
	}
	if !slices.Contains(b.cut, h.Name) {
		b.Switch.Run("tc", "qdisc", "add", "dev", h.Name, "clsact")
		b.cut = append(b.cut, h.Name)
	}
	protocol := "all"
	if etherType != 0 {
		protocol = fmt.Sprintf("%#04x", etherType)
	}
	b.Switch.Run("tc", "filter", "add", "dev", h.Name, string(d), "protocol", protocol,
		"u32", "match", "u32", "0", "0", "action", "mirred", "egress", "redirect", "dev", "sink")
}

// Mend undoes every Cut of a host.
func (b *Bed) Mend(h *Host) {
	b.tb.Helper()
	b.Switch.Run("tc", "qdisc", "del", "dev", h.Name, "clsact")
	b.cut = slices.DeleteFunc(b.cut, func(name string) bool { return name == h.Name })
}

// Part moves hosts to a switch of their own, br1, at once and with their
// carriers kept: the segment is in two parts. Heal undoes it.
func (b *Bed) Part(hosts ...*Host) {
	b.tb.Helper()
	if b.capture.second.Load() == 0 {
		b.Switch.Run("ip", "link", "add", "br1", "type", "bridge")
		var index int32
		if _, err := fmt.Sscan(b.Switch.Run("cat", "/sys/class/net/br1/ifindex"), &index); err != nil {
			b.tb.Fatalf("reading the index of br1: %v", err)
		}
		b.capture.second.Store(index)
		b.Switch.Run("ip", "link", "set", "br1", "up")
	}
	b.rewire("br1", hosts)
	b.parted = append(b.parted, hosts...)
}

// Heal joins the parts again.
func (b *Bed) Heal() {
	b.tb.Helper()
	b.rewire("br0", b.parted)
	b.parted = nil
}

// rewire moves the ports of hosts to a bridge in one go.
func (b *Bed) rewire(bridge string, hosts []*Host) {
	b.tb.Helper()
	var batch strings.Builder
	for _, h := range hosts {
		fmt.Fprintf(&batch, "link set %s master %s\n", h.Name, bridge)
	}
	file := filepath.Join(b.Dir, "rewire")
	if err := os.WriteFile(file, []byte(batch.String()), 0o600); err != nil {
		b.tb.Fatal(err)
	}
	b.Switch.Run("ip", "-batch", file)
}

// PowerOff ends a host as a power cut does: nothing that runs there gets to say
// a last word. The last started program goes first. It gives the time before
// the first was gone.
func (h *Host) PowerOff() time.Time {
	h.tb.Helper()
	h.mu.Lock()
	processes := slices.Clone(h.processes)
	h.processes = nil
	h.mu.Unlock()
	slices.Reverse(processes)
	at := time.Now()
	for i, p := range processes {
		p.Signal(syscall.SIGKILL)
		if i == 0 {
			h.bed.Unplug(h) // before the kernel ends the others' connections
		}
	}
	for _, p := range processes {
		<-p.done
	}
	return at
}

// PowerOn gives a host that was powered off a kernel that knows nothing, and
// its cables back. Nothing runs on it.
func (h *Host) PowerOn() {
	h.tb.Helper()
	for _, c := range h.cables {
		h.bed.Switch.Run("ip", "link", "del", c.port)
	}
	h.bed.run("ip", "netns", "del", h.NS)
	h.bed.run("ip", "netns", "add", h.NS)
	h.Run("ip", "link", "set", "lo", "up")
	for i := range h.cables {
		if h.cables[i].device == "eth0" {
			h.cables[i].mac = h.MAC
		}
		h.bed.connect(h, h.cables[i])
	}
}
