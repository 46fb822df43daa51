package vswitch

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// host is an in-process port whose frames are kept.
type host struct {
	*Port
	got chan string
}

func attach(t *testing.T, s *Switch, name string) *host {
	t.Helper()
	h := &host{got: make(chan string, 10000)}
	p, err := s.Attach(name, ReceiverFunc(func(f []byte) { h.got <- string(f) }))
	if err != nil {
		t.Fatal(err)
	}
	h.Port = p
	return h
}

// bed is a switch in a bubble of fake time with the hosts a, b and c.
type bed struct {
	*Switch
	a, b, c *host
}

func inBed(t *testing.T, cfg Config, f func(t *testing.T, s *bed)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		s, err := New(cfg)
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		f(t, &bed{s, attach(t, s, "a"), attach(t, s, "b"), attach(t, s, "c")})
	})
}

// take returns the payloads that a host has got, after everything has settled.
func (h *host) take() []string {
	synctest.Wait()
	var got []string
	for len(h.got) > 0 {
		got = append(got, (<-h.got)[headerLen:])
	}
	return got
}

func want(t *testing.T, what string, got []string, want ...string) {
	t.Helper()
	if !slices.Equal(got, want) {
		t.Errorf("%s got %q; want %q", what, got, want)
	}
}

func TestSwitching(t *testing.T) {
	inBed(t, Config{}, func(t *testing.T, s *bed) {
		s.a.Send(eth(macB, macA, "flood"))
		want(t, "b", s.b.take(), "flood")
		want(t, "c", s.c.take(), "flood")
		s.b.Send(eth(macA, macB, "answer"))
		s.a.Send(eth(macB, macA, "direct"))
		want(t, "a", s.a.take(), "answer")
		want(t, "b", s.b.take(), "direct")
		want(t, "c", s.c.take())
		st := s.Stats()
		if st.Received != 3 || st.Unknown != 1 || st.Forwarded != 2 {
			t.Errorf("stats = %+v; want 3 received, 1 unknown, 2 forwarded", st)
		}
		table := s.Table()
		if len(table) != 2 || table[0].Port != "a" || table[1].Port != "b" || mac(table[1].MAC) != macB {
			t.Errorf("table = %+v; want A on a, B on b", table)
		}
		if p := s.a.Stats(); p.RxFrames != 2 || p.RxFlooded != 1 || p.TxFrames != 1 {
			t.Errorf("stats of a = %+v; want rx 2, flooded 1, tx 1", p)
		}
	})
}

func TestAgeingAndMoves(t *testing.T) {
	inBed(t, Config{Ageing: time.Minute}, func(t *testing.T, s *bed) {
		s.a.Send(eth(broadcast, macA, ""))
		s.b.Send(eth(broadcast, macA, ""))
		if table := s.Table(); len(table) != 1 || table[0].Port != "b" || table[0].Moves != 1 || s.Stats().Moves != 1 {
			t.Errorf("table = %+v; want A on b after 1 move", table)
		}
		time.Sleep(59 * time.Second)
		if table := s.Table(); len(table) != 1 || table[0].Age != 59*time.Second {
			t.Errorf("table = %+v; want A aged 59s", table)
		}
		time.Sleep(time.Second)
		if table := s.Table(); len(table) != 0 {
			t.Errorf("table = %+v; want it empty", table)
		}
	})
}

