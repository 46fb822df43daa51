package uki

import (
	"bytes"
	"crypto"
	"crypto/rsa"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"

	"github.com/foxboron/go-uefi/authenticode"
)

// Sign gives the image with a signature for Secure Boot (Authenticode, SHA-256)
// appended. The key must be RSA, the only kind that firmware has to know, and
// the certificate its own. The signature holds the time, so signing twice gives
// different bytes; Unsigned takes it away again.
func Sign(pe []byte, key crypto.Signer, cert *x509.Certificate) ([]byte, error) {
	if err := CheckKey(key, cert); err != nil {
		return nil, fmt.Errorf("signing: %w", err)
	}
	plain, err := Unsigned(pe)
	if err != nil {
		return nil, fmt.Errorf("signing: %w", err)
	}
	p, err := authenticode.Parse(bytes.NewReader(plain))
	if err != nil {
		return nil, fmt.Errorf("signing: %w", err)
	}
	if _, err := p.Sign(key, cert); err != nil {
		return nil, fmt.Errorf("signing: %w", err)
	}
	signed := p.Bytes()
	m, err := Read(signed)
	if err != nil {
		return nil, fmt.Errorf("signing: %w", err)
	}
	binary.LittleEndian.PutUint32(signed[m.optional+checksumOffset:], checksum(signed, m.optional+checksumOffset))
	return signed, nil
}

// CheckKey tells whether Sign takes the key and its certificate.
func CheckKey(key crypto.Signer, cert *x509.Certificate) error {
	public, ok := key.Public().(*rsa.PublicKey)
	if !ok {
		return fmt.Errorf("the key is %T; firmware knows RSA only", key.Public())
	}
	if !public.Equal(cert.PublicKey) {
		return errors.New("the certificate is of another key")
	}
	return nil
}

// ErrUnsigned is what Verify gives for an image without a signature.
var ErrUnsigned = errors.New("the image is not signed")

// Verify checks that the image is as it was when the certificate's key signed
// it. It looks at no validity time and no chain: firmware does not either.
func Verify(pe []byte, cert *x509.Certificate) error {
	m, err := Read(pe)
	if err != nil {
		return err
	}
	if !m.Signed {
		return ErrUnsigned
	}
	p, err := authenticode.Parse(bytes.NewReader(pe))
	if err != nil {
		return fmt.Errorf("reading the signature: %w", err)
	}
	ok, err := p.Verify(cert)
	if err == nil && !ok {
		err = errors.New("it is by another key")
	}
	if err != nil {
		return fmt.Errorf("the signature does not fit the image: %w", err)
	}
	return nil
}

// Unsigned gives the image as it was before it was signed; Build's output then
// is the same bytes again. An image without a signature is returned as it is.
func Unsigned(pe []byte) ([]byte, error) {
	m, err := Read(pe)
	if err != nil {
		return nil, err
	}
	if !m.Signed {
		return pe, nil
	}
	if m.certificates[1] != len(pe) {
		return nil, errors.New("something lies behind the signature")
	}
	plain := slices.Clone(pe[:m.certificates[0]])
	clear(plain[m.optional+securityDirectory : m.optional+securityDirectory+8])
	binary.LittleEndian.PutUint32(plain[m.optional+checksumOffset:], checksum(plain, m.optional+checksumOffset))
	return plain, nil
}
