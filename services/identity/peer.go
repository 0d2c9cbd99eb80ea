package identity

import (
	"context"
	"crypto/ed25519"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"time"
)

// Credentials are a member's own side of a connection: an Authority or a Holder.
type Credentials interface {
	// Session is the session that peers must be of.
	Session() int
	// Certificate is the certificate to show now; it may be another one later.
	Certificate() (*tls.Certificate, error)
	// Roots are the authorities that peers' certificates may be signed by.
	Roots() []*x509.Certificate
	// Now is the time by which validity is judged.
	Now() time.Time
}

// Verify decides on a peer whose certificate is genuine, of this session, of the
// right role and valid now: whether it is (still) a member. It is called in the
// handshake; an error ends the connection.
type Verify func(ID, *x509.Certificate) error

// ServerTLS is the configuration of a listener for nodes. The head and the nodes
// listen with it alike; a peer that is not a node is refused.
func ServerTLS(own Credentials, verify Verify) *tls.Config {
	return &tls.Config{
		MinVersion:             tls.VersionTLS13,
		SessionTicketsDisabled: true, // every connection is checked in full
		ClientAuth:             tls.RequireAnyClientCert,
		GetCertificate:         func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return own.Certificate() },
		VerifyConnection: func(state tls.ConnectionState) error {
			id, cert, err := Examine(own, state.PeerCertificates)
			if err == nil && id.IsHead() {
				err = fmt.Errorf("%s: %w", id, ErrWrongRole)
			}
			if err != nil {
				return err
			}
			return verify(id, cert)
		},
	}
}

// ClientTLS is the configuration for dialling one peer: a node id, or HeadNode.
func ClientTLS(own Credentials, peer int, verify Verify) *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS13,
		// What follows from the certificate's name and the cluster's own
		// authority is checked below; host names have no part in it.
		InsecureSkipVerify:   true,
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return own.Certificate() },
		VerifyConnection: func(state tls.ConnectionState) error {
			id, cert, err := Examine(own, state.PeerCertificates)
			if err == nil && id.Node != peer {
				err = fmt.Errorf("%s answers in place of %s: %w", id, ID{Session: own.Session(), Node: peer}, ErrWrongRole)
			}
			if err != nil {
				return err
			}
			return verify(id, cert)
		},
	}
}

// Anyone is the Verify that welcomes every genuine member. A node uses it for
// the head, which is on nobody's list.
func Anyone(ID, *x509.Certificate) error { return nil }

// PeerID is the name of the peer of a connection that ServerTLS or ClientTLS
// accepted.
func PeerID(state tls.ConnectionState) (ID, error) {
	if !state.HandshakeComplete || len(state.PeerCertificates) == 0 {
		return ID{}, errors.New("a peer without a certificate")
	}
	return nameOf(state.PeerCertificates[0])
}

// Examine checks what a peer presents, short of membership: one certificate,
// signed by one of own's roots, of own's session, valid now.
func Examine(own Credentials, chain []*x509.Certificate) (ID, *x509.Certificate, error) {
	if len(chain) != 1 {
		return ID{}, nil, fmt.Errorf("%d certificates of a peer, expected one: %w", len(chain), ErrMalformed)
	}
	cert := chain[0]
	if err := signedBy(cert, own.Roots()); err != nil {
		return ID{}, nil, err
	}
	id, err := nameOf(cert)
	if err != nil {
		return ID{}, nil, err
	}
	if id.Session != own.Session() {
		return ID{}, nil, fmt.Errorf("certificate of %s, this is session %d: %w", id, own.Session(), ErrWrongSession)
	}
	if err := validAt(cert, own.Now()); err != nil {
		return ID{}, nil, fmt.Errorf("certificate of %s: %w", id, err)
	}
	return id, cert, nil
}

// signedBy says whether one of the roots signed the certificate.
func signedBy(cert *x509.Certificate, roots []*x509.Certificate) error {
	for _, root := range roots {
		if root.PublicKeyAlgorithm == x509.Ed25519 && cert.CheckSignatureFrom(root) == nil {
			return nil
		}
	}
	return fmt.Errorf("certificate of %q: %w", shorten(cert.Subject.String()), ErrForeign)
}

// nameOf reads the name of a member's certificate, which is of the form that
// Authority.Issue gives it.
func nameOf(cert *x509.Certificate) (ID, error) {
	switch {
	case cert.IsCA:
		return ID{}, fmt.Errorf("certificate of an authority in place of a member's: %w", ErrMalformed)
	case len(cert.UnhandledCriticalExtensions) > 0:
		return ID{}, fmt.Errorf("certificate with a critical extension %v: %w", cert.UnhandledCriticalExtensions[0], ErrMalformed)
	case len(cert.URIs) != 1 || len(cert.DNSNames) > 0 || len(cert.EmailAddresses) > 0:
		return ID{}, fmt.Errorf("certificate with other names than one URI: %w", ErrMalformed)
	}
	if _, ok := cert.PublicKey.(ed25519.PublicKey); !ok {
		return ID{}, fmt.Errorf("certificate with a %s key, only Ed25519 is used here: %w", cert.PublicKeyAlgorithm, ErrMalformed)
	}
	return ParseID(cert.URIs[0].String())
}

func shorten(s string) string {
	if len(s) > 80 {
		return s[:80] + "…"
	}
	return s
}

// Handshake is for listeners that want the reason of a refusal: it ends the
// handshake of a server connection within the limit and returns the peer.
func Handshake(ctx context.Context, conn *tls.Conn, limit time.Duration) (ID, error) {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	if err := conn.HandshakeContext(ctx); err != nil {
		return ID{}, err
	}
	return PeerID(conn.ConnectionState())
}
