package nodes

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"sync"
	"time"

	"krgimage/configs"
)

// Config is what a Registry works from.
type Config struct {
	Cluster configs.Cluster
	File    string           // where the handed-out ids are kept, e.g. STATE/head/nodes.json
	Log     *slog.Logger     // nil: silent
	Now     func() time.Time // nil: time.Now
}

// Registry is the set of known machines. It is safe for concurrent use.
type Registry struct {
	cluster configs.Cluster
	file    string
	log     *slog.Logger
	now     func() time.Time
	table   map[configs.MAC]bool // MACs of nodes.table; fixed

	mu       sync.Mutex
	nodes    map[configs.MAC]*Node // guarded by mu
	waiting  map[configs.MAC]*Node // machines without an id that wait to be admitted; guarded by mu
	watchers map[*watcher]bool     // guarded by mu
	changes  uint64                // counts what the file should hold; guarded by mu

	assignMu sync.Mutex // one assignment at a time, up to the disk; taken before saveMu

	saveMu sync.Mutex // held while the file is written; taken before mu
	saved  uint64     // the value of changes that is on disk; guarded by saveMu
}

// Open reads the node file and merges it with the node table. A file that can't
// be understood is an error that names it and leaves it as it is.
func Open(cfg Config) (*Registry, error) {
	r := &Registry{
		cluster:  cfg.Cluster,
		file:     cfg.File,
		log:      cfg.Log,
		now:      cfg.Now,
		table:    map[configs.MAC]bool{},
		nodes:    map[configs.MAC]*Node{},
		waiting:  map[configs.MAC]*Node{},
		watchers: map[*watcher]bool{},
	}
	if r.log == nil {
		r.log = slog.New(slog.DiscardHandler)
	}
	r.log = r.log.With("component", "nodes")
	if r.now == nil {
		r.now = time.Now
	}
	if err := r.fillTable(); err != nil {
		return nil, err
	}
	kept, err := readFile(cfg.File)
	if err != nil {
		return nil, err
	}
	r.merge(kept)
	r.changes++ // shows now, not at the first machine, that the file can be written
	if err := r.save(); err != nil {
		return nil, err
	}
	return r, nil
}

// fillTable enters the rows of the node table. The configuration was validated;
// a registry with two owners of an id would be wrong for ever, so the uniqueness
// is checked here again.
func (r *Registry) fillTable() error {
	for i, row := range r.cluster.Nodes.Table {
		n, err := r.describe(row.MAC, row.ID)
		if err != nil && !row.Address.IsValid() {
			return fmt.Errorf("nodes.table[%d] (%s): %w", i, row.MAC, err)
		}
		if row.Address.IsValid() {
			n.Address = row.Address
		}
		n.Hostname = cmp.Or(row.Hostname, n.Hostname)
		n.Source = FromTable
		if r.nodes[n.MAC] != nil {
			return fmt.Errorf("nodes.table[%d]: MAC %s is listed twice", i, n.MAC)
		}
		for _, o := range r.nodes {
			if o.ID == n.ID || o.Address == n.Address {
				return fmt.Errorf("nodes.table[%d]: %s has the id (%d) or the address (%s) of %s", i, n.MAC, n.ID, n.Address, o.MAC)
			}
		}
		r.nodes[n.MAC], r.table[n.MAC] = &n, true
	}
	return nil
}

// merge adds what an earlier run handed out. Lower ids go first only to make the
// log readable: no two kept entries can clash, unless the file was edited.
func (r *Registry) merge(kept []Node) {
	slices.SortFunc(kept, func(a, b Node) int { return cmp.Compare(a.ID, b.ID) })
	for _, k := range kept {
		log := r.log.With("mac", k.MAC, "node", k.ID)
		if row := r.nodes[k.MAC]; row != nil {
			if r.table[k.MAC] && row.ID != k.ID {
				log.Warn(fmt.Sprintf("the node table gives this machine id %d: its earlier id %d is free again", row.ID, k.ID))
			}
			row.FirstSeen, row.Boot, row.Admission = k.FirstSeen, k.Boot, k.Admission
			if row.Address == k.Address {
				row.LeaseUntil = k.LeaseUntil
			}
			continue
		}
		n, err := r.describe(k.MAC, k.ID)
		if err != nil {
			log.Warn("a discovered machine loses its id: it has no address in the subnet any more", "err", err)
			continue
		}
		if o := r.owner(n.ID, n.Address); o != nil {
			log.Warn(fmt.Sprintf("the node table gives id %d with address %s to %s: this machine loses its id and is given another one when it boots", o.ID, o.Address, o.MAC))
			continue
		}
		if reserved := r.reserved(n.Address); reserved != "" {
			log.Warn("a discovered machine loses its id: its address is " + reserved)
			continue
		}
		n.FirstSeen, n.Boot, n.Admission = k.FirstSeen, k.Boot, k.Admission
		if n.Address == k.Address {
			n.LeaseUntil = k.LeaseUntil
		}
		r.nodes[n.MAC] = &n
	}
}

