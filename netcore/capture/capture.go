// Package capture shows the frames that pass a node's NIC for the cluster, each with
// the verdict on it, as pcapng (draft-ietf-opsawg-pcapng), which Wireshark and tshark
// open.
//
// It reads copies from a packet socket that is there only while somebody captures, so
// nothing is paid otherwise, and no datapath knows of it. The verdict is computed from
// the copy with the table, the lease and the sockets of that moment: at the instant of
// a change of the table it may differ from the one that was in force a microsecond
// before. With XDP the programs judge frames before the kernel has any to copy, and
// what they drop there is not seen.
//
// Only the cluster's frames are kept: what comes for the VIP or speaks of it, what
// speaks for it, and, if that is wanted, the nodes' own frames. What else the machine
// says is none of the cluster's business.
package capture

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"os"
	"sync"
	"time"

	"github.com/mdlayher/packet"
	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"

	"clonecluster/netcore/filter"
)

// Frame is one frame as it is kept.
type Frame struct {
	Time    time.Time
	Data    []byte
	Length  int // on the wire
	Left    bool
	Comment string
}

// WithoutDropped is in the interface's description when a frame that the filter drops
// never becomes a packet that the kernel could copy, as with XDP.
const WithoutDropped = "what XDP drops is not seen"

// EndedEarly is what the comment of the statistics begins with, at the end of a capture
// that is not whole; what comes then is the reason. One without statistics is not whole,
// either.
const EndedEarly = "ended early: "

// ended says why a capture has come to its end, for that comment: it has failed, or
// whoever wanted it does so no longer, with ctx, or it is whole.
func ended(ctx context.Context, q Query, written int, failed error) string {
	switch {
	case failed != nil:
		return EndedEarly + failed.Error()
	case q.Count > 0 && written == q.Count:
		return fmt.Sprintf("complete: the number of frames that was asked for, %d", q.Count)
	case ctx.Err() != nil:
		return EndedEarly + context.Cause(ctx).Error()
	}
	return fmt.Sprintf("complete: the time that was asked for, %v", q.Duration)
}

// Config is where frames are taken.
type Config struct {
	Interface *net.Interface
	// Name and Description are the interface's in the capture.
	Name, Description string
	// Look gives the verdict on a frame, as filter.Filter.Look does.
	Look func(frame []byte, left bool) filter.Seen
	// Skip are frames that are not kept whatever the query says, as those of the
	// connection by which the capture itself leaves; may be nil.
	Skip func(filter.Seen) bool
	// EtherType is that of the nodes' own frames.
	EtherType uint16
}

const (
	// ringBytes is how much may wait for whoever reads; of more the oldest is dropped.
	ringBytes = 4 << 20
	// ringTime is how long it may wait.
	ringTime = 10 * time.Second
	// socketBytes is the kernel's part of it.
	socketBytes = 4 << 20
	// maxFrame is the longest that segmentation offload makes.
	maxFrame = 14 + 4 + math.MaxUint16
	// batch is how long frames are collected before they are written.
	batch = 100 * time.Millisecond
)

// Run writes a capture to w until ctx ends, whose cause it says then, the query is
// satisfied (nil), or w fails.
// Flush, if not nil, is called when what was written shall go out.
func Run(ctx context.Context, cfg Config, q Query, w io.Writer, flush func() error) error {
	whole := ctx
	ctx, cancel := context.WithTimeout(ctx, q.Duration)
	defer cancel()
	conn, err := open(cfg.Interface)
	if err != nil {
		return err
	}
	t := &tap{cfg: cfg, q: q, conn: conn, ring: ring{more: make(chan struct{}, 1)}}
	var reading sync.WaitGroup
	reading.Go(func() {
		t.err = t.read(ctx)
		cancel()
	})
	defer reading.Wait()
	stop := context.AfterFunc(ctx, func() { _ = conn.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	defer conn.Close()
	defer cancel()
	out, err := NewWriter(w)
	if err != nil {
		return err
	}
	if _, err := out.AddInterface(cfg.Name, cfg.Description, q.Snap); err != nil {
		return err
	}
	written := 0
	for done := false; !done; {
		if flush != nil {
			if err := flush(); err != nil {
				return err
			}
		}
		select {
		case <-ctx.Done():
			reading.Wait() // what has come until now is wanted
			done = true
		case <-t.ring.more:
			select { // several at a time
			case <-ctx.Done():
			case <-time.After(batch):
			}
		}
		for _, f := range t.ring.take() {
			if q.Count > 0 && written == q.Count {
				done = true
				break
			}
			if err := out.Packet(0, f); err != nil {
				return err
			}
			written++
		}
		done = done || q.Count > 0 && written == q.Count
	}
	cancel()
	reading.Wait()
	if stats, err := conn.Stats(); err == nil {
		t.ring.lost += uint64(stats.Drops)
	}
	if err := out.Statistics(0, time.Now(), t.seen, t.ring.lost, ended(whole, q, written, t.err)); err != nil {
		return err
	}
	if flush != nil {
		if err := flush(); err != nil {
			return err
		}
	}
	return t.err
}

// open opens the socket that has both what comes in and what goes out.
func open(ifi *net.Interface) (*packet.Conn, error) {
	// Tagged frames are of another network; the kernel has taken the tag out.
	program, err := bpf.Assemble([]bpf.Instruction{
		bpf.LoadExtension{Num: bpf.ExtVLANTagPresent},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: 0, SkipTrue: 4},
		bpf.LoadExtension{Num: bpf.ExtVLANTag},
		bpf.ALUOpConstant{Op: bpf.ALUOpAnd, Val: 0x0fff},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: 0, SkipTrue: 1},
		bpf.RetConstant{Val: 0},
		bpf.RetConstant{Val: math.MaxUint32},
	})
	if err != nil {
		return nil, fmt.Errorf("assembling the filter of a capture: %w", err)
	}
	conn, err := packet.Listen(ifi, packet.Raw, unix.ETH_P_ALL, &packet.Config{Filter: program})
	if err != nil {
		return nil, fmt.Errorf("opening a packet socket on %s: %w", ifi.Name, err)
	}
	rc, err := conn.SyscallConn()
	if err == nil {
		var inner error
		err = rc.Control(func(fd uintptr) {
			_ = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, socketBytes)
			inner = os.NewSyscallError("SO_TIMESTAMPNS", unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_TIMESTAMPNS, 1))
		})
		err = errors.Join(err, inner)
	}
	if err != nil {
		_ = conn.Close()
		return nil, fmt.Errorf("preparing a packet socket on %s: %w", ifi.Name, err)
	}
	return conn, nil
}

