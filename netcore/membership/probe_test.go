package membership

import (
	"bytes"
	"errors"
	"reflect"
	"slices"
	"testing"
)

func vectorProbe() *Probe {
	return &Probe{
		Peer: vectorPeer, Sequence: 5, Way: ToAll, Hurry: true, Moved: true, Round: 0x01020304, Copy: 1, MTU: 1500,
		CloneMAC: [6]byte{0x02, 0xcc, 0x0a, 0x4d, 0, 0x0a},
		Rows:     []Row{{Of: 0xb323a1b2, Round: 7, Got: [5]uint8{2, 2, 1, 0, 2}, Again: 3}, {Of: 0x816b15e0, Round: 9}},
		Bursts:   []Burst{{Of: 0xb323a1b2, Way: BurstClone, Stage: 4, Got: 4000}},
	}
}

func TestProbe(t *testing.T) {
	c := vectorCodec()
	for _, size := range []int{0, 60, 1514, MaxProbe} {
		want := vectorProbe()
		want.Size = size
		f := c.Probe(want, [6]byte{1, 2, 3, 4, 5, 6})
		least := offRows + 2*rowLen + burstLen + macLen
		if len(f) != max(size, least) || !IsProbe(f) || !bytes.Equal(f[:6], []byte{1, 2, 3, 4, 5, 6}) {
			t.Fatalf("%d bytes to %x; want %d", len(f), f[:6], max(size, least))
		}
		want.Size = len(f)
		got, err := c.DecodeProbe(f)
		if err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("DecodeProbe(Probe(p)) = %+v, %v; want %+v", got, err, want)
		}
		if mac, ok := StrangerCloneMAC(f); !ok || mac != want.CloneMAC {
			t.Errorf("StrangerCloneMAC = %x, %v", mac, ok)
		}
	}
	f := c.Probe(vectorProbe(), Group)
	for _, tt := range []struct {
		name  string
		frame []byte
		want  error
	}{
		{"empty", nil, ErrMalformed},
		{"cut off", f[:len(f)-1], ErrUnauthentic},
		{"cut off, signed", resign(f[:offRows+macLen]), ErrMalformed},
		{"a beacon", c.Beacon(vectorBeacon()), ErrMalformed},
		{"no way", resign(with(f, 42, 0)), ErrMalformed},
		{"a way of the future", resign(with(f, 42, 8)), ErrMalformed},
		{"a flag of the future", resign(with(f, 43, 4)), ErrMalformed},
		{"too many rows", resign(with(f, 57, 255)), ErrMalformed},
		{"a burst by no burst's way", resign(with(f, offRows+2*rowLen+4, 3)), ErrMalformed},
		{"something but zeros at the end", resign(append(slices.Clone(f), 0)), ErrMalformed}, // what was the HMAC
		{"of another key", NewCodec("demo", []byte("another")).Probe(vectorProbe(), Group), ErrUnauthentic},
		{"of another cluster", NewCodec("other", vectorKey).Probe(vectorProbe(), Group), ErrOtherCluster},
	} {
		if _, err := c.DecodeProbe(tt.frame); !errors.Is(err, tt.want) {
			t.Errorf("%s: %v; want %v", tt.name, err, tt.want)
		}
	}
	if b, p, err := c.Decode(f); err == nil || b != nil || p != nil {
		t.Errorf("a probe passes for another frame: %v, %v", b, p)
	}
}

func FuzzDecodeProbe(f *testing.F) {
	c := vectorCodec()
	f.Add(c.Probe(vectorProbe(), Group))
	big := vectorProbe()
	big.Size = 1514
	f.Add(c.Probe(big, Group))
	f.Add(c.Beacon(vectorBeacon()))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, frame []byte) {
		_, _ = c.DecodeProbe(frame)
		StrangerCloneMAC(frame)
		// Past the authentication as well.
		if len(frame) < minFrame {
			return
		}
		copy(frame, c.begin(kindProbe, Peer{ID: NodeID(frame[6:12])}, 0, 0)[:26])
		signed := resign(frame)
		p, err := c.DecodeProbe(signed)
		if err != nil {
			return
		}
		if again := c.Probe(p, [6]byte(signed)); !bytes.Equal(again, signed) {
			t.Errorf("Probe(DecodeProbe(f)) = %x; want %x", again, signed)
		}
	})
}
