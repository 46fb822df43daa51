package bench

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/signal"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
	"golang.org/x/sys/unix"

	"clonecluster/netcore/clone"
	"clonecluster/netcore/filter"
	"clonecluster/netcore/macvlan"
	"clonecluster/netcore/netnstest"
	"clonecluster/netcore/nic"
	"clonecluster/netcore/raw"
)

// deafPort is where somebody listens and does not read: the kernel does all that it does
// with a datagram, and drops it when the queue is full.
const deafPort = 7000

const receiverMAC = "52:54:00:77:03:02"

// A receiver is a host at the other end of a generator's cable.
type receiver struct {
	name, work string
	bed        *netnstest.Bed
	generator  *netnstest.Host
	host       *netnstest.Host
	mac, ip    string // to which the frames go
	slow       bool   // it takes the frames in its own time, and has room for some
	node       *netnstest.Process
	sent       int
	seen       func() (judged int) // how many frames the receiver has judged; nil: it does not tell
}

// A receiverPlan is a receiver that is not built yet.
type receiverPlan struct {
	name, work string
	build      func(*receiver) error
}

// receiverPlans are all receivers in the order of the report. Those of the datapaths have
// a table of their own instead of an engine: all flows belong to another node, or to them.
func (m *measurer) receiverPlans() []receiverPlan {
	clone := net.HardwareAddr(cloneMAC[:]).String()
	node := func(kind, state string) func(*receiver) error {
		return func(r *receiver) error {
			m.cable(r)
			r.mac, r.ip = clone, vip
			r.slow = kind == "raw"
			r.node = r.host.Start("node", kind, state, r.bed.BPFFS())
			r.node.Await(0, "node ready")
			if kind == "generic" {
				m.makeGeneric(r.bed, r.host)
			}
			if state == "settled" {
				r.seen = r.heard
			} else {
				r.seen = r.judged
			}
			return nil
		}
	}
	plain := func(mac string) func(*receiver) error {
		return func(r *receiver) error {
			m.cable(r)
			r.mac, r.ip = mac, "10.77.0.101"
			r.host.Start("deaf").Await(0, "deaf ready")
			if r.work == Accept {
				r.seen = r.heard
			}
			return nil
		}
	}
	xt := func(mask int) func(*receiver) error {
		return func(r *receiver) error {
			m.cable(r)
			r.mac, r.ip = groupMAC, vip
			r.host.Run("ip", "addr", "add", vip+"/24", "dev", "eth0")
			r.host.Run("ip", "maddr", "add", groupMAC, "dev", "eth0")
			r.host.Start("deaf").Await(0, "deaf ready")
			r.seen = r.dropped
			if r.work == Accept {
				r.seen = r.heard
			}
			return xtRules(r.host, mask)
		}
	}
	return []receiverPlan{
		{Floor, Discard, m.onlyDrops},
		{HashFloor, Discard, m.onlyHashes},
		{"bpf, XDP", Discard, node("xdp", "foreign")},
		{"bpf, generic XDP", Discard, node("generic", "foreign")},
		{"bpf, tcx", Discard, node("tc", "foreign")},
		{Uninvolved, Discard, plain(clone)},
		{"raw", Discard, node("raw", "foreign")},
		{XtCluster, Discard, xt(2)},
		{Plain, Accept, plain(receiverMAC)},
		{"bpf, XDP", Accept, node("xdp", "settled")},
		{"bpf, generic XDP", Accept, node("generic", "settled")},
		{"bpf, tcx", Accept, node("tc", "settled")},
		{"raw", Accept, node("raw", "settled")},
		{XtCluster, Accept, xt(3)},
	}
}

// receiver builds one; why says what this machine lacks for it.
func (m *measurer) receiver(p receiverPlan) (_ *receiver, why error) {
	r := &receiver{name: p.name, work: p.work, bed: netnstest.NewUnwatched(m.t)}
	r.generator = r.bed.Detached("generator")
	return r, p.build(r)
}

