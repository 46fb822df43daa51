package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"clonecluster/cmd/internal/webd"
	"clonecluster/netcore/webstone"
)

// benched runs "clonectl bench" with arguments.
func benched(ctx context.Context, args ...string) (string, error) {
	var out bytes.Buffer
	root := newRoot()
	root.SetOut(&out)
	root.SetErr(&out)
	root.SetArgs(append([]string{"bench"}, args...))
	err := root.ExecuteContext(ctx)
	return out.String(), err
}

// webServer is the reference web service.
func webServer(t *testing.T) string {
	t.Helper()
	s, err := webd.New(webd.Options{Node: "test", Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	srv := httptest.NewServer(s.Handler())
	t.Cleanup(func() { srv.Close(); s.Close() })
	return srv.URL
}

var quick = []string{"--warm-up", "20ms", "--duration", "200ms"}

// TestBench: the reference web service has what both workloads ask for.
func TestBench(t *testing.T) {
	url := webServer(t) + "/bench/"
	for _, workload := range []string{"standard", "2k"} {
		for _, extra := range [][]string{nil, {"--keep-alive"}, {"--keep-alive", "--rate", "200", "--arrivals", "constant"}} {
			out, err := benched(t.Context(), append(append([]string{url, "--workload", workload, "--clients", "2,4", "--json"}, quick...), extra...)...)
			if err != nil {
				t.Fatalf("%s %v: %v\n%s", workload, extra, err, out)
			}
			var results []webstone.Result
			if err := json.Unmarshal([]byte(out), &results); err != nil || len(results) != 2 {
				t.Fatalf("%v\n%s", err, out)
			}
			for i, r := range results {
				if w := r.Total(); r.Clients != 2+2*i || w.Requests == 0 || w.Failed() > 0 {
					t.Errorf("%s %v: %d clients have %d answers, errors %v", workload, extra, r.Clients, w.Requests, w.Examples)
				}
			}
		}
	}
	svg := filepath.Join(t.TempDir(), "bench.svg")
	out, err := benched(t.Context(), append([]string{url, "--workload", "2k", "--clients", "3", "--svg", svg, "--label", "this one"}, quick...)...)
	if err != nil || !strings.HasPrefix(out, "| clients ") || !strings.Contains(out, "\n| 3 ") {
		t.Errorf("%v\n%s", err, out)
	}
	if data, err := os.ReadFile(svg); err != nil || !bytes.Contains(data, []byte("this one")) {
		t.Errorf("%v: the drawing lacks its line", err)
	}
}

func TestBenchUsage(t *testing.T) {
	for _, args := range [][]string{
		{}, {"ftp://10.0.0.1/"}, {"10.0.0.1"}, {"http://10.0.0.1/?x"}, {"http://10.0.0.1/", "http://10.0.0.2/"}, {"http://10.0.0.1/", "--workload", "x"},
		{"http://10.0.0.1/", "--clients", "0"}, {"http://10.0.0.1/", "--duration", "0s"}, {"http://10.0.0.1/", "--source", "x"}, {"http://10.0.0.1/", "--arrivals", "x"},
		{"http://10.0.0.1/", "--write-content", "x"}, {"http://10.0.0.1:99999/"},
	} {
		if out, err := benched(t.Context(), args...); !errors.As(err, new(usageError)) {
			t.Errorf("%q: %v; want a mistake in the use\n%s", args, err, out)
		}
	}
}

// TestBenchFails: a server that has not got the files is a failure, and what there is is printed.
func TestBenchFails(t *testing.T) {
	out, err := benched(t.Context(), append([]string{webServer(t) + "/nothing", "--workload", "2k", "--clients", "2"}, quick...)...)
	if err == nil || !strings.Contains(err.Error(), "status 404") || !strings.Contains(out, " status") {
		t.Errorf("%v\n%s", err, out)
	}
}

// TestBenchInterrupted: Ctrl-C prints what was measured.
func TestBenchInterrupted(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	time.AfterFunc(500*time.Millisecond, cancel)
	out, err := benched(ctx, webServer(t)+"/bench/", "--workload", "2k", "--clients", "2,9999", "--warm-up", "20ms", "--duration", "1m")
	if !errors.Is(err, context.Canceled) || !strings.Contains(out, "\n| 2 ") || strings.Contains(out, "9999") {
		t.Errorf("%v\n%s", err, out)
	}
}

func TestBenchContent(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "www")
	if out, err := benched(t.Context(), "--write-content", dir); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if fi, err := os.Stat(filepath.Join(dir, "5248000")); err != nil || fi.Size() != 5248000 {
		t.Errorf("%v, %v", fi, err)
	}
}

// TestBenchReport: of no results there is no report.
func TestBenchReport(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "evaluation.json")
	for _, text := range []string{"{}", "x"} {
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if out, err := benched(t.Context(), "--report", file, "--out", dir); err == nil {
			t.Errorf("%s: a report:\n%s", text, out)
		}
	}
}
