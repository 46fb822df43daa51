package main

import (
	"bytes"
	"debug/elf"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"clonecluster/config"
	"clonecluster/netcore/netnstest"
)

// builtPackage is the path of a package that the tests share.
func builtPackage(t *testing.T) string {
	t.Helper()
	built.Do(func() {
		dir, err := os.MkdirTemp("", "clonecluster-deb")
		if err != nil {
			t.Fatal(err)
		}
		builtDir = dir
		builtDeb = buildPackage(t, dir, "022", "amd64")
	})
	if builtDeb == "" {
		t.Fatal("the package could not be built")
	}
	return builtDeb
}

var (
	built              sync.Once
	builtDir, builtDeb string
)

// buildPackage gives the path of the package for an architecture, from "make deb" into a folder.
func buildPackage(t *testing.T, out, umask, arch string) string {
	t.Helper()
	cmd := exec.Command("sh", "-c", fmt.Sprintf("umask %s && exec make -s -C ../.. deb OUT=%s VERSION=1.2 GOARCH=%s", umask, out, arch))
	cmd.Env = slices.DeleteFunc(os.Environ(), func(e string) bool { return strings.HasPrefix(e, "MAKE") || strings.HasPrefix(e, "GOARCH=") })
	if msg, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("make deb: %v: %s", err, msg)
	}
	debs, _ := filepath.Glob(filepath.Join(out, "deb", "*.deb"))
	if len(debs) != 1 {
		t.Fatalf("make deb made %v; want one package", debs)
	}
	return debs[0]
}

func needPackage(t *testing.T) {
	t.Helper()
	if testing.Short() {
		t.Skip("builds two programs: not with -short")
	}
	for _, tool := range []string{"dpkg-deb", "make", "git"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("needs %s", tool)
		}
	}
}

// TestPackage: built twice it is bit by bit the same, and what is in it works.
func TestPackage(t *testing.T) {
	needPackage(t)
	first, second := builtPackage(t), buildPackage(t, t.TempDir(), "077", "amd64")
	a, err := os.ReadFile(first)
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(second)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(a, b) {
		t.Errorf("two builds differ: %d and %d bytes", len(a), len(b))
	}
	root := t.TempDir()
	inspect(t, first, root, "amd64", elf.EM_X86_64)

	if os.Geteuid() != 0 {
		t.Skip("the check of a machine needs root")
	}
	bed := netnstest.New(t, cloneMAC)
	h := bed.Host("node", "", "10.77.0.101/24")
	file := filepath.Join(bed.Dir, "cluster.yaml")
	if err := os.WriteFile(file, []byte(exampleConfig(t)), 0o600); err != nil {
		t.Fatal(err)
	}
	out, err := h.Try(filepath.Join(root, "usr/sbin/cloned"), "check", "--config", file)
	// No nginx runs: 1, a warning.
	if exit, ok := err.(interface{ Unwrap() error }); !ok || exit.Unwrap().Error() != "exit status 1" || !strings.Contains(out, "nobody on the segment has the VIP yet") {
		t.Errorf("cloned check of the package: %v:\n%s", err, out)
	}
	t.Logf("\n%s", out)
}

// TestPackageARM64: the package for arm64 has the same files, with programs for that.
func TestPackageARM64(t *testing.T) {
	needPackage(t)
	inspect(t, buildPackage(t, t.TempDir(), "022", "arm64"), t.TempDir(), "arm64", elf.EM_AARCH64)
}

// inspect unpacks a package and looks at what is in it.
func inspect(t *testing.T, deb, root, arch string, machine elf.Machine) {
	t.Helper()
	if out, err := exec.Command("dpkg-deb", "-x", deb, root).CombinedOutput(); err != nil {
		t.Fatalf("dpkg-deb -x: %v: %s", err, out)
	}
	if out, err := exec.Command("dpkg-deb", "-f", deb, "Architecture").Output(); err != nil || strings.TrimSpace(string(out)) != arch {
		t.Errorf("the package is for %q, %v; want %s", out, err, arch)
	}
	for _, program := range []string{"usr/sbin/cloned", "usr/bin/clonectl"} {
		f, err := elf.Open(filepath.Join(root, program))
		if err != nil {
			t.Error(err)
			continue
		}
		if f.Machine != machine {
			t.Errorf("%s is for %v; want %v", program, f.Machine, machine)
		}
		f.Close()
	}
	for _, file := range []string{
		"usr/sbin/cloned", "usr/bin/clonectl", "usr/lib/systemd/system/cloned.service", "usr/lib/systemd/networkd.conf.d/clonecluster.conf",
		"usr/lib/systemd/network/05-clonecluster.network", "usr/lib/NetworkManager/conf.d/clonecluster.conf",
		"usr/share/doc/clonecluster/examples/cluster.yaml", "usr/share/doc/clonecluster/copyright", "usr/share/man/man8/cloned.8.gz",
		"usr/share/man/man1/clonectl.1.gz", "usr/share/bash-completion/completions/clonectl", "usr/share/zsh/vendor-completions/_clonectl",
		"usr/share/fish/vendor_completions.d/clonectl.fish",
	} {
		if info, err := os.Stat(filepath.Join(root, file)); err != nil || info.Size() == 0 {
			t.Errorf("%s: %v, %v", file, info, err)
		}
	}
	// A configuration that comes with a package has a key that everybody knows.
	if entries, err := os.ReadDir(filepath.Join(root, "etc/clonecluster")); err != nil || len(entries) > 0 {
		t.Errorf("/etc/clonecluster has %v, %v; want an empty folder", entries, err)
	}
	if _, err := exec.LookPath("lintian"); err == nil {
		out, err := exec.Command("lintian", "--allow-root", "--fail-on", "error,warning", deb).CombinedOutput()
		if err != nil {
			t.Errorf("lintian: %v: %s", err, out)
		}
	}
}

