package bpf

import (
	"errors"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"clonecluster/netcore/filter"
	"clonecluster/netcore/netnstest"
)

func TestMain(m *testing.M) { os.Exit(netnstest.Main(m, nil)) }

// inNamespace gives a host with a NIC and what stands for its clone0.
func inNamespace(t *testing.T) (h *netnstest.Host, nic, clone int) {
	b := netnstest.New(t, net.HardwareAddr{2, 0xcc, 0, 0, 0, 1})
	h = b.Host("node", "52:54:00:77:00:01")
	h.Run("ip", "link", "add", "clone0", "link", "eth0", "type", "macvlan", "mode", "private")
	err := h.Do(func() error {
		for name, index := range map[string]*int{"eth0": &nic, "clone0": &clone} {
			ifi, err := net.InterfaceByName(name)
			if err != nil {
				return err
			}
			*index = ifi.Index
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return h, nic, clone
}

// TestClsact is how kernels without tcx attach: what is left by a former process is
// replaced, and what is not ours stays.
func TestClsact(t *testing.T) {
	h, nic, clone := inNamespace(t)
	show := func() string {
		return h.Run("tc", "qdisc", "show", "dev", "eth0") + h.Run("tc", "filter", "show", "dev", "eth0", "ingress") + h.Run("tc", "filter", "show", "dev", "eth0", "egress")
	}
	before := show()
	f := load(t, Options{Filter: testConfig(false), noTCX: true})
	attach := func() {
		t.Helper()
		err := h.Do(func() error {
			if err := f.AttachGuard(nic); err != nil {
				return err
			}
			hook, err := f.AttachNIC(nic, false)
			if err == nil && hook != Clsact {
				t.Errorf("attached to %s", hook)
			}
			_, err2 := f.AttachClone(clone)
			return errors.Join(err, err2)
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	attach()
	once := show()
	attach()
	if got := show(); strings.Count(got, "clonecluster_") != 2 || strings.Count(once, "clonecluster_") != 2 {
		t.Errorf("attached once:\n%s\nand once more:\n%s", once, got)
	}
	if got := h.Run("tc", "filter", "show", "dev", "clone0", "egress"); !strings.Contains(got, "clonecluster_egress_tc") {
		t.Errorf("at clone0's egress: %s", got)
	}
	if err := h.Do(func() error { return DetachClsact(nic) }); err != nil {
		t.Error(err)
	}
	if got := show(); got != once {
		t.Errorf("after the programs were taken off all other NICs:\n%s\nwant\n%s", got, once)
	}
	if err := h.Do(func() error { return DetachClsact(clone) }); err != nil { // another NIC is in use now
		t.Error(err)
	}
	if got := show(); got != before {
		t.Errorf("after the programs were taken off a former NIC:\n%s\nwant\n%s", got, before)
	}
	attach()
	if err := h.Do(f.Detach); err != nil {
		t.Error(err)
	}
	if got := show(); got != before {
		t.Errorf("after Detach:\n%s\nwant\n%s", got, before)
	}

	// Another's filter keeps clsact.
	h.Run("tc", "qdisc", "add", "dev", "eth0", "clsact")
	h.Run("tc", "filter", "add", "dev", "eth0", "ingress", "prio", "7", "protocol", "ip", "u32", "match", "u32", "0", "0", "classid", "1:1")
	before = show()
	attach()
	if err := h.Do(f.Detach); err != nil {
		t.Error(err)
	}
	if got := show(); got != before {
		t.Errorf("beside another's filter, after Detach:\n%s\nwant\n%s", got, before)
	}
}

// TestProbe: a kernel that takes the programs has all that Probe asks for.
func TestProbe(t *testing.T) {
	load(t, Options{Filter: testConfig(false)})
	if err := Probe(); err != nil {
		t.Error(err)
	}
	err := error(&UnsupportedError{What: "bpf_loop", Since: "5.17", Err: os.ErrInvalid})
	if got := err.Error(); !errors.Is(err, ErrUnsupported) || !errors.Is(err, os.ErrInvalid) || !strings.Contains(got, "no bpf_loop, which is in Linux 5.17 and later") {
		t.Errorf("the error is %q", got)
	}
	if err := CheckPins(t.TempDir()); err == nil || !strings.Contains(err.Error(), "mount -t bpf") {
		t.Errorf("CheckPins of a folder on a disk: %v", err)
	}
}

// TestStateIsTakenUp by the next process if it means the same, and not otherwise.
func TestStateIsTakenUp(t *testing.T) {
	pins := filepath.Join(netnstest.NewUnwatched(t).BPFFS(), "pins")
	other := testConfig(false)
	other.HashKey[3]++
	for _, tt := range []struct {
		what string
		opt  Options
		want filter.State
	}{
		{"first", Options{Filter: testConfig(false)}, filter.Foreign},
		{"the same", Options{Filter: testConfig(false)}, filter.Settled},
		{"the same, anew", Options{Filter: testConfig(false), Anew: true}, filter.Foreign},
		{"another key", Options{Filter: other}, filter.Foreign},
		{"the first key again", Options{Filter: testConfig(false)}, filter.Foreign},
	} {
		tt.opt.Pins = pins
		f, err := Load(tt.opt)
		if err != nil {
			t.Fatalf("%s: %v", tt.what, err)
		}
		table := f.Table()
		if table[7] != tt.want {
			t.Errorf("%s: bucket 7 is %v; want %v", tt.what, table[7], tt.want)
		}
		table[7] = filter.Settled
		f.SetTable(&table, 1)
		if err := f.Close(); err != nil {
			t.Errorf("%s: %v", tt.what, err)
		}
		if states, err := filepath.Glob(filepath.Join(pins, "*")); err != nil || len(states) != 1 {
			t.Errorf("%s: %q is pinned, %v; want one state", tt.what, states, err)
		}
	}
}

func TestLateFrame(t *testing.T) {
	for _, tt := range []struct {
		record string
		want   string
		ok     bool
	}{
		{"\x03\x00\x00\x00abcxxx", "abc", true}, {"\x00\x00\x00\x00", "", true},
		{"", "", false}, {"\x03\x00\x00", "", false}, {"\x04\x00\x00\x00abc", "", false}, {"\xff\xff\xff\xffabc", "", false},
	} {
		if got, ok := lateFrame([]byte(tt.record)); string(got) != tt.want || ok != tt.ok {
			t.Errorf("lateFrame(%q) = %q, %v; want %q, %v", tt.record, got, ok, tt.want, tt.ok)
		}
	}
}

// TestLoads: what a configuration makes constant decides what the verifier sees, and
// verifiers have faults of their own. None may leave a node without its datapath.
func TestLoads(t *testing.T) {
	both := testConfig(false)
	for _, vips := range [][2]netip.Addr{{both.VIP4, both.VIP6}, {both.VIP4, {}}, {{}, both.VIP6}} {
		for _, patience := range []time.Duration{0, 150 * time.Millisecond} {
			for _, rewrite := range []bool{false, true} {
				cfg := both
				cfg.VIP4, cfg.VIP6, cfg.ResetPatience = vips[0], vips[1], patience
				f := load(t, Options{Filter: cfg, WireMAC: [6]byte{2, 0, 0, 0, 0, 1}, Rewrite: rewrite})
				if err := f.Close(); err != nil {
					t.Error(err)
				}
			}
		}
	}
}
