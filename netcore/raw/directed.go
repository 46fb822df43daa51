package raw

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"clonecluster/netcore/filter"
	"clonecluster/netcore/neigh"
)

// A MAC is an Ethernet address.
type MAC = [6]byte

// Directed is how frames pass in directed mode, where the network does not flood those
// to the clone MAC: clients are told the wire MAC of one node, the director, and
// whoever gets a frame for the VIP from a client sends it on to those who may want it,
// with its own wire MAC as the source. A frame that comes from another node is not sent
// on, so none goes round.
type Directed struct {
	// Director is the wire MAC that clients are told.
	Director MAC
	// Answer: this node tells them, when they ask all. Each node does when it is asked
	// itself.
	Answer bool
	// Nodes are the wire MACs of the other nodes: what comes from them is not sent on.
	Nodes []MAC
	// All are those of Nodes who get what has no bucket: their kernels do not take it past
	// the filter.
	All []MAC
	// To are, for each bucket, those of All who may want its frames.
	To [filter.Buckets][]MAC
}

// directed is a Directed in use.
type directed struct {
	Directed
	responder *neigh.Responder
}

// SetDirected has frames pass as in directed mode, or as usual (nil). In directed mode
// the kernel is kept from taking, past the filter, what clients send to this node's
// wire MAC, which takes a BPF program on the NIC; without it the error tells why there
// is no directed mode.
func (d *Datapath) SetDirected(to *Directed) error {
	if to == nil {
		d.directed.Store(nil)
		return d.shield.close()
	}
	if err := d.shield.open(d.cfg.NIC.Index, d.cfg.VIP4.Addr(), d.cfg.VIP6.Addr()); err != nil {
		return fmt.Errorf("keeping the kernel from what is for the VIP: %w", err)
	}
	next, err := newDirected(to, MAC(d.WireMAC()), d.cfg.VIP4.Addr(), d.cfg.VIP6.Addr())
	if err == nil {
		d.directed.Store(next)
	}
	return err
}

func newDirected(to *Directed, wire MAC, vip4, vip6 netip.Addr) (*directed, error) {
	r, err := neigh.New(neigh.Config{CloneMAC: to.Director, WireMAC: wire, VIP4: vip4, VIP6: vip6, Directed: true})
	if err != nil {
		return nil, fmt.Errorf("preparing neighbour answers: %w", err)
	}
	return &directed{*to, r}, nil
}

// speaker gives who speaks for the VIP now.
func (d *Datapath) speaker() *neigh.Responder {
	if to := d.directed.Load(); to != nil {
		return to.responder
	}
	return d.responder.Load()
}

// direct handles virtio_net_hdr + frame in buf[:n] in directed mode, if it was sent to
// this node's wire MAC, or asks all who has the VIP. False: it is to be handled as
// usual.
func (l *receiveLoop) direct(to *directed, n int) bool {
	d, frame := l.d, l.buf[vnetHdrLen:n]
	wire := MAC(d.WireMAC())
	bucket, asked, usual := to.sort(frame, wire, d.cfg.Filter)
	switch {
	case usual:
		return false
	case asked == filter.AskNeighbor:
		l.answerNeighbor(frame)
		return true
	case asked == filter.AskNothing:
		return true
	}
	copy(frame, d.cfg.CloneMAC[:]) // as it would have come
	if d.cfg.Filter.Ingress(frame, d.cfg.Now(), d.diag).Accept() {
		if _, errno := write(l.tap, l.buf[:n]); errno != 0 {
			d.count.tapWriteErrors.Add(1)
		}
	}
	to.handOn(l.buf[:n], wire, bucket, asked, d.send)
	return true
}

// A Router says to whom a frame has to be passed on, as filter.Filter does.
type Router interface {
	Route(frame []byte) (bucket int, asked filter.Asked)
}

