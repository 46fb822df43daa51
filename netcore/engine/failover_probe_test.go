package engine_test

import (
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"runtime"
	"slices"
	"sync"
	"testing"
	"time"
	"unsafe"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"

	"clonecluster/config"
	"clonecluster/netcore/filter"
	"clonecluster/netcore/realtime"
)

// A prober is a host that sends bare SYNs to port 80 of the VIP and sees who
// answers, bucket by bucket. It has no sockets for them, so its kernel resets
// what was answered, and nothing is left of it.
type prober struct {
	cluster *cluster
	fd      int // packet socket
	source  net.HardwareAddr
	filter  *filter.Filter
	ports   [filter.Buckets][]uint16 // source ports by bucket
	next    [filter.Buckets]int

	mu      sync.Mutex
	change  *sync.Cond
	answers map[uint16]answer // by source port
}

// An answer is the first SYN-ACK to a port.
type answer struct {
	from string // wire MAC
	at   time.Time
}

var proberAddr = netip.MustParseAddr("10.77.0.2")

func newProber(t testing.TB, c *cluster) *prober {
	t.Helper()
	host := c.Host("prober", "", proberAddr.String()+"/24")
	p := &prober{cluster: c, answers: map[uint16]answer{}}
	p.change = sync.NewCond(&p.mu)
	if err := p.findPorts(c.config); err != nil {
		t.Fatalf("finding a port for each bucket: %v", err)
	}
	if err := host.Do(p.open); err != nil {
		t.Fatalf("opening the prober's socket: %v", err)
	}
	stop := make(chan struct{})
	var receiving sync.WaitGroup
	receiving.Go(func() { p.receive(stop) })
	t.Cleanup(func() {
		close(stop)
		receiving.Wait()
		unix.Close(p.fd)
	})
	return p
}

// findPorts sorts the prober's source ports by the bucket they fall into.
func (p *prober) findPorts(file string) error {
	cfg, err := config.LoadFile(file)
	if err != nil {
		return err
	}
	vip := cfg.VIP.IPv4.Addr()
	f, err := filter.New(filter.Config{
		CloneMAC: [6]byte(cfg.VIP.CloneMAC), VIP4: vip, HashKey: [16]byte(cfg.Cluster.Key.Derive("flow hash", 16)),
	})
	if err != nil {
		return err
	}
	p.filter = f
	for port := 1024; port <= 65535; port++ {
		b := p.bucketOf(netip.AddrPortFrom(proberAddr, uint16(port)))
		p.ports[b] = append(p.ports[b], uint16(port))
	}
	for b := range p.ports {
		if len(p.ports[b]) < 10 {
			return fmt.Errorf("bucket %d has %d", b, len(p.ports[b]))
		}
	}
	return nil
}

// open opens the packet socket, which hears nothing but SYN-ACKs.
func (p *prober) open() error {
	ifi, err := net.InterfaceByName("eth0")
	if err != nil {
		return err
	}
	p.source = ifi.HardwareAddr
	prog, err := bpf.Assemble([]bpf.Instruction{
		bpf.LoadAbsolute{Off: 23, Size: 1},
		bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: unix.IPPROTO_TCP, SkipTrue: 5},
		bpf.LoadAbsolute{Off: 34, Size: 2},
		bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: 80, SkipTrue: 3},
		bpf.LoadAbsolute{Off: 47, Size: 1},
		bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: 0x12, SkipTrue: 1},
		bpf.RetConstant{Val: 64},
		bpf.RetConstant{Val: 0},
	})
	if err != nil {
		return err
	}
	sockFilter := make([]unix.SockFilter, len(prog))
	for i, ins := range prog {
		sockFilter[i] = unix.SockFilter{Code: ins.Op, Jt: ins.Jt, Jf: ins.Jf, K: ins.K}
	}
	if p.fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0); err != nil {
		return err
	}
	timeout := unix.NsecToTimeval(20e6)
	const ipv4 = unix.ETH_P_IP<<8&0xff00 | unix.ETH_P_IP>>8 // in network order
	return errors.Join(
		unix.SetsockoptSockFprog(p.fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &unix.SockFprog{Len: uint16(len(sockFilter)), Filter: &sockFilter[0]}),
		unix.SetsockoptInt(p.fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 8<<20),
		unix.SetsockoptInt(p.fd, unix.SOL_SOCKET, unix.SO_TIMESTAMPNS, 1),
		unix.SetsockoptTimeval(p.fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &timeout),
		unix.Bind(p.fd, &unix.SockaddrLinklayer{Ifindex: ifi.Index, Protocol: ipv4}),
	)
}

// receive notes the answers with the kernel's time of their arrival.
func (p *prober) receive(stop chan struct{}) {
	frame, oob := make([]byte, 64), make([]byte, 128)
	for {
		select {
		case <-stop:
			return
		default:
		}
		n, oobn, _, _, err := unix.Recvmsg(p.fd, frame, oob, 0)
		if err != nil || n < 54 {
			continue
		}
		at := time.Now()
		if messages, err := unix.ParseSocketControlMessage(oob[:oobn]); err == nil {
			for _, m := range messages {
				if m.Header.Level == unix.SOL_SOCKET && m.Header.Type == unix.SO_TIMESTAMPNS {
					ts := (*unix.Timespec)(unsafe.Pointer(&m.Data[0]))
					at = time.Unix(ts.Unix())
				}
			}
		}
		port := uint16(frame[36])<<8 | uint16(frame[37])
		p.mu.Lock()
		if _, ok := p.answers[port]; !ok {
			p.answers[port] = answer{net.HardwareAddr(frame[6:12]).String(), at}
		}
		p.change.Broadcast()
		p.mu.Unlock()
	}
}

