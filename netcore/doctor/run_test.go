package doctor

import (
	"context"
	"encoding/binary"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"clonecluster/netcore/filter"
	"clonecluster/netcore/finding"
	"clonecluster/netcore/membership"
	"clonecluster/netcore/neigh"
	"clonecluster/qemu/vswitch"
)

func mustAddr(s string) netip.Addr { return netip.MustParseAddr(s) }

var (
	testVIP  = mustAddr("10.77.0.10")
	testVIP6 = mustAddr("fd77::10")
	testVIPs = []netip.Addr{testVIP, testVIP6}
)

// lab is doctors at a virtual switch, in a bubble of fake time.
type lab struct {
	t     *testing.T
	sw    *vswitch.Switch
	ports []*vswitch.Port
	nodes []*Doctor
	board []*finding.Board
	bpf   []int // nodes on the datapath bpf, by index
	mtu   []int // of their NICs
}

// inLab runs a test of n doctors; those at the indexes bpf are on that datapath, the
// others on raw.
func inLab(t *testing.T, cfg vswitch.Config, n int, f func(*lab), bpf ...int) {
	synctest.Test(t, func(t *testing.T) {
		cfg.Guard = []net.HardwareAddr{cloneMAC[:]}
		cfg.Queue = 1 << 14
		sw, err := vswitch.New(cfg)
		if err != nil {
			t.Fatal(err)
		}
		defer sw.Close()
		ctx, stop := context.WithCancel(t.Context())
		var running sync.WaitGroup
		defer running.Wait()
		defer stop()
		l := &lab{t: t, sw: sw, bpf: bpf}
		key := []byte("the key of the tests")
		base := time.Now()
		for i := range n {
			l.add(id(i+1), membership.NewCodec("test", key), base)
		}
		for _, d := range l.nodes {
			running.Go(func() { d.Run(ctx) })
		}
		f(l)
	})
}

// add cables a doctor to the switch.
func (l *lab) add(self membership.NodeID, codec *membership.Codec, base time.Time) *Doctor {
	l.t.Helper()
	var d *Doctor
	drops, dropped := l.filter()
	answer := func([]byte) {}
	port, err := l.sw.Attach(fmt.Sprintf("port%d", len(l.ports)+1), vswitch.ReceiverFunc(func(f []byte) {
		answer(f)
		if drops(f) {
			return
		}
		if to := [6]byte(f); f[0]&1 != 0 || to == cloneMAC || to == [6]byte(self) {
			if f[12] == 8 && f[13] == 0 {
				d.HearIPv4(f[14:])
				return
			}
			d.Hear(f)
		}
	}))
	if err != nil {
		l.t.Fatal(err)
	}
	if len(l.nodes) == 0 { // one owns the bucket of those who ask
		answer = answers(l.t, port, cloneMAC, self)
	}
	board, i := finding.NewBoard(nil), len(l.nodes)
	d = NewDoctor(Options{
		Config: Config{CloneMAC: cloneMAC, MTU: 1500}, Codec: codec, Wire: wire{port}, VIPs: testVIPs,
		Now:      func() int64 { return int64(time.Since(base)) + 1 },
		Self:     func() membership.Peer { return membership.Peer{ID: self, Incarnation: uint64(self[5]) + 1000} },
		Members:  func() map[membership.NodeID]bool { return nil },
		Dropped:  dropped,
		MTU:      func() int { return l.mtu[i] },
		Announce: func() error { announce(l.t, port, self); return nil },
		Board:    board, Logger: slog.New(slog.DiscardHandler),
	})
	l.ports, l.nodes, l.board, l.mtu = append(l.ports, port), append(l.nodes, d), append(l.board, board), append(l.mtu, 1500)
	return d
}

