package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"clonecluster/netcore/bpf"
	"clonecluster/netcore/engine"
	"clonecluster/netcore/netnstest"
	"clonecluster/qemu/qemutest"
)

// A machine is a host of the bed on which Debian runs: a root file system of its own, and a
// systemd that is PID 1 of its namespaces.
type machine struct {
	*netnstest.Host
	t    *testing.T
	root string // its root file system, from outside
	pid  string // of its PID 1
}

// bootMachine makes a root file system of the namespaces that it is started in, on top of
// $1, with $2 for its files, and systemd its PID 1. $3 names its control group, below which
// systemd's are: the root of a control group namespace.
const bootMachine = `
mount -t tmpfs -o size=512m tmpfs "$2"
mkdir "$2/up" "$2/work" "$2/m" "$2/cgroup"
mount -t overlay overlay -o "lowerdir=$1,upperdir=$2/up,workdir=$2/work" "$2/m"
mount -t cgroup2 cgroup2 "$2/cgroup"
mkdir "$2/cgroup/$3"
echo 0 > "$2/cgroup/$3/cgroup.procs"
umount "$2/cgroup"
exec unshare --cgroup sh -eu -c '
cd "$1"
hostname "$2"
mount -t proc proc proc
mount -t sysfs sysfs sys
mount -t cgroup2 cgroup2 sys/fs/cgroup
mount -t bpf bpf sys/fs/bpf
mount -t tmpfs -o mode=755 tmpfs dev
mount -t tmpfs -o mode=755 tmpfs run
mkdir dev/net dev/pts dev/shm
mount -t devpts -o newinstance,ptmxmode=0666,mode=620 devpts dev/pts
ln -s pts/ptmx dev/ptmx
ln -s /proc/self/fd dev/fd
for node in "null 1 3" "zero 1 5" "full 1 7" "random 1 8" "urandom 1 9" "tty 5 0" "net/tun 10 200"; do
	set -- $node
	mknod -m 666 "dev/$1" c "$2" "$3"
done
pivot_root . mnt
umount -l mnt
echo machine boots
exec env -i container=test PATH=/usr/sbin:/usr/bin:/sbin:/bin /lib/systemd/systemd --log-target=console --show-status=no </dev/null
' sh "$2/m" "$4"`

// boot starts a machine and returns when all its units run.
func boot(t *testing.T, b *netnstest.Bed, h *netnstest.Host, root string) *machine {
	t.Helper()
	m := &machine{Host: h, t: t}
	scratch := filepath.Join(b.Dir, h.Name)
	if err := os.Mkdir(scratch, 0o700); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		// Its control groups, which are empty when it is killed, after the namespaces.
		remove := `mount -t cgroup2 cgroup2 "$1"; ! [ -d "$1/$2" ] || find "$1/$2" -depth -type d -exec rmdir {} +`
		for range 50 {
			if exec.Command("unshare", "--mount", "--propagation", "private", "sh", "-c", remove, "sh", scratch, h.NS).Run() == nil {
				return
			}
			time.Sleep(100 * time.Millisecond)
		}
		t.Logf("the control group %s is left", h.NS)
	})
	p := h.StartCommand("unshare", "--mount", "--pid", "--ipc", "--uts", "--fork", "--kill-child", "--propagation", "private",
		"sh", "-euc", bootMachine, "sh", root, scratch, h.NS, h.Name)
	t.Cleanup(p.Kill)
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(100 * time.Millisecond) {
		select {
		case <-p.Done():
			if !strings.Contains(p.Output(), "machine boots") {
				t.Skipf("needs namespaces with an overlay file system and control groups (version 2) in them: %s", p.Output())
			}
			t.Fatalf("%s ended:\n%s", h.Name, p.Output())
		default:
		}
		if m.pid == "" {
			out, _ := exec.Command("pgrep", "-P", fmt.Sprint(p.PID())).Output()
			m.pid = strings.TrimSpace(string(out))
		}
		if state, _ := m.try("systemctl", "is-system-running"); strings.TrimSpace(state) == "running" {
			m.root = filepath.Join("/proc", m.pid, "root")
			return m
		}
		if time.Now().After(deadline) {
			failed, _ := m.try("systemctl", "--failed", "--no-pager")
			t.Fatalf("%s does not come up:\n%s%s", h.Name, failed, p.Output())
		}
	}
}

