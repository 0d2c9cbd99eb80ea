// Package coordinator is the head's side of the cluster: it brings the core's
// decisions (package cluster) together with the nodes' streams, the state store
// and the network.
//
// Every node's daemon holds one gRPC stream to Server.Serve's listener. What
// comes in on the streams, what probes find and what people ask for become
// events; one goroutine feeds them to the core, many at a time when there are
// many, and carries out the actions: save, publish, then the rest.
//
// Whether a peer is a member is decided before, in the TLS handshake, by the
// Desk. A stream that doesn't say hello at once is ended.
package coordinator

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"iter"
	"log/slog"
	"maps"
	"net"
	"net/netip"
	"strconv"
	"sync"
	"time"

	"golang.org/x/net/netutil"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	"krgimage/services/cluster"
	"krgimage/services/cluster/liveness"
	"krgimage/services/cluster/wire"
	"krgimage/services/identity"
	"krgimage/services/state"
)

// Keys in the state store.
const (
	nodePrefix = "cluster/node/"
	termKey    = "cluster/term"
)

// Desk says who is a member; *admission.Desk is one.
type Desk interface {
	ServerTLS() *tls.Config
	Renew(ctx context.Context, peer identity.ID, cert *x509.Certificate, csr []byte) ([]byte, error)
	Bundle() []byte
}

// Config is what a Server works from.
type Config struct {
	Store   state.Store
	Policy  cluster.Policy
	Timing  cluster.Timing // zero: cluster.DefaultTiming
	Timeout time.Duration  // after which a machine that doesn't acknowledge counts as gone; default 2 s
	// Dial connects to a node, for probes; nil: net.Dialer.
	Dial func(context.Context, netip.AddrPort) (net.Conn, error)
	// Logs takes the nodes' log batches; nil: they are dropped.
	Logs func(node int, batch *wire.LogBatch)
	// Observe takes how long something took: "save", "join", "leave", "fence",
	// "request". May be nil.
	Observe func(what string, took time.Duration)
	Log     *slog.Logger // nil: silent
}

// Server is the cluster's coordinator. Make one with Open.
type Server struct {
	cfg    Config
	log    *slog.Logger
	term   state.Revision // of our entry under termKey: nobody else writes while it stands
	events chan cluster.Event
	view   *cluster.View
	desk   Desk          // set by Serve
	ended  chan struct{} // closed when Serve ends

	mu       sync.Mutex
	core     *cluster.Core                       // guarded by mu
	conns    map[uint64]*conn                    // guarded by mu
	requests map[uint64]func(unix.Errno, string) // guarded by mu
	sent     map[uint64]sent                     // commands under way; guarded by mu
	counts   map[cluster.Kind]uint64             // guarded by mu
	loads    map[int]*wire.Load                  // guarded by mu
	last     uint64                              // guarded by mu: number of the last stream or request
	shown    map[int]shown                       // saved members, and those that are gone; guarded by mu
	revision uint64                              // of shown; guarded by mu
	delta    delta                               // guarded by mu
}

// shown is a member as the nodes may know it.
type shown struct {
	cluster.Member
	changed uint64 // revision
}

// sent is a command that hasn't ended.
type sent struct {
	kind cluster.CommandKind
	at   time.Time
}

// ErrTakenOver says that another head works with the same store.
var ErrTakenOver = errors.New("another head node has taken over this cluster")

