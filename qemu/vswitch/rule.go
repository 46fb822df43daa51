package vswitch

import (
	"container/heap"
	"errors"
	"fmt"
	"hash/fnv"
	"math/rand/v2"
	"time"
)

// Stage says where in the switch a rule applies. The zero value is invalid.
type Stage uint8

// The stages.
const (
	// Ingress is the cable into the switch: the rule is asked once for a frame,
	// before anything is learnt from it or mirrored.
	Ingress Stage = iota + 1
	// Egress is the cable out: the rule is asked once for each copy of a flooded
	// frame.
	Egress
)

// Rule disturbs frames. The first rule that matches a frame decides; a rule that
// only matches and does nothing exempts its frames from later ones.
type Rule struct {
	Name string // in logs; also seeds the rule's randomness
	At   Stage
	// From and To are names of ports; empty means any. To is for Egress only.
	From, To string
	// Match says whether the rule concerns a frame; nil means every frame. It is
	// called with the switch locked: it must be quick, and must not keep the
	// frame or call the switch.
	Match func(frame []byte) bool
	// Probability that a frame that matches is treated, 0 < p <= 1; 0 means 1.
	Probability float64
	// Limit is after how many treated frames the rule ends; 0 means never.
	Limit int
	// Spare is how many frames that match are left alone in each second, as storm
	// control does; 0 means none.
	Spare int

	Drop bool
	// Delay holds a frame back, by Delay plus a uniform part of Jitter. Frames
	// of equal due time keep their order; jitter reorders.
	Delay, Jitter time.Duration
	// Duplicate is how many copies follow the frame.
	Duplicate int
}

// Validate reports what is wrong with a rule.
func (r Rule) Validate() error {
	switch {
	case r.At != Ingress && r.At != Egress:
		return errors.New("rule: At must be Ingress or Egress")
	case r.At == Ingress && r.To != "":
		return errors.New("rule: To has no meaning at Ingress")
	case !(r.Probability >= 0 && r.Probability <= 1):
		return fmt.Errorf("rule: probability %v is not in 0 to 1", r.Probability)
	case r.Delay < 0 || r.Jitter < 0 || r.Limit < 0 || r.Spare < 0 || r.Duplicate < 0 || r.Duplicate > 1000:
		return errors.New("rule: negative value, or more than 1000 duplicates")
	}
	return nil
}

// rule is an installed Rule. The owner of the switch's lock owns it.
type rule struct {
	Rule
	rng  *rand.Rand
	hits uint64

	second time.Time // since when spared are counted
	spared int
}

func newRule(r Rule, seed uint64) *rule {
	h := fnv.New64a()
	h.Write([]byte(r.Name))
	return &rule{Rule: r, rng: rand.New(rand.NewPCG(seed, h.Sum64()))}
}

// treats says whether the rule matches, and if so whether it acts this time.
func (r *rule) treats(at Stage, from, to string, frame []byte, now time.Time) (match, act bool) {
	if r.At != at || (r.From != "" && r.From != from) || (r.To != "" && r.To != to) {
		return false, false
	}
	if r.Limit > 0 && r.hits >= uint64(r.Limit) {
		return false, false
	}
	if r.Match != nil && !r.Match(frame) {
		return false, false
	}
	if r.Spare > 0 {
		if now.Sub(r.second) >= time.Second {
			r.second, r.spared = now, 0
		}
		if r.spared < r.Spare {
			r.spared++
			return true, false
		}
	}
	if r.Probability > 0 && r.rng.Float64() >= r.Probability {
		return true, false
	}
	r.hits++
	return true, true
}

func (r *rule) delay() time.Duration {
	d := r.Delay
	if r.Jitter > 0 {
		d += time.Duration(r.rng.Int64N(int64(r.Jitter)))
	}
	return d
}

// held is a frame that a rule holds back.
type held struct {
	due  time.Time
	seq  uint64 // keeps the order of equal due times
	buf  *buf
	port *Port
	at   Stage
}

type heldQueue []held

func (q heldQueue) Len() int { return len(q) }
func (q heldQueue) Less(i, j int) bool {
	if !q[i].due.Equal(q[j].due) {
		return q[i].due.Before(q[j].due)
	}
	return q[i].seq < q[j].seq
}
func (q heldQueue) Swap(i, j int) { q[i], q[j] = q[j], q[i] }
func (q *heldQueue) Push(x any)   { *q = append(*q, x.(held)) }
func (q *heldQueue) Pop() any {
	old := *q
	h := old[len(old)-1]
	*q = old[:len(old)-1]
	return h
}

// maxHeld bounds the memory that delaying rules can cost.
const maxHeld = 1 << 16

func (s *Switch) holdLocked(b *buf, p *Port, at Stage, d time.Duration) {
	if len(s.held) >= maxHeld {
		p.stats.TxDropped++
		b.release()
		return
	}
	s.heldSeq++
	heap.Push(&s.held, held{due: time.Now().Add(d), seq: s.heldSeq, buf: b, port: p, at: at})
	if s.held[0].seq == s.heldSeq {
		select {
		case s.wake <- struct{}{}:
		default:
		}
	}
}

// releaseHeld lets frames go when their time has come, until the switch closes.
func (s *Switch) releaseHeld() {
	defer s.wg.Done()
	timer := time.NewTimer(time.Hour)
	defer timer.Stop()
	for {
		s.mu.Lock()
		for len(s.held) > 0 && !s.held[0].due.After(time.Now()) {
			h := heap.Pop(&s.held).(held)
			switch {
			case h.at == Egress:
				s.enqueueLocked(h.port, h.buf)
			case h.port.cut: // meanwhile
				s.stats.LinkDown++
				h.port.stats.RxDropped++
				h.buf.release()
			default:
				s.bridgeLocked(h.port, h.buf)
			}
		}
		next := time.Hour
		if len(s.held) > 0 {
			next = time.Until(s.held[0].due)
		}
		s.mu.Unlock()
		timer.Reset(next)
		select {
		case <-timer.C:
		case <-s.wake:
		case <-s.done:
			return
		}
	}
}
