package bundle

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"net/url"
	"os"
	"path"
	"slices"
	"strings"
	"time"

	"aead.dev/minisign"

	"clonecluster/image"
)

// Report is what Verify found.
type Report struct {
	Source    string    `json:"source"`
	Cluster   string    `json:"cluster"`
	Board     string    `json:"board"`
	Signature string    `json:"signature"` // "good", "bad", "none", or "unchecked" without a public key
	Files     int       `json:"files"`     // whose hashes were right
	Bytes     int64     `json:"bytes"`     // of them
	Problems  []Problem `json:"problems"`
	Notes     []string  `json:"notes,omitempty"`
}

// Problem is something that is not as the manifest says.
type Problem struct {
	File    string `json:"file"`
	Message string `json:"message"`
}

func (p Problem) String() string { return p.File + ": " + p.Message }

func (r *Report) problem(file, format string, args ...any) {
	r.Problems = append(r.Problems, Problem{file, fmt.Sprintf(format, args...)})
}

// VerifyOptions says what is to hold besides the hashes.
type VerifyOptions struct {
	PublicKey *minisign.PublicKey // nil: the signature is not checked
	Board     string              // empty: any
	Client    *http.Client        // for a URL; default: one that waits a minute for headers
	Status    func(string)        // may be nil
}

// maxMeta bounds the manifest and the files like it.
const maxMeta = 16 << 20

// source is where a build's files are.
type source interface {
	// open gives a file and its size, -1 if that is not known. The error wraps
	// fs.ErrNotExist if it is not there.
	open(ctx context.Context, name string) (io.ReadCloser, int64, error)
	// list gives all files; nil where that cannot be known.
	list() ([]string, error)
}

// Verify compares the files of a folder with its manifest.
func Verify(ctx context.Context, dir string, o VerifyOptions) (*Report, *image.Manifest, error) {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, nil, err
	}
	defer root.Close()
	return verify(ctx, dir, folder{root}, o)
}

// VerifyURL is Verify of a folder on an HTTP server. No more is read of a file
// than the manifest says that it has.
func VerifyURL(ctx context.Context, address string, o VerifyOptions) (*Report, *image.Manifest, error) {
	u, err := url.Parse(address)
	if err != nil || u.Host == "" || u.Scheme != "http" && u.Scheme != "https" {
		return nil, nil, fmt.Errorf("%q is no http or https URL of a folder", address)
	}
	u.Path = strings.TrimSuffix(strings.TrimSuffix(u.Path, ManifestName), "/") + "/"
	if o.Client == nil {
		t := http.DefaultTransport.(*http.Transport).Clone()
		t.ResponseHeaderTimeout = time.Minute
		o.Client = &http.Client{Transport: t}
	}
	return verify(ctx, u.String(), server{u, o.Client}, o)
}

// readMeta reads a small file whole.
func readMeta(ctx context.Context, s source, name string) ([]byte, error) {
	f, _, err := s.open(ctx, name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxMeta+1))
	if err != nil {
		return nil, fmt.Errorf("reading %s: %w", name, err)
	}
	if len(data) > maxMeta {
		return nil, fmt.Errorf("%s: larger than %d MiB", name, maxMeta>>20)
	}
	return data, nil
}

func verify(ctx context.Context, where string, s source, o VerifyOptions) (*Report, *image.Manifest, error) {
	text, err := readMeta(ctx, s, ManifestName)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil, fmt.Errorf("%s has no %s: it is no output folder of clonectl build (%w)", where, ManifestName, err)
	} else if err != nil {
		return nil, nil, err
	}
	r := &Report{Source: where, Problems: []Problem{}}
	if err := r.signature(ctx, s, text, o); err != nil {
		return nil, nil, err
	}
	m, err := image.ParseManifest(text)
	if err != nil {
		r.problem(ManifestName, "%v", err)
		return r, nil, nil
	}
	r.about(m, o)
	if err := r.sums(ctx, s, m, text); err != nil {
		return nil, nil, err
	}
	for _, f := range m.Files() {
		if o.Status != nil {
			o.Status(f.Name)
		}
		if err := r.file(ctx, s, f); err != nil {
			return nil, nil, err
		}
	}
	return r, m, r.extra(s, m)
}

// about checks what the manifest says of itself.
func (r *Report) about(m *image.Manifest, o VerifyOptions) {
	r.Cluster, r.Board = m.Cluster, m.Board
	if o.Board != "" && o.Board != m.Board {
		r.problem(ManifestName, "is of a build for the board %s, not %s: build with --board %s", m.Board, o.Board, o.Board)
	}
	if m.Debug {
		r.Notes = append(r.Notes, "the image has a debug shell: it is not for a machine in service")
	}
}

