// Package raw is the datapath that runs on any Linux: a packet socket on the
// NIC takes the frames for the clone MAC, the filter picks this node's share,
// and a TAP named clone0, which has the clone MAC and the VIP, gives them to
// the kernel's own stack. What the kernel sends by clone0 comes back here and
// leaves by the NIC with the wire MAC as its Ethernet source and its payload
// untouched.
//
// Nothing can leave with the clone MAC as its source, because the one way from
// clone0 to the wire is the send in this package, which writes the source
// first. A crash closes that way and leaves the TAP, its addresses and the
// kernel's sockets, so an engine that starts again within the patience of TCP
// goes on with the established connections.
//
// Frames keep their virtio_net_hdr from socket to TAP and back, so that
// checksum and segmentation offloads work across both: without it TCP fails.
//
// Sources: packet(7), the kernel's tuntap.rst, ip-sysctl.rst, linux/if_tun.h,
// linux/virtio_net.h.
package raw

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/mdlayher/packet"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"clonecluster/netcore/clone"
	"clonecluster/netcore/delayed"
	"clonecluster/netcore/filter"
	"clonecluster/netcore/neigh"
	"clonecluster/netcore/sockdiag"
)

// Config is what a Datapath connects.
type Config struct {
	clone.Config // but for Kind
	Filter       *filter.Filter
	// Now is the filter's clock: CLOCK_MONOTONIC in nanoseconds.
	Now func() int64
	// WireMACChanged, if set, is told when the NIC's address changes.
	WireMACChanged func(net.HardwareAddr)
	// CarrierChanged, if set, is told when the NIC gets or loses its carrier.
	CarrierChanged func(bool)
}

// Counters are what the datapath counts beyond the filter's verdicts.
type Counters struct {
	RxKernelDrops  uint64 // frames the kernel had no room for in the socket
	RxTruncated    uint64 // frames longer than any we expect
	RxUnsupported  uint64 // frames whose offload virtio_net_hdr cannot express
	TapWriteErrors uint64
	TxTooLong      uint64 // frames longer than the NIC's MTU
	TxNoBuffer     uint64 // frames the NIC's queue had no room for
	TxLinkDown     uint64 // frames sent while the NIC was down
	TxErrors       uint64 // any other failure to send
	NeighborErrors uint64 // requests that could not be answered
}

type counters struct {
	rxKernelDrops, rxTruncated, rxUnsupported, tapWriteErrors atomic.Uint64
	txTooLong, txNoBuffer, txLinkDown, txErrors, neighErrors  atomic.Uint64
}

// Datapath is one open raw datapath. Open makes it, Run moves its frames, and
// one of Close and Abandon ends it.
type Datapath struct {
	cfg  Config
	host *clone.Host

	tap   *os.File
	taken bool // clone0 was there, left by a crashed engine
	rx    *packet.Conn
	tx    *sender
	diag  *sockdiag.Sockets

	wireMAC   atomic.Uint64 // six bytes, the first of them highest
	responder atomic.Pointer[neigh.Responder]
	directed  atomic.Pointer[directed] // nil: the network floods
	shield    shield
	count     counters

	rxAlive, txAlive atomic.Int64 // Now() when the loop last proved alive

	stats   sync.Mutex // of queued: the kernel's counters are cleared by reading them
	queued  uint64     // frames that the kernel has put into the socket
	read    atomic.Uint64
	waiting atomic.Pointer[afterQueued]

	late *delayed.Resets
}

// afterQueued is what has to be done when so many frames have been read.
type afterQueued struct {
	read uint64
	do   func()
}

// Open sets the machine up and returns with clone0 up and the VIP on it. No
// frame moves before Run. On an error everything is as it was before, which is
// the clone0 of a crashed engine if there was one.
func Open(cfg Config) (_ *Datapath, err error) {
	cfg.Kind = clone.TAP
	d := &Datapath{cfg: cfg, late: delayed.New(cfg.Filter, cfg.Now)}
	if d.host, d.taken, err = clone.Claim(cfg.Config); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, d.Undo())
		}
	}()
	if err := d.setWireMAC(cfg.NIC.MAC); err != nil {
		return nil, err
	}
	if d.tap, err = openTAP(clone.Device); err != nil {
		return nil, err
	}
	if err := setPersistent(d.tap, true); err != nil {
		return nil, err
	}
	if err := d.host.SetUp(nil); err != nil {
		return nil, err
	}
	return d, d.openWire()
}