// cable connects generator and receiver without a switch, which would cost its share.
func (m *measurer) cable(r *receiver) {
	r.host = r.bed.Detached("receiver")
	r.generator.Run("ip", "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", r.host.NS)
	r.host.Run("ip", "link", "set", "eth0", "address", receiverMAC, "up")
	r.host.Run("ip", "addr", "add", "10.77.0.101/24", "dev", "eth0")
	// Without it, or a program of its own, it does not take frames that XDP sends.
	r.host.Run("ethtool", "-K", "eth0", "gro", "on")
	r.generator.Run("ip", "link", "set", "eth0", "up")
}

// onlyDrops is what is left when nobody asks what a frame is: the way across the cable.
func (m *measurer) onlyDrops(r *receiver) error {
	m.cable(r)
	r.mac, r.ip = net.HardwareAddr(cloneMAC[:]).String(), vip
	p, err := always(ebpf.XDP, xdpDrop)
	if err != nil {
		return err
	}
	return m.attach(r.host, "eth0", p, func(ifindex int) (io.Closer, error) {
		return link.AttachXDP(link.XDPOptions{Program: p, Interface: ifindex, Flags: link.XDPDriverMode})
	})
}

// attach attaches a program to one of a host's devices until the test ends.
func (m *measurer) attach(h *netnstest.Host, device string, p *ebpf.Program, attach func(ifindex int) (io.Closer, error)) error {
	m.t.Cleanup(func() { p.Close() })
	return h.Do(func() error {
		ifi, err := net.InterfaceByName(device)
		if err != nil {
			return err
		}
		l, err := attach(ifi.Index)
		if err == nil {
			m.t.Cleanup(func() { l.Close() })
		}
		return err
	})
}

// The verdicts of linux/bpf.h and linux/pkt_cls.h.
const (
	xdpDrop   = 1
	xdpPass   = 2
	noVerdict = -1 // of tcx: the next program decides
	tcDrop    = 2
)

// always is a program that says the same of every frame.
func always(t ebpf.ProgramType, verdict int32) (*ebpf.Program, error) {
	return ebpf.NewProgram(&ebpf.ProgramSpec{Type: t, License: "GPL", Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, verdict), asm.Return()}})
}

// flood sends frames and gives what one costs.
func (m *measurer) flood(r *receiver) (cost, Run) {
	m.t.Helper()
	proto := map[string]string{Discard: "tcp", Accept: "udp"}[r.work]
	frames, burst, rest := m.scale.frames, m.scale.frames/8, time.Duration(0)
	if r.slow {
		frames, burst, rest = frames/8, 512, 6*time.Millisecond
	}
	self, err := os.Executable()
	if err != nil {
		m.t.Fatal(err)
	}
	// A signal to Go's scheduler would end a burst, and it would be done again.
	args := []string{"GODEBUG=asyncpreemptoff=1", netnstest.ProgramEnv + "=flood", self, r.mac, r.ip, proto, strconv.Itoa(frames), strconv.Itoa(burst), rest.String()}
	var wall, used, sending time.Duration
	c := m.spent(r.bed, func() time.Duration {
		var out string
		out, used = m.client(r.generator, 0, "env", args...)
		if _, err := fmt.Sscan(out, &sending, &wall); err != nil {
			m.fatal("%s: the generator says %q", r.name, out)
		}
		r.sent += frames
		if r.slow {
			m.settle(r.node)
		}
		return sending // its start, and the frames that are lost, are not what is measured
	})
	c.aside = used - sending
	run := perUnit(c, float64(frames))
	run.Rate, run.All = float64(frames)/wall.Seconds(), 0
	return c, run
}

// settle waits until a process has nothing left to do: what it still had is in its time.
func (m *measurer) settle(p *netnstest.Process) {
	for range 100 {
		before := p.CPU()
		time.Sleep(30 * time.Millisecond)
		if p.CPU()-before < time.Millisecond {
			return
		}
	}
}

// testRun is what one frame costs a node's own program, when the kernel runs it a hundred
// thousand times in a row (BPF_PROG_TEST_RUN): the best of several, as the others are those
// of a busy machine. The node has the table that it has in the floods.
func (m *measurer) testRun(run testRun) Run {
	m.t.Helper()
	best := time.Hour
	for range 10 {
		_, took, err := run.program.Benchmark(run.frame, m.scale.testRuns, nil)
		if err != nil {
			m.t.Fatal(err)
		}
		best = min(best, took)
		if run.judge != nil {
			run.judge.sent += m.scale.testRuns
		}
	}
	m.mustGoOn()
	return Run{CPU: float64(best)}
}

