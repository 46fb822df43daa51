package membership

import (
	"bytes"
	"cmp"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"net"

	"clonecluster/netcore/filter"
)

// EtherType is "local experimental 1" (IEEE 802).
const EtherType = 0x88b5

// Group is the locally administered multicast address that beacons and maps are
// sent to.
var Group = [6]byte{0x03, 0xcc, 0x00, 0x00, 0x88, 0xb5}

// NodeID is a node's wire MAC.
type NodeID [6]byte

func (id NodeID) String() string { return net.HardwareAddr(id[:]).String() }

// Compare orders node ids; the leader is the lowest.
func (id NodeID) Compare(other NodeID) int { return cmp.Compare(idNumber(id), idNumber(other)) }

// State is what a node says of itself. The zero value is invalid.
type State uint8

// The states of a node.
const (
	Listening State = 1 // hears the others, owns nothing
	Serving   State = 2
	Draining  State = 3 // wants to own nothing, and owns what no other takes
	Stopping  State = 4 // owns nothing, and waits for its flows to end
	Leaving   State = 5 // its last word: it is gone
	// Restarting is its last word, too: it owns nothing, and another engine on the
	// same kernel will be there in a moment for the flows that it holds.
	Restarting State = 6
)

var stateNames = [...]string{"invalid", "listening", "serving", "draining", "stopping", "leaving", "restarting"}

func (s State) valid() bool { return s >= Listening && s <= Restarting }

// takesPart reports whether a node in that state may own buckets and lead.
func (s State) takesPart() bool { return s == Serving || s == Draining }

func (s State) String() string {
	if !s.valid() {
		return stateNames[0]
	}
	return stateNames[s]
}

// Peer is one start of one node.
type Peer struct {
	ID          NodeID
	Incarnation uint64 // random, new at every start
}

// Tag stands for a Peer in the lists of those who are heard. That two of them
// are the same by chance is one in four thousand million.
type Tag uint32

// Tag gives the first bytes of SHA-256 of id and incarnation.
func (p Peer) Tag() Tag {
	b := append(make([]byte, 0, 14), p.ID[:]...)
	sum := sha256.Sum256(binary.BigEndian.AppendUint64(b, p.Incarnation))
	return Tag(binary.BigEndian.Uint32(sum[:]))
}

// Bits is one bit for each bucket: bucket b is bit b%8 of byte b/8.
type Bits [filter.Buckets / 8]byte

// Has reports whether bucket b is set.
func (h *Bits) Has(b int) bool { return h[b/8]&(1<<(b%8)) != 0 }

// Set sets bucket b.
func (h *Bits) Set(b int) { h[b/8] |= 1 << (b % 8) }

// Clear clears bucket b.
func (h *Bits) Clear(b int) { h[b/8] &^= 1 << (b % 8) }

// MapID names a map. Of two maps the one with the higher id holds.
type MapID struct {
	Version uint64
	Leader  NodeID // who made it
}

// Compare orders map ids by version, then by leader.
func (id MapID) Compare(other MapID) int {
	if id.Version != other.Version { // nearly always enough
		return cmp.Compare(id.Version, other.Version)
	}
	return id.Leader.Compare(other.Leader)
}

func (id MapID) String() string { return fmt.Sprintf("%d of %v", id.Version, id.Leader) }

// Beacon says what a node is and what it knows.
type Beacon struct {
	Peer
	Sequence uint64 // rises with every frame of an incarnation
	State    State
	Sick     bool // the health check of a service fails
	// HeldKnown: Held are all the buckets that the sender does not own and in
	// which it has flows. Otherwise it has yet to look.
	HeldKnown bool
	Held      Bits
	Weight    uint16 // static, 1 to 1000
	Busy      uint16 // share of the processors that work, in thousandths, damped
	Flows     uint32 // connections of the VIP, damped
	Rules     uint64 // filter.Config.Fingerprint
	Map       MapID  // adopted; version 0: none yet
	Parent    MapID  // what that map was made from
	Lowest    NodeID // of those that take part and whom the sender hears two-way, itself included; zero: nobody
	Heard     []Tag  // whom the sender hears, at most MaxNodes
}

// Map says who owns each bucket.
type Map struct {
	MapID
	Parent  MapID    // the map it was made from, unless version 0
	Rules   uint64   // the rules of its leader
	Members []NodeID // at most MaxNodes
	Owner   [filter.Buckets]uint8
}

