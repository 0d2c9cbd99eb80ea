// Package supervise keeps services running: it starts them, keeps the end of
// their output, starts them again when they end, and stops them with a
// deadline. PID 1 runs the container with it, the container's init runs sshd.
//
// A service that ends is started again after a wait that doubles from
// BackoffMin to BackoffMax; a run of at least Stable makes the next wait the
// first again. To stop, the process gets SIGTERM, and SIGKILL when it is still
// there after StopTimeout.
package supervise

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"krgimage/node/retry"
)

// Service says what to run.
type Service struct {
	Name string
	// Command returns a fresh command for each start. Standard output and
	// error go to the service's ring unless it sets them.
	Command func() (*exec.Cmd, error)

	BackoffMin, BackoffMax time.Duration // default 500 ms and 30 s
	Stable                 time.Duration // default 1 min
	StopTimeout            time.Duration // default 10 s
	LogSize                int           // bytes of output kept, default 64 KiB
	Tee                    io.Writer     // also gets the output; may be nil

	OnStart func(pid int)                // called after each start; may be nil
	OnExit  func(status unix.WaitStatus) // called after each end that wasn't asked for; may be nil
}

// State of a unit.
type State string

// The states a unit passes through.
const (
	Starting State = "starting"
	Running  State = "running"
	Waiting  State = "waiting" // for the next start
	Stopping State = "stopping"
	Stopped  State = "stopped"
)

// Status is what is known of a unit.
type Status struct {
	Name     string    `json:"name"`
	State    State     `json:"state"`
	PID      int       `json:"pid,omitempty"`
	Starts   int       `json:"starts"`
	Since    time.Time `json:"since"` // of State
	LastExit string    `json:"last_exit,omitempty"`
}

// Unit is a service under supervision.
type Unit struct {
	service Service
	reaper  *Reaper
	clock   retry.Clock
	log     *slog.Logger
	ring    *Ring

	mu     sync.Mutex
	status Status // guarded by mu
}

// killPatience is how long a process may take to go after SIGKILL: one that
// hangs in the kernel on a dead file server must not stop a shutdown.
const killPatience = 5 * time.Second

// New returns a unit that runs s once Run is called.
func New(s Service, reaper *Reaper, clock retry.Clock, log *slog.Logger) *Unit {
	def := func(d *time.Duration, v time.Duration) {
		if *d == 0 {
			*d = v
		}
	}
	def(&s.BackoffMin, 500*time.Millisecond)
	def(&s.BackoffMax, 30*time.Second)
	def(&s.Stable, time.Minute)
	def(&s.StopTimeout, 10*time.Second)
	if s.LogSize == 0 {
		s.LogSize = 64 << 10
	}
	return &Unit{
		service: s, reaper: reaper, clock: clock, log: log.With("service", s.Name), ring: NewRing(s.LogSize),
		status: Status{Name: s.Name, State: Stopped},
	}
}

// Status returns a copy of what is known now.
func (u *Unit) Status() Status {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.status
}

// Log is the end of the service's output.
func (u *Unit) Log() *Ring { return u.ring }

func (u *Unit) set(state State, change func(*Status)) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.status.State, u.status.Since = state, u.clock.Now()
	if change != nil {
		change(&u.status)
	}
}

// Run keeps the service running until ctx ends, stops it then and returns nil,
// or an error when the process couldn't be got rid of.
func (u *Unit) Run(ctx context.Context) error {
	// One pipe for the unit's whole life: descendants of an earlier run that
	// still write are neither cut off nor lost.
	r, w, err := os.Pipe()
	if err != nil {
		return fmt.Errorf("service %s: %w", u.service.Name, err)
	}
	copied := make(chan struct{})
	go func() { // ends when r is closed
		defer close(copied)
		var out io.Writer = u.ring
		if u.service.Tee != nil {
			out = io.MultiWriter(u.ring, u.service.Tee)
		}
		_, _ = io.Copy(out, r)
	}()
	defer func() {
		w.Close()
		// Only processes that outlive the stop still hold the pipe; what they
		// have to say isn't waited for.
		_ = r.SetReadDeadline(time.Now().Add(50 * time.Millisecond))
		<-copied
		r.Close()
	}()

	wait := retry.Backoff{Min: u.service.BackoffMin, Max: u.service.BackoffMax}
	for {
		began := u.clock.Now()
		child, err := u.start(w)
		if err != nil {
			u.set(Waiting, func(s *Status) { s.LastExit = err.Error() })
			u.log.Error("service doesn't start", "err", err)
		} else {
			select {
			case <-child.Done():
			case <-ctx.Done():
				return u.stop(child)
			}
			u.ended(child)
		}
		if u.clock.Now().Sub(began) >= u.service.Stable {
			wait.Reset()
		}
		d := wait.Next()
		u.log.Info("service starts again", "after", d)
		if retry.Wait(ctx, u.clock, d) != nil {
			u.set(Stopped, nil)
			return nil
		}
	}
}

func (u *Unit) start(output *os.File) (*Child, error) {
	u.set(Starting, func(s *Status) { s.Starts++ })
	cmd, err := u.service.Command()
	if err != nil {
		return nil, err
	}
	if cmd.Stdout == nil {
		cmd.Stdout = output
	}
	if cmd.Stderr == nil {
		cmd.Stderr = output
	}
	child, err := u.reaper.Start(cmd)
	for _, f := range cmd.ExtraFiles {
		f.Close()
	}
	if err != nil {
		return nil, err
	}
	u.set(Running, func(s *Status) { s.PID = child.PID })
	u.log.Debug("service started", "pid", child.PID)
	if u.service.OnStart != nil {
		u.service.OnStart(child.PID)
	}
	return child, nil
}

func (u *Unit) ended(child *Child) {
	status := child.Status()
	u.set(Waiting, func(s *Status) { s.PID, s.LastExit = 0, Describe(status) })
	u.log.Warn("service ended", "pid", child.PID, "how", Describe(status), "said", string(u.ring.Tail(3)))
	if u.service.OnExit != nil {
		u.service.OnExit(status)
	}
}

func (u *Unit) stop(child *Child) error {
	u.set(Stopping, nil)
	for _, step := range []struct {
		signal  unix.Signal
		timeout time.Duration
	}{{unix.SIGTERM, u.service.StopTimeout}, {unix.SIGKILL, killPatience}} {
		_ = child.Signal(step.signal)
		select {
		case <-child.Done():
			u.set(Stopped, func(s *Status) { s.PID, s.LastExit = 0, Describe(child.Status()) })
			return nil
		case <-u.clock.After(step.timeout):
			u.log.Warn("service doesn't stop", "pid", child.PID, "signal", unix.SignalName(step.signal), "after", step.timeout)
		}
	}
	return fmt.Errorf("service %s: pid %d is still there after SIGKILL", u.service.Name, child.PID)
}

// Describe says in words how a process ended.
func Describe(status unix.WaitStatus) string {
	switch {
	case status.Exited():
		return fmt.Sprintf("exit status %d", status.ExitStatus())
	case status.Signaled():
		return "killed by " + unix.SignalName(status.Signal())
	}
	return fmt.Sprintf("wait status %#x", uint32(status))
}