func TestGuard(t *testing.T) {
	inBed(t, Config{Guard: []net.HardwareAddr{macClone[:]}}, func(t *testing.T, s *bed) {
		s.a.Send(eth(macClone, macA, "to the cluster"))
		want(t, "b", s.b.take(), "to the cluster")
		if st := s.Stats(); st.GuardFloods != 1 || st.Violations != 0 {
			t.Errorf("stats = %+v; want 1 guard flood and no violation", st)
		}
		s.c.take()
		s.b.Send(eth(broadcast, macClone, "leak"))
		want(t, "c", s.c.take(), "leak") // still switched
		if port, ok := s.Lookup(macClone[:]); port != "b" || !ok {
			t.Errorf("Lookup(clone) = %q, %v; want it learnt on b as a real switch would", port, ok)
		}
		s.b.Cut()
		s.b.Send(eth(broadcast, macClone, "leak into a cut cable"))
		vs := s.Violations()
		if len(vs) != 2 || vs[0].Port != "b" || !strings.Contains(vs[0].String(), "port b: 02:cc:0a:4d:00:0a > ff:ff:ff:ff:ff:ff") {
			t.Fatalf("violations = %v; want 2 from port b", vs)
		}
		rec := &recorder{}
		s.FailOnViolation(rec)
		rec.cleanup()
		if len(rec.errors) != 2 {
			t.Errorf("FailOnViolation reported %q; want 2 errors", rec.errors)
		}
	})
}

type recorder struct {
	cleanup func()
	errors  []string
}

func (r *recorder) Helper()                   {}
func (r *recorder) Cleanup(f func())          { r.cleanup = f }
func (r *recorder) Errorf(f string, a ...any) { r.errors = append(r.errors, fmt.Sprintf(f, a...)) }

func TestCutAndRestore(t *testing.T) {
	inBed(t, Config{}, func(t *testing.T, s *bed) {
		s.a.Send(eth(broadcast, macA, "1"))
		s.b.take()
		s.a.Cut()
		if _, ok := s.Lookup(macA[:]); ok {
			t.Error("an address stayed in the table after its cable was cut")
		}
		s.a.Send(eth(broadcast, macA, "2"))
		s.b.Send(eth(macA, macB, "3"))
		want(t, "a, cut,", s.a.take())
		want(t, "b", s.b.take())
		want(t, "c", s.c.take(), "1", "3")
		s.a.Restore()
		s.a.Send(eth(broadcast, macA, "4"))
		s.b.Send(eth(macA, macB, "5"))
		want(t, "a, restored,", s.a.take(), "5")
		want(t, "b", s.b.take(), "4")
		if st := s.a.Stats(); st.RxDropped != 1 || st.TxLinkDown != 1 {
			t.Errorf("stats of a = %+v; want 1 dropped each way", st)
		}
	})
}

func TestLengths(t *testing.T) {
	inBed(t, Config{MaxFrame: 100}, func(t *testing.T, s *bed) {
		s.a.Send(eth(broadcast, macA, strings.Repeat("x", 87)))
		s.a.Send(eth(broadcast, macA, "")[:13])
		s.a.Send(nil)
		want(t, "b", s.b.take())
		s.a.Send(eth(broadcast, macA, strings.Repeat("x", 86)))
		if got := s.b.take(); len(got) != 1 {
			t.Errorf("b got %d frames of the maximal length; want 1", len(got))
		}
		if st := s.Stats(); st.Malformed != 3 || st.Received != 4 {
			t.Errorf("stats = %+v; want 3 malformed of 4", st)
		}
	})
}

