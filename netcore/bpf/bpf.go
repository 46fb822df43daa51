// Package bpf is the filter of package filter inside the kernel: as XDP or tcx on the
// NIC, and on what leaves by clone0. Of the same frame in the same state both say the
// same; the tests compare them.
package bpf

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"clonecluster/netcore/bpf/layout"
	"clonecluster/netcore/filter"
)

//go:generate go run ./generate
//go:generate go tool bpf2go -cc clang -strip llvm-strip -target bpfel -no-global-types objects c/filter.c -- -O2 -Wall -Werror -mcpu=v3 -I/usr/include/x86_64-linux-gnu
//go:generate go tool bpf2go -cc clang -strip llvm-strip -target bpfel -no-global-types directed c/directed.c -- -O2 -Wall -Werror -mcpu=v3 -I/usr/include/x86_64-linux-gnu

// Options are what the programs know besides the filter's configuration.
type Options struct {
	Filter filter.Config
	// WireMAC is the NIC's own address.
	WireMAC [6]byte
	// Rewrite gives frames from clone0 the WireMAC as their Ethernet source, which
	// they have already if the kernel has wire addresses.
	Rewrite bool
	// Pins is a folder on a BPF file system in which the programs and the table outlive
	// this process, for the next Load to take up. Empty: they end with it.
	Pins string
	// Anew leaves a former process's table, lease and holds alone.
	Anew bool
	// For tests: the time, what the socket table says, and a kernel without tcx.
	now     int64
	sockets asked
	noTCX   bool
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
	pins    string
	noTCX   bool
	inside  *filter.Filter // judges the RSTs that wait, and knows which bucket is whose
	shared  *layout.Shared // in the map
	ports   *layout.Ports
	syns    *layout.SYNs
	memory  [][]byte             // of the three
	links   map[string]link.Link // pinned, too, or they end with this process

	cfg       filter.Config
	direction *direction // nil: frames are flooded

	change sync.Mutex   // of the table
	looked atomic.Int64 // when Look last read the holds
}

// Load puts the programs into the kernel, attached to nothing yet. All buckets are
// Foreign and the lease has run out, unless the table of a former process is found in
// Options.Pins.
func Load(opt Options) (_ *Filter, err error) {
	inside, err := filter.New(opt.Filter)
	if err != nil {
		return nil, err
	}
	spec, err := loadObjects()
	if err != nil {
		return nil, fmt.Errorf("reading the BPF programs: %w", err)
	}
	if err := setVariables(spec, opt, inside); err != nil {
		return nil, err
	}
	f := &Filter{pins: opt.Pins, noTCX: opt.noTCX, inside: inside, cfg: opt.Filter, links: map[string]link.Link{}}
	defer func() {
		if err != nil {
			err = errors.Join(err, f.Close())
		}
	}()
	if err := f.load(spec, opt); err != nil {
		return nil, err
	}
	if f.shared, err = mapped[layout.Shared](f, f.objects.Shared); err != nil {
		return nil, err
	}
	if f.ports, err = mapped[layout.Ports](f, f.objects.Ports); err != nil {
		return nil, err
	}
	if f.syns, err = mapped[layout.SYNs](f, f.objects.Syns); err != nil {
		return nil, err
	}
	*f.ports = layout.Ports(inside.Ports())
	f.SetWireMAC(opt.WireMAC)
	f.recall()
	return f, nil
}

// load takes up the state that a former process pinned, if it is of this form.
func (f *Filter) load(spec *ebpf.CollectionSpec, opt Options) error {
	if f.pins == "" {
		return loadError(spec.LoadAndAssign(&f.objects, nil))
	}
	name := stateName(opt.Filter)
	path := filepath.Join(f.pins, name)
	if err := f.forgetStates(func(other string) bool { return opt.Anew || other != name }); err != nil {
		return err
	}
	state, err := ebpf.LoadPinnedMap(path, nil)
	if err == nil {
		defer state.Close()
		return loadError(spec.LoadAndAssign(&f.objects, &ebpf.CollectionOptions{MapReplacements: map[string]*ebpf.Map{"shared": state}}))
	}
	if !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("taking up the table at %s: %w", path, err)
	}
	if err := loadError(spec.LoadAndAssign(&f.objects, nil)); err != nil {
		return err
	}
	if err := os.MkdirAll(f.pins, 0o700); err != nil {
		return fmt.Errorf("making the folder of the BPF pins: %w", err)
	}
	if err := f.objects.Shared.Pin(path); err != nil {
		return fmt.Errorf("pinning the table: %w", err)
	}
	return nil
}

