package pxe

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"strings"

	"github.com/insomniacslk/dhcp/dhcpv4"
	"github.com/insomniacslk/dhcp/iana"
)

// Kind is what asks, and so what it can be given. The zero value is whoever does
// not boot from the network.
type Kind int

// The kinds.
const (
	NoBoot   Kind = iota
	BIOS          // a BIOS's PXE ROM: loads a small program by TFTP
	IPXE          // iPXE, in a ROM or from us: runs a script, loads by HTTP
	UEFI          // UEFI's PXE: loads an EFI program by TFTP
	UEFIHTTP      // UEFI's HTTP boot: loads one by HTTP
	Node          // a node of this project, whose init asks for its address
)

var kindNames = [...]string{"no network boot", "BIOS PXE", "iPXE", "UEFI PXE", "UEFI HTTP boot", "node"}

func (k Kind) String() string {
	if k < 0 || int(k) >= len(kindNames) {
		return fmt.Sprintf("Kind(%d)", int(k))
	}
	return kindNames[k]
}

// Client is what a DHCP message says of who sent it.
type Client struct {
	Kind Kind
	// Arch is the machine's, as Go says it, "" if it is none that we know; then
	// Unknown says what it called itself.
	Arch    string
	Unknown string
	// EFI is set for iPXE that runs under UEFI.
	EFI bool
}

func (c Client) String() string {
	arch := c.Arch
	if arch == "" {
		arch = c.Unknown
	}
	if c.Kind == NoBoot || c.Kind == Node || arch == "" {
		return c.Kind.String()
	}
	return c.Kind.String() + ", " + arch
}

// nodeClass is the vendor class (option 60) of the DHCP client in a node's init.
const nodeClass = "clonecluster"

// archs are the values of option 93 that the kinds of machines send which an
// image can be built for (RFC 4578, section 2.1, and IANA's registry). 9 is EFI
// byte code by the registry, and x86_64 in what many machines send.
var archs = map[iana.Arch]struct {
	kind Kind
	arch string
}{
	iana.INTEL_X86PC:     {BIOS, "amd64"},
	iana.EFI_X86_64:      {UEFI, "amd64"},
	iana.EFI_BC:          {UEFI, "amd64"},
	iana.EFI_ARM64:       {UEFI, "arm64"},
	iana.EFI_X86_64_HTTP: {UEFIHTTP, "amd64"},
	iana.EFI_ARM64_HTTP:  {UEFIHTTP, "arm64"},
}

// Classify says who sent a message: by the vendor class (option 60), the
// architecture (93) and the user class (77).
func Classify(m *dhcpv4.DHCPv4) Client {
	class := m.ClassIdentifier()
	if class == nodeClass {
		return Client{Kind: Node}
	}
	pxe, http := strings.HasPrefix(class, "PXEClient"), strings.HasPrefix(class, "HTTPClient")
	if !pxe && !http {
		return Client{}
	}
	ipxe := isIPXE(m.Options.Get(dhcpv4.OptionUserClassInformation))
	raw := m.Options.Get(dhcpv4.OptionClientSystemArchitectureType)
	if len(raw) < 2 && pxe && archInClass(class) >= 0 {
		raw = binary.BigEndian.AppendUint16(nil, uint16(archInClass(class)))
	}
	// A client may list several, the best first.
	for ; len(raw) >= 2; raw = raw[2:] {
		a, ok := archs[iana.Arch(binary.BigEndian.Uint16(raw))]
		if !ok {
			continue
		}
		c := Client{Kind: a.kind, Arch: a.arch}
		switch {
		case ipxe:
			c.Kind, c.EFI = IPXE, a.kind != BIOS
		case http != (a.kind == UEFIHTTP):
			continue // says two things
		}
		return c
	}
	c := Client{Kind: UEFI, Unknown: "no architecture"}
	if http {
		c.Kind = UEFIHTTP
	}
	if raw := m.Options.Get(dhcpv4.OptionClientSystemArchitectureType); len(raw) >= 2 {
		c.Unknown = iana.Arch(binary.BigEndian.Uint16(raw)).String()
	}
	return c
}

// isIPXE looks into option 77, which iPXE sends as plain text, and RFC 3004 wants
// in pieces with their lengths.
func isIPXE(class []byte) bool {
	return bytes.Equal(class, []byte("iPXE")) || bytes.Equal(class, []byte("\x04iPXE"))
}

// archInClass reads "PXEClient:Arch:00007:UNDI:003016", -1 if it is not that.
func archInClass(class string) int {
	var arch, undi int
	if _, err := fmt.Sscanf(class, "PXEClient:Arch:%05d:UNDI:%06d", &arch, &undi); err != nil || arch < 0 || arch > 0xffff {
		return -1
	}
	return arch
}
