package neigh

import (
	"bytes"
	"net/netip"
	"testing"
)

// TestRedirect: what speaks for one MAC speaks for the other, as if it had been built
// for that, and what is no neighbour message stays as it is.
func TestRedirect(t *testing.T) {
	from, to, wire := [6]byte{2, 0xcc, 1, 2, 3, 4}, [6]byte{0x52, 0x54, 0, 0xff, 0xfe, 0xfd}, [6]byte{2, 0, 0, 0, 0, 9}
	frames := func(mac [6]byte) [][]byte {
		r, err := New(Config{CloneMAC: mac, WireMAC: wire, VIP4: netip.MustParseAddr("10.77.0.10"), VIP6: netip.MustParseAddr("fd77::10")})
		if err != nil {
			t.Fatal(err)
		}
		all, err := r.Announcements()
		if err != nil {
			t.Fatal(err)
		}
		return all
	}
	want := frames(to)
	for i, f := range frames(from) {
		Redirect(f, from, to)
		// A gratuitous ARP also has the MAC as its target's, which nobody reads.
		if f[12] == 8 && f[13] == 6 {
			copy(f[32:38], want[i][32:38])
		}
		if !bytes.Equal(f, want[i]) {
			t.Errorf("frame %d is\n%x; want\n%x", i, f, want[i])
		}
	}
	for i, f := range frames([6]byte{2, 9, 9, 9, 9, 9}) {
		was := bytes.Clone(f)
		if Redirect(f, from, to); !bytes.Equal(f, was) {
			t.Errorf("frame %d, which speaks for another, was changed", i)
		}
	}
}

func FuzzRedirect(f *testing.F) {
	from, to := [6]byte{2, 0xcc, 1, 2, 3, 4}, [6]byte{0x52, 0x54, 0, 0xff, 0xfe, 0xfd}
	r, err := New(Config{CloneMAC: from, WireMAC: to, VIP4: netip.MustParseAddr("10.77.0.10"), VIP6: netip.MustParseAddr("fd77::10")})
	if err != nil {
		f.Fatal(err)
	}
	frames, err := r.Announcements()
	if err != nil {
		f.Fatal(err)
	}
	for _, frame := range frames {
		f.Add(frame)
	}
	f.Fuzz(func(t *testing.T, frame []byte) {
		n := len(frame)
		head := bytes.Clone(frame[:min(n, 14)])
		Redirect(frame, from, to)
		if len(frame) != n || !bytes.Equal(frame[:min(n, 14)], head) {
			t.Error("the Ethernet header was changed")
		}
	})
}