// TestExample: the package's example is no configuration until it has a key.
func TestExample(t *testing.T) {
	data, err := os.ReadFile("debian/cluster.yaml")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := config.Load(data, "cluster.yaml"); err == nil || !strings.Contains(err.Error(), "cluster.yaml:10:") || strings.Count(err.Error(), "cluster.yaml:10:") != 1 {
		t.Errorf("without a key: %v; want that to be the only problem", err)
	}
	cfg, err := config.Load([]byte(exampleConfig(t)), "cluster.yaml")
	if err != nil {
		t.Fatal(err)
	}
	if w := cfg.Warnings(); len(w) > 0 {
		t.Errorf("with a key: %v", w)
	}
}

// TestInstall installs, upgrades, removes and purges the package on a copy of this
// machine's file system, with a service manager that only writes down what it is told.
func TestInstall(t *testing.T) {
	needPackage(t)
	if os.Geteuid() != 0 {
		t.Skip("needs root: a file system of its own")
	}
	deb, dir := builtPackage(t), t.TempDir()
	script := `set -eu
mount -t tmpfs none "$1"
mkdir "$1/up" "$1/work" "$1/m"
mount -t overlay overlay -o "lowerdir=/,upperdir=$1/up,workdir=$1/work" "$1/m" || { echo no overlay; exit 0; }
cd "$1/m"
cp "$2" p.deb
rm -f usr/bin/systemctl usr/sbin/policy-rc.d
mkdir -p run/systemd/system
mount --bind /dev dev
log() { echo "== $*"; chroot . sh -c "$* 2>&1; true"; cat calls 2>/dev/null || :; rm -f calls; }
# The scripts keep its output to themselves.
printf '#!/bin/sh\necho "systemctl $*" >> /calls\n' > usr/bin/systemctl
chmod 755 usr/bin/systemctl
log dpkg -i /p.deb
[ ! -e etc/clonecluster/cluster.yaml ] || echo configured by nobody
cp usr/share/doc/clonecluster/examples/cluster.yaml etc/clonecluster/
log dpkg -i /p.deb
[ -e etc/clonecluster/cluster.yaml ] || echo configuration lost
log dpkg -r clonecluster
[ -e etc/clonecluster/cluster.yaml ] || echo configuration lost
log dpkg -P clonecluster
[ ! -e etc/clonecluster ] || echo something is left
`
	out, err := exec.Command("unshare", "--mount", "--net", "--propagation", "private", "sh", "-c", script, "sh", dir, deb).CombinedOutput()
	text := string(out)
	if err != nil {
		t.Fatalf("%v:\n%s", err, text)
	}
	if strings.Contains(text, "no overlay") {
		t.Skip("needs overlayfs in the kernel")
	}
	t.Log(text)
	parts := strings.Split(text, "== ")
	if len(parts) != 5 {
		t.Fatal("not all steps were done")
	}
	for _, tt := range []struct{ step, does, doesNot string }{
		{parts[1], "cloned check", "systemctl try-restart"},
		{parts[2], "systemctl try-restart cloned.service", "systemctl stop"},
		{parts[3], "systemctl stop cloned.service", "restart"},
		{parts[4], "daemon-reload", "stop"},
	} {
		if !strings.Contains(tt.step, tt.does) || strings.Contains(tt.step, tt.doesNot) || strings.Contains(tt.step, "rror") {
			t.Errorf("want %q and no %q in\n%s", tt.does, tt.doesNot, tt.step)
		}
	}
	for _, no := range []string{"configured by nobody", "configuration lost", "something is left", "systemctl start", "enable cloned"} {
		if strings.Contains(text, no) {
			t.Errorf("%q", no)
		}
	}
}
