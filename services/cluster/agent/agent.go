// Package agent is a node's side of the cluster: it keeps the stream to the
// head, does what the head says (join, leave, go down), and shows the node's
// services who is in the cluster.
//
// A head that is away changes nothing on the node: the agent asks for it again
// for ever, with back-off and jitter, and the membership stays as it was known
// last, marked as not connected. The agent's own end changes nothing either:
// the container is PID 1's.
package agent

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	"krgimage/node/retry"
	"krgimage/services/cluster"
	"krgimage/services/cluster/liveness"
	"krgimage/services/cluster/wire"
)

// Machine is what the agent does to its node: PID 1 is behind it.
type Machine interface {
	// Container says whether the container runs, starts or stops, and for which
	// join it was started.
	Container(ctx context.Context) (running bool, epoch uint64, err error)
	// Start starts the container; it returns when people can log in. If it fails
	// or ctx ends, no container is left.
	Start(ctx context.Context, epoch uint64) error
	// Stop ends the container and every process in it.
	Stop(ctx context.Context) error
	// Tell writes to all terminals of the container.
	Tell(text string)
	// Down begins to take the machine down, or to boot it again.
	Down(ctx context.Context, reboot bool, why string) error
}

// Leaving is what a Drainer is told.
type Leaving struct {
	Epoch  uint64
	Reason string // for people
}

// Drainer moves or ends what a service has on this node, before the node leaves
// the cluster. An error keeps the node in.
type Drainer interface {
	Drain(ctx context.Context, l Leaving) error
}

// Config is what an Agent works from.
type Config struct {
	Node     int
	Hostname string
	Address  func() netip.Addr // the node's
	Version  string            // of krg
	Head     netip.AddrPort
	TLS      *tls.Config // as a client of the head
	Machine  Machine
	Drainers []Drainer
	// Identify is called before each attempt, with the error of the last one; it
	// returns when the node has an identity that may be good. nil: it always has.
	Identify func(ctx context.Context, last error) error
	Timeout  time.Duration                                           // after which a head that doesn't acknowledge is gone; default 2 s
	Load     func() *wire.Load                                       // makes a load sample; nil: an empty one
	Every    time.Duration                                           // between load samples; default 2 s
	Logs     <-chan *wire.LogBatch                                   // goes to the head while there is one; may be nil
	Dial     func(context.Context, netip.AddrPort) (net.Conn, error) // nil: net.Dialer
	Clock    retry.Clock                                             // nil: retry.System
	Log      *slog.Logger
}

// Agent is a node's agent. Make one with New.
type Agent struct {
	cfg  Config
	log  *slog.Logger
	view *cluster.View
	work chan job

	mu       sync.Mutex
	session  *session               // nil: not connected; guarded by mu
	requests map[uint64]chan answer // guarded by mu
	last     uint64                 // number of the last request; guarded by mu
	joining  context.CancelFunc     // ends the join under way; nil: none; guarded by mu
	received uint64                 // number of the last command; guarded by mu
	undone   uint64                 // joins up to this number are taken back; guarded by mu
	renewing chan *wire.Certificate // the renewal under way; nil: none; guarded by mu
}

type answer struct{ errno, text string }

// job is a command with the stream that its result goes to.
type job struct {
	*wire.Command
	session *session
	number  uint64
}

// New returns an agent.
func New(cfg Config) *Agent {
	if cfg.Timeout == 0 {
		cfg.Timeout = 2 * time.Second
	}
	if cfg.Every == 0 {
		cfg.Every = 2 * time.Second
	}
	if cfg.Load == nil {
		cfg.Load = func() *wire.Load { return &wire.Load{} }
	}
	if cfg.Dial == nil {
		cfg.Dial = func(ctx context.Context, a netip.AddrPort) (net.Conn, error) {
			return (&net.Dialer{Timeout: 10 * time.Second}).DialContext(ctx, "tcp", a.String())
		}
	}
	if cfg.Clock == nil {
		cfg.Clock = retry.System{}
	}
	if cfg.Identify == nil {
		cfg.Identify = func(context.Context, error) error { return nil }
	}
	return &Agent{
		cfg: cfg, log: cfg.Log.With("component", "cluster"), view: cluster.NewView(), work: make(chan job, 64),
		requests: map[uint64]chan answer{},
	}
}

// Members is who is in the cluster.
func (a *Agent) Members() cluster.Members { return a.view }

// Run keeps the stream until ctx ends. If the container doesn't run then, the
// node is going down, and the head is told goodbye.
func (a *Agent) Run(ctx context.Context) error {
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { a.worker(ctx); return nil })
	group.Go(func() error { a.connect(ctx); return nil })
	return group.Wait()
}

