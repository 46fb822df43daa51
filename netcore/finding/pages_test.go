package finding_test

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
)

const pages = "../../docs/findings"

// raised gives the codes of all findings that the programs have, with the level
// where it is a constant, found in their source.
func raised(t *testing.T) map[string]string {
	codes := map[string]string{}
	err := filepath.WalkDir("../..", func(path string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case d.IsDir() && (d.Name() == "build" || strings.HasPrefix(d.Name(), ".") && path != "../.."):
			return fs.SkipDir
		case d.IsDir() || !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go"):
			return nil
		}
		file, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.SkipObjectResolution)
		if err != nil {
			return err
		}
		ast.Inspect(file, func(n ast.Node) bool {
			lit, ok := n.(*ast.CompositeLit)
			if !ok {
				return true
			}
			if list, ok := lit.Type.(*ast.ArrayType); ok && isFinding(list.Elt) {
				for _, e := range lit.Elts {
					if one, ok := e.(*ast.CompositeLit); ok {
						one.Type = list.Elt // which may be left out
					}
				}
			}
			if !isFinding(lit.Type) {
				return true
			}
			code, level := "", ""
			for _, e := range lit.Elts {
				kv, ok := e.(*ast.KeyValueExpr)
				if !ok {
					continue
				}
				switch key, _ := kv.Key.(*ast.Ident); key.Name {
				case "Code":
					if b, ok := kv.Value.(*ast.BasicLit); ok {
						code, _ = strconv.Unquote(b.Value)
					}
				case "Level":
					if s, ok := kv.Value.(*ast.SelectorExpr); ok {
						level = strings.ToLower(s.Sel.Name)
					}
				}
			}
			if code != "" {
				codes[code] = level
			}
			return true
		})
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return codes
}

// isFinding tells whether a type is finding.Finding.
func isFinding(t ast.Expr) bool {
	sel, ok := t.(*ast.SelectorExpr)
	if !ok || sel.Sel.Name != "Finding" {
		return false
	}
	x, ok := sel.X.(*ast.Ident)
	return ok && x.Name == "finding"
}

// TestPages: each code has its page, as the index describes it, and a line there; and
// no page is of a code that is not there.
func TestPages(t *testing.T) {
	codes := raised(t)
	if len(codes) < 10 {
		t.Fatalf("codes %v; are those all?", slices.Sorted(maps.Keys(codes)))
	}
	index, err := os.ReadFile(filepath.Join(pages, "README.md"))
	if err != nil {
		t.Fatal(err)
	}
	for code, level := range codes {
		if !regexp.MustCompile(`^[a-z0-9]+(-[a-z0-9]+)*$`).MatchString(code) {
			t.Errorf("code %q is not in kebab case", code)
		}
		text, err := os.ReadFile(filepath.Join(pages, code+".md"))
		if err != nil {
			t.Errorf("finding %s has no page: %v", code, err)
			continue
		}
		last := -1
		for _, part := range []string{"# " + code + "\n", "\n**" + level, "\n## What it means\n", "\n## Where it comes from\n", "\n## What to do\n"} {
			i := strings.Index(string(text), part)
			if i <= last {
				t.Errorf("docs/findings/%s.md: %q is not there, or not in its place", code, part)
			}
			last = i
		}
		if row := regexp.MustCompile(`(?m)^\| \[` + code + `\]\(` + code + `\.md\) \| ([a-z, ]+) \|`).FindSubmatch(index); row == nil || level != "" && !strings.Contains(string(row[1]), level) {
			t.Errorf("docs/findings/README.md has no row of %s with level %s", code, level)
		}
	}
	files, err := os.ReadDir(pages)
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		if code, ok := strings.CutSuffix(f.Name(), ".md"); ok && code != "README" {
			if _, there := codes[code]; !there {
				t.Errorf("docs/findings/%s is of a finding that nobody raises", f.Name())
			}
		}
	}
}

// TestHypervisorsInOnePlace: what a hypervisor has to allow is said once, so that no two pages
// contradict each other.
func TestHypervisorsInOnePlace(t *testing.T) {
	network, err := os.ReadFile(filepath.Join(pages, "../network.md"))
	if err != nil {
		t.Fatal(err)
	}
	page, err := os.ReadFile(filepath.Join(pages, "no-flooding.md"))
	if err != nil {
		t.Fatal(err)
	}
	_, lines, found := strings.Cut(string(network), "\n## Hypervisors\n")
	if !found || !strings.Contains(string(page), "(../network.md#hypervisors)") {
		t.Error("no-flooding.md does not lead to the hypervisors of network.md")
	}
	makes := regexp.MustCompile(`(?m)^\| \*\*([^*]+)\*\*`).FindAllStringSubmatch(lines, -1)
	if len(makes) < 5 {
		t.Fatalf("network.md has %d hypervisors", len(makes))
	}
	for _, m := range makes {
		if strings.Contains(string(page), "\n| "+m[1]) {
			t.Errorf("no-flooding.md has a line of its own on %s", m[1])
		}
	}
}
