package nodes

import (
	"cmp"
	"context"
	"iter"
	"maps"
	"slices"
	"sync"

	"krgimage/configs"
)

// Watch yields every machine as it is now, by id, and then each one that
// changes, until ctx ends or the caller stops. A slow caller sees fewer states
// in between, never an old one after a newer one; it never holds up the
// registry.
func (r *Registry) Watch(ctx context.Context) iter.Seq[Node] {
	return func(yield func(Node) bool) {
		w := &watcher{pending: map[configs.MAC]Node{}, wake: make(chan struct{}, 1)}
		r.mu.Lock()
		for _, n := range r.snapshot() {
			w.push(n)
		}
		r.watchers[w] = true
		r.mu.Unlock()
		defer func() {
			r.mu.Lock()
			delete(r.watchers, w)
			r.mu.Unlock()
		}()
		for {
			select {
			case <-ctx.Done():
				return
			case <-w.wake:
			}
			for _, n := range w.take() {
				if !yield(n) {
					return
				}
			}
		}
	}
}

// watcher collects the machines that changed since its reader last looked.
type watcher struct {
	mu      sync.Mutex
	pending map[configs.MAC]Node // guarded by mu
	wake    chan struct{}        // holds one token while pending is not empty
}

func (w *watcher) push(n Node) {
	w.mu.Lock()
	w.pending[n.MAC] = n
	w.mu.Unlock()
	select {
	case w.wake <- struct{}{}:
	default:
	}
}

func (w *watcher) take() []Node {
	w.mu.Lock()
	defer w.mu.Unlock()
	changed := slices.SortedFunc(maps.Values(w.pending), func(a, b Node) int { return cmp.Compare(a.ID, b.ID) })
	clear(w.pending)
	return changed
}
