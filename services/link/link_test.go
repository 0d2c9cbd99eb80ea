package link

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"iter"
	"log/slog"
	"maps"
	"net"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"krgimage/services/identity"
)

// table is a membership that tests change.
type table struct {
	mu      sync.Mutex
	peers   map[int]Peer
	changed chan struct{}
}

func newTable() *table { return &table{peers: map[int]Peer{}, changed: make(chan struct{})} }

func (t *table) change(f func(map[int]Peer)) {
	t.mu.Lock()
	defer t.mu.Unlock()
	peers := maps.Clone(t.peers)
	f(peers)
	t.peers = peers
	close(t.changed)
	t.changed = make(chan struct{})
}

func (t *table) Snapshot() map[int]Peer {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.peers
}

func (t *table) Watch(ctx context.Context) iter.Seq[map[int]Peer] {
	return func(yield func(map[int]Peer) bool) {
		for {
			t.mu.Lock()
			peers, changed := t.peers, t.changed
			t.mu.Unlock()
			if ctx.Err() != nil || !yield(peers) {
				return
			}
			select {
			case <-ctx.Done():
				return
			case <-changed:
			}
		}
	}
}

// credentials are a node's, without a directory.
type credentials struct {
	authority *identity.Authority
	cert      *tls.Certificate
}

func (c credentials) Session() int                           { return c.authority.Session() }
func (c credentials) Certificate() (*tls.Certificate, error) { return c.cert, nil }
func (c credentials) Roots() []*x509.Certificate             { return c.authority.Roots() }
func (c credentials) Now() time.Time                         { return c.authority.Now() }

// town is a session with its authority and membership.
type town struct {
	t         testing.TB
	authority *identity.Authority
	members   *table
	boots     int
}

func newTown(t testing.TB) *town {
	t.Helper()
	a, err := identity.Open(t.TempDir()+"/ca", 7, time.Now)
	if err != nil {
		t.Fatal(err)
	}
	return &town{t: t, authority: a, members: newTable()}
}

// boot gives a node a key, as each boot does.
func (w *town) boot(node int) (credentials, string) {
	w.t.Helper()
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		w.t.Fatal(err)
	}
	csr, err := identity.NewRequest(key)
	if err != nil {
		w.t.Fatal(err)
	}
	w.boots++
	id := identity.ID{Session: 7, Node: node, Boot: fmt.Sprintf("%08x", w.boots)}
	text, err := w.authority.Issue(csr, id, netip.MustParseAddr("127.0.0.1"), time.Hour)
	if err != nil {
		w.t.Fatal(err)
	}
	roots, err := identity.ParseRoots(w.authority.Bundle())
	if err != nil || len(roots) == 0 {
		w.t.Fatal("no roots", err)
	}
	leaf := parseCert(w.t, text)
	return credentials{w.authority, &tls.Certificate{Certificate: [][]byte{leaf.Raw}, PrivateKey: key, Leaf: leaf}}, identity.Fingerprint(leaf)
}

// node is a node of a test.
type node struct {
	*Mesh
	addr  netip.AddrPort
	dials atomic.Int32
	stop  func() // and waits
}

// start boots a node and makes it a member.
func (w *town) start(id int, setup ...func(*Config)) *node {
	w.t.Helper()
	cred, fingerprint := w.boot(id)
	n := w.run(id, cred, setup...)
	w.members.change(func(m map[int]Peer) {
		m[id] = Peer{Node: id, Epoch: m[id].Epoch + 1, Fingerprint: fingerprint, Addr: n.addr}
	})
	return n
}

func (w *town) run(id int, cred identity.Credentials, setup ...func(*Config)) *node {
	w.t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		w.t.Fatal(err)
	}
	n := &node{addr: l.Addr().(*net.TCPAddr).AddrPort()}
	c := Config{Self: id, Identity: cred, Members: w.members, Log: slog.New(slog.DiscardHandler)}
	c.Dial = func(ctx context.Context, addr netip.AddrPort) (net.Conn, error) {
		n.dials.Add(1)
		return (&net.Dialer{}).DialContext(ctx, "tcp", addr.String())
	}
	for _, f := range setup {
		f(&c)
	}
	n.Mesh = New(c)
	n.Handle("echo", func(_ context.Context, _ Peer, conn net.Conn) { io.Copy(conn, conn) })
	n.Handle("who", func(_ context.Context, p Peer, conn net.Conn) { fmt.Fprintf(conn, "%d/%d", p.Node, p.Epoch) })
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- n.Serve(ctx, l) }()
	n.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			w.t.Error(err)
		}
	})
	w.t.Cleanup(n.stop)
	return n
}

