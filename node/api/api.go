// Package api is how programs on a node talk to the node daemon, krgd, about
// the cluster: HTTP and JSON over a unix socket that everybody may connect to,
// in the host part and in the container.
//
//	GET  /v1/cluster           a Status
//	GET  /v1/cluster/watch     a Status as a JSON line, and another at each change
//	POST /v1/nodes/add         {"ids":[2,3]}, root only: answers when they are online
//	POST /v1/nodes/del         {"ids":[3]}, root only: answers when they are present
//	POST /v1/cluster/poweroff  root only
//	POST /v1/cluster/reboot    root only
//
// Failures carry an Error. Who calls is what the kernel says of the socket's
// other end (SO_PEERCRED), never what the caller says.
//
// Server is krgd's side of it, in front of a Backend; Client is the tools'.
// Fake is a Backend in memory for their tests.
package api

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"time"

	"golang.org/x/sys/unix"
)

// SocketName is the socket's name in the directory that host part and container
// share (settings.SharedDir and /run/krg).
const SocketName = "cluster.sock"

// State of a node, in Kerrighed's words. Every id is possible.
type State string

// The states that a Status names.
const (
	Possible State = "possible" // an id; nothing is there
	Present  State = "present"  // the machine runs and is known, but isn't part of the cluster
	Online   State = "online"   // part of the cluster
)

// Status is the cluster as this node knows it.
type Status struct {
	SessionID int       `json:"session_id"`
	NodeID    int       `json:"node_id"` // this node
	MaxNodes  int       `json:"max_nodes"`
	Running   bool      `json:"running"`   // this node is online: its container belongs to the cluster
	Connected bool      `json:"connected"` // false: the head is away, this is what was known last
	AsOf      time.Time `json:"as_of"`     // when this was true
	Nodes     []Node    `json:"nodes"`     // present and online ones, ascending
}

// Node is a node in a Status.
type Node struct {
	ID       int       `json:"id"`
	State    State     `json:"state"`
	Hostname string    `json:"hostname"`
	Address  string    `json:"address"`
	Since    time.Time `json:"since"`             // of State
	Slow     bool      `json:"slow"`              // its daemon hasn't been heard for a while, but its kernel answers
	Lost     bool      `json:"lost,omitempty"`    // its daemon isn't connected to the head at the moment
	Leaving  bool      `json:"leaving,omitempty"` // on its way from online to present
}

// Online counts the nodes that are online.
func (s Status) Online() (n int) {
	for _, node := range s.Nodes {
		if node.State == Online {
			n++
		}
	}
	return n
}

// Find returns the node with that id; without one in the list it is possible.
func (s Status) Find(id int) Node {
	for _, n := range s.Nodes {
		if n.ID == id {
			return n
		}
	}
	return Node{ID: id, State: Possible}
}

// Backend is what a Server answers from.
type Backend interface {
	Status() Status
	// Watch yields the status now and at each change, until ctx ends.
	Watch(ctx context.Context) iter.Seq[Status]
	// Add makes the nodes online as one step and returns when they are, or when
	// none of them is because one could not.
	Add(ctx context.Context, ids []int) error
	// Del makes the nodes present and returns when they are.
	Del(ctx context.Context, ids []int) error
	// Poweroff and Reboot take all online nodes down; they return when the head
	// has taken the order.
	Poweroff(ctx context.Context) error
	Reboot(ctx context.Context) error
}

// Caller is the process at the other end of the socket, as the kernel knows it.
type Caller struct {
	PID int // in the host's PID namespace
	UID uint32
	GID uint32
}

// Error is a failure with the errno that Kerrighed's system calls had for it.
type Error struct {
	Message string `json:"error"`
	Errno   string `json:"errno"` // its name, for example "EAGAIN"
}

// Errorf makes an Error.
func Errorf(errno unix.Errno, format string, args ...any) *Error {
	return &Error{Message: fmt.Sprintf(format, args...), Errno: unix.ErrnoName(errno)}
}

func (e *Error) Error() string { return e.Message }

// Is compares with a unix.Errno.
func (e *Error) Is(target error) bool {
	errno, ok := target.(unix.Errno)
	return ok && e.Errno == unix.ErrnoName(errno)
}

// Number is the errno as a number; EIO if the name is unknown here.
func (e *Error) Number() unix.Errno {
	for n := unix.Errno(1); n < 134; n++ {
		if unix.ErrnoName(n) == e.Errno {
			return n
		}
	}
	return unix.EIO
}

// AsError turns any error into an Error; one without an errno is EIO.
func AsError(err error) *Error {
	if err == nil {
		return nil
	}
	var e *Error
	if errors.As(err, &e) {
		return e
	}
	var errno unix.Errno
	if errors.As(err, &errno) && unix.ErrnoName(errno) != "" {
		return &Error{Message: err.Error(), Errno: unix.ErrnoName(errno)}
	}
	return &Error{Message: err.Error(), Errno: "EIO"}
}
