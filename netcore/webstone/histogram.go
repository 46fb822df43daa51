package webstone

import (
	"encoding/json"
	"fmt"
	"math"
	"math/bits"
	"time"
)

// Histogram counts durations in buckets of a relative width below 1 %: 128 for each power
// of two, as HdrHistogram has them. The zero value is empty.
type Histogram struct {
	counts []uint64
	n      uint64
	sum    float64 // in nanoseconds
	max    time.Duration
}

// halfBits is the logarithm of the number of buckets for a power of two.
const halfBits = 7

// bucket is the place of a duration. Below 256 ns each has its own.
func bucket(d time.Duration) int {
	v := uint64(max(d, 0))
	shift := max(bits.Len64(v)-halfBits-1, 0)
	return shift<<halfBits + int(v>>shift)
}

// most is the longest duration of a bucket.
func most(bucket int) time.Duration {
	shift := max(bucket>>halfBits-1, 0)
	v := uint64(bucket - shift<<halfBits)
	return time.Duration((v+1)<<shift - 1)
}

// buckets is how many there are: that of the longest duration is the last.
var buckets = bucket(math.MaxInt64) + 1

// Add counts a duration; one below 0 as 0.
func (h *Histogram) Add(d time.Duration) {
	d = max(d, 0)
	h.grow(bucket(d) + 1)
	h.counts[bucket(d)]++
	h.n++
	h.sum += float64(d)
	h.max = max(h.max, d)
}

func (h *Histogram) grow(n int) {
	if len(h.counts) < n {
		h.counts = append(h.counts, make([]uint64, n-len(h.counts))...)
	}
}

// Merge adds what another has counted.
func (h *Histogram) Merge(o *Histogram) {
	h.grow(len(o.counts))
	for i, c := range o.counts {
		h.counts[i] += c
	}
	h.n += o.n
	h.sum += o.sum
	h.max = max(h.max, o.max)
}

// Count is how many durations it has.
func (h *Histogram) Count() uint64 { return h.n }

// Mean is exact; 0 without any.
func (h *Histogram) Mean() time.Duration {
	if h.n == 0 {
		return 0
	}
	return time.Duration(h.sum / float64(h.n))
}

// Max is exact.
func (h *Histogram) Max() time.Duration { return h.max }

// Quantile is the least duration that a share q of all, 0 to 1, do not exceed, less than 1 %
// too long; 0 without any.
func (h *Histogram) Quantile(q float64) time.Duration {
	rank := max(uint64(math.Ceil(q*float64(h.n))), 1)
	var seen uint64
	for i, c := range h.counts {
		if seen += c; seen >= rank {
			return min(most(i), h.max)
		}
	}
	return h.max
}

// histogramJSON has what the percentiles are made of, and some of them to be read.
type histogramJSON struct {
	Mean    float64     `json:"mean_ms"`
	P50     float64     `json:"p50_ms"`
	P90     float64     `json:"p90_ms"`
	P99     float64     `json:"p99_ms"`
	P999    float64     `json:"p999_ms"`
	Max     float64     `json:"max_ms"`
	MaxNS   int64       `json:"max_ns"`
	SumNS   float64     `json:"sum_ns"`
	Buckets [][2]uint64 `json:"buckets"` // place and count
}

// MarshalJSON is for json.Marshaler.
func (h Histogram) MarshalJSON() ([]byte, error) {
	ms := func(d time.Duration) float64 { return float64(d.Microseconds()) / 1e3 }
	j := histogramJSON{ms(h.Mean()), ms(h.Quantile(.5)), ms(h.Quantile(.9)), ms(h.Quantile(.99)), ms(h.Quantile(.999)), ms(h.max), int64(h.max), h.sum, [][2]uint64{}}
	for i, c := range h.counts {
		if c > 0 {
			j.Buckets = append(j.Buckets, [2]uint64{uint64(i), c})
		}
	}
	return json.Marshal(j)
}

// UnmarshalJSON is for json.Unmarshaler. What can be read is taken from the buckets.
func (h *Histogram) UnmarshalJSON(data []byte) error {
	var j histogramJSON
	if err := json.Unmarshal(data, &j); err != nil {
		return err
	}
	*h = Histogram{sum: j.SumNS, max: time.Duration(max(j.MaxNS, 0))}
	for _, b := range j.Buckets {
		if b[0] >= uint64(buckets) {
			return fmt.Errorf("histogram: no bucket %d", b[0])
		}
		h.grow(int(b[0]) + 1)
		h.counts[b[0]] += b[1]
		h.n += b[1]
	}
	return nil
}