// connect opens one stream after the other.
func (a *Agent) connect(ctx context.Context) {
	wait := retry.Backoff{Min: 100 * time.Millisecond, Max: 5 * time.Second, Jitter: 1}
	var last error
	said := ""
	for ctx.Err() == nil {
		err := a.cfg.Identify(ctx, last)
		if err == nil {
			var up bool
			up, err = a.stream(ctx)
			if up {
				wait.Reset()
				said = ""
			}
		}
		if ctx.Err() != nil {
			return
		}
		last = err
		d := wait.Next()
		if text := fmt.Sprint(err); text != said {
			a.log.Warn("the head is away; the node goes on and asks again", "head", a.cfg.Head, "err", err)
			said = text
		}
		if retry.Wait(ctx, a.cfg.Clock, d) != nil {
			return
		}
	}
}

// session is one stream.
type session struct {
	out  chan *wire.FromNode
	done chan struct{} // closed at its end
}

// send hands a message to the stream's sender; false when the stream has ended.
func (s *session) send(ctx context.Context, m *wire.FromNode) bool {
	select {
	case s.out <- m:
		return true
	case <-s.done:
	case <-ctx.Done():
	}
	return false
}

// stream is the life of one stream. up says that the head took it.
func (a *Agent) stream(ctx context.Context) (up bool, err error) {
	// Outlives ctx for a goodbye.
	streamCtx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()
	running, epoch, err := a.cfg.Machine.Container(ctx)
	if err != nil {
		return false, fmt.Errorf("ask for the container: %w", err)
	}
	conn, err := grpc.NewClient("passthrough:///"+a.cfg.Head.String(),
		grpc.WithTransportCredentials(credentials.NewTLS(a.cfg.TLS)),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return a.dial(ctx) }),
		grpc.WithDisableServiceConfig(), grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(1<<20)))
	if err != nil {
		return false, err
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { a.goodbye(ctx, cancel) })
	defer stop()
	stream, err := wire.NewClusterClient(conn).Connect(streamCtx)
	if err != nil {
		return false, err
	}
	err = stream.Send(&wire.FromNode{Message: &wire.FromNode_Hello{Hello: &wire.Hello{
		Hostname: a.cfg.Hostname, Address: a.cfg.Address().String(), Version: a.cfg.Version,
		Container: &wire.Container{Running: running, Epoch: epoch},
	}}})
	if err != nil {
		_, err = stream.Recv() // has the reason
		return false, err
	}
	s := &session{out: make(chan *wire.FromNode, 16), done: make(chan struct{})}
	go func() { a.sender(streamCtx, stream, s); cancel() }() // ends with the stream
	members := map[int]cluster.Member{}
	for {
		m, rerr := stream.Recv()
		if rerr != nil {
			err = rerr
			break
		}
		if !up {
			up = true
			a.attach(s)
		}
		a.take(s, members, m)
	}
	cancel()
	close(s.done)
	if up {
		a.detach(s)
	}
	return up, err
}

func (a *Agent) dial(ctx context.Context) (net.Conn, error) {
	conn, err := a.cfg.Dial(ctx, a.cfg.Head)
	if err != nil {
		return nil, err
	}
	if err := liveness.Watch(conn, a.cfg.Timeout); err != nil {
		conn.Close()
		return nil, err
	}
	return conn, nil
}

// sender sends what is queued, and load samples.
func (a *Agent) sender(ctx context.Context, stream grpc.BidiStreamingClient[wire.FromNode, wire.ToNode], s *session) {
	tick := time.NewTicker(a.cfg.Every)
	defer tick.Stop()
	for {
		var m *wire.FromNode
		select {
		case <-ctx.Done():
			return
		case m = <-s.out:
		case batch, ok := <-a.cfg.Logs:
			if !ok {
				a.cfg.Logs = nil
				continue
			}
			m = &wire.FromNode{Message: &wire.FromNode_Log{Log: batch}}
		case <-tick.C:
			m = &wire.FromNode{Message: &wire.FromNode_Load{Load: a.cfg.Load()}}
		}
		if stream.Send(m) != nil {
			return
		}
		if m.GetBye() != nil {
			_ = stream.CloseSend()
			return
		}
	}
}

// byeTimeout bounds the goodbye to a head that may be gone.
const byeTimeout = time.Second

// goodbye ends the stream because the agent ends. Only when the container has
// stopped is that an end of the node.
func (a *Agent) goodbye(ctx context.Context, cancel context.CancelFunc) {
	defer cancel()
	ctx, stop := context.WithTimeout(context.WithoutCancel(ctx), byeTimeout)
	defer stop()
	a.mu.Lock()
	s := a.session
	a.mu.Unlock()
	running, _, err := a.cfg.Machine.Container(ctx)
	if s == nil || err != nil || running {
		return
	}
	if s.send(ctx, &wire.FromNode{Message: &wire.FromNode_Bye{Bye: &wire.Bye{Reason: "shutdown"}}}) {
		select {
		case <-s.done: // the head has taken it
		case <-ctx.Done():
		}
	}
}

func (a *Agent) attach(s *session) {
	a.mu.Lock()
	a.session = s
	a.mu.Unlock()
	a.log.Info("connected to the head", "head", a.cfg.Head)
}

