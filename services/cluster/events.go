package cluster

import (
	"net/netip"

	"golang.org/x/sys/unix"
)

// Event is something that happened.
type Event interface{ event() }

// The events. Conn numbers streams: what belongs to an earlier stream of a node
// is ignored.
type (
	// Connected: a node's daemon opened a stream and said hello.
	Connected struct {
		Node              int
		Conn              uint64 // never 0
		Boot, Fingerprint string // from its certificate
		Hostname          string
		Address           netip.Addr
		Running           bool   // its container runs, starts or stops
		Epoch             uint64 // of the join that the container was started for
	}
	// Disconnected: the stream ended.
	Disconnected struct {
		Node int
		Conn uint64
	}
	// Left: the node goes down in order, its container has stopped.
	Left struct {
		Node   int
		Conn   uint64
		Reason string
	}
	// Heard: the daemon said something.
	Heard struct {
		Node int
		Conn uint64
	}
	// Finished: a command is done, or failed.
	Finished struct {
		Node    int
		Conn    uint64
		Command uint64
		Err     string
	}
	// Probed: what a Probe found.
	Probed struct {
		Node    int
		Probe   uint64
		Answers bool // the machine's kernel does
		Witness bool // at least one of the others' does
	}
	// Asked: somebody on node From (or FromHead) wants something.
	Asked struct {
		Request   uint64 // never 0
		From      int
		Operation Operation
		Nodes     []int // of OpAdd and OpDel
	}
	// Revoked: the admin ended the node's identity.
	Revoked struct{ Node int }
)

// FromHead is Asked.From for requests of the head's own admin.
const FromHead = -1

// Operation is what can be asked for.
type Operation int

// The operations.
const (
	OpAdd Operation = iota + 1
	OpDel
	OpPoweroff
	OpReboot
)

func (Connected) event()    {}
func (Disconnected) event() {}
func (Left) event()         {}
func (Heard) event()        {}
func (Finished) event()     {}
func (Probed) event()       {}
func (Asked) event()        {}
func (Revoked) event()      {}

// Action is something to do.
type Action interface{ action() }

// The actions.
type (
	// Save the record in the store.
	Save struct{ Record Record }
	// Send a command; join, leave and fence end with a Finished.
	Send struct {
		Node    int
		Conn    uint64
		Command uint64
		Kind    CommandKind
		Epoch   uint64
		Reason  string
	}
	// Close a stream, with the reason.
	Close struct {
		Node   int
		Conn   uint64
		Reason string
	}
	// Probe the machine, and some others besides.
	Probe struct {
		Node      int
		Probe     uint64
		Address   netip.Addr
		Witnesses []netip.Addr
	}
	// Answer a request; Errno 0: done.
	Answer struct {
		Request uint64
		Errno   unix.Errno
		Text    string
	}
	// Note what happened, for log and counters.
	Note struct {
		Kind  Kind
		Node  int
		Epoch uint64
		Text  string
	}
)

func (Save) action()   {}
func (Send) action()   {}
func (Close) action()  {}
func (Probe) action()  {}
func (Answer) action() {}
func (Note) action()   {}

// CommandKind is what a node is told.
type CommandKind int

// The commands, numbered as on the wire.
const (
	CmdJoin     CommandKind = iota + 1 // start the container
	CmdLeave                           // drain, tell the users, stop the container
	CmdFence                           // stop the container at once
	CmdPoweroff                        // go down
	CmdReboot
)

func (k CommandKind) String() string {
	return [...]string{"", "join", "leave", "fence", "poweroff", "reboot"}[k]
}

// Kind is the kind of a Note.
type Kind string

// The kinds.
const (
	NoteAppeared   Kind = "appeared"    // present
	NoteJoined     Kind = "joined"      // online
	NoteJoinFailed Kind = "join failed" // rolled back
	NoteLeft       Kind = "left"        // present again, or gone in order
	NoteLost       Kind = "lost"        // its daemon is gone
	NoteBack       Kind = "back"        // and returned
	NoteDied       Kind = "died"
	NoteFenced     Kind = "fenced"  // returned after it was declared dead
	NoteRefused    Kind = "refused" // a second machine with its id
	NoteRevoked    Kind = "revoked"
)
