// Package link carries the data between nodes: everything that the services of
// one node have to say to those of another, without going through the head.
//
// A Mesh is a node's end of all its links. A service names itself with Handle
// and reaches its like on another node with Dial, which gives a small stream
// over the one connection that the two nodes share, or with DialBulk, which
// gives a connection of its own for much data (memory images, files).
// Connections are opened when somebody needs them and closed when nobody has
// used them for a while.
//
// Every connection is TLS with the identities that the head gave out, and both
// ends hold the other against the membership: it must be the node it says, in
// the boot that the cluster knows. When a peer dies or boots again all streams
// with it end at once with ErrPeerGone; there is no time-out of our own on a
// living peer, since a node that is short of CPU time is slow and not dead. A
// connection that breaks under a living peer ends its streams with ErrBroken,
// never with io.EOF.
//
//	TCP connection, TLS 1.3, ALPN krg-link or krg-bulk
//	  listener → dialer   1 byte: accepted, or why not
//	  krg-link: yamux streams; krg-bulk: the connection is the stream
//	    opener → other end  1 byte length, name of the service
//	    other end → opener  1 byte: accepted, or why not, before its first data
package link

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"time"

	"krgimage/services/identity"
)

// Peer is another node, as the membership has it.
type Peer struct {
	Node        int
	Epoch       uint64         // grows each time the node joins
	Fingerprint string         // of its key (identity.Fingerprint): a new boot has a new one
	Addr        netip.AddrPort // where its Mesh listens
}

// Members is the membership. Only peers in it are linked to.
type Members interface {
	// Snapshot returns the peers by node id.
	Snapshot() map[int]Peer
	// Watch yields the current peers and then each later state; states that
	// follow each other closely may be left out.
	Watch(ctx context.Context) iter.Seq[map[int]Peer]
}

// Errors of Dial, and of reads and writes on its connections.
var (
	ErrNotMember = errors.New("not a node of the cluster")
	ErrPeerGone  = errors.New("the node left the cluster, died, or booted again")
	ErrNoService = errors.New("the node does not have this service")
	ErrClosed    = errors.New("the links of this node are closed")
	ErrRefused   = errors.New("the node refused the link")
	ErrBroken    = errors.New("the connection broke") // the peer may live: dial again
)

// Handler serves one stream from a peer. The stream is closed when it returns;
// ctx ends when the peer is gone or the Mesh stops.
type Handler func(ctx context.Context, from Peer, conn net.Conn)

// Config is what a Mesh needs. Zero values of the last group have defaults.
type Config struct {
	Self     int // node id
	Identity identity.Credentials
	Members  Members
	Log      *slog.Logger

	Dial func(ctx context.Context, addr netip.AddrPort) (net.Conn, error) // default: TCP
	Idle time.Duration                                                    // an unused connection is closed after it; default 5 min
}

const (
	protoMux  = "krg-link/1"
	protoBulk = "krg-bulk/1"

	defaultIdle = 5 * time.Minute

	// handshakeLimit bounds what a stranger can hold up; on a node whose CPUs
	// are all busy a handshake takes seconds.
	handshakeLimit = 30 * time.Second

	// membershipLag is how long a listener waits for the news of a peer that it
	// doesn't know yet: the peer may have heard of its own joining first.
	membershipLag = 2 * time.Second

	// maxStrangers is how many connections may be in their handshake at a time.
	maxStrangers = 128
)

// Mesh is a node's end of all links. Make it with New, run it with Serve.
type Mesh struct {
	c   Config
	log *slog.Logger

	mu       sync.Mutex
	handlers map[string]Handler // guarded by mu
	links    map[int]*peerLink  // guarded by mu; by node id
	closed   bool               // guarded by mu
	work     sync.WaitGroup     // all goroutines; Add under mu while !closed
}

