// Package keys makes and reads the keys that sign a build: minisign's for its
// manifest, and RSA with a certificate for UEFI Secure Boot.
package keys

import (
	"bytes"
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/big"
	"os"
	"path/filepath"
	"time"

	"aead.dev/minisign"
	"github.com/foxboron/go-uefi/efi/signature"
	"github.com/foxboron/go-uefi/efi/util"
	"github.com/foxboron/go-uefi/efivar"
)

// file is one to be written.
type file struct {
	path string
	data []byte
	perm fs.FileMode
}

// writeNew writes files that must not exist yet: a key that is overwritten is
// lost. If one cannot be written, none stays.
func writeNew(files ...file) error {
	for _, f := range files {
		if err := checkNew(f.path); err != nil {
			return err
		}
	}
	for i, f := range files {
		if err := f.create(); err != nil {
			for _, written := range files[:i] {
				os.Remove(written.path)
			}
			return err
		}
	}
	return nil
}

func checkNew(path string) error {
	if _, err := os.Lstat(path); err == nil {
		return fmt.Errorf("%s exists, and a key that is overwritten is lost; give another name, or move it away", path)
	}
	return nil
}

func (f file) create() error {
	err := os.MkdirAll(filepath.Dir(f.path), 0o755)
	var out *os.File
	if err == nil {
		out, err = os.OpenFile(f.path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, f.perm)
	}
	if err != nil {
		return fmt.Errorf("%s cannot be made; give a place that you can write to: %w", f.path, err)
	}
	_, err = out.Write(f.data)
	if err = errors.Join(err, out.Chmod(f.perm), out.Sync(), out.Close()); err != nil {
		os.Remove(f.path)
		return fmt.Errorf("writing %s: %w", f.path, err)
	}
	return nil
}

// CheckNew tells whether New could make its two files, before a password is asked
// for: an error is that of New.
func CheckNew(path string) error {
	dir := filepath.Dir(path)
	if _, err := os.Stat(dir); errors.Is(err, fs.ErrNotExist) {
		defer os.Remove(dir)
	}
	for _, f := range []file{{path, nil, 0o600}, {path + ".pub", nil, 0o644}} {
		if err := writeNew(f); err != nil {
			return err
		}
		os.Remove(f.path)
	}
	return nil
}

// New makes a minisign key pair: the secret key at path, with mode 0600,
// encrypted unless the password is empty, and the public one at path + ".pub".
// Neither may exist.
func New(path, password string) (minisign.PublicKey, error) {
	public, private, err := minisign.GenerateKey(rand.Reader)
	if err != nil {
		return public, fmt.Errorf("making a key: %w", err)
	}
	secret, err := private.MarshalText()
	if password != "" {
		secret, err = minisign.EncryptKey(password, private)
	}
	if err != nil {
		return public, fmt.Errorf("making a key: %w", err)
	}
	text, err := public.MarshalText()
	if err != nil {
		return public, fmt.Errorf("making a key: %w", err)
	}
	return public, writeNew(file{path, append(secret, '\n'), 0o600}, file{path + ".pub", append(text, '\n'), 0o644})
}

// Load reads a minisign secret key; password is asked for if it is encrypted.
func Load(path string, password func() (string, error)) (minisign.PrivateKey, error) {
	var key minisign.PrivateKey
	data, err := readFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return key, fmt.Errorf("reading the key: %w; make one with: clonectl key new %s", err, path)
	} else if err != nil {
		return key, fmt.Errorf("reading the key: %w", err)
	}
	data = bytes.TrimSpace(data)
	if !minisign.IsEncrypted(data) {
		if key.UnmarshalText(data) == nil {
			return key, nil
		}
		if public := (minisign.PublicKey{}); public.UnmarshalText(data) == nil {
			return key, fmt.Errorf("%s is a public key, and only the secret one signs; %q made it beside this one, without .pub", path, "clonectl key new")
		}
		return key, fmt.Errorf("%s is no minisign secret key; make one with: clonectl key new cluster.key", path)
	}
	word, err := password()
	if err != nil {
		return key, err
	}
	if key, err = minisign.DecryptKey(word, data); err != nil {
		return key, fmt.Errorf("%s: the password is not right, or the file is damaged", path)
	}
	return key, nil
}

// maxFile bounds what is read as a key or a certificate.
const maxFile = 64 << 10

// readFile is os.ReadFile for small files.
func readFile(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err == nil && len(data) > maxFile {
		err = fmt.Errorf("%s is larger than any key", path)
	}
	return data, err
}

