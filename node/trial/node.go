package trial

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Node is one machine of a trial. It can be switched on again after it was off;
// its console, its port on the switch and its UEFI variables stay.
type Node struct {
	hw      hardware
	console *Console
	changed func() // called, without locks, when the power or the boot changed

	starting sync.Mutex // held during Start: one QEMU at a time

	mu      sync.Mutex
	p       *child    // guarded by mu; nil: never started
	q       *qmp      // guarded by mu
	stderr  *tail     // guarded by mu
	powered time.Time // of the last power-on or reset; guarded by mu
	ended   string    // why QEMU ended, as the guest or we wanted; guarded by mu
}

func newNode(hw hardware, log io.Writer, changed func()) *Node {
	return &Node{hw: hw, console: newConsole(log), changed: changed}
}

// ErrOff: the machine is off.
var ErrOff = errors.New("the machine is off")

// Machine is what the node is.
func (n *Node) Machine() Machine { return n.hw.Machine }

// Console is the node's serial line.
func (n *Node) Console() *Console { return n.console }

// Start switches the machine on: it returns when QEMU runs and obeys.
func (n *Node) Start(ctx context.Context) error {
	if err := n.start(ctx); err != nil {
		return fmt.Errorf("start node %d: %w", n.hw.ID, err)
	}
	n.changed()
	return nil
}

func (n *Node) start(ctx context.Context) error {
	n.starting.Lock()
	defer n.starting.Unlock()
	n.mu.Lock()
	running := n.p != nil && !n.p.ended()
	n.mu.Unlock()
	if running {
		return errors.New("it is on already")
	}
	if n.hw.vars != "" {
		if err := copyOnce(n.hw.vars, n.hw.Vars); err != nil {
			return fmt.Errorf("UEFI variables: %w", err)
		}
	}
	line, theirLine, err := socketPair()
	if err != nil {
		return err
	}
	defer theirLine.Close()
	control, theirControl, err := socketPair()
	if err != nil {
		line.Close()
		return err
	}
	defer theirControl.Close()

	stderr := &tail{}
	cmd := exec.Command(n.hw.QEMU, n.hw.args()...)
	cmd.Stderr = stderr
	cmd.ExtraFiles = []*os.File{theirLine, theirControl} // serialFD, qmpFD
	p, err := startChild(cmd)
	if err != nil {
		line.Close()
		control.Close()
		return fmt.Errorf("%s: %w", n.hw.QEMU, err)
	}
	n.mu.Lock()
	n.p, n.stderr, n.powered, n.ended = p, stderr, time.Now(), ""
	n.mu.Unlock()
	go n.console.run(line) // ends when QEMU closes its end
	// Our copies of QEMU's ends must go, or its death would not show.
	theirLine.Close()
	theirControl.Close()

	q, err := newQMP(ctx, control, n.event)
	if err != nil {
		p.kill()
		<-p.done
		if ctx.Err() != nil {
			return ctx.Err()
		}
		return fmt.Errorf("%s%s", exitText(p.err), stderr.hint())
	}
	n.mu.Lock()
	n.q = q
	n.mu.Unlock()
	go func() {
		<-p.done
		control.Close()
		n.changed()
	}()
	return nil
}

func (n *Node) event(e qmpEvent) {
	n.mu.Lock()
	switch e.Name {
	case "RESET":
		n.powered = e.At
	case "SHUTDOWN":
		n.ended = e.Data.Reason
	}
	n.mu.Unlock()
	if e.Name == "RESET" {
		n.changed()
	}
}

// Powerdown presses the power button: the guest shuts itself down, or ignores
// it.
func (n *Node) Powerdown(ctx context.Context) error { return n.command(ctx, "system_powerdown", nil) }

// pressUntilOff presses the power button until the machine is off or ctx ends.
func (n *Node) pressUntilOff(ctx context.Context) {
	for ctx.Err() == nil && n.Powerdown(ctx) == nil {
		wait, cancel := context.WithTimeout(ctx, pressAgain)
		err := n.Wait(wait)
		cancel()
		if err == nil {
			return
		}
	}
}

// Reset presses the reset button: the machine boots again at once.
func (n *Node) Reset(ctx context.Context) error { return n.command(ctx, "system_reset", nil) }

// Pause stops the machine's CPUs as if the host had stalled; Resume lets them
// run on.
func (n *Node) Pause(ctx context.Context) error { return n.command(ctx, "stop", nil) }

// Resume ends a Pause.
func (n *Node) Resume(ctx context.Context) error { return n.command(ctx, "cont", nil) }

// SetLink plugs or pulls the network cable at the machine: unlike
// vnet.Port.SetUp the guest sees its carrier change.
func (n *Node) SetLink(ctx context.Context, up bool) error {
	return n.command(ctx, "set_link", map[string]any{"name": "n0", "up": up})
}

// Kill takes the machine's power away.
func (n *Node) Kill() {
	n.mu.Lock()
	p := n.p
	if p != nil && !p.ended() && n.ended == "" {
		n.ended = "host-kill"
	}
	n.mu.Unlock()
	if p != nil {
		p.kill()
		<-p.done
	}
}

func (n *Node) command(ctx context.Context, name string, args any) error {
	n.mu.Lock()
	q, off := n.q, n.p == nil || n.p.ended()
	n.mu.Unlock()
	if off || q == nil {
		return fmt.Errorf("node %d: %w", n.hw.ID, ErrOff)
	}
	if err := q.do(ctx, name, args); err != nil {
		return fmt.Errorf("node %d: %w", n.hw.ID, err)
	}
	return nil
}

// Wait waits until the machine is off.
func (n *Node) Wait(ctx context.Context) error {
	n.mu.Lock()
	p := n.p
	n.mu.Unlock()
	if p == nil {
		return nil
	}
	select {
	case <-p.done:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// power is a machine's state as its power supply knows it.
type power struct {
	pid   int       // 0: off
	since time.Time // of the last power-on or reset
	crash string    // not empty: QEMU ended though nobody wanted it
}

func (n *Node) power() power {
	n.mu.Lock()
	defer n.mu.Unlock()
	w := power{since: n.powered}
	switch {
	case n.p == nil:
	case !n.p.ended():
		w.pid = n.p.pid()
	case n.ended == "" || n.p.err != nil && n.ended != "host-kill":
		w.crash = exitText(n.p.err) + n.stderr.hint()
	}
	return w
}

func (c *child) ended() bool {
	select {
	case <-c.done:
		return true
	default:
		return false
	}
}

// socketPair is a stream between us and a child: our end as a connection that
// obeys deadlines and Close, the child's as a file to inherit.
func socketPair() (net.Conn, *os.File, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("socket pair: %w", err)
	}
	ours, theirs := os.NewFile(uintptr(fds[0]), "ours"), os.NewFile(uintptr(fds[1]), "theirs")
	conn, err := net.FileConn(ours)
	ours.Close()
	if err != nil {
		theirs.Close()
		return nil, nil, fmt.Errorf("socket pair: %w", err)
	}
	return conn, theirs, nil
}

// copyOnce copies a file unless the copy is there.
func copyOnce(to, from string) error {
	if _, err := os.Stat(to); err == nil {
		return nil
	}
	data, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	return os.WriteFile(to, data, 0o600)
}
