package uinit

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// mount is one file system that the appliance needs.
type mount struct {
	Type, Target, Options string
	Flags                 uintptr
}

const hardened = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC

// mounts are in the order in which they depend on each other. The kernel mounts
// devtmpfs by itself only on a disk, not on an initramfs.
var mounts = []mount{
	{"proc", "/proc", "", hardened},
	{"sysfs", "/sys", "", hardened},
	{"bpf", "/sys/fs/bpf", "mode=0700", hardened},
	{"devtmpfs", "/dev", "mode=0755", unix.MS_NOSUID | unix.MS_NOEXEC},
	{"devpts", "/dev/pts", "mode=0620,ptmxmode=0666", unix.MS_NOSUID | unix.MS_NOEXEC},
	{"tmpfs", "/dev/shm", "mode=1777,size=25%", hardened},
	{"tmpfs", "/run", "mode=0755,size=16m", hardened},
	{"tmpfs", "/tmp", "mode=1777,size=25%", hardened},
}

// mountAll mounts what can be mounted. What is there already is fine.
func mountAll(all []mount) error {
	var errs []error
	for _, m := range all {
		if err := os.MkdirAll(m.Target, 0o755); err != nil {
			errs = append(errs, fmt.Errorf("mounting %s: %w", m.Target, err))
			continue
		}
		if err := unix.Mount(m.Type, m.Target, m.Type, m.Flags, m.Options); err != nil && !errors.Is(err, unix.EBUSY) {
			errs = append(errs, fmt.Errorf("mounting %s: %w", m.Target, err))
		}
	}
	return errors.Join(errs...)
}

// unmountAll undoes every mount that could hold data, the last first.
func unmountAll(mountsFile string) {
	b, err := os.ReadFile(mountsFile)
	if err != nil {
		return
	}
	var targets []string
	for line := range strings.SplitSeq(string(b), "\n") {
		f := strings.Fields(line)
		if len(f) < 3 {
			continue
		}
		switch f[2] {
		case "proc", "sysfs", "devtmpfs", "devpts", "rootfs", "ramfs":
			continue
		case "bpf": // what keeps frames with the clone MAC from leaving ends with it
			continue
		}
		targets = append(targets, f[1])
	}
	for _, t := range slices.Backward(targets) {
		if t == "/" {
			_ = unix.Mount("", t, "", unix.MS_REMOUNT|unix.MS_RDONLY, "")
			continue
		}
		if unix.Unmount(t, 0) != nil {
			_ = unix.Unmount(t, unix.MNT_DETACH)
		}
	}
}

// setting is one kernel parameter below /proc/sys.
type setting struct{ Path, Value string }

// settings make the kernel a server's. Each says why; the rest are the kernel's
// defaults, which suit.
var settings = []setting{
	// A node that is broken must go away and come back: its peers take over.
	{"kernel/panic", "10"},
	{"kernel/panic_on_oops", "1"},
	// The console is for init's lines; of the kernel only warnings and worse.
	// Everything stays readable in /dev/kmsg.
	{"kernel/printk", "5 4 1 7"},
	// Ctrl-Alt-Del is a signal to init, not a reset.
	{"kernel/ctrl-alt-del", "0"},
	// A pointer in a log is of no use to its reader but an attacker.
	{"kernel/kptr_restrict", "1"},
	// A burst of connections waits in the queue instead of being dropped.
	{"net/core/somaxconn", "4096"},
	{"net/ipv4/tcp_max_syn_backlog", "4096"},
	{"net/ipv4/tcp_syncookies", "1"},
	// Keep-alive connections pause between requests; a new slow start after
	// each pause would only make the answer slower.
	{"net/ipv4/tcp_slow_start_after_idle", "0"},
	// Path MTU discovery must survive routers that drop the ICMP errors.
	{"net/ipv4/tcp_mtu_probing", "1"},
	// Clients that vanish hold their sockets for two minutes instead of two
	// hours, for programs that turn keep-alive on.
	{"net/ipv4/tcp_keepalive_time", "60"},
	{"net/ipv4/tcp_keepalive_intvl", "15"},
	{"net/ipv4/tcp_keepalive_probes", "4"},
	// The NIC must not answer ARP for the VIP with its own address, and must
	// not ask with the VIP as its own: from the first moment, and so before
	// the NIC is up and the engine has said so itself.
	{"net/ipv4/conf/all/arp_ignore", "1"},
	{"net/ipv4/conf/default/arp_ignore", "1"},
	{"net/ipv4/conf/all/arp_announce", "2"},
	{"net/ipv4/conf/default/arp_announce", "2"},
	// The VIP in a frame for everybody would be taken by every node. The VIP's
	// frames come to one node, by clone0; nothing else is for it. DHCP servers
	// do send so (RFC 2131 section 4.1), but the DHCP client reads a packet
	// socket, which comes before this. IPv6 asks the device alone, not "all", and
	// one that is there already has not the default: hence every one.
	{"net/ipv4/conf/*/drop_unicast_in_l2_multicast", "1"},
	{"net/ipv6/conf/*/drop_unicast_in_l2_multicast", "1"},
	// Nobody on the segment may change a node's routes or addresses.
	{"net/ipv4/conf/all/accept_redirects", "0"},
	{"net/ipv4/conf/default/accept_redirects", "0"},
	{"net/ipv4/conf/all/send_redirects", "0"},
	{"net/ipv4/conf/default/send_redirects", "0"},
	{"net/ipv4/conf/all/accept_source_route", "0"},
	{"net/ipv4/conf/default/accept_source_route", "0"},
	{"net/ipv6/conf/*/accept_redirects", "0"},
	{"net/ipv6/conf/*/accept_ra", "0"},
}

