package bench

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"clonecluster/netcore/netnstest"
	"clonecluster/qemu/qemutest"
)

// A NIC of the guest: its device in QEMU, and the other end of its cable on this machine.
type guestNIC struct {
	mac, tap, options string
}

// The guest has a generator, and receivers to which the host gives its offloads (segments of
// TCP that the NIC has not cut and put together again), and to which it does not.
var (
	virtioGenerator = guestNIC{"52:54:00:77:04:01", "tap1", ""}
	virtioReceivers = map[string]guestNIC{
		VirtioOffloads: {"52:54:00:77:04:02", "tap2", ""},
		VirtioPlain:    {"52:54:00:77:04:03", "tap3", ",guest_tso4=off,guest_tso6=off,guest_ecn=off,guest_ufo=off"},
	}
)

// TestBenchVirtio measures what a node costs behind a virtio NIC, where frames are judged by
// XDP and where by tcx: in a guest of QEMU, in instructions. Its NICs are cabled by taps and
// a bridge in a network namespace of their own.
func TestBenchVirtio(t *testing.T) {
	if qemutest.InGuest() {
		measureVirtio(t)
		return
	}
	folder, kernel := os.Getenv("CLONECLUSTER_BENCH"), os.Getenv("CLONECLUSTER_BENCH_KERNEL")
	if folder == "" || kernel == "" {
		t.Skip("takes minutes: make bench-native")
	}
	const inNamespace = "CLONECLUSTER_BENCH_NETNS"
	if os.Getenv(inNamespace) == "" {
		self, err := os.Executable()
		if err != nil {
			t.Fatal(err)
		}
		cmd := exec.CommandContext(t.Context(), "unshare", "--net", self, "-test.v", "-test.run", "^TestBenchVirtio$", "-test.timeout", "1h")
		cmd.Env = append(os.Environ(), inNamespace+"=1")
		cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
		if err := cmd.Run(); err != nil {
			t.Fatal(err)
		}
		writeDocument(t, folder)
		return
	}
	run := func(args ...string) {
		if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%s: %v: %s", strings.Join(args, " "), err, out)
		}
	}
	run("ip", "link", "add", "br0", "type", "bridge")
	run("ip", "link", "set", "br0", "up")
	var extra []string
	for _, nic := range []guestNIC{virtioGenerator, virtioReceivers[VirtioOffloads], virtioReceivers[VirtioPlain]} {
		run("ip", "tuntap", "add", nic.tap, "mode", "tap", "vnet_hdr")
		run("ip", "link", "set", nic.tap, "master", "br0", "up")
		extra = append(extra, "-netdev", fmt.Sprintf("tap,id=%[1]s,ifname=%[1]s,script=no,downscript=no,vhost=off", nic.tap),
			"-device", fmt.Sprintf("virtio-net-pci,netdev=%s,mac=%s,romfile=%s", nic.tap, nic.mac, nic.options))
	}
	report := qemutest.Rerun{
		Kernel: kernel, Tools: []string{"ip", "bridge", "ethtool", "cat"}, CPUs: 1, MemoryMB: 1536, Extra: extra,
		Args:   []string{"-test.v", "-test.run", "^TestBenchVirtio$", "-test.timeout", "1h"},
		Env:    []string{"BENCH_ROUNDS=" + os.Getenv("BENCH_ROUNDS")},
		Report: "/out/virtio.json",
		OnLine: func(line string) { fmt.Println("in QEMU:", line) },
	}.Run(t)
	if err := os.WriteFile(filepath.Join(folder, virtioJSON), report, 0o644); err != nil {
		t.Fatal(err)
	}
}

