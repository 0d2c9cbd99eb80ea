// Package pids gives each node its own range of process ids, so that a pid is
// unique in the cluster, says where its process was born, and can stay with the
// process wherever it goes.
//
// A node's container is a PID namespace whose allocator only counts upwards, to
// pid_max, from the last id it gave. Two things keep it in the node's range: the
// Keeper, part of the container's init, sets it back to the start before it gets
// to the end, and the guard (package guard) makes a fork fail with EAGAIN that
// comes while the keeper is too late.
package pids

import "fmt"

const (
	// Width is how many ids a node has.
	Width = 1 << 14
	// Nodes is how many ranges there are.
	Nodes = 256
	// Max is the kernel's pid_max that makes room for them: its largest.
	Max = Width * Nodes
	// Margin is how far from the end of a range the keeper turns back: twice
	// what 2,000 forks per second use up in a second in which it doesn't run.
	Margin = 4096
	// Reserve is the part of the margin at the very end that the guard keeps
	// free: where the ids before it are in use, the allocator jumps over them.
	Reserve = 1024
	// FirstUser is the first id in node 0's range that programs get; below are
	// the container's init and its threads, on every node, and the kernel never
	// goes back there either (RESERVED_PIDS).
	FirstUser = 300
	// Limit is how many processes and threads a node's container may have at a
	// time (pids.max), so that a free id is always found.
	Limit = Width - Margin - Reserve - FirstUser
)

// Range is what a node allocates from: First, First+1, ... End-1.
type Range struct {
	First int `json:"first"`
	End   int `json:"end"`
}

// Of is the range of a node.
func Of(node int) (Range, error) {
	if node < 0 || node >= Nodes {
		return Range{}, fmt.Errorf("node %d has no process ids: nodes are 0 to %d", node, Nodes-1)
	}
	r := Range{First: node * Width, End: (node + 1) * Width}
	if node == 0 {
		r.First = FirstUser
	}
	return r, nil
}

// Has reports whether a pid is in the range.
func (r Range) Has(pid int) bool { return pid >= r.First && pid < r.End }

// Turn is where the keeper sets the allocator back to the start.
func (r Range) Turn() int { return r.End - Margin }

// Home is the node where the process with a pid was born. Ids below FirstUser
// belong to no node in particular: each has its own init.
func Home(pid int) (node int, ok bool) {
	if pid < FirstUser || pid >= Max {
		return 0, false
	}
	return pid / Width, true
}
