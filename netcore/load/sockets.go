package load

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
)

// The counts of the sockets of this network namespace, for Open: proc(5) and
// net/ipv4/proc.c.
const (
	ProcSockets  = "/proc/net/sockstat"
	ProcSockets6 = "/proc/net/sockstat6"
)

// parseSockets reads "TCP: inuse 5 orphan 0 tw 0 alloc 6 mem 1" among other lines.
func parseSockets(b []byte) (int, error) {
	for line := range strings.Lines(string(b)) {
		f := strings.Fields(line)
		if len(f) < 3 || f[0] != "TCP:" && f[0] != "TCP6:" || f[1] != "inuse" {
			continue
		}
		n, err := strconv.Atoi(f[2])
		if err != nil || n < 0 {
			return 0, fmt.Errorf("%q is no number of sockets", f[2])
		}
		return n, nil
	}
	return 0, errors.New("there is no line for TCP")
}
