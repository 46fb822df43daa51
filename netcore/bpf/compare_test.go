package bpf

import (
	"bufio"
	"encoding/hex"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"clonecluster/netcore/filter"
)

// testNow is the time of every frame here.
const testNow = int64(1_000_000 * time.Second)

// testConfig is that of filter's cases.
func testConfig(patient bool) filter.Config {
	cfg := filter.Config{
		CloneMAC: [6]byte{0x02, 0xcc, 0x0a, 0x4d, 0x00, 0x0a}, VIP4: netip.MustParseAddr("10.77.0.10"), VIP6: netip.MustParseAddr("fd77::10"),
		HashKey: [16]byte{1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16},
	}
	for _, proto := range []uint8{filter.ProtoTCP, filter.ProtoUDP} {
		for _, port := range []uint16{7, 45000} {
			cfg.Rules = append(cfg.Rules, filter.Rule{Proto: proto, PortLo: port, PortHi: port, Disabled: true})
		}
	}
	if patient {
		cfg.ResetPatience = time.Second
	}
	return cfg
}

// vector is a line of filter's testdata/frames.txt.
type vector struct {
	name                  string
	out                   bool
	state                 filter.State
	sockets               asked
	fenced, held, patient bool
	want                  string
	frame                 []byte
}

func vectors(tb testing.TB) (all []vector) {
	tb.Helper()
	file, err := os.Open("../filter/testdata/frames.txt")
	if err != nil {
		tb.Fatal(err)
	}
	defer file.Close()
	states := map[string]filter.State{"foreign": filter.Foreign, "settled": filter.Settled, "shared": filter.Shared, "draining": filter.Draining}
	sockets := map[string]asked{"-": askNobody, "none": sayNone, "listener": sayListener, "established": sayEstablished}
	lines := bufio.NewScanner(file)
	for lines.Scan() {
		f := strings.SplitN(lines.Text(), " ", 9)
		frame, err := hex.DecodeString(strings.TrimPrefix(f[7], "0x"))
		if err != nil || len(f) != 9 {
			tb.Fatalf("%q: %v", lines.Text(), err)
		}
		all = append(all, vector{
			name: f[8], out: f[0] == "out", state: states[f[1]], sockets: sockets[f[2]],
			fenced: f[3] != "-", held: f[4] != "-", patient: f[5] != "-", want: f[6], frame: frame,
		})
	}
	if err := lines.Err(); err != nil || len(all) < 500 {
		tb.Fatalf("%d cases: %v", len(all), err)
	}
	return all
}

// twins are the two filters in the same state, with one socket table.
type twins struct {
	config filter.Config
	kernel *Filter
	user   *filter.Filter
	table  sockets
	ask    bool
}

// sockets is a socket table that says the same of all.
type sockets struct{ state filter.SocketState }

func (s sockets) Lookup(filter.Tuple) filter.SocketState { return s.state }

func newTwins(tb testing.TB, cfg filter.Config, says asked) *twins {
	tb.Helper()
	t := &twins{config: cfg, ask: says != askNobody}
	if t.ask {
		t.table = sockets{filter.SocketState(says - sayNone)}
	}
	var err error
	if t.user, err = filter.New(cfg); err != nil {
		tb.Fatal(err)
	}
	t.kernel = load(tb, Options{Filter: cfg, now: testNow, sockets: says})
	return t
}

// load puts the programs into the kernel, or skips the test.
func load(tb testing.TB, opt Options) *Filter {
	tb.Helper()
	if os.Geteuid() != 0 {
		tb.Skip("needs root, to load BPF programs")
	}
	f, err := Load(opt)
	if err != nil {
		if errors.Is(err, ebpf.ErrNotSupported) || errors.Is(err, unix.EPERM) {
			tb.Skipf("needs a kernel that lets root load BPF programs: %v", err)
		}
		var v *ebpf.VerifierError
		if errors.As(err, &v) {
			tb.Fatalf("%-20v", v)
		}
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		if err := f.Close(); err != nil {
			tb.Error(err)
		}
	})
	return f
}

