package neigh

import (
	"bytes"
	"net"
	"net/netip"
	"testing"
)

// TestQuestion: the frames are those that gopacket builds, and the Responder answers them.
func TestQuestion(t *testing.T) {
	local := LinkLocal(clientMAC)
	if want := "fe80::5054:ff:fe11:2233"; local.String() != want { // as Linux has it
		t.Errorf("of %v follows %v; want %s", clientMAC, local, want)
	}
	for _, tt := range []struct {
		name        string
		source, vip netip.Addr
		want        []byte
		answerTo    net.HardwareAddr
	}{
		{"ARP probe", netip.IPv4Unspecified(), vip4, arpRequest(broadcast, clientMAC, "0.0.0.0", "10.77.0.10"), clientMAC},
		{"duplicate address detection", netip.IPv6Unspecified(), vip6, solicitationOf(groupMAC, "::", group, "fd77::10", 255, nil), AllNodesMAC},
		{"solicitation", local, vip6, solicitationOf(groupMAC, local.String(), group, "fd77::10", 255, clientMAC), clientMAC},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := Question(clientMAC, tt.source, tt.vip)
			if err != nil {
				t.Fatal(err)
			}
			if n := min(len(got), len(tt.want)); !bytes.Equal(got[:n], tt.want[:n]) || len(bytes.Trim(tt.want[n:], "\x00")) != 0 {
				t.Errorf("%x; want %x", got, tt.want)
			}
			if mac := Claimed(got, tt.vip); mac != nil {
				t.Errorf("the question counts as a claim of %v", mac)
			}
			answer, err := newResponder(t, config).Reply(got, nil)
			if err != nil || !bytes.Equal(answer[:6], tt.answerTo) {
				t.Fatalf("answered by %x, %v; want an answer to %v", answer, err, tt.answerTo)
			}
			if mac := Claimed(answer, tt.vip); !bytes.Equal(mac, cloneMAC[:]) {
				t.Errorf("the answer is a claim of %v; want %v", mac, net.HardwareAddr(cloneMAC[:]))
			}
		})
	}
}

// TestClaimed: who speaks for the VIP, whatever the form, and that nothing else counts.
func TestClaimed(t *testing.T) {
	all, err := newResponder(t, config).Announcements()
	if err != nil {
		t.Fatal(err)
	}
	for i, vip := range []netip.Addr{vip4, vip6} {
		if mac := Claimed(all[i], vip); !bytes.Equal(mac, cloneMAC[:]) {
			t.Errorf("%v: a claim of %v; want %v", vip, mac, net.HardwareAddr(cloneMAC[:]))
		}
		if mac := Claimed(all[i], vip.Next()); mac != nil {
			t.Errorf("%v: another address counts as the VIP, claimed by %v", vip, mac)
		}
		if mac := Claimed(all[1-i], vip); mac != nil {
			t.Errorf("%v: what says something of %v counts as a claim of %v", vip, []netip.Addr{vip6, vip4}[i], mac)
		}
	}
	bare := all[1][:offOption] // RFC 4861, 4.4: the option may be left out of a unicast answer
	if mac := Claimed(bare, vip6); !bytes.Equal(mac, wireMAC[:]) {
		t.Errorf("without an option: a claim of %v; want that of the source", mac)
	}
}

func FuzzClaimed(f *testing.F) {
	all, err := newResponder(f, config).Announcements()
	if err != nil {
		f.Fatal(err)
	}
	for _, frame := range all {
		f.Add(frame)
		f.Add(frame[:len(frame)-1])
	}
	f.Add(patch(all[0], 18, 128)) // the hardware length
	f.Add(patch(all[1], offOption+1, 0))
	f.Fuzz(func(t *testing.T, frame []byte) {
		for _, vip := range []netip.Addr{vip4, vip6} {
			if mac := Claimed(frame, vip); mac != nil && len(mac) != 6 {
				t.Errorf("a claim of %v", mac)
			}
		}
	})
}
