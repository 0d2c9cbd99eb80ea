package identity

import (
	"context"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"io"
	"math/big"
	"net"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

// clock is time that the test moves.
type clock struct {
	mu  sync.Mutex
	now time.Time
}

func newClock() *clock { return &clock{now: time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)} }

func (c *clock) Now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.now
}

// elapsed is the time since an arbitrary boot.
func (c *clock) elapsed() time.Duration {
	return c.Now().Sub(time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC))
}

func (c *clock) pass(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.now = c.now.Add(d)
}

var address = netip.MustParseAddr("10.77.0.3")

func authority(t testing.TB, session int, c *clock) *Authority {
	t.Helper()
	a, err := Open(filepath.Join(t.TempDir(), "ca"), session, c.Now)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// member is a holder with a certificate.
func member(t testing.TB, a *Authority, c *clock, id ID) *Holder {
	t.Helper()
	h, err := NewHolder(filepath.Join(t.TempDir(), "identity"), c.elapsed)
	if err != nil {
		t.Fatal(err)
	}
	if err := h.Renew(t.Context(), issuer(a, id)); err != nil {
		t.Fatal(err)
	}
	return h
}

func issuer(a *Authority, id ID) Renewer {
	return func(_ context.Context, request []byte) ([]byte, []byte, error) {
		cert, err := a.Issue(request, id, address, NodeLife)
		return cert, a.Bundle(), err
	}
}

func node(n int) ID { return ID{Session: 1, Node: n, Boot: "0b5c6c0e-0001"} }

// meet makes a connection and an exchange over it; the errors are the server's
// and the client's.
func meet(t *testing.T, server, client *tls.Config) (atServer, atClient error) {
	t.Helper()
	a, b := connect(t)
	deadline := time.Now().Add(time.Minute)
	a.SetDeadline(deadline)
	b.SetDeadline(deadline)
	done := make(chan error, 1)
	go func() {
		conn := tls.Server(a, server)
		defer a.Close()
		err := conn.Handshake()
		if err == nil {
			_, err = io.ReadFull(conn, make([]byte, 1))
		}
		if err == nil {
			_, err = conn.Write([]byte{2})
		}
		done <- err
	}()
	conn := tls.Client(b, client)
	_, atClient = conn.Write([]byte{1})
	if atClient == nil {
		_, atClient = io.ReadFull(conn, make([]byte, 1))
	}
	b.Close()
	return <-done, atClient
}

// connect is both ends of a TCP connection, whose buffers take what nobody reads.
func connect(t *testing.T) (net.Conn, net.Conn) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	b, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	a, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { a.Close(); b.Close() })
	return a, b
}

// forged is a self-made member's certificate.
func forged(t *testing.T, uri string, key any, public any, change func(*x509.Certificate), parent *x509.Certificate, signer any) *tls.Certificate {
	t.Helper()
	u, err := url.Parse(uri)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "forged"}, URIs: []*url.URL{u}, BasicConstraintsValid: true,
		NotBefore: newClock().now.Add(-time.Hour), NotAfter: newClock().now.Add(time.Hour),
	}
	if change != nil {
		change(template)
	}
	if parent == nil {
		parent, signer = template, key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, public, signer)
	if err != nil {
		t.Fatal(err)
	}
	return &tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

func TestMeeting(t *testing.T) {
	c := newClock()
	a := authority(t, 1, c)
	three, four := member(t, a, c, node(3)), member(t, a, c, node(4))
	for name, configs := range map[string][2]*tls.Config{
		"node at the head":    {ServerTLS(a, Anyone), ClientTLS(three, HeadNode, Anyone)},
		"node at a node":      {ServerTLS(four, Anyone), ClientTLS(three, 4, Anyone)},
		"with HTTP/2 on both": {withProto(ServerTLS(four, Anyone)), withProto(ClientTLS(three, 4, Anyone))},
	} {
		if s, cl := meet(t, configs[0], configs[1]); s != nil || cl != nil {
			t.Errorf("%s: %v, %v", name, s, cl)
		}
	}
}

