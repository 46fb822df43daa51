package membership

import (
	"bytes"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
	"github.com/gopacket/gopacket/pcapgo"
)

const dissector = "../../docs/beacon.lua"

// captured is one frame of a capture; of a longer one if onWire says so.
type captured struct {
	frame  []byte
	onWire int
}

// TestDissector: what tshark says of the vectors with our dissector, of frames
// that are cut off, and of noise. It is the users' view, and a second opinion on
// the layout.
func TestDissector(t *testing.T) {
	if _, err := exec.LookPath("tshark"); err != nil {
		t.Skip("needs tshark (Debian package tshark)")
	}
	beacon := readVector(t, "beacon.hex")[0]
	small, large := readVector(t, "map-3.hex")[0], readVector(t, "map-200.hex")
	card, bare := cardFrame(t, vectorCard()), cardFrame(t, &Card{Peer: vectorPeer, Port: 1, Addresses: vectorCard().Addresses[1:2]})
	set := settingsFrame(t, vectorSettings())
	many := vectorBeacon()
	many.Heard = slices.Repeat(many.Heard, MaxNodes)
	head := map[string]string{
		"magic": "CC", "version": "2", "cluster": "0x2a97516c354b6884", "incarnation": "0x1122334455667788",
		"map.version": "7", "map.leader": "52:54:00:77:00:01",
	}
	parent := map[string]string{"parent.version": "6", "parent.leader": "52:54:00:77:00:02", "rules": "0xfedcba9876543210"}
	sender := map[string]string{
		"kind": "1", "sequence": "42", "state": "2", "flags": "0x03", "flags.held_known": "1", "flags.sick": "1",
		"weight": "150", "busy": "333", "flows": "70000", "lowest": "52:54:00:77:00:01",
	}
	cases := []struct {
		name string
		captured
		want []map[string]string
	}{
		{"beacon", captured{beacon, 0}, []map[string]string{head, parent, sender, {
			"heard.count": "2", "heard": "0xb323a1b2,0x816b15e0", "held.count": "3", "hmac": "f29a9428f69543e75476109335c47cac",
		}}},
		{"beacon with all tags", captured{vectorCodec().Beacon(many), 0}, []map[string]string{head, parent, sender, {
			"heard.count": "255", "heard": strings.Join(slices.Repeat([]string{"0xb323a1b2,0x816b15e0"}, 127), ",") + ",0xb323a1b2", "held.count": "3",
		}}},
		{"map", captured{small, 0}, []map[string]string{head, parent, {
			"kind": "2", "sequence": "43", "part": "0", "parts": "1", "member.count": "3",
			"member":         "52:54:00:77:00:01,52:54:00:77:00:02,52:54:00:77:00:03",
			"member.buckets": "341,341,341", "unowned": "1", "hmac": "106d37fabfb7c520579333c174e6c4af",
		}}},
		{"first part", captured{large[0], 0}, []map[string]string{head, parent, {"kind": "2", "sequence": "43", "part": "0", "parts": "2", "member.count": "200"}}},
		{"last part", captured{large[1], 0}, []map[string]string{head, {"kind": "2", "sequence": "44", "part": "1", "parts": "2"}}},
		{"beacon to one node", captured{with(beacon, 0, 2), 0}, []map[string]string{head, parent, sender}},

		{"beacon, cut off by the capture", captured{beacon[:230], len(beacon)}, []map[string]string{head, parent, sender, {
			"heard.count": "2", "heard": "0xb323a1b2", "held.count": "3", "hmac": "", "cut_off": "1", "malformed": "",
		}}},
		{"beacon, cut off in its numbers", captured{beacon[:51], 0}, []map[string]string{{"state": "2", "weight": "150", "flows": "", "cut_off": "1"}}},
		{"map, cut off by the capture", captured{small[:1000], len(small)}, []map[string]string{head, parent, {"member.count": "3", "hmac": "", "cut_off": "1", "malformed": ""}}},
		{"nothing but the magic", captured{beacon[:16], 0}, []map[string]string{{"magic": "CC", "version": "", "cut_off": "1"}}},

		{"owner who is no member", captured{with(small, 100, 3), 0}, []map[string]string{head, {"member": "", "malformed": "1"}}},
		{"card", captured{card, 0}, []map[string]string{{
			"kind": "3", "sequence": "9", "port": "9264", "address": "::ffff:10.77.0.101,fd77::101,fe80::1", "name": "node-1", "build": "0123456789ab", "hmac": fmt.Sprintf("%x", card[len(card)-macLen:]),
		}}},
		{"card without names", captured{bare, 0}, []map[string]string{{"kind": "3", "address": "fd77::101", "name": "", "build": ""}}},
		{"card, cut off in its addresses", captured{card[:70], 0}, []map[string]string{{"kind": "3", "address": "::ffff:10.77.0.101", "name": "", "cut_off": "1"}}},
		{"card without addresses", captured{with(card, 44, 0), 0}, []map[string]string{{"kind": "3", "address": "", "malformed": "1,1"}}},
		{"settings", captured{set, 0}, []map[string]string{{
			"kind": "5", "sequence": "11", "settings.version": "5", "settings.author": "52:54:00:77:00:01", "settings.balance": "2", "settings.by": "ops: größer",
			"settings.node": "52:54:00:77:00:02,52:54:00:77:00:03", "settings.weight": "50,1000", "hmac": fmt.Sprintf("%x", set[len(set)-macLen:]),
		}}},
		{"settings, cut off in their weights", captured{set[:70], 0}, []map[string]string{{"settings.version": "5", "settings.weight": "50", "settings.by": "", "cut_off": "1"}}},
		{"settings of another balance", captured{with(set, 56, 3), 0}, []map[string]string{{"settings.balance": "3", "malformed": "1"}}},

		{"kind of the future", captured{with(beacon, 17, 99), 0}, []map[string]string{{"kind": "99", "malformed": "1"}}},
		{"too long", captured{append(slices.Clone(beacon), 0), 0}, []map[string]string{head, {"malformed": "1", "cut_off": ""}}},
		{"another version", captured{with(beacon, 16, 3), 0}, []map[string]string{{"version": "3", "kind": "", "other_version": "1", "malformed": ""}}},
		{"somebody else's", captured{with(beacon, 14, 'X'), 0}, []map[string]string{{"magic": "", "version": "", "malformed": ""}}},
	}
	// All at once, since tshark takes seconds to start.
	names := map[string]bool{"cut_off": true, "malformed": true, "other_version": true}
	var frames []captured
	for _, tt := range cases {
		frames = append(frames, tt.captured)
		for _, fields := range tt.want {
			for name := range fields {
				names[name] = true
			}
		}
	}
	frames = append(frames, noise([][]byte{beacon, small, large[0], large[1], card, set})...)
	values := dissect(t, frames, slices.Sorted(maps.Keys(names)))
	for i, tt := range cases {
		want := map[string]string{"cut_off": "", "malformed": "", "other_version": ""}
		for _, fields := range tt.want {
			maps.Copy(want, fields)
		}
		for name, value := range want {
			if got := values[i][name]; got != value {
				t.Errorf("%s: %s is %q; want %q", tt.name, name, got, value)
			}
		}
	}
	for i, v := range values[len(cases):] {
		if v["magic"] != "CC" {
			t.Errorf("noise %d was not looked at", i)
		}
	}
}

