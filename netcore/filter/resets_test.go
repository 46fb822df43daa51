package filter

import (
	"net/netip"
	"testing"
	"time"
)

// TestResetPatience: the first pure RST of a flow is delayed, and those within the
// patience are swallowed; then they leave. A RST with ACK, which answers a SYN to a closed
// port, leaves at once.
func TestResetPatience(t *testing.T) {
	const patience = 150 * time.Millisecond
	f, err := New(Config{
		CloneMAC: [6]byte{2, 0xcc, 0, 0, 0, 1}, VIP4: netip.MustParseAddr("10.77.0.10"),
		Rules: []Rule{{Proto: ProtoTCP, PortLo: 80, PortHi: 80}}, ResetPatience: patience,
	})
	if err != nil {
		t.Fatal(err)
	}
	table := new(Table)
	for b := range table {
		table[b] = Settled
	}
	start := testNow
	f.SetTable(table, 0)
	f.SetLease(start + int64(time.Hour))
	vip, client := netip.MustParseAddr("10.77.0.10"), netip.MustParseAddr("10.77.0.1")
	for _, c := range []struct {
		name  string
		after time.Duration
		port  uint16
		flags string
		want  Verdict
	}{
		{"the first", 0, 1000, "R", DelayRST},
		{"the next at once", time.Millisecond, 1000, "R", DropRST},
		{"of another flow", patience, 1001, "R", DelayRST},
		{"within the patience", patience - 2*time.Millisecond, 1000, "R", DropRST},
		{"after it", patience + time.Millisecond, 1000, "R", Send},
		{"and again", patience + 2*time.Millisecond, 1000, "R", Send},
		{"of the other flow", 2*patience + time.Millisecond, 1001, "R", Send},
		{"with ACK", 0, 1002, "RA", Send},
		{"so late that it is another matter", 3 * time.Minute, 1000, "R", DelayRST},
		{"and its next", 3*time.Minute + patience, 1000, "R", Send},
	} {
		if got := f.Egress(tcp(vip, client, 80, c.port, c.flags), start+int64(c.after)); got != c.want {
			t.Errorf("%s: %v; want %v", c.name, got, c.want)
		}
	}
	// What waited is judged by the table alone.
	late := tcp(vip, client, 80, 1000, "R")
	if got := f.Release(late, start); got != Send {
		t.Errorf("released: %v", got)
	}
	before := f.Counters()
	table[f.Bucket(Tuple{ProtoTCP, netip.AddrPortFrom(vip, 80), netip.AddrPortFrom(client, 1000)})] = Shared
	f.SetTable(table, start)
	if got := f.Release(late, start); got != DropRST || f.Counters()[DropRST] != before[DropRST]+1 {
		t.Errorf("released where others may hold it: %v", got)
	}
}
