package sunrpc

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"testing"
)

// echo doubles a number; procedure 2 fails badly.
func echo(c *Call) Accept {
	switch c.Proc {
	case 1:
		v := c.Args.Uint32()
		if c.Args.Bad() {
			return GarbageArgs
		}
		c.Reply.Uint32(2 * v)
	case 2:
		panic("bad")
	default:
		return ProcUnavail
	}
	return Success
}

var programs = []Program{{Number: 300_000, Low: 2, High: 3, Handle: echo}}

func TestCalls(t *testing.T) {
	ln, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	pc, err := net.ListenPacket("udp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := &Server{Programs: programs}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 2)
	go func() { done <- s.Serve(ctx, ln) }()
	go func() { done <- s.ServePacket(ctx, pc) }()
	nc, err := Dial(ctx, ln.Addr().(*net.TCPAddr).AddrPort())
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	for _, tc := range []struct {
		prog, vers, proc uint32
		args             func(*Encoder)
		want             Accept
	}{
		{300_000, 2, 1, func(e *Encoder) { e.Uint32(21) }, Success},
		{300_000, 3, 1, nil, GarbageArgs},
		{300_000, 3, 2, nil, SystemErr},
		{300_000, 3, 9, nil, ProcUnavail},
		{300_000, 4, 1, nil, ProgMismatch},
		{300_001, 1, 1, nil, ProgUnavail},
	} {
		d, err := Do(ctx, nc, tc.prog, tc.vers, tc.proc, tc.args)
		var rpcErr *Error
		switch {
		case tc.want == Success && (err != nil || d.Uint32() != 42):
			t.Errorf("%v: %v", tc, err)
		case tc.want != Success && (!errors.As(err, &rpcErr) || rpcErr.Accept != tc.want):
			t.Errorf("%+v: %v, want %s", tc, err, tc.want)
		}
	}
	udp, err := net.Dial("udp4", pc.LocalAddr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer udp.Close()
	e := &Encoder{}
	for _, v := range []uint32{7, msgCall, version, 300_000, 2, 1, 0, 0, 0, 0, 21} {
		e.Uint32(v)
	}
	if _, err := udp.Write(e.Bytes()); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 100)
	n, err := udp.Read(buf)
	if want := []byte("\x00\x00\x00\x07\x00\x00\x00\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x2a"); err != nil || !bytes.Equal(buf[:n], want) {
		t.Errorf("by UDP: %x, %v", buf[:n], err)
	}
	cancel()
	for range 2 {
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
}

func FuzzMessage(f *testing.F) {
	f.Add([]byte("\x80\x00\x00\x2c\x00\x00\x00\x07\x00\x00\x00\x00\x00\x00\x00\x02\x00\x04\x93\xe0\x00\x00\x00\x02\x00\x00\x00\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x15"))
	f.Add([]byte("\x00\x00\x00\x01a\x80\x00\x00\x00"))
	f.Fuzz(func(t *testing.T, stream []byte) {
		r := bytes.NewReader(stream)
		for {
			message, err := readMessage(r)
			if err != nil {
				if !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) && !errors.Is(err, ErrMessage) {
					t.Fatal(err)
				}
				return
			}
			call := &Call{Peer: netip.MustParseAddrPort("10.0.0.1:700")}
			reply := answer(programs, message, call, func(v any) {
				if v != "bad" {
					t.Fatal(v)
				}
			})
			if reply != nil && len(reply) < 12 {
				t.Fatalf("reply %x", reply)
			}
		}
	})
}
