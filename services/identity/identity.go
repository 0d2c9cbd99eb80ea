// Package identity says who is who in a cluster. Every member proves itself with
// a short-lived X.509 certificate of the cluster's own authority, and every
// connection between members is TLS 1.3 with such a certificate at both ends.
//
//	Authority  the head's: keeps the authority's key, signs the nodes'
//	           certificates and its own
//	Tokens     the head's: one-time tickets that a booting node exchanges for its
//	           first certificate
//	Holder     a node's: its key, which never leaves the node, its certificate
//	           and their renewal
//	ServerTLS, ClientTLS, PeerID    for everybody who listens or dials
//
// A certificate has a name as its only URI (RFC 3986):
//
//	krg://session/1/head
//	krg://session/1/node/3?boot=5d3c…      boot: random, new at each boot
//
// Keys are Ed25519, nothing else is accepted. That a certificate is genuine says
// that its holder was admitted at some time; that it is still welcome (not
// revoked, not of an earlier boot) is what the verify functions of ServerTLS and
// ClientTLS ask those who keep the list of members. Package services/admission
// is that list on the head.
package identity

import (
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"net/url"
	"regexp"
	"strconv"
	"time"
)

// HeadNode is the node id of the head in an ID.
const HeadNode = -1

// Bounds of session and node ids, as Kerrighed has them.
const (
	minSession = 1
	maxSession = 9999
	maxNode    = 255
)

// ID is the name in a certificate.
type ID struct {
	Session int
	Node    int    // 0..255, or HeadNode
	Boot    string // the boot of the machine; "" for the head
}

// Errors of checking a peer or a request; errors.Is tells them apart.
var (
	ErrMalformed    = errors.New("malformed")
	ErrForeign      = errors.New("not signed by this cluster's authority")
	ErrWrongSession = errors.New("of another session")
	ErrWrongRole    = errors.New("of another role than expected here")
	ErrExpired      = errors.New("expired")
	ErrNotYetValid  = errors.New("not yet valid (does a clock run wrong?)")
	ErrStale        = errors.New("of an earlier boot")
	ErrRevoked      = errors.New("revoked")
)

// IsHead says whether the ID is the head's.
func (id ID) IsHead() bool { return id.Node == HeadNode }

// String is the name as it stands in the certificate.
func (id ID) String() string { return id.uri().String() }

func (id ID) uri() *url.URL {
	if id.IsHead() {
		return &url.URL{Scheme: "krg", Host: "session", Path: fmt.Sprintf("/%d/head", id.Session)}
	}
	return &url.URL{
		Scheme: "krg", Host: "session", Path: fmt.Sprintf("/%d/node/%d", id.Session, id.Node),
		RawQuery: "boot=" + id.Boot,
	}
}

// Check says whether the ID can be a member's.
func (id ID) Check() error {
	parsed, err := ParseID(id.String())
	if err == nil && parsed != id {
		err = fmt.Errorf("the name %q of a member: %w", id.String(), ErrMalformed)
	}
	return err
}

// ValidBoot says whether s can be the Boot of an ID; the kernel's
// /proc/sys/kernel/random/boot_id can.
func ValidBoot(s string) bool { return bootName.MatchString(s) }

var bootName = regexp.MustCompile(`^[0-9a-f-]{8,64}$`)

var name = regexp.MustCompile(`^krg://session/([1-9][0-9]{0,3})/(?:(head)|node/(0|[1-9][0-9]{0,2})\?boot=([0-9a-f-]{8,64}))$`)

// ParseID reads a name. There is one spelling of each.
func ParseID(s string) (ID, error) {
	m := name.FindStringSubmatch(s)
	if m == nil {
		if len(s) > 100 {
			s = s[:100] + "…"
		}
		return ID{}, fmt.Errorf("the name %q of a member: %w", s, ErrMalformed)
	}
	session, _ := strconv.Atoi(m[1])
	if m[2] != "" {
		return ID{Session: session, Node: HeadNode}, nil
	}
	node, _ := strconv.Atoi(m[3])
	if node > maxNode {
		return ID{}, fmt.Errorf("node id %d of a member: %w", node, ErrMalformed)
	}
	return ID{Session: session, Node: node, Boot: m[4]}, nil
}

// Fingerprint names the key of a certificate: the SHA-256 of its public key
// (SubjectPublicKeyInfo, RFC 5280 section 4.1) in lower-case hexadecimal. It
// stays the same when a certificate is renewed and is another after a boot.
func Fingerprint(cert *x509.Certificate) string {
	sum := sha256.Sum256(cert.RawSubjectPublicKeyInfo)
	return hex.EncodeToString(sum[:])
}

// Leeway is how far two clocks may be apart when the validity of a certificate
// is judged.
const Leeway = 5 * time.Minute

// validAt says whether now lies in the validity of a certificate.
func validAt(cert *x509.Certificate, now time.Time) error {
	switch {
	case now.Before(cert.NotBefore.Add(-Leeway)):
		return fmt.Errorf("valid from %s, now it is %s: %w", cert.NotBefore.Format(time.RFC3339), now.UTC().Format(time.RFC3339), ErrNotYetValid)
	case now.After(cert.NotAfter.Add(Leeway)):
		return fmt.Errorf("valid until %s, now it is %s: %w", cert.NotAfter.Format(time.RFC3339), now.UTC().Format(time.RFC3339), ErrExpired)
	}
	return nil
}
