package hostcheck

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/mdlayher/arp"
	"github.com/mdlayher/ethernet"
	"github.com/mdlayher/packet"
	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"

	"clonecluster/netcore/nic"
)

// A Claim is a host of the segment that says it has a VIP.
type Claim struct {
	VIP netip.Addr
	MAC net.HardwareAddr
}

// probes are how many are sent, evenly over the first half of the patience. RFC 5227
// gives a host two seconds at its own start; a node that starts between others has
// not that long, and a host that answers at all does so within milliseconds.
const probes = 3

// Probe asks the segment who has the VIPs, as a host does that is about to take an
// address (RFC 5227 section 2.1.1, RFC 4862 section 5.4.2): from the wire MAC, and
// without saying that it has it. It returns after patience, or once every VIP is
// answered for. Whatever another node that asks the same says is no claim.
func Probe(ctx context.Context, n nic.NIC, w Want, patience time.Duration) ([]Claim, error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	var mu sync.Mutex
	var claims []Claim
	var errs []error
	var asking sync.WaitGroup
	for _, vip := range w.vips() {
		asking.Go(func() {
			found, err := whoHas(ctx, n, vip, patience/2/probes)
			mu.Lock()
			defer mu.Unlock()
			claims, errs = append(claims, found...), append(errs, err)
		})
	}
	asking.Wait()
	slices.SortFunc(claims, func(a, b Claim) int { return a.VIP.Compare(b.VIP) })
	return claims, errors.Join(errs...)
}

func whoHas(ctx context.Context, n nic.NIC, vip netip.Addr, every time.Duration) (claims []Claim, err error) {
	ask, hear, protocol, filter := arpProbe, arpClaim, unix.ETH_P_ARP, []bpf.RawInstruction(nil)
	if vip.Is6() {
		ask, hear, protocol, filter = solicitation, advertised, unix.ETH_P_IPV6, advertisements
	}
	frame, to, err := ask(n.MAC, vip)
	if err != nil {
		return nil, fmt.Errorf("building the probe for %v: %w", vip, err)
	}
	conn, err := packet.Listen(&net.Interface{Index: n.Index, Name: n.Name}, packet.Raw, protocol, &packet.Config{Filter: filter})
	if err != nil {
		return nil, fmt.Errorf("opening a socket on %s to ask who has %v: %w", n.Name, vip, err)
	}
	defer conn.Close()
	if vip.Is6() {
		if err := conn.JoinGroup(allNodes); err != nil {
			return nil, fmt.Errorf("joining the group of all nodes on %s: %w", n.Name, err)
		}
	}
	end, _ := ctx.Deadline()
	buf := make([]byte, 2048)
	for sent := 0; ctx.Err() == nil; {
		wake := end
		if sent < probes {
			if _, err := conn.WriteTo(frame, &packet.Addr{HardwareAddr: to}); err != nil {
				return claims, fmt.Errorf("asking on %s who has %v: %w", n.Name, vip, err)
			}
			sent++
			wake = time.Now().Add(every)
		}
		if err := conn.SetReadDeadline(wake); err != nil {
			return claims, err
		}
		for {
			size, _, err := conn.ReadFrom(buf)
			if errors.Is(err, os.ErrDeadlineExceeded) {
				break
			}
			if err != nil {
				return claims, fmt.Errorf("hearing on %s who has %v: %w", n.Name, vip, err)
			}
			mac := hear(buf[:size], vip)
			if mac == nil {
				continue
			}
			if !slices.ContainsFunc(claims, func(c Claim) bool { return c.MAC.String() == mac.String() }) {
				claims = append(claims, Claim{vip, mac})
			}
			if len(claims) == 1 {
				// Whoever else has it answers the same probe.
				end = time.Now().Add(every)
				if err := conn.SetReadDeadline(end); err != nil {
					return claims, err
				}
				sent = probes
			}
		}
		if !time.Now().Before(end) {
			break
		}
	}
	return claims, nil
}

