// Package nlm is the lock manager of the shared root: flock(2) and fcntl(2)
// locks between the nodes, which their kernels ask for by NLM version 4 (X/Open
// XNFS chapter 14; RFC 1813 section 6), and the status monitor NSM, by which
// servers and clients hear of each other's restarts.
//
// The way of a lock:
//
//	proc.go     a call is decoded, its file handle verified (by the file server),
//	            the caller's right to lock checked
//	table.go    ranges, owners, who waits for whom; deadlocks
//	journal.go  every change is written down before the client hears of it
//	grant.go    what becomes free goes to those who wait, by a call-back
//	nsm.go      a client that boots loses its locks; after a restart of this
//	            machine the clients reclaim theirs
//
// The journal makes a restart of the server process, however sudden, invisible:
// all locks and all waiting requests are there again, and no grace period is
// needed. Only when the machine itself went down (its boot id tells) are the
// clients told and given a while to reclaim, because the last records may not
// have reached the disk.
//
// The package opens no socket: the head hands it listeners and a way to call
// clients, on a real interface or on the network of a trial.
package nlm

import (
	"context"
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

// Files is what the lock manager asks of the file server.
type Files interface {
	// LockKey returns what names the file of a handle, for as long as the file
	// exists and across restarts, and whether the handle is one of the server's.
	// The file itself may be gone.
	LockKey(handle []byte) (key string, ok bool)
	// MayLock says whether a caller may lock the file: unix.ESTALE when it is
	// gone, unix.EROFS, unix.EACCES, or another error.
	MayLock(handle []byte, caller sunrpc.Cred, exclusive bool) error
}

// Config is what a Server is made of.
type Config struct {
	Files   Files
	Journal string        // file that keeps the locks
	BootID  string        // names this boot of the machine: /proc/sys/kernel/random/boot_id
	Name    string        // by which clients know this machine: the address that they mount from
	Dial    sunrpc.Dialer // calls clients, from that address
	Allow   func(netip.Addr) bool
	Grace   time.Duration // for reclaims after a restart of the machine; 0 means DefaultGrace
	Log     *slog.Logger  // nil: silent
}

// DefaultGrace is time enough for every client to hear of the restart and to
// reclaim.
const DefaultGrace = 45 * time.Second

// Bounds of what one client can hold.
const (
	maxLocks   = 100_000
	maxWaiters = 10_000
)

// Server is a lock manager. Its methods may be called from any goroutine.
type Server struct {
	cfg   Config
	log   *slog.Logger
	count counters

	mu      sync.Mutex
	state   *state                  // guarded by mu
	journal *journal                // guarded by mu
	grace   bool                    // only reclaims are granted; guarded by mu
	later   []func(context.Context) // what Serve is to do beside; guarded by mu
	wake    chan struct{}           // holds a token when later is not empty
	ports   map[netip.Addr]uint16   // of the clients' lock managers; guarded by mu
	told    map[netip.Addr]bool     // clients that heard of the restart; guarded by mu
}

// New reads the journal. Close releases it.
func New(cfg Config) (*Server, error) {
	s := &Server{cfg: cfg, log: cfg.Log, wake: make(chan struct{}, 1), ports: map[netip.Addr]uint16{}, told: map[netip.Addr]bool{}}
	if s.log == nil {
		s.log = slog.New(slog.DiscardHandler)
	}
	s.log = s.log.With("component", "locks")
	if s.cfg.Grace == 0 {
		s.cfg.Grace = DefaultGrace
	}
	var err error
	if s.journal, s.state, err = openJournal(cfg.Journal, s.log); err != nil {
		return nil, err
	}
	rebooted := s.state.bootID != "" && s.state.bootID != cfg.BootID
	if s.state.bootID != cfg.BootID {
		s.state.number = max(s.state.number+2, nsm.StateAt(time.Now()))
		s.state.bootID = cfg.BootID
	}
	if rebooted {
		s.afterReboot()
	}
	if err := s.journal.rewrite(s.state); err != nil {
		return nil, err
	}
	for key, f := range s.state.files {
		for _, w := range f.waiters {
			if w.granting {
				s.callBack(w.id)
			}
		}
		s.pump(key)
	}
	if n := len(s.state.clients); n > 0 {
		s.log.Info("locks are back", "clients", n, "locks", s.locks())
	}
	return s, nil
}

// Close ends the use of the journal. Call it after Serve has returned.
func (s *Server) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.journal.Close()
	return nil
}

