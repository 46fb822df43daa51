// Package datagram reads the sockets of the servers for network boot.
package datagram

import (
	"context"
	"errors"
	"net"
)

// maxSize is an Ethernet frame's payload: what no client of DHCP or TFTP exceeds
// in a request.
const maxSize = 1500

// Read hands the datagrams of a socket on, one at a time, until ctx ends, when it
// gives nil. Who ends ctx sets a deadline in the past. The data is the reader's
// again after each call.
func Read(ctx context.Context, c net.PacketConn, handle func(data []byte, from net.Addr)) error {
	buf := make([]byte, maxSize)
	for {
		n, from, err := c.ReadFrom(buf)
		if ctx.Err() != nil {
			return nil
		}
		var t net.Error
		switch {
		case err == nil:
			handle(buf[:n], from)
		case errors.As(err, &t) && t.Timeout():
		default:
			return err
		}
	}
}