// A testRun is a program and a frame for it.
type testRun struct {
	way, work string
	program   *ebpf.Program
	frame     []byte
	judge     *receiver // who counts the frames with those of the floods; may be nil
}

// testRuns are those of the nodes that are there.
func (m *measurer) testRuns(receivers []*receiver) (runs []testRun) {
	make := func(mac, proto string) []byte {
		dst, err := net.ParseMAC(mac)
		if err != nil {
			m.t.Fatal(err)
		}
		f, err := frame(dst, net.ParseIP(vip).To4(), proto)
		if err != nil {
			m.t.Fatal(err)
		}
		return f
	}
	for _, hook := range []struct {
		way, pin string
		t        ebpf.ProgramType
		verdict  int32
	}{{"bpf, XDP", "ingress_xdp", ebpf.XDP, xdpDrop}, {"bpf, tcx", "ingress_tc", ebpf.SchedCLS, tcDrop}} {
		for _, r := range receivers {
			if r.name != hook.way {
				continue
			}
			p, l := m.pinned(r.bed, r.host, hook.pin)
			l.Close()
			m.t.Cleanup(func() { p.Close() })
			if r.work == Accept {
				runs = append(runs, testRun{r.name, TestAccept, p, make(r.mac, "udp"), nil})
				continue
			}
			floor, err := always(hook.t, hook.verdict)
			if err != nil {
				m.t.Fatal(err)
			}
			m.t.Cleanup(func() { floor.Close() })
			runs = append(runs, testRun{r.name, TestDiscard, p, make(r.mac, "tcp"), r}, testRun{r.name, TestStranger, p, make(receiverMAC, "tcp"), nil},
				testRun{r.name, TestFloor, floor, make(r.mac, "tcp"), nil})
		}
	}
	return runs
}

// check fails if a receiver has not seen nearly all that it was sent: it would look cheap.
// The queue of a cable is short, so on a busy machine some are lost.
func (m *measurer) check(r *receiver) {
	m.t.Helper()
	if r.seen == nil {
		return
	}
	switch seen := r.seen(); {
	case seen >= r.sent*97/100 && seen <= r.sent*101/100:
	case m.scale.rest == 0: // a trial, which nobody believes
		m.t.Logf("%s, %s: it has had %d of %d frames", r.name, r.work, seen, r.sent)
	default:
		m.t.Errorf("%s, %s: it has had %d of %d frames", r.name, r.work, seen, r.sent)
	}
}

// judged asks a node that is going down how many frames were another's.
func (r *receiver) judged() int {
	_ = r.node.Stop()
	n := regexp.MustCompile(regexp.QuoteMeta(filter.DropForeign.String()) + `=(\d+)`).FindStringSubmatch(r.node.Output())
	if n == nil {
		return 0
	}
	count, _ := strconv.Atoi(n[1])
	return count
}

// heard is how many packets the kernel has taken for this host.
func (r *receiver) heard() int {
	lines := regexp.MustCompile(`(?m)^Ip: (.*)$`).FindAllStringSubmatch(r.host.Run("cat", "/proc/net/snmp"), -1)
	if len(lines) != 2 {
		return 0
	}
	i := slices.Index(strings.Fields(lines[0][1]), "InDelivers")
	n, _ := strconv.Atoi(strings.Fields(lines[1][1])[i])
	return n
}

// dropped is the count of xt_cluster's second rule.
func (r *receiver) dropped() (seen int) {
	for line := range strings.Lines(r.host.Run("iptables", "-w", "-t", "mangle", "-L", "PREROUTING", "-v", "-x", "-n")) {
		if f := strings.Fields(line); len(f) > 2 && f[2] == "DROP" {
			seen, _ = strconv.Atoi(f[0])
		}
	}
	return seen
}

// The generator's frames are of so many flows, which differ in the client's port.
const (
	flows     = 1024
	firstPort = 20000
	window    = 40000
)

