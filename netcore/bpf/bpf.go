// Package bpf is the filter of package filter inside the kernel: as XDP or tcx on the
// NIC, and on what leaves by clone0. Of the same frame in the same state both say the
// same; the tests compare them.
package bpf

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"sync/atomic"
	"time"
	"unsafe"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"clonecluster/netcore/bpf/layout"
	"clonecluster/netcore/filter"
)

//go:generate go run ./generate
//go:generate go tool bpf2go -cc clang -strip llvm-strip -target bpfel -no-global-types objects c/filter.c -- -O2 -Wall -Werror -mcpu=v3 -I/usr/include/x86_64-linux-gnu

// Options are what the programs know besides the filter's configuration.
type Options struct {
	Filter filter.Config
	// WireMAC is the Ethernet source that frames from clone0 are given; zero: they
	// are right already.
	WireMAC [6]byte
	// now and sockets are for tests: the time, and what the socket table says.
	now     int64
	sockets asked
}

// asked is what a test wants the socket table to say.
type asked uint32

const (
	askKernel asked = iota
	askNobody
	sayNone
	sayListener
	sayEstablished
)

// Filter is a filter in the kernel.
type Filter struct {
	objects objectsObjects
	config  filter.Config
	shared  *layout.Shared // in the map
	ports   *layout.Ports
	memory  [][]byte // of the two
}

// Load puts the programs into the kernel, attached to nothing yet. All buckets are
// Foreign and the lease has run out.
func Load(opt Options) (_ *Filter, err error) {
	ports, err := filter.New(opt.Filter)
	if err != nil {
		return nil, err
	}
	spec, err := loadObjects()
	if err != nil {
		return nil, fmt.Errorf("reading the BPF programs: %w", err)
	}
	if err := setVariables(spec, opt, ports); err != nil {
		return nil, err
	}
	f := &Filter{config: opt.Filter}
	if err := spec.LoadAndAssign(&f.objects, nil); err != nil {
		return nil, fmt.Errorf("loading the BPF programs: %w", err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, f.Close())
		}
	}()
	if f.shared, err = mapped[layout.Shared](f, f.objects.Shared); err != nil {
		return nil, err
	}
	if f.ports, err = mapped[layout.Ports](f, f.objects.Ports); err != nil {
		return nil, err
	}
	*f.ports = layout.Ports(ports.Ports())
	return f, nil
}

// mapped gives the only value of a map, as memory that both sides see.
func mapped[T any](f *Filter, m *ebpf.Map) (*T, error) {
	size := int(unsafe.Sizeof(*new(T)))
	if size != int(m.ValueSize()) {
		return nil, fmt.Errorf("mapping %v: its value has %d bytes; want %d", m, m.ValueSize(), size)
	}
	memory, err := unix.Mmap(m.FD(), 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("mapping %v: %w", m, err)
	}
	f.memory = append(f.memory, memory)
	return (*T)(unsafe.Pointer(unsafe.SliceData(memory))), nil
}

func setVariables(spec *ebpf.CollectionSpec, opt Options, f *filter.Filter) error {
	number := func(m [6]byte) uint64 { return binary.BigEndian.Uint64(append([]byte{0, 0}, m[:]...)) }
	cfg := opt.Filter
	var vip4, vip6hi, vip6lo uint64
	if cfg.VIP4.IsValid() {
		_, vip4 = halves(cfg.VIP4)
	}
	if cfg.VIP6.IsValid() {
		vip6hi, vip6lo = halves(cfg.VIP6)
	}
	for name, value := range map[string]any{
		"clone_mac": number(cfg.CloneMAC), "wire_mac": number(opt.WireMAC), "rewrite": opt.WireMAC != [6]byte{},
		"vip4": vip4, "vip6_hi": vip6hi, "vip6_lo": vip6lo,
		"key0": binary.LittleEndian.Uint64(cfg.HashKey[:]), "key1": binary.LittleEndian.Uint64(cfg.HashKey[8:]),
		"max_frame": uint32(f.MaxFrame()), "patience": uint32(f.ResetPatience() / time.Millisecond),
		"test_now": opt.now, "test_sockets": uint32(opt.sockets),
	} {
		v := spec.Variables[name]
		if v == nil {
			return fmt.Errorf("the BPF programs have no variable %s", name)
		}
		if err := v.Set(value); err != nil {
			return fmt.Errorf("setting %s of the BPF programs: %w", name, err)
		}
	}
	return nil
}

func halves(a netip.Addr) (hi, lo uint64) {
	b := a.As16()
	return binary.BigEndian.Uint64(b[:]), binary.BigEndian.Uint64(b[8:])
}

// Close takes the programs out of the kernel, where nothing else holds them.
func (f *Filter) Close() error {
	errs := []error{f.objects.Close()}
	for _, m := range f.memory {
		errs = append(errs, unix.Munmap(m))
	}
	f.memory = nil
	return errors.Join(errs...)
}

// SetTable installs a copy of t at nowMono, as filter.Filter does.
func (f *Filter) SetTable(t *filter.Table, nowMono int64) {
	last := atomic.LoadUint64(&f.shared.Current) & 1
	next, quarantine := filter.Changes(t, (*filter.Table)(&f.shared.Tables[last]))
	for b, is := range quarantine {
		if is {
			atomic.StoreInt64(&f.shared.Quarantine[b], nowMono+filter.Quarantine)
		}
	}
	f.shared.Tables[1-last] = next
	atomic.StoreUint64(&f.shared.Current, 1-last)
}

// EndQuarantine is that of filter.Filter.
func (f *Filter) EndQuarantine(bucket int) { atomic.StoreInt64(&f.shared.Quarantine[bucket], 0) }

// SetLease lets new flows in before untilMono.
func (f *Filter) SetLease(untilMono int64) { atomic.StoreInt64(&f.shared.Lease, untilMono) }

// Counters counts frames by verdict.
func (f *Filter) Counters() (c filter.Counters, err error) {
	for v := range c {
		var each []uint64
		if err := f.objects.Verdicts.Lookup(uint32(v), &each); err != nil {
			return c, fmt.Errorf("reading the verdicts: %w", err)
		}
		for _, n := range each {
			c[v] += n
		}
	}
	return c, nil
}
