package engine_test

import (
	"bytes"
	"net"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"clonecluster/netcore/membership"
	"clonecluster/netcore/netnstest"
)

// pester sends frames from the host's NIC, one after the other and so many every ten
// milliseconds, until it is stopped or the test ends.
func pester(t *testing.T, h *netnstest.Host, burst int, frames ...[]byte) (end func()) {
	t.Helper()
	fd := -1
	err := h.Do(func() (err error) {
		ifi, err := net.InterfaceByName("eth0")
		if err != nil {
			return err
		}
		if fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0); err != nil {
			return err
		}
		return unix.Bind(fd, &unix.SockaddrLinklayer{Ifindex: ifi.Index})
	})
	if err != nil {
		t.Fatalf("%s: %v", h.Name, err)
	}
	stop, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		defer unix.Close(fd)
		for i := 0; ; {
			select {
			case <-stop:
				return
			case <-time.After(10 * time.Millisecond):
			}
			for range burst {
				_, _ = unix.Write(fd, frames[i%len(frames)])
				i++
			}
		}
	}()
	end = sync.OnceFunc(func() {
		close(stop)
		<-done
	})
	t.Cleanup(end)
	return end
}

// TestFailoverIntruders: a node with a wrong key, one of another version, another
// cluster, and a clone of a node are each told once by name in every log and in the
// status, and nothing happens to anybody.
func TestFailoverIntruders(t *testing.T) {
	f := newFailover(t, 3, patient)
	f.boot(f.nodes...)
	f.own(f.nodes...)
	maps := f.nodes[0].Status().Map
	c, d := f.load(60, f.nodes...)

	// What it says would take every bucket if anybody believed it.
	beacon := func(key byte, from *netnstest.Host) []byte {
		mac, err := net.ParseMAC(from.MAC)
		if err != nil {
			t.Fatal(err)
		}
		id := membership.NodeID(mac)
		return membership.NewCodec("demo", bytes.Repeat([]byte{key}, 32)).Beacon(&membership.Beacon{
			Peer: membership.Peer{ID: id, Incarnation: 1}, Sequence: 1 << 40, State: membership.Serving, HeldKnown: true, Weight: 1000,
			Rules: 1, Map: membership.MapID{Version: 1 << 40, Leader: id}, Lowest: id,
		})
	}
	wrongKey := f.Host("wrongkey", "52:54:00:77:00:00") // it would be the leader
	pester(t, wrongKey, 1, beacon(1, wrongKey))
	otherVersion := f.Host("version", "52:54:00:77:01:02")
	frame := beacon(2, otherVersion)
	frame[16]++ // the version's octet, as frame.go describes it
	pester(t, otherVersion, 1, frame)

	second := f.node(f.Host("second", "52:54:00:77:01:03", "10.77.0.120/24"))
	config := filepath.Join(f.Dir, "second.yaml")
	writeConfig(t, config, "name: demo ", "name: second ", "10.77.0.10/24", "10.77.0.20/24", "fd77::10/64", "fd77::20/64",
		"Y2xvbmVjbHVzdGVyIGRlbW8sIG5vdCBhIHNlY3JldCE=", "dGhlIHNlY3JldCBvZiBhbm90aGVyIGNsdXN0ZXIgLi4=")
	second.StartHTTP()
	second.cloned = second.Start("cloned", second.flags("--config", config)...)
	second.cloned.Await(0, "state=serving slot=1 of=1")

	// The switch takes it and its original for one host, at one port or the other.
	twin := f.node(f.Host("twin", f.nodes[2].MAC))
	twin.start()

	refused := map[string]string{ // what the status says, and of whom
		membership.ErrUnauthentic.Error():  wrongKey.MAC,
		membership.ErrOtherVersion.Error(): otherVersion.MAC,
		membership.ErrOtherCluster.Error(): second.MAC,
		membership.TwinNode.String():       f.nodes[2].MAC, // told by the original and the clone
		membership.Twins.String():          f.nodes[2].MAC, // told by the others
	}
	told := func(n *node, what string) bool {
		return slices.ContainsFunc(n.Status().Refused, func(g membership.Refusal) bool {
			return strings.HasPrefix(g.What, what) && g.From == refused[what]
		})
	}
	deadline := time.Now().Add(30 * time.Second)
	for _, n := range append(slices.Clone(f.nodes), twin) {
		for what := range refused {
			original := n == f.nodes[2] || n == twin
			if what == membership.TwinNode.String() && !original || what == membership.Twins.String() && original {
				continue
			}
			for !told(n, what) {
				if time.Now().After(deadline) {
					t.Fatalf("%s does not tell of %q from %s: %+v", n.Name, what, refused[what], n.Status().Refused)
				}
				time.Sleep(50 * time.Millisecond)
			}
		}
	}
	c.await(200, f.nodes...)
	d.mustGoOn("among intruders")
	f.mustSucceed(c.end())
	if got := f.nodes[0].Status(); got.Map != maps || len(got.Nodes) != 3 {
		t.Errorf("the map was version %d of 3 nodes, and is %d of %v", maps, got.Map, got.Nodes)
	}
	for _, n := range f.nodes {
		warnings := map[string]int{}
		for line := range strings.Lines(n.cloned.Output()) {
			if strings.Contains(line, "level=WARN") && strings.Contains(line, " from=") {
				warnings[line[strings.Index(line, "msg="):]]++
			}
		}
		for line, times := range warnings {
			if times != 1 {
				t.Errorf("%s warns %d times: %s", n.Name, times, line)
			}
		}
		if len(warnings) < 4 {
			t.Errorf("%s warns of %d intruders: %v", n.Name, len(warnings), warnings)
		}
	}
	if s := twin.Status(); s.State != "listening" || len(s.Heard) > 3 {
		t.Errorf("the clone is %s", s.State)
	}
	if out, err := f.client.Try("curl", "-sS", "--max-time", "5", "http://10.77.0.20/whoami"); err != nil || strings.TrimSpace(out) != "second" {
		t.Errorf("the other cluster answers %q, %v", out, err)
	}
	t.Logf("%+v", f.nodes[0].Status().Findings)
}
