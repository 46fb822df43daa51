// Package flash writes a disk image to a removable device so that it is there
// for certain: not over anything in use, read back past the cache, and with a
// plain word about what state a device is left in.
package flash

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Device is a whole disk, as the kernel describes it.
type Device struct {
	Path      string   `json:"path"` // /dev/sdb
	Size      int64    `json:"size_bytes"`
	Model     string   `json:"model,omitempty"`
	Removable bool     `json:"removable"` // or on USB, where disks may say that they are not
	ReadOnly  bool     `json:"read_only"`
	System    bool     `json:"system"`           // this machine runs from it
	InUse     []string `json:"in_use,omitempty"` // mount points, swap, and what is built on it
}

// Name is what people call it: sdb.
func (d Device) Name() string { return filepath.Base(d.Path) }

// host is where the kernel tells of its disks; tests give another.
type host struct{ class, mounts, swaps, dev string }

var thisHost = host{"/sys/class/block", "/proc/self/mountinfo", "/proc/swaps", "/dev"}

// Devices are the disks of this machine that are neither loops nor made of
// memory or of other disks, by name.
func Devices() ([]Device, error) { return thisHost.devices() }

func (h host) devices() ([]Device, error) {
	entries, err := os.ReadDir(h.class)
	if err != nil {
		return nil, fmt.Errorf("listing disks: %w", err)
	}
	var all []Device
	for _, e := range entries {
		if slices.ContainsFunc([]string{"loop", "ram", "zram", "dm-", "md", "sr", "fd", "nbd"}, func(p string) bool { return strings.HasPrefix(e.Name(), p) }) {
			continue
		}
		if _, err := os.Stat(filepath.Join(h.class, e.Name(), "partition")); err == nil {
			continue
		}
		d, err := h.device(e.Name())
		if err != nil {
			return nil, err
		}
		if d.Size > 0 { // a card reader without a card
			all = append(all, d)
		}
	}
	return all, nil
}

// systemMounts are what a machine does not run without.
var systemMounts = []string{"/", "/boot", "/boot/efi", "/efi", "/usr", "/var", "/home", "[SWAP]"}

func (h host) device(name string) (Device, error) {
	dir, err := filepath.EvalSymlinks(filepath.Join(h.class, name))
	if err != nil {
		return Device{}, fmt.Errorf("looking at %s: %w", name, err)
	}
	read := func(file string) string {
		b, _ := os.ReadFile(filepath.Join(dir, file))
		return strings.TrimSpace(string(b))
	}
	sectors, _ := strconv.ParseInt(read("size"), 10, 64)
	d := Device{
		Path: filepath.Join(h.dev, name), Size: sectors * 512, ReadOnly: read("ro") == "1",
		Removable: read("removable") == "1" || strings.Contains(dir, "/usb"),
		Model:     strings.Join(strings.Fields(read("device/vendor")+" "+read("device/model")), " "),
	}
	uses, err := h.uses()
	if err != nil {
		return Device{}, err
	}
	parts := []string{dir}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return Device{}, fmt.Errorf("looking at %s: %w", name, err)
	}
	for _, e := range entries {
		if _, err := os.Stat(filepath.Join(dir, e.Name(), "partition")); err == nil {
			parts = append(parts, filepath.Join(dir, e.Name()))
		}
	}
	for _, part := range parts {
		d.InUse = append(d.InUse, h.usesOf(part, uses, 0)...)
	}
	d.System = slices.ContainsFunc(d.InUse, func(u string) bool { return slices.Contains(systemMounts, u) })
	return d, nil
}

// usesOf is what a block device is used for, by itself and by what is built on
// it: encryption, LVM, RAID.
func (h host) usesOf(dir string, uses map[string][]string, depth int) []string {
	number, _ := os.ReadFile(filepath.Join(dir, "dev"))
	found := slices.Concat(uses[strings.TrimSpace(string(number))], uses[filepath.Join(h.dev, filepath.Base(dir))])
	slices.Sort(found)
	found = slices.Compact(found)
	holders, _ := os.ReadDir(filepath.Join(dir, "holders"))
	for _, holder := range holders {
		found = append(found, "part of "+holder.Name())
		if at, err := filepath.EvalSymlinks(filepath.Join(h.class, holder.Name())); err == nil && depth < 8 {
			found = append(found, h.usesOf(at, uses, depth+1)...)
		}
	}
	return found
}

