package capture

import (
	"encoding/binary"
	"io"
	"time"
)

// The block types and options of draft-ietf-opsawg-pcapng that are written here.
const (
	blockSection    = 0x0a0d0d0a
	blockInterface  = 1
	blockStatistics = 5
	blockPacket     = 6

	byteOrder    = 0x1a2b3c4d
	linkEthernet = 1

	optEnd         = 0
	optComment     = 1 // of any block
	optFlags       = 2 // of a packet
	optName        = 2 // of an interface
	optDescription = 3
	optApplication = 4 // of a section
	optReceived    = 4 // of statistics
	optDropped     = 5
	optResolution  = 9
	nanoseconds    = 9
	flagIn         = 1
	flagOut        = 2
)

// A Writer writes pcapng with Ethernet frames and nanoseconds. It is here, and not
// pcapgo's, because that brings all of gopacket's protocols into the node. It keeps
// nothing back, and is for one goroutine.
type Writer struct {
	w          io.Writer
	buf        []byte
	interfaces int
}

// NewWriter writes the section's header.
func NewWriter(w io.Writer) (*Writer, error) {
	p := &Writer{w: w}
	p.begin(blockSection)
	p.u32(byteOrder)
	p.buf = binary.LittleEndian.AppendUint16(p.buf, 1) // version 1.0
	p.buf = binary.LittleEndian.AppendUint16(p.buf, 0)
	p.u64(1<<64 - 1) // the section's length is not known
	p.option(optApplication, []byte("clonecluster"))
	return p, p.end()
}

// AddInterface gives the number of an interface for Packet; frames are cut to snap
// bytes, 0: not at all.
func (p *Writer) AddInterface(name, description string, snap int) (id int, err error) {
	p.begin(blockInterface)
	p.u32(linkEthernet)
	p.u32(uint32(snap))
	p.option(optName, []byte(name))
	p.option(optDescription, []byte(description))
	p.option(optResolution, []byte{nanoseconds})
	p.interfaces++
	return p.interfaces - 1, p.end()
}

// Packet writes a frame of an interface.
func (p *Writer) Packet(id int, f Frame) error {
	p.begin(blockPacket)
	p.u32(uint32(id))
	p.time(f.Time)
	p.u32(uint32(len(f.Data)))
	p.u32(uint32(f.Length))
	p.bytes(f.Data)
	flags := uint32(flagIn)
	if f.Left {
		flags = flagOut
	}
	p.option(optFlags, binary.LittleEndian.AppendUint32(nil, flags))
	p.option(optComment, []byte(f.Comment))
	return p.end()
}

// Statistics says at the end how many frames of an interface came, how many of them
// there was no room for, and why it is the end.
func (p *Writer) Statistics(id int, at time.Time, received, dropped uint64, why string) error {
	p.begin(blockStatistics)
	p.u32(uint32(id))
	p.time(at)
	p.option(optComment, []byte(why))
	p.option(optReceived, binary.LittleEndian.AppendUint64(nil, received))
	p.option(optDropped, binary.LittleEndian.AppendUint64(nil, dropped))
	return p.end()
}

func (p *Writer) begin(block uint32) {
	p.buf = p.buf[:0]
	p.u32(block)
	p.u32(0) // the length, see end
}

// end ends the options, and writes the block.
func (p *Writer) end() error {
	p.u32(optEnd)
	n := uint32(len(p.buf) + 4)
	p.u32(n)
	binary.LittleEndian.PutUint32(p.buf[4:], n)
	_, err := p.w.Write(p.buf)
	return err
}

func (p *Writer) u32(v uint32) { p.buf = binary.LittleEndian.AppendUint32(p.buf, v) }
func (p *Writer) u64(v uint64) { p.buf = binary.LittleEndian.AppendUint64(p.buf, v) }

// time writes the upper half first, whatever the byte order.
func (p *Writer) time(t time.Time) {
	ns := uint64(t.UnixNano())
	p.u32(uint32(ns >> 32))
	p.u32(uint32(ns))
}

func (p *Writer) bytes(b []byte) {
	p.buf = append(p.buf, b...)
	for len(p.buf)%4 != 0 {
		p.buf = append(p.buf, 0)
	}
}

func (p *Writer) option(code uint16, value []byte) {
	if len(value) == 0 {
		return
	}
	p.buf = binary.LittleEndian.AppendUint16(p.buf, code)
	p.buf = binary.LittleEndian.AppendUint16(p.buf, uint16(len(value)))
	p.bytes(value)
}
