package bpf

import (
	"testing"
	"time"

	"github.com/cilium/ebpf"

	"clonecluster/netcore/filter"
)

// BenchmarkVerdict is the time of one frame in the kernel (BPF_PROG_TEST_RUN): the
// best of some runs of a million, as the others are those of a busy machine.
func BenchmarkVerdict(b *testing.B) {
	frames := map[string][]byte{}
	for _, v := range vectors(b) {
		if !v.out && frames[v.name] == nil {
			frames[v.name] = v.frame
		}
	}
	notOurs := append([]byte{0x52, 0x54, 0, 0x77, 0, 1}, frames["SYN"][6:]...)
	for _, c := range []struct {
		name    string
		frame   []byte
		state   filter.State
		sockets asked
	}{
		{"another host's", notOurs, filter.Settled, askKernel},
		{"foreign SYN", frames["SYN"], filter.Foreign, askKernel},
		{"foreign segment", frames["ACK"], filter.Foreign, askKernel},
		{"settled SYN", frames["SYN"], filter.Settled, askKernel},
		{"settled segment", frames["ACK"], filter.Settled, askKernel},
		{"shared segment without a socket", frames["ACK"], filter.Shared, askKernel},
	} {
		w := newTwins(b, testConfig(false), c.sockets)
		if err := w.set(c.state, false, false); err != nil {
			b.Fatal(err)
		}
		for name, program := range map[string]*ebpf.Program{"XDP": w.kernel.objects.IngressXdp, "tc": w.kernel.objects.IngressTc} {
			b.Run(c.name+"/"+name, func(b *testing.B) {
				best := time.Hour
				for b.Loop() {
					_, took, err := program.Benchmark(c.frame, 1_000_000, b.ResetTimer)
					if err != nil {
						b.Fatal(err)
					}
					best = min(best, took)
				}
				b.ReportMetric(float64(best.Nanoseconds()), "ns/frame")
				b.ReportMetric(0, "ns/op")
			})
		}
	}
}
