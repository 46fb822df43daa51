package api

import (
	"crypto/ed25519"
	"crypto/rand"
	"crypto/tls"
	"fmt"
	"net/netip"
	"sync"
	"time"
)

// identity is a node's key and its certificates, one for each of the addresses
// that it is reached at, so that clients which know nothing of clusters can check
// the address, too.
type identity struct {
	authority *Authority
	key       ed25519.PrivateKey

	mu       sync.Mutex
	id, host string
	certs    map[netip.Addr]*tls.Certificate
}

// mostCerts is more than the addresses of a NIC and the VIP.
const mostCerts = 32

func newIdentity(a *Authority) (*identity, error) {
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("making the node's key: %w", err)
	}
	return &identity{authority: a, key: key, certs: map[netip.Addr]*tls.Certificate{}}, nil
}

// at gives the certificate for an address of the node that has that id now.
func (i *identity) at(id, host string, addr netip.Addr) (*tls.Certificate, error) {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.id != id || i.host != host || len(i.certs) >= mostCerts {
		i.id, i.host = id, host
		clear(i.certs)
	}
	if c := i.certs[addr]; c != nil {
		return c, nil
	}
	cert, err := i.authority.node(id, host, addr, i.key)
	if err != nil {
		return nil, err
	}
	i.certs[addr] = &cert
	return &cert, nil
}

// server is the TLS of a node. A connection without a certificate is let in, for
// GET /v1/health; one with a certificate of somebody else's is not.
func (i *identity) server(self func() (id, host string)) *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS13, ClientAuth: tls.VerifyClientCertIfGiven, ClientCAs: i.authority.pool,
		NextProtos: []string{"http/1.1"}, SessionTicketsDisabled: true,
		GetCertificate: func(hello *tls.ClientHelloInfo) (*tls.Certificate, error) {
			id, host := self()
			local, _ := netip.ParseAddrPort(hello.Conn.LocalAddr().String())
			return i.at(id, host, local.Addr())
		},
	}
}

// client is how the node asks another one, as a node or for those who may only look.
func (i *identity) client(id, host string, as Role) (*tls.Config, error) {
	if as == RoleReadOnly {
		cert, err := i.authority.Issue(as, id, time.Time{})
		if err != nil {
			return nil, err
		}
		return i.authority.Client(cert), nil
	}
	cert, err := i.at(id, host, netip.Addr{})
	if err != nil {
		return nil, err
	}
	return i.authority.Client(*cert), nil
}
