package filter

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"
)

const testNow = int64(1000e9) // long after every quarantine of SetTable(…, 0)

// frameCase is one frame, the circumstances, and the verdict by name.
type frameCase struct {
	name    string
	frame   []byte
	state   State
	sockets *sockets // nil: the datapath cannot look up
	fenced  bool     // the lease has run out
	held    bool     // every bucket is held
	patient bool     // resets have to wait
	want    string
}

var (
	looksUp   = func(s SocketState) *sockets { return &sockets{state: s} }
	clientIPs = []struct{ client, vip, other netip.Addr }{{client4, vip4, other4}, {client6, vip6, other6}}
)

// ingressCases is everything the wire may bring.
func ingressCases() []frameCase {
	var cases []frameCase
	add := func(c ...frameCase) { cases = append(cases, c...) }
	for _, ip := range clientIPs {
		add(stateCases(ip.client, ip.vip)...)
		add(ownFlowCases(ip.client, ip.vip)...)
		add(errorCases(ip.client, ip.vip)...)
		add(disabledCases(ip.client, ip.vip, ip.other)...)
	}
	add(linkCases()...)
	add(ipv4Cases()...)
	add(ipv6Cases()...)
	add(arpCases()...)
	add(ndpCases()...)
	return cases
}

// stateCases is the contract's table, row by row.
func stateCases(client, vip netip.Addr) []frameCase {
	seg := func(flags string) []byte { return tcp(client, vip, clientPort, 80, flags) }
	dgram, ping := udp(client, vip, clientPort, 53), echo(client, vip)
	var cases []frameCase
	row := func(s State, syn, other, datagram string) {
		for _, c := range []struct {
			what, want string
			frame      []byte
		}{
			{"SYN", syn, seg("S")},
			{"ACK", other, seg("A")}, {"PSH ACK", other, seg("PA")}, {"FIN ACK", other, seg("FA")},
			{"RST", other, seg("R")}, {"SYN ACK", other, seg("SA")}, {"SYN FIN", other, seg("SF")},
			{"SYN RST", other, seg("SR")}, {"no flags", other, seg("")},
			{"UDP", datagram, dgram}, {"echo", datagram, ping},
		} {
			cases = append(cases, frameCase{name: c.what, frame: c.frame, state: s, want: c.want})
		}
	}
	row(Foreign, "drop-foreign", "drop-foreign", "drop-foreign")
	row(Settled, "accept-new", "accept-flow", "accept-new")
	row(Shared, "accept-new", "accept-transit", "accept-new")
	row(Draining, "drop-draining", "accept-transit", "drop-draining")

	for _, s := range []State{Shared, Draining} {
		cases = append(cases,
			frameCase{name: "ACK with a socket", frame: seg("A"), state: s, sockets: looksUp(SocketEstablished), want: "accept-flow"},
			frameCase{name: "RST with a socket", frame: seg("R"), state: s, sockets: looksUp(SocketEstablished), want: "accept-flow"},
			frameCase{name: "ACK without a socket", frame: seg("A"), state: s, sockets: looksUp(SocketNone), want: "drop-no-socket"},
			frameCase{name: "ACK of a SYN cookie", frame: seg("A"), state: s, sockets: looksUp(SocketListener), want: "accept-transit"},
			frameCase{name: "RST to a listener", frame: seg("R"), state: s, sockets: looksUp(SocketListener), want: "drop-no-socket"},
			frameCase{name: "RST ACK to a listener", frame: seg("RA"), state: s, sockets: looksUp(SocketListener), want: "drop-no-socket"},
			frameCase{name: "SYN ACK to a listener", frame: seg("SA"), state: s, sockets: looksUp(SocketListener), want: "drop-no-socket"},
		)
	}
	for _, s := range []State{Settled, Shared} {
		cases = append(cases,
			frameCase{name: "SYN without a lease", frame: seg("S"), state: s, fenced: true, want: "drop-lease"},
			frameCase{name: "UDP without a lease", frame: dgram, state: s, fenced: true, want: "drop-lease"},
			frameCase{name: "echo without a lease", frame: ping, state: s, fenced: true, want: "drop-lease"},
		)
	}
	return append(cases,
		frameCase{name: "ACK without a lease", frame: seg("A"), state: Settled, fenced: true, want: "accept-flow"},
		frameCase{name: "ACK with a socket, without a lease", frame: seg("A"), state: Draining, fenced: true, sockets: looksUp(SocketEstablished), want: "accept-flow"},
		frameCase{name: "SYN, no look-up", frame: seg("S"), state: Shared, sockets: looksUp(SocketNone), want: "accept-new"},
		frameCase{name: "closed port, high", frame: tcp(client, vip, clientPort, localPort, "S"), state: Settled, want: "accept-new"},
		frameCase{name: "UDP traceroute", frame: udp(client, vip, clientPort, 33434), state: Settled, want: "accept-new"},
	)
}

// ownFlowCases is what answers a flow that a node opened from the VIP.
func ownFlowCases(client, vip netip.Addr) []frameCase {
	answer := tcp(client, vip, 443, localPort, "SA")
	var cases []frameCase
	for s := range State(states) {
		cases = append(cases,
			frameCase{name: "SYN ACK to the opener", frame: answer, state: s, held: true, want: "accept-own"},
			frameCase{name: "data to the opener, without a lease", frame: tcp(client, vip, 443, localPort, "PA"), state: s, held: true, fenced: true, want: "accept-own"},
			frameCase{name: "SYN ACK to another node's port", frame: answer, state: s, want: "drop-no-socket"},
			frameCase{name: "datagram to the asker", frame: udp(client, vip, 53, localPort), state: s, held: true, want: "accept-own"},
			frameCase{name: "echo reply to the asker", frame: echoReply(client, vip), state: s, held: true, want: "accept-own"},
			frameCase{name: "echo reply to another node", frame: echoReply(client, vip), state: s, want: "drop-no-socket"},
		)
	}
	low := tcp(client, vip, 443, 1023, "SA")
	return append(cases,
		frameCase{name: "SYN ACK to a low port", frame: low, state: Foreign, held: true, want: "accept-transit"},
		frameCase{name: "SYN ACK to a low port, socket", frame: low, state: Foreign, held: true, sockets: looksUp(SocketEstablished), want: "accept-flow"},
		frameCase{name: "SYN ACK to a low port, no socket", frame: low, state: Foreign, held: true, sockets: looksUp(SocketNone), want: "drop-no-socket"},
		frameCase{name: "segment in a held bucket", frame: tcp(client, vip, clientPort, 80, "A"), state: Settled, held: true, sockets: looksUp(SocketNone), want: "accept-flow"},
		frameCase{name: "SYN to an own port", frame: tcp(client, vip, 443, localPort, "S"), state: Settled, held: true, want: "accept-new"},
		frameCase{name: "SYN to an own port", frame: tcp(client, vip, 443, localPort, "S"), state: Foreign, held: true, want: "drop-draining"},
		frameCase{name: "SYN in a held bucket", frame: tcp(client, vip, clientPort, 80, "S"), state: Foreign, held: true, want: "drop-draining"},
		frameCase{name: "UDP in a held bucket", frame: udp(client, vip, clientPort, 53), state: Foreign, held: true, want: "drop-foreign"},
		frameCase{name: "UDP to another node's port", frame: udp(client, vip, 53, localPort), state: Foreign, want: "drop-foreign"},
	)
}

// errorCases is ICMP errors, which a router sends about packets of the VIP's.
func errorCases(client, vip netip.Addr) []frameCase {
	const whole, least = 2000, 40 + 8
	flow := tcp(vip, client, 80, clientPort, "A")
	var cases []frameCase
	for s, want := range map[State]string{Foreign: "drop-foreign", Settled: "accept-error", Shared: "accept-error", Draining: "accept-error"} {
		cases = append(cases,
			frameCase{name: "error about TCP", frame: quote(flow, whole), state: s, want: want},
			frameCase{name: "error about TCP, short quote", frame: quote(flow, least), state: s, want: want},
			frameCase{name: "error without a lease", frame: quote(flow, whole), state: s, fenced: true, want: want},
			frameCase{name: "error about UDP", frame: quote(udp(vip, client, 53, clientPort), whole), state: s, sockets: looksUp(SocketNone), want: want},
			frameCase{name: "error about an echo reply", frame: quote(echoReply(vip, client), whole), state: s, want: want},
			frameCase{name: "error about an echo request", frame: quote(echo(vip, client), whole), state: s, want: want},
			frameCase{name: "error about an own echo request", frame: quote(echo(vip, client), whole), state: s, held: true, want: "accept-error"},
			frameCase{name: "error about an own flow", frame: quote(tcp(vip, client, localPort, 443, "S"), whole), state: s, held: true, want: "accept-error"},
			frameCase{name: "error about another node's flow", frame: quote(tcp(vip, client, localPort, 443, "S"), whole), state: s, want: "drop-no-socket"},
			frameCase{name: "error about an own datagram", frame: quote(udp(vip, client, localPort, 53), whole), state: s, held: true, want: "accept-error"},
		)
	}
	for _, s := range []State{Shared, Draining} {
		cases = append(cases,
			frameCase{name: "error, socket", frame: quote(flow, whole), state: s, sockets: looksUp(SocketEstablished), want: "accept-error"},
			frameCase{name: "error, listener", frame: quote(flow, whole), state: s, sockets: looksUp(SocketListener), want: "drop-no-socket"},
			frameCase{name: "error, no socket", frame: quote(flow, whole), state: s, sockets: looksUp(SocketNone), want: "drop-no-socket"},
		)
	}
	return append(cases,
		frameCase{name: "error about what the client sent", frame: quote(tcp(client, vip, clientPort, 80, "A"), whole), state: Settled, want: "drop-quote"},
		frameCase{name: "error in a held bucket", frame: quote(tcp(vip, client, 1023, 443, "S"), whole), state: Foreign, held: true, want: "accept-error"},
		frameCase{name: "error with half a quoted port", frame: quote(flow, 20+2), state: Settled, want: "drop-malformed"},
		frameCase{name: "error with nothing quoted", frame: quote(flow, 1), state: Settled, want: "drop-malformed"},
	)
}

