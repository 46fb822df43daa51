package bundle

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/klauspost/compress/zstd"
	"github.com/u-root/u-root/pkg/cpio"

	"clonecluster/config"
	"clonecluster/image"
	"clonecluster/image/uki"
)

// Rebuild builds again, in a folder of its own below temp (made if need be), what the manifest of
// the folder dir says, from the configuration and the content in that folder and
// the checkout and kernel source of the options. It gives the first thing that
// is different, nil if nothing is.
func Rebuild(ctx context.Context, dir string, m *image.Manifest, o Options, temp string) (*Problem, error) {
	err := os.MkdirAll(temp, 0o755)
	var tmp string
	if err == nil {
		tmp, err = os.MkdirTemp(temp, "verify-")
	}
	if err != nil {
		return nil, fmt.Errorf("building again needs a folder that can be written to; give one with --cache or $CLONECLUSTER_CACHE: %w", err)
	}
	defer os.RemoveAll(tmp)
	packed, err := os.ReadFile(filepath.Join(dir, ConfigName))
	if err != nil {
		return nil, fmt.Errorf("building again needs the configuration in %s: %w", ConfigName, err)
	}
	if o.Config, o.Content, err = unpackConfig(packed, filepath.Join(tmp, "content")); err != nil {
		return nil, fmt.Errorf("%s: %w", ConfigName, err)
	}
	if err := needSources(o.Config, o.ConfigDir); err != nil {
		return nil, err
	}
	if o.Board.Name != m.Board {
		return nil, fmt.Errorf("the manifest is of the board %s, not %s", m.Board, o.Board.Name)
	}
	_, full := m.Find(EFIName)
	o.Debug, o.Minimal, o.OutDir, o.Key = m.Debug, !full, filepath.Join(tmp, "out"), nil
	if m.SecureBoot != "" {
		// What the signature is of is compared; only who has the key can make another.
		o.SecureBoot = &SecureBoot{Dir: dir, Fingerprint: m.SecureBoot}
	}
	again, err := Build(ctx, o)
	if err != nil {
		return nil, fmt.Errorf("building again: %w", err)
	}
	return compare(dir, o.OutDir, m, again)
}

// needSources makes sure that what services are built from is there: a build's
// folder has only what came out.
func needSources(yaml []byte, dir string) error {
	c, err := config.Load(yaml, "cluster.yaml")
	if err != nil {
		return fmt.Errorf("%s: %w", ConfigName, err)
	}
	for _, s := range c.Services {
		if !config.IsPath(s.Build) {
			continue
		}
		source, fix := s.Build, "put them there"
		if !filepath.IsAbs(source) {
			source, fix = filepath.Join(dir, source), "give the build's cluster.yaml, beside which they are, with --config"
		}
		if _, err := os.Stat(source); errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("building again needs the sources of services.%s (build: %s), and there is no %s; %s", s.Name, s.Build, source, fix)
		}
	}
	return nil
}

// unpackConfig takes the configuration and the content out of a config.cpio;
// the content goes below dir.
func unpackConfig(packed []byte, dir string) (yaml []byte, content map[string]string, err error) {
	content = map[string]string{}
	records, err := unpack(packed)
	if err != nil {
		return nil, nil, err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, nil, err
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, nil, err
	}
	defer root.Close()
	for _, r := range records {
		switch {
		case r.Name == image.ConfigFile:
			yaml = r.Data
		case !strings.HasPrefix(r.Name, "srv/"):
		case r.Mode&cpio.S_IFMT == cpio.S_IFDIR:
			if err := root.MkdirAll(r.Name, 0o700); err != nil {
				return nil, nil, err
			}
			if strings.Count(r.Name, "/") == 1 {
				content[r.Name] = filepath.Join(dir, r.Name)
			}
		default:
			if err := root.WriteFile(r.Name, r.Data, 0o600); err != nil {
				return nil, nil, err
			}
		}
	}
	if yaml == nil {
		return nil, nil, fmt.Errorf("has no %s", image.ConfigFile)
	}
	return yaml, content, nil
}

