package vswitch

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// maxStream is the longest frame QEMU itself passes on a stream socket
	// (NET_BUFSIZE, include/net/net.h). A longer length means that the two ends
	// disagree about where frames begin.
	maxStream = 4096 + 65536
	lengthLen = 4
	// batch is how many frames are written to a socket in one system call.
	batch = 16
	// maxSocketPath is sizeof(sun_path) of unix(7) less the final zero.
	maxSocketPath = 107
	// acceptRetry is the wait after a failed accept.
	acceptRetry = 100 * time.Millisecond
)

// buf is a frame behind its length, shared by the ports it is queued on.
type buf struct {
	data []byte // lengthLen bytes of length, then the frame
	refs atomic.Int32
}

var bufs = sync.Pool{New: func() any { return &buf{data: make([]byte, 0, 2048)} }}

func newBuf(n int) *buf {
	b := bufs.Get().(*buf)
	if cap(b.data) < lengthLen+n {
		b.data = make([]byte, lengthLen+n)
	}
	b.data = b.data[:lengthLen+n]
	binary.BigEndian.PutUint32(b.data, uint32(n))
	b.refs.Store(1)
	return b
}

func (b *buf) frame() []byte { return b.data[lengthLen:] }

func (b *buf) release() {
	if b.refs.Add(-1) == 0 && cap(b.data) <= 2048 {
		bufs.Put(b)
	}
}

// Receiver is the far end of an in-process port.
type Receiver interface {
	// Receive takes a frame that left the switch. It runs on the port's own
	// goroutine, may block (the port's queue then fills, and overflows), must
	// not keep the frame, and must return once the receiver is closed.
	Receive(frame []byte)
}

// ReceiverFunc is a function as a Receiver.
type ReceiverFunc func(frame []byte)

// Receive calls f.
func (f ReceiverFunc) Receive(frame []byte) { f(frame) }

// PortStats counts what passed one port. Rx is from the host into the switch.
type PortStats struct {
	RxFrames, RxBytes uint64
	RxFlooded         uint64 // of RxFrames: left by all other ports
	RxDropped         uint64 // of RxFrames: cut, reserved, malformed or by a rule
	TxFrames, TxBytes uint64 // queued towards the host
	TxDropped         uint64 // the queue was full
	TxLinkDown        uint64 // nobody connected, or cut
	TxRuleDrop        uint64
	Moves             uint64 // addresses that moved to this port
	Connects          uint64 // links that came up
	ProtocolErrors    uint64 // connections closed for an impossible length
}

// Port is one socket of the switch.
type Port struct {
	sw   *Switch
	id   int
	name string
	out  chan *buf
	path string
	ln   *net.UnixListener // nil for an in-process port

	// The switch's lock guards the rest.
	connected bool
	cut       bool
	conn      net.Conn
	stats     PortStats
}

// Name returns the port's name.
func (p *Port) Name() string { return p.name }

// Socket returns the path of the port's socket, empty for an in-process port.
func (p *Port) Socket() string { return p.path }

// Ports returns all ports, oldest first.
func (s *Switch) Ports() []*Port {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]*Port(nil), s.ports...)
}

// Listen adds a port for one QEMU guest at a time, on a unix socket at path
// (at most 107 bytes, see unix(7)). The guest may go and come again.
func (s *Switch) Listen(name, path string) (*Port, error) {
	if len(path) > maxSocketPath {
		return nil, fmt.Errorf("listening on port %s: socket path of %d bytes is longer than %d: %s", name, len(path), maxSocketPath, path)
	}
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, fmt.Errorf("listening on port %s: %w", name, err)
	}
	if err := os.Chmod(path, 0o600); err != nil {
		ln.Close()
		return nil, fmt.Errorf("listening on port %s: %w", name, err)
	}
	p := &Port{name: name, path: path, ln: ln}
	if err := s.add(p, "QEMU stream socket"); err != nil {
		ln.Close()
		return nil, err
	}
	go p.accept()
	return p, nil
}

// Attach adds a port whose far end is in this process.
func (s *Switch) Attach(name string, r Receiver) (*Port, error) {
	p := &Port{name: name, connected: true}
	p.stats.Connects = 1
	if err := s.add(p, "in-process host"); err != nil {
		return nil, err
	}
	go func() {
		defer s.wg.Done()
		for {
			select {
			case b := <-p.out:
				r.Receive(b.frame())
				b.release()
			case <-s.done:
				return
			}
		}
	}()
	return p, nil
}

// add registers a port and accounts for its one goroutine.
func (s *Switch) add(p *Port, description string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return net.ErrClosed
	}
	for _, q := range s.ports {
		if q.name == p.name {
			return fmt.Errorf("adding port %s: the name is taken", p.name)
		}
	}
	p.sw, p.id, p.out = s, len(s.ports), make(chan *buf, s.cfg.Queue)
	s.ports = append(s.ports, p)
	if s.mirror != nil {
		s.mirror.addPort(p.id, p.name, description)
	}
	s.wg.Add(1)
	return nil
}

