package agent

import (
	"context"
	"errors"
	"fmt"
	"time"

	"krgimage/services/cluster/wire"
)

// Deadlines of leaving.
const (
	drainTimeout = time.Minute
	stopTimeout  = time.Minute
)

// worker carries out commands, one after the other. They go on when the stream
// that they came by ends; only their results are lost then, and the next hello
// tells the head how things stand.
func (a *Agent) worker(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case j := <-a.work:
			err := a.do(ctx, j)
			if ctx.Err() != nil {
				return
			}
			r := &wire.Result{Command: j.Id}
			if err != nil {
				r.Error = err.Error()
				a.log.Warn("the head's command failed", "command", j.Kind, "epoch", j.Epoch, "err", err)
			}
			j.session.send(ctx, &wire.FromNode{Message: &wire.FromNode_Result{Result: r}})
		}
	}
}

func (a *Agent) do(ctx context.Context, j job) error {
	m, c := a.cfg.Machine, j.Command
	switch c.Kind {
	case wire.Kind_KIND_JOIN:
		a.log.Info("joining the cluster", "epoch", c.Epoch)
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		a.mu.Lock()
		a.joining = cancel
		undone := a.undone > j.number
		a.mu.Unlock()
		defer func() {
			a.mu.Lock()
			a.joining = nil
			a.mu.Unlock()
		}()
		if undone {
			return errors.New("taken back")
		}
		return m.Start(ctx, c.Epoch)
	case wire.Kind_KIND_LEAVE:
		a.log.Info("leaving the cluster", "epoch", c.Epoch, "reason", c.Reason)
		if err := a.drain(ctx, Leaving{c.Epoch, c.Reason}); err != nil {
			return err
		}
		m.Tell(fmt.Sprintf("this node leaves the cluster (%s): its processes end now", c.Reason))
		return a.stop(ctx)
	case wire.Kind_KIND_FENCE:
		running, epoch, err := m.Container(ctx)
		if err != nil || !running {
			return err
		}
		a.log.Warn("the container stops", "epoch", epoch, "reason", c.Reason)
		m.Tell(fmt.Sprintf("this node is out of the cluster (%s): its processes end now", c.Reason))
		return a.stop(ctx)
	case wire.Kind_KIND_POWEROFF, wire.Kind_KIND_REBOOT:
		return m.Down(ctx, c.Kind == wire.Kind_KIND_REBOOT, c.Reason)
	case wire.Kind_KIND_MESSAGE:
		m.Tell(c.Reason)
		return nil
	}
	return fmt.Errorf("unknown command %d: the head is newer than this node", c.Kind)
}

func (a *Agent) drain(ctx context.Context, l Leaving) error {
	ctx, cancel := context.WithTimeout(ctx, drainTimeout)
	defer cancel()
	for _, d := range a.cfg.Drainers {
		if err := d.Drain(ctx, l); err != nil {
			return fmt.Errorf("can't leave: %w", err)
		}
	}
	return nil
}

func (a *Agent) stop(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, stopTimeout)
	defer cancel()
	return a.cfg.Machine.Stop(ctx)
}
