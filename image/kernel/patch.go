package kernel

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
)

// patch is a unified diff as git writes it, of text files, without renames. It
// is applied here and not by patch(1) so that a hunk that no longer fits is
// named, with the line that is missing, and because nothing else needs
// patch(1). Hunks may have moved, as they do between stable releases, but
// their context must be there exactly.
type patch struct {
	name  string
	data  []byte
	files []filePatch
}

type filePatch struct {
	path   string // below the top of the tree
	create bool
	hunks  []hunk
}

type hunk struct {
	header   string
	start    int // line number of the first old line, from 1
	old, new []string
}

// PatchError says which hunk of a patch does not fit.
type PatchError struct {
	Patch, File string
	Hunk, Of    int    // from 1
	Header      string // the hunk's @@ line
	Why         string
}

func (e *PatchError) Error() string {
	return fmt.Sprintf("%s does not apply to %s, hunk %d of %d, %s: %s", e.Patch, e.File, e.Hunk, e.Of, e.Header, e.Why)
}

var hunkHeader = regexp.MustCompile(`^@@ -(\d{1,9})(?:,(\d{1,9}))? \+(\d{1,9})(?:,(\d{1,9}))? @@`)

// parsePatch reads a patch. Everything before the first file, such as the
// commit's message, is skipped.
func parsePatch(name string, data []byte) (patch, error) {
	p := patch{name: name, data: data}
	lines := strings.Split(string(data), "\n")
	fail := func(i int, format string, args ...any) (patch, error) {
		return patch{}, fmt.Errorf("%s:%d: %s", name, i+1, fmt.Sprintf(format, args...))
	}
	for i := 0; i < len(lines); {
		line := lines[i]
		switch {
		case strings.HasPrefix(line, "rename ") || strings.HasPrefix(line, "GIT binary"):
			return fail(i, "renames and binary files are not supported")
		case strings.HasPrefix(line, "--- ") && i+1 < len(lines) && strings.HasPrefix(lines[i+1], "+++ "):
			path, ok := strings.CutPrefix(strings.SplitN(lines[i+1][4:], "\t", 2)[0], "b/")
			if !ok || !filepath.IsLocal(path) {
				return fail(i+1, "%q is no file of the tree", lines[i+1])
			}
			p.files = append(p.files, filePatch{path: path, create: strings.HasPrefix(line, "--- /dev/null")})
			i += 2
		case strings.HasPrefix(line, "@@ "):
			if len(p.files) == 0 {
				return fail(i, "a hunk without a file")
			}
			h, next, err := parseHunk(lines, i)
			if err != nil {
				return fail(i, "%v", err)
			}
			f := &p.files[len(p.files)-1]
			f.hunks = append(f.hunks, h)
			i = next
		default:
			i++
		}
	}
	if len(p.files) == 0 {
		return fail(0, "no file is changed")
	}
	for _, f := range p.files {
		if len(f.hunks) == 0 {
			return fail(0, "%s has no hunk", f.path)
		}
	}
	return p, nil
}

