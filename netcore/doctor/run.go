package doctor

import (
	"context"
	"encoding/binary"
	"errors"
	"log/slog"
	"net/netip"
	"slices"
	"sync"
	"time"

	"clonecluster/netcore/finding"
	"clonecluster/netcore/membership"
	"clonecluster/netcore/neigh"
)

// A Wire is how a Doctor sends frames; Send must not keep them.
type Wire interface{ Send(frame []byte) error }

// Options are what a Doctor needs from its surroundings.
type Options struct {
	Config
	Codec *membership.Codec
	Wire  Wire
	VIPs  []netip.Addr
	Now   func() int64 // nanoseconds of a clock that only goes forward
	// Self is who this node is now, and Members whom the membership protocol hears;
	// true: who hears this node as well.
	Self    func() membership.Peer
	Members func() map[membership.NodeID]bool
	// MTU, if set, gives that of the NIC, in bytes, as it is now; 0: it is not known.
	MTU func() int
	// Dropped, if set, counts what came in and no Hear may be told of.
	Dropped func() Dropped
	// Announce says on the segment that the VIP is at the clone MAC.
	Announce func() error
	Board    *finding.Board
	Logger   *slog.Logger
}

// Dropped is what a datapath has dropped, in frames, before a packet socket sees it.
type Dropped struct {
	RARPs, FromClone uint64 // with the clone MAC as their source; FromClone: other than RARPs
	Conflicts        uint64 // ARP and NDP that give the VIP another MAC, or another address the clone MAC
}

// An Examination is how far one is, and what is known.
type Examination struct {
	Node    string `json:"node"` // wire MAC
	Running bool   `json:"running"`
	Doing   string `json:"doing,omitempty"`
	Nodes   int    `json:"nodes"` // other nodes whose probes are heard
	// Director is who takes the frames for the VIP in directed mode, by wire MAC.
	Director string  `json:"director,omitempty"`
	Checks   []Check `json:"checks"`
}

// A Doctor runs a Machine. Its methods may be called from several goroutines.
type Doctor struct {
	opt  Options
	wake chan struct{}

	mu      sync.Mutex
	machine *Machine
	dropped Dropped
	board   *finding.Source
	bursts  sync.WaitGroup
}

// NewDoctor makes the doctor of a node; Run starts it.
func NewDoctor(opt Options) *Doctor {
	if opt.Interval == 0 {
		opt.Interval = Interval
	}
	if opt.Quick == 0 {
		opt.Quick = Quick
	}
	d := &Doctor{opt: opt, wake: make(chan struct{}, 1), board: opt.Board.Source(), machine: New(opt.Config, opt.Self(), opt.Now())}
	if opt.Dropped != nil {
		d.dropped = opt.Dropped()
	}
	return d
}

// Run examines the network now and again until ctx ends.
func (d *Doctor) Run(ctx context.Context) {
	defer d.bursts.Wait()
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-timer.C:
		case <-d.wake:
		}
		timer.Reset(d.step(ctx))
	}
}

// step does what is due and gives the time until the next step.
func (d *Doctor) step(ctx context.Context) time.Duration {
	d.mu.Lock()
	now := d.opt.Now()
	m := d.machine
	self := d.opt.Self()
	m.Self(self, now)
	m.Members(d.opt.Members(), now)
	if d.opt.MTU != nil && now >= m.next {
		m.MTU(d.opt.MTU())
	}
	if d.opt.Dropped != nil {
		d.takeDropped(d.opt.Dropped(), now)
	}
	a := m.Tick(now)
	d.report(m.Findings(now))
	if len(a.Burst) > 0 {
		d.bursts.Go(func() { d.burst(ctx, a.Burst) })
	}
	d.mu.Unlock()

	if a.Announce {
		if err := d.opt.Announce(); err != nil {
			d.opt.Logger.Warn("announcing the VIP to see whether the switch believes it", "error", err)
		}
	}
	for _, f := range a.Frames {
		// What cannot be sent shows as lost.
		_ = d.opt.Wire.Send(d.opt.Codec.Probe(&f.Probe, f.To))
	}
	if a.Ask {
		d.ask(self.ID)
	}
	return max(time.Millisecond, time.Duration(a.Next-d.opt.Now()))
}

