package qemu

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// AccelOptions are what ChooseAccel needs. The zero value works.
type AccelOptions struct {
	Binary string // empty means qemu-system-x86_64 from the path
	// CacheDir is where the outcome of the trial is kept; empty keeps it for
	// this process only.
	CacheDir string
	Log      *slog.Logger // may be nil
}

// Choice is an accelerator and why it was chosen.
type Choice struct {
	Accel  Accel  `json:"accel"`
	Reason string `json:"reason"`
}

var (
	// choices remembers trials for the life of the process, by cache key. The
	// lock is held during a trial, so that there is only one at a time.
	choices   = make(map[string]Choice)
	choicesMu sync.Mutex
)

// ChooseAccel says whether guests run under KVM or TCG.
//
// That /dev/kvm can be opened does not mean that guests run: where virtualisation
// is nested or emulated, a guest may hang or crawl. A guest of a few instructions
// proves nothing (on such a machine it ended as fast as under TCG), so the trial
// boots the PC's firmware, with its mode switches, device accesses and timers, as
// far as a boot sector that ends QEMU: under TCG first, and then under KVM, which
// must do it in at most twice that time plus a second, and at most in five
// seconds. The outcome is remembered, and kept in CacheDir under the kernel's
// release and QEMU's version; one against KVM for a day, because the computer may
// just have been busy.
//
// An error means that QEMU cannot be run at all, or that ctx has ended.
func ChooseAccel(ctx context.Context, o AccelOptions) (Choice, error) {
	if o.Binary == "" {
		o.Binary = "qemu-system-x86_64"
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	version, err := qemuVersion(ctx, o.Binary)
	if err != nil {
		return Choice{}, fmt.Errorf("choosing an accelerator: %w", err)
	}
	f, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0)
	if err != nil {
		// Not cached: a new group membership or module changes it.
		return Choice{TCG, strings.TrimPrefix(err.Error(), "open ")}, nil
	}
	f.Close()
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return Choice{}, fmt.Errorf("choosing an accelerator: uname: %w", err)
	}
	key := unix.ByteSliceToString(u.Release[:]) + " / " + version

	choicesMu.Lock()
	defer choicesMu.Unlock()
	if c, ok := choices[key]; ok {
		return c, nil
	}
	file := ""
	if o.CacheDir != "" {
		file = filepath.Join(o.CacheDir, "accel.json")
	}
	c, ok := cachedChoice(file, key, time.Now())
	if !ok {
		if c, err = tryKVM(ctx, o.Binary); err != nil {
			return Choice{}, fmt.Errorf("choosing an accelerator: %w", err)
		}
		if err := cacheChoice(file, key, c, time.Now()); err != nil {
			o.Log.Warn("the choice of an accelerator is not kept", "err", err)
		}
	}
	o.Log.Debug("chose an accelerator", "accel", c.Accel, "reason", c.Reason, "cached", ok)
	choices[key] = c
	return c, nil
}

func qemuVersion(ctx context.Context, binary string) (string, error) {
	out, err := exec.CommandContext(ctx, binary, "--version").Output()
	if err != nil {
		if errors.Is(err, exec.ErrNotFound) {
			return "", fmt.Errorf("%w (Debian: apt-get install qemu-system-x86)", err)
		}
		return "", fmt.Errorf("asking QEMU for its version: %w", err)
	}
	line, _, _ := strings.Cut(string(out), "\n")
	return line, nil
}

func tryKVM(ctx context.Context, binary string) (Choice, error) {
	base, err := trial(ctx, binary, TCG, 60*time.Second)
	if err != nil {
		return Choice{}, fmt.Errorf("booting a trial guest under TCG: %w", err)
	}
	limit := kvmLimit(base)
	took, err := trial(ctx, binary, KVM, limit)
	switch {
	case ctx.Err() != nil:
		return Choice{}, context.Cause(ctx)
	case err != nil:
		return Choice{TCG, fmt.Sprintf("/dev/kvm is there, but a trial guest under KVM failed: %v (TCG: %v)", err, base.Round(time.Millisecond))}, nil
	}
	return Choice{KVM, fmt.Sprintf("a trial guest booted in %v (TCG: %v)", took.Round(time.Millisecond), base.Round(time.Millisecond))}, nil
}

