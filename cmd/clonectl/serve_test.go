package main

import (
	"bytes"
	"encoding/json"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"clonecluster/config"
	"clonecluster/image/pxe"
	"clonecluster/netcore/netnstest"
)

func needs(t *testing.T, programs map[string]string) {
	t.Helper()
	for program, pkg := range programs {
		if _, err := exec.LookPath(program); err != nil {
			t.Skipf("needs %s (Debian package %s; make deps-test)", program, pkg)
		}
	}
}

// leaseScript makes udhcpc print what it was told, and set its address.
const leaseScript = `#!/bin/sh
[ "$1" = bound ] || exit 0
ip address add "$ip/$mask" dev "$interface"
for v in ip mask siaddr boot_file bootfile tftp serverid vendor; do eval echo "lease-$v=\$$v"; done
`

// A machine that Debian's udhcpc and curl play gets its address and its files on a
// segment without another DHCP server, and tshark finds nothing odd on the wire.
func TestServeAsDHCPServer(t *testing.T) {
	needs(t, map[string]string{"udhcpc": "udhcpc", "curl": "curl", "tshark": "tshark"})
	bed := netnstest.New(t, net.HardwareAddr{2, 0xcc, 10, 77, 0, 10})
	server := bed.Host("server", "", "10.77.0.2/24")
	machine := bed.Host("machine", "52:54:00:77:00:01")
	stranger := bed.Host("stranger", "52:54:00:77:00:02")
	dir := builtFolder(t)
	serve := server.Start("clonectl", "serve", dir, "--interface", "eth0", "--dhcp", "10.77.0.100-10.77.0.110", "--json",
		"--machine", "52:54:00:77:00:01", "--ipxe", filepath.Join(dir, "undionly.kpxe"))
	serve.Await(0, "sent in the clear")
	script := filepath.Join(bed.Dir, "script")
	if err := os.WriteFile(script, []byte(leaseScript), 0o755); err != nil {
		t.Fatal(err)
	}
	ask := func(h *netnstest.Host, arch, class string, tries string) (map[string]string, error) {
		out, err := h.Try("udhcpc", "-f", "-q", "-n", "-i", "eth0", "-s", script, "-t", tries, "-T", "1", "-V", class, "-x", "0x5d:"+arch, "-O", "66", "-O", "67", "-O", "43")
		got := map[string]string{}
		for line := range strings.Lines(out) {
			if k, v, ok := strings.Cut(strings.TrimPrefix(strings.TrimSpace(line), "lease-"), "="); ok {
				got[k] = v
			}
		}
		return got, err
	}
	lease, err := ask(machine, "0000", "PXEClient:Arch:00000:UNDI:002001", "15")
	if err != nil || lease["ip"] != "10.77.0.100" || lease["siaddr"] != "10.77.0.2" || !strings.HasSuffix(lease["boot_file"], "/undionly.kpxe") {
		t.Fatalf("the lease is %v, %v\n%s", lease, err, serve.Output())
	}
	http, err := ask(machine, "0010", "HTTPClient:Arch:00016:UNDI:003016", "5")
	if err != nil || !strings.HasPrefix(http["boot_file"], "http://10.77.0.2:8067/") {
		t.Fatalf("by HTTP the lease is %v, %v\n%s", http, err, serve.Output())
	}
	if got, err := ask(stranger, "0007", "PXEClient:Arch:00007:UNDI:003016", "2"); err == nil {
		t.Errorf("a machine that is not on the list gets %v", got)
	}
	for _, f := range []struct{ url, file string }{
		{"tftp://10.77.0.2/" + lease["boot_file"], "undionly.kpxe"},
		{http["boot_file"], "clonecluster.efi"},
		{strings.Replace(http["boot_file"], "clonecluster.efi", "bzImage", 1), "bzImage"},
	} {
		out := filepath.Join(bed.Dir, "got")
		machine.Run("curl", "-sS", "--fail", "--max-time", "20", "--tftp-blksize", "1428", "-o", out, f.url)
		got, _ := os.ReadFile(out)
		want, _ := os.ReadFile(filepath.Join(dir, f.file))
		if !bytes.Equal(got, want) {
			t.Errorf("%s: %d bytes, and not those of %s", f.url, len(got), f.file)
		}
	}
	// The same port again: who has it is named.
	out, err := server.Start("clonectl", "serve", dir, "--interface", "eth0"), error(nil)
	err = out.Wait()
	if err == nil || !strings.Contains(out.Output(), "UDP port 67") || !strings.Contains(out.Output(), "(process ") {
		t.Errorf("a second server says %q, %v", out.Output(), err)
	}
	serve.Signal(syscall.SIGINT)
	if err := serve.Wait(); err != nil {
		t.Errorf("after Ctrl-C: %v\n%s", err, serve.Output())
	}

	var seen []string
	for line := range strings.Lines(serve.Output()) {
		var e pxe.Event
		if json.Unmarshal([]byte(line), &e) == nil {
			seen = append(seen, strings.TrimSpace(e.Machine+" "+string(e.Event)+" "+e.File))
		}
	}
	for _, want := range []string{
		"52:54:00:77:00:01 discover", "52:54:00:77:00:01 offer undionly.kpxe", "52:54:00:77:00:01 file undionly.kpxe",
		"52:54:00:77:00:01 offer clonecluster.efi", "52:54:00:77:00:01 file clonecluster.efi", "52:54:00:77:00:02 refused",
	} {
		if !slices.Contains(seen, want) {
			t.Errorf("%q was not reported, but %q", want, seen)
		}
	}
	check, err := exec.Command("tshark", "-r", bed.Captured(), "-Y", "dhcp && (_ws.malformed || _ws.expert.severity >= 6291456)").Output()
	if err != nil || len(check) > 0 {
		t.Errorf("tshark finds in the DHCP messages: %v\n%s", err, check)
	}
}

