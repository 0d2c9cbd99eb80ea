package identity

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"time"
)

// Names in a node's identity directory.
const (
	nodeKeyFile  = "key.pem"
	nodeCertFile = "cert.json"
)

// ErrNoIdentity says that a node has no certificate yet.
var ErrNoIdentity = errors.New("this node has no identity yet")

// Holder is a node's identity: its private key, which is made on the node and
// never leaves it, and its certificate. It is safe for concurrent use.
//
// Time is counted from the moment the certificate came: the head's clock then,
// which the certificate carries, plus what has passed since. So a node whose
// clock is wrong or is set anew judges certificates rightly all the same.
type Holder struct {
	dir     string
	elapsed func() time.Duration
	key     ed25519.PrivateKey

	mu    sync.Mutex
	held  *held         // nil before the first certificate; guarded by mu
	fresh chan struct{} // closed and replaced when a certificate comes; guarded by mu
}

// held is a certificate and what came with it. It is not changed once made.
type held struct {
	id       ID
	cert     *tls.Certificate
	roots    []*x509.Certificate
	certText []byte
	rootText []byte
	at       time.Duration // elapsed() when it came
}

// certFile is the form of a held certificate on disk.
type certFile struct {
	Certificate string        `json:"certificate"`
	Authority   string        `json:"authority"`
	At          time.Duration `json:"at"` // nanoseconds on the clock that counts from the machine's boot
}

// NewHolder makes a new key and keeps it in dir, which must be in memory (a
// tmpfs) and private to the host part of the node: a node has a new key at each
// boot. The directory gets mode 0700. elapsed is the time since the machine
// started, sleep included; nil is the kernel's CLOCK_BOOTTIME.
func NewHolder(dir string, elapsed func() time.Duration) (*Holder, error) {
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return nil, err
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	if err := os.Chmod(dir, 0o700); err != nil {
		return nil, err
	}
	// A certificate of an earlier key is worth nothing.
	if err := os.Remove(filepath.Join(dir, nodeCertFile)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	if err := replace(filepath.Join(dir, nodeKeyFile), pem.EncodeToMemory(&pem.Block{Type: pemKey, Bytes: pkcs8})); err != nil {
		return nil, err
	}
	return newHolder(dir, key, elapsed), nil
}

// LoadHolder reads the identity that NewHolder and Accept kept in dir. The error
// is ErrNoIdentity when there is none. A key without a certificate is a Holder
// that waits for Accept.
func LoadHolder(dir string, elapsed func() time.Duration) (*Holder, error) {
	text, err := os.ReadFile(filepath.Join(dir, nodeKeyFile))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, ErrNoIdentity
	}
	if err != nil {
		return nil, fmt.Errorf("identity: %w", err)
	}
	key, err := parseKey(text)
	if err != nil {
		return nil, fmt.Errorf("identity: %s: %w", nodeKeyFile, err)
	}
	h := newHolder(dir, key, elapsed)
	text, err = os.ReadFile(filepath.Join(dir, nodeCertFile))
	if errors.Is(err, fs.ErrNotExist) {
		return h, nil
	}
	if err != nil {
		return nil, fmt.Errorf("identity: %w", err)
	}
	var kept certFile
	if err := json.Unmarshal(text, &kept); err != nil {
		return nil, fmt.Errorf("identity: %s: %w", nodeCertFile, err)
	}
	if h.held, err = h.check([]byte(kept.Certificate), []byte(kept.Authority), kept.At); err != nil {
		return nil, fmt.Errorf("identity: %s: %w", nodeCertFile, err)
	}
	return h, nil
}

func newHolder(dir string, key ed25519.PrivateKey, elapsed func() time.Duration) *Holder {
	if elapsed == nil {
		elapsed = sinceBoot
	}
	return &Holder{dir: dir, key: key, elapsed: elapsed, fresh: make(chan struct{})}
}

// Request makes the certificate request for the node's key, in PEM.
func (h *Holder) Request() ([]byte, error) { return NewRequest(h.key) }