// kvmLimit is how long the trial may take under KVM. Real KVM is several times
// faster than TCG, but most of so short a run is QEMU's own start, on a machine
// that may be busy.
func kvmLimit(tcg time.Duration) time.Duration {
	return min(2*tcg+time.Second, 5*time.Second)
}

// bootSector ends QEMU through isa-debug-exit with status 0x31<<1|1.
var bootSector = func() []byte {
	b := make([]byte, 512)
	copy(b, []byte{
		0xfa,             // cli
		0xba, 0xf4, 0x00, // mov dx, 0xf4
		0xb0, 0x31, // mov al, 0x31
		0xee,       // out dx, al
		0xf4,       // hlt
		0xeb, 0xfd, // jmp to hlt
	})
	b[510], b[511] = 0x55, 0xaa
	return b
}()

const trialStatus = 0x31<<1 | 1

// trial boots the trial guest and says how long that took.
func trial(ctx context.Context, binary string, accel Accel, limit time.Duration) (time.Duration, error) {
	dir, err := os.MkdirTemp("", "clonecluster-accel-")
	if err != nil {
		return 0, err
	}
	defer os.RemoveAll(dir)
	disk := filepath.Join(dir, "disk")
	if err := os.WriteFile(disk, bootSector, 0o600); err != nil {
		return 0, err
	}
	ctx, cancel := context.WithTimeoutCause(ctx, limit, fmt.Errorf("it did not end within %v", limit.Round(time.Millisecond)))
	defer cancel()
	cmd := exec.CommandContext(ctx, binary, "-nodefaults", "-no-user-config", "-display", "none",
		"-machine", "pc", "-accel", string(accel), "-m", "32M",
		"-device", "isa-debug-exit,iobase=0xf4,iosize=4",
		"-drive", "file="+disk+",format=raw,if=ide")
	var stderr tailBuffer
	cmd.Stderr = &stderr
	start := time.Now()
	err = runTied(cmd, nil)
	took := time.Since(start)
	var exit *exec.ExitError
	switch {
	case ctx.Err() != nil:
		return 0, context.Cause(ctx)
	case errors.As(err, &exit) && exit.ExitCode() == trialStatus:
		return took, nil
	case err == nil:
		return 0, errors.New("QEMU ended without running the guest")
	}
	return 0, fmt.Errorf("%w: %s", err, stderr.String())
}

// cacheEntry is a choice in the cache file.
type cacheEntry struct {
	Choice
	Tried time.Time `json:"tried"`
}

func cachedChoice(file, key string, now time.Time) (Choice, bool) {
	if file == "" {
		return Choice{}, false
	}
	b, err := os.ReadFile(file)
	if err != nil {
		return Choice{}, false
	}
	return parseChoice(b, key, now)
}

// parseChoice reads one choice from the cache file. Whatever is odd about the
// file only means another trial.
func parseChoice(b []byte, key string, now time.Time) (Choice, bool) {
	var all map[string]cacheEntry
	if json.Unmarshal(b, &all) != nil {
		return Choice{}, false
	}
	e := all[key]
	age := now.Sub(e.Tried)
	return e.Choice, e.Accel == KVM || e.Accel == TCG && age >= 0 && age < 24*time.Hour
}

func cacheChoice(file, key string, c Choice, now time.Time) error {
	if file == "" {
		return nil
	}
	b, err := json.MarshalIndent(map[string]cacheEntry{key: {c, now}}, "", "\t")
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		return err
	}
	tmp, err := os.CreateTemp(filepath.Dir(file), ".accel-")
	if err != nil {
		return err
	}
	_, err = tmp.Write(append(b, '\n'))
	if err = errors.Join(err, tmp.Close()); err == nil {
		err = os.Rename(tmp.Name(), file)
	}
	if err != nil {
		os.Remove(tmp.Name())
	}
	return err
}
