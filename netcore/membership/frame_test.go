package membership

import (
	"bytes"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"clonecluster/netcore/filter"
)

var vectorKey = bytes.Repeat([]byte{0x5a}, 32)

func vectorNode(n int) NodeID { return NodeID{0x52, 0x54, 0, 0x77, byte(n >> 8), byte(n)} }

// The vectors' sender, and what it says: see testdata/vectors.py.
var (
	vectorPeer  = Peer{ID: vectorNode(1), Incarnation: 0x1122334455667788}
	vectorMapID = MapID{Version: 7, Leader: vectorNode(1)}
)

const (
	vectorRules    = 0xfedcba9876543210
	vectorSequence = 43 // of a map's first frame
)

func vectorBeacon() *Beacon {
	b := &Beacon{
		Peer: vectorPeer, Sequence: 42, State: Serving, Sick: true, HeldKnown: true,
		Weight: 150, Busy: 333, Flows: 70000, Rules: vectorRules,
		Map: vectorMapID, Parent: MapID{Version: 6, Leader: vectorNode(2)}, Lowest: vectorNode(1),
		Heard: []Tag{Peer{ID: vectorNode(2), Incarnation: 22}.Tag(), Peer{ID: vectorNode(3), Incarnation: 33}.Tag()},
	}
	for _, bucket := range []int{0, 9, 1023} {
		b.Held.Set(bucket)
	}
	return b
}

func vectorMap(members int) *Map {
	m := &Map{MapID: vectorMapID, Parent: MapID{Version: 6, Leader: vectorNode(2)}, Rules: vectorRules}
	for i := range members {
		m.Members = append(m.Members, vectorNode(1+i))
	}
	for b := range m.Owner {
		m.Owner[b] = uint8(b % members)
	}
	m.Owner[filter.Buckets-1] = Nobody
	return m
}

func vectorCodec() *Codec { return NewCodec("demo", vectorKey) }

// readVector reads the frames of a file of testdata.
func readVector(tb testing.TB, name string) (frames [][]byte) {
	tb.Helper()
	text, err := os.ReadFile(filepath.Join("testdata", name))
	if err != nil {
		tb.Fatal(err)
	}
	for one := range strings.SplitSeq(string(text), "\n\n") {
		f, err := hex.DecodeString(strings.ReplaceAll(one, "\n", ""))
		if err != nil {
			tb.Fatalf("%s: %v", name, err)
		}
		frames = append(frames, f)
	}
	return frames
}

// TestVectors fixes the layout, on which nodes of different builds must agree.
// The frames in testdata, their HMACs included, were made by another
// implementation: testdata/vectors.py, with Python's hmac and hashlib.
func TestVectors(t *testing.T) {
	c := vectorCodec()
	for _, tt := range []struct {
		file string
		got  [][]byte
	}{
		{"beacon.hex", [][]byte{c.Beacon(vectorBeacon())}},
		{"map-3.hex", c.Map(vectorMap(3), vectorPeer, vectorSequence)},
		{"map-200.hex", c.Map(vectorMap(200), vectorPeer, vectorSequence)},
	} {
		want := readVector(t, tt.file)
		if len(tt.got) != len(want) {
			t.Errorf("%s: %d frames; want %d", tt.file, len(tt.got), len(want))
			continue
		}
		for i := range want {
			if diff := cmp.Diff(hex.Dump(want[i]), hex.Dump(tt.got[i])); diff != "" {
				t.Errorf("%s, frame %d (-want +got)\n%s", tt.file, i, diff)
			}
		}
	}
	b, _, err := c.Decode(readVector(t, "beacon.hex")[0])
	if diff := cmp.Diff(vectorBeacon(), b); err != nil || diff != "" {
		t.Errorf("beacon.hex: %v (-want +got)\n%s", err, diff)
	}
	for _, members := range []int{3, 200} {
		name := fmt.Sprintf("map-%d.hex", members)
		if diff := cmp.Diff(vectorMap(members), assemble(t, c, readVector(t, name))); diff != "" {
			t.Errorf("%s (-want +got)\n%s", name, diff)
		}
	}
}

