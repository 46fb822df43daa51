package api

import (
	"crypto/rand"
	"encoding/hex"
	"sync"
	"time"
)

// Event is something that happened to the cluster, as one node saw it.
type Event struct {
	ID    uint64    `json:"id"` // rises by one with each event of a run of the node's engine
	Time  time.Time `json:"time"`
	Node  string    `json:"node"`            // who saw it, by wire MAC
	Kind  string    `json:"kind"`            // see EventKinds
	About string    `json:"about,omitempty"` // whom it happened to, by wire MAC
	Text  string    `json:"text"`            // a sentence
	Why   string    `json:"why,omitempty"`   // the evidence, or who wanted it
}

// EventKinds are the kinds of events.
var EventKinds = []string{
	"started",    // the engine begins
	"stopping",   // it was asked to end
	"state",      // the node is listening, serving, draining, …
	"joined",     // a node and this one hear each other
	"lost",       // a node counts as dead
	"left",       // a node has said that it leaves
	"restarts",   // a node's engine has said that another takes its place
	"map",        // another map is in use
	"drain",      // somebody drained the node
	"resume",     // somebody had it take part again
	"policy",     // somebody changed the balance or weights
	"reboot",     // somebody had the machine restart
	"unwell",     // a service of the node fails its check
	"well",       // all services pass again
	"fail-open",  // the services of all nodes fail, and the cluster serves on
	"all-failed", // the services of all nodes fail, and the cluster stops
	"recovered",  // some node's services work again
	"fenced",     // the node takes no new connections, as somebody may not know of it
	"unfenced",   // it does again
	"silent",     // the node stood still for so long that it may count as dead
	"one-way",    // a node is heard that does not hear this one
	"yielded",    // the node is silent for another one with its wire MAC
	"carrier",    // the cable was put in or out
	"refused",    // frames had no effect: wrong key, twins, loops, other rules
	"finding",    // the node has noticed something: the text begins with its code, why is the evidence
	"cleared",    // a finding is no longer there
}

// Events is the answer to GET /v1/events.
type Events struct {
	Node string `json:"node"`
	// Run stands for one start of the node's engine: with another one the ids
	// begin anew.
	Run    string  `json:"run"`
	Events []Event `json:"events"` // the oldest first
	// Lost is how many of those that were asked for the node no longer has.
	Lost uint64 `json:"lost"`
}

// A Record keeps the last events of a node, or the last lines of a log. It is for
// concurrent use, and adding to it never waits.
type Record[T any] struct {
	run string

	mu    sync.Mutex
	ring  []T
	first uint64 // id of the oldest
	next  uint64
	bytes int // as size counts
	max   int
	size  func(T) int
	stamp func(*T, uint64)
	added chan struct{} // closed and replaced
}

// The bounds of what a node keeps.
const (
	mostEvents = 512
	mostLines  = 1024
	mostBytes  = 128 << 10
)

// MaxLine is the most bytes of a log line that are kept.
const MaxLine = 2048

// NewEvents gives an empty record of events.
func NewEvents() *Record[Event] {
	return newRecord(mostEvents, func(e Event) int { return 64 + len(e.Text) + len(e.Why) }, func(e *Event, id uint64) { e.ID = id })
}

// NewLog gives an empty record of a log.
func NewLog() *Record[LogLine] {
	return newRecord(mostLines, func(l LogLine) int { return 64 + len(l.Text) }, func(l *LogLine, id uint64) { l.ID = id })
}

func newRecord[T any](most int, size func(T) int, stamp func(*T, uint64)) *Record[T] {
	run := make([]byte, 4)
	_, _ = rand.Read(run) // it never fails
	return &Record[T]{run: hex.EncodeToString(run), first: 1, next: 1, max: most, size: size, stamp: stamp, added: make(chan struct{})}
}

// Run stands for this record among those of other starts.
func (r *Record[T]) Run() string { return r.run }

// Add gives what is added the next id.
func (r *Record[T]) Add(t T) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.stamp(&t, r.next)
	r.next++
	r.ring = append(r.ring, t)
	r.bytes += r.size(t)
	drop := 0
	for len(r.ring)-drop > r.max || r.bytes > mostBytes && len(r.ring)-drop > 1 {
		r.bytes -= r.size(r.ring[drop])
		drop++
	}
	if drop > 0 {
		r.first += uint64(drop)
		clear(r.ring[copy(r.ring, r.ring[drop:]):])
		r.ring = r.ring[:len(r.ring)-drop]
	}
	close(r.added)
	r.added = make(chan struct{})
}

// After gives what has come after id, and how much of that is lost. The channel is
// closed when more comes.
func (r *Record[T]) After(id uint64) (some []T, lost uint64, more <-chan struct{}) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if id >= r.next { // of another run
		id = 0
	}
	if id+1 < r.first {
		lost = r.first - 1 - id
	}
	from := max(id+1, r.first) - r.first
	return append([]T(nil), r.ring[from:]...), lost, r.added
}
