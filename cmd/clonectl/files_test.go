package main

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"aead.dev/minisign"

	"clonecluster/config"
	"clonecluster/image"
	"clonecluster/image/bundle"
	"clonecluster/image/disk"
	"clonecluster/image/keys"
	"clonecluster/netcore/netnstest"
)

// openTemp is a folder that other users can look into, too.
func openTemp(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "clonectl-test-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	return dir
}

// builtFolder is an output folder that is as its manifest says, but for what is in
// the files: they are not what they are called, except the configuration and usb.img.
func builtFolder(t *testing.T) string {
	t.Helper()
	dir := filepath.Join(openTemp(t), "pc-x86_64")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	cpio, err := image.ConfigCPIO(config.DemoYAML, "", time.Time{})
	if err != nil {
		t.Fatal(err)
	}
	stick := filepath.Join(dir, bundle.StickName)
	if err := disk.Write(stick, disk.Options{UKI: bytes.Repeat([]byte("kernel "), 1<<14), Arch: "amd64", Config: config.DemoYAML}); err != nil {
		t.Fatal(err)
	}
	img, err := os.ReadFile(stick)
	if err != nil {
		t.Fatal(err)
	}
	files, err := disk.Open(bytes.NewReader(img), int64(len(img)))
	if err != nil {
		t.Fatal(err)
	}
	m := &image.Manifest{Format: 1, Cluster: "demo", Board: "pc-x86_64"}
	for _, name := range []string{"cluster.yaml", disk.BootFile("amd64")} {
		data, err := files.ReadFile(name, 1<<20)
		if err != nil {
			t.Fatal(err)
		}
		m.Stick = append(m.Stick, image.NewFile(name, data))
	}
	write := func(name string, data []byte, perm os.FileMode) {
		t.Helper()
		if err := image.WriteFile(filepath.Join(dir, name), data, perm); err != nil {
			t.Fatal(err)
		}
	}
	m.AddOutputs(image.NewFile(bundle.StickName, img))
	for _, f := range []struct {
		name string
		data []byte
		perm os.FileMode
	}{
		{configName, cpio, 0o600}, {initrdName, bytes.Repeat([]byte("i"), 100_000), 0o600}, {efiName, bytes.Repeat([]byte("e"), 300_000), 0o600},
		{kernelName, bytes.Repeat([]byte("k"), 5_000_000), 0o644}, {"undionly.kpxe", bytes.Repeat([]byte("u"), 70_000), 0o644},
	} {
		write(f.name, f.data, f.perm)
		m.AddOutputs(image.NewFile(f.name, f.data))
	}
	text, err := m.Bytes()
	if err != nil {
		t.Fatal(err)
	}
	write(manifestName, text, 0o644)
	m.AddOutputs(image.NewFile(manifestName, text))
	var sums strings.Builder
	for _, f := range m.Files() {
		fmt.Fprintf(&sums, "%s  %s\n", f.SHA256, f.Name)
	}
	write(bundle.SumsName, []byte(sums.String()), 0o644)
	return dir
}

// sign signs the manifest of a folder, and gives the public key.
func sign(t *testing.T, dir string) (public string) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "key")
	if _, err := keys.New(file, ""); err != nil {
		t.Fatal(err)
	}
	key, err := keys.Load(file, nil)
	if err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(filepath.Join(dir, manifestName))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, bundle.SignatureName), minisign.Sign(key, text), 0o644); err != nil {
		t.Fatal(err)
	}
	return file + ".pub"
}

// says runs clonectl as a process of its own, and gives what it says and its exit
// code.
func says(t *testing.T, args ...string) (string, int) {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return output(t, exec.Command(self, args...))
}

// saysToNobody is says for a user without any rights.
func saysToNobody(t *testing.T, args ...string) (string, int) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("becoming another user needs root")
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	program := filepath.Join(openTemp(t), "clonectl")
	if err := os.Link(self, program); err != nil {
		t.Skip("the test's program cannot be put where others see it: ", err)
	}
	cmd := exec.Command(program, args...)
	cmd.Dir = filepath.Dir(program)
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	return output(t, cmd)
}

