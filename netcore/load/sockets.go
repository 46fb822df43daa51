package load

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
)

// The counts of the sockets of this network namespace, for ReadSockets.
const (
	ProcSockets  = "/proc/net/sockstat"
	ProcSockets6 = "/proc/net/sockstat6"
)

// ReadSockets gives the number of TCP sockets in use by the files of those
// paths, proc(5) and net/ipv4/proc.c: a measure of concurrency that costs the
// same however many there are. A file that does not exist counts nothing.
func ReadSockets(paths ...string) (int, error) {
	total := 0
	for _, path := range paths {
		f, err := os.Open(path)
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			return 0, fmt.Errorf("counting sockets: %w", err)
		}
		n, err := parseSockets(f)
		f.Close()
		if err != nil {
			return 0, fmt.Errorf("counting sockets in %s: %w", path, err)
		}
		total += n
	}
	return total, nil
}

// parseSockets reads "TCP: inuse 5 orphan 0 tw 0 alloc 6 mem 1" among other lines.
func parseSockets(r io.Reader) (int, error) {
	lines := bufio.NewScanner(io.LimitReader(r, 64<<10))
	for lines.Scan() {
		f := strings.Fields(lines.Text())
		if len(f) < 3 || f[0] != "TCP:" && f[0] != "TCP6:" || f[1] != "inuse" {
			continue
		}
		n, err := strconv.Atoi(f[2])
		if err != nil || n < 0 {
			return 0, fmt.Errorf("%q is no number of sockets", f[2])
		}
		return n, nil
	}
	if err := lines.Err(); err != nil {
		return 0, err
	}
	return 0, errors.New("there is no line for TCP")
}
