package engine_test

import (
	"fmt"
	"net"
	"net/netip"
	"os/exec"
	"sync"
	"syscall"
	"testing"
	"time"

	"clonecluster/netcore/api"
	"clonecluster/netcore/bpf"
)

// knock connects to the VIP again and again, and hangs up, until done is closed.
func (c *cluster) knock(done <-chan struct{}, pause time.Duration, d net.Dialer) {
	_ = c.client.Do(func() error {
		for {
			select {
			case <-done:
				return nil
			case <-time.After(pause):
			}
			if conn, err := d.Dial("tcp4", vip4+":80"); err == nil {
				_ = conn.Close()
			}
		}
	})
}

// TestServiceNotAnswering: a firewall drops the SYNs of a service that is sick besides,
// while its node's beacons are fine. (One that is stopped would be late, which a machine
// without time, such as that of a test, is forgiven for a while.) Its clients' SYNs are noticed by the node and by
// another one, and the health check, which would come in a minute, comes at once.
func TestServiceNotAnswering(t *testing.T) {
	if _, err := exec.LookPath("nft"); err != nil {
		t.Skip("needs the Debian package nftables")
	}
	c := newCluster(t, 2)
	writeConfig(t, c.config, "interval: 1s", "interval: 60s", "fall: 3", "fall: 2")
	hung := c.nodes[1]
	c.start()

	done := make(chan struct{})
	var clients sync.WaitGroup
	defer clients.Wait()
	defer close(done)
	for i := range 6 {
		own := fmt.Sprintf("10.77.0.%d", 201+i)
		c.client.Run("ip", "address", "add", own+"/24", "dev", "eth0")
		clients.Go(func() {
			c.knock(done, 50*time.Millisecond, net.Dialer{LocalAddr: net.TCPAddrFromAddrPort(netip.AddrPortFrom(netip.MustParseAddr(own), 0)), Timeout: 4 * time.Second})
		})
	}
	operator := c.operator(api.RoleReadOnly, "10.77.0.101", "10.77.0.102")
	all := whole(t, operator, "connections are counted by all nodes", func(all api.Cluster) bool {
		for _, n := range all.Nodes {
			if n.Status == nil || n.Status.Offered.SYNsPerSecond < 10 || n.Status.Offered.FramesPerSecond < 30 {
				return false
			}
		}
		return len(all.Nodes) == 2
	})
	time.Sleep(3 * time.Second)
	if all = whole(t, operator, "all answer", allAnswer(2)); len(all.Nodes[0].Status.Findings)+len(all.Nodes[1].Status.Findings) > 0 {
		t.Errorf("findings while all is well: %+v, %+v", all.Nodes[0].Status.Findings, all.Nodes[1].Status.Findings)
	}

	hung.setSick(true)
	hung.Run("nft", `add table inet hang; add chain inet hang input { type filter hook input priority 0; }; add rule inet hang input iifname "clone0" tcp dport 80 tcp flags & (syn | ack) == syn drop`)
	begin := time.Now()
	tells(t, operator, hung.MAC, "finding "+hung.MAC+": service-not-answering, critical (this node does not answer: ", "unwell "+hung.MAC, "map ")
	took := time.Since(begin)
	t.Logf("noticed, checked and moved after %v", took.Round(100*time.Millisecond))
	if took > 15*time.Second {
		t.Errorf("that took %v; the check by itself comes once in 60s", took)
	}
	tells(t, operator, c.nodes[0].MAC, "finding "+c.nodes[0].MAC+": service-not-answering, critical (", "cleared "+c.nodes[0].MAC+": service-not-answering")
	tells(t, operator, hung.MAC, "cleared "+hung.MAC+": service-not-answering")
}

// TestLeaseless: what comes for a node whose engine hangs is dropped by its kernel, as its lease
// has ended, and counted as that once the engine goes on; the other node's lease has not.
func TestLeaseless(t *testing.T) {
	if err := bpf.Probe(); err != nil {
		t.Skip(err) // the frames of a raw datapath wait for its engine
	}
	c := newCluster(t, 2)
	for _, n := range c.nodes {
		n.datapath = "bpf"
	}
	c.start()
	done := make(chan struct{})
	var clients sync.WaitGroup
	defer clients.Wait()
	defer close(done)
	for range 4 {
		clients.Go(func() { c.knock(done, 10*time.Millisecond, net.Dialer{Timeout: 50 * time.Millisecond}) })
	}
	operator := c.operator(api.RoleReadOnly, "10.77.0.101", "10.77.0.102")
	leaseless := func(all api.Cluster, of *node) uint64 {
		for _, n := range all.Nodes {
			if n.Node == of.MAC && n.Status != nil {
				return n.Status.Offered.Leaseless
			}
		}
		return 0
	}
	awake, hung := c.nodes[0], c.nodes[1]
	all := whole(t, operator, "connections are counted by all nodes", func(all api.Cluster) bool {
		return allAnswer(2)(all) && all.Nodes[0].Status.Offered.SYNsPerSecond > 10 && all.Nodes[1].Status.Offered.SYNsPerSecond > 10
	})
	if n := leaseless(all, awake) + leaseless(all, hung); n != 0 {
		t.Errorf("%d frames had no lease while all is well", n)
	}
	hung.cloned.Signal(syscall.SIGSTOP)
	time.Sleep(2 * time.Second) // the lease lasts 0.2
	hung.cloned.Signal(syscall.SIGCONT)
	all = whole(t, operator, "what was dropped without a lease is counted", func(all api.Cluster) bool {
		return allAnswer(2)(all) && leaseless(all, hung) > 10
	})
	if n := leaseless(all, awake); n != 0 {
		t.Errorf("%d frames had no lease at the node that did not hang", n)
	}
}
