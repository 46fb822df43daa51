package uki

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"debug/pe"
	"encoding/binary"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	mrand "math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func stub(t testing.TB) []byte {
	t.Helper()
	data, _, err := Stub("amd64")
	if errors.Is(err, os.ErrNotExist) {
		t.Skip(err)
	} else if err != nil {
		t.Fatal(err)
	}
	return data
}

func noise(seed byte, size int) []byte {
	data := make([]byte, size)
	mrand.NewChaCha8([32]byte{seed}).Read(data)
	return data
}

// parts are odd in size, so that padding shows.
func parts(t testing.TB) Options {
	return Options{
		Stub: stub(t), Linux: noise(1, 300_001), Initrd: noise(2, 70_003), Cmdline: "console=ttyS0 quiet",
		OSRelease: "NAME=clonecluster\nID=clonecluster\n", Uname: "6.12.117-clone",
	}
}

func build(t testing.TB, o Options) []byte {
	t.Helper()
	data, err := Build(o)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func TestBuildThenRead(t *testing.T) {
	o := parts(t)
	data := build(t, o)
	if !bytes.Equal(data, build(t, o)) {
		t.Error("two builds differ")
	}
	m, err := Read(data)
	if err != nil {
		t.Fatal(err)
	}
	if !m.Right || m.Signed || m.Arch() != "amd64" {
		t.Errorf("checksum right %v, signed %v, architecture %q; want true, false, amd64", m.Right, m.Signed, m.Arch())
	}
	before, _ := Read(o.Stub)
	if m.Entry != before.Entry {
		t.Errorf("entry point %#x; the stub's is %#x", m.Entry, before.Entry)
	}
	for i, s := range before.Sections {
		if got := m.Sections[i]; got.Name != s.Name || got.Address != s.Address || !bytes.Equal(got.Data, s.Data) {
			t.Errorf("the stub's section %s has changed", s.Name)
		}
	}
	end := uint32(0)
	for i, s := range m.Sections {
		if s.Address < end {
			t.Errorf("section %s at %#x lies on the one before it, which ends at %#x", s.Name, s.Address, end)
		}
		end = s.Address + s.Size
		if i >= len(before.Sections) && (s.Address%pageSize != 0 || s.rawOffset%512 != 0 || s.rawSize%512 != 0) {
			t.Errorf("section %s: %#x in memory, %#x+%#x in the file: not aligned", s.Name, s.Address, s.rawOffset, s.rawSize)
		}
	}
	for name, want := range map[string][]byte{
		OSRelease: []byte(o.OSRelease), Cmdline: []byte(o.Cmdline), Uname: []byte(o.Uname), Initrd: o.Initrd, Linux: o.Linux,
	} {
		if s := m.Section(name); s == nil || !bytes.Equal(s.Data, want) {
			t.Errorf("section %s is not what was put in", name)
		}
	}
}

// TestSameAsObjcopy has the tool that everybody uses put the same parts
// together and compares all that a loader goes by.
func TestSameAsObjcopy(t *testing.T) {
	if _, err := exec.LookPath("objcopy"); err != nil {
		t.Skip("objcopy is not installed (apt-get install binutils)")
	}
	o := parts(t)
	ours := build(t, o)
	m, err := Read(ours)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	var args []string
	for i, p := range []struct {
		name string
		data []byte
	}{{OSRelease, []byte(o.OSRelease)}, {Cmdline, []byte(o.Cmdline)}, {Uname, []byte(o.Uname)}, {Initrd, o.Initrd}, {Linux, o.Linux}} {
		file := filepath.Join(dir, fmt.Sprint(i))
		if err := os.WriteFile(file, p.data, 0o600); err != nil {
			t.Fatal(err)
		}
		args = append(args, "--add-section", p.name+"="+file, "--change-section-vma", fmt.Sprintf("%s=%#x", p.name, m.Section(p.name).Address))
	}
	in, out := filepath.Join(dir, "stub"), filepath.Join(dir, "out")
	if err := os.WriteFile(in, o.Stub, 0o600); err != nil {
		t.Fatal(err)
	}
	if msg, err := exec.Command("objcopy", append(args, in, out)...).CombinedOutput(); err != nil {
		t.Fatalf("objcopy: %v\n%s", err, msg)
	}
	theirs, err := os.ReadFile(out)
	if err != nil {
		t.Fatal(err)
	}
	// By a reader that is neither's.
	a, b := parse(t, ours), parse(t, theirs)
	ha, hb := a.OptionalHeader.(*pe.OptionalHeader64), b.OptionalHeader.(*pe.OptionalHeader64)
	for _, f := range []struct {
		name       string
		ours, want any
	}{
		{"machine", a.Machine, b.Machine},
		{"number of sections", a.NumberOfSections, b.NumberOfSections},
		{"entry point", ha.AddressOfEntryPoint, hb.AddressOfEntryPoint},
		{"image base", ha.ImageBase, hb.ImageBase},
		{"subsystem", ha.Subsystem, hb.Subsystem},
		{"size of code", ha.SizeOfCode, hb.SizeOfCode},
		{"size of initialised data", ha.SizeOfInitializedData, hb.SizeOfInitializedData},
		{"section alignment", ha.SectionAlignment, hb.SectionAlignment},
		{"file alignment", ha.FileAlignment, hb.FileAlignment},
		{"size of headers", ha.SizeOfHeaders, hb.SizeOfHeaders},
		{"base relocations", ha.DataDirectory[5], hb.DataDirectory[5]},
	} {
		if f.ours != f.want {
			t.Errorf("%s: %v; objcopy's is %v", f.name, f.ours, f.want)
		}
	}
	// Objcopy counts up to the end of the file's padding, which is not in memory.
	if ha.SizeOfImage > hb.SizeOfImage || hb.SizeOfImage-ha.SizeOfImage >= 0x200 {
		t.Errorf("size of image: %#x; objcopy's is %#x", ha.SizeOfImage, hb.SizeOfImage)
	}
	if a.PointerToSymbolTable != 0 || a.NumberOfSymbols != 0 {
		t.Error("a symbol table is left")
	}
	if len(a.Sections) != len(b.Sections) {
		t.Fatalf("%d sections; objcopy's has %d", len(a.Sections), len(b.Sections))
	}
	for i, s := range a.Sections {
		w := b.Sections[i]
		if s.Name != w.Name || s.VirtualAddress != w.VirtualAddress || s.VirtualSize != w.VirtualSize || s.Size != w.Size {
			t.Errorf("section %+v; objcopy's is %+v", s.SectionHeader, w.SectionHeader)
			continue
		}
		x, _ := s.Data()
		y, _ := w.Data()
		if !bytes.Equal(x[:s.VirtualSize], y[:s.VirtualSize]) {
			t.Errorf("section %s: other contents than objcopy's", s.Name)
		}
	}
	// And ours reads what objcopy made.
	if m, err := Read(theirs); err != nil || !bytes.Equal(m.Section(Linux).Data, o.Linux) {
		t.Errorf("reading objcopy's: %v", err)
	}
}

func parse(t *testing.T, data []byte) *pe.File {
	t.Helper()
	f, err := pe.NewFile(bytes.NewReader(data))
	if err != nil {
		t.Fatal(err)
	}
	return f
}

func TestBuildErrors(t *testing.T) {
	good := parts(t)
	for _, tt := range []struct {
		name   string
		change func(*Options)
		want   string
	}{
		{"no kernel", func(o *Options) { o.Linux = nil }, "no kernel"},
		{"no stub", func(o *Options) { o.Stub = nil }, "no MZ"},
		{"half a stub", func(o *Options) { o.Stub = o.Stub[:len(o.Stub)/2] }, "cut short"},
		{"a line in the command line", func(o *Options) { o.Cmdline = "quiet\n" }, "character 6"},
		{"an image as the stub", func(o *Options) { o.Stub = build(t, good) }, ".osrel already"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			o := good
			tt.change(&o)
			if _, err := Build(o); err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("Build = %v; want an error with %q", err, tt.want)
			}
		})
	}
}

