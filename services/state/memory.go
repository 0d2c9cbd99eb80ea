package state

import (
	"bytes"
	"context"
	"fmt"
	"iter"
	"slices"
	"strings"
	"sync"
)

// Memory is a Store that forgets everything when the process ends.
type Memory struct {
	mu      sync.Mutex
	closed  bool             // guarded by mu
	rev     Revision         // of the last change; guarded by mu
	entries map[string]Entry // guarded by mu
	history []change         // the last changes, by revision; guarded by mu
	forgot  Revision         // the last revision that is not in history any more; guarded by mu
	moved   chan struct{}    // closed and replaced at each change and by Close; guarded by mu
}

// change is what one transaction did.
type change struct {
	rev    Revision
	events []Event
}

// maxHistory is how many changes a Memory keeps for watchers that start in the
// past or are slow.
const maxHistory = 10000

// NewMemory returns an empty store.
func NewMemory() *Memory {
	return &Memory{entries: map[string]Entry{}, moved: make(chan struct{})}
}

// Get implements Store.
func (m *Memory) Get(ctx context.Context, key string) (Entry, error) {
	if err := ctx.Err(); err != nil {
		return Entry{}, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed {
		return Entry{}, ErrClosed
	}
	e, ok := m.entries[key]
	if !ok {
		return Entry{}, fmt.Errorf("%s: %w", key, ErrNotFound)
	}
	return e.clone(), nil
}

// List implements Store.
func (m *Memory) List(ctx context.Context, prefix string) ([]Entry, Revision, error) {
	if err := ctx.Err(); err != nil {
		return nil, 0, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed {
		return nil, 0, ErrClosed
	}
	var found []Entry
	for key, e := range m.entries {
		if strings.HasPrefix(key, prefix) {
			found = append(found, e.clone())
		}
	}
	slices.SortFunc(found, func(a, b Entry) int { return strings.Compare(a.Key, b.Key) })
	return found, m.rev, nil
}

// Apply implements Store.
func (m *Memory) Apply(ctx context.Context, txn Txn) (Revision, error) {
	if err := txn.Check(); err != nil {
		return 0, err
	}
	if err := ctx.Err(); err != nil {
		return 0, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed {
		return 0, ErrClosed
	}
	for _, c := range txn.If {
		if m.entries[c.Key].Mod != c.Mod {
			return 0, fmt.Errorf("%s: %w", c.Key, ErrConflict)
		}
	}
	next := change{rev: m.rev + 1}
	for _, p := range txn.Puts {
		e := Entry{Key: p.Key, Value: bytes.Clone(p.Value), Mod: next.rev}
		m.entries[p.Key] = e
		next.events = append(next.events, Event{Entry: e.clone()})
	}
	for _, key := range txn.Deletes {
		if _, ok := m.entries[key]; ok {
			delete(m.entries, key)
			next.events = append(next.events, Event{Entry: Entry{Key: key, Mod: next.rev}, Deleted: true})
		}
	}
	if next.events == nil {
		return m.rev, nil
	}
	m.rev = next.rev
	m.history = append(m.history, next)
	if len(m.history) >= 2*maxHistory {
		m.forget(m.history[len(m.history)-maxHistory-1].rev)
	}
	close(m.moved)
	m.moved = make(chan struct{})
	return m.rev, nil
}

// Compact forgets the changes up to a revision, as a store does in time.
func (m *Memory) Compact(upTo Revision) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.forget(min(upTo, m.rev))
}

// forget is Compact for a caller who holds mu.
func (m *Memory) forget(upTo Revision) {
	if upTo <= m.forgot {
		return
	}
	i, _ := slices.BinarySearchFunc(m.history, upTo+1, func(c change, r Revision) int { return int(c.rev - r) })
	m.history = slices.Clone(m.history[i:])
	m.forgot = upTo
}

// Watch implements Store.
func (m *Memory) Watch(ctx context.Context, prefix string, after Revision) iter.Seq2[[]Event, error] {
	return func(yield func([]Event, error) bool) {
		for ctx.Err() == nil {
			events, upTo, moved, err := m.after(prefix, after)
			if err != nil {
				yield(nil, err)
				return
			}
			for _, batch := range events {
				if ctx.Err() != nil || !yield(batch, nil) {
					return
				}
			}
			if upTo > after {
				after = upTo
			}
			select {
			case <-ctx.Done():
			case <-moved:
			}
		}
	}
}

// after returns the changes of the prefix after a revision, the revision that
// was looked up to, and what is closed when there is more.
func (m *Memory) after(prefix string, rev Revision) (batches [][]Event, upTo Revision, moved chan struct{}, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	switch {
	case m.closed:
		return nil, 0, nil, ErrClosed
	case rev < m.forgot:
		return nil, 0, nil, fmt.Errorf("after revision %d: %w", rev, ErrCompacted)
	}
	i, _ := slices.BinarySearchFunc(m.history, rev+1, func(c change, r Revision) int { return int(c.rev - r) })
	for _, c := range m.history[i:] {
		var batch []Event
		for _, e := range c.events {
			if strings.HasPrefix(e.Key, prefix) {
				batch = append(batch, Event{Entry: e.Entry.clone(), Deleted: e.Deleted})
			}
		}
		if batch != nil {
			batches = append(batches, batch)
		}
	}
	return batches, m.rev, m.moved, nil
}

// Close implements Store.
func (m *Memory) Close() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.closed {
		m.closed = true
		close(m.moved)
	}
	return nil
}

func (e Entry) clone() Entry {
	e.Value = bytes.Clone(e.Value)
	return e
}