// tap takes frames from the socket into the ring.
type tap struct {
	cfg  Config
	q    Query
	conn *packet.Conn
	ring ring
	seen uint64
	err  error
}

func (t *tap) read(ctx context.Context) error {
	rc, err := t.conn.SyscallConn()
	if err != nil {
		return err
	}
	buf, control := make([]byte, maxFrame), make([]byte, 256)
	for ctx.Err() == nil {
		var n, cn int
		var from unix.Sockaddr
		var rerr error
		err := rc.Read(func(fd uintptr) bool {
			n, cn, _, from, rerr = unix.Recvmsg(int(fd), buf, control, unix.MSG_DONTWAIT|unix.MSG_TRUNC)
			return rerr != unix.EAGAIN
		})
		switch {
		case errors.Is(err, os.ErrDeadlineExceeded), ctx.Err() != nil:
			return nil
		case err != nil:
			return fmt.Errorf("capturing on %s: %w", t.cfg.Interface.Name, err)
		case rerr == unix.EINTR, rerr == unix.ENETDOWN:
			continue
		case rerr != nil:
			return fmt.Errorf("capturing on %s: %w", t.cfg.Interface.Name, rerr)
		}
		link, ok := from.(*unix.SockaddrLinklayer)
		if !ok || n > len(buf) {
			continue
		}
		t.take(buf[:n], timeOf(control[:cn]), link.Pkttype == unix.PACKET_OUTGOING)
	}
	return nil
}

// timeOf is when the kernel had the frame.
func timeOf(control []byte) time.Time {
	messages, err := unix.ParseSocketControlMessage(control)
	if err == nil {
		for _, m := range messages {
			if m.Header.Level == unix.SOL_SOCKET && m.Header.Type == unix.SCM_TIMESTAMPNS && len(m.Data) >= 16 { // struct timespec
				return time.Unix(int64(binary.NativeEndian.Uint64(m.Data)), int64(binary.NativeEndian.Uint64(m.Data[8:])))
			}
		}
	}
	return time.Now()
}

// take keeps a frame that is wanted.
func (t *tap) take(frame []byte, at time.Time, left bool) {
	f := Frame{Time: at, Length: len(frame), Left: left}
	if len(frame) >= 14 && uint16(frame[12])<<8|uint16(frame[13]) == t.cfg.EtherType {
		if !t.q.Beacons {
			return
		}
		f.Comment = "between nodes"
	} else {
		seen := t.cfg.Look(frame, left)
		// Of other frames only those are shown that are asked for by that name, and
		// are about the VIP after all.
		if seen.Verdict == filter.DropNotOurs && seen.Bucket < 0 && !seen.Tuple.Client.IsValid() {
			return
		}
		if t.cfg.Skip != nil && t.cfg.Skip(seen) || !t.q.wants(seen) {
			return
		}
		f.Comment = comment(seen)
	}
	if t.q.Snap > 0 && len(frame) > t.q.Snap {
		frame = frame[:t.q.Snap]
	}
	f.Data = append([]byte(nil), frame...)
	t.seen++
	t.ring.add(f)
}

// comment is what is said of a frame: "drop-foreign, bucket 17 is foreign".
func comment(seen filter.Seen) string {
	if seen.Bucket < 0 {
		return seen.Verdict.String()
	}
	return fmt.Sprintf("%v, bucket %d is %v", seen.Verdict, seen.Bucket, seen.State)
}

// ring keeps the last frames that nobody has taken yet.
type ring struct {
	mu    sync.Mutex
	kept  []Frame
	bytes int
	lost  uint64
	more  chan struct{}
}

func (r *ring) add(f Frame) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.kept = append(r.kept, f)
	r.bytes += len(f.Data)
	drop := 0
	for drop < len(r.kept)-1 && (r.bytes > ringBytes || f.Time.Sub(r.kept[drop].Time) > ringTime) {
		r.bytes -= len(r.kept[drop].Data)
		drop++
	}
	if drop > 0 {
		r.lost += uint64(drop)
		r.kept = r.kept[drop:]
	}
	select {
	case r.more <- struct{}{}:
	default:
	}
}

func (r *ring) take() []Frame {
	r.mu.Lock()
	defer r.mu.Unlock()
	all := r.kept
	r.kept, r.bytes = nil, 0
	return all
}
