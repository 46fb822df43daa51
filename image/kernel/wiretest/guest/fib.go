// SPDX-License-Identifier: GPL-2.0-only

package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"runtime"
	"unsafe"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// fibLookup asks the helper of that name, which tells a forwarding BPF program
// what header to write.
func (b *bench) fibLookup() error {
	remove, err := b.wire(shared)
	if err != nil {
		return err
	}
	if err := errors.Join(number(hereNL, nearVeth, near4, near6), number(b.far.nl, farVeth, far4, far6)); err != nil {
		return err
	}
	for _, family := range []string{"ipv4", "ipv6"} { // it does not answer otherwise
		if err := sysctl("net/"+family+"/conf/"+nearVeth+"/forwarding", "1"); err != nil {
			return err
		}
	}
	link, err := netlink.LinkByName(nearVeth)
	if err != nil {
		return err
	}
	for _, c := range []struct{ set, want string }{{"", shared}, {wire1, wire1}} {
		if err := setWire(nearVeth, c.set); err != nil {
			return err
		}
		for _, to := range []struct{ near, far net.IP }{{near4, far4}, {near6, far6}} {
			if err := ping(to.near, to.far); err != nil {
				return err
			}
			source, dest, err := lookup(link.Attrs().Index, to.near, to.far)
			b.check(fmt.Sprintf("bpf_fib_lookup for %v with wire address %q", to.far, c.set), err)
			b.equal(fmt.Sprintf("its addresses for %v with wire address %q", to.far, c.set), fmt.Sprint(source, " ", dest), c.want+" "+farMAC)
		}
	}
	return remove()
}

// lookup runs a program of a helper call each for the look-up, and for bringing
// the two MAC addresses it found to the head of the packet.
func lookup(ifindex int, from, to net.IP) (source, dest net.HardwareAddr, err error) {
	// struct bpf_fib_lookup, include/uapi/linux/bpf.h.
	var params [64]byte
	params[0] = unix.AF_INET6
	src, dst := from.To16(), to.To16()
	if to.To4() != nil {
		params[0], src, dst = unix.AF_INET, from.To4(), to.To4()
	}
	binary.NativeEndian.PutUint32(params[8:], uint32(ifindex))
	copy(params[16:], src)
	copy(params[32:], dst)

	const (
		r0, r1, r2, r3, r4, r5, r6, r7, r10 = 0, 1, 2, 3, 4, 5, 6, 7, 10

		mov64, mov64imm, add64imm, storeWord, call, exit = 0xbf, 0xb7, 0x07, 0x62, 0x85, 0x95

		helperStoreBytes, helperFibLookup = 9, 69
		fibLookupOutput                   = 2
		ethernetHeader                    = 14
	)
	var prog []byte
	op := func(code, dst, src byte, off int16, imm int32) {
		prog = append(prog, code, dst|src<<4)
		prog = binary.NativeEndian.AppendUint16(prog, uint16(off))
		prog = binary.NativeEndian.AppendUint32(prog, uint32(imm))
	}
	op(mov64, r6, r1, 0, 0)
	for i := 0; i < len(params); i += 4 {
		op(storeWord, r10, 0, int16(i-len(params)), int32(binary.NativeEndian.Uint32(params[i:])))
	}
	op(mov64, r2, r10, 0, 0)
	op(add64imm, r2, 0, 0, -int32(len(params)))
	op(mov64imm, r3, 0, 0, int32(len(params)))
	op(mov64imm, r4, 0, 0, fibLookupOutput)
	op(call, 0, 0, 0, helperFibLookup)
	op(mov64, r7, r0, 0, 0)
	op(mov64, r1, r6, 0, 0)
	op(mov64imm, r2, 0, 0, 0)
	op(mov64, r3, r10, 0, 0)
	op(add64imm, r3, 0, 0, 52-int32(len(params))) // smac, then dmac
	op(mov64imm, r4, 0, 0, 12)
	op(mov64imm, r5, 0, 0, 0)
	op(call, 0, 0, 0, helperStoreBytes)
	op(mov64, r0, r7, 0, 0)
	op(exit, 0, 0, 0, 0)

	license := []byte("GPL\x00")
	log := make([]byte, 64<<10)
	fd, err := bpf(unix.BPF_PROG_LOAD, &struct {
		kind, count    uint32
		insns, license uint64
		logLevel, logN uint32
		log            uint64
	}{unix.BPF_PROG_TYPE_SCHED_CLS, uint32(len(prog) / 8), pointer(prog), pointer(license), 1, uint32(len(log)), pointer(log)})
	runtime.KeepAlive(license)
	runtime.KeepAlive(prog)
	if err != nil {
		return nil, nil, fmt.Errorf("loading the program: %w: %s", err, unix.ByteSliceToString(log))
	}
	defer unix.Close(fd)

	in, out := make([]byte, 64), make([]byte, 64)
	binary.BigEndian.PutUint16(in[ethernetHeader-2:], unix.ETH_P_IP)
	run := struct {
		prog, result    uint32
		inSize, outSize uint32
		in, out         uint64
		repeat, nanosec uint32
		ctx             [32]byte
	}{prog: uint32(fd), inSize: uint32(len(in)), outSize: uint32(len(out)), in: pointer(in), out: pointer(out), repeat: 1}
	_, err = bpf(unix.BPF_PROG_TEST_RUN, &run)
	runtime.KeepAlive(in)
	if err != nil {
		return nil, nil, fmt.Errorf("running the program: %w", err)
	}
	if run.result != 0 {
		return nil, nil, fmt.Errorf("the look-up answered %d", run.result)
	}
	return out[0:6], out[6:12], nil
}

func pointer(b []byte) uint64 { return uint64(uintptr(unsafe.Pointer(&b[0]))) }

// bpf is the system call. attr is one of the structures of union bpf_attr.
func bpf[T any](cmd int, attr *T) (int, error) {
	fd, _, errno := unix.Syscall(unix.SYS_BPF, uintptr(cmd), uintptr(unsafe.Pointer(attr)), unsafe.Sizeof(*attr))
	if errno != 0 {
		return -1, errno
	}
	return int(fd), nil
}