// filter tells what the datapath of the node that is cabled next drops before the
// doctor hears it, and what it counts. The programs of bpf are held equal to the
// reference filter that stands for them; what goes on is what "passes" in filter.c says.
func (l *lab) filter() (drops func(frame []byte) bool, dropped func() Dropped) {
	if !slices.Contains(l.bpf, len(l.nodes)) {
		return func([]byte) bool { return false }, nil
	}
	f, err := filter.New(filter.Config{CloneMAC: cloneMAC, VIP4: testVIP, VIP6: testVIP6})
	if err != nil {
		l.t.Fatal(err)
	}
	drops = func(frame []byte) bool {
		v := f.Ingress(frame, 0, nil)
		if v.Accept() || v == filter.AnswerNeighbor {
			return false
		}
		if toClone(frame) && !membership.IsProbe(frame) {
			return true
		}
		return !slices.Contains([]filter.Verdict{filter.DropNotOurs, filter.DropVLAN, filter.DropMalformed, filter.DropOversized}, v)
	}
	return drops, func() Dropped {
		c := f.Counters()
		return Dropped{RARPs: c[filter.DropCloneRARP], FromClone: c[filter.DropCloneSource], Conflicts: c[filter.DropConflict]}
	}
}

// answers gives what answers at a port who asks for the VIPs: with a MAC, from another.
func answers(t *testing.T, p *vswitch.Port, mac, wireMAC [6]byte) func(frame []byte) {
	r, err := neigh.New(neigh.Config{CloneMAC: mac, WireMAC: wireMAC, VIP4: testVIP, VIP6: testVIP6, Directed: true})
	if err != nil {
		t.Fatal(err)
	}
	return func(frame []byte) {
		if reply, err := r.Reply(frame, nil); err == nil {
			p.Send(reply)
		}
	}
}

type wire struct{ *vswitch.Port }

func (w wire) Send(f []byte) error { w.Port.Send(f); return nil }

func announce(t *testing.T, p *vswitch.Port, self membership.NodeID) {
	r, err := neigh.New(neigh.Config{CloneMAC: cloneMAC, WireMAC: self, VIP4: testVIP})
	if err != nil {
		t.Error(err)
		return
	}
	frames, err := r.Announcements()
	if err != nil {
		t.Error(err)
	}
	for _, f := range frames {
		p.Send(f)
	}
}

func (l *lab) rule(r vswitch.Rule) (remove func()) {
	l.t.Helper()
	remove, err := l.sw.AddRule(r)
	if err != nil {
		l.t.Fatal(err)
	}
	return remove
}

// found are the codes of a node's examination. Its board has the same, but for what
// others put there.
func (l *lab) found(i int) string {
	var codes, board []string
	for _, c := range l.nodes[i].Examination().Checks {
		for _, f := range c.Findings {
			codes = append(codes, f.Code)
		}
	}
	for _, f := range l.board[i].Current() {
		board = append(board, f.Code)
		if f.Node != id(i+1).String() || f.What == "" || f.Fix == "" {
			l.t.Errorf("finding %+v: it lacks something", f)
		}
	}
	slices.Sort(codes)
	slices.Sort(board)
	if want := slices.DeleteFunc(slices.Clone(codes), func(c string) bool { return c == oneWay.Code }); !slices.Equal(board, want) {
		l.t.Errorf("node %d has %v on its board; want %v", i+1, board, want)
	}
	return strings.Join(codes, " ")
}

// examine has all nodes examined, with a burst from the first.
func (l *lab) examine(rate int) (took time.Duration) {
	begin := time.Now()
	for i, d := range l.nodes {
		if err := d.Examine(map[bool]int{true: rate}[i == 0]); err != nil {
			l.t.Fatal(err)
		}
	}
	for l.nodes[0].Examination().Running {
		time.Sleep(50 * time.Millisecond)
		if time.Since(begin) > time.Minute {
			l.t.Fatalf("the examination does not end: %+v", l.nodes[0].Examination())
		}
	}
	return time.Since(begin)
}

func toClone(f []byte) bool { return [6]byte(f) == cloneMAC }