// disabledCases is what comes to ports that no node serves, and what comes to
// others from the same ports of the client's.
func disabledCases(client, vip, other netip.Addr) []frameCase {
	var cases []frameCase
	for s := range State(states) {
		for _, held := range []bool{false, true} {
			add := func(name string, frame []byte, want string) {
				cases = append(cases, frameCase{name: name, frame: frame, state: s, held: held, sockets: looksUp(SocketEstablished), want: want})
			}
			for _, port := range []uint16{offPort, offLocalPort} {
				for _, flags := range []string{"S", "SA", "A", "PA", "FA", "R", "RA", ""} {
					add(fmt.Sprintf("%q to disabled port %d", flags, port), tcp(client, vip, clientPort, port, flags), "drop-disabled")
				}
				add("datagram to a disabled port", udp(client, vip, clientPort, port), "drop-disabled")
				add("error about a segment from a disabled port", quote(tcp(vip, client, port, clientPort, "A"), 2000), "drop-disabled")
				add("error about a datagram from a disabled port", quote(udp(vip, client, port, clientPort), 48), "drop-disabled")
				add("another address's disabled port", toAddr(tcp(client, vip, clientPort, port, "S"), other), "drop-not-ours")
			}
			add("first fragment to a disabled port", firstFragment(udp(client, vip, clientPort, offPort)), "drop-disabled")
		}
	}
	return append(cases,
		frameCase{name: "SYN to a disabled port, without a lease", frame: tcp(client, vip, clientPort, offPort, "S"), state: Settled, fenced: true, want: "drop-disabled"},
		frameCase{name: "SYN from a port that is disabled here", frame: tcp(client, vip, offPort, 80, "S"), state: Settled, want: "accept-new"},
		frameCase{name: "datagram from a port that is disabled here", frame: udp(client, vip, offPort, 53), state: Settled, want: "accept-new"},
		frameCase{name: "error about a segment to a port that is disabled here", frame: quote(tcp(vip, client, 80, offPort, "A"), 48), state: Settled, want: "accept-error"},
		frameCase{name: "port beside a disabled one", frame: tcp(client, vip, clientPort, offPort+1, "S"), state: Settled, want: "accept-new"},
	)
}

// firstFragment makes the packet of a frame the first part of a longer one.
func firstFragment(frame []byte) []byte {
	if frame[etherHeader]>>4 == 4 {
		return fragment4(frame, 0, true)
	}
	return extend6(frame, fragment6(0, true))
}

// toAddr sends the packet of a frame to another address.
func toAddr(frame []byte, dst netip.Addr) []byte {
	if dst.Is4() {
		return patch(frame, etherHeader+16, dst.AsSlice()...)
	}
	return patch(frame, etherHeader+24, dst.AsSlice()...)
}

func linkCases() []frameCase {
	syn := tcp(client4, vip4, clientPort, 80, "S")
	syn6 := tcp(client6, vip6, clientPort, 80, "S")
	tagged := insert(syn, 12, 0x81, 0x00, 0x00, 0x05)
	big := append(syn[:len(syn):len(syn)], make([]byte, 65550)...)
	cases := []frameCase{
		{name: "nothing", frame: nil, want: "drop-runt"},
		{name: "runt", frame: syn[:13], want: "drop-runt"},
		{name: "header alone", frame: syn[:14], want: "drop-malformed"},
		{name: "padded", frame: append(syn[:len(syn):len(syn)], make([]byte, 60)...), want: "accept-new"},
		{name: "longest", frame: big[:65550], want: "accept-new"},
		{name: "oversized", frame: big[:65551], want: "drop-oversized"},
		{name: "segmentation offload", frame: gso(), want: "accept-flow"},
		{name: "VLAN", frame: tagged, want: "drop-vlan"},
		{name: "VLAN 256", frame: insert(syn, 12, 0x81, 0x00, 0x01, 0x00), want: "drop-vlan"},
		{name: "VLAN, IPv6", frame: insert(syn6, 12, 0x81, 0x00, 0x0f, 0xff), want: "drop-vlan"},
		{name: "VLAN in a priority tag", frame: insert(tagged, 12, 0x81, 0x00, 0xe0, 0x00), want: "drop-vlan"},
		{name: "service VLAN", frame: insert(tagged, 12, 0x88, 0xa8, 0x00, 0x07), want: "drop-vlan"},
		{name: "priority tag", frame: priorityTag(syn, 1), want: "accept-new"},
		{name: "two priority tags", frame: priorityTag(syn6, 2), want: "accept-new"},
		{name: "service priority tag", frame: insert(syn, 12, 0x88, 0xa8, 0x20, 0x00), want: "accept-new"},
		{name: "three tags", frame: priorityTag(syn, 3), want: "drop-vlan"},
		{name: "cut in the tag", frame: tagged[:16], want: "drop-malformed"},
		{name: "another host's frame", frame: patch(syn, 0, clientMAC...), want: "drop-not-ours"},
		{name: "IP by broadcast", frame: patch(syn, 0, broadcast...), want: "drop-not-ours"},
		{name: "IPv6 by multicast", frame: patch(syn6, 0, allMAC...), want: "drop-not-ours"},
		{name: "clone MAC as source", frame: patch(syn, 6, cloneMAC[:]...), want: "drop-clone-source"},
		{name: "clone MAC as source to a client", frame: tcp(vip4, client4, 80, clientPort, "A"), want: "drop-clone-source"},
		{name: "RARP after a migration", frame: patch(patch(patch(syn, 0, broadcast...), 6, cloneMAC[:]...), 12, 0x80, 0x35), want: "drop-clone-rarp"},
		{name: "tagged RARP after a migration", frame: insert(patch(patch(syn, 6, cloneMAC[:]...), 12, 0x80, 0x35), 12, 0x81, 0x00, 0x00, 0x07), want: "drop-clone-source"},
		{name: "priority-tagged RARP after a migration", frame: priorityTag(patch(patch(syn, 6, cloneMAC[:]...), 12, 0x80, 0x35), 1), want: "drop-clone-source"},
		{name: "another machine's RARP", frame: patch(patch(syn, 0, broadcast...), 12, 0x80, 0x35), want: "drop-not-ours"},
		{name: "from a group", frame: patch(syn, 6, 0x01, 0x00, 0x5e), want: "drop-malformed"},
		{name: "from no MAC", frame: patch(syn, 6, noMAC...), want: "drop-malformed"},
		{name: "beacon", frame: patch(patch(syn, 12, 0x88, 0xb5), 0, 0x03, 0xcc, 0, 0, 0, 1), want: "drop-not-ours"},
		{name: "802.3 length", frame: patch(syn, 12, 0x00, 0x26), want: "drop-not-ours"},
		{name: "IPX to the clone MAC", frame: patch(syn, 12, 0x81, 0x37), want: "drop-not-ours"},
	}
	for i := range cases {
		cases[i].state = Settled
	}
	return cases
}

// gso is a frame as receive offload makes it: one header, 60 kB.
func gso() []byte {
	f := append(tcp(client4, vip4, clientPort, 80, "A"), make([]byte, 60000)...)
	n := len(f) - etherHeader
	return patch(f, etherHeader+2, byte(n>>8), byte(n))
}

