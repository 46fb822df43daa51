package image

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestCheckBuild: a program of one architecture only is right where that is, and where it
// is not known for which one it will be.
func TestCheckBuild(t *testing.T) {
	dir := t.TempDir()
	for name, text := range map[string]string{
		"arm/main_arm64.go": "package main\n\nfunc main() {}\n",
		"both/main.go":      "package main\n\nfunc main() {}\n",
		"c/main_windows.go": "package main\n\nfunc main() {}\n",
	} {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	for _, tt := range []struct{ folder, arch, want string }{
		{"arm", "arm64", ""},
		{"arm", "", ""},
		{"arm", "amd64", "no Go file for linux/amd64"},
		{"both", "", ""},
		{"both", "arm64", ""},
		{"c", "", "no Go file for linux/amd64 or arm64"},
	} {
		err := CheckBuild(filepath.Join(dir, tt.folder), tt.arch)
		if tt.want == "" && err != nil || tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)) {
			t.Errorf("%s for %q: %v; want %q", tt.folder, tt.arch, err, tt.want)
		}
	}
}
