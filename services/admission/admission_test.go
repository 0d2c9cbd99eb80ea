package admission

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"log/slog"
	"net/netip"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"krgimage/services/identity"
	"krgimage/services/state"
)

// head is a desk with what stands around it.
type head struct {
	*Desk
	authority *identity.Authority
	store     state.Store
	alive     map[int]bool
	ended     []string // fingerprints
	now       time.Time
	log       bytes.Buffer
}

func open(t *testing.T) *head {
	t.Helper()
	h := &head{store: state.NewMemory(), alive: map[int]bool{}, now: time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)}
	a, err := identity.Open(filepath.Join(t.TempDir(), "ca"), 1, func() time.Time { return h.now })
	if err != nil {
		t.Fatal(err)
	}
	h.authority = a
	h.restart(t)
	return h
}

func (h *head) restart(t *testing.T) {
	t.Helper()
	d, err := Open(t.Context(), Config{
		Authority: h.authority, Store: h.store, Now: func() time.Time { return h.now },
		Alive: func(n int) bool { return h.alive[n] },
		Ended: func(_ int, key string, _ error) { h.ended = append(h.ended, key) },
		Log:   slog.New(slog.NewTextHandler(&h.log, nil)),
	})
	if err != nil {
		t.Fatal(err)
	}
	h.Desk = d
}

// machine is a computer that boots.
type machine struct {
	identity.Binding
	holder *identity.Holder
	csr    []byte
}

func boots(t *testing.T, boot string) *machine {
	t.Helper()
	h, err := identity.NewHolder(t.TempDir(), func() time.Duration { return 0 })
	if err != nil {
		t.Fatal(err)
	}
	csr, err := h.Request()
	if err != nil {
		t.Fatal(err)
	}
	return &machine{identity.Binding{MAC: "52:54:00:00:00:03", Address: netip.MustParseAddr("10.77.0.3"), Node: 3, Boot: boot}, h, csr}
}

// enter takes a machine through Offer and Redeem.
func (h *head) enter(t *testing.T, m *machine) *x509.Certificate {
	t.Helper()
	token, err := h.Offer(m.Binding)
	if err != nil {
		t.Fatal(err)
	}
	text, err := h.Redeem(t.Context(), m.Binding, token, m.csr)
	if err != nil {
		t.Fatal(err)
	}
	return certificate(t, text)
}