func withProto(c *tls.Config) *tls.Config { c.NextProtos = []string{"h2"}; return c }

// TestRefused has all sorts of strangers call a member.
func TestRefused(t *testing.T) {
	c := newClock()
	a := authority(t, 1, c)
	server := ServerTLS(a, func(id ID, _ *x509.Certificate) error {
		if id.Boot != node(3).Boot {
			return ErrStale
		}
		return nil
	})
	showing := func(cert *tls.Certificate, change func(*tls.Config)) *tls.Config {
		config := &tls.Config{InsecureSkipVerify: true}
		if cert != nil {
			config.Certificates = []tls.Certificate{*cert}
		}
		if change != nil {
			change(config)
		}
		return config
	}
	public, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	ec, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	good := func(id ID) *tls.Certificate {
		cert, err := member(t, a, c, id).Certificate()
		if err != nil {
			t.Fatal(err)
		}
		return cert
	}
	signed := func(uri string, change func(*x509.Certificate)) *tls.Certificate {
		return forged(t, uri, private, public, change, a.root, a.key)
	}
	own, four := must(a.Certificate()), good(node(4))
	elsewhere := newClock()
	elsewhere.pass(-48 * time.Hour)
	expired := member(t, &Authority{session: 1, clock: elsewhere.Now, key: a.key, root: a.root, bundle: a.bundle}, elsewhere, node(3))
	elsewhere.pass(96 * time.Hour)
	early := member(t, &Authority{session: 1, clock: elsewhere.Now, key: a.key, root: a.root, bundle: a.bundle}, elsewhere, node(3))
	cert := func(h *Holder) *tls.Certificate { k, _ := h.Certificate(); return k }
	const uri = "krg://session/1/node/3?boot=0b5c6c0e-0001"
	for name, tt := range map[string]struct {
		client *tls.Config
		want   error // nil: any
	}{
		"no certificate":                {showing(nil, nil), nil},
		"TLS 1.2":                       {showing(good(node(3)), func(c *tls.Config) { c.MaxVersion = tls.VersionTLS12 }), nil},
		"self-signed":                   {showing(forged(t, uri, private, public, nil, nil, nil), nil), ErrForeign},
		"self-signed as an authority":   {showing(forged(t, uri, private, public, func(c *x509.Certificate) { c.IsCA = true }, nil, nil), nil), ErrForeign},
		"another cluster's":             {ClientTLS(member(t, authority(t, 1, c), c, node(3)), HeadNode, Anyone), nil},
		"another cluster's, trusting":   {showing(cert(member(t, authority(t, 1, c), c, node(3))), nil), ErrForeign},
		"signed by a node":              {showing(forged(t, uri, private, public, nil, four.Leaf, four.PrivateKey), nil), ErrForeign},
		"the head's own":                {showing(own, nil), ErrWrongRole},
		"another session":               {showing(signed("krg://session/2/node/3?boot=0b5c6c0e-0001", nil), nil), ErrWrongSession},
		"an earlier boot":               {showing(good(ID{Session: 1, Node: 3, Boot: "0b5c6c0e-0000"}), nil), ErrStale},
		"expired":                       {showing(cert(expired), nil), ErrExpired},
		"not yet valid":                 {showing(cert(early), nil), ErrNotYetValid},
		"ECDSA key":                     {showing(forged(t, uri, ec, ec.Public(), nil, a.root, a.key), nil), ErrMalformed},
		"a DNS name besides":            {showing(signed(uri, func(c *x509.Certificate) { c.DNSNames = []string{"head"} }), nil), ErrMalformed},
		"two names":                     {showing(signed(uri, func(c *x509.Certificate) { c.URIs = append(c.URIs, node(4).uri()) }), nil), ErrMalformed},
		"no name":                       {showing(signed(uri, func(c *x509.Certificate) { c.URIs = nil }), nil), ErrMalformed},
		"a name that is none":           {showing(signed("krg://session/1/node/03?boot=0b5c6c0e-0001", nil), nil), ErrMalformed},
		"an authority under ours":       {showing(signed(uri, func(c *x509.Certificate) { c.IsCA = true }), nil), ErrMalformed},
		"a chain instead of one":        {showing(&tls.Certificate{Certificate: [][]byte{four.Certificate[0], a.root.Raw}, PrivateKey: four.PrivateKey}, nil), nil},
		"another's certificate, no key": {showing(&tls.Certificate{Certificate: own.Certificate, PrivateKey: private}, nil), nil},
	} {
		t.Run(name, func(t *testing.T) {
			atServer, _ := meet(t, server, tt.client)
			if atServer == nil || tt.want != nil && !errors.Is(atServer, tt.want) {
				t.Errorf("the server says %v, want %v", atServer, tt.want)
			}
		})
	}
}

