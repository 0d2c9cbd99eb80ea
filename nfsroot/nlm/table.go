package nlm

import (
	"math"
	"net/netip"
	"slices"
	"sort"
)

// owner is who holds a lock: a process, or an open file for flock(2), of a
// client. Clients name it with a number of theirs (svid). The owner handle (oh)
// is not part of it, as it is not for the kernel's own server: Linux makes it
// from the host name, which is another one in a container.
type owner struct {
	client netip.Addr
	svid   int32
}

// span is a range of bytes, both ends included. A lock up to the end of the
// file, whatever that is, ends at maxOffset.
type span struct{ start, end uint64 }

// maxOffset is the last byte that can be locked: that of the longest file.
const maxOffset = math.MaxInt64

// newSpan makes a span of NLM's offset and length; length 0 means up to the end
// of the file. It reports false for what no file can hold.
func newSpan(offset, length uint64) (span, bool) {
	if offset > maxOffset {
		return span{}, false
	}
	if length == 0 || length-1 > maxOffset-offset {
		return span{offset, maxOffset}, true
	}
	return span{offset, offset + length - 1}, true
}

// wire is newSpan backwards.
func (s span) wire() (offset, length uint64) {
	if s.end == maxOffset {
		return s.start, 0
	}
	return s.start, s.end - s.start + 1
}

func (s span) overlaps(o span) bool { return s.start <= o.end && o.start <= s.end }

// lock is one locked range. Those of one owner on one file never overlap, and
// those that touch are one if all else is the same.
type lock struct {
	owner
	span
	exclusive bool
	state     int32 // the client's state number (NSM) when it took the lock
	confirmed bool  // false: known from before a crash of the machine, not yet reclaimed
	oh        string
}

// sameBut says whether two locks differ in their range only.
func (l lock) sameBut(o lock) bool {
	l.span = o.span
	return l == o
}

// waiter is a blocked request.
type waiter struct {
	id       uint64
	file     string // key
	want     lock
	caller   string // the rest is echoed in the call-back, by which the client knows its request
	handle   []byte
	offset   uint64
	length   uint64
	granting bool // the lock is held, but the client has not said that it knows
}

// share is a DOS share reservation.
type share struct {
	owner        // svid is not sent and 0
	oh           string
	mode, access uint32
}

// file is what is known of one file; it exists while something is.
type file struct {
	locks   []lock    // by start
	waiters []*waiter // in the order in which they came
	shares  []share
}

// table is all locks. It knows nothing of clients, time or disks: it is the
// same for a running server and for the replay of a journal.
type table struct {
	files   map[string]*file
	waiting map[owner][]*waiter // of all files; not those that are granting
	byID    map[uint64]*waiter
	held    map[netip.Addr]int // locks of a client
	nextID  uint64
}

func newTable() *table {
	return &table{files: map[string]*file{}, waiting: map[owner][]*waiter{}, byID: map[uint64]*waiter{}, held: map[netip.Addr]int{}}
}

func (t *table) file(key string) *file {
	f := t.files[key]
	if f == nil {
		f = &file{}
		t.files[key] = f
	}
	return f
}

// tidy forgets a file of which nothing is left to know.
func (t *table) tidy(key string) {
	if f := t.files[key]; f != nil && len(f.locks) == 0 && len(f.waiters) == 0 && len(f.shares) == 0 {
		delete(t.files, key)
	}
}

// conflict returns a lock of another owner that stands against the wanted one,
// nil if there is none.
func (t *table) conflict(key string, want lock) *lock {
	f := t.files[key]
	if f == nil {
		return nil
	}
	for i := range f.locks {
		if l := &f.locks[i]; l.owner != want.owner && l.overlaps(want.span) && (l.exclusive || want.exclusive) {
			return l
		}
	}
	return nil
}