func (d *Datapath) openWire() (err error) {
	ifi := &net.Interface{Index: d.cfg.NIC.Index, Name: d.cfg.NIC.Name, HardwareAddr: d.cfg.NIC.MAC}
	if d.tx, err = openSender(ifi.Index); err != nil {
		return err
	}
	if d.rx, err = openReceiver(ifi, d.cfg.CloneMAC, d.cfg.VIP4.Addr(), d.cfg.VIP6.Addr()); err != nil {
		return err
	}
	d.diag, err = sockdiag.Open(d.host.Index())
	return err
}

// Close takes the node out: clone0 and the VIP are removed and the machine is
// left as it was before Open. Connections on the VIP end.
func (d *Datapath) Close() error {
	var err error
	if d.tap != nil {
		err = setPersistent(d.tap, false)
	}
	d.closeFiles()
	return errors.Join(err, d.host.Close())
}

// Undo takes back what Open did, when the engine cannot start. What a crashed
// engine left stays for the one that can: the connections may still go on.
func (d *Datapath) Undo() error {
	if d.taken {
		d.Abandon()
		return nil
	}
	return d.Close()
}

// Abandon closes the datapath as a crash would: clone0 stays without a reader,
// which loses frames but leaks none, and waits for the next Open.
func (d *Datapath) Abandon() {
	d.closeFiles()
	d.host.Abandon()
}

func (d *Datapath) closeFiles() {
	_ = d.shield.close() // it ends with the process anyway
	if d.tap != nil {
		_ = d.tap.Close()
	}
	if d.rx != nil {
		_ = d.rx.Close()
	}
	if d.tx != nil {
		d.tx.close()
	}
	if d.diag != nil {
		_ = d.diag.Close()
	}
}

// WireMAC is the NIC's present address, the source of every frame.
func (d *Datapath) WireMAC() net.HardwareAddr {
	v := d.wireMAC.Load()
	return net.HardwareAddr{byte(v >> 40), byte(v >> 32), byte(v >> 24), byte(v >> 16), byte(v >> 8), byte(v)}
}

func (d *Datapath) setWireMAC(mac net.HardwareAddr) error {
	r, err := neigh.New(neigh.Config{CloneMAC: d.cfg.CloneMAC, WireMAC: [6]byte(mac), VIP4: d.cfg.VIP4.Addr(), VIP6: d.cfg.VIP6.Addr()})
	if err != nil {
		return fmt.Errorf("preparing neighbour answers: %w", err)
	}
	d.responder.Store(r)
	var v uint64
	for _, b := range mac {
		v = v<<8 | uint64(b)
	}
	d.wireMAC.Store(v)
	return nil
}

// Announce sends one gratuitous ARP and one unsolicited neighbour advertisement
// for the VIP. Every node announces the same binding, so clients cannot flap.
func (d *Datapath) Announce() error {
	frames, err := d.speaker().Announcements()
	if err != nil {
		return fmt.Errorf("building announcements: %w", err)
	}
	for _, f := range frames {
		b := append(make([]byte, vnetHdrLen, vnetHdrLen+len(f)), f...)
		if errno := d.tx.send(b, unix.MSG_DONTWAIT); errno != 0 {
			return fmt.Errorf("sending an announcement: %w", errno)
		}
	}
	return nil
}

// Run moves frames until ctx ends (nil) or the datapath is broken: the NIC was
// removed (nic.ErrRemoved), it was given the clone MAC (clone.ErrMACInUse), or
// clone0 was taken away. A link that goes down and comes back is not an error.
func (d *Datapath) Run(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		return d.host.Follow(ctx, clone.Events{Carrier: d.cfg.CarrierChanged, WireMAC: func(mac net.HardwareAddr) error {
			err := d.setWireMAC(mac)
			if err == nil && d.cfg.WireMACChanged != nil {
				d.cfg.WireMACChanged(mac)
			}
			return err
		}})
	})
	g.Go(func() error { return d.receive(ctx) })
	g.Go(func() error { return d.transmit(ctx) })
	g.Go(func() error { d.late.Run(ctx, d.sendFromClone); return nil })
	g.Go(func() error {
		<-ctx.Done()
		d.Poke()
		return nil
	})
	return g.Wait()
}

