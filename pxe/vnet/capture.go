package vnet

import (
	"encoding/binary"
	"io"
	"sync"
	"time"
)

// capture writes frames in the classic pcap format
// (draft-ietf-opsawg-pcap): a 24-byte file header, then each frame behind a
// 16-byte header. Little endian, nanosecond times, link type Ethernet.
type capture struct {
	mu  sync.Mutex
	w   io.Writer // guarded by mu
	err error     // guarded by mu; the first one ends the capture
	buf []byte    // guarded by mu
}

func newCapture(w io.Writer) (*capture, error) {
	const (
		magic    = 0xa1b23c4d // times have nanoseconds
		ethernet = 1          // LINKTYPE_ETHERNET
	)
	h := binary.LittleEndian.AppendUint32(nil, magic)
	h = binary.LittleEndian.AppendUint16(h, 2) // version 2.4
	h = binary.LittleEndian.AppendUint16(h, 4)
	h = append(h, make([]byte, 8)...) // time zone, accuracy: always zero
	h = binary.LittleEndian.AppendUint32(h, MaxFrame)
	h = binary.LittleEndian.AppendUint32(h, ethernet)
	if _, err := w.Write(h); err != nil {
		return nil, err
	}
	return &capture{w: w}, nil
}

// write appends one frame in a single Write, so that a file is whole up to the
// last frame whenever the process ends.
func (c *capture) write(at time.Time, frame []byte) {
	if c == nil {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err != nil {
		return
	}
	b := binary.LittleEndian.AppendUint32(c.buf[:0], uint32(at.Unix()))
	b = binary.LittleEndian.AppendUint32(b, uint32(at.Nanosecond()))
	b = binary.LittleEndian.AppendUint32(b, uint32(len(frame)))
	b = binary.LittleEndian.AppendUint32(b, uint32(len(frame)))
	c.buf = append(b, frame...)
	_, c.err = c.w.Write(c.buf)
}

func (c *capture) error() error {
	if c == nil {
		return nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.err
}
