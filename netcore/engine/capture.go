package engine

import (
	"context"
	"fmt"
	"io"
	"net"

	"clonecluster/netcore/bpf"
	"clonecluster/netcore/capture"
	"clonecluster/netcore/filter"
	"clonecluster/netcore/membership"
	"clonecluster/netcore/sockdiag"
)

// Capture shows what passes the NIC, but for what this API says at the VIP: that would
// be a capture of itself.
func (b backend) Capture(ctx context.Context, q capture.Query, w io.Writer, flush func() error) error {
	sockets, err := sockdiag.Open(0)
	if err != nil {
		return fmt.Errorf("asking for sockets: %w", err)
	}
	defer sockets.Close()
	name := b.host
	if name == "" {
		name = b.self()
	}
	ingress := b.ingress()
	about := fmt.Sprintf("node %s, %s, datapath %s, frames judged by %s", b.self(), b.nic.Name, b.datapath, ingress)
	if ingress == string(bpf.XDP) {
		about += "; " + capture.WithoutDropped
	}
	return capture.Run(ctx, capture.Config{
		Interface: &net.Interface{Index: b.nic.Index, Name: b.nic.Name, HardwareAddr: b.nic.MAC}, Name: name, Description: about,
		EtherType: membership.EtherType,
		Look: func(frame []byte, left bool) filter.Seen {
			return b.filter.Look(frame, left, monotonic(), sockets)
		},
		Skip: func(s filter.Seen) bool {
			return int(s.Tuple.VIP.Port()) == b.opt.Config.Management.Port && s.Tuple.Proto == filter.ProtoTCP
		},
	}, q, w, flush)
}
