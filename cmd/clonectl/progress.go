package main

import (
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"time"

	"golang.org/x/term"
)

// progress shows what a long command is doing: on a terminal one line that
// rewrites itself, elsewhere a plain line every few seconds, so that a log
// stays readable. Its methods may be called from several goroutines.
type progress struct {
	w    io.Writer
	tty  bool
	mu   sync.Mutex
	open bool // a rewritable line is on the terminal
	last time.Time
	now  func() time.Time
}

// plainInterval is how often a status appears where lines cannot be rewritten.
const plainInterval = 10 * time.Second

func newProgress(f *os.File) *progress {
	return &progress{w: f, tty: term.IsTerminal(int(f.Fd())), now: time.Now}
}

// Status replaces the line that says what is going on now.
func (p *progress) Status(format string, args ...any) {
	p.mu.Lock()
	defer p.mu.Unlock()
	line := fmt.Sprintf(format, args...)
	if p.tty {
		fmt.Fprintf(p.w, "\r\x1b[K%s", fit(line, p.w))
		p.open = true
		return
	}
	if now := p.now(); now.Sub(p.last) >= plainInterval {
		p.last = now
		fmt.Fprintln(p.w, line)
	}
}

// Done prints a line that stays.
func (p *progress) Done(format string, args ...any) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.clear()
	fmt.Fprintf(p.w, format+"\n", args...)
}

// Clear takes the rewritable line away, before an error is printed.
func (p *progress) Clear() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.clear()
}

func (p *progress) clear() {
	if p.open {
		fmt.Fprint(p.w, "\r\x1b[K")
		p.open = false
	}
}

// fit shortens a line to the terminal's width: a wrapped line cannot be
// rewritten.
func fit(line string, w io.Writer) string {
	f, ok := w.(*os.File)
	if !ok {
		return line
	}
	width, _, err := term.GetSize(int(f.Fd()))
	if err != nil || width < 10 {
		return line
	}
	return clip(strings.ReplaceAll(line, "\n", " "), width-1)
}