func output(t *testing.T, cmd *exec.Cmd) (string, int) {
	t.Helper()
	cmd.Env = append(os.Environ(), netnstest.ProgramEnv+"=clonectl")
	out, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return string(out), cmd.ProcessState.ExitCode()
}

// flip changes a byte in the middle of a file.
func flip(t *testing.T, path string) {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	at := max(len(data)/2, bytes.LastIndex(data, []byte("kernel "))) // the latter in the stick's unified image
	data[at] ^= 1
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
}

// Who may not read the files of mode 0600 is told so, and that is no difference.
func TestOfAnotherUser(t *testing.T) {
	dir := builtFolder(t)
	img := filepath.Join(dir, bundle.StickName)
	signed, hidden := builtFolder(t), builtFolder(t)
	public := sign(t, signed)
	target := filepath.Join(openTemp(t), "target")
	if err := errors.Join(os.WriteFile(target, nil, 0o600), os.Truncate(target, 128<<20)); err != nil {
		t.Fatal(err)
	}
	for path, perm := range map[string]os.FileMode{
		filepath.Join(hidden, bundle.StickName): 0o644, manifestOf(filepath.Join(hidden, bundle.StickName)): 0o600,
		filepath.Join(signed, bundle.StickName): 0o644, filepath.Join(signed, bundle.SignatureName): 0o600, target: 0o666,
		filepath.Dir(public): 0o755, filepath.Dir(filepath.Dir(public)): 0o755, public: 0o600,
	} {
		if err := os.Chmod(path, perm); err != nil {
			t.Fatal(err)
		}
	}
	differs := builtFolder(t)
	flip(t, filepath.Join(differs, kernelName))
	if err := os.Chmod(filepath.Join(differs, kernelName), 0o644); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		args []string
		want string
	}{
		{[]string{"verify", dir, "--public-key", public}, "permission denied; give a file that you can read, the FILE.pub of"},
		{[]string{"flash", target, "--yes", "--image", filepath.Join(hidden, bundle.StickName)}, "manifest.json: permission denied; what holds the cluster's key has mode 0600"},
		{[]string{"flash", target, "--yes", "--image", filepath.Join(signed, bundle.StickName)}, "manifest.json.minisig: permission denied; what holds the cluster's key has mode 0600"},
		{[]string{"verify", dir}, "4 files could not be compared; what holds the cluster's key has mode 0600, and devices are root's: run this as"},
		{[]string{"verify", img}, "permission denied; what holds the cluster's key has mode 0600"},
		{[]string{"flash", "/dev/null", "--yes", "--image", img}, "permission denied; what holds the cluster's key has mode 0600"},
		{[]string{"serve", dir}, "could not be compared; what holds the cluster's key has mode 0600"},
	} {
		out, code := saysToNobody(t, tt.args...)
		if code != exitFailure || !strings.Contains(out, tt.want) {
			t.Errorf("clonectl %q ends with %d and says %q; want %q", tt.args, code, out, tt.want)
		}
	}
	want := "is not as the manifest says: 1 problem; 4 files could not be compared: what holds the cluster's key has mode 0600"
	if out, code := saysToNobody(t, "verify", differs); code != exitDiffers || !strings.Contains(out, want) {
		t.Errorf("clonectl verify of a changed file ends with %d and says %q; want %q", code, out, want)
	}
}

