package bench

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"slices"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"

	"clonecluster/netcore/clone"
	"clonecluster/netcore/filter"
)

// hashes is a program that does with a frame what a filter with this hash cannot leave out, and
// nothing else: it hashes the flow of a TCP segment by IPv4 with SipHash-1-3, looks into the table, and counts. It trusts
// that the frame is one for the VIP, without options, and that a port has no rules of its own.
// An octet of the table that is 0 is another's. The map has the count, of each processor.
func hashes(t ebpf.ProgramType, key [16]byte, table *[filter.Buckets]byte, mine, another int32) (*ebpf.Program, *ebpf.Map, error) {
	octets, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.Array, KeySize: 4, ValueSize: filter.Buckets, MaxEntries: 1})
	if err != nil {
		return nil, nil, err
	}
	defer octets.Close() // the program has it, too
	if err := octets.Put(uint32(0), table[:]); err != nil {
		return nil, nil, err
	}
	counts, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.PerCPUArray, KeySize: 4, ValueSize: 8, MaxEntries: 1})
	if err != nil {
		return nil, nil, err
	}

	const proto, addresses, ports = 14 + 9, 14 + 12, 14 + 20 // where they are in the frame
	data, dataEnd := int16(0), int16(4)                      // of struct xdp_md
	if t == ebpf.SchedCLS {
		data, dataEnd = 76, 80 // of struct __sk_buff
	}
	v0, v1, v2, v3, tmp, word := asm.R6, asm.R7, asm.R8, asm.R9, asm.R0, asm.R4
	code := asm.Instructions{
		asm.LoadMem(asm.R2, asm.R1, data, asm.Word),
		asm.LoadMem(asm.R3, asm.R1, dataEnd, asm.Word),
		asm.Mov.Reg(asm.R1, asm.R2),
		asm.Add.Imm(asm.R1, ports+4),
		asm.JGT.Reg(asm.R1, asm.R3, "mine"),
		asm.LoadMem(word, asm.R2, addresses, asm.DWord),
		asm.LoadMem(asm.R5, asm.R2, ports, asm.Word),
		asm.LoadMem(asm.R3, asm.R2, proto, asm.Byte),
		asm.LSh.Imm(asm.R3, 32),
		asm.Or.Reg(asm.R5, asm.R3),
		asm.LoadImm(asm.R3, filter.KeyLength4<<56, asm.DWord),
		asm.Or.Reg(asm.R5, asm.R3),
	}
	add := func(more ...asm.Instruction) { code = append(code, more...) }
	rotate := func(x asm.Register, n int32) {
		add(asm.Mov.Reg(tmp, x), asm.LSh.Imm(x, n), asm.RSh.Imm(tmp, 64-n), asm.Or.Reg(x, tmp))
	}
	round := func() { // of SipHash
		add(asm.Add.Reg(v0, v1))
		rotate(v1, 13)
		add(asm.Xor.Reg(v1, v0))
		rotate(v0, 32)
		add(asm.Add.Reg(v2, v3))
		rotate(v3, 16)
		add(asm.Xor.Reg(v3, v2), asm.Add.Reg(v0, v3))
		rotate(v3, 21)
		add(asm.Xor.Reg(v3, v0), asm.Add.Reg(v2, v1))
		rotate(v1, 17)
		add(asm.Xor.Reg(v1, v2))
		rotate(v2, 32)
	}
	k0, k1 := binary.LittleEndian.Uint64(key[:8]), binary.LittleEndian.Uint64(key[8:])
	for i, start := range []uint64{k0 ^ 0x736f6d6570736575, k1 ^ 0x646f72616e646f6d, k0 ^ 0x6c7967656e657261, k1 ^ 0x7465646279746573} {
		add(asm.LoadImm(v0+asm.Register(i), int64(start), asm.DWord))
	}
	for _, w := range []asm.Register{word, asm.R5} {
		add(asm.Xor.Reg(v3, w))
		round()
		add(asm.Xor.Reg(v0, w))
	}
	add(asm.Xor.Imm(v2, 0xff))
	for range 3 {
		round()
	}
	add(
		asm.Xor.Reg(v0, v1), asm.Xor.Reg(v0, v2), asm.Xor.Reg(v0, v3),
		asm.And.Imm(v0, filter.Buckets-1),
		asm.LoadMapValue(asm.R1, octets.FD(), 0),
		asm.Add.Reg(asm.R1, v0),
		asm.LoadMem(v1, asm.R1, 0, asm.Byte),
		asm.StoreImm(asm.RFP, -4, 0, asm.Word),
		asm.LoadMapPtr(asm.R1, counts.FD()),
		asm.Mov.Reg(asm.R2, asm.RFP),
		asm.Add.Imm(asm.R2, -4),
		asm.FnMapLookupElem.Call(),
		asm.JEq.Imm(asm.R0, 0, "mine"),
		asm.LoadMem(asm.R1, asm.R0, 0, asm.DWord),
		asm.Add.Imm(asm.R1, 1),
		asm.StoreMem(asm.R0, 0, asm.R1, asm.DWord),
		asm.JNE.Imm(v1, 0, "mine"),
		asm.Mov.Imm(asm.R0, another),
		asm.Return(),
		asm.Mov.Imm(asm.R0, mine).WithSymbol("mine"),
		asm.Return(),
	)
	p, err := ebpf.NewProgram(&ebpf.ProgramSpec{Type: t, License: "GPL", Instructions: code})
	if err != nil {
		counts.Close()
		return nil, nil, err
	}
	return p, counts, nil
}

