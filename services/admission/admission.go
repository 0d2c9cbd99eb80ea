// Package admission is the head's desk at which machines become members: it
// hands out boot tokens, turns them into certificates, knows which key is each
// node's present one, and takes all of it away again.
//
//	Offer    a booting machine asks for its settings: its token goes with them
//	Redeem   the machine brings the token and a certificate request
//	Renew    a member asks for its next certificate
//	Verify   somebody connects with a certificate: is it a member's, still?
//	Revoke   the admin ends a member
//
// A node has one identity: that of its last boot. Admitting a boot ends the
// identity of the one before; while that one is alive no other is admitted, so
// that two machines never hold one node id. The identities are records in the
// state store, so a restart of the head forgets none.
//
// Everything that is refused is logged with its reason and counted.
//
// Who may boot at all is decided before, by the node registry (package
// pxe/nodes): only machines that it knows come here.
package admission

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"strconv"
	"strings"
	"sync"
	"time"

	"krgimage/services/identity"
	"krgimage/services/state"
)

// Keys in the state store.
const (
	prefix       = "identity/"
	nodePrefix   = prefix + "node/"
	authorityKey = prefix + "authority"
)

// Errors besides those of package identity.
var (
	ErrAlive        = errors.New("this node id is in use by a machine that is running")
	ErrNotAdmitted  = errors.New("not admitted")
	ErrUnprivileged = errors.New("asked from a port that every user of a node can use")
)

// Config is what a Desk works from.
type Config struct {
	Authority *identity.Authority
	Store     state.Store
	// Alive says whether a node's present machine is running: connected to the
	// head, or not yet given up by it. nil: none is.
	Alive func(node int) bool
	// Ended is called when a node's identity is no longer valid, with the
	// fingerprint of its key and the reason: ErrRevoked, or ErrStale when a later
	// boot took its place. Its connections are to be closed. May be nil.
	Ended func(node int, fingerprint string, why error)
	Log   *slog.Logger     // nil: silent
	Now   func() time.Time // nil: time.Now
}

// Desk is the head's admission desk. It is safe for concurrent use.
type Desk struct {
	cfg    Config
	log    *slog.Logger
	tokens *identity.Tokens

	admitting sync.Mutex // one change of the records at a time, up to the store; taken before mu

	mu      sync.Mutex
	records map[int]record      // without a fingerprint: the node has none since mod; guarded by mu
	refused map[string]uint64   // by reason; guarded by mu
	quiet   map[string]quieting // what was logged of whom lately; guarded by mu
}

// record is a node's identity in the state store.
type record struct {
	MAC         string     `json:"mac"`
	Address     netip.Addr `json:"address"`
	Boot        string     `json:"boot"`
	Fingerprint string     `json:"fingerprint"`
	Admitted    time.Time  `json:"admitted"`

	mod state.Revision
}

// AuthorityError says that the store's members were admitted by another
// authority than the one that is there now.
type AuthorityError struct{ Stored, Present string }

func (e *AuthorityError) Error() string {
	return fmt.Sprintf("the cluster's members were admitted by the certificate authority %.16s…, but the one in state/head/ca is %.16s…\n"+
		"Bring state/head/ca back from a backup. Without one: stop the head, move state/head/etcd away, start the head, and reboot every node", e.Stored, e.Present)
}