// Nobody is the owner of buckets that no node takes.
const Nobody = 255

// MaxNodes bounds a cluster.
const MaxNodes = 255

// owner gives the owner of bucket b; zero if there is none.
func (m *Map) owner(b int) NodeID {
	if i := int(m.Owner[b]); i < len(m.Members) {
		return m.Members[i]
	}
	return NodeID{}
}

// index gives the place of a node in Members, or Nobody.
func (m *Map) index(id NodeID) uint8 {
	for i, n := range m.Members {
		if n == id {
			return uint8(i)
		}
	}
	return Nobody
}

// The layout, all numbers big endian. All kinds begin with
//
//	 0  6  destination: Group, or the wire MAC of one node
//	 6  6  source: the wire MAC, which is the node id
//	12  2  EtherType
//	14  2  'C' 'C'
//	16  1  version, 2
//	17  1  kind: 1 beacon, 2 part of a map, 3 card, 4 probe, 5 settings
//	18  8  cluster: the first bytes of SHA-256 of its name
//	26  8  incarnation
//	34  8  sequence
//
// and end with the 16 first bytes of an HMAC-SHA-256 of all from offset 6 on.
// A beacon has between them
//
//	 42  1  state
//	 43  1  flags; bit 0: held is known, bit 1: sick
//	 44  2  weight
//	 46  2  busy
//	 48  4  flows
//	 52  8  rules
//	 60 14  map: version (8), leader (6)
//	 74 14  parent of the map, the same
//	 88  6  lowest
//	 94  1  number of tags
//	 95 128 held
//	223 4n  tags of whom it hears
//
// and a part of a map
//
//	42 14  map: version, leader
//	56  1  part, from 0
//	57  1  number of parts, 1 to maxParts
//	58  …  its piece of the map, mapPiece bytes except in the last part
//
// where the whole of the map is
//
//	 0 14  parent
//	14  8  rules
//	22  1  number of members
//	23 6n  members
//	 … 1024 owner of each bucket: index into the members, or 255
const (
	offBody    = 42
	offTags    = 223
	offPiece   = 58
	tagLen     = 4
	macLen     = 16
	minFrame   = offPiece + 1 + macLen
	mapHead    = 23
	mapPiece   = 1400
	maxMap     = mapHead + 6*MaxNodes + filter.Buckets
	maxParts   = (maxMap + mapPiece - 1) / mapPiece
	maxBeacon  = offTags + MaxNodes*tagLen + macLen
	maxMapPart = offPiece + mapPiece + macLen
	// MaxFrame is the longest frame in bytes, without a checksum.
	MaxFrame = max(maxBeacon, maxMapPart)

	version    = 2
	kindBeacon = 1
	kindMap    = 2
	flagKnown  = 1
	flagSick   = 2
)

// Why a frame was not taken.
var (
	ErrMalformed    = errors.New("malformed frame")
	ErrOtherVersion = errors.New("frame of another version of the protocol")
	ErrOtherCluster = errors.New("frame of another cluster")
	ErrUnauthentic  = errors.New("frame with a wrong key")
)

// Codec writes and reads the frames of one cluster.
type Codec struct {
	cluster [8]byte
	keys    [][]byte
}

// NewCodec makes the codec of the cluster with that name. It signs with key and
// also takes what is signed with one of accept, so that a key can be changed
// without an outage.
func NewCodec(name string, key []byte, accept ...[]byte) *Codec {
	c := &Codec{keys: append([][]byte{key}, accept...)}
	sum := sha256.Sum256([]byte(name))
	copy(c.cluster[:], sum[:])
	return c
}

