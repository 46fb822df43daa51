package qemutest

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/u-root/u-root/pkg/cpio"
	"golang.org/x/sys/unix"

	"clonecluster/qemu"
)

// A Rerun is this test binary once more, in a guest that has another kernel than this
// machine, as root and all alone. Its TestMain has to call Guest. The guest's processors are
// emulated, and an instruction takes a nanosecond of its time, whatever else this machine
// does: so nothing that is measured or awaited there is disturbed.
type Rerun struct {
	Kernel   string   // bzImage
	Initrd   []string // that come before its own, such as that of Modules, whose /preinit then is the guest's init
	Tools    []string // programs of this machine that the tests use there
	Args     []string // of the test binary: -test.run and others
	Env      []string // NAME=value
	Report   string   // a file that the tests write there, which comes back; may be empty
	CPUs     int
	MemoryMB int
	Extra    []string // more arguments of QEMU
	OnLine   func(line string)
}

// silence is how long a guest may say nothing, by the clock of this machine. How long all of
// it takes there depends on what else this machine does; how long it may take by the guest's
// own clock is for -test.timeout among Args, and the tests have to say that they go on.
const silence = 30 * time.Minute

// The names of what a guest is told, and by which it answers.
const (
	rerunFile = "rerun.json"
	rerunPort = "rerun"
	rerunEnv  = "CLONECLUSTER_IN_GUEST"
)

// InGuest reports whether this process runs in the guest of a Rerun.
func InGuest() bool { return os.Getenv(rerunEnv) != "" }

