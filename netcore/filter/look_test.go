package filter

import (
	"net/netip"
	"testing"
)

// TestLook: who looks at a frame that comes in learns what Ingress says, and changes nothing.
func TestLook(t *testing.T) {
	for _, c := range ingressCases() {
		if c.fenced || c.held || c.sockets != nil {
			continue
		}
		f := newFilter(t, testConfig(), c.state)
		if got := f.Look(c.frame, false, testNow, nil); got.Verdict.String() != c.want || got.Bucket >= 0 && got.State != c.state {
			t.Errorf("%s: Look = %+v; want %s in %v", c.name, got, c.want, c.state)
		}
		if f.Counters() != (Counters{}) {
			t.Fatalf("%s: a look was counted", c.name)
		}
	}
	for _, c := range egressCases() {
		f := newFilter(t, testConfig(), c.state)
		if v := f.Look(c.frame, true, testNow, nil).Verdict; v != Send && v != DropNotOurs {
			t.Errorf("%s: Look = %v", c.name, v)
		}
		if f.heldTCP[0].Load() != 0 || f.Counters() != (Counters{}) {
			t.Fatalf("%s: a look left something", c.name)
		}
	}
}

// TestLookFindsTheFlow: both ways, and what is quoted, have one client and one bucket.
func TestLookFindsTheFlow(t *testing.T) {
	for _, ip := range clientIPs {
		f := newFilter(t, testConfig(), Settled)
		flow := Tuple{Proto: ProtoTCP, VIP: netip.AddrPortFrom(ip.vip, 80), Client: netip.AddrPortFrom(ip.client, clientPort)}
		ping := Tuple{VIP: netip.AddrPortFrom(ip.vip, 0), Client: netip.AddrPortFrom(ip.client, 0)}
		answer := tcp(ip.vip, ip.client, 80, clientPort, "SA")
		for name, tt := range map[string]struct {
			frame  []byte
			left   bool
			tuple  Tuple
			bucket int
			want   Verdict
		}{
			"SYN":    {tcp(ip.client, ip.vip, clientPort, 80, "S"), false, flow, f.Bucket(flow), AcceptNew},
			"answer": {answer, true, flow, f.Bucket(flow), Send},
			"error":  {quote(answer, 100), false, flow, f.Bucket(flow), AcceptError},
			"ping":   {echo(ip.client, ip.vip), false, ping, f.ClientBucket(ip.client), AcceptNew},
			"pong":   {echoReply(ip.vip, ip.client), true, ping, f.ClientBucket(ip.client), Send},
		} {
			got := f.Look(tt.frame, tt.left, testNow, nil)
			got.Tuple.Proto = tt.tuple.Proto
			if got.Verdict != tt.want || got.Bucket != tt.bucket || got.Tuple != tt.tuple || got.State != Settled {
				t.Errorf("%s of %v: %+v; want %v, bucket %d, %+v", name, ip.client, got, tt.want, tt.bucket, tt.tuple)
			}
		}
		if got := f.Look(tcp(ip.other, ip.client, 22, clientPort, "PA"), true, testNow, nil); got.Verdict != DropNotOurs || got.Bucket >= 0 || got.Tuple != (Tuple{}) {
			t.Errorf("what the machine says of its own: %+v; want that it is not ours", got)
		}
	}
}
