package stick_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"clonecluster/image/disk"
	"clonecluster/uinit/stick"
)

// fakes are a block class and device files.
type fakes struct{ class, dev string }

func newFakes(t *testing.T) fakes {
	f := fakes{t.TempDir(), t.TempDir()}
	f.add(t, "sda", make([]byte, 1<<20)) // no partitions
	f.add(t, "loop0", nil)
	f.add(t, "vdb", nil)
	return f
}

func (f fakes) add(t *testing.T, name string, contents []byte) {
	t.Helper()
	f.size(t, name, int64(len(contents)))
	if err := os.WriteFile(filepath.Join(f.dev, name), contents, 0o600); err != nil {
		t.Fatal(err)
	}
}

func (f fakes) size(t *testing.T, name string, size int64) {
	t.Helper()
	if err := os.MkdirAll(filepath.Join(f.class, name), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(f.class, name, "size"), fmt.Appendln(nil, size/512), 0o600); err != nil {
		t.Fatal(err)
	}
}

func (f fakes) stick(t *testing.T, name, config string) {
	t.Helper()
	path := filepath.Join(f.dev, name)
	if err := disk.Write(path, disk.Options{UKI: []byte("x"), Arch: "amd64", Config: []byte(config)}); err != nil {
		t.Fatal(err)
	}
	fi, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	f.size(t, name, fi.Size())
}

func TestFind(t *testing.T) {
	f := newFakes(t)
	begin := time.Now()
	if found := stick.Find(f.class, f.dev, 0, 1<<20); found != nil {
		t.Errorf("found %+v where there is none", found)
	}
	if found := stick.Find(filepath.Join(f.class, "none"), f.dev, 0, 1<<20); found != nil {
		t.Errorf("found %+v without a block class", found)
	}
	if took := time.Since(begin); took > 500*time.Millisecond {
		t.Errorf("finding nothing took %v", took)
	}
	f.stick(t, "sdc", "hello")
	f.stick(t, "sdd", "other")
	found := stick.Find(f.class, f.dev, 0, 1<<20)
	if found == nil || found.Err != nil || found.Disk != "sdc" || string(found.Config) != "hello" || len(found.Others) != 1 {
		t.Errorf("found %+v; want sdc, and sdd told", found)
	}
	if found := stick.Find(f.class, f.dev, 0, 3); found == nil || found.Err == nil {
		t.Errorf("a file that is too large: %+v", found)
	}
}

func TestFindWaits(t *testing.T) {
	f, later := newFakes(t), newFakes(t)
	later.stick(t, "sdb", "late")
	go func() {
		time.Sleep(200 * time.Millisecond)
		os.Rename(filepath.Join(later.dev, "sdb"), filepath.Join(f.dev, "sdb"))
		os.Rename(filepath.Join(later.class, "sdb"), filepath.Join(f.class, "sdb"))
	}()
	if found := stick.Find(f.class, f.dev, 10*time.Second, 1<<20); found == nil || string(found.Config) != "late" {
		t.Errorf("found %+v; want the stick that came late", found)
	}
}

// TestFindHangs: a device that never answers is left alone.
func TestFindHangs(t *testing.T) {
	f := newFakes(t)
	f.size(t, "sdb", 1<<20)
	if err := syscall.Mkfifo(filepath.Join(f.dev, "sdb"), 0o600); err != nil { // opening it blocks
		t.Fatal(err)
	}
	f.stick(t, "sdc", "hello")
	begin := time.Now()
	found := stick.Find(f.class, f.dev, 15*time.Second, 1<<20)
	if found == nil || found.Disk != "sdc" || time.Since(begin) > 10*time.Second {
		t.Errorf("found %+v after %v; want sdc after 3 s", found, time.Since(begin))
	}
}

// TestFindLateBesideHanging: a disk that hangs does not end the waiting for
// others.
func TestFindLateBesideHanging(t *testing.T) {
	f := newFakes(t)
	f.stick(t, "sdb", "slow")
	slow := filepath.Join(f.dev, "sdb")
	real := filepath.Join(t.TempDir(), "real")
	if err := os.Rename(slow, real); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Mkfifo(slow, 0o600); err != nil {
		t.Fatal(err)
	}
	f.size(t, "sdc", 0)
	go func() {
		time.Sleep(3500 * time.Millisecond)
		if err := os.Symlink(real, filepath.Join(f.dev, "sdc")); err != nil {
			t.Error(err)
		}
		fi, _ := os.Stat(real)
		os.WriteFile(filepath.Join(f.class, "sdc", "size"), fmt.Appendln(nil, fi.Size()/512), 0o600)
	}()
	if found := stick.Find(f.class, f.dev, 20*time.Second, 1<<20); found == nil || string(found.Config) != "slow" {
		t.Errorf("found %+v; want the one that came while another hung", found)
	}
}

func TestFindSaysWhatLiesThere(t *testing.T) {
	f := newFakes(t)
	f.stick(t, "sdc", "hello")
	path := filepath.Join(f.dev, "sdc")
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	// Another long name: as an editor that appends .txt would leave it.
	i := strings.Index(string(b), "c\x00l\x00u\x00s\x00t\x00\x0f")
	if i < 0 {
		i = strings.Index(string(b), "c\x00l\x00u\x00s\x00t\x00")
	}
	if i < 0 {
		t.Fatal("no entry of cluster.yaml")
	}
	b[i] = 'k'
	copy(b[strings.Index(string(b), "CLUSTE~1YAM"):], "CLUSTX~1YAM")
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	found := stick.Find(f.class, f.dev, 0, 1<<20)
	if found == nil || found.Err == nil || !strings.Contains(found.Err.Error(), "no cluster.yaml on it, but") || !strings.Contains(found.Err.Error(), "CLUSTX~1.YAM") {
		t.Errorf("found %+v; want what lies there", found)
	}
}
