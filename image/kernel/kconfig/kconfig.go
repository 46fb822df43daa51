// Package kconfig reads fragments of a kernel configuration, lays them over
// one another and checks what became of them. Kconfig drops a symbol whose
// dependencies are not met without a word; a kernel that lacks a driver for
// that reason is noticed at the first boot, hours later and elsewhere.
//
// The format is that of .config: Documentation/kbuild/kconfig.rst of the
// kernel.
package kconfig

import (
	"bytes"
	"fmt"
	"slices"
	"strings"
)

// Symbol is one configuration symbol with the value asked for.
type Symbol struct {
	Name  string // with its prefix, "CONFIG_SMP"
	Value string // as .config writes it: y, m, 42, 0x10, "text"; empty for "is not set"
	From  string // file:line that asked for it
}

// Fragment is a list of symbols, none of them twice, in the order of their
// first appearance.
type Fragment []Symbol

// Parse reads a fragment. name is for error messages.
func Parse(name string, data []byte) (Fragment, error) {
	var f Fragment
	seen := map[string]string{}
	for i, line := range strings.Split(string(data), "\n") {
		from := fmt.Sprintf("%s:%d", name, i+1)
		sym, ok, err := parseLine(strings.TrimRight(line, " \t\r"))
		if err != nil {
			return nil, fmt.Errorf("%s: %w", from, err)
		}
		if !ok {
			continue
		}
		if first, twice := seen[sym.Name]; twice {
			return nil, fmt.Errorf("%s: %s again, first at %s", from, sym.Name, first)
		}
		seen[sym.Name] = from
		sym.From = from
		f = append(f, sym)
	}
	return f, nil
}

const notSet = " is not set"

func parseLine(line string) (s Symbol, ok bool, err error) {
	if comment, is := strings.CutPrefix(line, "#"); is {
		name, off := strings.CutSuffix(strings.TrimSpace(comment), notSet)
		if !off || !strings.HasPrefix(name, "CONFIG_") {
			return Symbol{}, false, nil
		}
		if !validName(name) {
			return Symbol{}, false, fmt.Errorf("%q is no symbol", name)
		}
		return Symbol{Name: name}, true, nil
	}
	if line == "" {
		return Symbol{}, false, nil
	}
	name, value, found := strings.Cut(line, "=")
	switch {
	case !found:
		return Symbol{}, false, fmt.Errorf("%q is neither CONFIG_NAME=value nor a comment", line)
	case !validName(name):
		return Symbol{}, false, fmt.Errorf("%q is no symbol", name)
	case value == "n":
		return Symbol{}, false, fmt.Errorf("write \"# %s is not set\" for %s=n", name, name)
	case value == "":
		return Symbol{}, false, fmt.Errorf("%s has no value", name)
	case value[0] == '"' && (len(value) < 2 || value[len(value)-1] != '"'):
		return Symbol{}, false, fmt.Errorf("%s: text without its closing quote", name)
	}
	return Symbol{Name: name, Value: value}, true, nil
}

func validName(s string) bool {
	rest, ok := strings.CutPrefix(s, "CONFIG_")
	return ok && rest != "" && strings.IndexFunc(rest, func(r rune) bool {
		return !(r >= 'A' && r <= 'Z' || r >= 'a' && r <= 'z' || r >= '0' && r <= '9' || r == '_')
	}) < 0
}

// Merge lays fragments over one another: of a symbol that several name, the
// last value counts.
func Merge(fragments ...Fragment) Fragment {
	var merged Fragment
	at := map[string]int{}
	for _, f := range fragments {
		for _, s := range f {
			if i, known := at[s.Name]; known {
				merged[i] = s
				continue
			}
			at[s.Name] = len(merged)
			merged = append(merged, s)
		}
	}
	return merged
}

// Bytes writes the fragment as Parse reads it, sorted by name, so that equal
// contents give equal bytes.
func (f Fragment) Bytes() []byte {
	sorted := slices.Clone(f)
	slices.SortFunc(sorted, func(a, b Symbol) int { return strings.Compare(a.Name, b.Name) })
	var b bytes.Buffer
	for _, s := range sorted {
		b.WriteString(s.line() + "\n")
	}
	return b.Bytes()
}

func (s Symbol) line() string {
	if s.Value == "" {
		return "# " + s.Name + notSet
	}
	return s.Name + "=" + s.Value
}

// DroppedError lists the requests that a configuration does not fulfil.
type DroppedError struct {
	Dropped []Dropped
}

// Dropped is one of them.
type Dropped struct {
	Want Symbol
	Got  string // what the configuration says, "absent" if nothing
}

func (e *DroppedError) Error() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%d symbols did not stick (a dependency is missing, or something selects them):", len(e.Dropped))
	for _, d := range e.Dropped {
		fmt.Fprintf(&b, "\n\t%s: want %s, got %s", d.Want.From, d.Want.line(), d.Got)
	}
	return b.String()
}

// Check tells whether the finished configuration config (the contents of
// .config) has every symbol as asked for. It returns a *DroppedError if not.
// A symbol that is asked to be off may be absent.
func (f Fragment) Check(config []byte) error {
	final, err := Parse(".config", config)
	if err != nil {
		return err
	}
	got := map[string]string{}
	for _, s := range final {
		got[s.Name] = s.Value
	}
	var dropped []Dropped
	for _, want := range f {
		value, present := got[want.Name]
		if value == want.Value && (present || want.Value == "") {
			continue
		}
		d := Dropped{Want: want, Got: "absent"}
		if present {
			d.Got = Symbol{Name: want.Name, Value: value}.line()
		}
		dropped = append(dropped, d)
	}
	if dropped != nil {
		return &DroppedError{dropped}
	}
	return nil
}
