package bpf

import (
	"errors"
	"fmt"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
)

// direction is directed mode in force.
type direction struct {
	director [6]byte
	objects  directedObjects
}

// Direct has what comes to the NIC's own address for the VIP judged as if it had come to
// the clone MAC, keeps from the kernel who asks for the VIP, and has what clone0 says of the
// VIP name the director. Frames have to be judged by tcx, see AttachNIC; the error is an
// *UnsupportedError where there is none.
func (f *Filter) Direct(ifindex, clone int, director [6]byte) (err error) {
	if f.direction != nil && f.direction.director == director {
		return nil
	}
	next := &direction{director: director}
	if err := f.loadDirected(next); err != nil {
		return err
	}
	if err := f.attachDirected(ifindex, clone, next); err != nil {
		return errors.Join(err, next.objects.Close(), f.Undirect())
	}
	if f.direction != nil {
		err = f.direction.objects.Close()
	}
	f.direction = next
	return err
}

// attachDirected attaches, or replaces, what has to be behind the filter and before it.
func (f *Filter) attachDirected(ifindex, clone int, d *direction) error {
	for _, at := range []struct {
		name string
		opt  link.TCXOptions
	}{
		{directedOut, link.TCXOptions{Interface: clone, Program: d.objects.DirectedOut, Attach: ebpf.AttachTCXEgress, Anchor: link.Tail()}},
		{directedIn, link.TCXOptions{Interface: ifindex, Program: d.objects.DirectedIn, Attach: ebpf.AttachTCXIngress, Anchor: link.Head()}},
	} {
		if l := f.links[at.name]; l != nil {
			if err := l.Update(at.opt.Program); err != nil {
				return fmt.Errorf("replacing %s: %w", at.name, err)
			}
			continue
		}
		err := f.keep(at.name, at.opt.Interface, at.opt.Program, func() (link.Link, error) {
			if f.noTCX {
				return nil, ebpf.ErrNotSupported
			}
			return link.AttachTCX(at.opt)
		})
		if errors.Is(err, ebpf.ErrNotSupported) {
			err = &UnsupportedError{What: "tcx, which directed mode needs", Since: "6.6", Err: err}
		}
		if err != nil {
			return fmt.Errorf("attaching %s: %w", at.name, err)
		}
	}
	return nil
}

func (f *Filter) loadDirected(d *direction) error {
	spec, err := loadDirected()
	if err != nil {
		return fmt.Errorf("reading the BPF programs: %w", err)
	}
	cfg := f.cfg
	values := map[string]any{"clone_mac": cfg.CloneMAC, "director": d.director}
	if cfg.VIP4.IsValid() {
		values["vip4"] = cfg.VIP4.As4()
	}
	if cfg.VIP6.IsValid() {
		values["vip6"] = cfg.VIP6.As16()
	}
	if err := setAll(spec, values); err != nil {
		return err
	}
	return loadError(spec.LoadAndAssign(&d.objects, nil))
}

// Undirect ends what Direct began, here or in a former process.
func (f *Filter) Undirect() (err error) {
	if f.direction != nil {
		err = f.direction.objects.Close()
		f.direction = nil
	}
	return errors.Join(f.end(directedIn), f.end(directedOut), err)
}
