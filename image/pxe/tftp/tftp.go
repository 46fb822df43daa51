// Package tftp is a TFTP server that only sends files (RFC 1350), with the options
// that make it bearable: blksize (RFC 2348), tsize and timeout (RFC 2349) and
// windowsize (RFC 7440). Firmware that boots by PXE has no other way to load.
//
// Its sockets come from an interface, so that it also runs on a network stack in
// user space. github.com/pin/tftp/v3, the library of this field, needs the
// kernel's sockets, has no windowsize, and in its mode for one port a late packet
// can meet a closed channel, which would end the program.
package tftp

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"sync"
	"time"

	"clonecluster/image/pxe/datagram"
)

const (
	// maxBlock is what fits a frame of 1514 bytes: a block in fragments of IP is
	// more than many ROMs can put together.
	maxBlock     = 1500 - 20 - 8 - 4
	defaultBlock = 512
	maxWindow    = 64
	maxTries     = 8
	maxRequest   = 512 // RFC 2347: a request is at most 512 octets
)

// Opcodes.
const (
	opRead  = 1
	opWrite = 2
	opData  = 3
	opAck   = 4
	opError = 5
	opOACK  = 6
)

// Error codes of RFC 1350 and RFC 2347.
const (
	codeUndefined  = 0
	codeNotFound   = 1
	codeAccess     = 2
	codeIllegal    = 4
	codeBadOptions = 8
)

// ErrNotFound is what Open's error wraps if there is no such file.
var ErrNotFound = errors.New("no such file")

// ErrAborted is what a transfer ends with whose client has said that it wants no
// more. It is nothing odd: UEFI asks for a file's size in this way.
var ErrAborted = errors.New("the client has ended the transfer")

// File is what is sent. Close is called once, at the end.
type File interface {
	io.ReaderAt
	io.Closer
	Size() int64
}

// Server is a TFTP server. Its fields are set before Serve.
type Server struct {
	// Open gives the file for a name, as the client wrote it, "a/b" or "/a\b".
	Open func(name string, client netip.AddrPort) (File, error)
	// Socket is a new socket for a transfer, at a port that is free.
	Socket func() (net.PacketConn, error)
	// Done is told of each transfer that ended: what was acknowledged, and how
	// long it took. err is nil if that was all. It may be nil.
	Done func(name string, client netip.AddrPort, bytes int64, took time.Duration, err error)
	// Progress is told of bytes that were acknowledged. It may be nil.
	Progress func(name string, client netip.AddrPort, bytes int64)
	// MaxTransfers bounds those at one time, 0 means 64; MaxPerClient those of
	// one address, 0 means 4.
	MaxTransfers, MaxPerClient int
	// Timeout is how long an acknowledgement may take, unless the client wants
	// otherwise; 0 means 1 s.
	Timeout time.Duration

	mu      sync.Mutex
	running map[netip.AddrPort]bool
}

// request is a read request.
type request struct {
	name    string
	options map[string]string // by name in lower case
}

// errRequest is a request that is answered with an error packet.
type errRequest struct {
	code uint16
	text string
}

func (e errRequest) Error() string { return e.text }

// errIgnore is for packets that get no answer.
var errIgnore = errors.New("no request")

// parse reads what came to the server's port.
func parse(b []byte) (request, error) {
	if len(b) < 2 {
		return request{}, errIgnore
	}
	switch binary.BigEndian.Uint16(b) {
	case opRead:
	case opWrite:
		return request{}, errRequest{codeAccess, "this server only sends"}
	default:
		return request{}, errIgnore // a straggler of a transfer, or noise: no answer, or two servers would talk for ever
	}
	if len(b) > maxRequest {
		return request{}, errRequest{codeIllegal, "the request is longer than 512 octets"}
	}
	words := strings.Split(string(b[2:]), "\x00")
	if len(words) < 3 || words[0] == "" || words[len(words)-1] != "" {
		return request{}, errRequest{codeIllegal, "the request is cut short"}
	}
	r := request{name: words[0], options: map[string]string{}}
	if !strings.EqualFold(words[1], "octet") {
		return request{}, errRequest{codeIllegal, "only the mode octet, which clients call binary"}
	}
	for o := words[2 : len(words)-1]; len(o) >= 2; o = o[2:] {
		r.options[strings.ToLower(o[0])] = o[1]
	}
	return r, nil
}

// terms are what a transfer goes by.
type terms struct {
	block, window int
	timeout       time.Duration
	oack          []byte // nil if the client asked for nothing that we know
}

