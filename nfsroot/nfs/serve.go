package nfs

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
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sync/semaphore"
)

// Bounds of what clients can make the server hold.
const (
	serverMemory = 256 << 20 // bytes of requests and replies being worked on
	connMemory   = 32 << 20  // the same for one connection
	connCalls    = 64        // requests of one connection being worked on
)

// Times after which a connection is given up. Clients reconnect and repeat.
const (
	idleTimeout   = 30 * time.Minute // no request
	recordTimeout = time.Minute      // the rest of a begun record
	writeTimeout  = time.Minute      // a reply the client does not take
	sweepInterval = 2 * time.Second
)

// conn is one client connection.
type conn struct {
	srv  *Server
	nc   net.Conn
	peer netip.Addr

	memory *semaphore.Weighted
	calls  chan struct{}  // one token a request being worked on
	work   sync.WaitGroup // requests being worked on

	write sync.Mutex // held while a reply is written
}

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
				s.files.sweep(now)
			}
		}
	})
	g.Go(func() error { return s.accept(ctx, ln, g) })
	return g.Wait()
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
		c := &conn{srv: s, nc: nc, peer: peerAddr(nc), memory: semaphore.NewWeighted(connMemory), calls: make(chan struct{}, connCalls)}
		if s.allow != nil && !s.allow(c.peer) {
			s.count.refused.Add(1)
			s.log.Warn("connection refused: address not admitted", "peer", c.peer)
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
		s.count.accepted.Add(1)
		g.Go(func() error {
			defer s.count.open.Add(-1)
			c.serve(ctx)
			return nil
		})
	}
}

func peerAddr(nc net.Conn) netip.Addr {
	if a, isTCP := nc.RemoteAddr().(*net.TCPAddr); isTCP {
		return a.AddrPort().Addr().Unmap()
	}
	return netip.Addr{}
}

// serve reads requests and has each worked on in a goroutine of its own, as
// many as the bounds allow; replies go out as they are ready (RFC 5531: the xid
// tells which is which).
func (c *conn) serve(ctx context.Context) {
	defer c.nc.Close()
	// Requests that were read are finished whatever happens to the context: a
	// client that got no answer would repeat them, to another server process.
	defer c.work.Wait()
	stop := context.AfterFunc(ctx, func() { c.nc.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()

	r := bufio.NewReaderSize(c.nc, 64<<10)
	started := func() {
		c.nc.SetReadDeadline(time.Now().Add(recordTimeout))
		if ctx.Err() != nil {
			c.nc.SetReadDeadline(time.Unix(1, 0))
		}
	}
	for {
		c.nc.SetReadDeadline(time.Now().Add(idleTimeout))
		if ctx.Err() != nil {
			return
		}
		rec, err := readRecord(r, started)
		if err != nil {
			c.readFailed(ctx, err)
			return
		}
		d := &decoder{b: rec.b}
		h, err := parseCall(d)
		if err != nil {
			rec.free()
			c.readFailed(ctx, err)
			return
		}
		cost := int64(len(rec.b)) + replyCost(h, d)
		c.calls <- struct{}{}
		// Both always succeed in the end: requests at work give theirs back.
		c.memory.Acquire(context.Background(), cost)
		c.srv.memory.Acquire(context.Background(), cost)
		work := func() {
			c.handle(h, d)
			rec.free()
			c.srv.memory.Release(cost)
			c.memory.Release(cost)
			<-c.calls
		}
		if quick(h) && r.Buffered() == 0 {
			work() // nothing waits behind it: waking another goroutine would take longer
		} else {
			c.work.Go(work)
		}
	}
}

// quick says whether a call reads attributes or names only.
func quick(h callHeader) bool {
	return h.prog == progNFS && h.proc < uint32(len(nfsProcs)) && nfsProcs[h.proc].quick
}

// readFailed closes the books on a connection that can't be read any more.
func (c *conn) readFailed(ctx context.Context, err error) {
	switch {
	case ctx.Err() != nil, errors.Is(err, io.EOF):
	case errors.Is(err, errRecord):
		c.srv.count.badRecords.Add(1)
		c.srv.log.Warn("connection closed: client sent nonsense", "peer", c.peer, "err", err)
	default:
		c.srv.log.Debug("connection lost", "peer", c.peer, "err", err)
	}
}

// replyCost is the memory a request's reply may take.
func replyCost(h callHeader, d *decoder) int64 {
	if h.prog == progNFS && (h.proc == procRead || h.proc == procReadDir || h.proc == procReadDirPlus) {
		return maxRecord
	}
	return smallBuffer
}

// handle works on one request and writes its reply.
func (c *conn) handle(h callHeader, d *decoder) {
	begin := time.Now()
	e := newBuffer(0)
	defer e.free()
	in := len(d.b)
	p := c.srv.answer(c.peer, h, d, e)
	finish(e)

	c.write.Lock()
	c.nc.SetWriteDeadline(time.Now().Add(writeTimeout))
	_, err := c.nc.Write(e.b)
	c.write.Unlock()
	if err != nil {
		c.nc.Close() // ends the reader; the client comes back and repeats
	}
	p.done(begin, in, len(e.b))
}

// answer fills in the reply to a call and returns the procedure's counters.
func (s *Server) answer(peer netip.Addr, h callHeader, d *decoder, e *buffer) *procCounters {
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
	q := &call{srv: s, id: h.id}
	if p.once {
		entry, first := s.replays.begin(peer, h, d.b)
		if !first {
			// The same call again, after a broken connection: the same answer,
			// for doing it twice would give another.
			s.count.replayed.Add(1)
			if old := entry.wait(); old != nil {
				e.b = append(e.b[:0], old...)
				return pc
			}
		} else {
			defer func() { s.replays.end(entry, e.b) }()
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
func (s *Server) run(p *procedure, q *call, h callHeader, d *decoder, e *buffer) {
	defer q.releaseAll()
	defer func() {
		if v := recover(); v != nil {
			s.count.panics.Add(1)
			s.log.LogAttrs(context.Background(), slog.LevelError, "internal error in "+p.name,
				slog.Any("err", v), slog.String("stack", string(debug.Stack())))
			acceptReply(e, h.xid, acceptSystemErr)
		}
	}()
	acceptReply(e, h.xid, acceptSuccess)
	if !p.run(q, d, e) {
		s.count.garbage.Add(1)
		acceptReply(e, h.xid, acceptGarbageArgs)
	}
}
