package kernel

import (
	"errors"
	"os"
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

// TestBoardsConfigure shows, in seconds and without compiling the kernel, that
// the patches apply and that every board gets every symbol it asks for.
func TestBoardsConfigure(t *testing.T) {
	if testing.Short() {
		t.Skip("unpacks the kernel's source: not with -short")
	}
	all, err := boards.All()
	if err != nil {
		t.Fatal(err)
	}
	for _, board := range all {
		t.Run(board.Name, func(t *testing.T) {
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
			defer unlock()
			tree, err := b.tree(t.Context())
			if err != nil {
				t.Fatal(err)
			}
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
