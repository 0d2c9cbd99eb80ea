package nfs

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/semaphore"
)

// Times after which a connection is given up. Clients reconnect and repeat.
const (
	idleTimeout   = 30 * time.Minute // no request
	recordTimeout = time.Minute      // the rest of a begun record
	writeTimeout  = time.Minute      // a reply the client does not take
)

// replyBatch is how many bytes of replies wait at most for one write.
const replyBatch = 64 << 10

// conn is one client connection. Requests that came together are answered
// together: system calls cost more than most requests. Its reader answers the
// quick ones itself; the others get goroutines of their own. Replies go out as
// they are ready (RFC 5531: the xid tells which is which): whoever has one while
// nobody writes becomes the writer, and writes what the others bring meanwhile.
type conn struct {
	srv  *Server
	nc   net.Conn
	peer netip.Addr
	r    *bufio.Reader

	memory *semaphore.Weighted
	calls  chan struct{}  // one token a request in a goroutine of its own
	work   sync.WaitGroup // those requests

	cred  credMemory // of the reader
	quick call       // the reader's
	mine  *buffer    // replies of the reader that are not handed over yet

	mu      sync.Mutex
	writing bool    // someone is the writer; guarded by mu
	queue   []reply // for the writer, in order; guarded by mu

	// When waiting for a record, reading one or writing began, by the clock of
	// connSet. 0 means that it is not going on.
	waiting, reading, sending atomic.Int64
}

// reply is a row of whole records.
type reply struct {
	buf  *buffer
	cost int64 // memory to give back, with a token, when it is written; 0 for quick ones
}

func newConn(s *Server, nc net.Conn) *conn {
	return &conn{srv: s, nc: nc, peer: peerAddr(nc), r: bufio.NewReaderSize(nc, 64<<10),
		memory: semaphore.NewWeighted(connMemory), calls: make(chan struct{}, connCalls)}
}

