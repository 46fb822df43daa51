package config

import (
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"unicode"
)

// Problem is one thing that is wrong with the configuration.
type Problem struct {
	// Where is "file:line:column", or the kernel parameter's name.
	Where string
	// Path is the dotted path of the value, "vip.ipv4"; empty for an error of
	// the file's form.
	Path string
	// Message says what is wrong and what would be right.
	Message string
	// Snippet is the offending line and a line with a caret below the column.
	// It has no secrets in it. Empty for a kernel parameter.
	Snippet string

	line, column int
	related      []string // paths that together with Path made the problem
}

// Error gives the problem in the form of a compiler's message.
func (p *Problem) Error() string {
	s := p.Where + ": "
	if p.Path != "" {
		s += p.Path + ": "
	}
	s += p.Message
	if p.Snippet != "" {
		s += "\n" + p.Snippet
	}
	return s
}

// Problems is every problem found, in the order of the file. It is the error
// that Load returns.
type Problems []*Problem

// Error gives the problems one after the other.
func (ps Problems) Error() string {
	texts := make([]string, len(ps))
	for i, p := range ps {
		texts[i] = p.Error()
	}
	return strings.Join(texts, "\n")
}

// Unwrap lets errors.As find a single *Problem.
func (ps Problems) Unwrap() []error {
	errs := make([]error, len(ps))
	for i, p := range ps {
		errs[i] = p
	}
	return errs
}

// maxProblems is how many problems one report gives: a broken file should not
// scroll the first cause off the screen.
const maxProblems = 20

func (ps Problems) sorted() Problems {
	slices.SortStableFunc(ps, func(a, b *Problem) int {
		if a.line != b.line {
			return a.line - b.line
		}
		return a.column - b.column
	})
	return ps[:min(len(ps), maxProblems)]
}

func (ps Problems) err() error {
	if len(ps) == 0 {
		return nil
	}
	return ps
}

// source is a file's name and lines, for messages.
type source struct {
	name  string
	lines []string
}

func newSource(name, text string) *source {
	return &source{name: name, lines: strings.Split(text, "\n")}
}

func (s *source) problem(line, column int, path, message string) *Problem {
	return &Problem{
		Where:   s.name + ":" + strconv.Itoa(line) + ":" + strconv.Itoa(column),
		Path:    path,
		Message: message,
		Snippet: s.snippet(line, column, path),
		line:    line,
		column:  column,
	}
}

// secretText is what may be a key in a line: what follows a "key:" or "keys:",
// and any run that could be base64 of a good part of one.
var secretText = regexp.MustCompile(`(keys['"]?\s*:\s*)[^\s#][^#]*|(key['"]?\s*:\s*)[^\s,}#][^,}#]*|[A-Za-z0-9+/_=-]{30,}`)

// snippetColumns is how much of a long line is shown.
const snippetColumns = 100

func (s *source) snippet(line, column int, path string) string {
	if line < 1 || line > len(s.lines) {
		return ""
	}
	text := strings.TrimRight(s.lines[line-1], "\r")
	if strings.HasPrefix(path, "cluster.accept-keys[") { // perhaps on a line of its own
		before := []rune(text)
		text = string(before[:min(max(column-1, 0), len(before))]) + masked
	}
	text = secretText.ReplaceAllString(text, "${1}${2}"+masked)
	runes := []rune(text)
	at := min(max(column-1, 0), len(runes))
	from := max(0, at-snippetColumns/2)
	runes = runes[from:min(len(runes), from+snippetColumns)]
	for i, r := range runes {
		if !unicode.IsPrint(r) {
			runes[i] = '·'
		}
	}
	margin := fmt.Sprintf("%6d | ", line)
	return margin + string(runes) + "\n" + strings.Repeat(" ", len(margin)-2) + "| " + strings.Repeat(" ", at-from) + "^"
}

// nearest gives the known name that an unknown one is likely meant to be, or "".
func nearest(name string, known []string) string {
	name = strings.ReplaceAll(strings.ToLower(name), "_", "-")
	if len(name) > 64 {
		return ""
	}
	best, bestDistance := "", 1+max(1, len(name)/3)
	for _, k := range known {
		d := distance(name, k)
		if len(name) >= 3 && (strings.HasPrefix(k, name) || strings.HasPrefix(name, k)) {
			d = min(d, 1)
		}
		if d < bestDistance {
			best, bestDistance = k, d
		}
	}
	return best
}

// distance is the number of insertions, deletions, replacements and swaps of
// neighbours that turn a into b (optimal string alignment).
func distance(a, b string) int {
	before, last, next := make([]int, len(b)+1), make([]int, len(b)+1), make([]int, len(b)+1)
	for j := range last {
		last[j] = j
	}
	for i := 1; i <= len(a); i++ {
		next[0] = i
		for j := 1; j <= len(b); j++ {
			cost := 1
			if a[i-1] == b[j-1] {
				cost = 0
			}
			next[j] = min(last[j]+1, next[j-1]+1, last[j-1]+cost)
			if i > 1 && j > 1 && a[i-1] == b[j-2] && a[i-2] == b[j-1] {
				next[j] = min(next[j], before[j-2]+1)
			}
		}
		before, last, next = last, next, before
	}
	return last[len(b)]
}

// didYouMean is the end of a message about an unknown name.
func didYouMean(name string, known []string) string {
	s := ""
	if k := nearest(name, known); k != "" {
		s = fmt.Sprintf("; did you mean %q?", k)
	}
	return s + "; known here: " + strings.Join(known, ", ")
}
