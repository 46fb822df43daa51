package filter

import (
	"encoding/binary"
	"net/netip"
)

// action is what the table of states says before lease and sockets are asked.
type action uint8

const (
	dropForeign action = iota
	dropDraining
	acceptNew   // given a lease
	acceptFlow  //
	askSocket   // whose segment is it?
	acceptError //
	askQuoted   // whose segment is quoted?
)

// contract is the table of the package's description.
var contract = [kinds][states]action{
	kindSYN:   {Foreign: dropForeign, Settled: acceptNew, Shared: acceptNew, Draining: dropDraining},
	kindTCP:   {Foreign: dropForeign, Settled: acceptFlow, Shared: askSocket, Draining: askSocket},
	kindUDP:   {Foreign: dropForeign, Settled: acceptNew, Shared: acceptNew, Draining: dropDraining},
	kindEcho:  {Foreign: dropForeign, Settled: acceptNew, Shared: acceptNew, Draining: dropDraining},
	kindError: {Foreign: dropForeign, Settled: acceptError, Shared: askQuoted, Draining: askQuoted},
}

// Ingress gives the verdict on a frame from the wire, without virtio header,
// at nowMono (CLOCK_MONOTONIC, nanoseconds), and counts it. Checksums are not
// looked at: with offloads they may not be there yet. s may be nil.
func (f *Filter) Ingress(frame []byte, nowMono int64, s Sockets) Verdict {
	return f.ingress.count(f.fromWire(frame, nowMono, s, &f.offered))
}

// Egress gives the verdict on a frame from clone0, without virtio header, at
// nowMono (CLOCK_MONOTONIC, nanoseconds), and counts it. The Ethernet source
// is the caller's to rewrite and is not looked at.
func (f *Filter) Egress(frame []byte, nowMono int64) Verdict {
	return f.egress.count(f.fromClone(frame, nowMono, false))
}

// Release judges a frame again that was DelayRST, after ResetPatience. It counts only
// a frame that is dropped now.
func (f *Filter) Release(frame []byte, nowMono int64) Verdict {
	v := f.fromClone(frame, nowMono, true)
	if v == DropRST {
		f.egress.count(v)
	}
	return v
}

// Discard counts a frame that was DelayRST and for which there is no room.
func (f *Filter) Discard() { f.egress.count(DropRST) }

// fromWire counts in o, unless that is nil.
func (f *Filter) fromWire(frame []byte, now int64, s Sockets, o *offered) Verdict {
	if len(frame) < etherHeader {
		return DropRunt
	}
	if len(frame) > f.maxFrame {
		return DropOversized
	}
	dst, src := mac(frame), mac(frame[6:])
	switch {
	case src == f.clone && binary.BigEndian.Uint16(frame[12:]) == etherRARP:
		return DropCloneRARP
	case src == f.clone:
		return DropCloneSource
	case dst != f.clone && !isGroup(dst):
		return DropNotOurs
	case !isStation(src):
		return DropMalformed
	}
	etherType, b, v := untag(frame)
	if v != 0 {
		return v
	}
	var p packet
	switch etherType {
	case etherARP:
		return f.arp(b)
	case etherIPv4:
		if !parseIPv4(b, false, &p) {
			return DropMalformed
		}
	case etherIPv6:
		if !parseIPv6(b, false, &p) {
			return DropMalformed
		}
	default:
		return DropNotOurs
	}
	if p.v6 && (p.kind == kindNeighbor || p.kind == kindQuery) {
		return f.control(&p, dst)
	}
	switch {
	case dst != f.clone || !f.isVIP(&p, p.dst):
		return DropNotOurs
	case p.src == p.dst || !isUnicast(p.src) || p.v6 && isMapped(p.src):
		return DropSpoofed
	}
	return f.flow(&p, now, s, o)
}

// isVIP tells whether a is the VIP of the packet's IP version.
func (f *Filter) isVIP(p *packet, a addr) bool {
	if p.v6 {
		return a == f.vip6 && f.vip6 != addr{}
	}
	return a == f.vip4
}

// flow decides on a packet to the VIP.
func (f *Filter) flow(p *packet, now int64, s Sockets, o *offered) Verdict {
	switch p.kind {
	case kindFragment:
		return AcceptFragment
	case kindRouter:
		return DropRouter
	case kindError:
		return f.icmpError(p, now, s)
	case kindEchoReply:
		if isHeld(&f.heldDatagram, f.clientBucket(p.src, p.dst), now) {
			return AcceptOwn
		}
		return DropNoSocket
	case kindEcho:
		return f.decide(kindEcho, f.clientBucket(p.src, p.dst), now, nil, p)
	case kindSYN, kindTCP, kindUDP:
	default:
		return DropProtocol
	}
	port := f.port(p.proto, p.dstPort)
	if port&PortDisabled != 0 {
		return DropDisabled
	}
	bucket := f.flowBucket(p.src, p.dst, p.srcPort, p.dstPort, p.proto)
	if o != nil {
		f.offer(o, p, port, bucket, now)
	}
	if p.kind != kindSYN && port&PortLocal != 0 {
		if isHeld(f.held(p.proto), bucket, now) {
			return AcceptOwn
		}
		if p.kind == kindTCP {
			return DropNoSocket
		}
	}
	return f.decide(p.kind, bucket, now, s, p)
}

