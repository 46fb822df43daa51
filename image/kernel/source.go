package kernel

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/goccy/go-yaml"
)

// Source is where a kernel's source came from.
type Source struct {
	Path    string `json:"path"`
	Package string `json:"package,omitempty"` // Debian's, if that is what Path belongs to
	Version string `json:"version,omitempty"` // of the package
	Wanted  string `json:"wanted,omitempty"`  // version in source.lock
	SHA256  string `json:"sha256"`            // of the tarball; of a tree, over names, sizes and times
	Locked  bool   `json:"locked"`            // it is exactly what source.lock names

	tree bool
}

// lock is source.lock.
type lock struct {
	Package string `yaml:"package"`
	Version string `yaml:"version"`
	Path    string `yaml:"path"`
	SHA256  string `yaml:"sha256"`
}

// ErrNoSource is what Build's error wraps if Debian's package is not installed
// and no other source was given.
var ErrNoSource = errors.New("no kernel source")

// ErrNotLocked is what Build's error wraps if Options.Locked is set and the
// source at hand is not the one in source.lock.
var ErrNotLocked = errors.New("not the locked source")

func readLock() (lock, error) {
	data, err := files.ReadFile("source.lock")
	if err != nil {
		return lock{}, err
	}
	var l lock
	if err := yaml.UnmarshalWithOptions(data, &l, yaml.Strict()); err != nil {
		return lock{}, fmt.Errorf("source.lock: %w", err)
	}
	return l, nil
}

func findSource(ctx context.Context, o Options, c cache) (Source, error) {
	l, err := readLock()
	if err != nil {
		return Source{}, err
	}
	if o.lock != nil {
		l = *o.lock
	}
	s := Source{Path: o.Source, Wanted: l.Version}
	if s.Path == "" {
		s.Path, s.Package = l.Path, l.Package
	}
	if s.Path, err = filepath.Abs(s.Path); err != nil {
		return Source{}, err
	}
	fi, err := os.Stat(s.Path)
	switch {
	case errors.Is(err, os.ErrNotExist) && s.Package != "":
		return Source{}, fmt.Errorf("%w at %s: apt-get install %s, or give a tree or tarball of Linux 6.12 with --kernel-source", ErrNoSource, s.Path, s.Package)
	case err != nil:
		return Source{}, fmt.Errorf("kernel source: %w; --kernel-source is a tree or a tarball of Linux 6.12", err)
	case !fi.IsDir() && !fi.Mode().IsRegular():
		return Source{}, fmt.Errorf("kernel source: %s is neither a folder nor a file; --kernel-source is a tree or a tarball of Linux 6.12", s.Path)
	}
	if s.tree = fi.IsDir(); s.tree {
		s.SHA256, err = fingerprint(ctx, s.Path)
	} else {
		s.SHA256, err = c.fileHash(s.Path)
	}
	if err != nil {
		return Source{}, fmt.Errorf("kernel source: %w", err)
	}
	if s.Locked = s.SHA256 == l.SHA256; s.Locked {
		s.Package, s.Version = l.Package, l.Version
	} else if s.Package != "" {
		s.Version = installedVersion(ctx, s.Package)
	}
	if o.Locked && !s.Locked {
		return Source{}, fmt.Errorf("%w: %s has SHA-256 %s; source.lock wants %s of %s %s", ErrNotLocked, s.Path, s.SHA256, l.SHA256, l.Package, l.Version)
	}
	return s, nil
}

func installedVersion(ctx context.Context, pkg string) string {
	out, err := exec.CommandContext(ctx, "dpkg-query", "-W", "-f", "${Version}", pkg).Output()
	if err != nil {
		return "of unknown version"
	}
	return strings.TrimSpace(string(out))
}

