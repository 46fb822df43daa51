package raw

import (
	"context"
	"encoding/binary"
	"errors"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"clonecluster/netcore/delayed"
	"clonecluster/netcore/filter"
)

// reset is a pure RST of the VIP's for a client's port.
func reset(tb testing.TB, port uint16) []byte {
	f := udp(tb, true)[:14+20+20]
	ip := f[14:]
	ip[2], ip[3], ip[9] = 0, 40, 6
	tcp := ip[20:]
	clear(tcp)
	binary.BigEndian.PutUint16(tcp, 80)
	binary.BigEndian.PutUint16(tcp[2:], port)
	tcp[12], tcp[13] = 5<<4, 4
	return f
}

// TestLateReset: a first RST leaves after a while, from the wire MAC, unless its
// bucket has become one that others may hold flows in.
func TestLateReset(t *testing.T) {
	const lost, told, patience = 1000, 1001, 50 * time.Millisecond
	f := newForwarding(t)
	d := f.rx.d
	var err error
	if d.cfg.Filter, err = filter.New(filter.Config{
		CloneMAC: testClone, VIP4: testVIP4, VIP6: testVIP6, ResetPatience: patience,
		Rules: []filter.Rule{{Proto: filter.ProtoTCP, PortLo: 80, PortHi: 80}},
	}); err != nil {
		t.Fatal(err)
	}
	own := func(state filter.State) {
		var table filter.Table
		for b := range table {
			table[b] = state
		}
		d.cfg.Filter.SetTable(&table, 0)
		d.cfg.Filter.SetLease(now() + int64(time.Hour))
	}
	out := func(port uint16) { f.tx.frame(copy(f.tx.buf, append(make([]byte, vnetHdrLen), reset(t, port)...))) }
	listen := packetListener(t, f.bed.Switch, "node")
	ctx, cancel := context.WithCancel(t.Context())
	d.late = delayed.New(d.cfg.Filter, d.cfg.Now)
	done := make(chan struct{})
	go func() {
		d.late.Run(ctx, d.sendFromClone)
		close(done)
	}()
	defer func() {
		cancel()
		<-done
	}()

	own(filter.Settled)
	out(lost)
	own(filter.Foreign)
	for deadline := time.Now().Add(10 * time.Second); d.cfg.Filter.Counters()[filter.DropRST] == 0; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("a delayed RST was not judged again")
		}
	}
	own(filter.Settled)
	begin := time.Now()
	out(told)
	for {
		var b [2048]byte
		n, err := unix.Read(listen, b[:])
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			t.Fatalf("waiting for the RST: %v", err)
		}
		if n < 14+20+20 || b[12] != 8 || b[23] != 6 {
			continue
		}
		if after := time.Since(begin); after < patience {
			t.Errorf("the RST left after %v; want at least %v", after, patience)
		}
		if port := binary.BigEndian.Uint16(b[36:]); port != told {
			t.Errorf("a RST left for port %d; want %d", port, told)
		}
		if [6]byte(b[6:12]) != [6]byte(d.WireMAC()) {
			t.Errorf("it left from % x; want the wire MAC", b[6:12])
		}
		return
	}
}

// TestLateResets: what finds no room is dropped.
func TestLateResets(t *testing.T) {
	f := newForwarding(t)
	d := f.rx.d
	var err error
	if d.cfg.Filter, err = filter.New(filter.Config{
		CloneMAC: testClone, VIP4: testVIP4, VIP6: testVIP6, ResetPatience: time.Hour,
		Rules: []filter.Rule{{Proto: filter.ProtoTCP, PortLo: 80, PortHi: 80}},
	}); err != nil {
		t.Fatal(err)
	}
	var table filter.Table
	for b := range table {
		table[b] = filter.Settled
	}
	d.cfg.Filter.SetTable(&table, 0)
	d.cfg.Filter.SetLease(now() + int64(time.Hour))
	d.late = delayed.New(d.cfg.Filter, d.cfg.Now)
	const more = 10
	for i := range delayed.Most + more {
		f.tx.frame(copy(f.tx.buf, append(make([]byte, vnetHdrLen), reset(t, uint16(1000+i))...)))
	}
	c := d.cfg.Filter.Counters()
	// Of two flows that share an entry of the memory, both are delayed or one is not.
	if got := c[filter.DropRST]; got < 1 || got > more || c[filter.DelayRST] < delayed.Most {
		t.Errorf("%d are delayed, %d dropped; want all that exceed %d dropped, %d", c[filter.DelayRST], got, delayed.Most, more)
	}
}
