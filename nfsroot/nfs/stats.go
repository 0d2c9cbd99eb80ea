package nfs

import (
	"sync/atomic"
	"time"
)

// procCounters count one procedure.
type procCounters struct {
	calls, errors, nanos, in, out atomic.Uint64
}

func (p *procCounters) done(begin time.Time, in, out int) {
	p.calls.Add(1)
	p.nanos.Add(uint64(time.Since(begin)))
	p.in.Add(uint64(in))
	p.out.Add(uint64(out))
}

// counters is all that the server counts.
type counters struct {
	open                                             atomic.Int64
	accepted, refused, badRecords, garbage, replayed atomic.Uint64
	badHandles, panics, cacheHits, cacheMisses       atomic.Uint64

	nfs   [len(nfsNames)]procCounters
	mount [len(mountNames)]procCounters
	other procCounters
}

// Stats is a snapshot of the server's counters since New.
type Stats struct {
	Open       int64  // connections open now
	Accepted   uint64 // connections
	Refused    uint64 // connections not admitted, or one too many
	BadRecords uint64 // connections closed because of malformed RPC
	Garbage    uint64 // calls whose arguments could not be decoded
	BadHandles uint64 // file handles not made by this server's key
	Replayed   uint64 // repeated calls answered from memory
	Panics     uint64 // calls that failed with an internal error
	Unknown    uint64 // calls of programs, versions or procedures not served

	CachedFiles int // files held open
	CacheHits   uint64
	CacheMisses uint64

	// Procs has the procedures that were called, by name as in RFC 1813
	// ("GETATTR"), those of MOUNT with the prefix "MOUNT." ("MOUNT.MNT").
	Procs map[string]ProcStats
}

// ProcStats counts one procedure.
type ProcStats struct {
	Calls  uint64
	Errors uint64        // answers with a status other than OK
	Time   time.Duration // from the request read to the reply written, summed
	In     uint64        // bytes of arguments
	Out    uint64        // bytes of replies
}

// Stats returns the present counts.
func (s *Server) Stats() Stats {
	c := &s.count
	st := Stats{
		Open: c.open.Load(), Accepted: c.accepted.Load(), Refused: c.refused.Load(),
		BadRecords: c.badRecords.Load(), Garbage: c.garbage.Load(), BadHandles: c.badHandles.Load(),
		Replayed: c.replayed.Load(), Panics: c.panics.Load(), Unknown: c.other.calls.Load(),
		CachedFiles: s.files.len(), CacheHits: c.cacheHits.Load(), CacheMisses: c.cacheMisses.Load(),
		Procs: map[string]ProcStats{},
	}
	add := func(name string, p *procCounters) {
		if n := p.calls.Load(); n > 0 {
			st.Procs[name] = ProcStats{Calls: n, Errors: p.errors.Load(), Time: time.Duration(p.nanos.Load()),
				In: p.in.Load(), Out: p.out.Load()}
		}
	}
	for i := range c.nfs {
		add(nfsNames[i], &c.nfs[i])
	}
	for i := range c.mount {
		add("MOUNT."+mountNames[i], &c.mount[i])
	}
	return st
}