// LoadPublic reads a minisign public key: a file, or the line of one.
func LoadPublic(text string) (minisign.PublicKey, error) {
	var key minisign.PublicKey
	if key.UnmarshalText([]byte(text)) == nil {
		return key, nil
	}
	data, err := readFile(text)
	if errors.Is(err, fs.ErrNotExist) {
		return key, fmt.Errorf("there is no public key %s: who signs makes it, as FILE.pub, with clonectl key new FILE; the line of such a file does as well", text)
	} else if err != nil {
		return key, fmt.Errorf("reading the public key: %w; give a file that you can read, the FILE.pub of clonectl key new FILE, or the line of it", err)
	}
	data = bytes.TrimSpace(data)
	if err := key.UnmarshalText(data); err != nil {
		if new(minisign.PrivateKey).UnmarshalText(data) == nil || minisign.IsEncrypted(data) {
			return key, fmt.Errorf("%s is a secret key, which stays with who signs: give the public one, which clonectl key new has put beside it as %s.pub", text, text)
		}
		return key, fmt.Errorf("%s is no minisign public key, as clonectl key new makes them (FILE.pub): %w", text, err)
	}
	return key, nil
}

// The files of NewSecureBoot.
const (
	SecureBootKey  = "secure-boot.key"
	SecureBootCert = "secure-boot.pem"
)

// NewSecureBoot makes an RSA key with a certificate that it signs itself, and
// what firmware is given so that it starts nothing else: the certificate (DER)
// for its menus, and the variables db, KEK and PK, as signature lists (.esl) and
// as signed updates (.auth), for tools. One key is all three. It gives the names
// of the files.
func NewSecureBoot(dir, name string) ([]string, error) {
	key, err := rsa.GenerateKey(rand.Reader, 2048) // what all firmware knows
	if err != nil {
		return nil, fmt.Errorf("making a key: %w", err)
	}
	now := time.Now().UTC().Truncate(time.Second)
	serial := sha256.Sum256(key.N.Bytes())
	template := &x509.Certificate{
		SerialNumber: new(big.Int).SetBytes(serial[:16]), Subject: pkix.Name{CommonName: name},
		NotBefore: now, NotAfter: now.AddDate(30, 0, 0), // firmware does not look
		KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageCodeSigning},
		BasicConstraintsValid: true, IsCA: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return nil, fmt.Errorf("making the certificate: %w", err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("making the certificate: %w", err)
	}
	secret, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, fmt.Errorf("making a key: %w", err)
	}
	files := []file{
		{SecureBootKey, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: secret}), 0o600},
		{SecureBootCert, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o644},
		{"secure-boot.cer", der, 0o644},
	}
	owner := util.EFIGUID{Data1: 0xc10ec105, Data2: 0x7e12, Data3: 0x4c1c, Data4: [8]uint8(serial[16:24])}
	for _, v := range []efivar.Efivar{efivar.Db, efivar.KEK, efivar.PK} {
		list := signature.NewSignatureDatabase()
		if err := list.Append(signature.CERT_X509_GUID, owner, der); err != nil {
			return nil, fmt.Errorf("making %s: %w", v.Name, err)
		}
		_, signed, err := signature.SignEFIVariable(v, list, key, cert)
		if err != nil {
			return nil, fmt.Errorf("making %s: %w", v.Name, err)
		}
		var auth bytes.Buffer
		signed.Marshal(&auth)
		files = append(files, file{v.Name + ".esl", list.Bytes(), 0o644}, file{v.Name + ".auth", auth.Bytes(), 0o644})
	}
	names := make([]string, len(files))
	for i := range files {
		names[i] = files[i].path
		files[i].path = filepath.Join(dir, files[i].path)
	}
	return names, writeNew(files...)
}

// LoadSecureBoot reads a key and its certificate from PEM files.
func LoadSecureBoot(keyFile, certFile string) (crypto.Signer, *x509.Certificate, error) {
	der, err := readPEM(certFile, "CERTIFICATE")
	if err != nil {
		return nil, nil, err
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, nil, fmt.Errorf("%s: %w", certFile, err)
	}
	if der, err = readPEM(keyFile, "PRIVATE KEY", "RSA PRIVATE KEY"); err != nil {
		return nil, nil, err
	}
	if key, err := x509.ParsePKCS1PrivateKey(der); err == nil {
		return key, cert, nil
	}
	any, err := x509.ParsePKCS8PrivateKey(der)
	if err != nil {
		return nil, nil, fmt.Errorf("%s: %w", keyFile, err)
	}
	key, ok := any.(crypto.Signer)
	if !ok {
		return nil, nil, fmt.Errorf("%s: a key of type %T cannot sign", keyFile, any)
	}
	return key, cert, nil
}

func readPEM(path string, types ...string) ([]byte, error) {
	data, err := readFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("reading what signs for Secure Boot: %w; clonectl key secure-boot makes it", err)
	} else if err != nil {
		return nil, fmt.Errorf("reading what signs for Secure Boot: %w", err)
	}
	for block, rest := pem.Decode(data); block != nil; block, rest = pem.Decode(rest) {
		for _, t := range types {
			if block.Type == t {
				return block.Bytes, nil
			}
		}
		if block.Type == "ENCRYPTED PRIVATE KEY" {
			return nil, fmt.Errorf("%s is encrypted, and nothing asks for its password: openssl pkey -in %s -out FILE decrypts it", path, path)
		}
	}
	return nil, fmt.Errorf("%s has no %s in PEM form; clonectl key secure-boot makes one", path, types[0])
}
