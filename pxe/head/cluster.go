package head

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"path/filepath"
	"time"

	"krgimage/configs"
	"krgimage/pxe/nodes"
	"krgimage/services/admission"
	"krgimage/services/cluster"
	"krgimage/services/cluster/coordinator"
	"krgimage/services/identity"
	"krgimage/services/state/etcd"
)

// members is the head's cluster service: who belongs to the cluster, and what
// they share. What lasts is in StateDir/head/ca and StateDir/head/etcd.
type members struct {
	store       *etcd.Store
	desk        *admission.Desk
	coordinator *coordinator.Server
}

// Limits of starting the state store.
const (
	aloneLimit = time.Minute      // a slow disk, not an election
	headsLimit = 10 * time.Minute // for the other heads to be started
)

// openMembers opens the authority and the state store and takes over what an
// earlier head decided.
func (h *Head) openMembers(ctx context.Context) (*members, error) {
	c, dir := &h.cfg.Cluster, filepath.Join(h.cfg.StateDir, "head")
	authority, err := identity.Open(filepath.Join(dir, "ca"), c.SessionID, nil)
	if err != nil {
		return nil, err
	}
	m := &members{}
	if m.store, err = h.openStore(ctx, filepath.Join(dir, "etcd")); err != nil {
		return nil, err
	}
	cfg := coordinator.Config{Store: m.store, Policy: policy(c.Cluster), Log: h.cfg.Log}
	if d, ok := h.cfg.Network.(dialer); ok {
		cfg.Dial = d.DialTCP
	}
	if m.coordinator, err = coordinator.Open(ctx, cfg); err == nil {
		m.desk, err = admission.Open(ctx, admission.Config{
			Authority: authority, Store: m.store, Log: h.cfg.Log,
			Alive: m.coordinator.Alive, Ended: m.coordinator.Ended,
		})
	}
	if err != nil {
		m.store.Close()
		return nil, err
	}
	return m, nil
}

// dialer is a Network whose nodes can be reached only through it.
type dialer interface {
	DialTCP(ctx context.Context, addr netip.AddrPort) (net.Conn, error)
}

func policy(s configs.Service) cluster.Policy {
	if total := s.Total(); total > 0 {
		return cluster.Policy{Start: cluster.StartTotal, Total: total}
	}
	return cluster.Policy{Start: cluster.Start(s.Start)}
}

func (h *Head) openStore(ctx context.Context, dir string) (*etcd.Store, error) {
	c := &h.cfg.Cluster
	s := c.Cluster.Store
	namespace := "krgimage/" + c.Name
	files := etcd.Files{CA: s.CA, Cert: s.Cert, Key: s.Key}
	switch s.Kind {
	case "etcd":
		return etcd.Existing(ctx, etcd.ExistingConfig{URLs: s.URLs, Files: files, Namespace: namespace, Log: h.cfg.Log})
	case "heads":
		heads := map[string]string{}
		for _, head := range s.Heads {
			heads[head.Name] = head.URL
		}
		h.log.Info("waiting until most of the heads run", "heads", len(heads))
		ctx, cancel := context.WithTimeout(ctx, headsLimit)
		defer cancel()
		return etcd.Embedded(ctx, etcd.MemberConfig{Dir: dir, Namespace: namespace, Log: h.cfg.Log, Heads: heads, Name: s.Name, Files: files})
	}
	ctx, cancel := context.WithTimeout(ctx, aloneLimit)
	defer cancel()
	return etcd.Embedded(ctx, etcd.MemberConfig{Dir: dir, Namespace: namespace, Log: h.cfg.Log})
}

// services are the members' parts of Run; l is the cluster service's listener.
func (m *members) services(l net.Listener) []service {
	return []service{
		{name: "state", run: m.watchStore},
		{name: "identities", run: m.desk.Run},
		{name: "cluster", run: func(ctx context.Context) error { return m.coordinator.Serve(ctx, l, m.desk) }},
	}
}

// watchStore ends with the state store's failure.
func (m *members) watchStore(ctx context.Context) error {
	select {
	case <-ctx.Done():
		return nil
	case <-m.store.Failed():
		return m.store.Err()
	}
}

// Close implements io.Closer.
func (m *members) Close() error { return m.store.Close() }

// Desk is the admission desk; nil before Run has opened it.
func (h *Head) Desk() *admission.Desk {
	if m := h.members.Load(); m != nil {
		return m.desk
	}
	return nil
}

// Coordinator is the cluster service; nil before Run has opened it.
func (h *Head) Coordinator() *coordinator.Server {
	if m := h.members.Load(); m != nil {
		return m.coordinator
	}
	return nil
}

// dropper is an NFS that can end the connections of one client, which it has let
// in when they began.
type dropper interface{ Drop(netip.Addr) }

// machine finds a machine by its MAC or, if that is empty, its id.
func (h *Head) machine(mac configs.MAC, id int) (configs.MAC, error) {
	if mac != "" {
		return mac, nil
	}
	n, ok := h.nodes.ByID(id)
	if !ok {
		return "", fmt.Errorf("node %d: %w", id, nodes.ErrNoMachine)
	}
	return n.MAC, nil
}

// Admit lets a machine in, by its MAC or, if that is empty, by its id. One that
// is let in already may get a new identity in its present boot, unless it runs.
func (h *Head) Admit(ctx context.Context, mac configs.MAC, id int) (nodes.Node, error) {
	mac, err := h.machine(mac, id)
	if err != nil {
		return nodes.Node{}, err
	}
	n, err := h.nodes.Admit(mac)
	if err != nil {
		return nodes.Node{}, err
	}
	if err := h.Desk().Readmit(ctx, n.ID); err != nil && !errors.Is(err, admission.ErrAlive) {
		return nodes.Node{}, err
	}
	return n, nil
}

// Revoke locks a machine out: no lease, no root, no identity, from now on until
// it is admitted again. What it has open to the head is closed.
func (h *Head) Revoke(ctx context.Context, mac configs.MAC, id int) (nodes.Node, error) {
	mac, err := h.machine(mac, id)
	if err != nil {
		return nodes.Node{}, err
	}
	n, registryErr := h.nodes.Revoke(mac)
	if n.MAC == "" {
		return nodes.Node{}, registryErr
	}
	err = errors.Join(registryErr, h.Desk().Revoke(ctx, n.ID))
	if d, ok := h.cfg.NFS.(dropper); ok {
		d.Drop(n.Address)
	}
	return n, err
}
