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
// A disk that has not answered after three seconds holds nothing up any longer,
// but while there is time its answer is still taken: a slow machine's is.
func Find(classDir, devDir string, wait time.Duration, most int64) *Found {
	end := time.Now().Add(wait)
	asked := map[string]time.Time{} // disks, and since when
	open := map[string]bool{}       // those that have not answered
	answers := make(chan *Found, 64)
	var sticks []*Found
	for {
		for _, name := range disks(classDir) {
			if _, err := os.Stat(filepath.Join(devDir, name)); err != nil {
				continue // sysfs shows a disk a moment before it has a device file
			}
			if asked[name].IsZero() && len(asked) < cap(answers) {
				asked[name], open[name] = time.Now(), true
				go func() { answers <- look(filepath.Join(classDir, name), devDir, name, most) }()
			}
		}
		pending := false
		for name := range open {
			pending = pending || time.Since(asked[name]) < patience
		}
		if !pending && (len(sticks) > 0 || !time.Now().Before(end)) {
			return first(sticks)
		}
		select {
		case f := <-answers:
			delete(open, f.Disk)
			if f.Config != nil || f.Err != nil {
				sticks = append(sticks, f)
			}
		case <-time.After(50 * time.Millisecond):
		}
	}
}

const patience = 3 * time.Second

func first(sticks []*Found) *Found {
	if len(sticks) == 0 {
		return nil
	}
	slices.SortFunc(sticks, func(a, b *Found) int { return strings.Compare(a.Disk, b.Disk) })
	for _, other := range sticks[1:] {
		sticks[0].Others = append(sticks[0].Others, other.Disk)
	}
	return sticks[0]
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

// look gives neither a configuration nor an error for a disk that is no stick of
// ours, or cannot be read at all.
func look(dir, devDir, name string, most int64) (found *Found) {
	found = &Found{Disk: name}
	defer func() { // a panic here must not be the end of init
		if r := recover(); r != nil {
			found.Err = fmt.Errorf("panic: %v", r)
		}
	}()
	f, err := os.Open(filepath.Join(devDir, name))
	if err != nil {
		return found
	}
	defer f.Close()
	parts, err := Partitions(f, size(dir))
	if err != nil || !slices.ContainsFunc(parts, func(p Partition) bool { return p.Name == PartitionName }) {
		return found
	}
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
	if err == nil && len(found.Config) == 0 {
		err = fmt.Errorf("%s is empty", ConfigFile)
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
