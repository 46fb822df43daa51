package vswitch

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"runtime"
	"slices"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// TestAgainstLinuxBridge sends one random sequence of frames through a Linux
// bridge and through this switch and compares which ports each frame left by,
// with cables cut and restored in between, and the MAC tables at the end.
//
// Left out, because the two differ by design: frames to 01:80:c2:00:00:00,
// which a bridge without spanning tree forwards, and multicast snooping.
func TestAgainstLinuxBridge(t *testing.T) {
	const ports, steps = 4, 600
	br := newLinuxBridge(t, ports)
	s, err := New(Config{})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	var ours []*host
	for i := range ports {
		ours = append(ours, attach(t, s, fmt.Sprint("p", i)))
	}

	addrs := []mac{macA, macB, macC, macClone, {0x52, 0x54, 0, 0x77, 0, 4}}
	groups := []mac{broadcast, {0x33, 0x33, 0, 0, 0, 1}, {1, 0, 0x5e, 0, 0, 1}, {1, 0x80, 0xc2, 0, 0, 2}, {1, 0x80, 0xc2, 0, 0, 0x0e}, {1, 0x80, 0xc2, 0, 0, 0x10}}
	seed := uint64(time.Now().UnixNano())
	rng := rand.New(rand.NewPCG(seed, 0))
	t.Logf("seed %d", seed)
	pick := func(from []mac) mac { return from[rng.IntN(len(from))] }
	cut := make([]bool, ports)

	for step := range steps {
		in := rng.IntN(ports)
		switch {
		case rng.IntN(25) == 0:
			cut[in] = !cut[in]
			br.setLink(t, in, !cut[in])
			if cut[in] {
				ours[in].Cut()
			} else {
				ours[in].Restore()
			}
			continue
		case cut[in]:
			continue // a namespace cannot send into a cable that is out
		}
		src, dst := pick(addrs), pick(addrs)
		switch rng.IntN(12) {
		case 0, 1, 2:
			dst = pick(groups)
		case 3:
			src = pick([]mac{{}, groups[1], broadcast})
		}
		frame := eth(dst, src, fmt.Sprintf("%-50d", step))
		theirs := br.pass(t, in, frame, cut)
		got := passOurs(t, ours, in, frame, cut)
		if !slices.Equal(theirs, got) {
			t.Fatalf("step %d: %s into port %d left the Linux bridge by %v, this switch by %v", step, Describe(frame), in, theirs, got)
		}
	}

	table := make(map[mac]int)
	for _, e := range s.Table() {
		table[mac(e.MAC)] = slices.IndexFunc(ours, func(h *host) bool { return h.Name() == e.Port })
	}
	for m, port := range br.table(t) {
		if p, ok := table[m]; !ok || p != port {
			t.Errorf("Linux has %v on port %d; this switch: %d, %v", m, port, p, ok)
		}
		delete(table, m)
	}
	for m, port := range table {
		t.Errorf("this switch has %v on port %d; Linux has not", m, port)
	}
}

// fence is a broadcast frame sent behind each test frame: when it has come out
// of a port, the test frame has come out too or never will.
func fence(in int) []byte {
	return eth(broadcast, mac{0x52, 0x54, 0, 0xff, 0, byte(in)}, fmt.Sprintf("%-50s", "fence"))
}

func passOurs(t *testing.T, hosts []*host, in int, frame []byte, cut []bool) (left []int) {
	t.Helper()
	hosts[in].Send(frame)
	hosts[in].Send(fence(in))
	for i, h := range hosts {
		for i != in && !cut[i] {
			var f string
			select {
			case f = <-h.got:
			case <-time.After(30 * time.Second):
				t.Fatal("no fence in 30 s")
			}
			if f == string(fence(in)) {
				break
			}
			if f == string(frame) {
				left = append(left, i)
			}
		}
	}
	return left
}

// linuxBridge is a bridge in a namespace of its own with veth pairs as cables.
type linuxBridge struct {
	nl      *netlink.Handle
	bridge  netlink.Link
	inner   []netlink.Link // the bridge's ends
	sockets []int          // AF_PACKET on the far ends
}

