package config

import (
	"fmt"
	"reflect"
	"time"
)

// Detect is the time after which a node that nothing is heard of counts as
// dead. It is written as one of three names or as a time; the times of the
// beacons follow from it.
type Detect time.Duration

// The times that have a name: what beacon every 100 ms, 50 ms and a third of a
// second makes of them.
const (
	DetectNormal  = Detect(300 * time.Millisecond)
	DetectFast    = Detect(150 * time.Millisecond)
	DetectRelaxed = Detect(time.Second)
)

var detectNames = map[string]Detect{"normal": DetectNormal, "fast": DetectFast, "relaxed": DetectRelaxed}

// Dead is how long nothing is heard of a node until it counts as dead.
func (d Detect) Dead() time.Duration { return time.Duration(d) }

// Beacon is the time between two beacons: a third of Dead, so that one may be lost.
func (d Detect) Beacon() time.Duration { return d.Dead() / 3 }

// Lease is how long after its last beacon a node may take new flows: two thirds
// of Dead, so that it stops before others take over.
func (d Detect) Lease() time.Duration { return d.Dead() * 2 / 3 }

// String gives the name of the time, or the time, as it is written in the file.
func (d Detect) String() string {
	for name, named := range detectNames {
		if d == named {
			return name
		}
	}
	return shortDuration(d.Dead())
}

// MarshalText is String.
func (d Detect) MarshalText() ([]byte, error) { return []byte(d.String()), nil }

func parseDetect(text string, tag reflect.StructTag) (Detect, error) {
	if d, ok := detectNames[text]; ok {
		return d, nil
	}
	d, err := parseDuration(text, tag)
	if err != nil {
		return 0, fmt.Errorf("%w; or normal, fast or relaxed", err)
	}
	return Detect(d), nil
}
