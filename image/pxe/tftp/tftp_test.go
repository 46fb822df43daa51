package tftp

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

func TestParse(t *testing.T) {
	rrq := func(words ...string) []byte {
		return append([]byte{0, opRead}, strings.Join(words, "\x00")+"\x00"...)
	}
	for _, tt := range []struct {
		name    string
		in      []byte
		file    string
		options map[string]string
		code    int // of the error packet; -1 for silence
	}{
		{"plain", rrq("a/b", "octet"), "a/b", nil, 0},
		{"mode in capitals", rrq("b", "OCTET"), "b", nil, 0},
		{"options", rrq("b", "octet", "BLKSIZE", "1468", "tsize", "0"), "b", map[string]string{"blksize": "1468", "tsize": "0"}, 0},
		{"an option without a value", rrq("b", "octet", "tsize"), "b", nil, 0},
		{"text", rrq("b", "netascii"), "", nil, codeIllegal},
		{"no name", rrq("", "octet"), "", nil, codeIllegal},
		{"no end", []byte("\x00\x01b\x00octet"), "", nil, codeIllegal},
		{"no mode", []byte("\x00\x01b\x00"), "", nil, codeIllegal},
		{"too long", rrq(strings.Repeat("x", 600), "octet"), "", nil, codeIllegal},
		{"writing", append([]byte{0, opWrite}, "b\x00octet\x00"...), "", nil, codeAccess},
		{"a straggler", []byte{0, opAck, 0, 1}, "", nil, -1},
		{"an error is never answered", errorPacket(0, "x"), "", nil, -1},
		{"nothing", nil, "", nil, -1},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r, err := parse(tt.in)
			var refused errRequest
			switch {
			case tt.code == -1:
				if !errors.Is(err, errIgnore) {
					t.Errorf("parse = %v, %v; want silence", r, err)
				}
			case tt.code != 0:
				if !errors.As(err, &refused) || int(refused.code) != tt.code {
					t.Errorf("parse = %v, %v; want error code %d", r, err, tt.code)
				}
			case err != nil || r.name != tt.file || !maps.Equal(r.options, tt.options):
				t.Errorf("parse = %+v, %v; want %q %v", r, err, tt.file, tt.options)
			}
		})
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte("\x00\x01b\x00octet\x00blksize\x001468\x00tsize\x000\x00"))
	f.Add([]byte("\x00\x01b\x00octet\x00windowsize\x00-1\x00timeout\x00999999999999999999\x00"))
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := parse(b)
		if err != nil {
			return
		}
		got := agree(r.options, 1<<40, time.Second)
		if got.block < 8 || got.block > maxBlock || got.window < 1 || got.window > maxWindow || got.timeout <= 0 || got.timeout > 10*time.Second {
			t.Errorf("agreed to %+v", got)
		}
		if len(got.oack) > 512 {
			t.Errorf("an answer of %d octets", len(got.oack))
		}
	})
}

func TestAgree(t *testing.T) {
	for _, tt := range []struct {
		options       map[string]string
		block, window int
		oack          string
	}{
		{nil, 512, 1, ""},
		{map[string]string{"blksize": "1468", "tsize": "0", "windowsize": "4"}, 1468, 4, "\x00\x06blksize\x001468\x00windowsize\x004\x00tsize\x001000\x00"},
		{map[string]string{"blksize": "65464"}, 1468, 1, "\x00\x06blksize\x001468\x00"},
		{map[string]string{"windowsize": "65535"}, 512, 64, "\x00\x06windowsize\x0064\x00"},
		{map[string]string{"blksize": "7", "windowsize": "0", "timeout": "0", "multicast": ""}, 512, 1, ""},
		{map[string]string{"timeout": "200"}, 512, 1, ""},
	} {
		if got := agree(tt.options, 1000, time.Second); got.block != tt.block || got.window != tt.window || string(got.oack) != tt.oack {
			t.Errorf("agree(%v) = %d, %d, %q; want %d, %d, %q", tt.options, got.block, got.window, got.oack, tt.block, tt.window, tt.oack)
		}
	}
}

func TestUnwrap(t *testing.T) {
	for _, tt := range []struct {
		n          uint16
		near, want int64
	}{{1, 1, 1}, {0, 65536, 65536}, {65535, 65536, 65535}, {3, 65530, 65539}, {0, 1, 0}, {5, 1 << 20, 1<<20 + 5}} {
		if got := unwrap(tt.n, tt.near); got != tt.want {
			t.Errorf("unwrap(%d, %d) = %d; want %d", tt.n, tt.near, got, tt.want)
		}
	}
}

type memory struct{ *bytes.Reader }

func (memory) Close() error { return nil }