func (n *node) echo(t testing.TB, to int, text string) {
	t.Helper()
	conn, err := n.Mesh.Dial(t.Context(), to, "echo")
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	exchange(t, conn, text)
}

func exchange(t testing.TB, conn net.Conn, text string) {
	t.Helper()
	go io.WriteString(conn, text)
	got := make([]byte, len(text))
	if _, err := io.ReadFull(conn, got); err != nil || string(got) != text {
		t.Errorf("echo of %d bytes: %v", len(text), err)
	}
}

func TestStreams(t *testing.T) {
	w := newTown(t)
	one, two := w.start(1), w.start(2)
	big := strings.Repeat("0123456789abcdef", 200_000) // 3.2 MB: many windows
	var all sync.WaitGroup
	for i := range 50 {
		all.Go(func() { one.echo(t, 2, fmt.Sprint("small ", i)) })
		all.Go(func() { two.echo(t, 1, fmt.Sprint("small ", i)) })
	}
	all.Go(func() { one.echo(t, 2, big) })
	all.Wait()
	if a, b := one.dials.Load(), two.dials.Load(); a > 1 || b > 1 || a+b == 0 {
		t.Errorf("%d and %d connections for all streams of two nodes", a, b)
	}
	conn, err := one.Mesh.Dial(t.Context(), 2, "who")
	if err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(conn); err != nil || string(got) != "1/1" {
		t.Errorf("the handler sees %q, %v", got, err)
	}
	conn.Close()
}

func TestBulk(t *testing.T) {
	w := newTown(t)
	one, _ := w.start(1), w.start(2)
	conn, err := one.DialBulk(t.Context(), 2, "echo")
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	big := bytes.Repeat([]byte("0123456789abcdef"), 500_000)
	go func() {
		conn.Write(big)
		conn.(interface{ CloseWrite() error }).CloseWrite()
	}()
	got, err := io.ReadAll(conn)
	if err != nil || !bytes.Equal(got, big) {
		t.Errorf("%d of %d bytes came back, %v", len(got), len(big), err)
	}
	small, err := one.Mesh.Dial(t.Context(), 2, "echo")
	if err != nil {
		t.Fatal(err)
	}
	defer small.Close()
	if err := small.(interface{ CloseWrite() error }).CloseWrite(); err == nil {
		t.Error("half close of a shared stream succeeded")
	}
}

func TestUnknown(t *testing.T) {
	w := newTown(t)
	one, _ := w.start(1), w.start(2)
	for name, dial := range map[string]func(context.Context, int, string) (net.Conn, error){"shared": one.Mesh.Dial, "bulk": one.DialBulk} {
		conn, err := dial(t.Context(), 2, "nothing")
		if err != nil {
			t.Fatal(err)
		}
		for range 2 {
			if _, err := conn.Read(make([]byte, 1)); !errors.Is(err, ErrNoService) {
				t.Errorf("%s: read of an unknown service: %v", name, err)
			}
		}
		conn.Close()
		if _, err := dial(t.Context(), 3, "echo"); !errors.Is(err, ErrNotMember) {
			t.Errorf("%s: dial of no node: %v", name, err)
		}
		if _, err := dial(t.Context(), 1, "echo"); !errors.Is(err, ErrNotMember) {
			t.Errorf("%s: dial of itself: %v", name, err)
		}
	}
}

// TestDeath: all that goes on with a peer ends when the membership says that it
// is gone, though its machine still answers.
func TestDeath(t *testing.T) {
	for name, change := range map[string]func(map[int]Peer){
		"gone":      func(m map[int]Peer) { delete(m, 2) },
		"new epoch": func(m map[int]Peer) { p := m[2]; p.Epoch++; m[2] = p },
		"new key":   func(m map[int]Peer) { p := m[2]; p.Fingerprint = "other"; m[2] = p },
	} {
		t.Run(name, func(t *testing.T) {
			w := newTown(t)
			one, two := w.start(1), w.start(2)
			served := make(chan error, 1)
			two.Handle("wait", func(ctx context.Context, _ Peer, conn net.Conn) { <-ctx.Done() })
			one.Handle("watch", func(ctx context.Context, _ Peer, conn net.Conn) {
				<-ctx.Done()
				served <- context.Cause(ctx)
			})
			shared, err := one.Mesh.Dial(t.Context(), 2, "wait")
			if err != nil {
				t.Fatal(err)
			}
			bulk, err := one.DialBulk(t.Context(), 2, "wait")
			if err != nil {
				t.Fatal(err)
			}
			back, err := two.Mesh.Dial(t.Context(), 1, "watch")
			if err != nil {
				t.Fatal(err)
			}
			back.SetReadDeadline(time.Now().Add(20 * time.Millisecond))
			if _, err := back.Read(make([]byte, 1)); err == nil { // the handler may run by now
				t.Error("read something")
			}
			ends := make(chan error, 2)
			for _, c := range []net.Conn{shared, bulk} {
				go func() {
					_, err := c.Read(make([]byte, 1))
					ends <- err
				}()
			}
			w.members.change(change)
			for range 2 {
				if err := <-ends; !errors.Is(err, ErrPeerGone) {
					t.Errorf("a read ends with %v", err)
				}
			}
			if err := <-served; !errors.Is(err, ErrPeerGone) {
				t.Errorf("the handler's context ends with %v", err)
			}
			if _, err := shared.Write([]byte("x")); !errors.Is(err, ErrPeerGone) {
				t.Errorf("a write ends with %v", err)
			}
		})
	}
}