// serve answers requests until the client goes or the context ends.
func (c *conn) serve(ctx context.Context) {
	defer c.nc.Close()
	// Requests that were read are finished whatever happens to the context: a
	// client that got no answer would repeat them, to another server process.
	defer c.work.Wait()
	stop := context.AfterFunc(ctx, func() { c.nc.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	defer c.flush()
	for ctx.Err() == nil {
		if err := c.next(); err != nil {
			c.readFailed(ctx, err)
			return
		}
	}
}

// next reads a record and sees to its answer.
func (c *conn) next() error {
	rec, whole := c.buffered()
	if !whole {
		// Nothing more to be had without waiting: now the client gets its answers.
		c.flush()
		c.waiting.Store(c.srv.conns.now())
		_, err := c.r.Peek(4)
		c.waiting.Store(0)
		if err != nil {
			if c.r.Buffered() > 0 {
				err = noEOF(err)
			}
			return err
		}
		rec, whole = c.buffered()
	}
	if whole {
		d := decoder{b: rec}
		h, err := c.cred.parseCall(&d)
		if err != nil {
			return err
		}
		if quick(&h, len(rec)) && c.answerQuick(&h, &d) {
			c.r.Discard(4 + len(rec))
			return nil
		}
	}
	c.reading.Store(c.srv.conns.now())
	buf, err := readRecord(c.r)
	c.reading.Store(0)
	if err != nil {
		return err
	}
	d := &decoder{b: buf.b}
	h, err := c.cred.parseCall(d)
	if err != nil {
		buf.free()
		return err
	}
	cost := int64(len(buf.b)) + replyCost(&h)
	// All three succeed in the end: requests at work give theirs back. They may
	// wait for the writer, and the client for what the reader has.
	if len(c.calls) == cap(c.calls) || !c.memory.TryAcquire(cost) {
		c.flush()
		c.calls <- struct{}{}
		c.memory.Acquire(context.Background(), cost)
	} else {
		c.calls <- struct{}{}
	}
	if !c.srv.memory.TryAcquire(cost) {
		c.flush()
		c.srv.memory.Acquire(context.Background(), cost)
	}
	c.work.Go(func() {
		e := newBuffer(0)
		q := callPool.Get().(*call)
		q.nowait = false
		c.answer(q, &h, d, e)
		callPool.Put(q)
		buf.free()
		c.send(reply{e, cost})
	})
	return nil
}

var callPool = sync.Pool{New: func() any { return new(call) }}

// buffered returns the next record, without its mark, if the whole of it has
// been read already and is one fragment. It stays in the buffer.
func (c *conn) buffered() ([]byte, bool) {
	have := c.r.Buffered()
	if have < 4 {
		return nil, false
	}
	mark, _ := c.r.Peek(4)
	head := binary.BigEndian.Uint32(mark)
	n := int(head &^ (1 << 31))
	if head>>31 == 0 || have < 4+n {
		return nil, false
	}
	rec, _ := c.r.Peek(4 + n)
	return rec[4:], true
}

// quick says whether a call is answered by the reader itself. It must not keep
// the others waiting.
func quick(h *callHeader, size int) bool {
	return h.prog == progNFS && h.proc < uint32(len(nfsProcs)) && nfsProcs[h.proc].quick && size <= smallBuffer/2
}

// replyCost is the memory a request's reply may take.
func replyCost(h *callHeader) int64 {
	if h.prog == progNFS && (h.proc == procRead || h.proc == procReadDir || h.proc == procReadDirPlus) {
		return maxRecord
	}
	return smallBuffer
}

// answerQuick adds the reply to those that go out together. False says that the
// call would have to wait, and was not answered.
func (c *conn) answerQuick(h *callHeader, d *decoder) bool {
	if c.mine == nil {
		c.mine = newBuffer(mediumBuffer)
	}
	c.quick.nowait = true
	at := len(c.mine.b)
	if !c.answer(&c.quick, h, d, c.mine) {
		c.mine.b = c.mine.b[:at]
		return false
	}
	if len(c.mine.b) >= replyBatch {
		c.flush()
	}
	return true
}

// answer works on a request, appends its reply to e and counts it; false as with
// answerQuick.
func (c *conn) answer(q *call, h *callHeader, d *decoder, e *buffer) bool {
	begin, in, at := time.Now(), len(d.b), len(e.b)
	p := c.srv.answer(q, c.peer, h, d, e)
	if q.again {
		return false
	}
	finish(e.b[at:])
	p.done(time.Since(begin), in, len(e.b)-at)
	return true
}

// flush sends the reader's own replies.
func (c *conn) flush() {
	e := c.mine
	if e == nil {
		return
	}
	c.mine = nil
	if len(e.b) == 0 {
		e.free()
		return
	}
	c.send(reply{buf: e})
}

// send writes a reply, or leaves it to the one who is writing. It never blocks
// for another's sake longer than the queue is long, which the tokens bound.
func (c *conn) send(r reply) {
	c.mu.Lock()
	c.queue = append(c.queue, r)
	if c.writing {
		c.mu.Unlock()
		return
	}
	c.writing = true
	var vec net.Buffers
	var spare []reply
	for len(c.queue) > 0 {
		batch := c.queue
		c.queue = spare[:0]
		c.mu.Unlock()
		c.sending.Store(c.srv.conns.now())
		var err error
		if len(batch) == 1 {
			_, err = c.nc.Write(batch[0].buf.b)
		} else {
			vec = vec[:0]
			for _, r := range batch {
				vec = append(vec, r.buf.b)
			}
			all := vec
			_, err = all.WriteTo(c.nc)
		}
		c.sending.Store(0)
		if err != nil {
			c.nc.Close() // ends the reader; the client comes back and repeats
		}
		for _, r := range batch {
			r.buf.free()
			if r.cost > 0 {
				c.srv.memory.Release(r.cost)
				c.memory.Release(r.cost)
				<-c.calls
			}
		}
		spare = batch
		c.mu.Lock()
	}
	c.writing = false
	c.mu.Unlock()
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

// connSet is the open connections. It stands in for deadlines: setting one at
// every request would cost more than a request may.
type connSet struct {
	start time.Time
	clock atomic.Int64 // time since start, 1 or more, as of the last sweep

	mu   sync.Mutex
	open map[*conn]struct{} // guarded by mu
}

func newConnSet() *connSet {
	s := &connSet{start: time.Now(), open: map[*conn]struct{}{}}
	s.clock.Store(1)
	return s
}

// now is a clock that is only as fine as the sweeps, but free.
func (s *connSet) now() int64 { return s.clock.Load() }

// clientConns bounds the open connections of one address: the largest nconnect=
// of the Linux client (16) for a few mounts, and what a broken network left.
const clientConns = 128

// add takes a connection, unless its address has too many.
func (s *connSet) add(c *conn) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	same := 0
	for other := range s.open {
		if other.peer == c.peer {
			same++
		}
	}
	if same >= clientConns {
		return false
	}
	s.open[c] = struct{}{}
	return true
}

func (s *connSet) remove(c *conn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.open, c)
}

// peers are the addresses that have connections.
func (s *connSet) peers() map[netip.Addr]int {
	s.mu.Lock()
	defer s.mu.Unlock()
	count := map[netip.Addr]int{}
	for c := range s.open {
		count[c.peer]++
	}
	return count
}

// drop closes the connections of a client.
func (s *connSet) drop(client netip.Addr) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for c := range s.open {
		if c.peer == client {
			c.nc.Close()
		}
	}
}

// sweep sets the clock and closes connections that have been at one thing for
// too long.
func (s *connSet) sweep(t time.Time) (now int64) {
	now = max(1, int64(t.Sub(s.start)))
	s.clock.Store(now)
	s.mu.Lock()
	defer s.mu.Unlock()
	for c := range s.open {
		for _, x := range [...]struct {
			since *atomic.Int64
			limit time.Duration
		}{{&c.waiting, idleTimeout}, {&c.reading, recordTimeout}, {&c.sending, writeTimeout}} {
			if since := x.since.Load(); since > 0 && now-since > int64(x.limit) {
				c.nc.Close()
			}
		}
	}
	return now
}
