// Package image builds what a node boots: an initramfs that is the same bytes
// for every cluster, and a small one with a cluster's configuration behind it.
//
// The kernel unpacks an initramfs member by member (Documentation/
// driver-api/early-userspace/buffer-format.rst and init/initramfs.c of Linux
// 6.12): each member is a newc cpio archive, plain or compressed on its own;
// zero bytes between members are skipped; a plain archive must begin at a
// multiple of four bytes from the start of the whole; a later member's file
// replaces an earlier one's. A directory that no record creates is not created,
// and what should go into it is silently lost, so every member brings its own.
//
// Everything here is reproducible: the same sources and the same Go toolchain
// give the same bytes, wherever and whenever they are built.
package image

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"math"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/klauspost/compress/zstd"
	"github.com/u-root/u-root/pkg/cpio"

	"clonecluster/config"
)

// Where a node looks for what its image brings.
const (
	ConfigFile = "etc/clonecluster/cluster.yaml" // mode 0600: it holds the key
	ContentDir = "srv/www"
)

// MaxContent bounds the content directory: it is unpacked into memory on every
// node, and a newc archive cannot hold a file of 4 GiB.
const MaxContent = 1 << 30

// ConfigCPIO gives the member that makes a base image one cluster's: the text
// of its cluster.yaml, which must be valid, and the regular files below
// contentDir (empty: none) as the content of the web service. Owners are root
// and modes 0644 and 0755 whatever they are outside; mtime is everybody's
// modification time, 1970 if zero. The result is not compressed.
//
// Links and special files below contentDir are errors, as a link's meaning
// would change on the way. Names with a newline or above 255 bytes are too.
func ConfigCPIO(yaml []byte, contentDir string, mtime time.Time) ([]byte, error) {
	content := map[string]string{}
	if contentDir != "" {
		content[ContentDir] = contentDir
	}
	member, _, err := ConfigMember(yaml, content, mtime)
	return member, err
}

// ConfigMember is ConfigCPIO for several folders of content: their places in the
// image ("srv/www") with the folders outside. It also gives the content's files,
// under "content/", for a manifest.
func ConfigMember(yaml []byte, content map[string]string, mtime time.Time) (member []byte, files []File, err error) {
	if _, err := config.Load(yaml, "cluster.yaml"); err != nil {
		return nil, nil, err
	}
	places := slices.Sorted(maps.Keys(content))
	records := append(directories(append([]string{path.Dir(ConfigFile), ContentDir}, places...)...),
		cpio.StaticRecord(yaml, cpio.Info{Name: ConfigFile, Mode: cpio.S_IFREG | 0o600}))
	for _, place := range places {
		more, in, err := contentRecords(place, content[place])
		if errors.Is(err, fs.ErrPermission) {
			return nil, nil, fmt.Errorf("packing the content of %s: %w; every file of it goes into the image: let the user who builds read it, or take it away", content[place], err)
		} else if err != nil {
			return nil, nil, fmt.Errorf("packing the content: %w", err)
		}
		records, files = append(records, more...), append(files, in...)
	}
	member, err = archive(records, mtime)
	return member, files, err
}

// contentRecords gives records for the files below dir, at place in the image.
func contentRecords(place, dir string) (records []cpio.Record, files []File, err error) {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, nil, err
	}
	defer root.Close()
	total := int64(0)
	err = fs.WalkDir(root.FS(), ".", func(name string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case name == ".":
			return nil
		case strings.ContainsAny(d.Name(), "\n\x00"):
			return fmt.Errorf("%q: a name with a control character", name)
		case d.IsDir():
			records = append(records, cpio.Directory(path.Join(place, name), 0o755))
			return nil
		case !d.Type().IsRegular():
			return fmt.Errorf("%s: neither a regular file nor a directory%s", filepath.Join(dir, name), special(d.Type()))
		}
		fi, err := d.Info()
		if err != nil {
			return err
		}
		if total += fi.Size(); total > MaxContent {
			return fmt.Errorf("%s: more than %d MiB of content; every node keeps it in memory", dir, MaxContent>>20)
		}
		data, err := root.ReadFile(name)
		if err != nil {
			return err
		}
		records = append(records, cpio.StaticRecord(data, cpio.Info{Name: path.Join(place, name), Mode: cpio.S_IFREG | 0o644}))
		files = append(files, NewFile(path.Join("content", strings.TrimPrefix(place, "srv/"), name), data))
		return nil
	})
	return records, files, err
}

// special says what a file is that content cannot have, and what to do.
func special(mode fs.FileMode) string {
	switch {
	case mode&fs.ModeSymlink != 0:
		return " but a link; put a copy of what it points to in its place"
	case mode&fs.ModeNamedPipe != 0:
		return " but a named pipe; take it away"
	case mode&fs.ModeSocket != 0:
		return " but a socket, which a running program has made; take it away"
	}
	return " but a device; take it away"
}

// directories gives records for the named directories and those above them.
func directories(names ...string) (records []cpio.Record) {
	seen := map[string]bool{".": true}
	for _, name := range names {
		for at := name; !seen[at]; at = path.Dir(at) {
			seen[at] = true
			records = append(records, cpio.Directory(at, 0o755))
		}
	}
	return records
}

