package main

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"clonecluster/config"
	"clonecluster/image"
	"clonecluster/image/keys"
)

// What somebody may give by mistake to the commands that build and configure: the
// message says what to do, wrong usage is told from failure, and nothing is left.
func TestBadInput(t *testing.T) {
	dir := t.TempDir()
	checkout, err := image.FindSource(".")
	if err != nil {
		t.Fatal(err)
	}
	t.Chdir(dir)
	home, err := os.UserHomeDir()
	if err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{
		"empty": "", "text": "x\n", "nul": "a\x00b", "latin1": "cl\xfcster:\n", "huge": strings.Repeat("a", 2<<20), "good.yaml": string(config.DemoYAML),
		"image/manifest.json": `{"format":1,"board":"qemu-x86_64"}`, "image/config.cpio": strings.Repeat("\x00", 1000), "half/manifest.json": "{",
	} {
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for a, b := range map[string]string{"loop1": "loop2", "loop2": "loop1", "root": "/"} {
		if err := os.Symlink(b, a); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := keys.New("plain", ""); err != nil {
		t.Fatal(err)
	}
	before, err := os.ReadDir(".")
	if err != nil {
		t.Fatal(err)
	}
	long := strings.Repeat("n", 65)
	for _, tt := range []struct {
		args  string // between bars
		usage bool
		want  string
	}{
		{"config|check|none", false, "open none: no such file or directory; \"clonectl config example > cluster.yaml\" writes one"},
		{"config|check|image", false, "read image: is a directory; give the file: image/cluster.yaml"},
		{"config|check|empty", false, "empty is empty; "},
		{"config|check|nul", false, "nul:1:2: is not plain UTF-8 text from here on; save it as UTF-8"},
		{"config|check|latin1", false, "latin1:1:3: is not plain UTF-8 text"},
		{"config|check|huge", false, "huge:1:1: the file is larger than 1048576 bytes"},
		{"config|check|/dev/zero", false, "/dev/zero:1:1: the file is larger than 1048576 bytes"},
		{"config|check|loop1", false, "open loop1: too many levels of symbolic links"},
		{"config|check|", true, `an argument is empty; see "clonectl config check --help"`},
		{"config|check|--set|x|good.yaml", true, `--set "x": want PATH=VALUE`},
		{"config|show|none", false, "writes one to start from"},
		{"image|--config|loop1", false, "open loop1: too many levels"},
		{"build|--config|text|--content|none", false, "text:1:1: is a text where keys with values are wanted"},
		{"build|--content|none", false, "the web service's content: there is no folder none"},
		{"build|--content|text", false, "text is a file; content is a folder of files"},
		{"build|--content|loop1", false, "there is no folder loop1"},
		{"build|--key|good.yaml", false, "good.yaml is no minisign secret key; make one with: clonectl key new"},
		{"build|--key|huge", false, "huge is larger than any key"},
		{"build|--password-file|empty", true, "--password-file is for the key that signs: give that with --key"},
		{"build|--key|plain|--password-file|none", false, "reading the password: open none: no such file"},
		{"build|--key|plain|--password-file|image", false, "reading the password: read image: is a directory"},
		{"build|--key|plain|--password-file|empty", false, "no checkout of clonecluster at or above"},
		{"build|--secure-boot-key|text|--secure-boot-cert|text", false, "text has no CERTIFICATE in PEM form; clonectl key secure-boot makes one"},
		{"build|--secure-boot-key|text", true, "belong together"},
		{"build|--out|/", true, "--out / is the root of the file system, which a build would fill with its files: give a folder of its own, such as /boot"},
		{"image|--out|root", true, "--out root is the root of the file system"},
		{"image|--out|" + home, true, "--out " + home + " is your home folder, which"},
		{"kernel|--out|" + checkout, true, " is the checkout itself, which"},
		{"build|--out|text", false, "text cannot be written to; give another folder with --out"},
		{"image|--out|/proc/none", false, "/proc/none cannot be written to; give another folder with --out"},
		{"kernel|--out|text/out", false, "text/out cannot be written to; give another folder with --out"},
		{"kernel|--jobs|-1", true, "--jobs -1: want 1 to 1024, or 0 for one per processor"},
		{"kernel|--jobs|x", true, "invalid argument \"x\" for \"--jobs\""},
		{"kernel|--board|edge-box", true, "make build/bin/clonectl"},
		{"kernel|--board|../x", true, "unknown board; there are generic-arm64"},
		{"build", false, "no checkout of clonecluster at or above " + dir},
		{"image", false, "no checkout of clonecluster at or above " + dir},
		{"key|new|", true, "an argument is empty"},
		{"key|new|text|--no-password", false, "text exists"},
		{"key|new|text/key|--no-password", false, "text/key cannot be made; give a place that you can write to"},
		{"key|new|loop1|--no-password", false, "loop1 exists"},
		{"key|new|key|--password-file|empty", false, "the first line of empty is empty: write the password there, or say --no-password"},
		{"key|new|key|--password-file|/dev/zero", false, "the first line of /dev/zero is longer than 4096 bytes"},
		{"key|new|key|--password-file|none", false, "reading the password: open none"},
		{"key|new|sub/key", true, "give it with --password-file FILE"},
		{"key|secure-boot|", true, "an argument is empty"},
		{"key|secure-boot|text", false, "text/secure-boot.key cannot be made; give a place that you can write to"},
		{"key|secure-boot|sb|--name|", true, "--name is empty"},
		{"key|secure-boot|sb|--name|" + long, true, "want 1 to 64 printable characters"},
		{"key|secure-boot|sb|--name|a\x00b", true, "want 1 to 64 printable characters"},
		{"key|issue|--cluster|good.yaml", true, "--out is needed"},
		{"key|issue|--cluster|good.yaml|--out|text", false, "text cannot be written to; give another folder with --out"},
		{"key|issue|--cluster|good.yaml|--out|new|--days|0", true, "--days 0: want 1 to 36500"},
		{"key|issue|--cluster|good.yaml|--out|new|--name|a\nb", true, "want 1 to 64 printable characters"},
		{"key|issue|--cluster|nul|--out|new", false, "nul:1:2: is not plain UTF-8 text"},
		{"sizes|--image|none", false, "none holds no image; build one with \"clonectl image --board qemu-x86_64 --out none\""},
		{"sizes|--image|text", false, "text is no folder; give one that \"clonectl image\" has made"},
		{"sizes|--image|half", false, "half/manifest.json: it is no manifest"},
		{"sizes|--image|image", false, "build it again with \"clonectl image --board qemu-x86_64 --out image\""},
		{"sizes|--format|x", true, "want plain, markdown or json"},
		{"completion|none", true, `unknown command "none" for "clonectl completion"`},
		{"completion|bash|x", true, `unknown command "x" for "clonectl completion bash"`},
	} {
		_, err := clonectl(t, strings.Split(tt.args, "|")...)
		if err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("clonectl %.80q: %v; want %q", tt.args, err, tt.want)
		} else if got := errors.As(err, new(usageError)); got != tt.usage {
			t.Errorf("clonectl %.80q: %v; is wrong usage: %v; want %v", tt.args, err, got, tt.usage)
		}
	}
	after, err := os.ReadDir(".")
	if err != nil {
		t.Fatal(err)
	}
	if len(after) != len(before) {
		t.Errorf("something was left: %v; before there were %v", after, before)
	}
}