func TestRules(t *testing.T) {
	for _, tt := range []struct {
		name  string
		rules []Rule
		b, c  []string
		table int
	}{
		{"drop on the way in teaches nothing", []Rule{{At: Ingress, From: "a", Drop: true}}, nil, nil, 0},
		{"drop one copy of a flood", []Rule{{At: Egress, To: "b", Drop: true}}, nil, []string{"1", "2", "3"}, 1},
		{"match", []Rule{{At: Ingress, Match: payload("2"), Drop: true}}, []string{"1", "3"}, []string{"1", "3"}, 1},
		{"limit", []Rule{{At: Egress, To: "b", Drop: true, Limit: 2}}, []string{"3"}, []string{"1", "2", "3"}, 1},
		{"duplicate out", []Rule{{At: Egress, To: "c", Duplicate: 1}}, []string{"1", "2", "3"}, []string{"1", "1", "2", "2", "3", "3"}, 1},
		{"duplicate in", []Rule{{At: Ingress, Match: payload("1"), Duplicate: 2}}, []string{"1", "1", "1", "2", "3"}, []string{"1", "1", "1", "2", "3"}, 1},
		{"an exempting rule comes first", []Rule{{At: Egress, Match: payload("2")}, {At: Egress, To: "b", Drop: true}}, []string{"2"}, []string{"1", "2", "3"}, 1},
		{"other port", []Rule{{At: Ingress, From: "b", Drop: true}}, []string{"1", "2", "3"}, []string{"1", "2", "3"}, 1},
		{"delay keeps order", []Rule{{At: Egress, To: "b", Delay: time.Millisecond}}, []string{"1", "2", "3"}, []string{"1", "2", "3"}, 1},
		{"delay reorders", []Rule{{At: Ingress, Match: payload("1"), Delay: time.Millisecond}}, []string{"2", "3", "1"}, []string{"2", "3", "1"}, 1},
	} {
		t.Run(tt.name, func(t *testing.T) {
			inBed(t, Config{}, func(t *testing.T, s *bed) {
				for _, r := range tt.rules {
					remove, err := s.AddRule(r)
					if err != nil {
						t.Fatal(err)
					}
					defer remove()
				}
				for _, p := range []string{"1", "2", "3"} {
					s.a.Send(eth(broadcast, macA, p))
				}
				time.Sleep(time.Second)
				want(t, "b", s.b.take(), tt.b...)
				want(t, "c", s.c.take(), tt.c...)
				if n := len(s.Table()); n != tt.table {
					t.Errorf("table has %d entries; want %d", n, tt.table)
				}
			})
		})
	}
}

func payload(p string) func([]byte) bool {
	return func(f []byte) bool { return string(f[headerLen:]) == p }
}

func TestDelayIsKept(t *testing.T) {
	inBed(t, Config{}, func(t *testing.T, s *bed) {
		remove, err := s.AddRule(Rule{At: Egress, To: "b", Delay: 50 * time.Millisecond})
		if err != nil {
			t.Fatal(err)
		}
		s.a.Send(eth(broadcast, macA, "late"))
		time.Sleep(49 * time.Millisecond)
		want(t, "b, early,", s.b.take())
		time.Sleep(time.Millisecond)
		want(t, "b, in time,", s.b.take(), "late")
		remove()
		s.a.Send(eth(broadcast, macA, "now"))
		want(t, "b", s.b.take(), "now")
	})
}

func TestRandomnessIsSeeded(t *testing.T) {
	run := func(seed uint64) (got []string) {
		inBed(t, Config{Seed: seed}, func(t *testing.T, s *bed) {
			if _, err := s.AddRule(Rule{Name: "loss", At: Egress, To: "b", Drop: true, Probability: 0.5}); err != nil {
				t.Fatal(err)
			}
			for i := range 200 {
				s.a.Send(eth(broadcast, macA, fmt.Sprint(i)))
			}
			got = s.b.take()
		})
		return got
	}
	one, again, other := run(1), run(1), run(2)
	if !slices.Equal(one, again) {
		t.Error("the same seed gave different losses")
	}
	if slices.Equal(one, other) {
		t.Error("different seeds gave the same losses")
	}
	if len(one) < 50 || len(one) > 150 {
		t.Errorf("%d of 200 frames passed a loss of 0.5", len(one))
	}
}

func TestSpare(t *testing.T) {
	inBed(t, Config{}, func(t *testing.T, s *bed) {
		if _, err := s.AddRule(Rule{Name: "storm", At: Ingress, Spare: 2, Drop: true}); err != nil {
			t.Fatal(err)
		}
		for range 2 {
			for _, text := range []string{"1", "2", "3", "4"} {
				s.a.Send(eth(macB, macA, text))
			}
			want(t, "b", s.b.take(), "1", "2")
			time.Sleep(time.Second)
		}
	})
}