// Send puts a frame from an in-process host into the switch. The frame is
// copied.
func (p *Port) Send(frame []byte) {
	b := newBuf(len(frame))
	copy(b.frame(), frame)
	p.sw.receive(p, b)
}

// Cut takes the cable out: nothing passes either way, and the switch forgets
// what it learnt on this port. The guest does not notice (its virtual link stays
// up); to show it a lost carrier, use QMP's set_link as well.
func (p *Port) Cut() {
	p.sw.mu.Lock()
	defer p.sw.mu.Unlock()
	p.cut = true
	p.downLocked()
}

// Restore puts the cable back in.
func (p *Port) Restore() {
	p.sw.mu.Lock()
	defer p.sw.mu.Unlock()
	p.cut = false
}

// Up says whether somebody is connected and the cable is in.
func (p *Port) Up() bool {
	p.sw.mu.Lock()
	defer p.sw.mu.Unlock()
	return p.up()
}

// Stats returns the port's counters.
func (p *Port) Stats() PortStats {
	p.sw.mu.Lock()
	defer p.sw.mu.Unlock()
	return p.stats
}

func (p *Port) up() bool { return p.connected && !p.cut }

// downLocked forgets everything that belonged to the link.
func (p *Port) downLocked() {
	p.sw.fdb.flush(p.id)
	for {
		select {
		case b := <-p.out:
			b.release()
		default:
			return
		}
	}
}

// shut makes the port's goroutine end.
func (p *Port) shut() {
	if p.ln != nil {
		p.ln.Close()
	}
	p.sw.mu.Lock()
	defer p.sw.mu.Unlock()
	if p.conn != nil {
		p.conn.Close()
	}
}

// accept serves one connection after the other: a second guest waits in the
// listen queue until the first has gone. What fails is tried again, and told
// once: descriptors that have run out come back.
func (p *Port) accept() {
	defer p.sw.wg.Done()
	for failed := false; ; {
		conn, err := p.ln.Accept()
		if err == nil {
			failed = false
			p.serve(conn)
			continue
		}
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if !failed {
			failed = true
			p.sw.log.Error("accepting on a switch port", "port", p.name, "err", err)
		}
		select {
		case <-time.After(acceptRetry):
		case <-p.sw.done:
			return
		}
	}
}

func (p *Port) serve(conn net.Conn) {
	s := p.sw
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		conn.Close()
		return
	}
	p.conn, p.connected = conn, true
	p.stats.Connects++
	s.mu.Unlock()
	s.log.Debug("link up", "port", p.name)

	gone := make(chan struct{})
	var writer sync.WaitGroup
	writer.Go(func() {
		if err := p.write(conn, gone); err != nil {
			conn.Close() // the reader then ends too
		}
	})
	err := p.read(conn)
	close(gone)
	conn.Close()
	writer.Wait()

	s.mu.Lock()
	defer s.mu.Unlock()
	p.conn, p.connected = nil, false
	if errors.Is(err, errLength) {
		p.stats.ProtocolErrors++
		s.log.Warn("closed a connection", "port", p.name, "err", err)
	}
	p.downLocked()
	s.log.Debug("link down", "port", p.name, "err", err)
}

var errLength = errors.New("impossible frame length")

// read takes frames from a stream until it ends.
func (p *Port) read(conn io.Reader) error {
	r := bufio.NewReaderSize(conn, 64<<10)
	for {
		b, err := readFrame(r)
		if err != nil {
			return err
		}
		p.sw.receive(p, b)
	}
}

// readFrame reads one frame of QEMU's stream protocol. A length of zero is a
// frame without content (the switch counts it as malformed).
func readFrame(r io.Reader) (*buf, error) {
	var length [lengthLen]byte
	if _, err := io.ReadFull(r, length[:]); err != nil {
		return nil, err
	}
	n := binary.BigEndian.Uint32(length[:])
	if n > maxStream {
		return nil, fmt.Errorf("%w: %d > %d", errLength, n, maxStream)
	}
	b := newBuf(int(n))
	if _, err := io.ReadFull(r, b.frame()); err != nil {
		b.release()
		if errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		return nil, err
	}
	return b, nil
}

// write sends queued frames until the connection is gone.
func (p *Port) write(conn net.Conn, gone <-chan struct{}) error {
	var (
		frames [batch]*buf
		vec    [batch][]byte
	)
	for {
		n := 0
		select {
		case frames[0] = <-p.out:
			n = 1
		case <-gone:
			return nil
		}
	fill:
		for n < batch {
			select {
			case frames[n] = <-p.out:
				n++
			default:
				break fill
			}
		}
		for i := range n {
			vec[i] = frames[i].data
		}
		out := net.Buffers(vec[:n])
		_, err := out.WriteTo(conn)
		for i := range n {
			frames[i].release()
			frames[i], vec[i] = nil, nil
		}
		if err != nil {
			return err
		}
	}
}
