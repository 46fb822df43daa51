package raw

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/mdlayher/packet"
	"golang.org/x/sys/unix"

	"clonecluster/netcore/filter"
	"clonecluster/netcore/nic"
)

// RelayConfig is what a Relay works for.
type RelayConfig struct {
	NIC        nic.NIC
	VIP4, VIP6 netip.Addr // at least one is valid
	Router     Router
	// WireMAC gives the NIC's present address.
	WireMAC func() net.HardwareAddr
	// Failed counts what could not be answered or handed on.
	Failed *atomic.Uint64
	Logger *slog.Logger
}

// A Relay is directed mode for a datapath of the kernel's, which judges by itself what
// comes to the wire MAC: a Relay answers who asks for the VIP and hands on what clients
// send. Its packet socket sees frames before programs at tcx do, and none that XDP
// drops.
type Relay struct {
	cfg  RelayConfig
	rx   *packet.Conn
	tx   *sender
	to   atomic.Pointer[directed]
	drop atomic.Uint64
	stop context.CancelFunc
	done sync.WaitGroup

	// Of the loop.
	buf, answer []byte
	err         error
}

// OpenRelay begins to do as Directed says, until Close.
func OpenRelay(cfg RelayConfig, to *Directed) (_ *Relay, err error) {
	r := &Relay{cfg: cfg, buf: make([]byte, vnetHdrLen+maxFrame), answer: make([]byte, vnetHdrLen, 256)}
	if err := r.Set(to); err != nil {
		return nil, err
	}
	if r.tx, err = openSender(cfg.NIC.Index); err != nil {
		return nil, err
	}
	ifi := &net.Interface{Index: cfg.NIC.Index, Name: cfg.NIC.Name, HardwareAddr: cfg.NIC.MAC}
	if r.rx, err = listen(ifi, socketFilter(askFilter(cfg.VIP4, cfg.VIP6), cfg.VIP4, cfg.VIP6)); err != nil {
		r.tx.close()
		return nil, err
	}
	var ctx context.Context
	ctx, r.stop = context.WithCancel(context.Background())
	r.done.Go(func() {
		if err := r.run(ctx); err != nil {
			cfg.Logger.Warn("frames for the VIP are handed on no more", "error", err)
		}
	})
	return r, nil
}

// Set has the Relay do otherwise.
func (r *Relay) Set(to *Directed) error {
	next, err := newDirected(to, MAC(r.cfg.WireMAC()), r.cfg.VIP4, r.cfg.VIP6)
	if err == nil {
		r.to.Store(next)
	}
	return err
}

// Announcements are those of neigh.Responder.
func (r *Relay) Announcements() ([][]byte, error) { return r.to.Load().responder.Announcements() }

// Close ends it.
func (r *Relay) Close() {
	r.stop()
	_ = r.rx.SetReadDeadline(time.Now()) // wakes it
	r.done.Wait()
	r.Dropped()
	_ = r.rx.Close()
	r.tx.close()
}

// Dropped is how many frames the kernel had no room for in its socket.
func (r *Relay) Dropped() uint64 {
	if s, err := r.rx.Stats(); err == nil { // since the last look
		r.drop.Add(uint64(s.Drops))
	}
	return r.drop.Load()
}

func (r *Relay) run(ctx context.Context) error {
	rc, err := r.rx.SyscallConn()
	if err != nil {
		return err
	}
	return pump(ctx, rc, r.burst, r.rx.SetReadDeadline, func() error { return r.err })
}

// burst is as receiveLoop.burst.
func (r *Relay) burst(fd uintptr) bool {
	for range burst {
		n, errno := recv(fd, r.buf)
		switch errno {
		case 0:
			r.frame(n)
		case unix.EAGAIN:
			return false
		case unix.EINTR, unix.ENETDOWN, unix.EINVAL:
		default:
			r.err = fmt.Errorf("receiving from %s: %w", r.cfg.NIC.Name, errno)
			return true
		}
	}
	return true
}

// frame handles virtio_net_hdr + frame in buf[:n].
func (r *Relay) frame(n int) {
	if n < vnetHdrLen || n > len(r.buf) {
		return
	}
	to, wire := r.to.Load(), MAC(r.cfg.WireMAC())
	bucket, asked, usual := to.sort(r.buf[vnetHdrLen:n], wire, r.cfg.Router)
	switch {
	case usual || asked == filter.AskNothing:
	case asked == filter.AskNeighbor:
		reply, err := to.responder.Reply(r.buf[vnetHdrLen:n], r.answer[:vnetHdrLen])
		if err != nil {
			r.cfg.Failed.Add(1)
			return
		}
		r.send(reply, unix.MSG_DONTWAIT)
	default:
		to.handOn(r.buf[:n], wire, bucket, asked, r.send)
	}
}

func (r *Relay) send(b []byte, flags int) {
	if r.tx.send(b, flags) != 0 {
		r.cfg.Failed.Add(1)
	}
}