func TestSnoopARP(t *testing.T) {
	for _, snoop := range []bool{false, true} {
		inBed(t, Config{SnoopARP: snoop}, func(t *testing.T, s *bed) {
			announcement := append([]byte("\x00\x01\x08\x00\x06\x04\x00\x02"), macC[:]...)
			f := append(append(append(broadcast[:], macA[:]...), 8, 6), append(announcement, make([]byte, 14)...)...)
			s.a.Send(f)
			if port, ok := s.Lookup(macC[:]); ok != snoop || ok && port != "a" {
				t.Errorf("snooping %v: what ARP says is learned at %q (%v)", snoop, port, ok)
			}
		})
	}
}

func TestRuleValidate(t *testing.T) {
	for _, r := range []Rule{
		{}, {At: Ingress, To: "b"}, {At: Egress, Probability: 1.1}, {At: Egress, Probability: -1},
		{At: Egress, Delay: -1}, {At: Egress, Duplicate: 1001}, {At: 3},
	} {
		if r.Validate() == nil {
			t.Errorf("Validate(%+v) = nil; want an error", r)
		}
	}
}

// A port whose host does not read must cost the others nothing.
func TestSlowPort(t *testing.T) {
	inBed(t, Config{Queue: 4}, func(t *testing.T, s *bed) {
		block := make(chan struct{})
		slow, err := s.Attach("slow", ReceiverFunc(func([]byte) { <-block }))
		if err != nil {
			t.Fatal(err)
		}
		for range 100 {
			s.a.Send(eth(broadcast, macA, "x"))
			if got := s.b.take(); len(got) != 1 {
				t.Fatalf("b got %d frames; want 1 at once", len(got))
			}
		}
		if st := slow.Stats(); st.TxDropped != 95 || st.TxFrames != 5 {
			t.Errorf("stats of the slow port = %+v; want 5 queued (one of them in its hands), 95 dropped", st)
		}
		close(block)
	})
}

