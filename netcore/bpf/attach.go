package bpf

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/features"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// ErrUnsupported is matched by the errors that say what the kernel lacks.
var ErrUnsupported = errors.New("not supported by this kernel")

// An UnsupportedError names something that the kernel lacks.
type UnsupportedError struct {
	What  string // "bpf_loop"
	Since string // the first Linux that has it, "5.17"; empty: it was configured without
	Err   error
}

func (e *UnsupportedError) Error() string {
	if e.Since == "" {
		return fmt.Sprintf("the kernel has no %s: %v", e.What, e.Err)
	}
	return fmt.Sprintf("the kernel has no %s, which is in Linux %s and later: %v", e.What, e.Since, e.Err)
}

// Is reports whether target is ErrUnsupported.
func (e *UnsupportedError) Is(target error) bool { return target == ErrUnsupported }

// Unwrap gives what the kernel said.
func (e *UnsupportedError) Unwrap() error { return e.Err }

// Probe asks the kernel for everything that the programs need. The error lists all that
// it lacks, each an *UnsupportedError.
func Probe() error {
	var errs []error
	for _, need := range []struct {
		what, since string
		probe       func() error
	}{
		{"BPF programs at the traffic control", "4.1", func() error { return features.HaveProgramType(ebpf.SchedCLS) }},
		{"maps that a process can map (BPF_F_MMAPABLE)", "5.5", func() error { return features.HaveMapFlag(features.BPF_F_MMAPABLE) }},
		{"BPF ring buffers", "5.8", func() error { return features.HaveMapType(ebpf.RingBuf) }},
		{"bpf_loop", "5.17", func() error { return features.HaveProgramHelper(ebpf.SchedCLS, asm.FnLoop) }},
		{"look-ups of sockets by BPF programs", "5.2", func() error { return features.HaveProgramHelper(ebpf.SchedCLS, asm.FnSkcLookupTcp) }},
		{"checks of SYN cookies by BPF programs", "5.2", func() error { return features.HaveProgramHelper(ebpf.SchedCLS, asm.FnTcpCheckSyncookie) }},
		{"XDP with frames in several buffers (xdp.frags)", "5.18", func() error { return features.HaveProgramHelper(ebpf.XDP, asm.FnXdpLoadBytes) }},
	} {
		switch err := need.probe(); {
		case errors.Is(err, ebpf.ErrNotSupported):
			errs = append(errs, &UnsupportedError{need.what, need.since, err})
		case errors.Is(err, unix.EPERM):
			return fmt.Errorf("BPF programs may not be loaded here (CAP_BPF, CAP_PERFMON and CAP_NET_ADMIN): %w", err)
		case err != nil:
			return fmt.Errorf("asking the kernel for %s: %w", need.what, err)
		}
	}
	return errors.Join(errs...)
}

// CheckPins reports whether a folder is on a BPF file system, or would be.
func CheckPins(folder string) error {
	for dir := folder; ; dir = filepath.Dir(dir) {
		var fs unix.Statfs_t
		err := unix.Statfs(dir, &fs)
		if errors.Is(err, os.ErrNotExist) && dir != filepath.Dir(dir) {
			continue
		}
		if err != nil {
			return fmt.Errorf("looking for a BPF file system: %w", &os.PathError{Op: "statfs", Path: dir, Err: err})
		}
		if fs.Type != unix.BPF_FS_MAGIC {
			return fmt.Errorf("%s is not on a BPF file system, where programs outlive the engine: mount -t bpf bpf /sys/fs/bpf", dir)
		}
		return nil
	}
}

// Hook is a place in the kernel where frames pass a program.
type Hook string

// The hooks.
const (
	XDP    Hook = "XDP"    // in the driver, before the frame is a packet
	TCX    Hook = "tcx"    // on the packet; Linux 6.6
	Clsact Hook = "clsact" // the same for older kernels
)

// The names of the attachments, which are those of their pins.
const (
	ingressXDP = "ingress_xdp"
	ingressTC  = "ingress_tc"
	egressTC   = "egress_tc"
	guardTC    = "guard_tc"

	directedIn  = "directed_in"
	directedOut = "directed_out"
)

