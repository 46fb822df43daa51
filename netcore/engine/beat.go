package engine

import (
	"math/rand/v2"
	"time"
)

// phase keeps the engines of one machine, in namespaces of their own, from doing all at once.
var phase = rand.Int64N(int64(time.Minute))

// toBeat is the time to the next beat of an interval: loops that look again and again do it
// together, as waking up is most of what an idle engine takes.
func toBeat(interval time.Duration) time.Duration {
	return interval - time.Duration(monotonic()+phase)%interval
}
