package filter

import (
	"net/netip"
	"testing"
	"time"
)

// TestOffered: what is counted of a client's frames, and when a SYN is one again.
func TestOffered(t *testing.T) {
	cfg := testConfig()
	cfg.Rules = []Rule{{Proto: ProtoTCP, PortLo: 80, PortHi: 80}, {Proto: ProtoTCP, PortLo: 23, PortHi: 23, Disabled: true}}
	f := newFilter(t, cfg, Foreign)
	client := netip.AddrPortFrom(client4, clientPort)
	now := int64(time.Hour)
	syn := func(port uint16, sequence int, after time.Duration) {
		now += int64(after)
		f.Ingress(patch(tcp(client4, vip4, clientPort, port, "S"), etherHeader+20+4, 0, 0, 0, byte(sequence)), now, nil)
	}
	syn(80, 1, 0)
	f.Look(tcp(client4, vip4, clientPort, 80, "S"), false, now, nil) // which counts nothing
	syn(80, 1, time.Millisecond)                                     // a copy of the network's
	syn(80, 1, time.Second)                                          // again
	syn(80, 1, 2*time.Second)                                        // again
	syn(80, 2, 10*time.Second)                                       // another connection of that port
	syn(80, 2, 41*time.Second)                                       // too late to be it
	syn(8080, 3, 0)                                                  // no service's
	syn(8080, 3, time.Second)                                        //
	syn(23, 4, 0)                                                    // disabled
	syn(23, 4, time.Second)                                          //
	syn(80, 2, 500*time.Millisecond)                                 // again, in the meantime
	var frames, syns, again uint64
	o := f.Offered()
	for b := range Buckets {
		frames, syns, again = frames+o.Frames[b], syns+o.SYNs[b], again+o.Again[b]
	}
	if frames != 9 || syns != 7 || again != 3 {
		t.Errorf("%d frames, %d SYNs, %d again; want 9, 7, 3", frames, syns, again)
	}
	bucket := f.Bucket(Tuple{ProtoTCP, netip.AddrPortFrom(vip4, 80), client})
	if o.Again[bucket] != 3 {
		t.Errorf("bucket %d has %d; want all", bucket, o.Again[bucket])
	}
	if got := f.Askers(now + int64(3*time.Second)); len(got) != 1 || got[0] != (Asker{bucket, 3 * time.Second}) {
		t.Errorf("askers %v; want the one client in bucket %d, 3s ago", got, bucket)
	}
	if got := f.Askers(now + int64(time.Minute)); len(got) != 0 {
		t.Errorf("askers after a minute: %v", got)
	}
}
