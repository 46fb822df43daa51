package kernel

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"clonecluster/boards"
)

// fake is a source that looks to this package like the kernel's and builds at
// once: allnoconfig copies the request, bzImage compiles one file.
func fake() map[string]string {
	return map[string]string{
		"Kbuild": "",
		"Makefile": `
q := @
allnoconfig:
	$(q)if [ -e drop ]; then grep -v -f drop $(KCONFIG_ALLCONFIG); else cat $(KCONFIG_ALLCONFIG); fi > $(O)/.config
bzImage: main.c
	$(q)mkdir -p $(O)/include/config $(O)/arch/x86/boot
	$(q)echo 6.12.0-fake > $(O)/include/config/kernel.release
	$(q)echo "  CC      main.o"
	$(q)$(or $(CC),gcc) -c -o $(O)/main.o main.c
	$(q)cp $(O)/main.o $(O)/arch/x86/boot/bzImage
	$(q)test ! -e slow || { touch $(O)/../compiling; sleep 600; }
`,
		"main.c": "int one;\nint two;\nint three;\n",
	}
}

const fakePatch = `A patch for the fake kernel.
---
diff --git a/main.c b/main.c
--- a/main.c
+++ b/main.c
@@ -1,3 +1,4 @@
 int one;
 int two;
+int patched;
 int three;
`

