package engine_test

import (
	"fmt"
	"net"
	"net/netip"
	"sync"
	"syscall"
	"testing"
	"time"

	"clonecluster/netcore/api"
)

// TestServiceNotAnswering: a service whose queue of connections is full answers no SYN,
// while its node's beacons are fine. Its clients' SYNs are noticed by the node and by
// another one, and the health check, which would come in a minute, comes at once.
func TestServiceNotAnswering(t *testing.T) {
	c := newCluster(t, 2)
	writeConfig(t, c.config, "interval: 1s", "interval: 60s", "fall: 3", "fall: 2")
	hung := c.nodes[1]
	hung.Sysctl("net.core.somaxconn", "1")
	c.nodes[0].StartHTTP()
	httpd := hung.Start("httpd", hung.Name, hung.sickness())
	httpd.Await(0, "httpd ready")
	for _, n := range c.nodes {
		n.start()
	}
	c.agree(c.nodes...)

	done := make(chan struct{})
	var clients sync.WaitGroup
	defer clients.Wait()
	defer close(done)
	for i := range 6 {
		own := fmt.Sprintf("10.77.0.%d", 201+i)
		c.client.Run("ip", "address", "add", own+"/24", "dev", "eth0")
		clients.Go(func() {
			_ = c.client.Do(func() error {
				d := net.Dialer{LocalAddr: net.TCPAddrFromAddrPort(netip.AddrPortFrom(netip.MustParseAddr(own), 0)), Timeout: 4 * time.Second}
				for {
					select {
					case <-done:
						return nil
					case <-time.After(50 * time.Millisecond):
					}
					if conn, err := d.Dial("tcp4", vip4+":80"); err == nil {
						_ = conn.Close()
					}
				}
			})
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

	httpd.Signal(syscall.SIGSTOP)
	begin := time.Now()
	defer httpd.Signal(syscall.SIGCONT)
	tells(t, operator, hung.MAC, "finding "+hung.MAC+": service-not-answering, critical (this node does not answer: ", "unwell "+hung.MAC, "map ")
	took := time.Since(begin)
	t.Logf("noticed, checked and moved after %v", took.Round(100*time.Millisecond))
	if took > 15*time.Second {
		t.Errorf("that took %v; the check by itself comes once in 60s", took)
	}
	tells(t, operator, c.nodes[0].MAC, "finding "+c.nodes[0].MAC+": service-not-answering, critical (", "cleared "+c.nodes[0].MAC+": service-not-answering")
	tells(t, operator, hung.MAC, "cleared "+hung.MAC+": service-not-answering")
}
