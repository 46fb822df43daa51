package image

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/klauspost/compress/zstd"
	"github.com/u-root/u-root/pkg/cpio"
	"golang.org/x/sys/unix"

	"clonecluster/config"
)

// unpack reads an initramfs by the rules of init/initramfs.c: what a node's
// file system is after it. Records keep the order in which they were found.
func unpack(t *testing.T, initrd []byte) []cpio.Record {
	t.Helper()
	var records []cpio.Record
	for at := 0; at < len(initrd); {
		rest := initrd[at:]
		switch {
		case rest[0] == 0:
			at++
		case bytes.HasPrefix(rest, []byte("0707")) && at%4 == 0:
			found, n := readArchive(t, rest)
			records = append(records, found...)
			at += n
		case bytes.HasPrefix(rest, []byte{0x28, 0xb5, 0x2f, 0xfd}):
			in := bytes.NewReader(rest)
			// Of several frames behind each other the kernel takes the first.
			d, err := zstd.NewReader(io.LimitReader(in, int64(frameLength(t, rest))))
			if err != nil {
				t.Fatal(err)
			}
			plain, err := io.ReadAll(d)
			d.Close()
			if err != nil {
				t.Fatal(err)
			}
			for inner := 0; inner < len(plain); {
				if plain[inner] == 0 {
					inner++
					continue
				}
				found, n := readArchive(t, plain[inner:])
				records = append(records, found...)
				inner += n
			}
			at += frameLength(t, rest)
		default:
			t.Fatalf("at byte %d: neither a member nor padding: % x", at, rest[:min(8, len(rest))])
		}
	}
	// The kernel loses what has no directory, and a later file wins.
	dirs := map[string]bool{".": true}
	for _, r := range records {
		if dir := filepath.Dir(r.Name); !dirs[dir] {
			t.Errorf("%s: its directory has no record before it", r.Name)
		}
		if r.Mode&cpio.S_IFMT == cpio.S_IFDIR {
			dirs[r.Name] = true
		}
	}
	return records
}

// frameLength walks the blocks of a zstd frame (RFC 8878, section 3.1.1).
func frameLength(t *testing.T, b []byte) int {
	t.Helper()
	var h zstd.Header
	if err := h.Decode(b); err != nil {
		t.Fatal(err)
	}
	at := h.HeaderSize
	for last := false; !last; {
		block := int(b[at]) | int(b[at+1])<<8 | int(b[at+2])<<16
		last = block&1 == 1
		length := block >> 3
		if block>>1&3 == 1 { // RLE: one byte
			length = 1
		}
		at += 3 + length
	}
	if h.HasCheckSum {
		at += 4
	}
	return at
}

func readArchive(t *testing.T, b []byte) (records []cpio.Record, length int) {
	t.Helper()
	r := cpio.Newc.Reader(bytes.NewReader(b))
	end := int64(0)
	for {
		rec, err := r.ReadRecord()
		if err == io.EOF {
			return records, int(end+110+11+3) &^ 3 // the trailer's record
		}
		if err != nil {
			t.Fatal(err)
		}
		end = (rec.FilePos + int64(rec.FileSize) + 3) &^ 3
		records = append(records, rec)
	}
}

// listing gives records as "mode name [size or target]".
func listing(t *testing.T, records []cpio.Record) (lines []string) {
	t.Helper()
	for _, r := range records {
		line := fmt.Sprintf("%06o %s", r.Mode, r.Name)
		switch r.Mode & cpio.S_IFMT {
		case cpio.S_IFLNK:
			target, err := io.ReadAll(io.NewSectionReader(r, 0, int64(r.FileSize)))
			if err != nil {
				t.Fatal(err)
			}
			line += " → " + string(target)
		case cpio.S_IFCHR:
			line += fmt.Sprintf(" %d:%d", r.Rmajor, r.Rminor)
		}
		if r.UID != 0 || r.GID != 0 {
			line += " not root's"
		}
		lines = append(lines, line)
	}
	return lines
}