// agree answers the options of a request. What is out of range is left out of the
// answer, which means the default (RFC 2347).
func agree(options map[string]string, size int64, timeout time.Duration) terms {
	t := terms{defaultBlock, 1, timeout, nil}
	var oack bytes.Buffer
	say := func(name string, value int64) { fmt.Fprintf(&oack, "%s\x00%d\x00", name, value) }
	if n, err := strconv.Atoi(options["blksize"]); err == nil && n >= 8 && n <= 65464 {
		t.block = min(n, maxBlock)
		say("blksize", int64(t.block))
	}
	if n, err := strconv.Atoi(options["windowsize"]); err == nil && n >= 1 && n <= 65535 {
		t.window = min(n, maxWindow)
		say("windowsize", int64(t.window))
	}
	if n, err := strconv.Atoi(options["timeout"]); err == nil && n >= 1 && n <= 255 {
		if n <= 10 { // more would hold a dead client's place for minutes
			t.timeout = time.Duration(n) * time.Second
			say("timeout", int64(n))
		}
	}
	if _, ok := options["tsize"]; ok {
		say("tsize", size)
	}
	if oack.Len() > 0 {
		t.oack = append([]byte{0, opOACK}, oack.Bytes()...)
	}
	return t
}

func errorPacket(code uint16, text string) []byte {
	b := []byte{0, opError, byte(code >> 8), byte(code)}
	return append(append(b, text...), 0)
}