// describe is a machine with the default name and address of its id.
func (r *Registry) describe(mac configs.MAC, id int) (Node, error) {
	addr, err := r.cluster.Address(id)
	return Node{MAC: mac, ID: id, Hostname: r.cluster.Hostname(id), Address: addr, Source: Discovered}, err
}

// owner is the machine that holds the id or the address. The caller holds mu or
// is the only one to know r.
func (r *Registry) owner(id int, addr netip.Addr) *Node {
	for _, n := range r.nodes {
		if n.ID == id || n.Address == addr {
			return n
		}
	}
	return nil
}

// reserved says what an address is for when no node may have it.
func (r *Registry) reserved(a netip.Addr) string {
	net := r.cluster.Network
	switch subnet := net.Subnet.Masked(); {
	case a == net.Head:
		return "the head's"
	case a == net.Gateway:
		return "the gateway's"
	case slices.Contains(net.DNS, a):
		return "a name server's"
	case subnet.Bits() < 31 && a == subnet.Addr():
		return "the subnet's own"
	case subnet.Bits() < 31 && !subnet.Contains(a.Next()):
		return "the broadcast address"
	}
	return ""
}

// Assign returns the machine with this MAC; an unknown one is given an id if the
// policy allows. A new id is on disk when Assign returns.
// The error is ErrRefused, ErrWaiting, ErrRevoked, ErrNoFreeID or that of the file.
func (r *Registry) Assign(mac configs.MAC) (Node, error) {
	// Held up to the disk: a second request of the same machine must not be
	// answered from an assignment that may yet fail.
	r.assignMu.Lock()
	defer r.assignMu.Unlock()
	n, isNew, err := r.assign(mac)
	if err != nil || !isNew {
		return n, err
	}
	if err := r.save(); err != nil {
		// Never promise an id that a restart would not remember.
		r.mu.Lock()
		delete(r.nodes, mac)
		r.mu.Unlock()
		return Node{}, err
	}
	r.log.Info("new machine", "mac", mac, "node", n.ID, "address", n.Address)
	return n, nil
}

func (r *Registry) assign(mac configs.MAC) (_ Node, isNew bool, _ error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if n := r.known(mac); n != nil {
		if n.FirstSeen.IsZero() {
			n.FirstSeen = r.now()
			r.changed(n)
		}
		return n.clone(), false, nil
	}
	if n := r.nodes[mac]; n != nil && n.Admission == Revoked {
		return Node{}, false, ErrRevoked
	}
	switch r.cluster.Nodes.Unknown {
	case "refuse":
		return Node{}, false, ErrRefused
	case "manual":
		r.wait(mac)
		return Node{}, false, ErrWaiting
	}
	n, err := r.discover(mac)
	if err != nil {
		return Node{}, false, err
	}
	return n.clone(), true, nil
}

// discover gives a machine the lowest free id. The caller holds mu.
func (r *Registry) discover(mac configs.MAC) (*Node, error) {
	for _, id := range r.cluster.DiscoverIDs() {
		n, err := r.describe(mac, id)
		if err != nil || r.reserved(n.Address) != "" || r.owner(id, n.Address) != nil {
			continue
		}
		n.FirstSeen = r.now()
		r.nodes[mac] = &n
		r.changed(&n)
		return &n, nil
	}
	return nil, ErrNoFreeID
}

// known is the machine with this MAC if it is let in: with "refuse" and "manual"
// an earlier discovery keeps its id in the file, for the day the policy is changed
// back, but is not served. The caller holds mu.
func (r *Registry) known(mac configs.MAC) *Node {
	n := r.nodes[mac]
	if n == nil {
		return nil
	}
	switch {
	case n.Admission == Revoked:
		return nil
	case n.Admission == Admitted, r.table[mac], r.cluster.Nodes.Unknown == "discover":
		return n
	}
	return nil
}

// Lookup returns the machine with this MAC.
func (r *Registry) Lookup(mac configs.MAC) (Node, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	n := r.known(mac)
	if n == nil {
		return Node{}, false
	}
	return n.clone(), true
}

// ByAddress returns the machine that was given this address in a lease. The end
// of the lease doesn't matter: an address belongs to one MAC for good, so nobody
// else can have it, and a node whose renewals got lost must still be heard.
func (r *Registry) ByAddress(addr netip.Addr) (Node, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for mac, n := range r.nodes {
		if n.Address == addr && !n.LeaseUntil.IsZero() && r.known(mac) != nil {
			return n.clone(), true
		}
	}
	return Node{}, false
}

