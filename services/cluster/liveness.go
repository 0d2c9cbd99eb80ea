package cluster

import (
	"net/netip"
	"slices"
	"time"
)

func (c *Core) connected(e Connected) {
	n := c.nodes[e.Node]
	if n == nil {
		n = &node{Record: Record{ID: e.Node, State: Possible}}
		c.nodes[e.Node] = n
	}
	same := n.Boot != "" && n.Boot == e.Boot
	if n.conn != 0 {
		if !same {
			// The machine that holds the id is there. If it isn't any more, its
			// stream ends soon, and the other one asks again.
			c.emit(Close{e.Node, e.Conn, "another machine with this node id is connected"})
			c.note(NoteRefused, n, "a second machine with this node id")
			return
		}
		// The daemon was started again, faster than the end of its stream was seen.
		c.emit(Close{n.ID, n.conn, "replaced by a later stream"})
		c.detach(n, "its daemon was started again")
	}
	back := n.lost
	n.conn, n.heard, n.slow, n.lost, n.probe = e.Conn, c.now, false, false, 0
	if !same {
		if n.State != Possible {
			c.died(n, "the machine has booted again")
		}
		n.Boot, n.Held, n.failures, n.retryAt = e.Boot, false, 0, time.Time{}
	}
	moved := !same || n.Hostname != e.Hostname || n.Address != e.Address || n.Fingerprint != e.Fingerprint
	n.Hostname, n.Address, n.Fingerprint = e.Hostname, e.Address, e.Fingerprint
	belongs := n.State == Online && n.Epoch == e.Epoch
	switch {
	case e.Running && belongs:
		if moved {
			c.emit(Save{n.Record})
		}
		c.note(NoteBack, n, "its daemon is connected again")
		if n.op != nil {
			c.tell(n, CmdLeave, "removed from the cluster")
		}
	case e.Running && n.State == Present:
		// A join that ended with the daemon or the head: it didn't happen.
		c.stop(n)
	case e.Running:
		if n.State == Online {
			c.set(n, Possible)
		}
		c.note(NoteFenced, n, "it was declared dead while it was away: its container stops")
		c.stop(n)
	case n.op != nil: // it was leaving
		c.gone(n)
	default:
		c.set(n, Present)
		if back {
			c.note(NoteBack, n, "its daemon is connected again")
		} else {
			c.note(NoteAppeared, n, "present")
		}
	}
}

// detach is the end of a node's stream.
func (c *Core) detach(n *node, why string) {
	n.conn, n.command, n.slow, n.stopping = 0, 0, false, false
	if n.op != nil && n.op.join {
		c.failJoin(n.op, n, why)
	}
	c.settle(n)
}

func (c *Core) disconnected(n *node) {
	c.detach(n, "its daemon has gone away")
	n.heard = c.now
	if n.State == Possible {
		return
	}
	n.lost, n.deadline, n.probeAt = true, c.now.Add(c.timing.DaemonGrace), c.now
	c.note(NoteLost, n, "its daemon has gone away; asking its machine")
}

// left is the orderly end of a machine.
func (c *Core) left(n *node, reason string) {
	conn := n.conn
	c.detach(n, "it goes down: "+reason)
	c.set(n, Possible)
	c.leaveDone(n)
	c.emit(Close{n.ID, conn, "goodbye"})
	c.note(NoteLeft, n, "it goes down: "+reason)
}

// died is the end of an incarnation.
func (c *Core) died(n *node, why string) {
	n.lost, n.probe = false, 0
	if n.op != nil && n.op.join {
		c.failJoin(n.op, n, why)
	}
	c.set(n, Possible)
	c.leaveDone(n)
	c.note(NoteDied, n, why)
}

func (c *Core) probed(n *node, e Probed) {
	n.probe = 0
	if !n.lost {
		return
	}
	n.probeAt = c.now.Add(c.timing.Probe)
	switch {
	case !e.Answers && e.Witness:
		c.died(n, "the machine doesn't answer, others do")
	case !e.Answers:
		// Nobody answers: it is the head that is cut off. The daemon can't have
		// come back in this time, so it doesn't count.
		n.deadline = c.now.Add(c.timing.DaemonGrace)
	case !c.now.Before(n.deadline):
		c.died(n, "the machine answers, but its daemon doesn't come back")
	}
}

func (c *Core) revoked(e Revoked) {
	n := c.nodes[e.Node]
	if n == nil {
		return
	}
	if n.conn != 0 {
		c.emit(Send{Node: n.ID, Conn: n.conn, Command: c.number(), Kind: CmdFence, Epoch: n.Epoch, Reason: "revoked"})
		c.emit(Close{n.ID, n.conn, "revoked"})
		c.detach(n, "revoked")
	}
	n.lost, n.Boot = false, ""
	c.set(n, Possible)
	c.leaveDone(n)
	c.note(NoteRevoked, n, "revoked by the admin")
}

// maxWitnesses is how many other machines are probed beside a lost one.
const maxWitnesses = 4

// witnesses are other machines that should answer if the head's network works:
// connected ones first.
func (c *Core) witnesses(than *node) []netip.Addr {
	var connected, lost []netip.Addr
	for _, id := range c.ids() {
		n := c.nodes[id]
		switch {
		case n == than || !n.Address.IsValid():
		case n.conn != 0:
			connected = append(connected, n.Address)
		case n.lost:
			lost = append(lost, n.Address)
		}
	}
	// Those next to the node in the table are likely to share its switch; spread.
	if len(connected) > maxWitnesses {
		step := len(connected) / maxWitnesses
		for i := range maxWitnesses {
			connected[i] = connected[i*step]
		}
	}
	all := append(connected, lost...)
	return all[:min(len(all), maxWitnesses)]
}

func (c *Core) ids() []int {
	ids := make([]int, 0, len(c.nodes))
	for id := range c.nodes {
		ids = append(ids, id)
	}
	slices.Sort(ids)
	return ids
}

// timers does what is due.
func (c *Core) timers() {
	due := func(t time.Time) bool { return !t.After(c.now) }
	for _, id := range c.ids() {
		n := c.nodes[id]
		if n.lost && n.probe == 0 && due(n.probeAt) {
			n.probe = c.number()
			c.emit(Probe{Node: n.ID, Probe: n.probe, Address: n.Address, Witnesses: c.witnesses(n)})
		}
		if n.conn != 0 && !n.slow && due(n.heard.Add(c.timing.Slow)) {
			n.slow = true
		}
		if n.conn != 0 && n.stopping && n.command == 0 && due(n.stopAt) {
			c.stop(n)
		}
	}
	for _, o := range slices.Clone(c.ops) {
		if due(o.deadline) {
			c.overdue(o)
		}
	}
}

// Next is when Step is to be called again without an event; ok is false if
// nothing is due at any time.
func (c *Core) Next() (at time.Time, ok bool) {
	consider := func(t time.Time) {
		if !ok || t.Before(at) {
			at, ok = t, true
		}
	}
	for _, n := range c.nodes {
		if n.lost && n.probe == 0 {
			consider(n.probeAt)
		}
		if n.conn != 0 && !n.slow {
			consider(n.heard.Add(c.timing.Slow))
		}
		if n.conn != 0 && n.stopping && n.command == 0 {
			consider(n.stopAt)
		}
		if n.candidate() && n.retryAt.After(c.now) {
			consider(n.retryAt)
		}
	}
	for _, o := range c.ops {
		consider(o.deadline)
	}
	return at, ok
}
