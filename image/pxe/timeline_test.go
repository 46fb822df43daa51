package pxe

import (
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"
)

// A boot is told as events, each once, and what is missing afterwards as stuck.
func TestTimeline(t *testing.T) {
	mac := [6]byte{0x52, 0x54, 0, 0x77, 0, 1}
	firmware, node := netip.MustParseAddr("10.77.0.100"), netip.MustParseAddr("10.77.0.101")
	type step func(*timeline, time.Time)
	discover := func(k Kind, arch string) step {
		return func(tl *timeline, now time.Time) {
			tl.offer(tl.discover(mac, Client{Kind: k, Arch: arch}, now), "F", now)
		}
	}
	file := func(name string, bytes, all int64) step {
		return func(tl *timeline, now time.Time) {
			if bytes > 0 {
				tl.loading(mac, name, bytes, firmware, now)
			}
			tl.done(mac, name, "HTTP", bytes, all, time.Second, firmware, now)
		}
	}
	part := func(name string) step {
		return func(tl *timeline, now time.Time) { tl.loading(mac, name, 1000, firmware, now) }
	}
	dhcp := func(a netip.Addr) step { return func(tl *timeline, now time.Time) { tl.node(mac, a, now) } }
	up := func(tl *timeline, now time.Time) { tl.up(mac, "http://10.77.0.101:80/healthz", now) }
	wait := func(d time.Duration) step { return func(tl *timeline, now time.Time) { tl.check(now.Add(d)) } }
	refuse := func(tl *timeline, now time.Time) {
		tl.refuse(tl.discover(mac, Client{Kind: UEFI, Arch: "arm64"}, now), "no image", now)
	}

	for _, tt := range []struct {
		name  string
		final Stage
		steps []step
		want  []string // event and file or the start of the text
	}{
		{"UEFI", Up, []step{discover(UEFI, "amd64"), discover(UEFI, "amd64"), file(efiFile, 0, 100), file(efiFile, 100, 100), dhcp(netip.Addr{}), dhcp(netip.Addr{}), dhcp(node), up, dhcp(node), wait(time.Hour)},
			[]string{"discover", "offer F", "file clonecluster.efi", "kernel", "address", "up"}},
		{"old BIOS", Up, []step{discover(BIOS, "amd64"), file(undionly, 9, 9), discover(IPXE, "amd64"), file(scriptFile, 9, 9), file(kernelFile, 9, 9), file(initrdFile, 9, 9), dhcp(node), up},
			[]string{"discover", "offer F", "file undionly.kpxe", "discover iPXE", "file boot.ipxe", "file bzImage", "file initrd.img", "kernel", "address", "up"}},
		{"a second boot", Up, []step{discover(UEFIHTTP, "amd64"), file(efiFile, 9, 9), dhcp(node), up, discover(UEFIHTTP, "amd64"), file(efiFile, 9, 9)},
			[]string{"discover", "offer F", "file clonecluster.efi", "kernel", "address", "up", "discover", "offer F", "file clonecluster.efi"}},
		{"firmware that begins anew with all files", Up, []step{discover(UEFI, "amd64"), file(efiFile, 9, 9), discover(UEFI, "amd64")},
			[]string{"discover", "offer F", "file clonecluster.efi", "discover", "offer F"}},
		{"it never comes for the file", Up, []step{discover(UEFI, "amd64"), wait(patienceOffer - 1), wait(patienceOffer), wait(time.Hour)},
			[]string{"discover", "offer F", "stuck it has not come for the file"}},
		{"the file stops", Up, []step{discover(UEFI, "amd64"), part(efiFile), wait(patienceLoad)},
			[]string{"discover", "offer F", "stuck clonecluster.efi stopped after 1.0 kB"}},
		{"the transfer ends early", Up, []step{discover(UEFI, "amd64"), file(efiFile, 50, 100)},
			[]string{"discover", "offer F", "aborted clonecluster.efi"}},
		{"iPXE comes for the kernel alone", Up, []step{discover(IPXE, "amd64"), file(scriptFile, 9, 9), file(kernelFile, 9, 9), wait(patienceFile)},
			[]string{"discover", "offer F", "file boot.ipxe", "file bzImage", "stuck it has loaded boot.ipxe and bzImage, and does not"}},
		{"no kernel", Up, []step{discover(UEFI, "amd64"), file(efiFile, 9, 9), wait(patienceFile), wait(patienceKernel)},
			[]string{"discover", "offer F", "file clonecluster.efi", "stuck it has all files, but no kernel"}},
		{"no address", Up, []step{discover(UEFI, "amd64"), file(efiFile, 9, 9), dhcp(netip.Addr{}), wait(patienceAddress)},
			[]string{"discover", "offer F", "file clonecluster.efi", "kernel", "stuck its init asks for an address, and takes none"}},
		{"no service", Up, []step{discover(UEFI, "amd64"), file(efiFile, 9, 9), dhcp(node), wait(patienceUp)},
			[]string{"discover", "offer F", "file clonecluster.efi", "kernel", "address", "stuck the node has 10.77.0.101, but its service"}},
		{"nobody can ask the service", Address, []step{discover(UEFI, "amd64"), file(efiFile, 9, 9), dhcp(node), wait(time.Hour)},
			[]string{"discover", "offer F", "file clonecluster.efi", "kernel", "address"}},
		{"nothing is heard of nodes", File, []step{discover(UEFI, "amd64"), file(efiFile, 9, 9), wait(time.Hour)},
			[]string{"discover", "offer F", "file clonecluster.efi"}},
		{"refused", Up, []step{refuse, refuse, wait(time.Hour)}, []string{"discover", "refused no image"}},
		{"a node that did not boot from here", Up, []step{dhcp(node), up}, nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var got []Event
			tl := newTimeline(tt.final, func(e Event) { got = append(got, e) })
			now := time.Unix(1e9, 0)
			for _, s := range tt.steps {
				now = now.Add(time.Second)
				s(tl, now)
			}
			ok := slices.EqualFunc(got, tt.want, func(e Event, w string) bool {
				return strings.HasPrefix(fmt.Sprintf("%s %s", e.Event, e.File+strings.TrimPrefix(e.Text, e.File)), w) && e.Machine == "52:54:00:77:00:01"
			})
			if !ok {
				var lines []string
				for _, e := range got {
					lines = append(lines, e.String())
				}
				t.Errorf("events:\n  %s\nwant %q", strings.Join(lines, "\n  "), tt.want)
			}
			if m := tl.list(); len(m) > 1 || len(tt.want) > 0 && (len(m) != 1 || m[0].MAC.String() != net.HardwareAddr(mac[:]).String()) {
				t.Errorf("machines: %v", m)
			}
		})
	}
}

// Who has no DHCP is asked at the address that the configuration gives it.
func TestAwaited(t *testing.T) {
	mac := [6]byte{0x52, 0x54, 0, 0x77, 0, 1}
	addr := netip.MustParseAddr("10.77.0.101")
	static := func(net.HardwareAddr) netip.Addr { return addr }
	tl := newTimeline(Up, func(Event) {})
	now := time.Unix(1e9, 0)
	tl.discover(mac, Client{Kind: UEFI, Arch: "amd64"}, now)
	if got := tl.awaited(static, now); len(got) != 0 {
		t.Errorf("before it has its file: %v", got)
	}
	tl.done(mac, efiFile, "TFTP", 9, 9, time.Second, netip.Addr{}, now)
	if got := tl.awaited(nil, now); len(got) != 0 {
		t.Errorf("with DHCP, before the node asked: %v", got)
	}
	if got := tl.awaited(static, now); got[mac] != addr {
		t.Errorf("awaited %v; want %v", got, addr)
	}
	if got := tl.awaited(static, now.Add(forgetBoot+1)); len(got) != 0 {
		t.Errorf("long after: %v", got)
	}
}
