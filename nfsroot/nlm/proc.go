package nlm

import (
	"bytes"
	"context"
	"errors"
	"net/netip"

	"golang.org/x/sys/unix"

	"krgimage/nfsroot/sunrpc"
)

// Version is the version of NLM that goes with NFS version 3.
const Version = 4

// Procedures.
const (
	procNull    = 0
	procTest    = 1
	procLock    = 2
	procCancel  = 3
	procUnlock  = 4
	procGranted = 5
	// The same as messages: the answer is a call in the other direction, to a
	// procedure that is toRes higher.
	procTestMsg    = 6
	procLockMsg    = 7
	procCancelMsg  = 8
	procUnlockMsg  = 9
	procGrantedMsg = 10
	procTestRes    = 11
	procGrantedRes = 15
	toRes          = 5

	procShare   = 20
	procUnshare = 21
	procNMLock  = 22
	procFreeAll = 23
)

// status is an nlm4_stats.
type status uint32

const (
	granted     status = 0
	denied      status = 1
	noLocks     status = 2 // out of resources
	blocked     status = 3
	inGrace     status = 4
	deadlocked  status = 5
	readOnly    status = 6
	stale       status = 7
	tooFar      status = 8
	failed      status = 9
	numStatuses        = 10
)

// Limits of the protocol, in bytes.
const (
	maxCookie = 1024 // LM_MAXSTRLEN, as for names
	maxName   = 1024
	maxHandle = 64
)

// request is an nlm4_lock and what comes with it, as far as a procedure has it.
type request struct {
	client    netip.Addr
	cred      sunrpc.Cred
	cookie    []byte
	block     bool
	exclusive bool
	caller    string
	handle    []byte
	oh        string
	svid      int32
	offset    uint64
	length    uint64
	reclaim   bool
	state     int32
}

// readLock decodes an nlm4_lock.
func (r *request) readLock(d *sunrpc.Decoder) {
	r.caller = d.String(maxName)
	r.handle = bytes.Clone(d.Opaque(maxHandle))
	r.oh = d.String(maxName)
	r.svid = int32(d.Uint32())
	r.offset, r.length = d.Uint64(), d.Uint64()
}

// decode reads the arguments of TEST, LOCK, CANCEL, UNLOCK or NM_LOCK.
func decode(proc uint32, d *sunrpc.Decoder) (r request, ok bool) {
	r.cookie = bytes.Clone(d.Opaque(maxCookie))
	switch proc {
	case procTest:
		r.exclusive = d.Bool()
		r.readLock(d)
	case procLock, procNMLock:
		r.block, r.exclusive = d.Bool(), d.Bool()
		r.readLock(d)
		r.reclaim, r.state = d.Bool(), int32(d.Uint32())
	case procCancel:
		r.block, r.exclusive = d.Bool(), d.Bool()
		r.readLock(d)
	case procUnlock:
		r.readLock(d)
	}
	return r, !d.Bad()
}

// want is the lock that a request is about.
func (r request) want() (lock, bool) {
	s, ok := newSpan(r.offset, r.length)
	return lock{owner: owner{r.client, r.svid}, span: s, exclusive: r.exclusive, state: r.state, confirmed: true, oh: r.oh}, ok
}

// result is the answer to a request.
type result struct {
	cookie []byte
	status status
	holder *lock // of TEST, with denied
}

func (r result) encode(e *sunrpc.Encoder) {
	e.Opaque(r.cookie)
	e.Uint32(uint32(r.status))
	if r.holder != nil && r.status == denied {
		e.Bool(r.holder.exclusive)
		e.Uint32(uint32(r.holder.svid))
		e.String(r.holder.oh)
		offset, length := r.holder.wire()
		e.Uint64(offset)
		e.Uint64(length)
	}
}

func (s *Server) nlmProgram() sunrpc.Program {
	return sunrpc.Program{Number: sunrpc.ProgramNLM, Low: Version, High: Version, Handle: s.handle}
}

