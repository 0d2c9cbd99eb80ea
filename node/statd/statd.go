// Package statd is what the node's kernel needs beside it to take NFS locks:
// an rpcbind, in which the kernel enters its lock manager and looks up the
// status monitor, and that status monitor (NSM).
//
//	node's kernel ─ SET, MON ─► rpcbind, statd           on loopback
//	root server   ─ GETPORT ──► rpcbind                  to call the lock manager back
//	root server   ─ NOTIFY ───► statd ─► kernel          "I came up": it reclaims its locks
//	Announce      ─ NOTIFY ───► root server's statd      "this node came up": it frees the node's
//
// Only root of the node itself may change anything, only the root server hears
// anything, and only its word makes the kernel reclaim. PID 1 runs it; what the
// kernel entered lives as long as PID 1 does, however often a socket fails.
package statd

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"krgimage/nfsroot/nsm"
	"krgimage/nfsroot/rpcbind"
	"krgimage/nfsroot/sunrpc"
)

// LocalSocket is the abstract unix socket on which newer kernels look for
// rpcbind before they try TCP (rpcb_create_af_local in net/sunrpc/rpcb_clnt.c).
const LocalSocket = "@/run/rpcbind.sock"

// Config is what a Monitor is made of.
type Config struct {
	Name   string     // of the node, as it calls itself in locks
	Server netip.Addr // the root's
	State  int32      // the node's state number in this life (nsm.StateAt)
	Log    *slog.Logger
}

// Monitor is rpcbind and statd.
type Monitor struct {
	cfg      Config
	log      *slog.Logger
	registry rpcbind.Registry
	notify   chan nsm.Notice // from the server

	mu      sync.Mutex
	state   int32                 // guarded by mu
	watched map[watchKey]callback // guarded by mu
}

// watchKey is what SM_MON calls a mon_id.
type watchKey struct {
	host             string
	prog, vers, proc uint32
}

// callback is how the kernel wants to hear of a host: the 16 bytes are its own.
type callback struct {
	key  watchKey
	priv [16]byte
}

// maxWatched bounds the watched hosts; a node has one server.
const maxWatched = 64

// New makes a monitor that serves nothing yet.
func New(cfg Config) *Monitor {
	m := &Monitor{cfg: cfg, log: cfg.Log, state: cfg.State, watched: map[watchKey]callback{}, notify: make(chan nsm.Notice, 16)}
	if m.log == nil {
		m.log = slog.New(slog.DiscardHandler)
	}
	m.log = m.log.With("component", "statd")
	return m
}

// Sockets are what a monitor listens on.
type Sockets struct {
	streams []net.Listener
	packets net.PacketConn
}

// Listen opens port 111 of all the node's addresses, TCP and UDP, and the
// kernel's unix socket.
func Listen() (*Sockets, error) {
	s := &Sockets{}
	var err error
	listen := func(network, address string) {
		if err == nil {
			var l net.Listener
			if l, err = net.Listen(network, address); err == nil {
				s.streams = append(s.streams, l)
			}
		}
	}
	port := fmt.Sprintf("0.0.0.0:%d", rpcbind.Port)
	listen("tcp4", port)
	listen("unix", LocalSocket)
	if err == nil {
		s.packets, err = net.ListenPacket("udp4", port)
	}
	if err != nil {
		s.Close()
		return nil, fmt.Errorf("rpcbind, without which there are no locks: %w", err)
	}
	return s, nil
}

// Close closes the sockets.
func (s *Sockets) Close() {
	for _, l := range s.streams {
		l.Close()
	}
	if s.packets != nil {
		s.packets.Close()
	}
}

// Serve answers on the sockets until ctx ends, which closes them.
func (m *Monitor) Serve(ctx context.Context, s *Sockets) error {
	for _, n := range []string{"tcp", "udp"} {
		for vers := uint32(2); vers <= 4; vers++ {
			m.registry.Set(rpcbind.Entry{Prog: sunrpc.ProgramRPCBind, Vers: vers, Net: n, Port: rpcbind.Port, Owner: "krg"})
		}
		m.registry.Set(rpcbind.Entry{Prog: sunrpc.ProgramNSM, Vers: nsm.Version, Net: n, Port: rpcbind.Port, Owner: "krg"})
	}
	server := &sunrpc.Server{
		Programs: []sunrpc.Program{m.registry.Program(nil, true), m.program()},
		Allow:    func(a netip.Addr) bool { return a.IsLoopback() || a == m.cfg.Server },
		Log:      m.log,
	}
	group, ctx := errgroup.WithContext(ctx)
	for _, l := range s.streams {
		group.Go(func() error { return server.Serve(ctx, l) })
	}
	group.Go(func() error { return server.ServePacket(ctx, s.packets) })
	group.Go(func() error { m.forward(ctx); return nil })
	return group.Wait()
}

