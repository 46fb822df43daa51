package uinit

import (
	"bytes"
	"errors"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// stage is one reached stage of the boot.
type stage struct {
	Name string        `json:"stage"`
	At   time.Duration `json:"-"`
}

// timeline is the stages of one boot, each once, in the order they were
// reached.
type timeline []stage

// add notes a stage; false if it was noted before.
func (t *timeline) add(name string, at time.Duration) bool {
	for _, s := range *t {
		if s.Name == name {
			return false
		}
	}
	*t = append(*t, stage{name, at})
	return true
}

// kernelStages finds in the kernel's log when the kernel had set itself up and
// began to unpack the initramfs ("kernel"), and when that was done ("unpack").
// The two overlap with the probing of devices.
func kernelStages(log []kernelLine) []stage {
	var stages []stage
	for _, l := range log {
		switch {
		case strings.HasPrefix(l.text, "Trying to unpack rootfs image"), strings.HasPrefix(l.text, "Unpacking initramfs"):
			stages = append(stages, stage{"kernel", l.at})
		case strings.HasPrefix(l.text, "Freeing initrd memory"):
			stages = append(stages, stage{"unpack", l.at})
		}
	}
	return stages
}

// kernelLine is one line of the kernel's log.
type kernelLine struct {
	at   time.Duration
	text string
}

// readKernelLog reads what is in the kernel's log now.
func readKernelLog(path string) []kernelLine {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil
	}
	defer unix.Close(fd)
	var lines []kernelLine
	buf := make([]byte, 8192)
	for len(lines) < 4096 {
		n, err := unix.Read(fd, buf)
		if errors.Is(err, unix.EPIPE) { // overwritten while we read; the next is there
			continue
		}
		if err != nil || n <= 0 {
			break
		}
		if l, ok := parseKernelLine(buf[:n]); ok {
			lines = append(lines, l)
		}
	}
	return lines
}

// parseKernelLine reads one record of /dev/kmsg, "6,339,5140900,-;text"
// (Documentation/ABI/testing/dev-kmsg); the time is in microseconds.
func parseKernelLine(b []byte) (kernelLine, bool) {
	head, text, ok := bytes.Cut(b, []byte(";"))
	if !ok {
		return kernelLine{}, false
	}
	fields := strings.SplitN(string(head), ",", 4)
	if len(fields) < 3 {
		return kernelLine{}, false
	}
	us, err := strconv.ParseInt(fields[2], 10, 64)
	if err != nil || us < 0 || us > int64(100*365*24*time.Hour/time.Microsecond) {
		return kernelLine{}, false
	}
	line, _, _ := strings.Cut(string(text), "\n")
	return kernelLine{time.Duration(us) * time.Microsecond, line}, true
}

// residentBytes is how much memory a process has now, 0 if it is not known.
func residentBytes(proc, pid string) int64 { return kilobytes(proc+"/"+pid+"/status", "VmRSS:") }

// privateBytes is the part of it that is the process's alone.
func privateBytes(proc, pid string) int64 { return kilobytes(proc+"/"+pid+"/status", "RssAnon:") }

// availableBytes is how much memory programs can still have.
func availableBytes(meminfo string) int64 { return kilobytes(meminfo, "MemAvailable:") }

// kilobytes finds "NAME:   123 kB" in a file and gives it in bytes.
func kilobytes(file, name string) int64 {
	b, err := os.ReadFile(file)
	if err != nil {
		return 0
	}
	for line := range strings.SplitSeq(string(b), "\n") {
		if rest, ok := strings.CutPrefix(line, name); ok {
			kb, err := strconv.ParseInt(strings.TrimSuffix(strings.TrimSpace(rest), " kB"), 10, 64)
			if err == nil {
				return kb << 10
			}
		}
	}
	return 0
}