// set brings both into a state; what was held before is not.
func (t *twins) set(state filter.State, fenced, held bool) error {
	var table filter.Table
	for b := range table {
		table[b] = state
	}
	lease := int64(1e18)
	if fenced {
		lease = testNow
	}
	user, err := filter.New(t.config)
	if err != nil {
		return err
	}
	t.user = user
	t.user.SetTable(&table, 0)
	t.user.SetLease(lease)
	t.kernel.shared.HeldTCP, t.kernel.shared.HeldDatagram = [filter.Buckets]int64{}, [filter.Buckets]int64{}
	t.kernel.shared.Quarantine, t.kernel.shared.Resets = [filter.Buckets]int64{}, [len(t.kernel.shared.Resets)]uint64{}
	t.kernel.SetTable(&table, 0)
	t.kernel.SetLease(lease)
	if held {
		for b := range filter.Buckets {
			t.user.HoldAll(b, testNow)
			t.kernel.shared.HeldTCP[b] = testNow + filter.HoldTCP
			t.kernel.shared.HeldDatagram[b] = testNow + filter.HoldDatagram
		}
	}
	return nil
}

// errTooShort is what the kernel says of a frame that it does not run: it looks at the
// IP header itself.
var errTooShort = errors.New("too short for the kernel")

// verdict gives the kernel's verdict, which is the counter that went up, and whether the frame
// goes on.
func (t *twins) verdict(program *ebpf.Program, frame []byte) (_ filter.Verdict, passes bool, _ error) {
	before := t.kernel.Counters()
	returned, err := program.Run(&ebpf.RunOptions{Data: frame, DataOut: make([]byte, len(frame)+256)})
	if errors.Is(err, unix.EINVAL) && len(frame) < shortest(frame) {
		return 0, false, errTooShort
	} else if err != nil {
		return 0, false, fmt.Errorf("running %v on %d bytes: %w", program, len(frame), err)
	}
	const xdpPass, actUnspec = 2, 0xffffffff // linux/bpf.h, linux/pkt_cls.h
	if passes = returned == actUnspec; program.Type() == ebpf.XDP {
		passes = returned == xdpPass
	}
	after := t.kernel.Counters()
	given := filter.Verdict(0)
	for v := range after {
		switch after[v] - before[v] {
		case 0:
		case 1:
			if given == 0 {
				given = filter.Verdict(v)
				continue
			}
			fallthrough
		default:
			return 0, false, fmt.Errorf("several verdicts: %v, then %v", before, after)
		}
	}
	return given, passes, nil
}

// goesOn tells whether a frame with that verdict is the kernel's to see: also what is none of
// the cluster's, unless it is for the clone MAC, which nobody else has but who asks by probes.
func (t *twins) goesOn(v filter.Verdict, frame []byte, out bool) bool {
	switch {
	case out:
		return v.Send()
	case v.Accept() || v == filter.AnswerNeighbor:
		return true
	case len(frame) >= 14 && [6]byte(frame) == t.config.CloneMAC:
		for len(frame) >= 18 && (frame[12] == 0x81 && frame[13] == 0 || frame[12] == 0x88 && frame[13] == 0xa8) {
			frame = slices.Concat(frame[:12], frame[16:])
		}
		return v == filter.DropNotOurs && frame[12] == 0x88 && frame[13] == 0xb5
	}
	return v == filter.DropNotOurs || v == filter.DropVLAN || v == filter.DropMalformed || v == filter.DropOversized
}

// shortest is how long a frame has to be, to be run by tc.
func shortest(frame []byte) int {
	switch {
	case len(frame) < 14:
		return 14
	case frame[12] == 0x08 && frame[13] == 0x00:
		return 14 + 20
	case frame[12] == 0x86 && frame[13] == 0xdd:
		return 14 + 40
	}
	return 15
}

