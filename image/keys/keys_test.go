package keys

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"aead.dev/minisign"
)

func TestNew(t *testing.T) {
	for _, word := range []string{"", "a password"} {
		path := filepath.Join(t.TempDir(), "sub", "key")
		public, err := New(path, word)
		if err != nil {
			t.Fatal(err)
		}
		if fi, err := os.Stat(path); err != nil || fi.Mode() != 0o600 {
			t.Errorf("the secret key: %v, %v; want mode 0600", fi, err)
		}
		if _, err := New(path, word); err == nil || !strings.Contains(err.Error(), "exists, and a key that is overwritten is lost") {
			t.Errorf("over a key: %v", err)
		}
		key, err := Load(path, func() (string, error) { return word, nil })
		if err != nil {
			t.Fatal(err)
		}
		if got, err := LoadPublic(public.String()); err != nil || !got.Equal(public) {
			t.Errorf("a public key by its text: %v", err)
		}
		if !minisign.Verify(public, []byte("text"), minisign.Sign(key, []byte("text"))) {
			t.Error("the two keys do not belong together")
		}
		if word != "" {
			if _, err := Load(path, func() (string, error) { return "another", nil }); err == nil || !strings.Contains(err.Error(), "the password is not right") {
				t.Errorf("with another password: %v", err)
			}
		}
		if _, err := LoadPublic(path); err == nil || !strings.Contains(err.Error(), "is a secret key, which stays with who signs: give the public one, which clonectl key new has put beside it as "+path+".pub") {
			t.Errorf("the secret key as a public one: %v", err)
		}
		// Debian's program signs with our key.
		if _, err := exec.LookPath("minisign"); err != nil || word != "" { // it asks for passwords on the terminal only
			continue
		}
		file := filepath.Join(filepath.Dir(path), "file")
		if err := os.WriteFile(file, []byte("text"), 0o644); err != nil {
			t.Fatal(err)
		}
		if out, err := exec.Command("minisign", "-S", "-W", "-s", path, "-m", file).CombinedOutput(); err != nil {
			t.Fatalf("minisign -S: %v\n%s", err, out)
		}
		sig, err := os.ReadFile(file + ".minisig")
		if err != nil || !minisign.Verify(public, []byte("text"), sig) {
			t.Errorf("minisign's signature does not fit (%v)", err)
		}
	}
	// The public key's name is taken: nothing is written.
	path := filepath.Join(t.TempDir(), "key")
	if err := os.WriteFile(path+".pub", nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := New(path, ""); err == nil {
		t.Error("overwrote a public key")
	}
	if _, err := os.Stat(path); err == nil {
		t.Error("left half a pair")
	}
}

// Errors say what to do.
func TestErrors(t *testing.T) {
	dir := t.TempDir()
	write := func(name string, data []byte) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, data, 0o644); err != nil {
			t.Fatal(err)
		}
		return path
	}
	key := filepath.Join(dir, "key")
	if _, err := New(key, ""); err != nil {
		t.Fatal(err)
	}
	load := func(path string) error {
		_, err := Load(path, func() (string, error) { return "", nil })
		return err
	}
	secure := func(path string) error {
		_, _, err := LoadSecureBoot(path, path)
		return err
	}
	for _, tt := range []struct {
		name string
		err  error
		want string
	}{
		{"a configuration for a key", load(write("cluster.yaml", []byte("cluster: {}\n"))), "cluster.yaml is no minisign secret key; make one with: clonectl key new"},
		{"an empty key", load(write("empty", nil)), "is no minisign secret key; make one with: clonectl key new"},
		{"a public key", load(key + ".pub"), "is a public key, and only the secret one signs"},
		{"no file", load(filepath.Join(dir, "none")), "make one with: clonectl key new " + dir},
		{"a folder", load(dir), "is a directory"},
		{"an endless file", load("/dev/zero"), "/dev/zero is larger than any key"},
		{"an endless certificate", secure("/dev/zero"), "/dev/zero is larger than any key"},
		{"a certificate that is none", secure(key), "has no CERTIFICATE in PEM form; clonectl key secure-boot makes one"},
		{"an encrypted key", secure(write("encrypted", []byte("-----BEGIN ENCRYPTED PRIVATE KEY-----\nAAAA\n-----END ENCRYPTED PRIVATE KEY-----\n"))), "openssl pkey -in"},
		{"nowhere", CheckNew("/proc/none"), "/proc/none cannot be made; give a place that you can write to"},
		{"below a file", CheckNew(filepath.Join(key, "key")), "cannot be made; give a place that you can write to"},
		{"there already", CheckNew(key), "exists, and a key that is overwritten is lost"},
		{"the public key there already", CheckNew(strings.TrimSuffix(write("old.pub", nil), ".pub")), "old.pub exists"},
	} {
		if tt.err == nil || !strings.Contains(tt.err.Error(), tt.want) {
			t.Errorf("%s: %v; want %q", tt.name, tt.err, tt.want)
		}
	}
	if err := CheckNew(filepath.Join(dir, "sub", "new")); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(filepath.Join(dir, "sub")); err == nil {
		t.Error("CheckNew left a folder")
	}
}

func TestNewSecureBoot(t *testing.T) {
	dir := t.TempDir()
	names, err := NewSecureBoot(dir, "a test")
	if err != nil {
		t.Fatal(err)
	}
	if want := "secure-boot.key secure-boot.pem secure-boot.cer db.esl db.auth KEK.esl KEK.auth PK.esl PK.auth"; strings.Join(names, " ") != want {
		t.Errorf("files %v; want %s", names, want)
	}
	if fi, err := os.Stat(filepath.Join(dir, SecureBootKey)); err != nil || fi.Mode() != 0o600 {
		t.Errorf("the secret key: %v, %v; want mode 0600", fi, err)
	}
	key, cert, err := LoadSecureBoot(filepath.Join(dir, SecureBootKey), filepath.Join(dir, SecureBootCert))
	if err != nil || cert.Subject.CommonName != "a test" {
		t.Fatalf("LoadSecureBoot: %v", err)
	}
	if p, ok := key.Public().(interface{ Equal(any) bool }); ok && !p.Equal(cert.PublicKey) {
		t.Error("the certificate is of another key")
	}
	if _, err := NewSecureBoot(dir, "again"); err == nil {
		t.Error("overwrote a key")
	}
	if _, _, err := LoadSecureBoot(filepath.Join(dir, SecureBootCert), filepath.Join(dir, SecureBootCert)); err == nil || !strings.Contains(err.Error(), "has no PRIVATE KEY in PEM form") {
		t.Errorf("a certificate for a key: %v", err)
	}
}

// Who gives the wrong file is told which one is the right one; of a secret key
// TestNew has it.
func TestLoadPublicErrors(t *testing.T) {
	other := filepath.Join(t.TempDir(), "other")
	if err := os.WriteFile(other, []byte("hello"), 0o644); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]string{
		other + ".none": "clonectl key new FILE",
		t.TempDir():     "is a directory; give a file that you can read, the FILE.pub of",
		other:           "is no minisign public key, as clonectl key new makes them (FILE.pub)",
	} {
		if _, err := LoadPublic(path); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("LoadPublic(%s) = %v; want %q", path, err, want)
		}
	}
}