func ipv4Cases() []frameCase {
	const l3, l4 = etherHeader, etherHeader + 20
	syn, dgram, ping := tcp(client4, vip4, clientPort, 80, "S"), udp(client4, vip4, clientPort, 53), echo(client4, vip4)
	options := patch(insert(syn, l4, 1, 1, 1, 0), l3, 0x46, 0, 0, byte(len(syn)-l3+4))
	from := func(a, b, c, d byte) []byte { return patch(syn, l3+12, a, b, c, d) }
	to := func(a, b, c, d byte) []byte { return patch(syn, l3+16, a, b, c, d) }
	cases := []frameCase{
		{name: "options", frame: options, want: "accept-new"},
		{name: "options cut", frame: patch(syn, l3, 0x4f), want: "drop-malformed"},
		{name: "header too short", frame: patch(syn, l3, 0x44), want: "drop-malformed"},
		{name: "version 5", frame: patch(syn, l3, 0x55), want: "drop-malformed"},
		{name: "version 6", frame: patch(syn, l3, 0x60), want: "drop-malformed"},
		{name: "cut in IPv4", frame: syn[:l4-1], want: "drop-malformed"},
		{name: "longer than the frame", frame: syn[:l3+43], want: "drop-malformed"},
		{name: "total length less than header", frame: patch(syn, l3+2, 0, 19), want: "drop-malformed"},
		{name: "total length hides the ports", frame: patch(syn, l3+2, 0, 27), want: "drop-malformed"},
		{name: "TCP cut", frame: patch(syn, l3+2, 0, 39), want: "drop-malformed"},
		{name: "TCP offset too small", frame: patch(syn, l4+12, 0x40), want: "drop-malformed"},
		{name: "TCP offset too large", frame: patch(syn, l4+12, 0xf0), want: "drop-malformed"},
		{name: "UDP cut", frame: patch(dgram, l3+2, 0, 27), want: "drop-malformed"},
		{name: "ICMP cut", frame: patch(ping, l3+2, 0, 27), want: "drop-malformed"},
		{name: "another address", frame: to(10, 77, 0, 11), want: "drop-not-ours"},
		{name: "subnet broadcast", frame: to(10, 77, 0, 255), want: "drop-not-ours"},
		{name: "IGMP query", frame: patch(patch(to(224, 0, 0, 1), l3+9, 2), 0, 0x01, 0x00, 0x5e, 0, 0, 1), want: "drop-not-ours"},
		{name: "from the VIP", frame: from(10, 77, 0, 10), want: "drop-spoofed"},
		{name: "from loopback", frame: from(127, 0, 0, 1), want: "drop-spoofed"},
		{name: "from multicast", frame: from(224, 0, 0, 5), want: "drop-spoofed"},
		{name: "from broadcast", frame: from(255, 255, 255, 255), want: "drop-spoofed"},
		{name: "from nowhere", frame: from(0, 0, 0, 0), want: "drop-spoofed"},
		{name: "first fragment", frame: fragment4(syn, 0, true), want: "accept-new"},
		{name: "first fragment of a datagram", frame: fragment4(dgram, 0, true), want: "accept-new"},
		{name: "first fragment, not the owner", frame: fragment4(dgram, 0, true), state: Foreign, want: "drop-foreign"},
		{name: "later fragment", frame: fragment4(dgram, 185, true), want: "accept-fragment"},
		{name: "last fragment", frame: fragment4(dgram, 370, false), want: "accept-fragment"},
		{name: "later fragment, not the owner", frame: fragment4(dgram, 185, true), state: Foreign, want: "accept-fragment"},
		{name: "later fragment, no lease", frame: fragment4(dgram, 185, true), fenced: true, want: "accept-fragment"},
		{name: "fragment to another address", frame: fragment4(to(10, 77, 0, 11), 185, true), want: "drop-not-ours"},
		{name: "fragment of GRE", frame: fragment4(patch(syn, l3+9, 47), 185, true), want: "drop-protocol"},
		{name: "GRE", frame: patch(syn, l3+9, 47), want: "drop-protocol"},
		{name: "SCTP", frame: patch(syn, l3+9, 132), want: "drop-protocol"},
		{name: "ICMPv6 in IPv4", frame: patch(ping, l3+9, 58), want: "drop-protocol"},
		{name: "timestamp", frame: icmp(client4, vip4, 13, 0, make([]byte, 16)), want: "drop-protocol"},
		{name: "source quench", frame: icmp(client4, vip4, 4, 0, make([]byte, 32)), want: "drop-protocol"},
		{name: "redirect", frame: icmp(client4, vip4, 5, 1, make([]byte, 32)), want: "drop-router"},
		{name: "router advertisement", frame: icmp(client4, vip4, 9, 0, make([]byte, 16)), want: "drop-router"},
		{name: "router solicitation", frame: icmp(client4, vip4, 10, 0, make([]byte, 16)), want: "drop-router"},
		{name: "error about a fragment", frame: quote(fragment4(udp(vip4, client4, 53, clientPort), 185, false), 2000), want: "drop-quote"},
		{name: "error about GRE", frame: quote(patch(udp(vip4, client4, 53, clientPort), l3+9, 47), 2000), want: "drop-quote"},
		{name: "error about an error", frame: quote(icmp(vip4, client4, 3, 3, make([]byte, 32)), 2000), want: "drop-quote"},
		{name: "error about a packet to nobody", frame: quote(patch(udp(vip4, client4, 53, clientPort), l3+16, 224, 0, 0, 1), 2000), want: "drop-quote"},
		{name: "time exceeded", frame: icmp(other4, vip4, 11, 0, append(make([]byte, 4), tcp(vip4, client4, 80, clientPort, "A")[l3:]...)), want: "accept-error"},
	}
	for i := range cases {
		if !strings.Contains(cases[i].name, "not the owner") {
			cases[i].state = Settled
		}
	}
	return cases
}

func ipv6Cases() []frameCase {
	const l3, l4 = etherHeader, etherHeader + 40
	syn, dgram, ping := tcp(client6, vip6, clientPort, 80, "S"), udp(client6, vip6, clientPort, 53), echo(client6, vip6)
	pad := func(t byte) [8]byte { return [8]byte{t, 0, 1, 4} }
	from := func(a string) []byte {
		b := netip.MustParseAddr(a).As16()
		return patch(syn, l3+8, b[:]...)
	}
	to := func(a string) []byte {
		b := netip.MustParseAddr(a).As16()
		return patch(syn, l3+24, b[:]...)
	}
	mappedClient := client4.As16()
	six := []([8]byte){pad(extHopByHop), pad(extDest), pad(extDest), pad(extDest), pad(extDest), pad(extDest)}
	cases := []frameCase{
		{name: "hop-by-hop", frame: extend6(syn, pad(extHopByHop)), want: "accept-new"},
		{name: "routing, destination options", frame: extend6(dgram, pad(extRouting), pad(extDest)), want: "accept-new"},
		{name: "six extension headers", frame: extend6(syn, six...), want: "accept-new"},
		{name: "seven extension headers", frame: extend6(syn, append(six, pad(extDest))...), want: "drop-malformed"},
		{name: "extension header longer than the packet", frame: extend6(syn, [8]byte{extDest, 200}), want: "drop-malformed"},
		{name: "cut in an extension header", frame: patch(extend6(syn, pad(extDest)), l3+4, 0, 1), want: "drop-malformed"},
		{name: "no next header", frame: patch(syn, l3+6, 59), want: "drop-protocol"},
		{name: "authentication header", frame: patch(syn, l3+6, 51), want: "drop-protocol"},
		{name: "ICMPv4 in IPv6", frame: patch(ping, l3+6, 1), want: "drop-protocol"},
		{name: "cut in IPv6", frame: syn[:l4-1], want: "drop-malformed"},
		{name: "version 4", frame: patch(syn, l3, 0x40), want: "drop-malformed"},
		{name: "longer than the frame", frame: syn[:len(syn)-1], want: "drop-malformed"},
		{name: "jumbogram", frame: patch(syn, l3+4, 0, 0), want: "drop-malformed"},
		{name: "another address", frame: to("fd77::11"), want: "drop-not-ours"},
		{name: "mDNS", frame: patch(to("ff02::fb"), 0, 0x33, 0x33, 0, 0, 0, 0xfb), want: "drop-not-ours"},
		{name: "from the VIP", frame: from("fd77::10"), want: "drop-spoofed"},
		{name: "from loopback", frame: from("::1"), want: "drop-spoofed"},
		{name: "from nowhere", frame: from("::"), want: "drop-spoofed"},
		{name: "from multicast", frame: from("ff02::1"), want: "drop-spoofed"},
		{name: "from a mapped address", frame: from("::ffff:10.77.0.1"), want: "drop-spoofed"},
		{name: "atomic fragment", frame: extend6(syn, fragment6(0, false)), want: "accept-new"},
		{name: "first fragment", frame: extend6(dgram, fragment6(0, true)), want: "accept-new"},
		{name: "first fragment, not the owner", frame: extend6(dgram, fragment6(0, true)), want: "drop-foreign"},
		{name: "later fragment", frame: extend6(dgram, fragment6(181, true)), want: "accept-fragment"},
		{name: "later fragment, not the owner", frame: extend6(dgram, pad(extHopByHop), fragment6(181, false)), want: "accept-fragment"},
		{name: "cut in the fragment header", frame: patch(extend6(dgram, fragment6(0, true)), l3+4, 0, 7), want: "drop-malformed"},
		{name: "first fragment without ports", frame: patch(extend6(dgram, fragment6(0, true)), l3+4, 0, 15), want: "drop-malformed"},
		{name: "error about a fragment", frame: quote(extend6(udp(vip6, client6, 53, clientPort), fragment6(181, false)), 2000), want: "drop-quote"},
		{name: "error, quote with extension headers", frame: quote(extend6(udp(vip6, client6, 53, clientPort), pad(extDest), fragment6(0, true)), 2000), want: "accept-error"},
		{name: "error about a neighbour message", frame: quote(patch(echo(vip6, client6), l4, icmp6NeighborAsk), 2000), want: "drop-quote"},
		{name: "error about a packet to a mapped address", frame: quote(patch(udp(vip6, client6, 53, clientPort), l3+24, mappedClient[:]...), 2000), want: "drop-quote"},
		{name: "unknown error", frame: icmp(client6, vip6, 100, 0, make([]byte, 60)), want: "drop-protocol"},
		{name: "node information query", frame: icmp(client6, vip6, 139, 0, make([]byte, 60)), want: "drop-protocol"},
		{name: "listener report", frame: icmp(client6, vip6, icmp6ReportV2, 0, make([]byte, 24)), want: "drop-protocol"},
		{name: "redirect", frame: icmp(client6, vip6, icmp6Redirect, 0, make([]byte, 40)), want: "drop-router"},
		{name: "router advertisement", frame: icmp(client6, vip6, icmp6RouterAdvert, 0, make([]byte, 16)), want: "drop-router"},
		{name: "router advertisement to all", frame: patch(icmp(router6, all6, icmp6RouterAdvert, 0, make([]byte, 16)), 0, allMAC...), want: "drop-not-ours"},
		{name: "echo to all nodes", frame: patch(echo(client6, all6), 0, allMAC...), want: "drop-not-ours"},
	}
	for i := range cases {
		if !strings.Contains(cases[i].name, "not the owner") {
			cases[i].state = Settled
		}
	}
	return cases
}

