// Package kernel builds the appliance's kernel: Debian's source of one stable
// series, our patches, and the board's configuration on top of allnoconfig. It
// exists because no stock kernel can send from another address than the one it
// announces (see patches/), and because a newcomer should wait for the compiler
// once: a result is kept under the hash of everything it was made from.
//
// Builds are reproducible, the same bytes from any directory, by the variables
// of the kernel's Documentation/kbuild/reproducible-builds.rst and by building
// out of tree; Reproduce checks it.
package kernel

import (
	"cmp"
	"context"
	"embed"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"clonecluster/boards"
	"clonecluster/image/kernel/kconfig"
)

//go:embed patches/*.patch source.lock
var files embed.FS

// Options says what to build and how.
type Options struct {
	Board boards.Board
	// Source is a source tree or a tarball of one. Empty: the package that
	// source.lock names. A tree is copied, never changed.
	Source string
	// Locked makes it an error if the source is not the one in source.lock.
	Locked bool
	// CacheDir is where sources, results and scratch files are kept, in a
	// folder "kernel". It must be outside any checkout.
	CacheDir string
	// Jobs is how many compilers run at once. 0: one per processor.
	Jobs int
	// Status is called with a line on what goes on now, a few times per
	// second at most; Notice with a line that the user should keep. Both may
	// be nil. They are called from one goroutine at a time.
	Status, Notice func(string)

	noCcache bool
	lock     *lock    // instead of source.lock, for tests
	patches  []patch  // instead of patches/, for tests
	path     []string // instead of the environment's PATH, for tests
	space    int64    // instead of treeBytes, for tests
}

// Result is a built kernel. It is stored as result.json beside the image.
type Result struct {
	Board   string        `json:"board"`
	Key     string        `json:"key"`     // hash of Inputs
	Image   string        `json:"-"`       // path of the bzImage
	Config  string        `json:"-"`       // path of the complete .config
	SHA256  string        `json:"sha256"`  // of the image
	Size    int64         `json:"size"`    // of the image, bytes
	Release string        `json:"release"` // as uname -r will say
	Source  Source        `json:"source"`
	Inputs  Inputs        `json:"inputs"`
	Files   int           `json:"files"`  // compiled
	CPU     time.Duration `json:"cpu_ns"` // user and system time of the build
	Wall    time.Duration `json:"wall_ns"`
	Ccache  bool          `json:"ccache"` // so CPU says little
	Cached  bool          `json:"-"`      // this call found it in the cache
}

// buildEnv is what makes builds reproducible, and is part of the key. The host's
// Rust and pahole would be recorded in .config.
var buildEnv = []string{
	"KBUILD_BUILD_HOST=clonecluster",
	"KBUILD_BUILD_TIMESTAMP=@1764547200",
	"KBUILD_BUILD_USER=clonecluster",
	"KBUILD_BUILD_VERSION=1",
	"LC_ALL=C",
	"TZ=UTC",
}

var makeVars = []string{"RUSTC=false", "PAHOLE=absent"}

// Build returns the kernel of a board, from the cache if nothing it is made of
// has changed. One build runs at a time in a cache folder; others wait.
func Build(ctx context.Context, o Options) (*Result, error) {
	b, err := prepare(ctx, o)
	if err != nil {
		return nil, fmt.Errorf("kernel for %s: %w", o.Board.Name, err)
	}
	r, err := b.build(ctx)
	if err != nil {
		return nil, fmt.Errorf("kernel for %s: %w", o.Board.Name, explainSpace(o.CacheDir, err))
	}
	return r, nil
}

// Check finds what would keep Build from building: a tool, a header or the source
// that is not there, a source that is none, a cache that cannot be written to or is full. It
// takes a second or two; if Build's result is in the cache, less.
func Check(ctx context.Context, o Options) error {
	b, err := prepare(ctx, o)
	if err == nil {
		err = b.check(ctx)
	}
	if err != nil {
		return fmt.Errorf("kernel for %s: %w", o.Board.Name, err)
	}
	return nil
}

func (b *builder) check(ctx context.Context) error {
	if _, ok := b.cached(); ok {
		return nil
	}
	if err := b.tools.complete(); err != nil {
		return err
	}
	scratch, err := b.cache.scratch()
	if err != nil {
		return b.cache.explain(err)
	}
	os.Remove(scratch)
	// A tree that is there, of this source or another, makes room for the one that is needed.
	if trees, _ := filepath.Glob(filepath.Join(b.cache.dir, "source-*")); len(trees) == 0 {
		if err := b.cache.room(cmp.Or(b.o.space, treeBytes)); err != nil {
			return err
		}
	}
	return b.checkSource(ctx)
}