// What a build is made of has owners, too.
func TestInputOfAnotherUser(t *testing.T) {
	dir := openTemp(t)
	secret := filepath.Join(dir, "secret")
	if err := os.WriteFile(secret, config.DemoYAML, 0o600); err != nil {
		t.Fatal(err)
	}
	folder, www := filepath.Join(dir, "folder"), filepath.Join(dir, "www")
	for path, perm := range map[string]os.FileMode{folder: 0o700, www: 0o755} {
		if err := os.Mkdir(path, perm); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(www, "index.html"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	public := filepath.Join(dir, "sb")
	if _, err := keys.NewSecureBoot(public, "test"); err != nil {
		t.Fatal(err)
	}
	shop := filepath.Join(dir, "shop.yaml")
	text := strings.Replace(string(config.DemoYAML), "\nservices:\n", "\nservices:\n  - {name: shop, run: [/bin/webd], content: ./folder, ports: [8082/tcp]}\n", 1)
	if err := os.WriteFile(shop, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{
		{"config", "check", secret}, {"config", "check", shop}, {"build", "--config", secret}, {"image", "--config", secret}, {"build", "--key", secret},
		{"build", "--content", folder}, {"build", "--content", filepath.Join(folder, "www")},
		{"build", "--secure-boot-key", filepath.Join(public, keys.SecureBootKey), "--secure-boot-cert", filepath.Join(public, keys.SecureBootCert)},
	} {
		out, code := saysToNobody(t, args...)
		if code != exitFailure || !strings.Contains(out, "permission denied") || !strings.Contains(out, "; "+rightsFix+"\n") || strings.Contains(out, "there is no") || strings.Contains(out, "makes it") {
			t.Errorf("clonectl %q ends with %d and says %q; want permission denied, and %q", args, code, out, rightsFix)
		}
	}
}

// Before anything is written, the image is compared with the manifest beside it.
func TestFlashCompares(t *testing.T) {
	key := filepath.Join(t.TempDir(), "key")
	if _, err := keys.New(key, ""); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name   string
		change func(t *testing.T, img string)
		args   []string
		signed bool // and the key of it given
		want   string
		code   int
	}{
		{name: "signed", signed: true, want: `board pc-x86_64; signature: good`},
		{name: "signed, a flipped byte", change: flip, signed: true, want: "and nothing was written: build it with clonectl build, or fetch it, again\nEFI/", code: exitFailure},
		{name: "signed by another key", change: func(t *testing.T, img string) { sign(t, filepath.Dir(img)) }, args: []string{"--public-key", key + ".pub"},
			want: "usb.img is not signed by the public key of --public-key, and nothing was written: manifest.json.minisig: is by another key, ", code: exitFailure},
		{name: "as it was built", want: `usb.img with manifest.json: cluster "demo", board pc-x86_64; signature: none`},
		{name: "a flipped byte", change: flip, want: "and nothing was written: build it with clonectl build, or fetch it, again\nEFI/BOOT/BOOTX64.EFI: has been changed on ", code: exitFailure},
		{name: "no manifest", change: func(t *testing.T, img string) {
			if err := os.Remove(manifestOf(img)); err != nil {
				t.Fatal(err)
			}
		}, want: "compared   with nothing: there is no manifest.json that lists it"},
		{name: "no manifest, and a key", change: func(t *testing.T, img string) {
			if err := os.Remove(manifestOf(img)); err != nil {
				t.Fatal(err)
			}
		}, args: []string{"--public-key", key + ".pub"}, want: "so nothing says that the key has signed it: copy manifest.json and manifest.json.minisig", code: exitFailure},
		{name: "not signed", args: []string{"--public-key", key + ".pub"}, want: "usb.img is not signed by the public key of --public-key, and nothing was written: manifest.json.minisig: is missing: the manifest is not signed; build with --key", code: exitFailure},
		{name: "the secret key", args: []string{"--public-key", key}, want: "is a secret key", code: exitFailure},
		{name: "half a manifest", change: func(t *testing.T, img string) {
			if err := os.Truncate(manifestOf(img), 100); err != nil {
				t.Fatal(err)
			}
		}, want: "take it away to write the image without comparing it", code: exitFailure},
		{name: "edited", change: func(t *testing.T, img string) {
			data, err := os.ReadFile(img)
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(img, bytes.Replace(data, []byte("detect: relaxed"), []byte("detect: fast   "), 1), 0o600); err != nil {
				t.Fatal(err)
			}
		}, want: "and is valid; nodes booted from it use it"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			img := filepath.Join(builtFolder(t), bundle.StickName)
			if tt.change != nil {
				tt.change(t, img)
			}
			if tt.signed {
				tt.args = []string{"--public-key", sign(t, filepath.Dir(img))}
			}
			target := filepath.Join(t.TempDir(), "target")
			if err := os.WriteFile(target, bytes.Repeat([]byte{0xaa}, 80<<20), 0o600); err != nil {
				t.Fatal(err)
			}
			out, code := says(t, append([]string{"flash", target, "--yes", "--image", img}, tt.args...)...)
			if code != tt.code || !strings.Contains(out, tt.want) {
				t.Errorf("clonectl flash ends with %d and says %q; want %d, %q", code, out, tt.code, tt.want)
			}
			got, err := os.ReadFile(target)
			if err != nil {
				t.Fatal(err)
			}
			want, err := os.ReadFile(img)
			if err != nil {
				t.Fatal(err)
			}
			if tt.code == 0 && (!bytes.HasPrefix(got, want) || !strings.Contains(out, "\nwritten    "+target) || !strings.Contains(out, "\nread back  "+target)) {
				t.Errorf("the image is not what is there, or it was not said: %q", out)
			}
			if tt.code != 0 && sha256.Sum256(got) != sha256.Sum256(bytes.Repeat([]byte{0xaa}, 80<<20)) {
				t.Error("something was written")
			}
		})
	}
}

// What serve would hand out is compared with the manifest first.
func TestServeCompares(t *testing.T) {
	for _, tt := range []struct {
		name   string
		change func(t *testing.T, dir string)
		want   string
	}{
		{"signed by that key", nil, `no network interface "nonexistent"`}, // nothing else is wrong
		{"signed by another key", func(t *testing.T, dir string) { sign(t, dir) },
			"is not signed by the public key of --public-key, and is not handed out: manifest.json.minisig: is by another key, "},
		{"not signed", func(t *testing.T, dir string) {
			if err := os.Remove(filepath.Join(dir, bundle.SignatureName)); err != nil {
				t.Fatal(err)
			}
		}, "is not signed by the public key of --public-key, and is not handed out: manifest.json.minisig: is missing"},
		{"a flipped byte", func(t *testing.T, dir string) { flip(t, filepath.Join(dir, initrdName)) },
			"is not what its manifest says, and is not handed out: build it again with \"clonectl build --config cluster.yaml --board pc-x86_64 --out "},
		{"names the file", func(t *testing.T, dir string) { flip(t, filepath.Join(dir, initrdName)) }, "\ninitrd.img: has been changed: "},
		{"another .efi", func(t *testing.T, dir string) { flip(t, filepath.Join(dir, efiName)) }, "\nclonecluster.efi: has been changed: "},
		{"no kernel", func(t *testing.T, dir string) {
			if err := os.Remove(filepath.Join(dir, kernelName)); err != nil {
				t.Fatal(err)
			}
		}, "\nbzImage: is missing"},
		{"no manifest", func(t *testing.T, dir string) {
			if err := os.Remove(filepath.Join(dir, manifestName)); err != nil {
				t.Fatal(err)
			}
		}, "has no manifest.json, which says what its files have to be"},
		{"a file", func(t *testing.T, dir string) {
			if err := os.RemoveAll(dir); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(dir, nil, 0o600); err != nil {
				t.Fatal(err)
			}
		}, "is a file; give the folder"},
		{"what is not handed out", func(t *testing.T, dir string) { flip(t, filepath.Join(dir, bundle.StickName)) }, `no network interface "nonexistent"`},
		{"nothing is there", func(t *testing.T, dir string) {
			if err := os.RemoveAll(dir); err != nil {
				t.Fatal(err)
			}
		}, "holds no image; build one with \"clonectl build --config cluster.yaml --board pc-x86_64 --out "},
	} {
		dir := builtFolder(t)
		o := serveOptions{httpPort: 1, folders: []string{dir}, iface: "nonexistent", public: sign(t, dir)}
		if tt.change != nil {
			tt.change(t, dir)
		}
		if _, err := o.options(t.Context(), newProgress(os.Stderr)); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v; want %q", tt.name, err, tt.want)
		}
	}
}