// frame is a small one to an address.
func frame(dst net.HardwareAddr, ip net.IP, proto string) ([]byte, error) {
	l3 := &layers.IPv4{Version: 4, TTL: 64, Protocol: layers.IPProtocolTCP, SrcIP: net.IP{10, 77, 0, 1}, DstIP: ip}
	var l4 gopacket.SerializableLayer
	if proto == "tcp" {
		tcp := &layers.TCP{SrcPort: firstPort, DstPort: 80, ACK: true, Seq: 1, Ack: 1, Window: window}
		_ = tcp.SetNetworkLayerForChecksum(l3)
		l4 = tcp
	} else {
		udp := &layers.UDP{SrcPort: firstPort, DstPort: deafPort}
		_ = udp.SetNetworkLayerForChecksum(l3)
		l3.Protocol, l4 = layers.IPProtocolUDP, udp
	}
	buf := gopacket.NewSerializeBuffer()
	err := gopacket.SerializeLayers(buf, gopacket.SerializeOptions{FixLengths: true, ComputeChecksums: true},
		&layers.Ethernet{SrcMAC: net.HardwareAddr{0x52, 0x54, 0, 0x77, 3, 1}, DstMAC: dst, EthernetType: layers.EthernetTypeIPv4}, l3, l4, gopacket.Payload("some octets of payload"))
	if b := buf.Bytes(); err == nil && proto == "udp" {
		copy(b[14+20+6:], []byte{0, 0}) // no checksum, so that the port can change
	}
	return buf.Bytes(), err
}