func content(t *testing.T, records []cpio.Record, name string) string {
	t.Helper()
	i := slices.IndexFunc(records, func(r cpio.Record) bool { return r.Name == name })
	if i < 0 {
		t.Fatalf("no %s", name)
	}
	b, err := io.ReadAll(io.NewSectionReader(records[i], 0, int64(records[i].FileSize)))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func contentDir(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	for name, perm := range map[string]os.FileMode{"index.html": 0o600, "docs/a.txt": 0o755, "docs/b/c.txt": 0o666} {
		file := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(file), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, []byte("this is "+name), perm); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func TestConfigCPIO(t *testing.T) {
	when := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	packed, err := ConfigCPIO(config.DemoYAML, contentDir(t), when)
	if err != nil {
		t.Fatal(err)
	}
	records := unpack(t, packed)
	want := []string{
		"040755 etc",
		"040755 etc/clonecluster",
		"100600 etc/clonecluster/cluster.yaml",
		"040755 srv",
		"040755 srv/www",
		"040755 srv/www/docs",
		"100644 srv/www/docs/a.txt",
		"040755 srv/www/docs/b",
		"100644 srv/www/docs/b/c.txt",
		"100644 srv/www/index.html",
	}
	if d := cmp.Diff(want, listing(t, records)); d != "" {
		t.Error(d)
	}
	if got := content(t, records, ConfigFile); got != string(config.DemoYAML) {
		t.Errorf("cluster.yaml = %q", got)
	}
	if got := content(t, records, "srv/www/docs/b/c.txt"); got != "this is docs/b/c.txt" {
		t.Errorf("content = %q", got)
	}
	inos := map[uint64]bool{}
	for _, r := range records {
		if r.MTime != uint64(when.Unix()) {
			t.Errorf("%s: modification time %d", r.Name, r.MTime)
		}
		if inos[r.Ino] || r.Ino == 0 {
			t.Errorf("%s: inode %d again", r.Name, r.Ino)
		}
		inos[r.Ino] = true
	}

	// The same from another copy of the content: other modes, times, order.
	again, err := ConfigCPIO(config.DemoYAML, contentDir(t), when)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(packed, again) {
		t.Error("the same content from another directory gives other bytes")
	}
}

func TestConfigCPIOErrors(t *testing.T) {
	fifo, link, newline := t.TempDir(), t.TempDir(), t.TempDir()
	if err := syscall.Mkfifo(filepath.Join(fifo, "pipe"), 0o600); err != nil {
		t.Fatal(err)
	}
	socket := t.TempDir()
	l, err := net.Listen("unix", filepath.Join(socket, "sock"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if err := os.Symlink("/etc/shadow", filepath.Join(link, "shadow")); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(newline, "a\nb"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	huge := t.TempDir()
	if err := os.WriteFile(filepath.Join(huge, "hole"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(filepath.Join(huge, "hole"), MaxContent+1); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name, yaml, dir string
		when            time.Time
		want            string
	}{
		{"unknown key", "cluster: {nam: x}\n", "", time.Time{}, "cluster.yaml:1:11"},
		{"no such directory", string(config.DemoYAML), filepath.Join(fifo, "none"), time.Time{}, "none"},
		{"fifo", string(config.DemoYAML), fifo, time.Time{}, "pipe: neither a regular file nor a directory but a named pipe; take it away"},
		{"socket", string(config.DemoYAML), socket, time.Time{}, "sock: neither a regular file nor a directory but a socket, which"},
		{"link", string(config.DemoYAML), link, time.Time{}, "shadow: neither a regular file nor a directory but a link; put a copy of what it points to"},
		{"newline", string(config.DemoYAML), newline, time.Time{}, "control character"},
		{"too much", string(config.DemoYAML), huge, time.Time{}, "1024 MiB"},
		{"time", string(config.DemoYAML), "", time.Unix(-1, 0), "1970 to 2106"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			_, err := ConfigCPIO([]byte(tc.yaml), tc.dir, tc.when)
			if err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("ConfigCPIO = %v; want an error with %q", err, tc.want)
			}
		})
	}
}

// A file that another user keeps to himself is named, with what to do.
func TestUnreadableContent(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("becoming another user needs root")
	}
	dir := contentDir(t)
	if err := os.Chmod(filepath.Join(dir, "docs"), 0o755); err != nil {
		t.Fatal(err)
	}
	runtime.LockOSThread() // of this thread alone, which ends with the goroutine
	if err := unix.Setfsuid(65534); err != nil {
		t.Fatal(err)
	}
	defer unix.Setfsuid(0)
	_, err := ConfigCPIO(config.DemoYAML, dir, time.Time{})
	if want := "packing the content of " + dir + ": "; !errors.Is(err, fs.ErrPermission) || !strings.HasPrefix(err.Error(), want) || !strings.Contains(err.Error(), "let the user who builds read it") {
		t.Errorf("ConfigCPIO = %v; want an error that begins with %q and says what to do", err, want)
	}
}

// Members of any length, plain or compressed, in any order, are all found.
func TestInitrd(t *testing.T) {
	member := func(name string, size int) []byte {
		b, err := archive([]cpio.Record{cpio.StaticFile(name, strings.Repeat("x", size), 0o644)}, time.Time{})
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	compressed := func(b []byte) []byte {
		b, err := Compress(b)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	for n := range 8 {
		all := Initrd(compressed(member("a", n)), member("b", n), compressed(member("c", 1000*n)), compressed(member("d", n)), member("e", 3*n))
		got := listing(t, unpack(t, all))
		want := []string{"100644 a", "100644 b", "100644 c", "100644 d", "100644 e"}
		if d := cmp.Diff(want, got); d != "" {
			t.Errorf("contents of %d bytes: %s", n, d)
		}
	}
}

func TestUnpacked(t *testing.T) {
	data := bytes.Repeat([]byte("0123456789"), 300_000)
	packed, err := Compress(data)
	if err != nil {
		t.Fatal(err)
	}
	if got := Unpacked(packed); got != 3_000_000 {
		t.Errorf("Unpacked(frame) = %d", got)
	}
	if got := Unpacked([]byte("plain")); got != 5 {
		t.Errorf("Unpacked(plain) = %d", got)
	}
}

func TestWriteFile(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "sub", "file")
	old := syscall.Umask(0o077)
	defer syscall.Umask(old)
	for _, text := range []string{"first", "second"} {
		if err := WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		b, err := os.ReadFile(path)
		if err != nil || string(b) != text {
			t.Errorf("read %q, %v; want %q", b, err, text)
		}
	}
	fi, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	if fi.Mode() != 0o644 {
		t.Errorf("mode %v; want 0644 whatever the umask", fi.Mode())
	}
	if err := WriteFile(dir, nil, 0o644); err == nil {
		t.Error("a directory was replaced by a file")
	}
	left, _ := filepath.Glob(filepath.Join(dir, "*", ".*"))
	more, _ := filepath.Glob(filepath.Join(filepath.Dir(dir), ".*"))
	if len(left)+len(more) > 0 {
		t.Errorf("left behind: %v %v", left, more)
	}
}

func TestMembers(t *testing.T) {
	whole, err := ConfigCPIO(config.DemoYAML, "", time.Time{})
	if err != nil {
		t.Fatal(err)
	}
	members, err := Members(append(bytes.Clone(whole), "what follows"...))
	if i := slices.IndexFunc(members, func(m Member) bool { return m.Name == ConfigFile }); err != nil || i < 0 || !bytes.Equal(members[i].Data, config.DemoYAML) {
		t.Fatalf("Members = %v, %v", members, err)
	}
	// A header with a size of its own: the name's, or the content's.
	sized := func(at int, size string) []byte {
		b := bytes.Clone(whole)
		copy(b[at:], size)
		return b
	}
	for _, tt := range []struct {
		name string
		data []byte
		want string
	}{
		{"nothing", nil, "truncated"},
		{"without its end", whole[:bytes.Index(whole, []byte("TRAILER"))-110], "truncated: after "},
		{"half", whole[:len(whole)/2], "is truncated: "},
		{"half a header", whole[:60], "truncated"},
		{"a name of 4 GiB", sized(94, "FFFFFFFF"), `a name of "FFFFFFFF" bytes`},
		{"a name of no length", sized(94, "xxxxxxxx"), `a name of "xxxxxxxx" bytes`},
		{"an empty name", sized(94, "00000000"), "length zero"},
		{"a file of 4 GiB", sized(54, "FFFFFFFF"), "is truncated: "},
		{"another format", []byte(strings.Replace(string(whole), "070701", "070707", 1)), "magic"},
	} {
		begin := time.Now()
		if members, err := Members(tt.data); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v, %v; want %q", tt.name, members, err, tt.want)
		}
		if took := time.Since(begin); took > 5*time.Second {
			t.Errorf("%s: took %v", tt.name, took)
		}
	}
}
