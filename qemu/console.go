package qemu

import (
	"context"
	"fmt"
	"io"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"
)

const (
	// keptLines is how much of a console is kept for failure messages and for
	// those who come late.
	keptLines = 1000
	// maxLine bounds a line in bytes; a longer one is cut in pieces.
	maxLine = 4096
)

// Line is a line of a guest's console.
type Line struct {
	Time  time.Time     // when its end was seen
	Since time.Duration // since QEMU was started
	Text  string        // without line end, escape sequences and control characters
}

// console turns the bytes of a guest's console into lines. It is the writer that
// os/exec copies QEMU's standard output to.
type console struct {
	start time.Time
	raw   io.Writer // may be nil

	mu      sync.Mutex
	rawErr  error
	partial []byte
	kept    []Line
	subs    []*subscriber
	closed  bool
	done    chan struct{}
}

type subscriber struct{ f func(Line) }

func newConsole(start time.Time, raw io.Writer) *console {
	return &console{start: start, raw: raw, done: make(chan struct{})}
}

// Write never fails: a full disk must not stop the guest.
func (c *console) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.raw != nil && c.rawErr == nil {
		_, c.rawErr = c.raw.Write(p)
	}
	now := time.Now()
	for _, b := range p {
		if b != '\n' {
			c.partial = append(c.partial, b)
		}
		if b == '\n' || len(c.partial) >= maxLine {
			c.lineLocked(now)
		}
	}
	return len(p), nil
}

func (c *console) lineLocked(now time.Time) {
	l := Line{Time: now, Since: now.Sub(c.start), Text: clean(c.partial)}
	c.partial = c.partial[:0]
	if len(c.kept) >= 2*keptLines {
		c.kept = slices.Delete(c.kept, 0, len(c.kept)-keptLines)
	}
	c.kept = append(c.kept, l)
	for _, s := range c.subs {
		s.f(l)
	}
}

// close ends the stream; what has no line end yet becomes a line.
func (c *console) close() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return
	}
	if len(c.partial) > 0 {
		c.lineLocked(time.Now())
	}
	c.closed = true
	close(c.done)
}

// subscribe calls f for the kept lines and then for each new one.
func (c *console) subscribe(f func(Line)) (stop func()) {
	s := &subscriber{f}
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, l := range c.kept {
		f(l)
	}
	c.subs = append(c.subs, s)
	return func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.subs = slices.DeleteFunc(slices.Clone(c.subs), func(x *subscriber) bool { return x == s })
	}
}

func (c *console) tail(n int) []Line {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Clone(c.kept[max(0, len(c.kept)-min(n, keptLines)):])
}

// wait returns the first line, kept or to come, that matches.
func (c *console) wait(ctx context.Context, match func(string) bool) (Line, error) {
	got := make(chan Line, 1)
	stop := c.subscribe(func(l Line) {
		if len(got) == 0 && match(l.Text) {
			got <- l
		}
	})
	defer stop()
	select {
	case l := <-got:
		return l, nil
	case <-ctx.Done():
		return Line{}, context.Cause(ctx)
	case <-c.done:
		select {
		case l := <-got:
			return l, nil
		default:
			return Line{}, fmt.Errorf("the console ended: %w", io.EOF)
		}
	}
}

// escapes are ECMA-48 control sequences, which firmware likes to send.
var escapes = regexp.MustCompile(`\x1b(\[[0-?]*[ -/]*[@-~]|[@-Z\\-_a-z])`)

// clean makes a line safe to print on a terminal.
func clean(b []byte) string {
	s := escapes.ReplaceAllString(strings.ToValidUTF8(string(b), "\uFFFD"), "")
	return strings.Map(func(r rune) rune {
		if r < ' ' && r != '\t' || r >= 0x7f && r < 0xa0 {
			return -1
		}
		return r
	}, s)
}

// tailBuffer keeps the last bytes written to it.
type tailBuffer struct {
	mu sync.Mutex
	b  []byte
}

const tailBytes = 8 << 10

func (t *tailBuffer) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.b = append(t.b, p...)
	if len(t.b) > tailBytes {
		t.b = slices.Delete(t.b, 0, len(t.b)-tailBytes)
	}
	return len(p), nil
}

func (t *tailBuffer) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return strings.TrimSpace(string(t.b))
}