// dhcp is the frame of a DHCP server's offer.
func dhcp(server byte) []byte {
	f := append(slices.Repeat([]byte{0xff}, 6), 2, 0, 0, 0, 1, server, 8, 0, 0x45, 0, 0, 0, 0, 0, 0, 0, 64, 17, 0, 0, 10, 77, 0, server, 255, 255, 255, 255, 0, 67, 0, 68, 0, 0, 0, 0)
	f = append(f, 2)
	f = append(f, make([]byte, 235)...)
	return append(f, 0x63, 0x82, 0x53, 0x63, 53, 1, 2, 54, 4, 10, 77, 0, server, 255)
}

// TestVirtualSwitch: each fault of a switch, as the doctors of three nodes find it by
// themselves at boot, and when asked.
func TestVirtualSwitch(t *testing.T) {
	group := func(f []byte) bool { return [6]byte(f) == membership.Group }
	rarp := func(l *lab) {
		f := append(slices.Repeat([]byte{0xff}, 6), cloneMAC[:]...)
		l.ports[1].Send(append(append(f, 0x80, 0x35), make([]byte, 46)...))
	}
	conflict := func(l *lab, vip int) {
		r, err := neigh.New(neigh.Config{CloneMAC: [6]byte{2, 9, 9, 9, 9, 9}, WireMAC: [6]byte{2, 9, 9, 9, 9, 8}, VIP4: testVIP, VIP6: testVIP6})
		if err != nil {
			l.t.Fatal(err)
		}
		frames, err := r.Announcements()
		if err != nil {
			l.t.Fatal(err)
		}
		l.ports[2].Send(frames[vip])
	}
	for _, tt := range []struct {
		name  string
		cfg   vswitch.Config
		rules []vswitch.Rule
		do    func(*lab)
		want  [3]string
		bpf   []int
	}{
		{name: "good"},
		{name: "good, with short ageing", cfg: vswitch.Config{Ageing: 10 * time.Second}},
		{name: "good, with another node's VM that moves", do: func(l *lab) {
			f := append(slices.Repeat([]byte{0xff}, 6), 2, 0, 0, 0, 1, 9, 0x80, 0x35)
			l.ports[0].Send(append(f, make([]byte, 46)...))
			l.ports[1].Send(append(f, make([]byte, 46)...))
		}},
		{name: "no flooding", rules: []vswitch.Rule{{Name: "noflood", At: vswitch.Egress, Match: toClone, Drop: true}}, want: [3]string{noFlooding.Code, noFlooding.Code, noFlooding.Code}},
		{name: "no flooding at one port", rules: []vswitch.Rule{{Name: "noflood", At: vswitch.Egress, To: "port2", Match: toClone, Drop: true}},
			want: [3]string{noFlooding.Code, noFlooding.Code, noFlooding.Code}},
		{name: "ARP snooping", cfg: vswitch.Config{SnoopARP: true}, do: func(l *lab) { announce(l.t, l.ports[2], id(3)) }, want: [3]string{arpSnooping.Code, arpSnooping.Code, arpSnooping.Code}},
		{name: "RARP leak", do: rarp, want: [3]string{cloneMACLeak.Code + " " + cloneMACLearned.Code, cloneMACLearned.Code, cloneMACLeak.Code + " " + cloneMACLearned.Code}},
		{name: "RARP leak on bpf", do: rarp, bpf: []int{0, 1, 2}, want: [3]string{cloneMACLeak.Code + " " + cloneMACLearned.Code, cloneMACLearned.Code, cloneMACLeak.Code + " " + cloneMACLearned.Code}},
		{name: "beacon filter", rules: []vswitch.Rule{{Name: "group", At: vswitch.Egress, Match: group, Drop: true}}, want: [3]string{multicastFiltered.Code, multicastFiltered.Code, multicastFiltered.Code}},
		{name: "one-way cable", rules: []vswitch.Rule{{Name: "deaf", At: vswitch.Egress, To: "port3", Drop: true}}, want: [3]string{oneWay.Code, oneWay.Code, ""}},
		{name: "MTU mismatch", rules: []vswitch.Rule{{Name: "mtu", At: vswitch.Ingress, Match: func(f []byte) bool { return len(f) > 1414 }, Drop: true}},
			want: [3]string{mtuMismatch.Code, mtuMismatch.Code, mtuMismatch.Code}},
		{name: "duplicates", rules: []vswitch.Rule{{Name: "twice", At: vswitch.Egress, To: "port1", Duplicate: 1}}, want: [3]string{duplicateFrames.Code, "", ""}},
		{name: "a second cluster", do: func(l *lab) {
			other := membership.NewCodec("other", []byte("another key"))
			p := membership.Probe{Peer: membership.Peer{ID: id(9)}, Way: membership.ToAll, CloneMAC: cloneMAC}
			l.ports[1].Send(other.Probe(&p, broadcast))
		}, want: [3]string{secondCluster.Code, "", secondCluster.Code}},
		{name: "the VIP is somebody else's", do: func(l *lab) { conflict(l, 0) }, want: [3]string{vipConflict.Code, vipConflict.Code, ""}},
		{name: "the VIP is somebody else's, on bpf", do: func(l *lab) { conflict(l, 0) }, bpf: []int{0, 1, 2}, want: [3]string{vipConflict.Code, vipConflict.Code, ""}},
		{name: "the IPv6 VIP is somebody else's", do: func(l *lab) { conflict(l, 1) }, want: [3]string{vipConflict.Code, vipConflict.Code, ""}},
		{name: "the IPv6 VIP is somebody else's, on bpf", do: func(l *lab) { conflict(l, 1) }, bpf: []int{0, 1, 2}, want: [3]string{vipConflict.Code, vipConflict.Code, ""}},
		{name: "two DHCP servers", do: func(l *lab) { l.ports[2].Send(dhcp(1)); l.ports[2].Send(dhcp(2)) }, want: [3]string{dhcpServers.Code, dhcpServers.Code, ""}},
		{name: "one DHCP server", do: func(l *lab) { l.ports[2].Send(dhcp(1)); l.ports[2].Send(dhcp(1)) }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			inLab(t, tt.cfg, 3, func(l *lab) {
				for _, r := range tt.rules {
					l.rule(r)
				}
				if tt.do != nil {
					tt.do(l)
				}
				check := func(when string) {
					t.Helper()
					for i := range l.nodes {
						if got := l.found(i); got != tt.want[i] {
							t.Errorf("%s: node %d found %q; want %q\n%+v", when, i+1, got, tt.want[i], l.nodes[i].Examination().Checks)
						}
					}
				}
				time.Sleep(8 * time.Second)
				if tt.name != "one-way cable" { // who is not heard hurries nobody
					check("at boot")
				}
				time.Sleep(4 * Interval)
				check("later")
				if took := l.examine(0); took > 10*time.Second {
					t.Errorf("an examination took %v", took)
				}
				check("when asked")
			}, tt.bpf...)
		})
	}
}

