package presence

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"net"

	"clonecluster/netcore/filter"
)

// EtherType is "local experimental 1" (IEEE 802); Group is the locally
// administered multicast address that the frames go to.
const EtherType = 0x88b5

// Group is where presence frames are sent.
var Group = [6]byte{0x03, 0xcc, 0x00, 0x00, 0x88, 0xb5}

// NodeID is a node's wire MAC.
type NodeID [6]byte

func (id NodeID) String() string { return net.HardwareAddr(id[:]).String() }

// State is what a node says of itself. The zero value is invalid.
type State uint8

// The states of a node.
const (
	Listening State = 1 // hears the others, owns nothing yet
	Serving   State = 2
	Leaving   State = 3 // owns nothing any more, may still hold flows
)

func (s State) String() string {
	switch s {
	case Listening:
		return "listening"
	case Serving:
		return "serving"
	case Leaving:
		return "leaving"
	}
	return "invalid"
}

// Peer is one start of one node.
type Peer struct {
	ID          NodeID
	Incarnation uint64 // random, new at every start
}

// Bits is one bit for each bucket: bucket b is bit b%8 of byte b/8.
type Bits [filter.Buckets / 8]byte

// Has reports whether bucket b is set.
func (h *Bits) Has(b int) bool { return h[b/8]&(1<<(b%8)) != 0 }

// Set sets bucket b.
func (h *Bits) Set(b int) { h[b/8] |= 1 << (b % 8) }

// Beacon is the content of one presence frame.
type Beacon struct {
	Peer
	Sequence uint64 // rises with every frame of an incarnation
	State    State
	View     uint64 // names the set of serving nodes the sender goes by
	// Held are the buckets that the sender does not own and in which it has
	// flows; it is only meant if HeldKnown.
	HeldKnown bool
	Held      Bits
	Peers     []Peer // whom the sender hears, at most MaxPeers
}

// MaxPeers bounds the number of nodes of a cluster beside oneself.
const MaxPeers = 63

// The layout, all numbers big endian:
//
//	  0  6  destination: Group
//	  6  6  source: the wire MAC, which is the node id
//	 12  2  EtherType
//	 14  2  'C' 'C'
//	 16  1  version, 1
//	 17  1  state
//	 18  1  flags; bit 0: held is known
//	 19  1  number of peers
//	 20  8  cluster: the first bytes of SHA-256 of its name
//	 28  8  incarnation
//	 36  8  sequence
//	 44  8  view
//	 52 128 held
//	180 14n peers: node id, incarnation
//	 .. 16  HMAC-SHA-256 of everything before it, truncated
const (
	offPayload = 14
	offPeers   = 180
	peerLen    = 14
	macLen     = 16
	minFrame   = offPeers + macLen
	// MaxFrame is the longest presence frame in bytes.
	MaxFrame = minFrame + MaxPeers*peerLen

	version   = 1
	flagKnown = 1
)

// Why a frame was not taken.
var (
	ErrMalformed    = errors.New("malformed presence frame")
	ErrOtherCluster = errors.New("presence frame of another cluster")
	ErrUnauthentic  = errors.New("presence frame with a wrong key")
)

// Codec writes and reads the frames of one cluster.
type Codec struct {
	cluster [8]byte
	key     []byte
}

// NewCodec makes the codec of the cluster with that name; key is the secret of
// the presence frames.
func NewCodec(name string, key []byte) *Codec {
	c := &Codec{key: key}
	sum := sha256.Sum256([]byte(name))
	copy(c.cluster[:], sum[:])
	return c
}

// Encode gives the Ethernet frame of a beacon. A beacon with more than MaxPeers
// peers names the first of them.
func (c *Codec) Encode(b Beacon) []byte {
	peers := b.Peers[:min(len(b.Peers), MaxPeers)]
	f := make([]byte, offPeers, minFrame+len(peers)*peerLen)
	copy(f[0:], Group[:])
	copy(f[6:], b.ID[:])
	binary.BigEndian.PutUint16(f[12:], EtherType)
	f[14], f[15], f[16], f[17] = 'C', 'C', version, byte(b.State)
	if b.HeldKnown {
		f[18] = flagKnown
	}
	f[19] = byte(len(peers))
	copy(f[20:], c.cluster[:])
	binary.BigEndian.PutUint64(f[28:], b.Incarnation)
	binary.BigEndian.PutUint64(f[36:], b.Sequence)
	binary.BigEndian.PutUint64(f[44:], b.View)
	copy(f[52:], b.Held[:])
	for _, p := range peers {
		f = append(f, p.ID[:]...)
		f = binary.BigEndian.AppendUint64(f, p.Incarnation)
	}
	return c.appendMAC(f)
}

// Decode reads an Ethernet frame. The error is one of ErrMalformed,
// ErrOtherCluster and ErrUnauthentic.
func (c *Codec) Decode(f []byte) (Beacon, error) {
	if len(f) < minFrame || len(f) > MaxFrame || binary.BigEndian.Uint16(f[12:]) != EtherType ||
		[6]byte(f[0:]) != Group || f[14] != 'C' || f[15] != 'C' {
		return Beacon{}, ErrMalformed
	}
	if f[16] != version {
		return Beacon{}, fmt.Errorf("%w: version %d, this program knows %d", ErrMalformed, f[16], version)
	}
	if [8]byte(f[20:]) != c.cluster {
		return Beacon{}, ErrOtherCluster
	}
	body := len(f) - macLen
	if want := c.appendMAC(f[:body:body]); !hmac.Equal(want[body:], f[body:]) {
		return Beacon{}, ErrUnauthentic
	}
	b := Beacon{
		Peer:      Peer{ID: NodeID(f[6:12]), Incarnation: binary.BigEndian.Uint64(f[28:])},
		State:     State(f[17]),
		HeldKnown: f[18] == flagKnown,
		Sequence:  binary.BigEndian.Uint64(f[36:]),
		View:      binary.BigEndian.Uint64(f[44:]),
		Held:      Bits(f[52:offPeers]),
	}
	n := int(f[19])
	if b.State.String() == "invalid" || f[18]&^flagKnown != 0 || body != offPeers+n*peerLen || f[6]&1 != 0 {
		return Beacon{}, ErrMalformed
	}
	for p := offPeers; p < body; p += peerLen {
		b.Peers = append(b.Peers, Peer{ID: NodeID(f[p : p+6]), Incarnation: binary.BigEndian.Uint64(f[p+6:])})
	}
	return b, nil
}

func (c *Codec) appendMAC(f []byte) []byte {
	m := hmac.New(sha256.New, c.key)
	m.Write(f)
	return append(f, m.Sum(nil)[:macLen]...)
}