// try runs a command on the machine and gives what it printed on both outputs.
func (m *machine) try(args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	out, err := exec.CommandContext(ctx, "nsenter", append([]string{"--target", m.pid, "--all", "env", "TERM=dumb", "LC_ALL=C"}, args...)...).CombinedOutput()
	return string(out), err
}

// must is try for what must not fail.
func (m *machine) must(args ...string) string {
	m.t.Helper()
	out, err := m.try(args...)
	if err != nil {
		log, _ := m.try("journalctl", "--no-pager", "-u", "cloned", "-n", "30")
		m.t.Fatalf("%s: %s: %v: %s\n%s", m.Name, strings.Join(args, " "), err, out, log)
	}
	return out
}

// put writes a file of the machine.
func (m *machine) put(name string, data []byte, mode os.FileMode) {
	m.t.Helper()
	if err := os.WriteFile(filepath.Join(m.root, name), data, mode); err != nil {
		m.t.Fatal(err)
	}
}

// files are all that a package could leave, without what the package manager and the journal write.
func (m *machine) files() string {
	return m.must("sh", "-c", `find / -xdev -path /var/lib/dpkg -prune -o -path /var/log -prune -o -path /var/lib/systemd -prune -o -path /tmp -prune -o -path /var/cache -prune -o -print | sort
		ls -d /run/clonecluster /sys/fs/bpf/clonecluster 2>/dev/null || :`)
}

// engineStatus is what cloned says of itself; its PID is systemd's word.
func (m *machine) engineStatus() (s engine.Status, pid string) {
	m.t.Helper()
	out := m.must("cloned", "status", "--json")
	if err := json.Unmarshal([]byte(out), &s); err != nil {
		m.t.Fatalf("%s: cloned status --json: %v: %s", m.Name, err, out)
	}
	return s, strings.TrimSpace(m.must("systemctl", "show", "--value", "-p", "MainPID", "cloned"))
}

// agree waits until the machines serve together.
func agree(t *testing.T, machines ...*machine) {
	t.Helper()
	for _, m := range machines {
		for deadline := time.Now().Add(time.Minute); ; time.Sleep(50 * time.Millisecond) {
			var s engine.Status
			out, err := m.try("cloned", "status", "--json")
			if err == nil && json.Unmarshal([]byte(out), &s) == nil && s.State == "serving" && s.Agreed && len(s.Nodes) == len(machines) {
				break
			}
			if time.Now().After(deadline) {
				log, _ := m.try("journalctl", "--no-pager", "-u", "cloned", "-n", "30")
				t.Fatalf("%s does not serve with %d others: %s\n%s", m.Name, len(machines)-1, out, log)
			}
		}
	}
}

// debianRoot is the root file system of a small Debian with nginx, made once by mmdebstrap
// and kept in the cache.
func debianRoot(t *testing.T) string {
	t.Helper()
	args := []string{
		"--variant=minbase", "--include=systemd,nginx-light,iproute2", "--aptopt=APT::Install-Recommends \"false\"",
		"--dpkgopt=path-exclude=/usr/share/doc/*", "--dpkgopt=path-exclude=/usr/share/locale/*", "--dpkgopt=path-exclude=/usr/share/man/*",
		// What of the kernel is not in a namespace is this machine's.
		`--customize-hook=ln -s /dev/null "$1/etc/systemd/system/systemd-sysctl.service"`,
		`--customize-hook=ln -s /dev/null "$1/etc/systemd/system/systemd-modules-load.service"`,
		"bookworm",
	}
	key := fmt.Sprintf("%x", sha256.Sum256([]byte(strings.Join(args, "\x00"))))[:16]
	dir := filepath.Join(qemutest.CacheDir(), "debian", "bookworm-"+key)
	if _, err := os.Stat(dir); err == nil {
		return dir
	}
	if err := os.MkdirAll(filepath.Dir(dir), 0o755); err != nil {
		t.Fatal(err)
	}
	tmp, err := os.MkdirTemp(filepath.Dir(dir), "new-")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(tmp)
	root := filepath.Join(tmp, "root")
	t.Logf("making %s, once", dir)
	if out, err := exec.CommandContext(t.Context(), "mmdebstrap", append(args, root)...).CombinedOutput(); err != nil {
		t.Skipf("needs a Debian mirror, the first time: mmdebstrap: %v: %s", err, out)
	}
	if err := os.Rename(root, dir); err != nil && !os.IsExist(err) {
		t.Fatal(err)
	}
	return dir
}

