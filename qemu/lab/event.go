package lab

import (
	"strings"
	"time"
)

// Kind says what an Event is. The zero value is invalid.
type Kind uint8

// The kinds of events.
const (
	Started Kind = iota + 1 // a machine was started
	Line                    // a line of a console
	Reached                 // a boot stage
	Reset                   // a machine was reset, by its guest or from outside
	Exited                  // a machine ended
)

func (k Kind) String() string {
	if k < Started || k > Exited {
		return "invalid"
	}
	return [...]string{"started", "line", "reached", "reset", "exited"}[k-1]
}

// Event is something that happened to a node.
type Event struct {
	Kind  Kind
	Time  time.Time
	Since time.Duration // since the machine's last start
	Node  string
	Text  string // Line: the line; Started and Reset: the command line
	Stage Stage  // Reached
	Err   error  // Exited: nil if the guest powered off
}

// Stage is a boot stage, as a node's init announces it on the console:
//
//	[  2.345] init: timeline stage=engine at=2.345s
type Stage struct {
	Name  string
	At    time.Duration     // by the node's clock, since its kernel started
	Attrs map[string]string // what else the line says (node, mgmt)
}

// ParseStage finds a boot stage in a line of a console.
func ParseStage(line string) (Stage, bool) {
	_, rest, ok := strings.Cut(line, "init: timeline ")
	if !ok {
		return Stage{}, false
	}
	s := Stage{Attrs: make(map[string]string)}
	seenAt := false
	for _, f := range strings.Fields(rest) {
		k, v, ok := strings.Cut(f, "=")
		switch {
		case !ok:
			continue
		case k == "stage":
			s.Name = v
		case k == "at":
			d, err := time.ParseDuration(v)
			if err != nil || d < 0 {
				return Stage{}, false
			}
			s.At, seenAt = d, true
		default:
			s.Attrs[k] = v
		}
	}
	if s.Name == "" || !seenAt {
		return Stage{}, false
	}
	return s, true
}