// uses are the mount points of each device, by its number and by its path: file
// systems such as btrfs show numbers of their own.
func (h host) uses() (map[string][]string, error) {
	uses := map[string][]string{}
	f, err := os.Open(h.mounts)
	if err != nil {
		return nil, fmt.Errorf("looking at what is mounted: %w", err)
	}
	defer f.Close()
	for s := bufio.NewScanner(f); s.Scan(); { // proc_pid_mountinfo(5)
		left, right, ok := strings.Cut(s.Text(), " - ")
		fields, source := strings.Fields(left), strings.Fields(right)
		if !ok || len(fields) < 5 || len(source) < 2 {
			continue
		}
		at := unescape(fields[4])
		uses[fields[2]] = append(uses[fields[2]], at)
		if strings.HasPrefix(source[1], "/") {
			uses[unescape(source[1])] = append(uses[unescape(source[1])], at)
		}
	}
	swaps, err := os.ReadFile(h.swaps)
	if errors.Is(err, os.ErrNotExist) { // a kernel without
		return uses, nil
	} else if err != nil {
		return nil, fmt.Errorf("looking at what is swapped to: %w", err)
	}
	for line := range strings.Lines(string(swaps)) {
		if f := strings.Fields(line); len(f) > 0 && strings.HasPrefix(f[0], "/") {
			uses[unescape(f[0])] = append(uses[unescape(f[0])], "[SWAP]")
		}
	}
	return uses, nil
}

var escapes = strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`)

func unescape(s string) string { return escapes.Replace(s) }

// Lookup describes the device file at path, which may be a link to it, such as
// those in /dev/disk/by-id.
func Lookup(path string) (Device, error) {
	real, err := filepath.EvalSymlinks(path)
	if err != nil {
		return Device{}, err
	}
	var st unix.Stat_t
	if err := unix.Stat(real, &st); err != nil {
		return Device{}, fmt.Errorf("looking at %s: %w", path, err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFBLK {
		return Device{}, fmt.Errorf("%s is no disk", path)
	}
	name := filepath.Base(real)
	if _, err := os.Stat(filepath.Join(thisHost.class, name, "partition")); err == nil {
		return Device{}, fmt.Errorf("%s is a partition; give the whole disk", path)
	}
	d, err := thisHost.device(name)
	if err != nil {
		return Device{}, err
	}
	// Of its partitions, too.
	files, _ := filepath.Glob(filepath.Join(thisHost.class, name, name+"*", "dev"))
	for _, file := range append(files, filepath.Join(thisHost.class, name, "dev")) {
		var major, minor uint32
		if number, err := os.ReadFile(file); err == nil {
			if _, err := fmt.Sscanf(string(number), "%d:%d", &major, &minor); err == nil {
				d.InUse = append(d.InUse, thisHost.loopUses(below{number: unix.Mkdev(major, minor)})...)
			}
		}
	}
	return d, nil
}

// Check says why the device must not be written to. Force allows a disk that is
// not removable, and nothing else.
func (d Device) Check(force bool) error {
	switch {
	case d.System:
		return fmt.Errorf("%s is a disk that this machine runs from (%s): it is never written to", d.Path, strings.Join(d.InUse, ", "))
	case len(d.InUse) > 0:
		return fmt.Errorf("%s is in use (%s): unmount it first", d.Path, strings.Join(d.InUse, ", "))
	case d.ReadOnly:
		return fmt.Errorf("%s is write-protected: look for a switch on it", d.Path)
	case !d.Removable && !force && !strings.HasPrefix(d.Name(), "loop"):
		return fmt.Errorf("%s is not removable; if it is the right one all the same, say --force", d.Path)
	}
	return nil
}
