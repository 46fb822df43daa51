package boards

import (
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"strings"
	"testing"
)

// docsFile finds a file of the documentation's walk-through: its name on a line of
// its own, then its text between fences.
var docsFile = regexp.MustCompile("(?m)^`boards/([a-z0-9./-]+)`\n\n```[a-z]*\n((?s:.*?))^```$")

// What docs/boards.md says to write is a board.
func TestWalkThrough(t *testing.T) {
	page, err := os.ReadFile("../docs/boards.md")
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	if err := os.CopyFS(dir, tree); err != nil {
		t.Fatal(err)
	}
	files := docsFile.FindAllSubmatch(page, -1)
	if len(files) != 2 {
		t.Fatalf("docs/boards.md shows %d files; want board.yaml and kernel.config", len(files))
	}
	folder := ""
	for _, f := range files {
		file := filepath.Join(dir, string(f[1]))
		if d := filepath.Dir(string(f[1])); folder != "" && d != folder {
			t.Errorf("the files are in %s and %s; want one folder", folder, d)
		} else {
			folder = d
		}
		if err := os.RemoveAll(file); err != nil { // somebody has walked through it
			t.Fatal(err)
		}
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, f[2], 0o644); err != nil {
			t.Fatal(err)
		}
	}
	b, err := get(os.DirFS(dir), folder)
	if err != nil {
		t.Fatal(err)
	}
	config, err := b.KernelConfig()
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"CONFIG_IGC=y\n", "CONFIG_TUN=y\n"} { // its own, and a shared one
		if !strings.Contains(string(config.Bytes()), want) {
			t.Errorf("its kernel lacks %q", want)
		}
	}
	if b.Serial() != "ttyS1" {
		t.Errorf("serial console %q; want ttyS1", b.Serial())
	}
}

// Every field is in the page's table, and every board in the first one.
func TestEveryFieldIsDocumented(t *testing.T) {
	page, err := os.ReadFile("../docs/boards.md")
	if err != nil {
		t.Fatal(err)
	}
	var fields func(prefix string, of reflect.Type) []string
	fields = func(prefix string, of reflect.Type) (list []string) {
		for _, f := range reflect.VisibleFields(of) {
			switch name := f.Tag.Get("yaml"); {
			case name == "":
			case f.Type.Kind() == reflect.Struct:
				list = append(list, fields(prefix+name+".", f.Type)...)
			default:
				list = append(list, prefix+name)
			}
		}
		return list
	}
	rows := fields("", reflect.TypeFor[Board]())
	if len(rows) < 10 {
		t.Fatalf("fields: %q", rows)
	}
	for _, row := range append(rows, names(tree)...) {
		if !strings.Contains(string(page), "\n| `"+row+"` |") {
			t.Errorf("docs/boards.md has no row for %s", row)
		}
	}
}