// Open reads the records of earlier heads and takes the cluster over.
func Open(ctx context.Context, cfg Config) (*Server, error) {
	if cfg.Timing == (cluster.Timing{}) {
		cfg.Timing = cluster.DefaultTiming()
	}
	if cfg.Timeout == 0 {
		cfg.Timeout = 2 * time.Second
	}
	if cfg.Dial == nil {
		cfg.Dial = func(ctx context.Context, a netip.AddrPort) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "tcp", a.String())
		}
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.Observe == nil {
		cfg.Observe = func(string, time.Duration) {}
	}
	s := &Server{
		cfg: cfg, log: cfg.Log.With("component", "cluster"), events: make(chan cluster.Event, 1024), view: cluster.NewView(),
		conns: map[uint64]*conn{}, requests: map[uint64]func(unix.Errno, string){}, sent: map[uint64]sent{},
		counts: map[cluster.Kind]uint64{}, loads: map[int]*wire.Load{}, shown: map[int]shown{}, ended: make(chan struct{}),
	}
	term, err := s.takeOver(ctx)
	if err != nil {
		return nil, err
	}
	entries, _, err := cfg.Store.List(ctx, nodePrefix)
	if err != nil {
		return nil, fmt.Errorf("read the nodes' states: %w", err)
	}
	var records []cluster.Record
	for _, e := range entries {
		var r cluster.Record
		if err := json.Unmarshal(e.Value, &r); err != nil {
			return nil, fmt.Errorf("the state store's record %s: %w", e.Key, err)
		}
		records = append(records, r)
	}
	s.core = cluster.NewCore(time.Now(), records, cfg.Policy, cfg.Timing, term<<32)
	s.publish(0, s.core.Membership(), s.core.ChangedSince(0), nil)
	return s, nil
}

// takeOver counts the heads that this cluster has had. An earlier one that still
// runs notices it at its next write.
func (s *Server) takeOver(ctx context.Context) (term uint64, err error) {
	for {
		e, err := s.cfg.Store.Get(ctx, termKey)
		if err != nil && !errors.Is(err, state.ErrNotFound) {
			return 0, fmt.Errorf("read the state store: %w", err)
		}
		if len(e.Value) > 0 {
			if term, err = strconv.ParseUint(string(e.Value), 10, 31); err != nil {
				return 0, fmt.Errorf("the state store's record %s: %w", termKey, err)
			}
		}
		term++
		s.term, err = s.cfg.Store.Apply(ctx, state.Txn{
			If:   []state.Condition{{Key: termKey, Mod: e.Mod}},
			Puts: []state.Put{{Key: termKey, Value: strconv.AppendUint(nil, term, 10)}},
		})
		if !errors.Is(err, state.ErrConflict) {
			if err != nil {
				err = fmt.Errorf("write the state store: %w", err)
			}
			return term, err
		}
	}
}

// Limits of the listener.
const (
	maxConns     = 1024
	helloTimeout = 20 * time.Second // handshake and hello of a node under emulation
	maxMessage   = 1 << 20          // bytes
)

// Serve answers nodes on l until ctx ends, and closes l.
func (s *Server) Serve(ctx context.Context, l net.Listener, desk Desk) error {
	s.desk = desk
	defer close(s.ended)
	server := grpc.NewServer(
		grpc.Creds(credentials.NewTLS(desk.ServerTLS())), grpc.ConnectionTimeout(helloTimeout),
		grpc.MaxRecvMsgSize(maxMessage), grpc.MaxConcurrentStreams(4), grpc.WaitForHandlers(true),
	)
	wire.RegisterClusterServer(server, &streams{s: s})
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return s.loop(ctx) })
	group.Go(func() error {
		stop := context.AfterFunc(ctx, server.Stop)
		defer stop()
		err := server.Serve(liveness.Listener(netutil.LimitListener(l, maxConns), s.cfg.Timeout))
		if ctx.Err() != nil {
			return nil
		}
		return fmt.Errorf("cluster service: %w", err)
	})
	err := group.Wait()
	server.Stop()
	return err
}

// post hands an event to the loop.
func (s *Server) post(ctx context.Context, e cluster.Event) {
	select {
	case s.events <- e:
	case <-ctx.Done():
	case <-s.ended:
	}
}

// maxBatch bounds how many events are taken in one step.
const maxBatch = 2048

// loop feeds the core.
func (s *Server) loop(ctx context.Context) error {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		var batch []cluster.Event
		select {
		case <-ctx.Done():
			return nil
		case e := <-s.events:
			batch = append(batch, e)
		case <-timer.C:
		}
	more:
		for len(batch) < maxBatch {
			select {
			case e := <-s.events:
				batch = append(batch, e)
			default:
				break more
			}
		}
		now := time.Now()
		s.mu.Lock()
		before := s.core.Revision()
		actions := s.core.Step(now, batch...)
		next, ok := s.core.Next()
		members, changed := s.core.Membership(), s.core.ChangedSince(before)
		s.mu.Unlock()
		if err := s.save(ctx, actions); err != nil {
			if ctx.Err() != nil {
				return nil
			}
			return err
		}
		s.publish(before, members, changed, batch)
		for _, a := range actions {
			s.carryOut(ctx, a)
		}
		if ok {
			timer.Reset(time.Until(next))
		} else {
			timer.Stop()
		}
	}
}