func arpCases() []frameCase {
	const op = etherHeader + 6
	request := arpFrame(broadcast, clientMAC, 1, clientMAC, client4, noMAC, vip4)
	probe := arpFrame(broadcast, clientMAC, 1, clientMAC, none4, noMAC, vip4)
	reply := arpFrame(clone(), clientMAC, 2, clientMAC, client4, clone(), vip4)
	var cases []frameCase
	for s, answer := range map[State]string{Foreign: "drop-foreign", Settled: "answer-neighbor", Shared: "answer-neighbor", Draining: "drop-foreign"} {
		cases = append(cases,
			frameCase{name: "request", frame: request, state: s, want: answer},
			frameCase{name: "request, padded", frame: append(request[:len(request):len(request)], make([]byte, 18)...), state: s, want: answer},
			frameCase{name: "request without a lease", frame: request, state: s, fenced: true, want: answer},
			frameCase{name: "unicast request", frame: patch(request, 0, cloneMAC[:]...), state: s, want: answer},
			frameCase{name: "tagged request", frame: priorityTag(request, 1), state: s, want: answer},
			frameCase{name: "probe of a client", frame: probe, state: s, want: answer},
			frameCase{name: "reply", frame: reply, state: s, want: "accept-neighbor"},
			frameCase{name: "gratuitous request of a client", frame: arpFrame(broadcast, clientMAC, 1, clientMAC, client4, noMAC, client4), state: s, want: "accept-neighbor"},
			frameCase{name: "gratuitous reply of a client", frame: arpFrame(broadcast, clientMAC, 2, clientMAC, client4, broadcast, client4), state: s, want: "accept-neighbor"},
			frameCase{name: "announcement of another node", frame: arpFrame(broadcast, nodeMAC, 1, clone(), vip4, noMAC, vip4), state: s, want: "drop-own-announcement"},
			frameCase{name: "gratuitous reply of another node", frame: arpFrame(broadcast, nodeMAC, 2, clone(), vip4, clone(), vip4), state: s, want: "drop-own-announcement"},
			frameCase{name: "probe of another node", frame: arpFrame(broadcast, nodeMAC, 1, clone(), none4, noMAC, vip4), state: s, want: "drop-own-announcement"},
			frameCase{name: "another node asks for a client", frame: arpFrame(broadcast, nodeMAC, 1, clone(), vip4, noMAC, client4), state: s, want: "drop-own-announcement"},
			frameCase{name: "answer of another node", frame: arpFrame(clone(), nodeMAC, 2, clone(), vip4, clientMAC, client4), state: s, want: "drop-own-announcement"},
			frameCase{name: "stranger announces the VIP", frame: arpFrame(broadcast, clientMAC, 1, clientMAC, vip4, noMAC, vip4), state: s, want: "drop-conflict"},
			frameCase{name: "stranger answers for the VIP", frame: arpFrame(clone(), clientMAC, 2, clientMAC, vip4, clone(), vip4), state: s, want: "drop-conflict"},
			frameCase{name: "stranger asks from the VIP", frame: arpFrame(broadcast, clientMAC, 1, clientMAC, vip4, noMAC, client4), state: s, want: "drop-conflict"},
			frameCase{name: "stranger with the clone MAC", frame: arpFrame(broadcast, clientMAC, 1, clone(), client4, noMAC, vip4), state: s, want: "drop-conflict"},
		)
	}
	return append(cases,
		frameCase{name: "request for another", frame: arpFrame(broadcast, clientMAC, 1, clientMAC, client4, noMAC, other4), state: Settled, want: "drop-not-ours"},
		frameCase{name: "probe for another", frame: arpFrame(broadcast, clientMAC, 1, clientMAC, none4, noMAC, other4), state: Settled, want: "drop-not-ours"},
		frameCase{name: "reply from nobody", frame: arpFrame(clone(), clientMAC, 2, clientMAC, none4, clone(), vip4), state: Settled, want: "drop-not-ours"},
		frameCase{name: "announcement of nobody", frame: arpFrame(broadcast, clientMAC, 1, clientMAC, none4, noMAC, none4), state: Settled, want: "drop-not-ours"},
		frameCase{name: "reply to another, flooded", frame: arpFrame(broadcast, clientMAC, 2, clientMAC, client4, nodeMAC, other4), state: Settled, want: "drop-not-ours"},
		frameCase{name: "request to another host", frame: patch(request, 0, nodeMAC...), state: Settled, want: "drop-not-ours"},
		frameCase{name: "clone MAC as source", frame: patch(request, 6, cloneMAC[:]...), state: Settled, want: "drop-clone-source"},
		frameCase{name: "cut", frame: request[:etherHeader+27], state: Settled, want: "drop-malformed"},
		frameCase{name: "hardware length 128", frame: patch(request, etherHeader+4, 128), state: Settled, want: "drop-malformed"},
		frameCase{name: "protocol length 16", frame: patch(request, etherHeader+5, 16), state: Settled, want: "drop-malformed"},
		frameCase{name: "hardware type 6", frame: patch(request, etherHeader, 0, 6), state: Settled, want: "drop-malformed"},
		frameCase{name: "protocol IPv6", frame: patch(request, etherHeader+2, 0x86, 0xdd), state: Settled, want: "drop-malformed"},
		frameCase{name: "reverse ARP", frame: patch(request, op, 0, 3), state: Settled, want: "drop-malformed"},
		frameCase{name: "from a multicast MAC", frame: patch(request, etherHeader+8, 1), state: Settled, want: "drop-malformed"},
		frameCase{name: "from no MAC", frame: patch(request, etherHeader+8, noMAC...), state: Settled, want: "drop-malformed"},
		frameCase{name: "from a multicast address", frame: patch(request, etherHeader+14, 224), state: Settled, want: "drop-malformed"},
	)
}

func ndpCases() []frameCase {
	const msg = etherHeader + 40
	group, groupMAC := groupOf(vip6)
	otherGroup, otherMAC := groupOf(client6)
	ask := ndp(groupMAC, clientMAC, client6, group, 255, ns(vip6, clientMAC))
	told := ndp(clone(), clientMAC, client6, vip6, 255, na(client6, clientMAC, 0x60))
	query := func(hops uint8, src netip.Addr) []byte {
		f := icmp(src, all6, icmp6Query, 0, make([]byte, 20))
		f = extend6(f, [8]byte{extHopByHop, 0, 5, 2, 0, 0, 1, 0})
		return patch(patch(f, 0, allMAC...), etherHeader+7, hops)
	}
	var cases []frameCase
	for s, answer := range map[State]string{Foreign: "drop-foreign", Settled: "answer-neighbor", Shared: "answer-neighbor", Draining: "drop-foreign"} {
		cases = append(cases,
			frameCase{name: "solicitation", frame: ask, state: s, want: answer},
			frameCase{name: "solicitation without a lease", frame: ask, state: s, fenced: true, want: answer},
			frameCase{name: "solicitation with a nonce", frame: nonce(ask), state: s, want: answer},
			frameCase{name: "unicast solicitation", frame: ndp(clone(), clientMAC, client6, vip6, 255, ns(vip6, nil)), state: s, want: answer},
			frameCase{name: "solicitation from link-local", frame: ndp(groupMAC, clientMAC, router6, group, 255, ns(vip6, clientMAC)), state: s, want: answer},
			frameCase{name: "tagged solicitation", frame: priorityTag(ask, 1), state: s, want: answer},
			frameCase{name: "duplicate-address probe", frame: ndp(groupMAC, clientMAC, none6, group, 255, ns(vip6, nil)), state: s, want: answer},
			frameCase{name: "advertisement", frame: told, state: s, want: "accept-neighbor"},
			frameCase{name: "unsolicited advertisement", frame: ndp(allMAC, clientMAC, client6, all6, 255, na(client6, clientMAC, 0x20)), state: s, want: "accept-neighbor"},
			frameCase{name: "advertisement without address", frame: ndp(clone(), clientMAC, client6, vip6, 255, na(client6, nil, 0x40)), state: s, want: "accept-neighbor"},
			frameCase{name: "advertisement of another node", frame: ndp(allMAC, nodeMAC, vip6, all6, 255, na(vip6, clone(), 0x20)), state: s, want: "drop-own-announcement"},
			frameCase{name: "another node asks", frame: ndp(groupMAC, nodeMAC, vip6, group, 255, ns(other6, clone())), state: s, want: "drop-own-announcement"},
			frameCase{name: "another node asks by unicast", frame: ndp(groupMAC, nodeMAC, vip6, group, 255, ns(other6, nil)), state: s, want: "drop-own-announcement"},
			frameCase{name: "stranger advertises the VIP", frame: ndp(allMAC, clientMAC, client6, all6, 255, na(vip6, clientMAC, 0x20)), state: s, want: "drop-conflict"},
			frameCase{name: "stranger advertises the VIP without address", frame: ndp(clone(), clientMAC, client6, vip6, 255, na(vip6, nil, 0x40)), state: s, want: "drop-conflict"},
			frameCase{name: "stranger advertises the clone MAC", frame: ndp(allMAC, clientMAC, client6, all6, 255, na(client6, clone(), 0x20)), state: s, want: "drop-conflict"},
			frameCase{name: "stranger advertises from the VIP", frame: ndp(allMAC, clientMAC, vip6, all6, 255, na(client6, clientMAC, 0x20)), state: s, want: "drop-conflict"},
			frameCase{name: "stranger asks from the VIP", frame: ndp(groupMAC, clientMAC, vip6, group, 255, ns(vip6, clientMAC)), state: s, want: "drop-conflict"},
			frameCase{name: "stranger asks with the clone MAC", frame: ndp(groupMAC, clientMAC, client6, group, 255, ns(vip6, clone())), state: s, want: "drop-conflict"},
			frameCase{name: "listener query", frame: query(1, router6), state: s, want: "accept-control"},
		)
	}
	long := ask
	for range MaxOptions {
		long = nonce(long)
	}
	drop := func(name string, frame []byte, want string) {
		cases = append(cases, frameCase{name: name, frame: frame, state: Settled, want: want})
	}
	drop("solicitation of another in the same group", ndp(groupMAC, clientMAC, client6, group, 255, ns(other6, clientMAC)), "drop-not-ours")
	drop("solicitation in another group", ndp(otherMAC, clientMAC, other6, otherGroup, 255, ns(client6, clientMAC)), "drop-not-ours")
	drop("solicitation to all nodes", ndp(allMAC, clientMAC, client6, all6, 255, ns(vip6, clientMAC)), "drop-not-ours")
	drop("solicitation by another host's MAC", patch(ask, 0, clientMAC...), "drop-not-ours")
	drop("advertisement to another host", ndp(clone(), clientMAC, client6, other6, 255, na(client6, clientMAC, 0x60)), "drop-not-ours")
	drop("listener query to the VIP", patch(icmp(router6, vip6, icmp6Query, 0, make([]byte, 20)), etherHeader+7, 1), "drop-not-ours")
	drop("clone MAC as source", patch(ask, 6, cloneMAC[:]...), "drop-clone-source")
	drop("solicitation from afar", ndp(groupMAC, clientMAC, client6, group, 254, ns(vip6, clientMAC)), "drop-malformed")
	drop("solicitation with code 1", patch(ask, msg+1, 1), "drop-malformed")
	drop("solicitation of a group", ndp(groupMAC, clientMAC, client6, group, 255, ns(all6, clientMAC)), "drop-malformed")
	drop("solicitation cut", patch(ask, etherHeader+4, 0, 23), "drop-malformed")
	drop("solicitation with an extension header", extend6(ask, [8]byte{extDest, 0, 1, 4}), "drop-malformed")
	drop("solicitation from a group", patch(ask, etherHeader+8, 0xff), "drop-malformed")
	drop("option of length 0", patch(ask, msg+25, 0), "drop-malformed")
	drop("option longer than the message", patch(ask, msg+25, 2), "drop-malformed")
	drop("option cut", patch(ask, etherHeader+4, 0, 31), "drop-malformed")
	drop("link-layer address of 14 bytes", double(ask), "drop-malformed")
	drop("link-layer address of a group", ndp(groupMAC, clientMAC, client6, group, 255, ns(vip6, allMAC)), "drop-malformed")
	drop("link-layer address of zeros", ndp(groupMAC, clientMAC, client6, group, 255, ns(vip6, noMAC)), "drop-malformed")
	drop("nine options", long, "drop-malformed")
	drop("probe with a link-layer address", ndp(groupMAC, clientMAC, none6, group, 255, ns(vip6, clientMAC)), "drop-malformed")
	drop("probe by unicast", ndp(clone(), clientMAC, none6, vip6, 255, ns(vip6, nil)), "drop-malformed")
	drop("solicited advertisement to all", ndp(allMAC, clientMAC, client6, all6, 255, na(client6, clientMAC, 0x60)), "drop-malformed")
	drop("advertisement from nowhere", ndp(allMAC, clientMAC, none6, all6, 255, na(client6, clientMAC, 0x20)), "drop-malformed")
	drop("listener query from afar", query(2, router6), "drop-malformed")
	drop("listener query from a global address", query(1, client6), "drop-malformed")
	drop("listener query cut", patch(query(1, router6), etherHeader+4, 0, 31), "drop-malformed")
	return cases
}

