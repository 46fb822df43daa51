package pxe

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
	"github.com/gopacket/gopacket/pcapgo"
	"github.com/insomniacslk/dhcp/dhcpv4"
	"github.com/insomniacslk/dhcp/iana"
)

// nowhere is a network on which nothing can be opened.
type nowhere struct{}

func (nowhere) ListenPacket(netip.AddrPort) (net.PacketConn, error) {
	return nil, errors.ErrUnsupported
}
func (nowhere) Listen(netip.AddrPort) (net.Listener, error) { return nil, errors.ErrUnsupported }
func (nowhere) DialContext(context.Context, string, string) (net.Conn, error) {
	return nil, errors.ErrUnsupported
}

// folder is an image of the given files, each of which has its name as content.
func folder(t testing.TB, names ...string) string {
	dir := t.TempDir()
	for _, n := range names {
		if err := os.WriteFile(filepath.Join(dir, n), []byte(strings.Repeat(n, 10_000)), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

var ours = netip.MustParsePrefix("10.77.0.2/24")

// options are a proxy's with everything.
func options(t testing.TB) Options {
	dir := folder(t, kernelFile, initrdFile, efiFile, undionly)
	return Options{
		Network: nowhere{}, Addr: ours, Undionly: filepath.Join(dir, undionly),
		Images: []Image{{Arch: "amd64", Folder: dir, Cmdline: "console=ttyS0"}},
	}
}

// server makes a server, and collects its events.
func server(t testing.TB, o Options) (*Server, *[]Event) {
	var events []Event
	o.OnEvent = func(e Event) { events = append(events, e) }
	s, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	return s, &events
}

// What clients say, as it was captured from QEMU's iPXE and OVMF, and as the
// standards have it for others.
func message(t testing.TB, kind dhcpv4.MessageType, arch iana.Arch, mods ...dhcpv4.Modifier) *dhcpv4.DHCPv4 {
	t.Helper()
	class := "PXEClient:Arch:00007:UNDI:003016"
	if arch == iana.EFI_X86_64_HTTP || arch == iana.EFI_ARM64_HTTP {
		class = "HTTPClient:Arch:00016:UNDI:003016"
	}
	m, err := dhcpv4.New(append([]dhcpv4.Modifier{
		dhcpv4.WithMessageType(kind), dhcpv4.WithHwAddr(net.HardwareAddr{0x52, 0x54, 0, 0x77, 0, 1}),
		dhcpv4.WithOption(dhcpv4.OptClassIdentifier(class)),
		dhcpv4.WithOption(dhcpv4.OptClientArch(arch)),
		dhcpv4.WithOption(dhcpv4.OptGeneric(dhcpv4.OptionClientMachineIdentifier, append([]byte{0}, "0123456789abcdef"...))),
		dhcpv4.WithRequestedOptions(dhcpv4.OptionTFTPServerName, dhcpv4.OptionBootfileName),
	}, mods...)...)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func raw(code dhcpv4.OptionCode, value string) dhcpv4.Modifier {
	return dhcpv4.WithOption(dhcpv4.OptGeneric(code, []byte(value)))
}

func discoverOf(t testing.TB, arch iana.Arch, mods ...dhcpv4.Modifier) *dhcpv4.DHCPv4 {
	return message(t, dhcpv4.MessageTypeDiscover, arch, mods...)
}

func ipxe() dhcpv4.Modifier { return raw(dhcpv4.OptionUserClassInformation, "iPXE") }

func TestClassify(t *testing.T) {
	const user, vendor, arch = dhcpv4.OptionUserClassInformation, dhcpv4.OptionClassIdentifier, dhcpv4.OptionClientSystemArchitectureType
	for _, tt := range []struct {
		name string
		m    *dhcpv4.DHCPv4
		want Client
	}{
		{"BIOS", discoverOf(t, 0), Client{Kind: BIOS, Arch: "amd64"}},
		{"iPXE", discoverOf(t, 0, ipxe()), Client{Kind: IPXE, Arch: "amd64"}},
		{"iPXE as RFC 3004 has it", discoverOf(t, 0, raw(user, "\x04iPXE")), Client{Kind: IPXE, Arch: "amd64"}},
		{"another user class", discoverOf(t, 0, raw(user, "gPXE")), Client{Kind: BIOS, Arch: "amd64"}},
		{"UEFI", discoverOf(t, 7), Client{Kind: UEFI, Arch: "amd64"}},
		{"UEFI by the registry's other number", discoverOf(t, 9), Client{Kind: UEFI, Arch: "amd64"}},
		{"UEFI on arm64", discoverOf(t, 11), Client{Kind: UEFI, Arch: "arm64"}},
		{"iPXE under UEFI", discoverOf(t, 7, ipxe()), Client{Kind: IPXE, Arch: "amd64", EFI: true}},
		{"HTTP", discoverOf(t, 16), Client{Kind: UEFIHTTP, Arch: "amd64"}},
		{"HTTP on arm64", discoverOf(t, 19), Client{Kind: UEFIHTTP, Arch: "arm64"}},
		{"UEFI of 32 bits", discoverOf(t, 6), Client{Kind: UEFI, Unknown: "EFI IA32"}},
		{"HTTP of 32 bits", discoverOf(t, 16, raw(arch, "\x00\x0f")), Client{Kind: UEFIHTTP, Unknown: "EFI x86 boot from HTTP"}},
		{"a list, the second of which we know", discoverOf(t, 0, raw(arch, "\x00\x06\x00\x07")), Client{Kind: UEFI, Arch: "amd64"}},
		{"PXE with an architecture of HTTP", discoverOf(t, 7, raw(arch, "\x00\x10")), Client{Kind: UEFI, Unknown: "EFI x86-64 boot from HTTP"}},
		{"only the vendor class", discoverOf(t, 7, raw(arch, ""), raw(vendor, "PXEClient:Arch:00000:UNDI:002001")), Client{Kind: BIOS, Arch: "amd64"}},
		{"half an architecture", discoverOf(t, 7, raw(arch, "\x07"), raw(vendor, "PXEClient")), Client{Kind: UEFI, Unknown: "no architecture"}},
		{"an operating system", discoverOf(t, 7, raw(vendor, "MSFT 5.0")), Client{}},
		{"a node", discoverOf(t, 7, raw(vendor, "clonecluster")), Client{Kind: Node}},
	} {
		if got := Classify(tt.m); got != tt.want {
			t.Errorf("%s: %+v; want %+v", tt.name, got, tt.want)
		}
	}
}

func TestProxyOffers(t *testing.T) {
	s, _ := server(t, options(t))
	f := s.tokens.folder([6]byte{0x52, 0x54, 0, 0x77, 0, 1})
	for _, tt := range []struct {
		name        string
		m           *dhcpv4.DHCPv4
		file, class string
	}{
		{"BIOS", discoverOf(t, 0), f + "/undionly.kpxe", "PXEClient"},
		{"iPXE", discoverOf(t, 0, ipxe()), "http://10.77.0.2:8067/" + f + "/boot.ipxe", "PXEClient"},
		{"UEFI", discoverOf(t, 7), f + "/clonecluster.efi", "PXEClient"},
		{"HTTP", discoverOf(t, 16), "http://10.77.0.2:8067/" + f + "/clonecluster.efi", "HTTPClient"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := s.answer(tt.m, time.Now())
			if r == nil {
				t.Fatal("no offer")
			}
			if r.MessageType() != dhcpv4.MessageTypeOffer || !r.YourIPAddr.IsUnspecified() || r.IPAddressLeaseTime(0) != 0 {
				t.Errorf("%v; want an offer without an address", r.Summary())
			}
			if r.BootFileName != tt.file || r.BootFileNameOption() != tt.file || len(tt.file) > 127 {
				t.Errorf("file %q, option 67 %q; want %q, of at most 127 octets", r.BootFileName, r.BootFileNameOption(), tt.file)
			}
			if !r.ServerIPAddr.Equal(net.IPv4(10, 77, 0, 2)) || !r.ServerIdentifier().Equal(r.ServerIPAddr) || r.ClassIdentifier() != tt.class {
				t.Errorf("siaddr %v, option 54 %v, option 60 %q", r.ServerIPAddr, r.ServerIdentifier(), r.ClassIdentifier())
			}
			if got := r.Options.Get(dhcpv4.OptionClientMachineIdentifier); !bytes.Equal(got, tt.m.Options.Get(dhcpv4.OptionClientMachineIdentifier)) {
				t.Errorf("option 97 is %x", got)
			}
			menu := hex.EncodeToString(r.Options.Get(dhcpv4.OptionVendorSpecificInformation))
			if want := map[string]string{"PXEClient": "060108ff"}[tt.class]; menu != want {
				t.Errorf("option 43 is %s; want %q", menu, want)
			}
			if to := s.destination(tt.m, r); to.String() != "255.255.255.255:68" {
				t.Errorf("it goes to %v", to)
			}
			ack := s.answerBoot(message(t, dhcpv4.MessageTypeRequest, tt.m.ClientArch()[0], func(m *dhcpv4.DHCPv4) { m.Options = tt.m.Options },
				raw(dhcpv4.OptionVendorSpecificInformation, "\x47\x04\x00\x00\x00\x00\xff"), dhcpv4.WithMessageType(dhcpv4.MessageTypeRequest)), time.Now())
			if ack == nil || ack.MessageType() != dhcpv4.MessageTypeAck || ack.BootFileName != tt.file {
				t.Fatalf("at port 4011: %v", ack)
			}
			if tt.class == "PXEClient" && !bytes.HasPrefix(ack.Options.Get(dhcpv4.OptionVendorSpecificInformation), []byte{71, 4, 0, 0, 0, 0}) {
				t.Errorf("at port 4011 the choice from the menu is not given back: %v", ack.Options.Get(dhcpv4.OptionVendorSpecificInformation))
			}
		})
	}
}

func TestSilence(t *testing.T) {
	mac := func(b ...byte) dhcpv4.Modifier { return dhcpv4.WithHwAddr(b) }
	for _, tt := range []struct {
		name string
		m    *dhcpv4.DHCPv4
		o    func(*Options)
		why  string // what is reported
	}{
		{"an operating system", discoverOf(t, 7, raw(dhcpv4.OptionClassIdentifier, "dhcpcd")), nil, ""},
		{"a request, which is for the network's server", message(t, dhcpv4.MessageTypeRequest, 7), nil, ""},
		{"another server's offer", discoverOf(t, 7, func(m *dhcpv4.DHCPv4) { m.OpCode = dhcpv4.OpcodeBootReply }), nil, ""},
		{"a relay's", discoverOf(t, 7, dhcpv4.WithGatewayIP(net.IPv4(10, 1, 1, 1))), nil, ""},
		{"a group's address", discoverOf(t, 7, mac(0x53, 0x54, 0, 0x77, 0, 1)), nil, ""},
		{"a long address", discoverOf(t, 7, mac(1, 2, 3, 4, 5, 6, 7, 8)), nil, ""},
		{"arm64, for which there is no image", discoverOf(t, 11), nil, "the machine is arm64, and the image for amd64"},
		{"32 bits", discoverOf(t, 6), nil, "calls itself EFI IA32"},
		{"not on the list", discoverOf(t, 7), func(o *Options) { o.Allow = []net.HardwareAddr{{2, 0, 0, 0, 0, 1}} }, "--machine 52:54:00:77:00:01 adds it"},
		{"no iPXE", discoverOf(t, 0), func(o *Options) { o.Undionly = "" }, "apt-get install ipxe"},
		{"no .efi", discoverOf(t, 16), func(o *Options) { os.Remove(filepath.Join(o.Images[0].Folder, efiFile)) }, `build it with "clonectl build"`},
		{"no initrd", discoverOf(t, 0, ipxe()), func(o *Options) { os.Remove(filepath.Join(o.Images[0].Folder, initrdFile)) }, `build it with "clonectl build"`},
		{"no initrd, and a command", discoverOf(t, 0, ipxe()), func(o *Options) {
			o.Images[0].Build = "clonectl build --board qemu-x86_64"
			os.Remove(filepath.Join(o.Images[0].Folder, initrdFile))
		}, `build it with "clonectl build --board qemu-x86_64"`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			o := options(t)
			if tt.o != nil {
				tt.o(&o)
			}
			s, events := server(t, o)
			if r := s.answer(tt.m, time.Now()); r != nil {
				t.Fatalf("answered with %v", r.Summary())
			}
			s.answer(tt.m, time.Now().Add(time.Second)) // is not reported again
			var refused []string
			for _, e := range *events {
				if e.Event == Refused {
					refused = append(refused, e.Text)
				}
			}
			if tt.why == "" && len(*events) == 0 || len(refused) == 1 && tt.why != "" && strings.Contains(refused[0], tt.why) {
				return
			}
			t.Errorf("reported %v; want %q", *events, tt.why)
		})
	}
}

// As the segment's DHCP server it gives addresses, to machines that boot a file
// too, and to a node without one.
func TestFull(t *testing.T) {
	o := options(t)
	o.Pool = &Pool{First: netip.MustParseAddr("10.77.0.100"), Last: netip.MustParseAddr("10.77.0.101")}
	s, _ := server(t, o)
	now := time.Now()
	offer := s.answer(discoverOf(t, 7), now)
	if offer == nil || offer.YourIPAddr.String() != "10.77.0.100" || !strings.HasSuffix(offer.BootFileName, "/clonecluster.efi") {
		t.Fatalf("offer %v", offer)
	}
	if len(offer.Router()) != 0 {
		t.Errorf("a router %v that nobody named", offer.Router())
	}
	ack := s.answer(message(t, dhcpv4.MessageTypeRequest, 7,
		dhcpv4.WithOption(dhcpv4.OptRequestedIPAddress(offer.YourIPAddr)), dhcpv4.WithOption(dhcpv4.OptServerIdentifier(net.IPv4(10, 77, 0, 2)))), now)
	if ack == nil || ack.MessageType() != dhcpv4.MessageTypeAck || ack.BootFileName != offer.BootFileName || ack.SubnetMask().String() != "ffffff00" {
		t.Fatalf("acknowledgement %v", ack)
	}
	node := s.answer(discoverOf(t, 7, raw(dhcpv4.OptionClassIdentifier, nodeClass)), now)
	if node == nil || node.YourIPAddr.String() != "10.77.0.100" || node.BootFileName != "" {
		t.Errorf("a node is offered %v; want its address, and no file", node)
	}
	if r := s.answer(message(t, dhcpv4.MessageTypeRequest, 7, dhcpv4.WithHwAddr(net.HardwareAddr{2, 0, 0, 0, 0, 9}),
		dhcpv4.WithOption(dhcpv4.OptRequestedIPAddress(net.IPv4(192, 0, 2, 1)))), now); r != nil {
		t.Errorf("a stranger's request for another network's address: %v; want silence", r.Summary())
	}
}

func TestRivals(t *testing.T) {
	boots := func(mods ...dhcpv4.Modifier) *dhcpv4.DHCPv4 {
		r, err := dhcpv4.NewReplyFromRequest(discoverOf(t, 7), append([]dhcpv4.Modifier{dhcpv4.WithMessageType(dhcpv4.MessageTypeOffer),
			dhcpv4.WithOption(dhcpv4.OptServerIdentifier(net.IPv4(10, 77, 0, 1))), dhcpv4.WithYourIP(net.IPv4(10, 77, 0, 50))}, mods...)...)
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	for _, tt := range []struct {
		name string
		full bool
		m    *dhcpv4.DHCPv4
		want string
	}{
		{"a plain server beside a proxy", false, boots(), ""},
		{"it offers a file", false, boots(func(m *dhcpv4.DHCPv4) { m.BootFileName = "pxelinux.0" }), "pxelinux.0"},
		{"it offers a file as an option", false, boots(dhcpv4.WithOption(dhcpv4.OptBootFileName("a.efi\x1b[2J"))), `a.efi\x1b[2J`},
		{"it offers a menu", false, boots(raw(dhcpv4.OptionClassIdentifier, "PXEClient")), "a boot menu"},
		{"a plain server beside a server", true, boots(), "10.77.0.1 is a DHCP server on this segment, too"},
		{"we ourselves", true, boots(dhcpv4.WithOption(dhcpv4.OptServerIdentifier(net.IPv4(10, 77, 0, 2)))), ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			o := options(t)
			if tt.full {
				o.Pool = &Pool{First: netip.MustParseAddr("10.77.0.100"), Last: netip.MustParseAddr("10.77.0.101")}
			}
			s, events := server(t, o)
			s.overhear(tt.m, nil)
			s.overhear(tt.m, nil)
			switch {
			case tt.want == "" && len(*events) == 0:
			case len(*events) == 1 && tt.want != "" && (*events)[0].Event == Rival && (*events)[0].Address == "10.77.0.1" && strings.Contains((*events)[0].Text, tt.want):
			default:
				t.Errorf("reported %v; want %q, once", *events, tt.want)
			}
		})
	}
}

// A flood of machines that nobody has does not drive out those that boot, and is
// not answered without bound.
func TestFlood(t *testing.T) {
	s, _ := server(t, options(t))
	now := time.Unix(1e9, 0)
	mac := [6]byte{0x52, 0x54, 0, 0x77, 0, 1}
	s.answer(discoverOf(t, 7), now)
	s.timeline.loading(mac, efiFile, 1000, ours.Addr(), now)
	answered := 0
	for i := range 20_000 {
		m := discoverOf(t, 7, dhcpv4.WithHwAddr(net.HardwareAddr{2, 0, 1, 0, byte(i >> 8), byte(i)}))
		if s.answer(m, now.Add(time.Duration(i)*time.Millisecond)) != nil {
			answered++
		}
	}
	if answered > 512+20*20+1 {
		t.Errorf("%d of 20000 invented machines in 20 s were answered", answered)
	}
	for i := range 3 * maxMachines {
		s.timeline.discover([6]byte{2, 0, 2, 0, byte(i >> 8), byte(i)}, Client{Kind: UEFI}, now.Add(time.Hour))
	}
	if n := len(s.timeline.machines); n > maxMachines {
		t.Errorf("%d machines are remembered", n)
	}
	if s.timeline.machines[mac] == nil {
		t.Error("the machine that loads is forgotten")
	}
}

func TestTokens(t *testing.T) {
	s, _ := server(t, options(t))
	mac := [6]byte{0x52, 0x54, 0, 0x77, 0, 1}
	good := s.tokens.folder(mac)
	for _, tt := range []struct {
		path, file string
	}{
		{good + "/clonecluster.efi", "clonecluster.efi"},
		{"/" + good + "/bzImage", "bzImage"},
		{`\` + good + `\bzImage`, "bzImage"},
		{"bzImage", ""},
		{"525400770002" + good[12:] + "/bzImage", ""},
		{good[:len(good)-1] + "/bzImage", ""},
		{strings.Repeat("x", 29) + "/bzImage", ""},
		{"", ""},
	} {
		got, file, ok := s.tokens.machine(tt.path)
		if file != tt.file || ok != (tt.file != "") || ok && got != mac {
			t.Errorf("machine(%q) = %x, %q, %v; want %q", tt.path, got, file, ok, tt.file)
		}
	}
	// What it opens is in the folder, whatever it is asked for.
	for _, name := range []string{"../secret", "manifest.json", "", "/etc/passwd", "bzImage/../config.cpio", "config.cpio"} {
		if f, err := s.open(mac, "amd64", name); err == nil {
			f.Close()
			t.Errorf("open(%q) gives a file", name)
		}
	}
	dir := s.images["amd64"].Folder
	os.Remove(filepath.Join(dir, kernelFile))
	if err := os.Symlink("/etc/passwd", filepath.Join(dir, kernelFile)); err != nil {
		t.Fatal(err)
	}
	if f, err := s.open(mac, "amd64", kernelFile); err == nil {
		f.Close()
		t.Error("a link leads out of the folder")
	}
}

// What is another file than the one that was looked at is neither offered nor
// handed out.
func TestChanged(t *testing.T) {
	for name, change := range map[string]func(path string) error{
		"nothing":  func(string) error { return nil },
		"longer":   func(path string) error { return os.WriteFile(path, make([]byte, 200_000), 0o600) },
		"in place": func(path string) error { return os.Chtimes(path, time.Time{}, time.Unix(1e9, 0)) },
		"replaced": func(path string) error {
			fi, err := os.Stat(path)
			data, err2 := os.ReadFile(path)
			return errors.Join(err, err2, os.Rename(path, path+".old"), os.WriteFile(path, data, 0o600), os.Chtimes(path, time.Time{}, fi.ModTime()))
		},
	} {
		t.Run(name, func(t *testing.T) {
			o := options(t)
			o.Images[0].Known = map[string]fs.FileInfo{}
			for _, f := range []string{kernelFile, initrdFile, efiFile} {
				fi, err := os.Stat(filepath.Join(o.Images[0].Folder, f))
				if err != nil {
					t.Fatal(err)
				}
				o.Images[0].Known[f] = fi
			}
			s, events := server(t, o)
			if err := change(filepath.Join(o.Images[0].Folder, efiFile)); err != nil {
				t.Fatal(err)
			}
			offer := s.answer(discoverOf(t, 7), time.Now())
			f, err := s.open([6]byte{}, "amd64", efiFile)
			if err == nil {
				f.Close()
			}
			if name == "nothing" {
				if offer == nil || err != nil {
					t.Errorf("offer %v, file %v", offer, err)
				}
				return
			}
			if offer != nil || err == nil || !strings.Contains(err.Error(), "clonecluster.efi has changed since this server began: end it, and start it again") {
				t.Errorf("offer %v, file %v", offer, err)
			}
			if e := (*events)[len(*events)-1]; e.Event != Refused || !strings.Contains(e.Text, "has changed since") {
				t.Errorf("the event is %v", e)
			}
			if f, err := s.open([6]byte{}, "amd64", kernelFile); err != nil {
				t.Errorf("the kernel: %v", err)
			} else {
				f.Close()
			}
		})
	}
}

func TestOptions(t *testing.T) {
	for _, tt := range []struct {
		name string
		o    func(*Options)
		want string
	}{
		{"no network", func(o *Options) { o.Network = nil }, "no network"},
		{"IPv6", func(o *Options) { o.Addr = netip.MustParsePrefix("fd77::1/64") }, "IPv4"},
		{"no image", func(o *Options) { o.Images = nil }, "no image"},
		{"two for one architecture", func(o *Options) { o.Images = append(o.Images, o.Images[0]) }, "two images for amd64"},
		{"a folder that is not there", func(o *Options) { o.Images[0].Folder = "/nonexistent" }, "/nonexistent"},
		{"a command line of two", func(o *Options) { o.Images[0].Cmdline = "a\nboot" }, "line break"},
		{"a group's address", func(o *Options) { o.Allow = []net.HardwareAddr{{3, 0, 0, 0, 0, 1}} }, "03:00:00:00:00:01"},
		{"a range elsewhere", func(o *Options) {
			o.Pool = &Pool{First: netip.MustParseAddr("10.78.0.1"), Last: netip.MustParseAddr("10.78.0.2")}
		}, "not in 10.77.0.0/24"},
		{"a router elsewhere", func(o *Options) {
			o.Pool = &Pool{First: netip.MustParseAddr("10.77.0.100"), Last: netip.MustParseAddr("10.77.0.101"), Router: netip.MustParseAddr("10.78.0.1")}
		}, "router"},
		{"on the cluster's address", func(o *Options) { o.VIPs = []netip.Addr{o.Addr.Addr()} }, "is the address of the cluster: give it another one"},
		{"the cluster as a router", func(o *Options) {
			vip := netip.MustParseAddr("10.77.0.10")
			o.VIPs = []netip.Addr{vip}
			o.Pool = &Pool{First: netip.MustParseAddr("10.77.0.100"), Last: netip.MustParseAddr("10.77.0.101"), Router: vip}
		}, "which is no gateway"},
		{"nothing but the cluster's address", func(o *Options) {
			vip := netip.MustParseAddr("10.77.0.10")
			o.VIPs = []netip.Addr{vip}
			o.Pool = &Pool{First: vip, Last: vip}
		}, "nothing to give out"},
		{"a range without end", func(o *Options) {
			o.Addr = netip.MustParsePrefix("10.77.0.2/8")
			o.Pool = &Pool{First: netip.MustParseAddr("10.0.0.1"), Last: netip.MustParseAddr("10.255.0.1")}
		}, "too large"},
	} {
		o := options(t)
		tt.o(&o)
		s, err := New(o)
		if err == nil {
			s.Close()
			t.Errorf("%s: no error; want %q", tt.name, tt.want)
		} else if !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v; want %q", tt.name, err, tt.want)
		}
	}
}

// tshark finds nothing odd in what is sent, and the same things in it.
func TestDissected(t *testing.T) {
	tshark, err := exec.LookPath("tshark")
	if err != nil {
		t.Skip("needs tshark (Debian package tshark)")
	}
	full := options(t)
	full.Pool = &Pool{First: netip.MustParseAddr("10.77.0.100"), Last: netip.MustParseAddr("10.77.0.110"), Router: netip.MustParseAddr("10.77.0.1")}
	var replies []*dhcpv4.DHCPv4
	for _, o := range []Options{options(t), full} {
		s, _ := server(t, o)
		for _, m := range []*dhcpv4.DHCPv4{discoverOf(t, 0), discoverOf(t, 0, ipxe()), discoverOf(t, 7), discoverOf(t, 16)} {
			replies = append(replies, s.answer(m, time.Now()), s.answerBoot(message(t, dhcpv4.MessageTypeRequest, m.ClientArch()[0]), time.Now()))
		}
	}
	_, question := probe()
	asked := parse(question)
	file := filepath.Join(t.TempDir(), "offers.pcap")
	writePCAP(t, file, append(replies, asked))
	out, err := exec.Command(tshark, "-r", file, "-T", "fields", "-E", "separator=|", "-e", "dhcp.option.dhcp", "-e", "dhcp.option.vendor_class_id",
		"-e", "dhcp.file", "-e", "dhcp.option.vendor.pxeclient.discovery_control", "-e", "_ws.malformed", "-e", "_ws.expert.message").Output()
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(strings.TrimSpace(string(out)), "\n")
	if len(lines) != len(replies)+1 {
		t.Fatalf("tshark sees %d messages of %d:\n%s", len(lines), len(replies)+1, out)
	}
	for i, line := range lines {
		f := strings.Split(line, "|")
		if f[4] != "" || f[5] != "" {
			t.Errorf("message %d: tshark says %s", i, line)
		}
		if i == len(replies) {
			continue
		}
		r := replies[i]
		control := ""
		if r.ClassIdentifier() == "PXEClient" {
			control = "0x08"
		}
		if want := []string{"", r.ClassIdentifier(), r.BootFileName, control}; !slices.Equal(f[1:4], want[1:]) {
			t.Errorf("message %d: tshark sees %q; want %q", i, f[1:4], want[1:])
		}
	}
}

func writePCAP(t testing.TB, file string, messages []*dhcpv4.DHCPv4) {
	t.Helper()
	out, err := os.Create(file)
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	w := pcapgo.NewWriter(out)
	if err := w.WriteFileHeader(65535, layers.LinkTypeEthernet); err != nil {
		t.Fatal(err)
	}
	for _, m := range messages {
		src, dst := layers.UDPPort(67), layers.UDPPort(68)
		if m.OpCode == dhcpv4.OpcodeBootRequest {
			src, dst = dst, src
		}
		ip := &layers.IPv4{Version: 4, TTL: 64, Protocol: layers.IPProtocolUDP, SrcIP: net.IPv4(10, 77, 0, 2), DstIP: net.IPv4bcast}
		udp := &layers.UDP{SrcPort: src, DstPort: dst}
		udp.SetNetworkLayerForChecksum(ip)
		buf := gopacket.NewSerializeBuffer()
		err := gopacket.SerializeLayers(buf, gopacket.SerializeOptions{FixLengths: true, ComputeChecksums: true},
			&layers.Ethernet{SrcMAC: net.HardwareAddr{2, 0, 0, 0, 0, 2}, DstMAC: net.HardwareAddr{255, 255, 255, 255, 255, 255}, EthernetType: layers.EthernetTypeIPv4},
			ip, udp, gopacket.Payload(m.ToBytes()))
		if err != nil {
			t.Fatal(err)
		}
		b := buf.Bytes()
		if err := w.WritePacket(gopacket.CaptureInfo{Timestamp: time.Unix(1e9, 0), CaptureLength: len(b), Length: len(b)}, b); err != nil {
			t.Fatal(err)
		}
	}
}

func FuzzAnswer(f *testing.F) {
	for _, m := range []*dhcpv4.DHCPv4{
		discoverOf(f, 0, ipxe()), discoverOf(f, 7), discoverOf(f, 16), message(f, dhcpv4.MessageTypeRequest, 7, raw(dhcpv4.OptionVendorSpecificInformation, "\x47\x04\x00\x00\x00\x00\xff")),
		discoverOf(f, 7, raw(dhcpv4.OptionVendorSpecificInformation, "\x06\xff\x00\x47\x09")), discoverOf(f, 7, raw(dhcpv4.OptionClassIdentifier, nodeClass)),
	} {
		f.Add(m.ToBytes())
	}
	o := options(f)
	o.Pool = &Pool{First: netip.MustParseAddr("10.77.0.100"), Last: netip.MustParseAddr("10.77.0.101")}
	full, _ := server(f, o)
	proxy, _ := server(f, options(f))
	f.Fuzz(func(t *testing.T, b []byte) {
		m := parse(b)
		if m == nil {
			return
		}
		now := time.Now()
		for _, s := range []*Server{full, proxy} {
			s.replies, s.news = bucket{rate: 1000, size: 1000}, bucket{rate: 1000, size: 1000}
			s.overhear(m, nil)
			for _, r := range []*dhcpv4.DHCPv4{s.answer(m, now), s.answerBoot(m, now)} {
				if r == nil {
					continue
				}
				if a := ipv4Of(r.YourIPAddr); a.IsValid() && (s == proxy || !ours.Contains(a)) {
					t.Errorf("gave out %v", a)
				}
				if a := ipv4Of(s.destination(m, r).IP); a.IsValid() && a != netip.AddrFrom4([4]byte{255, 255, 255, 255}) && !ours.Contains(a) {
					t.Errorf("an answer leaves the segment, to %v", a)
				}
				if back := parse(r.ToBytes()); back == nil || back.BootFileName != r.BootFileName {
					t.Errorf("the reply does not parse, or says something else: %v", r.Summary())
				}
			}
		}
	})
}
