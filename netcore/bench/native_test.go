package bench

import (
	"cmp"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"clonecluster/netcore/netnstest"
	"clonecluster/qemu/qemutest"
)

// guestOut is the folder that stands for a checkout in the guest.
const guestOut = "/out"

// guestTools are what the beds, the servers and the clients need there.
var guestTools = []string{"ip", "bridge", "nginx", "wrk", "curl", "cat", "sh"}

// guestWays are what is compared there.
var guestWays = []string{Plain, "native", "bpf", "raw", "native, 2 nodes", RingFloor, MacvlanFloor, HashedMacvlan, NoEngine, OneDevice, OneJudged}

// TestBenchNative is "make bench-native": the same measurement in a guest, on the patched
// kernel, where there is native.
func TestBenchNative(t *testing.T) {
	folder, kernel := os.Getenv("CLONECLUSTER_BENCH"), os.Getenv("CLONECLUSTER_BENCH_KERNEL")
	if folder == "" || kernel == "" {
		t.Skip("takes half an hour: make bench-native")
	}
	if err := netnstest.Lacks(guestTools...); err != nil {
		t.Fatalf("%v: make deps-test", err)
	}
	r := runGuest(t, kernel, os.Getenv("BENCH_ROUNDS"))
	if err := os.WriteFile(filepath.Join(folder, nativeJSON), must(r.JSON()), 0o644); err != nil {
		t.Fatal(err)
	}
	writeDocument(t, folder)
}

func runGuest(t *testing.T, kernel, rounds string) *Report {
	t.Helper()
	data := qemutest.Rerun{
		Kernel: kernel, Tools: guestTools, CPUs: 2, MemoryMB: 3072,
		Args:   []string{"-test.run", "^TestBench$", "-test.timeout", "2h"},
		Env:    []string{"CLONECLUSTER_BENCH=" + guestOut, "BENCH_ROUNDS=" + cmp.Or(rounds, strconv.Itoa(enough))},
		Report: filepath.Join(guestOut, benchJSON),
		OnLine: func(line string) {
			if strings.HasPrefix(line, "round ") || strings.HasPrefix(line, "preparing") {
				fmt.Fprintln(os.Stderr, "in QEMU:", line)
			}
		},
	}.Run(t)
	r := new(Report)
	if err := json.Unmarshal(data, r); err != nil {
		t.Fatalf("the guest's report: %v", err)
	}
	return r
}

func must(b []byte, err error) []byte {
	if err != nil {
		panic(err)
	}
	return b
}
