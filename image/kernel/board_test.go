package kernel

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"clonecluster/boards"
)

// userCache is the cache that builds use, so that a source that is unpacked
// there is not unpacked again.
func userCache(t *testing.T) string {
	t.Helper()
	if dir := os.Getenv("CLONECLUSTER_CACHE"); dir != "" {
		return dir
	}
	dir, err := os.UserCacheDir()
	if err != nil {
		t.Skipf("no cache folder: %v", err)
	}
	return filepath.Join(dir, "clonecluster")
}

// patchedTree returns the unpacked and patched source, with the cache's lock
// held for the rest of the test.
func patchedTree(t *testing.T, board boards.Board) (*builder, tree) {
	t.Helper()
	if testing.Short() {
		t.Skip("unpacks the kernel's source: not with -short")
	}
	b, err := prepare(t.Context(), Options{Board: board, CacheDir: userCache(t), Status: func(s string) { t.Log(s) }})
	if errors.Is(err, ErrNoSource) {
		t.Skip(err)
	} else if err != nil {
		t.Fatal(err)
	}
	unlock, err := b.cache.lock(t.Context(), func(f string, args ...any) { t.Logf(f, args...) })
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(unlock)
	tree, err := b.tree(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return b, tree
}

// TestBoardsConfigure shows, in seconds and without compiling the kernel, that
// the patches apply and that every board gets every symbol it asks for.
func TestBoardsConfigure(t *testing.T) {
	all, err := boards.All()
	if err != nil {
		t.Fatal(err)
	}
	for _, board := range all {
		t.Run(board.Name, func(t *testing.T) {
			b, tree := patchedTree(t, board)
			log, err := os.Create(filepath.Join(t.TempDir(), "log"))
			if err != nil {
				t.Fatal(err)
			}
			defer log.Close()
			out := t.TempDir()
			if err := b.configure(t.Context(), b.tools.maker(b.o, tree.dir, out, log), out); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestPatchStyle holds the patches to the kernel's own rules.
func TestPatchStyle(t *testing.T) {
	if _, err := exec.LookPath("perl"); err != nil {
		t.Skip("perl is not installed (apt-get install perl)")
	}
	_, tree := patchedTree(t, board(t, "qemu-x86_64"))
	patches, err := filepath.Glob("patches/*.patch")
	if err != nil || len(patches) == 0 {
		t.Fatalf("patches: %v, %v", patches, err)
	}
	for _, p := range patches {
		cmd := exec.Command("perl", filepath.Join(tree.dir, "scripts/checkpatch.pl"), "--strict", "--no-signoff", "--root="+tree.dir, p)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("checkpatch of %s: %v\n%s", p, err, out)
		}
	}
}
