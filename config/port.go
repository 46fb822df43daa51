package config

import (
	"fmt"
	"strconv"
	"strings"
)

// PortRange is one transport port or several in a row, written "80/tcp" or
// "8000-8010/udp".
type PortRange struct {
	First, Last uint16 // 1 to 65535, both included
	Protocol    string // "tcp" or "udp"
}

// String gives the ports as they are written in the file.
func (r PortRange) String() string {
	if r.First == r.Last {
		return fmt.Sprintf("%d/%s", r.First, r.Protocol)
	}
	return fmt.Sprintf("%d-%d/%s", r.First, r.Last, r.Protocol)
}

// MarshalText is String.
func (r PortRange) MarshalText() ([]byte, error) { return []byte(r.String()), nil }

// Overlaps reports whether a port is in both ranges.
func (r PortRange) Overlaps(o PortRange) bool {
	return r.Protocol == o.Protocol && r.First <= o.Last && o.First <= r.Last
}

func parsePortRange(text string) (PortRange, error) {
	numbers, protocol, slash := strings.Cut(text, "/")
	from, to, several := strings.Cut(numbers, "-")
	if !several {
		to = from
	}
	first, err1 := strconv.ParseUint(from, 10, 16)
	last, err2 := strconv.ParseUint(to, 10, 16)
	switch ok := err1 == nil && err2 == nil && first > 0 && last > 0; {
	case ok && !slash:
		return PortRange{}, fmt.Errorf("%s has no protocol; write %s/tcp or %s/udp", quote(text), numbers, numbers)
	case !ok || protocol != "tcp" && protocol != "udp":
		return PortRange{}, fmt.Errorf("%s must be a port of 1 to 65535 with its protocol, or a range of them, such as 80/tcp, 53/udp or 8000-8010/tcp", quote(text))
	case first > last:
		return PortRange{}, fmt.Errorf("%s ends before it begins; write %d-%d/%s", quote(text), last, first, protocol)
	}
	return PortRange{First: uint16(first), Last: uint16(last), Protocol: protocol}, nil
}