// Beacon gives the Ethernet frame of a beacon. One with more than MaxNodes tags
// has the first of them.
func (c *Codec) Beacon(b *Beacon) []byte {
	tags := b.Heard[:min(len(b.Heard), MaxNodes)]
	f := c.begin(kindBeacon, b.Peer, b.Sequence, offTags+len(tags)*tagLen+macLen)
	flags := byte(0)
	if b.HeldKnown {
		flags |= flagKnown
	}
	if b.Sick {
		flags |= flagSick
	}
	f = append(f, byte(b.State), flags)
	f = binary.BigEndian.AppendUint16(f, b.Weight)
	f = binary.BigEndian.AppendUint16(f, b.Busy)
	f = binary.BigEndian.AppendUint32(f, b.Flows)
	f = binary.BigEndian.AppendUint64(f, b.Rules)
	f = appendMapID(f, b.Map)
	f = appendMapID(f, b.Parent)
	f = append(f, b.Lowest[:]...)
	f = append(f, byte(len(tags)))
	f = append(f, b.Held[:]...)
	for _, t := range tags {
		f = binary.BigEndian.AppendUint32(f, uint32(t))
	}
	return sign(f, c.keys[0])
}

// Map gives the Ethernet frames of a map as sent by a node, with sequence
// numbers from first on.
func (c *Codec) Map(m *Map, from Peer, first uint64) (frames [][]byte) {
	body := m.append(nil)
	parts := (len(body) + mapPiece - 1) / mapPiece
	for i := range parts {
		piece := body[i*mapPiece : min(len(body), (i+1)*mapPiece)]
		f := c.begin(kindMap, from, first+uint64(i), offPiece+len(piece)+macLen)
		f = appendMapID(f, m.MapID)
		f = append(f, byte(i), byte(parts))
		frames = append(frames, sign(append(f, piece...), c.keys[0]))
	}
	return frames
}

// MapFrames is the number of frames that Map gives.
func MapFrames(members int) int {
	return (mapHead + 6*members + filter.Buckets + mapPiece - 1) / mapPiece
}

func (c *Codec) begin(kind byte, from Peer, sequence uint64, size int) []byte {
	f := append(make([]byte, 0, size), Group[:]...)
	f = append(f, from.ID[:]...)
	f = binary.BigEndian.AppendUint16(f, EtherType)
	f = append(f, 'C', 'C', version, kind)
	f = append(f, c.cluster[:]...)
	f = binary.BigEndian.AppendUint64(f, from.Incarnation)
	return binary.BigEndian.AppendUint64(f, sequence)
}

func appendMapID(f []byte, id MapID) []byte {
	return append(binary.BigEndian.AppendUint64(f, id.Version), id.Leader[:]...)
}

func readMapID(f []byte) MapID {
	return MapID{binary.BigEndian.Uint64(f), NodeID(f[8:14])}
}

// sign appends the HMAC. The destination is left out, so that one frame can go
// to the group and to one node.
func sign(f, key []byte) []byte { return append(f, sum(f, key)...) }

func sum(f, key []byte) []byte {
	m := hmac.New(sha256.New, key)
	m.Write(f[6:])
	return m.Sum(nil)[:macLen]
}

// Part is one part of a map, as it was received.
type Part struct {
	From        Peer
	Sequence    uint64
	ID          MapID
	Part, Parts int
	piece       []byte
}

// Decode reads an Ethernet frame and gives either a beacon or a part of a map.
// The error is one of ErrMalformed, ErrOtherVersion, ErrOtherCluster and
// ErrUnauthentic. What it gives does not refer to f.
func (c *Codec) Decode(f []byte) (*Beacon, *Part, error) {
	body, from, sequence, err := c.open(f)
	if err != nil {
		return nil, nil, err
	}
	switch f[17] {
	case kindBeacon:
		b, err := decodeBeacon(body, from, sequence)
		return b, nil, err
	case kindMap:
		p, err := decodePart(body, from, sequence)
		return nil, p, err
	}
	return nil, nil, ErrMalformed
}

// open reads what all kinds of frames have, and gives the frame without its HMAC.
func (c *Codec) open(f []byte) (body []byte, from Peer, sequence uint64, err error) {
	if len(f) > MaxFrame {
		return nil, from, 0, ErrMalformed
	}
	return c.openLong(f)
}

// openLong is open for frames of any length.
func (c *Codec) openLong(f []byte) (body []byte, from Peer, sequence uint64, err error) {
	switch {
	case len(f) < minFrame || binary.BigEndian.Uint16(f[12:]) != EtherType || f[14] != 'C' || f[15] != 'C' || f[6]&1 != 0:
		return nil, from, 0, ErrMalformed
	case f[16] != version:
		return nil, from, 0, fmt.Errorf("%w: %d, this program has %d", ErrOtherVersion, f[16], version)
	case [8]byte(f[18:]) != c.cluster:
		return nil, from, 0, ErrOtherCluster
	}
	body = f[:len(f)-macLen]
	if !c.authentic(body, f[len(body):]) {
		return nil, from, 0, ErrUnauthentic
	}
	return body, Peer{NodeID(f[6:12]), binary.BigEndian.Uint64(f[26:])}, binary.BigEndian.Uint64(f[34:]), nil
}

