package membership

import (
	"encoding/binary"
	"errors"
	"net/netip"
	"sync"
)

// Card says how a node is reached by its management API. Nodes send it to the
// group every CardInterval and when somebody joins. Nothing that the protocol
// decides depends on it.
type Card struct {
	Peer
	Sequence  uint64       // rises with every card of an incarnation
	Port      uint16       // TCP, not 0
	Addresses []netip.Addr // of the NIC, 1 to MaxCardAddresses, without zones
	Name      string       // the host's, at most MaxCardText bytes of printable ASCII without spaces; may be empty
	Build     string       // which program, the same
}

// The bounds of a card.
const (
	MaxCardAddresses = 8
	MaxCardText      = 63
)

// A card has between the head and the HMAC, as a beacon has it
//
//	42  2  port
//	44  1  number of addresses
//	45  1  length of the name
//	46  1  length of the build
//	47 16n addresses, those of IPv4 mapped (RFC 4291, 2.5.5.2)
//	 …  …  name, build
const (
	offAddresses = 47
	kindCard     = 3
)

var errCard = errors.New("a card needs a port, 1 to 8 addresses, and short names of printable ASCII")

func (c *Card) valid() bool {
	return c.Port != 0 && len(c.Addresses) > 0 && len(c.Addresses) <= MaxCardAddresses && cardText(c.Name) && cardText(c.Build)
}

func cardText(s string) bool {
	for i := range len(s) {
		if s[i] <= ' ' || s[i] > '~' {
			return false
		}
	}
	return len(s) <= MaxCardText
}

// Card gives the Ethernet frame of a card.
func (c *Codec) Card(card *Card) ([]byte, error) {
	if !card.valid() {
		return nil, errCard
	}
	f := c.begin(kindCard, card.Peer, card.Sequence, offAddresses+16*len(card.Addresses)+len(card.Name)+len(card.Build)+macLen)
	f = binary.BigEndian.AppendUint16(f, card.Port)
	f = append(f, byte(len(card.Addresses)), byte(len(card.Name)), byte(len(card.Build)))
	for _, a := range card.Addresses {
		b := a.As16()
		f = append(f, b[:]...)
	}
	f = append(append(f, card.Name...), card.Build...)
	return sign(f, c.keys[0]), nil
}

// isCard reports whether a frame says that it is a card.
func isCard(f []byte) bool { return len(f) > 17 && f[16] == version && f[17] == kindCard }

// DecodeCard reads the Ethernet frame of a card. The errors are those of Decode.
func (c *Codec) DecodeCard(f []byte) (*Card, error) {
	body, from, sequence, err := c.open(f)
	if err != nil {
		return nil, err
	}
	if f[17] != kindCard {
		return nil, ErrMalformed
	}
	n, name, build := int(body[44]), int(body[45]), int(body[46])
	if n > MaxCardAddresses || len(body) != offAddresses+16*n+name+build {
		return nil, ErrMalformed
	}
	card := &Card{Peer: from, Sequence: sequence, Port: binary.BigEndian.Uint16(body[42:])}
	rest := body[offAddresses:]
	for range n {
		card.Addresses = append(card.Addresses, netip.AddrFrom16([16]byte(rest)).Unmap())
		rest = rest[16:]
	}
	card.Name, card.Build = string(rest[:name]), string(rest[name:])
	if !card.valid() {
		return nil, ErrMalformed
	}
	return card, nil
}

// cards keeps the last card of each node.
type cards struct {
	mu  sync.Mutex
	all map[NodeID]*Card
}

// add takes a card, unless it is older than the one that is known of that start
// of the node. A recording of another start may get in until the next card; it
// leads to a node that cannot prove to be the one that is meant.
func (c *cards) add(card *Card) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if old := c.all[card.ID]; old != nil && old.Incarnation == card.Incarnation && card.Sequence <= old.Sequence {
		return
	}
	if c.all == nil || len(c.all) >= MaxNodes && c.all[card.ID] == nil {
		c.all = map[NodeID]*Card{}
	}
	c.all[card.ID] = card
}

func (c *cards) get(id NodeID) *Card {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.all[id]
}

// Card gives the last card of a node; nil if none has come. It is not to be
// changed.
func (n *Node) Card(id NodeID) *Card { return n.cards.get(id) }

// SendCard sends a card of this node: of its Peer and Sequence the node takes
// care. Not for concurrent use.
func (n *Node) SendCard(card Card) error {
	card.Peer = n.View().Self
	n.cardSequence++
	card.Sequence = n.cardSequence
	frame, err := n.cfg.Codec.Card(&card)
	if err != nil {
		return err
	}
	return n.cfg.Link.send(frame)
}
