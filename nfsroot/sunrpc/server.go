package sunrpc

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"runtime/debug"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

// Bounds of what a client can make a server hold.
const (
	maxConns     = 1024
	idleTimeout  = 10 * time.Minute // no call
	writeTimeout = 30 * time.Second // a reply the client does not take
)

// privilegedPorts are those that only root may use as a source.
const privilegedPorts = 1024

// Server answers calls. Fill it in before the first Serve, which may be called
// for several sockets at once.
type Server struct {
	Programs []Program
	// Allow decides whose calls are answered; nil: everyone's. It is not asked
	// about unix sockets.
	Allow func(netip.Addr) bool
	Log   *slog.Logger // nil: silent

	conns, malformed, refused atomic.Int64
}

// Malformed is the number of messages that were no calls.
func (s *Server) Malformed() int64 { return s.malformed.Load() }

// Refused is the number of connections and datagrams that Allow, or the bound
// of connections, turned away.
func (s *Server) Refused() int64 { return s.refused.Load() }

func (s *Server) log() *slog.Logger {
	if s.Log == nil {
		return slog.New(slog.DiscardHandler)
	}
	return s.Log
}

func (s *Server) allowed(a netip.AddrPort) bool {
	if !a.IsValid() || s.Allow == nil || s.Allow(a.Addr()) {
		return true
	}
	s.refused.Add(1)
	return false
}

func (s *Server) panicked(v any) {
	s.log().Error("internal error in an RPC procedure", "err", v, "stack", string(debug.Stack()))
}

// Serve answers the clients of a stream listener until ctx ends, which closes
// the listener and all connections; then it returns nil.
func (s *Server) Serve(ctx context.Context, ln net.Listener) error {
	group, ctx := errgroup.WithContext(ctx)
	defer context.AfterFunc(ctx, func() { ln.Close() })()
	group.Go(func() error {
		for {
			nc, err := ln.Accept()
			if ctx.Err() != nil {
				if err == nil {
					nc.Close()
				}
				return nil
			}
			if errors.Is(err, net.ErrClosed) {
				return fmt.Errorf("accept on %s: %w", ln.Addr(), err)
			}
			if err != nil { // out of descriptors, or a connection that died in the queue
				s.log().Warn("a connection was not accepted", "err", err)
				select {
				case <-ctx.Done():
				case <-time.After(100 * time.Millisecond):
				}
				continue
			}
			if !s.allowed(addrPort(nc.RemoteAddr())) {
				nc.Close()
				continue
			}
			if s.conns.Add(1) > maxConns {
				s.conns.Add(-1)
				s.refused.Add(1)
				nc.Close()
				continue
			}
			group.Go(func() error {
				defer s.conns.Add(-1)
				s.serveConn(ctx, nc)
				return nil
			})
		}
	})
	return group.Wait()
}

func (s *Server) serveConn(ctx context.Context, nc net.Conn) {
	defer nc.Close()
	defer context.AfterFunc(ctx, func() { nc.Close() })()
	peer, local := addrPort(nc.RemoteAddr()), addrPort(nc.LocalAddr())
	privileged := peer.IsValid() && peer.Port() < privilegedPorts || fromRoot(nc)
	r := bufio.NewReader(nc)
	for {
		_ = nc.SetReadDeadline(time.Now().Add(idleTimeout))
		message, err := readMessage(r)
		if err != nil {
			if !errors.Is(err, io.EOF) && ctx.Err() == nil {
				if errors.Is(err, ErrMessage) {
					s.malformed.Add(1)
				}
				s.log().Debug("connection lost", "peer", peer, "err", err)
			}
			return
		}
		reply := answer(s.Programs, message, &Call{Peer: peer, Local: local.Addr(), Privileged: privileged}, s.panicked)
		if reply == nil {
			s.malformed.Add(1)
			s.log().Warn("connection closed: client sent nonsense", "peer", peer)
			return
		}
		_ = nc.SetWriteDeadline(time.Now().Add(writeTimeout))
		if writeMessage(nc, reply) != nil {
			return
		}
	}
}

// fromRoot says whether root is at the other end of a unix socket.
func fromRoot(nc net.Conn) bool {
	uc, ok := nc.(*net.UnixConn)
	if !ok {
		return false
	}
	raw, err := uc.SyscallConn()
	if err != nil {
		return false
	}
	root := false
	err = raw.Control(func(fd uintptr) {
		cred, err := unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
		root = err == nil && cred.Uid == 0
	})
	return err == nil && root
}

// ServePacket answers datagrams until ctx ends, which closes the socket; then
// it returns nil.
func (s *Server) ServePacket(ctx context.Context, pc net.PacketConn) error {
	defer context.AfterFunc(ctx, func() { pc.Close() })()
	buf := make([]byte, maxMessage)
	for {
		n, from, err := pc.ReadFrom(buf)
		if ctx.Err() != nil {
			return nil
		}
		if errors.Is(err, net.ErrClosed) {
			return fmt.Errorf("receive on %s: %w", pc.LocalAddr(), err)
		}
		if err != nil {
			// An ICMP error about an earlier answer.
			continue
		}
		peer := addrPort(from)
		if !s.allowed(peer) {
			continue
		}
		call := &Call{Peer: peer, Privileged: peer.Port() < privilegedPorts}
		if a := addrPort(pc.LocalAddr()).Addr(); a.IsValid() && !a.IsUnspecified() {
			call.Local = a
		}
		reply := answer(s.Programs, buf[:n], call, s.panicked)
		if reply == nil {
			s.malformed.Add(1)
			continue
		}
		_ = pc.SetWriteDeadline(time.Now().Add(writeTimeout))
		_, _ = pc.WriteTo(reply, from) // a lost answer is asked for again
	}
}