// Poke makes both loops run once, even if there is no frame. Alive tells
// whether they did.
func (d *Datapath) Poke() {
	now := time.Now()
	_ = d.rx.SetReadDeadline(now)
	_ = d.tap.SetReadDeadline(now)
}

// Alive is when the slower of the two loops last ran, on the clock of
// Config.Now.
func (d *Datapath) Alive() int64 { return min(d.rxAlive.Load(), d.txAlive.Load()) }

// burst is how many frames a loop moves before it looks at its context.
const burst = 64

// receive moves frames from the wire to clone0 and answers neighbours.
func (d *Datapath) receive(ctx context.Context) error {
	rc, err := d.rx.SyscallConn()
	if err != nil {
		return err
	}
	tap, err := d.tap.SyscallConn()
	if err != nil {
		return err
	}
	var tapFD uintptr
	if err := tap.Control(func(fd uintptr) { tapFD = fd }); err != nil {
		return err
	}
	l := &receiveLoop{d: d, tap: tapFD, buf: make([]byte, vnetHdrLen+maxFrame), answer: make([]byte, vnetHdrLen, 256)}
	read := l.burst // bound once: a method value allocates
	return pump(ctx, rc, read, d.rx.SetReadDeadline, func() error {
		d.rxAlive.Store(d.cfg.Now())
		return l.err
	})
}

// pump calls read in bursts until ctx ends. A deadline in the past is how Poke
// wakes it. Waiting in the runtime's poller was compared with poll(2) on a
// locked thread, which took 20 to 40 % more processor time a request, with
// realtime.Waiter on any, 10 % more, and with one processor for both loops,
// which made no difference.
func pump(ctx context.Context, rc syscall.RawConn, read func(uintptr) bool, setDeadline func(time.Time) error, after func() error) error {
	for {
		if err := rc.Read(read); errors.Is(err, os.ErrDeadlineExceeded) {
			_ = setDeadline(time.Time{})
		} else if err != nil && ctx.Err() == nil {
			return err
		}
		if ctx.Err() != nil {
			return nil
		}
		if err := after(); err != nil {
			return err
		}
	}
}

type receiveLoop struct {
	d           *Datapath
	tap         uintptr
	buf, answer []byte
	err         error
}

// burst reads up to a burst of frames; false asks the poller to wait for more.
func (l *receiveLoop) burst(fd uintptr) bool {
	for range burst {
		n, errno := recv(fd, l.buf)
		switch errno {
		case 0:
			l.frame(n)
			l.d.rxAlive.Store(l.d.cfg.Now())
			l.d.read.Add(1)
			l.d.reached()
		case unix.EAGAIN:
			return false
		case unix.EINTR:
		case unix.ENETDOWN:
			// The NIC went down. Its packet sockets say so once and work again
			// when it is up; if it was removed, follow finds out.
		case unix.EINVAL:
			l.d.count.rxUnsupported.Add(1)
			l.d.read.Add(1)
			l.d.reached()
		default:
			l.err = fmt.Errorf("receiving from %s: %w", l.d.cfg.NIC.Name, errno)
			return true
		}
	}
	return true
}

// frame handles virtio_net_hdr + frame in buf[:n].
func (l *receiveLoop) frame(n int) {
	d := l.d
	if n > len(l.buf) {
		d.count.rxTruncated.Add(1)
		return
	}
	if n < vnetHdrLen {
		return
	}
	if to := d.directed.Load(); to != nil && l.direct(to, n) {
		return
	}
	frame := l.buf[vnetHdrLen:n]
	verdict := d.cfg.Filter.Ingress(frame, d.cfg.Now(), d.diag)
	switch {
	case verdict.Accept():
		if _, errno := write(l.tap, l.buf[:n]); errno != 0 {
			d.count.tapWriteErrors.Add(1)
		}
	case verdict == filter.AnswerNeighbor:
		l.answerNeighbor(frame)
	}
}

func (l *receiveLoop) answerNeighbor(frame []byte) {
	reply, err := l.d.speaker().Reply(frame, l.answer[:vnetHdrLen])
	if err != nil {
		l.d.count.neighErrors.Add(1)
		return
	}
	// Not waiting for room: whoever asked will ask again.
	l.d.send(reply, unix.MSG_DONTWAIT)
}