// sort says what a frame asks of this node, or that it is to be handled as usual.
func (to *directed) sort(frame []byte, wire MAC, r Router) (bucket int, asked filter.Asked, usual bool) {
	if len(frame) < 14 {
		return 0, 0, true
	}
	group := frame[0]&1 != 0
	if !group && MAC(frame) != wire {
		return 0, 0, true
	}
	bucket, asked = r.Route(frame)
	switch {
	case asked == filter.AskNeighbor:
		if group && !to.Answer {
			asked = filter.AskNothing
		}
	case group:
		return 0, 0, true
	}
	return bucket, asked, false
}

// handOn sends virtio_net_hdr + frame in b to those who may want it, unless it comes from
// a node. It changes the frame's addresses.
func (to *directed) handOn(b []byte, wire MAC, bucket int, asked filter.Asked, send func(b []byte, flags int)) {
	frame := b[vnetHdrLen:]
	if slices.Contains(to.Nodes, MAC(frame[6:])) {
		return
	}
	targets := to.All
	if asked == filter.AskBucket {
		targets = to.To[bucket]
	}
	copy(frame[6:], wire[:])
	for _, t := range targets {
		copy(frame, t[:])
		send(b, unix.MSG_DONTWAIT)
	}
}

// shield is a program on the NIC that keeps the kernel from the VIP's frames. Packet
// sockets see them before.
type shield struct {
	program *ebpf.Program
	link    link.Link
}

func (s *shield) open(ifindex int, vip4, vip6 netip.Addr) (err error) {
	if s.link != nil {
		return nil
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.close())
		}
	}()
	s.program, err = ebpf.NewProgram(&ebpf.ProgramSpec{Name: "clone_shield", Type: ebpf.SchedCLS, License: "GPL", Instructions: shieldProgram(vip4, vip6)})
	if err != nil {
		return fmt.Errorf("loading a program: %w", err)
	}
	s.link, err = link.AttachTCX(link.TCXOptions{Interface: ifindex, Program: s.program, Attach: ebpf.AttachTCXIngress})
	if err != nil {
		return fmt.Errorf("attaching it by tcx, which Linux has from 6.6: %w", err)
	}
	return nil
}

func (s *shield) close() (err error) {
	if s.link != nil {
		err = s.link.Close()
	}
	if s.program != nil {
		err = errors.Join(err, s.program.Close())
	}
	*s = shield{}
	return err
}

// shieldProgram drops IP packets to a VIP. What is too short for a load ends the
// program with 0, which lets it pass.
func shieldProgram(vip4, vip6 netip.Addr) (prog asm.Instructions) {
	const drop, pass = 2, -1 // TC_ACT_SHOT, TCX_NEXT
	prog = asm.Instructions{asm.Mov.Reg(asm.R6, asm.R1), asm.LoadAbs(12, asm.Half)}
	if vip4.IsValid() {
		prog = append(prog, asm.JEq.Imm(asm.R0, unix.ETH_P_IP, "v4"))
	}
	if vip6.IsValid() {
		prog = append(prog, asm.JEq.Imm(asm.R0, unix.ETH_P_IPV6, "v6"))
	}
	prog = append(prog, asm.Mov.Imm(asm.R0, pass).WithSymbol("pass"), asm.Return())
	compare := func(label string, off int32, address []byte) {
		for i := 0; i < len(address); i += 4 {
			load := asm.LoadAbs(off+int32(i), asm.Word)
			if i == 0 {
				load = load.WithSymbol(label)
			}
			word := uint32(address[i])<<24 | uint32(address[i+1])<<16 | uint32(address[i+2])<<8 | uint32(address[i+3])
			prog = append(prog, load, asm.JNE.Imm32(asm.R0, int32(word), "pass"))
		}
		prog = append(prog, asm.Mov.Imm(asm.R0, drop), asm.Return())
	}
	if vip4.IsValid() {
		compare("v4", 30, vip4.AsSlice())
	}
	if vip6.IsValid() {
		compare("v6", 38, vip6.AsSlice())
	}
	return prog
}