// nonce appends a nonce option (RFC 3971), as Linux does to its probes.
func nonce(frame []byte) []byte {
	frame = append(frame[:len(frame):len(frame)], 14, 1, 1, 2, 3, 4, 5, 6)
	n := len(frame) - etherHeader - 40
	return patch(frame, etherHeader+4, byte(n>>8), byte(n))
}

// double makes the last option one of 16 bytes.
func double(frame []byte) []byte { return patch(nonce(frame), etherHeader+40+25, 2) }

func (c frameCase) ingress(t *testing.T) Verdict {
	f := newFilter(t, testConfig(), c.state)
	if c.fenced {
		f.SetLease(testNow)
	}
	if c.held {
		for b := range Buckets {
			hold(&f.heldTCP, b, testNow, HoldTCP)
			hold(&f.heldDatagram, b, testNow, HoldDatagram)
		}
	}
	if c.sockets != nil {
		return f.Ingress(c.frame, testNow, c.sockets)
	}
	return f.Ingress(c.frame, testNow, nil)
}

func TestIngress(t *testing.T) {
	for _, c := range ingressCases() {
		t.Run(fmt.Sprintf("%s/%v", c.name, c.state), func(t *testing.T) {
			if got := c.ingress(t).String(); got != c.want {
				t.Errorf("Ingress(% x…) in %v, fenced %v, held %v = %s; want %s", c.frame[:min(len(c.frame), 80)], c.state, c.fenced, c.held, got, c.want)
			}
		})
	}
}

// egressCases is everything clone0 may send, and some things it must not.
func egressCases() []frameCase {
	group, groupMAC := groupOf(client6)
	var cases []frameCase
	for _, ip := range clientIPs {
		send := func(name string, s State, frame []byte, want string) {
			cases = append(cases, frameCase{name: name, state: s, frame: frame, want: want})
		}
		for s, rst := range map[State]string{Foreign: "drop-rst", Settled: "send", Shared: "drop-rst", Draining: "drop-rst"} {
			send("SYN ACK", s, tcp(ip.vip, ip.client, 80, clientPort, "SA"), "send")
			send("data", s, tcp(ip.vip, ip.client, 80, clientPort, "PA"), "send")
			send("RST", s, tcp(ip.vip, ip.client, 80, clientPort, "R"), rst)
			send("RST ACK", s, tcp(ip.vip, ip.client, 80, clientPort, "RA"), "send")
			send("RST of a local port", s, tcp(ip.vip, ip.client, localPort, 443, "R"), "drop-rst")
			send("datagram", s, udp(ip.vip, ip.client, 53, clientPort), "send")
			send("echo reply", s, echoReply(ip.vip, ip.client), "send")
			send("SYN", s, tcp(ip.vip, ip.client, localPort, 443, "S"), "send-open")
			send("SYN of a low port", s, tcp(ip.vip, ip.client, 1023, 443, "S"), "send-open")
			query := "send-open"
			if s.Owned() {
				query = "send"
			}
			send("query", s, udp(ip.vip, ip.client, localPort, 53), query)
			send("SYN ACK of a local port", s, tcp(ip.vip, ip.client, localPort, clientPort, "SA"), "send")
			send("data of a local port", s, tcp(ip.vip, ip.client, localPort, clientPort, "PA"), "send")
			send("RST ACK of a local port", s, tcp(ip.vip, ip.client, localPort, clientPort, "RA"), "send")
			send("echo", s, echo(ip.vip, ip.client), "send-open")
			send("SYN of a disabled port", s, tcp(ip.vip, ip.client, offLocalPort, 443, "S"), "send-open")
			send("SYN ACK of a disabled port", s, tcp(ip.vip, ip.client, offPort, clientPort, "SA"), "send")
			send("RST of a disabled port", s, tcp(ip.vip, ip.client, offPort, clientPort, "R"), rst)
			send("datagram of a disabled port", s, udp(ip.vip, ip.client, offPort, clientPort), "send")
		}
		open := tcp(ip.vip, ip.client, localPort, 443, "S")
		send("SYN cut", Settled, open[:len(open)-5], "drop-egress-malformed")
		send("from another address", Settled, tcp(ip.other, ip.client, 80, clientPort, "SA"), "drop-egress-source")
	}
	const l3 = etherHeader
	udp4 := udp(vip4, client4, 53, clientPort)
	return append(cases,
		frameCase{name: "request", frame: arpFrame(broadcast, clone(), 1, clone(), vip4, noMAC, client4), want: "send"},
		frameCase{name: "announcement", frame: arpFrame(broadcast, clone(), 1, clone(), vip4, noMAC, vip4), want: "send"},
		frameCase{name: "request with the wire MAC", frame: arpFrame(broadcast, clone(), 1, nodeMAC, vip4, noMAC, client4), want: "drop-egress-source"},
		frameCase{name: "request from another address", frame: arpFrame(broadcast, clone(), 1, clone(), other4, noMAC, client4), want: "drop-egress-source"},
		frameCase{name: "probe", frame: arpFrame(broadcast, clone(), 1, clone(), none4, noMAC, vip4), want: "drop-egress-source"},
		frameCase{name: "ARP cut", frame: arpFrame(broadcast, clone(), 1, clone(), vip4, noMAC, client4)[:40], want: "drop-egress-malformed"},
		frameCase{name: "solicitation", frame: ndp(groupMAC, clone(), vip6, group, 255, ns(client6, clone())), want: "send"},
		frameCase{name: "advertisement", frame: ndp(allMAC, clone(), vip6, all6, 255, na(vip6, clone(), 0x20)), want: "send"},
		frameCase{name: "solicitation with the wire MAC", frame: ndp(groupMAC, clone(), vip6, group, 255, ns(client6, nodeMAC)), want: "drop-egress-source"},
		frameCase{name: "solicitation from link-local", frame: ndp(groupMAC, clone(), router6, group, 255, ns(client6, clone())), want: "drop-egress-source"},
		frameCase{name: "duplicate-address probe", frame: ndp(groupMAC, clone(), none6, group, 255, ns(client6, nil)), want: "drop-egress-source"},
		frameCase{name: "solicitation from afar", frame: ndp(groupMAC, clone(), vip6, group, 64, ns(client6, clone())), want: "drop-egress-malformed"},
		frameCase{name: "listener report from nowhere", frame: icmp(none6, netip.MustParseAddr("ff02::16"), icmp6ReportV2, 0, make([]byte, 24)), want: "send"},
		frameCase{name: "listener report", frame: icmp(vip6, netip.MustParseAddr("ff02::16"), icmp6ReportV2, 0, make([]byte, 24)), want: "send"},
		frameCase{name: "router solicitation from nowhere", frame: icmp(none6, netip.MustParseAddr("ff02::2"), icmp6RouterSolicit, 0, make([]byte, 4)), want: "drop-egress-source"},
		frameCase{name: "DHCP", frame: udp(none4, netip.MustParseAddr("255.255.255.255"), 68, 67), want: "drop-egress-source"},
		frameCase{name: "fragment", frame: fragment4(udp4, 185, false), want: "send"},
		frameCase{name: "ICMP error", frame: icmp(vip4, client4, 3, 3, append(make([]byte, 4), udp(client4, vip4, clientPort, 9)[l3:]...)), want: "send"},
		frameCase{name: "IGMP report", frame: patch(udp4, l3+9, 2), want: "send"},
		frameCase{name: "LLDP", frame: patch(udp4, 12, 0x88, 0xcc), want: "drop-egress-source"},
		frameCase{name: "VLAN", frame: insert(udp4, 12, 0x81, 0, 0, 5), want: "drop-egress-source"},
		frameCase{name: "runt", frame: udp4[:13], want: "drop-egress-malformed"},
		frameCase{name: "first RST of a flow", frame: tcp(vip4, client4, 80, clientPort, "R"), state: Settled, patient: true, want: "delay-rst"},
		frameCase{name: "first RST of a flow", frame: tcp(vip4, client4, 80, clientPort, "R"), state: Shared, patient: true, want: "drop-rst"},
		frameCase{name: "oversized", frame: append(udp4[:len(udp4):len(udp4)], make([]byte, 65550)...), want: "drop-egress-malformed"},
	)
}

