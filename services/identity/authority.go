package identity

import (
	"crypto/ed25519"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"math/big"
	"net"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"sync"
	"time"
)

// How long certificates live.
const (
	// NodeLife is the life of a node's certificate; nodes renew at half of it.
	NodeLife = 24 * time.Hour
	headLife = 7 * 24 * time.Hour // of the head's own
	rootLife = 30 * 365 * 24 * time.Hour
)

// Names in the authority's directory.
const (
	rootKeyFile  = "ca.key"
	rootCertFile = "ca.crt"
)

// Authority is a cluster's certificate authority and the head's own identity. It
// is safe for concurrent use.
type Authority struct {
	session int
	clock   func() time.Time
	key     ed25519.PrivateKey
	root    *x509.Certificate
	bundle  []byte

	mu  sync.Mutex
	own *tls.Certificate // the head's; guarded by mu
}

// DirError says that the authority's directory can't be used. It is left as it
// was: with another authority, no running node would be let in again.
type DirError struct {
	Dir string
	Err error
}

func (e *DirError) Error() string {
	return fmt.Sprintf("certificate authority %s: %v\n"+
		"It was left as it is. Bring the directory back from a backup. Without one: stop the head, move the directory away, start the head (it makes a new authority), and reboot every node", e.Dir, e.Err)
}

func (e *DirError) Unwrap() error { return e.Err }

// Open reads the authority in dir, a directory of mode 0700. When there is no
// such directory it makes a new authority; anything else that is not whole is a
// *DirError. The session may change from one Open to the next: certificates of
// the earlier one are then refused.
func Open(dir string, session int, clock func() time.Time) (*Authority, error) {
	if session < minSession || session > maxSession {
		return nil, fmt.Errorf("certificate authority: session id %d is not in %d..%d", session, minSession, maxSession)
	}
	if clock == nil {
		clock = time.Now
	}
	if _, err := os.Stat(dir); errors.Is(err, fs.ErrNotExist) {
		if err := create(dir, clock()); err != nil {
			return nil, fmt.Errorf("make the certificate authority %s: %w", dir, err)
		}
	}
	a := &Authority{session: session, clock: clock}
	if err := a.load(dir); err != nil {
		return nil, &DirError{dir, err}
	}
	if err := validAt(a.root, clock()); err != nil {
		return nil, &DirError{dir, fmt.Errorf("%w; if this machine's clock is wrong, set it and start again", err)}
	}
	if _, err := a.Certificate(); err != nil {
		return nil, err
	}
	return a, nil
}

// create makes an authority aside and puts it in place in one step.
func create(dir string, now time.Time) error {
	public, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return err
	}
	serial, err := newSerial()
	if err != nil {
		return err
	}
	template := &x509.Certificate{
		SerialNumber:          serial,
		Subject:               pkix.Name{CommonName: "krgimage cluster authority"},
		NotBefore:             now.Add(-Leeway),
		NotAfter:              now.Add(rootLife),
		IsCA:                  true,
		BasicConstraintsValid: true,
		MaxPathLenZero:        true, // it signs members, no further authorities
		KeyUsage:              x509.KeyUsageCertSign,
	}
	cert, err := x509.CreateCertificate(rand.Reader, template, template, public, private)
	if err != nil {
		return err
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(dir), 0o700); err != nil {
		return err
	}
	// What a start that was cut off left behind.
	old, err := filepath.Glob(dir + ".new-*")
	if err != nil {
		return err
	}
	for _, path := range old {
		if err := os.RemoveAll(path); err != nil {
			return err
		}
	}
	aside, err := os.MkdirTemp(filepath.Dir(dir), filepath.Base(dir)+".new-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(aside) // gone already when all went well
	for name, data := range map[string][]byte{
		rootKeyFile:  pem.EncodeToMemory(&pem.Block{Type: pemKey, Bytes: pkcs8}),
		rootCertFile: encodeCertificate(cert),
	} {
		if err := writeSynced(filepath.Join(aside, name), data); err != nil {
			return err
		}
	}
	if err := syncDir(aside); err != nil {
		return err
	}
	// A rename never replaces a directory that holds something.
	if err := os.Rename(aside, dir); err != nil {
		return err
	}
	return syncDir(filepath.Dir(dir))
}

func writeSynced(path string, data []byte) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	if _, err = f.Write(data); err == nil {
		err = f.Sync()
	}
	return errors.Join(err, f.Close())
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

