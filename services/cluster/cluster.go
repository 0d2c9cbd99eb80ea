// Package cluster decides who is in the cluster.
//
// Nodes are possible (an id), present (the machine runs and has proved who it
// is) or online (its container is part of the cluster), as in Kerrighed. The
// head node decides and keeps what it decided in a store that survives it;
// every node learns it through one stream to the head and shows it to its own
// services as Members.
package cluster

import (
	"context"
	"iter"
	"net/netip"
	"slices"
	"sync"
	"time"
)

// MaxNodes is the size of the id space, 0..255.
const MaxNodes = 256

// State of a node.
type State string

// The states, in the order of joining. Their numbers in Kerrighed are 1, 2, 3.
const (
	Possible State = "possible"
	Present  State = "present"
	Online   State = "online"
)

// Member is a node that is present or online.
type Member struct {
	ID          int
	State       State
	Epoch       uint64 // the node's incarnation; grows at each join
	Hostname    string
	Address     netip.Addr
	Boot        string // random, new at each boot of the machine
	Fingerprint string // of the key that the node has in this boot
	Since       time.Time
	Slow        bool // the daemon hasn't been heard for a while, but the node's kernel answers
	Lost        bool // the daemon isn't connected to the head at the moment
	Leaving     bool // on its way from online to present
}

// Membership is who is in the cluster. It is a value: nobody changes Nodes.
type Membership struct {
	Revision  uint64 // grows with every change, also over a restart of the head
	Connected bool   // false: the head is away, this is what was known last
	AsOf      time.Time
	Nodes     []Member // present and online ones, ascending by id
}

// Find returns the member with that id.
func (m Membership) Find(id int) (Member, bool) {
	i, found := slices.BinarySearchFunc(m.Nodes, id, func(n Member, id int) int { return n.ID - id })
	if !found {
		return Member{ID: id, State: Possible}, false
	}
	return m.Nodes[i], true
}

// Online counts the nodes that are online.
func (m Membership) Online() (n int) {
	for _, node := range m.Nodes {
		if node.State == Online {
			n++
		}
	}
	return n
}

// Members is what a node's services see of the cluster.
type Members interface {
	Snapshot() Membership
	// Watch yields the membership now and at each change until ctx ends. A slow
	// caller misses states in between, never the last one.
	Watch(ctx context.Context) iter.Seq[Membership]
}

// View is a Members that is filled by Set.
type View struct {
	mu      sync.Mutex
	now     Membership    // guarded by mu
	changed chan struct{} // guarded by mu: closed at the next change
}

// NewView returns a View without nodes.
func NewView() *View { return &View{changed: make(chan struct{})} }

// Set replaces the membership. The caller doesn't change m.Nodes any more.
func (v *View) Set(m Membership) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.now = m
	close(v.changed)
	v.changed = make(chan struct{})
}

// Snapshot implements Members.
func (v *View) Snapshot() Membership {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.now
}

// Watch implements Members.
func (v *View) Watch(ctx context.Context) iter.Seq[Membership] {
	return func(yield func(Membership) bool) {
		for {
			v.mu.Lock()
			m, changed := v.now, v.changed
			v.mu.Unlock()
			if ctx.Err() != nil || !yield(m) {
				return
			}
			select {
			case <-ctx.Done():
				return
			case <-changed:
			}
		}
	}
}
