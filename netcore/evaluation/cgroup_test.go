package evaluation

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"clonecluster/netcore/netnstest"
)

// A cgroup is what a machine of the bed may take of the processors: cgroup v2 where the
// controller cpu is in it, else v1 (Documentation/scheduler/sched-bwc.rst).
type cgroup struct {
	dirs  []string // v1: of the controllers cpu and cpuacct
	v2    bool
	quota float64 // processors; 0: all there are
}

// cgroups makes them; they go when the test ends. Make it before the bed, whose processes
// have to be gone by then.
type cgroups struct {
	t     *testing.T
	roots []string
	v2    bool
	all   []*cgroup
}

func newCgroups(t *testing.T) *cgroups {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: cgroups, network namespaces and a bridge")
	}
	g := &cgroups{t: t}
	mounts, err := os.ReadFile("/proc/mounts")
	if err != nil {
		t.Fatal(err)
	}
	for _, controller := range []string{"cpu", "cpuacct"} {
		for line := range strings.Lines(string(mounts)) {
			f := strings.Fields(line)
			if len(f) > 3 && f[2] == "cgroup" && strings.Contains(","+f[3]+",", ","+controller+",") {
				g.roots = append(g.roots, f[1])
				break
			}
		}
	}
	if len(g.roots) == 0 {
		const root = "/sys/fs/cgroup"
		if err := os.WriteFile(root+"/cgroup.subtree_control", []byte("+cpu"), 0); err != nil {
			t.Skipf("needs the cgroup controller cpu, v2 or v1: %v", err)
		}
		g.roots, g.v2 = []string{root}, true
	}
	t.Cleanup(g.remove)
	return g
}

// leastQuota is the least that the kernel takes as a quota.
const leastQuota = time.Millisecond

// add makes one. The period is that of the quota, and twice as long as often as it takes to
// let that be one.
func (g *cgroups) add(name string, quota float64, period time.Duration) *cgroup {
	g.t.Helper()
	c := &cgroup{v2: g.v2}
	for _, root := range g.roots {
		dir := filepath.Join(root, fmt.Sprintf("clonecluster-%d-%s-%d", os.Getpid(), name, len(g.all)))
		if err := os.Mkdir(dir, 0o755); err != nil {
			g.t.Fatal(err)
		}
		c.dirs = append(c.dirs, dir)
	}
	g.all = append(g.all, c)
	if quota > 0 {
		c.limit(g.t, quota, period)
	}
	return c
}

// limit sets the quota.
func (c *cgroup) limit(t *testing.T, quota float64, period time.Duration) {
	t.Helper()
	c.quota = quota
	for time.Duration(quota*float64(period)) < leastQuota {
		period *= 2
	}
	us := func(d time.Duration) string { return strconv.FormatInt(d.Microseconds(), 10) }
	of := time.Duration(quota * float64(period))
	settings := [][2]string{{"cpu.cfs_period_us", us(period)}, {"cpu.cfs_quota_us", us(of)}}
	if c.v2 {
		settings = [][2]string{{"cpu.max", us(of) + " " + us(period)}}
	}
	for _, s := range settings {
		if err := os.WriteFile(filepath.Join(c.dirs[0], s[0]), []byte(s[1]), 0); err != nil {
			t.Fatalf("a quota of %v in %v: %v", of, period, err)
		}
	}
}

func (g *cgroups) remove() {
	for _, c := range g.all {
		for _, dir := range c.dirs {
			err := os.Remove(dir)
			for range 100 { // what was killed takes a moment to be gone
				if err == nil || errors.Is(err, os.ErrNotExist) {
					break
				}
				time.Sleep(20 * time.Millisecond)
				err = os.Remove(dir)
			}
			if err != nil {
				g.t.Errorf("removing a cgroup: %v", err)
			}
		}
	}
}

// take puts a process into it, with all its threads.
func (c *cgroup) take(pid int) error {
	for _, dir := range c.dirs {
		if err := os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte(strconv.Itoa(pid)), 0); err != nil {
			return err
		}
	}
	return nil
}

