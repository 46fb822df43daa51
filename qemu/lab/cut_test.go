package lab_test

import (
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"testing"
	"time"

	"clonecluster/qemu"
	"clonecluster/qemu/lab"
)

// cable is a guest's end of a switch port, by QEMU's stream protocol.
type cable struct {
	net.Conn
	got chan string // payloads
}

func plug(t *testing.T, m *lab.Machine) *cable {
	t.Helper()
	conn, err := net.Dial("unix", m.Port().Socket())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	c := &cable{conn, make(chan string, 100)}
	go func() {
		for {
			var length [4]byte
			if _, err := io.ReadFull(conn, length[:]); err != nil {
				return
			}
			frame := make([]byte, binary.BigEndian.Uint32(length[:]))
			if _, err := io.ReadFull(conn, frame); err != nil {
				return
			}
			c.got <- string(frame[14:])
		}
	}()
	return c
}

// send broadcasts a frame.
func (c *cable) send(t *testing.T, from byte, payload string) {
	t.Helper()
	frame := append([]byte("\xff\xff\xff\xff\xff\xff\x02\x00\x00\x00\x00"), from, 0x88, 0xb6)
	frame = append(frame, payload...)
	if _, err := c.Write(append(binary.BigEndian.AppendUint32(nil, uint32(len(frame))), frame...)); err != nil {
		t.Fatal(err)
	}
}

// Who hears whom, with three nodes that are not booted.
func TestCuts(t *testing.T) {
	cfg := lab.Demo(3)
	cfg.ManualStart, cfg.Accel, cfg.Kernel, cfg.Client = true, qemu.TCG, "/none", nil
	l, err := lab.Start(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	var cables []*cable
	for _, m := range l.Nodes() {
		cables = append(cables, plug(t, m))
	}
	for _, m := range l.Nodes() {
		for !m.Port().Up() {
			time.Sleep(time.Millisecond)
		}
	}
	round := 0
	// hears checks which senders each node has heard. One too many shows in the
	// next round.
	hears := func(what string, want ...string) {
		t.Helper()
		round++
		for i, c := range cables {
			c.send(t, byte(i+1), fmt.Sprint(i+1))
		}
		for _, m := range l.Nodes() {
			for m.Port().Stats().RxFrames < uint64(round) { // the rules have seen it then
				time.Sleep(time.Millisecond)
			}
		}
		for i, m := range l.Nodes() {
			var heard []string
			for len(heard) < len(want[i]) {
				select {
				case s := <-cables[i].got:
					heard = append(heard, s)
				case <-time.After(10 * time.Second):
					t.Fatalf("%s: %s heard %q; want %q", what, m.Name(), heard, want[i])
				}
			}
			if slices.Sort(heard); strings.Join(heard, "") != want[i] {
				t.Errorf("%s: %s heard %q; want %q", what, m.Name(), heard, want[i])
			}
		}
	}
	hears("whole", "23", "13", "12")
	undo, err := l.Node(1).Mute()
	if err != nil {
		t.Fatal(err)
	}
	hears("node2 is mute", "3", "13", "1")
	undo()
	if undo, err = l.Node(1).Deafen(); err != nil {
		t.Fatal(err)
	}
	hears("node2 is deaf", "23", "", "12")
	undo()
	heal, err := l.Partition([]string{"node1", "node2"}, []string{"node3"})
	if err != nil {
		t.Fatal(err)
	}
	hears("node3 is apart", "2", "1", "")
	heal()
	if heal, err = l.Partition([]string{"node1"}, []string{"node3"}); err != nil {
		t.Fatal(err)
	}
	hears("node2 hears both", "2", "13", "2")
	heal()
	hears("healed", "23", "13", "12")
	for _, groups := range [][][]string{{{"node1", "node2"}}, {{"node1"}, {"node9"}}, {{"node9"}, {"node1"}}} {
		if _, err := l.Partition(groups...); err == nil {
			t.Errorf("Partition(%q) worked", groups)
		}
	}
	hears("after what failed", "23", "13", "12")
}
