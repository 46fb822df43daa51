package uinit

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// watchdog is a device of the kernel's watchdog API
// (Documentation/watchdog/watchdog-api.rst): it resets the machine unless it is
// written to in time. u-root's pkg/watchdog is not used: its SetTimeout hands
// the kernel nanoseconds where seconds are wanted.
type watchdog struct {
	f        *os.File
	Device   string        `json:"device"`
	Identity string        `json:"identity"`
	Timeout  time.Duration `json:"-"`
}

// softdog is the identity of the kernel's watchdog in software, which cannot
// help when the kernel itself stands still.
const softdog = "Software Watchdog"

// openWatchdog arms the best watchdog there is, hardware before software, with
// at most the timeout.
func openWatchdog(classDir, devDir string, timeout time.Duration) (*watchdog, error) {
	found, err := filepath.Glob(filepath.Join(classDir, "watchdog[0-9]*"))
	if err != nil || len(found) == 0 {
		return nil, errors.New("this machine has no watchdog")
	}
	type candidate struct{ name, identity string }
	var all []candidate
	for _, dir := range found {
		b, _ := os.ReadFile(filepath.Join(dir, "identity"))
		all = append(all, candidate{filepath.Base(dir), strings.TrimSpace(string(b))})
	}
	slices.SortStableFunc(all, func(a, b candidate) int {
		if (a.identity == softdog) != (b.identity == softdog) {
			if a.identity == softdog {
				return 1
			}
			return -1
		}
		return strings.Compare(a.name, b.name)
	})
	var errs []error
	for _, c := range all {
		w, err := armWatchdog(filepath.Join(devDir, c.name), c.identity, timeout)
		if err == nil {
			return w, nil
		}
		errs = append(errs, err)
	}
	return nil, errors.Join(errs...)
}

func armWatchdog(device, identity string, timeout time.Duration) (*watchdog, error) {
	f, err := os.OpenFile(device, os.O_WRONLY, 0)
	if err != nil {
		return nil, fmt.Errorf("opening a watchdog: %w", err)
	}
	w := &watchdog{f: f, Device: device, Identity: identity}
	fd := int(f.Fd())
	// The answer is what the hardware can do; a driver with one fixed time
	// refuses, and its own is read instead.
	seconds := int(timeout / time.Second)
	if err := unix.IoctlSetPointerInt(fd, unix.WDIOC_SETTIMEOUT, seconds); err != nil && !errors.Is(err, unix.EOPNOTSUPP) && !errors.Is(err, unix.EINVAL) {
		w.disarm()
		return nil, fmt.Errorf("setting the time of %s: %w", device, err)
	}
	got, err := unix.IoctlGetInt(fd, unix.WDIOC_GETTIMEOUT)
	if err != nil {
		got = seconds
	}
	w.Timeout = time.Duration(got) * time.Second
	if err := longEnough(w.Timeout); err != nil {
		w.disarm()
		return nil, fmt.Errorf("%s (%s): %w", device, identity, err)
	}
	return w, nil
}

// longEnough is an error for a time within which one late feeding would be a
// reset. None is better than one that resets a machine that is well.
func longEnough(timeout time.Duration) error {
	if timeout < 3*feedPeriod {
		return fmt.Errorf("a watchdog that waits for %v is no use, it must be at least %v", timeout, 3*feedPeriod)
	}
	return nil
}

func (w *watchdog) feed() error {
	_, err := w.f.Write([]byte{1})
	return err
}

// disarm is the magic close: without the V the machine would be reset.
func (w *watchdog) disarm() {
	_, _ = w.f.Write([]byte("V"))
	_ = w.f.Close()
}