// Beside dnsmasq: that gives out the addresses, and what it says of booting is
// reported; a DHCP server does not begin there.
func TestServeBesideDNSmasq(t *testing.T) {
	needs(t, map[string]string{"udhcpc": "udhcpc", "dnsmasq": "dnsmasq-base"})
	bed := netnstest.New(t, net.HardwareAddr{2, 0xcc, 10, 77, 0, 10})
	network := bed.Host("network", "", "10.77.0.1/24")
	server := bed.Host("server", "", "10.77.0.2/24")
	machine := bed.Host("machine", "52:54:00:77:00:01")
	dns := network.StartCommand("dnsmasq", "--keep-in-foreground", "--conf-file=/dev/null", "--port=0", "--no-ping", "--log-facility=-", "--log-dhcp", "--user=root",
		"--dhcp-range=10.77.0.100,10.77.0.110", "--dhcp-leasefile="+filepath.Join(bed.Dir, "leases"), "--pid-file=", "--dhcp-boot=pxelinux.0")
	dns.Await(0, "IP range")
	dir := builtFolder(t)
	serve := server.Start("clonectl", "serve", dir, "--interface", "eth0")
	at := serve.Await(0, `10\.77\.0\.1 tells machines what to boot, too \("pxelinux\.0"\)`)
	out := machine.Run("udhcpc", "-f", "-q", "-n", "-i", "eth0", "-s", "/bin/true", "-t", "10", "-T", "1")
	if !strings.Contains(out, "10.77.0.1, lease time") {
		t.Errorf("udhcpc says %q; want a lease of dnsmasq's", out)
	}
	serve.Signal(syscall.SIGINT)
	if err := serve.Wait(); err != nil || strings.Contains(serve.Output()[at:], "52:54:00:77:00:01") {
		t.Errorf("the proxy has to do with a machine that does not boot: %v\n%s", err, serve.Output())
	}
	full := server.Start("clonectl", "serve", dir, "--interface", "eth0", "--dhcp", "10.77.0.200-10.77.0.210")
	if err := full.Wait(); err == nil || !strings.Contains(full.Output(), "10.77.0.1 is a DHCP server on this segment, too") {
		t.Errorf("beside another, a DHCP server says %q, %v", full.Output(), err)
	}
}