// Accept takes a certificate for the node's key and the authorities to trust,
// both in PEM. Once a node trusts an authority, a certificate of another one is
// refused (ErrForeign): only the first answer is taken on trust.
func (h *Holder) Accept(cert, authority []byte) error {
	next, err := h.check(cert, authority, h.elapsed())
	if err != nil {
		return fmt.Errorf("the head's answer: %w", err)
	}
	text, err := json.Marshal(certFile{string(cert), string(authority), next.at})
	if err != nil {
		return err
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.held != nil {
		if err := signedBy(next.cert.Leaf, h.held.roots); err != nil {
			return fmt.Errorf("the head's answer: %w", err)
		}
		if next.id != h.held.id {
			return fmt.Errorf("the head's answer: a certificate of %s, this node is %s: %w", next.id, h.held.id, ErrMalformed)
		}
		// What a node trusts doesn't grow by an answer.
		next.roots, next.rootText = h.held.roots, h.held.rootText
		if !bytes.Equal(next.rootText, authority) {
			if text, err = json.Marshal(certFile{string(cert), string(next.rootText), next.at}); err != nil {
				return err
			}
		}
	}
	if err := replace(filepath.Join(h.dir, nodeCertFile), text); err != nil {
		return fmt.Errorf("keep the certificate: %w", err)
	}
	h.held = next
	close(h.fresh)
	h.fresh = make(chan struct{})
	return nil
}

// check makes sure that a certificate is one for this node.
func (h *Holder) check(certText, rootText []byte, at time.Duration) (*held, error) {
	if len(certText) > maxPEM {
		return nil, fmt.Errorf("a certificate of %d bytes: %w", len(certText), ErrMalformed)
	}
	certs, err := parseCertificates(certText)
	if err != nil {
		return nil, err
	}
	roots, err := ParseRoots(rootText)
	if err != nil {
		return nil, err
	}
	leaf := certs[0]
	if len(certs) != 1 {
		return nil, fmt.Errorf("%d certificates, expected one: %w", len(certs), ErrMalformed)
	}
	if err := signedBy(leaf, roots); err != nil {
		return nil, err
	}
	id, err := nameOf(leaf)
	if err != nil {
		return nil, err
	}
	if id.IsHead() {
		return nil, fmt.Errorf("certificate of %s: %w", id, ErrWrongRole)
	}
	if !h.key.Public().(ed25519.PublicKey).Equal(leaf.PublicKey) {
		return nil, fmt.Errorf("a certificate for another key: %w", ErrMalformed)
	}
	cert := &tls.Certificate{Certificate: [][]byte{leaf.Raw}, PrivateKey: h.key, Leaf: leaf}
	return &held{id: id, cert: cert, roots: roots, certText: certText, rootText: rootText, at: at}, nil
}

func (h *Holder) get() *held {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.held
}

// ID is who the node is; ok is false before the first certificate.
func (h *Holder) ID() (id ID, ok bool) {
	if got := h.get(); got != nil {
		return got.id, true
	}
	return ID{}, false
}

// Fingerprint names the node's key, see Fingerprint.
func (h *Holder) Fingerprint() string {
	spki, err := x509.MarshalPKIXPublicKey(h.key.Public())
	if err != nil {
		panic(err) // an Ed25519 key always has that form
	}
	return keyFingerprint(spki)
}

// Session implements Credentials; 0, which no peer has, before the first
// certificate.
func (h *Holder) Session() int {
	if got := h.get(); got != nil {
		return got.id.Session
	}
	return 0
}

// Certificate implements Credentials.
func (h *Holder) Certificate() (*tls.Certificate, error) {
	if got := h.get(); got != nil {
		return got.cert, nil
	}
	return nil, ErrNoIdentity
}

// Roots implements Credentials.
func (h *Holder) Roots() []*x509.Certificate {
	if got := h.get(); got != nil {
		return got.roots
	}
	return nil
}

// Now implements Credentials: the head's time, as far as the node can know it.
func (h *Holder) Now() time.Time {
	got := h.get()
	if got == nil {
		return time.Now()
	}
	return got.cert.Leaf.NotBefore.Add(h.elapsed() - got.at)
}

// Authority is the PEM text of the authorities that the node trusts; nil before
// the first certificate.
func (h *Holder) Authority() []byte {
	if got := h.get(); got != nil {
		return got.rootText
	}
	return nil
}

// RenewIn is how long the node's certificate need not be renewed: until half of
// its life has passed; not above zero when it is time. Before the first
// certificate it is zero.
func (h *Holder) RenewIn() time.Duration {
	got := h.get()
	if got == nil {
		return 0
	}
	life := got.cert.Leaf.NotAfter.Sub(got.cert.Leaf.NotBefore)
	return life/2 - (h.elapsed() - got.at)
}

// Renewer asks the head for a new certificate and returns it and the bundle of
// authorities, in PEM.
type Renewer func(ctx context.Context, request []byte) (cert, authority []byte, err error)

// Renew renews the certificate once.
func (h *Holder) Renew(ctx context.Context, ask Renewer) error {
	request, err := h.Request()
	if err != nil {
		return err
	}
	cert, authority, err := ask(ctx, request)
	if err != nil {
		return err
	}
	return h.Accept(cert, authority)
}

// Run renews the certificate at the half of its life, until ctx ends. What fails
// is told to failed (if not nil) and tried again; connections that stand are not
// touched by a renewal, new ones use the new certificate.
func (h *Holder) Run(ctx context.Context, ask Renewer, failed func(err error, again time.Duration)) error {
	pause := renewPause
	for {
		h.mu.Lock()
		fresh := h.fresh
		h.mu.Unlock()
		wait := h.RenewIn()
		if wait <= 0 {
			err := h.Renew(ctx, ask)
			if ctx.Err() != nil {
				return nil
			}
			if err == nil {
				pause = renewPause
				continue
			}
			if failed != nil {
				failed(err, pause)
			}
			wait, pause = pause, min(2*pause, maxRenewPause)
		}
		// The timer counts awake time only; looking again now and then makes up
		// for a machine that slept.
		timer := time.NewTimer(min(wait, time.Hour))
		select {
		case <-ctx.Done():
			timer.Stop()
			return nil
		case <-fresh:
			timer.Stop()
		case <-timer.C:
		}
	}
}

const (
	renewPause    = 5 * time.Second
	maxRenewPause = 5 * time.Minute
)

// replace writes a file of mode 0600 in one step. The directory is in memory, so
// there is nothing to sync.
func replace(path string, data []byte) error {
	aside := path + ".new"
	if err := os.Remove(aside); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := os.WriteFile(aside, data, 0o600); err != nil {
		return err
	}
	return os.Rename(aside, path)
}
