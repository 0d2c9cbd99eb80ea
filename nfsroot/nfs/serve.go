package nfs

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"runtime/debug"
	"time"

	"golang.org/x/sync/errgroup"
)

// Bounds of what clients can make the server hold.
const (
	serverMemory = 256 << 20 // bytes of requests and replies being worked on
	connMemory   = 32 << 20  // the same for one connection
	connCalls    = 64        // requests of one connection being worked on
)

const sweepInterval = 2 * time.Second

// Serve answers the clients of a listener until the context ends or the
// listener fails. At the context's end it takes no more requests, finishes
// those it has, closes the connections and returns nil. Several listeners may
// be served at once.
func (s *Server) Serve(ctx context.Context, ln net.Listener) error {
	g, ctx := errgroup.WithContext(ctx)
	stop := context.AfterFunc(ctx, func() { ln.Close() })
	defer stop()

	g.Go(func() error {
		tick := time.NewTicker(sweepInterval)
		defer tick.Stop()
		for {
			select {
			case <-ctx.Done():
				return nil
			case now := <-tick.C:
				s.files.sweep(s.conns.sweep(now))
				s.expel()
			}
		}
	})
	g.Go(func() error { return s.accept(ctx, ln, g) })
	return g.Wait()
}

// expel closes the connections of addresses that are no longer admitted.
func (s *Server) expel() {
	if s.allow == nil {
		return
	}
	for peer, n := range s.conns.peers() {
		if s.allow(peer) {
			continue
		}
		s.log.Warn("connections closed: address no longer admitted", "peer", peer, "connections", n)
		s.count.refused.Add(uint64(n))
		s.conns.drop(peer)
	}
}

func (s *Server) accept(ctx context.Context, ln net.Listener, g *errgroup.Group) error {
	for wait := time.Duration(0); ; {
		nc, err := ln.Accept()
		if ctx.Err() != nil {
			if err == nil {
				nc.Close()
			}
			return nil
		}
		if err != nil {
			var ne net.Error
			if errors.Is(err, net.ErrClosed) || wait > time.Second || !errors.As(err, &ne) {
				return fmt.Errorf("nfs: accept on %s: %w", ln.Addr(), err)
			}
			// Out of descriptors, or a connection that died in the queue.
			wait = 2*wait + 10*time.Millisecond
			s.files.evictIdle()
			select {
			case <-ctx.Done():
			case <-time.After(wait):
			}
			continue
		}
		wait = 0
		c := newConn(s, nc)
		if s.allow != nil && !s.allow(c.peer) {
			s.count.refused.Add(1)
			s.log.Warn("connection refused: address not admitted", "peer", c.peer)
			nc.Close()
			continue
		}
		if a, isTCP := nc.RemoteAddr().(*net.TCPAddr); s.lowPorts && isTCP && a.Port >= privilegedPorts {
			s.count.refused.Add(1)
			s.log.Warn("connection refused: it comes from a port that any user of the machine may use", "peer", c.peer, "port", a.Port)
			nc.Close()
			continue
		}
		if s.count.open.Add(1) > s.maxConns {
			s.count.open.Add(-1)
			s.count.refused.Add(1)
			s.log.Warn("connection refused: too many connections", "peer", c.peer, "limit", s.maxConns)
			nc.Close()
			continue
		}
		if !s.conns.add(c) {
			s.count.open.Add(-1)
			s.count.refused.Add(1)
			s.log.Warn("connection refused: too many of this address", "peer", c.peer, "limit", clientConns)
			nc.Close()
			continue
		}
		s.count.accepted.Add(1)
		g.Go(func() error {
			defer s.count.open.Add(-1)
			defer s.conns.remove(c)
			c.serve(ctx)
			return nil
		})
	}
}

// Drop closes the connections of a client that is not welcome any more; whether it
// may connect again is Config.Allow's to say.
func (s *Server) Drop(client netip.Addr) { s.conns.drop(client) }

// privilegedPorts is where the ports begin that programs of any user may use.
const privilegedPorts = 1024

func peerAddr(nc net.Conn) netip.Addr {
	if a, isTCP := nc.RemoteAddr().(*net.TCPAddr); isTCP {
		return a.AddrPort().Addr().Unmap()
	}
	return netip.Addr{}
}

// answer fills in the reply to a call and returns the procedure's counters.
func (s *Server) answer(q *call, peer netip.Addr, h *callHeader, d *decoder, e *buffer) *procCounters {
	none := &s.count.other
	if h.rpcvers != rpcVersion {
		denyReply(e, h.xid, rejectRPCMismatch)
		e.u32(rpcVersion)
		e.u32(rpcVersion)
		return none
	}
	var table []procedure
	var counts []procCounters
	switch h.prog {
	case progNFS:
		table, counts = nfsProcs[:], s.count.nfs[:]
	case progMount:
		table, counts = mountProcs[:], s.count.mount[:]
	default:
		acceptReply(e, h.xid, acceptProgUnavail)
		return none
	}
	if h.vers != 3 {
		acceptReply(e, h.xid, acceptProgMismatch)
		e.u32(3)
		e.u32(3)
		return none
	}
	if h.proc >= uint32(len(table)) || table[h.proc].run == nil {
		acceptReply(e, h.xid, acceptProcUnavail)
		return none
	}
	if h.badCred {
		denyReply(e, h.xid, rejectAuthError)
		e.u32(authBadCred)
		return none
	}
	if h.flavor != flavorSys && h.flavor != flavorNone {
		denyReply(e, h.xid, rejectAuthError)
		e.u32(authTooWeak)
		return none
	}
	p := &table[h.proc]
	pc := &counts[h.proc]
	q.reset(s, h.id)
	if p.once {
		entry, first, redo := s.replays.begin(peer, h, d.b)
		q.redo = redo
		if !first {
			// The same call again, after a broken connection: the same answer,
			// for doing it twice would give another.
			s.count.replayed.Add(1)
			if old := entry.wait(); old != nil {
				e.b = append(e.b, old...)
				return pc
			}
		} else {
			at := len(e.b)
			defer func() { s.replays.end(entry, e.b[at:]) }()
		}
	}
	s.run(p, q, h, d, e)
	if q.failed {
		pc.errors.Add(1)
	}
	return pc
}

// run calls the procedure. Whatever goes wrong in it costs the client this call
// and nobody else anything.
func (s *Server) run(p *procedure, q *call, h *callHeader, d *decoder, e *buffer) {
	at := len(e.b)
	defer func() {
		v := recover()
		q.releaseAll()
		if v != nil {
			s.count.panics.Add(1)
			s.log.LogAttrs(context.Background(), slog.LevelError, "internal error in "+p.name,
				slog.Any("err", v), slog.String("stack", string(debug.Stack())))
			e.b = e.b[:at]
			acceptReply(e, h.xid, acceptSystemErr)
		}
	}()
	acceptReply(e, h.xid, acceptSuccess)
	if !p.run(q, d, e) {
		s.count.garbage.Add(1)
		e.b = e.b[:at]
		acceptReply(e, h.xid, acceptGarbageArgs)
	}
}