// TestLeakNamed: the finding says what came from the clone MAC, both on a datapath that
// lets the doctor hear it (raw) and on one whose filter drops it before, and counts (bpf).
func TestLeakNamed(t *testing.T) {
	leak := func(etherType uint16) []byte {
		f := append(slices.Repeat([]byte{0xff}, 6), cloneMAC[:]...)
		return append(binary.BigEndian.AppendUint16(f, etherType), make([]byte, 46)...)
	}
	for _, tt := range []struct {
		name   string
		frames []uint16
		want   string
	}{
		{"RARP", []uint16{etherRARP}, "1 frame with the clone MAC as the source came in, the last within ten minutes (a RARP, as hypervisors send it after a migration)"},
		{"RARPs", []uint16{etherRARP, etherRARP, etherRARP}, "3 frames with the clone MAC as the source came in, the last within ten minutes (a RARP,"},
		{"a RARP at last", []uint16{etherARP, etherRARP}, "2 frames with the clone MAC as the source came in, the last within ten minutes (a RARP,"},
		{"ARP", []uint16{etherARP}, "1 frame with the clone MAC as the source came in, the last within ten minutes (an ARP "},
		{"another machine's", nil, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			inLab(t, vswitch.Config{}, 2, func(l *lab) {
				port, err := l.sw.Attach("stranger", vswitch.ReceiverFunc(func([]byte) {}))
				if err != nil {
					t.Fatal(err)
				}
				for _, e := range tt.frames {
					port.Send(leak(e))
				}
				other := leak(etherRARP)
				copy(other[6:], []byte{2, 0, 0, 0, 1, 9})
				port.Send(other)
				time.Sleep(2 * Interval)
				for i, datapath := range []string{"raw", "bpf"} {
					said := ""
					for _, f := range l.board[i].Current() {
						if f.Code == cloneMACLeak.Code {
							said = f.What
						}
					}
					if !strings.HasPrefix(said, tt.want) || (said == "") != (tt.want == "") {
						t.Errorf("on %s: %q; want %q", datapath, said, tt.want)
					}
				}
			}, 1)
		})
	}
}

