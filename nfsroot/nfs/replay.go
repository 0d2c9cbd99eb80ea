package nfs

import (
	"container/list"
	"hash/maphash"
	"net/netip"
	"sync"
)

// maxReplays is how many answers the server remembers.
const maxReplays = 2048

// replayCache remembers the answers to calls that can't be done twice. A client
// whose connection broke repeats what was not answered: without memory, a
// REMOVE that was done would now say that there is no such file. A call is
// recognised by its sender, xid and the whole of its arguments. Nothing of it
// survives the process: a stop finishes and answers what was begun instead.
type replayCache struct {
	seed maphash.Seed
	max  int

	mu      sync.Mutex
	entries map[replayKey]*replay // guarded by mu
	order   *list.List            // of *replay, newest in front; guarded by mu
}

type replayKey struct {
	peer      netip.Addr
	xid, proc uint32
	args      uint64
}

type replay struct {
	key   replayKey
	done  chan struct{}
	reply []byte // set before done is closed
}

func newReplayCache(size int) *replayCache {
	return &replayCache{seed: maphash.MakeSeed(), max: size, entries: map[replayKey]*replay{}, order: list.New()}
}

// begin finds the call's entry, or makes it and says that the call is the first
// of its kind; then end must follow.
func (r *replayCache) begin(peer netip.Addr, h *callHeader, args []byte) (*replay, bool) {
	key := replayKey{peer: peer, xid: h.xid, proc: h.proc, args: maphash.Bytes(r.seed, args)}
	r.mu.Lock()
	defer r.mu.Unlock()
	if e := r.entries[key]; e != nil {
		return e, false
	}
	e := &replay{key: key, done: make(chan struct{})}
	r.entries[key] = e
	r.order.PushFront(e)
	if r.order.Len() > r.max {
		old := r.order.Remove(r.order.Back()).(*replay)
		delete(r.entries, old.key)
	}
	return e, true
}

// end keeps the answer.
func (r *replayCache) end(e *replay, reply []byte) {
	e.reply = append([]byte(nil), reply...)
	close(e.done)
}

// wait returns the answer once it is there.
func (e *replay) wait() []byte {
	<-e.done
	return e.reply
}
