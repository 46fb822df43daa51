package filter

import (
	"testing"
)

// TestRoute: to whom each kind of frame is passed on.
func TestRoute(t *testing.T) {
	f := newFilter(t, testConfig(), Foreign)
	for _, tt := range []struct {
		name  string
		frame []byte
		want  Asked
	}{
		{"SYN", tcp(client4, vip4, 4000, 80, "S"), AskBucket},
		{"segment", tcp(client6, vip6, 4000, 80, "A"), AskBucket},
		{"datagram", udp(client4, vip4, 4000, 53), AskBucket},
		{"ping", echo(client4, vip4), AskBucket},
		{"answer to a ping of a node's own", echoReply(client4, vip4), AskEveryone},
		{"segment of a flow that a node opened", tcp(client4, vip4, 80, 40000, "A"), AskEveryone},
		{"first part of a packet", fragment4(udp(client4, vip4, 4000, 53), 0, true), AskBucket},
		{"later part of a packet", fragment4(udp(client4, vip4, 4000, 53), 8, false), AskEveryone},
		{"who has the VIP?", arpFrame(broadcast, clientMAC, 1, clientMAC, client4, noMAC, vip4), AskNeighbor},
		{"does anybody have the VIP?", arpFrame(broadcast, clientMAC, 1, clientMAC, none4, noMAC, vip4), AskNeighbor},
		{"an answer to the VIP", arpFrame(clone(), clientMAC, 2, clientMAC, client4, clone(), vip4), AskEveryone},
		{"a node's own question", arpFrame(broadcast, clientMAC, 1, clone(), vip4, noMAC, client4), AskNothing},
		{"to another host", tcp(client4, other4, 4000, 80, "S"), AskNothing},
		{"from the VIP", tcp(vip4, vip4, 4000, 80, "S"), AskNothing},
		{"no frame", []byte{1, 2, 3}, AskNothing},
	} {
		if _, got := f.Route(tt.frame); got != tt.want {
			t.Errorf("%s asks %d; want %d", tt.name, got, tt.want)
		}
	}
}

// FuzzRoute: a frame that is passed on to the nodes of a bucket is accepted as new by a
// node that owns that bucket alone, or by none, whichever it owns.
func FuzzRoute(f *testing.F) {
	for _, frame := range [][]byte{
		tcp(client4, vip4, 4000, 80, "S"), tcp(client6, vip6, 4000, 80, "S"), udp(client4, vip4, 4000, 53), echo(client6, vip6), fragment4(udp(client4, vip4, 1, 2), 0, true),
	} {
		f.Add(frame)
	}
	flt := newFilter(f, testConfig(), Foreign)
	flt.SetLease(1 << 62)
	f.Fuzz(func(t *testing.T, frame []byte) {
		bucket, asked := flt.Route(frame)
		var all, one Table
		for b := range all {
			all[b] = Settled
		}
		one[bucket] = Settled
		flt.SetTable(&all, 1)
		any := flt.Ingress(frame, 1, nil)
		flt.SetTable(&one, 1)
		if got := flt.Ingress(frame, 1, nil); asked == AskBucket && got != any {
			t.Errorf("with its bucket %d alone the verdict is %v; with all %v", bucket, got, any)
		}
		if asked == AskNothing && any.Accept() && any != AcceptControl && any != AcceptNeighbor {
			t.Errorf("it is passed to nobody and the verdict is %v", any)
		}
	})
}
