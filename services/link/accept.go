package link

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"time"

	"github.com/hashicorp/yamux"

	"krgimage/services/identity"
)

// accept takes connections until ctx ends.
func (m *Mesh) accept(ctx context.Context, l net.Listener) error {
	strangers := make(chan struct{}, maxStrangers)
	for {
		select {
		case strangers <- struct{}{}:
		case <-ctx.Done():
			return nil
		}
		raw, err := l.Accept()
		if ctx.Err() != nil {
			if err == nil {
				raw.Close()
			}
			return nil
		}
		if err != nil {
			if errors.Is(err, net.ErrClosed) {
				return fmt.Errorf("link: %w", err)
			}
			// Out of file descriptors, for one: others may give some back.
			m.log.Warn("a link can't be taken", "err", err)
			<-strangers
			select {
			case <-ctx.Done():
			case <-time.After(100 * time.Millisecond):
			}
			continue
		}
		m.spawn(func() {
			p, conn, err := m.welcome(ctx, raw)
			<-strangers
			if err != nil {
				m.log.Warn("link refused", "from", raw.RemoteAddr().String(), "err", err)
				raw.Close()
				return
			}
			m.serveConn(p, conn)
		})
	}
}

// welcome does the handshake and finds out who is there.
func (m *Mesh) welcome(ctx context.Context, raw net.Conn) (*peerLink, *tls.Conn, error) {
	if tcp, ok := raw.(*net.TCPConn); ok {
		_ = tcp.SetKeepAliveConfig(keepAlive)
	}
	ctx, stop := context.WithTimeout(ctx, handshakeLimit)
	defer stop()
	interrupt := context.AfterFunc(ctx, func() { _ = raw.SetDeadline(time.Now()) })
	defer interrupt()
	// Membership is looked at after the handshake, since it may take a moment.
	config := identity.ServerTLS(m.c.Identity, identity.Anyone)
	config.NextProtos = []string{protoMux, protoBulk}
	conn := tls.Server(torn{raw}, config)
	id, err := identity.Handshake(ctx, conn, handshakeLimit)
	if err != nil {
		return nil, nil, err
	}
	if conn.ConnectionState().NegotiatedProtocol == "" {
		return nil, nil, fmt.Errorf("it speaks another protocol: %w", ErrRefused)
	}
	p, err := m.admitted(ctx, id.Node, identity.Fingerprint(conn.ConnectionState().PeerCertificates[0]))
	if err != nil {
		_, _ = conn.Write([]byte{answerRefused})
		return nil, nil, err
	}
	if err := p.keep(conn); err != nil {
		return nil, nil, err
	}
	_, err = conn.Write([]byte{answerAccepted})
	if !interrupt() {
		err = context.Cause(ctx)
	}
	if err != nil {
		p.drop(conn)
		return nil, nil, err
	}
	return p, conn, nil
}

// admitted finds the link of a peer with this key; it waits a moment for the
// membership to learn of it.
func (m *Mesh) admitted(ctx context.Context, node int, fingerprint string) (*peerLink, error) {
	ctx, stop := context.WithTimeout(ctx, membershipLag)
	defer stop()
	for range m.c.Members.Watch(ctx) {
		p, err := m.link(node)
		if errors.Is(err, ErrClosed) {
			return nil, err
		}
		if err == nil && p.peer.Fingerprint == fingerprint {
			return p, nil
		}
	}
	return nil, fmt.Errorf("node %d with this key: %w", node, ErrNotMember)
}

// serveConn serves an accepted connection.
func (m *Mesh) serveConn(p *peerLink, conn *tls.Conn) {
	if conn.ConnectionState().NegotiatedProtocol == protoBulk {
		m.serveStream(p.stream(conn, nil))
		return
	}
	f := newFrames(conn)
	session, err := yamux.Server(f, muxConfig(m.log, p.peer.Node))
	if err != nil {
		p.drop(conn)
		return
	}
	_ = p.adopt(conn, shared{session, f}, false)
}

// serveStream finds the service that a stream is for and lets it serve.
func (m *Mesh) serveStream(s *stream) {
	defer s.Close()
	_ = s.Conn.SetDeadline(time.Now().Add(handshakeLimit))
	var err error
	if s.service, err = readName(s.Conn); err != nil {
		return
	}
	m.mu.Lock()
	handle, ok := m.handlers[s.service]
	m.mu.Unlock()
	if !ok {
		m.log.Warn("a node asks for an unknown service", "node", s.link.peer.Node, "service", s.service)
		_, _ = s.Conn.Write([]byte{answerNoService})
		return
	}
	if _, err := s.Conn.Write([]byte{answerAccepted}); err != nil {
		return
	}
	_ = s.Conn.SetDeadline(time.Time{})
	s.answered.Store(true)
	handle(s.link.ctx, s.link.peer, s)
}