// program is NSM.
func (m *Monitor) program() sunrpc.Program {
	return sunrpc.Program{Number: sunrpc.ProgramNSM, Low: nsm.Version, High: nsm.Version, Handle: func(c *sunrpc.Call) sunrpc.Accept {
		own := c.Loopback() && c.Privileged
		m.mu.Lock()
		defer m.mu.Unlock()
		switch c.Proc {
		case nsm.ProcNull:
		case nsm.ProcStat:
			c.Args.String(nsm.MaxName)
			m.result(c, own)
		case nsm.ProcMon:
			b := callback{key: readKey(c.Args)}
			c.Args.Fixed(b.priv[:])
			if c.Args.Bad() {
				return sunrpc.GarbageArgs
			}
			_, again := m.watched[b.key]
			own = own && (again || len(m.watched) < maxWatched)
			if own {
				m.watched[b.key] = b
			}
			m.result(c, own)
		case nsm.ProcUnmon:
			k := readKey(c.Args)
			if own {
				delete(m.watched, k)
			}
			c.Reply.Uint32(uint32(m.state))
		case nsm.ProcUnmonAll:
			if own {
				clear(m.watched)
			}
			c.Reply.Uint32(uint32(m.state))
		case nsm.ProcSimuCrash:
			if own {
				m.state += 2
				m.log.Warn("a crash is simulated: the server frees this node's locks")
				state := m.state
				go func() {
					ctx, cancel := context.WithTimeout(context.Background(), announceTimeout)
					defer cancel()
					_ = m.announce(ctx, state)
				}()
			}
		case nsm.ProcNotify:
			n := nsm.DecodeNotice(c.Args)
			if c.Args.Bad() {
				return sunrpc.GarbageArgs
			}
			if !own && c.Peer.Addr() != m.cfg.Server {
				break
			}
			select {
			case m.notify <- n:
			default: // it comes again
				return sunrpc.SystemErr
			}
		default:
			return sunrpc.ProcUnavail
		}
		if c.Args.Bad() {
			return sunrpc.GarbageArgs
		}
		return sunrpc.Success
	}}
}

func readKey(d *sunrpc.Decoder) watchKey {
	k := watchKey{host: d.String(nsm.MaxName)}
	d.String(nsm.MaxName) // the node's own name
	k.prog, k.vers, k.proc = d.Uint32(), d.Uint32(), d.Uint32()
	return k
}

// result is an sm_stat_res.
func (m *Monitor) result(c *sunrpc.Call, ok bool) {
	c.Reply.Bool(!ok) // STAT_SUCC is 0
	c.Reply.Uint32(uint32(m.state))
}

// forward tells the kernel that the server came up. Whatever name the server
// gives itself: there is one, and it was known by its address.
func (m *Monitor) forward(ctx context.Context) {
	for {
		var n nsm.Notice
		select {
		case <-ctx.Done():
			return
		case n = <-m.notify:
		}
		m.mu.Lock()
		var list []callback
		for _, b := range m.watched {
			list = append(list, b)
		}
		m.mu.Unlock()
		m.log.Info("the root server was restarted: reclaiming locks", "name", n.Name, "state", n.State)
		for _, b := range list {
			if err := m.tellKernel(ctx, b, n); err != nil {
				m.log.Error("the kernel doesn't hear that it has to reclaim its locks: they may be lost", "err", err)
			}
		}
	}
}

func (m *Monitor) tellKernel(ctx context.Context, b callback, n nsm.Notice) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	port := m.registry.Find(b.key.prog, b.key.vers, "tcp")
	if port == 0 {
		return errors.New("the kernel has no lock manager")
	}
	nc, err := sunrpc.DialPrivileged(ctx, netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), port))
	if err != nil {
		return err
	}
	defer nc.Close()
	_, err = sunrpc.Do(ctx, nc, b.key.prog, b.key.vers, b.key.proc, func(e *sunrpc.Encoder) {
		e.String(b.key.host)
		e.Uint32(uint32(n.State))
		e.Fixed(b.priv[:])
	})
	return err
}

// announceTimeout bounds one attempt to reach the server.
const announceTimeout = 10 * time.Second

// procFreeAll is NLM_FREE_ALL of version 4.
const (
	nlmVersion  = 4
	procFreeAll = 23
)

// Announce tells the root server that this node came up, so that it frees what
// the node held in an earlier life. It tries once. rpcbind.ErrNotRegistered
// says that the server has no lock manager.
func (m *Monitor) Announce(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, announceTimeout)
	defer cancel()
	m.mu.Lock()
	state := m.state
	m.mu.Unlock()
	return m.announce(ctx, state)
}

// announce tells the status monitor, and the lock manager itself: one of them
// may not know the node, or belong to something else on that machine.
func (m *Monitor) announce(ctx context.Context, state int32) error {
	port, err := rpcbind.GetPort(ctx, sunrpc.DialPrivileged, m.cfg.Server, sunrpc.ProgramNLM, nlmVersion)
	if err != nil {
		return err
	}
	notice := nsm.Notice{Name: m.cfg.Name, State: state}
	nsmErr := notice.Send(ctx, sunrpc.DialPrivileged, m.cfg.Server)
	nlmErr := func() error {
		nc, err := sunrpc.DialPrivileged(ctx, netip.AddrPortFrom(m.cfg.Server, port))
		if err != nil {
			return err
		}
		defer nc.Close()
		_, err = sunrpc.Do(ctx, nc, sunrpc.ProgramNLM, nlmVersion, procFreeAll, notice.Encode)
		return err
	}()
	if nsmErr != nil && nlmErr != nil {
		return errors.Join(nsmErr, nlmErr)
	}
	return nil
}