func (c *Codec) authentic(body, mac []byte) bool {
	for _, key := range c.keys {
		if hmac.Equal(sum(body, key), mac) {
			return true
		}
	}
	return false
}

func decodeBeacon(f []byte, from Peer, sequence uint64) (*Beacon, error) {
	if len(f) < offTags {
		return nil, ErrMalformed
	}
	b := &Beacon{
		Peer: from, Sequence: sequence,
		State: State(f[42]), HeldKnown: f[43]&flagKnown != 0, Sick: f[43]&flagSick != 0,
		Weight: binary.BigEndian.Uint16(f[44:]), Busy: binary.BigEndian.Uint16(f[46:]), Flows: binary.BigEndian.Uint32(f[48:]),
		Rules: binary.BigEndian.Uint64(f[52:]), Map: readMapID(f[60:]), Parent: readMapID(f[74:]), Lowest: NodeID(f[88:94]),
		Held: Bits(f[95:offTags]),
	}
	n := int(f[94])
	if !b.State.valid() || f[43]&^(flagKnown|flagSick) != 0 || b.Busy > 1000 || len(f) != offTags+n*tagLen {
		return nil, ErrMalformed
	}
	if n > 0 {
		b.Heard = make([]Tag, n)
		for i := range b.Heard {
			b.Heard[i] = Tag(binary.BigEndian.Uint32(f[offTags+i*tagLen:]))
		}
	}
	return b, nil
}

func decodePart(f []byte, from Peer, sequence uint64) (*Part, error) {
	p := &Part{From: from, Sequence: sequence, ID: readMapID(f[42:]), Part: int(f[56]), Parts: int(f[57]), piece: bytes.Clone(f[offPiece:])}
	if p.Parts < 1 || p.Parts > maxParts || p.Part >= p.Parts || p.ID.Version == 0 ||
		len(p.piece) > mapPiece || p.Part < p.Parts-1 && len(p.piece) != mapPiece {
		return nil, ErrMalformed
	}
	return p, nil
}

func (m *Map) append(b []byte) []byte {
	b = appendMapID(b, m.Parent)
	b = binary.BigEndian.AppendUint64(b, m.Rules)
	b = append(b, byte(len(m.Members)))
	for _, id := range m.Members {
		b = append(b, id[:]...)
	}
	return append(b, m.Owner[:]...)
}

// decodeMap reads the whole of a map.
func decodeMap(b []byte, id MapID) (*Map, error) {
	if len(b) < mapHead {
		return nil, ErrMalformed
	}
	m := &Map{MapID: id, Parent: readMapID(b), Rules: binary.BigEndian.Uint64(b[14:])}
	n := int(b[22])
	if len(b) != mapHead+6*n+filter.Buckets {
		return nil, ErrMalformed
	}
	b = b[mapHead:]
	for i := range n {
		m.Members = append(m.Members, NodeID(b[6*i:6*i+6]))
	}
	copy(m.Owner[:], b[6*n:])
	for _, o := range m.Owner {
		if o != Nobody && int(o) >= n {
			return nil, ErrMalformed
		}
	}
	return m, nil
}

// Assembler puts the maps of one sender together from their parts. It keeps the
// parts of one map, the last that it was given.
type Assembler struct {
	id    MapID
	from  Peer
	parts [maxParts][]byte
	n     int
}

// Add takes a part, and gives the map if it was the last that lacked. The error
// is ErrMalformed.
func (a *Assembler) Add(p *Part) (*Map, error) {
	if p.ID != a.id || p.From != a.from || p.Parts != a.n {
		*a = Assembler{id: p.ID, from: p.From, n: p.Parts}
	}
	a.parts[p.Part] = p.piece
	var whole []byte
	for _, piece := range a.parts[:a.n] {
		if piece == nil {
			return nil, nil
		}
		whole = append(whole, piece...)
	}
	*a = Assembler{}
	return decodeMap(whole, p.ID)
}
