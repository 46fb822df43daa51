package api

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"net/url"
	"strconv"
	"time"
	"unicode"
)

// Flow is a client's connection, or what is known of it before it exists.
type Flow struct {
	Client netip.AddrPort // port 0: any
	Port   uint16         // of the VIP
	Proto  string         // "tcp" or "udp"
}

// ParseFlow reads a client, "192.0.2.1", "192.0.2.1:40000", "2001:db8::1" or
// "[2001:db8::1]:40000", a port of 1 to 65535, and a protocol, of which "" is tcp.
func ParseFlow(client, port, proto string) (f Flow, err error) {
	switch f.Proto = proto; proto {
	case "":
		f.Proto = "tcp"
	case "tcp", "udp":
	default:
		return f, fmt.Errorf("protocol %q: want tcp or udp", clip(proto))
	}
	n, err := strconv.ParseUint(port, 10, 16)
	if err != nil || n == 0 {
		return f, fmt.Errorf("port %q: want a number of 1 to 65535", clip(port))
	}
	f.Port = uint16(n)
	if a, err := netip.ParseAddr(client); err == nil {
		f.Client = netip.AddrPortFrom(a, 0)
	} else if ap, err := netip.ParseAddrPort(client); err == nil && ap.Port() > 0 {
		f.Client = ap
	} else {
		return f, fmt.Errorf("client %q: want an address, or an address and a port, as 192.0.2.1:40000 or [2001:db8::1]:40000", clip(client))
	}
	a := f.Client.Addr().Unmap()
	if a.Zone() != "" || a.IsUnspecified() || a.IsMulticast() {
		return f, fmt.Errorf("client %q: no client has such an address", clip(client))
	}
	f.Client = netip.AddrPortFrom(a, f.Client.Port())
	return f, nil
}

// ClientText is the client as ParseFlow reads it.
func (f Flow) ClientText() string {
	if f.Client.Port() == 0 {
		return f.Client.Addr().String()
	}
	return f.Client.String()
}

// Values is the flow as the query of GET /v1/which.
func (f Flow) Values() url.Values {
	return url.Values{"client": {f.ClientText()}, "port": {strconv.Itoa(int(f.Port))}, "proto": {f.Proto}}
}

// Since says from where on events or lines are wanted: after an id, or from a
// time on. The zero value is from the beginning.
type Since struct {
	ID   uint64
	Time time.Time
}

// ParseSince reads the number of an event, a time as 2026-01-02T15:04:05Z (RFC
// 3339), or a time before now, as 10m.
func ParseSince(text string, now time.Time) (Since, error) {
	if text == "" {
		return Since{}, nil
	}
	if id, err := strconv.ParseUint(text, 10, 64); err == nil {
		return Since{ID: id}, nil
	}
	if d, err := time.ParseDuration(text); err == nil && d >= 0 {
		return Since{Time: now.Add(-d)}, nil
	}
	if t, err := time.Parse(time.RFC3339, text); err == nil {
		return Since{Time: t}, nil
	}
	return Since{}, fmt.Errorf("since %q: want the number of an event, a time as 2026-01-02T15:04:05Z, or how long ago, as 10m", clip(text))
}

// Order is the body of POST /v1/drain and /v1/resume; it may be left out.
type Order struct {
	// Reason is for the events, at most 200 characters.
	Reason string `json:"reason,omitempty"`
}

const mostReason = 200

// ErrOrder is matched by the error of ParseOrder.
var ErrOrder = errors.New("the body is no order")

// ParseOrder reads the body of an order. Nothing is an order without a reason.
func ParseOrder(r io.Reader) (o Order, err error) {
	if err := parseBody(r, &o); errors.Is(err, io.EOF) {
		return Order{}, nil
	} else if err != nil {
		return Order{}, err
	}
	return o, checkReason(o.Reason)
}

// PolicyOrder is the body of POST /v1/policy. What it does not name stays as it is.
type PolicyOrder struct {
	// Balance is even, load, or configured: what cluster.yaml says.
	Balance string `json:"balance,omitempty"`
	// Weights are those of nodes, by wire MAC, by the end of it or by host name: 1 to
	// 1000, 0 for what cluster.yaml says.
	Weights map[string]int `json:"weights,omitempty"`
	// Reason is for the events, at most 200 characters.
	Reason string `json:"reason,omitempty"`
}

// ParsePolicyOrder reads the body of an order that changes the policy.
func ParsePolicyOrder(r io.Reader) (o PolicyOrder, err error) {
	if err := parseBody(r, &o); err != nil {
		return o, err
	}
	switch o.Balance {
	case "", "even", "load", "configured":
	default:
		return o, fmt.Errorf("%w: balance %q: want even, load or configured", ErrOrder, clip(o.Balance))
	}
	for node, w := range o.Weights {
		if w < 0 || w > 1000 {
			return o, fmt.Errorf("%w: weight %d of %q: want 1 to 1000, or 0 for what is configured", ErrOrder, w, clip(node))
		}
	}
	if o.Balance == "" && len(o.Weights) == 0 {
		return o, fmt.Errorf("%w: it changes nothing: want a balance or weights", ErrOrder)
	}
	return o, checkReason(o.Reason)
}

// parseBody reads one value and nothing else.
func parseBody(r io.Reader, into any) error {
	dec := json.NewDecoder(r)
	dec.DisallowUnknownFields()
	if err := dec.Decode(into); err != nil {
		return fmt.Errorf("%w: %w", ErrOrder, err)
	}
	if _, err := dec.Token(); !errors.Is(err, io.EOF) {
		return fmt.Errorf("%w: something follows it", ErrOrder)
	}
	return nil
}

func checkReason(text string) error {
	n := 0
	for _, c := range text {
		if n++; !unicode.IsPrint(c) || n > mostReason {
			return fmt.Errorf("%w: reason: want at most %d printable characters", ErrOrder, mostReason)
		}
	}
	return nil
}

// clip bounds what is said again of a stranger's words.
func clip(s string) string {
	if len(s) > 60 {
		return s[:60] + "…"
	}
	return s
}