func writeTree(t *testing.T, dir string, files map[string]string) string {
	t.Helper()
	for name, text := range files {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// tarball writes the files below one folder, as a kernel's tarball has them.
func tarball(t *testing.T, files map[string]string) string {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "linux.tar"))
	if err != nil {
		t.Fatal(err)
	}
	w := tar.NewWriter(f)
	for _, name := range slices.Sorted(maps.Keys(files)) {
		err := w.WriteHeader(&tar.Header{Name: "linux/" + name, Mode: 0o644, Size: int64(len(files[name]))})
		if err == nil {
			_, err = w.Write([]byte(files[name]))
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(w.Close(), f.Close()); err != nil {
		t.Fatal(err)
	}
	return f.Name()
}

func board(t *testing.T, name string) boards.Board {
	t.Helper()
	b, err := boards.Get(name)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func fakeOptions(t *testing.T, files map[string]string) Options {
	t.Helper()
	for _, n := range needed {
		if _, err := exec.LookPath(n.program); err != nil {
			t.Skipf("%s is not installed (apt-get install %s)", n.program, n.pkg)
		}
	}
	p, err := parsePatch("0001-fake.patch", []byte(fakePatch))
	if err != nil {
		t.Fatal(err)
	}
	return Options{
		Board: board(t, "qemu-x86_64"), Source: writeTree(t, t.TempDir(), files), CacheDir: t.TempDir(), Jobs: 1,
		Status: func(s string) { t.Log(s) }, Notice: func(s string) { t.Log("notice:", s) },
		noCcache: true, patches: []patch{p},
	}
}

func mustBuild(t *testing.T, o Options) *Result {
	t.Helper()
	r, err := Build(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func TestSecondBuildComesFromTheCache(t *testing.T) {
	o := fakeOptions(t, fake())
	first := mustBuild(t, o)
	if first.Cached || first.Files != 1 || first.Release != "6.12.0-fake" || first.CPU <= 0 {
		t.Errorf("first build = %+v; want one fresh file of 6.12.0-fake", first)
	}
	nm, err := exec.Command("nm", first.Image).Output()
	if err != nil || !strings.Contains(string(nm), "patched") {
		t.Errorf("nm of the image = %s, %v; want the patch's symbol", nm, err)
	}
	second := mustBuild(t, o)
	if !second.Cached || second.Image != first.Image || second.SHA256 != first.SHA256 || second.Source.Path != first.Source.Path {
		t.Errorf("second build = %+v; want the first from the cache", second)
	}
	if got := mustRead(t, o.Source+"/main.c"); got != fake()["main.c"] {
		t.Errorf("the user's tree was changed: %q", got)
	}
	if left, _ := filepath.Glob(filepath.Join(o.CacheDir, "kernel/scratch-*")); left != nil {
		t.Errorf("scratch folders left: %v", left)
	}

	if err := os.WriteFile(first.Image, []byte("damaged"), 0o644); err != nil {
		t.Fatal(err)
	}
	if third := mustBuild(t, o); third.Cached || third.SHA256 != first.SHA256 {
		t.Errorf("build over a damaged entry = %+v; want it built again", third)
	}
}

func mustRead(t *testing.T, path string) string {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

func TestEveryInputChangesTheKey(t *testing.T) {
	base := fakeOptions(t, fake())
	key := func(o Options) string {
		t.Helper()
		b, err := prepare(t.Context(), o)
		if err != nil {
			t.Fatal(err)
		}
		return b.key
	}
	want := key(base)
	if again := key(base); again != want {
		t.Fatalf("key of the same inputs = %s; want %s", again, want)
	}
	changed := map[string]Options{}
	o := base
	o.Board = board(t, "pc-x86_64")
	changed["board"] = o
	o = base
	o.Source = writeTree(t, t.TempDir(), map[string]string{"Kbuild": "# another\n"})
	changed["source tree"] = o
	o = base
	o.Source = tarball(t, fake())
	changed["tarball"] = o
	o = base
	o.patches = nil
	changed["patches"] = o
	o = base
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "gcc"), []byte("#!/bin/sh\necho gcc 99\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	o.path = append([]string{dir}, filepath.SplitList(os.Getenv("PATH"))...)
	changed["compiler"] = o
	seen := map[string]string{want: "base"}
	for name, o := range changed {
		k := key(o)
		if other, twice := seen[k]; twice {
			t.Errorf("another %s has the key of %s", name, other)
		}
		seen[k] = name
	}
	// Where it is built from, by how many and how watched says nothing.
	o = base
	o.Jobs, o.CacheDir, o.Status = 7, t.TempDir(), nil
	if got := key(o); got != want {
		t.Errorf("key depends on jobs or cache folder")
	}
}

func TestFailureShowsTheCompilersLines(t *testing.T) {
	files := fake()
	files["main.c"] = "int one;\nint two;\nint three;\n#error no such luck\n"
	_, err := Build(t.Context(), fakeOptions(t, files))
	if err == nil {
		t.Fatal("Build of a broken source succeeded")
	}
	for _, want := range []string{"compiling", "main.c:5:2: error: #error no such luck", "failed-qemu-x86_64.log"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("error lacks %q: %v", want, err)
		}
	}
}

func TestDroppedSymbolFails(t *testing.T) {
	files := fake()
	files["drop"] = "^CONFIG_MACVLAN=y\n"
	_, err := Build(t.Context(), fakeOptions(t, files))
	if err == nil || !strings.Contains(err.Error(), "want CONFIG_MACVLAN=y, got absent") {
		t.Errorf("Build = %v; want an error that names CONFIG_MACVLAN", err)
	}
}

func TestPatchThatDoesNotFitNamesTheHunk(t *testing.T) {
	files := fake()
	files["main.c"] = "int one;\nint three;\n"
	_, err := Build(t.Context(), fakeOptions(t, files))
	var pe *PatchError
	if !errors.As(err, &pe) {
		t.Fatalf("Build = %v; want a PatchError", err)
	}
	for _, want := range []string{"0001-fake.patch", "main.c", "hunk 1 of 1", "@@ -1,3 +1,4 @@", `no line "int two;"`} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("error lacks %q: %v", want, err)
		}
	}
}

func TestSourceErrorsNameTheFix(t *testing.T) {
	o := fakeOptions(t, fake())
	o.Source = ""
	o.lock = &lock{Package: "linux-source-6.12", Version: "6.12.1", Path: filepath.Join(t.TempDir(), "none.tar.xz")}
	_, err := Build(t.Context(), o)
	if err == nil || !strings.Contains(err.Error(), "apt-get install linux-source-6.12") || !strings.Contains(err.Error(), "--kernel-source") {
		t.Errorf("without the package: %v; want both ways to get a source", err)
	}
	o = fakeOptions(t, fake())
	o.path = []string{t.TempDir()}
	_, err = Build(t.Context(), o)
	if err == nil || !strings.Contains(err.Error(), "apt-get install gcc binutils zstd make") {
		t.Errorf("without tools: %v; want the packages", err)
	}
	if runtime.GOARCH != "arm64" {
		o = fakeOptions(t, fake())
		o.Board, o.path = board(t, "generic-arm64"), []string{t.TempDir()}
		_, err = Build(t.Context(), o)
		if err == nil || !strings.Contains(err.Error(), "apt-get install gcc-aarch64-linux-gnu gcc binutils-aarch64-linux-gnu binutils zstd make") {
			t.Errorf("without cross tools: %v; want their packages, and the host's", err)
		}
	}
	o = fakeOptions(t, map[string]string{"README": "no kernel"})
	if _, err = Build(t.Context(), o); err == nil || !strings.Contains(err.Error(), "is no kernel source") {
		t.Errorf("of another folder: %v; want to be told", err)
	}
}

// What keeps a build from building is found before it begins, and the source of
// the last one stays.
func TestCheck(t *testing.T) {
	o := fakeOptions(t, fake())
	if err := Check(t.Context(), o); err != nil {
		t.Errorf("Check of what can be built: %v", err)
	}
	mustBuild(t, o)
	trees := func() []string {
		list, _ := filepath.Glob(filepath.Join(o.CacheDir, "kernel", "s[oc]*-*"))
		return list
	}
	before := trees()
	text := filepath.Join(writeTree(t, t.TempDir(), map[string]string{"text": strings.Repeat("no tarball\n", 100)}), "text")
	for _, tt := range []struct {
		name   string
		change func(*Options)
		want   string
	}{
		{"no tarball", func(o *Options) { o.Source = text }, "is no kernel source (tar: This does not look like a tar archive); --kernel-source is a tree or a tarball of Linux 6.12"},
		{"a tarball of something else", func(o *Options) { o.Source = tarball(t, map[string]string{"README": "no kernel"}) }, "is no kernel source (tar: */Kbuild: Not found in archive)"},
		{"nothing there", func(o *Options) { o.Source = filepath.Join(t.TempDir(), "none") }, "no such file or directory; --kernel-source is a tree"},
		{"a device", func(o *Options) { o.Source = os.DevNull }, "is neither a folder nor a file"},
		{"no cache", func(o *Options) { o.CacheDir = "/proc/none" }, "the cache /proc/none cannot be written to; give another folder with --cache or $CLONECLUSTER_CACHE"},
	} {
		o := o
		tt.change(&o)
		check := Check(t.Context(), o)
		if check == nil || !strings.Contains(check.Error(), tt.want) {
			t.Errorf("%s: Check = %v; want %q", tt.name, check, tt.want)
		}
		if _, err := Build(t.Context(), o); err == nil || check != nil && err.Error() != check.Error() {
			t.Errorf("%s: Build = %v; want the error of Check", tt.name, err)
		}
		if after := trees(); !slices.Equal(before, after) {
			t.Errorf("%s: in the cache are %v; want %v", tt.name, after, before)
		}
	}
}

// What does not fit into the cache is said before it is unpacked, or leaves nothing there.
func TestFullCache(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("mounts a file system: needs root")
	}
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=2m"); err != nil {
		t.Skipf("mounting a tmpfs: %v (needs root and CAP_SYS_ADMIN)", err)
	}
	t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
	files := fake()
	files["large"] = strings.Repeat("x", 4<<20)
	tree := fakeOptions(t, files)
	tree.CacheDir = dir
	packed := tree
	packed.Source = tarball(t, files)
	const fix = ", or give another folder with --cache or $CLONECLUSTER_CACHE"
	for _, o := range []Options{tree, packed} {
		check := Check(t.Context(), o)
		if want := "no space left for the kernel in the cache " + dir + ": its source takes 1719 MB there and 2 are free; free 1718 MB" + fix; !errors.Is(check, ErrNoSpace) || !strings.HasSuffix(check.Error(), want) {
			t.Errorf("Check = %v; want %q", check, want)
		}
		if _, err := Build(t.Context(), o); err == nil || check == nil || err.Error() != check.Error() {
			t.Errorf("Build = %v; want the error of Check", err)
		}
		o.space = 1
		_, err := Build(t.Context(), o)
		if want := "no space left for the kernel in the cache " + dir + ": free some 2 GB there" + fix; !errors.Is(err, ErrNoSpace) || !strings.Contains(err.Error(), want) {
			t.Errorf("Build = %v; want %q", err, want)
		}
		if left, _ := filepath.Glob(filepath.Join(dir, "kernel", "s[oc]*-*")); len(left) > 0 {
			t.Errorf("left behind: %v", left)
		}
	}
}

func TestOtherThanTheLockedSource(t *testing.T) {
	o := fakeOptions(t, fake())
	path := tarball(t, fake())
	o.Source, o.lock = "", &lock{Package: "linux-source-6.12", Version: "6.12.1-1", Path: path, SHA256: strings.Repeat("0", 64)}
	var notices []string
	o.Notice = func(s string) { notices = append(notices, s) }
	r := mustBuild(t, o)
	if r.Source.Locked || r.Source.Wanted != "6.12.1-1" {
		t.Errorf("source = %+v; want it recorded as another than the locked", r.Source)
	}
	if len(notices) != 1 || !strings.Contains(notices[0], "source.lock asks for 6.12.1-1") {
		t.Errorf("notices = %q; want one about the version", notices)
	}
	o.Locked = true
	if _, err := Build(t.Context(), o); !errors.Is(err, ErrNotLocked) {
		t.Errorf("Build with Locked = %v; want ErrNotLocked", err)
	}
	o.lock.SHA256 = r.Source.SHA256
	if r := mustBuild(t, o); !r.Source.Locked || r.Source.Version != "6.12.1-1" {
		t.Errorf("source = %+v; want the locked one", r.Source)
	}
}

func TestInterruptLeavesNothing(t *testing.T) {
	files := fake()
	files["slow"] = ""
	o := fakeOptions(t, files)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	done := make(chan error, 1)
	go func() {
		_, err := Build(ctx, o)
		done <- err
	}()
	waitFor(t, o.CacheDir+"/kernel/scratch-*/compiling", done)

	waiting := make(chan struct{})
	second := o
	second.Notice = func(s string) {
		if strings.Contains(s, "waiting for another build") {
			close(waiting)
		}
	}
	secondCtx, cancelSecond := context.WithCancel(t.Context())
	secondDone := make(chan error, 1)
	go func() {
		_, err := Build(secondCtx, second)
		secondDone <- err
	}()
	<-waiting
	cancelSecond()
	if err := <-secondDone; !errors.Is(err, context.Canceled) {
		t.Errorf("interrupted while waiting: %v; want context.Canceled", err)
	}

	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Errorf("interrupted Build = %v; want context.Canceled", err)
	}
	for _, pattern := range []string{"scratch-*", "qemu-x86_64-*"} {
		if left, _ := filepath.Glob(filepath.Join(o.CacheDir, "kernel", pattern)); left != nil {
			t.Errorf("left in the cache: %v", left)
		}
	}
}

