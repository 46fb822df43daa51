package image

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"clonecluster/image/kernel"
)

// Manifest says what an image was made from and what came out. It holds no
// time and no path: the same inputs give the same manifest.
type Manifest struct {
	Format  int      `json:"format"` // 1
	Board   string   `json:"board"`
	Arch    string   `json:"arch"`
	Debug   bool     `json:"debug"`
	Go      string   `json:"go"`
	Kernel  *Kernel  `json:"kernel,omitempty"`
	Modules []Module `json:"modules"`
	Inputs  []File   `json:"inputs"`
	Outputs []File   `json:"outputs"`
}

// Kernel says which kernel an image has, and what it was made from.
type Kernel struct {
	Package string `json:"package,omitempty"` // Debian's source package; empty if the source came from elsewhere
	Version string `json:"version,omitempty"` // of the package, "6.12.117-1~deb12u1"
	Wanted  string `json:"wanted,omitempty"`  // the version that the lock file names
	Locked  bool   `json:"locked"`            // the source is exactly the one the lock file names
	SHA256  string `json:"sha256"`            // of the bzImage
	Key     string `json:"key"`               // hash of Inputs
	// Inputs are the source, the patches, the configuration, the tools and the
	// environment of the build, by their hashes or as they were.
	Inputs kernel.Inputs `json:"inputs"`
}

// KernelOf says what an image's manifest does of a built kernel.
func KernelOf(r *kernel.Result) *Kernel {
	return &Kernel{
		Package: r.Source.Package, Version: r.Source.Version, Wanted: r.Source.Wanted, Locked: r.Source.Locked,
		SHA256: r.SHA256, Key: r.Key, Inputs: r.Inputs,
	}
}

// Module is a Go module that is in a program of the image. Sum is the
// checksum that go.sum has for it.
type Module struct {
	Path    string `json:"path"`
	Version string `json:"version"`
	Sum     string `json:"sum,omitempty"`
}

// File is a file by its bytes.
type File struct {
	Name   string `json:"name"`
	Bytes  int64  `json:"bytes"`
	SHA256 string `json:"sha256"`
}

// NewManifest starts a manifest with what is known of the base image: its
// modules, its programs and go.mod and go.sum of the checkout it came from.
// kernel may be nil.
func NewManifest(board string, base *Base, kernel *Kernel) (*Manifest, error) {
	m := &Manifest{
		Format: 1, Board: board, Arch: base.Arch, Debug: base.Debug, Go: base.Go, Kernel: kernel,
		Modules: base.Modules,
		Inputs:  []File{},
		Outputs: slices.Clone(base.Programs),
	}
	for i := range m.Outputs {
		m.Outputs[i].Name = "/" + m.Outputs[i].Name // in the image
	}
	if err := m.Input(filepath.Join(base.source, "go.mod"), filepath.Join(base.source, "go.sum")); err != nil {
		return nil, err
	}
	return m, m.Output(base.Path)
}

// Input records files that went into the image, by their base names.
func (m *Manifest) Input(paths ...string) error { return record(&m.Inputs, paths) }

// Output records files that came out, by their base names.
func (m *Manifest) Output(paths ...string) error { return record(&m.Outputs, paths) }

func record(list *[]File, paths []string) error {
	for _, p := range paths {
		hash, size, err := sumFile(p)
		if err != nil {
			return fmt.Errorf("recording in the manifest: %w", err)
		}
		*list = append(*list, File{Name: filepath.Base(p), Bytes: size, SHA256: hash})
	}
	slices.SortFunc(*list, func(a, b File) int { return strings.Compare(a.Name, b.Name) })
	return nil
}

// Write writes the manifest as JSON.
func (m *Manifest) Write(path string) error {
	b, err := json.MarshalIndent(m, "", "  ")
	if err != nil {
		return err
	}
	return WriteFile(path, append(b, '\n'), 0o644)
}

// ReadManifest reads what Write wrote.
func ReadManifest(path string) (*Manifest, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	m := new(Manifest)
	if err := json.Unmarshal(b, m); err != nil {
		return nil, fmt.Errorf("reading %s: %w", path, err)
	}
	if m.Format != 1 {
		return nil, fmt.Errorf("reading %s: format %d; this program knows 1", path, m.Format)
	}
	return m, nil
}

// Find gives the output of that name, if there is one.
func (m *Manifest) Find(name string) (File, bool) {
	i := slices.IndexFunc(m.Outputs, func(f File) bool { return f.Name == name })
	if i < 0 {
		return File{}, false
	}
	return m.Outputs[i], true
}