// ErrNotReproducible is what Reproduce's error wraps if the second build's
// image differs.
var ErrNotReproducible = errors.New("the image differs between two builds of the same inputs")

// Reproduce builds again what Build returned, from another directory and without
// ccache, and compares the images. That they are equal is remembered beside
// the result, so that it costs a build only once.
func Reproduce(ctx context.Context, o Options) (*Result, error) {
	r, err := Build(ctx, o)
	if err != nil {
		return nil, err
	}
	if err := reproduce(ctx, o, r); err != nil {
		return nil, fmt.Errorf("kernel for %s, second build: %w", o.Board.Name, explainSpace(o.CacheDir, err))
	}
	return r, nil
}

func reproduce(ctx context.Context, o Options, first *Result) error {
	b, err := prepare(ctx, o)
	if err != nil {
		return err
	}
	if b.key != first.Key {
		return errors.New("the inputs changed meanwhile")
	}
	mark := filepath.Join(b.cache.entry(b.key, o.Board.Name), "reproduced")
	if got, err := os.ReadFile(mark); err == nil && string(got) == first.SHA256 {
		return nil
	}
	b.o.noCcache = true
	unlock, err := b.cache.lock(ctx, b.notice)
	if err != nil {
		return err
	}
	defer unlock()
	tree, err := b.tree(ctx)
	if err != nil {
		return err
	}
	scratch, err := b.cache.scratch()
	if err != nil {
		return err
	}
	defer os.RemoveAll(scratch)
	// Another path, of another length, for the source as well.
	other := filepath.Join(scratch, "another-directory", "source")
	if err := linkTree(ctx, tree.dir, other); err != nil {
		return fmt.Errorf("linking the source to a second directory: %w", err)
	}
	second, _, err := b.compile(ctx, other, filepath.Join(scratch, "out"), filepath.Join(scratch, "entry"))
	if err != nil {
		return err
	}
	if second.SHA256 != first.SHA256 {
		return fmt.Errorf("%w: %s, then %s", ErrNotReproducible, first.SHA256, second.SHA256)
	}
	return writeFile(mark, []byte(first.SHA256))
}

// builder is one build with everything it depends on known.
type builder struct {
	o       Options
	cache   cache
	source  Source
	patches []patch
	config  kconfig.Fragment
	tools   tools
	inputs  Inputs
	key     string
	about   int // how many files it will compile
}

func prepare(ctx context.Context, o Options) (*builder, error) {
	if o.CacheDir == "" {
		return nil, errors.New("no cache folder given")
	}
	if o.Jobs == 0 {
		o.Jobs = runtime.NumCPU()
	}
	b := &builder{o: o, cache: cache{filepath.Join(o.CacheDir, "kernel")}, about: o.Board.Kernel.Files}
	var err error
	if b.config, err = o.Board.KernelConfig(); err != nil {
		return nil, fmt.Errorf("reading the board's configuration: %w", err)
	}
	if b.patches = o.patches; b.patches == nil {
		if b.patches, err = readPatches(files); err != nil {
			return nil, err
		}
	}
	if b.tools, err = findTools(ctx, o); err != nil {
		return nil, err
	}
	if b.source, err = findSource(ctx, o, b.cache); err != nil {
		return nil, b.cache.explain(err)
	}
	b.inputs = Inputs{
		Recipe:   recipe,
		Source:   b.source.SHA256,
		Config:   sum(b.config.Bytes()),
		Target:   []string{o.Board.Kernel.Arch, o.Board.Kernel.Image},
		Tools:    b.tools.versions,
		Env:      buildEnv,
		MakeVars: makeVars,
	}
	for _, p := range b.patches {
		b.inputs.Patches = append(b.inputs.Patches, p.name+" "+sum(p.data))
	}
	b.key = b.inputs.key()
	if last, ok := b.cache.lastFiles(o.Board.Name); ok {
		b.about = last
	}
	return b, nil
}

func (b *builder) status(format string, args ...any) {
	if b.o.Status != nil {
		b.o.Status(fmt.Sprintf("kernel "+b.o.Board.Name+": "+format, args...))
	}
}

func (b *builder) notice(format string, args ...any) {
	if b.o.Notice != nil {
		b.o.Notice(fmt.Sprintf("kernel "+b.o.Board.Name+": "+format, args...))
	}
}

