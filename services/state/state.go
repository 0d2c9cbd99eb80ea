// Package state is the cluster's durable shared state: small records under
// slash-separated keys, changed by transactions and watched by whoever needs to
// know. Node states, identities, the scheduler's tree and the like live here;
// load samples and pids never do, they change too often for a log on disk.
//
// Store is the whole of it. There are two implementations: Memory, for tests
// and simulations, and the one of package state/etcd, which the head node uses.
// Both pass the same tests (package state/statetest).
//
// Every change of the store has a revision, one number for all keys. A reader
// lists a prefix, gets the revision of that moment, and watches from there on:
// it misses nothing and sees nothing twice.
package state

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"strings"
	"unicode/utf8"
)

// Revision counts the changes of a store from 1; 0 stands for "never".
type Revision int64

// Entry is a key with its value.
type Entry struct {
	Key   string
	Value []byte
	Mod   Revision // of the change that wrote this value
}

// Event is a change of one key.
type Event struct {
	Entry        // after the change; Value is nil if Deleted
	Deleted bool // the key is gone
}

// Condition is what must be true of a key for a transaction to happen.
type Condition struct {
	Key string
	Mod Revision // the key was last changed at this revision; 0: it doesn't exist
}

// Put writes a value.
type Put struct {
	Key   string
	Value []byte
}

// Txn is a transaction: if all conditions hold then all changes happen, at one
// revision, or else nothing does. A key may appear in one change only. A
// transaction without changes is a check.
type Txn struct {
	If      []Condition
	Puts    []Put
	Deletes []string // keys that don't exist are none to it
}

// Store is a state store. It is safe for concurrent use.
type Store interface {
	// Get returns one entry, or ErrNotFound.
	Get(ctx context.Context, key string) (Entry, error)
	// List returns all entries whose key begins with the prefix, by key, and the
	// revision of the store at that moment.
	List(ctx context.Context, prefix string) ([]Entry, Revision, error)
	// Apply carries out a transaction; the change is durable when it returns.
	// ErrConflict: a condition did not hold, nothing happened. Any other error
	// leaves open whether it happened, unless errors.Is(err, ErrInvalid).
	// The revision is the store's after the transaction.
	Apply(ctx context.Context, txn Txn) (Revision, error)
	// Watch yields the changes of keys with the prefix after a revision, those of
	// one transaction together and in order, until ctx ends (then it ends without
	// an error) or the caller stops. An error is the last thing it yields:
	// ErrCompacted says that changes in between are forgotten, so list again;
	// ErrClosed that the store was closed. Interruptions of the connection to a
	// store are not errors: the watch goes on when it is back.
	Watch(ctx context.Context, prefix string, after Revision) iter.Seq2[[]Event, error]
	// Close ends the watches and gives back what the store holds.
	Close() error
}

// Errors that a caller decides on.
var (
	ErrNotFound  = errors.New("no such key")
	ErrConflict  = errors.New("the state was changed by another in between")
	ErrCompacted = errors.New("changes that old are forgotten")
	ErrClosed    = errors.New("the state store is closed")
	ErrInvalid   = errors.New("not a valid key, value or transaction")
)

// Limits of a store. They keep a transaction below the 1.5 MiB that etcd takes in
// one request by default.
const (
	MaxKey   = 512      // bytes of a key
	MaxValue = 64 << 10 // bytes of a value
	MaxTxn   = 1 << 20  // bytes of all keys and values of a transaction
	MaxOps   = 1024     // conditions, and also changes, of a transaction
)

// Check says whether a transaction is well-formed; the error is an ErrInvalid.
func (t Txn) Check() error {
	size, changed := 0, map[string]bool{}
	change := func(key string) error {
		if changed[key] {
			return fmt.Errorf("%w: %q is changed twice", ErrInvalid, key)
		}
		changed[key] = true
		return CheckKey(key)
	}
	for _, c := range t.If {
		if err := CheckKey(c.Key); err != nil {
			return err
		}
		if c.Mod < 0 {
			return fmt.Errorf("%w: revision %d of %q", ErrInvalid, c.Mod, c.Key)
		}
		size += len(c.Key)
	}
	for _, p := range t.Puts {
		if err := change(p.Key); err != nil {
			return err
		}
		if len(p.Value) > MaxValue {
			return fmt.Errorf("%w: %d bytes in %q, the limit is %d", ErrInvalid, len(p.Value), p.Key, MaxValue)
		}
		size += len(p.Key) + len(p.Value)
	}
	for _, key := range t.Deletes {
		if err := change(key); err != nil {
			return err
		}
		size += len(key)
	}
	if changes := len(t.Puts) + len(t.Deletes); size > MaxTxn || len(t.If) > MaxOps || changes > MaxOps {
		return fmt.Errorf("%w: a transaction of %d bytes with %d conditions and %d changes, the limits are %d, %d and %d",
			ErrInvalid, size, len(t.If), changes, MaxTxn, MaxOps, MaxOps)
	}
	return nil
}

// CheckKey says whether key can be a key: text of 1 to MaxKey bytes that neither
// begins nor ends with a slash. The error is an ErrInvalid.
func CheckKey(key string) error {
	switch {
	case key == "" || len(key) > MaxKey:
		return fmt.Errorf("%w: a key of %d bytes, allowed are 1 to %d", ErrInvalid, len(key), MaxKey)
	case !utf8.ValidString(key) || strings.ContainsRune(key, 0):
		return fmt.Errorf("%w: the key %q is not text", ErrInvalid, key)
	case key[0] == '/' || key[len(key)-1] == '/':
		return fmt.Errorf("%w: the key %q begins or ends with a slash", ErrInvalid, key)
	}
	return nil
}
