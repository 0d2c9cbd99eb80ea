// Package etcd is the state store on etcd: a member of its own inside this
// process, alone or one of several heads', or an etcd that is there already.
//
//	Embedded  one member, the default: no listener at all, it is called directly
//	Heads     one member of several; they talk to each other over mutual TLS on
//	          addresses outside the boot network; called directly as well
//	Existing  a client of an etcd by URL
//
// The member's data is safe against being killed at any moment. What can't be
// read any more is a *DirError that says what to do; it is left as it is.
//
// Only the head links this package; the krg of the nodes must not (a test of
// cmd/krg sees to it).
package etcd

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"strings"
	"sync"
	"time"

	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"

	"krgimage/services/state"
)

// Store is a state.Store on etcd.
type Store struct {
	client    *clientv3.Client
	namespace string // before every key, ends in a slash
	release   func() // gives back what is below the client

	failed <-chan struct{} // see Failed
	reason func() error

	closing context.Context // ends when the store is closed
	close   context.CancelFunc
	once    sync.Once
}

func newStore(client *clientv3.Client, namespace string, release func()) *Store {
	s := &Store{client: client, namespace: strings.Trim(namespace, "/") + "/", release: release, reason: func() error { return nil }}
	s.closing, s.close = context.WithCancel(context.Background())
	return s
}

// Failed is closed when the member in this process can't go on, for example
// because its disk is full; Err says why then. It is nil (never closed) for an
// existing etcd, whose interruptions pass.
func (s *Store) Failed() <-chan struct{} { return s.failed }

// Err is why the store failed; nil if it didn't.
func (s *Store) Err() error { return s.reason() }

// call ties a call to the life of the store as well.
func (s *Store) call(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancel(ctx)
	stop := context.AfterFunc(s.closing, cancel)
	return ctx, func() { stop(); cancel() }
}

// failure is the error of a call, as the caller should see it.
func (s *Store) failure(ctx context.Context, what string, err error) error {
	switch {
	case s.closing.Err() != nil:
		return state.ErrClosed
	case ctx.Err() != nil:
		return ctx.Err()
	}
	return fmt.Errorf("state store: %s: %w", what, err)
}

// Get implements state.Store.
func (s *Store) Get(ctx context.Context, key string) (state.Entry, error) {
	inner, done := s.call(ctx)
	defer done()
	resp, err := s.client.Get(inner, s.namespace+key)
	if err != nil {
		return state.Entry{}, s.failure(ctx, "read "+key, err)
	}
	if len(resp.Kvs) == 0 {
		return state.Entry{}, fmt.Errorf("%s: %w", key, state.ErrNotFound)
	}
	return s.entry(resp.Kvs[0]), nil
}

// List implements state.Store.
func (s *Store) List(ctx context.Context, prefix string) ([]state.Entry, state.Revision, error) {
	inner, done := s.call(ctx)
	defer done()
	resp, err := s.client.Get(inner, s.namespace+prefix, clientv3.WithPrefix(), clientv3.WithSort(clientv3.SortByKey, clientv3.SortAscend))
	if err != nil {
		return nil, 0, s.failure(ctx, "list "+prefix, err)
	}
	entries := make([]state.Entry, len(resp.Kvs))
	for i, kv := range resp.Kvs {
		entries[i] = s.entry(kv)
	}
	return entries, state.Revision(resp.Header.Revision), nil
}

func (s *Store) entry(kv *mvccpb.KeyValue) state.Entry {
	return state.Entry{
		Key: strings.TrimPrefix(string(kv.Key), s.namespace),
		// The member in this process hands out its own memory.
		Value: append([]byte{}, kv.Value...),
		Mod:   state.Revision(kv.ModRevision),
	}
}

// Apply implements state.Store.
func (s *Store) Apply(ctx context.Context, txn state.Txn) (state.Revision, error) {
	if err := txn.Check(); err != nil {
		return 0, err
	}
	inner, done := s.call(ctx)
	defer done()
	var conditions []clientv3.Cmp
	for _, c := range txn.If {
		// A key that doesn't exist has the revision 0.
		conditions = append(conditions, clientv3.Compare(clientv3.ModRevision(s.namespace+c.Key), "=", int64(c.Mod)))
	}
	var changes []clientv3.Op
	for _, p := range txn.Puts {
		changes = append(changes, clientv3.OpPut(s.namespace+p.Key, string(p.Value)))
	}
	for _, key := range txn.Deletes {
		changes = append(changes, clientv3.OpDelete(s.namespace+key))
	}
	resp, err := s.client.Txn(inner).If(conditions...).Then(changes...).Commit()
	if err != nil {
		return 0, s.failure(ctx, "write", err)
	}
	if !resp.Succeeded {
		return 0, state.ErrConflict
	}
	return state.Revision(resp.Header.Revision), nil
}

// Pause between attempts to watch again while there is no leader.
const (
	minPause = 100 * time.Millisecond
	maxPause = 2 * time.Second
)

// Watch implements state.Store.
func (s *Store) Watch(ctx context.Context, prefix string, after state.Revision) iter.Seq2[[]state.Event, error] {
	return func(yield func([]state.Event, error) bool) {
		for pause := minPause; ; pause = min(2*pause, maxPause) {
			last, err, stopped := s.watch(ctx, prefix, after, yield)
			switch {
			case stopped || ctx.Err() != nil:
				return
			case s.closing.Err() != nil:
				yield(nil, state.ErrClosed)
				return
			case err != nil:
				yield(nil, err)
				return
			}
			if last > after {
				after, pause = last, minPause
			}
			timer := time.NewTimer(pause)
			select {
			case <-ctx.Done():
			case <-s.closing.Done():
			case <-timer.C:
			}
			timer.Stop()
		}
	}
}

// watch is one attempt: it returns the revision that it came to, and an error if
// another attempt is of no use.
func (s *Store) watch(ctx context.Context, prefix string, after state.Revision, yield func([]state.Event, error) bool) (_ state.Revision, err error, stopped bool) {
	inner, done := s.call(ctx)
	defer done()
	// A member that lost the others ends the watch, rather than be silent.
	inner = clientv3.WithRequireLeader(inner)
	for resp := range s.client.Watch(inner, s.namespace+prefix, clientv3.WithPrefix(), clientv3.WithRev(int64(after)+1)) {
		if resp.CompactRevision > 0 || errors.Is(resp.Err(), rpctypes.ErrCompacted) {
			return after, fmt.Errorf("after revision %d: %w", after, state.ErrCompacted), false
		}
		if resp.Err() != nil {
			return after, nil, false
		}
		for i := 0; i < len(resp.Events); {
			// A response holds whole transactions, each with its revision.
			rev := resp.Events[i].Kv.ModRevision
			var batch []state.Event
			for ; i < len(resp.Events) && resp.Events[i].Kv.ModRevision == rev; i++ {
				e := state.Event{Entry: s.entry(resp.Events[i].Kv), Deleted: resp.Events[i].Type == clientv3.EventTypeDelete}
				if e.Deleted {
					e.Value = nil
				}
				batch = append(batch, e)
			}
			// The client hands over what it has received even after the end.
			if ctx.Err() != nil || s.closing.Err() != nil {
				return after, nil, false
			}
			if !yield(batch, nil) {
				return after, nil, true
			}
			after = state.Revision(rev)
		}
	}
	return after, nil, false
}

// Close implements state.Store.
func (s *Store) Close() error {
	s.once.Do(func() {
		s.close()
		s.client.Close()
		s.release()
	})
	return nil
}
