package supervise

import (
	"bytes"
	"sync"
)

// Ring keeps the last bytes written to it. It is safe for use by several
// goroutines.
type Ring struct {
	mu   sync.Mutex
	buf  []byte // guarded by mu
	next int    // guarded by mu: where the next byte goes
	full bool   // guarded by mu
	all  uint64 // guarded by mu: bytes ever written
}

// NewRing returns a ring of size bytes.
func NewRing(size int) *Ring { return &Ring{buf: make([]byte, max(size, 1))} }

// Write never fails; of more than the ring's size the end is kept.
func (r *Ring) Write(p []byte) (int, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	n := len(p)
	r.all += uint64(n)
	if len(p) >= len(r.buf) {
		copy(r.buf, p[len(p)-len(r.buf):])
		r.next, r.full = 0, true
		return n, nil
	}
	c := copy(r.buf[r.next:], p)
	copy(r.buf, p[c:])
	if r.next+n >= len(r.buf) {
		r.full = true
	}
	r.next = (r.next + n) % len(r.buf)
	return n, nil
}

// Bytes returns what is kept, oldest first. When older text was lost it starts
// at the beginning of a line, if there is one.
func (r *Ring) Bytes() []byte {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.bytes()
}

// bytes is Bytes for a caller who holds mu.
func (r *Ring) bytes() []byte {
	if !r.full {
		return bytes.Clone(r.buf[:r.next])
	}
	out := append(bytes.Clone(r.buf[r.next:]), r.buf[:r.next]...)
	if i := bytes.IndexByte(out, '\n'); i >= 0 && i+1 < len(out) {
		out = out[i+1:]
	}
	return out
}

// Since returns what was written after the first n bytes ever, as far as it is
// kept, and how many bytes there were in all. An n from another ring gives all
// that is kept.
func (r *Ring) Since(n uint64) (text []byte, all uint64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	text = r.bytes()
	if n <= r.all && r.all-n <= uint64(len(text)) {
		text = text[uint64(len(text))-(r.all-n):]
	}
	return text, r.all
}

// Tail returns the last n lines.
func (r *Ring) Tail(n int) []byte {
	b := bytes.TrimRight(r.Bytes(), "\n")
	i := len(b)
	for range n {
		if i = bytes.LastIndexByte(b[:i], '\n'); i < 0 {
			return b
		}
	}
	return b[i+1:]
}
