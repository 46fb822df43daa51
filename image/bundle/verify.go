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
	Of        int       `json:"of"`        // so many that were to be compared
	Bytes     int64     `json:"bytes"`     // of those that were right
	Problems  []Problem `json:"problems"`
	// Unread are the files that could not be read: nothing is known of them.
	Unread []Problem `json:"unread,omitempty"`
	Notes  []string  `json:"notes,omitempty"`
	// SHA256 is that of the disk image, or of as much of a device, that VerifyDisk read.
	SHA256 string `json:"sha256,omitempty"`
	// Denied says that the user may not read one of those Unread.
	Denied bool `json:"-"`
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

func (r *Report) unread(file string, err error) {
	r.Unread = append(r.Unread, Problem{file, fmt.Sprintf("cannot be read: %v", err)})
	r.Denied = r.Denied || errors.Is(err, fs.ErrPermission)
}

// Unsigned tells that the manifest is not signed by the public key of the options;
// the first of the problems says why.
func (r *Report) Unsigned(o VerifyOptions) bool {
	return o.PublicKey != nil && r.Signature != "good"
}

// VerifyOptions says what is to hold besides the hashes.
type VerifyOptions struct {
	PublicKey *minisign.PublicKey // nil: the signature is not checked
	Board     string              // empty: any
	Client    *http.Client        // for a URL; default: one that waits a minute for headers
	// Files are the ones to compare, where they are there or in the manifest; nil
	// means all, and that there is nothing else.
	Files []string
	// Progress is told how many bytes of which file are read; may be nil.
	Progress func(name string, done, size int64)
}

// reader gives what is read of a file, no more than size, until the end of ctx.
func (o VerifyOptions) reader(ctx context.Context, in io.Reader, name string, size int64) io.Reader {
	return &watched{ctx: ctx, in: in, progress: func(done int64) {
		if o.Progress != nil {
			o.Progress(name, done, size)
		}
	}}
}

// watched is a reader that ends with its context, and tells how far it is.
type watched struct {
	ctx      context.Context
	in       io.Reader
	done     int64
	progress func(done int64)
}

func (w *watched) Read(b []byte) (int, error) {
	if err := w.ctx.Err(); err != nil {
		return 0, err
	}
	n, err := w.in.Read(b)
	w.done += int64(n)
	w.progress(w.done)
	return n, err
}

// hash gives the SHA-256 of what is read, and its length.
func hash(in io.Reader) (sum string, n int64, err error) {
	h := sha256.New()
	n, err = io.CopyBuffer(h, in, make([]byte, 1<<20))
	return hex.EncodeToString(h.Sum(nil)), n, err
}

// again is what mends a file that is not as the manifest says.
const again = "copy or download it again, or build it again"

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

// ErrURL is what VerifyURL's error for another address wraps.
var ErrURL = errors.New("is no http or https URL of a folder")

// VerifyURL is Verify of a folder on an HTTP server. No more is read of a file
// than the manifest says that it has.
func VerifyURL(ctx context.Context, address string, o VerifyOptions) (*Report, *image.Manifest, error) {
	u, err := url.Parse(address)
	if err != nil || u.Host == "" || u.Scheme != "http" && u.Scheme != "https" {
		return nil, nil, fmt.Errorf("%q %w", address, ErrURL)
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
	files := m.Files()
	if o.Files == nil {
		if err := r.sums(ctx, s, m, text); err != nil {
			return nil, nil, err
		}
	} else {
		files = slices.DeleteFunc(files, func(f image.File) bool { return !slices.Contains(o.Files, f.Name) })
	}
	r.Of = len(files)
	for _, f := range files {
		if err := r.file(ctx, s, f, o); err != nil {
			return nil, nil, err
		}
	}
	return r, m, r.extra(s, m, o.Files)
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
			r.problem(SignatureName, "is missing: the manifest is not signed; build with --key, or copy the signature of the build there")
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
			r.problem(SignatureName, "is no minisign signature; build with --key, or copy it again")
		case parsed.KeyID != o.PublicKey.ID():
			r.problem(SignatureName, "is by another key, %016X; the public key is %016X: get the right public key, or build with --key", parsed.KeyID, o.PublicKey.ID())
		default:
			r.problem(ManifestName, "has been changed since it was signed; build it again, or copy manifest and signature again")
		}
	}
	return nil
}

