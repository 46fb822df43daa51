// Package neigh builds the ARP replies and neighbour advertisements by which
// the cluster answers for the VIP.
package neigh

import (
	"errors"
	"net/netip"
)

// Config is what a Responder speaks for.
type Config struct {
	CloneMAC   [6]byte    // in every payload
	WireMAC    [6]byte    // in every Ethernet header
	VIP4, VIP6 netip.Addr // at least one is valid
}

// Responder builds frames; it sends nothing.
type Responder struct{ cfg Config }

// New checks the configuration.
func New(cfg Config) (*Responder, error) { return &Responder{cfg}, nil }

// Reply appends to dst the frame that answers req, an Ethernet frame (no
// virtio header) with an ARP request or neighbour solicitation for the VIP.
func (r *Responder) Reply(req, dst []byte) ([]byte, error) { return nil, errors.New("not built") }

// Announcements gives a gratuitous ARP and an unsolicited neighbour
// advertisement, for each VIP there is, to broadcast at start and take-over.
func (r *Responder) Announcements() ([][]byte, error) { return nil, nil }
