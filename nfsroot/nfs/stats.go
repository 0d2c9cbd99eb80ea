package nfs

import (
	"math/bits"
	"sync/atomic"
	"time"
)

// buckets is the number of a latency histogram's buckets, the last without bound.
const buckets = 19

// BucketBound is the upper bound of a bucket of ProcStats: powers of two from
// 16.384 µs to 2.1 s.
func BucketBound(i int) time.Duration { return 1 << (14 + i) }

// procCounters count one procedure.
type procCounters struct {
	errors, nanos, in, out atomic.Uint64
	took                   [buckets]atomic.Uint64 // calls by time; their sum is the number of calls
}

func (p *procCounters) calls() (n uint64) {
	for i := range p.took {
		n += p.took[i].Load()
	}
	return n
}

func (p *procCounters) done(took time.Duration, in, out int) {
	p.took[min(bits.Len64(uint64(max(took, 0))>>14), buckets-1)].Add(1)
	p.nanos.Add(uint64(took))
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
	Open       int64  `json:"open"`          // connections open now
	Accepted   uint64 `json:"accepted"`      // connections
	Refused    uint64 `json:"refused"`       // connections not admitted, or one too many
	BadRecords uint64 `json:"bad_records"`   // connections closed because of malformed RPC
	Garbage    uint64 `json:"bad_arguments"` // calls whose arguments could not be decoded
	BadHandles uint64 `json:"bad_handles"`   // file handles not made by this server's key
	Replayed   uint64 `json:"replayed"`      // repeated calls answered from memory
	Panics     uint64 `json:"panics"`        // calls that failed with an internal error
	Unknown    uint64 `json:"unknown"`       // calls of programs, versions or procedures not served

	CachedFiles int    `json:"open_files"` // files held open
	CacheHits   uint64 `json:"cache_hits"`
	CacheMisses uint64 `json:"cache_misses"`

	// Procs has the procedures that were called, by name as in RFC 1813
	// ("GETATTR"), those of MOUNT with the prefix "MOUNT." ("MOUNT.MNT").
	Procs map[string]ProcStats `json:"procedures"`
}

// ProcStats counts one procedure.
type ProcStats struct {
	Calls   uint64        `json:"calls"`
	Errors  uint64        `json:"errors"`      // answers with a status other than OK
	Time    time.Duration `json:"nanoseconds"` // from the request read to the reply made, summed
	In      uint64        `json:"in"`          // bytes of arguments
	Out     uint64        `json:"out"`         // bytes of replies
	Buckets []uint64      `json:"buckets"`     // calls by time; see BucketBound
}

// Stats returns the present counts.
func (s *Server) Stats() Stats {
	c := &s.count
	st := Stats{
		Open: c.open.Load(), Accepted: c.accepted.Load(), Refused: c.refused.Load(),
		BadRecords: c.badRecords.Load(), Garbage: c.garbage.Load(), BadHandles: c.badHandles.Load(),
		Replayed: c.replayed.Load(), Panics: c.panics.Load(), Unknown: c.other.calls(),
		CachedFiles: s.files.len(), CacheHits: c.cacheHits.Load(), CacheMisses: c.cacheMisses.Load(),
		Procs: map[string]ProcStats{},
	}
	add := func(name string, p *procCounters) {
		n := p.calls()
		if n == 0 {
			return
		}
		ps := ProcStats{Calls: n, Errors: p.errors.Load(), Time: time.Duration(p.nanos.Load()),
			In: p.in.Load(), Out: p.out.Load(), Buckets: make([]uint64, buckets)}
		for i := range p.took {
			ps.Buckets[i] = p.took[i].Load()
		}
		st.Procs[name] = ps
	}
	for i := range c.nfs {
		add(nfsNames[i], &c.nfs[i])
	}
	for i := range c.mount {
		add("MOUNT."+mountNames[i], &c.mount[i])
	}
	return st
}

// Quantile is a time that a share q of the calls did not exceed: the bound of its
// bucket, and that of the last one for times beyond all bounds.
func (p ProcStats) Quantile(q float64) time.Duration {
	seen := uint64(0)
	for i, n := range p.Buckets {
		if seen += n; float64(seen) >= q*float64(p.Calls) {
			return BucketBound(min(i, buckets-2))
		}
	}
	return 0
}
