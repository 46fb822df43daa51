package bpf

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// TestObjects builds the programs anew: what is kept in the tree must be what their
// source says, bit by bit, with the compiler of Debian 12.
func TestObjects(t *testing.T) {
	version, err := exec.Command("clang", "--version").Output()
	if err != nil {
		t.Skip("needs clang (make deps-test)")
	}
	if !strings.Contains(string(version), "clang version 14.") {
		t.Skipf("needs clang 14, whose output is kept: %s", bytes.SplitN(version, []byte("\n"), 2)[0])
	}
	source, err := os.ReadFile("bpf.go")
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	for _, m := range regexp.MustCompile(`(?m)^//go:generate (.+)$`).FindAllSubmatch(source, -1) {
		args := strings.Fields(string(m[1]))
		if strings.Contains(string(m[1]), "bpf2go") {
			args = append(args[:3:3], append([]string{"-output-dir", dir}, args[3:]...)...)
		} else {
			args = append(args, "-output", filepath.Join(dir, "constants.h"))
		}
		cmd := exec.Command(args[0], args[1:]...)
		cmd.Env = append(os.Environ(), "GOPACKAGE=bpf")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%q: %v\n%s", args, err, out)
		}
	}
	for kept, name := range map[string]string{
		"c/constants.h": "constants.h", "objects_bpfel.o": "objects_bpfel.o", "objects_bpfel.go": "objects_bpfel.go",
		"directed_bpfel.o": "directed_bpfel.o", "directed_bpfel.go": "directed_bpfel.go",
	} {
		want, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		if got, err := os.ReadFile(kept); err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s is not what its source gives (%v): go generate ./netcore/bpf", kept, err)
		}
	}
}
