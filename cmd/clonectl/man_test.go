package main

import (
	"bytes"
	"os"
	"os/exec"
	"strings"
	"testing"
)

// TestMan: every command is in the page, and man finds nothing to complain of.
func TestMan(t *testing.T) {
	var page bytes.Buffer
	if err := writeMan(&page, newRoot()); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{".SH NAME\nclonectl \\- build", ".SH \"CONFIG CHECK\"", ".SH \"QEMU UP\"", `\fB\-\-json\fR`} {
		if !strings.Contains(page.String(), want) {
			t.Errorf("the page lacks %q", want)
		}
	}
	for _, no := range []string{"SH \"MAN\"", "\n'"} {
		if strings.Contains(page.String(), no) {
			t.Errorf("the page has %q", no)
		}
	}
	if _, err := exec.LookPath("groff"); err != nil {
		t.Skip("needs groff to look for mistakes in the page")
	}
	cmd := exec.Command("groff", "-man", "-Tutf8", "-ww", "-z")
	cmd.Stdin = &page
	if out, err := cmd.CombinedOutput(); err != nil || len(out) > 0 {
		t.Errorf("groff: %v: %s", err, out)
	}
}

// TestReference: the command reference is the present one.
func TestReference(t *testing.T) {
	var want bytes.Buffer
	if err := writeReference(&want, newRoot()); err != nil {
		t.Fatal(err)
	}
	const file = "../../docs/commands.md"
	if got, err := os.ReadFile(file); err != nil || !bytes.Equal(got, want.Bytes()) {
		t.Errorf("%s is not what the commands say now (%v): run go generate ./cmd/clonectl", file, err)
	}
	for _, part := range []string{"\n## clonectl config check\n", "| [`qemu up`](#clonectl-qemu-up) |", "| `-w, --write FILE` |", "\n```\nclonectl rollout --dry-run\n"} {
		if !strings.Contains(want.String(), part) {
			t.Errorf("the reference lacks %q", part)
		}
	}
	if strings.Contains(want.String(), "## clonectl man") {
		t.Error("the reference has what help hides")
	}
}
