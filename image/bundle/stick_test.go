package bundle

import (
	"bytes"
	"path/filepath"
	"strings"
	"testing"

	"clonecluster/image"
)

func TestVerifyDisk(t *testing.T) {
	dir, m := buildOnce(t)
	have := map[string]bool{}
	for _, f := range m.Stick {
		have[f.Name] = true
	}
	for _, want := range []string{"cluster.yaml", "EFI/BOOT/BOOTX64.EFI", "grub/grub.cfg"} {
		if !have[want] {
			t.Errorf("the manifest has no %s on the stick: %v", want, m.Stick)
		}
	}
	manifest := filepath.Join(dir, ManifestName)
	whole := read(t, dir, StickName)
	for _, tc := range []struct {
		name       string
		change     func([]byte) []byte
		want, note string
	}{
		{name: "as it is", change: func(b []byte) []byte { return b }},
		{name: "larger device", change: func(b []byte) []byte { return append(b, make([]byte, 1<<20)...) }},
		{name: "edited", change: func(b []byte) []byte {
			return bytes.Replace(b, []byte("detect: relaxed"), []byte("detect: fast   "), 1)
		}, note: "cluster.yaml was edited on "},
		{name: "edited badly", change: func(b []byte) []byte {
			return bytes.Replace(b, []byte("detect: relaxed"), []byte("detcet: relaxed"), 1)
		}, want: `unknown key "detcet"`},
		{name: "another kernel", change: func(b []byte) []byte {
			at := bytes.LastIndex(b, []byte("HdrS")) // of a Linux kernel, Documentation/arch/x86/boot.rst
			b[at+5000] ^= 1
			return b
		}, want: "/stick; write it anew"},
		{name: "boot code", change: func(b []byte) []byte { b[3] ^= 1; return b }, want: "its boot loader or the space between differs"},
		{name: "nothing", change: func(b []byte) []byte { return make([]byte, len(b)) }, want: "holds no disk of clonectl build"},
		{name: "truncated", change: func(b []byte) []byte { return b[:len(b)/4] }, want: "bytes; write it anew"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			file := filepath.Join(t.TempDir(), "stick")
			if err := image.WriteFile(file, tc.change(bytes.Clone(whole)), 0o600); err != nil {
				t.Fatal(err)
			}
			r, _, err := VerifyDisk(t.Context(), file, manifest, VerifyOptions{})
			if err != nil {
				t.Fatal(err)
			}
			var problems []string
			for _, p := range r.Problems {
				problems = append(problems, p.String())
			}
			if got := strings.Join(problems, "\n"); tc.want == "" && got != "" || !strings.Contains(got, tc.want) {
				t.Errorf("problems %q; want %q", got, tc.want)
			}
			if notes := strings.Join(r.Notes, "\n"); !strings.Contains(notes, tc.note) {
				t.Errorf("notes %q; want %q", notes, tc.note)
			}
		})
	}
}