// holds says whether the owner has a lock of that kind on the whole range.
func (t *table) holds(key string, want lock) bool {
	f := t.files[key]
	if f == nil {
		return false
	}
	next := want.start
	for _, l := range f.locks { // by start
		if l.owner == want.owner && l.exclusive == want.exclusive && l.start <= next && l.end >= next {
			if l.end >= want.end {
				return true
			}
			next = l.end + 1
		}
	}
	return false
}

// set locks the range, in place of what its owner had there.
func (t *table) set(key string, l lock) {
	t.cut(key, l.owner, l.span)
	f := t.file(key)
	at := sort.Search(len(f.locks), func(i int) bool { return f.locks[i].start > l.start })
	f.locks = slices.Insert(f.locks, at, l)
	t.held[l.client]++
	t.merge(f, l.owner)
}

// unset unlocks the range.
func (t *table) unset(key string, o owner, s span) {
	t.cut(key, o, s)
	t.tidy(key)
}

// cut takes the range out of the owner's locks.
func (t *table) cut(key string, o owner, s span) {
	f := t.files[key]
	if f == nil {
		return
	}
	hit := false
	for _, l := range f.locks {
		hit = hit || l.owner == o && l.overlaps(s)
	}
	if !hit {
		return
	}
	var rest []lock
	for _, l := range f.locks {
		if l.owner != o || !l.overlaps(s) {
			rest = append(rest, l)
			continue
		}
		t.count(o.client, -1)
		if l.start < s.start {
			left := l
			left.end = s.start - 1
			rest = append(rest, left)
			t.count(o.client, 1)
		}
		if l.end > s.end {
			right := l
			right.start = s.end + 1
			rest = append(rest, right)
			t.count(o.client, 1)
		}
	}
	slices.SortStableFunc(rest, byStart)
	f.locks = rest
}

func byStart(a, b lock) int {
	switch {
	case a.start < b.start:
		return -1
	case a.start > b.start:
		return 1
	}
	return 0
}

func (t *table) count(client netip.Addr, n int) {
	if t.held[client] += n; t.held[client] <= 0 {
		delete(t.held, client)
	}
}

// merge joins the owner's locks that touch.
func (t *table) merge(f *file, o owner) {
	last := -1 // index of the owner's previous lock
	for i := 0; i < len(f.locks); i++ {
		l := f.locks[i]
		if l.owner != o {
			continue
		}
		if last >= 0 && f.locks[last].end+1 == l.start && f.locks[last].sameBut(l) {
			f.locks[last].end = l.end
			f.locks = slices.Delete(f.locks, i, i+1)
			t.count(o.client, -1)
			i--
			continue
		}
		last = i
	}
}

// wait queues a request and returns its entry.
func (t *table) wait(w *waiter) *waiter {
	if w.id == 0 {
		t.nextID++
		w.id = t.nextID
	}
	t.nextID = max(t.nextID, w.id)
	f := t.file(w.file)
	f.waiters = append(f.waiters, w)
	t.waiting[w.want.owner] = append(t.waiting[w.want.owner], w)
	t.byID[w.id] = w
	return w
}

// find returns the owner's request for that range, nil if there is none.
func (t *table) find(key string, want lock) *waiter {
	f := t.files[key]
	if f == nil {
		return nil
	}
	for _, w := range f.waiters {
		if w.want.owner == want.owner && w.want.span == want.span && w.want.exclusive == want.exclusive {
			return w
		}
	}
	return nil
}

// grant gives a waiter its lock. It stays, as granting, until it is forgotten.
func (t *table) grant(w *waiter) {
	w.granting = true
	t.stopWaiting(w)
	t.set(w.file, w.want)
}

// forget ends a waiter, whatever became of it.
func (t *table) forget(w *waiter) {
	t.stopWaiting(w)
	delete(t.byID, w.id)
	if f := t.files[w.file]; f != nil {
		f.waiters = slices.DeleteFunc(f.waiters, func(o *waiter) bool { return o == w })
	}
	t.tidy(w.file)
}