func (c frameCase) egress(t *testing.T) Verdict {
	cfg := testConfig()
	if c.patient {
		cfg.ResetPatience = time.Second
	}
	return newFilter(t, cfg, c.state).Egress(c.frame, testNow)
}

func TestEgress(t *testing.T) {
	for _, c := range egressCases() {
		t.Run(fmt.Sprintf("%s/%v", c.name, c.state), func(t *testing.T) {
			if got := c.egress(t).String(); got != c.want {
				t.Errorf("Egress(% x…) in %v = %s; want %s", c.frame[:min(len(c.frame), 80)], c.state, got, c.want)
			}
		})
	}
}

func TestEveryVerdictIsGiven(t *testing.T) {
	given := map[Verdict]bool{}
	for _, c := range ingressCases() {
		given[c.ingress(t)] = true
	}
	for _, c := range egressCases() {
		given[c.egress(t)] = true
	}
	names := map[string]bool{}
	for v := Verdict(1); v < verdictEnd; v++ {
		if !given[v] {
			t.Errorf("no case gives %v", v)
		}
		if n := v.String(); n == "" || n == "invalid" || names[n] {
			t.Errorf("verdict %d is called %q: empty, invalid or taken", v, n)
		}
		names[v.String()] = true
		if got, want := v.Accept(), strings.HasPrefix(v.String(), "accept-"); got != want {
			t.Errorf("%v.Accept() = %v; want %v", v, got, want)
		}
		if got, want := v.Send(), strings.HasPrefix(v.String(), "send"); got != want {
			t.Errorf("%v.Send() = %v; want %v", v, got, want)
		}
	}
	if given[0] || Verdict(0).String() != "invalid" || verdictEnd.String() != "invalid" {
		t.Error("the zero Verdict is given, or has a name")
	}
}

func TestSocketsAreAskedForTheTuple(t *testing.T) {
	for _, ip := range clientIPs {
		want := Tuple{ProtoTCP, netip.AddrPortFrom(ip.vip, 80), netip.AddrPortFrom(ip.client, clientPort)}
		for name, frame := range map[string][]byte{
			"segment": tcp(ip.client, ip.vip, clientPort, 80, "A"),
			"error":   quote(tcp(ip.vip, ip.client, 80, clientPort, "A"), 48),
		} {
			s := looksUp(SocketEstablished)
			newFilter(t, testConfig(), Shared).Ingress(frame, testNow, s)
			if len(s.asked) != 1 || s.asked[0] != want {
				t.Errorf("%s asked for %v; want once %v", name, s.asked, want)
			}
			s = looksUp(SocketEstablished)
			newFilter(t, testConfig(), Settled).Ingress(frame, testNow, s)
			newFilter(t, testConfig(), Foreign).Ingress(frame, testNow, s)
			if len(s.asked) != 0 {
				t.Errorf("%s asked for %v in a bucket at rest", name, s.asked)
			}
		}
	}
}

// TestClientsBucket: pings with any identifier and requests for the VIP go to
// the owner of the client's one bucket.
func TestClientsBucket(t *testing.T) {
	group, groupMAC := groupOf(vip6)
	for _, ip := range clientIPs {
		f := newFilter(t, testConfig(), Foreign)
		var table Table
		table[f.ClientBucket(ip.client)] = Settled
		f.SetTable(&table, 0)
		frames := map[string][]byte{
			"ping":            echo(ip.client, ip.vip),
			"another ping":    patch(echo(ip.client, ip.vip), etherHeader+20+4, 0x56),
			"error of a pong": quote(echoReply(ip.vip, ip.client), 100),
			"ARP request":     arpFrame(broadcast, clientMAC, 1, clientMAC, client4, noMAC, vip4),
		}
		if ip.client.Is6() {
			frames["another ping"] = patch(echo(ip.client, ip.vip), etherHeader+40+4, 0x56)
			delete(frames, "ARP request")
			frames["solicitation"] = ndp(groupMAC, clientMAC, client6, group, 255, ns(vip6, clientMAC))
		}
		for name, frame := range frames {
			if v := f.Ingress(frame, testNow, nil); v != AcceptNew && v != AnswerNeighbor && v != AcceptError {
				t.Errorf("%s of %v: %v; want it taken", name, ip.client, v)
			}
		}
	}
}

func TestQuarantineAfterHandOver(t *testing.T) {
	const now = testNow
	rst := tcp(vip4, client4, 80, clientPort, "R")
	for _, c := range []struct {
		path []State // from Foreign, a second apart
		want int64   // until then no RST leaves; 0: it leaves at once
	}{
		{[]State{Settled}, 0},                        // nobody was there, or it is dead
		{[]State{Shared, Settled}, now + Quarantine}, // taken over from the living
		{[]State{Settled, Draining, Settled}, now + 1e9 + Quarantine},
		{[]State{Settled, Foreign, Settled}, now + 1e9 + Quarantine},
		{[]State{Settled, Settled}, 0},
	} {
		f, err := New(testConfig())
		if err != nil {
			t.Fatal(err)
		}
		f.SetLease(now + int64(time.Hour))
		at := now
		for _, s := range c.path {
			f.SetTable(uniform(s), at)
			at += 1e9
		}
		if c.want == 0 {
			if got := f.Egress(rst, at); got != Send {
				t.Errorf("%v: RST: %v; want send", c.path, got)
			}
			continue
		}
		if got := f.Egress(rst, c.want-1); got != DropRST {
			t.Errorf("%v: RST in quarantine: %v; want drop-rst", c.path, got)
		}
		if got := f.Egress(rst, c.want); got != Send {
			t.Errorf("%v: RST after quarantine: %v; want send", c.path, got)
		}
		f.EndQuarantine(f.Bucket(Tuple{ProtoTCP, netip.AddrPortFrom(vip4, 80), netip.AddrPortFrom(client4, clientPort)}))
		if got := f.Egress(rst, c.want-1); got != Send {
			t.Errorf("%v: RST after EndQuarantine: %v; want send", c.path, got)
		}
	}
}

// A node whose lease has run out may have slept while others took its buckets
// over: what has queued for it meanwhile is theirs, and must not be reset.
func TestNoResetWithoutLease(t *testing.T) {
	f, err := New(testConfig())
	if err != nil {
		t.Fatal(err)
	}
	f.SetTable(uniform(Settled), 0)
	f.SetLease(testNow)
	rst := tcp(vip4, client4, 80, clientPort, "R")
	if got := f.Egress(rst, testNow-1); got != Send {
		t.Errorf("RST before the lease ends: %v; want send", got)
	}
	if got := f.Egress(rst, testNow); got != DropRST {
		t.Errorf("RST after the lease has ended: %v; want drop-rst", got)
	}
}

func TestHoldLetsAnswersIn(t *testing.T) {
	for _, ip := range clientIPs {
		f := newFilter(t, testConfig(), Foreign)
		syn, ack, answer := tcp(ip.vip, ip.client, localPort, 443, "S"), tcp(ip.vip, ip.client, localPort, 443, "A"), tcp(ip.client, ip.vip, 443, localPort, "SA")
		step := func(what string, got, want Verdict) {
			t.Helper()
			if got != want {
				t.Errorf("%v: %s: %v; want %v", ip.vip, what, got, want)
			}
		}
		now := testNow
		step("answer before the SYN", f.Ingress(answer, now, nil), DropNoSocket)
		step("SYN", f.Egress(syn, now), SendOpen)
		step("answer", f.Ingress(answer, now, nil), AcceptOwn)
		step("second SYN", f.Egress(syn, now+1), Send)
		bucket := f.Bucket(Tuple{ProtoTCP, netip.AddrPortFrom(ip.vip, localPort), netip.AddrPortFrom(ip.client, 443)})
		for b := range Buckets {
			if got, want := isHeld(&f.heldTCP, b, now), b == bucket; got != want {
				t.Errorf("%v: bucket %d held: %v; want %v", ip.vip, b, got, want)
			}
		}
		now += HoldTCP - 1
		step("last answer", f.Ingress(answer, now, nil), AcceptOwn)
		step("segment", f.Egress(ack, now), Send)
		now += HoldTCP - 1
		step("answer to the segment", f.Ingress(answer, now, nil), AcceptOwn)
		step("answer too late", f.Ingress(answer, now+1, nil), DropNoSocket)
		step("segment after a long silence", f.Egress(ack, now+1), Send)
		step("answer after a long silence", f.Ingress(answer, now+1, nil), DropNoSocket)
		flow := Tuple{ProtoTCP, netip.AddrPortFrom(ip.vip, localPort), netip.AddrPortFrom(ip.client, 443)}
		if !f.Hold(flow, now+1) || f.Hold(flow, now+2) {
			t.Errorf("%v: Hold of the kernel's flow does not open a hold, or does so twice", ip.vip)
		}
		step("answer to the kernel's flow", f.Ingress(answer, now+1, nil), AcceptOwn)
		if flow.VIP = netip.AddrPortFrom(ip.vip, 80); f.Hold(flow, now) {
			t.Errorf("%v: Hold of a service's flow opens a hold", ip.vip)
		}

		query, reply := udp(ip.vip, ip.client, localPort, 53), udp(ip.client, ip.vip, 53, localPort)
		step("query", f.Egress(query, now), SendOpen)
		step("reply", f.Ingress(reply, now+HoldDatagram-1, nil), AcceptOwn)
		step("reply too late", f.Ingress(reply, now+HoldDatagram, nil), DropForeign)

		step("ping", f.Egress(echo(ip.vip, ip.client), now), SendOpen)
		step("pong", f.Ingress(echoReply(ip.client, ip.vip), now, nil), AcceptOwn)
	}
}

