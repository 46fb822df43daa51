package dhcpd

import (
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
)

func pool(first, last string) *Server {
	server := netip.MustParsePrefix("10.77.0.1/24")
	return New(Config{Server: server, First: netip.MustParseAddr(first), Last: netip.MustParseAddr(last), Router: server.Addr()})
}

func ask(t *testing.T, kind dhcpv4.MessageType, mac byte, mods ...dhcpv4.Modifier) *dhcpv4.DHCPv4 {
	t.Helper()
	m, err := dhcpv4.New(append([]dhcpv4.Modifier{
		dhcpv4.WithMessageType(kind), dhcpv4.WithHwAddr(net.HardwareAddr{0x52, 0x54, 0, 0x77, 0, mac}),
	}, mods...)...)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func requested(a string) dhcpv4.Modifier {
	return dhcpv4.WithOption(dhcpv4.OptRequestedIPAddress(net.ParseIP(a)))
}

func from(server string) dhcpv4.Modifier {
	return dhcpv4.WithOption(dhcpv4.OptServerIdentifier(net.ParseIP(server)))
}

func TestAnswer(t *testing.T) {
	type step struct {
		after time.Duration
		ask   *dhcpv4.DHCPv4
		want  dhcpv4.MessageType // none for no answer
		addr  string
	}
	const discover, request, none = dhcpv4.MessageTypeDiscover, dhcpv4.MessageTypeRequest, dhcpv4.MessageTypeNone
	const offer, ack, nak = dhcpv4.MessageTypeOffer, dhcpv4.MessageTypeAck, dhcpv4.MessageTypeNak
	for _, tt := range []struct {
		name  string
		steps []step
	}{
		{"a client gets an address and keeps it", []step{
			{0, ask(t, discover, 1), offer, "10.77.0.100"},
			{0, ask(t, request, 1, requested("10.77.0.100"), from("10.77.0.1")), ack, "10.77.0.100"},
			{0, ask(t, discover, 2), offer, "10.77.0.101"},
			{0, ask(t, discover, 1), offer, "10.77.0.100"},
			{2 * time.Hour, ask(t, discover, 1), offer, "10.77.0.100"},
			{0, ask(t, request, 1, dhcpv4.WithClientIP(net.ParseIP("10.77.0.100"))), ack, "10.77.0.100"},
		}},
		{"another server was chosen", []step{
			{0, ask(t, discover, 1), offer, "10.77.0.100"},
			{0, ask(t, request, 1, requested("10.77.0.50"), from("10.77.0.2")), none, ""},
		}},
		{"a wrong address is refused", []step{
			{0, ask(t, discover, 1), offer, "10.77.0.100"},
			{0, ask(t, request, 1, requested("10.77.0.101")), nak, "0.0.0.0"},
			{0, ask(t, request, 2, requested("192.0.2.1")), nak, "0.0.0.0"},
		}},
		{"a lease from before the server's start is honoured", []step{
			{0, ask(t, request, 1, requested("10.77.0.102")), ack, "10.77.0.102"},
			{0, ask(t, request, 2, requested("10.77.0.102")), nak, "0.0.0.0"},
		}},
		{"an empty pool is silent until a lease expires", []step{
			{0, ask(t, request, 1, requested("10.77.0.100")), ack, "10.77.0.100"},
			{0, ask(t, request, 2, requested("10.77.0.101")), ack, "10.77.0.101"},
			{0, ask(t, request, 3, requested("10.77.0.102")), ack, "10.77.0.102"},
			{0, ask(t, discover, 4), none, ""},
			{time.Hour + time.Second, ask(t, discover, 4), offer, "10.77.0.100"},
			{0, ask(t, request, 1, requested("10.77.0.100")), nak, "0.0.0.0"},
		}},
		{"a declined address is not offered again", []step{
			{0, ask(t, discover, 1), offer, "10.77.0.100"},
			{0, ask(t, dhcpv4.MessageTypeDecline, 1, requested("10.77.0.100")), none, ""},
			{0, ask(t, discover, 1), offer, "10.77.0.101"},
		}},
		{"not for us", []step{
			{0, ask(t, offer, 1), none, ""},
			{0, ask(t, discover, 1, func(d *dhcpv4.DHCPv4) { d.ClientHWAddr = nil }), none, ""},
			{0, ask(t, discover, 1, func(d *dhcpv4.DHCPv4) { d.OpCode = dhcpv4.OpcodeBootReply }), none, ""},
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			l, now := pool("10.77.0.100", "10.77.0.102"), time.Unix(1e9, 0)
			for i, s := range tt.steps {
				now = now.Add(s.after)
				r := l.Answer(s.ask, now)
				if r == nil {
					if s.want != none {
						t.Fatalf("step %d: no answer; want %v", i, s.want)
					}
					continue
				}
				if r.MessageType() != s.want || r.YourIPAddr.String() != s.addr {
					t.Fatalf("step %d: answer %v %v; want %v %v", i, r.MessageType(), r.YourIPAddr, s.want, s.addr)
				}
				if !r.ServerIdentifier().Equal(net.IPv4(10, 77, 0, 1)) || r.TransactionID != s.ask.TransactionID {
					t.Errorf("step %d: server identifier %v, transaction %v", i, r.ServerIdentifier(), r.TransactionID)
				}
				if s.want == ack && (r.Router()[0].String() != "10.77.0.1" || r.SubnetMask().String() != "ffffff00" || r.IPAddressLeaseTime(0) != time.Hour) {
					t.Errorf("step %d: router, mask or lease time missing: %v", i, r.Summary())
				}
			}
		})
	}
}

func TestDestination(t *testing.T) {
	l := pool("10.77.0.100", "10.77.0.102")
	discover := ask(t, dhcpv4.MessageTypeDiscover, 1)
	if to := Destination(discover, l.Answer(discover, time.Now())); to.String() != "255.255.255.255:68" {
		t.Errorf("an offer goes to %v; want a broadcast", to)
	}
	renew := ask(t, dhcpv4.MessageTypeRequest, 1, dhcpv4.WithClientIP(net.ParseIP("10.77.0.100")))
	if to := Destination(renew, l.Answer(renew, time.Now())); to.String() != "10.77.0.100:68" {
		t.Errorf("the answer to a renewal goes to %v; want the client's address", to)
	}
}

func TestPolite(t *testing.T) {
	unknown := ask(t, dhcpv4.MessageTypeRequest, 2, requested("192.0.2.1"))
	named := ask(t, dhcpv4.MessageTypeRequest, 2, requested("192.0.2.1"), from("10.77.0.1"))
	l := pool("10.77.0.100", "10.77.0.102")
	l.Polite = true
	if r := l.Answer(unknown, time.Now()); r != nil {
		t.Errorf("a client of somebody else is told %v; want silence", r.MessageType())
	}
	if r := l.Answer(named, time.Now()); r == nil || r.MessageType() != dhcpv4.MessageTypeNak {
		t.Errorf("a client that asks this server gets %v; want a NAK", r)
	}
}

func FuzzAnswer(f *testing.F) {
	m, _ := dhcpv4.NewDiscovery(net.HardwareAddr{0x52, 0x54, 0, 0x77, 0, 1})
	f.Add(m.ToBytes())
	m.UpdateOption(dhcpv4.OptMessageType(dhcpv4.MessageTypeRequest))
	m.UpdateOption(dhcpv4.OptRequestedIPAddress(net.IPv4(10, 77, 0, 100)))
	f.Add(m.ToBytes())
	m.HWType, m.ClientHWAddr = 0, make(net.HardwareAddr, 16)
	f.Add(m.ToBytes())
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := dhcpv4.FromBytes(b)
		if err != nil {
			return
		}
		l := pool("10.77.0.100", "10.77.0.102")
		if r := l.Answer(m, time.Unix(1e9, 0)); r != nil {
			Destination(m, r)
			if a, _ := netip.AddrFromSlice(r.YourIPAddr.To4()); !a.IsUnspecified() && (a.Less(l.First) || l.Last.Less(a)) {
				t.Errorf("gave out %v", a)
			}
			if _, err := dhcpv4.FromBytes(r.ToBytes()); err != nil {
				t.Errorf("the reply does not parse: %v", err)
			}
		}
	})
}