// ErrLoad is matched by the error of Load when the kernel does not take the programs.
var ErrLoad = errors.New("the kernel does not take the BPF programs")

func loadError(err error) error {
	if err != nil {
		return fmt.Errorf("%w: %w", ErrLoad, err)
	}
	return nil
}

const statePrefix = "state_"

// stateName changes with the form of the state and with what decides which flow is in
// which bucket, so that none is taken for another.
func stateName(cfg filter.Config) string {
	h := sha256.New()
	state := reflect.TypeFor[layout.Shared]()
	for i := range state.NumField() {
		field := state.Field(i)
		fmt.Fprint(h, field.Name, field.Type, field.Offset)
	}
	fmt.Fprint(h, cfg.VIP4, cfg.VIP6, cfg.HashKey)
	return statePrefix + hex.EncodeToString(h.Sum(nil)[:8])
}

// forgetStates unpins those of that name.
func (f *Filter) forgetStates(which func(name string) bool) error {
	entries, err := os.ReadDir(f.pins)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("looking for what a former engine has pinned: %w", err)
	}
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), statePrefix) && which(e.Name()) {
			if err := f.unpin(e.Name()); err != nil {
				return err
			}
		}
	}
	return nil
}

// recall has the part of the filter that is in this process go by what is in the map.
func (f *Filter) recall() {
	table := f.Table()
	f.inside.SetTable(&table, 0)
	for b := range table {
		f.inside.SetQuarantine(b, atomic.LoadInt64(&f.shared.Quarantine[b]))
	}
	f.inside.SetLease(atomic.LoadInt64(&f.shared.Lease))
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
	cfg := opt.Filter
	var vip4, vip6hi, vip6lo uint64
	if cfg.VIP4.IsValid() {
		_, vip4 = halves(cfg.VIP4)
	}
	if cfg.VIP6.IsValid() {
		vip6hi, vip6lo = halves(cfg.VIP6)
	}
	return setAll(spec, map[string]any{
		"clone_mac": number(cfg.CloneMAC), "rewrite": opt.Rewrite,
		"vip4": vip4, "vip6_hi": vip6hi, "vip6_lo": vip6lo,
		"key0": binary.LittleEndian.Uint64(cfg.HashKey[:]), "key1": binary.LittleEndian.Uint64(cfg.HashKey[8:]),
		"max_frame": uint32(f.MaxFrame()), "patience": uint32(f.ResetPatience() / time.Millisecond),
		"test_now": opt.now, "test_sockets": uint32(opt.sockets),
	})
}

