package raw

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"clonecluster/netcore/clone"
)

// offloads are what the kernel may leave undone in frames it hands to us; the
// NIC, or the kernel on its behalf, does it when we send them. The numbers are
// those of linux/if_tun.h; UDP segmentation is Linux 6.2.
const (
	offloadsTCP = 0x01 | 0x02 | 0x04 | 0x08 // TUN_F_CSUM, _TSO4, _TSO6, _TSO_ECN
	offloadsUDP = 0x20 | 0x40               // TUN_F_USO4, _USO6
)

// openTAP attaches to the TAP of that name, and creates it if there is none. A
// persistent TAP that a crashed engine left is taken up as it is, with its
// addresses, routes and the kernel's sockets on it.
func openTAP(name string) (*os.File, error) {
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("opening /dev/net/tun (is TUN in the kernel?): %w", err)
	}
	if err := attachTAP(fd, name); err != nil {
		_ = unix.Close(fd)
		if errors.Is(err, unix.EBUSY) {
			err = clone.ErrBusy
		}
		return nil, fmt.Errorf("attaching to TAP %s: %w", name, err)
	}
	return os.NewFile(uintptr(fd), name), nil
}

func attachTAP(fd int, name string) error {
	req, err := unix.NewIfreq(name)
	if err != nil {
		return err
	}
	req.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
	if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, req); err != nil {
		return os.NewSyscallError("TUNSETIFF", err)
	}
	if err := unix.IoctlSetPointerInt(fd, unix.TUNSETVNETHDRSZ, vnetHdrLen); err != nil {
		return os.NewSyscallError("TUNSETVNETHDRSZ", err)
	}
	err = unix.IoctlSetInt(fd, unix.TUNSETOFFLOAD, offloadsTCP|offloadsUDP)
	if errors.Is(err, unix.EINVAL) {
		err = unix.IoctlSetInt(fd, unix.TUNSETOFFLOAD, offloadsTCP)
	}
	return os.NewSyscallError("TUNSETOFFLOAD", err)
}

// setPersistent says whether the TAP outlives its file.
func setPersistent(tap *os.File, on bool) error {
	rc, err := tap.SyscallConn()
	if err != nil {
		return err
	}
	value, inner := 0, error(nil)
	if on {
		value = 1
	}
	if err := rc.Control(func(fd uintptr) {
		inner = unix.IoctlSetInt(int(fd), unix.TUNSETPERSIST, value)
	}); err != nil {
		return err
	}
	return os.NewSyscallError("TUNSETPERSIST", inner)
}