func (t *table) stopWaiting(w *waiter) {
	list := slices.DeleteFunc(t.waiting[w.want.owner], func(o *waiter) bool { return o == w })
	if len(list) == 0 {
		delete(t.waiting, w.want.owner)
		return
	}
	t.waiting[w.want.owner] = list
}

// grantable returns the first waiter of a file that nothing stands against any
// more. Later ones pass those that still have to wait, as on a local file
// system: a strict queue could lock itself up.
func (t *table) grantable(key string) *waiter {
	if f := t.files[key]; f != nil {
		for _, w := range f.waiters {
			if !w.granting && t.conflict(key, w.want) == nil {
				return w
			}
		}
	}
	return nil
}

// maxSearch bounds the search for a deadlock.
const maxSearch = 100_000

// deadlock says whether the owner would wait for itself if it waited for that
// lock: through owners that wait, in turn, for others.
func (t *table) deadlock(key string, want lock) bool {
	steps := 0
	seen := map[owner]bool{}
	var reaches func(key string, want lock) bool
	reaches = func(key string, want2 lock) bool {
		f := t.files[key]
		if f == nil {
			return false
		}
		for _, l := range f.locks {
			if steps++; steps > maxSearch {
				return false
			}
			if l.owner == want2.owner || !l.overlaps(want2.span) || !l.exclusive && !want2.exclusive {
				continue
			}
			if l.owner == want.owner {
				return true
			}
			if seen[l.owner] {
				continue
			}
			seen[l.owner] = true
			for _, w := range t.waiting[l.owner] {
				if reaches(w.file, w.want) {
					return true
				}
			}
		}
		return false
	}
	return reaches(key, want)
}

// release forgets a client's locks, requests and shares for which which says
// so, and returns the files that may have become free. A share shows to which as
// a confirmed lock without a state.
func (t *table) release(client netip.Addr, which func(lock) bool) (touched []string) {
	for key, f := range t.files {
		hit := false
		f.locks = slices.DeleteFunc(f.locks, func(l lock) bool {
			gone := l.client == client && which(l)
			if gone {
				t.count(client, -1)
				hit = true
			}
			return gone
		})
		for _, w := range slices.Clone(f.waiters) {
			if w.want.client == client && which(w.want) {
				t.stopWaiting(w)
				delete(t.byID, w.id)
				f.waiters = slices.DeleteFunc(f.waiters, func(o *waiter) bool { return o == w })
				hit = true
			}
		}
		f.shares = slices.DeleteFunc(f.shares, func(s share) bool {
			gone := s.client == client && which(lock{owner: s.owner, confirmed: true})
			hit = hit || gone
			return gone
		})
		if hit {
			touched = append(touched, key)
			t.tidy(key)
		}
	}
	slices.Sort(touched) // the order of a map must not decide who gets what
	return touched
}

// DOS share modes: bits 1 read, 2 write; what is denied and what is done.
func (s share) against(o share) bool {
	same := s.owner == o.owner && s.oh == o.oh
	return !same && (s.mode&o.access != 0 || s.access&o.mode != 0)
}

func (t *table) shareConflict(key string, s share) bool {
	f := t.files[key]
	return f != nil && slices.ContainsFunc(f.shares, s.against)
}

func (t *table) setShare(key string, s share) {
	t.unsetShare(key, s)
	f := t.file(key)
	f.shares = append(f.shares, s)
}

func (t *table) unsetShare(key string, s share) {
	if f := t.files[key]; f != nil {
		f.shares = slices.DeleteFunc(f.shares, func(o share) bool { return s.owner == o.owner && s.oh == o.oh })
		t.tidy(key)
	}
}

// waitersOf is the number of a client's requests.
func (t *table) waitersOf(client netip.Addr) int {
	n := 0
	for _, w := range t.byID {
		if w.want.client == client {
			n++
		}
	}
	return n
}