// applySettings writes what the kernel has; a path with * is written for every
// match. What it does not have is told at debug level: kernels differ.
func applySettings(root string, all []setting, log *slog.Logger) {
	for _, s := range all {
		paths, err := filepath.Glob(filepath.Join(root, s.Path))
		if err != nil || len(paths) == 0 {
			log.Debug("the kernel has no such setting", "sysctl", s.Path)
			continue
		}
		for _, p := range paths {
			if err := writeExisting(p, s.Value); err != nil {
				log.Warn("sysctl", "error", err)
			}
		}
	}
}

// writeExisting writes without creating: a file that is missing is an answer.
func writeExisting(path, text string) error {
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString(text)
	return errors.Join(err, f.Close())
}

// openConsole makes the console of the configuration, else the one of the
// kernel, init's input and output. The kernel's may be missing: then the output
// goes nowhere, which is still better than not to run.
func openConsole(dev, name string) (*os.File, error) {
	var errs []error
	for _, n := range []string{name, "console", "null"} {
		if n == "" {
			continue
		}
		f, err := os.OpenFile(filepath.Join(dev, n), os.O_RDWR|unix.O_NOCTTY, 0)
		if err != nil {
			errs = append(errs, fmt.Errorf("opening the console: %w", err))
			continue
		}
		for fd := range 3 { // what the Go runtime prints when it gives up goes here, too
			_ = unix.Dup3(int(f.Fd()), fd, 0)
		}
		return f, errors.Join(errs...)
	}
	return nil, errors.Join(errs...)
}

// clockFloor is before any moment at which this program can run. A machine with
// an empty battery, or none, starts in 1970 or 2000, which confuses whatever
// compares times; the clock is then set here. It is a constant and not the time
// of the build, so that a build gives the same bytes every time.
var clockFloor = time.Date(2026, time.January, 1, 0, 0, 0, 0, time.UTC)

// clockToSet is the time to set a clock that shows now to, and whether to.
func clockToSet(now time.Time) (time.Time, bool) {
	return clockFloor, now.Before(clockFloor)
}

func setClock(log *slog.Logger) {
	now := time.Now()
	to, wrong := clockToSet(now)
	if !wrong {
		return
	}
	tv := unix.NsecToTimeval(to.UnixNano())
	if err := unix.Settimeofday(&tv); err != nil {
		log.Warn("the clock is wrong and cannot be set", "clock", now.UTC().Format(time.DateOnly), "error", err)
		return
	}
	log.Warn("the clock was wrong (no battery?); times in logs are not real", "clock", now.UTC().Format(time.DateOnly), "set", to.Format(time.DateOnly))
}

// waitEntropy waits until the kernel's random numbers are good, but not for
// ever: the keys of this boot are derived from the cluster's key, and a node
// that waits serves nobody.
func waitEntropy(most time.Duration, log *slog.Logger) {
	var b [1]byte
	if _, err := unix.Getrandom(b[:], unix.GRND_NONBLOCK); !errors.Is(err, unix.EAGAIN) {
		return
	}
	done := make(chan struct{})
	start := time.Now()
	go func() { // ends with the system call, at the latest with the machine
		defer close(done)
		for {
			if _, err := unix.Getrandom(b[:], 0); !errors.Is(err, unix.EINTR) {
				return
			}
		}
	}()
	t := time.NewTimer(most)
	defer t.Stop()
	select {
	case <-done:
		log.Info("random numbers are ready", "waited", time.Since(start).Round(time.Millisecond))
	case <-t.C:
		log.Warn("random numbers are still not ready; going on (does the machine have a virtio-rng or RDRAND?)", "waited", most)
	}
}

// hostName is the node's name: the cluster's, as far as it fits the kernel's 64
// bytes, and the last three bytes of the NIC's permanent address.
func hostName(cluster string, mac []byte) string {
	if len(mac) < 3 {
		return cluster
	}
	const most = 64 - len("-aabbcc")
	if len(cluster) > most {
		cluster = strings.TrimRight(cluster[:most], "-")
	}
	return fmt.Sprintf("%s-%x", cluster, mac[len(mac)-3:])
}
