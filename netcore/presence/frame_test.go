package presence

import (
	"bytes"
	"encoding/hex"
	"errors"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
)

var testKey = bytes.Repeat([]byte{0x5a}, 32)

func testBeacon() Beacon {
	b := Beacon{
		Peer: Peer{ID: id(1), Incarnation: 0x1122334455667788}, Sequence: 42, State: Serving, View: 0xfedcba9876543210,
		HeldKnown: true,
		Peers:     []Peer{{ID: id(2), Incarnation: 2}, {ID: id(3), Incarnation: 3}},
	}
	b.Held.Set(0)
	b.Held.Set(1023)
	return b
}

// TestVector fixes the layout, on which nodes of different versions must agree.
// The HMAC was computed with another implementation (Python's hmac).
func TestVector(t *testing.T) {
	f := NewCodec("demo", testKey).Encode(testBeacon())
	head := "03cc000088b5" + "525400770001" + "88b5" + "4343" + "01" + "02" + "01" + "02" +
		"2a97516c354b6884" + "1122334455667788" + "000000000000002a" + "fedcba9876543210" + "01"
	if got := hex.EncodeToString(f[:len(head)/2]); got != head {
		t.Errorf("the frame begins\n%s; want\n%s", got, head)
	}
	tail := "80" + "525400770002" + "0000000000000002" + "525400770003" + "0000000000000003" + "a070231859fb0d0db7365f02ef3ff221"
	if got := hex.EncodeToString(f[offPeers-1:]); got != tail {
		t.Errorf("the frame ends\n%s; want\n%s", got, tail)
	}
}

func TestRoundTrip(t *testing.T) {
	c := NewCodec("demo", testKey)
	many := testBeacon()
	many.Peers = nil
	for n := range MaxPeers + 10 {
		many.Peers = append(many.Peers, Peer{ID: id(n), Incarnation: uint64(n)})
	}
	for _, b := range []Beacon{testBeacon(), {Peer: Peer{ID: id(9)}, State: Listening}, {Peer: Peer{ID: id(9)}, State: Leaving}, many} {
		f := c.Encode(b)
		if len(f) > MaxFrame {
			t.Errorf("a frame of %d bytes; want at most %d", len(f), MaxFrame)
		}
		got, err := c.Decode(f)
		b.Peers = b.Peers[:min(len(b.Peers), MaxPeers)]
		if diff := cmp.Diff(b, got); err != nil || diff != "" {
			t.Errorf("Decode(Encode(b)): %v (-want +got)\n%s", err, diff)
		}
	}
}

func TestDecodeRefuses(t *testing.T) {
	c := NewCodec("demo", testKey)
	good := c.Encode(testBeacon())
	change := func(off int, to ...byte) []byte {
		f := slices.Clone(good)
		copy(f[off:], to)
		return f
	}
	// Authentic but wrong: only a bug of our own, or of another version, sends it.
	resign := func(f []byte) []byte { return c.appendMAC(f[: len(f)-macLen : len(f)-macLen]) }
	for _, tt := range []struct {
		name  string
		frame []byte
		want  error
	}{
		{"empty", nil, ErrMalformed},
		{"cut off", good[:len(good)-1], ErrUnauthentic},
		{"shortest less one", good[:minFrame-1], ErrMalformed},
		{"longer", append(slices.Clone(good), 0), ErrUnauthentic},
		{"too long", append(slices.Clone(good), make([]byte, MaxFrame)...), ErrMalformed},
		{"other EtherType", change(12, 0x08, 0x00), ErrMalformed},
		{"other group", change(0, 0xff), ErrMalformed},
		{"no magic", change(14, 'X'), ErrMalformed},
		{"other version", change(16, 2), ErrMalformed},
		{"other cluster", NewCodec("demo2", testKey).Encode(testBeacon()), ErrOtherCluster},
		{"other key", NewCodec("demo", testKey[1:]).Encode(testBeacon()), ErrUnauthentic},
		{"forged source", change(6, 0x52, 0x54, 0, 0x77, 0, 9), ErrUnauthentic},
		{"forged state", change(17, 3), ErrUnauthentic},
		{"no state", resign(change(17, 0)), ErrMalformed},
		{"state of the future", resign(change(17, 9)), ErrMalformed},
		{"flag of the future", resign(change(18, 2)), ErrMalformed},
		{"more peers than there are", resign(change(19, 3)), ErrMalformed},
		{"fewer peers than there are", resign(change(19, 1)), ErrMalformed},
		{"from a group", resign(change(6, 0x53)), ErrMalformed},
	} {
		if _, err := c.Decode(tt.frame); !errors.Is(err, tt.want) {
			t.Errorf("%s: %v; want %v", tt.name, err, tt.want)
		}
	}
}

func FuzzDecode(f *testing.F) {
	c := NewCodec("demo", testKey)
	f.Add(c.Encode(testBeacon()))
	f.Add(c.Encode(Beacon{Peer: Peer{ID: id(9)}, State: Listening}))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, frame []byte) {
		_, _ = c.Decode(frame)
		// Past the authentication as well.
		if len(frame) < minFrame {
			return
		}
		copy(frame, c.Encode(Beacon{})[:17])
		copy(frame[20:], c.cluster[:])
		signed := c.appendMAC(frame[: len(frame)-macLen : len(frame)-macLen])
		b, err := c.Decode(signed)
		if err != nil {
			return
		}
		if again := c.Encode(b); !bytes.Equal(again, signed) {
			t.Errorf("Encode(Decode(f)) = %x; want %x", again, signed)
		}
	})
}
