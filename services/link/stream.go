package link

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/yamux"
)

// Answers of the other end.
const (
	answerAccepted  = 'A'
	answerRefused   = 'R'
	answerNoService = 'S'
)

func readAnswer(r io.Reader) error {
	var b [1]byte
	if _, err := io.ReadFull(r, b[:]); err != nil {
		return err
	}
	switch b[0] {
	case answerAccepted:
		return nil
	case answerNoService:
		return ErrNoService
	}
	return ErrRefused
}

func readName(r io.Reader) (string, error) {
	var n [1]byte
	if _, err := io.ReadFull(r, n[:]); err != nil {
		return "", err
	}
	name := make([]byte, n[0])
	_, err := io.ReadFull(r, name)
	return string(name), err
}

// stream is what services read and write. The other end's answer is read
// before the first data, not by Dial: a request and its response take one round
// trip in all.
type stream struct {
	net.Conn
	link    *peerLink
	frames  *frames // of the shared connection; nil for a bulk stream
	service string

	answered  atomic.Bool
	answerMu  sync.Mutex
	answerErr error // guarded by answerMu
	closed    atomic.Bool
}

func (p *peerLink) stream(conn net.Conn, f *frames) *stream {
	return &stream{Conn: conn, link: p, frames: f}
}

// ask names the service.
func (s *stream) ask(service string) error {
	if service == "" || len(service) > 255 {
		return fmt.Errorf("service name %q: want 1 to 255 bytes", service)
	}
	s.service = service
	if _, err := s.Conn.Write(append([]byte{byte(len(service))}, service...)); err != nil {
		return s.why(err)
	}
	return nil
}

func (s *stream) awaitAnswer() error {
	s.answerMu.Lock()
	defer s.answerMu.Unlock()
	if s.answered.Load() || s.answerErr != nil {
		return s.answerErr
	}
	err := readAnswer(s.Conn)
	switch {
	case err == nil:
		s.answered.Store(true)
	case s.closed.Load():
		return net.ErrClosed
	case isTimeout(err):
		return err // the reader's own deadline: it may try again
	case errors.Is(err, ErrNoService):
		s.answerErr = fmt.Errorf("node %d, service %q: %w", s.link.peer.Node, s.service, err)
	case err == io.EOF:
		s.answerErr = fmt.Errorf("link to node %d: %w", s.link.peer.Node, ErrBroken)
	default:
		s.answerErr = s.why(err)
	}
	return s.answerErr
}

func isTimeout(err error) bool {
	t, ok := err.(net.Error)
	return ok && t.Timeout()
}

func (s *stream) Read(b []byte) (int, error) {
	if !s.answered.Load() {
		if err := s.awaitAnswer(); err != nil {
			return 0, err
		}
	}
	n, err := s.Conn.Read(b)
	if err != nil {
		err = s.why(err)
	}
	return n, err
}

// why turns an error of the connection into what happened. An end of the stream
// is one only if the other end said so: yamux calls it that also when the
// connection breaks.
func (s *stream) why(err error) error {
	mux, isMux := s.Conn.(*yamux.Stream)
	switch {
	case s.closed.Load():
		return net.ErrClosed
	case s.link.ctx.Err() != nil:
		return context.Cause(s.link.ctx)
	case isMux && err == io.EOF && !s.frames.finished(mux.StreamID()),
		errors.Is(err, yamux.ErrSessionShutdown), errors.Is(err, yamux.ErrStreamClosed), errors.Is(err, yamux.ErrConnectionReset):
		return fmt.Errorf("link to node %d: %w", s.link.peer.Node, ErrBroken)
	}
	return err
}

func (s *stream) Write(b []byte) (int, error) {
	n, err := s.Conn.Write(b)
	if err != nil {
		err = s.why(err)
	}
	return n, err
}

// CloseWrite ends this direction of a bulk stream: the other end reads EOF.
func (s *stream) CloseWrite() error {
	c, ok := s.Conn.(interface{ CloseWrite() error })
	if !ok {
		return fmt.Errorf("link to node %d: a shared stream has no half close; use DialBulk", s.link.peer.Node)
	}
	return s.link.explain(c.CloseWrite())
}

// Close ends both directions.
func (s *stream) Close() error {
	if s.closed.Swap(true) {
		return nil
	}
	mux, ok := s.Conn.(*yamux.Stream)
	if !ok {
		s.link.drop(s.Conn)
		return nil
	}
	err := mux.Close()
	s.frames.closed(mux.StreamID())
	_ = s.Conn.SetReadDeadline(time.Unix(1, 0)) // yamux lets reads go on
	return err
}

// muxConfig has no time limits of its own but one on a peer that takes nothing
// at all: life and death are the membership's and the kernel's.
func muxConfig(log *slog.Logger, node int) *yamux.Config {
	c := yamux.DefaultConfig()
	c.EnableKeepAlive = false
	c.StreamOpenTimeout = 0
	c.ConnectionWriteTimeout = 5 * time.Minute
	c.MaxStreamWindowSize = 1 << 20
	c.LogOutput = nil
	c.Logger = muxLog{log, node}
	return c
}

// muxLog takes what yamux has to say; errors come back to us as well.
type muxLog struct {
	log  *slog.Logger
	node int
}

func (l muxLog) Print(v ...any)            { l.log.Debug(fmt.Sprint(v...), "node", l.node) }
func (l muxLog) Printf(f string, v ...any) { l.log.Debug(fmt.Sprintf(f, v...), "node", l.node) }
func (l muxLog) Println(v ...any)          { l.log.Debug(fmt.Sprint(v...), "node", l.node) }
