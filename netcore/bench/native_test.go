package bench

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/u-root/u-root/pkg/cpio"
	"golang.org/x/sys/unix"

	"clonecluster/netcore/netnstest"
	"clonecluster/qemu"
)

// A guest has neither disk nor network: what it needs comes in its initramfs, and its
// report leaves by this port.
const (
	guestPort = "bench"
	guestEnv  = "CLONECLUSTER_BENCH_GUEST"
	guestOut  = "/out"
)

// guestTools are what the beds, the servers and the clients need there.
var guestTools = []string{"ip", "bridge", "nginx", "wrk", "curl", "cat", "sh"}

// guestWays are what is compared there.
var guestWays = []string{Plain, "native", "bpf", "raw", "native, 2 nodes"}

// TestBenchNative is "make bench-native": the same measurement in a guest, on the patched
// kernel, where there is native.
func TestBenchNative(t *testing.T) {
	folder, kernel := os.Getenv("CLONECLUSTER_BENCH"), os.Getenv("CLONECLUSTER_BENCH_KERNEL")
	if folder == "" || kernel == "" {
		t.Skip("takes ten minutes: make bench-native")
	}
	if err := netnstest.Lacks(guestTools...); err != nil {
		t.Fatalf("%v: make deps-test", err)
	}
	r := runGuest(t, kernel, os.Getenv("BENCH_ROUNDS"))
	if err := os.WriteFile(filepath.Join(folder, nativeJSON), must(r.JSON()), 0o644); err != nil {
		t.Fatal(err)
	}
	writeDocument(t, folder)
}

func runGuest(t *testing.T, kernel, rounds string) *Report {
	t.Helper()
	dir := t.TempDir()
	out, initrd := filepath.Join(dir, "out"), filepath.Join(dir, "initrd")
	if err := os.WriteFile(initrd, guestArchive(t), 0o600); err != nil {
		t.Fatal(err)
	}
	cmdline := "console=ttyS0 quiet panic=-1 rdinit=/init -- "
	vm, err := qemu.Start(t.Context(), qemu.Config{
		Name: "bench", Machine: qemu.Q35, Accel: qemu.TCG, Dir: dir, NoReboot: true, CPUs: 2, MemoryMB: 3072,
		Kernel: kernel, Initrd: initrd, Cmdline: cmdline + "rounds=" + rounds,
		Extra: []string{
			"-icount", "shift=0,sleep=off", // an instruction is a nanosecond, whatever else this machine does
			"-device", "virtio-serial-pci", "-chardev", "file,id=out,path=" + out, "-device", "virtserialport,chardev=out,name=" + guestPort,
		},
		OnLine: func(l qemu.Line) {
			if strings.HasPrefix(l.Text, "round ") || strings.HasPrefix(l.Text, "preparing") {
				fmt.Fprintln(os.Stderr, "in QEMU:", l.Text)
			}
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	defer vm.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Hour)
	defer cancel()
	if err := vm.Wait(ctx); err != nil {
		t.Fatalf("%v\n%s", err, vm.Report())
	}
	data, err := os.ReadFile(out)
	r := new(Report)
	if err == nil {
		err = json.Unmarshal(data, r)
	}
	if err != nil {
		t.Fatalf("the guest's report: %v\n%s", err, vm.Report())
	}
	return r
}

// guestArchive is an initramfs with this program as its init, and the tools with the
// libraries that they are linked with.
func guestArchive(t *testing.T) []byte {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	files := map[string]string{"init": self}
	for _, tool := range guestTools {
		path, err := exec.LookPath(tool)
		if err != nil {
			t.Fatal(err)
		}
		files["bin/"+tool] = path
		libraries, err := exec.CommandContext(t.Context(), "ldd", path).Output()
		if err != nil {
			t.Fatalf("ldd %s: %v", path, err)
		}
		for field := range strings.FieldsSeq(string(libraries)) {
			if strings.HasPrefix(field, "/") {
				files[strings.TrimPrefix(field, "/")] = field
			}
		}
	}
	records := []cpio.Record{
		cpio.CharDev("dev/console", 0o600, 5, 1),
		cpio.StaticFile("etc/passwd", "root:x:0:0:root:/root:/bin/sh\n", 0o644),
		cpio.StaticFile("etc/group", "root:x:0:\n", 0o644),
		cpio.StaticFile("etc/services", "http 80/tcp\n", 0o644),
	}
	folders := map[string]bool{"proc": true, "sys": true, "dev": true, "tmp": true, "run": true, "var": true, "root": true, "etc": true, "out/build": true}
	for name, from := range files {
		data, err := os.ReadFile(from)
		if err != nil {
			t.Fatal(err)
		}
		records = append(records, cpio.StaticFile(name, string(data), 0o755))
		folders[filepath.Dir(name)] = true
	}
	for folder := range folders {
		for at := folder; at != "."; at = filepath.Dir(at) {
			if dir := cpio.Directory(at, 0o755); !slices.ContainsFunc(records, func(r cpio.Record) bool { return r.Name == at }) {
				records = append(records, dir)
			}
		}
	}
	slices.SortFunc(records, func(a, b cpio.Record) int { return strings.Compare(a.Name, b.Name) })
	var archive bytes.Buffer
	w := cpio.Newc.Writer(&archive)
	if err := errors.Join(cpio.WriteRecords(w, records), cpio.WriteTrailer(w)); err != nil {
		t.Fatal(err)
	}
	return archive.Bytes()
}

// guest is what PID 1 does: it runs this program again, as the benchmark, hands the report
// out, and powers off.
func guest() error {
	defer unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
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
	rounds := "5"
	for _, arg := range os.Args[1:] {
		if n, ok := strings.CutPrefix(arg, "rounds="); ok && n != "" {
			rounds = n
		}
	}
	cmd := exec.Command("/init", "-test.run", "^TestBench$", "-test.timeout", "2h")
	cmd.Env = []string{"PATH=/bin", "HOME=/root", "TMPDIR=/tmp", "CLONECLUSTER_BENCH=" + guestOut, "BENCH_ROUNDS=" + rounds, guestEnv + "=1"}
	cmd.Stdout, cmd.Stderr = struct{ io.Writer }{os.Stdout}, struct{ io.Writer }{os.Stderr} // no terminal, but lines
	if err := cmd.Run(); err != nil {
		return err
	}
	names, err := filepath.Glob("/sys/class/virtio-ports/*/name")
	if err != nil {
		return err
	}
	for _, name := range names {
		if is, err := os.ReadFile(name); err != nil || strings.TrimSpace(string(is)) != guestPort {
			continue
		}
		data, err := os.ReadFile(filepath.Join(guestOut, benchJSON))
		if err != nil {
			return err
		}
		port, err := os.OpenFile(filepath.Join("/dev", filepath.Base(filepath.Dir(name))), os.O_WRONLY, 0)
		if err != nil {
			return err
		}
		w := bufio.NewWriter(port)
		_, err = io.Copy(w, bytes.NewReader(data))
		return errors.Join(err, w.Flush(), port.Close())
	}
	return errors.New("there is no port for the report")
}

func must(b []byte, err error) []byte {
	if err != nil {
		panic(err)
	}
	return b
}