// TestAsked: who has a VIP and says nothing of it until he is asked, on every datapath,
// is named by all nodes, and forgotten when he has gone.
func TestAsked(t *testing.T) {
	host := [6]byte{2, 9, 9, 9, 9, 8}
	for _, tt := range []struct {
		name string
		mac  [6]byte
		asks func(frame []byte) bool // what is answered
		want string
	}{
		{"a host", host, func([]byte) bool { return true }, vipConflict.Code},
		{"a host, by IPv4", host, func(f []byte) bool { return f[12] == 8 }, vipConflict.Code},
		{"a host, by IPv6", host, func(f []byte) bool { return f[12] == 0x86 }, vipConflict.Code},
		{"a second cluster", cloneMAC, func([]byte) bool { return true }, secondCluster.Code},
		{"nobody", host, func([]byte) bool { return false }, ""},
	} {
		for _, late := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, late %v", tt.name, late), func(t *testing.T) {
				inLab(t, vswitch.Config{}, 3, func(l *lab) {
					if late {
						time.Sleep(4 * Interval)
					}
					answer := func([]byte) {}
					port, err := l.sw.Attach("host", vswitch.ReceiverFunc(func(f []byte) {
						if tt.asks(f) {
							answer(f)
						}
					}))
					if err != nil {
						t.Fatal(err)
					}
					answer = answers(t, port, tt.mac, host)
					if late {
						l.examine(0)
					}
					time.Sleep(2 * Interval)
					for i := range l.nodes {
						if got := l.found(i); got != tt.want {
							t.Errorf("node %d found %q; want %q", i+1, got, tt.want)
						}
						for _, f := range l.board[i].Current() {
							if !strings.Contains(f.What, macText(host)) {
								t.Errorf("node %d: %q does not name %s", i+1, f.What, macText(host))
							}
						}
					}
					port.Cut()
					time.Sleep(remember + 2*Interval)
					for i := range l.nodes {
						if got := l.found(i); got != "" {
							t.Errorf("when he has gone node %d finds %q", i+1, got)
						}
					}
				}, 1, 2)
			})
		}
	}
}

// TestMTUChanged: the MTU of a NIC is looked at again, so that one that is changed while
// the nodes run is told, until it is changed back.
func TestMTUChanged(t *testing.T) {
	inLab(t, vswitch.Config{}, 3, func(l *lab) {
		set := func(mtu int) {
			l.nodes[1].mu.Lock()
			defer l.nodes[1].mu.Unlock()
			l.mtu[1] = mtu
		}
		for _, step := range []struct {
			mtu  int
			want string
		}{{1500, ""}, {1400, mtuMismatch.Code}, {0, mtuMismatch.Code}, {1500, ""}} {
			set(step.mtu)
			l.examine(0)
			for i := range l.nodes {
				if got := l.found(i); got != step.want {
					t.Errorf("with an MTU of %d at one: node %d found %q; want %q", step.mtu, i+1, got, step.want)
				}
			}
		}
	})
}

