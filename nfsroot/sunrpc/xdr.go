package sunrpc

import "encoding/binary"

// Decoder reads XDR (RFC 4506). The first item that does not fit makes it bad,
// and every later read yields zero values: decode all arguments, then ask Bad
// once.
type Decoder struct {
	b   []byte
	bad bool
}

// NewDecoder reads from b.
func NewDecoder(b []byte) *Decoder { return &Decoder{b: b} }

// Bad says whether anything read so far did not fit.
func (d *Decoder) Bad() bool { return d.bad }

// Spoil makes the decoder bad: a value has been read that may not be there.
func (d *Decoder) Spoil() { d.bad = true }

// Len is the number of bytes left.
func (d *Decoder) Len() int { return len(d.b) }

func (d *Decoder) take(n int) []byte {
	if d.bad || n < 0 || n > len(d.b) {
		d.bad = true
		return nil
	}
	p := d.b[:n:n]
	d.b = d.b[n:]
	return p
}

// Uint32 reads an unsigned int.
func (d *Decoder) Uint32() uint32 {
	if p := d.take(4); p != nil {
		return binary.BigEndian.Uint32(p)
	}
	return 0
}

// Uint64 reads an unsigned hyper.
func (d *Decoder) Uint64() uint64 {
	if p := d.take(8); p != nil {
		return binary.BigEndian.Uint64(p)
	}
	return 0
}

// Bool reads a bool. Any value but 0 and 1 is malformed.
func (d *Decoder) Bool() bool {
	v := d.Uint32()
	if v > 1 {
		d.bad = true
	}
	return v == 1
}

// Opaque reads a variable-length opaque of at most limit bytes, as a view into
// the message.
func (d *Decoder) Opaque(limit int) []byte {
	n := d.Uint32()
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

// String reads a string of at most limit bytes.
func (d *Decoder) String(limit int) string { return string(d.Opaque(limit)) }

// Fixed reads a fixed-length opaque whose length is a multiple of four.
func (d *Decoder) Fixed(p []byte) { copy(p, d.take(len(p))) }

// Encoder appends XDR. The zero value is ready to use.
type Encoder struct{ b []byte }

// Bytes is what was encoded so far.
func (e *Encoder) Bytes() []byte { return e.b }

// Uint32 appends an unsigned int.
func (e *Encoder) Uint32(v uint32) { e.b = binary.BigEndian.AppendUint32(e.b, v) }

// Uint64 appends an unsigned hyper.
func (e *Encoder) Uint64(v uint64) { e.b = binary.BigEndian.AppendUint64(e.b, v) }

// Bool appends a bool.
func (e *Encoder) Bool(v bool) {
	if v {
		e.Uint32(1)
	} else {
		e.Uint32(0)
	}
}

// Opaque appends a variable-length opaque.
func (e *Encoder) Opaque(p []byte) {
	e.Uint32(uint32(len(p)))
	e.b = append(e.b, p...)
	e.b = append(e.b, "\x00\x00\x00"[:-len(p)&3]...)
}

// String appends a string.
func (e *Encoder) String(s string) { e.Opaque([]byte(s)) }

// Fixed appends a fixed-length opaque whose length is a multiple of four.
func (e *Encoder) Fixed(p []byte) { e.b = append(e.b, p...) }
