package coordinator

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"krgimage/services/cluster"
	"krgimage/services/cluster/wire"
	"krgimage/services/identity"
)

// conn is one node's stream.
type conn struct {
	id          uint64
	node        int
	fingerprint string
	wake        chan struct{} // holds a token when there may be something to send

	mu       sync.Mutex
	pending  []*wire.ToNode // guarded by mu
	shown    bool           // the node may be sent the membership; guarded by mu
	closed   string         // why the stream is to end; guarded by mu
	revision uint64         // of the membership the node has; the sender's own
}

func (c *conn) nudge() {
	select {
	case c.wake <- struct{}{}:
	default:
	}
}

// queue sends a message; it never waits.
func (c *conn) queue(m *wire.ToNode) {
	c.mu.Lock()
	c.pending = append(c.pending, m)
	c.mu.Unlock()
	c.nudge()
}

// welcome lets the node be sent the membership.
func (c *conn) welcome() {
	c.mu.Lock()
	c.shown = true
	c.mu.Unlock()
	c.nudge()
}

// close ends the stream after what is queued.
func (c *conn) close(reason string) {
	c.mu.Lock()
	c.closed = reason
	c.mu.Unlock()
	c.nudge()
}

// streams implements the gRPC service.
type streams struct {
	wire.UnimplementedClusterServer
	s *Server
}

// Connect implements wire.ClusterServer.
func (t *streams) Connect(stream grpc.BidiStreamingServer[wire.FromNode, wire.ToNode]) error {
	s, ctx := t.s, stream.Context()
	id, cert, from, err := member(ctx)
	if err != nil {
		return status.Error(codes.Unauthenticated, err.Error())
	}
	incoming, failed := make(chan *wire.FromNode), make(chan error, 1)
	go func() { // ends with the stream
		for {
			m, err := stream.Recv()
			if err != nil {
				failed <- err
				return
			}
			select {
			case incoming <- m:
			case <-ctx.Done():
				return
			}
		}
	}()
	var hello *wire.Hello
	select {
	case m := <-incoming:
		hello = m.GetHello()
	case <-failed:
	case <-ctx.Done():
	case <-time.After(helloTimeout):
	}
	if hello == nil {
		return status.Error(codes.InvalidArgument, "a stream begins with a hello")
	}
	address, err := netip.ParseAddr(hello.Address)
	if err != nil || from.IsValid() && address != from {
		// Probes and other nodes go there, so it must be the node's own.
		return status.Errorf(codes.InvalidArgument, "the address %q isn't the one that the node calls from, %s", hello.Address, from)
	}
	c := s.attach(id.Node, identity.Fingerprint(cert))
	s.log.Debug("stream", "node", id.Node, "conn", c.id, "from", from, "version", hello.Version)
	s.post(ctx, cluster.Connected{
		Node: id.Node, Conn: c.id, Boot: id.Boot, Fingerprint: c.fingerprint, Hostname: hello.Hostname, Address: address,
		Running: hello.Container.GetRunning(), Epoch: hello.Container.GetEpoch(),
	})
	defer s.detach(c)
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case err := <-failed:
			return err
		case m := <-incoming:
			s.take(ctx, c, id, cert, m)
		case <-c.wake:
			if err := s.flush(stream, c); err != nil {
				return err
			}
		}
	}
}

// member is who opened a stream, as its certificate says.
func member(ctx context.Context) (identity.ID, *x509.Certificate, netip.Addr, error) {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return identity.ID{}, nil, netip.Addr{}, errors.New("no peer")
	}
	info, ok := p.AuthInfo.(credentials.TLSInfo)
	if !ok {
		return identity.ID{}, nil, netip.Addr{}, errors.New("no certificate")
	}
	id, err := identity.PeerID(info.State)
	if err != nil {
		return identity.ID{}, nil, netip.Addr{}, err
	}
	var from netip.Addr
	if a, err := netip.ParseAddrPort(p.Addr.String()); err == nil {
		from = a.Addr().Unmap()
	}
	return id, info.State.PeerCertificates[0], from, nil
}

func (s *Server) attach(node int, fingerprint string) *conn {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.last++
	c := &conn{id: s.last, node: node, fingerprint: fingerprint, wake: make(chan struct{}, 1)}
	s.conns[c.id] = c
	return c
}

func (s *Server) detach(c *conn) {
	s.mu.Lock()
	delete(s.conns, c.id)
	if s.core.Connection(c.node) == c.id {
		delete(s.loads, c.node)
	}
	s.mu.Unlock()
	s.post(context.Background(), cluster.Disconnected{Node: c.node, Conn: c.id})
}