// TestBroken: an end without a goodbye is no end of the data.
func TestBroken(t *testing.T) {
	w := newTown(t)
	var mu sync.Mutex
	var raw []net.Conn
	one := w.start(1, func(c *Config) {
		dial := c.Dial
		c.Dial = func(ctx context.Context, a netip.AddrPort) (net.Conn, error) {
			conn, err := dial(ctx, a)
			mu.Lock()
			defer mu.Unlock()
			raw = append(raw, conn)
			return conn, err
		}
	})
	two := w.start(2)
	for name, dial := range map[string]func(context.Context, int, string) (net.Conn, error){"shared": one.Mesh.Dial, "bulk": one.DialBulk} {
		arrived := make(chan error, 1)
		service := "half of it " + name
		two.Handle(service, func(_ context.Context, _ Peer, conn net.Conn) {
			_, err := io.Copy(conn, conn)
			arrived <- err
		})
		conn, err := dial(t.Context(), 2, service)
		if err != nil {
			t.Fatal(err)
		}
		exchange(t, conn, "hello")
		mu.Lock()
		// A clean end of TCP, as a killed process leaves it.
		raw[len(raw)-1].(*net.TCPConn).CloseWrite()
		mu.Unlock()
		if err := <-arrived; !errors.Is(err, ErrBroken) {
			t.Errorf("%s: the handler reads %v", name, err)
		}
		if n, err := conn.Read(make([]byte, 1)); err == nil || errors.Is(err, io.EOF) && name == "shared" {
			t.Errorf("%s: read %d, %v", name, n, err)
		}
		conn.Close()
	}
	one.echo(t, 2, "a new connection is made")
}

// TestPeerStops: a Mesh that stops takes its streams along and is dialed anew.
func TestPeerStops(t *testing.T) {
	w := newTown(t)
	one, two := w.start(1), w.start(2)
	two.Handle("wait", func(ctx context.Context, _ Peer, conn net.Conn) { <-ctx.Done() })
	conn, err := one.Mesh.Dial(t.Context(), 2, "wait")
	if err != nil {
		t.Fatal(err)
	}
	two.stop()
	if _, err := conn.Read(make([]byte, 1)); err == nil {
		t.Error("read something")
	}
	if _, err := two.Mesh.Dial(t.Context(), 1, "echo"); !errors.Is(err, ErrClosed) {
		t.Errorf("a stopped Mesh dials: %v", err)
	}
	w.start(2)
	one.echo(t, 2, "back")
}

// TestStrangers: who isn't a member in its present boot gets nowhere.
func TestStrangers(t *testing.T) {
	w := newTown(t)
	one, two := w.start(1), w.start(2)
	foreign := newTown(t)
	old, _ := w.boot(2)
	nobody, _ := w.boot(9)
	otherCity, _ := foreign.boot(2)
	short := func(c *Config) { c.Self = 2 }
	for name, cred := range map[string]identity.Credentials{
		"an earlier boot's key": old, "no member": nobody, "another authority": mixed{otherCity, w.authority}, "the head": w.authority,
	} {
		stranger := w.run(50, cred, short)
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		if conn, err := stranger.Mesh.Dial(ctx, 1, "echo"); err == nil {
			t.Errorf("%s: a stream: %v", name, conn.RemoteAddr())
		}
		cancel()
		stranger.stop()
	}
	// Garbage and silence don't hinder the others.
	for range maxStrangers / 4 {
		c, err := net.Dial("tcp", one.addr.String())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		io.WriteString(c, "GET / HTTP/1.0\r\n\r\n")
	}
	silent, err := net.Dial("tcp", one.addr.String())
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	two.echo(t, 1, "still there")

	// Who answers in place of a node is found out before a byte of data.
	liar := w.run(50, nobody, short)
	w.members.change(func(m map[int]Peer) { p := m[2]; p.Addr = liar.addr; p.Epoch++; m[2] = p })
	if _, err := one.Mesh.Dial(t.Context(), 2, "echo"); !errors.Is(err, identity.ErrWrongRole) {
		t.Errorf("a liar was dialed: %v", err)
	}
}