func (b *builder) build(ctx context.Context) (*Result, error) {
	if b.source.Package != "" && !b.source.Locked {
		b.notice("using %s %s; source.lock asks for %s", b.source.Package, b.source.Version, b.source.Wanted)
	}
	if r, ok := b.cached(); ok {
		return r, nil
	}
	if err := b.check(ctx); err != nil {
		return nil, err
	}
	unlock, err := b.cache.lock(ctx, b.notice)
	if err != nil {
		return nil, b.cache.explain(err)
	}
	defer unlock()
	if r, ok := b.cached(); ok {
		return r, nil // somebody else built it while we waited
	}
	tree, err := b.tree(ctx)
	if err != nil {
		return nil, err
	}
	scratch, err := b.cache.scratch()
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(scratch)
	entry := filepath.Join(scratch, "entry")
	r, buildLog, err := b.compile(ctx, tree.dir, filepath.Join(scratch, "out"), entry)
	if err != nil {
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		if kept, ok := b.cache.keepLog(b.o.Board.Name, buildLog); ok {
			err = fmt.Errorf("%w\n\tall output: %s", err, kept)
		}
		return nil, err
	}
	return r, b.cache.store(entry, r)
}

// cached returns the result of an earlier build. The same source may have come
// from elsewhere, and source.lock may have changed meanwhile.
func (b *builder) cached() (*Result, bool) {
	r, ok := b.cache.load(b.key, b.o.Board.Name)
	if ok {
		r.Source = b.source
	}
	return r, ok
}

// compile builds the source tree src in the folder out and writes the cache
// entry for it to the folder entry.
func (b *builder) compile(ctx context.Context, src, out, entry string) (*Result, string, error) {
	for _, dir := range []string{out, entry} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return nil, "", err
		}
	}
	logFile := filepath.Join(filepath.Dir(out), "build.log")
	log, err := os.Create(logFile)
	if err != nil {
		return nil, "", err
	}
	defer log.Close()
	m := b.tools.maker(b.o, src, out, log)

	start := time.Now()
	if err := b.configure(ctx, m, out); err != nil {
		return nil, logFile, fmt.Errorf("configuring: %w", err)
	}
	counted := func(files int) {
		b.status("%d of about %d files, %s", files, max(files, b.about), time.Since(start).Round(time.Second))
	}
	counted(0)
	image := filepath.Base(b.o.Board.Kernel.Image)
	if err := m.run(ctx, nil, counted, image); err != nil {
		return nil, logFile, fmt.Errorf("compiling: %w", err)
	}
	release, err := os.ReadFile(filepath.Join(out, "include/config/kernel.release"))
	if err != nil {
		return nil, logFile, err
	}
	data, err := os.ReadFile(filepath.Join(out, b.o.Board.Kernel.Image))
	if err != nil {
		return nil, logFile, fmt.Errorf("make left no image: %w", err)
	}
	r := &Result{
		Board: b.o.Board.Name, Key: b.key, SHA256: sum(data), Size: int64(len(data)),
		Release: strings.TrimSpace(string(release)), Source: b.source, Inputs: b.inputs,
		Files: m.files, CPU: m.cpu, Wall: time.Since(start), Ccache: m.ccache,
	}
	config, err := os.ReadFile(filepath.Join(out, ".config"))
	if err != nil {
		return nil, logFile, err
	}
	if err := errors.Join(
		writeFile(filepath.Join(entry, imageName), data),
		writeFile(filepath.Join(entry, configName), config),
		writeJSON(filepath.Join(entry, resultName), r),
	); err != nil {
		return nil, logFile, err
	}
	return r, logFile, nil
}

// configure writes .config to the folder out and checks it.
func (b *builder) configure(ctx context.Context, m *maker, out string) error {
	b.status("configuring")
	request := filepath.Join(out, "request.config")
	if err := os.WriteFile(request, b.config.Bytes(), 0o644); err != nil {
		return err
	}
	if err := m.run(ctx, []string{"KCONFIG_ALLCONFIG=" + request}, nil, "allnoconfig"); err != nil {
		return err
	}
	config, err := os.ReadFile(filepath.Join(out, ".config"))
	if err != nil {
		return err
	}
	return b.config.Check(config)
}

func readPatches(fsys fs.FS) ([]patch, error) {
	names, err := fs.Glob(fsys, "patches/*.patch")
	if err != nil {
		return nil, err
	}
	var ps []patch
	for _, n := range names { // sorted by Glob
		data, err := fs.ReadFile(fsys, n)
		if err != nil {
			return nil, err
		}
		p, err := parsePatch(filepath.Base(n), data)
		if err != nil {
			return nil, err
		}
		ps = append(ps, p)
	}
	return ps, nil
}

// linkTree makes dst a copy of src that shares the files. cp does it in seconds.
func linkTree(ctx context.Context, src, dst string) error {
	if err := os.MkdirAll(filepath.Dir(dst), 0o755); err != nil {
		return err
	}
	if out, err := exec.CommandContext(ctx, "cp", "-al", src, dst).CombinedOutput(); err != nil {
		return fmt.Errorf("%w: %s", err, strings.TrimSpace(string(out)))
	}
	return nil
}