// waitFor returns once a file that matches exists, which its writer makes soon.
func waitFor(t *testing.T, pattern string, done <-chan error) {
	t.Helper()
	for {
		if m, _ := filepath.Glob(pattern); m != nil {
			return
		}
		select {
		case err := <-done:
			t.Fatalf("Build returned too early: %v", err)
		case <-t.Context().Done():
			t.Fatal(t.Context().Err())
		default:
			exec.Command("sleep", "0.02").Run()
		}
	}
}

func TestCcacheIsUsedWhereItIs(t *testing.T) {
	o := fakeOptions(t, fake())
	o.noCcache = false
	dir := t.TempDir()
	calls := filepath.Join(dir, "calls")
	script := "#!/bin/sh\necho \"$@\" >> " + calls + "\nexec \"$@\"\n"
	if err := os.WriteFile(filepath.Join(dir, "ccache"), []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	plain := o
	o.path = append([]string{dir}, filepath.SplitList(os.Getenv("PATH"))...)
	r := mustBuild(t, o)
	if got := mustRead(t, calls); !r.Ccache || !strings.HasPrefix(got, "gcc -c ") {
		t.Errorf("ccache: %v, called with %q; want it to compile", r.Ccache, got)
	}
	// It changes neither the result nor the key, and the second opinion is not
	// asked of it.
	plain.CacheDir = t.TempDir()
	if p := mustBuild(t, plain); p.SHA256 != r.SHA256 || p.Key != r.Key {
		t.Errorf("without ccache: %s; with it %s", p.SHA256, r.SHA256)
	}
	before := mustRead(t, calls)
	if _, err := Reproduce(t.Context(), o); err != nil {
		t.Fatal(err)
	}
	if after := mustRead(t, calls); after != before {
		t.Errorf("the second build called ccache: %q", after[len(before):])
	}
}

func TestReproduce(t *testing.T) {
	o := fakeOptions(t, fake())
	o.Source = tarball(t, fake())
	r, err := Reproduce(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	if got := mustRead(t, filepath.Join(filepath.Dir(r.Image), "reproduced")); got != r.SHA256 {
		t.Errorf("remembered %q; want %q", got, r.SHA256)
	}
	compiled := false
	o.Status = func(string) { compiled = true }
	if _, err := Reproduce(t.Context(), o); err != nil || compiled {
		t.Errorf("second Reproduce: %v, compiled: %v; want it remembered", err, compiled)
	}

	files := fake()
	files["main.c"] += "char where[] = WHERE;\n"
	files["Makefile"] = strings.Replace(files["Makefile"], "-c -o", `-DWHERE='"$(CURDIR)"' -c -o`, 1)
	o = fakeOptions(t, files)
	if _, err := Reproduce(t.Context(), o); !errors.Is(err, ErrNotReproducible) {
		t.Errorf("Reproduce of a source that records its directory = %v; want ErrNotReproducible", err)
	}
}

func TestLockedPatchesParse(t *testing.T) {
	ps, err := readPatches(files)
	if err != nil || len(ps) == 0 {
		t.Fatalf("readPatches = %d patches, %v", len(ps), err)
	}
	if _, err := readLock(); err != nil {
		t.Error(err)
	}
	for _, p := range ps {
		t.Log(fmt.Sprint(p.name, ": ", len(p.files), " files"))
	}
}
