package image

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
)

// BaseSources gives what a base image is made from: the version of the Go
// toolchain, and the files of the checkout with their hashes, under "source/".
// If neither these nor the options have changed, BuildBase gives the same bytes.
func BaseSources(ctx context.Context, opt BaseOptions) (files []File, goVersion string, err error) {
	if opt, err = opt.defaults(); err != nil {
		return nil, "", err
	}
	all := map[string]File{}
	for tags, pkgs := range packagesByTags(programsOf(opt.Debug)) {
		found, err := sources(ctx, opt.Source, opt.Arch, opt.TempDir, tags, "source", pkgs...)
		if err != nil {
			return nil, "", err
		}
		for _, f := range found {
			all[f.Name] = f
		}
	}
	for _, name := range []string{"go.mod", "go.sum"} {
		f, err := fileAt(opt.Source, name, "")
		if err != nil {
			return nil, "", err
		}
		all[f.Name] = f
	}
	for _, f := range all {
		files = append(files, f)
	}
	sortFiles(files)
	goVersion, err = toolchain(ctx, opt.Source, opt.Arch, opt.TempDir)
	return files, goVersion, err
}

func packagesByTags(list []program) map[string][]string {
	by := map[string][]string{}
	for _, p := range list {
		by[p.tags] = append(by[p.tags], p.pkg)
	}
	return by
}

// toolchain is the version of Go that compiles in dir: its go.mod may ask for
// another one than that in PATH.
func toolchain(ctx context.Context, dir, arch, tmp string) (string, error) {
	out, err := runGo(ctx, dir, arch, tmp, "env", "GOVERSION")
	if err != nil {
		return "", fmt.Errorf("asking Go for its version: %w", err)
	}
	return strings.TrimSpace(string(out)), nil
}

// sources gives the files that packages are compiled from, as far as they lie
// in the main module or in a folder that replaces another module; the rest is
// pinned by go.sum and the toolchain's version. Names are paths from the main
// module's root, below prefix.
func sources(ctx context.Context, dir, arch, tmp, tags, prefix string, pkgs ...string) ([]File, error) {
	args := append([]string{"list", "-deps", "-tags=" + tags,
		"-json=ImportPath,Name,Dir,Standard,Module,GoFiles,SFiles,HFiles,SysoFiles,EmbedFiles"}, pkgs...)
	out, err := runGo(ctx, dir, arch, tmp, args...)
	if err != nil {
		return nil, fmt.Errorf("finding the sources of %s: %w", strings.Join(pkgs, ", "), err)
	}
	type module struct {
		Main    bool
		Dir     string
		Version string
		Replace *module
	}
	var files []File
	for d := json.NewDecoder(bytes.NewReader(out)); ; {
		var p struct {
			ImportPath, Dir                                string
			Standard                                       bool
			Module                                         *module
			GoFiles, SFiles, HFiles, SysoFiles, EmbedFiles []string
		}
		if err := d.Decode(&p); errors.Is(err, io.EOF) {
			return files, nil
		} else if err != nil {
			return nil, fmt.Errorf("reading what go list says of %s: %w", strings.Join(pkgs, ", "), err)
		}
		if p.Module == nil || !p.Module.Main && (p.Module.Replace == nil || p.Module.Replace.Version != "") {
			continue
		}
		at := prefix
		if !p.Module.Main {
			at = path.Join(prefix, "replaced", path.Base(p.ImportPath))
		}
		for _, name := range slices.Concat(p.GoFiles, p.SFiles, p.HFiles, p.SysoFiles, p.EmbedFiles) {
			rel, err := filepath.Rel(p.Module.Dir, filepath.Join(p.Dir, name))
			if err != nil {
				return nil, err
			}
			f, err := fileAt(p.Module.Dir, rel, at)
			if err != nil {
				return nil, err
			}
			files = append(files, f)
		}
	}
}

// fileAt is the file dir/rel as an input below prefix.
func fileAt(dir, rel, prefix string) (File, error) {
	data, err := os.ReadFile(filepath.Join(dir, rel))
	if err != nil {
		return File{}, fmt.Errorf("reading a source: %w", err)
	}
	return NewFile(path.Join(prefix, filepath.ToSlash(rel)), data), nil
}

// ReuseBase gives the base image of an earlier build, whose manifest and folder
// are before and dir, if it was made of the same sources by the same toolchain;
// else nil. The sources it gives are today's, for the new manifest.
func ReuseBase(ctx context.Context, opt BaseOptions, before *Manifest, dir string) (*Base, []File, error) {
	opt, err := opt.defaults()
	if err != nil {
		return nil, nil, err
	}
	files, goVersion, err := BaseSources(ctx, opt)
	if err != nil {
		return nil, nil, err
	}
	if before == nil || before.Recipe != Recipe || before.Arch != opt.Arch || before.Debug != opt.Debug || before.Go != goVersion ||
		!slices.Equal(sourcesOf(before), files) {
		return nil, files, nil
	}
	b := &Base{Path: filepath.Join(dir, BaseName(opt.Debug)), Arch: opt.Arch, Debug: opt.Debug, Go: goVersion, Modules: before.Modules, source: opt.Source}
	packed, err := os.ReadFile(b.Path)
	f, ok := before.Find(BaseName(opt.Debug))
	if err != nil || !ok || sum(packed) != f.SHA256 {
		return nil, files, nil
	}
	b.SHA256, b.Bytes, b.Unpacked = f.SHA256, f.Bytes, Unpacked(packed)
	for _, p := range programsOf(opt.Debug) {
		f, ok := before.Find("/" + p.name)
		if !ok {
			return nil, files, nil
		}
		f.Name = p.name
		b.Programs = append(b.Programs, f)
	}
	return b, files, nil
}

func sourcesOf(m *Manifest) []File {
	return slices.DeleteFunc(slices.Clone(m.Inputs), func(f File) bool {
		return f.Name != "go.mod" && f.Name != "go.sum" && !strings.HasPrefix(f.Name, "source/")
	})
}
