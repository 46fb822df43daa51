package pxe

import (
	"encoding/binary"
	"net"
	"net/netip"

	"github.com/insomniacslk/dhcp/dhcpv4"
)

// ports of the protocols.
const (
	dhcpPort  = 67
	replyPort = 68
	tftpPort  = 69
	bootPort  = 4011 // "boot server" or "binl": where PXE asks for the file
)

// bootFile is what a client is to load: a file of its own folder on this server.
type bootFile struct {
	name string // as in the folder
	url  string // http://…, if it loads by HTTP
	path string // of TFTP, if it does not
}

func (b bootFile) String() string {
	if b.url != "" {
		return b.url
	}
	return b.path
}

// bootMenu is option 43 of PXE: discovery control (6), with bit 3: boot the file
// that this offer names, ask nobody else. Then the end of the list.
var bootMenu = []byte{6, 1, 8, 255}

// withBoot adds to a reply what makes a client load a file. The client's GUID
// (option 97) and the vendor class that it has to find again (60) are what tells
// UEFI and PXE ROMs that the answer is theirs.
func withBoot(r, request *dhcpv4.DHCPv4, c Client, server netip.Addr, file bootFile) {
	r.ServerIPAddr = server.AsSlice()
	r.ServerHostName = ""
	r.BootFileName = file.String()
	r.UpdateOption(dhcpv4.OptServerIdentifier(server.AsSlice()))
	r.UpdateOption(dhcpv4.OptBootFileName(file.String()))
	if guid := request.Options.Get(dhcpv4.OptionClientMachineIdentifier); len(guid) > 0 {
		r.UpdateOption(dhcpv4.OptGeneric(dhcpv4.OptionClientMachineIdentifier, guid))
	}
	if c.Kind == UEFIHTTP {
		r.UpdateOption(dhcpv4.OptClassIdentifier("HTTPClient"))
		return
	}
	r.UpdateOption(dhcpv4.OptTFTPServerName(server.String()))
	r.UpdateOption(dhcpv4.OptClassIdentifier("PXEClient"))
	menu := bootMenu
	if item := bootItem(request.Options.Get(dhcpv4.OptionVendorSpecificInformation)); item != nil {
		// It has chosen from a menu, which it must find in the answer.
		menu = append(append([]byte{}, item...), menu...)
	}
	r.UpdateOption(dhcpv4.OptGeneric(dhcpv4.OptionVendorSpecificInformation, menu))
}

// bootItem finds the choice from a menu (71, of four octets) in a request's option
// 43, with its head; nil if there is none.
func bootItem(b []byte) []byte {
	for len(b) >= 2 && b[0] != 255 {
		if b[0] == 0 {
			b = b[1:]
			continue
		}
		n := 2 + int(b[1])
		if n > len(b) {
			return nil
		}
		if b[0] == 71 && n == 6 {
			return b[:n]
		}
		b = b[n:]
	}
	return nil
}

// proxyReply is the answer of a proxy: no address, only the file (PXE 2.1, section
// 2.2.3). kind is OFFER at port 67 and ACK at port 4011.
func proxyReply(m *dhcpv4.DHCPv4, kind dhcpv4.MessageType, c Client, server netip.Addr, file bootFile) (*dhcpv4.DHCPv4, error) {
	r, err := dhcpv4.NewReplyFromRequest(m, dhcpv4.WithMessageType(kind))
	if err != nil {
		return nil, err
	}
	withBoot(r, m, c, server, file)
	return r, nil
}

// acceptable is false for messages that no client of this segment sends.
func acceptable(m *dhcpv4.DHCPv4) bool {
	mac := m.ClientHWAddr
	return m.OpCode == dhcpv4.OpcodeBootRequest && len(mac) == 6 && mac[0]&1 == 0 &&
		binary.BigEndian.Uint32(mac[2:]) != 0 && // the zero address, and the like
		(m.GatewayIPAddr == nil || m.GatewayIPAddr.IsUnspecified()) // a relay's: from another segment
}

// parse reads a datagram, nil if it is no DHCP message. A panic of the library's
// parser is a message that is none.
func parse(b []byte) (m *dhcpv4.DHCPv4) {
	defer func() {
		if recover() != nil {
			m = nil
		}
	}()
	m, err := dhcpv4.FromBytes(b)
	if err != nil {
		return nil
	}
	return m
}

// ipv4Of is the address in a field of a message, invalid if it has none.
func ipv4Of(ip net.IP) netip.Addr {
	a, ok := netip.AddrFromSlice(ip.To4())
	if !ok || a.IsUnspecified() {
		return netip.Addr{}
	}
	return a
}

// offersBoot says what file a server's reply names, if it is for a client that
// boots from the network.
func offersBoot(m *dhcpv4.DHCPv4) (string, bool) {
	file := m.BootFileNameOption()
	if file == "" {
		file = m.BootFileName
	}
	if file != "" {
		return file, true
	}
	class := m.ClassIdentifier()
	if class == "PXEClient" || class == "HTTPClient" {
		return "a boot menu", true
	}
	return "", false
}
