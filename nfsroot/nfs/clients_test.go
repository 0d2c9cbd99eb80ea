package nfs

import (
	"context"
	"net"
	"net/netip"
	"sync/atomic"
	"testing"
)

// TestRevoked takes an address's admission while it is connected.
func TestRevoked(t *testing.T) {
	var revoked atomic.Bool
	s, err := New(Config{Exports: []Export{testExport(t, t.TempDir())}, HandleKey: testKey,
		Allow: func(netip.Addr) bool { return !revoked.Load() }})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	ln, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error)
	go func() { served <- s.Serve(ctx, ln) }()
	c := connect(t, ln.Addr().String(), "/", 0, 0)
	s.expel()
	if st := s.Stats(); st.Open != 1 || st.Refused != 0 {
		t.Errorf("an admitted address: %+v", st)
	}
	revoked.Store(true)
	c.closed() // by the server's own sweep
	if st := s.Stats(); st.Refused == 0 {
		t.Errorf("not counted: %+v", st)
	}
	cancel()
	if err := <-served; err != nil {
		t.Error(err)
	}
}

// TestConnectionsOfOneClient has one address ask for more than its share.
func TestConnectionsOfOneClient(t *testing.T) {
	cs := newConnSet()
	greedy, other := netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("10.0.0.2")
	var conns []*conn
	for range clientConns {
		c := &conn{peer: greedy}
		if !cs.add(c) {
			t.Fatalf("refused after %d", len(conns))
		}
		conns = append(conns, c)
	}
	if cs.add(&conn{peer: greedy}) {
		t.Error("one too many was taken")
	}
	if !cs.add(&conn{peer: other}) {
		t.Error("another address was refused")
	}
	cs.remove(conns[0])
	if !cs.add(conns[0]) {
		t.Error("refused although one had gone")
	}
	if by := cs.peers(); by[greedy] != clientConns || by[other] != 1 {
		t.Errorf("%d and %d connections", by[greedy], by[other])
	}
}
