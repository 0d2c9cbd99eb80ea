// Package capability is Kerrighed's capability model: what the cluster may do
// with a process, in four sets that a process hands on to its children.
//
// The names, numbers and rules are those of Kerrighed 3 (kernel component
// kerrighed/capability). This file holds the sets and how they pass through
// fork and change; text.go how people write and read them. Where the sets of
// living processes are kept is a Table's business: a Table never decides
// anything, it only stores.
package capability

import (
	"errors"

	"golang.org/x/sys/unix"
)

// Cap is the number of a capability.
type Cap uint

// The capabilities. Only those in Supported do something; the others are names
// that scripts may still write.
const (
	ChangeKerrighedCap     Cap  = 0 // the sets of the process may be changed
	CanMigrate             Cap  = 1 // the process may be moved to another node
	DistantFork            Cap  = 2 // fork may create the child on another node
	ForkDelay              Cap  = 3
	Checkpointable         Cap  = 4 // the process belongs to an application that can be checkpointed
	UseRemoteMemory        Cap  = 5 // its anonymous pages may go to other nodes' memory
	UseIntraClusterStreams Cap  = 6
	UseInterClusterStreams Cap  = 7
	UseWorldVisibleStreams Cap  = 8
	SeeLocalProcStat       Cap  = 9 // /proc shows it the processes and figures of its own node
	Debug                  Cap  = 10
	SyscallExitHook        Cap  = 11
	count                       = 12
	Supported              Mask = 1<<ChangeKerrighedCap | 1<<CanMigrate | 1<<DistantFork | 1<<Checkpointable | 1<<UseRemoteMemory | 1<<SeeLocalProcStat // 01067
)

// Mask is a set of capabilities: bit n is Cap n.
type Mask uint32

// Of makes a set.
func Of(caps ...Cap) (m Mask) {
	for _, c := range caps {
		m |= 1 << c
	}
	return m
}

// Has reports whether c is in the set.
func (m Mask) Has(c Cap) bool { return m>>c&1 == 1 }

// In reports whether the whole set is in other.
func (m Mask) In(other Mask) bool { return m&^other == 0 }

// Sets are the capability sets of a process.
type Sets struct {
	Permitted            Mask `json:"permitted"`
	Effective            Mask `json:"effective"`
	InheritablePermitted Mask `json:"inheritable_permitted"`
	InheritableEffective Mask `json:"inheritable_effective"`
}

// Initial is what the container's first process has: all may be used, and
// nothing is but the right to change this. So nothing migrates before somebody
// says so.
func Initial() Sets {
	return Sets{
		Permitted: Supported, InheritablePermitted: Supported,
		Effective: Of(ChangeKerrighedCap), InheritableEffective: Of(ChangeKerrighedCap),
	}
}

// Fork is what a child begins with. Exec changes nothing.
func (s Sets) Fork() Sets {
	return Sets{
		Permitted:            s.InheritablePermitted,
		Effective:            s.InheritableEffective & s.InheritablePermitted,
		InheritablePermitted: s.InheritablePermitted,
		InheritableEffective: s.InheritableEffective,
	}
}

// Busy are the capabilities that running actions of a process use.
type Busy = Mask

// Change is what the process has after somebody set its sets to want. allowed
// says whether the caller may act on the process at all: same user, or root.
// The checks come in Kerrighed's order, and the errors are its errnos:
//
//	EINVAL  a set is larger than the one it is taken from
//	ENOSYS  a capability that isn't supported
//	EPERM   the caller may not, or the process lacks CHANGE_KERRIGHED_CAP
//	EBUSY   a capability would go that an action of the process uses
//
// What isn't permitted already can't be gained: it is left out in silence.
func (s Sets) Change(want Sets, allowed bool, busy Busy) (Sets, error) {
	switch {
	case !want.Effective.In(want.Permitted),
		!want.InheritablePermitted.In(want.Permitted),
		!want.InheritableEffective.In(want.InheritablePermitted):
		return s, unix.EINVAL
	case !want.Permitted.In(Supported):
		return s, unix.ENOSYS
	case !allowed, !s.Effective.Has(ChangeKerrighedCap):
		return s, unix.EPERM
	case busy&s.Effective&^want.Effective != 0:
		return s, unix.EBUSY
	}
	return Sets{
		Permitted:            want.Permitted & s.Permitted,
		Effective:            want.Effective & s.Permitted,
		InheritablePermitted: want.InheritablePermitted & s.Permitted,
		InheritableEffective: want.InheritableEffective & s.Permitted,
	}, nil
}

// ErrNoProcess says that a Table doesn't know the process: it is gone, or not
// in the container.
var ErrNoProcess = errors.New("no such process in the container")
