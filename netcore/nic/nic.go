// Package nic finds the network interface that carries the cluster and follows
// it. One configuration file serves every machine, so the interface is named by
// what it is (driver, PCI address, permanent address), not by what the kernel
// happened to call it; and it may appear, or get its carrier, after the program
// has started.
//
// Sources: rtnetlink(7), the kernel's Documentation/networking/operstates.rst
// and netdevices.rst, ethtool's ETHTOOL_GDRVINFO.
package nic

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"path"
	"slices"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"clonecluster/config"
)

// NIC is one interface as the kernel describes it.
type NIC struct {
	Name   string
	Index  int
	Driver string // "virtio_net", "e1000e"; empty if the driver does not say
	PCI    string // "0000:03:00.0"; empty if it is on no PCI bus
	// MAC is the address in use now, PermanentMAC the one the hardware was made
	// with (equal to MAC where a driver knows no permanent address, like veth).
	MAC, PermanentMAC net.HardwareAddr
	MTU               int // octets of payload
	Up                bool
	Carrier           bool

	kind   string // "" for hardware, else the kernel's name of the virtual kind
	ether  bool
	master int    // index of the bridge or bond it is a port of
	of     string // what that is, if known: "br0, a bridge"
}

// ErrNoNIC is matched by the error of Select when no interface fits.
var ErrNoNIC = errors.New("no usable network interface")

// ErrPort is matched as well if one that fits otherwise is a port of a bridge, bond
// or team.
var ErrPort = errors.New("the network interface is a port of another device")

// A Refusal says why an interface was not taken.
type Refusal struct {
	NIC    NIC
	Reason string
	port   bool // and nothing else speaks against it
}

// NoNICError lists what was there. It matches ErrNoNIC.
type NoNICError struct {
	Waited   time.Duration
	Refusals []Refusal
}

func (e *NoNICError) Error() string {
	var b strings.Builder
	b.WriteString(ErrNoNIC.Error())
	if e.Waited > 0 {
		fmt.Fprintf(&b, " after %v", e.Waited)
	}
	if len(e.Refusals) == 0 {
		b.WriteString(": none seen (is the driver in the kernel?)")
	}
	for _, r := range e.Refusals {
		fmt.Fprintf(&b, "; %s (driver %s, pci %s, mac %s): %s", r.NIC.Name,
			cmp.Or(r.NIC.Driver, "-"), cmp.Or(r.NIC.PCI, "-"), cmp.Or(r.NIC.PermanentMAC.String(), "-"), r.Reason)
	}
	return b.String()
}

// Is reports whether target is ErrNoNIC, or ErrPort and that is why.
func (e *NoNICError) Is(target error) bool {
	return target == ErrNoNIC || target == ErrPort && slices.ContainsFunc(e.Refusals, func(r Refusal) bool { return r.port })
}

// Find returns the interface that Select would take as things are, or a *NoNICError.
// It waits for nothing and changes nothing: of an interface that is down it is not
// known whether it has a carrier.
func Find(cfg config.Interface) (NIC, error) {
	nics, err := List()
	if err != nil {
		return NIC{}, err
	}
	best, refusals := choose(nics, cfg)
	if best < 0 {
		return NIC{}, &NoNICError{Refusals: refusals}
	}
	return nics[best], nil
}

