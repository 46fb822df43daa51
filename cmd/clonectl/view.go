package main

import (
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"golang.org/x/term"
)

// snapshot is all that the live view shows at one moment.
type snapshot struct {
	title    string
	elapsed  time.Duration
	nodes    []nodeSnapshot
	asked    int // requests to the VIP that were answered
	failed   int
	last     string   // the last answer, for the eye
	scene    []string // what is being shown, instead of that
	table    []string
	clone    string // clone MAC
	learned  bool   // the switch has the clone MAC in its table: must not be
	flooded  uint64 // frames to the clone MAC sent to every port
	breaches int    // I1 violations
	hint     string
}

type nodeSnapshot struct {
	name, mac, mgmt string
	stages          []stage
	ready           bool
	gone            bool
	lived           time.Duration // until it was gone
	answers         int
}

type stage struct {
	name string
	at   time.Duration
}

// picture is what a view can show, in lines that are at most so wide.
type picture interface{ render(width int) []string }

// view shows pictures: on a terminal each is drawn over the last, at most
// a few times per second. Without a terminal it shows nothing; the lines that
// the demo prints are enough then.
type view struct {
	f     *os.File
	tty   bool
	lines int // drawn last time
}

func newView(f *os.File) *view {
	return &view{f: f, tty: term.IsTerminal(int(f.Fd()))}
}

// draw replaces the last picture.
func (v *view) draw(s picture) {
	if !v.tty {
		return
	}
	width, height, err := term.GetSize(int(v.f.Fd()))
	if err != nil || width < 20 {
		width, height = 80, 24
	}
	lines := s.render(width)
	if len(lines) > height-1 {
		lines = lines[:height-1] // what has scrolled away cannot be drawn over
	}
	var b strings.Builder
	v.up(&b)
	for _, l := range lines {
		b.WriteString("\r\x1b[K" + l + "\n")
	}
	b.WriteString("\x1b[J")
	v.lines = len(lines)
	io.WriteString(v.f, b.String())
}

// erase takes the picture away so that lines can be printed.
func (v *view) erase() {
	if !v.tty || v.lines == 0 {
		return
	}
	var b strings.Builder
	v.up(&b)
	b.WriteString("\r\x1b[J")
	io.WriteString(v.f, b.String())
	v.lines = 0
}

func (v *view) up(b *strings.Builder) {
	if v.lines > 0 {
		fmt.Fprintf(b, "\x1b[%dA", v.lines)
	}
}

const (
	bold  = "\x1b[1m"
	dim   = "\x1b[2m"
	green = "\x1b[32m"
	red   = "\x1b[31m"
	plain = "\x1b[0m"
)

// linesOf gives lines of at most that width, and what adds one, in a style or "".
func linesOf(width int) (lines *[]string, add func(style, format string, args ...any)) {
	lines = new([]string)
	return lines, func(style, format string, args ...any) {
		line := clip(fmt.Sprintf(format, args...), width-1)
		if style != "" {
			line = style + line + plain
		}
		*lines = append(*lines, line)
	}
}

func (s snapshot) render(width int) []string {
	out, add := linesOf(width)
	add(bold, "%s  %s", s.title, seconds(s.elapsed))
	add("", "")
	most := 1
	for _, n := range s.nodes {
		most = max(most, n.answers)
	}
	for _, n := range s.nodes {
		switch {
		case n.gone:
			add(red, "  %-7s %s  ended after %s", n.name, n.mac, seconds(n.lived))
			continue
		case n.ready:
			bar := strings.Repeat("█", n.answers*max(0, min(24, width-60))/most)
			add(green, "  %-7s %s  %-15s %5d answers %s", n.name, n.mac, n.mgmt, n.answers, bar)
		default:
			add("", "  %-7s %s  %s", n.name, n.mac, "booting")
		}
		add(dim, "          %s", timeline(n.stages))
	}
	add("", "")
	for i, line := range s.scene {
		if i == 0 {
			add(bold, "%s", line)
		} else {
			add("", "%s", line)
		}
	}
	if len(s.scene) == 0 {
		add("", "this view asks all the time: %d answered, %d failed   %s", s.asked, s.failed, s.last)
	}
	add("", "")
	add(bold, "the switch's MAC table")
	for _, row := range s.table {
		add("", "  %s", row)
	}
	if s.learned {
		add(red, "  %s  LEARNED: the clone MAC has leaked", s.clone)
	} else {
		add(green, "  %s  absent, as it must be: the clone MAC", s.clone)
	}
	style := ""
	if s.breaches > 0 {
		style = red
	}
	add(style, "frames flooded for the clone MAC: %d; frames sent from it: %d", s.flooded, s.breaches)
	add("", "")
	add(dim, "%s", s.hint)
	return *out
}

// timeline writes stages in the order they came, "kernel 1.2s · init 2.0s", but
// begins with the one that all wait for: a narrow terminal cuts off the end.
func timeline(stages []stage) string {
	var parts []string
	for _, s := range stages {
		part := strings.TrimPrefix(s.name, "service:") + " " + seconds(s.at)
		if s.name == "ready" {
			parts = append([]string{part + " after its kernel started:"}, strings.Join(parts, " · "))
			break
		}
		parts = append(parts, part)
	}
	if len(parts) == 2 && strings.HasPrefix(parts[0], "ready") {
		return strings.Join(parts, " ")
	}
	return strings.Join(parts, " · ")
}

func seconds(d time.Duration) string { return fmt.Sprintf("%.1fs", d.Seconds()) }

func clip(s string, width int) string {
	r := []rune(s)
	if len(r) <= width || width < 1 {
		return s
	}
	return string(r[:width-1]) + "…"
}
