// Package gate is where the node daemon hears of system calls that concern the
// cluster: forks, execs, and calls that name a process of another node.
//
// A seccomp filter sends them to a listener (user notification); all other calls
// run at full speed, as do calls that name a process of this node, because the
// node is in the pid (package pids) and the filter can compare numbers.
//
// The container's init installs the filter before it starts anything, so that
// all in the container inherit it, and holds the listener as long as it lives.
// The daemon takes a copy from there and serves it. When the daemon dies, calls
// at the gate wait; the next one serves them, and those that the first had begun:
// it finds them in the Pending file.
//
// Needs Linux 6.6 for the wake-up without a detour; earlier kernels work, slower.
package gate

import (
	"context"
	"errors"
	"fmt"
	"os"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"

	"krgimage/services/pids"
)

// HolderFD is the descriptor under which the container's init holds the
// listener.
const HolderFD = 1000

// Install makes the filter hold for all threads of this process and its later
// children, and leaves the listener at HolderFD. The process must be root in its
// user namespace.
func Install(r pids.Range) error {
	program, err := assemble(r)
	if err != nil {
		return err
	}
	fprog := unix.SockFprog{Len: uint16(len(program)), Filter: &program[0]}
	const flags = unix.SECCOMP_FILTER_FLAG_NEW_LISTENER | unix.SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV |
		unix.SECCOMP_FILTER_FLAG_TSYNC | unix.SECCOMP_FILTER_FLAG_TSYNC_ESRCH
	fd, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, flags, uintptr(unsafe.Pointer(&fprog)))
	runtime.KeepAlive(program)
	if errno != 0 {
		return fmt.Errorf("install the gate: %w", errno)
	}
	if err := unix.Dup3(int(fd), HolderFD, unix.O_CLOEXEC); err != nil {
		return fmt.Errorf("install the gate: %w", err)
	}
	return unix.Close(int(fd))
}

// Take copies the listener of a container whose init has the pid.
func Take(init int) (*os.File, error) {
	pidfd, err := unix.PidfdOpen(init, 0)
	if err != nil {
		return nil, fmt.Errorf("the container's init %d: %w", init, err)
	}
	defer unix.Close(pidfd)
	fd, err := unix.PidfdGetfd(pidfd, HolderFD, 0)
	if err != nil {
		return nil, fmt.Errorf("take the gate from the container's init %d: %w", init, err)
	}
	return os.NewFile(uintptr(fd), "gate"), nil
}

// Call is a system call that waits at the gate.
type Call struct {
	ID   uint64    // of the notification
	TID  int32     // of the caller, in this process's PID namespace
	Nr   int32     // number of the system call, x86-64
	Args [6]uint64 // its arguments
}

// Answer ends a call.
type Answer struct {
	Continue bool       // the kernel carries the call out as if there were no gate
	Value    int64      // what the call returns
	Errno    unix.Errno // what it fails with; 0: it doesn't
}

// Kernel lets the kernel carry a call out.
var Kernel = Answer{Continue: true}

// Fail is the answer that a call has failed.
func Fail(e unix.Errno) Answer { return Answer{Errno: e} }

// Handler decides about calls. It runs on the goroutine that receives them and
// must be quick: what takes time is answered later, from elsewhere, with
// Gate.Answer; the handler then returns false.
type Handler func(*Gate, Call) (Answer, bool)

// Gate is a listener that is served.
type Gate struct {
	file    *os.File
	fd      int
	pending *Pending
	handle  Handler
}

// Serve serves a listener until ctx ends or the last process behind the gate
// has. It closes the listener.
func Serve(ctx context.Context, listener *os.File, p *Pending, h Handler) error {
	defer listener.Close()
	g := &Gate{file: listener, fd: int(listener.Fd()), pending: p, handle: h}
	// Waking the other side directly saves a third of the time. Kernels before
	// 6.6 don't know it.
	_, _, _ = unix.Syscall(unix.SYS_IOCTL, uintptr(g.fd), ioctlSetFlags, unix.SECCOMP_USER_NOTIF_FD_SYNC_WAKE_UP)
	wake, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		return fmt.Errorf("gate: %w", err)
	}
	defer unix.Close(wake)
	stop := context.AfterFunc(ctx, func() { unix.Write(wake, []byte{1, 0, 0, 0, 0, 0, 0, 0}) })
	defer stop()
	for _, c := range p.left() {
		if g.Waiting(c) {
			g.dispatch(c)
		} else {
			p.end(c.ID)
		}
	}
	return g.receive(ctx, wake)
}

