// Package webstone measures a web server as WebStone did: so many clients ask at the same
// time for files of given sizes, and what counts is the throughput of the server and the
// time until an answer is whole. It follows WebStone 2 (Mindcraft, 1996) in its file mix,
// in its connection for each request and in its check by Little's law; what it adds are
// percentiles, repetitions, and requests at a given rate.
//
// A client of a closed loop asks anew when it has its answer, so a server that stands still
// is asked less, and the wait of all who would have come meanwhile is not in the figures:
// the omission is coordinated (Tene, "How NOT to measure latency", 2013). With a rate,
// requests come when they come, and their time counts from when they should have begun.
//
// Requests are written and answers parsed here, on bare TCP: with a client of net/http a
// request takes about 30 % more processor time of client and server together
// (BenchmarkRequest), which on one machine is taken from the servers. The histogram is a
// page of code, which is less than to adapt HdrHistogram's to JSON that can be merged.
package webstone

import (
	"errors"
	"fmt"
	"maps"
	"math"
	"net/netip"
	"slices"
	"strings"
	"time"
)

// Config says what is asked for, of whom, and how.
type Config struct {
	Target netip.AddrPort `json:"target"`
	Host   string         `json:"host,omitempty"` // for the header; empty: that of Target
	Prefix string         `json:"prefix"`         // of the path: "/bench/" asks for /bench/500
	// Workload is what files are asked for.
	Workload Workload `json:"workload"`
	// Clients is how many requests are under way at a time, at most if there is a Rate.
	Clients int `json:"clients"`
	// KeepAlive lets a client keep its connection (HTTP/1.1). Else each request has one of
	// its own, which the server closes (HTTP/1.0).
	KeepAlive bool `json:"keep_alive,omitempty"`
	// TLS asks over TLS. Who the server is is not looked at, and no session is resumed: each
	// connection is that of somebody who has not been here before.
	TLS bool `json:"tls,omitempty"`
	// Sources are the clients' own addresses, in turn. None: the kernel's choice.
	Sources []netip.Addr `json:"sources,omitempty"`
	// Timeout is for a whole request.
	Timeout time.Duration `json:"timeout_ns"`
	// WarmUp comes before the windows, which follow each other, and is not measured.
	WarmUp  time.Duration `json:"warm_up_ns"`
	Window  time.Duration `json:"window_ns"`
	Windows int           `json:"windows"`
	// Rate is of requests per second that begin whatever becomes of those before; 0 is a
	// closed loop. They come at random (a Poisson process), or evenly if Constant.
	Rate     float64 `json:"rate,omitempty"`
	Constant bool    `json:"constant,omitempty"`
	// Seed chooses files and arrivals.
	Seed uint64 `json:"seed"`
}

func (c *Config) validate() error {
	switch {
	case !c.Target.IsValid() || c.Target.Port() == 0:
		return fmt.Errorf("target %v: want an address and a port", c.Target)
	case !strings.HasPrefix(c.Prefix, "/") || strings.ContainsAny(c.Prefix+c.Host, " \r\n"):
		return fmt.Errorf("prefix %q of host %q: want a path from / on, without spaces", c.Prefix, c.Host)
	case c.Clients < 1 || c.Clients > 100_000:
		return fmt.Errorf("%d clients: want 1 to 100000", c.Clients)
	case c.Timeout <= 0 || c.Window <= 0 || c.WarmUp < 0 || c.Windows < 1:
		return errors.New("want a timeout, one window or more, and of some length")
	case c.Rate < 0 || math.IsNaN(c.Rate) || math.IsInf(c.Rate, 0):
		return fmt.Errorf("rate %v: want requests per second, or 0 for a closed loop", c.Rate)
	}
	for _, s := range c.Sources {
		if s.Is4() != c.Target.Addr().Unmap().Is4() {
			return fmt.Errorf("source %v and target %v: want both IPv4 or both IPv6", s, c.Target.Addr())
		}
	}
	return c.Workload.validate()
}

// Result is what was measured with one number of clients.
type Result struct {
	Workload  string    `json:"workload"`
	Clients   int       `json:"clients"`
	KeepAlive bool      `json:"keep_alive,omitempty"`
	Rate      float64   `json:"rate,omitempty"` // as it was asked for
	Windows   []*Window `json:"windows"`
	// Interrupted says that the last window is shorter than it should be.
	Interrupted bool `json:"interrupted,omitempty"`
}

// Window is what was measured in a span of time.
type Window struct {
	Seconds float64 `json:"seconds"`
	// Requests and Bytes are the answers that became whole in this time, and what their
	// bodies have.
	Requests uint64 `json:"requests"`
	Bytes    uint64 `json:"bytes"`
	// Latency is the time from the beginning of a request, of its connection if it has one
	// of its own, until the answer is whole; with a rate, from when it should have begun,
	// and of the requests that should have begun in this time.
	Latency Histogram `json:"latency"`
	// Connect is the time that connections took to be there, over TLS with the handshake.
	Connect Histogram `json:"connect"`
	// Errors are the requests that failed, by kind.
	Errors   map[Kind]uint64 `json:"errors,omitempty"`
	Examples map[Kind]string `json:"examples,omitempty"` // one of each kind
	// Busy is how long the clients had a request under way, in seconds, taken together:
	// those that failed are in it.
	Busy float64 `json:"busy"`
	// Late is how many requests began more than 10 ms after they should have, since all
	// clients were busy.
	Late uint64 `json:"late,omitempty"`
	// Reconnects is how many connections the server had closed between two requests.
	Reconnects uint64 `json:"reconnects,omitempty"`
	// CPU is how many processors this process took.
	CPU float64 `json:"cpu"`
}

// Failed is the number of requests that failed.
func (w *Window) Failed() (n uint64) {
	for _, v := range w.Errors {
		n += v
	}
	return n
}

// Rate is that of whole answers, per second.
func (w *Window) Rate() float64 { return per(float64(w.Requests), w.Seconds) }

// Throughput is that of bodies, in Mbit/s.
func (w *Window) Throughput() float64 { return per(float64(w.Bytes)*8/1e6, w.Seconds) }

// Load is Little's: the requests that were under way at a time, on average. In a closed
// loop it is the number of clients, less the pauses after errors, or the measuring is wrong.
func (w *Window) Load() float64 { return per(w.Busy, w.Seconds) }

func per(x, seconds float64) float64 {
	if seconds <= 0 {
		return 0
	}
	return x / seconds
}

// Total takes all windows together. Its CPU is the mean.
func (r *Result) Total() *Window {
	t := &Window{Errors: map[Kind]uint64{}, Examples: map[Kind]string{}}
	for _, w := range r.Windows {
		t.Seconds += w.Seconds
		t.Requests += w.Requests
		t.Bytes += w.Bytes
		t.Latency.Merge(&w.Latency)
		t.Connect.Merge(&w.Connect)
		for k, n := range w.Errors {
			t.Errors[k] += n
		}
		maps.Copy(t.Examples, w.Examples)
		t.Busy += w.Busy
		t.Late += w.Late
		t.Reconnects += w.Reconnects
		t.CPU += w.CPU * w.Seconds
	}
	t.CPU = per(t.CPU, t.Seconds)
	return t
}

// Median is that of a value of the windows; 0 without any.
func (r *Result) Median(of func(*Window) float64) float64 {
	var values []float64
	for _, w := range r.Windows {
		values = append(values, of(w))
	}
	if len(values) == 0 {
		return 0
	}
	slices.Sort(values)
	n := len(values)
	return (values[(n-1)/2] + values[n/2]) / 2
}
