package wiretest

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
	"github.com/gopacket/gopacket/pcapgo"
	"github.com/u-root/u-root/pkg/cpio"

	"clonecluster/qemu"
	"clonecluster/qemu/qemutest"
)

func needTshark(t *testing.T) {
	t.Helper()
	if _, err := exec.LookPath("tshark"); err != nil {
		t.Skip("tshark is not installed (apt-get install tshark)")
	}
}

// TestWireAddress boots the patched kernel and lets tshark look at every frame.
func TestWireAddress(t *testing.T) {
	needTshark(t)
	accel := qemutest.Accel(t)
	dir := t.TempDir()
	archive, nic := filepath.Join(dir, "archive.tar"), filepath.Join(dir, "nic.pcap")
	vm, err := qemu.Start(t.Context(), qemu.Config{
		Name: "wiretest", Machine: qemu.Q35, Accel: accel, Dir: dir, NoReboot: true,
		Kernel: qemutest.Kernel(t), Initrd: guest(t, dir),
		Cmdline: "console=ttyS0 panic=-1 loglevel=4 netconsole=6665@192.0.2.1/eth0,6666@192.0.2.2/02:00:00:00:00:0f",
		Extra: []string{
			"-device", "virtio-serial-pci", "-chardev", "file,id=archive,path=" + archive,
			"-device", "virtserialport,chardev=archive,name=" + Port,
			"-netdev", "user,id=nic,restrict=on,ipv6=off", "-device", "virtio-net-pci,netdev=nic",
			"-object", "filter-dump,id=dump,netdev=nic,file=" + nic,
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	defer vm.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	if err := vm.Wait(ctx); err != nil {
		t.Fatalf("%v\n%s", err, vm.Report())
	}
	report, captures := readArchive(t, archive)
	if report == nil {
		t.Fatalf("the guest did not report\n%s", vm.Report())
	}
	t.Logf("%s: %d checks, %d captures", report.Kernel, len(report.Checks), len(report.Captures))
	for _, c := range report.Checks {
		if !c.OK {
			t.Errorf("%s: %s", c.Name, c.Detail)
		}
	}
	// What the guest left out would pass unseen.
	const devices, phases = 5, 5
	want := devices * phases
	if dump, err := os.ReadFile(nic); err == nil && len(report.Captures) > 0 && report.Captures[0].Name == Netpoll {
		captures[Netpoll+".pcap"] = dump
		want++
	} else {
		t.Log("the kernel has no network console: netpoll was not tried (pc-x86_64 has one)")
	}
	if len(report.Captures) != want || len(report.Checks) < 35 {
		t.Errorf("%d captures and %d checks; want %d and at least 35", len(report.Captures), len(report.Checks), want)
	}
	for _, c := range report.Captures {
		file := filepath.Join(dir, c.Name+".pcap")
		if err := os.WriteFile(file, captures[c.Name+".pcap"], 0o644); err != nil {
			t.Fatal(err)
		}
		frames, err := Dissect(t.Context(), file)
		if err != nil {
			t.Errorf("%s: %v", c.Name, err)
			continue
		}
		kinds := map[string]int{}
		for _, f := range frames {
			kinds[f.Kind]++
		}
		t.Logf("%-24s %4d frames from %s: %v", c.Name, len(frames), c.Source, kinds)
		for _, wrong := range Judge(c, frames) {
			t.Error(wrong)
		}
	}
	if t.Failed() {
		t.Log(vm.Report())
	}
}

// guest builds the initramfs.
func guest(t *testing.T, dir string) string {
	t.Helper()
	init := filepath.Join(dir, "init")
	cmd := exec.Command("go", "build", "-trimpath", "-buildvcs=false", "-ldflags=-s -w", "-o", init, "./guest")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH=amd64")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("building the guest: %v: %s", err, out)
	}
	program, err := os.ReadFile(init)
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	w := cpio.Newc.Writer(&out)
	for _, r := range []cpio.Record{
		cpio.Directory("dev", 0o755), cpio.CharDev("dev/console", 0o600, 5, 1), cpio.StaticFile("init", string(program), 0o755),
	} {
		if err := w.WriteRecord(cpio.MakeReproducible(r)); err != nil {
			t.Fatal(err)
		}
	}
	if err := cpio.WriteTrailer(w); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(dir, "initrd")
	if err := os.WriteFile(file, out.Bytes(), 0o644); err != nil {
		t.Fatal(err)
	}
	return file
}

func readArchive(t *testing.T, file string) (*Report, map[string][]byte) {
	t.Helper()
	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var report *Report
	captures := map[string][]byte{}
	r := tar.NewReader(f)
	for {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return report, captures
		}
		if err != nil {
			t.Errorf("reading the guest's archive: %v", err)
			return report, captures
		}
		data, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		if captures[h.Name] = data; h.Name == ReportFile {
			report = &Report{}
			if err := json.Unmarshal(data, report); err != nil {
				t.Fatal(err)
			}
		}
	}
}

const (
	hardware = "02:cc:00:00:00:01"
	wireOld  = "02:00:00:00:00:01"
	wireNew  = "02:00:00:00:00:02"
)

func hw(s string) net.HardwareAddr {
	m, err := net.ParseMAC(s)
	if err != nil {
		panic(err)
	}
	return m
}

// frame serializes a frame with a VLAN tag if tag is not 0.
func frame(source string, tag uint16, etherType layers.EthernetType, payload ...gopacket.SerializableLayer) []byte {
	eth := &layers.Ethernet{SrcMAC: hw(source), DstMAC: hw("ff:ff:ff:ff:ff:ff"), EthernetType: etherType}
	all := []gopacket.SerializableLayer{eth}
	if tag != 0 {
		eth.EthernetType = layers.EthernetTypeDot1Q
		all = append(all, &layers.Dot1Q{VLANIdentifier: tag, Type: etherType})
	}
	buf := gopacket.NewSerializeBuffer()
	if err := gopacket.SerializeLayers(buf, gopacket.SerializeOptions{FixLengths: true, ComputeChecksums: true}, append(all, payload...)...); err != nil {
		panic(err)
	}
	return bytes.Clone(buf.Bytes())
}

func arpFrame(source, announced string, tag uint16, op uint16, from, to [4]byte) []byte {
	return frame(source, tag, layers.EthernetTypeARP, &layers.ARP{
		AddrType: layers.LinkTypeEthernet, Protocol: layers.EthernetTypeIPv4, HwAddressSize: 6, ProtAddressSize: 4,
		Operation: op, SourceHwAddress: hw(announced), SourceProtAddress: from[:], DstHwAddress: make([]byte, 6), DstProtAddress: to[:],
	})
}

func tcpFrame(source string, tag uint16) []byte {
	ip := &layers.IPv4{Version: 4, TTL: 64, Protocol: layers.IPProtocolTCP, SrcIP: net.IP{192, 0, 2, 1}, DstIP: net.IP{192, 0, 2, 2}}
	tcp := &layers.TCP{SrcPort: 40000, DstPort: 40001, ACK: true}
	if err := tcp.SetNetworkLayerForChecksum(ip); err != nil {
		panic(err)
	}
	return frame(source, tag, layers.EthernetTypeIPv4, ip, tcp)
}

func ndFrame(source, from string, msg gopacket.SerializableLayer, typ uint8) []byte {
	ip := &layers.IPv6{Version: 6, HopLimit: 255, NextHeader: layers.IPProtocolICMPv6, SrcIP: net.ParseIP(from), DstIP: net.ParseIP("ff02::1")}
	icmp := &layers.ICMPv6{TypeCode: layers.CreateICMPv6TypeCode(typ, 0)}
	if err := icmp.SetNetworkLayerForChecksum(ip); err != nil {
		panic(err)
	}
	return frame(source, 0, layers.EthernetTypeIPv6, ip, icmp, msg)
}

func linkOption(kind layers.ICMPv6Opt, address string) layers.ICMPv6Options {
	return layers.ICMPv6Options{{Type: kind, Data: hw(address)}}
}

func markFrame(source string, tag uint16, text string) []byte {
	return frame(source, tag, EtherType, gopacket.Payload(text))
}

// judge writes frames to a file, lets tshark dissect it, and judges it.
func judge(t *testing.T, c Capture, frames ...[]byte) string {
	t.Helper()
	var buf bytes.Buffer
	w := pcapgo.NewWriter(&buf)
	if err := w.WriteFileHeader(65536, layers.LinkTypeEthernet); err != nil {
		t.Fatal(err)
	}
	for _, f := range frames {
		if err := w.WritePacket(gopacket.CaptureInfo{Timestamp: time.Unix(0, 0), CaptureLength: len(f), Length: len(f)}, f); err != nil {
			t.Fatal(err)
		}
	}
	file := filepath.Join(t.TempDir(), "c.pcap")
	if err := os.WriteFile(file, buf.Bytes(), 0o644); err != nil {
		t.Fatal(err)
	}
	dissected, err := Dissect(t.Context(), file)
	if err != nil {
		t.Fatal(err)
	}
	return strings.Join(Judge(c, dissected), "\n")
}

// TestJudgeFindsBadFrames fabricates what a kernel with a hole in it would send.
func TestJudgeFindsBadFrames(t *testing.T) {
	needTshark(t)
	us, them := [4]byte{192, 0, 2, 1}, [4]byte{192, 0, 2, 2}
	c := Capture{Name: "c", Hardware: hardware, Before: wireOld, Source: wireNew, Never: []string{"dad"}, Want: map[string]int{"tcp4": 2, "arp-announcement": 1}}
	solicit := func(source, from, announced string) []byte {
		return ndFrame(source, from, &layers.ICMPv6NeighborSolicitation{
			TargetAddress: net.ParseIP("2001:db8::2"), Options: linkOption(layers.ICMPv6OptSourceAddress, announced),
		}, 135)
	}
	advertise := func(source string, flags uint8, options layers.ICMPv6Options) []byte {
		return ndFrame(source, "2001:db8::1", &layers.ICMPv6NeighborAdvertisement{Flags: flags, TargetAddress: net.ParseIP("2001:db8::1"), Options: options}, 136)
	}
	target := linkOption(layers.ICMPv6OptTargetAddress, hardware)
	good := [][]byte{
		tcpFrame(wireOld, 0), // sent before the write had returned
		arpFrame(wireNew, hardware, 0, 2, us, us),
		markFrame(wireNew, 0, MarkSettled),
		arpFrame(wireNew, hardware, 0, 1, us, them),
		arpFrame(wireNew, hardware, 0, 2, us, them),
		solicit(wireNew, "2001:db8::1", hardware),
		advertise(wireNew, 0x40, target),
		advertise(wireNew, 0x40, nil), // to a unicast solicitation
		advertise(wireNew, 0x20, target),
		tcpFrame(wireNew, 0),
		markFrame(wireNew, 0, MarkEnd),
	}
	if got := judge(t, c, good...); got != "" {
		t.Errorf("of a good capture: %s", got)
	}
	insert := func(at int, f []byte) [][]byte {
		return append(append(append([][]byte{}, good[:at]...), f), good[at:]...)
	}
	for name, bad := range map[string]struct {
		frames [][]byte
		want   string
	}{
		"hardware address in a cached header":  {insert(10, tcpFrame(hardware, 0)), "frame 11 (tcp4): Ethernet source " + hardware},
		"previous wire address after the mark": {insert(4, tcpFrame(wireOld, 0)), "Ethernet source " + wireOld},
		"hardware address before the mark":     {insert(0, tcpFrame(hardware, 0)), "frame 1 (tcp4): Ethernet source " + hardware},
		"announcement from the previous":       {insert(1, arpFrame(wireOld, hardware, 0, 2, us, us)), "arp-announcement): Ethernet source " + wireOld},
		"wire address in an ARP reply":         {insert(5, arpFrame(wireNew, wireNew, 0, 2, us, them)), "arp-reply): announces " + wireNew},
		"wire address in a solicitation":       {insert(5, solicit(wireNew, "2001:db8::1", wireNew)), "ns): announces " + wireNew},
		"announcement without an address":      {insert(5, advertise(wireNew, 0x20, nil)), "announces no address"},
		"duplicate address detection":          {insert(5, solicit(wireNew, "::", hardware)), "(dad): there must be none"},
		"a tag":                                {insert(5, tcpFrame(wireNew, 7)), "VLAN tag 7; want 0"},
		"too few frames":                       {good[1:], "1 frames of kind tcp4; want at least 2"},
		"no end":                               {good[:len(good)-1], "not complete"},
		"no mark":                              {append(append([][]byte{}, good[:2]...), good[3:]...), "not complete"},
		"an unknown frame":                     {insert(5, frame(hardware, 0, 0x9999, gopacket.Payload("?"))), "(other): Ethernet source"},
		"spanning tree":                        {insert(5, stp(hardware)), "Ethernet source " + hardware},
	} {
		if got := judge(t, c, bad.frames...); !strings.Contains(got, bad.want) {
			t.Errorf("%s: judged %q; want %q", name, got, bad.want)
		}
	}
	tagged := Capture{Name: "v", Hardware: hardware, Before: wireNew, Source: wireNew, VLAN: 7, Want: map[string]int{"tcp4": 1, "arp-request": 1}}
	if got := judge(t, tagged, markFrame(wireNew, 7, MarkSettled), tcpFrame(wireNew, 7), arpFrame(wireNew, hardware, 7, 1, us, them), markFrame(wireNew, 7, MarkEnd)); got != "" {
		t.Errorf("of a good tagged capture: %s", got)
	}
	if got := judge(t, tagged, markFrame(wireNew, 7, MarkSettled), tcpFrame(wireNew, 0), markFrame(wireNew, 7, MarkEnd)); !strings.Contains(got, "VLAN tag 0; want 7") {
		t.Errorf("untagged frame: judged %q", got)
	}
}

func stp(source string) []byte {
	return append(append([]byte{0x01, 0x80, 0xc2, 0, 0, 0}, hw(source)...), append([]byte{0, 38, 0x42, 0x42, 3}, make([]byte, 43)...)...)
}

func FuzzParseLine(f *testing.F) {
	f.Add(strings.Repeat("\t", len(fields)-1))
	f.Add("1\t02:00:00:00:00:01\t7\t0x8100" + strings.Repeat("\t", len(fields)-4))
	f.Add(fmt.Sprint("2", strings.Repeat("\t1", len(fields)-1)))
	f.Fuzz(func(t *testing.T, line string) {
		if fr, err := parseLine(line); err == nil && fr.Kind == "" {
			t.Errorf("parseLine(%q) = %+v, without a kind", line, fr)
		}
	})
}
