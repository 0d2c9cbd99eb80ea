package cluster

import (
	"net/netip"
	"slices"
	"time"
)

// Record is what outlives the head: one a node in the state store.
type Record struct {
	ID          int        `json:"id"`
	State       State      `json:"state"`
	Epoch       uint64     `json:"epoch"`
	Held        bool       `json:"held,omitempty"` // taken out by hand: stays out until it boots again or is added
	Hostname    string     `json:"hostname"`
	Address     netip.Addr `json:"address"`
	Boot        string     `json:"boot"`
	Fingerprint string     `json:"fingerprint"`
	Since       time.Time  `json:"since"`
}

// Start says which nodes join by themselves.
type Start string

// The policies. With all of them the first present node of an empty cluster
// joins alone; Kerrighed calls it the boot node.
const (
	StartAll   Start = "all"   // every present node
	StartTotal Start = "total" // as many as needed for a total, in one step once they are present
	StartNone  Start = "none"  // nobody else; krgadm nodes add does it
)

// Policy is who joins by itself.
type Policy struct {
	Start Start
	Total int // of StartTotal
}

// Timing holds the core's waits.
type Timing struct {
	Probe       time.Duration // between two probes of a node whose daemon is lost
	DaemonGrace time.Duration // for a daemon to come back, while its machine answers
	HeadGrace   time.Duration // for nodes to come back after a restart of the head
	Start       time.Duration // for a container to start
	Stop        time.Duration // for a node to leave
	Retry       time.Duration // before the policy tries a node again; doubles up to RetryMax
	RetryMax    time.Duration
	Slow        time.Duration // silence of a connected daemon after which it is slow
}

// DefaultTiming is for real clusters.
func DefaultTiming() Timing {
	return Timing{
		Probe: time.Second, DaemonGrace: 30 * time.Second, HeadGrace: time.Minute,
		Start: 3 * time.Minute, Stop: 2 * time.Minute, Retry: 5 * time.Second, RetryMax: 5 * time.Minute, Slow: 7 * time.Second,
	}
}

// Core decides; it does nothing else. Events go in, actions come out, time is
// passed in. It isn't safe for concurrent use.
//
// Actions take effect in this order: what is to be saved is saved, then the new
// membership is published, then the rest happens. So nobody is told what a
// restart of the head could forget.
//
// A node's daemon that ends is not a dead node: the node is marked lost and its
// machine probed. Only a machine that doesn't answer while another one does is
// dead; when none answers, it is the head that is cut off.
type Core struct {
	policy Policy
	timing Timing

	now      time.Time
	nodes    map[int]*node
	ops      []*op // running ones
	waiting  []*op // requests for nodes that are busy
	next     uint64
	revision uint64
	changed  map[int]uint64 // revision of each member's last change
	shown    map[int]Member // what was published
	out      []Action
}

// node is all that the core knows of one.
type node struct {
	Record

	conn     uint64    // its stream; 0: none
	heard    time.Time // last message on the stream
	slow     bool
	lost     bool      // was there, and its stream has ended
	deadline time.Time // of lost: when it counts as dead although its machine answers
	probe    uint64    // under way; 0: none
	probeAt  time.Time // next one, if none is under way

	command  uint64    // the join or leave it works on; 0: none
	op       *op       // the operation it takes part in
	stopping bool      // its container must stop before it can do anything else
	stopAt   time.Time // next attempt, when stopping failed

	failures int       // joins by policy that failed in a row
	retryAt  time.Time // earliest next one
}

// NewCore returns a core that knows the records of earlier heads. Revisions of
// the membership begin above base.
func NewCore(now time.Time, records []Record, p Policy, t Timing, base uint64) *Core {
	c := &Core{policy: p, timing: t, now: now, nodes: map[int]*node{}, revision: base, changed: map[int]uint64{}, shown: map[int]Member{}}
	for _, r := range records {
		n := &node{Record: r}
		if n.State != Possible {
			n.lost = true
			n.deadline, n.probeAt = now.Add(t.HeadGrace), now.Add(t.HeadGrace)
		}
		c.nodes[r.ID] = n
	}
	c.publish()
	return c
}

// Step takes events in and returns what is to be done.
func (c *Core) Step(now time.Time, events ...Event) []Action {
	c.now, c.out = now, nil
	for _, e := range events {
		c.handle(e)
	}
	c.timers()
	c.startWaiting()
	c.applyPolicy()
	c.publish()
	return c.out
}

