// Package statetest is the test that every implementation of state.Store
// passes.
package statetest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"iter"
	"strings"
	"sync"
	"testing"
	"time"

	"krgimage/services/state"
)

// limit is for a loaded machine; nothing here takes as long.
const limit = 2 * time.Minute

// Run tests a store. open returns an empty one; it is closed by the test.
func Run(t *testing.T, open func(t *testing.T) state.Store) {
	for _, tt := range []struct {
		name string
		test func(context.Context, *testing.T, state.Store)
	}{
		{"get and list", getAndList},
		{"transactions", transactions},
		{"malformed", malformed},
		{"large transaction", large},
		{"counters", counters},
		{"watch", watch},
		{"watch from the past", watchPast},
		{"watch ends", watchEnds},
		{"closed", closed},
	} {
		t.Run(tt.name, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), limit)
			defer cancel()
			s := open(t)
			defer s.Close()
			tt.test(ctx, t, s)
		})
	}
}

func put(ctx context.Context, t *testing.T, s state.Store, pairs ...string) state.Revision {
	t.Helper()
	var txn state.Txn
	for i := 0; i < len(pairs); i += 2 {
		txn.Puts = append(txn.Puts, state.Put{Key: pairs[i], Value: []byte(pairs[i+1])})
	}
	rev, err := s.Apply(ctx, txn)
	if err != nil {
		t.Fatal(err)
	}
	return rev
}

func list(ctx context.Context, t *testing.T, s state.Store, prefix string) (string, state.Revision) {
	t.Helper()
	entries, rev, err := s.List(ctx, prefix)
	if err != nil {
		t.Fatal(err)
	}
	var parts []string
	for _, e := range entries {
		parts = append(parts, e.Key+"="+string(e.Value))
	}
	return strings.Join(parts, " "), rev
}

func getAndList(ctx context.Context, t *testing.T, s state.Store) {
	if _, err := s.Get(ctx, "a"); !errors.Is(err, state.ErrNotFound) {
		t.Errorf("a key that isn't there: %v", err)
	}
	first := put(ctx, t, s, "a/2", "two", "a/1", "one", "b", "", "ab", "x")
	e, err := s.Get(ctx, "a/1")
	if err != nil || e.Key != "a/1" || string(e.Value) != "one" || e.Mod != first {
		t.Errorf("got %+v, %v; revision %d", e, err, first)
	}
	if e, err = s.Get(ctx, "b"); err != nil || len(e.Value) != 0 {
		t.Errorf("an empty value: %+v, %v", e, err)
	}
	second := put(ctx, t, s, "a/1", "uno")
	if second <= first {
		t.Errorf("revision %d after %d", second, first)
	}
	for prefix, want := range map[string]string{
		"a/": "a/1=uno a/2=two", "a": "a/1=uno a/2=two ab=x", "": "a/1=uno a/2=two ab=x b=", "c": "", "a/1": "a/1=uno",
	} {
		if got, rev := list(ctx, t, s, prefix); got != want || rev != second {
			t.Errorf("list %q: %q at %d, want %q at %d", prefix, got, rev, want, second)
		}
	}
	// What was handed out is the caller's.
	if e, err = s.Get(ctx, "a/1"); err != nil {
		t.Fatal(err)
	}
	e.Value[0] = 'X'
	if e, err = s.Get(ctx, "a/1"); err != nil || string(e.Value) != "uno" {
		t.Errorf("got %q, %v", e.Value, err)
	}
}