// compare gives the first difference: of the inputs, which explains the others,
// then of the outputs, those first of which others are made.
func compare(dir, other string, m, again *image.Manifest) (*Problem, error) {
	if m.Go != again.Go {
		return &Problem{"go", fmt.Sprintf("the manifest has %s, this machine %s", m.Go, again.Go)}, nil
	}
	if m.Kernel != nil && again.Kernel != nil && m.Kernel.SHA256 != again.Kernel.SHA256 && m.Kernel.Key != again.Kernel.Key {
		return &Problem{kernelOf(m), fmt.Sprintf("is built from something else here: the manifest has source %s, %s, configuration %.12s; this machine %s, %s, %.12s",
			m.Kernel.Version, strings.Join(m.Kernel.Inputs.Tools, ", "), m.Kernel.Inputs.Config,
			again.Kernel.Version, strings.Join(again.Kernel.Inputs.Tools, ", "), again.Kernel.Inputs.Config)}, nil
	}
	if f, how := differs(m.Inputs, again.Inputs); f != "" {
		return &Problem{f, "is an input, and " + how}, nil
	}
	for _, name := range append(order(m), order(again)...) {
		a, errA := os.ReadFile(filepath.Join(dir, name))
		b, errB := os.ReadFile(filepath.Join(other, name))
		switch {
		case errors.Is(errA, fs.ErrNotExist):
			return &Problem{name, "is missing"}, nil
		case errors.Is(errB, fs.ErrNotExist):
			return &Problem{name, "is not made by a build of these inputs"}, nil
		case errA != nil || errB != nil:
			return nil, errors.Join(errA, errB)
		case !bytes.Equal(a, b):
			return &Problem{name, "differs from what was built again" + inside(a, b)}, nil
		}
	}
	return nil, nil
}

// kernelOf is the name of a folder's kernel.
func kernelOf(m *image.Manifest) string {
	for _, name := range KernelFiles() {
		if _, ok := m.Find(name); ok {
			return name
		}
	}
	return KernelName
}

// order lists a folder's files, those first of which others are made.
func order(m *image.Manifest) []string {
	names := []string{kernelOf(m), image.BaseName(m.Debug), image.ServicesName, ConfigName, InitrdName, EFIName, StickName}
	names = slices.DeleteFunc(names, func(n string) bool { _, ok := m.Find(n); return !ok })
	for _, f := range m.Files() {
		if !slices.Contains(names, f.Name) {
			names = append(names, f.Name)
		}
	}
	return append(names, ManifestName)
}

// differs gives the first file that is not the same in both lists.
func differs(manifest, here []image.File) (name, how string) {
	all := map[string][2]string{}
	for i, list := range [][]image.File{manifest, here} {
		for _, f := range list {
			pair := all[f.Name]
			pair[i] = f.SHA256
			all[f.Name] = pair
		}
	}
	for _, name := range slices.Sorted(maps.Keys(all)) {
		switch pair := all[name]; {
		case pair[0] == pair[1]:
		case pair[0] == "":
			return name, "the manifest does not have it"
		case pair[1] == "":
			return name, "is not here"
		default:
			return name, "has changed since"
		}
	}
	return "", ""
}

// inside says where within two versions of a file the first difference is, if
// it is a file with members.
func inside(a, b []byte) string {
	if x, err := uki.Read(a); err == nil {
		y, err := uki.Read(b)
		if err != nil {
			return ""
		}
		for _, s := range y.Sections {
			o := x.Section(s.Name)
			if o == nil || !bytes.Equal(o.Data, s.Data) {
				return ", first in its section " + s.Name
			}
		}
		return ", in its headers"
	}
	x, errX := unpack(a)
	y, errY := unpack(b)
	if errX != nil || errY != nil {
		for i := range min(len(a), len(b)) {
			if a[i] != b[i] {
				return fmt.Sprintf(", first at byte %d", i)
			}
		}
		return fmt.Sprintf(": it has %d bytes, not %d", len(a), len(b))
	}
	for i := range min(len(x), len(y)) {
		if x[i].Name != y[i].Name {
			return ", first in its member " + min(x[i].Name, y[i].Name) + ", which one of them has not"
		}
		if x[i].Mode != y[i].Mode || !bytes.Equal(x[i].Data, y[i].Data) {
			return ", first in its member " + x[i].Name
		}
	}
	if len(x) != len(y) {
		return fmt.Sprintf(": it has %d members, not %d", len(x), len(y))
	}
	return ", in how it is packed"
}

// maxWindow bounds what a frame may ask for before it has given anything: twice
// what image.Compress uses.
const maxWindow = 32 << 20

// unpack gives the members of an archive, plain or one zstd frame.
func unpack(data []byte) ([]image.Member, error) {
	if bytes.HasPrefix(data, []byte{0x28, 0xb5, 0x2f, 0xfd}) {
		// As a stream: a frame's header may promise more than there is, and all of
		// that would be allocated at once.
		d, err := zstd.NewReader(bytes.NewReader(data), zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxWindow(maxWindow))
		if err != nil {
			return nil, err
		}
		defer d.Close()
		if data, err = io.ReadAll(io.LimitReader(d, image.MaxContent)); err != nil {
			return nil, err
		}
	}
	if !bytes.HasPrefix(data, []byte("0707")) {
		return nil, errors.New("it is no cpio archive")
	}
	return image.Members(data)
}