// TestImpostors has a node call somebody who isn't whom it wants.
func TestImpostors(t *testing.T) {
	c := newClock()
	a := authority(t, 1, c)
	three, four := member(t, a, c, node(3)), member(t, a, c, node(4))
	for name, tt := range map[string]struct {
		server *tls.Config
		peer   int
		want   error
	}{
		"a node in place of the head":    {ServerTLS(four, Anyone), HeadNode, ErrWrongRole},
		"a node in place of another":     {ServerTLS(four, Anyone), 5, ErrWrongRole},
		"the head in place of a node":    {ServerTLS(a, Anyone), 4, ErrWrongRole},
		"another cluster's head":         {ServerTLS(authority(t, 1, c), Anyone), HeadNode, ErrForeign},
		"the head of an earlier session": {ServerTLS(&Authority{session: 2, clock: c.Now, key: a.key, root: a.root}, Anyone), HeadNode, ErrWrongSession},
	} {
		t.Run(name, func(t *testing.T) {
			if _, atClient := meet(t, tt.server, ClientTLS(three, tt.peer, Anyone)); !errors.Is(atClient, tt.want) {
				t.Errorf("the client says %v, want %v", atClient, tt.want)
			}
		})
	}
}

func TestClocksApart(t *testing.T) {
	c := newClock()
	a := authority(t, 1, c)
	h := member(t, a, c, node(3))
	for _, tt := range []struct {
		jump time.Duration
		want error
	}{
		{0, nil}, {-Leeway, nil}, {-Leeway - time.Second, ErrNotYetValid},
		{NodeLife + Leeway, nil}, {NodeLife + Leeway + time.Second, ErrExpired},
	} {
		jumped := newClock()
		jumped.pass(tt.jump)
		cert, _ := h.Certificate()
		if _, _, err := Examine(&Authority{session: 1, clock: jumped.Now, root: a.root}, []*x509.Certificate{cert.Leaf}); !errors.Is(err, tt.want) {
			t.Errorf("a head whose clock is %v off: %v, want %v", tt.jump, err, tt.want)
		}
	}
	// The node goes by the head's clock, whatever its own says.
	c.pass(time.Hour)
	if got := h.Now(); !got.Equal(c.Now()) {
		t.Errorf("the node takes it for %v, it is %v", got, c.Now())
	}
}