// Snapshot returns all machines by id, those that wait and have none first.
func (r *Registry) Snapshot() []Node {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.snapshot()
}

// snapshot is Snapshot for a caller who holds mu.
func (r *Registry) snapshot() []Node {
	all := make([]Node, 0, len(r.nodes)+len(r.waiting))
	for _, n := range r.nodes {
		all = append(all, r.show(n))
	}
	for _, n := range r.waiting {
		all = append(all, r.show(n))
	}
	slices.SortFunc(all, func(a, b Node) int { return cmp.Or(cmp.Compare(a.ID, b.ID), cmp.Compare(a.MAC, b.MAC)) })
	return all
}

// Leased notes a lease that was granted until the given time. The first one of a
// machine is on disk when Leased returns, so that a head that dies now knows the
// node's address when it is back.
func (r *Registry) Leased(mac configs.MAC, until time.Time) {
	r.mu.Lock()
	n := r.known(mac)
	if n == nil {
		r.mu.Unlock()
		return
	}
	first := n.LeaseUntil.IsZero()
	n.LeaseUntil = until
	r.changed(n)
	r.mu.Unlock()
	if !first {
		return
	}
	if err := r.save(); err != nil {
		r.log.Error("the lease is granted but could not be noted", "mac", mac, "err", err)
	}
}

// Released notes that a machine gave its lease back.
func (r *Registry) Released(mac configs.MAC) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if n := r.known(mac); n != nil && !n.LeaseUntil.IsZero() {
		n.LeaseUntil = time.Time{}
		r.changed(n)
	}
}

// Discovering notes a firmware's DISCOVER. It begins a new timeline, unless the
// firmware repeats itself or is the iPXE that the timeline's loader started.
func (r *Registry) Discovering(mac configs.MAC, ipxe bool, detail string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	n, now := r.known(mac), r.now()
	if n == nil || n.Boot.continues(ipxe, now) {
		return
	}
	n.Boot = &Boot{Started: now}
	n.Boot.add(StageDHCP, now, detail)
	r.changed(n)
	r.log.Info("boot begins", "mac", mac, "node", n.ID, "firmware", detail)
}

// Saw notes a stage that the head itself observed.
func (r *Registry) Saw(mac configs.MAC, s Stage, detail string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	n, now := r.known(mac), r.now()
	if n == nil {
		return
	}
	if n.Boot == nil {
		n.Boot = &Boot{Started: now}
	}
	if n.Boot.add(s, now, detail) {
		r.changed(n)
		r.log.Info("stage", "mac", mac, "node", n.ID, "stage", s, "detail", Clean(detail))
	}
}

// Report notes a stage that the node posted, with its uptime at that stage.
// Repeating a report changes nothing.
func (r *Registry) Report(mac configs.MAC, s Stage, uptime time.Duration, detail string) error {
	if !s.FromNode() {
		return fmt.Errorf("stage %q is not one that a node reports", s)
	}
	if uptime < 0 || uptime > maxUptime {
		return fmt.Errorf("uptime %v of stage %s is out of range", uptime, s)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	n, now := r.known(mac), r.now()
	if n == nil {
		return fmt.Errorf("%s: %w", mac, ErrRefused)
	}
	if n.Boot == nil || n.Boot.newKernel(s, uptime, now) {
		n.Boot = &Boot{Started: now.Add(-uptime)}
	}
	if n.Boot.addReported(s, uptime, now, detail) {
		r.changed(n)
		r.log.Info("stage", "mac", mac, "node", n.ID, "stage", s, "uptime", uptime, "detail", Clean(detail))
	}
	return nil
}

// maxUptime keeps the arithmetic of timelines far from overflow.
const maxUptime = 10 * 365 * 24 * time.Hour

// LoaderAge is the time since the machine fetched a boot loader in its present
// boot; ok is false when it has not.
func (r *Registry) LoaderAge(mac configs.MAC) (age time.Duration, ok bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	n := r.known(mac)
	if n == nil {
		return 0, false
	}
	e, ok := n.Boot.Find(StageLoader)
	return r.now().Sub(e.At), ok
}

// changed passes a machine's new state on. The caller holds mu.
func (r *Registry) changed(n *Node) {
	r.changes++
	for w := range r.watchers {
		w.push(r.show(n))
	}
}

// Run writes what is not urgent (timelines, renewed leases) to the node file
// every few seconds, and a last time when ctx ends.
func (r *Registry) Run(ctx context.Context) error {
	tick := time.NewTicker(5 * time.Second)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return r.save()
		case <-tick.C:
			if err := r.save(); err != nil {
				r.log.Error("will be tried again", "err", err)
			}
		}
	}
}