// Select returns the interface that cfg asks for. It waits up to
// cfg.WaitCarrier for one to appear and to have a carrier, and then takes one
// without a carrier if that is all there is; otherwise the error is a
// *NoNICError. An interface that is down shows no carrier, so matching ones are
// set up to find out, and set down again if they are not chosen.
func Select(ctx context.Context, cfg config.Interface) (NIC, error) {
	start := time.Now()
	ctxWait, stop := context.WithTimeout(ctx, cfg.WaitCarrier)
	defer stop()

	w, err := watch()
	if err != nil {
		return NIC{}, err
	}
	defer w.close()

	var raised []NIC
	chosen := -1
	defer func() {
		for _, n := range raised {
			if n.Index != chosen {
				_ = setUp(n.Index, false)
			}
		}
	}()
	for {
		nics, err := List()
		if err != nil {
			return NIC{}, err
		}
		expired := ctxWait.Err() != nil
		best, refusals := choose(nics, cfg)
		if best >= 0 && (nics[best].Carrier || (expired && nics[best].Up)) {
			chosen = nics[best].Index
			return nics[best], nil
		}
		changed := false
		for _, n := range nics {
			tried := slices.ContainsFunc(raised, func(r NIC) bool { return r.Index == n.Index })
			if n.Up || tried || refuse(n, cfg) != "" {
				continue
			}
			if err := setUp(n.Index, true); err != nil {
				return NIC{}, fmt.Errorf("setting %s up to look for its carrier: %w", n.Name, err)
			}
			raised = append(raised, n)
			changed = true
		}
		if changed {
			continue
		}
		if expired {
			if err := ctx.Err(); err != nil {
				return NIC{}, err
			}
			return NIC{}, &NoNICError{Waited: time.Since(start).Round(time.Millisecond), Refusals: refusals}
		}
		if _, err := w.wait(ctxWait); err != nil && ctxWait.Err() == nil {
			return NIC{}, err
		}
	}
}

// choose is Select's decision: the index of the best match, or -1, and why the
// others are out.
func choose(nics []NIC, cfg config.Interface) (int, []Refusal) {
	best := -1
	var refusals []Refusal
	for i, n := range nics {
		if reason := refuse(n, cfg); reason != "" {
			free := n
			free.master = 0
			refusals = append(refusals, Refusal{n, reason, n.master != 0 && refuse(free, cfg) == ""})
			continue
		}
		if best < 0 || better(n, nics[best]) {
			best = i
		}
	}
	return best, refusals
}

// better orders matches: carrier first, then the lowest PCI address, then the
// kernel's order.
func better(a, b NIC) bool {
	if a.Carrier != b.Carrier {
		return a.Carrier
	}
	if (a.PCI == "") != (b.PCI == "") {
		return a.PCI != ""
	}
	return cmp.Or(strings.Compare(a.PCI, b.PCI), cmp.Compare(a.Index, b.Index)) < 0
}

