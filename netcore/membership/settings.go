package membership

import (
	"cmp"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"maps"
	"math"
	"slices"
	"unicode"
	"unicode/utf8"
)

// Settings are what an operator has set while the cluster runs: they hold instead of
// what the nodes are configured with, until all of them have restarted. They are never
// changed, but replaced by some of a higher id. Whoever leads makes maps by them;
// nothing else depends on them, so that nodes may have different ones for a while.
type Settings struct {
	Version uint64 // rises with each order; 0: none
	Author  NodeID // the node that took the order
	By      string // who gave it, and why: at most MaxBy bytes of printable UTF-8
	Balance SetBalance
	Weights map[NodeID]uint16 // 1 to 1000, at most MaxWeights
}

// SetBalance is the balance that was set.
type SetBalance uint8

// What can be set. The zero value is what the nodes are configured with.
const (
	AsConfigured SetBalance = iota
	SetEven
	SetLoad
	setBalances
)

// The bounds of settings: they fit into one frame.
const (
	MaxWeights = 150
	MaxBy      = 100
)

// SettingsID orders settings: of two the higher holds, which is the one of the higher
// version, or of two orders that did not know of each other the one with the higher sum.
type SettingsID struct {
	Version uint64
	Sum     uint64 // of all but Version: the first bytes of SHA-256
}

// Compare orders ids.
func (id SettingsID) Compare(other SettingsID) int {
	return cmp.Or(cmp.Compare(id.Version, other.Version), cmp.Compare(id.Sum, other.Sum))
}

// ID gives the id; the zero value for nil.
func (s *Settings) ID() SettingsID {
	if s == nil {
		return SettingsID{}
	}
	body := s.append(nil)
	sum := sha256.Sum256(body[8:])
	return SettingsID{s.Version, binary.BigEndian.Uint64(sum[:])}
}

// Order is an event: somebody changes the settings. What it does not name stays.
type Order struct {
	Balance *SetBalance
	Weights map[NodeID]uint16 // 0: as configured again
	By      string
}

// apply gives the settings that follow from an order; nil: it cannot be followed.
func (s *Settings) apply(o Order, author NodeID) *Settings {
	next := &Settings{Version: 1, Author: author, By: o.By, Weights: map[NodeID]uint16{}}
	if s != nil {
		next.Version, next.Balance = s.Version+1, s.Balance
		maps.Copy(next.Weights, s.Weights)
	}
	if o.Balance != nil {
		next.Balance = *o.Balance
	}
	for id, w := range o.Weights {
		if w == 0 {
			delete(next.Weights, id)
		} else {
			next.Weights[id] = w
		}
	}
	if !next.valid() {
		return nil
	}
	return next
}

func (s *Settings) valid() bool {
	if s.Version == 0 || s.Balance >= setBalances || len(s.Weights) > MaxWeights || len(s.By) > MaxBy || !utf8.ValidString(s.By) {
		return false
	}
	for _, c := range s.By {
		if !unicode.IsPrint(c) {
			return false
		}
	}
	for _, w := range s.Weights {
		if w < 1 || w > 1000 {
			return false
		}
	}
	return true
}

// Settings have between the head and the HMAC, as a beacon has it
//
//	42  8  version
//	50  6  author
//	56  1  balance: 0 as configured, 1 even, 2 by load
//	57  1  number of weights
//	58  1  length of the text
//	59 8n  weights, by node: node (6), weight (2)
//	 …  …  who gave the order, and why
const (
	kindSettings = 5
	offWeights   = 59
)

func (s *Settings) append(b []byte) []byte {
	b = binary.BigEndian.AppendUint64(b, s.Version)
	b = append(b, s.Author[:]...)
	b = append(b, byte(s.Balance), byte(len(s.Weights)), byte(len(s.By)))
	for _, id := range slices.SortedFunc(maps.Keys(s.Weights), NodeID.Compare) {
		b = binary.BigEndian.AppendUint16(append(b, id[:]...), s.Weights[id])
	}
	return append(b, s.By...)
}

var errSettings = errors.New("these settings do not fit the protocol")

// Settings gives the Ethernet frame of settings.
func (c *Codec) Settings(s *Settings, from Peer, sequence uint64) ([]byte, error) {
	if !s.valid() {
		return nil, errSettings
	}
	f := c.begin(kindSettings, from, sequence, offWeights+8*len(s.Weights)+len(s.By)+macLen)
	return sign(s.append(f), c.keys[0]), nil
}