func (g *Gate) receive(ctx context.Context, wake int) error {
	runtime.LockOSThread() // the hand-over between caller and gate is between two threads
	defer runtime.UnlockOSThread()
	first := true
	for ctx.Err() == nil {
		fds := []unix.PollFd{{Fd: int32(g.fd), Events: unix.POLLIN}, {Fd: int32(wake), Events: unix.POLLIN}}
		if _, err := unix.Poll(fds, -1); err != nil && !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("gate: %w", err)
		}
		switch {
		case fds[0].Revents&unix.POLLIN != 0:
		case fds[0].Revents&(unix.POLLHUP|unix.POLLERR) != 0:
			return nil // nobody is behind the gate any more
		default:
			continue
		}
		c, err := g.recv()
		switch {
		case errors.Is(err, unix.ENOENT), errors.Is(err, unix.EINTR):
			continue // the caller died meanwhile
		case err != nil:
			return fmt.Errorf("gate: %w", err)
		}
		if first {
			first = false
			g.release(c.ID)
		}
		g.dispatch(c)
	}
	return nil
}

// dispatch has a call handled.
func (g *Gate) dispatch(c Call) {
	g.pending.begin(c)
	if a, done := g.handle(g, c); done {
		g.Answer(c, a)
	}
}

// recent is how many calls before the first one that it sees a new daemon lets
// pass: of those that the former one had received it may have died before it
// could note the last ones.
const recent = 16

// release lets calls go on that were received, noted nowhere and never answered.
func (g *Gate) release(before uint64) {
	for id := before - 1; id > before-recent && id > 0; id-- {
		if !g.pending.has(id) {
			_ = g.send(id, Kernel)
		}
	}
}

// Answer ends a call. A caller that died meanwhile is no error.
func (g *Gate) Answer(c Call, a Answer) {
	_ = g.send(c.ID, a)
	g.pending.end(c.ID)
}

// Waiting reports whether the caller still waits. Its memory may be touched only
// between two times that it does: the pid could be another's else.
func (g *Gate) Waiting(c Call) bool {
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(g.fd), ioctlIDValid, uintptr(unsafe.Pointer(&c.ID)))
	return errno == 0
}

// The ioctls of linux/seccomp.h that x/sys doesn't name.
const (
	ioctlIDValid  = 0x40082102 // SECCOMP_IOCTL_NOTIF_ID_VALID
	ioctlSetFlags = 0x40082104 // SECCOMP_IOCTL_NOTIF_SET_FLAGS
)

// notification is struct seccomp_notif.
type notification struct {
	id    uint64
	pid   uint32
	flags uint32
	nr    int32
	arch  uint32
	ip    uint64
	args  [6]uint64
}

// response is struct seccomp_notif_resp.
type response struct {
	id    uint64
	val   int64
	errno int32
	flags uint32
}

func (g *Gate) recv() (Call, error) {
	var n notification
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(g.fd), unix.SECCOMP_IOCTL_NOTIF_RECV, uintptr(unsafe.Pointer(&n))); errno != 0 {
		return Call{}, errno
	}
	return Call{ID: n.id, TID: int32(n.pid), Nr: n.nr, Args: n.args}, nil
}

func (g *Gate) send(id uint64, a Answer) error {
	r := response{id: id, val: a.Value, errno: -int32(a.Errno)}
	if a.Continue {
		r = response{id: id, flags: unix.SECCOMP_USER_NOTIF_FLAG_CONTINUE}
	}
	if a.Errno != 0 {
		r.val = 0
	}
	if _, _, errno := unix.RawSyscall(unix.SYS_IOCTL, uintptr(g.fd), unix.SECCOMP_IOCTL_NOTIF_SEND, uintptr(unsafe.Pointer(&r))); errno != 0 {
		return errno
	}
	return nil
}