// sums checks that SHA256SUMS says the same as the manifest.
func (r *Report) sums(ctx context.Context, s source, m *image.Manifest, manifest []byte) error {
	got, err := readMeta(ctx, s, SumsName)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		r.problem(SumsName, "is missing; %s", again)
	case err != nil:
		return err
	case !bytes.Equal(got, sums(m, manifest)):
		r.problem(SumsName, "does not say what the manifest says")
	}
	return nil
}

// file checks one file; the error is of the context.
func (r *Report) file(ctx context.Context, s source, f image.File, o VerifyOptions) error {
	in, size, err := s.open(ctx, f.Name)
	if err != nil {
		switch {
		case errors.Is(err, fs.ErrNotExist):
			r.problem(f.Name, "is missing; %s", again)
		case errors.Is(err, errNotRegular):
			r.problem(f.Name, "%v", err)
		default:
			r.unread(f.Name, err)
		}
		return ctx.Err()
	}
	defer in.Close()
	if size > f.Bytes {
		r.problem(f.Name, "has %d bytes; the manifest says %d", size, f.Bytes)
		return nil
	}
	sum, n, err := hash(io.LimitReader(o.reader(ctx, in, f.Name, f.Bytes), f.Bytes+1))
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case err != nil:
		r.unread(f.Name, err)
	case n > f.Bytes:
		r.problem(f.Name, "has more than the %d bytes that the manifest says", f.Bytes)
	case n < f.Bytes:
		r.problem(f.Name, "is truncated: %d of %d bytes; %s", n, f.Bytes, again)
	case sum != f.SHA256:
		r.problem(f.Name, "has been changed: its SHA-256 is %s; the manifest says %s; %s", sum, f.SHA256, again)
	default:
		r.Files++
		r.Bytes += n
	}
	return nil
}

// extra finds files, of all or of only those, that no build has made. Hidden ones
// are of a build that runs, or of a tool.
func (r *Report) extra(s source, m *image.Manifest, only []string) error {
	all, err := s.list()
	if err != nil {
		return err
	}
	for _, name := range all {
		if _, ok := m.Find(name); ok || slices.Contains([]string{ManifestName, SignatureName, SumsName}, name) || only != nil && !slices.Contains(only, name) {
			continue
		}
		r.problem(name, "is not in the manifest: it is of another build, or somebody put it here")
	}
	return nil
}

type folder struct{ root *os.Root }

var errNotRegular = errors.New("is no regular file")

func (f folder) open(_ context.Context, name string) (io.ReadCloser, int64, error) {
	fi, err := f.root.Lstat(name)
	if err != nil {
		return nil, 0, err
	}
	if !fi.Mode().IsRegular() {
		return nil, 0, errNotRegular
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
		return nil, 0, fmt.Errorf("%w; make sure that the server runs, and that the URL is right", err)
	}
	switch resp.StatusCode {
	case http.StatusOK:
		return body{resp.Body}, resp.ContentLength, nil
	case http.StatusNotFound, http.StatusGone:
		err = fs.ErrNotExist
	case http.StatusForbidden:
		err = fmt.Errorf("%s: the server gives it to nobody, or may not read it, as files of mode 0600 are their owner's", resp.Status)
	default:
		err = fmt.Errorf("%s; the server's log says why, if the URL is that of the build's folder", resp.Status)
	}
	resp.Body.Close()
	return nil, 0, fmt.Errorf("GET %s: %w", req.URL, err)
}

func (server) list() ([]string, error) { return nil, nil }

// body is one whose connection may break before all is there that the server has
// promised: what is missing then is not missing on the server.
type body struct{ io.ReadCloser }

func (b body) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	if err != nil && err != io.EOF {
		err = fmt.Errorf("the connection has broken; try again: %w", err)
	}
	return n, err
}