// fingerprint stands for the contents of a source tree: names, sizes and times
// of its files. Reading 1.5 GB each time would make nothing instant.
func fingerprint(ctx context.Context, dir string) (string, error) {
	if _, err := os.Stat(filepath.Join(dir, "Kbuild")); err != nil {
		return "", fmt.Errorf("%s is no kernel source (%w); --kernel-source is a tree or a tarball of Linux 6.12", dir, err)
	}
	if _, err := os.Stat(filepath.Join(dir, ".config")); err == nil {
		return "", fmt.Errorf("something was built in %s: run make mrproper there", dir)
	}
	h := sha256.New()
	w := bufio.NewWriter(h)
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() {
			if d.Name() == ".git" {
				return fs.SkipDir
			}
			return ctx.Err()
		}
		fi, err := d.Info()
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(dir, path)
		if err != nil {
			return err
		}
		fmt.Fprintf(w, "%q %d %d %s\n", rel, fi.Size(), fi.ModTime().UnixNano(), fi.Mode())
		return nil
	})
	if err := errors.Join(err, w.Flush()); err != nil {
		return "", err
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

// checkSource looks into a tarball that is not unpacked yet; a tree was looked at
// when it was found.
func (b *builder) checkSource(ctx context.Context) error {
	if _, err := os.Stat(b.treeDir()); err == nil || b.source.tree {
		return nil
	}
	// To the end of a tarball that is none, and else to the file after Documentation/.
	cmd := b.tools.command(ctx, "tar", "-t", "--occurrence=1", "--no-wildcards-match-slash", "--wildcards", "-f", b.source.Path, "*/Kbuild")
	var said bytes.Buffer
	cmd.Stderr = &said
	if err := run(cmd); err != nil {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		first, _, _ := strings.Cut(said.String(), "\n")
		return fmt.Errorf("%s is no kernel source (%s); --kernel-source is a tree or a tarball of Linux 6.12", b.source.Path, first)
	}
	return nil
}

// treeDir is where the unpacked and patched source is, or will be.
func (b *builder) treeDir() string {
	patches := sha256.New()
	for _, p := range b.patches {
		fmt.Fprintf(patches, "%s %s\n", p.name, sum(p.data))
	}
	return filepath.Join(b.cache.dir, "source-"+b.source.SHA256[:12]+"-"+hex.EncodeToString(patches.Sum(nil))[:12])
}

type tree struct{ dir string }

// tree returns the unpacked and patched source. The caller holds the cache's
// lock. Only the tree used last is kept: it has 1.7 GB.
func (b *builder) tree(ctx context.Context) (tree, error) {
	t := tree{b.treeDir()}
	if _, err := os.Stat(t.dir); err == nil {
		return t, nil
	}
	old, _ := filepath.Glob(filepath.Join(b.cache.dir, "source-*"))
	for _, dir := range old {
		b.status("removing the source used before")
		if err := os.RemoveAll(dir); err != nil {
			return tree{}, err
		}
	}
	scratch, err := b.cache.scratch()
	if err != nil {
		return tree{}, err
	}
	defer os.RemoveAll(scratch)
	top := filepath.Join(scratch, "source")
	if err := os.Mkdir(top, 0o755); err != nil {
		return tree{}, err
	}
	b.status("unpacking %s", filepath.Base(b.source.Path))
	if err := b.unpack(ctx, top); err != nil {
		return tree{}, fmt.Errorf("unpacking %s: %w", b.source.Path, err)
	}
	for _, p := range b.patches {
		b.status("applying %s", p.name)
		if err := p.apply(top); err != nil {
			return tree{}, fmt.Errorf("patching the source: %w", err)
		}
	}
	return t, os.Rename(top, t.dir)
}

func (b *builder) unpack(ctx context.Context, top string) error {
	args := []string{"tar", "-x", "--no-same-owner", "--strip-components=1", "-C", top, "-f", b.source.Path}
	if b.source.tree {
		args = []string{"cp", "-a", "--reflink=auto", "-t", top}
		entries, err := os.ReadDir(b.source.Path)
		if err != nil {
			return err
		}
		for _, e := range entries {
			if e.Name() != ".git" {
				args = append(args, filepath.Join(b.source.Path, e.Name()))
			}
		}
	}
	cmd := b.tools.command(ctx, args...)
	var said bytes.Buffer
	cmd.Stdout, cmd.Stderr = &said, &said
	if err := run(cmd); err != nil {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		return fmt.Errorf("%s: %w: %s", args[0], err, lastLines(said.String(), 5))
	}
	if _, err := os.Stat(filepath.Join(top, "Kbuild")); err != nil {
		return fmt.Errorf("it is no kernel source: %w", err)
	}
	return nil
}
