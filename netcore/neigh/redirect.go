package neigh

import "encoding/binary"

// Redirect changes the MAC that an ARP packet or a neighbour message, in an untagged
// Ethernet frame, gives its sender: from one to another, in the payload. It leaves
// other frames as they are.
func Redirect(frame []byte, from, to [6]byte) {
	const ether = 14
	if len(frame) < ether+28 {
		return
	}
	switch binary.BigEndian.Uint16(frame[12:]) {
	case 0x0806:
		if [6]byte(frame[ether+8:]) == from {
			copy(frame[ether+8:], to[:])
		}
	case 0x86dd:
		b := frame[ether:]
		if len(b) < ipv6Header+message || b[0]>>4 != 6 || b[6] != icmpv6 || b[ipv6Header] != solicitation && b[ipv6Header] != advertisement {
			return
		}
		icmp := b[ipv6Header:]
		for at := message; at+option <= len(icmp) && icmp[at+1] != 0; at += int(icmp[at+1]) * option {
			o := icmp[at : at+option]
			if (o[0] != sourceLinkAddr && o[0] != targetLinkAddr) || [6]byte(o[2:]) != from {
				continue
			}
			// RFC 1624: what is taken out of the sum and what comes in.
			sum := uint32(^binary.BigEndian.Uint16(icmp[2:]))
			for i := 0; i < 6; i += 2 {
				sum += uint32(^binary.BigEndian.Uint16(from[i:])) + uint32(binary.BigEndian.Uint16(to[i:]))
			}
			for sum > 0xffff {
				sum = sum>>16 + sum&0xffff
			}
			binary.BigEndian.PutUint16(icmp[2:], ^uint16(sum))
			copy(o[2:], to[:])
		}
	}
}