// outcome is what Done was told.
type outcome struct {
	bytes int64
	err   error
}

// serve runs a server on this computer, with one file, "folder/file".
func serve(t testing.TB, s *Server, content []byte) (netip.AddrPort, chan outcome) {
	t.Helper()
	done := make(chan outcome, 100)
	s.Open = func(name string, _ netip.AddrPort) (File, error) {
		if name != "folder/file" {
			return nil, ErrNotFound
		}
		return memory{bytes.NewReader(content)}, nil
	}
	if s.Socket == nil {
		s.Socket = func() (net.PacketConn, error) { return net.ListenPacket("udp4", "127.0.0.1:0") }
	}
	s.Done = func(_ string, _ netip.AddrPort, n int64, _ time.Duration, err error) { done <- outcome{n, err} }
	conn, err := net.ListenPacket("udp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := s.Serve(ctx, conn); err != nil {
			t.Errorf("Serve: %v", err)
		}
	})
	t.Cleanup(func() { cancel(); wg.Wait(); conn.Close() })
	return conn.LocalAddr().(*net.UDPAddr).AddrPort(), done
}

// client is the plainest one that can be, with a fault: it loses what it wants to.
type client struct {
	t    testing.TB
	conn net.PacketConn
	lose func() bool
}

func dial(t testing.TB) *client {
	conn, err := net.ListenPacket("udp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return &client{t, conn, func() bool { return false }}
}

func (c *client) ask(to netip.AddrPort, words ...string) {
	c.conn.WriteTo(append([]byte{0, opRead}, strings.Join(words, "\x00")+"\x00"...), net.UDPAddrFromAddrPort(to))
}

func (c *client) packet() (op uint16, b []byte, from net.Addr) {
	c.t.Helper()
	buf := make([]byte, 2000)
	c.conn.SetReadDeadline(time.Now().Add(5 * time.Second))
	n, from, err := c.conn.ReadFrom(buf)
	if err != nil {
		c.t.Fatalf("waiting for a packet: %v", err)
	}
	return binary.BigEndian.Uint16(buf), buf[2:n], from
}

// load receives a file with a window and a block size as it has agreed to.
func (c *client) load(block, window int) []byte {
	c.t.Helper()
	var all []byte
	ack := func(n int, to net.Addr) {
		if !c.lose() {
			c.conn.WriteTo([]byte{0, opAck, byte(n >> 8), byte(n)}, to)
		}
	}
	for last, since := 0, 0; ; {
		op, b, from := c.packet()
		switch op {
		case opOACK:
			ack(0, from)
		case opData:
			if c.lose() {
				continue
			}
			if n := int(binary.BigEndian.Uint16(b)); n != (last+1)&0xffff {
				ack(last&0xffff, from) // a gap: RFC 7440 wants the last that is in order
				since = 0
				continue
			}
			last++
			since++
			all = append(all, b[2:]...)
			end := len(b)-2 < block
			if since == window || end {
				since = 0
				ack(last&0xffff, from)
			}
			if end {
				return all
			}
		default:
			c.t.Fatalf("packet %d %q", op, b)
		}
	}
}

func content(n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(i * i >> 8)
	}
	return b
}

func TestTransfer(t *testing.T) {
	for _, tt := range []struct {
		name         string
		size, window int
		block        int
		loss         float64
	}{
		{"empty", 0, 1, 512, 0},
		{"ends with an empty block", 1024, 1, 512, 0},
		{"more than 65535 blocks", 9*65600 + 3, 64, 9, 0},
		{"window", 100_000, 8, 1468, 0},
		{"loss", 20_000, 1, 1000, 0.1},
		{"loss in windows", 100_000, 8, 1000, 0.05},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			want := content(tt.size)
			addr, done := serve(t, &Server{Timeout: 30 * time.Millisecond}, want)
			c := dial(t)
			if tt.loss > 0 {
				r := rand.New(rand.NewPCG(1, 2))
				c.lose = func() bool { return r.Float64() < tt.loss }
			}
			c.ask(addr, "folder/file", "octet", "blksize", fmt.Sprint(tt.block), "windowsize", fmt.Sprint(tt.window), "tsize", "0")
			got := c.load(tt.block, tt.window)
			if !bytes.Equal(got, want) {
				t.Fatalf("%d bytes came, and not those that were sent (%d)", len(got), len(want))
			}
			c.conn.Close() // a lost last acknowledgement is sent for in vain
			if o := <-done; tt.loss == 0 && (o.err != nil || o.bytes != int64(tt.size)) {
				t.Errorf("the server says %+v; want %d bytes", o, tt.size)
			}
		})
	}
}