// archive writes records in the order of their names (so that directories come
// before what is in them) with nothing in them that could differ from one
// build to the next.
func archive(records []cpio.Record, mtime time.Time) ([]byte, error) {
	seconds := int64(0)
	if !mtime.IsZero() {
		seconds = mtime.Unix()
	}
	if seconds < 0 || seconds > math.MaxUint32 {
		return nil, fmt.Errorf("modification time %v: outside what a newc archive can say (1970 to 2106)", mtime)
	}
	slices.SortFunc(records, func(a, b cpio.Record) int { return strings.Compare(a.Name, b.Name) })
	var buf bytes.Buffer
	w := cpio.Newc.Writer(&buf)
	for i, r := range records {
		if i > 0 && records[i-1].Name == r.Name {
			return nil, fmt.Errorf("packing %s: two files of that name", r.Name)
		}
		r.NLink = 1 // more would make the kernel look for hard links
		r = cpio.MakeReproducible(r)
		r.Ino = uint64(i + 1)
		r.MTime = uint64(seconds)
		if err := w.WriteRecord(r); err != nil {
			return nil, fmt.Errorf("packing %s: %w", r.Name, err)
		}
	}
	if err := cpio.WriteTrailer(w); err != nil {
		return nil, fmt.Errorf("packing: %w", err)
	}
	return buf.Bytes(), nil
}

// Member is a file, a folder or a link of an archive.
type Member struct {
	Name string
	Mode uint64 // as stat(2) has it
	Data []byte // part of the archive's bytes
}

// Members reads a newc archive, which may come from anywhere. One without its
// end is an error, and so is a member that is longer than what there is.
func Members(data []byte) (list []Member, err error) {
	const header = 6 + 13*8 // newc(5): the magic and 13 numbers of 8 hexadecimal digits
	at := uint64(0)
	for r := cpio.Newc.Reader(bytes.NewReader(data)); ; {
		if at > uint64(len(data)) || len(data[at:]) < header {
			return nil, fmt.Errorf("the archive is truncated: after %d members it has no end", len(list))
		}
		// The reader would allocate whatever length the header has for the name.
		name, err := strconv.ParseUint(string(data[at+header-16:at+header-8]), 16, 32)
		if err != nil || at+header+name > uint64(len(data)) {
			return nil, fmt.Errorf("after %d members the archive is damaged: a name of %q bytes", len(list), data[at+header-16:at+header-8])
		}
		rec, err := r.ReadRecord()
		if errors.Is(err, io.EOF) { // the trailer
			return list, nil
		} else if err != nil {
			return nil, err
		}
		if rest := uint64(len(data)) - min(uint64(len(data)), uint64(rec.FilePos)); rec.FileSize > rest {
			return nil, fmt.Errorf("%s is truncated: %d of %d bytes", rec.Name, rest, rec.FileSize)
		}
		end := uint64(rec.FilePos) + rec.FileSize
		list = append(list, Member{rec.Name, rec.Mode, data[end-rec.FileSize : end : end]})
		at = (end + 3) &^ 3
	}
}

// Compress gives data as one zstd frame that the kernel unpacks (CONFIG_RD_ZSTD).
// The bytes depend on data and on the version of the encoder only.
func Compress(data []byte) ([]byte, error) {
	// One goroutine: with more, block borders depend on the number of cores.
	e, err := zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1), zstd.WithEncoderLevel(level))
	if err != nil {
		return nil, fmt.Errorf("compressing: %w", err)
	}
	defer e.Close()
	return e.EncodeAll(data, nil), nil
}

// level: measured on this image, unpacking costs the same at every level (0.2 G
// instructions), and the next one takes 2.3 s instead of 0.4 s for 5 % less.
const level = zstd.SpeedBetterCompression

// Unpacked is the size of what data is when unpacked: what a zstd frame's
// header says, or len(data) for anything else.
func Unpacked(data []byte) int64 {
	var h zstd.Header
	if err := h.Decode(data); err != nil || !h.HasFCS {
		return int64(len(data))
	}
	return int64(h.FrameContentSize)
}

// Initrd puts members (plain or compressed archives) behind each other, each at
// a multiple of four bytes, as the kernel or a boot loader wants one file.
func Initrd(members ...[]byte) []byte {
	size := 0
	for _, m := range members {
		size = (size+3)&^3 + len(m)
	}
	all := make([]byte, 0, size)
	for _, m := range members {
		all = append(all, make([]byte, -len(all)&3)...)
		all = append(all, m...)
	}
	return all
}

// WriteFile replaces the file at path in one step: whoever reads it sees the
// old bytes or the new ones. perm is exact, whatever the umask.
func WriteFile(path string, data []byte, perm fs.FileMode) (err error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+"-*")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			os.Remove(f.Name())
		}
	}()
	_, err = f.Write(data)
	err = errors.Join(err, f.Chmod(perm), f.Close())
	if err != nil {
		return fmt.Errorf("writing %s: %w", path, err)
	}
	return os.Rename(f.Name(), path)
}

// sum is the SHA-256 of data in hex.
func sum(data []byte) string {
	h := sha256.Sum256(data)
	return hex.EncodeToString(h[:])
}

func sumFile(path string) (hexsum string, size int64, err error) {
	f, err := os.Open(path)
	if err != nil {
		return "", 0, err
	}
	defer f.Close()
	h := sha256.New()
	size, err = io.Copy(h, f)
	return hex.EncodeToString(h.Sum(nil)), size, err
}