// Entries is what a directory of programs must say of a lock manager on a port.
func Entries(port uint16, nets ...string) []rpcbind.Entry {
	var list []rpcbind.Entry
	for _, n := range nets {
		list = append(list,
			rpcbind.Entry{Prog: sunrpc.ProgramNLM, Vers: Version, Net: n, Port: port, Owner: "krgimage"},
			rpcbind.Entry{Prog: sunrpc.ProgramNSM, Vers: nsm.Version, Net: n, Port: port, Owner: "krgimage"})
	}
	return list
}

// Serve answers clients on a listener, and on a datagram socket if there is
// one, and tells them what they are to be told, until ctx ends; then it returns
// nil. It can be called once. The directory, if there is one, is served on the
// same sockets.
func (s *Server) Serve(ctx context.Context, tcp net.Listener, udp net.PacketConn, directory *rpcbind.Registry) error {
	server := &sunrpc.Server{Programs: []sunrpc.Program{s.nlmProgram(), s.nsmProgram()}, Allow: s.cfg.Allow, Log: s.log}
	if directory != nil {
		server.Programs = append(server.Programs, directory.Program(nil, false))
	}
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return server.Serve(ctx, tcp) })
	if udp != nil {
		group.Go(func() error { return server.ServePacket(ctx, udp) })
	}
	s.mu.Lock()
	if s.grace {
		s.begin(s.tellClients)
	}
	s.mu.Unlock()
	group.Go(func() error {
		for {
			select {
			case <-ctx.Done():
				return nil
			case <-s.wake:
			}
			s.mu.Lock()
			jobs := s.later
			s.later = nil
			s.mu.Unlock()
			for _, job := range jobs {
				group.Go(func() error { job(ctx); return nil })
			}
		}
	})
	return group.Wait()
}

// begin has Serve run a function beside it. The caller holds mu.
func (s *Server) begin(job func(context.Context)) {
	s.later = append(s.later, job)
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// write journals changes and then makes them, or does neither. The caller holds
// mu.
func (s *Server) write(entries ...entry) error {
	sync := false
	for _, x := range entries {
		c := x.lock.client
		if x.kind == opWait {
			c = x.waiter.want.client
		}
		if (x.kind == opLock || x.kind == opWait) && !s.state.clients[c] {
			entries = append([]entry{{kind: opClient, lock: lock{owner: owner{client: c}}}}, entries...)
			sync = true
			break
		}
	}
	if err := s.journal.write(s.state, sync, entries...); err != nil {
		s.count.journalErrors.Add(1)
		s.log.Error("locks can't be written down; none are granted until they can", "err", err)
		return err
	}
	s.apply(entries...)
	return nil
}

// mustWrite is write for changes that take something away: they are made even
// if they can't be written down, for the client will not ask again.
func (s *Server) mustWrite(entries ...entry) {
	if s.write(entries...) != nil {
		s.apply(entries...)
	}
}

func (s *Server) apply(entries ...entry) {
	var touched []string
	for _, x := range entries {
		touched = append(touched, s.state.apply(x)...)
		if x.kind == opLock { // a lock that was made weaker
			touched = append(touched, x.file)
		}
	}
	for _, key := range touched {
		s.pump(key)
	}
}

// ReleaseClient frees all that a client holds and wants: it is known to be
// dead, or to have started anew. It returns the number of locks freed.
func (s *Server) ReleaseClient(client netip.Addr) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.releaseClient(client, 0)
}

// releaseClient spares what was taken in a client's given state; 0 spares
// nothing. The caller holds mu.
func (s *Server) releaseClient(client netip.Addr, spare int32) int {
	if !s.state.clients[client] {
		return 0
	}
	before := s.state.held[client]
	s.mustWrite(entry{kind: opRelease, lock: lock{owner: owner{client: client}, state: spare}})
	delete(s.ports, client)
	n := before - s.state.held[client]
	s.count.released.Add(uint64(n))
	if n > 0 {
		s.log.Info("locks of a client freed", "client", client, "locks", n)
	}
	return n
}

func (s *Server) locks() int {
	n := 0
	for _, held := range s.state.held {
		n += held
	}
	return n
}
