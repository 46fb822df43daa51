package netnstest

import (
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"math"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
	"github.com/gopacket/gopacket/pcapgo"
	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

// snapLen is how much of a frame is kept. Segmentation offload makes frames of
// 64 KB, of which the headers matter.
const snapLen = 2048

// capture takes every frame that enters the bridge. A second socket, whose
// filter passes nothing but violations, cannot miss one for want of room.
type capture struct {
	path     string
	bridge   int          // index of br0, to which the switch hands what it floods
	second   atomic.Int32 // the same of br1; see Bed.Part
	all      int
	witness  int
	file     *os.File
	writer   *pcapgo.Writer
	stopping chan struct{}
	done     sync.WaitGroup
	once     sync.Once

	frames, dropped int
	longest         int
	violations      []string
	err             error
}

// entering is the filter of both sockets: frames that come into the switch.
// Without a source it takes any.
func entering(source net.HardwareAddr) ([]bpf.RawInstruction, error) {
	prog := []bpf.Instruction{
		bpf.LoadExtension{Num: bpf.ExtType},
		bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: unix.PACKET_OUTGOING, SkipTrue: 1},
		bpf.RetConstant{Val: 0},
	}
	if source != nil {
		prog = append(prog,
			bpf.LoadAbsolute{Off: 8, Size: 4},
			bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: binary.BigEndian.Uint32(source[2:]), SkipTrue: 3},
			bpf.LoadAbsolute{Off: 6, Size: 2},
			bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: uint32(binary.BigEndian.Uint16(source)), SkipTrue: 1},
			bpf.RetConstant{Val: math.MaxUint32},
			bpf.RetConstant{Val: 0})
	}
	return bpf.Assemble(append(prog, bpf.RetConstant{Val: math.MaxUint32}))
}

func startCapture(h *Host, path string, cloneMAC net.HardwareAddr) (*capture, error) {
	c := &capture{path: path, stopping: make(chan struct{})}
	file, err := os.Create(path)
	if err != nil {
		return nil, err
	}
	c.file = file
	c.writer = pcapgo.NewWriterNanos(file)
	if err := c.writer.WriteFileHeader(snapLen, layers.LinkTypeEthernet); err != nil {
		return nil, err
	}
	if err := h.Do(func() error {
		ifi, err := net.InterfaceByName("br0")
		if err != nil {
			return err
		}
		c.bridge = ifi.Index
		if c.all, err = openCapture(nil); err != nil {
			return err
		}
		c.witness, err = openCapture(cloneMAC)
		return err
	}); err != nil {
		return nil, err
	}
	c.done.Add(1)
	go c.run()
	return c, nil
}

func openCapture(source net.HardwareAddr) (int, error) {
	prog, err := entering(source)
	if err != nil {
		return 0, err
	}
	// Without a protocol nothing is queued until the filter is in place.
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, fmt.Errorf("opening a packet socket: %w", err)
	}
	filter := make([]unix.SockFilter, len(prog))
	for i, ins := range prog {
		filter[i] = unix.SockFilter{Code: ins.Op, Jt: ins.Jt, Jf: ins.Jf, K: ins.K}
	}
	timeout := unix.NsecToTimeval(20e6)
	const allProtocols = 0x0300 // ETH_P_ALL in network order
	err = errors.Join(
		unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}),
		unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 64<<20),
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &timeout),
		unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: allProtocols}),
	)
	if err != nil {
		unix.Close(fd)
		return 0, fmt.Errorf("preparing a packet socket: %w", err)
	}
	return fd, nil
}

func (c *capture) run() {
	defer c.done.Done()
	buf := make([]byte, snapLen)
	for {
		// Whatever was queued when the stop was asked for is still read.
		last := false
		select {
		case <-c.stopping:
			last = true
		default:
		}
		for {
			n, ifindex, errno := receive(c.all, buf, unix.MSG_TRUNC)
			if errno == unix.EAGAIN {
				break
			}
			if errno == unix.EINTR || errno == unix.ENETDOWN {
				continue
			}
			if errno != 0 {
				c.err = errno
				return
			}
			if c.isBridge(ifindex) || ifindex == 1 || n < 14 {
				continue
			}
			c.frames++
			c.longest = max(c.longest, n)
			info := gopacket.CaptureInfo{Timestamp: time.Now(), CaptureLength: min(n, len(buf)), Length: n}
			if err := c.writer.WritePacket(info, buf[:info.CaptureLength]); err != nil {
				c.err = err
				return
			}
		}
		for {
			n, ifindex, errno := receive(c.witness, buf, unix.MSG_DONTWAIT)
			if errno != 0 {
				break
			}
			if !c.isBridge(ifindex) && len(c.violations) < 20 {
				c.violations = append(c.violations, fmt.Sprintf("interface %d: %s", ifindex, hex.EncodeToString(buf[:min(n, 64)])))
			}
		}
		if last {
			return
		}
	}
}

func (c *capture) isBridge(ifindex int) bool {
	return ifindex == c.bridge || ifindex == int(c.second.Load())
}

// receive is recvfrom(2) without allocations, which tests of other packages
// count. It gives the frame's length and the interface it came by.
func receive(fd int, buf []byte, flags int) (n, ifindex int, errno syscall.Errno) {
	var from unix.RawSockaddrLinklayer
	size := uint32(unsafe.Sizeof(from))
	r, _, errno := unix.Syscall6(unix.SYS_RECVFROM, uintptr(fd), uintptr(unsafe.Pointer(&buf[0])), uintptr(len(buf)),
		uintptr(flags), uintptr(unsafe.Pointer(&from)), uintptr(unsafe.Pointer(&size)))
	return int(r), int(from.Ifindex), errno
}

func (c *capture) stop() (frames, dropped int, violations []string, err error) {
	c.once.Do(func() {
		close(c.stopping)
		c.done.Wait()
		if s, err := unix.GetsockoptTpacketStats(c.all, unix.SOL_PACKET, unix.PACKET_STATISTICS); err == nil {
			c.dropped = int(s.Drops)
		}
		unix.Close(c.all)
		unix.Close(c.witness)
		c.err = errors.Join(c.err, c.file.Close())
	})
	return c.frames, c.dropped, c.violations, c.err
}