func (r *Report) signature(ctx context.Context, s source, manifest []byte, o VerifyOptions) error {
	sig, err := readMeta(ctx, s, SignatureName)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		r.Signature = "none"
		if o.PublicKey != nil {
			r.problem(SignatureName, "is missing: the manifest is not signed; build with --key")
		}
	case err != nil:
		return err
	case o.PublicKey == nil:
		r.Signature = "unchecked"
		r.Notes = append(r.Notes, "the manifest is signed; give --public-key to check by whom")
	case minisign.Verify(*o.PublicKey, manifest, sig):
		r.Signature = "good"
	default:
		r.Signature = "bad"
		var parsed minisign.Signature
		switch err := parsed.UnmarshalText(sig); {
		case err != nil:
			r.problem(SignatureName, "is no minisign signature")
		case parsed.KeyID != o.PublicKey.ID():
			r.problem(SignatureName, "is by another key, %016X; the public key is %016X", parsed.KeyID, o.PublicKey.ID())
		default:
			r.problem(ManifestName, "has been changed since it was signed")
		}
	}
	return nil
}

// sums checks that SHA256SUMS says the same as the manifest.
func (r *Report) sums(ctx context.Context, s source, m *image.Manifest, manifest []byte) error {
	got, err := readMeta(ctx, s, SumsName)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		r.problem(SumsName, "is missing")
	case err != nil:
		return err
	case !bytes.Equal(got, sums(m, manifest)):
		r.problem(SumsName, "does not say what the manifest says")
	}
	return nil
}

// file checks one file; the error is of the context.
func (r *Report) file(ctx context.Context, s source, f image.File) error {
	in, size, err := s.open(ctx, f.Name)
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			r.problem(f.Name, "is missing")
			return ctx.Err()
		}
		r.problem(f.Name, "cannot be read: %v", err)
		return ctx.Err()
	}
	defer in.Close()
	if size > f.Bytes {
		r.problem(f.Name, "has %d bytes; the manifest says %d", size, f.Bytes)
		return nil
	}
	h := sha256.New()
	n, err := io.Copy(h, io.LimitReader(in, f.Bytes+1))
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case n > f.Bytes:
		r.problem(f.Name, "has more than the %d bytes that the manifest says", f.Bytes)
	case n < f.Bytes:
		r.problem(f.Name, "is truncated: %d of %d bytes; copy or download it again", n, f.Bytes)
	case err != nil:
		r.problem(f.Name, "cannot be read: %v", err)
	case hex.EncodeToString(h.Sum(nil)) != f.SHA256:
		r.problem(f.Name, "has been changed: its SHA-256 is %x; the manifest says %s", h.Sum(nil), f.SHA256)
	default:
		r.Files++
		r.Bytes += n
	}
	return nil
}

// extra finds files that no build has made. Hidden ones are of a build that
// runs, or of a tool.
func (r *Report) extra(s source, m *image.Manifest) error {
	all, err := s.list()
	if err != nil {
		return err
	}
	for _, name := range all {
		if _, ok := m.Find(name); ok || slices.Contains([]string{ManifestName, SignatureName, SumsName}, name) {
			continue
		}
		r.problem(name, "is not in the manifest: it is of another build, or somebody put it here")
	}
	return nil
}

type folder struct{ root *os.Root }

func (f folder) open(_ context.Context, name string) (io.ReadCloser, int64, error) {
	fi, err := f.root.Lstat(name)
	if err != nil {
		return nil, 0, err
	}
	if !fi.Mode().IsRegular() {
		return nil, 0, errors.New("it is no regular file")
	}
	file, err := f.root.Open(name)
	return file, fi.Size(), err
}

func (f folder) list() (names []string, err error) {
	err = fs.WalkDir(f.root.FS(), ".", func(name string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case name != "." && strings.HasPrefix(path.Base(name), "."):
			if d.IsDir() {
				return fs.SkipDir
			}
		case !d.IsDir():
			names = append(names, name)
		}
		return nil
	})
	return names, err
}

type server struct {
	base   *url.URL
	client *http.Client
}

func (s server) open(ctx context.Context, name string) (io.ReadCloser, int64, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, s.base.JoinPath(name).String(), nil)
	if err != nil {
		return nil, 0, err
	}
	resp, err := s.client.Do(req)
	if err != nil {
		return nil, 0, err
	}
	switch resp.StatusCode {
	case http.StatusOK:
		return resp.Body, resp.ContentLength, nil
	case http.StatusNotFound, http.StatusGone:
		err = fs.ErrNotExist
	default:
		err = errors.New(resp.Status)
	}
	resp.Body.Close()
	return nil, 0, fmt.Errorf("GET %s: %w", req.URL, err)
}

func (server) list() ([]string, error) { return nil, nil }
