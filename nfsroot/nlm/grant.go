package nlm

import (
	"context"
	"fmt"
	"net/netip"
	"time"

	"krgimage/nfsroot/rpcbind"
	"krgimage/nfsroot/sunrpc"
)

// How often a client is called that doesn't answer, and how long a call takes
// at most. A client that waits asks by itself every 30 s, too.
const (
	callTimeout = 10 * time.Second
	firstRetry  = time.Second
	lastRetry   = 30 * time.Second
)

// pump gives a file's locks to those who wait and can have them. The caller
// holds mu.
func (s *Server) pump(key string) {
	if s.grace {
		return
	}
	for {
		w := s.state.grantable(key)
		if w == nil || s.journal.write(s.state, false, entry{kind: opGrant, id: w.id}) != nil {
			return // not written down: the client's next question is the next attempt
		}
		s.state.grant(w)
		s.callBack(w.id)
	}
}

// callBack tells a client that it has what it waited for, until it has
// understood. The caller holds mu.
func (s *Server) callBack(id uint64) {
	s.begin(func(ctx context.Context) {
		for wait := firstRetry; ; wait = min(2*wait, lastRetry) {
			s.mu.Lock()
			w := s.state.byID[id]
			s.mu.Unlock()
			if w == nil {
				return
			}
			st, err := s.sendGranted(ctx, w)
			if err == nil {
				s.answered(id, st)
				return
			}
			s.count.callbackErrors.Add(1)
			if ctx.Err() != nil {
				return
			}
			if wait == firstRetry {
				s.log.Warn("a client can't be told that it has a lock; trying again", "client", w.want.client, "err", err)
			}
			select {
			case <-ctx.Done():
				return
			case <-time.After(wait):
			}
		}
	})
}

// answered ends a call-back. A client that denies doesn't wait any more: the
// lock is free again. If the client has asked meanwhile and got the lock that
// way, its request is gone, and so is what this answer is about.
func (s *Server) answered(id uint64, st status) {
	s.mu.Lock()
	defer s.mu.Unlock()
	w := s.state.byID[id]
	if w == nil {
		return
	}
	if st == inGrace { // the client isn't ready
		s.callBack(id)
		return
	}
	changes := []entry{{kind: opForget, id: id}}
	if st == granted {
		s.count.callbacks.Add(1)
	} else {
		changes = append(changes, entry{kind: opUnlock, file: w.file, lock: w.want})
	}
	s.mustWrite(changes...)
}

// sendGranted is the GRANTED call. The client finds its request by the file
// handle, the svid and the range, and by the address that the call comes from.
func (s *Server) sendGranted(ctx context.Context, w *waiter) (status, error) {
	d, err := s.call(ctx, w.want.client, procGranted, func(e *sunrpc.Encoder) {
		e.Opaque(fmt.Appendf(nil, "%d", w.id))
		e.Bool(w.want.exclusive)
		e.String(w.caller)
		e.Opaque(w.handle)
		e.String(w.want.oh)
		e.Uint32(uint32(w.want.svid))
		e.Uint64(w.offset)
		e.Uint64(w.length)
	})
	if err != nil {
		return 0, err
	}
	d.Opaque(maxCookie)
	st := status(d.Uint32())
	if d.Bad() || st >= numStatuses {
		return 0, fmt.Errorf("lock manager of %s: %w", w.want.client, sunrpc.ErrMessage)
	}
	return st, nil
}

// call calls a client's lock manager.
func (s *Server) call(ctx context.Context, client netip.Addr, proc uint32, args func(*sunrpc.Encoder)) (*sunrpc.Decoder, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	s.mu.Lock()
	port := s.ports[client]
	s.mu.Unlock()
	if port == 0 {
		var err error
		if port, err = rpcbind.GetPort(ctx, s.cfg.Dial, client, sunrpc.ProgramNLM, Version); err != nil {
			return nil, err
		}
	}
	d, err := func() (*sunrpc.Decoder, error) {
		nc, err := s.cfg.Dial(ctx, netip.AddrPortFrom(client, port))
		if err != nil {
			return nil, err
		}
		defer nc.Close()
		return sunrpc.Do(ctx, nc, sunrpc.ProgramNLM, Version, proc, args)
	}()
	s.mu.Lock()
	defer s.mu.Unlock()
	if err != nil {
		delete(s.ports, client) // it may be another one by now
		return nil, fmt.Errorf("lock manager of %s: %w", client, err)
	}
	s.ports[client] = port
	return d, nil
}
