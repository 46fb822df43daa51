package image

import (
	"bytes"
	"context"
	"debug/buildinfo"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/u-root/u-root/pkg/cpio"
)

// BaseOptions says which base image to build. The zero value is amd64 without
// debugging tools, from the checkout around the working directory.
type BaseOptions struct {
	Source   string    // the checkout: a directory with clonecluster's go.mod; default: found upwards
	Arch     string    // GOARCH of the nodes, "amd64" (default) or "arm64"
	Debug    bool      // add a shell and tools
	OutDir   string    // for the result; default build
	TempDir  string    // for scratch files; default os.TempDir
	Progress io.Writer // one line per step; nil: silent
}

// Base is a built base image.
type Base struct {
	Path     string // OutDir/base.cpio.zst, base-debug.cpio.zst with Debug
	Arch     string
	Debug    bool
	SHA256   string // of the file, hex
	Bytes    int64  // of the file
	Unpacked int64  // what the archive takes; a node's memory use is a little more
	Go       string // version of the toolchain, "go1.26.8"
	Modules  []Module
	Programs []File // the executables, by their name in the image

	source string // the checkout it came from
}

// program is an executable of the image: a Go package, where it goes, and the
// names it also goes by. A multi-call binary does what the name says.
type program struct {
	pkg   string
	tags  string
	name  string
	links []string
}

// programs are all of an image without debugging tools.
var programs = []program{{pkg: "./cmd/node", name: "init", links: []string{"bin/cloned", "bin/webd"}}}

// debugPrograms are all of an image with them. Its /init offers a shell on the
// console and becomes node. The tools are u-root's: the cores that can be
// imported in one binary of ours, the others as they are. goshsmall: the full
// line editor of gosh sends queries that a serial console does not answer, and
// hangs.
var debugPrograms = []program{
	{pkg: "./cmd/node", name: "bin/node", links: []string{"bin/cloned", "bin/webd"}},
	{pkg: "./cmd/node-debug", name: "bin/node-debug", links: []string{"init", "bin/base64", "bin/cat", "bin/chmod", "bin/cp",
		"bin/find", "bin/ls", "bin/mkdir", "bin/mktemp", "bin/mv", "bin/rm", "bin/shasum", "bin/tar", "bin/touch", "bin/xargs"}},
	{pkg: uroot + "gosh", tags: "goshsmall", name: "bin/gosh", links: []string{"bin/sh"}},
	{pkg: uroot + "dmesg", name: "bin/dmesg"},
	{pkg: uroot + "hexdump", name: "bin/hexdump"},
	{pkg: uroot + "ip", name: "bin/ip"},
	{pkg: uroot + "kill", name: "bin/kill"},
	{pkg: uroot + "mount", name: "bin/mount"},
	{pkg: uroot + "netstat", name: "bin/netstat"},
	{pkg: uroot + "pci", name: "bin/pci"},
	{pkg: uroot + "ping", name: "bin/ping"},
	{pkg: uroot + "ps", name: "bin/ps"},
}

const uroot = "github.com/u-root/u-root/cmds/core/"

// skeleton is what the image has besides programs. /dev/console and /dev/null
// are there because PID 1 is started with the one, and a Go program may need
// the other, before devtmpfs is mounted.
func skeleton() []cpio.Record {
	return append(directories("bin", "dev", "etc/clonecluster", "run", ContentDir),
		cpio.Directory("proc", 0o555),
		cpio.Directory("root", 0o700),
		cpio.Directory("sys", 0o555),
		cpio.Directory("tmp", 0o1777),
		cpio.CharDev("dev/console", 0o600, 5, 1),
		cpio.CharDev("dev/null", 0o666, 1, 3),
		cpio.StaticFile("etc/hosts", "127.0.0.1 localhost\n::1 localhost\n", 0o644),
		cpio.StaticFile("etc/os-release", "NAME=clonecluster\nID=clonecluster\n", 0o644),
	)
}