func TestWaitFrame(t *testing.T) {
	inBed(t, Config{}, func(t *testing.T, s *bed) {
		go func() {
			synctest.Wait()
			s.a.Send(eth(broadcast, macA, "no"))
			s.b.Send(eth(broadcast, macB, "yes"))
		}()
		f, err := s.WaitFrame(t.Context(), func(f Frame) bool { return payload("yes")(f.Data) })
		if err != nil || f.Port != "b" || !payload("yes")(f.Data) {
			t.Errorf("WaitFrame = %+v, %v; want the frame from b", f, err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := s.WaitFrame(ctx, func(Frame) bool { return true }); err == nil {
			t.Error("WaitFrame without a frame succeeded")
		}
	})
}

// guest is QEMU's end of a stream socket.
type guest struct {
	net.Conn
	t *testing.T
}

func connect(t *testing.T, p *Port) *guest {
	t.Helper()
	c, err := net.Dial("unix", p.Socket())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(30 * time.Second))
	return &guest{c, t}
}

func stream(frame []byte) []byte {
	return append(binary.BigEndian.AppendUint32(nil, uint32(len(frame))), frame...)
}

func (g *guest) read() string {
	g.t.Helper()
	b, err := readFrame(g.Conn)
	if err != nil {
		g.t.Fatal(err)
	}
	return string(b.frame()[headerLen:])
}

// sockets is a switch with a socket port and an in-process port.
func sockets(t *testing.T, cfg Config) (s *Switch, p *Port, h *host) {
	t.Helper()
	s, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	p, err = s.Listen("vm", filepath.Join(t.TempDir(), "s"))
	if err != nil {
		t.Fatal(err)
	}
	return s, p, attach(t, s, "host")
}

// TestAcceptGoesOn lets accept fail for a while, as when the process has no
// descriptor left.
func TestAcceptGoesOn(t *testing.T) {
	told := make(chan string, 1)
	s, p, h := sockets(t, Config{Log: slog.New(slog.NewTextHandler(writerFunc(func(b []byte) {
		if strings.Contains(string(b), "accepting on a switch port") {
			told <- string(b) // once: a second one would block, and be noticed
		}
	}), nil))})
	if err := p.ln.SetDeadline(time.Unix(1, 0)); err != nil {
		t.Fatal(err)
	}
	if line := <-told; !strings.Contains(line, "port=vm") {
		t.Errorf("told %q", line)
	}
	if err := p.ln.SetDeadline(time.Time{}); err != nil {
		t.Fatal(err)
	}
	c, err := net.Dial("unix", p.Socket())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	f := eth(macB, macA, "after the failure")
	if _, err := c.Write(append(binary.BigEndian.AppendUint32(nil, uint32(len(f))), f...)); err != nil {
		t.Fatal(err)
	}
	want(t, "host", []string{h.next(t)}, "after the failure")
	// A switch that is closed meanwhile does not wait for a retry.
	if err := p.ln.SetDeadline(time.Unix(1, 0)); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
}

type writerFunc func([]byte)

func (f writerFunc) Write(b []byte) (int, error) { f(b); return len(b), nil }

func (h *host) next(t *testing.T) string {
	t.Helper()
	select {
	case f := <-h.got:
		return f[headerLen:]
	case <-time.After(30 * time.Second):
		t.Fatal("no frame in 30 s")
		return ""
	}
}

func TestStream(t *testing.T) {
	s, p, h := sockets(t, Config{})
	g := connect(t, p)
	// In pieces, and two in one write.
	one, two := stream(eth(broadcast, macA, "one")), stream(eth(broadcast, macA, "two"))
	for _, b := range one {
		g.Write([]byte{b})
	}
	g.Write(append(two, stream(eth(broadcast, macA, "three"))...))
	for _, w := range []string{"one", "two", "three"} {
		if got := h.next(t); got != w {
			t.Errorf("host got %q; want %q", got, w)
		}
	}
	for i := range 100 {
		h.Send(eth(macA, macB, fmt.Sprint(i)))
	}
	for i := range 100 {
		if got := g.read(); got != fmt.Sprint(i) {
			t.Fatalf("guest got %q; want %d", got, i)
		}
	}
	if st := s.Stats(); st.Forwarded != 100 {
		t.Errorf("stats = %+v; want 100 forwarded", st)
	}
}

func TestReconnect(t *testing.T) {
	s, p, h := sockets(t, Config{})
	for i := range 3 {
		g := connect(t, p)
		g.Write(stream(eth(broadcast, macA, fmt.Sprint(i))))
		if got := h.next(t); got != fmt.Sprint(i) {
			t.Errorf("host got %q; want %d", got, i)
		}
		if i == 2 {
			h.Send(eth(macA, macB, "hello"))
			if got := g.read(); got != "hello" {
				t.Errorf("guest got %q; want hello", got)
			}
		}
		g.Close()
	}
	if st := p.Stats(); st.Connects != 3 || st.ProtocolErrors != 0 {
		t.Errorf("stats = %+v; want 3 connects", st)
	}
	_ = s
}

func TestHostileStreams(t *testing.T) {
	for _, tt := range []struct {
		name   string
		bytes  []byte
		errors uint64
	}{
		{"length of 4 GiB", []byte{0xff, 0xff, 0xff, 0xff}, 1},
		{"length just over the limit", binary.BigEndian.AppendUint32(nil, maxStream+1), 1},
		{"half a length", []byte{0, 0}, 0},
		{"half a frame", stream(eth(broadcast, macA, "lost"))[:10], 0},
		{"zero length, then half a frame", append([]byte{0, 0, 0, 0}, 0, 0, 0, 14, 1), 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, p, h := sockets(t, Config{})
			g := connect(t, p)
			g.Write(tt.bytes)
			if tt.errors > 0 {
				if _, err := io.ReadAll(g); err != nil {
					t.Errorf("the switch did not hang up: %v", err)
				}
			}
			g.Close()
			// The port lives on.
			g = connect(t, p)
			g.Write(stream(eth(broadcast, macA, "alive")))
			if got := h.next(t); got != "alive" {
				t.Errorf("host got %q; want alive", got)
			}
			if st := p.Stats(); st.ProtocolErrors != tt.errors {
				t.Errorf("stats = %+v; want %d protocol errors", st, tt.errors)
			}
		})
	}
}