// assemble reads the frames of one map.
func assemble(t *testing.T, c *Codec, frames [][]byte) (m *Map) {
	t.Helper()
	var a Assembler
	for i, f := range frames {
		if m != nil {
			t.Fatalf("the map is whole after %d of %d frames", i, len(frames))
		}
		p := decodePartOf(t, c, f)
		if p.From != vectorPeer || p.Sequence != vectorSequence+uint64(i) || p.Part != i || p.Parts != len(frames) {
			t.Errorf("frame %d: part %d of %d, number %d, of %v", i, p.Part, p.Parts, p.Sequence, p.From)
		}
		var err error
		if m, err = a.Add(p); err != nil {
			t.Fatalf("frame %d: %v", i, err)
		}
	}
	return m
}

func decodePartOf(tb testing.TB, c *Codec, f []byte) *Part {
	tb.Helper()
	b, p, err := c.Decode(f)
	if err != nil || p == nil || b != nil {
		tb.Fatalf("Decode = %v, %v, %v; want a part of a map", b, p, err)
	}
	return p
}

func TestBeaconRoundTrip(t *testing.T) {
	tags := func(n int) (all []Tag) {
		for i := range n {
			all = append(all, Tag(i*0x1010101))
		}
		return all
	}
	var allHeld Bits
	for b := range filter.Buckets {
		allHeld.Set(b)
	}
	peer := Peer{ID: vectorNode(9), Incarnation: 1<<64 - 1}
	for _, b := range []*Beacon{
		vectorBeacon(),
		{Peer: peer, State: Listening},
		{Peer: peer, State: Serving, Heard: tags(1)},
		{Peer: peer, State: Draining, Heard: tags(MaxNodes)},
		{Peer: peer, State: Stopping, Heard: tags(MaxNodes + 1)},
		{Peer: peer, State: Leaving, HeldKnown: true},
		{Peer: peer, State: Restarting, HeldKnown: true, Held: allHeld},
		{
			Peer: peer, Sequence: 1<<64 - 1, State: Serving, Sick: true, Held: allHeld, Weight: 1000, Busy: 1000, Flows: 1<<32 - 1, Rules: 1<<64 - 1,
			Map:    MapID{Version: 1<<64 - 1, Leader: NodeID{0xfe, 0xff, 0xff, 0xff, 0xff, 0xff}},
			Parent: MapID{Version: 1<<64 - 2, Leader: NodeID{0xfe, 0xff, 0xff, 0xff, 0xff, 0xff}},
			Lowest: NodeID{0xfe, 0xff, 0xff, 0xff, 0xff, 0xff}, Heard: tags(MaxNodes * 2),
		},
	} {
		f := vectorCodec().Beacon(b)
		if len(f) > MaxFrame {
			t.Errorf("a frame of %d bytes; want at most %d", len(f), MaxFrame)
		}
		got, _, err := vectorCodec().Decode(f)
		want := *b
		want.Heard = want.Heard[:min(len(want.Heard), MaxNodes)]
		if diff := cmp.Diff(&want, got); err != nil || diff != "" {
			t.Errorf("%v with %d tags: %v (-want +got)\n%s", b.State, len(b.Heard), err, diff)
		}
	}
}

func TestMapRoundTrip(t *testing.T) {
	nobodys := &Map{MapID: vectorMapID}
	for b := range nobodys.Owner {
		nobodys.Owner[b] = Nobody
	}
	// 58 members are the most that fit into one frame.
	maps := map[int][]*Map{
		1: {nobodys, vectorMap(1), vectorMap(2), vectorMap(58)},
		2: {vectorMap(59), vectorMap(200), vectorMap(MaxNodes)},
	}
	for parts, maps := range maps {
		for _, m := range maps {
			frames := vectorCodec().Map(m, vectorPeer, vectorSequence)
			if len(frames) != parts || MapFrames(len(m.Members)) != parts {
				t.Errorf("%d members: %d frames, MapFrames = %d; want %d", len(m.Members), len(frames), MapFrames(len(m.Members)), parts)
			}
			for _, f := range frames {
				if len(f) > MaxFrame {
					t.Errorf("%d members: a frame of %d bytes; want at most %d", len(m.Members), len(f), MaxFrame)
				}
			}
			if diff := cmp.Diff(m, assemble(t, vectorCodec(), frames)); diff != "" {
				t.Errorf("%d members (-want +got)\n%s", len(m.Members), diff)
			}
		}
	}
}

