package link

import (
	"bytes"
	"crypto/x509"
	"encoding/binary"
	"encoding/pem"
	"net"
	"testing"
)

func parseCert(t testing.TB, text []byte) *x509.Certificate {
	t.Helper()
	block, _ := pem.Decode(text)
	if block == nil {
		t.Fatal("no PEM")
	}
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

func frame(kind byte, flags uint16, stream uint32, length uint32) []byte {
	h := make([]byte, muxHeader)
	h[1] = kind
	binary.BigEndian.PutUint16(h[2:], flags)
	binary.BigEndian.PutUint32(h[4:], stream)
	binary.BigEndian.PutUint32(h[8:], length)
	return h
}

// sink takes writes and gives reads in small pieces.
type sink struct {
	net.Conn
	writes [][]byte
	in     []byte
	piece  int
}

func (s *sink) Write(b []byte) (int, error) {
	s.writes = append(s.writes, bytes.Clone(b))
	return len(b), nil
}

func (s *sink) Read(b []byte) (int, error) {
	n := copy(b[:min(s.piece, len(b))], s.in)
	s.in = s.in[n:]
	return n, nil
}

func TestFramesJoin(t *testing.T) {
	var s sink
	f := newFrames(&s)
	empty, window, data, body := frame(0, muxFin, 1, 0), frame(1, 0, 1, 4096), frame(0, 0, 1, 5), []byte("hello")
	for _, b := range [][]byte{empty, window, data, body, window, data, body} {
		if n, err := f.Write(b); n != len(b) || err != nil {
			t.Fatal(n, err)
		}
	}
	whole := append(bytes.Clone(data), body...)
	want := [][]byte{empty, window, whole, window, whole}
	if len(s.writes) != len(want) {
		t.Fatalf("%d writes, want %d", len(s.writes), len(want))
	}
	for i := range want {
		if !bytes.Equal(s.writes[i], want[i]) {
			t.Errorf("write %d: %q, want %q", i, s.writes[i], want[i])
		}
	}
}

func TestFramesEnds(t *testing.T) {
	// The data of the first frame looks like the end of stream 9.
	lie := frame(0, muxFin, 9, 0)
	var in []byte
	for _, b := range [][]byte{frame(0, 0, 3, uint32(len(lie))), lie, frame(1, muxFin, 3, 0), frame(0, 0, 5, 0), frame(1, muxFin, 7, 9)} {
		in = append(in, b...)
	}
	for piece := 1; piece <= len(in); piece++ {
		f := newFrames(&sink{in: in, piece: piece})
		f.closed(7)
		for range len(in)/piece + 1 {
			if _, err := f.Read(make([]byte, len(in))); err != nil {
				t.Fatal(err)
			}
		}
		if !f.finished(3) || f.finished(5) || f.finished(9) || f.finished(7) {
			t.Errorf("pieces of %d: finished %v", piece, f.ends)
		}
		f.closed(3)
		if len(f.ends) != 0 {
			t.Errorf("pieces of %d: kept %v", piece, f.ends)
		}
	}
}