// icmpError decides on an error by the packet it quotes, which is turned
// round: then it reads like a packet of the client's.
func (f *Filter) icmpError(p *packet, now int64, s Sockets) Verdict {
	var q packet
	if !parseQuote(p, &q) {
		return DropMalformed
	}
	if !f.isVIP(&q, q.src) || !isUnicast(q.dst) || q.v6 && isMapped(q.dst) {
		return DropQuote
	}
	q.turn()
	var bucket int
	own := false
	switch q.kind {
	case kindTCP, kindUDP:
		port := f.port(q.proto, q.dstPort)
		if port&PortDisabled != 0 {
			return DropDisabled
		}
		bucket = f.flowBucket(q.src, q.dst, q.srcPort, q.dstPort, q.proto)
		own = port&PortLocal != 0
	case kindEcho, kindEchoReply:
		bucket = f.clientBucket(q.src, q.dst)
		own = q.kind == kindEcho
	default:
		return DropQuote
	}
	if own {
		if isHeld(f.held(q.proto), bucket, now) {
			return AcceptError
		}
		if q.kind == kindTCP {
			return DropNoSocket
		}
	}
	if q.proto != ProtoTCP {
		s = nil
	}
	return f.decide(kindError, bucket, now, s, &q)
}

// decide applies the table. p is the packet as the client's side sends it, the
// quoted one in the case of an error.
func (f *Filter) decide(k kind, bucket int, now int64, s Sockets, p *packet) Verdict {
	state := f.table.Load()[bucket]
	if state == Foreign && p.proto == ProtoTCP && isHeld(&f.heldTCP, bucket, now) {
		state = Draining
	}
	switch contract[k][state] {
	case acceptNew:
		if now < f.lease.Load() {
			return AcceptNew
		}
		return DropLease
	case acceptFlow:
		return AcceptFlow
	case askSocket:
		return segment(p, s)
	case acceptError:
		return AcceptError
	case askQuoted:
		if s == nil || s.Lookup(tuple(p)) == SocketEstablished {
			return AcceptError
		}
		return DropNoSocket
	case dropDraining:
		return DropDraining
	}
	return DropForeign
}

// segment decides on a TCP segment, other than a SYN, in a bucket that changes
// hands.
func segment(p *packet, s Sockets) Verdict {
	if s == nil {
		return AcceptTransit
	}
	switch s.Lookup(tuple(p)) {
	case SocketEstablished:
		return AcceptFlow
	case SocketListener:
		if p.flags&(tcpACK|tcpSYN|tcpRST) == tcpACK {
			return AcceptTransit
		}
	}
	return DropNoSocket
}

func tuple(p *packet) Tuple {
	return Tuple{
		Proto:  p.proto,
		VIP:    netip.AddrPortFrom(p.dst.addr(), p.dstPort),
		Client: netip.AddrPortFrom(p.src.addr(), p.srcPort),
	}
}

// arp decides on an ARP packet to the clone MAC or to a group. The kernel sees
// only what other hosts say of other addresses.
func (f *Filter) arp(b []byte) Verdict {
	var a arp
	if !parseARP(b, &a) {
		return DropMalformed
	}
	fromVIP, fromClone := a.sender == f.vip4, a.senderMAC == f.clone
	switch {
	case f.vip4 == addr{}:
		return DropNotOurs
	case fromClone && (fromVIP || a.sender == zero4):
		return DropOwnAnnouncement
	case fromClone || fromVIP:
		return DropConflict
	case a.request && a.target == f.vip4:
		return f.answer(a.sender, f.vip4)
	case a.sender == zero4:
		return DropNotOurs
	case a.sender == a.target, !a.request && a.target == f.vip4:
		return AcceptNeighbor
	}
	return DropNotOurs
}

// answer gives the verdict on a request for the VIP. No lease is needed: two
// nodes that answer say the same.
func (f *Filter) answer(asker, vip addr) Verdict {
	if f.table.Load()[f.clientBucket(asker, vip)].Owned() {
		return AnswerNeighbor
	}
	return DropForeign
}