// Run boots the guest and waits for its end. It fails the test if the tests in there fail.
func (r Rerun) Run(t *testing.T) (report []byte) {
	t.Helper()
	Emulator(t, qemu.Q35)
	for _, tool := range append([]string{"ldd"}, r.Tools...) {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("needs %s (make deps-test)", tool)
		}
	}
	dir := t.TempDir()
	out, initrd := filepath.Join(dir, "out"), filepath.Join(dir, "initrd")
	archive, err := r.archive(t.Context())
	if err == nil {
		err = os.WriteFile(initrd, archive, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	all, init := initrd, "/init"
	if len(r.Initrd) > 0 {
		init, all = "/preinit", filepath.Join(dir, "all")
		if err := concatenate(all, append(slices.Clone(r.Initrd), initrd)...); err != nil {
			t.Fatal(err)
		}
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	defer cancel(nil)
	silent := time.AfterFunc(silence, func() { cancel(fmt.Errorf("the guest has said nothing for %v", silence)) })
	defer silent.Stop()
	vm, err := qemu.Start(t.Context(), qemu.Config{
		Name: "rerun", Machine: qemu.Q35, Accel: qemu.TCG, Dir: dir, NoReboot: true, CPUs: r.CPUs, MemoryMB: r.MemoryMB,
		Kernel: r.Kernel, Initrd: all, Cmdline: "console=ttyS0 quiet panic=-1 rdinit=" + init,
		Extra: append([]string{
			"-icount", "shift=0,sleep=off",
			"-device", "virtio-serial-pci", "-chardev", "file,id=out,path=" + out, "-device", "virtserialport,chardev=out,name=" + rerunPort,
		}, r.Extra...),
		OnLine: func(l qemu.Line) {
			silent.Reset(silence)
			if r.OnLine != nil {
				r.OnLine(l.Text)
			}
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	defer vm.Close()
	if err := vm.Wait(ctx); err != nil {
		t.Fatalf("%v\n%s", err, vm.Report())
	}
	data, err := os.ReadFile(out)
	if err != nil {
		t.Fatal(err)
	}
	verdict, report, ok := bytes.Cut(data, []byte("\n"))
	if !ok || string(verdict) != "ok" {
		t.Fatalf("the tests in the guest: %q\n%s", verdict, vm.Report())
	}
	return report
}

func concatenate(to string, files ...string) error {
	var all bytes.Buffer
	for _, file := range files {
		b, err := os.ReadFile(file)
		if err != nil {
			return err
		}
		all.Write(b)
	}
	return os.WriteFile(to, all.Bytes(), 0o600)
}

// archive is an initramfs with this program as its init, and the tools with the libraries
// that they are linked with.
func (r Rerun) archive(ctx context.Context) ([]byte, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	told, err := json.Marshal(r.told())
	if err != nil {
		return nil, err
	}
	files := map[string]string{"init": self}
	for _, tool := range r.Tools {
		file, err := exec.LookPath(tool)
		if err != nil {
			return nil, err
		}
		files["bin/"+tool] = file
		libraries, err := exec.CommandContext(ctx, "ldd", file).Output()
		if err != nil {
			return nil, fmt.Errorf("ldd %s: %w", file, err)
		}
		for field := range strings.FieldsSeq(string(libraries)) {
			if strings.HasPrefix(field, "/") {
				files[strings.TrimPrefix(field, "/")] = field
			}
		}
	}
	records := map[string]cpio.Record{}
	for _, record := range []cpio.Record{
		cpio.CharDev("dev/console", 0o600, 5, 1),
		cpio.StaticFile("etc/passwd", "root:x:0:0:root:/root:/bin/sh\n", 0o644),
		cpio.StaticFile("etc/group", "root:x:0:\n", 0o644),
		cpio.StaticFile("etc/services", "http 80/tcp\n", 0o644),
		cpio.StaticFile(rerunFile, string(told), 0o644),
	} {
		records[record.Name] = record
	}
	for name, from := range files {
		data, err := os.ReadFile(from)
		if err != nil {
			return nil, err
		}
		records[name] = cpio.StaticFile(name, string(data), 0o755)
	}
	folders := []string{"proc", "sys", "tmp", "run", "var", "root"}
	for name := range records {
		folders = append(folders, path.Dir(name))
	}
	if r.Report != "" {
		folders = append(folders, strings.TrimPrefix(path.Dir(r.Report), "/"))
	}
	for _, folder := range folders {
		for ; folder != "."; folder = path.Dir(folder) {
			records[folder] = cpio.Directory(folder, 0o755)
		}
	}
	var sorted []cpio.Record // folders before what is in them
	for _, name := range slices.Sorted(maps.Keys(records)) {
		sorted = append(sorted, records[name])
	}
	return pack(sorted)
}

// rerunTold is what the guest is told.
type rerunTold struct {
	Args, Env []string
	Report    string
}

func (r Rerun) told() rerunTold { return rerunTold{r.Args, r.Env, r.Report} }

// Guest is for TestMain: in the guest of a Rerun, whose PID 1 this program is, it runs the
// tests, hands their report out, powers off and does not return. Elsewhere it does nothing.
func Guest() {
	if os.Getpid() != 1 {
		return
	}
	err := rerun()
	if err != nil {
		fmt.Println("guest:", err)
	}
	_ = unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
}

func rerun() error {
	for _, m := range []struct{ kind, at string }{
		{"proc", "/proc"}, {"sysfs", "/sys"}, {"devtmpfs", "/dev"}, {"tmpfs", "/tmp"}, {"tmpfs", "/run"}, {"bpf", "/sys/fs/bpf"}, {"tmpfs", "/dev/shm"},
	} {
		if err := os.MkdirAll(m.at, 0o755); err != nil {
			return err
		}
		if err := unix.Mount(m.kind, m.at, m.kind, 0, ""); err != nil {
			return fmt.Errorf("mounting %s: %w", m.at, err)
		}
	}
	if err := errors.Join(os.Symlink("/proc/self/fd", "/dev/fd"), os.Symlink("/run", "/var/run")); err != nil {
		return err
	}
	var told rerunTold
	data, err := os.ReadFile("/" + rerunFile)
	if err == nil {
		err = json.Unmarshal(data, &told)
	}
	if err != nil {
		return err
	}
	cmd := exec.Command("/init", told.Args...)
	cmd.Env = append([]string{"PATH=/bin", "HOME=/root", "TMPDIR=/tmp", rerunEnv + "=1"}, told.Env...)
	cmd.Stdout, cmd.Stderr = struct{ io.Writer }{os.Stdout}, struct{ io.Writer }{os.Stderr} // no terminal, but lines
	verdict, report := "ok", []byte(nil)
	if err = cmd.Run(); err == nil && told.Report != "" {
		report, err = os.ReadFile(told.Report)
	}
	if err != nil {
		verdict = err.Error()
	}
	names, err := filepath.Glob("/sys/class/virtio-ports/*/name")
	if err != nil {
		return err
	}
	for _, name := range names {
		if is, err := os.ReadFile(name); err != nil || strings.TrimSpace(string(is)) != rerunPort {
			continue
		}
		return os.WriteFile(filepath.Join("/dev", filepath.Base(filepath.Dir(name))), append([]byte(verdict+"\n"), report...), 0)
	}
	return errors.New("there is no port for the report")
}
