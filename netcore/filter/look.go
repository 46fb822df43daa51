package filter

import "net/netip"

// Seen is what a Filter makes of a frame that somebody looks at.
type Seen struct {
	Verdict Verdict
	// Bucket is the flow's, and State what this node is to it; -1 if the frame
	// is of no flow.
	Bucket int
	State  State
	// Tuple is the flow: without ports if it has none, and without a VIP if the
	// frame is not for this cluster or by it. ARP and NDP have a client alone.
	Tuple Tuple
}

// Look gives the verdict on a frame that has come in by the NIC, as Ingress does, or
// that has left by it, and says whose it is. It counts nothing and opens no hold: it
// is for captures. Of what leaves it only tells what speaks for the VIP (Send) from
// the rest (DropNotOurs).
func (f *Filter) Look(frame []byte, left bool, nowMono int64, s Sockets) Seen {
	seen := Seen{Bucket: -1}
	if left {
		seen.Verdict = DropNotOurs
	} else {
		seen.Verdict = f.fromWire(frame, nowMono, s, nil)
	}
	if len(frame) < etherHeader {
		return seen
	}
	etherType, b, bad := untag(frame)
	if bad != 0 {
		return seen
	}
	var p packet
	switch etherType {
	case etherARP:
		var a arp
		if f.vip4 != (addr{}) && parseARP(b, &a) {
			f.lookARP(&a, left, &seen)
		}
		return seen
	case etherIPv4:
		if !parseIPv4(b, false, &p) {
			return seen
		}
	case etherIPv6:
		if !parseIPv6(b, false, &p) {
			return seen
		}
	default:
		return seen
	}
	if left {
		if !f.isVIP(&p, p.src) {
			return seen
		}
		seen.Verdict = Send
		p.turn()
	} else if p.kind == kindNeighbor {
		seen.Tuple.Client = netip.AddrPortFrom(p.src.addr(), 0)
		return seen
	} else if !f.isVIP(&p, p.dst) {
		return seen
	}
	f.lookFlow(&p, &seen)
	return seen
}

func (f *Filter) lookARP(a *arp, left bool, seen *Seen) {
	client, spoken := a.sender, a.sender == f.vip4
	if spoken {
		client = a.target
	}
	if left && spoken {
		seen.Verdict = Send
	}
	if spoken || a.target == f.vip4 {
		seen.Tuple.Client = netip.AddrPortFrom(client.addr(), 0)
	}
}

// lookFlow finds the flow of a packet, as a client sends it.
func (f *Filter) lookFlow(p *packet, seen *Seen) {
	if p.kind == kindError {
		var q packet
		if !parseQuote(p, &q) || !f.isVIP(&q, q.src) {
			return
		}
		q.turn()
		p = &q
	}
	seen.Tuple = Tuple{Proto: p.proto, VIP: netip.AddrPortFrom(p.dst.addr(), 0), Client: netip.AddrPortFrom(p.src.addr(), 0)}
	switch p.kind {
	case kindSYN, kindTCP, kindUDP:
		seen.Tuple = tuple(p)
		seen.Bucket = f.flowBucket(p.src, p.dst, p.srcPort, p.dstPort, p.proto)
	case kindEcho, kindEchoReply:
		seen.Bucket = f.clientBucket(p.src, p.dst)
	default:
		return
	}
	seen.State = f.table.Load()[seen.Bucket]
}

// turn makes a packet of the VIP's read like one of the client's.
func (p *packet) turn() { p.src, p.dst, p.srcPort, p.dstPort = p.dst, p.src, p.dstPort, p.srcPort }

// SetHolds makes the buckets held until these instants (CLOCK_MONOTONIC, nanoseconds),
// by bucket, as another filter says that stands in for this one.
func (f *Filter) SetHolds(tcp, datagram *[Buckets]int64) {
	for b := range Buckets {
		f.heldTCP[b].Store(tcp[b])
		f.heldDatagram[b].Store(datagram[b])
	}
}