func (a *Authority) load(dir string) error {
	keyText, err := os.ReadFile(filepath.Join(dir, rootKeyFile))
	if err != nil {
		return err
	}
	if info, err := os.Stat(filepath.Join(dir, rootKeyFile)); err == nil && info.Mode().Perm()&0o077 != 0 {
		return fmt.Errorf("%s can be read by others (mode %04o): chmod 600, and make a new authority if somebody may have read it", rootKeyFile, info.Mode().Perm())
	}
	certText, err := os.ReadFile(filepath.Join(dir, rootCertFile))
	if err != nil {
		return err
	}
	if a.key, err = parseKey(keyText); err != nil {
		return fmt.Errorf("%s: %w", rootKeyFile, err)
	}
	roots, err := ParseRoots(certText)
	if err != nil {
		return fmt.Errorf("%s: %w", rootCertFile, err)
	}
	if len(roots) != 1 || !a.key.Public().(ed25519.PublicKey).Equal(roots[0].PublicKey) {
		return fmt.Errorf("%s and %s don't belong together", rootKeyFile, rootCertFile)
	}
	a.root, a.bundle = roots[0], encodeCertificate(roots[0].Raw)
	return nil
}

func parseKey(text []byte) (ed25519.PrivateKey, error) {
	block, _ := pem.Decode(text)
	if block == nil || block.Type != pemKey {
		return nil, fmt.Errorf("no private key in PEM: %w", ErrMalformed)
	}
	parsed, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", err, ErrMalformed)
	}
	key, ok := parsed.(ed25519.PrivateKey)
	if !ok {
		return nil, fmt.Errorf("not an Ed25519 key: %w", ErrMalformed)
	}
	return key, nil
}

// Issue signs a certificate for the key of a request. The address is the
// member's, for people who read the certificate.
func (a *Authority) Issue(csr []byte, id ID, addr netip.Addr, ttl time.Duration) ([]byte, error) {
	request, err := ParseRequest(csr)
	if err != nil {
		return nil, err
	}
	if id.IsHead() || id.Session != a.session {
		return nil, fmt.Errorf("no certificate for %s: this authority signs nodes of session %d", id, a.session)
	}
	der, err := a.sign(request.Key, id, addr, ttl)
	if err != nil {
		return nil, err
	}
	return encodeCertificate(der), nil
}

func (a *Authority) sign(key ed25519.PublicKey, id ID, addr netip.Addr, ttl time.Duration) ([]byte, error) {
	if err := id.Check(); err != nil {
		return nil, err
	}
	serial, err := newSerial()
	if err != nil {
		return nil, err
	}
	now := a.clock()
	template := &x509.Certificate{
		SerialNumber:          serial,
		Subject:               pkix.Name{CommonName: "head"},
		URIs:                  []*url.URL{id.uri()},
		NotBefore:             now,
		NotAfter:              now.Add(ttl),
		BasicConstraintsValid: true,
		KeyUsage:              x509.KeyUsageDigitalSignature,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	if !id.IsHead() {
		template.Subject.CommonName = fmt.Sprintf("node %d", id.Node)
	}
	if addr.IsValid() {
		template.IPAddresses = []net.IP{addr.AsSlice()}
	}
	der, err := x509.CreateCertificate(rand.Reader, template, a.root, key, a.key)
	if err != nil {
		return nil, fmt.Errorf("sign the certificate of %s: %w", id, err)
	}
	return der, nil
}

// newSerial is a random number of 127 bits (RFC 5280 section 4.1.2.2 wants a
// unique positive one of at most 20 bytes).
func newSerial() (*big.Int, error) {
	return rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
}

// Bundle is the PEM text of the authority's certificate, for nodes to trust.
func (a *Authority) Bundle() []byte { return a.bundle }

// Fingerprint names the authority's key.
func (a *Authority) Fingerprint() string { return Fingerprint(a.root) }

// Session implements Credentials.
func (a *Authority) Session() int { return a.session }

// Roots implements Credentials.
func (a *Authority) Roots() []*x509.Certificate { return []*x509.Certificate{a.root} }

// Now implements Credentials.
func (a *Authority) Now() time.Time { return a.clock() }

// Certificate implements Credentials: the head's own certificate, which is made
// anew (with a new key) when it has lived half its life, or when the clock was
// set to before its time.
func (a *Authority) Certificate() (*tls.Certificate, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	now := a.clock()
	if a.own != nil && !now.Before(a.own.Leaf.NotBefore) && now.Before(a.own.Leaf.NotBefore.Add(headLife/2)) {
		return a.own, nil
	}
	public, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return nil, err
	}
	der, err := a.sign(public, ID{Session: a.session, Node: HeadNode}, netip.Addr{}, headLife)
	if err != nil {
		return nil, err
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, err
	}
	a.own = &tls.Certificate{Certificate: [][]byte{der}, PrivateKey: private, Leaf: leaf}
	return a.own, nil
}