// AttachGuard has what leaves by the NIC guarded.
func (f *Filter) AttachGuard(ifindex int) error {
	_, err := f.attachTC(guardTC, ifindex, f.objects.GuardTc, true)
	return err
}

// AttachNIC has the NIC's frames judged, by XDP in the driver if xdp is set. What a former
// process attached there is replaced between two frames. The error is an *UnsupportedError if the driver has no XDP.
func (f *Filter) AttachNIC(ifindex int, xdp bool) (Hook, error) {
	if !xdp {
		hook, err := f.attachTC(ingressTC, ifindex, f.objects.IngressTc, false)
		if err != nil {
			return "", err
		}
		return hook, f.end(ingressXDP)
	}
	err := f.keep(ingressXDP, ifindex, f.objects.IngressXdp, func() (link.Link, error) {
		return link.AttachXDP(link.XDPOptions{Program: f.objects.IngressXdp, Interface: ifindex, Flags: link.XDPDriverMode})
	})
	switch {
	case errors.Is(err, unix.EBUSY), errors.Is(err, unix.EEXIST):
		return "", &UnsupportedError{What: "room for an XDP program on this NIC, which has another (ip link shows it)", Err: err}
	case err != nil:
		return "", &UnsupportedError{What: "XDP in this NIC's driver", Err: err}
	}
	return XDP, errors.Join(f.end(ingressTC), detachClsact(ingressTC, ifindex, netlink.HANDLE_MIN_INGRESS))
}

// AttachClone has the frames judged that leave by clone0.
func (f *Filter) AttachClone(ifindex int) (Hook, error) {
	return f.attachTC(egressTC, ifindex, f.objects.EgressTc, true)
}

// Detach takes the programs off the NIC, and forgets the table. Clone0 has to be gone.
func (f *Filter) Detach() error {
	errs := []error{DetachClsact(0)}
	for _, name := range []string{ingressXDP, ingressTC, egressTC, guardTC, directedIn, directedOut} {
		errs = append(errs, f.end(name))
	}
	if f.pins != "" {
		errs = append(errs, os.RemoveAll(f.pins))
		_ = os.Remove(filepath.Dir(f.pins)) // the last of several engines; it is not empty before
	}
	return errors.Join(errs...)
}

func (f *Filter) attachTC(name string, ifindex int, program *ebpf.Program, egress bool) (Hook, error) {
	at, parent := ebpf.AttachTCXIngress, uint32(netlink.HANDLE_MIN_INGRESS)
	if egress {
		at, parent = ebpf.AttachTCXEgress, netlink.HANDLE_MIN_EGRESS
	}
	err := f.keep(name, ifindex, program, func() (link.Link, error) {
		if f.noTCX {
			return nil, ebpf.ErrNotSupported
		}
		return link.AttachTCX(link.TCXOptions{Interface: ifindex, Program: program, Attach: at, Anchor: link.Head()})
	})
	if err == nil {
		return TCX, nil
	}
	if !errors.Is(err, ebpf.ErrNotSupported) {
		return "", fmt.Errorf("attaching %s: %w", name, err)
	}
	qdisc := &netlink.Clsact{QdiscAttrs: netlink.QdiscAttrs{LinkIndex: ifindex, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_CLSACT}}
	if err := netlink.QdiscAdd(qdisc); err != nil && !errors.Is(err, unix.EEXIST) {
		return "", fmt.Errorf("adding the queueing discipline clsact: %w", err)
	}
	if err := netlink.FilterReplace(clsactFilter(name, ifindex, parent, program.FD())); err != nil {
		return "", fmt.Errorf("attaching %s to clsact: %w", name, err)
	}
	return Clsact, nil
}

// clsactHandle tells our filter from others.
const clsactHandle = 0xcc

func clsactFilter(name string, ifindex int, parent uint32, fd int) *netlink.BpfFilter {
	return &netlink.BpfFilter{
		FilterAttrs: netlink.FilterAttrs{LinkIndex: ifindex, Parent: parent, Handle: clsactHandle, Protocol: unix.ETH_P_ALL, Priority: 1},
		Fd:          fd, Name: "clonecluster_" + name, DirectAction: true,
	}
}