// TestRotation renews while a connection stands and opens another.
func TestRotation(t *testing.T) {
	c := newClock()
	a := authority(t, 1, c)
	h := member(t, a, c, node(3))
	first, headFirst := must(h.Certificate()), must(a.Certificate())
	left, right := connect(t)
	server, client := tls.Server(left, ServerTLS(a, Anyone)), tls.Client(right, ClientTLS(h, HeadNode, Anyone))
	exchange := func() {
		t.Helper()
		done := make(chan error, 1)
		go func() { _, err := server.Write([]byte{1}); done <- err }()
		if _, err := io.ReadFull(client, make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
		if err := <-done; err != nil {
			t.Fatal(err)
		}
	}
	exchange()
	if h.RenewIn() != NodeLife/2 {
		t.Errorf("renewed in %v, want %v", h.RenewIn(), NodeLife/2)
	}
	c.pass(4 * 24 * time.Hour) // the head was away for days: the certificate is long expired
	if h.RenewIn() > 0 {
		t.Errorf("renewed in %v", h.RenewIn())
	}
	if err := h.Renew(t.Context(), issuer(a, node(3))); err != nil {
		t.Fatal(err)
	}
	second, headSecond := must(h.Certificate()), must(a.Certificate())
	if second == first || headSecond == headFirst {
		t.Error("the same certificate as before")
	}
	if Fingerprint(second.Leaf) != Fingerprint(first.Leaf) || h.Fingerprint() != Fingerprint(first.Leaf) {
		t.Error("the key is another after a renewal")
	}
	exchange()
	if s, cl := meet(t, ServerTLS(a, Anyone), ClientTLS(h, HeadNode, Anyone)); s != nil || cl != nil {
		t.Error(s, cl)
	}
}

func must(c *tls.Certificate, err error) *tls.Certificate {
	if err != nil {
		panic(err)
	}
	return c
}

func TestHolderRun(t *testing.T) {
	c := newClock()
	a := authority(t, 1, c)
	h := member(t, a, c, node(3))
	c.pass(NodeLife / 2)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	asked := 0
	err := h.Run(ctx, func(ctx context.Context, request []byte) ([]byte, []byte, error) {
		asked++
		defer cancel()
		return issuer(a, node(3))(ctx, request)
	}, nil)
	if err != nil || asked != 1 {
		t.Errorf("asked %d times, %v", asked, err)
	}
}

func TestHolderKeeps(t *testing.T) {
	c := newClock()
	a := authority(t, 1, c)
	if _, err := LoadHolder(t.TempDir(), c.elapsed); !errors.Is(err, ErrNoIdentity) {
		t.Errorf("an empty directory: %v", err)
	}
	h := member(t, a, c, node(3))
	for path, want := range map[string]os.FileMode{h.dir: 0o700, filepath.Join(h.dir, nodeKeyFile): 0o600, filepath.Join(h.dir, nodeCertFile): 0o600} {
		if info, err := os.Stat(path); err != nil || info.Mode().Perm() != want {
			t.Errorf("%s: %v, %v", path, info.Mode(), err)
		}
	}
	c.pass(time.Hour)
	again, err := LoadHolder(h.dir, c.elapsed)
	if err != nil {
		t.Fatal(err)
	}
	if id, ok := again.ID(); !ok || id != node(3) || again.RenewIn() != h.RenewIn() || !again.Now().Equal(c.Now()) {
		t.Errorf("loaded: %v %v, renewed in %v at %v", id, ok, again.RenewIn(), again.Now())
	}
	// What a head that isn't ours might answer.
	other := authority(t, 1, c)
	for name, ask := range map[string]Renewer{
		"another authority": issuer(other, node(3)),
		"another node":      issuer(a, node(4)),
		"another boot":      issuer(a, ID{Session: 1, Node: 3, Boot: "0b5c6c0e-0002"}),
		"another key": func(context.Context, []byte) ([]byte, []byte, error) {
			k, err := NewRequest(a.key)
			return must2(a.Issue(k, node(3), address, time.Hour)), a.Bundle(), err
		},
		"the authority's own": func(context.Context, []byte) ([]byte, []byte, error) { return a.Bundle(), a.Bundle(), nil },
		"nothing":             func(context.Context, []byte) ([]byte, []byte, error) { return nil, nil, nil },
		"no authority": func(_ context.Context, r []byte) ([]byte, []byte, error) {
			return must2(a.Issue(r, node(3), address, time.Hour)), nil, nil
		},
	} {
		if err := again.Renew(t.Context(), ask); err == nil {
			t.Errorf("%s: taken", name)
		}
	}
	if _, err := LoadHolder(h.dir, c.elapsed); err != nil {
		t.Errorf("after refused answers: %v", err)
	}
}

func must2(b []byte, err error) []byte {
	if err != nil {
		panic(err)
	}
	return b
}

func TestRequests(t *testing.T) {
	_, key, _ := ed25519.GenerateKey(rand.Reader)
	make := func(template x509.CertificateRequest, key any) []byte {
		der, err := x509.CreateCertificateRequest(rand.Reader, &template, key)
		if err != nil {
			t.Fatal(err)
		}
		return pem.EncodeToMemory(&pem.Block{Type: pemRequest, Bytes: der})
	}
	good := make(x509.CertificateRequest{}, key)
	if _, err := ParseRequest(good); err != nil {
		t.Fatal(err)
	}
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	ecKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	block, _ := pem.Decode(good)
	broken := append([]byte{}, block.Bytes...)
	broken[len(broken)-1] ^= 1
	for name, text := range map[string][]byte{
		"empty": nil, "no PEM": []byte("x"), "RSA": make(x509.CertificateRequest{}, rsaKey), "ECDSA": make(x509.CertificateRequest{}, ecKey),
		"a name":            make(x509.CertificateRequest{Subject: pkix.Name{CommonName: "head"}}, key),
		"a URI":             make(x509.CertificateRequest{URIs: []*url.URL{node(4).uri()}}, key),
		"a wrong signature": pem.EncodeToMemory(&pem.Block{Type: pemRequest, Bytes: broken}),
		"two":               append(append([]byte{}, good...), good...),
		"another type":      pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: block.Bytes}),
		"headers":           pem.EncodeToMemory(&pem.Block{Type: pemRequest, Bytes: block.Bytes, Headers: map[string]string{"a": "b"}}),
		"oversized":         append(append([]byte{}, good...), strings.Repeat("\n", maxPEM)...),
	} {
		if _, err := ParseRequest(text); !errors.Is(err, ErrMalformed) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestTokens(t *testing.T) {
	c := newClock()
	tokens := NewTokens(c.Now)
	to := Binding{MAC: "52:54:00:00:00:03", Address: address, Node: 3, Boot: "0b5c6c0e-0001"}
	text, err := tokens.Issue(to)
	if err != nil {
		t.Fatal(err)
	}
	if again, err := tokens.Issue(to); err != nil || again != text {
		t.Errorf("asked again: %v, another token: %v", err, again != text)
	}
	redeem := func(from Binding, text, key string) error { _, err := tokens.Redeem(text, from, key); return err }
	from := to
	from.Boot = "" // it isn't asked
	otherMAC, otherAddress, otherNode := from, from, from
	otherMAC.MAC, otherAddress.Address, otherNode.Node = "52:54:00:00:00:04", netip.MustParseAddr("10.77.0.4"), 4
	check := func(name string, got, want error) {
		t.Helper()
		if !errors.Is(got, want) {
			t.Errorf("%s: %v, want %v", name, got, want)
		}
	}
	check("another MAC", redeem(otherMAC, text, "k"), ErrWrongAddress)
	check("another address", redeem(otherAddress, text, "k"), ErrWrongAddress)
	check("another node", redeem(otherNode, text, "k"), ErrWrongAddress)
	check("unknown", redeem(from, text+"x", "k"), ErrUnknown)
	check("empty", redeem(from, "", "k"), ErrUnknown)
	check("the first time", redeem(from, text, "k"), nil)
	check("once more, its answer was lost", redeem(from, text, "k"), nil)
	check("replayed with another key", redeem(from, text, "thief"), ErrUsed)
	_, err = tokens.Issue(to)
	check("another token in one boot", err, ErrUsed)
	later := to
	later.Boot = "0b5c6c0e-0002"
	next, err := tokens.Issue(later)
	check("the next boot", err, nil)
	check("a token of the boot before", redeem(from, text, "k"), ErrUnknown)
	c.pass(TokenLife + time.Second)
	check("expired", redeem(from, next, "k"), ErrTokenExpired)
	c.pass(-2*TokenLife - Leeway - time.Minute)
	check("the clock was set back", redeem(from, next, "k"), ErrTokenExpired)
	tokens.Void(3)
	check("void", redeem(from, next, "k"), ErrUnknown)
}

// TestAuthorityCutOff leaves a half-made authority behind.
func TestAuthorityCutOff(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "ca")
	if err := os.MkdirAll(dir+".new-1", 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir+".new-1", rootKeyFile), []byte("half"), 0o600); err != nil {
		t.Fatal(err)
	}
	a, err := Open(dir, 1, nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(dir + ".new-1"); !os.IsNotExist(err) {
		t.Errorf("what was left behind: %v", err)
	}
	again, err := Open(dir, 2, nil)
	if err != nil || again.Fingerprint() != a.Fingerprint() || again.Session() != 2 {
		t.Errorf("opened again with another session: %v", err)
	}
	for _, damage := range []func() error{
		func() error { return os.Remove(filepath.Join(dir, rootCertFile)) },
		func() error { return os.RemoveAll(filepath.Join(dir, rootKeyFile)) }, // an empty directory
	} {
		if err := damage(); err != nil {
			t.Fatal(err)
		}
		if _, err := Open(dir, 1, nil); !errors.As(err, new(*DirError)) {
			t.Errorf("damaged: %v", err)
		}
	}
}

