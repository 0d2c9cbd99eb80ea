package nfs

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"sync"
)

// Sizes in bytes.
const (
	// maxIO is the largest READ and WRITE (FSINFO's rtmax and wtmax).
	maxIO = 1 << 20
	// maxRecord is a WRITE of maxIO with the largest call header.
	maxRecord = maxIO + 4<<10
	// maxFragments bounds the fragments of one record, which may be empty.
	maxFragments = 1 << 10
)

// ONC RPC (RFC 5531 section 9).
const (
	rpcVersion = 2

	msgCall  = 0
	msgReply = 1

	replyAccepted = 0
	replyDenied   = 1

	acceptSuccess      = 0
	acceptProgUnavail  = 1
	acceptProgMismatch = 2
	acceptProcUnavail  = 3
	acceptGarbageArgs  = 4
	acceptSystemErr    = 5

	rejectRPCMismatch = 0
	rejectAuthError   = 1

	authBadCred = 1
	authTooWeak = 5

	flavorNone = 0
	flavorSys  = 1
)

// errRecord says that a connection's byte stream makes no sense: there is no
// way to find the next record in it.
var errRecord = errors.New("malformed RPC record")

// Buffers come in three sizes: almost all records and replies fit the small one,
// the replies of a batch the medium one.
const (
	smallBuffer  = 16 << 10
	mediumBuffer = replyBatch + smallBuffer
)

var (
	mediumBuffers = sync.Pool{New: func() any { return &buffer{make([]byte, 0, mediumBuffer)} }}
	smallBuffers  = sync.Pool{New: func() any { return &buffer{make([]byte, 0, smallBuffer)} }}
	largeBuffers  = sync.Pool{New: func() any { return &buffer{make([]byte, 0, maxRecord)} }}
)

// newBuffer returns an empty buffer with room for n bytes.
func newBuffer(n int) *buffer {
	switch {
	case n <= smallBuffer:
		return smallBuffers.Get().(*buffer)
	case n <= mediumBuffer:
		return mediumBuffers.Get().(*buffer)
	}
	return largeBuffers.Get().(*buffer)
}

func (p *buffer) free() {
	switch c := cap(p.b); {
	case c >= maxRecord:
		p.b = p.b[:0]
		largeBuffers.Put(p)
	case c >= mediumBuffer:
		p.b = p.b[:0]
		mediumBuffers.Put(p)
	case c >= smallBuffer:
		p.b = p.b[:0]
		smallBuffers.Put(p)
	}
}

// grow makes room for n more bytes.
func (p *buffer) grow(n int) {
	if len(p.b)+n <= cap(p.b) {
		return
	}
	q := largeBuffers.Get().(*buffer)
	q.b = append(q.b[:0], p.b...)
	p.b, q.b = q.b, p.b
	q.free()
}

// readRecord reads one record of the record marking standard (RFC 5531
// section 11), in as many fragments as the client likes. io.EOF means a clean
// end between records.
func readRecord(r *bufio.Reader) (*buffer, error) {
	rec := newBuffer(0)
	for frags := 1; ; frags++ {
		mark, err := r.Peek(4)
		if err != nil {
			rec.free()
			if frags > 1 || len(mark) > 0 {
				return nil, noEOF(err)
			}
			return nil, err
		}
		head := binary.BigEndian.Uint32(mark)
		r.Discard(4)
		n := int(head &^ (1 << 31))
		if n > maxRecord-len(rec.b) {
			rec.free()
			return nil, fmt.Errorf("%w: longer than %d bytes", errRecord, maxRecord)
		}
		if frags > maxFragments {
			rec.free()
			return nil, fmt.Errorf("%w: more than %d fragments", errRecord, maxFragments)
		}
		rec.grow(n)
		at := len(rec.b)
		rec.b = rec.b[:at+n]
		if _, err := io.ReadFull(r, rec.b[at:]); err != nil {
			rec.free()
			return nil, noEOF(err)
		}
		if head>>31 == 1 {
			return rec, nil
		}
	}
}

func noEOF(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}

// callHeader is a decoded RPC call without its arguments.
type callHeader struct {
	xid, rpcvers, prog, vers, proc uint32
	flavor                         uint32
	id                             identity // of AUTH_SYS; nobody otherwise
	badCred                        bool
}

// parseCall decodes the header of a call; d is left at the arguments. It fails
// when the record is not a call at all, which no reply can answer.
func (m *credMemory) parseCall(d *decoder) (h callHeader, err error) {
	h.xid = d.u32()
	if typ := d.u32(); d.bad || typ != msgCall {
		return h, fmt.Errorf("%w: not a call", errRecord)
	}
	if h.rpcvers = d.u32(); h.rpcvers != rpcVersion && !d.bad {
		return h, nil // what follows may look different in another version
	}
	h.prog, h.vers, h.proc = d.u32(), d.u32(), d.u32()
	h.flavor = d.u32()
	cred := d.opaque(400)
	d.u32() // verifier flavor
	d.opaque(400)
	if d.bad {
		return h, fmt.Errorf("%w: truncated call header", errRecord)
	}
	h.id = identity{uid: nobody, gid: nobody}
	if h.flavor == flavorSys {
		if !bytes.Equal(cred, m.cred) || m.cred == nil {
			m.cred = append(m.cred[:0], cred...)
			m.id, m.good = parseAuthSys(cred)
		}
		h.id, h.badCred = m.id, !m.good
	}
	return h, nil
}

// credMemory remembers the last credential of a connection: the next call often
// comes from the same user.
type credMemory struct {
	cred []byte
	id   identity
	good bool
}

// parseAuthSys decodes an authsys_parms (RFC 5531 appendix A).
func parseAuthSys(cred []byte) (identity, bool) {
	d := decoder{b: cred}
	d.u32()       // stamp
	d.opaque(255) // machine name: a client may claim any
	id := identity{uid: d.u32(), gid: d.u32()}
	n := d.u32()
	if d.bad || n > 16 || len(d.b) != int(n)*4 {
		return identity{uid: nobody, gid: nobody}, false
	}
	var groups [64]byte
	for i := range int(n) {
		binary.NativeEndian.PutUint32(groups[4*i:], d.u32())
	}
	id.groups = string(groups[:4*n])
	// -1 means "no change" to the system calls that take ids.
	if id.uid == ^uint32(0) {
		id.uid = nobody
	}
	if id.gid == ^uint32(0) {
		id.gid = nobody
	}
	return id, true
}

// acceptReply appends the start of a reply; the record mark is filled in by
// finish.
func acceptReply(e *buffer, xid, stat uint32) {
	e.u32(0)
	e.u32(xid)
	e.u32(msgReply)
	e.u32(replyAccepted)
	e.u32(flavorNone)
	e.u32(0)
	e.u32(stat)
}

func denyReply(e *buffer, xid, why uint32) {
	e.u32(0)
	e.u32(xid)
	e.u32(msgReply)
	e.u32(replyDenied)
	e.u32(why)
}

// finish writes the record mark of a complete record.
func finish(rec []byte) {
	binary.BigEndian.PutUint32(rec, 1<<31|uint32(len(rec)-4))
}
