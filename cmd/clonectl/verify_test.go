package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"clonecluster/config"
	"clonecluster/image"
	"clonecluster/image/bundle"
)

// The exit codes that scripts go by.
func TestVerifyExitCodes(t *testing.T) {
	dir := t.TempDir()
	kernel := []byte("a kernel")
	m := &image.Manifest{Format: 1, Cluster: "shop", Board: "qemu-x86_64", Outputs: []image.File{image.NewFile(bundle.KernelName, kernel)}}
	text, err := m.Bytes()
	if err != nil {
		t.Fatal(err)
	}
	sums := fmt.Sprintf("%s  %s\n%s  %s\n", m.Outputs[0].SHA256, bundle.KernelName, image.NewFile("", text).SHA256, bundle.ManifestName)
	write := func(name string, data []byte) {
		t.Helper()
		if err := image.WriteFile(filepath.Join(dir, name), data, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	write(bundle.KernelName, kernel)
	write(bundle.ManifestName, text)
	write(bundle.SumsName, []byte(sums))
	key := filepath.Join(t.TempDir(), "key")
	other := key + ".yaml"
	if err := os.WriteFile(other, config.DemoYAML, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		want int
		args []string
	}{
		{0, []string{"verify", dir}},
		{0, []string{"verify", dir, "--json", "--board", "qemu-x86_64"}},
		{exitDiffers, []string{"verify", dir, "--board", "pc-x86_64"}},
		{exitFailure, []string{"verify", t.TempDir()}},
		{exitUsage, []string{"verify"}},
		{exitUsage, []string{"verify", os.DevNull}},
		{exitUsage, []string{"verify", "ftp://example.com/pc-x86_64/"}},
		{exitUsage, []string{"verify", filepath.Join(dir, bundle.KernelName)}},
		{exitFailure, []string{"verify", filepath.Join(dir, bundle.KernelName), "--manifest", dir}}, // the build has no USB image
		{exitUsage, []string{"verify", dir, "--board", "none"}},
		{exitUsage, []string{"verify", dir, "--config", "cluster.yaml"}}, // without --rebuild
		{0, []string{"key", "new", key, "--no-password"}},
		{exitFailure, []string{"key", "new", key, "--no-password"}}, // it exists
		{exitDiffers, []string{"verify", dir, "--public-key", key + ".pub"}},
		{exitUsage, []string{"build", "--board", "none"}},
		{exitUsage, []string{"image", "--jobs", "-3"}},
		{exitUsage, []string{"kernel", "--jobs", "100000"}},
		{exitUsage, []string{"build", "--secure-boot-key", key}},
	} {
		if got := run(tc.args); got != tc.want {
			t.Errorf("clonectl %q = %d; want %d", tc.args, got, tc.want)
		}
	}
	// The wrong file, and none.
	for _, tc := range []struct {
		want string
		args []string
	}{
		{"is a secret key, which stays with who signs: give the public one", []string{"verify", dir, "--public-key", key}},
		{"there is no public key " + key + ".none", []string{"verify", dir, "--public-key", key + ".none"}},
		{"there is no " + dir + "/none: give the folder of a build, a device", []string{"verify", dir + "/none"}},
		{"give that of its build with --manifest FOLDER/manifest.json", []string{"verify", key}},
		{"there is no " + key + ".none: clonectl build leaves one", []string{"verify", key, "--manifest", key + ".none"}},
		{dir + "/bzImage is no disk image: no GUID partition table; give the folder, " + dir + ", or its usb.img", []string{"verify", dir + "/bzImage"}},
		{"manifest.json is no disk image: no GUID partition table; give the folder, ", []string{"verify", dir + "/manifest.json"}},
		{`board "none": unknown board; there are generic-arm64, `, []string{"verify", dir, "--board", "none"}},
		{key + ".none: no such file", []string{"verify", dir, "--rebuild", "--config", key + ".none"}},
		{"the configuration is not right", []string{"verify", dir, "--rebuild", "--config", key}},
		{other + ` is of the cluster "demo", and ` + dir + ` of "shop"`, []string{"verify", dir, "--rebuild", "--config", other}},
		{"connection refused; make sure that the server runs, and that the URL is right", []string{"verify", "http://127.0.0.1:1/"}},
		{"a folder is compared with the manifest in it", []string{"verify", dir, "--manifest", key}},
	} {
		if out, code := says(t, tc.args...); code != exitFailure && code != exitUsage || !strings.Contains(out, tc.want) {
			t.Errorf("clonectl %q ends with %d and says %q; want %q", tc.args, code, out, tc.want)
		}
	}
	write(bundle.KernelName, []byte("another"))
	if out, code := says(t, "verify", dir); code != exitDiffers || !strings.Contains(out, dir+": 0 of 1 file as the manifest says; ") || !strings.HasSuffix(out, "is not as the manifest says: 1 problem\n") {
		t.Errorf("verify of a changed kernel ends with %d and says %q", code, out)
	}
}