// TestExcept: what is the server's, the router's or somebody else's is given to nobody, not
// even to who asks for it.
func TestExcept(t *testing.T) {
	c := Config{Server: netip.MustParsePrefix("10.77.0.10/24"), First: netip.MustParseAddr("10.77.0.9"), Last: netip.MustParseAddr("10.77.0.13"),
		Router: netip.MustParseAddr("10.77.0.11"), Except: []netip.Addr{netip.MustParseAddr("10.77.0.9"), netip.MustParseAddr("10.77.0.12")}}
	if err := c.Validate(); err != nil {
		t.Fatal(err)
	}
	s := New(c)
	now := time.Unix(1e9, 0)
	if r := s.Answer(ask(t, dhcpv4.MessageTypeRequest, 1, requested("10.77.0.12")), now); r == nil || r.MessageType() != dhcpv4.MessageTypeNak {
		t.Errorf("who asks for it gets %v", r)
	}
	if r := s.Answer(ask(t, dhcpv4.MessageTypeDiscover, 1), now); r == nil || r.YourIPAddr.String() != "10.77.0.13" {
		t.Errorf("the first gets %v", r)
	}
	if r := s.Answer(ask(t, dhcpv4.MessageTypeDiscover, 2), now); r != nil {
		t.Errorf("the second gets %v", r)
	}
	c.Last = netip.MustParseAddr("10.77.0.12")
	if err := c.Validate(); err == nil || !strings.Contains(err.Error(), "nothing to give out") {
		t.Errorf("of nothing: %v", err)
	}
	c.First, c.Last = netip.MustParseAddr("10.77.0.150"), netip.MustParseAddr("10.77.0.100")
	if err := c.Validate(); err == nil || !strings.Contains(err.Error(), "ends before it begins: want 10.77.0.100 to 10.77.0.150") {
		t.Errorf("the wrong way round: %v", err)
	}
}
