package flash

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// below is a file or a block device that loop devices may be on (loop(4)).
type below struct {
	dev, inode uint64 // of a file
	number     uint64 // of a device
}

func loopsOf(fi fs.FileInfo) below {
	st, ok := fi.Sys().(*syscall.Stat_t)
	switch {
	case !ok:
		return below{}
	case st.Mode&unix.S_IFMT == unix.S_IFBLK:
		return below{number: st.Rdev}
	}
	return below{dev: st.Dev, inode: st.Ino}
}

// most loops on loops are looked through, as a chain of them may be long.
const mostLoops = 8

// on tells whether f is a loop device on it, or on one that is.
func (b below) on(f *os.File, depth int) bool {
	info, err := unix.IoctlLoopGetStatus64(int(f.Fd()))
	switch {
	case err != nil || depth > mostLoops:
		return false
	case b.number != 0 && info.Rdevice == b.number, b.inode != 0 && info.Device == b.dev && info.Inode == b.inode:
		return true
	}
	// Of a file, kernels say 0 or the device that it is on, which is no loop as a rule.
	name, err := os.Readlink(fmt.Sprintf("/sys/dev/block/%d:%d", unix.Major(info.Rdevice), unix.Minor(info.Rdevice)))
	if err != nil || !strings.HasPrefix(filepath.Base(name), "loop") {
		return false
	}
	under, err := os.Open(filepath.Join(thisHost.dev, filepath.Base(name)))
	if err != nil {
		return false
	}
	defer under.Close()
	return b.on(under, depth+1)
}

// loopUses is what the loop devices on it are used for.
func (h host) loopUses(b below) (found []string) {
	loops, _ := filepath.Glob(filepath.Join(h.class, "loop*", "loop", "backing_file"))
	for _, file := range loops {
		name := filepath.Base(filepath.Dir(filepath.Dir(file)))
		f, err := os.Open(filepath.Join(h.dev, name))
		if err != nil {
			continue
		}
		on := b.on(f, 0)
		f.Close()
		if !on {
			continue
		}
		if d, err := h.device(name); err == nil && len(d.InUse) > 0 {
			found = append(found, name+" on it: "+strings.Join(d.InUse, ", "))
		}
	}
	return found
}

// CheckFile says why a file must not be written to: it is the disk of something that is
// mounted.
func CheckFile(path string) error {
	fi, err := os.Stat(path)
	if err != nil {
		return err
	}
	if uses := thisHost.loopUses(loopsOf(fi)); len(uses) > 0 {
		return fmt.Errorf("%s is in use (%s): unmount that first", path, strings.Join(uses, "; "))
	}
	return nil
}