// TestFrameSize: no frame needs an MTU above that of plain Ethernet.
func TestFrameSize(t *testing.T) {
	if MaxFrame > 14+1500 {
		t.Errorf("MaxFrame = %d; want at most %d", MaxFrame, 14+1500)
	}
}

// resign gives the frame with an HMAC that is right. What is authentic and wrong
// comes from a fault of our own, or from another build.
func resign(f []byte) []byte {
	return sign(slices.Clone(f[:len(f)-macLen]), vectorKey)
}

// with gives the frame with some bytes changed, and the old HMAC.
func with(f []byte, off int, to ...byte) []byte {
	f = slices.Clone(f)
	copy(f[off:], to)
	return f
}

func TestDecodeRefuses(t *testing.T) {
	c := vectorCodec()
	beacon := c.Beacon(vectorBeacon())
	small := c.Map(vectorMap(3), vectorPeer, 1)[0]
	large := c.Map(vectorMap(200), vectorPeer, 1)
	longer := func(f []byte, n int) []byte { return append(slices.Clone(f), make([]byte, n)...) }
	shorter := func(f []byte, n int) []byte { return f[:len(f)-n] }
	for _, tt := range []struct {
		name  string
		frame []byte
		want  error
	}{
		{"nothing", nil, ErrMalformed},
		{"too long", longer(beacon, MaxFrame), ErrMalformed},
		{"longest and one more, signed", resign(longer(large[0], 1)), ErrMalformed},
		{"other EtherType", with(beacon, 12, 0x08, 0x00), ErrMalformed},
		{"no magic", with(beacon, 14, 'X'), ErrMalformed},
		{"half the magic", with(beacon, 15, 'X'), ErrMalformed},
		{"source is a group", resign(with(beacon, 6, 0x53)), ErrMalformed},
		{"source is everybody", resign(with(small, 6, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff)), ErrMalformed},
		{"version 0", resign(with(beacon, 16, 0)), ErrOtherVersion},
		{"the version before", resign(with(beacon, 16, version-1)), ErrOtherVersion},
		{"the version after", resign(with(beacon, 16, version+1)), ErrOtherVersion},
		{"other cluster", NewCodec("demo2", vectorKey).Beacon(vectorBeacon()), ErrOtherCluster},
		{"map of another cluster", NewCodec("demo2", vectorKey).Map(vectorMap(3), vectorPeer, 1)[0], ErrOtherCluster},
		{"wrong key", NewCodec("demo", vectorKey[1:]).Beacon(vectorBeacon()), ErrUnauthentic},
		{"map with a wrong key", NewCodec("demo", vectorKey[1:]).Map(vectorMap(3), vectorPeer, 1)[0], ErrUnauthentic},
		{"forged source", with(beacon, 11, 9), ErrUnauthentic},
		{"forged state", with(beacon, 42, byte(Leaving)), ErrUnauthentic},
		{"unsigned tail", longer(beacon, 4), ErrUnauthentic},
		{"kind 0", resign(with(beacon, 17, 0)), ErrMalformed},
		{"kind of the future", resign(with(beacon, 17, 3)), ErrMalformed},

		{"no state", resign(with(beacon, 42, 0)), ErrMalformed},
		{"state of the future", resign(with(beacon, 42, byte(Restarting)+1)), ErrMalformed},
		{"flag of the future", resign(with(beacon, 43, 4)), ErrMalformed},
		{"busier than wholly", resign(with(beacon, 46, 1001>>8, 1001&0xff)), ErrMalformed},
		{"more tags than there are", resign(with(beacon, 94, 3)), ErrMalformed},
		{"fewer tags than there are", resign(with(beacon, 94, 1)), ErrMalformed},
		{"half a tag", resign(shorter(beacon, 2)), ErrMalformed},
		{"signed tail", resign(longer(beacon, 4)), ErrMalformed},
		{"a beacon as a map", resign(with(beacon, 17, kindMap)), ErrMalformed},
		{"a map as a beacon", resign(with(small, 17, kindBeacon)), ErrMalformed},

		{"map of version 0", resign(with(small, 42, make([]byte, 8)...)), ErrMalformed},
		{"no parts", resign(with(small, 57, 0)), ErrMalformed},
		{"part 1 of 1", resign(with(small, 56, 1)), ErrMalformed},
		{"part 2 of 2", resign(with(large[1], 56, 2)), ErrMalformed},
		{"more parts than a map has", resign(with(large[0], 57, maxParts+1)), ErrMalformed},
		{"255 parts", resign(with(large[0], 56, 254, 255)), ErrMalformed},
		{"first part too short", resign(shorter(large[0], 1)), ErrMalformed},
		{"only part is the first of two", resign(with(small, 57, 2)), ErrMalformed},
		{"a part of nothing", resign(small[:offPiece+macLen]), ErrMalformed},
	} {
		b, p, err := c.Decode(tt.frame)
		if !errors.Is(err, tt.want) || b != nil || p != nil {
			t.Errorf("%s: %v, %v, %v; want %v", tt.name, b, p, err, tt.want)
		}
	}
	// A version that is not ours is named, for the log.
	if _, _, err := c.Decode(with(beacon, 16, 9)); err == nil || !strings.Contains(err.Error(), "9") {
		t.Errorf("version 9: %v; want an error that says so", err)
	}
}

