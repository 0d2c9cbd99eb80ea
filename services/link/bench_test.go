package link

import (
	"context"
	"crypto/tls"
	"io"
	"net"
	"net/netip"
	"sync"
	"testing"

	"krgimage/services/identity"
)

// BenchmarkRoundTrip compares a 64-byte question and answer over a stream that
// is open with the same over TCP and TLS alone. Handlers are loops, no RPC.
func BenchmarkRoundTrip(b *testing.B) {
	for _, p := range paths(b) {
		b.Run(p.name, func(b *testing.B) {
			conn := p.dial(b)
			defer conn.Close()
			buf := make([]byte, 64)
			for b.Loop() {
				if _, err := conn.Write(buf); err != nil {
					b.Fatal(err)
				}
				if _, err := io.ReadFull(conn, buf); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// BenchmarkDial is a new stream with a question and answer.
func BenchmarkDial(b *testing.B) {
	for _, p := range paths(b) {
		b.Run(p.name, func(b *testing.B) {
			buf := make([]byte, 64)
			for b.Loop() {
				conn := p.dial(b)
				if _, err := conn.Write(buf); err != nil {
					b.Fatal(err)
				}
				if _, err := io.ReadFull(conn, buf); err != nil {
					b.Fatal(err)
				}
				conn.Close()
			}
		})
	}
}

// BenchmarkThroughput sends 64 KiB pieces one way. An answer at the end makes
// sure that all has arrived.
func BenchmarkThroughput(b *testing.B) {
	for _, p := range paths(b) {
		b.Run(p.name, func(b *testing.B) {
			conn := p.sink(b)
			defer conn.Close()
			buf := make([]byte, 64<<10)
			b.SetBytes(int64(len(buf)))
			for b.Loop() {
				if _, err := conn.Write(buf); err != nil {
					b.Fatal(err)
				}
			}
			last := make([]byte, len(buf))
			last[len(last)-1] = 1
			if _, err := conn.Write(last); err != nil {
				b.Fatal(err)
			}
			if _, err := io.ReadFull(conn, last[:1]); err != nil {
				b.Fatal(err)
			}
		})
	}
}

// path is one way to another node, in the same process over loopback.
type path struct {
	name string
	dial func(testing.TB) net.Conn // to an echo
	sink func(testing.TB) net.Conn // to a reader that answers a piece ending in 1
}

func paths(b *testing.B) []path {
	w := newTown(b)
	one, two := w.start(1), w.start(2)
	two.Handle("sink", func(_ context.Context, _ Peer, conn net.Conn) { swallow(conn) })
	mesh := func(name string, dial func(context.Context, int, string) (net.Conn, error)) path {
		to := func(service string) func(testing.TB) net.Conn {
			return func(b testing.TB) net.Conn {
				conn, err := dial(context.Background(), 2, service)
				if err != nil {
					b.Fatal(err)
				}
				return conn
			}
		}
		return path{name, to("echo"), to("sink")}
	}
	cred, _ := w.boot(1)
	plain := func(name string, server, client func(net.Conn) net.Conn) path {
		to := func(serve func(net.Conn)) func(testing.TB) net.Conn {
			addr := listen(b, func(c net.Conn) { serve(server(c)) })
			return func(b testing.TB) net.Conn {
				c, err := net.Dial("tcp", addr.String())
				if err != nil {
					b.Fatal(err)
				}
				return client(c)
			}
		}
		return path{name, to(func(c net.Conn) { io.Copy(c, c) }), to(swallow)}
	}
	same := func(c net.Conn) net.Conn { return c }
	return []path{
		plain("tcp", same, same),
		plain("tls",
			func(c net.Conn) net.Conn { return tls.Server(c, identity.ServerTLS(cred, identity.Anyone)) },
			func(c net.Conn) net.Conn { return tls.Client(c, identity.ClientTLS(cred, 1, identity.Anyone)) }),
		mesh("shared", one.Mesh.Dial), mesh("bulk", one.DialBulk),
	}
}

func swallow(conn net.Conn) {
	buf := make([]byte, 64<<10)
	for {
		if _, err := io.ReadFull(conn, buf); err != nil {
			return
		}
		if buf[len(buf)-1] == 1 {
			conn.Write(buf[:1])
		}
	}
}

func listen(b *testing.B, serve func(net.Conn)) netip.AddrPort {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	var conns sync.WaitGroup
	conns.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			conns.Go(func() { serve(c); c.Close() })
		}
	})
	b.Cleanup(func() { l.Close(); conns.Wait() })
	return l.Addr().(*net.TCPAddr).AddrPort()
}
