package state_test

import (
	"errors"
	"fmt"
	"testing"

	"krgimage/services/state"
	"krgimage/services/state/statetest"
)

func TestMemory(t *testing.T) {
	statetest.Run(t, func(*testing.T) state.Store { return state.NewMemory() })
}

func TestMemoryForgets(t *testing.T) {
	m, ctx := state.NewMemory(), t.Context()
	defer m.Close()
	var rev state.Revision
	for i := range 25000 {
		var err error
		if rev, err = m.Apply(ctx, state.Txn{Puts: []state.Put{{Key: "k", Value: fmt.Append(nil, i)}}}); err != nil {
			t.Fatal(err)
		}
	}
	for range 2 {
		for _, err := range m.Watch(ctx, "", 1) {
			if !errors.Is(err, state.ErrCompacted) {
				t.Fatalf("a watch from long ago: %v", err)
			}
		}
		m.Compact(rev - 1)
		for events, err := range m.Watch(ctx, "", rev-1) {
			if err != nil || len(events) != 1 || events[0].Mod != rev {
				t.Fatal(events, err)
			}
			break
		}
	}
}

func FuzzCheck(f *testing.F) {
	f.Add("a/b", []byte("v"), int64(0))
	f.Add("/", []byte(nil), int64(-1))
	f.Fuzz(func(t *testing.T, key string, value []byte, mod int64) {
		m := state.NewMemory()
		txn := state.Txn{If: []state.Condition{{Key: key, Mod: state.Revision(mod)}}, Puts: []state.Put{{Key: key, Value: value}}}
		_, err := m.Apply(t.Context(), txn)
		if bad := txn.Check(); (bad != nil) != errors.Is(err, state.ErrInvalid) {
			t.Fatalf("Check: %v, Apply: %v", bad, err)
		}
		if err != nil {
			return
		}
		if e, err := m.Get(t.Context(), key); err != nil || string(e.Value) != string(value) {
			t.Fatal(e, err)
		}
	})
}
