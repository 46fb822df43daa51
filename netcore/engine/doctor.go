package engine

import (
	"context"
	"fmt"
	"net"

	"clonecluster/netcore/api"
	"clonecluster/netcore/doctor"
	"clonecluster/netcore/filter"
	"clonecluster/netcore/membership"
)

// openDoctor prepares what looks whether the network cooperates.
func (e *engine) openDoctor() (err error) {
	ifi, err := net.InterfaceByIndex(e.nic.Index)
	if err != nil {
		return fmt.Errorf("looking for the MTU of %s: %w", e.nic.Name, err)
	}
	if e.sockets, err = doctor.OpenSockets(*ifi, e.vips); err != nil {
		return err
	}
	e.doctor = doctor.NewDoctor(doctor.Options{
		Config: doctor.Config{CloneMAC: [6]byte(e.opt.Config.VIP.CloneMAC), MTU: ifi.MTU},
		Codec:  newCodec(e.opt.Config), Wire: e.sockets, VIPs: e.vips, Now: monotonic,
		Self: func() membership.Peer { return e.node.View().Self }, Members: e.heardMembers,
		MTU: e.mtu, Dropped: e.dropped, Announce: e.path.Announce, Board: e.findings, Logger: e.log,
	})
	return nil
}

// hearForDoctor hands the doctor what it is to hear. That it fails is no reason to stop.
func (e *engine) hearForDoctor(ctx context.Context) {
	if err := e.sockets.Run(ctx, e.doctor); err != nil {
		e.log.Warn("the network is no longer examined", "error", err)
	}
}

// heardMembers are the nodes that are heard; true: who hears this one as well.
func (e *engine) heardMembers() map[membership.NodeID]bool {
	heard := map[membership.NodeID]bool{}
	for _, m := range e.node.View().Members {
		if !m.Self {
			heard[m.ID] = m.Live
		}
	}
	return heard
}

// mtu is that of the NIC now, in bytes; 0: it cannot be told.
func (e *engine) mtu() int {
	ifi, err := net.InterfaceByIndex(e.nic.Index)
	if err != nil {
		return 0
	}
	return ifi.MTU
}

// dropped counts what the doctor's own sockets do not hear: the programs drop it before,
// and raw's filter sees no frames but those of clients. It is as of the last status.
func (e *engine) dropped() doctor.Dropped {
	c := e.verdicts.Load()
	if c == nil { // the doctor begins with what there was before it
		now := e.filter.Counters()
		c = &now
	}
	return doctor.Dropped{RARPs: c[filter.DropCloneRARP], FromClone: c[filter.DropCloneSource], Conflicts: c[filter.DropConflict]}
}

// Examine has the network examined.
func (b backend) Examine(burst int, who string) error {
	if err := b.doctor.Examine(burst); err != nil {
		return err
	}
	b.log.Info("the network is examined", "by", who, "burst", burst)
	return nil
}

// Examination is how far that is.
func (b backend) Examination() api.Examination { return b.doctor.Examination() }