func (c *Core) handle(e Event) {
	switch e := e.(type) {
	case Connected:
		c.connected(e)
	case Asked:
		c.asked(e)
	case Revoked:
		c.revoked(e)
	case Probed:
		if n := c.nodes[e.Node]; n != nil && n.probe == e.Probe {
			c.probed(n, e)
		}
	case Disconnected:
		if n := c.attached(e.Node, e.Conn); n != nil {
			c.disconnected(n)
		}
	case Left:
		if n := c.attached(e.Node, e.Conn); n != nil {
			c.left(n, e.Reason)
		}
	case Heard:
		if n := c.attached(e.Node, e.Conn); n != nil {
			n.heard, n.slow = c.now, false
		}
	case Finished:
		if n := c.attached(e.Node, e.Conn); n != nil && n.command == e.Command {
			n.heard, n.slow, n.command = c.now, false, 0
			c.finished(n, e.Err)
		}
	}
}

// attached is the node whose present stream conn is.
func (c *Core) attached(id int, conn uint64) *node {
	if n := c.nodes[id]; n != nil && n.conn == conn && conn != 0 {
		return n
	}
	return nil
}

func (c *Core) emit(a Action) { c.out = append(c.out, a) }

func (c *Core) note(kind Kind, n *node, text string) {
	c.emit(Note{Kind: kind, Node: n.ID, Epoch: n.Epoch, Text: text})
}

func (c *Core) number() uint64 {
	c.next++
	return c.next
}

// set changes a node's state and saves it.
func (c *Core) set(n *node, s State) {
	if n.State != s {
		n.State, n.Since = s, c.now
	}
	c.emit(Save{n.Record})
}

// tell sends a command that ends with a Finished.
func (c *Core) tell(n *node, kind CommandKind, reason string) {
	n.command = c.number()
	c.emit(Send{Node: n.ID, Conn: n.conn, Command: n.command, Kind: kind, Epoch: n.Epoch, Reason: reason})
}

// member is what others see of a node; ok is false when it is just possible.
func (n *node) member() (_ Member, ok bool) {
	if n.State == Possible {
		return Member{}, false
	}
	return Member{
		ID: n.ID, State: n.State, Epoch: n.Epoch, Hostname: n.Hostname, Address: n.Address, Boot: n.Boot, Fingerprint: n.Fingerprint,
		Since: n.Since, Slow: n.slow, Lost: n.lost, Leaving: n.State == Online && n.op != nil,
	}, true
}

// publish notes which members changed.
func (c *Core) publish() {
	rev := c.revision
	for id, n := range c.nodes {
		m, ok := n.member()
		old, shown := c.shown[id]
		switch {
		case ok && m == old, !ok && !shown:
			continue
		case ok:
			c.shown[id] = m
		default:
			delete(c.shown, id)
		}
		c.revision = rev + 1
		c.changed[id] = c.revision
	}
}

// Revision grows with each change of the membership.
func (c *Core) Revision() uint64 { return c.revision }

// Membership is the present one, Connected and as of the last Step.
func (c *Core) Membership() Membership {
	m := Membership{Revision: c.revision, Connected: true, AsOf: c.now, Nodes: make([]Member, 0, len(c.shown))}
	for _, n := range c.shown {
		m.Nodes = append(m.Nodes, n)
	}
	slices.SortFunc(m.Nodes, func(a, b Member) int { return a.ID - b.ID })
	return m
}

// ChangedSince returns the members that changed after a revision; those that
// are gone have the state Possible.
func (c *Core) ChangedSince(rev uint64) []Member {
	var list []Member
	for id, at := range c.changed {
		if at <= rev {
			continue
		}
		m, ok := c.shown[id]
		if !ok {
			m = Member{ID: id, State: Possible}
		}
		list = append(list, m)
	}
	slices.SortFunc(list, func(a, b Member) int { return a.ID - b.ID })
	return list
}

// recent is how long a machine counts as running after its stream has ended: as
// long as it takes to find out that it is dead.
const recent = 3 * time.Second

// Alive says whether the node's machine is connected, or was a moment ago.
func (c *Core) Alive(id int, now time.Time) bool {
	n := c.nodes[id]
	switch {
	case n == nil:
		return false
	case n.conn != 0:
		return true
	}
	return n.lost && n.State != Possible && n.heard.Add(recent).After(now)
}

// Connection is the node's present stream; 0: none.
func (c *Core) Connection(id int) uint64 {
	if n := c.nodes[id]; n != nil {
		return n.conn
	}
	return 0
}

// Record returns a node's record.
func (c *Core) Record(id int) (Record, bool) {
	n := c.nodes[id]
	if n == nil {
		return Record{ID: id, State: Possible}, false
	}
	return n.Record, true
}
