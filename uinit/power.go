package uinit

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Input events as of Documentation/input/input.rst and
// include/uapi/linux/input-event-codes.h.
const (
	inputEventSize = 24 // struct input_event on 64-bit machines
	evKey          = 1
	keyPower       = 116
	keyPowerBit    = keyPower % 64
)

// powerButtons calls pressed for each press of a power button until ctx ends.
// The kernel shows the ACPI button as an input device; other devices, such as
// keyboards, may have the key too.
func powerButtons(ctx context.Context, classDir, devDir string, pressed func()) error {
	found, err := filepath.Glob(filepath.Join(classDir, "event[0-9]*"))
	if err != nil {
		return fmt.Errorf("looking for power buttons: %w", err)
	}
	var wg sync.WaitGroup
	defer wg.Wait()
	n := 0
	var errs []error
	for _, dir := range found {
		caps, err := os.ReadFile(filepath.Join(dir, "device/capabilities/key"))
		if err != nil || !hasPowerKey(string(caps)) {
			continue
		}
		f, err := os.OpenFile(filepath.Join(devDir, filepath.Base(dir)), os.O_RDONLY|unix.O_NONBLOCK, 0)
		if err != nil {
			errs = append(errs, fmt.Errorf("opening a power button: %w", err))
			continue
		}
		n++
		stop := context.AfterFunc(ctx, func() { _ = f.SetReadDeadline(time.Unix(1, 0)) })
		wg.Go(func() {
			defer f.Close()
			defer stop()
			readButton(f, pressed)
		})
	}
	if n == 0 && len(errs) == 0 {
		return errNoPowerButton
	}
	return errors.Join(errs...)
}

var errNoPowerButton = errors.New("this machine has no power button that the kernel knows")

// hasPowerKey reads the bitmap of keys in sysfs: words of 64 bits in
// hexadecimal, the highest first, leading zero words left out.
func hasPowerKey(bitmap string) bool {
	words := strings.Fields(bitmap)
	i := len(words) - 1 - keyPower/64
	if i < 0 {
		return false
	}
	w, err := strconv.ParseUint(words[i], 16, 64)
	return err == nil && w>>keyPowerBit&1 == 1
}

// readButton reads events until the device is gone.
func readButton(f *os.File, pressed func()) {
	buf := make([]byte, 64*inputEventSize)
	for {
		n, err := f.Read(buf)
		for b := buf[:n]; len(b) >= inputEventSize; b = b[inputEventSize:] {
			if isPress(b) {
				pressed()
			}
		}
		if err != nil {
			return
		}
	}
}

// isPress is whether one struct input_event is a press of the power key: type,
// code and value follow the 16 bytes of the time.
func isPress(b []byte) bool {
	return binary.NativeEndian.Uint16(b[16:]) == evKey &&
		binary.NativeEndian.Uint16(b[18:]) == keyPower &&
		binary.NativeEndian.Uint32(b[20:]) == 1
}

// reboot ends the machine. It returns only if the kernel refused.
func reboot(how ending) error {
	cmd := unix.LINUX_REBOOT_CMD_POWER_OFF
	switch how {
	case endRestart:
		cmd = unix.LINUX_REBOOT_CMD_RESTART
	case endHalt:
		cmd = unix.LINUX_REBOOT_CMD_HALT
	}
	if err := unix.Reboot(cmd); err != nil {
		return fmt.Errorf("asking the kernel to %v: %w", how, err)
	}
	return nil
}
