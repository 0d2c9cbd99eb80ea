package nfs

import (
	"container/list"
	"net/netip"
	"sync"

	"github.com/cespare/xxhash/v2"
)

// maxReplays is how many answers the server remembers.
const maxReplays = 2048

// replayCache remembers the answers to calls that can't be done twice. A client
// whose connection broke repeats what was not answered: without memory, a
// REMOVE that was done would now say that there is no such file. A call is
// recognised by its sender, xid and the whole of its arguments.
//
// With a log (replaylog.go) the memory is there for the next process when this
// one is killed. A call that was begun then and has no answer may or may not have
// been done, so it is done again, and finding it done is no failure (call.redo).
type replayCache struct {
	max int
	log *replayLog // nil: nothing survives the process

	mu      sync.Mutex
	entries map[replayKey]*replay // guarded by mu
	order   *list.List            // of *replay, newest in front; guarded by mu
	next    uint64                // counts the entries made; guarded by mu
}

type replayKey struct {
	peer      netip.Addr
	xid, proc uint32
	args      uint64
}

type replay struct {
	key   replayKey
	seq   uint64 // its place in the log
	done  chan struct{}
	reply []byte // set before done is closed
	// cut says that a process that was killed had begun the call; guarded by the
	// cache's mu
	cut bool
}

func newReplayCache(size int, log *replayLog) *replayCache {
	r := &replayCache{max: size, log: log, entries: map[replayKey]*replay{}, order: list.New()}
	if log != nil {
		for _, e := range log.load() {
			r.entries[e.key] = e
			r.order.PushFront(e)
			r.next = e.seq + 1
		}
	}
	return r
}

// begin finds the call's entry, or makes it and says that the call is the first
// of its kind; then end must follow. redo says that the call may have been done
// already.
func (r *replayCache) begin(peer netip.Addr, h *callHeader, args []byte) (e *replay, first, redo bool) {
	key := replayKey{peer: peer, xid: h.xid, proc: h.proc, args: xxhash.Sum64(args)}
	r.mu.Lock()
	defer r.mu.Unlock()
	if e := r.entries[key]; e != nil {
		redo, e.cut = e.cut, false
		return e, redo, redo
	}
	e = &replay{key: key, seq: r.next, done: make(chan struct{})}
	r.next++
	r.entries[key] = e
	r.order.PushFront(e)
	if r.order.Len() > r.max {
		old := r.order.Remove(r.order.Back()).(*replay)
		delete(r.entries, old.key)
	}
	if r.log != nil {
		r.log.begin(e)
	}
	return e, true, false
}

// end keeps the answer.
func (r *replayCache) end(e *replay, reply []byte) {
	e.reply = append([]byte(nil), reply...)
	if r.log != nil {
		r.log.end(e)
	}
	close(e.done)
}

// wait returns the answer once it is there.
func (e *replay) wait() []byte {
	<-e.done
	return e.reply
}
