package doctor

import (
	"context"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"clonecluster/netcore/finding"
	"clonecluster/netcore/membership"
	"clonecluster/netcore/netnstest"
)

func TestMain(m *testing.M) { os.Exit(netnstest.Main(m, nil)) }

// TestSocketsHearDHCP: what two DHCP servers say to all is heard by a host whose NIC has an
// address, and by one whose NIC has none, without a look at what clients send.
func TestSocketsHearDHCP(t *testing.T) {
	b := netnstest.NewUnwatched(t)
	hosts := []*netnstest.Host{b.Host("node1", "52:54:00:77:00:01", "10.77.0.101/24"), b.Host("node2", "52:54:00:77:00:02")}
	var doctors []*Doctor
	for i, h := range hosts {
		var s *Sockets
		if err := h.Do(func() error {
			nic, err := net.InterfaceByName("eth0")
			if err == nil {
				s, err = OpenSockets(*nic, []netip.Addr{testVIP, testVIP6})
			}
			return err
		}); err != nil {
			t.Fatal(err)
		}
		// One for IPv4, or for all, would be shown every frame of every client.
		for line := range strings.Lines(h.Run("cat", "/proc/net/packet")) {
			if f := strings.Fields(line); len(f) > 3 && (f[3] == "0800" || f[3] == "0003") {
				t.Errorf("there is a packet socket for protocol %s: %s", f[3], line)
			}
		}
		var now atomic.Int64
		d := NewDoctor(Options{
			Config: Config{CloneMAC: cloneMAC, MTU: 1500}, Codec: membership.NewCodec("test", []byte("k")), Wire: s, VIPs: testVIPs, Now: func() int64 { return now.Add(1) },
			Self: func() membership.Peer { return membership.Peer{ID: id(i + 1), Incarnation: 1} }, Members: func() map[membership.NodeID]bool { return nil },
			Board: finding.NewBoard(nil),
		})
		ctx, stop := context.WithCancel(t.Context())
		ended := make(chan error, 1)
		go func() { ended <- s.Run(ctx, d) }()
		t.Cleanup(func() {
			stop()
			if err := <-ended; err != nil {
				t.Errorf("Run: %v; want nil when the context ends", err)
			}
			s.Close()
		})
		doctors = append(doctors, d)
	}
	for i, address := range []string{"10.77.0.1", "10.77.0.2"} {
		server := b.Host("server"+address[8:], "", address+"/24")
		if err := server.Do(func() error { return offer(address, byte(i+1)) }); err != nil {
			t.Fatal(err)
		}
	}
	for i, d := range doctors {
		heard := func() string {
			d.mu.Lock()
			defer d.mu.Unlock()
			var all []string
			for s := range d.machine.servers {
				all = append(all, s)
			}
			return strings.Join(all, " ")
		}
		for deadline := time.Now().Add(10 * time.Second); !strings.Contains(heard(), "10.77.0.1") || !strings.Contains(heard(), "10.77.0.2"); time.Sleep(10 * time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatalf("node %d has heard of the servers: %q; want 10.77.0.1 and 10.77.0.2", i+1, heard())
			}
		}
	}
}

// offer is what a DHCP server sends to all, by the kernel's UDP.
func offer(from string, server byte) error {
	d := net.Dialer{LocalAddr: &net.UDPAddr{IP: net.ParseIP(from), Port: 67}, Control: func(_, _ string, c syscall.RawConn) (err error) {
		if failed := c.Control(func(fd uintptr) { err = unix.BindToDevice(int(fd), "eth0") }); failed != nil {
			return failed
		}
		return err
	}}
	conn, err := d.Dial("udp4", "255.255.255.255:68")
	if err != nil {
		return err
	}
	defer conn.Close()
	_, err = conn.Write(dhcp(server)[14+20+8:])
	return err
}
