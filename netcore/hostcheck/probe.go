package hostcheck

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/mdlayher/packet"
	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"

	"clonecluster/netcore/neigh"
	"clonecluster/netcore/nic"
)

// A Claim is a host of the segment that says it has a VIP.
type Claim struct {
	VIP netip.Addr
	MAC net.HardwareAddr
}

// probes are how many are sent, evenly over the first half of the patience. RFC 5227
// gives a host two seconds at its own start; a node that starts between others has
// not that long, and a host that answers at all does so within milliseconds.
const probes = 3

// Probe asks the segment who has the VIPs, as a host does that is about to take an
// address (RFC 5227 section 2.1.1, RFC 4862 section 5.4.2): from the wire MAC, and
// without saying that it has it. It returns after patience, or once every VIP is
// answered for. Whatever another node that asks the same says is no claim.
func Probe(ctx context.Context, n nic.NIC, w Want, patience time.Duration) ([]Claim, error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	var mu sync.Mutex
	var claims []Claim
	var errs []error
	var asking sync.WaitGroup
	for _, vip := range w.vips() {
		asking.Go(func() {
			found, err := whoHas(ctx, n, vip, patience/2/probes)
			mu.Lock()
			defer mu.Unlock()
			claims, errs = append(claims, found...), append(errs, err)
		})
	}
	asking.Wait()
	slices.SortFunc(claims, func(a, b Claim) int { return a.VIP.Compare(b.VIP) })
	return claims, errors.Join(errs...)
}

func whoHas(ctx context.Context, n nic.NIC, vip netip.Addr, every time.Duration) (claims []Claim, err error) {
	protocol, source, filter := unix.ETH_P_ARP, netip.IPv4Unspecified(), []bpf.RawInstruction(nil)
	if vip.Is6() {
		protocol, source = unix.ETH_P_IPV6, netip.IPv6Unspecified()
		if filter, err = bpf.Assemble(neigh.AdvertisementFilter); err != nil {
			return nil, fmt.Errorf("assembling the filter of neighbour advertisements: %w", err)
		}
	}
	frame, err := neigh.Question(n.MAC, source, vip)
	if err != nil {
		return nil, fmt.Errorf("building the probe for %v: %w", vip, err)
	}
	conn, err := packet.Listen(&net.Interface{Index: n.Index, Name: n.Name}, packet.Raw, protocol, &packet.Config{Filter: filter})
	if err != nil {
		return nil, fmt.Errorf("opening a socket on %s to ask who has %v: %w", n.Name, vip, err)
	}
	defer conn.Close()
	if vip.Is6() {
		if err := conn.JoinGroup(neigh.AllNodesMAC); err != nil {
			return nil, fmt.Errorf("joining the group of all nodes on %s: %w", n.Name, err)
		}
	}
	end, _ := ctx.Deadline()
	buf := make([]byte, 2048)
	for sent := 0; ctx.Err() == nil; {
		wake := end
		if sent < probes {
			if _, err := conn.WriteTo(frame, &packet.Addr{HardwareAddr: frame[:6]}); err != nil {
				return claims, fmt.Errorf("asking on %s who has %v: %w", n.Name, vip, err)
			}
			sent++
			wake = time.Now().Add(every)
		}
		if err := conn.SetReadDeadline(wake); err != nil {
			return claims, err
		}
		for {
			size, _, err := conn.ReadFrom(buf)
			if errors.Is(err, os.ErrDeadlineExceeded) {
				break
			}
			if err != nil {
				return claims, fmt.Errorf("hearing on %s who has %v: %w", n.Name, vip, err)
			}
			mac := neigh.Claimed(buf[:size], vip)
			if mac == nil {
				continue
			}
			if !slices.ContainsFunc(claims, func(c Claim) bool { return c.MAC.String() == mac.String() }) {
				claims = append(claims, Claim{vip, mac})
			}
			if len(claims) == 1 {
				// Whoever else has it answers the same probe.
				end = time.Now().Add(every)
				if err := conn.SetReadDeadline(end); err != nil {
					return claims, err
				}
				sent = probes
			}
		}
		if !time.Now().Before(end) {
			break
		}
	}
	return claims, nil
}