func arpProbe(from net.HardwareAddr, vip netip.Addr) ([]byte, net.HardwareAddr, error) {
	p, err := arp.NewPacket(arp.OperationRequest, from, netip.IPv4Unspecified(), make(net.HardwareAddr, 6), vip)
	if err != nil {
		return nil, nil, err
	}
	b, err := p.MarshalBinary()
	if err != nil {
		return nil, nil, err
	}
	f := ethernet.Frame{Destination: ethernet.Broadcast, Source: from, EtherType: ethernet.EtherTypeARP, Payload: b}
	frame, err := f.MarshalBinary()
	return frame, ethernet.Broadcast, err
}

// arpClaim gives the MAC of whoever says in a frame that the VIP is its own; nil: nobody.
func arpClaim(frame []byte, vip netip.Addr) net.HardwareAddr {
	var f ethernet.Frame
	var p arp.Packet
	if f.UnmarshalBinary(frame) != nil || f.EtherType != ethernet.EtherTypeARP || p.UnmarshalBinary(f.Payload) != nil {
		return nil
	}
	if p.SenderIP != vip || len(p.SenderHardwareAddr) != 6 {
		return nil
	}
	return slices.Clone(p.SenderHardwareAddr)
}

var allNodes = net.HardwareAddr{0x33, 0x33, 0, 0, 0, 1}

// Offsets in a frame with an IPv6 header and ICMPv6 behind it.
const (
	offNext   = 14 + 6
	offSource = 14 + 8
	offDest   = 14 + 24
	offICMP   = 14 + 40
	offTarget = offICMP + 8
	offOption = offTarget + 16
)

// advertisements lets neighbour advertisements pass.
var advertisements = func() []bpf.RawInstruction {
	program, err := bpf.Assemble([]bpf.Instruction{
		bpf.LoadAbsolute{Off: offNext, Size: 1},
		bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: unix.IPPROTO_ICMPV6, SkipTrue: 2},
		bpf.LoadAbsolute{Off: offICMP, Size: 1},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: 136, SkipTrue: 1},
		bpf.RetConstant{Val: 0},
		bpf.RetConstant{Val: 2048},
	})
	if err != nil {
		panic(err) // of constants
	}
	return program
}()

// solicitation builds the neighbour solicitation of duplicate address detection.
func solicitation(from net.HardwareAddr, vip netip.Addr) ([]byte, net.HardwareAddr, error) {
	target := vip.As16()
	group := [16]byte{0xff, 2, 11: 1, 12: 0xff, 13: target[13], 14: target[14], 15: target[15]}
	to := net.HardwareAddr{0x33, 0x33, 0xff, target[13], target[14], target[15]}
	f := make([]byte, offOption)
	copy(f, to)
	copy(f[6:], from)
	binary.BigEndian.PutUint16(f[12:], unix.ETH_P_IPV6)
	f[14] = 6 << 4
	binary.BigEndian.PutUint16(f[18:], uint16(len(f)-offICMP))
	f[offNext], f[offNext+1] = unix.IPPROTO_ICMPV6, 255
	copy(f[offDest:], group[:])
	f[offICMP] = 135
	copy(f[offTarget:], target[:])
	binary.BigEndian.PutUint16(f[offICMP+2:], icmpChecksum(f))
	return f, to, nil
}

// icmpChecksum is that of RFC 4443 section 2.3, over a frame whose own is 0.
func icmpChecksum(f []byte) uint16 {
	sum := uint32(len(f)-offICMP) + unix.IPPROTO_ICMPV6
	for i := offSource; i < len(f); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(f[i:]))
	}
	for sum>>16 != 0 {
		sum = sum&0xffff + sum>>16
	}
	return ^uint16(sum)
}

// advertised is arpClaim for neighbour advertisements.
func advertised(f []byte, vip netip.Addr) net.HardwareAddr {
	if len(f) < offOption || f[offNext] != unix.IPPROTO_ICMPV6 || f[offNext+1] != 255 || f[offICMP] != 136 {
		return nil
	}
	if netip.AddrFrom16([16]byte(f[offTarget:offOption])) != vip {
		return nil
	}
	for o := f[offOption:]; len(o) >= 8; {
		size := int(o[1]) * 8
		if size == 0 || size > len(o) {
			break
		}
		if o[0] == 2 { // target link-layer address
			return slices.Clone(net.HardwareAddr(o[2:8]))
		}
		o = o[size:]
	}
	return slices.Clone(net.HardwareAddr(f[6:12]))
}
