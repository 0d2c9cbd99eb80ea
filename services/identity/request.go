package identity

import (
	"crypto/ed25519"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"fmt"
	"strings"
)

// maxPEM bounds requests and certificates in bytes; real ones have a few hundred.
const maxPEM = 4 << 10

const (
	pemRequest     = "CERTIFICATE REQUEST" // RFC 7468 section 7
	pemCertificate = "CERTIFICATE"         // RFC 7468 section 5
	pemKey         = "PRIVATE KEY"         // PKCS #8, RFC 7468 section 10
)

// Request is a node's wish for a certificate, checked: whoever made it has the
// private key.
type Request struct {
	Key         ed25519.PublicKey
	Fingerprint string // see Fingerprint
}

// NewRequest makes the PEM text of a certificate signing request (PKCS #10, RFC
// 2986). It names nobody: the head knows who asks.
func NewRequest(key ed25519.PrivateKey) ([]byte, error) {
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		return nil, fmt.Errorf("certificate request: %w", err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: pemRequest, Bytes: der}), nil
}

// ParseRequest reads and checks a certificate signing request. What it asks for
// besides a key (names, extensions) is refused. The error is an ErrMalformed.
func ParseRequest(text []byte) (Request, error) {
	bad := func(format string, args ...any) (Request, error) {
		return Request{}, fmt.Errorf("certificate request: %s: %w", fmt.Sprintf(format, args...), ErrMalformed)
	}
	if len(text) > maxPEM {
		return bad("%d bytes, at most %d", len(text), maxPEM)
	}
	block, rest := pem.Decode(text)
	if block == nil || block.Type != pemRequest || len(block.Headers) > 0 || strings.TrimSpace(string(rest)) != "" {
		return bad("not one PEM block of the type %s", pemRequest)
	}
	csr, err := x509.ParseCertificateRequest(block.Bytes)
	if err != nil {
		return bad("%v", err)
	}
	key, ok := csr.PublicKey.(ed25519.PublicKey)
	if !ok {
		return bad("a %s key, only Ed25519 is taken", csr.PublicKeyAlgorithm)
	}
	if err := csr.CheckSignature(); err != nil {
		return bad("not signed by its own key")
	}
	if len(csr.Subject.Names) > 0 || len(csr.Extensions) > 0 {
		return bad("it asks for names or extensions")
	}
	return Request{Key: key, Fingerprint: keyFingerprint(csr.RawSubjectPublicKeyInfo)}, nil
}

func keyFingerprint(spki []byte) string {
	sum := sha256.Sum256(spki)
	return hex.EncodeToString(sum[:])
}

// parseCertificates reads one or more certificates and nothing else.
func parseCertificates(text []byte) ([]*x509.Certificate, error) {
	var certs []*x509.Certificate
	for len(strings.TrimSpace(string(text))) > 0 {
		block, rest := pem.Decode(text)
		if block == nil || block.Type != pemCertificate || len(certs) == 8 {
			return nil, fmt.Errorf("not a row of PEM certificates: %w", ErrMalformed)
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("%w: %w", err, ErrMalformed)
		}
		certs, text = append(certs, cert), rest
	}
	if certs == nil {
		return nil, fmt.Errorf("no certificate: %w", ErrMalformed)
	}
	return certs, nil
}

// ParseRoots reads the authorities' certificates that a node is told to trust.
func ParseRoots(text []byte) ([]*x509.Certificate, error) {
	if len(text) > 8*maxPEM {
		return nil, fmt.Errorf("authority: %d bytes: %w", len(text), ErrMalformed)
	}
	roots, err := parseCertificates(text)
	if err != nil {
		return nil, fmt.Errorf("authority: %w", err)
	}
	for _, root := range roots {
		if !root.IsCA || !root.BasicConstraintsValid || root.PublicKeyAlgorithm != x509.Ed25519 {
			return nil, fmt.Errorf("authority: the certificate of %q is none of an Ed25519 authority: %w", shorten(root.Subject.String()), ErrMalformed)
		}
	}
	return roots, nil
}

func encodeCertificate(der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: pemCertificate, Bytes: der})
}