func setAll(spec *ebpf.CollectionSpec, values map[string]any) error {
	for name, value := range values {
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

func number(m [6]byte) uint64 { return binary.BigEndian.Uint64(append([]byte{0, 0}, m[:]...)) }

func halves(a netip.Addr) (hi, lo uint64) {
	b := a.As16()
	return binary.BigEndian.Uint64(b[:]), binary.BigEndian.Uint64(b[8:])
}

// Close lets the programs go, which end if nothing else holds them.
func (f *Filter) Close() error {
	errs := []error{f.objects.Close()}
	if f.direction != nil {
		errs = append(errs, f.direction.objects.Close())
	}
	for _, l := range f.links {
		errs = append(errs, l.Close())
	}
	clear(f.links)
	for _, m := range f.memory {
		errs = append(errs, unix.Munmap(m))
	}
	f.memory = nil
	return errors.Join(errs...)
}

// SetTable installs a copy of t at nowMono, as filter.Filter does.
func (f *Filter) SetTable(t *filter.Table, nowMono int64) {
	f.change.Lock()
	defer f.change.Unlock()
	f.inside.SetTable(t, nowMono)
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

// Table gives a copy of the table in force.
func (f *Filter) Table() filter.Table {
	return f.shared.Tables[atomic.LoadUint64(&f.shared.Current)&1]
}

// EndQuarantine is that of filter.Filter.
func (f *Filter) EndQuarantine(bucket int) {
	f.inside.EndQuarantine(bucket)
	atomic.StoreInt64(&f.shared.Quarantine[bucket], 0)
}

// SetWireMAC changes the Ethernet source of what leaves.
func (f *Filter) SetWireMAC(m [6]byte) { atomic.StoreUint64(&f.shared.WireMAC, number(m)) }

// SetLease lets new flows in before untilMono.
func (f *Filter) SetLease(untilMono int64) {
	f.inside.SetLease(untilMono)
	atomic.StoreInt64(&f.shared.Lease, untilMono)
}

// Bucket is that of filter.Filter.
func (f *Filter) Bucket(t filter.Tuple) int { return f.inside.Bucket(t) }

// Route is that of filter.Filter.
func (f *Filter) Route(frame []byte) (bucket int, asked filter.Asked) { return f.inside.Route(frame) }

// Hold is that of filter.Filter.
func (f *Filter) Hold(t filter.Tuple, nowMono int64) bool {
	if !f.inside.Holds(t) {
		return false
	}
	d := &f.shared.HeldTCP[f.Bucket(t)]
	until := atomic.LoadInt64(d)
	if until < nowMono+filter.HoldTCP-filter.HoldSlack {
		atomic.StoreInt64(d, nowMono+filter.HoldTCP)
	}
	return until <= nowMono
}

// Look is that of filter.Filter: the verdict is computed anew, from the table, the lease
// and the holds that the programs go by.
func (f *Filter) Look(frame []byte, left bool, nowMono int64, s filter.Sockets) filter.Seen {
	if nowMono-f.looked.Load() >= lookAgain {
		f.looked.Store(nowMono)
		tcp, datagram := f.shared.HeldTCP, f.shared.HeldDatagram
		f.inside.SetHolds(&tcp, &datagram)
	}
	return f.inside.Look(frame, left, nowMono, s)
}

// lookAgain is how old the holds may be that Look goes by, in nanoseconds.
const lookAgain = int64(10 * time.Millisecond)

// Release judges a RST again that was delayed, as filter.Filter does.
func (f *Filter) Release(frame []byte, nowMono int64) filter.Verdict {
	return f.inside.Release(frame, nowMono)
}

// Discard is that of filter.Filter.
func (f *Filter) Discard() { f.inside.Discard() }

// ResetPatience is that of filter.Filter.
func (f *Filter) ResetPatience() time.Duration { return f.inside.ResetPatience() }

// Counters counts frames by verdict since the programs were loaded.
func (f *Filter) Counters() (c filter.Counters) {
	c = f.inside.Counters()
	f.counted(func(n *layout.Counted) {
		for v := range c {
			c[v] += n.Verdicts[v]
		}
	})
	return c
}

// Offered is that of filter.Filter, since the programs were loaded.
func (f *Filter) Offered() *filter.Offered {
	o := new(filter.Offered)
	f.counted(func(n *layout.Counted) {
		for b := range filter.Buckets {
			o.Frames[b] += n.Offered.Frames[b]
			o.SYNs[b] += n.Offered.SYNs[b]
			o.Again[b] += n.Offered.Again[b]
		}
	})
	return o
}

// counted gives what each processor has counted. To read a map of one's own cannot fail.
func (f *Filter) counted(each func(*layout.Counted)) {
	var all []layout.Counted
	if f.objects.Counted.Lookup(uint32(0), &all) != nil {
		return
	}
	for i := range all {
		each(&all[i])
	}
}

// Askers is that of filter.Filter.
func (f *Filter) Askers(nowMono int64) []filter.Asker {
	var entries [filter.AskerSlots]uint64
	for i := range entries {
		entries[i] = atomic.LoadUint64(&f.syns.Askers[i])
	}
	return filter.ReadAskers(&entries, nowMono)
}

// Guarded is how many frames were about to leave with the clone MAC as their source;
// none should.
func (f *Filter) Guarded() uint64 { return sum(f.objects.Guarded, 0) }

// sum adds up a counter of all processors. To read a map of one's own cannot fail.
func sum(m *ebpf.Map, key uint32) (n uint64) {
	var each []uint64
	if m.Lookup(key, &each) != nil {
		return 0
	}
	for _, one := range each {
		n += one
	}
	return n
}
