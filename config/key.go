package config

import (
	"crypto/hkdf"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
)

// Key is the cluster's shared secret. However it is printed, logged or
// marshalled, it shows as "(secret)".
type Key [32]byte

const masked = "(secret)"

// Derive gives n bytes, 1 to 8160, that depend on the key and on the label, and
// from which neither the key nor what another label gives can be found:
// HKDF-SHA256 (RFC 5869) without salt, with "clonecluster " + label as info. It
// panics when n is out of range.
func (k Key) Derive(label string, n int) []byte {
	out, err := hkdf.Key(sha256.New, k[:], nil, "clonecluster "+label, n)
	if err != nil || n < 1 {
		panic(fmt.Sprintf("config: deriving %d bytes: %v", n, err))
	}
	return out
}

// String hides the key.
func (Key) String() string { return masked }

// GoString hides the key from %#v.
func (Key) GoString() string { return masked }

// Format hides the key from every verb, %x and %v of a pointer among them.
func (Key) Format(s fmt.State, _ rune) { io.WriteString(s, masked) }

// LogValue hides the key from log/slog.
func (Key) LogValue() slog.Value { return slog.StringValue(masked) }

// MarshalText hides the key from encoding/json and its like.
func (Key) MarshalText() ([]byte, error) { return []byte(masked), nil }

// MarshalYAML hides the key from goccy/go-yaml.
func (Key) MarshalYAML() ([]byte, error) { return []byte(masked), nil }

const newKey = "make one with: head -c 32 /dev/urandom | base64"

func parseKey(text string) (Key, error) {
	raw, err := base64.StdEncoding.Strict().DecodeString(text)
	switch {
	case err != nil:
		return Key{}, errors.New("is not valid base64 (the standard alphabet, with padding); " + newKey)
	case len(raw) != len(Key{}):
		return Key{}, fmt.Errorf("holds %d bytes instead of 32; "+newKey, len(raw))
	case Key(raw) == Key{}:
		return Key{}, errors.New("is all zeros, which is no secret; " + newKey)
	}
	return Key(raw), nil
}

// DefaultCloneMAC is the clone MAC of a VIP when the file gives none: 02:cc,
// then the four bytes of an IPv4 address or the first four bytes of the SHA-256
// of the 16 bytes of an IPv6 address. A cluster with both uses the IPv4 one.
func DefaultCloneMAC(vip netip.Addr) net.HardwareAddr {
	mac := net.HardwareAddr{0x02, 0xcc, 0, 0, 0, 0}
	if vip = vip.Unmap(); vip.Is4() {
		b := vip.As4()
		copy(mac[2:], b[:])
	} else {
		b := vip.As16()
		sum := sha256.Sum256(b[:])
		copy(mac[2:], sum[:])
	}
	return mac
}