// longest is what tc can be given; XDP takes more, in several buffers.
const longest = 2000

// compare gives one frame to the Go filter and to the programs.
func (t *twins) compare(frame []byte, out bool) (want filter.Verdict, err error) {
	programs := map[string]*ebpf.Program{"XDP": t.kernel.objects.IngressXdp, "tc": t.kernel.objects.IngressTc}
	var s filter.Sockets
	if t.ask {
		s = t.table
	}
	if out {
		if len(frame) > longest { // which only one of the two would remember
			return 0, nil
		}
		want = t.user.Egress(frame, testNow)
		programs = map[string]*ebpf.Program{"tc": t.kernel.objects.EgressTc}
	} else {
		want = t.user.Ingress(frame, testNow, s)
	}
	if len(frame) > longest {
		delete(programs, "tc")
	}
	for attachment, program := range programs {
		if got, passes, err := t.verdict(program, frame); errors.Is(err, errTooShort) {
			continue
		} else if err != nil {
			return want, err
		} else if goesOn := t.goesOn(want, frame, out); got != want || passes != goesOn {
			return want, fmt.Errorf("%s says %v, goes on %v; want %v, %v", attachment, got, passes, want, goesOn)
		}
	}
	return want, nil
}

// TestVectors: every case of the Go filter has the same verdict in the kernel.
func TestVectors(t *testing.T) {
	type kind struct {
		patient bool
		sockets asked
	}
	made := map[kind]*twins{}
	for _, v := range vectors(t) {
		k := kind{v.patient, v.sockets}
		if made[k] == nil {
			made[k] = newTwins(t, testConfig(v.patient), v.sockets)
		}
		if err := made[k].set(v.state, v.fenced, v.held); err != nil {
			t.Fatal(err)
		}
		want, err := made[k].compare(v.frame, v.out)
		if err != nil {
			t.Errorf("%s in %v (fenced %v, held %v, patient %v): %v: % x", v.name, v.state, v.fenced, v.held, v.patient, err, v.frame)
		} else if want.String() != v.want {
			t.Errorf("%s in %v: the file says %s, and the Go filter %v", v.name, v.state, v.want, want)
		}
	}
}

// TestMutations: the two agree on frames that are nearly right, too.
func TestMutations(t *testing.T) {
	all := vectors(t)
	rounds := 20_000
	if testing.Short() {
		rounds = 2_000
	}
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 0))
	for says := askNobody; says <= sayEstablished; says++ {
		w := newTwins(t, testConfig(false), says)
		for i := range rounds {
			v := all[r.IntN(len(all))]
			if i%50 == 0 {
				if err := w.set(filter.State(r.IntN(4)), r.IntN(4) == 0, r.IntN(4) == 0); err != nil {
					t.Fatal(err)
				}
			}
			frame := mutate(r, v.frame, all[r.IntN(len(all))].frame)
			if _, err := w.compare(frame, v.out); err != nil {
				t.Fatalf("round %d, seed %d, a mutation of %s, sockets %d: %v: % x", i, seed, v.name, says, err, frame)
			}
		}
	}
}

// mutate changes some bytes or the length of a frame, or goes on with another one.
func mutate(r *rand.Rand, frame, other []byte) []byte {
	f := append([]byte(nil), frame...)
	for range 1 + r.IntN(3) {
		switch at := r.IntN(len(f) + 1); r.IntN(7) {
		case 0, 1, 2:
			if at < len(f) {
				f[at] = byte(r.Uint32())
			}
		case 3:
			if at < len(f) {
				f[at] ^= 1 << r.IntN(8)
			}
		case 4:
			f = f[:at]
		case 5:
			f = append(f, make([]byte, r.IntN(80))...)
		case 6:
			if at < len(other) {
				f = append(f[:at], other[at:]...)
			}
		}
	}
	for len(f) < 14 { // the kernel runs nothing shorter
		f = append(f, byte(r.Uint32()))
	}
	return f[:min(len(f), longest)]
}