// measureVirtio is what the guest does.
func measureVirtio(t *testing.T) {
	rounds, frames, octets := 3, 20_000, 16<<20
	if n, err := strconv.Atoi(os.Getenv("BENCH_ROUNDS")); err == nil {
		rounds = n
	}
	m := &measurer{t: t, ctx: t.Context()}
	r := &Report{Kernel: netnstest.Kernel(t), Processors: runtime.NumCPU(), Rounds: rounds}
	idle := startIdle(t)
	for round := range rounds {
		for _, nic := range []string{VirtioOffloads, VirtioPlain} {
			// A bed for each, as what the former left shall not matter.
			bed := netnstest.NewUnwatched(t)
			generator, host := bed.Detached("generator"), bed.Detached("receiver")
			adopt(t, generator, virtioGenerator, "10.77.0.1/24")
			adopt(t, host, virtioReceivers[nic], "10.77.0.101/24")
			r.add(Plain, nic+": "+Upload, idle.upload(t, generator, host, "10.77.0.101", octets))
			for _, kind := range []string{"tc", "xdp"} {
				way := map[string]string{"tc": "bpf, tcx", "xdp": "bpf, XDP"}[kind]
				node := host.Start("node", kind, "settled", bed.BPFFS())
				node.Await(0, "node ready")
				r.add(way, nic+": "+Upload, idle.upload(t, generator, host, vip, octets))
				if err := node.Stop(); err != nil {
					t.Fatalf("%s: %v: %s", way, err, node.Output())
				}
				node = host.Start("node", kind, "foreign", bed.BPFFS())
				node.Await(0, "node ready")
				r.add(way, nic+": "+Discard, idle.spray(t, generator, host, frames))
				seen := (&receiver{node: node}).judged()
				if seen < frames*97/100 {
					t.Errorf("%s, %s: it has judged %d of %d frames", nic, way, seen, frames)
				}
			}
			drop, err := always(ebpf.XDP, xdpDrop)
			if err != nil {
				t.Fatal(err)
			}
			var l io.Closer
			if err := m.attach(host, "eth0", drop, func(ifindex int) (io.Closer, error) {
				l, err = link.AttachXDP(link.XDPOptions{Program: drop, Interface: ifindex, Flags: link.XDPDriverMode})
				return l, err
			}); err != nil {
				t.Fatalf("%s: XDP in the driver: %v", nic, err)
			}
			r.add(Floor, nic+": "+Discard, idle.spray(t, generator, host, frames))
			l.Close()
			for _, h := range []*netnstest.Host{generator, host} {
				h.Run("ip", "link", "set", "eth0", "down", "name", "spare-"+h.MAC[15:], "netns", "1")
			}
			for _, s := range r.Series {
				fmt.Printf("round %d: %s, %s: %.1f\n", round+1, s.Way, s.Work, s.Runs[len(s.Runs)-1].CPU)
			}
		}
	}
	data, err := json.MarshalIndent(r, "", "\t")
	if err == nil {
		err = os.WriteFile("/out/virtio.json", append(data, '\n'), 0o644)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// adopt moves a NIC of the guest into the namespace of a host, as its eth0.
func adopt(t *testing.T, h *netnstest.Host, nic guestNIC, address string) {
	t.Helper()
	all, err := net.Interfaces()
	if err != nil {
		t.Fatal(err)
	}
	for _, i := range all {
		if i.HardwareAddr.String() != nic.mac {
			continue
		}
		if out, err := exec.Command("ip", "link", "set", i.Name, "netns", h.NS, "name", "eth0").CombinedOutput(); err != nil {
			t.Fatalf("%s: %v: %s", i.Name, err, out)
		}
		h.MAC = nic.mac
		h.Run("ip", "link", "set", "eth0", "up")
		h.Run("ip", "addr", "add", address, "dev", "eth0")
		return
	}
	t.Fatalf("the guest has no NIC %s", nic.mac)
}

// An idler counts what is left of the one processor: a process of the least importance adds
// to a number whenever there is nothing else to do. On a processor of which an instruction
// takes a nanosecond, what the clock says beyond that number's worth is how many
// instructions all others took, those of interrupts included, which the kernel ascribes to
// whomever they interrupt.
type idler struct {
	count *atomic.Uint64
	each  float64 // ns
}

const idleFile = "/dev/shm/idle"

func startIdle(t *testing.T) *idler {
	t.Helper()
	if err := os.WriteFile(idleFile, make([]byte, os.Getpagesize()), 0o600); err != nil {
		t.Fatal(err)
	}
	count, err := mapIdle()
	if err != nil {
		t.Fatal(err)
	}
	bed := netnstest.NewUnwatched(t)
	bed.Detached("idle").Start("idle").Await(0, "idle")
	i := &idler{count: count}
	time.Sleep(100 * time.Millisecond)
	start, from := time.Now(), count.Load()
	time.Sleep(500 * time.Millisecond)
	i.each = float64(time.Since(start)) / float64(count.Load()-from)
	return i
}

func mapIdle() (*atomic.Uint64, error) {
	f, err := os.OpenFile(idleFile, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := unix.Mmap(int(f.Fd()), 0, os.Getpagesize(), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, err
	}
	return (*atomic.Uint64)(unsafe.Pointer(&b[0])), nil
}

// idleProgram is that process.
func idleProgram([]string) int {
	runtime.LockOSThread()
	count, err := mapIdle()
	if err == nil {
		err = unix.SchedSetAttr(0, &unix.SchedAttr{Size: unix.SizeofSchedAttr, Policy: unix.SCHED_IDLE}, 0)
	}
	if err != nil {
		fmt.Println(err)
		return 1
	}
	fmt.Println("idle")
	for {
		count.Add(1)
	}
}

// busy is how many instructions do takes, of all but the idler, without what the guest takes
// anyway.
func (i *idler) busy(do func()) float64 {
	start, from := time.Now(), i.count.Load()
	do()
	return float64(time.Since(start)) - float64(i.count.Load()-from)*i.each
}

// spray sends frames of another node's flows and gives what one costs, with its sending.
func (i *idler) spray(t *testing.T, generator, host *netnstest.Host, frames int) Run {
	t.Helper()
	f, err := frame(cloneMAC[:], net.ParseIP(vip).To4(), "tcp")
	if err != nil {
		t.Fatal(err)
	}
	fd := -1
	if err := generator.Do(func() error {
		ifi, err := net.InterfaceByName("eth0")
		if err != nil {
			return err
		}
		if fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0); err != nil {
			return err
		}
		return unix.Bind(fd, &unix.SockaddrLinklayer{Ifindex: ifi.Index})
	}); err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	send := func(n int) {
		for k := range n {
			port := firstPort + k%flows
			f[14+20], f[14+20+1] = byte(port>>8), byte(port)
			if _, err := unix.Write(fd, f); err != nil && !errors.Is(err, unix.ENOBUFS) {
				t.Fatal(err)
			}
			if k%64 == 63 {
				time.Sleep(200 * time.Microsecond) // the host's queues are short
			}
		}
		time.Sleep(20 * time.Millisecond)
	}
	send(64) // caches
	return Run{CPU: i.busy(func() { send(frames) }) / float64(frames)}
}

// upload sends octets by TCP and gives what one costs, with its sending.
func (i *idler) upload(t *testing.T, generator, host *netnstest.Host, to string, octets int) Run {
	t.Helper()
	var l net.Listener
	if err := host.Do(func() (err error) { l, err = net.Listen("tcp4", ":80"); return err }); err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	received := make(chan int64)
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			buf := make([]byte, 256<<10)
			total := int64(0)
			for {
				n, err := conn.Read(buf)
				if total += int64(n); err != nil {
					break
				}
			}
			conn.Close()
			received <- total
		}
	}()
	send := func(n int) {
		conn, err := generator.DialContext(t.Context(), "tcp4", to+":80")
		if err != nil {
			t.Fatal(err)
		}
		buf := make([]byte, 256<<10)
		for sent := 0; sent < n; sent += len(buf) {
			if _, err := conn.Write(buf); err != nil {
				t.Fatal(err)
			}
		}
		conn.Close()
		if got := <-received; got < int64(n) {
			t.Fatalf("%d of %d octets came", got, n)
		}
	}
	send(256 << 10)
	return Run{CPU: i.busy(func() { send(octets) }) / float64(octets)}
}
