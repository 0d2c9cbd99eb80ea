package nfs

import "encoding/binary"

// decoder reads XDR (RFC 4506) from a byte slice. The first item that does not
// fit sets bad, and every later read yields zero values: a procedure decodes
// all its arguments and looks at bad once.
type decoder struct {
	b   []byte
	bad bool
}

func (d *decoder) take(n int) []byte {
	if d.bad || n < 0 || n > len(d.b) {
		d.bad = true
		return nil
	}
	p := d.b[:n:n]
	d.b = d.b[n:]
	return p
}

func (d *decoder) u32() uint32 {
	if p := d.take(4); p != nil {
		return binary.BigEndian.Uint32(p)
	}
	return 0
}

func (d *decoder) u64() uint64 {
	if p := d.take(8); p != nil {
		return binary.BigEndian.Uint64(p)
	}
	return 0
}

// boolean reads an XDR bool. Any value but 0 and 1 is malformed.
func (d *decoder) boolean() bool {
	v := d.u32()
	if v > 1 {
		d.bad = true
	}
	return v == 1
}

// opaque reads a variable-length opaque of at most limit bytes. The result is a
// view into the record, not a copy.
func (d *decoder) opaque(limit int) []byte {
	n := d.u32()
	if d.bad || uint64(n) > uint64(limit) {
		d.bad = true
		return nil
	}
	p := d.take(int(n))
	d.take(-int(n) & 3)
	if d.bad {
		return nil
	}
	return p
}

// fixed reads a fixed-length opaque whose length is a multiple of four.
func (d *decoder) fixed(p []byte) { copy(p, d.take(len(p))) }

// buffer is a reused byte slice: a record that came in, or a reply to which its
// methods append XDR.
type buffer struct{ b []byte }

func (e *buffer) u32(v uint32) { e.b = binary.BigEndian.AppendUint32(e.b, v) }
func (e *buffer) u64(v uint64) { e.b = binary.BigEndian.AppendUint64(e.b, v) }

func (e *buffer) boolean(v bool) {
	if v {
		e.u32(1)
	} else {
		e.u32(0)
	}
}

func (e *buffer) opaque(p []byte) {
	e.u32(uint32(len(p)))
	e.b = append(e.b, p...)
	e.pad(len(p))
}

func (e *buffer) str(s string) {
	e.u32(uint32(len(s)))
	e.b = append(e.b, s...)
	e.pad(len(s))
}

// pad appends the zero bytes that follow n bytes of opaque data.
func (e *buffer) pad(n int) { e.b = append(e.b, "\x00\x00\x00"[:-n&3]...) }

// padded is the size on the wire of n bytes of opaque data without its length.
func padded(n int) int { return (n + 3) &^ 3 }