func TestStubErrors(t *testing.T) {
	if _, _, err := Stub("riscv64"); err == nil || !strings.Contains(err.Error(), "amd64 and arm64") {
		t.Errorf("Stub = %v; want what is known", err)
	}
	defer func(dirs []string) { stubDirs = dirs }(stubDirs)
	stubDirs = []string{t.TempDir()}
	if _, _, err := Stub("amd64"); !errors.Is(err, os.ErrNotExist) || !strings.Contains(err.Error(), "apt-get install systemd-boot-efi") {
		t.Errorf("Stub = %v; want the package", err)
	}
	if err := os.WriteFile(filepath.Join(stubDirs[0], "linuxaa64.efi.stub"), tiny(), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, _, err := Stub("arm64"); err == nil || !strings.Contains(err.Error(), "another machine") {
		t.Errorf("Stub = %v; want another machine", err)
	}
	stubDirs = nil
	if _, _, err := Stub("arm64", t.TempDir()); !errors.Is(err, os.ErrNotExist) || !strings.Contains(err.Error(), "make stub-arm") {
		t.Errorf("Stub = %v; want the command", err)
	}
	more := t.TempDir()
	if err := os.WriteFile(filepath.Join(more, "linuxx64.efi.stub"), tiny(), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, path, err := Stub("amd64", t.TempDir(), more); err != nil || filepath.Dir(path) != more {
		t.Errorf("Stub = %s, %v; want that of %s", path, err, more)
	}
}

// tiny is a PE image with one section, for tests without a stub.
func tiny() []byte {
	le := binary.LittleEndian
	b := make([]byte, 1024)
	copy(b, "MZ")
	le.PutUint32(b[60:], 64)
	copy(b[64:], "PE\x00\x00")
	le.PutUint16(b[68:], 0x8664)
	le.PutUint16(b[70:], 1)
	le.PutUint16(b[84:], 240)
	o := b[88:]
	le.PutUint16(o, 0x20b)
	le.PutUint32(o[32:], 512)
	le.PutUint32(o[36:], 512)
	le.PutUint32(o[56:], 0x1200)
	le.PutUint32(o[60:], 512)
	le.PutUint32(o[108:], 16)
	s := b[88+240:]
	copy(s, ".text")
	le.PutUint32(s[8:], 100)
	le.PutUint32(s[12:], 0x1000)
	le.PutUint32(s[16:], 512)
	le.PutUint32(s[20:], 512)
	return b
}

func TestReadDamaged(t *testing.T) {
	le := binary.LittleEndian
	for _, tt := range []struct {
		name   string
		damage func([]byte) []byte
		want   string
	}{
		{"empty", func([]byte) []byte { return nil }, "no MZ"},
		{"header elsewhere", func(b []byte) []byte { le.PutUint32(b[60:], 1<<31); return b }, "no PE header"},
		{"32 bits", func(b []byte) []byte { le.PutUint16(b[88:], 0x10b); return b }, "only PE32+"},
		{"many sections", func(b []byte) []byte { le.PutUint16(b[70:], 0xffff); return b }, "do not fit"},
		{"huge headers", func(b []byte) []byte { le.PutUint32(b[88+60:], 1<<30); return b }, "headers of"},
		{"odd alignment", func(b []byte) []byte { le.PutUint32(b[88+36:], 513); return b }, "alignment of 513"},
		{"section outside", func(b []byte) []byte { le.PutUint32(b[88+240+20:], 0xfffffe00); return b }, "cut short"},
		{"truncated", func(b []byte) []byte { return b[:700] }, "cut short"},
		{"certificates outside", func(b []byte) []byte { le.PutUint32(b[88+144:], 1000); le.PutUint32(b[88+148:], 25); return b }, "certificates"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if _, err := Read(tt.damage(tiny())); err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("Read = %v; want an error with %q", err, tt.want)
			}
		})
	}
	if m, err := Read(tiny()); err != nil || len(m.Section(".text").Data) != 100 {
		t.Errorf("Read of the undamaged = %v", err)
	}
}