// newerPackage is the same package with a later version.
func newerPackage(t *testing.T, deb string) string {
	t.Helper()
	dir := t.TempDir()
	script := `dpkg-deb -R "$1" "$2/tree" && sed -i "s/^Version: .*/&.1/" "$2/tree/DEBIAN/control" && dpkg-deb --root-owner-group -Znone --build "$2/tree" "$2/new.deb"`
	if out, err := exec.Command("sh", "-c", script, "sh", deb, dir).CombinedOutput(); err != nil {
		t.Fatalf("making a newer package: %v: %s", err, out)
	}
	return filepath.Join(dir, "new.deb")
}

// TestSystemd: on two Debian machines with systemd the package is installed, started,
// restarted, upgraded and purged. The engine has the privileges of its unit and no other,
// no connection is lost by a restart or an upgrade, and in the end each machine is as it was.
func TestSystemd(t *testing.T) {
	needPackage(t)
	if runtime.GOARCH != "amd64" {
		t.Skip("needs a machine on which the package runs: amd64")
	}
	for tool, of := range map[string]string{"mmdebstrap": "mmdebstrap", "unshare": "util-linux", "nsenter": "util-linux", "pgrep": "procps"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("needs %s (Debian package %s)", tool, of)
		}
	}
	bed := netnstest.New(t, cloneMAC)
	root, old := debianRoot(t), builtPackage(t)
	newer := newerPackage(t, old)
	client := bed.Host("client", "", "10.77.0.1/24", "fd77::1/64")
	data := pattern(48 << 20)
	var ms []*machine
	for i := range 2 {
		h := bed.Host(fmt.Sprintf("node%d", i+1), fmt.Sprintf("52:54:00:77:00:%02x", i+1), fmt.Sprintf("10.77.0.%d/24", 101+i), fmt.Sprintf("fd77::%d/64", 101+i))
		ms = append(ms, boot(t, bed, h, root))
	}
	state, files := map[*machine]string{}, map[*machine]string{}
	for _, m := range ms {
		m.put("var/www/html/whoami", []byte(m.Name), 0o644)
		m.put("var/www/html/data", data, 0o644)
		for name, deb := range map[string]string{"old.deb": old, "new.deb": newer} {
			b, err := os.ReadFile(deb)
			if err != nil {
				t.Fatal(err)
			}
			m.put("root/"+name, b, 0o644)
		}
		state[m], files[m] = m.State(), m.files()
	}

	for _, m := range ms {
		m.must("dpkg", "-i", "/root/old.deb")
		// It starts nothing, and would not without a configuration.
		if is, _ := m.try("systemctl", "is-enabled", "cloned"); strings.TrimSpace(is) != "disabled" {
			t.Errorf("%s: after the installation the unit is %s; want disabled", m.Name, is)
		}
		m.must("systemctl", "start", "cloned")
		if is, _ := m.try("systemctl", "is-active", "cloned"); strings.TrimSpace(is) != "inactive" {
			t.Errorf("%s: without a configuration the unit is %s; want inactive", m.Name, is)
		}
		m.put("etc/clonecluster/cluster.yaml", []byte(exampleConfig(t)), 0o600)
		if out, err := m.try("cloned", "check"); err != nil {
			t.Errorf("%s: cloned check: %v:\n%s", m.Name, err, out)
		}
		m.must("systemctl", "enable", "--now", "cloned")
	}
	agree(t, ms...)
	canLock := exec.Command("prlimit", "--memlock=unlimited:unlimited", "true").Run() == nil
	if !canLock {
		t.Log("without CAP_SYS_RESOURCE systemd cannot grant LimitMEMLOCK=infinity")
	}
	u := readUnit(t)
	mask := fmt.Sprintf("%016x", u.capMask(u.words("CapabilityBoundingSet")))
	for _, m := range ms {
		s, pid := m.engineStatus()
		if s.Datapath == "raw" && bpf.Probe() == nil {
			t.Errorf("%s: the datapath is raw, and this kernel has what bpf needs", m.Name)
		}
		status := m.must("cat", "/proc/"+pid+"/status")
		for _, want := range []string{"CapPrm:\t" + mask, "CapEff:\t" + mask, "CapBnd:\t" + mask, "NoNewPrivs:\t1", "Seccomp:\t2"} {
			if !strings.Contains(status, want+"\n") {
				t.Errorf("%s: the engine runs with other privileges than the unit's: no %q in\n%s", m.Name, want, status)
			}
		}
		log := m.must("journalctl", "--no-pager", "-u", "cloned")
		bad := regexp.MustCompile(`(?m)^.*level=(WARN|ERROR).*$`).FindAllString(log, -1)
		if !canLock {
			bad = slices.DeleteFunc(bad, func(line string) bool { return strings.Contains(line, "memory") })
		}
		if len(bad) > 0 {
			t.Errorf("%s, under its unit:\n%s", m.Name, strings.Join(bad, "\n"))
		}
	}

	load := startLoad(t, client, data)
	load.await(20, ms...)
	for _, step := range []struct {
		what string
		do   func(m *machine)
	}{
		{"restarted", func(m *machine) { m.must("systemctl", "restart", "cloned") }},
		{"upgraded", func(m *machine) { m.must("dpkg", "-i", "/root/new.deb") }},
	} {
		for _, m := range ms {
			_, before := m.engineStatus()
			step.do(m)
			agree(t, ms...)
			if _, after := m.engineStatus(); after == before || after == "0" {
				t.Errorf("%s was %s, and the engine is the one of before (%s)", m.Name, step.what, after)
			}
			load.await(20, ms...)
			load.mustGoOn(fmt.Sprintf("%s was %s", m.Name, step.what))
		}
	}
	t.Log(load.end())

	// What crashes is started again by systemd, and by nobody else.
	_, before := ms[0].engineStatus()
	ms[0].must("systemctl", "kill", "--kill-who=main", "--signal=KILL", "cloned")
	agree(t, ms...)
	if _, after := ms[0].engineStatus(); after == before || ms[0].must("systemctl", "show", "--value", "-p", "NRestarts", "cloned") != "1\n" {
		t.Errorf("%s: after a kill the engine is %s, restarted by systemd %s times; want another, once", ms[0].Name, after, ms[0].must("systemctl", "show", "--value", "-p", "NRestarts", "cloned"))
	}

	for _, m := range ms {
		m.must("dpkg", "-P", "clonecluster")
		if out, err := m.try("systemctl", "cat", "cloned"); err == nil {
			t.Errorf("%s: purged, and there is a unit:\n%s", m.Name, out)
		}
		if after := m.files(); after != files[m] {
			t.Errorf("%s: purged, and the files are others:\n%s", m.Name, netnstest.Difference(files[m], after))
		}
		if after := m.State(); after != state[m] {
			t.Errorf("%s is not as it was:\n%s", m.Name, netnstest.Difference(state[m], after))
		}
		if out := m.must("systemctl", "--failed", "--no-legend", "--no-pager"); out != "" {
			t.Errorf("%s: units have failed: %s", m.Name, out)
		}
	}
	if port, ok := bed.Learned()[cloneMAC.String()]; ok {
		t.Errorf("the switch has learned the clone MAC at port %s", port)
	}
}