// save writes the records of all Save actions in one transaction. It goes on
// trying: without its store the head must not decide anything.
func (s *Server) save(ctx context.Context, actions []cluster.Action) error {
	records := map[int]cluster.Record{}
	for _, a := range actions {
		if a, ok := a.(cluster.Save); ok {
			records[a.Record.ID] = a.Record
		}
	}
	if len(records) == 0 {
		return nil
	}
	txn := state.Txn{If: []state.Condition{{Key: termKey, Mod: s.term}}}
	for id, r := range records {
		value, err := json.Marshal(r)
		if err != nil {
			return err
		}
		txn.Puts = append(txn.Puts, state.Put{Key: nodePrefix + strconv.Itoa(id), Value: value})
	}
	began := time.Now()
	for wait := 50 * time.Millisecond; ; wait = min(2*wait, 5*time.Second) {
		_, err := s.cfg.Store.Apply(ctx, txn)
		switch {
		case err == nil:
			s.cfg.Observe("save", time.Since(began))
			return nil
		case errors.Is(err, state.ErrConflict):
			return ErrTakenOver
		case errors.Is(err, state.ErrInvalid), errors.Is(err, state.ErrClosed), ctx.Err() != nil:
			return fmt.Errorf("save the nodes' states: %w", err)
		}
		s.log.Error("the nodes' states can't be saved; nothing is decided until they can", "err", err, "again_in", wait)
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(wait):
		}
	}
}

// publish shows a saved membership to the nodes and to the head's own services.
// Streams whose Connected was in the batch get it whole.
func (s *Server) publish(before uint64, m cluster.Membership, changed []cluster.Member, batch []cluster.Event) {
	s.mu.Lock()
	for _, member := range changed {
		s.shown[member.ID] = shown{member, m.Revision}
	}
	s.revision = m.Revision
	for _, e := range batch {
		if e, ok := e.(cluster.Connected); ok && s.conns[e.Conn] != nil {
			s.conns[e.Conn].welcome()
		}
	}
	if m.Revision != before {
		for _, c := range s.conns {
			c.nudge()
		}
	}
	s.mu.Unlock()
	if m.Revision != before {
		s.view.Set(m)
	}
}

// carryOut does what comes after saving and publishing.
func (s *Server) carryOut(ctx context.Context, a cluster.Action) {
	switch a := a.(type) {
	case cluster.Send:
		s.mu.Lock()
		c := s.conns[a.Conn]
		if c != nil && a.Kind <= cluster.CmdFence {
			s.sent[a.Command] = sent{a.Kind, time.Now()}
		}
		s.mu.Unlock()
		if c != nil {
			c.queue(&wire.ToNode{Message: &wire.ToNode_Command{Command: &wire.Command{
				Id: a.Command, Kind: kinds[a.Kind], Epoch: a.Epoch, Reason: a.Reason,
			}}})
		}
	case cluster.Close:
		s.mu.Lock()
		c := s.conns[a.Conn]
		s.mu.Unlock()
		if c != nil {
			c.close(a.Reason)
		}
	case cluster.Probe:
		go s.probe(ctx, a) // ends within probeTimeout
	case cluster.Answer:
		s.mu.Lock()
		answer := s.requests[a.Request]
		delete(s.requests, a.Request)
		s.mu.Unlock()
		if answer != nil {
			answer(a.Errno, a.Text)
		}
	case cluster.Note:
		s.mu.Lock()
		s.counts[a.Kind]++
		s.mu.Unlock()
		level := slog.LevelInfo
		switch a.Kind {
		case cluster.NoteDied, cluster.NoteFenced, cluster.NoteJoinFailed, cluster.NoteRefused, cluster.NoteRevoked, cluster.NoteLost:
			level = slog.LevelWarn
		}
		s.log.Log(ctx, level, "node "+string(a.Kind), "node", a.Node, "epoch", a.Epoch, "what", a.Text)
	}
}

