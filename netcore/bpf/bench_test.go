package bpf

import (
	"slices"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"

	"clonecluster/netcore/filter"
)

// BenchmarkVerdict is the time of one frame in the kernel (BPF_PROG_TEST_RUN), with the
// kernel's clock and sockets, next to a program that only drops: ns/floor is what the
// run itself costs, and x-floor what the frame costs as a multiple of it. The two take
// turns of some milliseconds, and the best of each counts: the others are those of a
// busy machine.
func BenchmarkVerdict(b *testing.B) {
	frames := map[string][]byte{}
	for _, v := range vectors(b) {
		name := v.name
		if len(v.frame) > etherHeader && v.frame[12] == 0x86 {
			name += " by IPv6"
		}
		if v.out {
			name = "sent " + name
		}
		if frames[name] == nil {
			frames[name] = v.frame
		}
	}
	frames["another host's"] = append([]byte{0x52, 0x54, 0, 0x77, 0, 1}, frames["SYN"][6:]...)
	cfg := testConfig(false)
	cfg.Rules = append(cfg.Rules, filter.Rule{Proto: filter.ProtoTCP, PortLo: 80, PortHi: 80}) // a service, as nearly all is for one
	kernel := load(b, Options{Filter: cfg})
	kernel.SetLease(1 << 62)
	type attachment struct {
		name           string
		program, floor *ebpf.Program
	}
	floor := drop(b, ebpf.SchedCLS, 2) // TC_ACT_SHOT
	ingress := []attachment{
		{"XDP", kernel.objects.IngressXdp, drop(b, ebpf.XDP, 1)}, // XDP_DROP
		{"tc", kernel.objects.IngressTc, floor},
	}
	egress := []attachment{{"egress", kernel.objects.EgressTc, floor}}
	guard := []attachment{{"guard", kernel.objects.GuardTc, floor}}
	frames["leaving"] = slices.Replace(slices.Clone(frames["sent data"]), 6, 12, 0x52, 0x54, 0, 0x77, 0, 1) // with the wire MAC
	for _, c := range []struct {
		state    filter.State
		frame    string
		programs []attachment
	}{
		{filter.Foreign, "another host's", ingress},
		{filter.Foreign, "SYN", ingress}, {filter.Foreign, "ACK", ingress}, {filter.Foreign, "UDP", ingress},
		{filter.Foreign, "SYN by IPv6", ingress}, {filter.Foreign, "ACK by IPv6", ingress},
		{filter.Settled, "SYN", ingress}, {filter.Settled, "ACK", ingress}, {filter.Settled, "ACK by IPv6", ingress},
		{filter.Shared, "ACK", ingress}, {filter.Shared, "ACK by IPv6", ingress}, // without a socket
		{filter.Settled, "sent data", egress}, {filter.Settled, "sent data by IPv6", egress},
		{filter.Settled, "sent SYN ACK", egress}, {filter.Settled, "sent RST ACK", egress}, {filter.Settled, "sent datagram", egress},
		{filter.Settled, "leaving", guard},
	} {
		var table filter.Table
		for i := range table {
			table[i] = c.state
		}
		kernel.SetTable(&table, 0)
		frame := frames[c.frame]
		for _, a := range c.programs {
			b.Run(c.state.String()+" "+c.frame+"/"+a.name, func(b *testing.B) {
				floor, best := time.Hour, time.Hour
				for b.Loop() {
					floor, best = min(floor, run(b, a.floor, frame)), min(best, run(b, a.program, frame))
				}
				b.ReportMetric(float64(floor), "ns/floor")
				b.ReportMetric(float64(best), "ns/frame")
				b.ReportMetric(float64(best)/float64(floor), "x-floor")
				b.ReportMetric(0, "ns/op")
			})
		}
	}
}

// run gives the time of one frame among many, which the kernel cuts to whole nanoseconds.
func run(tb testing.TB, program *ebpf.Program, frame []byte) time.Duration {
	_, took, err := program.Benchmark(frame, 100_000, nil)
	if err != nil {
		tb.Fatal(err)
	}
	return took
}

// drop gives a program that does nothing else.
func drop(b *testing.B, t ebpf.ProgramType, verdict int32) *ebpf.Program {
	p, err := ebpf.NewProgram(&ebpf.ProgramSpec{Type: t, License: "GPL", Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, verdict), asm.Return()}})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { p.Close() })
	return p
}
