package image

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestFolder(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	for _, bad := range []string{"/dev/null", "/proc/none", file, filepath.Join(file, "out"), "/proc/self"} {
		if _, err := Folder(bad); err == nil || !strings.HasPrefix(err.Error(), bad+" cannot be written to; give another folder with --out: ") {
			t.Errorf("Folder(%s) = %v; want an error that names --out", bad, err)
		}
	}
	// What it made goes again, and nothing else.
	if err := os.Mkdir(filepath.Join(dir, "was"), 0o755); err != nil {
		t.Fatal(err)
	}
	abandon, err := Folder(filepath.Join(dir, "was", "a", "b"))
	if err != nil {
		t.Fatal(err)
	}
	if left, err := os.ReadDir(filepath.Join(dir, "was", "a", "b")); err != nil || len(left) > 0 {
		t.Errorf("the folder has %v, %v; want it empty", left, err)
	}
	abandon()
	if left, err := os.ReadDir(filepath.Join(dir, "was")); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v; want the folder that was there, empty", left, err)
	}
	// A folder that has something stays.
	if abandon, err = Folder(filepath.Join(dir, "a", "b")); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "a", "b", "image"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	abandon()
	if _, err := os.Stat(filepath.Join(dir, "a", "b", "image")); err != nil {
		t.Error(err)
	}
}
