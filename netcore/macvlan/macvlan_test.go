package macvlan

import (
	"context"
	"io"
	"log/slog"
	"net/netip"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"clonecluster/netcore/clone"
	"clonecluster/netcore/filter"
	"clonecluster/netcore/netnstest"
	"clonecluster/netcore/nic"
)

func TestMain(m *testing.M) { os.Exit(netnstest.Main(m, nil)) }

var (
	testClone = [6]byte{0x02, 0xcc, 0x0a, 0x4d, 0, 0x0a}
	testVIP4  = netip.MustParseAddr("10.77.0.10")
	testVIP6  = netip.MustParseAddr("fd77::10")
)

func now() int64 {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts); err != nil {
		panic(err)
	}
	return ts.Nano()
}

// open opens a datapath in a namespace, as a process there would.
func open(tb testing.TB, b *netnstest.Bed, h *netnstest.Host, change func(*Config)) (d *Datapath, err error) {
	tb.Helper()
	cfg := Config{
		Config: clone.Config{
			CloneMAC: testClone, VIP4: netip.PrefixFrom(testVIP4, 24), VIP6: netip.PrefixFrom(testVIP6, 64),
			Gateway4: netip.MustParseAddr("10.77.0.1"), Gateway6: netip.MustParseAddr("fe80::1"),
			Logger: slog.New(slog.NewTextHandler(io.Discard, nil)),
		},
		Filter: filter.Config{CloneMAC: testClone, VIP4: testVIP4, VIP6: testVIP6, ResetPatience: 50 * time.Millisecond}, Now: now,
	}
	bpffs := b.BPFFS()
	err = h.Do(func() error {
		nics, err := nic.List()
		if err != nil {
			return err
		}
		for _, n := range nics {
			if n.Name == "eth0" {
				cfg.NIC = n
			}
		}
		if cfg.Pins, err = PinsOf(bpffs); err != nil {
			return err
		}
		if change != nil {
			change(&cfg)
		}
		d, err = Open(cfg)
		return err
	})
	return d, err
}

// TestRunEnds: a datapath that is asked to stop does, at once.
func TestRunEnds(t *testing.T) {
	b := netnstest.New(t, testClone[:])
	h := b.Host("node", "52:54:00:77:00:01", "10.77.0.101/24")
	d, err := open(t, b, h, nil)
	if err != nil {
		t.Fatal(err)
	}
	for range 20 {
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
		done := make(chan error, 1)
		go func() { done <- h.Do(func() error { return d.Run(ctx) }) }()
		select {
		case err := <-done:
			if err != nil {
				t.Error(err)
			}
		case <-time.After(10 * time.Second):
			panic("the datapath does not end")
		}
		cancel()
	}
	if err := h.Do(d.Close); err != nil {
		t.Error(err)
	}
}
