package membership

import (
	"bytes"
	"errors"
	"maps"
	"reflect"
	"strings"
	"testing"
	"time"
)

func vectorSettings() *Settings {
	return &Settings{
		Version: 5, Author: vectorPeer.ID, By: "ops: größer", Balance: SetLoad,
		Weights: map[NodeID]uint16{{0x52, 0x54, 0, 0x77, 0, 3}: 1000, {0x52, 0x54, 0, 0x77, 0, 2}: 50},
	}
}

func settingsFrame(t testing.TB, s *Settings) []byte {
	t.Helper()
	f, err := vectorCodec().Settings(s, Peer{NodeID{0x52, 0x54, 0, 0x77, 0, 1}, vectorPeer.Incarnation}, 11)
	if err != nil {
		t.Fatal(err)
	}
	return f
}

func TestSettingsFrame(t *testing.T) {
	full := &Settings{Version: 1, By: strings.Repeat("n", MaxBy), Weights: map[NodeID]uint16{}}
	for i := range MaxWeights {
		full.Weights[NodeID{2, 0, 0, 0, byte(i >> 8), byte(i)}] = 1
	}
	for _, s := range []*Settings{vectorSettings(), full, {Version: 1, Weights: map[NodeID]uint16{}}} {
		f := settingsFrame(t, s)
		if len(f) > MaxFrame {
			t.Errorf("%d bytes", len(f))
		}
		got, err := vectorCodec().DecodeSettings(f)
		if err != nil || !reflect.DeepEqual(got.Settings, s) || got.Sequence != 11 || got.Settings.ID() != s.ID() {
			t.Errorf("DecodeSettings(Settings(%+v)) = %+v, %v", s, got, err)
		}
		if b, p, err := vectorCodec().Decode(f); b != nil || p != nil || !errors.Is(err, ErrMalformed) {
			t.Errorf("Decode(settings) = %v, %v, %v", b, p, err)
		}
	}
	for name, spoil := range map[string]func(*Settings){
		"no version":       func(s *Settings) { s.Version = 0 },
		"other balance":    func(s *Settings) { s.Balance = setBalances },
		"weight 0":         func(s *Settings) { s.Weights[NodeID{1}] = 0 },
		"weight 1001":      func(s *Settings) { s.Weights[NodeID{1}] = 1001 },
		"too many weights": func(s *Settings) { s.Weights = maps.Clone(full.Weights); s.Weights[NodeID{1}] = 1 },
		"long text":        func(s *Settings) { s.By = full.By + "n" },
		"escape":           func(s *Settings) { s.By = "\x1b[2J" },
		"no UTF-8":         func(s *Settings) { s.By = "\xff" },
	} {
		s := vectorSettings()
		spoil(s)
		if _, err := vectorCodec().Settings(s, vectorPeer, 1); err == nil {
			t.Errorf("%s: they are taken", name)
		}
	}
	f := settingsFrame(t, vectorSettings())
	for name, frame := range map[string][]byte{
		"cut off":            f[:60],
		"longer":             resign(append(bytes.Clone(f), 0)),
		"weights not sorted": resign(with(f, offWeights+5, 9)),
		"twice the same":     resign(with(f, offWeights+5, 3)),
		"a card's kind":      resign(with(f, 17, 3)),
	} {
		if _, err := vectorCodec().DecodeSettings(frame); !errors.Is(err, ErrMalformed) {
			t.Errorf("%s: %v; want ErrMalformed", name, err)
		}
	}
	if _, err := vectorCodec().DecodeSettings(with(f, 50, 1)); !errors.Is(err, ErrUnauthentic) {
		t.Errorf("changed: %v; want ErrUnauthentic", err)
	}
}

// TestOrders: an order changes what it names; of two that did not know of each other the
// same one holds everywhere.
func TestOrders(t *testing.T) {
	author, a, b := NodeID{9}, NodeID{1}, NodeID{2}
	load, configured := SetLoad, AsConfigured
	var none *Settings
	one := none.apply(Order{Weights: map[NodeID]uint16{a: 50}, By: "x"}, author)
	two := one.apply(Order{Balance: &load, Weights: map[NodeID]uint16{b: 7}}, author)
	if want := (&Settings{Version: 2, Author: author, Balance: SetLoad, Weights: map[NodeID]uint16{a: 50, b: 7}}); !reflect.DeepEqual(two, want) {
		t.Errorf("the second order gives %+v; want %+v", two, want)
	}
	three := two.apply(Order{Balance: &configured, Weights: map[NodeID]uint16{a: 0}}, author)
	if want := (&Settings{Version: 3, Author: author, Weights: map[NodeID]uint16{b: 7}}); !reflect.DeepEqual(three, want) {
		t.Errorf("the third order gives %+v; want %+v", three, want)
	}
	if one.apply(Order{Weights: map[NodeID]uint16{b: 1001}}, author) != nil || len(one.Weights) != 1 || one.Version != 1 {
		t.Errorf("an order that is none is followed, or the first changed: %+v", one)
	}
	other := one.apply(Order{Balance: &load}, NodeID{8})
	if x, y := two.ID().Compare(other.ID()), other.ID().Compare(two.ID()); x == 0 || x != -y {
		t.Errorf("two orders of one version compare as %d and %d", x, y)
	}
	if none.ID().Compare(one.ID()) >= 0 || two.ID().Compare(one.ID()) <= 0 {
		t.Error("a later order does not hold")
	}
}