// noise gives frames that were cut off, changed, or are nothing but a beginning.
func noise(frames [][]byte) (all []captured) {
	r := rand.New(rand.NewPCG(1, 2))
	for range 2000 {
		f := slices.Clone(frames[r.IntN(len(frames))])
		for range r.IntN(6) {
			f[16+r.IntN(len(f)-16)] = byte(r.IntN(256))
		}
		if r.IntN(4) == 0 {
			f = f[:42]
			for range r.IntN(1400) {
				f = append(f, byte(r.IntN(256)))
			}
		}
		onWire := 0
		if r.IntN(2) == 0 {
			if r.IntN(2) == 0 {
				onWire = len(f)
			}
			f = f[:16+r.IntN(len(f)-15)]
		}
		all = append(all, captured{f, onWire})
	}
	return all
}

// dissect has tshark give fields of the frames, named without "clonecluster.", and
// fails the test if the dissector fails.
func dissect(t *testing.T, frames []captured, names []string) (values []map[string]string) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "frames.pcap")
	var pcap bytes.Buffer
	w := pcapgo.NewWriter(&pcap)
	if err := w.WriteFileHeader(65535, layers.LinkTypeEthernet); err != nil {
		t.Fatal(err)
	}
	for _, f := range frames {
		info := gopacket.CaptureInfo{Timestamp: time.Unix(0, 0), CaptureLength: len(f.frame), Length: max(f.onWire, len(f.frame))}
		if err := w.WritePacket(info, f.frame); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(file, pcap.Bytes(), 0o644); err != nil {
		t.Fatal(err)
	}
	args := []string{"-n", "-r", file, "-T", "fields", "-E", "separator=/t", "-E", "aggregator=,", "-e", "_ws.lua.error"}
	for _, name := range names {
		args = append(args, "-e", "clonecluster."+name)
	}
	out, said, err := tshark(dissector, args...)
	if err != nil {
		if !runsLua(t) {
			t.Skip("this tshark runs no Lua scripts for this user: docs/protocol.md says what to do")
		}
		t.Fatalf("tshark: %v: %s", err, said)
	}
	if strings.Contains(said, "Lua") {
		t.Errorf("tshark says: %s", said)
	}
	lines := strings.Split(strings.TrimSuffix(out, "\n"), "\n")
	if len(lines) != len(frames) {
		t.Fatalf("tshark has %d lines for %d frames", len(lines), len(frames))
	}
	for i, line := range lines {
		columns := strings.Split(line, "\t")
		if columns[0] != "" {
			t.Errorf("frame %d, %x: %s", i, frames[i].frame, columns[0])
		}
		fields := map[string]string{}
		for j, name := range names {
			fields[name] = strings.ReplaceAll(columns[1+j], "True", "1") // later versions than 4.0 have words
		}
		values = append(values, fields)
	}
	return values
}

func tshark(script string, args ...string) (out, said string, err error) {
	var stdout, stderr bytes.Buffer
	cmd := exec.Command("tshark", append([]string{"-X", "lua_script:" + script}, args...)...)
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err = cmd.Run()
	return stdout.String(), stderr.String(), err
}

// runsLua reports whether tshark runs any script at all. Root may be refused it,
// without a word.
func runsLua(t *testing.T) bool {
	t.Helper()
	script := filepath.Join(t.TempDir(), "hello.lua")
	if err := os.WriteFile(script, []byte(`print("hello")`), 0o644); err != nil {
		t.Fatal(err)
	}
	out, _, _ := tshark(script, "-v")
	return strings.Contains(out, "hello")
}
