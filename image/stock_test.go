package image_test

import (
	"context"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"clonecluster/qemu/lab"
	"clonecluster/qemu/qemutest"
)

// stockModules are what a node needs of a distribution's kernel on a virtual
// machine; of some kernels they are built in.
var stockModules = []string{"failover", "net_failover", "virtio_net", "macvlan", "tun", "evdev"}

// stock gives the kernel of a distribution, and the initramfs that loads what it has
// as modules, from the folder that the environment variable names: that where one of
// Debian's packages linux-image-* has been unpacked (dpkg -x).
func stock(t testing.TB, variable, arch string) (kernel, modules string) {
	t.Helper()
	dir := os.Getenv(variable)
	if dir == "" {
		t.Skipf("%s names no folder with Debian's linux-image-cloud-%s (apt-get download, dpkg -x)", variable, arch)
	}
	var files []string
	err := filepath.WalkDir(only(t, filepath.Join(dir, "lib/modules/*")), func(path string, d fs.DirEntry, err error) error {
		if name, ok := strings.CutSuffix(strings.TrimSuffix(filepath.Base(path), ".xz"), ".ko"); ok && slices.Contains(stockModules, name) {
			files = append(files, path)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return only(t, filepath.Join(dir, "boot/vmlinuz-*")), qemutest.Modules(t, arch, files...)
}

func only(t testing.TB, pattern string) string {
	t.Helper()
	names, err := filepath.Glob(pattern)
	if err != nil || len(names) != 1 {
		t.Fatalf("%s: %q, %v; want one file", pattern, names, err)
	}
	return names[0]
}

// BenchmarkBoot holds a boot of our kernel against one of Debian's, with the same
// programs, in turns: from the start of the machine to the first answer at the VIP,
// in CPU time of QEMU, which a busy computer changes little.
//
//	CLONECLUSTER_TEST_STOCK=unpacked go test -run ^$ -bench ^BenchmarkBoot$ -benchtime 5x ./image
func BenchmarkBoot(b *testing.B) {
	kernel, initrd := cluster(b, false)
	other, modules := stock(b, "CLONECLUSTER_TEST_STOCK", "amd64")
	var cpu [2][]float64
	for b.Loop() {
		cpu[0] = append(cpu[0], bootCost(b, kernel, initrd, "", "native").Seconds())
		cpu[1] = append(cpu[1], bootCost(b, other, append(slices.Clone(initrd), modules), " rdinit=/preinit", "bpf").Seconds())
	}
	var median [2]float64
	for i, values := range cpu {
		slices.Sort(values)
		median[i] = values[len(values)/2]
	}
	b.ReportMetric(median[0], "cpu-s/boot")
	b.ReportMetric(median[1], "stock-cpu-s/boot")
	b.ReportMetric(median[0]/median[1], "of-stock")
}

// bootCost boots one node and gives the CPU time of its QEMU until it has answered.
func bootCost(b *testing.B, kernel string, initrd []string, more, datapath string) time.Duration {
	b.Helper()
	ctx, cancel := context.WithTimeout(b.Context(), bootLimit)
	defer cancel()
	cfg := lab.Demo(1)
	cfg.Kernel, cfg.Initrd = kernel, initrd
	cfg.Cmdline += more
	cfg.MemoryMB = 384
	l := qemutest.Lab(b, cfg)
	defer l.Close()
	qemutest.Await(ctx, b, l, "/whoami")
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", l.Node(0).VM().Pid()))
	if err != nil {
		b.Fatal(err)
	}
	if _, err := l.Node(0).VM().WaitLine(ctx, func(s string) bool { return strings.Contains(s, "datapath="+datapath) }); err != nil {
		b.Fatal(err)
	}
	// proc_pid_stat(5), behind the name: utime is the 12th, stime the 13th.
	fields := strings.Fields(string(stat[strings.LastIndexByte(string(stat), ')')+1:]))
	var ticks int
	for _, f := range fields[11:13] {
		n, err := strconv.Atoi(f)
		if err != nil {
			b.Fatal(err)
		}
		ticks += n
	}
	return time.Duration(ticks) * 10 * time.Millisecond // USER_HZ is 100
}
