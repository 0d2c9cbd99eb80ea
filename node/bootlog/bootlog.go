// Package bootlog is what a node says while it boots: lines on its consoles
// and in the kernel's log, and the stages of its boot for the head node.
//
// A Timeline notes each stage with the node's uptime at once and posts it when
// and if the head can be reached: nothing in a boot ever waits for it. What
// stage 1 couldn't post before it handed over, PID 1 posts (Pending).
package bootlog

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"time"

	"krgimage/node/retry"
)

// Names of the stages that a node reports, in their order.
const (
	StageStage1    = "stage1"    // init runs
	StageLink      = "link"      // an interface has a carrier
	StageLease     = "lease"     // DHCP answered
	StageRoot      = "root"      // the NFS root is mounted and checked
	StageInit      = "init"      // krg is PID 1 over the root
	StageContainer = "container" // the container runs
	StageReady     = "ready"     // sshd answers
	StageFailed    = "failed"    // the node sits in its rescue console
	StagePoweroff  = "poweroff"
	StageReboot    = "reboot"
)

// Stage is one entry of a boot's timeline.
type Stage struct {
	Name     string `json:"stage"`
	UptimeMS int64  `json:"uptime_ms"` // milliseconds since the kernel started
	Detail   string `json:"detail,omitempty"`
}

// ErrRejected marks a post that the head will never accept; the stage is then
// dropped.
var ErrRejected = errors.New("the head rejects the message")

// maxPending bounds the stages kept for a head that never answers; the oldest
// go first.
const maxPending = 64

// Timeline collects stages and posts them in order.
type Timeline struct {
	log    *slog.Logger
	clock  retry.Clock
	uptime func() time.Duration

	mu    sync.Mutex
	queue []Stage       // guarded by mu
	wake  chan struct{} // has a token when queue grew
	empty chan struct{} // guarded by mu: closed when the queue becomes empty; nil if nobody waits
}

// NewTimeline returns a timeline that starts with the stages in pending.
func NewTimeline(log *slog.Logger, clock retry.Clock, uptime func() time.Duration, pending []Stage) *Timeline {
	t := &Timeline{log: log, clock: clock, uptime: uptime, queue: pending, wake: make(chan struct{}, 1)}
	if len(pending) > 0 {
		t.wake <- struct{}{}
	}
	return t
}

// Reached says on the console that the node reached a stage and queues it for
// the head.
func (t *Timeline) Reached(name, detail string) {
	if name == StageFailed {
		t.log.Error(name + ": " + detail)
	} else {
		t.log.Info(name + ": " + detail)
	}
	t.mu.Lock()
	t.queue = append(t.queue, Stage{Name: name, UptimeMS: t.uptime().Milliseconds(), Detail: detail})
	if len(t.queue) > maxPending {
		t.queue = t.queue[len(t.queue)-maxPending:]
	}
	t.mu.Unlock()
	select {
	case t.wake <- struct{}{}:
	default:
	}
}

// Pending returns the stages that aren't posted yet.
func (t *Timeline) Pending() []Stage {
	t.mu.Lock()
	defer t.mu.Unlock()
	return append([]Stage(nil), t.queue...)
}

// Run posts stages until ctx ends. A post that fails is tried again with
// back-off; a stage whose post fails with ErrRejected is dropped.
func (t *Timeline) Run(ctx context.Context, post func(context.Context, Stage) error) error {
	wait := retry.Backoff{Min: 250 * time.Millisecond, Max: 15 * time.Second, Jitter: 0.5}
	for {
		stage, ok := t.first()
		if !ok {
			select {
			case <-ctx.Done():
				return nil
			case <-t.wake:
				continue
			}
		}
		err := post(ctx, stage)
		switch {
		case ctx.Err() != nil && err != nil:
			return nil
		case errors.Is(err, ErrRejected):
			t.log.Debug("boot stage not taken", "stage", stage.Name, "err", err)
			t.drop(stage)
		case err != nil:
			t.log.Debug("boot stage not posted yet", "stage", stage.Name, "err", err)
			if retry.Wait(ctx, t.clock, wait.Next()) != nil {
				return nil
			}
		default:
			wait.Reset()
			t.drop(stage)
		}
	}
}

func (t *Timeline) first() (Stage, bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(t.queue) == 0 {
		if t.empty != nil {
			close(t.empty)
			t.empty = nil
		}
		return Stage{}, false
	}
	return t.queue[0], true
}

// drop removes s, unless a full queue has already pushed it out.
func (t *Timeline) drop(s Stage) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(t.queue) > 0 && t.queue[0] == s {
		t.queue = t.queue[1:]
	}
}

// Flush waits until all stages are posted or ctx ends. Run must be running.
func (t *Timeline) Flush(ctx context.Context) {
	t.mu.Lock()
	if len(t.queue) == 0 {
		t.mu.Unlock()
		return
	}
	if t.empty == nil {
		t.empty = make(chan struct{})
	}
	empty := t.empty
	t.mu.Unlock()
	select {
	case <-ctx.Done():
	case <-empty:
	}
}
