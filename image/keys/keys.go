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
		if _, err := os.Lstat(f.path); err == nil {
			return fmt.Errorf("%s exists, and a key that is overwritten is lost; give another name, or move it away", f.path)
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

func (f file) create() error {
	if err := os.MkdirAll(filepath.Dir(f.path), 0o755); err != nil {
		return err
	}
	out, err := os.OpenFile(f.path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, f.perm)
	if err != nil {
		return err
	}
	_, err = out.Write(f.data)
	if err = errors.Join(err, out.Chmod(f.perm), out.Sync(), out.Close()); err != nil {
		os.Remove(f.path)
		return fmt.Errorf("writing %s: %w", f.path, err)
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
	data, err := os.ReadFile(path)
	if err != nil {
		return key, fmt.Errorf("reading the key: %w; make one with: clonectl key new %s", err, path)
	}
	data = bytes.TrimSpace(data)
	if !minisign.IsEncrypted(data) {
		if err := key.UnmarshalText(data); err != nil {
			return key, fmt.Errorf("%s is no minisign secret key: %w", path, err)
		}
		return key, nil
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

// LoadPublic reads a minisign public key: a file, or the line of one.
func LoadPublic(text string) (minisign.PublicKey, error) {
	var key minisign.PublicKey
	if key.UnmarshalText([]byte(text)) == nil {
		return key, nil
	}
	data, err := os.ReadFile(text)
	if errors.Is(err, fs.ErrNotExist) {
		return key, fmt.Errorf("there is no public key %s: who signs makes it, as FILE.pub, with clonectl key new FILE; the line of such a file does as well", text)
	} else if err != nil {
		return key, fmt.Errorf("reading the public key: %w", err)
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
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("reading what signs for Secure Boot: %w; make it with: clonectl key secure-boot", err)
	}
	for block, rest := pem.Decode(data); block != nil; block, rest = pem.Decode(rest) {
		for _, t := range types {
			if block.Type == t {
				return block.Bytes, nil
			}
		}
	}
	return nil, fmt.Errorf("%s has no %s in PEM form", path, types[0])
}