func TestRefusals(t *testing.T) {
	addr, done := serve(t, &Server{MaxTransfers: 2, MaxPerClient: 2}, content(5000))
	c := dial(t)
	c.ask(addr, "nothing", "octet")
	if op, b, _ := c.packet(); op != opError || b[1] != codeNotFound {
		t.Errorf("a file that is not there: packet %d %q", op, b)
	}
	c.conn.WriteTo([]byte("\x00\x02x\x00octet\x00"), net.UDPAddrFromAddrPort(addr))
	if op, b, _ := c.packet(); op != opError || b[1] != codeAccess {
		t.Errorf("writing: packet %d %q", op, b)
	}
	var held []*client
	for range 2 {
		h := dial(t)
		h.ask(addr, "folder/file", "octet")
		h.packet()
		held = append(held, h)
	}
	c.ask(addr, "folder/file", "octet")
	if op, b, _ := c.packet(); op != opError || !strings.Contains(string(b), "too many") {
		t.Errorf("a third transfer of at most two: packet %d %q", op, b)
	}
	// What UEFI does: it opens the file for its size alone.
	h := dial(t)
	for _, other := range held {
		other.ask(addr, "x", "octet") // does not start another beside the one it has
		_, _, from := other.packet()
		other.conn.WriteTo(errorPacket(codeBadOptions, "enough\x1b[2J"), from)
		if o := <-done; !errors.Is(o.err, ErrAborted) || o.bytes != 0 || strings.Contains(o.err.Error(), "\x1b") {
			t.Errorf("a client that ends it: %+v", o)
		}
	}
	h.ask(addr, "folder/file", "octet", "tsize", "0")
	if op, b, _ := h.packet(); op != opOACK || string(b) != "tsize\x005000\x00" {
		t.Errorf("after that: packet %d %q", op, b)
	}
}

// A client that is gone does not hold its place for ever, and a stranger's
// acknowledgement counts for nothing.
func TestGone(t *testing.T) {
	addr, done := serve(t, &Server{Timeout: 10 * time.Millisecond}, content(5000))
	c := dial(t)
	c.ask(addr, "folder/file", "octet")
	_, _, from := c.packet()
	dial(t).conn.WriteTo([]byte{0, opAck, 0, 1}, from)
	if o := <-done; o.err == nil || o.bytes != 0 {
		t.Errorf("the server says %+v; want an error, and nothing acknowledged", o)
	}
}

// The end of the server is the end of its transfers.
func TestEnd(t *testing.T) {
	s := &Server{}
	done := make(chan bool)
	t.Run("server", func(t *testing.T) {
		addr, _ := serve(t, s, content(5000))
		c := dial(t)
		c.ask(addr, "folder/file", "octet")
		c.packet()
		go func() { // the cleanup of this part ends the server
			time.Sleep(4 * time.Second)
			close(done)
		}()
	})
	select {
	case <-done:
		t.Error("the server's end took 4 s")
	default:
	}
}

// Clients that others wrote.
func TestClients(t *testing.T) {
	want := content(3_000_001)
	for _, tt := range []struct {
		tool, pkg string
		args      func(addr netip.AddrPort, out string) []string
	}{
		{"curl", "curl", func(a netip.AddrPort, out string) []string {
			return []string{"-sS", "--fail", "--tftp-blksize", "1428", "-o", out, "tftp://" + a.String() + "/folder/file"}
		}},
		{"tftp", "tftp-hpa", func(a netip.AddrPort, out string) []string {
			return []string{"-m", "binary", a.Addr().String(), fmt.Sprint(a.Port()), "-c", "get", "folder/file", out}
		}},
		{"atftp", "atftp", func(a netip.AddrPort, out string) []string {
			return []string{"--option", "blksize 1428", "--option", "windowsize 8", "--option", "tsize 0", "-g", "-r", "folder/file", "-l", out, a.Addr().String(), fmt.Sprint(a.Port())}
		}},
	} {
		t.Run(tt.tool, func(t *testing.T) {
			path, err := exec.LookPath(tt.tool)
			if err != nil {
				t.Skipf("needs %s (Debian package %s)", tt.tool, tt.pkg)
			}
			addr, done := serve(t, &Server{}, want)
			out := filepath.Join(t.TempDir(), "got")
			ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
			defer cancel()
			if msg, err := exec.CommandContext(ctx, path, tt.args(addr, out)...).CombinedOutput(); err != nil {
				t.Fatalf("%s: %v: %s", tt.tool, err, msg)
			}
			f, err := os.Open(out)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			if got, _ := io.ReadAll(f); !bytes.Equal(got, want) {
				t.Errorf("%s got %d other bytes", tt.tool, len(got))
			}
			if o := <-done; o.err != nil || o.bytes != int64(len(want)) {
				t.Errorf("the server says %+v", o)
			}
		})
	}
}