func programsOf(debug bool) []program {
	if debug {
		return debugPrograms
	}
	return programs
}

// BaseName is the name of a base image's file.
func BaseName(debug bool) string {
	if debug {
		return "base-debug.cpio.zst"
	}
	return "base.cpio.zst"
}

// Programs gives the programs of an image, by their paths, that a service of a
// node can run.
func Programs(debug bool) []string {
	var paths []string
	for _, p := range programsOf(debug) {
		for _, name := range append([]string{p.name}, p.links...) {
			if strings.HasPrefix(name, "bin/") {
				paths = append(paths, "/"+name)
			}
		}
	}
	return paths
}

// defaults fills in what is not set.
func (opt BaseOptions) defaults() (BaseOptions, error) {
	if opt.Arch == "" {
		opt.Arch = "amd64"
	}
	if opt.Arch != "amd64" && opt.Arch != "arm64" {
		return opt, fmt.Errorf("architecture %q: want amd64 or arm64", opt.Arch)
	}
	if opt.OutDir == "" {
		opt.OutDir = "build"
	}
	if opt.Source == "" {
		var err error
		if opt.Source, err = FindSource("."); err != nil {
			return opt, err
		}
	}
	return opt, nil
}

// BuildBase compiles the programs, packs them and writes the result into
// OutDir. Compiling uses the Go build cache; a build without changes takes
// about two seconds. ctx ends a compilation early.
func BuildBase(ctx context.Context, opt BaseOptions) (*Base, error) {
	progress := opt.Progress
	if progress == nil {
		progress = io.Discard
	}
	opt, err := opt.defaults()
	if err != nil {
		return nil, err
	}
	base := &Base{Path: filepath.Join(opt.OutDir, BaseName(opt.Debug)), Arch: opt.Arch, Debug: opt.Debug, source: opt.Source}

	tmp, err := os.MkdirTemp(opt.TempDir, "clonecluster-image-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(tmp)
	records := skeleton()
	for _, p := range programsOf(opt.Debug) {
		begin := time.Now()
		file := filepath.Join(tmp, filepath.Base(p.name))
		args := []string{"-mod=readonly", "-tags=" + p.tags, "-o", file, p.pkg}
		if err := compile(ctx, opt.Source, opt.Arch, tmp, p.pkg, args...); err != nil {
			return nil, err
		}
		more, err := base.add(p, file)
		if err != nil {
			return nil, err
		}
		records = append(records, more...)
		fmt.Fprintf(progress, "image: /%s built from %s: %s in %.1f s\n", p.name, p.pkg, size(base.Programs[len(base.Programs)-1].Bytes), time.Since(begin).Seconds())
	}
	plain, err := archive(records, time.Time{})
	if err != nil {
		return nil, err
	}
	packed, err := Compress(plain)
	if err != nil {
		return nil, err
	}
	if err := WriteFile(base.Path, packed, 0o644); err != nil {
		return nil, err
	}
	base.Bytes, base.Unpacked, base.SHA256 = int64(len(packed)), int64(len(plain)), sum(packed)
	fmt.Fprintf(progress, "image: %s: %s, %s unpacked\n", base.Path, size(base.Bytes), size(base.Unpacked))
	return base, nil
}

// add takes a compiled program into the image and gives its records.
func (b *Base) add(p program, file string) ([]cpio.Record, error) {
	info, err := buildinfo.ReadFile(file)
	if err != nil {
		return nil, fmt.Errorf("reading what %s was built from: %w", p.name, err)
	}
	b.Go = info.GoVersion
	b.Modules = mergeModules(b.Modules, info)
	data, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	b.Programs = append(b.Programs, File{Name: p.name, Bytes: int64(len(data)), SHA256: sum(data)})
	records := []cpio.Record{cpio.StaticRecord(data, cpio.Info{Name: p.name, Mode: cpio.S_IFREG | 0o755})}
	for _, l := range p.links {
		records = append(records, cpio.Symlink(l, "/"+p.name))
	}
	return records, nil
}

// compile runs go build with everything fixed that could change the bytes: no
// paths, no version control stamp, no settings of the caller's.
func compile(ctx context.Context, dir, arch, tmp, what string, args ...string) error {
	args = append([]string{"build", "-trimpath", "-buildvcs=false", "-ldflags=-s -w -buildid="}, args...)
	if _, err := runGo(ctx, dir, arch, tmp, args...); err != nil {
		return fmt.Errorf("building %s: %w", what, err)
	}
	return nil
}

// runGo runs the Go command in dir for the architecture, with scratch files in
// tmp (empty: the system's), and gives its standard output. The error ends with
// what it said.
func runGo(ctx context.Context, dir, arch, tmp string, args ...string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, "go", args...)
	cmd.Dir = dir
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) } // so that go removes its scratch files
	cmd.WaitDelay = 5 * time.Second
	cmd.Env = append(cmd.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH="+arch, "GOAMD64=v1", "GOARM64=v8.0",
		"GOFLAGS=", "GOEXPERIMENT=", "GOFIPS140=off", "GOWORK=off")
	if tmp != "" {
		cmd.Env = append(cmd.Env, "GOTMPDIR="+tmp)
	}
	var said bytes.Buffer
	cmd.Stderr = &said
	out, err := cmd.Output()
	switch {
	case errors.Is(err, exec.ErrNotFound):
		return nil, fmt.Errorf("the Go toolchain is not in PATH; install one as new as go.mod says, https://go.dev/dl/: %w", err)
	case ctx.Err() != nil:
		return nil, ctx.Err()
	case err != nil && goCache.MatchString(said.String()):
		return nil, fmt.Errorf("%w\n%s\nset GOCACHE and GOMODCACHE to folders that you can write to", err, tail(said.String(), 20))
	case err != nil:
		return nil, fmt.Errorf("%w\n%s", err, tail(said.String(), 20))
	}
	return out, nil
}