// mixed shows one identity and trusts another's authority.
type mixed struct {
	credentials
	trust *identity.Authority
}

func (m mixed) Roots() []*x509.Certificate { return m.trust.Roots() }

// TestLag: a listener that hears of a peer's joining after the peer itself.
func TestLag(t *testing.T) {
	w := newTown(t)
	one := w.start(1)
	cred, fingerprint := w.boot(2)
	two := w.run(2, cred)
	result := make(chan error, 1)
	go func() {
		conn, err := two.DialBulk(t.Context(), 1, "echo")
		if err == nil {
			exchange(t, conn, "early")
			conn.Close()
		}
		result <- err
	}()
	for two.dials.Load() == 0 {
		time.Sleep(time.Millisecond)
	}
	w.members.change(func(m map[int]Peer) { m[2] = Peer{Node: 2, Epoch: 1, Fingerprint: fingerprint, Addr: two.addr} })
	if err := <-result; err != nil {
		t.Error(err)
	}
	one.echo(t, 2, "and back")
}

func TestIdle(t *testing.T) {
	w := newTown(t)
	one := w.start(1, func(c *Config) { c.Idle = 20 * time.Millisecond })
	w.start(2)
	for range 3 {
		one.echo(t, 2, "hello")
		deadline := time.Now().Add(time.Minute)
		for {
			one.Mesh.mu.Lock()
			p := one.links[2]
			one.Mesh.mu.Unlock()
			if _, alive := p.session(); !alive {
				break
			}
			if time.Now().After(deadline) {
				t.Fatal("an unused connection stays")
			}
			time.Sleep(time.Millisecond)
		}
	}
	if n := one.dials.Load(); n != 3 {
		t.Errorf("%d connections, want 3", n)
	}
}

// TestSlowReader: a stream that nobody reads doesn't hold up the others.
func TestSlowReader(t *testing.T) {
	w := newTown(t)
	one, two := w.start(1), w.start(2)
	release := make(chan struct{})
	two.Handle("deaf", func(ctx context.Context, _ Peer, conn net.Conn) { <-release })
	conn, err := one.Mesh.Dial(t.Context(), 2, "deaf")
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	conn.SetWriteDeadline(time.Now().Add(100 * time.Millisecond))
	if n, err := conn.Write(make([]byte, 8<<20)); !isTimeout(err) {
		t.Errorf("wrote %d bytes to nobody: %v", n, err)
	}
	one.echo(t, 2, strings.Repeat("past it ", 1000))
	close(release)
}

func TestCloseUnblocks(t *testing.T) {
	w := newTown(t)
	one, two := w.start(1), w.start(2)
	two.Handle("wait", func(ctx context.Context, _ Peer, conn net.Conn) { <-ctx.Done() })
	for _, dial := range []func(context.Context, int, string) (net.Conn, error){one.Mesh.Dial, one.DialBulk} {
		conn, err := dial(t.Context(), 2, "wait")
		if err != nil {
			t.Fatal(err)
		}
		done := make(chan error, 1)
		go func() {
			_, err := conn.Read(make([]byte, 1))
			done <- err
		}()
		conn.Close()
		if err := <-done; !errors.Is(err, net.ErrClosed) {
			t.Errorf("a read ends with %v when its end closes", err)
		}
	}
}

func TestDialGivesUp(t *testing.T) {
	w := newTown(t)
	one := w.start(1)
	hole, err := net.Listen("tcp", "127.0.0.1:0") // takes connections, says nothing
	if err != nil {
		t.Fatal(err)
	}
	defer hole.Close()
	w.members.change(func(m map[int]Peer) { m[3] = Peer{Node: 3, Addr: hole.Addr().(*net.TCPAddr).AddrPort()} })
	for _, dial := range []func(context.Context, int, string) (net.Conn, error){one.Mesh.Dial, one.DialBulk} {
		ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
		if _, err := dial(ctx, 3, "echo"); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("dial: %v", err)
		}
		cancel()
	}
}
