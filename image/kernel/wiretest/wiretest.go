// Package wiretest judges whether the kernel's wire address does what its patch
// says (../patches): a guest, the command in guest/, boots the kernel, makes
// devices of every kind that can have a wire address, lets them send every
// kind of frame they send by themselves, and captures on the other end of the
// wire. Here tshark dissects the captures, so that no code of ours both builds
// and reads a frame, and Judge compares them with what was set.
//
// Nothing else imports it; it is a package for the sake of the guest, which
// shares its types.
package wiretest

import (
	"bytes"
	"context"
	"encoding/hex"
	"fmt"
	"os/exec"
	"slices"
	"strconv"
	"strings"
)

// Port is the name of the virtio-serial port to which the guest writes a tar
// archive: a pcap file per Capture and at last ReportFile.
const (
	Port       = "wiretest"
	ReportFile = "report.json"
)

// EtherType of the guest's marks: a local experimental one, IEEE 802.
const EtherType = 0x88b5

// Marks, the payloads of frames of EtherType that the device under test sends
// through an AF_PACKET socket of type SOCK_DGRAM.
const (
	MarkSettled = "settled" // the write to wire_address has returned
	MarkEnd     = "end"
)

// Netpoll is the name of the capture of the kernel's network console, if the
// kernel has one. The host makes it, of the NIC; the guest only says what is
// expected.
const Netpoll = "netpoll"

// Report is what the guest found out by itself.
type Report struct {
	Kernel   string
	Checks   []Check
	Captures []Capture
}

// Check is one comparison in the guest.
type Check struct {
	Name   string
	OK     bool
	Detail string
}

// Capture is one capture of what a device sent, and what is expected of it.
type Capture struct {
	Name     string // of the file, with ".pcap"
	Hardware string // address that ARP and NDP must announce
	Before   string // allowed source until MarkSettled
	Source   string // required source from then on
	VLAN     int    // tag that every frame must have, 0 for none
	// Want lists kinds of frames, see Frame.Kind, that must be there, with how
	// many there must be at least; Never kinds that must not be.
	Want  map[string]int
	Never []string
}

// Frame is what tshark says of a frame.
type Frame struct {
	Number  int
	Source  string
	VLAN    int
	Kind    string
	Payload string // link-layer address that ARP or NDP announce, if they do
	Mark    string
}

var fields = []string{
	"frame.number", "eth.src", "vlan.id", "eth.type", "vlan.etype",
	"arp.opcode", "arp.src.hw_mac", "arp.src.proto_ipv4", "arp.dst.proto_ipv4",
	"icmpv6.type", "icmpv6.opt.linkaddr", "icmpv6.nd.na.flag.s", "ipv6.src",
	"icmp.type", "igmp.type", "tcp.srcport", "udp.srcport", "ip.version", "ip.dst", "data.data",
}

// Dissect has tshark read a capture file.
func Dissect(ctx context.Context, file string) ([]Frame, error) {
	args := []string{"-n", "-r", file, "-T", "fields", "-E", "separator=/t", "-E", "occurrence=f"}
	for _, f := range fields {
		args = append(args, "-e", f)
	}
	var stderr bytes.Buffer
	cmd := exec.CommandContext(ctx, "tshark", args...)
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("tshark: %w: %s", err, strings.TrimSpace(stderr.String()))
	}
	var frames []Frame
	for line := range strings.Lines(string(out)) {
		f, err := parseLine(strings.TrimSuffix(line, "\n"))
		if err != nil {
			return nil, fmt.Errorf("reading tshark's output: %w", err)
		}
		frames = append(frames, f)
	}
	return frames, nil
}

