package vswitch

import (
	"fmt"
	"net"
	"net/netip"
	"strings"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
)

// Describe says on one line what a frame is: addresses, then the innermost
// protocol that it understands. It never fails; a broken frame is described as
// far as it goes.
func Describe(frame []byte) string {
	if len(frame) < headerLen {
		return fmt.Sprintf("runt of %d bytes % x", len(frame), frame)
	}
	var b strings.Builder
	fmt.Fprintf(&b, "%s > %s", net.HardwareAddr(frame[6:12]), net.HardwareAddr(frame[0:6]))
	p := gopacket.NewPacket(frame, layers.LayerTypeEthernet, gopacket.DecodeOptions{NoCopy: true})
	src, dst, inner := "", "", false
	for _, l := range p.Layers() {
		switch l := l.(type) {
		case *layers.Dot1Q:
			fmt.Fprintf(&b, " vlan %d", l.VLANIdentifier)
		case *layers.ARP:
			inner = true
			describeARP(&b, l)
		case *layers.IPv4:
			src, dst = l.SrcIP.String(), l.DstIP.String()
		case *layers.IPv6:
			src, dst = l.SrcIP.String(), l.DstIP.String()
		case *layers.TCP:
			inner = true
			fmt.Fprintf(&b, " TCP %s > %s [%s] seq %d ack %d len %d",
				hostPort(src, uint16(l.SrcPort)), hostPort(dst, uint16(l.DstPort)), tcpFlags(l), l.Seq, l.Ack, len(l.Payload))
		case *layers.UDP:
			inner = true
			fmt.Fprintf(&b, " UDP %s > %s len %d", hostPort(src, uint16(l.SrcPort)), hostPort(dst, uint16(l.DstPort)), len(l.Payload))
		case *layers.DHCPv4:
			fmt.Fprintf(&b, " DHCP %s", dhcpType(l))
		case *layers.ICMPv4:
			inner = true
			fmt.Fprintf(&b, " %s > %s ICMP %s", src, dst, l.TypeCode)
		case *layers.ICMPv6:
			inner = true
			fmt.Fprintf(&b, " %s > %s ICMPv6 %s", src, dst, l.TypeCode)
		case *layers.ICMPv6NeighborSolicitation:
			fmt.Fprintf(&b, " target %s%s", l.TargetAddress, linkAddress(l.Options))
		case *layers.ICMPv6NeighborAdvertisement:
			fmt.Fprintf(&b, " target %s%s", l.TargetAddress, linkAddress(l.Options))
		}
	}
	switch {
	case inner:
	case src != "":
		fmt.Fprintf(&b, " %s > %s len %d", src, dst, len(frame))
	default:
		fmt.Fprintf(&b, " type 0x%04x len %d", uint16(frame[12])<<8|uint16(frame[13]), len(frame))
	}
	return b.String()
}

func describeARP(b *strings.Builder, a *layers.ARP) {
	sender, _ := netip.AddrFromSlice(a.SourceProtAddress)
	target, _ := netip.AddrFromSlice(a.DstProtAddress)
	switch {
	case a.Operation == layers.ARPReply:
		fmt.Fprintf(b, " ARP %s is-at %s", sender, net.HardwareAddr(a.SourceHwAddress))
	case sender == target:
		fmt.Fprintf(b, " ARP announce %s at %s", sender, net.HardwareAddr(a.SourceHwAddress))
	default:
		fmt.Fprintf(b, " ARP who-has %s tell %s at %s", target, sender, net.HardwareAddr(a.SourceHwAddress))
	}
}

func linkAddress(opts layers.ICMPv6Options) string {
	for _, o := range opts {
		if o.Type == layers.ICMPv6OptSourceAddress || o.Type == layers.ICMPv6OptTargetAddress {
			return " at " + net.HardwareAddr(o.Data).String()
		}
	}
	return ""
}

func hostPort(host string, port uint16) string {
	return net.JoinHostPort(host, fmt.Sprint(port))
}

func tcpFlags(t *layers.TCP) string {
	var s []string
	for _, f := range []struct {
		on   bool
		name string
	}{{t.SYN, "SYN"}, {t.FIN, "FIN"}, {t.RST, "RST"}, {t.PSH, "PSH"}, {t.URG, "URG"}, {t.ACK, "ACK"}} {
		if f.on {
			s = append(s, f.name)
		}
	}
	return strings.Join(s, ",")
}

func dhcpType(d *layers.DHCPv4) string {
	for _, o := range d.Options {
		if o.Type == layers.DHCPOptMessageType && len(o.Data) == 1 {
			return layers.DHCPMsgType(o.Data[0]).String()
		}
	}
	return d.Operation.String()
}