// transmit moves frames from clone0 to the wire.
func (d *Datapath) transmit(ctx context.Context) error {
	rc, err := d.tap.SyscallConn()
	if err != nil {
		return err
	}
	l := &transmitLoop{d: d, buf: make([]byte, vnetHdrLen+maxFrame)}
	read := l.burst
	return pump(ctx, rc, read, d.tap.SetReadDeadline, func() error {
		d.txAlive.Store(d.cfg.Now())
		return l.err
	})
}

type transmitLoop struct {
	d   *Datapath
	buf []byte
	err error
}

func (l *transmitLoop) burst(fd uintptr) bool {
	for range burst {
		n, errno := read(fd, l.buf)
		switch errno {
		case 0:
			// A full queue of the NIC may hold up each send for a while.
			l.frame(n)
			l.d.txAlive.Store(l.d.cfg.Now())
		case unix.EAGAIN:
			return false
		case unix.EINTR:
		default:
			l.err = fmt.Errorf("reading from %s: %w", clone.Device, errno)
			return true
		}
	}
	return true
}

func (l *transmitLoop) frame(n int) {
	d := l.d
	if n < vnetHdrLen+14 {
		return
	}
	b := l.buf[:n]
	switch v := d.cfg.Filter.Egress(b[vnetHdrLen:], d.cfg.Now()); {
	case v.Send():
		d.sendFromClone(b)
	case v == filter.DelayRST:
		if !d.late.Add(b, vnetHdrLen) {
			d.cfg.Filter.Discard()
		}
	}
}

// sendFromClone sends virtio_net_hdr + frame of clone0's with the wire MAC as its
// source (I1).
func (d *Datapath) sendFromClone(b []byte) {
	v := d.wireMAC.Load()
	src := b[vnetHdrLen+6 : vnetHdrLen+12]
	src[0], src[1], src[2], src[3], src[4], src[5] = byte(v>>40), byte(v>>32), byte(v>>24), byte(v>>16), byte(v>>8), byte(v)
	if to := d.directed.Load(); to != nil {
		neigh.Redirect(b[vnetHdrLen:], d.cfg.CloneMAC, to.Director)
	}
	d.send(b, 0)
}

// send sends virtio_net_hdr + frame and counts what fails; a lost frame is the
// business of the protocol above.
func (d *Datapath) send(b []byte, flags int) {
	switch d.tx.send(b, flags) {
	case 0:
	case unix.EMSGSIZE:
		d.count.txTooLong.Add(1)
	case unix.ENOBUFS, unix.EAGAIN:
		d.count.txNoBuffer.Add(1)
	case unix.ENETDOWN, unix.ENXIO, unix.ENODEV:
		d.count.txLinkDown.Add(1)
	default:
		d.count.txErrors.Add(1)
	}
}

// AfterQueued calls do when all frames that are in the receiving socket now have
// been read and judged: what a node gains must not count for a SYN that another
// has answered already, while it lay here. It may call do at once, and otherwise
// does so between two frames; another call takes the place of one that waits.
func (d *Datapath) AfterQueued(do func()) {
	w := &afterQueued{d.queuedFrames(), do}
	d.waiting.Store(w)
	d.reached()
}

// reached does what waits for the frames that have been read.
func (d *Datapath) reached() {
	if w := d.waiting.Load(); w != nil && d.read.Load() >= w.read && d.waiting.CompareAndSwap(w, nil) {
		w.do()
	}
}

// queuedFrames is how many frames the kernel has put into the receiving socket
// since it was opened.
func (d *Datapath) queuedFrames() uint64 {
	d.stats.Lock()
	defer d.stats.Unlock()
	if s, err := d.rx.Stats(); err == nil {
		d.count.rxKernelDrops.Add(uint64(s.Drops))
		d.queued += uint64(s.Packets - s.Drops) // those that found no room are counted, too
	}
	return d.queued
}

// Counters gives the datapath's own counters.
func (d *Datapath) Counters() Counters {
	d.queuedFrames()
	c := &d.count
	return Counters{
		RxKernelDrops: c.rxKernelDrops.Load(), RxTruncated: c.rxTruncated.Load(), RxUnsupported: c.rxUnsupported.Load(),
		TapWriteErrors: c.tapWriteErrors.Load(), TxTooLong: c.txTooLong.Load(), TxNoBuffer: c.txNoBuffer.Load(),
		TxLinkDown: c.txLinkDown.Load(), TxErrors: c.txErrors.Load(), NeighborErrors: c.neighErrors.Load(),
	}
}
