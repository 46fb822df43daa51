package uinit

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"log/slog"
	"os"
	"slices"
	"strings"
	"sync"
	"time"
	"unicode/utf8"

	"golang.org/x/sys/unix"
)

// The bounds of what is kept and shown of one source of lines (init or a
// child): a child that floods its output costs this much memory and no more.
const (
	maxLine    = 1024 // bytes of one line; longer ones are cut into several
	ringLines  = 256
	ringBytes  = 64 << 10
	queueLines = 512 // waiting for a slow console
)

// sinceBoot is the time since the kernel started, the clock of the kernel's own
// messages. It goes on while a machine sleeps and is never set.
func sinceBoot() time.Duration {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		return 0
	}
	return time.Duration(ts.Nano())
}

// seconds is a time as the console and the status show it.
func seconds(d time.Duration) string { return fmt.Sprintf("%.3f", d.Seconds()) }

// entry is one line of the journal.
type entry struct {
	ID   uint64 // of all sources together, from 1
	At   time.Duration
	Text string
}

// journal takes the lines of init and of its children, keeps the last of each,
// and shows them on the console. Writing to it never waits for the console: a
// serial line moves a few thousand characters a second or stands still, and
// neither may hold up the reaping of children.
type journal struct {
	now   func() time.Duration
	queue chan string

	mu      sync.Mutex
	rings   map[string]*ring
	next    uint64
	dropped int // lines not shown since the last that was
	total   int // lines never shown
}

func newJournal(now func() time.Duration) *journal {
	return &journal{now: now, queue: make(chan string, queueLines), rings: map[string]*ring{}}
}

// line adds one line of the named source. What is not printable is replaced, so
// that no child can move the cursor or forge another's lines.
func (j *journal) line(name, text string) {
	text = printable(text)
	at := j.now()
	j.mu.Lock()
	defer j.mu.Unlock()
	r := j.rings[name]
	if r == nil {
		r = &ring{}
		j.rings[name] = r
	}
	j.next++
	r.add(entry{j.next, at, text})
	shown := consoleLine(at, name, text)
	if j.dropped > 0 {
		shown = consoleLine(at, "init", fmt.Sprintf("%d lines are not shown: the console is slower than the log", j.dropped)) + shown
	}
	select {
	case j.queue <- shown:
		j.dropped = 0
	default:
		j.dropped++
		j.total++
	}
}

func consoleLine(at time.Duration, name, text string) string {
	return fmt.Sprintf("[%8s] %s: %s\n", seconds(at), name, text)
}

// lines are the last lines of a source, oldest first.
func (j *journal) lines(name string) []entry {
	j.mu.Lock()
	defer j.mu.Unlock()
	if r := j.rings[name]; r != nil {
		return r.all()
	}
	return nil
}

// line is one of several sources' lines.
type line struct {
	ID     uint64  `json:"id"`
	At     float64 `json:"at_seconds"`
	Source string  `json:"source"`
	Text   string  `json:"text"`
}

// after gives the lines of all sources after one, in their order, and how many of
// them are no longer there. An id that is not given yet is of a former boot.
func (j *journal) after(id uint64) (lines []line, lost uint64) {
	j.mu.Lock()
	defer j.mu.Unlock()
	if id > j.next {
		id = 0
	}
	lines = []line{}
	for name, r := range j.rings {
		for _, e := range r.lines {
			if e.ID > id {
				lines = append(lines, line{e.ID, e.At.Seconds(), name, e.Text})
			}
		}
	}
	slices.SortFunc(lines, func(a, b line) int { return cmp.Compare(a.ID, b.ID) })
	return lines, j.next - id - uint64(len(lines))
}

func (j *journal) lost() int {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.total
}

// show writes the queue to the console until ctx ends, and then what is left.
func (j *journal) show(ctx context.Context, console io.Writer) {
	for {
		select {
		case s := <-j.queue:
			io.WriteString(console, s)
		case <-ctx.Done():
			for {
				select {
				case s := <-j.queue:
					io.WriteString(console, s)
				default:
					return
				}
			}
		}
	}
}

// ring keeps the last lines, bounded in number and in bytes.
type ring struct {
	lines []entry
	bytes int
}