// pattern are octets in which a lost, doubled or moved piece shows.
func pattern(n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(i ^ i>>8 ^ i>>16)
	}
	return b
}

// A load is downloads that go on, and requests with a connection each.
type load struct {
	t      *testing.T
	client *netnstest.Host
	stop   context.CancelFunc
	all    sync.WaitGroup

	mu        sync.Mutex
	answered  map[string]int
	downloads int
	octets    int
	longest   time.Duration
	errs      []error
}

var loadTargets = []string{vip4, "[" + vip6 + "]"}

func startLoad(t *testing.T, client *netnstest.Host, data []byte) *load {
	ctx, stop := context.WithCancel(context.Background())
	l := &load{t: t, client: client, stop: stop, answered: map[string]int{}, downloads: 16}
	t.Cleanup(func() { stop(); l.all.Wait() })
	for i := range l.downloads {
		l.all.Go(func() { l.note("", 0, l.download(ctx, loadTargets[i%2], data)) })
	}
	for i := range 4 {
		l.all.Go(func() {
			for n := i; ctx.Err() == nil; n++ {
				began := time.Now()
				who, err := l.ask(loadTargets[n%2])
				l.note(who, time.Since(began), err)
				time.Sleep(20 * time.Millisecond)
			}
		})
	}
	return l
}

