package main

import (
	"bytes"
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