// New returns a Mesh that can dial, once Serve runs.
func New(c Config) *Mesh {
	if c.Dial == nil {
		d := net.Dialer{KeepAliveConfig: keepAlive}
		c.Dial = func(ctx context.Context, addr netip.AddrPort) (net.Conn, error) {
			return d.DialContext(ctx, "tcp", addr.String())
		}
	}
	if c.Idle == 0 {
		c.Idle = defaultIdle
	}
	return &Mesh{c: c, log: c.Log.With("component", "link"), handlers: map[string]Handler{}, links: map[int]*peerLink{}}
}

// keepAlive lets the kernels find a cut cable. A peer that is only short of CPU
// time still answers: its kernel does.
var keepAlive = net.KeepAliveConfig{Enable: true, Idle: 5 * time.Second, Interval: 2 * time.Second, Count: 5}

// Handle makes h serve the streams of a service. Names have up to 255 bytes.
// It is a programming error to name a service twice.
func (m *Mesh) Handle(service string, h Handler) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if _, twice := m.handlers[service]; twice || service == "" || len(service) > 255 {
		panic(fmt.Sprintf("link: bad or repeated service name %q", service))
	}
	m.handlers[service] = h
}

// Serve accepts links on l and follows the membership until ctx ends; then it
// closes all links and waits for the handlers.
func (m *Mesh) Serve(ctx context.Context, l net.Listener) error {
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	context.AfterFunc(ctx, func() { l.Close() })
	m.spawn(func() {
		for range m.c.Members.Watch(ctx) {
			m.follow()
		}
	})
	err := m.accept(ctx, l)
	stop()
	m.mu.Lock()
	m.closed = true
	for node, p := range m.links {
		p.end(ErrClosed)
		delete(m.links, node)
	}
	m.mu.Unlock()
	m.work.Wait()
	return err
}

// spawn runs f as part of the Mesh; it reports false when that is closed.
func (m *Mesh) spawn(f func()) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed {
		return false
	}
	m.work.Go(f)
	return true
}

// follow ends the links with peers that are gone or others than before.
func (m *Mesh) follow() {
	m.mu.Lock()
	defer m.mu.Unlock()
	// Both here and in link the snapshot is read under the lock, so that no
	// link of a newer state is held against an older one.
	peers := m.c.Members.Snapshot()
	for node, p := range m.links {
		if now, ok := peers[node]; !ok || !same(now, p.peer) {
			p.end(fmt.Errorf("node %d: %w", node, ErrPeerGone))
			delete(m.links, node)
			m.log.Info("links with a node ended: it left, died, or booted again", "node", node)
		}
	}
}

// same reports whether two records are of the same node in the same boot.
func same(a, b Peer) bool { return a.Epoch == b.Epoch && a.Fingerprint == b.Fingerprint }

// link returns the peer's link, which may have no connection yet.
func (m *Mesh) link(node int) (*peerLink, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed {
		return nil, ErrClosed
	}
	peer, ok := m.c.Members.Snapshot()[node]
	if !ok || node == m.c.Self {
		return nil, fmt.Errorf("node %d: %w", node, ErrNotMember)
	}
	p := m.links[node]
	if p != nil && !same(p.peer, peer) {
		p.end(fmt.Errorf("node %d: %w", node, ErrPeerGone))
		p = nil
	}
	if p == nil {
		p = newPeerLink(m, peer)
		m.links[node] = p
	}
	return p, nil
}

// Dial opens a stream to a service of a node. Closing it closes both
// directions.
func (m *Mesh) Dial(ctx context.Context, node int, service string) (net.Conn, error) {
	return m.dial(ctx, node, service, (*peerLink).open)
}

// DialBulk is Dial over a connection of its own, for much data. The stream has
// a CloseWrite method.
func (m *Mesh) DialBulk(ctx context.Context, node int, service string) (net.Conn, error) {
	return m.dial(ctx, node, service, (*peerLink).openBulk)
}

func (m *Mesh) dial(ctx context.Context, node int, service string, open func(*peerLink, context.Context) (*stream, error)) (net.Conn, error) {
	p, err := m.link(node)
	if err != nil {
		return nil, err
	}
	s, err := open(p, ctx)
	if err != nil {
		return nil, p.explain(err)
	}
	if err := s.ask(service); err != nil {
		s.Close()
		return nil, err
	}
	return s, nil
}