func parseHunk(lines []string, i int) (hunk, int, error) {
	m := hunkHeader.FindStringSubmatch(lines[i])
	if m == nil {
		return hunk{}, 0, fmt.Errorf("%q is no hunk header", lines[i])
	}
	count := func(s string) int {
		if s == "" {
			return 1
		}
		n, _ := strconv.Atoi(s) // at most nine digits
		return n
	}
	h := hunk{header: lines[i], start: count(m[1])}
	oldLeft, newLeft := count(m[2]), count(m[4])
	for i++; oldLeft > 0 || newLeft > 0; i++ {
		if i >= len(lines) {
			return hunk{}, 0, errors.New("the hunk ends early")
		}
		kind, text := byte(' '), "" // some mailers drop the space of an empty line
		if lines[i] != "" {
			kind, text = lines[i][0], lines[i][1:]
		}
		switch kind {
		case ' ':
			h.old, h.new = append(h.old, text), append(h.new, text)
			oldLeft, newLeft = oldLeft-1, newLeft-1
		case '-':
			h.old = append(h.old, text)
			oldLeft--
		case '+':
			h.new = append(h.new, text)
			newLeft--
		default:
			return hunk{}, 0, fmt.Errorf("line %d of the patch is no part of a hunk: %q", i+1, lines[i])
		}
	}
	if oldLeft < 0 || newLeft < 0 {
		return hunk{}, 0, errors.New("the hunk has other lines than its header says")
	}
	if i < len(lines) && strings.HasPrefix(lines[i], `\`) {
		return hunk{}, 0, errors.New("files without a final newline are not supported")
	}
	return h, i, nil
}

// apply changes the files below dir. The error joins a *PatchError for every
// hunk that does not fit.
func (p patch) apply(dir string) error {
	var errs []error
	for _, f := range p.files {
		if err := p.applyFile(dir, f); err != nil {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

func (p patch) applyFile(dir string, f filePatch) error {
	path := filepath.Join(dir, f.path)
	data, err := os.ReadFile(path)
	switch {
	case f.create && err == nil:
		return p.misfit(f, 0, "the file is there already")
	case f.create && errors.Is(err, os.ErrNotExist):
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return err
		}
	case errors.Is(err, os.ErrNotExist):
		return p.misfit(f, 0, "there is no such file")
	case err != nil:
		return fmt.Errorf("%s: %w", p.name, err)
	}
	lines, err := p.applyHunks(f, splitLines(data))
	if err != nil {
		return err
	}
	var out bytes.Buffer
	for _, l := range lines {
		out.WriteString(l + "\n")
	}
	return writeFile(path, out.Bytes())
}

// applyHunks returns the lines of a file with all hunks of f applied.
func (p patch) applyHunks(f filePatch, lines []string) ([]string, error) {
	var errs []error
	shift, from := 0, 0 // of earlier hunks; where the next may begin
	for i, h := range f.hunks {
		want := h.start - 1 + shift
		if f.create || len(h.old) == 0 {
			want = min(max(h.start+shift, from), len(lines))
		}
		at, found := find(lines, h.old, want, from)
		if !found {
			why := explain(lines, h, want)
			if _, there := find(lines, h.new, want, from); there {
				why = "it is there already"
			}
			errs = append(errs, p.misfit(f, i, why))
			continue
		}
		changed := append(lines[:at:at], h.new...)
		lines = append(changed, lines[at+len(h.old):]...)
		shift = at + len(h.new) - len(h.old) - (h.start - 1)
		from = at + len(h.new)
	}
	return lines, errors.Join(errs...)
}

func (p patch) misfit(f filePatch, i int, why string) error {
	return &PatchError{Patch: p.name, File: f.path, Hunk: i + 1, Of: len(f.hunks), Header: f.hunks[i].header, Why: why}
}

// find returns where in lines, not before from, the block is: the place nearest
// to want.
func find(lines, block []string, want, from int) (int, bool) {
	fits := func(at int) bool {
		if at < from || at+len(block) > len(lines) {
			return false
		}
		for i, l := range block {
			if lines[at+i] != l {
				return false
			}
		}
		return true
	}
	for d := 0; d <= len(lines)+max(want, -want); d++ {
		if fits(want - d) {
			return want - d, true
		}
		if fits(want + d) {
			return want + d, true
		}
	}
	return 0, false
}

// explain names the first line of the hunk that the file does not have at all,
// or else where the expected place differs.
func explain(lines []string, h hunk, want int) string {
	have := map[string]bool{}
	for _, l := range lines {
		have[l] = true
	}
	for _, l := range h.old {
		if !have[l] {
			return fmt.Sprintf("the file has no line %q", l)
		}
	}
	for i, l := range h.old {
		if at := want + i; at < 0 || at >= len(lines) || lines[at] != l {
			return fmt.Sprintf("its lines are not together any more; around line %d %q is missing", at+1, l)
		}
	}
	return "its place is taken by an earlier hunk"
}

func splitLines(data []byte) []string {
	if len(data) == 0 {
		return nil
	}
	return strings.Split(strings.TrimSuffix(string(data), "\n"), "\n")
}