// Serve answers requests on conn until ctx ends, and then ends the transfers. conn
// stays the caller's.
func (s *Server) Serve(ctx context.Context, conn net.PacketConn) error {
	ctx, cancel := context.WithCancel(ctx)
	var transfers sync.WaitGroup
	defer transfers.Wait()
	defer cancel()
	stop := context.AfterFunc(ctx, func() { conn.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	err := datagram.Read(ctx, conn, func(data []byte, from net.Addr) {
		client, ok := addrPort(from)
		if !ok {
			return
		}
		r, err := parse(data)
		if err == nil {
			err = s.begin(ctx, &transfers, r, client, from)
		}
		var refused errRequest
		if errors.As(err, &refused) {
			conn.WriteTo(errorPacket(refused.code, refused.text), from)
		}
	})
	if err != nil {
		return fmt.Errorf("TFTP: %w", err)
	}
	return nil
}

func addrPort(a net.Addr) (netip.AddrPort, bool) {
	u, ok := a.(*net.UDPAddr)
	if !ok {
		return netip.AddrPort{}, false
	}
	p := u.AddrPort()
	return netip.AddrPortFrom(p.Addr().Unmap(), p.Port()), true
}

// begin starts a transfer unless the client has one on that port, when this is
// the same request again.
func (s *Server) begin(ctx context.Context, wg *sync.WaitGroup, r request, client netip.AddrPort, to net.Addr) error {
	if err := s.take(client); err != nil {
		return err
	}
	file, err := s.Open(r.name, client)
	if err != nil {
		s.release(client)
		if errors.Is(err, ErrNotFound) {
			return errRequest{codeNotFound, "there is no such file"}
		}
		return errRequest{codeUndefined, "the server cannot read that file"}
	}
	sock, err := s.Socket()
	if err != nil {
		file.Close()
		s.release(client)
		return errRequest{codeUndefined, "the server has no socket left"}
	}
	wg.Go(func() {
		defer s.release(client)
		defer file.Close()
		defer sock.Close()
		defer context.AfterFunc(ctx, func() { sock.SetReadDeadline(time.Unix(1, 0)) })()
		start := time.Now()
		t := &transfer{sock: sock, to: to, file: file, terms: agree(r.options, file.Size(), s.timeout())}
		if s.Progress != nil {
			t.progress = func(n int64) { s.Progress(r.name, client, n) }
		}
		err := t.run(ctx)
		if s.Done != nil {
			s.Done(r.name, client, t.acked, time.Since(start), err)
		}
	})
	return nil
}

func (s *Server) timeout() time.Duration {
	if s.Timeout > 0 {
		return s.Timeout
	}
	return time.Second
}

func (s *Server) take(client netip.AddrPort) error {
	most, each := s.MaxTransfers, s.MaxPerClient
	if most == 0 {
		most = 64
	}
	if each == 0 {
		each = 4
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.running[client] {
		return errIgnore
	}
	same := 0
	for c := range s.running {
		if c.Addr() == client.Addr() {
			same++
		}
	}
	if len(s.running) >= most || same >= each {
		return errRequest{codeUndefined, "too many transfers at once, try again"}
	}
	if s.running == nil {
		s.running = make(map[netip.AddrPort]bool)
	}
	s.running[client] = true
	return nil
}

func (s *Server) release(client netip.AddrPort) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.running, client)
}

// transfer sends one file.
type transfer struct {
	terms
	sock     net.PacketConn
	to       net.Addr
	file     File
	acked    int64 // bytes
	progress func(int64)
}

func (t *transfer) run(ctx context.Context) error {
	next := int64(1) // the first block that is not acknowledged, without the wrap at 65536
	if t.oack != nil {
		if _, err := t.exchange(ctx, 0, 0); err != nil {
			return err
		}
	}
	// A file that is a multiple of the block's length ends with an empty block.
	last := t.file.Size()/int64(t.block) + 1
	for next <= last {
		end := min(next+int64(t.window)-1, last)
		got, err := t.exchange(ctx, next, end)
		if err != nil {
			return err
		}
		next = got + 1
		done := min(got*int64(t.block), t.file.Size())
		if t.progress != nil && done > t.acked {
			t.progress(done - t.acked)
		}
		t.acked = done
	}
	return nil
}

// exchange sends blocks first to end (0 is the OACK) until one of them is
// acknowledged, and says which. Only a silence makes it send again, never a
// repeated acknowledgement: each would double what is on the wire (the sorcerer's
// apprentice). An acknowledgement of the block before the first is a silence if
// the window is one; in a larger one it says that the first was lost (RFC 7440,
// section 4), and is believed once: there may be more of them on their way.
func (t *transfer) exchange(ctx context.Context, first, end int64) (int64, error) {
	buf := make([]byte, 600)
	asked := false
	for range maxTries {
		if err := t.send(first, end); err != nil {
			return 0, err
		}
		deadline := time.Now().Add(t.timeout)
	wait:
		for {
			if err := ctx.Err(); err != nil {
				t.sock.WriteTo(errorPacket(codeUndefined, "the server ends"), t.to)
				return 0, err
			}
			if err := t.sock.SetReadDeadline(deadline); err != nil {
				return 0, err
			}
			n, from, err := t.sock.ReadFrom(buf)
			if err != nil {
				var e net.Error
				if ctx.Err() != nil || (errors.As(err, &e) && e.Timeout() && time.Now().Before(deadline)) {
					continue
				}
				if errors.As(err, &e) && e.Timeout() {
					break wait
				}
				// "Connection refused" too: the client's port is closed.
				return 0, fmt.Errorf("%w: %w", ErrAborted, err)
			}
			if from.String() != t.to.String() || n < 4 {
				continue
			}
			switch binary.BigEndian.Uint16(buf) {
			case opError:
				return 0, fmt.Errorf("%w: it says %q", ErrAborted, printable(buf[4:n]))
			case opAck:
				got := unwrap(binary.BigEndian.Uint16(buf[2:]), first)
				switch {
				case got >= first && got <= end:
					return got, nil
				case got == first-1 && t.window > 1 && !asked:
					asked = true
					break wait
				}
			}
		}
	}
	return 0, fmt.Errorf("no acknowledgement of block %d in %v", first, maxTries*t.timeout)
}

// unwrap is the block number nearest to near whose low 16 bits are n.
func unwrap(n uint16, near int64) int64 {
	return near + int64(int16(n-uint16(near)))
}

func (t *transfer) send(first, end int64) error {
	if first == 0 {
		_, err := t.sock.WriteTo(t.oack, t.to)
		return err
	}
	b := make([]byte, 4+t.block)
	for block := first; block <= end; block++ {
		n, err := t.file.ReadAt(b[4:], (block-1)*int64(t.block))
		if err != nil && err != io.EOF {
			t.sock.WriteTo(errorPacket(codeUndefined, "the server cannot read the file"), t.to)
			return err
		}
		if want := min(int64(t.block), t.file.Size()-(block-1)*int64(t.block)); int64(n) < want {
			t.sock.WriteTo(errorPacket(codeUndefined, "the file has become shorter"), t.to)
			return errors.New("the file has become shorter")
		} else {
			n = int(want) // and what has grown is not sent
		}
		binary.BigEndian.PutUint16(b, opData)
		binary.BigEndian.PutUint16(b[2:], uint16(block))
		if _, err := t.sock.WriteTo(b[:4+n], t.to); err != nil {
			return err
		}
	}
	return nil
}

// printable is what a client said, fit for a terminal.
func printable(b []byte) string {
	text, _, _ := bytes.Cut(b, []byte{0})
	return strings.Map(func(r rune) rune {
		if r < ' ' || r > '~' {
			return -1
		}
		return r
	}, string(text[:min(len(text), 80)]))
}
