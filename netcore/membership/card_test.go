package membership

import (
	"bytes"
	"errors"
	"net/netip"
	"reflect"
	"strings"
	"testing"
)

func vectorCard() *Card {
	return &Card{Peer: vectorPeer, Sequence: 9, Port: 9264, Name: "node-1", Build: "0123456789ab", Addresses: []netip.Addr{
		netip.MustParseAddr("10.77.0.101"), netip.MustParseAddr("fd77::101"), netip.MustParseAddr("fe80::1"),
	}}
}

func cardFrame(t testing.TB, c *Card) []byte {
	t.Helper()
	f, err := vectorCodec().Card(c)
	if err != nil {
		t.Fatal(err)
	}
	return f
}

func TestCard(t *testing.T) {
	full := vectorCard()
	full.Name, full.Build = strings.Repeat("n", MaxCardText), strings.Repeat("b", MaxCardText)
	for len(full.Addresses) < MaxCardAddresses {
		full.Addresses = append(full.Addresses, netip.MustParseAddr("::1"))
	}
	bare := &Card{Peer: vectorPeer, Port: 1, Addresses: []netip.Addr{netip.MustParseAddr("192.0.2.1")}}
	for _, c := range []*Card{vectorCard(), full, bare} {
		f := cardFrame(t, c)
		got, err := vectorCodec().DecodeCard(f)
		if err != nil || !reflect.DeepEqual(got, c) {
			t.Errorf("DecodeCard(Card(%+v)) = %+v, %v", c, got, err)
		}
		// What knows nothing of cards takes none for something else.
		if b, p, err := vectorCodec().Decode(f); b != nil || p != nil || !errors.Is(err, ErrMalformed) {
			t.Errorf("Decode(card) = %v, %v, %v", b, p, err)
		}
	}
	for name, spoil := range map[string]func(*Card){
		"no port":            func(c *Card) { c.Port = 0 },
		"no address":         func(c *Card) { c.Addresses = nil },
		"too many addresses": func(c *Card) { c.Addresses = append(full.Addresses, full.Addresses...) },
		"long name":          func(c *Card) { c.Name = strings.Repeat("n", MaxCardText+1) },
		"space":              func(c *Card) { c.Name = "a b" },
		"escape":             func(c *Card) { c.Build = "\x1b[2J" },
	} {
		c := vectorCard()
		spoil(c)
		if _, err := vectorCodec().Card(c); err == nil {
			t.Errorf("%s: a card was made", name)
		}
	}
	f := cardFrame(t, vectorCard())
	for name, frame := range map[string][]byte{
		"cut off":         f[:60],
		"longer":          resign(append(bytes.Clone(f), 0)),
		"other length":    resign(with(f, 45, 7)),
		"no port":         resign(with(with(f, 42, 0), 43, 0)),
		"escape in name":  resign(with(f, 47+48, 0x1b)),
		"no addresses":    resign(with(f, 44, 0)),
		"a beacon's kind": resign(with(f, 17, 1)),
	} {
		if _, err := vectorCodec().DecodeCard(frame); !errors.Is(err, ErrMalformed) {
			t.Errorf("%s: %v; want ErrMalformed", name, err)
		}
	}
	if _, err := vectorCodec().DecodeCard(with(f, 50, 1)); !errors.Is(err, ErrUnauthentic) {
		t.Errorf("changed: %v; want ErrUnauthentic", err)
	}
}

// TestCards: the last card counts, not one that comes again, and there is room for
// each node that may be.
func TestCards(t *testing.T) {
	var c cards
	card := func(id, incarnation, sequence uint64) {
		c.add(&Card{Peer: Peer{NodeID{0: 2, 4: byte(id >> 8), 5: byte(id)}, incarnation}, Sequence: sequence})
	}
	is := func(incarnation, sequence uint64) {
		t.Helper()
		if got := c.get(NodeID{0: 2, 5: 1}); got == nil || got.Incarnation != incarnation || got.Sequence != sequence {
			t.Errorf("the card is %+v; want that of incarnation %d with number %d", got, incarnation, sequence)
		}
	}
	card(1, 7, 2)
	card(1, 7, 1)
	is(7, 2)
	card(1, 7, 3)
	is(7, 3)
	card(1, 8, 1)
	is(8, 1)
	for id := range uint64(2 * MaxNodes) {
		card(id+2, 1, 1)
	}
	if len(c.all) > MaxNodes {
		t.Errorf("%d cards are kept", len(c.all))
	}
}

func FuzzDecodeCard(f *testing.F) {
	f.Add(cardFrame(f, vectorCard()))
	f.Add(vectorCodec().Beacon(vectorBeacon()))
	f.Add([]byte{})
	c := vectorCodec()
	f.Fuzz(func(t *testing.T, frame []byte) {
		_, _ = c.DecodeCard(frame)
		// Past the authentication as well.
		if len(frame) < minFrame {
			return
		}
		copy(frame, c.begin(kindCard, Peer{ID: NodeID(frame[6:12])}, 0, 0)[:26])
		signed := resign(frame)
		card, err := c.DecodeCard(signed)
		if err != nil {
			return
		}
		if again, err := c.Card(card); err != nil || !bytes.Equal(again, signed) {
			t.Errorf("Card(DecodeCard(f)) = %x, %v; want %x", again, err, signed)
		}
	})
}