// control decides on what ICMPv6 says about the link: NDP and listener queries.
func (f *Filter) control(p *packet, dst uint64) Verdict {
	if f.vip6 == (addr{}) {
		return DropNotOurs
	}
	toVIP := dst == f.clone && p.dst == f.vip6
	toGroup := isGroup(dst) && (p.dst == allNodes || p.dst == solicitedNode(f.vip6))
	if !toVIP && !toGroup {
		return DropNotOurs
	}
	if p.kind == kindQuery {
		// RFC 3810, 5.1.14 and 6.2.
		if len(p.payload) < ndpLength || p.hopLimit != mldHopLimit || !isLinkLocal(p.src) {
			return DropMalformed
		}
		if toVIP {
			return DropNotOurs
		}
		return AcceptControl
	}
	var n neighbor
	if !parseNeighbor(p, &n) {
		return DropMalformed
	}
	fromClone := n.hasLink && n.linkAddr == f.clone
	if p.icmpType == icmp6NeighborAdvert {
		switch {
		case n.target == f.vip6 && fromClone:
			return DropOwnAnnouncement
		case n.target == f.vip6 || fromClone || p.src == f.vip6:
			return DropConflict
		}
		return AcceptNeighbor
	}
	switch {
	case p.src == f.vip6 && (fromClone || !n.hasLink):
		return DropOwnAnnouncement
	case p.src == f.vip6 || fromClone:
		return DropConflict
	case n.target != f.vip6 || p.dst == allNodes:
		return DropNotOurs
	}
	return f.answer(p.src, f.vip6)
}

// fromClone decides on a frame that the kernel sends by clone0. Only what
// speaks for the VIP may leave: anything else from that device would be a
// leak. A RST that is judged again has waited.
func (f *Filter) fromClone(frame []byte, now int64, again bool) Verdict {
	if len(frame) < etherHeader || len(frame) > f.maxFrame {
		return DropEgressMalformed
	}
	b := frame[etherHeader:]
	var p packet
	switch uint16(frame[12])<<8 | uint16(frame[13]) {
	case etherARP:
		var a arp
		if !parseARP(b, &a) {
			return DropEgressMalformed
		}
		if a.senderMAC != f.clone || a.sender != f.vip4 {
			return DropEgressSource
		}
		return Send
	case etherIPv4:
		if !parseIPv4(b, false, &p) {
			return DropEgressMalformed
		}
	case etherIPv6:
		if !parseIPv6(b, false, &p) {
			return DropEgressMalformed
		}
	default:
		return DropEgressSource
	}
	if !f.isVIP(&p, p.src) {
		// Without a link-local address the kernel reports its groups from the
		// unspecified one (RFC 3590).
		if p.v6 && p.kind == kindReport && p.src == (addr{}) && f.vip6 != (addr{}) {
			return Send
		}
		return DropEgressSource
	}
	return f.speak(&p, now, again)
}

// speak decides on a packet from the VIP.
func (f *Filter) speak(p *packet, now int64, again bool) Verdict {
	switch p.kind {
	case kindNeighbor:
		var n neighbor
		if !parseNeighbor(p, &n) {
			return DropEgressMalformed
		}
		if n.hasLink && n.linkAddr != f.clone {
			return DropEgressSource
		}
		return Send
	case kindEcho:
		return open(&f.heldDatagram, f.clientBucket(p.dst, p.src), now, HoldDatagram)
	case kindSYN, kindTCP, kindUDP:
	default:
		return Send
	}
	local := f.port(p.proto, p.srcPort)&PortLocal != 0
	reset := p.flags&(tcpRST|tcpACK) == tcpRST
	if !local && !reset && p.kind != kindSYN {
		return Send
	}
	bucket := f.flowBucket(p.dst, p.src, p.dstPort, p.srcPort, p.proto)
	state, leased := f.table.Load()[bucket], now < f.lease.Load()
	switch {
	case p.kind == kindSYN:
		return open(&f.heldTCP, bucket, now, HoldTCP)
	case p.kind == kindUDP:
		// Where the table lets the answer in, this may itself be the answer to
		// a stranger's datagram, and needs no hold if it is not.
		if state.Owned() && leased {
			return Send
		}
		return open(&f.heldDatagram, bucket, now, HoldDatagram)
	case reset:
		// Also where the node owns nothing, or cannot know whose flow it is: one
		// whose lease has run out may have slept while others took over.
		if local || state != Settled || now < f.quarantine[bucket].Load() || !leased {
			return DropRST
		}
		if f.resets != nil && !again {
			return f.resets.judge(f.flowHash(p.dst, p.src, p.dstPort, p.srcPort, p.proto), now, f.patience)
		}
	case p.flags&tcpRST == 0 && isHeld(&f.heldTCP, bucket, now):
		// Only to go on: the kernel also speaks from a local port because a
		// stranger sent it something.
		hold(&f.heldTCP, bucket, now, HoldTCP)
	}
	return Send
}

// open holds the bucket of a flow of this node's.
func open(held *deadlines, bucket int, now, length int64) Verdict {
	if hold(held, bucket, now, length) {
		return SendOpen
	}
	return Send
}
