package doctor

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/mdlayher/packet"
	"golang.org/x/net/bpf"
	"golang.org/x/net/ipv4"
	"golang.org/x/sys/unix"

	"clonecluster/netcore/membership"
	"clonecluster/netcore/neigh"
)

// Sockets hear on a NIC what a Doctor wants to know, and send for it. Each hears one
// protocol, so that the frames of clients by IPv4 pass by them: to be shown them takes some
// hundredths of what a small request takes, however soon the filter drops them.
type Sockets struct {
	conns []*packet.Conn
	fd    int         // of the first, which sends
	udp   *net.IPConn // what comes to the NIC by UDP for the host itself, and for all
}

// maxHeard is more than any frame that is of interest.
const maxHeard = membership.MaxProbe + 1

// OpenSockets opens them on a NIC, those for IPv6 if there is a VIP of it. They also hear there what goes to a macvlan on it.
func OpenSockets(nic net.Interface, vips []netip.Addr) (_ *Sockets, err error) {
	s := &Sockets{fd: -1}
	defer func() {
		if err != nil {
			s.Close()
		}
	}()
	kind := bpf.LoadAbsolute{Off: 17, Size: 1}
	type ear struct {
		protocol int
		filter   []bpf.Instruction
	}
	ears := []ear{
		// A probe, not one of this node's own, nor a beacon.
		{membership.EtherType, []bpf.Instruction{kind, bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: 4, SkipTrue: 1}, accept, drop}},
		{etherRARP, []bpf.Instruction{accept}},
		{etherARP, []bpf.Instruction{accept}},
	}
	groups := [][]byte{membership.Group[:]}
	if slices.ContainsFunc(vips, netip.Addr.Is6) {
		ears, groups = append(ears, ear{etherIPv6, neigh.AdvertisementFilter}), append(groups, neigh.AllNodesMAC)
	}
	for _, l := range ears {
		conn, err := listen(nic, l.protocol, l.filter)
		if err != nil {
			return nil, err
		}
		s.conns = append(s.conns, conn)
	}
	if s.udp, err = listenUDP(nic); err != nil {
		return nil, err
	}
	for _, g := range groups {
		if err := s.conns[0].JoinGroup(g); err != nil {
			return nil, fmt.Errorf("joining the group %v on %s: %w", net.HardwareAddr(g), nic.Name, err)
		}
	}
	rc, err := s.conns[0].SyscallConn()
	if err != nil {
		return nil, err
	}
	err = rc.Control(func(fd uintptr) {
		s.fd = int(fd)
		// Room for a burst.
		_ = unix.SetsockoptInt(s.fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 4<<20)
	})
	return s, err
}

var (
	accept = bpf.RetConstant{Val: maxHeard}
	drop   = bpf.RetConstant{Val: 0}
)

func listen(ifi net.Interface, protocol int, filter []bpf.Instruction) (*packet.Conn, error) {
	outgoing := []bpf.Instruction{
		bpf.LoadExtension{Num: bpf.ExtType}, bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: unix.PACKET_OUTGOING, SkipTrue: 1}, drop,
		bpf.LoadExtension{Num: bpf.ExtVLANTagPresent}, bpf.JumpIf{Cond: bpf.JumpEqual, Val: 0, SkipTrue: 1}, drop,
	}
	program, err := bpf.Assemble(append(outgoing, filter...))
	if err != nil {
		return nil, fmt.Errorf("assembling the doctor's filter: %w", err)
	}
	conn, err := packet.Listen(&ifi, packet.Raw, protocol, &packet.Config{Filter: program})
	if err != nil {
		return nil, fmt.Errorf("opening the doctor's socket on %s: %w", ifi.Name, err)
	}
	return conn, nil
}

// listenUDP hears what a DHCP server sends (RFC 2131), as far as the NIC's host is to hear it.
func listenUDP(nic net.Interface) (*net.IPConn, error) {
	program, err := bpf.Assemble([]bpf.Instruction{
		bpf.LoadMemShift{Off: 0}, // the length of the IP header
		bpf.LoadIndirect{Off: 0, Size: 4}, bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: 67<<16 | 68, SkipTrue: 1}, accept, drop,
	})
	if err != nil {
		return nil, fmt.Errorf("assembling the doctor's filter: %w", err)
	}
	bind := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) (err error) {
		failed := c.Control(func(fd uintptr) { err = unix.BindToDevice(int(fd), nic.Name) })
		return errors.Join(failed, err)
	}}
	conn, err := bind.ListenPacket(context.Background(), "ip4:udp", "0.0.0.0")
	if err != nil {
		return nil, fmt.Errorf("opening the doctor's socket for UDP on %s: %w", nic.Name, err)
	}
	if err := ipv4.NewPacketConn(conn).SetBPF(program); err != nil {
		_ = conn.Close()
		return nil, fmt.Errorf("giving the doctor's socket for UDP its filter: %w", err)
	}
	return conn.(*net.IPConn), nil
}

// Send sends a frame; it does not wait for room.
func (s *Sockets) Send(frame []byte) error {
	return unix.Send(s.fd, frame, unix.MSG_DONTWAIT)
}

// Run hands what comes to a Doctor until ctx ends (nil) or a socket fails.
func (s *Sockets) Run(ctx context.Context, d *Doctor) error {
	var reading sync.WaitGroup
	errs := make([]error, len(s.conns))
	stop := context.AfterFunc(ctx, s.interrupt)
	defer stop()
	for i, c := range s.conns {
		reading.Go(func() { errs[i] = s.read(ctx, c, d) })
	}
	var failed error
	reading.Go(func() { failed = s.readUDP(ctx, d) })
	reading.Wait()
	return errors.Join(append(errs, failed)...)
}

func (s *Sockets) interrupt() {
	for _, c := range s.conns {
		_ = c.SetReadDeadline(time.Unix(1, 0))
	}
	_ = s.udp.SetReadDeadline(time.Unix(1, 0))
}

func (s *Sockets) readUDP(ctx context.Context, d *Doctor) error {
	buf := make([]byte, maxHeard)
	for {
		n, _, _, _, err := s.udp.ReadMsgIP(buf, nil)
		switch {
		case ctx.Err() != nil:
			return nil
		case err != nil: // as it is bound to no address, not what the NIC does
			return fmt.Errorf("hearing DHCP servers: %w", err)
		}
		d.HearIPv4(buf[:n])
	}
}

func (s *Sockets) read(ctx context.Context, c *packet.Conn, d *Doctor) error {
	buf := make([]byte, maxHeard)
	for {
		n, _, err := c.ReadFrom(buf)
		switch {
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, unix.ENETDOWN): // it works again when the NIC is up
			continue
		case err != nil:
			return fmt.Errorf("hearing probes: %w", err)
		}
		d.Hear(buf[:n])
	}
}

// Close closes the sockets. Nobody may read from them.
func (s *Sockets) Close() {
	for _, c := range s.conns {
		_ = c.Close()
	}
	if s.udp != nil {
		_ = s.udp.Close()
	}
}