func transactions(ctx context.Context, t *testing.T, s state.Store) {
	absent := func(key string) state.Condition { return state.Condition{Key: key} }
	apply := func(txn state.Txn) (state.Revision, error) { return s.Apply(ctx, txn) }
	rev, err := apply(state.Txn{If: []state.Condition{absent("k")}, Puts: []state.Put{{Key: "k", Value: []byte("1")}}})
	if err != nil {
		t.Fatal(err)
	}
	for name, txn := range map[string]state.Txn{
		"it exists":         {If: []state.Condition{absent("k")}, Puts: []state.Put{{Key: "k"}}, Deletes: []string{"other"}},
		"another revision":  {If: []state.Condition{{Key: "k", Mod: rev + 1}}, Deletes: []string{"k"}},
		"it doesn't exist":  {If: []state.Condition{{Key: "none", Mod: rev}}, Puts: []state.Put{{Key: "none"}}},
		"one of two":        {If: []state.Condition{{Key: "k", Mod: rev}, {Key: "none", Mod: rev}}, Puts: []state.Put{{Key: "k"}}},
		"nothing to change": {If: []state.Condition{absent("k")}},
	} {
		if _, err := apply(txn); !errors.Is(err, state.ErrConflict) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if got, at := list(ctx, t, s, ""); got != "k=1" || at != rev {
		t.Errorf("refused transactions left %q at %d", got, at)
	}
	if at, err := apply(state.Txn{If: []state.Condition{{Key: "k", Mod: rev}, absent("none")}}); err != nil || at != rev {
		t.Errorf("a check that holds: %d, %v", at, err)
	}
	if at, err := apply(state.Txn{Deletes: []string{"none"}}); err != nil || at != rev {
		t.Errorf("deleting nothing: %d, %v; was at %d", at, err, rev)
	}
	next, err := apply(state.Txn{
		If:      []state.Condition{{Key: "k", Mod: rev}},
		Puts:    []state.Put{{Key: "a", Value: []byte("A")}, {Key: "b", Value: []byte("B")}},
		Deletes: []string{"k", "none"},
	})
	if err != nil {
		t.Fatal(err)
	}
	if got, at := list(ctx, t, s, ""); got != "a=A b=B" || at != next {
		t.Errorf("%q at %d", got, at)
	}
	if e, err := s.Get(ctx, "a"); err != nil || e.Mod != next {
		t.Errorf("%+v, %v: changes of one transaction have one revision", e, err)
	}
	// A key that was deleted and made again is another one.
	if _, err := apply(state.Txn{If: []state.Condition{absent("k")}, Puts: []state.Put{{Key: "k", Value: []byte("2")}}}); err != nil {
		t.Error(err)
	}
	if _, err := apply(state.Txn{If: []state.Condition{{Key: "k", Mod: rev}}, Deletes: []string{"k"}}); !errors.Is(err, state.ErrConflict) {
		t.Errorf("a revision of the key's earlier life: %v", err)
	}
}

func malformed(ctx context.Context, t *testing.T, s state.Store) {
	for _, txn := range []state.Txn{
		{Puts: []state.Put{{Key: ""}}},
		{Puts: []state.Put{{Key: "/a"}}},
		{Puts: []state.Put{{Key: "a/"}}},
		{Puts: []state.Put{{Key: "a\x00"}}},
		{Puts: []state.Put{{Key: "a\xff"}}},
		{Puts: []state.Put{{Key: strings.Repeat("a", state.MaxKey+1)}}},
		{Puts: []state.Put{{Key: "a", Value: make([]byte, state.MaxValue+1)}}},
		{Puts: []state.Put{{Key: "a"}, {Key: "a"}}},
		{Puts: []state.Put{{Key: "a"}}, Deletes: []string{"a"}},
		{Deletes: []string{""}},
		{If: []state.Condition{{Key: ""}}},
		{If: []state.Condition{{Key: "a", Mod: -1}}},
		{If: make([]state.Condition, state.MaxOps+1)},
	} {
		if _, err := s.Apply(ctx, txn); !errors.Is(err, state.ErrInvalid) {
			t.Errorf("%.100s: %v", fmt.Sprint(txn), err)
		}
	}
	if got, rev := list(ctx, t, s, ""); got != "" {
		t.Errorf("%q at %d", got, rev)
	}
}

// large is the join of a full cluster: a check and a change of every node.
func large(ctx context.Context, t *testing.T, s state.Store) {
	var txn state.Txn
	for i := range 256 {
		key := fmt.Sprintf("node/%03d", i)
		txn.If = append(txn.If, state.Condition{Key: key})
		txn.Puts = append(txn.Puts, state.Put{Key: key, Value: bytes.Repeat([]byte{byte(i)}, 1000)})
	}
	rev, err := s.Apply(ctx, txn)
	if err != nil {
		t.Fatal(err)
	}
	entries, at, err := s.List(ctx, "node/")
	if err != nil || len(entries) != 256 || at != rev {
		t.Fatalf("%d entries at %d, %v", len(entries), at, err)
	}
	for i, e := range entries {
		if e.Mod != rev || len(e.Value) != 1000 || e.Value[0] != byte(i) {
			t.Fatalf("entry %d: %s at %d", i, e.Key, e.Mod)
		}
	}
}

// counters has writers race for one key.
func counters(ctx context.Context, t *testing.T, s state.Store) {
	const writers, times = 4, 10
	var all sync.WaitGroup
	for range writers {
		all.Go(func() {
			for done := 0; done < times; {
				var n int
				var mod state.Revision
				switch e, err := s.Get(ctx, "n"); {
				case err == nil:
					fmt.Sscan(string(e.Value), &n)
					mod = e.Mod
				case !errors.Is(err, state.ErrNotFound):
					t.Error(err)
					return
				}
				_, err := s.Apply(ctx, state.Txn{
					If:   []state.Condition{{Key: "n", Mod: mod}},
					Puts: []state.Put{{Key: "n", Value: fmt.Append(nil, n+1)}},
				})
				switch {
				case err == nil:
					done++
				case !errors.Is(err, state.ErrConflict):
					t.Error(err)
					return
				}
			}
		})
	}
	all.Wait()
	if got, _ := list(ctx, t, s, ""); got != fmt.Sprintf("n=%d", writers*times) {
		t.Errorf("%s after %d increments", got, writers*times)
	}
}

// watcher reads a watch as text, a line for each transaction.
type watcher struct {
	next func() ([]state.Event, error, bool)
	stop func()
}

func watching(ctx context.Context, t *testing.T, s state.Store, prefix string, after state.Revision) watcher {
	next, stop := iter.Pull2(s.Watch(ctx, prefix, after))
	t.Cleanup(stop)
	return watcher{next, stop}
}

func (w watcher) expect(t *testing.T, rev state.Revision, want string) {
	t.Helper()
	events, err, ok := w.next()
	if !ok || err != nil {
		t.Fatalf("the watch ended (%v), want %s", err, want)
	}
	var parts []string
	for _, e := range events {
		if e.Mod != rev {
			t.Errorf("%s at %d, want %d", e.Key, e.Mod, rev)
		}
		if e.Deleted {
			if len(e.Value) > 0 {
				t.Errorf("%s is deleted and has a value", e.Key)
			}
			parts = append(parts, "-"+e.Key)
		} else {
			parts = append(parts, e.Key+"="+string(e.Value))
		}
	}
	if got := strings.Join(parts, " "); got != want {
		t.Fatalf("watched %q, want %q", got, want)
	}
}

func watch(ctx context.Context, t *testing.T, s state.Store) {
	rev := put(ctx, t, s, "a/1", "old", "b", "old")
	w := watching(ctx, t, s, "a/", rev)
	put(ctx, t, s, "b", "elsewhere")
	first := put(ctx, t, s, "a/1", "x", "b", "y", "a/2", "z")
	w.expect(t, first, "a/1=x a/2=z")
	gone, err := s.Apply(ctx, state.Txn{Puts: []state.Put{{Key: "a/3"}}, Deletes: []string{"a/1", "a/none"}})
	if err != nil {
		t.Fatal(err)
	}
	w.expect(t, gone, "a/3= -a/1")
	// While the reader is away.
	var revs []state.Revision
	for i := range 100 {
		revs = append(revs, put(ctx, t, s, "a/n", fmt.Sprint(i)))
	}
	for i, rev := range revs {
		w.expect(t, rev, fmt.Sprintf("a/n=%d", i))
	}
}

func watchPast(ctx context.Context, t *testing.T, s state.Store) {
	one := put(ctx, t, s, "k", "1")
	two := put(ctx, t, s, "k", "2")
	three := put(ctx, t, s, "k", "3")
	w := watching(ctx, t, s, "", one)
	w.expect(t, two, "k=2")
	w.expect(t, three, "k=3")
	// Two watches at a time, one of them from the future of the other.
	now := watching(ctx, t, s, "k", three)
	four := put(ctx, t, s, "k", "4")
	now.expect(t, four, "k=4")
	w.expect(t, four, "k=4")
}

func watchEnds(ctx context.Context, t *testing.T, s state.Store) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	rev := put(ctx, t, s, "k", "1")
	w := watching(ctx, t, s, "", rev)
	put(ctx, t, s, "k", "2")
	if _, err, ok := w.next(); !ok || err != nil {
		t.Fatal(err, ok)
	}
	cancel()
	if events, err, ok := w.next(); ok {
		t.Errorf("after the end of the context: %v, %v", events, err)
	}
}

func closed(ctx context.Context, t *testing.T, s state.Store) {
	rev := put(ctx, t, s, "k", "1")
	w := watching(ctx, t, s, "", rev)
	put(ctx, t, s, "k", "2")
	if _, err, ok := w.next(); !ok || err != nil {
		t.Fatal(err, ok)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err, ok := w.next(); !ok || !errors.Is(err, state.ErrClosed) {
		t.Errorf("a watch of a store that is closed ends with %v", err)
	}
	if _, err := s.Get(ctx, "k"); !errors.Is(err, state.ErrClosed) {
		t.Error(err)
	}
	if _, _, err := s.List(ctx, ""); !errors.Is(err, state.ErrClosed) {
		t.Error(err)
	}
	if _, err := s.Apply(ctx, state.Txn{Deletes: []string{"k"}}); !errors.Is(err, state.ErrClosed) {
		t.Error(err)
	}
	if err := s.Close(); err != nil {
		t.Errorf("closing twice: %v", err)
	}
}