// refuse returns why an interface cannot be the one, or "".
func refuse(n NIC, cfg config.Interface) string {
	byName := cfg.Name != "" && !strings.ContainsAny(cfg.Name, `*?[\`) && cfg.Name == n.Name
	switch {
	case !n.ether:
		return "not Ethernet"
	case n.kind == "veth" && !byName:
		return "a veth is taken only when it is named in full"
	case n.kind != "" && n.kind != "veth":
		return "not hardware but a " + n.kind
	case n.master != 0:
		return "a port of " + cmp.Or(n.of, fmt.Sprintf("interface %d (bridge or bond)", n.master))
	case len(n.MAC) != 6 || n.MAC[0]&1 != 0 || bytes.Equal(n.MAC, make([]byte, 6)):
		return "has no unicast address"
	}
	for _, c := range []struct{ what, glob, value string }{
		{"name", cfg.Name, n.Name},
		{"driver", cfg.Driver, n.Driver},
		{"pci", cfg.PCI, n.PCI},
		{"mac", strings.ToLower(cfg.MAC), n.PermanentMAC.String()},
	} {
		if c.glob == "" {
			continue
		}
		if ok, err := path.Match(c.glob, c.value); err != nil {
			return fmt.Sprintf("interface.%s %q is no valid pattern", c.what, c.glob)
		} else if !ok {
			return fmt.Sprintf("%s %q does not match %q", c.what, c.value, c.glob)
		}
	}
	return ""
}

// List returns every interface of the current network namespace.
func List() ([]NIC, error) {
	links, err := netlink.LinkList()
	if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
		return nil, fmt.Errorf("listing network interfaces: %w", err)
	}
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("opening a socket for ethtool: %w", err)
	}
	defer unix.Close(fd)
	nics := make([]NIC, 0, len(links))
	for _, l := range links {
		n := fromLink(l)
		if info, err := unix.IoctlGetEthtoolDrvinfo(fd, n.Name); err == nil {
			n.Driver = unix.ByteSliceToString(info.Driver[:])
			n.PCI = pciAddress(unix.ByteSliceToString(info.Bus_info[:]))
		}
		for _, m := range links {
			if a := m.Attrs(); n.master != 0 && a.Index == n.master {
				n.of = fmt.Sprintf("%s, a %s", a.Name, m.Type())
			}
		}
		nics = append(nics, n)
	}
	return nics, nil
}

// ByIndex returns one interface; the error is a netlink.LinkNotFoundError if it
// is gone.
func ByIndex(index int) (NIC, error) {
	l, err := netlink.LinkByIndex(index)
	if err != nil {
		return NIC{}, fmt.Errorf("reading interface %d: %w", index, err)
	}
	return fromLink(l), nil
}

func fromLink(l netlink.Link) NIC {
	a := l.Attrs()
	n := NIC{
		Name: a.Name, Index: a.Index, MTU: a.MTU, MAC: a.HardwareAddr, PermanentMAC: a.PermHWAddr,
		Up:      a.RawFlags&unix.IFF_UP != 0,
		Carrier: a.RawFlags&unix.IFF_LOWER_UP != 0,
		kind:    l.Type(),
		// A loopback has an all-zero Ethernet-like address but its own type.
		ether:  a.EncapType == "ether",
		master: a.MasterIndex,
	}
	if n.kind == "device" {
		n.kind = ""
	}
	if len(n.PermanentMAC) == 0 {
		n.PermanentMAC = n.MAC
	}
	return n
}

// pciAddress returns ethtool's bus_info if it is a PCI address
// (domain:bus:device.function), else "".
func pciAddress(bus string) string {
	var domain, b, dev, fn uint
	if n, _ := fmt.Sscanf(bus, "%4x:%2x:%2x.%1x", &domain, &b, &dev, &fn); n != 4 {
		return ""
	}
	return bus
}

func setUp(index int, up bool) error {
	link := &netlink.Device{LinkAttrs: netlink.LinkAttrs{Index: index}}
	if up {
		return netlink.LinkSetUp(link)
	}
	return netlink.LinkSetDown(link)
}

// watcher tells when the kernel reports a change of an interface.
type watcher struct {
	updates chan netlink.LinkUpdate
	done    chan struct{}
}

func watch() (*watcher, error) {
	w := &watcher{make(chan netlink.LinkUpdate, 64), make(chan struct{})}
	ns := netns.None()
	err := netlink.LinkSubscribeWithOptions(w.updates, w.done, netlink.LinkSubscribeOptions{
		Namespace: &ns, ErrorCallback: func(error) {},
	})
	if err != nil {
		return nil, fmt.Errorf("subscribing to interface changes: %w", err)
	}
	return w, nil
}

// wait gives the index of an interface that has changed; 0 if changes may have
// been missed, because the kernel had no room for them and the subscription
// had to be made anew.
func (w *watcher) wait(ctx context.Context) (index int, err error) {
	select {
	case <-ctx.Done():
		return 0, ctx.Err()
	case u, ok := <-w.updates:
		if ok {
			return u.Attrs().Index, nil
		}
	}
	close(w.done)
	again, err := watch()
	if err != nil {
		return 0, err
	}
	*w = *again
	return 0, nil
}

func (w *watcher) close() {
	close(w.done)
	for range w.updates { // the subscription's goroutine ends by closing it
	}
}

// ErrRemoved is matched by the error of Follow when the interface is gone.
var ErrRemoved = errors.New("the interface was removed")

// Follow calls changed with the state of the interface, once at the start and
// then whenever the kernel reports a change, until ctx ends (nil) or the
// interface is gone (ErrRemoved).
func Follow(ctx context.Context, index int, changed func(NIC)) error {
	w, err := watch()
	if err != nil {
		return err
	}
	defer w.close()
	for {
		n, err := ByIndex(index)
		if errors.As(err, &netlink.LinkNotFoundError{}) {
			return ErrRemoved
		}
		if err != nil {
			return err
		}
		changed(n)
		for at := -1; at != index && at != 0; {
			if at, err = w.wait(ctx); ctx.Err() != nil {
				return nil
			} else if err != nil {
				return err
			}
		}
	}
}