func parseLine(line string) (Frame, error) {
	values := strings.Split(line, "\t")
	if len(values) != len(fields) {
		return Frame{}, fmt.Errorf("%d fields in %q, not %d", len(values), line, len(fields))
	}
	get := func(name string) string { return values[slices.Index(fields, name)] }
	f := Frame{Source: get("eth.src")}
	var err error
	if f.Number, err = strconv.Atoi(get("frame.number")); err != nil {
		return Frame{}, err
	}
	if id := get("vlan.id"); id != "" {
		if f.VLAN, err = strconv.Atoi(id); err != nil {
			return Frame{}, err
		}
	}
	switch {
	case get("arp.opcode") != "":
		f.Payload = get("arp.src.hw_mac")
		switch {
		case get("arp.src.proto_ipv4") == get("arp.dst.proto_ipv4"):
			f.Kind = "arp-announcement"
		case get("arp.opcode") == "1":
			f.Kind = "arp-request"
		default:
			f.Kind = "arp-reply"
		}
	case get("icmpv6.type") != "":
		f.Payload = get("icmpv6.opt.linkaddr")
		switch get("icmpv6.type") {
		case "129":
			f.Kind = "echo6-reply"
		case "133":
			f.Kind = "router-solicitation"
		case "135":
			f.Kind = "ns"
			if get("ipv6.src") == "::" {
				f.Kind = "dad"
			}
		case "136":
			f.Kind = "na"
			if s := get("icmpv6.nd.na.flag.s"); s == "0" || s == "False" {
				f.Kind = "na-announcement"
			} else if f.Payload == "" { // to a unicast solicitation, RFC 4861 4.4
				f.Kind = "na-bare"
			}
		case "143":
			f.Kind = "mld"
		default:
			f.Kind = "icmp6"
		}
	case get("igmp.type") != "":
		f.Kind = "igmp"
	case get("icmp.type") == "0":
		f.Kind = "echo-reply"
	case get("icmp.type") != "":
		f.Kind = "icmp"
	case get("tcp.srcport") != "" && get("ip.version") == "4":
		f.Kind = "tcp4"
	case get("tcp.srcport") != "":
		f.Kind = "tcp6"
	case get("udp.srcport") != "" && get("ip.dst") == "255.255.255.255":
		f.Kind = "udp-broadcast"
	case get("udp.srcport") != "" && strings.HasPrefix(get("ip.dst"), "239."):
		f.Kind = "udp-multicast"
	case get("udp.srcport") != "":
		f.Kind = "udp"
	case get("eth.type") == "0x88b5" || get("vlan.etype") == "0x88b5":
		f.Kind = "packet-dgram"
		if text, err := hex.DecodeString(get("data.data")); err == nil {
			f.Mark = strings.TrimRight(string(text), "\x00")
		}
	default:
		f.Kind = "other"
	}
	return f, nil
}

// Judge returns what is wrong with a capture, a line each.
func Judge(c Capture, frames []Frame) []string {
	var wrong []string
	bad := func(f Frame, format string, args ...any) {
		wrong = append(wrong, fmt.Sprintf("%s, frame %d (%s): %s", c.Name, f.Number, f.Kind, fmt.Sprintf(format, args...)))
	}
	count := map[string]int{}
	settled, ended := false, false
	for _, f := range frames {
		count[f.Kind]++
		if f.Mark == MarkSettled {
			settled = true
		}
		// What the write itself sets off comes after it has taken effect.
		early := !settled && !strings.HasSuffix(f.Kind, "-announcement")
		if f.Source != c.Source && !(early && f.Source == c.Before) {
			bad(f, "Ethernet source %s; want %s", f.Source, c.Source)
		}
		if f.VLAN != c.VLAN {
			bad(f, "VLAN tag %d; want %d", f.VLAN, c.VLAN)
		}
		if f.Payload != "" && f.Payload != c.Hardware {
			bad(f, "announces %s; want %s", f.Payload, c.Hardware)
		}
		if (strings.HasPrefix(f.Kind, "arp") || f.Kind == "ns" || f.Kind == "na-announcement") && f.Payload == "" {
			bad(f, "announces no address; want %s", c.Hardware)
		}
		if slices.Contains(c.Never, f.Kind) {
			bad(f, "there must be none of this kind")
		}
		ended = ended || f.Mark == MarkEnd
	}
	for kind, n := range c.Want {
		if count[kind] < n {
			wrong = append(wrong, fmt.Sprintf("%s: %d frames of kind %s; want at least %d", c.Name, count[kind], kind, n))
		}
	}
	if !settled || !ended {
		wrong = append(wrong, fmt.Sprintf("%s: the capture is not complete (%d frames)", c.Name, len(frames)))
	}
	slices.Sort(wrong)
	return wrong
}