func TestIDs(t *testing.T) {
	for _, id := range []ID{node(0), node(255), {Session: 9999, Node: HeadNode}} {
		if got, err := ParseID(id.String()); err != nil || got != id {
			t.Errorf("%s: %+v, %v", id, got, err)
		}
	}
	for _, bad := range []ID{{}, {Session: 1, Node: 256, Boot: "0b5c6c0e"}, {Session: 1, Node: 3}, {Session: 1, Node: 3, Boot: "0b5c6c0e&x=1"}, {Session: 10000, Node: HeadNode}, {Session: 1, Node: HeadNode, Boot: "0b5c6c0e"}} {
		if bad.Check() == nil {
			t.Errorf("%+v can be a member's", bad)
		}
	}
}

func FuzzParseID(f *testing.F) {
	f.Add("krg://session/1/head")
	f.Add("krg://session/1/node/3?boot=0b5c6c0e-0001")
	f.Add("krg://session/01/node/256?boot=")
	f.Fuzz(func(t *testing.T, s string) {
		if id, err := ParseID(s); err == nil && (id.String() != s || id.Check() != nil) {
			t.Errorf("%q is %+v is %q", s, id, id)
		}
	})
}

func FuzzParseRequest(f *testing.F) {
	_, key, _ := ed25519.GenerateKey(rand.Reader)
	seed, err := NewRequest(key)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(seed)
	f.Add([]byte("-----BEGIN CERTIFICATE REQUEST-----\n-----END CERTIFICATE REQUEST-----\n"))
	f.Fuzz(func(t *testing.T, text []byte) {
		if r, err := ParseRequest(text); err == nil && (len(r.Key) != ed25519.PublicKeySize || len(r.Fingerprint) != 64) {
			t.Errorf("%+v", r)
		}
	})
}

// FuzzCertificate gives a node and a peer certificates of any form.
func FuzzCertificate(f *testing.F) {
	c := newClock()
	a := authority(f, 1, c)
	h := member(f, a, c, node(3))
	f.Add(h.get().certText, a.Bundle())
	f.Add(a.Bundle(), a.Bundle())
	f.Fuzz(func(t *testing.T, cert, roots []byte) {
		if got, err := h.check(cert, roots, 0); err == nil && got.id.Check() != nil {
			t.Errorf("%+v", got.id)
		}
		if certs, err := parseCertificates(cert); err == nil {
			if id, _, err := Examine(a, certs[:1]); err == nil && id != node(3) {
				t.Errorf("accepted as %v", id)
			}
		}
	})
}