// take handles one message.
func (s *Server) take(ctx context.Context, c *conn, id identity.ID, cert *x509.Certificate, m *wire.FromNode) {
	switch m := m.Message.(type) {
	case *wire.FromNode_Load:
		s.mu.Lock()
		s.loads[c.node] = m.Load
		s.mu.Unlock()
		s.post(ctx, cluster.Heard{Node: c.node, Conn: c.id})
	case *wire.FromNode_Log:
		if s.cfg.Logs != nil {
			s.cfg.Logs(c.node, m.Log)
		}
	case *wire.FromNode_Result:
		s.mu.Lock()
		if sent, ok := s.sent[m.Result.Command]; ok {
			delete(s.sent, m.Result.Command)
			s.cfg.Observe(sent.kind.String(), time.Since(sent.at))
		}
		s.mu.Unlock()
		s.post(ctx, cluster.Finished{Node: c.node, Conn: c.id, Command: m.Result.Command, Err: m.Result.Error})
	case *wire.FromNode_Bye:
		s.post(ctx, cluster.Left{Node: c.node, Conn: c.id, Reason: m.Bye.Reason})
	case *wire.FromNode_Request:
		s.request(ctx, c, m.Request)
	case *wire.FromNode_CertificateRequest:
		answer := &wire.Certificate{Authority: s.desk.Bundle()}
		next, err := s.desk.Renew(ctx, id, cert, m.CertificateRequest.Request)
		if err != nil {
			answer.Error = err.Error()
		}
		answer.Certificate = next
		c.queue(&wire.ToNode{Message: &wire.ToNode_Certificate{Certificate: answer}})
	}
}

var operations = map[wire.Operation]cluster.Operation{
	wire.Operation_OPERATION_ADD: cluster.OpAdd, wire.Operation_OPERATION_DEL: cluster.OpDel,
	wire.Operation_OPERATION_POWEROFF: cluster.OpPoweroff, wire.Operation_OPERATION_REBOOT: cluster.OpReboot,
}

func (s *Server) request(ctx context.Context, c *conn, r *wire.Request) {
	answer := func(errno unix.Errno, text string) {
		a := &wire.Answer{Request: r.Id}
		if errno != 0 {
			a.Errno, a.Error = unix.ErrnoName(errno), text
		}
		c.queue(&wire.ToNode{Message: &wire.ToNode_Answer{Answer: a}})
	}
	op, ok := operations[r.Operation]
	if !ok || len(r.Nodes) > cluster.MaxNodes {
		answer(unix.EINVAL, fmt.Sprintf("operation %d on %d nodes", r.Operation, len(r.Nodes)))
		return
	}
	nodes := make([]int, len(r.Nodes))
	for i, id := range r.Nodes {
		nodes[i] = int(id)
	}
	s.ask(ctx, c.node, op, nodes, answer)
}

// flush sends what there is to send: the membership first, so that a node that
// is told to do something knows what the head knew.
func (s *Server) flush(stream grpc.BidiStreamingServer[wire.FromNode, wire.ToNode], c *conn) error {
	c.mu.Lock()
	pending, shown, closed := c.pending, c.shown, c.closed
	c.pending = nil
	c.mu.Unlock()
	if shown {
		if m := s.changes(c); m != nil {
			if err := stream.Send(m); err != nil {
				return err
			}
		}
	}
	for _, m := range pending {
		if err := stream.Send(m); err != nil {
			return err
		}
	}
	if closed != "" {
		return status.Error(codes.Aborted, closed)
	}
	return nil
}

// delta is a membership message that many streams want.
type delta struct {
	from, to uint64
	message  *wire.ToNode
}

// changes is what the node behind c doesn't know yet; nil: nothing.
func (s *Server) changes(c *conn) *wire.ToNode {
	s.mu.Lock()
	defer s.mu.Unlock()
	from, to := c.revision, s.revision
	if from == to {
		return nil
	}
	c.revision = to
	if s.delta.message == nil || s.delta.from != from || s.delta.to != to {
		m := &wire.Membership{Complete: from == 0, Revision: to}
		for _, member := range s.shown {
			if member.changed > from && (from != 0 || member.State != cluster.Possible) {
				m.Members = append(m.Members, wire.FromMember(member.Member))
			}
		}
		s.delta = delta{from, to, &wire.ToNode{Message: &wire.ToNode_Membership{Membership: m}}}
	}
	return s.delta.message
}
