package link

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net"
	"sync"
	"time"

	"github.com/hashicorp/yamux"
	"golang.org/x/sync/singleflight"

	"krgimage/services/identity"
)

// peerLink is all that connects this node with one boot of a peer.
type peerLink struct {
	mesh *Mesh
	peer Peer
	ctx  context.Context // ends with the link
	stop context.CancelCauseFunc
	once singleflight.Group // of dialing the shared connection

	mu       sync.Mutex
	sessions []shared              // guarded by mu; usually one, two when both ends dialed at once
	conns    map[net.Conn]struct{} // guarded by mu; every TLS connection, to be closed at the end
}

// shared is a connection with many streams.
type shared struct {
	*yamux.Session
	frames *frames
}

func newPeerLink(m *Mesh, peer Peer) *peerLink {
	p := &peerLink{mesh: m, peer: peer, conns: map[net.Conn]struct{}{}}
	p.ctx, p.stop = context.WithCancelCause(context.Background())
	return p
}

// end closes everything with the peer; later errors are cause.
func (p *peerLink) end(cause error) {
	p.stop(cause)
	p.mu.Lock()
	defer p.mu.Unlock()
	for c := range p.conns {
		// Not the TLS connection's Close, which would want to say goodbye to a
		// peer that may be gone.
		c.(*tls.Conn).NetConn().Close()
	}
	clear(p.conns)
}

// explain turns an error of a connection into that of the link, if it ended.
func (p *peerLink) explain(err error) error {
	if err == nil || p.ctx.Err() == nil {
		return err
	}
	return context.Cause(p.ctx)
}

// keep notes a connection, so that it ends with the link.
func (p *peerLink) keep(c net.Conn) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.ctx.Err() != nil {
		return context.Cause(p.ctx)
	}
	p.conns[c] = struct{}{}
	return nil
}

func (p *peerLink) drop(c net.Conn) {
	c.Close()
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.conns, c)
}

// open opens a stream over the shared connection, which it makes if need be.
func (p *peerLink) open(ctx context.Context) (*stream, error) {
	for {
		if s, ok := p.session(); ok {
			conn, err := s.OpenStream()
			if err == nil {
				return p.stream(conn, s.frames), nil
			}
			// The other end may just have closed an idle connection.
			p.forget(s)
			continue
		}
		ch := p.once.DoChan("", func() (any, error) { return nil, p.dialShared() })
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("link to node %d: %w", p.peer.Node, ctx.Err())
		case r := <-ch:
			if r.Err != nil {
				return nil, r.Err
			}
		}
	}
}

// session returns a living shared connection, if there is one.
func (p *peerLink) session() (shared, bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, s := range p.sessions {
		if !s.IsClosed() {
			return s, true
		}
	}
	return shared{}, false
}

func (p *peerLink) forget(s shared) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for i := range p.sessions {
		if p.sessions[i] == s {
			p.sessions = append(p.sessions[:i:i], p.sessions[i+1:]...)
			return
		}
	}
}

// dialShared makes the shared connection. It isn't bound to the context of the
// one who happened to want it first.
func (p *peerLink) dialShared() error {
	conn, err := p.connect(p.ctx, protoMux)
	if err != nil {
		return err
	}
	f := newFrames(conn)
	session, err := yamux.Client(f, muxConfig(p.mesh.log, p.peer.Node))
	if err != nil {
		p.drop(conn)
		return err
	}
	return p.adopt(conn, shared{session, f}, true)
}

// adopt serves a shared connection until it ends.
func (p *peerLink) adopt(conn net.Conn, session shared, dialed bool) error {
	p.mu.Lock()
	p.sessions = append(p.sessions, session)
	p.mu.Unlock()
	ok := p.mesh.spawn(func() {
		defer p.drop(conn)
		defer p.forget(session)
		defer session.Close()
		for {
			s, err := session.AcceptStream()
			if err != nil {
				return
			}
			if !p.mesh.spawn(func() { p.mesh.serveStream(p.stream(s, session.frames)) }) {
				s.Close()
				return
			}
		}
	})
	if dialed && ok {
		ok = p.mesh.spawn(func() { p.closeIdle(session) })
	}
	if !ok {
		session.Close()
		p.drop(conn)
		return ErrClosed
	}
	return nil
}

// closeIdle closes a connection that this end dialed when it has had no stream
// for a while. A stream that the other end opens in that moment fails there
// before anything of it was seen here, so it dials again.
func (p *peerLink) closeIdle(session shared) {
	tick := time.NewTicker(p.mesh.c.Idle / 2)
	defer tick.Stop()
	unused := 0
	for {
		select {
		case <-session.CloseChan():
			return
		case <-tick.C:
		}
		if session.NumStreams() > 0 {
			unused = 0
			continue
		}
		if unused++; unused < 2 {
			continue
		}
		p.forget(session)    // nobody here opens another stream
		_ = session.GoAway() // nor there
		if session.NumStreams() == 0 {
			session.Close()
			return
		}
	}
}

// openBulk makes a connection of its own.
func (p *peerLink) openBulk(ctx context.Context) (*stream, error) {
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	defer context.AfterFunc(p.ctx, stop)()
	conn, err := p.connect(ctx, protoBulk)
	if err != nil {
		return nil, err
	}
	return p.stream(conn, nil), nil
}

// connect makes a connection to the peer, and sees to it that it is the peer.
func (p *peerLink) connect(ctx context.Context, proto string) (net.Conn, error) {
	ctx, stop := context.WithTimeout(ctx, handshakeLimit)
	defer stop()
	fail := func(err error) (net.Conn, error) {
		return nil, fmt.Errorf("link to node %d at %s: %w", p.peer.Node, p.peer.Addr, err)
	}
	raw, err := p.mesh.c.Dial(ctx, p.peer.Addr)
	if err != nil {
		return fail(err)
	}
	config := identity.ClientTLS(p.mesh.c.Identity, p.peer.Node, p.verify)
	config.NextProtos = []string{proto}
	conn := tls.Client(torn{raw}, config)
	if err := p.keep(conn); err != nil {
		raw.Close()
		return fail(err)
	}
	interrupt := context.AfterFunc(ctx, func() { _ = raw.SetDeadline(time.Now()) })
	if err = conn.HandshakeContext(ctx); err == nil {
		err = readAnswer(conn)
	}
	if !interrupt() {
		err = context.Cause(ctx)
	}
	if err != nil {
		p.drop(conn)
		return fail(err)
	}
	return conn, nil
}

// verify compares the other end's certificate with the membership.
func (p *peerLink) verify(_ identity.ID, cert *x509.Certificate) error {
	if identity.Fingerprint(cert) != p.peer.Fingerprint {
		return fmt.Errorf("it has the key of another boot: %w", ErrPeerGone)
	}
	return nil
}
