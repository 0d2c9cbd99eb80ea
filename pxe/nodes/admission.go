package nodes

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"time"

	"krgimage/configs"
)

// maxWaiting bounds the machines that wait: MACs can be made up. The one that
// asked last the longest ago goes first.
const maxWaiting = 64

// wait notes that a machine without an id asked for an address. The caller holds
// mu.
func (r *Registry) wait(mac configs.MAC) {
	if n := r.nodes[mac]; n != nil { // it has an id from a time of another policy
		r.changed(n)
		return
	}
	n := r.waiting[mac]
	if n == nil {
		if len(r.waiting) >= maxWaiting {
			oldest := slices.MinFunc(slices.Collect(maps.Values(r.waiting)), func(a, b *Node) int {
				return cmp.Or(a.FirstSeen.Compare(b.FirstSeen), cmp.Compare(a.MAC, b.MAC))
			})
			delete(r.waiting, oldest.MAC)
		}
		n = &Node{MAC: mac, ID: NoID, Source: Discovered}
		r.waiting[mac] = n
		r.log.Info("a machine waits to be admitted: krgimage nodes admit "+string(mac), "mac", mac)
	}
	n.FirstSeen = r.now()
	for w := range r.watchers {
		w.push(r.show(n))
	}
}

// show is a machine as others see it. The caller holds mu.
func (r *Registry) show(n *Node) Node {
	c := n.clone()
	if c.Admission == ByPolicy && !r.table[c.MAC] && r.cluster.Nodes.Unknown == "manual" {
		c.Admission = Waiting
	}
	return c
}

// Admit lets a machine in: one that waits, one that was revoked, or one that was
// never seen. It is given an id if it has none. That is on disk when Admit
// returns.
func (r *Registry) Admit(mac configs.MAC) (Node, error) {
	r.assignMu.Lock()
	defer r.assignMu.Unlock()
	r.mu.Lock()
	n := r.nodes[mac]
	before := n != nil
	var old Admission
	if before {
		old = n.Admission
	} else {
		var err error
		if n, err = r.discover(mac); err != nil {
			r.mu.Unlock()
			return Node{}, fmt.Errorf("%s: %w", mac, err)
		}
		n.FirstSeen = time.Time{} // it asks for an address yet
	}
	n.Admission = Admitted
	if r.table[mac] {
		n.Admission = ByPolicy // the table lets it in
	}
	delete(r.waiting, mac)
	r.changed(n)
	shown := r.show(n)
	r.mu.Unlock()
	if err := r.save(); err != nil {
		r.mu.Lock()
		defer r.mu.Unlock()
		if n.Admission = old; !before {
			delete(r.nodes, mac)
		}
		return Node{}, err
	}
	r.log.Info("machine admitted", "mac", mac, "node", shown.ID)
	return shown, nil
}

// Revoke locks a machine out, for good: it gets no address, no boot files and no
// settings until it is admitted again, and keeps its id for then. That is on disk
// when Revoke returns.
func (r *Registry) Revoke(mac configs.MAC) (Node, error) {
	r.assignMu.Lock()
	defer r.assignMu.Unlock()
	r.mu.Lock()
	n := r.nodes[mac]
	if n == nil {
		r.mu.Unlock()
		return Node{}, fmt.Errorf("%s: %w", mac, ErrNoMachine)
	}
	n.Admission, n.LeaseUntil = Revoked, time.Time{}
	r.changed(n)
	shown := r.show(n)
	r.mu.Unlock()
	r.log.Warn("machine revoked", "mac", mac, "node", shown.ID)
	// Locked out now in any case, whether or not the disk takes it.
	return shown, r.save()
}

// ByID returns the machine that has an id, whether or not it is let in.
func (r *Registry) ByID(id int) (Node, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, n := range r.nodes {
		if n.ID == id {
			return r.show(n), true
		}
	}
	return Node{}, false
}

// IsRevoked says whether a machine was locked out.
func (r *Registry) IsRevoked(mac configs.MAC) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	n := r.nodes[mac]
	return n != nil && n.Admission == Revoked
}
