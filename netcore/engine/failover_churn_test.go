package engine_test

import (
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/cilium/ebpf"
)

// TestFailoverChurn: cables go out and in, engines are killed and started, restarted and
// drained, one after the other and for a while, with clients at work. What invariants
// the bed holds against every frame holds; what was in nobody's hands fails nobody; and
// nothing is left over: no file, socket, goroutine, program, map or pin.
func TestFailoverChurn(t *testing.T) {
	f := newFailover(t, 3, patient)
	f.boot(f.nodes...)
	f.own(f.nodes...)
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 0))
	before := map[*node]inventory{}
	for _, n := range f.nodes {
		before[n] = n.inventory(t)
	}
	objects := f.kernelObjects(t)
	c, _ := f.load(30, f.nodes...)

	// After a kill the others reset what the node holds, and who asks at that time may
	// meet that.
	type window struct{ from, to time.Time }
	var excused []window
	did := map[string]int{}
	began := time.Now()
	for told := began; time.Since(began) < size(25*time.Second, 5*time.Minute); {
		if time.Since(told) >= 10*time.Second {
			told = time.Now()
			t.Logf("after %v: %v", told.Sub(began).Round(time.Second), did)
		}
		n := f.nodes[r.IntN(len(f.nodes))]
		away := time.Duration(r.Int64N(int64(2 * f.dead)))
		from, excuse := time.Now(), false
		switch what := []string{"cable", "kill", "restart", "drain"}[r.IntN(4)]; what {
		case "cable":
			did[what]++
			excuse = true // whoever is connected there for longer than the others wait is reset
			f.Unplug(n.Host)
			time.Sleep(away)
			f.Plug(n.Host)
		case "kill":
			did[what]++
			excuse = true
			n.cloned.Kill()
			time.Sleep(away)
			n.resume()
			n.cloned.Await(0, "engine running")
		case "restart":
			did[what]++
			n.cloned.Signal(syscall.SIGHUP)
			if err := n.cloned.Wait(); err != nil {
				t.Fatalf("%s: after SIGHUP: %v", n.Name, err)
			}
			n.resume()
			n.cloned.Await(0, "engine running")
		case "drain":
			did[what]++
			for _, verb := range []string{"drain", "resume"} {
				if err := n.Start("cloned", verb, "--status-socket", n.status).Wait(); err != nil {
					t.Fatalf("%s: %s: %v", n.Name, verb, err)
				}
				time.Sleep(away / 2)
			}
		}
		f.agreed(f.nodes...)
		if excuse {
			excused = append(excused, window{from, time.Now().Add(time.Second)})
		}
	}
	f.own(f.nodes...)
	c.await(50, f.nodes...)
	all := c.end()
	rest := all
	for _, w := range excused {
		rest = rest.outside(w.from, w.to)
	}
	t.Logf("%v; of all, %v; of those that no kill or cable touched, %v", did, all, rest)
	f.mustSucceed(rest)
	if failed := len(all.failed()); failed*20 > len(all) {
		t.Errorf("%d of %d requests failed", failed, len(all))
	}
	f.checkSwitch()
	for _, n := range f.nodes {
		n.mustBeHealthy(n.Status())
		for what, count := range n.inventory(t) {
			// Some come and go, with what is being asked.
			if was := before[n][what]; count > was+4 {
				t.Errorf("%s had %d %s, and has %d", n.Name, was, what, count)
			}
		}
	}
	if got := f.kernelObjects(t); got > objects {
		t.Errorf("the nodes had %d BPF programs and maps, and have %d", objects, got)
	}
	t.Logf("of what could leak: %d BPF programs and maps; of %s %v", objects, f.nodes[0].Name, before[f.nodes[0]])
}

// inventory is what an engine has, by kind.
type inventory map[string]int

func (n *node) inventory(t *testing.T) inventory {
	t.Helper()
	files, err := os.ReadDir(filepath.Join("/proc", strconv.Itoa(n.cloned.PID()), "fd"))
	if err != nil {
		t.Fatal(err)
	}
	pins, err := filepath.Glob(filepath.Join(n.c.BPFFS(), "clonecluster", "*", "*"))
	if err != nil {
		t.Fatal(err)
	}
	return inventory{
		"open files": len(files), "pins of all nodes": len(pins), "goroutines": n.Status().Goroutines,
		"sockets": strings.Count(n.Run("ss", "-0ax"), "\n"), "routing rules": strings.Count(n.Run("ip", "rule"), "\n"),
	}
}

// kernelObjects counts the BPF programs that use a map which is pinned in this bed, as those
// of every engine do, a dead one's too; and the maps of these programs. A map that nobody
// has open or pinned, and no program uses, is no more.
func (c *cluster) kernelObjects(t *testing.T) int {
	t.Helper()
	pinned, maps := map[ebpf.MapID]bool{}, map[ebpf.MapID]bool{}
	pins, err := filepath.Glob(filepath.Join(c.BPFFS(), "clonecluster", "*", "*"))
	if err != nil {
		t.Fatal(err)
	}
	for _, pin := range pins {
		m, err := ebpf.LoadPinnedMap(pin, nil)
		if err != nil {
			continue // a link
		}
		info, err := m.Info()
		if err != nil {
			t.Fatal(err)
		}
		if id, ok := info.ID(); ok {
			pinned[id] = true
		}
		m.Close()
	}
	programs := 0
	for id := ebpf.ProgramID(0); ; {
		if id, err = ebpf.ProgramGetNextID(id); errors.Is(err, os.ErrNotExist) {
			return programs + len(maps)
		} else if err != nil {
			t.Fatal(err)
		}
		p, err := ebpf.NewProgramFromID(id)
		if errors.Is(err, os.ErrNotExist) {
			continue // one of somebody else's, who has ended
		} else if err != nil {
			t.Fatal(err)
		}
		info, err := p.Info()
		p.Close()
		if err != nil {
			t.Fatal(err)
		}
		uses, _ := info.MapIDs()
		if slices.ContainsFunc(uses, func(id ebpf.MapID) bool { return pinned[id] }) {
			programs++
			for _, id := range uses {
				maps[id] = true
			}
		}
	}
}