// goCache is what the Go command says of caches that it cannot write to.
var goCache = regexp.MustCompile(`(build|module) cache[^\n]*(permission denied|read-only|not a directory|no such file|not defined)`)

func tail(s string, lines int) string {
	all := strings.Split(strings.TrimSpace(s), "\n")
	return strings.Join(all[max(0, len(all)-lines):], "\n")
}

var moduleLine = regexp.MustCompile(`(?m)^module clonecluster$`)

// FindSource gives the directory with our go.mod at or above dir.
func FindSource(dir string) (string, error) {
	start, err := filepath.Abs(dir)
	if err != nil {
		return "", err
	}
	for at := start; ; at = filepath.Dir(at) {
		mod, err := os.ReadFile(filepath.Join(at, "go.mod"))
		if err == nil && moduleLine.Match(mod) {
			return at, nil
		}
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return "", err
		}
		if at == filepath.Dir(at) {
			return "", fmt.Errorf("no checkout of clonecluster at or above %s; building the image needs its sources", start)
		}
	}
}

func mergeModules(have []Module, info *buildinfo.BuildInfo) []Module {
	if m := info.Main; m.Version != "" && m.Version != "(devel)" { // a program that was fetched by its import path
		have = mergeModule(have, Module{Path: m.Path, Version: m.Version, Sum: m.Sum})
	}
	for _, d := range info.Deps {
		m := Module{Path: d.Path, Version: d.Version, Sum: d.Sum}
		if d.Replace != nil {
			m = Module{Path: d.Path, Version: d.Replace.Path + "@" + d.Replace.Version, Sum: d.Replace.Sum}
		}
		have = mergeModule(have, m)
	}
	return have
}

func mergeModule(have []Module, m Module) []Module {
	if i, ok := slices.BinarySearchFunc(have, m, compareModules); !ok {
		have = slices.Insert(have, i, m)
	}
	return have
}

func compareModules(a, b Module) int {
	return strings.Compare(a.Path+"@"+a.Version, b.Path+"@"+b.Version)
}