var kinds = map[cluster.CommandKind]wire.Kind{
	cluster.CmdJoin: wire.Kind_KIND_JOIN, cluster.CmdLeave: wire.Kind_KIND_LEAVE, cluster.CmdFence: wire.Kind_KIND_FENCE,
	cluster.CmdPoweroff: wire.Kind_KIND_POWEROFF, cluster.CmdReboot: wire.Kind_KIND_REBOOT,
}

// probePort is where probes knock. It doesn't matter whether something listens:
// a refusal is an answer of the machine's kernel.
const (
	probePort    = 7471
	probeTimeout = 700 * time.Millisecond
)

func (s *Server) probe(ctx context.Context, p cluster.Probe) {
	ctx, cancel := context.WithTimeout(ctx, probeTimeout)
	defer cancel()
	knock := func(a netip.Addr) bool {
		conn, err := s.cfg.Dial(ctx, netip.AddrPortFrom(a, probePort))
		if err == nil {
			conn.Close()
		}
		return err == nil || errors.Is(err, unix.ECONNREFUSED)
	}
	witness := make(chan bool, len(p.Witnesses))
	for _, a := range p.Witnesses {
		go func() { witness <- knock(a) }()
	}
	result := cluster.Probed{Node: p.Node, Probe: p.Probe, Answers: knock(p.Address)}
	for range p.Witnesses {
		if result.Answers || result.Witness {
			break
		}
		result.Witness = <-witness
	}
	s.post(context.WithoutCancel(ctx), result)
}

// Snapshot implements cluster.Members.
func (s *Server) Snapshot() cluster.Membership { return s.view.Snapshot() }

// Watch implements cluster.Members.
func (s *Server) Watch(ctx context.Context) iter.Seq[cluster.Membership] { return s.view.Watch(ctx) }

// Alive says whether a node's machine is running: admission.Config.Alive.
func (s *Server) Alive(node int) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.core.Alive(node, time.Now())
}

// Ended is told when a node's identity isn't valid any more:
// admission.Config.Ended.
func (s *Server) Ended(node int, fingerprint string, why error) {
	if errors.Is(why, identity.ErrRevoked) {
		s.post(context.Background(), cluster.Revoked{Node: node})
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, c := range s.conns {
		if c.node == node && c.fingerprint == fingerprint {
			c.close(why.Error())
		}
	}
}

// Do carries out what the head's admin asks for and waits for its end.
func (s *Server) Do(ctx context.Context, op cluster.Operation, nodes []int) error {
	type answer struct {
		errno unix.Errno
		text  string
	}
	answers := make(chan answer, 1)
	s.ask(ctx, cluster.FromHead, op, nodes, func(errno unix.Errno, text string) { answers <- answer{errno, text} })
	select {
	case <-ctx.Done():
		return ctx.Err()
	case a := <-answers:
		if a.errno != 0 {
			return fmt.Errorf("%s: %w", a.text, a.errno)
		}
		return nil
	}
}

func (s *Server) ask(ctx context.Context, from int, op cluster.Operation, nodes []int, answer func(unix.Errno, string)) {
	began := time.Now()
	s.mu.Lock()
	s.last++
	id := s.last
	s.requests[id] = func(errno unix.Errno, text string) {
		s.cfg.Observe("request", time.Since(began))
		answer(errno, text)
	}
	s.mu.Unlock()
	s.post(ctx, cluster.Asked{Request: id, From: from, Operation: op, Nodes: nodes})
}

// Stats are counters since the start, and what is now.
type Stats struct {
	Notes     map[cluster.Kind]uint64 // what happened, how often
	Connected int                     // streams
	Present   int                     // nodes
	Online    int
	Loads     map[int]*wire.Load // last sample of each connected node; not to be changed
}

// Stats returns the counters.
func (s *Server) Stats() Stats {
	m := s.view.Snapshot()
	s.mu.Lock()
	defer s.mu.Unlock()
	return Stats{Notes: maps.Clone(s.counts), Connected: len(s.conns), Present: len(m.Nodes) - m.Online(), Online: m.Online(), Loads: maps.Clone(s.loads)}
}
