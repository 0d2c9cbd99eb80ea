package tftp

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
)

// The bridge serves a connection that is not a socket of the host, for example
// one of a TCP/IP stack inside this process.
//
// Why it is needed: pin/tftp v3.1.0 answers every request from a new
// net.ListenUDP socket of the host, which such a network can't reach. Its
// alternative, EnableSinglePort, would stay on the given connection, but there a
// packet that comes in just when its transfer ends is sent on a closed channel
// and takes the process down, and a stray packet blocks its port for good
// (single_port.go, connection.go). The bridge can go when the library takes the
// transfer's connection from its caller.
//
// So the library runs on a loopback socket, and each client gets a loopback
// socket of its own which stands for it there. Clients see all answers come from
// the one port they asked, which RFC 1350 leaves to the server.

// idleTransfer ends a bridged transfer when neither side says anything: longer
// than all retries of a packet.
const idleTransfer = (packetRetries + 3) * 2 * packetTimeout

// maxSessions bounds the clients; a session outlives its transfer by
// idleTransfer.
const maxSessions = 4 * maxTransfers

const (
	opRead  = 1
	opWrite = 2
	opError = 5
)

type bridge struct {
	s      *Server
	front  net.PacketConn // where the clients are
	back   netip.AddrPort // where the library listens
	mu     sync.Mutex
	byPeer map[string]*session               // by client address; guarded by mu
	byPort map[netip.AddrPort]netip.AddrPort // loopback address to client; guarded by mu
}

// session is one transfer of one client.
type session struct {
	conn   *net.UDPConn // stands for the client on loopback
	client net.Addr     // on the front
	mu     sync.Mutex
	server netip.AddrPort // where the library answers from, once it did; guarded by mu
	broken bool           // the client broke off: nothing more is sent to it; guarded by mu
}

func (s *Server) bridge(ctx context.Context, front net.PacketConn) error {
	defer front.Close()
	back, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		return fmt.Errorf("TFTP: loopback socket: %w", err)
	}
	b := &bridge{
		s: s, front: front, back: back.LocalAddr().(*net.UDPAddr).AddrPort(),
		byPeer: map[string]*session{}, byPort: map[netip.AddrPort]netip.AddrPort{},
	}
	group, ctx := errgroup.WithContext(ctx)
	defer context.AfterFunc(ctx, func() { front.Close() })()
	group.Go(func() error { return s.serve(ctx, back, b.client) })
	group.Go(func() error { return b.fromClients(ctx, group) })
	return group.Wait()
}

// client says who a loopback address stands for. Other programs of this machine
// can reach the loopback socket, and stand for nobody.
func (b *bridge) client(loopback netip.AddrPort) (netip.Addr, bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	a, ok := b.byPort[loopback]
	return a.Addr(), ok
}

// fromClients passes packets on to the library.
func (b *bridge) fromClients(ctx context.Context, group *errgroup.Group) error {
	for buf := make([]byte, 2048); ; {
		n, from, err := b.front.ReadFrom(buf)
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return fmt.Errorf("TFTP: receive: %w", err)
		}
		udp, ok := from.(*net.UDPAddr)
		if !ok || n < 4 {
			continue
		}
		packet := buf[:n]
		switch binary.BigEndian.Uint16(packet) {
		case opRead:
			b.begin(ctx, group, packet, udp)
		case opWrite: // there is nothing to write to
		default:
			b.forward(packet, udp)
		}
	}
}

// begin starts a transfer. A request that is repeated while the library has not
// answered yet is dropped; any other one replaces what its port did before.
func (b *bridge) begin(ctx context.Context, group *errgroup.Group, request []byte, from *net.UDPAddr) {
	key := from.String()
	b.mu.Lock()
	old, full := b.byPeer[key], len(b.byPeer) >= maxSessions
	b.mu.Unlock()
	switch {
	case old != nil && !old.answered():
		return
	case old != nil:
		old.conn.Close()
	case full:
		b.s.log.Warn("dropped: too many transfers at once", "client", from.IP)
		return
	}
	conn, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		b.s.log.Error("TFTP transfer not started", "client", from.IP, "err", err)
		return
	}
	local := conn.LocalAddr().(*net.UDPAddr).AddrPort()
	t := &session{conn: conn, client: from}
	b.mu.Lock()
	b.byPeer[key], b.byPort[local] = t, unmap(from.AddrPort())
	b.mu.Unlock()
	group.Go(func() error {
		stop := context.AfterFunc(ctx, func() { conn.Close() })
		b.toClient(t)
		stop()
		conn.Close()
		b.mu.Lock()
		defer b.mu.Unlock()
		delete(b.byPort, local)
		if b.byPeer[key] == t {
			delete(b.byPeer, key)
		}
		return nil
	})
	conn.WriteToUDPAddrPort(request, b.back)
}

// forward passes a client's acknowledgement or error on.
func (b *bridge) forward(packet []byte, from *net.UDPAddr) {
	b.mu.Lock()
	t := b.byPeer[from.String()]
	b.mu.Unlock()
	if t == nil {
		return
	}
	// When the client breaks off, the library answers with an error of its own,
	// which from the one port of the front would look like the answer to the
	// client's next request. So the way back ends before the library hears of it.
	last := binary.BigEndian.Uint16(packet) == opError
	t.mu.Lock()
	server := t.server
	t.broken = t.broken || last && server.IsValid()
	t.mu.Unlock()
	if !server.IsValid() {
		return
	}
	t.conn.WriteToUDPAddrPort(packet, server)
	if last {
		t.conn.Close()
		return
	}
	t.conn.SetReadDeadline(time.Now().Add(idleTransfer))
}

// toClient passes the library's packets on until nothing is said any more.
func (b *bridge) toClient(t *session) {
	for buf := make([]byte, 2048); ; {
		t.conn.SetReadDeadline(time.Now().Add(idleTransfer))
		n, from, err := t.conn.ReadFromUDPAddrPort(buf)
		if err != nil {
			return
		}
		if !t.from(unmap(from)) {
			continue
		}
		if _, err := b.front.WriteTo(buf[:n], t.client); err != nil {
			if !errors.Is(err, net.ErrClosed) {
				b.s.log.Warn("TFTP packet not sent", "client", t.client, "err", err)
			}
			return
		}
	}
}

// from says whether a packet is one of the library's for a client that still
// listens: the first one that answers fixes the address.
func (t *session) from(a netip.AddrPort) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.broken {
		return false
	}
	if !t.server.IsValid() {
		t.server = a
	}
	return t.server == a
}

func (t *session) answered() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.server.IsValid()
}
