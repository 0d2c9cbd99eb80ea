package api

import (
	"context"
	"iter"
	"slices"
	"sync"

	"golang.org/x/sys/unix"
)

// Fake is a Backend in memory that keeps Kerrighed's rules: nodes that are
// added must be present, nodes that are removed online and not this one.
type Fake struct {
	mu      sync.Mutex
	status  Status        // guarded by mu
	changed chan struct{} // guarded by mu: closed at the next change
	calls   []string      // guarded by mu

	// Fail, if set, is asked first; an error of it is the answer.
	Fail func(op string, ids []int) error
}

// NewFake returns a Fake that starts as s.
func NewFake(s Status) *Fake {
	if s.MaxNodes == 0 {
		s.MaxNodes = 256
	}
	return &Fake{status: s, changed: make(chan struct{})}
}

// Set puts a node into a state.
func (f *Fake) Set(id int, state State) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.set(id, state)
}

// set is Set for a caller who holds mu.
func (f *Fake) set(id int, state State) {
	nodes := slices.Clone(f.status.Nodes)
	i := slices.IndexFunc(nodes, func(n Node) bool { return n.ID >= id })
	if i < 0 {
		i = len(nodes)
	}
	switch found := i < len(nodes) && nodes[i].ID == id; {
	case state == Possible && found:
		nodes = slices.Delete(nodes, i, i+1)
	case state == Possible:
	case found:
		nodes[i].State = state
	default:
		nodes = slices.Insert(nodes, i, Node{ID: id, State: state})
	}
	f.status.Nodes = nodes
	f.status.Running = f.status.Find(f.status.NodeID).State == Online
	close(f.changed)
	f.changed = make(chan struct{})
}

// Calls are the operations so far: "poweroff", "reboot".
func (f *Fake) Calls() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.calls)
}

// Status implements Backend.
func (f *Fake) Status() Status {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.status
}

// Watch implements Backend.
func (f *Fake) Watch(ctx context.Context) iter.Seq[Status] {
	return func(yield func(Status) bool) {
		for {
			f.mu.Lock()
			s, changed := f.status, f.changed
			f.mu.Unlock()
			if !yield(s) {
				return
			}
			select {
			case <-ctx.Done():
				return
			case <-changed:
			}
		}
	}
}

// Add implements Backend.
func (f *Fake) Add(_ context.Context, ids []int) error {
	return f.move("add", ids, Present, Online)
}

// Del implements Backend.
func (f *Fake) Del(_ context.Context, ids []int) error {
	return f.move("del", ids, Online, Present)
}

func (f *Fake) move(op string, ids []int, from, to State) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.Fail != nil {
		if err := f.Fail(op, ids); err != nil {
			return err
		}
	}
	for _, id := range ids {
		switch n := f.status.Find(id); {
		case op == "del" && id == f.status.NodeID:
			return Errorf(unix.EPERM, "node %d can't remove itself", id)
		case n.State == Possible:
			return Errorf(unix.ENONET, "node %d isn't present", id)
		case n.State != from:
			return Errorf(unix.EPERM, "node %d is %s", id, n.State)
		}
	}
	for _, id := range ids {
		f.set(id, to)
	}
	return nil
}

// Poweroff implements Backend.
func (f *Fake) Poweroff(context.Context) error { return f.down("poweroff") }

// Reboot implements Backend.
func (f *Fake) Reboot(context.Context) error { return f.down("reboot") }

func (f *Fake) down(op string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.Fail != nil {
		if err := f.Fail(op, nil); err != nil {
			return err
		}
	}
	f.calls = append(f.calls, op)
	return nil
}
