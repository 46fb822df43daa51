package load

import (
	"bytes"
	"errors"
	"math/bits"
	"strconv"
	"strings"
)

// ProcStat has the processor times, for Open.
const ProcStat = "/proc/stat"

// Stat is the time that all CPUs together have spent since boot, in ticks (a
// hundredth of a second, of each CPU).
type Stat struct {
	// Busy is everything but Idle. Steal counts: it is work that this machine
	// wanted to do and was not let.
	Busy uint64
	Idle uint64 // idle and iowait
}

// The columns of the line "cpu" (proc_stat(5)). Guest time is part of user and
// nice, so what comes after steal would count twice.
const (
	columnIdle   = 3
	columnIOWait = 4
	columnSteal  = 7
	longestLine  = 512 // ten numbers of at most 20 digits
)

// parseStat reads the first line, the sum over all CPUs. Kernels before 2.6.11
// have fewer columns.
func parseStat(b []byte) (s Stat, err error) {
	line, _, ended := bytes.Cut(b[:min(len(b), longestLine)], []byte("\n"))
	if !ended {
		return Stat{}, errors.New("the first line has no end")
	}
	fields := strings.Fields(string(line))
	if len(fields) < columnIOWait+1 || fields[0] != "cpu" {
		return Stat{}, errors.New("the first line is not that of all CPUs")
	}
	for i, text := range fields[1:] {
		if i > columnSteal {
			break
		}
		ticks, err := strconv.ParseUint(text, 10, 64)
		if err != nil {
			return Stat{}, err
		}
		sum := &s.Busy
		if i == columnIdle || i == columnIOWait {
			sum = &s.Idle
		}
		var carry uint64
		if *sum, carry = bits.Add64(*sum, ticks, 0); carry != 0 {
			return Stat{}, errors.New("the times overflow")
		}
	}
	return s, nil
}

// share is how much of the time between two readings was busy, 0 to 1; false if
// they do not tell: no tick has passed, or a counter has gone back, as that of
// iowait may (proc_stat(5)).
func share(from, to Stat) (float64, bool) {
	if to.Busy < from.Busy || to.Idle < from.Idle {
		return 0, false
	}
	busy, idle := float64(to.Busy-from.Busy), float64(to.Idle-from.Idle)
	if busy+idle == 0 {
		return 0, false
	}
	return busy / (busy + idle), true
}
