package image

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func TestReport(t *testing.T) {
	r := &Report{Board: "test", rows: map[Quantity]Row{}, budgets: map[Quantity]int64{KernelSize: 4e6, BootToHTTPReady: int64(10 * time.Second)}}
	r.Set(BootToHTTPReady, int64(10500*time.Millisecond), "three nodes")
	r.Set(KernelSize, 3_999_999, "")
	r.Set(BaseSize, 512, "")
	err := r.Check()
	if err == nil || err.Error() != "boot_to_http_ready of test: 10.5s is above the budget of 10s" {
		t.Errorf("Check = %v", err)
	}
	for format, want := range map[string]string{
		"plain": "" +
			"test                    value     budget\n" +
			"kernel                 4.0 MB     4.0 MB\n" +
			"base                    512 B          –\n" +
			"boot_to_http_ready      10.5s        10s  OVER BUDGET three nodes\n",
		"markdown": "" +
			"| test | value | budget | |\n|---|---:|---:|---|\n" +
			"| kernel | 4.0 MB | 4.0 MB |  |\n" +
			"| base | 512 B | – |  |\n" +
			"| boot_to_http_ready | 10.5s | 10s | OVER BUDGET three nodes |\n",
	} {
		var b strings.Builder
		if err := r.Print(&b, format); err != nil {
			t.Fatal(err)
		}
		if b.String() != want {
			t.Errorf("%s:\n%s\nwant\n%s", format, &b, want)
		}
	}
	var b bytes.Buffer
	if err := r.Print(&b, "json"); err != nil {
		t.Fatal(err)
	}
	var back struct {
		Board string
		Rows  []Row
	}
	if err := json.Unmarshal(b.Bytes(), &back); err != nil || back.Board != "test" || len(back.Rows) != 3 || back.Rows[2].Value != 10_500_000_000 {
		t.Errorf("json = %s, %v", &b, err)
	}
	if err := r.Print(&b, "html"); err == nil {
		t.Error("format html is taken")
	}
}

func TestParseBudgets(t *testing.T) {
	for text, want := range map[string]string{
		"b: {kernel: 4MB}":             "",
		"b: {kernel: 4.5kB, base: 1B}": "",
		"b: {boot_to_http_ready: 20s}": "",
		"b: {kernle: 4MB}":             "unknown quantity",
		"b: {kernel: 4 MiB}":           "want a size",
		"b: {kernel: -4MB}":            "want a size",
		"b: {kernel: NaNMB}":           "want a size",
		"b: {kernel: 4}":               "want a size",
		"b: {boot_to_http_ready: 20}":  "duration",
		"b: {boot_to_http_ready: 0s}":  "more than 0",
		"b: [1]":                       "1:",
	} {
		_, err := parseBudgets([]byte(text))
		if want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
			t.Errorf("parseBudgets(%s) = %v; want %q", text, err, want)
		}
	}
}

func TestReportFiles(t *testing.T) {
	dir := t.TempDir()
	packed, err := Compress(make([]byte, 100_000))
	if err != nil {
		t.Fatal(err)
	}
	for name, b := range map[string][]byte{"k": make([]byte, 10), "b": packed, "c": make([]byte, 5)} {
		if err := os.WriteFile(filepath.Join(dir, name), b, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	r, err := NewReport("qemu-x86_64")
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Files(filepath.Join(dir, "k"), filepath.Join(dir, "b"), filepath.Join(dir, "c")); err != nil {
		t.Fatal(err)
	}
	got := map[Quantity]int64{}
	for _, row := range r.Rows() {
		got[row.Quantity] = row.Value
		if row.Budget == 0 {
			t.Errorf("%s has no budget", row.Quantity)
		}
	}
	if got[KernelSize] != 10 || got[BaseUnpacked] != 100_000 || got[TotalSize] != int64(15+len(packed)) {
		t.Errorf("rows = %v", got)
	}
	if err := r.Files("", filepath.Join(dir, "none"), ""); err == nil {
		t.Error("a missing file is no error")
	}
}
