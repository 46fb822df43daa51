package neigh

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"

	"github.com/mdlayher/arp"
	"github.com/mdlayher/ethernet"
	"golang.org/x/net/bpf"
)

// Question gives the frame that asks a segment who has the VIP, from a wire MAC and
// without saying that anybody has it: an ARP probe (RFC 5227, 2.1.1) or a neighbour
// solicitation. With an unspecified source a solicitation is that of duplicate address
// detection (RFC 4862, 5.4.2), and is answered to all nodes; else to the wire MAC alone.
func Question(from net.HardwareAddr, source, vip netip.Addr) ([]byte, error) {
	if vip.Is6() {
		return buildSolicitation(from, source, vip), nil
	}
	p, err := arp.NewPacket(arp.OperationRequest, from, source, make(net.HardwareAddr, 6), vip)
	if err != nil {
		return nil, fmt.Errorf("building an ARP request: %w", err)
	}
	b, err := p.MarshalBinary()
	if err != nil {
		return nil, fmt.Errorf("building an ARP request: %w", err)
	}
	f := ethernet.Frame{Destination: ethernet.Broadcast, Source: from, EtherType: ethernet.EtherTypeARP, Payload: b}
	return f.MarshalBinary()
}

// LinkLocal is the address that a host makes of its MAC (RFC 4291, appendix A).
func LinkLocal(mac net.HardwareAddr) netip.Addr {
	return netip.AddrFrom16([16]byte{0xfe, 0x80, 8: mac[0] ^ 2, mac[1], mac[2], 0xff, 0xfe, mac[3], mac[4], mac[5]})
}

func buildSolicitation(from net.HardwareAddr, source, vip netip.Addr) []byte {
	target, src := vip.As16(), source.As16()
	group := [16]byte{0xff, 2, 11: 1, 12: 0xff, 13: target[13], 14: target[14], 15: target[15]}
	icmp := append([]byte{solicitation, 0, 0, 0, 0, 0, 0, 0}, target[:]...)
	if !source.IsUnspecified() {
		icmp = append(append(icmp, sourceLinkAddr, 1), from...)
	}
	binary.BigEndian.PutUint16(icmp[2:], checksum(src[:], group[:], icmp))
	f := append([]byte{0x33, 0x33, 0xff, target[13], target[14], target[15]}, from...)
	f = binary.BigEndian.AppendUint16(f, uint16(ethernet.EtherTypeIPv6))
	f = append(f, 6<<4, 0, 0, 0)
	f = binary.BigEndian.AppendUint16(f, uint16(len(icmp)))
	f = append(f, icmpv6, hopLimit)
	return append(append(append(f, src[:]...), group[:]...), icmp...)
}

// Offsets in a frame with an IPv6 header and ICMPv6 behind it.
const (
	offNext   = 14 + 6
	offICMP   = 14 + ipv6Header
	offTarget = offICMP + 8
	offOption = offICMP + message
)

// AdvertisementFilter lets neighbour advertisements pass at a packet socket for IPv6.
var AdvertisementFilter = []bpf.Instruction{
	bpf.LoadAbsolute{Off: offNext, Size: 1}, bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: icmpv6, SkipTrue: 3},
	bpf.LoadAbsolute{Off: offICMP, Size: 1}, bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: advertisement, SkipTrue: 1},
	bpf.RetConstant{Val: 2048}, bpf.RetConstant{Val: 0},
}

// Claimed gives the MAC at which the VIP is, as an ARP packet with the VIP as its sender
// says or a neighbour advertisement of it; nil if the frame is neither.
func Claimed(frame []byte, vip netip.Addr) net.HardwareAddr {
	if vip.Is6() {
		return advertised(frame, vip)
	}
	var f ethernet.Frame
	var p arp.Packet
	if f.UnmarshalBinary(frame) != nil || f.EtherType != ethernet.EtherTypeARP || p.UnmarshalBinary(f.Payload) != nil {
		return nil
	}
	if p.SenderIP != vip || len(p.SenderHardwareAddr) != 6 {
		return nil
	}
	return bytes.Clone(p.SenderHardwareAddr)
}

func advertised(f []byte, vip netip.Addr) net.HardwareAddr {
	if len(f) < offOption || f[offNext] != icmpv6 || f[offNext+1] != hopLimit || f[offICMP] != advertisement {
		return nil
	}
	if netip.AddrFrom16([16]byte(f[offTarget:offOption])) != vip {
		return nil
	}
	for o := f[offOption:]; len(o) >= option; {
		size := int(o[1]) * option
		if size == 0 || size > len(o) {
			break
		}
		if o[0] == targetLinkAddr {
			return bytes.Clone(o[2:option])
		}
		o = o[size:]
	}
	return bytes.Clone(f[6:12])
}