// handle does one call.
func (s *Server) handle(c *sunrpc.Call) sunrpc.Accept {
	switch proc := c.Proc; {
	case proc == procNull:
	case proc >= procTest && proc <= procUnlock, proc == procNMLock:
		r, ok := decode(proc, c.Args)
		if !ok {
			return sunrpc.GarbageArgs
		}
		s.do(proc, r, c).encode(c.Reply)
	case proc >= procTestMsg && proc <= procUnlockMsg:
		base := proc - procTestMsg + procTest
		r, ok := decode(base, c.Args)
		if !ok {
			return sunrpc.GarbageArgs
		}
		answer := s.do(base, r, c)
		client := c.Peer.Addr()
		s.mu.Lock()
		s.begin(func(ctx context.Context) {
			// Whoever sends messages repeats them when no answer comes.
			if _, err := s.call(ctx, client, proc+toRes, answer.encode); err != nil {
				s.log.Debug("an answer did not reach its client", "client", client, "err", err)
			}
		})
		s.mu.Unlock()
	case proc >= procTestRes && proc <= procGrantedRes:
		// Answers to messages; this server sends none.
	case proc == procShare, proc == procUnshare:
		return s.share(c)
	case proc == procFreeAll:
		name := c.Args.String(maxName)
		c.Args.Uint32() // the client's state, in which it has locked nothing yet
		if c.Args.Bad() {
			return sunrpc.GarbageArgs
		}
		if s.trusted(c) {
			s.log.Info("a client starts anew", "client", c.Peer.Addr(), "name", name)
			s.ReleaseClient(c.Peer.Addr())
		}
	default: // GRANTED, too: this is no client
		return sunrpc.ProcUnavail
	}
	return sunrpc.Success
}

// trusted says whether a call comes from a client's kernel and not from one of
// its users.
func (s *Server) trusted(c *sunrpc.Call) bool {
	if !c.Privileged {
		s.count.refused.Add(1)
		s.log.Warn("call refused: it does not come from a port below 1024", "client", c.Peer)
	}
	return c.Privileged
}

