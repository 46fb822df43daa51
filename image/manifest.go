package image

import (
	"encoding/json"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"clonecluster/image/kernel"
)

// Recipe counts changes of this program that change what it builds of the same
// inputs.
const Recipe = 1

// Manifest says what an image was made from and what came out. It holds no
// time and no path: the same inputs give the same manifest.
type Manifest struct {
	Format  int    `json:"format"` // 1
	Recipe  int    `json:"recipe,omitempty"`
	Cluster string `json:"cluster,omitempty"` // its name
	Board   string `json:"board"`
	Arch    string `json:"arch"`
	Debug   bool   `json:"debug"`
	Cmdline string `json:"cmdline,omitempty"` // the kernel's, where no firmware or loader gives another
	Go      string `json:"go"`
	// SecureBoot is the SHA-256 of the certificate (DER) with which the unified
	// kernel image is signed, empty if it is not.
	SecureBoot string    `json:"secure_boot,omitempty"`
	Kernel     *Kernel   `json:"kernel,omitempty"`
	Services   []Service `json:"services,omitempty"`
	Packages   []Package `json:"packages,omitempty"`
	Modules    []Module  `json:"modules"`
	// Inputs are files by where they came from: "source/" is the checkout,
	// "content/" what services serve, "service/" their sources.
	Inputs []File `json:"inputs"`
	// Outputs are the files of the folder, and those of the image by their full
	// path there.
	Outputs []File `json:"outputs"`
	// Stick are the files of the USB image's file system.
	Stick []File `json:"stick,omitempty"`
}

// Service is a program that is in the image because cluster.yaml says so.
type Service struct {
	Path  string `json:"path"`         // in the image, "/bin/hello"
	Build string `json:"build"`        // as in cluster.yaml
	Go    string `json:"go,omitempty"` // version of the toolchain; empty for a binary that came as it is
	// Modules are what the program has of others, itself included if it came
	// from one.
	Modules []Module `json:"modules,omitempty"`
}

// Package is a Debian package of which a file is in an output.
type Package struct {
	Name    string `json:"name"`
	Version string `json:"version"` // "unknown" on a host without dpkg
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
	sortFiles(*list)
	return nil
}

func sortFiles(list []File) {
	slices.SortFunc(list, func(a, b File) int { return strings.Compare(a.Name, b.Name) })
}

// NewFile is the file of that name and these bytes.
func NewFile(name string, data []byte) File {
	return File{Name: name, Bytes: int64(len(data)), SHA256: sum(data)}
}

// AddInputs records inputs whose hashes are known.
func (m *Manifest) AddInputs(files ...File) {
	m.Inputs = append(m.Inputs, files...)
	sortFiles(m.Inputs)
}

// AddOutputs records outputs whose hashes are known.
func (m *Manifest) AddOutputs(files ...File) {
	m.Outputs = append(m.Outputs, files...)
	sortFiles(m.Outputs)
}

// Files gives the outputs that are files of the folder.
func (m *Manifest) Files() []File {
	return slices.DeleteFunc(slices.Clone(m.Outputs), func(f File) bool { return strings.HasPrefix(f.Name, "/") })
}

// Write writes the manifest as JSON.
func (m *Manifest) Write(path string) error {
	b, err := m.Bytes()
	if err != nil {
		return err
	}
	return WriteFile(path, b, 0o644)
}

// Bytes is the manifest as JSON.
func (m *Manifest) Bytes() ([]byte, error) {
	b, err := json.MarshalIndent(m, "", "  ")
	if err != nil {
		return nil, err
	}
	return append(b, '\n'), nil
}

// ReadManifest reads what Write wrote.
func ReadManifest(path string) (*Manifest, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	m, err := ParseManifest(b)
	if err != nil {
		return nil, fmt.Errorf("reading %s: %w", path, err)
	}
	return m, nil
}

// ParseManifest reads what Bytes gave. Names that would lead out of the folder
// are errors.
func ParseManifest(data []byte) (*Manifest, error) {
	m := new(Manifest)
	if err := json.Unmarshal(data, m); err != nil {
		return nil, fmt.Errorf("it is no manifest: %w", err)
	}
	if m.Format != 1 {
		return nil, fmt.Errorf("format %d; this program knows 1", m.Format)
	}
	for _, f := range m.Outputs {
		if !fs.ValidPath(strings.TrimPrefix(f.Name, "/")) || f.Bytes < 0 || len(f.SHA256) != 64 {
			return nil, fmt.Errorf("output %q, of %d bytes, SHA-256 %q: no build writes that", f.Name, f.Bytes, f.SHA256)
		}
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