// flood is the generator: MAC, IP, protocol, number, burst, rest. The kernel sends the frames
// (BPF_F_TEST_XDP_LIVE_FRAMES), 64 at a time, as a NIC's driver would take them in; so they
// cost little here, and at the receiver nothing that they would not cost a host with a NIC. It
// rests between bursts. Of each burst it does another that gets nowhere, and says how much
// more processor time those have taken that were sent, with what the kernel did of the
// receiver's work meanwhile, and how long it all took.
func flood(args []string) int {
	if err := func() error {
		dst, err := net.ParseMAC(args[0])
		if err != nil {
			return err
		}
		count, err := strconv.Atoi(args[3])
		if err != nil {
			return err
		}
		burst, err := strconv.Atoi(args[4])
		if err != nil {
			return err
		}
		rest, err := time.ParseDuration(args[5])
		if err != nil {
			return err
		}
		f, err := frame(dst, net.ParseIP(args[1]).To4(), args[2])
		if err != nil {
			return err
		}
		ifi, err := net.InterfaceByName("eth0")
		if err != nil {
			return err
		}
		var senders [2]*ebpf.Program
		for i, lost := range []bool{true, false} {
			if senders[i], err = sender(int32(ifi.Index), args[2] == "tcp", lost); err != nil {
				return err
			}
			defer senders[i].Close()
		}
		start := time.Now()
		var cpu [2]time.Duration
		for count > 0 {
			n := min(count, burst)
			for i, p := range senders {
				before := clock(unix.CLOCK_PROCESS_CPUTIME_ID)
				if _, err := p.Run(&ebpf.RunOptions{Data: f, Repeat: uint32(n), Flags: unix.BPF_F_TEST_XDP_LIVE_FRAMES}); err != nil {
					return err
				}
				cpu[i] += clock(unix.CLOCK_PROCESS_CPUTIME_ID) - before
			}
			count -= n
			time.Sleep(rest)
		}
		fmt.Println(int64(cpu[1]-cpu[0]), int64(time.Since(start)))
		return nil
	}(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

// sender is the program that gives each frame a flow and sends it by a device, or loses it.
func sender(ifindex int32, tcp, lost bool) (*ebpf.Program, error) {
	const ports = 14 + 20 // where they are in the frame
	code := asm.Instructions{
		asm.LoadMem(asm.R7, asm.R1, 0, asm.Word), // xdp_md.data
		asm.LoadMem(asm.R8, asm.R1, 4, asm.Word), // xdp_md.data_end
		asm.Mov.Reg(asm.R2, asm.R7),
		asm.Add.Imm(asm.R2, ports+20),
		asm.JGT.Reg(asm.R2, asm.R8, "drop"),
		asm.FnGetPrandomU32.Call(),
		asm.And.Imm(asm.R0, flows-1),
		asm.Mov.Reg(asm.R1, asm.R0),
		asm.Add.Imm(asm.R1, firstPort),
		asm.HostTo(asm.BE, asm.R1, asm.Half),
		asm.StoreMem(asm.R7, ports, asm.R1, asm.Half),
	}
	if tcp {
		// The window is as much less as the port is more: the checksum stays.
		code = append(code,
			asm.Mov.Imm(asm.R1, window),
			asm.Sub.Reg(asm.R1, asm.R0),
			asm.HostTo(asm.BE, asm.R1, asm.Half),
			asm.StoreMem(asm.R7, ports+14, asm.R1, asm.Half))
	}
	if !lost {
		code = append(code, asm.Mov.Imm(asm.R1, ifindex), asm.Mov.Imm(asm.R2, 0), asm.FnRedirect.Call(), asm.Return())
	}
	code = append(code, asm.Mov.Imm(asm.R0, xdpDrop).WithSymbol("drop"), asm.Return())
	return ebpf.NewProgram(&ebpf.ProgramSpec{Type: ebpf.XDP, License: "GPL", Instructions: code})
}

func clock(id int32) time.Duration {
	var ts unix.Timespec
	_ = unix.ClockGettime(id, &ts)
	return time.Duration(ts.Nano())
}

// deaf listens and does not read.
func deaf([]string) int {
	if _, err := listenDeaf(); err != nil {
		fmt.Println(err)
		return 1
	}
	fmt.Println("deaf ready")
	select {}
}

func listenDeaf() (int, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err == nil {
		err = unix.Bind(fd, &unix.SockaddrInet4{Port: deafPort})
	}
	return fd, err
}

// node is a datapath with one state in its whole table, without an engine: kind, state, BPF
// file system. When it is stopped it says what it has judged.
func node(args []string) int {
	kind, bpffs := args[0], args[2]
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	if err := func() error {
		table := new(filter.Table)
		if args[1] == "settled" {
			table = settled()
			if _, err := listenDeaf(); err != nil {
				return err
			}
		}
		host, err := cloneConfig()
		if err != nil {
			return err
		}
		// As the engine's: unix.ClockGettime is a system call each time.
		base, offset := time.Now(), clock(unix.CLOCK_MONOTONIC)
		now := func() int64 { return int64(offset + time.Since(base)) }
		fc := filter.Config{CloneMAC: cloneMAC, VIP4: netip.MustParseAddr(vip), Rules: []filter.Rule{
			{Proto: filter.ProtoTCP, PortLo: 80, PortHi: 81}, {Proto: filter.ProtoUDP, PortLo: deafPort, PortHi: deafPort},
		}}
		var path interface {
			Run(context.Context) error
			Close() error
		}
		var judge interface {
			SetTable(*filter.Table, int64)
			SetLease(int64)
			Counters() filter.Counters
		}
		if kind == "raw" {
			f, err := filter.New(fc)
			if err != nil {
				return err
			}
			if path, err = raw.Open(raw.Config{Config: host, Filter: f, Now: now}); err != nil {
				return err
			}
			judge = f
		} else {
			pins, err := macvlan.PinsOf(bpffs)
			if err != nil {
				return err
			}
			d, err := macvlan.Open(macvlan.Config{Config: host, Filter: fc, WireAddress: kind == "native", XDP: kind == "xdp" || kind == "generic", Now: now, Pins: pins})
			if err != nil {
				return err
			}
			path, judge = d, d.Filter()
		}
		judge.SetTable(table, now())
		judge.SetLease(now() + int64(24*time.Hour))
		fmt.Println("node ready")
		err = path.Run(ctx)
		counters := judge.Counters()
		for v, n := range counters {
			fmt.Printf("%v=%d\n", filter.Verdict(v), n)
		}
		return errors.Join(err, path.Close())
	}(); err != nil {
		fmt.Println(err)
		return 1
	}
	return 0
}

// cloneConfig is the VIP on this host.
func cloneConfig() (clone.Config, error) {
	cfg := clone.Config{CloneMAC: cloneMAC, VIP4: netip.MustParsePrefix(vip + "/24"), Logger: slog.New(slog.NewTextHandler(io.Discard, nil))}
	nics, err := nic.List()
	for _, n := range nics {
		if n.Name == "eth0" {
			cfg.NIC = n
		}
	}
	return cfg, err
}

// settled is the table of whom all flows belong to.
func settled() *filter.Table {
	t := new(filter.Table)
	for i := range t {
		t[i] = filter.Settled
	}
	return t
}