// TestServedAround: in directed mode the doctor says who directs, and what directed mode
// makes up for is a warning.
func TestServedAround(t *testing.T) {
	inLab(t, vswitch.Config{}, 3, func(l *lab) {
		l.rule(vswitch.Rule{Name: "noflood", At: vswitch.Egress, Match: toClone, Drop: true})
		time.Sleep(8 * time.Second)
		for _, directed := range []bool{false, true, false} {
			var by membership.NodeID
			if directed {
				by = id(1)
			}
			for _, d := range l.nodes {
				d.Direct(by, true)
			}
			time.Sleep(4 * time.Second)
			level, director, mode := finding.Critical, "", "flooded: "
			if directed {
				level, director, mode = finding.Warning, id(1).String(), "directed: "+id(1).String()
			}
			for i, d := range l.nodes {
				e := d.Examination()
				if c := e.Checks[len(e.Checks)-1]; e.Director != director || c.Name != "mode" || c.Verdict != Good || !strings.HasPrefix(c.What, mode) {
					t.Errorf("directed: %v: node %d says %q and %+v; want %q and %q", directed, i+1, e.Director, c, director, mode)
				}
				if f := l.board[i].Current(); l.found(i) != noFlooding.Code || f[0].Level != level {
					t.Errorf("directed: %v: node %d finds %+v; want %s at level %v", directed, i+1, f, noFlooding.Code, level)
				}
			}
		}
	})
}

// TestStormControl: the rate at which a virtual switch stops to flood, and that one
// without a limit gets no finding.
func TestStormControl(t *testing.T) {
	for _, limit := range []int{0, 300, 2000} {
		t.Run(fmt.Sprint(limit), func(t *testing.T) {
			inLab(t, vswitch.Config{}, 3, func(l *lab) {
				if limit > 0 {
					l.rule(vswitch.Rule{Name: "storm", At: vswitch.Ingress, Match: toClone, Spare: limit, Drop: true})
				}
				time.Sleep(4 * time.Second)
				took := l.examine(8000)
				want := ""
				if limit > 0 {
					want = stormControl.Code
				}
				if got := l.found(0); got != want {
					t.Errorf("found %q; want %q: %+v", got, want, l.nodes[0].Examination().Checks)
				}
				limitSaid, tried, known := l.nodes[0].machine.storm.limit()
				t.Logf("a limit of %d is found as %d of %d, in %v", limit, limitSaid, tried, took)
				if !known || limit > 0 && (limitSaid < limit/2 || limitSaid > 2*limit) || took > 15*time.Second {
					t.Errorf("a limit of %d is found as %d (%v), in %v", limit, limitSaid, known, took)
				}
			})
		})
	}
}

func FuzzHear(f *testing.F) {
	codec := membership.NewCodec("test", []byte("k"))
	p := membership.Probe{Peer: membership.Peer{ID: id(2), Incarnation: 1}, Way: membership.ToAll, Rows: []membership.Row{{Of: 1, Round: 1}}}
	f.Add(codec.Probe(&p, broadcast))
	f.Add(append(slices.Repeat([]byte{0xff}, 6), cloneMAC[:]...))
	f.Add(binary.BigEndian.AppendUint64(append(slices.Repeat([]byte{0xff}, 6), 2, 0, 0, 0, 0, 1), 0x0806_0001_0800_0604))
	f.Add(dhcp(1)[14:])
	f.Add([]byte{})
	now := int64(1)
	d := NewDoctor(Options{
		Config: Config{CloneMAC: cloneMAC, MTU: 1500}, Codec: codec, VIPs: testVIPs, Now: func() int64 { now += 1e6; return now },
		Self: func() membership.Peer { return membership.Peer{ID: id(1), Incarnation: 1} }, Members: func() map[membership.NodeID]bool { return nil },
		Board: finding.NewBoard(nil),
	})
	f.Fuzz(func(t *testing.T, frame []byte) {
		d.Hear(frame)
		d.HearIPv4(frame)
		m := d.machine
		if len(m.strangers) > mostKept || len(m.claims) > mostKept || len(m.servers) > mostKept || len(m.nodes) > membership.MaxNodes {
			t.Error("what anybody can make it remember has no bound")
		}
		m.Checks(now)
	})
}