func newLinuxBridge(t *testing.T, ports int) *linuxBridge {
	t.Helper()
	// The thread is not unlocked: it dies with its namespace. It is also kept on
	// one CPU, because veth keeps the order of frames per CPU only.
	runtime.LockOSThread()
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		t.Skipf("needs root for a network namespace: %v", err)
	}
	// The kernel's own chatter would be learnt.
	for _, which := range []string{"all", "default"} {
		err := os.WriteFile("/proc/sys/net/ipv6/conf/"+which+"/disable_ipv6", []byte("1"), 0)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			t.Fatal(err)
		}
	}
	var cpus unix.CPUSet
	if err := unix.SchedGetaffinity(0, &cpus); err != nil {
		t.Fatal(err)
	}
	for i := range 1024 {
		if cpus.IsSet(i) {
			cpus.Zero()
			cpus.Set(i)
			break
		}
	}
	if err := unix.SchedSetaffinity(0, &cpus); err != nil {
		t.Fatal(err)
	}
	nl, err := netlink.NewHandle()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(nl.Close)
	check := func(err error) {
		t.Helper()
		if errors.Is(err, unix.EOPNOTSUPP) {
			t.Skipf("this kernel has no bridge or veth: %v", err)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	snooping, ageing := false, uint32(100*300)
	b := &linuxBridge{nl: nl, bridge: &netlink.Bridge{
		LinkAttrs: netlink.LinkAttrs{Name: "br0"}, MulticastSnooping: &snooping, AgeingTime: &ageing,
	}}
	check(nl.LinkAdd(b.bridge))
	check(nl.LinkSetUp(b.bridge))
	for i := range ports {
		inner, outer := fmt.Sprint("in", i), fmt.Sprint("out", i)
		check(nl.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: inner}, PeerName: outer}))
		in, err := nl.LinkByName(inner)
		check(err)
		out, err := nl.LinkByName(outer)
		check(err)
		check(nl.LinkSetMaster(in, b.bridge))
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
		check(err)
		t.Cleanup(func() { unix.Close(fd) })
		check(unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_IGNORE_OUTGOING, 1))
		check(unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 30}))
		check(nl.LinkSetUp(in))
		check(nl.LinkSetUp(out))
		check(unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: 0x0300, Ifindex: out.Attrs().Index})) // ETH_P_ALL
		b.inner, b.sockets = append(b.inner, in), append(b.sockets, fd)
		b.waitForwarding(t, i)
	}
	return b
}

func (b *linuxBridge) setLink(t *testing.T, port int, up bool) {
	t.Helper()
	if !up {
		if err := b.nl.LinkSetDown(b.inner[port]); err != nil {
			t.Fatal(err)
		}
		return
	}
	if err := b.nl.LinkSetUp(b.inner[port]); err != nil {
		t.Fatal(err)
	}
	b.waitForwarding(t, port)
}

// waitForwarding waits until both ends run: a carrier change is handled by a
// work queue of the kernel, and reported through operstate.
func (b *linuxBridge) waitForwarding(t *testing.T, port int) {
	t.Helper()
	for range 3000 {
		in, err := b.nl.LinkByIndex(b.inner[port].Attrs().Index)
		if err != nil {
			t.Fatal(err)
		}
		out, err := b.nl.LinkByName(fmt.Sprint("out", port))
		if err != nil {
			t.Fatal(err)
		}
		if in.Attrs().OperState == netlink.OperUp && out.Attrs().OperState == netlink.OperUp {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Fatal("a bridge port did not come up in 30 s")
}

func (b *linuxBridge) pass(t *testing.T, in int, frame []byte, cut []bool) (left []int) {
	t.Helper()
	for _, f := range [][]byte{frame, fence(in)} {
		if _, err := unix.Write(b.sockets[in], f); err != nil {
			t.Fatalf("sending into port %d: %v", in, err)
		}
	}
	buf := make([]byte, 2048)
	for i, fd := range b.sockets {
		for i != in && !cut[i] {
			n, err := unix.Read(fd, buf)
			if errors.Is(err, unix.ENETDOWN) || errors.Is(err, unix.EINTR) {
				continue // reported once after a flap
			}
			if err != nil {
				t.Fatalf("waiting for the fence on port %d of the Linux bridge: %v", i, err)
			}
			if string(buf[:n]) == string(fence(in)) {
				break
			}
			if string(buf[:n]) == string(frame) {
				left = append(left, i)
			}
		}
	}
	return left
}

// table is the learnt part of `bridge fdb`.
func (b *linuxBridge) table(t *testing.T) map[mac]int {
	t.Helper()
	neighs, err := b.nl.NeighList(0, unix.AF_BRIDGE)
	if err != nil {
		t.Fatal(err)
	}
	table := make(map[mac]int)
	for _, n := range neighs {
		if n.State&netlink.NUD_PERMANENT != 0 || len(n.HardwareAddr) != 6 || n.MasterIndex != b.bridge.Attrs().Index {
			continue
		}
		port := slices.IndexFunc(b.inner, func(l netlink.Link) bool { return l.Attrs().Index == n.LinkIndex })
		table[mac(n.HardwareAddr)] = port
	}
	return table
}
