package supervise

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"sync"

	"golang.org/x/sys/unix"
)

// Reaper starts processes and learns how they ended.
//
// An init process must wait for every child, also for orphans it never
// started. os/exec can't share that: its Wait and a wait for any child steal
// each other's results. So under an init all processes are started here and
// there is one waiter, ReapAll, which hands out the results.
type Reaper struct {
	init bool

	mu        sync.Mutex
	children  map[int]*Child          // guarded by mu
	starting  int                     // guarded by mu: starts in progress
	unclaimed map[int]unix.WaitStatus // guarded by mu: reaped while a start was in progress
}

// NewReaper returns a Reaper. With init, results come only while ReapAll runs;
// without, each child is waited for on its own and strangers are left alone.
func NewReaper(init bool) *Reaper {
	return &Reaper{init: init, children: map[int]*Child{}, unclaimed: map[int]unix.WaitStatus{}}
}

// Child is a started process.
type Child struct {
	PID  int
	done chan struct{} // closed when reaped

	mu     sync.Mutex
	reaped bool            // guarded by mu
	status unix.WaitStatus // guarded by mu; valid once reaped
}

// Done is closed when the process has ended.
func (c *Child) Done() <-chan struct{} { return c.done }

// Status tells how the process ended; call it after Done.
func (c *Child) Status() unix.WaitStatus {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.status
}

// Signal sends sig unless the process was reaped, so that a reused pid can't
// be hit.
func (c *Child) Signal(sig unix.Signal) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.reaped {
		return os.ErrProcessDone
	}
	return unix.Kill(c.PID, sig)
}

// Start starts cmd. Its standard streams must be nil or *os.File: nobody calls
// cmd.Wait, which would end the copying goroutines of os/exec.
func (r *Reaper) Start(cmd *exec.Cmd) (*Child, error) {
	for _, s := range []any{cmd.Stdin, cmd.Stdout, cmd.Stderr} {
		if _, file := s.(*os.File); s != nil && !file {
			return nil, fmt.Errorf("start %s: standard streams must be files", cmd.Path)
		}
	}
	r.mu.Lock()
	r.starting++
	r.mu.Unlock()

	err := cmd.Start()

	r.mu.Lock()
	defer r.mu.Unlock()
	r.starting--
	defer func() {
		if r.starting == 0 {
			clear(r.unclaimed)
		}
	}()
	if err != nil {
		return nil, err
	}
	c := &Child{PID: cmd.Process.Pid, done: make(chan struct{})}
	_ = cmd.Process.Release()
	if status, ok := r.unclaimed[c.PID]; ok {
		delete(r.unclaimed, c.PID)
		c.end(status)
		return c, nil
	}
	r.children[c.PID] = c
	if !r.init {
		go r.waitOne(c.PID) // ends with the process
	}
	return c, nil
}

func (c *Child) end(status unix.WaitStatus) {
	c.mu.Lock()
	c.reaped, c.status = true, status
	c.mu.Unlock()
	close(c.done)
}

// waitOne waits without reaping first: between the reaping and the entry in
// Child the pid could belong to another process.
func (r *Reaper) waitOne(pid int) {
	for {
		err := unix.Waitid(unix.P_PID, pid, nil, unix.WEXITED|unix.WNOWAIT, nil)
		if !errors.Is(err, unix.EINTR) {
			break
		}
	}
	r.reap(pid, 0)
}

// reap waits for pid (or any child, -1) and hands out one result. It reports
// whether there was one.
func (r *Reaper) reap(pid, flags int) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	var status unix.WaitStatus
	// The lock of the child whose status this is can't be known before, so
	// signals to all wait: Signal and the reaping of its pid exclude each other.
	for _, c := range r.children {
		c.mu.Lock()
	}
	got, err := unix.Wait4(pid, &status, flags, nil)
	for _, c := range r.children {
		if err == nil && c.PID == got {
			c.reaped = true
		}
		c.mu.Unlock()
	}
	if err != nil || got <= 0 {
		return errors.Is(err, unix.EINTR)
	}
	if c, ok := r.children[got]; ok {
		delete(r.children, got)
		c.end(status)
	} else if r.starting > 0 {
		r.unclaimed[got] = status
	}
	return true
}

// ReapAll waits for every child of this process, its own and adopted ones,
// until ctx ends.
func (r *Reaper) ReapAll(ctx context.Context) error {
	ch := make(chan os.Signal, 1)
	signal.Notify(ch, unix.SIGCHLD)
	defer signal.Stop(ch)
	for {
		for r.reap(-1, unix.WNOHANG) {
		}
		select {
		case <-ctx.Done():
			return nil
		case <-ch:
		}
	}
}
