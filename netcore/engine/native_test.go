package engine_test

import (
	"cmp"
	"fmt"
	"os"
	"strings"
	"testing"

	"clonecluster/qemu/qemutest"
)

// TestNative runs tests of this package on the datapath native, which needs the appliance's
// kernel: in a guest that has the one of the board pc-x86_64, where the beds of network
// namespaces are as on this machine. An emulated processor takes its time, but
// what they wait for goes by the guest's clock, on which other load of this machine has no influence.
func TestNative(t *testing.T) {
	kernel := os.Getenv("CLONECLUSTER_NATIVE_KERNEL")
	if kernel == "" {
		t.Skip(`takes minutes, and the kernel of the board pc-x86_64: "make churn", or CLONECLUSTER_NATIVE_KERNEL=… and CLONECLUSTER_NATIVE_RUN=^TestClusterServes$`)
	}
	said := []string{}
	qemutest.Rerun{
		Kernel: kernel, Tools: []string{"ip", "bridge", "ss", "tc", "cat"}, CPUs: 2, MemoryMB: 2048,
		Args: []string{"-test.v", "-test.timeout", "30m", "-test.run", cmp.Or(os.Getenv("CLONECLUSTER_NATIVE_RUN"), "^TestFailoverChurn$")},
		Env:  []string{"CLONECLUSTER_DATAPATH=native", "CLONECLUSTER_FULL=" + os.Getenv("CLONECLUSTER_FULL")},
		OnLine: func(line string) {
			if said = append(said, line); testing.Verbose() {
				fmt.Println("in QEMU:", line)
			}
		},
	}.Run(t)
	if all := strings.Join(said, "\n"); !strings.Contains(all, "--- PASS: Test") || strings.Contains(all, "--- SKIP: Test") {
		t.Errorf("not all tests in the guest were run:\n%s", all)
	}
}