// TestReadKnown: what is read after it was compared is what was compared.
func TestReadKnown(t *testing.T) {
	file := filepath.Join(t.TempDir(), initrdName)
	if err := os.WriteFile(file, []byte("as built"), 0o600); err != nil {
		t.Fatal(err)
	}
	fi, err := os.Stat(file)
	if err != nil {
		t.Fatal(err)
	}
	known := map[string]fs.FileInfo{initrdName: fi}
	if data, err := readKnown(file, known); err != nil || string(data) != "as built" {
		t.Errorf("%q, %v", data, err)
	}
	if _, err := readKnown(file, nil); err == nil {
		t.Error("a file that nobody compared is read")
	}
	if err := os.WriteFile(file, []byte("changed since"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := readKnown(file, known); err == nil || !strings.Contains(err.Error(), "start serve again") {
		t.Errorf("a changed file: %v", err)
	}
}

// TestEmptyFlags: a variable of a shell that is not set is not taken for a flag that is not
// given.
func TestEmptyFlags(t *testing.T) {
	for _, args := range [][]string{
		{"verify", ".", "--public-key", ""}, {"flash", "/dev/null", "--public-key", ""}, {"serve", ".", "--public-key="},
		{"build", "--key", ""}, {"build", "--config", ""}, {"image", "--config", ""},
	} {
		if out, code := says(t, args...); code != exitUsage || !strings.Contains(out, "is empty: give a value, or leave it out") {
			t.Errorf("clonectl %q ends with %d and says %q", args, code, out)
		}
	}
}

// TestWhichConfiguration: a build says if it is not of the configuration that is there, and
// if everybody has its key.
func TestWhichConfiguration(t *testing.T) {
	t.Chdir(t.TempDir())
	const note, warning = "note: this builds the demo's configuration", "warning: the cluster's key is the demo's"
	try := func(args ...string) string {
		// What is wrong is found after that.
		out, code := says(t, append(args, "--kernel-source", "none")...)
		if code != exitFailure {
			t.Fatalf("clonectl %q ends with %d and says %q", args, code, out)
		}
		return out
	}
	if out := try("image"); strings.Contains(out, note) || strings.Contains(out, warning) {
		t.Errorf("the demo: %s", out)
	}
	if out := try("build", "--board", "pc-x86_64"); !strings.Contains(out, warning) {
		t.Errorf("the demo's key for machines: %s", out)
	}
	example, code := says(t, "config", "example")
	if code != 0 {
		t.Fatal(example)
	}
	if err := os.WriteFile("cluster.yaml", []byte(example), 0o600); err != nil {
		t.Fatal(err)
	}
	if out := try("build", "--board", "pc-x86_64"); !strings.Contains(out, note) {
		t.Errorf("without --config: %s", out)
	}
	key := config.DemoYAML[bytes.Index(config.DemoYAML, []byte("key: ")):]
	own := strings.Replace(example, string(key[:bytes.IndexByte(key, '\n')]), "key: MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY=", 1)
	if err := os.WriteFile("cluster.yaml", []byte(own), 0o600); err != nil {
		t.Fatal(err)
	}
	if out := try("build", "--board", "pc-x86_64", "--config", "cluster.yaml"); strings.Contains(out, note) || strings.Contains(out, warning) {
		t.Errorf("with a configuration of one's own: %s", out)
	}
}