// TestStrangersOpenNoHold: what the kernel says because a stranger sent
// something to a closed or an unnamed port holds no bucket (I7).
func TestStrangersOpenNoHold(t *testing.T) {
	heldBuckets := func(f *Filter, now int64) (n int) {
		for b := range Buckets {
			if isHeld(&f.heldTCP, b, now) || isHeld(&f.heldDatagram, b, now) {
				n++
			}
		}
		return n
	}
	for _, ip := range clientIPs {
		for s := range State(states) {
			f := newFilter(t, testConfig(), s)
			for port := range uint16(4000) {
				for _, flags := range []string{"RA", "R", "SA", "A", "PA", "FA", "SR", ""} {
					f.Egress(tcp(ip.vip, ip.client, localPort, port+1, flags), testNow)
				}
				f.Egress(echoReply(ip.vip, ip.client), testNow)
				if s.Owned() { // elsewhere the question does not get in
					f.Egress(udp(ip.vip, ip.client, localPort, port+1), testNow)
				}
			}
			if n := heldBuckets(f, testNow); n != 0 {
				t.Errorf("%v in %v: %d buckets are held; want none", ip.vip, s, n)
			}
		}
		f := newFilter(t, testConfig(), Foreign)
		f.Egress(tcp(ip.vip, ip.client, localPort, 443, "S"), testNow)
		for _, flags := range []string{"R", "RA"} {
			f.Egress(tcp(ip.vip, ip.client, localPort, 443, flags), testNow+HoldTCP-1)
		}
		if n := heldBuckets(f, testNow+HoldTCP); n != 0 {
			t.Errorf("%v: a RST keeps up %d holds; want none", ip.vip, n)
		}
		// A datagram's hold is no reason to look up the segments of others.
		f = newFilter(t, testConfig(), Foreign)
		f.Egress(udp(ip.vip, ip.client, localPort, 53), testNow)
		for port := range uint16(4000) {
			if got := f.Ingress(tcp(ip.client, ip.vip, port+1, 80, "A"), testNow, nil); got != DropForeign {
				t.Fatalf("%v: a segment beside a datagram's hold: %v; want drop-foreign", ip.vip, got)
			}
		}
	}
	// Without a lease no answer gets in by the table.
	f := newFilter(t, testConfig(), Settled)
	f.SetLease(testNow)
	if got := f.Egress(udp(vip4, client4, localPort, 53), testNow); got != SendOpen {
		t.Errorf("query without a lease: %v; want send-open", got)
	}
}

func TestRuledPortsAreNotLocal(t *testing.T) {
	cfg := testConfig()
	cfg.Rules = []Rule{{ProtoTCP, localPort, localPort, AffinityClient, false}}
	f := newFilter(t, cfg, Settled)
	if got := f.Ingress(tcp(client4, vip4, clientPort, localPort, "A"), testNow, nil); got != AcceptFlow {
		t.Errorf("segment to a ruled port: %v; want accept-flow", got)
	}
	if got := f.Ingress(tcp(client4, vip4, clientPort, localPort+1, "A"), testNow, nil); got != DropNoSocket {
		t.Errorf("segment to a local port: %v; want drop-no-socket", got)
	}
	if got := f.Egress(tcp(vip4, client4, localPort, clientPort, "R"), testNow); got != Send {
		t.Errorf("RST of a ruled port: %v; want send", got)
	}
	cfg.Rules, cfg.LocalPorts = nil, [2]uint16{1024, 2000}
	f = newFilter(t, cfg, Settled)
	if got := f.Ingress(tcp(client4, vip4, clientPort, 2000, "A"), testNow, nil); got != DropNoSocket {
		t.Errorf("segment to a configured local port: %v; want drop-no-socket", got)
	}
	if got := f.Ingress(tcp(client4, vip4, clientPort, localPort, "A"), testNow, nil); got != AcceptFlow {
		t.Errorf("segment above the configured local ports: %v; want accept-flow", got)
	}
}

// TestDefaultAffinity: the default is that of every port without a rule, local
// ones too, and of nothing else.
func TestDefaultAffinity(t *testing.T) {
	cfg := testConfig()
	cfg.Rules = append(cfg.Rules, Rule{Proto: ProtoTCP, PortLo: 80, PortHi: 80, Affinity: AffinityNone})
	none := newFilter(t, cfg, Settled)
	for _, want := range []Affinity{AffinityNone, AffinityClient, AffinityNetwork, AffinitySingle} {
		cfg.Default = want
		f := newFilter(t, cfg, Settled)
		for _, ip := range clientIPs {
			tuple := func(proto uint8, port uint16) Tuple {
				return Tuple{proto, netip.AddrPortFrom(ip.vip, port), netip.AddrPortFrom(ip.client, clientPort)}
			}
			for _, port := range []uint16{0, 22, 81, localPort, 65535} {
				for _, proto := range []uint8{ProtoTCP, ProtoUDP} {
					k := makeFlowKey(want, addrOf(ip.client), addrOf(ip.vip), clientPort, port, proto)
					if got := f.Bucket(tuple(proto, port)); got != f.hash.bucket(&k) {
						t.Errorf("default %d: %v: bucket %d; want %d", want, tuple(proto, port), got, f.hash.bucket(&k))
					}
				}
			}
			if got, want := f.Bucket(tuple(ProtoTCP, 80)), none.Bucket(tuple(ProtoTCP, 80)); got != want {
				t.Errorf("default %d: the bucket of a port with a rule is %d; want %d", cfg.Default, got, want)
			}
			if got, want := f.ClientBucket(ip.client), none.ClientBucket(ip.client); got != want {
				t.Errorf("default %d: the client's bucket is %d; want %d", cfg.Default, got, want)
			}
		}
		if got := f.Ingress(tcp(client4, vip4, 443, localPort, "A"), testNow, nil); got != DropNoSocket {
			t.Errorf("default %d: segment to a local port: %v; want drop-no-socket", want, got)
		}
	}
}

func TestLeaseIsExclusive(t *testing.T) {
	f := newFilter(t, testConfig(), Settled)
	syn := tcp(client6, vip6, clientPort, 80, "S")
	f.SetLease(testNow)
	if got := f.Ingress(syn, testNow-1, nil); got != AcceptNew {
		t.Errorf("SYN in the last nanosecond: %v; want accept-new", got)
	}
	if got := f.Ingress(syn, testNow, nil); got != DropLease {
		t.Errorf("SYN at the deadline: %v; want drop-lease", got)
	}
	fresh, err := New(testConfig())
	if err != nil {
		t.Fatal(err)
	}
	if got := fresh.Ingress(syn, 0, nil); got != DropForeign {
		t.Errorf("SYN to a fresh Filter: %v; want drop-foreign", got)
	}
}

func TestTableIsCopiedAndChecked(t *testing.T) {
	f := newFilter(t, testConfig(), Foreign)
	mine := uniform(Settled)
	mine[7] = states
	f.SetTable(mine, testNow)
	mine[8] = Foreign
	got := f.Table()
	if got[7] != Foreign || got[8] != Settled {
		t.Errorf("bucket 7 set to an invalid state is %v, bucket 8 changed by the caller is %v; want foreign, settled", got[7], got[8])
	}
}

func TestCounters(t *testing.T) {
	f := newFilter(t, testConfig(), Settled)
	for range 3 {
		f.Ingress(tcp(client4, vip4, clientPort, 80, "S"), testNow, nil)
	}
	f.Ingress(nil, testNow, nil)
	f.Egress(tcp(vip4, client4, 80, clientPort, "SA"), testNow)
	if got, want := f.Counters(), (Counters{AcceptNew: 3, DropRunt: 1, Send: 1}); got != want {
		t.Errorf("Counters() = %v; want %v", got, want)
	}
}

func TestVersionsWithoutVIP(t *testing.T) {
	cfg := testConfig()
	cfg.VIP6 = netip.Addr{}
	f := newFilter(t, cfg, Settled)
	group, groupMAC := groupOf(vip6)
	zero := netip.IPv6Unspecified().As16()
	for name, frame := range map[string][]byte{
		"SYN":       tcp(client6, vip6, clientPort, 80, "S"),
		"SYN to ::": patch(tcp(client6, vip6, clientPort, 80, "S"), etherHeader+24, zero[:]...),
		"NS":        ndp(groupMAC, clientMAC, client6, group, 255, ns(vip6, clientMAC)),
	} {
		if got := f.Ingress(frame, testNow, nil); got != DropNotOurs {
			t.Errorf("without an IPv6 VIP, %s: %v; want drop-not-ours", name, got)
		}
	}
	cfg = testConfig()
	cfg.VIP4 = netip.Addr{}
	f = newFilter(t, cfg, Settled)
	for name, frame := range map[string][]byte{
		"SYN":   tcp(client4, vip4, clientPort, 80, "S"),
		"ARP":   arpFrame(broadcast, clientMAC, 1, clientMAC, client4, noMAC, vip4),
		"probe": arpFrame(broadcast, clientMAC, 1, clientMAC, none4, noMAC, none4),
	} {
		if got := f.Ingress(frame, testNow, nil); got != DropNotOurs {
			t.Errorf("without an IPv4 VIP, %s: %v; want drop-not-ours", name, got)
		}
	}
	for name, frame := range map[string][]byte{
		"SYN ACK": tcp(vip4, client4, 80, clientPort, "SA"),
		"ARP":     arpFrame(broadcast, clone(), 1, clone(), vip4, noMAC, client4),
	} {
		if got := f.Egress(frame, testNow); got != DropEgressSource {
			t.Errorf("without an IPv4 VIP, sending %s: %v; want drop-egress-source", name, got)
		}
	}
}

