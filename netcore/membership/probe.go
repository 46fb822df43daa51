package membership

import (
	"encoding/binary"
)

// Way is how a probe was sent, which is what it tries. The zero value is invalid.
type Way uint8

// The ways of a probe.
const (
	ToClone   Way = 1 // to the clone MAC, which no switch knows: is it flooded?
	ToGroup   Way = 2 // to Group
	ToAll     Way = 3 // to the broadcast address
	ToNode    Way = 4 // to a node's wire MAC
	ToNodeBig Way = 5 // the same, as long as the sender's MTU allows
	// BurstClone and BurstNode are many in a short time, to the clone MAC and to a
	// node's wire MAC; Copy is the stage.
	BurstClone Way = 6
	BurstNode  Way = 7

	ways = 8
)

var wayNames = [ways]string{"invalid", "clone", "group", "broadcast", "node", "node-big", "burst-clone", "burst-node"}

func (w Way) String() string { return wayNames[w%ways] }

// Trials are the ways of which receivers tell how many probes came, in the order of
// Row.Got.
var Trials = [...]Way{ToClone, ToGroup, ToAll, ToNode, ToNodeBig}

// Probe is a frame that is sent to see whether it arrives. A round of probes has one
// number, and what has arrived of the others' rounds is told in the next.
type Probe struct {
	Peer
	Sequence uint64 // rises with every probe of an incarnation
	Way      Way
	Hurry    bool // who gets it is to send a round at once, too
	Moved    bool // the sender has announced the VIP just before this round
	Round    uint32
	Copy     uint8
	MTU      uint16 // of the sender's NIC, in bytes
	CloneMAC [6]byte
	Rows     []Row   // at most MaxRows
	Bursts   []Burst // at most MaxBursts
	// Size is how long the frame is to be in bytes, if it would be shorter.
	Size int
}

// Row is what a node got of another's last complete round.
type Row struct {
	Of    Tag
	Round uint32
	Got   [len(Trials)]uint8 // different probes by way
	Again uint8              // probes that came once more
}

// Burst is how many frames of a stage of a burst a node got.
type Burst struct {
	Of    Tag
	Way   Way
	Stage uint8
	Got   uint16
}

// The bounds of a probe. What does not fit is told another time.
const (
	MaxRows   = 64
	MaxBursts = 32
	// MaxProbe is the longest frame in bytes: that of a NIC with an MTU of 9216.
	MaxProbe = 9216 + 14
)

// A probe has between the head and the HMAC, as a beacon has it
//
//	42  1  way
//	43  1  flags; bit 0: hurry, bit 1: moved
//	44  4  round
//	48  1  copy
//	49  2  MTU
//	51  6  clone MAC
//	57  1  number of rows
//	58  1  number of bursts
//	59 14n rows: tag (4), round (4), got (5), again (1)
//	 …  8n bursts: tag (4), way (1), stage (1), got (2)
//	 …  …  zeros, up to the size
const (
	offRows   = 59
	rowLen    = 9 + len(Trials)
	burstLen  = 8
	kindProbe = 4

	flagHurry = 1
	flagMoved = 2
)

// Probe gives the Ethernet frame of a probe, to be sent to a MAC.
func (c *Codec) Probe(p *Probe, to [6]byte) []byte {
	rows, bursts := p.Rows[:min(len(p.Rows), MaxRows)], p.Bursts[:min(len(p.Bursts), MaxBursts)]
	size := max(offRows+len(rows)*rowLen+len(bursts)*burstLen+macLen, min(p.Size, MaxProbe))
	f := c.begin(kindProbe, p.Peer, p.Sequence, size)
	copy(f, to[:])
	var flags byte
	if p.Hurry {
		flags |= flagHurry
	}
	if p.Moved {
		flags |= flagMoved
	}
	f = append(f, byte(p.Way), flags)
	f = binary.BigEndian.AppendUint32(f, p.Round)
	f = append(f, p.Copy)
	f = binary.BigEndian.AppendUint16(f, p.MTU)
	f = append(f, p.CloneMAC[:]...)
	f = append(f, byte(len(rows)), byte(len(bursts)))
	for _, r := range rows {
		f = binary.BigEndian.AppendUint32(f, uint32(r.Of))
		f = binary.BigEndian.AppendUint32(f, r.Round)
		f = append(append(f, r.Got[:]...), r.Again)
	}
	for _, b := range bursts {
		f = binary.BigEndian.AppendUint32(f, uint32(b.Of))
		f = append(f, byte(b.Way), b.Stage)
		f = binary.BigEndian.AppendUint16(f, b.Got)
	}
	f = append(f, make([]byte, size-macLen-len(f))...)
	return sign(f, c.keys[0])
}

// IsProbe reports whether a frame says that it is a probe of this version.
func IsProbe(f []byte) bool {
	return len(f) > 17 && binary.BigEndian.Uint16(f[12:]) == EtherType && f[14] == 'C' && f[15] == 'C' && f[16] == version && f[17] == kindProbe
}

// DecodeProbe reads the Ethernet frame of a probe; Size is its length. The errors are
// those of Decode.
func (c *Codec) DecodeProbe(f []byte) (*Probe, error) {
	if !IsProbe(f) || len(f) < offRows+macLen || len(f) > MaxProbe {
		return nil, ErrMalformed
	}
	body, from, sequence, err := c.openLong(f)
	if err != nil {
		return nil, err
	}
	p := &Probe{
		Peer: from, Sequence: sequence, Way: Way(body[42]), Hurry: body[43]&flagHurry != 0, Moved: body[43]&flagMoved != 0,
		Round: binary.BigEndian.Uint32(body[44:]), Copy: body[48], MTU: binary.BigEndian.Uint16(body[49:]), CloneMAC: [6]byte(body[51:]), Size: len(f),
	}
	rows, bursts := int(body[57]), int(body[58])
	rest := body[offRows:]
	if p.Way == 0 || p.Way >= ways || body[43]&^(flagHurry|flagMoved) != 0 || rows > MaxRows || bursts > MaxBursts || len(rest) < rows*rowLen+bursts*burstLen {
		return nil, ErrMalformed
	}
	for range rows {
		r := Row{Of: Tag(binary.BigEndian.Uint32(rest)), Round: binary.BigEndian.Uint32(rest[4:])}
		r.Again = rest[8+copy(r.Got[:], rest[8:])]
		p.Rows, rest = append(p.Rows, r), rest[rowLen:]
	}
	for range bursts {
		b := Burst{Of: Tag(binary.BigEndian.Uint32(rest)), Way: Way(rest[4]), Stage: rest[5], Got: binary.BigEndian.Uint16(rest[6:])}
		if b.Way != BurstClone && b.Way != BurstNode {
			return nil, ErrMalformed
		}
		p.Bursts, rest = append(p.Bursts, b), rest[burstLen:]
	}
	for _, b := range rest {
		if b != 0 {
			return nil, ErrMalformed
		}
	}
	return p, nil
}

// StrangerCloneMAC gives the clone MAC that a probe names, whoever has signed it.
func StrangerCloneMAC(f []byte) (mac [6]byte, ok bool) {
	if !IsProbe(f) || len(f) < offRows+macLen {
		return mac, false
	}
	return [6]byte(f[51:]), true
}
