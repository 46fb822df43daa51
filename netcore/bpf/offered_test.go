package bpf

import (
	"fmt"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/cilium/ebpf"

	"clonecluster/netcore/filter"
)

// difference names the first bucket in which two differ.
func difference(a, b *filter.Offered) string {
	for i := range filter.Buckets {
		x, y := [3]uint64{a.Frames[i], a.SYNs[i], a.Again[i]}, [3]uint64{b.Frames[i], b.SYNs[i], b.Again[i]}
		if x != y {
			return fmt.Sprintf("bucket %d has %d frames, SYNs, SYNs sent again; want %d", i, x, y)
		}
	}
	return ""
}

// TestOffered: both filters count the same of clients that open connections, send
// SYNs again sooner and later, and of the network, which copies some, on ports with a
// rule and without one; and remember the same clients.
func TestOffered(t *testing.T) {
	cfg := testConfig(false)
	cfg.Rules = append(cfg.Rules, filter.Rule{Proto: filter.ProtoTCP, PortLo: 80, PortHi: 80, Affinity: filter.AffinityClient}, filter.Rule{Proto: filter.ProtoTCP, PortLo: 443, PortHi: 443})
	var bases [][]byte
	for _, v := range vectors(t) {
		if v.name == "SYN" || v.name == "ACK" || v.name == "UDP" {
			bases = append(bases, v.frame)
		}
	}
	if len(bases) < 6 {
		t.Fatalf("%d frames to begin with", len(bases))
	}
	// client changes the last octet of the address, and both ports.
	frame := func(r *rand.Rand, base []byte) []byte {
		f := append([]byte(nil), base...)
		source, ports := 14+15, 14+20
		if f[12] == 0x86 {
			source, ports = 14+23, 14+40
		}
		f[source], f[ports+1], f[ports+2], f[ports+3] = byte(1+r.IntN(8)), byte(r.IntN(3)), 0, []byte{80, 187, 81, 7}[r.IntN(4)]
		if f[ports+3] == 187 { // 443
			f[ports+2] = 1
		}
		if base[23] == 6 || base[20] == 6 {
			f[ports+7] = byte(r.IntN(2)) // of the sequence number
		}
		return f
	}
	programs := []func(*Filter) *ebpf.Program{func(f *Filter) *ebpf.Program { return f.objects.IngressXdp }, func(f *Filter) *ebpf.Program { return f.objects.IngressTc }}
	for attachment, of := range programs {
		user, err := filter.New(cfg)
		if err != nil {
			t.Fatal(err)
		}
		r := rand.New(rand.NewPCG(uint64(attachment), 7))
		var last *Filter
		var all filter.Offered
		now := testNow
		for _, later := range []time.Duration{0, 100 * time.Millisecond, time.Second, 2 * time.Second, 30 * time.Second, 45 * time.Second} {
			now += int64(later)
			kernel := load(t, Options{Filter: cfg, now: now, sockets: askNobody})
			if last != nil {
				*kernel.syns = *last.syns
			}
			last = kernel
			for range 400 {
				f := frame(r, bases[r.IntN(len(bases))])
				user.Ingress(f, now, nil)
				if _, err := of(kernel).Run(&ebpf.RunOptions{Data: f, DataOut: make([]byte, len(f)+256)}); err != nil {
					t.Fatal(err)
				}
			}
			for b, o := 0, kernel.Offered(); b < filter.Buckets; b++ {
				all.Frames[b] += o.Frames[b]
				all.SYNs[b] += o.SYNs[b]
				all.Again[b] += o.Again[b]
			}
			if d := difference(&all, user.Offered()); d != "" {
				t.Fatalf("program %d after %v: %s", attachment, later, d)
			}
			got, want := kernel.Askers(now), user.Askers(now)
			if fmt.Sprint(got) != fmt.Sprint(want) {
				t.Fatalf("program %d after %v: askers %v; want %v", attachment, later, got, want)
			}
		}
		var again, syns uint64
		for b := range filter.Buckets {
			again, syns = again+all.Again[b], syns+all.SYNs[b]
		}
		if again < 50 || again > syns/2 {
			t.Errorf("program %d: of %d SYNs %d were sent again; is that all of the cases?", attachment, syns, again)
		}
	}
}