// takeDropped tells the Machine what the datapath has dropped since the last step.
func (d *Doctor) takeDropped(now Dropped, at int64) {
	since := func(n, before uint64) int { return int(max(n, before) - before) }
	if n := since(now.FromClone, d.dropped.FromClone); n > 0 {
		d.machine.Leak("an ARP or IP packet", n, at)
	}
	if n := since(now.RARPs, d.dropped.RARPs); n > 0 {
		d.machine.Leak(aRARP, n, at)
	}
	if n := since(now.Conflicts, d.dropped.Conflicts); n > 0 {
		d.machine.Conflict(n, at)
	}
	d.dropped = now
}

// ask asks the segment who has the VIPs. The answers come to the wire MAC alone, so that
// every datapath lets Hear have them: that of an owner, and that of anybody else.
func (d *Doctor) ask(self membership.NodeID) {
	for _, vip := range d.opt.VIPs {
		source := netip.IPv4Unspecified()
		if vip.Is6() {
			source = neigh.LinkLocal(self[:])
		}
		frame, err := neigh.Question(self[:], source, vip)
		if err != nil {
			d.opt.Logger.Warn("asking who has the VIP", "vip", vip, "error", err)
			continue
		}
		_ = d.opt.Wire.Send(frame) // there will be another time
	}
}

// report puts on the board what is found, but for what is put there by others.
func (d *Doctor) report(now []finding.Finding) {
	now = slices.DeleteFunc(now, func(f finding.Finding) bool {
		return slices.ContainsFunc(elsewhere, func(x finding.Finding) bool { return x.Code == f.Code })
	})
	for i := range now {
		now[i].Node = d.machine.self.ID.String()
	}
	d.board.Set(now...)
}

// burst sends the stages one after the other, each frame at its time.
func (d *Doctor) burst(ctx context.Context, stages []Stage) {
	const pace = time.Millisecond
	for _, s := range stages {
		frame := d.opt.Codec.Probe(&s.Probe, s.To)
		begin, sent := time.Now(), 0
		for sent < s.frames() && ctx.Err() == nil {
			due := min(s.frames(), int(time.Since(begin).Seconds()*float64(s.Rate))+1)
			for ; sent < due; sent++ {
				if err := d.opt.Wire.Send(frame); err != nil {
					break // a full queue: later
				}
			}
			time.Sleep(pace)
		}
	}
	d.mu.Lock()
	d.machine.BurstSent(d.opt.Now())
	d.mu.Unlock()
	d.prod()
}

func (d *Doctor) prod() {
	select {
	case d.wake <- struct{}{}:
	default:
	}
}

// Examine begins an examination, unless one is running; see Machine.Examine.
func (d *Doctor) Examine(rate int) error {
	d.mu.Lock()
	err := d.machine.Examine(rate, d.opt.Now())
	d.mu.Unlock()
	d.prod()
	return err
}

// Direct says whom this node takes to direct, and whether it is able to be in directed
// mode; see Machine.Direct.
func (d *Doctor) Direct(by membership.NodeID, able bool) {
	d.mu.Lock()
	before := d.machine.next
	d.machine.Direct(by, able, d.opt.Now())
	changed := d.machine.next < before
	d.mu.Unlock()
	if changed {
		d.prod()
	}
}

// Flooding tells for how long frames to the clone MAC have not reached every node, and
// for how long they have; 0: they do not, or it is not known.
func (d *Doctor) Flooding() (bad, good time.Duration) {
	d.mu.Lock()
	defer d.mu.Unlock()
	now := d.opt.Now()
	if at := d.machine.badAt; at != 0 {
		bad = time.Duration(now - at)
	}
	if at := d.machine.goodAt; at != 0 {
		good = time.Duration(now - at)
	}
	return bad, good
}

// Directed tells what another node says of directed mode; unknown if it is not heard.
func (d *Doctor) Directed(id membership.NodeID) (directed, able, known bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if n := d.machine.nodes[id]; n != nil {
		return n.direct, n.able, true
	}
	return false, false, false
}