// tasks are its threads.
func (c *cgroup) tasks() (tids []int, err error) {
	name := "tasks"
	if c.v2 {
		name = "cgroup.threads"
	}
	data, err := os.ReadFile(filepath.Join(c.dirs[0], name))
	if err != nil {
		return nil, err
	}
	for _, field := range strings.Fields(string(data)) {
		tid, err := strconv.Atoi(field)
		if err != nil {
			return nil, err
		}
		tids = append(tids, tid)
	}
	return tids, nil
}

// keep keeps all its threads, and those that they start, on one processor.
func (c *cgroup) keep(processor int) error {
	var set unix.CPUSet
	set.Set(processor)
	// While one is looked at another may start a third.
	for moved := true; moved; {
		moved = false
		tids, err := c.tasks()
		if err != nil {
			return err
		}
		for _, tid := range tids {
			var is unix.CPUSet
			if err = unix.SchedGetaffinity(tid, &is); err == nil && is != set {
				if err = unix.SchedSetaffinity(tid, &set); err == nil {
					moved = true
				}
			}
			// It may have ended meanwhile. One with deadlines (SCHED_DEADLINE), as an engine's for beacons, may not be kept anywhere.
			if err != nil && !errors.Is(err, unix.ESRCH) && !errors.Is(err, unix.EBUSY) {
				return fmt.Errorf("thread %d: %w", tid, err)
			}
		}
	}
	return nil
}

// used is what a cgroup has taken so far.
type used struct {
	cpu                time.Duration
	periods, throttled uint64
}

func (c *cgroup) used(t testing.TB) (u used) {
	t.Helper()
	stat := map[string]uint64{}
	data, err := os.ReadFile(filepath.Join(c.dirs[0], "cpu.stat"))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(data)) {
		if f := strings.Fields(line); len(f) == 2 {
			stat[f[0]], _ = strconv.ParseUint(f[1], 10, 64)
		}
	}
	u.periods, u.throttled = stat["nr_periods"], stat["nr_throttled"]
	u.cpu = time.Duration(stat["usage_usec"]) * time.Microsecond
	if !c.v2 {
		text, err := os.ReadFile(filepath.Join(c.dirs[len(c.dirs)-1], "cpuacct.usage"))
		if err != nil {
			t.Fatal(err)
		}
		ns, err := strconv.ParseInt(strings.TrimSpace(string(text)), 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		u.cpu = time.Duration(ns)
	}
	return u
}

// use is what it took since.
func (c *cgroup) use(name string, before, after used, wall time.Duration) NodeUse {
	n := NodeUse{Name: name, Quota: c.quota, CPU: (after.cpu - before.cpu).Seconds() / wall.Seconds()}
	if periods := after.periods - before.periods; periods > 0 {
		n.Throttled = float64(after.throttled-before.throttled) / float64(periods)
	}
	return n
}

// TestQuota: a program that wants all takes its quota and no more, and it is seen; it stays where it is kept.
func TestQuota(t *testing.T) {
	if testing.Short() {
		t.Skip("takes seconds: not with -short")
	}
	const quota = 0.1
	c := newCgroups(t).add("spin", quota, 20*time.Millisecond)
	cmd := exec.Command("sh", "-c", "read go; (while :; do :; done) & while :; do :; done")
	begin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Wait()
	defer syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
	if err := c.take(cmd.Process.Pid); err != nil {
		t.Fatal(err)
	}
	if _, err := begin.Write([]byte("\n")); err != nil {
		t.Fatal(err)
	}
	time.Sleep(100 * time.Millisecond)
	before, at := c.used(t), time.Now()
	time.Sleep(time.Second)
	n := c.use("spin", before, c.used(t), time.Since(at))
	if n.CPU > 1.3*quota || n.CPU < 0.5*quota || !n.Full() {
		t.Errorf("of a quota of %v it took %+v", quota, n)
	}
	usable, err := netnstest.UsableProcessors()
	if err != nil {
		t.Fatal(err)
	}
	for _, processor := range usable {
		if err := c.keep(processor); err != nil {
			t.Fatal(err)
		}
		tids, err := c.tasks()
		if err != nil || len(tids) != 2 {
			t.Fatalf("two loops are %v, %v", tids, err)
		}
		var is, want unix.CPUSet
		want.Set(processor)
		for _, tid := range tids {
			if err := unix.SchedGetaffinity(tid, &is); err != nil || is != want {
				t.Errorf("what is kept on processor %d may run on %v: %v", processor, is, err)
			}
		}
	}
}