// TestSettingsSpread: a machine takes the highest settings of a peer that is there, says
// them to who says older ones, and is silent when another has said the same.
func TestSettingsSpread(t *testing.T) {
	params := Detect(300 * time.Millisecond)
	self, other := Peer{NodeID{5: 1}, 77}, Peer{NodeID{5: 2}, 88}
	m := New(Config{Self: self, Params: params, Weight: 100, Policy: Policy{Moves: 32}}, 1)
	now, sequence := int64(time.Second), uint64(0)
	said := 0
	step := func(ev Event) Actions {
		a := m.Step(ev, now)
		if a.Beacon != nil {
			a.Next = min(a.Next, m.Step(Sent{now}, now).Next)
		}
		if a.Settings != nil {
			said++
		}
		return a
	}
	beacon := func() {
		sequence++
		step(Received{&Beacon{Peer: other, Sequence: sequence, State: Listening, Weight: 100, Heard: []Tag{m.Self().Tag()}}})
	}
	says := func(s *Settings) {
		sequence++
		step(ReceivedSettings{s, other, sequence})
	}
	older, newer := vectorSettings(), vectorSettings()
	newer.Version++
	sequence++
	says(newer) // of whom nothing is known
	if m.Settings() != nil {
		t.Fatal("settings of a stranger are taken")
	}
	beacon()
	says(newer)
	if m.Settings() != newer {
		t.Fatal("settings of a peer are not taken")
	}
	sequence -= 2
	says(newer)
	says(older)
	if m.Settings() != newer {
		t.Error("older settings are taken, or a recording of them")
	}
	// For ten seconds: nobody else says them, somebody does, somebody says older ones.
	during := func(each func()) int {
		said = 0
		for end := now + int64(10*time.Second); now < end; now += int64(params.Interval) / 2 {
			beacon()
			each()
			step(Tick{})
		}
		return said
	}
	sequence += 10
	if n := during(func() {}); n < 10 || n > 10*4 {
		t.Errorf("in ten seconds alone they are said %d times", n)
	}
	if n := during(func() { says(newer) }); n != 0 {
		t.Errorf("they are said %d times though another does", n)
	}
	if n := during(func() { says(older) }); n < 50 {
		t.Errorf("they are said %d times though another says older ones", n)
	}
}

// TestWeightsAtRunTime: maps go by what was set, and by the configuration again.
func TestWeightsAtRunTime(t *testing.T) {
	for _, balance := range []Balance{Even, Load} {
		m := New(Config{Self: Peer{NodeID{5: 1}, 77}, Params: Detect(300 * time.Millisecond), Weight: 100, Policy: Policy{Moves: 32, Balance: balance}}, 1)
		other := Peer{NodeID{5: 2}, 88}
		now, sequence := int64(time.Second), uint64(0)
		run := func() int {
			for end := now + int64(2*time.Second); now < end; now += int64(50 * time.Millisecond) {
				sequence++
				b := &Beacon{Peer: other, Sequence: sequence, State: Serving, Weight: 100, Heard: []Tag{m.Self().Tag()}, Lowest: m.Self().ID}
				if m.cur != nil {
					b.Map, b.Parent = m.cur.MapID, m.cur.Parent
				}
				for _, ev := range []Event{Received{b}, Tick{}} {
					if m.Step(ev, now).Beacon != nil {
						m.Step(Sent{now}, now)
					}
				}
			}
			return m.owned
		}
		if got := run(); got != 512 {
			t.Fatalf("balance %v: %d buckets; want half of them", balance, got)
		}
		m.Step(Order{Weights: map[NodeID]uint16{other.ID: 300}}, now)
		if got := run(); got != 256 {
			t.Errorf("balance %v, weights 100 and 300: %d buckets; want 256", balance, got)
		}
		if v := m.View(); v.Members[1].Weight != 300 || v.Settings.Version != 1 || v.Balance != balance {
			t.Errorf("balance %v: the view is %+v", balance, v)
		}
		m.Step(Order{Weights: map[NodeID]uint16{other.ID: 0}}, now)
		if got := run(); got != 512 {
			t.Errorf("balance %v, as configured again: %d buckets; want 512", balance, got)
		}
	}
}

func FuzzDecodeSettings(f *testing.F) {
	f.Add(settingsFrame(f, vectorSettings()))
	f.Add(vectorCodec().Beacon(vectorBeacon()))
	f.Add([]byte{})
	c := vectorCodec()
	f.Fuzz(func(t *testing.T, frame []byte) {
		_, _ = c.DecodeSettings(frame)
		if len(frame) < minFrame {
			return
		}
		copy(frame, c.begin(kindSettings, Peer{ID: NodeID(frame[6:12])}, 0, 0)[:26])
		signed := resign(frame)
		set, err := c.DecodeSettings(signed)
		if err != nil {
			return
		}
		if again, err := c.Settings(set.Settings, set.From, set.Sequence); err != nil || !bytes.Equal(again, signed) {
			t.Errorf("Settings(DecodeSettings(f)) = %x, %v; want %x", again, err, signed)
		}
	})
}
