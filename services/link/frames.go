package link

import (
	"encoding/binary"
	"io"
	"net"
	"sync"
)

// yamux's frame header.
const (
	muxHeader = 12  // bytes: version, type, flags (2), stream (4), length (4); big endian
	muxData   = 0   // the type with data behind the header
	muxFin    = 0x4 // flag: the sender's direction of the stream has ended
)

// frames is a shared connection as yamux writes and reads it.
//
// yamux writes a frame's header and its data apart, which over TLS would be two
// records and two packets: frames joins them. And yamux reports a broken
// connection as the end of its streams: frames notes which of them the other
// end has really ended.
type frames struct {
	net.Conn

	// Outgoing; yamux has one writer.
	head [muxHeader]byte
	held bool // head waits for its data
	out  []byte

	// Incoming; yamux has one reader.
	in     [muxHeader]byte
	have   int    // bytes of in that have come
	behind uint32 // bytes of data still to come

	mu   sync.Mutex
	ends map[uint32]end // guarded by mu: streams that have ended in one direction
}

type end int

const (
	endHere end = iota + 1
	endThere
)

func newFrames(c net.Conn) *frames { return &frames{Conn: c, ends: map[uint32]end{}} }

func (f *frames) Write(b []byte) (int, error) {
	if !f.held && len(b) == muxHeader && b[1] == muxData && binary.BigEndian.Uint32(b[8:]) > 0 {
		copy(f.head[:], b)
		f.held = true
		return len(b), nil
	}
	if !f.held {
		return f.Conn.Write(b)
	}
	f.held = false
	f.out = append(append(f.out[:0], f.head[:]...), b...)
	n, err := f.Conn.Write(f.out)
	return max(0, n-muxHeader), err
}

func (f *frames) Read(b []byte) (int, error) {
	n, err := f.Conn.Read(b)
	f.watch(b[:n])
	return n, err
}

// watch follows the frames that come in.
func (f *frames) watch(b []byte) {
	for len(b) > 0 {
		if f.behind > 0 {
			n := min(uint32(len(b)), f.behind)
			f.behind -= n
			b = b[n:]
			continue
		}
		n := copy(f.in[f.have:], b)
		f.have += n
		b = b[n:]
		if f.have < muxHeader {
			return
		}
		f.have = 0
		if f.in[1] == muxData {
			f.behind = binary.BigEndian.Uint32(f.in[8:])
		}
		if binary.BigEndian.Uint16(f.in[2:])&muxFin != 0 {
			f.note(binary.BigEndian.Uint32(f.in[4:]), endThere)
		}
	}
}

// note keeps what has ended, and forgets a stream that has ended both ways.
func (f *frames) note(stream uint32, e end) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if other := f.ends[stream]; other != 0 && other != e {
		delete(f.ends, stream)
		return
	}
	f.ends[stream] = e
}

// finished reports whether the other end has ended a stream.
func (f *frames) finished(stream uint32) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.ends[stream] == endThere
}

// closed says that this end is done with a stream.
func (f *frames) closed(stream uint32) { f.note(stream, endHere) }

// torn is a TCP connection whose end without a goodbye (RFC 8446, section 6.1)
// is an error: package tls takes it for the end of the stream.
type torn struct{ net.Conn }

func (t torn) Read(b []byte) (int, error) {
	n, err := t.Conn.Read(b)
	if err == io.EOF {
		err = ErrBroken
	}
	return n, err
}
