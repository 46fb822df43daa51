package filter

// Verdict is what the filter says of one frame. The names are those of the
// metrics and stay; the numbers are those of one build, and every datapath
// takes them from here. The zero value is not a verdict.
type Verdict uint8

// Verdicts on frames from the wire. Only those named Accept… go to the kernel.
const (
	_ Verdict = iota
	// AcceptNew: a SYN, datagram or echo request in a bucket this node owns.
	AcceptNew
	// AcceptFlow: a TCP segment in a settled bucket, or one with a local socket.
	AcceptFlow
	// AcceptTransit: a TCP segment in a bucket that changes hands, let through
	// without a look-up. The kernel's RST, should it know no socket, is swallowed.
	AcceptTransit
	// AcceptOwn: an answer to a flow that a node opened from the VIP.
	AcceptOwn
	// AcceptError: an ICMP error that quotes a packet of a local flow.
	AcceptError
	// AcceptFragment: a fragment without ports; every node takes it.
	AcceptFragment
	// AcceptNeighbor: an ARP reply, neighbour advertisement or announcement of
	// another host's address; every node takes it.
	AcceptNeighbor
	// AcceptControl: a multicast listener query; every node reports for itself.
	AcceptControl
	// AnswerNeighbor: an ARP request or neighbour solicitation for the VIP that
	// this node has to answer itself. It must not reach the kernel.
	AnswerNeighbor
	// DropForeign: another node's bucket.
	DropForeign
	// DropDraining: a new flow in a bucket this node is giving away.
	DropDraining
	// DropLease: a new flow in an owned bucket, but the lease has run out.
	DropLease
	// DropNoSocket: a segment in a changing bucket, or an answer to a flow that
	// this node did not open.
	DropNoSocket
	// DropNotOurs: another address, hardware address or EtherType.
	DropNotOurs
	// DropProtocol: an IP protocol or ICMP type the cluster does not serve.
	DropProtocol
	// DropVLAN: a VLAN tag with an identifier other than 0, or too many tags.
	DropVLAN
	// DropRunt: shorter than an Ethernet header.
	DropRunt
	// DropOversized: longer than Config.MaxFrame.
	DropOversized
	// DropMalformed: a header is cut off or contradicts itself.
	DropMalformed
	// DropSpoofed: the source is the VIP itself, or no unicast address.
	DropSpoofed
	// DropCloneSource: the Ethernet source is the clone MAC (I1 broken elsewhere).
	DropCloneSource
	// DropCloneRARP: the same, and it is a RARP (RFC 903), by which hypervisors tell
	// switches where a machine is after a migration.
	DropCloneRARP
	// DropQuote: an ICMP error that quotes nothing this cluster sent.
	DropQuote
	// DropRouter: a redirect, router solicitation or advertisement.
	DropRouter
	// DropOwnAnnouncement: another node of the cluster speaks for the VIP (I8).
	DropOwnAnnouncement
	// DropConflict: a stranger claims the VIP or the clone MAC.
	DropConflict
	// DropDisabled: a port that the cluster does not serve, by a Rule.
	DropDisabled

	// Send: a frame from clone0 that may leave.
	Send
	// SendOpen: the same, and it opens a flow in a bucket not held until now.
	SendOpen
	// DropRST: a pure RST in a bucket where a live peer may hold the flow.
	DropRST
	// DelayRST: a pure RST, the first one of its flow; see Config.ResetPatience. After
	// that time it is to be judged again, and may leave unless it is DropRST then.
	DelayRST
	// DropEgressSource: a frame from clone0 that does not speak for the VIP.
	DropEgressSource
	// DropEgressMalformed: a frame from clone0 that is no frame.
	DropEgressMalformed

	verdictEnd
)

// Verdicts is the number of verdict values, the invalid zero included.
const Verdicts = int(verdictEnd)

var verdictNames = [Verdicts]string{
	0:                   "invalid",
	AcceptNew:           "accept-new",
	AcceptFlow:          "accept-flow",
	AcceptTransit:       "accept-transit",
	AcceptOwn:           "accept-own",
	AcceptError:         "accept-error",
	AcceptFragment:      "accept-fragment",
	AcceptNeighbor:      "accept-neighbor",
	AcceptControl:       "accept-control",
	AnswerNeighbor:      "answer-neighbor",
	DropForeign:         "drop-foreign",
	DropDraining:        "drop-draining",
	DropLease:           "drop-lease",
	DropNoSocket:        "drop-no-socket",
	DropNotOurs:         "drop-not-ours",
	DropProtocol:        "drop-protocol",
	DropVLAN:            "drop-vlan",
	DropRunt:            "drop-runt",
	DropOversized:       "drop-oversized",
	DropMalformed:       "drop-malformed",
	DropSpoofed:         "drop-spoofed",
	DropCloneSource:     "drop-clone-source",
	DropCloneRARP:       "drop-clone-rarp",
	DropQuote:           "drop-quote",
	DropRouter:          "drop-router",
	DropOwnAnnouncement: "drop-own-announcement",
	DropConflict:        "drop-conflict",
	DropDisabled:        "drop-disabled",
	Send:                "send",
	SendOpen:            "send-open",
	DropRST:             "drop-rst",
	DelayRST:            "delay-rst",
	DropEgressSource:    "drop-egress-source",
	DropEgressMalformed: "drop-egress-malformed",
}

// String gives the name used in logs, metrics and tests, "drop-foreign".
func (v Verdict) String() string {
	if int(v) >= Verdicts {
		return verdictNames[0]
	}
	return verdictNames[v]
}

// Accept reports whether an ingress frame goes to the kernel.
func (v Verdict) Accept() bool { return v >= AcceptNew && v <= AcceptControl }

// Send reports whether an egress frame may leave.
func (v Verdict) Send() bool { return v == Send || v == SendOpen }
