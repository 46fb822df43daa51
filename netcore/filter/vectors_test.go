package filter

import (
	"bytes"
	"encoding/hex"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

var update = flag.Bool("update", false, "write testdata/frames.txt anew")

// longestVector is what one page of a test run in the kernel takes.
const longestVector = 2000

// TestVectors keeps testdata/frames.txt, by which other datapaths are compared, the
// same as the cases here. A line is: direction, state, what the socket table says
// ("-": it is not asked), "fenced", "held", "patient" or "-" for each, the verdict, the
// frame in hexadecimal digits, and the case's name.
func TestVectors(t *testing.T) {
	var lines []string // sorted, since some cases come out of maps
	for _, d := range []struct {
		direction string
		cases     []frameCase
	}{{"in", ingressCases()}, {"out", egressCases()}} {
		for _, c := range d.cases {
			if len(c.frame) > longestVector {
				continue
			}
			socket := "-"
			if c.sockets != nil {
				socket = []string{SocketNone: "none", SocketListener: "listener", SocketEstablished: "established"}[c.sockets.state]
			}
			flag := func(is bool, name string) string {
				if is {
					return name
				}
				return "-"
			}
			lines = append(lines, fmt.Sprintln(d.direction, c.state, socket, flag(c.fenced, "fenced"), flag(c.held, "held"), flag(c.patient, "patient"),
				c.want, "0x"+hex.EncodeToString(c.frame), c.name))
		}
	}
	slices.Sort(lines)
	want := []byte(strings.Join(lines, ""))
	path := filepath.Join("testdata", "frames.txt")
	if *update {
		if err := os.MkdirAll("testdata", 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, want, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if got, err := os.ReadFile(path); err != nil || !bytes.Equal(got, want) {
		t.Errorf("%s is not that of the cases (%v): go test ./netcore/filter -run TestVectors -update", path, err)
	}
}