func (r *ring) add(e entry) {
	if len(r.lines) == cap(r.lines) && cap(r.lines) < ringLines {
		grown := make([]entry, len(r.lines), min(ringLines, max(16, 2*cap(r.lines))))
		copy(grown, r.lines)
		r.lines = grown
	}
	drop := 0
	for n := len(r.lines); drop < n && (n-drop >= ringLines || r.bytes+len(e.Text) > ringBytes); drop++ {
		r.bytes -= len(r.lines[drop].Text)
	}
	if drop > 0 {
		r.lines = append(r.lines[:0], r.lines[drop:]...)
	}
	r.lines = append(r.lines, e)
	r.bytes += len(e.Text)
}

func (r *ring) all() []entry { return append([]entry(nil), r.lines...) }

func printable(s string) string {
	if len(s) > maxLine {
		s = s[:maxLine]
	}
	clean := true
	for i := 0; i < len(s) && clean; i++ {
		clean = s[i] >= ' ' && s[i] < 0x7f
	}
	if clean {
		return s
	}
	return strings.Map(func(r rune) rune {
		switch {
		case r == '\t':
			return ' '
		case r == utf8.RuneError, r < ' ', r >= 0x7f && r < 0xa0, r >= 0x2028 && r <= 0x202f, r >= 0x2066 && r <= 0x2069:
			return '·'
		}
		return r
	}, s)
}

// lineSplitter cuts a stream into lines, long ones into several.
type lineSplitter struct {
	buf  [maxLine]byte
	n    int
	emit func(string)
}

func (s *lineSplitter) Write(p []byte) (int, error) {
	for _, c := range p {
		if c == '\n' || s.n == len(s.buf) {
			s.flush(c == '\n')
			if c == '\n' {
				continue
			}
		}
		s.buf[s.n] = c
		s.n++
	}
	return len(p), nil
}

// flush emits what there is; a finished line even if it is empty.
func (s *lineSplitter) flush(finished bool) {
	if s.n == 0 && !finished {
		return
	}
	line := string(s.buf[:s.n])
	s.n = 0
	s.emit(strings.TrimSuffix(line, "\r"))
}

// capture reads a child's output until its end or until the read is ended by a
// deadline. It closes r.
func capture(r *os.File, emit func(string)) {
	defer r.Close()
	s := &lineSplitter{emit: emit}
	buf := make([]byte, 4096)
	for {
		n, err := r.Read(buf)
		s.Write(buf[:n])
		if err != nil {
			s.flush(false)
			return
		}
	}
}

// handler is the slog.Handler behind init's own lines: the message, then
// key=value, and the level where it is not Info.
type handler struct {
	j     *journal
	level *slog.LevelVar
	attrs string
	group string
}

func (j *journal) logger(level *slog.LevelVar) *slog.Logger {
	return slog.New(&handler{j: j, level: level})
}

func (h *handler) Enabled(_ context.Context, l slog.Level) bool { return l >= h.level.Level() }

func (h *handler) Handle(_ context.Context, r slog.Record) error {
	var b strings.Builder
	if r.Level != slog.LevelInfo {
		b.WriteString(strings.ToLower(r.Level.String()) + ": ")
	}
	b.WriteString(r.Message)
	b.WriteString(h.attrs)
	r.Attrs(func(a slog.Attr) bool {
		b.WriteString(h.attr(a))
		return true
	})
	for line := range strings.SplitSeq(b.String(), "\n") {
		h.j.line("init", line)
	}
	return nil
}

func (h *handler) attr(a slog.Attr) string {
	v := a.Value.Resolve().String()
	if strings.ContainsAny(v, " \"=") && !strings.Contains(v, "\n") {
		v = fmt.Sprintf("%q", v)
	}
	return " " + h.group + a.Key + "=" + v
}

func (h *handler) WithAttrs(attrs []slog.Attr) slog.Handler {
	c := *h
	for _, a := range attrs {
		c.attrs += h.attr(a)
	}
	return &c
}

func (h *handler) WithGroup(name string) slog.Handler {
	c := *h
	c.group += name + "."
	return &c
}
