package kernel

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func lines(n int) string {
	var b strings.Builder
	for i := range n {
		b.WriteString(strings.Repeat("x", i%7) + string(rune('a'+i%26)) + "\n")
	}
	return b.String()
}

// TestApplyAsGitDoes writes diffs with git, and compares what it and we make of
// them on files that have changed meanwhile.
func TestApplyAsGitDoes(t *testing.T) {
	if _, err := exec.LookPath("git"); err != nil {
		t.Skip("git is not installed (apt-get install git)")
	}
	old := lines(60)
	edited := strings.Replace(old, "xxxk\n", "new\nlines\n", 1)
	edited = strings.Replace(edited, "xxxxxz\n", "", 1)
	edited = strings.Replace(edited, "xxxxxx"+string(rune('a'+55%26))+"\n", "last\n", 1)
	for name, shifted := range map[string]string{
		"as it was":    old,
		"moved down":   "some\nmore\nlines\n" + old,
		"moved up":     old[strings.Index(old, "\n")+1:],
		"longer after": old + lines(40),
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			git := func(args ...string) string {
				cmd := exec.Command("git", append([]string{"-c", "user.name=t", "-c", "user.email=t@t.invalid"}, args...)...)
				cmd.Dir = dir
				out, err := cmd.Output()
				if err != nil {
					t.Fatalf("git %v: %v", args, err)
				}
				return string(out)
			}
			git("init", "-q")
			writeTree(t, dir, map[string]string{"sub/f.c": old})
			git("add", ".")
			git("commit", "-qm", "old")
			writeTree(t, dir, map[string]string{"sub/f.c": edited, "sub/made.c": "made\n"})
			git("add", ".")
			diff := git("diff", "--cached")

			writeTree(t, dir, map[string]string{"sub/f.c": shifted})
			if err := os.Remove(filepath.Join(dir, "sub/made.c")); err != nil {
				t.Fatal(err)
			}
			ours := writeTree(t, t.TempDir(), map[string]string{"sub/f.c": shifted})
			cmd := exec.Command("git", "apply", "-")
			cmd.Dir, cmd.Stdin = dir, strings.NewReader(diff)
			if out, err := cmd.CombinedOutput(); err != nil {
				t.Fatalf("git apply: %v: %s", err, out)
			}
			p, err := parsePatch("t.patch", []byte(diff))
			if err != nil {
				t.Fatal(err)
			}
			if err := p.apply(ours); err != nil {
				t.Fatal(err)
			}
			for _, f := range []string{"sub/f.c", "sub/made.c"} {
				if diff := cmp.Diff(mustRead(t, filepath.Join(dir, f)), mustRead(t, filepath.Join(ours, f))); diff != "" {
					t.Errorf("%s (-git +ours):\n%s", f, diff)
				}
			}
			if shifted != old {
				return
			}
			err = p.apply(ours)
			var pe *PatchError
			if !errors.As(err, &pe) || !strings.Contains(err.Error(), "it is there already") {
				t.Errorf("applied twice: %v; want to be told that it is there already", err)
			}
		})
	}
}

func TestParsePatchRefuses(t *testing.T) {
	const head = "--- a/f\n+++ b/f\n"
	for text, want := range map[string]string{
		"":                               "no file is changed",
		"@@ -1 +1 @@\n-a\n+b\n":          "a hunk without a file",
		head:                             "f has no hunk",
		head + "@@ nonsense":             "no hunk header",
		head + "@@ -1,3 +1,3 @@\n a\n":   "no part of a hunk|ends early",
		head + "@@ -1 +1 @@\n-a\n*b\n":   "no part of a hunk",
		head + "@@ -1 +1 @@\n-a\n-b\n":   "other lines|ends early|no part",
		"--- a/f\n+++ b/../../etc\n":     "no file of the tree",
		"--- a/f\n+++ /etc/passwd\n":     "no file of the tree",
		"rename from f\n":                "not supported",
		head + "@@ -1 +1 @@\n-a\n+b\n\\": "final newline",
	} {
		_, err := parsePatch("t", []byte(text))
		ok := false
		for w := range strings.SplitSeq(want, "|") {
			ok = ok || err != nil && strings.Contains(err.Error(), w)
		}
		if !ok {
			t.Errorf("parsePatch(%q) = %v; want an error with %q", text, err, want)
		}
	}
}

func FuzzPatch(f *testing.F) {
	f.Add([]byte(fakePatch), []byte("int one;\nint two;\nint three;\n"))
	f.Add([]byte("--- /dev/null\n+++ b/f\n@@ -0,0 +1,1 @@\n+a\n"), []byte(""))
	f.Add([]byte("--- a/f\n+++ b/f\n@@ -9,1 +9,0 @@\n-a\n@@ -1,1 +1,2 @@\n a\n+b\n"), []byte("a\na\n"))
	f.Fuzz(func(t *testing.T, diff, file []byte) {
		p, err := parsePatch("t", diff)
		if err != nil {
			return
		}
		for _, fp := range p.files {
			if !filepath.IsLocal(fp.path) {
				t.Errorf("path %q leaves the tree", fp.path)
			}
			before := splitLines(file)
			after, err := p.applyHunks(fp, before)
			if err != nil {
				continue
			}
			want := len(before)
			for _, h := range fp.hunks {
				want += len(h.new) - len(h.old)
			}
			if len(after) != want {
				t.Errorf("%d lines after %q; want %d", len(after), diff, want)
			}
		}
	})
}
