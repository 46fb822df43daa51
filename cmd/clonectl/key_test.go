package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"testing"

	"clonecluster/image"
)

// What holds a key, and is made by a command of the docs that somebody follows in the
// checkout, git does not take.
func TestKeysAreIgnored(t *testing.T) {
	root, err := image.FindSource(".")
	if err != nil {
		t.Fatal(err)
	}
	if err := exec.Command("git", "-C", root, "rev-parse").Run(); err != nil {
		t.Skipf("asking git what it ignores: %v (needs git and a checkout)", err)
	}
	pages, err := filepath.Glob(filepath.Join(root, "docs", "*.md"))
	if err != nil {
		t.Fatal(err)
	}
	makes := regexp.MustCompile(`clonectl (?:key new|key secure-boot|config example >) ?([a-z][a-z./-]*)|key issue .*--out ([a-z][a-z/-]*)`)
	found := map[string]bool{}
	for _, page := range append(pages, filepath.Join(root, "README.md")) {
		text, err := os.ReadFile(page)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range makes.FindAllSubmatch(text, -1) {
			name := string(m[1])
			if issued := string(m[2]); issued != "" {
				name = filepath.Join(issued, "client.key")
			} else if name == "sb/" {
				name = "sb/secure-boot.key"
			}
			found[name] = true
		}
	}
	for _, name := range []string{"signing.key", "sb/secure-boot.key", "cluster.yaml", "grafana/client.key"} {
		if !found[name] {
			t.Errorf("in the docs are %v; want %s, too", found, name)
		}
	}
	// In a repository of its own: this tree may be none, or another user's.
	if _, err := exec.LookPath("git"); err != nil {
		t.Skip("needs git")
	}
	repository := t.TempDir()
	ignore, err := os.ReadFile(filepath.Join(root, ".gitignore"))
	if err == nil {
		err = os.WriteFile(filepath.Join(repository, ".gitignore"), ignore, 0o644)
	}
	if err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("git", "init", "-q", repository).CombinedOutput(); err != nil {
		t.Fatalf("git init: %v\n%s", err, out)
	}
	for name := range found {
		if err := exec.Command("git", "-C", repository, "check-ignore", "-q", name).Run(); err != nil {
			t.Errorf("git would take %s (%v): put it into .gitignore", name, err)
		}
	}
}