// counted is the sum of such a count.
func counted(counts *ebpf.Map) (sum int, err error) {
	var each []uint64
	err = counts.Lookup(uint32(0), &each)
	for _, n := range each {
		sum += int(n)
	}
	return sum, err
}

// TestHashes: the floor hashes as the filter does.
func TestHashes(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root, to load BPF programs")
	}
	key := [16]byte{1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 200}
	f, err := filter.New(filter.Config{CloneMAC: cloneMAC, VIP4: netip.MustParseAddr(vip), HashKey: key})
	if err != nil {
		t.Fatal(err)
	}
	mac := net.HardwareAddr(cloneMAC[:])
	segment, err := frame(mac, net.ParseIP(vip).To4(), "tcp")
	if err != nil {
		t.Fatal(err)
	}
	for _, hook := range []struct {
		t             ebpf.ProgramType
		mine, another int32
	}{{ebpf.XDP, xdpPass, xdpDrop}, {ebpf.SchedCLS, noVerdict, tcDrop}} {
		for port := range uint16(8) {
			binary.BigEndian.PutUint16(segment[14+20:], firstPort+port)
			bucket := f.Bucket(filter.Tuple{Proto: filter.ProtoTCP, Client: netip.AddrPortFrom(netip.MustParseAddr("10.77.0.1"), firstPort+port), VIP: netip.AddrPortFrom(netip.MustParseAddr(vip), 80)})
			for _, others := range []byte{0, 1} {
				table := new([filter.Buckets]byte)
				for i := range table {
					table[i] = others
				}
				table[bucket] = 1 - others
				p, counts, err := hashes(hook.t, key, table, hook.mine, hook.another)
				if err != nil {
					t.Fatal(err)
				}
				got, err := p.Run(&ebpf.RunOptions{Data: slices.Clone(segment)})
				if n, failed := counted(counts); n != 1 || failed != nil {
					t.Errorf("of one frame it counts %d (%v)", n, failed)
				}
				p.Close()
				counts.Close()
				want := hook.mine
				if table[bucket] == 0 {
					want = hook.another
				}
				if err != nil || got != uint32(want) {
					t.Errorf("%v, port %d, bucket %d, others %d: it says %d, %v; want %d", hook.t, firstPort+port, bucket, others, got, err, want)
				}
			}
		}
	}
}

// onlyHashes drops what is another's by such a program.
func (m *measurer) onlyHashes(r *receiver) error {
	m.cable(r)
	r.mac, r.ip = net.HardwareAddr(cloneMAC[:]).String(), vip
	p, counts, err := hashes(ebpf.XDP, [16]byte{}, new([filter.Buckets]byte), xdpPass, xdpDrop)
	if err != nil {
		return err
	}
	m.t.Cleanup(func() { counts.Close() })
	r.seen = func() int {
		n, err := counted(counts)
		if err != nil {
			m.t.Error(err)
		}
		return n
	}
	return m.attach(r.host, "eth0", p, func(ifindex int) (io.Closer, error) {
		return link.AttachXDP(link.XDPOptions{Program: p, Interface: ifindex, Flags: link.XDPDriverMode})
	})
}

// hashedMacvlan is a server with the VIP on such a clone0 as bareMacvlan's, one of these programs
// where a node's filter is, and programs that do nothing at both other places where a node has one.
func (m *measurer) hashedMacvlan(w *way, f files) error {
	h := m.server(w.bed, 1, f)
	h.Start("macvlan").Await(0, "macvlan ready")
	table := new([filter.Buckets]byte)
	for i := range table {
		table[i] = 1
	}
	judge, counts, err := hashes(ebpf.SchedCLS, [16]byte{}, table, noVerdict, tcDrop)
	if err != nil {
		return err
	}
	counts.Close()
	nothing, err := always(ebpf.SchedCLS, noVerdict)
	if err != nil {
		return err
	}
	at := func(device string, p *ebpf.Program, where ebpf.AttachType) error {
		return m.attach(h, device, p, func(ifindex int) (io.Closer, error) {
			return link.AttachTCX(link.TCXOptions{Interface: ifindex, Program: p, Attach: where})
		})
	}
	err = errors.Join(at("eth0", judge, ebpf.AttachTCXIngress), at(clone.Device, nothing, ebpf.AttachTCXEgress), at("eth0", nothing, ebpf.AttachTCXEgress))
	if err != nil {
		return fmt.Errorf("programs at tcx: %w", err)
	}
	w.knows()
	return nil
}