// TestChecksum uses the stub's own, which the linker computed.
func TestChecksum(t *testing.T) {
	data := stub(t)
	if m, err := Read(data); err != nil || !m.Right {
		t.Fatalf("the stub's checksum %#x is not seen as right (%v)", m.Checksum, err)
	}
	data[len(data)/2]++
	if m, err := Read(data); err != nil || m.Right {
		t.Errorf("a changed stub's checksum is seen as right (%v)", err)
	}
}

func newKey(t testing.TB) (*rsa.PrivateKey, *x509.Certificate) {
	t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "clonecluster test"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return key, cert
}

func TestSign(t *testing.T) {
	key, cert := newKey(t)
	plain := build(t, parts(t))
	signed, err := Sign(plain, key, cert)
	if err != nil {
		t.Fatal(err)
	}
	if err := Verify(signed, cert); err != nil {
		t.Error(err)
	}
	if m, err := Read(signed); err != nil || !m.Signed || !m.Right {
		t.Errorf("signed %v, checksum right %v, %v; want true, true, nil", m.Signed, m.Right, err)
	}
	if back, err := Unsigned(signed); err != nil || !bytes.Equal(back, plain) {
		t.Errorf("taking the signature away does not give what was signed (%v)", err)
	}
	if err := Verify(plain, cert); !errors.Is(err, ErrUnsigned) {
		t.Errorf("Verify of an unsigned image = %v; want ErrUnsigned", err)
	}
	if _, other := newKey(t); Verify(signed, other) == nil {
		t.Error("another key's certificate verifies it")
	}
	m, _ := Read(signed)
	for _, name := range []string{".text", Cmdline, Initrd, Linux} {
		bad := bytes.Clone(signed)
		bad[m.Section(name).rawOffset]++
		if Verify(bad, cert) == nil {
			t.Errorf("a changed byte in %s goes unnoticed", name)
		}
	}
	// A judge that is not ours.
	if _, err := exec.LookPath("sbverify"); err != nil {
		t.Skip("sbverify is not installed (apt-get install sbsigntool)")
	}
	dir := t.TempDir()
	certFile := filepath.Join(dir, "cert.pem")
	if err := os.WriteFile(certFile, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Raw}), 0o600); err != nil {
		t.Fatal(err)
	}
	judge := func(data []byte) (string, error) {
		file := filepath.Join(dir, "image.efi")
		if err := os.WriteFile(file, data, 0o600); err != nil {
			t.Fatal(err)
		}
		out, err := exec.Command("sbverify", "--cert", certFile, file).CombinedOutput()
		return string(out), err
	}
	if out, err := judge(signed); err != nil {
		t.Errorf("sbverify: %v\n%s", err, out)
	}
	bad := bytes.Clone(signed)
	bad[m.Section(Initrd).rawOffset+5000]++
	if out, err := judge(bad); err == nil {
		t.Errorf("sbverify accepts a changed byte: %s", out)
	}
}