// Open reads the identities. The error is an *AuthorityError when they are of
// another authority.
func Open(ctx context.Context, cfg Config) (*Desk, error) {
	if cfg.Alive == nil {
		cfg.Alive = func(int) bool { return false }
	}
	if cfg.Ended == nil {
		cfg.Ended = func(int, string, error) {}
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	d := &Desk{
		cfg: cfg, log: cfg.Log.With("component", "admission"), tokens: identity.NewTokens(cfg.Now),
		records: map[int]record{}, refused: map[string]uint64{}, quiet: map[string]quieting{},
	}
	if err := d.claim(ctx); err != nil {
		return nil, err
	}
	entries, _, err := cfg.Store.List(ctx, nodePrefix)
	if err != nil {
		return nil, fmt.Errorf("read the nodes' identities: %w", err)
	}
	for _, e := range entries {
		node, ok := nodeOf(e.Key)
		if !ok {
			return nil, fmt.Errorf("the state store's record %s names no node", e.Key)
		}
		if err := d.enter(node, e, false); err != nil {
			return nil, err
		}
	}
	return d, nil
}

// claim makes sure that the store and the authority belong together.
func (d *Desk) claim(ctx context.Context) error {
	own := d.cfg.Authority.Fingerprint()
	for {
		e, err := d.cfg.Store.Get(ctx, authorityKey)
		switch {
		case err == nil && string(e.Value) == own:
			return nil
		case err == nil:
			return &AuthorityError{Stored: string(e.Value), Present: own}
		case !errors.Is(err, state.ErrNotFound):
			return fmt.Errorf("read the state store: %w", err)
		}
		_, err = d.cfg.Store.Apply(ctx, state.Txn{
			If:   []state.Condition{{Key: authorityKey}},
			Puts: []state.Put{{Key: authorityKey, Value: []byte(own)}},
		})
		if err != nil && !errors.Is(err, state.ErrConflict) {
			return fmt.Errorf("write the state store: %w", err)
		}
	}
}

// Bundle is what nodes are told to trust, in PEM.
func (d *Desk) Bundle() []byte { return d.cfg.Authority.Bundle() }

// Offer returns the boot token of a machine that boots; the boot is one that the
// machine names. The error says why there is none: ErrUsed when this boot has its
// identity already, ErrAlive when the node's present machine is another one.
func (d *Desk) Offer(to identity.Binding) (string, error) {
	token, err := d.offer(to)
	if err != nil {
		d.Refuse("token", to, err)
	}
	return token, err
}

func (d *Desk) offer(to identity.Binding) (string, error) {
	if !identity.ValidBoot(to.Boot) {
		return "", fmt.Errorf("the name of the boot: %w", identity.ErrMalformed)
	}
	r, ok := d.record(to.Node)
	if ok && r.Boot == to.Boot && r.MAC == to.MAC {
		return "", identity.ErrUsed
	}
	if d.cfg.Alive(to.Node) {
		return "", ErrAlive
	}
	return d.tokens.Issue(to)
}

// Redeem turns a token and a certificate request into the first certificate of a
// boot. With an empty token it renews: the machine shows by the request that it
// has the key that the node was admitted with. That works when the certificate
// has expired, too, for example while the head was away for days.
func (d *Desk) Redeem(ctx context.Context, from identity.Binding, token string, csr []byte) ([]byte, error) {
	cert, err := d.redeem(ctx, from, token, csr)
	if err != nil {
		d.Refuse("certificate", from, err)
	}
	return cert, err
}

func (d *Desk) redeem(ctx context.Context, from identity.Binding, token string, csr []byte) ([]byte, error) {
	request, err := identity.ParseRequest(csr)
	if err != nil {
		return nil, err
	}
	d.admitting.Lock()
	defer d.admitting.Unlock()
	old, admitted := d.record(from.Node)
	if token == "" {
		switch {
		case !admitted:
			return nil, ErrNotAdmitted
		case old.Fingerprint != request.Fingerprint || old.MAC != from.MAC:
			return nil, fmt.Errorf("renewal with another key than the node's: %w", identity.ErrStale)
		}
		from.Boot = old.Boot
		return d.issue(from, csr)
	}
	if admitted && old.Fingerprint != request.Fingerprint && d.cfg.Alive(from.Node) {
		return nil, ErrAlive
	}
	bound, err := d.tokens.Redeem(token, from, request.Fingerprint)
	if err != nil {
		return nil, err
	}
	next := record{MAC: bound.MAC, Address: bound.Address, Boot: bound.Boot, Fingerprint: request.Fingerprint, Admitted: d.cfg.Now().UTC()}
	if err := d.put(ctx, bound.Node, next, old.mod); err != nil {
		return nil, err
	}
	if admitted && old.Fingerprint != next.Fingerprint {
		d.cfg.Ended(bound.Node, old.Fingerprint, identity.ErrStale)
	}
	d.log.Info("node admitted", "node", bound.Node, "mac", bound.MAC, "address", bound.Address, "key", next.Fingerprint[:16])
	return d.issue(bound, csr)
}

// Renew gives a member its next certificate over a connection that its present
// one opened.
func (d *Desk) Renew(ctx context.Context, peer identity.ID, cert *x509.Certificate, csr []byte) ([]byte, error) {
	next, err := d.renew(peer, cert, csr)
	if err != nil {
		d.Refuse("renewal", identity.Binding{Node: peer.Node, Boot: peer.Boot}, err)
	}
	return next, err
}

func (d *Desk) renew(peer identity.ID, cert *x509.Certificate, csr []byte) ([]byte, error) {
	request, err := identity.ParseRequest(csr)
	if err != nil {
		return nil, err
	}
	if err := d.member(peer, cert); err != nil {
		return nil, err
	}
	if request.Fingerprint != identity.Fingerprint(cert) {
		return nil, fmt.Errorf("renewal with another key than the node's: %w", identity.ErrStale)
	}
	r, _ := d.record(peer.Node)
	return d.issue(identity.Binding{Node: peer.Node, Address: r.Address, Boot: r.Boot}, csr)
}

func (d *Desk) issue(to identity.Binding, csr []byte) ([]byte, error) {
	id := identity.ID{Session: d.cfg.Authority.Session(), Node: to.Node, Boot: to.Boot}
	return d.cfg.Authority.Issue(csr, id, to.Address, identity.NodeLife)
}

// Verify is the identity.Verify of the head: the certificate must be of the
// node's present identity.
func (d *Desk) Verify(id identity.ID, cert *x509.Certificate) error {
	err := d.member(id, cert)
	if err != nil {
		d.Refuse("connection", identity.Binding{Node: id.Node, Boot: id.Boot}, err)
	}
	return err
}

func (d *Desk) member(id identity.ID, cert *x509.Certificate) error {
	r, ok := d.record(id.Node)
	switch {
	case !ok:
		return ErrNotAdmitted
	case r.Boot != id.Boot || r.Fingerprint != identity.Fingerprint(cert):
		return identity.ErrStale
	}
	return nil
}

// ServerTLS is the configuration of the head's listeners for nodes: it refuses,
// logs and counts all but members.
func (d *Desk) ServerTLS() *tls.Config {
	config := identity.ServerTLS(d.cfg.Authority, d.member)
	verify := config.VerifyConnection
	config.VerifyConnection = func(state tls.ConnectionState) error {
		err := verify(state)
		if err != nil {
			d.Refuse("connection", identity.Binding{Node: -1}, err)
		}
		return err
	}
	return config
}

// Fingerprint is the fingerprint of a node's present key; ok is false when the
// node is not admitted.
func (d *Desk) Fingerprint(node int) (fingerprint string, ok bool) {
	r, ok := d.record(node)
	return r.Fingerprint, ok
}

// Revoke ends a node's identity: its certificate is refused from now on, and
// Config.Ended is called. It is no error if the node has none.
func (d *Desk) Revoke(ctx context.Context, node int) error {
	d.admitting.Lock()
	defer d.admitting.Unlock()
	d.tokens.Void(node)
	old, ok := d.record(node)
	if !ok {
		return nil
	}
	if err := d.remove(ctx, node, old.mod); err != nil {
		return err
	}
	d.log.Warn("node revoked", "node", node, "mac", old.MAC)
	d.cfg.Ended(node, old.Fingerprint, identity.ErrRevoked)
	return nil
}

// Readmit lets the machine of a node be admitted once more in its present boot,
// for example when it lost its identity. A machine that is alive needs none and
// keeps what it has (ErrAlive).
func (d *Desk) Readmit(ctx context.Context, node int) error {
	d.admitting.Lock()
	defer d.admitting.Unlock()
	if d.cfg.Alive(node) {
		return ErrAlive
	}
	d.tokens.Void(node)
	old, ok := d.record(node)
	if !ok {
		return nil
	}
	if err := d.remove(ctx, node, old.mod); err != nil {
		return err
	}
	d.cfg.Ended(node, old.Fingerprint, identity.ErrStale)
	return nil
}

func (d *Desk) record(node int) (record, bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	r := d.records[node]
	if r.Fingerprint == "" {
		return record{}, false
	}
	return r, true
}

// put writes a node's record; the caller holds admitting.
func (d *Desk) put(ctx context.Context, node int, r record, mod state.Revision) error {
	value, err := json.Marshal(r)
	if err != nil {
		return err
	}
	key := nodePrefix + strconv.Itoa(node)
	rev, err := d.cfg.Store.Apply(ctx, state.Txn{
		If:   []state.Condition{{Key: key, Mod: mod}},
		Puts: []state.Put{{Key: key, Value: value}},
	})
	if err != nil {
		return errors.Join(fmt.Errorf("note the identity of node %d: %w", node, err), d.reload(ctx, node))
	}
	r.mod = rev
	d.mu.Lock()
	defer d.mu.Unlock()
	d.records[node] = r
	return nil
}

func (d *Desk) remove(ctx context.Context, node int, mod state.Revision) error {
	key := nodePrefix + strconv.Itoa(node)
	rev, err := d.cfg.Store.Apply(ctx, state.Txn{If: []state.Condition{{Key: key, Mod: mod}}, Deletes: []string{key}})
	if err != nil {
		return errors.Join(fmt.Errorf("end the identity of node %d: %w", node, err), d.reload(ctx, node))
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.records[node] = record{mod: rev}
	return nil
}

// reload reads a node's record again after a change that failed: it may have
// happened all the same, or another head was faster.
func (d *Desk) reload(ctx context.Context, node int) error {
	e, err := d.cfg.Store.Get(ctx, nodePrefix+strconv.Itoa(node))
	if err != nil && !errors.Is(err, state.ErrNotFound) {
		return err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if err != nil {
		e.Mod = d.records[node].mod + 1
	}
	return d.enter(node, e, err != nil)
}

// Run follows what other heads do with the same store, until ctx ends.
func (d *Desk) Run(ctx context.Context) error {
	for {
		entries, rev, err := d.cfg.Store.List(ctx, nodePrefix)
		if err != nil {
			return ended(ctx, err)
		}
		d.mu.Lock()
		seen := map[int]bool{}
		for _, e := range entries {
			if node, ok := nodeOf(e.Key); ok {
				seen[node] = true
				d.note(node, d.enter(node, e, false))
			}
		}
		for node, r := range d.records {
			if !seen[node] && r.mod <= rev {
				d.records[node] = record{mod: rev}
			}
		}
		d.mu.Unlock()
		for events, err := range d.cfg.Store.Watch(ctx, nodePrefix, rev) {
			if errors.Is(err, state.ErrCompacted) {
				break
			}
			if err != nil {
				return ended(ctx, err)
			}
			for _, e := range events {
				d.follow(e)
			}
		}
		if ctx.Err() != nil {
			return nil
		}
	}
}

func ended(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return nil
	}
	return fmt.Errorf("follow the nodes' identities: %w", err)
}

// follow enters a change of a record, and ends the identity that it replaces.
func (d *Desk) follow(e state.Event) {
	node, ok := nodeOf(e.Key)
	if !ok {
		return
	}
	d.mu.Lock()
	old := d.records[node]
	d.note(node, d.enter(node, e.Entry, e.Deleted)) // nothing new if it was our own doing
	now := d.records[node]
	d.mu.Unlock()
	switch {
	case old.Fingerprint != "" && now.Fingerprint == "":
		d.cfg.Ended(node, old.Fingerprint, identity.ErrRevoked)
	case old.Fingerprint != "" && now.Fingerprint != old.Fingerprint:
		d.cfg.Ended(node, old.Fingerprint, identity.ErrStale)
	}
}

// enter takes a record over from the store; the caller holds mu.
func (d *Desk) enter(node int, e state.Entry, gone bool) error {
	if d.records[node].mod >= e.Mod {
		return nil
	}
	if gone {
		d.records[node] = record{mod: e.Mod}
		return nil
	}
	r := record{mod: e.Mod}
	if err := json.Unmarshal(e.Value, &r); err != nil {
		return fmt.Errorf("the state store's record %s: %w", e.Key, err)
	}
	d.records[node] = r
	return nil
}

func (d *Desk) note(node int, err error) {
	if err != nil {
		d.log.Error("a node's identity can't be read; the node stays as it was", "node", node, "err", err)
	}
}

func nodeOf(key string) (int, bool) {
	node, err := strconv.Atoi(strings.TrimPrefix(key, nodePrefix))
	return node, err == nil
}