// detach marks what is known as old and ends the requests under way.
func (a *Agent) detach(s *session) {
	a.mu.Lock()
	if a.session == s {
		a.session = nil
	}
	for id, ch := range a.requests {
		ch <- answer{unix.ErrnoName(unix.ECONNRESET), "the head went away; 'krgadm nodes' tells what became of it"}
		delete(a.requests, id)
	}
	if a.renewing != nil {
		a.renewing <- &wire.Certificate{Error: "the head went away"}
		a.renewing = nil
	}
	a.mu.Unlock()
	m := a.view.Snapshot()
	m.Connected, m.AsOf = false, time.Now()
	a.view.Set(m)
}

// take handles a message of the head.
func (a *Agent) take(s *session, members map[int]cluster.Member, m *wire.ToNode) {
	switch m := m.Message.(type) {
	case *wire.ToNode_Membership:
		if m.Membership.Complete {
			clear(members)
		}
		for _, w := range m.Membership.Members {
			if member := w.ToMember(); member.State == cluster.Possible {
				delete(members, member.ID)
			} else {
				members[member.ID] = member
			}
		}
		now := cluster.Membership{Revision: m.Membership.Revision, Connected: true, AsOf: time.Now(), Nodes: make([]cluster.Member, 0, len(members))}
		for _, member := range members {
			now.Nodes = append(now.Nodes, member)
		}
		slices.SortFunc(now.Nodes, func(a, b cluster.Member) int { return a.ID - b.ID })
		a.view.Set(now)
	case *wire.ToNode_Command:
		a.command(job{Command: m.Command, session: s})
	case *wire.ToNode_Answer:
		a.mu.Lock()
		if ch := a.requests[m.Answer.Request]; ch != nil {
			ch <- answer{m.Answer.Errno, m.Answer.Error}
			delete(a.requests, m.Answer.Request)
		}
		a.mu.Unlock()
	case *wire.ToNode_Certificate:
		a.mu.Lock()
		if a.renewing != nil {
			a.renewing <- m.Certificate
			a.renewing = nil
		}
		a.mu.Unlock()
	}
}

// command queues a command. What isn't a join ends the join under way.
func (a *Agent) command(j job) {
	a.mu.Lock()
	a.received++
	j.number = a.received
	if j.Kind != wire.Kind_KIND_JOIN && j.Kind != wire.Kind_KIND_MESSAGE {
		a.undone = j.number
		if a.joining != nil {
			a.joining()
		}
	}
	a.mu.Unlock()
	select {
	case a.work <- j:
	default: // a head that sends that much is broken
		a.log.Error("too many commands of the head; one is dropped", "command", j.Kind)
	}
}

// ErrNotConnected says that the head is away.
var ErrNotConnected = errors.New("the head is away")

// Request asks the head to do something and waits for its end. A failure is an
// error with the errno's name.
func (a *Agent) Request(ctx context.Context, op wire.Operation, nodes []int) (errno, text string, err error) {
	a.mu.Lock()
	s := a.session
	a.last++
	id, ch := a.last, make(chan answer, 1)
	if s != nil {
		a.requests[id] = ch
	}
	a.mu.Unlock()
	if s == nil {
		return "", "", ErrNotConnected
	}
	r := &wire.Request{Id: id, Operation: op}
	for _, n := range nodes {
		r.Nodes = append(r.Nodes, int32(n))
	}
	s.send(ctx, &wire.FromNode{Message: &wire.FromNode_Request{Request: r}}) // if it can't, the stream's end answers
	select {
	case got := <-ch:
		return got.errno, got.text, nil
	case <-ctx.Done():
		a.mu.Lock()
		delete(a.requests, id)
		a.mu.Unlock()
		return "", "", ctx.Err()
	}
}

// Renew is an identity.Renewer: it asks for a certificate over the stream.
func (a *Agent) Renew(ctx context.Context, request []byte) (cert, authority []byte, err error) {
	ch := make(chan *wire.Certificate, 1)
	a.mu.Lock()
	s, busy := a.session, a.renewing != nil
	if s != nil && !busy {
		a.renewing = ch
	}
	a.mu.Unlock()
	switch {
	case s == nil:
		return nil, nil, ErrNotConnected
	case busy:
		return nil, nil, errors.New("a renewal is under way")
	}
	s.send(ctx, &wire.FromNode{Message: &wire.FromNode_CertificateRequest{CertificateRequest: &wire.CertificateRequest{Request: request}}})
	select {
	case c := <-ch:
		if c.Error != "" {
			return nil, nil, fmt.Errorf("the head doesn't renew the certificate: %s", c.Error)
		}
		return c.Certificate, c.Authority, nil
	case <-ctx.Done():
		a.mu.Lock()
		if a.renewing == ch {
			a.renewing = nil
		}
		a.mu.Unlock()
		return nil, nil, ctx.Err()
	}
}