// DetachClsact takes the programs off all interfaces but one (0: all) that have them by
// clsact, which no pin names.
func DetachClsact(but int) error {
	links, err := netlink.LinkList()
	if err != nil {
		return fmt.Errorf("listing the interfaces: %w", err)
	}
	var errs []error
	for _, l := range links {
		if index := l.Attrs().Index; index != but {
			errs = append(errs, detachClsact(ingressTC, index, netlink.HANDLE_MIN_INGRESS), detachClsact(guardTC, index, netlink.HANDLE_MIN_EGRESS))
		}
	}
	return errors.Join(errs...)
}

// detachClsact removes our filter, and clsact if nothing else is there.
func detachClsact(name string, ifindex int, parent uint32) error {
	dev := &netlink.Device{LinkAttrs: netlink.LinkAttrs{Index: ifindex}}
	ours, others := false, false
	for _, at := range []uint32{netlink.HANDLE_MIN_INGRESS, netlink.HANDLE_MIN_EGRESS} {
		filters, err := netlink.FilterList(dev, at)
		if err != nil {
			return nil // without clsact there are none
		}
		for _, one := range filters {
			b, is := one.(*netlink.BpfFilter)
			if is && at == parent && b.Handle == clsactHandle && b.Name == "clonecluster_"+name {
				ours = true
			} else {
				others = true
			}
		}
	}
	if !ours {
		return nil
	}
	if !others {
		return netlink.QdiscDel(&netlink.Clsact{QdiscAttrs: netlink.QdiscAttrs{LinkIndex: ifindex, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_CLSACT}})
	}
	return netlink.FilterDel(clsactFilter(name, ifindex, parent, -1))
}

// keep replaces the program of a link that a former process pinned, or makes the link
// and pins it.
func (f *Filter) keep(name string, ifindex int, program *ebpf.Program, attach func() (link.Link, error)) error {
	path := filepath.Join(f.pins, name)
	if f.pins != "" {
		if pinned, err := link.LoadPinnedLink(path, nil); err == nil {
			if at, err := ifindexOf(pinned); err == nil && at == ifindex {
				f.links[name] = pinned // so that it outlives its pin, too
				if err := pinned.Update(program); err != nil {
					return fmt.Errorf("replacing %s: %w", name, err)
				}
				return nil
			}
			defer pinned.Close()
			if err := pinned.Unpin(); err != nil { // of a NIC that is gone
				return err
			}
		}
	}
	l, err := attach()
	if err != nil {
		return err
	}
	f.links[name] = l
	if f.pins == "" {
		return nil
	}
	if err := l.Pin(path); err != nil {
		return fmt.Errorf("pinning %s: %w", name, err)
	}
	return nil
}

// ifindexOf is the interface of a link; 0 if that is gone.
func ifindexOf(l link.Link) (int, error) {
	info, err := l.Info()
	if err != nil {
		return 0, err
	}
	if x := info.XDP(); x != nil {
		return int(x.Ifindex), nil
	}
	if t := info.TCX(); t != nil {
		return int(t.Ifindex), nil
	}
	return 0, nil
}

// end takes an attachment away, which this process or a former one made: at once, and not
// some time after the last who holds it has let go, as the kernel does it by itself.
func (f *Filter) end(name string) (err error) {
	l := f.links[name]
	if l == nil && f.pins != "" {
		if l, err = link.LoadPinnedLink(filepath.Join(f.pins, name), nil); errors.Is(err, os.ErrNotExist) {
			return nil
		} else if err != nil {
			return errors.Join(f.unpin(name), err)
		}
	}
	if l != nil {
		err = errors.Join(l.Detach(), l.Close())
		delete(f.links, name)
	}
	return errors.Join(f.unpin(name), err)
}

// unpin ends a pinned link, if there is one.
func (f *Filter) unpin(name string) error {
	if f.pins == "" {
		return nil
	}
	if err := os.Remove(filepath.Join(f.pins, name)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("removing the pin: %w", err)
	}
	return nil
}
