package vswitch

import (
	"fmt"
	"io"
	"time"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
	"github.com/gopacket/gopacket/pcapgo"
)

// flushEvery bounds what a capture loses when the process is killed.
const flushEvery = 250 * time.Millisecond

// mirror writes frames to a pcapng stream (draft-ietf-opsawg-pcapng) with one
// interface per port, so that frame.interface_name in tshark is the port a frame
// came in by, and nanosecond timestamps. The owner of the switch's lock owns it.
type mirror struct {
	w       io.Writer
	ng      *pcapgo.NgWriter
	ids     map[int]int // switch port → pcapng interface
	flushed time.Time
	err     error // the first; after it nothing is written
}

func newMirror(w io.Writer) *mirror { return &mirror{w: w, ids: make(map[int]int)} }

func (m *mirror) fail(err error) {
	if err != nil && m.err == nil {
		m.err = fmt.Errorf("mirroring to pcapng: %w", err)
	}
}

func (m *mirror) addPort(id int, name, description string) {
	if m.err != nil {
		return
	}
	intf := pcapgo.NgInterface{
		Name:                name,
		Description:         description,
		LinkType:            layers.LinkTypeEthernet,
		TimestampResolution: 9,
	}
	if m.ng != nil {
		n, err := m.ng.AddInterface(intf)
		m.ids[id] = n
		m.fail(err)
		return
	}
	ng, err := pcapgo.NewNgWriterInterface(m.w, intf, pcapgo.NgWriterOptions{
		SectionInfo: pcapgo.NgSectionInfo{Application: "clonecluster vswitch"},
	})
	m.ng, m.ids[id] = ng, 0
	m.fail(err)
}

func (m *mirror) write(port int, now time.Time, frame []byte, comment string) {
	if m.err != nil {
		return
	}
	ci := gopacket.CaptureInfo{
		Timestamp: now, CaptureLength: len(frame), Length: len(frame), InterfaceIndex: m.ids[port],
	}
	var err error
	if comment == "" {
		err = m.ng.WritePacket(ci, frame)
	} else {
		err = m.ng.WritePacketWithOptions(ci, frame, pcapgo.NgPacketOptions{Comments: []string{comment}})
	}
	m.fail(err)
	if now.Sub(m.flushed) >= flushEvery {
		m.flushed = now
		m.flush()
	}
}

func (m *mirror) flush() {
	if m.ng != nil && m.err == nil {
		m.fail(m.ng.Flush())
	}
}
