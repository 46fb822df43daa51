package stick

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Found is the configuration of a disk that holds one.
type Found struct {
	Disk   string // as the kernel calls it: sda
	Config []byte // the text of its cluster.yaml
	Err    error  // why there is none, though the disk has the partition for it
	Others []string
}

// Find looks for a disk with a partition called PartitionName among those of
// the kernel, whose block class is the folder classDir (/sys/class/block) and
// whose device files are in devDir. It looks once if wait is 0, and otherwise
// until there is such a disk or the time is over, since a USB disk appears some
// seconds after the kernel has started. It gives nil if there is none. Of
// several disks it takes the first by name and tells the others. A file of more
// than most bytes is an error.
//
// A disk that does not answer holds nothing up for longer than a second; it is
// then left alone.
func Find(classDir, devDir string, wait time.Duration, most int64) *Found {
	end := time.Now().Add(wait)
	looked := map[string]bool{} // disks that are no such stick, or hang
	for {
		var found *Found
		for _, name := range disks(classDir) {
			if looked[name] {
				continue
			}
			f := within(time.Second, func() *Found { return look(filepath.Join(classDir, name), devDir, name, most) })
			switch {
			case f == nil:
				looked[name] = true
			case found == nil:
				found = f
			default:
				found.Others = append(found.Others, name)
			}
		}
		if found != nil || !time.Now().Before(end) {
			return found
		}
		time.Sleep(50 * time.Millisecond)
	}
}

func within(most time.Duration, f func() *Found) *Found {
	answer := make(chan *Found, 1)
	go func() {
		// A panic here must not be the end of init.
		defer func() {
			if r := recover(); r != nil {
				answer <- &Found{Err: fmt.Errorf("panic: %v", r)}
			}
		}()
		answer <- f()
	}()
	t := time.NewTimer(most)
	defer t.Stop()
	select {
	case found := <-answer:
		return found
	case <-t.C:
		return nil
	}
}

// disks are the kernel's whole disks that could be a stick, by name.
func disks(classDir string) []string {
	entries, err := os.ReadDir(classDir)
	if err != nil {
		return nil // a kernel without disks
	}
	var names []string
	for _, e := range entries {
		name := e.Name()
		if slices.ContainsFunc([]string{"loop", "ram", "zram", "dm-", "md", "sr", "fd", "nbd"}, func(p string) bool { return strings.HasPrefix(name, p) }) {
			continue
		}
		if _, err := os.Stat(filepath.Join(classDir, name, "partition")); err == nil {
			continue
		}
		if size(filepath.Join(classDir, name)) > 0 {
			names = append(names, name)
		}
	}
	return names
}

// size is a disk's size in bytes; sysfs counts in 512 whatever its sectors are.
func size(dir string) int64 {
	text, err := os.ReadFile(filepath.Join(dir, "size"))
	if err != nil {
		return 0
	}
	n, err := strconv.ParseInt(strings.TrimSpace(string(text)), 10, 64)
	if err != nil || n < 0 || n > 1<<53 {
		return 0
	}
	return n * 512
}

// look gives nil for a disk that is no stick of ours, or cannot be read at all.
func look(dir, devDir, name string, most int64) *Found {
	f, err := os.Open(filepath.Join(devDir, name))
	if err != nil {
		return nil
	}
	defer f.Close()
	parts, err := Partitions(f, size(dir))
	if err != nil || !slices.ContainsFunc(parts, func(p Partition) bool { return p.Name == PartitionName }) {
		return nil
	}
	found := &Found{Disk: name}
	disk, err := Open(f, size(dir))
	if err == nil {
		disk, err = disk.In(PartitionName)
	}
	if err == nil {
		found.Config, err = disk.ReadFile(ConfigFile, most)
	}
	if errors.Is(err, os.ErrNotExist) {
		err = fmt.Errorf("there is no %s on it%s", ConfigFile, instead(disk))
	}
	found.Err = err
	return found
}

// instead is what lies there in place of a file that is missing, for whoever
// saved it under another name.
func instead(disk *FS) string {
	entries, err := disk.ReadDir("")
	if err != nil || len(entries) == 0 {
		return ""
	}
	var names []string
	for _, e := range entries[:min(len(entries), 8)] {
		names = append(names, fmt.Sprintf("%q", e.Name))
	}
	return ", but " + strings.Join(names, ", ")
}