// TestDecodeCutOff: a frame of any length but its own has no effect, not even if
// its HMAC is right.
func TestDecodeCutOff(t *testing.T) {
	c := vectorCodec()
	for name, frame := range vectorFrames() {
		for n := range frame {
			if b, p, err := c.Decode(frame[:n]); err == nil {
				t.Errorf("%s, %d of %d bytes: %v, %v; want an error", name, n, len(frame), b, p)
			}
			if n < 6+macLen {
				continue
			}
			b, p, err := c.Decode(resign(frame[:n]))
			if p != nil && p.Part == p.Parts-1 {
				// How long the last part has to be only the whole map tells.
				p.Part, p.Parts = 0, 1
				var m *Map
				if m, err = new(Assembler).Add(p); m != nil {
					t.Errorf("%s, %d of %d bytes: a map", name, n, len(frame))
				}
			}
			if b != nil || !errors.Is(err, ErrMalformed) {
				t.Errorf("%s, %d of %d bytes, signed: %v, %v; want %v", name, n, len(frame), b, err, ErrMalformed)
			}
		}
	}
}

// vectorFrames are the vectors' frames by name.
func vectorFrames() map[string][]byte {
	c := vectorCodec()
	large := c.Map(vectorMap(200), vectorPeer, vectorSequence)
	return map[string][]byte{
		"beacon": c.Beacon(vectorBeacon()), "map": c.Map(vectorMap(3), vectorPeer, vectorSequence)[0], "first part": large[0], "last part": large[1],
	}
}

// TestEveryByteCounts: all of a frame is authenticated but its destination,
// which is a group for most beacons and one node for some.
func TestEveryByteCounts(t *testing.T) {
	c := vectorCodec()
	for name, frame := range vectorFrames() {
		wantBeacon, wantPart, err := c.Decode(frame)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		for off := range frame {
			for bit := range 8 {
				b, p, err := c.Decode(with(frame, off, frame[off]^1<<bit))
				switch {
				case off >= 6 && err == nil:
					t.Errorf("%s, bit %d of byte %d flipped: %v, %v; want an error", name, bit, off, b, p)
				case off < 6 && (err != nil || !cmp.Equal(b, wantBeacon) || !cmp.Equal(p, wantPart, cmp.AllowUnexported(Part{}))):
					t.Errorf("%s, another destination: %v, %v, %v; want the same as before", name, b, p, err)
				}
			}
		}
	}
}