func TestSignRefuses(t *testing.T) {
	key, cert := newKey(t)
	_, other := newKey(t)
	if _, err := Sign(tiny(), key, other); err == nil || !strings.Contains(err.Error(), "another key") {
		t.Errorf("Sign = %v; want another key", err)
	}
	ec, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Sign(tiny(), ec, cert); err == nil || !strings.Contains(err.Error(), "RSA") {
		t.Errorf("Sign = %v; want RSA only", err)
	}
}

func FuzzRead(f *testing.F) {
	f.Add(tiny())
	f.Add(tiny()[:700])
	odd := tiny()
	copy(odd[65:], odd[64:1000])
	odd[60] = 65
	f.Add(odd)
	f.Fuzz(func(t *testing.T, data []byte) {
		m, err := Read(data)
		if err != nil {
			return
		}
		for _, s := range m.Sections {
			if len(s.Data) > len(data) || len(s.Data) > int(s.Size) {
				t.Errorf("section of %d bytes in %d", len(s.Data), len(data))
			}
		}
		if plain, err := Unsigned(data); err == nil && m.Signed {
			if again, err := Read(plain); err == nil && again.Signed {
				t.Error("still signed")
			}
		}
		// What was read as a stub can be built upon, or is refused.
		if out, err := Build(Options{Stub: data, Linux: []byte("kernel")}); err == nil {
			if again, err := Read(out); err != nil || string(again.Section(Linux).Data) != "kernel" {
				t.Errorf("what was built cannot be read: %v", err)
			}
		}
	})
}
