package api

import (
	"crypto/ed25519"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"net/netip"
	"slices"
	"time"

	"clonecluster/config"
)

// Role is what the holder of a certificate may do: its organisational unit.
type Role string

// The roles. Each may what the next one may.
const (
	RoleNode     Role = "node" // asks other nodes, and answers as a server
	RoleControl  Role = "control"
	RoleReadOnly Role = "read-only"
)

var roles = []Role{RoleNode, RoleControl, RoleReadOnly}

// allows reports whether the role is at least the one that is needed.
func (r Role) allows(need Role) bool {
	i := slices.Index(roles, r)
	return i >= 0 && i <= slices.Index(roles, need)
}

// roleOf gives the role of a certificate; "" if it has none.
func roleOf(cert *x509.Certificate) Role {
	if units := cert.Subject.OrganizationalUnit; len(units) == 1 && slices.Contains(roles, Role(units[0])) {
		return Role(units[0])
	}
	return ""
}

// Machines without a battery have a wrong clock. What does not have to end is
// valid always (RFC 5280, 4.1.2.5), and nothing is valid only from now on.
var (
	always = time.Date(2000, time.January, 1, 0, 0, 0, 0, time.UTC)
	never  = time.Date(9999, time.December, 31, 23, 59, 59, 0, time.UTC)
)

// Authority makes and judges the certificates of one cluster.
type Authority struct {
	cluster string
	cert    *x509.Certificate
	key     ed25519.PrivateKey
	pool    *x509.CertPool
}

// NewAuthority derives the authority of a cluster from its key. What was made
// with one of accept is taken, too.
func NewAuthority(cluster string, key config.Key, accept ...config.Key) (*Authority, error) {
	a := &Authority{cluster: cluster, pool: x509.NewCertPool()}
	for i, k := range append([]config.Key{key}, accept...) {
		private := ed25519.NewKeyFromSeed(k.Derive("api authority of "+cluster, ed25519.SeedSize))
		cert, err := selfSigned(cluster, private)
		if err != nil {
			return nil, err
		}
		if i == 0 {
			a.cert, a.key = cert, private
		}
		a.pool.AddCert(cert)
	}
	return a, nil
}

// selfSigned gives the certificate of an authority: of one key always the same
// bytes, since Ed25519 signatures are without chance.
func selfSigned(cluster string, key ed25519.PrivateKey) (*x509.Certificate, error) {
	public := key.Public().(ed25519.PublicKey)
	id := sha256.Sum256(public)
	id[0] &= 0x7f
	t := &x509.Certificate{
		SerialNumber: new(big.Int).SetBytes(id[:16]),
		Subject:      pkix.Name{Organization: []string{cluster}, CommonName: "clonecluster " + cluster},
		NotBefore:    always, NotAfter: never,
		KeyUsage: x509.KeyUsageCertSign, IsCA: true, BasicConstraintsValid: true, MaxPathLenZero: true,
		SubjectKeyId: id[:20],
	}
	der, err := x509.CreateCertificate(rand.Reader, t, t, public, key)
	if err != nil {
		return nil, fmt.Errorf("making the cluster's authority: %w", err)
	}
	return x509.ParseCertificate(der)
}

// PEM gives the authority's certificate: what a client checks nodes with.
func (a *Authority) PEM() []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: a.cert.Raw})
}

// Issue makes a client's certificate with a key of its own, valid until then
// (the zero time: always). Its name is for the events. The role is RoleControl
// or RoleReadOnly.
func (a *Authority) Issue(role Role, name string, until time.Time) (tls.Certificate, error) {
	if role != RoleControl && role != RoleReadOnly {
		return tls.Certificate{}, fmt.Errorf("issuing a certificate: no client has the role %q", role)
	}
	public, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return tls.Certificate{}, fmt.Errorf("issuing a certificate: %w", err)
	}
	if until.IsZero() {
		until = never
	}
	return a.sign(&x509.Certificate{
		Subject:   pkix.Name{Organization: []string{a.cluster}, OrganizationalUnit: []string{string(role)}, CommonName: name},
		NotBefore: always, NotAfter: until,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}, public, private)
}

// node makes a node's certificate. Its key is in no file and ends with the
// process, so the certificate need not end before it.
func (a *Authority) node(id, host string, at netip.Addr, key ed25519.PrivateKey) (tls.Certificate, error) {
	t := &x509.Certificate{
		Subject:   pkix.Name{Organization: []string{a.cluster}, OrganizationalUnit: []string{string(RoleNode)}, CommonName: id},
		NotBefore: always, NotAfter: never,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		DNSNames:    []string{a.cluster},
	}
	if host != "" && host != a.cluster {
		t.DNSNames = append(t.DNSNames, host)
	}
	if at.IsValid() {
		t.IPAddresses = []net.IP{at.WithZone("").Unmap().AsSlice()}
	}
	return a.sign(t, key.Public().(ed25519.PublicKey), key)
}

func (a *Authority) sign(t *x509.Certificate, public ed25519.PublicKey, private ed25519.PrivateKey) (tls.Certificate, error) {
	serial := make([]byte, 16)
	if _, err := rand.Read(serial); err != nil {
		return tls.Certificate{}, fmt.Errorf("issuing a certificate: %w", err)
	}
	serial[0] &= 0x7f
	t.SerialNumber = new(big.Int).SetBytes(serial)
	t.KeyUsage, t.BasicConstraintsValid = x509.KeyUsageDigitalSignature, true
	der, err := x509.CreateCertificate(rand.Reader, t, a.cert, public, a.key)
	if err != nil {
		return tls.Certificate{}, fmt.Errorf("issuing a certificate: %w", err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		return tls.Certificate{}, fmt.Errorf("issuing a certificate: %w", err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: private, Leaf: leaf}, nil
}

// Client is how a client with that certificate speaks with the cluster.
func (a *Authority) Client(cert tls.Certificate) *tls.Config {
	return ClientTLS(a.cluster, a.pool, cert)
}

// ClientTLS is Authority.Client for those who have the authority's certificate but not
// its key. Any node of the cluster is taken for the server, whatever its address: the
// name of the cluster is in the certificates of its nodes alone.
func ClientTLS(cluster string, pool *x509.CertPool, cert tls.Certificate) *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS13, RootCAs: pool, ServerName: cluster, Certificates: []tls.Certificate{cert},
		NextProtos: []string{"http/1.1"},
	}
}

// ErrOtherNode is matched by the error of a dial that reached another node than
// the one that was meant.
var ErrOtherNode = errors.New("another node answers there")

// ofNode makes a configuration take only that node.
func ofNode(c *tls.Config, id string) *tls.Config {
	c = c.Clone()
	c.VerifyConnection = func(s tls.ConnectionState) error {
		if got := s.PeerCertificates[0].Subject.CommonName; got != id {
			return fmt.Errorf("%w: %s instead of %s", ErrOtherNode, got, id)
		}
		return nil
	}
	return c
}
