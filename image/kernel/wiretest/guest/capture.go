package main

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"time"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
	"github.com/gopacket/gopacket/pcapgo"
	"golang.org/x/sys/unix"

	"clonecluster/image/kernel/wiretest"
)

// capture is a pcap in the making of all that arrives at the far end.
type capture struct {
	fd   int
	done chan error
	file bytes.Buffer
	// Closed at the first report of group membership: the kernel sends them a
	// little later by itself.
	igmp, mld chan struct{}
}

func htons(v uint16) uint16 { return v<<8 | v>>8 }

// startCapture returns once every further frame will be in the capture.
func (b *bench) startCapture() (*capture, error) {
	c := &capture{done: make(chan error, 1), igmp: make(chan struct{}), mld: make(chan struct{})}
	err := b.far.do(func() error {
		ifi, err := net.InterfaceByName(farVeth)
		if err != nil {
			return err
		}
		if c.fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0); err != nil {
			return err
		}
		tv := unix.NsecToTimeval(int64(patience))
		return errors.Join(
			unix.SetsockoptInt(c.fd, unix.SOL_PACKET, unix.PACKET_IGNORE_OUTGOING, 1),
			unix.SetsockoptInt(c.fd, unix.SOL_PACKET, unix.PACKET_AUXDATA, 1),
			unix.SetsockoptInt(c.fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 16<<20),
			unix.SetsockoptTimeval(c.fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv),
			unix.Bind(c.fd, &unix.SockaddrLinklayer{Protocol: htons(unix.ETH_P_ALL), Ifindex: ifi.Index}),
		)
	})
	if err != nil {
		return nil, fmt.Errorf("capturing: %w", err)
	}
	go func() { c.done <- c.read() }()
	return c, nil
}

// wait returns the capture once the mark of its end is in it.
func (c *capture) wait() ([]byte, error) {
	err := <-c.done
	unix.Close(c.fd)
	if err != nil {
		return nil, fmt.Errorf("capturing: %w", err)
	}
	return c.file.Bytes(), nil
}

func (c *capture) read() error {
	w := pcapgo.NewWriter(&c.file)
	if err := w.WriteFileHeader(1<<18, layers.LinkTypeEthernet); err != nil {
		return err
	}
	igmp, mld := c.igmp, c.mld
	buf, oob := make([]byte, 1<<18), make([]byte, 256)
	for {
		n, oobn, _, _, err := unix.Recvmsg(c.fd, buf, oob, 0)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return err
		}
		frame := withTag(buf[:n], oob[:oobn])
		info := gopacket.CaptureInfo{Timestamp: time.Now(), CaptureLength: len(frame), Length: len(frame)}
		if err := w.WritePacket(info, frame); err != nil {
			return err
		}
		switch {
		case igmp != nil && isIGMP(buf[:n]):
			close(igmp)
			igmp = nil
		case mld != nil && isMLD(buf[:n]):
			close(mld)
			mld = nil
		}
		if bytes.HasSuffix(bytes.TrimRight(frame, "\x00"), []byte(wiretest.MarkEnd)) {
			return nil
		}
	}
}

// membership waits for reports of group membership.
func (c *capture) membership() error {
	timeout := time.After(patience)
	for _, seen := range []chan struct{}{c.igmp, c.mld} {
		select {
		case <-seen:
		case <-timeout:
			return errors.New("no report of group membership")
		}
	}
	return nil
}

func isIGMP(frame []byte) bool {
	return len(frame) > 23 && binary.BigEndian.Uint16(frame[12:]) == unix.ETH_P_IP && frame[23] == unix.IPPROTO_IGMP
}

// isMLD goes by the hop-by-hop header, which nothing else has here.
func isMLD(frame []byte) bool {
	return len(frame) > 20 && binary.BigEndian.Uint16(frame[12:]) == unix.ETH_P_IPV6 && frame[20] == unix.IPPROTO_HOPOPTS
}

// withTag puts the VLAN tag back that the kernel takes out of a frame before
// packet sockets see it: struct tpacket_auxdata, packet(7).
func withTag(frame, oob []byte) []byte {
	msgs, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return frame
	}
	for _, m := range msgs {
		if m.Header.Level != unix.SOL_PACKET || m.Header.Type != unix.PACKET_AUXDATA || len(m.Data) < 20 {
			continue
		}
		status := binary.NativeEndian.Uint32(m.Data)
		if status&unix.TP_STATUS_VLAN_VALID == 0 {
			continue
		}
		var tag [4]byte
		binary.BigEndian.PutUint16(tag[:], binary.NativeEndian.Uint16(m.Data[18:]))
		binary.BigEndian.PutUint16(tag[2:], binary.NativeEndian.Uint16(m.Data[16:]))
		return append(append(append([]byte{}, frame[:12]...), tag[:]...), frame[12:]...)
	}
	return append([]byte{}, frame...)
}

// mark sends a mark from the device under test, with the header left to the
// kernel.
func mark(dev, text string) error {
	ifi, err := net.InterfaceByName(dev)
	if err != nil {
		return err
	}
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	to := &unix.SockaddrLinklayer{Protocol: htons(wiretest.EtherType), Ifindex: ifi.Index, Halen: 6}
	copy(to.Addr[:], mac(farMAC))
	return unix.Sendto(fd, []byte(text), 0, to)
}