// A guest that does not read (a stopped QEMU) must not block the others, nor
// Close.
func TestStalledGuest(t *testing.T) {
	s, p, h := sockets(t, Config{Queue: 8})
	g := connect(t, p)
	g.Write(stream(eth(broadcast, macA, "here")))
	h.next(t)
	other := attach(t, s, "other")
	frame := eth(broadcast, macB, strings.Repeat("x", 1400))
	for p.Stats().TxDropped == 0 {
		h.Send(frame)
		other.next(t)
	}
	done := make(chan error)
	go func() { done <- s.Close() }()
	select {
	case err := <-done:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(30 * time.Second):
		t.Fatal("Close hangs on a stalled guest")
	}
	g.Close()
}

func TestListenPathTooLong(t *testing.T) {
	s, err := New(Config{})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if _, err := s.Listen("vm", "/tmp/"+strings.Repeat("x", 103)); err == nil || !strings.Contains(err.Error(), "longer than 107") {
		t.Errorf("Listen = %v; want an error that names the limit", err)
	}
}

func TestMirrorTshark(t *testing.T) {
	if _, err := exec.LookPath("tshark"); err != nil {
		t.Skip("tshark is not installed (apt-get install tshark)")
	}
	file := filepath.Join(t.TempDir(), "m.pcapng")
	f, err := os.Create(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	s, p, h := sockets(t, Config{
		Mirror: f,
		Guard:  []net.HardwareAddr{macClone[:]},
		Now:    func() time.Time { return time.Unix(1700000000, 123456789) },
	})
	g := connect(t, p)
	g.Write(stream(eth(broadcast, macA, "x")))
	h.next(t)
	h.Send(eth(macA, macB, "odd length"))
	late := attach(t, s, "late")
	late.Send(eth(macA, macClone, "leak"))
	late.Send(make([]byte, 2000)) // too long: did not cross
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command("tshark", "-n", "-r", file, "-T", "fields", "-e", "frame.interface_name",
		"-e", "eth.src", "-e", "frame.len", "-e", "frame.time_epoch", "-e", "frame.comment").Output()
	if err != nil {
		t.Fatal(err)
	}
	wantOut := "vm\t52:54:00:77:00:01\t15\t1700000000.123456789\t\n" +
		"host\t52:54:00:77:00:02\t24\t1700000000.123456789\t\n" +
		"late\t02:cc:0a:4d:00:0a\t18\t1700000000.123456789\tI1 violation: guarded address as source\n"
	if string(out) != wantOut {
		t.Errorf("tshark read\n%swant\n%s", out, wantOut)
	}
}

type brokenWriter struct{}

func (brokenWriter) Write([]byte) (int, error) { return 0, io.ErrShortWrite }

func TestMirrorErrorIsReported(t *testing.T) {
	s, err := New(Config{Mirror: brokenWriter{}})
	if err != nil {
		t.Fatal(err)
	}
	a, b := attach(t, s, "a"), attach(t, s, "b")
	a.Send(eth(broadcast, macA, "x"))
	b.next(t) // switching goes on
	if err := s.Close(); err == nil {
		t.Error("Close = nil; want the mirror's error")
	}
}

func TestDescribe(t *testing.T) {
	arp := func(op byte, spa, tpa byte) []byte {
		f := eth(broadcast, macA, "")
		f[12], f[13] = 8, 6
		f = append(f, 0, 1, 8, 0, 6, 4, 0, op)
		f = append(append(f, macClone[:]...), 10, 77, 0, spa)
		return append(f, 0, 0, 0, 0, 0, 0, 10, 77, 0, tpa)
	}
	const head = "52:54:00:77:00:01 > ff:ff:ff:ff:ff:ff "
	for _, tt := range []struct {
		frame []byte
		want  string
	}{
		{arp(1, 10, 1), head + "ARP who-has 10.77.0.1 tell 10.77.0.10 at 02:cc:0a:4d:00:0a"},
		{arp(1, 10, 10), head + "ARP announce 10.77.0.10 at 02:cc:0a:4d:00:0a"},
		{arp(2, 10, 1), head + "ARP 10.77.0.10 is-at 02:cc:0a:4d:00:0a"},
		{eth(broadcast, macA, "x"), head + "type 0x88b5 len 15"},
		{[]byte{1, 2}, "runt of 2 bytes 01 02"},
	} {
		if got := Describe(tt.frame); got != tt.want {
			t.Errorf("Describe = %q; want %q", got, tt.want)
		}
	}
}

func FuzzDescribe(f *testing.F) {
	f.Add([]byte{})
	f.Add(eth(broadcast, macA, "x"))
	f.Add(append(eth(broadcast, macA, "")[:12], 0x86, 0xdd, 0x60, 0, 0, 0, 0, 8, 58, 255))
	f.Add(append(eth(broadcast, macA, "")[:12], 8, 6, 0, 1, 8, 0, 128, 4, 0, 1))
	f.Fuzz(func(t *testing.T, frame []byte) {
		if s := Describe(frame); s == "" || strings.Contains(s, "\n") {
			t.Errorf("Describe(% x) = %q; want one line", frame, s)
		}
	})
}

func FuzzReadFrame(f *testing.F) {
	f.Add(stream(eth(broadcast, macA, "x")))
	f.Add([]byte{0, 0, 0, 0, 0, 1, 0x10, 1})
	f.Add([]byte{0xff, 0xff, 0xff, 0xff})
	f.Fuzz(func(t *testing.T, in []byte) {
		r := bytes.NewReader(in)
		var back []byte
		for {
			b, err := readFrame(r)
			if err != nil {
				break
			}
			back = append(back, b.data...)
			b.release()
		}
		if !bytes.HasPrefix(in, back) {
			t.Errorf("frames read from % x do not give it back: % x", in, back)
		}
	})
}

func FuzzSwitch(f *testing.F) {
	f.Add(eth(macB, macA, "x"), uint8(0))
	f.Add(eth(macClone, macClone, "x"), uint8(1))
	f.Fuzz(func(t *testing.T, frame []byte, in uint8) {
		s, err := New(Config{Guard: []net.HardwareAddr{macClone[:]}, MaxEntries: 4})
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		ps := []*host{attach(t, s, "a"), attach(t, s, "b")}
		ps[in%2].Send(frame)
		st := s.Stats()
		if sum := st.Forwarded + st.Filtered + st.Unknown + st.Broadcast + st.Multicast + st.Reserved + st.Malformed + st.RuleDrop + st.LinkDown; sum != st.Received {
			t.Errorf("stats %+v: fates add up to %d, not to Received", st, sum)
		}
	})
}

// BenchmarkForward is one frame through the switch to an in-process port.
func BenchmarkForward(b *testing.B) {
	s, err := New(Config{Guard: []net.HardwareAddr{macClone[:]}})
	if err != nil {
		b.Fatal(err)
	}
	defer s.Close()
	sem := make(chan struct{}, 256)
	if _, err := s.Attach("b", ReceiverFunc(func([]byte) { <-sem })); err != nil {
		b.Fatal(err)
	}
	a, err := s.Attach("a", ReceiverFunc(func([]byte) {}))
	if err != nil {
		b.Fatal(err)
	}
	frame := eth(broadcast, macA, strings.Repeat("x", 1486))
	b.SetBytes(int64(len(frame)))
	b.ReportAllocs()
	for b.Loop() {
		sem <- struct{}{}
		a.Send(frame)
	}
}