// TestDecodeKeepsNothing: the buffer of a frame is used again for the next.
func TestDecodeKeepsNothing(t *testing.T) {
	for name, frame := range vectorFrames() {
		b, p, err := vectorCodec().Decode(frame)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		wantBeacon, wantPart, _ := vectorCodec().Decode(slices.Clone(frame))
		clear(frame)
		if !cmp.Equal(b, wantBeacon) || !cmp.Equal(p, wantPart, cmp.AllowUnexported(Part{})) {
			t.Errorf("%s: what was decoded changes with the buffer", name)
		}
	}
}

// TestKeyRoll: the nodes get the new key one by one, in three rounds. Within a
// round each node takes the frames of each other, whether it has been seen to
// already or not.
func TestKeyRoll(t *testing.T) {
	oldKey, newKey := bytes.Repeat([]byte{1}, 32), bytes.Repeat([]byte{2}, 32)
	const (
		before = iota
		prepared
		switched
		after
	)
	codecs := []*Codec{
		before:   NewCodec("demo", oldKey),
		prepared: NewCodec("demo", oldKey, newKey),
		switched: NewCodec("demo", newKey, oldKey),
		after:    NewCodec("demo", newKey),
	}
	names := []string{before: "old", prepared: "old, accepts new", switched: "new, accepts old", after: "new"}
	takes := [][]bool{ // by sender, then receiver
		before:   {before: true, prepared: true, switched: true, after: false},
		prepared: {before: true, prepared: true, switched: true, after: false},
		switched: {before: false, prepared: true, switched: true, after: true},
		after:    {before: false, prepared: true, switched: true, after: true},
	}
	for sender, c := range codecs {
		frames := append(c.Map(vectorMap(3), vectorPeer, 1), c.Beacon(vectorBeacon()))
		for receiver, want := range takes[sender] {
			for _, f := range frames {
				_, _, err := codecs[receiver].Decode(f)
				if (err == nil) != want || err != nil && !errors.Is(err, ErrUnauthentic) {
					t.Errorf("%q of %q: %v; want it taken: %v", names[receiver], names[sender], err, want)
				}
			}
		}
	}
	for round := before; round < after; round++ {
		if !takes[round][round+1] || !takes[round+1][round] {
			t.Errorf("in round %d the nodes of both kinds do not understand each other", round)
		}
	}
}

// TestTag: the tag is the beginning of a SHA-256, here one by Python's hashlib.
func TestTag(t *testing.T) {
	const want = 0xb323a1b2
	if got := (Peer{ID: vectorNode(2), Incarnation: 22}).Tag(); got != want {
		t.Errorf("Tag() = %08x; want %08x", got, want)
	}
}

// partsOf gives the parts of a map as they are received.
func partsOf(tb testing.TB, m *Map, from Peer) (parts []*Part) {
	tb.Helper()
	c := vectorCodec()
	for _, f := range c.Map(m, from, 1) {
		parts = append(parts, decodePartOf(tb, c, f))
	}
	return parts
}

