package kernel

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// recipe counts changes of this package that change what it builds.
const recipe = 1

// Inputs is everything a kernel is made from. Equal inputs give equal images.
type Inputs struct {
	Recipe   int      `json:"recipe"`
	Source   string   `json:"source"` // SHA-256 of the tarball, or fingerprint of the tree
	Patches  []string `json:"patches"`
	Config   string   `json:"config"` // SHA-256 of the merged fragments
	Target   []string `json:"target"`
	Tools    []string `json:"tools"` // first line of each one's --version
	Env      []string `json:"env"`
	MakeVars []string `json:"make_vars"`
}

func (i Inputs) key() string {
	data, err := json.Marshal(i)
	if err != nil {
		panic(err) // strings and integers always marshal
	}
	return sum(data)
}

func sum(data []byte) string {
	s := sha256.Sum256(data)
	return hex.EncodeToString(s[:])
}

// The files of a cache entry.
const (
	imageName  = "bzImage"
	configName = "config"
	resultName = "result.json"
)

// cache is the folder that holds
//
//	BOARD-KEY/       a result; entries appear by rename, so they are complete
//	source-SUM-SUM/  the source that was unpacked and patched last
//	scratch-*/       a build that runs, or was killed
//	sha256.json      hashes of tarballs, by size and time of change
//	lock             held by whoever builds
type cache struct{ dir string }

func (c cache) entry(key, board string) string {
	return filepath.Join(c.dir, board+"-"+key[:16])
}

// load returns an entry if it is there and whole.
func (c cache) load(key, board string) (*Result, bool) {
	dir := c.entry(key, board)
	data, err := os.ReadFile(filepath.Join(dir, resultName))
	if err != nil {
		return nil, false
	}
	r := &Result{}
	if err := json.Unmarshal(data, r); err != nil || r.Key != key {
		return nil, false
	}
	image, err := os.ReadFile(filepath.Join(dir, imageName))
	if err != nil || sum(image) != r.SHA256 {
		return nil, false
	}
	if _, err := os.Stat(filepath.Join(dir, configName)); err != nil {
		return nil, false
	}
	c.locate(r)
	r.Cached = true
	return r, true
}

func (c cache) locate(r *Result) {
	dir := c.entry(r.Key, r.Board)
	r.Image, r.Config = filepath.Join(dir, imageName), filepath.Join(dir, configName)
}

// store makes the folder tmp, in the cache, the entry of r.
func (c cache) store(tmp string, r *Result) error {
	dir := c.entry(r.Key, r.Board)
	if err := os.RemoveAll(dir); err != nil { // a damaged one
		return err
	}
	if err := os.Rename(tmp, dir); err != nil {
		return fmt.Errorf("keeping the result: %w", err)
	}
	c.locate(r)
	return nil
}

// lastFiles tells how many files the newest build for a board compiled.
func (c cache) lastFiles(board string) (int, bool) {
	entries, err := filepath.Glob(filepath.Join(c.dir, board+"-*", resultName))
	if err != nil {
		return 0, false
	}
	var newest time.Time
	files := 0
	for _, e := range entries {
		fi, err := os.Stat(e)
		if err != nil || fi.ModTime().Before(newest) {
			continue
		}
		var r Result
		if data, err := os.ReadFile(e); err == nil && json.Unmarshal(data, &r) == nil && r.Files > 0 {
			newest, files = fi.ModTime(), r.Files
		}
	}
	return files, files > 0
}

// keepLog saves the output of a failed build from its scratch folder.
func (c cache) keepLog(board, log string) (string, bool) {
	kept := filepath.Join(c.dir, "failed-"+board+".log")
	return kept, log != "" && os.Rename(log, kept) == nil
}

// treeBytes is what Linux 6.12 takes when it is unpacked, in bytes (du of 6.12.117).
const treeBytes = 1640 << 20

// ErrNoSpace is what Build's error wraps if the cache's file system is full, or would be.
var ErrNoSpace = errors.New("no space left")

// room tells whether the file system has those bytes free. One that does not say is no error.
func (c cache) room(bytes int64) error {
	var s unix.Statfs_t
	if err := unix.Statfs(c.dir, &s); err != nil || s.Blocks == 0 {
		return nil
	}
	if free := int64(s.Bavail) * s.Bsize; free < bytes {
		return fmt.Errorf("%w for the kernel in the cache %s: its source takes %d MB there and %d are free; free %d MB, or give another folder with --cache or $CLONECLUSTER_CACHE",
			ErrNoSpace, filepath.Dir(c.dir), bytes/1e6, free/1e6, (bytes-free)/1e6+1)
	}
	return nil
}