func TestServeOptions(t *testing.T) {
	for _, tt := range []struct {
		name string
		o    serveOptions
		want string
	}{
		{"no build", serveOptions{httpPort: 1, folders: []string{t.TempDir()}}, "holds no image; build one with"},
		{"port", serveOptions{httpPort: 70000}, "--http-port"},
		{"MAC", serveOptions{httpPort: 1, machines: []string{"52:54"}}, "want a MAC address"},
		{"range", serveOptions{httpPort: 1, dhcp: "10.0.0.1"}, "want two IPv4 addresses"},
		{"range of IPv6", serveOptions{httpPort: 1, dhcp: "fd00::1-fd00::2"}, "want two IPv4 addresses"},
		{"router alone", serveOptions{httpPort: 1, router: "10.0.0.1"}, "goes with --dhcp"},
		{"router", serveOptions{httpPort: 1, dhcp: "10.0.0.1-10.0.0.2", router: "x"}, "--router"},
		{"interface", serveOptions{httpPort: 1, folders: []string{builtFolder(t)}, iface: "nonexistent"}, `no network interface "nonexistent"`},
		{"no iPXE", serveOptions{httpPort: 1, folders: []string{builtFolder(t)}, ipxe: "/nonexistent"}, "apt-get install ipxe"},
		{"iPXE", serveOptions{httpPort: 1, folders: []string{builtFolder(t)}, ipxe: "/nonexistent"}, "/nonexistent"},
	} {
		if _, err := tt.o.options(t.Context(), newProgress(os.Stderr)); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v; want %q", tt.name, err, tt.want)
		}
	}
}

func TestHealthURL(t *testing.T) {
	for _, tt := range []struct{ http, want string }{
		{"http://127.0.0.1/healthz", ":80/healthz"},
		{"http://127.0.0.1:8081/a?b=c", ":8081/a?b=c"},
		{"", ""},
	} {
		c := &config.Config{Services: []config.Service{{Health: config.Health{TCP: "127.0.0.1:25"}}, {Health: config.Health{HTTP: tt.http}}}}
		if got := healthURL(c); got != tt.want {
			t.Errorf("healthURL(%q) = %q; want %q", tt.http, got, tt.want)
		}
	}
}

func TestServePicture(t *testing.T) {
	p := servePicture{"title", time.Second, []pxe.Machine{
		{MAC: net.HardwareAddr{2, 0, 0, 0, 0, 1}, Client: pxe.Client{Kind: pxe.UEFI, Arch: "amd64"}, Stage: pxe.Load, Loading: "clonecluster.efi", Loaded: 3e6,
			Steps: []pxe.Step{{Stage: pxe.Discover}, {Stage: pxe.Offer, File: "clonecluster.efi", At: time.Second}}},
		{MAC: net.HardwareAddr{2, 0, 0, 0, 0, 2}, Stage: pxe.Offer, Stuck: "no file"},
		{MAC: net.HardwareAddr{2, 0, 0, 0, 0, 3}, Stage: pxe.Up, Address: netip.MustParseAddr("10.77.0.100"),
			Steps: []pxe.Step{{Stage: pxe.File, File: "bzImage", Bytes: 5e6, At: 2 * time.Second}, {Stage: pxe.Up, At: 9 * time.Second}}},
	}}
	for _, width := range []int{30, 200} {
		all := strings.Join(p.render(width), "\n")
		for _, want := range []string{"loads clonecluster.efi, 3.0 MB", "discover 0.0s · offer 1.0s", "stuck: no file", "10.77.0.100", "bzImage 2.0s (5.0 MB) · up 9.0s"} {
			if width == 200 && !strings.Contains(all, want) {
				t.Errorf("the picture lacks %q:\n%s", want, all)
			}
		}
		for line := range strings.Lines(all) {
			if n := len([]rune(strings.TrimSpace(line))); n > width+10 { // colours
				t.Errorf("a line of %d at a width of %d: %q", n, width, line)
			}
		}
	}
}
