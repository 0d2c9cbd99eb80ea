package cluster

import (
	"cmp"
	"fmt"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// op is a join or a leave of some nodes. A join is one step: it ends with all of
// them online, or with all of them present.
type op struct {
	join     bool
	request  uint64 // to answer; 0: the policy's
	nodes    []*node
	pending  map[*node]bool // have not finished
	deadline time.Time
	errno    unix.Errno // why it failed; 0: it hasn't
	text     string
}

func (c *Core) asked(e Asked) {
	refuse := func(errno unix.Errno, format string, args ...any) {
		c.emit(Answer{e.Request, errno, fmt.Sprintf(format, args...)})
	}
	if from := c.nodes[e.From]; e.From != FromHead && (from == nil || from.State != Online) {
		refuse(unix.EPERM, "node %d isn't online", e.From)
		return
	}
	if e.Operation == OpPoweroff || e.Operation == OpReboot {
		c.emit(Answer{Request: e.Request})
		kind := CmdPoweroff
		if e.Operation == OpReboot {
			kind = CmdReboot
		}
		for _, id := range c.ids() {
			if n := c.nodes[id]; n.conn != 0 && n.State == Online {
				c.emit(Send{Node: id, Conn: n.conn, Command: c.number(), Kind: kind, Epoch: n.Epoch, Reason: "the whole cluster goes down"})
			}
		}
		return
	}
	join := e.Operation == OpAdd
	o := &op{join: join, request: e.Request, pending: map[*node]bool{}}
	for _, id := range slices.Compact(slices.Sorted(slices.Values(e.Nodes))) {
		n := c.nodes[id]
		switch {
		case id < 0 || id >= MaxNodes:
			refuse(unix.EINVAL, "%d is not a node id", id)
			return
		case n == nil || n.State == Possible:
			refuse(unix.ENONET, "node %d isn't present", id)
			return
		case join && n.State == Online:
			refuse(unix.EPERM, "node %d is online already", id)
			return
		case !join && n.State != Online:
			refuse(unix.EPERM, "node %d isn't online", id)
			return
		case !join && id == e.From:
			refuse(unix.EPERM, "node %d can't remove itself", id)
			return
		}
		o.nodes = append(o.nodes, n)
	}
	c.waiting = append(c.waiting, o)
}

// startWaiting starts the requests whose nodes are all free.
func (c *Core) startWaiting() {
	waiting := c.waiting
	c.waiting = nil
	for _, o := range waiting {
		busy := false
		for _, n := range o.nodes {
			busy = busy || n.op != nil || n.stopping
		}
		if busy {
			c.waiting = append(c.waiting, o)
			continue
		}
		// What others did in the meantime needn't be done again.
		o.nodes = slices.DeleteFunc(o.nodes, func(n *node) bool { return o.join == (n.State == Online) })
		i := slices.IndexFunc(o.nodes, func(n *node) bool { return n.conn == 0 && (o.join || n.State == Possible) })
		switch {
		case i >= 0 && o.join:
			c.emit(Answer{o.request, unix.EAGAIN, fmt.Sprintf("node %d has gone away", o.nodes[i].ID)})
		case len(o.nodes) == 0:
			c.emit(Answer{Request: o.request})
		case o.join:
			c.beginJoin(o)
		default:
			c.beginLeave(o)
		}
	}
}

func (c *Core) beginJoin(o *op) {
	o.deadline, o.pending = c.now.Add(c.timing.Start), map[*node]bool{}
	c.ops = append(c.ops, o)
	for _, n := range o.nodes {
		n.op, n.Held = o, false
		n.Epoch++
		c.emit(Save{n.Record})
		o.pending[n] = true
		c.tell(n, CmdJoin, "")
	}
}

func (c *Core) beginLeave(o *op) {
	o.deadline, o.pending = c.now.Add(c.timing.Stop), map[*node]bool{}
	c.ops = append(c.ops, o)
	for _, n := range o.nodes {
		n.op = o
		o.pending[n] = true
		if n.conn != 0 { // or else when it is back
			c.tell(n, CmdLeave, "removed from the cluster")
		}
	}
}

// finished is the end of a node's command.
func (c *Core) finished(n *node, failed string) {
	o := n.op
	switch {
	case n.stopping && failed != "":
		n.stopAt = c.now.Add(c.timing.Retry)
	case n.stopping:
		n.stopping = false
		c.stopped(n)
	case o == nil:
	case o.join && failed != "":
		c.failJoin(o, n, failed)
	case o.join:
		delete(o.pending, n)
		if len(o.pending) == 0 {
			c.joined(o)
		}
	case failed != "":
		o.errno, o.text = cmp.Or(o.errno, unix.EBUSY), cmp.Or(o.text, fmt.Sprintf("node %d: %s", n.ID, failed))
		n.op = nil
		c.leaveProgress(o, n)
	default:
		c.gone(n)
	}
}

// joined is the good end of a join.
func (c *Core) joined(o *op) {
	c.end(o)
	for _, n := range o.nodes {
		n.op, n.failures = nil, 0
		c.set(n, Online)
		c.note(NoteJoined, n, "online")
	}
	c.answer(o)
}

// failJoin takes a join back because of one node. The others' containers stop;
// the request is answered when they have.
func (c *Core) failJoin(o *op, because *node, why string) {
	first := o.errno == 0
	o.errno = unix.EAGAIN
	delete(o.pending, because)
	because.op = nil
	if first {
		o.text = fmt.Sprintf("node %d: %s", because.ID, why)
		c.note(NoteJoinFailed, because, why)
		o.deadline = c.now.Add(c.timing.Stop)
		clear(o.pending)
		for _, n := range o.nodes {
			n.op = nil
			if o.request == 0 {
				n.failures++
				n.retryAt = c.now.Add(min(c.timing.Retry<<min(n.failures-1, 16), c.timing.RetryMax))
			}
			if n != because && n.conn != 0 {
				c.stop(n)
				o.pending[n] = true
			}
		}
	}
	c.rollbackProgress(o)
}

func (c *Core) rollbackProgress(o *op) {
	if len(o.pending) == 0 {
		c.end(o)
		c.answer(o)
	}
}

// stop makes a connected node's container stop, outside of a leave.
func (c *Core) stop(n *node) {
	n.stopping = true
	c.tell(n, CmdFence, "it isn't part of the cluster")
}

// stopped is the end of stop.
func (c *Core) stopped(n *node) {
	if n.State != Present {
		c.set(n, Present)
		c.note(NoteAppeared, n, "present")
	}
	c.settle(n)
}

// settle takes a node out of the roll-back it may be part of.
func (c *Core) settle(n *node) {
	for _, o := range slices.Clone(c.ops) {
		if o.join && o.errno != 0 && o.pending[n] {
			delete(o.pending, n)
			c.rollbackProgress(o)
		}
	}
}

// gone is the good end of a node's leave.
func (c *Core) gone(n *node) {
	n.Held = true
	c.set(n, Present)
	c.leaveDone(n)
	c.note(NoteLeft, n, "present")
}

// leaveDone ends a node's part in what it took part in, when its container
// doesn't exist any more.
func (c *Core) leaveDone(n *node) {
	c.settle(n)
	if o := n.op; o != nil && !o.join {
		n.op = nil
		c.leaveProgress(o, n)
	}
}

func (c *Core) leaveProgress(o *op, n *node) {
	delete(o.pending, n)
	if len(o.pending) == 0 {
		c.end(o)
		c.answer(o)
	}
}

// overdue ends an operation that takes too long.
func (c *Core) overdue(o *op) {
	switch {
	case o.join && o.errno == 0:
		for _, n := range o.nodes {
			if o.pending[n] {
				c.failJoin(o, n, fmt.Sprintf("its container didn't start within %v", c.timing.Start))
				if n.conn != 0 {
					c.stop(n)
				}
				return
			}
		}
	default:
		// Those that hang go on with it; nobody waits for them any more.
		o.errno = cmp.Or(o.errno, unix.ETIMEDOUT)
		o.text = cmp.Or(o.text, fmt.Sprintf("not done within %v", c.timing.Stop))
		for n := range o.pending {
			if n.op == o {
				n.op = nil
			}
		}
		c.end(o)
		c.answer(o)
	}
}

func (c *Core) end(o *op) {
	c.ops = slices.DeleteFunc(c.ops, func(x *op) bool { return x == o })
}

func (c *Core) answer(o *op) {
	if o.request != 0 {
		c.emit(Answer{o.request, o.errno, o.text})
	}
}

// candidate says whether the policy may let a node join, but for the time.
func (n *node) candidate() bool {
	return n.conn != 0 && n.State == Present && !n.Held && n.op == nil && !n.stopping
}

// applyPolicy lets nodes join by themselves.
func (c *Core) applyPolicy() {
	var free []*node
	members := 0 // online or on the way there
	for _, id := range c.ids() {
		n := c.nodes[id]
		switch {
		case n.State == Online || n.op != nil && n.op.join:
			members++
		case n.candidate() && !n.retryAt.After(c.now):
			free = append(free, n)
		}
	}
	if len(free) == 0 {
		return
	}
	switch {
	case c.policy.Start == StartAll:
		for _, n := range free {
			c.beginJoin(&op{join: true, nodes: []*node{n}})
		}
	case members == 0:
		c.beginJoin(&op{join: true, nodes: free[:1]})
	case c.policy.Start == StartTotal:
		if need := c.policy.Total - members; need > 0 && len(free) >= need {
			c.beginJoin(&op{join: true, nodes: free[:need]})
		}
	}
}