func (l *load) note(who string, took time.Duration, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if err != nil {
		l.errs = append(l.errs, err)
	} else if who != "" {
		l.answered[who]++
		l.longest = max(l.longest, took)
	}
}

// open asks for a file and gives the connection at the beginning of it.
func (l *load) open(host, path string) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	conn, err := l.client.DialContext(ctx, "tcp", host+":80")
	if err != nil {
		return nil, err
	}
	_, err = fmt.Fprintf(conn, "GET %s HTTP/1.1\r\nHost: vip\r\nConnection: close\r\n\r\n", path)
	var head bytes.Buffer
	for err == nil && !bytes.Contains(head.Bytes(), []byte("\r\n\r\n")) {
		_ = conn.SetReadDeadline(time.Now().Add(20 * time.Second))
		_, err = io.CopyN(&head, conn, 1)
	}
	if err == nil && !bytes.HasPrefix(head.Bytes(), []byte("HTTP/1.1 200 ")) {
		err = fmt.Errorf("the answer is %q", head.String())
	}
	if err != nil {
		conn.Close()
		return nil, err
	}
	return conn, nil
}

func (l *load) ask(host string) (string, error) {
	conn, err := l.open(host, "/whoami")
	if err != nil {
		return "", fmt.Errorf("a request: %w", err)
	}
	defer conn.Close()
	_ = conn.SetReadDeadline(time.Now().Add(20 * time.Second))
	who, err := io.ReadAll(conn)
	if err != nil {
		return "", fmt.Errorf("a request: %w", err)
	}
	return string(who), nil
}

// download reads some 300 kB/s until the load ends, which the file has to last for.
func (l *load) download(ctx context.Context, host string, data []byte) error {
	conn, err := l.open(host, "/data")
	if err != nil {
		return fmt.Errorf("a download: %w", err)
	}
	defer conn.Close()
	buf := make([]byte, 8<<10)
	for at := 0; ctx.Err() == nil; {
		_ = conn.SetReadDeadline(time.Now().Add(30 * time.Second))
		n, err := io.ReadFull(conn, buf)
		if err != nil {
			return fmt.Errorf("a download, after %d octets of %d: %w", at+n, len(data), err)
		}
		if !bytes.Equal(buf, data[at:at+n]) {
			return fmt.Errorf("a download: other octets than those of the file between %d and %d", at, at+n)
		}
		at += n
		l.mu.Lock()
		l.octets += n
		l.mu.Unlock()
		time.Sleep(25 * time.Millisecond)
	}
	return nil
}

// await waits for n more answers of each of the machines.
func (l *load) await(n int, machines ...*machine) {
	l.t.Helper()
	look := func() map[string]int {
		l.mu.Lock()
		defer l.mu.Unlock()
		counts := map[string]int{}
		for who, count := range l.answered {
			counts[who] = count
		}
		return counts
	}
	from := look()
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(20 * time.Millisecond) {
		now := look()
		if !slices.ContainsFunc(machines, func(m *machine) bool { return now[m.Name]-from[m.Name] < n }) {
			return
		}
		if time.Now().After(deadline) {
			l.t.Fatalf("in a minute the answers have gone from %v to %v; want %d more of each", from, now, n)
		}
	}
}

// mustGoOn fails the test if a connection was lost.
func (l *load) mustGoOn(when string) {
	l.t.Helper()
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, err := range l.errs {
		l.t.Errorf("when %s: %v", when, err)
	}
	l.errs = nil
}

// end stops the load and tells what it was.
func (l *load) end() string {
	l.t.Helper()
	l.stop()
	l.all.Wait()
	l.mustGoOn("all were")
	return fmt.Sprintf("%d downloads went on, of %d octets in all; requests were answered by %v, the longest took %v", l.downloads, l.octets, l.answered, l.longest)
}