// isSettings reports whether a frame says that it has settings.
func isSettings(f []byte) bool { return len(f) > 17 && f[16] == version && f[17] == kindSettings }

// DecodeSettings reads the Ethernet frame of settings. The errors are those of Decode.
func (c *Codec) DecodeSettings(f []byte) (*ReceivedSettings, error) {
	body, from, sequence, err := c.open(f)
	if err != nil {
		return nil, err
	}
	if f[17] != kindSettings || len(body) < offWeights {
		return nil, ErrMalformed
	}
	n, text := int(body[57]), int(body[58])
	if len(body) != offWeights+8*n+text {
		return nil, ErrMalformed
	}
	s := &Settings{Version: binary.BigEndian.Uint64(body[42:]), Author: NodeID(body[50:56]), Balance: SetBalance(body[56]), Weights: map[NodeID]uint16{}}
	rest := body[offWeights:]
	last := NodeID{}
	for i := range n {
		id := NodeID(rest[:6])
		if i > 0 && id.Compare(last) <= 0 { // one way to write them: the id is a hash of it
			return nil, ErrMalformed
		}
		s.Weights[id], last, rest = binary.BigEndian.Uint16(rest[6:]), id, rest[8:]
	}
	if s.By = string(rest); !s.valid() {
		return nil, ErrMalformed
	}
	return &ReceivedSettings{Settings: s, From: from, Sequence: sequence}, nil
}

// spreader is what a machine knows of the settings, and when it says them next. Who
// has some says them after a while, unless somebody else has said the same: soon when
// a node has come or says others, and otherwise now and again (the Trickle algorithm,
// RFC 6206, with two intervals).
type spreader struct {
	settings   *Settings
	settingsID SettingsID
	sayAt      int64
	reweighted bool // since the last map
}

// sayLater and saySoon set when to say the settings: not all nodes at once.
func (m *Machine) sayLater(now int64) {
	m.sayAt = now + int64(m.cfg.Params.Dead) + m.jitter(now, int64(m.cfg.Params.Dead))
}

func (m *Machine) saySoon(now int64) {
	half := int64(m.cfg.Params.Interval) / 2
	m.sayAt = min(m.sayAt, now+half+m.jitter(now, half))
}

func (m *Machine) jitter(now, most int64) int64 {
	return int64(mix(idNumber(m.self.ID)^uint64(now), m.self.Incarnation) % uint64(most))
}

// goBy replaces the settings.
func (m *Machine) goBy(s *Settings, now int64, a *Actions) {
	if m.settings == nil {
		m.sayLater(now)
	}
	m.settings, m.settingsID = s, s.ID()
	m.reweighted, m.unsettled = true, true
	m.saySoon(now)
	a.Notes = append(a.Notes, Note{What: NewSettings, Peer: m.self, Settings: s})
}

func (m *Machine) receiveSettings(ev ReceivedSettings, now int64, a *Actions) {
	p := m.peers[ev.From.ID]
	// Only of a peer that has proved to be there: a recording has no effect.
	if p == nil || p.Peer != ev.From || !p.proven || ev.Sequence <= p.settingsSequence {
		return
	}
	p.settingsSequence = ev.Sequence
	switch c := ev.Settings.ID().Compare(m.settingsID); {
	case c == 0:
		m.sayLater(now)
	case c > 0, m.cfg.Weakness == AnySettings:
		m.goBy(ev.Settings, now, a)
	default:
		m.saySoon(now)
	}
}

// maySay says the settings if it is time.
func (m *Machine) maySay(now int64, a *Actions) {
	if m.settings == nil || now < m.sayAt || m.state >= Leaving {
		return
	}
	if m.sayLater(now); m.cfg.Weakness == SettingsOnce {
		m.sayAt = math.MaxInt64
	}
	m.sequence++
	a.Settings, a.SettingsSequence = m.settings, m.sequence
	a.SettingsUnicast = m.apart(now, func(*peer) bool { return true })
}

// weight is a node's, of which configured is what it says itself.
func (m *Machine) weight(id NodeID, configured int) int {
	if m.settings != nil && m.settings.Weights[id] != 0 {
		return int(m.settings.Weights[id])
	}
	return configured
}

// Settings are what was set at run time, not to be changed; nil: nothing.
func (m *Machine) Settings() *Settings { return m.settings }

// balance is the one that a leader goes by.
func (m *Machine) balance() Balance {
	if m.settings != nil {
		switch m.settings.Balance {
		case SetEven:
			return Even
		case SetLoad:
			return Load
		}
	}
	return m.cfg.Policy.Balance
}