// do does a request of one of the basic procedures.
func (s *Server) do(proc uint32, r request, c *sunrpc.Call) (answer result) {
	r.client, r.cred = c.Peer.Addr(), c.Cred
	answer.cookie = r.cookie
	defer func() { s.count.answers[answer.status].Add(1) }()
	if !s.trusted(c) {
		answer.status = noLocks
		return answer
	}
	key, known := s.cfg.Files.LockKey(r.handle)
	if !known {
		answer.status = stale
		return answer
	}
	want, fits := r.want()
	if !fits {
		answer.status = tooFar
		return answer
	}
	if proc == procTest || proc == procLock || proc == procNMLock {
		if answer.status = statusOf(s.cfg.Files.MayLock(r.handle, r.cred, r.exclusive)); answer.status != granted {
			return answer
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	switch proc {
	case procTest:
		answer.status, answer.holder = s.test(key, want)
	case procLock:
		answer.status = s.lock(key, want, r)
	case procNMLock:
		r.block = false
		answer.status = s.lock(key, want, r)
	case procCancel:
		answer.status = s.cancel(key, want)
	case procUnlock:
		answer.status = s.unlock(key, want)
	}
	return answer
}

// statusOf says in the protocol's words why a file may not be locked.
func statusOf(err error) status {
	switch {
	case err == nil:
		return granted
	case errors.Is(err, unix.ESTALE), errors.Is(err, unix.ENOENT):
		return stale
	case errors.Is(err, unix.EROFS):
		return readOnly
	}
	return failed
}

func (s *Server) test(key string, want lock) (status, *lock) {
	if s.grace {
		return inGrace, nil
	}
	if c := s.state.conflict(key, want); c != nil {
		holder := *c
		return denied, &holder
	}
	return granted, nil
}

// lock is LOCK. Asking again for what is held or waited for is normal: that is
// how clients make up for lost answers and lost call-backs.
func (s *Server) lock(key string, want lock, r request) status {
	if s.grace && !r.reclaim {
		return inGrace
	}
	var changes []entry
	queued := s.state.find(key, want)
	conflict := s.state.conflict(key, want)
	if r.reclaim {
		// What the client says it holds counts more than an old record of
		// another's lock that nobody has confirmed.
		for conflict != nil && !conflict.confirmed {
			s.mustWrite(entry{kind: opUnlock, file: key, lock: *conflict})
			conflict = s.state.conflict(key, want)
		}
	}
	switch {
	case conflict == nil:
		if queued != nil {
			changes = append(changes, entry{kind: opForget, id: queued.id})
		}
		if s.state.held[want.client] >= maxLocks {
			s.log.Warn("lock refused: the client holds too many", "client", want.client, "limit", maxLocks)
			return noLocks
		}
		if !s.state.holds(key, want) || r.reclaim {
			changes = append(changes, entry{kind: opLock, file: key, lock: want})
		}
		if len(changes) > 0 && s.write(changes...) != nil {
			return noLocks
		}
		return granted
	case !r.block:
		return denied
	case queued != nil:
		return blocked
	case s.state.deadlock(key, want):
		return deadlocked
	case s.state.waitersOf(want.client) >= maxWaiters:
		s.log.Warn("lock refused: the client waits for too many", "client", want.client, "limit", maxWaiters)
		return noLocks
	}
	w := &waiter{id: s.state.nextID + 1, file: key, want: want, caller: r.caller, handle: r.handle, offset: r.offset, length: r.length}
	if s.write(entry{kind: opWait, file: key, waiter: w}) != nil {
		return noLocks
	}
	return blocked
}

// cancel is CANCEL. A client that cancels does not believe that it holds the
// lock, even if that has just been granted.
func (s *Server) cancel(key string, want lock) status {
	w := s.state.find(key, want)
	if w == nil {
		return denied
	}
	changes := []entry{{kind: opForget, id: w.id}}
	if w.granting {
		changes = append(changes, entry{kind: opUnlock, file: key, lock: w.want})
	}
	s.mustWrite(changes...)
	return granted
}

func (s *Server) unlock(key string, want lock) status {
	var changes []entry
	for _, exclusive := range []bool{true, false} {
		want.exclusive = exclusive
		if w := s.state.find(key, want); w != nil {
			changes = append(changes, entry{kind: opForget, id: w.id})
		}
	}
	if f := s.state.files[key]; f != nil {
		for _, l := range f.locks {
			if l.owner == want.owner && l.overlaps(want.span) {
				changes = append(changes, entry{kind: opUnlock, file: key, lock: want})
				break
			}
		}
	}
	if len(changes) > 0 {
		s.mustWrite(changes...)
	}
	return granted
}

// share is SHARE and UNSHARE, which clients of DOS ancestry use.
func (s *Server) share(c *sunrpc.Call) sunrpc.Accept {
	d := c.Args
	cookie := bytes.Clone(d.Opaque(maxCookie))
	d.String(maxName)
	handle := d.Opaque(maxHandle)
	sh := share{owner: owner{client: c.Peer.Addr()}, oh: d.String(maxName), mode: d.Uint32(), access: d.Uint32()}
	reclaim := d.Bool()
	if d.Bad() || sh.mode > 3 || sh.access > 3 {
		return sunrpc.GarbageArgs
	}
	answer := func() status {
		if !s.trusted(c) {
			return noLocks
		}
		key, known := s.cfg.Files.LockKey(handle)
		if !known {
			return stale
		}
		if c.Proc == procShare {
			if st := statusOf(s.cfg.Files.MayLock(handle, c.Cred, false)); st != granted {
				return st
			}
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		switch {
		case c.Proc == procUnshare:
			s.mustWrite(entry{kind: opUnshare, file: key, share: sh})
		case s.grace && !reclaim:
			return inGrace
		case s.state.shareConflict(key, sh):
			return denied
		default:
			if s.write(entry{kind: opClient, lock: lock{owner: sh.owner}}, entry{kind: opShare, file: key, share: sh}) != nil {
				return noLocks
			}
		}
		return granted
	}()
	c.Reply.Opaque(cookie)
	c.Reply.Uint32(uint32(answer))
	c.Reply.Uint32(0) // sequence
	return sunrpc.Success
}