// Examination is how far it is.
func (d *Doctor) Examination() Examination {
	d.mu.Lock()
	defer d.mu.Unlock()
	m := d.machine
	e := Examination{
		Node: m.self.ID.String(), Running: m.exam.running(), Doing: phaseNames[m.exam.phase], Nodes: len(m.nodes), Checks: m.Checks(d.opt.Now()),
	}
	if m.directed {
		e.Director = m.director.String()
	}
	return e
}

// Hear takes a frame from the NIC: what is of no interest it ignores.
func (d *Doctor) Hear(frame []byte) {
	if len(frame) < 14 {
		return
	}
	src := membership.NodeID(frame[6:12])
	kind := binary.BigEndian.Uint16(frame[12:])
	d.mu.Lock()
	defer d.mu.Unlock()
	now := d.opt.Now()
	if [6]byte(src) == d.opt.CloneMAC {
		what := map[uint16]string{etherRARP: aRARP, etherARP: "an ARP packet"}[kind]
		if what == "" {
			what = "an IP packet"
		}
		d.machine.Leak(what, 1, now)
		return
	}
	switch kind {
	case membership.EtherType:
		d.hearProbe(frame, src, now)
	case etherARP, etherIPv6:
		for _, vip := range d.opt.VIPs {
			if mac := neigh.Claimed(frame, vip); mac != nil && vip.Is6() == (kind == etherIPv6) {
				d.machine.Claim(src, membership.NodeID(mac), vip, now)
			}
		}
	}
}

// HearIPv4 takes a packet that came to the NIC.
func (d *Doctor) HearIPv4(packet []byte) {
	if id := dhcpServer(packet); id != "" {
		d.mu.Lock()
		defer d.mu.Unlock()
		d.machine.Server(id, d.opt.Now())
	}
}

func (d *Doctor) hearProbe(frame []byte, src membership.NodeID, now int64) {
	if !membership.IsProbe(frame) {
		return
	}
	p, err := d.opt.Codec.DecodeProbe(frame)
	switch {
	case err == nil:
		if wayOf(p.Way, [6]byte(frame), d.opt.CloneMAC, d.machine.self.ID) {
			before := d.machine.next
			d.machine.Hear(p, now)
			if d.machine.next < before {
				d.prod()
			}
		}
	case errors.Is(err, membership.ErrOtherCluster), errors.Is(err, membership.ErrUnauthentic):
		if mac, ok := membership.StrangerCloneMAC(frame); ok {
			d.machine.Stranger(src, errors.Is(err, membership.ErrUnauthentic), mac, now)
		}
	}
}

// wayOf tells whether a probe came to where it says that it was sent.
func wayOf(w membership.Way, to, cloneMAC [6]byte, self membership.NodeID) bool {
	switch w {
	case membership.ToClone, membership.BurstClone:
		return to == cloneMAC
	case membership.ToGroup:
		return to == membership.Group
	case membership.ToAll:
		return to == broadcast
	}
	return to == self
}

const (
	etherARP  = 0x0806
	etherRARP = 0x8035
	etherIPv6 = 0x86dd
)

// dhcpServer gives the server of a DHCP offer or acknowledgement (RFC 2131): its
// identifier, or else its address; empty if the packet is none.
func dhcpServer(packet []byte) string {
	if len(packet) < 20 || packet[0]>>4 != 4 || packet[9] != 17 {
		return ""
	}
	head := int(packet[0]&15) * 4
	const bootp, cookie, server = 8, 236, 54
	options := head + bootp + cookie + 4
	if head < 20 || binary.BigEndian.Uint16(packet[6:])&0x1fff != 0 || len(packet) < options || binary.BigEndian.Uint32(packet[head:]) != 67<<16|68 ||
		packet[head+bootp] != 2 || binary.BigEndian.Uint32(packet[options-4:]) != 0x63825363 {
		return ""
	}
	for o := packet[options:]; len(o) > 1 && o[0] != 255; {
		if o[0] == 0 {
			o = o[1:]
			continue
		}
		n := int(o[1])
		if len(o) < 2+n {
			break
		}
		if o[0] == server && n == 4 {
			return netip.AddrFrom4([4]byte(o[2:6])).String()
		}
		o = o[2+n:]
	}
	return netip.AddrFrom4([4]byte(packet[12:16])).String()
}