// TestAssembler: parts come in any order, more than once, and among those of
// other maps. Never does a map come out that nobody has sent.
func TestAssembler(t *testing.T) {
	a := vectorMap(200)
	b := vectorMap(255)
	b.Version++
	again := Peer{ID: vectorPeer.ID, Incarnation: vectorPeer.Incarnation + 1}
	small := vectorMap(3) // of the same name as a, as a leader never makes it
	pa, pb, ps, pr := partsOf(t, a, vectorPeer), partsOf(t, b, vectorPeer), partsOf(t, small, vectorPeer), partsOf(t, a, again)
	for _, tt := range []struct {
		name  string
		parts []*Part
		want  []*Map // in this order
	}{
		{"in order", []*Part{pa[0], pa[1]}, []*Map{a}},
		{"the other way", []*Part{pa[1], pa[0]}, []*Map{a}},
		{"doubled", []*Part{pa[0], pa[0], pa[1], pa[1]}, []*Map{a}},
		{"twice", []*Part{pa[0], pa[1], pa[0], pa[1]}, []*Map{a, a}},
		{"twice, one frame lost", []*Part{pa[0], pa[1], pa[1], pa[0]}, []*Map{a, a}},
		{"two maps", []*Part{pa[0], pa[1], pb[0], pb[1]}, []*Map{a, b}},
		{"two maps, the first cut short", []*Part{pa[0], pb[0], pb[1]}, []*Map{b}},
		{"two maps, alternating", []*Part{pa[0], pb[0], pa[1], pb[1]}, nil},
		{"two maps, alternating, and again", []*Part{pa[0], pb[1], pa[1], pa[0]}, []*Map{a}},
		{"halves of two maps", []*Part{pa[0], pb[1], pa[0], pb[1]}, nil},
		{"one name, another size", []*Part{pa[0], ps[0], pa[1]}, []*Map{small}},
		{"halves of two incarnations", []*Part{pa[0], pr[1]}, nil},
		{"restarted in between", []*Part{pa[0], pr[0], pr[1]}, []*Map{a}},
		{"a part of one part", []*Part{ps[0], ps[0]}, []*Map{small, small}},
	} {
		var asm Assembler
		var got []*Map
		for i, p := range tt.parts {
			m, err := asm.Add(p)
			if err != nil {
				t.Errorf("%s, part %d: %v", tt.name, i, err)
			}
			if m != nil {
				got = append(got, m)
			}
			checkBound(t, &asm)
		}
		if diff := cmp.Diff(tt.want, got); diff != "" {
			t.Errorf("%s (-want +got)\n%s", tt.name, diff)
		}
	}
}

// checkBound fails if an assembler keeps more than one map can take.
func checkBound(tb testing.TB, a *Assembler) {
	tb.Helper()
	kept := 0
	for _, piece := range a.parts {
		kept += cap(piece)
	}
	if most := maxParts * mapPiece * 5 / 4; kept > most { // a slice has a little more than its length
		tb.Errorf("an assembler keeps %d bytes; want at most %d", kept, most)
	}
}

// TestAssemblerRefuses: what is wrong with a map shows when it is whole. A good
// one after it is taken.
func TestAssemblerRefuses(t *testing.T) {
	whole := vectorMap(3).append(nil)
	large := vectorMap(200).append(nil)
	const owners = mapHead + 3*6
	for _, tt := range []struct {
		name string
		map_ []byte
	}{
		{"no map", whole[:1]},
		{"cut off in the head", whole[:mapHead-1]},
		{"cut off after the head", whole[:mapHead]},
		{"one bucket less", whole[:len(whole)-1]},
		{"one bucket more", append(slices.Clone(whole), 0)},
		{"one member less", with(whole, 22, 2)},
		{"one member more", with(whole, 22, 4)},
		{"the first bucket's owner is no member", with(whole, owners, 3)},
		{"the last bucket's owner is no member", with(whole, owners+filter.Buckets-1, 254)},
		{"the last of two parts is cut off", large[:len(large)-1]},
		{"the last of two parts names an owner who is no member", with(large, len(large)-1, 200)},
	} {
		parts := []*Part{{From: vectorPeer, ID: vectorMapID, Part: 0, Parts: 1, piece: tt.map_}}
		if len(tt.map_) > mapPiece {
			parts = []*Part{
				{From: vectorPeer, ID: vectorMapID, Part: 0, Parts: 2, piece: tt.map_[:mapPiece]},
				{From: vectorPeer, ID: vectorMapID, Part: 1, Parts: 2, piece: tt.map_[mapPiece:]},
			}
		}
		var a Assembler
		for i, p := range parts {
			m, err := a.Add(p)
			if last := i == len(parts)-1; m != nil || last != errors.Is(err, ErrMalformed) {
				t.Errorf("%s, part %d of %d: %v, %v", tt.name, i, len(parts), m, err)
			}
		}
		for _, p := range partsOf(t, vectorMap(200), vectorPeer) {
			m, err := a.Add(p)
			if err != nil || (m != nil) != (p.Part == 1) {
				t.Errorf("%s, then part %d of a good map: %v, %v", tt.name, p.Part, m, err)
			}
		}
	}
}

