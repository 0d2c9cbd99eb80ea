package nlm

import "sync/atomic"

// counters is all that the server counts.
type counters struct {
	answers                                                     [numStatuses]atomic.Uint64
	callbacks, callbackErrors, released, refused, journalErrors atomic.Uint64
}

// Stats is what the server holds now and has counted since New.
type Stats struct {
	Clients int  // known to hold locks, or to have held some
	Locks   int  // ranges
	Waiting int  // blocked requests
	Grace   bool // only reclaims are granted

	Granted   uint64 // answers, by what they said
	Denied    uint64
	Blocked   uint64
	Deadlocks uint64
	InGrace   uint64
	Failed    uint64 // all others

	Callbacks      uint64 // clients told that they have what they waited for
	CallbackErrors uint64 // attempts that failed
	Released       uint64 // locks freed because their client started anew or died
	Refused        uint64 // calls that did not come from a client's kernel
	JournalErrors  uint64
}

// Stats returns the present figures.
func (s *Server) Stats() Stats {
	c := &s.count
	st := Stats{
		Granted: c.answers[granted].Load(), Denied: c.answers[denied].Load(), Blocked: c.answers[blocked].Load(),
		Deadlocks: c.answers[deadlocked].Load(), InGrace: c.answers[inGrace].Load(),
		Callbacks: c.callbacks.Load(), CallbackErrors: c.callbackErrors.Load(), Released: c.released.Load(),
		Refused: c.refused.Load(), JournalErrors: c.journalErrors.Load(),
	}
	for _, other := range []status{noLocks, readOnly, stale, tooFar, failed} {
		st.Failed += c.answers[other].Load()
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	st.Clients, st.Locks, st.Waiting, st.Grace = len(s.state.clients), s.locks(), len(s.state.byID), s.grace
	return st
}