// A knock is a SYN to be sent again and again until somebody opens.
type knock struct {
	bucket int
	port   uint16
	frame  []byte
}

// prepare gives a SYN in that bucket, from the port that was used longest ago.
func (p *prober) prepare(bucket int) knock {
	p.mu.Lock()
	defer p.mu.Unlock()
	ports := p.ports[bucket]
	port := ports[p.next[bucket]%len(ports)]
	p.next[bucket]++
	delete(p.answers, port)
	return knock{bucket, port, syn(p.source, proberAddr, port)}
}

// syn is a SYN to port 80 of the VIP.
func syn(source net.HardwareAddr, from netip.Addr, port uint16) []byte {
	ip := &layers.IPv4{Version: 4, TTL: 64, Protocol: layers.IPProtocolTCP, SrcIP: from.AsSlice(), DstIP: net.ParseIP(vip4).To4()}
	tcp := &layers.TCP{
		SrcPort: layers.TCPPort(port), DstPort: 80, SYN: true, Window: 65535,
		// Higher every time, so that no remainder of a former use refuses it.
		Seq:     uint32(time.Now().UnixNano() >> 10),
		Options: []layers.TCPOption{{OptionType: layers.TCPOptionKindMSS, OptionLength: 4, OptionData: []byte{5, 0xb4}}},
	}
	_ = tcp.SetNetworkLayerForChecksum(ip)
	buf := gopacket.NewSerializeBuffer()
	if err := gopacket.SerializeLayers(buf, gopacket.SerializeOptions{FixLengths: true, ComputeChecksums: true},
		&layers.Ethernet{SrcMAC: source, DstMAC: cloneMAC, EthernetType: layers.EthernetTypeIPv4}, ip, tcp); err != nil {
		panic(fmt.Sprintf("building a SYN: %v", err)) // nothing in it comes from outside
	}
	return buf.Bytes()
}

// answered tells who has answered a knock.
func (p *prober) answered(k knock) (answer, bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	a, ok := p.answers[k.port]
	return a, ok
}

// owners says who takes new connections, by bucket: a node's name, or "" where
// nobody answered twice.
type owners [filter.Buckets]string

// owners knocks in every bucket.
func (p *prober) owners() (o owners) {
	names := map[string]string{}
	for _, n := range p.cluster.nodes {
		names[n.MAC] = n.Name
	}
	for range 2 {
		var knocks []knock
		for b := range o {
			if o[b] != "" {
				continue
			}
			k := p.prepare(b)
			knocks = append(knocks, k)
			_, _ = unix.Write(p.fd, k.frame)
			if b%64 == 63 {
				time.Sleep(time.Millisecond)
			}
		}
		p.await(knocks, 300*time.Millisecond)
		for _, k := range knocks {
			if a, ok := p.answered(k); ok {
				o[k.bucket] = names[a.from]
			}
		}
	}
	return o
}

// await waits until all the knocks are answered or the time is over.
func (p *prober) await(knocks []knock, limit time.Duration) {
	over := false
	timer := time.AfterFunc(limit, func() {
		p.mu.Lock()
		over = true
		p.change.Broadcast()
		p.mu.Unlock()
	})
	defer timer.Stop()
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, k := range knocks {
		for !over {
			if _, ok := p.answers[k.port]; ok {
				break
			}
			p.change.Wait()
		}
	}
}

// firstAnswers knocks in each of the buckets at that interval until all have
// answered or the limit is over, and gives when each answered first. Where
// nobody did, there is nothing in the map.
func (p *prober) firstAnswers(buckets []int, every, limit time.Duration) map[int]time.Time {
	var open []knock
	for _, b := range buckets {
		open = append(open, p.prepare(b))
	}
	first := map[int]time.Time{}
	done := make(chan struct{})
	go func() {
		defer close(done)
		// Never unlocked: the urgency, by which the pace holds, goes with the
		// thread.
		runtime.LockOSThread()
		_, _ = realtime.Thread()
		for next, end := time.Now(), time.Now().Add(limit); len(open) > 0 && next.Before(end); next = latest(next.Add(every), time.Now()) {
			time.Sleep(time.Until(next))
			open = slices.DeleteFunc(open, func(k knock) bool {
				a, ok := p.answered(k)
				if ok {
					first[k.bucket] = a.at
				} else {
					_, _ = unix.Write(p.fd, k.frame)
				}
				return ok
			})
		}
	}()
	<-done
	return first
}

// complete reports whether every bucket has somebody who answers.
func (o *owners) complete() bool { return !slices.Contains(o[:], "") }

// nodes are those that answer, by name, in order.
func (o *owners) nodes() []string {
	return slices.Sorted(maps.Keys(o.count()))
}

func (o *owners) count() map[string]int {
	n := map[string]int{}
	for _, name := range o {
		if name != "" {
			n[name]++
		}
	}
	return n
}

// of are the buckets of a node.
func (o *owners) of(n *node) (buckets []int) {
	for b, name := range o {
		if name == n.Name {
			buckets = append(buckets, b)
		}
	}
	return buckets
}

func (o *owners) String() string { return fmt.Sprint(o.count()) }