func certificate(t *testing.T, text []byte) *x509.Certificate {
	t.Helper()
	block, _ := pem.Decode(text)
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

func (m *machine) id() identity.ID {
	return identity.ID{Session: 1, Node: m.Node, Boot: m.Boot}
}

func check(t *testing.T, what string, got, want error) {
	t.Helper()
	if !errors.Is(got, want) {
		t.Errorf("%s: %v, want %v", what, got, want)
	}
}

func TestLife(t *testing.T) {
	h, ctx := open(t), t.Context()
	first := boots(t, "0b5c6c0e-0001")
	cert := h.enter(t, first)
	check(t, "a member", h.Verify(first.id(), cert), nil)
	if f, ok := h.Fingerprint(3); !ok || f != first.holder.Fingerprint() {
		t.Errorf("fingerprint %s %v", f, ok)
	}
	_, err := h.Offer(first.Binding)
	check(t, "a second token in one boot", err, identity.ErrUsed)
	next, err := h.Renew(ctx, first.id(), cert, first.csr)
	check(t, "renewal over the stream", err, nil)
	check(t, "after the renewal", h.Verify(first.id(), certificate(t, next)), nil)

	// The head restarts: what it knew is in the store.
	h.restart(t)
	check(t, "after a restart", h.Verify(first.id(), cert), nil)
	_, err = h.Offer(first.Binding)
	check(t, "a token in the same boot after a restart", err, identity.ErrUsed)
	h.now = h.now.Add(72 * time.Hour)
	_, err = h.Redeem(ctx, first.Binding, "", first.csr)
	check(t, "renewal after days without the head", err, nil)

	// A twin while the machine runs, and the machine itself after a reset.
	h.alive[3] = true
	second := boots(t, "0b5c6c0e-0002")
	_, err = h.Offer(second.Binding)
	check(t, "a second machine with the id", err, ErrAlive)
	check(t, "the first is undisturbed", h.Verify(first.id(), cert), nil)
	h.alive[3] = false
	token, err := h.Offer(second.Binding)
	check(t, "the next boot", err, nil)
	h.alive[3] = true
	_, err = h.Redeem(ctx, second.Binding, token, second.csr)
	check(t, "the first is back before the token was redeemed", err, ErrAlive)
	h.alive[3] = false
	h.enter(t, second)
	check(t, "a certificate of the boot before", h.Verify(first.id(), cert), identity.ErrStale)
	_, err = h.Renew(ctx, first.id(), cert, first.csr)
	check(t, "renewal for the boot before", err, identity.ErrStale)
	_, err = h.Redeem(ctx, first.Binding, "", first.csr)
	check(t, "renewal with the key of the boot before", err, identity.ErrStale)
	if len(h.ended) != 1 || h.ended[0] != first.holder.Fingerprint() {
		t.Errorf("ended: %v", h.ended)
	}
}

func TestRevoke(t *testing.T) {
	h, ctx := open(t), t.Context()
	m := boots(t, "0b5c6c0e-0001")
	cert := h.enter(t, m)
	h.alive[3] = true
	check(t, "admitting who runs", h.Readmit(ctx, 3), ErrAlive)
	check(t, "revoke", h.Revoke(ctx, 3), nil)
	check(t, "revoke again", h.Revoke(ctx, 3), nil)
	if len(h.ended) != 1 {
		t.Errorf("ended: %v", h.ended)
	}
	for range 2 {
		check(t, "a revoked member", h.Verify(m.id(), cert), ErrNotAdmitted)
		_, err := h.Redeem(ctx, m.Binding, "", m.csr)
		check(t, "renewal of a revoked member", err, ErrNotAdmitted)
		h.restart(t)
	}
	h.alive[3] = false
	h.enter(t, m) // admitted again in the same boot
}

func TestRefusedRequests(t *testing.T) {
	h, ctx := open(t), t.Context()
	m, thief := boots(t, "0b5c6c0e-0001"), boots(t, "0b5c6c0e-0001")
	token, err := h.Offer(m.Binding)
	if err != nil {
		t.Fatal(err)
	}
	elsewhere, otherMAC := m.Binding, m.Binding
	elsewhere.Address, elsewhere.Node = netip.MustParseAddr("10.77.0.4"), 4
	otherMAC.MAC = "52:54:00:00:00:04"
	redeem := func(from identity.Binding, token string, csr []byte) error {
		_, err := h.Redeem(ctx, from, token, csr)
		return err
	}
	check(t, "from another address", redeem(elsewhere, token, thief.csr), identity.ErrWrongAddress)
	check(t, "from another MAC", redeem(otherMAC, token, thief.csr), identity.ErrWrongAddress)
	check(t, "unknown", redeem(m.Binding, "x", thief.csr), identity.ErrUnknown)
	check(t, "renewal of nobody", redeem(m.Binding, "", thief.csr), ErrNotAdmitted)
	check(t, "not a request", redeem(m.Binding, token, []byte("x")), identity.ErrMalformed)
	check(t, "oversized", redeem(m.Binding, token, bytes.Repeat([]byte("x"), 1<<20)), identity.ErrMalformed)
	h.now = h.now.Add(identity.TokenLife + time.Minute)
	check(t, "expired", redeem(m.Binding, token, m.csr), identity.ErrTokenExpired)
	if token, err = h.Offer(m.Binding); err != nil {
		t.Fatal(err)
	}
	check(t, "the machine itself", redeem(m.Binding, token, m.csr), nil)
	check(t, "again, the answer was lost", redeem(m.Binding, token, m.csr), nil)
	check(t, "replayed", redeem(m.Binding, token, thief.csr), identity.ErrUsed)
	_, err = h.Offer(identity.Binding{Node: 5, Boot: "no boot's name"})
	check(t, "a boot's name", err, identity.ErrMalformed)
	if r := h.Refused(); r["token_wrong_machine"] != 2 || r["token_unknown"] != 1 || r["token_used"] != 1 || r["token_expired"] != 1 || r["malformed"] != 3 || r["not_admitted"] != 1 {
		t.Errorf("counted: %v", r)
	}
	if log := h.log.String(); !strings.Contains(log, "reason=token_used") || strings.Contains(log, token) {
		t.Errorf("the log lacks a reason, or holds the token:\n%s", log)
	}
}

// TestOtherAuthority opens the members of one authority with another.
func TestOtherAuthority(t *testing.T) {
	h := open(t)
	other, err := identity.Open(filepath.Join(t.TempDir(), "ca"), 1, nil)
	if err != nil {
		t.Fatal(err)
	}
	_, err = Open(t.Context(), Config{Authority: other, Store: h.store})
	if bad := (*AuthorityError)(nil); !errors.As(err, &bad) || !strings.Contains(err.Error(), "backup") {
		t.Errorf("opened with another authority: %v", err)
	}
}

// failing is a store that fails after its write.
type failing struct {
	state.Store
	fail bool
}

func (f *failing) Apply(ctx context.Context, txn state.Txn) (state.Revision, error) {
	rev, err := f.Store.Apply(ctx, txn)
	if f.fail {
		f.fail = false
		return 0, errors.New("the answer got lost")
	}
	return rev, err
}

// TestStoreFails loses the answer of the store; the machine tries again.
func TestStoreFails(t *testing.T) {
	h := open(t)
	f := &failing{Store: h.store}
	h.store = f
	h.restart(t)
	m := boots(t, "0b5c6c0e-0001")
	token, err := h.Offer(m.Binding)
	if err != nil {
		t.Fatal(err)
	}
	f.fail = true
	if _, err := h.Redeem(t.Context(), m.Binding, token, m.csr); err == nil || Reason(err) != Other {
		t.Fatalf("a store that failed: %v", err)
	}
	text, err := h.Redeem(t.Context(), m.Binding, token, m.csr)
	if err != nil {
		t.Fatal(err)
	}
	check(t, "then", h.Verify(m.id(), certificate(t, text)), nil)
}

// TestTwoHeads has one head follow what another does with the same store.
func TestTwoHeads(t *testing.T) {
	one := open(t)
	two := &head{authority: one.authority, store: one.store, alive: map[int]bool{}, now: one.now}
	two.restart(t)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	done := make(chan error, 1)
	go func() { done <- two.Run(ctx) }()
	m := boots(t, "0b5c6c0e-0001")
	cert := one.enter(t, m)
	until := func(want error) {
		t.Helper()
		for !errors.Is(two.member(m.id(), cert), want) {
			if ctx.Err() != nil {
				t.Fatalf("the other head says %v, want %v", two.member(m.id(), cert), want)
			}
			time.Sleep(time.Millisecond)
		}
	}
	until(nil)
	check(t, "revoke", one.Revoke(ctx, 3), nil)
	until(ErrNotAdmitted)
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}
