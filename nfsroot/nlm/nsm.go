package nlm

import (
	"context"
	"net/netip"
	"time"

	"krgimage/nfsroot/nsm"
	"krgimage/nfsroot/sunrpc"
)

// nsmProgram hears of clients that come up. It monitors nobody on demand: that
// is what it does for everyone who holds a lock.
func (s *Server) nsmProgram() sunrpc.Program {
	return sunrpc.Program{Number: sunrpc.ProgramNSM, Low: nsm.Version, High: nsm.Version, Handle: func(c *sunrpc.Call) sunrpc.Accept {
		switch c.Proc {
		case nsm.ProcNull:
		case nsm.ProcNotify:
			n := nsm.DecodeNotice(c.Args)
			if c.Args.Bad() {
				return sunrpc.GarbageArgs
			}
			if !s.trusted(c) {
				break
			}
			s.mu.Lock()
			defer s.mu.Unlock()
			client := c.Peer.Addr()
			s.log.Info("a client came up", "client", client, "name", n.Name, "state", n.State)
			s.releaseClient(client, n.State)
		default:
			return sunrpc.ProcUnavail
		}
		return sunrpc.Success
	}}
}

// afterReboot prepares for a new life of the machine: what the journal says of
// locks may be out of date, and only the clients know. New is its only caller.
func (s *Server) afterReboot() {
	for key, f := range s.state.files {
		for len(f.waiters) > 0 {
			s.state.forget(f.waiters[0]) // they ask again
		}
		for i := range f.locks {
			f.locks[i].confirmed = false
		}
		s.state.tidy(key)
	}
	if len(s.state.clients) == 0 {
		return
	}
	s.grace = true
}

// tellClients tells every client that held locks that this machine came up, so
// that it reclaims them, and ends the grace period.
func (s *Server) tellClients(ctx context.Context) {
	s.mu.Lock()
	var clients []netip.Addr
	for c := range s.state.clients {
		clients = append(clients, c)
	}
	notice := nsm.Notice{Name: s.cfg.Name, State: s.state.number}
	s.log.Info("the machine was restarted: clients have a while to reclaim their locks", "clients", len(clients), "locks", s.locks(), "grace", s.cfg.Grace)
	for _, c := range clients {
		s.begin(func(ctx context.Context) { s.tell(ctx, c, notice) })
	}
	s.mu.Unlock()
	select {
	case <-ctx.Done():
		return
	case <-time.After(s.cfg.Grace):
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.grace = false
	for c := range s.told {
		s.dropUnclaimed(c)
	}
	for key := range s.state.files {
		s.pump(key)
	}
	s.log.Info("the time to reclaim locks is over", "locks", s.locks())
}

// tell repeats a notice until its client has heard it, for as long as it holds
// locks: one that is cut off, or off, keeps what it had and what nobody else
// claimed.
func (s *Server) tell(ctx context.Context, client netip.Addr, notice nsm.Notice) {
	for wait := firstRetry; ; wait = min(2*wait, lastRetry) {
		call, cancel := context.WithTimeout(ctx, callTimeout)
		err := notice.Send(call, s.cfg.Dial, client)
		cancel()
		s.mu.Lock()
		if err == nil {
			s.told[client] = true
			if !s.grace { // late: it gets as long as the others had
				s.begin(func(ctx context.Context) {
					select {
					case <-ctx.Done():
					case <-time.After(s.cfg.Grace):
						s.mu.Lock()
						defer s.mu.Unlock()
						s.dropUnclaimed(client)
					}
				})
			}
		}
		gone := s.state.held[client] == 0 && !s.grace
		s.mu.Unlock()
		if err == nil || gone || ctx.Err() != nil {
			return
		}
		if wait == firstRetry {
			s.log.Warn("a client doesn't hear that its locks are to be reclaimed; trying again", "client", client, "err", err)
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(wait):
		}
	}
}

// dropUnclaimed frees what a client had time to reclaim and did not. The caller
// holds mu.
func (s *Server) dropUnclaimed(client netip.Addr) {
	before := s.state.held[client]
	s.mustWrite(entry{kind: opDrop, lock: lock{owner: owner{client: client}}})
	if n := before - s.state.held[client]; n > 0 {
		s.count.released.Add(uint64(n))
		s.log.Info("locks that were not reclaimed are free", "client", client, "locks", n)
	}
}
