package filter

// Asked is what a frame for the VIP asks for, to whoever passes it on.
type Asked uint8

// What a frame may ask for.
const (
	AskNothing  Asked = iota // it is not for the VIP
	AskBucket                // whoever has the bucket
	AskEveryone              // any node: it does not tell which
	AskNeighbor              // who has the VIP
)

// Route says to whom a frame for the VIP has to be passed on that came to another
// address than the clone MAC: to those of a bucket, or to all, as of parts of packets,
// of errors and of flows that nodes have opened the bucket does not tell who wants them.
func (f *Filter) Route(frame []byte) (bucket int, asked Asked) {
	if len(frame) < etherHeader || len(frame) > f.maxFrame {
		return 0, AskNothing
	}
	etherType, b, v := untag(frame)
	if v != 0 {
		return 0, AskNothing
	}
	var p packet
	switch etherType {
	case etherARP:
		var a arp
		switch {
		case !parseARP(b, &a) || a.target != f.vip4 || f.vip4 == addr{} || a.sender == f.vip4:
			return 0, AskNothing
		case a.request:
			return 0, AskNeighbor
		}
		return 0, AskEveryone
	case etherIPv4:
		if !parseIPv4(b, false, &p) {
			return 0, AskNothing
		}
	case etherIPv6:
		if !parseIPv6(b, false, &p) {
			return 0, AskNothing
		}
	default:
		return 0, AskNothing
	}
	if p.v6 && p.kind == kindNeighbor {
		var n neighbor
		if !parseNeighbor(&p, &n) {
			return 0, AskNothing
		}
		switch {
		case n.target == f.vip6 && p.icmpType != icmp6NeighborAdvert && p.src != f.vip6:
			return 0, AskNeighbor
		case p.dst == f.vip6 && p.icmpType == icmp6NeighborAdvert:
			return 0, AskEveryone
		}
		return 0, AskNothing
	}
	if !f.isVIP(&p, p.dst) || f.isVIP(&p, p.src) {
		return 0, AskNothing
	}
	switch p.kind {
	case kindSYN, kindTCP, kindUDP:
		if p.kind != kindSYN && f.port(p.proto, p.dstPort)&PortLocal != 0 {
			return 0, AskEveryone
		}
		return f.flowBucket(p.src, p.dst, p.srcPort, p.dstPort, p.proto), AskBucket
	case kindEcho:
		return f.clientBucket(p.src, p.dst), AskBucket
	}
	return 0, AskEveryone
}