func FuzzDecode(f *testing.F) {
	c := vectorCodec()
	for _, frame := range vectorFrames() {
		f.Add(frame)
	}
	f.Add(c.Beacon(&Beacon{Peer: vectorPeer, State: Listening}))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, frame []byte) {
		_, _, _ = c.Decode(frame)
		// Past the authentication as well.
		if len(frame) < minFrame {
			return
		}
		kind := frame[17]
		copy(frame, c.begin(kind, Peer{ID: NodeID(frame[6:12])}, 0, 0)[:26])
		signed := resign(frame)
		b, p, err := c.Decode(signed)
		switch {
		case err != nil:
		case b != nil:
			if again := c.Beacon(b); !bytes.Equal(again, signed) {
				t.Errorf("Beacon(Decode(f)) = %x; want %x", again, signed)
			}
		case p.Parts == 1:
			m, err := new(Assembler).Add(p)
			if err != nil {
				return
			}
			if again := c.Map(m, p.From, p.Sequence); len(again) != 1 || !bytes.Equal(again[0], signed) {
				t.Errorf("Map(Decode(f)) = %x; want %x", again, signed)
			}
		}
	})
}

// FuzzAssembler sends parts of several maps of several incarnations, in any order
// and some of them spoilt, and looks for a map that is none of those.
func FuzzAssembler(f *testing.F) {
	const whole, spoilt = 0, 0x80
	f.Add([]byte{0, 1})
	f.Add([]byte{1, 0, 0, 1})
	f.Add([]byte{0, 2, 1, 3, 0, 1})
	f.Add([]byte{0, 1 | spoilt, 0, 1})
	f.Add([]byte{4, 5, 0, 5, 8, 9, 12, 13 | spoilt, 12})
	c := vectorCodec()
	var sent [8]*Map
	var frames [8][][]byte
	for i := range sent {
		sent[i] = vectorMap([]int{200, 255, 3, 59}[i%4])
		sent[i].Version += uint64(i % 4)
		frames[i] = c.Map(sent[i], Peer{ID: vectorPeer.ID, Incarnation: uint64(i / 4)}, 1)
	}
	f.Fuzz(func(t *testing.T, order []byte) {
		order = order[:min(len(order), 64)]
		var a Assembler
		clean := [8]bool{}
		for i := range clean {
			clean[i] = true
		}
		for i, op := range order {
			which := int(op>>1) % 8
			frame := frames[which][int(op&1)%len(frames[which])]
			if op&spoilt != whole {
				at := offPiece + i*len(order)%(len(frame)-offPiece-macLen)
				frame = resign(with(frame, at, frame[at]^byte(1+i%255)))
				clean[which] = false
			}
			_, p, err := c.Decode(frame)
			if err != nil {
				t.Fatalf("part of map %d: %v", which, err)
			}
			m, err := a.Add(p)
			checkBound(t, &a)
			if clean[which] && err != nil {
				t.Errorf("map %d, of which no part was spoilt: %v", which, err)
			}
			if m == nil {
				continue
			}
			if m.MapID != sent[which].MapID {
				t.Errorf("a part of %v made %v", sent[which].MapID, m.MapID)
			}
			if clean[which] && !bytes.Equal(m.append(nil), sent[which].append(nil)) {
				t.Errorf("map %d came out as another", which)
			}
		}
	})
}
