package webd

import (
	"fmt"
	"io"
	"strconv"
	"sync"
)

// period is prime, so that bytes which arrive at the wrong multiple of a page,
// a segment or a buffer are never the right ones by accident.
const period = 65521

// chunk is how much is written between two extensions of the write deadline.
const chunk = 64 << 10

// pattern holds the period often enough for any chunk to be one slice of it:
// the generated files are written from here without being copied. It is made
// on first use, because init and the engine carry this package too.
var pattern = sync.OnceValue(newPattern)

// newPattern makes 63-character lines of printable text from a fixed xorshift
// sequence (Marsaglia, "Xorshift RNGs", 2003): the same on every node, so that
// a client may fetch the rest of a file from another node than its beginning.
func newPattern() []byte {
	const alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+-"
	b := make([]byte, period+chunk)
	x := uint32(0x63636363)
	for i := range period {
		x ^= x << 13
		x ^= x >> 17
		x ^= x << 5
		if b[i] = alphabet[x>>26]; i%64 == 63 {
			b[i] = '\n'
		}
	}
	copy(b[period:], b[:chunk])
	return b
}

// parseSize reads the size in /bench/SIZE: a decimal number of bytes without
// sign or leading zeros, optionally followed by k, M or G (10³, 10⁶, 10⁹).
// A size above limit is an error.
func parseSize(s string, limit int64) (int64, error) {
	digits, unit := s, int64(1)
	if s != "" {
		switch s[len(s)-1] {
		case 'k':
			unit = 1e3
		case 'M':
			unit = 1e6
		case 'G':
			unit = 1e9
		}
		if unit > 1 {
			digits = s[:len(s)-1]
		}
	}
	if digits == "" || len(digits) > 18 || len(digits) > 1 && digits[0] == '0' {
		return 0, fmt.Errorf("size %q: want a number of bytes, optionally with k, M or G", clip(s))
	}
	for _, c := range []byte(digits) {
		if c < '0' || c > '9' {
			return 0, fmt.Errorf("size %q: want a number of bytes, optionally with k, M or G", clip(s))
		}
	}
	n, err := strconv.ParseInt(digits, 10, 64)
	if err != nil {
		return 0, fmt.Errorf("size %q: %w", clip(s), err)
	}
	if n > limit/unit || n*unit > limit {
		return 0, fmt.Errorf("size %q: the largest is %d bytes", clip(s), limit)
	}
	return n * unit, nil
}

func clip(s string) string {
	if len(s) > 32 {
		return s[:32] + "…"
	}
	return s
}

// generated is a file of size bytes that exists only as a rule: byte i is byte
// i mod period of the pattern. It is an io.ReadSeeker for http.ServeContent.
type generated struct{ size, off int64 }

// next returns up to chunk bytes at the current offset, at most n, without
// copying, and moves on. It returns nil at the end.
func (g *generated) next(n int64) []byte {
	n = min(n, chunk, g.size-g.off)
	if n <= 0 {
		return nil
	}
	at := g.off % period
	g.off += n
	return pattern()[at : at+n]
}

func (g *generated) Read(p []byte) (int, error) {
	b := g.next(int64(len(p)))
	if b == nil && len(p) > 0 {
		return 0, io.EOF
	}
	return copy(p, b), nil
}

func (g *generated) Seek(offset int64, whence int) (int64, error) {
	switch whence {
	case io.SeekCurrent:
		offset += g.off
	case io.SeekEnd:
		offset += g.size
	}
	if offset < 0 {
		return 0, fmt.Errorf("seeking to %d: before the start", offset)
	}
	g.off = offset
	return offset, nil
}
