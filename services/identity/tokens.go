package identity

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"time"
)

// Errors of redeeming a token.
var (
	ErrUnknown      = errors.New("unknown boot token")
	ErrUsed         = errors.New("boot token used already")
	ErrTokenExpired = errors.New("boot token expired")
	ErrWrongAddress = errors.New("boot token of another machine")
)

// TokenLife is how long a token can be redeemed. A machine under emulation, one
// of many that boot, needs a minute from its settings to its certificate.
const TokenLife = 10 * time.Minute

// Binding is the one boot of one machine that a token is for.
type Binding struct {
	MAC     string
	Address netip.Addr
	Node    int
	Boot    string // as in ID
}

// Tokens are the boot tokens of a head. They live in memory: after a restart of
// the head, a node that still has one is refused (ErrUnknown) and asks for
// another. It is safe for concurrent use.
type Tokens struct {
	now func() time.Time

	mu     sync.Mutex
	byNode map[int]*ticket               // the last one of each node; guarded by mu
	bySum  map[[sha256.Size]byte]*ticket // by digest; guarded by mu
}

type ticket struct {
	text   string
	to     Binding
	until  time.Time
	usedBy string // fingerprint of the key that redeemed it; "" if none did
}

// NewTokens returns an empty set.
func NewTokens(now func() time.Time) *Tokens {
	if now == nil {
		now = time.Now
	}
	return &Tokens{now: now, byNode: map[int]*ticket{}, bySum: map[[sha256.Size]byte]*ticket{}}
}

// Issue returns the token for a boot: a new one, or the one issued before if it
// was not redeemed and has at least half its life, since an answer can get lost.
// Earlier tokens of the node are void. The error is ErrUsed when this boot's
// token was redeemed.
func (t *Tokens) Issue(to Binding) (string, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	now := t.now()
	if old := t.byNode[to.Node]; old != nil {
		if old.to == to {
			if old.usedBy != "" {
				return "", ErrUsed
			}
			if left := old.until.Sub(now); left > TokenLife/2 && left <= TokenLife {
				return old.text, nil
			}
		}
		t.drop(old)
	}
	random := make([]byte, 32)
	if _, err := rand.Read(random); err != nil {
		return "", err
	}
	k := &ticket{text: base64.RawURLEncoding.EncodeToString(random), to: to, until: now.Add(TokenLife)}
	t.byNode[to.Node], t.bySum[sha256.Sum256([]byte(k.text))] = k, k
	return k.text, nil
}

// Redeem takes a token from the machine that presents it with its key, and
// returns what it was issued for; the Boot of from doesn't matter. The same
// machine may redeem it again with the same key while it lives, since the answer
// may have got lost; for every other key it is used up (ErrUsed).
func (t *Tokens) Redeem(text string, from Binding, fingerprint string) (Binding, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	// Looked up by its digest, so that the time it takes says nothing about it.
	k := t.bySum[sha256.Sum256([]byte(text))]
	if k == nil {
		return Binding{}, ErrUnknown
	}
	from.Boot = k.to.Boot
	switch now := t.now(); {
	case k.to != from:
		return Binding{}, fmt.Errorf("%w: it is for node %d (%s, %s)", ErrWrongAddress, k.to.Node, k.to.MAC, k.to.Address)
	case now.After(k.until) || now.Before(k.until.Add(-TokenLife-Leeway)):
		return Binding{}, ErrTokenExpired
	case k.usedBy != "" && k.usedBy != fingerprint:
		return Binding{}, ErrUsed
	}
	k.usedBy = fingerprint
	return k.to, nil
}

// Void forgets the token of a node, so that the next Issue makes another.
func (t *Tokens) Void(node int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if k := t.byNode[node]; k != nil {
		t.drop(k)
	}
}

// drop forgets a ticket; the caller holds mu.
func (t *Tokens) drop(k *ticket) {
	delete(t.byNode, k.to.Node)
	delete(t.bySum, sha256.Sum256([]byte(k.text)))
}