// explainSpace adds what helps to an error of a full cache: ours, or what a tool has said.
func explainSpace(cacheDir string, err error) error {
	if errors.Is(err, ErrNoSpace) || !errors.Is(err, unix.ENOSPC) && !strings.Contains(strings.ToLower(err.Error()), unix.ENOSPC.Error()) {
		return err
	}
	return fmt.Errorf("%w for the kernel in the cache %s: free some 2 GB there, or give another folder with --cache or $CLONECLUSTER_CACHE: %w", ErrNoSpace, cacheDir, err)
}

// explain adds what helps to an error of a cache that cannot be written to.
func (c cache) explain(err error) error {
	if err := explainSpace(filepath.Dir(c.dir), err); errors.Is(err, ErrNoSpace) {
		return err
	}
	var at *fs.PathError
	if errors.As(err, &at) && at.Op != "stat" && (strings.HasPrefix(at.Path, c.dir) || strings.HasPrefix(c.dir, at.Path)) {
		return fmt.Errorf("the cache %s cannot be written to; give another folder with --cache or $CLONECLUSTER_CACHE: %w", filepath.Dir(c.dir), err)
	}
	return err
}

func (c cache) scratch() (string, error) {
	if err := os.MkdirAll(c.dir, 0o755); err != nil {
		return "", err
	}
	return os.MkdirTemp(c.dir, "scratch-")
}

// lock waits until nobody else builds in this cache, and clears away what killed
// builds have left.
func (c cache) lock(ctx context.Context, notice func(string, ...any)) (unlock func(), err error) {
	if err := os.MkdirAll(c.dir, 0o755); err != nil {
		return nil, err
	}
	f, err := os.OpenFile(filepath.Join(c.dir, "lock"), os.O_RDWR|os.O_CREATE, 0o644)
	if err != nil {
		return nil, err
	}
	// flock(2) cannot wait for a context, so ask again and again.
	for waited := false; ; waited = true {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			break
		}
		if !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) {
			f.Close()
			return nil, fmt.Errorf("locking %s: %w", f.Name(), err)
		}
		if !waited {
			notice("waiting for another build that uses %s", c.dir)
		}
		select {
		case <-ctx.Done():
			f.Close()
			return nil, ctx.Err()
		case <-time.After(200 * time.Millisecond):
		}
	}
	left, _ := filepath.Glob(filepath.Join(c.dir, "scratch-*"))
	for _, dir := range left {
		if err := os.RemoveAll(dir); err != nil {
			f.Close()
			return nil, fmt.Errorf("clearing away a killed build: %w", err)
		}
	}
	return func() { f.Close() }, nil
}

// fileHash returns the SHA-256 of a file, remembered by path, size and time of
// change: a kernel tarball takes a second.
func (c cache) fileHash(path string) (string, error) {
	type known struct {
		Size   int64     `json:"size"`
		Time   time.Time `json:"time"`
		SHA256 string    `json:"sha256"`
	}
	path, err := filepath.Abs(path)
	if err != nil {
		return "", err
	}
	fi, err := os.Stat(path)
	if err != nil {
		return "", err
	}
	memo := map[string]known{}
	file := filepath.Join(c.dir, "sha256.json")
	if data, err := os.ReadFile(file); err == nil && json.Unmarshal(data, &memo) != nil {
		memo = map[string]known{}
	}
	if k, ok := memo[path]; ok && k.Size == fi.Size() && k.Time.Equal(fi.ModTime()) {
		return k.SHA256, nil
	}
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return "", fmt.Errorf("hashing %s: %w", path, err)
	}
	k := known{fi.Size(), fi.ModTime().UTC(), hex.EncodeToString(h.Sum(nil))}
	memo[path] = k
	if err := os.MkdirAll(c.dir, 0o755); err != nil {
		return "", err
	}
	return k.SHA256, writeJSON(file, memo)
}

// writeFile writes a file that is either as before or complete.
func writeFile(path string, data []byte) error {
	f, err := os.CreateTemp(filepath.Dir(path), ".new-*")
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	err = errors.Join(err, f.Chmod(0o644), f.Close())
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		os.Remove(f.Name())
		return fmt.Errorf("writing %s: %w", path, err)
	}
	return nil
}

func writeJSON(path string, v any) error {
	data, err := json.MarshalIndent(v, "", "\t")
	if err != nil {
		return err
	}
	return writeFile(path, append(data, '\n'))
}