func TestNewRefuses(t *testing.T) {
	for name, change := range map[string]func(*Config){
		"no MAC":             func(c *Config) { c.CloneMAC = [6]byte{} },
		"multicast MAC":      func(c *Config) { c.CloneMAC[0] = 3 },
		"no VIP":             func(c *Config) { c.VIP4, c.VIP6 = netip.Addr{}, netip.Addr{} },
		"IPv6 as IPv4":       func(c *Config) { c.VIP4 = vip6 },
		"multicast IPv4":     func(c *Config) { c.VIP4 = netip.MustParseAddr("224.0.0.1") },
		"IPv4 as IPv6":       func(c *Config) { c.VIP6 = vip4 },
		"mapped IPv6":        func(c *Config) { c.VIP6 = netip.MustParseAddr("::ffff:10.77.0.10") },
		"zone":               func(c *Config) { c.VIP6 = netip.MustParseAddr("fe80::1%eth0") },
		"loopback IPv6":      func(c *Config) { c.VIP6 = netip.IPv6Loopback() },
		"tiny frames":        func(c *Config) { c.MaxFrame = 13 },
		"local ports":        func(c *Config) { c.LocalPorts = [2]uint16{2, 1} },
		"rule for ICMP":      func(c *Config) { c.Rules = []Rule{{1, 1, 1, AffinityNone, false}} },
		"rule for port 0":    func(c *Config) { c.Rules = []Rule{{ProtoTCP, 0, 1, AffinityNone, false}} },
		"rule upside down":   func(c *Config) { c.Rules = []Rule{{ProtoTCP, 2, 1, AffinityNone, false}} },
		"unknown default":    func(c *Config) { c.Default = affinities },
		"disabled affinity":  func(c *Config) { c.Rules = []Rule{{ProtoTCP, 1, 1, AffinitySingle, true}} },
		"unknown affinity":   func(c *Config) { c.Rules = []Rule{{ProtoTCP, 1, 1, affinities, false}} },
		"rules that overlap": func(c *Config) { c.Rules = []Rule{{ProtoTCP, 1, 9, 1, false}, {ProtoTCP, 9, 10, 1, false}} },
	} {
		cfg := testConfig()
		change(&cfg)
		if _, err := New(cfg); err == nil {
			t.Errorf("%s: New(%+v) succeeded", name, cfg)
		}
	}
}

// TestOneNodeTakesEachNewFlow is I3 at the level of tables: of nodes whose
// tables give each bucket one owner, exactly one accepts.
func TestOneNodeTakesEachNewFlow(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	cfg := testConfig()
	cfg.Rules = []Rule{{ProtoTCP, 80, 80, AffinityClient, false}, {ProtoTCP, 443, 443, AffinityNetwork, false}, {ProtoUDP, 53, 53, AffinitySingle, false}}
	for _, n := range []int{1, 2, 3, 7, 64} {
		nodes := make([]*Filter, n)
		tables := make([]Table, n)
		for b := range Buckets {
			owner := rng.IntN(n)
			tables[owner][b] = []State{Settled, Shared}[rng.IntN(2)]
			for i := range tables {
				if i != owner {
					tables[i][b] = []State{Foreign, Draining}[rng.IntN(2)]
				}
			}
		}
		took := make([]int, n)
		for i := range nodes {
			nodes[i] = newFilter(t, cfg, Foreign)
			nodes[i].SetTable(&tables[i], 0)
		}
		for range 2000 {
			client, vip := netip.AddrFrom4([4]byte{192, 0, byte(rng.Uint32()), byte(rng.Uint32())}), vip4
			if rng.IntN(2) == 0 {
				client, vip = netip.AddrFrom16([16]byte{0: 0xfd, 5: byte(rng.Uint32()), 15: byte(rng.Uint32())}), vip6
			}
			sport, dport := uint16(rng.Uint32()), []uint16{22, 53, 80, 443, localPort}[rng.IntN(5)]
			var frame []byte
			accepts := func(v Verdict) bool { return v == AcceptNew }
			switch rng.IntN(4) {
			case 0, 1:
				frame = tcp(client, vip, sport, dport, "S")
			case 2:
				frame = udp(client, vip, sport, dport)
			case 3:
				frame = echo(client, vip)
				if vip == vip4 {
					frame = arpFrame(broadcast, clientMAC, 1, clientMAC, client, noMAC, vip4)
					accepts = func(v Verdict) bool { return v == AnswerNeighbor }
				}
			}
			takers := 0
			for i, f := range nodes {
				if accepts(f.Ingress(frame, testNow, nil)) {
					takers++
					took[i]++
				}
			}
			if takers != 1 {
				t.Fatalf("%d of %d nodes take % x; want one", takers, n, frame)
			}
		}
		for i, k := range took {
			if n <= 7 && (k < 2000/n/2 || k > 2000/n*2) {
				t.Errorf("node %d of %d took %d of 2000 flows", i, n, k)
			}
		}
	}
}

// TestChangesWhileRunning is for the race detector, and for verdicts that mix
// two tables.
func TestChangesWhileRunning(t *testing.T) {
	f := newFilter(t, testConfig(), Settled)
	syn, rst := tcp(client4, vip4, clientPort, 80, "S"), tcp(vip4, client4, 80, clientPort, "R")
	var writers, readers sync.WaitGroup
	stop := make(chan struct{})
	writers.Go(func() {
		for i := int64(0); ; i++ {
			select {
			case <-stop:
				return
			default:
			}
			f.SetTable(uniform(State(i%int64(states))), i)
			f.SetLease(leaseEnd)
			f.EndQuarantine(int(i % Buckets))
			f.Counters()
			f.Hold(Tuple{Proto: ProtoTCP, VIP: netip.AddrPortFrom(vip4, localPort), Client: netip.AddrPortFrom(client4, 443)}, i)
		}
	})
	for range 2 {
		readers.Go(func() {
			for range 20000 {
				switch v := f.Ingress(syn, testNow, nil); v {
				case AcceptNew, DropForeign, DropDraining:
				default:
					t.Errorf("SYN: %v", v)
					return
				}
				switch v := f.Egress(rst, testNow); v {
				case Send, DropRST:
				default:
					t.Errorf("RST: %v", v)
					return
				}
			}
		})
	}
	readers.Wait()
	close(stop)
	writers.Wait()
	c := f.Counters()
	if got := c[AcceptNew] + c[DropForeign] + c[DropDraining]; got != 40000 {
		t.Errorf("%d SYNs counted; want 40000", got)
	}
}

func TestNoAllocations(t *testing.T) {
	f := newFilter(t, testConfig(), Shared)
	s := &fixedSocket{}
	for _, c := range append(ingressCases(), egressCases()...) {
		if n := testing.AllocsPerRun(10, func() {
			f.Ingress(c.frame, testNow, s)
			f.Egress(c.frame, testNow)
		}); n != 0 {
			t.Errorf("%s: %v allocations; want 0", c.name, n)
		}
	}
}

type fixedSocket struct{}

func (*fixedSocket) Lookup(Tuple) SocketState { return SocketEstablished }

var sink Verdict

func BenchmarkIngress(b *testing.B) {
	_, groupMAC := groupOf(vip6)
	group, _ := groupOf(vip6)
	for _, c := range []struct {
		name  string
		state State
		frame []byte
	}{
		{"other-mac", Settled, patch(tcp(client4, vip4, clientPort, 80, "A"), 0, clientMAC...)},
		{"foreign-tcp4", Foreign, tcp(client4, vip4, clientPort, 80, "A")},
		{"settled-syn4", Settled, tcp(client4, vip4, clientPort, 80, "S")},
		{"settled-tcp4", Settled, tcp(client4, vip4, clientPort, 80, "A")},
		{"settled-tcp6", Settled, tcp(client6, vip6, clientPort, 80, "A")},
		{"shared-tcp4-lookup", Shared, tcp(client4, vip4, clientPort, 80, "A")},
		{"settled-udp4", Settled, udp(client4, vip4, clientPort, 53)},
		{"settled-error4", Settled, quote(tcp(vip4, client4, 80, clientPort, "A"), 48)},
		{"fragment4", Settled, fragment4(udp(client4, vip4, clientPort, 53), 185, true)},
		{"arp-request", Settled, arpFrame(broadcast, clientMAC, 1, clientMAC, client4, noMAC, vip4)},
		{"neighbor-solicitation", Settled, ndp(groupMAC, clientMAC, client6, group, 255, ns(vip6, clientMAC))},
	} {
		b.Run(c.name, func(b *testing.B) {
			f := newFilter(b, testConfig(), c.state)
			s := &fixedSocket{}
			b.ReportAllocs()
			for b.Loop() {
				sink = f.Ingress(c.frame, testNow, s)
			}
		})
	}
}

func BenchmarkEgress(b *testing.B) {
	for _, c := range []struct {
		name  string
		frame []byte
	}{
		{"data4", tcp(vip4, client4, 80, clientPort, "A")},
		{"data6", tcp(vip6, client6, 80, clientPort, "A")},
		{"rst4", tcp(vip4, client4, 80, clientPort, "R")},
		{"own4", tcp(vip4, client4, localPort, 443, "A")},
	} {
		b.Run(c.name, func(b *testing.B) {
			f := newFilter(b, testConfig(), Settled)
			b.ReportAllocs()
			for b.Loop() {
				sink = f.Egress(c.frame, testNow)
			}
		})
	}
}

func BenchmarkSetTable(b *testing.B) {
	f := newFilter(b, testConfig(), Settled)
	tables := [2]*Table{uniform(Settled), uniform(Draining)}
	for i := 0; b.Loop(); i++ {
		f.SetTable(tables[i%2], testNow)
	}
}
